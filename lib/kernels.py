"""Kernels that some machines lack. Without them training is slower, and one line says so.

| name | what is missing | instead |
|---|---|---|
| compiler | Triton or a C compiler; any failure of the first compilation | plain PyTorch |
| flash | flash attention, before compute capability 8.0 | memory-efficient attention |
| grouped_mm | its kernel, except for bf16 on capability 9 and 10 | a product per expert |
| varlen | flash attention over a cache, before compute capability 8.0 | a mask |

For tests, the environment variable GPT2_WITHOUT switches them off: names separated by commas.
"""

import importlib.util
import os
import shutil

import torch

SWITCH = "GPT2_WITHOUT"
FLASH_CAPABILITY = (8, 0)
TRITON_CAPABILITY = (7, 0)
GROUPED_MM_MAJOR = (9, 10)


def without(name: str) -> bool:
    """Whether the kernel `name` of the table above is switched off."""
    return name in os.environ.get(SWITCH, "").split(",")


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on a device, as far as that is known without trying."""
    if without("compiler"):
        return f"{SWITCH} switches it off"
    if device.type != "cuda":
        return _missing_compiler("CXX", ("g++", "clang++", "c++"))
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install triton"
    if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return "Triton needs a GPU of compute capability 7.0 or newer"
    return _missing_compiler("CC", ("gcc", "clang", "cc"))


def _missing_compiler(variable, usual):
    """A compiler is named by an environment variable, or has a usual name."""
    named = os.environ.get(variable, "").split(" ")[0]
    names = (named,) if named else usual
    if any(shutil.which(name) for name in names):
        return None
    return f"no C compiler found ({' or '.join(names)}): apt-get install gcc g++"


def has_flash(device: torch.device) -> bool:
    """Whether attention has torch's flash kernel; there is one for CPUs, too."""
    if without("flash"):
        return False
    if device.type != "cuda":
        return True
    return (torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
            and torch.backends.cuda.is_flash_attention_available())


def has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel computes the products of all experts. Without it, torch multiplies one
    expert at a time, and synchronizes with the GPU to read where each group ends."""
    if without("grouped_mm"):
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return dtype == torch.bfloat16 and major in GROUPED_MM_MAJOR


def choose_attention() -> None:
    """Apply the switch "flash" to all attention of this process."""
    if without("flash"):
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)  # needs the same GPUs


def notes(device: torch.device, dtype: torch.dtype, has_experts: bool) -> list[str]:
    """A line for each missing kernel that a run would use. dtype: of matmuls."""
    lines = []
    if not has_flash(device):
        lines.append("slower  attention without the flash kernel, which needs a GPU of compute "
                     "capability 8.0 or newer")
    on_gpu = device.type == "cuda"
    if has_experts and (on_gpu or without("grouped_mm")) and not has_grouped_mm(device, dtype):
        lines.append("slower  experts one after the other: the kernel for all of them needs bf16 "
                     "and a GPU of compute capability 9 or 10")
    return lines
