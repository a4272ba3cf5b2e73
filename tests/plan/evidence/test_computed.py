"""Values tell a buffer from a parameter: what a formula gives was not learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save
from judged import (
    BY_STRUCTURE,
    BY_VALUES,
    FREQUENCIES,
    NOISE,
    drawn,
    noised,
    noisytune,
    pickled,
    told,
)
from numpy.typing import NDArray

import noisytune_cli
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.plan.evidence.computed import look
from noisytune_cli.plan.evidence.values import Values
from noisytune_cli.records import Conversion, NoiseSpec, TensorSpec


def test_the_plan_says_of_what_the_values_decide(tmp_path: Path) -> None:
    shapes = {
        "net.0.weight": (8, 8),
        "net.0.bias": (8,),
        "net.q_proj": (8, 8),
        "embeddings.word_embeddings.weight": (16, 4),
        "embeddings.position_embeddings.weight": (16, 4),
        "pos_embed": (1, 16, 4),
        "obs.mean": (3,),
        "obs.std": (3,),
        "obs.gain": (3,),
        "x.running_mean": (8,),
        "x.running_var": (8,),
    }
    stored = {name: Tensor("F32", drawn(*shape)) for name, shape in shapes.items()}
    source = save(tmp_path / "m.safetensors", stored)
    left_open = ["embeddings.position_embeddings.weight", "pos_embed", "obs.mean", "obs.std"]

    steps = plan_perturb(Request(str(source), NoiseSpec())).plan.steps
    assert [step.tensor.name for step in steps if "computed" in step.unsure] == left_open
    dry = noisytune("perturb", source, "--dry-run")
    assert "pos_embed  F32 1x16x4  perturb λ=0.15; unless constant or non-finite or computed" in dry.stdout
    rows = inspect(str(source), headers_only=True).tensors
    assert [row.name for row in rows if "computed" in row.unsure] == left_open
    assert not any(row.unsure for row in inspect(str(source)).tensors)
    # What the user includes is a parameter whatever its values.
    included = plan_perturb(Request(str(source), NoiseSpec(include=("*",)))).plan.steps
    assert not any("computed" in step.unsure for step in included)


def test_what_is_called_after_cosines_is_a_table_if_its_values_are(tmp_path: Path) -> None:
    table = sinusoids(64, 16)
    tables = {"rope.cos_emb": table[:, 8:], "rope.sin_emb": table[:, :8]}
    learned = {"kan.cos_amplitudes": drawn(64, 8), "kan.sin_amplitudes": drawn(64, 8, seed=1)}
    # Of angles that follow no formula, in any number, multiplied and rounded to BF16.
    angles = drawn(9, 30, seed=2) * 9
    rounded = [
        (np.float32(1.3) * wave(angles).astype(np.float32)).view(np.uint32) + 0x8000 & 0xFFFF0000
        for wave in (np.cos, np.sin)
    ]
    tables |= {"r.freqs_cos": rounded[0].view(np.float32), "r.freqs_sin": rounded[1].view(np.float32)}
    tables |= {"s.cos": np.cos(angles), "s.sin": np.sin(angles)}
    learned |= {"w.freqs_cos": drawn(9, 4, seed=3), "w.freqs_sin": drawn(9, 4, seed=4)}
    learned |= {"one.cos": np.cos(angles[0, :4]), "one.sin": np.sin(angles[0, :4])}
    expected = dict.fromkeys(tables, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, tables | learned)) == expected
    plan = plan_perturb(Request(str(tmp_path / "m.safetensors"), NoiseSpec())).plan
    assert "computed" in {step.tensor.name: step.unsure for step in plan.steps}["w.freqs_cos"]


def sinusoids(length: int, width: int, base: float = 10_000.0) -> NDArray[Any]:
    angle = np.arange(length)[:, None] / base ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


def unit(*shape: int, axis: int) -> NDArray[Any]:
    values = drawn(*shape)
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


_BETAS = np.linspace(0.01, 0.11, 1000) ** 2

_KEPT = np.cumprod(1 - _BETAS)

_GRID = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2)

_FIR = np.sinc(np.arange(-5.5, 6) / 2) * np.kaiser(12, 5)

_COVARIANCE = drawn(9, 40, seed=7) @ drawn(9, 40, seed=7).T

_NEAR = np.where(np.abs(drawn(12, 12)) > 0.5, np.abs(drawn(12, 12, seed=1)), 0)

COMPUTED: dict[str, NDArray[Any]] = {
    "table": sinusoids(100, 16),
    "table of other axes": sinusoids(64, 16, 100.0)[None, :, None],
    "table with padding": np.concatenate([sinusoids(40, 8)[:1], np.zeros((1, 8)), sinusoids(40, 8)[2:]]),
    "long table": sinusoids(5000, 8),
    "grid": np.concatenate([sinusoids(12, 8)[_GRID[:, 0]], sinusoids(12, 8)[_GRID[:, 1]]], 1)[None],
    "coordinates": _GRID * 0.5,
    "rotary cache": np.stack([sinusoids(64, 8), sinusoids(64, 8)[:, ::-1]], -1),
    "cosine transform": np.cos(np.pi / 16 * (np.arange(16) + 0.5) * np.arange(16)[:, None]),
    "frequencies": FREQUENCIES,
    "frequencies by band": np.where(np.arange(64) < 40, FREQUENCIES, FREQUENCIES / 8),
    "slopes": (2.0 ** -np.arange(1, 9))[:, None, None],
    "timesteps": np.arange(999, -1, -1.0),
    "sigmas": np.sqrt((1 - _KEPT) / _KEPT),
    "log sigmas": np.log((1 - _KEPT) / _KEPT),
    "levels": np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 40) ** 7, 0),
    "knots": np.tile(np.linspace(-1, 1, 12)[:, None], (1, 5)),
    "window": np.hanning(64),
    "periodic window": np.hamming(65)[:64],
    "filter": _FIR[None, None],
    "kernel": np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None] / 64.0,
    "transform": np.cos(np.arange(9)[:, None] * np.arange(40) * 2 * np.pi / 40) * np.hanning(41)[:40],
    "mask": np.tril(np.ones((9, 9))),
    "additive mask": np.triu(np.full((9, 9), -1e4), 1),
    "signs": np.where(drawn(9, 9) > 0, 1.0, -1.0),
    "unit columns": unit(6, 40, axis=0),
    "unit rows": unit(40, 6, axis=1),
    "orthogonal rows": np.linalg.qr(drawn(24, 24))[0] * (1 + np.arange(24.0))[:, None],
    "random features": np.concatenate([np.linalg.qr(drawn(16, 16, seed=i))[0] * (2 + i) for i in range(3)])[
        :40
    ],
    "covariance": _COVARIANCE,
    "precisions": np.stack([np.linalg.inv(_COVARIANCE), np.linalg.inv(_COVARIANCE + np.eye(9))]),
    "steps of a walk": _NEAR / _NEAR.sum(1, keepdims=True),
    "steps of two walks": np.stack([_NEAR / _NEAR.sum(0), _NEAR.T / _NEAR.sum(1)]),
    "lattice": np.indices((4, 3, 5)).reshape(3, -1).T / 4,
    "powers": (np.arange(24) / 24) ** np.arange(4)[:, None],
    "powers up to one": (np.arange(24) / 24) ** np.arange(2)[:, None],
    "few counts": np.array([71.0, 94, 66, 38, 81, 120, 67, 77, 53, 18, 22]),
    "counts": np.floor(9 * np.abs(drawn(300))),
    "resolutions": np.floor(16 * 1.38 ** np.arange(16)),
    "channels first": np.moveaxis(sinusoids(12, 16)[_GRID], 2, 0).transpose(0, 2, 1).reshape(32, 12, 12),
}

_SORTED = np.sort(drawn(64, seed=3))

LEARNED: dict[str, NDArray[Any]] = {
    "table": drawn(64, 16),
    "smooth table": np.cumsum(drawn(64, 16), 0) * 0.02,
    "table that moved": sinusoids(64, 16) + 0.01 * drawn(64, 16),
    "frequencies that moved": FREQUENCIES * (1 + 0.02 * drawn(64)),
    "levels that moved": np.linspace(0, 1, 64) + 5e-3 * drawn(64),
    "sorted": _SORTED,
    "thresholds": _SORTED[::8],
    "scale": 1 + 0.01 * drawn(64),
    "pruned": drawn(16, 16) * (drawn(16, 16, seed=1) > 1),
    "nearly unit": unit(40, 6, axis=1) * 1.05,
    "kernel": drawn(1, 1, 4, 4),
    "covariance that moved": _COVARIANCE * (1 + 0.05 * drawn(9, 9, seed=8)),
    "small square": drawn(4, 4) + drawn(4, 4).T,
    "diagonal": np.diag(drawn(9)),
    "graph without shares": _NEAR,
    "shares that moved": _NEAR / _NEAR.sum(1, keepdims=True) * (1 + 0.2 * drawn(12, 12)),
    "few": np.arange(6.0),
    "where fractions have no room": np.round(400 + 40 * drawn(64)) * 64,
    "whole but for one": np.append(np.floor(99 * drawn(64)), 0.5),
    "rotations": unit(40, 4, axis=1),
    "blocks": np.kron(np.eye(4), drawn(4, 4) + 1),
    "halves": np.round(drawn(60, 3) * 2) / 2,
}


@pytest.mark.filterwarnings(
    "ignore:.*left more than half", "ignore:.*half of the values"
)  # of what was learned
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_what_was_computed_is_told_from_what_was_learned(dtype: str, tmp_path: Path) -> None:
    """Values alone tell what becomes of a tensor, on disk as in a state dict in memory."""
    torch = pytest.importorskip("torch")
    spelt = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype]
    values = {f"computed.{kind}.x0": array for kind, array in COMPUTED.items()}
    values |= {f"learned.{kind}.x0": array for kind, array in LEARNED.items()}
    # A few steps of 4 % cannot be told from the roundings of F16, nor a dozen of 9 % from BF16's.
    powers = ["powers", "powers up to one"]
    lost = {"F16": powers, "BF16": [*powers, "knots", "coordinates", "resolutions"]}
    for kind in lost.get(dtype, []):
        del values[f"computed.{kind}.x0"]
    state = {
        name: torch.tensor(np.ascontiguousarray(array), dtype=torch.float64).to(spelt)
        for name, array in values.items()
    }
    done = pickled(tmp_path, state)
    assert told(done) == {name: BY_VALUES if name.startswith("computed") else NOISE for name in values}
    noisytune_cli.perturb_(state)
    on_disk = torch.load(tmp_path / "o.pt", weights_only=True)
    assert [name for name in state if not torch.equal(state[name], on_disk[name])] == []


@pytest.mark.parametrize("name", ["norm.weight", "q_proj", "lora_B", "proj.bias", "gamma"])
def test_weights_at_their_initial_values_are_weights(name: str, tmp_path: Path) -> None:
    half = np.repeat([0.0, 1.0], 8)
    found = {name: half, f"m.{name}": np.linspace(0, 1, 16), "x.weight": drawn(4, 4)}
    assert set(told(noised(tmp_path, found)).values()) == {NOISE}


def test_masks_and_permutations_may_be_called_by_a_letter(tmp_path: Path) -> None:
    """As flows do; a matrix that begins as the identity is learned from there."""
    computed = {
        "flows.0.b": np.tile([[1.0, 0.0]], 8),
        "flows.1.P": np.eye(12)[np.random.default_rng(0).permutation(12)],
    }
    learned = {
        "flows.1.U": np.eye(12),
        "flows.1.L": np.tril(drawn(12, 12)),
        "ssm.D": np.repeat([0.0, 1.0], 8),
    }
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_a_progression_may_rise_from_a_level(tmp_path: Path) -> None:
    computed = {
        "confidence_thresholds": 0.8 + 0.1 * np.exp(-4 * np.arange(9) / 9),
        "squared_bins": np.linspace(3.25, 20.75, 15) ** 2,
        "raised_cosine": 0.54 - 0.46 * np.cos(np.arange(12) / 5),
    }
    learned = {f"moved.{name}": values * (1 + 1e-3 * drawn(len(values))) for name, values in computed.items()}
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_an_embedding_may_hold_a_table_of_sinusoids(tmp_path: Path) -> None:
    found = {
        "embed_positions.weight": sinusoids(64, 16),
        "minute_embed.emb.weight": sinusoids(4, 16).reshape(4, 2, 8).swapaxes(1, 2).reshape(4, 16),
        "weekday_embed.emb.weight": sinusoids(7, 16),
        "month_embed.emb.weight": np.concatenate([sinusoids(1, 16), drawn(3, 16)]),
        "embed_tokens.weight": np.concatenate([np.zeros((1, 16), np.float32), drawn(63, 16)]),
    }
    done = noised(tmp_path, found)
    learned = dict.fromkeys(("month_embed.emb.weight", "embed_tokens.weight"), NOISE)
    assert told(done) == dict.fromkeys(found, BY_VALUES) | learned


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("n.mean", "n.std"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("n.mel_mean", "n.mel_variance"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("n.state.min", "n.state.max"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("bn/~/mean_ema/average", "bn/~/var_ema/average"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("cmvn.mean", "cmvn.istd"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),  # WeNet
        (("n.acc_sum", "n.acc_sum_squared"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),  # MeshGraphNets
        (("n.mean", "n.M2"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("pinn.lb", "pinn.ub"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("x.q01", "x.q99"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("x.lower", "x.upper"), (drawn(9), drawn(9, seed=1)), NOISE),
        (("x.min_logvar", "x.max_logvar"), (-abs(drawn(9)), abs(drawn(9, seed=1))), NOISE),  # PETS
        (("x.log_std_min", "x.log_std_max"), (-abs(drawn(9)), abs(drawn(9, seed=1))), NOISE),
        (("n.sum", "n.sum_squared"), (drawn(9), drawn(9, seed=1)), NOISE),
        (("n.mean", "n.std"), (drawn(9), drawn(9, seed=1)), (None, "names")),
        (("film.shift", "film.scale"), (drawn(9), abs(drawn(9, seed=1))), NOISE),
        (("prior.mean", "prior.log_std"), (drawn(9), abs(drawn(9, seed=1))), None),
    ],
)
def test_a_mean_and_its_spread_are_statistics(
    names: tuple[str, str], values: tuple[Any, Any], expected: Any, tmp_path: Path
) -> None:
    done = noised(tmp_path, dict(zip(names, values, strict=True)) | {"a.weight": drawn(4, 4, seed=5)})
    found = told(done)
    if expected is None:  # a lone mean is in doubt, a logarithm is not
        assert [found[name] for name in names] == [(None, "names"), NOISE]
    else:
        assert {found[name] for name in names} == {expected}
    assert found["a.weight"] == NOISE


@pytest.mark.parametrize(("matrix", "bias"), [("weight", "bias"), ("w", "b"), ("kernel", "bias")])
def test_the_heads_of_a_mean_and_a_std_are_layers(matrix: str, bias: str, tmp_path: Path) -> None:
    found = {
        f"encoder.fc_mean.{matrix}": drawn(9, 4),
        f"encoder.fc_mean.{bias}": drawn(9, seed=1),
        f"encoder.fc_std.{matrix}": abs(drawn(9, 4, seed=2)),
        f"encoder.fc_std.{bias}": abs(drawn(9, seed=3)),
    }
    done = noised(tmp_path, found)
    assert told(done) == dict.fromkeys(found, NOISE)


def test_a_computed_buffer_keeps_its_dtype(tmp_path: Path) -> None:
    frequencies = Tensor("F32", FREQUENCIES.astype(np.float32))
    found = {"rope.freqs": frequencies, "a.weight": Tensor("F32", drawn(4, 4))}
    source = save(tmp_path / "m.safetensors", found)
    out = tmp_path / "o.safetensors"
    done = perturb(Request(str(source), NoiseSpec(), conversion=Conversion("BF16")), str(out))
    dtypes = {r.step.tensor.name: r.step.out_dtype for r in done.manifest.receipts}
    assert dtypes == {"rope.freqs": None, "a.weight": "BF16"}
    assert verify(str(out), base=str(source)).ok


def mel(filters: int, bins: int, *, area: bool) -> NDArray[np.float32]:
    """Triangles on a mel scale, [filters, bins], of height one or of area one."""
    edges = 700 * (10 ** (np.linspace(0, 2.8, filters + 2) / 2.8) - 1) / 6300 * (bins - 1)
    at, low, middle, high = np.arange(bins), edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bumps = np.maximum(0, np.minimum((at - low) / (middle - low), (high - at) / (high - middle)))
    return np.asarray(bumps * 2 / (high - low) if area else bumps, np.float32)


def test_a_distribution_is_computed_and_even_shares_are_not(tmp_path: Path) -> None:
    counts = np.abs(drawn(300)) ** 3
    learned = {"mixer.shares": np.full(16, 1 / 16) * (1 + 0.1 * drawn(16)), "mixer.even": np.full(16, 1 / 16)}
    found = told(noised(tmp_path, {"noise_distribution": counts / counts.sum()} | learned))
    assert found == {
        "noise_distribution": BY_VALUES,
        "mixer.shares": NOISE,
        "mixer.even": ("constant", None),
    }


def test_large_squares_are_looked_at_where_their_diagonal_begins_and_ends(tmp_path: Path) -> None:
    near = drawn(1500, 1500)
    near += near.T
    moved = near.copy()
    moved[1400, 1300] += 1
    expected = {"graph.laplacian": BY_VALUES, "moved.laplacian": NOISE}
    assert told(noised(tmp_path, {"graph.laplacian": near, "moved.laplacian": moved})) == expected


def test_a_bank_of_filters_is_computed(tmp_path: Path) -> None:
    banks = {
        "featurizer.fb": mel(40, 201, area=True)[None],
        "mel_scale.fb": mel(40, 201, area=False).T,
        "melmat": mel(80, 257, area=True).T,
    }
    trained = mel(40, 201, area=True)
    trained[7, trained[7].nonzero()[0][0]] *= -0.01
    pruned = np.where(np.abs(drawn(40, 64)) > 1, np.abs(drawn(40, 64)), 0)
    parameters = {
        "a.fb": trained,
        "b.fb": mel(40, 201, area=True)[::-1] + drawn(40, 201) * 1e-3,
        "c.fb": pruned,
    }
    assert told(noised(tmp_path, banks | parameters)) == dict.fromkeys(banks, BY_VALUES) | dict.fromkeys(
        parameters, NOISE
    )


def test_the_edges_of_learned_filters_are_learned_though_they_hardly_moved(tmp_path: Path) -> None:
    low = 700 * (10 ** (np.linspace(60, 2800, 40) / 2595) - 1)
    found = {"fb.low_hz_": low, "fb.band_hz_": np.diff(low, append=3000)}
    found |= {"fb.n_": np.arange(-125, 0) / 16000, "other.low_hz_": low}
    learned = dict.fromkeys(("fb.low_hz_", "fb.band_hz_"), NOISE)
    assert told(noised(tmp_path, found)) == dict.fromkeys(found, BY_VALUES) | learned


def test_a_letter_that_no_formula_calls_a_weight_is_looked_at(tmp_path: Path) -> None:
    slopes = 2.0 ** -np.arange(1, 9)
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)
    tensors = {"attn.m": slopes.reshape(8, 1, 1), "edges.k": laplace.reshape(1, 1, 3, 3)}
    weights = {"mixer.D": slopes, "linear.w": np.eye(8), "norm.g": slopes, "mixer.s": drawn(8)}
    assert told(noised(tmp_path, tensors | weights)) == dict.fromkeys(tensors, BY_VALUES) | dict.fromkeys(
        weights, NOISE
    )


def test_a_moving_average_beside_its_variance_is_statistics(tmp_path: Path) -> None:
    names = ["norm.moving_avg", "norm.moving_var"]
    tensors = {name: drawn(8, seed=i) for i, name in enumerate([*names, "norm.avg_pool"])}
    assert told(noised(tmp_path, tensors)) == {
        **dict.fromkeys(names, BY_STRUCTURE),
        "norm.avg_pool": NOISE,
    }


def test_a_kind_holds_no_buffer_that_values_tell(tmp_path: Path) -> None:
    found = {
        "pos_embed": sinusoids(64, 16),
        "wte.weight": drawn(16, 8),
        "obs_norm.mean": drawn(9),
        "obs_norm.std": abs(drawn(9, seed=1)),
        "ln.scale": drawn(9, seed=2),
        "rope.freqs": FREQUENCIES,
        "fc.weight": drawn(4, 4),
    }
    include = ("@embeddings", "@norm", "rope.*")
    done = noised(tmp_path, found, noise=NoiseSpec(include=include))
    expected = {
        "pos_embed": BY_VALUES,
        "wte.weight": NOISE,
        "obs_norm.mean": BY_VALUES,
        "obs_norm.std": BY_VALUES,
        "ln.scale": NOISE,
        "rope.freqs": NOISE,  # named, and no kind
        "fc.weight": ("excluded", None),
    }
    assert told(done) == expected
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(np.float32(values)) for name, values in found.items()}
    noisytune_cli.perturb_(state, include=include)
    on_disk = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "o.safetensors")
    assert [name for name in state if not np.array_equal(state[name].numpy(), on_disk[name])] == []
    dry = noisytune("perturb", tmp_path / "m.safetensors", "--dry-run", "--include", "@embeddings").stdout
    assert "pos_embed  F32 64x16  perturb λ=0.15; unless constant or non-finite or computed" in dry


def test_weights_that_are_held_to_length_one_are_weights(tmp_path: Path) -> None:
    names = ["W_dec", "sae.W_D", "q.parametrizations.weight.original", "decoder.weight"]
    found = {name: unit(40, 6, axis=1) for name in names} | {"net.memory": unit(40, 6, axis=1)}
    expected = dict.fromkeys(names, NOISE) | {"net.memory": BY_VALUES}
    assert told(noised(tmp_path, found)) == expected


def grid(width: int, *sizes: int) -> NDArray[Any]:
    """A table of sinusoids for each axis of a grid, side by side, the last axis the fastest."""
    at = np.indices(sizes).reshape(len(sizes), -1)
    return np.concatenate([sinusoids(n, width)[places] for n, places in zip(sizes, at, strict=True)], 1)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "sizes", [(32, 32), (8, 64), (64, 8), (9, 30), (192, 192), (8, 14, 14), (12, 9, 20)], ids=str
)
def test_tables_of_sinusoids_over_grids_are_computed(sizes: tuple[int, ...], dtype: str) -> None:
    table = grid(16, *sizes)
    moved = table + 0.02 * drawn(*table.shape)
    lines = sizes[-1] * (len(table) // sizes[-1] // 2)
    learned = np.concatenate([table[:lines], np.repeat(drawn(1, table.shape[1]), len(table) - lines, 0)])
    with_token = np.concatenate([np.zeros_like(table[:1]), table])
    for rows, is_computed in [(table, True), (with_token, True), (moved, False), (learned, False)]:
        stored = rounded(rows, dtype)
        spec = TensorSpec("pos_embed", dtype, (1, *stored.shape), "", 0, 0)
        assert bool(look(spec, reader(stored), plain=False)) is is_computed


def reader(stored: NDArray[Any]) -> Values:
    return lambda first, count: stored.reshape(-1)[first : first + count]


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return np.asarray((bits + 0x8000 & 0xFFFF0000).view(np.float32), float)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(float)


def test_a_fourier_transform_may_be_a_convolution(tmp_path: Path) -> None:
    n = 64
    angle = -2j * np.pi / n * np.arange(n // 2 + 1)[:, None] * np.arange(n)
    transform = np.exp(angle) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n))
    inverse = np.exp(-angle[: n // 2]) / n
    computed = {
        "stft.conv_real.weight": transform.real[:, None],
        "stft.conv_imag.weight": transform.imag[:, None],
        "istft.conv_real.weight": inverse.real[:, :, None],
        "istft.conv_imag.weight": inverse.imag[:, :, None],
    }
    learned = {
        "enc.conv_real.weight": transform.real[:, None] + 1e-3 * drawn(33, 1, n),
        "enc.conv_imag.weight": drawn(33, 1, n),
        "conv.weight": transform.real[:, None],
        "entity_real.weight": unit(40, 6, axis=1),
    }
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_numbers_that_a_convolution_takes_the_mean_of_are_computed(tmp_path: Path) -> None:
    numbers = np.arange(16.0).reshape(1, 16, 1, 1)
    weights = {
        "a.conv.weight": numbers * 1.01,
        "b.conv.weight": numbers.reshape(16, 1, 1, 1),
        "c.weight": numbers.reshape(16),
        "d.conv.weight": drawn(1, 16, 1, 1),
    }
    done = noised(tmp_path, {"model.22.dfl.conv.weight": numbers} | weights)
    assert told(done) == {"model.22.dfl.conv.weight": BY_VALUES} | dict.fromkeys(weights, NOISE)
    dry = noisytune("perturb", tmp_path / "m.safetensors", "--dry-run").stdout
    assert "dfl.conv.weight  F32 1x16x1x1  perturb λ=0.15; unless constant or non-finite or computed" in dry


def test_a_large_grid_is_looked_at_in_a_few_places() -> None:
    rows, width = 36864, 1536
    table = {axis: sinusoids(192, width // 2) for axis in (0, 1)}
    asked = []

    def values(first: int, count: int) -> NDArray[Any]:
        asked.append(count)
        at = np.arange(first, first + count)
        row, column = at // width, at % width
        half = width // 2
        found = np.where(
            column < half, table[1][row % 192, column % half], table[0][row // 192, column % half]
        )
        return found.astype(np.float16).astype(float)

    assert look(TensorSpec("pos_embed", "F16", (1, rows, width), "", 0, 0), values, plain=False)
    assert max(asked) <= 1 << 18
    assert sum(asked) < rows * width // 10
