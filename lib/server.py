"""An engine (lib/serving.py) behind HTTP: OpenAI's chat completions, completions and models, and a
page to chat in a browser.

The wire format is that of https://platform.openai.com/docs/api-reference, as far as it concerns
text; what a request asks for and this server cannot do is refused, not left out. Errors are
{"error": {"message", "type", "param", "code"}}.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lib.chat_template import check_messages, render
from lib.cli import BadInput
from lib.decoding import NonFinite, SampleConfig
from lib.serving import Busy, Closed, Engine, Request

BODY_LIMIT = 2**20   # bytes of a request's body
UNREAD_LIMIT = 2**26  # bytes of a body that is too long, read so that the client sees the answer
PATIENCE = 0.25      # seconds between looks whether the client is still there
EVERY = 0.02  # seconds between the pieces of a stream: else Python would spend more on 64 streams than the model does
SILENCE = 60         # seconds until a connection that says nothing, or takes nothing, is closed
ARRIVAL = 30         # seconds from the first byte of a request to its last
FAREWELL = 3.0       # seconds that answers have for their last words when the server ends
DRAIN = 0.1          # seconds in which a connection too many may still send what is not read
# a header line, or the empty one that ends the head (RFC 9112, section 5)
HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r?\n|\r?\n")
PAGE = Path(__file__).with_name("chat_page.html")
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
               "frame-ancestors 'none'")

# fields of a request; all others are unknown, and refused as OpenAI does
USED = {"model", "max_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "seed"}
OWN = {"chat": USED | {"messages", "max_completion_tokens"}, "text": USED | {"prompt"}}
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "tool_choice"
}
ONLY = {  # accepted with these values, which ask for nothing
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,),
    "suffix": ("",), "logit_bias": ({},), "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],)
}


METHODS = {"/": "GET", "/v1/models": "GET", "/v1/models/{model}": "GET",
           "/v1/chat/completions": "POST", "/v1/completions": "POST"}


class ApiError(Exception):
    """An answer that is an error: its HTTP status, what is wrong, the field it concerns and
    OpenAI's code for it."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)

    def body(self):
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


def as_api_error(error):
    """What an engine's error is to a client."""
    if isinstance(error, Busy):
        return ApiError(429, "as many requests are waiting as may: try again in a moment",
                        code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, Closed):
        return ApiError(503, "the server is stopping", code="server_stopping")
    told = str(error) if isinstance(error,
                                    NonFinite) else f"the model failed ({type(error).__name__})"
    return ApiError(500, told, code="model_error")


def most_connections():
    """As many as there are file descriptors for, with some left for all else: without one,
    accepting would fail again and again."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 256
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if limit == resource.RLIM_INFINITY else max(min(1024, limit - 64), 1)


def split_url(url):
    """urllib's parts of a URL. Raises ApiError where there is none."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ApiError(400, f"{url[:80]} is not a URL ({error})", code="invalid_url") from error


def is_loopback(host):
    """Whether only this machine reaches what listens at `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# ----------------------------------------------------------------------------------------------------------------------
# Requests


def value_of(body, name, default, kinds, low=None, high=None):
    """A field of a request; `default` where it is missing or null. Raises ApiError on another type
    or beyond the bounds."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        wanted = {
            int: "an integer", (int, float): "a number", bool: "true or false", str: "text",
            dict: "an object"
        }[kinds]
        raise ApiError(400, f"{name} must be {wanted}", name, "invalid_type")
    if low is not None and not low <= value <= high:  # NaN fails, too
        raise ApiError(400, f"{name} must be between {low} and {high}", name, "invalid_value")
    return value


def stop_of(body):
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(string, str) for string in stop):
        raise ApiError(400, "stop must be text or a list of text", "stop", "invalid_type")
    if len(stop) > 16 or any(not 0 < len(string) <= 1000 for string in stop):
        raise ApiError(400, "stop must be at most 16 strings of 1 to 1,000 characters", "stop",
                       "invalid_value")
    return tuple(stop)


def check_keys(part, known, param):
    """Raises ApiError if an object within a request asks for what is not known;
    what is null, false or empty asks for nothing."""
    for name, value in part.items():
        if value and name not in known:
            raise ApiError(400, f"{name[:60]} is not supported within {param}", param,
                           "unsupported_value")


def messages_of(body):
    """The conversation of a request, with contents as text. OpenAI's developer messages are system
    messages."""
    messages = body.get("messages")
    plain = []
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            check_keys(message, {"role", "content", "name"},
                       "messages")  # the template has no place for names
            content, role = message.get("content"), message.get("role")
            if isinstance(content, list):
                texts = [
                    part.get("text")
                    for part in content
                    if isinstance(part, dict) and part.get("type") == "text"
                ]
                if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
                    raise ApiError(400, "only parts of type text are supported in a content",
                                   "messages", "unsupported_value")
                for part in content:
                    check_keys(part, {"type", "text"}, "messages")
                content = "".join(texts)
            message = {"role": "system" if role == "developer" else role, "content": content}
        plain.append(message)
    try:
        check_messages(plain)
    except BadInput as error:
        raise ApiError(400, f"messages: {error}", "messages", "invalid_value") from error
    if plain[-1]["role"] != "user":
        raise ApiError(400, "messages: the last one must be the user's", "messages",
                       "invalid_value")
    return plain


def prompt_of(body):
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be text, or a list of one text", "prompt", "invalid_type")
    return prompt


@dataclass
class Api:
    """What the server answers with. name: the model's. defaults: where a request says nothing.
    api_key: None: none needed."""
    engine: Engine
    name: str
    defaults: SampleConfig
    api_key: str | None = None

    def __post_init__(self):
        self.created = int(time.time())

    def model(self):
        own = {"context_length": self.engine.window,
               "temperature": self.defaults.temperature}  # not OpenAI's: for our page
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "local", **own
        }

    def read(self, body, kind):
        """A request's body, "chat" or "text" -> Request, and whether a stream ends with its usage.
        Raises ApiError.

        Any model's name is taken for the only one that is served: many clients insist on theirs.
        """
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_type")
        for name in body:
            if name not in OWN[kind] | HARMLESS | ONLY.keys():
                raise ApiError(400, f"Unrecognized request argument supplied: {name[:60]}",
                               name[:60], "unknown_parameter")
            value, only = body[name], ONLY.get(name, ())
            if only and value is not None and not any(value == one and type(value) is type(one)
                                                      for one in only):
                raise ApiError(400, f"{name} is not supported here, other than {only[0]!r}", name,
                               "unsupported_value")
        model = value_of(body, "model", None, str)
        if model is None:
            raise ApiError(400, f"name a model: here it is {self.name}", "model",
                           "missing_required_parameter")
        stream = value_of(body, "stream", False, bool)
        options = value_of(body, "stream_options", {}, dict)
        if options and not stream:
            raise ApiError(400, "stream_options is for stream: true", "stream_options",
                           "invalid_value")
        check_keys(options, {"include_usage"}, "stream_options")
        usage = value_of(options, "include_usage", False, bool)

        tokenizer, window = self.engine.tokenizer, self.engine.window
        if kind == "chat":
            ids, _ = render(messages_of(body), tokenizer, reply=True)
            limit = self.defaults.max_new_tokens
        else:
            ids, limit = tokenizer.encode(prompt_of(body)).tolist() or [tokenizer.eot
                                                                        ], 16  # OpenAI's default
        if len(ids) >= window:
            raise ApiError(400, f"the prompt has {len(ids):,} tokens, and the context of {window:,} has room for {window - 1:,}"
                           ": shorten it", "messages" if kind == "chat" else "prompt", "context_length_exceeded")
        for name in ("max_tokens", "max_completion_tokens"):
            limit = value_of(body, name, limit, int, 1, 2**31)
        seed = value_of(body, "seed", None, int, -2**63, 2**63 - 1)
        return Request(
            ids, limit,
            float(value_of(body, "temperature", self.defaults.temperature, (int, float), 0, 2)),
            float(value_of(body, "top_p", self.defaults.top_p, (int, float), 1e-6, 1)),
            stop_of(body) or self.defaults.stop or (), None if seed is None else seed % 2**63,
            stream), usage

    def check_model(self, name):
        if name != self.name:
            raise ApiError(404, f"The model {name[:80]!r} does not exist: here it is {self.name}",
                           "model", "model_not_found")

    def submit(self, request):
        try:
            return self.engine.submit(request)
        except (Busy, Closed) as error:
            raise as_api_error(error) from error


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


class Server(ThreadingHTTPServer):
    """Listens from its making on; answers while `with serving(api)` lasts. Raises BadInput where
    the address cannot be had.

    Close the engine first: what was being answered then has FAREWELL seconds to tell its client so.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 1024

    def __init__(self, host, port):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.most, self.open, self.changed, self.api = most_connections(), set(
        ), threading.Condition(), None
        self.waiting = {}  # open connections whose request is incomplete, the longest waiting first
        self.loopback = is_loopback(host)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise BadInput(f"cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}): "
                           "give another --port, or --host") from error

    def server_bind(self):
        socketserver.TCPServer.server_bind(
            self)  # without the look-up of the host's full name, which may take long
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self):
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextlib.contextmanager
    def serving(self, api):
        self.api = api
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1},
                                  daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            with self.changed:
                for connection in self.open:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RD)  # ends the wait for a next request
                self.changed.wait_for(lambda: not self.open, FAREWELL)

    def process_request(self, request, client_address):
        with self.changed:
            if len(self.open) >= self.most:
                self.close_longest_waiting()
            full = len(self.open) >= self.most
            if not full:
                self.open.add(request)
                self.waiting[request] = True
        if full:
            message = f"{self.most:,} requests are being answered: try again in a moment"
            error = ApiError(503, message, code="too_many_connections")
            body = json.dumps(error.body())
            with contextlib.suppress(OSError):
                request.send("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                             f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                request.shutdown(socket.SHUT_WR)
                # a connection closed with its request unread is reset, and the answer lost; no
                # client may keep others waiting
                end = time.monotonic() + DRAIN
                while (left := end - time.monotonic()) > 0:
                    request.settimeout(left)
                    if not request.recv(65_536):
                        break
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def close_longest_waiting(self):
        """Make room: slow and idle clients must not keep others out."""
        connection = next(iter(self.waiting), None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it
            self.forget(connection)

    def forget(self, connection):
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.changed.notify_all()

    def set_waiting(self, connection, waits):
        """A connection waits for its next request, or has one to answer."""
        with self.changed:
            self.waiting.pop(connection, None)
            if waits and connection in self.open:
                self.waiting[connection] = True

    def shutdown_request(self, request):
        super().shutdown_request(request)
        with self.changed:
            self.forget(request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that goes away is not an error
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class Incoming(io.RawIOBase):
    """The bytes that a connection receives: the first of a request within SILENCE seconds, the
    others within ARRIVAL. A socket's own timeout begins again with each byte. Raises TimeoutError.
    """

    def __init__(self, connection):
        self.connection = connection
        self.deadline = None  # of the request whose bytes arrive

    def readable(self):
        return True

    def readinto(self, buffer):
        seconds = SILENCE
        if self.deadline is not None:
            seconds = self.deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
        self.connection.settimeout(seconds)
        try:
            count = self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(SILENCE)  # what an answer has
        if self.deadline is None:
            self.deadline = time.monotonic() + ARRIVAL
        return count


class HeadLines:
    """The header lines of a request. Raises ValueError for one that RFC 9112 does not allow.

    http.server takes `Content-Length : 9` for the end of the head: the body would become the next
    request.
    """

    def __init__(self, file):
        self.file = file

    def readline(self, limit):
        line = self.file.readline(limit)
        if line and len(line) < limit and not HEADER.fullmatch(line):
            raise ValueError(f"{line[:40]!r} is not a header line")
        return line


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout, disable_nagle_algorithm = SILENCE, True

    def setup(self):
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self):
        self.incoming.deadline = None
        self.unread = 0  # bytes of the request that may still come, at most
        self.expects_100 = False
        self.answered = False
        self.server.set_waiting(self.connection, True)
        super().handle_one_request()

    def parse_request(self):
        connection_file = self.rfile
        self.rfile = HeadLines(connection_file)
        try:
            return super().parse_request()
        except ValueError as error:
            self.send_error(400, str(error))
        except TimeoutError:
            self.send_error(408)
        finally:
            self.rfile = connection_file
        return False

    def handle_expect_100(self):
        self.expects_100 = True  # the client is asked for the body once its key has been checked
        return True

    def respond(self):
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.unread = BODY_LIMIT if has_body else 0
        # the body would be taken for the next request
        self.close_connection |= has_body and self.command != "POST"
        try:
            self.route()
        except ApiError as error:
            self.send_api_error(error)
        except (ConnectionError, TimeoutError):  # the client has gone
            raise
        except Exception as error:
            if not self.answered:
                message = f"the server failed ({type(error).__name__})"
                self.send_api_error(ApiError(500, message, code="server_error"))
            raise

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond

    def discard_unread(self):
        """Read on until the client closes: a connection that is closed with unread bytes is reset,
        and its answer lost."""
        self.server.set_waiting(self.connection, True)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.unread > 0:
                piece = self.rfile.read1(2**16)
                if not piece:
                    break
                self.unread -= len(piece)

    def route(self):
        """Answer the request. Its body is read last, once it is clear that it is wanted."""
        path, api = split_url(self.path).path, self.server.api
        self.check_origin()
        if path.startswith("/v1/"):
            self.check_key()
        if path.startswith("/v1/models/"):
            api.check_model(urllib.parse.unquote(path.removeprefix("/v1/models/")))
            path = "/v1/models/{model}"
        if path not in METHODS:
            known = ", ".join(METHODS)
            raise ApiError(404, f"nothing at {path[:80]}: there are {known}", code="unknown_url")
        method = METHODS[path]
        if self.command != method:
            raise ApiError(405, f"{path} takes {method}, not {self.command}",
                           code="method_not_supported", headers={"Allow": method})
        body = self.read_body() if self.command == "POST" else None
        self.server.set_waiting(self.connection, False)
        if path == "/":
            self.send(
                200, PAGE.read_bytes(), "text/html; charset=utf-8", {
                    "Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff",
                    "Cache-Control": "no-store"
                })
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [api.model()]})
        elif self.command == "GET":
            self.send_json(200, api.model())
        else:
            self.complete(body, "chat" if "chat" in path else "text")

    def check_origin(self):
        """A web page elsewhere must not reach a server on this machine: neither under a name of its
        own that it lets point here (DNS rebinding) nor as itself."""
        host, origin = self.headers.get("Host", "localhost"), self.headers.get(
            "Origin")  # browsers send a Host
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.server.loopback and not is_loopback(name):
            raise ApiError(403, "this server answers to localhost alone", code="invalid_host")
        if origin is not None and split_url(origin).netloc != host:
            raise ApiError(403, "this server does not answer to other web pages",
                           code="invalid_origin")

    def check_key(self):
        expected, given = self.server.api.api_key, self.headers.get("Authorization", "")
        # headers are read as latin-1; in constant time
        if expected is not None and not hmac.compare_digest(given.encode("latin-1"),
                                                            f"Bearer {expected}".encode()):
            raise ApiError(401, "a wrong API key, or none", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    def read_body(self):
        length, *others = self.headers.get_all("Content-Length", [""])
        if others or "Transfer-Encoding" in self.headers or not (length.isascii()
                                                                 and length.isdigit()):
            raise ApiError(411, "one Content-Length is needed, and no Transfer-Encoding",
                           code="length_required")
        if len(length) > 12 or int(length) > BODY_LIMIT:
            self.unread = min(int(length[:12]), UNREAD_LIMIT)
            raise ApiError(413, f"a request has at most {BODY_LIMIT:,} bytes",
                           code="request_too_large")
        if self.expects_100:
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        self.unread = int(length)
        try:
            body = self.rfile.read(self.unread)
        except TimeoutError as error:
            message = f"the request did not arrive within {ARRIVAL} s"
            raise ApiError(408, message, code="request_timeout") from error
        if len(body) < self.unread:
            raise ConnectionResetError
        self.unread = 0
        return body

    def complete(self, body, kind):
        api = self.server.api
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({str(error)[:80]})",
                           code="invalid_json") from error
        request, usage = api.read(body, kind)
        reply = api.submit(request)
        prefix, name = {
            "chat": ("chatcmpl", "chat.completion"), "text": ("cmpl", "text_completion")
        }[kind]
        head = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()),
            "model": api.name
        }
        try:
            (self.stream if request.stream else self.whole)(reply, head, kind, usage)
        finally:
            reply.cancel()

    def whole(self, reply, head, kind, _):
        for _ in reply.pieces(PATIENCE):
            self.check_connection()
        if reply.error:
            raise as_api_error(reply.error)
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        content = {"message": message} if kind == "chat" else {"text": reply.text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reply.ended}
        self.send_json(200, {**head, "choices": [choice], "usage": usage_of(reply)})

    def stream(self, reply, head, kind, usage):
        """Server-sent events. The end of the connection ends the body, so that HTTP/1.0 reads it,
        too."""
        head |= ({"object": "chat.completion.chunk"} if kind == "chat" else {}) | ({"usage": None}
                                                                                   if usage else {})

        def send(event):
            self.wfile.write(
                f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

        def part(content, ended=None):
            piece = {"delta": content} if kind == "chat" else {"text": content.get("content", "")}
            send({
                **head, "choices": [{"index": 0, **piece, "logprobs": None, "finish_reason": ended}]
            })

        self.close_connection = True
        self.send_head(200, {
            "Content-Type": "text/event-stream", "Cache-Control": "no-cache", "Connection": "close"
        })
        if kind == "chat":
            part({"role": "assistant", "content": ""})
        for piece in reply.pieces(PATIENCE, EVERY):
            if piece:
                part({"content": piece})  # which fails, too, where nobody reads it
            else:
                self.check_connection()
        if reply.error:
            send(as_api_error(reply.error).body())
            return
        part({}, reply.ended)
        if usage:
            send({**head, "choices": [], "usage": usage_of(reply)})
        send("[DONE]")

    def check_connection(self):
        """Raises ConnectionResetError if the client has gone."""
        self.connection.settimeout(0)
        try:
            if self.connection.recv(1,
                                    socket.MSG_PEEK) == b"" and not self.server.api.engine.closed:
                raise ConnectionResetError
        except BlockingIOError:
            pass
        finally:
            self.connection.settimeout(SILENCE)

    def send_api_error(self, error):
        self.close_connection |= self.unread > 0
        self.send_json(error.status, error.body(), error.headers)

    def send_json(self, status, value, headers=()):
        self.send(status, json.dumps(value).encode(), "application/json", dict(headers))

    def send(self, status, content, kind, headers):
        last = {"Connection": "close"} if self.close_connection else {}
        self.send_head(
            status, {"Content-Type": kind, "Content-Length": str(len(content)), **headers, **last})
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_head(self, status, headers):
        self.answered = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong, in our form."""
        self.close_connection, self.command = True, getattr(self, "command", None)
        self.unread = BODY_LIMIT
        error = ApiError(code, message or HTTPStatus(code).phrase)
        if self.request_version != "HTTP/0.9":
            self.send_json(code, error.body())

    def version_string(self):
        return "chat"

    def log_message(self, *_):
        """Requests are not logged: they hold what people say."""

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()
            if self.unread:
                self.discard_unread()


def usage_of(reply):
    prompt = len(reply.request.ids)
    return {
        "prompt_tokens": prompt, "completion_tokens": reply.count,
        "total_tokens": prompt + reply.count
    }
