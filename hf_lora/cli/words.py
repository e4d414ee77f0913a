"""Messages of the library in the words of a command: its flags instead of the arguments of functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_TEXT = r"'([^'\n]*)'"
_CALL = re.compile(
    rf"\A(?:[A-Za-z][\w.]*\((?:{_TEXT}|[^\n()']|\((?:{_TEXT}|[^\n()'])*\))*\)|evaluate|[a-z]+(?:_[a-z]+)+):"
)
"""A call or the name of a function with which a message begins; a group is an argument that is a text, or its path."""
_SENTENCES = {
    "print(explain_targets(model, config)) with target_modules='all-linear' lists what can be adapted.": (
        "`hf-lora targets MODEL` lists what can be adapted."
    ),
}
"""Next steps that are Python -> the same as a command."""


def as_command(message: str, command: str, options: Iterable[str]) -> str:
    """A message in the words of a command.

    Args:
        command: such as `hf-lora train`.
        options: the names of its options, with `_`: `text_column` becomes `--text-column`. A name of one word is
            replaced only where a value follows, as in `task='causal-lm'`.
    """
    for sentence, instead in _SENTENCES.items():
        message = message.replace(sentence, instead)
    message = _CALL.sub(lambda call: " ".join(filter(None, (command, call[1] or call[2]))) + ":", message)
    for name in sorted(options, key=len, reverse=True):
        flag = f"--{name.replace('_', '-')}"
        message = re.sub(rf"(?<![\w'\"/.-]){name}=(?:True\b|'([\w.-]+)'|(?=\S))", _replacement(flag), message)
        if "_" in name:
            message = re.sub(rf"(?<![\w'\"/.-]){name}(?![\w'\"/(-])", flag, message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)


def _replacement(flag: str) -> Callable[[re.Match[str]], str]:
    return lambda found: flag if found[0].endswith("=True") else f"{flag} {found[1] or ''}"
