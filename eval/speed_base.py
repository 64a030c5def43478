"""What every case of `eval.speed` works on: the run's settings, the base in each number format, clocks and memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eval.speed_rounds import Contender, Timed
from mmadapter.adapter import Adapter
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.info import SHAPES
from mmadapter.llama import Llama
from mmadapter.options import resolve_dtype
from mmadapter.packed import pack
from mmadapter.session import Session, load
from mmadapter.weights import expected_shapes, open_weights

if TYPE_CHECKING:
    from mmadapter.adapter import Prompts

ROOT = Path(__file__).resolve().parents[1]
FLOATS = ("float32", "bfloat16")
STD = 0.02  # of random weights: activations stay finite in bfloat16 whatever the depth
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices whose product gives the matrix rate
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # what is read to measure the memory
LIMIT_SECONDS = 0.3  # of a measurement of the machine itself


@dataclass(frozen=True)
class Setting:
    """The options of a run, which processes of their own get, too.

    Attributes:
        llama: Spec of the base.
        shape: Name of a shape (`mmadapter.info.SHAPES`) whose weights are random, in place of `llama`.
        adapter: Of the cases with images; None is "caption", or a random one for a random base.
        vision: Spec of the image encoder, None for the adapter's own.
        device: As torch names it.
        dtype: "auto" or a number format that `mmadapter.load` takes.
        prompt_length: K of an official `.pth`.
        gate: Gate variant of such a file.
        rounds: Of every case.
        threads: Of every contender.
        seed: Of random weights and of the rows that are drawn.
        data: Alpaca rows to train on, None for none.
        images: Folder of pictures to caption, None for the samples.
        plots: Folder for the plots of growth, None for none.
    """

    llama: str = "smollm2-135m"
    shape: str | None = None
    adapter: str | None = None
    vision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    prompt_length: int = 10
    gate: str = "tanh"
    rounds: int = 3
    threads: int = 1
    seed: int = 0
    data: str | None = None
    images: str | None = None
    plots: str | None = None

    @property
    def float_dtype(self) -> str:
        """The floating-point format of training, and of what the peers are compared in."""
        name = self.dtype if self.dtype in FLOATS else "auto"
        return str(resolve_dtype(name, self.device)).removeprefix("torch.")

    @property
    def kind(self) -> str:
        """Of the device, without its number."""
        return torch.device(self.device).type


class Base:
    """The base of a run. It is loaded once for each number format and stays for all cases."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._sessions: dict[str, Session] = {}
        self._answering: dict[str, Session] = {}
        if setting.shape is not None:
            self.config: LlamaConfig = SHAPES[setting.shape]
            self.path: Path | None = None
        else:
            weights = open_weights(setting.llama)
            self.config, self.path = weights.config, weights.path

    @property
    def gguf(self) -> Path | None:
        """The base's file where it is GGUF."""
        return self.path if self.path is not None and self.path.suffix == ".gguf" else None

    def session(self, dtype: str) -> Session:
        """The base model alone, as `mmadapter.load` gives it: to train on, and with the tensors that the peers share.

        Raises:
            ValueError: There is no such number format.
            FileNotFoundError, ConnectionError: As `mmadapter.load`.
        """
        if dtype not in self._sessions:
            setting = self.setting
            if setting.shape is not None:
                if dtype not in FLOATS:
                    raise ValueError(f"random weights are in {' or '.join(FLOATS)}, not in {dtype}")
                model = random_llama(self.config, getattr(torch, dtype), setting.device, setting.seed)
                self._sessions[dtype] = Session(model, spec=setting.shape)
            else:
                shape = {"prompt_length": setting.prompt_length, "gate": setting.gate}
                self._sessions[dtype] = load(setting.llama, None, setting.vision, setting.device, dtype, **shape)
        return self._sessions[dtype]

    def answering(self, dtype: str) -> Session:
        """The same base as the command line and the app have it (`options.load_session`), its linears packed.

        Raises:
            ValueError, FileNotFoundError, ConnectionError: As `session`.
        """
        if dtype not in self._answering:
            session = copy.copy(self.session(dtype))
            if dtype in FLOATS:
                session.llama = Llama.from_state_dict(self.config, session.llama.state_dict())
                pack(session.llama)
            self._answering[dtype] = session
        return self._answering[dtype]

    def tokens(self, length: int, rows: int = 1) -> torch.Tensor:
        """Random token ids, [rows, length]: what a token costs does not depend on which one it is."""
        generator = torch.Generator().manual_seed(self.setting.seed)
        return torch.randint(self.config.vocab_size, (rows, length), generator=generator)

    def adapter(self, layers: int, prompt_length: int, gate: str = "scalar") -> Adapter:
        """A fresh adapter with gates that are zero, as training starts; peft's variant of the gate by default."""
        torch.manual_seed(self.setting.seed)
        made = Adapter(AdapterConfig(layers, prompt_length, gate), self.config)
        return made.to(self.setting.device)

    def random_prompts(self, llama: Llama, layers: int, prompt_length: int) -> Prompts:
        """Prompts of an adapter whose gates are open, for a base that no adapter was trained on."""
        adapter = self.adapter(layers, prompt_length)
        with torch.inference_mode():
            adapter.gate.fill_(0.1)
            return adapter.prompts(llama)


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str, seed: int) -> Llama:
    """A base of random weights, made where it is used."""
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        state[name] = tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(0, STD, generator=generator)
    return Llama.from_state_dict(config, state)


def weight_bytes(llama: Llama) -> int:
    """Bytes of weights that a decoding step reads: all but an embedding table that is not the output projection too."""
    skipped = set() if llama.config.tied else {"tok_embeddings"}
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name, tensor in [*llama.named_parameters(), *llama.named_buffers()]
        if name.partition(".")[0] not in skipped
    }
    return sum(tensors.values())


def synchronize(device: str) -> None:
    """Waits until what was started on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(work: float, device: str, function: Callable[[], object]) -> Timed:
    """Runs a function and says how long it took."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return Timed(time.perf_counter() - started, work)


def arithmetic_limit(setting: Setting, dtype: str, flops_per_piece: float) -> Contender:
    """As many pieces of work a second as the machine could do if it did nothing but large matrix products."""
    size, number_format = MATRIX[setting.kind], getattr(torch, dtype)
    a, b = (torch.ones(size, size, dtype=number_format, device=setting.device) for _ in range(2))
    flops = 2.0 * size**3

    def run() -> Timed:
        return _repeated(lambda: torch.mm(a, b), flops / flops_per_piece, setting.device)

    return Contender("limit of arithmetic", run)


def memory_limit(setting: Setting, bytes_per_piece: float) -> Contender:
    """As many pieces of work a second as the memory gives, its bytes being read once each and nothing else done."""
    size = READ_BYTES[setting.kind]
    block = torch.ones(size // 4, device=setting.device)

    def run() -> Timed:
        return _repeated(block.sum, size / bytes_per_piece, setting.device)

    return Contender("limit of memory", run)


def _repeated(function: Callable[[], object], work: float, device: str) -> Timed:
    """Runs a function for `LIMIT_SECONDS`, and counts the work of all its runs."""
    once = timed(work, device, function)
    times = max(1, round(LIMIT_SECONDS / once.seconds))

    def repeat() -> None:
        for _ in range(times):
            function()

    return timed(work * times, device, repeat)


def can_measure_memory(device: str) -> str | None:
    """None where the peak of the memory can be measured, else why not."""
    if device.startswith("cuda"):
        return None
    try:
        REFERENCES.write_text("5")
    except OSError:
        return "memory is measured on CUDA, and elsewhere where Linux lets a process reset its peak (/proc)"
    return None


def reset_peak(device: str) -> float:
    """Begins a measurement of memory: gives back what is free, and forgets the peak so far.

    Returns:
        Bytes in use now: those of tensors on CUDA, else of the process.

    Raises:
        OSError: The system does not let a process reset its peak.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    _give_back()
    REFERENCES.write_text("5")
    return _status("VmRSS")


def peak(device: str) -> float:
    """The most bytes in use since `reset_peak`."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _give_back() -> None:
    """Returns freed memory to the system where the C library has a call for it (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status(name: str) -> float:
    """A line of the process's status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"{STATUS} has no {name}")


def child_environment(threads: int) -> dict[str, str]:
    """Of a process of its own: it finds our modules, and takes as many threads as everybody."""
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **counts, **quiet, "PYTHONPATH": os.pathsep.join(found)}


def python(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def machine(device: str) -> dict[str, object]:
    """What kind of machine this is."""
    processor, info = None, Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    vectors = torch.backends.cpu.get_cpu_capability()
    return {"processor": processor, "cores": os.cpu_count(), "instructions": vectors, "card": card}
