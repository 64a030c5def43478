"""The training loop: schedule, optimizer, batches, resuming, checkpoints, validation, log."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_training import write_llama

from mmadapter.checkpoint import AdapterFile, Fingerprint, save_adapter
from mmadapter.data import IGNORE_INDEX, Example, collate
from mmadapter.vision import ImageProjection
from training import engine
from training.coco_caption import feature_source
from training.config import RunConfig
from training.engine import Base, Trainer, batches_from, learning_rate, make_optimizer, open_base

IMAGES, VIEWS = 6, 3


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


def config_of(**changes: object) -> RunConfig:
    """A run that uses everything that draws at random or remembers: dropout, views, EMA, momentum."""
    settings = {
        "llama": "tiny",
        "dtype": "float32",
        "layers": 2,
        "prompt_length": 3,
        "projection_width": 8,
        "dropout": 0.3,
        "feature_dropout": 0.3,
        "batch_size": 4,
        "steps": 9,
        "lr": 1e-2,
        "gate_lr": 3e-2,
        "warmup": 2,
        "label_smoothing": 0.1,
        "ema": 0.9,
        "eval_every": 3,
        "save_every": 2,
    }
    return RunConfig(**{**settings, **changes})


def rows(count: int, seed: int = 0, images: bool = True) -> list[Example]:
    """Rows of three prompt tokens and 2 to 8 more; the answer depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        answer = [10 + index % IMAGES + place for place in range(length)]
        examples.append(Example((1, 2, 3, *answer), 3, index % IMAGES if images else None))
    return examples


def base() -> Base:
    llama = tiny.llama()
    return Base(llama, None, Fingerprint.of(llama.config, None))


def projection(config: RunConfig) -> ImageProjection:
    return ImageProjection(
        tiny.FEATURES, tiny.config().width, config.projection_width, config.dropout, config.feature_dropout
    )


def trainer(folder: Path, *, start: int = 0, images: bool = True, record: dict | None = None, **changes) -> Trainer:
    """A run over 14 rows; `start` seeds the weights before the first step."""
    config = config_of(**changes)
    torch.manual_seed(start)
    model = base().with_adapter(config, projection(config) if images else None)
    table = torch.randn(VIEWS, IMAGES, tiny.FEATURES, generator=torch.Generator().manual_seed(5))
    return Trainer(
        model,
        config,
        folder,
        train=rows(14, images=images),
        validation=rows(5, seed=1, images=images),
        features=feature_source(table) if images else None,
        record=record,
    )


def all_tensors(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything a run carries from one step to the next."""
    found = {f"adapter.{name}": tensor for name, tensor in run.model.adapter.state_dict().items()}
    found |= {f"mean.{name}": tensor for name, tensor in run.mean.items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def kill_at(monkeypatch):
    """Makes the next run end when it asks for the batch of a step."""

    def arrange(step: int | None) -> None:
        def batches(examples, config, first: int) -> Iterator:
            for number in itertools.count(first):
                if number == step:
                    raise Killed
                yield next(real)

        def begin(examples, config, first: int) -> Iterator:
            nonlocal real
            real = batches_from(examples, config, first)
            return batches(examples, config, first)

        real: Iterator = iter(())
        monkeypatch.setattr(engine, "batches_from", begin)

    return arrange


# ---------------------------------------------------------------------------------------------- schedule and optimizer


def test_the_learning_rate_warms_up_linearly_then_falls_as_half_a_cosine():
    rates = [learning_rate(step, 2.0, 4, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[14] == pytest.approx(1.0)  # half way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert learning_rate(24, 2.0, 4, 24) == pytest.approx(0)


def test_the_learning_rate_is_symmetric_about_the_middle_of_its_fall():
    for step in range(10):
        assert learning_rate(step, 1.0, 0, 20) + learning_rate(20 - step, 1.0, 0, 20) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [5, 50])
def test_a_run_that_is_all_warm_up_has_a_rate_at_every_step(warmup):
    """steps - warmup of zero or less must not divide by zero."""
    rates = [learning_rate(step, 1.0, warmup, 5) for step in range(5)]
    assert rates == pytest.approx([(step + 1) / warmup for step in range(5)])


def test_every_parameter_is_in_one_group_and_only_matrices_of_the_projection_are_decayed():
    config = config_of(weight_decay=0.3, lr=0.01, gate_lr=0.05)
    model = base().with_adapter(config, projection(config))
    names = {id(parameter): name for name, parameter in model.adapter.named_parameters()}
    groups = make_optimizer(model.adapter, config).param_groups
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    of = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert {name for name, group in of.items() if group["weight_decay"]} == {
        "projection.hidden.weight",
        "projection.output.weight",
    }
    assert of["projection.hidden.weight"]["weight_decay"] == 0.3
    assert {name for name, group in of.items() if group["peak"] == 0.05} == {"gate"}
    assert {group["peak"] for name, group in of.items() if name != "gate"} == {0.01}
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


def test_a_text_adapter_has_no_empty_group():
    config = config_of()
    groups = make_optimizer(base().with_adapter(config, None).adapter, config).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_the_schedule_is_what_the_optimizer_takes(tmp_path):
    run = trainer(tmp_path, steps=5, warmup=2)
    taken = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append([g["lr"] for g in optimizer.param_groups]))
    run.train()
    peaks = [group["peak"] for group in run.optimizer.param_groups]
    assert taken == [[learning_rate(step, peak, 2, 5) for peak in peaks] for step in range(5)]


# ------------------------------------------------------------------------------------------------------------- batches


def test_each_epoch_has_every_row_once_and_another_order():
    examples = rows(14)
    config = config_of(batch_size=4)
    batches = batches_from(examples, config, 0)
    epochs = [[next(batches) for _ in range(4)] for _ in range(3)]  # 4 batches of 4 rows at most
    for epoch in epochs:
        assert sorted(id(row) for batch in epoch for row in batch) == sorted(id(row) for row in examples)
    orders = [[id(row) for batch in epoch for row in batch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_batches_depend_on_seed_and_step_alone(step):
    """A resumed run begins in the middle of an epoch, or of a later one."""
    examples = rows(14)
    whole = list(itertools.islice(batches_from(examples, config_of(), 0), 12))
    torch.manual_seed(99)
    assert list(itertools.islice(batches_from(examples, config_of(), step), 12 - step)) == whole[step:]
    assert list(itertools.islice(batches_from(examples, config_of(seed=1), 0), 12)) != whole


def test_each_step_draws_other_views_and_the_same_ones_in_another_run(tmp_path):
    """A generator made anew from one number shows row r of every batch the same view, for ever."""

    def seeds_of(folder: Path, **changes: object) -> list[int]:
        run, seeds = trainer(folder, steps=6, **changes), []
        lookup = run.features

        def watched(rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            seeds.extend([] if generator is None else [generator.initial_seed()])
            return lookup(rows, generator)

        run.features = watched
        run.train()
        return seeds

    seeds = seeds_of(tmp_path / "one")
    assert len(set(seeds)) == 6
    assert seeds_of(tmp_path / "two") == seeds
    assert set(seeds_of(tmp_path / "three", seed=1)).isdisjoint(seeds)


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("images", [True, False])
def test_a_few_steps_lower_the_loss(tmp_path, images):
    plain = {"dropout": 0.0, "feature_dropout": 0.0, "label_smoothing": 0.0}
    run = trainer(tmp_path, images=images, steps=60, eval_every=60, save_every=60, lr=0.1, gate_lr=0.2, **plain)
    loss = run.train()
    assert loss < 0.9 * log_of(tmp_path)[1]["val_loss"]


def test_the_base_is_not_touched(tmp_path):
    run = trainer(tmp_path)
    before = copy.deepcopy(run.model.llama.state_dict())
    run.train()
    assert not different(before, run.model.llama.state_dict())
    assert not any(parameter.requires_grad for parameter in run.model.llama.parameters())


def test_rows_with_and_without_image_train_in_one_batch(tmp_path):
    """A text row has no row in the feature table; -1 must not be taken for the last picture."""
    run = trainer(tmp_path)
    batch = collate([*rows(2), *rows(2, images=False)])
    features, has_image = run._batch_features(batch, None)
    assert has_image.tolist() == [True, True, False, False]
    run.model.eval()
    mixed = run.model(batch.tokens, batch.labels, features, has_image)
    text = collate(rows(2, images=False))
    photo = collate(rows(2))
    separate = run.model(text.tokens, text.labels) + run.model(photo.tokens, photo.labels, features[:2])
    assert mixed.item() == pytest.approx(separate.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("kills", [[1], [2], [5], [8], [3, 4, 7]], ids=str)
def test_a_resumed_run_ends_bit_identical_to_one_never_killed(tmp_path, kill_at, kills):
    """Dropout, random views, EMA, momentum, schedule and the order of rows go on as if nothing had happened.

    The kill at step 1 comes before the first checkpoint; the new process starts from other random weights, so that
    nothing but the checkpoint can bring the old ones back.
    """
    whole = trainer(tmp_path / "whole")
    loss = whole.train()
    for number, step in enumerate(kills):
        kill_at(step)
        # Before there is a checkpoint a new process draws the same first weights: the seed is the run file's.
        with pytest.raises(Killed):
            trainer(tmp_path / "killed", start=number if number and kills[0] > 1 else 0).train()
        torch.rand(7)
    kill_at(None)
    resumed = trainer(tmp_path / "killed", start=50 if kills[0] > 1 else 0)
    assert resumed.train() == loss
    assert resumed.step == whole.step == 9
    assert not different(all_tensors(whole), all_tensors(resumed))
    assert not different(whole.kept_state(), resumed.kept_state())
    steps = [line["step"] for line in log_of(tmp_path / "killed") if line.get("event") == "start"]
    assert steps == [0, *(step // 2 * 2 for step in kills)]


def test_another_seed_trains_otherwise(tmp_path):
    """The comparison above must be able to fail."""
    runs = [trainer(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for run in runs:
        run.train()
    assert different(all_tensors(runs[0]), all_tensors(runs[1]))


def test_a_finished_run_is_only_validated_again(tmp_path):
    first = trainer(tmp_path)
    loss = first.train()
    again = trainer(tmp_path, start=1)
    assert again.train() == loss
    assert not different(all_tensors(first), all_tensors(again))


def test_a_run_may_be_made_longer(tmp_path):
    trainer(tmp_path, steps=4).train()
    longer = trainer(tmp_path, steps=6)
    longer.train()
    assert longer.step == 6
    assert [line["step"] for line in log_of(tmp_path) if line.get("event") == "start"] == [0, 4]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer(tmp_path, steps=2).train()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt was made with another lr, ema; choose another --out"
    ) as raised:
        trainer(tmp_path, steps=4, lr=0.5, ema=0.0).train()
    assert "\n" not in str(raised.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path, steps=2, record={"data_hash": "one"}).train()
    trainer(tmp_path, steps=3, record={"data_hash": "one"}).train()
    with pytest.raises(ValueError, match=r"checkpoint\.pt was made with other data"):
        trainer(tmp_path, steps=4, record={"data_hash": "two"}).train()


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"no checkpoint", lambda _: b""]
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, damage):
    trainer(tmp_path, steps=2).train()
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read .*delete it to start afresh") as raised:
        trainer(tmp_path).train()
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """A full disk must not take the last good checkpoint with it, nor leave half of one."""
    run = trainer(tmp_path, steps=2)
    run.train()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full_disk(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, steps=4).train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_what_a_kill_in_the_middle_of_saving_left_is_gone_after_the_next_checkpoint(tmp_path, monkeypatch):
    def killed(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(engine.torch, "save", killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
    with pytest.raises(Killed):
        trainer(tmp_path).train()
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    trainer(tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


# ------------------------------------------------------------------------------------------------------- not a number


def nan_loss_at(run: Trainer, step: int) -> None:
    likelihood = run.objective

    def objective(model, *rest):
        loss, figures = likelihood(model, *rest)
        return (loss * math.nan if run.step == step else loss), figures

    run.objective = objective


def nan_gradient_at(run: Trainer, step: int) -> None:
    """A finite loss whose gradient is not: what a square root at zero, or an overflow in bfloat16, does."""
    run.model.adapter.prompt.register_hook(lambda gradient: gradient * math.inf if run.step == step else gradient)


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(("breaks", "what"), [(nan_loss_at, "loss is nan"), (nan_gradient_at, "gradient's norm is")])
def test_a_number_that_is_none_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, breaks, what, clip):
    """With checks on the loss alone, a bad gradient makes every weight NaN, and step 6 saves them as the last good."""
    run = trainer(tmp_path, clip=clip)
    breaks(run, 5)
    with pytest.raises(FloatingPointError, match=rf"the {what} .*at step 5; the last good checkpoint is in") as raised:
        run.train()
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in [*state["adapter"].values(), *state["mean"].values()])
    assert all(tensor.isfinite().all() for tensor in all_tensors(run).values())
    # What was wrong is mended: the run goes on, and ends where one without the accident ends.
    resumed, whole = trainer(tmp_path, clip=clip), trainer(tmp_path / "whole", clip=clip)
    resumed.train()
    whole.train()
    assert not different(all_tensors(resumed), all_tensors(whole))


def test_before_the_first_checkpoint_none_is_promised(tmp_path):
    run = trainer(tmp_path)
    nan_loss_at(run, 1)
    with pytest.raises(FloatingPointError, match="at step 1; there is no checkpoint yet"):
        run.train()


# ---------------------------------------------------------------------------------------------------------- validation


def test_validation_takes_the_kept_weights_and_leaves_the_training_weights(tmp_path):
    """Under EMA the two differ; validating one and shipping the other would make the score a lie."""
    run = trainer(tmp_path, steps=4)
    run.train()
    before = all_tensors(run)
    assert different(run.mean, dict(run.model.adapter.named_parameters())) == sorted(run.mean, key=list(run.mean).index)
    loss = run._validate()
    assert not different(before, all_tensors(run))

    def plain_loss(state: dict[str, torch.Tensor]) -> float:
        model = copy.deepcopy(run.model).eval()
        model.adapter.load_state_dict(state)
        total, count = 0.0, 0
        for row in rows(5, seed=1):
            batch = collate([row])
            with torch.no_grad():
                total += model(batch.tokens, batch.labels, run.features(batch.images, None)).item()
            count += int((batch.labels != IGNORE_INDEX).sum())
        return total / count

    assert loss == pytest.approx(plain_loss(run.kept_state()), rel=1e-5)
    assert loss != pytest.approx(plain_loss(run.model.adapter.state_dict()), rel=1e-5)


def test_without_ema_the_last_weights_are_kept(tmp_path):
    run = trainer(tmp_path, steps=3, ema=0.0)
    run.train()
    assert not different(run.kept_state(), run.model.adapter.state_dict())


def test_the_running_mean_is_warmed_up_then_decays(tmp_path):
    """Mean after step t: m + (1 - min(ema, t / (t + 10))) (w - m)."""
    run = trainer(tmp_path, steps=20, ema=0.5, eval_every=100, save_every=100)
    expected = {name: p.detach().clone() for name, p in run.model.adapter.named_parameters()}
    batches = batches_from(run.train_examples, run.config, 0)
    for step in range(1, 16):
        run._step(collate(next(batches)))
        decay = min(0.5, step / (step + 10))
        for name, parameter in run.model.adapter.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, tensor in expected.items():
        torch.testing.assert_close(run.mean[name], tensor)


def test_every_parameter_still_trains_after_a_validation(tmp_path):
    """Prompt keys cached under no_grad, or a model left in evaluation mode, would end the training silently."""
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.adapter.gate.fill_(0.1)
    run._validate()
    before = {name: p.detach().clone() for name, p in run.model.adapter.named_parameters()}
    run._step(collate(rows(6)))
    assert run.model.training
    assert different(before, dict(run.model.adapter.named_parameters())) == list(before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in run.model.adapter.parameters())


def test_validation_is_the_same_each_time_and_unsmoothed(tmp_path):
    run = trainer(tmp_path)
    plain = trainer(tmp_path / "plain", label_smoothing=0.0, dropout=0.0, feature_dropout=0.0)
    assert run._validate.__self__ is run
    (tmp_path / "plain").mkdir()
    assert run._validate() == run._validate() == plain._validate()


@pytest.mark.parametrize(("wanted", "there", "taken"), [(3, 9, [0, 3, 6]), (4, 6, [0, 1, 3, 4]), (10, 3, [0, 1, 2])])
def test_validation_rows_are_evenly_spread_and_no_more_than_asked(tmp_path, wanted, there, taken):
    """A plain stride takes 1,500 of 1,500 rows where 1,000 were asked for."""
    config = config_of(validation_rows=wanted)
    examples = rows(there)
    run = Trainer(base().with_adapter(config, None), config, tmp_path, train=rows(2), validation=examples)
    assert run.validation_examples == [examples[index] for index in taken]


@pytest.mark.parametrize(("train", "validation"), [(0, 2), (2, 0)])
def test_no_rows_are_an_error(tmp_path, train, validation):
    config = config_of()
    with pytest.raises(ValueError, match=f"there are {train} rows to train on and {validation} to validate on"):
        Trainer(
            base().with_adapter(config, None), config, tmp_path, train=rows(train), validation=rows(validation, seed=1)
        )


# ----------------------------------------------------------------------------------------------------- log and display


def test_the_log_holds_settings_losses_speed_and_validations(tmp_path):
    run = trainer(tmp_path, steps=25, eval_every=10, record={"data_hash": "abc"})
    loss = run.train()
    first, *lines = log_of(tmp_path)
    assert first["event"] == "start"
    assert first["config"] == json.loads(json.dumps(dataclasses.asdict(run.config)))
    assert first["data_hash"] == "abc"
    assert first["versions"]["torch"] == torch.__version__
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [10, 20, 25], "the last steps of a run are logged, too"
    for line in steps:
        assert line.keys() >= {"step", "loss", "grad_norm", "lr", "tokens_per_s", "time"}
        assert line["lr"] == learning_rate(line["step"] - 1, 1e-2, 2, 25)
        assert line["tokens_per_s"] > 0
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [0, 10, 20, 25]
    assert validations[-1]["val_loss"] == loss
    assert all(line["mean_abs_gate"] > 0 for line in validations[1:])


def test_a_logged_loss_is_the_mean_of_its_ten_steps_and_no_step_is_validated_twice(tmp_path, monkeypatch):
    run = trainer(tmp_path, steps=20, eval_every=10)
    step, seen = run._step, []

    def watched(batch) -> dict[str, float]:
        seen.append(step(batch))
        return seen[-1]

    monkeypatch.setattr(run, "_step", watched)
    run.train()
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    for number, line in enumerate(lines):
        for name in ("loss", "grad_norm"):
            tenth = [figures[name] for figures in seen[10 * number : 10 * number + 10]]
            assert line[name] == pytest.approx(sum(tenth) / 10)
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["step"] for line in log_of(tmp_path) if "val_loss" in line] == [0, 10, 20]


def test_the_gradient_is_clipped_to_the_norm_and_logged_as_it_was(tmp_path):
    run = trainer(tmp_path, clip=1e-3)
    norm = run._step(collate(rows(6)))["grad_norm"]
    clipped = torch.stack([parameter.grad.norm() for parameter in run.model.adapter.parameters()]).norm()
    assert norm > 2e-3
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_clip_of_zero_is_no_clipping(tmp_path):
    run = trainer(tmp_path, clip=0.0)
    norm = run._step(collate(rows(6)))["grad_norm"]
    kept = torch.stack([parameter.grad.norm() for parameter in run.model.adapter.parameters()]).norm()
    assert norm > 0
    assert kept.item() == pytest.approx(norm)


def test_the_loss_of_a_step_is_the_smoothed_mean_of_its_target_tokens(tmp_path):
    """Of target tokens, not of rows: a short answer must not weigh as much as a long one."""
    run = trainer(tmp_path, images=False, label_smoothing=0.3)
    batch = collate(rows(6, images=False))
    logits = run.model.llama(batch.tokens[:, :-1], prompts=run.model.adapter.prompts(run.model.llama))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=0.3)
    assert run._step(batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_user_sees_loss_speed_and_time_left(tmp_path, capsys):
    trainer(tmp_path, steps=3).train()
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "loss " in shown.err
    assert "tokens/s" in shown.err
    assert "<" in shown.err  # tqdm: [elapsed<left]
    assert "step 0: validation loss" in shown.out + shown.err


# ------------------------------------------------------------------------------------------------- the base and a start


def test_an_adapter_starts_from_the_runs_seed():
    config = config_of(seed=3)
    torch.manual_seed(1)
    first = base().with_adapter(config, None)
    torch.manual_seed(2)
    second = base().with_adapter(config, None)
    other = base().with_adapter(config_of(seed=4), None)
    assert torch.equal(first.adapter.prompt, second.adapter.prompt)
    assert not torch.equal(first.adapter.prompt, other.adapter.prompt)
    assert not first.adapter.gate.any()


def test_a_run_may_start_from_an_adapter_file(tmp_path):
    config = config_of()
    given = tiny.adapter(tiny.config(), image=True)
    given.projection = projection(config)
    save_adapter(tmp_path / "a.safetensors", given.state_dict(), about(given, config))
    model = base().with_adapter(config_of(init=str(tmp_path / "a.safetensors")), projection(config))
    assert not different(given.state_dict(), model.adapter.state_dict())
    assert all(parameter.requires_grad for parameter in model.adapter.parameters())


def about(adapter, config: RunConfig) -> AdapterFile:
    from mmadapter.config import VisionConfig

    vision = None if adapter.projection is None else VisionConfig("efficientnet-lite2")
    return AdapterFile(adapter.config, "caption", vision=vision, projection_width=config.projection_width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt_length": 4}, "other sizes than this run file asks for"), ({"gate": "identity"}, "has tanh gates")],
)
def test_a_start_of_another_shape_is_refused(tmp_path, changes, message):
    """Gates of another variant have the same shape and mean something else."""
    given = tiny.adapter(tiny.config())
    save_adapter(tmp_path / "a.safetensors", given.state_dict(), about(given, config_of()))
    with pytest.raises(ValueError, match=message):
        base().with_adapter(config_of(init=str(tmp_path / "a.safetensors"), **changes), None)


def test_more_layers_than_the_base_has_are_refused():
    with pytest.raises(ValueError, match="layers is 4, but tiny has 3"):
        base().with_adapter(config_of(layers=4), None)


def test_a_base_is_opened_in_the_runs_number_format(tmp_path):
    folder = write_llama(tmp_path / "llama")
    opened = open_base(config_of(llama=str(folder), dtype="bfloat16"))
    assert opened.llama.dtype == torch.bfloat16
    assert opened.fingerprint.vocabulary == Fingerprint.of(opened.config, opened.tokenizer.tokens()).vocabulary


def test_a_base_without_a_tokenizer_is_an_error(tmp_path):
    folder = write_llama(tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer, and training needs one"):
        open_base(config_of(llama=str(folder)))
