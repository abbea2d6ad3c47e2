"""Training steps replayed from graphs: one launch for a dozen, on the host one call for a hundred.

A graph repeats the device's work with the addresses and numbers that it was captured with. So a
step may be replayed only while everything it reads and writes lies where it lay, and what changes
from step to step (step number, learning rate, batch position) must be read from device memory, on
the host from the `StepState`. On the host a graph is the list of the C kernels' calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from nnx.backends import StepState
from nnx.backends.arena import Arena
from nnx.backends.base import CaptureError, Graph


class _Captured(NamedTuple):
    graph: Graph
    generation: int  # of the arena's slab, which holds the step's arrays


class StepGraphs:
    """Runs steps: the first of a kind as it is, the second captured, all later ones replayed.

    A kind of step is told by a key: everything that its graph would freeze. A step that can't be
    captured runs as it is from then on, after one warning.
    """

    LIMIT = 16
    """Graphs kept; the oldest goes first."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured | None] = {}
        self._refused = False

    def run(
        self,
        key: Hashable,
        work: Callable[[], Any],
        state: StepState,
        arena: Arena,
        parts: Callable[[], Sequence[object]],
        *,
        asked: bool = True,
    ) -> None:
        """Do a step.

        Args:
            key: What kind of step it is.
            work: The step.
            state: Counts it.
            arena: Where its arrays are.
            parts: Tells what it is made of: layers, loss, optimizer, metrics.
            asked: Whether somebody wants a graph, and to know why there is none.
        """
        if self._refused or key not in self._captured:
            while len(self._captured) >= self.LIMIT:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = None
            work()
            return
        known = self._captured[key]
        if known is not None and known.generation == arena.generation:
            known.graph.replay(state)
            return
        try:
            graph = state.backend.capture(work, state, parts())
        except CaptureError as error:
            self._refused = True
            self._captured.clear()
            if asked:
                warnings.warn(
                    f"Trainer: the step can't be captured into a graph: {error}; it runs as it is, "
                    "with the same results; pass graph=False, or change what stands in the way",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if not error.done:
                work()
            return
        graph.launch()
        self._captured[key] = _Captured(graph, arena.generation)
