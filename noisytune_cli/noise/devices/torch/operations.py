"""Noise stream v1 and moments in plain torch operations, for any device that torch knows.

Words live in int64, because torch has no arithmetic on unsigned 32-bit integers everywhere; nothing here
overflows. Each operation is a kernel of its own that writes its result to memory, so no compiler can fuse
c · a and x + c · a into one rounding. Rounding to BF16 is done on the integer bits, as in `kernels.c`:
conversion instructions differ between devices in what they do to subnormals.

Bits can differ from the CPU's only where a device flushes subnormal float32 numbers to zero: Metal may do so;
CUDA and the CPU do not, unless `torch.set_flush_denormal(True)` was called. A device without float64 can run
neither the moments, nor F64 tensors, nor the distributions that say FLOAT64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from noisytune_cli.noise import distributions
from noisytune_cli.noise.std import BLOCK, Moments
from noisytune_cli.noise.stream import M0, M1, MASK, ROUNDS, W0, W1, Noise, StreamWords

#: The tensor dtype of each stored dtype.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: The stored dtype of each tensor dtype.
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Values worked on at a time, which bounds the scratch memory (about 40 bytes a value); a multiple of BLOCK.
CHUNK = 2**24

#: Values whose mean is the pivot of the moments.
PIVOT_VALUES = 64

#: Columns of `sums`: pivot, 1.0 if all is finite, Σd, Σd², and what rounding took from these two.
SUMS = 6

#: The integer dtype as wide as each floating dtype, and the bits of its infinity.
BITS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}

#: The largest float32 as a float64's bits.
LARGEST_F32_IN_F64 = 0x47EFFFFFE0000000


def words(stream: StreamWords, first: int, count: int, device: torch.device) -> Tensor:
    """Return words `first` … `first + count - 1` of a stream as [count] int64; `first` is any u64."""
    k0, k1, s0, s1 = stream
    start, stop = first // 4, (first + count + 3) // 4
    # Scalars stay below 2^32, because some devices take theirs through a float64.
    counter = torch.arange(stop - start, dtype=torch.int64, device=device) + (start & MASK)
    c0, c1 = counter & MASK, (counter >> 32) + (start >> 32)
    c2, c3 = torch.full_like(c0, s0), torch.full_like(c0, s1)
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, M0)
        high1, low1 = _multiply(c2, M1)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()[first - 4 * start :][:count]


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of u32 words · a multiplier of 2^31 or more.

    The product itself can pass 2^63. That of (multiplier - 2^32), which is negative, cannot; it is short by
    word · 2^32, so its low word is right and its high word, an arithmetic shift, lacks just `word`.
    """
    product = word * (multiplier - 2**32)
    return (product >> 32).add_(word), product.bitwise_and_(MASK)


def coefficients(
    distribution: str, stream: StreamWords, first: int, count: int, device: torch.device
) -> Tensor:
    """Return the noise of unit amplitude for elements `first` … `first + count - 1`, as [count] float32."""
    begin, end = first // 4 * 4, (first + count + 3) // 4 * 4
    drawn = distributions.load(distribution).tensor_coefficients(words(stream, begin, end - begin, device))
    return drawn[first - begin :][:count]


def add_noise(stored: Tensor, out: Tensor, noise: Noise, first: int) -> Tensor:
    """Write `stored` + noise to `out` ([n], contiguous, finite, without grad; `out` may be `stored`).

    The sum is rounded once, to the dtype of `out`. Returns [unchanged, clamped] elements as an int64 tensor
    on the same device, so that nothing waits for it.
    """
    bits_dtype, infinity = BITS[out.dtype]
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    magnitude = torch.iinfo(bits_dtype).max
    # One below infinity's bits is the largest finite value. A sum computed in float32 stays within its range.
    excess = infinity - LARGEST_F32_IN_F64 if out.dtype == torch.float64 and wide == torch.float32 else 1
    counts = torch.zeros(2, dtype=torch.int64, device=stored.device)
    for begin, values in _chunks(stored):
        base = values.to(wide) if noise.kept == 1.0 else values.to(wide) * noise.kept
        total: Tensor | None = None
        for stream, amplitude in noise.terms:
            c = coefficients(noise.distribution, stream, first + begin, values.numel(), stored.device)
            term = c.to(wide).mul_(amplitude)
            total = term if total is None else total.add_(term)
        bits = round_bits(base.clone() if total is None else total.add_(base), out.dtype)
        clamped = (bits & magnitude) >= infinity
        bits.sub_(clamped.to(bits_dtype).mul_(excess))  # the sign is a bit of its own
        as_stored = out.dtype == stored.dtype and noise.kept == 1.0
        plain = values.view(bits_dtype) if as_stored else round_bits(base, out.dtype)
        counts += torch.stack(((bits == plain).sum(), clamped.sum()))
        out[begin : begin + values.numel()].view(bits_dtype).copy_(bits)
    return counts


def round_bits(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bits of float32 (float64) rounded once to a dtype, nearest-even; infinity past its range."""
    bits_dtype = BITS[dtype][0]
    if y.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        y = _round_to_odd(y)
    if dtype == torch.bfloat16:
        bits = y.view(torch.int32)
        even = (bits >> 16) & 1
        return (bits + 0x7FFF).add_(even).bitwise_right_shift_(16).to(bits_dtype)
    return y.to(dtype).view(bits_dtype)


def _round_to_odd(y: Tensor) -> Tensor:
    """Return float64 cut off to float32, the last bit set where something was lost (`kernels.c` says why)."""
    nearest = y.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    bits.sub_((back.abs() > y.abs()).int()).bitwise_or_((back != y).int())
    return nearest


def block_sums(stored: Tensor) -> Tensor:
    """Return float64 [pivot, 1.0 if all is finite, Σd and Σd² of each block] of [n] values, d = x - pivot.

    The result is on the same device, of size 2 + 2 · (blocks of at most BLOCK values). torch does not say in
    which order it sums; in a row of BLOCK values the order makes no difference to the error bound.
    """
    pivot = stored[:PIVOT_VALUES].double().mean()
    finite = torch.ones((), dtype=torch.bool, device=stored.device)
    first: list[Tensor] = []
    second: list[Tensor] = []
    for _, values in _chunks(stored):
        finite &= values.isfinite().all()
        d = values.double() - pivot
        whole = d.numel() // BLOCK * BLOCK
        for rows in (d[:whole].view(-1, BLOCK), d[whole:].view(1, -1)):
            first.append(rows.sum(dim=1))
            second.append((rows * rows).sum(dim=1))
    return torch.cat((torch.stack((pivot, finite.double())), *first, *second))


def sums(values: Sequence[Tensor]) -> Tensor:
    """Return float64 [tensors, SUMS] of tensors of one device, each [n] and not empty.

    Where one of a sum's blocks overflowed, that sum is not finite. Nothing waits for the result.
    """
    return torch.stack([_sums(v) for v in values])


def _sums(values: Tensor) -> Tensor:
    """Return a row of `sums`: those of blocks are added in pairs, with compensation."""
    found = block_sums(values)
    high = found[2:].view(2, -1)
    low = torch.zeros_like(high)
    while high.shape[1] > 1:
        if high.shape[1] % 2:
            high, low = (torch.nn.functional.pad(t, (0, 1)) for t in (high, low))
        a, b = high[:, 0::2], high[:, 1::2]
        high = a + b
        part = high - a
        low = low[:, 0::2] + low[:, 1::2] + ((a - (high - part)) + (b - part))
    return torch.cat((found[:2], high.flatten(), low.flatten()))


def moments_of(row: Sequence[float], values: Tensor) -> Moments:
    """Return the moments of a tensor from its row of `sums`."""
    pivot, finite, s1, s2, low1, low2 = row
    wide = values.dtype == torch.float64
    return Moments(values.numel(), pivot, (s1, low1), (s2, low2), finite == 1.0, wide)


def moments(sums: list[float], count: int, *, wide: bool) -> Moments:
    """Return the moments of `count` values from their `block_sums`; `wide` where the values are F64."""
    pivot, finite, *totals = sums
    half = len(totals) // 2
    return Moments(count, pivot, _pair(totals[:half]), _pair(totals[half:]), finite == 1.0, wide)


def _pair(sums: list[float]) -> tuple[float, float]:
    """Return the exact sum as a float64 and the float64 nearest to what that leaves."""
    try:
        high = math.fsum(sums)
    except (OverflowError, ValueError):
        # Past float64's range, or infinities of both signs: as good as a sum that is infinite.
        high = math.inf
    return (high, math.fsum((*sums, -high))) if math.isfinite(high) else (high, 0.0)


def _chunks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first value, view of at most CHUNK values)."""
    for begin in range(0, values.numel(), CHUNK):
        yield begin, values[begin : begin + CHUNK]
