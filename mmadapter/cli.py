"""The command line: caption, answer, chat, weights, info."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmadapter.options import Parser, add_model_options, load_session, main_with_errors, resolve_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmadapter.session import Session

EXAMPLE = """\
Examples:
  python -m mmadapter caption assets/images
  python -m mmadapter answer --image assets/images/hopper.jpg --question "What is she wearing?"
  python -m mmadapter chat --prompt "Tell me about alpacas."
  python -m mmadapter info
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return main_with_errors(lambda: arguments.run(arguments), arguments.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mmadapter",
        description=f"{EXAMPLE}\nA language model that sees.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    caption = _command(commands, "caption", "caption photos", "caption assets/images --out captions.jsonl", run_caption)
    caption.add_argument("paths", nargs="+", metavar="PATH", help="picture, folder (searched for pictures) or glob")
    caption.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; captions it already holds are kept")
    caption.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    _add_decoding(caption)

    answer = _command(
        commands,
        "answer",
        "answer a question about a photo",
        'answer --image assets/images/hopper.jpg --question "What is she wearing?" --choices "a hat" "a helmet"\n\n'
        "The default adapter learnt from indoor photos (objects, colours, counts) and from captions of people and\n"
        "dogs. It answers in a few words, and of other photos it often guesses.",
        run_answer,
    )
    answer.add_argument("--image", metavar="PATH", required=True)
    answer.add_argument("--question", metavar="TEXT", required=True)
    answer.add_argument("--choices", nargs="+", metavar="TEXT", help="take the likeliest of these")
    _add_decoding(answer)

    chat = _command(
        commands, "chat", "chat, with or without a photo", 'chat --prompt "Tell me about alpacas."', run_chat
    )
    chat.add_argument("--prompt", metavar="TEXT", help="one turn; without it, turns are read from the terminal")
    chat.add_argument("--image", metavar="PATH", help="what the conversation is about")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_decoding(chat)

    weights = commands.add_parser(
        "weights",
        help="list or fetch the weights that can be named",
        description="Example:\n  python -m mmadapter weights fetch smollm2-135m",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    weights.add_argument("action", choices=("list", "fetch"))
    weights.add_argument("specs", nargs="*", metavar="SPEC", help="default: the default base and encoder")
    weights.add_argument("--debug", action="store_true", help="show the traceback of an error")
    weights.set_defaults(run=run_weights)

    info = _command(commands, "info", "sizes, trainable parameters, memory", "info --llama llama-7b", run_info)
    info.add_argument("--layers", type=_positive, metavar="L", help="adapted layers (default: all but two of the base)")
    info.add_argument("--batch-tokens", type=_positive, default=2048, metavar="N", help="tokens of a training batch")
    return parser


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"Example:\n  python -m mmadapter {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.set_defaults(run=run)
    return parser


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding (default: the adapter's own settings)")
    group.add_argument("--max-new-tokens", type=_positive, metavar="N")
    group.add_argument("--beams", type=_positive, metavar="N", help="1 is no beam search")
    group.add_argument("--length-penalty", type=_number, metavar="X")
    group.add_argument("--temperature", type=_number, metavar="X", help="0 takes the likeliest token")
    group.add_argument("--top-p", type=_number, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--repetition-penalty", type=_number, metavar="X")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument("--strength", type=_number, default=1.0, metavar="X", help="factor on the adapter's gates")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    names = ("max_new_tokens", "beams", "length_penalty", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return {name: getattr(arguments, name) for name in names}


def _session(arguments: argparse.Namespace, default_adapter: str | None) -> Session:
    if arguments.adapter is None:
        arguments.adapter = default_adapter
    session = load_session(arguments)
    session.strength = arguments.strength
    return session


def run_caption(arguments: argparse.Namespace) -> int:
    from mmadapter.batch import caption_files, find_images

    found, failed = find_images(arguments.paths)
    return caption_files(
        lambda: _session(arguments, "caption"),
        found,
        failed,
        out=arguments.out,
        batch_size=arguments.batch_size,
        settings=_settings(arguments),
    )


def run_answer(arguments: argparse.Namespace) -> int:
    from mmadapter.image import load_image

    image = load_image(arguments.image)
    session = _session(arguments, "qa")
    answer = session.answer(image, arguments.question, arguments.choices, **_settings(arguments))
    if arguments.choices is None:
        print(answer)
    else:
        for choice, probability in zip(arguments.choices, answer.probabilities, strict=True):
            print(f"{probability:6.1%}  {choice}")
        print(answer.text)
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    from mmadapter.image import load_image

    image = load_image(arguments.image) if arguments.image is not None else None
    session = _session(arguments, "caption" if image else None)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is not None:
        _turn(session, [*messages, {"role": "user", "content": arguments.prompt}], image, arguments)
        return 0
    print("Type a message; Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _turn(session, messages, image, arguments)})


def _turn(session: Session, messages: list[dict], image: Image | None, arguments: argparse.Namespace) -> str:
    """Prints the answer as it comes and returns it; Ctrl-C keeps what has come."""
    pieces: list[str] = []
    settings = _settings(arguments)
    try:
        if session.sampling("chat", settings).beams > 1:  # decided on the whole text, so it comes at once
            pieces.append(session.chat(messages, image, **settings))
            print(pieces[0], end="", flush=True)
        else:
            for piece in session.chat(messages, image, stream=True, **settings):
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if arguments.prompt is not None:
            raise
    print()
    return "".join(pieces)


def run_weights(arguments: argparse.Namespace) -> int:
    from mmadapter.weights import store

    if arguments.action == "fetch":
        for spec in arguments.specs or ("smollm2-135m", "efficientnet-lite2"):
            print(f"{spec}\t{store.fetch(spec)}")
        return 0
    items = store.items()
    for spec in arguments.specs or items:
        if spec not in items:
            raise ValueError(f"no weights {spec!r} in the store; there are {', '.join(items)}")
        item, path = items[spec], store.cached_path(spec)
        print(f"{spec}\t{item.description}\t{item.size / 1e6:.0f} MB\t{item.licence}\t{path or 'not fetched'}")
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    from mmadapter.info import describe

    print(
        describe(
            arguments.llama,
            None if arguments.adapter == "none" else arguments.adapter,
            dtype=str(resolve_dtype(arguments.dtype, arguments.device)).removeprefix("torch."),
            layers=arguments.layers,
            prompt_length=arguments.prompt_length,
            gate=arguments.gate,
            batch_tokens=arguments.batch_tokens,
        )
    )
    return 0
