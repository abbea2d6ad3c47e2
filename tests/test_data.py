"""nnx.data: every file format, every check, every message by the number it contains. No network."""

import builtins
import gzip
import hashlib
import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nnx.data
from nnx.data import (
    Dataset,
    Standardizer,
    check_features,
    check_labels,
    encode_labels,
    load,
    load_digits,
    load_mnist,
    logic_gate,
    read_data,
    read_features,
    read_idx,
    read_npz,
    read_table,
    stratified_split,
)
from nnx.data import builtin as builtin_sets

Array = npt.NDArray[Any]
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: Array) -> bytes:
    """The IDX encoding, written independently of the reader."""
    code = IDX_CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, suffix: str = "", labels: tuple[int, ...] = (0, 9, 4)) -> Path:
    """A folder like MNIST with 3 training and 2 test images of 2 x 3 pixels."""
    folder.mkdir(exist_ok=True)
    arrays = [
        np.arange(18).reshape(3, 2, 3),
        np.array(labels),
        np.arange(200, 212).reshape(2, 2, 3),
        np.array(labels[:2]),
    ]
    for name, array in zip(MNIST_NAMES, arrays, strict=True):
        data = idx_bytes(array.astype(np.uint8))
        (folder / (name + suffix)).write_bytes(gzip.compress(data) if suffix == ".gz" else data)
    return folder


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("f4", "f4"),
        ("f8", "f8"),
        (">f4", "f4"),
        (">f8", "f8"),
        ("f2", "f4"),
        ("i8", "f4"),
        ("u1", "f4"),
        ("?", "f4"),
        ("g", "f8"),
    ],
)
def test_check_features_dtype(dtype: str, expected: str) -> None:
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    got = check_features(x)
    assert got.dtype == np.dtype(expected)
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, [[0, 1, 1], [1, 0, 1]])


def test_check_features_copies_nothing_without_need() -> None:
    x = np.ones((3, 4), np.float32)
    assert check_features(x) is x


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1]])
def test_check_features_makes_views_contiguous(view: Callable[[Array], Array]) -> None:
    x: Array = view(np.arange(12, dtype=np.float32).reshape(4, 3))
    got = check_features(x)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (0,)])
def test_check_features_shape_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got shape {shape}")):
        check_features(np.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_check_features_names_the_first_bad_value(bad: float, dtype: type) -> None:
    x: Array = np.zeros((6, 2, 2), dtype)
    x[4, 1, 0] = x[5, 0, 0] = bad
    with pytest.raises(ValueError, match="got 2 NaN or infinite, the first at row 4, column 2"):
        check_features(x)


def test_check_features_accepts_values_whose_sum_overflows() -> None:
    x = np.full((2, 2), np.finfo(np.float32).max, np.float32)
    assert check_features(x) is x


def test_check_features_width_error() -> None:
    message = r"predict: expected 64 features, got 63 \(array of shape \(10, 63\)\); give"
    with pytest.raises(ValueError, match=message):
        check_features(np.zeros((10, 63)), n_features=64, who="predict")
    with pytest.raises(ValueError, match=r"got 8 \(array of shape \(10, 8, 8\)\); flatten"):
        check_features(np.zeros((10, 8, 8)), n_features=64)


@pytest.mark.parametrize(
    "x",
    [
        np.array([["1", "2"]]),
        np.array([[1, None]]),
        np.zeros((2, 2), complex),
        np.zeros((2, 2), "M8[D]"),
    ],
)
def test_check_features_refuses_other_dtypes(x: Array) -> None:
    with pytest.raises(TypeError, match=re.escape(f"got dtype {x.dtype}")):
        check_features(x)


def test_check_features_refuses_ragged_lists() -> None:
    with pytest.raises(ValueError, match="unequal length"):
        check_features([[1.0, 2.0], [3.0]])


# ------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "t",
    [
        [2, 0, 1],
        np.array([2, 0, 1], np.uint8),
        np.array([2.0, 0.0, 1.0], np.float16),
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.float32),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], bool),
    ],
)
def test_check_labels_accepts(t: Any) -> None:
    got = check_labels(t, 3, 3)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, [2, 0, 1])


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([0, 1, 9, 10, -1], ValueError, r"labels in 0\.\.9, got 10 at index 3 \(2 out of range\)"),
        ([0, -1, 9, 9, 9], ValueError, r"got -1 at index 1 \(1 out of range\)"),
        (np.array([0, 255, 1, 1, 1], np.uint8), ValueError, "got 255 at index 1"),
        ([0, 1, 2, 3], ValueError, r"expected 5 labels of shape \(5,\), got shape \(4,\)"),
        ([[0], [1], [2], [3], [4]], ValueError, r"got shape \(5, 1\)"),
        ([0, 1.5, 2, 3, 4], TypeError, r"got 1\.5 at index 1"),
        ([0, 1, math.nan, 3, 4], TypeError, "got nan at index 2"),
        ([0, 1, 2, math.inf, 4], TypeError, "got inf at index 3"),
        (["a", "b", "c", "d", "e"], TypeError, "got dtype <U1"),
    ],
)
def test_check_labels_error(t: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_labels(t, 10, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 0, 0], "got 0 ones and 3 zeros of 3 in row 1"),
        ([1, 1, 0], "got 2 ones and 1 zeros of 3 in row 1"),
        ([1, 0, 0.5], "got 1 ones and 1 zeros of 3 in row 1"),
        ([math.nan, 1, 0], "got 1 ones and 1 zeros of 3 in row 1"),
        ([0, 2, 0], "got 0 ones and 2 zeros of 3 in row 1"),
        ([-1, 1, 1], "got 2 ones and 0 zeros of 3 in row 1"),
    ],
)
def test_check_labels_refuses_rows_not_one_hot(row: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(np.array([[1, 0, 0], row]), 3, 2)


@pytest.mark.parametrize(
    ("labels", "t", "classes"),
    [
        ([3, 1, 3, 2], [2, 0, 2, 1], (1, 2, 3)),
        (np.array([200, 7], np.uint8), [1, 0], (7, 200)),
        ([-1, 1], [0, 1], (-1, 1)),
        ([1.0, 0.0], [1, 0], (0, 1)),
        ([True, False], [1, 0], (0, 1)),
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        (np.array(["b", "a"], dtype=object), [1, 0], ("a", "b")),
        (np.array(["b", "a"], dtype=np.dtypes.StringDType()), [1, 0], ("a", "b")),
        (["10", "9"], [0, 1], ("10", "9")),
    ],
)
def test_encode_labels_sorts_classes(labels: Any, t: list[int], classes: tuple[Any, ...]) -> None:
    got, got_classes = encode_labels(labels)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, t)
    assert got_classes == classes
    assert [type(c) for c in got_classes] == [type(c) for c in classes]  # no NumPy scalars
    json.dumps(got_classes)


def test_encode_labels_keeps_declared_order_and_absent_classes() -> None:
    t, classes = encode_labels(["no", "yes"], classes=np.array(["yes", "no", "maybe"]))
    np.testing.assert_array_equal(t, [1, 0])
    assert classes == ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        (["a", "z", "q"], ["a", "b"], ValueError, "among the 2 classes 'a', 'b', got 'q' at index"),
        ([0, 1, 5], range(5), ValueError, "got 5 at index 2"),
        (["1"], [1], ValueError, "got '1' at index 0"),
        ([1], [1, 1], ValueError, "expected 2 different classes, got 1"),
        ([5], range(100), None, ""),
        ([500], range(100), ValueError, r"100 classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\., got"),
        (["a", 1], None, TypeError, "got int, str"),
        (["a", None], None, TypeError, "got NoneType, str"),
        ([0.5], None, TypeError, r"got 0\.5 at index 0"),
        ([1e30], None, TypeError, r"got 1e\+30 at index 0"),
        ([b"a"], None, TypeError, r"got dtype \|S1"),
        ([[1], [2]], None, ValueError, r"got shape \(2, 1\)"),
        ([], None, ValueError, r"got shape \(0,\)"),
    ],
)
def test_encode_labels_error(
    labels: Any, classes: Any, error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert encode_labels(labels, classes)[0].tolist() == [5]
        return
    with pytest.raises(error, match=message):
        encode_labels(labels, classes)


def test_dataset_is_valid_by_construction() -> None:
    data = Dataset(np.zeros((2, 3), np.float32), np.array([1, 0], np.uint8), ("no", "yes"), "d")
    assert (len(data), data.n_classes, data.t.dtype.str) == (2, 2, "<i8")
    with pytest.raises(ValueError, match="data set 'd': expected 2 labels"):
        Dataset(data.x, data.t[:1], data.classes, "d")
    with pytest.raises(ValueError, match=r"labels in 0\.\.0, got 1 at index 0"):
        Dataset(data.x, data.t, ("no",), "d")
    with pytest.raises(AttributeError):
        data.x = data.x  # type: ignore[misc]


# ------------------------------------------------------------------------------------- split


def test_stratified_split_is_a_proportional_partition() -> None:
    t = np.repeat([5, 7, 9], [100, 50, 10])
    train, test = stratified_split(t, 0.2, seed=3)
    assert train.dtype == test.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(160))
    np.testing.assert_array_equal(np.unique(t[test], return_counts=True)[1], [20, 10, 2])


def test_stratified_split_depends_on_the_seed_alone() -> None:
    t = np.arange(200) % 4
    first, again = stratified_split(t, 0.25, 1)[1], stratified_split(t, 0.25, 1)[1]
    np.testing.assert_array_equal(first, again)
    other = stratified_split(t, 0.25, 2)[1]
    assert np.intersect1d(first, other).size < 40  # 12.5 expected of 50
    names = np.array(["a", "b", "c", "d"])[t]
    np.testing.assert_array_equal(stratified_split(names, 0.25, 1)[1], first)


def test_stratified_split_tests_the_first_of_each_class_in_the_stream() -> None:
    t = np.random.default_rng(0).integers(0, 3, 500)
    rng = np.random.Generator(np.random.Philox(key=np.array([8, 2**64 - 2], np.uint64)))
    seen, expected = [0, 0, 0], []
    test = stratified_split(t, 0.5, seed=8)[1]
    quota = np.bincount(t[test]).tolist()
    for index in rng.permutation(500).tolist():
        if seen[t[index]] < quota[t[index]]:
            seen[t[index]] += 1
            expected.append(index)
    np.testing.assert_array_equal(test, sorted(expected))


def test_stratified_split_shuffles_within_a_class() -> None:
    counts = np.zeros(10)
    for seed in range(200):
        counts[stratified_split(np.zeros(10), 0.3, seed)[1]] += 1
    assert counts.min() > 35  # 60 expected each, standard deviation 6.5
    assert counts.max() < 85


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ([3, 3, 3], 0.3, [1, 1, 1]),
        ([10, 7, 3], 0.25, [2, 2, 1]),  # quotas 2.5 1.75 0.75: largest remainders round up
        ([96, 2, 2], 0.1, [8, 1, 1]),  # rare classes are tested
        ([96, 2, 2], 0.95, [93, 1, 1]),  # and trained
        ([5, 1, 1], 0.3, [2, 0, 0]),  # a single sample trains
        ([2, 2, 2, 2], 0.25, [1, 1, 0, 0]),  # too few test samples for every class
        ([2, 2, 2, 2], 0.75, [2, 2, 1, 1]),
        ([1, 1, 1, 1], 0.5, [1, 1, 0, 0]),
    ],
)
def test_stratified_split_sizes(counts: list[int], fraction: float, expected: list[int]) -> None:
    t = np.repeat(np.arange(len(counts)), counts)
    test = stratified_split(t, fraction, seed=0)[1]
    assert np.bincount(t[test], minlength=len(counts)).tolist() == expected


@settings(database=None, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8), st.floats(0.01, 0.99), st.integers(0, 99)
)
def test_stratified_split_total_and_bounds(counts: list[int], fraction: float, seed: int) -> None:
    t = np.repeat(np.arange(len(counts)), counts)
    n_test = round(len(t) * fraction)
    if not 0 < n_test < len(t):
        with pytest.raises(ValueError, match=f"got {n_test} test samples of {len(t)}"):
            stratified_split(t, fraction, seed)
        return
    train, test = stratified_split(t, fraction, seed)
    assert (len(train), len(test)) == (len(t) - n_test, n_test)
    plenty = [c for c in counts if c >= 2]
    sizes = np.bincount(t[test], minlength=len(counts))
    if len(plenty) <= n_test <= len(t) - len(counts):
        for size, count in zip(sizes.tolist(), counts, strict=True):
            assert (1 <= size < count) if count >= 2 else size == 0


@pytest.mark.parametrize(
    ("fraction", "seed", "message"),
    [
        (0.0, 0, "got 0.0"),
        (1.0, 0, "got 1.0"),
        (-0.2, 0, "got -0.2"),
        (20, 0, "got 20"),
        (math.nan, 0, "got nan"),
        (0.01, 0, "got 0 test samples of 10"),
        (0.99, 0, "got 10 test samples of 10"),
        (0.2, -1, "got -1"),
        (0.2, 2**64, f"got {2**64}"),
    ],
)
def test_stratified_split_error(fraction: float, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_split(np.arange(10) % 2, fraction, seed)


def test_stratified_split_refuses_one_hot() -> None:
    with pytest.raises(ValueError, match=r"got shape \(4, 4\)"):
        stratified_split(np.eye(4), 0.5, 0)


def test_dataset_split_keeps_rows_together() -> None:
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    train, test = Dataset(x, np.arange(20) % 2, (0, 1), "d").split(0.25, seed=0)
    assert (len(train), len(test)) == (15, 5)
    for part in (train, test):
        np.testing.assert_array_equal(part.t, (part.x[:, 0] / 2) % 2)


# ------------------------------------------------------------------------------ standardizer


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardizer_matches_a_plain_loop(per_feature: bool, dtype: type) -> None:
    x: Array = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(dtype)
    before = x.copy()
    standardizer = Standardizer.fit(x, per_feature)
    columns = x.T.tolist() if per_feature else [x.ravel().tolist()]
    mean = [math.fsum(c) / len(c) for c in columns]
    scale = [
        math.sqrt(math.fsum((v - m) ** 2 for v in c) / len(c))
        for c, m in zip(columns, mean, strict=True)
    ]
    assert standardizer.mean.shape == standardizer.scale.shape == ((4,) if per_feature else ())
    assert standardizer.mean.dtype == standardizer.scale.dtype == np.float64
    np.testing.assert_allclose(np.atleast_1d(standardizer.mean), mean, rtol=1e-13)
    np.testing.assert_allclose(np.atleast_1d(standardizer.scale), scale, rtol=1e-13)
    out = standardizer.transform(x)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype is np.float32 else 1e-14
    expected = (before.astype(np.float64) - mean) / scale
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * tolerance)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("rows", [1, 2, 1000, 70_001])  # the last: more than one block
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardizer_leaves_constant_columns_at_zero(rows: int, dtype: type) -> None:
    x: Array = np.full((rows, 3), 0.1, dtype)
    x[:, 1] = 1e20
    x[:, 2] = -7
    standardizer = Standardizer.fit(x)
    np.testing.assert_array_equal(standardizer.scale, [1, 1, 1])
    np.testing.assert_array_equal(standardizer.transform(x), np.zeros_like(x))


def test_standardizer_sees_every_block() -> None:
    x = np.random.default_rng(1).normal(size=(70_001, 3)).astype(np.float32)
    standardizer = Standardizer.fit(x)
    np.testing.assert_allclose(standardizer.mean, x.astype(np.float64).mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(standardizer.scale, x.astype(np.float64).std(axis=0), rtol=1e-13)


def test_standardizer_survives_an_offset_and_a_denormal() -> None:
    x = np.zeros((1000, 2))
    x[:, 0] = 1e9 + np.arange(1000) % 2
    x[0, 1] = 1e-45
    standardizer = Standardizer.fit(x)
    assert standardizer.scale.tolist() == [0.5, 1.0]
    assert np.isfinite(standardizer.transform(x.astype(np.float32))).all()


@pytest.mark.parametrize("dtype", ["i8", "u1", "?"])
def test_standardizer_makes_float32_of_integers(dtype: str) -> None:
    x = np.array([[0], [1]]).astype(dtype)
    out = Standardizer.fit(x).transform(x)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, [[-1], [1]])


def test_standardizer_width_error() -> None:
    standardizer = Standardizer.fit(np.eye(4))
    with pytest.raises(ValueError, match=r"expected 4 features, got 5 \(array of shape \(2, 5\)"):
        standardizer.transform(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="expected 4 features, got 1"):
        standardizer.transform(np.zeros((4, 1)))  # would broadcast
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 4\); flatten them to \(2, 12\)"):
        Standardizer.fit(np.zeros((2, 3, 4)))
    assert Standardizer.fit(np.ones((2, 3, 4)), per_feature=False).mean == 1


# --------------------------------------------------------------------------------------- IDX

idx_arrays = st.sampled_from(sorted(IDX_CODES)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0))
)


@settings(database=None, deadline=None, derandomize=True)
@given(array=idx_arrays, compress=st.booleans())
def test_read_idx_round_trip(
    array: Array, compress: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip"  # gzip is told by content, not by name
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    got = read_idx(path)
    assert got.dtype == array.dtype
    assert got.dtype.isnative
    assert got.shape == array.shape
    assert got.flags.writeable
    np.testing.assert_array_equal(got.tobytes(), array.tobytes())  # NaN by its bits


IDX = idx_bytes(np.arange(12, dtype=np.int16).reshape(3, 4))  # 12 bytes of header, 24 of data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of at least 4 bytes, got 0"),
        (b"\0\0\x08", "header of at least 4 bytes, got 3"),
        (b"\x93NUMPY..", "got 0x934e554d"),
        (b"\0\0\x0a\x01\0\0\0\1\0", "got 0x00000a01"),  # no such dtype
        (b"\0\0\x08\x00\1", "got 0x00000800"),  # no axes
        (b"\0\0\x08\xff" + b"\0" * 2000, "got 0x000008ff"),  # 255 axes
        (b"\0\1\x08\x01\0\0\0\1\0", "got 0x00010801"),
        (IDX[:11], "header of 12 bytes, got 11"),
        (IDX[:-1], r"24 bytes of data for shape \(3, 4\), got 23"),
        (IDX[:12], r"24 bytes of data for shape \(3, 4\), got 0"),
        (IDX + b"\0", "24 bytes of data .* got 25"),
        (b"\0\0\x08\x03" + b"\xff" * 12, f"expected {(2**32 - 1) ** 3} bytes"),
        (b"\0\0\x08\x03\0\0\0\0" + b"\xff" * 8, r"got \(0, 4294967295, 4294967295\)"),
        (gzip.compress(IDX)[:-9], "corrupt"),
        (gzip.compress(IDX)[:5], "corrupt"),
        (b"\x1f\x8b" + b"junk" * 9, "corrupt"),
        (gzip.compress(IDX)[:-8] + b"\0" * 8, "corrupt"),  # wrong CRC
        (gzip.compress(IDX) + b"junk", "corrupt"),
        (gzip.compress(IDX[:-1]), "24 bytes of data .* got 23"),
        (gzip.compress(gzip.compress(IDX)), "got 0x1f8b"),
    ],
)
def test_read_idx_error(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad-idx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad-idx: .*{message}"):
        read_idx(path)


# ------------------------------------------------------------------------------------- tables


def test_read_table_csv(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "w,h,b,kind\n1,2.5,true,cat\n-3,4e2,false,dog\n")
    x, labels = read_table(path)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[1, 2.5, 1], [-3, 400, 0]])
    assert labels.tolist() == ["cat", "dog"]
    assert labels.dtype.kind == "U"


def test_read_table_target_by_name(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.tsv", "w\ty\th\n1\t7\t2\n3\t5\t4\n")
    x, labels = read_table(path, target="y")
    np.testing.assert_array_equal(x, [[1, 2], [3, 4]])
    assert labels.dtype.kind == "i"
    assert labels.tolist() == [7, 5]


def test_read_table_reads_bom_crlf_and_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfw,y\r\n1,2.0\r\n"))
    x, labels = read_table(path, target="y")
    assert (x.tolist(), labels.tolist(), labels.dtype.str) == ([[1.0]], [2], "<i8")


@pytest.mark.parametrize("column", [{"y": [True, False]}, {"y": [1.0, 0.0]}])
def test_read_table_integral_labels_become_integers(
    tmp_path: Path, column: dict[str, list[Any]]
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
    pq.write_table(pa.table({"w": [1, 2]} | column), tmp_path / "a.parquet")
    labels = read_table(tmp_path / "a.parquet")[1]
    assert (labels.tolist(), labels.dtype.str) == ([1, 0], "<i8")


def test_read_table_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
    table = pa.table(
        {
            "a": pa.chunked_array([pa.array([1], pa.int8()), pa.array([2], pa.int8())]),
            "b": pa.array([2**60, 3], pa.int64()),
            "c": pa.array([1.5, 2.5], pa.float16()),
            "d": pa.array([1, 2]).dictionary_encode(),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "__index_level_0__": [17, 18],  # pandas puts its index last
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    x, labels = read_table(tmp_path / "a.parquet")
    np.testing.assert_array_equal(x, [[1, 2**60, 1.5, 1], [2, 3, 2.5, 2]])
    assert labels.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("", None, "Empty CSV file"),
        ("w,y\n", None, "at least 1 row below the header, got 0"),
        ("w,y\n1,2\n3\n", None, "Expected 2 columns, got 1"),
        ("y\n1\n", None, "at least 1 feature column, got 1 column"),
        ("w,w,y\n1,2,3\n", None, "got 'w' twice at column 1"),
        (",w,y\n0,1,2\n", None, "an empty name .* at column 0"),
        ("5.1,3.5,0\n4.9,3.0,1\n", None, "got 3 numbers"),  # no header
        ("w,h,y\n1,2,3\n", "z", "column named 'z', got the 3 columns 'w', 'h', 'y'"),
        ("w,h,y\n1,2,3\n1,oops,4\n", None, "feature column 'h', got 'oops' at row 1"),
        ("w,y\n2020-01-02,3\n", None, "feature column 'w', got datetime.date"),
        ("w,h,y\n1,2,3\n1,,4\n,,5\n", None, "column 'w', got 1 missing, the first at row 2"),
        ("w,h,y\n1,2,3\n1,NaN,4\n1,,5\n", None, "column 'h', got 2 missing, the first at row 1"),
        ("w,y\n,a\n,b\n", None, "column 'w', got 2 missing, the first at row 0"),
        ("w,y\n1,a\n2,\n", None, "column 'y', got 1 missing, the first at row 1"),
        ("w,y\n1,inf\n2,0\n", None, r"column 'y', got inf \(double\) at row 0"),
        ("w,y\n1,a\ninf,b\n", None, "column 'w', got inf at row 1"),
        ("w,y\n1,a\n1e39,b\n", None, r"column 'w', got 1e\+39 at row 1"),
        ("w,y\n1,0\n2,0.5\n", None, r"column 'y', got 0\.5 \(double\) at row 1"),
        ("w,y\n1,2020-01-02\n", None, r"column 'y', got 2020-01-02 \(date32"),
    ],
)
def test_read_table_error(tmp_path: Path, text: str, target: str | None, message: str) -> None:
    path = write_csv(tmp_path / "bad.csv", text)
    with pytest.raises(ValueError, match=rf"bad\.csv: .*{message}"):
        read_table(path, target)


def test_read_table_takes_a_quoted_missing_word_as_a_class(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", 'w,y\n1,"NA"\n2,SE\n')
    assert read_table(path)[1].tolist() == ["NA", "SE"]


def test_read_table_takes_numbered_columns(tmp_path: Path) -> None:
    x, labels = read_table(write_csv(tmp_path / "a.csv", "0,1,2\n5,6,7\n"))
    assert (x.tolist(), labels.tolist()) == ([[5.0, 6.0]], [7])


def test_read_table_names_the_missing_parquet_value(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
    table = pa.table({"a": [1.0, math.nan, None], "s": ["1_0", "2", "3"], "y": [0, 1, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'a', got 2 missing, the first at row 1"):
        read_table(tmp_path / "a.parquet")
    pq.write_table(table.select(["s", "y"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="feature column 's', got '1_0' at row 0"):
        read_table(tmp_path / "a.parquet")  # text, although Python would read each as a number


def test_read_table_refuses_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"junk" * 10)
    with pytest.raises(ValueError, match=r"a\.parquet: expected a \.parquet table"):
        read_table(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"got \.npy"):
        read_table(tmp_path / "a.npy")


# ------------------------------------------------------------------------------------ read_npz


def test_read_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", x=np.eye(3), y=[0, 1, 2], more=1)
    x, y = read_npz(tmp_path / "two.npz")
    np.testing.assert_array_equal(x, np.eye(3))
    np.testing.assert_array_equal(y, [0, 1, 2])
    four = {"y_test": [4], "x_test": [3], "y_train": [2], "x_train": [1]}
    np.savez_compressed(tmp_path / "four.npz", **four)  # type: ignore[arg-type]
    assert [a.tolist() for a in read_npz(tmp_path / "four.npz")] == [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.eye(2)}, "arrays named x, y or x_train, y_train, x_test, y_test, got x;"),
        ({}, "got none;"),
        ({"x": np.eye(2), "y": np.array([0, "a"], dtype=object)}, "holds Python objects"),
    ],
)
def test_read_npz_error(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        read_npz(tmp_path / "bad.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04junk", b"junk", b"\x93NUMPY\x01\x00"])
def test_corrupt_numpy_files(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad{suffix}: expected a {suffix} file"):
        read_features(path)


def test_read_npz_finds_a_flipped_bit(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.zeros((100, 10)), y=np.zeros(100, np.int64))
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[4000] ^= 1
    (tmp_path / "bad.npz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="CRC"):
        read_npz(tmp_path / "bad.npz")


def test_read_npz_finds_a_broken_compression(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bad.npz", x=np.arange(1000.0), y=np.zeros(1000, np.int64))
    data = (tmp_path / "bad.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(data[:60] + b"\xff" * 40 + data[100:])
    with pytest.raises(ValueError, match="Error -3 while decompressing"):
        read_npz(tmp_path / "bad.npz")


def test_npy_and_npz_mixed_up(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(2))
    (tmp_path / "a.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="of another kind"):
        read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=np.eye(2))
    (tmp_path / "c.npz").rename(tmp_path / "d.npy")
    with pytest.raises(ValueError, match="of another kind"):
        read_features(tmp_path / "d.npy")


# ----------------------------------------------------------------------------------- read_data


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_data_mnist_folder(tmp_path: Path, suffix: str) -> None:
    train, test = read_data(write_mnist(tmp_path / "m", suffix))
    assert test is not None
    assert train.x.dtype == np.float32
    np.testing.assert_array_equal(train.x, np.arange(18).reshape(3, 6))  # unscaled, flat
    np.testing.assert_array_equal(test.x, np.arange(200, 212).reshape(2, 6))
    assert train.classes == test.classes == (0, 4, 9)
    assert (train.t.tolist(), test.t.tolist()) == ([0, 2, 1], [0, 2])


def test_read_data_pairs(tmp_path: Path) -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (tmp_path / "images.idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "labels").write_bytes(gzip.compress(idx_bytes(np.array([5, 3], np.uint8))))
    np.save(tmp_path / "x.npy", images.astype(np.float64))
    np.save(tmp_path / "y.npy", np.array(["b", "a"]))
    for x, y, classes in [
        ("images.idx3-ubyte", "labels", (3, 5)),
        ("x.npy", "y.npy", ("a", "b")),
        ("x.npy", "labels", (3, 5)),
    ]:
        train, test = read_data(tmp_path / x, tmp_path / y)
        assert test is None
        assert train.x.dtype == np.float32
        np.testing.assert_array_equal(train.x, images.reshape(2, 6))
        assert (train.t.tolist(), train.classes) == ([1, 0], classes)


def test_read_data_maps_a_float32_npy_from_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(3, dtype=np.float32))
    np.save(tmp_path / "y.npy", np.arange(3))
    base: Any = read_data(tmp_path / "x.npy", tmp_path / "y.npy")[0].x
    while not isinstance(base, np.memmap) and base is not None:
        base = base.base
    assert isinstance(base, np.memmap)
    assert Path(str(base.filename)) == tmp_path / "x.npy"
    assert base.base is not None  # a copy of a memmap has the type, but no file under it


def test_read_data_table_and_npz(tmp_path: Path) -> None:
    train, test = read_data(write_csv(tmp_path / "a.CSV", "y,w\nb,1\na,2\n"), target="y")
    assert (train.x.tolist(), train.t.tolist(), train.classes) == ([[1], [2]], [1, 0], ("a", "b"))
    assert test is None
    arrays = {"x_train": np.eye(2), "y_train": [4, 5], "x_test": np.eye(2)[:1], "y_test": [5]}
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    train, test = read_data(str(tmp_path / "a.npz"))
    assert test is not None
    assert test.classes == (4, 5)
    assert test.t.tolist() == [1]  # by the classes of train, not its own


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": [6]}, r"\(test\): expected a label among the 2 classes 4, 5, got 6"),
        ({"x_test": np.eye(3)[:1]}, r"\(test\): expected 2 features, got 3"),
        ({"y_train": [4, 5, 4]}, r"expected 2 labels of shape \(2,\), got shape \(3,\)"),
        ({"x_train": np.array([[0, np.nan], [0, 0]])}, "got 1 NaN .* row 0, column 1"),
        ({"x_train": np.array([[0, 0], [1e39, 0]])}, "got 1 NaN or infinite.* row 1, column 0"),
        ({"x_train": np.zeros(2)}, r"got shape \(2,\)"),
        ({"x_train": np.zeros((0, 2)), "y_train": np.zeros(0, int)}, r"got shape \(0"),
    ],
)
def test_read_data_checks_the_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x_train": np.eye(2),
        "y_train": [4, 5],
        "x_test": np.eye(2)[:1],
        "y_test": [5],
    }
    np.savez(tmp_path / "a.npz", **(good | arrays))
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "a.npz")


def test_read_data_refuses_flags_it_would_ignore(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "a.csv", "w,y\n1,2\n")
    np.save(tmp_path / "x.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"expected no second file of labels with format \.csv"):
        read_data(csv, labels=csv)
    with pytest.raises(ValueError, match=r"expected a second file of labels with format \.npy"):
        read_data(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"target='y', got \.npy"):
        read_data(tmp_path / "x.npy", tmp_path / "x.npy", target="y")
    with pytest.raises(ValueError, match=r"target='y', got \.npy"):
        read_features(tmp_path / "x.npy", target="y")


def test_read_data_unknown_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv: expected a file or folder"):
        read_data(tmp_path / "none.csv")
    np.save(tmp_path / "x.npy", np.eye(2))
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        read_data(tmp_path / "x.npy", tmp_path / "none.npy")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"\.npz, \.csv, .* got suffix '\.xlsx'"):
        read_data(tmp_path / "a.xlsx")
    with pytest.raises(FileNotFoundError, match="got no train-images-idx3-ubyte"):
        read_data(tmp_path)


# ------------------------------------------------------------------------------- read_features


def test_read_features_arrays(tmp_path: Path) -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (tmp_path / "images").write_bytes(idx_bytes(images))
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", x=images)
    for name in ("images", "x.npy", "x.npz"):
        x = read_features(tmp_path / name, n_features=6)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, images.reshape(2, 6))
        with pytest.raises(ValueError, match="expected 7 features, got 6"):
            read_features(tmp_path / name, n_features=7)
    with pytest.raises(ValueError, match="got a folder"):
        read_features(tmp_path)


@pytest.mark.parametrize(
    ("target", "n_features", "expected"),
    [
        (None, None, [[1, 2, 3]]),
        (None, 3, [[1, 2, 3]]),
        (None, 2, [[1, 2]]),
        ("b", None, [[1, 3]]),
        ("b", 2, [[1, 3]]),
    ],
)
def test_read_features_leaves_the_label_out(
    tmp_path: Path, target: str | None, n_features: int | None, expected: list[list[int]]
) -> None:
    path = write_csv(tmp_path / "a.csv", "a,b,c\n1,2,3\n")
    assert read_features(path, target, n_features).tolist() == expected


def test_read_features_does_not_look_at_the_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "a,y\n1,\n2,oops\n")
    assert read_features(path, n_features=1).tolist() == [[1], [2]]
    with pytest.raises(ValueError, match="column 'y'"):
        read_features(path)
    with pytest.raises(ValueError, match="column named 'z'"):
        read_features(path, target="z")
    with pytest.raises(ValueError, match="expected 5 features, got 1"):
        read_features(path, target="y", n_features=5)


# ------------------------------------------------------------------------------------ built in


def test_load_digits_is_the_uci_test_set() -> None:
    train, test = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.x.shape == (1438, 64)
    assert train.x.dtype == np.float32
    assert (train.x.min(), train.x.max()) == (0, 16)
    assert train.classes == test.classes == tuple(range(10))
    counts = np.bincount(np.concatenate([train.t, test.t]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert set(np.bincount(test.t).tolist()) <= {34, 35, 36, 37}
    folder = Path(nnx.data.__file__).parent
    readme = (folder / "DIGITS.md").read_text(encoding="utf-8")
    with np.load(folder / "digits.npz") as npz:
        for name in ("images", "labels"):
            assert npz[name].dtype == np.uint8
            assert f"{name}  {hashlib.sha256(npz[name].tobytes()).hexdigest()}" in readme


def test_load_digits_splits_by_seed_and_fraction() -> None:
    first, again, other = (load_digits(seed=s, test_fraction=0.5)[1] for s in (0, 0, 1))
    assert len(first) == 898
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


@pytest.mark.parametrize("use_argument", [True, False])
def test_load_mnist_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_argument: bool
) -> None:
    folder = write_mnist(tmp_path / "m", ".gz")
    monkeypatch.setenv("NNX_DATA", str(tmp_path / "none" if use_argument else folder))
    train, test = load_mnist(folder if use_argument else None)
    assert (train.name, test.n_classes) == ("mnist", 10)  # ten classes, whichever occur
    assert train.t.tolist() == [0, 9, 4]


def test_load_mnist_folder_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"none: expected the four files.*no such folder"):
        load_mnist()
    folder = write_mnist(tmp_path / "m")
    (folder / MNIST_NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError, match="got no t10k-labels-idx1-ubyte") as caught:
        load_mnist(folder)
    assert all(name in str(caught.value) for name in MNIST_NAMES)


def test_load_mnist_checks_counts_and_labels(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "m", labels=(0, 10, 4))
    with pytest.raises(ValueError, match=r"mnist: .* got 10 at index 1"):
        load_mnist(folder)
    write_mnist(folder, labels=(0, 1))
    with pytest.raises(ValueError, match=r"expected 3 labels of shape \(3,\), got shape \(2,\)"):
        load_mnist(folder)


def test_load_mnist_downloads_with_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pooch; the second mirror is a folder, its files are checked and then cached."""
    pooch = pytest.importorskip("pooch")
    source = write_mnist(tmp_path / "source", ".gz")
    hashes = [
        hashlib.sha256((source / f"{name}.gz").read_bytes()).hexdigest() for name in MNIST_NAMES
    ]
    retrieve = pooch.retrieve
    asked: list[str] = []

    def copy(url: str, output_file: str, _pooch: Any) -> None:
        asked.append(url)
        if not url.startswith("mirror:"):
            raise ConnectionError("no route")
        Path(output_file).write_bytes((source / url.removeprefix("mirror:")).read_bytes())

    def fake(url: str, known_hash: str, **options: Any) -> str:
        path: str = retrieve(url, known_hash, downloader=copy, **options)
        return path

    monkeypatch.delenv("NNX_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", fake)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(builtin_sets, "MNIST_MIRRORS", ("http://down/", "mirror:"))
    monkeypatch.setattr(builtin_sets, "MNIST_SHA256", (*hashes[:3], "0" * 64))
    with pytest.raises(OSError, match=r"t10k-labels-idx1-ubyte\.gz.*set NNX_DATA") as caught:
        load_mnist()
    assert hashes[3] in str(caught.value)  # the checksum that was wrong
    monkeypatch.setattr(builtin_sets, "MNIST_SHA256", tuple(hashes))
    asked.clear()
    train, test = load_mnist()
    assert (len(train), len(test)) == (3, 2)
    assert asked == [f"{mirror}{MNIST_NAMES[3]}.gz" for mirror in ("http://down/", "mirror:")]
    asked.clear()
    load_mnist()
    assert not asked  # all four from the cache


def test_load_mnist_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setenv("NNX_DATA", "")  # empty counts as unset
    monkeypatch.setattr(pooch, "retrieve", refuse)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    with pytest.raises(OSError, match=r"no route to host; set NNX_DATA"):
        load_mnist()


@pytest.mark.skipif(not os.environ.get("NNX_DATA"), reason="NNX_DATA names no folder with MNIST")
def test_load_mnist_real_files() -> None:
    train, test = load("mnist")
    assert (train.x.shape, test.x.shape) == ((60_000, 784), (10_000, 784))
    assert np.bincount(test.t).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.t[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(train.x.mean(dtype=np.float64)) == pytest.approx(33.318421, abs=1e-6)


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic_gate(name: str) -> None:
    gate = logic_gate(name)
    assert gate.x.dtype == np.float32
    rule: Callable[[bool, bool], bool] = {
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "xor": lambda a, b: a != b,
    }[name]
    assert {tuple(row) for row in gate.x.tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert gate.t.tolist() == [int(rule(bool(a), bool(b))) for a, b in gate.x.tolist()]


def test_logic_gate_unknown() -> None:
    with pytest.raises(ValueError, match="got 'nand'"):
        logic_gate("nand")


def test_load_by_name_and_path(tmp_path: Path) -> None:
    assert len(load("digits", test_fraction=0.5)[1]) == 898
    train, test = load(write_mnist(tmp_path / "m"))
    assert (len(train), len(test)) == (3, 2)  # its own test set
    rows = "".join(f"{i},{i % 2}\n" for i in range(10))
    train, test = load(write_csv(tmp_path / "a.csv", f"w,y\n{rows}"), test_fraction=0.4, seed=1)
    assert (len(train), np.bincount(test.t).tolist()) == (6, [2, 2])
    with pytest.raises(ValueError, match="unknown data set 'foo': expected 'digits', 'mnist' or"):
        load("foo")
    with pytest.raises(ValueError, match="target=y"):
        load("digits", target="y")


# ---------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("package", ["pyarrow", "pooch"])
def test_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.delenv("NNX_DATA", raising=False)
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    path = write_csv(tmp_path / "a.csv", "w,y\n1,2\n")
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'nnx-xp\[data\]'"):
        read_table(path) if package == "pyarrow" else load_mnist()


def test_import_is_light() -> None:
    code = "import sys, nnx.data; nnx.data.load_digits(); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"pyarrow", "pooch", "cupy", "pandas", "sklearn", "matplotlib", "torch"}


def test_names_are_sorted_and_exist() -> None:
    assert nnx.data.__all__ == sorted(nnx.data.__all__)
    assert all(hasattr(nnx.data, name) and not hasattr(builtins, name) for name in nnx.data.__all__)
