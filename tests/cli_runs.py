"""What the tests of the command share: a call of it in this process, and what came of it."""

from pathlib import Path

import pytest

from nnx.cli import main


class Result:
    """Exit status and output of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def call(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Result:
    """Call `main` in this process."""
    status = main([str(argument) for argument in argv])
    return Result(status, *capsys.readouterr())
