"""Questions that captions answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mmadapter.captions import CaptionedImage
from mmadapter.rows import read_rows
from training import caption_questions


def asked(*captions: str, seed: int = 0) -> set[tuple[str, str]]:
    found = caption_questions.questions(captions, random.Random(seed))
    return {(question, answer) for kind, question, answer in found if kind != "seen"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man is riding a bike in the street.", ("what is the man doing ?", "riding a bike")),
        ("A girl sitting on a", ("what is the girl doing ?", "sitting")),
        ("Two  small dogs run.", ("how many dogs are there ?", "2")),
        ("The dog wears a RED collar", ("what is the color of the collar ?", "red")),
        ("Children play in the deep snow", ("where is it ?", "in the deep snow")),
    ],
)
def test_a_caption_answers_questions(caption: str, expected: tuple[str, str]) -> None:
    found = asked(caption)
    assert expected in found
    scene = ("what can be seen in the photo ?", " ".join(caption.lower().rstrip(".").split()))
    assert found == {expected, scene} or ("where is it ?", "in the street") in found


@pytest.mark.parametrize("caption", ["A lamp stands in a corner", "An evening event", "", " . "])
def test_what_no_pattern_fits_is_asked_for_as_a_whole(caption: str) -> None:
    assert {question for question, _ in asked(caption)} <= {"what can be seen in the photo ?"}
    assert "" not in {answer for _, answer in asked(caption)}


def test_what_is_said_to_be_there_is_and_what_is_not_is_not() -> None:
    """Who is a person in one caption may be a man in none: of a photo with people, no other people are denied."""
    seen = set()
    for seed in range(300):
        rows = caption_questions.questions(["Two dogs chase a person", "a ball"], random.Random(seed))
        seen |= {(question, answer) for kind, question, answer in rows if kind == "seen"}
    yes = {question for question, answer in seen if answer == "yes"}
    no = {question for question, answer in seen if answer == "no"}
    assert yes == {f"is there a {word} in the photo ?" for word in ("dog", "person", "ball")}
    assert "is there a cat in the photo ?" in no
    assert not no & {f"is there a {word} in the photo ?" for word in ("man", "woman", "dog", "ball")}
    alone = [caption_questions.questions(["a dog"], random.Random(seed)) for seed in range(100)]
    assert ("seen", "is there a man in the photo ?", "no") in {row for rows in alone for row in rows}


def test_questions_about_one_photo_are_of_different_kinds() -> None:
    image = CaptionedImage(1, "1.jpg", ("A man wearing a red hat in the snow",) * 5, "train")
    for seed in range(20):
        chosen = caption_questions.choose(image, 3, random.Random(seed))
        assert len({question for question, _ in chosen}) == 3
    assert len(caption_questions.choose(image, 99, random.Random(0))) == 5  # no number is said


def test_the_rows_are_those_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        sentences = [{"raw": "A man is riding a red bike."}]
        images.append({"imgid": number, "filename": f"{number}.png", "split": split, "sentences": sentences})
    annotations, out = tmp_path / "dataset_tiny.json", tmp_path / "new" / "rows.jsonl"
    annotations.write_text(json.dumps({"images": images}))
    argv = ["--annotations", str(annotations), "--images", str(tmp_path), "--out", str(out), "--each", "2"]
    assert caption_questions.main(argv) == 0
    assert "8 questions about 4 photos" in capsys.readouterr().out
    first = out.read_bytes()
    assert caption_questions.main(argv) == 0
    assert out.read_bytes() == first
    rows, bad = read_rows(out, tmp_path, template_name="question", split="train")
    assert (len(rows), bad) == (4, [])
    assert {row.image for row in rows} == {tmp_path / "0.png", tmp_path / "1.png"}


def test_the_file_is_the_same_wherever_the_data_lie(tmp_path: Path, monkeypatch, capsys) -> None:
    """Absolute names once gave every machine another hash. Also through a link, and with COCO's subfolders."""
    image = {"imgid": 1, "filename": "1.png", "filepath": "val2014", "split": "train", "sentences": [{"raw": "A dog."}]}
    contents = []
    for place in (tmp_path / "here", tmp_path / "there"):
        photo = place / "data" / "images" / "val2014" / "1.png"
        photo.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(photo)
        (place / "data" / "dataset.json").write_text(json.dumps({"images": [image]}))
        monkeypatch.chdir(place)
        argv = ["--annotations", "data/dataset.json", "--images", "data/images"]
        assert caption_questions.main([*argv, "--out", "rows.jsonl"]) == 0
        assert capsys.readouterr().err == ""
        (row, _), bad = read_rows(Path("rows.jsonl"), template_name="question")
        assert (row.image, bad) == (Path("data/images/val2014/1.png"), [])
        (place / "linked").mkdir()
        (place / "linked" / "data").symlink_to(place / "data")
        assert caption_questions.main([*argv[:2], "--images", "linked/data/images", "--out", "linked/rows.jsonl"]) == 0
        assert Path("linked/rows.jsonl").read_bytes() == Path("rows.jsonl").read_bytes()

        capsys.readouterr()
        assert caption_questions.main([*argv, "--out", "elsewhere/rows.jsonl"]) == 0
        assert "give training.alpaca and eval.qa --images data/images" in capsys.readouterr().err
        (row, _), bad = read_rows(Path("elsewhere/rows.jsonl"), Path("data/images"), template_name="question")
        assert (row.image, bad) == (Path("data/images/val2014/1.png"), [])
        contents.append([Path(name).read_bytes() for name in ("rows.jsonl", "elsewhere/rows.jsonl")])
    assert contents[0] == contents[1]


def test_a_picture_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"imgid": 1, "filename": "1.png", "split": "train", "sentences": [{"raw": "A dog."}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [image]}))
    argv = ["--annotations", str(tmp_path / "dataset.json"), "--images", str(tmp_path)]
    assert caption_questions.main([*argv, "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "there is no picture 1.png in" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(SystemExit):
        caption_questions.main([*argv, "--out", str(tmp_path / "rows.jsonl"), "--each", "0"])
    assert "--each must be at least 1, got 0" in capsys.readouterr().err
