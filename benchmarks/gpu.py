"""Noise in a GPU's memory: `perturb_` of a 7-billion-parameter model against the memory's own speed.

    python benchmarks/gpu.py [--device cuda] [--dtype BF16|F32] [--layers 32] [--rounds N]

The shapes are Llama 2 7B's. Measuring reads the model once, adding noise reads and writes it once: three
passes over its bytes. Their bandwidth is compared with that of a copy on the device (a read and a write) and,
where `--peak` gives it, with the memory's in GB/s. The paper's loop runs in the same rounds. First the noise
of one tensor is compared with the CPU's, bit for bit. Contenders take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from memory import DTYPES, device_copy, papers_loop, timed

from noisytune_cli import perturb_

HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 11008, 32000


def build(dtype: torch.dtype, layers: int, device: str) -> torch.nn.Module:
    """Return a module of normal weights with the parameters of so many layers."""
    square, wide = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN)
    layer = {f"self_attn.{k}_proj": square for k in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (VOCABULARY, HIDDEN)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {"norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, shape in shapes.items():
        values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02)
        model.register_parameter(f"{name}.weight".replace(".", "_"), torch.nn.Parameter(values))
    return model


def check_bits(dtype: torch.dtype, device: str) -> None:
    """Refuse to time noise that is not the CPU's."""
    for noise in ("uniform", "gaussian"):
        here = {"w": torch.randn(1003, 1001).to(dtype)}
        there = {"w": here["w"].to(device)}
        perturb_(here, noise=noise)
        perturb_(there, noise=noise)
        if not torch.equal(here["w"], there["w"].cpu()):
            raise SystemExit(f"{noise} noise on {device} is not the CPU's")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak", type=float, help="the memory's bandwidth in GB/s, from its data sheet")
    options = parser.parse_args()
    check_bits(DTYPES[options.dtype], options.device)
    model = build(DTYPES[options.dtype], options.layers, options.device)
    parameters, nbytes = (sum(f(p) for p in model.parameters()) for f in (torch.numel, lambda p: p.nbytes))
    # Passes over the model's bytes; the paper's loop is given those of perturb_, which it cannot do with.
    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, device_copy(model)),
        "perturb_": (3, lambda: perturb_(model, again=True)),
        "perturb_ gaussian": (3, lambda: perturb_(model, noise="gaussian", again=True)),
        "paper's loop": (3, lambda: papers_loop(model)),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _, contender in contenders.values():
        contender()  # compiles the kernels, and lets the allocator find its size
    for _ in range(options.rounds):
        for name, (_, contender) in contenders.items():
            taken[name].append(timed(contender, options.device))
    on_gpu = options.device.startswith("cuda")
    device = torch.cuda.get_device_name(options.device) if on_gpu else options.device
    print(f"{parameters / 1e9:.2f} billion parameters, {options.dtype}, {nbytes / 1e9:.2f} GB, {device}")
    medians = {name: statistics.median(times) for name, times in taken.items()}
    copied = 2 * nbytes / medians["copy"]
    for name, (passes, _) in contenders.items():
        rate = passes * nbytes / medians[name]
        of_peak = f"  {rate / options.peak / 1e7:5.1f} % of the peak" if options.peak else ""
        print(
            f"  {name:<18} {medians[name] * 1e3:9.2f} ms  {rate / 1e9:8.1f} GB/s  "
            f"{rate / copied * 100:6.1f} % of a copy's{of_peak}"
        )
    faster = medians["paper's loop"] / medians["perturb_"]
    print(f"  paper's loop / perturb_  {faster:.1f} x")


if __name__ == "__main__":
    main()
