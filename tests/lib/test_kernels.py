"""Missing kernels and what replaces them: python -m pytest tests/lib/test_kernels.py"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import read_log, tiny
from runs import train

from lib import attention, compiler, kernels, moe
from lib.devices import Processes
from train_gpt2 import GPT

GPU = torch.device("cuda")
EXPERTS = ["--n_experts", 4, "--n_active", 2, "--max_steps", 6]


@pytest.fixture
def without(monkeypatch):
    """without("flash") switches this kernel off."""
    backends = torch.backends.cuda
    flash = backends.flash_sdp_enabled()
    cudnn = backends.cudnn_sdp_enabled()
    yield lambda name: monkeypatch.setenv(kernels.SWITCH, name)
    backends.enable_flash_sdp(flash)
    backends.enable_cudnn_sdp(cudnn)


def pretend(monkeypatch, capability):
    """A GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture
def compilers(monkeypatch):
    """compilers("gcc") are the programs that exist."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)

    def only(*names):
        monkeypatch.setattr(kernels.shutil, "which", lambda name: name if name in names else None)

    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    return only


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("existing, problem", [((), "no C compiler"), (("clang",), None),
                                               (("gcc", "g++"), None)])
def test_triton_needs_a_c_compiler(existing, problem, compilers, monkeypatch):
    pretend(monkeypatch, capability=(7, 5))
    compilers(*existing)
    found = kernels.compiler_problem(GPU)
    assert found is None if problem is None else problem in found


def test_a_named_compiler_is_the_only_one_tried(compilers, monkeypatch):
    compilers("gcc", "g++")
    monkeypatch.setenv("CXX", "/opt/g++ -O2")
    assert "(/opt/g++)" in kernels.compiler_problem(torch.device("cpu"))


def test_triton_may_be_missing_or_the_gpu_too_old_for_it(compilers, monkeypatch):
    compilers("gcc")
    pretend(monkeypatch, capability=(6, 1))
    assert "7.0" in kernels.compiler_problem(GPU)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in kernels.compiler_problem(GPU)


def test_decoding_is_compiled_on_a_gpu_with_a_compiler(compilers, monkeypatch, capsys):
    pretend(monkeypatch, capability=(9, 0))
    compilers("gcc")
    assert compiler.can_decode(GPU)
    assert not compiler.can_decode(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    compilers()
    assert not compiler.can_decode(GPU)
    assert capsys.readouterr().err.count("slower") == 1


def test_the_switch_is_for_one_name_of_several(without):
    without("flash,compiler")
    assert kernels.without("flash") and kernels.without("compiler")
    assert not kernels.without("varlen")
    assert kernels.SWITCH in kernels.compiler_problem(torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), True)])
def test_flash_attention_needs_ampere(capability, fits, monkeypatch):
    pretend(monkeypatch, capability=capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    assert kernels.has_flash(GPU) == fits
    assert attention.flash_fits(GPU, 64) == fits
    for name in ("varlen", "flash"):
        monkeypatch.setenv(kernels.SWITCH, name)
        assert not attention.flash_fits(GPU, 64)


def test_without_flash_losses_are_the_same_and_a_line_says_so(without, data, tmp_path, capsys):
    usual = train(data, tmp_path / "usual", "--max_steps", 6)
    assert "flash kernel" not in capsys.readouterr().out
    without("flash")
    other = train(data, tmp_path / "other", "--max_steps", 6)
    assert capsys.readouterr().out.count("flash kernel") == 1
    assert read_log(other) == pytest.approx(read_log(usual), rel=1e-5)
    with Processes("cpu"):
        assert not torch.backends.cuda.flash_sdp_enabled()


# --------------------------------------------------------------------------------------------------
# Experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True], ids=["switch", "fails"])
def test_products_of_groups(dtype, fails, without, monkeypatch):
    """The layouts of forward and backward; one group is empty."""
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 10, 16], dtype=torch.int32)
    x = torch.randn(16, 8, dtype=dtype)
    weight = torch.randn(4, 24, 8, dtype=dtype)
    grad = torch.randn(16, 24, dtype=dtype)
    layouts = [(x, weight.mT), (grad, weight), (grad.mT, x)]
    expected = [F.grouped_mm(a, b, offs=ends) for a, b in layouts]
    if fails:
        def missing(*args, **named):
            raise RuntimeError("no kernel")
        monkeypatch.setattr(F, "grouped_mm", missing)
    else:
        without("grouped_mm")
    for (a, b), want in zip(layouts, expected, strict=True):
        torch.testing.assert_close(moe.grouped_mm(a, b, ends), want)


def test_without_grouped_mm_losses_are_the_same_and_a_line_says_so(without, data, tmp_path, capsys):
    usual = train(data, tmp_path / "usual", *EXPERTS)
    assert "slower" not in capsys.readouterr().out
    without("grouped_mm")
    other = train(data, tmp_path / "other", *EXPERTS)
    assert capsys.readouterr().out.count("experts one after the other") == 1
    assert read_log(other) == pytest.approx(read_log(usual), rel=1e-5)


@pytest.mark.parametrize("capability, dtype, slow", [
    ((9, 0), torch.bfloat16, False), ((9, 0), torch.float16, True),
    ((12, 0), torch.bfloat16, True), ((7, 5), torch.float16, True)])
def test_a_gpu_whose_experts_are_slow_says_so(capability, dtype, slow, monkeypatch):
    pretend(monkeypatch, capability=capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert any("experts" in line for line in kernels.notes(GPU, dtype, True)) == slow
    assert not any("experts" in line for line in kernels.notes(GPU, dtype, False))
    experts = GPT(replace(tiny(), n_experts=4)).to(dtype)
    assert moe.is_capturable(experts, GPU) != slow
