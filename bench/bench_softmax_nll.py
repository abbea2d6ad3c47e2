"""Softmax and negative log-likelihood, value and gradient: one operation, and written out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx.backends import Array, Backend

Run = Callable[..., None]


def _naive(xp: Any, logits: Array, labels: Array) -> tuple[Array, Array]:
    """As a textbook puts it: probabilities, their logarithm, one-hot targets."""
    exponential = xp.exp(logits - logits.max(axis=1, keepdims=True))
    probability = exponential / exponential.sum(axis=1, keepdims=True)
    target = xp.eye(logits.shape[1], dtype=logits.dtype)[labels]
    tiny = np.finfo(np.float32).tiny
    loss = -(target * xp.log(probability + tiny)).sum(axis=1).mean()
    return loss, (probability - target) / len(labels)


@pytest.mark.parametrize("body", ["softmax_nll", "naive"])
@pytest.mark.parametrize(("batch", "classes"), [(100, 10), (1024, 10), (4096, 1000), (512, 8192)])
def bench_loss(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    batch: int,
    classes: int,
    body: str,
) -> None:
    n, c = shrink(batch), shrink(classes)
    logits = random(n, c)
    labels = backend.asarray(np.random.default_rng(1).integers(0, c, n))
    xp = backend.xp
    if body == "naive":
        call: Callable[[], object] = lambda: _naive(xp, logits, labels)  # noqa: E731
    else:
        call = lambda: backend.softmax_nll(logits, labels)  # noqa: E731
    run(
        call,
        group=f"softmax-NLL, {batch} x {classes}",
        samples=n,
        nbytes=2 * logits.nbytes + labels.nbytes,
    )
