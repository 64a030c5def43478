"""What stands between the network and the app, for every path alike: who may ask, from where, and how much.

Four ASGI layers. A browser lets any web page send requests to a server on this machine, and a name that its owner
points at 127.0.0.1 makes them same-origin (DNS rebinding): `SameSite` refuses both.
"""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.openai_api import error_response
from app.openai_request import ApiError

# Gradio's page has scripts and styles within it, makes some at run time, and shows uploads as blobs.
PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
# A file that somebody uploaded runs nothing, whatever it is.
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; sandbox"
FILE_PATH = "/gradio_api/file="
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether an address or name is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class SecurityHeaders:
    """Tells browsers to load nothing from elsewhere and to show the page in no other site's frame."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        policy = FILE_POLICY if scope.get("path", "").startswith(FILE_PATH) else PAGE_POLICY

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = policy
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, send_with_headers)


class SameSite:
    """Refuses what another web site asks a browser to send, and names that are not this server's.

    Args:
        host: The address that the server is bound to.
        names: Names, besides, under which it is reached: behind a proxy.
    """

    def __init__(self, app: ASGIApp, host: str, names: Collection[str] = ()) -> None:
        self.app = app
        self.names = {name.lower() for name in names}
        # Beyond loopback the names are not known; there, credentials or the owner's word let people in.
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower(), *self.names} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._reason(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self.app(scope, receive, send)
        else:
            await _refuse(ApiError(403, reason, "forbidden"), scope, receive, send)

    def _reason(self, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return f"this server is not {host[:100]!r}; open it at 127.0.0.1, or start it with --allow-host NAME"
        origin = headers.get("origin")
        if origin is not None:
            netloc = origin.partition("://")[2]
            if netloc.lower() != host.lower() and _name(netloc) not in self.names:
                return "requests from the pages of another site are refused"
        # Pictures and scripts of another site's page carry no origin; only a link to here is let through.
        elif headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "requests from the pages of another site are refused"
        return None


class Credentials:
    """Lets in who knows the password: HTTP Basic, as browsers ask for it, or `Authorization: Bearer PASSWORD`."""

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self.app, self.user, self.password = app, user.encode(), password.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._known(Headers(scope=scope).get("authorization", "")):
            await self.app(scope, receive, send)
            return
        message = "this server asks for its user and password, or the password as API key"
        ask = {"WWW-Authenticate": 'Basic realm="mmadapter", charset="UTF-8"'}
        await _refuse(ApiError(401, message, "invalid_api_key", headers=ask), scope, receive, send)

    def _known(self, header: str) -> bool:
        scheme, _, value = header.partition(" ")
        if scheme.lower() == "bearer":
            return secrets.compare_digest(value.strip(" \t").encode("latin-1"), self.password)  # as headers are decoded
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(value.strip(), validate=True).partition(b":")
        except ValueError:
            return False
        # Both are compared in any case, so that the time taken does not say which one is wrong.
        right = secrets.compare_digest(user, self.user), secrets.compare_digest(password, self.password)
        return all(right)


class BodyLimit:
    """Refuses requests of more bytes than a path takes, before or while they come.

    Args:
        limit_of: The most bytes, for a path.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[str], int]) -> None:
        self.app, self.limit_of = app, limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit_of(scope["path"])
        message = f"the request has more than {limit / 1e6:.0f} MB; send less, or smaller pictures"
        error = ApiError(413, message, "request_too_large", headers={"Connection": "close"})
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            await _refuse(error, scope, receive, send)
            return
        taken = 0
        started = refused = False

        async def receive_counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return {"type": "http.disconnect"} if taken > limit else message  # the app gives up on it

        async def send_or_refuse(message: Message) -> None:
            nonlocal started, refused
            if taken > limit and not started:
                if not refused:  # in place of whatever the app says about a request cut short
                    refused = True
                    await _refuse(error, scope, receive, send)
                return
            started = True
            await send(message)

        try:
            await self.app(scope, receive_counted, send_or_refuse)
        except Exception:
            if taken <= limit:
                raise  # otherwise it is our doing
        if taken > limit and not started and not refused:
            await _refuse(error, scope, receive, send)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error, under /v1 in the shape that OpenAI's clients expect."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
        return
    response: Response = (
        error_response(error)
        if scope["path"].startswith("/v1/")
        else PlainTextResponse(f"{error}\n", error.status, error.headers)
    )
    await response(scope, receive, send)


def _name(netloc: str) -> str | None:
    """The host's name of HOST or HOST:PORT, None where it is neither."""
    try:
        parts = urlsplit(f"//{netloc}")
        return parts.hostname if parts.netloc == netloc and "@" not in netloc else None
    except ValueError:
        return None
