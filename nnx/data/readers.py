"""Readers: IDX, CSV, Parquet, npz and npy files become checked data sets.

A file that is not what it should be is a ValueError that names it; nothing is ever unpickled.
Imports only NumPy and the standard library; pyarrow is imported by the first CSV or Parquet file.
"""

import importlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nnx.data.arrays import Array, Classes, Dataset, Features, check_features, encode_labels

PathLike = str | os.PathLike[str]

# The order is that of (x, y, x_test, y_test).
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SUPPORTED = (
    "a folder with the four MNIST files, IDX (also .gz), .npy, .npz, .csv, .tsv (also .gz) "
    "or .parquet"
)
_GZIP = b"\x1f\x8b"
_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_TABLES = (".csv", ".tsv", ".parquet")


def read_idx(path: PathLike) -> Array:
    """Read an IDX file, the format of MNIST: two zero bytes, dtype, ndim, sizes, data.

    Args:
        path: The file; gzip is recognized by its first bytes, whatever the name.

    Returns:
        A writable array in native byte order, of one of the six IDX dtypes.

    Raises:
        ValueError: if the file is not IDX, or shorter or longer than its header says.
    """
    data = Path(path).read_bytes()
    if data.startswith(_GZIP):
        import gzip
        import zlib

        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: expected a gzip file, got a corrupt one ({error}); fetch it again"
            ) from error
    if len(data) < 4:
        raise ValueError(
            f"{path}: expected an IDX header of at least 4 bytes, got {len(data)}; fetch it again"
        )
    code, n_axes = data[2], data[3]
    if data[:2] != b"\0\0" or code not in _IDX_DTYPES or not 1 <= n_axes <= 64:
        raise ValueError(
            f"{path}: expected an IDX magic number such as 0x00000803, got 0x{data[:4].hex()}; "
            f"is this an IDX file?"
        )
    start = 4 + 4 * n_axes
    if len(data) < start:
        raise ValueError(
            f"{path}: expected an IDX header of {start} bytes, got {len(data)}; fetch it again"
        )
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    dtype = np.dtype(_IDX_DTYPES[code])
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes of data for shape {shape}, got "
            f"{len(data) - start}; fetch it again"
        )
    try:
        return np.ndarray(shape, dtype, data, start).astype(dtype.newbyteorder("="))
    except ValueError as error:  # one size is 0 and the others are too large for any array
        raise ValueError(
            f"{path}: expected sizes that NumPy can hold, got {shape}; is this an IDX file?"
        ) from error


def read_table(path: PathLike, target: str | None = None) -> tuple[Features, Array]:
    """Read a CSV, TSV or Parquet file with one row per sample and named columns.

    A field that is empty, ``NA``, ``NaN`` or ``null`` is missing, which is an error; a class that
    is really called so is written in quotes.

    Args:
        path: The file; .csv and .tsv may be compressed (.gz).
        target: Name of the label column; default the last one.

    Returns:
        (x, labels): float32 features of all other columns; integer or string labels.

    Raises:
        ValueError: if a column is unknown, named twice, not numeric or has missing values;
            ImportError without pyarrow.
    """
    table = _open_table(path)
    names = table.column_names
    target = names[-1] if target is None else _known(path, names, target)
    if len(names) < 2:
        raise ValueError(
            f"{path}: expected a label column and at least 1 feature column, got {len(names)} "
            f"column; check the separator"
        )
    x = _numeric_columns(path, table, [name for name in names if name != target])
    return x, _label_column(path, target, table.column(target))


def read_npz(path: PathLike) -> tuple[Array, ...]:
    """Read (x, y) or (x_train, y_train, x_test, y_test), whichever names the archive holds.

    Raises:
        ValueError: if the file is not an npz archive, lacks the names or holds Python objects.
    """
    return _npz_arrays(_existing(path), ("x", "y"), ("x_train", "y_train", "x_test", "y_test"))


def read_data(
    path: PathLike, labels: PathLike | None = None, target: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """Read (train, test) from a folder or file; test is None where there is only one set.

    Features are flattened to (n_samples, n_features) and become float32, otherwise unchanged. The
    classes are those of the training labels; an unseen one in the test labels is an error.

    Args:
        path: A folder with the four MNIST files, or an IDX, .npy, .npz, .csv, .tsv or .parquet
            file.
        labels: The file of labels that an .npy or IDX file needs, itself .npy or IDX.
        target: The label column of a table; default the last one.

    Raises:
        FileNotFoundError: if a file is missing; ValueError if it can't be used.
    """
    path = _existing(path)
    kind = _kind(path)
    _check_target(path, kind, target)
    separate = kind in (".npy", "IDX")
    if separate != (labels is not None):
        raise ValueError(
            f"{path}: expected {'a' if separate else 'no'} second file of labels with format "
            f"{kind}, got labels={labels}; .npy and IDX need one, no other format does"
        )
    if kind == "folder":
        return read_mnist_folder(path, path.name)
    if labels is not None:
        return make_datasets(path.name, _read_array(path), _read_array(_existing(labels)))
    if kind == ".npz":
        return make_datasets(path.name, *read_npz(path))
    return make_datasets(path.name, *read_table(path, target))


def read_features(
    path: PathLike, target: str | None = None, n_features: int | None = None
) -> Features:
    """Read features without labels, as prediction needs them: (n_samples, n_features) float32.

    Args:
        path: An IDX, .npy, .npz (array x), .csv, .tsv or .parquet file.
        target: The label column of a table, which is left out. Without it the last column is
            left out where the table has exactly one column more than n_features.
        n_features: Required number of features.

    Raises:
        FileNotFoundError: if the file is missing; ValueError if it can't be used.
    """
    path = _existing(path)
    kind = _kind(path)
    _check_target(path, kind, target)
    if kind == "folder":
        raise ValueError(f"{path}: expected a file of features, got a folder; name one file")
    if kind in _TABLES:
        table = _open_table(path)
        names = table.column_names
        if target is not None:
            _known(path, names, target)
        elif n_features is not None and len(names) == n_features + 1:
            target = names[-1]
        x: Array = _numeric_columns(path, table, [name for name in names if name != target])
    else:
        x = _npz_arrays(path, ("x",))[0] if kind == ".npz" else _read_array(path)
    return _flat(x, n_features, str(path))


def read_mnist_folder(
    folder: Path, name: str, classes: Classes | None = None
) -> tuple[Dataset, Dataset]:
    """Read the four MNIST files, plain or .gz, from a folder, as (train, test)."""
    files = []
    for part in MNIST_FILES:
        found = [file for file in (folder / part, folder / f"{part}.gz") if file.is_file()]
        if not found:
            got = f"no {part}" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{folder}: expected the four files {', '.join(MNIST_FILES)} (plain or .gz), got "
                f"{got}; name the folder that holds them"
            )
        files.append(found[0])
    train, test = make_datasets(name, *map(read_idx, files), classes=classes)
    assert test is not None  # four arrays went in
    return train, test


def make_datasets(
    name: str,
    x: Array,
    y: Array,
    x_test: Array | None = None,
    y_test: Array | None = None,
    *,
    classes: Iterable[int | str] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Return (train, test) from raw arrays; test has the features and classes of train."""
    t, known = encode_labels(y, classes, who=name)
    train = Dataset(_flat(x, None, name), t, known, name)
    if x_test is None or y_test is None:
        return train, None
    who = f"{name} (test)"
    t_test, _ = encode_labels(y_test, known, who=who)
    return train, Dataset(_flat(x_test, train.x.shape[1], who), t_test, known, who)


def require(module: str, who: str) -> ModuleType:
    """Import an optional module, or raise an ImportError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{who}: expected {package} to be installed, got {error}; pip install 'nnx-xp[data]'"
        ) from error


def _flat(x: Array, n_features: int | None, who: str) -> Features:
    x = check_features(x, who=who)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is reported
        x = x.reshape(len(x), -1).astype(np.float32, copy=False)
    return check_features(x, n_features=n_features, who=who)


def _existing(path: PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a file or folder, got nothing there; check the path"
        )
    return path


def _kind(path: Path) -> str:
    """Return "folder", "IDX" or the suffix that says how to read the file."""
    if path.is_dir():
        return "folder"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (*_TABLES, ".npy", ".npz"):
        return suffix
    with path.open("rb") as file:
        if file.read(2) in (_GZIP, b"\0\0"):
            return "IDX"
    raise ValueError(
        f"{path}: expected {SUPPORTED}, got suffix {path.suffix!r}; convert it to one of these"
    )


def _check_target(path: Path, kind: str, target: str | None) -> None:
    if target is not None and kind not in _TABLES:
        raise ValueError(
            f"{path}: expected {', '.join(_TABLES)} to go with target={target!r}, got {kind}; "
            f"leave target out"
        )


def _read_array(path: Path) -> Array:
    if _kind(path) == "IDX":
        return read_idx(path)
    try:  # a float32 file is used where it lies on disk
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise _bad_numpy(path, error) from error


def _npz_arrays(path: Path, *choices: tuple[str, ...]) -> tuple[Array, ...]:
    """Return the arrays of the first choice of names that the archive holds in full."""
    import zipfile
    import zlib

    # TypeError: numpy.load returned one array, which is no context manager.
    not_numpy = (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            present = set(archive.files)
            for names in choices:
                if present.issuperset(names):
                    return tuple(archive[name] for name in names)
    except not_numpy as error:
        raise _bad_numpy(path, error) from error
    wanted = " or ".join(", ".join(names) for names in choices)
    raise ValueError(
        f"{path}: expected arrays named {wanted}, got {', '.join(sorted(present)) or 'none'}; "
        f"write them with numpy.savez(path, x=x, y=y)"
    )


def _bad_numpy(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: expected a {path.suffix} file of plain arrays, got one that is corrupt, "
        f"of another kind or holds Python objects ({error}); "
        f"write it with numpy.save or numpy.savez"
    )


def column_names(path: PathLike) -> list[str]:
    """Names of a table's columns, the label among them; `path` as in `read_table`."""
    return list(_open_table(path).column_names)


def _open_table(path: PathLike) -> Any:
    """Read a pyarrow.Table whose columns all have a name of their own."""
    kind = _kind(_existing(path))
    if kind not in _TABLES:
        raise ValueError(f"{path}: expected .csv, .tsv or .parquet, got {kind}; use read_data")
    pyarrow = require("pyarrow", "read_table")
    try:
        if kind == ".parquet":
            parquet = require("pyarrow.parquet", "read_table")
            table = parquet.read_table(path, partitioning=None)
            # pandas writes its index as a last column, which is not the label.
            index = re.compile(r"__index_level_\d+__")
            table = table.select([n for n in table.column_names if not index.fullmatch(n)])
        else:
            csv = require("pyarrow.csv", "read_table")
            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ","),
                convert_options=csv.ConvertOptions(
                    strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
        names = table.column_names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a {kind} table, got one that can't be read ({error}); check the file"
        ) from error
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not name or name in seen:
            got = f"{name!r} twice" if name else "an empty name (a pandas index?)"
            raise ValueError(
                f"{path}: expected a header with a different name for each column, got {got} at "
                f"column {position}; name the columns in the first line"
            )
        seen.add(name)
    if all(map(_is_number, names)) and names != [str(i) for i in range(len(names))]:
        raise ValueError(
            f"{path}: expected column names in the first line, got {len(names)} numbers; "
            f"put a header line first"
        )
    if not len(table):
        raise ValueError(
            f"{path}: expected at least 1 row below the header, got 0; give a file with samples"
        )
    return table


def _known(path: PathLike, names: list[str], target: str) -> str:
    if target not in names:
        shown = ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
        raise ValueError(
            f"{path}: expected a column named {target!r}, got the {len(names)} columns {shown}; "
            f"choose the label column with target"
        )
    return target


def _complete(path: PathLike, name: str, column: Any) -> Any:
    """Return the column, decoded if it is a dictionary, after a check that no value is missing."""
    types = require("pyarrow.types", "read_table")
    missing = column.is_null(nan_is_null=True).to_numpy()
    if missing.any():
        raise ValueError(
            f"{path}: expected a value in every row of column {name!r}, got {missing.sum()} "
            f"missing, the first at row {missing.argmax()}; fill or drop them"
        )
    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column


def _numeric_columns(path: PathLike, table: Any, names: list[str]) -> Features:
    pyarrow = require("pyarrow", "read_table")
    types = pyarrow.types
    x = np.empty((len(table), len(names)), np.float32)
    for index, name in enumerate(names):
        column = _complete(path, name, table.column(name))
        is_numeric = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean)
        if not any(test(column.type) for test in is_numeric):
            values = column.to_pylist()
            row = next((i for i, value in enumerate(values) if not _is_number(value)), 0)
            raise ValueError(
                f"{path}: expected numbers in feature column {name!r}, got {values[row]!r} "
                f"at row {row}; encode the column as numbers or choose the label column with target"
            )
        with np.errstate(over="ignore"):  # overflow becomes inf, reported below
            x[:, index] = column.cast(pyarrow.float64(), safe=False).to_numpy()
        finite = np.isfinite(x[:, index])
        if not finite.all():
            row = int(finite.argmin())
            raise ValueError(
                f"{path}: expected finite float32 values in column {name!r}, got "
                f"{column[row].as_py()} at row {row}; rescale, fill or drop it"
            )
    return x


def _label_column(path: PathLike, name: str, column: Any) -> Array:
    types = require("pyarrow.types", "read_table")
    column = _complete(path, name, column)
    labels: Array = column.to_numpy()
    if types.is_string(column.type) or types.is_large_string(column.type):
        return labels.astype(str)
    if types.is_boolean(column.type):
        return labels.astype(np.int64)
    if types.is_integer(column.type):
        return labels
    good = np.zeros(len(labels), dtype=bool)
    if types.is_floating(column.type):
        good = (labels == np.floor(labels)) & (np.abs(labels) < 2**53)
    if not good.all():
        row = int(good.argmin())
        raise ValueError(
            f"{path}: expected integer or string labels in column {name!r}, got "
            f"{column[row].as_py()} ({column.type}) at row {row}; "
            f"choose the label column with target"
        )
    return labels.astype(np.int64)


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True
