"""The evaluation of instruction adapters: which rows are kept aside, losses a row, the bootstrap, answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_session
import torch
import torch.nn.functional as F
from tiny_session import Tiny

from eval import instruct as command
from eval.instruct import bootstrap_interval, make_examples, measure, row_losses
from eval.instruct_answers import fenced, read_instructions
from mmadapter.checkpoint import FILE_NAME, Fingerprint, read_about
from mmadapter.data import IGNORE_INDEX, collate
from mmadapter.model import AdaptedLlama
from mmadapter.prompts import template
from mmadapter.record import file_sha256
from mmadapter.rows import Row, held_aside, read_rows
from mmadapter.session import Session
from mmadapter.tokenizer import open_tokenizer

INSTRUCTIONS = Path(__file__).resolve().parents[1] / "eval" / "instructions.jsonl"


def instruction_rows(count: int) -> list[dict]:
    """Responses of different lengths; every third row has an input."""
    return [
        {
            "instruction": f"Tell me about dog {number}.",
            "input": "The dog is red." if number % 3 == 0 else "",
            "output": " ".join(["It runs on the grass."] * (1 + number % 4)),
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows, two of them bad."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = instruction_rows(22)
    rows[3:3] = [{"instruction": "Nothing to learn.", "output": ""}, {"output": "No question."}]
    path.write_text(json.dumps(rows))
    return path


def adapter_of_a_run(tiny: Tiny, folder: Path, **training: object) -> Path:
    """An instruction adapter whose file tells of its run."""
    tokenizer = open_tokenizer(tiny.llama)
    config = tiny_session.llama_config(tokenizer.vocab_size)
    fingerprint = Fingerprint.of(config, tokenizer.tokens())
    tiny_session.write_adapter(folder, config, fingerprint, "instruct", "alpaca", None, training=training)
    return folder


def arguments(tiny: Tiny, adapter: Path, *more: object) -> list[str]:
    return ["--llama", str(tiny.llama), "--dtype", "float32", "--adapter", str(adapter), *map(str, more)]


# Which rows are kept aside


def text_rows(count: int, images: int = 0) -> list[Row]:
    """Rows whose first ones share a few pictures, three to one."""
    return [Row("p", "r", Path(f"{n // 3}.png") if n < 3 * images else None, str(n)) for n in range(count)]


def test_the_rows_kept_aside_stay_the_same_for_ever():
    """Another draw would score an adapter on rows that it has learnt."""
    train, held = held_aside(text_rows(12), 3, seed=0)
    assert [row.where for row in held] == ["1", "9", "0"]
    assert [row.where for row in train] == ["3", "4", "11", "5", "2", "6", "8", "7", "10"]
    assert [row.where for row in held_aside(text_rows(12), 3, seed=1)[1]] == ["0", "8", "11"]


def test_rows_of_one_picture_are_on_one_side():
    for seed in range(5):
        train, held = held_aside(text_rows(40, images=10), 7, seed)
        assert 7 <= len(held) <= 9
        assert len(train) + len(held) == 40
        assert not {row.image for row in train if row.image} & {row.image for row in held if row.image}


@pytest.mark.parametrize(("rows", "held"), [(20, 1), (10, 1), (100, 5), (20_000, 500)])
def test_a_twentieth_is_kept_aside_where_no_number_is_given(rows, held):
    assert len(held_aside(text_rows(rows), 0, seed=0)[1]) == held


def test_training_keeps_the_same_rows_aside():
    from training import alpaca

    assert alpaca.held_aside is held_aside


# Losses


@pytest.mark.parametrize("adapter", ["reads", "sees", "tuned"])
def test_losses_of_rows_are_those_of_training(tiny, adapter, data):
    """Each row alone from the logits, padding and chunks notwithstanding; all of them from the training loss."""
    session = tiny.load(getattr(tiny, adapter))
    rows = read_rows(data, None, session.about.template)[0][:7]
    examples = make_examples(session, rows, 512)
    batch = collate(examples)
    pictures = [tiny.picture(n % 5) if adapter != "reads" else None for n in range(7)]
    losses = row_losses(session.llama, batch, session.prompts(pictures))
    for row, (example, picture) in enumerate(zip(examples, pictures, strict=True)):
        tokens = torch.tensor([example.tokens])
        logits = session.logits(tokens, [picture])[0]
        first = example.prompt_tokens
        expected = F.cross_entropy(logits[first - 1 : -1], tokens[0, first:], reduction="sum")
        assert float(losses[row]) == pytest.approx(float(expected), rel=1e-4)
    features = None if adapter == "reads" else session.features(pictures)
    with torch.no_grad():
        total = AdaptedLlama(session.llama, session.adapter_module)(batch.tokens, batch.labels, features)
    assert float(losses.sum()) == pytest.approx(float(total), rel=1e-4)


def test_more_targets_than_a_chunk(tiny, data, monkeypatch):
    session = tiny.load(tiny.reads)
    batch = collate(make_examples(session, read_rows(data)[0][:5], 512))
    whole = row_losses(session.llama, batch, None)
    monkeypatch.setattr("mmadapter.loss.CHUNK", 7)
    assert torch.allclose(row_losses(session.llama, batch, None), whole)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_passes_do_not_change_the_losses(tiny, data, batch_tokens):
    """And they come back in the order of the rows, which are sorted by length on the way."""
    session = tiny.load(tiny.reads)
    rows = read_rows(data)[0]
    examples = make_examples(session, rows, 512)
    adapter, base, tokens = measure(session, rows, examples, batch_tokens)
    for row, example in enumerate(examples):
        batch = collate([example])
        assert (
            int(tokens[row]) == int((batch.labels != IGNORE_INDEX).sum()) == len(example.tokens) - example.prompt_tokens
        )
        assert float(adapter[row]) == pytest.approx(
            float(row_losses(session.llama, batch, session.prompts([None]))), rel=1e-4
        )
        assert float(base[row]) == pytest.approx(float(row_losses(session.llama, batch, None)), rel=1e-4)
    assert not torch.allclose(adapter, base)


def test_an_adapter_that_sees_is_shown_the_picture_of_each_row(tiny, tmp_path):
    rows = [{"question": "what is red ?", "answer": "dog", "image": f"{n}.png"} for n in range(3)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    session = tiny.load(tiny.sees)
    read = read_rows(path, tiny.pictures, "plain")[0]
    examples = make_examples(session, read, 512)
    assert session.tokenizer.decode(examples[0].tokens) == f"{read[0].prompt} dog"
    adapter, base, _ = measure(session, read, examples, 40)
    assert len(set(adapter.tolist())) == 3
    assert torch.allclose(base, base[0].expand(3))


def test_rows_are_cut_as_in_training(tiny, data):
    session = tiny.load(tiny.reads)
    rows = read_rows(data)[0]
    assert {len(example.tokens) for example in make_examples(session, rows, 20)} == {20}
    assert max(len(example.tokens) for example in make_examples(session, rows, 10**6)) <= session.llama.config.context


def test_the_bootstrap_interval_of_a_mean():
    """Of many rows of one length it is 1.96 standard errors to both sides; rows of no difference leave no doubt."""
    generator = torch.Generator().manual_seed(0)
    difference = 3 * torch.randn(400, generator=generator, dtype=torch.float64) + 5
    tokens = torch.full((400,), 10.0, dtype=torch.float64)
    low, high = bootstrap_interval(difference, tokens)
    mean, error = float(difference.mean()) / 10, float(difference.std()) / 10 / math.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval(tokens / 4, tokens, resamples=50) == (0.25, 0.25)
    assert bootstrap_interval(difference, tokens, seed=1) != (low, high)
    assert bootstrap_interval(difference, tokens) == (low, high)


def test_the_bootstrap_weighs_rows_by_their_tokens():
    difference, tokens = torch.tensor([10.0, 0.0]).double(), torch.tensor([10.0, 90.0]).double()
    assert bootstrap_interval(difference, tokens) == (0.0, 1.0)
    rows = torch.arange(200)
    low, high = bootstrap_interval(difference[rows % 2], tokens[rows % 2])
    assert low < 0.1 < high < 0.2, "the mean over rows would be 0.5"


# The command


def test_the_record_of_a_run(tiny, data, tmp_path, capsys):
    adapter = adapter_of_a_run(
        tiny, tmp_path / "adapter", data_hash=[file_sha256(data)], run={"held_out": 6, "seed": 3, "max_tokens": 120}
    )
    out = tmp_path / "new" / "scores.json"
    assert command.main(arguments(tiny, adapter, "--data", data, "--json", out)) == 0
    record = json.loads(out.read_text())
    good = read_rows(data, None, "alpaca")[0]
    held = held_aside(good, 6, 3)[1]
    assert [entry["where"] for entry in record["predictions"]] == [row.where for row in held]
    assert (record["rows"], record["rows_left_out"]) == (6, 2)
    assert (record["held_out"], record["seed"], record["kept_aside_in_training"]) == (6, 3, True)
    session = tiny.load(adapter)
    examples = make_examples(session, held, 120)
    adapter_losses, base_losses, tokens = measure(session, held, examples, 2048)
    assert record["tokens"] == int(tokens.sum())
    assert record["loss"] == pytest.approx(float(adapter_losses.sum() / tokens.sum()))
    assert record["base_loss"] == pytest.approx(float(base_losses.sum() / tokens.sum()))
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert record["base_perplexity"] == pytest.approx(math.exp(record["base_loss"]))
    assert record["difference"] == pytest.approx(record["loss"] - record["base_loss"])
    low, high = record["difference_95"]
    assert low < record["difference"] < high
    first = record["predictions"][0]
    assert first["tokens"] == int(tokens[0])
    assert first["loss"] == pytest.approx(float(adapter_losses[0] / tokens[0]))
    assert first["base_loss"] == pytest.approx(float(base_losses[0] / tokens[0]))
    assert record["data_hash"] == [file_sha256(data)]
    assert record["adapter_hash"] == file_sha256(adapter / FILE_NAME)
    assert record["command"].startswith("python -m eval.instruct --llama")
    shown = capsys.readouterr()
    assert shown.out.startswith(f"rows.json: 6 rows kept aside, {record['tokens']} tokens\n")
    assert f"adapter   {record['loss']:9.4f}{record['perplexity']:12.3f}\n" in shown.out
    assert "left out 2 bad rows: rows.json, row 4 (line 1): output is empty" in shown.err
    assert "may have learnt" not in shown.err


@pytest.mark.parametrize("change", [{"held_out": 5}, {"seed": 1}, {"data_hash": ["0"]}])
def test_rows_that_the_adapter_may_have_learnt(tiny, data, tmp_path, capsys, change):
    run = {"held_out": 6, "seed": 0, **change}
    hashes = run.pop("data_hash", [file_sha256(data)])
    adapter = adapter_of_a_run(tiny, tmp_path / "adapter", data_hash=hashes, run=run)
    given = ["--data", data, "--held-out", 6, "--seed", 0, "--json", tmp_path / "scores.json"]
    assert command.main(arguments(tiny, adapter, *given)) == 0
    assert "names other data, held_out or seed: it may have learnt these rows" in capsys.readouterr().err
    assert json.loads((tmp_path / "scores.json").read_text())["kept_aside_in_training"] is False


def test_an_adapter_that_tells_of_no_run(tiny, data, tmp_path):
    """500 rows by seed 0, which here are all there are."""
    out = tmp_path / "scores.json"
    assert command.main(arguments(tiny, tiny.reads, "--data", data, "--json", out)) == 0
    record = json.loads(out.read_text())
    assert (record["rows"], record["held_out"], record["seed"]) == (22, 500, 0)
    assert record["kept_aside_in_training"] is False


def test_examples_before_each_row(tiny, data, tmp_path, capsys):
    """The base reads rows that are not scored before each one; what is scored stays the same tokens."""
    out = tmp_path / "scores.json"
    given = ["--data", data, "--held-out", 3, "--seed", 1, "--json", out]
    assert command.main(arguments(tiny, "none", *given)) == 0
    plain = json.loads(out.read_text())
    assert plain["loss"] == plain["base_loss"]
    assert plain["kept_aside_in_training"] is None
    shown = capsys.readouterr()
    assert "may have learnt" not in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[2:]] == ["base"]

    assert command.main(arguments(tiny, "none", *given, "--shots", 2)) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert f"base, 2 shots{record['loss']:9.4f}" in printed
    assert "\ndifference   " in printed
    assert (record["tokens"], record["base_loss"]) == (plain["tokens"], pytest.approx(plain["base_loss"]))
    assert record["loss"] != pytest.approx(record["base_loss"], abs=1e-4)
    rows = {row.where: row for row in read_rows(data, None, "alpaca")[0]}
    shots = [rows[where] for where in record["model"]["shots"]]
    assert len(shots) == 2
    assert not {row.where for row in shots} & {line["where"] for line in record["predictions"]}
    assert all(row.image is None for row in shots)

    # The first scored row by itself, its examples written out.
    session, line = tiny.load(), record["predictions"][0]
    row, tokenizer = rows[line["where"]], session.tokenizer
    before = tokenizer.encode("".join(f"{shot.prompt}{shot.response}\n\n" for shot in shots), bos=False)
    prompt = tokenizer.encode(row.prompt)
    begin = 1 if prompt[0] == tokenizer.bos_id else 0
    ending = [*tokenizer.encode(row.response, bos=False), tokenizer.eos_id]
    tokens = [*prompt[:begin], *before, *prompt[begin:], *ending]
    logits = session.logits(torch.tensor([tokens]))[0].log_softmax(-1)
    place = torch.arange(len(tokens) - len(ending) - 1, len(tokens) - 1)
    assert line["loss"] == pytest.approx(-float(logits[place, torch.tensor(ending)].mean()), abs=1e-4)
    assert line["tokens"] == len(ending)


def test_examples_that_cannot_be_had(tiny, data, tmp_path, capsys):
    assert command.main(arguments(tiny, "none", "--data", data, "--shots", 1)) == 1
    assert (
        "--shots 1 needs as many rows without pictures that are not kept aside, and there are 0"
        in capsys.readouterr().err
    )
    rows = [{"instruction": "Say it.", "output": "dog " * 300}] * 3
    long = tmp_path / "long.json"
    long.write_text(json.dumps(rows))
    assert command.main(arguments(tiny, "none", "--data", long, "--held-out", 1, "--shots", 2)) == 1
    message = capsys.readouterr().err
    assert "error: long.json, row" in message
    assert "the model's context holds 400; take fewer --shots, another --seed or another --llama\n" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--adapter", "a"], "give either --data FILE or --instructions FILE"),
        (["--adapter", "a", "--data", "d", "--instructions", "i"], "give either --data FILE or --instructions FILE"),
        (["--data", "d"], "give --adapter A: it is compared with its base"),
        (["--instructions", "i", "--adapter", "none", "--out", "o.md"], "give --adapter A"),
        (["--instructions", "i", "--adapter", "a", "--out", "o.md", "--shots", "1"], "--shots goes with --data"),
        (["--data", "d", "--adapter", "a", "--out", "o.md"], "--out goes with --instructions"),
        (["--instructions", "i", "--adapter", "a", "--out", "o.md", "--held-out", "3"], "--held-out goes with --data"),
        (["--instructions", "i", "--adapter", "a"], "--instructions needs --out FILE.md"),
        (["--instructions", "i", "--adapter", "a", "--out", "o.jsonl"], "--instructions needs --out FILE.md"),
        (["--data", "d", "--adapter", "a", "--batch-tokens", "0"], "--batch-tokens must be at least 1"),
        (["--data", "d", "--adapter", "a", "--held-out", "-1"], "--held-out must be at least 0"),
    ],
)
def test_misuse(capsys, given, message):
    with pytest.raises(SystemExit) as caught:
        command.main(given)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, tiny, capsys):
    assert command.main(arguments(tiny, tiny.reads, "--data", tmp_path / "no.json")) == 1
    assert capsys.readouterr().err == (f"error: there is no file {tmp_path / 'no.json'}; check the path\n")
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("python -m eval.instruct --data alpaca_data.json --adapter instruct")


# Answers


def test_the_instructions_that_ship():
    asked = read_instructions(INSTRUCTIONS)
    assert len(dict(asked)) == 20
    assert [instruction for instruction, context in asked if context] == ["Explain why this poem is good."]
    assert asked[11][1].count("\n") == 3
    assert asked[0] == ("Tell me about alpacas.", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a"}\n{"input": "b"}\n', "asked.jsonl, line 2: has no instruction; expected rows of"),
        ('{"instruction": "a", "input": 3}\n', "line 1: input must be text, got 3"),
        ("", "is empty"),
    ],
)
def test_bad_instructions(tmp_path, text, message):
    path = tmp_path / "asked.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_instructions(path)


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "asked.jsonl"
    lines = [{"instruction": "Tell me about\ndogs."}, {"instruction": "Why?", "input": "a red\ndog"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_of_both(tiny, asked, tmp_path, monkeypatch):
    """Each model answers as `chat` does with the same settings; what the base is asked is its own chat format."""
    seen = []
    real = Session.generate

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        seen.append((self.adapter_name is not None, self.tokenizer.decode(rows[0], skip_special=False), sampling))
        return real(self, rows, sampling, prompts, cancelled)

    monkeypatch.setattr(Session, "generate", generate)
    out = tmp_path / "new" / "answers.md"
    given = ["--instructions", asked, "--out", out, "--max-new-tokens", 9, "--seed", 5]
    assert command.main(arguments(tiny, tiny.reads, *given)) == 0
    alpaca = template("alpaca")
    assert [(adapted, text) for adapted, text, _ in seen] == [
        (True, alpaca.render("Tell me about\ndogs.")),
        (True, alpaca.render("Why?", "a red\ndog")),
        (False, "<|im_start|>user\nTell me about\ndogs.<|im_end|>\n<|im_start|>assistant\n"),
        (False, "<|im_start|>user\nWhy?\n\na red\ndog<|im_end|>\n<|im_start|>assistant\n"),
    ]
    sampling = seen[0][2]
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_new_tokens) == (0.1, 0.75, 5, 9)
    assert all(each == sampling for _, _, each in seen)

    entries = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(entry["instruction"], entry["input"]) for entry in entries] == [
        ("Tell me about\ndogs.", ""),
        ("Why?", "a red\ndog"),
    ]
    settings = {"max_new_tokens": 9, "seed": 5, "temperature": 0.1, "top_p": 0.75}
    session = tiny.load(tiny.reads)
    assert entries[0]["adapter"]["text"] == session.chat("Tell me about\ndogs.", **settings)
    session.adapter(None)
    assert entries[0]["base"]["text"] == session.chat("Tell me about\ndogs.", **settings)
    assert entries[0]["base"] != entries[0]["adapter"]
    assert entries[0]["model"]["adapter_hash"] == file_sha256(tiny.reads / FILE_NAME)
    assert entries[0]["git_commit"] == entries[1]["git_commit"]
    assert {(entry["task"], entry["version"]) for entry in entries} == {("instruct answers", 1)}
    assert all(entry["seconds"] >= 0 for entry in entries)
    assert entries[0]["model"]["sampling"]["repetition_penalty"] == 1.1

    text = out.read_text()
    assert text.startswith(
        f"# Answers of {tiny.llama} and of its adapter {tiny.reads}\n\nMade by `python -m eval.instruct"
    )
    assert "temperature 0.1, top-p 0.75, repetition penalty 1.1, seed 5, at most 9 tokens" in text
    assert "\n## 1. Tell me about dogs.\n\n**Base**" in text
    assert "\n## 2. Why?\n\nInput:\n\n```text\na red\ndog\n```\n\n**Base**" in text
    assert text.count("**Adapter**") == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "answers.md"]


def test_a_base_without_a_chat_template_is_asked_all_the_same(tiny, asked, tmp_path):
    out = tmp_path / "answers.md"
    given = ["--instructions", asked, "--out", out, "--max-new-tokens", 2]
    assert command.main([*arguments(tiny, tiny.reads, *given), "--llama", str(tiny.plain)]) == 0
    assert read_about(tiny.reads / FILE_NAME).template == "alpaca"
    assert out.read_text().count("(cut off)") == 4


def test_an_answer_in_markdown_is_shown_as_it_is():
    assert fenced("a *b*\n\n<c>") == "```text\na *b*\n\n<c>\n```\n"
    assert fenced("```python\n    x = 1\n````") == "`````text\n```python\n    x = 1\n````\n`````\n"
    assert fenced("") == "```text\n```\n"
    long = "    " + " ".join(["word"] * 60)
    shown = fenced(long).split("\n")[1:-2]
    assert max(map(len, shown)) <= 100
    assert len(shown) == 4
    assert shown[0].startswith("    word word")
    assert " ".join(" ".join(shown).split()) == long.strip()
