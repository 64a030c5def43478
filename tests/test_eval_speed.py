"""The speed measurement: turns and ratios, the laws, the peers, and every case of the command on tiny models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import tiny_session
import torch
from tiny_session import Tiny
from weight_files import write_gguf

from eval import speed as command
from eval import (
    speed_base,
    speed_captioning,
    speed_decoding,
    speed_growth,
    speed_laws,
    speed_peers,
    speed_start,
    speed_training,
)
from eval.speed_base import Base, Setting
from eval.speed_peers import Absent
from eval.speed_rounds import (
    Case,
    Comparison,
    Contender,
    Sample,
    Spread,
    Timed,
    compare,
    interleave,
    reached,
    record,
    table,
)
from eval.speed_start import Start
from mmadapter import cli
from mmadapter.config import LlamaConfig
from mmadapter.data import Example
from mmadapter.llama import Llama

ROOT = Path(__file__).resolve().parents[1]
ROW_TEXTS = ("a red dog", "a man stops", "a red dog runs on the grass and a man stops", "grass")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take a tiny model milliseconds; no process of its own, no search for garbage."""
    for module, name, value in (
        (speed_base, "MATRIX", {"cpu": 32}),
        (speed_base, "READ_BYTES", {"cpu": 1 << 12}),
        (speed_base, "LIMIT_SECONDS", 0.001),
        (speed_decoding, "START", 5),
        (speed_decoding, "NEW", 4),
        (speed_training, "ROWS", 2),
        (speed_training, "LENGTH", 9),
        (speed_training, "MAX_TOKENS", 96),
        (speed_training, "BATCH_TOKENS", 192),
        (speed_training, "STEP_ROWS", 4),
        (speed_training, "STEPS", 2),
        (speed_captioning, "BATCH", 7),
        (speed_captioning, "SINGLE", 2),
        (speed_captioning, "QUESTIONS", ("What is this?", "What runs?", "Who stops?")),
        (speed_captioning, "ANSWER_TOKENS", 2),
        (speed_growth, "PROMPTS", (4, 8)),
        (speed_growth, "BATCHES", (1, 3)),
        (speed_growth, "LENGTHS", (2, 5)),
        (speed_growth, "PROMPT_LENGTHS", (1, 4)),
        (speed_growth, "START", 4),
        (speed_growth, "STEPS", 2),
        (speed_growth, "LENGTH", 8),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(speed_base, "gc", types.SimpleNamespace(collect=lambda: 0))  # a third of a second each time
    monkeypatch.setattr(
        speed_training,
        "_memory_of",
        lambda setting, name: [
            Sample(name, quantity, 0, value) for quantity, value in speed_training.measure_memory(setting, name).items()
        ],
    )
    # A process that answers at once stands in for those that load a model; their commands are tested below.
    echo = "import sys; print('token 7 after 0.25')"
    monkeypatch.setattr(speed_start, "python", lambda *arguments: [sys.executable, "-S", "-c", echo])


def options(small: Tiny) -> list[str]:
    """A run on the tiny model."""
    model = ["--llama", str(small.llama), "--adapter", str(small.sees), "--dtype", "float32"]
    return [*model, "--images", str(small.pictures), "--rounds", "2", "--threads", "1"]


@pytest.fixture
def threads() -> None:
    """The command sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- Rounds and ratios.


def test_contenders_take_turns_after_a_warm_up_of_each() -> None:
    log = []

    def contender(name: str, seconds: float, **more: object) -> Contender:
        return Contender(name, lambda: (log.append(name), Timed(seconds, 6))[1], **more)

    pair = [contender("a", 2.0), contender("b", 3.0, warm=lambda: log.append("warm b"))]
    samples = interleave(pair, 3, "tokens/s")
    assert log == ["a", "warm b", "a", "b", "b", "a", "a", "b"]
    assert samples[0] == Sample("a", "tokens/s", 0, 3.0, 2.0, 6)
    assert samples[2] == Sample("b", "tokens/s", 1, 2.0, 3.0, 6)
    assert [sample.value for sample in interleave(pair, 1, "s")] == [2 / 6, 3 / 6]
    with pytest.raises(ValueError, match=r"^a case needs at least one round, got 0$"):
        interleave(pair, 0, "s")


def sampled(contender: str, *numbers: float, quantity: str = "tokens/s") -> list[Sample]:
    return [Sample(contender, quantity, place, number) for place, number in enumerate(numbers)]


def test_ratios_are_taken_within_a_round() -> None:
    """The load halves every speed in the second round: the ratio of the medians, 1.5, would be that of no round."""
    samples = sampled("ours", 200, 90, 300) + sampled("peer", 100, 60, 150) + sampled("peer", 7, quantity="MB")
    found = compare(samples, Comparison("ours", "peer", "tokens/s"))
    assert found == Spread(2.0, 1.5, 2.0)
    assert compare(samples, Comparison("ours", "peer", "MB")) is None
    assert compare(samples, Comparison("ours", "nobody", "tokens/s")) is None
    assert compare(samples[1:], Comparison("ours", "peer", "tokens/s")) == Spread(1.75, 1.5, 2.0)
    difference = Comparison("ours", "peer", "tokens/s", difference=True)
    assert compare(samples, difference) == Spread(100, 30, 150)
    assert difference.name == "ours - peer"


@pytest.mark.parametrize(
    ("aim", "at_most", "met"), [(2.0, False, True), (2.1, False, False), (2.0, True, True), (1.9, True, False)]
)
def test_aims_are_limits_of_the_median(aim: float, at_most: bool, met: bool) -> None:
    found = Spread(2.0, 1.0, 3.0)
    assert reached(Comparison("a", "b", "s", aim, at_most), found) is met
    assert reached(Comparison("a", "b", "s"), found) is None


def test_the_table_and_the_record_say_the_same() -> None:
    samples = sampled("ours", 2000, 1000) + sampled("a longer name", 10, 8) + sampled("ours", 0.25, quantity="s")
    case = Case(
        "training",
        "a step",
        samples,
        [Comparison("ours", "a longer name", "tokens/s", 300), Comparison("ours", "nobody", "s", 1)],
        {"peft": "the package peft is not installed"},
        {"dtype": "float32"},
        ["a note"],
    )
    lines = table(case).splitlines()
    assert lines[0] == "training: a step"
    assert lines[1].split() == ["tokens/s", "median", "lowest", "highest"]
    assert lines[2].split() == ["ours", "1,500", "1,000", "2,000"]
    assert lines[3].split() == ["a", "longer", "name", "9.00", "8.00", "10.00"]
    assert lines[4].split("  ")[-1] == "aim: at least 300, missed"
    assert lines[4].split()[5:8] == ["162.5", "125.0", "200.0"]
    assert lines[6].split() == ["ours", "0.250", "0.250", "0.250"]
    assert lines[7:] == ["  a note", "  left out: peft: the package peft is not installed"]
    kept = json.loads(json.dumps(record(case)))
    assert kept["samples"][1] == dataclasses.asdict(samples[1])
    (ratio,) = kept["comparisons"]
    assert (ratio["median"], ratio["lowest"], ratio["highest"], ratio["met"]) == (162.5, 125.0, 200.0, False)
    assert (ratio["of"], ratio["to"], ratio["aim"]) == ("ours", "a longer name", 300)


# ---- Laws.


def test_operations_are_those_of_the_matrices() -> None:
    """Counted by torch itself, where the base is plain and attention is one matrix product after another."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = tiny.config()
    model = tiny.llama(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hidden(tiny.tokens(2, 16))
    causal = 2 * shape.layers * shape.heads * shape.head_width * 16**2 * 2  # we compute the masked half, too
    assert speed_laws.forward_flops(shape, 16, rows=2) == counter.get_total_flops() - causal


def test_a_step_of_the_default_base_costs_four_operations_a_weight() -> None:
    """Nothing of the base is trained, so the backward pass costs one forward pass, not two."""
    shape = LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, tied=True)
    weights = 30 * speed_laws.block_numbers(shape) + 49152 * 576
    assert weights == sum(p.numel() for name, p in meta_llama(shape).named_parameters() if "norm" not in name)
    flops = speed_laws.training_flops(shape, 128, 8, layers=30, prompt_length=10)
    assert 4 * weights < flops / 1024 < 4.2 * weights
    half = speed_laws.training_flops(shape, 128, 8, layers=15, prompt_length=10)
    assert 0.7 < half / flops < 0.85  # the forward pass and the logits stay
    assert speed_laws.training_flops(shape, 128, 8, 30, 11) - flops == 12 * 30 * 9 * 64 * 1024


def meta_llama(shape: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(shape)


def test_bytes_that_decoding_reads() -> None:
    shape = tiny.config()  # N = 3, G = 2, D = 10
    assert speed_laws.cache_bytes(shape, 5, item=2) == 2 * 3 * 2 * 10 * 5 * 2
    one = speed_laws.cache_bytes(shape, 1, item=2)
    # Three tokens after seven: they look at 8, 9 and 10 tokens; the weights are read once for both rows.
    assert speed_laws.decoding_bytes(shape, 1000.0, start=7, new=3, rows=2, item=2) == 3 * 1000 + 2 * 27 * one


def test_a_fit_finds_the_line_and_says_how_far_off_it_is() -> None:
    exact = speed_laws.fit([1, 2, 4], [5, 7, 11])
    assert (exact.offset, exact.scale, exact.r2, exact.worst) == pytest.approx((3, 2, 1, 0))
    assert exact.at(10) == pytest.approx(23)
    off = speed_laws.fit([0, 1, 2], [1, 4, 1])
    assert (off.offset, off.scale, off.r2) == pytest.approx((2, 0, 0))
    assert off.worst == pytest.approx(0.5)  # 2 of 4
    nothing = speed_laws.fit([0, 1], [0, 0])
    assert (nothing.r2, nothing.worst) == (1, 0)
    with pytest.raises(ValueError, match=r"^a line needs two different points at least, got 1$"):
        speed_laws.fit([2, 2], [3, 4])


# ---- The base, the clock, the memory.


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_read_are_counted_once(tied: bool) -> None:
    shape = tiny.config(tied=tied)
    model = tiny.llama(shape)
    total = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert speed_base.weight_bytes(model) == total - (0 if tied else 4 * shape.vocab_size * shape.width)


def test_a_random_base_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed_base.SHAPES, "tiny", tiny.config())
    setting = Setting(shape="tiny", dtype="bfloat16", seed=4)
    first, second = (Base(setting).session("bfloat16").llama for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.layers[0].attention.wq.weight.float().std() == pytest.approx(speed_base.STD, rel=0.2)
    assert first.norm.weight.eq(1).all()
    base = Base(setting)
    assert base.session("float32") is base.session("float32")
    with pytest.raises(ValueError, match=r"^random weights are in float32 or bfloat16, not in int4$"):
        base.session("int4")


@pytest.mark.skipif(speed_base.can_measure_memory("cpu") is not None, reason="needs Linux's /proc/self/clear_refs")
def test_the_peak_is_that_of_what_came_after() -> None:
    """A loader's garbage must not count as a step's memory."""
    before = torch.ones(64 << 20, dtype=torch.uint8)
    del before
    start = speed_base.reset_peak("cpu")
    held = torch.ones(32 << 20, dtype=torch.uint8)
    del held
    assert 31 << 20 < speed_base.peak("cpu") - start < 48 << 20


def test_memory_that_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed_base, "REFERENCES", tmp_path / "no" / "such")
    assert "Linux" in speed_base.can_measure_memory("cpu")
    assert speed_base.can_measure_memory("cuda:0") is None


def test_the_machine_s_limits_are_in_the_case_s_unit(quick: None) -> None:
    """Twice the operations or bytes a token are half the tokens: a slip of 2 here would halve every share."""
    setting = Setting()
    flops, size = 2.0 * 32**3, 1 << 12
    seconds, work = speed_base.arithmetic_limit(setting, "float32", flops / 4).run()
    assert seconds > 0
    assert work % 4 == 0
    seconds, work = speed_base.memory_limit(setting, size * 2).run()
    assert seconds > 0
    assert work % 0.5 == 0


# ---- Peers.


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"rope_divisors": (1.0, 2.0, 3.0, 4.0, 5.0)}])
def test_transformers_computes_on_our_tensors(changes: dict) -> None:
    model = tiny.llama(tiny.config(**changes))
    theirs = speed_peers.transformers_model(model)
    tokens = tiny.tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    held = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in theirs.parameters()} == held  # not a copy


def test_both_decode_the_same_tokens_and_as_many() -> None:
    model = tiny.llama()
    tokens = tiny.tokens(2, 6)
    mine, ours = speed_decoding.decode(model, tokens.tolist(), 5)
    other, theirs = speed_peers.decode_with_transformers(speed_peers.transformers_model(model), tokens, 5)
    assert ours == theirs
    assert [len(row) for row in ours] == [6, 6]  # the first, which is not timed, and five more
    assert mine.work == other.work == 10
    assert min(mine.seconds, other.seconds) > 0
    assert speed_decoding.agreement(ours, theirs) == 1
    assert speed_decoding.agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5


def test_peft_takes_a_base_of_plain_heads_only() -> None:
    with pytest.raises(Absent, match=r"^peft takes bases whose heads have the width C / H only$"):
        speed_peers.peft_model(tiny.llama(), 2, 3)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        speed_peers.importlib.util, "find_spec", lambda name, *more: None if name in names else plain(name, *more)
    )


def test_llama_cpp_is_timed_from_the_first_token_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    class Model:
        def __init__(self, **settings: object) -> None:
            asked.update(settings)

        def generate(self, tokens: list[int], **settings: object):
            asked.update(tokens=tokens, given=0, **settings)
            while True:
                asked["given"] += 1
                yield 5

    without(monkeypatch, "llama_cpp")
    with pytest.raises(Absent, match=r"^the package llama-cpp-python is not installed$"):
        speed_peers.llama_cpp_decoder(tmp_path / "base.gguf", 2, 40)
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Model))
    monkeypatch.setattr(speed_peers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(Absent, match=r"^llama\.cpp reads GGUF files only$"):
        speed_peers.llama_cpp_decoder(None, 2, 40)
    decode = speed_peers.llama_cpp_decoder(tmp_path / "base.gguf", 2, 40)
    assert decode([3, 4], 6).work == 6
    assert (asked["given"], asked["tokens"], asked["temp"]) == (7, [3, 4], 0.0)
    assert (asked["n_threads"], asked["n_threads_batch"], asked["n_ctx"]) == (2, 2, 40)


# ---- The parts of the cases.


def test_padding_changes_neither_rows_nor_targets(quick: None) -> None:
    rows = [Example(tuple(range(1, 1 + length)), 2) for length in (5, 90, 7, 30, 6)]
    grouped, padded = speed_training.grouped_passes(rows), speed_training.padded_passes(rows)
    for batches in (grouped, padded):
        assert sum(len(batch.tokens) for batch in batches) == 5
        assert sum(int((batch.labels >= 0).sum()) for batch in batches) == sum(len(row.tokens) - 2 for row in rows)
    assert {batch.tokens.shape[1] for batch in padded} == {96}
    assert sum(batch.tokens.numel() for batch in grouped) < 250
    assert torch.equal(padded[0].tokens[1, :90], torch.arange(1, 91))
    assert padded[0].labels[1, 90:].eq(-100).all()


def test_pictures_that_are_taken_again_are_others(small: Tiny, tmp_path: Path) -> None:
    """A session keeps features: copies of one picture would be encoded once."""
    paths = speed_captioning.gather_pictures(small.pictures, 12, tmp_path)
    assert paths[:5] == [str(small.picture(number)) for number in range(5)]
    contents = {speed_captioning.load_image(path).tobytes() for path in paths}
    assert len(contents) == 12
    assert speed_captioning.gather_pictures(small.pictures, 2, tmp_path) == paths[:2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no pictures in this folder .*; give a folder of pictures"):
        speed_captioning.gather_pictures(tmp_path / "empty", 2, tmp_path)


def test_a_picture_that_is_not_captioned_is_no_speed(small: Tiny, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    session = small.load(small.sees)
    with pytest.raises(ValueError, match=r"^1 of 2 pictures were captioned: .*broken\.png"):
        speed_captioning.caption_to_file(session, [str(small.picture(0)), str(broken)], tmp_path / "c.jsonl", 2)


def test_watching_leaves_the_session_as_it_was(small: Tiny) -> None:
    session = small.load(small.sees)
    seconds = dict.fromkeys(speed_captioning.STAGES, 0.0)
    with speed_captioning.watching(session, seconds):
        watched = session.caption([small.picture(0), small.picture(1)], max_new_tokens=3)
    assert all(value > 0 for value in seconds.values())
    assert "hidden" not in vars(session.llama)
    assert "features_of" not in vars(session.encoder)
    assert watched == small.load(small.sees).caption([small.picture(0), small.picture(1)], max_new_tokens=3)


def test_every_image_is_encoded_where_none_is_kept(small: Tiny, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """The count of encodings must be able to go wrong."""
    monkeypatch.setattr("mmadapter.session.KEPT_IMAGES", 0)
    assert speed_captioning.ask_all(small.load(small.sees), str(small.picture(0)))[1] == 3
    monkeypatch.setattr("mmadapter.session.KEPT_IMAGES", 4)
    assert speed_captioning.ask_all(small.load(small.sees), str(small.picture(0)))[1] == 1


def test_the_first_output_of_a_process() -> None:
    slow = "import time; print('x' * 9, flush=True); time.sleep(0.4); print('token 5'); print('end')"
    first = speed_start.first_output([sys.executable, "-S", "-c", slow], 1)
    later = speed_start.first_output([sys.executable, "-S", "-c", slow], 1, "token ")
    to_end = speed_start.first_output([sys.executable, "-S", "-c", slow], 1, to_end=True)
    assert first.line == "x"
    assert later.line == "token 5\n"
    assert first.seconds + 0.2 < later.seconds
    assert first.seconds + 0.2 < to_end.seconds
    assert 0 <= first.processor < 0.3  # it sleeps longer than that
    for program in ("raise SystemExit('no such file')", "import sys; print('no such file', file=sys.stderr)"):
        with pytest.raises(OSError, match=r"gave no first token: no such file$"):
            speed_start.first_output([sys.executable, "-S", "-c", program], 1, "token ")


def test_the_commands_of_the_start(small: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is one that the command line takes; theirs does load the folder and give a token."""
    started = []

    def first_output(arguments: list[str], threads: int, wanted: str = "", to_end: bool = False) -> Start:
        started.append(arguments)
        return Start(1.0, f"token 7 after {len(started)}", 0.5)

    monkeypatch.setattr(speed_start, "first_output", first_output)
    setting = Setting(llama=str(small.llama), dtype="float32", rounds=1)
    first, help_case = speed_start.start(setting, Base(setting))
    ours = next(arguments for arguments in started if "chat" in arguments)
    parsed = cli.build_parser().parse_args(ours[3:])
    assert (parsed.llama, parsed.dtype, parsed.device, parsed.max_new_tokens) == (str(small.llama), "float32", "cpu", 4)
    assert [s.value for s in first.samples if s.contender == speed_start.TOKENIZER] == [4]  # the second was the warm-up
    assert [s.value for s in help_case.samples if s.contender == speed_start.HELP] == 3 * [1.0] + 3 * [0.5]
    theirs = next(arguments for arguments in started if "transformers" in " ".join(arguments))
    program = tmp_path / "program.py"
    program.write_text(theirs[2])
    monkeypatch.setattr(sys, "argv", [str(program), *theirs[3:]])
    found = runpy.run_path(str(program))
    assert found["found"].shape[1] == found["tokens"]["input_ids"].shape[1] + 1
    assert found["model"].dtype == torch.float32


def test_what_transformers_reads(small: Tiny, tmp_path: Path) -> None:
    config = tiny_session.llama_config(60)
    write_gguf(tmp_path / "base.gguf", config)
    packed = Base(Setting(llama=str(tmp_path / "base.gguf")))
    assert packed.gguf == tmp_path / "base.gguf"
    assert speed_start._their_file(packed) == [str(tmp_path), "base.gguf"]
    folder = Base(Setting(llama=str(small.llama)))
    assert (folder.gguf, speed_start._their_file(folder)) == (None, [str(small.llama), ""])
    folder.path = tmp_path
    with pytest.raises(Absent, match=r"^transformers reads GGUF files and Hugging Face's folders only$"):
        speed_start._their_file(folder)


def test_the_memory_is_that_of_a_process_of_its_own(
    small: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def child(arguments: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        assert env["OMP_NUM_THREADS"] == "1"
        assert str(ROOT) in env["PYTHONPATH"]
        found = dict.fromkeys((speed_training.MEGABYTES, speed_training.STEP_MEGABYTES), 9.0)
        return subprocess.CompletedProcess(arguments, 0, f"something else\n{json.dumps(found)}\n", "")

    monkeypatch.setattr(speed_training.subprocess, "run", child)
    setting = Setting(llama=str(small.llama), dtype="float32")
    assert [sample.value for sample in speed_training._memory_of(setting, "ours")] == [9.0, 9.0]
    assert asked[0][1:3] == ["-m", "eval.speed_training"]
    monkeypatch.setattr(
        speed_training.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "a\nout of memory\n")
    )
    with pytest.raises(OSError, match=r"^the process that measures the memory of peft failed: out of memory$"):
        speed_training._memory_of(setting, "peft")
    if speed_base.can_measure_memory("cpu") is None:
        assert speed_training.main(asked[0][3:]) == 0
        found = json.loads(capsys.readouterr().out)
        assert 50 < found[speed_training.MEGABYTES] < 20_000
        assert found[speed_training.STEP_MEGABYTES] < found[speed_training.MEGABYTES]


# ---- The command.


def test_every_case_is_measured_and_recorded(
    small: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None, threads: None
) -> None:
    rows = [{"instruction": f"Say {text}", "input": "", "output": text} for text in ROW_TEXTS * 5]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "made" / "speed.json"
    assert command.main([*options(small), "--data", str(tmp_path / "rows.json"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert list(dict.fromkeys(case["name"] for case in found["cases"])) == list(command.CASES)
    for case in found["cases"]:
        assert f"{case['name']}: {case['title']}" in printed
        assert case["samples"]
        assert all(sample["value"] >= 0 for sample in case["samples"])
        for ratio in case["comparisons"]:
            samples = [Sample(**sample) for sample in case["samples"]]
            asked = Comparison(**{name: ratio[name] for name in ("of", "to", "quantity", "difference")})
            assert dataclasses.asdict(compare(samples, asked)) == {
                name: ratio[name] for name in ("median", "lowest", "highest")
            }
    cases = {case["name"]: case for case in found["cases"]}  # of growth the last
    losses = cases["training"]["facts"]["loss of the first step"]
    assert losses["ours"] == pytest.approx(losses["peft"], rel=1e-4)
    assert cases["decoding"]["facts"]["share of tokens that ours and transformers have alike"] == {"float32": 1.0}
    assert ratio_names(cases["decoding"]) == [
        "ours float32 / transformers float32",
        "ours float32 / limit of memory float32",
    ]
    assert ratio_names(cases["training"])[0] == "ours / peft"
    assert ratio_names(cases["rows"]) == ["by length / padded to 96"]
    assert cases["rows"]["facts"]["tokens padded to 96"] == 2 * 4 * 96
    encodings = [
        sample["value"] for sample in cases["questions"]["samples"] if sample["contender"] == "image encodings"
    ]
    assert encodings == [1.0, 1.0]
    assert cases["captions"]["facts"]["batch 7, ms a caption"]["encoder"] > 0
    assert [case["title"] for case in found["cases"][-5:]] == [
        f"with {name}, float32" for name in ("prompt length", "batch", "K", "L", "generated length")
    ]
    for facts in found["cases"][-1]["facts"].values():
        assert facts["sizes"] == [2, 5]
        assert facts["expected"] == pytest.approx(facts["measured"])  # a line meets two points
    assert found["settings"]["threads"] == 1
    assert torch.get_num_threads() == 1
    assert found["command"].startswith("python -m eval.speed --llama ")
    assert found["versions"]["peft"] is not None
    assert len(found["base_hash"]) == 64
    assert {"git_commit", "time", "machine", "seconds"} <= found.keys()


def test_growth_is_plotted(
    small: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, threads: None
) -> None:
    plain = speed_growth.curves
    monkeypatch.setattr(speed_growth, "curves", lambda *arguments: plain(*arguments)[-1:])
    assert command.main([*options(small), "--only", "growth", "--plots", str(tmp_path / "made")]) == 0
    (path,) = (tmp_path / "made").iterdir()
    assert path.name == "growth-generated-length.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def ratio_names(case: dict) -> list[str]:
    return [f"{ratio['of']} / {ratio['to']}" for ratio in case["comparisons"]]


def test_absent_peers_are_named_and_the_rest_goes_on(
    small: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    threads: None,
) -> None:
    without(monkeypatch, "transformers", "peft", "llama_cpp", "kernels")
    out = tmp_path / "speed.json"
    assert command.main([*options(small), "--only", "training", "decoding", "start", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "left out: peft: the package peft is not installed",
        "left out: transformers: the package transformers is not installed",
        "left out: llama.cpp: the package llama-cpp-python is not installed",
        "left out: transformers packed: the base is no GGUF file",
    ):
        assert f"  {line}\n" in printed
    cases = json.loads(out.read_text())["cases"]
    assert {sample["contender"] for sample in cases[0]["samples"]} == {"ours", "limit of arithmetic"}
    assert {sample["contender"] for sample in cases[1]["samples"]} == {"ours float32", "limit of memory float32"}
    assert ratio_names(cases[2]) == []


def test_number_formats_that_are_not_offered_are_named(
    small: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None, threads: None
) -> None:
    monkeypatch.setattr(speed_decoding, "DTYPES", ("auto", "float32", "int3"))
    without(monkeypatch, "transformers")
    arguments = options(small)
    arguments[arguments.index("--dtype") + 1] = "auto"
    assert command.main([*arguments, "--only", "decoding"]) == 0
    printed = capsys.readouterr().out
    assert "  ours float32 " in printed
    assert "  left out: ours int3: dtype must be one of " in printed


def test_a_random_base_of_a_shape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: None, threads: None
) -> None:
    monkeypatch.setitem(speed_base.SHAPES, "tiny", tiny.config())
    monkeypatch.setattr(speed_decoding, "BATCHES", {"cpu": (1, 3)})
    out = tmp_path / "speed.json"
    arguments = ["--shape", "tiny", "--dtype", "bfloat16", "--rounds", "1", "--threads", "1", "--json", str(out)]
    assert command.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [case["name"] for case in found["cases"]] == ["training", "decoding", "decoding", "adapter"] + 5 * ["growth"]
    assert found["left_out"].keys() == {"rows", "captions", "questions", "start"}
    assert (found["base"], "base_hash" in found) == ("tiny", False)
    printed = capsys.readouterr().out
    assert "decoding: decoding 3 streams, 4 tokens after 5, greedy" in printed
    assert "captions: left out: it needs a tokenizer or an image encoder" in printed
    assert "left out: peft: peft takes bases whose heads have the width C / H only" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "--rounds must be at least 1"),
        ("--threads 0", "--threads must be at least 1"),
        ("--only walking", "argument --only: invalid choice: 'walking'"),
        ("--only rows", "the case rows trains on real rows; give them with --data FILE"),
        ("--only decoding --plots x", "--plots shows the case growth; name it in --only"),
        ("--shape llama-7b --llama x", "--shape is a base of random weights; leave --llama out"),
        ("--shape llama-7b --adapter caption", "--shape is a base of random weights; leave --adapter out"),
        ("--shape llama-7b --only start", "the case start needs a base with a tokenizer; leave --shape out"),
        ("--adapter none", "--adapter names the adapter that is set beside the base; none is no adapter"),
    ],
)
def test_misuse_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments.split())
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data no-such.json", "there is no no-such.json; give one that is with --data FILE"),
        ("--images no-such", "there is no no-such; give one that is with --images DIR"),
        ("--json .", ". is a folder; give a file name"),
        ("--shape llama-8b", "no shape 'llama-8b'; there are llama-7b, llama-13b, llama-33b, llama-65b"),
        ("--device nowhere", "device 'nowhere' cannot be used: "),
        ("--llama no-such", "no LLaMA named 'no-such'"),
        ("--only rows --llama {llama} --data {few}", "{few} has 1 rows, and a step takes 8; give a longer file"),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, small: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    few = tmp_path / "few.json"
    few.write_text(json.dumps([{"instruction": "Say it", "output": "it"}]))
    places = {"llama": small.llama, "few": few}
    assert command.main(arguments.format(**places).split()) == 1
    printed = capsys.readouterr().err
    assert message.format(**places) in printed
    assert printed.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in printed


def test_help_opens_with_an_example_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, eval.speed; eval.speed.build_parser().print_help(); "
        "print([name for name in ('torch', 'numpy', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("python -m eval.speed --json speed.json\n")
    assert done.stdout.endswith("[]\n")
    for name in command.CASES:
        assert f"\n  {name} " in done.stdout
