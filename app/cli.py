"""The app's command line: load a model once, serve the page and the API until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmadapter.options import Parser, add_model_options, load_session, main_with_errors

if TYPE_CHECKING:
    import gradio

    from app.feedback import Feedback
    from app.service import Service
    from mmadapter.session import Session

DESCRIPTION = """\
python -m app
python -m app --host 0.0.0.0 --auth anna:PASSWORD --feedback feedback.jsonl

Opens the demo at http://127.0.0.1:7860: captions, questions about a picture, chat. The same address answers OpenAI
clients under /v1. All adapters that fit the base model can be chosen in the page; --adapter names the one that is the
default. Nothing is sent anywhere: without --host the app is reached from this machine alone.
"""
FIRST = ("caption", "qa", "instruct")  # the order of the shipped adapters in the page; the others follow by name
MOST_REQUESTS = 200  # written and waiting: each holds one of the page's threads (ui.THREADS)
# Read by the libraries as they are imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0 after Ctrl-C, or 1 after an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.auth is not None and not all(args.auth.partition(":")[::2]):
        parser.error("--auth must be USER:PASSWORD, neither of them empty")
    return main_with_errors(lambda: run(args), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m app", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="default: %(default)s, this machine alone"
    )
    serving.add_argument(
        "--port", metavar="N", type=_port, default=7860, help="0 is any free one (default: %(default)s)"
    )
    serving.add_argument("--open", action="store_true", help="open the page in the browser")
    serving.add_argument(
        "--max-batch", metavar="N", type=_positive, default=8, help="texts at once (default: %(default)s)"
    )
    serving.add_argument(
        "--queue", metavar="N", type=_positive, default=32, help="requests that may wait (default: %(default)s)"
    )
    serving.add_argument(
        "--feedback",
        metavar="FILE",
        type=Path,
        help="keep thumbs and comments in FILE, as JSON lines; none keeps none (default: one in the cache folder)",
    )
    serving.add_argument(
        "--log", metavar="FILE", type=Path, help="log to FILE, as JSON lines (default: standard error)"
    )
    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--auth", metavar="USER:PASSWORD", help="ask for these; an API client gives PASSWORD as its key"
    )
    safety.add_argument("--allow-anyone", action="store_true", help="beyond this machine without --auth")
    safety.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a name of this server, behind a proxy"
    )
    safety.add_argument("--allow-image-urls", action="store_true", help="let the API fetch pictures from the internet")
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    from app.safety import is_loopback
    from app.server import ServerSettings, bind, build_server, serve, url_of, uvicorn_server

    if not is_loopback(args.host) and args.auth is None and not args.allow_anyone:
        raise ValueError(
            f"--host {args.host} lets other machines in; give --auth USER:PASSWORD, or --allow-anyone for everybody"
        )
    if args.max_batch + args.queue > MOST_REQUESTS:
        raise ValueError(
            f"--max-batch and --queue take at most {MOST_REQUESTS} requests together, got {args.max_batch + args.queue}"
        )
    for name in ("feedback", "log"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{name} {path}: there is no folder {path.parent}; make it first")
    user, _, password = (args.auth or "").partition(":")
    settings = ServerSettings(
        host=args.host,
        auth=(user, password) if args.auth else None,
        allow_hosts=tuple(args.allow_host),
        allow_image_urls=args.allow_image_urls,
    )
    # Held from the start, so that a port in use is told before a model is loaded.
    with contextlib.closing(bind(args.host, args.port)) as bound, _own_environment():
        service, feedback = _load(args)
        try:
            app = build_server(service, _page(service, feedback), settings)
            bound.listen()  # from here on a browser waits instead of being turned away
            print(f"Open {url_of(bound)} (Ctrl-C ends)", flush=True)
            if args.open:
                threading.Thread(target=webbrowser.open, args=(url_of(bound),), daemon=True).start()
            with contextlib.suppress(KeyboardInterrupt):  # raised again once all connections are closed
                serve(uvicorn_server(app), bound)
        finally:
            service.close()
    print("Ended.", flush=True)
    return 0


def offered_adapters(session: Session, wanted: str | None, vision: str | None = None) -> list[str]:
    """The adapters that the app offers, the default one first.

    Args:
        session: Gives the base that they must fit.
        wanted: As `--adapter`: a name or path that comes first, "none" for the base model alone, None for no wish.
        vision: As `--vision`: an encoder in place of the adapters' own; those trained on another are left out.

    Raises:
        ValueError: An encoder was named that no adapter was trained on.
    """
    from mmadapter.checkpoint import FILE_NAME, SHIPPED, read_about
    from mmadapter.weights.store import cache_folder

    if wanted == "none":
        return []
    names, seeing = [] if wanted is None else [wanted], 0
    taken = set() if wanted is None else {Path(wanted).name, Path(wanted).stem, Path(wanted).parent.name}
    found = [entry for folder in (SHIPPED, cache_folder() / "adapters") for entry in folder.glob(f"*/{FILE_NAME}")]
    places = {path.parent.name: path for path in reversed(found)}  # of two of a name the shipped one is loaded
    for name in sorted(places, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        about = read_about(places[name])
        fits = about.fingerprint is not None and about.fingerprint.matches(session.fingerprint)
        sees_otherwise = None not in (vision, about.vision) and vision != about.vision.encoder
        if name not in taken and fits and not sees_otherwise:
            names.append(name)
            seeing += about.vision is not None
    if vision is not None and wanted is None and not seeing:
        raise ValueError(
            f"no adapter here was trained on the images of {vision!r}; leave --vision out, or give an adapter too"
        )
    return names


def open_feedback(file: Path | None) -> Feedback | None:
    """Where thumbs and comments go: a file, with None one in the cache folder if that can be, with "none" nowhere.

    Raises:
        OSError: The file that was named cannot be written.
    """
    from app.feedback import Feedback
    from mmadapter.weights.store import cache_folder

    if file == Path("none"):
        return None
    try:
        feedback = Feedback(file or cache_folder() / "feedback.jsonl")
    except OSError as error:
        if file is not None:
            raise
        print(f"Feedback is not kept: {error}", file=sys.stderr, flush=True)
        return None
    print(f"Feedback is kept in {feedback.path}", file=sys.stderr, flush=True)
    return feedback


def _load(args: argparse.Namespace) -> tuple[Service, Feedback | None]:
    from app.log import Log
    from app.service import Service

    feedback = open_feedback(args.feedback)
    log = Log(args.log)
    start = time.monotonic()
    print(f"Loading {args.llama} ...", file=sys.stderr, flush=True)
    wanted, args.adapter = args.adapter, "none"  # the service loads the adapters, all over one base
    session = load_session(args)
    adapters = offered_adapters(session, wanted, args.vision)
    service = Service(session, adapters, max_batch=args.max_batch, max_waiting=args.queue, log=log)
    named = ", ".join(info.name for info in service.adapters if info.name != "none") or "none, the base model alone"
    print(f"Loaded in {time.monotonic() - start:.1f} s; adapters: {named}", file=sys.stderr, flush=True)
    return service, feedback


def _page(service: Service, feedback: Feedback | None) -> gradio.Blocks:
    os.environ["HF_HUB_OFFLINE"] = "1"  # all weights are here; Gradio's own library of the hub is to ask for nothing
    from app.tasks import Tasks
    from app.ui import build_page

    return build_page(Tasks(service, feedback=feedback))


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """No telemetry, and a folder for uploads that goes when the app ends, however it is ended."""
    with tempfile.TemporaryDirectory(prefix="mmadapter-app-", ignore_cleanup_errors=True) as folder:
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as tidily as Ctrl-C does
        before = {name: os.environ.get(name) for name in (*QUIET, "GRADIO_TEMP_DIR", "HF_HUB_OFFLINE")}
        os.environ.update(QUIET, GRADIO_TEMP_DIR=folder)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)
