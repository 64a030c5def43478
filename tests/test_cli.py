"""The commands as a user types them, on the tiny model, whose adapter that sees is called "caption"."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_session

from mmadapter import checkpoint
from mmadapter.cli import build_parser, main
from mmadapter.weights import store

COMMANDS = ("caption", "answer", "chat", "weights", "info")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_session.Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def offline(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and working folder; "caption" and "qa" are the tiny adapter that sees."""
    shipped = tmp_path / "shipped"
    for name in ("caption", "qa"):
        shutil.copytree(tiny.sees, shipped / name)
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(store, "PIP_RETRIES", 0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def run(tiny, capsys):
    """Runs a command line on the tiny base: (exit status, standard output, standard error)."""

    def run_command(*words: object) -> tuple[int, str, str]:
        words = [str(word) for word in words]
        if words[:1] != ["weights"] and "--llama" not in words:
            words += ["--llama", str(tiny.llama), "--dtype", "float32"]
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return run_command


def of_the_program(stderr: str) -> list[str]:
    """Standard error without the progress bar."""
    return [line for line in stderr.splitlines() if line.strip() and "image/s" not in line]


# Commands


def test_caption_prints_path_and_caption(tiny, run):
    status, out, err = run("caption", tiny.pictures, "--max-new-tokens", 8)
    assert status == 0
    assert of_the_program(err) == []
    session = tiny.load(tiny.sees)
    paths = [str(tiny.picture(number)) for number in range(5)]
    captions = session.caption(paths, max_new_tokens=8)
    assert out == "".join(f"{path}\t{caption}\n" for path, caption in zip(paths, captions, strict=True))


def test_caption_takes_decoding_settings_and_strength(tiny, run):
    def caption(*words: object) -> str:
        return run("caption", tiny.picture(0), *words)[1].split("\t")[1].strip()

    session = tiny.load(tiny.sees)
    plain = caption()
    assert plain == session.caption(tiny.picture(0))[0]
    settings = {
        ("--beams", 3, "--length-penalty", 0.2): {"beams": 3, "length_penalty": 0.2},
        ("--temperature", 1.5, "--seed", 4): {"temperature": 1.5, "seed": 4},
        ("--temperature", 1.5, "--top-k", 2): {"temperature": 1.5, "top_k": 2},
        ("--temperature", 1.5, "--top-p", 0.3): {"temperature": 1.5, "top_p": 0.3},
        ("--repetition-penalty", 3): {"repetition_penalty": 3},
    }
    seen = {plain}
    for words, fields in settings.items():
        given = caption(*words)
        assert given == session.caption(tiny.picture(0), **fields)[0]
        seen.add(given)
    session.strength = 0.3
    assert caption("--strength", 0.3) == session.caption(tiny.picture(0))[0]
    assert len(seen | {caption("--strength", 0.3)}) == 7
    assert caption("--adapter", tiny.sees) == caption("--adapter", "caption") == plain


def test_caption_writes_and_resumes_a_file(tiny, run):
    out = Path("captions.jsonl")
    bad = Path("bad.png")
    bad.write_bytes(b"no picture")
    words = ("caption", tiny.picture(0), bad, tiny.picture(1), "--out", out, "--batch-size", 1)
    status, printed, err = run(*words)
    assert status == 1
    assert of_the_program(err) == ["error: bad.png: is not an image that can be read"]
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["image"] for row in rows] == [str(tiny.picture(0)), "bad.png", str(tiny.picture(1))]
    assert printed.splitlines() == [f"{row['image']}\t{row['caption']}" for row in rows if "caption" in row]
    shutil.copy(tiny.picture(2), bad)
    status, printed, err = run(*words)
    assert status == 0
    assert printed.startswith("bad.png\t")
    assert of_the_program(err) == ["2 of 3 captions are already in captions.jsonl"]


def test_answer_prints_the_answer(tiny, run):
    status, out, err = run("answer", "--image", tiny.picture(1), "--question", "What is it?")
    assert (status, err) == (0, "")
    assert out == tiny.load(tiny.sees).answer(tiny.picture(1), "What is it?") + "\n"


def test_answer_prints_the_choices_and_the_likeliest(tiny, run):
    choices = ["a dog", "a man", "grass"]
    status, out, _ = run("answer", "--image", tiny.picture(1), "--question", "What is it?", "--choices", *choices)
    expected = tiny.load(tiny.sees).answer(tiny.picture(1), "What is it?", choices)
    assert status == 0
    assert out.splitlines() == [
        *(f"{probability:6.1%}  {choice}" for choice, probability in zip(choices, expected.probabilities, strict=True)),
        expected.text,
    ]


def test_chat_prints_one_turn(tiny, run):
    session = tiny.load()
    status, out, err = run("chat", "--prompt", "Why?", "--max-new-tokens", 20)
    assert (status, err) == (0, "")
    assert out == session.chat("Why?", max_new_tokens=20) + "\n"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    _, out, _ = run("chat", "--prompt", "Why?", "--max-new-tokens", 20, "--system", "Be brief.", "--seed", 3)
    assert out == session.chat(system, max_new_tokens=20, seed=3) + "\n"
    _, out, _ = run("chat", "--prompt", "Why?", "--max-new-tokens", 20, "--beams", 2)
    assert out == session.chat("Why?", max_new_tokens=20, beams=2) + "\n"
    _, out, _ = run("chat", "--prompt", "Why?", "--max-new-tokens", 20, "--adapter", tiny.reads)
    session.adapter(tiny.reads)
    assert out == session.chat("Why?", max_new_tokens=20) + "\n"


def test_chat_about_a_picture_takes_the_adapter_that_sees(tiny, run):
    session = tiny.load(tiny.sees)
    _, out, _ = run("chat", "--prompt", "Why?", "--max-new-tokens", 20, "--image", tiny.picture(2))
    assert out == session.chat("Why?", tiny.picture(2), max_new_tokens=20) + "\n"
    assert out != session.chat("Why?", max_new_tokens=20) + "\n"


def test_chat_reads_turns_until_they_end(tiny, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\n  \nAnd then?\n"))
    status, out, err = run("chat", "--max-new-tokens", 8, "--temperature", 0)
    session = tiny.load()
    talk: list[dict] = []
    for question in ("Why?", "And then?"):
        talk.append({"role": "user", "content": question})
        answer = session.chat(talk, max_new_tokens=8, temperature=0)
        talk.append({"role": "assistant", "content": answer})
    assert (status, err) == (0, "Type a message; Ctrl-C stops an answer, Ctrl-D ends.\n")
    assert out == "".join(turn["content"] + "\n" for turn in talk if turn["role"] == "assistant")


def interrupt_after_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ctrl-C were pressed behind the first piece of each answer."""

    def chat(*_: object, **settings: object):
        yield "Because"
        raise KeyboardInterrupt

    monkeypatch.setattr("mmadapter.session.Session.chat", chat)


def test_control_c_stops_an_answer_and_not_the_chat(run, monkeypatch):
    interrupt_after_one_piece(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nWhy?\n"))
    status, out, _ = run("chat")
    assert (status, out) == (0, "Because\nBecause\n")
    status, out, err = run("chat", "--prompt", "Why?")
    assert (status, out, err) == (130, "Because", "error: interrupted\n")


def test_weights_list_says_what_there_is(run, tmp_path):
    status, out, err = run("weights", "list")
    assert (status, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [
        "smollm2-135m", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"
    ]  # fmt: skip
    assert rows[0][2:] == ["98 MB", "Apache-2.0", "not fetched"]
    file = tmp_path / "cache" / "store" / "efficientnet-lite0" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    with file.open("wb") as fetched:
        fetched.truncate(store.items()["efficientnet-lite0"].size)
    status, out, _ = run("weights", "list", "efficientnet-lite0")
    assert (status, out.strip().split("\t")[4]) == (0, str(file))
    assert run("weights", "fetch", "efficientnet-lite0") == (0, f"efficientnet-lite0\t{file}\n", "")


def test_info_needs_no_weights(run, monkeypatch):
    monkeypatch.setattr("mmadapter.info.read_config", None)
    status, out, err = run("info", "--llama", "llama-7b")
    assert (status, err) == (0, "")
    assert "1,229,760" in out
    assert "30 layers, K = 10 prompts, gate tanh" in out
    status, out, _ = run("info", "--llama", "llama-7b", "--layers", 10, "--prompt-length", 5, "--gate", "scalar")
    assert status == 0
    assert f"{10 * 5 * 4096 + 10:,}" in out


def test_info_describes_base_and_adapter(tiny, run):
    for adapter, words in (("none", "as it would be"), ("caption", "image projection")):
        status, out, _ = run("info", "--adapter", adapter)
        assert status == 0
        assert words in out
        assert "memory, float32 (estimates)" in out


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("caption none.png", "error: none.png: no such file, and no file matches it as a pattern"),
        ("caption {picture} --adapter nowhere", "error: no adapter 'nowhere': neither a path nor one of caption"),
        ("caption {picture} --adapter none", "error: the base model alone cannot see; load an adapter with an image"),
        ("caption {picture} --llama nowhere", "error: no LLaMA named 'nowhere': it is no file or folder, and the"),
        ("caption {picture} --device abacus", "error: device 'abacus' cannot be used: "),
        ("caption {picture} --vision abacus", "error: unknown image encoder 'abacus'"),
        ("caption {picture} --out no/where.jsonl", "error: the folder of no/where.jsonl does not exist; make it first"),
        ("caption {picture} --out {picture}", "error: {picture}, line 1, is not a caption; choose another --out file"),
        ("caption {picture} --top-p 1.5", "error: top_p must be in (0, 1], got 1.5"),
        ("caption {picture} --beams 2 --temperature 1", "error: beam search takes no temperature; set beams to 1 or"),
        ("answer --image none.png --question Why?", "error: none.png not found; give the path of an image file"),
        ("answer --image {picture} --question ''", "error: the question is empty"),
        ("answer --image {picture} --question Why? --choices a", "error: choices must be two or more, got 1"),
        ("chat --prompt ' '", "error: a conversation must end with a message of the user that is not empty"),
        ("chat --prompt hi --llama {bare}", "error: {bare} has no tokenizer, so it takes token ids only"),
        ("weights list abacus", "error: no weights 'abacus' in the store; there are smollm2-135m, "),
        ("weights fetch abacus", "error: the store has no 'abacus'; it has smollm2-135m, "),
        ("info --llama llama-7b --layers 40", "error: llama-7b has 32 layers, so 40 cannot be adapted; set --layers"),
        ("info --adapter {bare}", "error: {bare} holds no adapter: no adapter.safetensors and no peft"),
    ],
)
def test_an_error_is_one_line_and_exit_1(tiny, run, words, message):
    places = {"picture": tiny.picture(0), "bare": tiny.bare}
    status, out, err = run(*shlex.split(words.format(**places)))
    assert (status, out) == (1, "")
    assert of_the_program(err) == [err.splitlines()[0]]
    assert err.startswith(message.format(**places))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: COMMAND; see python -m mmadapter --help"),
        ("paint", "argument COMMAND: invalid choice: 'paint'"),
        ("caption", "the following arguments are required: PATH; see python -m mmadapter caption --help"),
        ("caption a.png --batch-size 0", "argument --batch-size: must be a whole number from 1, got '0'"),
        ("caption a.png --beams two", "argument --beams: must be a whole number from 1, got 'two'"),
        ("caption a.png --temperature hot", "argument --temperature: must be a number, got 'hot'"),
        ("caption a.png --strength nan", "argument --strength: must be a number, got 'nan'"),
        ("caption a.png --dtype int2", "argument --dtype: invalid choice: 'int2'"),
        ("caption a.png --sparkle", "unrecognized arguments: --sparkle"),
        ("answer --question Why?", "the following arguments are required: --image"),
        ("weights burn", "argument action: invalid choice: 'burn'"),
    ],
)
def test_misuse_is_one_line_and_exit_2(capsys, words, message):
    with pytest.raises(SystemExit) as leaving:
        main(shlex.split(words))
    out, err = capsys.readouterr()
    assert (leaving.value.code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_what_nobody_foresaw_is_one_line_too(run, monkeypatch):
    def fail(*_: object, **settings: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("mmadapter.session.Session.chat", fail)
    message = "error: ZeroDivisionError: by zero (run again with --debug to see where)\n"
    assert run("chat", "--prompt", "Why?") == (1, "", message)
    with pytest.raises(ZeroDivisionError):
        run("chat", "--prompt", "Why?", "--debug")


def test_debug_shows_the_traceback(run):
    with pytest.raises(FileNotFoundError, match="not found"):
        run("answer", "--image", "none.png", "--question", "Why?", "--debug")
    with pytest.raises(ValueError, match="no weights 'abacus'"):
        run("weights", "list", "abacus", "--debug")


# Help


def help_of(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_opens_with_an_example_that_parses(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    description = help_of(capsys, command)
    heading, example = description.splitlines()[:2]
    assert heading == "Example:"
    assert example.startswith(f"  python -m mmadapter {command} ")
    assert build_parser().parse_args(shlex.split(example)[3:]).run


def test_help_of_the_program_opens_with_examples_that_parse(capsys):
    text = description = help_of(capsys)
    assert description.startswith("Examples:\n")
    examples = [line for line in description.splitlines() if line.startswith("  python -m mmadapter ")]
    for example in examples:
        assert build_parser().parse_args(shlex.split(example)[3:]).run
    assert len(examples) == 4
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_pictures_of_the_examples_are_there():
    root = Path(tiny_session.__file__).resolve().parents[1]
    named = [word for word in shlex.split(build_parser().description) if word.startswith("assets/")]
    assert named
    assert all((root / word).exists() for word in named)


def test_help_comes_without_waiting_for_torch():
    code = "import sys; from mmadapter.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    root = Path(tiny_session.__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    ran = subprocess.run([sys.executable, "-m", "mmadapter", "paint"], cwd=root, check=False, capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (2, b"", 1)
