"""The question answering evaluation: metrics, gold and prediction files, tiny models that are asked, the record."""

from __future__ import annotations

import json
import os
import random
import sys
import types
from pathlib import Path

import pytest
import tiny_session
from tiny_session import Tiny

from eval import qa as command
from eval import qa_metrics, qa_model
from eval.qa_files import Question, of_split, read_answers, read_gold
from eval.qa_metrics import answer_set, answer_type, exact_match, f1, normalise, wordnet_similarity, wups
from mmadapter.checkpoint import Fingerprint
from mmadapter.generate import Generated
from mmadapter.prompts import question_text
from mmadapter.record import file_sha256
from mmadapter.session import Session
from mmadapter.tokenizer import open_tokenizer

DATA = os.environ.get("MMADAPTER_DATA")

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Dogs",
            "paragraphs": [
                {
                    "context": "The red dog runs on the grass.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "What runs? ",
                            "answers": [{"text": "red dog", "answer_start": 4}, {"text": "The dog", "answer_start": 0}],
                        },
                        {
                            "id": "q2",
                            "question": "What flies?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "red dog", "answer_start": 4}],
                        },
                    ],
                },
                {
                    "context": "A man stops.",
                    "qas": [{"id": "q3", "question": "Who stops?", "answers": [{"text": "a_man", "answer_start": 0}]}],
                },
            ],
        }
    ],
}
# As DAQUAR: underscores for blanks, several answers separated by commas, splits.
ROWS = [
    {"image": "0.png", "question": "what is red ?", "answer": "wine_glass, cup", "split": "test"},
    {"image": "1.png", "question": "how many dogs ?", "answer": "2", "split": "train"},
    {"image": "0.png", "question": "how many men ?", "answer": "3", "split": "test"},
    {"image": "2.png", "question": "what runs ?", "answer": "dog", "split": "train"},
    {"image": "1.png", "question": "what stops ?", "answer": "man", "split": "test"},
    {"image": "2.png", "question": "how many cups ?", "answer": "2", "split": "train"},
    {"image": "1.png", "question": "what is on the grass in front of the red dog ?", "answer": "man", "split": "test"},
    {"image": "3.png", "question": "what is it ?", "answer": "grass", "split": "train"},
    {"image": "0.png", "question": "what is green ?", "answer": "grass", "split": "test"},
]
PERFECT = ["wine_glass, cup", "3", "man", "man", "grass"]


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# Metrics


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat's\thome, an hour.", "cats home hour"),
        ("A.B. and the U.S.", "ab and us"),
        ("theatre and anthem", "theatre and anthem"),
        ("wine_glass", "wineglass"),
        ("the", ""),
        ("l’été—a fête", "l’été— fête"),  # only ASCII marks are punctuation, and they do not part words
    ],
)
def test_normalisation(text, plain):
    assert normalise(text) == plain


def test_exact_match_takes_the_best_reference():
    assert exact_match("The red dog!", ["a cat", "red dog"]) == 1
    assert exact_match("red dogs", ["a cat", "red dog"]) == 0
    assert exact_match("a", [""]) == 1


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [
        ("the red dog runs", ["red dog"], 0.8),  # 2 of 3 said, 2 of 2 meant
        ("dog dog", ["dog cat"], 0.5),  # a word counts as often as it is on both sides
        ("cat", ["red dog", "a cat sat"], 2 / 3),
        ("cat", ["dog"], 0.0),
        ("", [""], 1.0),
        ("cat", [""], 0.0),
        ("the", ["cat"], 0.0),
        ("an", [""], 1.0),
    ],
)
def test_f1(answer, references, value):
    assert f1(answer, references) == pytest.approx(value)


SIMILAR = {("cup", "wine_glass"): 0.8, ("cup", "table"): 0.5, ("table", "wine_glass"): 0.45, ("man", "dog"): 0.95}


def similarity(one: str, other: str) -> float:
    return 1.0 if one == other else SIMILAR.get((one, other), SIMILAR.get((other, one), 0.0))


@pytest.mark.parametrize(
    ("answer", "reference", "at_09", "at_0"),
    [
        ("Cup", "cup", 1, 1),
        ("man", "dog", 0.95, 0.95),  # above the threshold it counts as it is
        ("wine glass", "cup", 0.08, 0.8),
        # answer side: 1; reference side: 1 * 0.8
        ("cup", "cup, wine_glass", 0.08, 0.8),
        # answer side: 1 * 0.5; reference side: 1
        ("cup, table", "cup", 0.05, 0.5),
        # answer side: max(.5, .45); reference side: .5 * .45
        ("table", "cup, wine_glass", 0.05 * 0.045, 0.5 * 0.45),
        ("", "cup", 0, 0),
        ("grass", "cup", 0, 0),
    ],
)
def test_wups(answer, reference, at_09, at_0):
    assert wups(answer, [reference], similarity, 0.9) == pytest.approx(at_09)
    assert wups(answer, [reference], similarity, 0.0) == pytest.approx(at_0)


def test_wups_takes_the_best_reference_and_the_threshold_itself_is_enough():
    assert wups("cup", ["table", "wine_glass"], similarity, 0.0) == 0.8
    assert wups("cup", ["wine_glass"], similarity, 0.8) == 0.8
    assert wups("", [""], similarity, 0.9) == 1


def test_the_terms_of_an_answer():
    assert answer_set(" Wine  glass, cup.,, cup, _toilet_paper ") == ["wine_glass", "cup", "toilet_paper"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("2", "number"),
        ("1,000.5", "number"),
        ("two", "one word"),
        ("the cup", "one word"),
        ("A", "one word"),
        ("2, 3", "several words"),
        ("cup, table", "several words"),
        ("", "unanswerable"),
    ],
)
def test_types_of_answers(answer, kind):
    assert answer_type(answer) == kind


class FakeSense:
    def __init__(self, name: str) -> None:
        self.name = name

    def wup_similarity(self, other: FakeSense) -> float | None:
        return {("cup", "mug"): 0.7, ("cup", "trophy"): 0.9}.get((self.name, other.name))


class FakeWordNet:
    """Two senses of "vessel", one of "cup"; nothing else is known."""

    NOUN = "n"

    def __init__(self, missing: bool = False) -> None:
        self.missing, self.looked_up = missing, []

    def ensure_loaded(self) -> None:
        if self.missing:
            raise LookupError("a page of\nhelp")

    def get_version(self) -> str:
        return "9.1"

    def synsets(self, term: str, pos: str) -> list[FakeSense]:
        assert pos == self.NOUN
        self.looked_up.append(term)
        return {"cup": [FakeSense("cup")], "vessel": [FakeSense(name) for name in ("mug", "trophy", "boat")]}.get(
            term, []
        )


@pytest.fixture
def wordnet(monkeypatch):
    """Installs a fake nltk: `wordnet(missing=...)`."""

    def install(**settings: bool) -> FakeWordNet:
        fake = FakeWordNet(**settings)
        corpus = types.ModuleType("nltk.corpus")
        corpus.wordnet = fake
        monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
        monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
        return fake

    return install


@pytest.fixture(autouse=True)
def _no_system_wordnet(monkeypatch):
    """What the machine has installed changes no test; `system_wordnet` is opened before."""
    monkeypatch.setattr(qa_metrics, "SYSTEM_WORDNET", ())
    monkeypatch.delenv("WNSEARCHDIR", raising=False)


@pytest.fixture(scope="module")
def system_wordnet():
    """The similarity by WordNet itself."""
    try:
        return wordnet_similarity()
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)


def test_a_place_that_is_another_questions_id_is_refused(tmp_path):
    """One answer, under "1", would have been scored as that of both questions."""
    rows = [{"id": "1", "question": "a", "answer": "x", "split": "val"}, {"question": "b", "answer": "y"}]
    gold = read_gold(written(tmp_path / "rows.json", rows))
    with pytest.raises(ValueError, match=r"rows\.json: 1 id \(1\) of one question and the place of another, which has"):
        of_split(gold, "val")
    gold = read_gold(written(tmp_path / "rows.json", rows[::-1]))  # the other is in place 0: nothing is shared
    assert [question.id for question in of_split(gold, "val")[0]] == ["0", "1"]


def test_wordnet_gives_the_nearest_senses(wordnet):
    fake = wordnet()
    measure = wordnet_similarity()
    assert measure("cup", "vessel") == 0.9
    assert measure("cup", "vessel") == 0.9
    assert fake.looked_up == ["cup", "vessel"], "each term is looked up once"
    assert measure("xyz", "xyz") == 1.0
    assert measure("xyz", "cup") == 0.0
    assert measure("vessel", "vessel") == 1.0


def test_what_wups_lacks_is_said(wordnet, no_nltk, tmp_path, monkeypatch):
    monkeypatch.setattr(qa_metrics, "SYSTEM_WORDNET", ("/nowhere",))
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    get = r"install Debian's wordnet-base, or run python -m nltk\.downloader wordnet$"
    with pytest.raises(LookupError, match=f"^nltk is not installed; run pip install nltk, and for its WordNet {get}"):
        wordnet_similarity()
    wordnet(missing=True)
    with pytest.raises(LookupError, match=f"^there is no WordNet in nltk's data nor in {tmp_path} or /nowhere; {get}"):
        wordnet_similarity()


# Nodes from the root, counted by hand in WordNet 3: carnivore 12, dog and cat 14; seat 9, chair and stool 10; blind 8
# and curtain, a kind of it, 9; table 9 and desk, a kind of it, 10.
@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        ("dog", "cat", 2 * 12 / (14 + 14)),
        ("chair", "stool", 2 * 9 / (10 + 10)),
        ("blinds", "curtain", 2 * 8 / (8 + 9)),
        ("desk", "table", 2 * 9 / (10 + 9)),
        ("lamps", "lamp", 1.0),
        ("xyzzy", "cup", 0.0),
    ],
)
def test_words_whose_similarity_is_known(system_wordnet, one, other, similarity):
    assert system_wordnet(one, other) == system_wordnet(other, one) == pytest.approx(similarity, abs=1e-12)


def test_wups_by_wordnet(system_wordnet):
    """A chair and a stool are just near enough at 0.9, a dog and a cat (0.857) are not."""
    both = [wups("stool, desk", ["table, chair"], system_wordnet, threshold) for threshold in (0.9, 0.0)]
    assert both == [pytest.approx(0.9 * 18 / 19)] * 2
    assert wups("cat", ["dog"], system_wordnet, 0.9) == pytest.approx(0.1 * 24 / 28)
    assert wups("cat", ["dog"], system_wordnet, 0.0) == pytest.approx(24 / 28)


@pytest.mark.skipif(not Path("/usr/share/wordnet/data.noun").is_file(), reason="no Debian package wordnet-base")
def test_wordnet_of_the_system_where_nltk_has_none(system_wordnet, wordnet, monkeypatch):
    fake = wordnet(missing=True)
    monkeypatch.undo()  # nltk itself is the real one
    monkeypatch.setattr(nltk_corpus(), "wordnet", fake)
    monkeypatch.setenv("WNSEARCHDIR", "/usr/share/wordnet")
    assert wordnet_similarity()("dog", "cat") == pytest.approx(24 / 28)


def nltk_corpus() -> types.ModuleType:
    import nltk.corpus

    return nltk.corpus


# Gold files


def test_squad(tmp_path):
    gold = read_gold(written(tmp_path / "dev.json", SQUAD))
    context = "The red dog runs on the grass."
    assert gold.questions == [
        Question("q1", "What runs? ", ("red dog", "The dog"), context),
        Question("q2", "What flies?", ("",), context),
        Question("q3", "Who stops?", ("a_man",), "A man stops."),
    ]
    assert of_split(gold, None) == (gold.questions, None)
    assert gold.as_said(" a_man") == "a_man", "SQuAD's answers stay as they are"


def test_references_of_nothing_but_articles_are_none(tmp_path):
    """SQuAD's own scoring leaves them out, so that the empty answer is right where there is no other."""
    content = json.loads(json.dumps(SQUAD))
    entries = content["data"][0]["paragraphs"][0]["qas"]
    entries[0]["answers"] = [{"text": "the"}, {"text": "dog"}]
    entries[1].update(is_impossible=False, answers=[{"text": "The."}])
    gold = read_gold(written(tmp_path / "dev.json", content))
    assert [question.answers for question in gold.questions[:2]] == [("dog",), ("",)]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "data.json"])
def test_rows(tmp_path, name):
    content = {"rows.json": ROWS, "rows.jsonl": lines(ROWS), "data.json": {"data": ROWS}}[name]
    gold = read_gold(written(tmp_path / name, content))
    assert len(gold.questions) == 9
    assert gold.questions[0] == Question("", "what is red ?", ("wine glass, cup",), "", "0.png", "test")
    assert gold.as_said("toilet_paper ") == "toilet paper"
    test, name = of_split(gold, None)
    assert name == "test"
    assert [(question.id, question.answers[0]) for question in test] == [
        *(("0", "wine glass, cup"), ("1", "3"), ("2", "man"), ("3", "man"), ("4", "grass"))
    ]
    assert [question.answers[0] for question in of_split(gold, "train")[0]] == ["2", "dog", "2", "grass"]


def test_rows_with_ids_contexts_and_several_references(tmp_path):
    rows = [
        {"id": 7, "question": " Who? ", "answer": ["a_dog", "dog"], "context": "A dog ran.", "image": None},
        {"question_id": "x", "question": "Why?", "answer": "So."},
    ]
    gold = read_gold(written(tmp_path / "rows.json", rows))
    assert gold.questions == [Question("7", "Who?", ("a dog", "dog"), "A dog ran."), Question("x", "Why?", ("So.",))]


def test_rows_without_a_split_are_in_every_one(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", "split": "val"}]
    gold = read_gold(written(tmp_path / "rows.json", rows))
    assert [question.text for question in of_split(gold, "val")[0]] == ["a", "c"]
    assert [question.text for question in of_split(gold, "test")[0]] == ["a"]


def test_the_columns_of_archival_qa(tmp_path):
    """Its rows say more than is read: `org_answer` is the answer as the article had it, before dates were resolved."""
    text = (
        "id,question,answer,org_answer,answer_start,para_id,trans_que,trans_ans,source\n"
        'train_4,When did Tenneco announce a sale?,"May 26, 1988",today,103,148748_0,0,1,rand\n'
        "test_84,What tournament did Haarhuis win in 1998?,Wimbledon,Wimbledon,527,1043631_15,1,0,rand\n"
    )
    gold = read_gold(written(tmp_path / "ArchivalQA_test.csv", text))
    assert of_split(gold, None) == (
        [
            Question("train_4", "When did Tenneco announce a sale?", ("May 26, 1988",)),
            Question("test_84", "What tournament did Haarhuis win in 1998?", ("Wimbledon",)),
        ],
        None,
    )


def test_csv(tmp_path):
    text = '\ufeffid,Question, ANSWER ,paragraph\n\n5,"Who, when?","The ""Times"", 1987",x\n6,"Two\nlines?",1987,\n'
    gold = read_gold(written(tmp_path / "archival.csv", text))
    assert gold.questions == [
        Question("5", "Who, when?", ('The "Times", 1987',)),
        Question("6", "Two\nlines?", ("1987",)),
    ]
    assert not gold.squad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected SQuAD JSON, or rows of question and answer"),
        ("[]", "holds no questions; expected"),
        ("question,answer\n", "holds no questions"),
        ("query,reply\na,b\n", "has the columns 'query, reply'; expected"),
        (
            "question\tanswer\na\tb\n",
            r"has the columns 'question\\tanswer'; expected .* CSV with a header and commas",
        ),
        ('question,answer\na,"b"c\n', "line 2: not CSV: "),
        ("question,answer\na,b,c\n", "line 2: more fields than columns; quote texts with commas"),
        ("question,answer\na,\nb,c\n", r"1 bad row \(line 2: answer is empty\); expected"),
        ('{"question": "a", "answer": "b"}\n{"question"\n', r"1 bad row \(line 2: not JSON: "),
        (
            [{"question": "a"}, {"answer": "b"}, 3, {"question": " ", "answer": "b"}],
            r"4 bad rows \(row 1 \(line 1\): has no answer, row 2 \(line 1\): has no question, row 3 .*: expected an "
            r"object with named fields, got 3, \.\.\.\)",
        ),
        ([{"question": "a", "answer": []}], "has no answer"),
        ([{"question": "a", "answer": ["b", 2]}], "answer must be text, got 2"),
        ([{"question": "a", "answer": 2}], "answer must be text, got 2"),
        ([{"question": "a", "answer": "b", "id": [1]}], r"id must be text or a number, got \[1\]"),
        (
            [{"question": "a", "answer": "b", "id": n // 2} for n in range(8)],
            r"4 ids \(0, 1, 2, \.\.\.\) of more than one question; ids must be unique",
        ),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] has no context \(text\), got None"),
        ({"data": [{"paragraphs": {}}]}, r"data\[0\] has no paragraphs \(a list\), got {}"),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "q", "answers": []}]}]}]},
            r"data\[0\].paragraphs\[0\].qas\[0\] has no id \(text\), got 1",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": ["a"]}]}]}]},
            r"qas\[0\].answers has no text \(text\), got None",
        ),
    ],
)
def test_bad_gold_files(tmp_path, content, message):
    path = written(tmp_path / "gold", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_gold(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_gold_files_and_splits(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_gold(tmp_path / "gold.json")
    rows = read_gold(written(tmp_path / "rows.json", ROWS))
    with pytest.raises(ValueError, match="has no questions of split 'dev'; it has test, train"):
        of_split(rows, "dev")
    squad = read_gold(written(tmp_path / "squad.json", SQUAD))
    assert of_split(squad, "dev") == (squad.questions, None)
    assert "has no splits: all of it is taken" in capsys.readouterr().err


# Predictions


def answers_of(tmp_path: Path, content: object, gold: object = SQUAD, limit: int | None = None) -> dict[str, str]:
    gold = read_gold(written(tmp_path / "gold.json", gold))
    split, _ = of_split(gold, None)
    return read_answers(written(tmp_path / "predictions", content), gold, split, split[:limit])


@pytest.mark.parametrize(
    "content",
    [
        {"q3": "c", "q1": "a", "q2": ""},
        ["a", "", "c"],
        [{"id": "q3", "answer": "c"}, {"id": "q2", "answer": ""}, {"id": "q1", "answer": "a"}],
        lines([{"id": "q3", "answer": "c", "model": {}}, {"index": 1, "answer": ""}, {"index": 0, "answer": "a"}]),
    ],
)
def test_every_format_of_predictions(tmp_path, content):
    assert answers_of(tmp_path, content) == {"q1": "a", "q2": "", "q3": "c"}


def test_a_file_of_one_line_is_an_answer_and_not_a_table_of_them(tmp_path):
    gold = [{"question": "a", "answer": "b"}]
    assert answers_of(tmp_path, '{"id": 0, "answer": "x"}', gold) == {"0": "x"}
    assert answers_of(tmp_path, '{"0": "x"}', gold) == {"0": "x"}


def test_answers_to_other_questions_are_passed_over(tmp_path, capsys):
    assert answers_of(tmp_path, {"q1": "a", "q2": "b", "q3": "c"}, limit=1) == {"q1": "a"}
    assert "2 answers to questions that are not scored here are passed over" in capsys.readouterr().err
    assert answers_of(tmp_path, ["a", "b", "c"], limit=2) == {"q1": "a", "q2": "b"}
    assert answers_of(tmp_path, ["a", "b"], limit=2) == {"q1": "a", "q2": "b"}
    rows = [{"id": n, "question": "a", "answer": "b", "split": split} for n, split in enumerate(("train", "test"))]
    assert answers_of(tmp_path, {"0": "a", "1": "b"}, rows) == {"1": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"3 questions \(q1, q2, q3\) without an answer, of 3 to score; answer them first"),
        ({"q1": "a"}, r"2 questions \(q2, q3\) without an answer"),
        (
            {**dict.fromkeys(("q1", "q2", "q3"), "a"), **dict.fromkeys("abcd", "x")},
            r"4 ids \(a, b, c, \.\.\.\) not in .*gold.json; do the two files belong together\?",
        ),
        ('{"q1": "a", "q2": "b", "q1": "c", "q3": "d"}', r"1 id \(q1\) with more than one answer; keep one each"),
        (lines([{"id": "q1", "answer": "a"}, {"index": 0, "answer": "b"}]), r"1 id \(q1\) with more than one answer"),
        (lines([{"index": n, "answer": "a"} for n in (-1, 3, 0)]), r"2 ids \(index -1, index 3\) not in"),
        (["a", "b"], "is a list of 2 answers; each of the 3 questions needs one"),
        ([], "is a list of 0 answers; each of the 3 questions needs one"),
        (["a", "b", 3], "item 2: an answer must be text, got 3; expected {id: text}, JSON lines of id"),
        ({"q1": None}, "id q1: an answer must be text, got None"),
        ([{"id": "q1", "answer": "a"}, {"id": "q2"}], r"item 1: got {'id': 'q2'}; expected"),
        ('{"id": "q1", "answer": "a"}\n[1]\n', r"line 2: got \[1\]; expected"),
        ('{"id": "q1", "answer": "a"}\n{"answer": "b"}\n', r"line 2: got {'answer': 'b'}; expected"),
        ('{"id": "q1", "answer": "a"}\nhello\n', r"line 2: not JSON \("),
        (" \n", "is empty; expected {id: text}"),
    ],
)
def test_bad_predictions(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        answers_of(tmp_path, content)
    assert str(tmp_path / "predictions") in str(caught.value)
    assert "\n" not in str(caught.value)


# The command on prediction files


def record_of(tmp_path: Path, gold: Path, *arguments: str) -> dict:
    assert command.main(["--gold", str(gold), "--json", str(tmp_path / "out" / "scores.json"), *arguments]) == 0
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def test_scores_of_squad(tmp_path, capsys):
    gold = written(tmp_path / "dev.json", SQUAD)
    predictions = written(tmp_path / "predictions.json", {"q1": "red dog runs", "q2": "", "q3": "a man"})
    record = record_of(tmp_path, gold, "--predictions", str(predictions))
    assert record["exact_match"] == pytest.approx(100 / 3)  # "a_man" is the word aman in SQuAD's eyes
    assert record["f1"] == pytest.approx((80 + 100 + 0) / 3)
    assert (record["wups_0.9"], record["wups_0.0"], record["total"]) == (None, None, 3)
    assert list(record["by_type"]) == ["one word", "several words", "unanswerable"]
    assert record["by_type"]["several words"]["f1"] == pytest.approx(80)
    assert record["by_type"]["unanswerable"] == {
        **{"exact_match": 100, "f1": 100, "wups_0.9": None, "wups_0.0": None, "total": 1}
    }
    assert (record["constant"], record["split"], record["model"]) == (None, None, None)
    assert record["data_hash"] == file_sha256(gold)
    assert record["predictions_hash"] == file_sha256(predictions)
    assert record["versions"]["torch"]
    assert record["command"].startswith("python -m eval.qa --gold ")
    assert record["predictions"][0] == {
        "id": "q1",
        "question": "What runs? ",
        "references": ["red dog", "The dog"],
        "answer": "red dog runs",
        "exact_match": 0,
        "f1": pytest.approx(80),
        "wups_0.9": None,
        "wups_0.0": None,
    }
    shown = capsys.readouterr()
    assert shown.out.startswith("dev.json: 3 questions\n")
    assert "all                  33.33        60.00            -            -            3\n" in shown.out
    assert shown.err == "", "WUPS is no question of text"


def test_scores_of_questions_about_pictures(tmp_path, capsys, wordnet):
    """No picture is there: to score a file needs none."""
    wordnet()
    gold = written(tmp_path / "rows.json", ROWS)
    answers = ["wine glass", "3", "woman", "man", "vessel"]
    record = record_of(tmp_path, gold, "--predictions", str(written(tmp_path / "predictions", answers)))
    assert record["exact_match"] == 40
    assert record["f1"] == pytest.approx((80 + 100 + 0 + 100 + 0) / 5)
    assert record["wups_0.9"] == record["wups_0.0"] == 40
    assert {kind: scores["total"] for kind, scores in record["by_type"].items()} == {
        **{"number": 1, "one word": 3, "several words": 1}
    }
    assert record["constant"] == {
        **{"answer": "2", "exact_match": 0, "f1": 0, "wups_0.9": 0, "wups_0.0": 0, "total": 5}
    }
    assert record["split"] == "test"
    assert record["predictions"][0]["image"] == "0.png"
    assert record["versions"]["wordnet"] == "9.1"
    assert "pillow" not in record["versions"]
    shown = capsys.readouterr().out
    assert shown.startswith("rows.json, test: 5 questions\n")
    assert 'always "2"' in shown
    record = record_of(
        tmp_path, gold, "--split", "train", "--predictions", str(written(tmp_path / "predictions", ["2"] * 4))
    )
    assert record["exact_match"] == record["constant"]["exact_match"] == record["constant"]["wups_0.9"] == 50


def test_the_share_of_yes_and_no_is_said(tmp_path, no_nltk, capsys):
    """Of such questions half are right by chance, which the scores alone do not tell."""
    out = tmp_path / "out.json"
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(["yes", "No.", "a dog", "two"])]
    gold = written(tmp_path / "gold.json", rows)
    answers = written(tmp_path / "answers.json", ["yes", "yes", "Yes", "none"])
    arguments = ["--gold", str(gold), "--predictions", str(answers), "--json", str(out)]
    assert command.main(arguments) == 0
    assert json.loads(out.read_text())["yes_no"] == {"references": 50, "answers": 75}
    assert "yes or no: 50.00% of the references, 75.00% of the answers\n" in capsys.readouterr().out
    gold.write_text(json.dumps(rows[2:]))
    answers.write_text('["dog", "two"]')
    assert command.main(arguments) == 0
    assert "yes or no" not in capsys.readouterr().out


def test_underscores_are_blanks_in_predictions_too(tmp_path, no_nltk, capsys):
    gold = written(tmp_path / "rows.json", ROWS)
    record = record_of(tmp_path, gold, "--predictions", str(written(tmp_path / "predictions", PERFECT)))
    assert (record["exact_match"], record["f1"]) == (100, 100)
    assert record["wups_0.9"] is None
    assert record["predictions"][0]["answer"] == "wine_glass, cup"
    assert "WUPS is left out: nltk is not installed" in capsys.readouterr().err
    assert "wordnet" not in record["versions"]


def test_the_commonest_answer_of_another_file(tmp_path):
    gold = written(tmp_path / "test.csv", "question,answer\nWho?,1987\nWhen?,Reagan\n")
    train = written(tmp_path / "train.csv", "question,answer\nA?,x\nB?,Reagan\nC?,Reagan\n")
    predictions = str(written(tmp_path / "predictions", ["1987", "1987"]))
    record = record_of(tmp_path, gold, "--predictions", predictions, "--train", str(train))
    assert record["constant"]["answer"] == "Reagan"
    assert record["exact_match"] == record["constant"]["exact_match"] == 50
    assert record["train_hash"] == file_sha256(train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --predictions FILE or --adapter A (none is the base model)"),
        (["--predictions", "p", "--adapter", "none"], "give either"),
        (["--predictions", "p", "--shots", "0"], "--shots is about a model that answers; it goes with --adapter"),
        (["--predictions", "p", "--max-new-tokens", "3"], "--max-new-tokens is about a model"),
        (["--adapter", "none", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--predictions", "p", "--limit", "0"], "--limit must be at least 1"),
        (["--adapter", "none", "--shots", "4"], "argument --shots: invalid choice"),
        (["--adapter", "none", "--template", "x"], "argument --template: invalid choice"),
    ],
)
def test_misuse(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command.main(["--gold", "g", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_opens_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("python -m eval.qa --gold daquar/questions.json --predictions")


def test_errors_are_one_line(tmp_path, capsys):
    assert command.main(["--gold", str(tmp_path / "no.json"), "--predictions", "p"]) == 1
    assert capsys.readouterr().err == f"error: there is no file {tmp_path / 'no.json'}; check the path\n"


# A model that answers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def gold(tiny: Tiny, tmp_path: Path) -> Path:
    """The rows of `ROWS`, beside the folder `images/` of their pictures."""
    (tmp_path / "images").symlink_to(tiny.pictures)
    return written(tmp_path / "rows.json", ROWS)


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every batch that a session is asked, as text."""
    batches: list[list[str]] = []
    real = Session.generate

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        batches.append([self.tokenizer.decode(row) for row in rows])
        return real(self, rows, sampling, prompts, cancelled)

    monkeypatch.setattr(Session, "generate", generate)
    return batches


def model_arguments(tiny: Tiny, adapter: object, *more: str) -> list[str]:
    base = ["--llama", str(tiny.llama), "--dtype", "float32", "--max-new-tokens", "6"]
    return [*base, "--adapter", str(adapter), *more]


def answers_in(record: dict) -> dict[str, str]:
    return {entry["question"]: entry["answer"] for entry in record["predictions"]}


def test_an_adapter_answers_about_pictures_as_the_session_does(tiny, gold, tmp_path):
    """Batches, the order of asking and the shared features change nothing."""
    record = record_of(tmp_path, gold, *model_arguments(tiny, tiny.sees, "--batch-size", "2"))
    session = tiny.load(tiny.sees)
    expected = {
        row["question"]: session.answer(
            tiny.pictures / row["image"], row["question"], max_new_tokens=6, temperature=0.0, beams=1
        )
        for row in ROWS
        if row["split"] == "test"
    }
    assert answers_in(record) == expected
    assert len(set(expected.values())) > 1
    blind = record_of(tmp_path, gold, *model_arguments(tiny, "none"))
    assert answers_in(blind) != expected
    assert record["model"]["template"] == "plain"
    assert record["model"]["max_new_tokens"] == 6
    assert record["adapter"] == str(tiny.sees)
    assert record["base"] == str(tiny.llama)
    assert record["model"]["adapter_hash"] == file_sha256(tiny.sees / "adapter.safetensors")


def test_a_picture_is_encoded_once(tiny, gold, tmp_path, monkeypatch):
    loaded, encoded = [], []
    from mmadapter import image
    from mmadapter.vision import ImageEncoder

    real_load, real_features = image.load_image, ImageEncoder.features_of

    def load_image(source):
        loaded.append(source)
        return real_load(source)

    def features_of(self, images, batch_size=8):
        encoded.append(len(images))
        return real_features(self, images, batch_size)

    monkeypatch.setattr(image, "load_image", load_image)
    monkeypatch.setattr(ImageEncoder, "features_of", features_of)
    record_of(tmp_path, gold, *model_arguments(tiny, tiny.sees, "--batch-size", "3"))
    assert [Path(path).name for path in loaded] == ["0.png", "1.png"]
    assert sum(encoded) == 2


def test_text_is_asked_longest_first_in_the_template_of_the_adapter(tiny, tmp_path, asked):
    gold = written(tmp_path / "dev.json", SQUAD)
    record = record_of(tmp_path, gold, *model_arguments(tiny, tiny.reads, "--batch-size", "2"))
    assert [len(batch) for batch in asked] == [2, 1]
    assert "Who stops?" in asked[1][0]
    assert (
        "paired with an input that provides further context. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat flies?\n\n### Input:\nThe red dog runs on the grass.\n\n### Response:"
    ) in asked[0][1]
    assert record["model"]["template"] == "alpaca"
    assert set(answers_in(record)) == {"What runs? ", "What flies?", "Who stops?"}


@pytest.mark.parametrize("generation", [{"beams": 3}, {"temperature": 0.8, "stop": ["."]}])
def test_only_the_first_line_of_the_likeliest_answer_counts(tiny, tmp_path, monkeypatch, generation):
    """Whatever the adapter's own settings."""
    seen = []

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        seen.append(sampling)
        return [Generated(" dog ", [1], "stop") for _ in rows]

    tokenizer = open_tokenizer(tiny.llama)
    config = tiny_session.llama_config(tokenizer.vocab_size)
    fingerprint = Fingerprint.of(config, tokenizer.tokens())
    adapter = tmp_path / "adapter"
    tiny_session.write_adapter(adapter, config, fingerprint, "answer", "plain", None, generation=generation)
    monkeypatch.setattr(Session, "generate", generate)
    record = record_of(tmp_path, written(tmp_path / "dev.json", SQUAD), *model_arguments(tiny, adapter))
    assert [entry["answer"] for entry in record["predictions"]] == ["dog"] * 3
    assert (seen[0].stop, seen[0].temperature, seen[0].beams, seen[0].max_new_tokens) == (("\n",), 0.0, 1, 6)


def test_an_adapter_that_does_not_see_is_asked_without_pictures(tiny, tmp_path, capsys):
    gold = written(tmp_path / "rows.json", ROWS)  # no pictures beside it
    record_of(tmp_path, gold, *model_arguments(tiny, tiny.reads, "--limit", "1"))
    assert f"{tiny.reads} does not see: it is asked without the pictures" in capsys.readouterr().err
    record_of(tmp_path, gold, *model_arguments(tiny, "none", "--limit", "1"))
    assert "the base does not see" in capsys.readouterr().err


def test_pictures_that_are_not_there(tiny, tmp_path, capsys):
    gold = written(tmp_path / "rows.json", ROWS)
    assert command.main(["--gold", str(gold), *model_arguments(tiny, tiny.sees)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: 2 pictures (0.png, 1.png) not in {tmp_path} or {tmp_path / 'images'}; give their folder with --images"
    )
    assert command.main(["--gold", str(gold), *model_arguments(tiny, tiny.sees, "--images", str(tiny.pictures))]) == 0


def test_shots_are_train_questions_in_the_same_template(tiny, gold, tmp_path, asked):
    arguments = model_arguments(tiny, "none", "--limit", "1", "--shots", "2")
    record = record_of(tmp_path, gold, *arguments)
    train = [(row["question"], row["answer"]) for row in ROWS if row["split"] == "train"]
    expected = random.Random(0).sample(train, 2)
    assert record["model"]["shots"] == [list(shot) for shot in expected]
    shown = "".join(f"{question_text(question)}: {answer}\n\n" for question, answer in expected)
    assert asked == [[f"{shown}{question_text('what is red ?')}:"]]
    assert record["shots"] == 2
    others = [record_of(tmp_path, gold, *arguments, "--seed", str(seed))["model"]["shots"] for seed in range(1, 5)]
    assert any(other != record["model"]["shots"] for other in others)


def test_the_template_can_be_chosen(tiny, gold, tmp_path, asked):
    record = record_of(tmp_path, gold, *model_arguments(tiny, "none", "--limit", "1", "--template", "bare"))
    assert asked == [[question_text("what is red ?")]]
    assert record["model"]["template"] == "bare"


def test_shots_are_never_scored_and_have_an_answer(tiny, gold, tmp_path, capsys):
    arguments = model_arguments(tiny, "none", "--split", "train", "--limit", "2", "--shots")
    record = record_of(tmp_path, gold, *arguments, "2")
    assert sorted(text for text, _ in record["model"]["shots"]) == ["how many cups ?", "what is it ?"]
    assert command.main(["--gold", str(gold), *arguments, "3"]) == 1
    assert (
        "--shots 3 needs as many train questions that are not scored, and there are 2; give a file of them with "
        in (capsys.readouterr().err)
    )
    squad = written(tmp_path / "squad.json", SQUAD)
    record = record_of(tmp_path, gold, *model_arguments(tiny, "none", "--shots", "2", "--train", str(squad)))
    assert sorted(text for text, _ in record["model"]["shots"]) == ["What runs? ", "Who stops?"]


def test_a_stopped_run_goes_on(tiny, gold, tmp_path, monkeypatch, capsys):
    """What is kept is not asked again, and the scores are those of an uninterrupted run."""
    out = tmp_path / "answers.jsonl"
    arguments = model_arguments(tiny, tiny.sees, "--batch-size", "2", "--out", str(out))
    whole = record_of(tmp_path, gold, *model_arguments(tiny, tiny.sees, "--batch-size", "2"))
    real, calls = Session.generate, []

    def generate(self, rows, *rest):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, rows, *rest)

    monkeypatch.setattr(Session, "generate", generate)
    assert command.main(["--gold", str(gold), *arguments]) == 130
    assert len(out.read_text().splitlines()) == 4
    with out.open("a") as file:
        file.write('{"id": "4", "ans')  # the line that the run was stopped in
    capsys.readouterr()
    record = record_of(tmp_path, gold, *arguments)
    assert calls == [2, 2, 1, 1]
    assert "4 of 5 answers are in" in capsys.readouterr().err
    assert record["predictions"] == whole["predictions"]
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["id"]: line["answer"] for line in kept} == {
        entry["id"]: entry["answer"] for entry in record["predictions"]
    }
    # What a model kept is a prediction file as well.
    again = record_of(tmp_path, gold, "--predictions", str(out))
    assert again["predictions"] == whole["predictions"]
    # An id may be no more than a place in its split, so answers of two splits cannot mix either.
    for more in (["--template", "bare"], ["--shots", "1"], ["--split", "train"]):
        assert command.main(["--gold", str(gold), *arguments, *more]) == 1
        assert "holds answers of another model" in capsys.readouterr().err


def test_questions_that_are_too_long(tiny, tmp_path, capsys):
    rows = [{"question": "dog " * 400, "answer": "a"}, {"question": "dog", "answer": "b"}]
    gold = written(tmp_path / "rows.json", rows)
    assert command.main(["--gold", str(gold), *model_arguments(tiny, "none")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 question (id 0 with ")
    assert error.endswith(
        "too long: the model's context holds 400, 0 examples and the answer included; take fewer --shots or another "
        "--llama"
    )


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_daquar(tmp_path):
    path = Path(DATA) / "daquar" / "questions.json"
    gold = read_gold(path)
    test, train = (of_split(gold, split)[0] for split in ("test", "train"))
    assert (len(test), len(train)) == (5673, 6795)
    assert qa_model.find_pictures(gold.questions, [path.parent / "images"])
    predictions = written(tmp_path / "predictions", [question.answers[0].replace(" ", "_") for question in test])
    record = record_of(tmp_path, path, "--predictions", str(predictions))
    assert record["total"] == 5673
    assert record["constant"]["answer"] == "2"
    assert record["constant"]["exact_match"] == pytest.approx(4.97, abs=0.005)
