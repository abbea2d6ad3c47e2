"""Checked arrays: features, labels, splits and standardization. Imports only NumPy.

Values are checked here, once, on the host, so that no training step has to.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnx.backends.numpy_backend import all_finite
from nnx.backends.philox import SPLIT, generator

Array = npt.NDArray[Any]
Features = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Classes = tuple[int | str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples and their labels, valid by construction.

    Args:
        x: Features, first axis samples; checked and converted by `check_features`.
        t: Class index of each sample, 0..n_classes-1; checked and converted by `check_labels`.
        classes: The original label of each class index.
        name: What messages call this data set.

    Raises:
        ValueError: if a value or shape is wrong; TypeError if x or t is not numeric.
    """

    x: Features
    t: Labels
    classes: Classes
    name: str

    def __post_init__(self) -> None:
        who = f"data set {self.name!r}"
        object.__setattr__(self, "x", check_features(self.x, who=who))
        object.__setattr__(self, "t", check_labels(self.t, self.n_classes, len(self.x), who=who))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def n_classes(self) -> int:
        """Number of classes, seen or declared."""
        return len(self.classes)

    def split(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Return (train, test) as chosen by `stratified_split`; the samples are copied."""
        train, test = (
            Dataset(self.x[index], self.t[index], self.classes, self.name)
            for index in stratified_split(self.t, fraction, seed)
        )
        return train, test


def check_features(
    x: npt.ArrayLike, *, n_features: int | None = None, who: str = "fit"
) -> Features:
    """Return x as a C-contiguous float array, or raises one clear error.

    Args:
        x: At least two axes, the first of them samples. float64 stays float64; everything else
            becomes float32. A good array is returned as it is, not copied.
        n_features: Required width of the last axis.
        who: The caller's name, for messages.

    Raises:
        ValueError: if a shape is wrong or a value is NaN or infinite; TypeError if not numeric.
    """
    try:
        array = np.asarray(x)
    except ValueError as error:  # a ragged list
        raise ValueError(
            f"{who}: expected an array of numbers, got nested sequences of unequal length; "
            f"give every sample the same number of features"
        ) from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{who}: expected numeric features, got dtype {array.dtype}; "
            f"convert or encode them as numbers first"
        )
    if array.ndim < 2:
        raise ValueError(
            f"{who}: expected features of shape (n_samples, n_features), got shape {array.shape}; "
            f"reshape one sample to (1, -1) and one feature to (-1, 1)"
        )
    if array.size == 0:
        raise ValueError(
            f"{who}: expected at least 1 sample and 1 feature, got shape {array.shape}; "
            f"give an array that is not empty"
        )
    if n_features is not None:
        _check_width(array, n_features, who)
    features: Features = array
    if array.dtype not in (np.float32, np.float64) or not array.flags.c_contiguous:
        wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
        with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes inf, reported below
            features = np.ascontiguousarray(array, np.float64 if wide else np.float32)
    if not all_finite(features):
        bad = np.argwhere(~np.isfinite(features.reshape(len(features), -1)))
        row, column = bad[0].tolist()
        raise ValueError(
            f"{who}: expected finite features, got {len(bad)} NaN or infinite, the first at row "
            f"{row}, column {column}; remove or impute them"
        )
    return features


def check_labels(t: npt.ArrayLike, n_classes: int, n_samples: int, *, who: str = "fit") -> Labels:
    """Return t as int64 class indices of shape (n_samples,), or raises one clear error.

    Args:
        t: Class indices, shape (n_samples,), or one-hot rows, shape (n_samples, n_classes).
        n_classes: Labels must lie in 0..n_classes-1.
        n_samples: Required number of labels.
        who: The caller's name, for messages.

    Raises:
        ValueError: if a shape or value is wrong; TypeError if t is not integral.
    """
    labels = np.asarray(t)
    permitted = f"0..{n_classes - 1}"
    if labels.dtype.kind not in "biuf":
        raise TypeError(
            f"{who}: expected integer labels in {permitted}, got dtype {labels.dtype}; "
            f"encode_labels turns names into integers"
        )
    if labels.shape == (n_samples, n_classes):
        return _from_one_hot(labels, who)
    if labels.shape != (n_samples,):
        raise ValueError(
            f"{who}: expected {n_samples} labels of shape ({n_samples},), got shape "
            f"{labels.shape}; give each sample one label or one one-hot row of {n_classes}"
        )
    _check_integral(labels, who)
    bad = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if bad.size:
        raise ValueError(
            f"{who}: expected labels in {permitted}, got {labels[bad[0]]} at index {bad[0]} "
            f"({bad.size} out of range); correct them or declare more classes"
        )
    return labels.astype(np.int64, copy=False)


def encode_labels(
    labels: npt.ArrayLike, classes: Iterable[int | str] | None = None, *, who: str = "encode_labels"
) -> tuple[Labels, Classes]:
    """Return (t, classes): the class index of each label, and the label of each class.

    Args:
        labels: Integers or strings, shape (n_samples,).
        classes: The permitted labels, in the order of their indices; default sorted and unique.
        who: The caller's name, for messages.

    Raises:
        ValueError: if a label is not among the classes, or a shape is wrong; TypeError if the
            labels are neither all integers nor all strings.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"{who}: expected labels of shape (n_samples,) with at least 1 sample, got shape "
            f"{values.shape}; ravel() a column, argmax(axis=1) one-hot rows"
        )
    if values.dtype.kind in "OU" and not isinstance(labels, np.ndarray):
        values = np.array(labels, dtype=object)  # before NumPy turned the 1 of ["a", 1] into "1"
    if values.dtype.kind in "OT":
        kinds = {str if isinstance(value, str) else type(value) for value in values}
        if kinds != {str}:
            raise TypeError(
                f"{who}: expected labels that are all integers or all strings, got "
                f"{', '.join(sorted(kind.__name__ for kind in kinds))}; use one dtype"
            )
        values = np.array(values.tolist(), str)
    elif values.dtype.kind not in "biufU":
        raise TypeError(
            f"{who}: expected integer or string labels, got dtype {values.dtype}; convert them"
        )
    if values.dtype.kind in "bf":
        _check_integral(values, who)
        values = values.astype(np.int64)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    if classes is None:
        return inverse.astype(np.int64, copy=False), tuple(unique.tolist())
    declared = tuple(c.item() if isinstance(c, np.generic) else c for c in classes)
    index_of = {label: index for index, label in enumerate(declared)}
    if len(index_of) != len(declared):
        raise ValueError(
            f"{who}: expected {len(declared)} different classes, got {len(index_of)}; "
            f"name each class once"
        )
    for position, label in zip(first.tolist(), unique.tolist(), strict=True):
        if label not in index_of:
            shown = ", ".join(map(repr, declared[:10])) + ", ..." * (len(declared) > 10)
            raise ValueError(
                f"{who}: expected a label among the {len(declared)} classes {shown}, got "
                f"{label!r} at index {position}; correct it or declare it as a class"
            )
    table = np.array([index_of[label] for label in unique.tolist()], dtype=np.int64)
    return table[inverse], declared


def stratified_split(
    t: npt.ArrayLike, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (train_index, test_index), ascending, each class shared out in proportion.

    The test side has ``round(n_samples * fraction)`` samples, apportioned by largest remainder.
    A class with two samples or more has one on each side, and a class with one sample trains,
    unless the size of the test side leaves no room for that.

    Args:
        t: Labels, shape (n_samples,).
        fraction: Share of the test side, between 0 and 1, both excluded.
        seed: 0..2**64-1; the same seed gives the same split.

    Raises:
        ValueError: if an argument is out of range or a side would be empty.
    """
    labels = np.asarray(t)
    if labels.ndim != 1:
        raise ValueError(
            f"stratified_split: expected labels of shape (n_samples,), got shape {labels.shape}; "
            f"argmax(axis=1) one-hot rows"
        )
    if not 0 < fraction < 1:
        raise ValueError(
            f"stratified_split: expected a fraction between 0 and 1, got {fraction}; "
            f"0.2 puts a fifth into the test set"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(
            f"stratified_split: expected a seed in 0..2**64-1, got {seed}; choose another"
        )
    n_test = round(len(labels) * fraction)
    if not 0 < n_test < len(labels):
        raise ValueError(
            f"stratified_split: expected both sides to have a sample, got {n_test} test samples "
            f"of {len(labels)} with fraction {fraction}; change the fraction"
        )
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sizes = _apportion(counts, n_test)
    order = generator(seed, SPLIT).permutation(len(labels))
    members = order[np.argsort(group[order], kind="stable")]  # class by class, each in random order
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_test = np.zeros(len(labels), dtype=bool)
    in_test[members[rank < np.repeat(sizes, counts)]] = True
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


@dataclass(frozen=True, slots=True, eq=False)
class Standardizer:
    """Shift and scale to mean 0 and standard deviation 1: ``(x - mean) / scale``.

    Args:
        mean: float64, shape (n_features,), or () for one mean of all features.
        scale: float64, the shape of mean; 1 where a feature is constant.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, x: npt.ArrayLike, per_feature: bool = True) -> "Standardizer":
        """Measure mean and standard deviation (divisor n) in float64, in two passes.

        Args:
            x: Features; ``(n_samples, n_features)`` where each feature gets its own mean.
            per_feature: False measures one mean and one scale for all features together.
        """
        x = check_features(x, who="Standardizer.fit")
        if per_feature and x.ndim != 2:
            raise ValueError(
                f"Standardizer.fit: expected features of 2 axes, got shape {x.shape}; "
                f"flatten them to {(len(x), math.prod(x.shape[1:]))} or set per_feature=False"
            )
        rows = x if per_feature else x.reshape(-1, 1)
        # Measured from the first row, a constant column is exactly 0 and its variance too.
        mean = rows[0] + sum(b.sum(axis=0) for b in _blocks(rows, rows[0])) / len(rows)
        variance = sum(np.square(b).sum(axis=0) for b in _blocks(rows, mean)) / len(rows)
        # A deviation that float32 holds as 0 or as a denormal would divide to inf.
        deviation = np.sqrt(variance)
        scale = np.where(deviation >= np.finfo(np.float32).tiny, deviation, 1.0)
        shape = mean.shape if per_feature else ()
        return cls(mean.reshape(shape), scale.reshape(shape))

    def transform(self, x: npt.ArrayLike) -> Features:
        """Return ``(x - mean) / scale`` in x's own float dtype (float32 for integers)."""
        x = np.asarray(x)
        if self.mean.ndim:
            _check_width(x, len(self.mean), "Standardizer.transform")
        dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
        out: Features = np.subtract(x, self.mean.astype(dtype), dtype=dtype)
        out /= self.scale.astype(dtype)
        return out


def _blocks(rows: Features, center: Array) -> Iterator[npt.NDArray[np.float64]]:
    """Yield ``rows - center`` in float64, about 512 KiB at a time: a fixed partition."""
    height = max(1, 2**16 // rows.shape[1])
    for start in range(0, len(rows), height):
        yield np.subtract(rows[start : start + height], center, dtype=np.float64)


def _check_width(x: Array, n_features: int, who: str) -> None:
    got = x.shape[-1] if x.ndim else 1
    if got != n_features:
        flat = x.ndim > 2 and math.prod(x.shape[1:]) == n_features
        advice = "flatten each sample first" if flat else "give the features used in training"
        raise ValueError(
            f"{who}: expected {n_features} features, got {got} (array of shape {x.shape}); {advice}"
        )


def _check_integral(labels: Array, who: str) -> None:
    if labels.dtype.kind == "f":
        wide = labels.astype(np.float64)
        bad = np.flatnonzero(~((wide == np.floor(wide)) & (np.abs(wide) < 2**63)))
        if bad.size:
            raise TypeError(
                f"{who}: expected integral labels, got {labels[bad[0]]} at index {bad[0]}; "
                f"classification needs one class per sample"
            )


def _from_one_hot(rows: Array, who: str) -> Labels:
    ones, zeros = (rows == 1).sum(axis=1), (rows == 0).sum(axis=1)
    bad = np.flatnonzero((ones != 1) | (ones + zeros != rows.shape[1]))
    if bad.size:
        row = bad[0]
        raise ValueError(
            f"{who}: expected one-hot rows (a single 1 among zeros), got {ones[row]} ones and "
            f"{zeros[row]} zeros of {rows.shape[1]} in row {row}; give class indices instead"
        )
    labels: Labels = rows.argmax(axis=1).astype(np.int64, copy=False)
    return labels


def _apportion(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Share total out in proportion to counts, by largest remainder and within bounds."""
    quota = counts * (total / counts.sum())
    low, high = np.minimum(1, counts - 1), counts - 1
    if total < low.sum():
        low = np.zeros_like(counts)
    if total > high.sum():
        high = counts
    sizes: npt.NDArray[np.int64] = np.clip(np.floor(quota).astype(np.int64), low, high)
    while (missing := total - int(sizes.sum())) != 0:
        gap = quota - sizes if missing > 0 else sizes - quota
        room = sizes < high if missing > 0 else sizes > low
        sizes[np.argmax(np.where(room, gap, -np.inf))] += np.sign(missing)
    return sizes
