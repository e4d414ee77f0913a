"""Every error that hf_lora raises, and the collector that lets one error list all faults.

LoraError
├── ConfigError        a field of a LoraConfig, or of a file's adapter_config.json, cannot be used
├── TargetError        a pattern matches nothing, or a module cannot take LoRA
├── StateError         the right call at the wrong moment: a name that is taken, a merged model …
├── MergeError         folding the adapter into the weights would give a wrong model
├── AdapterFileError   a file is broken, or its tensors do not fit the model
│   ├── BaseMismatchError   the file was trained on another base model
│   └── HubError            a repository on the Hub cannot be reached, read or written
├── DataError          a file of training data is absent, broken, or does not fit the task
└── TrainingError      training cannot start, or cannot have worked
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraError(Exception):
    """Base of all errors of this library.

    Args:
        faults: each thing that is wrong, where the message lists several.
    """

    def __init__(self, message: str = "", faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class ConfigError(LoraError, ValueError):
    """A configuration holds values that are wrong, contradictory or not supported."""


class TargetError(LoraError, ValueError):
    """The modules that a configuration names are absent, or cannot take LoRA."""


class StateError(LoraError, RuntimeError):
    """The call is not possible in the model's present state."""


class MergeError(LoraError, RuntimeError):
    """The adapter cannot be folded into the base weights without changing what the model computes."""


class AdapterFileError(LoraError, ValueError):
    """An adapter file is absent, broken, or does not fit the model."""


class BaseMismatchError(AdapterFileError):
    """An adapter was trained on another base model than the one at hand."""


class HubError(AdapterFileError):
    """A repository on the Hub cannot be reached, read or written."""


class DataError(LoraError, ValueError):
    """Training data are absent, broken, or do not fit the task."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot start, or something that should learn does not."""


class Faults:
    """Collects what is wrong, then raises one error that lists it all.

    Args:
        call: the call as the user wrote it; it opens the message.
    """

    LISTED = 20
    LENGTH = 2000
    """Characters of one fault: it may quote what a file holds."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        self.found.append(fault if len(fault) <= self.LENGTH else f"{fault[: self.LENGTH]} …")

    def include(self, error: LoraError) -> None:
        """Add each fault that another error lists, or its message where it lists none."""
        for fault in error.faults or (str(error),):
            self.add(fault)

    def check(self, error: type[LoraError], next_step: str) -> None:
        """Raise `error` with every fault and the `next_step`; do nothing if no fault was found."""
        if not self.found:
            return
        lines = [f"  - {fault}" for fault in self.found[: self.LISTED]]
        if len(self.found) > self.LISTED:
            lines.append(f"  … and {len(self.found) - self.LISTED} more")
        raise error("\n".join([f"{self.call}:", *lines, next_step]), self.found)


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """` (did you mean …?)` with the known names most like `name`, or an empty string."""
    if len(name) > 200:
        return ""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
