"""What the initialization that a file names means for reading it."""

from __future__ import annotations

from ..config import LoraConfig
from ..errors import Faults
from ..layers.inits import find_init

LEAVE_THE_BASE = ("orthogonal", "eva")
"""Initializations of PEFT that only choose the first values of A and B."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of PEFT that subtract their first update from the base."""


def read_init(config: LoraConfig, faults: Faults) -> str | None:
    """Set the initialization of a configuration from a file to the one that matters for its values.

    Returns:
        what to do, if a fault was added because the file lacks what was subtracted from the base.
    """
    name = str(config.init_lora_weights).lower()
    if name in LEAVE_THE_BASE:  # the file has the values
        config.init_lora_weights = True
        return None
    found = find_init(name) if isinstance(config.init_lora_weights, str) else None
    if found is not None and found[0].of_file() is not None:
        config.init_lora_weights = name
        return None
    if not name.startswith(CHANGE_THE_BASE):
        return None
    if found is not None:
        faults.add(f"init_lora_weights={name!r}: what it subtracted from the base is in no file")
    return (
        f"init_lora_weights={config.init_lora_weights!r} subtracts the first update from the base. Convert the "
        "adapter to plain LoRA with PEFT: peft_model.save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=FOLDER), where FOLDER has the adapter as it was initialized. Import "
        "the package that registers these, or load it with the library that wrote it."
    )
