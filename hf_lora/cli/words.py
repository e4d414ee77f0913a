"""Messages of the library in the words of a command: its flags instead of the arguments of functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_TEXT = r"'([^'\n]*)'"
_CALL = re.compile(
    rf"\A(?:[A-Za-z][\w.]*\((?:{_TEXT}|[^\n()']|\((?:{_TEXT}|[^\n()'])*\))*\)|evaluate|[a-z]+(?:_[a-z]+)+):"
)
"""A call or the name of a function with which a message begins; a group is an argument that is a text, or its path."""
_ALIASES = {"base_model": "base", "label_column": "completion_column"}
"""Arguments of functions -> options of a command that has no option of that name."""
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
        options: the names of its options, with `_`: `text_column` becomes `--text-column`, and so do the fields of
            LoraConfig, whose options begin with `lora_`. A name of one word is replaced only where a value follows,
            as in `task='causal-lm'`. Advice to pass an argument that the command lacks is left out.
    """
    own = {name: f"--{name.replace('_', '-')}" for name in options}
    fields = {name.removeprefix("lora_"): flag for name, flag in own.items() if name.startswith("lora_")}
    others = {name: own[option] for name, option in _ALIASES.items() if option in own}
    flags = {name: flag for name, flag in fields.items() if "_" in name} | others | own
    for sentence, instead in _SENTENCES.items():
        message = message.replace(sentence, instead)
    message = _CALL.sub(lambda call: " ".join([command, *_named(call[0])]) + ":", message)
    message = re.sub(r",? or pass (\w+)=True", lambda found: found[0] if found[1] in own else "", message)
    for name, flag in sorted(flags.items(), key=lambda item: -len(item[0])):
        message = re.sub(rf"(?<![\w'\"/.-]){name}=(?:True\b|'([\w.-]+)'|(?=\S))", _replacement(flag), message)
        if "_" in name:
            message = re.sub(rf"(?<![\w'\"/.-]){name}(?![\w'\"/(-])", flag, message)
    message = re.sub(r"(--[\w-]+) \[('[\w.-]+'(?:, '[\w.-]+')*)\]", _several, message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)


def _named(call: str) -> list[str]:
    """The argument of a call that a message begins with: its last path, else its first text."""
    texts = re.findall(_TEXT, call)
    return [text for text in texts if "/" in text][-1:] or texts[:1]


def _several(found: re.Match[str]) -> str:
    """A list after an option, as words."""
    return f"{found[1]} {' '.join(re.findall(_TEXT, found[2]))}"


def _replacement(flag: str) -> Callable[[re.Match[str]], str]:
    return lambda found: flag if found[0].endswith("=True") else f"{flag} {found[1] or ''}"
