"""A classifier for a checkpoint: with the task's own class where that reads the right feature, else with ours."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification

from ..errors import ConfigError
from .declared import declared_pooling, dense_files
from .model import OF_SOURCE, PooledHead, body_of, class_for, class_named
from .pooling import POOLING, Pooling

OWN = "own"
"""The name of the pooling of a class of transformers."""
_CLASSIFIER = "ForSequenceClassification"
_OWN_SETTING = "classifier_pooling"
"""The setting of the classes of transformers that can pool in several ways."""


def build_classifier(
    path: str | os.PathLike[str],
    labels: Sequence[str] | int | None = None,
    *,
    pooling: str | Pooling | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """A classifier of texts with a new head on the sentence vector that its checkpoint declares, or a saved one.

    Args:
        path: a folder, or a repository on the Hub.
        labels: the names of the classes, or their number. None: those of the checkpoint, which is a classifier
            already, such as a merged one.
        pooling: `cls`, `mean`, `max`, `last`, another mode of sentence-transformers, a `Pooling`, or `own` for what
            its class in transformers reads. Default: what the checkpoint declares in the files of
            sentence-transformers, else `own`.
        revision: branch, tag or commit of the repository.
        kwargs: of `from_pretrained`.

    A saved classifier of hf_lora keeps its head, unless `labels` comes with another number of them or another pooling.

    Returns:
        A transformers model for sequence classification: of the task's own class if that reads this feature, else of
        a class of hf_lora over the same body, whose head also pools.

    Raises:
        ConfigError: the pooling is unknown, or does not fit the model; or there are no labels for a new head, or not
            different ones.
    """
    options = dict(kwargs) if revision is None else {**kwargs, "revision": revision}
    where = {key: options[key] for key in OF_SOURCE if key in options}
    config = AutoConfig.from_pretrained(path, **where)
    saved = class_named(next(iter(config.architectures or ()), None))
    if labels is None:
        _check_saved(path, config, pooling)
    else:
        names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        if isinstance(labels, str) or not names or len(set(names)) < len(names):
            raise ConfigError(
                f"build_classifier({os.fspath(path)!r}): labels={labels!r:.200} must be the names of the classes, "
                "each once, or their number, at least 1."
            )
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if saved is not None:
        if labels is not None:  # with another number of them, the output layer is new
            options.setdefault("ignore_mismatched_sizes", True)
        if pooling is None:
            return saved.from_pretrained(path, **options)
    before = getattr(config, POOLING, None)
    chosen = chosen_pooling(path, config, pooling, **where)
    if chosen is None:
        return AutoModelForSequenceClassification.from_pretrained(path, **options)
    model = load_pooled(path, config, chosen, options)
    if before is not None and before != chosen.to_json():
        _renew_head(model[0] if isinstance(model, tuple) else model)
    return model


def is_pooled(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a saved classifier of a class of hf_lora."""
    values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return class_named(next(iter(values.get("architectures") or ()), None)) is not None


def _check_saved(path: str | os.PathLike[str], config: PretrainedConfig, pooling: object) -> None:
    """Refuse a checkpoint without a head of its own, or another pooling for one."""
    if pooling is not None:
        raise ConfigError(f"build_classifier({os.fspath(path)!r}): another pooling needs a new head. Pass labels=.")
    if not any(name.endswith(_CLASSIFIER) for name in config.architectures or ()):
        raise ConfigError(f"build_classifier({os.fspath(path)!r}): this is not a classifier. Pass labels=.")


def chosen_pooling(
    path: str | os.PathLike[str], config: PretrainedConfig, pooling: str | Pooling | None, **where: Any
) -> Pooling | None:
    """The pooling of a new classifier for a checkpoint; None: its class in transformers has its own way.

    Args:
        where: of `from_pretrained`, see `declared_pooling`.
    """
    if pooling is not None:
        return None if pooling == OWN else Pooling.of(pooling)
    if any(name.endswith(_CLASSIFIER) for name in config.architectures or ()):
        return None  # the checkpoint is a classifier already
    return declared_pooling(path, **where)


def load_pooled(path: str | os.PathLike[str], config: Any, pooling: Pooling, options: dict[str, Any]) -> Any:
    """The classifier of a checkpoint with this pooling, by `from_pretrained` with `options`."""
    cls = pooled_for(config, pooling)
    if cls is None:
        setting = _own_setting(config, pooling)
        return AutoModelForSequenceClassification.from_pretrained(path, **{**(setting or {}), **options})
    model = cls.from_pretrained(path, pooling=pooling, **options)
    found = model[0] if isinstance(model, tuple) else model  # with output_loading_info
    if pooling.dense:
        declared = declared_pooling(path, **options)
        if declared is not None and declared.dense == pooling.dense:  # else they are new
            _load_dense(found, dense_files(path, **options))
    return model


def _renew_head(model: Any) -> None:
    """Replace a head that was trained for another pooling."""
    head: PooledHead = model.pooled_classifier
    weight = head.out_proj.weight
    width = model.config.get_text_config().hidden_size
    new = PooledHead(head.pooling, width, head.out_proj.out_features, head.dropout.p)
    model._init_weights(new)
    model.pooled_classifier = new.to(weight.device, weight.dtype).train(head.training)


def pooled_for(config: Any, pooling: Pooling) -> Any:
    """Our class for a config with this pooling, which is set in it; None if the task's own class reads this feature.

    Raises:
        ConfigError: transformers has no body for it, or a dense layer does not fit.
    """
    if _own_setting(config, pooling) is not None:
        return None
    _check_width(config, pooling)
    setattr(config, POOLING, pooling.to_json())
    return class_for(config)


def _own_setting(config: Any, pooling: Pooling) -> dict[str, Any] | None:
    """The settings with which the task's own class reads this feature; None if it cannot, or empty if it does."""
    if len(pooling.modes) > 1 or pooling.dense or pooling.normalize:
        return None
    mode, mapping = pooling.modes[0], AutoModelForSequenceClassification._model_mapping
    if hasattr(config, _OWN_SETTING) and mode in ("cls", "mean"):
        return {_OWN_SETTING: mode}
    cls: Any = mapping.get(type(config), None)
    reads_last = isinstance(cls, type) and issubclass(cls, GenericForSequenceClassification)
    return {} if mode == "lasttoken" and reads_last else None


def _check_width(config: Any, pooling: Pooling) -> None:
    if body_of(config) is None:
        raise ConfigError(f"pooling={str(pooling)!r}: transformers has no body for a {config.model_type}.")
    width = config.get_text_config().hidden_size * len(pooling.modes)
    for layer in pooling.dense:
        if layer.in_features != width:
            raise ConfigError(
                f"pooling={str(pooling)!r}: a dense layer reads {layer.in_features} features, but there are {width}."
            )
        width = layer.out_features


@torch.no_grad()
def _load_dense(model: Any, files: Sequence[Path]) -> None:
    """Load the declared dense layers. They are a part of the head, which an adapter saves whole."""
    for layer, file in zip(model.pooled_classifier.dense, files, strict=True):
        tensors = load_file(file)
        for name, parameter in layer.named_parameters():
            parameter.copy_(tensors[f"linear.{name}"])
