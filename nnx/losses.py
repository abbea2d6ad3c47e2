"""Losses: one call returns the value and its gradient, so the two can't disagree.

All are weighted means over samples, `loss = sum(w_i l_i) / sum(w_i)`, with 0 / 0 = 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

from nnx._checks import check_floating, check_same_shape
from nnx.backends import Array, backend_of


class Loss:
    """A scalar to be made small, and its derivative.

    Args:
        n_models: K if predictions are `(K, N, ...)`; the loss is then `(K,)`, each value the mean
            of its own model.
    """

    classifies: ClassVar[bool] = False
    """Whether targets are class labels, which `Trainer` checks before training."""

    def __init__(self, n_models: int | None = None) -> None:
        self.n_models = n_models

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

    def config(self) -> dict[str, Any]:
        """Arguments that build this loss again."""
        return {"n_models": self.n_models}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.config().items() if v is not None)
        return f"{type(self).__name__}({arguments})"

    def _rows(self, prediction: Array) -> tuple[int, ...]:
        """Shape of the samples: `(N,)` for K models `(K, N)`; leading axes count as samples."""
        if self.n_models is None:
            n = 1
            for axis in prediction.shape[:-1]:
                n *= axis
            return (n,)
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


class SoftmaxNLL(Loss):
    """Negative log-likelihood of class labels under `softmax(logits)`: cross-entropy from logits.

    With `s = z - max(z)`: `l = log(sum(exp(s))) - s[label]`. Shifting first keeps small losses that
    `max + log(sum) - z[label]` rounds away, and nothing overflows.

    Args:
        n_models: K for K models side by side.

    Shape:
        prediction: logits `(..., C)`; leading axes are samples. With K models `(K, N, C)`.
        target: integer labels in 0..C-1 of the shape of the samples; with K models `(K, N)`, or
            `(N,)` for all of them. A label out of range makes the loss NaN.

    Gradient: `dl/dz = softmax(z) - onehot(label)`, times `w_i / sum(w)`.

    Raises:
        TypeError: The labels aren't integers, or the logits aren't float32 or float64.
        ValueError: The shapes don't belong together.
    """

    classifies = True

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
        check_floating("SoftmaxNLL", prediction)
        if target.dtype.kind not in "iu":
            raise TypeError(f"SoftmaxNLL: expected integer labels, got {target.dtype}")
        rows, samples = self._rows(prediction), tuple(prediction.shape[:-1])
        backend = backend_of(prediction, target)
        loss, gradient = backend.softmax_nll(
            prediction if samples == rows else prediction.reshape(*rows, prediction.shape[-1]),
            self._of_rows("labels", target, rows, samples),
            None if weight is None else self._of_rows("sample weights", weight, rows, samples),
            normalizer=normalizer,
            grad_scale=grad_scale,
            need_gradient=need_gradient,
        )
        return loss, None if gradient is None else gradient.reshape(prediction.shape)


class MeanSquaredError(Loss):
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
        check_floating("MeanSquaredError", prediction)
        if target.dtype != prediction.dtype:
            raise TypeError(
                f"MeanSquaredError: expected {prediction.dtype} targets, got {target.dtype}"
            )
        shape, dtype = prediction.shape, prediction.dtype
        if target.shape != shape and (self.n_models is None or target.shape != shape[1:]):
            check_same_shape("MeanSquaredError", "targets", target.shape, shape)
        backend = backend_of(prediction, target)
        xp = backend.xp
        column = prediction.ndim == 1 and self.n_models is None
        rows = shape if column else self._rows(prediction)
        if weight is not None:
            weight = self._of_rows("sample weights", weight, rows, shape if column else shape[:-1])
        wide = (*rows, 1 if column else shape[-1])
        difference = backend.empty(shape, dtype)
        xp.subtract(prediction, target, out=difference)
        difference = difference.reshape(wide)
        if weight is not None:
            xp.copyto(difference, 0, where=weight[..., None] == 0)  # 0 * inf is NaN
        square = xp.multiply(difference, difference, out=backend.empty(wide, dtype))
        if weight is not None:
            xp.multiply(square, weight[..., None], out=square)
        axes = (-2, -1)
        loss = xp.sum(square, axis=axes, out=backend.empty(rows[:-1], dtype))
        if normalizer is None:
            normalizer = rows[-1] if weight is None else weight.sum(axis=-1)
        factor: Any
        if isinstance(normalizer, (int, float)):
            factor = 1 / (normalizer * wide[-1]) if normalizer * wide[-1] else 0.0
        else:
            zero = normalizer == 0
            factor = xp.where(zero, dtype.type(0), 1 / (xp.where(zero, 1, normalizer) * wide[-1]))
            factor = factor.astype(dtype)
        xp.multiply(loss, factor, out=loss)
        if not need_gradient:
            return loss, None
        if weight is not None:
            xp.multiply(difference, weight[..., None], out=difference)
        if not isinstance(factor, float):
            factor = factor[..., None, None]
        xp.multiply(difference, 2 * factor, out=difference)
        if grad_scale is not None:
            if not isinstance(grad_scale, (int, float)):
                grad_scale = grad_scale.astype(dtype)
            xp.multiply(difference, grad_scale, out=difference)
        return loss, difference.reshape(shape)
