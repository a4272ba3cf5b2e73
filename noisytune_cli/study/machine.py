"""What runs are carried out with: the packages of the extra, the device, and how a record describes them."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

from noisytune_cli.errors import PackageMissing, UsageError

#: What a study needs, all of which the extra `study` brings; peft only where LoRA is asked for.
_PACKAGES = ("torch", "transformers", "sklearn", "scipy", "matplotlib")


def check_packages(*, lora: bool) -> None:
    """Refuse to begin without what the extra brings; PackageMissing names what is not there."""
    wanted = (*_PACKAGES, "peft") if lora else _PACKAGES
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise PackageMissing(
            "cannot study",
            why=f"not installed: {', '.join(missing)}",
            next_step="Install the extra: pip install '.[study]' in a clone of noisytune",
        )


def check_device(device: str) -> str:
    """Return the device's kind, cpu or cuda; UsageError for one that is not there."""
    import torch

    kind = device.partition(":")[0]
    try:
        if kind not in ("cpu", "cuda"):
            raise ValueError("a study runs on cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no such device here")
        torch.empty(1, device=device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--device {device}", why=str(error).splitlines()[0], next_step="Use --device cpu"
        ) from None
    return kind


def describe_machine(device: str, threads: int, jobs: int) -> dict[str, Any]:
    """Return what the numbers of a study may depend on in their last digits, and its times altogether."""
    import torch
    import transformers

    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": threads,
        "jobs": jobs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
