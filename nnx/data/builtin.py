"""Built-in data sets: the bundled digits, MNIST, and logic gates. Imports only NumPy.

pooch is imported when MNIST has to be downloaded.
"""

import os
from pathlib import Path

import numpy as np

from nnx.data.arrays import Dataset
from nnx.data.readers import (
    MNIST_FILES,
    SUPPORTED,
    PathLike,
    make_datasets,
    read_data,
    read_mnist_folder,
    require,
)

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Of the .gz files as first published, in the order of MNIST_FILES.
MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_GATES = {"and": (0, 0, 0, 1), "or": (0, 1, 1, 1), "xor": (0, 1, 1, 0)}


def load(
    name_or_path: PathLike,
    *,
    labels: PathLike | None = None,
    target: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Load (train, test) by name or from a path.

    Args:
        name_or_path: "digits", "mnist" or a path that `read_data` takes.
        labels: The file of labels, see `read_data`.
        target: The label column, see `read_data`.
        test_fraction: Share of the samples to test on, where the data have no test set.
        seed: Chooses those samples.

    Raises:
        ValueError: if the name is unknown or the data can't be used.
    """
    name = os.fspath(name_or_path)
    if name in ("digits", "mnist"):
        if labels is not None or target is not None:
            raise ValueError(
                f"load: expected neither labels nor target with {name!r}, got labels={labels}, "
                f"target={target}; leave them out"
            )
        if name == "mnist":
            return load_mnist()
        return load_digits(test_fraction=test_fraction, seed=seed)
    if not Path(name).exists():
        raise ValueError(
            f"load: unknown data set {name!r}: expected 'digits', 'mnist' or the path of "
            f"{SUPPORTED}; check the name"
        )
    train, test = read_data(name, labels, target)
    return (train, test) if test is not None else train.split(test_fraction, seed)


def load_digits(*, test_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Load the 1,797 bundled 8 x 8 digits as (train, test), values 0..16; see DIGITS.md."""
    from importlib import resources

    with (
        resources.files("nnx.data").joinpath("digits.npz").open("rb") as file,
        np.load(file) as npz,
    ):
        digits, _ = make_datasets("digits", npz["images"], npz["labels"], classes=range(10))
    return digits.split(test_fraction, seed)


def load_mnist(folder: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """Load MNIST as (train, test), 60,000 and 10,000 images of 784 values 0..255.

    Args:
        folder: Holds the four IDX files, plain or .gz. Default: the folder named by the
            environment variable NNX_DATA, else a checksummed download, kept in pooch's cache.

    Raises:
        FileNotFoundError: if a file is missing; OSError if the download fails; ImportError
            without pooch.
    """
    folder = folder or os.environ.get("NNX_DATA") or _download_mnist()
    return read_mnist_folder(Path(folder), "mnist", tuple(range(10)))


def logic_gate(name: str) -> Dataset:
    """Return the four rows of the truth table of "and", "or" or "xor", in float32."""
    if name not in _GATES:
        raise ValueError(f"logic_gate: expected 'and', 'or' or 'xor', got {name!r}; choose one")
    x = np.array([(0, 0), (0, 1), (1, 0), (1, 1)], np.float32)
    return Dataset(x, np.array(_GATES[name]), (0, 1), name)


def _download_mnist() -> Path:
    """Return the folder that holds the four files, each with the right checksum."""
    pooch = require("pooch", "load_mnist")
    folder = Path(pooch.os_cache("nnx")) / "mnist"
    for name, sha256 in zip(MNIST_FILES, MNIST_SHA256, strict=True):
        errors: list[Exception] = []
        for mirror in MNIST_MIRRORS:
            try:
                pooch.retrieve(
                    f"{mirror}{name}.gz", f"sha256:{sha256}", fname=f"{name}.gz", path=folder
                )
                break
            except (OSError, ValueError) as error:  # no network; a wrong checksum
                errors.append(error)
        else:
            raise OSError(
                f"load_mnist: expected {name}.gz from {' or '.join(MNIST_MIRRORS)}, got "
                f"{errors[-1]}; set NNX_DATA to a folder that holds the four MNIST files"
            ) from errors[-1]
    return folder
