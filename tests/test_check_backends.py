"""`nnx.check.library` and `model`: what is right passes, what is broken fails and is named.

On NumPy the backend under check is `NumpyBackend`, against the definitions in plain xp; damage is
done to the class of the backend under check, which the other side doesn't share.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

import nnx
from nnx import check
from nnx.backends import Backend, get_backend
from nnx.backends.arena import running
from nnx.check import catalogue, sides
from nnx.layers import Step

Data = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def data(rng: np.random.Generator) -> Data:
    """40 samples of 6 features, in 3 classes."""
    return rng.standard_normal((40, 6)), rng.integers(0, 3, 40)


def net(*, dtype: Any = np.float32) -> nnx.Sequential:
    """Everything that can be nested or joined: names are 0 and 1, 2, 3.0, 3.1, 4."""
    rng = np.random.default_rng(3)
    return nnx.Sequential(
        nnx.Linear(6, 16, rng=rng, dtype=dtype),
        nnx.ReLU(),
        nnx.Dropout(0.3),
        nnx.Sequential(nnx.Linear(16, 8, bias=False, rng=rng, dtype=dtype), nnx.Tanh()),
        nnx.Linear(8, 3, rng=rng, dtype=dtype),
    )


def checked(data: Data, backend: Backend, model: nnx.Layer | None = None, **options: Any) -> Any:
    options = {"steps": 6, "batch_size": 16} | options
    optimizer = options.pop("optimizer", nnx.Adam(0.01))
    model = net() if model is None else model
    return check.model(model, nnx.SoftmaxNLL(), optimizer, *data, backend=backend, **options)


def damage(
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    operation: str,
    change: Callable[[Any], None],
    *,
    after: int = 0,
) -> None:
    """In training, from call number `after` on, change what an operation returns or writes.

    Of `gemm` only the gradients of weights count: what else calls it is up to the backend.
    """
    kind, calls = type(backend), []
    right = getattr(kind, operation)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        made = args[3] if operation == "affine" else result
        counts = operation != "gemm" or "accumulate" in kwargs
        if type(self) is kind and running.arena is not None and counts:
            calls.append(operation)
            if len(calls) > after:
                change(made)
        return result

    monkeypatch.setattr(kind, operation, wrong, raising=False)


# ---- what is right ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: nnx.SGD(0.1, momentum=0.9), lambda: nnx.Adam(0.01)])
def test_a_right_model_passes(make: Any, data: Data, backend: Backend, dtype: Any) -> None:
    report = checked(data, backend, net(dtype=dtype), optimizer=make())
    assert report.passed, str(report)
    assert report.first_divergence is None
    names = [row.name for row in report.rows]
    for layer in ("0 (Linear)", "1 (ReLU)", "2 (Dropout)", "3.1 (Tanh)", "model (Sequential)"):
        assert f"gradients of {layer}" in names
    for group in ("activations", "loss", "gradients", "weights", "optimizer state"):
        assert group in names
    assert all(str(dtype) in row.compared or row.bound == 1e-7 for row in report.rows)


def test_models_side_by_side_pass(data: Data, backend: Backend) -> None:
    model = nnx.mlp([6, 5, 3], n_models=2)
    loss = nnx.SoftmaxNLL(n_models=2)
    report = check.model(model, loss, nnx.SGD(0.1), *data, backend=backend, steps=3)
    assert report.passed, str(report)


def test_what_is_only_rounding_is_not_compared(data: Data, backend: Backend) -> None:
    # the gradient of a bias before BatchNorm is 0; Adam makes steps of it all the same
    rng = np.random.default_rng(0)
    model = nnx.Sequential(
        nnx.Linear(6, 5, rng=rng), nnx.BatchNorm(5), nnx.GELU(), nnx.Linear(5, 3, rng=rng)
    )
    report = checked(data, backend, model)
    assert report.passed, str(report)
    assert "buffers" in [row.name for row in report.rows]
    if backend.name != "numpy":  # otherwise not a bit differs
        assert "0.bias of Adam is decided by rounding" in "\n".join(report.warnings)


def test_a_check_changes_nothing(data: Data, backend: Backend) -> None:
    model, optimizer = net(), nnx.Adam(0.01)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer, backend=backend)
    trainer.fit(*data, epochs=2)
    before = {name: backend.to_numpy(a).copy() for name, a in model.state().items()}
    keys = [set(vars(layer)) for layer in model.layers()]
    checked(data, backend, model, optimizer=optimizer, steps=2)
    assert_same_bits(
        *(
            np.concatenate([a.ravel() for a in s.values()])
            for s in (before, {name: backend.to_numpy(a) for name, a in model.state().items()})
        )
    )
    assert [set(vars(layer)) for layer in model.layers()] == keys
    assert nnx.backend_of(np.zeros(1)) is get_backend("numpy")
    assert optimizer.state()["step"] == 4


def test_a_training_goes_on_from_the_state_of_the_optimizer(data: Data) -> None:
    model, optimizer = net(), nnx.Adam(0.01)
    nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer, backend="numpy").fit(*data, epochs=2)
    start = check.training._started(optimizer)
    assert start is not None
    options: dict[str, Any] = {"seed": 0, "dtype": np.float32}
    side = sides.Side(
        get_backend("numpy"), model, nnx.SoftmaxNLL(), optimizer, start=start, **options
    )
    assert side.trainer.optimizer.steps.number == 4
    assert_same_bits(side.trainer.optimizer.slot("m"), optimizer.slot("m"))


def test_batches_are_those_of_fit() -> None:
    seen = catalogue._Seen()
    model = nnx.Sequential(seen, nnx.mlp([1, 1]))
    x = np.arange(50, dtype=np.float32).reshape(50, 1)
    trainer = nnx.Trainer(model, nnx.MeanSquaredError(), nnx.SGD(0.0), seed=7, backend="numpy")
    trainer.fit(x, x, epochs=2, batch_size=16)
    batches = sides.batches_of(x, x, 16, 8, seed=7)
    for (rows, _), expected in zip(batches, seen.rows[1:], strict=True):  # fit looks at one first
        assert_same_bits(rows, expected)


def test_the_flag_chooses_the_backend(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        check.model(net(), nnx.SoftmaxNLL(), nnx.SGD(), *data, steps=1)
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        check.library()


def test_input_that_makes_no_sense_is_one_error(data: Data) -> None:
    x, t = data
    with pytest.raises(ValueError, match="expected a model with parameters"):
        check.model(nnx.Tanh(), nnx.SoftmaxNLL(), nnx.SGD(), x, t)
    with pytest.raises(ValueError, match="steps and batch_size of at least 1, got 0"):
        check.model(net(), nnx.SoftmaxNLL(), nnx.SGD(), x, t, steps=0)
    with pytest.raises(ValueError, match=r"check\.model: "):
        check.model(net(), nnx.SoftmaxNLL(), nnx.SGD(), x, t[:-1])
    with pytest.raises(ValueError, match="expected 1 to 200 steps, got 201"):
        check.library("numpy", steps=201)


# ---- what is broken --------------------------------------------------------------------------


class WrongTanh(nnx.Tanh):
    """With the derivative 1 - y instead of 1 - y^2."""

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        return dy * (1 - saved)


def test_a_wrong_gradient_in_a_layer_of_mine_is_named(data: Data, backend: Backend) -> None:
    rng = np.random.default_rng(0)
    model = nnx.Sequential(
        nnx.Linear(6, 5, rng=rng),
        nnx.Sequential(nnx.ReLU(), WrongTanh()),
        nnx.Linear(5, 3, rng=rng),
    )
    report = checked(data, backend, model, steps=2)
    assert not report.passed
    failed = [row.name for row in report.rows if not row.passed]
    assert failed == ["gradients of 1.1 (WrongTanh)", "gradients of model (Sequential)"]
    assert report.first_divergence is None  # it is as wrong on NumPy
    assert "FAIL: gradients of 1.1 (WrongTanh)" in str(report)


class Uphill(nnx.MeanSquaredError):
    """With its gradient the wrong way around."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        value, gradient = super().__call__(*args, **options)
        return value, None if gradient is None else -gradient


def test_a_wrong_gradient_in_a_loss_of_mine_is_named(data: Data, backend: Backend) -> None:
    model, t = net(), np.eye(3)[data[1]]
    for loss, wrong in ((nnx.MeanSquaredError(), []), (Uphill(), ["gradients of loss (Uphill)"])):
        report = check.model(model, loss, nnx.SGD(0.01), data[0], t, backend=backend, steps=2)
        assert [row.name for row in report.rows if not row.passed] == wrong


def one_element(array: Any) -> None:
    array.reshape(-1)[5] += 10  # positive, whatever it was


@pytest.mark.parametrize(
    ("operation", "change", "after", "step", "layer", "array", "width"),
    [
        # two a step: 3.0 has no bias
        ("affine", one_element, 0, 0, "0 (Linear) and 1 (ReLU)", "output", 16),
        ("affine", one_element, 1, 0, "4 (Linear)", "output", 3),
        ("gemm", one_element, 0, 0, "4 (Linear)", "gradient of 4.weight", 3),
        ("affine", one_element, 2 + 2 + 1, 2, "4 (Linear)", "output", 3),
        ("dropout", lambda r: one_element(r[0]), 1, 1, "2 (Dropout)", "output", 16),
        (
            *("bias_relu_backward", one_element, 2, 2),
            *("0 (Linear) and 1 (ReLU)", "gradient of 0.weight", None),
        ),
        ("softmax_nll", lambda r: one_element(r[1]), 1, 1, "loss (SoftmaxNLL)", None, 3),
    ],
)
def test_a_broken_operation_is_traced_to_its_layer(
    operation: str,
    change: Any,
    after: int,
    step: int,
    layer: str,
    array: str | None,
    width: int | None,
    data: Data,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check.training, "_gradients_of", lambda *_: iter(()))
    damage(monkeypatch, backend, operation, change, after=after)
    report = checked(data, backend)
    assert not report.passed
    found = report.first_divergence
    assert found is not None
    assert (found.step, found.layer) == (step, layer)
    if array is not None:
        assert found.array == array
    if width is not None:
        assert found.index == {3: (1, 2), 16: (0, 5)}[width]
    assert found.error > found.bound
    assert f"step {step}, {layer}" in str(report)
    assert "FAIL" in str(report)


def test_a_bit_of_a_mask_is_enough(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = type(backend).dropout

    def one_more(self: Any, x: Any, p: float, **draw: Any) -> Any:
        y, mask = right(self, x, p, **draw)
        if type(self) is type(backend):
            flat = y.reshape(-1)
            flat[-1] = flat[-1] == 0
        return y, mask

    monkeypatch.setattr(type(backend), "dropout", one_more, raising=False)
    report = check.Report("", backend)
    for name, compared, body in catalogue._checks(backend, ("float32",), 1, 0):
        if name == "dropout masks":
            body(report, name, compared)
    assert [row.error for row in report.rows] == [6]  # in each of three steps and two uses
    assert not report.passed
    report = checked(data, backend, steps=2)
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "2 (Dropout)"


def test_an_optimizer_that_is_off_is_named(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = nnx.Adam.step

    def off(self: nnx.Adam, loss: Any = None) -> None:
        right(self, loss)
        if type(self.vector.backend) is type(backend):
            self.vector.value *= 1 + 1e-5

    monkeypatch.setattr(nnx.Adam, "step", off)
    found = checked(data, backend).first_divergence
    assert found is not None
    assert (found.step, found.layer, found.array) == (0, "Adam", "0.weight")


def test_nan_on_one_side_is_a_divergence(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(array: Any) -> None:
        array[...] = math.nan

    damage(monkeypatch, backend, "affine", nan, after=5)
    report = checked(data, backend)
    assert not report.passed
    assert report.first_divergence is not None
    json.loads(report.to_json())


def test_the_last_bit_is_no_divergence(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_bit(array: Any) -> None:
        array *= 1 + 2.0**-23

    damage(monkeypatch, backend, "affine", last_bit)
    assert checked(data, backend).passed


def test_an_error_on_one_side_is_a_row_that_names_the_layer(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("no such kernel")

    damage(monkeypatch, backend, "dropout", refuse, after=1)
    report = checked(data, backend)
    (failed,) = [row for row in report.rows if not row.passed]
    assert "RuntimeError: no such kernel" in failed.detail
    assert "2 (Dropout)" in failed.detail


def test_an_error_of_the_model_itself_is_raised(data: Data) -> None:
    class Broken(nnx.Tanh):
        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            raise ZeroDivisionError

    model = nnx.Sequential(nnx.Linear(6, 3, rng=np.random.default_rng(0)), Broken())
    with pytest.raises(ZeroDivisionError):
        checked(data, get_backend("numpy"), model)


def test_a_loss_that_is_not_finite_ends_the_comparison(data: Data, backend: Backend) -> None:
    report = checked(data, backend, optimizer=nnx.SGD(1e38), steps=6)
    assert any("isn't finite" in text for text in report.warnings)


# ---- the library -----------------------------------------------------------------------------


def test_everything_in_the_library_is_checked() -> None:
    rng = np.random.default_rng(0)
    made = {type(factory(rng, np.float32)) for factory, _ in catalogue.LAYERS.values()}
    public = {getattr(nnx.layers, name) for name in nnx.layers.__all__}
    assert made == public - {nnx.Layer, Step}

    def public_in(module: Any, base: type) -> set[type]:
        kinds = {k for k in vars(module).values() if isinstance(k, type) and issubclass(k, base)}
        return {k for k in kinds if k.__name__[0] != "_"} - {base}

    losses = {type(factory()) for factory, _ in catalogue.LOSSES.values()}
    assert losses == public_in(nnx.losses, nnx.Loss)
    optimizers = {type(make()) for make in catalogue.OPTIMIZERS.values()}
    assert optimizers == public_in(nnx.optimizers, nnx.Optimizer)


def test_the_library_passes_on_numpy() -> None:
    report = check.library("numpy", steps=10)
    assert report.passed, str(report)
    compared = {row.compared for row in report.rows}
    assert len(compared) == (5 if get_backend("numpy").graphs else 3)
    for name in (*catalogue.LAYERS, *catalogue.LOSSES):
        assert sum(row.name == name for row in report.rows) == 3
    assert str(report).endswith(f"{len(report.rows)} of {len(report.rows)} checks passed (numpy)")


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_the_library_passes_on_cupy() -> None:
    report = check.library("cupy", dtype="float32", steps=2)
    assert report.passed, str(report)
    assert report.environment["device"]
    assert not report.warnings
    assert "steps from a graph" in [row.name for row in report.rows]


@pytest.mark.parametrize("name", ["GELU", "SoftmaxNLL, all of them", "SGD, momentum"])
def test_a_broken_part_of_the_library_fails(
    name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {"GELU": nnx.GELU, "SGD, momentum": nnx.SGD}.get(name, nnx.SoftmaxNLL)
    method = {"GELU": "forward", "SGD, momentum": "step"}.get(name, "__call__")
    right = getattr(part, method)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        if method == "step":
            if type(self.vector.backend) is type(backend):
                self.vector.value *= 1 + 1e-4
        elif type(nnx.backend_of(result[0])) is type(backend):
            return result[0] * (1 + 1e-4), result[1]
        return result

    monkeypatch.setattr(part, method, wrong)
    report = check.Report("", backend)
    for found, compared, body in catalogue._checks(backend, ("float32",), 1, 0):
        if found == name and "central" not in compared:
            body(report, found, compared)
    (row,) = report.rows
    assert not row.passed
    assert report.first_divergence is not None
    assert report.first_divergence.layer == name


def test_a_check_that_raises_is_a_row_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(nnx.Huber, "__call__", refuse)
    report = check.library("numpy", dtype="float64", steps=1)
    failed = [row for row in report.rows if not row.passed]
    assert [row.name for row in failed] == ["Huber", "Huber"]
    assert all(row.detail == "RuntimeError: out of order" for row in failed)


# ---- the envelope ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalogue.ENVELOPE)
def test_the_envelope_is_what_numpy_itself_shows(name: str, dtype: Any) -> None:
    # three of the twenty seeds, on whatever BLAS is here: below the bound, and not far below
    here, batches = catalogue.reference(name, str(dtype))
    others = [catalogue.reference(name, str(dtype), seed=seed)[0] for seed in range(3)]
    errors = sides.growth(here, others, batches[:20]).max(axis=(0, 1))
    bound = catalogue.envelope(name, str(dtype), 20)[-1]
    assert (np.array([errors[0], errors[1:].max()]) <= bound).all()
    assert errors[1:].max() > bound[1] / 50


def test_the_envelope_grows_and_is_four_times_the_curve(dtype: Any) -> None:
    for name, curves in catalogue.ENVELOPE.items():
        bounds = catalogue.envelope(name, str(dtype), check.MOST_STEPS)
        assert bounds.shape == (200, 2)
        assert (np.diff(bounds, axis=0) >= 0).all()
        floor = 16 * float(np.finfo(dtype).eps)
        for i, what in enumerate(("loss", "weights")):
            for step, value in zip(catalogue.STEPS, curves[str(dtype)][what], strict=True):
                np.testing.assert_allclose(bounds[step - 1, i], max(4 * value, floor), rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", catalogue.ENVELOPE)
def test_two_hundred_steps_on_cupy_stay_within_the_envelope(name: str, dtype: Any) -> None:
    here, batches = catalogue.reference(name, str(dtype))
    there, _ = catalogue.reference(name, str(dtype), get_backend("cupy"))
    (errors,) = sides.growth(here, [there], batches)
    assert len(errors) == 200
    bounds = catalogue.envelope(name, str(dtype), 200)
    assert (errors[:, :1] <= bounds[:, :1]).all()
    assert (errors[:, 1:] <= bounds[:, 1:]).all()


# ---- how far apart ---------------------------------------------------------------------------


def test_ulps_are_counted_across_zero(dtype: Any) -> None:
    kind, tiny = dtype.type, np.nextafter(dtype.type(0), dtype.type(1))
    assert sides._ulps(kind(1), np.nextafter(kind(1), kind(2))) == 1
    assert sides._ulps(-tiny, tiny) == 2
    assert sides._ulps(kind(0), -kind(0)) == 0
    assert sides._ulps(kind(1), kind(np.nan)) is None


def test_a_gap_is_relative_to_the_largest_element(dtype: Any) -> None:
    e = np.array([[1.0, -8.0], [0.0, 2.0]], dtype)
    a = e.copy()
    a[1, 0] = 2.0
    gap = sides.gap_of(e, a)
    assert (gap.error, gap.index, gap.expected, gap.actual) == (0.25, (1, 0), 0.0, 2.0)
    for value, other, error in (
        (np.nan, np.nan, 0),
        (np.inf, np.inf, 0),
        (np.inf, -np.inf, np.inf),
        (np.nan, 1.0, np.inf),
        (0.0, 1.0, np.inf),
    ):
        assert sides.gap_of(np.array([value], dtype), np.array([other], dtype)).error == error
    assert sides.gap_of(e, a.ravel()).error == np.inf
    assert sides.gap_of(e[:0], e[:0]).error == 0


def test_another_rounding_is_another_result_and_as_good(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 40)).astype(dtype), rng.standard_normal((40, 7)).astype(dtype)
    backend, out = sides.Rounding(0), np.ones((9, 7), dtype)
    eps = float(np.finfo(dtype).eps)
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
    one, other = backend.gemm(a, b, out.copy()), backend.gemm(a, b, out.copy())
    added = backend.gemm(a, b, out.copy(), accumulate=True)
    assert (one != other).any()
    np.testing.assert_allclose(one, exact.astype(dtype), atol=40 * eps)
    np.testing.assert_allclose(added, exact.astype(dtype) + 1, atol=40 * eps)
    moved = backend.last_bit(a)
    assert 0 < np.abs(moved - a).max() <= 8 * eps
    total = backend.bias_grad(a, np.zeros(40, dtype))
    np.testing.assert_allclose(total, a.sum(axis=0), atol=9 * eps)


# ---- reports ---------------------------------------------------------------------------------


def test_a_report_is_json(data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, backend, "affine", one_element)
    content = json.loads(checked(data, backend).to_json(more=1))
    assert content["passed"] is False
    assert content["more"] == 1
    assert content["environment"]["backend"] == backend.name
    assert content["environment"]["tf32"] is False
    assert content["environment"]["versions"]["nnx"] == nnx.__version__
    assert content["first_divergence"]["layer"] == "0 (Linear) and 1 (ReLU)"
    assert {"name", "compared", "error", "bound", "passed"} <= content["rows"][0].keys()


def test_warnings_are_part_of_the_report(
    data: Data, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    damage(
        monkeypatch, backend, "gemm", lambda _: warnings.warn("a kernel fell back", stacklevel=1)
    )
    report = checked(data, backend, steps=1)
    assert report.warnings.count("a kernel fell back") == 1
    assert report.passed
    assert "warning: a kernel fell back" in str(report)


def test_a_report_without_rows_has_not_passed() -> None:
    assert not check.Report("", get_backend("numpy")).passed


def test_the_checks_are_imported_when_they_are_used() -> None:
    code = "import nnx, sys; print([m for m in sys.modules if m.startswith('nnx.check.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['nnx.check.gradients']"
    with pytest.raises(AttributeError, match="no attribute 'libary'"):
        _ = check.libary  # type: ignore[attr-defined]
