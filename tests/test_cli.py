"""The command `nnx`: what it prints, what it writes, and how it ends."""

import functools
import gzip
import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import Result, call

import nnx
from nnx import cli
from nnx.backends import Backend, BackendUnavailable, numpy_backend
from nnx.cli import main

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--epochs", "2", "--hidden", "16")
FILES = {"config.json", "model.safetensors", "history.csv", "curves.png"}
CLASSES = ("cat", "dog", "owl")


Nnx = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Nnx:
    """Call `main` in this process."""
    return functools.partial(call, capsys)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on the digits, one on pets.csv, and pets.csv."""
    folder = tmp_path_factory.mktemp("trained")
    data = table(folder / "pets.csv")
    out = ("--out", str(folder / "runs"), "--backend", "numpy")
    assert main(["train", *SHORT, *out]) == 0
    assert main(["train", "--data", str(data), "--epochs", "30", "--lr", "0.01", *out]) == 0
    return folder


@pytest.fixture
def trained(runs: Path, _alone: None) -> None:
    """A copy of `runs` in the current folder."""
    shutil.copytree(runs, ".", dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, without the user's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNX_BACKEND", raising=False)
    monkeypatch.delenv("NNX_DATA", raising=False)


def environment() -> dict[str, str]:
    """For a real process: this checkout, and one thread so that tests side by side don't starve."""
    settings = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return os.environ | settings


def fails(result: Result, command: str, *parts: str, status: int = 2) -> None:
    """Check the status, and that standard error is one line that holds all `parts`."""
    assert result.status == status, result.err
    assert re.fullmatch(rf"nnx {command}: error: [^\n\r]+\n", result.err), result.err
    for part in parts:
        assert part in result.err


def table(path: Path, *, n: int = 90, label_first: bool = False, seed: int = 0) -> Path:
    """A CSV file of three well separated classes, the features on very different scales."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    a = labels * 10 + rng.normal(size=n)
    b = -1000.0 * labels + rng.normal(size=n)
    lines = ["kind,a,b" if label_first else "a,b,kind"]
    for i, label in enumerate(labels):
        numbers, kind = f"{a[i]:.4f},{b[i]:.4f}", CLASSES[label]
        lines.append(f"{kind},{numbers}" if label_first else f"{numbers},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


def idx(path: Path, array: Any) -> Path:
    """An IDX file of unsigned bytes."""
    array = np.asarray(array, np.uint8)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())
    return path


def mnist_folder(path: Path, test_label: int = 3) -> Path:
    """A folder like MNIST: 40 training and 4 test images of 2 x 2 pixels."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 4)):
        labels = np.arange(n) % 4 if part == "train" else np.full(n, test_label)
        idx(path / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 2, 2)))
        idx(path / f"{part}-labels-idx1-ubyte", labels)
    return path


def config(folder: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return content


# ---- train ---------------------------------------------------------------------------------------


def test_train_alone_learns_the_digits_and_writes_a_run(run: Nnx) -> None:
    result = run("train")
    assert (result.status, result.err) == (0, "")
    model, summary = result.out.splitlines()
    assert model == "model 64-256-10 relu: 19,210 parameters, 1,438 training samples, numpy"
    found = re.fullmatch(
        r"test accuracy (\d\.\d{4})  \(359 samples, \d+\.\d s, runs/digits-0001\)", summary
    )
    assert found is not None
    assert float(found[1]) >= 0.97
    folder = Path("runs/digits-0001")
    assert {path.name for path in folder.iterdir()} == FILES
    rows = (folder / "history.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,accuracy,validation_loss,validation_accuracy"
    assert len(rows) == 31
    assert rows[-1].endswith(str(config(folder)["metrics"]["test_accuracy"]))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_config_json_holds_every_setting_and_what_prediction_needs(run: Nnx) -> None:
    assert run("train", *SHORT, "--seed", "5", "--backend", "numpy").status == 0
    content = config("runs/digits-0001")
    assert content["settings"] == {
        "data": "digits",
        "labels": None,
        "target": None,
        "test_fraction": 0.2,
        "hidden": [16],
        "activation": "relu",
        "dropout": 0.2,
        "optimizer": "adam",
        "lr": 0.001,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "epochs": 2,
        "batch_size": 32,
        "seed": 5,
        "dtype": "float32",
        "backend": "numpy",
        "graph": False,
        "out": "runs",
        "name": None,
        "overwrite": False,
        "quiet": False,
    }
    assert content["n_features"] == 64
    assert content["classes"] == list(range(10))
    assert content["columns"] is None
    train, _ = nnx.data.load_digits(seed=5)
    assert content["standardizer"]["mean"] == pytest.approx(float(train.x.mean()), rel=1e-5)
    assert content["standardizer"]["scale"] == pytest.approx(float(train.x.std()), rel=1e-5)
    assert content["versions"]["nnx"] == nnx.__version__
    assert content["versions"]["numpy"] == np.__version__
    assert set(content["metrics"]) == {"epochs", "seconds", "test_loss", "test_accuracy"}


def test_flags_reach_model_and_optimizer(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nnx.Trainer] = []
    values: list[Any] = []
    build = cli.Run.new_trainer

    def spy(self: cli.Run, backend: Backend) -> nnx.Trainer:
        made.append(build(self, backend))
        values.extend(value.copy() for value in made[0].model.state().values())
        return made[0]

    monkeypatch.setattr(cli.Run, "new_trainer", spy)
    flags = "--hidden 8 4 --activation tanh --dropout 0.25 --optimizer sgd --lr 0.5 --momentum 0.5"
    more = "--nesterov --weight-decay 0.125 --epochs 1 --batch-size 700 --seed 9 --dtype float64"
    assert run("train", *flags.split(), *more.split()).status == 0
    trainer = made[0]
    assert repr(trainer.optimizer) == repr(
        nnx.SGD(0.5, momentum=0.5, nesterov=True, weight_decay=0.125)
    )
    expected = nnx.mlp([64, 8, 4, 10], activation="tanh", dropout=0.25, dtype="float64", seed=9)
    assert repr(trainer.model) == repr(expected)
    for value, new in zip(values, expected.state().values(), strict=True):
        np.testing.assert_array_equal(value, new)
    assert trainer.seed == 9
    assert trainer.optimizer.steps.number == 3  # 1,438 samples in batches of 700


@pytest.mark.parametrize("hidden", [("--hidden", "0"), ("--hidden",)])
def test_hidden_of_0_or_nothing_is_a_linear_model(run: Nnx, hidden: tuple[str, ...]) -> None:
    result = run("train", "--epochs", "1", *hidden)
    assert result.out.startswith("model 64-10 relu: 650 parameters")


def test_sgd_with_its_default_rate_learns(run: Nnx) -> None:
    assert run("train", "--optimizer", "sgd", "--epochs", "10").status == 0
    assert config("runs/digits-0001")["settings"]["lr"] == 0.05
    assert config("runs/digits-0001")["metrics"]["test_accuracy"] > 0.95


def test_many_samples_have_defaults_of_their_own(run: Nnx) -> None:
    rng = np.random.default_rng(0)
    np.savez("many.npz", x=rng.normal(size=(12_500, 1)), y=np.arange(12_500) % 2)
    assert run("train", "--data", "many.npz", "--hidden", "0").status == 0
    settings = config("runs/many-0001")["settings"]
    assert (settings["epochs"], settings["batch_size"]) == (10, 64)


def test_same_seed_same_bytes_and_another_seed_other_bytes(run: Nnx) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run("train", *SHORT, "--name", name, "--seed", seed).status == 0
    a, b, c = (Path("runs", name, "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert Path("runs/a/history.csv").read_text() == Path("runs/b/history.csv").read_text()


def test_the_settings_of_a_run_repeat_it(run: Nnx) -> None:
    table(Path("pets.csv"))
    assert run("train", "--data", "pets.csv", *SHORT, "--name", "first").status == 0
    settings = config("runs/first")["settings"] | {"name": "second"}
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items() if v is not None]
    Path("again.toml").write_text("\n".join(lines))
    assert run("train", "--config", "again.toml").status == 0
    first, second = (Path("runs", n, "model.safetensors").read_bytes() for n in ("first", "second"))
    assert first == second


def test_runs_are_numbered_after_the_data(run: Nnx) -> None:
    table(Path("pets.v2.csv"))
    for _ in range(2):
        assert run("train", "--data", "pets.v2.csv", *SHORT, "--out", "deep/er").status == 0
    assert {path.name for path in Path("deep/er").iterdir()} == {"pets-0001", "pets-0002"}


def test_a_name_is_used_once_unless_overwritten(run: Nnx) -> None:
    assert run("train", *SHORT, "--name", "mine").status == 0
    before = Path("runs/mine/model.safetensors").read_bytes()
    fails(
        run("train", *SHORT, "--name", "mine", "--seed", "1"), "train", "runs/mine", "--overwrite"
    )
    assert Path("runs/mine/model.safetensors").read_bytes() == before
    again = run("train", *SHORT, "--name", "mine", "--seed", "1", "--overwrite")
    assert again.status == 0
    assert Path("runs/mine/model.safetensors").read_bytes() != before


def test_overwrite_leaves_nothing_of_the_old_run(run: Nnx) -> None:
    assert run("train", *SHORT, "--name", "mine").status == 0
    Path("runs/mine/notes.txt").write_text("keep me")
    failed = run("train", "--name", "mine", "--overwrite", "--epochs", "3", "--lr", "1e30")
    assert failed.status == 1
    names = {path.name for path in Path("runs/mine").iterdir()}
    assert names == {"config.json", "history.csv", "notes.txt"}


@pytest.mark.parametrize("text", [None, "{}", "not JSON"])
def test_overwrite_touches_no_folder_that_is_not_a_run(run: Nnx, text: str | None) -> None:
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    for name in FILES - {"config.json"}:
        (folder / name).write_text(f"my own {name}")
    if text is not None:
        (folder / "config.json").write_text(text)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    result = run("train", *SHORT, "--name", "mine", "--overwrite")
    expected = "runs/mine: expected a run of nnx train to overwrite, got a folder with other files"
    fails(result, "train", expected, "choose another --name")
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_overwrite_takes_an_empty_folder(run: Nnx) -> None:
    Path("runs/mine").mkdir(parents=True)
    assert run("train", *SHORT, "--name", "mine", "--overwrite").status == 0
    assert {path.name for path in Path("runs/mine").iterdir()} == FILES


def test_quiet_prints_the_result_alone(run: Nnx) -> None:
    result = run("train", *SHORT, "--quiet")
    assert re.fullmatch(r"test accuracy .*\n", result.out)


def test_tables_are_standardized_by_feature_and_images_as_one(run: Nnx) -> None:
    table(Path("pets.csv"))
    mnist_folder(Path("images"))
    idx(Path("x.idx"), np.arange(160).reshape(40, 2, 2))
    idx(Path("y.idx"), np.arange(40) % 2)
    np.save("x.npy", np.arange(80.0).reshape(40, 2))
    np.save("y.npy", np.arange(40) % 2)
    shapes = {
        ("pets.csv",): (2,),
        ("images",): (),
        ("x.idx", "--labels", "y.idx"): (),
        ("x.npy", "--labels", "y.npy"): (2,),
    }
    for number, (data, shape) in enumerate(shapes.items()):
        assert run("train", "--data", *data, *SHORT, "--name", str(number)).status == 0
        assert np.shape(config(f"runs/{number}")["standardizer"]["mean"]) == shape


def test_the_test_set_has_no_part_in_standardization(run: Nnx) -> None:
    assert run("train", "--data", table(Path("pets.csv")), *SHORT).status == 0
    train, _ = nnx.data.load("pets.csv")
    mean = config("runs/pets-0001")["standardizer"]["mean"]
    np.testing.assert_allclose(mean, train.x.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_mnist_is_read_from_nnx_data(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_DATA", str(mnist_folder(Path("images"))))
    assert run("train", "--data", "mnist", *SHORT).status == 0
    assert config("runs/mnist-0001")["classes"] == list(range(10))


def test_without_matplotlib_there_are_no_curves(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("train", *SHORT)
    assert (result.status, result.err) == (0, "")
    assert {path.name for path in Path("runs/digits-0001").iterdir()} == FILES - {"curves.png"}


def test_no_epochs_at_all_still_make_a_run(run: Nnx) -> None:
    assert run("train", "--epochs", "0").status == 0
    assert run("evaluate", "runs/digits-0001").status == 0


# ---- the file --config ---------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults(run: Nnx) -> None:
    Path("run.toml").write_text(
        'epochs = 1\nbatch-size = 100\nweight_decay = 1\nhidden = [4, 3]\nname = "x"\nquiet = true'
    )
    result = run("train", "--config", "run.toml", "--batch-size", "200", "--no-quiet")
    assert result.status == 0
    assert result.out.startswith("model 64-4-3-10")
    settings = config("runs/x")["settings"]
    chosen = [settings[k] for k in ("epochs", "batch_size", "weight_decay", "lr", "quiet")]
    assert chosen == [1, 200, 1, 0.001, False]


def test_one_hidden_layer_may_stand_as_a_number(run: Nnx) -> None:
    Path("run.toml").write_text("hidden = 8\nepochs = 0")
    assert run("train", "--config", "run.toml").out.startswith("model 64-8-10")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epoch = 3", "unknown key 'epoch'"),
        ("[model]\nhidden = 3", "unknown key 'model'"),
        ("batch-size = 3\nbatch_size = 4", "'batch_size' stands there twice"),
        ('epochs = "3"', "epochs: expected int, got '3'"),
        ("epochs = 3.0", "epochs: expected int, got 3.0"),
        ("epochs = true", "epochs: expected int, got True"),
        ("epochs = [3]", "epochs: expected int, got [3]"),
        ("epochs = -1", "--epochs: expected at least 0, got -1"),
        ("lr = true", "lr: expected float, got True"),
        ('lr = "0.1"', "lr: expected float, got '0.1'"),
        ("data = 3", "data: expected str, got 3"),
        ("nesterov = 1", "nesterov: expected bool, got 1"),
        ("hidden = [4, 2.5]", "hidden: expected int, got 2.5"),
        ('optimizer = "adamw"', "optimizer: expected one of adam, sgd, got 'adamw'"),
        ("epochs 3", "run.toml: expected a TOML file"),
        ("# caf\udce9", "run.toml: expected a TOML file"),
    ],
)
def test_a_bad_config_file_is_one_line(run: Nnx, text: str, part: str) -> None:
    Path("run.toml").write_text(text, "utf-8", errors="surrogateescape")
    fails(run("train", "--config", "run.toml"), "train", part)
    assert not Path("runs").exists()


def test_a_missing_config_file_is_one_line(run: Nnx) -> None:
    for path, why in (("no.toml", "No such file or directory"), (".", "Is a directory")):
        expected = f"--config: expected a TOML file, got {path} ({why})"
        fails(run("train", "--config", path), "train", expected)


# ---- bad usage and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--epochs many", "--epochs"),
        ("--epochs -1", "--epochs: expected at least 0, got -1"),
        ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("--hidden 8 0", "--hidden"),
        ("--hidden -3", "--hidden"),
        ("--activation step", "--activation"),
        ("--dropout 1.5", "1.5"),
        ("--lr -1", "-1"),
        ("--lr nan", "nan"),
        ("--lr inf", "inf"),
        ("--optimizer sgd --momentum 1", "momentum"),
        ("--optimizer sgd --nesterov", "nesterov"),
        ("--momentum 0.9", "sgd"),
        ("--weight-decay -1", "weight_decay"),
        ("--test-fraction 1", "fraction"),
        ("--test-fraction 0.00001", "fraction"),
        ("--seed -1", "seed"),
        ("--dtype float16", "--dtype"),
        ("--backend torch", "torch"),
        ("--name a/b", "--name"),
        ("--name ..", "--name"),
        ("--name .", "--name"),
        ("--data nothing", "unknown data set 'nothing'"),
        ("--data digits --target a", "target"),
        ("--name=", "--name: expected the name of a folder, got ''"),
        ("--name= --overwrite --out .", "--name: expected the name of a folder, got ''"),
        ("--out file/below", "--out: expected a folder or a place for one, got file/below (Not a"),
        ("--out file", "--out: expected a folder or a place for one, got file (File exists)"),
        (
            "--name file --out . --overwrite",
            "--name: expected a folder or a place for one, got file (File exists)",
        ),
        (
            f"--hidden {10**15}",
            f"--hidden: expected a model that fits into memory, got widths [64, {10**15}",
        ),
        (f"--hidden {10**19}", "--hidden: expected a model that fits into memory"),
        ("--data file", "suffix"),
        ("--data cut.idx --labels y.idx", "cut.idx: expected 160 bytes of data"),
        ("--data cut.gz --labels y.idx", "cut.gz"),
        ("--data x.idx", "labels"),
        ("--data x.idx --labels few.idx", "40 labels"),
        ("--data pets.csv --target size", "'size'"),
        ("--data nan.csv", "column 'b'"),
        ("--data inf.npz", "1 NaN or infinite"),
        ("--data unseen", "7 at index 0"),
        ("--data narrow.npz", "expected 3 features, got 2"),
        ("--data objects.npz", "objects.npz"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(
    run: Nnx, monkeypatch: pytest.MonkeyPatch, argv: str, part: str
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained before everything was checked")

    monkeypatch.setattr(nnx.Trainer, "fit", forbidden)
    Path("file").write_text("not a folder")
    x, y = idx(Path("x.idx"), np.zeros((40, 2, 2))), idx(Path("y.idx"), np.arange(40) % 2)
    Path("cut.idx").write_bytes(x.read_bytes()[:-1])
    Path("cut.gz").write_bytes(gzip.compress(x.read_bytes())[:-9])
    idx(Path("few.idx"), np.arange(39) % 2)
    assert y.exists()
    table(Path("pets.csv"))
    Path("nan.csv").write_text("a,b,kind\n1,2,x\n3,nan,y\n")
    np.savez("inf.npz", x=[[1.0], [np.inf]], y=[0, 1])
    mnist_folder(Path("unseen"), test_label=7)
    np.savez(
        "narrow.npz",
        x_train=np.ones((4, 3)),
        y_train=[0, 1] * 2,
        x_test=np.ones((1, 2)),
        y_test=[0],
    )
    np.savez("objects.npz", x=np.array([[None]]), y=np.array([0]))
    fails(run("train", *argv.split()), "train", part)
    assert not Path("runs").exists()


def test_labels_beyond_mnists_ten_are_refused(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_DATA", str(mnist_folder(Path("images"), test_label=10)))
    fails(run("train", "--data", "mnist"), "train", "10 classes", "got 10 at index 0")


def test_a_missing_extra_is_named(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("pets.csv"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(run("train", "--data", "pets.csv"), "train", "pip install 'nnx-xp[data]'")


@pytest.mark.usefixtures("trained")
def test_no_gpu_is_said_in_one_line(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str | None) -> Backend:
        raise BackendUnavailable("no device\nat all")

    monkeypatch.setattr(cli, "resolve", unavailable)
    fails(run("train", "--backend", "cupy"), "train", "no device at all")
    fails(run("evaluate", "runs/digits-0001", "--backend", "cupy"), "evaluate", "no device at all")


def test_the_backend_comes_from_the_flag_else_from_the_environment(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNX_BACKEND", "nonsense")
    fails(run("train", *SHORT), "train", "unknown backend 'nonsense'")
    assert run("train", *SHORT, "--backend", "numpy", "--name", "mine").status == 0
    assert run("evaluate", "runs/mine", "--backend", "numpy").status == 0
    fails(run("evaluate", "runs/mine"), "evaluate", "unknown backend 'nonsense'")


def test_what_auto_falls_back_on_is_a_warning_of_one_line(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(device: int | None) -> Backend:
        raise BackendUnavailable("no device")

    monkeypatch.setattr(nnx.backends, "_cupy_backend", unavailable)
    result = run("train", *SHORT, "--backend", "auto")
    assert result.status == 0
    assert re.fullmatch(r"nnx train: warning: [^\n]*no device[^\n]*\n", result.err)
    assert config("runs/digits-0001")["settings"]["backend"] == "numpy"


@pytest.mark.parametrize("argv", [(), ("fly",), ("predict", "runs/x"), ("train", "--epoch", "3")])
def test_bad_usage_is_one_line(run: Nnx, argv: tuple[str, ...]) -> None:
    result = run(*argv)
    assert result.status == 2
    assert re.fullmatch(r"nnx[ a-z]*: error: [^\n]+--help\n", result.err)


def test_bad_usage_names_the_help_of_its_command(run: Nnx) -> None:
    fails(run("evaluate", "runs/x", "--json"), "evaluate", "--json; see nnx evaluate --help")


def test_debug_shows_the_traceback(run: Nnx) -> None:
    result = run("train", "--data", "nothing", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("nnx train: error: ")


def test_a_mistake_of_ours_is_not_dressed_up_as_bad_input(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(nnx.Trainer, "fit", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("train")


def test_divergence_is_a_failure_with_its_history(run: Nnx) -> None:
    result = run("train", *SHORT, "--lr", "1e30")
    fails(result, "train", "loss became", "runs/digits-0001/history.csv", status=1)
    assert len(Path("runs/digits-0001/history.csv").read_text().splitlines()) == 2


# ---- Ctrl-C, terminals, pipes --------------------------------------------------------------------


def test_an_interrupted_training_is_saved(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = nnx.Trainer._fit_epoch

    def interrupted(self: nnx.Trainer, *args: Any) -> Any:
        if self.epoch == 2:
            raise KeyboardInterrupt
        return epoch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(nnx.Trainer, "_fit_epoch", interrupted)
        result = run("train", "--hidden", "16", "--epochs", "9", "--name", "cut")
    assert result.status == 130
    line = "nnx train: interrupted in epoch 3 of 9; the model and the history so far are in "
    assert result.err == line + "runs/cut\n"
    assert {path.name for path in Path("runs/cut").iterdir()} == FILES
    assert config("runs/cut")["metrics"] == {"epochs": 2, "interrupted": True}
    assert run("train", *SHORT, "--name", "whole").status == 0
    cut, whole = (Path("runs", n, "model.safetensors").read_bytes() for n in ("cut", "whole"))
    assert cut == whole


def test_a_disk_that_fills_up_is_a_failure_of_one_line(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nnx, "save", full)
    fails(run("train", *SHORT), "train", "No space left on device", status=1)


def test_an_interrupt_elsewhere_is_one_line(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nnx.data, "load", interrupted)
    result = run("train")
    assert (result.status, result.err) == (130, "nnx train: interrupted\n")


def test_an_interrupt_before_there_is_a_command_is_one_line(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    result = run("train")
    assert (result.status, result.err) == (130, "nnx: interrupted\n")


def test_an_interrupt_while_the_command_is_imported_is_one_line() -> None:
    Path("tomllib.py").write_text("raise KeyboardInterrupt")  # found before the standard library's
    paths = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(ROOT)])}
    command = [sys.executable, "-m", "nnx", "train"]
    result = subprocess.run(
        command, env=environment() | paths, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (130, "nnx: interrupted\n")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal of 200 columns: the user's, and the program's."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    os.set_blocking(leader, False)
    yield leader, follower
    os.close(leader)
    os.close(follower)


def shown(leader: int, until: str, seconds: float = 60) -> str:
    """Wait for a text to appear in the terminal; what was shown up to there."""
    text, deadline = "", time.monotonic() + seconds
    while until not in text:
        assert time.monotonic() < deadline, text
        if select.select([leader], [], [], 1)[0]:
            text += os.read(leader, 65_536).decode()
    return text


def test_a_terminal_has_a_progress_bar_and_control_c_stops_it(terminal: tuple[int, int]) -> None:
    leader, follower = terminal
    child = subprocess.Popen(
        [sys.executable, "-m", "nnx", "train", "--epochs", "100000", "--hidden", "16"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=follower,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "step/s" in shown(leader, until="val_accuracy=")  # the first epoch has ended
        child.send_signal(signal.SIGINT)
        rest = shown(leader, until="runs/digits-0001")
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        child.wait()
    assert rest.splitlines()[-1].startswith("nnx train: interrupted in epoch ")
    assert {path.name for path in Path("runs/digits-0001").iterdir()} == FILES


def test_quiet_has_no_progress_bar_in_a_terminal_either(terminal: tuple[int, int]) -> None:
    leader, follower = terminal
    command = [sys.executable, "-m", "nnx", "train", *SHORT, "--quiet"]
    subprocess.run(command, env=environment(), stderr=follower, check=True, timeout=60)
    with pytest.raises(BlockingIOError):
        os.read(leader, 1)


def test_a_pipe_has_no_progress_bar() -> None:
    command = [sys.executable, "-m", "nnx", "train", *SHORT]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.usefixtures("trained")
def test_a_reader_that_has_seen_enough_is_no_error(run: Nnx) -> None:
    np.save("many.npy", np.zeros((50_000, 64), np.float32))  # more than a pipe holds
    command = [sys.executable, "-m", "nnx", "predict", "runs/digits-0001", "--data", "many.npy"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"index,class,probability\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 0


def test_a_training_whose_reader_has_gone_is_saved() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "nnx", "train", *SHORT]
    result = subprocess.run(
        command, env=environment(), stdout=theirs, stderr=subprocess.PIPE, timeout=60
    )
    os.close(theirs)
    assert (result.returncode, result.stderr) == (0, b"")
    assert {path.name for path in Path("runs/digits-0001").iterdir()} == FILES


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "command", [f"train {' '.join(SHORT)}", "predict runs/digits-0001 --data rows.npy", "info"]
)
def test_a_closed_output_is_no_error_and_goes_nowhere_else(command: str, closed: str) -> None:
    np.save("rows.npy", np.zeros((3, 64), np.float32))
    shell = (
        f"exec {shlex.quote(sys.executable)} -m nnx {command} {2 if closed == 'stderr' else 1}>&-"
    )
    result = subprocess.run(
        ["sh", "-c", shell], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert bool(result.stdout) == (closed == "stderr")


# ---- evaluate ------------------------------------------------------------------------------------


def test_evaluate_repeats_the_figures_of_the_training(
    run: Nnx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table(Path("pets.csv"))
    for data in ("digits", "pets.csv"):
        assert run("train", "--data", data, *SHORT, "--seed", "2").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # relative paths are remembered as absolute ones
    for name, n in (("digits", 359), ("pets", 18)):
        result = run("evaluate", f"../runs/{name}-0001")
        assert (result.status, result.err) == (0, "")
        metrics = config(f"../runs/{name}-0001")["metrics"]
        expected = f"loss {metrics['test_loss']:.4f}  accuracy {metrics['test_accuracy']:.4f}"
        assert result.out.startswith(f"{expected}  ({n} samples of {name}")


def test_evaluate_refuses_a_test_set_that_has_changed(run: Nnx) -> None:
    assert run("train", "--data", table(Path("pets.csv")), *SHORT).status == 0
    table(Path("pets.csv"), seed=1)
    fails(run("evaluate", "runs/pets-0001"), "evaluate", "pets.csv", "changed")


@pytest.mark.usefixtures("trained")
def test_evaluate_other_data_with_the_classes_and_scales_of_the_training(run: Nnx) -> None:
    rows = table(Path("all.csv"), seed=1).read_text().splitlines()
    Path("owls.csv").write_text("\n".join([rows[0], *(row for row in rows if "owl" in row)]))
    result = run("evaluate", "runs/pets-0001", "--data", "owls.csv")
    assert "accuracy 1.0000  (30 samples of owls.csv)" in result.out


def test_evaluate_other_data_uses_their_test_set_where_they_have_one(run: Nnx) -> None:
    mnist_folder(Path("images"))
    assert run("train", "--data", "images", *SHORT).status == 0
    assert "(4 samples" in run("evaluate", "runs/images-0001", "--data", "images").out
    assert run("train", *SHORT).status == 0
    assert "(359 samples" in run("evaluate", "runs/digits-0001", "--data", "digits").out


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--data nothing.csv", "nothing.csv"),
        ("--data fox.csv", "'fox'"),
        ("--data wide.csv", "got 3"),
        ("--data swapped.csv", "b, a"),
        ("--data size.csv --target b", "expected 2 feature columns a, b, got 2: a, size"),
        ("--data wide.npz", "expected 2 features, got 3"),
        ("--data huge.npz", "finite"),
        ("--target kind", "--data"),
        ("--labels y.npy", "--data"),
    ],
)
def test_evaluate_refuses_data_that_do_not_fit(run: Nnx, argv: str, part: str) -> None:
    Path("fox.csv").write_text("a,b,kind\n1,2,cat\n3,4,fox\n")
    Path("wide.csv").write_text("a,b,c,kind\n1,2,3,cat\n")
    Path("size.csv").write_text("a,size,b\n1,2,3\n")
    Path("swapped.csv").write_text("b,a,kind\n1,2,cat\n")
    np.savez("wide.npz", x=np.ones((1, 3)), y=["cat"])
    np.savez("huge.npz", x=np.full((1, 2), 3.4e38), y=["cat"])
    small_scale()
    fails(run("evaluate", "runs/pets-0001", *argv.split()), "evaluate", part)


def small_scale() -> None:
    """Let the run on the pets divide by so little that the largest numbers overflow."""
    path = Path("runs/pets-0001/config.json")
    path.write_text(re.sub(r'"scale": \[\s*[^,]+', '"scale": [ 0.001', path.read_text()))


def damage(text: str, **changes: Any) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    "damaged",
    [
        "no folder",
        "no config",
        "config cut",
        "config of something else",
        "config without a key",
        "config with a wrong type",
        "config with an unknown setting",
        "config with other features",
        "config with other classes",
        "config not text",
        "no model",
        "model cut",
        "model of something else",
    ],
)
def test_a_damaged_run_is_one_line(run: Nnx, command: str, damaged: str) -> None:
    folder = Path("runs/digits-0001")
    path, model = folder / "config.json", folder / "model.safetensors"
    text = path.read_text()
    content = json.loads(text)
    changes: dict[str, Callable[[], object]] = {
        "no folder": lambda: folder.rename("elsewhere"),
        "no config": path.unlink,
        "config cut": lambda: path.write_text(text[:-100]),
        "config of something else": lambda: path.write_text("[1, 2]"),
        "config without a key": lambda: path.write_text(text.replace("classes", "kinds")),
        "config with a wrong type": lambda: path.write_text(damage(text, n_features="64")),
        "config with an unknown setting": lambda: path.write_text(
            damage(text, settings=content["settings"] | {"colour": 1})
        ),
        "config with other features": lambda: path.write_text(damage(text, n_features=63)),
        "config with other classes": lambda: path.write_text(damage(text, classes=[0, 1])),
        "config not text": lambda: path.write_bytes(b"\xff\xfe\x00"),
        "no model": model.unlink,
        "model cut": lambda: model.write_bytes(model.read_bytes()[:-9]),
        "model of something else": lambda: model.write_bytes(b"PK" * 100),
    }
    changes[damaged]()
    np.save("x.npy", np.zeros((3, 64)))
    argv = ("--data", "x.npy") if command == "predict" else ()
    fails(run(command, "runs/digits-0001", *argv), command, "runs/digits-0001")


# ---- predict -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("trained")
def test_predict_writes_class_and_probability(run: Nnx) -> None:
    result = run("predict", "runs/pets-0001", "--data", "pets.csv")
    assert (result.status, result.err) == (0, "")
    header, *rows = result.out.splitlines()
    assert header == "index,class,probability"
    scale = config("runs/pets-0001")["standardizer"]
    features, _ = nnx.data.read_table("pets.csv")
    x = (features.astype(np.float64) - scale["mean"]) / scale["scale"]
    model = nnx.load("runs/pets-0001/model.safetensors")
    for index, (row, logits) in enumerate(zip(rows, model(x.astype(np.float32)), strict=True)):
        powers = [np.exp(float(z)) for z in logits]
        found = row.split(",")
        assert found[:2] == [str(index), CLASSES[int(np.argmax(powers))]]
        assert float(found[2]) == pytest.approx(max(powers) / sum(powers), abs=1e-5)


@pytest.mark.usefixtures("trained")
def test_predict_to_a_file(run: Nnx) -> None:
    np.save("x.npy", np.zeros((3, 64)))
    shown = run("predict", "runs/digits-0001", "--data", "x.npy").out
    result = run("predict", "runs/digits-0001", "--data", "x.npy", "--out", "p.csv")
    assert (result.status, result.out) == (0, "")
    assert Path("p.csv").read_bytes().decode() == shown
    bad = run("predict", "runs/digits-0001", "--data", "x.npy", "--out", "x.npy/p.csv")
    fails(bad, "predict", "--out: expected a file that can be written, got x.npy/p.csv (Not a")


def test_predict_leaves_the_label_out_wherever_it_stands(run: Nnx) -> None:
    table(Path("pets.csv"), label_first=True)
    assert run("train", "--data", "pets.csv", "--target", "kind", *SHORT).status == 0
    labeled = run("predict", "runs/pets-0001", "--data", "pets.csv")
    rows = [line.partition(",")[2] for line in Path("pets.csv").read_text().splitlines()]
    Path("unlabeled.csv").write_text("\n".join(rows))
    unlabeled = run("predict", "runs/pets-0001", "--data", "unlabeled.csv")
    assert labeled.status == 0
    assert labeled.out == unlabeled.out
    assert len(labeled.out.splitlines()) == 91


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("missing.csv", "missing.csv"),
        ("narrow.csv", "expected 2 feature columns a, b, got 1: a"),
        ("swapped.csv", "expected 2 feature columns a, b, got 2: b, a"),
        ("words.csv", "'one'"),
        ("narrow.npy", "expected 2 features, got 1"),
        ("nan.npy", "NaN"),
        ("huge.npy", "standardized: expected finite features"),
        ("folder", "folder"),
    ],
)
def test_predict_refuses_features_that_do_not_fit(run: Nnx, data: str, part: str) -> None:
    Path("narrow.csv").write_text("a,kind\n1,cat\n")
    Path("swapped.csv").write_text("b,a,kind\n1,2,cat\n")
    Path("words.csv").write_text("a,b\n1,one\n")
    np.save("narrow.npy", np.ones((2, 1)))
    np.save("nan.npy", np.full((2, 2), np.nan))
    np.save("huge.npy", np.full((2, 2), 3.4e38))
    small_scale()
    Path("folder").mkdir()
    fails(run("predict", "runs/pets-0001", "--data", data), "predict", part)


def test_probabilities_of_huge_logits_are_finite() -> None:
    text = cli._csv(["no", "yes"], np.array([[-1e30, 1e30], [5e4, 5e4]], np.float32))
    assert text == "index,class,probability\n0,yes,1.000000\n1,no,0.500000\n"


def test_an_output_that_is_not_finite_is_no_prediction() -> None:
    with pytest.raises(cli.CliError, match="sample 1") as error:
        cli._csv([0, 1], np.array([[0, 1], [np.nan, 1]]))
    assert error.value.status == 1


# ---- info, version, help -------------------------------------------------------------------------


def test_info_says_what_is_installed(run: Nnx) -> None:
    text = run("info")
    assert (text.status, text.err) == (0, "")
    assert re.search(rf"^numpy +{re.escape(np.__version__)}$", text.out, re.MULTILINE)
    info = json.loads(run("info", "--json").out)
    assert info["versions"]["nnx"] == nnx.__version__
    assert info["backends"][0] == "numpy"
    assert info["blas"]["threads"] >= 1
    assert info["cpus"]["all"] >= info["cpus"]["usable"] >= 1


@pytest.mark.kernels
def test_info_describes_the_c_kernels(run: Nnx) -> None:
    cpu: Any = numpy_backend.CPU
    before = cpu.info()["threads"]
    cpu.set_num_threads(2)
    try:
        info, text = json.loads(run("info", "--json").out)["kernels"], run("info").out
        expected = {"built": True, "used": True, "switched_off": False, **cpu.info()}
    finally:
        cpu.set_num_threads(before)
    assert info == expected
    assert info["instructions"] in ("baseline", "avx2", "avx512")
    threads = "OpenMP, 2 threads" if info["openmp"] else "no OpenMP"
    line = rf"^C kernels +{info['instructions']}, {threads}$"
    assert re.search(line, text, re.MULTILINE)


def test_info_says_why_there_are_no_c_kernels(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_backend, "CPU", None)
    find = importlib.util.find_spec
    for built, off, state in (
        (False, "", "not built"),
        (False, "1", "not built"),
        (True, "1", "off (by NNX_DISABLE_CPU_KERNELS)"),
        (True, "", "built, but not from these sources or for this Python and NumPy"),
    ):

        def found(name: str, package: Any = None, built: bool = built) -> Any:
            return (built or None) if name.endswith("._cpu") else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setenv("NNX_DISABLE_CPU_KERNELS", off)
        assert re.search(rf"^C kernels +{re.escape(state)}$", run("info").out, re.MULTILINE)
        kernels = json.loads(run("info", "--json").out)["kernels"]
        assert (kernels["used"], kernels["instructions"]) == (False, None)
        assert kernels["built"] is built


def test_info_survives_whatever_is_wrong_with_cupy(
    run: Nnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Backend:
        raise AttributeError("libcuda\nis from 2012")

    monkeypatch.setattr(cli, "get_backend", broken)
    result = run("info")
    assert result.status == 0
    assert re.search(r"^no GPU +AttributeError: libcuda is from 2012$", result.out, re.MULTILINE)
    info = json.loads(run("info", "--json").out)
    assert (info["backends"], info["devices"]) == (["numpy"], [])


def test_info_lists_devices(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCupy:
        class cuda:
            class runtime:
                @staticmethod
                def getDeviceProperties(device: int) -> dict[str, Any]:
                    name = f"Device {device}".encode()
                    return {"name": name, "totalGlobalMem": 3 * 2**30, "major": 9, "minor": 0}

    monkeypatch.setitem(sys.modules, "cupy", FakeCupy)
    monkeypatch.setattr(cli, "get_backend", lambda name: None)
    monkeypatch.setattr(cli, "available", lambda: ("numpy", "cupy:0", "cupy:1"))
    text = run("info").out
    assert "numpy, cupy:0, cupy:1" in text
    assert re.search(r"^cupy:1 +Device 1, 3\.0 GiB, compute capability 9\.0$", text, re.MULTILINE)
    assert "no CuPy" not in text


@pytest.mark.gpu
def test_info_lists_the_device_that_is_there(run: Nnx) -> None:
    info = json.loads(run("info", "--json").out)
    assert info["devices"][0]["name"] == "cupy:0"
    assert info["devices"][0]["memory"] > 0
    assert info["cupy_problem"] is None
    cuda = info["cuda"]
    assert cuda["driver"] >= 12000
    assert cuda["nvrtc"] >= 12000
    assert 10 * float(info["devices"][0]["compute_capability"]) == cuda["capability"]
    assert cuda["tf32"] is False
    text = run("info").out
    assert re.search(
        r"^CUDA +\S+ \S+, built for CUDA \d+\.\d, .*driver for CUDA", text, re.MULTILINE
    )
    assert re.search(r"^TF32 +off", text, re.MULTILINE)


def test_info_reads_threads_from_the_environment(run: Nnx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    for names in cli._THREADS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert cli._blas_threads("openblas") == (cli._usable_cpus(), "CPU count")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cli._blas_threads("scipy-openblas") == (7, "OMP_NUM_THREADS")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    assert cli._blas_threads("scipy-openblas") == (5, "OPENBLAS_NUM_THREADS")
    assert cli._blas_threads("mkl") == (7, "OMP_NUM_THREADS")
    assert re.search(r"^OMP_NUM_THREADS +7$", run("info").out, re.MULTILINE)


@pytest.mark.parametrize("argv", [("--version",), ("--help",), ("train", "--help")])
def test_help_and_version_are_light(argv: tuple[str, ...]) -> None:
    heavy = "pyarrow", "matplotlib", "cupy", "tqdm", "safetensors"
    code = (
        f"import sys; from nnx.cli import main; status = main({argv!r}); "
        f"assert status == 0; print([m for m in {heavy!r} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_version(run: Nnx) -> None:
    assert run("--version").out == f"nnx {nnx.__version__}\n"


@pytest.mark.parametrize("command", ["", "train", "evaluate", "predict", "bench", "info"])
def test_help_has_examples_that_parse(run: Nnx, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.status == 0
    examples = re.findall(r"^  nnx (.*?)(?:  .*)?$", result.out, re.MULTILINE)
    assert examples
    for example in examples:
        cli._parser().parse_args(example.split())


def test_the_config_file_in_the_help_is_valid(run: Nnx) -> None:
    lines = run("train", "--help").out.splitlines()
    Path("run.toml").write_text(
        "\n".join(line for line in lines if re.match(r"  [a-z-]+ = ", line))
    )
    assert len(cli._read_config("run.toml")) == 4


def test_every_default_is_in_the_help(run: Nnx) -> None:
    text = " ".join(run("train", "--help").out.split())
    for name in ("digits", "0.2", "256", "relu", "adam", "0.001 for adam", "runs", "float32"):
        assert f"(default: {name}" in text
