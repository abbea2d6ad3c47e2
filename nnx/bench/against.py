"""`nnx bench --against`: the same work in nnx and in other libraries, on one processor.

Each library has a process of its own, which `rivals/worker.py` runs, all with the same number of
threads. They take turns, a block of calls each, A B A B, while the others wait for their input. A
time is the median over turns, its spread the median absolute deviation; a ratio is the median of
nnx's time over the other's within each turn. The budgets are what nnx promises itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from nnx.bench import SECTIONS as _OWN
from nnx.bench import Summary, _digits, _named, _time
from nnx.data import load_mnist

SECTIONS = {
    "steps": _OWN["steps"],
    "kernels": "operations",
    "predict": "predictions, from an array and to an array",
    "process": "what it takes to have it: import, files, memory that a training adds to the import",
    "mnist": "an epoch of MNIST, and the accuracy on its test set after the first one",
    "sweep": "training steps over batch size and over width",
}
"""What can be compared, with a heading for each. The sweep is for the picture."""

TURNS = 10  # of a row, each a tenth of its time
REST = 0.2  # seconds between two blocks: until idle threads of other libraries no longer spin
ANSWER = 300.0  # seconds in which a worker has to answer beyond those it is to measure for
WORKER = Path(__file__).parent / "rivals" / "worker.py"


# ---- who takes part ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Participant:
    """One way to do the work.

    Attributes:
        library: "nnx", or what to call it in `--against`.
        module: The file in `rivals/`.
        imports: What to import to have it.
        functions: For each kind of work the function of the file that does it.
    """

    name: str
    library: str
    module: str
    imports: str
    functions: Mapping[str, str]


_PROCESS = ("import_time", "installed_size", "training_memory")
_SAME = {name: name for name in ("step", "predict", "softmax_nll", "adam", "epoch", *_PROCESS)}
_COMPILED = {name: f"compiled_{name}" for name in ("step", "predict", "softmax_nll", "epoch")}
_PRODUCTS = {"step": "products", "predict": "products"}
_NUMPY = {name: name for name in _PROCESS[:2]}
_SKLEARN = {name: name for name in _SAME if name not in ("softmax_nll", "adam")}

PARTICIPANTS = (
    Participant("nnx", "nnx", "with_nnx", "nnx", _SAME),
    Participant("nnx graph", "nnx", "with_nnx", "nnx", {"step": "graph_step"}),
    Participant("nnx fit", "nnx", "with_nnx", "nnx", {"step": "fit"}),
    Participant("products", "nnx", "with_nnx", "nnx", _PRODUCTS),
    Participant("numpy", "nnx", "with_nnx", "numpy", _NUMPY),
    Participant("torch", "torch", "with_torch", "torch", _SAME),
    Participant("torch.compile", "torch", "with_torch", "torch", _COMPILED),
    Participant("torch products", "torch", "with_torch", "torch", _PRODUCTS),
    Participant("jax", "jax", "with_jax", "jax", _SAME),
    Participant("tensorflow", "tensorflow", "with_tensorflow", "tensorflow", _SAME),
    Participant("sklearn", "sklearn", "with_sklearn", "sklearn.neural_network", _SKLEARN),
)
LIBRARIES = {
    "torch": "torch",
    "jax": "jax",
    "tensorflow": "tensorflow-cpu",
    "sklearn": "scikit-learn",
}
"""What `--against` takes, and what to install for it."""


# ---- what is compared ----------------------------------------------------------------------------


class Limit(NamedTuple):
    """A budget: at most so much times the other's figure, or with `more` so much beyond it.

    Attributes:
        by: Whose figure it is for: of nnx's ways the one that does what the other does.
    """

    value: float
    more: bool = False
    by: str = "nnx"

    def __str__(self) -> str:
        text = f"<= {self.value:g} s more" if self.more else f"<= {self.value:g} x"
        return text if self.by == "nnx" else f"{text} by {self.by}"


@dataclass(frozen=True)
class Contest:
    """A row to be.

    Attributes:
        work: Which of a participant's functions does it.
        task: What the worker makes the function's arguments of.
        limits: The budget beside each participant that there is one for.
        unit: "s" or "B".
        turns: At most so many.
        absent: Participants that could, but don't take part.
        point: For the picture: what varies, its value, and samples in a call.
    """

    section: str
    name: str
    work: str
    task: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    unit: str = "s"
    turns: int = TURNS
    absent: tuple[str, ...] = ()
    point: tuple[str, int, int] | None = None


_WIDE = (784, 512, 512, 10)
_GRAPH = "nnx graph"  # a step as `fit` does it; JAX's is replayed, too
_SMALL = {"torch": Limit(0.5), "jax": Limit(1.0, by=_GRAPH)}
_MEDIUM = {"torch": Limit(0.9), "jax": Limit(0.9, by=_GRAPH), "products": Limit(1.2, by=_GRAPH)}
_LARGE = {"products": Limit(1.15, by=_GRAPH)}
_LOOP = ("nnx fit",)
# a line for each library, and torch.compile would compile for minutes
_NO_LIBRARY = (*_LOOP, _GRAPH, "products", "torch products", "torch.compile")
_BATCH = 128  # of the sweep over width
_BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
_WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def contests(sections: Sequence[str] = tuple(SECTIONS)) -> list[Contest]:
    """The rows of these sections, in order."""

    def step(sizes: Sequence[int], batch: int, optimizer: str, **more: Any) -> Contest:
        name = f"{_named(sizes)} batch {batch}, {optimizer}"
        task = {"sizes": sizes, "batch": batch, "optimizer": optimizer}
        return Contest(**{"section": "steps", "name": name, "work": "step", "task": task} | more)

    def sweep(sizes: Sequence[int], batch: int, axis: str, value: int) -> Contest:
        point = axis, value, batch
        return step(sizes, batch, "Adam", section="sweep", point=point, absent=_NO_LIBRARY)

    memory = {"function": "step", "steps": 200, "sizes": _WIDE, "batch": 128, "optimizer": "Adam"}
    found = [
        step((2, 3, 1), 4, "Adam", limits=_SMALL),
        step((20, 32, 10), 32, "Adam", limits=_SMALL),
        step((784, 50, 10), 100, "Adam", limits=_SMALL),
        *(step(_WIDE, 128, name, limits=_MEDIUM, absent=_LOOP) for name in ("SGD", "Adam")),
        *(step(_WIDE, 1024, name, limits=_LARGE, absent=_LOOP) for name in ("SGD", "Adam")),
        step((784, 2048, 2048, 10), 1024, "Adam", limits=_LARGE, absent=_LOOP),
        *(
            Contest("kernels", f"softmax-NLL {n} x {c}", "softmax_nll", {"shape": (n, c)}, limits)
            for limits in [{"torch": Limit(0.3)}]
            for n, c in ((512, 32768), (4096, 1000))
        ),
        Contest(
            *("kernels", "Adam, 670k parameters", "adam", {"size": 670_000}),
            {"torch": Limit(0.8)},
        ),
        *(
            Contest(
                *("predict", f"{_named(_WIDE)}, {n} sample{'s' * (n > 1)}", "predict"),
                {"sizes": _WIDE, "batch": n},
            )
            for n in (1, 4096)
        ),
        Contest(
            *("process", "import", "import_time"), limits={"numpy": Limit(0.1, more=True)}, turns=5
        ),
        Contest("process", "installed size", "installed_size", unit="B", turns=1),
        Contest(
            *("process", f"memory of {_named(_WIDE)} batch 128", "training_memory", memory),
            unit="B",
            turns=3,
        ),
        Contest(
            *("mnist", f"{_named(_WIDE)} batch 100, Adam", "epoch"),
            {"sizes": _WIDE, "batch": 100, "lr": 0.003},
            turns=3,
        ),
        *(sweep(_WIDE, n, "batch size", n) for n in _BATCHES),
        *(sweep((784, n, n, 10), _BATCH, "width", n) for n in _WIDTHS),
    ]
    return [contest for contest in found if contest.section in sections]


def _shrunk(value: Any) -> Any:
    """A task so small that a run proves that it works, and nothing else."""
    if isinstance(value, Mapping):
        return {k: _shrunk(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [*map(_shrunk, value)]
    return min(value, 16) if isinstance(value, int) else value


# ---- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was measured of a participant, or what kept it from being measured.

    Attributes:
        calls: Calls of a block.
        value: Seconds of a call, or bytes.
        ratio: nnx's value over this one, turn by turn.
        more: nnx's value minus this one.
        limit: The budget.
        met: Whether nnx's median is within it.
        counted: The ratio that the budget is for, where it is for another of nnx's ways.
        accuracy: Of the classes of a test set.
    """

    name: str
    calls: int = 1
    value: Summary | None = None
    ratio: Summary | None = None
    more: Summary | None = None
    limit: Limit | None = None
    met: bool | None = None
    accuracy: float | None = None
    problem: str | None = None
    counted: Summary | None = None


@dataclass(frozen=True)
class Row:
    """A contest and its results, or what kept it from being held.

    Attributes:
        failed: Whether something went wrong, with one participant or more.
    """

    section: str
    name: str
    unit: str
    results: tuple[Result, ...] = ()
    problem: str | None = None
    failed: bool = False
    point: tuple[str, int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        found = asdict(self)
        for result in found["results"]:
            limit = result["limit"]
            kind = limit and ("more" if limit[1] else "ratio")
            result["limit"] = limit and {"value": limit[0], "kind": kind, "by": limit[2]}
        return found


# ---- the processes -------------------------------------------------------------------------------


_THREADS = (
    *("NNX_BENCH_THREADS", "NNX_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
    *("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"),  # the last one is XLA's
)


class Lost(RuntimeError):
    """A worker has ended or doesn't answer."""


def environment(threads: int, *, python: str = sys.executable) -> dict[str, str]:
    """The variables of a worker: so many threads, no GPU, and nnx where it is here."""
    found = dict(os.environ) | dict.fromkeys(_THREADS, str(threads))
    if threads == 1:
        flag = "--xla_cpu_multi_thread_eigen=false"
        found["XLA_FLAGS"] = f"{found.get('XLA_FLAGS', '')} {flag}".strip()
    found |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow"}
    found |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found |= {"NNX_BACKEND": "numpy", "PYTHONUNBUFFERED": "1"}
    if python == sys.executable:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    else:
        found.pop("PYTHONPATH", None)
    return found


class Child:
    """A worker's process, and what it says.

    Args:
        module: The file in `rivals/`.
        python: The interpreter.
        threads: That it may use.
    """

    def __init__(
        self,
        module: str,
        *,
        python: str = sys.executable,
        threads: int = 1,
    ) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with contextlib.ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [python, str(WORKER), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment(threads, python=python),
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for us, who end it and all that it has started
            )
            stack.pop_all()  # both stay
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """Its answer to a request within so many seconds; without one, what it says by itself.

        Raises:
            Lost: There is none; the process is gone then.
        """
        assert self._process.stdin is not None
        try:
            if request:
                print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise Lost(f"no answer within {limit:g} s") from None
        except OSError:
            line = ""
        try:
            return dict(json.loads(line))
        except ValueError:
            said = f"said {line.strip()[:60]!r}" if line.strip() else self._end()
            self.close()
            raise Lost(said) from None

    def _end(self) -> str:
        """How it ended, and the last it has said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.returncode
        if status is None:
            how = "closed its output"
        elif status < 0:
            name = signal.Signals(-status).name
            how = f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        else:
            how = f"ended with status {status}"
        self._errors.seek(0)
        last = self._errors.read().decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(last) if line.strip()), "")
        return f"{how}: {said}" if said else how

    def close(self) -> None:
        """End it, and what it has started."""
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):  # a pipe that nobody reads any more
                if stream is not None:
                    stream.close()


class Team:
    """Participants with a process each, which end with the `with` block.

    Args:
        libraries: Those of `--against`.
        pythons: An interpreter for those that have one of their own.
        threads: For each.
        seconds: For each row and participant; 0 for a single call.
        smoke: Whether to shrink every size.
    """

    def __init__(
        self,
        libraries: Sequence[str],
        *,
        pythons: Mapping[str, str] | None = None,
        threads: int = 1,
        seconds: float = 1.0,
        smoke: bool = False,
    ) -> None:
        self.participants = [p for p in PARTICIPANTS if p.library in ("nnx", *libraries)]
        self.versions: dict[str, dict[str, str]] = {}
        self._pythons, self._threads = pythons or {}, threads
        self._seconds, self._smoke = seconds, smoke
        self._children: dict[str, Child] = {}
        self._folder = contextlib.ExitStack()
        self._mnist: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children.values():
            child.close()
        self._folder.close()

    def players(self, contest: Contest) -> list[Participant]:
        """Those who take part."""
        able = (p for p in self.participants if contest.work in p.functions)
        return [p for p in able if p.name not in contest.absent]

    def start(self, contests: Sequence[Contest]) -> None:
        """Start everyone who is needed, so that what is missing is known before anything is timed.

        Raises:
            ImportError: A library isn't installed, or doesn't work.
            OSError: An interpreter can't be started.
        """
        names = {p.name for contest in contests for p in self.players(contest)}
        needed = [p for p in self.participants if p.name in names]
        for participant in needed:
            self._start(participant)
        for participant in needed:
            self._greet(participant)

    def _start(self, participant: Participant) -> None:
        python = self._pythons.get(participant.library, sys.executable)
        child = Child(participant.module, python=python, threads=self._threads)
        self._children[participant.name] = child

    def _greet(self, participant: Participant) -> None:
        library = participant.library
        try:
            said = self._children[participant.name].ask(ANSWER)
        except Lost as error:
            raise ImportError(f"{library}: its process {error}") from error
        if "missing" in said:
            raise ImportError(
                f"{library}: expected it in {self._pythons.get(library, sys.executable)}, got "
                f"{said['missing']}; pip install {LIBRARIES.get(library, 'nnx-xp')}, or name a "
                f"Python that has it: --python {library}=PATH"
            )
        self.versions[library] = said["versions"]

    def hold(self, contest: Contest) -> Row:
        """Let everyone do the work in turns. What goes wrong with one stands in its result."""
        task = _shrunk(contest.task) if self._smoke else dict(contest.task)
        if contest.work == "epoch":
            try:
                task["path"] = self._data()
            except (OSError, ImportError, ValueError) as error:
                text = f"needs MNIST: {error}; NNX_DATA names the folder with its four files"
                return Row(contest.section, contest.name, contest.unit, problem=text)
        players = self.players(contest)
        results = {p.name: Result(p.name) for p in players}
        requests = {p.name: self._request(p, contest.work, task, results) for p in players}
        values: dict[str, list[float]] = {p.name: [] for p in players}
        least, turns = (min(3, contest.turns), contest.turns) if self._seconds else (1, 1)
        end, turn = time.perf_counter() + self._seconds * len(players), 0
        while turn < least or (turn < turns and time.perf_counter() < end):
            turn += 1
            for p in players:
                if results[p.name].problem is None:
                    time.sleep(REST)
                    said = self._ask(p, results, **requests[p.name])
                    values[p.name] += [said["value"]] if "value" in said else []
        done = tuple(_result(results[p.name], values, contest) for p in players)
        failed = any(result.problem is not None for result in done)
        row = Row(contest.section, contest.name, contest.unit, done, failed=failed)
        return replace(row, point=contest.point)

    def _request(
        self, participant: Participant, work: str, task: dict[str, Any], results: dict[str, Result]
    ) -> dict[str, Any]:
        """What to ask a participant for in each turn; its call is prepared for that."""
        function = participant.functions[work]
        if work == "training_memory":
            return {"do": "value", "function": function, "task": task}
        if work in _PROCESS:
            return {"do": "value", "function": function, "task": {"module": participant.imports}}
        prepare = {"function": function, "task": task, "seconds": self._seconds / TURNS}
        said = self._ask(participant, results, do="prepare", **prepare)
        if "calls" not in said:
            return {}
        result = Result(participant.name, said["calls"], accuracy=said.get("accuracy"))
        results[participant.name] = result
        return {"do": "block", "calls": said["calls"]}

    def _ask(
        self, participant: Participant, results: dict[str, Result], **request: Any
    ) -> dict[str, Any]:
        """Its answer; a problem becomes its result."""
        try:
            if participant.name not in self._children:  # it was lost in an earlier row
                self._start(participant)
                self._greet(participant)
            said = self._children[participant.name].ask(ANSWER + self._seconds, **request)
        except (Lost, ImportError, OSError) as error:
            self._drop(participant)
            said = {"problem": str(error)}
        if "problem" in said:
            results[participant.name] = Result(participant.name, problem=said["problem"])
        return said

    def _drop(self, participant: Participant) -> None:
        child = self._children.pop(participant.name, None)
        if child is not None:
            child.close()

    def _data(self) -> str:
        """A file of MNIST's arrays, for Pythons without nnx."""
        if self._mnist is None:
            if not os.environ.get("NNX_DATA"):
                raise ValueError("it isn't downloaded for a measurement")
            train, test = load_mnist()
            cut = np.s_[:160, :16] if self._smoke else np.s_[:, :]
            folder = self._folder.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder, "mnist.npz")
            with path.open("wb") as file:
                x, x_test = (data.x[cut].astype(np.uint8) for data in (train, test))
                t, t_test = (data.t[cut[0]].astype(np.uint8) for data in (train, test))
                np.savez(file, x=x, t=t, x_test=x_test, t_test=t_test)
            self._mnist = str(path)
        return self._mnist


def _result(result: Result, found: Mapping[str, Sequence[float]], contest: Contest) -> Result:
    """The result with its figures, and with those of nnx beside it if both have all turns."""
    values, own = found[result.name], found.get("nnx", [])
    if result.problem is not None or not values:
        return result
    result = replace(result, value=Summary.of(values))
    if result.name == "nnx" or len(own) != len(values):
        return result

    def ratio_of(own: Sequence[float]) -> Summary:
        return Summary.of([a / max(b, 1e-12) for a, b in zip(own, values, strict=True)])

    ratio, limit = ratio_of(own), contest.limits.get(result.name)
    more = Summary.of([a - b for a, b in zip(own, values, strict=True)])
    result = replace(result, ratio=ratio, more=more)
    judged = [] if limit is None else found.get(limit.by, [])
    if limit is None or len(judged) != len(values):
        return result
    if limit.by != "nnx":
        result = replace(result, counted=ratio_of(judged))
    counted = more if limit.more else result.counted or ratio
    return replace(result, limit=limit, met=counted.median <= limit.value)


# ---- as text -------------------------------------------------------------------------------------

NOTES = """\
time    median over turns; the first +- is its median absolute deviation
ratio   of nnx's time, or bytes, to this one, turn by turn, so that less is better; its own +-
budget  what nnx promises itself beside this one, and whether it is met here"""


def heading(settings: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """What is compared and where, a line for each fact."""
    cpus = machine["cpus"]
    for library, versions in settings["versions"].items():
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f"{library:10}  {named}"
    load = f", load {machine['load']}" if "load" in machine else ""
    if machine.get("load", 0) >= cpus["usable"]:
        load += ": others are at work, so times are rough"
    yield f"CPU         {machine['cpu']}, {cpus['usable']} usable of {cpus['all']}{load}"
    yield f"threads     {settings['threads']} in each process"
    smoke = "; NNX_BENCH_SMOKE=1: sizes are shrunk, figures mean nothing" * settings["smoke"]
    each = f"float32, {settings['seconds']:g} s for each row and participant"
    yield f"measured    {settings['date']}, {each}{smoke}"
    yield f"command     {settings['command']}"


class Table:
    """Rows as lines of text, one for each participant."""

    def __init__(self, contests: Sequence[Contest]) -> None:
        self._width = max((len(contest.name) for contest in contests), default=0)
        self._section: str | None = None

    def lines(self, row: Row) -> Iterator[str]:
        """The row's lines, with a heading where a section begins."""
        if row.section != self._section:
            self._section = row.section
            kind = "" if row.section == "process" else "time"
            yield from ("", SECTIONS[row.section])
            yield self._line("", ["", kind, "+-", "ratio", "+-", "budget"])
        name = row.name
        if row.problem is not None:
            yield f"{name:{self._width}}  {row.problem}"
        for r in row.results:
            if r.problem is not None:
                yield f"{name:{self._width}}  {r.name:14}  {r.problem}"
            else:
                numbers = [_amount(r.value, row.unit), _spread(r.value)]
                ratio = ["", ""] if r.ratio is None else [_digits(r.ratio.median), _spread(r.ratio)]
                yield self._line(name, [r.name, *numbers, *ratio, _remark(r)])
            name = ""

    def _line(self, name: str, cells: Sequence[str]) -> str:
        who, value, spread, ratio, ratio_spread, rest = cells
        numbers = f"{value:>8}  {spread:>4}  {ratio:>7}  {ratio_spread:>4}"
        return f"{name:{self._width}}  {who:14}  {numbers}  {rest}".rstrip()


def markdown(head: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """For each section its table, a column for each participant, and its budgets."""
    yield from ("```text", *head, "```")
    for section in dict.fromkeys(row.section for row in rows):
        inside = [row for row in rows if row.section == section]
        names = list(dict.fromkeys(r.name for row in inside for r in row.results))
        yield from ("", f"**{SECTIONS[section][0].upper()}{SECTIONS[section][1:]}**", "")
        yield f"| | {' | '.join(names)} |"
        yield f"| --- |{' ---: |' * len(names)}"
        for row in inside:
            by_name = {r.name: r for r in row.results}
            cells = [_cell(by_name.get(name), row) for name in names]
            yield f"| {row.name} | {' | '.join(cells) if row.results else row.problem} |"
        limited = [(row, r) for row in inside for r in row.results if r.limit is not None]
        if limited:
            yield from (
                "",
                "| budget | beside | at most | found | |",
                "| --- | --- | --- | ---: | --- |",
            )
        for row, r in limited:
            cells = [row.name, r.name, str(r.limit).removeprefix("<= "), _found(r)]
            yield f"| {' | '.join(cells)} | {'met' if r.met else 'MISSED'} |"


def _found(result: Result) -> str:
    """What a budget is for."""
    if result.limit is not None and result.limit.more and result.more is not None:
        return f"{result.more.median:.3f} s ± {_spread(result.more) or 'one turn'}"
    ratio = result.counted or result.ratio
    assert ratio is not None
    return f"{_digits(ratio.median)} ± {_spread(ratio) or 'one turn'}"


def _cell(result: Result | None, row: Row) -> str:
    if result is None:
        return ""
    if result.problem is not None:
        return f"({result.problem.replace('|', '/')})"
    text = _amount(result.value, row.unit)
    if result.ratio is not None:
        spread = f" ± {_spread(result.ratio)}" if result.ratio.n > 1 else ""
        text += f" ({_digits(result.ratio.median)}{spread})"
    return text if result.accuracy is None else f"{text}, {result.accuracy:.1%}"


def _amount(value: Summary | None, unit: str) -> str:
    if value is None or unit == "s":
        return _time(value)
    return f"{_digits(value.median / 1e6)} MB"


def _spread(value: Summary | None) -> str:
    return "" if value is None or value.n == 1 else f"{value.spread:.0%}"


def _remark(result: Result) -> str:
    parts = []
    if result.limit is not None:
        counted = f", {_digits(result.counted.median)}" if result.counted is not None else ""
        parts.append(f"{result.limit}: {'met' if result.met else 'MISSED'}{counted}")
    if result.accuracy is not None:
        parts.append(f"accuracy {result.accuracy:.1%}")
    return ", ".join(parts)


# ---- as a picture --------------------------------------------------------------------------------


def throughput(rows: Sequence[Row], path: str | Path) -> None:
    """Draw samples in a second over batch size and over width, a line for each library.

    Args:
        rows: Those of the section "sweep" are drawn.
        path: Where to save it; the suffix chooses the format.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    from nnx import plot

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {
        f"batch size, {_named(_WIDE)}": {},
        f"width n, 784-n-n-10 batch {_BATCH}": {},
    }
    by_axis = dict(zip(("batch size", "width"), lines.values(), strict=True))
    for row in rows:
        for result in row.results:
            if row.point is not None and result.value is not None:
                axis, x, samples = row.point
                line = by_axis[axis].setdefault(result.name, [])
                line.append((x, samples / result.value.median))
    figure = plot._new_figure("bench", width=10.0, height=4.2)
    figure.suptitle("Training steps with Adam: samples per second")
    for axes, (label, found) in zip(plot._panels(figure, 2), lines.items(), strict=True):
        for i, (name, line) in enumerate(found.items()):
            plot._line(axes, i, name, *zip(*line, strict=True))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        if found:
            axes.legend()
    plot._saved(figure, path)
