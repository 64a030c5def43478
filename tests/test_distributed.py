"""Several processes train as one does: under torchrun, on the CPU, over gloo.

Each start costs seconds (a launcher and two processes import torch), so that there are few, with several assertions
each. What needs no second process is tested at the end without one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_training import ROOT, log_of

from mmadapter.data import passes
from training import alpaca, processes
from training.engine import Trainer
from training.processes import Processes, ended, joined, naming_errors, noted_signals

SCRIPT = Path(__file__).with_name("distributed_run.py")
SECONDS = 600  # far more than a start on a busy machine takes: a run that hangs fails here
V2 = ("--tune", "prompts+bias+scale+norm")


@dataclass(frozen=True)
class World:
    """Files to train from, and two runs by one process: `plain`, and `tuned`, which tunes the base as V2 does."""

    folder: Path
    plain: Path
    tuned: Path
    passes: int  # forward passes of the longest step of `plain`, and of what two processes make of it
    passes_of_two: int

    def argv(self, out: Path, *options: str) -> list[str]:
        files = ["--config", str(self.folder / "run.toml"), "--data", str(self.folder / "rows.jsonl")]
        return [*files, "--out", str(out), *options]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    names = [f"{number}.png" for number in range(8)]
    tiny_training.write_pictures(folder / "images", names)
    rows = [
        {
            "instruction": f"Say what comes {'after ' * (number % 7)}{number}.",
            "output": f"It is {'so ' * (number % 5)}.",
        }
        for number in range(24)
    ]
    for number, name in enumerate(names):  # some rows have a picture, and most passes none
        rows[3 * number]["image"] = name
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_training.write_run_file(
        folder / "run.toml",
        llama=str(tiny_training.write_llama(folder / "llama")),
        vision=tiny_training.encoder_spec(folder),
        template="alpaca",
        gate_init=0.3,
        prompt_std=1.0,
        views=1,
        dropout=0.0,
        feature_dropout=0.0,
        label_smoothing=0.1,
        batch_size=8,
        batch_tokens=220,
        steps=6,
        save_every=2,
        keep=9,
        held_out=5,
    )
    made, longest = World(folder, folder / "plain", folder / "tuned", 0, 0), [0, 0]
    accumulate = Trainer.accumulate

    def counted(self: Trainer, rows):
        lengths = [len(row.tokens) for row in rows]
        for place, count in enumerate((1, 2)):
            longest[place] = max(longest[place], len(passes(lengths, self.config.batch_tokens, 0, count)))
        return accumulate(self, rows)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMADAPTER_CACHE", str(folder / "cache"))
        patch.setattr(Trainer, "accumulate", counted)
        torch.set_num_threads(1)  # as torchrun's: another number rounds otherwise, before anything is exchanged
        assert alpaca.main(made.argv(made.plain)) == 0
        assert alpaca.main(made.argv(made.tuned, *V2)) == 0
        torch.set_num_threads(threads)
    return World(folder, made.plain, made.tuned, *longest)


@dataclass
class Job:
    """One torchrun, started in a folder of its own; it ends with the test."""

    process: subprocess.Popen
    folder: Path

    def status(self) -> int:
        return self.process.wait(SECONDS)

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text().replace("\r", "\n")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def torchrun(tmp_path):
    """Starts torchrun with options and a command."""
    jobs = []

    def start(*command: object, name: str = "job") -> Job:
        folder = tmp_path / name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MMADAPTER_CACHE": str(tmp_path / f"{name}-cache")}
        environment["PYTHONPATH"] = str(ROOT)
        with (folder / "out.txt").open("wb") as out, (folder / "err.txt").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *map(str, command)],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
            )
        jobs.append(Job(process, folder))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
            job.process.wait(SECONDS)


def one_node() -> list[str]:
    return ["--standalone", "--nproc-per-node", "2"]


def two_nodes(rank: int, port: int) -> list[str]:
    nodes = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
    return [*nodes, "--master-addr", "127.0.0.1", "--master-port", str(port)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def figures(out: Path) -> dict[str, float]:
    """What the log says of each step, once: the losses, and the gradient's norm, for AdamW does not see its scale."""
    keys = ("loss", "val_loss", "grad_norm", "lr")
    lines = [(f"{key} {line['step']}", line[key]) for line in log_of(out) for key in keys if key in line]
    assert len(dict(lines)) == len(lines)
    return dict(lines)


def assert_same_run(out: Path, reference: Path) -> None:
    """Losses and gradients agree to 1e-5, and the adapters are alike."""
    expected = figures(reference)
    assert expected.keys() >= {f"loss {step}" for step in range(1, 7)} | {f"val_loss {step}" for step in (0, 2, 4, 6)}
    assert figures(out) == pytest.approx(expected, rel=0, abs=1e-5)
    found, wanted = (load_file(folder / "adapter.safetensors") for folder in (out, reference))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3, msg=name)


def ended_early(out: Path, reference: Path, step: int) -> None:
    """Makes `out` the folder of the run `reference` as it was when it had saved that step."""
    if out != reference:
        shutil.copytree(reference, out)
    (out / "adapter.safetensors").unlink()
    for path in out.glob("checkpoint-*.pt"):
        if path.name > f"checkpoint-{step:06}.pt":
            path.unlink()


def test_two_processes_take_the_steps_of_one(world, torchrun, tmp_path):
    """Over several passes a step, pictures in some; one process writes, speaks and computes the features."""
    assert world.passes > world.passes_of_two > 1, "the test must accumulate"
    out = tmp_path / "run"
    job = torchrun(*one_node(), "-m", "training.alpaca", *world.argv(out))
    assert job.status() == 0, job.err
    assert_same_run(out, world.plain)
    assert {path.name for path in out.iterdir()} == {path.name for path in world.plain.iterdir()}
    said = [line.partition(":")[0] for line in job.out.splitlines()]
    assert said[:-1] == [f"step {step}" for step in (0, 2, 4, 6)]
    assert said[-1].startswith("validation loss")
    # A bar for the features of the pictures that are learnt, and one for those of the others.
    assert job.err.count("image features, view 1/1:   0%") == 2
    assert "FutureWarning" not in job.err

    # What two processes began, one goes on with.
    ended_early(out, out, step=4)
    assert alpaca.main(world.argv(out)) == 0
    assert_same_run(out, world.plain)
    assert [(line["event"], line["processes"]) for line in log_of(out) if "event" in line] == [
        ("start", 2),
        ("resume", 1),
    ]


def test_two_nodes_take_the_steps_of_one_process(world, torchrun, tmp_path):
    """A run that one process began; the second machine neither sees its folder nor writes one."""
    port, out = free_port(), tmp_path / "run"
    ended_early(out, world.plain, step=2)
    outs = (out, tmp_path / "elsewhere")
    jobs = [
        torchrun(*two_nodes(rank, port), "-m", "training.alpaca", *world.argv(outs[rank]), name=f"node{rank}")
        for rank in (0, 1)
    ]
    assert [job.status() for job in jobs] == [0, 0], jobs[0].err + jobs[1].err
    assert_same_run(out, world.plain)
    assert [(line["event"], line["processes"]) for line in log_of(out) if "event" in line] == [
        ("start", 1),
        ("resume", 2),
    ]
    assert not outs[1].exists()
    assert jobs[0].out.count("step 4:") == 1
    assert jobs[1].out == ""
    # Features are computed on each machine.
    assert [job.err.count("image features, view 1/1:   0%") for job in jobs] == [2, 2]


def test_a_spread_base_learns_the_same(world, torchrun, tmp_path):
    """FSDP2: with and without tuning and checkpointing, resumed, saved; each process holds half of the blocks.

    Guards against blocks that stay gathered: FSDP2 leaves what it takes for a root whole after its first forward pass,
    and blocks that it was not told a root of are all roots to it.
    """
    outs = [tmp_path / name for name in ("spread", "tuned", "resumed")]
    runs = [
        world.argv(outs[0], "--shard"),
        world.argv(outs[1], "--shard", "--checkpointing", *V2),
        world.argv(outs[2], "--shard", "--checkpointing"),
        world.argv(tmp_path / "dry", "--shard", "--dry-run"),
    ]
    ended_early(outs[2], world.plain, step=4)
    plan = {"runs": [runs], "records": str(tmp_path)}
    job = torchrun(*one_node(), SCRIPT, json.dumps(plan))
    assert job.status() == 0, job.err
    for out, reference in zip(outs, (world.plain, world.tuned, world.plain), strict=True):
        assert_same_run(out, reference)
        for rank in (0, 1):
            seen = json.loads((tmp_path / f"{out.name}-{rank}.json").read_text())
            assert seen["whole"] == 3 * (2 * 32 * 32 + 3 * 32 * 48 + 2 * 32)  # wq and wo, w1 to w3, two norms
            assert seen["spread"] == seen["whole"] / 2
            assert seen["kept"] == ["attention.wk.weight", "attention.wv.weight"]
            assert seen["copies"] == 0
    assert job.out.count("frozen ") == 1  # of the dry run, which all processes try and one tells
    assert not (tmp_path / "dry").exists()


def test_a_process_that_fails_in_a_step_ends_all(world, torchrun, tmp_path):
    plan = {"runs": [[world.argv(tmp_path / "run")]], "records": str(tmp_path), "fail": [1, 3]}
    job = torchrun(*one_node(), SCRIPT, json.dumps(plan))
    status = job.status()
    assert status != 0
    assert time.time() - float((tmp_path / "failed").read_text()) < 60
    assert "forcefully" not in job.err  # what torchrun says when it has to kill a process that does not end
    assert "error: process 1 of 2: the disk of a test is full" in job.errors
    others = [line for line in job.errors if "process 0" in line]
    assert all("lost the others" in line for line in others)
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_loss_that_is_none_names_its_rows_whichever_process_has_them(world, torchrun, tmp_path):
    """The first process speaks for all, and torchrun ends the one that knows the rows."""
    plan = {"runs": [[world.argv(tmp_path / "run")]], "records": str(tmp_path), "nan": [1, 3]}
    job = torchrun(*one_node(), SCRIPT, json.dumps(plan))
    assert job.status() != 0
    error = next(line for line in job.errors if line.startswith("error: process 0 of 2"))
    assert re.search(r"the loss is nan at step 3 in a batch of (\S*/)?rows\.jsonl, line \d+", error), error
    assert f"; the last good checkpoint is in {tmp_path / 'run'}; " in error


def test_a_bad_row_on_one_machine_ends_both(world, torchrun, tmp_path):
    """The first machine waits for the second, which cannot read its data."""
    other = tmp_path / "other"
    other.mkdir()
    lines = (world.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (other / "rows.jsonl").write_text("".join([*lines[:2], '{"instruction": "cut', *lines[3:]]))
    (other / "images").symlink_to(world.folder / "images")
    argv = [world.argv(tmp_path / "run") for _ in range(2)]
    argv[1][3] = str(other / "rows.jsonl")
    port = free_port()
    jobs = [
        torchrun(*two_nodes(rank, port), "-m", "training.alpaca", *argv[rank], name=f"node{rank}") for rank in (0, 1)
    ]
    assert all(job.status() for job in jobs)
    (error,) = jobs[1].errors
    assert re.match(r"error: process 1 of 2: 1 bad row: (.*/)?rows\.jsonl, line 3", error), error
    (error,) = jobs[0].errors
    assert error.startswith("error: process 0 of 2: lost the others")
    assert not (tmp_path / "run").exists()


def test_other_rows_in_one_process_are_refused_and_said_once(world, torchrun, tmp_path):
    """Guards against processes that go through different rows: they would take other steps, or wait for ever."""
    lines = (world.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (world.folder / "fewer.jsonl").write_text("".join(lines[:-1]))
    argv = [world.argv(tmp_path / "run") for _ in range(2)]
    argv[1][3] = str(world.folder / "fewer.jsonl")
    job = torchrun(*one_node(), SCRIPT, json.dumps({"runs": [[each] for each in argv], "records": str(tmp_path)}))
    assert job.status() != 0
    assert job.errors == [
        "error: process 0 of 2: process 1 has other rows than process 0; give all machines the same files and options"
    ]


def test_sigterm_saves_and_all_stop_at_one_step(world, torchrun, tmp_path):
    """The launcher passes it on. A second one changes nothing: some schedulers send one to every process as well."""
    out = tmp_path / "run"
    options = ("--steps", "100000", "--save-every", "100000", "--eval-every", "100000")
    plan = {"runs": [[world.argv(out, *options)]], "records": str(tmp_path)}
    job = torchrun(*one_node(), SCRIPT, json.dumps(plan))
    log, end = out / "log.jsonl", time.monotonic() + SECONDS
    while not (log.is_file() and log.read_text().count('"loss"') > 2) and time.monotonic() < end:
        assert job.process.poll() is None, job.err
        time.sleep(0.1)
    job.process.send_signal(signal.SIGTERM)
    assert job.status() != 0
    seen = [json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in (0, 1)]
    steps = {line["step"] for line in log_of(out)}
    assert [each["stopped"] for each in seen] == [signal.SIGTERM, signal.SIGTERM]
    assert [each["step"] for each in seen] == [max(steps), max(steps)]
    assert [path.name for path in out.glob("checkpoint-*.pt")] == [f"checkpoint-{max(steps):06}.pt"]
    assert job.out.splitlines()[-1].startswith(f"stopped at step {max(steps)} of 100000")
    assert not job.errors


# -------------------------------------------------------------------------------------- without a second process


@pytest.fixture
def gpus(monkeypatch):
    """A machine of four GPUs, and the one that a process chose."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_own_number(name, gpus, monkeypatch):
    """Guards against `device = "cuda"` putting all processes on the first GPU."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with joined(name) as (alone, device):
        assert device == torch.device("cuda:3")
    assert gpus == [torch.device("cuda:3")]
    assert alone == Processes()


@pytest.mark.parametrize(
    ("name", "rank", "count", "error"),
    [
        ("cuda:1", 0, 2, "2 processes of this machine cannot share cuda:1; give --device auto"),
        ("auto", 4, 8, "there is no device cuda:4: torch sees 4 GPUs; start at most 4 processes on this machine"),
        ("cuda:9", 0, 1, "there is no device cuda:9: torch sees 4 GPUs; give --device cpu"),
        ("abacus", 0, 1, "there is no device 'abacus'; give auto, cpu, cuda or cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name, rank, count, error, gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"), joined(name):
        pass


def test_on_gpus_what_lies_on_the_cpu_goes_over_gloo(gpus, monkeypatch):
    """Guards against sums of CPU tensors over NCCL, which takes none, and against its time limit in a long wait."""
    calls = []
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)

    class Fake:
        DistError = processes.dist.DistError
        get_rank, get_world_size = staticmethod(lambda: 2), staticmethod(lambda: 4)
        is_initialized = staticmethod(lambda: False)

        @staticmethod
        def init_process_group(backend, timeout):
            calls.append((backend, timeout))

        @staticmethod
        def new_group(backend, timeout):
            calls.append((backend, timeout))
            return "between CPUs"

        @staticmethod
        def all_reduce(values, group):
            assert (values.device.type, values.dtype, group) == ("cpu", torch.float64, "between CPUs")
            values.mul_(4)

        @staticmethod
        def barrier(group):
            assert group == "between CPUs"

        @staticmethod
        def destroy_process_group():
            calls.append("left")

    monkeypatch.setattr(processes, "dist", Fake)
    with joined("auto") as (found, device):
        assert device == torch.device("cuda:2")
        assert (found.rank, found.count, found.local_rank, found.is_first) == (2, 4, 2, False)
        values = torch.tensor([1.5, 2.0])
        assert found.sum(values) == [6.0, 8.0]
        assert values.tolist() == [1.5, 2.0]
        found.wait()
    assert calls == [("nccl", processes.STEP), ("gloo", processes.PREPARATION), "left"]
    calls.clear()
    with pytest.raises(KeyError), joined("auto"):
        raise KeyError  # to leave would be to wait for the others
    assert "left" not in calls


def test_one_process_needs_no_other():
    alone = Processes()
    alone.wait()
    alone.require_same("rows", [1])
    with alone.in_turn():
        assert alone.sum(torch.tensor([0.1], dtype=torch.float32)) == torch.tensor([0.1]).tolist()
    assert (alone.of_first("mine"), alone.once_a_machine(lambda: "made")) == ("mine", "made")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("a bad row"), ValueError, "process 1 of 2: a bad row"),
        (FileNotFoundError("no rows.json"), ValueError, "process 1 of 2: no rows.json"),
        (FloatingPointError("the loss is nan"), ValueError, "process 1 of 2: the loss is nan"),
        (KeyError("x"), RuntimeError, "process 1 of 2: KeyError: 'x'"),
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:5. Good luck!\nand more"),
            ConnectionError,
            "process 1 of 2: lost the others (Connection closed by peer [::1]:5); another process says why",
        ),
    ],
)
def test_an_error_says_which_process_it_is_of(error, kind, text, monkeypatch):
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    with pytest.raises(type(error)) as raised, naming_errors():
        raise error
    assert raised.value is error
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(kind) as raised, naming_errors():
        raise error
    assert (str(raised.value), raised.value.__cause__, slept) == (text, error, [processes.FIRST_SPEAKS])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(kind), naming_errors():
        raise error
    assert len(slept) == 1


def test_a_process_that_failed_among_others_does_not_wait_for_them(monkeypatch, capsys):
    """Guards against an orderly end of Python, in which NCCL waits for processes that wait for this one."""

    def fail() -> int:
        raise KeyError("of a step")

    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    assert ended(lambda: 1) == 1
    with pytest.raises(KeyError):
        ended(fail)
    assert left == []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    ended(lambda: 0)
    assert left == []
    ended(lambda: 3)
    ended(fail)
    assert left == [3, 1]
    assert "KeyError: 'of a step'" in capsys.readouterr().err


def test_a_second_ctrl_c_acts_at_once_and_a_second_sigterm_changes_nothing():
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with noted_signals() as asked:
        assert asked == {}
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert asked == {"signal": signal.SIGTERM}
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before
