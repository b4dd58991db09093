"""devices.py with GPUs that are pretended and processes that are not there: python -m pytest tests/test_devices.py"""

import os
from types import SimpleNamespace

import pytest
import torch

from lib import devices
from lib.cli import BadInput

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def env(monkeypatch):
    """env(RANK=1, ...) sets what torchrun sets, and nothing else."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def pretend(monkeypatch, name="NVIDIA H100 80GB HBM3", capability=(8, 0), count=1):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


# ----------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("gpu, want", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
                                       ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
                                       ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12),
                                       ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA GeForce GTX 1080", None),
                                       ("NVIDIA RTX A6000", 155e12), ("NVIDIA GH200 480GB", 989e12),
                                       # cousins of cards in the table, and names that merely begin alike
                                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
                                       ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA RTX A4000", None),
                                       ("NVIDIA RTX A1000", None), ("NVIDIA GB200", None)])
def test_peak_flops(gpu, want, monkeypatch):
    pretend(monkeypatch, gpu)
    assert devices.peak_flops(torch.device("cuda")) == want
    assert devices.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("capability, want", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((8, 6), torch.bfloat16),
                                              ((9, 0), torch.bfloat16), ((10, 0), torch.bfloat16)])
def test_compute_dtype_is_what_the_hardware_has(capability, want, monkeypatch):
    pretend(monkeypatch, capability=capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # says yes to emulation, too
    assert devices.compute_dtype(torch.device("cuda")) == want
    assert (devices.peak_flops(torch.device("cuda")) is None) == (want == torch.float32)  # the table is of bf16
    for other in ("cpu", "mps"):
        assert devices.compute_dtype(torch.device(other)) == torch.float32


def test_autocast_on_a_cpu_changes_nothing():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with devices.autocast(torch.device("cpu")):
        assert (a @ b).dtype == torch.float32 and torch.equal(a @ b, torch.matmul(a, b))
        assert not torch.is_autocast_enabled("cpu")


def test_cast_is_to_the_type_of_autocast():
    x, low = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.bfloat16)
    assert devices.cast(x) is x and devices.cast(low) is low
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(devices.cast(x), x.bfloat16()) and devices.cast(x).dtype == torch.bfloat16
        assert devices.cast(low) is low
        with torch.autocast("cpu", enabled=False):
            assert devices.cast(x) is x
    with torch.autocast("cpu", torch.float16):
        assert devices.cast(x).dtype == devices.cast(low).dtype == torch.float16


def test_cast_compiled():
    torch._dynamo.reset()
    compiled, x = torch.compile(lambda x: devices.cast(x) + 1, backend="aot_eager", fullgraph=True, dynamic=False), torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(compiled(x), x + 1) and compiled(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), x.bfloat16() + 1) and compiled(x).dtype == torch.bfloat16


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
                with pytest.raises(BadInput, match=f"--device {name}: torch .* sees no such device here; use --device cpu"):
                    devices.pick_device(name)


def test_more_processes_than_gpus_is_said(monkeypatch):
    pretend(monkeypatch, count=2)
    with pytest.raises(BadInput, match="4 processes on 2 GPUs: lower --nproc_per_node"):
        devices.pick_device("auto", local_rank=0, local_world=4)
    assert devices.pick_device("cuda", local_rank=1, local_world=2) == torch.device("cuda", 1)
    assert devices.pick_device("cpu", local_rank=3, local_world=4) == torch.device("cpu")  # a CPU is shared


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def test_one_process_alone(env):
    env()
    with devices.Processes("cpu") as processes:
        assert (processes.rank, processes.world_size, processes.main, processes.distributed) == (0, 1, True, False)
        assert processes.device == torch.device("cpu")
        assert processes.sum([1, 2.5, 2**53 - 1]) == [1.0, 2.5, 2.0**53 - 1]  # fp32 would round the last
        processes.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_what_torchrun_says_is_taken(rank, env):
    env(RANK=rank, WORLD_SIZE=6, LOCAL_RANK=rank % 2, LOCAL_WORLD_SIZE=2)
    processes = devices.Processes("cpu")  # joined by `with` alone
    assert (processes.rank, processes.world_size, processes.main, processes.distributed) == (rank, 6, rank == 0, True)
    assert not torch.distributed.is_initialized()


def test_one_process_of_torchrun_is_distributed_as_well(env):
    env(RANK=0, WORLD_SIZE=1)
    assert devices.Processes("cpu").distributed


def test_a_process_takes_the_gpu_of_its_place_on_its_own_host(env, monkeypatch):
    pretend(monkeypatch, count=4)
    env(RANK=7, WORLD_SIZE=8, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)  # the second host of two
    assert devices.Processes("auto").device == torch.device("cuda", 3)
    env(LOCAL_WORLD_SIZE=8)
    with pytest.raises(BadInput, match="8 processes on 4 GPUs"):
        devices.Processes("auto")


def test_main_goes_first_also_when_it_fails(env, monkeypatch):
    for rank, want in ((0, ["block", "barrier"]), (1, ["barrier", "block"])):
        env(RANK=rank, WORLD_SIZE=2)
        processes, order = devices.Processes("cpu"), []
        monkeypatch.setattr(processes, "barrier", lambda order=order: order.append("barrier"))
        with processes.main_first():
            order.append("block")
        assert order == want
        order.clear()
        with pytest.raises(BadInput), processes.main_first():  # the others must not wait for ever
            order.append("block")
            raise BadInput("no such file")
        assert order == want


def test_two_processes_join_sum_and_part(launch, tmp_path):
    """For real, with gloo; an error in one does not wait for the other."""
    (tmp_path / "two.py").write_text(f"""
import sys
sys.path.insert(0, {os.path.dirname(devices.__file__)!r})
import torch.distributed as dist
from lib.devices import Processes
with Processes("cpu") as processes:
    total = processes.sum([processes.rank + 1, 0.25, 2**53 - 2 if processes.main else 1])
    processes.barrier()
    print(f"{{processes.rank}} of {{processes.world_size}}: {{total}}\\n", end="", flush=True)
assert not dist.is_initialized()
""")
    result = launch(tmp_path / "two.py", processes=2)
    assert result.returncode == 0, result.stderr
    want = [3.0, 0.5, 2.0**53 - 1]
    assert sorted(filter(None, result.stdout.splitlines())) == [f"0 of 2: {want}", f"1 of 2: {want}"]


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


def test_what_is_compiled_again_is_said(capsys):
    torch._dynamo.reset()
    lines = []
    once = devices.CompileOnce(lines.append)
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

    def block(name, size):
        with once(name):
            assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))

    for _ in range(3):
        block("training", 2)
    block("validation", 3)  # another graph, but the first here
    assert lines == []
    block("training", 4)
    block("training", 4)
    assert len(lines) == 1 and lines[0].startswith("training was compiled again")
    block("training", 2)
    block("validation", 2)
    assert len(lines) == 1
    block("validation", 5)
    assert len(lines) == 2 and lines[1].startswith("validation was compiled again")
    compiled(torch.ones(6))  # outside of any block
    block("training", 6)
    assert len(lines) == 2 and capsys.readouterr().out == ""


def test_blocks_without_a_compiler_say_nothing():
    lines = []
    once = devices.CompileOnce(lines.append)
    for size in (1, 2, 3):
        with once("training"):
            torch.ones(size).mul_(2)
    with pytest.raises(BadInput, match="through"), once("training"):
        raise BadInput("errors go through")
    assert lines == []


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batch


class Costs(torch.nn.Module):
    """1000 bytes of weights; `sequences` forward and backward take another 1000 of gradients and cost(sequences)."""

    def __init__(self, cost, limit=10**9):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.ones(250)), SimpleNamespace(block_size=3)
        self.cost, self.limit, self.tried, self.peak = cost, limit, [], 0

    def forward(self, idx, targets):
        assert idx.shape == targets.shape == (len(idx), 3) and idx.dtype == torch.int64
        self.tried.append(len(idx))
        self.peak = max(self.peak, 2000 + self.cost(len(idx)))
        if self.peak > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.weight.sum()


def pretend_memory(monkeypatch, model, free, total=10**9, reserved=0, fraction=1.0):
    """A GPU with so many bytes, on which `model` is all that takes any: its tensors stay on the CPU."""
    pretend(monkeypatch, capability=(7, 5))
    for name, value in (("mem_get_info", (free, total)), ("memory_reserved", reserved), ("get_per_process_memory_fraction", fraction),
                        ("empty_cache", None)):
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


def with_workspace(sequences):
    return 3000 + 1000 * sequences


ON_CUDA = SimpleNamespace(device=torch.device("cuda"), distributed=False)


@pytest.mark.parametrize("cost, free, want", [  # of 48 rows; a tenth of `free` and 2000 for the optimizer's moments stay free
    (thousand_each, 10**6, 48), (thousand_each, 58_000, 48), (thousand_each, 57_000, 24),
    (thousand_each, 18_000, 12), (thousand_each, 17_000, 8), (thousand_each, 8_000, 3), (thousand_each, 6_000, 1),
    (thousand_each, 100, 1), (with_a_step, 36_000, 48), (with_workspace, 61_200, 48), (with_workspace, 13_400, 4),
])
def test_auto_on_cuda_takes_as_many_sequences_as_fit(cost, free, want, monkeypatch):
    model = Costs(cost)
    pretend_memory(monkeypatch, model, free)
    assert devices.pick_micro_batch(model, "auto", 48, ON_CUDA) == want
    divisors = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert model.tried[:-1] == divisors[:divisors.index(model.tried[-1])]  # up to the first that leaves too little
    assert model.tried[-1] == want == 48 or 2000 + cost(model.tried[-1]) > 0.9 * free - 2000
    assert want == 1 or 2000 + cost(want) <= 0.9 * free - 2000
    assert model.weight.grad is None and torch.equal(model.weight, torch.ones(250))


@pytest.mark.parametrize("memory, want", [
    (dict(free=10_000), 4), (dict(free=4_000, reserved=6_000), 4),  # what this process has reserved is its own
    (dict(free=10**6, total=20_000, fraction=0.5), 4), (dict(free=10_000, total=40_000, fraction=0.5), 4)])
def test_auto_on_cuda_counts_the_memory_that_this_process_may_have(memory, want, monkeypatch):
    model = Costs(thousand_each)
    pretend_memory(monkeypatch, model, **memory)
    assert devices.pick_micro_batch(model, "auto", 48, ON_CUDA) == want


@pytest.mark.parametrize("limit, want, tried", [(9_000, 6, [1, 2, 3, 4, 6, 8]), (3_000, 1, [1, 2]), (2_500, 1, [1])])
def test_auto_on_cuda_steps_back_from_what_does_not_fit_after_all(limit, want, tried, monkeypatch):
    model = Costs(thousand_each, limit)
    pretend_memory(monkeypatch, model, free=10**6)
    assert devices.pick_micro_batch(model, "auto", 48, ON_CUDA) == want
    assert model.tried == tried and model.weight.grad is None


@pytest.mark.parametrize("theirs, want", [(3, 3), (16, 8)])
def test_processes_on_cuda_agree_on_what_fits_all(theirs, want, monkeypatch):
    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=theirs)

    model = Costs(thousand_each)
    pretend_memory(monkeypatch, model, free=17_000)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    processes = SimpleNamespace(device=torch.device("cuda"), distributed=True)
    assert devices.pick_micro_batch(model, "auto", 48, processes) == want


@pytest.mark.parametrize("rows, want", [(1, 1), (2, 2), (7, 7), (8, 8), (9, 3), (10, 5), (11, 1), (12, 6), (13, 1), (14, 7),
                                        (64, 8), (96, 8), (35, 7), (22, 2)])
def test_auto_on_a_cpu_is_the_largest_divisor_up_to_8(rows, want):
    processes = SimpleNamespace(device=torch.device("cpu"), distributed=False)
    assert devices.pick_micro_batch(None, "auto", rows, processes) == want


@pytest.mark.parametrize("asked", [1, 3, 16, 10_000])
def test_a_micro_batch_that_was_asked_for_is_taken_as_it_is(asked):
    for device in ("cpu", "cuda"):  # nothing is tried out
        processes = SimpleNamespace(device=torch.device(device), distributed=False)
        assert devices.pick_micro_batch(None, asked, 48, processes) == asked
