"""All that is to be known of a GPU, in one command of some minutes: tests, bits, bandwidth, a file's way.

    python benchmarks/gpu.py [--device cuda] [--layers 32] [--minutes 8] [--size GIB] [--out FOLDER]

It needs what noisytune needs, torch and Triton among it, and downloads nothing. Noise of every kind and dtype
on the device is held against the CPU's, bit for bit. Then comes a model in BF16 of Llama 2 7B's shapes:
measuring reads it once, adding noise reads and writes it once, so `perturb_` is three passes over its bytes,
two with a σ, which needs no measuring; `Population.set` is as many, from another tensor. Their bandwidth is
compared with that of a copy on the device. The paper's loop takes its turns too, and is given the passes of
`perturb_`, which it cannot do with. A file goes through `noisytune perturb --device`, and must come out with
the bytes that the CPU gives it. Last are the tests of the devices and of the fused kernels, compiled (where
pytest and hypothesis are there). FOLDER gets gpu.json, and gpu.md, the table for docs/python.md.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench import layout
from memory import build, device_copy, papers_loop, timed

from noisytune_cli import Population, perturb_
from noisytune_cli.noise.devices import cuda

_ROOT = Path(__file__).resolve().parents[1]
_TESTS = (
    "tests/noise/test_triton_kernels.py",
    "tests/noise/test_torch_device.py",
    "tests/noise/test_torch_kernels.py",
    "tests/contracts/test_devices.py",
)
#: The share of the time that the tests, and the rounds of the model, may take.
_TESTING, _RACING = 0.5, 0.25
_HIDDEN, _FEED_FORWARD, _VOCABULARY = 4096, 11008, 32000
_MIX = [{"seed": seed, "sigma": 0.001, "coefficient": 0.125} for seed in range(8)]

#: What a bit may depend on: what `perturb_` is asked for.
_KINDS: dict[str, dict[str, Any]] = {
    f"{noise} {name}": {"noise": noise, **options}
    for noise in ("uniform", "gaussian")
    for name, options in {
        "λ": {},
        "−σ": {"sigma": -0.01},
        "shrunk": {"sigma": 0.01, "shrink": 0.5},
        "mixture": {"mix": _MIX},
    }.items()
}


def shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of Llama 2 7B, with so many layers."""
    square, wide = (_HIDDEN, _HIDDEN), (_FEED_FORWARD, _HIDDEN)
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{k}_proj": square for k in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    layer |= {"input_layernorm": (_HIDDEN,), "post_attention_layernorm": (_HIDDEN,)}
    found: dict[str, tuple[int, ...]] = {"embed_tokens": (_VOCABULARY, _HIDDEN)}
    found |= {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    found |= {"norm": (_HIDDEN,), "lm_head": (_VOCABULARY, _HIDDEN)}
    return [(f"{name}.weight", shape) for name, shape in found.items()]


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the devices' tests on the GPU, compiled; return what pytest says last."""
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if lacking:
        return {"passed": None, "said": f"not run: {', '.join(lacking)} not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=environment,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"passed": False, "said": f"stopped after {seconds:.0f} s", "output": text[-4000:]}
    lines = done.stdout.strip().splitlines() or [""]
    found: dict[str, Any] = {"passed": not done.returncode, "said": lines[-1].strip("= ")}
    return found if found["passed"] else {**found, "output": done.stdout[-8000:]}


def check_bits(device: str) -> dict[str, list[str]]:
    """Hold every kind of noise in every dtype against the CPU's; return what was fused, and what differs."""

    def equal(here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]) -> bool:
        return all(torch.equal(here[key], there[key].cpu()) for key in here)

    found: dict[str, list[str]] = {"same": [], "different": [], "not fused": []}
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base = {"w": torch.randn(1003, 1001).to(dtype), "odd": torch.randn(77_777).to(dtype)[3:]}
        for name, options in _KINDS.items():
            kind = f"{str(dtype).removeprefix('torch.')} {name}"
            here = {key: values.clone() for key, values in base.items()}
            there = {key: values.to(device) for key, values in base.items()}
            population = Population(there)
            record = perturb_(here, **options)
            same = population.set(**options) == record and equal(here, there)
            population.restore()
            same &= perturb_(there, **options) == record and equal(here, there)
            found["same" if same else "different"].append(kind)
            is_single = name.split()[-1] in ("λ", "−σ")
            if not cuda.adds_exactly(torch.device(device), dtype, options["noise"], is_single):
                found["not fused"].append(kind)
    return found


def race(device: str, layers: int, seconds: float) -> dict[str, Any]:
    """Return the median seconds of each contender, with the bytes and passes that it takes."""
    model = build("BF16", shapes(layers), device)
    nbytes = sum(p.nbytes for p in model.parameters())
    population = Population(model)
    # Passes over the model's bytes. What adds to the noise of before goes on from what it finds.
    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, device_copy(model)),
        "perturb_": (3, lambda: perturb_(model, again=True)),
        "perturb_ Gaussian": (3, lambda: perturb_(model, noise="gaussian", again=True)),
        "perturb_ σ, uniform": (2, lambda: perturb_(model, sigma=1e-3, noise="uniform", again=True)),
        "perturb_ σ, Gaussian": (2, lambda: perturb_(model, sigma=1e-3, again=True)),
        "Population.set σ, uniform": (2, lambda: population.set(sigma=1e-3, noise="uniform")),
        "Population.set σ, Gaussian": (2, lambda: population.set(sigma=1e-3)),
        "Population.set, 8 seeds": (2, lambda: population.set(mix=_MIX)),
        "the paper's loop": (3, lambda: papers_loop(model)),
    }
    for _, contender in contenders.values():
        contender()  # compiles the kernels, and lets the allocator find its size
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(taken["copy"]) < 3:
        for name, (_, contender) in contenders.items():
            taken[name].append(timed(contender, device))
    population.restore()
    medians = {name: statistics.median(times) for name, times in taken.items()}
    copied = 2 * nbytes / medians["copy"]
    return {
        "bytes": nbytes,
        "rounds": len(taken["copy"]),
        "contenders": {
            name: {
                "seconds": medians[name],
                "passes": passes,
                "bandwidth": passes * nbytes / medians[name],
                "of_a_copy": passes * nbytes / medians[name] / copied,
            }
            for name, (passes, _) in contenders.items()
        },
    }


def through_a_file(device: str, size: float) -> dict[str, Any]:
    """Perturb a file of random weights on the device and on the CPU; return the seconds of each."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="noisytune-gpu-") as folder:
        source = Path(folder) / "model.safetensors"
        torch.manual_seed(0)
        shapes = layout("BF16", int(size * 2**30))
        save_file({name: (0.02 * torch.randn(s)).to(torch.bfloat16) for name, s in shapes}, source)
        ways = [("cpu", Path(folder) / "here.safetensors"), (device, Path(folder) / "there.safetensors")]
        taken: list[list[float]] = [[] for _ in ways]
        for _ in range(4):
            for (where, out), times in zip(ways, taken, strict=True):
                command = [sys.executable, "-m", "noisytune_cli", "perturb", source, "-o", out]
                command += ["--lambda", "0.15", "--device", where, "--overwrite", "-q"]
                start = time.perf_counter()
                subprocess.run(command, check=True, cwd=_ROOT)
                times.append(time.perf_counter() - start)
        same = filecmp.cmp(ways[0][1], ways[1][1], shallow=False)
    # The first round compiles the kernels.
    medians = [statistics.median(times[1:]) for times in taken]
    return {"gib": size, "same bytes": same, "seconds": dict(zip(("cpu", "device"), medians, strict=True))}


def table(found: Mapping[str, Any]) -> str:
    """Return the Markdown table of what was found."""
    raced, bits, through = found["model"], found["bits"], found["file"]
    lines = [
        f"{found['device']}, PyTorch {found['torch']}, Triton {found['triton']}; "
        f"{raced['bytes'] / 1e9:.2f} GB in BF16, medians of {raced['rounds']} interleaved rounds.",
        "",
        "| | ms | passes | GB/s | of a copy's |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {one['seconds'] * 1e3:.2f} | {one['passes']} | {one['bandwidth'] / 1e9:.0f} | "
        f"{one['of_a_copy']:.0%} |"
        for name, one in raced["contenders"].items()
    ]
    loop, ours = (raced["contenders"][name]["seconds"] for name in ("the paper's loop", "perturb_"))
    here, there = (through["seconds"][where] for where in ("cpu", "device"))
    lines += [
        "",
        f"- The paper's loop takes {loop / ours:.1f} times as long as `perturb_`.",
        f"- Bits as on the CPU: {len(bits['same'])} of {len(bits['same']) + len(bits['different'])} kinds of "
        f"noise and dtype; {len(bits['not fused'])} without a fused kernel.",
        f"- Tests: {found['tests']['said']}.",
        f"- A file of {through['gib']:g} GiB: {there:.2f} s, on the CPU {here:.2f} s, "
        f"{'the same bytes' if through['same bytes'] else 'OTHER BYTES'}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32, help="of the model; 32 need some 45 GB")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all, the file's way aside")
    parser.add_argument("--size", type=float, default=2.0, help="of the file in GiB")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER")
    options = parser.parse_args()
    device, seconds = options.device, 60 * options.minutes
    on_gpu = device.startswith("cuda")
    has_triton = importlib.util.find_spec("triton") is not None
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or device,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if has_triton else None,
        "bits": check_bits(device),
        "model": race(device, options.layers, _RACING * seconds),
        "file": through_a_file(device, options.size),
        "tests": run_tests(_TESTING * seconds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "gpu.md").write_text(table(found))
    print(table(found), end="")
    for kind in found["bits"]["different"]:
        print(f"OTHER BITS: {kind}")
    if found["tests"]["passed"] is False:
        print(found["tests"]["output"])
    right = not found["bits"]["different"] and found["file"]["same bytes"]
    return 0 if right and found["tests"]["passed"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
