"""`linearize doctor`: what this machine has, and which implementation each attention operation takes on it."""

import importlib.metadata
import platform

import torch

from linearize_kernels.dispatch import requested
from linearize_kernels.report import report

from .errors import LinearizeError
from .loading import pick_device
from .recipe import MAP_DIMS, AttentionSettings

_PACKAGES = ("linearize", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "lm_eval")


def diagnose(device: str = "auto") -> str:
    """Versions, device, and a line an operation with the reason; on a GPU the kernels are run and compared first.

    Raises LinearizeError for a device that is not there, or where LINEARIZE_KERNELS names no implementation.
    """
    target = pick_device(device)
    try:
        asked = requested()
    except ValueError as error:
        raise LinearizeError(str(error)) from error
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [f"python {platform.python_version()}, " + ", ".join(f"{p} {_version(p)}" for p in _PACKAGES)]
    lines.append(f"device {target} ({name}); LINEARIZE_KERNELS asks for {asked}")
    default = AttentionSettings()
    window, map_dim = default.window, MAP_DIMS[default.feature_map.name]
    lines.append(f"at the window and map dimension that recipes have by default, {window} and {map_dim}:")
    rows = report(target, window=window, map_dim=map_dim)
    lines += [f"{operation}: {chosen} ({why})" for operation, chosen, why in rows]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
