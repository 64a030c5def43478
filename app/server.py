"""The app as one web server: the page and its endpoints at /, the OpenAI-compatible API under /v1."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from app.openai_api import ApiOptions, build_router
from app.safety import BodyLimit, Credentials, SameSite, SecurityHeaders
from app.uploads import Limits

if TYPE_CHECKING:
    import gradio

    from app.service import Service

UPLOAD_PATH = "/gradio_api/upload"
UPLOAD_BYTES = 1_000_000_000  # many files at once; each of them is held to `Limits.max_bytes`
TEXT_BYTES = 1_000_000  # of a request beside its picture
GRACE = 1  # seconds that open connections have when the server ends


@dataclass(frozen=True)
class ServerSettings:
    """How the server is to be reached.

    Attributes:
        host: The address it is bound to; on a loopback address it answers to loopback names alone.
        auth: User and password, of the page and of the API.
        allow_hosts: Names, besides, under which it is reached: behind a proxy.
        allow_image_urls: The API may fetch pictures from http and https addresses.
        limits: Of the pictures that are sent.
    """

    host: str = "127.0.0.1"
    auth: tuple[str, str] | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_image_urls: bool = False
    limits: Limits = field(default_factory=Limits)


def build_server(service: Service, ui: gradio.Blocks, settings: ServerSettings) -> FastAPI:
    """The whole app.

    Args:
        ui: The page, built over the same service.
    """
    import gradio

    from app import style

    app = FastAPI(title="mmadapter", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(build_router(service, settings.limits, ApiOptions(settings.allow_image_urls)))

    def limit_of(path: str) -> int:
        return UPLOAD_BYTES if path == UPLOAD_PATH else settings.limits.max_bytes * 4 // 3 + TEXT_BYTES  # base64

    # The last one added is met first.
    app.add_middleware(BodyLimit, limit_of=limit_of)
    if settings.auth is not None:
        app.add_middleware(Credentials, user=settings.auth[0], password=settings.auth[1])
    app.add_middleware(SameSite, host=settings.host, names=settings.allow_hosts)
    app.add_middleware(SecurityHeaders)
    return gradio.mount_gradio_app(
        app,
        ui,
        path="/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        allowed_paths=[],
        max_file_size=settings.limits.max_bytes,
        show_error=False,  # an error that is no sentence for people stays in the log
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=["api", "settings"],
        theme=style.theme(),
        css=style.CSS,
        head=style.HEAD,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, held but not listening yet; port 0 is any free one.

    Raises:
        OSError: The port is in use or not allowed, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} is no address of this machine: {reason}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot serve at {host} port {port}: {error.strerror}; choose another --port") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """What to open in a browser on this machine."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:  # all addresses of this machine, and no address to go to
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_server(app: FastAPI) -> uvicorn.Server:
    """The HTTP server of the app, for `serve`."""
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, server_header=False)
    )


def serve(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serves on a socket of `bind` until the server is told to end."""
    log = logging.getLogger("uvicorn.error")

    def until_the_end(_: logging.LogRecord) -> bool:
        return not server.should_exit  # that open connections are then cut off is no news, and no traceback

    log.addFilter(until_the_end)
    try:
        server.run(sockets=[bound])
    finally:
        log.removeFilter(until_the_end)


@contextlib.contextmanager
def running(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves the app in a thread as long as the context lasts, and gives its URL.

    Raises:
        OSError: As `bind`.
    """
    bound = bind(host, port)
    server = uvicorn_server(app)
    thread = threading.Thread(target=serve, args=(server, bound), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.01)
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
