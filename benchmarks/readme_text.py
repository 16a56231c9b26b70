"""Markdown that both benchmarks write into the README, each between its own markers."""

import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def markdown(head, lines):
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]]


def wrapped(text, indent=""):
    return textwrap.fill(
        text, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def shown(folder):
    """A folder of the project by its path in it."""
    folder = folder.resolve()
    return folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name


def between(text, begin, end, block):
    """The text with the block between its two markers."""
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{block}{end}{tail}"
