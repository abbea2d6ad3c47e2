"""`Trainer`: the training loop, made of small steps that can be called on their own."""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnx._graphs import StepGraphs
from nnx.backends import Array, Backend, OutOfMemory, StepState, backend_of, resolve
from nnx.backends.arena import Arena
from nnx.backends.base import Feeder, methods
from nnx.backends.philox import SHUFFLE, check_seed, generator
from nnx.backends.threads import TINY
from nnx.data.arrays import check_features
from nnx.layers import Layer, Step
from nnx.losses import Loss
from nnx.memory import Memory, input_shape, of_training
from nnx.metrics import Accuracy, Metric
from nnx.optimizers import Optimizer
from nnx.parameter import ParameterVector


class History(dict[str, list[Any]]):
    """What was measured in each epoch, by name: `history["loss"][-1]`.

    `loss` is the mean over the epoch's samples while the parameters were changing, and so are the
    training metrics; `validation_...` is measured at the epoch's end. With K models every entry is
    an array `(K,)`. What one `fit` measured and another didn't is NaN in the other's epochs.
    """

    def append(self, record: dict[str, Any]) -> None:
        """Add an epoch."""
        n = max(map(len, self.values()), default=0)
        for name in self | record:
            self.setdefault(name, [math.nan] * n).append(record.get(name, math.nan))

    def to_csv(self, path: str | Path) -> None:
        """Write one row per epoch; of arrays an element each, `loss[0]` or `matrix[1,0]`."""
        columns: dict[str, list[Any]] = {}
        for name, values in self.items():
            if any(map(np.ndim, values)):
                table = np.stack(np.broadcast_arrays(*values), axis=-1)
                for k in np.ndindex(table.shape[:-1]):
                    columns[f"{name}[{','.join(map(str, k))}]"] = table[k].tolist()
            else:
                columns[name] = values
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


class Callback:
    """Something to do while `fit` runs. Override what is needed."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each training step. Reading an array here waits for the device."""

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> bool | None:
        """Called after each epoch with its row of the history; True ends the training."""


_NO_STEP_END = Callback.on_step_end


class Trainer:
    """Trains a model on arrays.

    Args:
        model: Any `Layer`. Its parameters move to `backend` and into one flat vector.
        loss: Compares the model's output with the target.
        optimizer: Changes the parameters; belongs to this trainer from here on.
        seed: Everything random in training follows from it: the order of the samples and the
            dropout masks, on every backend the same.
        backend: `"numpy"`, `"cupy"`, `"cupy:1"`, `"auto"` or a backend. By default the environment
            variable `NNX_BACKEND`, else where the parameters are.
        graph: Whether to capture the training step, once for each kind of step, and replay it, for
            the same bits: on a GPU a CUDA graph, one launch a step; on a CPU the calls of the C
            kernels, without the Python between them. It pays where steps are short. A short last
            batch, and whatever can't be captured, runs as without. The graph repeats what the
            device did: layers and metrics of your own do nothing on the host in a replayed step (on
            a CPU they aren't captured), and settings of model, loss and optimizer but the learning
            rate are those of the capture until the next epoch. By default `fit` does it on a CPU,
            where no callback, debugger or profiler looks on between steps; False keeps it from it.

    Attributes:
        history: A row per epoch of every `fit`.
        epoch: Number of finished epochs.

    Raises:
        ValueError: The model has no parameters, or its number of models isn't the loss's.
        OutOfMemory: The device has no room for the model, which stays where it was. Raised by the
            other methods too, when data or a step don't fit: the model is then as it was before the
            step, running statistics included, and training can go on with smaller batches.
    """

    def __init__(
        self,
        model: Layer,
        loss: Loss,
        optimizer: Optimizer,
        *,
        seed: int = 0,
        backend: str | Backend | None = None,
        graph: bool | None = None,
    ) -> None:
        parameters = [p for _, p in model.parameters()]
        if not parameters:
            raise ValueError("Trainer: expected a model with parameters, got none")
        if model.n_models != loss.n_models:
            raise ValueError(
                f"Trainer: expected model and loss of one number of models, got {model.n_models} "
                f"and {loss.n_models}; pass n_models={model.n_models} to the loss"
            )
        self.seed = check_seed(seed)
        self.model, self.loss, self.optimizer = model, loss, optimizer
        home = backend_of(*(p.value for p in parameters))
        target = resolve(backend, default=home)
        try:
            advice = "make the model smaller" + _narrower(parameters[0].value)
            with target.activate(), _MemoryErrors("Trainer", target, lambda: advice):
                model.to(target)
                vector = parameters[0].vector  # a second trainer for the model shares the vector
                if vector is None or vector.parameters != tuple(parameters):
                    vector = ParameterVector(parameters, model.n_models)
                self.vector = vector
                optimizer.bind(vector)
                self._step = Step(self.seed, optimizer.steps, list(model.layers()))
        except OutOfMemory:
            model.to(home)
            raise
        self.history = History()
        self.epoch = 0
        self.graph = graph
        self._arena = Arena(target.xp, target.device)
        self._buffers = [(layer, n) for layer in model.layers() for n in layer.buffer_names]
        self._stepped = loss  # that of the last step
        self._graphs = StepGraphs()
        self._inputs: dict[Hashable, tuple[Array, ...]] = {}
        self._totals: dict[Hashable, Array] = {}
        self._frozen: Hashable = None  # settings of the model and the rest, as graphs have them
        self._lent: Array = None  # the loss log of which `train_step` last returned a view

    @property
    def backend(self) -> Backend:
        """Where the parameters are."""
        return self.vector.backend

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self, x: Array, t: Array, weight: Array | None = None) -> Array:
        """Forward, loss, backward, update.

        Args:
            x: A batch, on the trainer's backend and of the parameters' dtype.
            t: Its targets.
            weight: Weight of each sample.

        Returns:
            The loss before the update, 0-d or `(K,)`, on the device; nothing waits for it.
        """
        batch = (x, t) if weight is None else (x, t, weight)
        captures = self._captures()
        rows = x.size // x.shape[-1] if x.ndim > 2 and x.size else len(x)
        with self._on_device(rows, captures), self._memory("train_step", len(x)):
            steps = self._begin()
            self._lent = steps.log
            logged = steps.log[steps.position, ...]
            shapes, kind = tuple([(a.shape, a.dtype.char) for a in batch]), None
            if captures:
                batch = self._copied(shapes, batch)  # a graph reads where it was told to
                kind = self._places(batch)
            self._run(shapes, kind, self._train, batch)
            return logged

    def _on_device(self, n: int, captures: bool = True) -> contextlib.AbstractContextManager[Any]:
        """The context for work in batches of n samples.

        What is captured in it may be larger than it seems, and is to be replayed in one like it.
        """
        work = self.vector.value.size * n
        return self.backend.activate(max(work, TINY + 1) if captures else work)

    def _parts(self, metrics: Iterable[Metric] = ()) -> list[object]:
        """What a step is made of."""
        return [*self.model.layers(), self.loss, self.optimizer, *metrics]

    def _captures(
        self, callbacks: Sequence[Callback] | None = None, metrics: Iterable[Metric] = ()
    ) -> bool:
        """Whether steps are captured: if asked for, else in `fit`, where nobody could notice."""
        if self.graph is not None:
            return self.graph and self.backend.graphs
        if callbacks is None or not self.backend.graphs_unasked or _watched():
            return False
        ends = [getattr(c.on_step_end, "__func__", None) for c in callbacks]
        idle = all(end is _NO_STEP_END for end in ends)
        return idle and self.backend.foreign(self._parts(metrics)) is None

    def _begin(self) -> StepState:
        """Make everything ready for a step."""
        steps = self.optimizer.planned()
        if self._step.state is not steps or self._stepped is not self.loss:
            # the first step; or the model has moved, or another loss or optimizer is here
            self._step.state, self._stepped = steps, self.loss
            self._forget()
        return steps

    def _forget(self) -> None:
        """Give back what steps have asked for."""
        self._arena = Arena(self.backend.xp, self.backend.device)
        self._graphs, self._inputs = StepGraphs(), {}

    def _run(
        self,
        shapes: Hashable,
        kind: Hashable | None,
        work: Callable[..., Any],
        *arguments: Any,
        metrics: Sequence[Metric] = (),
    ) -> None:
        """Do a step, or replay it.

        Args:
            shapes: Those of its batch: steps of the same ask for the same arrays.
            kind: What its graph would freeze; None if it isn't to be captured.
            work: The step.
            arguments: Its arguments.
            metrics: What it measures.
        """
        arena, steps = self._arena.step(shapes), self._step.state
        number, kept = steps.number, []
        if arena.fresh:  # memory may run out in the midst, after a layer has changed its buffers
            kept = [(a, a.copy()) for _, a in self.model.buffers()]
        try:
            with arena:
                if kind is None:
                    work(*arguments)
                else:
                    self.vector.begin_step()  # a replayed step doesn't run `_train`
                    step = functools.partial(work, *arguments)
                    parts = functools.partial(self._parts, metrics)
                    self._graphs.run(kind, step, steps, arena, parts, asked=bool(self.graph))
        except BaseException:
            if steps.number == number:
                for a, before in kept:
                    a[...] = before
            steps.rewind()  # by Ctrl-C between launch and count, host and device disagree
            raise

    def _places(self, arrays: Iterable[Array]) -> Hashable:
        """Where a captured step would find what it works on."""
        vector, groups, backend = self.vector, self.vector.groups, self.backend
        own = (vector.value, vector.grad, groups.ids, groups.table, *self._step.state.uploaded)
        buffers = [getattr(layer, name) for layer, name in self._buffers]
        return backend.stream(), backend.places([*own, *buffers, *arrays])

    def _settings(self, metrics: Iterable[Metric]) -> Hashable:
        """What a captured step would freeze besides places."""
        made = {n: v for n, v in vars(self.optimizer).items() if n[0] != "_"}
        optimizer = type(self.optimizer), made
        layers = [_numbers(layer) for layer in self.model.layers()]  # their config may lack some
        own = self.model, self.loss, layers, _numbers(self.loss), optimizer
        code = tuple(f for part in self._parts(metrics) for f in methods(part))
        return repr((own, [(type(m), vars(m)) for m in metrics])), code

    def _copied(self, key: Hashable, batch: tuple[Array, ...]) -> tuple[Array, ...]:
        """The batch in arrays that stay where they are."""
        kept: tuple[Array, ...] | None = self._inputs.get(key)
        if kept is None:
            backend_of(self.vector.value, *batch)  # or it says what is where
            while len(self._inputs) >= StepGraphs.LIMIT:  # as graphs: the oldest goes first
                del self._inputs[next(iter(self._inputs))]
            kept = tuple(self.backend.xp.empty(a.shape, a.dtype) for a in batch)
            self._inputs[key] = kept
        for a, mine in zip(batch, kept, strict=True):
            self.backend.xp.copyto(mine, a)
        return kept

    def _train(self, batch: Sequence[Array], metrics: Iterable[tuple[Metric, Array]] = ()) -> None:
        x, t, *weight = batch
        self.vector.begin_step()  # gradients left behind, or of a capture given up, don't count
        y, saved = self.model.forward(x, step=self._step.begin())
        loss, dy = self.loss(y, t, *weight)
        self.model.backward(dy, saved, need_dx=False)
        for metric, total in metrics:
            metric.update(total, y, t)
        self.optimizer.step(loss)

    def _memory(self, who: str, batch_size: int) -> _MemoryErrors:
        """Say what to do where memory runs out, and give back what the step has asked for."""

        def advice() -> str:
            self._forget()
            less = f"the batch size is {batch_size}: choose a smaller one"
            return less + _narrower(self.vector.value)

        return _MemoryErrors(who, self.backend, advice)

    # ---- many steps ----------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        t: Any,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        sample_weight: Any = None,
        validation: tuple[Any, Any] | None = None,
        metrics: Sequence[Metric] | None = None,
        callbacks: Sequence[Callback] = (),
        shuffle: bool = True,
        drop_last: bool = False,
        progress: bool = False,
    ) -> History:
        """Train for a number of epochs, more on top of those already done.

        Args:
            x: Samples along the first axis. Moved to the device once if they fit.
            t: A target for each: class labels for a loss that classifies.
            epochs: How often to go through the data.
            batch_size: Samples in a step. The last step of an epoch takes what is left, weighted
                by its true size.
            sample_weight: Non-negative weight of each sample in the loss.
            validation: `(x, t)` to evaluate on after each epoch.
            metrics: What to measure besides the loss; accuracy by default if the loss classifies.
            callbacks: Called after each step and epoch.
            shuffle: Whether each epoch takes the samples in a new order.
            drop_last: Whether to leave out a last batch that isn't full; `BatchNorm` needs that
                where it would be a single sample.
            progress: Whether to show a progress bar on the standard error.

        Returns:
            The history, earlier epochs included.

        Raises:
            ValueError: The data don't fit together or aren't finite, or a label is out of range.
            FloatingPointError: An epoch's loss is NaN or infinite.
        """
        if epochs < 0:
            raise ValueError(f"fit: expected epochs of at least 0, got {epochs}")
        batch_size = _batch_size("fit", batch_size)
        with self._on_device(batch_size), self._memory("fit", batch_size):
            data = self._data("fit", x, t, sample_weight)
            n = data.n - data.n % batch_size * drop_last
            if not n:
                raise ValueError(
                    f"fit: drop_last leaves nothing of {data.n} samples in batches of {batch_size}"
                )
            held_out = None if validation is None else self._data("fit (validation)", *validation)
            metrics = [*self._metrics(metrics)]
            bar = _progress_bar(epochs * math.ceil(n / batch_size)) if progress else None
            captures: bool | None = None
            try:
                for _ in range(epochs):
                    if captures is None or callbacks:  # which may have changed anything
                        captures, self._frozen = self._captures(callbacks, metrics), None
                    data = data.on(self.backend)  # a callback may have moved the model
                    readings = [
                        self._fit_epoch(
                            data, n, batch_size, metrics, callbacks, shuffle, bar, captures
                        )
                    ]
                    if held_out is not None:
                        held_out = held_out.on(self.backend)
                        readings.append(self._evaluate(held_out, max(batch_size, 512), metrics))
                    record, *scores = self._read(readings)
                    for score in scores:
                        record |= {f"validation_{name}": value for name, value in score.items()}
                    self.epoch += 1
                    self.history.append({"epoch": self.epoch, **record})
                    if bar is not None:
                        bar.set_postfix_str(_shown(record))
                    if not np.all(np.isfinite(record["loss"])):
                        raise FloatingPointError(
                            f"fit: the loss became {record['loss']} in epoch {self.epoch}; "
                            "lower the learning rate, or scale the inputs to about [-1, 1]"
                        )
                    wishes = [callback.on_epoch_end(self, record) for callback in callbacks]
                    if any(wishes):
                        break
            finally:
                if self.backend.graphs_unasked:
                    self._graphs = StepGraphs()
                if bar is not None:
                    bar.close()
        return self.history

    def _fit_epoch(
        self,
        data: _Data,
        n: int,
        batch_size: int,
        metrics: Sequence[Metric],
        callbacks: Sequence[Callback],
        shuffle: bool,
        bar: Any,
        captures: bool,
    ) -> _Reading:
        order = np.arange(data.n)
        if shuffle:
            order = generator(self.seed, SHUFFLE, step=self.epoch).permutation(data.n)
        order = order[:n]
        starts = np.arange(0, n, batch_size)
        steps = self.optimizer.steps
        kept = captures and steps.uploaded and steps.log is not self._lent
        self.optimizer.plan(len(starts), order, fresh_log=not kept)
        log = steps.log
        totals = self._start(metrics, captures)
        self._begin()
        feeder = None if data.resident else data.feeder(batch_size)
        kind: Hashable = None
        if captures:
            if self._frozen is None or callable(self.optimizer.lr):  # a schedule may do anything
                self._frozen = self._settings(metrics)
            there = self._places([*(total for _, total in totals), *data.arrays])
            kind = self._frozen, batch_size, there
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            self._begin()
            batch = None if feeder is None else feeder.send(order[start : start + size])
            whole = kind if size == batch_size else None  # a short last batch isn't worth a graph
            if whole is not None and batch is not None:
                whole = whole, self.backend.places(batch)
            step = data, batch, batch_size, size, totals
            self._run((size, *data.shape), whole, self._fit_step, *step, metrics=metrics)
            if bar is not None:
                bar.update()
            for callback in callbacks:
                callback.on_step_end(self)
        share = np.add.reduceat(data.weights(order), starts)
        share /= share.sum() or 1.0
        return _Reading(log, lambda losses: share @ losses.astype(np.float64), totals, n)

    def _fit_step(
        self,
        data: _Data,
        batch: list[Array] | None,
        batch_size: int,
        n: int,
        totals: list[tuple[Metric, Array]],
    ) -> None:
        """One step on the next `n` samples: those sent as `batch`, or of the resident data."""
        if batch is None:
            batch = self.backend.gather_rows(data.arrays, self._step.state, batch_size, n)
        self._train(batch, totals)

    def _start(self, metrics: Sequence[Metric], captures: bool) -> list[tuple[Metric, Array]]:
        """The metrics, each with its total at the start; in the same place for every graph."""
        backend, totals = self.backend, []
        for i, metric in enumerate(metrics):
            total = metric.start(backend, self.vector.n_models)
            if captures:
                key = (backend.name, i, total.shape, total.dtype.char)
                kept = self._totals.setdefault(key, total)
                if kept is not total:
                    backend.xp.copyto(kept, total)
                total = kept
            totals.append((metric, total))
        return totals

    def evaluate(
        self,
        x: Any,
        t: Any,
        *,
        batch_size: int = 512,
        sample_weight: Any = None,
        metrics: Sequence[Metric] | None = None,
    ) -> dict[str, Any]:
        """Loss and metrics over a data set, without training; arguments as in `fit`."""
        batch_size = _batch_size("evaluate", batch_size)
        with self._on_device(batch_size), self._memory("evaluate", batch_size):
            data = self._data("evaluate", x, t, sample_weight)
            (record,) = self._read([self._evaluate(data, batch_size, self._metrics(metrics))])
            return record

    def _evaluate(self, data: _Data, batch_size: int, metrics: Sequence[Metric]) -> _Reading:
        backend, n_models = self.backend, self.vector.n_models
        totals = [(metric, metric.start(backend, n_models)) for metric in metrics]
        share = data.weights(np.arange(data.n))
        total_share = float(share.sum()) or 1.0
        loss_sum: Array = 0.0
        arena = Arena(backend.xp, backend.device)
        for start, x, t, *weight in data.slices(batch_size):
            part = float(share[start : start + batch_size].sum()) / total_share
            with arena.step(len(x)):
                y = self.model.forward(x)[0]
                loss_sum = loss_sum + self.loss(y, t, *weight, need_gradient=False)[0] * part
                for metric, total in totals:
                    metric.update(total, y, t)
        return _Reading(loss_sum, lambda loss: loss, totals, data.n)

    def _read(self, readings: list[_Reading]) -> list[dict[str, Any]]:
        """What was measured, by name: an epoch's one wait for the device."""
        arrays = [a for r in readings for a in (r.losses, *(total for _, total in r.totals))]
        values = iter(self.backend.fetch(arrays))
        records = []
        for r in readings:
            loss = np.asarray(r.mean(next(values)))
            record: dict[str, Any] = {"loss": loss if loss.ndim else float(loss)}
            for metric, _ in r.totals:
                record[metric.name] = metric.result(next(values), r.n)
            records.append(record)
        return records

    def predict(self, x: Any, *, batch_size: int = 512) -> np.ndarray:
        """The model's outputs on the host, `(N, ...)` or `(K, N, ...)`: logits for `SoftmaxNLL`."""
        batch_size = _batch_size("predict", batch_size)
        features, backend = self._features("predict", x), self.backend
        with (
            self._on_device(min(batch_size, len(features)), captures=features.ndim > 2),
            self._memory("predict", batch_size),
        ):
            if len(features) <= batch_size:
                return backend.to_numpy(self.model.forward(backend.asarray(features))[0])
            arena, found = Arena(backend.xp, backend.device), np.empty(0)
            models = () if self.vector.n_models is None else (slice(None),)
            for start, batch in _Data(backend, [features]).slices(batch_size):
                with arena.step(len(batch)):
                    y = backend.to_numpy(self.model.forward(batch)[0])
                    if start == 0:
                        shape = [*y.shape]
                        shape[len(models)] = len(features)
                        found = np.empty(shape, y.dtype)
                    found[(*models, slice(start, start + batch_size))] = y
            return found

    def memory(
        self,
        x: Any = None,
        t: Any = None,
        *,
        batch_size: int = 32,
        n_samples: int | None = None,
        n_validation: int = 0,
        sample_weight: Any = None,
        metrics: Sequence[Metric] | None = None,
    ) -> Memory:
        """The memory that `fit`, or `train_step`, would take: nothing is trained or changed.

        The step runs on a few samples, on a copy. What it asks for is scaled to `batch_size`.

        Args:
            x: Samples as for `fit`, all or a few, of which shape and dtype matter; by default of
                the width that the model's first layer tells.
            t: Their targets; by default labels for a loss that classifies, else numbers.
            batch_size: Samples in a step.
            n_samples: How many there are; by default as many as in `x`. 0 stands for `train_step`,
                whose batches are the caller's.
            n_validation: How many there are to evaluate on after each epoch.
            sample_weight: Their weights in the loss, if they will have any.
            metrics: As in `fit`.

        Returns:
            Bytes, by what they are for: at the peak, from the first step on. Not counted: what the
            caller has, Python and the libraries themselves, and on a GPU CUDA's context, pinned
            host memory, captured graphs, and what CuPy's pool keeps for later.
        """
        batch_size = _batch_size("memory", batch_size)
        n = (0 if x is None else len(x)) if n_samples is None else n_samples
        if min(n, n_validation) < 0:
            raise ValueError(f"memory: expected numbers of samples, got {n} and {n_validation}")
        with self.backend.activate(), self._memory("memory", batch_size):
            if x is None:
                x = np.zeros((1, *input_shape(self.model, "memory")), self.vector.value.dtype)
            given = [a[:64] for a in (x, t, sample_weight) if a is not None]
            if t is None:
                y = self.model(self.backend.asarray(self._features("memory", given[0])))
                shape = y.shape if self.vector.n_models is None else y.shape[1:]
                t = np.zeros(shape[:-1], int) if self.loss.classifies else np.ones(shape, y.dtype)
                given.insert(1, t)
            sizes = {"batch_size": batch_size, "n_samples": n, "n_validation": n_validation}
            return of_training(self, given, self._metrics(metrics), **sizes)

    # ---- data ----------------------------------------------------------------------------------

    def _features(self, who: str, x: Any) -> np.ndarray:
        x, dtype = check_features(_to_host(x), who=who), self.vector.value.dtype
        if x.dtype == dtype:
            return np.asarray(x)
        with np.errstate(over="ignore"):  # what is finite in float64 may not be in float32
            cast: np.ndarray = check_features(x.astype(dtype), who=f"{who}, in {dtype}")
        return cast

    def _data(self, who: str, x: Any, t: Any, weight: Any = None) -> _Data:
        """Check a data set on the host, once, and put it where batches are taken from."""
        features, target, dtype = self._features(who, x), _to_host(t), self.vector.value.dtype
        n_outputs = self.model(self.backend.asarray(features[:1])).shape[-1]
        target = self.loss.check_target(target, len(features), n_outputs, dtype, who)
        arrays = [features, target]
        if weight is not None:
            weight = _to_host(weight).astype(dtype)
            sound = np.isfinite(weight) & (weight >= 0)
            if weight.shape != (len(features),) or not sound.all():
                raise ValueError(
                    f"{who}: expected {len(features)} finite, non-negative sample weights, "
                    f"got shape {weight.shape}"
                )
            arrays.append(weight)
        return _Data(self.backend, arrays, self.loss.target_weight(target))

    def _metrics(self, metrics: Sequence[Metric] | None) -> Sequence[Metric]:
        if metrics is not None:
            return metrics
        if not self.loss.classifies:
            return ()
        return (Accuracy(getattr(self.loss, "ignore_index", None)),)


class _Data:
    """Arrays of equally many samples, resident on the device if they fit."""

    def __init__(
        self, backend: Backend, arrays: list[np.ndarray], factor: np.ndarray | None = None
    ) -> None:
        self.backend = backend
        self.factor = factor  # of the weights, by the loss: see `Loss.target_weight`
        self.n = len(arrays[0])
        self.shape = arrays[0].shape[1:]
        self.host = arrays
        self.arrays: list[Array] = []
        self._feeders: dict[int, Feeder] = {}
        self.resident = backend.fits(sum(a.nbytes for a in arrays))
        if self.resident:
            try:
                self.arrays = [backend.asarray(a) for a in arrays]
            except Exception as error:
                if backend.out_of_memory(error) is None:
                    raise
                self.resident = False  # in pieces too small for it: batch by batch, then

    def on(self, backend: Backend) -> _Data:
        """The same data where this backend wants them."""
        return self if backend is self.backend else _Data(backend, self.host, self.factor)

    def weights(self, order: np.ndarray) -> np.ndarray:
        """The samples' weights in the loss in this order, float64; ones if there are none."""
        weighted = len(self.host) == 3
        weights = self.host[2][order].astype(np.float64) if weighted else np.ones(len(order))
        return weights if self.factor is None else weights * self.factor[order]

    def feeder(self, batch_size: int) -> Feeder:
        """What sends batches of this size to the device; the same in every epoch."""
        if batch_size not in self._feeders:
            self._feeders[batch_size] = self.backend.feeder(self.host, batch_size)
        return self._feeders[batch_size]

    def slices(self, batch_size: int) -> Iterator[Any]:
        """`(start, arrays)` of consecutive batches, in order."""
        feeder = None if self.resident else self.feeder(batch_size)
        for start in range(0, self.n, batch_size):
            stop = min(start + batch_size, self.n)
            if feeder is None:
                yield start, *(a[start:stop] for a in self.arrays)
            else:
                yield start, *feeder.send(np.arange(start, stop))


class _Reading(NamedTuple):
    """What an epoch or an evaluation has measured, still on the device."""

    losses: Array
    mean: Callable[[np.ndarray], Any]  # of the losses, on the host
    totals: list[tuple[Metric, Array]]
    n: int


class _MemoryErrors:
    """Turns a backend's error of exhausted memory into one that says what to do.

    Args:
        who: The caller's name.
        backend: Whose memory it is.
        advice: What else to do then, and what to say.
    """

    __slots__ = ("_advice", "_backend", "_who")

    def __init__(self, who: str, backend: Backend, advice: Callable[[], str]) -> None:
        self._who, self._backend, self._advice = who, backend, advice

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception):
            return
        said = self._backend.out_of_memory(error)
        if said is None and not isinstance(error, OutOfMemory):
            return
        advice = self._advice()
        if said is not None:
            raise OutOfMemory(
                f"{self._who}: out of device memory: {said}; {advice}, or run on backend='numpy'"
            ) from error


def _narrower(a: Array) -> str:
    """What else saves memory, where it isn't done yet."""
    return ", use dtype='float32'" if a.dtype == np.float64 else ""


def _numbers(a: object) -> dict[str, Any]:
    """The attributes that a graph would freeze."""
    kinds = (int, float, str, tuple, type(None))
    return {name: value for name, value in vars(a).items() if isinstance(value, kinds)}


def _watched() -> bool:
    """Whether a debugger or profiler looks on."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [] if monitoring is None else [monitoring.get_tool(i) for i in range(6)]
    return any(tools) or sys.gettrace() is not None or sys.getprofile() is not None


def _batch_size(who: str, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"{who}: expected batch_size as an integer of at least 1, got {n!r}")
    return int(n)


def _to_host(a: Any) -> np.ndarray:
    """`a` as a NumPy array, wherever it is."""
    return backend_of(a).to_numpy(a) if hasattr(a, "__cuda_array_interface__") else np.asarray(a)


def _shown(record: dict[str, Any]) -> str:
    """What the progress bar has room for: the loss, and the last thing measured."""
    last = list(record)[-1]
    short = {"loss": record["loss"], last.replace("validation_", "val_"): record[last]}
    return ", ".join(f"{name}={np.mean(value):.4f}" for name, value in short.items())


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="step", dynamic_ncols=True, leave=True)
