"""One session for every use, on a tiny random model whose adapters have gates that are not zero."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_session
import torch
import weight_files
from PIL import Image
from tiny_session import Tiny

import mmadapter
from mmadapter import session as session_module
from mmadapter.checkpoint import read_about
from mmadapter.generate import Generated
from mmadapter.prompts import TEMPLATES
from mmadapter.session import Choice, Session

TOKENS = torch.tensor([[5, 17, 300, 42], [9, 9, 250, 12], [7, 1, 0, 99]])
BASE_CANNOT_SEE = "the base model alone cannot see; load an adapter with an image encoder"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def seeing(tiny: Tiny) -> Session:
    """A session of its own for each test, with the adapter that sees."""
    return tiny.load(tiny.sees)


@pytest.fixture
def encoded(seeing: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass over the encoder of `seeing` took."""
    passes: list[int] = []
    forward = seeing.encoder.forward

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        return forward(pixels)

    monkeypatch.setattr(seeing.encoder, "forward", counted)
    return passes


# Loading


def test_a_folder_without_a_tokenizer_gives_logits_and_nothing_else(tiny):
    bare = mmadapter.load(llama=str(tiny.bare))
    assert torch.equal(bare.logits(TOKENS), tiny.load().logits(TOKENS))
    message = f"{tiny.bare} has no tokenizer, so it takes token ids only"
    for use in (lambda: bare.chat("hi"), lambda: bare.answer(None, "Why?"), lambda: bare.caption("0.png", examples=[])):
        with pytest.raises(ValueError, match=message):
            use()


def test_an_adapter_works_on_a_base_without_a_tokenizer(tiny):
    """The vocabulary of the adapter's base is then not known to be another one."""
    bare = mmadapter.load(llama=str(tiny.bare), adapter=tiny.sees)
    pictures = [tiny.picture(number) for number in range(3)]
    assert torch.equal(bare.logits(TOKENS, pictures), tiny.load(tiny.sees).logits(TOKENS, pictures))


def test_a_meta_folder_without_a_tokenizer_gives_logits(tmp_path):
    session = mmadapter.load(llama=str(weight_files.write_meta(tmp_path / "meta", weight_files.CONFIG)))
    assert session.logits(TOKENS % 48).shape == (3, 4, 48)


def test_bfloat16_gives_nearly_the_logits_of_float32(tiny):
    pictures = [tiny.picture(number) for number in range(3)]
    exact = tiny.load(tiny.sees).logits(TOKENS, pictures)
    rounded = tiny.load(tiny.sees, dtype="bfloat16").logits(TOKENS, pictures)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16"}, ValueError, "dtype must be one of float32, bfloat16, int8, int4, got 'float16'"),
        ({"device": "abacus"}, ValueError, "device 'abacus' cannot be used: .*device"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' cannot be used: "),
        ({"adapter": "nowhere"}, FileNotFoundError, "no adapter 'nowhere'"),
        ({"llama": "nowhere"}, FileNotFoundError, "no LLaMA named 'nowhere'"),
        ({"llama": "nowhere", "adapter": "no"}, FileNotFoundError, "no adapter 'no'"),  # before a base is fetched
    ],
)
def test_what_cannot_be_loaded_is_said_on_one_line(tiny, options, error, message):
    with pytest.raises(error, match=message) as raised:
        mmadapter.load(**{"llama": str(tiny.llama), **options})
    assert "\n" not in str(raised.value)


def test_another_encoder_can_be_named(tiny, tmp_path):
    """`vision` goes before the encoder that the adapter names, and must give as many features."""
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tiny.sees.parent / "test_resnet.safetensors").read_bytes())
    session = tiny.load(tiny.sees, vision=f"timm:test_resnet@{moved}")
    assert session.encoder.config.encoder == f"timm:test_resnet@{moved}"
    assert session.caption(tiny.picture(0)) == tiny.load(tiny.sees).caption(tiny.picture(0))


def test_an_encoder_of_other_features_is_refused(tiny, monkeypatch):
    load_encoder = session_module.load_encoder
    monkeypatch.setattr(
        session_module,
        "load_encoder",
        lambda config, **options: load_encoder(config, random_weights=True, **options),
    )
    message = "was trained on 128 image features of timm:test_resnet@.*; timm:test_efficientnet gives "
    with pytest.raises(ValueError, match=message):
        tiny.load(tiny.sees, vision="timm:test_efficientnet")


# Logits


def test_rows_with_and_without_an_image_equal_single_rows(tiny, seeing):
    images = [tiny.picture(1), None, tiny.picture(2)]
    together = seeing.logits(TOKENS, images)
    assert together.shape == (3, 4, 330)
    assert together.dtype == torch.float32
    for row, image in enumerate(images):
        alone = seeing.logits(TOKENS[row : row + 1], image)
        torch.testing.assert_close(together[row : row + 1], alone)
        assert not torch.allclose(alone, seeing.logits(TOKENS[row : row + 1], tiny.picture(3)), atol=1e-3)
    torch.testing.assert_close(together[1:2], seeing.logits(TOKENS[1:2]))
    torch.testing.assert_close(seeing.logits(TOKENS, [None] * 3), seeing.logits(TOKENS))


@pytest.mark.parametrize(
    ("token_ids", "images", "message"),
    [
        ([[1, 2]], None, r"token_ids must be a LongTensor \[B, T\], got a list"),
        (TOKENS[0], None, r"token_ids must be a LongTensor \[B, T\], got torch.int64 of shape \(4,\)"),
        (TOKENS.float(), None, r"token_ids must be a LongTensor \[B, T\], got torch.float32 of shape \(3, 4\)"),
        (TOKENS + 31, None, "token ids must be from 0 to 329"),
        (TOKENS - 1, None, "token ids must be from 0 to 329"),
        (TOKENS, [None], r"3 rows of tokens need as many images \(None for none\), got 1"),
        (TOKENS, "0.png", r"3 rows of tokens need as many images \(None for none\), got 1"),
    ],
)
def test_logits_of_something_else_are_refused(seeing, token_ids, images, message):
    with pytest.raises(ValueError, match=message):
        seeing.logits(token_ids, images)


# Captions


def test_a_picture_may_come_in_any_form(tiny, seeing):
    path = tiny.picture(4)
    opened = Image.open(path)
    (caption,) = seeing.caption(path)
    assert caption
    for picture in (str(path), opened, np.asarray(opened), path.read_bytes(), [path], (path,)):
        assert seeing.caption(picture) == [caption]


def test_many_captions_equal_captions_one_by_one(tiny, seeing, encoded):
    pictures = [tiny.picture(number) for number in (0, 1, 2, 3, 1)]
    for settings in ({}, {"beams": 3, "length_penalty": 0.5}, {"temperature": 1.0, "seed": 3}):
        captions = seeing.caption(pictures, batch_size=2, **settings)
        assert captions == [seeing.caption(picture, **settings)[0] for picture in pictures]
        assert captions == seeing.caption(pictures, **settings)
        assert len(set(captions)) == 4  # the pictures matter
    assert sum(encoded) == 4
    assert seeing.caption([]) == []


def test_a_caption_is_asked_for_in_the_words_of_training(tiny, seeing, monkeypatch):
    asked = []
    monkeypatch.setattr(seeing, "generate", lambda rows, *_: asked.append(rows) or [])
    seeing.caption(tiny.picture(0))
    seeing.caption(tiny.picture(0), examples=["a dog", "a man"])
    texts = [[seeing.tokenizer.decode(row) for row in rows] for rows in asked]
    question = "Generate caption for this image:"
    assert texts == [[question], [f"{question} a dog\n{question} a man\n{question}"]]


def test_a_caption_is_one_line(tiny, seeing, monkeypatch):
    """The command prints a line for each picture, and the stop texts are a setting of the adapter."""
    monkeypatch.setattr(seeing, "generate", lambda *_: [Generated(" a dog\r\n\u2028on\tgrass \x1c", [], "length")])
    assert seeing.caption(tiny.picture(0)) == ["a dog on grass"]


def test_only_an_adapter_that_sees_captions(tiny):
    """The base model would answer without looking, and a reader would take it for a caption."""
    session = tiny.load()
    with pytest.raises(ValueError, match=BASE_CANNOT_SEE):
        session.caption(tiny.picture(0))
    with pytest.raises(ValueError, match=BASE_CANNOT_SEE):
        _ = session.encoder
    session.adapter(tiny.reads)
    message = f"adapter {tiny.reads} was trained without images; load one that sees"
    for examples in (None, []):
        with pytest.raises(ValueError, match=message):
            session.caption(tiny.picture(0), examples=examples)
    with pytest.raises(ValueError, match=message):
        session.answer(tiny.picture(0), "What is it?")


def test_with_examples_the_base_model_guesses_without_seeing(tiny):
    session = tiny.load()
    first, second = session.caption([tiny.picture(0), tiny.picture(1)], examples=["a dog"])
    assert first == second
    assert first != session.caption(tiny.picture(0), examples=[])[0]


def test_captions_of_what_is_no_picture(tiny, seeing, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png not found; give the path of an image file"):
        seeing.caption([tiny.picture(0), tmp_path / "none.png"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        seeing.caption(tiny.picture(0), batch_size=0)
    with pytest.raises(ValueError, match="unknown colour; there are beams, length_penalty, max_new_tokens, "):
        seeing.caption(tiny.picture(0), colour="red")


def test_a_bar_shows_only_where_it_is_wanted(tiny, seeing, capsys):
    seeing.caption(tiny.picture(0))
    assert capsys.readouterr() == ("", "")
    seeing.caption(tiny.picture(0), progress=True)
    out, err = capsys.readouterr()
    assert "1/1" in err
    assert out == ""


# Features


def test_ten_questions_about_one_picture_encode_it_once(tiny, seeing, encoded):
    picture = tiny.picture(0)
    answers = [seeing.answer(picture, f"What is number {number}?", max_new_tokens=3) for number in range(10)]
    assert encoded == [1]
    assert len(set(answers)) > 1
    seeing.caption([picture, tiny.picture(1), picture])
    assert encoded == [1, 1]
    seeing.adapter(tiny.reads)
    seeing.adapter(tiny.sees)
    assert seeing.answer(picture, "What is number 3?", max_new_tokens=3) == answers[3]


def test_features_of_the_last_pictures_are_kept(tiny, seeing, encoded, monkeypatch):
    monkeypatch.setattr(session_module, "KEPT_IMAGES", 2)
    first = seeing.features([tiny.picture(number) for number in (0, 1, 2)])  # more than are kept
    assert encoded == [3]
    assert torch.equal(seeing.features([tiny.picture(1)]), first[1:2])
    assert encoded == [3]
    seeing.features([tiny.picture(3)])  # 1 was used later than 2, so 2 goes
    seeing.features([tiny.picture(1)])
    assert encoded == [3, 1]
    torch.testing.assert_close(seeing.features([tiny.picture(2), tiny.picture(2)]), first[[2, 2]])
    assert encoded == [3, 1, 1]


def test_threads_may_share_the_features(tiny, seeing, monkeypatch):
    """Pictures of other threads push out one's own between looking for them and taking them."""
    monkeypatch.setattr(session_module, "KEPT_IMAGES", 1)
    pictures = [tiny_session.picture(number) for number in range(4)]
    expected = torch.cat([seeing.features([picture]) for picture in pictures])
    wrong = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(15):
            chosen = rng.sample(range(4), 2)
            try:
                given = seeing.features([pictures[number] for number in chosen])
                torch.testing.assert_close(given, expected[chosen])
            except Exception as error:  # noqa: BLE001 - a thread's error would be lost
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Adapters


def test_switching_adapters_leaves_the_base_as_it_was(tiny):
    session = tiny.load()
    tensors = session.llama.state_dict()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    base = session.logits(TOKENS)
    session.adapter(tiny.sees)
    pictured = session.logits(TOKENS, [tiny.picture(0)] * 3)
    session.caption(tiny.picture(0))
    session.adapter(str(tiny.reads))
    read = session.logits(TOKENS)
    assert (session.adapter_name, session.about.task) == (str(tiny.reads), "instruct")
    session.adapter(None)
    assert (session.adapter_name, session.about) == (None, None)
    assert torch.equal(session.logits(TOKENS), base)
    assert (read - base).abs().max() > 0.1
    assert (pictured - read).abs().max() > 0.1
    after = session.llama.state_dict()
    assert list(after) == list(tensors)
    for name, tensor in after.items():
        assert tensor.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(tensor, copies[name])
    session.adapter(tiny.reads)
    assert torch.equal(session.logits(TOKENS), read)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switching_to_a_tuned_adapter_and_away_gives_the_base_back(tiny, dtype):
    """Tuning reaches every layer of the base, and must not be written into it."""
    session, pictures = tiny.load(dtype=dtype), [tiny.picture(0), None, tiny.picture(1)]
    base, found = session.logits(TOKENS), {}
    for name in ("tuned", "sees", "tuned", "reads"):
        session.adapter(getattr(tiny, name))
        logits = session.logits(TOKENS, None if name == "reads" else pictures)
        assert torch.equal(logits, found.setdefault(name, logits))
    assert min((logits - base).abs().max() for logits in found.values()) > 0.1
    assert (found["tuned"] - found["sees"]).abs().max() > 0.1
    for name in ("tuned", None):
        session.adapter(None if name is None else tiny.tuned)
        session.strength = 0.0
        assert torch.equal(session.logits(TOKENS), base)
    session.strength = 1.0
    assert torch.equal(session.logits(TOKENS), base)


def test_a_tuned_adapter_captions_and_answers(tiny):
    session, pictures = tiny.load(tiny.tuned), [tiny.picture(number) for number in range(4)]
    for settings in ({}, {"beams": 3}):
        captions = session.caption(pictures, batch_size=3, **settings)
        assert captions == [session.caption(picture, **settings)[0] for picture in pictures]
        assert captions != tiny.load(tiny.sees).caption(pictures, **settings)
    assert session.answer(pictures[0], "Why?", ["a red dog", "a man"]).index in (0, 1)


def test_an_adapter_that_cannot_be_loaded_leaves_the_one_in_use(tiny, seeing, tmp_path):
    caption = seeing.caption(tiny.picture(0))
    tiny_session.write_adapter(
        tmp_path, tiny_session.llama_config(330), tiny.load().fingerprint, "caption", "plain", None
    )
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for name, error in (("nowhere", FileNotFoundError), (tmp_path, ValueError)):
        with pytest.raises(error):
            seeing.adapter(name)
        assert seeing.adapter_name == str(tiny.sees)
        assert seeing.caption(tiny.picture(0)) == caption


@pytest.mark.parametrize("name", ["sees", "tuned"])
def test_strength_scales_the_adapter(tiny, name):
    seeing = tiny.load(getattr(tiny, name))
    base = tiny.load().logits(TOKENS)
    whole = seeing.logits(TOKENS, [tiny.picture(0)] * 3)
    seeing.strength = 0.0
    assert torch.equal(seeing.logits(TOKENS, [tiny.picture(0)] * 3), base)
    seeing.strength = 0.5
    half = seeing.logits(TOKENS, [tiny.picture(0)] * 3)
    assert 0 < (half - base).norm() < (whole - base).norm()
    seeing.strength = 1.0
    assert torch.equal(seeing.logits(TOKENS, [tiny.picture(0)] * 3), whole)


def test_sessions_with_other_adapters_share_all_they_can(tiny, seeing, encoded, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("loaded twice")

    picture = tiny.picture(0)
    expected = [tiny.load(adapter).answer(picture, "Why?") for adapter in (tiny.sees, tiny.tuned)]
    expected += [tiny.load(adapter).answer(None, "Why?") for adapter in (tiny.reads, None)]
    monkeypatch.setattr(session_module, "load_encoder", fails)
    base = seeing.with_adapter(None)
    tuned, reads = base.with_adapter(tiny.tuned), base.with_adapter(str(tiny.reads))  # the encoder is still in use
    monkeypatch.setattr(session_module, "load_adapter", fails)
    again = seeing.with_adapter(tiny.sees)
    for session in (base, tuned, reads, again):
        assert session.llama is seeing.llama
        assert session.tokenizer is seeing.tokenizer
    names = [session.adapter_name for session in (seeing, again, tuned, reads, base)]
    assert names == [str(tiny.sees), str(tiny.sees), str(tiny.tuned), str(tiny.reads), None]
    assert [seeing.answer(picture, "Why?"), tuned.answer(picture, "Why?")] == expected[:2]
    assert [reads.answer(None, "Why?"), base.answer(None, "Why?")] == expected[2:]
    assert again.answer(picture, "Why?") == expected[0]
    assert len(set(expected)) == 4
    assert encoded == [1]  # whoever encodes a picture does it for all
    tuned.strength = 0.0
    assert seeing.strength == again.strength == 1.0


def test_a_sibling_that_cannot_be_loaded_changes_nothing(tiny, seeing):
    with pytest.raises(FileNotFoundError, match="no adapter 'nowhere'"):
        seeing.with_adapter("nowhere")
    assert seeing.adapter_name == str(tiny.sees)


@pytest.mark.parametrize("adapter", ["sees", "reads", None])
def test_what_is_prepared_is_what_is_asked(tiny, adapter, monkeypatch):
    """Who runs a task elsewhere, as the app does, words it no other way."""
    session, asked = tiny.load(getattr(tiny, adapter) if adapter else None), []

    def spied(rows: list, sampling: object, *_: object) -> list[Generated]:
        asked.append((rows[0], sampling))
        return [Generated("x", [], "stop")]

    monkeypatch.setattr(session, "generate", spied)
    settings = {"max_new_tokens": 7, "seed": 3, "beams": None}
    session.answer(None, "why  not ?", **settings)
    session.chat(TALK, **settings)
    expected = [session.prepare("answer", settings, question="why  not ?")]
    expected.append(session.prepare("chat", settings, messages=TALK))
    if adapter != "reads":
        monkeypatch.setattr(session, "prompts", lambda _: None)
        session.caption([tiny.picture(0)], examples=["a dog"], **settings)
        expected.append(session.prepare("caption", settings, examples=["a dog"]))
    assert asked == expected
    assert {sampling.max_new_tokens for _, sampling in asked} == {7}
    assert session.prepare("chat", messages="Why?").sampling.max_new_tokens == 256


def test_an_unknown_task_cannot_be_prepared(seeing):
    for use in (lambda: seeing.prepare("sing"), lambda: seeing.sampling("sing", {})):
        with pytest.raises(ValueError, match="unknown task 'sing'; there are caption, answer, chat"):
            use()


# Settings


def own_settings(tiny: Tiny, folder: Path, task: str, **generation: object) -> Session:
    """A session whose adapter has decoding settings of its own."""
    session = tiny.load()
    config = tiny_session.llama_config(330)
    tiny_session.write_adapter(folder, config, session.fingerprint, task, "plain", None, generation=generation)
    assert read_about(folder / "adapter.safetensors").generation == generation
    session.adapter(folder)
    return session


def test_settings_are_those_given_then_the_adapters_then_the_tasks(tiny, tmp_path):
    session = own_settings(tiny, tmp_path, "caption", beams=3, max_new_tokens=7, stop=["END"])
    own = session.sampling("caption", {})
    assert (own.beams, own.max_new_tokens, tuple(own.stop)) == (3, 7, ("END",))
    given = session.sampling("caption", {"max_new_tokens": 9, "beams": None})
    assert (given.beams, given.max_new_tokens) == (3, 9)
    assert session.sampling("caption", {"temperature": 0.7}).beams == 1  # who wants to sample wants no beams
    other = session.sampling("answer", {})  # of another task than the adapter's
    assert (other.beams, other.max_new_tokens, other.stop) == (1, 30, ("\n",))
    session.adapter(None)
    chat = session.sampling("chat", {})
    assert (chat.temperature, chat.top_p, chat.max_new_tokens, chat.repetition_penalty) == (0.1, 0.75, 256, 1.1)
    searched = session.sampling("chat", {"beams": 2})  # and who wants beams does not want the task's temperature
    assert (searched.beams, searched.temperature) == (2, 0.0)
    with pytest.raises(ValueError, match="beam search takes no temperature"):
        session.sampling("chat", {"beams": 2, "temperature": 0.5})


def test_chat_has_the_settings_of_an_instruction_adapter(tiny, tmp_path):
    session = own_settings(tiny, tmp_path, "instruct", max_new_tokens=5, repetition_penalty=1.2)
    chat = session.sampling("chat", {})
    assert (chat.max_new_tokens, chat.repetition_penalty, chat.top_p) == (5, 1.2, 0.75)


def test_unknown_settings_are_named(tiny, tmp_path):
    session = own_settings(tiny, tmp_path, "caption", beams=3, sparkle=1)
    with pytest.raises(ValueError, match="unknown sparkle; there are beams, "):
        session.sampling("caption", {})
    for use in (
        lambda: session.answer(None, "Why?", colour="red"),
        lambda: session.answer(None, "Why?", ["a", "b"], colour="red"),
        lambda: session.chat("hi", colour="red"),
        lambda: session.chat("hi", stream=True, colour="red"),
    ):
        with pytest.raises(ValueError, match="unknown colour; there are beams, "):
            use()


# Answers


def plain_log_likelihood(session: Session, tokens: list[int], ending: list[int], image: object) -> float:
    """Mean log-probability a token, one choice and one token at a time."""
    total = 0.0
    for place, token in enumerate(ending):
        logits = session.logits(torch.tensor([tokens + ending[:place]]), image)[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total / len(ending)


@pytest.mark.parametrize("adapter", ["sees", "reads", None])
def test_the_likeliest_choice_is_taken(tiny, adapter):
    session = tiny.load(getattr(tiny, adapter) if adapter else None)
    image = tiny.picture(2) if adapter == "sees" else None
    choices = ["a dog", "the response is a man", "grass", "END"]
    choice = session.answer(image, "  What is it? ", choices)
    question = "What is it?\nOptions: (A) a dog (B) the response is a man (C) grass (D) END"
    form = TEMPLATES["alpaca" if adapter == "reads" else "plain"]
    tokens = session.tokenizer.encode(form.without_input.format(instruction=question))
    end = [session.tokenizer.eos_id] if adapter else []  # an adapter has learnt to stop
    endings = [session.tokenizer.encode(" " + text, bos=False) + end for text in choices]
    assert len({len(ending) for ending in endings}) > 1
    means = torch.tensor([plain_log_likelihood(session, tokens, ending, image) for ending in endings])
    assert isinstance(choice, Choice)
    torch.testing.assert_close(torch.tensor(choice.probabilities), means.softmax(0), atol=1e-5, rtol=1e-4)
    assert sum(choice.probabilities) == pytest.approx(1)
    assert choice.index == int(means.argmax())
    assert choice.text == choices[choice.index]


def test_an_answer_without_choices_is_one_line_of_text(tiny, seeing):
    answer = seeing.answer(tiny.picture(0), "What is it?")
    assert isinstance(answer, str)
    assert answer == answer.strip() != ""
    assert answer != seeing.answer(tiny.picture(1), "What is it?")
    assert answer != seeing.answer(None, "What is it?")
    assert answer.startswith(seeing.answer(tiny.picture(0), "What is it?", max_new_tokens=4))


@pytest.mark.parametrize(
    ("question", "choices", "message"),
    [
        (" \n", None, "the question is empty"),
        ("Why?", [], "choices must be two or more, got 0"),
        ("Why?", ["because"], "choices must be two or more, got 1"),
        ("Why?", "because", "choices must be a list of texts that are not empty, got 'because'"),
        ("Why?", ["because", " "], r"choices must be a list of texts that are not empty, got \['because', ' '\]"),
        ("Why? " * 200, None, r"the text has \d+ tokens and the model's context holds 400, .*; shorten it"),
        ("Why? ", ["yes", "no " * 200], r"question and ending have \d+ tokens and .* holds 400; shorten them"),
    ],
)
def test_questions_that_cannot_be_answered(tiny, seeing, question, choices, message):
    with pytest.raises(ValueError, match=message):
        seeing.answer(tiny.picture(0), question, choices)


def test_the_base_model_answers_only_without_an_image(tiny):
    session = tiny.load()
    assert isinstance(session.answer(None, "Why?"), str)
    with pytest.raises(ValueError, match=BASE_CANNOT_SEE):
        session.answer(tiny.picture(0), "Why?")
    with pytest.raises(ValueError, match=BASE_CANNOT_SEE):
        session.chat("Why?", tiny.picture(0))
    with pytest.raises(ValueError, match=BASE_CANNOT_SEE):
        session.logits(TOKENS, [None, None, tiny.picture(0)])


# Chat

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> {x}"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def prompt_of(session: Session, messages: object) -> str:
    return session.tokenizer.decode(session.chat_tokens(messages), skip_special=False)


def test_the_base_model_is_asked_in_its_own_chat_template(tiny):
    session = tiny.load()
    assert prompt_of(session, "Why?") == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(session, TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|> {x}<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    ends = session.chat_tokens(TALK).count(session.tokenizer.eos_id)
    assert ends == 4  # what a user typed is no special token


@pytest.mark.parametrize("adapter", [None, "reads"])
def test_without_a_chat_template_and_with_an_adapter_it_is_alpacas(tiny, adapter):
    session = tiny.load(tiny.reads) if adapter else mmadapter.load(llama=str(tiny.plain))
    alone = prompt_of(session, "Why?")
    assert alone.startswith("Below is an instruction that describes a task. Write")
    assert alone.endswith("\n\n### Instruction:\nWhy?\n\n### Response:")
    talk = prompt_of(session, TALK)
    assert talk.startswith("Below is an instruction that describes a task, paired with an input")
    earlier = "system: Be brief.\nuser: Hi <|im_end|> {x}\nassistant: Hello"
    assert talk.endswith(f"\n\n### Instruction:\nWhy?\n\n### Input:\n{earlier}\n\n### Response:")
    assert session.tokenizer.eos_id not in session.chat_tokens(TALK)


def test_an_adapter_that_sees_is_asked_in_its_own_template(seeing):
    assert prompt_of(seeing, "Why?") == "Why?:"


@pytest.mark.parametrize("adapter", ["sees", "reads", None])
def test_a_stream_joined_is_the_answer(tiny, adapter):
    session = tiny.load(getattr(tiny, adapter) if adapter else None)
    image = tiny.picture(0) if adapter == "sees" else None
    several = 0
    for seed in range(5):
        settings = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 1.0, "seed": seed}
        answer = session.chat("Why?", image, **settings)
        pieces = session.chat("Why?", image, stream=True, **settings)
        assert isinstance(pieces, Iterator)
        pieces = list(pieces)
        assert "".join(pieces) == answer == answer.strip()
        several += len(pieces) > 1
    assert several


def test_a_stream_has_no_white_space_at_its_end():
    rng = random.Random(0)
    for _ in range(500):
        pieces = ["".join(rng.choices(" \nab", k=rng.randrange(1, 4))) for _ in range(rng.randrange(6))]
        stripped = list(session_module._stripped(iter(pieces)))
        assert "".join(stripped) == "".join(pieces).rstrip()
        assert all(stripped)


def test_chat_sees_the_picture_and_the_conversation(tiny, seeing):
    def ask(messages: object, number: int) -> str:
        return seeing.chat(messages, tiny.picture(number), temperature=0, max_new_tokens=20)

    assert ask("Why?", 0) == ask([{"role": "user", "content": "Why?"}], 0)
    assert len({ask("Why?", 0), ask("Why?", 1), ask(TALK, 0)}) == 3


def test_chat_can_be_cancelled(tiny):
    session, cancelled = tiny.load(), threading.Event()
    cancelled.set()
    assert session.chat("Why?", cancelled=cancelled) == ""
    assert list(session.chat("Why?", stream=True, cancelled=cancelled)) == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a conversation must end with a message of the user that is not empty"),
        ("  ", "a conversation must end with a message of the user that is not empty"),
        (TALK[:-1], "a conversation must end with a message of the user that is not empty"),
        (["Why?"], """a message must be {"role": TEXT, "content": TEXT}, got 'Why\\?'"""),
        ([{"role": "user"}], """a message must be {"role": TEXT, "content": TEXT}, got {'role': 'user'}"""),
        ([{"role": "user", "content": None}], "a message must be .*'content': None"),
        ([{"content": "Hi"}, TALK[-1]], "a message must be .*got {'content': 'Hi'}"),
    ],
)
@pytest.mark.parametrize("adapter", [None, "reads"])
def test_conversations_that_cannot_go_on(tiny, adapter, messages, message):
    session = tiny.load(getattr(tiny, adapter) if adapter else None)
    with pytest.raises(ValueError, match=message):
        session.chat(messages)


def test_errors_of_a_stream_come_before_its_first_piece(tiny):
    session = tiny.load()
    with pytest.raises(ValueError, match="beam search decides on the whole text and cannot stream"):
        session.chat("Why?", stream=True, beams=2)
    with pytest.raises(ValueError, match="the model's context holds 400"):
        session.chat("Why? " * 200, stream=True)
