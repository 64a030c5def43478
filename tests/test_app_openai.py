"""The OpenAI-compatible API, as OpenAI's own client sees it, over a live server."""

from __future__ import annotations

import base64
import inspect
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import openai
import pytest
import tiny_session
from fastapi import FastAPI
from PIL import Image
from scripted_service import ScriptedService
from waiting import comes_true

from app import remote_image
from app.job import Failure
from app.log import Log
from app.openai_api import ApiOptions, build_router
from app.openai_request import NOT_THERE, PASSED_OVER, ChatRequest
from app.server import running
from app.service import Service
from app.uploads import Limits

LIMITS = Limits(max_bytes=100_000, max_pixels=10_000)


def serve(service, **options: bool):
    app = FastAPI()
    app.include_router(build_router(service, LIMITS, ApiOptions(**options)))
    return running(app)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    made = ScriptedService()
    yield made
    made.close()


@pytest.fixture
def url(service) -> Iterator[str]:
    with serve(service) as address:
        yield address


@pytest.fixture
def client(url, shared_client) -> openai.OpenAI:
    return shared_client.with_options(base_url=f"{url}/v1")


@pytest.fixture(scope="module")
def shared_client() -> openai.OpenAI:
    """Making one takes half a second."""
    return client_of("http://127.0.0.1:9")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_session.Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_uri(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def user(text: str, *images: str) -> dict:
    parts = [{"type": "text", "text": text}] if text else []
    return {"role": "user", "content": [*parts, *({"type": "image_url", "image_url": {"url": url}} for url in images)]}


def ask(client: openai.OpenAI, *messages: dict | str, model: str = "mmadapter", **fields: object):
    turns = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
    return client.chat.completions.create(model=model, messages=turns, **fields)


# Models


def test_models_are_listed_the_default_one_first(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["mmadapter", "caption", "instruct", "base"]
    assert [model.modalities for model in models] == [["text", "image"], ["text", "image"], ["text"], ["text"]]
    assert client.models.retrieve("instruct").id == "instruct"
    assert client.models.retrieve("base").title == "The base model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'; there are mmadapter, caption, instruct, base"):
        client.models.retrieve("gpt-4")


def test_an_unknown_model_is_told_with_those_there_are(client, service):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "Why?", model="none")  # the service's own name of the base is no model's name
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "there are mmadapter, caption, instruct, base" in caught.value.message
    assert service.jobs == []


# What becomes of a request


def test_a_whole_answer(client, service):
    answer = ask(client, "tell me more")
    assert answer.object == "chat.completion"
    assert answer.model == "mmadapter"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "TELL ME MORE"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert abs(answer.created - time.time()) < 60
    assert answer.id != ask(client, "tell me more").id
    assert service.runs[0].cancelled.is_set()  # left behind tidily


def test_text_and_images_go_to_the_adapters_that_suit_them(client, service):
    picture = data_uri(tiny_session.picture(0))
    for messages in (["Why?"], [user("Why?", picture)], [user("", picture)], [user("Why?", picture), "And?"]):
        ask(client, *messages)
    ask(client, user("Why?", picture), {"role": "assistant", "content": "So."}, "And?")
    ask(client, "Why?", model="base")
    ask(client, "Why?", model="caption")
    assert [(job.task, job.adapter, job.image is not None) for job in service.jobs] == [
        ("chat", "instruct", False),
        ("answer", "caption", True),
        ("caption", "caption", True),
        ("chat", "caption", True),
        ("chat", "caption", True),
        ("chat", "none", False),
        ("chat", "caption", False),
    ]
    assert service.jobs[1].question == "Why?"
    assert [turn["content"] for turn in service.jobs[4].messages] == ["Why?", "So.", "And?"]


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Describe the image in detail.", "caption"),
        ("What's in this picture?", "caption"),
        ("what do you see in the photo?", "caption"),
        ("What is on the table?", "answer"),
        ("How many dogs are there in this picture?", "answer"),
        ("What colour is it? I cannot tell in this photo", "answer"),
    ],
)
def test_the_default_model_describes_where_it_is_asked_to(client, service, text, task):
    """In a sentence, where an adapter for questions would give a word."""
    picture = data_uri(tiny_session.picture(0))
    ask(client, user(text, picture))
    ask(client, user(text, picture), model="caption")
    assert [job.task for job in service.jobs] == [task, "answer"]


def test_the_last_image_counts(client, service):
    first, second = (tiny_session.picture(number) for number in (0, 1))
    ask(client, user("Why?", data_uri(first)), {"role": "assistant", "content": "So."}, user("And?", data_uri(second)))
    assert service.jobs[0].image.tobytes() == second.convert("RGB").tobytes()
    with pytest.raises(openai.BadRequestError, match="a message can have one image"):
        ask(client, user("Why?", data_uri(first), data_uri(second)))
    with pytest.raises(openai.BadRequestError, match="only the user's"):
        ask(client, {**user("Why?", data_uri(first)), "role": "assistant"}, "And?")


def test_system_messages_and_the_answers_that_came_before(client, service):
    earlier = ask(client, "one").choices[0].message
    ask(client, {"role": "system", "content": "Be brief."}, "one", earlier, "two")
    ask(client, {"role": "developer", "content": "Be brief."}, user("two"), {"role": "assistant", "content": None}, "x")
    assert [dict(turn) for turn in service.jobs[1].messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
    ]
    assert [turn["role"] for turn in service.jobs[2].messages] == ["system", "user", "assistant", "user"]


def test_settings_reach_the_job(client, service):
    ask(client, "a b c")
    assert service.jobs[0].settings == {}  # the adapter's own
    assert service.jobs[0].strength == 1.0
    answer = ask(
        client,
        "a b c",
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        stop="x",
        seed=3,
        n=2,
        user="me",
        extra_body={"strength": 0.5, "top_k": 4, "repetition_penalty": 1.1},
    )
    settings = {"max_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ("x",), "top_k": 4}
    settings |= {"repetition_penalty": 1.1}
    assert [job.settings for job in service.jobs[1:]] == [settings | {"seed": 3}, settings | {"seed": 4}]
    assert service.jobs[1].strength == 0.5
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 4)
    ask(client, "a", stop=["x", "y"], max_tokens=9, max_completion_tokens=5)
    assert service.jobs[-1].settings == {"stop": ("x", "y"), "max_new_tokens": 5}
    assert len(service.runs) == 3  # the two answers were asked for together


def test_every_argument_of_the_client_is_known():
    """A field that the client can send and this code has not heard of would be refused as a typing error."""
    of_the_client = set(inspect.signature(openai.resources.chat.Completions.create).parameters)
    of_the_client -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert of_the_client - {*ChatRequest.model_fields, *NOT_THERE, *PASSED_OVER} == set()


# Streams


def test_a_stream_gives_the_whole_answer_in_pieces(client):
    chunks = list(ask(client, "tell me more", stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "TELL", " ME", " MORE", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(ask(client, "tell me more", stream=True))
    assert all(chunk.usage is None for chunk in without)
    assert without[-1].choices[0].finish_reason == "stop"


def test_a_stream_does_not_search_by_beams(client, service):
    """It would come in one piece at the end."""
    picture = data_uri(tiny_session.picture(0))
    for fields in ({"stream": True}, {}):
        list(ask(client, user("", picture), **fields))
    assert [job.settings.get("beams") for job in service.jobs] == [1, None]


def test_a_stream_of_several_answers(client):
    texts = ["", ""]
    for chunk in ask(client, "a b", stream=True, n=2):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["A B", "A B"]


def test_the_stream_on_the_wire(url):
    body = {"model": "base", "messages": [{"role": "user", "content": "é"}], "stream": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    lines = [line for line in answer.text.split("\n\n") if line]
    assert ": 2 ahead, about 3 s" in lines
    assert lines[-1] == "data: [DONE]"
    assert "É" in answer.text
    assert all(line.startswith((":", "data: {", "data: [DONE]")) for line in lines)


def test_pieces_come_while_the_rest_is_being_written(client, service):
    """A buffered stream would give everything at the end."""
    service.hold.clear()
    stream = ask(client, "one two", stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "ONE"]
    service.hold.set()
    assert [chunk.choices[0].delta.content for chunk in stream] == [" TWO", None]


# Leaving


def test_closing_a_stream_cancels_the_run(client, service):
    service.hold.clear()
    stream = ask(client, "one two", stream=True)
    next(stream)
    assert comes_true(lambda: service.runs, 10)
    assert not service.runs[0].cancelled.is_set()
    stream.close()
    assert service.runs[0].cancelled.wait(10)


def test_giving_up_on_a_whole_answer_cancels_the_run(client, service):
    service.hold.clear()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), "one two")
    assert service.runs[0].cancelled.wait(10)


def test_others_are_served_meanwhile(client, service):
    """A run is waited for in a thread of its own, not in the event loop."""
    service.hold.clear()
    with ask(client, "one two", stream=True) as stream:
        next(stream)
        assert len(client.models.list().data) == 4
    service.hold.set()


# Errors


def test_a_full_queue_says_when_to_try_again(client, service):
    service.busy = 12.3
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, "Why?")
    assert caught.value.response.headers["retry-after"] == "12"
    assert caught.value.code == "queue_full"
    with pytest.raises(openai.RateLimitError):
        ask(client, "Why?", stream=True)


def test_a_failure_is_told_by_its_code_alone(client, service):
    service.breaks = Failure("c0ffee")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "one two")
    assert caught.value.code == "c0ffee"
    assert caught.value.type == "server_error"
    assert "Traceback" not in caught.value.response.text
    with pytest.raises(openai.APIError, match="c0ffee"):
        list(ask(client, "one two", stream=True))


def test_what_nobody_foresaw_is_told_by_a_code_too(client, service):
    """Such as a mistake of ours: a bare 500 of text would tell the client nothing, and the log no code."""
    service.breaks = KeyError("oops")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "one two")
    assert caught.value.code == "f0e1d2"
    assert caught.value.type == "server_error"
    assert "oops" not in caught.value.response.text
    with pytest.raises(openai.APIError, match="f0e1d2"):
        list(ask(client, "one two", stream=True))
    assert [type(error) for error in service.failures] == [KeyError, KeyError]


def test_an_answer_that_was_stopped_is_not_told_as_whole(client, service):
    """As when the app ends; "stop" would say that the model had nothing to add."""
    service.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, client, "one two")
        assert comes_true(lambda: service.runs, 10)
        service.runs[0].cancel()
        with pytest.raises(openai.InternalServerError, match="stopped before its end") as caught:
            whole.result(10)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (503, "cancelled", "server_error")
    stream = ask(client, "one two", stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "ONE"]
    service.runs[1].cancel()
    with pytest.raises(openai.APIError, match="stopped before its end"):
        list(stream)


@pytest.mark.parametrize(
    ("fields", "message", "parameter"),
    [
        ({"messages": []}, "at least 1 item", "messages"),
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
        ({"temperature": "0.5"}, "valid number", "temperature"),
        ({"top_p": 0}, "greater than 0", "top_p"),
        ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": 2.5}, "valid integer", "max_tokens"),
        ({"n": 9}, "less than or equal to 8", "n"),
        ({"n": 0}, "greater than or equal to 1", "n"),
        ({"stop": ["a"] * 5}, "at most 4 items", "stop"),
        ({"stop": [""]}, "at least 1 character", "stop.0"),
        ({"stream": "yes"}, "valid boolean", "stream"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'", None),
        ({"messages": [{"role": "user"}]}, "Field required", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'text', 'image_url'", None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a message of the user", None),
        ({"tools": [{"type": "function"}]}, "tools is not supported here; leave it out", "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
        ({"logprobs": True}, "logprobs is not supported", "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
        ({"max_token": 5}, "unknown field max_token; there are model, messages", "max_token"),
        ({"model": None}, "valid string", "model"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(url, service, fields, message, parameter):
    body = {"model": "mmadapter", "messages": [{"role": "user", "content": "Why?"}], **fields}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert parameter is None or error["param"] == parameter
    assert service.jobs == []


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = {"tools": [], "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert ask(client, "Why?", stop=[], stream=False, **nothing).choices[0].message.content == "WHY?"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_request(url, body):
    answer = httpx.post(f"{url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_there_is_told_in_the_same_shape(url):
    for method, path in (("POST", "embeddings"), ("GET", "chat/completions"), ("DELETE", "models/caption")):
        answer = httpx.request(method, f"{url}/v1/{path}")
        assert answer.status_code == 404
        assert f"there is no {method} /v1/{path}" in answer.json()["error"]["message"]


def test_pictures_that_cannot_be_read(client, service):
    for address in ("data:image/png;base64,AAAA", "file:///etc/passwd", "/etc/passwd", "data:,", ""):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user("Why?", address))
        assert caught.value.code == "invalid_image"
        assert caught.value.param == "messages.0.content"
        assert "root:" not in caught.value.message
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user("Why?", data_uri(Image.new("L", (200, 200)))))
    assert caught.value.status_code == 413
    assert caught.value.code == "image_too_large"
    for model in ("instruct", "base"):
        with pytest.raises(openai.BadRequestError, match=f"model {model} takes no images; these do: caption"):
            ask(client, user("Why?", data_uri(tiny_session.picture(0))), model=model)
    assert service.jobs == []


# Pictures from elsewhere


class Pictures(BaseHTTPRequestHandler):
    """Serves a picture, redirects to it, and what should not be taken."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        body = {"/big": b"x" * 200_000, "/text": b"no picture"}.get(self.path, png(tiny_session.picture(3)))
        status = {"/moved": 302, "/loop": 302, "/inside": 302, "/missing": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            inside = "http://10.0.0.1/picture"
            self.send_header("Location", {"/moved": "/picture", "/inside": inside}.get(self.path, "/loop"))
        self.end_headers()
        if status == 200:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_are_not_fetched_unless_allowed(client, service, elsewhere):
    for address in (f"http://localhost:{elsewhere.server_port}/picture", "HTTPS://example.com/x.png"):
        with pytest.raises(openai.BadRequestError, match="not fetched here; send the picture as a data URI"):
            ask(client, user("Why?", address))
    assert elsewhere.asked == []
    assert service.jobs == []


def test_where_they_are_allowed_this_machine_and_its_network_stay_closed(service, shared_client, elsewhere):
    with serve(service, allow_image_urls=True) as url:
        client = shared_client.with_options(base_url=f"{url}/v1")
        for host in (
            "127.0.0.1",
            "localhost",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
            "[::1]",
            "169.254.169.254",
            "2130706433",
        ):
            with pytest.raises(openai.BadRequestError, match=r"not a public address|is not known"):
                ask(client, user("Why?", f"http://{host}:{elsewhere.server_port}/picture"))
    assert elsewhere.asked == []


def test_where_they_are_allowed_they_are_fetched(service, shared_client, elsewhere, monkeypatch):
    monkeypatch.setattr(remote_image, "is_public", lambda address: address in ("127.0.0.1", "::1"))
    base = f"http://localhost:{elsewhere.server_port}"
    with serve(service, allow_image_urls=True) as url:
        client = shared_client.with_options(base_url=f"{url}/v1")
        ask(client, user("Why?", f"{base}/picture"))
        ask(client, user("Why?", f"{base}/moved"))
        assert [job.image.tobytes() for job in service.jobs] == [tiny_session.picture(3).tobytes()] * 2
        assert elsewhere.asked[0] == ("/picture", f"localhost:{elsewhere.server_port}")
        with pytest.raises(openai.APIStatusError, match=r"the image has more than 0\.1 MB") as caught:
            ask(client, user("Why?", f"{base}/big"))
        assert caught.value.status_code == 413
        for path, message in (
            ("missing", "status 404"),
            ("loop", "more than 3 redirects"),
            ("inside", "10.0.0.1 is not a public address"),
            ("text", "is no picture that can be read"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                ask(client, user("Why?", f"{base}/{path}"))


def test_public_addresses():
    for address in ("8.8.8.8", "2606:4700::1111"):
        assert remote_image.is_public(address)
    for address in (
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::",
    ):  # fmt: skip
        assert not remote_image.is_public(address), address


# Over the real service and a tiny model


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server over the tiny base, an adapter called "sees" and one called "reads"."""
    service = Service(
        tiny.load(),
        [tiny.sees, tiny.reads],
        max_batch=4,
        max_waiting=8,
        log=Log(tmp_path_factory.mktemp("log") / "log.jsonl"),
    )
    with serve(service) as url:
        yield url
    service.close()


@pytest.fixture
def tiny_client(real, shared_client) -> openai.OpenAI:
    return shared_client.with_options(base_url=f"{real}/v1")


def test_the_models_are_the_adapters(tiny_client):
    assert [model.id for model in tiny_client.models.list()] == ["mmadapter", "sees", "reads", "base"]


def test_answers_are_those_of_the_library(tiny, tiny_client):
    session = tiny.load(tiny.sees)
    picture = tiny_session.picture(1)

    def content(*messages: dict | str, **fields: object) -> str:
        return ask(tiny_client, *messages, **fields).choices[0].message.content

    assert content(user("", data_uri(picture))) == session.caption(picture)[0]
    question = user("What is it?", data_uri(picture))
    assert content(question) == content(question, model="sees") == session.answer(picture, "What is it?")
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}]
    talk.append({"role": "user", "content": "Why?"})
    assert content(question, *talk[1:], max_tokens=12) == session.chat(talk, picture, max_new_tokens=12)
    session.strength = 0.3
    weaker = content(question, extra_body={"strength": 0.3})
    assert weaker == session.answer(picture, "What is it?")
    session.adapter(None)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert content(*system, model="base", max_tokens=12) == session.chat(system, max_new_tokens=12)
    session.adapter(tiny.reads)
    session.strength = 1.0
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 5}
    assert content("Why?", max_tokens=12, **settings) == session.chat("Why?", max_new_tokens=12, **settings)


def test_a_stream_joined_is_the_whole_answer(tiny_client):
    fields = {"model": "base", "max_tokens": 20, "temperature": 1.2, "seed": 1}
    whole = ask(tiny_client, "Why?", **fields)
    chunks = list(ask(tiny_client, "Why?", stream=True, stream_options={"include_usage": True}, **fields))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 5  # it came in pieces
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_counts_and_the_reason_to_finish(tiny, tiny_client):
    session = tiny.load()
    answer = ask(tiny_client, "Why?", model="base", max_tokens=6, temperature=0)
    assert answer.usage.prompt_tokens == len(session.chat_tokens("Why?"))
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "length"
    text = session.chat("Why?", max_new_tokens=20, temperature=0)
    assert len(text) > 8
    stopped = ask(tiny_client, "Why?", model="base", max_tokens=20, temperature=0, stop=["no such text", text[4:6]])
    assert stopped.choices[0].message.content == text[: text.index(text[4:6])].strip()
    assert stopped.choices[0].finish_reason == "stop"


def test_several_answers_and_several_people_at_once(tiny_client):
    def texts(**fields: object) -> list[str]:
        answer = ask(tiny_client, "Why?", max_tokens=10, temperature=1.5, **fields)
        return [choice.message.content for choice in answer.choices]

    alone = [texts(seed=seed)[0] for seed in (5, 6, 7)]
    assert texts(seed=5, n=3) == alone
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda seed: texts(seed=seed)[0], (5, 6, 7))) == alone


def test_a_conversation_too_long_for_the_context(tiny_client):
    with pytest.raises(openai.BadRequestError, match="the model's context holds 400"):
        ask(tiny_client, "why " * 1000)
    assert ask(tiny_client, "Why?", max_tokens=2).usage.completion_tokens == 2  # it still answers
