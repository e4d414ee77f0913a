"""What the options of several commands share."""

from __future__ import annotations

from pathlib import Path

import typer

OTHER_ARGUMENTS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
"""Settings of a command that also takes the arguments of `hf-lora train`, which it does not declare."""


def path(text: str) -> Path:
    """The path of an option. An empty one, which would be the working directory, is refused."""
    if not text:
        raise typer.BadParameter("the name is empty.")
    return Path(text)
