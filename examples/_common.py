"""What the examples share: the command-line arguments, and pictures where matplotlib is there."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parser(doc: str | None, *, backend: bool = False) -> argparse.ArgumentParser:
    """Arguments that every example takes; `--backend` only where the example trains on one."""
    new = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    new.add_argument(
        "--out", type=Path, default=Path("runs/examples"), help="folder for the pictures"
    )
    new.add_argument("--seed", type=int, default=0)
    if backend:
        new.add_argument("--backend", help="numpy, cupy, cupy:1 or auto")
    return new


def picture(draw: Callable[..., Any], *args: Any, out: Path, name: str, **options: Any) -> None:
    """Draw into the file `out/name`; without matplotlib say so and go on."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        draw(*args, path=out / name, **options)
    except ImportError as error:
        print(f"no {name}: {error}")
    else:
        print(f"wrote {out / name}")
