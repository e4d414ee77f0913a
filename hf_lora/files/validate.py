"""Validation of an adapter's JSON files: each value has the type that its reader expects, and none is expensive.

No value is opened, imported or matched before it is checked here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from ..adapt.patterns import as_text, table_pattern, why_invalid
from ..config import PLAIN_IN_FILES, TASK_TYPES
from ..data.trained import KINDS, is_prose, is_variables
from ..errors import AdapterFileError, Faults
from ..pooled.pooling import POOLING, check_pooling
from ..safe_io.reading import REPAIR, is_one_line
from .base_config import check_settings

MAX_RANK = 2**20
MAX_PATTERNS = 20_000
"""Maximum rows of `rank_pattern` and of `alpha_pattern`."""
MAX_EXPRESSIONS = 500
"""Maximum rows with a regular expression instead of a name."""
MAX_LABELS = 100_000
MAX_NAMES = 100
"""Maximum names of one module."""
MAX_TEXT = 4096
"""Maximum characters of a name or a path."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_NAME = re.compile(r"[\w.-]+")
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_REVISION = re.compile(r"\w[\w./+-]*")


def check_config(values: Mapping[str, Any], place: str) -> None:
    """Refuse an adapter_config.json with fields of the wrong type or with patterns that are too expensive.

    Raises:
        AdapterFileError: lists every such field.
    """
    faults = Faults(place)
    for name in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(values.get(name, False), (bool, type(None))):
            faults.add(f"{name}={values[name]!r} must be true or false")
    _check_rank(faults, "r", values.get("r"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), str):
            _check_pattern(faults, name, values[name], values[name])
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(values.get(name), Mapping):
            _check_table(faults, name, values[name])
    layers = values.get("layers_pattern")
    for pattern in layers if isinstance(layers, list) else [layers]:
        if layers and not (isinstance(pattern, str) and _NAME.fullmatch(pattern)):
            faults.add(f"layers_pattern: {pattern!r} must be a name, such as 'layers'")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if base not in (None, "") and (not is_text(base) or base.startswith(("//", "\\\\")) or "://" in base):
        faults.add(f"base_model_name_or_path={base!r} is not the name of a model")
    if revision is not None and not is_revision(revision):
        faults.add(f"revision={revision!r} is not a branch, tag or commit")
    faults.check(AdapterFileError, "Correct these fields, or load the adapter with the library that wrote it.")


def check_extras(values: Mapping[str, Any], place: str) -> None:
    """Refuse an hf_lora.json with invalid fields.

    Raises:
        AdapterFileError: lists every such field.
    """
    faults = Faults(place)
    _check_base(faults, values.get("base"))
    for name, good in (
        ("architecture", is_text),
        ("num_labels", _is_count),
        ("vocabulary", _is_count),
        ("biases", _is_count),
        ("problem_type", lambda value: value in PROBLEM_TYPES),
        ("task_type", lambda value: value in TASK_TYPES),
        ("method", lambda value: value in ("lora", *PLAIN_IN_FILES)),
    ):
        value = values.get(name)
        if value is not None and not good(value):
            faults.add(f"{name}={value!r} is invalid")
    joined = values.get("joined")
    if joined is not None and not (
        isinstance(joined, Mapping) and (not joined or all(map(_are_texts, [[*joined], *joined.values()])))
    ):
        faults.add("joined must map the name of a module to its other names")
    _check_labels(faults, values.get("id2label"))
    _check_format(faults, values.get("training_format"))
    if values.get(POOLING) is not None:
        check_pooling(faults, values[POOLING])
    check_settings(faults, values)
    faults.check(AdapterFileError, REPAIR)


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a name or path that can be shown in a line."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and is_one_line(value)


def is_revision(value: object) -> bool:
    """Whether a value can be a branch, a tag or a commit, without `..`."""
    return is_text(value) and _REVISION.fullmatch(value) is not None and ".." not in value


def _check_rank(faults: Faults, name: str, value: object) -> None:
    if isinstance(value, int) and value > MAX_RANK:
        faults.add(f"{name} is larger than {MAX_RANK:,}")


def _check_pattern(faults: Faults, name: str, shown: str, pattern: str) -> None:
    why = why_invalid(pattern)
    if why is not None:
        faults.add(f"{name}: {shown[:100]!r} cannot be matched: {why}")


def _check_table(faults: Faults, name: str, table: Mapping[str, Any]) -> None:
    expressions = sum(as_text(key) is None for key in table)
    if len(table) > MAX_PATTERNS or expressions > MAX_EXPRESSIONS:
        faults.add(
            f"{name} has {len(table):,} rows, {expressions:,} of them regular expressions (at most {MAX_PATTERNS:,} "
            f"and {MAX_EXPRESSIONS:,})"
        )
        return
    for key, value in table.items():
        _check_pattern(faults, name, key, key if as_text(key) is not None else table_pattern(key))
        _check_rank(faults, f"{name}[{key[:100]!r}]", value if name == "rank_pattern" else None)


def _check_base(faults: Faults, base: object) -> None:
    if base is None:
        return
    if not isinstance(base, Mapping):
        faults.add(f"base={base!r} must be an object")
        return
    for name in ("name", "commit", "files", "model_type"):
        good = is_revision if name == "commit" else is_text
        if base.get(name) is not None and not good(base[name]):
            faults.add(f"base.{name}={base[name]!r} is invalid")
    others = base.get("not_files")
    if others is not None and not (isinstance(others, Mapping) and all(map(is_text, others.values()))):
        faults.add("base.not_files must hold marks of files")
    for name in ("weights", "vectors"):
        weights = base.get(name)
        if weights is not None and not (isinstance(weights, Mapping) and all(map(_is_sample, weights.values()))):
            faults.add(f"base.{name} must hold samples of weights")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_NAMES and all(map(is_text, value))


def _is_sample(value: object) -> bool:
    """Whether a value is an array of 16-bit numbers in base64."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        return False
    return 0 < len(data) <= MAX_TEXT and len(data) % 2 == 0


def _check_labels(faults: Faults, labels: object) -> None:
    if not labels and labels in (None, {}):
        return
    if not isinstance(labels, Mapping) or len(labels) > MAX_LABELS:
        faults.add(f"id2label must be an object of at most {MAX_LABELS:,} labels")
    elif not all(_NUMBER.fullmatch(key) for key in labels) or len(set(map(int, labels))) < len(labels):
        faults.add("id2label must have distinct integers as keys")
    elif any(isinstance(label, (list, dict)) for label in labels.values()):
        faults.add("id2label must map each key to a name")


def _check_format(faults: Faults, values: object) -> None:
    if values is None:
        return
    if not isinstance(values, Mapping) or values.get("kind") not in KINDS:
        faults.add(f"training_format must be an object with a kind: {', '.join(KINDS)}")
        return
    for name, good in _FORMAT.items():
        if values.get(name) is not None and not good(values[name]):
            faults.add(f"training_format.{name}={values[name]!r} is invalid")


def _is_length(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


_FORMAT: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("text_column", "completion_column", "pair_column", "label_column"), is_text),
    **dict.fromkeys(("use_chat_template", "last_turn_only"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("separator", "system", "source_prefix"), is_prose),
    "variables": is_variables,
    **dict.fromkeys(("max_length", "max_target_length"), _is_length),
}
"""Field of `TrainedFormat` -> whether a value is valid."""
