"""What a check has found, as rows, as a table and as JSON."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nnx.backends import Backend
from nnx.backends.cublas import tf32


class Divergence(NamedTuple):
    """The first number that two backends disagree on, beyond what rounding explains.

    Attributes:
        step: Of the training, from 0; None for a layer, loss or optimizer on its own.
        layer: The layer to blame, by path and class, or the loss, or the optimizer. What went into
            it agreed, what came out doesn't.
        array: `"output"`, `"gradient of the input"`, or the name of a parameter or a state.
        index: Where in it the difference is largest.
        expected: The number on NumPy.
        actual: The number on the backend that is checked.
        ulp: Floating-point numbers between the two; None if one isn't finite.
        error: Their difference, relative to the largest magnitude in the array.
        bound: What the error may be.
    """

    step: int | None
    layer: str
    array: str
    index: tuple[int, ...]  # type: ignore[assignment]  # not the method of a tuple
    expected: Any
    actual: Any
    ulp: int | None
    error: float
    bound: float

    def __str__(self) -> str:
        apart = "" if self.ulp is None else f", {self.ulp:,} ulp apart"
        step = "" if self.step is None else f"step {self.step}, "
        return (
            f"{step}{self.layer}, {self.array} at {list(self.index)}: expected "
            f"{self.expected!s}, got {self.actual!s}{apart}; error {self.error:.2g}, "
            f"bound {self.bound:.2g}"
        )


class Row(NamedTuple):
    """What one check found.

    Attributes:
        name: What was checked.
        compared: With what, and in which dtype.
        error: The largest error found, relative to the largest magnitude of its array; of what must
            agree bit for bit, the number of elements that don't.
        bound: What the error may be.
        passed: Whether it is within the bound.
        ulp: Floating-point numbers between the two at the largest error, if it is a number.
        detail: Where the largest error is, or what went wrong.
    """

    name: str
    compared: str
    error: float
    bound: float
    passed: bool
    ulp: int | None = None
    detail: str = ""


class Report:
    """What `library` and `model` return. It prints as a table.

    Attributes:
        rows: One for each check.
        first_divergence: Where two backends first disagree; None if they never do.
        warnings: What the library had to say meanwhile, such as a kernel that didn't compile.
        environment: Backend, device, versions, and whether TF32 is on.
    """

    def __init__(self, title: str, backend: Backend) -> None:
        self.title = title
        self.rows: list[Row] = []
        self.first_divergence: Divergence | None = None
        self.warnings: list[str] = []
        self.environment = _environment(backend)

    @property
    def passed(self) -> bool:
        """Whether every check has passed, and there was one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def add(self, name: str, compared: str, error: float, bound: float, **more: Any) -> Row:
        """Add a row; it passes if the error is within the bound. NaN fails."""
        row = Row(name, compared, float(error), float(bound), bool(error <= bound), **more)
        self.rows.append(row)
        return row

    def fail(self, name: str, compared: str, bound: float, detail: str) -> None:
        """Add a row of a check that failed without a number to show for it."""
        self.rows.append(Row(name, compared, math.inf, bound, False, None, detail))

    def to_json(self, **more: Any) -> str:
        """All of it as JSON, with further entries at the top; what isn't finite is a string."""
        import json

        first = self.first_divergence
        content = {
            "title": self.title,
            "passed": self.passed,
            "environment": self.environment,
            **more,
            "first_divergence": None if first is None else first._asdict(),
            "warnings": self.warnings,
            "rows": [row._asdict() for row in self.rows],
        }
        return json.dumps(_plain(content), indent=2, allow_nan=False)

    def __str__(self) -> str:
        def cells(row: Row) -> tuple[str, ...]:
            exact = row.bound == 0
            error = f"{row.error:.0f} differ" if exact else f"{row.error:.1e}"
            ulp = "" if row.ulp is None else f"{row.ulp:,}"
            verdict = "pass" if row.passed else "FAIL"
            return row.name, row.compared, error, ulp, "0" if exact else f"{row.bound:.1e}", verdict

        head = ("what", "compared", "worst error", "ulp", "bound", "")
        table = [head, *map(cells, self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [self.title]
        for a, b, *numbers, verdict in table:
            right = "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[2:], strict=True))
            lines.append(f"{a:{widths[0]}}  {b:{widths[1]}}  {right}  {verdict}".rstrip())
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [
            f"FAIL: {row.name} ({row.compared}){': ' if row.detail else ''}{row.detail}"
            for row in self.rows
            if not row.passed
        ]
        if self.first_divergence is not None:
            lines.append(f"first divergence: {self.first_divergence}")
        good = sum(row.passed for row in self.rows)
        where = ", ".join(
            str(self.environment[key]) for key in ("backend", "device") if self.environment[key]
        )
        lines.append(f"{good} of {len(self.rows)} checks passed ({where})")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """What JSON can hold: no tuples of names, NumPy numbers, infinities."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _environment(backend: Backend) -> dict[str, Any]:
    """What the numbers may depend on."""
    import platform

    from nnx import __version__

    versions = {"nnx": __version__, "python": platform.python_version(), "numpy": np.__version__}
    device = None
    if backend.xp is not np:
        versions["cupy"] = backend.xp.__version__
        with backend.activate():
            runtime = backend.xp.cuda.runtime
            properties = runtime.getDeviceProperties(runtime.getDevice())
            device = properties["name"].decode()
            versions |= {"cuda": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()}
    rounded = backend.xp is not np and tf32()
    return {"backend": backend.name, "device": device, "tf32": rounded, "versions": versions}


@contextlib.contextmanager
def collected(report: Report) -> Iterator[None]:
    """Collect warnings in the report, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if report.environment["tf32"]:
        report.warnings.append(
            "CUPY_TF32 is on: float32 products round their factors to 10 bits, and fail"
        )
    report.warnings += dict.fromkeys(" ".join(str(w.message).split()) for w in caught)


def progress_bar(total: int, unit: str, show: bool) -> Any:
    """A bar on the standard error, if asked for; its `update` counts."""
    if not show:
        return contextlib.nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=total, unit=unit, dynamic_ncols=True, leave=False)
