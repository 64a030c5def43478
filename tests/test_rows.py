"""Rows of people's files: what is read, where each row says it stands, and what a bad one is told."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from mmadapter import image
from mmadapter import rows as rows_module
from mmadapter.prompts import TEMPLATES, question_text
from mmadapter.rows import BadRow, Row, answer_text, check_images, read_rows, require_good

DATA = os.environ.get("MMADAPTER_DATA")
ADD = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
GREET = {"instruction": "Greet me.", "input": "", "output": "Hello."}
COLOUR = {"question": "what colour is it ?", "answer": "red"}


def written(folder: Path, text: str, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def as_list(records: list) -> str:
    return json.dumps(records, indent=1)


def as_data(records: list) -> str:
    return json.dumps({"version": {"data": [0]}, "data": records}, indent=1)


def as_lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def alpaca(record: dict) -> Row:
    return Row(TEMPLATES["alpaca"].render(record["instruction"], record.get("input", "")), record["output"])


def without_places(rows: list[Row]) -> list[Row]:
    return [Row(row.prompt, row.response, row.image) for row in rows]


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("form", [as_list, as_data, as_lines])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_the_three_forms_of_a_file_are_told_apart_by_content(tmp_path, form, start):
    """Names say nothing: JSON lines are called .json as often as .jsonl."""
    good, bad = read_rows(written(tmp_path, start + form([ADD, GREET]), "rows.txt"))
    assert bad == []
    assert without_places(good) == [alpaca(ADD), alpaca(GREET)]


def test_a_file_of_one_row(tmp_path):
    """One line of JSON lines is also one JSON object."""
    for text in (as_lines([ADD]), as_list([ADD]), "\n" + as_lines([ADD]).strip()):
        good, _ = read_rows(written(tmp_path, text))
        assert without_places(good) == [alpaca(ADD)]
    assert good[0].where == "rows.json, line 2"
    good, _ = read_rows(written(tmp_path, as_lines([COLOUR])))
    assert [row.response for row in good] == ["red"]


def test_the_prompt_is_that_of_the_template_without_its_separator(tmp_path):
    path = written(tmp_path, as_list([ADD, GREET, COLOUR]))
    prompts = [(row.prompt, row.response) for row in read_rows(path, template_name="plain")[0]]
    assert prompts == [
        ("Add the numbers.:\n2 and 3\n", "5"),
        ("Greet me.:", "Hello."),
        (question_text("what colour is it ?") + ":", "red"),
    ]
    with pytest.raises(ValueError, match="no prompt template 'fancy'"):
        read_rows(path, template_name="fancy")


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": " \n"}])
def test_a_row_without_input_gets_the_prompt_without_input(tmp_path, absent):
    """A blank input would leave a heading with nothing under it."""
    record = {"instruction": "Greet me.", "output": "Hello.", **absent}
    (row,), _ = read_rows(written(tmp_path, as_list([record])))
    assert row.prompt == TEMPLATES["alpaca"].render("Greet me.")
    assert "### Input" not in row.prompt


def test_texts_stay_as_they_are_but_for_the_white_space_around_the_response(tmp_path):
    record = {"instruction": " Say {this}\n", "input": "{input} é", "output": "\n a\u2028b  c_d \n"}
    (row,), _ = read_rows(written(tmp_path, json.dumps(record, ensure_ascii=False)), template_name="plain")
    assert row.prompt == " Say {this}\n:\n{input} é\n"
    assert row.response == "a\u2028b  c_d"


@pytest.mark.parametrize(
    ("written_so", "said"),
    [
        ("garbage_bin", "garbage bin"),
        ("wine_glass, cup, bottle_of_liquid", "wine glass, cup, bottle of liquid"),
        ("the snake_case name, wine_glass", "the snake_case name, wine glass"),
        ("table", "table"),
        ("_", "_"),
        ("__init__", "__init__"),
        ("5_3,2_1", "5 3,2 1"),
    ],
)
def test_underscores_of_an_answer_are_blanks(tmp_path, written_so, said):
    assert answer_text(written_so) == said
    answer = {"question": "what is it ?", "answer": written_so}
    instruction = {"instruction": "what is it ?", "output": written_so}
    good, _ = read_rows(written(tmp_path, as_list([answer, instruction])))
    assert [row.response for row in good] == [said, written_so]


def test_rows_of_a_split_and_rows_that_name_none(tmp_path):
    records = [
        {**COLOUR, "answer": str(number), **split}
        for number, split in enumerate(
            [{"split": "train"}, {}, {"split": "test"}, {"split": None}, {"split": "train "}]
        )
    ]
    path = written(tmp_path, as_list(records))

    def responses(split: str | None) -> list[str]:
        return [row.response for row in read_rows(path, split=split)[0]]

    assert responses(None) == ["0", "1", "2", "3", "4"]
    assert responses("train") == ["0", "1", "3"]
    assert responses("test") == ["1", "2", "3"]
    only = written(tmp_path, as_lines([records[0], records[2], records[0]]))
    with pytest.raises(ValueError, match=r"rows\.json has no rows of split 'val'; it has test, train$"):
        read_rows(only, split="val")


def test_a_bad_row_of_another_split_is_no_concern(tmp_path):
    path = written(tmp_path, as_lines([{**COLOUR, "split": "train"}, {**COLOUR, "answer": "", "split": "test"}]))
    assert read_rows(path, split="train")[1] == []
    assert len(read_rows(path)[1]) == 1


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_beside_the_file_or_in_its_images(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    beside, below = tmp_path / "a.jpg", tmp_path / "images" / "sub" / "b.jpg"
    twice = [tmp_path / "c.jpg", tmp_path / "images" / "c.jpg"]
    for path in (beside, below, *twice):
        path.touch()
    names = ["a.jpg", "sub/b.jpg", "c.jpg", str(below), None, ""]
    good, bad = read_rows(written(tmp_path, as_list([{**COLOUR, "image": name} for name in names])))
    assert bad == []
    assert [row.image for row in good] == [beside, below, twice[0], below, None, None]


def test_a_folder_given_for_the_pictures_is_the_only_one(tmp_path):
    """A picture of the same name beside the file is another picture."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (tmp_path / "a.jpg", photos / "b.jpg"):
        path.touch()
    path = written(tmp_path, as_list([{**ADD, "image": name} for name in ("a.jpg", "b.jpg")]))
    good, bad = read_rows(path, images=photos)
    assert [row.image for row in good] == [photos / "b.jpg"]
    assert [row.reason for row in bad] == [f"there is no picture 'a.jpg' in {photos}"]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; give the folder of the pictures"):
        read_rows(path, images=tmp_path / "absent")


@pytest.mark.parametrize("name", ["absent.jpg", "images", "n" * 5000, "a\0b.jpg"])
def test_a_picture_that_is_not_there_is_a_bad_row(tmp_path, name):
    (tmp_path / "images").mkdir()
    good, bad = read_rows(written(tmp_path, as_lines([COLOUR, {**COLOUR, "image": name}])))
    assert len(good) == 1
    assert bad[0].where == "rows.json, line 2"
    assert bad[0].reason.startswith("there is no picture ")
    assert bad[0].reason.endswith(f" in {tmp_path} or {tmp_path / 'images'}")
    assert len(bad[0].reason) < 500 + len(str(tmp_path))


def test_an_absolute_picture_that_is_not_there_is_looked_for_nowhere_else(tmp_path):
    record = {**COLOUR, "image": str(tmp_path / "absent.jpg")}
    _, bad = read_rows(written(tmp_path, as_lines([COLOUR, record])))
    assert bad[0].reason == f"there is no picture {str(tmp_path / 'absent.jpg')!r}"


def test_every_row_with_an_unreadable_picture_is_bad(tmp_path, monkeypatch):
    """Two rows may share a picture: it is decoded once, and both are named."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    names = ["half.jpg", "good.jpg", "text.png", "half.jpg", None]
    rows = [
        Row("", "x", None if name is None else tmp_path / name, where=f"line {line}")
        for line, name in enumerate(names, 1)
    ]
    checked = []
    check = image.check_image
    monkeypatch.setattr(image, "check_image", lambda path: (checked.append(path.name), check(path)))
    bad = check_images(rows)
    assert [row.where for row in bad] == ["line 1", "line 3", "line 4"]
    assert bad[0].reason == bad[2].reason
    assert bad[0].reason.startswith(f"{tmp_path / 'half.jpg'} is ")
    assert bad[1].reason == f"{tmp_path / 'text.png'} is not an image that can be read"
    assert sorted(checked) == ["good.jpg", "half.jpg", "text.png"]
    assert check_images([]) == []


def test_a_picture_that_went_away_is_bad(tmp_path):
    (bad,) = check_images([Row("", "x", tmp_path / "gone.jpg", where="line 1")])
    assert "gone.jpg not found" in str(bad)


def test_only_many_pictures_show_progress(tmp_path, monkeypatch, capsys):
    rows = []
    for name in "abc":
        Image.new("L", (2, 2)).save(tmp_path / f"{name}.png")
        rows += [Row("", "x", tmp_path / f"{name}.png")] * 2
    monkeypatch.setattr(rows_module, "FEW_PICTURES", 3)
    check_images(rows)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(rows_module, "FEW_PICTURES", 2)
    check_images(rows)
    assert "3/3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "expected an object with named fields, got [1, 2]"),
        (None, "expected an object with named fields, got None"),
        ("a\nb", r"expected an object with named fields, got 'a\nb'"),
        ({}, "has neither instruction nor question, its fields are "),
        ({"text": "x"}, "has neither instruction nor question, its fields are 'text'"),
        ({"instruction": "x"}, "has no output"),
        ({"output": "x"}, "has neither instruction nor question, its fields are 'output'"),
        ({**ADD, "output": None}, "output must be text, got None"),
        ({**ADD, "output": 5}, "output must be text, got 5"),
        ({**ADD, "output": " \n\t"}, "output is empty"),
        ({**ADD, "instruction": ["x"]}, "instruction must be text, got ['x']"),
        ({**ADD, "instruction": ""}, "instruction is empty"),
        ({**ADD, "input": 3}, "input must be text, got 3"),
        ({**ADD, "image": 3}, "image must be text, got 3"),
        ({**ADD, "split": 3}, "split must be text, got 3"),
        ({"question": "x"}, "has no answer"),
        ({"question": "x", "answer": ""}, "answer is empty"),
        ({"question": " ", "answer": "x"}, "question is empty"),
        ({**ADD, "output": "ab\ud83d"}, "output holds half a character (a lone surrogate) at position 3"),
    ],
)
@pytest.mark.parametrize("form", [as_list, as_data, as_lines])
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path, form, record, reason):
    good, bad = read_rows(written(tmp_path, form([ADD, record, GREET])))
    assert without_places(good) == [alpaca(ADD), alpaca(GREET)]
    assert [row.reason for row in bad] == [reason]
    assert str(bad[0]) == f"{bad[0].where}: {reason}"


def test_a_long_value_is_shown_in_part(tmp_path):
    records = [ADD, {**ADD, "output": list(range(9999))}, list(range(9999)), dict.fromkeys(map(str, range(9999)), 1)]
    _, bad = read_rows(written(tmp_path, as_list(records)))
    assert [len(row.reason) < 150 for row in bad] == [True] * 3


def test_a_row_of_json_lines_is_named_by_its_line(tmp_path):
    text = f"\n{json.dumps(ADD)}\n\n{json.dumps({**ADD, 'output': ''})}\n3\n{json.dumps(GREET)}"
    good, bad = read_rows(written(tmp_path, text, "rows.jsonl"))
    assert [row.where for row in good] == ["rows.jsonl, line 2", "rows.jsonl, line 6"]
    assert [row.where for row in bad] == ["rows.jsonl, line 4", "rows.jsonl, line 5"]


def test_unusual_line_ends_within_a_text_are_no_line_ends(tmp_path):
    """str.splitlines would cut the row in two."""
    record = {**ADD, "output": "a\u2028b\x85c"}
    good, bad = read_rows(written(tmp_path, f"{json.dumps(record, ensure_ascii=False)}\n{json.dumps(GREET)}\n"))
    assert (len(good), bad) == (2, [])
    assert good[1].where == "rows.json, line 2"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_of_a_list_is_named_by_its_number_and_line(tmp_path, end):
    text = (
        '[ {"a": 1},\n\n {"instruction": "x",\n "output": "a]b,c"} ,"x\\ny", 7,\n{"instruction": "y", "output": "z"}\n]'
    )
    path = tmp_path / "rows.json"
    path.write_bytes(text.replace("\n", end).encode())
    good, bad = read_rows(path)
    assert [row.where for row in good] == ["rows.json, row 2 (line 3)", "rows.json, row 5 (line 5)"]
    assert [row.where for row in bad] == [
        f"rows.json, row {place}" for place in ("1 (line 1)", "3 (line 4)", "4 (line 4)")
    ]


def test_a_row_under_data_is_named_by_its_number_and_line(tmp_path):
    """Other fields, lists among them and even of the same name deeper down, stand before and behind."""
    rows = f'{json.dumps(ADD)},\n{{"x": 1}}'
    path = written(tmp_path, f'{{"about": {{"data": [1, 2]}},\n"n": [3],"data" : \n[\n{rows}], "more": ["data"]}}')
    good, bad = read_rows(path)
    assert [row.where for row in good] == ["rows.json, row 1 (line 4)"]
    assert [row.where for row in bad] == ["rows.json, row 2 (line 5)"]
    (row,), _ = read_rows(written(tmp_path, f'{{"data": [{json.dumps(ADD)}],\n"data": [{json.dumps(GREET)}]}}'))
    assert (row.response, row.where) == ("Hello.", "rows.json, row 1 (line 2)"), "the last of two is JSON's"


def test_a_line_that_is_not_json_is_a_bad_row(tmp_path):
    """A process killed while it wrote leaves half a line, at the end as a rule."""
    whole = json.dumps(ADD)
    for lines in ([whole, whole[:20], whole], [whole[:20], whole, whole], [whole, "x", "y", "z"]):
        good, bad = read_rows(written(tmp_path, "\n".join(lines)))
        assert len(good) == lines.count(whole)
        assert [row.where for row in bad] == [
            f"rows.json, line {n}" for n, line in enumerate(lines, 1) if line != whole
        ]
        assert all(row.reason.startswith("not JSON: ") for row in bad)
        assert bad[0].reason.endswith(f"(column {1 if 'x' in lines else 17})")


def test_a_line_that_json_cannot_hold_is_a_bad_row(tmp_path):
    lines = [json.dumps(ADD), "[" * 99_999, '{"instruction": ' + "9" * 5000 + "}"]
    good, bad = read_rows(written(tmp_path, "\n".join(lines)))
    assert (len(good), len(bad)) == (1, 2)
    assert all(row.reason.startswith("not JSON: ") for row in bad)


# ------------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hello\nthere", "line 1, column 1"),
        ('[{"instruction": "x"},\n {"instruction": x}]', "line 2, column 18"),
        ('[\n{"instruction": "x", "output": "y"}\n', "line 3, column 1"),
        ('{"data": [\n{"instruction": "x", "output": "y"}\n', "line 3, column 1"),
        ('{\n "data": oops}', "line 2, column 10"),
        ('[{"instruction": "x", "output": "y"}]\n]', "line 2, column 1"),
        ("[" * 99_999, "line 1, column 1"),
        ("instruction,output\nx,y\n", "line 1, column 1"),
    ],
)
def test_a_file_that_is_not_json_is_an_error_with_line_and_column(tmp_path, text, place):
    """A JSON list cut short must not pass for JSON lines because its rows stand on lines of their own."""
    with pytest.raises(ValueError, match=rf"rows\.json is not JSON: .* at {place}; expected a list of rows") as error:
        read_rows(written(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("\ufeff", "is empty"),
        ("[]", "holds no rows"),
        ('{"data": []}', "holds no rows"),
        ("{}", "holds {}"),
        ("3", "holds 3"),
        ('"rows"', "holds 'rows'"),
        ('{"rows": [1]}', r"holds \{'rows': \[1\]\}"),
    ],
)
def test_a_file_without_rows(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"rows\.json {message}; expected a list of rows, or one row a line"):
        read_rows(written(tmp_path, text))


def test_a_file_without_one_good_row_cannot_be_gone_on_with(tmp_path):
    """--skip-bad-rows would otherwise leave nothing, and a division by zero far from its cause."""
    with pytest.raises(
        ValueError, match=r"no row to learn from: 4 bad rows: rows\.json, row 1 \(line 1\): has neither"
    ):
        read_rows(written(tmp_path, '[{"prompt": "x"}, 1, 2, 3]'))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.json"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_rows(tmp_path)
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps([ADD]).encode("utf-16"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_rows(path)


# -------------------------------------------------------------------------------------------------------- require_good

BAD = [BadRow(f"rows.jsonl, line {line}", "output is\nempty") for line in range(1, 6)]


def test_nothing_bad_is_nothing_said(capsys):
    require_good([], skip=True)
    require_good([], skip=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, "1 bad row: rows.jsonl, line 1: output is empty"),
        (3, "3 bad rows: " + "; ".join(f"rows.jsonl, line {line}: output is empty" for line in (1, 2, 3))),
        (5, "5 bad rows: " + "; ".join(f"rows.jsonl, line {line}: output is empty" for line in (1, 2, 3)) + "; ..."),
    ],
)
def test_bad_rows_stop_or_are_left_out_aloud(capsys, count, shown):
    stop = f"{shown}; mend them, or go on without them with --skip-bad-rows"
    with pytest.raises(ValueError, match=f"^{re.escape(stop)}$"):
        require_good(BAD[:count], skip=False)
    assert capsys.readouterr() == ("", "")
    require_good(BAD[:count], skip=True)
    assert capsys.readouterr() == ("", f"left out {shown}\n")


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_nine_empty_outputs_of_alpaca_are_named():
    path = Path(DATA) / "alpaca" / "alpaca_17k.json"
    start = time.process_time()
    good, bad = read_rows(path)
    assert time.process_time() - start < 2
    assert (len(good), len(bad)) == (17387 - 9, 9)
    lines = path.read_text(encoding="utf-8").split("\n")
    for row in bad:
        number, line = (int(digits) for digits in row.where.removeprefix("alpaca_17k.json, row ")[:-1].split(" (line "))
        assert row.reason == "output is empty"
        assert lines[line - 1] == "{"
        assert lines[line + 2] == '"output": ""'
        assert line == 2 + 5 * (number - 1)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_daquar_is_read_whole():
    path = Path(DATA) / "daquar" / "questions.json"
    train, bad = read_rows(path, template_name="plain", split="train")
    assert (len(train), bad) == (6795, [])
    test, bad = read_rows(path, template_name="plain", split="test")
    assert (len(test), bad) == (5673, [])
    assert not any("_" in row.response for row in train + test)
    assert test[0].response == "garbage bin"
    assert test[0].image == path.parent / "images" / "image1.jpg"
    assert check_images(test[:50]) == []
