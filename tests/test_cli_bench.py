"""The command `nnx bench`: what it prints and writes, and how it ends. No test goes by a time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnx import bench
from nnx.backends import get_backend
from nnx.bench import Case, Place, Variant
from nnx.cli import main

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("bench", "--seconds", "0")

Output = tuple[int, str, str]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Output]:
    """Call `main` in this process, in small and in a folder of its own; status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNX_BACKEND", raising=False)
    monkeypatch.setenv("NNX_BENCH_SMOKE", "1")

    def call(*argv: str) -> Output:
        return main(argv), *capsys.readouterr()

    return call


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the cases by one that works and one that does this when it is prepared."""

    def replace(error: BaseException) -> None:
        def prepare(place: Place) -> list[Variant]:
            raise error

        good = Case("kernels", "good", lambda place: [Variant("nnx", int, 1, "bytes")])
        bad = Case("kernels", "bad", prepare)
        monkeypatch.setattr(bench, "cases", lambda sections: [good, bad, good])

    return replace


@pytest.mark.parametrize("backend", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_it_measures_everything_and_says_where(run: Callable[..., Output], backend: str) -> None:
    status, out, err = run(*QUICK, "--backend", backend)
    assert (status, err) == (0, "")
    for text in (*(c.name for c in bench.cases()), *bench.SECTIONS.values(), bench.NOTES):
        assert text in out
    assert re.search(rf"^measured  float32 on {backend}, 0 s a row; .*SMOKE", out, re.M)
    assert re.search(r"^BLAS +\S+ \S+, threads: \d+ \(by .*\)$", out, re.M)
    assert re.search(r"^CPU +\S.*, \d+ usable of \d+", out, re.M)
    assert ("bound" in out) == ("CUDA  " in out) == (backend == "cupy")
    assert ("nnx graph" in out) == get_backend(backend).graphs
    assert "\r" not in out
    assert "\033" not in out
    assert out.isascii()


@pytest.mark.parametrize("target", [(), ("-",)])
def test_json_takes_the_place_of_the_table(run: Callable[..., Output], target: Any) -> None:
    settings = "--only", "predict,steps", "--dtype", "float64"
    status, out, err = run(*QUICK, *settings, "--json", *target)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["settings"] == {
        "backend": "numpy",
        "dtype": "float64",
        "seconds": 0,
        "sections": ["predict", "steps"],
        "smoke": True,
    }
    assert found["complete"] is True
    names = [c.name for c in bench.cases(["steps", "predict"])]
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        step, *_, products = row["readings"]
        assert row["baseline"] == products["name"] == "products"
        assert step["time"].keys() == {"median", "mad", "q1", "q3", "min", "max", "n"}
        assert step["ratio"]["median"] > 0
        assert step["host"] is step["device"] is step["bound"] is None
    machine = found["machine"]
    assert machine.keys() >= {"versions", "platform", "cpu", "cpus", "blas"}
    assert machine["versions"].keys() == {"python", "nnx", "numpy"}


def test_json_goes_into_a_file_beside_the_table(run: Callable[..., Output]) -> None:
    status, out, _ = run(*QUICK, "--only", "products", "--json", "bench.json")
    assert status == 0
    assert "matrix products" in out
    assert len(json.loads(Path("bench.json").read_text())["rows"]) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--only", "steps,gemm"), "expected some of steps,kernels,products,predict, got"),
        (("--only", ""), "expected some of"),
        (("--seconds", "-1"), "expected a number of seconds, got '-1'"),
        (("--seconds", "nan"), "expected a number of seconds, got 'nan'"),
        (("--seconds", "inf"), "expected a number of seconds, got 'inf'"),
        (("--seconds", "long"), "expected a number of seconds"),
        (("--dtype", "float16"), "invalid choice: 'float16'"),
        (("--backend", "tpu"), "unknown backend 'tpu'"),
        (("--json", "no/such/folder.json"), "no/such/folder.json"),
    ],
)
def test_wrong_usage_is_one_line(
    run: Callable[..., Output], argv: tuple[str, ...], message: str
) -> None:
    status, out, err = run("bench", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("nnx bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_row_without_room_does_not_stop_the_others(
    run: Callable[..., Output], rows: Callable[..., None]
) -> None:
    rows(MemoryError("no room for 3 TiB"))
    status, out, err = run(*QUICK)
    assert (status, err) == (0, "")
    assert re.search(r"^bad   no room for 3 TiB$", out, re.M)
    assert len(re.findall(r"^good  nnx ", out, re.M)) == 2


def test_a_row_that_fails_ends_in_status_1(
    run: Callable[..., Output], rows: Callable[..., None]
) -> None:
    rows(RuntimeError("lost"))
    status, out, err = run(*QUICK)
    assert (status, err) == (1, "nnx bench: error: 1 rows failed: bad (see with --debug)\n")
    assert re.search(r"^bad   RuntimeError: lost$", out, re.M)
    assert len(re.findall(r"^good  nnx ", out, re.M)) == 2
    with pytest.raises(RuntimeError, match="lost"):
        run(*QUICK, "--debug")


@pytest.mark.parametrize("target", [(), ("--json",), ("--json", "bench.json")])
def test_an_interruption_leaves_what_was_measured(
    run: Callable[..., Output], rows: Callable[..., None], target: tuple[str, ...]
) -> None:
    rows(KeyboardInterrupt())
    status, out, err = run(*QUICK, *target)
    assert (status, err) == (130, "nnx bench: interrupted after 1 of 3 rows\n")
    assert "good" in out
    if target:
        found = json.loads(out if len(target) == 1 else Path("bench.json").read_text())
        assert found["complete"] is False
        assert [row["name"] for row in found["rows"]] == ["good"]


def test_ctrl_c_ends_the_process(tmp_path: Path) -> None:
    settings = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "NNX_BENCH_SMOKE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nnx", "bench", "--only", "products", "--seconds", "60"],
        cwd=tmp_path,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # where the tests run in the background, Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("measured"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "nnx bench: interrupted after 0 of 3 rows\n")


def test_what_is_being_measured_shows_on_a_terminal_only(
    run: Callable[..., Output], rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(MemoryError())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, out, err = run(*QUICK)
    assert "\r\033[K2 of 3: bad\r\033[K" in err
    assert "\r" not in out


def test_the_command_imports_what_it_uses() -> None:
    code = "import sys, nnx.cli; print('nnx.bench' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
