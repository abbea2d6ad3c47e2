"""Steps replayed from CUDA graphs: the same bits as without, in one launch; and data sent ahead."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from test_gpu_step import Counts, counted, quiet

import nnx
from nnx.backends import get_backend
from nnx.backends.base import Array

pytestmark = pytest.mark.gpu


def data(n: int = 150, n_in: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.standard_normal((n, n_in)), rng.integers(0, 5, n)


def contents(trainer: nnx.Trainer) -> dict[str, np.ndarray]:
    """All that a run leaves behind, on the host."""
    fetch = trainer.backend.to_numpy
    state = {name: fetch(a) for name, a in trainer.model.state().items()}
    state |= {
        f"optimizer {k}": fetch(a) for k, a in trainer.optimizer.state().items() if k != "step"
    }
    state["step"] = np.array(trainer.optimizer.state()["step"])
    return state | {name: np.array(values) for name, values in trainer.history.items()}


def same(a: nnx.Trainer, b: nnx.Trainer) -> None:
    first, second = contents(a), contents(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)


@contextlib.contextmanager
def graphs() -> Iterator[dict[str, int]]:
    """Counts captures and launches of graphs; on a real device the entries stay away."""
    found: dict[str, int] = {}
    try:
        import cudasim
    except ImportError:
        cudasim = None
    if cudasim is None or not cudasim.available():
        yield found
        return
    get_backend("cupy").synchronize()
    cudasim.reset()
    yield found
    get_backend("cupy").synchronize()
    stats = cudasim.stats()
    found |= {"captured": stats["graphs_captured"], "launched": stats["graph_launches"]}


def warmup(step: int) -> float:
    """A schedule: up, and down again."""
    return 0.01 * min((step + 1) / 8, 1 / (1 + 0.05 * step))


def classifier(dtype: Any = np.float32, dropout: float = 0.3) -> nnx.Layer:
    return nnx.mlp([20, 33, 32, 5], dropout=dropout, seed=1, dtype=dtype)


def normalized() -> nnx.Layer:
    rng = np.random.default_rng(3)
    return nnx.Sequential(
        *(nnx.Linear(20, 24, rng=rng), nnx.BatchNorm(24), nnx.Tanh(), nnx.Dropout(0.2)),
        *(nnx.Linear(24, 24, rng=rng), nnx.LayerNorm(24), nnx.GELU()),
        *(nnx.Linear(24, 16, rng=rng), nnx.RMSNorm(16), nnx.ReLU(), nnx.Linear(16, 5, rng=rng)),
    )


OPTIMIZERS: dict[str, Callable[[], nnx.Optimizer]] = {
    "SGD": lambda: nnx.SGD(warmup),
    "Nesterov": lambda: nnx.SGD(warmup, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda: nnx.Adam(warmup),
    "Adam, clipped": lambda: nnx.Adam(warmup, clip_norm=0.5, clip_value=0.2, l1=1e-4, l2=1e-3),
    "AdamW": lambda: nnx.AdamW(warmup),
    "AMSGrad": lambda: nnx.AMSGrad(warmup),
    "AdaGrad": lambda: nnx.AdaGrad(warmup, lr_decay=0.01),
    "RMSProp": lambda: nnx.RMSProp(warmup, momentum=0.5, centered=True),
    "Lion": lambda: nnx.Lion(warmup),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_is_eager_bit_for_bit(optimizer: str) -> None:
    """Over epochs, with a schedule, dropout, sample weights, metrics and a short last batch."""
    (x, t), weight = data(), np.random.default_rng(2).uniform(0, 2, 150)
    metrics = [nnx.Accuracy(), nnx.metrics.TopKAccuracy(2), nnx.metrics.LogLoss()]
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(
            classifier(), nnx.SoftmaxNLL(), OPTIMIZERS[optimizer](), backend="cupy", graph=graph
        )
        with graphs() as found:
            trainer.fit(
                *(x, t), epochs=4, batch_size=32, metrics=metrics, sample_weight=weight,
                validation=(x[:40], t[:40]),
            )  # fmt: skip
        runs.append(trainer)
        if found:  # 4 epochs of 4 full batches; the first of all is run as it is
            assert found == ({"captured": 1, "launched": 15} if graph else dict.fromkeys(found, 0))
    same(*runs)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: classifier(np.float64), lambda: nnx.SoftmaxNLL()),
        (normalized, lambda: nnx.SoftmaxNLL(label_smoothing=0.1, class_weight=[1, 2, 3, 4, 5])),
        (classifier, lambda: nnx.SoftmaxNLL(ignore_index=2)),
        (classifier, nnx.SoftmaxMSE),
        (lambda: classifier().replicate(3), lambda: nnx.SoftmaxNLL(n_models=3)),
    ],
    ids=["float64", "normalized", "ignored labels", "softmax MSE", "three models"],
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "sent"])
def test_replay_is_eager_for_all_kinds_of_models(
    model: Any, loss: Any, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr(type(get_backend("cupy")), "fits", lambda self, nbytes: False)
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(model(), loss(), nnx.Adam(warmup), backend="cupy", graph=graph)
        with graphs() as found:
            trainer.fit(*data(), epochs=3, batch_size=32)
        runs.append(trainer)
        if found and graph:  # of the data sent, each of the two slots has its graph
            assert found == {"captured": 1 + (not resident), "launched": 11 - (not resident)}
    same(*runs)


def test_single_steps_are_replayed_too() -> None:
    """On arrays anywhere: they are copied to where the graph reads. Losses stay what they were."""
    cuda = get_backend("cupy")
    x, t = data(96)
    runs, losses = [], []
    for graph in (False, True):
        trainer = nnx.Trainer(
            classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), backend="cupy", graph=graph
        )
        seen = []
        for i in range(12):
            part = np.s_[8 * (i % 5) : 8 * (i % 5) + (32 if i % 4 else 16)]
            seen.append(
                trainer.train_step(cuda.asarray(x[part], np.float32), cuda.asarray(t[part]))
            )
        runs.append(trainer)
        losses.append([float(loss) for loss in seen])
    same(*runs)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 12


def test_losses_of_single_steps_outlive_an_epoch_of_as_many() -> None:
    """The epochs of a graph share a loss log, but not one of which somebody has views."""
    cuda, (x, t) = get_backend("cupy"), data(64)
    trainer = nnx.Trainer(
        classifier(), nnx.SoftmaxNLL(), nnx.Adam(0.01), backend="cupy", graph=True
    )
    trainer.optimizer.PLAN = 2
    batch = cuda.asarray(x[:32], np.float32), cuda.asarray(t[:32])
    losses = [trainer.train_step(*batch) for _ in range(2)]
    before = [float(loss) for loss in losses]
    trainer.fit(x, t, batch_size=32)
    assert [float(loss) for loss in losses] == before


@pytest.mark.unpoisoned
def test_a_replayed_step_is_one_launch() -> None:
    """784-512-512-10, batch 128, Adam: one graph is launched; no allocation, no wait."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((256, 784)), rng.integers(0, 10, 256)
    found: list[tuple[Counts, dict[str, int]]] = []

    class Watch(nnx.Callback):
        """Counts the second step of the third epoch."""

        steps = 0

        def on_step_end(self, trainer: nnx.Trainer) -> None:
            self.steps += 1
            if self.steps == 5:
                self.blocks = contextlib.ExitStack()
                number = self.blocks.enter_context(graphs())
                found.append((self.blocks.enter_context(counted()), number))
            if self.steps == 6:
                self.blocks.close()

    trainer = nnx.Trainer(
        nnx.mlp([784, 512, 512, 10]), nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy", graph=True
    )
    trainer.fit(x, t, epochs=3, batch_size=128, callbacks=[Watch()])
    ((counts, number),) = found
    quiet(counts)
    if number:
        assert number == {"captured": 0, "launched": 1}
        assert counts.total <= 21  # all of them in the graph: 6 L + 2, and 1 for the metric


def test_what_changes_between_steps_is_seen_by_the_graph() -> None:
    """Learning rates set by hand, settings and data changed between fits, a state loaded."""
    x, t = data(128)
    runs = []
    for graph in (False, True):
        dropout, optimizer = nnx.Dropout(0.2), nnx.SGD(0.05, momentum=0.9)
        rng = np.random.default_rng(0)
        model = nnx.Sequential(
            nnx.Linear(20, 16, rng=rng), nnx.ReLU(), dropout, nnx.Linear(16, 5, rng=rng)
        )
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer, backend="cupy", graph=graph)

        class Slower(nnx.Callback):
            def on_step_end(self, trainer: nnx.Trainer) -> None:
                if trainer.optimizer.steps.number == 6:
                    trainer.optimizer.lr = 0.01
                if trainer.optimizer.steps.number == 10:
                    trainer.optimizer.load_state({"step": 3})

        trainer.fit(x, t, epochs=3, batch_size=32, callbacks=[Slower()])
        kept = {k: v if k == "step" else v.copy() for k, v in optimizer.state().items()}
        optimizer.momentum, dropout.p = 0.5, 0.4
        trainer.fit(x[::-1].copy(), t[::-1].copy(), epochs=2, batch_size=32)
        trainer.fit(x[:64], t[:64], epochs=2, batch_size=32)
        optimizer.load_state(kept)
        trainer.fit(x, t, epochs=2, batch_size=32)
        model.to("numpy")
        trainer.fit(x, t, batch_size=32)
        model.to("cupy")
        trainer.fit(x, t, epochs=2, batch_size=32)
        trainer.predict(x)
        trainer.evaluate(x, t)
        trainer.fit(x, t, epochs=1, batch_size=128)  # a larger arena
        trainer.fit(x, t, epochs=2, batch_size=32)
        runs.append(trainer)
    same(*runs)


def test_numbers_of_own_layers_and_losses_are_those_of_the_next_fit() -> None:
    """Also where their `config` doesn't have them."""

    class Scaled(nnx.Layer):
        factor = 1.0

        def forward(self, x: Array, *, step: Any = None) -> tuple[Array, Any]:
            return x * self.factor, None

        def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array:
            return dy * self.factor

    class Softer(nnx.SoftmaxNLL):
        factor = 1.0

        def __call__(self, prediction: Array, target: Array, *args: Any, **options: Any) -> Any:
            return super().__call__(prediction, target, *args, grad_scale=self.factor, **options)

    runs = []
    for graph in (False, True):
        rng = np.random.default_rng(0)
        scaled, loss = Scaled(), Softer()
        model = nnx.Sequential(nnx.Linear(20, 8, rng=rng), scaled, nnx.Linear(8, 5, rng=rng))
        trainer = nnx.Trainer(model, loss, nnx.SGD(0.1), backend="cupy", graph=graph)
        for factors in ((1.0, 1.0), (0.5, 1.0), (0.5, 0.3)):
            scaled.factor, loss.factor = factors
            trainer.fit(*data(128), epochs=2, batch_size=32)
        runs.append(trainer)
    same(*runs)


def test_a_graph_is_made_anew_when_the_memory_of_its_step_has_moved() -> None:
    """A larger batch makes a larger slab; the old memory soon belongs to somebody else."""
    cuda = get_backend("cupy")
    x, t = data(256)
    trainer = nnx.Trainer(
        classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), backend="cupy", graph=True
    )

    def steps(n: int) -> None:
        for _ in range(4):
            trainer.train_step(cuda.asarray(x[:n], np.float32), cuda.asarray(t[:n]))

    steps(32)
    steps(256)
    others = [cuda.xp.zeros(2**k, np.uint8) for k in range(9, 18) for _ in range(4)]
    steps(32)
    assert not any(a.any() for a in others)


@pytest.mark.parametrize("share", [8, 2, 1, 0.001])
def test_a_model_that_moved_away_and_back_between_steps_has_a_new_graph(share: float) -> None:
    """What a graph reads may have moved in part: parameters are back where they were, not all."""
    cuda = get_backend("cupy")
    x, t = data(32)
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(
            classifier(), nnx.SoftmaxNLL(), nnx.Adam(0.01), backend="cupy", graph=graph
        )
        kept = []
        for i in range(12):
            trainer.train_step(cuda.asarray(x, np.float32), cuda.asarray(t))
            if i >= 3:
                size = int(share * trainer.vector.value.nbytes)
                trainer.model.to("numpy")
                kept += [cuda.xp.zeros(size, np.uint8) for _ in range(4)]  # not there, where it was
                trainer.model.to("cupy")
        assert not any(a.any() for a in kept)
        runs.append(trainer)
    same(*runs)


def test_batches_of_ever_new_sizes_do_not_fill_the_memory() -> None:
    """For each size there is a place that a graph reads, but not for all that ever were."""
    cuda, (x, t) = get_backend("cupy"), data(32)
    there = cuda.asarray(x, np.float32), cuda.asarray(t)
    trainer = nnx.Trainer(
        nnx.Linear(20, 5, rng=np.random.default_rng(0)), nnx.SoftmaxNLL(), nnx.SGD(0.1),
        backend="cupy", graph=True,
    )  # fmt: skip
    pool, used = cuda.xp.get_default_memory_pool(), []
    for n in range(32, 0, -1):
        trainer.train_step(*(a[:n] for a in there))
        used.append(pool.used_bytes())
    assert max(used[20:]) <= used[15]


@pytest.mark.parametrize("graph", [False, True])
def test_arrays_of_the_host_are_an_error_that_says_so(graph: bool) -> None:
    x, t = data(32)
    trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy", graph=graph)
    with pytest.raises(TypeError, match="expected arrays of one backend, got"):
        trainer.train_step(x.astype(np.float32), t)


class Peeking(nnx.Layer):
    """Reads something on the host in each step, which a graph can't repeat."""

    def __init__(self, look: Callable[[Array, Any], Any], late: bool = False) -> None:
        self.look, self.late = look, late

    def forward(self, x: Array, *, step: Any = None) -> tuple[Array, Any]:
        if step is not None and not self.late:
            self.look(x, step)
        return x, step

    def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array:
        if self.late:
            self.look(dy, saved)
        return dy


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda x, step: float(x.sum()), "captur"),
        (lambda x, step: step.state.number, "reads its number on the host"),
        (lambda x, step: step.state.rate, "reads its position on the host"),
        (lambda x, step: x.dot(x.T), "cuBLAS"),
    ],
    ids=["wait", "number", "rate", "product of CuPy"],
)
@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_what_cannot_be_captured_runs_as_it_is(look: Any, message: str, late: bool) -> None:
    rng = np.random.default_rng(0)
    runs = []
    for graph in (False, True):
        rng = np.random.default_rng(0)
        model = nnx.Sequential(
            nnx.Linear(20, 8, rng=rng),
            Peeking(look, late),
            nnx.Dropout(),
            nnx.Linear(8, 5, rng=rng),
        )
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy", graph=graph)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(*data(), epochs=2, batch_size=32)
        assert len(said) == graph
        assert all(message in str(w.message) for w in said), str(said[0].message)
        runs.append(trainer)
    same(*runs)


class PeekingMetric(nnx.metrics.Metric):
    """Reads something on the host when all gradients are there."""

    name = "peeking"

    def start(self, backend: Any, n_models: int | None) -> Array:
        return backend.xp.zeros((), np.float64)

    def update(self, total: Array, prediction: Array, target: Array) -> None:
        total += float(prediction.sum())

    def result(self, total: np.ndarray, n: int) -> float:
        return float(total)


def test_what_a_capture_did_before_it_failed_does_not_count() -> None:
    """The gradients count as written while it goes on; those that follow mustn't add to them."""
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(
            classifier(), nnx.SoftmaxNLL(), nnx.SGD(0.1), backend="cupy", graph=graph
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(*data(), epochs=2, batch_size=32, metrics=[PeekingMetric()])
        assert len(said) == graph
        runs.append(trainer)
    same(*runs)


def test_an_error_of_a_layer_while_capturing_is_the_layers_own() -> None:
    """It comes up again in the step that runs as it is, and the trainer goes on afterwards."""

    class Failing(Peeking):
        calls = 0

    def fail(x: Array, step: Any) -> None:
        layer.calls += 1
        if layer.calls in (2, 3):
            raise ZeroDivisionError("the layer's own")

    layer = Failing(fail)
    rng = np.random.default_rng(0)
    model = nnx.Sequential(nnx.Linear(20, 8, rng=rng), layer, nnx.Linear(8, 5, rng=rng))
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy", graph=True)
    with (
        pytest.warns(RuntimeWarning, match="ZeroDivisionError: the layer's own"),
        pytest.raises(ZeroDivisionError),
    ):
        trainer.fit(*data(), epochs=1, batch_size=32)
    assert trainer.optimizer.state()["step"] == 1
    trainer.fit(*data(), epochs=1, batch_size=32)
    assert np.isfinite(trainer.history["loss"]).all()


def test_graphs_of_two_trainers_do_not_disturb_each_other() -> None:
    """One's short-lived arrays must not lie where the other's graph writes."""
    x, t = data(128)

    def make(seed: int, graph: bool) -> nnx.Trainer:
        model = nnx.mlp([20, 16 + seed, 5], dropout=0.3, seed=seed)
        return nnx.Trainer(
            model, nnx.SoftmaxMSE(), nnx.Adam(0.01), seed=seed, backend="cupy", graph=graph
        )

    metrics = [nnx.metrics.ConfusionMatrix(5), nnx.metrics.LogLoss()]
    alone = [make(seed, False) for seed in (1, 2)]
    for trainer in alone:
        trainer.fit(x, t, epochs=4, batch_size=32, metrics=metrics)
    together = [make(seed, True) for seed in (1, 2)]
    for _ in range(4):
        for trainer in together:
            trainer.fit(x, t, epochs=1, batch_size=32, metrics=metrics)
    for one, other in zip(alone, together, strict=True):
        same(one, other)


@pytest.mark.parametrize("own", [False, True], ids=["one stream", "own streams"])
def test_trainers_in_two_threads(own: bool) -> None:
    """They capture one after the other, and their graphs share no memory that may be in use."""
    import cupy

    x, t = data(128)

    def train(seed: int, graph: bool) -> nnx.Trainer:
        model = nnx.mlp([20, 16 + seed, 5], dropout=0.3, seed=seed)
        trainer = nnx.Trainer(
            model, nnx.SoftmaxNLL(), nnx.Adam(0.01), seed=seed, backend="cupy", graph=graph
        )
        for batch_size in (16, 32, 64):
            trainer.fit(x, t, epochs=3, batch_size=batch_size)
        return trainer

    def work(seed: int) -> nnx.Trainer:
        meet.wait()
        with cupy.cuda.Stream(non_blocking=True) if own else contextlib.nullcontext():
            trainer = train(seed, graph=True)
            get_backend("cupy").synchronize()
            return trainer

    alone = [train(seed, graph=False) for seed in (1, 2)]
    for _ in range(3):
        meet = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            for one, other in zip(alone, pool.map(work, (1, 2)), strict=True):
                same(one, other)


def test_a_graph_is_replayed_on_the_stream_it_was_captured_for() -> None:
    """Others have their own: they may run at the same time, and a graph has its own workspace."""
    import cupy

    cuda, (x, t) = get_backend("cupy"), data(32)
    batch = cuda.asarray(x, np.float32), cuda.asarray(t)
    trainer = nnx.Trainer(
        classifier(), nnx.SoftmaxNLL(), nnx.Adam(0.01), backend="cupy", graph=True
    )
    stream = cupy.cuda.Stream()  # waits for the default stream, and that for it
    with graphs() as found:
        for _ in range(4):
            trainer.train_step(*batch)
        with stream:
            for _ in range(4):
                trainer.train_step(*batch)
        trainer.train_step(*batch)
    if found:
        assert found == {"captured": 2, "launched": 7}


def test_on_numpy_the_flag_changes_nothing() -> None:
    runs = []
    for graph in (False, True):
        trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), graph=graph)
        trainer.fit(*data(), epochs=2, batch_size=32)
        runs.append(trainer)
    same(*runs)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_sent_data_arrive_whole_and_in_time(
    deferred: bool, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through two slots of pinned memory and another stream; also where all work is deferred."""
    x, t = data(333)

    def train() -> nnx.Trainer:
        trainer = nnx.Trainer(
            classifier(), nnx.SoftmaxNLL(), nnx.Adam(warmup), backend="cupy", graph=graph
        )
        trainer.fit(x, t, epochs=3, batch_size=32, validation=(x[:100], t[:100]))
        return trainer

    resident = train()
    monkeypatch.setattr(type(get_backend("cupy")), "fits", lambda self, nbytes: False)
    with contextlib.ExitStack() as stack:
        if deferred:
            cudasim = pytest.importorskip("cudasim", reason="only the simulator defers")
            stack.enter_context(cudasim.option("async", 1))
        same(resident, train())
        np.testing.assert_array_equal(train().predict(x), resident.predict(x))


def test_ctrl_c_while_data_are_sent_leaves_the_memory_to_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that has begun goes on; until it is over, neither side of it may be given away."""

    class Interrupted:
        def __getitem__(self, rows: Any) -> "Interrupted":
            return self

        def set(self, host: np.ndarray, stream: Any) -> None:
            raise KeyboardInterrupt

    cuda: Any = get_backend("cupy")
    held: list[Any] = []
    monkeypatch.setattr(cuda, "hold", lambda event, memory: held.append((event, memory)))
    feeder = cuda.feeder([np.full((32, 1000), 1.0), np.arange(32)], 16)
    _, slot = feeder._slots
    slot.there[1] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        feeder.send(np.arange(16))
    assert held == [(slot.copied, slot.hosts)]


def test_data_that_are_too_fragmented_for_the_device_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`fits` looks at the sum of the free memory, which need not be in one piece."""
    import cupy

    cuda: Any = get_backend("cupy")
    x, t = data(333)
    asarray = type(cuda).asarray

    def scarce(self: Any, a: Any, dtype: Any = None) -> Array:
        if getattr(a, "nbytes", 0) > 20_000:
            raise cupy.cuda.memory.OutOfMemoryError(a.nbytes, 0, 0)
        return asarray(self, a, dtype)

    runs = []
    for patch in (False, True):
        trainer = nnx.Trainer(classifier(), nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy")
        if patch:
            monkeypatch.setattr(type(cuda), "asarray", scarce)
        trainer.fit(x, t, epochs=2, batch_size=32)
        runs.append(trainer)
    same(*runs)
