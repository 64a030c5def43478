"""The report over score files: intervals and tests against known cases, what is refused, and the page itself."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval.statistics as statistics
from eval import caption_metrics, ner, qa, scienceqa
from eval.caption_sums import caption_sums
from eval.published import TABLES
from eval.report import DESCRIPTION, main
from eval.report_content import build
from eval.report_runs import published_table, read_runs
from eval.report_style import SERIES, STYLE
from eval.report_text import p_text, signed
from eval.statistics import Ratio, bootstrap_interval, difference_interval, mcnemar, permutation_test
from mmadapter.record import file_sha256

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------------------ intervals


def binomial_quantile(probability: float, n: int, p: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= probability:
            return k
    return n


@pytest.mark.parametrize(("right", "n"), [(20, 50), (3, 200), (117, 127)])
def test_the_interval_of_an_accuracy_is_the_binomial_one(right: int, n: int) -> None:
    """Resampling k right answers of n draws from Binomial(n, k/n), whose quantiles are known."""
    low, high = bootstrap_interval(Ratio.share(right, n, factor=100.0), resamples=20_000, seed=1)
    expected = [100 * binomial_quantile(q, n, right / n) / n for q in (0.025, 0.975)]
    assert low == pytest.approx(expected[0], abs=100 / n)
    assert high == pytest.approx(expected[1], abs=100 / n)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    low, high = bootstrap_interval(Ratio.mean(values))
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_the_interval_of_a_ratio_is_that_of_its_linearisation() -> None:
    """Loss a token: rows differ in length, so the mean of their losses has another value and another interval."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 60, 3000).astype(float)
    losses = tokens * (1 + 0.02 * tokens) + generator.normal(0, 2, 3000)
    score = Ratio(losses, tokens)
    low, high = bootstrap_interval(score)
    residual = losses - score.value * tokens
    half = 1.959964 * residual.std() / math.sqrt(3000) / tokens.mean()
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert low < score.value < high
    assert not low < (losses / tokens).mean() < high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval(Ratio.mean(generator.exponential(1.0, 80)), resamples=400, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.89 < covered / 400 < 0.98


@pytest.mark.parametrize("values", [[], [4.0], [1.0, 1.0, 1.0], [0.1] * 7])
def test_examples_that_agree_give_no_interval(values: list[float]) -> None:
    """[100, 100] for three right answers would say that the score is known exactly."""
    assert bootstrap_interval(Ratio.mean(values)) is None


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Ratio.mean(np.random.default_rng(3).random(100))
    first = bootstrap_interval(score, resamples=500, seed=5)
    assert bootstrap_interval(score, resamples=500, seed=5) == first
    assert bootstrap_interval(score, resamples=500, seed=6) != first
    monkeypatch.setattr(statistics, "PORTION", 1)  # a resample at a time: as many, of the same kind
    assert bootstrap_interval(score, resamples=500, seed=5) == pytest.approx(first, abs=0.02)
    assert sum(statistics._portions(10**9, 7)) == 7


def test_a_ratio_of_nothing_is_nothing() -> None:
    """A run that predicts in one document of five predicts nothing in a third of the resamples: precision 0 of 0."""
    score = Ratio(np.array([1.0, 0, 0, 0, 0]), np.array([1.0, 0, 0, 0, 0]))
    assert bootstrap_interval(score, resamples=500) == (0.0, 1.0), "not 1 in all resamples that have a value"
    assert difference_interval(Ratio(np.zeros(5), np.zeros(5)), score, resamples=500) == (0.0, 1.0)
    nothing = Ratio(np.zeros(3), np.zeros(3))
    assert nothing.value == 0
    assert bootstrap_interval(nothing) is None


def test_a_run_that_predicts_nothing_differs_from_one_that_predicts() -> None:
    """Its precision was no number, and p 1."""
    n = 12
    right, found = np.full(n, 3.0), np.full(n, 4.0)
    nothing = Ratio(np.zeros(n), np.zeros(n))
    assert permutation_test(nothing, Ratio(right, found)) == pytest.approx(2 / 2**n, abs=0.0005)
    assert permutation_test(nothing, Ratio(right, found)) == permutation_test(Ratio(right, found), nothing)
    few, many = np.zeros(n), np.zeros(n)
    few[0], many[0] = 1.0, 2.0  # one prediction, half of them right: which run made it does not say much
    assert permutation_test(nothing, Ratio(few, many)) == 1.0


def test_questions_about_one_picture_are_drawn_together() -> None:
    """Ten copies of each question are no more evidence than one."""
    generator = np.random.default_rng(4)
    values, other = generator.random(40), generator.random(40) + 0.1
    groups = np.repeat(np.arange(40), 10)
    once, copies = Ratio.mean(values), Ratio.mean(np.repeat(values, 10)).pooled(groups)
    assert copies.value == pytest.approx(once.value)
    assert bootstrap_interval(copies, seed=3) == pytest.approx(bootstrap_interval(once, seed=3))
    pair = Ratio.mean(other), Ratio.mean(np.repeat(other, 10)).pooled(groups)
    assert permutation_test(copies, pair[1]) == permutation_test(once, pair[0])
    uneven = Ratio.mean([1.0, 0.0, 0.0]).pooled(["a", "b", "a"])
    assert (uneven.numerator.tolist(), uneven.denominator.tolist()) == ([1.0, 0.0], [2.0, 1.0])
    assert uneven.value == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(8, 0, 0.0078125), (0, 8, 0.0078125), (5, 15, 0.04138946533203125), (4, 4, 1.0), (0, 0, 1.0), (1, 2, 1.0)],
)
def test_mcnemar_is_a_fair_coin(only_first: int, only_second: int, p: float) -> None:
    first = [True] * only_first + [False] * only_second + [True, False, True]
    second = [False] * only_first + [True] * only_second + [True, False, True]
    outcome = mcnemar(first, second)
    assert (outcome.only_first, outcome.only_second) == (only_first, only_second)
    assert outcome.p == p


def test_mcnemar_of_thousands_neither_overflows_nor_takes_long() -> None:
    n = 40_000
    outcome = mcnemar([True] * 19_700 + [False] * 20_300, [False] * 19_700 + [True] * 20_300)
    z = (20_300 - 19_700 - 1) / math.sqrt(n)
    assert outcome.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert mcnemar([True] * 3000, [False] * 3000).p < 1e-300


def all_exchanges(first: Ratio, second: Ratio) -> float:
    """The exact p: every way to exchange the two runs' results."""
    seen = abs(first.value - second.value)
    as_far = 0
    for signs in itertools.product([False, True], repeat=len(first)):
        one = Ratio(
            np.where(signs, second.numerator, first.numerator), np.where(signs, second.denominator, first.denominator)
        )
        other = Ratio(
            np.where(signs, first.numerator, second.numerator), np.where(signs, first.denominator, second.denominator)
        )
        as_far += abs(one.value - other.value) >= seen - 1e-12
    return as_far / 2 ** len(first)


def test_the_permutation_test_is_the_exact_one_but_for_chance() -> None:
    better = Ratio.mean([0.3, 0.5, 0.4, 0.7, 0.2, 0.6, 0.9, 0.8])
    worse = Ratio.mean([0.2, 0.1, 0.3, 0.2, 0.1, 0.5, 0.3, 0.2])
    assert all_exchanges(better, worse) == 2 / 256
    assert permutation_test(better, worse, resamples=40_000) == pytest.approx(2 / 256, abs=0.0015)

    generator = np.random.default_rng(4)  # F1-like: both sums differ between the runs
    first = Ratio(generator.integers(0, 9, 9) * 2.0, generator.integers(9, 20, 9) * 1.0)
    second = Ratio(generator.integers(2, 12, 9) * 2.0, generator.integers(12, 26, 9) * 1.0)
    exact = all_exchanges(first, second)
    assert 0.01 < exact < 0.99
    assert permutation_test(first, second, resamples=40_000) == pytest.approx(exact, abs=0.01)
    assert permutation_test(second, first, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_the_permutation_test_at_its_ends() -> None:
    values = Ratio.mean(np.random.default_rng(5).random(300))
    assert permutation_test(values, values) == 1.0
    far = Ratio.mean(values.numerator + 1)
    assert permutation_test(values, far, resamples=999) == 1 / 1000  # never 0


def test_under_the_hypothesis_p_is_uniform() -> None:
    generator = np.random.default_rng(6)
    p = [
        permutation_test(Ratio.mean(generator.random(40)), Ratio.mean(generator.random(40)), resamples=300, seed=seed)
        for seed in range(300)
    ]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_a_difference_is_resampled_in_pairs() -> None:
    generator = np.random.default_rng(7)
    base = generator.random(500)
    first, second = Ratio.mean(base), Ratio.mean(base + generator.normal(0.05, 0.02, 500))
    low, high = difference_interval(first, second)
    assert (low, high) == pytest.approx(bootstrap_interval(Ratio.mean(second.numerator - first.numerator)), abs=2e-4)
    assert high - low < 0.005  # unpaired, it would be ten times as wide
    assert difference_interval(first, first) is None
    assert difference_interval(first, Ratio.mean(base + 1)) is None


def test_pairs_need_the_same_examples() -> None:
    for function in (permutation_test, difference_interval):
        with pytest.raises(ValueError, match=r"paired tests need the same examples, got 2 and 3"):
            function(Ratio.mean([1, 2]), Ratio.mean([1, 2, 3]))
    with pytest.raises(ValueError, match=r"got 1 and 2"):
        mcnemar([True], [True, False])


def test_numbers_in_words() -> None:
    assert [signed(value, 2) for value in (1.234, -1.235, 0.004, -0.004, 0)] == [
        "+1.23",
        "−1.24",
        "0.00",
        "0.00",
        "0.00",
    ]
    assert [p_text(p) for p in (1.0, 0.04139, 0.0001, 0.00009)] == ["1.0000", "0.0414", "0.0001", "< 0.0001"]


# ------------------------------------------------------------------------------------------------------------ the world

SUBJECTS = ("natural science", "social science", "language science")


def write_problems(folder: Path) -> None:
    """Thirty questions; every third has a picture, every second a hint, grades are known of half of them."""
    problems = {}
    for number in range(30):
        pid = str(number + 1)
        problems[pid] = {
            "question": f"What is <b>question</b> {pid}?",
            "choices": ["iron & steel", "wood", "wool"][: 2 + number % 2],
            "answer": number % 2,
            "hint": ("Look closely. " * 30 if number % 4 == 0 else "A hint.") if number % 2 == 0 else None,
            "image": "image.png" if number % 3 == 0 else None,
            "grade": f"grade{number % 12 + 1}" if number % 2 == 0 else None,
            "subject": SUBJECTS[number % 3],
        }
        if number % 3 == 0:
            place = folder / "images" / "test" / pid / "image.png"
            place.parent.mkdir(parents=True)
            Image.new("RGB", (900, 300), (8 * number, 90, 30)).save(place)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems), "train": ["1", "2"]}))


def score_scienceqa(world: Path, name: str, wrong: int, *more: str) -> Path:
    """The score file of answers of which every `wrong`-th is wrong."""
    answers = {str(n + 1): n % 2 if n % wrong else 1 - n % 2 for n in range(30)}
    predictions = world / f"{name}-answers.json"
    predictions.write_text(json.dumps({"results": answers}))
    out = world / f"{name}.json"
    command = ["--data", str(world / "scienceqa"), "--predictions", str(predictions), "--json", str(out), *more]
    assert scienceqa.main(command) == 0
    return out


def score_captions(world: Path, name: str, captions: list[str], ciders: list[float], **more: object) -> Path:
    """What eval.caption writes: its own needs Java, and is tested elsewhere."""
    annotations = world / "dataset_tiny.json"
    record = {
        "Bleu_1": 0.5,
        "Bleu_4": 0.2,
        "METEOR": None,
        "CIDEr": float(np.mean(ciders)),
        "split": "test",
        "tokenizer": "plain",
        "left_out": {"METEOR": "it needs Java"},
        "task": "caption",
        "version": 1,
        "model": {"llama": "tiny", "adapter": name, "beams": 1, "shots": 0},
        "command": f"python -m eval.caption --annotations {annotations} --adapter {name}",
        "git_commit": "0" * 40,
        "data_hash": file_sha256(annotations) if annotations.exists() else "0" * 64,
        "examples": [
            {"image": f"{number}.jpg", "caption": caption, "CIDEr": cider}
            for number, (caption, cider) in enumerate(zip(captions, ciders, strict=True))
        ],
        **more,
    }
    path = world / f"scores-{name}.json"
    path.write_text(json.dumps(record))
    return path


EVIL = '</p><script>alert("x")</script><img src=http://evil.example/x.png> & “ok”'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score files of every task: two runs each of ScienceQA, captions, questions and entities."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "scienceqa").mkdir()
    write_problems(folder / "scienceqa")
    score_scienceqa(folder, "good", 10)
    score_scienceqa(folder, "poor", 2)

    images = [
        {
            "filename": f"{n}.jpg",
            "imgid": n,
            "split": "test",
            "sentences": [{"raw": f"Sentence {n} {k}"} for k in range(2)],
        }
        for n in range(12)
    ]
    (folder / "dataset_tiny.json").write_text(json.dumps({"images": images}))
    (folder / "pictures").mkdir()
    for n in range(12):
        Image.new("RGB", (60, 40), (20 * n, 60, 60)).save(folder / "pictures" / f"{n}.jpg")
    score_captions(folder, "a", [EVIL if n == 11 else f"caption {n}" for n in range(12)], [n / 10 for n in range(12)])
    score_captions(folder, "b", [f"other {n}" for n in range(12)], [n / 10 + 0.01 * (n % 5) for n in range(12)])

    rows = [
        {"id": f"q{n}", "question": f"How many {n}?", "answer": str(n) if n % 2 else f"word {n}"} for n in range(20)
    ]
    (folder / "gold.json").write_text(json.dumps(rows))
    for name, every in (("yes", 4), ("no", 2)):
        answers = {row["id"]: "nothing" if n % every == 0 else row["answer"] for n, row in enumerate(rows)}
        (folder / f"qa-{name}-answers.json").write_text(json.dumps(answers))
        command = ["--gold", str(folder / "gold.json"), "--predictions", str(folder / f"qa-{name}-answers.json")]
        assert qa.main([*command, "--json", str(folder / f"qa-{name}.json")]) == 0

    write_hipe(folder / "gold.tsv", lambda document, label: label)
    write_hipe(folder / "ner-one-test.tsv", lambda document, label: "O" if "loc" in label and document % 2 else label)
    write_hipe(folder / "ner-two-test.tsv", lambda document, label: label.replace("pers", "org"))
    for name in ("one", "two"):
        command = ["--gold", str(folder / "gold.tsv"), "--predictions", str(folder / f"ner-{name}-test.tsv")]
        assert ner.main([*command, "--json", str(folder / f"ner-{name}.json")]) == 0

    score_losses(folder, "instruct-one", 0.9)
    score_losses(folder, "instruct-two", 0.8)
    return folder


def write_hipe(path: Path, change) -> None:
    lines = ["TOKEN\tNE-COARSE-LIT"]
    for document in range(6):
        lines += [f"# hipe2022:document_id = d{document}"]
        for word, label in (("Paris", "B-loc"), ("est", "O"), ("Anna", "B-pers"), ("Ida", "I-pers"), ("Rome", "B-loc")):
            lines.append(f"{word}\t{change(document, label)}")
        lines.append("")
    path.write_text("\n".join(lines) + "\n")


def score_losses(folder: Path, name: str, factor: float, tokens: int = 5) -> Path:
    generator = np.random.default_rng(8)
    rows = [
        {"where": f"row {n}", "tokens": tokens + n, "loss": factor * base, "base_loss": base}
        for n, base in enumerate(generator.uniform(1, 2, 15).tolist())
    ]
    total = sum(row["tokens"] for row in rows)
    loss, base = (sum(row[key] * row["tokens"] for row in rows) / total for key in ("loss", "base_loss"))
    record = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "base_loss": base,
        "base_perplexity": math.exp(base),
        "difference": loss - base,
        "task": "instruct",
        "version": 1,
        "held_out": 15,
        "seed": 0,
        "adapter": name,
        "base": "tiny",
        "template": "alpaca",
        "command": "python -m eval.instruct",
        "data_hash": ["1" * 64],
        "predictions": rows,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record))
    return path


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Markdown of the command, which must succeed without a word on standard error."""
    assert main([*map(str, arguments), "--resamples", "400"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    assert main([*map(str, arguments), "--resamples", "400"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def changed(path: Path, out: Path, **fields: object) -> Path:
    """A score file with other fields, at another place."""
    record = {**json.loads(path.read_text()), **fields}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record))
    return out


def table(markdown: str, first: str) -> list[list[str]]:
    """Rows of the Markdown table whose head begins with `first`, in cells."""
    lines = markdown.split("\n")
    start = lines.index(next(line for line in lines if line.startswith(first)))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


# ------------------------------------------------------------------------------------------------------------- Markdown


def test_the_table_has_every_class_with_its_interval(world: Path, capsys) -> None:
    text = report(capsys, f"ours={world / 'good.json'}", f"theirs={world / 'poor.json'}")
    head, _, counts, ours, theirs = table(text, "| run | how |")
    assert head == ["run", "how", "avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"]
    assert counts[:4] == ["*questions*", "", "30", "10"]
    assert ours[:2] == ["ours", "answers from a file"]
    assert ours[2].startswith("90.00 [")
    assert theirs[2].startswith("50.00 [")
    low, high = bootstrap_interval(Ratio.share(27, 30, factor=100.0), resamples=400)
    assert ours[2] == f"90.00 [{low:.1f}, {high:.1f}]"
    assert "G1-6, G7-12 are over the 15 of 30 questions whose grade is known." in text
    assert "Published scores are over other test sets than this one: ScienceQA test" in text


def test_runs_are_tested_against_the_first_with_mcnemar(world: Path, capsys) -> None:
    """Every tenth is wrong in one run and every second in the other: of 30, 12 are right in the first alone."""
    text = report(capsys, f"first={world / 'good.json'}", f"second={world / 'poor.json'}")
    rows = table(text, "| run | score | difference |")[2:]
    assert len(rows) == 1  # without --data nobody knows which questions are in a class
    assert rows[0][:2] == ["second", "avg"]
    assert rows[0][2].startswith("−40.00 [−")
    assert rows[0][3:] == [p_text(2 / 2**12), "McNemar, exact (only this one right: 0; only the first: 12)"]


def test_with_the_data_classes_are_tested_too(world: Path, capsys) -> None:
    text = report(capsys, world / "good.json", world / "poor.json", "--data", world / "scienceqa")
    rows = {row[1]: row for row in table(text, "| run | score | difference |")[2:]}
    assert list(rows) == ["avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"]
    # NAT is every third question from the first: of 0, 3, ..., 27 those that 2 divides and 10 does not.
    assert "only this one right: 0; only the first: 4)" in rows["NAT"][4]


def test_intervals_by_class_are_the_same_with_and_without_the_data(world: Path) -> None:
    runs = read_runs([str(world / "good.json")])
    bare = build(runs, resamples=300).rows[0].cells
    known = build(runs, data=world / "scienceqa", resamples=300).rows[0].cells
    assert len(bare) == 9
    assert bare == known


def test_the_order_of_the_second_run_does_not_matter(world: Path, tmp_path: Path, capsys) -> None:
    """Examples are paired by id: in file order, a shuffled file would be compared with other questions."""
    examples = json.loads((world / "poor.json").read_text())["predictions"]
    shuffled = changed(world / "poor.json", tmp_path / "poor.json", predictions=examples[::-1])
    texts = [report(capsys, world / "good.json", f"second={path}") for path in (world / "poor.json", shuffled)]
    first, second = (table(text, "| run | score | difference |") for text in texts)
    assert first == second


def test_captions_have_an_interval_where_images_add_up(world: Path, capsys) -> None:
    text = report(capsys, world / "scores-a.json", world / "scores-b.json")
    head, _, a, _ = table(text, "| run | how |")
    assert head == ["run", "how", "BLEU-1", "BLEU-4", "CIDEr"]
    assert a[:4] == ["a", "greedy", "0.5000", "0.2000"]
    assert re.fullmatch(r"0\.5500 \[0\.\d{3}, 0\.\d{3}\]", a[4])
    assert "BLEU-1, BLEU-4: without interval and test" in text
    assert "METEOR was left out of a, b: it needs Java." in text
    rows = table(text, "| run | score | difference |")[2:]
    assert [row[:2] + row[4:] for row in rows] == [["b", "CIDEr", "sign permutation"]]
    # Nine of twelve images are better and none is worse, so few of the 2^9 exchanges come as far.
    assert float(rows[0][3]) < 0.02


def test_captions_with_counts_have_intervals_and_tests_throughout(world: Path, tmp_path: Path, capsys) -> None:
    """BLEU and METEOR are of sums over images; beside an older file without the counts only the tests are missing."""
    references = [
        ["a dog runs on the wet grass", "the dog runs"],
        ["two cats sleep on a bed"],
        ["a man rides a wave"],
    ] * 4
    paths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_metrics, "java_version", lambda: None)
        for name, captions in (
            ("new", ["a dog runs on grass", "two cats sleep on a bed", "a man on a big wave"] * 4),
            ("other", ["a dog on the grass", "a cat", "a man rides a big wave"] * 4),
        ):
            scores = caption_metrics.score_captions(references, captions)
            lines = {"METEOR_statistics": f"5 7 2 3 3 3 1 1 {'0 ' * 12}2 4 4"}
            examples = [{"image": f"{n}.jpg", "caption": "x", **lines, **own} for n, own in enumerate(scores.of_image)]
            examples[0]["METEOR_statistics"] = f"7 7 3 3 4 4 3 3 {'0 ' * 12}1 7 7"  # its own reference
            sums = {name: own.value for name, own in caption_sums(examples).items()}
            paths.append(score_captions(tmp_path, name, ["x"], [0.0], examples=examples, left_out={}, **sums))
    text = report(capsys, *paths)
    head, _, new, _ = table(text, "| run | how |")
    assert head[2:] == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    for cell in new[2:]:
        assert re.fullmatch(r"\d\.\d{4} \[\d\.\d{3}, \d\.\d{3}\]", cell)
    low, high = (float(end) for end in re.findall(r"\d\.\d{3}\b", new[5].partition(" ")[2]))
    assert low < float(new[5].split()[0]) < high
    assert "without interval and test" not in text
    tests = {row[1]: row[4] for row in table(text, "| run | score | difference |")[2:]}
    means = {"ROUGE-L", "CIDEr"}
    assert tests == {name: "sign permutation" if name in means else "approximate randomisation" for name in head[2:]}
    examples = [{"image": own["image"], "caption": "x"} for own in json.loads(paths[1].read_text())["examples"]]
    text = report(capsys, paths[0], changed(paths[1], tmp_path / "old.json", examples=examples))
    assert "## Against" not in text
    broken = json.loads(paths[0].read_text())["examples"]
    broken[3]["METEOR_statistics"] = "1 2 3"
    error = refused(capsys, changed(paths[0], tmp_path / "broken.json", examples=broken))
    assert "is not as eval.caption writes it (TypeError('expected 23 numbers of each image'))" in error


def test_questions_entities_and_losses(world: Path, capsys) -> None:
    text = report(capsys, world / "qa-yes.json", world / "qa-no.json")
    assert table(text, "| run | how |")[0] == ["run", "how", "exact match", "F1"]
    tests = {row[1]: row for row in table(text, "| run | score | difference |")[2:]}
    assert tests["exact match"][4] == "McNemar, exact (only this one right: 0; only the first: 5)"

    text = report(capsys, world / "ner-one.json", world / "ner-two.json")
    rows = table(text, "| run | how |")
    assert rows[0][2:] == ["strict P", "strict R", "strict F1", "fuzzy P", "fuzzy R", "fuzzy F1"]
    assert rows[2][2] == "1.0000"  # all documents agree: no interval
    assert rows[2][4].startswith("0.8000 [")
    tests = {row[1]: row for row in table(text, "| run | score | difference |")[2:]}
    assert tests["strict F1"][4] == "approximate randomisation"
    assert "all documents agree on has no interval" in text

    text = report(capsys, world / "instruct-one.json", world / "instruct-two.json")
    rows = table(text, "| run | how |")
    loss, perplexity = (re.match(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", cell) for cell in rows[2][2:4])
    for place in (1, 2, 3):
        assert float(perplexity[place]) == pytest.approx(math.exp(float(loss[place])), rel=2e-3)
    assert [row[1] for row in table(text, "| run | score | difference |")[2:]] == ["loss a token"]


def test_questions_are_resampled_and_tested_by_their_pictures(world: Path, tmp_path: Path, capsys) -> None:
    def with_pictures(name: str, per_picture: int) -> Path:
        examples = json.loads((world / f"{name}.json").read_text())["predictions"]
        own = [{**example, "image": f"{n // per_picture}.jpg"} for n, example in enumerate(examples)]
        return changed(world / f"{name}.json", tmp_path / f"{name}.json", predictions=own)

    text = report(capsys, *(with_pictures(name, 3) for name in ("qa-yes", "qa-no")))
    assert "the percentile bootstrap over pictures, each with all its questions (400 resamples" in text
    assert "Tests are paired by picture, two-sided" in text
    rows = table(text, "| run | score |")[2:]
    assert {row[4] for row in rows} == {"sign permutation by picture"}
    alone = report(capsys, *(with_pictures(name, 1) for name in ("qa-yes", "qa-no")))
    assert "bootstrap over questions (" in alone
    assert "McNemar, exact" in alone, "a picture each: nothing goes together"


def test_a_run_without_entities_is_tested(world: Path, tmp_path: Path, capsys) -> None:
    write_hipe(tmp_path / "nothing.tsv", lambda document, label: "O")
    command = ["--gold", str(world / "gold.tsv"), "--predictions", str(tmp_path / "nothing.tsv")]
    assert ner.main([*command, "--json", str(tmp_path / "nothing.json")]) == 0
    capsys.readouterr()
    rows = table(report(capsys, tmp_path / "nothing.json", world / "ner-one.json"), "| run | score |")[2:]
    assert [row[1] for row in rows][:3] == ["strict P", "strict R", "strict F1"]
    assert all(float(row[3]) < 0.1 for row in rows[:3]), "6 documents: 2 of 64 exchanges are as far apart"


def test_what_the_commonest_answer_gets_is_said(world: Path, tmp_path: Path, capsys) -> None:
    constant = {"answer": "<2>", "exact_match": 12.0, "f1": 12.346, "wups_0.9": None, "total": 20}
    text = report(capsys, changed(world / "qa-yes.json", tmp_path / "x.json", constant=constant))
    assert r"The commonest training answer, “\<2\>”, to every question: exact match 12.00, F1 12.35." in text


def test_entities_are_counted_by_type(world: Path) -> None:
    """The score file's documents have counts over all types only; a type's come from their entities."""
    (row,) = build(read_runs([str(world / "ner-one.json")]), resamples=300).rows
    assert row.cells["strict.F1 of LOC"].value == pytest.approx(2 / 3)
    low, high = row.cells["strict.F1 of LOC"].interval
    assert low < 2 / 3 < high
    assert row.cells["strict.F1 of PER"].interval is None


def test_how_a_model_was_asked(world: Path, tmp_path: Path, capsys) -> None:
    likely = {"score": "likelihood", "normalise": "mean", "format": "QCM-A", "adapter": "runs/x", "shots": ["1", "2"]}
    letter = {
        "score": "letter",
        "normalise": None,
        "format": "QCM-ALE",
        "adapter": "none",
        "llama": "tiny",
        "shots": [],
    }
    one = changed(world / "good.json", tmp_path / "one.json", model=likely, adapter="runs/x")
    two = changed(world / "poor.json", tmp_path / "two.json", model=letter, adapter="none", unparsed=3)
    one, two = (changed(path, path, on_unparsed="random") for path in (one, two))
    text = report(capsys, one, two)
    rows = table(text, "| run | how |")
    assert rows[3][:2] == [
        "runs/x, 2 shots",
        "scored by likelihood (mean), QCM-A, 2 shots, unparsed drawn at random",
    ]
    assert rows[4][:2] == ["tiny alone", "scored by letter, QCM-ALE, 3 unparsed, unparsed drawn at random"]
    assert "By likelihood: the answer is" in text
    assert "By letter: the answer is" in text


def test_runs_of_one_name_are_told_apart(world: Path, tmp_path: Path, capsys) -> None:
    same = changed(world / "scores-a.json", tmp_path / "scores-greedy.json")
    rows = table(report(capsys, world / "scores-a.json", same), "| run | how |")
    assert [row[0] for row in rows[2:]] == ["a (scores-a)", "a (scores-greedy)"]
    rows = table(report(capsys, world / "scores-a.json", world / "scores-a.json"), "| run | how |")
    assert len(rows) == 4


def test_texts_of_files_are_no_markdown(world: Path, tmp_path: Path, capsys) -> None:
    path = changed(world / "scores-a.json", tmp_path / "x.json")
    text = report(capsys, f"a | *b* <script>={path}")
    assert table(text, "| run | how |")[2][0] == r"a \| \*b\* \<script\>"


# ----------------------------------------------------------------------------------------------------- published scores


def test_published_figures_are_consistent() -> None:
    """A slip of the pen in Table 2: avg is the mean of NAT, SOC and LAN over 2,252, 889 and 1,100 questions."""
    rows = next(one for one in TABLES if one.name == "scienceqa-test").rows
    assert len(rows) == 17
    averages = {row.model: row.scores for row in rows if len(row.scores) == 1}
    assert averages == {"LLaMA-7B, zero-shot, text": {"avg": "40.32"}, "LLaMA-7B, 3 shots, text": {"avg": "43.69"}}
    for row in rows:
        if row.model in averages:
            continue
        scores = {name: float(text) for name, text in row.scores.items()}
        assert len(scores) == 9
        by_subject = (2252 * scores["NAT"] + 889 * scores["SOC"] + 1100 * scores["LAN"]) / 4241
        by_grade = (2724 * scores["G1-6"] + 1517 * scores["G7-12"]) / 4241
        if row.model != "random":  # of guesses, every class was drawn by itself
            assert by_subject == pytest.approx(scores["avg"], abs=0.02)
        assert by_grade == pytest.approx(scores["avg"], abs=0.1)
    assert rows[-1].scores["avg"] == "85.19"
    for one in TABLES:
        assert all(row.source and all(float(text) >= 0 for text in row.scores.values()) for row in one.rows)
    entities = next(one for one in TABLES if one.task == "ner").rows
    for row in entities:
        precision, recall, f1 = (float(row.scores[f"strict.{name}"]) for name in ("P", "R", "F1"))
        assert 2 * precision * recall / (precision + recall) == pytest.approx(f1, abs=0.001)


def test_published_rows_stand_beside_runs_over_their_test_set_only(world: Path, tmp_path: Path, capsys) -> None:
    (run,) = read_runs([str(ROOT / "assets/adapters/scienceqa/scores-test.json")])
    assert published_table(run, None)[0].name == "scienceqa-test"
    assert published_table(run, "none") == (None, "")
    (held_out,) = read_runs([str(ROOT / "assets/adapters/scienceqa/scores-held-out.json")])
    chosen, why = published_table(held_out, None)
    assert chosen is None
    assert "other test sets than this one: ScienceQA test (--published scienceqa-test)" in why
    (captions,) = read_runs([str(ROOT / "assets/adapters/caption/scores-test.json")])
    assert published_table(captions, None)[0].name == "flickr8k-test"
    assert published_table(read_runs([str(world / "instruct-one.json")])[0], None)[0] is None

    text = report(capsys, world / "good.json", "--published", "scienceqa-test")
    rows = table(text, "| run | how |")
    assert rows[-1][0] == "*published:* LLaMA-Adapter (1)"
    assert rows[-1][1:4] == ["1.8M trained", "85.19", "84.37"]
    zero_shot = next(row for row in rows if "zero-shot" in row[0])
    assert zero_shot[1:] == ["nothing trained", "40.32", *[""] * 8]
    assert "(1) LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199, Table 2" in text
    message = refused(capsys, world / "good.json", "--published", "nonsense")
    assert "no published table 'nonsense' for the task scienceqa; there is: scienceqa-test" in message


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("poor", {"data_hash": {"problems.json": "f" * 64}}, "scored on other data (SHA-256 ffffffffffff against "),
        ("poor", {"split": "val"}, "scored on split val, the other on test"),
        ("poor", {"held_out": 30}, "it holds out 30 rows, the other none"),
        ("poor", {"limit": 30}, "scored with --limit 30, the other with none"),
        ("poor", {"version": 1}, "scored by version 1 of the task, the other by 2"),
        ("scores-b", {"version": 2}, "scored by version 2 of the task, the other by 1"),
        ("scores-b", {"tokenizer": "ptb"}, "cut into words by the tokenizer ptb, the other's by plain"),
        ("poor", {"on_unparsed": "random"}, "that name no choice count as random, the other's as wrong"),
        ("poor", {"data_hash": None}, "it does not say on which data it was scored (no data_hash)"),
        ("poor", {"version": None}, "it does not say by which version of its task it was scored (no version)"),
        ("ner-two", {"column": "NE-FINE-LIT"}, "its entities are of column NE-FINE-LIT, the other's of NE-COARSE-LIT"),
    ],
)
def test_runs_over_different_test_sets_are_not_compared(world: Path, tmp_path, capsys, name, fields, message) -> None:
    first = {"poor": "good", "scores-b": "scores-a", "ner-two": "ner-one"}[name]
    other = changed(world / f"{name}.json", tmp_path / "other.json", **fields)
    error = refused(capsys, world / f"{first}.json", other)
    assert message in error
    assert f"{other} cannot be compared with " in error
    assert report(capsys, other), "alone it has nothing to be compared with"


def test_a_version_that_reads_texts_otherwise_is_the_same_without_texts(world: Path, tmp_path: Path, capsys) -> None:
    one = changed(world / "good.json", tmp_path / "one.json", version=1, model={"score": "likelihood"})
    two = changed(world / "poor.json", tmp_path / "two.json", model={"score": "letter"})
    assert report(capsys, one, two)
    changed(one, one, model={"score": "letter"})
    assert "scored by version 2 of the task, the other by 1" in refused(capsys, one, two)
    labels = changed(world / "ner-one.json", tmp_path / "labels.json", version=1)
    assert report(capsys, labels, world / "ner-two.json")
    changed(labels, labels, texts=6)
    assert "scored by version 2 of the task, the other by 1" in refused(capsys, labels, world / "ner-two.json")


def test_runs_that_both_lack_what_decides_are_not_compared(world: Path, tmp_path: Path, capsys) -> None:
    """Two files without a hash are not of the same data: nobody knows."""
    one, two = (changed(world / f"{name}.json", tmp_path / f"{name}.json", data_hash=None) for name in ("good", "poor"))
    assert f"{one} cannot be compared with other runs: it does not say on which data" in refused(capsys, one, two)
    record = json.loads((world / "poor.json").read_text())
    del record["on_unparsed"]  # older files always counted them as wrong
    (tmp_path / "older.json").write_text(json.dumps(record))
    assert report(capsys, world / "good.json", tmp_path / "older.json")


def test_pictures_are_part_of_what_runs_share(world: Path, tmp_path: Path, capsys) -> None:
    def run(name: str, **fields: object) -> Path:
        source = world / ("scores-a.json" if name == "one" else "scores-b.json")
        return changed(source, tmp_path / f"{name}.json", **fields)

    one = run("one", images_hash="a" * 64)
    error = refused(capsys, one, run("other", images_hash="b" * 64))
    assert "its model saw other pictures (SHA-256 bbbbbbbbbbbb against aaaaaaaaaaaa)" in error
    note = "saw the pictures that one saw cannot be told"
    assert note not in report(capsys, f"one={one}", run("same", images_hash="a" * 64))
    assert note in report(capsys, f"one={one}", run("older"))
    assert note in report(capsys, f"one={one}", run("file", images_hash=None, predictions_hash="c" * 64))
    assert note not in report(capsys, f"one={one}", run("blind", images_hash=None, predictions_hash=None))
    assert note not in report(capsys, f"one={run('one')}", run("older"))


@pytest.mark.parametrize(
    ("names", "field", "value", "message"),
    [
        (("qa-yes", "qa-no"), "question", "Another?", "question of example q0 is 'Another?', the other's is 'How many"),
        (("qa-yes", "qa-no"), "references", ["7"], "references of example q0 is ['7'], the other's is ['word 0']"),
        (("ner-one", "ner-two"), "gold", [], "gold of example d0 is [], the other's is [{"),
    ],
)
def test_references_are_part_of_what_runs_share(world, tmp_path, capsys, names, field, value, message) -> None:
    """Files that were edited, or of gold files that differ where their hash was not kept."""
    first, second = (world / f"{name}.json" for name in names)
    examples = json.loads(second.read_text())["predictions"]
    examples[0][field] = value
    assert message in refused(capsys, first, changed(second, tmp_path / "other.json", predictions=examples))


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("good", {"model": [1]}, "model must be an object, got [1]"),
        ("good", {"task": ["q"]}, "it holds task ['q']"),
        ("good", {"avg": "90"}, "avg must be a number, got '90'"),
        ("good", {"n": 3}, "n must be an object, got 3"),
        ("good", {"adapter": 3}, "adapter must be a text, got 3"),
        ("good", {"shots": "many"}, "shots must be a number, got 'many'"),
        ("good", {"model": {"shots": "many"}}, "model shots must be a list, got 'many'"),
        ("scores-a", {"CIDEr": "1.0"}, "CIDEr must be a number, got '1.0'"),
        ("qa-yes", {"f1": {}}, "f1 must be a number, got {}"),
        ("qa-yes", {"by_type": {"number": {"f1": "x"}}}, "by_type number f1 must be a number, got 'x'"),
        ("ner-one", {"strict": {"ALL": []}}, "strict ALL must be an object, got []"),
        ("instruct-one", {"loss": "low"}, "loss must be a number, got 'low'"),
    ],
)
def test_a_damaged_score_file_is_named(world: Path, tmp_path: Path, capsys, name, fields, message) -> None:
    bad = changed(world / f"{name}.json", tmp_path / "bad.json", **fields)
    for runs in ([bad], [world / f"{name}.json", bad]):
        error = refused(capsys, *runs)
        assert f"error: {bad}" in error
        assert message in error
        assert "--debug" not in error


def test_damaged_examples_are_named(world: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "scores-x.json"
    bad.write_text(DEEP)
    assert f"error: {bad} is not JSON" in refused(capsys, bad)
    record = json.loads((world / "qa-yes.json").read_text())
    examples = record.pop("predictions")
    bad.write_text(json.dumps(record))
    (tmp_path / "predictions-x.jsonl").write_text(DEEP)
    assert f"error: {tmp_path / 'predictions-x.jsonl'}, line 1 is not JSON" in refused(capsys, bad)
    examples[3]["f1"] = "high"
    changed(bad, bad, predictions=examples)
    assert f"error: {bad}: an example or score is not as eval.qa writes it" in refused(capsys, bad)


def test_rows_held_out_by_different_seeds_are_not_compared(world: Path, tmp_path: Path, capsys) -> None:
    one = changed(world / "good.json", tmp_path / "one.json", held_out=30, seed=0)
    two = changed(world / "poor.json", tmp_path / "two.json", held_out=30, seed=1)
    assert "held out by seed 1, the other's by 0" in refused(capsys, one, two)
    # Where nothing is held out, the seed is of something else.
    free = changed(world / "poor.json", tmp_path / "three.json", seed=1)
    assert report(capsys, world / "good.json", free)


def test_other_examples_are_named(world: Path, tmp_path: Path, capsys) -> None:
    examples = json.loads((world / "poor.json").read_text())["predictions"]
    part = [{**example, "pid": f"x{example['pid']}"} if n == 0 else example for n, example in enumerate(examples)]
    other = changed(world / "poor.json", tmp_path / "other.json", predictions=part)
    error = refused(capsys, world / "good.json", other)
    assert f"1 example (x1) only in {other}; 1 example (1) only in {world / 'good.json'}" in error


def test_other_tasks_and_other_tokens_are_not_compared(world: Path, tmp_path: Path, capsys) -> None:
    error = refused(capsys, world / "good.json", world / "scores-a.json")
    assert "its task is caption, the other's scienceqa" in error
    longer = score_losses(tmp_path, "longer", 0.9, tokens=6)
    assert "its loss is over 195 tokens, the other's over 180" in refused(capsys, world / "instruct-one.json", longer)


def test_what_is_no_score_file_is_refused(world: Path, tmp_path: Path, capsys) -> None:
    cases = {
        "list.json": ("[1]", "is no score file of scienceqa, caption, qa, ner, instruct: it holds list"),
        "speed.json": ('{"task": "speed"}', "it holds task 'speed'"),
        "text.json": ("hello", "is not JSON"),
        "empty.json": ('{"task": "qa", "predictions": []}', "must be a list of objects that is not empty"),
        "bare.json": (
            '{"task": "qa"}',
            "neither predictions-bare.jsonl nor captions-bare.jsonl beside it; score anew with --json",
        ),
        "no-id.json": ('{"task": "caption", "examples": [{"caption": "x"}]}', "example 1 has no image; score anew"),
        "number.json": (
            '{"task": "caption", "examples": [{"image": 3, "caption": "x"}]}',
            "no image that is text, got 3",
        ),
        "twice.json": (
            '{"task": "caption", "examples": [{"image": "x", "caption": ""}, {"image": "x", "caption": ""}]}',
            "1 image (x) of more than one example",
        ),
        "half.json": (
            '{"task": "scienceqa", "examples": [{"pid": "1", "answer": 0, "correct": true}]}',
            "an example or score is not as eval.scienceqa writes it (KeyError('n'))",
        ),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        assert message in refused(capsys, tmp_path / name), name
    assert "there is no file" in refused(capsys, tmp_path / "absent.json")


def test_examples_must_give_the_score(world: Path, tmp_path: Path, capsys) -> None:
    """predictions-X.jsonl of another run beside scores-X.json would give intervals around another score."""
    other = changed(world / "good.json", tmp_path / "other.json", avg=93.3)
    assert "its examples give avg 90, the file says 93.3; do they belong together?" in refused(capsys, other)


@pytest.mark.parametrize("sibling", ["predictions-test.jsonl", "captions-test.jsonl"])
def test_examples_beside_the_score_file(world: Path, tmp_path: Path, capsys, sibling: str) -> None:
    record = json.loads((world / "good.json").read_text())
    lines = [json.dumps(example) for example in record.pop("predictions")]
    (tmp_path / "scores-test.json").write_text(json.dumps(record))
    (tmp_path / sibling).write_text("\n".join(lines) + "\n")
    run = f"x={tmp_path / 'scores-test.json'}"
    assert table(report(capsys, run), "| run")[3] == table(report(capsys, f"x={world / 'good.json'}"), "| run")[3]
    (tmp_path / sibling).write_text("\n".join(lines[:-1]) + '\n{"pid": "30"')
    assert f"{sibling}, line 30 is not JSON" in refused(capsys, run)


def test_other_data_are_refused(world: Path, tmp_path: Path, capsys) -> None:
    write_problems(tmp_path)
    (tmp_path / "problems.json").write_text((tmp_path / "problems.json").read_text() + "\n")
    error = refused(capsys, world / "good.json", "--data", tmp_path)
    assert f"{tmp_path} is not what {world / 'good.json'} was scored on: its SHA-256 is another" in error
    error = refused(capsys, world / "qa-yes.json", "--data", world / "gold.json")
    assert "--data is for scores of eval.scienceqa and eval.caption" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resamples", "10"], "--resamples must be at least 100"),
        (["--gallery", "-1"], "--gallery must be at least 0"),
        (["--images", "x"], "--images is for the page; it goes with --html"),
        (["--html", "folder"], "--html must name a file that ends in .html, got folder"),
        (["--out", "x.json"], "--out must name a file that ends in .md, got x.json"),
    ],
)
def test_misuse(world: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(world / "good.json"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_is_left_behind_by_a_refusal(world: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "report.md"
    refused(capsys, world / "good.json", world / "scores-a.json", "--out", out, "--html", out.with_suffix(".html"))
    assert list(out.parent.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- the page

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """A page as its elements; a tag that is not closed, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(capsys, tmp_path: Path, *arguments: object) -> tuple[Page, str]:
    out = tmp_path / "page.html"
    report(capsys, *arguments, "--html", out)
    text = out.read_text(encoding="utf-8")
    return Page(text), text


RUNS_WITH_PAGES = {
    "scienceqa": (["good.json", "poor.json"], ["--data", "scienceqa"]),
    "caption": (["scores-a.json", "scores-b.json"], ["--data", "dataset_tiny.json", "--images", "pictures"]),
    "qa": (["qa-yes.json", "qa-no.json"], []),
    "ner": (["ner-one.json", "ner-two.json"], []),
    "instruct": (["instruct-one.json"], []),
}


@pytest.mark.parametrize("task", RUNS_WITH_PAGES)
def test_the_page_is_whole_and_loads_nothing(world: Path, tmp_path: Path, capsys, task: str) -> None:
    names, options = RUNS_WITH_PAGES[task]
    options = [option if option.startswith("--") else world / option for option in options]
    page, text = page_of(capsys, tmp_path, *(world / name for name in names), *options)
    assert text.startswith("<!doctype html>\n")
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag in ("script", "link", "iframe", "object", "form", "base"):
        assert page.all(tag) == []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("href", "src", "srcset", "xlink:href", "action", "poster"):
                assert value.startswith(("#", "data:image/jpeg;base64,")), f"{tag} {name}={value[:60]}"
    style = "".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for attributes in page.all("a"):
        assert attributes["href"][1:] in ids
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.all("th"))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    told = [attributes.get("role") == "img" and bool(attributes.get("aria-label")) for attributes in page.all("svg")]
    assert any(told) == (task != "instruct")  # the others, of the legend and the axis, are hidden from readers


def test_a_caption_is_text_whatever_it_holds(world: Path, tmp_path: Path, capsys) -> None:
    page, text = page_of(
        capsys, tmp_path, world / "scores-a.json", "--data", world / "dataset_tiny.json", "--images", world / "pictures"
    )
    assert EVIL in [data.strip() for tag, data in page.texts if tag == "dd"]
    assert "<script" not in text
    assert "evil.example" not in " ".join(str(attributes) for _, attributes in page.elements)


def test_names_and_questions_are_escaped_too(world: Path, tmp_path: Path, capsys) -> None:
    run = f'<i>x</i> & "y"={world / "good.json"}'
    page, _ = page_of(capsys, tmp_path, run, "--data", world / "scienceqa")
    assert page.all("i") == []
    assert page.all("b") == []
    assert "What is <b>question</b> 1?" in [data for tag, data in page.texts if tag == "p"]
    labels = [attributes["aria-label"] for attributes in page.all("svg") if "aria-label" in attributes]
    assert any('<i>x</i> & "y" 90.00' in label for label in labels)


def test_pictures_are_small_jpegs_inside(world: Path, tmp_path: Path, capsys) -> None:
    page, _ = page_of(capsys, tmp_path, world / "good.json", "--data", world / "scienceqa", "--gallery", "30")
    images = page.all("img")
    assert len(images) == 30  # ten questions have one, in each of three sections
    for attributes in images:
        packed = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
        with Image.open(io.BytesIO(packed)) as image:
            assert image.format == "JPEG"
            assert image.size == (448, 149) == (int(attributes["width"]), int(attributes["height"]))


def gallery_of(world: Path, *names: str, **options: object):
    settings = {"data": world / "dataset_tiny.json", "images": world / "pictures", "cards": 3, "resamples": 200}
    made = build(read_runs([str(world / name) for name in names]), **{**settings, **options})
    return {section.name: section for section in made.gallery.sections}, made.gallery


def test_the_gallery_shows_best_worst_random_and_what_differs(world: Path) -> None:
    sections, gallery = gallery_of(world, "scores-a.json", "scores-b.json")
    assert list(sections) == ["best", "worst", "random", "apart"]
    assert [card.id for card in sections["best"].cards] == ["11.jpg", "10.jpg", "9.jpg"]
    assert [card.id for card in sections["worst"].cards] == ["0.jpg", "1.jpg", "2.jpg"]
    assert {card.id for card in sections["apart"].cards} <= {"4.jpg", "9.jpg", "3.jpg", "8.jpg"}
    best = sections["best"].cards[1]
    assert best.references == ("Sentence 10 0", "Sentence 10 1")
    assert [(said.label, said.text, said.score) for said in best.said] == [
        ("a", "caption 10", "CIDEr 1.00"),
        ("b", "other 10", "CIDEr 1.00"),
    ]
    assert gallery.lost == ()
    again, _ = gallery_of(world, "scores-a.json", "scores-b.json")
    assert again["random"] == sections["random"]
    other, _ = gallery_of(world, "scores-a.json", "scores-b.json", seed=1)
    assert [card.id for card in other["random"].cards] != [card.id for card in sections["random"].cards]


def test_scienceqa_is_ranked_by_the_probability_of_the_right_option(world: Path, tmp_path: Path) -> None:
    examples = json.loads((world / "good.json").read_text())["predictions"]
    for n, example in enumerate(examples):
        right = n % 2
        sure = 0.6 + n / 100 if example["correct"] else 0.3 - n / 100
        example["probabilities"] = [sure if choice == right else 1 - sure for choice in range(2)]
    path = changed(world / "good.json", tmp_path / "sure.json", predictions=examples)
    made = build(read_runs([str(path)]), data=world / "scienceqa", cards=4, resamples=200)
    best, worst, _ = made.gallery.sections
    assert [card.id for card in best.cards] == ["30", "29", "28", "27"]
    assert [card.id for card in worst.cards][:3] == ["21", "11", "1"]  # wrong, the right option least likely
    assert worst.cards[0].said[0].right is False
    assert worst.cards[0].said[0].text.startswith("(B) ")
    assert worst.cards[0].choices[0] == ("iron & steel", True)
    assert best.about == "Right answers of good-answers.json, the surest first."

    # Beside a run without probabilities, what is apart are right and wrong answers, not sure and unsure ones.
    made = build(read_runs([str(path), str(world / "good.json")]), data=world / "scienceqa", cards=4, resamples=200)
    assert [section.name for section in made.gallery.sections] == ["best", "worst", "random"]


def test_pictures_that_are_missing_leave_text(world: Path, tmp_path: Path, capsys) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "11.jpg").write_text("no picture")
    out = tmp_path / "page.html"
    data = ["--data", str(world / "dataset_tiny.json"), "--images", str(pictures), "--html", str(out)]
    assert main([str(world / "scores-a.json"), *data, "--resamples", "200", "--gallery", "2"]) == 0
    captured = capsys.readouterr()
    assert "no picture 11.jpg: it is not in --images, or cannot be read" in captured.err
    assert "pictures of the gallery were not found or cannot be read" in captured.out
    page = Page(out.read_text())
    assert page.all("img") == []
    assert "caption 10" in [text.strip() for _, text in page.texts]
    assert "there is no folder" in refused(
        capsys, world / "scores-a.json", *data[:2], "--images", tmp_path / "no", *data[4:]
    )


def test_a_score_file_reaches_no_picture_outside_the_folder(world: Path, tmp_path: Path, capsys) -> None:
    """Names of images come from the score file: `../secret.png` would put a private picture into a page to share."""
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "open.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "/nowhere/open.png"]
    examples = [{"image": name, "caption": "x", "CIDEr": n / 2} for n, name in enumerate(names)]
    path = changed(world / "scores-a.json", tmp_path / "x.json", examples=examples, CIDEr=0.5)
    out = tmp_path / "page.html"
    options = ["--images", str(tmp_path / "pictures"), "--html", str(out), "--resamples", "200"]
    assert main([str(path), *options]) == 0
    assert f"no picture {tmp_path / 'secret.png'}: it is not in --images" in capsys.readouterr().err
    page = Page(out.read_text())
    assert len(page.all("article")) == 9
    assert {attributes["alt"] for attributes in page.all("img")} == {"Picture /nowhere/open.png"}


def test_bars_are_as_long_as_the_scores(world: Path, tmp_path: Path, capsys) -> None:
    page, _ = page_of(capsys, tmp_path, world / "good.json", world / "poor.json", "--published", "scienceqa-test")
    widths = [attributes["width"] for attributes in page.all("rect")]
    assert len(widths) == 18
    assert (widths[0], widths[1]) == ("79.200%", "44.000%")  # 90 and 50 percent of an axis of 88
    label = next(attributes["aria-label"] for attributes in page.all("svg") if "aria-label" in attributes)
    assert re.match(r"avg · all: good-answers\.json 90\.00 \[[\d.]+, [\d.]+\]; poor-answers\.json 50\.00 ", label)
    assert label.endswith("; published random 39.83; published LLaMA-Adapter 85.19")
    marks = [attributes["x1"] for attributes in page.all("line") if attributes.get("class") == "mark mark-1"]
    assert marks[0] == "7"  # the legend's
    assert marks[1] == f"{88 * 0.8519:.3f}%"


def test_a_report_without_questions_says_what_to_give(world: Path, tmp_path: Path, capsys) -> None:
    page, _ = page_of(capsys, tmp_path, world / "good.json")
    assert page.all("article") == []
    assert "The questions are not shown: give the data set's folder as --data." in [text for _, text in page.texts]


def test_a_page_without_pictures_or_references_says_what_to_give(world: Path, tmp_path: Path, capsys) -> None:
    pictures, wrote = "The pictures are not shown: give their folder as --images.", "What people wrote is not shown: "
    data = ["--data", world / "dataset_tiny.json"]
    for options, said in (([], [True, True]), (data, [True, False]), (["--images", world / "pictures"], [False, True])):
        _, text = page_of(capsys, tmp_path, world / "scores-a.json", *options)
        assert [pictures in text, f"{wrote}give the captions&#x27; annotations as --data." in text] == said
    examples = [
        {**example, "image": "a.png"} for example in json.loads((world / "qa-yes.json").read_text())["predictions"]
    ]
    seen = changed(world / "qa-yes.json", tmp_path / "seen.json", predictions=examples)
    for path, expected in ((seen, True), (world / "qa-yes.json", False)):
        _, text = page_of(capsys, tmp_path, path)
        assert (pictures in text, wrote in text) == (expected, False)


def test_a_changed_tree_is_said_to_be_one(world: Path, tmp_path: Path, capsys) -> None:
    path = changed(world / "scores-a.json", tmp_path / "x.json", git_commit="1" * 40 + "-dirty")
    assert f"| {'1' * 12}-dirty |" in report(capsys, path)
    assert f"commit {'1' * 8}-dirty" in page_of(capsys, tmp_path, path)[1]


def test_a_browser_shows_the_page_at_every_width(world: Path, tmp_path: Path, capsys) -> None:
    """Texts for screen readers are out of flow: on a phone they once made the page ten times as wide as the screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on PATH")
    page_of(capsys, tmp_path, world / "good.json", world / "poor.json", "--data", world / "scienceqa")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        said: list[str] = []
        for width, scheme in ((390, "dark"), (1280, "light")):
            view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            view.on("console", lambda message: said.append(message.text))
            view.on("request", lambda request: said.append(request.url[:80]))
            view.goto((tmp_path / "page.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") == width
            assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            grounds = {"dark": "rgb(20, 23, 27)", "light": "rgb(252, 252, 250)"}
            assert view.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[scheme]
        browser.close()
    assert {entry for entry in said if not entry.startswith("data:")} == {(tmp_path / "page.html").as_uri()[:80]}


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast() -> None:
    """WCAG 2 AA: 4.5 for text, 3 for what charts are read by, in both colour schemes."""
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    ]
    assert len(themes) == 2

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in themes:
        for ground in ("page", "raised"):
            for name in ("text", "quiet", "link", "good", "bad"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
            for name in ("mark", *(f"s{n}" for n in range(SERIES))):
                assert contrast(theme[name], theme[ground]) >= 3, (name, ground)
        assert contrast(theme["text"], theme["right"]) >= 4.5


# ---------------------------------------------------------------------------------------------------------- the command


def test_files_are_written_with_what_made_them(world: Path, tmp_path: Path, capsys) -> None:
    out, html = tmp_path / "new" / "report.md", tmp_path / "new" / "report.html"
    assert report(capsys, world / "good.json", "--out", out, "--html", html) == ""
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# ScienceQA: split test\n\n30 questions.\n")
    command = shlex.join(
        ["python", "-m", "eval.report", str(world / "good.json"), "--out", str(out), "--html", str(html)]
    )
    assert f"Made by `{command}" in text
    page = Page(html.read_text(encoding="utf-8"))
    codes = [text for tag, text in page.texts if tag == "code"]
    assert any(code.startswith("python -m eval.scienceqa --data ") for code in codes)
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.md"]


def test_help_opens_with_an_example_that_runs(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    first = capsys.readouterr().out.split("\n")[0]
    assert first == DESCRIPTION.split("\n")[0]
    python, module, name, *arguments = shlex.split(first)
    assert (python, module, name) == ("python", "-m", "eval.report")
    monkeypatch.chdir(ROOT)
    text = report(capsys, *arguments)
    rows = table(text, "| run | how |")
    assert rows[3][:2] == ["scienceqa-text", "scored by likelihood (mean), QCM-A"]
    shipped = json.loads((ROOT / "assets/adapters/scienceqa/scores-test.json").read_text(encoding="utf-8"))
    assert rows[4][2].startswith(f"{shipped['avg']:.2f} [")
    assert rows[-1][0] == "*published:* LLaMA-Adapter (1)"


@pytest.mark.data
def test_the_shipped_captions_with_their_photos(tmp_path: Path, capsys) -> None:
    if "MMADAPTER_DATA" not in os.environ:
        pytest.skip("MMADAPTER_DATA does not name the data folder")
    data = Path(os.environ["MMADAPTER_DATA"]) / "flickr8k"
    shipped = ROOT / "assets" / "adapters" / "caption"
    page, text = page_of(
        capsys,
        tmp_path,
        *(shipped / name for name in ("scores-test.json", "scores-test-greedy.json")),
        *("--data", data / "dataset_flickr8k.json", "--images", data / "images", "--gallery", "4"),
    )
    assert len(page.all("img")) == 16
    assert "Show, Attend and Tell, hard attention" in text
