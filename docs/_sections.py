"""Makes sections of docstrings that Google's style doesn't know readable in the pages.

`Shape:`, `Saved:`, `Gradient:` and the like become paragraphs of their own with a bold
title, and indented lines below one become a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

TITLES = "Shape, errors|Shapes?|Saved|Gradients?|Buffers|Dtypes?|State|Source"
TITLE = re.compile(rf"^({TITLES}):(?: (.*))?$")
INLINE = re.compile(rf"(?<=[.;`]) ({TITLES}): ")


class Sections(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """The docstring with its own sections as Markdown paragraphs and lists."""
    out: list[str] = []
    listing = False
    for line in INLINE.sub(r"\n\1: ", text).splitlines():
        if match := TITLE.match(line):
            listing = match[2] is None
            out += ["", f"**{match[1]}:** {match[2] or ''}".rstrip()]
            if listing:
                out.append("")
        elif listing and line.startswith("    "):
            item = line[4:]
            out.append(line if item.startswith(" ") else f"- {item}")
        else:
            listing = listing and not line
            out.append(line)
    return "\n".join(out)
