"""Optimizers, penalties and clipping against PyTorch's, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    Optimizer,
    Parameter,
    ParameterVector,
    RMSProp,
)
from nnx.backends import Backend

pytestmark = pytest.mark.torch

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], str, dict[str, Any]]] = {
    "sgd": (lambda **k: SGD(0.1, momentum=0.9, **k), "SGD", {"momentum": 0.9}),
    "adam": (lambda **k: Adam(0.1, **k), "Adam", {}),
    "adamw": (lambda **k: AdamW(0.1, **k), "AdamW", {}),
    "adamw settings": (
        lambda **k: AdamW(0.1, beta1=0.7, beta2=0.9, eps=1e-3, weight_decay=0.3, **k),
        "AdamW",
        {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    ),
    "adamw amsgrad": (lambda **k: AdamW(0.1, amsgrad=True, **k), "AdamW", {"amsgrad": True}),
    "amsgrad": (lambda **k: AMSGrad(0.1, **k), "Adam", {"amsgrad": True}),
    "amsgrad settings": (
        lambda **k: Adam(0.1, amsgrad=True, beta2=0.5, eps=1e-3, weight_decay=0.3, **k),
        "Adam",
        {"amsgrad": True, "betas": (0.9, 0.5), "eps": 1e-3, "weight_decay": 0.3},
    ),
    "adagrad": (lambda **k: AdaGrad(0.1, **k), "Adagrad", {}),
    "adagrad settings": (
        lambda **k: AdaGrad(0.1, lr_decay=0.2, initial=0.3, eps=1e-3, weight_decay=0.3, **k),
        "Adagrad",
        {"lr_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 1e-3, "weight_decay": 0.3},
    ),
    "rmsprop": (lambda **k: RMSProp(0.1, **k), "RMSprop", {}),
    "rmsprop momentum": (lambda **k: RMSProp(0.1, momentum=0.9, **k), "RMSprop", {"momentum": 0.9}),
    "rmsprop centered": (lambda **k: RMSProp(0.1, centered=True, **k), "RMSprop", {"centered": 1}),
    "rmsprop settings": (
        lambda **k: RMSProp(
            0.1, alpha=0.7, eps=1e-3, momentum=0.5, centered=True, weight_decay=0.3, **k
        ),
        "RMSprop",
        {"alpha": 0.7, "eps": 1e-3, "momentum": 0.5, "centered": True, "weight_decay": 0.3},
    ),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


class Pair:
    """The same parameters under one of our optimizers and under PyTorch's."""

    def __init__(
        self, torch: Any, backend: Backend, name: str, rng: np.random.Generator, **options: Any
    ) -> None:
        make, theirs, settings = OPTIMIZERS[name]
        values = [rng.standard_normal(s) for s in ((3, 5), (70,))]
        self.torch, self.backend, self.rng = torch, backend, rng
        self.parameters = [Parameter(backend.asarray(v)) for v in values]
        self.leaves = [torch.tensor(v, requires_grad=True) for v in values]
        self.ours = make(**options)
        self.theirs = getattr(torch.optim, theirs)(self.leaves, lr=0.1, **settings)
        self.ours.bind(ParameterVector(self.parameters))

    def step(self, alter: Callable[[], Any] = lambda: None) -> None:
        """A step of both on the same gradients; `alter` changes PyTorch's."""
        for p, leaf in zip(self.parameters, self.leaves, strict=True):
            gradient = self.rng.standard_normal(leaf.shape)
            p.accumulate()
            p.grad[...] = self.backend.asarray(gradient)
            leaf.grad = self.torch.tensor(gradient)
        alter()
        self.ours.step()
        self.theirs.step()
        for p, leaf in zip(self.parameters, self.leaves, strict=True):
            expected = leaf.detach().numpy()
            found = self.backend.to_numpy(p.value)
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@each
def test_five_steps(name: str, torch: Any, backend: Backend, rng: np.random.Generator) -> None:
    pair = Pair(torch, backend, name, rng)
    for _ in range(5):
        pair.step()


@each
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_by_norm(
    name: str, torch: Any, backend: Backend, rng: np.random.Generator, limit: float
) -> None:
    pair = Pair(torch, backend, name, rng, clip_norm=limit)
    for _ in range(3):
        pair.step(lambda: torch.nn.utils.clip_grad_norm_(pair.leaves, limit))


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_clipping_by_value(
    name: str, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    pair = Pair(torch, backend, name, rng, clip_value=0.5)
    for _ in range(3):
        pair.step(lambda: torch.nn.utils.clip_grad_value_(pair.leaves, 0.5))


@each
def test_penalties_are_those_of_autograd_and_are_clipped(
    name: str, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    pair = Pair(torch, backend, name, rng, l1=0.2, l2=0.7, clip_norm=1.0)

    def alter() -> None:
        penalty = sum(0.2 * leaf.abs().sum() + 0.35 * (leaf**2).sum() for leaf in pair.leaves)
        found = pair.backend.to_numpy(pair.ours.penalty())
        np.testing.assert_allclose(found, penalty.item(), rtol=1e-12)
        penalty.backward()  # adds to the gradients
        torch.nn.utils.clip_grad_norm_(pair.leaves, 1.0)

    for _ in range(3):
        pair.step(alter)


@each
def test_a_schedule_is_read_before_the_step(
    name: str, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    pair = Pair(torch, backend, name, rng)
    pair.ours.lr = lambda step: 0.1 * 0.5**step
    scheduler = torch.optim.lr_scheduler.ExponentialLR(pair.theirs, 0.5)
    for _ in range(4):
        pair.step()
        scheduler.step()


def test_defaults(torch: Any) -> None:
    leaf = [torch.zeros(1, requires_grad=True)]
    names = {"initial_accumulator_value": "initial"}
    for ours, theirs in (
        (AdamW(), torch.optim.AdamW),
        (Adam(), torch.optim.Adam),
        (AdaGrad(), torch.optim.Adagrad),
        (RMSProp(), torch.optim.RMSprop),
    ):
        defaults = theirs(leaf).defaults
        defaults |= dict(zip(("beta1", "beta2"), defaults.pop("betas", ()), strict=False))
        settings = vars(ours) | {"weight_decay": ours.weight_decay, "lr": ours.lr}
        shared = {n: d for n, d in defaults.items() if names.get(n, n) in settings}
        assert len(shared) >= 5
        for name, default in shared.items():
            assert settings[names.get(name, name)] == default, name
    # no rule of PyTorch's: the paper's own
    assert (Lion().lr, Lion().beta1, Lion().beta2, Lion().weight_decay) == (1e-4, 0.9, 0.99, 0)
