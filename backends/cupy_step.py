"""What surrounds a step on a CUDA device: its numbers, its batches, and the step as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnx.backends.base import Array, StepState

if TYPE_CHECKING:
    from nnx.backends.cupy_backend import CupyBackend


class CupyStepState(StepState):
    """A `StepState` whose numbers are on the device too, where the kernels read them.

    `plan` copies from pinned memory on the current stream, so it waits for nothing, and to where
    the last plan was if the sizes are the same: a captured step finds the new one there.
    """

    backend: CupyBackend

    def __init__(self, backend: CupyBackend) -> None:
        super().__init__(backend)
        xp = backend.xp
        self.counters = xp.zeros(2, np.int64)
        self.device_rates = xp.zeros(0, np.float64)

    def plan(
        self,
        rates: np.ndarray,
        *,
        dtype: Any,
        n_models: int | None = None,
        order: np.ndarray | None = None,
        fresh_log: bool = True,
    ) -> None:
        """As in `StepState`, and on the device."""
        there = self.order
        self.rewind()
        self._send_counters()
        self.device_rates = self._upload(rates, self.device_rates)
        if order is not None:
            there = self._upload(order.astype(np.int64, copy=False), there)
        super().plan(rates, dtype=dtype, n_models=n_models, fresh_log=fresh_log)
        self.order, self.host_order = there, order

    def set_rates(self, rates: np.ndarray) -> None:
        """As in `StepState`, and on the device."""
        super().set_rates(rates)
        self.device_rates = self._upload(rates, self.device_rates)

    @property
    def uploaded(self) -> tuple[Array | None, ...]:
        """As in `StepState`."""
        return self.log, self.order, self.counters, self.device_rates

    def _send_counters(self) -> None:
        counters = np.array([self._number, self._position])
        self.counters = self._upload(counters, self.counters)

    def advance(self, loss: Array | None) -> None:
        """As in `StepState`, on the device too; for optimizers that have no kernel."""
        super().advance(loss)
        self.counters += 1

    def _upload(self, host: np.ndarray, out: Array | None) -> Array:
        """Copy `host` to `out` if that has its shape, else to a new array; returns it."""
        if out is None or out.shape != host.shape:
            out = self.backend.xp.empty(host.shape, host.dtype)
        self.backend.upload(host, out)
        return out


class CupyGraph:
    """A captured step, and the memory that it uses beside the trainer's."""

    def __init__(self, graph: Any, pool: Any) -> None:
        self._graph, self._pool = graph, pool

    def launch(self) -> None:
        """Do it on the current stream."""
        self._graph.launch()

    def replay(self, state: StepState) -> None:
        """Do it again, and count it on the host."""
        self._graph.launch()
        state.count()


class CupyFeeder:
    """Two batches under way: the next is gathered and copied while the device works on the last.

    Each of two slots has pinned memory and device arrays. The copy runs on a stream of its own. It
    waits, on the device, until the step that used the slot is over; the step waits until the copy
    is. The host waits only for pinned memory that is still being read: when it is two batches
    ahead.
    """

    def __init__(self, backend: CupyBackend, sources: Sequence[np.ndarray], rows: int) -> None:
        self._backend, self._sources = backend, sources
        self._stream = backend.xp.cuda.Stream(non_blocking=True)
        self._slots = [_Slot(backend, sources, rows) for _ in range(2)]

    def send(self, index: np.ndarray) -> list[Array]:
        """These rows of each source, on the device until the next but one call."""
        last, slot = self._slots
        self._slots = [slot, last]
        current = self._backend.xp.cuda.get_current_stream()
        last.used.record(current)
        if not slot.copied.done:
            slot.copied.synchronize()
        n = len(index)
        for source, host in zip(self._sources, slot.hosts, strict=True):
            # "clip" clips nothing, the indices are valid; "raise" would gather into a buffer first
            np.take(source, index, axis=0, out=host[:n], mode="clip")
        self._stream.wait_event(slot.used)
        try:
            for host, there in zip(slot.hosts, slot.there, strict=True):
                there[:n].set(host[:n], stream=self._stream)
        finally:  # what has begun, Ctrl-C or not, uses the memory on both sides
            slot.copied.record(self._stream)
            current.wait_event(slot.copied)
            self._backend.hold(slot.copied, slot.hosts)
        return [there[:n] for there in slot.there]


class _Slot:
    """Room for one batch on both sides, and how far the work on it has come."""

    def __init__(self, backend: CupyBackend, sources: Sequence[np.ndarray], rows: int) -> None:
        import cupyx

        shapes = [(min(rows, len(a)), *a.shape[1:]) for a in sources]
        kinds = [a.dtype for a in sources]
        both = list(zip(shapes, kinds, strict=True))
        self.hosts = [cupyx.empty_pinned(shape, kind) for shape, kind in both]
        self.there = [backend.xp.empty(shape, kind) for shape, kind in both]
        self.copied = backend.xp.cuda.Event(disable_timing=True)
        self.used = backend.xp.cuda.Event(disable_timing=True)
        self.used.record()  # by whoever had the device's memory before
