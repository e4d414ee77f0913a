"""The settings of a base model that a script changed for training, such as its end token or its rope scaling.

An adapter was trained with them, but the base's files have others, so the differences are kept in `hf_lora.json` and
set again where the base is loaded. `FIELDS` lists which: none names code, a path or a format of weights, and none but
the size of a vocabulary without token embedding (CTC) changes a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from ..adapt.embeddings import vocabulary_of
from ..errors import Faults
from ..pooled.pooling import POOLING

logger = logging.get_logger(__name__)

MAX_ITEMS = 4096
MAX_VOCABULARY = 2**24


def _is_token(value: object) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= MAX_ITEMS and all(_is_token(each) and isinstance(each, int) for each in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 1e9)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_activation(value: object) -> bool:
    return isinstance(value, str) and value in ACT2FN


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_VOCABULARY


def _is_rope(value: object, depth: int = 2) -> bool:
    """Numbers, lists of them and short names by name, once more for each type of layers."""
    if value is None or not isinstance(value, Mapping) or len(value) > 64 or not depth:
        return value is None
    return all(
        _is_number(each)
        or (isinstance(each, str) and each.isidentifier() and len(each) < 64)
        or (isinstance(each, list) and len(each) <= MAX_ITEMS and all(map(_is_number, each)))
        or _is_rope(each, depth - 1)
        for each in value.values()
    )


TOKENS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
FIELDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(TOKENS, _is_token),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "activation"), _is_activation),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _is_rope),
    **dict.fromkeys(
        (
            "rope_theta", "partial_rotary_factor", "sliding_window", "layer_norm_eps", "layer_norm_epsilon",
            "norm_eps", "rms_norm_eps", "final_logit_softcapping", "attn_logit_softcapping", "logit_scale",
            "logits_scaling", "attention_multiplier", "residual_multiplier", "embedding_multiplier",
            "num_experts_per_tok", "router_aux_loss_coef", "mask_ratio",
        ),
        _is_number,
    ),
    **dict.fromkeys(
        (
            "norm_pix_loss", "is_decoder", "norm_topk_prob", "output_router_logits", "scale_embedding",
            "ctc_zero_infinity", "use_sliding_window",
        ),
        _is_switch,
    ),
    "vocab_size": _is_size,
    "classifier_pooling": lambda value: value in ("cls", "mean"),
}  # fmt: skip
"""Name of a field -> whether a value of it is safe."""


def base_settings(model: nn.Module) -> dict[str, Any]:
    """`config` and `generation`: the settings in a model's files; empty if it has none on this machine."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    if not name or not hasattr(type(config), "from_pretrained"):
        return {}
    commit = getattr(config, "_commit_hash", None) or "main"
    try:
        held = type(config).from_pretrained(name, local_files_only=True, revision=commit)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    try:
        generation = GenerationConfig.from_pretrained(name, local_files_only=True, revision=commit)
    except (OSError, ValueError):
        generation = GenerationConfig.from_model_config(held)
    return {"config": _settings(held), "generation": _of(generation, TOKENS)}


def changed_settings(model: nn.Module, before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that differ from those `before`, as they are stored."""
    config: Any = getattr(model, "config", None)
    if not before or config is None:
        return {}
    now = {"config": _settings(config), "generation": _of(getattr(model, "generation_config", None), TOKENS)}
    if vocabulary_of(model) is not None:  # the size of its token embedding, which is stored elsewhere
        for part in (now["config"], *(v for v in now["config"].values() if isinstance(v, dict))):
            part.pop("vocab_size", None)
    return {part: changes for part in now if (changes := _differing(now[part], before[part]))}


def check_settings(faults: Faults, values: Mapping[str, Any]) -> None:
    """Add a fault for every setting in an hf_lora.json that is not in `FIELDS`, or whose value is not safe."""
    for part in ("config", "generation"):
        changes = values.get(part) or {}
        if not isinstance(changes, Mapping):
            faults.add(f"{part}={str(changes)[:100]!r} must be an object")
            continue
        for path, value in _flat(changes):
            name = path.rpartition(".")[2]
            known, depth = (FIELDS, 1) if part == "config" else (TOKENS, 0)
            if path.count(".") > depth or name not in known:
                faults.add(f"{part}.{path} is not a setting of an adapter")
            elif not FIELDS[name](value):
                faults.add(f"{part}.{path}={str(value)[:100]!r} is invalid")


def settings_for(config: Any, extras: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of an adapter that apply to a base with this config, as arguments of `from_pretrained`."""
    found: dict[str, Any] = {}
    for name, value in (extras.get("config") or {}).items():
        inner = getattr(config, name, None)
        if name in FIELDS and hasattr(config, name):
            found[name] = value
        elif isinstance(value, Mapping) and hasattr(inner, "to_dict"):
            found[name] = {key: each for key, each in value.items() if hasattr(inner, key)}
    return found


def set_settings(config: Any, extras: Mapping[str, Any]) -> None:
    """Change a config as it was changed for training."""
    for name, value in settings_for(config, extras).items():
        inner = getattr(config, name)
        for key, each in value.items() if hasattr(inner, "to_dict") else ():
            setattr(inner, key, each)
        if not hasattr(inner, "to_dict"):
            setattr(config, name, value)
    if extras.get(POOLING):
        setattr(config, POOLING, extras[POOLING])


def set_generation(model: Any, extras: Mapping[str, Any]) -> None:
    """Change the generation config of a model as it was changed for training."""
    for name, value in (extras.get("generation") or {}).items():
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, value)


def describe_settings(extras: Mapping[str, Any]) -> str:
    """The changes in one line; empty if there are none."""
    return ", ".join(
        f"{part}.{path}={value!r}"
        for part in ("config", "generation")
        for path, value in _flat(extras.get(part) or {})
    )


def other_settings(model: nn.Module, extras: Mapping[str, Any]) -> str:
    """The settings with which an adapter was trained and that this model does not have, in one line."""
    config: Any = getattr(model, "config", None)
    now = {"config": _settings(config) if config is not None else {}}
    now["generation"] = _of(getattr(model, "generation_config", None), TOKENS)
    wanted = {part: _differing(extras.get(part) or {}, now[part]) for part in now}
    return describe_settings(wanted)


def changed_json(values: dict[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the changes of an adapter."""
    for name, value in (extras.get("config") or {}).items():
        if name in FIELDS:
            values[name] = value
        elif isinstance(values.get(name), dict):
            changed_json(values[name], {"config": value})
    if extras.get(POOLING):
        values[POOLING] = extras[POOLING]
    if "rope_parameters" in (extras.get("config") or {}):
        values.pop("rope_scaling", None)  # the older name would be preferred
    return values


def _settings(config: Any) -> dict[str, Any]:
    inner = {name: _of(each, FIELDS) for name, each in vars(config).items() if hasattr(each, "to_dict")}
    return _of(config, FIELDS) | {name: values for name, values in inner.items() if values}


def _of(config: Any, names: Any) -> dict[str, Any]:
    """The fields of a config, as JSON would give them back."""
    found = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        result: dict[str, Any] = json.loads(json.dumps(found))
    except (TypeError, ValueError):
        return {}
    return result


def _differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The safe values of `now` that `before` has otherwise."""
    found: dict[str, Any] = {}
    for name, value in now.items():
        if name not in FIELDS and isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
            if inner := _differing(value, before[name]):
                found[name] = inner
        elif name in FIELDS and name in before and value != before[name] and FIELDS[name](value):
            found[name] = value
    return found


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in changes.items():
        if isinstance(value, Mapping) and name not in FIELDS:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
