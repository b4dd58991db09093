"""Devices (faked GPUs) and processes: python -m pytest tests/lib/test_devices.py"""

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
    """env(RANK=1, ...) sets only these of torchrun's variables."""
    def put(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
    put()
    return put


# what torch.cuda.get_arch_list() returns for the builds of torch 2.11 to 2.14 for CUDA 13.0
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def pretend(monkeypatch, name="NVIDIA H100 80GB HBM3", capability=(8, 0), count=1):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)


# --------------------------------------------------------------------------------------------------
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
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        # not in the table, though their names are similar
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


@pytest.mark.parametrize("capability, want", [((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                              ((10, 0), torch.bfloat16)])
def test_compute_dtype_is_what_the_hardware_supports(capability, want, monkeypatch):
    pretend(monkeypatch, capability=capability)
    # True for emulation, too
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    gpu = torch.device("cuda")
    assert devices.compute_dtype(gpu) == want
    assert devices.peak_flops(gpu) is not None
    assert devices.peak_flops(gpu, "fp32") is None  # the table is for bf16 and fp16
    for other in ("cpu", "mps"):
        assert devices.compute_dtype(torch.device(other)) == torch.float32


@pytest.mark.parametrize("name", devices.DTYPES)
def test_dtype_chooses(name, monkeypatch):
    pretend(monkeypatch, capability=(8, 0))
    for kind in ("cuda", "cpu", "mps"):
        assert devices.compute_dtype(torch.device(kind), name) == devices.DTYPES[name]
    pretend(monkeypatch, "Tesla T4", capability=(7, 5))
    if name == "bf16":  # only emulated there
        with pytest.raises(BadInput, match="--dtype fp16"):
            devices.compute_dtype(torch.device("cuda"), name)


def test_autocast_is_to_the_dtype_of_the_model():
    model = torch.nn.Linear(2, 2)
    for name, want in (("auto", None), ("fp32", None), ("bf16", torch.bfloat16)):
        model.autocast_dtype = name
        with devices.autocast(model):
            assert torch.is_autocast_enabled("cpu") == (want is not None)
            assert model(torch.ones(1, 2)).dtype == (want or torch.float32)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_cast_is_to_the_dtype_of_autocast(backend):
    torch._dynamo.reset()
    cast = devices.cast
    if backend:
        cast = torch.compile(lambda x: devices.cast(x) + 0, backend=backend, fullgraph=True,
                             dynamic=False)
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(cast(x), x)
        assert cast(x).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(cast(x), x.to(dtype))
                assert cast(x).dtype == dtype
                with torch.autocast("cpu", enabled=False):
                    assert cast(x).dtype == torch.float32


def test_to_device_and_memory_bytes():
    tensor = devices.to_device(np.arange(6).reshape(2, 3), torch.device("cpu"))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.dtype == torch.int64
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
                with pytest.raises(BadInput, match=f"--device {name}"):
                    devices.pick_device(name)


@pytest.mark.parametrize("gpu, capability, remedy", [
    ("Tesla V100-SXM2-16GB", (7, 0), "CUDA 12.6"),
    ("Tesla P100-PCIE-16GB", (6, 0), "CUDA 12.6"),
    ("NVIDIA Thor", (11, 0), "newer CUDA"),
    ("Tesla T4", (7, 5), None),
    ("NVIDIA GeForce RTX 4090", (8, 9), None),
    ("NVIDIA B300", (10, 3), None)])
def test_a_gpu_without_kernels_is_refused(monkeypatch, gpu, capability, remedy):
    pretend(monkeypatch, gpu, capability)
    if remedy is None:
        assert devices.pick_device("auto").type == "cuda"
        return
    with pytest.raises(BadInput, match=f"no kernels for {gpu} .*: install torch .*{remedy}"):
        devices.pick_device("auto")


# --------------------------------------------------------------------------------------------------
# Processes


def test_one_process_alone(env):
    with devices.Processes("cpu") as processes:
        assert (processes.rank, processes.world_size) == (0, 1)
        assert processes.main and not processes.distributed
        assert processes.device == torch.device("cpu")
        # fp32 would round the last number
        assert processes.sum([1, 2.5, 2**53 - 1]) == [1.0, 2.5, 2.0**53 - 1]
        processes.barrier()
        assert not torch.distributed.is_initialized()
        model = torch.nn.Linear(1, 1)
        assert devices.parallel(model, processes) is model


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 6), (1, 6), (5, 6)])
def test_rank_and_world_size_are_torchruns(rank, world, env):
    host = dict(LOCAL_RANK=rank % 2, LOCAL_WORLD_SIZE=min(world, 2))
    env(**TORCHRUN | dict(RANK=rank, WORLD_SIZE=world) | host)
    processes = devices.Processes("cpu")  # not joined before `with`
    assert (processes.rank, processes.world_size) == (rank, world)
    assert processes.main == (rank == 0)
    assert processes.distributed
    assert not torch.distributed.is_initialized()


def test_an_incomplete_environment_is_refused(env):
    """Containers and schedulers set WORLD_SIZE alone; each process would train on its share."""
    env(WORLD_SIZE=2)
    with pytest.raises(BadInput, match="WORLD_SIZE .* RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        devices.Processes("cpu")


def test_an_unknown_address_fails_at_once(env):
    env(**TORCHRUN | dict(MASTER_ADDR="no.such.host.invalid"))
    processes = devices.Processes("cpu")
    with pytest.raises(BadInput, match="no.such.host.invalid:29500"), processes:
        pass


def test_a_process_takes_the_gpu_of_its_local_rank(env, monkeypatch):
    pretend(monkeypatch, count=4)
    second_host = TORCHRUN | dict(RANK=7, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)
    env(**second_host)
    assert devices.Processes("auto").device == torch.device("cuda", 3)
    env(**second_host | dict(LOCAL_WORLD_SIZE=8))
    with pytest.raises(BadInput, match="--nproc_per_node"):
        devices.Processes("auto")
    assert devices.Processes("cpu").device == torch.device("cpu")  # a CPU is shared


class Missing(BadInput):
    """A subclass, as modules of lib/ define."""


@pytest.mark.parametrize(
    "error, known",
    [
        (Missing("no such file"), True),
        (RankError("only here"), False),
        (ValueError("a bug"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_if_rank_0_fails_in_main_first_the_others_fail_too(error, known, env, monkeypatch):
    """They must neither wait forever nor try again."""
    messages = []

    def barrier(*message):
        messages.extend(message)
        return messages[0]

    for rank in (0, 1):
        env(**TORCHRUN | dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2))
        processes = devices.Processes("cpu")
        monkeypatch.setattr(processes, "barrier", barrier)
        with pytest.raises(BaseException) as caught, processes.main_first():
            assert rank == 0
            raise error
        other = Missing if known else BadInput
        assert type(caught.value) is (type(error) if rank == 0 else other)
    assert str(caught.value) == (str(error) if known else "rank 0 has failed")


def test_an_error_of_another_rank_in_main_first_is_printed_by_it(env, monkeypatch):
    env(**TORCHRUN | dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2))
    processes = devices.Processes("cpu")
    monkeypatch.setattr(processes, "barrier", lambda: devices.DONE)
    with pytest.raises(RankError, match="no such file"), processes.main_first():
        raise BadInput("no such file")


def test_an_error_of_nccl_names_its_reason(env, monkeypatch):
    pretend(monkeypatch, count=2)
    env(**TORCHRUN)
    error = torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp\nncclSystemError: System call failed.\n"
        "Last error:\nError while creating shared memory segment (size 9637888)\n")
    with pytest.raises(RankError, match="creating shared memory segment"):
        devices.Processes("cuda").__exit__(type(error), error, None)


def test_a_timeout_of_nccl_does_not_end_the_next_attempt(env, monkeypatch):
    """NCCL's watchdog leaves a key in the store."""
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
    # as building a model on the meta device does: modules that would keep the group
    import torch._dynamo
    total = processes.sum([processes.rank + 1, 0.25, 2**53 - 2 if processes.main else 1])
    # rank 0 may take longer than the timeout of collectives, ten minutes with NCCL
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    if processes.main:
        time.sleep(3)
    assert processes.barrier(b"met" if processes.main else b"not this") == b"met"
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=600), dist.group.WORLD)
    model = torch.nn.Linear(1, 1, bias=False)
    ddp = devices.parallel(model, processes)
    grads = []
    for last in (False, True):
        with devices.gradient_sync(ddp, last):
            ddp(torch.full((1, 1), 1.0 + processes.rank)).sum().backward()
        grads.append(model.weight.grad.item())
    rank = f"{{processes.rank}} of {{processes.world_size}}"
    print(f"{{rank}}: {{total}} {{grads}}\\n", end="", flush=True)
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


# --------------------------------------------------------------------------------------------------
# Compilation


def test_recompilations_are_counted_and_printed():
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
    assert monitor.count == len(lines) == 1
    assert lines[0].startswith("training was recompiled")
    block("validation", 5)
    assert monitor.count == len(lines) == 2
    assert lines[1].startswith("validation was recompiled")
    compiled(torch.ones(6))  # outside of any block
    block("training", 6)
    with pytest.raises(BadInput, match="through"), monitor("training"):
        raise BadInput("errors go through")
    assert monitor.count == 2


# --------------------------------------------------------------------------------------------------
# Micro-batch


class Costs(torch.nn.Module):
    """A model with 1000 bytes of weights, 1000 of gradients, and cost(sequences) of activations."""

    def __init__(self, cost, limit=10**9):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(250))
        self.config = SimpleNamespace(block_size=3)
        self.cost = cost
        self.limit = limit
        self.tried = []
        self.peak = 0

    def forward(self, idx, targets, *packed):
        assert idx.shape == targets.shape == (len(idx), 3)
        assert idx.dtype == torch.int64
        self.tried.append(len(idx))
        used = 2000 + self.cost(len(idx)) + sum(part.numel() for part in packed)
        self.peak = max(self.peak, used)
        if self.peak > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.weight.sum()


def pretend_memory(monkeypatch, model, free, total=10**9, reserved=0, fraction=1.0):
    """Fake a GPU with `free` bytes, used only by `model`; tensors stay on the CPU."""
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
    """Half as much per sequence after the first eight."""
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
def test_auto_on_cuda_takes_the_largest_that_fits(cost, free, want, monkeypatch):
    model = Costs(cost)
    pretend_memory(monkeypatch, model, free)
    assert pick(model) == want
    divisors = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    last = model.tried[-1]  # the first that does not fit, or all
    assert model.tried == divisors[:divisors.index(last) + 1]
    assert last == want == 48 or 2000 + cost(last) > 0.9 * free - 2000
    assert want == 1 or 2000 + cost(want) <= 0.9 * free - 2000
    assert model.weight.grad is None
    assert torch.equal(model.weight, torch.ones(250))


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
        dict(free=4_000, reserved=6_000),  # reserved by this process, so available to it
        dict(free=10**6, total=20_000, fraction=0.5),
        dict(free=10_000, total=40_000, fraction=0.5)
    ])
def test_auto_on_cuda_counts_the_memory_available_to_this_process(memory, monkeypatch):
    model = Costs(thousand_each)
    pretend_memory(monkeypatch, model, **memory)
    assert pick(model) == 4


@pytest.mark.parametrize("limit, want, tried", [(9_000, 6, [1, 2, 3, 4, 6, 8]), (2_500, 1, [1])])
def test_auto_on_cuda_survives_running_out_of_memory(limit, want, tried, monkeypatch):
    model = Costs(thousand_each, limit)
    pretend_memory(monkeypatch, model, free=10**6)
    assert pick(model) == want
    assert model.tried == tried
    assert model.weight.grad is None


@pytest.mark.parametrize("theirs, want", [(3, 3), (16, 8)])
def test_processes_on_cuda_agree_on_what_fits_all(theirs, want, monkeypatch):
    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=theirs)

    model = Costs(thousand_each)
    # 12 would fit in one process; DDP's buckets, as large as the weights, take memory
    pretend_memory(monkeypatch, model, free=18_000)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert pick(model, SimpleNamespace(device=torch.device("cuda"), distributed=True)) == want


@pytest.mark.parametrize("cost, available, want, tried", [
    (thousand_each, 17_500, 12, [1, 2, 3, 4, 6, 8, 12]),
    (thousand_each, 12_500, 6, [1, 2, 3, 4, 6]),  # 8 would need 13,000
    (thousand_each, 9_000, 4, [1, 2, 3, 4]),
    (thousand_each, 8_500, 1, [1]),               # 2 is thought to need 9,000, but needs 7,000
    (thousand_each, 100, 1, [1]),
    (with_a_step, 16_500, 8, [1, 2, 3, 4, 6, 8]),       # 12 is thought to need 17,000
    (with_a_step, 17_500, 16, [1, 2, 3, 4, 6, 8, 12, 16]),
    (lambda sequences: 1000 * sequences**2, 20_000, 3, [1, 2, 3, 4]),  # 4 needs 21,000
])
def test_a_peak_is_only_tried_if_it_is_predicted_to_fit(cost, available, want, tried):
    seen = []

    def peak(sequences):
        seen.append(sequences)
        return 5000 + cost(sequences)

    assert devices.largest_predicted([1, 2, 3, 4, 6, 8, 12, 16], peak, lambda: 3000,
                                     available) == want
    assert seen == tried


def test_processes_of_a_sharded_model_agree_on_each_try(monkeypatch):
    """The process with the least memory decides, and no process has DDP's buckets."""
    def all_reduce(tensor, op):
        if op == torch.distributed.ReduceOp.MAX and tensor < 0:  # what is available, negative
            tensor.clamp_(min=-6_500)

    model = Costs(thousand_each)
    model.unshard = None  # marks a sharded model
    pretend_memory(monkeypatch, model, free=10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2000)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert pick(model, SimpleNamespace(device=torch.device("cuda"), distributed=True)) == 4
    assert model.tried == [1, 2, 3, 4]
    assert model.weight.grad is None


def test_auto_on_a_cpu_is_the_largest_divisor_up_to_8():
    for rows, want in ((1, 1), (2, 2), (8, 8), (9, 3), (11, 1), (12, 6), (64, 8), (35, 7)):
        assert devices.pick_micro_batch(None, "auto", rows, ON_CPU, reserved=[]) == want


def test_a_given_micro_batch_is_not_probed():
    assert devices.pick_micro_batch(None, 16, 48, ON_CUDA, reserved=[]) == 16
