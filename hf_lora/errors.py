"""Every error that hf_lora raises, and a collector that lists all faults in one error.

LoraError
├── ConfigError        a field of a LoraConfig, or of an adapter_config.json, has an invalid value
├── TargetError        a pattern matches nothing, or a module cannot be adapted
├── StateError         a call that is not possible in the current state: a duplicate name, a merged model …
├── MergeError         merging the adapter into the weights would give a wrong model
├── AdapterFileError   a file is broken, or its tensors do not fit the model
│   ├── BaseMismatchError   the adapter was trained on another base model
│   └── HubError            a repository on the Hub cannot be reached, read or written
├── VersionError       another library is missing, too old or too new
├── DataError          a file of training data is missing, broken, or does not fit the task
└── TrainingError      training would have no effect, or failed
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


class LoraError(Exception):
    """Base of all errors of this library.

    Args:
        faults: each thing that is wrong, where the message lists several.
    """

    def __init__(self, message: str = "", faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class ConfigError(LoraError, ValueError):
    """A configuration has values that are wrong, contradictory or not supported."""


class TargetError(LoraError, ValueError):
    """The modules that a configuration names do not exist or cannot be adapted."""


class StateError(LoraError, RuntimeError):
    """The call is not possible in the current state of the model."""


class MergeError(LoraError, RuntimeError):
    """The adapter cannot be folded into the base weights without changing what the model computes."""


class AdapterFileError(LoraError, ValueError):
    """An adapter file is missing, broken, or does not fit the model."""


class BaseMismatchError(AdapterFileError):
    """An adapter was trained on another base model."""


class HubError(AdapterFileError):
    """A repository on the Hub cannot be reached, read or written."""


class VersionError(LoraError, ImportError):
    """Another library that is needed is missing, too old or too new."""


class DataError(LoraError, ValueError):
    """Training data are missing, broken, or do not fit the task."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot start, or parameters that should be trained are not."""


class Faults:
    """Collects faults, then raises one error that lists them all.

    Args:
        call: the user's call, with which the message begins.
    """

    LISTED = 20
    LENGTH = 2000
    """Maximum number of characters of one fault, which may quote a file."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        self.found.append(fault if len(fault) <= self.LENGTH else f"{fault[: self.LENGTH]} …")

    def include(self, error: LoraError) -> None:
        """Add each fault that another error lists, or its message if it lists none."""
        for fault in error.faults or (str(error),):
            self.add(fault)

    def check(self, error: type[LoraError], next_step: str) -> None:
        """Raise `error` with all faults and the `next_step`, if there are any faults."""
        if not self.found:
            return
        lines = [f"  - {fault}" for fault in self.found[: self.LISTED]]
        if len(self.found) > self.LISTED:
            lines.append(f"  … and {len(self.found) - self.LISTED} more")
        raise error("\n".join([f"{self.call}:", *lines, next_step]), self.found)


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """` (did you mean …?)` with the known names closest to `name`, or an empty string."""
    if len(name) > 200:
        return ""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def listed(names: Collection[str], n: int = 5) -> str:
    """The first `n` names, and how many more there are."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(list(names)[:n]) + more
