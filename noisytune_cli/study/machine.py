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


def choose_precision(asked: str, device: str) -> str:
    """Return float32 or bfloat16; for `auto` the latter only where the device computes in it.

    A CPU without instructions for bfloat16 can emulate it, which takes longer than float32 does.
    """
    import torch

    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = (
            bool(_cpu_flags() & _BFLOAT16_FLAGS)
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    return "bfloat16" if able else "float32"


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
    return _cpu_fact("model name") or platform.processor() or platform.machine()


#: What Linux calls the instructions that multiply in bfloat16: x86's two, and arm64's.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    """Return the names of the CPU's extensions; none where the system does not tell."""
    return set((_cpu_fact("flags") or _cpu_fact("Features")).split())


def _cpu_fact(name: str) -> str:
    """Return what /proc/cpuinfo says of the first CPU, or nothing."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = (line.partition(":") for line in file)
            return next((value.strip() for fact, _, value in facts if fact.strip() == name), "")
    except OSError:
        return ""
