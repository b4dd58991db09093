"""The page that --doctor prints: whether a machine is ready to train, and the cost of a run there.

A check is a function of a Machine that returns a Check; CHECKS lists them in the order of the page.
The two that need all GPUs start processes of their own: `probe`, on every GPU, and a short run of
the training script itself.
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lib import compiler
from lib.budget import batch_size, hours_and_dollars, steps_of
from lib.cli import BadInput
from lib.corpus import Corpus
from lib.description import matmul_flops
from lib.devices import (
    Processes,
    compute_dtype,
    dtype_name,
    memory_bytes,
    peak_flops,
    pick_device,
)
from lib.hooks import LAUNCHER
from lib.logger import read_scalars
from lib.plan import check_batch

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
# seconds for each program that a check starts; with --size auto, other processes wait for it, but
# only LIMIT of lib/nodes.py
PATIENCE = 540.0
STEPS_TIME = 90.0  # seconds that the timed steps may take; smaller batches stand in for longer ones
STEPS = 10
WARM_UP = 2       # steps before them
REACHED = 0.3     # share of the speed of matmuls that training reaches, to choose those batches
TORCH = ((2, 11), (2, 15))  # oldest and newest minor version that the code runs on
DATA_BYTES = 20e9  # of fineweb.py's default, 10B tokens
DATA_TOKENS = 10e9
GPT2_VOCABULARY = 50_257
SLOW_DISK = 20e6  # bytes per second; training reads less, but evaluations wait for it
SLOW_LINK = 1e9   # bytes per second of an all-reduce
SHARED = 512e6    # bytes of shared memory that NCCL needs between GPUs without peer access
CHECKPOINT = 12   # bytes per parameter: weights and two moments in fp32

# (preset, parameters) -> (validation loss, tokens to it) in README.md's table
README_LOSSES: dict[tuple[str, int], tuple] = {
    ("speedrun", 60_379_434): ((5.144, 5.4e6), (3.88, 31.0e6)),
    ("modern", 123_588_096): ((5.144, 93.3e6),),
}
# settings of a run that change its speed or memory, besides the model's, or how it reads its data
SPEED_FLAGS = {
    "optimizer", "deterministic", "device", "dtype", "grad_clip", "shuffle", "seed", "parallel",
    "checkpoint_activations", "follow",
}


class Check(NamedTuple):
    ok: bool
    text: str
    remedy: str = ""


@dataclass
class Machine:
    """The input of the checks, and results of earlier checks that later ones need."""

    cfg: Any                     # TrainConfig
    build: Callable[[int], Any]  # vocabulary -> GPT on the meta device
    script: Path                 # the training script
    device: torch.device = field(init=False)
    model: Any = field(init=False)
    gpus: int | None = None  # None: all
    corpus: Any = None  # Corpus of --data, if there is one
    no_data: BadInput | None = None  # why there is none
    probed: dict = field(default_factory=dict)  # see `probe`
    speed: float | None = None  # tokens per second of all GPUs
    start_up: float = 0.0       # seconds

    def __post_init__(self):
        self.device = pick_device(self.cfg.device)
        try:
            self.corpus = Corpus(self.cfg)
        except BadInput as error:
            self.no_data = error
        vocab_size = self.corpus.vocab_size if self.corpus else None
        self.model = self.build(vocab_size or GPT2_VOCABULARY)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def processes(self) -> int:
        """One per GPU."""
        if not self.on_gpu:
            return 1
        return self.gpus or torch.cuda.device_count()

    @property
    def parameters(self) -> int:
        return self.model.parameter_counts()["total"]


def examine(machine: Machine) -> bool:
    """Print the page -> whether every line is fine."""
    colored = sys.stdout.isatty()
    failed = 0
    for name, check in CHECKS:
        try:
            result = check(machine)
        except BadInput as error:
            cause, _, remedy = str(error).rpartition(": ")
            result = Check(False, cause, remedy)
        except Exception as error:  # a check must not hide the others
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            result = Check(False, f"this check failed ({reason})", "report it")
        failed += not result.ok
        print(line(name, result, colored), flush=True)
    print(f"{failed} to fix" if failed else "ready to train")
    return not failed


def line(name: str, check: Check, colored: bool) -> str:
    mark = "ok " if check.ok else "FIX"
    if colored:
        mark = f"\033[{32 if check.ok else 31}m{mark}\033[0m"
    remedy = "" if check.ok or not check.remedy else f"\n{'':15} -> {check.remedy}"
    return f"{mark} {name:11} {check.text}{remedy}"


# --------------------------------------------------------------------------------------------------
# Hardware and software


def nvidia_smi(query: str = "") -> str:
    """The output of nvidia-smi, of --query-gpu=`query` if given; "" if it fails."""
    command = ["nvidia-smi"]
    if query:
        command += [f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if query and chosen:
        command += ["-i", chosen]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_gpu(machine: Machine) -> Check:
    seen = nvidia_smi("name").splitlines()
    if not machine.on_gpu and seen and machine.cfg.device == "auto":
        return Check(False, f"the driver sees {len(seen)} x {seen[0]}, torch sees no GPU",
                     f"install a torch that fits the driver; this one is {torch.__version__}")
    if not machine.on_gpu:
        return Check(True, f"none: training runs on {machine.device.type}, which suits "
                           "--preset tiny")
    names = {torch.cuda.get_device_name(i) for i in range(machine.processes)}
    text = f"{machine.processes} x {', '.join(sorted(names))}"
    if len(names) > 1:
        return Check(False, text, "the slowest sets the speed: choose equal ones with "
                                  "CUDA_VISIBLE_DEVICES")
    used = [int(word) for word in nvidia_smi("memory.used").splitlines() if word.isdigit()]
    total = memory_bytes(machine.device) or 0
    text += f", {total / GB:.0f} GB each"
    if used and max(used) * 2**20 > 0.1 * total:
        return Check(False, f"{text}, of which {max(used) * 2**20 / GB:.0f} GB are in use",
                     "end the processes that nvidia-smi shows")
    return Check(True, text)


def check_driver(machine: Machine) -> Check:
    if not machine.on_gpu:
        return Check(True, "not needed without a GPU")
    version = nvidia_smi("driver_version").partition("\n")[0]
    found = re.search(r"CUDA (?:UMD )?Version: (\d+)\.(\d+)", nvidia_smi())
    text = f"{version or 'unknown'}, for CUDA {found[1] + '.' + found[2] if found else 'unknown'}"
    text += f"; torch was built for CUDA {torch.version.cuda}"
    if found and int(found[1]) < int(str(torch.version.cuda).partition(".")[0]):
        return Check(False, text, "rent a machine with a newer driver, or install torch for this "
                                  "CUDA")
    return Check(True, text)


def check_torch(machine: Machine) -> Check:
    python = ".".join(map(str, sys.version_info[:3]))
    text = f"{torch.__version__}, Python {python}"
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if TORCH[0] <= version <= TORCH[1]:
        return Check(True, text)
    return Check(False, text, "pip install -r requirements.txt")


def check_precision(machine: Machine) -> Check:
    dtype = machine.cfg.dtype
    name = dtype_name(compute_dtype(machine.device, dtype))
    if not machine.on_gpu and dtype == "auto":
        return Check(True, f"{name}, as on every CPU; GPUs train in bfloat16")
    if not machine.on_gpu:
        return Check(True, name)
    major, minor = torch.cuda.get_device_capability(machine.device)
    peak = peak_flops(machine.device, dtype)
    text = f"{name}, compute capability {major}.{minor}"
    text += f", peak {peak / 1e12:.0f} TFLOP/s" if peak else ", peak unknown, so no MFU"
    return Check(True, text)


def check_memory(machine: Machine) -> Check:
    total = memory_bytes(torch.device("cpu")) or 0
    limit = container_limit()
    if limit:
        total = min(total, limit)
    # a process that imports torch takes 1 to 3 GB, and a checkpoint is copied to the host
    needed = machine.processes * 3e9 + CHECKPOINT * machine.parameters
    text = f"{total / GB:.0f} GB, {os.cpu_count()} CPU cores"
    if machine.on_gpu and total < needed:
        return Check(False, text, f"rent a machine with {needed / GB:.0f} GB or more")
    return Check(True, text)


def container_limit() -> int | None:
    """The memory limit of this container, bytes; None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # "max"
            continue
    return None


def check_disk(machine: Machine) -> Check:
    folder = Path(machine.cfg.log_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    saved = (machine.cfg.keep or 10) + 1
    needed = saved * CHECKPOINT * machine.parameters
    text = f"{free / GB:.0f} GB free; {saved} checkpoints take {needed / GB:.1f} GB"
    if not machine.corpus:
        needed += DATA_BYTES
        text += f", 10B tokens {DATA_BYTES / GB:.0f} GB"
    if not os.access(folder, os.W_OK):
        return Check(False, f"{folder} cannot be written to", "name another --log_dir")
    if free < needed:
        return Check(False, text, "rent a larger disk, keep fewer checkpoints (--keep), or prepare "
                                  "less data (fineweb.py --max_tokens)")
    return Check(True, text)


def check_shared_memory(machine: Machine) -> Check:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Check(True, "no /dev/shm; only several GPUs need it")
    text = f"{size / GB:.1f} GB in /dev/shm"
    if machine.processes > 1 and size < SHARED:
        return Check(False, text, "start the container with --shm-size=1g or --ipc=host")
    return Check(True, text)


def check_compiler(machine: Machine) -> Check:
    if not machine.on_gpu:
        return Check(True, "not used: models are compiled on GPUs")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or compiler.CACHE)
    missing = []
    try:
        import triton

        text = f"Triton {triton.__version__}"
    except ImportError:
        text = "no Triton"
        missing.append("pip install triton")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        text += ", no C compiler"
        missing.append("apt-get install gcc")
    kernels = sum(1 for _ in folder.glob("fxgraph/*/*"))
    text += f"; cache {folder}: {kernels} graphs"
    if missing:
        return Check(False, text, f"{', '.join(missing)}; or train slower with --no-compile")
    return Check(True, text)


def check_ports(machine: Machine) -> Check:
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return Check(False, f"this machine's name, {host}, has no address",
                     f'echo "127.0.0.1 {host}" >> /etc/hosts')
    port = machine.cfg.tensorboard or 6006
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((machine.cfg.tensorboard_host, port))
        except OSError as error:
            text = f"{port} is not free for TensorBoard ({error.strerror})"
            return Check(not machine.cfg.tensorboard, text, "give another --tensorboard port")
    return Check(True, f"{host} has an address, {port} is free for --tensorboard")


def check_clock(machine: Machine) -> Check:
    with tempfile.NamedTemporaryFile(dir=ROOT if os.access(ROOT, os.W_OK) else None) as file:
        written = os.stat(file.name).st_mtime
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    newest = max(path.stat().st_mtime for path in ROOT.glob("*.py"))
    if now < newest - 86_400:
        return Check(False, f"{text}, before this project's files were written",
                     "set it: downloads check certificates by it")
    if abs(now - written) > 10:
        return Check(False, f"{text}; the disk's is {written - now:+.0f} s off",
                     "use a local disk")
    return Check(True, text)


def check_data(machine: Machine) -> Check:
    if machine.no_data:
        raise machine.no_data
    paths = [path for source in machine.corpus.sources for path in source.shards.train]
    read, seconds = read_shards(paths)
    speed = read / seconds
    tokens = machine.corpus.tokens["train"]
    count = f"{tokens:,}" if tokens else "an unknown number of"  # with --follow
    text = f"{count} tokens in {len(paths)} shards, read at {speed / 1e6:,.0f} MB/s"
    if speed < SLOW_DISK and read > SLOW_DISK:  # of a few small files, it says nothing
        return Check(False, text, "copy them to a local disk")
    return Check(True, text)


def read_shards(paths: list[Path], most: int = 2**28) -> tuple[int, float]:
    """Read up to `most` bytes that are not in the page cache -> (bytes, seconds)."""
    read = 0
    seconds = 1e-9
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while read < most and (piece := file.read(2**22)):
                read += len(piece)
            seconds += time.perf_counter() - started
    return read, seconds


# --------------------------------------------------------------------------------------------------
# Between the GPUs


def probe() -> None:
    """Runs on each GPU, or in two processes on the CPU. Rank 0 prints as JSON: `flops` of matmuls
    per second and GPU, `bandwidth` of an all-reduce in bytes per second, `peers` and `pairs`: GPUs
    that reach each other's memory."""
    with Processes(sys.argv[1]) as processes:
        n = processes.world_size
        on_gpu = processes.device.type == "cuda"
        found = {"flops": matmul_flops(processes.device), "processes": n, "peers": 0, "pairs": 0}
        tensor = torch.ones(2**26 if on_gpu else 2**20, device=processes.device)
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            processes.all_reduce(tensor)
            tensor[0].item()  # waits for the GPU
            seconds.append(time.perf_counter() - started)
        # bytes that each process sends and receives in a ring, as in NCCL's tests
        moved = 2 * (n - 1) / n * tensor.numel() * tensor.element_size()
        found["bandwidth"] = moved / statistics.median(seconds[2:])
        for i in range(n if on_gpu else 0):
            for j in range(n):
                found["pairs"] += i != j
                found["peers"] += i != j and torch.cuda.can_device_access_peer(i, j)
        if processes.main:
            print(json.dumps(found))


def run_probe(device: str, processes: int) -> dict:
    """What `probe` prints. Raises BadInput if it fails."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lib.doctor import probe; probe()"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        env = own_environment() | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)
        }
        started.append(subprocess.Popen([sys.executable, "-c", code, device], env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    end = time.monotonic() + PATIENCE / 4
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=max(end - time.monotonic(), 1)))
    except subprocess.TimeoutExpired:
        raise BadInput("they cannot reach each other") from None
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs):
        if process.returncode:
            raise BadInput((errors.strip().splitlines() or ["no error was printed"])[-1])
    printed = outputs[0][0]
    return json.loads(printed[printed.index("{"):printed.rindex("}") + 1])


def own_environment() -> dict[str, str]:
    """This process's environment, without a launcher's variables."""
    return {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}


def check_links(machine: Machine) -> Check:
    processes = machine.processes if machine.on_gpu else 2
    name = "NCCL" if machine.on_gpu else "gloo"
    try:
        machine.probed = run_probe(machine.device.type, processes)
    except BadInput as error:
        return Check(False, f"{name} failed between {processes} processes: {error}",
                     "NCCL_DEBUG=INFO shows more; try NCCL_P2P_DISABLE=1" if machine.on_gpu else
                     "allow programs to listen on 127.0.0.1")
    speed = machine.probed["bandwidth"]
    if not machine.on_gpu:
        return Check(True, f"gloo works, {speed / GB:.1f} GB/s between two processes")
    if processes == 1:
        return Check(True, "NCCL works; there is one GPU")
    text = (f"NCCL all-reduce at {speed / GB:.0f} GB/s between {processes} GPUs, peer access in "
            f"{machine.probed['peers']} of {machine.probed['pairs']} pairs")
    if speed < SLOW_LINK:
        return Check(False, text, "give the container more shared memory (--ipc=host), or rent "
                                  "GPUs with NVLink")
    return Check(True, text)


# --------------------------------------------------------------------------------------------------
# Steps of the chosen model


def trial(machine: Machine) -> tuple[int, int]:
    """(sequences per process, steps) of the short run: the whole batch and STEPS, or less where
    that would take longer than STEPS_TIME."""
    cfg = machine.cfg
    block_size = machine.model.config.block_size
    rows = max(cfg.total_batch_size // block_size // machine.processes, 1)
    unit = 1 if cfg.micro_batch == "auto" else cfg.micro_batch
    flops = machine.model.flops_per_token() * block_size  # of a sequence
    fitting = STEPS_TIME * REACHED * machine.probed.get("flops", 1e12) / flops
    while rows % (2 * unit) == 0 and rows * STEPS > fitting:
        rows //= 2
    return rows, max(min(STEPS, int(fitting / rows)), 2)


def short_run(machine: Machine, folder: Path, rows: int, steps: int) -> list[str]:
    """The command of the short run, in `folder`."""
    cfg = machine.cfg
    command = [sys.executable]
    if machine.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={machine.processes}"]
    block_size = machine.model.config.block_size
    data = cfg.data if machine.corpus else [random_tokens(folder, block_size, GPT2_VOCABULARY)]
    fixed = {
        "log_dir": folder, "run_name": "run", "max_steps": WARM_UP + steps, "warmup_steps": 1,
        "total_batch_size": rows * block_size * machine.processes, "val_tokens": 4 * block_size,
        "micro_batch": cfg.micro_batch, "eval_every": 0, "hellaswag_every": 0, "sample_every": 0,
        "save_every": 0, "save_minutes": 0,
    }
    words = [f"--{name}={value}" for name, value in fixed.items()]
    compiled = machine.on_gpu if cfg.compile is None else cfg.compile
    words += ["--compile" if compiled else "--no-compile", "--data", *data]
    words += differing(machine.model.config) + differing(cfg, SPEED_FLAGS)
    return [*command, str(machine.script), "--preset=gpt2", *map(str, words)]


def differing(config: Any, names: set[str] | None = None) -> list[str]:
    """The flags of settings, all or those in `names`, that are not at their defaults."""
    words = []
    for setting in fields(config):
        value = getattr(config, setting.name)
        is_flag = setting.metadata.get("help") and (names is None or setting.name in names)
        if not is_flag or value == setting.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{setting.name}" if value else f"--no-{setting.name}")
        else:
            words.append(f"--{setting.name}={value}")
    return words


def random_tokens(folder: Path, block_size: int, vocab_size: int) -> Path:
    """Make a folder of shards of random tokens."""
    data = folder / "random"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 2**22), ("val", 8 * block_size)):
        ids = rng.integers(vocab_size, size=count, dtype=np.uint16)
        np.save(data / f"random_{split}_000000.npy", ids)
    meta = {"tokenizer": f"ids:{vocab_size}", "vocab_size": vocab_size}
    (data / "meta.json").write_text(json.dumps(meta))
    return data


def check_steps(machine: Machine) -> Check:
    check_batch(machine.cfg, machine.model.config.block_size, machine.processes)
    rows, steps = trial(machine)
    place = machine.cfg.log_dir if os.path.isdir(machine.cfg.log_dir) else None
    with tempfile.TemporaryDirectory(prefix="doctor_", dir=place) as name:
        folder = Path(name)
        command = short_run(machine, folder, rows, steps)
        started = time.perf_counter()
        try:
            done = subprocess.run(command, env=own_environment(), capture_output=True, text=True,
                                  timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return Check(False, f"a run of {steps} steps did not end within {PATIENCE:.0f} s",
                         "choose a smaller --size or --block_size")
        seconds = time.perf_counter() - started
        if done.returncode:
            return Check(False, f"a run of {steps} steps failed", reason(done.stderr))
        scalars = read_scalars(folder / "run")
    times = [ms / 1e3 for step, ms in scalars["perf/step_ms"].items() if step >= WARM_UP]
    tokens = rows * machine.model.config.block_size * machine.processes
    machine.speed = tokens / statistics.median(times)
    machine.start_up = seconds - sum(scalars["perf/step_ms"].values()) / 1e3
    return Check(True, steps_text(machine, tokens, scalars))


def reason(errors: str) -> str:
    """The error that a run printed, without torchrun's report."""
    found = re.search(r"error: (.+)", errors)
    if found:
        return found[1]
    return (errors.strip().splitlines() or ["it printed nothing"])[-1]


def steps_text(machine: Machine, tokens: int, scalars: dict) -> str:
    """The line about steps of `tokens` tokens."""
    assert machine.speed
    cfg = machine.cfg
    seconds = STEPS * cfg.total_batch_size / machine.speed
    duration = f"{seconds:.1f} s" if seconds < 120 else hours_and_dollars(seconds, None)
    text = (f"{STEPS} of {cfg.total_batch_size:,} tokens take {duration}, "
            f"{machine.speed:,.0f} tok/s")
    if tokens < cfg.total_batch_size:
        text += f" (measured with {tokens:,} tokens)"
    if not machine.corpus:
        text += ", random tokens of GPT-2's vocabulary"
    memory = scalars.get("perf/memory_gb")
    if memory:
        text += f", {max(memory.values()):.1f} GB per GPU"
    return f"{text}; start-up {machine.start_up:.0f} s"


# --------------------------------------------------------------------------------------------------
# Cost


def check_cost(machine: Machine) -> Check:
    if not machine.speed:
        return Check(False, "unknown without the steps", "fix the line above")
    cfg = machine.cfg
    text = cost(machine, run_tokens(machine))
    if cfg.minutes:
        text = cost(machine, 60 * cfg.minutes * machine.speed)
    parts = [f"this run: {text}"]
    if not machine.corpus and not (cfg.minutes or cfg.max_steps or cfg.tokens_per_param):
        parts[0] += f" (if --data has {DATA_TOKENS / 1e9:g}B tokens)"
    for loss, tokens in README_LOSSES.get((cfg.preset, machine.parameters), ()):
        parts.append(f"README's loss {loss:g}: {cost(machine, tokens)}")
    if not cfg.price_per_hour:
        parts.append("--price_per_hour adds dollars")
    return Check(True, "; ".join(parts))


def run_tokens(machine: Machine) -> float:
    """Tokens of the run that the flags describe."""
    cfg = machine.cfg
    there = machine.corpus.tokens["train"] if machine.corpus else int(DATA_TOKENS)
    steps = steps_of(cfg, there, machine.parameters)
    return steps * batch_size(steps, cfg)


def cost(machine: Machine, tokens: float) -> str:
    assert machine.speed
    seconds = machine.start_up + tokens / machine.speed
    return hours_and_dollars(seconds, machine.cfg.price_per_hour)


CHECKS: list[tuple[str, Callable[[Machine], Check]]] = [
    ("GPU", check_gpu),
    ("driver", check_driver),
    ("torch", check_torch),
    ("precision", check_precision),
    ("memory", check_memory),
    ("disk", check_disk),
    ("shared", check_shared_memory),
    ("compiler", check_compiler),
    ("ports", check_ports),
    ("clock", check_clock),
    ("data", check_data),
    ("links", check_links),
    ("steps", check_steps),
    ("cost", check_cost),
]
