"""A run goes on as if nothing had happened: after a kill at any moment, a signal, an accident, a full disk."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_engine import all_tensors, different, rows, trainer
from tiny_training import log_of, story

from mmadapter import record
from mmadapter.data import Example
from training import engine
from training.engine import Trainer, checkpoints


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


def interrupt_at(run: Trainer, step: int, act: Callable[[], object]) -> Trainer:
    """Has something happen to the run within a step."""
    take = run._step

    def watched(examples: list[Example], stop: bool) -> dict[str, float]:
        if run.step == step:
            act()
        return take(examples, stop)

    run._step = watched
    return run


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("kills", [[1], [2], [5], [8], [3, 4, 7]], ids=str)
def test_a_resumed_run_ends_bit_identical_to_one_never_killed(tmp_path, kills):
    """Dropout, random views, EMA, momentum, schedule and the order of rows go on as if nothing had happened.

    The new process starts from other random weights, so that nothing but the checkpoint can bring the old ones back;
    before there is one, it draws the same, as the run file's seed has it.
    """

    def kill() -> None:
        raise Killed

    whole = trainer(tmp_path / "whole")
    loss = whole.train()
    for number, step in enumerate(kills):
        with pytest.raises(Killed):
            interrupt_at(trainer(tmp_path / "killed", start=number if kills[0] > 1 else 0), step, kill).train()
        torch.rand(7)
    resumed = trainer(tmp_path / "killed", start=50 if kills[0] > 1 else 0)
    assert resumed.train() == loss
    assert resumed.step == whole.step == 9
    assert not different(all_tensors(whole), all_tensors(resumed))
    assert not different(whole.kept_state(), resumed.kept_state())
    assert story(tmp_path / "killed") == story(tmp_path / "whole")
    events = [(line["event"], line["step"]) for line in log_of(tmp_path / "killed") if "event" in line]
    first = [("start", 0)] if kills[0] > 1 else []
    assert events == first + [("resume" if step > 1 else "start", step // 2 * 2) for step in kills]


def test_another_seed_trains_otherwise(tmp_path):
    """The comparison above must be able to fail."""
    runs = [trainer(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for run in runs:
        run.train()
    assert different(all_tensors(runs[0]), all_tensors(runs[1]))
    assert story(tmp_path / "0")[2:] != story(tmp_path / "1")[2:]


SHORT = {"steps": 2, "save_every": 1, "eval_every": 1, "warmup": 1}  # every kind of write, and most of them twice


def die_at(moment: int) -> None:
    """Has this process kill itself at its write number `moment` to the disk: before it, half way or after it."""
    count = itertools.count()

    def perhaps(half: Callable[[], object] = lambda: None) -> None:
        if next(count) == moment:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    save, replace, unlink, log = torch.save, os.replace, Path.unlink, Trainer._log

    def dying_save(state: dict, path: Path) -> None:
        perhaps(lambda: path.write_bytes(b"half"))
        save(state, path)

    def dying_replace(source: Path, target: Path) -> None:
        perhaps()
        replace(source, target)
        perhaps()

    def dying_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            perhaps()
        unlink(path, missing_ok)

    def dying_log(run: Trainer, line: dict) -> None:
        def half() -> None:
            with (run.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line)[:30])

        perhaps(half)
        log(run, line)

    engine.torch.save, record.os.replace, Path.unlink, Trainer._log = dying_save, dying_replace, dying_unlink, dying_log


def trained_until_killed(folder: Path, moment: int, said: Path) -> bool:
    """Trains in a process of its own, which SIGKILL ends at that moment. Returns whether it came to that."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            torch.set_num_threads(1)
            die_at(moment)
            trainer(folder, **SHORT).train()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        assert os.WTERMSIG(ended) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(ended) == 0, said.read_text()
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_killed_at_any_write_ends_bit_identical_to_one_never_killed(tmp_path):
    """Log, checkpoint and best weights are written one after the other: a kill between two of them must leave nothing
    that a resumed run takes for its own, logs twice or stumbles over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed processes have
    whole = trainer(tmp_path / "whole", **SHORT)
    loss = whole.train()
    moment = 0
    try:
        while trained_until_killed(folder := tmp_path / f"killed-{moment}", moment, tmp_path / "said"):
            resumed = trainer(folder, **SHORT)
            assert resumed.train() == loss, moment
            assert not different(all_tensors(whole), all_tensors(resumed)), moment
            assert files_of(folder) == files_of(tmp_path / "whole"), moment
            best, other = (torch.load(path / "best.pt", weights_only=True) for path in (tmp_path / "whole", folder))
            assert best["step"] == other["step"]
            assert not different(best["adapter"], other["adapter"]), moment
            assert story(folder) == story(tmp_path / "whole"), moment
            moment += 1
    finally:
        torch.set_num_threads(threads)
    assert moment > 15, "there were fewer writes than a run has"


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(tmp_path, kind):
    whole = trainer(tmp_path / "whole", save_every=100)
    whole.train()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stopped = interrupt_at(trainer(tmp_path / "stopped", save_every=100), 3, lambda: os.kill(os.getpid(), kind))
    assert stopped.train() is None
    assert stopped.stopped == kind
    assert stopped.step in (4, 5), "the step at hand, or the next one"
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == [f"checkpoint-{stopped.step:06}.pt"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers

    resumed = trainer(tmp_path / "stopped", start=1, save_every=100)
    resumed.train()
    assert resumed.stopped is None
    assert not different(all_tensors(whole), all_tensors(resumed))
    assert story(tmp_path / "stopped") == story(tmp_path / "whole")


def test_the_second_ctrl_c_acts_at_once(tmp_path):
    """A step of a large model takes minutes, and whoever presses again does not want to wait for it."""
    run = trainer(tmp_path, save_every=100)

    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt_at(run, 3, press_twice).train()
    assert run.step == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_is_too_late(tmp_path):
    run = interrupt_at(trainer(tmp_path), 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run.train() is not None
    assert run.step == 9


def test_a_run_outside_the_main_thread_trains(tmp_path):
    """Only the main thread may have signal handlers; a notebook or a server has others."""
    run, losses = trainer(tmp_path, steps=2), []
    thread = threading.Thread(target=lambda: losses.append(run.train()))
    thread.start()
    thread.join()
    assert losses == [log_of(tmp_path)[-1]["val_loss"]]


# ------------------------------------------------------------------------------------------------------- not a number


def nan_loss_at(run: Trainer, step: int) -> None:
    """The loss of the forward pass with row 7 is none."""
    loss_of = run.loss_of

    def broken(examples: list[Example], *rest: object, **options: object) -> torch.Tensor:
        loss = loss_of(examples, *rest, **options)
        return loss * math.nan if run.step == step and rows(40)[7] in examples else loss

    run.loss_of = broken


def nan_gradient_at(run: Trainer, step: int) -> None:
    """A finite loss whose gradient is not: what a square root at zero, or an overflow in bfloat16, does."""
    run.adapter.prompt.register_hook(lambda gradient: gradient * math.inf if run.step == step else gradient)


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(("breaks", "what"), [(nan_loss_at, "loss is nan"), (nan_gradient_at, "gradient's norm is")])
def test_a_number_that_is_none_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, breaks, what, clip):
    """With checks on the loss alone, a bad gradient makes every weight NaN, and step 6 saves them as the last good."""
    settings = {"clip": clip, "batch_tokens": 0, "batch_size": 40}  # row 7 is in every batch
    run = trainer(tmp_path, **settings)
    breaks(run, 5)
    with pytest.raises(
        FloatingPointError, match=rf"the {what} .*at step 5 in a batch of row \d+, .*, \.\.\.; "
    ) as raised:
        run.train()
    assert f"the last good checkpoint is in {tmp_path}" in str(raised.value)
    assert "\n" not in str(raised.value)
    (path,) = checkpoints(tmp_path)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in [*state["adapter"].values(), *state["mean"].values()])
    assert all(tensor.isfinite().all() for tensor in all_tensors(run).values())
    # What was wrong is mended: the run goes on, and ends where one without the accident ends.
    resumed, whole = trainer(tmp_path, **settings), trainer(tmp_path / "whole", **settings)
    resumed.train()
    whole.train()
    assert not different(all_tensors(resumed), all_tensors(whole))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_rows_of_the_pass_that_broke_are_named_and_no_others(tmp_path, value):
    run = trainer(tmp_path, batch_size=40, batch_tokens=1)  # a pass of its own for each row
    loss_of = run.loss_of
    run.loss_of = lambda examples, *rest, **options: (
        loss_of(examples, *rest, **options) * (value if rows(40)[7] in examples else 1.0)
    )
    with pytest.raises(
        FloatingPointError, match=rf"the loss is {value} at step 0 in a batch of row 7; there is no check"
    ):
        run.train()


def test_a_validation_loss_that_is_none_stops_the_run_before_it_is_saved(tmp_path):
    """One step from a finite loss may leave weights without one: they are neither the last good checkpoint nor an
    adapter to ship."""
    run = trainer(tmp_path, save_every=1, eval_every=3)
    loss_of = run.loss_of
    broken = rows(5, seed=1)[2]
    run.loss_of = lambda examples, generator, **options: (
        loss_of(examples, generator, **options) * (math.nan if run.step == 6 and broken in examples else 1.0)
    )
    with pytest.raises(FloatingPointError, match=r"the validation loss is nan at step 6 in a batch of row \d"):
        run.train()
    (path,) = checkpoints(tmp_path)
    assert path.name == "checkpoint-000005.pt"
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] <= 3
    assert not any("NaN" in line for line in (tmp_path / "log.jsonl").read_text().splitlines())


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [8, 9]), (100, [2, 4, 6, 8, 9])])
def test_the_last_checkpoints_and_the_best_weights_are_kept(tmp_path, keep, kept):
    run = trainer(tmp_path, keep=keep)
    run.train()
    assert files_of(tmp_path) == ["best.pt", *(f"checkpoint-{step:06}.pt" for step in kept), "log.jsonl"]
    losses = {line["step"]: line["val_loss"] for line in log_of(tmp_path) if "val_loss" in line}
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert losses[best["step"]] == best["val_loss"] == min(losses.values())
    assert run.best == {"step": best["step"], "val_loss": best["val_loss"]}


def best_at_3(run: Trainer) -> Trainer:
    """A run whose loss is lowest in the validation at step 3."""
    loss_of, factor = run.loss_of, {0: 2.0, 3: 1.0, 6: 3.0, 9: 2.5}
    run.loss_of = lambda examples, generator, **options: (
        loss_of(examples, generator, **options) * (factor[run.step] if generator is None else 1.0)
    )
    return run


def test_the_best_weights_are_those_that_were_validated(tmp_path):
    """With a running mean they are not those that train; nor are they the last ones."""
    run = best_at_3(trainer(tmp_path, ship="best"))
    run.train()
    step, state = run.shipped_state()
    assert step == 3
    run.adapter.load_state_dict(state)
    run.mean = {name: state[name] for name in run.mean}
    run.step = 3
    assert run._validate(log=False) == run.best["val_loss"]


def test_a_resumed_run_knows_its_best_weights(tmp_path):
    """Else the first validation of the new process takes their place, however bad."""
    with pytest.raises(OSError, match="no"):
        interrupt_at(best_at_3(trainer(tmp_path)), 5, lambda: os.stat(tmp_path / "no")).train()
    run = best_at_3(trainer(tmp_path, start=1))
    run.train()
    assert run.best["step"] == torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 3


def test_the_last_weights_are_shipped_unless_the_best_are_asked_for(tmp_path):
    run = trainer(tmp_path)
    run.train()
    step, state = run.shipped_state()
    assert step == 9
    assert not different(state, run.kept_state())


def test_the_latest_checkpoint_is_that_of_the_most_steps(tmp_path):
    """As texts, 1000000 comes before 999999: the run would go back for ever, and the newer one be deleted."""
    for step in (999_999, 1_000_000, 50):
        (tmp_path / f"checkpoint-{step:06}.pt").touch()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-000050.pt", "checkpoint-999999.pt", "checkpoint-1000000.pt"]


def test_a_finished_run_is_only_validated_again(tmp_path):
    first = trainer(tmp_path)
    loss = first.train()
    again = trainer(tmp_path, start=1)
    assert again.train() == loss
    assert not different(all_tensors(first), all_tensors(again))
    assert [line["event"] for line in log_of(tmp_path) if "event" in line] == ["start", "resume"]


def test_a_run_may_go_on_from_an_earlier_checkpoint(tmp_path):
    """Whose log, and whose best weights so far, are those of that time."""
    whole = trainer(tmp_path, keep=3)
    whole.train()
    said, best = story(tmp_path), torch.load(tmp_path / "best.pt", weights_only=True)
    for path in checkpoints(tmp_path)[1:]:
        path.unlink()
    again = trainer(tmp_path, start=1, keep=3)
    again.train()
    assert [line["step"] for line in log_of(tmp_path) if line.get("event") == "resume"] == [6]
    assert not different(all_tensors(whole), all_tensors(again))
    assert story(tmp_path) == said
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == best["step"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer(tmp_path, steps=2).train()
    before = (tmp_path / "checkpoint-000002.pt").read_bytes()
    message = r"checkpoint-000002\.pt was made with another steps, lr, ema; choose another --out"
    with pytest.raises(ValueError, match=message) as raised:
        trainer(tmp_path, steps=4, lr=0.5, ema=0.0).train()
    assert "\n" not in str(raised.value)
    assert (tmp_path / "checkpoint-000002.pt").read_bytes() == before


def test_a_checkpoint_from_before_a_setting_was_there_had_its_default(tmp_path):
    """Guards against a new setting, off by default, that makes every run begun before it useless."""
    with pytest.raises(Killed):
        interrupt_at(trainer(tmp_path), 5, lambda: (_ for _ in ()).throw(Killed)).train()
    (path,) = checkpoints(tmp_path)
    state = torch.load(path, weights_only=True)
    del state["config"]["whiten"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="was made with another whiten; choose another --out"):
        trainer(tmp_path, whiten=2).train()
    trainer(tmp_path).train()
    assert [line["step"] for line in log_of(tmp_path) if line.get("event") == "resume"] == [state["step"]]


def test_settings_that_do_not_change_what_is_learnt_may_change(tmp_path):
    """More memory, another machine, fewer checkpoints: no reason to begin anew."""
    with pytest.raises(Killed):
        interrupt_at(trainer(tmp_path), 5, lambda: (_ for _ in ()).throw(Killed)).train()
    free = {"batch_tokens": 0, "save_every": 4, "keep": 7, "ship": "best", "beams": 3, "checkpointing": True}
    resumed = trainer(tmp_path, **free)
    resumed.train()
    assert [line["step"] for line in log_of(tmp_path) if line.get("event") == "resume"] == [4]


@pytest.mark.parametrize("changes", [{"record": {"data_hash": "two"}}, {"train": rows(44)}])
def test_a_checkpoint_of_other_data_is_refused(tmp_path, changes):
    """Other rows are other steps, where they are counted in epochs."""
    settings = {"steps": 0, "epochs": 0.2, "record": {"data_hash": "one"}}
    trainer(tmp_path, **settings).train()
    trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-000002\.pt was made with other data; choose another --out"):
        trainer(tmp_path, **{**settings, **changes}).train()


def test_other_rows_of_the_same_files_are_refused(tmp_path):
    """A picture that came or went, or --skip-bad-rows, changes the rows, and perhaps no number of steps."""
    first = trainer(tmp_path, train=rows(40))
    first.train()
    checkpoint = checkpoints(tmp_path)[-1]
    fewer, other = rows(40)[:-1], [*rows(40)[:-1], replace(rows(40)[-1], image=0)]
    for changed in (fewer, other):
        with pytest.raises(ValueError, match=r"was made with other rows of the same files: .*; choose another --out"):
            trainer(tmp_path, train=changed).train()
    # A checkpoint that does not say its rows, as they did not at first, is taken as before.
    state = torch.load(checkpoint, weights_only=True)
    assert state.pop("rows_hash") == first.rows_hash
    torch.save(state, checkpoint)
    trainer(tmp_path, train=other).train()


def test_a_second_run_in_a_folder_waits_for_the_first(tmp_path):
    """Both would write one log and remove each other's checkpoints."""
    first = trainer(tmp_path)
    step, said = first._step, []

    def meanwhile(*arguments):
        if not said:
            with pytest.raises(ValueError, match="another process trains in ") as raised:
                trainer(tmp_path).train()
            said.append(str(raised.value))
        return step(*arguments)

    first._step = meanwhile
    first.train()
    assert said == [f"another process trains in {tmp_path}; wait until it ends, or choose another --out"]
    trainer(tmp_path).train()  # the first has ended


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"no checkpoint", lambda _: b""]
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, damage):
    trainer(tmp_path, steps=2).train()
    file = tmp_path / "checkpoint-000002.pt"
    file.write_bytes(damage(file.read_bytes()))
    expected = rf"^{re.escape(str(file))} cannot be read .*; delete it to go on from an earlier one$"
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, steps=2).train()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """A full disk must not take the last good checkpoint with it, nor leave half of one."""

    def full_disk(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = trainer(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        interrupt_at(run, 5, lambda: monkeypatch.setattr(engine.torch, "save", full_disk)).train()
    monkeypatch.undo()
    assert files_of(tmp_path) == ["best.pt", "checkpoint-000004.pt", "log.jsonl"]
    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path)
    whole.train()
    resumed.train()
    assert not different(all_tensors(whole), all_tensors(resumed))
