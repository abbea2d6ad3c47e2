"""PyTorch as the judge of everything that both have, in float64."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nnx import (
    SGD,
    Adam,
    Flatten,
    Layer,
    Linear,
    Loss,
    MeanSquaredError,
    Optimizer,
    Parameter,
    ParameterVector,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
    SoftmaxNLL,
    Tanh,
    Trainer,
)
from nnx.backends import Backend

pytestmark = pytest.mark.torch


@pytest.fixture
def torch() -> Any:
    import torch

    return torch


def close(actual: Any, expected: Any) -> None:
    assert actual.dtype == np.float64
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-14)


def pairs(torch: Any) -> dict[str, Callable[[], tuple[Layer, Any]]]:
    """Each layer, and the one of PyTorch; weights are copied afterwards."""
    nn = torch.nn
    rng = np.random.default_rng(0)

    def linear(n_in: int, n_out: int, bias: bool = True) -> tuple[Layer, Any]:
        ours = Linear(n_in, n_out, bias=bias, rng=rng, dtype=np.float64)
        return ours, nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64)

    def sequence(*parts: tuple[Layer, Any]) -> tuple[Layer, Any]:
        return Sequential(*(p[0] for p in parts)), nn.Sequential(*(p[1] for p in parts))

    return {
        "linear": lambda: linear(6, 5),
        "linear without bias": lambda: linear(6, 5, bias=False),
        "relu": lambda: (ReLU(), nn.ReLU()),
        "sigmoid": lambda: (Sigmoid(), nn.Sigmoid()),
        "tanh": lambda: (Tanh(), nn.Tanh()),
        "softmax": lambda: (Softmax(), nn.Softmax(dim=-1)),
        "flatten": lambda: (Flatten(), nn.Flatten()),
        "sequential": lambda: sequence(
            linear(6, 9), (ReLU(), nn.ReLU()), linear(9, 7), (Tanh(), nn.Tanh()), linear(7, 5)
        ),
    }


NAMES = [
    "linear",
    "linear without bias",
    "relu",
    "sigmoid",
    "tanh",
    "softmax",
    "flatten",
    "sequential",
]


def linears(ours: Layer, theirs: Any, torch: Any) -> Iterator[tuple[Linear, Any]]:
    found = [layer for layer in ours.layers() if isinstance(layer, Linear)]
    modules = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    yield from zip(found, modules, strict=True)


def copy_weights(ours: Layer, theirs: Any, torch: Any, rng: np.random.Generator) -> None:
    for layer, module in linears(ours, theirs, torch):
        weight = rng.standard_normal((layer.n_in, layer.n_out)) / layer.n_in**0.5
        layer.weight.value[...] = weight
        module.weight.data = torch.tensor(weight.T)
        if layer.bias is not None:
            bias = rng.standard_normal(layer.n_out)
            layer.bias.value[...] = bias
            module.bias.data = torch.tensor(bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 6), (1, 6), (3, 4, 6)])
def test_layers(
    name: str, shape: tuple[int, ...], torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    ours, theirs = pairs(torch)[name]()
    copy_weights(ours, theirs, torch, rng)
    ours.to(backend)
    x = 3 * rng.standard_normal(shape)
    leaf = torch.tensor(x, requires_grad=True)
    expected = theirs(leaf)
    dy = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(dy))
    y, saved = ours.forward(backend.asarray(x))
    dx = ours.backward(backend.asarray(dy), saved)
    close(backend.to_numpy(y), expected)
    close(backend.to_numpy(dx), leaf.grad)
    for layer, module in linears(ours, theirs, torch):
        close(backend.to_numpy(layer.weight.grad), module.weight.grad.T)
        if layer.bias is not None:
            close(backend.to_numpy(layer.bias.grad), module.bias.grad)


def test_relu_at_its_kink_and_at_nan(torch: Any, backend: Backend) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, 5e-324])
    leaf = torch.tensor(x, requires_grad=True)
    torch.nn.ReLU()(leaf).backward(torch.ones(5, dtype=torch.float64))
    y, saved = ReLU().forward(backend.asarray(x))
    dx = ReLU().backward(backend.asarray(np.ones(5)), saved)
    np.testing.assert_array_equal(backend.to_numpy(y), torch.nn.ReLU()(leaf).detach().numpy())
    np.testing.assert_array_equal(backend.to_numpy(dx), leaf.grad.numpy())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 4), (1, 1), (3, 5, 4)])
@pytest.mark.parametrize("kind", ["nll", "mse"])
def test_losses(
    kind: str,
    weighted: bool,
    shape: tuple[int, ...],
    torch: Any,
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    x = 5 * rng.standard_normal(shape)
    rows = (-1, shape[-1])
    weight = rng.uniform(0.1, 3, shape[:-1]) if weighted else None
    leaf = torch.tensor(x, requires_grad=True)
    functional = torch.nn.functional
    loss: Loss
    t: Any
    if kind == "nll":
        loss, t = SoftmaxNLL(), rng.integers(0, shape[-1], shape[:-1])
        flat, labels = leaf.reshape(rows), torch.tensor(t).reshape(-1)
        each = functional.cross_entropy(flat, labels, reduction="none")
        mean = functional.cross_entropy(flat, labels)
    else:
        loss, t = MeanSquaredError(), rng.standard_normal(shape)
        each = functional.mse_loss(leaf, torch.tensor(t), reduction="none").mean(-1).reshape(-1)
        mean = functional.mse_loss(leaf, torch.tensor(t))
    if weight is not None:
        shares = torch.tensor(weight).reshape(-1)
        mean = (each * shares).sum() / shares.sum()
    mean.backward()
    there = None if weight is None else backend.asarray(weight)
    value, gradient = loss(backend.asarray(x), backend.asarray(t), there)
    close(backend.to_numpy(value), mean)
    assert gradient is not None
    close(backend.to_numpy(gradient), leaf.grad)


def test_class_weights_are_sample_weights(
    torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    # torch's `weight` of classes: divided by the sum of the weights of the labels, as here
    x, t = rng.standard_normal((9, 4)), rng.integers(0, 4, 9)
    classes = np.array([0.5, 1, 2, 3])
    leaf = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        leaf, torch.tensor(t), weight=torch.tensor(classes)
    )
    expected.backward()
    value, gradient = SoftmaxNLL()(*map(backend.asarray, (x, t, classes[t])))
    close(backend.to_numpy(value), expected)
    assert gradient is not None
    close(backend.to_numpy(gradient), leaf.grad)


OPTIMIZERS: dict[str, tuple[Callable[[], Optimizer], str, dict[str, Any]]] = {
    "sgd": (lambda: SGD(0.1), "SGD", {}),
    "sgd decay": (lambda: SGD(0.1, weight_decay=0.2), "SGD", {"weight_decay": 0.2}),
    "momentum": (lambda: SGD(0.1, momentum=0.9), "SGD", {"momentum": 0.9}),
    "momentum decay": (
        lambda: SGD(0.1, momentum=0.9, weight_decay=0.2),
        "SGD",
        {"momentum": 0.9, "weight_decay": 0.2},
    ),
    "nesterov": (
        lambda: SGD(0.1, momentum=0.9, nesterov=True),
        "SGD",
        {"momentum": 0.9, "nesterov": True},
    ),
    "nesterov decay": (
        lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.2),
        "SGD",
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    ),
    "adam": (lambda: Adam(0.1), "Adam", {}),
    "adam decay": (lambda: Adam(0.1, weight_decay=0.2), "Adam", {"weight_decay": 0.2}),
    "adam settings": (
        lambda: Adam(0.1, beta1=0.7, beta2=0.9, eps=1e-3),
        "Adam",
        {"betas": (0.7, 0.9), "eps": 1e-3},
    ),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_three_steps_of_optimizers(
    name: str, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    make, theirs, settings = OPTIMIZERS[name]
    values = [rng.standard_normal(s) for s in ((3, 5), (70,))]
    parameters = [Parameter(backend.asarray(v)) for v in values]
    leaves = [torch.tensor(v, requires_grad=True) for v in values]
    ours, other = make(), getattr(torch.optim, theirs)(leaves, lr=0.1, **settings)
    ours.bind(ParameterVector(parameters))
    for _ in range(3):
        for p, leaf in zip(parameters, leaves, strict=True):
            gradient = rng.standard_normal(leaf.shape)
            p.accumulate()
            p.grad[...] = backend.asarray(gradient)
            leaf.grad = torch.tensor(gradient)
        ours.step()
        other.step()
        for p, leaf in zip(parameters, leaves, strict=True):
            close(backend.to_numpy(p.value), leaf)


def test_defaults_are_those_of_torch(torch: Any) -> None:
    leaf = [torch.zeros(1, requires_grad=True)]
    adam, ours = torch.optim.Adam(leaf).defaults, Adam()
    assert adam["betas"] == (ours.beta1, ours.beta2)
    assert (adam["lr"], adam["eps"], adam["weight_decay"]) == (ours.lr, ours.eps, ours.weight_decay)
    sgd, plain = torch.optim.SGD(leaf).defaults, SGD()
    names = ("lr", "momentum", "nesterov", "weight_decay")
    assert [sgd[n] for n in names] == [getattr(plain, n) for n in names]


@each_optimizer
@pytest.mark.parametrize("kind", ["nll", "mse"])
def test_twenty_steps_of_a_network(
    name: str, kind: str, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    make, theirs, settings = OPTIMIZERS[name]
    model, net = pairs(torch)["sequential"]()
    copy_weights(model, net, torch, rng)
    start = copy.deepcopy(net.state_dict())
    loss: Loss = SoftmaxNLL() if kind == "nll" else MeanSquaredError()
    trainer = Trainer(model, loss, make(), backend=backend)
    other = getattr(torch.optim, theirs)(net.parameters(), lr=0.1, **settings)
    functional = torch.nn.functional
    criterion = functional.cross_entropy if kind == "nll" else functional.mse_loss
    for _ in range(20):
        x = rng.standard_normal((16, 6))
        t = rng.integers(0, 5, 16) if kind == "nll" else rng.standard_normal((16, 5))
        value = backend.to_numpy(trainer.train_step(backend.asarray(x), backend.asarray(t)))
        other.zero_grad()
        expected = criterion(net(torch.tensor(x)), torch.tensor(t))
        expected.backward()
        other.step()
        # rounding grows from step to step, and Adam divides by small numbers
        np.testing.assert_allclose(value, expected.item(), rtol=1e-8)
    for layer, module in linears(model, net, torch):
        assert layer.bias is not None
        for p, tensor in ((layer.weight, module.weight.T), (layer.bias, module.bias)):
            found = backend.to_numpy(p.value)
            np.testing.assert_allclose(found, tensor.detach().numpy(), rtol=1e-7, atol=1e-9)
    assert not torch.equal(start["0.weight"], net.state_dict()["0.weight"])
