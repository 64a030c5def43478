"""The server around the page and the API: who is let in, from where, how much, and what it gives away."""

from __future__ import annotations

import base64
import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_session
from scripted_service import ScriptedService
from waiting import comes_true

from app.safety import FILE_POLICY, Credentials, is_loopback
from app.server import ServerSettings, bind, build_server, running, url_of
from app.uploads import Limits

LIMITS = Limits(max_bytes=300_000)
SECRET = "the content of a file that is nobody's business"


def build(**settings: object):
    """The app over the real page, and its service."""
    from app.tasks import Tasks
    from app.ui import build_page

    service = ScriptedService()
    return build_server(service, build_page(Tasks(service)), ServerSettings(limits=LIMITS, **settings)), service


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ScriptedService]]:
    """A live server on this machine alone, without credentials: its URL and its service."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        made, service = build()
        with running(made) as url:
            yield url, service


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """A live server that asks for credentials."""
    with running(build(auth=("anna", "pass:wörd"))[0]) as url:
        yield url


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """One client for all, since making one takes a while."""
    with httpx.Client(timeout=20) as client:
        yield client


def body(**fields: object) -> dict:
    return {"model": "base", "messages": [{"role": "user", "content": "Why?"}], **fields}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def png() -> bytes:
    file = io.BytesIO()
    tiny_session.picture(0).save(file, "PNG")
    return file.getvalue()


# What is there


def test_the_page_and_the_api_are_at_one_address(app, http):
    url, _ = app
    page = http.get(url)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert http.get(f"{url}/config").json()["title"] == "mmadapter"
    assert http.get(f"{url}/v1/models").json()["data"][0]["id"] == "mmadapter"
    assert http.post(f"{url}/v1/chat/completions", json=body()).json()["choices"][0]["message"]["content"] == "WHY?"


def test_nothing_else_is_told(app, http):
    url, _ = app
    for path in ("docs", "redoc", "openapi.json", "monitoring", "gradio_api/runs", "monitoring/summary"):
        answer = http.get(f"{url}/{path}")
        assert answer.status_code in (403, 404), path
    assert "server" not in http.get(url).headers


def test_the_page_names_no_other_host(app, http):
    """Fonts, scripts and styles that a browser would fetch from elsewhere."""
    url, _ = app
    for path in ("", "theme.css"):
        text = http.get(f"{url}/{path}").text
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]+>", text)
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", text)


def test_every_answer_has_the_security_headers(app, http):
    url, _ = app
    answers = [http.get(url), http.get(f"{url}/v1/models"), http.get(f"{url}/nothing"), http.post(f"{url}/v1/nothing")]
    answers.append(http.get(url, headers={"Host": "evil.example"}))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy  # no other host
        assert "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


# From where


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:1234", "LOCALHOST", "[::1]:7860"])
def test_names_of_this_machine_are_answered(app, http, host):
    assert http.get(f"{app[0]}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:7860", "", "a@localhost", "[::1"])
def test_a_name_that_an_attacker_points_here_is_refused(app, http, host):
    """DNS rebinding: to the browser, the attacker's page and this server are then one site."""
    answer = http.get(f"{app[0]}/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert "start it with --allow-host NAME" in answer.json()["error"]["message"]
    assert http.get(app[0], headers={"Host": host}).text.endswith("--allow-host NAME\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},  # a form
    ],
)
def test_another_sites_page_can_send_nothing(app, http, headers):
    url, service = app
    before = len(service.jobs)
    for path in ("v1/chat/completions", "gradio_api/upload", "gradio_api/call/caption"):
        answer = http.post(f"{url}/{path}", json=body(), headers=headers)
        assert answer.status_code == 403
        assert "pages of another site" in answer.text
    assert len(service.jobs) == before
    preflight = http.options(f"{url}/v1/models", headers=headers | {"Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in preflight.headers


def test_the_pages_own_requests_and_links_to_it_are_let_through(app, http):
    url, _ = app
    assert http.post(f"{url}/v1/chat/completions", json=body(), headers={"Origin": url}).status_code == 200
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert http.get(f"{url}/?tab=ask", headers=followed).status_code == 200
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert http.get(f"{url}/config", headers=own).status_code == 200


def test_behind_a_proxy_its_names_are_given(http):
    with running(build(allow_hosts=("demo.example",))[0]) as url:
        for headers in (
            {"Host": "demo.example"},
            {"Host": "demo.example", "Origin": "https://demo.example"},
            {"Origin": "https://demo.example"},  # the proxy asks for 127.0.0.1
        ):
            assert http.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert http.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert http.get(f"{url}/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_beyond_loopback_any_name_may_be_the_servers():
    from starlette.datastructures import Headers

    from app.safety import SameSite

    guard = SameSite(None, "0.0.0.0")
    assert guard._reason(Headers({"host": "lab.example:7860"})) is None
    assert guard._reason(Headers({"host": "lab.example", "origin": "http://lab.example"})) is None
    assert "another site" in guard._reason(Headers({"host": "lab.example", "origin": "http://evil.example"}))


def test_loopback_addresses():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]", "LOCALHOST"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.evil.example"))


# Credentials


def test_without_credentials_no_path_is_answered(locked, http):
    for path in ("", "config", "v1/models", "theme.css", "gradio_api/info", "gradio_api/upload", "assets/x.js"):
        for method in ("GET", "POST"):
            answer = http.request(method, f"{locked}/{path}")
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Basic ")
    assert http.get(f"{locked}/v1/models").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        basic("anna", "wrong"),
        basic("bob", "pass:wörd"),
        basic("anna", ""),
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic ä".encode()},
        {"Authorization": "Bearer ä".encode()},
        {"Authorization": "Basic"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer anna"},
        {"Authorization": "Digest x"},
    ],
)
def test_wrong_credentials_are_refused(locked, http, headers):
    assert http.get(f"{locked}/v1/models", headers=headers).status_code == 401
    assert http.get(locked, headers=headers).status_code == 401


def test_the_user_with_the_password_is_let_in_and_so_is_the_password_as_a_key(locked, http):
    assert http.get(locked, headers=basic("anna", "pass:wörd")).status_code == 200
    assert http.get(f"{locked}/v1/models", headers=basic("anna", "pass:wörd")).status_code == 200
    key = {"Authorization": "Bearer pass:wörd".encode()}
    assert http.get(f"{locked}/v1/models", headers=key).status_code == 200


def test_a_password_may_end_in_bytes_that_are_blanks_of_another_encoding():
    lock = Credentials(None, "anna", "voilà")
    assert lock._known("Bearer voilà ".encode().decode("latin-1"))
    assert not lock._known(b"Bearer voil".decode("latin-1"))


# How much


def test_a_body_that_is_too_large_is_refused_before_it_is_read(app, http):
    url, service = app
    before = len(service.jobs)
    answer = http.post(f"{url}/v1/chat/completions", content=b"x" * 2_000_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert "more than 1 MB" in answer.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n")
        assert wire.recv(100).startswith(b"HTTP/1.1 413")  # nothing of it was sent
    assert len(service.jobs) == before


@pytest.mark.parametrize("path", ["v1/chat/completions", "gradio_api/queue/join", "gradio_api/call/caption"])
def test_a_body_without_a_length_is_counted(app, path):
    """Sent in chunks, it says nowhere how long it is."""
    url, service = app
    before = len(service.jobs)
    chunk = b"%x\r\n%s\r\n" % (100_000, b" " * 100_000)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as wire:
        wire.sendall(f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n".encode())
        wire.sendall(b"Content-Type: application/json\r\n\r\n")
        try:
            for _ in range(40):
                wire.sendall(chunk)
        except OSError:
            pass  # the server has hung up on us
        assert wire.recv(100).startswith(b"HTTP/1.1 413")
    assert len(service.jobs) == before


def test_an_upload_is_limited_a_file(app, http):
    url, _ = app
    files = [("files", (f"{number}.png", b"x" * 250_000)) for number in range(8)]  # more than another path takes
    answer = http.post(f"{url}/gradio_api/upload", files=files)
    assert answer.status_code == 200
    assert len(answer.json()) == 8
    assert http.post(f"{url}/gradio_api/upload", files=[("files", ("big.png", b"x" * 400_000))]).status_code == 413


# Files


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.png"
    path.write_text(SECRET)
    return path


def test_no_path_on_the_server_can_be_read(app, http, secret):
    url, _ = app
    here = Path.cwd()
    for path in (secret, "/etc/passwd", here / "pyproject.toml", "pyproject.toml", "../pyproject.toml", Path(__file__)):
        for prefix in ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "gradio_api/proxy="):
            answer = http.get(f"{url}/{prefix}{path}")
            assert answer.status_code in (400, 403, 404), (prefix, path)
            assert SECRET not in answer.text
            assert "root:" not in answer.text


def test_no_path_on_the_server_can_be_given_as_an_upload(app, http, secret):
    """An endpoint takes what looks like an uploaded file; the path in it is the client's word."""
    url, service = app
    before = len(service.jobs)
    for path in (str(secret), "/etc/passwd", f"{url}/config", "http://10.0.0.1/x.png"):
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call = http.post(f"{url}/gradio_api/call/caption", json={"data": [picture, "caption", 1, {}]})
        if call.status_code == 200:
            told = http.get(f"{url}/gradio_api/call/caption/{call.json()['event_id']}").text
            assert "event: error" in told, path
            assert SECRET not in told
        else:
            assert call.status_code in (400, 403, 422)
    assert len(service.jobs) == before


def test_a_picture_of_the_servers_own_is_no_upload(app, http, tmp_path):
    """It could be read, which a text cannot: the path itself is refused, wherever in a request it stands."""
    url, service = app
    before = len(service.jobs)
    picture = tmp_path / "private.png"
    picture.write_bytes(png())
    given = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    requests = {
        "caption": [[given, "caption", 1, {}], [given | {"is_stream": True}, "caption", 1, {}], [None, given, 1, {}]],
        "answer": [[None, "Which?", [given, given], "caption", 1, {}], [None, "Which?", None, "caption", 1, [given]]],
        "chat": [["Hi", [{"role": "user", "content": given}], None, "auto", 1, {}], ["Hi", given, None, "auto", 1, {}]],
    }
    for name, calls in requests.items():
        for data in calls:
            call = http.post(f"{url}/gradio_api/call/{name}", json={"data": data})
            told = http.get(f"{url}/gradio_api/call/{name}/{call.json()['event_id']}").text
            assert "event: error" in told, data
            assert str(picture.parent) not in told
            assert "gradio" not in told, "no copy of it is told"
    assert len(service.jobs) == before


def test_an_upload_among_the_choices_is_no_text(app, http):
    """An uploaded file is one that may be named, but a choice is a text, and no error tells where the file lies."""
    url, _ = app
    (path,) = http.post(f"{url}/gradio_api/upload", files={"files": ("x.png", png())}).json()
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in ([None, "Which?", [upload, "b"], "caption", 1, {}], [None, "Which?", upload, "caption", 1, {}]):
        call = http.post(f"{url}/gradio_api/call/answer", json={"data": data})
        told = http.get(f"{url}/gradio_api/call/answer/{call.json()['event_id']}").text
        assert "event: error" in told
        assert path not in told


def test_an_uploaded_file_runs_nothing(app, http):
    url, _ = app
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (path,) = http.post(f"{url}/gradio_api/upload", files=[("files", ("x.svg", script))]).json()
    answer = http.get(f"{url}/gradio_api/file={path}")
    assert answer.headers["content-security-policy"] == FILE_POLICY
    assert "sandbox" in FILE_POLICY


def test_a_picture_through_gradios_own_endpoint(app, http):
    url, service = app
    picture = {"files": ("x.png", png())}
    (path,) = http.post(f"{url}/gradio_api/upload", files=picture).json()
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "caption", 1, {}]}
    event = http.post(f"{url}/gradio_api/call/caption", json=data).json()["event_id"]
    assert '["PICTURE"]' in http.get(f"{url}/gradio_api/call/caption/{event}").text
    assert service.jobs[-1].image.size == (40, 30)


# Sockets


def test_a_port_in_use_is_told():
    first = bind("127.0.0.1", 0)
    try:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve at 127.0.0.1 port {port}: .*in use; choose another --port"):
            bind("127.0.0.1", port)
    finally:
        first.close()
    with pytest.raises(OSError, match=r"--host no\.such\.host\.invalid is no address of this machine"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(OSError, match=r"--host \.\. is no address of this machine"):
        bind("..", 0)


def test_what_to_open():
    for host, wanted in (("127.0.0.1", "127.0.0.1"), ("localhost", None), ("0.0.0.0", "127.0.0.1")):
        bound = bind(host, 0)
        try:
            url = url_of(bound)
            assert url.endswith(f":{bound.getsockname()[1]}")
            assert wanted is None or url.startswith(f"http://{wanted}:")
        finally:
            bound.close()


def test_a_closed_tab_ends_what_it_has_running(app, http):
    """A caption on its way yields nothing for a while; the tab's heartbeat is what tells that nobody waits for it."""
    url, service = app
    config = http.get(f"{url}/config").json()
    (go,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == "caption-go")
    (event,) = (one for one in config["dependencies"] if [go, "click"] in [[*target] for target in one["targets"]])
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    (path,) = http.post(f"{url}/gradio_api/upload", files={"files": ("x.png", png())}).json()
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, *(values[place] for place in event["inputs"][1:])]
    asked = {"data": data, "fn_index": event["id"], "session_hash": "closing", "trigger_id": go}
    before = len(service.runs)
    service.hold.clear()
    try:
        with http.stream("GET", f"{url}/gradio_api/heartbeat/closing") as heartbeat:
            lines = heartbeat.iter_lines()
            assert next(lines) == "data: ALIVE"
            assert http.post(f"{url}/gradio_api/queue/join", json=asked).status_code == 200
            assert comes_true(lambda: len(service.runs) > before, 30)
            assert not service.runs[before].cancelled.is_set()
        assert comes_true(service.runs[before].cancelled.is_set, 30)
    finally:
        service.hold.set()
