"""lib/server.py over real connections: python -m pytest tests/lib/test_server.py"""

import contextlib
import http.client
import json
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import CHATS

import lib.server
from lib.chat_template import render
from lib.cli import BadInput
from lib.decoding import SampleConfig
from lib.openai_api import Api
from lib.server import BODY_LIMIT, PAGE, Server, is_loopback
from lib.serving import Engine
from train_gpt2 import load_checkpoint


class Gate:
    """Forward passes wait until it is open."""

    def __init__(self, model):
        self.opened = threading.Event()
        self.opened.set()
        model.transformer.wte.register_forward_pre_hook(
            lambda module, args: self.opened.wait(600) and None)


@contextlib.contextmanager
def started(path, slots=4, waiting=100, api_key=None, host="127.0.0.1"):
    """A server in this process -> (port, engine, Gate, all replies)."""
    model, tokenizer, _ = load_checkpoint(path)
    gate = Gate(model)
    with Server(host, 0) as server:
        engine = Engine(model, tokenizer, slots, waiting)
        replies = []
        submit = engine.submit

        def recorded(request):
            replies.append(submit(request))
            return replies[-1]

        engine.submit = recorded
        defaults = SampleConfig(max_new_tokens=60, temperature=0.0)
        with server.serving(Api(engine, "toy", defaults, api_key)), engine:
            yield server.server_port, engine, gate, replies


@pytest.fixture(scope="module")
def server(chatty):
    with started(chatty[0]) as server:
        yield server


def connect(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=600)


def read_to_end(connection):
    """All bytes until the server closes the connection."""
    return b"".join(iter(lambda: connection.sock.recv(2**16), b""))


def ask(port, path="/v1/chat/completions", method="POST", body=None, headers=None):
    """-> (status, the body's JSON or text, headers)."""
    with contextlib.closing(connect(port)) as connection:
        body = json.dumps(body) if isinstance(body, (dict, list)) else body
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        answer = response.read().decode()
        if response.headers["Content-Type"] == "application/json":
            answer = json.loads(answer)
        return response.status, answer, response.headers


def chat(content="the cat", **fields):
    return {"model": "toy", "messages": [{"role": "user", "content": content}], **fields}


def until(condition):
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_more_clients_than_slots_all_get_their_own_answers(server):
    def one(i):
        content, want = CHATS[i % 3]
        status, answer, _ = ask(server[0], body=chat(content, stream=i % 2 == 0))
        if i % 2:
            (choice,) = answer["choices"]
            assert choice["finish_reason"] == "stop"
            return choice["message"]["content"] == want
        *events, done, end = [line.removeprefix("data: ") for line in answer.split("\n\n")]
        assert (done, end) == ("[DONE]", "")
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        return "".join(delta.get("content", "") for delta in deltas) == want

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(one, range(64)))


def test_a_connection_is_kept_and_the_page_is_served(server):
    with contextlib.closing(connect(server[0])) as connection:
        connection.connect()
        first = connection.sock
        for _ in range(2):
            connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
            assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] > 3
            connection.request("GET", "/")
            response = connection.getresponse()
            page = response.read().decode()
            assert connection.sock is first
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page  # nothing to download
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_page_keeps_its_conversation_after_a_refusal_and_drops_it_on_reset(
        chatty, tokenizer, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text(f"""{PAGE.read_text()}
<script>(async () => {{
  for (const text of ["the cat", "the dog", "x".repeat(500), "the bird"]) await send(text);
  send("the cat"), $("reset").click();
  $("input").value = "the dog", $("form").requestSubmit();  // at once
  while (under_way) await new Promise(wake => setTimeout(wake, 50));
  await send("the bird");
}})()</script>""")
    monkeypatch.setattr(lib.server, "PAGE", page)

    def conversation(*turns):
        said = [{"role": ("user", "assistant")[i % 2], "content": content}
                for i, content in enumerate([*turns, "the bird"])]
        return render(said, tokenizer, reply=True)[0]

    with started(chatty[0]) as (port, _, _, replies):
        browser = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path}", "--remote-debugging-port=0"
        ]
        with subprocess.Popen([*browser, f"http://127.0.0.1:{port}"],
                              stderr=subprocess.DEVNULL) as process:
            try:
                until(lambda: replies and replies[-1].request.ids == conversation(*CHATS[1]))
            finally:
                process.terminate()
    assert replies[2].request.ids == conversation(*CHATS[0], *CHATS[1])


@pytest.mark.parametrize(
    "fields, param, says",
    [(dict(n=2), "n", "n is not supported here, other than 1"), (dict(n="1"), "n", "not supported"),
     (dict(tools=[{}]), "tools", "not supported"),
     (dict(logprobs=True), "logprobs", "not supported"),
     (dict(frobnicate=1), "frobnicate", "Unrecognized request argument supplied: frobnicate"),
     (dict(temperature="hot"), "temperature", "must be a number"),
     (dict(temperature=True), "temperature", "must be a number"),
     (dict(temperature=2.1), "temperature", "between 0 and 2"), (dict(top_p=0), "top_p", "between"),
     (dict(temperature=float("nan")), "temperature", "between"),
     (dict(max_tokens=0), "max_tokens", "between 1"),
     (dict(max_completion_tokens=1.5), "max_completion_tokens", "an integer"),
     (dict(stop=3), "stop", "text or a list"), (dict(stop=[""]), "stop", "at most 16"),
     (dict(stop=["x"] * 17), "stop", "at most 16"), (dict(stream="yes"), "stream", "true or false"),
     (dict(seed="x"), "seed", "an integer"),
     (dict(stream_options={"include_usage": True}), "stream_options", "stream: true"),
     (dict(model=None), "model", "name a model: here it is toy"),
     (dict(model=3), "model", "must be text"), (dict(messages="hi"), "messages", "no messages"),
     (dict(messages=[]), "messages", "no messages"),
     (dict(messages=[3]), "messages", "without a role"),
     (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages",
      "only parts of type text"),
     *((dict(messages=[{"role": "user", "content": "x", **more}]), "messages", says)
       for more, says in (
           ({"audio": {"id": "a"}}, "audio is not supported within messages"),
           ({"tool_calls": [{}]}, "tool_calls is not"),
           ({"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            "cache_control is not"))),
     (dict(stream=True, stream_options={"frobnicate": 1}), "stream_options",
      "frobnicate is not supported within stream_options"),
     (dict(messages=[{"role": "assistant", "content": "x"}]), "messages", "out of order"),
     (dict(messages=[{"role": role, "content": "x"}
                     for role in ("user", "assistant")]), "messages", "the last one must be"),
     (dict(messages=[{"role": "user", "content": "the cat " * 100}]), "messages",
      "and the context of 128 has room for 127"), ])
def test_an_unsupported_request_is_a_400_with_the_reason(fields, param, says, server):
    status, answer, _ = ask(server[0], body={**chat(), **fields})
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), answer
    assert says in error["message"] and error["code"]


@pytest.mark.parametrize("fields", [
    dict(n=1, logprobs=False, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[],
         user="me", metadata={}, response_format={"type": "text"}),
    dict(temperature=None, top_p=None, stop=None, seed=None, max_tokens=None, stream=None, n=None),
    dict(temperature=0, seed=-1, top_p=0.5, stop=[]),
    dict(model="gpt-4"),
    dict(messages=[{
        "role": "developer", "content": "Be brief.", "name": "bob", "refusal": None,
        "tool_calls": []
    }, {
        "role": "user", "content": [{"type": "text", "text": "the "},
                                    {"type": "text", "text": "cat"}]
    }])
])
def test_default_values_of_unsupported_options_are_accepted(fields, server):
    status, answer, _ = ask(server[0], body={**chat(), **fields})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "sat on the mat."), answer


def test_limits_and_stops(server):
    _, answer, _ = ask(server[0], body=chat(max_tokens=2))
    assert (answer["choices"][0]["finish_reason"],
            answer["usage"]["completion_tokens"]) == ("length", 2)
    _, answer, _ = ask(server[0], body=chat(stop=" on"))
    assert (answer["choices"][0]["message"]["content"],
            answer["choices"][0]["finish_reason"]) == ("sat", "stop")
    endless = {
        "model": "toy", "prompt": ["the cat"], "temperature": 2, "max_tokens": 10**6, "seed": 4
    }
    _, answer, _ = ask(server[0], "/v1/completions", body=endless)
    assert answer["object"] == "text_completion" and answer["usage"]["total_tokens"] <= 128


@pytest.mark.parametrize(
    "request_, status, code",
    [(dict(path="/nowhere", method="GET"), 404, "unknown_url"),
     (dict(path="/v1/models/other", method="GET"), 404, "model_not_found"),
     (dict(method="GET"), 405, "method_not_supported"),
     (dict(path="/", method="DELETE"), 405, "method_not_supported"),
     (dict(method="OPTIONS"), 405, "method_not_supported"), (dict(body="{"), 400, "invalid_json"),
     (dict(body="[" * 100_000), 400, "invalid_json"), (dict(body=b"\xff"), 400, "invalid_json"),
     (dict(body=[1]), 400, "invalid_type"),
     (dict(body="x" * (BODY_LIMIT + 1)), 413, "request_too_large"),
     (dict(body=b"x", headers={"Content-Length": "9" * 30}), 413, "request_too_large"),
     (dict(body=b"", headers={"Content-Length": "-1"}), 411, "length_required"),
     (dict(body=chat(), headers={"Host": "evil.example"}), 403, "invalid_host"),
     (dict(body=chat(), headers={"Host": "["}), 403, "invalid_host"),
     (dict(body=chat(), headers={"Origin": "http://evil.example"}), 403, "invalid_origin"),
     (dict(body=chat(), headers={"Origin": "null"}), 403, "invalid_origin"),
     (dict(body=chat(), headers={"Origin": "http://["}), 400, "invalid_url")])
def test_bad_requests_have_their_status_and_code(request_, status, code, server):
    got, answer, headers = ask(server[0], **request_)
    assert (got, answer["error"]["code"]) == (status, code) and answer["error"]["message"]
    assert ("Allow" in headers) == (status == 405)
    assert ask(server[0], "/v1/models", "GET",
               headers={"Host": "localhost:99"})[1]["data"][0]["id"] == "toy"  # still answers


def test_bytes_that_are_not_http(server):
    for junk in (b"\x16\x03\x01\x02\x00\n\n", b"GET / HTTP/9.9\r\n\r\n",
                 b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc"):
        with contextlib.closing(connect(server[0])) as connection:
            connection.connect()
            connection.sock.sendall(junk)
            connection.sock.shutdown(1)
            connection.sock.recv(4096)
    assert ask(server[0], "/", "GET")[0] == 200


def test_an_address_that_is_not_one_is_a_400(server):
    with contextlib.closing(connect(server[0])) as connection:
        connection.connect()
        connection.sock.sendall(
            b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_url" in answer


GET = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("head, status", [
    (GET + "Content-Length: {n}", b"200"),
    (POST + "Content-Length: {n}\r\nTransfer-Encoding: chunked", b"411"),
    (POST + "Content-Length: 0\r\nContent-Length: {n}", b"411"),
    (POST + "Content-Length : {n}", b"400"),
    (POST + "Content-Length\t: {n}", b"400"),
    (POST + "X: a\r\n Content-Length: {n}", b"400"),
    (POST + "X: a\rContent-Length: {n}", b"400"),
    (POST + ": a\r\nContent-Length: {n}", b"400"),
    (POST + "Content-Length {n}", b"400"),
])
def test_no_request_hides_in_anothers_body(head, status, server):
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.closing(connect(server[0])) as connection:
        connection.connect()
        connection.sock.sendall(f"{head.format(n=len(hidden))}\r\n\r\n".encode() + hidden)
        answer = read_to_end(connection)
    assert answer.split()[1] == status
    assert answer.count(b"HTTP/1.1 ") == 1


def test_the_key_comes_before_the_body(chatty):
    with started(chatty[0], api_key="sesame") as (port, *_):
        for path, more, status in (
            ("/v1/completions", "", 401),
            ("/v1/completions", "Expect: 100-continue\r\n", 401),
            ("/nowhere", "", 404),
        ):
            with contextlib.closing(connect(port)) as connection:
                connection.connect()
                connection.sock.sendall(
                    f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n{more}"
                    "\r\n".encode()
                )  # and no body
                answer = read_to_end(connection)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            assert b"toy" not in answer
        # a client that sends a body before it reads also sees the answer
        status, answer, _ = ask(port, body="x" * BODY_LIMIT)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_a_body_is_requested_after_the_checks(server):
    with contextlib.closing(connect(server[0])) as connection:
        connection.connect()
        body = json.dumps(chat()).encode()
        connection.sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        assert connection.sock.recv(2**16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sock.sendall(body)
        answer = b"".join(iter(lambda: connection.sock.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 200 ") and b"sat on the mat." in answer


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST / HTTP/1.1\r\nContent-Length: 999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 999999\r\n\r\n",
    ],
    ids=["line", "head", "unread", "body"],
)
def test_a_request_has_a_deadline_however_its_bytes_come(head, chatty, monkeypatch):
    monkeypatch.setattr(lib.server, "ARRIVAL", 0.2)

    def still_open(connection):
        try:
            connection.sock.sendall(b"x")
            connection.sock.settimeout(0.02)
            return bool(connection.sock.recv(2**16))
        except TimeoutError:
            return True
        except ConnectionError:
            return False

    with started(chatty[0]) as (port, *_), contextlib.closing(connect(port)) as connection:
        connection.connect()
        connection.sock.sendall(head)
        until(lambda: not still_open(connection))


def test_slow_and_idle_clients_make_room(chatty, monkeypatch):
    monkeypatch.setattr(lib.server, "most_connections", lambda: 3)
    with started(chatty[0]) as (port, *_), contextlib.ExitStack() as slow:
        connections = [slow.enter_context(contextlib.closing(connect(port))) for _ in range(4)]
        for connection in connections:
            connection.connect()
            connection.sock.sendall(b"GET / HT")
        assert ask(port, body=chat())[0] == 200
        assert connections[0].sock.recv(1) == connections[1].sock.recv(
            1) == b""  # the longest waiting two


def test_a_bug_is_a_500(chatty, capfd):
    with started(chatty[0]) as (port, engine, *_):
        engine.submit = None
        status, answer, _ = ask(port, body=chat())
        assert (status, answer["error"]["code"]) == (500, "server_error")
    assert "a request failed: TypeError" in capfd.readouterr().err


def test_an_api_key(chatty):
    with started(chatty[0], api_key="sesame") as (port, *_):
        for given in (None, "Bearer sesam", "sesame", "Bearer s\xe9same"):
            status, answer, _ = ask(port, body=chat(),
                                    headers={"Authorization": given} if given else {})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(port, body=chat(), headers={"Authorization": "Bearer sesame"})[0] == 200
        assert ask(port, "/", "GET")[0] == 200  # the page asks for it


def test_behind_a_proxy_that_passes_the_host_on(chatty):
    with started(chatty[0], api_key="sesame", host="0.0.0.0") as (port, *_):
        for host, status in (("chat.example", 200), ("127.0.0.1", 403)):
            headers = {
                "Host": host, "Origin": "https://chat.example", "Authorization": "Bearer sesame"
            }
            assert ask(port, body=chat(), headers=headers)[0] == status


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(stream, chatty):
    with started(chatty[0], slots=1) as (port, engine, gate, replies):
        gate.opened.clear()
        with contextlib.closing(connect(port)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(chat(stream=stream)))
            until(lambda: replies and not engine.queue)
        until(lambda: replies[0].cancelled)
        gate.opened.set()
        assert ask(port, body=chat("the dog"))[1]["choices"][0]["message"]["content"] == CHATS[1][1]
        assert replies[0].count <= 1


def test_a_full_queue_is_a_429(chatty):
    with started(chatty[0], slots=1,
                 waiting=1) as (port, engine, gate, replies), ThreadPoolExecutor(2) as pool:
        gate.opened.clear()
        first = pool.submit(ask, port, body=chat())
        until(lambda: replies and not engine.queue)
        second = pool.submit(ask, port, body=chat("the dog"))
        until(lambda: engine.queue)
        status, answer, headers = ask(port, body=chat())
        assert (status, answer["error"]["code"],
                headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        gate.opened.set()
        assert [future.result()[0] for future in (first, second)] == [200, 200]


def test_a_connection_beyond_the_limit_is_a_503(chatty, monkeypatch):
    monkeypatch.setattr(lib.server, "most_connections", lambda: 1)
    with started(chatty[0]) as (port, engine, gate, replies), ThreadPoolExecutor(1) as pool:
        gate.opened.clear()
        first = pool.submit(ask, port, body=chat())
        until(lambda: replies)
        status, answer, headers = ask(port, "/v1/models", "GET")
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert headers["Retry-After"] == "1"
        assert answer["error"]["type"] == "server_error"
        # also for a client that is still sending: http.client sends a body after its head
        for _ in range(5):
            assert ask(port, body=chat("word " * 100_000))[0] == 503
        gate.opened.set()
        assert first.result()[0] == 200
        until(lambda: ask(port, "/v1/models", "GET")[0] == 200)


def test_stopping_the_server_ends_running_answers(chatty):
    with ThreadPoolExecutor(2) as pool, contextlib.closing(connect(1)) as idle:
        with started(chatty[0], slots=1) as (port, engine, gate, replies):
            idle.port = port
            idle.request("GET", "/v1/models")
            idle.getresponse().read()  # the connection stays open
            gate.opened.clear()
            stream = pool.submit(ask, port, body=chat(stream=True))
            until(lambda: replies and not engine.queue)
            whole = pool.submit(ask, port, body=chat())
            until(lambda: engine.queue)
            threading.Timer(0.05, gate.opened.set).start()
        status, answer, _ = whole.result()
        assert (status, answer["error"]["code"]) == (503, "server_stopping")
        events = stream.result()[1].strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"
        assert idle.sock.recv(1) == b""


def test_a_port_in_use_and_a_host_that_is_not_here_are_one_line(server):
    for host, port in (("127.0.0.1", server[0]), ("192.0.2.1", 0), ("no such host", 0)):
        with pytest.raises(BadInput,
                           match=f"cannot listen at {host}, port {port} .*: give another --port"):
            Server(host, port)


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "localhost", "::1")))
    assert not any(
        map(is_loopback,
            ("0.0.0.0", "::", "192.168.0.1", "localhost.example", "127.0.0.1.example", "")))
