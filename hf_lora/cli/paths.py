"""Options of commands that are paths: an empty one is refused, since it would be the working directory."""

from __future__ import annotations

from pathlib import Path

import typer


def path(text: str) -> Path:
    """The path of an option."""
    if not text:
        raise typer.BadParameter("the name is empty.")
    return Path(text)
