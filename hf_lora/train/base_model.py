"""The base model that a user named: its config and tokenizer, read before the data, and its weights, read last.

Whatever is wrong with the name or the folder is one error with the next step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from ..data.encode import knows_no_text
from ..errors import ConfigError, LoraError
from ..files.format import holds_adapter
from ..hub.names import is_folder, siblings, why_no_source
from ..versions import why_missing


def check_name(name: str) -> str | None:
    """What is wrong with the name of a base model, as far as this machine can tell without the Hub; None: nothing."""
    if is_folder(name):
        if holds_adapter(name):
            return f"--model {name} is an adapter. Pass its base as --model, and it as --lora-adapter {name}"
        if not Path(name, "config.json").is_file():
            held = ", ".join(sorted(os.listdir(name))[:5]) or "nothing"
            return f"--model {name} is not the folder of a model: it has no config.json. It holds {held}"
        return None
    if os.path.isfile(name):
        return f"--model {name} is a file. Name the folder of the model, with its config.json"
    reason = why_no_source(name)
    return None if reason is None else f"--model {name}: {reason}" if name.strip() else f"--model: {reason}"


def check_adapter(name: str) -> str | None:
    """What is wrong with the name of an adapter to continue, as for `check_name`."""
    if is_folder(name):
        return None if holds_adapter(name) else f"--lora-adapter {name} is not the folder of an adapter"
    reason = why_no_source(name)
    return None if reason is None else f"--lora-adapter {name}: {reason}" if name else f"--lora-adapter: {reason}"


def read_processor(name: str, revision: str | None, auto_class: str) -> Any:
    """The tokenizer of a base model, or its processor of images.

    Args:
        auto_class: the class of transformers that loads it.

    Raises:
        ConfigError: it could not be read.
    """
    is_tokenizer = auto_class == "AutoTokenizer"
    with _one_line(name, "its tokenizer" if is_tokenizer else "its image processor"):
        processor = getattr(transformers, auto_class).from_pretrained(name, revision=revision)
    if is_tokenizer and knows_no_text(processor):
        raise ConfigError(
            f"--model {name}: it has no tokenizer, or one without a vocabulary. Save the one of this model there: "
            "tokenizer.save_pretrained(folder)."
        )
    return processor


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """The config of a base model.

    Raises:
        ConfigError: it could not be read.
    """
    with _one_line(name, "its config"):
        config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    return config


def load_base(make: Callable[..., Any], name: str, *given: Any, **options: Any) -> Any:
    """The base model by `make(*given, **options)`.

    Raises:
        ConfigError: it could not be loaded.
    """
    with _one_line(name, "the model"):
        return make(*given, **options)


@contextlib.contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (LoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the Hub, a proxy, the files' parsers and missing packages raise any exception
        missing = why_missing(error) if isinstance(error, ImportError) else None
        if missing is not None:
            raise ConfigError(f"--model {name}: {what} could not be loaded: {missing}.") from error
        lines = str(error).strip().splitlines() or [""]
        where = "" if is_folder(name) else f" Check the name{siblings(name)} and, for a model on the Hub, the network."
        raise ConfigError(
            f"--model {name}: {what} could not be loaded ({type(error).__name__}: {lines[0]}).{where}"
        ) from error
