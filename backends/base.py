"""The `Backend` protocol, and `XpBackend`: every operation in plain xp.

The bodies here are the definition of each operation: NumPy runs them, CuPy falls back on them, and
every raw kernel is compared with them. An operation is in the protocol only if xp can't express
its fast path, or NumPy and CuPy differ on it, and it shows in the time of a training step;
everything else is xp code in the layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from nnx.backends.arena import running
from nnx.backends.philox import drop_threshold, words

Array: TypeAlias = Any
"""An array of the backend at hand: `numpy.ndarray` or `cupy.ndarray`."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for that can't be used here; the message says why and what to do."""


class StepState:
    """What a training step reads besides data: its number, its learning rate, its place in the log.

    The host always knows these numbers. A device backend keeps a copy in device memory, where the
    kernels read them and the optimizer's kernel counts up, so that no step uploads anything.

    Attributes:
        number: Updates done since the beginning; the step of every random stream.
        position: Updates done since `plan`; index into `rates` and `log`, and of the batch.
        rates: Learning rates of the planned steps, float64.
        log: Losses of the planned steps, `(n,)` or `(n, K)`; NaN until they are known.
        order: Order of the samples in this epoch, int64, or None.
    """

    def __init__(self, backend: XpBackend) -> None:
        self.backend = backend
        self.number = 0
        self.position = 0
        self.rates = np.empty(0)
        self.log: Array = None
        self.order: Array = None

    @property
    def rate(self) -> float:
        """The running step's learning rate."""
        return float(self.rates[self.position])

    def plan(
        self,
        rates: np.ndarray,
        *,
        dtype: Any,
        n_models: int | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        """Lay out the next `len(rates)` steps and go to the first. The log starts anew."""
        self.position = 0
        self.rates = rates
        shape = (len(rates),) if n_models is None else (len(rates), n_models)
        self.log = self.backend.xp.full(shape, np.nan, dtype)
        self.order = None if order is None else self.backend.asarray(order)

    def advance(self, loss: Array | None) -> None:
        """End a step: enter its loss in the log and count. Part of every optimizer's operation."""
        if loss is not None:
            self.log[self.position, ...] = loss
        self.count()

    def count(self) -> None:
        """Count a finished step on the host."""
        self.number += 1
        self.position += 1


class Backend(Protocol):
    """What layers, losses and optimizers ask of an array library; see `XpBackend` for each body."""

    name: str
    xp: ModuleType

    def asarray(self, a: Any, dtype: Any = None) -> Array: ...
    def to_numpy(self, a: Array) -> np.ndarray: ...
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def synchronize(self) -> None: ...
    def activate(self) -> contextlib.AbstractContextManager[Any]: ...
    def fits(self, nbytes: int) -> bool: ...
    def step_state(self) -> StepState: ...
    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array: ...
    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array: ...
    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array: ...
    def relu(self, x: Array) -> tuple[Array, Array]: ...
    def relu_backward(self, dy: Array, mask: Array) -> Array: ...
    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]: ...
    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array: ...
    def softmax_nll(
        self,
        logits: Array,
        labels: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]: ...
    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]: ...
    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array: ...
    def sgd(
        self,
        value: Array,
        grad: Array,
        velocity: Array | None,
        groups: Groups,
        state: StepState,
        loss: Array | None,
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None: ...
    def adam(
        self,
        value: Array,
        grad: Array,
        m: Array,
        v: Array,
        groups: Groups,
        state: StepState,
        loss: Array | None,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None: ...
    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]: ...
    def count_correct(self, scores: Array, labels: Array, total: Array) -> None: ...


FUNCTIONS = frozenset(
    ("abs", "exp", "expm1", "log", "log1p", "maximum", "minimum", "sign", "sqrt", "tanh", "where")
)
"""What an expression of `elementwise` may call; NaN goes through all of them."""


@functools.cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, f"<{expression}>", "eval")


def check_operands(expression: str, out: Array, operands: dict[str, Any]) -> None:
    """Check that every array among the operands has the shape and dtype of `out`."""
    for name, operand in operands.items():
        if isinstance(operand, (int, float)):
            continue
        if operand.shape != out.shape:
            raise ValueError(
                f"elementwise ({expression}): expected {name} of shape {out.shape}, "
                f"got {operand.shape}"
            )
        if operand.dtype != out.dtype:
            raise TypeError(
                f"elementwise ({expression}): expected {name} of {out.dtype}, got {operand.dtype}"
            )


class Groups:
    """Which elements of the flat vector are updated how.

    Attributes:
        runs: `(start, stop, lr_scale, decay_scale)` of each stretch of equal treatment, in order.
        ids: uint8 group of each 64-element block, on the device.
        table: `(n_groups, 2)` float64 rows `(lr_scale, decay_scale)`, on the device.
    """

    BLOCK = 64

    def __init__(self, runs: Sequence[tuple[int, int, float, float]], backend: Backend) -> None:
        self.runs = tuple(runs)
        settings = list(dict.fromkeys(run[2:] for run in runs))
        if len(settings) > 256:
            raise ValueError(
                f"Groups: expected at most 256 different settings, got {len(settings)}"
            )
        blocks = np.concatenate(
            [
                np.full((stop - start) // self.BLOCK, settings.index((scale, decay)), np.uint8)
                for start, stop, scale, decay in runs
            ]
            or [np.empty(0, np.uint8)]
        )
        self.ids = backend.asarray(blocks)
        self.table = backend.asarray(np.array(settings, np.float64).reshape(-1, 2))


class XpBackend:
    """Every operation in plain xp, with `xp` NumPy or CuPy.

    Arrays named `out`, `total`, `dbias`, `value`, `velocity`, `m`, `v` and `z` are written; no
    other argument ever is. Masks are opaque to callers.
    """

    piece = 2**16
    """Elements that an optimizer of several elementwise passes takes at a time."""

    def __init__(self, xp: ModuleType, name: str | None = None) -> None:
        self.xp = xp
        self.name = name or f"reference ({xp.__name__})"

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    # ---- arrays --------------------------------------------------------------------------------

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """`a` as an array of this backend, C-contiguous: the only way in."""
        return self.xp.asarray(a, dtype=dtype, order="C")

    def to_numpy(self, a: Array) -> np.ndarray:
        """`a` on the host: the only way out. Waits for the device."""
        return np.asarray(a)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array not initialized, from the running step's arena, else a fresh one."""
        arena = running.arena
        if arena is None or arena.xp is not self.xp:
            return self.xp.empty(shape, dtype)
        return arena.empty(shape, dtype)

    def synchronize(self) -> None:
        """Wait until the device has done everything it was asked."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which this backend's device is the current one."""
        return contextlib.nullcontext()

    def fits(self, nbytes: int) -> bool:
        """Whether a data set of this size should live on the device."""
        return True

    def step_state(self) -> StepState:
        """A fresh `StepState`."""
        return StepState(self)

    # ---- element by element ---------------------------------------------------------------------

    def elementwise(self, expression: str, out: Array, **operands: Array | float) -> Array:
        """`out[...] = expression`, element by element; one launch on CuPy.

        Args:
            expression: One line that means the same in Python and in CUDA C++: operands by name,
                numbers, `+ - * /`, comparisons, and calls of `FUNCTIONS`. Both sides of a `where`
                are computed, so neither may overflow.
            out: Written. May be one of the operands.
            operands: Arrays of the shape and dtype of `out`, and Python numbers.

        Raises:
            ValueError: An array's shape isn't that of `out`.
            TypeError: An array's dtype isn't that of `out`.
        """
        check_operands(expression, out, operands)
        names = {name: getattr(self, name, None) or getattr(self.xp, name) for name in FUNCTIONS}
        out[...] = eval(_compiled(expression), {"__builtins__": {}}, names | operands)
        return out

    # ---- linear algebra ------------------------------------------------------------------------

    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array:
        """`out = a @ b`, or `out += a @ b`: the one door to BLAS and cuBLAS.

        Args:
            a: `(..., M, K)`; transposes are views (`x.T`), not copies.
            b: `(..., K, N)`.
            out: `(..., M, N)`, written.
            accumulate: Add to `out` instead of overwriting it.
        """
        xp = self.xp
        if not accumulate:
            return xp.matmul(a, b, out=out)
        product = xp.matmul(a, b, out=self.empty(out.shape, out.dtype))
        return xp.add(out, product, out=out)

    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array:
        """Sum of `dy` `(..., N, n)` over its rows, into `out` `(..., n)`."""
        xp = self.xp
        if not accumulate:
            return xp.sum(dy, axis=-2, out=out)
        total = xp.sum(dy, axis=-2, out=self.empty(out.shape, out.dtype))
        return xp.add(out, total, out=out)

    # ---- ReLU ----------------------------------------------------------------------------------

    def relu(self, x: Array) -> tuple[Array, Array]:
        """`(max(x, 0), mask)`; NaN stays NaN. The mask is true where `x > 0`."""
        xp = self.xp
        mask = xp.greater(x, 0, out=self.empty(x.shape, bool))
        return xp.maximum(x, 0, out=self.empty(x.shape, x.dtype)), mask

    def relu_backward(self, dy: Array, mask: Array) -> Array:
        """`dy` where the mask is true, else 0: a selection, so NaN and inf in `dy` don't leak."""
        dx = self.empty(dy.shape, dy.dtype)
        dx.fill(0)
        self.xp.copyto(dx, dy, where=mask)
        return dx

    def bias_relu(self, z: Array, bias: Array) -> tuple[Array, Array]:
        """`relu(z + bias)` for rows `z` `(..., N, n)`; `z` is overwritten with the result."""
        xp = self.xp
        xp.add(z, bias[..., None, :], out=z)
        mask = xp.greater(z, 0, out=self.empty(z.shape, bool))
        return xp.maximum(z, 0, out=z), mask

    def bias_relu_backward(
        self, dy: Array, mask: Array, dbias: Array, *, accumulate: bool = False
    ) -> Array:
        """`relu_backward`, and its sum over rows into `dbias`."""
        dz = self.relu_backward(dy, mask)
        self.bias_grad(dz, dbias, accumulate=accumulate)
        return dz

    # ---- losses and metrics --------------------------------------------------------------------

    def softmax_nll(
        self,
        logits: Array,
        labels: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        """Mean negative log-likelihood of `softmax(logits)`, and its gradient, in one pass.

        With `s = z - max(z)`: `l = log(sum(exp(s))) - s[label]`, which keeps small losses that
        `max + log(sum) - z[label]` rounds away, and `dl/dz = softmax(z) - onehot(label)`.

        Args:
            logits: `(N, C)`, or `(K, N, C)` for K models.
            labels: int64 `(N,)` or `(K, N)`. A label outside 0..C-1 makes its loss and the
                gradient of its row NaN.
            weight: One weight per sample, of the shape of `labels` or `(N,)`.
            normalizer: Replaces the denominator, the sum of the weights.
            grad_scale: Factor of the gradient only.
            need_gradient: Whether to compute the gradient.

        Returns:
            The loss, `()` or `(K,)`, and `grad_scale * dloss/dlogits` or None.
        """
        xp, dtype = self.xp, logits.dtype
        n_classes = logits.shape[-1]
        rows = logits.shape[:-1]
        shifted = self.empty(logits.shape, dtype)
        xp.subtract(logits, logits.max(axis=-1, keepdims=True), out=shifted)
        labels = labels.astype(np.int64, copy=False)
        valid = labels.view(np.uint64) < n_classes  # a negative label is a huge unsigned one
        in_row = xp.where(valid, labels, 0)
        n_logits = shifted.size
        at_label = xp.arange(0, n_logits, n_classes).reshape(rows) + in_row  # in the flat logits
        at_row = xp.take(shifted, at_label)
        exponential = xp.exp(shifted, out=shifted)
        total = exponential.sum(axis=-1, keepdims=True)
        losses = xp.log(total[..., 0]) - at_row
        factor = self._row_factors(valid, rows[-1], dtype, weight, normalizer)
        if weight is not None:
            losses = xp.where(factor == 0, dtype.type(0), losses)  # 0 * inf is NaN
        loss = xp.sum(losses * factor, axis=-1, out=self.empty(rows[:-1], dtype))
        if not need_gradient:
            return loss, None
        gradient = xp.divide(exponential, total, out=exponential)
        gradient.reshape(-1)[at_label] -= 1
        if grad_scale is not None:
            factor = factor * xp.asarray(grad_scale, dtype)[..., None]
        factor = factor[..., None]
        xp.multiply(gradient, factor, out=gradient)
        if weight is not None:
            xp.copyto(gradient, 0, where=factor == 0)
        return loss, gradient

    def _row_factors(
        self,
        valid: Array,
        n: int,
        dtype: Any,
        weight: Array,
        normalizer: float | Array | None,
    ) -> Array:
        """`w_i / sum(w)` for each row, or `w_i / normalizer`; where the denominator is 0, it is 0.

        A row without a valid label gets NaN, unless its weight is 0.
        """
        xp, nan = self.xp, dtype.type(np.nan)
        if weight is None and normalizer is None:
            return xp.where(valid, dtype.type(1 / max(n, 1)), nan)
        if normalizer is None:
            denominator = weight.sum(axis=-1, keepdims=True, dtype=dtype)
        else:
            denominator = xp.asarray(normalizer, dtype)[..., None]
        zero = denominator == 0
        factor = xp.where(zero, dtype.type(0), 1 / xp.where(zero, dtype.type(1), denominator))
        if weight is not None:
            factor = weight.astype(dtype, copy=False) * factor
        return xp.where(valid | (factor == 0), factor, nan)

    def count_correct(self, scores: Array, labels: Array, total: Array) -> None:
        """Add to `total`, int64 `()` or `(K,)`, how many rows have their maximum at the label.

        Args:
            scores: `(N, C)` or `(K, N, C)`. The first of equal maxima counts.
            labels: int64 `(N,)` or `(K, N)`.
            total: Written.
        """
        self.xp.add(total, (scores.argmax(axis=-1) == labels).sum(axis=-1), out=total)

    # ---- dropout -------------------------------------------------------------------------------

    def dropout(
        self, x: Array, p: float, *, seed: int, stream: int, use: int, state: StepState
    ) -> tuple[Array, Array]:
        """`(x / (1 - p) where kept, else 0; mask)`.

        Element i in row-major order is dropped where word i of the Philox stream
        `(seed, stream, use, state.number)` is below `p`; see `nnx.backends.philox`.
        """
        random = words(seed, stream, x.size, use=use, step=state.number)
        dropped = self.asarray(random < drop_threshold(p)).reshape(x.shape)
        return self.dropout_backward(x, dropped, p), dropped

    def dropout_backward(self, dy: Array, mask: Array, p: float) -> Array:
        """`dy / (1 - p)` where it was kept, else 0."""
        scale = 1 / (1 - p) if p < 1 else 1.0  # at p = 1 nothing is kept
        dx = self.xp.multiply(dy, scale, out=self.empty(dy.shape, dy.dtype))
        self.xp.copyto(dx, 0, where=mask)
        return dx

    # ---- optimizers: one operation over the flat parameter vector ------------------------------

    def sgd(
        self,
        value: Array,
        grad: Array,
        velocity: Array | None,
        groups: Groups,
        state: StepState,
        loss: Array | None,
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        """One step of SGD on `value` `(K, P)`; then `state.advance(loss)`.

        `g = grad + weight_decay * value`, `velocity = momentum * velocity + g`, and `value` goes
        down by `lr * velocity`, with Nesterov by `lr * (g + momentum * velocity)`.
        """
        xp, rate = self.xp, state.rate
        for w, g, (u,), work, lr_scale, decay_scale in self._pieces(groups, value, grad, velocity):
            g = self._decayed(g, w, weight_decay * decay_scale)
            update = g
            if u is not None:
                xp.multiply(u, momentum, out=u)
                xp.add(u, g, out=u)
                update = xp.add(g, xp.multiply(u, momentum, out=work), out=work) if nesterov else u
            xp.multiply(update, rate * lr_scale, out=work)
            xp.subtract(w, work, out=w)
        state.advance(loss)

    def adam(
        self,
        value: Array,
        grad: Array,
        m: Array,
        v: Array,
        groups: Groups,
        state: StepState,
        loss: Array | None,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """One step of Adam on `value` `(K, P)`; then `state.advance(loss)`.

        Kingma and Ba 2015, algorithm 1, with PyTorch's order of operations: `g = grad +
        weight_decay * value`, `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
        and with `t = state.number + 1` `value` goes down by
        `lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`.
        """
        xp, rate, t = self.xp, state.rate, state.number + 1
        correction1 = 1 - beta1**t
        correction2 = (1 - beta2**t) ** 0.5
        for w, g, (m_, v_), work, lr_scale, decay_scale in self._pieces(groups, value, grad, m, v):
            g = self._decayed(g, w, weight_decay * decay_scale)
            xp.multiply(m_, beta1, out=m_)
            xp.multiply(g, 1 - beta1, out=work)
            xp.add(m_, work, out=m_)
            xp.multiply(v_, beta2, out=v_)
            xp.multiply(g, g, out=work)
            xp.multiply(work, 1 - beta2, out=work)
            xp.add(v_, work, out=v_)
            xp.sqrt(v_, out=work)
            xp.divide(work, correction2, out=work)
            xp.add(work, eps, out=work)
            xp.divide(m_, work, out=work)
            xp.multiply(work, rate * lr_scale / correction1, out=work)
            xp.subtract(w, work, out=w)
        state.advance(loss)

    def _decayed(self, grad: Array, value: Array, decay: float) -> Array:
        """`grad + decay * value`; `grad` itself without decay, since 0 * inf is NaN."""
        if decay == 0:
            return grad
        out = self.xp.multiply(value, decay, out=self.empty(value.shape, value.dtype))
        return self.xp.add(grad, out, out=out)

    def _pieces(
        self, groups: Groups, value: Array, grad: Array, *slots: Array | None
    ) -> Iterator[tuple[Array, Array, tuple[Array | None, ...], Array, float, float]]:
        """Views of the flat vector piece by piece, each of one group, and work space of its shape.

        Yields `(value, grad, slots, work, lr_scale, decay_scale)`. A piece is small enough for its
        arrays to stay in the cache from one elementwise pass to the next.
        """
        n_models, size = value.shape
        width = min(size, max(self.piece // n_models, 1))
        space = self.empty((n_models, width), value.dtype)
        for start, stop, lr_scale, decay_scale in groups.runs:
            for i in range(start, stop, width):
                cut = np.s_[:, i : min(i + width, stop)]
                views = tuple(None if slot is None else slot[cut] for slot in slots)
                piece = value[cut]
                yield piece, grad[cut], views, space[:, : piece.shape[1]], lr_scale, decay_scale

    # ---- data ----------------------------------------------------------------------------------

    def gather_rows(
        self, sources: Sequence[Array], state: StepState, batch_size: int, n: int
    ) -> list[Array]:
        """Rows `order[p * B : p * B + n]` of each source; p is the position, B the batch size."""
        start = state.position * batch_size
        index = state.order[start : start + n]
        batch = []
        for source in sources:
            out = self.empty((n, *source.shape[1:]), source.dtype)
            batch.append(self._take_rows(source, index, out))
        return batch

    def _take_rows(self, source: Array, index: Array, out: Array) -> Array:
        return self.xp.take(source, index, axis=0, out=out)
