"""--doctor here, and its checks of other machines: python -m pytest tests/lib/test_doctor.py"""

import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import train_gpt2
from lib import doctor
from lib.cli import BadInput

SMALL = ["--preset", "gpt2", "--n_layer", "2", "--n_head", "2", "--n_embd", "32",
         "--block_size", "32", "--total_batch_size", "256", "--max_steps", "100",
         "--device", "cpu", "--price_per_hour", "2"]


def machine_for(*flags):
    """The Machine of a command line, on the CPU."""
    cfg, model_cfg, *_ = train_gpt2.settings([*SMALL, *flags])

    def build(vocab_size):
        return train_gpt2.on_meta(replace(model_cfg, vocab_size=vocab_size))

    return doctor.Machine(cfg, build, ROOT / "train_gpt2.py")


@pytest.fixture
def machine(data):
    return machine_for("--data", str(data))


@pytest.fixture
def gpus(monkeypatch):
    """Make a Machine on the CPU look like one with two GPUs. Settings: what the driver reports."""
    driver = {"name": "NVIDIA X\nNVIDIA X", "memory.used": "10\n10", "driver_version": "580.1",
              "": "CUDA Version: 13.0"}
    monkeypatch.setattr(doctor, "nvidia_smi", lambda query="": driver[query])
    monkeypatch.setattr(doctor, "memory_bytes", lambda device: 80 * 10**9)
    monkeypatch.setattr(doctor.Machine, "on_gpu", True)
    monkeypatch.setattr(doctor.Machine, "processes", 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return driver


def disk_with(monkeypatch, free, total=0):
    """Every disk has `free` of `total` bytes."""
    usage = SimpleNamespace(free=free, total=total)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


@pytest.fixture
def healthy(monkeypatch):
    """This machine has a large disk, and its name an address."""
    disk_with(monkeypatch, free=10**11, total=10**11)  # without data, 20 GB are to come
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")


# --------------------------------------------------------------------------------------------------
# The whole page


def lines_of(page):
    """{name of a check: (mark, text)}."""
    found = {}
    for line in page.splitlines():
        if line[:3] in ("ok ", "FIX"):
            mark, name, text = line.split(maxsplit=2)
            found[name] = mark, text
    return found


def page_of(capsys, *flags):
    """--doctor -> (exit code, the page)."""
    with pytest.raises(SystemExit) as done:
        train_gpt2.main(["--doctor", *SMALL, *flags])
    return done.value.code, capsys.readouterr().out


@pytest.mark.slow
def test_a_machine_that_is_ready(data, tmp_path, healthy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out = page_of(capsys, "--data", str(data))
    assert code == 0, out
    page = lines_of(out)
    assert list(page) == [name for name, _ in doctor.CHECKS]
    assert {mark for mark, _ in page.values()} == {"ok"}
    assert page["data"][1].startswith("4,708 tokens in 3 shards, read at ")
    assert page["links"][1].startswith("gloo works")
    assert page["steps"][1].startswith("10 of 256 tokens take ")
    assert "this run: " in page["cost"][1] and "$" in page["cost"][1]
    assert out.endswith("\nready to train\n")
    assert not list(tmp_path.iterdir())


def test_a_machine_without_data_times_random_tokens(tmp_path, healthy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out = page_of(capsys, "--data", "nowhere")
    assert code == 1, out
    page = lines_of(out)
    assert [name for name, (mark, _) in page.items() if mark == "FIX"] == ["data"]
    assert "\n                -> " in out
    assert "random tokens" in page["steps"][1]
    assert out.endswith("\n1 to fix\n")


def test_it_is_refused_under_torchrun(data, monkeypatch):
    settings = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BadInput, match="without torchrun"):
        train_gpt2.main(["--doctor", *SMALL, "--data", str(data)])


def test_a_check_that_fails_does_not_hide_the_others(machine, monkeypatch, capsys):
    def broken(machine):
        raise KeyError("x")

    monkeypatch.setattr(doctor, "CHECKS", [("a", broken), ("b", doctor.check_torch)])
    assert not doctor.examine(machine)
    first, _, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("FIX a") and "KeyError" in first
    assert second.startswith("ok  b")
    assert last == "1 to fix"


# --------------------------------------------------------------------------------------------------
# Checks


def test_gpus_and_their_driver(gpus, machine):
    assert doctor.check_gpu(machine) == (True, "2 x NVIDIA X, 80 GB each", "")
    assert doctor.check_driver(machine).ok
    assert "torch was built for CUDA 13.0" in doctor.check_driver(machine).text
    gpus["memory.used"] = "10\n40000"
    assert "42 GB are in use" in doctor.check_gpu(machine).text
    gpus[""] = "CUDA Version: 12.8"
    assert not doctor.check_driver(machine).ok
    gpus["driver_version"] = gpus[""] = ""
    assert doctor.check_driver(machine).text.startswith("unknown, for CUDA unknown")


def test_the_links_between_gpus(gpus, machine, monkeypatch):
    probed = {"flops": 7e14, "processes": 2, "peers": 2, "pairs": 2, "bandwidth": 2e11}
    monkeypatch.setattr(doctor, "run_probe", lambda device, processes: probed)
    check = doctor.check_links(machine)
    assert check.ok
    assert check.text == ("NCCL all-reduce at 200 GB/s between 2 GPUs, peer access in 2 of 2 pairs")
    probed["bandwidth"] = 2e8
    assert not doctor.check_links(machine).ok
    machine.cfg = replace(machine.cfg, device="auto")
    assert doctor.trial(machine) == (4, 10)
    command = doctor.short_run(machine, Path("x"), rows=4, steps=10)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert "--compile" in command
    assert "compute capability 9.0" in doctor.check_precision(machine).text
    machine.cfg = replace(machine.cfg, dtype="fp16")
    assert "float16, compute capability 9.0" in doctor.check_precision(machine).text


def test_a_gpu_that_torch_does_not_see(machine, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda query="": "NVIDIA X")
    assert doctor.check_gpu(machine).ok  # --device cpu
    machine.cfg = replace(machine.cfg, device="auto")
    assert not doctor.check_gpu(machine).ok


@pytest.mark.parametrize("version, ok", [
    ("2.10.1", False), ("2.11.0+cu130", True), ("2.15.0", True), ("3.0.0", False)])
def test_versions_of_torch(version, ok, machine, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor.check_torch(machine).ok == ok


def test_too_little_memory_disk_and_shared_memory(gpus, machine, monkeypatch):
    monkeypatch.setattr(doctor, "container_limit", lambda: None)
    assert doctor.check_memory(machine).ok
    monkeypatch.setattr(doctor, "container_limit", lambda: 4 * 10**9)
    assert doctor.check_memory(machine).text.startswith("4 GB")
    assert not doctor.check_memory(machine).ok
    disk_with(monkeypatch, free=10**9, total=10**9)
    assert doctor.check_disk(machine).ok and doctor.check_shared_memory(machine).ok
    disk_with(monkeypatch, free=10**6, total=64 * 2**20)  # Docker's default
    assert not doctor.check_disk(machine).ok
    assert "--shm-size" in doctor.check_shared_memory(machine).remedy
    machine.corpus = None
    disk_with(monkeypatch, free=10**9)
    assert not doctor.check_disk(machine).ok


def test_a_compiler_is_needed_on_a_gpu_only(machine, monkeypatch):
    assert doctor.check_compiler(machine).ok
    monkeypatch.setattr(doctor.Machine, "on_gpu", True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    check = doctor.check_compiler(machine)
    assert not check.ok
    assert "no Triton, no C compiler" in check.text and "--no-compile" in check.remedy


def test_ports(machine, healthy, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        machine.cfg = replace(machine.cfg, tensorboard=port)
        assert not doctor.check_ports(machine).ok
    assert doctor.check_ports(machine).ok
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.name.invalid")
    assert "/etc/hosts" in doctor.check_ports(machine).remedy


def test_a_clock_in_the_past(machine, monkeypatch):
    assert doctor.check_clock(machine).ok
    monkeypatch.setattr(doctor.time, "time", lambda: 1e9)
    assert "before this project's files" in doctor.check_clock(machine).text


def test_processes_that_do_not_reach_each_other(machine, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.1)
    check = doctor.check_links(machine)
    assert not check.ok and check.text.startswith("gloo failed between 2 processes: ")


# --------------------------------------------------------------------------------------------------
# Steps and cost


def test_slow_machines_take_smaller_steps(machine):
    machine.cfg = replace(machine.cfg, total_batch_size=64 * 32)
    work = machine.model.flops_per_token() * 32  # of a sequence
    for fitting, expected in ((640, (64, 10)), (320, (32, 10)), (3, (1, 3)), (0.1, (1, 2))):
        machine.probed = {"flops": fitting * work / doctor.STEPS_TIME / doctor.REACHED * 1.001}
        assert doctor.trial(machine) == expected
    machine.cfg = replace(machine.cfg, micro_batch=16)
    assert doctor.trial(machine) == (16, 2)


def test_the_short_run_has_the_model_and_speed_of_the_run(data, tmp_path):
    flags = ["--preset", "speedrun", "--n_layer", "3", "--n_experts", "4", "--n_active", "2",
             "--no-emb_norm", "--data", str(data), "--micro_batch", "2", "--deterministic",
             "--dtype", "fp16", "--parallel", "fsdp", "--checkpoint_activations", "--follow"]
    machine = machine_for(*flags)
    script, *words = doctor.short_run(machine, tmp_path, rows=8, steps=10)[1:]
    assert script == str(ROOT / "train_gpt2.py")
    cfg, model_cfg, *_ = train_gpt2.settings(words)
    assert replace(model_cfg, vocab_size=280) == machine.model.config
    for name in ("optimizer", "deterministic", "device", "shuffle", "micro_batch", "data", "dtype",
                 "parallel", "checkpoint_activations", "follow"):
        assert getattr(cfg, name) == getattr(machine.cfg, name), name
    assert (cfg.total_batch_size, cfg.max_steps) == (8 * 32, 12)


def test_the_error_of_the_short_run_is_the_remedy(machine, tmp_path):
    machine.script = tmp_path / "script.py"
    machine.script.write_text("raise SystemExit('script.py: error: out of memory: give less')")
    check = doctor.check_steps(machine)
    assert (check.ok, check.remedy) == (False, "out of memory: give less")
    assert not doctor.check_cost(machine).ok


def test_the_cost_by_hand(machine):
    machine.speed = 256.0
    machine.start_up = 20.0
    assert doctor.check_cost(machine).text == "this run: 2.0 minutes, $0.07 at $2 per hour"
    machine.cfg = replace(machine.cfg, max_steps=None, minutes=5.0)
    assert doctor.check_cost(machine).text == "this run: 5.3 minutes, $0.18 at $2 per hour"


@pytest.mark.parametrize("preset, losses", [("speedrun", 2), ("modern", 1), ("gpt2", 0)])
def test_the_losses_of_the_readme(preset, losses):
    cfg, model_cfg, *_ = train_gpt2.settings(["--preset", preset, "--device", "cpu"])
    machine = doctor.Machine(cfg, lambda n: train_gpt2.on_meta(model_cfg), Path())
    machine.speed = 1e6
    assert doctor.check_cost(machine).text.count("README's loss") == losses
