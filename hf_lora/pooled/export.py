"""A classifier on a sentence vector as a folder of sentence-transformers, which loads without hf_lora."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..errors import ConfigError, StateError
from .declared import CONFIG, MODULES, OLD_NAMES, WEIGHTS
from .model import PooledForSequenceClassification

DENSE = "Dense"
_TYPES = "sentence_transformers.models"
_ACTIVATIONS = "torch.nn.modules.activation"
_IDENTITY = "torch.nn.modules.linear.Identity"


def save_as_sentence_transformer(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> Path:
    """Save a plain (merged) classifier of `build_classifier` for sentence-transformers: `encode` returns its logits.

    The pooling, the dense layers and the output layer become modules of sentence-transformers, the body a plain model
    of transformers. The names of the classes are in its config.json.

    Args:
        model: without adapters, as `merge_and_unload` returns it.
        folder: a new or empty folder.

    Raises:
        StateError: the model has adapters, or is of one of transformers' own classes, which `save_pretrained` saves.
        ConfigError: the folder holds files.
    """
    if not isinstance(model, PooledForSequenceClassification) or hasattr(model, "lora_configs"):
        raise StateError(
            f"save_as_sentence_transformer: {type(model).__name__} is not a plain classifier of build_classifier. "
            "Call merge_and_unload() first; a class of transformers is saved with save_pretrained."
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"save_as_sentence_transformer: {folder} is not empty. Name a new folder.")
    _modules(model, tokenizer, folder)
    return folder


def _modules(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the body, and a folder for each module behind it."""
    head, body = model.pooled_classifier, getattr(model, model.base_model_prefix)
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds: list[str] = ["Transformer", "Pooling"]
    chosen = head.pooling.modes
    modes: dict[str, Any] = {key: mode in chosen for key, mode in OLD_NAMES.items()}
    if chosen != tuple(mode for mode in OLD_NAMES.values() if mode in chosen):  # which switches cannot say
        modes = {"pooling_mode": list(chosen)}
    _write(folder / "1_Pooling" / CONFIG, {"word_embedding_dimension": model.config.hidden_size, **modes})
    for layer, settings in zip(head.dense, head.pooling.dense, strict=True):
        name = f"{_ACTIVATIONS}.{settings.activation}" if settings.activation != "Identity" else _IDENTITY
        _dense(_folder(folder, kinds), layer, name)
        kinds.append(DENSE)
    kinds += ["Normalize"] * head.pooling.normalize
    _dense(_folder(folder, kinds), head.out_proj, _IDENTITY)
    kinds.append(DENSE)
    rows = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{_TYPES}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    _write(folder / MODULES, rows)


def _folder(folder: Path, kinds: Sequence[str]) -> Path:
    """The folder of a dense layer behind these modules."""
    return folder / f"{len(kinds)}_{DENSE}"


def _dense(folder: Path, layer: nn.Linear, activation: str) -> None:
    values = {
        "in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None,
        "activation_function": activation,
    }  # fmt: skip
    _write(folder / CONFIG, values)
    tensors = {f"linear.{name}": p.detach().cpu().contiguous() for name, p in layer.named_parameters()}
    save_file(tensors, folder / WEIGHTS)


def _write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
