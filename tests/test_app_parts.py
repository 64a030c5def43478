"""The parts of the app that stand alone: the look inside as HTML, feedback, uploads; and what the page's buttons do."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import resource
import struct
import threading
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_service import FakeRun, FakeService
from PIL import Image
from tiny_session import picture

from app.chat_tab import bubbles
from app.conversation import Turn
from app.feedback import Feedback
from app.inside import ADDS, BAR, TAKES, inside_html
from app.job import Busy, Job
from app.outcome import BASE, Answer, Outcome, Side
from app.render import AS_WRITTEN, by_side, chat_text, status_text
from app.server import ServerSettings, build_server, running
from app.tasks import Current, Tasks
from app.uploads import Limits, TooLarge, read_data_uri, read_upload
from mmadapter.inspection import Inside

INSIDE = Inside(
    gates=[[0.5, -0.25, 0.0], [0.1, -1.0, 0.2]],
    first_layer=2,
    prompt_share=[0.0, 0.0, 0.3, 0.06],
    scale_share={"4/2x3": 0.25, "final": 0.75},
)


class Page(HTMLParser):
    """The elements of a piece of HTML: (tag, attributes, text directly in it), and whether every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, []))
        self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.found[self.open[-1]][2].append(data)

    def all(self, tag: str, name: str | None = None) -> list[dict[str, str]]:
        """Attributes of each element of this tag, and of this class where one is given, with its text as "text"."""
        return [
            {**attributes, "text": "".join(texts)}
            for kind, attributes, texts in self.found
            if kind == tag and (name is None or name in attributes.get("class", "").split())
        ]


def test_the_heat_map_has_a_cell_for_every_gate_with_the_topmost_layer_on_top() -> None:
    page = Page(inside_html(INSIDE))
    cells = page.all("rect", "cell")
    titles = [item["text"] for item in page.all("title")][:6]
    assert titles == [
        "layer 3, head 1: +0.500",
        "layer 3, head 2: −0.250",
        "layer 3, head 3: +0.000",
        "layer 4, head 1: +0.100",
        "layer 4, head 2: −1.000",
        "layer 4, head 3: +0.200",
    ]
    depths = [float(cell["fill-opacity"]) for cell in cells]
    assert depths[2] == 0
    assert depths[4] == 1
    assert sorted(depths) == [depths[index] for index in (2, 3, 5, 1, 0, 4)]  # by the size of the gate
    assert [cell["fill"] for index, cell in enumerate(cells) if index != 2] == [ADDS, TAKES, ADDS, TAKES, ADDS]
    assert float(cells[0]["y"]) > float(cells[3]["y"])
    assert float(cells[0]["x"]) < float(cells[1]["x"])


def test_bars_are_as_long_as_the_shares() -> None:
    bars = Page(inside_html(INSIDE)).all("rect", "bar")
    lengths = [float(bar["width"]) for bar in bars]
    assert len(bars) == 4  # two adapted layers, two scales
    assert lengths[0] == pytest.approx(5 * lengths[1], rel=0.01)
    assert lengths[3] == pytest.approx(3 * lengths[2], rel=0.01)
    cells = Page(inside_html(INSIDE)).all("rect", "cell")
    for bar, cell in ((bars[0], cells[0]), (bars[1], cells[3])):  # rows of both charts are at one height
        assert float(bar["y"]) == pytest.approx(float(cell["y"]), abs=1.5)


def test_what_the_charts_show_is_said_in_words_and_numbers() -> None:
    page = Page(inside_html(INSIDE))
    (summary,) = page.all("p", "inside-summary")
    assert summary["text"] == (
        "On average 18% of what attention added to this answer came from the adapter's prompts, most in layer 3 (30%). "
        "The strongest gate is that of layer 4, head 2 (−1.00). "
        "The image token leans most on the encoder's own output (75%)."
    )
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert [svg["role"] for svg in page.all("svg")] == ["img"] * 3
    assert labels == [
        "Heat map of the gates of 2 layers and 3 heads, from −1.00 to +1.00; "
        "the strongest is −1.00 in layer 4, head 2.",
        "Bars of the prompts' share in 2 layers, 6.0% to 30%, most in layer 3.",
        "Bars of the scales' shares: block 4, 2 × 3 cells 25%, the encoder's own output 75%.",
    ]
    cells = [cell["text"] for cell in page.all("td")]
    assert cells == ["6.0%", "+0.100", "−1.000", "+0.200", "30%", "+0.500", "−0.250", "+0.000", "25%", "75%"]
    assert [head["text"] for head in page.all("th") if head["scope"] == "row"] == [
        "4", "3", "block 4, 2 × 3 cells", "the encoder's own output",
    ]  # fmt: skip


def test_without_an_image_there_is_no_chart_of_scales() -> None:
    page = Page(inside_html(Inside([[0.1]], 0, [0.5], {}, 1.5)))
    assert len(page.all("svg")) == 2
    assert "The gates are shown at strength 1.5." in page.all("p")[0]["text"]
    assert "image" not in page.all("p")[0]["text"]


@pytest.mark.parametrize(
    ("strength", "sentence"),
    [
        (0.0, "At strength 0 the adapter changes nothing: these are the base model's own words."),
        (1.0, "Every gate is 0, so the prompts change nothing."),
    ],
)
def test_gates_of_zero_are_drawn_and_said(strength: float, sentence: str) -> None:
    """A division by the strongest gate would fail."""
    html = inside_html(Inside([[0.0, 0.0]], 0, [0.0], {"1": 0.0, "final": 0.0}, strength))
    page = Page(html)
    assert page.all("p")[0]["text"] == sentence
    assert page.all("svg")[0]["aria-label"].endswith("all of them are 0.")
    assert [float(cell["fill-opacity"]) for cell in page.all("rect", "cell")] == [0, 0]
    assert "nan" not in html


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 9), (80, 64)])
def test_charts_fit_a_phone_whatever_the_model(layers: int, heads: int) -> None:
    inside = Inside([[0.1] * heads] * layers, 0, [1.0] * layers, {"final": 1.0})
    page = Page(inside_html(inside))
    for svg in page.all("svg"):
        assert float(svg["width"]) <= 321
        assert float(svg["height"]) < 600
    for cell in page.all("rect", "cell"):
        assert float(cell["x"]) + float(cell["width"]) <= 321
    labels = [text for text in page.all("text") if text["text"].isdigit() and text["text-anchor"] == "end"]
    heights = sorted(float(text["y"]) for text in labels[: len(labels) // 2])
    assert all(low - high >= 12 for high, low in itertools.pairwise(heights))  # no label on another


def test_nothing_in_it_runs_or_is_fetched_and_names_are_escaped() -> None:
    html = inside_html(Inside([[0.1]], 0, [0.5], {'9"><script>x': 1.0}))
    page = Page(html)
    assert not page.all("script")
    assert not re.search(r"https?:|url\(|@import| on\w+=| id=", html)  # ids would clash where two stand on a page
    assert 'block 9"><script>x' in [text["text"] for text in page.all("text")]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", [ADDS, TAKES, BAR])
@pytest.mark.parametrize("page", ["#ffffff", "#f8fafc", "#1f2937", "#000000"])
def test_colours_stand_out_on_light_and_dark_pages(colour: str, page: str) -> None:
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3


# Feedback


def entry(**changes: object) -> dict:
    plain = {"task": "answer", "adapter": "qa", "strength": 1.0, "settings": {"seed": 3}, "text": "a cat"}
    return {**plain, "verdict": "up", **changes}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_feedback_is_a_line_of_json_without_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "feedback.jsonl"
    shown = picture(1)
    Feedback(path).add(**entry(question="what?", comment="schön\nja", image=shown))
    Feedback(path).add(**entry(verdict=None, task="chat", messages=[{"role": "user", "content": "hi \ud83d"}]))
    first, second = lines(path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    digest = hashlib.sha256(shown.tobytes()).hexdigest()
    assert first == {
        **entry(question="what?", comment="schön\nja", messages=[]),
        "image": {"sha256": digest, "width": 40, "height": 30},
    }
    assert second["messages"] == [{"role": "user", "content": "hi \ud83d"}]
    assert (second["verdict"], second["image"], second["question"]) == (None, None, "")
    assert path.stat().st_size < 1000
    assert "schön" in path.read_text(encoding="utf-8")


def test_threads_do_not_cut_into_each_others_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is written in two halves here, as a system may do with any write."""

    def in_halves(path: Path, line: bytes) -> None:
        for half in (line[: len(line) // 2], line[len(line) // 2 :]):
            with open(path, "ab") as file:
                file.write(half)
            time.sleep(0.001)

    monkeypatch.setattr("app.feedback._append", in_halves)
    feedback = Feedback(tmp_path / "feedback.jsonl")

    def work(number: int) -> None:
        for count in range(10):
            feedback.add(**entry(comment=f"{number}-{count}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    comments = [line["comment"] for line in lines(feedback.path)]
    assert sorted(comments) == sorted(f"{number}-{count}" for number in range(6) for count in range(10))


def test_a_line_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text('{"time": "2')
    Feedback(path).add(**entry())
    cut, whole = path.read_text().splitlines()
    assert cut == '{"time": "2'
    assert json.loads(whole)["text"] == "a cat"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl")
    feedback.add(**entry())
    before = feedback.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(OSError, match=r"only 50 of \d+ bytes could be written; is the disk full\?"):
            feedback.add(**entry())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert feedback.path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "meh"}, 'a verdict is "up", "down" or None, got \'meh\''),
        ({"comment": "x" * 4001}, "the comment has 4001 characters, at most 4000 are kept; shorten it"),
    ],
)
def test_feedback_of_another_form_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl")
    with pytest.raises(ValueError, match=re.escape(message)):
        feedback.add(**entry(**changes))
    assert feedback.path.read_bytes() == b""


def test_a_file_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot keep feedback in .* \(Is a directory\); give a file"):
        Feedback(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot keep feedback in"):
        Feedback(tmp_path / "file" / "feedback.jsonl")


# Uploads


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds no pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + checked + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_what_cameras_and_browsers_make_is_read(form: str, tmp_path: Path) -> None:
    data = encoded(picture(1), form)
    read = read_upload(data)
    assert (read.mode, read.size) == ("RGB", (40, 30))
    (tmp_path / "file").write_bytes(data)  # known by its content, not its name
    assert read_upload(tmp_path / "file").tobytes() == read.tobytes()
    if form in ("PNG", "BMP", "TIFF", "PPM"):
        assert read.tobytes() == picture(1).tobytes()


def test_an_upload_is_turned_upright_and_laid_over_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_upload(encoded(picture(1), "JPEG", exif=exif)).size == (30, 40)
    assert read_upload(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_postscript_never_reaches_the_program_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes EPS by starting Ghostscript on it."""
    import PIL.EpsImagePlugin

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("PostScript was run"))
    data = encoded(picture(1), "EPS")
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS"  # Pillow itself would take it
    with pytest.raises(ValueError, match="the picture is no picture that can be read; send JPEG, PNG"):
        read_upload(data)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = encoded(picture(1))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("app.uploads.load_image", lambda _: pytest.fail("decoded"))
    with pytest.raises(TooLarge, match="has 7000 x 6000 pixels, at most 40,000,000 are taken; make it smaller"):
        read_upload(png_header(7000, 6000))
    with pytest.raises(TooLarge, match="has too many pixels, at most 40,000,000 are taken"):
        read_upload(png_header(60000, 60000))  # Pillow's own limit comes first
    with pytest.raises(TooLarge, match="has 40 x 30 pixels, at most 1,199 are taken"):
        read_upload(small, Limits(max_pixels=1199))


def test_limits_take_what_just_fits() -> None:
    data = encoded(picture(1))
    assert read_upload(data, Limits(max_bytes=len(data), max_pixels=1200)).size == (40, 30)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert read_data_uri(uri, Limits(max_bytes=len(data))).size == (40, 30)
    for read, source in ((read_upload, data), (read_data_uri, uri)):
        with pytest.raises(TooLarge, match=r"the picture has more than the 0\.\d+ MB that are taken; make it smaller"):
            read(source, Limits(max_bytes=len(data) - 1))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(10**12)  # takes no room on the disk, but would not fit into memory
    with pytest.raises(TooLarge, match=r"^large\.png has more than the 0\.1 MB"):
        read_upload(path, Limits(max_bytes=100_000))


def test_a_long_data_uri_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(TooLarge, match=r"more than the 0\.001 MB"):
        read_data_uri("data:image/png;base64," + "A" * 2000, Limits(max_bytes=1000))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("gone.png", None, FileNotFoundError, "gone.png is not there any more; send it again"),
        ("empty.png", b"", ValueError, "empty.png is empty; send a picture"),
        ("words.png", b"some words", ValueError, "words.png is no picture that can be read; send JPEG, PNG, WebP, GIF"),
        (".", None, ValueError, "is not a file; send a picture"),
    ],
)
def test_what_is_no_picture_is_said_without_its_folder(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=re.escape(message)) as raised:
        read_upload(tmp_path / name)
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_picture_cut_short_anywhere_is_one_line(form: str) -> None:
    """Pillow raises SyntaxError, struct.error, EOFError and others on damaged files."""
    data = encoded(picture(1), form)
    refused = []
    for end in range(1, len(data), max(1, len(data) // 60)):
        try:
            read_upload(data[:end])
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in message for message in refused)


def test_a_data_uri_is_read_in_the_forms_that_clients_write() -> None:
    text = base64.b64encode(encoded(picture(2))).decode()
    expected = picture(2).tobytes()
    for head in ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/png;charset=utf-8;BASE64,"):
        assert read_data_uri(head + text).tobytes() == expected
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert read_data_uri(f" data:image/png;base64,{wrapped}\n").tobytes() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/etc/passwd", "expected a data URI, \"data:image/jpeg;base64,...\", got '/etc/passwd'"),
        ("x" * 100, f"got '{'x' * 30}'"),
        ("data:text/html;base64,AAAA", "this one is of type text/html"),
        ("data:;base64,AAAA", "this one is of type text/plain"),
        ("data:image/png,AAAA", "a data URI must be in base64"),
        ("data:image/png;base64,A", "the data URI is not valid base64; is it cut short?"),
        ("data:image/png;base64,AA*A", "the data URI is not valid base64"),
        ("data:image/png;base64,äöüß", "the data URI is not valid base64"),
        ("data:image/png;base64,", "the picture is empty"),
        ("data:image/png;base64,AAAA", "the picture is no picture that can be read"),
    ],
)
def test_another_text_than_a_picture_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_data_uri(text)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="limits must be at least 1, got 0 bytes and 5 pixels"):
        Limits(0, 5)


# The page


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page over a service without a model, which is its attribute `service`."""
    from app.ui import build_page

    service = FakeService()
    page = build_page(Tasks(service, feedback=Feedback(tmp_path_factory.mktemp("page") / "feedback.jsonl")))
    page.service = service
    return page


@pytest.fixture
def page(built: Any) -> Any:
    built.service.runs.clear()
    return built


def handler(page: Any, name: str, tab: str = "") -> Any:
    """What an event of the page calls, by its name in the code."""
    return next(fn.fn for fn in page.fns.values() if fn.name == name and tab in fn.fn.__module__)


def event(index: int) -> SimpleNamespace:
    return SimpleNamespace(index=index, liked=True)


CHAT = (None, "", Current(), "instruct", 1.0, "", 1.0, 1.0, 1.0, 20, 5, 1)  # picture ... current, model, decoding


def test_a_page_kept_open_over_a_restart_is_told_so(page: Any) -> None:
    """The server has an empty conversation then, and the page's buttons name turns of the old one."""
    (update,) = handler(page, "retry")(event(3), (), *CHAT)
    assert "started anew" in str(update.values())
    assert "started anew" in str(handler(page, "undo")(event(3), (), Current(), *CHAT[3:7]).values())
    assert "no answer to judge" in handler(page, "judged")(event(3), ())
    assert page.service.runs == []


def test_an_edited_message_is_what_was_written(page: Any) -> None:
    edited = SimpleNamespace(index=0, value=chat_text("two <b>words</b>"))
    *_, last = handler(page, "edit")(edited, (Turn("one"),), *CHAT)
    (talk,) = (value for value in last.values() if isinstance(value, tuple))
    assert [turn.user for turn in talk] == ["two <b>words</b>"]


def test_no_button_is_built_by_mistake(page: Any) -> None:
    """An update that is made while the page is built stands in it, as "Run"."""
    buttons = [block for block in page.blocks.values() if block.get_block_name() == "button"]
    assert len(buttons) > 20
    assert [button for button in buttons if button.value == "Run"] == []


def test_chat_text_is_no_html_and_fetches_nothing() -> None:
    """An entity in place of "<" would be shown as such in code, and copied."""
    text = "if a < b: `x<y` <b>bold</b> &lt; ![x](http://host/a.png) **bold**"
    shown = bubbles((Turn(text, (Answer(Side("a"), Job("chat"), text=text, state="done"),)),), 0)
    for message in shown:
        assert not re.search(r"<[^\u2060]|&[^\u2060]|!\[", message["content"])
        assert message["content"].replace(AS_WRITTEN, "") == text


def test_the_look_inside_pairs_the_first_answers_of_both_sides(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of one side and the last of the other are drawn with other seeds."""
    looked, inside = [], page.service.inside
    monkeypatch.setattr(page.service, "inside", lambda job, text: looked.append(text) or inside(job, text))
    first, second = Side("caption"), Side("other")
    answers = tuple(
        Answer(side, Job("caption"), text=f"{side.adapter} {number}", state="done")
        for side in (first, second)
        for number in range(3)
    )
    assert [len(group) for group in by_side(answers)] == [3, 3]
    handler(page, "opened", "controls")(Outcome(answers), Current())
    handler(page, "opened", "controls")(
        Outcome((Answer(Side(BASE), Job("caption"), state="done"), *answers[3:])), Current()
    )
    assert looked == ["caption 0", "other 0", "other 0"]


@pytest.mark.parametrize(
    ("ahead", "seconds", "expected"),
    [
        (0, 0.2, "Starting …"),
        (0, 20.4, "Waiting: about 20 s"),  # the next one, but every place is taken
        (1, 0.2, "Waiting: 1 request before yours, about 1 s"),
        (3, 7.0, "Waiting: 3 requests before yours, about 7 s"),
    ],
)
def test_who_waits_is_told_how_long(ahead: int, seconds: float, expected: str) -> None:
    assert status_text(Answer(Side("a"), Job("chat"), ahead=ahead, seconds=seconds)) == expected


def test_the_first_one_too_many_is_told_so_through_gradio(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service takes 40; with 40 places in Gradio's own queue the next one would wait there without a word."""
    from gradio_client import Client

    service, taken = page.service, []

    def run(jobs: list[Job]) -> FakeRun:
        if len(taken) == 40:
            raise Busy(4.0)
        taken.append(FakeRun(jobs, ["word"], 60.0))
        return taken[-1]

    monkeypatch.setattr(service, "run", run)
    with running(build_server(service, page, ServerSettings())) as url:
        client = Client(url, analytics_enabled=False, verbose=False, max_workers=64)
        try:
            waiting = [client.submit(f"{number}", [], None, api_name="/chat") for number in range(40)]
            end = time.monotonic() + 60
            while len(taken) < 40:
                assert time.monotonic() < end
                time.sleep(0.05)
            with pytest.raises(Exception, match="Too many people are waiting"):
                client.submit("one more", [], None, api_name="/chat").result(timeout=30)
            assert [job.exception() for job in waiting if job.done()] == []
        finally:
            for made in taken:
                made.cancel()
            client.close()
