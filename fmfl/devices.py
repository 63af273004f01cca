"""Device, precision and determinism of a run."""

import contextlib
import os

import torch

from fmfl.config import RunConfig

# float32 is float32: by itself cuDNN multiplies it with ten bits of the mantissa (TF32), and in some
# containers cuBLAS does.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def device_of(cfg: RunConfig) -> torch.device:
    """Return the run's device; `auto` is a GPU where PyTorch finds one."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


def set_determinism(cfg: RunConfig) -> None:
    """Make a GPU give the same bytes twice, or let it be fast; to be called before it multiplies anything.

    An operation that has no deterministic form then raises PyTorch's error, which names it. Training on a CPU
    is deterministic as it is (`side_by_side`).
    """
    if device_of(cfg).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs a kernel a tensor, changes none
        torch.backends.cudnn.benchmark = False  # it would choose kernels by their speed of the day


def precision_of(cfg: RunConfig) -> str:
    """Return the run's precision; `auto` is bfloat16 on a GPU that has it, float32 elsewhere.

    Many CPUs and older GPUs emulate bfloat16 at a fraction of the speed, so `auto` never picks it there.
    """
    if cfg.precision != "auto":
        return cfg.precision
    has_it = device_of(cfg).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def autocast(device: torch.device, precision: str = "float32") -> contextlib.AbstractContextManager:
    """Return the context of mixed precision by name, float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
