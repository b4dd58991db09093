"""A Hugging Face hub of local folders: the part of its HTTP API that `datasets` and
`huggingface_hub` use to read datasets.

    with Hub({"some/corpus": folder}) as hub:
        # the next two answers with that file end after 1,000 bytes
        hub.break_off("a.parquet", after=1000, times=2)
        subprocess.run(command, env=os.environ | hub.env(tmp_path))

Endpoints and headers are those that the clients request and read. As on the hub, a large file, here
of more than LFS bytes, has a SHA-256.
"""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = 1000
CUT = ("close", "short", "reset", "stall")  # faults that send a part of the file
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")
API = re.compile(
    r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
# clients wait 0.02 s where they would wait longer
SITE = "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.02))\n"


class Hub:
    """Serves datasets ({id: folder}) on a free port. `asked` lists (method, path, status) of every
    request."""

    def __init__(self, datasets):
        self.commits = {}  # dataset -> {commit: folder}, the newest last
        self.asked = []
        self.faults = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        for name, folder in datasets.items():
            self.push(name, folder)

    def push(self, name, folder):
        """Give a dataset a new commit; earlier ones stay."""
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = Path(folder)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0),
                                          type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.release()
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, site=""):
        """The environment of a client of this hub: it caches in `home` and retries quickly.

        site: Python code that it runs first.
        """
        folder = Path(home) / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SITE + site)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(Path(home) / "hf"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(folder),
        }

    def break_off(self, name, after, times=1, how="close"):
        """Break off the next `times` answers with more than `after` bytes of a file.

        how: close; short, a close without a Content-Length; reset, as a router does; stall; garble,
        all bytes but wrong ones; hold, all bytes after `release`; or an HTTP status instead of the
        file.
        """
        self.faults.append({"name": name, "after": after, "times": times, "how": how})

    def release(self):
        """Send what is on hold."""
        self.released.set()

    def fault(self, name, size):
        with self.lock:
            for fault in self.faults:
                if name.endswith(fault["name"]) and fault["times"] and size > fault["after"]:
                    fault["times"] -= 1
                    return fault
        return None

    def downloads(self, name):
        """How often the content of a file was requested."""
        return sum(method == "GET" and "/resolve/" in path and path.endswith(name)
                   for method, path, _ in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has enough
            self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(parts.path)
        match = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if not match:
            return self.send(200 if path == "/" else 404, {})
        name, kind, revision, rest = match.groups()
        commits = self.hub.commits.get(name)
        if not commits:  # what clients get that are not logged in
            return self.send(401, {}, {"X-Error-Message": "Invalid username or password."})
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            return self.send(404, {"error": f"Invalid rev id: {revision}"},
                             {"X-Error-Code": "RevisionNotFound"})
        files = files_in(commits[commit])
        if kind == "resolve":
            return self.send_file(rest, files, commit)
        if kind == "tree":
            recursive = parse_qs(parts.query).get("recursive", ["false"])[0]
            return self.send_tree(rest, files, recursive.lower() == "true")
        if kind == "paths-info":
            wanted = paths_in(body)
            return self.send(200, [describe(file, files[file]) for file in files if file in wanted])
        return self.send(200, {
            "id": name, "sha": commit, "private": False, "gated": False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": file} for file in files]})

    def send_tree(self, below, files, recursive):
        inside = {}
        for file, path in files.items():
            if not below or file.startswith(below + "/"):
                inside[file] = path
        if below and not inside:
            return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        start = len(below) + 1 if below else 0
        folders = set()
        for file in inside:
            folders |= {file[:i] for i in range(start, len(file)) if file[i] == "/"}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                   for path in sorted(folders)]
        entries += [describe(file, path) for file, path in inside.items()]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"][start:]]
        return self.send(200, entries)

    def send_file(self, file, files, commit):
        if file not in files:
            return self.send(404, {"error": "Entry not found"},
                             {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[file].read_bytes()
        size = len(content)
        tag = f'"{etag(files[file])}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if size > LFS:
            headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(size)}
        status = 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first = int(span[1])
            last = int(span[2]) if span[2] else size - 1
            content = content[first:last + 1]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        headers["Content-Length"] = str(len(content))
        fault = self.hub.fault(file, len(content)) if self.command == "GET" else None
        return self.send_content(status, headers, content, fault or {"how": None})

    def send_content(self, status, headers, content, fault):
        how = fault["how"]
        if isinstance(how, int):
            return self.send(how, {"error": "out of order"})
        if how == "short":
            del headers["Content-Length"]
        if how == "hold":
            self.hub.released.wait()
        if how == "garble":
            content = bytes(len(content))
        if how in CUT:
            content = content[:fault["after"]]
        self.begin(status, headers)
        if self.command == "GET":
            self.wfile.write(content)
            self.wfile.flush()
        if how == "stall":
            time.sleep(60)
        if how in CUT:
            self.cut_off(reset=how == "reset")
        return None

    def cut_off(self, reset):
        self.close_connection = True
        if not reset:
            return self.connection.shutdown(socket.SHUT_RDWR)
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # at once, though rfile and wfile still refer to it
        return socket.socket(fileno=self.connection.detach()).close()

    def send(self, status, value, headers=None):
        content = json.dumps(value).encode()
        own = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        self.begin(status, (headers or {}) | own)
        if self.command != "HEAD":
            self.wfile.write(content)

    def begin(self, status, headers):
        self.hub.asked.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def files_in(folder):
    """{path in the dataset: path on the disk}"""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path for path in files}


def paths_in(body):
    """The paths that a request asks about, in JSON or as a form."""
    if body.startswith(b"{"):
        return json.loads(body)["paths"]
    return parse_qs(body.decode()).get("paths", ())


def etag(path):
    """As on the hub: the SHA-256 of a large file, the git id of another."""
    content = path.read_bytes()
    if len(content) > LFS:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(file, path):
    size = path.stat().st_size
    entry = {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": size,
             "path": file}
    if size > LFS:
        entry["lfs"] = {"oid": etag(path), "size": size, "pointerSize": 130}
    return entry
