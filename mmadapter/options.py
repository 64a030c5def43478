"""What the command lines share: the options that name a model, and errors on one line.

torch is imported where a model is made, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mmadapter.config import GATES

if TYPE_CHECKING:
    import torch

    from mmadapter.session import Session

DTYPES = ("auto", "float32", "bfloat16", "int8", "int4")
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


class Parser(argparse.ArgumentParser):
    """Help that opens with the description, where our examples stand, and misuse in one line, as every other error."""

    def format_help(self) -> str:
        description, self.description = self.description, None
        try:
            return f"{(description or '').strip()}\n\n{super().format_help()}"
        finally:
            self.description = description

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that uses a model: which one, where it runs, and `--debug`."""
    group = parser.add_argument_group("model")
    group.add_argument("--llama", metavar="SPEC", default="smollm2-135m", help="base model (default: %(default)s)")
    group.add_argument(
        "--adapter", metavar="A", help="name, folder or file of an adapter, or an official .pth; none: the base model"
    )
    group.add_argument("--vision", metavar="SPEC", help="image encoder (default: the adapter's own)")
    group.add_argument("--device", default="cpu", help="such as cpu, cuda or cuda:1 (default: %(default)s)")
    group.add_argument(
        "--dtype",
        type=lambda name: SHORT_NAMES.get(name, name),
        choices=DTYPES,
        default="auto",
        help="auto is bfloat16 on CUDA and on CPUs that compute in it, else float32; fp32 and bf16 are short for them; "
        "int8 and int4 pack the base, to answer faster on a CPU and not to train (default: %(default)s)",
    )
    group.add_argument(
        "--prompt-length",
        metavar="K",
        type=int,
        default=10,
        help="prompts a layer, which an official .pth does not name (default: %(default)s)",
    )
    group.add_argument(
        "--gate", choices=GATES, default="tanh", help="likewise, of an official .pth (default: %(default)s)"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def load_session(args: argparse.Namespace) -> Session:
    """Load the model that the options of `add_model_options` name, to answer and not to train (`packed`).

    `--adapter none` is the base model.
    """
    import mmadapter
    from mmadapter.packed import pack

    session = mmadapter.load(
        llama=args.llama,
        adapter=None if args.adapter == "none" else args.adapter,
        vision=args.vision,
        device=args.device,
        dtype=str(resolve_dtype(args.dtype, args.device)).removeprefix("torch."),
        prompt_length=args.prompt_length,
        gate=args.gate,
    )
    pack(session.llama)
    return session


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The number format that `--dtype` names; "auto" takes bfloat16 where it is the faster one.

    Args:
        name: One of `DTYPES`. "int8" and "int4" are formats of the packed weights (`quantised`).
        device: Where the model runs, as torch names it.

    Raises:
        ValueError: Another name.
    """
    import torch

    if name == "auto":
        fast = device.startswith("cuda") or (device == "cpu" and cpu_computes_bfloat16())
        name = "bfloat16" if fast else "float32"
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return getattr(torch, name)


def cpu_computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Linux lists AVX512-BF16 or AMX-BF16; elsewhere False, and bfloat16 has to be asked for."""
    if not cpuinfo.is_file():
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.read_text(encoding="utf-8", errors="replace").split())


def main_with_errors(run: Callable[[], int], debug: bool) -> int:
    """Run a command; an error becomes one line on standard error and exit status 1 (130 for Ctrl-C).

    Args:
        run: The command; it returns the exit status.
        debug: Let errors through, with their traceback.
    """
    if debug:
        return run()
    try:
        return run()
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        with contextlib.suppress(OSError):  # what is still buffered must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return _fail(str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001 - nobody above handles it, and the traceback is one flag away
        return _fail(f"{type(error).__name__}: {error} (run again with --debug to see where)")


def _fail(message: str, status: int = 1) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status
