"""The ScienceQA evaluation: prediction files, tiny models that are asked, the record, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny_session
import torch

from eval import scienceqa as command
from eval.records import images_hash
from mmadapter.checkpoint import FILE_NAME, Fingerprint, read_about
from mmadapter.generate import Generated
from mmadapter.record import file_sha256
from mmadapter.sampling import Sampling
from mmadapter.scienceqa import CLASSES, held_out, parse_format, prompt_text, read_problems
from mmadapter.session import Session
from mmadapter.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("MMADAPTER_DATA")

# pid: question, choices, answer, hint, picture, grade, subject. Short, for the tiny model's context is short.
TEST = {
    "1": ("Which runs?", ["a dog", "grass"], 0, "Dogs run.", 0, "grade2", "natural science"),
    "2": ("Is it?", ["no", "yes", "a man stops"], 2, "", None, "grade9", "language science"),
    "3": ("Red?", ["no", "yes"], 1, "", 1, None, None),
    "4": ("Where is the red dog and what does it do there?", ["here", "on the grass"], 1, "A dog.", None, None, None),
}
TRAIN = {f"t{n}": (f"Train {n}?", ["x", "y"], n % 2, "", n % 5 if n < 4 else None, None, None) for n in range(8)}
ORDER = ["4", "3", "1", "2"]  # not that of the file, and not by length
RIGHT = {pid: row[2] for pid, row in TEST.items()}


def write_data(folder: Path, pictures: Path) -> Path:
    problems = {}
    for split, rows in (("test", TEST), ("train", TRAIN)):
        for pid, (question, choices, answer, hint, picture, grade, subject) in rows.items():
            problems[pid] = {
                **{"question": question, "choices": choices, "answer": answer, "hint": hint, "split": split},
                **{"image": None if picture is None else "image.png", "grade": grade, "subject": subject},
            }
            if picture is not None:
                place = folder / "images" / split / pid
                place.mkdir(parents=True)
                (place / "image.png").write_bytes((pictures / f"{picture}.png").read_bytes())
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(TRAIN), "test": ORDER}))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny model, the data, and two adapters for it: `sees` and `reads`, which say how they are to be asked."""
    folder = tmp_path_factory.mktemp("scienceqa")
    world = tiny_session.build(folder)
    write_data(folder, world.pictures)
    tokenizer = open_tokenizer(world.llama)
    config = tiny_session.llama_config(tokenizer.vocab_size)
    fingerprint = Fingerprint.of(config, tokenizer.tokens())
    vision = read_about(world.sees / FILE_NAME).vision
    sees = {"format": "QM-A", "answer_form": "text", "score": "likelihood"}
    tiny_session.write_adapter(folder / "scores", config, fingerprint, "scienceqa", "bare", vision, training=sees)
    tiny_session.write_adapter(folder / "writes", config, fingerprint, "scienceqa", "bare", None)
    return world


@pytest.fixture
def data(world):
    return world.llama.parent


def model_arguments(data: Path, adapter: str, *more: str) -> list[str]:
    adapter = adapter if adapter == "none" else str(data / adapter)
    base = ["--data", str(data), "--llama", str(data / "llama"), "--dtype", "float32"]
    return [*base, "--adapter", adapter, *more]


def ask(data: Path, out: Path, adapter: str, *more: str) -> dict:
    """Runs the command and returns its record."""
    assert command.main(model_arguments(data, adapter, "--json", str(out), *more)) == 0
    return json.loads(out.read_text())


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked to continue, and the images; it answers with the second option, or what `say` holds."""
    record = {"texts": [], "images": [], "say": "The answer is B."}
    prompts = Session.prompts

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        record["texts"] += [self.tokenizer.decode(list(row)) for row in rows]
        record["sampling"] = sampling
        return [Generated(record["say"], [], "stop") for _ in rows]

    def seen(self, images):
        record["images"] += images
        return prompts(self, images)

    monkeypatch.setattr(Session, "generate", generate)
    monkeypatch.setattr(Session, "prompts", seen)
    return record


# Prediction files


def predictions_file(folder: Path, content: object) -> Path:
    path = folder / "predictions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


LETTERS = {pid: f"The answer is {'ABC'[index]}." for pid, index in RIGHT.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"results": RIGHT, "outputs": {"1": "nonsense"}},
        {"outputs": LETTERS, "acc": 3},
        [LETTERS[pid] for pid in ORDER],
        "".join(json.dumps({"pid": pid, "answer": index}) + "\n" for pid, index in RIGHT.items()),
        "\r\n\r\n".join(json.dumps({"pid": int(pid), "answer": text}) for pid, text in LETTERS.items()),
        "\ufeff" + json.dumps({"results": {**RIGHT, "99": 0}}),
        "".join(json.dumps({"question_id": p, "prompt": "?", "text": t}) + "\n" for p, t in LETTERS.items()),
        {"acc": 9.0, "correct": 1, "count": 4, "results": RIGHT, "outputs": dict.fromkeys(RIGHT, "FAILED")},
    ],
    ids=["official", "outputs", "list", "lines of indices", "lines of texts", "byte order mark", "LLaVA", "its result"],
)
def test_each_format_of_predictions(data, tmp_path, content, capsys):
    out = tmp_path / "deep" / "er" / "scores.json"
    path = predictions_file(tmp_path, content)
    assert command.main(["--data", str(data), "--predictions", str(path), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert (scores["avg"], scores["total"], scores["unparsed"]) == (100, 4, 0)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "ScienceQA test: 4 questions, 0 unparsed",
        "        avg     NAT     SOC     LAN     TXT     IMG      NO    G1-6   G7-12",
        "%    100.00  100.00       -  100.00  100.00  100.00  100.00  100.00  100.00",
        "n         4       1       0       1       2       2       1       1       1",
        "IMG with a hint 100.00 (n 1), without a hint 100.00 (n 1)",
    ]
    assert ("1 answers to questions that are not scored here are passed over" in printed.err) == ("99" in str(content))


def test_one_line_is_json_lines_too(data, tmp_path, capsys):
    path = predictions_file(tmp_path, '{"pid": "4", "answer": "(B)"}')
    assert command.main(["--data", str(data), "--predictions", str(path), "--limit", "1"]) == 0
    assert capsys.readouterr().out.startswith("ScienceQA test: 1 questions, 0 unparsed\n")


def test_images_with_and_without_a_hint(data, tmp_path, capsys):
    """Their shares differ between the splits, so that one accuracy of both hides which of them a model can do."""
    out = tmp_path / "scores.json"
    path = predictions_file(tmp_path, {"results": {**RIGHT, "3": 0}})
    arguments = ["--data", str(data), "--predictions", str(path), "--json", str(out)]
    assert command.main(arguments) == 0
    scores = json.loads(out.read_text())
    assert scores["IMG"] == 50
    assert scores["IMG_by_hint"] == {"with": {"IMG": 100, "n": 1}, "without": {"IMG": 0, "n": 1}}
    assert capsys.readouterr().out.endswith("\nIMG with a hint 100.00 (n 1), without a hint 0.00 (n 1)\n")
    assert command.main([*arguments, "--limit", "1"]) == 0
    assert json.loads(out.read_text())["IMG_by_hint"]["with"] == {"IMG": None, "n": 0}
    assert "a hint" not in capsys.readouterr().out


def test_the_record(data, tmp_path):
    out = tmp_path / "scores.json"
    path = predictions_file(tmp_path, {"results": {**RIGHT, "1": 1, "2": 3, "3": None}})
    arguments = ["--data", str(data), "--predictions", str(path), "--json", str(out)]
    assert command.main(arguments) == 0
    scores = json.loads(out.read_text())
    assert tuple(scores)[:12] == (*CLASSES, "n", "unparsed", "total")
    assert [scores[name] for name in CLASSES] == [25, 0, None, 0, 50, 0, 0, 0, 0]
    assert (scores["unparsed"], scores["total"], scores["n"]["TXT"]) == (2, 4, 2)
    wanted = {"task": "scienceqa", "version": 2, "split": "test", "adapter": None, "base": None, "seed": 0}
    assert {key: scores[key] for key in wanted} == wanted
    assert scores["command"] == f"python -m eval.scienceqa --data {data} --predictions {path} --json {out}"
    assert scores["data_hash"] == {name: file_sha256(data / name) for name in ("problems.json", "pid_splits.json")}
    assert scores["predictions_hash"] == file_sha256(path)
    assert scores["versions"]["torch"] == metadata.version("torch")
    assert {"git_commit", "time", "seconds"} <= set(scores)
    assert scores["predictions"] == [
        {"pid": "4", "answer": 1, "correct": True},
        {"pid": "3", "answer": None, "correct": False},
        {"pid": "1", "answer": 1, "correct": False},
        {"pid": "2", "answer": 3, "correct": False},
    ]


def test_unparsed_answers_are_wrong_or_drawn(data, tmp_path):
    """Published results drew a choice for them. They stay counted, and a seed gives the same draw each time."""
    path = predictions_file(tmp_path, {"results": dict.fromkeys(RIGHT, -1)})
    found = {}
    for seed in range(12):
        out = tmp_path / f"{seed}.json"
        arguments = ["--data", str(data), "--predictions", str(path), "--seed", str(seed), "--json", str(out)]
        assert command.main([*arguments, "--on-unparsed", "random"]) == 0
        scores = json.loads(out.read_text())
        assert scores["unparsed"] == 4
        found[seed] = [line["correct"] for line in scores["predictions"]]
        assert scores["avg"] == 25 * sum(found[seed])
        assert [line["answer"] for line in scores["predictions"]] == [-1] * 4
        for line in scores["predictions"]:
            assert line["correct"] == (line["drawn"] == RIGHT[line["pid"]]), "what was drawn is kept"
        assert command.main([*arguments, "--on-unparsed", "random"]) == 0
        assert json.loads(out.read_text())["avg"] == scores["avg"]
    assert len({tuple(correct) for correct in found.values()}) > 4
    assert command.main(arguments) == 0
    assert json.loads(out.read_text())["avg"] == 0
    assert not any("drawn" in line for line in json.loads(out.read_text())["predictions"])
    path = predictions_file(tmp_path, {"results": {**dict.fromkeys(RIGHT, -1), "1": RIGHT["1"]}})
    arguments = ["--data", str(data), "--predictions", str(path), "--json", str(out), "--on-unparsed", "random"]
    assert command.main(arguments) == 0
    lines = json.loads(out.read_text())["predictions"]
    assert [line["pid"] for line in lines if "drawn" not in line] == ["1"], "only in place of answers that name none"


def test_unparsed_answers_are_shown(data, tmp_path, capsys):
    """By their text, also where the file has an index for it, as LLaVA's results do."""
    outputs = {"4": "FAILED", "3": "I do not know. " * 20, "1": "grass or a dog", "2": "yes"}
    path = predictions_file(tmp_path, {"outputs": outputs})
    arguments = ["--data", str(data), "--predictions", str(path)]
    assert command.main(arguments) == 0
    assert capsys.readouterr().err == (
        "3 answers that name no choice, each of which is wrong: pid 4: 'FAILED'; pid 3: 'I do not know. I do not know. "
        "I do not know. I do not know. I do not k...'; pid 1: 'grass or a dog'\n"
    )
    path = predictions_file(tmp_path, {"results": {**RIGHT, "2": -1}, "outputs": outputs})
    out = tmp_path / "scores.json"
    assert command.main([*arguments, "--on-unparsed", "random", "--json", str(out)]) == 0
    assert capsys.readouterr().err == (
        "1 answer that names no choice, each of which counts as a choice drawn by --seed: pid 2: 'yes'\n"
    )
    line = json.loads(out.read_text())["predictions"][-1]
    assert (line["pid"], line["answer"], line["text"]) == ("2", -1, "yes")
    path = predictions_file(tmp_path, {"results": dict.fromkeys(RIGHT)})
    assert command.main(arguments) == 0
    assert capsys.readouterr().err.endswith("pid 4: 'None'; pid 3: 'None'; pid 1: 'None'; ...\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": {"1": 0}}, "predictions.json: 3 pids (4, 3, 2) without an answer, of 4 to score; every question"),
        (["A"], "is a list of 1 answers; the split has 4 questions, and each needs one"),
        ('{"results": {"4": 0, "3": 1, "4": 1, "5": 0, "5": 0}}', "results: 2 pids (4, 5) more than once; give one"),
        ('{"question_id": "4", "answer": "B"}', ', expected {"pid": ..., "answer": ...}'),
        ([{"pid": "4"}] * 4, "item 0: an answer must be a text or the index of a choice, got {'pid': '4'}"),
        ({"results": {**RIGHT, "2": True}}, "results, pid 2: an answer must be a text or the index of a choice"),
        ({"results": {**RIGHT, "2": 0.5}}, "results, pid 2: an answer must be"),
        ({"acc": 3}, '{"acc": 3}\', expected {"pid": ..., "answer": ...}; else a file may hold one JSON list of texts'),
        ('{"pid": "1", "answer": 0}\n{"pid": "2", "ans', "line 2: got"),
        ('{"pid": "1", "answer": 0}\n{"pid": 1, "answer": 0}', "line 2: pid 1 has an answer already"),
        ("\n", "is empty; every question needs an answer"),
        ("7", "line 1: got '7', expected"),
    ],
)
def test_bad_predictions(data, tmp_path, content, message, capsys):
    path = predictions_file(tmp_path, content)
    assert command.main(["--data", str(data), "--predictions", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_published_scores_of_gpt3(tmp_path):
    """Table 2 of LLaMA-Adapter (GPT-3 CoT). Most grades are not in the data, so G1-6 and G7-12 cannot be the same."""
    folder = Path(DATA) / "scienceqa"
    [path] = (folder / "published").glob("gpt3*.json")
    out = tmp_path / "scores.json"
    assert command.main(["--data", str(folder), "--predictions", str(path), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    published = {"avg": 75.17, "NAT": 75.44, "SOC": 70.87, "LAN": 78.09, "TXT": 74.68, "IMG": 67.43, "NO": 79.93}
    assert {name: round(scores[name], 2) for name in published} == published
    assert scores["n"]["G1-6"] + scores["n"]["G7-12"] == 361
    assert (scores["unparsed"], scores["total"]) == (0, 4241)


# Asking a model


def test_likelihood_equals_one_question_at_a_time(data, world, tmp_path):
    """Batches, padding, images in some rows only, shared prompts: none of it may show in an answer."""
    scores = ask(data, tmp_path / "all.json", "scores")
    assert (scores["model"]["format"], scores["model"]["answer_form"]) == ("QM-A", "text")
    assert (scores["model"]["score"], scores["model"]["normalise"]) == ("likelihood", "mean")
    single = ask(data, tmp_path / "single.json", "scores", "--batch-size", "1")
    session = world.load(data / "scores")
    tokenizer = session.tokenizer
    for problem, line, alone in zip(
        read_problems(data, "test"), scores["predictions"], single["predictions"], strict=True
    ):
        assert line["pid"] == problem.pid
        prompt = tokenizer.encode(prompt_text(problem, parse_format("QM-A")))
        totals, means = [], []
        for choice in problem.choices:
            ending = [*tokenizer.encode(" " + choice, bos=False), tokenizer.eos_id]
            logits = session.logits(torch.tensor([prompt + ending]), [problem.image])[0].log_softmax(-1)
            each = logits[range(len(prompt) - 1, len(prompt) + len(ending) - 1), ending]
            totals.append(each.sum().item())
            means.append(each.mean().item())
        assert line["log_likelihoods"] == pytest.approx(totals, abs=1e-3)
        assert line["answer"] == means.index(max(means)) == alone["answer"]
        assert line["probabilities"] == pytest.approx(torch.tensor(means).softmax(0).tolist(), abs=1e-4)
        assert alone["log_likelihoods"] == pytest.approx(totals, abs=1e-3)
        assert line["tokens"] == [len(tokenizer.encode(" " + choice, bos=False)) + 1 for choice in problem.choices]


def test_sum_and_mean(data, tmp_path):
    by_sum = ask(data, tmp_path / "sum.json", "scores", "--normalise", "sum")
    by_mean = ask(data, tmp_path / "mean.json", "scores", "--normalise", "mean")
    for first, second in zip(by_sum["predictions"], by_mean["predictions"], strict=True):
        assert first["log_likelihoods"] == second["log_likelihoods"]
        assert first["probabilities"] != second["probabilities"]
        assert first["answer"] == first["log_likelihoods"].index(max(first["log_likelihoods"]))
    assert [line["answer"] for line in by_sum["predictions"]] != [line["answer"] for line in by_mean["predictions"]]


def test_the_base_model_is_not_asked_to_stop(data, tmp_path):
    """Only an adapter was trained to end after its answer, so of the base no stop token is scored."""
    line = ask(data, tmp_path / "a.json", "none", "--score", "likelihood", "--limit", "1")["predictions"][0]
    with_stop = ask(data, tmp_path / "b.json", "writes", "--score", "likelihood", "--limit", "1")["predictions"][0]
    assert [count + 1 for count in line["tokens"]] == with_stop["tokens"]


def test_the_letter_that_the_model_writes(data, tmp_path, asked, capsys):
    """Without metadata about it, an adapter is asked in QCM-A for a letter; one that does not see gets no image."""
    scores = ask(data, tmp_path / "a.json", "writes")
    assert asked["texts"][0] == (
        "Question: Where is the red dog and what does it do there?\nContext: A dog.\n"
        "Options: (A) here (B) on the grass\nAnswer:"
    )
    assert sorted(map(len, asked["texts"]), reverse=True) == list(map(len, asked["texts"])), "by length"
    assert asked["images"] == [None] * 4
    assert (asked["sampling"].temperature, asked["sampling"].beams, asked["sampling"].stop) == (0, 1, ("\n",))
    assert scores["avg"] == 50
    assert scores["predictions"][3] == {"pid": "2", "answer": 1, "text": "The answer is B.", "correct": False}
    assert scores["model"]["normalise"] is None
    asked["say"] = " I do not know.\n"
    scores = ask(data, tmp_path / "b.json", "writes")
    assert (scores["avg"], scores["unparsed"]) == (0, 4)
    assert scores["predictions"][0]["text"] == "I do not know."
    assert "4 questions, 4 unparsed" in capsys.readouterr().out


def test_an_adapter_that_sees_gets_the_images(data, tmp_path, asked):
    ask(data, tmp_path / "a.json", "scores", "--score", "letter", "--batch-size", "4")
    images = [path.parent.name if path else None for path in asked["images"]]
    assert sorted(images, key=str) == ["1", "3", None, None]
    order = [next(pid for pid, row in TEST.items() if row[0] in text) for text in asked["texts"]]
    assert [pid if pid in "13" else None for pid in order] == images, "each with its own question"
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["images_hash"] == images_hash({path.parent.name: path for path in asked["images"] if path})
    assert record["model"]["sampling"]["max_new_tokens"] == 64
    assert ask(data, tmp_path / "b.json", "writes", "--limit", "1")["images_hash"] is None
    assert ask(data, tmp_path / "b.json", "scores", "--limit", "1")["model"]["sampling"] is None, "nothing is decoded"


def test_what_the_model_writes_is_what_it_writes_alone(data, world, tmp_path):
    scores = ask(data, tmp_path / "a.json", "scores", "--score", "letter", "--answer-form", "letter")
    session = world.load(data / "scores")
    for problem, line in zip(read_problems(data, "test"), scores["predictions"], strict=True):
        tokens = session.tokenizer.encode(prompt_text(problem, parse_format("QM-A")))
        sampling = Sampling(max_new_tokens=64, stop=("\n",))
        alone = session.generate([tokens], sampling, session.prompts([problem.image]))[0]
        assert line["text"] == alone.text.strip()
    assert any(line["text"] for line in scores["predictions"])


def test_options_override_the_metadata(data, tmp_path, asked):
    more = ["--score", "letter", "--format", "CQM-AE", "--answer-form", "letter"]
    scores = ask(data, tmp_path / "a.json", "scores", *more)
    assert asked["texts"][0].startswith("Context: A dog.\nQuestion: ")
    assert asked["sampling"].max_new_tokens == 512
    assert (scores["model"]["format"], scores["model"]["answer_form"]) == ("CQM-AE", "letter")


def test_the_template_of_the_adapter(data, tmp_path, asked):
    """An adapter of instructions is asked in its own template."""
    ask(data, tmp_path / "a.json", "reads", "--limit", "1")
    assert asked["texts"][0].startswith("Below is an instruction")
    assert asked["texts"][0].endswith("\nAnswer:\n\n### Response:")


def test_shots(data, tmp_path, asked):
    """The same examples before every question, from train and drawn by the seed."""
    scores = ask(data, tmp_path / "a.json", "none", "--shots", "2", "--seed", "5")
    pids = scores["model"]["shots"]
    assert len(set(pids)) == 2
    examples = "".join(
        f"Question: Train {pid[1:]}?\nContext: N/A\nOptions: (A) x (B) y\nAnswer: The answer is "
        f"{'AB'[int(pid[1:]) % 2]}.\n\n"
        for pid in pids
    )
    assert all(text.startswith(f"{examples}Question: ") for text in asked["texts"])
    assert all(text.endswith("\nAnswer:") for text in asked["texts"])
    drawn = [ask(data, tmp_path / "b.json", "none", "--shots", "2", "--seed", str(n))["model"]["shots"] for n in (5, 6)]
    assert drawn[0] == pids != drawn[1]


def test_what_is_held_out_is_scored_and_never_shown(data, tmp_path, asked, capsys):
    """Also what --limit leaves unscored: it serves to choose settings by, and an example would give it away."""
    train, held = held_out(read_problems(data, "train"), 4, 3)
    more = ["--split", "train", "--held-out", "4", "--seed", "3"]
    scores = ask(data, tmp_path / "a.json", "none", *more)
    assert [line["pid"] for line in scores["predictions"]] == [problem.pid for problem in held]
    assert (scores["held_out"], scores["n"]["IMG"]) == (4, 2)
    assert "ScienceQA train, held out with seed 3: 4 questions" in capsys.readouterr().out
    limited = ask(data, tmp_path / "b.json", "none", *more, "--limit", "1", "--shots", "3")
    assert set(limited["model"]["shots"]) <= {problem.pid for problem in train}
    assert len(limited["predictions"]) == 1
    more = ["--split", "train", "--shots", "1"]
    assert command.main(model_arguments(data, "none", *more)) == 1
    assert "--shots 1 needs as many train questions that are not scored; got 0" in capsys.readouterr().err


# Answers that are kept


@pytest.mark.parametrize("torn", [b"", b'{"p', b'{"pid": "1", "answ', b'{"pid": "2", "answer": 1, "text": "caf\xc3'])
def test_a_stopped_run_goes_on(data, tmp_path, torn, monkeypatch, capsys):
    """Resumed equals uninterrupted, also where the file ends within a line; what is kept is not asked again."""
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    expected = ask(data, tmp_path / "whole.json", "scores", "--out", str(whole), "--batch-size", "1")
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    resumed.write_bytes(b"".join(lines[:2]) + torn)
    capsys.readouterr()
    found = ask(data, tmp_path / "resumed.json", "scores", "--out", str(resumed), "--batch-size", "1")
    assert f"2 of 4 predictions are in {resumed}" in capsys.readouterr().err
    files = [[json.loads(line) for line in path.read_bytes().splitlines()] for path in (resumed, whole)]
    assert all(line.pop("made")["git_commit"] == expected["git_commit"] for lines in files for line in lines)
    assert files[0] == files[1]
    assert found["predictions"] == expected["predictions"]
    monkeypatch.setattr(Session, "prompts", lambda *_: pytest.fail("asked again"))
    again = ask(data, tmp_path / "again.json", "scores", "--out", str(resumed))
    assert again["predictions"] == expected["predictions"]
    # What is kept is also what --predictions reads.
    out = tmp_path / "scored.json"
    assert command.main(["--data", str(data), "--predictions", str(whole), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["avg"] == expected["avg"]


def test_what_is_done_before_an_interruption_is_kept(data, tmp_path, monkeypatch, capsys):
    prompts, asked = Session.prompts, []

    def interrupted(self, images):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(images)
        return prompts(self, images)

    monkeypatch.setattr(Session, "prompts", interrupted)
    out = tmp_path / "kept.jsonl"
    assert command.main(model_arguments(data, "scores", "--out", str(out), "--batch-size", "1")) == 130
    assert [set(json.loads(line)) for line in out.read_text().splitlines()] == 2 * [
        {"pid", "answer", "probabilities", "log_likelihoods", "tokens", "model", "made"}
    ]
    assert capsys.readouterr().err.endswith("error: interrupted\n")


@pytest.mark.parametrize(
    "other",
    [["--score", "letter"], ["--normalise", "sum"], ["--format", "QCM-A"], ["--answer-form", "letter"]],
    ids=lambda option: option[0],
)
def test_answers_of_another_model_are_not_taken_over(data, tmp_path, other, capsys):
    out = tmp_path / "kept.jsonl"
    ask(data, tmp_path / "a.json", "scores", "--out", str(out), "--limit", "2")
    content = out.read_bytes()
    assert command.main(model_arguments(data, "scores", "--out", str(out), *other)) == 1
    assert "holds predictions of another model" in capsys.readouterr().err
    assert out.read_bytes() == content


def test_an_adapter_trained_anew_under_the_same_name_is_another_model(data, world, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "kept.jsonl"
    adapter.mkdir()
    file = adapter / "adapter.safetensors"
    file.write_bytes((data / "writes" / "adapter.safetensors").read_bytes())
    arguments = ["--data", str(data), "--llama", str(world.llama), "--adapter", str(adapter), "--out", str(out)]
    arguments += ["--score", "likelihood", "--limit", "1", "--dtype", "float32"]
    assert command.main(arguments) == 0
    assert command.main(arguments) == 0
    file.write_bytes((data / "reads" / "adapter.safetensors").read_bytes())
    assert command.main(arguments) == 1
    assert "holds predictions of another model" in capsys.readouterr().err


def test_other_files_are_not_harmed(data, tmp_path, capsys):
    out = tmp_path / "notes.txt"
    out.write_text("precious notes without an end of line")
    assert command.main(model_arguments(data, "none", "--out", str(out))) == 1
    assert "last line is no prediction that this command kept; name another --out" in capsys.readouterr().err
    assert out.read_text() == "precious notes without an end of line"


# What is refused


def test_a_missing_image_is_named_before_anything_is_asked(data, world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write_data(folder, world.pictures)
    image = folder / "images" / "test" / "3" / "image.png"
    image.unlink()
    monkeypatch.setattr(Session, "prompts", lambda *_: pytest.fail("asked"))
    arguments = ["--data", str(folder), "--llama", str(world.llama), "--adapter", str(data / "scores")]
    assert command.main(arguments) == 1
    assert f"error: there is no image {image}, of pid 3; complete the data" in capsys.readouterr().err
    monkeypatch.undo()
    arguments[-1] = "none"  # who does not see does without
    assert command.main([*arguments, "--score", "likelihood"]) == 0


def test_questions_that_are_too_long(world, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    problems = json.loads((write_data(folder, world.pictures) / "problems.json").read_text())
    problems["2"]["hint"] = "Ξ " * 300
    (folder / "problems.json").write_text(json.dumps(problems))
    arguments = ["--data", str(folder), "--llama", str(world.llama), "--adapter", "none", "--shots", "1"]
    assert command.main(arguments) == 1
    message = capsys.readouterr().err
    assert "error: 1 questions are too long, such as pid 2 with " in message
    assert "the model's context holds 400, 1 examples and the answer included; take fewer --shots" in message


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"score": "luck"}, "says score 'luck', expected letter or likelihood; give --score"),
        ({"answer_form": 3}, "says answer_form 3, expected letter or text; give --answer-form"),
        ({"format": "QCM"}, "'QCM' is no ScienceQA format"),
        ({"format": "QCM-LA", "score": "likelihood"}, "--score likelihood needs a format that begins its output with"),
    ],
)
def test_bad_metadata(data, world, tmp_path, training, message, capsys):
    tokenizer = open_tokenizer(world.llama)
    config = tiny_session.llama_config(tokenizer.vocab_size)
    fingerprint = Fingerprint.of(config, tokenizer.tokens())
    tiny_session.write_adapter(tmp_path / "a", config, fingerprint, "scienceqa", "bare", None, training=training)
    arguments = ["--data", str(data), "--llama", str(world.llama), "--adapter", str(tmp_path / "a")]
    assert command.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --predictions FILE or --adapter A"),
        (["--predictions", "p", "--adapter", "a"], "give either"),
        (["--predictions", "p", "--out", "o"], "--out is about a model that answers; it goes with --adapter"),
        (["--predictions", "p", "--answer-form", "text"], "--answer-form is about a model"),
        (["--predictions", "p", "--shots", "0"], "--shots is about a model"),
        (["--adapter", "a", "--shots", "4"], "invalid choice: 4"),
        (["--adapter", "a", "--limit", "0"], "--limit must be at least 1"),
        (["--adapter", "a", "--batch-size", "-1"], "--batch-size must be at least 1"),
        (["--adapter", "a", "--held-out", "5"], "it goes with --split train"),
        (["--adapter", "a", "--format", "QCM"], "'QCM' is no ScienceQA format"),
    ],
)
def test_misuse_exits_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--data", "d", *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_errors_are_one_line(tmp_path, capsys):
    arguments = ["--data", str(tmp_path / "none"), "--predictions", "p"]
    assert command.main(arguments) == 1
    assert capsys.readouterr().err == (
        f"error: no folder {tmp_path / 'none'}; give the one that holds ScienceQA's problems.json\n"
    )
    with pytest.raises(FileNotFoundError):
        command.main([*arguments, "--debug"])
    assert command.main([*arguments, "--json", str(tmp_path)]) == 1
    assert "is a folder; give a file name" in capsys.readouterr().err


def test_help_opens_with_an_example_and_imports_no_torch():
    code = (
        "import sys\nfrom eval import scienceqa\n"
        "try:\n    scienceqa.main(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("python -m eval.scienceqa --data scienceqa --predictions predictions.jsonl")
    assert done.stdout.endswith("False\n")
