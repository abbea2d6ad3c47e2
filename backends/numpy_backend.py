"""The CPU backend: `XpBackend` on NumPy, with another body only where a benchmark shows it pays."""

from __future__ import annotations

import numpy as np

from nnx.backends.base import Array, XpBackend

_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}


class NumpyBackend(XpBackend):
    """NumPy on the CPU."""

    def __init__(self) -> None:
        super().__init__(np, "numpy")

    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """As in `XpBackend`, some ten times faster: the bits of `dy`, as integers, times 0 or 1.

        That is a selection too: bits of NaN or inf times 0 are those of 0.
        """
        bits = _BITS.get(dy.dtype)
        if bits is None or not dy.flags.c_contiguous:
            return super().relu_backward(dy, mask)
        dx = self.empty(dy.shape, dy.dtype)
        np.multiply(dy.view(bits), mask.view(np.int8), out=dx.view(bits))
        return dx

    def _take_rows(self, source: Array, index: Array, out: Array) -> Array:
        # `order` is a permutation, so nothing is clipped; mode "raise" would buffer the output
        return np.take(source, index, axis=0, out=out, mode="clip")
