"""A Hugging Face hub of local folders: the part of its HTTP API that `datasets` and
`huggingface_hub` use to read datasets.

    with Hub({"some/corpus": folder}) as hub:
        hub.break_off("a.parquet", after=1000, times=2)  # two downloads end after 1,000 bytes
        run_script("fineweb.py", *flags, cwd=tmp_path, env=hub.env(tmp_path))

Endpoints and headers are those that the clients were seen to ask for and to read. As on the hub, a
large file has a SHA-256; here, one of more than LFS bytes is large.
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
SITE = "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.02))\n"
FILE = r"/datasets/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)"
API = r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
CUT = ("close", "short", "reset", "stall")  # faults that end an answer early


class Hub:
    """Serves datasets ({id: folder}) on a free port. `asked` lists (method, path, status) of every
    request."""

    def __init__(self, datasets):
        self.commits = {}
        self.asked = []
        self.faults = []
        self.lock = threading.Lock()
        for name, folder in datasets.items():
            self.push(name, folder)

    def push(self, name, folder):
        """Add a commit to a dataset, which becomes its newest; earlier ones stay."""
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = Path(folder)

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, site=""):
        """The environment of a client of this hub, with caches in `home` and short waits before it
        tries again.

        site: Python code that the client runs first.
        """
        (Path(home) / "site").mkdir(exist_ok=True)
        (Path(home) / "site" / "sitecustomize.py").write_text(SITE + site)
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path(home) / "hf"),
            "NO_PROXY": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(home) / "site")
        }

    def break_off(self, name, after, times=1, how="close"):
        """Break off the next `times` answers with more than `after` bytes of a file.

        how: close; short, a close without a Content-Length; reset, as by a router; stall; garble,
        all bytes but wrong ones; or an HTTP status instead of the file.
        """
        self.faults.append({"name": name, "after": after, "times": times, "how": how})

    def fault(self, name, size):
        """The fault of an answer with `size` bytes of a file, or None."""
        with self.lock:
            for fault in self.faults:
                if name.endswith(fault["name"]) and fault["times"] and size > fault["after"]:
                    fault["times"] -= 1
                    return fault
        return None

    def downloads(self, name):
        """How often the content of a file was asked for."""
        count = 0
        for method, path, _ in self.asked:
            count += method == "GET" and "/resolve/" in path and path.endswith(name)
        return count


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has read enough
            self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = re.fullmatch(FILE, path) or re.fullmatch(API, path)
        if not match:
            return self.send(200 if path == "/" else 404, {})
        name, kind, revision, rest = match.groups()
        commits = self.hub.commits.get(name)
        if not commits:  # the hub's answer to those who are not logged in
            return self.send(401, {}, {"X-Error-Message": "Invalid username or password."})
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            error = {"error": f"Invalid rev id: {revision}"}
            return self.send(404, error, {"X-Error-Code": "RevisionNotFound"})
        files = files_of(commits[commit])
        if kind == "resolve":
            return self.send_file(rest, files, commit)
        if kind == "tree":
            recursive = parse_qs(parts.query).get("recursive", ["false"])[0]
            return self.send_tree(rest, files, recursive.lower() == "true")
        if kind == "paths-info":
            wanted = wanted_paths(body.decode())
            return self.send(200, [describe(file, files[file]) for file in files if file in wanted])
        return self.send(200, {
            "id": name, "sha": commit, "private": False, "gated": False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": file} for file in files]
        })

    def send_tree(self, below, files, recursive):
        """The entries of the folder `below`, "" for all."""
        prefix = f"{below}/" if below else ""
        inside = {file: path for file, path in files.items() if file.startswith(prefix)}
        if below and not inside:
            return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        folders = set()
        for file in inside:
            names = file[len(prefix):].split("/")
            folders |= {prefix + "/".join(names[:n]) for n in range(1, len(names))}
        entries = []
        for path in sorted(folders):
            entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        entries += [describe(file, path) for file, path in inside.items()]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix):]]
        return self.send(200, entries)

    def send_file(self, file, files, commit):
        if file not in files:
            return self.send(404, {"error": "Entry not found"},
                             {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[file].read_bytes()
        tag = f'"{etag(files[file])}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        size = len(content)
        if size > LFS:
            headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(size)}
        status = 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first = int(span[1])
            end = int(span[2]) + 1 if span[2] else size
            content = content[first:end]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        headers["Content-Length"] = str(len(content))
        if self.command == "HEAD":
            return self.begin(status, headers)
        return self.send_content(file, content, status, headers)

    def send_content(self, file, content, status, headers):
        """Send a file's bytes, or part of them where Hub.break_off asked for that."""
        fault = self.hub.fault(file, len(content)) or {"how": None}
        how = fault["how"]
        if isinstance(how, int):
            return self.send(how, {"error": "out of order"})
        if how == "short":
            del headers["Content-Length"]
        if how == "garble":
            content = bytes(len(content))
        if how in CUT:
            content = content[:fault["after"]]
        self.begin(status, headers)
        self.wfile.write(content)
        self.wfile.flush()
        if how == "stall":
            time.sleep(60)
        if how in CUT:
            self.cut(how == "reset")
        return None

    def cut(self, reset):
        """End the connection now."""
        self.close_connection = True
        if not reset:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # at once: rfile and wfile would keep it open
        return socket.socket(fileno=self.connection.detach()).close()

    def send(self, status, value, headers=None):
        content = json.dumps(value).encode()
        kind = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        self.begin(status, (headers or {}) | kind)
        if self.command != "HEAD":
            self.wfile.write(content)

    def begin(self, status, headers):
        self.hub.asked.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def files_of(folder):
    """{path in the dataset: path on the disk}, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in paths}


def wanted_paths(body):
    """The paths that a paths-info request names, in JSON or as a form."""
    return json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", ())


def etag(path):
    """As on the hub: the SHA-256 of a large file, the git id of another."""
    content = path.read_bytes()
    if len(content) > LFS:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(file, path):
    content = path.read_bytes()
    entry = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content),
             "path": file}
    if len(content) > LFS:
        entry["lfs"] = {"oid": etag(path), "size": len(content), "pointerSize": 130}
    return entry
