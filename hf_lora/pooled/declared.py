"""The sentence vector that a checkpoint declares, in the files of sentence-transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import logging

from ..errors import ConfigError
from .pooling import ACTIVATIONS, MODES, Dense, Pooling

logger = logging.get_logger(__name__)

OF_FILE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Arguments of `from_pretrained` that say where a file of a repository is, as huggingface_hub names them."""
MODULES = "modules.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switch of a mode in the configs of older versions -> the mode, in the order in which vectors are concatenated."""


def declared_pooling(name: str | os.PathLike[str], **where: Any) -> Pooling | None:
    """The sentence vector that a checkpoint declares; None if it declares none, or one that is not built here.

    Args:
        name: a folder, or a repository on the Hub.
        where: of `from_pretrained`; those of `OF_FILE` are used.
    """
    modules = _read(name, MODULES, where)
    if modules is None:
        return None
    try:
        return _pooling_of(name, modules, where)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            f"{os.fspath(name)}: {MODULES} declares a sentence vector that cannot be built here ({error}), so the "
            "classifier reads what its class in transformers reads."
        )
        return None


def dense_files(name: str | os.PathLike[str], **where: Any) -> list[Path]:
    """The weights of the declared dense layers, in order; arguments as those of `declared_pooling`.

    Raises:
        ConfigError: a file is missing.
    """
    paths = [f"{m['path']}/{WEIGHTS}" for m in _read(name, MODULES, where) or () if _kind(m) == "Dense"]
    found = [_file(name, path, where) for path in paths]
    missing = [path for path, file in zip(paths, found, strict=True) if file is None]
    if missing:
        raise ConfigError(f"{os.fspath(name)}: {', '.join(missing)} is missing, which {MODULES} names.")
    return [file for file in found if file is not None]


def _pooling_of(name: str | os.PathLike[str], modules: Any, where: Mapping[str, Any]) -> Pooling | None:
    found: Pooling | None = None
    for module in modules[1:]:  # the first is the transformer
        kind, path = _kind(module), module["path"]
        if kind == "Normalize":
            found = replace(_after(found, kind), normalize=True)
            continue
        config = _read(name, f"{path}/{CONFIG}", where)
        if config is None:
            raise ConfigError(f"{path}/{CONFIG} is missing")
        if kind == "Pooling" and found is None:
            found = Pooling(_modes(config))
        elif kind == "Dense" and not _after(found, kind).normalize:
            assert found is not None
            found = replace(found, dense=(*found.dense, _dense(config)))
        else:
            raise ConfigError(f"the module {module['type']}")
    return found


def _kind(module: Any) -> str:
    return str(module["type"]).rpartition(".")[2]


def _after(found: Pooling | None, kind: str) -> Pooling:
    if found is None:
        raise ConfigError(f"{kind} without a pooling before it")
    return found


def _modes(config: Any) -> tuple[str, ...]:
    if config.get("include_prompt") is False:
        raise ConfigError("a pooling without the tokens of the prompt")
    named = config.get("pooling_mode")
    modes = [mode for key, mode in OLD_NAMES.items() if config.get(key)] if named is None else named
    modes = tuple([modes] if isinstance(modes, str) else modes) or ("mean",)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ConfigError(f"the pooling {', '.join(map(str, unknown))}")
    return modes


def _dense(config: Any) -> Dense:
    activation = str(config.get("activation_function") or "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise ConfigError(f"the activation {activation}")
    return Dense(config["in_features"], config["out_features"], bool(config.get("bias", True)), activation)


def _read(name: str | os.PathLike[str], file: str, where: Mapping[str, Any]) -> Any:
    path = _file(name, file, where)
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning(f"{os.fspath(name)}: {file} could not be read ({error}).")
        return None


def _file(name: str | os.PathLike[str], file: str, where: Mapping[str, Any]) -> Path | None:
    if os.path.isdir(name):
        path = Path(name, where.get("subfolder") or "", file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(name), file, **{key: where[key] for key in OF_FILE if key in where}))
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None
    except (HfHubHTTPError, OSError) as error:
        logger.warning(f"{os.fspath(name)}: {file} could not be read ({error}).")
        return None
