"""The CPU backend: `XpBackend` on NumPy, with another body only where a benchmark shows it pays.

Where the extension `nnx.backends._cpu` (sources in `cpu/`) was built, `KernelBackend` does the
operations of a training step by its C kernels. A kernel takes C-contiguous arrays of float32 or
float64 and declines all else; then, and where there is no extension, `NumpyBackend` does it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from nnx.backends.base import Array, CaptureError, Graph, StepState, Update, XpBackend, methods
from nnx.backends.expressions import Program, compiled
from nnx.backends.threads import TINY, Threads

_OWN = tuple(f"nnx.{name}" for name in ("layers", "losses", "metrics", "optimizers"))
_NOTHING = contextlib.nullcontext()
_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}
INTERFACE = 4  # of the extension; one built from older sources has another
_SQUARES = 4096  # elements whose squares `condition` adds up at a time, as in cpu/optimizers.h
_BOOL, _INT64 = np.dtype(bool), np.dtype(np.int64)


class NumpyBackend(XpBackend):
    """NumPy on the CPU."""

    def __init__(self) -> None:
        super().__init__(np, "numpy")

    def activate(self, work: int | None = None) -> contextlib.AbstractContextManager[Any]:
        """A context with as many threads as pay for `work`."""
        return _NOTHING if work is None or work <= TINY else THREADS.of(work)

    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """As in `XpBackend`, some ten times faster: the bits of `dy`, as integers, times 0 or 1.

        That is a selection too: bits of NaN or inf times 0 are those of 0.
        """
        bits = _BITS.get(dy.dtype)
        if bits is None or not dy.flags.c_contiguous:
            return super().relu_backward(dy, mask)
        dx = self.empty(dy.shape, dy.dtype)
        self.xp.multiply(dy.view(bits), mask.view(np.int8), out=dx.view(bits))
        return dx

    def _take_rows(self, source: Array, index: Array, out: Array) -> Array:
        # `order` is a permutation, so nothing is clipped; mode "raise" would buffer the output
        return self.xp.take(source, index, axis=0, out=out, mode="clip")


class KernelBackend(NumpyBackend):
    """NumPy on the CPU, with the C kernels."""

    graphs = graphs_unasked = True

    def __init__(self) -> None:
        self._library, self.name = np, "numpy"

    @property
    def xp(self) -> Any:  # type: ignore[override]
        """NumPy. A step that is being captured and asks for it does more than call kernels."""
        calls = _cpu.recording()
        if calls is not None:
            calls.append(sys._getframe(1).f_code.co_qualname)
        return np

    def capture(
        self, work: Callable[[], Any], state: StepState, parts: Iterable[object] = ()
    ) -> Graph:
        """As in `XpBackend`: the calls of its kernels, if all that it does is to call kernels."""
        if (other := self.foreign(parts)) is not None:
            raise CaptureError(f"{other} may do on the host what no kernel does")
        calls: list[Any] = []
        try:
            _cpu.record(calls)
            work()
        finally:
            _cpu.record(None)
        for call in calls:
            if isinstance(call, str):
                raise CaptureError(f"{call} calls NumPy on the host", done=True)
        return _CpuGraph(calls)

    def foreign(self, parts: Iterable[object]) -> str | None:
        """As in `XpBackend`: the first that isn't the library's."""
        for part in parts:
            for other in (type(part), *methods(part)):
                home = other.__module__ if isinstance(other, type) else ""
                if isinstance(other, FunctionType):  # its __module__ is what functools.wraps copies
                    home = other.__globals__.get("__name__", "")
                if not home.startswith(_OWN):
                    return str(getattr(other, "__qualname__", other))
        return None

    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`; small products by a kernel, large ones by BLAS, cut into parts."""
        if out.ndim == 2 and _cpu.gemm(a, b, out, accumulate, None, False):
            return out
        if out.ndim == 3 and all(x.ndim == 2 or x.shape[:-2] == out.shape[:1] for x in (a, b)):
            for k, product in enumerate(out):  # where the first is declined, so are all
                one, other = a[k] if a.ndim == 3 else a, b[k] if b.ndim == 3 else b
                if not _cpu.gemm(one, other, product, accumulate, None, False):
                    break
            else:
                return out
        return super().gemm(a, b, out, accumulate=accumulate)

    def affine(
        self, x: Array, weight: Array, bias: Array, out: Array, *, relu: bool = False
    ) -> Array | None:
        """As in `XpBackend`; bias and ReLU follow each part of the product in the cache."""
        if out.ndim > 2 or not _cpu.gemm(x, weight, out, False, bias, relu):
            self.gemm(x, weight, out)
            if relu:
                return self.bias_relu(out, bias)[1]
            if not _cpu.add_bias(out, bias):
                self.xp.add(out, bias[..., None, :], out=out)
        return out if relu else None

    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array:
        """As in `XpBackend`, in one pass, which needs no memory; functions to 2 ulp."""
        program = _programs.get(expression)
        if program is not None and _cpu.elementwise(program, out, operands):
            return out
        arrays = frozenset([name for name, a in operands.items() if isinstance(a, np.ndarray)])
        other = compiled(expression, tuple(operands), arrays, _OPERATIONS)
        if other is not None and other is not program and _cpu.elementwise(other, out, operands):
            _programs[expression] = other
            return out
        assert self.xp is np  # what follows is NumPy's
        return super().elementwise(expression, out, **operands)

    def total(self, x: Array, scale: float = 1.0) -> Array:
        """As in `XpBackend`, added up in float64."""
        out = self.empty((), x.dtype)
        return out if _cpu.total(x, out, scale) else super().total(x, scale)

    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`, in one pass."""
        if _cpu.bias_grad(dy, out, accumulate):
            return out
        return super().bias_grad(dy, out, accumulate=accumulate)

    def relu(self, x: Array) -> tuple[Array, Array]:
        """As in `XpBackend`, but the mask is the output itself: it is positive where x is."""
        y = self.empty(x.shape, x.dtype)
        return (y, y) if _cpu.relu(x, y) else super().relu(x)

    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """As in `XpBackend`, of either kind of mask."""
        dx = self.empty(dy.shape, dy.dtype)
        if _cpu.relu_backward(dy, mask, dx):
            return dx
        return super().relu_backward(dy, mask if mask.dtype == bool else self.xp.greater(mask, 0))

    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]:
        """As in `XpBackend`, in one pass, with `relu`'s mask."""
        return (z, z) if _cpu.bias_relu(z, bias) else super().bias_relu(z, bias)

    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array:
        """As in `XpBackend`, in one pass."""
        dz = self.empty(dy.shape, dy.dtype)
        if _cpu.bias_relu_backward(dy, mask, dz, dbias, accumulate):
            return dz
        return super().bias_relu_backward(dy, mask, dbias, accumulate=accumulate)

    # ---- optimizers: as in `XpBackend`, in one pass over the flat vector -------------------------

    def condition(
        self,
        update: Update,
        *,
        l1: float,
        l2: float,
        clip_value: float | None,
        clip_norm: float | None,
    ) -> Update:
        """As in `XpBackend`; the norm's squares are added block by block."""
        value, grad, slots, groups, state, loss, _, decay, shrink = update
        scale = squares = None
        if clip_norm is not None:
            n_models, size = value.shape
            scale = self.empty((n_models,), value.dtype)
            squares = self.empty((n_models * -(-size // _SQUARES),), np.float64)
        if _cpu.condition(update, l1, l2, clip_value, clip_norm, scale, squares):
            if scale is None:
                return update
            return Update(value, grad, slots, groups, state, loss, scale, decay, shrink)
        return super().condition(update, l1=l1, l2=l2, clip_value=clip_value, clip_norm=clip_norm)

    def sgd(self, update: Update, *, momentum: float, nesterov: bool) -> None:  # noqa: D102
        if not self._applied(_cpu.sgd, update, (momentum, nesterov)):
            super().sgd(update, momentum=momentum, nesterov=nesterov)

    def adam(self, update: Update, *, beta1: float, beta2: float, eps: float) -> None:  # noqa: D102
        if not self._applied(_cpu.adam, update, (beta1, beta2, eps)):
            super().adam(update, beta1=beta1, beta2=beta2, eps=eps)

    def adagrad(  # noqa: D102
        self, update: Update, *, lr_decay: float, initial: float, eps: float
    ) -> None:
        if not self._applied(_cpu.adagrad, update, (initial, eps, lr_decay)):
            super().adagrad(update, lr_decay=lr_decay, initial=initial, eps=eps)

    def rmsprop(  # noqa: D102
        self, update: Update, *, alpha: float, eps: float, momentum: float
    ) -> None:
        if not self._applied(_cpu.rmsprop, update, (alpha, eps, momentum)):
            super().rmsprop(update, alpha=alpha, eps=eps, momentum=momentum)

    def lion(self, update: Update, *, beta1: float, beta2: float) -> None:  # noqa: D102
        if not self._applied(_cpu.lion, update, (beta1, beta2)):
            super().lion(update, beta1=beta1, beta2=beta2)

    def _applied(self, kernel: Any, update: Update, settings: tuple[float, ...]) -> bool:
        """Whether a rule's kernel has updated the vector, logged the loss and counted the step."""
        return bool(kernel(update, settings))

    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]:
        """As in `XpBackend`, bit for bit, in one pass."""
        y, mask = self.empty(x.shape, x.dtype), self.empty(x.shape, _BOOL)
        if _cpu.dropout(x, y, mask, p, seed, stream, use, state):
            return y, mask
        return super().dropout(x, p, seed=seed, stream=stream, use=use, state=state)

    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array:
        """As in `XpBackend`, in one pass."""
        dx = self.empty(dy.shape, dy.dtype)
        return (
            dx if _cpu.dropout_backward(dy, dx, mask, p) else super().dropout_backward(dy, mask, p)
        )

    def layer_norm(
        self, x: Array, weight: Array | None, bias: Array | None, *, eps: float, centered: bool
    ) -> tuple[Array, Array | None, Array]:
        """As in `XpBackend`, row by row, each in the cache."""
        y = self.empty(x.shape, x.dtype)
        mean = self.empty(x.shape[:-1], x.dtype) if centered else None
        rstd = self.empty(x.shape[:-1], x.dtype)
        if _cpu.layer_norm(x, weight, bias, y, mean, rstd, eps):
            return y, mean, rstd
        return super().layer_norm(x, weight, bias, eps=eps, centered=centered)

    def layer_norm_backward(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        dweight: Array | None,
        dbias: Array | None,
        *,
        accumulate: tuple[bool, bool] = (False, False),
        need_dx: bool = True,
    ) -> Array | None:
        """As in `XpBackend`, row by row; gradients by chunks of rows, then their sum."""
        dx = self.empty(dy.shape, dy.dtype) if need_dx else None
        partial = None
        if dweight is not None or dbias is not None:
            *models, n, c = dy.shape
            partial = self.empty((*models, min(-(-n // 16), 32), 2, c), dy.dtype)
        if _cpu.layer_norm_backward(
            dy, x, mean, rstd, weight, dx, dweight, dbias, *accumulate, partial
        ):
            return dx
        options: Any = {"accumulate": accumulate, "need_dx": need_dx}
        return super().layer_norm_backward(dy, x, mean, rstd, weight, dweight, dbias, **options)

    def batch_norm(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        running_mean: Array,
        running_var: Array,
        *,
        eps: float,
        momentum: float,
        training: bool,
    ) -> tuple[Array, Array, Array]:
        """As in `XpBackend`, by blocks of columns, each in the cache."""
        y, shape = self.empty(x.shape, x.dtype), running_mean.shape
        mean, rstd = self.empty(shape, x.dtype), self.empty(shape, x.dtype)
        running = (running_mean, running_var)
        if _cpu.batch_norm(x, weight, bias, *running, y, mean, rstd, eps, momentum, training):
            return y, mean, rstd
        options: Any = {"eps": eps, "momentum": momentum, "training": training}
        return super().batch_norm(x, weight, bias, *running, **options)

    def batch_norm_backward(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        weight: Array | None,
        dweight: Array | None,
        dbias: Array | None,
        *,
        training: bool,
        accumulate: tuple[bool, bool] = (False, False),
        need_dx: bool = True,
    ) -> Array | None:
        """As in `XpBackend`, by blocks of columns."""
        dx = self.empty(dy.shape, dy.dtype) if need_dx else None
        if _cpu.batch_norm_backward(
            dy, x, mean, rstd, weight, dx, dweight, dbias, *accumulate, training
        ):
            return dx
        options: Any = {"training": training, "accumulate": accumulate, "need_dx": need_dx}
        return super().batch_norm_backward(dy, x, mean, rstd, weight, dweight, dbias, **options)

    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]:
        """As in `XpBackend`, all sources in one call."""
        batch = [self.empty((n, *a.shape[1:]), a.dtype) for a in sources]
        if _cpu.gather_rows(sources, state, batch_size, batch):
            return batch
        return super().gather_rows(sources, state, batch_size, n)

    def softmax(self, x: Array, *, log: bool = False) -> Array:
        """As in `XpBackend`, row by row in the cache."""
        y = self.empty(x.shape, x.dtype)
        return y if _cpu.softmax(x, y, log) else super().softmax(x, log=log)

    def softmax_backward(self, dy: Array, y: Array, *, log: bool = False) -> Array:
        """As in `XpBackend`, row by row in the cache."""
        dx = self.empty(dy.shape, dy.dtype)
        if _cpu.softmax_backward(dy, y, dx, log):
            return dx
        return super().softmax_backward(dy, y, log=log)

    def softmax_nll(
        self,
        logits: Array,
        target: Array,
        weight: Array | None = None,
        *,
        class_weight: Array | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        """As in `XpBackend`, row by row in the cache: logits are read and the gradient written."""
        shape, dtype = logits.shape, logits.dtype
        if target.dtype != _INT64 and target.dtype.kind != "f":
            target = self.cast(target, _INT64)
        if weight is not None:
            weight = self.cast(weight, dtype)
        loss = self.empty(shape[:-2], dtype)
        gradient = self.empty(shape, dtype) if need_gradient else None
        few = logits.size <= 2048  # FEW_ROWS of softmax.c, which then needs no array
        work = None if few else self.empty((2, *shape[:-1]), dtype)
        options = (label_smoothing, ignore_index, normalizer, grad_scale)
        if _cpu.softmax_nll(logits, target, weight, class_weight, *options, loss, gradient, work):
            return loss, gradient
        return super().softmax_nll(
            *(logits, target, weight),
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            normalizer=normalizer,
            grad_scale=grad_scale,
            need_gradient=need_gradient,
        )

    def count_correct(
        self,
        scores: Array,
        labels: Array,
        total: Array,
        *,
        k: int = 1,
        ignore_index: int | None = None,
    ) -> None:
        """As in `XpBackend`, in one pass."""
        if not _cpu.count_correct(scores, labels, total, k, ignore_index):
            super().count_correct(scores, labels, total, k=k, ignore_index=ignore_index)


class _CpuGraph:
    """The kernels that a step called, with their arguments, to be called again."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def launch(self) -> None:
        """Nothing: the capture has done it."""

    def replay(self, state: StepState) -> None:
        """Do it again; the optimizer's kernel counts it."""
        if not _cpu.replay(self._calls):
            raise RuntimeError("a kernel declined, in a replayed step, what it took before")


def all_finite(a: np.ndarray) -> bool:
    """Whether no element of an array that isn't empty is NaN or infinite."""
    if _cpu is not None:
        found: bool | None = _cpu.all_finite(a)
        if found is not None:
            return found
    # min and max propagate NaN and, unlike isfinite on the whole array, allocate nothing
    return bool(math.isfinite(a.min()) and math.isfinite(a.max()))


def _load() -> Any:
    """The extension, if it was built, isn't switched off, and sees NumPy's arrays as they are."""
    if os.environ.get("NNX_DISABLE_CPU_KERNELS"):
        return None
    try:
        _cpu: Any = importlib.import_module("nnx.backends._cpu")
    except ImportError:
        return None
    if getattr(_cpu, "interface", int)() != INTERFACE:
        warnings.warn(
            f"nnx: the C kernels in {_cpu.__file__} were built from other sources, so NumPy does "
            "their work; install nnx again, in a checkout by pip install -e .",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for a in (np.zeros((3, 2), np.float32)[1:], np.zeros((2, 3))[:, ::-1], np.zeros(2, np.int64)):
        address, shape, strides, flags, _, kind = _cpu.layout(a) or (0, (), (), 0, 0, 0)
        seen = (address, shape, strides, flags & 1, ("f4", "f8", "i8")[kind])
        if seen != (a.ctypes.data, a.shape, a.strides, a.flags.c_contiguous, a.dtype.str[1:]):
            return None
    return _cpu


CPU = _cpu = _load()
"""The extension, or None."""
THREADS = Threads(CPU)
"""Of NumPy's BLAS and of the C kernels, for the whole process."""
_OPERATIONS = () if _cpu is None else _cpu.operations()
_programs: dict[str, Program] = {}  # by expression; the last one that has worked
NUMPY = NumpyBackend() if _cpu is None else KernelBackend()
"""The backend on this machine."""
