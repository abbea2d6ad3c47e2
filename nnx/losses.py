"""Losses: one call returns the value and its gradient, so the two can't disagree.

All are weighted means over samples, `loss = sum(w_i l_i) / sum(w_i)`, with 0 / 0 = 0.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import numpy as np

from nnx._checks import check_floating, check_range, check_same_shape
from nnx.backends import Array, Backend, backend_of
from nnx.data.arrays import check_labels


class Loss:
    """A scalar to be made small, and its derivative.

    Args:
        n_models: K if predictions are `(K, N, ...)`; the loss is then `(K,)`, each value the mean
            of its own model.
    """

    classifies: ClassVar[bool] = False
    """Whether targets name classes, so that accuracy can be measured."""

    def __init__(self, n_models: int | None = None) -> None:
        self.n_models = n_models
        self._constants: dict[tuple[str, ...], Array] = {}

    def __call__(
        self,
        prediction: Array,
        target: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        """The loss, and the gradient of exactly this value with respect to `prediction`.

        Args:
            prediction: The model's output; never written.
            target: What it should be.
            weight: Non-negative weight of each sample, `(N,)`; one by default.
            normalizer: Replaces the denominator `sum(w_i)`: with the weight of a whole batch, the
                losses and gradients of its parts add up to those of the batch.
            grad_scale: Factor of the gradient, not of the loss.
            need_gradient: If False, the gradient isn't computed and None is returned.

        Returns:
            The loss as a 0-d array, or `(K,)`, in the prediction's dtype and on its device; and
            the gradient, of the prediction's shape.
        """
        raise NotImplementedError

    def check_target(
        self, target: np.ndarray, n_samples: int, n_outputs: int, dtype: Any, who: str
    ) -> np.ndarray:
        """The targets of a data set in the form `__call__` takes, or one clear error.

        `Trainer` asks once for each data set, on the host, so that no step has to look at values.

        Args:
            target: As the user gave it; first axis samples.
            n_samples: How many there must be.
            n_outputs: Width of the model's output.
            dtype: That of the model.
            who: The caller's name, for messages.

        Raises:
            ValueError: A shape or value is wrong.
            TypeError: The targets can't be of this kind.
        """
        target = target.astype(dtype)
        if len(target) != n_samples or not np.isfinite(target).all():
            raise ValueError(
                f"{who}: expected {n_samples} finite targets, one per sample, "
                f"got shape {target.shape}"
            )
        return target

    def target_weight(self, target: np.ndarray) -> np.ndarray | None:
        """Factor of each sample's weight that its target brings with it, on the host; None for 1.

        With it the loss of a data set is the weighted mean of those of its batches.
        """
        return None

    def config(self) -> dict[str, Any]:
        """Arguments that build this loss again."""
        return {"n_models": self.n_models}

    def __repr__(self) -> str:
        defaults = {k: p.default for k, p in inspect.signature(type(self)).parameters.items()}
        given = {k: v for k, v in self.config().items() if v != defaults.get(k)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def _rows(self, prediction: Array) -> tuple[int, ...]:
        """Shape of the samples: `(N,)` for K models `(K, N)`; leading axes count as samples."""
        if self.n_models is None:
            samples: tuple[int, ...] = prediction.shape[:-1]
            return samples if len(samples) == 1 else (math.prod(samples),)
        if prediction.ndim != 3 or prediction.shape[0] != self.n_models:
            raise ValueError(
                f"{type(self).__name__}: expected predictions ({self.n_models}, N, n) of "
                f"{self.n_models} models, got {prediction.shape}"
            )
        return tuple(prediction.shape[:-1])

    def _of_rows(
        self, what: str, array: Array, rows: tuple[int, ...], samples: tuple[int, ...]
    ) -> Array:
        """One number per sample in the form `(N,)` or `(K, N)`; leading axes are flattened."""
        if array.shape in (rows, rows[-1:]):
            return array
        check_same_shape(type(self).__name__, what, array.shape, samples)
        return array.reshape(-1)

    def _like_prediction(self, what: str, target: Array, prediction: Array) -> None:
        """Check that a target has the prediction's dtype and shape; K models may share one."""
        who, shape = type(self).__name__, prediction.shape
        if target.dtype != prediction.dtype:
            raise TypeError(f"{who}: expected {prediction.dtype} {what}, got {target.dtype}")
        if target.shape != shape and (self.n_models is None or target.shape != shape[1:]):
            check_same_shape(who, what, target.shape, shape)

    def _constant(self, backend: Backend, name: str, values: Any, dtype: Any) -> Array:
        """A constant of this loss where the arrays are; it is sent there once."""
        key = (name, backend.name, str(dtype))
        if key not in self._constants:
            self._constants[key] = backend.asarray(values, dtype)
        return self._constants[key]


class _Mean:
    """The weighted mean over samples of `(*rows, n)` numbers, and over their last axis.

    Args:
        backend: Where they are.
        rows: `(N,)` or `(K, N)`.
        dtype: Theirs.
        weight: `(N,)`, `(K, N)` or None.
        normalizer: Replaces the sum of the weights.
        width: What the sum over the last axis is divided by.
    """

    def __init__(
        self,
        backend: Backend,
        rows: tuple[int, ...],
        dtype: Any,
        weight: Array | None,
        normalizer: float | Array | None,
        width: int,
    ) -> None:
        xp = backend.xp
        self.backend, self.rows, self.dtype, self.weight = backend, rows, dtype, weight
        self.without: Array = None
        if weight is not None:
            self.without = xp.equal(weight, 0, out=backend.empty(weight.shape, bool))[..., None]
        if normalizer is None:
            normalizer = rows[-1]
            if weight is not None:
                normalizer = backend.empty(weight.shape[:-1], dtype)
                xp.sum(weight, axis=-1, out=normalizer)
        self.factor: float | Array  # of each number in the mean, but for the weight
        if isinstance(normalizer, (int, float)):
            self.factor = 1 / (normalizer * width) if normalizer * width else 0.0
        else:
            self.factor = backend.elementwise(
                "where(d == 0, 0, 1 / (where(d == 0, 1, d) * width))",
                backend.empty(normalizer.shape, dtype),
                d=normalizer.astype(dtype, copy=False),
                width=max(width, 1),
            )

    def blank(self, each: Array) -> Array:
        """`each`, with 0 written where the weight is 0: a selection, since 0 * inf is NaN."""
        if self.weight is not None:
            self.backend.xp.copyto(each, 0, where=self.without)
        return each

    def value(self, each: Array) -> Array:
        """The mean; `each` is overwritten."""
        xp = self.backend.xp
        if self.weight is not None:
            xp.multiply(self.blank(each), self.weight[..., None], out=each)
        loss = xp.sum(each, axis=(-2, -1), out=self.backend.empty(self.rows[:-1], self.dtype))
        return xp.multiply(loss, self.factor, out=loss)

    def gradient(
        self, slope: Array, grad_scale: float | Array | None, steepness: float = 1.0
    ) -> Array:
        """Derivative of the mean, given `steepness * slope`, that of each; it is overwritten."""
        factor = self.factor if steepness == 1 else self._product(self.factor, steepness)
        if grad_scale is not None:
            factor = self._product(factor, grad_scale)
        if not isinstance(factor, float):
            factor = factor[..., None]
        if self.weight is not None:
            factor = self._product(self.weight, factor)
        if not isinstance(factor, float):
            factor = factor[..., None]
        return self.backend.xp.multiply(self.blank(slope), factor, out=slope)

    def _product(self, a: float | Array, b: float | Array) -> Any:
        if isinstance(a, float) and isinstance(b, (int, float)):
            return a * b
        shape = np.broadcast_shapes(getattr(a, "shape", ()), getattr(b, "shape", ()))
        return self.backend.xp.multiply(a, b, out=self.backend.empty(shape, self.dtype))


# ---- numbers --------------------------------------------------------------------------------


class _Elementwise(Loss):
    """`l_i = mean_j f(prediction_ij, target_ij)`, in lines for `Backend.elementwise`.

    Shape:
        prediction: `(N, n)` or `(..., n)`: leading axes are samples, the last is averaged. `(N,)`
            is N samples of one number. With K models `(K, N, n)`.
        target: The prediction's shape; with K models also `(N, n)` for all of them.
    """

    error: ClassVar[str] = "p - t"
    """e, of the prediction p and the target t."""
    value: ClassVar[str]
    """f, of e and t."""
    slope: ClassVar[str]
    """Derivative of f with respect to p, of e and t; but for the factor `steepness`."""
    steepness: ClassVar[float] = 1.0

    def __call__(
        self,
        prediction: Array,
        target: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        check_floating(type(self).__name__, prediction)
        self._like_prediction("targets", target, prediction)
        backend = backend_of(prediction, target)
        shape, dtype = prediction.shape, prediction.dtype
        alone = weight is None and normalizer is None and self.n_models is None
        if alone and (grad_scale is None or isinstance(grad_scale, (int, float))):
            return self._unweighted(backend, prediction, target, grad_scale, need_gradient)
        column = prediction.ndim == 1 and self.n_models is None
        rows = shape if column else self._rows(prediction)
        wide = (*rows, 1 if column else shape[-1])
        if weight is not None:
            weight = self._of_rows("sample weights", weight, rows, shape if column else shape[:-1])
        mean = _Mean(backend, rows, dtype, weight, normalizer, wide[-1])
        xp, e, each = backend.xp, backend.empty(shape, dtype), backend.empty(shape, dtype)
        t = target if target.shape == shape else xp.broadcast_to(target, shape)
        if self.error == "p - t":
            xp.subtract(prediction, t, out=e)
        else:
            backend.elementwise(self.error, e, p=prediction, t=t)
        mean.blank(e.reshape(wide))  # a sample without weight may hold what overflows
        operands = {"e": e, "t": t} | self._parameters(backend, shape, dtype)
        if self.value == "e * e":
            xp.multiply(e, e, out=each)
        else:
            backend.elementwise(self.value, each, **operands)
        loss = mean.value(each.reshape(wide))
        if not need_gradient:
            return loss, None
        slope = e if self.slope == "e" else backend.elementwise(self.slope, e, **operands)
        dprediction = mean.gradient(slope.reshape(wide), grad_scale, self.steepness)
        return loss, dprediction.reshape(shape)

    def _unweighted(
        self, backend: Backend, p: Array, t: Array, grad_scale: float | None, need_gradient: bool
    ) -> tuple[Array, Array | None]:
        """The same without weights and of one model: expressions of e, and a sum."""
        shape, dtype = p.shape, p.dtype
        e = p
        if self.error != "p":
            e = backend.elementwise(self.error, backend.empty(shape, dtype), p=p, t=t)
        operands = {"e": e, "t": t} | self._parameters(backend, shape, dtype)
        factor = 1 / p.size if p.size else 0.0
        each = backend.elementwise(self.value, backend.empty(shape, dtype), **operands)
        loss = backend.total(each, factor)
        if not need_gradient:
            return loss, None
        k = factor * self.steepness * (1 if grad_scale is None else grad_scale)
        return loss, backend.elementwise(f"k * ({self.slope})", each, k=k, **operands)

    def _parameters(self, backend: Backend, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        """Further operands of `value` and `slope`."""
        return {}


class MeanSquaredError(_Elementwise):
    """Mean of squared differences: `l_i = mean_j (prediction_ij - target_ij)^2`.

    Args:
        n_models: K for K models side by side.

    Shape:
        prediction: `(N, n)` or `(..., n)`: leading axes are samples, the last is averaged. `(N,)`
            is N samples of one number. With K models `(K, N, n)`.
        target: The prediction's shape; with K models also `(N, n)` for all of them.

    Gradient: `dl_i/dprediction_ij = 2 / n * (prediction_ij - target_ij)`, times `w_i / sum(w)`.

    Raises:
        TypeError: The arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together.
    """

    value = "e * e"
    slope = "e"
    steepness = 2.0


class MeanAbsoluteError(_Elementwise):
    """Mean of absolute differences: `l_i = mean_j |prediction_ij - target_ij|`; PyTorch's L1Loss.

    Args:
        n_models: K for K models side by side.

    Shape, errors: those of `MeanSquaredError`.

    Gradient: `dl_i/dprediction_ij = sign(prediction_ij - target_ij) / n`, times `w_i / sum(w)`;
    where both are equal it is 0.
    """

    value = "abs(e)"
    slope = "sign(e)"


class Huber(_Elementwise):
    """Squared near 0 and linear far away (Huber 1964), with PyTorch's scale.

    With `e = prediction - target`, f is `e^2 / 2` where `|e| <= delta`, else
    `delta * (|e| - delta / 2)`, and `l_i = mean_j f(e_ij)`. With `m = min(|e|, delta)` both are
    `m * (|e| - m / 2)`, which doesn't overflow.

    Args:
        delta: Where the square ends; positive.
        n_models: K for K models side by side.

    Shape, errors: those of `MeanSquaredError`; ValueError for a delta that isn't positive.

    Gradient: `dl_i/dprediction_ij = clip(e_ij, -delta, delta) / n`, times `w_i / sum(w)`.
    """

    value = "minimum(abs(e), delta) * (abs(e) - 0.5 * minimum(abs(e), delta))"
    slope = "maximum(-delta, minimum(e, delta))"

    def __init__(self, delta: float = 1.0, n_models: int | None = None) -> None:
        super().__init__(n_models)
        check_range("Huber", "delta", delta, 0, math.inf)
        self.delta = float(delta)

    def config(self) -> dict[str, Any]:
        """Arguments that build this loss again."""
        return {"delta": self.delta, "n_models": self.n_models}

    def _parameters(self, backend: Backend, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        return {"delta": self.delta}


# ---- yes or no ------------------------------------------------------------------------------


class BCEWithLogits(_Elementwise):
    """Binary cross-entropy of `sigmoid(prediction)`, for one label or many; from logits.

    With the logit x and `softplus(x) = log(1 + exp(-|x|)) + max(x, 0)`, which can't overflow,
    `l_i = mean_j (pos_weight_j t_ij softplus(-x_ij) + (1 - t_ij) softplus(x_ij))`. Without sample
    weights that is PyTorch's mean over all elements.

    Args:
        pos_weight: Factor of the terms whose label is 1: a number, or `(n,)` for each label.
        n_models: K for K models side by side.

    Shape:
        prediction: logits `(N, n)` or `(..., n)`, `(N,)`, with K models `(K, N, n)`.
        target: 0 and 1, or probabilities, in the prediction's dtype and shape; with K models also
            `(N, n)` for all of them.

    Gradient: `dl_i/dx_ij = ((1 - t) sigmoid(x) - pos_weight_j t sigmoid(-x)) / n`, times
    `w_i / sum(w)`. Neither sigmoid is got by subtraction from 1, so that small ones keep their
    digits.

    Raises:
        TypeError: The arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together, a `pos_weight` is negative or not finite, or
            in `Trainer.fit` a target isn't in [0, 1].
    """

    error = "p"
    value = (
        "w * t * (log1p(exp(-abs(e))) + maximum(-e, 0))"
        " + (1 - t) * (log1p(exp(-abs(e))) + maximum(e, 0))"
    )
    slope = (
        "((1 - t) * where(e > 0, 1, exp(-abs(e))) - w * t * where(e > 0, exp(-abs(e)), 1))"
        " / (1 + exp(-abs(e)))"
    )

    def __init__(self, pos_weight: Any = None, n_models: int | None = None) -> None:
        super().__init__(n_models)
        self.pos_weight = _weights("BCEWithLogits", "pos_weight", pos_weight, (0, 1))

    def check_target(
        self, target: np.ndarray, n_samples: int, n_outputs: int, dtype: Any, who: str
    ) -> np.ndarray:
        """As in `Loss`; labels and probabilities lie in [0, 1]."""
        target = super().check_target(target, n_samples, n_outputs, dtype, who)
        bad = target[~((target >= 0) & (target <= 1))]
        if bad.size:
            raise ValueError(
                f"{who}: BCEWithLogits: expected targets in [0, 1], got {bad[0]:g}; "
                "give 0 and 1, or probabilities"
            )
        return target

    def config(self) -> dict[str, Any]:
        """Arguments that build this loss again."""
        weights = None if self.pos_weight is None else self.pos_weight.tolist()
        return {"pos_weight": weights, "n_models": self.n_models}

    def _parameters(self, backend: Backend, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        if self.pos_weight is None or self.pos_weight.ndim == 0:
            return {"w": 1.0 if self.pos_weight is None else float(self.pos_weight)}
        if len(shape) < 2 or self.pos_weight.shape != shape[-1:]:
            raise ValueError(
                f"BCEWithLogits: expected logits (..., {len(self.pos_weight)}), one for each "
                f"pos_weight, got shape {shape}"
            )
        w = self._constant(backend, "pos_weight", self.pos_weight, dtype)
        return {"w": backend.xp.broadcast_to(w, shape)}


class Hinge(_Elementwise):
    """`l_i = mean_j max(0, 1 - t_ij * prediction_ij)` for labels t of -1 and +1.

    Args:
        n_models: K for K models side by side.

    Shape: that of `MeanSquaredError`: scores, and labels in the scores' dtype.

    Gradient: `dl_i/dprediction_ij = -t_ij / n` where `t_ij * prediction_ij < 1`, else 0, on the
    kink too; times `w_i / sum(w)`.

    Raises:
        TypeError: The arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together; in `Trainer.fit`, a label isn't -1 or +1.
    """

    error = "1 - t * p"
    value = "maximum(e, 0)"
    slope = "where(e > 0, -t, 0)"

    def check_target(
        self, target: np.ndarray, n_samples: int, n_outputs: int, dtype: Any, who: str
    ) -> np.ndarray:
        """As in `Loss`; labels are -1 and +1."""
        target = super().check_target(target, n_samples, n_outputs, dtype, who)
        bad = target[np.abs(target) != 1]
        if bad.size:
            raise ValueError(
                f"{who}: {type(self).__name__}: expected labels -1 and +1, got {bad[0]:g}; "
                "map 0 and 1 to them by 2 * t - 1"
            )
        return target


class SquaredHinge(Hinge):
    """`l_i = mean_j max(0, 1 - t_ij * prediction_ij)^2` for labels t of -1 and +1.

    Args:
        n_models: K for K models side by side.

    Shape, errors: those of `Hinge`.

    Gradient: `dl_i/dprediction_ij = -2 t_ij max(0, 1 - t_ij * prediction_ij) / n`, times
    `w_i / sum(w)`.
    """

    value = "maximum(e, 0) * maximum(e, 0)"
    slope = "-2 * t * maximum(e, 0)"


# ---- classes --------------------------------------------------------------------------------


class _OfClasses(Loss):
    """A loss of predictions `(..., C)` whose targets are labels or soft targets."""

    classifies = True

    def check_target(
        self, target: np.ndarray, n_samples: int, n_outputs: int, dtype: Any, who: str
    ) -> np.ndarray:
        """As in `Loss`: labels as int64, or soft targets; one-hot rows become labels.

        Floating rows `(N, C)` are soft targets, finite and not negative; anything else is labels.
        """
        if target.dtype.kind == "f" and target.shape == (n_samples, n_outputs):
            if not (np.isfinite(target) & (target >= 0)).all():
                raise ValueError(
                    f"{who}: expected finite, non-negative soft targets, got one that is not; "
                    "give probabilities, or class indices"
                )
            one_hot = (target == 1).sum(axis=1) == 1
            if not (one_hot & ((target != 0).sum(axis=1) == 1)).all():
                return target.astype(dtype)
        ignored = self._ignored(target)
        if ignored is None:
            return check_labels(target, n_outputs, n_samples, who=who)
        labels = check_labels(np.where(ignored, 0, target), n_outputs, n_samples, who=who)
        return np.where(ignored, target, labels).astype(np.int64)

    def _ignored(self, target: np.ndarray) -> np.ndarray | None:
        """Where labels on the host are to be ignored; None if nowhere."""
        return None

    def _check_classes(self, prediction: Array, target: Array) -> bool:
        """Check a target's shape and dtype; whether it is soft."""
        who, kind = type(self).__name__, target.dtype.kind
        check_floating(who, prediction)
        if kind in "iu":
            return False
        wide = target.shape[-1:] == prediction.shape[-1:] and target.ndim >= min(prediction.ndim, 2)
        if wide and kind == "f":
            self._like_prediction("soft targets", target, prediction)
            return True
        raise TypeError(
            f"{who}: expected integer labels, got {target.dtype} of shape {target.shape}; "
            f"soft targets have the predictions' shape {prediction.shape}"
        )

    def _wide(
        self, prediction: Array, target: Array, weight: Array | None
    ) -> tuple[Backend, Array, Array, Array | None]:
        """Backend, predictions and targets as `(*rows, C)`, and weights of the rows."""
        soft = self._check_classes(prediction, target)
        rows, samples = self._rows(prediction), tuple(prediction.shape[:-1])
        wide = (*rows, prediction.shape[-1])
        backend = backend_of(prediction, target)
        if not soft:
            labels = self._of_rows("labels", target, rows, samples)
            target = self._rows_of_classes(backend, labels, wide[-1], prediction.dtype)
        elif target.shape == prediction.shape:
            target = target.reshape(wide)
        if weight is not None:
            weight = self._of_rows("sample weights", weight, rows, samples)
        return backend, prediction.reshape(wide), backend.xp.broadcast_to(target, wide), weight

    def _rows_of_classes(self, backend: Backend, target: Array, n_classes: int, dtype: Any) -> Any:
        """Labels `(N,)` or `(K, N)` as one-hot rows; a label out of range gives NaN."""
        xp = backend.xp
        classes = self._constant(backend, f"{n_classes} classes", np.arange(n_classes), "int64")
        rows = backend.empty((*target.shape, n_classes), dtype)
        xp.equal(target[..., None], classes, out=rows)
        invalid = xp.less(target, 0, out=backend.empty(target.shape, bool))
        above = xp.greater_equal(target, n_classes, out=backend.empty(target.shape, bool))
        xp.logical_or(invalid, above, out=invalid)
        xp.copyto(rows, math.nan, where=invalid[..., None])
        return rows


class SoftmaxNLL(_OfClasses):
    """Negative log-likelihood of classes under `softmax(logits)`: cross-entropy from logits.

    With `s = z - max(z)`: `l = log(sum(exp(s))) - s[label]`. Shifting first keeps small losses that
    `max + log(sum) - z[label]` rounds away, and nothing overflows.

    Every option goes with every other. Let y be a sample's target, one-hot at its label or soft,
    eps the label smoothing, c the class weights (1 without them), v the sample weight, and
    `q_j = c_j ((1 - eps) y_j + eps / C)`. Then

        loss = sum_i v_i sum_j q_ij (-log softmax(z_i)_j) / sum_i v_i d_i

    over the samples that aren't ignored, with 0 / 0 = 0:

    | target | class weights | d_i, its part of the denominator | ignored | PyTorch |
    | --- | --- | --- | --- | --- |
    | label | no | 1 | label is `ignore_index` | the same |
    | label | yes | `c[label]` | label is `ignore_index` | the same |
    | soft | no | 1, whatever `sum(y)` is | y lies wholly on class `ignore_index` | the same (*) |
    | soft | yes | mean of c under y, `sum(c y) / sum(y)` | as above | divides by N |

    Smoothing changes q in all rows and d in none. So a one-hot soft target means in every
    combination what its label means; with `normalizer=N` the last row is PyTorch's too. (*) PyTorch
    has no `ignore_index` for soft targets, and gives NaN where all are ignored; here loss and
    gradient are 0. A sample with d = 0 counts for nothing, even where smoothing gives it terms
    of other classes, which PyTorch keeps; a soft target of zeros has d = 0 if there are class
    weights. Terms with `q_j = 0` are 0 even where the logit is -inf; a logit of -inf with
    `q_j > 0`, which smoothing makes of all classes, is a loss of inf.

    Args:
        class_weight: `(C,)`, finite and not negative.
        label_smoothing: eps, in [0, 1]: the share of the target spread evenly over all classes.
        ignore_index: Samples with this label count for nothing; any integer, as -100.
        n_models: K for K models side by side.

    Shape:
        prediction: logits `(..., C)`; leading axes are samples. With K models `(K, N, C)`.
        target: integer labels in 0..C-1 of the shape of the samples; with K models `(K, N)`, or
            `(N,)` for all of them. A label out of range makes the loss NaN. Or soft targets, not
            negative and not necessarily of sum 1, of the shape and dtype of the logits; with K
            models also `(N, C)`.

    Gradient: `dl/dz = sum(q) softmax(z) - q`, times `v_i / sum(v d)`; for a label alone
    `softmax(z) - onehot(label)`.

    Raises:
        TypeError: The labels aren't integers, or the arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together, or an argument is out of range.
    """

    def __init__(
        self,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        n_models: int | None = None,
    ) -> None:
        super().__init__(n_models)
        check_range("SoftmaxNLL", "label_smoothing", label_smoothing, 0, 1, closed="[]")
        self.class_weight = _weights("SoftmaxNLL", "class_weight", class_weight, (1,))
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = ignore_index

    def __call__(  # noqa: D102
        self,
        prediction: Array,
        target: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        soft, shape = self._check_classes(prediction, target), prediction.shape
        rows, samples = self._rows(prediction), shape[:-1]
        backend = backend_of(prediction, target)
        if not soft:
            target = self._of_rows("labels", target, rows, samples)
        elif samples != rows and target.shape == shape:
            target = target.reshape(*rows, shape[-1])
        loss, gradient = backend.softmax_nll(
            prediction if samples == rows else prediction.reshape(*rows, shape[-1]),
            target,
            None if weight is None else self._of_rows("sample weights", weight, rows, samples),
            class_weight=self._class_weight(backend, prediction),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            grad_scale=grad_scale,
            need_gradient=need_gradient,
        )
        return loss, gradient if samples == rows or gradient is None else gradient.reshape(shape)

    def target_weight(self, target: np.ndarray) -> np.ndarray | None:
        """What the class docstring calls d, for each target; 0 for those to be ignored."""
        if self.class_weight is None and self.ignore_index is None:
            return None
        soft = target.ndim == 2
        if not soft:
            ignored = target == self.ignore_index
        else:
            alone = (target != 0).sum(axis=1, keepdims=True) == 1
            classes = np.arange(target.shape[1]) == self.ignore_index
            ignored = (alone & classes & (target != 0)).any(axis=1)
        weight: np.ndarray = np.ones(len(target))
        if self.class_weight is not None and soft:
            mass = target.sum(axis=1)
            weight[:] = target @ self.class_weight / np.where(mass == 0, 1, mass)
        elif self.class_weight is not None:
            weight[:] = self.class_weight[np.where(ignored, 0, target)]
        weight[ignored] = 0
        return weight

    def config(self) -> dict[str, Any]:
        """Arguments that build this loss again."""
        return {
            "class_weight": None if self.class_weight is None else self.class_weight.tolist(),
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "n_models": self.n_models,
        }

    def _ignored(self, target: np.ndarray) -> np.ndarray | None:
        if self.ignore_index is None or target.ndim != 1 or target.dtype.kind not in "iuf":
            return None
        ignored: np.ndarray = np.equal(target, self.ignore_index)
        return ignored

    def _class_weight(self, backend: Backend, prediction: Array) -> Array | None:
        if self.class_weight is None:
            return None
        if prediction.shape[-1:] != self.class_weight.shape:
            raise ValueError(
                f"SoftmaxNLL: expected logits (..., {len(self.class_weight)}), one for each class "
                f"weight, got shape {prediction.shape}"
            )
        return self._constant(backend, "class_weight", self.class_weight, prediction.dtype)


class NLL(_OfClasses):
    """Negative log-likelihood of classes under given probabilities, as of a `Softmax` layer.

    `l = -log(p[label])`, or `l = -sum_j y_j log(p_j)` for a soft target y, where 0 log(0) is 0. To
    train a classifier prefer `SoftmaxNLL` on logits: a probability that has been rounded to 0 gives
    a loss of inf here, and a gradient from which nothing is learned.

    Args:
        n_models: K for K models side by side.

    Shape:
        prediction: probabilities `(..., C)`; leading axes are samples. With K models `(K, N, C)`.
        target: labels or soft targets, as in `SoftmaxNLL`.

    Gradient: `dl/dp_j = -y_j / p_j`, times `w_i / sum(w)`; p_j is taken no smaller than the
    smallest normal number of its dtype, so that the quotient stays finite.

    Raises:
        TypeError: The labels aren't integers, or the arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together.
    """

    def __call__(  # noqa: D102
        self,
        prediction: Array,
        target: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        backend, p, y, weight = self._wide(prediction, target, weight)
        mean = _Mean(backend, p.shape[:-1], p.dtype, weight, normalizer, 1)
        each = backend.elementwise(
            "where(y == 0, 0, where(p == 0, inf, -y * log(where(p == 0, 1, p))))",
            backend.empty(p.shape, p.dtype),
            p=p,
            y=y,
            inf=math.inf,
        )
        loss = mean.value(each)
        if not need_gradient:
            return loss, None
        tiny = float(np.finfo(p.dtype).tiny)
        slope = backend.elementwise("-y / maximum(p, tiny)", each, p=p, y=y, tiny=tiny)
        return loss, mean.gradient(slope, grad_scale).reshape(prediction.shape)


class SoftmaxMSE(_OfClasses):
    """Mean squared error of `softmax(logits)`: `l_i = mean_j (softmax(z_i)_j - y_ij)^2`.

    Unlike `SoftmaxNLL` its gradient vanishes where the model is surely wrong; it is here for
    comparison.

    Args:
        n_models: K for K models side by side.

    Shape:
        prediction: logits `(..., C)`; leading axes are samples. With K models `(K, N, C)`.
        target: labels, which count as one-hot rows, or soft targets, as in `SoftmaxNLL`.

    Gradient: with `u = 2 / C * (s - y)` and the Jacobian `ds_j/dz_k = s_j (1[j = k] - s_k)`,
    `dl/dz = s * (u - sum(u * s))`, times `w_i / sum(w)`: no C x C matrix is built.

    Raises:
        TypeError: The labels aren't integers, or the arrays aren't of one floating dtype.
        ValueError: The shapes don't belong together.
    """

    def __call__(  # noqa: D102
        self,
        prediction: Array,
        target: Array,
        weight: Array | None = None,
        *,
        normalizer: float | Array | None = None,
        grad_scale: float | Array | None = None,
        need_gradient: bool = True,
    ) -> tuple[Array, Array | None]:
        backend, z, y, weight = self._wide(prediction, target, weight)
        xp, shape, dtype = backend.xp, z.shape, z.dtype
        mean = _Mean(backend, shape[:-1], dtype, weight, normalizer, shape[-1])
        s, gap = backend.softmax(z), backend.empty(shape, dtype)
        xp.subtract(s, y, out=gap)
        each = xp.multiply(gap, gap, out=backend.empty(shape, dtype))
        loss = mean.value(each)
        if not need_gradient:
            return loss, None
        slope = backend.softmax_backward(gap, s)
        return loss, mean.gradient(slope, grad_scale, 2.0).reshape(prediction.shape)


def _weights(who: str, name: str, values: Any, ndims: tuple[int, ...]) -> np.ndarray | None:
    """Finite, non-negative numbers on the host, float64."""
    if values is None:
        return None
    if isinstance(values, str):
        raise TypeError(f"{who}: expected {name} as numbers, got {values!r}; compute them first")
    if hasattr(values, "__cuda_array_interface__"):
        values = backend_of(values).to_numpy(values)
    array = np.array(values, np.float64)
    if array.ndim not in ndims or not (np.isfinite(array) & (array >= 0)).all():
        shape = "(n,) numbers" if 0 not in ndims else "a number or (n,) numbers"
        raise ValueError(
            f"{who}: expected {name} of {shape}, finite and not negative, got {values!r}"
        )
    return array
