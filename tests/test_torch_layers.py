"""PyTorch as the judge of activations, normalizations and initializers, in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nnx
from nnx import Layer
from nnx.backends import Backend
from nnx.layers import Step

pytestmark = pytest.mark.torch

ACTIVATIONS: dict[str, tuple[Callable[[], Layer], Callable[[Any], Any]]] = {
    "Identity": (nnx.Identity, lambda nn: nn.Identity()),
    "LeakyReLU": (nnx.LeakyReLU, lambda nn: nn.LeakyReLU()),
    "LeakyReLU(0.3)": (lambda: nnx.LeakyReLU(0.3), lambda nn: nn.LeakyReLU(0.3)),
    "ELU": (nnx.ELU, lambda nn: nn.ELU()),
    "ELU(1.7)": (lambda: nnx.ELU(1.7), lambda nn: nn.ELU(1.7)),
    "SELU": (nnx.SELU, lambda nn: nn.SELU()),
    "GELU": (nnx.GELU, lambda nn: nn.GELU()),
    "GELU, tanh": (lambda: nnx.GELU("tanh"), lambda nn: nn.GELU("tanh")),
    "SiLU": (nnx.SiLU, lambda nn: nn.SiLU()),
    "Softplus": (nnx.Softplus, lambda nn: nn.Softplus()),
    "Softplus(2, 3)": (lambda: nnx.Softplus(2, 3), lambda nn: nn.Softplus(2, 3)),
    "HardSigmoid": (nnx.HardSigmoid, lambda nn: nn.Hardsigmoid()),
    "HardTanh": (nnx.HardTanh, lambda nn: nn.Hardtanh()),
    "HardTanh(-2, 0.5)": (lambda: nnx.HardTanh(-2, 0.5), lambda nn: nn.Hardtanh(-2, 0.5)),
    "HardSwish": (nnx.HardSwish, lambda nn: nn.Hardswish()),
    "Mish": (nnx.Mish, lambda nn: nn.Mish()),
    "Sigmoid": (nnx.Sigmoid, lambda nn: nn.Sigmoid()),
    "Tanh": (nnx.Tanh, lambda nn: nn.Tanh()),
    "Softmax": (nnx.Softmax, lambda nn: nn.Softmax(dim=-1)),
    "LogSoftmax": (nnx.LogSoftmax, lambda nn: nn.LogSoftmax(dim=-1)),
}
KINKS = [-3.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5, 3.0, 20.0]


@pytest.fixture
def torch() -> Any:
    import torch

    return torch


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    assert actual.dtype == np.float64
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-14)


def compare(
    ours: Layer,
    theirs: Any,
    x: np.ndarray,
    dy: np.ndarray,
    torch: Any,
    backend: Backend,
    step: Step | None = None,
    rtol: float = 1e-10,
) -> None:
    """Value and gradient of the input."""
    leaf = torch.tensor(x, requires_grad=True)
    expected = theirs(leaf)
    expected.backward(torch.tensor(dy))
    y, saved = ours.forward(backend.asarray(x), step=step)
    dx = ours.backward(backend.asarray(dy), saved)
    close(backend.to_numpy(y), expected)
    close(backend.to_numpy(dx), leaf.grad, rtol)


@pytest.mark.parametrize("shape", [(7, 6), (3, 1, 5), (1,)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(
    name: str, shape: tuple[int, ...], torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    make, module = ACTIVATIONS[name]
    # PyTorch's gradient of Hardsigmoid multiplies by 1 / 6 in float32, whatever the dtype
    rtol = 1e-7 if name == "HardSigmoid" else 1e-10
    for scale in (0.1, 3.0):
        x, dy = scale * rng.standard_normal(shape), rng.standard_normal(shape)
        compare(make(), module(torch.nn), x, dy, torch, backend, rtol=rtol)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_kinks_and_far_out(name: str, torch: Any, backend: Backend) -> None:
    make, module = ACTIVATIONS[name]
    x = np.array([*KINKS, -20.0, 30.0, -30.0, 700.0, -700.0, 1e4, -1e4])
    dy = np.linspace(1, 2, len(x))
    rtol = 1e-7 if name == "HardSigmoid" else 1e-10
    compare(make(), module(torch.nn), x, dy, torch, backend, rtol=rtol)


# ---- normalization -----------------------------------------------------------------------------


def randomize(ours: Any, theirs: Any, torch: Any, rng: np.random.Generator) -> None:
    """The same random weights and running statistics in both."""
    arrays = {"weight", "bias", "running_mean", "running_var"} & set(ours.state())
    for name in sorted(arrays):
        values = rng.uniform(0.5, 2, ours.n_features)
        ours.state()[name][...] = values
        getattr(theirs, name).data[...] = torch.tensor(values)


def same_gradients(ours: Layer, theirs: Any, backend: Backend) -> None:
    for name, p in ours.parameters():
        close(backend.to_numpy(p.grad), getattr(theirs, name).grad)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (1, 6), (3, 4, 6)])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "RMSNorm, eps"])
def test_normalization_over_features(
    name: str,
    shape: tuple[int, ...],
    affine: bool,
    torch: Any,
    backend: Backend,
    rng: np.random.Generator,
) -> None:
    nn, options = torch.nn, {"elementwise_affine": affine, "dtype": torch.float64}
    ours: Layer
    if name == "LayerNorm":
        ours = nnx.LayerNorm(6, affine=affine, dtype=np.float64)
        theirs = nn.LayerNorm(6, **options)
    else:
        eps = 1e-3 if name.endswith("eps") else None
        ours = nnx.RMSNorm(6, affine=affine, eps=eps, dtype=np.float64)
        theirs = nn.RMSNorm(6, eps=eps, **options)
    randomize(ours, theirs, torch, rng)
    ours.to(backend)
    x, dy = 2 + 3 * rng.standard_normal(shape), rng.standard_normal(shape)
    compare(ours, theirs, x, dy, torch, backend)
    same_gradients(ours, theirs, backend)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_batch_norm(
    n: int, affine: bool, torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    """Three batches in training, then one in evaluation, running statistics compared each time."""
    ours = nnx.BatchNorm(5, affine=affine, momentum=0.3, dtype=np.float64)
    theirs = torch.nn.BatchNorm1d(5, affine=affine, momentum=0.3, dtype=torch.float64)
    randomize(ours, theirs, torch, rng)
    ours.to(backend)
    state = backend.step_state()
    state.plan(np.zeros(1), dtype=np.float64)
    step = Step(0, state, [ours])
    for training in (True, True, True, False):
        theirs.train(training)
        theirs.zero_grad()
        for _, p in ours.parameters():
            p.fresh = True
        x, dy = 2 + 3 * rng.standard_normal((n, 5)), rng.standard_normal((n, 5))
        # of two samples dx is a difference of nearly equal numbers
        rtol = 1e-10 if n > 2 or not training else 1e-5
        compare(ours, theirs, x, dy, torch, backend, step if training else None, rtol)
        same_gradients(ours, theirs, backend)
        close(backend.to_numpy(ours.running_mean), theirs.running_mean)
        close(backend.to_numpy(ours.running_var), theirs.running_var)


def test_batch_norm_takes_leading_axes_as_samples(
    torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    """PyTorch has the features second: (N, C, L)."""
    ours = nnx.BatchNorm(5, dtype=np.float64).to(backend)
    theirs = torch.nn.BatchNorm1d(5, dtype=torch.float64)
    state = backend.step_state()
    state.plan(np.zeros(1), dtype=np.float64)
    x, dy = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 3, 5))

    def features_last(a: Any) -> Any:
        return theirs(a.transpose(1, 2)).transpose(1, 2)

    compare(ours, features_last, x, dy, torch, backend, Step(0, state, [ours]))
    same_gradients(ours, theirs, backend)


def test_defaults_are_the_same(torch: Any) -> None:
    nn = torch.nn
    for ours, theirs in (
        (nnx.BatchNorm(3), nn.BatchNorm1d(3)),
        (nnx.LayerNorm(3), nn.LayerNorm(3)),
        (nnx.RMSNorm(3), nn.RMSNorm(3)),
    ):
        assert ours.eps == theirs.eps
        names = {name for name, _ in theirs.state_dict().items()} - {"num_batches_tracked"}
        assert set(ours.state()) == names
    assert nnx.BatchNorm(3).momentum == nn.BatchNorm1d(3).momentum
    assert nnx.Softplus().config() == {
        "beta": nn.Softplus().beta,
        "threshold": nn.Softplus().threshold,
    }
    hard = nn.Hardtanh()
    assert nnx.HardTanh().config() == {"min_val": hard.min_val, "max_val": hard.max_val}
    assert nnx.LeakyReLU().config() == {"negative_slope": nn.LeakyReLU().negative_slope}
    assert nnx.ELU().config() == {"alpha": nn.ELU().alpha}
    assert nnx.GELU().approximate == nn.GELU().approximate


def test_both_refuse_a_batch_of_one(torch: Any) -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))
    # ours: tests/test_normalization.py


# ---- erf, columns, initializers ----------------------------------------------------------------


def test_erf(torch: Any, backend: Backend) -> None:
    x = np.linspace(-7, 7, 1001)
    ours = backend.to_numpy(backend.erf(backend.asarray(x)))
    np.testing.assert_allclose(ours, torch.erf(torch.tensor(x)).numpy(), rtol=2e-15)


def test_linear_takes_the_weights_of_torch_as_columns(
    torch: Any, backend: Backend, rng: np.random.Generator
) -> None:
    theirs = torch.nn.Linear(4, 3, dtype=torch.float64)
    weight, bias = (backend.asarray(p.detach().numpy()) for p in (theirs.weight, theirs.bias))
    ours = nnx.Linear.from_columns(weight, bias)
    x, dy = rng.standard_normal((7, 4)), rng.standard_normal((7, 3))
    compare(ours, theirs, x, dy, torch, backend)
    close(backend.to_numpy(ours.weight.grad), theirs.weight.grad.T)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (nnx.initializers.he_normal, "kaiming_normal_", {"nonlinearity": "relu"}),
        (nnx.initializers.he_uniform, "kaiming_uniform_", {"nonlinearity": "relu"}),
        (nnx.initializers.glorot_normal, "xavier_normal_", {}),
        (nnx.initializers.glorot_uniform, "xavier_uniform_", {}),
        (nnx.initializers.lecun_normal, "kaiming_normal_", {"nonlinearity": "linear"}),
        (nnx.initializers.lecun_uniform, "kaiming_uniform_", {"nonlinearity": "linear"}),
    ],
)
def test_initializers_have_the_variance_of_torch(
    ours: Any, theirs: str, options: dict[str, Any], torch: Any
) -> None:
    torch.manual_seed(0)
    weight = torch.empty(300, 784, dtype=torch.float64)  # (n_out, n_in)
    getattr(torch.nn.init, theirs)(weight, **options)
    drawn = ours((784, 300), np.random.default_rng(0))
    # two estimates of one deviation, each from 235,200 draws: 4 sigma of their quotient
    assert float(drawn.std() / weight.std()) == pytest.approx(1, abs=4 / math.sqrt(235_200))
