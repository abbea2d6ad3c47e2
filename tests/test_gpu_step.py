"""What a training step asks of the device: launches, allocations, waits; and that NumPy agrees.

Allocations are counted by CuPy's `MemoryHook` on any device; launches, library calls, copies and
waits by the simulated device's counters, and only there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import nnx
from nnx.backends import get_backend
from nnx.backends.base import Array
from nnx.layers import Dropout

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]


class Counts:
    """What happened in a `with counted() as counts:` block."""

    def __init__(self) -> None:
        self.requests = 0  # to CuPy's pool
        self.mallocs = 0
        self.waits = 0
        self.copies = 0  # between host and device
        self.launches: dict[str, int] = {}
        self.calls = 0  # of cuBLAS

    @property
    def total(self) -> int:
        """Launches and library calls."""
        return sum(self.launches.values()) + self.calls


def _simulator() -> Any:
    try:
        import cudasim
    except ImportError:
        return None
    return cudasim if cudasim.available() else None


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    import cupy

    counts, simulator = Counts(), _simulator()

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "counted"

        def malloc_preprocess(self, device_id: int, size: int, mem_size: int) -> None:
            counts.requests += 1

    cupy.cuda.Device().synchronize()
    if simulator:
        simulator.reset()
    with Hook():
        yield counts
    if simulator:
        counts.waits = simulator.stats()["sync"]["total"]
        cupy.cuda.Device().synchronize()  # deferred work counts when it runs
        stats = simulator.stats()
        counts.mallocs = stats["malloc"]["count"] + stats["malloc_async"]["count"]
        counts.copies = stats["memcpy"]["h2d"]["count"] + stats["memcpy"]["d2h"]["count"]
        counts.launches = {name: k["launches"] for name, k in stats["kernels"].items()}
        counts.calls = stats["cublas"]["calls"]


def quiet(counts: Counts) -> None:
    """Assert promise 3: no allocation, no wait, no copy."""
    found = (counts.requests, counts.mallocs, counts.waits, counts.copies)
    assert found == (0, 0, 0, 0), found


def batch(n: int, n_in: int = 20, n_classes: int = 5) -> tuple[Array, Array]:
    cuda, rng = get_backend("cupy"), np.random.default_rng(n)
    x = cuda.asarray(rng.standard_normal((n, n_in)), np.float32)
    return x, cuda.asarray(rng.integers(0, n_classes, n))


def small_trainer(optimizer: nnx.Optimizer | None = None, dropout: float = 0.5) -> nnx.Trainer:
    model = nnx.mlp([20, 33, 32, 5], dropout=dropout)
    optimizer = optimizer or nnx.Adam(1e-2)
    return nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer, backend="cupy", seed=3)


OPTIMIZERS = [
    nnx.SGD(0.1),
    nnx.SGD(0.1, momentum=0.9, nesterov=True),
    nnx.Adam(1e-2),
    nnx.AdamW(1e-2, clip_norm=1.0),
    nnx.AMSGrad(1e-2),
    nnx.AdaGrad(1e-2, l1=1e-3, clip_value=1.0),
    nnx.RMSProp(1e-2, centered=True),
    nnx.Lion(1e-3),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_step_neither_waits_nor_allocates_after_the_first(optimizer: nnx.Optimizer) -> None:
    trainer = small_trainer(optimizer)
    x, t = batch(32)
    trainer.train_step(x, t)
    losses = []
    for _ in range(3):
        with counted() as counts:
            losses.append(trainer.train_step(x, t))
        quiet(counts)
    assert len({float(loss) for loss in losses}) == 3  # each is a view of its own


def test_a_step_of_several_models_is_as_quiet_and_as_short_as_that_of_one() -> None:
    launches = []
    for n_models in (None, 3):
        model = nnx.mlp([20, 33, 32, 5], dropout=0.5)
        if n_models:
            model = model.replicate(n_models)
        loss = nnx.SoftmaxNLL(n_models=n_models)
        trainer = nnx.Trainer(model, loss, nnx.Adam(1e-2), backend="cupy", seed=3)
        x, t = batch(32)
        trainer.train_step(x, t)
        with counted() as counts:
            trainer.train_step(x, t)
        quiet(counts)
        launches.append(counts.total)
    assert launches[0] == launches[1]


@pytest.mark.parametrize("activation", [nnx.Sigmoid, nnx.Tanh])
def test_layers_without_kernels_are_quiet_too(activation: type[nnx.Layer]) -> None:
    cuda, rng = get_backend("cupy"), np.random.default_rng(0)
    x = cuda.asarray(rng.standard_normal((32, 20)), np.float32)
    t = cuda.asarray(rng.standard_normal((32, 4)), np.float32)
    model = nnx.Sequential(
        nnx.Linear(20, 8, rng=rng), activation(), nnx.Linear(8, 4, rng=rng), nnx.Softmax()
    )
    trainer = nnx.Trainer(model, nnx.MeanSquaredError(), nnx.SGD(0.1), backend="cupy")
    trainer.train_step(x, t)
    with counted() as counts:
        trainer.train_step(x, t)
    quiet(counts)


def test_a_short_batch_a_validation_pass_and_a_callback_change_nothing() -> None:
    trainer = small_trainer()
    x, t = batch(32)
    short_x, short_t = batch(7)
    trainer.train_step(x, t)
    trainer.train_step(short_x, short_t)
    for _ in range(2):
        with counted() as counts:
            trainer.train_step(x, t)
        quiet(counts)
        trainer.evaluate(get_backend("cupy").to_numpy(x), get_backend("cupy").to_numpy(t))
        float(trainer.train_step(x, t))  # a callback that reads the loss
        with counted() as counts:
            trainer.train_step(short_x, short_t)
        quiet(counts)


def test_the_steps_of_fit_are_quiet_too() -> None:
    """Counted from callback to callback: gather, metrics, loss log and update included."""
    cuda = get_backend("cupy")
    x, t = (cuda.to_numpy(a) for a in batch(100))
    seen: list[Counts] = []

    class Watch(nnx.Callback):
        open: Any = None

        def on_step_end(self, trainer: nnx.Trainer) -> None:
            self.close()
            self.open = counted()
            self.counts = self.open.__enter__()

        def on_epoch_end(self, trainer: nnx.Trainer, record: dict[str, Any]) -> None:
            if self.open is not None:  # the epoch's end reads the log: not part of a step
                self.open.__exit__(None, None, None)
                self.open = None

        def close(self) -> None:
            if self.open is not None:
                self.open.__exit__(None, None, None)
                seen.append(self.counts)
                self.open = None

    small_trainer().fit(x, t, epochs=3, batch_size=32, validation=(x, t), callbacks=[Watch()])
    assert len(seen) == 9  # from the first to the fourth step of each epoch; the last has 4 samples
    for counts in seen[3:]:
        quiet(counts)


def test_launches_of_the_reference_step_with_everything_on() -> None:
    """784-512-512-10, batch 128, Adam: 6 L + 2 = 20 launches and library calls are the budget."""
    if _simulator() is None:
        pytest.skip("launches are counted by the simulated device only")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 784)).astype(np.float32)
    t = rng.integers(0, 10, 256)
    found: list[Counts] = []

    class Watch(nnx.Callback):
        """Counts the second step of the second epoch."""

        steps = 0

        def on_step_end(self, trainer: nnx.Trainer) -> None:
            self.steps += 1
            if self.steps == 3:
                self.block = counted()
                found.append(self.block.__enter__())
            if self.steps == 4:
                self.block.__exit__(None, None, None)

    trainer = nnx.Trainer(
        nnx.mlp([784, 512, 512, 10]), nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy", seed=0
    )
    trainer.fit(x, t, epochs=2, batch_size=128, callbacks=[Watch()])
    (counts,) = found
    quiet(counts)
    assert counts.launches == {
        "gather_rows": 1,
        "bias_relu_f32": 2,
        "cupy_add__float32_float32_float32": 1,  # the bias of the last layer
        "softmax_nll_f32": 1,
        "count_correct_f32": 1,  # the metric
        "bias_backward_f32": 3,
        "adam_f32": 1,
    }
    assert counts.calls == 8  # 3 forward, 3 for the weights, 2 for the inputs
    assert counts.total - 1 <= 20  # "metrics and clipping +1 each"


def test_a_planned_epoch_uploads_without_waiting() -> None:
    trainer = small_trainer()
    x, t = batch(32)
    trainer.train_step(x, t)
    with counted() as counts:
        trainer.optimizer.plan(10, np.arange(320))
    assert counts.waits == 0


def test_a_trainer_may_be_dropped_while_its_work_is_pending() -> None:
    """What was uploaded for it must stay until the device has read it (seen in deferred mode)."""
    simulator = _simulator()
    deferred = simulator.option("async", 1) if simulator else contextlib.nullcontext()
    x, t = batch(32)
    losses = []
    with deferred:
        for _ in range(40):
            trainer = small_trainer()
            trainer.train_step(x, t)
            losses.append(trainer.train_step(x, t))
            del trainer
        get_backend("cupy").synchronize()
    assert len({float(loss) for loss in losses}) == 1


def test_an_epoch_waits_once_whatever_is_measured() -> None:
    """One wait more per epoch, with one metric or many, with validation or without."""
    if _simulator() is None:
        pytest.skip("waits are counted by the simulated device only")
    cuda = get_backend("cupy")
    x, t = (cuda.to_numpy(a) for a in batch(64))
    many = [nnx.Accuracy(), nnx.metrics.TopKAccuracy(2), nnx.metrics.LogLoss()]
    for metrics in ([], many):
        for validation in (None, (x, t)):
            trainer = small_trainer()
            trainer.fit(x, t, validation=validation, metrics=metrics)
            waits = []
            for epochs in (1, 4):
                with counted() as counts:
                    trainer.fit(x, t, epochs=epochs, validation=validation, metrics=metrics)
                waits.append(counts.waits)
            assert waits[1] - waits[0] == 3


def test_data_sent_batch_by_batch_do_not_make_the_host_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = get_backend("cupy")
    monkeypatch.setattr(type(cuda), "fits", lambda self, nbytes: False)
    x, t = (cuda.to_numpy(a) for a in batch(96))
    seen: list[Counts] = []

    class Watch(nnx.Callback):
        open: Any = None
        counts: Counts

        def on_step_end(self, trainer: nnx.Trainer) -> None:
            if self.open is not None:
                self.open.__exit__(None, None, None)
                seen.append(self.counts)
            self.open = counted() if len(seen) < 2 else None
            if self.open is not None:
                self.counts = self.open.__enter__()

    small_trainer().fit(x, t, batch_size=32, callbacks=[Watch()])
    assert len(seen) == 2
    for counts in seen:
        assert counts.waits == 0


# ---- the same on both backends -----------------------------------------------------------------


def run(backend: str, dtype: Any, dropout: float = 0.0) -> tuple[nnx.Trainer, list[np.ndarray]]:
    """50 steps (10 epochs of 5, the last batch short) on noise; the trainer and every loss."""
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal((150, 20)), rng.integers(0, 5, 150)
    model = nnx.mlp([20, 48, 33, 5], dropout=dropout, seed=11, dtype=dtype)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(1e-2), backend=backend, seed=12)
    losses: list[np.ndarray] = []

    class Log(nnx.Callback):
        def on_epoch_end(self, trainer: nnx.Trainer, record: dict[str, Any]) -> None:
            losses.append(trainer.backend.to_numpy(trainer.optimizer.steps.log).copy())

    trainer.fit(x, t, epochs=10, batch_size=32, callbacks=[Log()])
    return trainer, losses


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_loss_curves_agree_over_50_steps(dtype: Any, dropout: float) -> None:
    curves = [np.concatenate(run(backend, dtype, dropout)[1]) for backend in ("numpy", "cupy")]
    assert curves[0].shape == (50,)
    assert curves[0][-5:].mean() < 0.9 * curves[0][:5].mean()  # something was learned
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5 if dtype == np.float32 else 1e-9)


def test_initial_weights_are_identical(dtype: Any) -> None:
    models = [nnx.mlp([20, 33, 5], seed=4, dtype=dtype) for _ in range(2)]
    models[1].to("cupy")
    cuda = get_backend("cupy")
    for name, value in models[1].state().items():
        np.testing.assert_array_equal(cuda.to_numpy(value), models[0].state()[name])


class Recorder(nnx.Layer):
    """Passes its input on and keeps it."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def forward(self, x: Array, *, step: Any = None) -> tuple[Array, Any]:
        if step is not None:
            self.seen.append(nnx.backend_of(x).to_numpy(x).copy())
        return x, None

    def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array:
        return dy


def test_batches_and_dropout_masks_are_identical(dtype: Any) -> None:
    """With ones as input, what leaves the dropout layer is its mask."""
    seen = {}
    for backend in ("numpy", "cupy"):
        batches, masks = Recorder(), Recorder()
        rng = np.random.default_rng(0)
        model = nnx.Sequential(
            batches,
            nnx.Linear(3, 41, initializer=lambda shape, rng: np.zeros(shape), rng=rng, dtype=dtype),
            nnx.Sigmoid(),  # 1/2 everywhere
            Dropout(0.5),
            masks,
            nnx.Linear(41, 2, rng=rng, dtype=dtype),
        )
        x = np.arange(150.0).reshape(50, 3)
        trainer = nnx.Trainer(
            model, nnx.SoftmaxNLL(), nnx.SGD(0.0), backend=backend, seed=2**64 - 1
        )
        trainer.fit(x, np.arange(50) % 2, epochs=2, batch_size=16)
        seen[backend] = (batches.seen, masks.seen)
    for numpy_side, cupy_side in zip(seen["numpy"], seen["cupy"], strict=True):
        assert len(numpy_side) == 8
        for a, b in zip(numpy_side, cupy_side, strict=True):
            np.testing.assert_array_equal(b, a)
    batches_seen, masks_seen = seen["numpy"]
    assert not np.array_equal(batches_seen[0], batches_seen[4])  # the second epoch is another order
    assert set(np.unique(masks_seen[0])) == {0, 1}
    assert not np.array_equal(masks_seen[0], masks_seen[1])


def test_a_model_moves_with_its_optimizer_state_and_goes_on() -> None:
    """Five epochs on NumPy, five on CuPy, against ten on NumPy."""
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal((64, 20)), rng.integers(0, 5, 64)
    losses = {}
    for move in (False, True):
        model = nnx.mlp([20, 33, 5], dropout=0.3, dtype="float64")
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(1e-2))
        trainer.fit(x, t, epochs=5)
        if move:
            model.to("cupy")
            assert trainer.backend.name == "cupy"
        losses[move] = trainer.fit(x, t, epochs=5)["loss"]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-10)
    assert isinstance(trainer.predict(x), np.ndarray)


def test_data_that_do_not_fit_are_sent_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = run("cupy", np.float64)[1]
    monkeypatch.setattr(type(get_backend("cupy")), "fits", lambda self, nbytes: False)
    streamed = run("cupy", np.float64)[1]
    np.testing.assert_array_equal(np.concatenate(streamed), np.concatenate(resident))


@pytest.fixture
def two_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")


@pytest.mark.usefixtures("two_devices")
def test_the_second_device_is_as_good_as_the_first() -> None:
    """On `cupy:1` while the current device is 0: everything stays there, and moves back."""
    import cupy

    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((70, 20)), rng.integers(0, 5, 70)
    losses = {}
    for device in (0, 1):
        model = nnx.mlp([20, 33, 5], dropout=0.3)
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), backend=f"cupy:{device}")
        trainer.fit(x, t, epochs=3, validation=(x, t))
        assert trainer.vector.value.device.id == device
        assert cupy.cuda.Device().id == 0
        losses[device] = trainer.history["loss"] + trainer.history["validation_loss"]
        trainer.predict(x)
    assert losses[0] == losses[1]
    first, second = get_backend("cupy:0"), get_backend("cupy:1")
    with pytest.raises(TypeError, match="cupy and cupy:1"):
        nnx.backend_of(first.asarray(x), second.asarray(x))
    model.to("cupy:0")
    trainer.fit(x, t)
    assert trainer.vector.value.device.id == 0
    with pytest.raises(nnx.BackendUnavailable, match=r"cupy:99.*a device below 2"):
        get_backend("cupy:99")


@pytest.mark.usefixtures("two_devices")
def test_what_is_called_outside_of_training_finds_its_device() -> None:
    """CuPy warns where a kernel reaches into another device's memory, and warnings are errors."""
    cuda, (x, t) = get_backend("cupy:1"), (a.get() for a in batch(32))
    model = nnx.Sequential(nnx.mlp([20, 16], seed=0), nnx.BatchNorm(16), nnx.Tanh(), nnx.Dropout())
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(l2=0.1), backend=cuda)
    trainer.fit(x, t)
    state = trainer.optimizer.state()
    trainer.optimizer.load_state({k: a if k == "step" else a.copy() for k, a in state.items()})
    trainer.optimizer.load_state({"step": 3})
    assert float(trainer.optimizer.penalty()) > 0
    model.load_state({name: cuda.to_numpy(a) for name, a in model.state().items()})
    y = model(cuda.asarray(x, np.float32))
    np.testing.assert_array_equal(cuda.to_numpy(y), trainer.predict(x))


@pytest.mark.usefixtures("two_devices")
def test_uploads_to_a_device_that_is_not_the_current_one_arrive() -> None:
    """Pinned memory is kept until its copy is done, on whichever device (seen in deferred mode)."""
    simulator = _simulator()
    cuda = get_backend("cupy:1")
    with cuda.activate():
        arrays = [cuda.xp.zeros(100) for _ in range(20)]
    cuda.synchronize()
    with simulator.option("async", 1) if simulator else contextlib.nullcontext():
        for i, array in enumerate(arrays):
            cuda.upload(np.full(100, float(i)), array)
        cuda.synchronize()
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(cuda.to_numpy(array), i)


@pytest.mark.usefixtures("two_devices")
def test_a_model_of_another_device_may_be_asked_within_a_step() -> None:
    """Its arrays don't come from the memory of the step."""
    first, second = get_backend("cupy:0"), get_backend("cupy:1")
    teacher = nnx.mlp([20, 16, 5], seed=1).to(first)

    class Asking(nnx.Layer):
        def forward(self, x: Array, *, step: Any = None) -> tuple[Array, Any]:
            if step is not None:
                answers.append(teacher(first.asarray(second.to_numpy(x))).device.id)
            return x, None

        def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array:
            return dy

    answers: list[int] = []
    model = nnx.Sequential(Asking(), nnx.mlp([20, 16, 5], seed=2))
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), backend=second)
    x, t = (a.get() for a in batch(32))
    trainer.fit(x, t, epochs=3, batch_size=16)
    assert answers == [0] * 6
