"""What configurations of other libraries have and `LoraConfig` does not: fields that do nothing here, and refusals."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .errors import ConfigError, Faults, nearest

Class = TypeVar("Class", bound=type)

# Fields of PEFT's adapter_config.json that are ignored if they have the value at which they do nothing. Another value
# changes what the adapter computes, so it is an error.
_DEFAULTS_OF_OTHERS: dict[str, tuple[object, ...]] = {
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
# Fields of PEFT that are not supported -> what they do, and why that is not done here.
_OF_OTHERS = {
    "use_qalora": "inputs are averaged in groups, for bases of GPTQ that are not supported either (QA-LoRA)",
    "qalora_group_size": "inputs are averaged in groups, for bases of GPTQ that are not supported either (QA-LoRA)",
    "use_bdlora": "a factor is block-diagonal, which saves time only if layers are split over devices (BD-LoRA)",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "parameters are adapted that are not the weight of a layer, such as experts in one tensor "
    "(PEFT sets this field by itself for the experts and routers of a mixture of experts)",
    "megatron_config": "the layers are those of Megatron",
    "arrow_config": "a router selects adapters for each token, so there is no adapter to train or to merge (Arrow)",
    "velora_config": "gradients are computed from compressed inputs, so they are not those of the loss (VeLoRA)",
    "kasa_config": "small singular values are removed from the base, which other adapters then lack (KaSA)",
    "monteclora_config": "factors are drawn at random and need a loss of their own (MonteCLoRA)",
}
OTHER_TYPES = {
    "ADALORA": "AdaLoRA prunes ranks during training by a schedule of its own. Convert it to LoRA with PEFT, or train "
    "with ranks of your own (rank_pattern)",
    "XLORA": "X-LoRA mixes several adapters by a trained network, for each token. Load these adapters one by one",
}
# Fields that do not affect what a file computes; any value is accepted.
DESCRIPTIVE = frozenset({
    "auto_mapping", "inference_mode", "peft_version", "runtime_config", "megatron_core", "loftq_config",
})  # fmt: skip
_OTHER_NAMES = {  # of other libraries and papers -> the field
    "rank": "r", "lora_rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "target_modules", "init_weights": "init_lora_weights",
}  # fmt: skip


def accepts_fields_of_peft(cls: Class) -> Class:
    """Decorator of `LoraConfig`: its constructor accepts PEFT's other fields where they do nothing.

    Any other unknown argument is a ConfigError with the name or the reason.
    """
    original: Callable[..., None] = cls.__init__  # type: ignore[misc]
    own = {f.name for f in dataclasses.fields(cls)}

    @functools.wraps(original)
    def init(self: object, *args: Any, **given: Any) -> None:
        faults = Faults("LoraConfig(…)")
        for name in [name for name in given if name not in own]:
            check_foreign(name, given.pop(name), own, faults)
        faults.check(ConfigError, "Correct these arguments; the docstring of LoraConfig describes its fields.")
        original(self, *args, **given)

    cls.__init__ = init  # type: ignore[misc]
    return cls


def check_foreign(name: str, value: object, own: Iterable[str], faults: Faults) -> None:
    """Add a fault for a field of another library, unless it does nothing."""
    if name in DESCRIPTIVE or _is_inert(name, value):
        return
    if name in _OF_OTHERS:
        hint = f": {_OF_OTHERS[name]}"
    elif name in _OTHER_NAMES:
        hint = f" (here it is called {_OTHER_NAMES[name]!r})"
    else:
        hint = nearest(name, own) if len(faults.found) < faults.LISTED else ""
    faults.add(f"{name}={value!r:.200} is not supported{hint}")


def _is_inert(name: str, value: object) -> bool:
    """Whether an unknown field has a value at which it does nothing."""
    return value is None or value is False or value in ({}, [], "", ()) or value in _DEFAULTS_OF_OTHERS.get(name, ())
