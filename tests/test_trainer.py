"""The training loop: it learns, repeats bit for bit, and counts every sample for what it weighs."""

import contextlib
import csv
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import assert_close, assert_same_bits

import nnx
from nnx import (
    SGD,
    Accuracy,
    Adam,
    Callback,
    Dropout,
    Flatten,
    History,
    Layer,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    SoftmaxNLL,
    Trainer,
    get_backend,
    mlp,
)
from nnx.backends import Backend, XpBackend, backend_of
from nnx.backends.philox import SHUFFLE, generator

AND = (np.array([[0, 0], [0, 1], [1, 0], [1, 1]], float), np.array([[0], [0], [0], [1]], float))


def blobs(rng: np.random.Generator, n: int = 90, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Three clouds in four dimensions, far enough apart to learn."""
    t = np.arange(n) % 3
    centers = 3 * np.eye(3, 4)
    return (centers[t] + rng.standard_normal((n, 4))).astype(dtype), t


def classifier(
    backend: Any = "numpy",
    *,
    dropout: float = 0.25,
    seed: int = 0,
    optimizer: Any = None,
    dtype: Any = np.float32,
    models: int | None = None,
) -> Trainer:
    model = mlp([4, 16, 3], dropout=dropout, seed=seed, dtype=dtype, n_models=models)
    loss = SoftmaxNLL(n_models=models)
    return Trainer(model, loss, optimizer or Adam(0.01), seed=seed, backend=backend)


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: backend_of(a).to_numpy(a).copy() for name, a in trainer.model.state().items()}


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    expected = weights(other)
    for name, array in weights(one).items():
        assert_same_bits(array, expected[name])


# ---- it learns -------------------------------------------------------------------------------


def test_two_three_one_network_learns_and(backend: Backend, dtype: Any) -> None:
    model = mlp([2, 3, 1], activation="tanh", dtype=dtype)
    trainer = Trainer(model, MeanSquaredError(), SGD(0.5), backend=backend)
    history = trainer.fit(*AND, epochs=300, batch_size=4)
    assert history["loss"][-1] < 0.01 < history["loss"][0]
    np.testing.assert_array_equal(trainer.predict(AND[0]) > 0.5, AND[1] > 0.5)


def test_classifier_learns(backend: Backend, rng: np.random.Generator) -> None:
    x, t = blobs(rng, 300)
    trainer = classifier(backend)
    history = trainer.fit(x[:200], t[:200], epochs=15, validation=(x[200:], t[200:]))
    assert history["loss"][-1] < 0.3 < history["loss"][0]
    assert history["validation_accuracy"][-1] > 0.93
    assert trainer.evaluate(x[200:], t[200:])["accuracy"] == history["validation_accuracy"][-1]


def test_images_go_through_flatten(backend: Backend, rng: np.random.Generator) -> None:
    x, t = blobs(rng)
    model = Sequential(Flatten(), mlp([4, 8, 3]))
    history = Trainer(model, SoftmaxNLL(), Adam(0.02), backend=backend).fit(
        x.reshape(-1, 2, 2), t, epochs=15
    )
    assert history["accuracy"][-1] > 0.9


# ---- it repeats ------------------------------------------------------------------------------


def test_same_seed_same_bits(backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
    x, t = blobs(rng, dtype=dtype)
    one, two = (classifier(backend, seed=3, dtype=dtype) for _ in range(2))
    histories = [trainer.fit(x, t, epochs=3, batch_size=16) for trainer in (one, two)]
    assert histories[0] == histories[1]
    assert_same_weights(one, two)


def test_another_seed_gives_another_run(rng: np.random.Generator) -> None:
    x, t = blobs(rng)
    model = mlp([4, 8, 3]).state()
    losses = []
    for seed, dropout in ((0, 0.0), (1, 0.0), (0, 0.5), (1, 0.5)):
        trainer = classifier(seed=seed, dropout=dropout)
        trainer.model.load_state(mlp([4, 16, 3], dropout=dropout, seed=9).state())
        losses.append(trainer.fit(x, t, batch_size=16)["loss"][0])
    assert len(set(losses)) == 4
    assert model["0.weight"].shape == (4, 8)


def test_ten_fits_of_one_epoch_are_one_fit_of_ten(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = blobs(rng)
    once, often = (classifier(backend, optimizer=Adam(lambda i: 0.01 / (1 + i))) for _ in range(2))
    once.fit(x, t, epochs=10, batch_size=16)
    for i in range(10):
        assert len(often.fit(x, t, batch_size=16)["loss"]) == i + 1
    assert once.history == often.history
    assert once.history["epoch"] == list(range(1, 11))
    assert_same_weights(once, often)


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_is_train_step_over_the_batches(
    backend: Backend, rng: np.random.Generator, shuffle: bool
) -> None:
    x, t = blobs(rng, 50)
    fitted, stepped = (classifier(backend, seed=5) for _ in range(2))
    fitted.fit(x, t, epochs=3, batch_size=16, shuffle=shuffle)
    for epoch in range(3):
        order = np.arange(50)
        if shuffle:  # NumPy's Philox with key (seed, 2^64 - 1), at the counter of the epoch
            key = np.array([5, 2**64 - 1], np.uint64)
            counter = np.array([0, 0, 0, epoch], np.uint64)
            order = np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(50)
            assert (order != np.arange(50)).any()
        for start in range(0, 50, 16):
            rows = order[start : start + 16]
            stepped.train_step(backend.asarray(x[rows]), backend.asarray(t[rows]))
    assert_same_weights(fitted, stepped)


def test_train_step_returns_the_loss_before_the_update(
    backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    x, t = blobs(rng, dtype=dtype)
    trainer = classifier(backend, dropout=0, dtype=dtype)
    before = trainer.evaluate(x, t)["loss"]
    losses = [trainer.train_step(backend.asarray(x), backend.asarray(t)) for _ in range(3)]
    assert backend_of(*losses) is backend
    assert_close(
        backend.to_numpy(losses[0]), before, depth=10, dtype=dtype
    )  # not overwritten since
    assert backend.to_numpy(losses[2]) < backend.to_numpy(losses[1])


class Tap(Layer):
    """The identity; keeps what comes through."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def forward(self, x: Any, *, step: Any = None) -> tuple[Any, Any]:
        self.seen.append(backend_of(x).to_numpy(x).copy())
        return x, None

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        return dy if need_dx else None


def test_dropout_masks_follow_from_seed_layer_use_and_step(backend: Backend) -> None:
    tap, drop = Tap(), Dropout(0.5)
    model = Sequential(drop, tap, drop, tap, Linear(4, 1, rng=np.random.default_rng(0)))
    trainer = Trainer(model, MeanSquaredError(), SGD(0.1), seed=8, backend=backend)
    x = np.ones((16, 4), np.float32)
    for _ in range(3):
        trainer.train_step(backend.asarray(x), backend.asarray(x[:, :1]))
    for i, seen in enumerate(tap.seen):
        step, use = divmod(i, 2)
        masks = [oracles.dropped(0.5, (16, 4), 8, 1, u, step) for u in range(use + 1)]
        np.testing.assert_array_equal(seen == 0, np.logical_or.reduce(masks))


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.1, momentum=0.9), Adam], ids=["sgd", "adam"])
def test_a_run_taken_up_again_is_the_run_not_interrupted(
    backend: Backend, rng: np.random.Generator, optimizer: Any
) -> None:
    batches = [[backend.asarray(a) for a in blobs(rng, 16)] for _ in range(6)]
    straight, first, second = (classifier(backend, optimizer=optimizer()) for _ in range(3))
    for batch in batches:
        straight.train_step(*batch)
    for batch in batches[:3]:
        first.train_step(*batch)
    second.model.load_state(first.model.state())
    second.optimizer.load_state(first.optimizer.state())
    for batch in batches[3:]:
        second.train_step(*batch)
    assert_same_weights(second, straight)


def test_train_step_goes_past_the_plan(backend: Backend) -> None:
    optimizer = SGD(0.1)
    optimizer.PLAN = 3
    trainer = Trainer(mlp([2, 3, 1]), MeanSquaredError(), optimizer, backend=backend)
    x, t = (backend.asarray(a.astype(np.float32)) for a in AND)
    losses = [float(backend.to_numpy(trainer.train_step(x, t))) for _ in range(10)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.steps.number == 10


# ---- what the history counts -----------------------------------------------------------------


def frozen(backend: Backend, dtype: Any, models: int | None = None) -> Trainer:
    """A trainer that measures and changes nothing."""
    return classifier(backend, dropout=0, optimizer=SGD(0), dtype=dtype, models=models)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_history_weights_the_short_last_batch(
    backend: Backend, rng: np.random.Generator, batch_size: int, weighted: bool
) -> None:
    x, t = blobs(rng, 50, np.float64)
    x[::7] *= 10  # so that batches differ
    weight = rng.uniform(0, 3, 50) if weighted else None
    trainer = frozen(backend, np.float64)
    expected = trainer.evaluate(x, t, sample_weight=weight)
    history = trainer.fit(x, t, batch_size=batch_size, sample_weight=weight, shuffle=False)
    assert history["loss"][0] == pytest.approx(expected["loss"], rel=1e-12)
    assert history["accuracy"][0] == expected["accuracy"]
    trainer.fit(x, t, batch_size=batch_size, sample_weight=weight)  # shuffled
    assert history["loss"][1] == pytest.approx(expected["loss"], rel=1e-12)
    assert type(history["loss"][0]) is float


@pytest.mark.parametrize("batch_size", [1, 7, 50, 512])
def test_evaluate_and_predict_do_not_depend_on_the_batch_size(
    backend: Backend, dtype: Any, rng: np.random.Generator, batch_size: int
) -> None:
    x, t = blobs(rng, 50, dtype)
    weight = rng.uniform(0, 3, 50)
    trainer = frozen(backend, dtype)
    whole = trainer.evaluate(x, t, sample_weight=weight)
    parts = trainer.evaluate(x, t, sample_weight=weight, batch_size=batch_size)
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5 if dtype == np.float32 else 1e-12)
    outputs = trainer.predict(x, batch_size=batch_size)
    assert isinstance(outputs, np.ndarray)
    assert_close(outputs, trainer.predict(x), depth=16)
    assert_close(outputs, backend.to_numpy(trainer.model(backend.asarray(x))), depth=16)


def test_evaluation_drops_nothing_and_changes_nothing(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = blobs(rng)
    trainer, other = classifier(backend, dropout=0.9), classifier(backend, dropout=0)
    first = trainer.evaluate(x, t)
    assert first == trainer.evaluate(x, t) == other.evaluate(x, t)
    assert_same_weights(trainer, classifier(backend, dropout=0.9))
    assert trainer.history == {}


def test_weight_two_is_a_sample_given_twice(backend: Backend, rng: np.random.Generator) -> None:
    x, t = blobs(rng, 20, np.float64)
    weight = rng.integers(0, 3, 20)
    rows = np.repeat(np.arange(20), weight)
    results = []
    for arguments in (
        {"x": x, "t": t, "sample_weight": weight},
        {"x": x[rows], "t": t[rows]},
    ):
        trainer = classifier(backend, dropout=0, optimizer=SGD(0.1), dtype=np.float64)
        trainer.fit(**arguments, epochs=5, batch_size=1000)
        results.append((weights(trainer), trainer.history["loss"]))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-12)
    for name, array in results[0][0].items():
        assert_close(array, results[1][0][name], depth=100)


def test_weights_of_zero_leave_everything_as_it_is(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = blobs(rng, 20)
    trainer = classifier(backend, optimizer=SGD(0.1))
    before = weights(trainer)
    trainer.fit(x, t, sample_weight=np.zeros(20))
    assert trainer.history["loss"] == [0]
    for name, array in weights(trainer).items():
        assert_same_bits(array, before[name])


def test_metrics_can_be_chosen(rng: np.random.Generator) -> None:
    x, t = blobs(rng)
    assert list(classifier().fit(x, t, metrics=())) == ["epoch", "loss"]
    assert list(classifier().fit(x, t, metrics=[Accuracy()])) == ["epoch", "loss", "accuracy"]
    regressor = Trainer(mlp([4, 1]), MeanSquaredError(), SGD(0.01))
    assert list(regressor.fit(x, t[:, None])) == ["epoch", "loss"]


def test_validation_is_measured_at_the_end_of_each_epoch(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = blobs(rng)
    trainer = classifier(backend)
    for epoch in range(3):
        history = trainer.fit(x[:60], t[:60], validation=(x[60:], t[60:]))
        expected = trainer.evaluate(x[60:], t[60:])
        assert history["validation_loss"][epoch] == expected["loss"]
        assert history["validation_accuracy"][epoch] == expected["accuracy"]


def test_k_models_are_measured_apart(backend: Backend, rng: np.random.Generator) -> None:
    x, t = blobs(rng, 50, np.float64)
    trainer = frozen(backend, np.float64, models=3)
    history = trainer.fit(x, t, batch_size=16, validation=(x, t))
    outputs = trainer.predict(x, batch_size=7)
    assert outputs.shape == (3, 50, 3)
    for k in range(3):
        alone = frozen(backend, np.float64)
        alone.model.load_state({name: a[k] for name, a in weights(trainer).items()})
        expected = alone.evaluate(x, t)
        for prefix in ("", "validation_"):
            assert history[f"{prefix}loss"][0][k] == pytest.approx(expected["loss"], rel=1e-12)
            assert history[f"{prefix}accuracy"][0][k] == expected["accuracy"]
        assert_close(outputs[k], alone.predict(x), depth=16)


def test_history_as_csv(tmp_path: Path, rng: np.random.Generator) -> None:
    x, t = blobs(rng)
    path = tmp_path / "history.csv"
    history = classifier().fit(x, t, epochs=3)
    history.to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert list(rows[0]) == ["epoch", "loss", "accuracy"]
    for i, row in enumerate(rows):
        assert {name: float(number) for name, number in row.items()} == {
            name: values[i] for name, values in history.items()
        }


def test_history_of_k_models_as_csv(tmp_path: Path) -> None:
    history = History()
    for epoch in (1, 2):
        history.append({"epoch": epoch, "loss": np.array([0.5, 0.25]) / epoch})
    history.append({"epoch": 3, "score": np.array([1, 2])})
    history.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().split() == [
        "epoch,loss[0],loss[1],score[0],score[1]",
        "1,0.5,0.25,nan,nan",
        "2,0.25,0.125,nan,nan",
        "3,nan,nan,1.0,2.0",
    ]


def test_history_of_fits_that_measured_different_things(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, t = blobs(rng)
    trainer = classifier()
    trainer.fit(x, t, epochs=2)
    trainer.fit(x, t, validation=(x, t))
    trainer.fit(x, t, metrics=())
    history = trainer.history
    assert {len(column) for column in history.values()} == {4}
    assert [math.isnan(a) for a in history["validation_loss"]] == [True, True, False, True]
    assert [math.isnan(a) for a in history["accuracy"]] == [False, False, False, True]
    history.to_csv(tmp_path / "history.csv")
    assert len((tmp_path / "history.csv").read_text().split()) == 5


# ---- callbacks and the progress bar ----------------------------------------------------------


class Recorder(Callback):
    """Notes what it is called with, and stops after some epochs."""

    def __init__(self, name: str, events: list[Any], stop_after: int = 99) -> None:
        self.name, self.events, self.stop_after = name, events, stop_after

    def on_step_end(self, trainer: Trainer) -> None:
        self.events.append((self.name, trainer.optimizer.steps.number))

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> bool | None:
        self.events.append((self.name, sorted(record), trainer.epoch, len(trainer.history["loss"])))
        return trainer.epoch >= self.stop_after


def test_callbacks_are_called_in_order(rng: np.random.Generator) -> None:
    x, t = blobs(rng, 30)
    events: list[Any] = []
    callbacks = [Recorder("a", events), Recorder("b", events)]
    classifier().fit(x, t, epochs=2, batch_size=16, callbacks=callbacks)
    names = ["accuracy", "loss"]
    expected: list[Any] = []
    for epoch, steps in ((1, (1, 2)), (2, (3, 4))):
        expected += [(name, step) for step in steps for name in "ab"]
        expected += [(name, names, epoch, epoch) for name in "ab"]
    assert events == expected


def test_a_state_loaded_in_the_middle_of_an_epoch(
    backend: Backend, rng: np.random.Generator
) -> None:
    """Learning rates and dropout masks are those of its step number; no sample is left out."""
    x, t = blobs(rng, 70)

    class Back(Callback):
        """After the third step, back to what was after the first."""

        def on_step_end(self, trainer: Trainer) -> None:
            optimizer, here = trainer.optimizer, trainer.backend
            state = optimizer.state()
            seen.append(state["step"])
            if len(seen) == 1:
                self.kept = {
                    name: a if name == "step" else here.to_numpy(a).copy()
                    for name, a in state.items()
                }
            if len(seen) == 3:
                optimizer.load_state(self.kept)

    trainer, by_hand = (
        classifier(backend, optimizer=Adam(lambda step: 0.1 / (1 + step))) for _ in range(2)
    )
    seen: list[int] = []
    trainer.fit(x, t, batch_size=16, callbacks=[Back()])
    assert seen == [1, 2, 3, 2, 3]
    assert np.isfinite(trainer.history["loss"]).all()

    order = generator(0, SHUFFLE, step=0).permutation(70)
    seen, callback = [], Back()
    for start in range(0, 70, 16):
        batch = order[start : start + 16]
        by_hand.train_step(backend.asarray(x[batch]), backend.asarray(t[batch]))
        callback.on_step_end(by_hand)
    assert_same_weights(trainer, by_hand)


def test_a_callback_ends_the_training_after_the_others_were_asked(rng: np.random.Generator) -> None:
    x, t = blobs(rng, 30)
    events: list[Any] = []
    trainer = classifier()
    callbacks = [Recorder("a", events, stop_after=2), Recorder("b", events), Callback()]
    trainer.fit(x, t, epochs=9, batch_size=30, callbacks=callbacks)
    assert trainer.epoch == len(trainer.history["loss"]) == 2
    assert events[-1][0] == "b"


def test_progress_writes_only_when_asked(
    capfd: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    x, t = blobs(rng, 30)
    classifier().fit(x, t, epochs=2)
    assert capfd.readouterr() == ("", "")
    classifier().fit(x, t, epochs=2, batch_size=10, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "6/6" in err
    assert "loss=" in err


# ---- the user's arrays -----------------------------------------------------------------------


def test_the_users_arrays_are_never_written(backend: Backend, dtype: Any) -> None:
    x, t = blobs(np.random.default_rng(0), 33, dtype)
    weight = np.random.default_rng(1).uniform(0, 2, 33).astype(dtype)
    copies = [a.copy() for a in (x, t, weight)]
    for a in (x, t, weight):
        a.flags.writeable = False
    trainer = classifier(backend, dtype=dtype)
    trainer.fit(x, t, epochs=2, batch_size=8, sample_weight=weight, validation=(x, t))
    trainer.evaluate(x, t, sample_weight=weight)
    trainer.predict(x)
    for a, copy in zip((x, t, weight), copies, strict=True):
        assert_same_bits(a, copy)


def test_a_batch_given_to_train_step_is_never_written(
    backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    hosts = [*blobs(rng, 33, dtype), rng.uniform(0, 2, 33).astype(dtype)]
    arrays = [backend.asarray(a.copy()) for a in hosts]
    trainer = classifier(backend, dtype=dtype)
    for _ in range(3):
        trainer.train_step(*arrays)
    for there, here in zip(arrays, hosts, strict=True):
        assert_same_bits(backend.to_numpy(there), here)


def test_data_may_come_as_anything_array_like(rng: np.random.Generator) -> None:
    x, t = blobs(rng, 12)
    results = []
    wide = np.repeat(x, 2, axis=0)
    for xs, ts in (
        (x, t),
        (x.tolist(), t.tolist()),
        (x.astype(np.float64), t.astype(np.uint8)),
        (wide[::2], np.eye(3)[t]),
        (np.asfortranarray(x), t.astype(float)),
    ):
        trainer = classifier()
        trainer.fit(xs, ts, batch_size=5)
        results.append(weights(trainer))
    for found in results[1:]:
        for name, array in found.items():
            assert_same_bits(array, results[0][name])


@pytest.mark.gpu
def test_data_may_be_on_the_device_already(rng: np.random.Generator) -> None:
    device = get_backend("cupy")
    x, t = blobs(rng, 12)
    here, there = classifier(device), classifier(device)
    here.fit(x, t, batch_size=5)
    there.fit(device.asarray(x), device.asarray(t), batch_size=5)
    assert_same_weights(here, there)
    assert_same_bits(here.predict(x), there.predict(device.asarray(x)))


def test_data_that_do_not_fit_on_the_device_are_sent_batch_by_batch(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    x, t = blobs(rng, 50)
    weight = rng.uniform(0, 2, 50)
    resident, sent = classifier(backend), classifier(backend)
    resident.fit(x, t, epochs=2, batch_size=16, sample_weight=weight)
    monkeypatch.setattr(type(backend), "fits", lambda self, nbytes: False)
    sent.fit(x, t, epochs=2, batch_size=16, sample_weight=weight)
    assert resident.history == sent.history
    assert_same_weights(resident, sent)


# ---- memory ----------------------------------------------------------------------------------


def test_no_result_depends_on_what_memory_held(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, rng: np.random.Generator
) -> None:
    x, t = blobs(rng, 50)
    poisoned = classifier(backend)
    assert XpBackend.empty.__name__ == "poisoned"
    poisoned.fit(x, t, epochs=2, batch_size=16)
    monkeypatch.undo()
    assert XpBackend.empty.__name__ == "empty"
    clean = classifier(backend)
    clean.fit(x, t, epochs=2, batch_size=16)
    assert poisoned.history == clean.history
    assert_same_weights(poisoned, clean)


def test_the_slab_grows_in_the_first_step_only(backend: Backend, rng: np.random.Generator) -> None:
    x, t = (backend.asarray(a) for a in blobs(rng, 48))
    trainer = classifier(backend)
    sizes = []
    for n in (48, 48, 16, 48, 16, 48):
        trainer.train_step(x[:n], t[:n])
        sizes.append(trainer._arena.nbytes)
    assert sizes[0] > 0
    assert sizes == sizes[:1] * 6


@pytest.mark.unpoisoned
def test_activations_of_later_steps_reuse_memory(rng: np.random.Generator) -> None:
    # batches of 4096: the activations of one hidden layer alone are 1 MB
    x, t = rng.standard_normal((4096, 4)), rng.standard_normal((4096, 1))
    model = Sequential(
        Linear(4, 32, rng=rng, dtype=np.float64), ReLU(), Linear(32, 1, rng=rng, dtype=np.float64)
    )
    trainer = Trainer(model, MeanSquaredError(), SGD(1e-3))
    for _ in range(2):
        trainer.train_step(x, t)
    tracemalloc.start()
    try:
        for _ in range(3):
            trainer.train_step(x, t)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_an_interrupted_step_leaves_the_trainer_usable(
    backend: Backend, rng: np.random.Generator
) -> None:
    x, t = (backend.asarray(a) for a in blobs(rng, 20))
    trainer, other = classifier(backend, dropout=0), classifier(backend, dropout=0)
    for each in (trainer, other):
        each.train_step(x, t)
    with pytest.raises(ValueError, match="last axis 4"):
        trainer.train_step(x[:, :3], t)
    for each in (trainer, other):
        each.train_step(x, t)
    assert_same_weights(trainer, other)


def test_a_step_without_samples_changes_nothing(backend: Backend) -> None:
    trainer, untouched = (classifier(backend, dropout=0) for _ in range(2))
    loss = trainer.train_step(backend.xp.zeros((0, 4), np.float32), backend.xp.zeros(0, np.int64))
    assert float(loss) == 0
    assert_same_weights(trainer, untouched)


def test_ctrl_c_between_an_update_and_its_count(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has counted the step and the host hasn't; later losses are their own again."""
    x, t = blobs(rng, 20)
    trainer, there = classifier(backend, dropout=0), (backend.asarray(x), backend.asarray(t))
    first = trainer.train_step(*there)
    kept = float(first)

    def interrupted(state: Any, steps: int = 1) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.optimizer.steps), "count", interrupted)
        in_c = backend.graphs_unasked  # where the kernel has counted, there is no line in between
        with contextlib.nullcontext() if in_c else pytest.raises(KeyboardInterrupt):
            trainer.train_step(*there)
    for _ in range(3):
        expected = trainer.evaluate(x, t)["loss"]
        np.testing.assert_allclose(float(trainer.train_step(*there)), expected, rtol=1e-6)
    assert float(first) == kept


# ---- several trainers, several places --------------------------------------------------------


def test_a_second_trainer_for_the_same_model(backend: Backend, rng: np.random.Generator) -> None:
    x, t = blobs(rng)
    first = classifier(backend, dropout=0)
    first.fit(x, t, epochs=2)
    second = Trainer(first.model, SoftmaxNLL(), Adam(0.01), backend=backend)
    assert second.vector is first.vector
    before = weights(first)

    # a new Adam starts anew: as that of a new model with the same weights
    other = classifier(backend, dropout=0)
    other.model.load_state({name: backend.asarray(a) for name, a in before.items()})
    fresh = Trainer(other.model, SoftmaxNLL(), Adam(0.01), backend=backend)
    assert second.fit(x, t) == fresh.fit(x, t)
    assert_same_weights(second, fresh)
    assert first.epoch == 2
    first.fit(x, t)
    assert first.optimizer.steps.number == 9


def test_a_trainer_of_a_part_of_a_trained_model_is_an_error() -> None:
    trainer = classifier()
    part = trainer.model[0]  # type: ignore[index]
    with pytest.raises(ValueError, match="already belongs to another vector"):
        Trainer(part, SoftmaxNLL(), SGD())


def test_an_optimizer_belongs_to_one_trainer() -> None:
    optimizer = SGD()
    classifier(optimizer=optimizer)
    with pytest.raises(ValueError, match="SGD: already bound"):
        classifier(optimizer=optimizer)


def test_the_flag_decides_where_training_runs(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = mlp([4, 3]), backend.name
    trainer = Trainer(model, SoftmaxNLL(), SGD(), backend=name)
    assert trainer.backend is backend
    assert all(backend_of(p.value) is backend for _, p in model.parameters())
    assert Trainer(model, SoftmaxNLL(), SGD()).backend is backend  # where the parameters are
    monkeypatch.setenv("NNX_BACKEND", name)
    assert Trainer(mlp([4, 3]), SoftmaxNLL(), SGD()).backend is backend


@pytest.mark.gpu
def test_a_model_that_moves_goes_on_training(rng: np.random.Generator) -> None:
    x, t = blobs(rng, dtype=np.float64)
    trainer, stayed = (classifier(dropout=0.2, dtype=np.float64) for _ in range(2))
    for place in ("numpy", "cupy", "numpy"):
        trainer.model.to(place)
        trainer.fit(x, t, batch_size=16)
        stayed.fit(x, t, batch_size=16)
    expected = weights(stayed)
    for name, array in weights(trainer).items():
        assert_close(array, expected[name], depth=10**6)


# ---- errors ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_error(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((8, 4)).astype(np.float32)
    trainer = Trainer(mlp([4, 1]), MeanSquaredError(), SGD(1e25), backend=backend)
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match=r"(nan|inf) in epoch \d; lower the learning rate"),
    ):
        trainer.fit(x, x[:, :1], epochs=9)
    assert trainer.epoch == len(trainer.history["loss"])


def test_a_model_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="model with parameters"):
        Trainer(ReLU(), SoftmaxNLL(), SGD())


def test_model_and_loss_must_agree_on_the_number_of_models() -> None:
    with pytest.raises(ValueError, match="got 3 and None; pass n_models=3"):
        Trainer(mlp([4, 3], n_models=3), SoftmaxNLL(), SGD())


X, T = np.ones((6, 4)), np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "at least 1, got 0"),
        ({"t": np.array([0, 1, 2, 3, 1, 2])}, ValueError, r"labels in 0\.\.2, got 3 at index 3"),
        ({"t": np.array([0, -1, 2, 0, 1, 2])}, ValueError, "got -1 at index 1"),
        ({"t": T[:5]}, ValueError, r"expected 6 labels .*\(5,\)"),
        ({"t": T + 0.5}, TypeError, "got 0.5 at index 0"),
        ({"x": X[:, :3]}, ValueError, "last axis 4, got input of shape"),
        ({"x": np.where(X > 0, np.nan, X)}, ValueError, "24 NaN or infinite"),
        ({"x": X[:0], "t": T[:0]}, ValueError, r"\(0, 4\)"),
        ({"x": X[0]}, ValueError, r"\(4,\)"),
        (
            {"sample_weight": np.ones(5)},
            ValueError,
            r"6 finite, non-negative sample weights, got shape \(5,\)",
        ),
        ({"sample_weight": -np.ones(6)}, ValueError, "6 finite, non-negative sample weights"),
        (
            {"sample_weight": np.full(6, np.nan)},
            ValueError,
            "6 finite, non-negative sample weights",
        ),
        (
            {"sample_weight": np.full(6, np.inf)},
            ValueError,
            "6 finite, non-negative sample weights",
        ),
        ({"validation": (X, T[:5])}, ValueError, r"\(5,\)"),
        ({"validation": (X, T + 1)}, ValueError, "got 3 at index 2"),
    ],
)
def test_fit_names_what_is_wrong_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    trainer = classifier()
    with pytest.raises(error, match=message):
        trainer.fit(**{"x": X, "t": T, **arguments})
    assert trainer.epoch == 0
    assert trainer.optimizer.steps.number == 0
    assert_same_weights(trainer, classifier())


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (np.ones((5, 1)), r"6 finite targets, one per sample, got shape \(5, 1\)"),
        (np.full((6, 1), np.nan), "6 finite targets"),
        (np.ones(6), r"targets of shape \(6, 1\), got \(6,\)"),
    ],
)
def test_fit_names_targets_that_do_not_fit(t: np.ndarray, message: str) -> None:
    trainer = Trainer(mlp([4, 1]), MeanSquaredError(), SGD())
    with pytest.raises(ValueError, match=message):
        trainer.fit(X, t)


def test_no_epochs_are_no_epochs() -> None:
    trainer = classifier()
    assert trainer.fit(X, T, epochs=0) == {}
    assert_same_weights(trainer, classifier())


# ---- layers and losses of one's own ----------------------------------------------------------


def test_layers_that_others_write_train_like_ours(rng: np.random.Generator) -> None:
    class Scale(Layer):
        """`y = factor * x`, with one factor to learn."""

        def __init__(self) -> None:
            self.factor = nnx.Parameter(np.ones(()))

        def forward(self, x: Any, *, step: Any = None) -> tuple[Any, Any]:
            return x * self.factor.value, x

        def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
            total = (dy * saved).sum()
            if self.factor.accumulate():
                self.factor.grad += total
            else:
                self.factor.grad[...] = total
            return dy * self.factor.value if need_dx else None

    x = rng.standard_normal((20, 1))
    scale = Scale()
    nnx.check_gradients(Sequential(scale, Dropout(0.3), scale), x)
    trainer = Trainer(scale, MeanSquaredError(), SGD(0.3))
    history = trainer.fit(x, 3 * x, epochs=60, batch_size=20)
    assert history["loss"][-1] < 1e-9
    assert scale.factor.value == pytest.approx(3)


def test_threads_train_models_of_their_own(rng: np.random.Generator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, t = blobs(rng)

    def run(seed: int) -> Trainer:
        trainer = classifier(seed=seed)
        trainer.fit(x, t, epochs=5, batch_size=16)
        return trainer

    with ThreadPoolExecutor(3) as pool:
        together: Sequence[Trainer] = list(pool.map(run, range(3)))
    for seed, trainer in enumerate(together):
        assert_same_weights(trainer, run(seed))


def test_drop_last_leaves_out_the_batch_that_is_not_full(
    backend: Backend, rng: np.random.Generator
) -> None:
    """Of 33 samples in batches of 8 one is left over, and `BatchNorm` refuses it."""
    x, t = blobs(rng, 33)
    layers = nnx.Linear(x.shape[1], 4, rng=rng), nnx.BatchNorm(4), nnx.Linear(4, 3, rng=rng)
    trainer = nnx.Trainer(nnx.Sequential(*layers), nnx.SoftmaxNLL(), nnx.SGD(0.0), backend=backend)
    with pytest.raises(ValueError, match="BatchNorm"):
        trainer.fit(x, t, batch_size=8)
    weight = np.ones(33)
    trainer.fit(x, t, epochs=2, batch_size=8, drop_last=True, sample_weight=weight)
    assert trainer.optimizer.steps.number == 4 + 2 * 4  # four before the refusal
    whole = nnx.Trainer(
        nnx.Linear(x.shape[1], 4, rng=rng), nnx.MeanSquaredError(), nnx.SGD(0.0), backend=backend
    )
    target = rng.standard_normal((33, 4))
    order = generator(0, SHUFFLE, step=0).permutation(33)[:32]
    record = whole.fit(x, target, batch_size=8, drop_last=True)
    expected = whole.evaluate(x[order], target[order])
    np.testing.assert_allclose(record["loss"][-1], expected["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="nothing of 33 samples in batches of 64"):
        whole.fit(x, target, batch_size=64, drop_last=True)


@pytest.mark.parametrize("graph", [False, True])
def test_gradients_left_behind_do_not_count_in_the_next_step(backend: Backend, graph: bool) -> None:
    """A backward pass by hand, and a step that was interrupted before its update."""
    x, t = blobs(np.random.default_rng(0), 30)
    x, t = backend.asarray(x), backend.asarray(t)
    trainers = [classifier(backend, optimizer=nnx.SGD(0.1)) for _ in range(2)]
    disturbed = trainers[1]
    disturbed.graph = graph

    def by_hand() -> None:
        y, saved = disturbed.model.forward(x)
        _, dy = disturbed.loss(y, t)
        disturbed.model.backward(dy, saved)

    for _ in range(4):  # with a graph: as it is, captured, replayed
        by_hand()
        for trainer in trainers:
            trainer.train_step(x, t)
            assert all(p.fresh for p in trainer.vector.parameters)
    values = [backend.to_numpy(trainer.vector.value) for trainer in trainers]
    assert_same_bits(values[1], values[0])


@pytest.mark.parametrize("size", [0, -1, 32.0, True, "32"])
def test_a_batch_size_is_a_positive_integer(size: Any) -> None:
    x, t = blobs(np.random.default_rng(0), 30)
    trainer = classifier()
    for call in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match="batch_size as an integer of at least 1"):
            call(x, t, batch_size=size)
    with pytest.raises(ValueError, match="predict: expected batch_size"):
        trainer.predict(x, batch_size=size)


def test_features_that_float32_cannot_hold_are_refused() -> None:
    x, t = blobs(np.random.default_rng(0), 30, np.float64)
    x[3, 2] = 1e300
    for call in (lambda: classifier().fit(x, t), lambda: classifier().predict(x)):
        with pytest.raises(ValueError, match=r"in float32.*row 3, column 2"):
            call()
    assert np.isfinite(classifier(dtype=np.float64).evaluate(x, t)["accuracy"])


@pytest.mark.gpu
@pytest.mark.parametrize(("home", "away"), [("numpy", "cupy"), ("cupy", "numpy")])
def test_a_callback_may_move_the_model(home: str, away: str) -> None:
    x, t = blobs(np.random.default_rng(0), 30, np.float64)

    class Move(nnx.Callback):
        def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
            trainer.model.to(away if trainer.epoch % 2 else home)

    runs = []
    for callbacks in ([], [Move()]):
        trainer = classifier(home, dtype=np.float64)
        runs.append(trainer.fit(x, t, epochs=4, validation=(x, t), callbacks=callbacks))
    for name, values in runs[0].items():
        np.testing.assert_allclose(runs[1][name], values, rtol=1e-9)


def test_a_new_learning_rate_holds_from_the_next_step_on(backend: Backend) -> None:
    x, t = (backend.asarray(a) for a in blobs(np.random.default_rng(0), 30))
    trainer = classifier(backend, optimizer=nnx.SGD(0.1))
    trainer.train_step(x, t)
    before = weights(trainer)
    trainer.optimizer.lr = 0.0
    trainer.train_step(x, t)
    for name, value in weights(trainer).items():
        assert_same_bits(value, before[name])
    trainer.optimizer.lr = 0.1
    trainer.train_step(x, t)
    assert any((weights(trainer)[name] != before[name]).any() for name in before)
    with pytest.raises(ValueError, match="lr"):
        trainer.optimizer.lr = -1.0


def test_a_schedule_that_ends_or_errs_says_so_at_its_own_step(backend: Backend) -> None:
    x, t = (backend.asarray(a) for a in blobs(np.random.default_rng(0), 30))
    table = [0.1, 0.1, 0.1]
    trainer = classifier(backend, optimizer=nnx.SGD(lambda step: table[step]))
    for _ in table:
        trainer.train_step(x, t)
    with pytest.raises(IndexError):
        trainer.train_step(x, t)
    for bad in (np.nan, -0.1, np.inf):
        rates = [0.1, 0.1, bad]
        trainer = classifier(backend, optimizer=nnx.SGD(rates.__getitem__))
        trainer.train_step(x, t)
        trainer.train_step(x, t)
        with pytest.raises(ValueError, match=r"learning rate of at least 0, got .* for step 2"):
            trainer.train_step(x, t)


@pytest.mark.parametrize("make", [lambda: nnx.SGD(0.1, momentum=0.9), lambda: Adam(0.1)])
def test_loading_the_state_of_a_new_optimizer_starts_anew(make: Any, backend: Backend) -> None:
    x, t = (backend.asarray(a) for a in blobs(np.random.default_rng(0), 30))
    trainer = classifier(backend, optimizer=make(), dropout=0)
    start, new = weights(trainer), trainer.optimizer.state()
    curves = []
    for _ in range(2):
        curves.append([float(trainer.train_step(x, t)) for _ in range(3)])
        trainer.model.load_state({name: backend.asarray(a) for name, a in start.items()})
        trainer.optimizer.load_state(new)
    assert curves[0] == curves[1]
    with pytest.raises(ValueError, match="'step'"):
        trainer.optimizer.load_state({})
