"""A Hugging Face hub of local folders: the part of its HTTP API that `datasets` and
`huggingface_hub` use to read datasets.

    with Hub({"some/corpus": folder}) as hub:
        hub.break_off("a.parquet", after=1000, times=2)      # the next two answers with that file end after 1,000 bytes
        subprocess.run(command, env=os.environ | hub.env(tmp_path))

Endpoints and headers are those that the clients were seen to ask for and to read. As on the hub, a
large file, here of more than LFS bytes, has a SHA-256.
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


class Hub:
    """Serves datasets ({id: folder}) on a free port. `asked` lists (method, path, status) of every
    request."""

    def __init__(self, datasets):
        self.commits, self.asked, self.faults, self.lock = {}, [], [], threading.Lock()
        for name, folder in datasets.items():
            self.push(name, folder)

    def push(self, name, folder):
        """Give a dataset another commit, from now on its newest; earlier ones stay."""
        commits = self.commits.setdefault(name, {})
        commits[hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()] = Path(folder)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0),
                                          type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, site=""):
        """The environment of a client of this hub: its caches lie in `home`, and it does not wait
        long before it tries again.

        site: Python code that it runs first.
        """
        (Path(home) / "site").mkdir(exist_ok=True)
        (Path(home) / "site" / "sitecustomize.py").write_text(SITE + site)
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path(home) / "hf"),
            "NO_PROXY": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(home) / "site")
        }

    def break_off(self, name, after, times=1, how="close"):
        """Break off the next `times` answers that would bring more than `after` bytes of a file.

        how: close; short, a close without a Content-Length that would tell; reset, as a router
        does; stall; garble, all bytes but wrong ones; or an HTTP status instead of the file.
        """
        self.faults.append({"name": name, "after": after, "times": times, "how": how})

    def fault(self, name, size):
        with self.lock:
            for fault in self.faults:
                if name.endswith(fault["name"]) and fault["times"] and size > fault["after"]:
                    fault["times"] -= 1
                    return fault
        return None

    def downloads(self, name):
        """How often the content of a file was asked for."""
        return sum(method == "GET" and "/resolve/" in path and path.endswith(name)
                   for method, path, _ in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, query = unquote(parts.path), parse_qs(parts.query)
        match = (re.fullmatch(
            r"/datasets/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path) or re.fullmatch(
                r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?",
                path))
        with contextlib.suppress(BrokenPipeError,
                                 ConnectionResetError):  # the client has read enough
            if not match:
                return self.send(200 if path == "/" else 404, {})
            name, kind, revision, rest = match.groups()
            commits = self.hub.commits.get(name)
            if not commits:  # as the hub tells those who are not logged in
                return self.send(401, {}, {"X-Error-Message": "Invalid username or password."})
            commit = list(commits)[-1] if revision in (None, "main") else revision
            if commit not in commits:
                return self.send(404, {"error": f"Invalid rev id: {revision}"},
                                 {"X-Error-Code": "RevisionNotFound"})
            folder = commits[commit]
            files = {
                str(path.relative_to(folder)): path
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            if kind == "resolve":
                self.send_file(rest, files, commit)
            elif kind == "tree":
                self.send_tree(rest, files, query.get("recursive", ["false"])[0].lower() == "true")
            elif kind == "paths-info":
                wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(
                    body.decode()).get("paths", ())
                self.send(200,
                          [describe(file, path) for file, path in files.items() if file in wanted])
            else:
                self.send(
                    200, {
                        "id": name, "sha": commit, "private": False, "gated": False,
                        "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": file} for file in files]
                    })
        return None

    do_HEAD = do_POST = do_GET

    def send_tree(self, below, files, recursive):
        inside = {
            file: path for file, path in files.items() if not below or file.startswith(below + "/")
        }
        if below and not inside:
            return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        start = len(below) + 1 if below else 0
        folders = {file[:i] for file in inside for i in range(start, len(file)) if file[i] == "/"}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                   for path in sorted(folders)]
        entries += [describe(file, path) for file, path in inside.items()]
        return self.send(
            200, [entry for entry in entries if recursive or "/" not in entry["path"][start:]])

    def send_file(self, file, files, commit):
        if file not in files:
            return self.send(404, {"error": "Entry not found"},
                             {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, status, span = files[file].read_bytes(), 200, re.fullmatch(
            r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size, first, tag = len(content), int(span[1]) if span else 0, f'"{etag(files[file])}"'
        content = content[first:int(span[2]) + 1 if span and span[2] else None]
        headers = {
            "ETag": tag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes",
            "Content-Length": str(len(content))
        }
        if size > LFS:
            headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(size)}
        if span:
            status, headers[
                "Content-Range"] = 206, f"bytes {first}-{first + len(content) - 1}/{size}"
        fault = self.hub.fault(file, len(content)) if self.command == "GET" else None
        how = fault and fault["how"]
        if isinstance(how, int):
            return self.send(how, {"error": "out of order"})
        if how == "short":
            del headers["Content-Length"]
        self.begin(status, headers)
        if self.command == "GET":
            content = bytes(len(content)) if how == "garble" else content
            self.wfile.write(content[:fault["after"]] if how in ("close", "short", "reset",
                                                                 "stall") else content)
            self.wfile.flush()
        if how == "stall":
            time.sleep(60)
        if how in ("close", "short", "reset", "stall"):
            self.close_connection = True
            if how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           struct.pack("ii", 1, 0))
                socket.socket(fileno=self.connection.detach()).close(
                )  # at once, though rfile and wfile hold it
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def send(self, status, value, headers=None):
        content = json.dumps(value).encode()
        self.begin(status, (headers or {})
                   | {"Content-Length": str(len(content)), "Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(content)

    def begin(self, status, headers):
        self.hub.asked.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def etag(path):
    """As on the hub: the SHA-256 of a large file, the git id of another."""
    content = path.read_bytes()
    return (hashlib.sha256(content) if len(content) > LFS else
            hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()


def describe(file, path):
    size = path.stat().st_size
    lfs = {"lfs": {"oid": etag(path), "size": size, "pointerSize": 130}} if size > LFS else {}
    return {
        "type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": size,
        "path": file, **lfs
    }
