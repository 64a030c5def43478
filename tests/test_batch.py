"""Finding, reading and resuming with a stand-in for the model that names colours; one test runs the tiny model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_session
from PIL import Image

from mmadapter.batch import caption_files, find_images

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "cyan", "magenta"]


def paint(file: Path, colour: str = "red") -> str:
    """Writes a picture of one colour and returns its path as a user gives it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(file)
    return str(file)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Eight pictures, one of each colour, in order."""
    return [paint(tmp_path / "photos" / f"{number}.png", colour) for number, colour in enumerate(COLOURS)]


class Painter:
    """Stands in for a session: its caption of a picture is the name of its colour, with a letter past ASCII."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.encoder = SimpleNamespace(image_size=8, config=SimpleNamespace(resize="squash"))
        self.batches: list[list[str]] = []
        self.loads, self.stop_at, self.settings = 0, stop_at, {}

    def load(self) -> Painter:
        self.loads += 1
        return self

    def caption(self, images: Sequence[Image.Image], *, batch_size: int, **settings: object) -> list[str]:
        assert len(images) <= batch_size
        assert all(image.size == (8, 8) for image in images)  # not the photo as it came from the camera
        if self.stop_at == len(self.batches):
            raise KeyboardInterrupt
        names = {tuple(Image.new("RGB", (1, 1), name).getpixel((0, 0))): name for name in COLOURS}
        self.batches.append([f"{names[image.getpixel((3, 3))]} é" for image in images])
        self.settings = settings
        return self.batches[-1]

    def run(self, paths: Sequence[str], out: Path | None = None, batch_size: int = 3, **settings: object) -> int:
        found, failed = find_images(paths)
        return caption_files(self.load, found, failed, out=out, batch_size=batch_size, settings=settings)

    @property
    def made(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


# Finding


def test_a_folder_is_walked_in_sorted_order(tmp_path):
    names = ["b.png", "a.JPG", "c/z.jpeg", "c/d/k.webp", "c/e.gif", "Z.bmp"]
    files = sorted(paint(tmp_path / "in" / name) for name in names)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / "folder.png").mkdir()
    assert find_images([str(tmp_path / "in")]) == (files, {})
    assert len(files) == len(names)


def test_links_to_files_are_followed(tmp_path):
    elsewhere = paint(tmp_path / "elsewhere" / "x.png")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.png").symlink_to(elsewhere)
    (folder / "broken.png").symlink_to(tmp_path / "nothing")
    (folder / "loop").symlink_to(folder)
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    assert find_images([str(folder)]) == ([str(folder / "link.png")], {})


def test_globs_and_names_that_look_like_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1.png", "a2.png", "b1.png", "deep/er/a3.png", "[ab]1.png"):
        paint(Path(name))
    assert find_images(["a*.png"])[0] == ["a1.png", "a2.png"]
    assert find_images(["**/a*.png"])[0] == ["a1.png", "a2.png", "deep/er/a3.png"]
    assert find_images(["[ab]1.png"])[0] == ["[ab]1.png"]  # the file of that name
    assert find_images(["[ab]2.png"])[0] == ["a2.png"]


def test_nothing_is_found_twice_and_the_order_is_that_of_the_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/1.png", "x/2.png", "y.png"):
        paint(Path(name))
    assert find_images(["y.png", "x/2.png", "x", "*.png", "y.png"])[0] == ["y.png", "x/2.png", "x/1.png"]


def test_arguments_that_name_nothing_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    paint(Path("ok.png"))
    found, failed = find_images(["empty", "ok.png", "none.png", "*.tif"])
    assert found == ["ok.png"]
    assert failed["empty"].startswith("no pictures in this folder (.jpg, .jpeg, ")
    assert failed["none.png"] == failed["*.tif"] == "no such file, and no file matches it as a pattern"


# Captioning


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_captions_come_in_order_on_lines_of_path_and_caption(photos, tmp_path, capsys, batch_size):
    painter, out = Painter(), tmp_path / "out.jsonl"
    assert painter.run(photos, out, batch_size, beams=4) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == "".join(f"{path}\t{colour} é\n" for path, colour in zip(photos, COLOURS, strict=True))
    assert "error" not in stderr
    expected = [{"image": path, "caption": f"{colour} é"} for path, colour in zip(photos, COLOURS, strict=True)]
    assert lines_of(out) == expected
    assert "é" in out.read_text("utf-8")
    assert [len(batch) for batch in painter.batches] == [
        len(range(n, min(n + batch_size, 8))) for n in range(0, 8, batch_size)
    ]
    assert painter.settings == {"beams": 4}
    assert painter.run(photos) == 0  # without a file


def test_bad_pictures_are_told_on_their_lines_and_the_rest_is_done(photos, tmp_path, capsys):
    """Exit 1, each error in its place, and the batches around it whole."""
    Path(photos[1]).write_bytes(b"no picture")
    Path(photos[4]).write_bytes(Path(photos[4]).read_bytes()[:-30])
    for number in (5, 6, 7):
        Path(photos[number]).write_bytes(b"a batch without any picture"[number:])
    painter, out = Painter(), tmp_path / "out.jsonl"
    assert painter.run([*photos, str(tmp_path / "none.png")], out, batch_size=2) == 1
    stdout, stderr = capsys.readouterr()
    assert [line.split("\t") for line in stdout.splitlines()] == [[photos[n], f"{COLOURS[n]} é"] for n in (0, 2, 3)]
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    assert errors[0] == f"error: {tmp_path / 'none.png'}: no such file, and no file matches it as a pattern"
    assert errors[1] == f"error: {photos[1]}: is not an image that can be read"
    assert errors[2].startswith(f"error: {photos[4]}: is damaged or cut short: ")
    rows = lines_of(out)
    assert [row["image"] for row in rows] == [str(tmp_path / "none.png"), *photos]
    assert ["error" in row for row in rows] == [True, False, True, False, False, True, True, True, True]
    assert rows[2]["error"] == f"{photos[1]} is not an image that can be read"


def test_the_model_is_loaded_only_for_something_to_do(tmp_path, photos, capsys):
    painter, out = Painter(), tmp_path / "out.jsonl"
    assert painter.run([str(tmp_path / "none")], out) == 1
    assert painter.loads == 0
    painter.run(photos, out)
    assert painter.loads == 1
    capsys.readouterr()
    assert painter.run(photos, out) == 0
    assert painter.loads == 1
    assert capsys.readouterr() == ("", f"8 of 8 captions are already in {out}\n")


# Resuming


def test_a_run_goes_on_where_another_stopped(photos, tmp_path, capsys):
    """Nothing is made twice, and what was made before a stop is kept."""
    out = tmp_path / "out.jsonl"
    stopped = Painter(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(photos, out)
    assert [row["caption"] for row in lines_of(out)] == stopped.made == [f"{colour} é" for colour in COLOURS[:6]]
    capsys.readouterr()
    again = Painter()
    assert again.run(photos, out) == 0
    assert again.made == ["cyan é", "magenta é"]
    assert lines_of(out) == [{"image": p, "caption": f"{c} é"} for p, c in zip(photos, COLOURS, strict=True)]
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [f"{photos[6]}\tcyan é", f"{photos[7]}\tmagenta é"]
    assert stderr.startswith(f"6 of 8 captions are already in {out}\n")


def test_an_error_is_tried_again(photos, tmp_path):
    out, good = tmp_path / "out.jsonl", Path(photos[1]).read_bytes()
    Path(photos[1]).write_bytes(b"")
    assert Painter().run([*photos[:3], str(tmp_path / "x*.png")], out) == 1
    Path(photos[1]).write_bytes(good)
    again = Painter()
    assert again.run(photos[:3], out) == 0
    assert again.made == ["green é"]
    assert sorted(row["image"] for row in lines_of(out)) == photos[:3]
    assert all("caption" in row for row in lines_of(out))


def test_captions_of_other_pictures_stay(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    Painter().run(photos[:2], out)
    before, inode = out.read_bytes(), out.stat().st_ino
    Painter().run(photos[2:3], out)
    assert out.read_bytes().startswith(before)
    assert out.stat().st_ino == inode  # nothing to mend, so the file is not written anew
    assert len(lines_of(out)) == 3


def test_a_line_cut_short_is_mended_wherever_it_was_cut(photos, tmp_path):
    """A kill or a full disk may leave any part of a line, half of a character included."""
    out = tmp_path / "out.jsonl"
    Painter().run(photos[:2], out)
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        out.write_bytes(whole[:end])
        again = Painter()
        assert again.run(photos[:2], out) == 0
        assert out.read_bytes() == whole
        assert again.made == ([] if end == len(whole) - 1 else ["green é"])  # all but the line's end was there


FOREIGN = [
    b"Dear diary",
    b"Dear diary\n",
    b'[{"image_id": 1, "caption": "a dog"}]',  # COCO's results, as json.dump leaves them
    b'[{"image_id": 1, "caption": "a dog"}]\n',
    b'{"images": [], "dataset": "flickr8k"}',
    b'{"image": "a.png", "label": 3}\n',
    b'{"image": "a.png", "label": 3}',
    b'{"image": 5, "caption": "a dog"}\n',
    b'{"image": "a.png", "caption": null}\n',
    b'"image"\n',
    b"\xff\xd8\xff\xe0 a photo",
    b'{"image": "a.png", "cap\n{"image": "b.png", "caption": "a dog"}\n',  # cut short, but not at the end
]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("ours", [b"", '{"image": "x.png", "caption": "red é"}\n'.encode()])
def test_a_file_of_something_else_is_left_as_it_is(photos, tmp_path, content, ours):
    """The last line without an end was once taken for one cut short, whatever stood in it, and the file was lost."""
    out, painter = tmp_path / "out.jsonl", Painter()
    out.write_bytes(ours + content)
    number = 2 if ours else 1
    with pytest.raises(ValueError, match=rf"out\.jsonl, line {number}, is not a caption; choose another --out file"):
        painter.run(photos, out)
    assert out.read_bytes() == ours + content
    assert painter.loads == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl", "photos"]


def test_blank_lines_and_fields_of_others_do_not_matter(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    line = json.dumps({"image": photos[0], "caption": "by hand", "score": 0.5})
    out.write_text(f"\n{line}\r\n\n")
    painter = Painter()
    assert painter.run(photos[:2], out) == 0
    assert painter.made == ["green é"]
    assert lines_of(out)[0] == {"image": photos[0], "caption": "by hand", "score": 0.5}


def test_an_out_file_that_cannot_be(photos, tmp_path):
    painter = Painter()
    with pytest.raises(FileNotFoundError, match=r"the folder of .*nowhere/out\.jsonl does not exist; make it first"):
        painter.run(photos, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(ValueError, match="photos is a folder; --out takes a file"):
        painter.run(photos, tmp_path / "photos")
    assert painter.loads == 0


def test_a_device_or_pipe_is_written_to_and_never_replaced(photos, tmp_path):
    """`--out /dev/null` once made the device an ordinary file for everybody, where the user may do so."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert Painter().run(photos[:2], pipe) == 0
        assert pipe.is_fifo()
        assert len(os.read(reader, 10_000).splitlines()) == 2
    finally:
        os.close(reader)


def test_a_link_to_the_out_file_stays_a_link(photos, tmp_path):
    out, link = tmp_path / "out.jsonl", tmp_path / "link"
    out.write_text('{"image": "x.png", "error": "once"}\n')
    link.symlink_to(out)
    assert Painter().run(photos[:1], link) == 0
    assert link.is_symlink()
    assert [row["image"] for row in lines_of(out)] == photos[:1]


def test_a_file_name_that_is_no_utf8_does_not_end_the_run(photos, tmp_path, capsys):
    odd = os.path.join(tmp_path, os.fsdecode(b"\xff.png"))
    try:
        os.link(photos[0], odd)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    painter, out = Painter(), tmp_path / "out.jsonl"
    assert painter.run([odd, photos[1]], out) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("\\udcff.png\tred é")
    assert lines_of(out)[0]["image"] == odd
    assert painter.run([odd, photos[1]], out) == 0
    assert len(painter.made) == 2


# With a model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_session.Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


def test_captions_are_those_of_the_session(tiny, tmp_path):
    """Shrinking a photo where it is read, to save memory, changes nothing; nor does the company of a batch."""
    out = tmp_path / "out.jsonl"
    found, failed = find_images([str(tiny.pictures)])
    assert len(found) == 5
    assert (
        caption_files(
            lambda: tiny.load(tiny.sees), found, failed, out=out, batch_size=2, settings={"max_new_tokens": 9}
        )
        == 0
    )
    session = tiny.load(tiny.sees)
    captions = [session.caption(path, max_new_tokens=9)[0] for path in found]
    assert [row["caption"] for row in lines_of(out)] == captions
    assert len(set(captions)) > 1


def test_a_model_that_cannot_see_is_one_error_and_not_one_a_picture(tiny, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="the base model alone cannot see"):
        caption_files(tiny.load, *find_images([str(tiny.pictures)]), out=out, batch_size=2, settings={})
    assert capsys.readouterr() == ("", "")
    assert out.read_bytes() == b""
