"""Run the scripts in processes that are forked from a server with torch already imported.

Importing torch and what training needs of it takes 2.8 s of CPU time, most of what a launch costs.
A forked process has its own working directory, environment, arguments, output, signals and exit
code. It runs the script as its main program, in an interpreter that has imported no module of this
project.

One difference remains: the preloaded modules have read their environment variables. A test that
sets one of theirs (OMP_NUM_THREADS, CXX, ...) has to start Python: run_script(..., real=True) in
runs.py.

Linux without CUDA only: torch's libraries on macOS and a CUDA context do not survive a fork.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# Slow to import. Not Hugging Face's libraries: tests set variables that these read when imported.
PRELOADED = (
    "numpy", "tiktoken", "tokenizers", "torch", "torch._dynamo", "torch.distributed.nn",
    "torch.utils.tensorboard", "tqdm", "pyarrow.dataset", "pandas", "scipy.stats", "sklearn",
    "nltk", "sacrebleu", "httpx", "httpx2", "yaml", "filelock", "dill", "multiprocess", "fsspec")
LIMIT = 1 << 20  # bytes of a request
SERVER = "import sys; sys.path[0] = {!r}; import forks; exec(forks.main())"


def possible():
    """Whether processes can be forked here. Asks torch: a device file may be missing or useless."""
    return sys.platform == "linux" and not torch.cuda.is_available()


POSSIBLE = possible()


# --------------------------------------------------------------------------------------------------
# Client


class Server:
    """The server as seen by the tests."""

    def __init__(self):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = SERVER.format(os.path.dirname(__file__))
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", code, str(theirs.fileno())],
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL)

    def close(self):
        self.control.close()  # the server ends when it reads this
        self.process.wait()


@functools.cache
def server():
    """The server of this process, started by the first test that needs it."""
    return Server()


def close():
    if server.cache_info().currsize:
        server().close()
        server.cache_clear()


def start(words, cwd, files, envs, ignored=()):
    """Start `script, *flags`, or `-c, code, *flags`, once per environment in `envs`.

    files: for stdin, stdout and stderr. ignored: signals that the processes ignore from their
    start. Returns a Group.
    """
    request = {"words": [str(word) for word in words], "cwd": str(cwd), "envs": envs,
               "ignored": [int(number) for number in ignored]}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        numbers = [file.fileno() for file in (*files, theirs)]
        socket.send_fds(server().control, [json.dumps(request).encode()], numbers)
    return Group(ours)


class Group:
    """Processes that were started together, with what the tests use of Popen.

    pids: by rank. returncode: None until all have ended, then 0 or the first failure's code
    (negative: a signal).
    """

    def __init__(self, connection):
        self.connection = connection
        self.pids = json.loads(connection.recv(LIMIT))
        self.pid = self.pids[0]
        self.returncode = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        self.connection.close()

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = json.loads(self.connection.recv(LIMIT))
            except (BlockingIOError, TimeoutError) as error:
                raise subprocess.TimeoutExpired("a forked process", timeout) from error
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(words, cwd, env, processes=1, timeout=None, input=""):
    """Run a script to its end in one or several forked processes -> CompletedProcess (text)."""
    envs = [env]
    if processes > 1:
        store, envs = workers(env, processes)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        group = stack.enter_context(start(words, cwd, files, envs))
        try:
            group.wait(timeout)
        except BaseException:
            group.kill()
            raise
        for file in files:
            file.seek(0)
        _, out, err = (file.read() for file in files)
    return subprocess.CompletedProcess(words, group.returncode, out, err)


def workers(env, world_size):
    """A store where processes meet, and the environment of each, as torchrun makes them."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_RESTART_COUNT": 0}
    envs = []
    for rank in range(world_size):
        settings = shared | {"RANK": rank, "LOCAL_RANK": rank}
        envs.append(env | {name: str(value) for name, value in settings.items()})
    return store, envs


# --------------------------------------------------------------------------------------------------
# Server


def serve(control):
    """Answer requests until the client closes its end.

    Returns only in a forked process: (request, environment, files), what this process is to run.
    """
    keepers = set()
    while True:
        message, files, _, _ = socket.recv_fds(control, LIMIT, 4)
        if not message:
            break
        keeper = os.fork()
        if keeper == 0:
            control.close()
            return keep(json.loads(message), files)
        keepers.add(keeper)
        for file in files:
            os.close(file)
        keepers = {pid for pid in keepers if os.waitpid(pid, os.WNOHANG)[0] == 0}
    for pid in keepers:
        os.waitpid(pid, 0)
    return sys.exit()


def keep(request, files):
    """Start the processes of a request, report their ids and, once all have ended, their exit code.

    When one fails, the others are ended, as torchrun does.
    """
    *standard, reply = files
    connection = socket.socket(fileno=reply)
    pids = []
    for env in request["envs"]:
        pid = os.fork()
        if pid == 0:
            connection.close()
            return request, env, standard
        pids.append(pid)
    for file in standard:
        os.close(file)
    connection.send(json.dumps(pids).encode())
    result = 0
    running = set(pids)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not result:
            result = code
            for other in running:
                os.kill(other, signal.SIGTERM)
    with contextlib.suppress(OSError):  # the test may have ended
        connection.send(json.dumps(result).encode())
    return os._exit(0)


def become(request, env, standard):
    """Give this process the files, folder, environment and signals of a request -> its code."""
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if "PYTHONPATH" in env:
        sys.path[1:1] = env["PYTHONPATH"].split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ImportError):
            importlib.import_module("sitecustomize")
    return program(request["words"])


def program(words):
    """`script, *flags` or `-c, code, *flags` -> compiled code, its arguments and path set."""
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        return compile(words[1], "<string>", "exec")
    sys.argv = words
    script = words[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    sys.modules["__main__"].__file__ = script
    return compile(Path(script).read_bytes(), script, "exec")


def preload(names):
    """Import those of these modules that can be imported. What fails is left to the scripts."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main():
    """Serve -> the code that a forked process runs. To be called by `__main__`, which runs it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    preload(PRELOADED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes its end
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page that it looks at
    return become(*serve(control))
