"""Losses against PyTorch's: values and gradients in float64 to a relative 1e-10."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx import (
    NLL,
    BCEWithLogits,
    Hinge,
    Huber,
    Loss,
    MeanAbsoluteError,
    SoftmaxMSE,
    SoftmaxNLL,
    SquaredHinge,
)
from nnx.backends import Backend

pytestmark = pytest.mark.torch


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def agree(
    torch: Any,
    backend: Backend,
    loss: Loss,
    theirs: Callable[[Any, Any], Any],
    prediction: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    **arguments: Any,
) -> None:
    """`theirs(prediction, target)` is the loss of PyTorch."""
    leaf = torch.tensor(prediction, requires_grad=True)
    expected = theirs(leaf, torch.tensor(target))
    expected.backward()
    there = None if weight is None else backend.asarray(weight)
    value, gradient = loss(backend.asarray(prediction), backend.asarray(target), there, **arguments)
    assert gradient is not None
    close = np.testing.assert_allclose
    close(backend.to_numpy(value), expected.detach().numpy(), rtol=1e-10, atol=1e-14)
    close(backend.to_numpy(gradient), leaf.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("weights", "smoothing", "ignore", "soft", "weighted"),
    list(itertools.product((False, True), repeat=5)),
)
def test_softmax_nll(
    weights: bool,
    smoothing: bool,
    ignore: bool,
    soft: bool,
    weighted: bool,
    torch: Any,
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    """What the table in the docstring calls the same is; the rest is with PyTorch's denominator."""
    cross_entropy = torch.nn.functional.cross_entropy
    logits = 3 * rng.standard_normal((9, 4))
    classes = np.array([0.5, 1, 2, 3]) if weights else None
    options: dict[str, Any] = {
        "weight": None if classes is None else torch.tensor(classes),
        "label_smoothing": 0.1 if smoothing else 0.0,
    }
    target = rng.uniform(0, 1, (9, 4)) if soft else rng.integers(0, 4, 9)
    if ignore and not soft:
        target[[2, 5]] = -100
        options["ignore_index"] = -100
    loss = SoftmaxNLL(classes, options["label_smoothing"], -100 if ignore else None)
    arguments: dict[str, Any] = {}
    weight = rng.uniform(0.2, 2, 9) if weighted else None
    if weights and soft:  # PyTorch divides by N there
        arguments["normalizer"] = 9.0 if weight is None else float(weight.sum())

    def theirs(z: Any, t: Any) -> Any:
        if weight is None:
            return cross_entropy(z, t, **options)
        shares = torch.tensor(weight)
        each = cross_entropy(z, t, reduction="none", **options)
        counts = shares
        if not soft:
            counts = shares * (1.0 if classes is None else torch.tensor(classes)[t.clamp(min=0)])
            counts = torch.where(t == -100, 0, counts)
        return (shares * each).sum() / counts.sum()

    agree(torch, backend, loss, theirs, logits, target, weight, **arguments)


def test_softmax_nll_of_images(torch: Any, backend: Backend, rng: np.random.Generator) -> None:
    """Leading axes are samples; PyTorch has the classes second."""
    logits, labels = rng.standard_normal((2, 3, 5, 4)), rng.integers(0, 4, (2, 3, 5))
    labels[0, 1] = -100

    def theirs(z: Any, t: Any) -> Any:
        return torch.nn.functional.cross_entropy(z.movedim(-1, 1), t)

    agree(torch, backend, SoftmaxNLL(ignore_index=-100), theirs, logits, labels)


def test_nll(torch: Any, backend: Backend, rng: np.random.Generator) -> None:
    p, labels = rng.uniform(0.1, 1, (9, 4)), rng.integers(0, 4, 9)
    nll = torch.nn.functional.nll_loss
    agree(torch, backend, NLL(), lambda p, t: nll(p.log(), t), p, labels)


def test_softmax_mse(torch: Any, backend: Backend, rng: np.random.Generator) -> None:
    functional = torch.nn.functional
    z, y = 3 * rng.standard_normal((9, 4)), rng.uniform(0, 1, (9, 4))
    theirs = lambda z, t: functional.mse_loss(functional.softmax(z, -1), t)  # noqa: E731
    agree(torch, backend, SoftmaxMSE(), theirs, z, y)


@pytest.mark.parametrize("shape", [(9, 4), (9, 1), (9,), (2, 3, 4)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["mae", "huber", "bce", "hinge", "squared hinge"])
def test_losses_of_numbers(
    name: str,
    weighted: bool,
    shape: tuple[int, ...],
    torch: Any,
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    functional = torch.nn.functional
    losses: dict[str, tuple[Loss, Callable[[Any, Any], Any]]] = {
        "mae": (MeanAbsoluteError(), lambda p, t: functional.l1_loss(p, t, reduction="none")),
        "huber": (
            Huber(0.7),
            lambda p, t: functional.huber_loss(p, t, delta=0.7, reduction="none"),
        ),
        "bce": (
            BCEWithLogits(),
            lambda p, t: functional.binary_cross_entropy_with_logits(p, t, reduction="none"),
        ),
        "hinge": (Hinge(), lambda p, t: (1 - p * t).clamp(min=0)),
        "squared hinge": (SquaredHinge(), lambda p, t: (1 - p * t).clamp(min=0) ** 2),
    }
    loss, each = losses[name]
    prediction, target = 2 * rng.standard_normal(shape), rng.standard_normal(shape)
    if "hinge" in name:
        target = np.sign(target)
    elif name == "bce":
        target = rng.uniform(0, 1, shape)
    else:
        prediction.flat[0] = target.flat[0]  # the kink of MAE
    samples = shape if len(shape) == 1 else shape[:-1]
    weight = rng.uniform(0.1, 2, samples) if weighted else None

    def theirs(p: Any, t: Any) -> Any:
        rows = each(p, t).reshape(*samples, -1).mean(-1)
        if weight is None:
            return rows.mean()
        shares = torch.tensor(weight)
        return (shares * rows).sum() / shares.sum()

    agree(torch, backend, loss, theirs, prediction, target, weight)


@pytest.mark.parametrize("pos_weight", [2.5, [0.5, 1.0, 4.0]])
def test_pos_weight(
    pos_weight: Any, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    x, t = 3 * rng.standard_normal((9, 3)), rng.integers(0, 2, (9, 3)).astype(np.float64)

    def theirs(p: Any, t: Any) -> Any:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            p, t, pos_weight=torch.tensor(pos_weight, dtype=torch.float64)
        )

    agree(torch, backend, BCEWithLogits(pos_weight), theirs, x, t)
