"""Counter-based random numbers: each is a pure function of (key, sample index), on any rank, microbatch or device.

With a generator object, a sample's noise would depend on how the batch is split. Here it depends only on the sample's
index, so any number of ranks trains the same run, and resuming needs no generator state. The hash is SplitMix64
(Steele, Lea & Flood 2014), in int64 tensor arithmetic that wraps around.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def stream_key(*names: int | str) -> int:
    """Return the key of an independent stream, a signed 64-bit integer, e.g. `stream_key(seed, "noise", step)`."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix64(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, a bijection of int64 that spreads every input bit over all output bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(key: int, index: Tensor) -> Tensor:
    """Return 64 random bits (int64 [n]) for each `index` (int64 [n])."""
    return mix64((index + 1) * _GAMMA + key)


def uniform(key: int, index: Tensor) -> Tensor:
    """Return a uniform number in [0, 1) with 53 random bits (float64 [n]) for each `index` (int64 [n])."""
    return _shift_right(random_bits(key, index), 11).double() * 2.0**-53


def normal(key: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Return standard normal float32 [n, *shape]; row i depends only on (key, index[i]). `index` is int64 [n].

    Uses Box-Muller in float64, rounded at the end: differences between vectorised and scalar kernels are far below
    float32's last bit.
    """
    size = math.prod(shape)
    pair = torch.arange(1, (size + 1) // 2 + 1, device=index.device)
    bits = mix64(random_bits(key, index)[:, None] + pair * _GAMMA)
    u1 = (_shift_right(bits, 32).double() + 1) * 2.0**-32  # in (0, 1], so that its log is finite
    u2 = (bits & 0xFFFFFFFF).double() * 2.0**-32
    radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return z[:, :size].float().reshape(-1, *shape)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64's shift copies the sign bit: mask the copies.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
