"""Run files: every shipped one parses, a wrong one says in one line which key of which file is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from training import launch
from training.config import RunConfig, add_overrides, descriptions, overrides_of, read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "training" / "configs").rglob("*.toml"))
FIELDS = {field.name: field.default for field in dataclasses.fields(RunConfig)}


@pytest.fixture
def run_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


def flags(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    return overrides_of(parser.parse_args(argv))


def test_there_are_shipped_run_files():
    assert [path.name for path in CONFIGS], "the next test would check nothing"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_run_file_parses_and_names_the_licence_of_its_data(path):
    config = read_config(path, {})
    assert config.licence


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_run_file_begins_with_the_command_that_runs_it(path, monkeypatch):
    """The command is parsed by the script that it names, and the settings it gives are those of this file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    command = re.fullmatch(r"# (?:python|torchrun .*?) -m training\.(\w+) (.+)", first)
    assert command, f"{path.name} begins with {first!r}, not with # python -m training.X --config {path.name} --data Y"
    name, argv = command[1], shlex.split(command[2])
    assert (ROOT / "training" / f"{name}.py").is_file()
    if name == "ablations":  # it has a run file of its own, and a test of its own
        assert path.name == "ablation.toml"
        return
    parsed = []
    monkeypatch.setattr(launch, "_run", lambda arguments, read: parsed.append(arguments) or 0)
    monkeypatch.chdir(ROOT)
    assert importlib.import_module(f"training.{name}").main(argv) == 0
    (arguments,) = parsed
    assert (ROOT / arguments.config).resolve() == path
    assert arguments.data
    read_config(arguments.config, overrides_of(arguments))


def test_a_file_changes_only_what_it_names(run_file):
    config = read_config(run_file('lr = 1e-4\nscales = ["4", "final"]\nclip = 1\n'), {})
    assert config == RunConfig(lr=1e-4, scales=("4", "final"), clip=1)


def test_flags_override_the_file(run_file):
    path = run_file("batch_size = 8\nsteps = 20\n")
    config = read_config(path, flags("--batch-size", "16", "--scales", "2", "3", "--llama", "other", "--lr", "1e-5"))
    assert config == RunConfig(batch_size=16, steps=20, scales=("2", "3"), llama="other", lr=1e-5)


def test_flags_that_are_not_given_change_nothing(run_file):
    assert read_config(run_file("steps = 20"), flags()) == RunConfig(steps=20)


def test_a_flag_may_empty_a_list(run_file):
    """An empty list is a value; only None means that the flag was not given."""
    assert read_config(run_file('scales = ["final"]'), flags("--scales")).scales == ()


@pytest.mark.parametrize("name", [name for name, default in FIELDS.items() if isinstance(default, bool)])
def test_a_switch_may_be_turned_on_and_off(run_file, name):
    flag = name.replace("_", "-")
    assert getattr(read_config(run_file(f"{name} = true"), flags()), name)
    assert not getattr(read_config(run_file(f"{name} = true"), flags(f"--no-{flag}")), name)
    assert getattr(read_config(run_file(""), flags(f"--{flag}")), name)


@pytest.mark.parametrize(
    ("settings", "rows", "schedule"),
    [
        ({"steps": 7, "warmup": 3}, 1000, (7, 3)),
        ({"steps": 7, "epochs": 50.0, "warmup": 3}, 1000, (7, 3)),  # steps go first
        ({"epochs": 2.0, "batch_size": 10, "warmup": 3}, 100, (20, 3)),
        ({"epochs": 2.0, "batch_size": 10, "warmup": 3}, 101, (21, 3)),  # no row is left out
        ({"epochs": 0.5, "batch_size": 10, "warmup": 3}, 100, (5, 3)),
        ({"epochs": 0.001, "batch_size": 10, "warmup": 3}, 100, (1, 3)),
        ({"epochs": 5.0, "batch_size": 64, "warmup": 0, "warmup_epochs": 2.0}, 52_002, (4063, 1625)),  # the paper's
        ({"steps": 7, "warmup": 0}, 1000, (7, 0)),
    ],
)
def test_steps_and_warm_up_come_from_epochs_where_they_are_not_given(settings, rows, schedule):
    assert RunConfig(**settings).schedule(rows) == schedule


def test_every_field_is_documented_and_has_a_flag_that_says_so():
    assert set(descriptions()) == set(FIELDS)
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=400))
    add_overrides(parser)
    help_text = parser.format_help()
    for name, said in descriptions().items():
        assert f"--{name.replace('_', '-')} " in help_text
        assert said in help_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step = 5", "unknown step"),
        ('lr = "3e-3"', "lr must be a number, got '3e-3'"),
        ("lr = true", "lr must be a number, got True"),
        ("lr = nan", "lr must be a number, got nan"),
        ("clip = inf", "clip must be a number, got inf"),
        ("lr = [1e-3]", "lr must be a number"),
        ("steps = 3.0", "steps must be a whole number, got 3.0"),
        ("steps = true", "steps must be a whole number, got True"),
        ('batch_size = "8"', "batch_size must be a whole number"),
        ("llama = 7", "llama must be text, got 7"),
        ("licence = 2024-01-01", "licence must be text"),
        ("[llama]\nname = 'x'", "llama must be text"),
        ('scales = "final"', "scales must be a list of texts, got 'final'"),
        ("scales = [1, 2]", "scales must be a list of texts, got (1, 2)"),
        ("steps = -1", "steps must not be negative, got -1"),
        ("epochs = -0.5", "epochs must not be negative"),
        ("epochs = 0", "steps and epochs are both 0; set one of them"),
        ("layers = 0", "layers must be at least 1"),
        ("prompt_length = 0", "prompt_length must be at least 1"),
        ("batch_size = -1", "batch_size must be at least 1"),
        ("views = 0", "views must be at least 1"),
        ("eval_every = 0", "eval_every must be at least 1"),
        ("save_every = 0", "save_every must be at least 1"),
        ("projection_width = 0", "projection_width must be at least 1"),
        ("max_tokens = 1", "max_tokens must be at least 2"),
        ("keep = 0", "keep must be at least 1"),
        ("pool = 0", "pool must be at least 1"),
        ("validation_rows = 0", "validation_rows must be at least 1"),
        ("beams = 0", "beams must be at least 1"),
        ("dropout = 1", "dropout must be in [0, 1)"),
        ("feature_dropout = -0.1", "feature_dropout must be in [0, 1)"),
        ("label_smoothing = 1.0", "label_smoothing must be in [0, 1)"),
        ("ema = 1.0", "ema must be in [0, 1)"),
        ("beta1 = 1.0", "beta1 must be in [0, 1)"),
        ("beta2 = 2", "beta2 must be in [0, 1)"),
        ("seed = -1", "seed must not be negative"),
        ("lr = -1e-3", "lr must not be negative, got -0.001"),
        ("gate_lr = -1", "gate_lr must not be negative"),
        ("weight_decay = -1", "weight_decay must not be negative"),
        ("warmup = -1", "warmup must not be negative"),
        ("warmup_epochs = -1", "warmup_epochs must not be negative"),
        ("batch_tokens = -1", "batch_tokens must not be negative"),
        ("held_out = -1", "held_out must not be negative"),
        ("length_penalty = 'long'", "length_penalty must be a number"),
        ("scale_lr = 1", "scale_lr must be true or false, got 1"),
        ('shard = "no"', "shard must be true or false, got 'no'"),
        ("clip = -1", "clip must not be negative"),
        ("prompt_std = -1", "prompt_std must not be negative"),
        ("image_size = -1", "image_size must not be negative"),
        ('gate = "sigmoid"', "gate must be one of tanh, identity, scalar, got 'sigmoid'"),
        ('resize = "pad"', "resize must be"),
        ('template = "mine"', "no prompt template 'mine'"),
        ('dtype = "float16"', "dtype must be float32 or bfloat16, got 'float16'"),
        ('decay = "none"', "decay must be projection or all, got 'none'"),
        ('ship = "first"', "ship must be last or best, got 'first'"),
        ('answer_form = "index"', "answer_form must be letter or text, got 'index'"),
        ('tune = "bias"', "tune must be"),
        ("lr == 3", "line 1"),
        ("lr = 1\nlr = 2", "Cannot overwrite a value"),
    ],
)
def test_a_wrong_run_file_is_an_error_of_one_line_that_names_file_and_key(run_file, text, expected):
    """Guards against settings that are taken as they come: steps of 3.0, or the letters of "final" as five scales."""
    path = run_file(text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked below
        read_config(path, {})
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_a_file_that_is_not_text_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "picture.toml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.toml: "):
        read_config(path, {})


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no run file") as raised:
        read_config(path, {})
    assert str(path) in str(raised.value)


def test_a_wrong_flag_is_not_blamed_on_the_file(run_file):
    path = run_file("steps = 20")
    with pytest.raises(ValueError, match=r"^lr must not be negative, got -1\.0$"):
        read_config(path, flags("--lr", "-1"))


def test_a_flag_of_the_wrong_kind_is_misuse(capsys):
    with pytest.raises(SystemExit) as exited:
        flags("--steps", "many")
    assert exited.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_an_unknown_flag_is_misuse(capsys):
    with pytest.raises(SystemExit) as exited:
        flags("--step-size", "1")
    assert exited.value.code == 2
    assert "--step-size" in capsys.readouterr().err
