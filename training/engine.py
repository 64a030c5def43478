"""The training loop: adapter in float32 over a frozen base, checkpoints, log, progress.

A run folder holds `log.jsonl` (it begins with the resolved settings), `checkpoint.pt` (to resume from) and, at the end,
`adapter.safetensors`. Everything random at a step is a function of the seed and the step, so a resumed run takes the
very steps an uninterrupted one would have taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmadapter.adapter import Adapter
from mmadapter.checkpoint import Fingerprint, load_adapter
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.data import Batch, Example, collate, length_batches
from mmadapter.llama import Llama
from mmadapter.model import AdaptedLlama, target_count
from mmadapter.tokenizer import Tokenizer
from mmadapter.vision import ImageProjection
from mmadapter.weights import load_state_dict, open_weights
from training.config import RunConfig

Features = Callable[[Tensor, torch.Generator | None], Tensor]  # rows [B] (and a generator in training) -> [B, F]
# Model, batch, features [B, F], has_image [B] and a seed -> the loss to minimise, and figures for the log.
Objective = Callable[[AdaptedLlama, Batch, Tensor | None, Tensor | None, int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Base:
    """The frozen base of a run, with what goes with it."""

    llama: Llama
    tokenizer: Tokenizer
    fingerprint: Fingerprint

    @property
    def config(self) -> LlamaConfig:
        return self.llama.config

    def with_adapter(self, run: RunConfig, projection: ImageProjection | None) -> AdaptedLlama:
        """The adapter that a run starts from, on this base: a fresh one, drawn by the run's seed, or that of `init`.

        Raises:
            ValueError, FileNotFoundError: The base has fewer layers than the run adapts, or `init` is no adapter of the
                run's shape.
        """
        if run.layers > self.config.layers:
            raise ValueError(f"layers is {run.layers}, but {run.llama} has {self.config.layers}; set a lower --layers")
        torch.manual_seed(run.seed)
        config = AdapterConfig(run.layers, run.prompt_length, run.gate, run.prompt_std)
        adapter = Adapter(config, width=self.config.width, heads=self.config.heads, projection=projection)
        if run.init:
            start, _ = load_adapter(run.init, self.config, self.fingerprint)
            shapes = [{name: tensor.shape for name, tensor in side.state_dict().items()} for side in (start, adapter)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapter {run.init} has other sizes than this run file asks for")
            if start.config.gate != run.gate:
                raise ValueError(f"adapter {run.init} has {start.config.gate} gates, this run file asks for {run.gate}")
            adapter.load_state_dict(start.state_dict())
        return AdaptedLlama(self.llama, adapter)


def open_base(run: RunConfig) -> Base:
    """Loads the base of a run.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: See `weights.open_weights`; or the base has no tokenizer.
    """
    weights = open_weights(run.llama)
    tokenizer = weights.tokenizer()
    if tokenizer is None:
        raise FileNotFoundError(f"{weights.path} has no tokenizer, and training needs one")
    llama = Llama.from_state_dict(weights.config, load_state_dict(weights, getattr(torch, run.dtype)))
    return Base(llama, tokenizer, Fingerprint.of(weights.config, tokenizer.tokens()))


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero (PAPER: per iteration)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(adapter: Adapter, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the adapter's parameters; only the projection's matrices are decayed."""
    gates = [adapter.gate]
    matrices = [p for name, p in adapter.named_parameters() if name.startswith("projection.") and p.ndim > 1]
    others = [p for p in adapter.parameters() if not any(p is q for q in gates + matrices)]
    groups = [
        {"params": others, "peak": config.lr, "weight_decay": 0.0},
        {"params": gates, "peak": config.gate_lr, "weight_decay": 0.0},
        {"params": matrices, "peak": config.lr, "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2))


def batches_from(examples: Sequence[Example], config: RunConfig, step: int) -> Iterator[list[Example]]:
    """Endless batches, starting with the one that step `step` takes."""
    lengths = [len(example.tokens) for example in examples]
    per_epoch = -(-len(examples) // config.batch_size)
    epoch, skip = divmod(step, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(hash((config.seed, epoch)) % 2**63)
        for rows in length_batches(lengths, config.batch_size, generator)[skip:]:
            yield [examples[row] for row in rows]
        epoch, skip = epoch + 1, 0


class Trainer:
    """One run. `train()` starts or resumes it.

    Args:
        model: Base and adapter.
        config: The run.
        folder: Where checkpoint and log are kept.
        features: Image features of a batch's rows; None for a text task.
        objective: What is minimised; None is the mean cross-entropy a target token.
        record: Facts for the first line of the log; of `data_hash` a checkpoint must have the same.

    Raises:
        ValueError: There is no row to train on, or none to validate on.
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
        objective: Objective | None = None,
        record: dict | None = None,
    ) -> None:
        if not train or not validation:
            raise ValueError(f"there are {len(train)} rows to train on and {len(validation)} to validate on; give some")
        self.model, self.config, self.folder = model, config, folder
        self.train_examples = train
        taken = min(config.validation_rows, len(validation))
        self.validation_examples = [validation[i * len(validation) // taken] for i in range(taken)]
        self.features, self.objective = features, objective or self._likelihood
        self.record = record or {}
        self.optimizer = make_optimizer(model.adapter, config)
        self.mean = {name: p.detach().clone() for name, p in model.adapter.named_parameters()} if config.ema else {}
        self.step = 0

    def train(self) -> float:
        """Trains to the last step and returns the validation loss of the weights that are kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        settings = dataclasses.asdict(self.config)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self._log({"event": "start", "step": self.step, "config": settings, "versions": versions, **self.record})
        if self.step == 0:
            self._validate()
        batches = batches_from(self.train_examples, self.config, self.step)
        seconds, tokens, recent = 0.0, 0, []
        with tqdm(total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True) as bar:
            while self.step < self.config.steps:
                examples = next(batches)
                started = time.perf_counter()
                recent.append(self._step(collate(examples)))
                seconds += time.perf_counter() - started
                tokens += sum(len(example.tokens) for example in examples)
                rate = tokens / seconds
                shown = ", ".join(f"{name} {value:.3f}" for name, value in recent[-1].items())
                bar.set_postfix_str(f"{shown}, {rate:.0f} tokens/s")
                bar.update()
                if self.step % 10 == 0 or self.step == self.config.steps:
                    means = {name: sum(line[name] for line in recent) / len(recent) for name in recent[0]}
                    lr = self.optimizer.param_groups[0]["lr"]
                    self._log({"step": self.step, **means, "lr": lr, "tokens_per_s": rate})
                    recent.clear()
                if self.step % self.config.eval_every == 0 and self.step < self.config.steps:
                    self._validate()
                if self.step % self.config.save_every == 0:
                    self._save()
        loss = self._validate()
        self._save()
        return loss

    def kept_state(self) -> dict[str, Tensor]:
        """The adapter's state dict with the weights that are validated and shipped (the running mean, if there is)."""
        return self.model.adapter.state_dict() | self.mean

    def _step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the loss, the objective's other figures and the gradient's norm before clipping.

        Raises:
            FloatingPointError: Loss or gradient is not finite. No weight has been touched.
        """
        config = self.config
        seed = hash((config.seed, self.step)) % 2**63
        torch.manual_seed(seed)
        self.model.train()
        features, has_image = self._batch_features(batch, torch.Generator().manual_seed(seed))
        loss, figures = self.objective(self.model, batch, features, has_image, seed)
        self._require_finite("loss", loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.adapter.parameters(), config.clip or math.inf)
        self._require_finite("gradient's norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, group["peak"], config.warmup, config.steps)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            decay = min(config.ema, self.step / (self.step + 10))
            for name, parameter in self.model.adapter.named_parameters() if config.ema else ():
                self.mean[name].lerp_(parameter, 1 - decay)
        return {"loss": loss.item(), **figures, "grad_norm": norm.item()}

    def _require_finite(self, name: str, value: Tensor) -> None:
        if torch.isfinite(value):
            return
        saved = (self.folder / "checkpoint.pt").exists()
        kept = f"the last good checkpoint is in {self.folder}" if saved else "there is no checkpoint yet"
        raise FloatingPointError(
            f"the {name} is {value.item()} at step {self.step}; {kept}; try a lower --lr, or --dtype float32"
        )

    def _likelihood(
        self, model: AdaptedLlama, batch: Batch, features: Tensor | None, has_image: Tensor | None, seed: int
    ) -> tuple[Tensor, dict[str, float]]:
        loss = model(batch.tokens, batch.labels, features, has_image, self.config.label_smoothing)
        return loss / target_count(batch.labels), {}

    def _batch_features(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor | None, Tensor | None]:
        has_image = batch.images >= 0
        if self.features is None or not has_image.any():
            return None, None
        features = self.features(batch.images.clamp_min(0), generator)
        return features, None if has_image.all() else has_image

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss a target over the validation rows, with the weights that would be kept."""
        self.model.eval()
        adapter = self.model.adapter
        trained = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        adapter.load_state_dict(self.kept_state())
        total, targets = 0.0, 0
        order = sorted(range(len(self.validation_examples)), key=lambda i: len(self.validation_examples[i].tokens))
        for start in tqdm(range(0, len(order), 64), desc="validation", unit="batch", leave=False):
            batch = collate([self.validation_examples[i] for i in order[start : start + 64]])
            features, has_image = self._batch_features(batch, None)
            total += self.model(batch.tokens, batch.labels, features, has_image).item()
            targets += target_count(batch.labels)
        adapter.load_state_dict(adapter.state_dict() | trained)
        loss = total / targets
        gate = adapter.gate_values().abs().mean().item()
        self._log({"step": self.step, "val_loss": loss, "mean_abs_gate": gate})
        tqdm.write(f"step {self.step}: validation loss {loss:.4f}, mean |gate| {gate:.3f}")
        return loss

    def _log(self, line: dict) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"time": round(time.time(), 1)}) + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "data_hash": self.record.get("data_hash"),
            "adapter": self.model.adapter.state_dict(),
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / "checkpoint.tmp"  # one name: what a killed process left of it is written over
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.folder / "checkpoint.pt")
        finally:
            temporary.unlink(missing_ok=True)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be read ({reason}); delete it to start afresh") from error
        settings = dataclasses.asdict(self.config)
        changed = [key for key in settings if key != "steps" and settings[key] != state["config"].get(key)]
        if changed:
            raise ValueError(
                f"{path} was made with another {', '.join(changed)}; choose another --out, or the settings it has"
            )
        data_hash = self.record.get("data_hash")
        if state.get("data_hash", data_hash) != data_hash:
            raise ValueError(f"{path} was made with other data; choose another --out, or the data it has")
        self.model.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.step = state["mean"], state["step"]
