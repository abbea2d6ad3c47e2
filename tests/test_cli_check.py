"""The command `nnx check`: what it prints and writes, and how it ends."""

import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import Result, call

import nnx
from nnx.backends import get_backend, numpy_backend
from nnx.cli import main

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cat", "dog", "owl")


Check = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Check:
    """Call `nnx check` in this process."""
    return functools.partial(call, capsys, "check")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, without the user's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNX_BACKEND", raising=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pets.csv, and a run on it of each optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = np.stack([10.0 * labels, -1000.0 * labels], axis=1) + rng.normal(size=(90, 2))
    lines = [f"{a:.4f},{b:.4f},{CLASSES[k]}" for (a, b), k in zip(features, labels, strict=True)]
    (folder / "pets.csv").write_text("\n".join(["a,b,kind", *lines]) + "\n")
    common = ("train", "--data", str(folder / "pets.csv"), "--out", str(folder), "--hidden", "8")
    short = ("--epochs", "2", "--backend", "numpy", "--quiet")
    assert main([*common, *short, "--name", "adam"]) == 0
    sgd = ("--optimizer", "sgd", "--momentum", "0.9", "--dtype", "float64")
    assert main([*common, *short, "--name", "sgd", *sgd]) == 0
    return folder


def fails(result: Result, *parts: str, status: int = 2) -> None:
    """Check the status, and that standard error is one line that holds all `parts`."""
    assert result.status == status, result.err
    assert re.fullmatch(r"nnx check: error: [^\n\r]+\n", result.err), result.err
    for part in parts:
        assert part in result.err


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


# ---- the library -----------------------------------------------------------------------------


def test_check_alone_confirms_everything_on_numpy(run: Check) -> None:
    result = run("--steps", "5")
    assert (result.status, result.err) == (0, "")
    title, head, *rows, summary = result.out.splitlines()
    assert title == "nnx's layers, losses and optimizers on numpy"
    assert head.split() == ["what", "compared", "worst", "error", "ulp", "bound"]
    assert len(rows) > 150
    assert all(row.endswith("  pass") for row in rows)
    assert summary == f"{len(rows)} of {len(rows)} checks passed (numpy)"
    for part in ("Linear", "SoftmaxNLL, all of them", "Lion", "dropout masks", "digits by Adam"):
        assert part in result.out
    assert "float32" in result.out
    assert max(map(len, rows)) <= 100


def test_one_dtype(run: Check) -> None:
    result = run("--steps", "5", "--dtype", "float32", "--seed", "3")
    assert result.status == 0
    assert "numpy to plain xp, float32" in result.out
    assert "numpy to plain xp, float64" not in result.out


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_a_gpu_is_confirmed(run: Check, runs: Path) -> None:
    result = run(runs / "adam", "--steps", "4", "--backend", "cupy", "--json", "gpu.json")
    assert (result.status, result.err) == (0, "")
    assert "cupy to numpy, float32" in result.out
    content = json.loads(Path("gpu.json").read_text())
    assert content["environment"]["backend"] == "cupy"
    assert content["environment"]["device"]
    assert content["environment"]["versions"]["cupy"]


# ---- runs and models -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("adam", "float32"), ("sgd", "float64")])
def test_a_run_is_checked_on_its_own_data(run: Check, runs: Path, name: str, dtype: str) -> None:
    result = run(runs / name, "--steps", "9")
    assert (result.status, result.err) == (0, "")
    title = result.out.splitlines()[0]
    assert title.startswith("Sequential, SoftmaxNLL, " + {"adam": "Adam(", "sgd": "SGD("}[name])
    assert f"numpy to plain xp, {dtype}" in result.out
    assert "loss over 9 steps" in result.out
    assert "gradients of 0 (Linear)" in result.out


def test_a_run_is_checked_in_another_dtype_and_on_other_data(run: Check, runs: Path) -> None:
    shutil.copy(runs / "pets.csv", "other.csv")
    result = run(runs / "adam", "--steps", "2", "--dtype", "float64", "--data", "other.csv")
    assert result.status == 0
    assert "plain xp, float64" in result.out
    fails(run(runs / "adam", "--data", "none.csv"), "none.csv")
    Path("bad.csv").write_text("a,kind\n1,cat\n2,dog\n")
    fails(run(runs / "adam", "--data", "bad.csv"), "expected 2 feature columns")


def test_a_model_file_is_checked(run: Check, runs: Path) -> None:
    nnx.save(nnx.mlp([2, 5, 3], activation="gelu"), "model.safetensors")
    result = run("model.safetensors", "--steps", "3")
    assert result.status == 0
    assert "gradients of 1 (GELU)" in result.out
    result = run("model.safetensors", "--steps", "3", "--data", runs / "pets.csv")
    assert result.status == 0
    nnx.save(nnx.mlp([2, 5, 2]), "small.safetensors")
    fails(run("small.safetensors", "--data", runs / "pets.csv"), "label")
    nnx.save(nnx.mlp([7, 5, 3]), "wide.safetensors")
    fails(run("wide.safetensors", "--data", runs / "pets.csv"), "last axis 7")


def test_models_that_cannot_be_checked_are_input_errors(run: Check) -> None:
    fails(run("nothing"), "nothing: expected a run of nnx train")
    Path("junk.safetensors").write_text("junk")
    fails(run("junk.safetensors"), "junk.safetensors is not a model file")
    nnx.save(nnx.Sequential(nnx.Tanh()), "empty.safetensors")
    fails(run("empty.safetensors"), "empty.safetensors: expected a model")


# ---- failing ---------------------------------------------------------------------------------


def test_a_check_that_fails_is_status_1(
    run: Check, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(get_backend("numpy"))
    right = kind.dropout

    def wrong(self: Any, x: Any, p: float, **draw: Any) -> Any:
        y, mask = right(self, x, p, **draw)
        return (y * 1.001 if type(self) is kind else y), mask

    monkeypatch.setattr(kind, "dropout", wrong)
    result = run(runs / "adam", "--steps", "3", "--json", "out.json")
    fails(result, "checks failed", status=1)
    assert re.search(r"^activations .* FAIL$", result.out, re.M)
    assert "first divergence: step 0, 2 (Dropout), output at [" in result.out
    content = json.loads(Path("out.json").read_text())
    assert content["passed"] is False
    assert content["first_divergence"]["layer"] == "2 (Dropout)"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--steps", "0"), ("--steps: expected 1 to 200, got 0",)),
        (("--steps", "201"), ("--steps: expected 1 to 200, got 201",)),
        (("run", "--steps", "0"), ("--steps: expected at least 1, got 0",)),
        (("--seed", "-1"), ("--seed: expected at least 0",)),
        (("--data", "digits"), ("expected a RUN or MODEL with them",)),
        (("run", "--target", "kind"), ("expected --data with them",)),
        (("--backend", "nope"), ("unknown backend 'nope'",)),
        (("--json", "."), ("--json: expected a file to write, got .", "before --json")),
        (("--json", "no/where.json"), ("--json: expected a file to write",)),
        (("--json", "model.safetensors"), ("--json: expected a new file", "before --json")),
    ],
)
def test_wrong_arguments_are_one_line(run: Check, argv: Any, parts: Any) -> None:
    Path("model.safetensors").write_bytes(b"a model")
    result = run(*argv)
    fails(result, *parts)
    assert result.out == ""
    assert Path("model.safetensors").read_bytes() == b"a model"


def test_wrong_choices_are_said_by_argparse(run: Check) -> None:
    result = run("--dtype", "float16")
    assert result.status == 2
    assert "nnx check: error: argument --dtype: invalid choice" in result.err


def test_a_backend_that_is_not_there_is_an_input_error(
    run: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Any) -> Any:
        raise nnx.BackendUnavailable("no CUDA device")

    monkeypatch.setattr(nnx.backends, "_cupy_backend", none)
    fails(run("--backend", "cupy"), "no CUDA device")
    monkeypatch.setenv("NNX_BACKEND", "cupy:7")
    fails(run(), "no CUDA device")


# ---- JSON ------------------------------------------------------------------------------------


def test_json_alone_is_all_there_is_on_the_standard_output(run: Check) -> None:
    result = run("--steps", "2", "--dtype", "float64", "--json")
    assert (result.status, result.err) == (0, "")
    content = json.loads(result.out)
    assert content["passed"] is True
    assert content["warnings"] == []
    assert content["first_divergence"] is None
    assert content["steps"] == 2
    assert content["dtype"] == "float64"
    assert content["environment"]["tf32"] is False
    assert content["environment"]["versions"]["numpy"] == np.__version__
    assert content["blas"]["threads"] >= 1
    assert content["kernels"]["used"] is (numpy_backend.CPU is not None)
    assert all(row["passed"] and row["error"] <= row["bound"] for row in content["rows"])
    same = run("--steps", "2", "--dtype", "float64", "--json", "-")
    assert json.loads(same.out) == content


# ---- as a process ----------------------------------------------------------------------------


def test_in_a_pipe_there_is_the_table_and_nothing_else() -> None:
    command = [sys.executable, "-m", "nnx", "check", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("checks passed (numpy)")


def test_it_needs_no_pytest_and_no_torch() -> None:
    code = (
        "import sys; from nnx.cli import main; status = main(['check', '--steps', '1']);"
        "print(sorted({'pytest', 'torch', 'matplotlib', 'cupy', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_on_a_terminal_there_is_a_bar_and_control_c_ends_it_with_130(runs: Path) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    child = subprocess.Popen(
        [sys.executable, "-m", "nnx", "check", str(runs / "adam"), "--steps", "9999"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=follower,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(follower)
    try:
        shown(leader, until=".")
        child.send_signal(signal.SIGINT)
        rest = shown(leader, until="nnx check: interrupted\r\n")
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        child.wait()
        os.close(leader)
    assert "Traceback" not in rest


def shown(leader: int, until: str, seconds: float = 60) -> str:
    """Wait for a text to appear in the terminal; what was shown up to there."""
    text, deadline = "", time.monotonic() + seconds
    while until not in text:
        assert time.monotonic() < deadline, text
        if select.select([leader], [], [], 1)[0]:
            text += os.read(leader, 65_536).decode()
    return text


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "nnx check --backend cupy" in text
    assert main(["--help"]) == 0
    assert "check " in capsys.readouterr().out
