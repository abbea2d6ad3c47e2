"""One contract for every layer, run over the list `CASES`; then what only some layers promise."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import layer_oracles
import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

import nnx
from nnx import (
    SGD,
    Adam,
    Dropout,
    Flatten,
    Layer,
    Linear,
    ParameterVector,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
    SoftmaxNLL,
    Tanh,
    Trainer,
    check_gradients,
    initializers,
    mlp,
)
from nnx.backends import Backend, backend_of
from nnx.initializers import zeros
from nnx.layers import Step

Result = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]
"""Output, gradient of the input, gradients of the parameters by name."""


class Case(NamedTuple):
    """A layer, an input it takes, and what it must compute with which parameters."""

    name: str
    make: Callable[[Any], Layer]
    shape: tuple[int, ...]
    oracle: Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray, bool], Result]

    def __repr__(self) -> str:
        return self.name


SEED, NUMBER = 11, 6  # of the Step that the contract trains with


def plain(function: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]) -> Any:
    return lambda p, x, dy, training: (*function(x, dy), {})


def linear_oracle(
    p: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray, training: bool
) -> Result:
    y, dx, dweight, dbias = oracles.linear(x, p["weight"], p.get("bias"), dy)
    return y, dx, {"weight": dweight} | ({"bias": dbias} if "bias" in p else {})


def normalization_oracle(eps: float, over_samples: bool = False, centered: bool = True) -> Any:
    """In evaluation a new BatchNorm has the statistics 0 and 1."""

    def oracle(p: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray, training: bool) -> Result:
        fixed = (np.zeros(x.shape[-1]), np.ones(x.shape[-1]))
        y, dx, dweight, dbias = layer_oracles.normalization(
            x,
            dy,
            p.get("weight"),
            p.get("bias"),
            eps,
            over_samples=over_samples,
            centered=centered,
            statistics=fixed if over_samples and not training else None,
        )
        found = {"weight": dweight, "bias": dbias}
        return y, dx, {name: found[name] for name in p}

    return oracle


def rms_oracle(p: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray, training: bool) -> Result:
    """Without an eps it is the machine epsilon of the dtype."""
    eps = float(np.finfo(x.dtype).eps)
    result: Result = normalization_oracle(eps, centered=False)(p, x, dy, training)
    return result


def dropout_oracle(share: float, stream: int = 0) -> Any:
    def oracle(p: Any, x: np.ndarray, dy: np.ndarray, training: bool) -> Result:
        if not training:
            return x.astype(np.float64), dy.astype(np.float64), {}
        dropped = oracles.dropped(share, x.shape, SEED, stream, 0, NUMBER)
        scale = 1 / (1 - share) if share < 1 else 0.0
        y, dx = (np.where(dropped, 0, a.astype(np.float64) * scale) for a in (x, dy))
        return y, dx, {}

    return oracle


def flatten_oracle(p: Any, x: np.ndarray, dy: np.ndarray, training: bool) -> Result:
    numbers = np.array([float(a) for a in x.ravel()])
    y = numbers.reshape(len(x), math.prod(x.shape[1:]))
    return y, np.array(dy.ravel(), np.float64).reshape(x.shape), {}


def chain(*links: Any) -> Any:
    """The oracle of a Sequential from those of its layers."""

    def oracle(p: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray, training: bool) -> Result:
        own: list[dict[str, np.ndarray]] = [{} for _ in links]
        for name, array in p.items():
            i, _, rest = name.partition(".")
            own[int(i)][rest] = array
        inputs = [x]
        for link, parameters in zip(links, own, strict=True):
            inputs.append(
                link(parameters, inputs[-1], zeros_out(parameters, link, inputs[-1]), training)[0]
            )
        gradients: dict[str, np.ndarray] = {}
        back = dy
        for k in reversed(range(len(links))):
            _, back, found = links[k](own[k], inputs[k], back, training)
            gradients |= {f"{k}.{name}": g for name, g in found.items()}
        return inputs[-1], back, gradients

    return oracle


def zeros_out(parameters: dict[str, np.ndarray], link: Any, x: np.ndarray) -> np.ndarray:
    """A dy of the output's shape, for a forward pass alone."""
    if link is flatten_oracle:
        return np.zeros((len(x), math.prod(x.shape[1:])))
    width = parameters["weight"].shape[1] if parameters else x.shape[-1]
    return np.zeros((*x.shape[:-1], width))


def always(layer: Layer) -> Callable[[Any], Layer]:
    return lambda dtype: layer


def draw() -> np.random.Generator:
    return np.random.default_rng(5)


CASES = [
    Case("Linear", lambda d: Linear(4, 3, rng=draw(), dtype=d), (5, 4), linear_oracle),
    Case(
        "Linear without bias",
        lambda d: Linear(4, 3, bias=False, rng=draw(), dtype=d),
        (5, 4),
        linear_oracle,
    ),
    Case("Linear 3-D", lambda d: Linear(4, 3, rng=draw(), dtype=d), (2, 5, 4), linear_oracle),
    Case("Linear 1-D", lambda d: Linear(4, 3, rng=draw(), dtype=d), (4,), linear_oracle),
    Case("Linear 1-1", lambda d: Linear(1, 1, rng=draw(), dtype=d), (1, 1), linear_oracle),
    Case("Linear 33-31", lambda d: Linear(33, 31, rng=draw(), dtype=d), (31, 33), linear_oracle),
    Case("ReLU", lambda d: ReLU(), (5, 4), plain(oracles.relu)),
    Case("ReLU 3-D", lambda d: ReLU(), (3, 11, 3), plain(oracles.relu)),
    Case("Sigmoid", lambda d: Sigmoid(), (5, 4), plain(oracles.sigmoid)),
    Case("Tanh", lambda d: Tanh(), (5, 4), plain(oracles.tanh)),
    Case("Softmax", lambda d: Softmax(), (5, 4), plain(oracles.softmax)),
    Case("Softmax 3-D", lambda d: Softmax(), (3, 2, 33), plain(oracles.softmax)),
    Case("Softmax of one", lambda d: Softmax(), (5, 1), plain(oracles.softmax)),
    *(
        Case(repr(layer), always(layer), (5, 4), plain(layer_oracles.activation(f)))
        for layer, f in [
            (nnx.Identity(), layer_oracles.identity()),
            (nnx.LeakyReLU(), layer_oracles.leaky_relu()),
            (nnx.LeakyReLU(0.3), layer_oracles.leaky_relu(0.3)),
            (nnx.ELU(), layer_oracles.elu()),
            (nnx.ELU(1.7), layer_oracles.elu(1.7)),
            (nnx.SELU(), layer_oracles.selu()),
            (nnx.GELU(), layer_oracles.gelu()),
            (nnx.GELU("tanh"), layer_oracles.gelu_tanh()),
            (nnx.SiLU(), layer_oracles.silu()),
            (nnx.Softplus(), layer_oracles.softplus()),
            (nnx.Softplus(2.0, 0.5), layer_oracles.softplus(2.0, 0.5)),
            (nnx.HardSigmoid(), layer_oracles.hard_sigmoid()),
            (nnx.HardTanh(), layer_oracles.hard_tanh()),
            (nnx.HardTanh(-0.25, 2.0), layer_oracles.hard_tanh(-0.25, 2.0)),
            (nnx.HardSwish(), layer_oracles.hard_swish()),
            (nnx.Mish(), layer_oracles.mish()),
        ]
    ),
    Case(
        "GELU 3-D",
        lambda d: nnx.GELU(),
        (3, 2, 33),
        plain(layer_oracles.activation(layer_oracles.gelu())),
    ),
    Case("LogSoftmax", lambda d: nnx.LogSoftmax(), (5, 4), plain(layer_oracles.log_softmax)),
    Case(
        "LogSoftmax 3-D", lambda d: nnx.LogSoftmax(), (3, 2, 33), plain(layer_oracles.log_softmax)
    ),
    Case("LogSoftmax of one", lambda d: nnx.LogSoftmax(), (5, 1), plain(layer_oracles.log_softmax)),
    # two samples in each row of the batch, so that training has two of them for any first axis
    Case(
        "BatchNorm",
        lambda d: nnx.BatchNorm(3, dtype=d),
        (5, 2, 3),
        normalization_oracle(1e-5, over_samples=True),
    ),
    Case(
        "BatchNorm without weights",
        lambda d: nnx.BatchNorm(3, affine=False, eps=0.1, dtype=d),
        (5, 2, 3),
        normalization_oracle(0.1, over_samples=True),
    ),
    Case("LayerNorm", lambda d: nnx.LayerNorm(4, dtype=d), (5, 4), normalization_oracle(1e-5)),
    Case(
        "LayerNorm 3-D",
        lambda d: nnx.LayerNorm(33, dtype=d),
        (3, 2, 33),
        normalization_oracle(1e-5),
    ),
    Case("LayerNorm 1-D", lambda d: nnx.LayerNorm(4, dtype=d), (4,), normalization_oracle(1e-5)),
    Case(
        "LayerNorm without weights",
        lambda d: nnx.LayerNorm(4, affine=False, eps=0.1, dtype=d),
        (5, 4),
        normalization_oracle(0.1),
    ),
    Case("RMSNorm", lambda d: nnx.RMSNorm(4, dtype=d), (5, 4), rms_oracle),
    Case("RMSNorm 3-D", lambda d: nnx.RMSNorm(33, dtype=d), (3, 2, 33), rms_oracle),
    Case(
        "RMSNorm without weights",
        lambda d: nnx.RMSNorm(4, affine=False, eps=0.1, dtype=d),
        (5, 4),
        normalization_oracle(0.1, centered=False),
    ),
    Case("Dropout", lambda d: Dropout(0.3), (7, 9), dropout_oracle(0.3)),
    Case("Dropout p=0", lambda d: Dropout(0), (7, 9), dropout_oracle(0)),
    Case("Dropout p=1", lambda d: Dropout(1), (7, 9), dropout_oracle(1)),
    Case("Flatten", lambda d: Flatten(), (3, 2, 5), flatten_oracle),
    Case("Flatten 2-D", lambda d: Flatten(), (3, 5), flatten_oracle),
    Case(
        "Sequential",
        lambda d: Sequential(
            Linear(4, 6, rng=draw(), dtype=d), Tanh(), Linear(6, 3, rng=draw(), dtype=d)
        ),
        (5, 4),
        chain(linear_oracle, plain(oracles.tanh), linear_oracle),
    ),
    Case(
        "Sequential fused",
        lambda d: Sequential(
            Dropout(0.3),
            Linear(4, 6, rng=draw(), dtype=d),
            ReLU(),
            Linear(6, 3, rng=draw(), dtype=d),
            ReLU(),
        ),
        (5, 4),
        chain(
            dropout_oracle(0.3, stream=1),  # stream 0 is the Sequential itself
            linear_oracle,
            plain(oracles.relu),
            linear_oracle,
            plain(oracles.relu),
        ),
    ),
    Case(
        "Sequential from images",
        lambda d: Sequential(Flatten(), Linear(10, 3, rng=draw(), dtype=d), Softmax()),
        (3, 2, 5),
        chain(flatten_oracle, linear_oracle, plain(oracles.softmax)),
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=repr)


class Bench:
    """A layer of a case on a backend, all its parameters random, and the arrays to feed it."""

    def __init__(self, case: Case, backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
        self.case, self.backend, self.rng = case, backend, rng
        self.dtype = np.dtype(dtype)
        self.layer = case.make(dtype).to(backend)
        for _, p in self.layer.parameters():
            p.value[...] = self.random(p.value.shape)

    def random(self, shape: tuple[int, ...]) -> Any:
        return self.backend.asarray(self.rng.standard_normal(shape).astype(self.dtype))

    def step(self) -> Step:
        state = self.backend.step_state()
        state.number = NUMBER
        state.plan(np.zeros(1), dtype=self.dtype)
        return Step(SEED, state, list(self.layer.layers()))

    def values(self) -> dict[str, np.ndarray]:
        return {n: self.host(p.value).copy() for n, p in self.layer.parameters()}

    def gradients(self) -> dict[str, np.ndarray]:
        return {n: self.host(p.grad).copy() for n, p in self.layer.parameters()}

    def begin(self) -> None:
        for _, p in self.layer.parameters():
            p.fresh = True
            p.grad.fill(np.nan)

    def host(self, a: Any) -> np.ndarray:
        return self.backend.to_numpy(a)

    def check(self, x: Any, dy: Any, step: Step | None) -> None:
        """Forward and backward give what the oracle says."""
        self.begin()
        y, saved = self.layer.forward(x, step=step)
        dx = self.layer.backward(dy, saved)
        assert backend_of(y, dx) is self.backend
        expected = self.case.oracle(self.values(), self.host(x), self.host(dy), step is not None)
        depth = max(x.shape)
        assert_close(self.host(y), expected[0], depth=depth, dtype=self.dtype)
        assert_close(self.host(dx), expected[1], depth=depth, dtype=self.dtype)
        gradients = self.gradients()
        assert gradients.keys() == expected[2].keys()
        for name, gradient in gradients.items():
            assert_close(gradient, expected[2][name], depth=depth, dtype=self.dtype)

    def output_shape(self, x: Any) -> tuple[int, ...]:
        return tuple(self.layer(x).shape)


@pytest.fixture
def bench(case: Case, backend: Backend, dtype: Any, rng: np.random.Generator) -> Bench:
    return Bench(case, backend, dtype, rng)


def arrays_in(saved: Any) -> Iterator[Any]:
    if isinstance(saved, (tuple, list)):
        for item in saved:
            yield from arrays_in(item)
    elif hasattr(saved, "dtype"):
        yield saved


def test_no_layer_is_without_a_case() -> None:
    covered = {type(case.make(np.float32)).__name__ for case in CASES}
    assert covered == set(nnx.layers.__all__) - {"Layer", "Step"}


# ---- the contract ----------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("training", [False, True])
def test_layer_agrees_with_the_loops(bench: Bench, training: bool) -> None:
    x = bench.random(bench.case.shape)
    dy = bench.random(bench.output_shape(x))
    bench.check(x, dy, bench.step() if training else None)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.shape) > 1], ids=repr)
@pytest.mark.parametrize("n", [0, 1, 31, 33, 257])
def test_layer_takes_any_number_of_samples(bench: Bench, n: int) -> None:
    x = bench.random((n, *bench.case.shape[1:]))
    bench.check(x, bench.random(bench.output_shape(x)), bench.step())


def transposed(backend: Backend, a: Any) -> Any:
    return backend.asarray(a.T).T


def every_second(backend: Backend, a: Any) -> Any:
    wide = backend.xp.full((2 * a.shape[0], *a.shape[1:]), np.nan, a.dtype)
    wide[::2] = a
    return wide[::2]


def every_second_column(backend: Backend, a: Any) -> Any:
    wide = backend.xp.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def backwards(backend: Backend, a: Any) -> Any:
    return backend.asarray(a[::-1])[::-1]


def broadcast(backend: Backend, a: Any) -> Any:
    """Rows that are all the first one; read-only on NumPy."""
    return backend.xp.broadcast_to(a[:1], a.shape)


LAYOUTS = [transposed, every_second, every_second_column, backwards, broadcast]


@each_case
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layer_takes_any_layout(bench: Bench, layout: Callable[[Backend, Any], Any]) -> None:
    x = bench.random(bench.case.shape)
    dy = bench.random(bench.output_shape(x))
    bench.check(layout(bench.backend, x), layout(bench.backend, dy), bench.step())


@each_case
def test_layer_writes_to_nothing_it_was_given(bench: Bench) -> None:
    x = bench.random(bench.case.shape)
    dy = bench.random(bench.output_shape(x))
    before = [bench.host(a).copy() for a in (x, dy)]
    values = bench.values()
    y, saved = bench.layer.forward(x, step=bench.step())
    kept = [bench.host(a).copy() for a in (y, *arrays_in(saved))]
    bench.begin()
    bench.layer.backward(dy, saved)
    for array, copy in zip((x, dy), before, strict=True):
        assert_same_bits(bench.host(array), copy)
    for array, copy in zip((y, *arrays_in(saved)), kept, strict=True):
        assert_same_bits(bench.host(array), copy)
    for name, value in bench.values().items():
        assert_same_bits(value, values[name])


@each_case
def test_layer_without_need_dx_gives_the_same_parameter_gradients(bench: Bench) -> None:
    x = bench.random(bench.case.shape)
    dy = bench.random(bench.output_shape(x))
    _, saved = bench.layer.forward(x, step=bench.step())
    bench.begin()
    bench.layer.backward(dy, saved)
    expected = bench.gradients()
    bench.begin()
    assert bench.layer.backward(dy, saved, need_dx=False) is None
    for name, gradient in bench.gradients().items():
        assert_same_bits(gradient, expected[name])


@each_case
def test_layer_called_evaluates(bench: Bench) -> None:
    x = bench.random(bench.case.shape)
    y, _ = bench.layer.forward(x)
    assert_same_bits(bench.host(bench.layer(x)), bench.host(y))


@each_case
def test_layer_used_twice_adds_its_gradients(bench: Bench) -> None:
    # two forward passes first, so nothing may be kept in the layer; then either order of backward
    xs = [bench.random(bench.case.shape) for _ in range(2)]
    dys = [bench.random(bench.output_shape(x)) for x in xs]
    separate = []
    for x, dy in zip(xs, dys, strict=True):
        bench.begin()
        y, saved = bench.layer.forward(x)
        dx = bench.layer.backward(dy, saved)
        separate.append((bench.host(y).copy(), bench.host(dx).copy(), bench.gradients()))
    for order in ((0, 1), (1, 0)):
        bench.begin()
        passes = [bench.layer.forward(x) for x in xs]
        for i in order:
            dx = bench.layer.backward(dys[i], passes[i][1])
            assert_same_bits(bench.host(passes[i][0]), separate[i][0])
            assert_same_bits(bench.host(dx), separate[i][1])
        for name, gradient in bench.gradients().items():
            parts = [s[2][name].astype(np.float64) for s in separate]
            assert_close(gradient, parts[0] + parts[1], dtype=bench.dtype)


@each_case
def test_layer_forward_runs_in_two_threads(bench: Bench) -> None:
    xs = [bench.random(bench.case.shape) for _ in range(2)]
    expected = [bench.host(bench.layer(x)).copy() for x in xs]
    barrier = threading.Barrier(2)
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        barrier.wait()
        with bench.backend.activate():
            found[i] = [bench.host(bench.layer(xs[i])).copy() for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for y in found[i]:
            assert_same_bits(y, expected[i])


@each_case
def test_gradients_are_the_derivatives(
    case: Case, backend: Backend, rng: np.random.Generator
) -> None:
    layer = case.make(np.float64).to(backend)
    x = rng.standard_normal(case.shape)
    assert check_gradients(layer, x, rng=rng, backend=backend) < 1e-7


@each_case
def test_layer_is_built_again_from_its_config(case: Case) -> None:
    layer = case.make(np.float64)

    def rebuild(part: Layer) -> Layer:
        children = {name: rebuild(child) for name, child in part.children()}
        return type(part).from_config(part.config(), children)

    again = rebuild(layer)
    assert repr(again) == repr(layer)
    again.load_state(layer.state())
    x = np.random.default_rng(0).standard_normal(case.shape)
    assert_same_bits(again(x), layer(x))


@pytest.mark.parametrize("layer", [ReLU(), Sigmoid(), Tanh(), Softmax(), Dropout(0.5)], ids=repr)
@pytest.mark.parametrize("kind", ["int64", "float16", "complex128", "bool"])
def test_activations_take_only_float32_and_float64(layer: Layer, kind: str) -> None:
    with pytest.raises(TypeError, match=f"expected float32 or float64, got {kind}"):
        layer(np.ones((2, 3), kind))


# ---- Linear ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "count"), [([2, 3, 1], 13), ([784, 50, 10], 39760), ([784, 512, 512, 10], 669706)]
)
def test_parameter_counts(sizes: list[int], count: int) -> None:
    model = mlp(sizes)
    assert sum(p.value.size for _, p in model.parameters()) == count
    assert ParameterVector([p for _, p in model.parameters()]).size == count


def test_linear_draws_he_normal_weights_and_zero_biases() -> None:
    layer = Linear(200, 100, rng=np.random.default_rng(3))
    assert layer.bias is not None
    assert not layer.bias.value.any()
    weight = initializers.he_normal((200, 100), np.random.default_rng(3))
    assert_same_bits(layer.weight.value, weight.astype(np.float32))


@pytest.mark.parametrize(
    ("initializer", "variance", "bound"),
    [
        (initializers.he_normal, 2 / 300, None),
        (initializers.he_uniform, 2 / 300, (6 / 300) ** 0.5),
        (initializers.glorot_normal, 2 / 500, None),
        (initializers.glorot_uniform, 2 / 500, (6 / 500) ** 0.5),
        (initializers.zeros, 0, 0),
    ],
)
def test_initializers_have_the_variance_they_promise(
    initializer: initializers.Initializer, variance: float, bound: float | None
) -> None:
    weight = initializer((300, 200), np.random.default_rng(3))
    assert weight.shape == (300, 200)
    assert weight.dtype == np.float64
    deviation = float(weight.std())
    assert abs(float(weight.mean())) <= 5 * deviation / 60_000**0.5
    assert deviation**2 == pytest.approx(variance, rel=0.03)
    if bound is not None:
        assert bound * 0.999 <= float(np.abs(weight).max()) <= bound


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (32, 28, 28),
            r"Linear: expected last axis 784, got input of shape \(32, 28, 28\); flatten",
        ),
        ((32, 783), r"expected last axis 784, got input of shape \(32, 783\)$"),
        ((), r"expected last axis 784, got input of shape \(\)"),
    ],
)
def test_linear_names_the_widths_that_differ(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp([784, 10])(np.ones(shape, np.float32))


def test_linear_names_the_dtypes_that_differ() -> None:
    with pytest.raises(
        TypeError, match=r"expected float32 input, got float64; .*astype\('float32'\)"
    ):
        mlp([3, 2])(np.ones((5, 3)))
    with pytest.raises(TypeError, match="expected float64 input, got int64"):
        mlp([3, 2], dtype=np.float64)(np.ones((5, 3), np.int64))


def test_linear_names_bad_arguments() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="got 0 and 7"):
        Linear(0, 7, rng=rng)
    with pytest.raises(ValueError, match="got 7 and -1"):
        Linear(7, -1, rng=rng)
    with pytest.raises(TypeError, match="got float16"):
        Linear(2, 3, rng=rng, dtype=np.float16)
    with pytest.raises(ValueError, match=r"pass rng=numpy\.random\.default_rng"):
        Linear(2, 3)
    assert not Linear(2, 3, initializer=zeros).weight.value.any()


@pytest.mark.gpu
def test_linear_refuses_arrays_of_another_backend() -> None:
    model = mlp([3, 2])
    with pytest.raises(TypeError, match="cupy and numpy"):
        model(nnx.get_backend("cupy").asarray(np.ones((5, 3), np.float32)))


# ---- Sequential ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("models", "shape"),
    [
        (None, (5, 4)),
        (None, (0, 4)),
        (None, (257, 4)),
        (None, (2, 3, 4)),
        (3, (3, 5, 4)),
        (3, (5, 4)),
    ],
)
def test_fused_linear_relu_is_the_pair_bit_for_bit(
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    models: int | None,
    shape: tuple[int, ...],
    accumulate: bool,
) -> None:
    linear = Linear(4, 33, rng=rng, dtype=dtype, n_models=models).to(backend)
    relu = ReLU()
    fused = Sequential(linear, relu)
    assert linear.bias is not None
    linear.bias.value[...] = backend.asarray(rng.standard_normal(linear.bias.value.shape))
    x = backend.asarray(rng.standard_normal(shape).astype(dtype))
    z, saved_linear = linear.forward(x)
    y, saved_relu = relu.forward(z)
    fused_y, saved = fused.forward(x)
    assert_same_bits(backend.to_numpy(fused_y), backend.to_numpy(y))
    dy = backend.asarray(rng.standard_normal(y.shape).astype(dtype))
    results = []

    def pair() -> Any:
        return linear.backward(relu.backward(dy, saved_relu), saved_linear)

    def joined() -> Any:
        return fused.backward(dy, saved)

    for backward in (pair, joined):
        for p in (linear.weight, linear.bias):
            p.fresh = not accumulate
            p.grad.fill(0.3 if accumulate else np.nan)
        results.append([backward(), linear.weight.grad.copy(), linear.bias.grad.copy()])
    for one, other in zip(*results, strict=True):
        assert_same_bits(backend.to_numpy(other), backend.to_numpy(one))


def test_fused_linear_relu_runs_as_one_operation(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        type(backend), "relu", lambda *arguments: pytest.fail("the pair wasn't joined")
    )
    affine = type(backend).affine

    def recorded(*arrays: Any, relu: bool = False) -> Any:
        calls.append(relu)
        return affine(*arrays, relu=relu)

    monkeypatch.setattr(type(backend), "affine", recorded)
    model = mlp([3, 4, 5, 2]).to(backend)
    model(backend.asarray(np.ones((2, 3), np.float32)))
    assert calls == [True, True, False]


def test_fusion_leaves_a_subclass_of_linear_alone() -> None:
    class Doubled(Linear):
        def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
            y, saved = super().forward(x, step=step)
            return 2 * y, saved

    layer = Doubled(3, 2, rng=np.random.default_rng(0), dtype=np.float64)
    x = np.ones((1, 3))
    assert_same_bits(Sequential(layer, ReLU())(x), np.maximum(layer(x), 0))


def test_activations_are_those_of_the_public_layers(rng: np.random.Generator) -> None:
    model = mlp([3, 4, 2], dtype=np.float64)
    x = rng.standard_normal((5, 3))
    found = dict(model.activations(x))
    assert list(found) == ["0", "1", "2"]
    assert_same_bits(found["0"], model[0](x))
    assert_same_bits(found["1"], np.maximum(found["0"], 0))
    assert_same_bits(found["2"], model(x))


class Spy(Layer):
    """The identity; notes each backward pass."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
        return x, None

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        self.seen.append(need_dx)
        return dy if need_dx else None


def test_sequential_ends_backward_at_the_first_layer_with_parameters() -> None:
    first, middle = Spy(), Spy()
    linear = Linear(3, 3, rng=np.random.default_rng(0))
    wanted = []
    original = linear.backward
    linear.backward = lambda dy, saved, *, need_dx=True: (  # type: ignore[method-assign]
        wanted.append(need_dx) or original(dy, saved, need_dx=need_dx)  # type: ignore[func-returns-value]
    )
    model = Sequential(first, linear, middle, Linear(3, 2, rng=np.random.default_rng(0)))
    x = np.ones((2, 3), np.float32)
    y, saved = model.forward(x)
    assert model.backward(y, saved, need_dx=False) is None
    assert (first.seen, wanted, middle.seen) == ([], [False], [True])
    assert model.backward(y, saved) is not None
    assert (first.seen, wanted, middle.seen) == ([True], [False, True], [True, True])


def test_sequential_without_parameters_has_nothing_to_do_without_need_dx() -> None:
    spy = Spy()
    model = Sequential(spy, Spy())
    x = np.ones((2, 3), np.float32)
    y, saved = model.forward(x)
    assert model.backward(y, saved, need_dx=False) is None
    assert spy.seen == []


def test_sequential_used_twice_in_itself(backend: Backend, rng: np.random.Generator) -> None:
    shared = Linear(3, 3, rng=rng, dtype=np.float64).to(backend)
    model = Sequential(shared, ReLU(), shared, Tanh(), shared)
    assert [name for name, _ in model.parameters()] == ["0.weight", "0.bias"]
    assert len(list(model.layers())) == 4
    check_gradients(model, rng.standard_normal((4, 3)), backend=backend)


def test_sequential_is_a_sequence_of_layers() -> None:
    layers = [ReLU(), Tanh()]
    model = Sequential(*layers)
    assert len(model) == 2
    assert [model[0], model[-1]] == layers
    assert repr(model) == "Sequential(ReLU(), Tanh())"


def test_sequential_refuses_what_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        Sequential()
    with pytest.raises(TypeError, match="got 42"):
        Sequential(ReLU(), 42)  # type: ignore[arg-type]
    parts = [Linear(2, 2, initializer=zeros, n_models=k) for k in (2, 3)]
    with pytest.raises(ValueError, match=r"n_models in \{2, 3\}"):
        Sequential(*parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3]}, r"\[3\]"),
        ({"sizes": [3, 2], "activation": "gelo"}, "gelo"),
        ({"sizes": [3, 4, 2], "dropout": 1.5}, "1.5"),
        ({"sizes": [3, 0]}, "3 and 0"),
        ({"sizes": [3, 2], "seed": -1}, "-1"),
    ],
)
def test_mlp_names_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(**arguments)


def test_mlp_draws_the_same_weights_in_both_dtypes_and_others_with_another_seed() -> None:
    single, double, other = (
        mlp([4, 5, 3], dtype=np.float32, seed=8).state(),
        mlp([4, 5, 3], dtype=np.float64, seed=8).state(),
        mlp([4, 5, 3], dtype=np.float32, seed=9).state(),
    )
    for name, array in single.items():
        assert_same_bits(array, double[name].astype(np.float32))
    assert (single["0.weight"] != other["0.weight"]).all()


# ---- exceptional values ----------------------------------------------------------------------


def test_relu_keeps_nan_and_selects_gradients(backend: Backend, dtype: Any) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], dtype)
    y, saved = ReLU().forward(backend.asarray(x))
    np.testing.assert_array_equal(backend.to_numpy(y), [np.nan, np.inf, 0, 0, 0, 1, 0])
    for bad in (np.nan, np.inf, -np.inf):
        dx = ReLU().backward(backend.asarray(np.full(7, bad, dtype)), saved)
        np.testing.assert_array_equal(backend.to_numpy(dx), [0, bad, 0, 0, 0, bad, 0])


@pytest.mark.parametrize("layer", [Sigmoid(), Tanh(), Softmax()], ids=repr)
def test_far_inputs_saturate_without_a_warning(layer: Layer, backend: Backend, dtype: Any) -> None:
    # warnings are errors in this suite
    x = np.array([[1e4, -1e4], [-1e4, 1e4], [88.0, -88.0], [1e30, -1e30], [0.0, 1e4]], dtype)
    oracle = {Sigmoid: oracles.sigmoid, Tanh: oracles.tanh, Softmax: oracles.softmax}[type(layer)]
    dy = np.full_like(x, 3)
    dy[:, 1] = -2
    y, saved = layer.forward(backend.asarray(x))
    dx = layer.backward(backend.asarray(dy), saved)
    if isinstance(layer, Sigmoid):
        x = np.clip(x, -700, 700)  # the oracle's exp overflows where the library's doesn't
    expected = oracle(x, dy)
    assert_close(backend.to_numpy(y), expected[0], dtype=dtype)
    assert_close(backend.to_numpy(dx), expected[1], dtype=dtype)


def test_sigmoid_of_infinities(backend: Backend, dtype: Any) -> None:
    x = np.array([np.inf, -np.inf, np.nan], dtype)
    y = backend.to_numpy(Sigmoid()(backend.asarray(x)))
    assert_close(y, np.array([1, 0, np.nan]), dtype=dtype)


def test_sigmoid_keeps_its_small_values(backend: Backend, dtype: Any) -> None:
    x = np.array([-20.0, -50.0, -80.0], dtype)
    y = backend.to_numpy(Sigmoid()(backend.asarray(x)))
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=1e-5)


def test_softmax_of_equal_and_infinitely_low_scores(backend: Backend, dtype: Any) -> None:
    x = np.array([[7.0, 7.0, 7.0, 7.0], [0.0, -np.inf, 0.0, -np.inf]], dtype)
    y = backend.to_numpy(Softmax()(backend.asarray(x)))
    assert_same_bits(y, np.array([[0.25] * 4, [0.5, 0, 0.5, 0]], dtype))


# ---- Dropout ---------------------------------------------------------------------------------


def dropout_step(backend: Backend, layers: Sequence[Layer], number: int = 0, seed: int = 0) -> Step:
    state = backend.step_state()
    state.number = number
    state.plan(np.zeros(1), dtype=np.float32)
    return Step(seed, state, list(layers))


def masks(
    backend: Backend, layer: Layer, step: Step, n: int = 4096, dtype: Any = np.float32
) -> Any:
    y, _ = layer.forward(backend.asarray(np.ones(n, dtype)), step=step)
    return backend.to_numpy(y) == 0


def test_dropout_has_the_mean_it_promises(backend: Backend) -> None:
    n, p = 100_000, 0.3
    layer = Dropout(p)
    x = backend.asarray(np.ones(n, np.float32))
    y = backend.to_numpy(layer.forward(x, step=dropout_step(backend, [layer]))[0])
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(float((y == 0).mean()) - p) < 4 * deviation
    assert_same_bits(np.unique(y), np.array([0, 1 / (1 - p)], np.float32))


def test_dropout_masks_differ_by_use_step_layer_and_seed(backend: Backend) -> None:
    one, other = Dropout(0.5), Dropout(0.5)
    layers = [one, other]
    step = dropout_step(backend, layers, number=3)
    found = [
        masks(backend, one, step),  # use 0
        masks(backend, one, step),  # use 1
        masks(backend, other, step),
        masks(backend, one, dropout_step(backend, layers, number=4)),
        masks(backend, one, dropout_step(backend, layers, number=3, seed=1)),
    ]
    draws = [(0, 0, 0, 3), (0, 0, 1, 3), (0, 1, 0, 3), (0, 0, 0, 4), (1, 0, 0, 3)]
    expected = [oracles.dropped(0.5, (4096,), *draw) for draw in draws]
    for i, mask in enumerate(found):
        np.testing.assert_array_equal(mask, expected[i])
        for before in found[:i]:  # 4096 fair coins agree in 2048 places, give or take 5 * 32
            assert abs(int((mask == before).sum()) - 2048) < 160


def test_dropout_repeats_its_mask_in_every_dtype_and_when_begun_again(backend: Backend) -> None:
    layer = Dropout(0.4)
    step = dropout_step(backend, [layer], number=9)
    first = masks(backend, layer, step)
    np.testing.assert_array_equal(masks(backend, layer, step.begin(), dtype=np.float64), first)


def test_dropout_without_a_step_or_without_p_is_the_identity(backend: Backend) -> None:
    x = backend.asarray(np.ones((3, 5), np.float32))
    assert Dropout(0.9)(x) is x
    never, half = Dropout(0), Dropout(0.5)
    step = dropout_step(backend, [never, half])
    assert never.forward(x, step=step)[0] is x


def test_dropout_names_bad_arguments_and_foreign_steps(backend: Backend) -> None:
    for p in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=rf"p in \[0, 1\], got {p}"):
            Dropout(p)
    with pytest.raises(ValueError, match=r"Dropout\(p=0\.5\): not one of the layers"):
        masks(backend, Dropout(0.5), dropout_step(backend, [ReLU()]))


# ---- the model axis --------------------------------------------------------------------------


K = 3


def part(layer: Layer, k: int) -> dict[str, np.ndarray]:
    """State of model k alone, on the host."""
    return {name: backend_of(a).to_numpy(a)[k].copy() for name, a in layer.state().items()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_k_linear_layers_are_k_layers(
    backend: Backend, dtype: Any, rng: np.random.Generator, shared: bool, n: int
) -> None:
    layer = Linear(4, 5, rng=rng, dtype=dtype, n_models=K).to(backend)
    assert layer.bias is not None
    layer.bias.value[...] = backend.asarray(rng.standard_normal((K, 5)))
    x = rng.standard_normal((n, 4) if shared else (K, n, 4)).astype(dtype)
    dy = rng.standard_normal((K, n, 5)).astype(dtype)
    y, saved = layer.forward(backend.asarray(x))
    dx = layer.backward(backend.asarray(dy), saved)
    dxs = []
    for k in range(K):
        state = part(layer, k)
        wanted = oracles.linear(x if shared else x[k], state["weight"], state["bias"], dy[k])
        found = (y, layer.weight.grad, layer.bias.grad)
        for got, expected in zip(found, (wanted[0], *wanted[2:]), strict=True):
            assert_close(backend.to_numpy(got)[k], expected, depth=33, dtype=dtype)
        dxs.append(wanted[1])
    assert_close(
        backend.to_numpy(dx),
        np.sum(dxs, axis=0) if shared else np.stack(dxs),
        depth=33,
        dtype=dtype,
    )
    check_gradients(Linear(4, 5, rng=rng, dtype=np.float64, n_models=K).to(backend), x)


def test_k_linear_layers_name_the_shapes_they_take() -> None:
    layer = Linear(4, 5, rng=np.random.default_rng(0), n_models=K)
    for shape in ((2, 7, 4), (3, 2, 7, 4), (4,)):
        with pytest.raises(ValueError, match=r"shape \(3, N, 4\).* 3 models, or \(N, 4\)"):
            layer(np.ones(shape, np.float32))


def test_flatten_keeps_the_model_axis() -> None:
    model = Sequential(Flatten(), Linear(6, 2, initializer=zeros)).replicate(K)
    assert model(np.ones((K, 5, 2, 3), np.float32)).shape == (K, 5, 2)
    with pytest.raises(ValueError, match=r"at least 2 axes, got input of shape \(3,\)"):
        model(np.ones(3, np.float32))


def test_replicate_copies_weights_and_keeps_a_shared_layer_one(rng: np.random.Generator) -> None:
    shared = Linear(3, 3, rng=rng, dtype=np.float64)
    shared.weight.lr_scale = 0.5
    model = Sequential(shared, Tanh(), shared)
    copies = model.replicate(K)
    assert copies.n_models == K
    assert copies[0] is copies[2]
    assert model.n_models is None
    x = rng.standard_normal((5, 3))
    for y in copies(x):
        assert_close(y, model(x))
    assert [p.lr_scale for _, p in copies.parameters()] == [0.5, 1]
    with pytest.raises(ValueError, match="already holds 3 models"):
        copies.replicate(2)


class Held(Layer):
    """Inner layers in a list, which its own `children` names, one after the other."""

    def __init__(self, *parts: Layer) -> None:
        self.parts = list(parts)
        self.named = {"first": (parts[0], "a name")}

    def children(self) -> Iterator[tuple[str, Layer]]:
        for i, part in enumerate(self.parts):
            yield f"part{i}", part

    def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
        saved = []
        for part in self.parts:
            x, s = part.forward(x, step=step)
            saved.append(s)
        return x, saved

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        for part, s in zip(self.parts[::-1], saved[::-1], strict=True):
            dy = part.backward(dy, s)
        return dy


def test_replicate_keeps_what_is_shared_at_any_depth(
    backend: Backend, rng: np.random.Generator
) -> None:
    shared = Linear(3, 3, rng=rng, dtype=np.float64)
    norm = nnx.BatchNorm(3, dtype=np.float64)
    twin = nnx.BatchNorm(3, dtype=np.float64)
    twin.running_mean = norm.running_mean
    tied = Linear(3, 3, rng=rng, dtype=np.float64)
    tied.weight = shared.weight
    inner = Sequential(shared, ReLU())
    model = Sequential(
        shared,
        inner,
        Held(shared, tied, inner, norm),
        twin,
        Linear(3, 2, rng=rng, dtype=np.float64),
    ).to(backend)
    norm.running_mean = twin.running_mean  # `to` made two of it
    copies = model.replicate(2)
    assert copies[0] is copies[1][0] is copies[2].parts[0]  # type: ignore[index, attr-defined]
    assert copies[1] is copies[2].parts[2]  # type: ignore[attr-defined]
    assert copies[2].named == {"first": (copies[0], "a name")}  # type: ignore[attr-defined]
    assert copies[2].parts[1].weight is copies[0].weight  # type: ignore[attr-defined]
    assert copies[2].parts[3].running_mean is copies[3].running_mean  # type: ignore[attr-defined]
    assert copies.state().keys() == model.state().keys()
    assert copies.n_parameters == 2 * model.n_parameters
    assert not {id(layer) for layer in model.layers()} & {id(layer) for layer in copies.layers()}
    for name, array in copies.state().items():
        for k in range(2):
            assert_same_bits(backend.to_numpy(array)[k], backend.to_numpy(model.state()[name]))
    x = backend.asarray(rng.standard_normal((5, 3)))
    for y in backend.to_numpy(copies(x)):
        assert_close(y, backend.to_numpy(model(x)))


@pytest.mark.parametrize(
    "optimizer", [lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01)], ids=["sgd", "adam"]
)
@pytest.mark.parametrize("shared", [False, True])
def test_k_models_train_as_k_trainers_would(
    backend: Backend,
    dtype: Any,
    rng: np.random.Generator,
    optimizer: Callable[[], nnx.Optimizer],
    shared: bool,
) -> None:
    together = mlp([4, 8, 3], dtype=dtype, n_models=K, seed=1)
    alone = []
    for k in range(K):
        model = mlp([4, 8, 3], dtype=dtype)
        model.load_state(part(together, k))
        alone.append(Trainer(model, SoftmaxNLL(), optimizer(), backend=backend))
    trainer = Trainer(together, SoftmaxNLL(n_models=K), optimizer(), backend=backend)
    for _ in range(5):
        x = rng.standard_normal((16, 4) if shared else (K, 16, 4)).astype(dtype)
        t = rng.integers(0, 3, (16,) if shared else (K, 16))
        losses = backend.to_numpy(trainer.train_step(backend.asarray(x), backend.asarray(t)))
        assert losses.shape == (K,)
        for k in range(K):
            batch = (x, t) if shared else (x[k], t[k])
            loss = alone[k].train_step(*map(backend.asarray, batch))
            assert_close(losses[k], backend.to_numpy(loss), depth=10)
    for k in range(K):
        for name, array in part(together, k).items():
            expected = backend.to_numpy(alone[k].model.state()[name])
            # Adam divides by the gradient's own size, so rounding counts for more
            assert_close(array, expected, depth=1000)
    assert not np.array_equal(part(together, 0)["0.weight"], part(together, 1)["0.weight"])


# ---- states ----------------------------------------------------------------------------------


def test_load_state_names_what_does_not_fit() -> None:
    model = mlp([2, 3, 1])
    state = model.state()
    with pytest.raises(ValueError, match=r"missing \['2\.bias'\], unknown \[\]"):
        model.load_state({k: v for k, v in state.items() if k != "2.bias"})
    with pytest.raises(ValueError, match=r"unknown \['9\.bias'\]"):
        model.load_state(state | {"9.bias": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"0\.weight of shape \(2, 3\), got \(3, 2\)"):
        model.load_state(state | {"0.weight": np.zeros((3, 2), np.float32)})
    with pytest.raises(TypeError, match=r"0\.weight of dtype float32, got float64"):
        model.load_state(state | {"0.weight": np.zeros((2, 3))})


def test_load_state_changes_nothing_if_anything_does_not_fit() -> None:
    model = mlp([2, 3, 1])
    before = {name: a.copy() for name, a in model.state().items()}
    bad = {name: a + 1 for name, a in before.items()} | {"2.bias": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"2\.bias"):
        model.load_state(bad)
    for name, array in model.state().items():
        assert_same_bits(array, before[name])


def test_layers_may_be_nested_and_named_by_attribute(rng: np.random.Generator) -> None:
    class Twice(Layer):
        """Two parallel paths, added."""

        def __init__(self, left: Layer, right: Layer) -> None:
            self.left, self.right = left, right

        def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
            (a, sa), (b, sb) = (f.forward(x, step=step) for f in (self.left, self.right))
            return a + b, (sa, sb)

        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            dxs: Any = [
                f.backward(dy, s) for f, s in zip((self.left, self.right), saved, strict=True)
            ]
            return sum(dxs[1:], dxs[0])

    one = mlp([3, 4, 2], dtype=np.float64)
    model = Sequential(Twice(one, mlp([3, 2], dtype=np.float64)), Tanh(), Twice(Tanh(), ReLU()))
    names = [name for name, _ in model.parameters()]
    assert names == [f"0.left.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")] + [
        "0.right.0.weight",
        "0.right.0.bias",
    ]
    check_gradients(model, rng.standard_normal((5, 3)))


class Two(Layer):
    """A linear layer, and something it forgot to enumerate."""

    def __init__(self, extra: Any) -> None:
        self.linear = Linear(2, 2, initializer=zeros)
        self.extra = extra

    def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
        return self.linear.forward(x)


@pytest.mark.parametrize(
    "make", [lambda a: [a], lambda a: (1, a), lambda a: {"a": a}, lambda a: [[a]]]
)
@pytest.mark.parametrize("what", ["Parameter", "Layer"])
def test_what_would_be_neither_trained_nor_saved_is_an_error(make: Any, what: str) -> None:
    hidden: Any = nnx.Parameter(np.ones(3)) if what == "Parameter" else Tanh()
    layer = Two(make(hidden))
    kind = type(layer.extra).__name__
    message = rf"^Two: attribute 'extra' holds a {what} inside a {kind}; keep it in an attribute of"
    for use in (
        lambda: list(layer.parameters()),
        layer.state,
        lambda: layer.to("numpy"),
        lambda: Sequential(Sequential(layer)),
        lambda: Trainer(layer, nnx.MeanSquaredError(), SGD(0.1)),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def test_a_list_of_what_is_enumerated_anyway_is_no_error() -> None:
    layer = Two([1, "text", np.ones(3), None])
    layer.extra += [layer.linear, layer.linear.weight, layer.extra]
    names = ["linear.weight", "linear.bias"]
    assert [name for name, _ in layer.parameters()] == names

    class Chooses(Two):
        def children(self) -> Iterator[tuple[str, Layer]]:
            yield "linear", self.linear

    chooses = Chooses([Linear(2, 2, initializer=zeros)])  # on purpose: it isn't to be trained
    assert [name for name, _ in chooses.parameters()] == names
    with pytest.raises(TypeError, match="holds a Parameter inside a list"):
        list(Chooses([nnx.Parameter(np.ones(3))]).parameters())


def test_summary_lists_the_innermost_layers() -> None:
    inner = nnx.Sequential(nnx.Linear(5, 2, rng=np.random.default_rng(0)), nnx.Tanh())
    first = nnx.Linear(4, 5, bias=False, rng=np.random.default_rng(0))
    lines = nnx.Sequential(first, inner, inner).summary().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1.0", "1.1", "2.0", "2.1", "parameters"]
    assert [line.split()[-3] for line in lines] == ["20", "12", "0", "12", "0", "32"]
    assert [line.split()[-2:] for line in lines[:2]] == [["80", "bytes"], ["48", "bytes"]]
    assert "Linear(n_in=4, n_out=5, bias=False" in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert first.summary().splitlines()[0].endswith("  20  80 bytes")
