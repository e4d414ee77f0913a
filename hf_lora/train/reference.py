"""The reference model of preference and RL trainers: it must be the model that training starts from.

TRL's trainers load it again from the base's folder or name, unless they are given one. That is right for a new
adapter, which changes nothing at first, but not if training continues an adapter, or if the base in memory is not the
one in the files: then the first loss of DPO is not ln 2, and the KL divergence not 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer

from ..adapt.state import require_state
from ..adapt.walk import parts
from ..errors import ConfigError, Faults
from ..files.identity import differs, sample_weights


def check_reference(trainer: Trainer, model: nn.Module, given: Iterable[object]) -> None:
    """Refuse a reference that the trainer loaded and that differs from the model before training.

    Args:
        given: the arguments of the trainer: a reference among them is the user's choice.
    """
    faults = Faults(f"{type(trainer).__name__}(…)")
    reference: Any = getattr(trainer, "ref_model", None)
    if getattr(trainer.args, "sync_ref_model", False):
        faults.add("sync_ref_model=True copies the model's parameters by position, which adapters change")
    if reference is not None and any(p.requires_grad for p in model.parameters()):  # else `train` refuses
        reference = trainer.accelerator.unwrap_model(reference)
        if all(reference is not value for value in given):
            for reason in _differences(model, reference):
                faults.add(f"the reference model, which is the base loaded again, is not the model to train: {reason}")
    faults.check(
        ConfigError,
        "To continue an adapter, merge it into its base (hf-lora merge ADAPTER --out FOLDER) and train a new adapter "
        "on FOLDER; or pass a reference, such as ref_model=LoraModel.from_pretrained(ADAPTER), if the trainer accepts "
        "one.",
    )


def _differences(model: nn.Module, reference: nn.Module) -> list[str]:
    found = []
    active = require_state(model, "Trainer").activity.active
    tensors = (each for name in active for part in parts(model, name) for each in part.tensors())
    if any(spec.axes == "OR" and bool(tensor.detach().count_nonzero()) for spec, tensor in tensors):
        found.append("its adapter is already trained")
    kinds = [bool(getattr(m, "is_quantized", False)) for m in (model, reference)]
    if kinds[0] != kinds[1]:
        found.append("only one of them is quantized")
    rows = [m.get_input_embeddings().weight.shape[0] for m in (model, reference)]  # type: ignore[operator]
    if rows[0] != rows[1]:
        found.append(f"its vocabulary has {rows[0]} rows, and the reference's {rows[1]}")
    samples = [{"weights": sample_weights(m)} for m in (model, reference)]
    if kinds[0] == kinds[1] and differs(*samples):
        found.append("the weights of its base differ from those in the base's files")
    return found
