"""The command `nnx`: train, evaluate, predict, check, bench, info.

Whatever a command reads or checks runs inside `_input_errors`, which turns the library's errors
into one line and exit status 2. Nothing else is caught: a mistake of ours ends in a traceback.
tqdm, matplotlib, pyarrow and CuPy are imported by the commands that use them, when they do.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

import nnx
from nnx.backends import (
    Backend,
    BackendUnavailable,
    OutOfMemory,
    available,
    get_backend,
    numpy_backend,
    resolve,
)
from nnx.backends.cublas import tf32
from nnx.data import Dataset, Standardizer, check_features, encode_labels, read_data, read_features
from nnx.models import ACTIVATIONS

_BUILT_IN = ("digits", "mnist")
_TABLES = (".csv", ".tsv", ".parquet")
_LARGE = 10_000
"""Number of training samples from which on the defaults are fewer epochs and larger batches."""


class CliError(Exception):
    """Ends the command with one line on the standard error.

    Args:
        message: What was expected, what was found and what to do.
        status: The exit status.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process; returns the exit status.

    0: done. 1: training or a check failed. 2: bad usage or bad input. 130: interrupted.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us: nobody reads it
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115 - to the end
    try:
        args = _parser().parse_args(argv)
        try:
            args.call(args)
            print(end="", flush=True)
        except BrokenPipeError:
            raise
        except (CliError, OSError, OutOfMemory, KeyboardInterrupt) as error:
            return _report(args, error)
    except SystemExit as stop:  # argparse has said everything
        return int(stop.code or 0)
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # before there was a command, or while one was ending
        print("nnx: interrupted", file=sys.stderr)
        return 130
    return 0


def _report(
    args: argparse.Namespace, error: CliError | OSError | OutOfMemory | KeyboardInterrupt
) -> int:
    """Say on the standard error why the command ended; returns the exit status."""
    if args.debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        error = CliError("interrupted", 130)
    elif not isinstance(error, CliError):  # no input error: the disk or the device is full
        error = CliError(str(error), 1)
    _warn(args, f"{'' if error.status == 130 else 'error: '}{error}")
    return error.status


def _warn(args: argparse.Namespace, message: str) -> None:
    print(f"nnx {args.command}: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Name the errors that bad input raises what they are. Only for code that reads and checks."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the checks report what comes of it
            yield
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailable) as error:
        raise CliError(str(error)) from error


# ---- settings ------------------------------------------------------------------------------------


def _flag(group: str, default: Any, text: str, kind: type = str, **options: Any) -> Any:
    """A field of `Settings`: a default, and what the parsers of flags and files must know."""
    return field(default=default, metadata={"group": group, "help": text, "kind": kind, **options})


@dataclass(frozen=True)
class Settings:
    """What `nnx train` can be told: each field is a flag, and a key of the file `--config`."""

    data: str = _flag(
        "data",
        "digits",
        "digits, mnist (in the folder NNX_DATA, else downloaded), or the path of a CSV, TSV, "
        "Parquet, .npz, .npy or IDX file or of a folder with the four MNIST files",
        metavar="NAME|PATH",
    )
    labels: str | None = _flag(
        "data", None, "file of labels that belongs to an .npy or IDX file", metavar="PATH"
    )
    target: str | None = _flag(
        "data", None, "label column of a table (default: the last)", metavar="NAME"
    )
    test_fraction: float = _flag(
        "data",
        0.2,
        "share of the samples kept for testing where the data have no test set of their own; "
        "they are measured after each epoch, nothing is chosen by them",
        float,
        metavar="F",
    )
    hidden: tuple[int, ...] = _flag(
        "model", (256,), "widths of the hidden layers; 0 for none", int, metavar="N", many=True
    )
    activation: str = _flag(
        "model",
        "relu",
        f"of the hidden layers: {', '.join(ACTIVATIONS)}",
        choices=tuple(ACTIVATIONS),
        metavar="NAME",
    )
    dropout: float = _flag("model", 0.2, "share of hidden units to drop", float, metavar="P")
    optimizer: str = _flag("training", "adam", "how to descend", choices=("adam", "sgd"))
    lr: float | None = _flag(
        "training",
        None,
        "learning rate (default: 0.001 for adam, 0.05 for sgd)",
        float,
        metavar="F",
    )
    momentum: float = _flag("training", 0.0, "of sgd, below 1", float, metavar="F")
    nesterov: bool = _flag("training", False, "Nesterov's variant of momentum", bool)
    weight_decay: float = _flag("training", 0.0, "L2 penalty", float, metavar="F")
    epochs: int | None = _flag(
        "training",
        None,
        f"times through the training set (default: 30, or 10 from {_LARGE:,} samples on)",
        int,
        metavar="N",
    )
    batch_size: int | None = _flag(
        "training",
        None,
        f"samples in a step (default: 32, or 64 from {_LARGE:,} samples on)",
        int,
        metavar="N",
    )
    seed: int = _flag("training", 0, "fixes split, weights, order and dropout", int, metavar="N")
    dtype: str = _flag("training", "float32", "of parameters", choices=("float32", "float64"))
    backend: str | None = _flag(
        "training",
        None,
        "numpy, cupy, cupy:N (N is the device) or auto (default: NNX_BACKEND, else numpy)",
        metavar="NAME",
    )
    graph: bool = _flag(
        "training", False, "replay each step: a CUDA graph, or C kernels alone", bool
    )
    out: str = _flag("output", "runs", "folder of the runs", metavar="DIR")
    name: str | None = _flag(
        "output", None, "folder of this run in it (default: the data's name and the next number)"
    )
    overwrite: bool = _flag("output", False, "replace a run of the same name", bool)
    quiet: bool = _flag("output", False, "no progress bar, and only the line with the result", bool)

    def __post_init__(self) -> None:
        hidden = () if tuple(self.hidden) == (0,) else tuple(self.hidden)
        object.__setattr__(self, "hidden", hidden)
        for name, low in (("epochs", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{_spelled(name)}: expected at least {low}, got {value}")
        if min(hidden, default=1) < 1:
            raise ValueError(
                f"--hidden: expected widths of at least 1, or a single 0, got {hidden}"
            )
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError("--momentum and --nesterov: expected --optimizer sgd with them")
        run = self.name
        if run is not None and (run in ("", "..") or run != Path(run).name):
            raise ValueError(f"--name: expected the name of a folder, got {run!r}; see --out")

    @property
    def images(self) -> bool:
        """Whether the features are alike, as pixels are: one mean and scale serves them all."""
        idx = self.labels is not None and _suffix(self.data) != ".npy"
        return self.data in _BUILT_IN or idx or Path(self.data).is_dir()

    def completed(self, n_samples: int, names: list[str] | None, backend: Backend) -> Settings:
        """These settings with nothing left open, so that they repeat the run from anywhere."""
        large = n_samples >= _LARGE
        return replace(
            self,
            data=_absolute(self.data),
            labels=self.labels and _absolute(self.labels),
            target=self.target or (names[-1] if names else None),
            lr=(0.001 if self.optimizer == "adam" else 0.05) if self.lr is None else self.lr,
            epochs=(10 if large else 30) if self.epochs is None else self.epochs,
            batch_size=(64 if large else 32) if self.batch_size is None else self.batch_size,
            backend=backend.name,
        )


_OPTIONS = {f.name: f for f in fields(Settings)}


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _suffix(data: str) -> str:
    """The suffix that says how to read a file, as nnx.data sees it."""
    return Path(data.lower().removesuffix(".gz")).suffix


def _absolute(data: str) -> str:
    return data if data in _BUILT_IN else str(Path(data).absolute())


def _settings(args: argparse.Namespace) -> Settings:
    """Defaults, overridden by the file `--config`, overridden by the flags."""
    given = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    return Settings(**((_read_config(args.config) if args.config else {}) | given))


def _read_config(path: str) -> dict[str, Any]:
    """The settings in a TOML file."""
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"--config: expected a TOML file, got {path} ({error.strerror}); check the path"
        ) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: expected a TOML file: {error}") from error
    settings: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in _OPTIONS:
            known = ", ".join(option.replace("_", "-") for option in _OPTIONS)
            raise ValueError(f"{path}: unknown key {key!r}; the keys are {known}")
        if name in settings:
            raise ValueError(f"{path}: key {key!r} stands there twice, with - and with _")
        settings[name] = _checked(f"{path}: {key}", value, **_OPTIONS[name].metadata)
    return settings


def _checked(
    who: str, value: Any, *, kind: type, many: bool = False, choices: Any = None, **_: Any
) -> Any:
    """A value of a TOML file, if it is of the option's type."""
    values = value if many and isinstance(value, list) else [value]
    allowed = (int, float) if kind is float else (kind,)
    for item in values:
        if type(item) not in allowed:  # not isinstance: True is no int here
            raise TypeError(f"{who}: expected {kind.__name__}, got {item!r}")
        if choices and item not in choices:
            raise ValueError(f"{who}: expected one of {', '.join(choices)}, got {item!r}")
    return values if many else value


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the file config.json of a run holds: enough to repeat it, and to use its model.

    Args:
        settings: All flags' values.
        n_features: Number of input features.
        columns: Names of the features of a table.
        classes: The label of each class.
        standardizer: Fitted on the training set.
        test_sha256: Fingerprint of the test set.
    """

    settings: Settings
    n_features: int
    columns: list[str] | None
    classes: tuple[int | str, ...]
    standardizer: Standardizer
    test_sha256: str

    CONFIG = "config.json"
    MODEL = "model.safetensors"
    HISTORY = "history.csv"
    CURVES = "curves.png"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read config.json.

        Raises:
            ValueError: It isn't one.
        """
        path = folder / cls.CONFIG
        try:
            content = json.loads(path.read_text("utf-8"))
            own = {f.name: content[f.name] for f in fields(cls)}
            own["settings"] = Settings(**own["settings"])
            own["classes"] = tuple(own["classes"])
            own["standardizer"] = Standardizer(
                *(np.array(own["standardizer"][name], np.float64) for name in ("mean", "scale"))
            )
            run = cls(**own)
            run.features(np.zeros((1, run.n_features)), str(path))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder}: expected a run of nnx train, got no usable {cls.CONFIG} "
                f"({type(error).__name__}: {error})"
            ) from error
        return run

    def write(self, folder: Path, metrics: dict[str, Any] | None = None) -> None:
        """Write config.json, whole or not at all."""
        standardizer = {
            "mean": self.standardizer.mean.tolist(),
            "scale": self.standardizer.scale.tolist(),
        }
        content = {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "settings": asdict(self.settings),
            "standardizer": standardizer,
            "versions": _versions("numpy", "safetensors", "cupy"),
            "tf32": self.settings.backend != "numpy" and tf32(),
            "metrics": metrics,
        }
        temporary = folder / (self.CONFIG + ".part")
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        temporary.replace(folder / self.CONFIG)

    def features(self, x: Any, who: str) -> np.ndarray:
        """Standardize features after checking their number, and check what comes of it."""
        x = check_features(x, n_features=self.n_features, who=who)
        return check_features(self.standardizer.transform(x), who=f"{who}, standardized")

    def prepared(self, data: Dataset) -> Dataset:
        """The data as the model takes them: standardized, with the classes of the training."""
        labels = np.array(data.classes)[data.t]
        t, classes = encode_labels(labels, self.classes, who=data.name)
        return Dataset(self.features(data.x, data.name), t, classes, data.name)

    def new_optimizer(self) -> nnx.Optimizer:
        """An optimizer, as the settings say."""
        s = self.settings
        assert s.lr is not None  # completed
        if s.optimizer == "adam":
            return nnx.Adam(s.lr, weight_decay=s.weight_decay)
        return nnx.SGD(s.lr, momentum=s.momentum, nesterov=s.nesterov, weight_decay=s.weight_decay)

    def new_trainer(self, backend: Backend) -> nnx.Trainer:
        """A trainer with a new model, as the settings say."""
        s, optimizer = self.settings, self.new_optimizer()
        widths = [self.n_features, *s.hidden, len(self.classes)]
        try:
            if 8 * sum((n + 1) * m for n, m in itertools.pairwise(widths)) > sys.maxsize:
                raise MemoryError("more than can be addressed")
            model = nnx.mlp(
                widths, activation=s.activation, dropout=s.dropout, seed=s.seed, dtype=s.dtype
            )
            return nnx.Trainer(
                *(model, nnx.SoftmaxNLL(), optimizer),
                seed=s.seed,
                backend=backend,
                graph=s.graph or None,
            )
        except MemoryError as error:
            raise ValueError(
                f"--hidden: expected a model that fits into memory, got widths {widths} ({error}); "
                "choose smaller ones"
            ) from error

    def load_trainer(self, folder: Path, backend: Backend) -> nnx.Trainer:
        """A trainer with the model of the run, to evaluate and predict."""
        path, n_classes = folder / self.MODEL, len(self.classes)
        model = nnx.load(path, backend=backend)
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(), backend=backend)
        try:
            fits = trainer.predict(np.zeros((1, self.n_features))).shape == (1, n_classes)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{path}: expected a model of {self.n_features} features and {n_classes} classes, "
                f"as {self.CONFIG} says, got another; are both of one run?"
            )
        return trainer


def _load_data(settings: Settings) -> tuple[Dataset, Dataset]:
    """(train, test) as the settings say."""
    return nnx.data.load(
        settings.data,
        labels=settings.labels,
        target=settings.target,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )


def _column_names(data: str) -> list[str] | None:
    """Names of a table's columns; None for data whose features have no names."""
    if data in _BUILT_IN or _suffix(data) not in _TABLES or Path(data).is_dir():
        return None
    return nnx.data.column_names(data)  # also checks that the names are names


def _check_columns(path: str, run: Run, found: list[str]) -> None:
    """Check that a table's features are those of the training, in the same order."""
    if found != run.columns:
        raise ValueError(
            f"{path}: expected {run.n_features} feature columns {', '.join(run.columns or [])}, "
            f"got {len(found)}: {', '.join(found)}"
        )


def _fingerprint(data: Dataset) -> str:
    """SHA-256 of features and labels."""
    digest = hashlib.sha256(data.x.data)
    digest.update(data.t.data)
    return digest.hexdigest()


def _backend(args: argparse.Namespace, name: str | None) -> Backend:
    """The backend to run on; what `auto` has to say about it is one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = resolve(name)
    for warning in caught:
        _warn(args, f"warning: {warning.message}")
    return backend


# ---- train ---------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    with _input_errors():
        settings = _settings(args)
        backend = _backend(args, settings.backend)
        run, train, test = _prepare(settings, backend)
        trainer = run.new_trainer(backend)
        folder = _claim_folder(settings)
        run.write(folder)
    if not settings.quiet:
        sizes = "-".join(map(str, [run.n_features, *settings.hidden, len(run.classes)]))
        with contextlib.suppress(BrokenPipeError):  # no reason not to train
            print(
                f"model {sizes} {settings.activation}: {trainer.vector.size:,} parameters, "
                f"{len(train):,} training samples, {backend.name}",
                flush=True,
            )
    seconds = _fit(trainer, run, train, test, folder)
    scores = trainer.evaluate(test.x, test.t)
    _save(trainer, run, folder, seconds=seconds, **{f"test_{k}": v for k, v in scores.items()})
    print(
        f"test accuracy {scores['accuracy']:.4f}  ({len(test)} samples, {seconds:.1f} s, {folder})"
    )


def _prepare(settings: Settings, backend: Backend) -> tuple[Run, Dataset, Dataset]:
    """The run, and what it trains and tests on."""
    train, test = _load_data(settings)
    names = _column_names(settings.data)
    settings = settings.completed(len(train), names, backend)
    run = Run(
        settings=settings,
        n_features=train.x.shape[1],
        columns=names and [name for name in names if name != settings.target],
        classes=train.classes,
        standardizer=Standardizer.fit(train.x, per_feature=not settings.images),
        test_sha256=_fingerprint(test),
    )
    return run, run.prepared(train), run.prepared(test)


def _claim_folder(settings: Settings) -> Path:
    """Make the run's folder, or clear it of the run that may be overwritten."""
    out = Path(settings.out)
    with _folder("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    if settings.name is None:
        stem = Path(settings.data).absolute().name.partition(".")[0] or "data"
        for number in itertools.count(1):
            folder = out / f"{stem}-{number:04d}"
            with _folder("--out", folder), contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        return folder
    folder = out / settings.name
    if not settings.overwrite and folder.exists():
        raise ValueError(
            f"{folder}: expected no such run yet; choose another --name or --overwrite"
        )
    with _folder("--name", folder):
        folder.mkdir(exist_ok=True)
        empty = not any(folder.iterdir())
    if not empty:
        try:
            Run.read(folder)
        except ValueError as error:
            raise ValueError(
                f"{folder}: expected a run of nnx train to overwrite, got a folder with other "
                "files; choose another --name"
            ) from error
    for name in (Run.MODEL, Run.HISTORY, Run.CURVES):  # config.json is replaced as a whole
        (folder / name).unlink(missing_ok=True)
    return folder


@contextlib.contextmanager
def _folder(flag: str, path: Path) -> Iterator[None]:
    """Name the flag that asked for a folder that can't be had."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{flag}: expected a folder or a place for one, got {path} ({error.strerror}); "
            f"choose another {flag}"
        ) from error


def _fit(trainer: nnx.Trainer, run: Run, train: Dataset, test: Dataset, folder: Path) -> float:
    """Train as the settings say; returns the seconds it took."""
    s = run.settings
    assert s.epochs is not None  # completed
    assert s.batch_size is not None
    start = time.perf_counter()
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # fit reports a loss that isn't finite
            trainer.fit(
                train.x,
                train.t,
                epochs=s.epochs,
                batch_size=s.batch_size,
                validation=(test.x, test.t),
                progress=sys.stderr.isatty() and not s.quiet,
            )
    except FloatingPointError as error:
        trainer.history.to_csv(folder / Run.HISTORY)
        raise CliError(f"{error} (see {folder / Run.HISTORY})", 1) from error
    except KeyboardInterrupt as error:
        _save(trainer, run, folder, interrupted=True)
        raise CliError(
            f"interrupted in epoch {trainer.epoch + 1} of {s.epochs}; "
            f"the model and the history so far are in {folder}",
            130,
        ) from error
    return time.perf_counter() - start


def _save(trainer: nnx.Trainer, run: Run, folder: Path, **metrics: Any) -> None:
    """Write model, history, curves and config.json, which says how far the training came."""
    nnx.save(trainer.model, folder / Run.MODEL)
    trainer.history.to_csv(folder / Run.HISTORY)
    run.write(folder, {"epochs": trainer.epoch, **metrics})
    if trainer.history:
        from nnx.plot import learning_curves

        with contextlib.suppress(ImportError):  # matplotlib is an extra
            learning_curves(trainer.history, folder / Run.CURVES)


# ---- evaluate, predict ---------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> None:
    with _input_errors():
        if args.data is None and (args.labels or args.target):
            raise ValueError("--labels and --target: expected --data with them")
        run, trainer = _open_run(args)
        test = run.prepared(_test_set(run) if args.data is None else _other_data(run, args))
    scores = trainer.evaluate(test.x, test.t)
    print(
        f"loss {scores['loss']:.4f}  accuracy {scores['accuracy']:.4f}  "
        f"({len(test)} samples of {test.name})"
    )


def _open_run(args: argparse.Namespace) -> tuple[Run, nnx.Trainer]:
    """The run that the command line names, and a trainer that holds its model."""
    folder = Path(args.run)
    run = Run.read(folder)
    return run, run.load_trainer(folder, _backend(args, args.backend))


def _test_set(run: Run) -> Dataset:
    """The test set of the run, of which its training saw no sample."""
    _, test = _load_data(run.settings)
    if _fingerprint(test) != run.test_sha256:
        raise ValueError(
            f"{run.settings.data}: expected the data of the training, got others: "
            "the file or its reading has changed since; evaluate on all of them with --data"
        )
    return test


def _other_data(run: Run, args: argparse.Namespace) -> Dataset:
    """The data named on the command line: their test set, or all where they have none."""
    if args.data in _BUILT_IN:
        return _load_data(replace(run.settings, data=args.data, labels=None, target=None))[1]
    names, target = _column_names(args.data), args.target
    if names:
        target = target or (run.settings.target if run.columns else names[-1])
    everything, test = read_data(args.data, args.labels, target)
    if names and run.columns:
        _check_columns(args.data, run, [name for name in names if name != target])
    return everything if test is None else test


def _predict(args: argparse.Namespace) -> None:
    with _input_errors():
        run, trainer = _open_run(args)
        x = run.features(_unlabeled(run, args.data), args.data)
    text = _csv(run.classes, trainer.predict(x))
    if args.out is None:
        sys.stdout.write(text)
        return
    try:
        Path(args.out).write_text(text, "utf-8")
    except OSError as error:
        raise CliError(
            f"--out: expected a file that can be written, got {args.out} ({error.strerror}); "
            "choose another --out"
        ) from error


def _unlabeled(run: Run, path: str) -> np.ndarray:
    """Features to predict from. A table may have one more column, the label."""
    names = _column_names(path)
    if not (names and run.columns):
        return read_features(path, n_features=run.n_features)
    others = [name for name in names if name not in run.columns]
    target = others[0] if len(others) == 1 else None
    _check_columns(path, run, [name for name in names if name != target])
    return read_features(path, target, run.n_features)


def _csv(classes: Sequence[int | str], logits: np.ndarray) -> str:
    """A line for each sample: its most probable class, and how probable that is."""
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        row = np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]
        raise CliError(f"the model's output for sample {row} isn't finite; is it an outlier?", 1)
    best = logits.argmax(axis=1)
    probability = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "class", "probability"])
    for index, (label, p) in enumerate(zip(best, probability, strict=True)):
        writer.writerow([index, classes[label], f"{p:.6f}"])
    return file.getvalue()


# ---- check ---------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    with _input_errors():
        _check_usage(args)
        backend = _backend(args, args.backend)
        subject = None if args.subject is None else _subject(args, backend)
        _check_json(args.json, "; give RUN or MODEL before --json")
    options = {
        "backend": backend,
        "dtype": args.dtype,
        "steps": args.steps,
        "seed": args.seed,
        "progress": sys.stderr.isatty(),
    }
    report = (
        nnx.check.library(**options) if subject is None else nnx.check.model(**subject | options)
    )
    if args.json != "-":
        print(report)
    if args.json is not None:
        place = {"blas": _blas(), "kernels": _kernels(), "cpus": _usable_cpus()}
        text = report.to_json(**place, **_asked(args))
        _write_json(args.json, text)
    failed = sum(not row.passed for row in report.rows)
    if failed:
        raise CliError(f"{failed} of {len(report.rows)} checks failed", 1)


def _check_usage(args: argparse.Namespace) -> None:
    most = nnx.check.MOST_STEPS if args.subject is None else None
    if args.steps < 1 or (most and args.steps > most):
        expected = f"1 to {most}" if most else "at least 1"
        raise ValueError(f"--steps: expected {expected}, got {args.steps}")
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    if args.subject is None and (args.data or args.labels or args.target):
        raise ValueError("--data, --labels and --target: expected a RUN or MODEL with them")
    if args.data is None and (args.labels or args.target):
        raise ValueError("--labels and --target: expected --data with them")


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line said that the report doesn't."""
    return {name: getattr(args, name) for name in ("subject", "data", "dtype", "steps", "seed")}


def _check_json(path: str | None, hint: str = "") -> None:
    """Learn before the work that its report can be written, and takes no other file's place."""
    if path is None or path == "-":
        return
    start, file = b"", Path(path)
    try:
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()  # whoever interrupts the work finds no empty report
        elif file.is_file():  # not a pipe
            with file.open("rb") as content:
                start = content.read(1)
    except OSError as error:
        raise ValueError(
            f"--json: expected a file to write, got {path} ({error.strerror}){hint}"
        ) from error
    if start not in (b"", b"{"):
        raise ValueError(
            f"--json: expected a new file, or one with JSON to replace, got {path}{hint}"
        )


def _write_json(path: str, text: str) -> None:
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise CliError(f"--json: can't write {path} ({error.strerror})") from error


def _subject(args: argparse.Namespace, backend: Backend) -> dict[str, Any]:
    """The model of a run or of a file, and what it is to be trained with."""
    path = Path(args.subject)
    if path.is_file():
        return _model_in_file(args, path)
    run = Run.read(path)
    trainer = run.load_trainer(path, backend)
    data = run.prepared(
        _load_data(run.settings)[0] if args.data is None else _other_data(run, args)
    )
    return {
        "model": trainer.model,
        "loss": trainer.loss,
        "optimizer": run.new_optimizer(),
        "x": data.x,
        "t": data.t,
        "batch_size": run.settings.batch_size,
    }


def _model_in_file(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The model in a file, with Adam, on the data given or on random numbers."""
    model = nnx.load(path)
    x, t = None, None
    if args.data is not None:
        data = nnx.data.load(args.data, labels=args.labels, target=args.target)[0]
        x, t = Standardizer.fit(data.x).transform(data.x), data.t
    else:
        sizes = (getattr(a, "n_in", getattr(a, "n_features", None)) for a in model.layers())
        n = next((size for size in sizes if size is not None), None)
        if n is None:
            raise ValueError(
                f"{path}: expected a model that tells its number of inputs; give --data"
            )
        x = np.random.default_rng(args.seed).standard_normal((256, n))
    dtype = next(p.value.dtype for _, p in model.parameters())
    n_outputs = model(x[:2].astype(dtype)).shape[-1]
    if t is None:
        t = np.random.default_rng(args.seed).integers(0, n_outputs, len(x))
    loss = nnx.SoftmaxNLL(n_models=model.n_models)
    loss.check_target(t, len(x), n_outputs, dtype, args.data or str(path))
    return {"model": model, "loss": loss, "optimizer": nnx.Adam(), "x": x, "t": t}


# ---- bench ---------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> None:
    from nnx import bench

    if args.against is not None:
        _bench_against(args)
        return
    with _input_errors():
        for flag in ("threads", "python", "plot", "markdown"):
            if getattr(args, flag):
                raise CliError(f"--{flag} goes with --against")
        backend = _backend(args, args.backend)
        _check_json(args.json)
        sections = _sections(args.only, bench.SECTIONS)
    smoke = os.environ.get("NNX_BENCH_SMOKE") == "1"
    place = bench.Place(backend, np.dtype(args.dtype), smoke)
    cases = bench.cases(sections)
    settings = {
        "backend": backend.name,
        "dtype": args.dtype,
        "seconds": args.seconds,
        "sections": sections,
        "smoke": smoke,
    }
    machine = {
        "versions": {"python": platform.python_version()}
        | _versions(*dict.fromkeys(("numpy", backend.xp.__name__))),
        "platform": platform.platform(),
        "cpus": {"usable": _usable_cpus(), "all": os.cpu_count()},
        "blas": _blas(),
        **bench.describe(backend),
    }
    show = _shower(args)
    show(*bench.heading(settings, machine))
    rows: list[Any] = []
    table = bench.Table(cases, device="device" in machine)
    measure = functools.partial(bench.measure, place=place, seconds=args.seconds, strict=args.debug)
    _measure_all(args, cases, measure, rows, lambda row: show(*table.lines(row)), settings, machine)
    show("", bench.NOTES, *([bench.DEVICE_NOTES] if "device" in machine else []))
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        _warn(args, f"warning: {warning}")
    _check_rows(rows, " (see with --debug)")


def _bench_against(args: argparse.Namespace) -> None:
    from nnx import bench
    from nnx.bench import against

    with _input_errors():
        if _backend(args, args.backend).xp is not np or args.dtype != "float32":
            raise CliError("--against compares on the CPU, in float32")
        _check_json(args.json)
        if args.plot:
            _check_plot(args.plot)
        sections = _sections(args.only, against.SECTIONS)
        if args.only is None or args.plot:  # the sweep is for the picture
            sections = [name for name in sections if name != "sweep"] + ["sweep"] * bool(args.plot)
        pythons = dict(args.python or ())
        if unused := sorted(set(pythons) - set(args.against)):
            raise CliError(f"--python names {unused[0]}, which --against doesn't")
    smoke = os.environ.get("NNX_BENCH_SMOKE") == "1"
    threads = args.threads or _usable_cpus()
    contests = against.contests(sections)
    options = {"pythons": pythons, "threads": threads, "seconds": args.seconds, "smoke": smoke}
    with against.Team(args.against, **options) as team:
        with _passing("starting the libraries"), _input_errors():
            team.start(contests)
        settings = {
            "against": args.against,
            "threads": threads,
            "seconds": args.seconds,
            "sections": sections,
            "smoke": smoke,
            "date": time.strftime("%Y-%m-%d"),
            "command": _command(args, threads),
            "versions": team.versions,
        }
        cpus = {"usable": _usable_cpus(), "all": os.cpu_count()}
        machine = {"platform": platform.platform(), "cpus": cpus}
        machine |= bench.describe(get_backend("numpy"))
        head = list(against.heading(settings, machine))
        show = _shower(args, silent=args.markdown)
        show(*head)
        rows: list[Any] = []
        table = against.Table(contests)

        def show_row(row: against.Row) -> None:
            show(*table.lines(row))

        try:
            _measure_all(args, contests, team.hold, rows, show_row, settings, machine)
        finally:
            if args.markdown and rows:
                _shower(args)(*against.markdown(head, rows))
    show("", against.NOTES)
    if args.plot:
        against.throughput(rows, args.plot)
    _check_rows(rows)


def _shower(args: argparse.Namespace, *, silent: bool = False) -> Callable[..., None]:
    """Prints lines, unless JSON takes their place."""

    def show(*lines: str) -> None:
        if args.json != "-" and not silent:
            print(*lines, sep="\n", flush=True)

    return show


def _measure_all(
    args: argparse.Namespace,
    cases: Sequence[Any],
    measure: Callable[[Any], Any],
    rows: list[Any],
    show: Callable[[Any], None],
    settings: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    """Measure and show one row after the other; whatever ends it, `--json` gets what there is."""
    try:
        for i, case in enumerate(cases):
            with _passing(f"{i + 1} of {len(cases)}: {case.name}"):
                row = measure(case)
            rows.append(row)
            show(row)
    except KeyboardInterrupt as error:
        raise CliError(f"interrupted after {len(rows)} of {len(cases)} rows", 130) from error
    finally:
        if args.json is not None:
            done = {"complete": len(rows) == len(cases), "rows": [row.to_json() for row in rows]}
            text = json.dumps({"settings": settings, "machine": machine, **done}, indent=2)
            _write_json(args.json, text)


def _check_rows(rows: Sequence[Any], hint: str = "") -> None:
    failed = [row.name for row in rows if row.failed]
    if failed:
        raise CliError(f"{len(failed)} rows failed: {'; '.join(failed)}{hint}", 1)


def _check_plot(path: str) -> None:
    """Learn before the work that there can be a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CliError(f"--plot: {error}; pip install 'nnx-xp[plot]'") from error
    suffix, known = Path(path).suffix.removeprefix("."), Figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise CliError(f"--plot: expected a name that ends in one of {sorted(known)}, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise CliError(f"--plot: no such folder: {path}")


def _command(args: argparse.Namespace, threads: int) -> str:
    """What measures the same elsewhere: paths of interpreters and of files are left out."""
    only = f" --only {args.only}" if args.only else ""
    more = f"{only} --threads {threads} --seconds {args.seconds:g}"
    return f"nnx bench --against {','.join(args.against)}{more}{' --plot FILE' * bool(args.plot)}"


@contextlib.contextmanager
def _passing(text: str) -> Iterator[None]:
    """Show what is being done while it is, if somebody is watching."""
    if not sys.stderr.isatty():
        yield
        return
    try:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _sections(text: str | None, known: Iterable[str]) -> list[str]:
    names = [name for name in (",".join(known) if text is None else text).split(",") if name]
    if not names or not set(names) <= set(known):
        raise CliError(f"--only: expected some of {','.join(known)}, got {text!r}")
    return names


def _libraries(text: str) -> list[str]:
    from nnx.bench.against import LIBRARIES

    names = [name for name in text.split(",") if name]
    if not names or not set(names) <= set(LIBRARIES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(LIBRARIES)}, got {text!r}")
    return list(dict.fromkeys(names))


def _interpreter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected LIB=PATH, got {text!r}")
    return name, path


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return seconds


# ---- info ----------------------------------------------------------------------------------------

_PACKAGES = ("numpy", "safetensors", "tqdm", "cupy", "matplotlib", "pyarrow", "pooch")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_THREADS = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "accelerate": ("VECLIB_MAXIMUM_THREADS",),
}
"""Environment variables that limit the threads of a BLAS library, the strongest first."""


def _info(args: argparse.Namespace) -> None:
    info = {
        "versions": _versions(*_PACKAGES),
        "platform": platform.platform(),
        "cpus": {"usable": _usable_cpus(), "all": os.cpu_count()},
        "blas": _blas(),
        "kernels": _kernels(),
        **_backends(),
        "cuda": _cuda(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _matters(name)
        },
    }
    print(json.dumps(info, indent=2) if args.json else _readable(info))


def _matters(variable: str) -> bool:
    return variable.startswith(("NNX_", "CUDA_VISIBLE", "CUDA_PATH", "CUPY_")) or any(
        variable in variables for variables in _THREADS.values()
    )


def _readable(info: dict[str, Any]) -> str:
    """A line for each fact."""
    versions, cpus, blas = info["versions"], info["cpus"], info["blas"]
    lines = [(name, version or "not installed") for name, version in versions.items()]
    lines += [
        ("platform", info["platform"]),
        ("CPUs", f"{cpus['usable']} usable of {cpus['all']}"),
        ("BLAS", f"{blas['name']} {blas['version']}"),
        ("BLAS threads", f"{blas['threads']} (by {blas['threads_by']})"),
        ("C kernels", _state(info["kernels"])),
        ("backends", ", ".join(info["backends"])),
    ]
    if info["cupy_problem"]:
        lines.append(("no GPU", info["cupy_problem"]))
    if info["cuda"]:
        state = "on" if info["cuda"]["tf32"] else "off"
        lines += [("CUDA", info["cuda"]["found"]), ("TF32", f"{state} (by CUPY_TF32)")]
    for device in info["devices"]:
        memory = f"{device['memory'] / 2**30:.1f} GiB"
        text = f"{device['model']}, {memory}, compute capability {device['compute_capability']}"
        lines.append((device["name"], text))
    lines += info["environment"].items()
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _versions(*packages: str) -> dict[str, str | None]:
    """Versions of nnx, Python and these packages, without importing them; None if not installed."""
    versions = {"nnx": nnx.__version__, "python": platform.python_version()}
    return {**versions, **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    for name in _CUPY if package == "cupy" else (package,):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _blas() -> dict[str, Any]:
    """The library NumPy was built with, the number of its threads, and how that is known."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    name = blas.get("name", "unknown")
    threads, source = _blas_threads(name.lower())
    return {
        "name": name,
        "version": blas.get("version", "unknown"),
        "threads": threads,
        "threads_by": source,
    }


def _blas_threads(blas: str) -> tuple[int, str]:
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_info

        pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        if pools:
            return max(pools), "threadpoolctl"
    for library, variables in _THREADS.items():
        for variable in variables if library in blas else ():
            value = os.environ.get(variable, "")
            if value.isdecimal() and int(value):
                return int(value), variable
    return _usable_cpus(), "CPU count"


def _kernels() -> dict[str, Any]:
    """Whether the C kernels were built and are in use, and how."""
    built = importlib.util.find_spec("nnx.backends._cpu") is not None
    off = built and bool(os.environ.get("NNX_DISABLE_CPU_KERNELS"))
    used = numpy_backend.CPU.info() if numpy_backend.CPU is not None else {}
    found = {name: used.get(name) for name in ("instructions", "openmp", "threads")}
    return {"built": built, "used": bool(used), "switched_off": off, **found}


def _state(kernels: dict[str, Any]) -> str:
    if kernels["used"]:
        n = kernels["threads"]
        threads = f"OpenMP, {n} thread{'s' * (n > 1)}" if kernels["openmp"] else "no OpenMP"
        return f"{kernels['instructions']}, {threads}"
    if kernels["switched_off"]:
        return "off (by NNX_DISABLE_CPU_KERNELS)"
    if kernels["built"]:
        return "built, but not from these sources or for this Python and NumPy"
    return "not built"


def _backends() -> dict[str, Any]:
    """Usable backends and devices, or what is wrong with CuPy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_backend("cupy")
            devices = [_device(name) for name in available() if name.startswith("cupy:")]
        problem = None
    except Exception as error:  # however CuPy is broken, this command is there to say so
        kind = "" if isinstance(error, BackendUnavailable) else f"{type(error).__name__}: "
        devices, problem = [], " ".join(f"{kind}{error}".split())
    names = ["numpy", *(device["name"] for device in devices)]
    return {"backends": names, "devices": devices, "cupy_problem": problem}


def _cuda() -> dict[str, Any] | None:
    """Versions of CuPy and of what it runs on; None where CuPy isn't installed."""
    from nnx.backends.cuda_versions import cuda_versions

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cuda_versions()
    if not found.packages and found.cupy is None:
        return None
    return {"found": str(found), **asdict(found), "tf32": tf32()}


def _device(name: str) -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(int(name.removeprefix("cupy:")))
    return {
        "name": name,
        "model": properties["name"].decode(),
        "memory": properties["totalGlobalMem"],
        "compute_capability": f"{properties['major']}.{properties['minor']}",
    }


# ---- parser --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no abbreviated flags, which scripts outlive."""

    def __init__(self, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**options, allow_abbrev=False, formatter_class=form)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where it is known which command's `--help` to name."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


_EXAMPLES = {
    "": """
  nnx train                                     train on the bundled digits
  nnx evaluate runs/digits-0001                 measure the model on its test set
  nnx predict runs/iris-0001 --data new.csv     classify new samples
  nnx check --backend cupy                      is this GPU right?
  nnx bench --backend cupy                      how fast it is here
  nnx info                                      versions, devices, threads""",
    "train": """
  nnx train
  nnx train --data mnist --hidden 128 --epochs 5 --backend auto
  nnx train --data iris.csv --target species --hidden 0 --name linear
  nnx train --data images.idx3 --labels labels.idx1 --optimizer sgd --momentum 0.9
  nnx train --config run.toml --seed 1

run.toml holds what the flags can say; flags win over it. Paths are relative to where you are:
  data = "iris.csv"
  hidden = [64, 32]
  batch-size = 16
  nesterov = false""",
    "evaluate": """
  nnx evaluate runs/digits-0001
  nnx evaluate runs/iris-0001 --data other.csv --target species""",
    "predict": """
  nnx predict runs/iris-0001 --data new.csv
  nnx predict runs/mnist-0001 --data t10k-images-idx3-ubyte.gz --out predictions.csv""",
    "check": """
  nnx check                                   NumPy, in a second
  nnx check --backend cupy                    this GPU against NumPy
  nnx check runs/digits-0001 --backend cupy   the model of a run, on its own data
  nnx check model.safetensors --data iris.csv --steps 200
  nnx check --backend cupy:1 --json report.json""",
    "bench": """
  nnx bench                                     training steps and what they are made of, on NumPy
  nnx bench --backend cupy                      on a GPU
  nnx bench --only steps,kernels --dtype float64
  nnx bench --seconds 5 --json bench.json       longer, with a file of every figure
  nnx bench --against torch,jax                 beside other libraries, on the CPU
  nnx bench --against torch --python torch=venv/bin/python --plot throughput.png

A row's time is a median; beside each step stand its matrix products alone, which take turns with
it. Close other programs first, and compare what ran side by side.
OPENBLAS_NUM_THREADS=1 sets the threads of NumPy's products, where its BLAS is OpenBLAS.""",
    "info": """
  nnx info
  nnx info --json""",
}


def _parser() -> argparse.ArgumentParser:
    examples = {name: f"examples:{text}" for name, text in _EXAMPLES.items()}
    parser = _Parser(
        prog="nnx", description="Train neural networks on NumPy or CuPy.", epilog=examples[""]
    )
    parser.add_argument("--version", action="version", version=f"nnx {nnx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(call: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        name = call.__name__.removeprefix("_")
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=examples[name]
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        command.set_defaults(call=call)
        return command

    train = add(_train, "train a classifier and write it into a folder with all that belongs to it")
    train.add_argument("--config", metavar="FILE", help="TOML file of settings, see below")
    _add_settings(train)

    evaluate = add(_evaluate, "measure loss and accuracy of a run's model")
    _add_run(evaluate)
    evaluate.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="data to measure on, all of them where they have no "
        "test set of their own (default: the run's test set)",
    )
    evaluate.add_argument("--labels", metavar="PATH", help="file of labels, as in nnx train")
    evaluate.add_argument("--target", metavar="NAME", help="label column (default: the run's)")

    predict = add(_predict, "classify samples; writes CSV: index, class, its probability")
    _add_run(predict)
    predict.add_argument(
        "--data",
        metavar="PATH",
        required=True,
        help="table, .npz (array x), .npy or IDX file; a table may have one column more, the label",
    )
    predict.add_argument("--out", metavar="FILE", help="where to write (default: standard output)")

    check = add(_check, "prove gradients, and compare a backend with another, number by number")
    check.add_argument(
        "subject",
        metavar="RUN|MODEL",
        nargs="?",
        help="folder that nnx train has written, or a model file (default: all that is in nnx)",
    )
    check.add_argument(
        "--backend",
        metavar="NAME",
        help="what to check: numpy, cupy, cupy:N or auto (default: NNX_BACKEND, else numpy)",
    )
    check.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        help="to compare in (default: both, or the model's); gradients are checked in float64",
    )
    check.add_argument(
        "--steps", metavar="N", type=int, default=50, help="of training to compare (default: 50)"
    )
    check.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)"
    )
    check.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="what to train RUN or MODEL on, as in nnx train (default: the run's training data; "
        "random numbers for a MODEL)",
    )
    check.add_argument("--labels", metavar="PATH", help="file of labels, as in nnx train")
    check.add_argument("--target", metavar="NAME", help="label column (default: the run's)")
    check.add_argument(
        "--json",
        metavar="PATH",
        nargs="?",
        const="-",
        help="write JSON, too; to the standard output instead of the table without PATH or for -",
    )
    bench = add(_bench, "time training steps, operations, products and predictions on this machine")
    bench.add_argument("--backend", metavar="NAME", help=_OPTIONS["backend"].metadata["help"])
    bench.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)"
    )
    bench.add_argument(
        "--only",
        metavar="WHAT,...",
        help="steps, kernels, products, predict; with --against steps, kernels, predict, process, "
        "mnist, sweep (default: all, the sweep with --plot only)",
    )
    bench.add_argument(
        "--seconds",
        metavar="S",
        type=_duration,
        default=1.0,
        help="time for each row, with --against for each participant in it; 0 for a single call "
        "(default: 1)",
    )
    bench.add_argument(
        "--against",
        metavar="LIB,...",
        type=_libraries,
        help="compare with torch, jax, tensorflow, sklearn, each in a process of its own",
    )
    bench.add_argument(
        "--threads", metavar="N", type=_positive, help="of each library (default: all processors)"
    )
    bench.add_argument(
        "--python",
        metavar="LIB=PATH",
        type=_interpreter,
        action="append",
        help="the Python that has a library, where it isn't this one; may be repeated",
    )
    bench.add_argument(
        "--plot", metavar="FILE", help="draw throughput over batch size and width, too"
    )
    bench.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    bench.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write every figure as JSON, to standard output instead of the table if there "
        "is no FILE",
    )

    info = add(_info, "show versions, backends, devices and threads")
    info.add_argument("--json", action="store_true", help="write JSON")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder that nnx train has written")
    parser.add_argument("--backend", metavar="NAME", help=_OPTIONS["backend"].metadata["help"])


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting; those not given leave no trace in the result."""
    groups: dict[str, Any] = {}
    for name, option in _OPTIONS.items():
        flag = dict(option.metadata)
        title, kind = flag.pop("group"), flag.pop("kind")
        if flag.pop("many", False):
            flag["nargs"] = "*"
        if kind is bool:
            flag["action"] = argparse.BooleanOptionalAction
        else:
            flag["type"] = kind
            flag["help"] += _shown(option.default)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(_spelled(name), default=argparse.SUPPRESS, **flag)


def _shown(default: Any) -> str:
    """A default as the help shows it."""
    if default is None:
        return ""
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
