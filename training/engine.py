"""The training loop: adapter in float32 over a frozen base, checkpoints, log, progress.

A run folder holds `log.jsonl` (it begins with the resolved settings), `checkpoint-STEP.pt` (to resume from), `best.pt`
(the weights of the lowest validation loss) and, at the end, `adapter.safetensors`. Everything random at a step is a
function of the seed and the step, so a resumed run takes the very steps an uninterrupted one would have taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mmadapter.adapter import Adapter
from mmadapter.data import Example, RowOrder, collate, passes, seed_of
from mmadapter.model import AdaptedLlama, target_count
from mmadapter.record import replacing, require_place
from training.config import RunConfig
from training.processes import Processes, alone_in, noted_signals

Features = Callable[[Tensor, torch.Generator | None], Tensor]  # rows [B] (and a generator in training) -> [B, F]

# Settings that do not change what is learnt: a run may be resumed with others.
FREE = (
    *("device", "compile", "checkpointing", "shard", "batch_tokens", "save_every", "keep", "ship"),
    *("licence", "beams", "length_penalty"),
)


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero (PAPER: per iteration)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(adapter: Adapter, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the adapter's parameters, in groups of one peak rate and one decay each."""
    factor = config.batch_size / 256 if config.scale_lr else 1.0
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in adapter.named_parameters():
        matrix = name.startswith("projection.") and parameter.ndim > 1
        decay = config.weight_decay if matrix or config.decay == "all" else 0.0
        peak = (config.gate_lr if name == "gate" else config.lr) * factor
        groups.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "peak": peak, "weight_decay": decay} for (peak, decay), params in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
    )


class Trainer:
    """One run, in one process or in each of several. `train()` starts or resumes it.

    Args:
        model: Base and adapter, on the device they run on.
        config: The run.
        folder: Where checkpoints and log are kept.
        features: Image features of a batch's rows; None for a text task.
        record: Facts for the first line of the log; of `data_hash` a checkpoint must have the same.
        processes: Those that train together.

    Raises:
        ValueError: There is no row to train on, or none to validate on, or the processes do not divide the batch or
            have other rows or settings than each other.
    """

    def __init__(
        self,
        model: AdaptedLlama,
        config: RunConfig,
        folder: Path,
        *,
        train: Sequence[Example],
        validation: Sequence[Example],
        features: Features | None = None,
        record: dict | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        if not train or not validation:
            raise ValueError(
                f"there are {len(train)} rows to train on and {len(validation)} to validate on; give more, "
                "or keep fewer of them aside with --held-out"
            )
        if config.batch_size % self.processes.count:
            raise ValueError(
                f"{self.processes.count} processes do not divide batch_size {config.batch_size}; change --batch-size"
            )
        self.model, self.adapter, self.config, self.folder = model, model.adapter, config, folder
        self.train_examples = train
        taken = min(config.validation_rows, len(validation))
        self.validation_examples = [validation[i * len(validation) // taken] for i in range(taken)]
        self.features, self.record = features, record or {}
        self.rows_hash = _digest([*train, *self.validation_examples])
        self.steps, self.warmup = config.schedule(len(train))
        self.order = RowOrder([len(row.tokens) for row in train], config.batch_size, config.seed, config.pool)
        self.optimizer = make_optimizer(self.adapter, config)
        self.mean = {name: p.detach().clone() for name, p in self.adapter.named_parameters()} if config.ema else {}
        self.step = 0
        self.best: dict[str, float] | None = None  # step and validation loss
        self.stopped: signal.Signals | None = None  # the signal that ended `train` early
        if self.processes.count > 1:
            settings = dataclasses.asdict(config) | {"device": ""}  # the one setting that machines may differ in
            self.processes.require_same("settings", settings)
            self.processes.require_same("rows", self.rows_hash)
            # Only the adapter's gradients are exchanged: the frozen base is the same everywhere, or sharded.
            model.adapter = DistributedDataParallel(self.adapter)
            model.adapter.broadcast_buffers = False  # as an argument, newer versions of torch warn of it

    def train(self) -> float | None:
        """Trains to the last step and returns the validation loss of the weights that are kept.

        SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint: then it returns None and `stopped` is set.

        Raises:
            FloatingPointError: Loss or gradient is not finite; the last good checkpoint stays.
            ValueError: The folder's checkpoint is of another run or damaged, or another process trains in the folder.
        """
        with alone_in(self.folder) if self.processes.is_first else nullcontext():
            self._resume()
            with noted_signals() as asked:
                return self._train(asked)

    def _train(self, asked: dict[str, signal.Signals]) -> float | None:
        settings = dataclasses.asdict(self.config)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self._log(
            {
                "event": "resume" if self.step else "start",
                **{"step": self.step, "steps": self.steps, "warmup": self.warmup, "processes": self.processes.count},
                **{"base_layers": self.model.llama.config.layers, "config": settings, "versions": versions},
                **self.record,
            }
        )
        loss = self._validate() if self.step == 0 else math.nan
        seconds, tokens = 0.0, 0
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not self.processes.is_first
        )
        with bar:
            while self.step < self.steps:
                rows = [self.train_examples[row] for row in self.order.step(self.step)]
                started = time.perf_counter()
                figures = self._step(rows, asked)
                took = time.perf_counter() - started
                here = sum(len(row.tokens) for row in rows)
                seconds, tokens = seconds + took, tokens + here
                stop = figures.pop("stop")
                self._log({"step": self.step, **figures, "tokens_per_s": round(here / took, 1)})
                bar.set_postfix_str(f"loss {figures['loss']:.3f}, {tokens / seconds:.0f} tokens/s")
                bar.update()
                last = self.step == self.steps
                if last or self.step % self.config.eval_every == 0:
                    loss = self._validate()
                if last or stop or self.step % self.config.save_every == 0:
                    self._save()
                if stop and not last:
                    self.stopped = asked.get("signal", signal.SIGTERM)
                    return None
        if math.isnan(loss):  # resumed where there was nothing left to do
            loss = self._validate(log=False)
        return loss

    def kept_state(self) -> dict[str, Tensor]:
        """The adapter's state dict with the weights that are validated (the running mean, if there is one)."""
        return self.adapter.state_dict() | self.mean

    def shipped_state(self) -> tuple[int, dict[str, Tensor]]:
        """Step and state dict of the weights that become the adapter: the last, or those of the best validation."""
        if self.config.ship == "best":
            state = _load(self.folder / "best.pt", "take the last weights with --ship last")
            return state["step"], state["adapter"]
        return self.step, self.kept_state()

    def _step(self, rows: Sequence[Example], asked: Mapping[str, signal.Signals]) -> dict[str, float]:
        """One optimiser step over the rows of all processes.

        Returns:
            Loss a target token, the gradient's norm before clipping, the learning rate, and whether any process was
            asked to stop.

        Raises:
            FloatingPointError: Loss or gradient is not finite. No weight has been touched.
        """
        config, processes = self.config, self.processes
        losses, cut, targets = self.accumulate(rows)
        total, stops = processes.sum(torch.stack([losses.sum(), losses.new_tensor(float(bool(asked)))]))
        if not math.isfinite(total):
            passed = zip(cut, losses.isfinite().tolist(), strict=True)
            bad = [rows[index] for part, finite in passed if not finite for index in part]
            self._refuse("loss", total, bad)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), config.clip or math.inf).item()
        if not math.isfinite(norm):
            self._refuse("gradient's norm", norm, rows)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, group["peak"], self.warmup, self.steps)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            decay = min(config.ema, self.step / (self.step + 10))
            for name, parameter in self.adapter.named_parameters() if config.ema else ():
                self.mean[name].lerp_(parameter, 1 - decay)
        rate = self.optimizer.param_groups[0]["lr"]
        return {"loss": total / targets, "grad_norm": norm, "lr": rate, "stop": bool(stops)}

    def accumulate(self, rows: Sequence[Example]) -> tuple[Tensor, list[list[int]], int]:
        """Gradients of the mean loss a target over a step's rows, in as many forward passes as they take.

        Returns:
            The summed loss of each pass of this process, the indices of its rows, and the targets of all processes.
        """
        config, processes = self.config, self.processes
        cut = passes([len(row.tokens) for row in rows], config.batch_tokens, processes.rank, processes.count)
        targets = sum(len(row.tokens) - max(1, row.prompt_tokens) for row in rows)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, indices in enumerate(cut):
            seed = seed_of(config.seed, self.step, processes.rank, number)
            torch.manual_seed(seed)
            with nullcontext() if number == len(cut) - 1 else self._gathering():
                loss = self.loss_of([rows[index] for index in indices], torch.Generator().manual_seed(seed))
                # DDP takes the mean over the processes, the loss is a mean over the targets of all of them.
                (loss * (processes.count / targets)).backward()
            losses.append(loss.detach())
        return torch.stack(losses), cut, targets

    def loss_of(self, rows: Sequence[Example], generator: torch.Generator | None, smoothing: bool = True) -> Tensor:
        """Cross-entropy summed over the targets of one forward pass; with a generator as in training."""
        batch = collate(rows)
        device = self.model.llama.device
        features = has_image = None
        if self.features is not None:
            # Text rows take part with has_image False, so that every parameter has a gradient in every process.
            features = self.features(batch.images.clamp_min(0), generator).to(device)
            has_image = (batch.images >= 0).to(device)
            has_image = None if has_image.all() else has_image
        return self.model(
            batch.tokens.to(device),
            batch.labels.to(device),
            features,
            has_image,
            label_smoothing=self.config.label_smoothing if smoothing else 0.0,
            checkpointing=self.config.checkpointing,
        )

    def _gathering(self) -> AbstractContextManager:
        """No exchange of gradients: they are summed until a step's last forward pass."""
        called = self.model.adapter
        return called.no_sync() if isinstance(called, DistributedDataParallel) else nullcontext()

    def _refuse(self, name: str, value: float, rows: Sequence[Example]) -> None:
        """Raises in all processes alike, whichever of them had the bad rows or sees the folder.

        Args:
            rows: Those of this process that it came from.
        """
        everywhere = self.processes.of_all([row.where for row in rows if row.where])
        named = list(dict.fromkeys(where for places in everywhere for where in places))
        batch = f" in a batch of {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}" if named else ""
        saved = self.processes.of_first(any(self.folder.glob("checkpoint-*.pt")))
        kept = f"the last good checkpoint is in {self.folder}" if saved else "there is no checkpoint yet"
        raise FloatingPointError(
            f"the {name} is {value} at step {self.step}{batch}; {kept}; "
            "try a lower --lr, or --dtype float32, with another --out"
        )

    @torch.no_grad()
    def _validate(self, log: bool = True) -> float:
        """Mean loss a target over the validation rows, with the weights that would be kept."""
        self.model.eval()
        adapter, processes = self.adapter, self.processes
        trained = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        adapter.load_state_dict(self.kept_state())
        rows = self.validation_examples
        room = self.config.batch_tokens or 64 * max(len(row.tokens) for row in rows)
        total, targets, bad = torch.zeros((), dtype=torch.float64), 0, []
        parts = passes([len(row.tokens) for row in rows], room, processes.rank, processes.count)
        for part in tqdm(parts, desc="validation", unit="batch", leave=False, disable=not processes.is_first):
            # A process without a row of its own goes along with one that does not count: the others wait for it.
            batch = [rows[index] for index in part or [0]]
            loss = self.loss_of(batch, None, smoothing=False)
            if part:
                total += loss.double().cpu()
                targets += target_count(collate(batch).labels)
                bad += [] if loss.isfinite() else batch
        gates = adapter.gate_values().detach().clone()
        adapter.load_state_dict(adapter.state_dict() | trained)
        total, targets = processes.sum(torch.stack([total, torch.tensor(targets, dtype=torch.float64)]))
        loss = total / targets
        if not math.isfinite(loss):
            self._refuse("validation loss", loss, bad)
        if not log:
            return loss
        shown = [[round(value, 4) for value in layer] for layer in gates.tolist()]
        self._log({"step": self.step, "val_loss": loss, "gates": shown})
        if processes.is_first:
            tqdm.write(f"step {self.step}: validation loss {loss:.4f}, mean |gate| {gates.abs().mean():.3f}")
        if self.best is None or loss < self.best["val_loss"]:
            self.best = {"step": self.step, "val_loss": loss}
            self._write("best.pt", self.best | {"adapter": self.kept_state()})
        return loss

    def _log(self, line: dict) -> None:
        if self.processes.is_first:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"time": round(time.time(), 1)}) + "\n")

    def _write(self, name: str, state: dict) -> None:
        if self.processes.is_first:
            with replacing(self.folder / name) as temporary:
                torch.save(state, temporary)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "steps": self.steps,
            "best": self.best,
            "config": dataclasses.asdict(self.config),
            "data_hash": self.record.get("data_hash"),
            "rows_hash": self.rows_hash,
            "adapter": self.adapter.state_dict(),
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
        }
        self._write(f"checkpoint-{self.step:06}.pt", state)
        if self.processes.is_first:
            for old in checkpoints(self.folder)[: -self.config.keep]:
                old.unlink()

    def _resume(self) -> None:
        """Goes back to the folder's latest checkpoint, and the log with it.

        The first process reads it for all of them: other machines need not see its disk.
        """
        state = self.processes.of_first(self._latest() if self.processes.is_first else None)
        if state is None:
            return
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean = {name: tensor.to(self.model.llama.device) for name, tensor in state["mean"].items()}
        self.step, self.best = state["step"], state["best"]

    def require_own_folder(self) -> None:
        """Refuses a folder whose content `train` would refuse, and changes nothing in it.

        Raises:
            ValueError: It is a file or cannot be written to, or its checkpoint is of another run or damaged.
        """
        if self.processes.is_first:
            require_place(self.folder, folder=True)
            self._checkpoint()

    def _latest(self) -> dict | None:
        """The latest checkpoint of the folder, which is made ready to go on from there; None if there is none."""
        state = self._checkpoint()
        for left in self.folder.glob("*.tmp"):
            left.unlink()  # of a process that was killed while it wrote
        log = self.folder / "log.jsonl"
        if state is None:
            log.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            return None
        _cut_log(log, state["step"])
        for old in checkpoints(self.folder)[: -self.config.keep]:
            old.unlink()  # left by a process that was killed before it could
        return state

    def _checkpoint(self) -> dict | None:
        """The latest checkpoint of the folder, None if there is none."""
        found = checkpoints(self.folder)
        if not found:
            return None
        path = found[-1]
        state = _load(path, "delete it to go on from an earlier one")
        settings = dataclasses.asdict(self.config)
        kept = dataclasses.asdict(RunConfig()) | state["config"]  # a setting that came later was at its default
        changed = [key for key in settings if key not in FREE and settings[key] != kept[key]]
        if changed:
            raise ValueError(
                f"{path} was made with another {', '.join(changed)}; choose another --out, or the settings it has"
            )
        if state["data_hash"] != self.record.get("data_hash") or state["steps"] != self.steps:
            raise ValueError(f"{path} was made with other data; choose another --out, or the data it has")
        if state.get("rows_hash", self.rows_hash) != self.rows_hash:  # checkpoints had none at first
            raise ValueError(
                f"{path} was made with other rows of the same files: pictures that were not there then, or that are "
                "gone, or bad rows mended or skipped; choose another --out, or the rows it has"
            )
        return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"), key=lambda path: (len(path.name), path.name))


def _digest(rows: Sequence[Example]) -> int:
    """A number that tells rows apart, the same in every process: Python hashes numbers alike everywhere."""
    return hash(tuple((row.tokens, row.prompt_tokens, -1 if row.image is None else row.image) for row in rows))


def _load(path: Path, advice: str) -> dict:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({reason}); {advice}") from error


def _cut_log(path: Path, step: int) -> None:
    """Takes out of a log what came after `step`, and a line that a killed process left unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
