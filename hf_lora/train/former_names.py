"""Arguments of Trainer and TrainingArguments that transformers 5 renamed or removed; many scripts still pass them.

Each is translated with one warning, so that a script that changes one import also runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from transformers.utils import logging

from ..errors import ConfigError, Faults

logger = logging.get_logger(__name__)
Class = TypeVar("Class", bound=type)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "warmup_ratio": "warmup_steps",  # below 1 it is a ratio
    "max_seq_length": "max_length",
    "use_liger": "use_liger_kernel",
    "tokenizer": "processing_class",
}
"""Former name -> present name, with the same meaning."""
FLAGS: dict[str, tuple[str, object]] = {
    "adafactor": ("optim", "adafactor"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
}
"""Former flag -> the present argument and its value if the flag is set."""
REMOVED = {
    "use_mps_device": "the device is found automatically",
    "overwrite_output_dir": "files in output_dir are replaced as they are written",
    "save_safetensors": "adapters are always saved as safetensors",
    "fp16_backend": "PyTorch's own is used",
    "half_precision_backend": "PyTorch's own is used",
    "use_ipex": "PyTorch has its optimizations",
    "jit_mode_eval": "use torch_compile",
    "ray_scope": "pass scope to hyperparameter_search",
    "include_tokens_per_second": "use include_num_input_tokens_seen",
}
"""Former name -> why it is not needed."""
VALUES = {"save_safetensors": True}
"""Former name -> its value in the arguments, for libraries that still read it: sentence-transformers."""
TYPES: dict[str, type] = {
    **dict.fromkeys([*RENAMED.keys() - {"tokenizer"}, *REMOVED, "logging_dir"], str),
    **dict.fromkeys(["per_gpu_train_batch_size", "per_gpu_eval_batch_size", "max_seq_length"], int),
    **dict.fromkeys(
        [*FLAGS, "no_cuda", "use_liger", "use_mps_device", "overwrite_output_dir", "save_safetensors"], bool
    ),
    **dict.fromkeys(["use_ipex", "jit_mode_eval", "include_tokens_per_second"], bool),
    "warmup_ratio": float,
}
"""Former name of a training argument -> its type on a command line."""


def current_names(given: Mapping[str, Any], known: Callable[[str], bool], call: str) -> dict[str, Any]:
    """Keyword arguments under the names of the installed versions; one warning for each that changed.

    Args:
        known: whether the callable that gets them has a parameter of a name; such names are unchanged.
        call: for messages.

    Raises:
        ConfigError: an argument is given under both names; lists them.
    """
    found, faults, notes = dict(given), Faults(call), []
    for name in [name for name in given if not known(name)]:
        value = found[name]
        new, instead = FLAGS.get(name, (RENAMED.get(name), value))
        if name == "logging_dir" and value is not None:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(value))
            notes.append("logging_dir is now the environment variable TENSORBOARD_LOGGING_DIR, which was set")
        elif new is not None and known(new):
            if new in given:
                faults.add(f"{name} is the former name of {new}, and both are given")
            if name not in FLAGS or value:
                found[new] = instead
            notes.append(f"{name}={value!r} is now {new}={instead!r}" if name not in FLAGS or value else "")
        elif name in REMOVED:
            notes.append(f"{name} is no longer an argument and was ignored: {REMOVED[name]}")
        elif name != "logging_dir":
            continue
        del found[name]
    faults.check(ConfigError, "Remove the former names.")
    for note in filter(None, notes):
        logger.warning_once(f"{call}: {note}.")
    return found


def accepts_former_names(cls: Class) -> Class:
    """Decorator of a dataclass of training arguments: its constructor and its command line accept their former names.

    `HfArgumentParser` makes a flag of each field, so the former names are hidden fields that are always None, or as in
    `VALUES`.
    """
    original: Callable[..., None] = cls.__init__  # type: ignore[misc]
    known = {field.name: _default(field) for field in dataclasses.fields(cls)}
    former = {name: kind for name, kind in TYPES.items() if name not in known and RENAMED.get(name, "seed") in known}
    hidden: list[tuple[str, type, Any]] = [
        (name, kind, dataclasses.field(default=VALUES.get(name), metadata=_HIDDEN)) for name, kind in former.items()
    ]
    made = dataclasses.make_dataclass(cls.__name__, hidden, bases=(cls,), repr=False)

    @functools.wraps(original)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        given = {
            name: value
            for name, value in kwargs.items()
            if name not in former or value not in (None, VALUES.get(name))
        }
        for new in {FLAGS.get(name, (RENAMED.get(name), None))[0] for name in given.keys() & former}:
            if new in given and given[new] == known[new]:  # the parser passes all defaults
                del given[new]
        original(self, *args, **current_names(given, known.__contains__, f"{cls.__name__}(…)"))

    made.__init__ = init  # type: ignore[misc]
    made.__module__, made.__qualname__, made.__doc__ = cls.__module__, cls.__qualname__, cls.__doc__
    return cast(Class, made)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


_HIDDEN = {"help": argparse.SUPPRESS}
