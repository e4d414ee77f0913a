"""The arguments of a run as YAML: a commented file to begin with, and those of a parsed command line."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import ConfigError, nearest
from ..tasks.base import Task
from ..tasks.registry import TASKS
from .advice import Recommendation
from .arguments import LoraTrainingArguments
from .defaults import chooses, typical
from .parsing import DEFAULTS, Parsed, RunArguments, defaults_of, plain_values

WIDTH = 100
_COMMON = {
    "eval_file": "eval.csv", "dtype": "bfloat16", "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": ["all-linear"], "head_learning_rate": 1e-3, "loraplus_lr_ratio": 4,
    "save_strategy": "epoch", "overwrite": True, "seed": 42,
}  # fmt: skip
"""Options that are written as comments."""
_OUTPUT = "my-adapter"


def template(task: str, model: str | None = None) -> str:
    """A YAML file for `hf-lora train --config`, with every line explained. What a run chooses is left to it.

    Raises:
        ConfigError: the task is unknown.
    """
    if task not in TASKS:
        raise ConfigError(
            f"hf-lora init: the task {task!r} is unknown{nearest(task, TASKS)}. It is one of {', '.join(TASKS)}."
        )
    known = TASKS[task]
    defaults = defaults_of(known, packing=True)
    settings = typical(known) or {"lora_r": 8, "num_train_epochs": 3, "learning_rate": defaults.learning_rate}
    active: dict[str, Any] = {"model": model or "MODEL", "task": task, **known.files, "output_dir": _OUTPUT}
    if not chooses(known):
        active |= settings
    active["per_device_train_batch_size"] = defaults.per_device_train_batch_size
    lines = _active(active)
    if chooses(known):
        lines += _commented(
            "Chosen from the data and the width of the model, where they are not set. Usual for small models:"
        )
        lines += [*(f"#{_line(name, value)}" for name, value in settings.items()), ""]
    return _with_others(lines, _others(known), {**active, **settings})


def template_of(found: Recommendation) -> str:
    """A YAML file for `hf-lora train --config` with what is recommended for a model and data, and the reasons."""
    known = TASKS[found.task]
    active = {**found.given, "output_dir": found.given.get("output_dir", _OUTPUT)}
    lines = _active(active)
    for choice in found.settings:
        lines += _commented(f"{choice.reason[0].upper()}{choice.reason[1:]}:")
        lines += [*(_line(name, value) for name, value in choice.values.items()), ""]
        active |= choice.values
    return _with_others(lines, {**_others(known), **known.files}, active)


def _others(task: Task) -> dict[str, Any]:
    """Options that a task has, each with an example."""
    common = {name: value for name, value in _COMMON.items() if task.has_head or name != "head_learning_rate"}
    return {**task.options, **common}


def as_yaml(parsed: Parsed) -> str:
    """The arguments that a command line and its file set, for `--config`; this command's own defaults as comments.

    As settings, the defaults would count as given, and a run would no longer adapt them to its length.
    """
    values = {name: v for name, v in plain_values(parsed, parsed.given).items() if v is not None}
    defaults = plain_values(parsed, DEFAULTS.keys() - parsed.given)
    lines = [_dumped(values, flow=False)] if values else []
    if defaults:
        lines += ["# Defaults:", *(f"#{_line(name, value)}" for name, value in defaults.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: object) -> str:
    if isinstance(value, list | tuple | Mapping):
        return f"{name}: {_dumped(list(value) if isinstance(value, tuple) else value, flow=True)}"
    return _dumped({name: value}, flow=False)


def _dumped(value: object, flow: bool) -> str:
    return yaml.safe_dump(value, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=math.inf).rstrip()


def _explained(name: str) -> list[str]:
    fields = {f.name: f for cls in (RunArguments, LoraTrainingArguments) for f in dataclasses.fields(cls)}
    text = " ".join(str(fields[name].metadata.get("help", "")).split())
    sentence = re.split(r"\.\s+(?=[A-Z])", text)[0].rstrip(".") + "."
    return _commented(sentence)


def _commented(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _active(values: Mapping[str, Any]) -> list[str]:
    """The lines of a file up to and with settings that apply."""
    lines = ["# hf-lora train --config THIS_FILE. Options on the command line override it.", ""]
    for name, value in values.items():
        lines += [*_explained(name), _line(name, value), ""]
    return lines


def _with_others(lines: list[str], others: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """The file of these lines, which have some settings, with other ones behind them as comments."""
    lines = [*lines, "# Remove the # before a name to set it.", ""]
    idle = {"loraplus_lr_ratio"} if "muon_learning_rate" in named else set()
    for name, value in others.items():
        if name not in named and name not in idle:
            lines += [*_explained(name), f"#{_line(name, value)}", ""]
    return "\n".join(lines).rstrip() + "\n"
