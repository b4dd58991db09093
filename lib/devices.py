"""The processes and devices of a run, and what the devices support.

A run is one process, or those that torchrun started: each on its own GPU (NCCL), or all on the CPU
(gloo).
"""

import contextlib
import inspect
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

from lib import kernels, nodes
from lib.cli import BadInput, RankError, flag, launched

DONE = b"done"
# Dense bf16 or fp16 with fp32 accumulation, from the data sheets. The first name found as a word in
# the GPU's name counts.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "V100-SXM2": 125e12, "V100-PCIE": 112e12, "T4": 65e12,  # fp16 only
}
VARIANTS = r"(?! (Ti|D|SUPER|Laptop|Max-Q))"  # GPUs of the same name, other cores or clocks
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TORCH_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


# --------------------------------------------------------------------------------------------------
# Devices and precision


def peak_flops(device: torch.device, dtype: str = "auto") -> float | None:
    """Peak FLOP/s of matmuls in bf16 or fp16; None if unknown, and MFU is then n/a instead of a
    guess. dtype: as in `compute_dtype`."""
    if device.type != "cuda" or compute_dtype(device, dtype) == torch.float32:
        return None
    gpu = torch.cuda.get_device_name(device)
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b{VARIANTS}", gpu):
            return flops
    return None


def dtype_flag(more: str = "") -> Any:
    """The flag --dtype of scripts that run models. more: added to the help text."""
    return flag("auto", "dtype of matmuls; auto: bf16 on NVIDIA GPUs that have it, fp16 on older "
                        f"ones, fp32 on other devices{more}",
                choices=lambda: ("auto", *DTYPES), aliases=TORCH_NAMES)


def compute_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """The dtype of matmuls on a device. dtype: a choice of --dtype.

    auto: on CUDA bf16 from compute capability 8.0 on, fp16 below; fp32 on other devices. Raises
    BadInput for bf16 on a GPU that only emulates it, which is slower than fp32.
    """
    # torch's `is_bf16_supported` also returns True for emulation, hence the compute capability
    on_cuda = device.type == "cuda"
    has_bf16 = not on_cuda or torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "bf16" and not has_bf16:
        raise BadInput(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16 (it "
                       "needs compute capability 8.0 or newer): give --dtype fp16")
    if dtype != "auto":
        return DTYPES[dtype]
    if not on_cuda:
        return torch.float32
    return torch.bfloat16 if has_bf16 else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of a model's weights; the CPU if it has none."""
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The dtype of a model's matmuls. Its attribute `autocast_dtype` is a choice of --dtype."""
    return compute_dtype(device_of(model), getattr(model, "autocast_dtype", "auto"))


def autocast(model: torch.nn.Module) -> AbstractContextManager:
    """Context of a model's forward passes: matmuls in `dtype_of(model)`."""
    dtype = dtype_of(model)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_of(model).type, dtype=dtype)


def any_shape() -> AbstractContextManager:
    """Context for attention whose shapes vary between calls: disables cuDNN, which takes tens of
    milliseconds to prepare for each new shape."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not kernels.without("flash"):
        backends.append(SDPBackend.FLASH_ATTENTION)
    return sdpa_kernel(backends)


def cast(x: torch.Tensor) -> torch.Tensor:
    """x cast to the autocast dtype, as linear layers do; unchanged without autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a numpy array to `device` without waiting for the GPU's queue."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # in a new thread, the current GPU, for which memory is pinned, is the first
    with torch.cuda.device(device):
        return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> Callable[[], Any]:
    """Start copying a tensor to the CPU -> a function that returns it as nested lists.

    The function waits for the copy, not for GPU work that was queued afterwards.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = tensor.to("cpu", non_blocking=True)  # in pinned memory
    copied = torch.cuda.Event()
    copied.record()

    def wait():
        copied.synchronize()
        return host.tolist()

    return wait


def pick_device(name: str, local_rank: int = 0, local_world: int = 1) -> torch.device:
    """Resolve --device. Raises BadInput if this machine has no such device, or torch no kernels for
    its GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available.get(name, True):
        raise BadInput(f"--device {name}: torch {torch.__version__} sees no such device here; "
                       "use --device cpu")
    if name != "cuda":
        return torch.device(name)
    if local_world > torch.cuda.device_count():
        raise BadInput(f"{local_world} processes on {torch.cuda.device_count()} GPUs: "
                       "lower --nproc_per_node")
    device = torch.device(name, local_rank)
    check_architecture(device)
    return device


def check_architecture(device: torch.device) -> None:
    """Raise BadInput if this build of torch has no kernels for a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    version = 10 * major + minor
    built_for = torch.cuda.get_arch_list()  # such as sm_75, compute_120
    if not built_for or any(_runs_on(version, name) for name in built_for):
        return
    remedy = "built for a newer CUDA"
    if version < 75:  # torch 2.15 has no build for CUDA 12 anymore
        remedy = "2.11 to 2.14 built for CUDA 12.6"
    gpu = torch.cuda.get_device_name(device)
    raise BadInput(f"torch {torch.__version__} has no kernels for {gpu} (compute capability "
                   f"{major}.{minor}): install torch {remedy}, or give --device cpu")


def _runs_on(version, name):
    """Whether kernels compiled for `name` run on a GPU of compute capability version / 10.

    sm_*: machine code, for GPUs of the same major version. compute_*: PTX, which the driver
    compiles for any newer GPU.
    """
    kind, _, number = name.partition("_")
    compiled = int(number.rstrip("af") or 0)
    if kind == "sm":
        return compiled // 10 == version // 10 and compiled <= version
    return compiled <= version


def device_name(device: torch.device) -> str:
    """The name of a GPU; the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak GPU memory allocated by tensors, in GB; None on other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated() / 1e9


def memory_bytes(device: torch.device) -> int | None:
    """The memory of a device, bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


# --------------------------------------------------------------------------------------------------
# Processes


def parallel(model: Any, processes: "Processes") -> torch.nn.Module:
    """The module to train: `model` in DDP, which averages gradients over processes; with a single
    process, or if it is sharded, `model` itself.

    It must not outlive the `with` block of `processes`: DDP refers to the process group, and may
    deadlock if it is the last to release it.
    """
    if is_sharded(model):
        model.reshard()  # after an evaluation, the weights outside blocks are still gathered
        return model
    if not processes.distributed:
        return model
    known = inspect.signature(DDP).parameters
    # Buffers are constant tables, or kept equal by LoadBalancer: do not synchronize them. torch
    # 2.13 renamed the option.
    renamed = "forward_sync_buffers"
    options: dict[str, Any] = {renamed if renamed in known else "broadcast_buffers": False}
    if "batched_grad_copy" in known:  # since torch 2.13: one copy per bucket, not per parameter
        options["batched_grad_copy"] = True
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)


def is_sharded(model: Any) -> bool:
    """Whether FSDP has sharded a model (lib/parallel.py)."""
    return hasattr(model, "unshard")


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is sharded: a DTensor, whose class takes a second to import."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> torch.Tensor:
    """This process's rows of a sharded tensor, the same memory; other tensors as they are."""
    return tensor.to_local() if is_shard(tensor) else tensor


def gradient_sync(model: torch.nn.Module, last: bool) -> AbstractContextManager:
    """Context of a micro-batch's forward and backward: only the last one exchanges gradients, or
    each one if the model is sharded, as whole gradients would take memory.

    It includes the forward pass, where DDP decides this.
    """
    if last or not isinstance(model, DDP):
        return contextlib.nullcontext()
    return model.no_sync()


class Processes:
    """The processes of this run, joined by `with`: one, or those that torchrun started.

    rank: of this process. world_size: number of processes. device: of this process. main: whether
    this is rank 0. deterministic: use kernels that add in a fixed order, once joined. Raises
    BadInput if the launcher's environment is incomplete (lib/cli.py's `launched`) or the device is
    missing.
    """

    def __init__(self, device_name: str, deterministic: bool = False):
        env = launched()
        self.distributed = env is not None
        env = env or {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
        self.rank = env["rank"]
        self.world_size = env["world_size"]
        self.several_nodes = self.world_size > env["local_world_size"]
        self.main = self.rank == 0
        self.device = pick_device(device_name, env["local_rank"], env["local_world_size"])
        self.deterministic = deterministic
        self.store: Any = None
        self.barriers = 0  # passed so far

    def __enter__(self) -> "Processes":
        if self.deterministic:  # before the group exists: NCCL chooses its algorithms then
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
            torch.use_deterministic_algorithms(True)
        kernels.choose_attention()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            self._join()
        return self

    def _join(self) -> None:
        # This module's default arguments keep the process group that exists when it is first
        # imported, and building a model may import it. The group's threads would then outlive
        # destroy_process_group, and gloo's abort the process when they free a tensor at shutdown
        # (https://github.com/pytorch/pytorch/issues/190489). So import it before there is a group.
        from torch.distributed.nn import functional  # noqa: F401

        # torchrun keeps its store when it restarts the processes; without a prefix they would read
        # addresses of dead processes
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        on_gpu = self.device.type == "cuda"
        try:
            base = nodes.connect()
            self.store = nodes.ready() if self.several_nodes else dist.PrefixStore(attempt, base)
            if on_gpu:
                # left by NCCL's watchdog after a timeout, outside any prefix; it would end this
                # attempt, too
                base.delete_key("exception_dump")
            limit = timedelta(seconds=nodes.LIMIT) if self.several_nodes else None
            dist.init_process_group("nccl" if on_gpu else "gloo", store=self.store, rank=self.rank,
                                    world_size=self.world_size, timeout=limit)
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0][:100]
            remedy = nodes.REMEDY if self.several_nodes else "start with torchrun"
            raise RankError(f"the processes cannot meet at {nodes.place()} ({reason}): {remedy}"
                            ) from error

    def __exit__(self, kind, error, trace) -> None:
        if dist.is_initialized() and kind is None:  # else this would wait for dead processes
            dist.destroy_process_group()
        is_backend = isinstance(error, dist.DistBackendError)
        if is_backend and self.device.type == "cuda":
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise RankError(f"the GPUs no longer reach each other ({reason[:200]}): if another "
                            "process has ended, fix its error, printed above; otherwise set "
                            "NCCL_DEBUG=WARN to learn more") from error
        store_is_gone = isinstance(error, (dist.DistStoreError, dist.DistNetworkError))
        in_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if is_backend or store_is_gone or in_gloo:
            raise BadInput("another process has ended: fix its error, printed above or on its "
                           "node; torchrun names the first one to fail below") from error

    def mesh(self) -> Any:
        """The device mesh of all processes. A single process forms a group of its own."""
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            from torch.distributed.nn import functional  # noqa: F401 (see _join)

            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (self.world_size,))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place; a no-op for one process."""
        if self.distributed:
            dist.all_reduce(tensor)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum a list of numbers over all processes, in double precision."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.distributed:
            total = total.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(total)
        return total.tolist()

    def check_same(self, number: float, message: str) -> None:
        """Raises RankError with `message` on every process unless all have the same number."""
        if self.sum([number])[0] != number * self.world_size:
            raise RankError(message)

    def check_same_text(self, text: str, message: str) -> None:
        """Raises RankError with `message` on every process unless all have the same text."""
        self.check_same(zlib.crc32(text.encode()), message)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on the CPU. On other ranks `tensor` only needs its shape and dtype."""
        if self.main:
            dist.broadcast(tensor.to(self.device).contiguous(), 0)
            return tensor
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        dist.broadcast(received, 0)
        return received.cpu()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, so that the other ranks find the files it downloads.

        If it fails there, the others raise its BadInput without running the block.
        """
        if self.main:
            try:
                yield
            except BaseException as error:
                known = isinstance(error, BadInput) and not isinstance(error, RankError)
                shared = error if known else BadInput("rank 0 has failed")
                with contextlib.suppress(RuntimeError):  # the others may be gone
                    self.barrier(pickle.dumps(shared))
                raise
            self.barrier(DONE)
            return
        message = self.barrier()
        if message != DONE:
            raise pickle.loads(message)
        try:
            yield
        except BadInput as error:
            raise RankError(str(error)) from error  # rank 0 did not have this error

    def barrier(self, message: bytes = DONE) -> bytes:
        """Wait for all processes -> rank 0's message.

        Rank 0 may take long to download and save. Collectives would time out after ten minutes;
        this waits for a day.
        """
        if not self.distributed:
            return message
        self.barriers += 1
        key = f"barrier {self.barriers}"
        if self.main:
            self.store.set(key, message)
        self.store.wait([key], timedelta(days=1))
        message = self.store.get(key)
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        return message


# --------------------------------------------------------------------------------------------------
# Micro-batch


def pick_micro_batch(model: Any, asked: Any, rows: int, processes: Processes,
                     reserved: Iterable[torch.Tensor],
                     packed: Callable[[torch.Tensor], tuple] = lambda idx: ()) -> int:
    """Resolve --micro_batch -> sequences per forward pass; auto: a divisor of `rows`.

    On a GPU, auto is the largest that leaves a tenth of the memory free; elsewhere the largest up
    to 8. The GPU is probed with the uncompiled model, which needs more memory than the compiled
    one. rows: sequences per process and step. reserved: tensors with the shapes of the optimizer's
    state, which is allocated later. packed: ids -> more arguments of the model, whose masks take
    memory, too.

    If the model is sharded, all processes take part in each pass, so none may run out of memory
    alone: see `largest_predicted`.
    """
    if asked != "auto":
        return asked
    device = processes.device
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if device.type != "cuda":
        return max(n for n in divisors if n <= 8)

    def peak(sequences):
        idx = torch.zeros(sequences, model.config.block_size, dtype=torch.long, device=device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with autocast(model):
            model(idx, idx, *packed(idx)).backward()
        return torch.cuda.max_memory_allocated()

    reserved = [local(tensor) for tensor in reserved]
    if processes.distributed and not is_sharded(model):
        reserved += model.parameters()  # DDP's buckets
    available = 0.9 * _available_bytes() - sum(t.numel() * t.element_size() for t in reserved)
    largest = 1
    if is_sharded(model):
        # between passes, weights and gradients are in memory
        largest = largest_predicted(divisors, lambda n: _most(peak(n), device),
                                    lambda: _most(torch.cuda.memory_allocated(), device),
                                    -_most(-available, device))
    else:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            for n in divisors:
                if peak(n) > available:
                    break
                largest = n
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # the log shows the peak of training
    choice = torch.tensor(largest, device=device)
    if processes.distributed:
        dist.all_reduce(choice, op=dist.ReduceOp.MIN)
    return int(choice)


def largest_predicted(numbers: list[int], peak: Callable[[int], float], base: Callable[[], float],
                      available: float) -> int:
    """The largest of `numbers`, in ascending order, whose `peak` is at most `available`; at least
    the first.

    A number is only tried if the line through the last two peaks predicts that it fits. base: the
    peak at 0, read after the first try.
    """
    largest, *others = numbers
    last = (largest, peak(largest))
    before = (0, base())
    for n in others:
        slope = (last[1] - before[1]) / (last[0] - before[0])
        predicted = last[1] + slope * (n - last[0])
        if max(predicted, last[1]) > available:
            break
        before = last
        last = (n, peak(n))
        if last[1] <= available:
            largest = n
    return largest


def _most(number: float, device: torch.device) -> float:
    """The largest of all processes' numbers."""
    most = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def _available_bytes() -> float:
    """GPU memory that this process can use, including what it has reserved."""
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total
    return min(free + torch.cuda.memory_reserved(), limit)
