"""What a configuration asks for, and what of it can be checked without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import LoraConfig
from ..errors import Faults
from ..layers.contract import Method
from ..layers.inits import INITS, Init, find_init, init_name
from ..layers.methods import METHODS
from ..layers.parts import PARTS
from .match import PatternTable


def requested_parts(config: LoraConfig) -> dict[str, Any]:
    """Kind of part -> what a configuration asks for, in `parts` or in a field of PEFT."""
    rows = {"token_rows": config.trainable_token_indices} if config.trainable_token_indices else {}
    return rows | config.parts


def check_names(config: LoraConfig, faults: Faults) -> None:
    """Add a fault for each method, initialization or kind of part that is not registered."""
    if config.method not in METHODS:
        faults.add(f"method={config.method!r}: {METHODS.why_unknown(config.method)}")
    name, found = init_name(config.init_lora_weights), find_init(config.init_lora_weights)
    if found is None:
        faults.add(f"init_lora_weights={name!r} is not supported: {INITS.why_unknown(name)}")
    elif (instead := found[0].refuse_options(found[1])) is not None:
        faults.add(f"init_lora_weights={name!r}: {instead}")
    elif (wrong := found[0].refuse_settings(settings := settings_of(config, found[1]))) is not None and settings:
        faults.add(f"{name}_config: {wrong}")
    for kind in config.parts:
        if kind not in PARTS:
            faults.add(f"parts: {PARTS.why_unknown(kind)}")


def settings_of(config: LoraConfig, options: str) -> dict[str, Any]:
    """The settings of a configuration's initialization. `options` are the end of its name, after an underscore."""
    name = init_name(config.init_lora_weights)
    stem = name.removesuffix(f"_{options}") if options else name
    return getattr(config, f"{stem}_config", None) or {}


def check_pair(config: LoraConfig, init: Init, method: Method, faults: Faults) -> None:
    if (refused := init.refuse_method(method)) is not None:
        faults.add(f"init_lora_weights={config.init_lora_weights!r} with method={config.method!r}: {refused}")


def check_alphas(config: LoraConfig, faults: Faults) -> None:
    """Refuse to train with an alpha that is not positive; a file of PEFT may have one."""
    given = {"lora_alpha": config.alpha} | {f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.items()}
    for name, alpha in given.items():
        if alpha <= 0:
            faults.add(f"{name}={alpha!r} must be positive: 0 trains nothing, and a sign is not needed")


def scalings(config: LoraConfig) -> Callable[[str, str], float]:
    """(original name of an adapted weight, that of its module) -> the scaling of B A there."""
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    return lambda name, path: config.scaling(ranks.of(name, path, config.r), alphas.of(name, path, config.alpha))
