"""`nnx bench --against`: turns, what goes wrong with other processes, and what is shown of it.

Most tests put a script in the place of the worker, which answers as it is told and takes no time.
No test goes by a time that was measured.
"""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nnx
from nnx.bench import Summary, against
from nnx.bench.against import Contest, Limit, Lost, Participant, Result, Row, Table, Team
from nnx.cli import main

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ROOT / "nnx" / "bench" / "rivals"
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's /proc")

Output = tuple[int, str, str]

# Answers by what the environment says for its module: seconds of its blocks in turn, the last one
# again and again; a word instead of a number is what it does then.
FAKE = """
import json, os, sys, time
script = json.loads(os.environ["NNX_FAKE"])
module, log = sys.argv[1], os.environ["NNX_FAKE_LOG"]
def note(*words):
    with open(log, "a") as file:
        print(module, *words, file=file)
note("pid", os.getpid())
blocks = script.get(module, [1.0])
if blocks == "missing":
    print(json.dumps({"missing": f"No module named {module!r}"}), flush=True)
    sys.exit()
print(json.dumps({"versions": {"python": "3"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "prepare":
        print(json.dumps({"calls": 7}), flush=True)
        continue
    said = blocks.pop(0) if len(blocks) > 1 else blocks[0]
    note("block", request.get("calls"))
    if said == "die":
        print("the last\\nword\\n", file=sys.stderr)
        sys.exit(3)
    if said == "killed":
        os.kill(os.getpid(), 9)
    if said == "hang":
        time.sleep(600)
    if said == "babble":
        print("hello", flush=True)
        continue
    print(json.dumps({"problem" if isinstance(said, str) else "value": said}), flush=True)
"""


class Fake:
    """Tells the workers of this test how to answer, and what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch, self._log = monkeypatch, folder / "log"
        self.script = folder / "fake.py"
        self.script.write_text(FAKE)
        self._log.touch()
        monkeypatch.setattr(against, "WORKER", self.script)
        monkeypatch.setattr(against, "REST", 0.0)
        monkeypatch.setenv("NNX_FAKE_LOG", str(self._log))
        self.answer()

    def answer(self, **blocks: Any) -> None:
        """By module: seconds of each block, or what to do instead."""
        self._monkeypatch.setenv("NNX_FAKE", json.dumps(blocks))

    def asked(self, what: str) -> list[str]:
        """Lines of the log of one kind: module and what came with it."""
        lines = [line.split() for line in self._log.read_text().splitlines()]
        return [" ".join((module, *rest)) for module, kind, *rest in lines if kind == what]

    def running(self) -> list[int]:
        """Processes that are still there."""
        return [pid for pid in (int(line.split()[1]) for line in self.asked("pid")) if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Workers that take no time."""
    return Fake(monkeypatch, tmp_path)


STEP = Contest(
    *("steps", "a row", "step", {"sizes": (2, 3, 1), "batch": 4, "optimizer": "Adam"}),
    limits={"torch": Limit(0.5), "jax": Limit(2.0)},
    turns=3,
    absent=("nnx fit", "nnx graph", "products", "torch.compile", "torch products"),
)


@pytest.fixture
def team(fake: Fake) -> Iterator[Team]:
    """nnx, PyTorch and JAX."""
    with Team(["torch", "jax"], seconds=1.0) as team:
        yield team


def by_name(row: Row) -> dict[str, Result]:
    return {result.name: result for result in row.results}


# ---- turns and ratios ----------------------------------------------------------------------------


def test_they_take_turns_and_ratios_are_those_of_each_turn(fake: Fake, team: Team) -> None:
    fake.answer(with_nnx=[2.0, 4.0, 9.0], with_torch=[4.0, 4.0, 6.0], with_jax=[1.0])
    team.start([STEP])
    row = team.hold(STEP)
    assert fake.asked("block") == ["with_nnx 7", "with_torch 7", "with_jax 7"] * 3
    nnx, torch, jax = row.results
    assert (nnx.name, nnx.calls, nnx.value) == ("nnx", 7, Summary.of([2.0, 4.0, 9.0]))
    assert (nnx.ratio, nnx.limit, nnx.met) == (None, None, None)
    assert torch.ratio == Summary.of([0.5, 1.0, 1.5])
    assert torch.more == Summary.of([-2.0, 0.0, 3.0])
    assert (torch.limit, torch.met) == (Limit(0.5), False)
    assert jax.ratio == Summary.of([2.0, 4.0, 9.0])
    assert (row.failed, row.problem) == (False, None)


def test_a_budget_holds_up_to_its_bound(fake: Fake, team: Team) -> None:
    fake.answer(with_nnx=[2.0], with_torch=[4.0], with_jax=[0.99])
    team.start([STEP])
    found = by_name(team.hold(STEP))
    assert (found["torch"].met, found["jax"].met) == (True, False)


def test_a_budget_may_be_for_another_of_nnxs_ways(fake: Fake, team: Team) -> None:
    fake.answer(with_nnx=[2.0], with_torch=[3.0], with_jax=[1.0])
    limits = {"torch": Limit(0.5), "jax": Limit(1.0, by="nnx graph")}
    contest = replace(STEP, limits=limits, absent=STEP.absent[:1] + STEP.absent[2:])
    team.start([contest])
    found = by_name(team.hold(contest))
    jax = found["jax"]
    assert list(found) == ["nnx", "nnx graph", "torch", "jax"]
    assert (jax.ratio, jax.counted, jax.met) == (
        Summary.of([2.0] * 3),
        Summary.of([2.0] * 3),
        False,
    )
    values = {"nnx": [2.0, 4.0], "nnx graph": [0.5, 1.5], "jax": [1.0, 2.0]}
    judged = against._result(Result("jax"), values, contest)
    assert (judged.ratio, judged.counted) == (Summary.of([2.0, 2.0]), Summary.of([0.5, 0.75]))
    assert judged.met
    assert against._remark(judged) == "<= 1 x by nnx graph: met, 0.625"
    lost = against._result(Result("jax"), values | {"nnx graph": [0.5]}, contest)
    assert (lost.ratio, lost.limit, lost.met) == (judged.ratio, None, None)


def test_a_budget_may_be_a_difference(fake: Fake, team: Team) -> None:
    fake.answer(with_nnx=[3.0], with_torch=[2.75], with_jax=[2.5])
    limits = {"torch": Limit(0.25, more=True), "jax": Limit(0.25, more=True)}
    contest = Contest("process", "import", "import_time", limits=limits, turns=1)
    team.start([contest])
    found = by_name(team.hold(contest))
    assert list(found) == ["nnx", "numpy", "torch", "jax"]
    assert (found["torch"].met, found["jax"].met) == (True, False)


def test_a_single_call_is_a_single_turn(fake: Fake) -> None:
    with Team(["torch"], seconds=0) as team:
        team.start([STEP])
        assert [r.value and r.value.n for r in team.hold(STEP).results] == [1, 1]


def test_only_those_who_are_needed_are_started(fake: Fake, team: Team) -> None:
    softmax = next(c for c in against.contests(["kernels"]))
    team.start([softmax])
    started = sorted(line.split()[0] for line in fake.asked("pid"))
    assert started == ["with_jax", "with_nnx", "with_torch", "with_torch"]  # eager and compiled


def test_processes_end_with_the_team(fake: Fake) -> None:
    with Team(["torch"]) as team:
        team.start([STEP])
        assert len(fake.running()) == 2
    assert fake.running() == []


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_library_that_is_missing_says_what_to_install(fake: Fake, team: Team) -> None:
    fake.answer(with_jax="missing")
    with pytest.raises(ImportError, match=r"^jax: .*'with_jax'; pip install jax, .*--python jax="):
        team.start([STEP])


def test_an_interpreter_that_is_missing_is_an_error_of_its_name(fake: Fake, tmp_path: Path) -> None:
    with (
        Team(["torch"], pythons={"torch": str(tmp_path / "python")}) as team,
        pytest.raises(FileNotFoundError, match="python"),
    ):
        team.start([STEP])
    assert fake.running() == []


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        ("die", "ended with status 3: word"),
        ("killed", r"ended by SIGKILL \(out of memory\?\)"),
        ("hang", "no answer within 0.4 s"),
        ("babble", "said 'hello'"),
        ("MemoryError: 3 TiB", "MemoryError: 3 TiB"),
    ],
)
def test_one_that_is_lost_leaves_the_others_alone_and_comes_back(
    fake: Fake, team: Team, monkeypatch: pytest.MonkeyPatch, does: str, problem: str
) -> None:
    fake.answer(with_nnx=[1.0], with_torch=[2.0, does, 2.0], with_jax=[4.0])
    team.start([STEP])
    monkeypatch.setattr(against, "ANSWER", 0.4 - 1.0 if does == "hang" else 60.0)
    row = team.hold(STEP)
    assert row.failed
    found = by_name(row)
    assert re.fullmatch(problem, found["torch"].problem or "")
    assert found["torch"].value is found["torch"].ratio is None
    assert found["jax"].ratio == Summary.of([0.25] * 3)
    monkeypatch.setattr(against, "ANSWER", 60.0)
    fake.answer(with_torch=[2.0])
    assert by_name(team.hold(STEP))["torch"].ratio == Summary.of([0.5] * 3)
    assert len(fake.running()) == 3


def test_without_nnx_there_are_no_ratios(fake: Fake, team: Team) -> None:
    fake.answer(with_nnx=["die"])
    team.start([STEP])
    found = by_name(team.hold(STEP))
    assert found["torch"].value is not None
    assert (found["torch"].ratio, found["torch"].met) == (None, None)


def test_mnist_is_not_downloaded_for_it(
    fake: Fake, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NNX_DATA", raising=False)
    (epoch,) = against.contests(["mnist"])
    row = team.hold(epoch)
    assert re.fullmatch(r"needs MNIST: .*NNX_DATA.*", row.problem or "")
    assert (row.results, row.failed) == ((), False)


def test_a_child_that_is_closed_twice_is_closed(fake: Fake) -> None:
    child = against.Child("with_nnx")
    assert child.ask(60)["versions"]
    child.close()
    child.close()
    with pytest.raises((Lost, ValueError)):
        child.ask(60, do="block", calls=1)


# ---- who takes part ------------------------------------------------------------------------------


@pytest.mark.parametrize("participant", against.PARTICIPANTS, ids=lambda p: p.name)
def test_the_file_of_a_participant_has_the_functions_it_is_to_have(
    participant: Participant,
) -> None:
    tree = ast.parse((RIVALS / f"{participant.module}.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted = {*participant.functions.values(), "versions", "limit", "wait"}
    assert wanted - set(against._PROCESS) <= defined
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert ("nnx" in imported) == (participant.library == "nnx")


def test_the_rows_are_those_of_the_design() -> None:
    rows = {c.name: c for c in against.contests()}
    names = [c.name for c in against.contests([*against.SECTIONS][:-1])]
    assert len(names) == len(set(names)) == 17
    assert rows["2-3-1 batch 4, Adam"].limits == {
        "torch": (0.5, False, "nnx"),
        "jax": (1.0, False, "nnx graph"),
    }
    assert rows["784-512-512-10 batch 1024, SGD"].limits == {"products": (1.15, False, "nnx graph")}
    assert rows["softmax-NLL 512 x 32768"].limits == {"torch": (0.3, False, "nnx")}
    assert rows["Adam, 670k parameters"].limits == {"torch": (0.8, False, "nnx")}
    assert rows["import"].limits == {"numpy": (0.1, True, "nnx")}
    named = {p.name for p in against.PARTICIPANTS}
    assert all({*c.limits, *c.absent} <= named for c in rows.values())
    assert {c.point[0] for c in against.contests(["sweep"]) if c.point} == {"batch size", "width"}


@pytest.mark.parametrize("library", against.LIBRARIES)
def test_a_library_can_be_had_from_another_python(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    found = against.environment(3, python="elsewhere")
    assert "PYTHONPATH" not in found
    assert {found[name] for name in against._THREADS} == {"3"}
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert (RIVALS / f"with_{library}.py").is_file()


def test_our_own_python_finds_nnx_where_it_is_here() -> None:
    code = "import nnx; print(nnx.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=against.environment(1),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).samefile(str(nnx.__file__))


def test_one_thread_is_one_thread_for_xla_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    assert against.environment(1)["XLA_FLAGS"] == "--mine --xla_cpu_multi_thread_eigen=false"
    assert against.environment(2)["XLA_FLAGS"] == "--mine"


# ---- the worker and the libraries ----------------------------------------------------------------


def load(name: str) -> Any:
    """A file of `rivals/` as a module."""
    spec = importlib.util.spec_from_file_location(name, RIVALS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@LINUX
def test_the_worker_measures_nnx_with_so_many_processors() -> None:
    child = against.Child("with_nnx", threads=1)
    try:
        assert child.ask(60)["versions"]["nnx"] == nnx.__version__
        assert len(os.sched_getaffinity(child._process.pid)) == 1
        task = {"sizes": [2, 3, 1], "batch": 4, "optimizer": "Adam"}
        said = child.ask(60, do="prepare", function="step", task=task, seconds=0.001)
        assert said["calls"] >= 1
        assert child.ask(60, do="block", calls=2)["value"] > 0
        said = child.ask(60, do="prepare", function="step", task={**task, "batch": -1}, seconds=0)
        assert said["problem"].startswith("ValueError: ")
        memory = {"function": "step", "steps": 2, "sizes": [784, 512, 10], "batch": 64}
        memory |= {"optimizer": "Adam"}
        used = child.ask(60, do="value", function="training_memory", task=memory)["value"]
        parameters = 784 * 512 + 512 + 512 * 10 + 10
        assert used > 4 * parameters * 4  # values, gradients, two moments, in float32
        os.kill(child._process.pid, signal.SIGINT)
        assert child.ask(60, do="block", calls=1)["value"] > 0
    finally:
        child.close()


def test_a_block_lasts_until_its_last_call_is_done_and_counts_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, now = load("worker"), [0.0]
    called: list[int] = []

    def call() -> int:
        now[0] += 1.0
        called.append(len(called))
        return len(called)

    def wait(result: int) -> None:
        assert result == len(called)
        now[0] += 2.0

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = worker.Worker(SimpleNamespace(wait=wait))
    found.call = call
    assert found.block(1) == 3.0
    assert found.block(4) == (4 * 1.0 + 2.0) / 4  # and one before that isn't timed
    assert len(called) == 1 + 5
    found.steps = 10
    assert found.block(4) == 6.0 / 40


def test_calls_of_a_block_are_those_that_fit_into_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, now = load("worker"), [0.0]

    def call() -> None:
        now[0] += 0.25

    library = SimpleNamespace(step=lambda *_: call, fit=lambda *_: (call, 5), wait=lambda _: None)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    task = {"sizes": [2, 3, 1], "batch": 4, "optimizer": "SGD"}
    for function in ("step", "fit"):
        found = worker.Worker(library)
        said = found.answer({"do": "prepare", "function": function, "task": task, "seconds": 2.1})
        assert said == {"calls": 8}
        assert found.answer({"do": "block", "calls": 8}) == {"value": 0.25 / found.steps}
    said = found.answer({"do": "block", "calls": "many"})
    assert said["problem"].startswith("TypeError: ")


def test_every_function_of_nnx_can_be_measured() -> None:
    with Team([], seconds=0, smoke=True) as team:
        chosen = against.contests(["steps", "kernels", "predict", "process", "sweep"])
        team.start(chosen)
        for contest in chosen:
            row = team.hold(contest)
            assert (row.failed, row.problem) == (False, None), row
            assert all(r.value is not None for r in row.results)


@pytest.mark.torch
def test_pytorch_can_be_measured() -> None:
    with Team(["torch"], seconds=0, smoke=True) as team:
        team.participants = [p for p in team.participants if p.name != "torch.compile"]
        chosen = against.contests(["steps", "kernels", "predict"])
        team.start(chosen)
        assert set(team.versions) == {"nnx", "torch"}
        for contest in chosen:
            row = team.hold(contest)
            assert (row.failed, row.problem) == (False, None), row
            assert "torch" in by_name(row)


@pytest.mark.torch
def test_pytorch_compiled_can_be_measured() -> None:
    compiled = next(p for p in against.PARTICIPANTS if p.name == "torch.compile")
    with Team(["torch"], seconds=0, smoke=True) as team:
        team.participants = [compiled]
        (softmax, *_) = against.contests(["kernels"])
        team.start([softmax])
        (result,) = team.hold(softmax).results
        assert (result.name, result.problem) == ("torch.compile", None)


@pytest.mark.parametrize(
    "library",
    ["nnx", pytest.param("torch", marks=pytest.mark.torch), "jax", "tensorflow", "sklearn"],
)
def test_an_epoch_is_training(library: str) -> None:
    if library not in ("nnx", "torch"):
        pytest.importorskip(library)
    train, test = nnx.data.load_digits(seed=0)
    x, x_test = (np.float32(data.x) / 16 for data in (train, test))
    epoch, classify = load(f"with_{library}").epoch([64, 64, 10], 16, 0.01, x, train.t)
    before = np.mean(classify(x_test) == test.t) if library != "sklearn" else 0.1
    epoch()
    after = np.mean(classify(x_test) == test.t)
    assert before < 0.35
    assert after > 0.65


@pytest.mark.torch
def test_what_is_compared_is_the_same_mathematics() -> None:
    """The gradients that a step leaves, PyTorch's on nnx's weights."""
    import torch

    rival, sizes = load("with_torch"), [5, 7, 3]
    x, t = load("worker").batch_of(sizes, 4)
    model = rival._network(sizes)
    ours = nnx.mlp(sizes)
    with torch.no_grad():
        for theirs, (_, p) in zip(model.parameters(), ours.parameters(), strict=True):
            theirs.copy_(torch.from_numpy(p.value.T.copy()))
    torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(t)).backward()
    trainer = nnx.Trainer(ours, nnx.SoftmaxNLL(), nnx.SGD(1e-6))
    trainer.train_step(x, t)
    for theirs, (_, p) in zip(model.parameters(), ours.parameters(), strict=True):
        np.testing.assert_allclose(theirs.grad.numpy().T, p.grad, rtol=1e-4, atol=1e-6)


def test_the_size_of_a_distribution_counts_what_it_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str, size: int, *requires: str) -> None:
        package, info = tmp_path / name, tmp_path / f"{name}-1.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text("#" * size)
        (package / "__init__.pyc").write_text("#" * 10_000)
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines))
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/__init__.pyc,,\n")

    distribution("alpha_size", 100, "beta_size>=1", "gamma_size; extra == 'more'", "not-there")
    distribution("beta_size", 20, "Alpha.Size (>=1)")
    distribution("gamma_size", 3000)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("worker").installed_size(None, "alpha_size.part") == 120


def test_labels_are_within_their_classes_and_the_same_for_everyone() -> None:
    worker = load("worker")
    logits, labels = worker.ARGUMENTS["softmax_nll"](shape=[6, 4])
    assert logits.shape == (6, 4)
    assert labels.shape == (6,)
    assert set(labels) <= set(range(4))
    np.testing.assert_array_equal(logits, worker.ARGUMENTS["softmax_nll"](shape=[6, 4])[0])
    assert logits.dtype == worker.batch_of([2, 3, 1], 4)[1].dtype == np.float32


# ---- what is shown -------------------------------------------------------------------------------


def _rows() -> list[Row]:
    own, rival = Summary.of([2e-3, 2e-3, 3e-3]), Summary.of([4e-3, 5e-3, 4e-3])
    ratio, more = Summary.of([0.5, 0.4, 0.75]), Summary.of([-2e-3, -3e-3, -1e-3])
    return [
        Row("steps", "wide", "s", (
            Result("nnx", 3, own),
            Result("torch", 3, rival, ratio, more, Limit(0.5), True),
            Result("jax", 3, problem="ended by SIGKILL"),
        ), failed=True),
        Row("steps", "wider", "s", (
            Result("nnx", 3, own),
            Result("torch", 3, rival, ratio, more, Limit(0.4), False),
        )),
        Row("process", "size", "B", (Result("nnx", 1, Summary.of([59.84e6])),)),
        Row("mnist", "epoch", "s", (Result("nnx", 1, own, accuracy=0.9768),)),
        Row("mnist", "other", "s", problem="needs MNIST"),
    ]  # fmt: skip


def test_the_table_has_a_line_for_each_participant() -> None:
    rows = _rows()
    table = Table([Contest(row.section, row.name, "step") for row in rows])
    assert [line for row in rows for line in table.lines(row)] == [
        "",
        against.SECTIONS["steps"],
        "                           time    +-    ratio    +-  budget",
        "wide   nnx              2.00 ms    0%",
        "       torch            4.00 ms    0%    0.500   20%  <= 0.5 x: met",
        "       jax             ended by SIGKILL",
        "wider  nnx              2.00 ms    0%",
        "       torch            4.00 ms    0%    0.500   20%  <= 0.4 x: MISSED",
        "",
        against.SECTIONS["process"],
        "                                   +-    ratio    +-  budget",
        "size   nnx              59.8 MB",
        "",
        against.SECTIONS["mnist"],
        "                           time    +-    ratio    +-  budget",
        "epoch  nnx              2.00 ms    0%                 accuracy 97.7%",
        "other  needs MNIST",
    ]


def test_markdown_has_a_column_for_each_participant() -> None:
    assert list(against.markdown(["threads 2"], _rows())) == [
        *("```text", "threads 2", "```"),
        "",
        "**Training steps, beside their matrix products alone**",
        "",
        "| | nnx | torch | jax |",
        "| --- | ---: | ---: | ---: |",
        "| wide | 2.00 ms | 4.00 ms (0.500 ± 20%) | (ended by SIGKILL) |",
        "| wider | 2.00 ms | 4.00 ms (0.500 ± 20%) |  |",
        "",
        "| budget | beside | at most | found | |",
        "| --- | --- | --- | ---: | --- |",
        "| wide | torch | 0.5 x | 0.500 ± 20% | met |",
        "| wider | torch | 0.4 x | 0.500 ± 20% | MISSED |",
        "",
        f"**What{against.SECTIONS['process'][4:]}**",
        "",
        *("| | nnx |", "| --- | ---: |", "| size | 59.8 MB |"),
        "",
        f"**An epoch of MNIST{against.SECTIONS['mnist'][17:]}**",
        "",
        *("| | nnx |", "| --- | ---: |", "| epoch | 2.00 ms, 97.7% |", "| other | needs MNIST |"),
    ]


def test_markdown_says_what_a_budget_is_for() -> None:
    one = Summary.of([1.0])
    more = Result("numpy", 1, one, one, Summary.of([0.05, 0.07, 0.06]), Limit(0.1, True), True)
    by = Limit(1.0, by="nnx graph")
    graph = Result("jax", 1, one, one, one, by, True, counted=Summary.of([0.25]))
    lines = [*against.markdown([], [Row("process", "import", "s", (more, graph))])]
    assert lines[-2:] == [
        "| import | numpy | 0.1 s more | 0.060 s ± 17% | met |",
        "| import | jax | 1 x by nnx graph | 0.250 ± one turn | met |",
    ]


def test_json_says_what_kind_a_budget_is() -> None:
    wide, *_ = (row.to_json() for row in _rows())
    json.dumps(wide, allow_nan=False)
    nnx, torch, jax = wide["results"]
    assert nnx["limit"] is None
    assert torch["limit"] == {"value": 0.5, "kind": "ratio", "by": "nnx"}
    assert torch["ratio"]["median"] == 0.5
    assert jax["problem"] == "ended by SIGKILL"


def test_the_picture_has_a_line_for_each_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []
    save = matplotlib.Figure.savefig

    def savefig(figure: Any, path: Any) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(matplotlib.Figure, "savefig", savefig)
    rows = [
        Row("sweep", "a", "s", tuple(
            Result(name, 1, Summary.of([seconds])) for name, seconds in (("nnx", 2.0), ("jax", 4.0))
        ), point=(axis, x, samples))
        for axis, x, samples in (("batch size", 1, 1), ("batch size", 8, 8), ("width", 16, 128))
    ]  # fmt: skip
    against.throughput([*_rows(), *rows], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    batch, width = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in batch.lines}
    assert lines == {"nnx": [[1, 0.5], [8, 4.0]], "jax": [[1, 0.25], [8, 2.0]]}
    assert [line.get_xydata().tolist() for line in width.lines] == [[[16, 64.0]], [[16, 32.0]]]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Output]:
    """Call `main` in this process and in a folder of its own; status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNX_BACKEND", raising=False)
    monkeypatch.delenv("NNX_DATA", raising=False)
    monkeypatch.setenv("NNX_BENCH_SMOKE", "1")

    def call(*argv: str) -> Output:
        return main(("bench", *argv)), *capsys.readouterr()

    return call


QUICK = ("--against", "torch", "--seconds", "0", "--threads", "1")


def test_the_command_says_what_it_compares_and_where(
    run: Callable[..., Output], fake: Fake
) -> None:
    fake.answer(with_nnx=[1.0], with_torch=[2.0])
    status, out, err = run(*QUICK)
    assert (status, err) == (0, "")
    names = [c.name for c in against.contests([*against.SECTIONS][:-1])]
    for text in (*names, against.NOTES, "NNX_BENCH_SMOKE=1", "needs MNIST"):
        assert text in out
    assert against.SECTIONS["sweep"] not in out
    assert re.search(r"^threads     1 in each process$", out, re.M)
    assert re.search(r"^torch       python 3$", out, re.M)
    assert re.search(r"^measured    \d{4}-\d\d-\d\d, float32, 0 s ", out, re.M)
    command = "command     nnx bench --against torch --threads 1 --seconds 0"
    assert command in out.splitlines()
    assert out.isascii()
    assert fake.running() == []


def test_json_and_markdown_take_the_place_of_the_table(
    run: Callable[..., Output], fake: Fake
) -> None:
    fake.answer(with_nnx=[1.0], with_torch=[2.0])
    status, out, _ = run(*QUICK, "--only", "predict", "--json", "a.json", "--markdown")
    assert status == 0
    assert out.startswith("```text\n")
    assert "| 784-512-512-10, 1 sample | 1.00 s |" in out
    assert against.NOTES not in out
    found = json.loads(Path("a.json").read_text())
    status, out, _ = run(*QUICK, "--only", "predict", "--json")
    assert status == 0
    assert json.loads(out)["rows"] == found["rows"]
    assert found["complete"] is True
    assert found["settings"].keys() == {
        *("against", "threads", "seconds", "sections", "smoke", "date", "command", "versions")
    }
    assert found["settings"]["versions"] == {"nnx": {"python": "3"}, "torch": {"python": "3"}}
    assert found["machine"].keys() >= {"platform", "cpu", "cpus"}
    one, _ = found["rows"]
    assert [r["name"] for r in one["results"]] == [
        *("nnx", "products", "torch", "torch.compile", "torch products")
    ]
    assert one["results"][2]["ratio"]["median"] == 0.5


def test_a_picture_brings_the_sweep_along(run: Callable[..., Output], fake: Fake) -> None:
    pytest.importorskip("matplotlib")
    fake.answer(with_nnx=[1.0], with_torch=[2.0])
    status, out, err = run(*QUICK, "--only", "predict", "--plot", "a.png")
    assert (status, err) == (0, "")
    assert against.SECTIONS["sweep"] in out
    assert Path("a.png").stat().st_size > 10_000


def test_without_matplotlib_there_is_no_picture_and_that_is_said_before_the_work(
    run: Callable[..., Output], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(*QUICK, "--plot", "a.png")
    assert (status, out, fake.asked("pid")) == (2, "", [])
    assert "pip install 'nnx-xp[plot]'" in err


def test_a_row_that_fails_ends_in_status_1(run: Callable[..., Output], fake: Fake) -> None:
    fake.answer(with_nnx=[1.0], with_torch=["die"])
    status, out, err = run(*QUICK, "--only", "predict")
    assert status == 1
    assert err.startswith("nnx bench: error: 2 rows failed: 784-512-512-10, 1 sample; ")
    assert "torch           ended with status 3: word" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--against", "torch,caffe"), "expected some of torch,jax,tensorflow,sklearn, got"),
        (("--against", ""), "expected some of"),
        (("--against", "torch", "--only", "products"), "expected some of steps,kernels,predict,"),
        (("--against", "torch", "--threads", "0"), "expected a number of at least 1, got '0'"),
        (("--against", "torch", "--python", "torch"), "expected LIB=PATH, got 'torch'"),
        (("--against", "torch", "--python", "jax=python"), "--python names jax, which"),
        (("--against", "torch", "--python", "torch=no/such/python"), "no/such/python"),
        (("--against", "torch", "--dtype", "float64"), "on the CPU, in float32"),
        (("--against", "torch", "--plot", "a.text"), "--plot: expected a name that ends in"),
        (("--against", "torch", "--plot", "no/such/a.png"), "--plot: no such folder"),
        (("--threads", "2"), "--threads goes with --against"),
        (("--markdown",), "--markdown goes with --against"),
    ],
)
def test_wrong_usage_is_one_line(
    run: Callable[..., Output], fake: Fake, argv: tuple[str, ...], message: str
) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("nnx bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_missing_library_is_one_line(run: Callable[..., Output], fake: Fake) -> None:
    fake.answer(with_torch="missing")
    status, out, err = run(*QUICK)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"nnx bench: error: torch: .*pip install torch, or .*\n", err)
    assert fake.running() == []


def test_ctrl_c_ends_all_processes_and_leaves_what_was_measured(fake: Fake, tmp_path: Path) -> None:
    fake.answer(with_nnx=[*[1.0] * 13, "hang"], with_torch=[2.0])
    code = (
        "import sys; from pathlib import Path; from nnx.bench import against; from nnx.cli import "
        f"main; against.WORKER = Path({str(fake.script)!r}); against.REST = 0.0; "
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = ["bench", "--against", "torch", "--only", "kernels", "--json", "a.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # where the tests run in the background, Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("softmax-NLL 512"):
                break
        while fake.asked("block").count("with_nnx 7") < 14:
            time.sleep(0.05)
        assert fake.running()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "nnx bench: interrupted after 1 of 3 rows\n")
    assert fake.running() == []
    assert json.loads((tmp_path / "a.json").read_text())["complete"] is False
