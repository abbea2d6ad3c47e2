"""What `mkdocs build` fills in: the help texts, as the command prints them."""

from __future__ import annotations

import argparse
import os
from typing import Any

MARK = "<!-- help of every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help texts where the page asks for them."""
    return markdown.replace(MARK, help_texts()) if MARK in markdown else markdown


def help_texts() -> str:
    """The help of `nnx` and of each of its commands, as Markdown."""
    os.environ["COLUMNS"], os.environ["NO_COLOR"] = "88", "1"  # argparse asks for both
    from nnx.cli import _parser

    parser = _parser()
    parsers = {"nnx": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers |= {f"nnx {name}": sub for name, sub in action.choices.items()}
    return "\n\n".join(
        f"## `{name}`\n\n```text\n{sub.format_help().rstrip()}\n```"
        for name, sub in parsers.items()
    )
