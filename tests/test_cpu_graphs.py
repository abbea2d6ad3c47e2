"""Steps replayed on the CPU: the C kernels' calls of one step, made again, give the same bits.

A call that the graph lacks would leave an array as the captured step had it, so everything public
is trained on batches that differ, beside the same without a graph.
"""

import contextlib
import functools
import gc
import importlib.util
import sys
import threading
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from test_graphs import OPTIMIZERS, classifier, contents, data, normalized, same, warmup

import nnx
from nnx.backends import get_backend, numpy_backend
from nnx.backends.base import Array
from nnx.check import catalogue

pytestmark = pytest.mark.kernels


@contextlib.contextmanager
def graphs() -> Iterator[dict[str, int]]:
    """Counts captures, and the replays after them."""
    found = {"captured": 0, "replayed": 0}
    with pytest.MonkeyPatch.context() as patch:
        made, cpu = numpy_backend._CpuGraph.__init__, numpy_backend._cpu

        def counted(self: Any, calls: Any) -> None:
            found["captured"] += 1
            made(self, calls)

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(cpu, name)

            def replay(self, calls: Any) -> Any:
                found["replayed"] += 1
                return cpu.replay(calls)

        patch.setattr(numpy_backend._CpuGraph, "__init__", counted)
        patch.setattr(numpy_backend, "_cpu", Counting())
        yield found


def trained(
    model: Callable[[], nnx.Layer],
    loss: Callable[[], nnx.Loss],
    optimizer: Callable[[], nnx.Optimizer],
    x: np.ndarray,
    t: np.ndarray,
    *,
    refused: str = "",
    **options: Any,
) -> None:
    """Without a graph and with one, which is captured, or refused with these words."""
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(model(), loss(), optimizer(), backend="numpy", graph=graph)
        with graphs() as found, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(x, t, epochs=3, batch_size=32, **options)
        runs.append(trainer)
        if not graph or refused:
            assert found == {"captured": 0, "replayed": 0}
            assert len(said) == (graph and bool(refused))
            assert all(refused in str(w.message) for w in said), str(said[0].message)
        else:  # 3 epochs of 4 full batches; the first of all is run as it is
            assert not said, str(said[0].message)
            assert found == {"captured": 1, "replayed": 10}
    same(*runs)


@pytest.mark.parametrize("name", catalogue.LAYERS)
def test_every_layer(name: str, dtype: Any) -> None:
    models = 3 if "3 models" in name else None

    def model() -> nnx.Layer:
        rng = np.random.default_rng(1)
        layer = catalogue.LAYERS[name][0](rng, dtype)
        first = nnx.Linear(20, 65, rng=rng, dtype=dtype, n_models=models)
        if name == "Flatten":
            return nnx.Sequential(layer, nnx.Linear(20, 5, rng=rng, dtype=dtype))
        width = layer(np.zeros((*([3] if models else []), 2, 65), dtype)).shape[-1]
        last = nnx.Linear(width, 5, rng=rng, dtype=dtype, n_models=models)
        return nnx.Sequential(first, layer, last)

    x, t = data()
    x = x.reshape(150, 4, 5) if name == "Flatten" else x
    trained(model, lambda: nnx.SoftmaxNLL(n_models=models), lambda: nnx.Adam(warmup), x, t)


HOST_LOSSES = {"NLL", "NLL, soft targets", "SoftmaxMSE", "SoftmaxMSE, soft targets"}
HOST_LOSSES |= {"MeanSquaredError, 3 models", "BCEWithLogits, weights"}


@pytest.mark.parametrize("name", catalogue.LOSSES)
def test_every_loss(name: str) -> None:
    make, targets = catalogue.LOSSES[name]
    rng = np.random.default_rng(2)
    x, t = data()
    if targets != "labels":
        t = rng.standard_normal((150, 5))
        t = np.sign(t) if targets == "signs" else t
    if targets == "soft":
        t = np.exp(t) / np.exp(t).sum(axis=1, keepdims=True)

    def model() -> nnx.Layer:
        one: nnx.Layer = nnx.mlp([20, 9, 5], seed=1)
        one = nnx.Sequential(one, nnx.Sigmoid()) if "NLL" in name[:3] else one
        return one.replicate(3) if "3 models" in name else one

    trained(
        *(model, make, lambda: nnx.Adam(warmup), x, t),
        refused="calls NumPy on the host" if name in HOST_LOSSES else "",
        metrics=[],
    )


@pytest.mark.parametrize("name", [*catalogue.OPTIMIZERS, *OPTIMIZERS])
def test_every_optimizer(name: str) -> None:
    """With dropout, sample weights and metrics, too."""
    make = catalogue.OPTIMIZERS.get(name) or OPTIMIZERS[name]
    weight = np.random.default_rng(2).uniform(0, 2, 150)
    metrics = [nnx.Accuracy(), nnx.metrics.TopKAccuracy(2)]
    trained(
        *(classifier, nnx.SoftmaxNLL, make, *data()),
        metrics=metrics,
        sample_weight=weight,
        validation=data(40),
    )


@pytest.mark.parametrize(
    ("model", "loss", "options", "refused"),
    [
        (normalized, nnx.SoftmaxNLL, {}, ""),
        (lambda: classifier().replicate(3), lambda: nnx.SoftmaxNLL(n_models=3), {}, ""),
        (classifier, nnx.SoftmaxNLL, {"metrics": [nnx.metrics.LogLoss()]}, "LogLoss.update"),
        (
            *(classifier, nnx.SoftmaxNLL),
            {"metrics": [nnx.metrics.ConfusionMatrix(5)]},
            "confusion",
        ),
    ],
    ids=["normalized", "three models", "log-loss", "confusion matrix"],
)
def test_kinds_of_models(model: Any, loss: Any, options: Any, refused: str) -> None:
    trained(model, loss, lambda: nnx.Adam(warmup), *data(), refused=refused, **options)


def test_numbers_with_weights_are_computed_on_the_host() -> None:
    x, _ = data()
    weight = np.random.default_rng(2).uniform(0, 2, 150)
    model = lambda: nnx.mlp([20, 5, 2], seed=1)  # noqa: E731
    make = lambda: nnx.SGD(0.1)  # noqa: E731
    trained(model, nnx.MeanSquaredError, make, x, x[:, :2])
    trained(
        *(model, nnx.MeanSquaredError, make, x, x[:, :2]),
        sample_weight=weight,
        refused="calls NumPy on the host",
    )


def test_a_gradient_that_nobody_writes_is_zero_in_every_step() -> None:
    """It would be penalized again and again."""

    def model() -> nnx.Layer:
        made = nnx.mlp([20, 9, 5], seed=1)
        made.extra = nnx.Linear(3, 3, rng=np.random.default_rng(0))  # type: ignore[attr-defined]
        made.children = lambda: iter((*type(made).children(made), ("extra", made.extra)))  # type: ignore
        return made

    make = lambda: nnx.SGD(0.1, l2=0.1)  # noqa: E731
    trained(model, nnx.SoftmaxNLL, make, *data(), refused="clear_unwritten")


class Doubled(nnx.Layer):
    """Does on the host what no graph has."""

    def forward(self, x: Array, *, step: Any = None) -> tuple[Array, Any]:
        return x * 2, None

    def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array:
        return dy * 2


class Own(nnx.SoftmaxNLL):
    """Nothing of its own."""


class Mean(nnx.metrics.Metric):
    """Of the outputs."""

    name = "mean"

    def start(self, backend: Any, n_models: int | None) -> Array:
        return backend.xp.zeros(())

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        total += prediction.mean()

    def result(self, total: np.ndarray, n: int) -> float:
        return float(total)


def test_what_is_not_of_the_library_runs_as_it_is() -> None:
    def doubled() -> nnx.Layer:
        rng = np.random.default_rng(0)
        return nnx.Sequential(
            nnx.Linear(20, 8, rng=rng), Doubled(), nnx.Dropout(0.2), nnx.Linear(8, 5, rng=rng)
        )

    make = lambda: nnx.Adam(warmup)  # noqa: E731
    trained(doubled, nnx.SoftmaxNLL, make, *data(), refused="Doubled may do on the host")
    trained(classifier, Own, make, *data(), refused="Own may do on the host")
    trained(
        *(classifier, nnx.SoftmaxNLL, make, *data()),
        metrics=[Mean()],
        refused="Mean may do on the host",
    )


def test_single_steps_of_several_sizes_and_dtypes_of_labels() -> None:
    """Batches are copied to where the graph reads; losses stay what they were."""
    x, t = data(96)
    runs, losses = [], []
    for graph in (False, True):
        trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), graph=graph)
        seen = []
        for i in range(24):
            part = np.s_[8 * (i % 5) : 8 * (i % 5) + (32 if i % 4 else 16)]
            wide = np.asfortranarray(x[part].astype(np.float32))
            with graphs() as found:
                seen.append(trainer.train_step(wide, t[part].copy()))
            assert found["replayed"] == (graph and (i == 3 or i > 4))
        runs.append(trainer)
        losses.append([float(loss) for loss in seen])
    same(*runs)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 24


def test_labels_that_are_cast_on_the_host_are_not_frozen() -> None:
    x, t = data(96)
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), graph=graph)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for i in range(6):
                part = np.s_[8 * i : 8 * i + 32]
                trainer.train_step(x[part].astype(np.float32), t[part].astype(np.int16))
        assert len(said) == graph
        assert all("cast calls NumPy" in str(w.message) for w in said)
        runs.append(trainer)
    same(*runs)


def test_what_changes_between_steps_is_seen() -> None:
    """Rates set by hand, settings and data changed between fits, a state loaded, parameters set."""
    x, t = data(128)
    runs = []
    for graph in (False, True):
        dropout, optimizer = nnx.Dropout(0.2), nnx.SGD(0.05, momentum=0.9)
        rng = np.random.default_rng(0)
        model = nnx.Sequential(
            *(nnx.Linear(20, 16, rng=rng), nnx.BatchNorm(16), nnx.ReLU()),
            *(dropout, nnx.Linear(16, 5, rng=rng)),
        )
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer, graph=graph)

        class Slower(nnx.Callback):
            def on_step_end(self, trainer: nnx.Trainer) -> None:
                if trainer.optimizer.steps.number == 6:
                    trainer.optimizer.lr = 0.01
                if trainer.optimizer.steps.number == 10:
                    trainer.optimizer.load_state({"step": 3})

        with graphs() as found:
            trainer.fit(x, t, epochs=3, batch_size=32, callbacks=[Slower()])
            kept = {k: v if k == "step" else v.copy() for k, v in optimizer.state().items()}
            optimizer.momentum, dropout.p = 0.5, 0.4
            trainer.fit(x[::-1].copy(), t[::-1].copy(), epochs=2, batch_size=32)
            trainer.fit(x[:64], t[:64], epochs=2, batch_size=32)
            optimizer.load_state(kept)
            model.load_state({name: a * 0.5 for name, a in model.state().items()})
            model.buffers()
            trainer.fit(x, t, epochs=2, batch_size=32)
            trainer.predict(x)
            trainer.evaluate(x, t)
            trainer.fit(x, t, epochs=1, batch_size=128)  # a larger arena
            trainer.fit(x, t, epochs=2, batch_size=32)
        assert found == ({"captured": 5, "replayed": 30} if graph else dict.fromkeys(found, 0))
        runs.append(trainer)
    same(*runs)


def test_a_replayed_step_calls_no_layer_and_allocates_nothing() -> None:
    x, t = data(32)
    model, loss = nnx.mlp([20, 33, 5], dropout=0.3, seed=1), nnx.SoftmaxNLL()
    trainer = nnx.Trainer(model, loss, nnx.Adam(), graph=True)
    batch = x.astype(np.float32), t
    for _ in range(3):
        trainer.train_step(*batch)
    model.forward = None  # type: ignore[method-assign, assignment]
    tracemalloc.start()
    try:
        trainer.train_step(*batch)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(100):
            trainer.train_step(*batch)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 4096
    assert after - before < 512


def test_two_threads_record_and_replay_their_own_steps() -> None:
    x, t = data(64)

    def run(seed: int) -> dict[str, np.ndarray]:
        model = nnx.mlp([20, 33, 5], dropout=0.3, seed=seed)
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), seed=seed, graph=True)
        for _ in range(30):
            trainer.fit(x, t, batch_size=16)
        return contents(trainer)

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    for one, other in zip(alone, together, strict=True):
        for name, a in one.items():
            np.testing.assert_array_equal(other[name], a, err_msg=name)


def test_an_error_in_a_captured_step_ends_the_recording() -> None:
    cpu: Any = numpy_backend.CPU

    def work() -> None:
        raise KeyboardInterrupt

    backend = get_backend("numpy")
    with pytest.raises(KeyboardInterrupt):
        backend.capture(work, backend.step_state())
    assert cpu.recording() is None


def test_a_kernel_that_declines_in_a_replay_is_an_error() -> None:
    backend = get_backend("numpy")
    out, x, state = np.zeros(4, np.float32), np.arange(4, dtype=np.float32), backend.step_state()
    backend.elementwise("x + x", out, x=x)
    graph = backend.capture(lambda: backend.elementwise("x + x", out, x=x), state)
    x += 1
    graph.launch()  # the capture has done it
    np.testing.assert_array_equal(out, [0, 2, 4, 6])
    graph.replay(state)
    np.testing.assert_array_equal(out, [2, 4, 6, 8])
    x.flags.writeable = out.flags.writeable = False
    with pytest.raises(RuntimeError, match="a kernel declined"):
        graph.replay(state)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("record", ()),
        ("record", (3,)),
        ("replay", ()),
        ("replay", (None,)),
        ("replay", ([3],)),
        ("replay", ([()],)),
        ("replay", ([(3, 4)],)),
        ("replay", ([(None,) * 40],)),
    ],
)
def test_what_is_no_graph_is_an_error(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError, SystemError)):
        getattr(numpy_backend.CPU, name)(*arguments)


class Nothing(nnx.Callback):
    """Looks on after epochs alone."""

    def on_epoch_end(self, trainer: nnx.Trainer, record: dict[str, Any]) -> None:
        for layer in trainer.model.layers():
            if isinstance(layer, nnx.Dropout):
                layer.p = 0.1 * trainer.epoch


class Watching(Nothing):
    """Looks on after each step, and may change anything."""

    def on_step_end(self, trainer: nnx.Trainer) -> None:
        for layer in trainer.model.layers():
            if isinstance(layer, nnx.Dropout):
                layer.p = 0.01 * trainer.optimizer.steps.position


@pytest.mark.parametrize(
    ("model", "callback", "captured"),
    [
        (classifier, None, 1),
        (classifier, Nothing, 3),  # one for each of its settings
        (classifier, Watching, 0),
        (lambda: nnx.Sequential(classifier(), Doubled()), None, 0),
    ],
    ids=["alone", "settings of an epoch", "settings of a step", "a layer of one's own"],
)
def test_fit_replays_by_itself_where_nobody_looks_on(
    model: Any, callback: Any, captured: int
) -> None:
    runs = []
    for graph in (False, None):
        trainer = nnx.Trainer(model(), nnx.SoftmaxNLL(), nnx.Adam(warmup), graph=graph)
        with graphs() as found, warnings.catch_warnings():
            warnings.simplefilter("error")
            callbacks = [] if callback is None else [callback()]
            trainer.fit(*data(), epochs=3, batch_size=32, callbacks=callbacks)
        assert found["captured"] == (captured if graph is None else 0)
        runs.append(trainer)
    same(*runs)


def test_under_a_debugger_or_profiler_every_line_runs() -> None:
    for watch, name in ((sys.settrace, "gettrace"), (sys.setprofile, "getprofile")):
        trainer, before = (
            nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam()),
            getattr(sys, name)(),
        )
        watch(lambda *event: None)
        try:
            with graphs() as found:
                trainer.fit(*data(), epochs=2, batch_size=32)
        finally:
            watch(before)
        assert found["captured"] == 0


def test_single_steps_are_replayed_only_if_asked_for() -> None:
    x, t = data(32)
    trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam())
    with graphs() as found:
        for _ in range(5):
            trainer.train_step(x.astype(np.float32), t)
    assert found["captured"] == 0


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_method_that_somebody_put_in_is_called_in_every_step(
    when: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = data(128)
    x = x.astype(np.float32)
    trainer, calls = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam()), []
    linear = list(trainer.model.layers())[-1]
    assert isinstance(linear, nnx.Linear)

    def patch() -> None:
        forward = nnx.Linear.forward

        def noted(self: Any, *arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return forward(self, *arguments, **options)

        if where == "class":
            monkeypatch.setattr(nnx.Linear, "forward", noted)
        else:
            monkeypatch.setattr(linear, "forward", noted.__get__(linear))

    if when == "before":
        patch()
    with graphs() as found:
        trainer.fit(x, t, epochs=3, batch_size=32)
        if when == "between":
            assert found["captured"] == 1
            patch()
            trainer.fit(x, t, epochs=3, batch_size=32)
        replayed = found["replayed"]
    assert len(calls) == 13  # fit looks at the shape of one output first
    assert replayed == (10 if when == "between" else 0)


@pytest.mark.parametrize("graph", [None, True])
def test_what_fit_was_given_is_free_when_it_is_over(graph: bool | None) -> None:
    x, t = data()
    x = x.astype(np.float32)
    trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), graph=graph)
    with graphs() as found:
        trainer.fit(x, t, epochs=3, batch_size=32)
    assert found["captured"] == 1
    there = weakref.ref(x)
    del x
    gc.collect()
    assert there() is None


def test_the_extension_may_be_loaded_again() -> None:
    spec = importlib.util.find_spec("nnx.backends._cpu")
    assert spec is not None
    assert spec.loader is not None
    x = np.array([-1.0, 2.0])
    for _ in range(5):
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out = np.empty(2)
        assert module.relu(x, out)
        np.testing.assert_array_equal(out, [0, 2])


def test_a_step_is_counted_by_the_call_that_does_it() -> None:
    """Ctrl-C comes between two lines of Python, and there is none in between."""
    cpu: Any = numpy_backend.CPU
    trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), graph=True)
    x, t = data(32)
    for _ in range(3):
        trainer.train_step(x.astype(np.float32), t)
    state = trainer.optimizer.steps
    (captured,) = trainer._graphs._captured.values()
    before, loss = trainer.vector.value.copy(), state.log[state.position]
    assert np.isnan(loss)
    assert captured is not None
    assert cpu.replay(captured.graph._calls)  # type: ignore[attr-defined]
    assert (state.number, state.position) == (4, 4)
    assert np.isfinite(state.log[3])
    assert (trainer.vector.value != before).any()


class Twice(nnx.SoftmaxNLL):
    """Its gradient doubled, on the host."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        loss, gradient = super().__call__(*arguments, **options)
        return loss, None if gradient is None else gradient * 2


class Change(nnx.Callback):
    """Does something after the first epoch."""

    def __init__(self, what: Callable[[nnx.Trainer], Any]) -> None:
        self.what = what

    def on_epoch_end(self, trainer: nnx.Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == 1:
            self.what(trainer)


def _wrapped(trainer: nnx.Trainer) -> None:
    """Puts a function into the last layer that says it is the library's."""
    layer = list(trainer.model.layers())[-1]
    forward, n = layer.forward, [0]

    @functools.wraps(forward)
    def noisy(x: Array, *, step: Any = None) -> Any:
        y, saved = forward(x, step=step)
        n[0] += 1
        return y + np.float32(0.01 * n[0]), saved

    layer.forward = noisy  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nnx.Trainer], Any]] = {
    "loss": lambda trainer: setattr(trainer, "loss", Twice()),
    "wrapped method": _wrapped,
    "clip_norm 0": lambda trainer: setattr(trainer.optimizer, "clip_norm", 0.0),
    "clip_value 0": lambda trainer: setattr(trainer.optimizer, "clip_value", 0.0),
    "amsgrad": lambda trainer: setattr(trainer.optimizer, "amsgrad", False),
    "decoupled": lambda trainer: setattr(trainer.optimizer, "decoupled", True),
    "weight_decay": lambda trainer: setattr(trainer.optimizer, "weight_decay", 0.1),
    "label_smoothing": lambda trainer: setattr(trainer.loss, "label_smoothing", 0.2),
    "slope": lambda trainer: setattr(trainer.loss, "slope", "2 * e"),
}


@pytest.mark.parametrize("when", ["after an epoch", "before"])
@pytest.mark.parametrize("what", CHANGES)
def test_whatever_is_changed_counts_from_the_next_epoch_on(what: str, when: str) -> None:
    x, t = data()
    runs = []
    for graph in (False, None):
        loss: nnx.Loss = nnx.SoftmaxNLL()
        if what == "slope":
            loss, t = nnx.MeanAbsoluteError(), np.random.default_rng(3).standard_normal((150, 5))
        optimizer = nnx.AMSGrad(0.01, weight_decay=0.05)
        trainer = nnx.Trainer(classifier(), loss, optimizer, graph=graph)
        if when == "before":
            trainer.fit(x, t, batch_size=32)
            CHANGES[what](trainer)
            trainer.fit(x, t, epochs=2, batch_size=32)
        else:
            trainer.fit(x, t, epochs=3, batch_size=32, callbacks=[Change(CHANGES[what])])
        runs.append(trainer)
    same(*runs)


def test_callbacks_of_any_kind_that_look_on_after_a_step_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slower(trainer: nnx.Trainer) -> None:
        for layer in trainer.model.layers():
            if isinstance(layer, nnx.Dropout):
                layer.p = 0.01 * trainer.optimizer.steps.position

    own = nnx.Callback()
    own.on_step_end = slower  # type: ignore[method-assign]
    bare = SimpleNamespace(on_step_end=slower, on_epoch_end=lambda trainer, record: None)
    for callback in (own, bare, None):
        runs = []
        callbacks: list[Any] = [callback or nnx.Callback()]
        if callback is None:
            monkeypatch.setattr(nnx.Callback, "on_step_end", lambda self, trainer: slower(trainer))
        for graph in (False, None):
            trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), graph=graph)
            trainer.fit(*data(), epochs=3, batch_size=32, callbacks=callbacks)
            runs.append(trainer)
        same(*runs)


class Odd(Doubled):
    """Can't be described, and is not asked to be."""

    def config(self) -> dict[str, Any]:
        raise NotImplementedError


class Kept(Mean):
    """Keeps what it has started with, and no attributes."""

    __slots__ = ()
    totals: ClassVar[list[Any]] = []

    def start(self, backend: Any, n_models: int | None) -> Array:
        self.totals.append(super().start(backend, n_models))
        return self.totals[-1]

    def result(self, total: np.ndarray, n: int) -> float:
        return float(self.totals[-1])


def test_strange_parts_are_as_good_as_they_were() -> None:
    def model() -> nnx.Layer:
        rng = np.random.default_rng(0)
        return nnx.Sequential(nnx.Linear(20, 8, rng=rng), Odd(), nnx.Linear(8, 5, rng=rng))

    runs = []
    for graph in (False, None):
        Kept.totals.clear()
        trainer = nnx.Trainer(model(), nnx.SoftmaxNLL(), nnx.Adam(), graph=graph)
        metrics = (metric for metric in (nnx.Accuracy(), Kept()))
        trainer.fit(*data(), epochs=3, batch_size=32, metrics=metrics)  # type: ignore[arg-type]
        assert {"accuracy", "mean"} <= trainer.history.keys()
        runs.append(trainer)
    same(*runs)


def test_a_profiler_of_python_3_12_looks_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = SimpleNamespace(get_tool=lambda i: "cProfile" if i == 2 else None)
    monkeypatch.setattr(sys, "monitoring", tools, raising=False)
    trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam())
    with graphs() as found:
        trainer.fit(*data(), epochs=2, batch_size=32)
        tools.get_tool = lambda i: None
        assert found["captured"] == 0
        trainer.fit(*data(), epochs=2, batch_size=32)
    assert found["captured"] == 1


def test_large_products_of_a_small_model_go_on_when_another_thread_is_done() -> None:
    """Of `(N, T, n)` each sample is T rows, more than a number of samples tells."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 600, 8)).astype(np.float32)
    with ThreadPoolExecutor(1) as pool:
        other = nnx.Trainer(nnx.mlp([20, 300, 5]), nnx.SoftmaxNLL(), nnx.Adam())
        started = threading.Event()

        def train() -> None:
            started.set()
            other.fit(*data(), epochs=30, batch_size=50)

        for graph in (None, True):
            trainer = nnx.Trainer(
                nnx.mlp([8, 8, 8]), nnx.MeanSquaredError(), nnx.SGD(0.01), graph=graph
            )
            busy = pool.submit(train)
            started.wait()
            for _ in range(20):
                if graph:
                    trainer.train_step(x[:4], x[:4])
                else:
                    trainer.fit(x, x, batch_size=4)
            busy.result()
            trainer.fit(x, x, batch_size=4)


def test_single_steps_have_the_loss_that_is_there() -> None:
    x, t = data(32)
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), graph=graph)
        for i in range(12):
            if i in (4, 8):
                trainer.loss = nnx.SoftmaxNLL(label_smoothing=0.1 * i)
            trainer.train_step(x.astype(np.float32), t)
        runs.append(trainer)
    same(*runs)
