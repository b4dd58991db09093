"""An HTTP server for an engine (lib/serving.py): OpenAI's API (lib/openai_api.py) and a chat page
for the browser."""

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
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lib.cli import BadInput
from lib.openai_api import Api, ApiError, Chunks, as_api_error, whole_response
from lib.serving import Reply

BODY_LIMIT = 2**20    # bytes of a request's body
UNREAD_LIMIT = 2**26  # bytes of a too long body that are read, so that the client sees the answer
PATIENCE = 0.25       # seconds between checks that the client is still connected
# Seconds between the pieces of a stream. Without this limit, 64 streams would take more time in
# Python than in the model.
EVERY = 0.02
SILENCE = 60          # seconds until a connection that sends nothing, or reads nothing, is closed
ARRIVAL = 30          # seconds from the first byte of a request to its last
FAREWELL = 3.0        # seconds for running answers to finish when the server stops
DRAIN = 0.1           # seconds for which a refused connection may still send
MAX_CONNECTIONS = 1024
# a header line, or the empty one that ends the head (RFC 9112, section 5)
HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r?\n|\r?\n")
PAGE = Path(__file__).with_name("chat_page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
                               "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
METHODS = {
    "/": "GET",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
}


def most_connections() -> int:
    """The limit on open connections: below the limit on file descriptors, without which accepting
    would fail over and over."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 256
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(min(MAX_CONNECTIONS, limit - 64), 1)


def split_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL. Raises ApiError if it is not one."""
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ApiError(400, f"{url[:80]} is not a URL ({error})", code="invalid_url") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# --------------------------------------------------------------------------------------------------
# Connections


class Server(ThreadingHTTPServer):
    """Listens once constructed, and answers inside `with serving(api)`. Raises BadInput if the
    address is not available.

    Close the engine first: running answers then have FAREWELL seconds to finish.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    server_address: tuple  # (host, port, ...)

    def __init__(self, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.loopback = is_loopback(host)
        self.api: Any = None  # an Api once serving
        self.most = most_connections()
        self.changed = threading.Condition()
        self.open: set = set()  # connections
        # Open connections whose request is incomplete, the longest waiting first.
        self.waiting: dict = {}
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot listen at {host}, port {port} ({reason}): give another --port, "
                           "or --host") from error

    def server_bind(self) -> None:
        # HTTPServer's own looks up the full name of the host, which may take long
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{port}"

    @contextlib.contextmanager
    def serving(self, api: Api) -> Iterator[None]:
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

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            if len(self.open) >= self.most:
                self.close_longest_waiting()
            full = len(self.open) >= self.most
            if not full:
                self.open.add(request)
                self.waiting[request] = True
        if full:
            self.refuse(request)
        else:
            super().process_request(request, client_address)

    def refuse(self, connection: socket.socket) -> None:
        """Answer 503 without starting a thread, as there are too many connections."""
        message = f"{self.most:,} requests are being answered: try again in a moment"
        body = json.dumps(ApiError(503, message, code="too_many_connections").body())
        head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json",
                "Retry-After: 1", "Connection: close", f"Content-Length: {len(body)}"]
        with contextlib.suppress(OSError):
            connection.send("\r\n".join([*head, "", body]).encode())
            connection.shutdown(socket.SHUT_WR)
            # Closing with the request unread would reset the connection and lose the answer. Read
            # it, but not for long, as other clients wait.
            end = time.monotonic() + DRAIN
            while True:
                left = end - time.monotonic()
                if left <= 0:
                    break
                connection.settimeout(left)
                if not connection.recv(65_536):
                    break
        self.shutdown_request(connection)

    def close_longest_waiting(self) -> None:
        """Close the longest-waiting connection, so that slow and idle clients do not block others.
        """
        connection = next(iter(self.waiting), None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end and closes it
            self.forget(connection)

    def forget(self, connection: socket.socket) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.changed.notify_all()

    def set_waiting(self, connection: socket.socket, waits: bool) -> None:
        """Record whether a connection waits for a request or is being answered."""
        with self.changed:
            self.waiting.pop(connection, None)
            if waits and connection in self.open:
                self.waiting[connection] = True

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.changed:
            self.forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that disconnects is not an error
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class Incoming(io.RawIOBase):
    """The bytes that a connection receives: the first of a request within SILENCE seconds, all
    within ARRIVAL seconds more. A socket's own timeout restarts with each byte. Raises
    TimeoutError."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline: float | None = None  # of the request that is arriving

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds: float = SILENCE
        if self.deadline is not None:
            seconds = self.deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
        self.connection.settimeout(seconds)
        try:
            count = self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(SILENCE)  # for the answer
        if self.deadline is None:
            self.deadline = time.monotonic() + ARRIVAL
        return count


class HeadLines:
    """The header lines of a request. Raises ValueError on a line that RFC 9112 does not allow.

    http.server takes `Content-Length : 9` as the end of the head, and would read the body as the
    next request.
    """

    def __init__(self, file: io.BufferedIOBase):
        self.file = file

    def readline(self, limit: int) -> bytes:
        line = self.file.readline(limit)
        if line and len(line) < limit and not HEADER.fullmatch(line):
            raise ValueError(f"{line[:40]!r} is not a header line")
        return line


# --------------------------------------------------------------------------------------------------
# Requests


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, in a thread of its own."""

    server: Server
    rfile: Any
    protocol_version = "HTTP/1.1"
    timeout = SILENCE
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()
            if self.unread:
                self.discard_unread()

    def handle_one_request(self) -> None:
        self.incoming.deadline = None
        self.unread = 0  # bytes of the request that may still arrive, at most
        self.expects_100 = False
        self.answered = False
        self.server.set_waiting(self.connection, True)
        super().handle_one_request()

    def parse_request(self) -> bool:
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

    def handle_expect_100(self) -> bool:
        self.expects_100 = True  # read_body requests the body, once the key has been checked
        return True

    def respond(self) -> None:
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.unread = BODY_LIMIT if has_body else 0
        if has_body and self.command != "POST":
            self.close_connection = True  # the unread body would be taken for the next request
        try:
            self.route()
        except ApiError as error:
            self.send_api_error(error)
        except (ConnectionError, TimeoutError):  # the client has disconnected
            raise
        except Exception as error:
            if not self.answered:
                message = f"the server failed ({type(error).__name__})"
                self.send_api_error(ApiError(500, message, code="server_error"))
            raise

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond

    def discard_unread(self) -> None:
        """Read until the client closes: closing with bytes unread would reset the connection and
        lose the answer."""
        self.server.set_waiting(self.connection, True)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.unread > 0:
                piece = self.rfile.read1(2**16)
                if not piece:
                    break
                self.unread -= len(piece)

    # ---- routing and checks, all raising ApiError

    def route(self) -> None:
        """Answer the request. The body is read last, after all checks that do not need it."""
        api = self.server.api
        path = split_url(self.path).path
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
            self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", PAGE_HEADERS)
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [api.model()]})
        elif path == "/v1/models/{model}":
            self.send_json(200, api.model())
        else:
            self.complete(body, "chat" if path == "/v1/chat/completions" else "text")

    def check_origin(self) -> None:
        """Keep web pages of other sites from using a server on this machine, through a name of
        theirs that points here (DNS rebinding) or from their own origin."""
        host = self.headers.get("Host", "localhost")  # browsers always send it
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.server.loopback and not is_loopback(name):
            raise ApiError(403, "this server answers only to localhost", code="invalid_host")
        origin = self.headers.get("Origin")
        if origin is not None and split_url(origin).netloc != host:
            raise ApiError(403, "this server does not answer to other web pages",
                           code="invalid_origin")

    def check_key(self) -> None:
        expected = self.server.api.api_key
        if expected is None:
            return
        given = self.headers.get("Authorization", "").encode("latin-1")  # as headers are read
        if not hmac.compare_digest(given, f"Bearer {expected}".encode()):  # in constant time
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    def read_body(self) -> bytes:
        length, *others = self.headers.get_all("Content-Length", [""])
        is_number = length.isascii() and length.isdigit()
        if others or "Transfer-Encoding" in self.headers or not is_number:
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

    # ---- completions

    def complete(self, body: Any, kind: str) -> None:
        """Answer a request for a chat completion ("chat") or a completion ("text")."""
        api = self.server.api
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({str(error)[:80]})",
                           code="invalid_json") from error
        request, with_usage = api.read(fields, kind)
        reply = api.submit(request)
        head = api.head(kind)
        try:
            if request.stream:
                self.send_stream(reply, Chunks(head, kind, with_usage))
            else:
                self.send_whole(reply, head, kind)
        finally:
            reply.cancel()

    def send_whole(self, reply: Reply, head: dict, kind: str) -> None:
        for _ in reply.pieces(PATIENCE):
            self.check_connection()
        if reply.error:
            raise as_api_error(reply.error)
        self.send_json(200, whole_response(head, kind, reply))

    def send_stream(self, reply: Reply, chunks: Chunks) -> None:
        """Send server-sent events. The end of the connection ends the body, so that HTTP/1.0
        clients can read it, too."""
        self.close_connection = True
        self.send_head(200, {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            "Connection": "close",
        })
        for chunk in chunks.first():
            self.send_event(json.dumps(chunk))
        for piece in reply.pieces(PATIENCE, EVERY):
            if piece:
                self.send_event(json.dumps(chunks.piece(piece)))  # fails without a client, too
            else:
                self.check_connection()
        if reply.error:
            self.send_event(json.dumps(as_api_error(reply.error).body()))
            return
        for chunk in chunks.last(reply):
            self.send_event(json.dumps(chunk))
        self.send_event("[DONE]")

    def send_event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def check_connection(self) -> None:
        """Raises ConnectionResetError if the client has disconnected."""
        self.connection.settimeout(0)
        try:
            closed = self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            closed = False
        finally:
            self.connection.settimeout(SILENCE)
        # when the server stops, it shuts down reading itself
        if closed and not self.server.api.engine.closed:
            raise ConnectionResetError

    # ---- sending

    def send_api_error(self, error: ApiError) -> None:
        if self.unread > 0:
            self.close_connection = True
        self.send_json(error.status, error.body(), error.headers)

    def send_json(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", headers or {})

    def send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        head = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
        if self.close_connection:
            head["Connection"] = "close"
        self.send_head(status, head)
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.answered = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error that http.server itself finds, in our format."""
        self.close_connection = True
        self.command = getattr(self, "command", None)  # type: ignore[assignment]
        self.unread = BODY_LIMIT
        error = ApiError(code, message or HTTPStatus(code).phrase)
        if self.request_version != "HTTP/0.9":
            self.send_json(code, error.body())

    def version_string(self) -> str:
        return "chat"

    def log_message(self, *_: Any) -> None:
        """Requests are not logged, as they contain private conversations."""
