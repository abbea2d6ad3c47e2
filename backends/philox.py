"""Random streams that are functions of (seed, stream, use, step), the same on every backend.

The generator is Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
as NumPy has it. A stream is laid out in the generator's own key and counter, lowest word first:

    key     = (seed, stream)           stream: index of the layer in the model, or a constant below
    counter = (block, use, 0, step)    a draw advances `block` only, from 1

so two steps, two uses of one layer in a step, or two layers never overlap. No generator state is
kept anywhere: whoever knows the four numbers can repeat the draw, at any time, on any device.
`cuda/dropout.cu` repeats it word for word.
"""

from __future__ import annotations

import math
import threading

import numpy as np

SHUFFLE = 2**64 - 1  # streams that are no layer's; the step of a shuffle is its epoch
SPLIT = 2**64 - 2
INITIALIZE = 2**64 - 3


def check_seed(seed: int) -> int:
    """`seed` as an int, if it can be a Philox key word.

    Raises:
        TypeError: `seed` is no integer.
        ValueError: `seed` is negative or needs more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    return int(seed)


def philox(seed: int, stream: int, *, use: int = 0, step: int = 0) -> np.random.Philox:
    """NumPy's bit generator at the start of a stream."""
    return np.random.Philox(key=seed | stream << 64, counter=use << 64 | step << 192)


def generator(seed: int, stream: int, *, use: int = 0, step: int = 0) -> np.random.Generator:
    """A NumPy `Generator` at the start of a stream."""
    return np.random.Generator(philox(seed, stream, use=use, step=step))


def words(seed: int, stream: int, n: int, *, use: int = 0, step: int = 0) -> np.ndarray:
    """The first `n` 32-bit words of a stream, the low half of each 64-bit word first."""
    bits: np.random.Philox | None = getattr(_thread, "philox", None)
    if bits is None:
        bits = _thread.philox = np.random.Philox(0)
    bits.state = {  # 20 times faster than a new Philox
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([0, use, 0, step], np.uint64),
            "key": np.array([seed, stream], np.uint64),
        },
        "buffer": _EMPTY,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return bits.random_raw((n + 1) // 2).astype("<u8", copy=False).view("<u4")[:n]


def drop_threshold(p: float) -> int:
    """A unit is dropped where its 32-bit word is below this: `(u32 >> 8) * 2**-24 < p`.

    The comparison is exact in integers: `k * 2**-24 < p` iff `k < ceil(p * 2**24)`, and the product
    with a power of two rounds nothing. 2**32 (p = 1) drops every unit.
    """
    return math.ceil(p * 2.0**24) << 8


_thread = threading.local()
_EMPTY = np.zeros(4, np.uint64)
