"""What the training scripts share: the base and its fresh adapter, the order of things, dry runs, ends by signal."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny_session
import torch
from safetensors.torch import load_file
from tiny_engine import config_of, different
from tiny_training import (
    ROOT,
    error_of,
    given_to_engine,
    log_of,
    story,
    write_alpaca,
    write_karpathy,
    write_llama,
    write_scienceqa,
    write_world,
)

from mmadapter.checkpoint import Fingerprint, read_about
from training import alpaca, coco_caption, launch, scienceqa
from training.engine import Trainer
from training.launch import feature_source, open_base

SCRIPTS = {"alpaca": alpaca, "scienceqa": scienceqa, "coco_caption": coco_caption}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with models, run files and the data of each script under the script's name."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_alpaca(folder / "alpaca")
    write_scienceqa(folder / "scienceqa")
    write_karpathy(folder / "coco_caption")
    return folder


@pytest.fixture(autouse=True)
def _cache(world, monkeypatch):
    monkeypatch.setenv("MMADAPTER_CACHE", str(world / "cache"))


def command(world: Path, script: str, out: Path | None, *more: str) -> list[str]:
    data = world / script / "alpaca_data.json" if script == "alpaca" else world / script
    run_file = world / ("text.toml" if script == "alpaca" else "tiny.toml")
    return ["--config", str(run_file), "--data", str(data), *(["--out", str(out)] if out else []), *more]


def train(world: Path, script: str, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The adapter that a command makes."""
    assert SCRIPTS[script].main(command(world, script, out, *more)) == 0
    return load_file(out / "adapter.safetensors")


# ------------------------------------------------------------------------------------------------- the base and a start


@pytest.fixture(scope="module")
def base(world) -> launch.Base:
    return open_base(config_of(llama=str(world / "llama"), dtype="bfloat16"))


def test_a_base_is_opened_in_the_runs_number_format(base):
    assert base.llama.dtype == torch.bfloat16
    assert base.fingerprint.vocabulary == Fingerprint.of(base.config, base.tokenizer.tokens()).vocabulary


def test_a_base_without_a_tokenizer_is_an_error(tmp_path):
    folder = write_llama(tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer, and training needs one"):
        open_base(config_of(llama=str(folder)))


def test_an_adapter_starts_from_the_runs_seed(base):
    torch.manual_seed(1)
    first = base.with_adapter(config_of(seed=3), None)
    torch.manual_seed(2)
    second = base.with_adapter(config_of(seed=3), None)
    other = base.with_adapter(config_of(seed=4), None)
    assert torch.equal(first.adapter.prompt, second.adapter.prompt)
    assert not torch.equal(first.adapter.prompt, other.adapter.prompt)
    assert not first.adapter.gate.any()
    assert first.adapter.prompt.dtype == torch.float32


def test_an_adapter_starts_as_the_run_file_has_it(base):
    config = config_of(gate_init=0.25, prompt_std=0.05, gate="scalar", tune="prompts+bias+scale+norm", prompt_length=7)
    adapter = base.with_adapter(config, None).adapter
    assert adapter.prompt.shape == (2, 7, 32)
    assert adapter.gate.tolist() == [[0.25], [0.25]]
    assert adapter.prompt.std().item() == pytest.approx(0.05, rel=0.2)
    assert adapter.tuning is not None


def test_more_layers_than_the_base_has_are_refused(base):
    with pytest.raises(ValueError, match="layers is 4, but tiny has 3; set a lower --layers"):
        base.with_adapter(config_of(layers=4), None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_starts_from_the_same_weights_in_every_process(world, tmp_path, monkeypatch, script):
    """A run that was killed before its first checkpoint begins anew, and must begin alike: prompts and projection."""
    argv = command(world, script, tmp_path)
    torch.manual_seed(1)
    first = given_to_engine(monkeypatch, SCRIPTS[script].main, argv).adapter
    torch.manual_seed(2)
    second = given_to_engine(monkeypatch, SCRIPTS[script].main, argv).adapter
    other = given_to_engine(monkeypatch, SCRIPTS[script].main, [*argv, "--seed", "1"]).adapter
    assert not different(first.state_dict(), second.state_dict())
    drawn = {name for name, parameter in first.named_parameters() if parameter.std() > 1e-3}
    assert drawn >= {"prompt"} | (set() if script == "alpaca" else {"projection.hidden.weight"})
    assert set(different(first.state_dict(), other.state_dict())) >= drawn


def test_training_sees_random_views_and_validation_the_photo_itself():
    views, images = 3, 4
    table = torch.arange(views * images, dtype=torch.float16).view(views, images, 1)
    lookup = feature_source(table)
    rows = torch.tensor([2, 0, 3, 3])
    assert lookup(rows, None).flatten().tolist() == [2, 0, 3, 3]
    drawn = [lookup(rows, torch.Generator().manual_seed(seed)).flatten() for seed in range(200)]
    for column, row in enumerate(rows.tolist()):
        assert {int(draw[column]) for draw in drawn} == {view * images + row for view in range(views)}
    assert any(draw[2] != draw[3] for draw in drawn), "two captions of one photo may get different views of it"
    assert torch.equal(drawn[5], lookup(rows, torch.Generator().manual_seed(5)).flatten())
    assert drawn[0].dtype == torch.float32


# --------------------------------------------------------------------------------------------------- the run's settings


@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--tune", "prompts+bias+scale+norm", "--checkpointing")])
def test_a_run_of_other_settings_ends_in_an_adapter_of_them(world, tmp_path, flags):
    state = train(world, "scienceqa", tmp_path, *flags)
    about = read_about(tmp_path / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())
    assert about.training["run"]["dtype"] == ("bfloat16" if "bfloat16" in flags else "float32")
    assert about.adapter.tune == ("prompts" if "bfloat16" in flags else flags[1])
    assert any(name.startswith("tuning.") for name in state) == ("bfloat16" not in flags)


def test_some_of_the_training_rows_drawn_by_the_seed(world, tmp_path):
    """All of the validation rows stay."""
    drawn = []
    for name, flags in (("all", []), ("3", ["3"]), ("again", ["3"]), ("many", ["999"])):
        flags = ["--train-rows", *flags] if flags else []
        weights = train(world, "alpaca", tmp_path / name, *flags)
        start = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        drawn.append((start["rows"], start["validation_rows"], weights["prompt"]))
    (everything, few, again, many) = drawn
    assert (few[0], few[1]) == (3, everything[1])
    assert torch.equal(few[2], again[2])
    assert not torch.equal(few[2], everything[2])
    assert many[0] == everything[0]
    assert torch.equal(many[2], everything[2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's back end for the CPU needs g++")
def test_a_compiled_run_learns_what_a_plain_one_learns(world, tmp_path, monkeypatch):
    """With torch's own back end; every block compiles for itself."""
    compiled, real = [], torch.nn.Module.compile

    def counted(module: torch.nn.Module, **options: object) -> None:
        compiled.append(module)
        assert options == {"dynamic": True}, "lengths differ from pass to pass"
        real(module, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    flags = ("--ema", "0", "--steps", "1", "--validation-rows", "1")
    plain = train(world, "alpaca", tmp_path / "plain", *flags)
    assert not compiled
    fast = train(world, "alpaca", tmp_path / "fast", *flags, "--compile")
    assert len(compiled) == 3, "each block of the base"
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ship", ["last", "best"])
def test_the_adapter_file_says_what_it_holds(world, tmp_path, monkeypatch, ship):
    worse = iter((2.0, 1.0, 3.0))  # the validations at step 0, 2 and 3
    loss_of = Trainer.loss_of

    def weighed(trainer: Trainer, rows, generator, **options) -> torch.Tensor:
        loss = loss_of(trainer, rows, generator, **options)
        return loss * next(worse) if generator is None else loss

    monkeypatch.setattr(Trainer, "loss_of", weighed)
    flags = ("--ship", ship, "--batch-tokens", "0")  # one pass a validation
    state = train(world, "alpaca", tmp_path, *flags)
    about = read_about(tmp_path / "adapter.safetensors")
    losses = {line["step"]: line["val_loss"] for line in log_of(tmp_path) if "val_loss" in line}
    step = {"last": 3, "best": 2}[ship]
    assert about.training["steps"] == step
    assert about.scores == {"val_loss": round(losses[step], 4)}
    best = torch.load(tmp_path / "best.pt", weights_only=True)["adapter"]
    assert bool(different(state, best)) == (ship == "last")


def test_a_run_folder_is_named_after_the_run_file(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert alpaca.main(command(world, "alpaca", None)) == 0
    assert [str(path) for path in Path().rglob("adapter.safetensors")] == ["runs/text/adapter.safetensors"]


# ------------------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(world, tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert SCRIPTS[script].main(command(world, script, None, "--dry-run")) == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before

    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["trained", "frozen", "rows", "tokens", "steps", "memory", "time"]
    given = given_to_engine(monkeypatch, SCRIPTS[script].main, command(world, script, tmp_path))
    count = sum(parameter.numel() for parameter in given.adapter.parameters())
    assert said["trained"].startswith(f"{count:,} parameters: prompt {2 * 3 * 32:,}, gate 8")
    assert said["frozen"].startswith(f"{sum(p.numel() for p in given.model.llama.parameters()):,} parameters of ")
    with_image = sum(row.image is not None for row in given.train_examples)
    assert said["rows"] == f"{len(given.train_examples)} ({with_image} with an image), " + (
        f"{len(given.validation_examples)} for validation"
    )
    lengths = sorted(len(row.tokens) for row in given.train_examples)
    assert f"the longest {lengths[-1]}), " in said["tokens"]
    assert said["steps"].startswith(f"3 of 4 rows: {12 / len(lengths):.2f} epochs, 1 steps of warm-up")
    assert 0.05 < float(said["memory"].split()[0]) < 100
    assert " s a step, " in said["time"]


def test_a_dry_run_takes_two_steps_and_changes_no_weight(world, tmp_path, monkeypatch):
    given = given_to_engine(monkeypatch, alpaca.main, command(world, "alpaca", tmp_path))
    before = {name: tensor.clone() for name, tensor in given.adapter.state_dict().items()}
    tried, accumulate = [], given.accumulate
    monkeypatch.setattr(given, "accumulate", lambda rows: tried.append(rows) or accumulate(rows))
    launch.describe(given)
    assert [len(rows) for rows in tried] == [4, 4]
    assert {len(row.tokens) for row in tried[0]} >= {max(len(row.tokens) for row in given.train_examples)}
    assert not different(before, given.adapter.state_dict())
    assert all(parameter.grad is None for parameter in given.adapter.parameters())
    assert given.step == 0


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("scienceqa", ["--llama", "absent"], "no LLaMA named 'absent'"),
        ("scienceqa", ["--vision", "timm:test_resnet@absent.pt"], "absent.pt not found"),
        ("scienceqa", ["--vision", "imaginary"], "unknown image encoder 'imaginary'"),
        ("scienceqa", ["--scales", "9"], "got scale '9'"),
        ("scienceqa", ["--layers", "4"], "layers is 4, but"),
        ("scienceqa", ["--gate", "sigmoid"], "gate must be one of"),
        ("scienceqa", ["--template", "absent"], "no prompt template 'absent'"),
        ("scienceqa", ["--lr", "-1"], "lr must not be negative"),
        ("scienceqa", ["--seed", str(2**63)], "seed must be below 2**63"),
        ("scienceqa", ["--device", "tpu9"], "there is no device 'tpu9'"),
        ("scienceqa", ["--shard"], "start them with torchrun"),
        ("scienceqa", ["--format", "AQC"], "'AQC' is no ScienceQA format"),
        ("scienceqa", ["--held-out", "10"], "cannot hold out 10 questions"),
        ("coco_caption", ["--vision", ""], "captions need an image encoder"),
        ("alpaca", ["--held-out", "12"], "there are 0 rows to train on and 12 to validate on"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_feature_is_computed(
    world, tmp_path, capsys, monkeypatch, script, flags, message
):
    """The features of a large data set take hours; a slip in the run file must not cost them."""
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    error = error_of(capsys, SCRIPTS[script].main, command(world, script, tmp_path / "out", *flags))
    assert message in error
    assert not list(tmp_path.rglob("features-*"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_this_runs_is_refused_before_any_feature_is_computed(world, tmp_path, capsys, monkeypatch):
    out, main = tmp_path / "out", SCRIPTS["scienceqa"].main
    train(world, "scienceqa", out)
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    error = error_of(capsys, main, command(world, "scienceqa", out, "--lr", "1"))
    assert "was made with another lr; choose another --out" in error
    (checkpoint,) = out.glob("checkpoint-*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    error = error_of(capsys, main, command(world, "scienceqa", out))
    assert f"{checkpoint} cannot be read" in error
    assert error.endswith("; delete it to go on from an earlier one")
    file = tmp_path / "file"
    file.write_text("")
    assert f"{file} is a file; choose a folder" in error_of(capsys, main, command(world, "scienceqa", file))
    error = error_of(capsys, main, command(world, "scienceqa", file / "out"))
    assert f"cannot write {file / 'out'}: {file} is no folder" in error
    assert not list((tmp_path / "cache").rglob("features-*"))


def test_what_is_more_often_an_oversight_is_noted(world, tmp_path, capsys):
    """Rows with pictures under a run file of text, and a warm-up that a short run never leaves."""
    data = tmp_path / "rows.jsonl"
    picture = {"image": str(world / "photo.png")}
    tiny_session.picture(0, 40, 30).save(world / "photo.png")
    rows = [{"instruction": f"Say {n}.", "output": f"{n}.", **(picture if n % 3 == 0 else {})} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command(world, "alpaca", tmp_path / "out", "--dry-run", "--vision", "", "--warmup", "3", "--held-out", "2")
    argv[argv.index("--data") + 1] = str(data)
    assert alpaca.main(argv) == 0
    notes = capsys.readouterr().err
    assert "note: 3 rows have an image that is not looked at; an encoder looks at it: --vision eff" in notes
    assert "note: the rates never reach their peak: 3 steps of warm-up in a run of 3; set a lower --warmup" in notes
    assert alpaca.main(command(world, "alpaca", tmp_path / "out", "--dry-run")) == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_run_file_is_named(world, tmp_path, capsys, script):
    argv = ["--config", str(tmp_path / "absent.toml"), "--data", str(world)]
    assert f"no run file {tmp_path / 'absent.toml'}" in error_of(capsys, SCRIPTS[script].main, argv)


@pytest.mark.parametrize("script", SCRIPTS)
def test_misuse_is_one_line_and_exits_with_2(capsys, script):
    with pytest.raises(SystemExit) as exited:
        SCRIPTS[script].main([])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--config" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_opens_with_an_example_whose_run_file_is_there(capsys, script):
    with pytest.raises(SystemExit) as exited:
        SCRIPTS[script].main(["--help"])
    assert exited.value.code == 0
    heading, example, *rest = capsys.readouterr().out.splitlines()
    parts = example.split()
    assert heading == "Example:"
    assert parts[:3] == ["python", "-m", f"training.{script}"]
    assert (ROOT / parts[parts.index("--config") + 1]).is_file()
    assert importlib.import_module(parts[2]) is SCRIPTS[script]
    assert any("--skip-bad-rows" in line for line in rest)


# -------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(world, tmp_path, capsys, monkeypatch, kind, status):
    steps = ("--steps", "5", "--eval-every", "10", "--save-every", "10")
    whole = train(world, "alpaca", tmp_path / "whole", *steps)
    take = Trainer._step

    def signalled(trainer: Trainer, *arguments: object) -> dict[str, float]:
        if trainer.step == 1:
            os.kill(os.getpid(), kind)
        return take(trainer, *arguments)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        assert alpaca.main(command(world, "alpaca", out, *steps)) == status
    assert all((out / name).stat().st_size > 5000 for name in ("loss.png", "gates.png"))
    (checkpoint,) = out.glob("checkpoint-*.pt")
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert f"stopped at step {step} of 5; the same command goes on from there" in capsys.readouterr().out
    assert not (out / "adapter.safetensors").exists()
    assert not different(train(world, "alpaca", out, *steps), whole)
    assert story(out) == story(tmp_path / "whole")


def test_a_run_that_breaks_is_an_error_that_names_step_and_rows(world, tmp_path, capsys, monkeypatch):
    loss_of = Trainer.loss_of

    def breaks(trainer: Trainer, rows, generator, **options) -> torch.Tensor:
        loss = loss_of(trainer, rows, generator, **options)
        return loss * float("nan") if trainer.step == 2 and generator is not None else loss

    monkeypatch.setattr(Trainer, "loss_of", breaks)
    error = error_of(capsys, alpaca.main, command(world, "alpaca", tmp_path))
    assert "the loss is nan at step 2 in a batch of " in error
    assert "alpaca_data.json, row " in error
    assert f"; the last good checkpoint is in {tmp_path}; " in error
    assert (tmp_path / "checkpoint-000002.pt").exists()
    assert not (tmp_path / "adapter.safetensors").exists()
