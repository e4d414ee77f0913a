"""What the options of several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from ..errors import ConfigError, Faults

OTHER_ARGUMENTS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
"""Settings of a command that also takes the arguments of `hf-lora train`, which it does not declare."""


def refuse_repeated(command: str, words: Sequence[str], names: Mapping[str, str]) -> None:
    """Refuse options that say again what an argument of the command says.

    Args:
        names: option of `hf-lora train` -> the argument.

    Raises:
        ConfigError: lists them.
    """
    faults = Faults(f"hf-lora {command}")
    given = [word.partition("=")[0].replace("_", "-") for word in words]
    for option, argument in names.items():
        if option in given:
            faults.add(f"{option} is {argument} of this command")
    faults.check(ConfigError, "Leave these options out.")


def path(text: str) -> Path:
    """The path of an option. An empty one, which would be the working directory, is refused."""
    if not text:
        raise typer.BadParameter("the name is empty.")
    return Path(text)
