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

from ..errors import ConfigError, LoraError, nearest
from ..files.format import holds_adapter
from ..hub.names import is_folder
from ..versions import why_missing


def check_name(name: str) -> str | None:
    """What is wrong with the name of a base model, as far as this machine can tell without the Hub; None: nothing."""
    if not name.strip():
        return "--model is empty: pass a folder or a name on the Hub"
    if is_folder(name):
        if holds_adapter(name):
            return f"--model {name} is an adapter. Pass its base as --model, and it as --lora-adapter {name}"
        if not Path(name, "config.json").is_file():
            held = ", ".join(sorted(os.listdir(name))[:5]) or "nothing"
            return f"--model {name} is not the folder of a model: it has no config.json. It holds {held}"
        return None
    if os.path.isfile(name):
        return f"--model {name} is a file. Name the folder of the model, with its config.json"
    if name.startswith("~"):
        return f"--model {name}: the shell did not expand ~. Write the whole path, {os.path.expanduser(name)}"
    if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1 or "\\" in name:
        return f"--model {name}: there is no such folder{_siblings(name)}"
    return None


def read_processor(name: str, revision: str | None, auto_class: str) -> Any:
    """The tokenizer of a base model, or its processor of images.

    Args:
        auto_class: the class of transformers that loads it.

    Raises:
        ConfigError: it could not be read.
    """
    with _one_line(name, "its tokenizer" if auto_class == "AutoTokenizer" else "its image processor"):
        return getattr(transformers, auto_class).from_pretrained(name, revision=revision)


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
        where = (
            "" if is_folder(name) else f" Check the name{_siblings(name)} and, for a model on the Hub, the network."
        )
        raise ConfigError(
            f"--model {name}: {what} could not be loaded ({type(error).__name__}: {lines[0]}).{where}"
        ) from error


def _siblings(name: str) -> str:
    """The folders beside a mistyped path with the nearest names."""
    parent, _, last = name.rstrip("/").rpartition("/")
    try:
        with os.scandir(parent or ("/" if name.startswith("/") else ".")) as entries:
            folders = [entry.name for entry in entries if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    return nearest(last, folders)
