"""Devices that are pretended, processes that are not there, and two that are: python -m pytest
tests/lib/test_devices.py"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT

from lib import devices, logger
from lib.cli import BadInput, RankError

TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}


@pytest.fixture
def env(monkeypatch):
    """env(RANK=1, ...) sets what torchrun sets; these and no others."""
    def put(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
    put()
    return put


def pretend(monkeypatch, name="NVIDIA H100 80GB HBM3", capability=(8, 0), count=1):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


# ----------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize(
    "gpu, want",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA GH200 480GB", 989e12),
        # not in the table: cousins of cards that are, and names that merely begin alike
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GB200", None)
    ])
def test_peak_flops(gpu, want, monkeypatch):
    pretend(monkeypatch, gpu)
    assert devices.peak_flops(torch.device("cuda")) == want
    assert devices.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("capability, want", [((7, 5), torch.float32), ((8, 0), torch.bfloat16),
                                              ((10, 0), torch.bfloat16)])
def test_compute_dtype_is_what_the_hardware_has(capability, want, monkeypatch):
    pretend(monkeypatch, capability=capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda *_: True)  # says yes to emulation, too
    assert devices.compute_dtype(torch.device("cuda")) == want
    assert (devices.peak_flops(torch.device("cuda"))
            is None) == (want == torch.float32)  # the table is of bf16
    for other in ("cpu", "mps"):
        assert devices.compute_dtype(torch.device(other)) == torch.float32
    with devices.autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_cast_is_to_the_dtype_of_autocast(backend):
    torch._dynamo.reset()
    cast = (torch.compile(lambda x: devices.cast(x) + 0, backend=backend, fullgraph=True,
                          dynamic=False) if backend else devices.cast)
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(cast(x), x) and cast(x).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(cast(x), x.to(dtype)) and cast(x).dtype == dtype
                with torch.autocast("cpu", enabled=False):
                    assert cast(x).dtype == torch.float32


def test_to_device_and_memory_bytes():
    tensor = devices.to_device(np.arange(6).reshape(2, 3), torch.device("cpu"))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]] and tensor.dtype == torch.int64
    assert devices.memory_bytes(torch.device("cpu")) > 2**28


def test_auto_is_cuda_then_mps_then_cpu(monkeypatch):
    for count, mps, want in ((2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        pretend(monkeypatch, count=count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert devices.pick_device("auto").type == want
        assert devices.pick_device("cpu") == torch.device("cpu")
        for name, there in (("cuda", count > 0), ("mps", mps)):
            if there:
                assert devices.pick_device(name).type == name
            else:
                with pytest.raises(
                        BadInput,
                        match=f"--device {name}: torch .* sees no such device here; use --device cpu"
                ):
                    devices.pick_device(name)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def test_one_process_alone(env):
    with devices.Processes("cpu") as processes:
        assert (processes.rank, processes.world_size, processes.main,
                processes.distributed) == (0, 1, True, False)
        assert processes.device == torch.device("cpu")
        assert processes.sum([1, 2.5, 2**53 - 1]) == [1.0, 2.5,
                                                      2.0**53 - 1]  # fp32 would round the last
        processes.barrier()
        assert not torch.distributed.is_initialized()
        model = torch.nn.Linear(1, 1)
        assert devices.parallel(model, processes) is model


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 6), (1, 6), (5, 6)])
def test_what_torchrun_says_is_taken(rank, world, env):
    env(**TORCHRUN
        | dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % 2, LOCAL_WORLD_SIZE=min(world, 2)))
    processes = devices.Processes("cpu")  # joined by `with` alone
    assert (processes.rank, processes.world_size, processes.main,
            processes.distributed) == (rank, world, rank == 0, True)
    assert not torch.distributed.is_initialized()


def test_half_of_a_launcher_is_refused(env):
    env(WORLD_SIZE=2)  # as containers and schedulers set it: would train on half of each batch
    with pytest.raises(
            BadInput,
            match="WORLD_SIZE set in the environment, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"
    ):
        devices.Processes("cpu")


def test_an_address_that_nobody_knows_is_said_at_once(env):
    env(**TORCHRUN | dict(MASTER_ADDR="no.such.host.invalid"))
    with pytest.raises(BadInput,
                       match="cannot meet at no.such.host.invalid:29500"), devices.Processes("cpu"):
        pass


def test_a_process_takes_the_gpu_of_its_place_on_its_own_host(env, monkeypatch):
    pretend(monkeypatch, count=4)
    second_host = TORCHRUN | dict(RANK=7, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)
    env(**second_host)
    assert devices.Processes("auto").device == torch.device("cuda", 3)
    env(**second_host | dict(LOCAL_WORLD_SIZE=8))
    with pytest.raises(BadInput, match="8 processes on 4 GPUs: lower --nproc_per_node"):
        devices.Processes("auto")
    assert devices.Processes("cpu").device == torch.device("cpu")  # a CPU is shared


class Missing(BadInput):
    """As a library module has its own."""


@pytest.mark.parametrize(
    "error, known",
    [
        (Missing("no such file"), True),
        (RankError("only here"), False),
        (ValueError("a bug"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_where_rank_0_goes_first_and_fails_the_others_fail_alike(error, known, env, monkeypatch):
    """They must not wait for ever, nor try again."""
    words = []
    for rank in (0, 1):
        env(**TORCHRUN | dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2))
        processes = devices.Processes("cpu")
        monkeypatch.setattr(processes, "barrier", lambda *word: words.extend(word) or words[0])
        with pytest.raises(BaseException) as caught, processes.main_first():
            assert rank == 0
            raise error
        other = Missing if known else BadInput
        assert type(caught.value) is (type(error) if rank == 0 else other)
    assert str(caught.value) == (str(error) if known else "rank 0 has failed")


def test_what_rank_0_has_not_met_is_said_by_the_one_that_has(env, monkeypatch):
    env(**TORCHRUN | dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2))
    processes = devices.Processes("cpu")
    monkeypatch.setattr(processes, "barrier", lambda: devices.DONE)
    with pytest.raises(RankError, match="no such file"), processes.main_first():
        raise BadInput("no such file")


def test_an_error_of_nccl_is_said_with_its_reason(env, monkeypatch):
    pretend(monkeypatch, count=2)
    env(**TORCHRUN)
    error = torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp\nncclSystemError: System call failed.\n"
                                               "Last error:\nError while creating shared memory segment (size 9637888)\n")
    with pytest.raises(RankError,
                       match=r"\(Error while creating shared memory segment \(size 9637888\)\)"):
        devices.Processes("cuda").__exit__(type(error), error, None)


def test_what_a_watchdog_of_nccl_left_does_not_end_the_next_attempt(env, monkeypatch):
    pretend(monkeypatch, count=2)
    env(**TORCHRUN, TORCHELASTIC_RESTART_COUNT=1)
    store = torch.distributed.HashStore()
    store.set("exception_dump", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 1)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: None)
    devices.Processes("cuda").__enter__()
    assert not store.check(["exception_dump"])


TWO = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import time
import weakref
from datetime import timedelta
import torch
import torch.distributed as dist
from lib import devices, logger
with devices.Processes("cpu") as processes:
    group = weakref.ref(dist.group.WORLD)
    import torch._dynamo  # as building a model on the meta device does; it brings modules that would keep the group
    total = processes.sum([processes.rank + 1, 0.25, 2**53 - 2 if processes.main else 1])
    # as ten minutes are for NCCL: rank 0 may take longer than a collective waits
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    if processes.main:
        time.sleep(3)
    assert processes.barrier(b"met" if processes.main else b"not this") == b"met"
    model = torch.nn.Linear(1, 1, bias=False)
    ddp, grads = devices.parallel(model, processes), []
    for last in (False, True):
        with devices.gradient_sync(ddp, last):
            ddp(torch.full((1, 1), 1.0 + processes.rank)).sum().backward()
        grads.append(model.weight.grad.item())
    print(f"{{processes.rank}} of {{processes.world_size}}: {{total}} {{grads}}\\n", end="", flush=True)
    del ddp
assert not dist.is_initialized() and group() is None
"""


def test_two_processes_sum_and_exchange_gradients_with_the_last_micro_batch(launch, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    result = launch(tmp_path / "two.py", processes=2)
    assert result.returncode == 0, result.stderr
    total = [3.0, 0.5, 2.0**53 - 1]
    assert sorted(filter(None, result.stdout.splitlines())) == [
        f"0 of 2: {total} [1.0, 3.0]", f"1 of 2: {total} [2.0, 3.0]"
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


def test_recompilations_are_counted_and_said():
    torch._dynamo.reset()
    lines = []
    monitor = logger.RecompileMonitor(lines.append)
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

    def block(name, size):
        with monitor(name):
            assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))

    for _ in range(3):
        block("training", 2)
    block("validation", 3)  # another graph, but the first here
    assert lines == [] and monitor.count == 0
    block("training", 4)
    block("training", 4)
    block("validation", 2)
    assert [line.partition(",")[0]
            for line in lines] == ["training was recompiled"] and monitor.count == 1
    block("validation", 5)
    assert [line.partition(",")[0]
            for line in lines[1:]] == ["validation was recompiled"] and monitor.count == 2
    compiled(torch.ones(6))  # outside of any block
    block("training", 6)
    with pytest.raises(BadInput, match="through"), monitor("training"):
        raise BadInput("errors go through")
    assert monitor.count == 2


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batch


class Costs(torch.nn.Module):
    """1000 bytes of weights; `sequences` forward and backward take another 1000 of gradients and
    cost(sequences)."""

    def __init__(self, cost, limit=10**9):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(
            torch.ones(250)), SimpleNamespace(block_size=3)
        self.cost, self.limit, self.tried, self.peak = cost, limit, [], 0

    def forward(self, idx, targets, *packed):
        assert idx.shape == targets.shape == (len(idx), 3) and idx.dtype == torch.int64
        self.tried.append(len(idx))
        self.peak = max(self.peak,
                        2000 + self.cost(len(idx)) + sum(part.numel() for part in packed))
        if self.peak > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.weight.sum()


def pretend_memory(monkeypatch, model, free, total=10**9, reserved=0, fraction=1.0):
    """A GPU with so many bytes, on which `model` is all that takes any: its tensors stay on the
    CPU."""
    pretend(monkeypatch, capability=(7, 5))
    for name, value in (("mem_get_info", (free, total)), ("memory_reserved", reserved),
                        ("get_per_process_memory_fraction", fraction), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: model.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: setattr(model, "peak", 0))

    def on_cpu(make):
        return lambda *args, device=None, **others: make(*args, **others)

    for name in ("zeros", "tensor"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))


def thousand_each(sequences):
    return 1000 * sequences


def with_a_step(sequences):
    """Half as much for what comes after the first eight."""
    return 1000 * min(sequences, 8) + 500 * max(sequences - 8, 0)


ON_CUDA = SimpleNamespace(device=torch.device("cuda"), distributed=False)
ON_CPU = SimpleNamespace(device=torch.device("cpu"), distributed=False)


def pick(model, processes=ON_CUDA):
    return devices.pick_micro_batch(model, "auto", 48, processes, reserved=[torch.empty(500)])


@pytest.mark.parametrize(
    "cost, free, want",
    [  # of 48 rows; a tenth of `free` and the 2000 reserved stay free
        (thousand_each, 58_000, 48), (thousand_each, 57_000, 24), (thousand_each, 18_000, 12),
        (thousand_each, 17_000, 8), (thousand_each, 6_000, 1), (thousand_each, 100, 1),
        (with_a_step, 36_000, 48)
    ])
def test_auto_on_cuda_takes_as_many_sequences_as_fit(cost, free, want, monkeypatch):
    model = Costs(cost)
    pretend_memory(monkeypatch, model, free)
    assert pick(model) == want
    divisors = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert model.tried[:-1] == divisors[:divisors.index(
        model.tried[-1])]  # up to the first that leaves too little
    assert model.tried[-1] == want == 48 or 2000 + cost(model.tried[-1]) > 0.9 * free - 2000
    assert want == 1 or 2000 + cost(want) <= 0.9 * free - 2000
    assert model.weight.grad is None and torch.equal(model.weight, torch.ones(250))


def test_auto_on_cuda_counts_what_packed_rows_need(monkeypatch):
    for packed, want in (((), 8), ((torch.empty(5000),), 6)):
        model = Costs(thousand_each)
        pretend_memory(monkeypatch, model, free=17_000)
        assert devices.pick_micro_batch(model, "auto", 48, ON_CUDA, [torch.empty(500)],
                                        lambda idx, packed=packed: packed) == want


@pytest.mark.parametrize(
    "memory",
    [
        dict(free=10_000),
        dict(free=4_000, reserved=6_000),  # what this process has reserved is its own
        dict(free=10**6, total=20_000, fraction=0.5),
        dict(free=10_000, total=40_000, fraction=0.5)
    ])
def test_auto_on_cuda_counts_the_memory_that_this_process_may_have(memory, monkeypatch):
    model = Costs(thousand_each)
    pretend_memory(monkeypatch, model, **memory)
    assert pick(model) == 4


@pytest.mark.parametrize("limit, want, tried", [(9_000, 6, [1, 2, 3, 4, 6, 8]), (2_500, 1, [1])])
def test_auto_on_cuda_steps_back_from_what_does_not_fit_after_all(limit, want, tried, monkeypatch):
    model = Costs(thousand_each, limit)
    pretend_memory(monkeypatch, model, free=10**6)
    assert pick(model) == want and model.tried == tried and model.weight.grad is None


@pytest.mark.parametrize("theirs, want", [(3, 3), (16, 8)])
def test_processes_on_cuda_agree_on_what_fits_all(theirs, want, monkeypatch):
    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=theirs)

    model = Costs(thousand_each)
    pretend_memory(
        monkeypatch, model,
        free=18_000)  # alone 12 would fit; DDP's buckets, as large as the weights, take room
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert pick(model, SimpleNamespace(device=torch.device("cuda"), distributed=True)) == want


def test_auto_on_a_cpu_is_the_largest_divisor_up_to_8():
    for rows, want in ((1, 1), (2, 2), (8, 8), (9, 3), (11, 1), (12, 6), (64, 8), (35, 7)):
        assert devices.pick_micro_batch(None, "auto", rows, ON_CPU, reserved=[]) == want


def test_a_micro_batch_that_was_asked_for_is_taken_as_it_is():
    assert devices.pick_micro_batch(None, 16, 48, ON_CUDA,
                                    reserved=[]) == 16  # nothing is tried out
