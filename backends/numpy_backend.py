"""The CPU backend: `XpBackend` on NumPy, with another body only where a benchmark shows it pays."""

from __future__ import annotations

import numpy as np

from nnx.backends.base import Array, XpBackend


class NumpyBackend(XpBackend):
    """NumPy on the CPU."""

    def __init__(self) -> None:
        super().__init__(np, "numpy")

    def _take_rows(self, source: Array, index: Array, out: Array) -> Array:
        # `order` is a permutation, so nothing is clipped; mode "raise" would buffer the output
        return np.take(source, index, axis=0, out=out, mode="clip")
