"""The memory of a training step: one slab, handed out front to back, taken back all at once.

A step asks for the same arrays in the same order every time, so the arena keeps the arrays of the
last step and hands them out again; only where a request differs is a new view cut from the slab.
Memory is never reused within a step, so what forward saved is still there in backward.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from types import ModuleType, TracebackType
from typing import Any

_ALIGNMENT = 256  # bytes; what cudaMalloc and the widest vector loads want


class Arena:
    """One slab of `xp` memory on a device, and the arrays that the running step has taken from it.

    Use it as `with arena.step(key):`. What does not fit is allocated on its own, and the slab grows
    when the step ends, so from the second step of a kind on nothing is allocated. An array taken
    from the arena is valid until the next step begins.

    Args:
        xp: The array library.
        device: The only one of its devices to be served; any by default.
    """

    def __init__(self, xp: ModuleType, device: int | None = None) -> None:
        self.xp, self.device = xp, device
        self._slab: Any = None
        self._tapes: dict[Hashable, list[tuple[tuple[int, ...], Any, Any, int]]] = {}
        self._tape: list[tuple[tuple[int, ...], Any, Any, int]] = []
        self._key: Hashable = None
        self._ended: set[Hashable] = set()
        self._next = 0
        self._needed = 0
        self._outer: Arena | None = None
        self.generation = 0
        """Counts the slabs; what points into one is valid until the next."""

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return 0 if self._slab is None else int(self._slab.nbytes)

    @property
    def fresh(self) -> bool:
        """Whether no step of this kind has ended yet, so that this one will allocate."""
        return self._key not in self._ended

    def step(self, key: Hashable) -> Arena:
        """Begin a step; steps of equal `key` (the shape of the batch) ask for the same arrays."""
        self._key = key
        self._tape = self._tapes.setdefault(key, [])
        self._next = 0
        return self

    def __enter__(self) -> None:
        self._outer = running.arena
        running.arena = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        running.arena = self._outer
        if kind is not None:
            return
        self._ended.add(self._key)
        if self._needed > self.nbytes:
            self._tapes.clear()
            self._tape = []
            self._slab = None  # freed first: both may not fit
            self.generation += 1
            try:
                self._slab = self.xp.empty(self._needed, self.xp.uint8)
            except Exception:  # no memory; this step is done, and the next may do in pieces
                self._ended.clear()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The next array of the step, not initialized."""
        tape, i = self._tape, self._next
        self._next = i + 1
        if i < len(tape):
            entry = tape[i]
            if entry[0] == shape and (entry[1] is dtype or entry[1] == dtype):
                return entry[2]
            del tape[i:]
        dtype = self.xp.dtype(dtype)
        start = -(-tape[-1][3] // _ALIGNMENT) * _ALIGNMENT if tape else 0
        size = dtype.itemsize
        for n in shape:
            size *= n
        end = start + size
        if self._slab is not None and end <= self.nbytes:
            array = self._slab[start:end].view(dtype).reshape(shape)
        else:
            array = self.xp.empty(shape, dtype)
            self._needed = max(self._needed, end)
        tape.append((shape, dtype, array, end))
        return array


class _Running(threading.local):
    """The arena of the step that runs in this thread: the library's one ambient state."""

    arena: Arena | None = None


running = _Running()
