"""What the three training scripts share: one command line, from rows of text and pictures to an adapter in a file."""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmadapter.adapter import Adapter
from mmadapter.checkpoint import FILE_NAME, AdapterFile, Fingerprint, save_adapter
from mmadapter.config import AdapterConfig, LlamaConfig, VisionConfig
from mmadapter.data import Example, cached_features, make_example, seed_of
from mmadapter.llama import Llama
from mmadapter.model import AdaptedLlama
from mmadapter.options import Parser, main_with_errors
from mmadapter.prompts import template
from mmadapter.record import file_sha256, git_commit
from mmadapter.rows import BadRow, Row, check_images, require_good
from mmadapter.tokenizer import Tokenizer
from mmadapter.vision import ImageEncoder, ImageProjection, load_encoder
from mmadapter.weights import load_state_dict, open_weights
from mmadapter.weights.store import cache_folder
from training.config import RunConfig, add_overrides, overrides_of, read_config
from training.dry_run import describe
from training.engine import Features, Trainer
from training.processes import Processes, ended, joined, naming_errors


@dataclass(frozen=True)
class Data:
    """What a script read for a run.

    Attributes:
        train: Rows to learn.
        validation: Rows kept aside.
        files: What they were read from; the run is known by their content.
        task: Of the adapter: "instruct", "answer", "scienceqa" or "caption".
        bad: Rows that cannot be learnt.
        generation: Default decoding settings of the adapter (fields of `sampling.Sampling`).
        settings: What else the adapter file should say of how it is to be asked.
    """

    train: list[Row]
    validation: list[Row]
    files: list[Path]
    task: str
    bad: list[BadRow] = field(default_factory=list)
    generation: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


Read = Callable[[argparse.Namespace, RunConfig], Data]


def main(
    argv: Sequence[str] | None,
    read: Read,
    *,
    script: str,
    about: str,
    add_data: Callable[[argparse.ArgumentParser], None],
) -> int:
    """The command line of a training script.

    Args:
        argv: Arguments; None takes the process's.
        read: Reads the rows that the arguments and the run file name.
        script: Name of the module.
        about: Example and description.
        add_data: Adds the options that name the data.
    """
    parser = Parser(
        prog=f"python -m training.{script}",
        usage="%(prog)s --config FILE --data PATH [--out DIR] [--dry-run] [overrides of the run file]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="run file (TOML)")
    add_data(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/ and the run file's name)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and try two steps of it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_overrides(parser)
    arguments = parser.parse_args(argv)
    return ended(lambda: main_with_errors(lambda: _run(arguments, read), arguments.debug))


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
        """A fresh adapter on this base, drawn by the run's seed.

        Raises:
            ValueError: The base has fewer layers than the run adapts.
        """
        if run.layers > self.config.layers:
            raise ValueError(f"layers is {run.layers}, but {run.llama} has {self.config.layers}; set a lower --layers")
        torch.manual_seed(run.seed)
        config = AdapterConfig(run.layers, run.prompt_length, run.gate, run.prompt_std, run.tune)
        adapter = Adapter(config, self.config, projection=projection)
        torch.nn.init.constant_(adapter.gate, run.gate_init)
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


def shard(llama: Llama, device: torch.device, processes: Processes) -> None:
    """Spreads the blocks' weights over the processes (FSDP2); each block is gathered for as long as it computes.

    W_k and W_v stay whole everywhere: the prompts' keys and values are made of them outside the block
    (`Adapter.prompts`), once for all of a pass. They are a sixth of a block of LLaMA-7B, and a fiftieth where 64 heads
    share 8 keys. Embeddings, output projection and norms outside the blocks stay whole, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (processes.count,))
    for block in llama.layers:
        whole = {block.attention.wk.weight, block.attention.wv.weight}
        # Said outright: what computes first is left gathered by default, which among separate blocks would be all.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # One root, with nothing of its own, so that the blocks share their streams and each is fetched ahead of its turn.
    outside = {parameter for name, parameter in llama.named_parameters() if not name.startswith("layers.")}
    fully_shard(llama, mesh=mesh, ignored_params=outside)
    register_fsdp_forward_method(llama, "hidden")


def _run(arguments: argparse.Namespace, read: Read) -> int:
    with naming_errors():
        config = read_config(arguments.config, overrides_of(arguments))
        out = arguments.out or Path("runs") / arguments.config.stem
        with joined(config.device) as (processes, device):
            return _train(arguments, read(arguments, config), config, out, processes, device)


def _train(
    arguments: argparse.Namespace, data: Data, config: RunConfig, out: Path, processes: Processes, device: torch.device
) -> int:
    if config.shard and processes.count == 1:
        raise ValueError("shard spreads the base over several processes; start them with torchrun")
    bad = data.bad
    # Everything that may be refused comes before the image features, which may take hours.
    if config.vision:
        known = {row.where for row in bad}
        unchecked = [row for row in (*data.train, *data.validation) if row.where not in known]
        bad = bad + processes.once_a_machine(lambda: check_images(unchecked))
    unusable = {row.where for row in bad}
    if processes.is_first or not config.skip_bad_rows:
        require_good(bad, config.skip_bad_rows)
    encoder = projection = None
    with processes.in_turn():  # the first one fetches what is not on this machine yet
        base = open_base(config)
        if config.vision:
            vision = VisionConfig(config.vision, config.scales, config.image_size, config.resize)
            encoder = load_encoder(vision, dtype=getattr(torch, config.dtype), device=device)
    if encoder is not None:
        torch.manual_seed(seed_of(config.seed, 1))  # not the seed itself: `with_adapter` draws the prompts from that
        projection = ImageProjection(
            sum(encoder.widths),
            base.config.width,
            config.projection_width,
            dropout=config.dropout,
            feature_dropout=config.feature_dropout,
            scale=config.prompt_std,
            components=config.whiten,
        )
    model = base.with_adapter(config, projection)
    if config.shard:
        shard(model.llama, device, processes)
    model.to(device)
    if config.compile:
        for block in model.llama.layers:
            block.compile(dynamic=True)

    sides = [[row for row in side if row.where not in unusable] for side in (data.train, data.validation)]
    if 0 < config.train_rows < len(sides[0]):
        sides[0] = random.Random(config.seed).sample(sides[0], config.train_rows)
    pictures = _pictures([row for side in sides for row in side]) if encoder is not None else {}
    train, validation = (_examples(side, base.tokenizer, config, pictures) for side in sides)
    facts = {
        "data": [file.name for file in data.files],
        "data_hash": [file_sha256(file) for file in data.files],
        "rows": len(train),
        "validation_rows": len(validation),
        "rows_left_out": len(unusable),
        "git_commit": git_commit(),
    }
    trainer = Trainer(
        model,
        config,
        out,
        train=train,
        validation=validation,
        record=facts,
        processes=processes,
    )
    if processes.is_first:
        _note_what_is_odd(trainer, sides)
    if arguments.dry_run:
        if encoder is not None:
            blank = torch.zeros(1, sum(encoder.widths))
            trainer.features = lambda rows, generator: blank.expand(len(rows), -1)  # nothing is learnt from it
        found = describe(trainer)  # by all: the steps that it tries are taken together
        if processes.is_first:
            print(found)
        return 0
    trainer.require_own_folder()
    if encoder is not None:
        trainer.features = _features(encoder, pictures, sides, config, processes, projection)
    started = time.perf_counter()
    try:
        loss = trainer.train()
    except FloatingPointError:  # where the curves say most
        _draw(trainer)
        raise
    _draw(trainer)
    if loss is None:
        if processes.is_first:
            print(f"stopped at step {trainer.step} of {trainer.steps}; the same command goes on from there")
        processes.wait()  # torchrun ends the others as soon as one has ended
        return 128 + trainer.stopped
    if processes.is_first:
        _finish(trainer, data, base, encoder, facts, loss, time.perf_counter() - started)
    processes.wait()
    return 0


def _note_what_is_odd(trainer: Trainer, sides: Sequence[Sequence[Row]]) -> None:
    """Says on standard error what may be meant, and is more often an oversight."""
    unseen = sum(row.image is not None for side in sides for row in side)
    if unseen and not trainer.config.vision:
        print(
            f"note: {unseen} rows have an image that is not looked at; an encoder looks at it: "
            "--vision efficientnet-lite2",
            file=sys.stderr,
        )
    if trainer.warmup >= trainer.steps:
        print(
            f"note: the rates never reach their peak: {trainer.warmup} steps of warm-up in a run of {trainer.steps}; "
            "set a lower --warmup, or more --epochs",
            file=sys.stderr,
        )


def _pictures(rows: Sequence[Row]) -> dict[Path, int]:
    """The row of the feature table for each picture."""
    return {path: index for index, path in enumerate(dict.fromkeys(row.image for row in rows if row.image is not None))}


def _examples(rows: Sequence[Row], tokenizer: Tokenizer, config: RunConfig, pictures: dict[Path, int]) -> list[Example]:
    separator = template(config.template).separator
    return [
        make_example(
            tokenizer,
            row.prompt,
            separator + row.response,
            image=pictures.get(row.image),
            max_tokens=config.max_tokens,
            where=row.where,
        )
        for row in rows
    ]


def _features(
    encoder: ImageEncoder,
    pictures: dict[Path, int],
    sides: Sequence[Sequence[Row]],
    config: RunConfig,
    processes: Processes,
    projection: ImageProjection,
) -> Features:
    """Cached features of every picture; the projection standardises by those of the training pictures.

    Raises:
        ValueError: There are fewer than two training pictures.
    """
    cache, paths = cache_folder() / "features", list(pictures)
    trained = {row.image for row in sides[0]}
    learnt = [path for path in paths if path in trained]
    other = [path for path in paths if path not in trained]
    if len(learnt) < 2:
        raise ValueError(
            f"an image encoder takes two or more pictures to train on, got {len(learnt)}; give more, or leave the "
            "encoder out: --vision ''"
        )

    def table() -> Tensor:
        views = cached_features(encoder, learnt, cache, views=config.views, seed=config.seed)
        rest = cached_features(encoder, other, cache)
        whole = views.new_zeros(config.views, len(paths), views.shape[2])
        whole[:, [pictures[path] for path in learnt]] = views
        whole[:, [pictures[path] for path in other]] = rest
        return whole

    with processes.in_turn():
        found = table()
    projection.set_statistics(found[0, [pictures[path] for path in learnt]].float().to(projection.feature_mean.device))
    return feature_source(found)


def feature_source(table: Tensor) -> Features:
    """Looks up cached features: in training a random view of each photo, in validation the photo as it is.

    Args:
        table: [V, images, F].
    """

    def lookup(rows: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return table[0, rows].float()
        views = torch.randint(len(table), rows.shape, generator=generator)
        return table[views, rows].float()

    return lookup


def _draw(trainer: Trainer) -> None:
    """Plots of what the log has so far."""
    from training.plots import draw_gates, draw_loss

    if trainer.processes.is_first:
        log = trainer.folder / "log.jsonl"
        draw_loss(log, log.with_name("loss.png"))
        draw_gates(log, log.with_name("gates.png"))


def _finish(
    trainer: Trainer,
    data: Data,
    base: Base,
    encoder: ImageEncoder | None,
    facts: dict,
    loss: float,
    seconds: float,
) -> None:
    config, out = trainer.config, trainer.folder
    step, state = trainer.shipped_state()
    if config.ship == "best":
        loss = trainer.best["val_loss"]
    about = AdapterFile(
        adapter=trainer.adapter.config,
        task=data.task,
        template=config.template,
        base=config.llama,
        fingerprint=base.fingerprint,
        vision=encoder.config if encoder is not None else None,
        projection_width=config.projection_width if encoder is not None else 0,
        generation=data.generation,
        training={
            **facts,
            "data": ", ".join(file.stem for file in data.files),
            "licence": config.licence,
            "steps": step,
            **data.settings,
            "run": dataclasses.asdict(config),
        },
        scores={"val_loss": round(loss, 4)},
        git_commit=facts["git_commit"] or "",
    )
    save_adapter(out / FILE_NAME, state, about)
    print(f"validation loss {loss:.4f} at step {step}, {seconds / 60:.1f} minutes; adapter in {out / FILE_NAME}")
    sys.stdout.flush()
