"""A process that measures one library: `python worker.py with_torch`.

It is asked by lines of JSON on its standard input and answers each by one on its standard output;
whatever a library prints goes to the standard error. It ends when its input does. Needs NumPy and
the library, not nnx.

    {"do": "prepare", "function": "step", "task": {...}, "seconds": 0.1}
        let the library's function make its call, warm up, say how many calls fill that time
    {"do": "block", "calls": n}     time n calls: seconds of each
    {"do": "value", "function": "import_time", "task": {...}}   a figure that isn't a call's time

`NNX_BENCH_THREADS` is the number of threads; the variables that libraries read themselves are set
by whoever starts this.
"""

import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[Any, ...]
LEARNING_RATE = 1e-6
"""Next to nothing: a network that knows its one batch by heart has gradients below the smallest
normal number, which a CPU is slow with."""


# ---- what the functions of a library are given ---------------------------------------------------


def batch_of(sizes: Sequence[int], batch: int) -> Arrays:
    """Samples N(0, 1), and labels, or numbers for a single output; the same for everyone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, sizes[0]), np.float32)
    if sizes[-1] == 1:
        return x, rng.standard_normal((batch, 1), np.float32)
    return x, rng.integers(0, sizes[-1], batch)


def _step(sizes: Sequence[int], batch: int, optimizer: str) -> Arrays:
    return sizes, *batch_of(sizes, batch), optimizer, LEARNING_RATE


def _predict(sizes: Sequence[int], batch: int) -> Arrays:
    return sizes, batch_of(sizes, batch)[0]


def _products(sizes: Sequence[int], batch: int, optimizer: str | None = None) -> Arrays:
    return *_predict(sizes, batch), optimizer is not None


def _softmax_nll(shape: Sequence[int]) -> Arrays:
    logits, labels = batch_of(shape[::-1], shape[0])
    return logits, labels % shape[1]


def _adam(size: int) -> Arrays:
    rng = np.random.default_rng(0)
    return *rng.standard_normal((2, size), np.float32), LEARNING_RATE


def mnist(path: str) -> Arrays:
    """Images as float32 from 0 to 1, and labels, of training and test, from an npz file."""
    with np.load(path) as file:
        x, t, x_test, t_test = (file[name] for name in ("x", "t", "x_test", "t_test"))
    return np.float32(x) / 255, t.astype(np.int64), np.float32(x_test) / 255, t_test


# ---- figures that aren't a call's time -----------------------------------------------------------


def import_time(library: Any, module: str) -> float:
    """Seconds of an import in a process of its own."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(_output("-c", code))


def installed_size(library: Any, module: str) -> int:
    """Bytes of the files of a distribution and of all that it requires, without compiled Python."""
    top = module.partition(".")[0]
    wanted, seen = list(importlib.metadata.packages_distributions().get(top, [])), set()
    total = 0 if wanted else _size(_folder(top))  # a checkout that isn't installed
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system or Python
            continue
        if "editable" in (found.read_text("direct_url.json") or ""):
            total += _size(_folder(top))
        files = (Path(str(file.locate())) for file in found.files or ())
        total += sum(f.stat().st_size for f in files if f.suffix != ".pyc" and f.is_file())
        for line in found.requires or ():
            if not re.search(r";.*\bextra\b", line):
                wanted.append(re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0])
    return total


def _folder(module: str) -> Path:
    return Path(str(importlib.import_module(module).__file__)).parent


def _size(folder: Path) -> int:
    files = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True)
             for name in names)  # fmt: skip
    return sum(file.stat().st_size for file in files if file.suffix not in (".pyc", ".pyo"))


def training_memory(library: Any, **task: Any) -> int:
    """Bytes that training adds to what the import has taken, at the worst moment.

    In a process of its own: what others have used before would hide it.
    """
    return int(_output(__file__, library.__name__, json.dumps(task)))


def _train(library: Any, task: dict[str, Any]) -> int:
    task = dict(task)
    function, steps = task.pop("function"), task.pop("steps")
    before = _resident()
    call = getattr(library, function)(*_step(**task))
    for _ in range(steps):
        result = call()
    library.wait(result)
    return max(_resident(peak=True) - before, 0)


def _resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory; their maximum since this was last asked without `peak`."""
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    except (OSError, ValueError):  # elsewhere: the maximum since the process began
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _output(*argv: str) -> str:
    done = subprocess.run(
        [sys.executable, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return done.stdout.split()[-1]


VALUES: dict[str, Callable[..., float]] = {
    "import_time": import_time,
    "installed_size": installed_size,
    "training_memory": training_memory,
}
ARGUMENTS: dict[str, Callable[..., Arrays]] = {
    "step": _step,
    "graph_step": _step,
    "fit": _step,
    "predict": _predict,
    "products": _products,
    "softmax_nll": _softmax_nll,
    "adam": _adam,
}


# ---- answers -------------------------------------------------------------------------------------


class Worker:
    """Answers requests with what a library does."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.call: Callable[[], object] = lambda: None
        self.steps = 1  # of the work that one call does

    def prepare(self, function: str, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Make the call for a task, warm it up, and count how often it fits into this time."""
        self.call, self.steps = lambda: None, 1  # what the last one holds can go
        make, kind = getattr(self.library, function), function.removeprefix("compiled_")
        if kind == "epoch":
            return self._prepare_epoch(make, **task)
        made = make(*ARGUMENTS[kind](**task))
        self.call, self.steps = made if isinstance(made, tuple) else (made, 1)
        for _ in range(3 if self.steps == 1 else 1):
            self.call()
        n, taken = 1, self.block(1)
        while n * self.steps * taken < seconds and n < 2**20:
            n *= 2
            taken = self.block(n)
        return {"calls": max(int(seconds / max(self.steps * taken, 1e-9)), 1)}

    def _prepare_epoch(
        self, make: Any, sizes: Sequence[int], batch: int, lr: float, path: str
    ) -> dict[str, Any]:
        """Train the first epoch, which compiles what is to be, and see what it has brought."""
        x, t, x_test, t_test = mnist(path)
        self.call, classify = make(sizes, batch, lr, x, t)
        self.library.wait(self.call())
        return {"calls": 1, "accuracy": float(np.mean(classify(x_test) == t_test))}

    def block(self, calls: int) -> float:
        """Seconds of each of these calls, to the end of the last."""
        if calls > 1:
            self.library.wait(self.call())  # others have had the caches since
        begun = time.perf_counter()
        for _ in range(calls):
            result = self.call()
        self.library.wait(result)
        return (time.perf_counter() - begun) / (calls * self.steps)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request asks for, or the problem with it."""
        what = request.pop("do")
        try:
            if what == "value":
                return {"value": VALUES[request["function"]](self.library, **request["task"])}
            if what == "block":
                return {"value": self.block(request["calls"])}
            return self.prepare(**request)
        except Exception as error:
            said = str(error).strip().split("\n", 1)[0][:200]
            return {"problem": f"{type(error).__name__}: {said}"}


def _limit(threads: int) -> None:
    """Use no more processors than this, whatever a library makes of its settings."""
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[: max(threads, 1)])


def main(argv: Sequence[str]) -> None:
    """Serve one library until the input ends, or print what a training with it takes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any] | int) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    threads = int(os.environ.get("NNX_BENCH_THREADS", "1"))
    _limit(threads)
    try:
        library = importlib.import_module(argv[0])
    except ImportError as error:
        say({"missing": " ".join(str(error).split())})
        return
    library.limit(threads)
    if len(argv) > 1:
        say(_train(library, json.loads(argv[1])))
        return
    say({"versions": {"python": sys.version.split()[0]} | library.versions()})
    worker = Worker(library)
    for line in sys.stdin:
        say(worker.answer(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1:])
