"""Data sets for classification: checked host arrays, file readers, and sets that are built in.

Everything here works on the host with NumPy alone; pooch (downloads) and pyarrow (CSV, Parquet)
are imported when first used: ``pip install 'nnx-xp[data]'``.
"""

from nnx.data.arrays import (
    Dataset,
    Standardizer,
    check_features,
    check_labels,
    encode_labels,
    stratified_split,
)
from nnx.data.builtin import load, load_digits, load_mnist, logic_gate
from nnx.data.readers import column_names, read_data, read_features, read_idx, read_npz, read_table

__all__ = [
    "Dataset",
    "Standardizer",
    "check_features",
    "check_labels",
    "column_names",
    "encode_labels",
    "load",
    "load_digits",
    "load_mnist",
    "logic_gate",
    "read_data",
    "read_features",
    "read_idx",
    "read_npz",
    "read_table",
    "stratified_split",
]
