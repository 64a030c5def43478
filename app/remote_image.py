"""Fetching a picture from an address that a stranger gave, which must not become a way into the local network."""

from __future__ import annotations

import functools
import ipaddress
import socket
import ssl

import anyio
import anyio.to_thread
import httpx

from app.uploads import Limits, TooLarge

SECONDS = 20.0  # for all of it
MOST_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # how networks of IPv6 alone reach IPv4 addresses (RFC 6052)
# IPv4-compatible, IPv4-translated, a network's own NAT64, site-local: `is_global` lets them through.
NEVER_PUBLIC = [ipaddress.ip_network(name) for name in ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "fec0::/10")]


async def fetch_image(address: str, limits: Limits) -> bytes:
    """The content of an http or https address, not decoded.

    Only public addresses are spoken to: the name is looked up here, and the connection goes to the very address that
    was checked, for a name can point elsewhere a moment later. Each redirect is checked likewise.

    Raises:
        ValueError: The address is not of that kind, is not public, does not answer, or answers with something else.
        TooLarge: More bytes than `limits` allow; no more than that are read.
    """
    try:
        with anyio.fail_after(SECONDS):
            verify = await anyio.to_thread.run_sync(_certificates)
            async with httpx.AsyncClient(trust_env=False, timeout=SECONDS, verify=verify) as client:
                url = httpx.URL(address)
                for _ in range(MOST_REDIRECTS + 1):
                    content = await _get(client, url, limits)
                    if isinstance(content, bytes):
                        return content
                    url = content
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as error:
        raise ValueError(f"the image could not be fetched: {str(error) or type(error).__name__}") from error
    raise ValueError(f"the image could not be fetched: more than {MOST_REDIRECTS} redirects")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Those of the public authorities; reading them takes a while."""
    return httpx.create_ssl_context()


async def _get(client: httpx.AsyncClient, url: httpx.URL, limits: Limits) -> bytes | httpx.URL:
    """The content, or where it is to be found."""
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"the image must be at an http or https address, got {url.scheme or 'none'}")
    at = await _public_address(url)
    request = client.build_request(
        "GET",
        url.copy_with(host=at),
        headers={"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
        extensions={"sni_hostname": url.raw_host.decode("ascii")},
    )
    response = await client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return url.join(response.headers["location"])
        if response.status_code != 200:
            raise ValueError(f"the image could not be fetched: status {response.status_code}")
        content = bytearray()
        async for piece in response.aiter_raw():  # not unpacked: a little can unpack to gigabytes
            content += piece
            if len(content) > limits.max_bytes:
                raise TooLarge(f"the image has more than {limits.max_bytes / 1e6:g} MB; send a smaller one")
        return bytes(content)
    finally:
        await response.aclose()


async def _public_address(url: httpx.URL) -> str:
    """The address that the host's name stands for.

    Raises:
        ValueError: It stands for none, or for one of this machine or a local network.
    """
    try:
        found = await anyio.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"the image could not be fetched: {url.host} is not known") from error
    addresses = [entry[4][0] for entry in found]
    if not all(is_public(address) for address in addresses):
        raise ValueError(f"the image could not be fetched: {url.host} is not a public address")
    return next((address for address in addresses if "." in address), addresses[0])  # not every network has IPv6


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; one that wraps an IPv4 address counts as that."""
    parsed: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if any(parsed in network for network in NEVER_PUBLIC):
            return False
        if parsed in NAT64:
            parsed = ipaddress.IPv4Address(parsed.packed[-4:])
        else:
            parsed = parsed.ipv4_mapped or parsed.sixtofour or parsed
    return parsed.is_global and not parsed.is_multicast
