"""The processes and devices of a run: how many, which, what they can do.

One process, or as many as torchrun started, each with a GPU of its own (NCCL), or all on the CPU
(gloo).
"""

import contextlib
import inspect
import os
import pickle
import re
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

from lib.cli import BadInput, RankError, launched

DONE = b"done"
PEAK_FLOPS = {  # dense bf16 with fp32 accumulation, from the data sheets; the first name found as a word in the GPU's
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 155e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}


def peak_flops(device):
    """FLOP/s of bf16 matmuls on `device`, or None where the table does not say: MFU is n/a there,
    never a guess."""
    if device.type != "cuda" or compute_dtype(device) != torch.bfloat16:
        return None
    gpu = torch.cuda.get_device_name(device)
    others = r"(?! (Ti|D|SUPER|Laptop|Max-Q))"  # cousins with fewer cores or lower clocks
    return next(
        (flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b{others}", gpu)),
        None)


def compute_dtype(device):
    """bf16 where the hardware has it. `is_bf16_supported` also says yes to emulation, so ask for
    the capability."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def autocast(device):
    dtype = compute_dtype(device)
    return torch.autocast(device.type,
                          dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def any_shape():
    """For attention whose shapes change from call to call: not by cuDNN, which takes hundredths of
    a second to prepare for each."""
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def cast(x):
    """x cast to the autocast dtype, as a linear layer casts its input and weight; unchanged without
    autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def to_device(array, device):
    """A numpy array -> a tensor on `device`, without waiting for the GPU's queue, as a copy from
    pageable memory would."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(
            device):  # a thread begins with the first GPU, and pinning is for the current one
        return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor):
    """Begin to copy a tensor to the CPU -> a function that waits for the copy, not for what the GPU
    was given afterwards, and returns it as nested lists."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    copied, host = torch.cuda.Event(), tensor.to("cpu", non_blocking=True)  # into pinned memory
    copied.record()

    def wait():
        copied.synchronize()
        return host.tolist()

    return wait


def pick_device(name, local_rank=0, local_world=1):
    """--device -> torch.device. Raises BadInput if this machine has no such device."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise BadInput(
            f"--device {name}: torch {torch.__version__} sees no such device here; use --device cpu"
        )
    if name == "cuda" and local_world > torch.cuda.device_count():
        raise BadInput(
            f"{local_world} processes on {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def peak_memory_gb(device):
    """The most memory that tensors took on a GPU, GB; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated() / 1e9


def memory_bytes(device):
    """The memory of a device, bytes; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def parallel(model, processes):
    """The module to train: averages gradients over the processes (DDP), or `model` itself where
    there is one process.

    Must not outlive the `with` block of `processes`: DDP holds the process group, and may deadlock
    if it is the last to.
    """
    if not processes.distributed:
        return model
    # buffers are constant tables, or what LoadBalancer keeps equal; torch 2.13 renamed the option
    # that leaves them alone
    names = inspect.signature(DDP).parameters
    buffers = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    return DDP(model,
               device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
               gradient_as_bucket_view=True, **buffers)


def gradient_sync(model, last):
    """Context of a forward and backward pass: gradients are exchanged with the last micro-batch
    only; DDP decides that in forward."""
    return contextlib.nullcontext() if last or not isinstance(model, DDP) else model.no_sync()


class Processes:
    """The processes of this run: one, or as many as torchrun started (NCCL on cuda, gloo
    elsewhere), joined by `with`.

    rank, world_size: this process and how many there are. device: this process's. main: whether
    this is rank 0. deterministic: take kernels that add in one order, from the joining on. Raises
    BadInput if the environment of a launcher is not whole (lib/cli.py's `launched`), or there is no
    such device.
    """

    def __init__(self, device_name, deterministic=False):
        env = launched()
        self.distributed, self.store, self.met = env is not None, None, 0
        env = env or {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
        self.rank, self.world_size, self.main = env["rank"], env["world_size"], env["rank"] == 0
        self.device = pick_device(device_name, env["local_rank"], env["local_world_size"])
        self.deterministic = deterministic

    def __enter__(self):
        if self.deterministic:  # before the group is made: NCCL chooses its algorithms then
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            # The default arguments of this module hold the process group of its first import, and
            # building a model may be that. The group's threads would outlive destroy_process_group,
            # and gloo's, freeing a tensor while Python shuts down, abort the process
            # (https://github.com/pytorch/pytorch/issues/190489): import it while there is no group.
            from torch.distributed.nn import functional  # noqa: F401

            # torchrun keeps its store when it restarts the processes: without a prefix they would
            # read dead addresses in it
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            try:
                socket.getaddrinfo(
                    os.environ["MASTER_ADDR"],
                    None)  # an unknown name would be looked up again for half an hour
                base = next(dist.rendezvous("env://"))[0]
                self.store = dist.PrefixStore(attempt, base)
                if self.device.type == "cuda":
                    # what NCCL's watchdog leaves after a timeout, beneath any prefix; it would end
                    # the next attempt, too
                    base.delete_key("exception_dump")
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                        store=self.store, rank=self.rank,
                                        world_size=self.world_size)
            except (RuntimeError, ValueError, OSError) as error:
                raise RankError(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                                f"({str(error).splitlines()[0][:100]}): start with torchrun") from error
        return self

    def __exit__(self, kind, error, trace):
        if self.distributed and kind is None:  # after an error the others may be gone: waiting for them would hang
            dist.destroy_process_group()
        if isinstance(error, dist.DistBackendError) and self.device.type == "cuda":
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise RankError(f"the GPUs no longer reach each other ({reason[:200]}): if another process has ended, its error "
                            "stands above; else NCCL_DEBUG=WARN tells more") from error
        if isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError)
                                                        and "gloo" in str(error)):
            raise BadInput("another process has ended: torchrun names the first one below, "
                           "its error stands above") from error

    def all_reduce(self, tensor):
        """Sum a tensor over all processes, in place; a no-op for one process."""
        if self.distributed:
            dist.all_reduce(tensor)

    def sum(self, values):
        """Sum a list of numbers over all processes, in double precision -> list of float."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.distributed:
            total = total.to(self.device)  # NCCL sums on the GPU only
            dist.all_reduce(total)
        return total.tolist()

    def check_same(self, number, message):
        """Raises RankError with `message` on every process unless all have the same number."""
        if self.sum([number])[0] != number * self.world_size:
            raise RankError(message)

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the block before the others do: what it downloads, they find.
        Where it fails they raise its BadInput, without running the block."""
        if self.main:
            try:
                yield
            except BaseException as error:
                known = isinstance(error, BadInput) and not isinstance(error, RankError)
                with contextlib.suppress(RuntimeError):  # the others may be gone
                    self.barrier(pickle.dumps(error if known else BadInput("rank 0 has failed")))
                raise
            self.barrier(DONE)
            return
        word = self.barrier()
        if word != DONE:
            raise pickle.loads(word)
        try:
            yield
        except BadInput as error:
            raise RankError(str(error)) from error  # rank 0 has not met this

    def barrier(self, word=DONE):
        """Wait until all processes are here -> rank 0's word, bytes. However long rank 0 takes to
        come: it may download or save, and a collective gives up after ten minutes."""
        if self.distributed:
            self.met += 1
            if self.main:
                self.store.set(f"met {self.met}", word)
            self.store.wait([f"met {self.met}"], timedelta(days=1))
            word = self.store.get(f"met {self.met}")
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        return word


def pick_micro_batch(model, asked, rows, processes, reserved, packed=lambda idx: ()):
    """--micro_batch -> sequences per forward pass, a divisor of `rows` (the sequences per process
    and step).

    auto on cuda: run more and more sequences forward and backward until a tenth of the memory and
    room for tensors like those `reserved`, the optimizer's state, are no longer left. The probe
    runs the uncompiled model, which needs more than the compiled one, so the choice is safe. auto
    elsewhere: up to 8 sequences. packed: ids -> what else the model gets, a tuple: masks take
    memory, too.
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
        with autocast(device):
            model(idx, idx, *packed(idx)).backward()
        return torch.cuda.max_memory_allocated()

    free, total = torch.cuda.mem_get_info()
    free = min(free + torch.cuda.memory_reserved(),
               torch.cuda.get_per_process_memory_fraction() * total)
    reserved = [*reserved, *(model.parameters() if processes.distributed else ())]  # DDP's buckets
    room = 0.9 * free - sum(t.numel() * t.element_size() for t in reserved)
    choice = 1
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        for n in divisors:
            if peak(n) > room:
                break
            choice = n
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what is logged is the training's
    choice = torch.tensor(choice, device=device)
    if processes.distributed:
        dist.all_reduce(choice, op=dist.ReduceOp.MIN)
    return int(choice)
