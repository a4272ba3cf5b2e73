"""Noise in memory: `perturb_` of a model against the memory's own speed and the paper's loop.

    python benchmarks/memory.py [--device DEVICE] [--size GIB | --bert] [--dtype F32|BF16] [--rounds N]

The model has the shapes of a Llama-like one, or those of BERT-base: 199 tensors, most of them small.
Measuring reads it once, adding noise reads and writes it once: two reads and one write. The yardstick is a
copy of the same bytes (one read, one write), by NumPy on the CPU on as many threads, by the device elsewhere;
half as much again is the time of two reads and one write. Contenders take turns, round after round, and
medians are printed.

    paper's loop    p += (rand - 0.5) * λ * std, for every parameter
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from bench import layout

from noisytune_cli import perturb_
from noisytune_cli.engine.threads import default_threads

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def bert() -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of BERT-base."""
    rows = {"word": 30522, "position": 512, "type": 2}
    tensors: list[tuple[str, tuple[int, ...]]] = [
        (f"embeddings.{k}.weight", (n, 768)) for k, n in rows.items()
    ]
    layer: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("query", "key", "value", "attention.output"), (768, 768)
    )
    layer |= {"intermediate": (3072, 768), "output": (768, 3072), "norm.0": (768,), "norm.1": (768,)}
    modules = {f"layer.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    for name, shape in {"embeddings.norm": (768,), **modules, "pooler": (768, 768)}.items():
        tensors += [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]
    return tensors


def build(dtype: str, tensors: list[tuple[str, tuple[int, ...]]], device: str) -> torch.nn.Module:
    """Return a module of normal weights of these names and shapes."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, shape in tensors:
        values = torch.empty(shape, dtype=DTYPES[dtype], device=device).normal_(0.0, 0.02)
        model.register_parameter(name.replace(".", "_"), torch.nn.Parameter(values))
    return model


def host_copy(model: torch.nn.Module) -> Callable[[], None]:
    """Return a function that copies the model's bytes once with NumPy, on all threads."""
    sources = [p.detach().view(-1).view(torch.uint8).numpy() for p in model.parameters()]
    targets = [np.empty_like(source) for source in sources]
    threads = default_threads()
    pieces = [
        pair
        for source, target in zip(sources, targets, strict=True)
        for pair in zip(np.array_split(source, threads), np.array_split(target, threads), strict=True)
    ]
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        for _ in pool.map(lambda pair: np.copyto(pair[1], pair[0]), pieces):
            pass

    return copy


def device_copy(model: torch.nn.Module) -> Callable[[], None]:
    """Return a function that copies the model's bytes once on its device."""
    sources = [p.detach() for p in model.parameters()]
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return copy


def papers_loop(model: torch.nn.Module) -> None:
    """Add noise as the paper prints it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (torch.rand_like(parameter) - 0.5) * 0.15 * torch.std(parameter)


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that some work takes, until the device is done with it."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=float, default=1.0, help="GiB")
    parser.add_argument("--bert", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for dtype in options.dtype or DTYPES:
        tensors = bert() if options.bert else layout(dtype, int(options.size * 2**30))
        model = build(dtype, tensors, options.device)
        nbytes = sum(p.nbytes for p in model.parameters())
        contenders: dict[str, Callable[[], object]] = {
            "copy": host_copy(model) if options.device == "cpu" else device_copy(model),
            "perturb_": lambda model=model: perturb_(model, again=True),
            "perturb_ gaussian": lambda model=model: perturb_(model, noise="gaussian", again=True),
            "paper's loop": lambda model=model: papers_loop(model),
        }
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            contender()  # compiles, warms caches, faults pages in
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                taken[name].append(timed(contender, options.device))
        report(
            dtype, nbytes, {name: statistics.median(times) for name, times in taken.items()}, options.device
        )


def report(dtype: str, nbytes: int, seconds: dict[str, float], device: str) -> None:
    """Print the medians, and each as a multiple of two reads and one write."""
    floor = 1.5 * seconds["copy"]
    where = (
        f"{device}, {default_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    )
    print(f"{dtype}, {nbytes / 2**30:.2f} GiB, {where}")
    print(f"  {'two reads and one write':<24} {floor * 1e3:9.1f} ms  (1.5 x a copy)")
    for name, median in seconds.items():
        print(f"  {name:<24} {median * 1e3:9.1f} ms  {median / floor:6.2f} x")
    faster = seconds["paper's loop"] / seconds["perturb_"]
    print(f"  paper's loop / perturb_  {faster:9.1f} x")


if __name__ == "__main__":
    main()
