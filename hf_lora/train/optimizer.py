"""Different learning rates for A, B and the heads, as parameter groups of Trainer's own optimizer.

LoRA+ (Hayou, Ghosh, Yu 2024, arXiv:2402.12354): with one learning rate for both factors, wide layers are trained
inefficiently; B needs a higher rate than A.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from ..adapt.walk import parts
from ..errors import ConfigError


def set_rates(optimizer: Optimizer, model: nn.Module, args: TrainingArguments, was_given: bool) -> bool:
    """Set the learning rates of B and the heads, if `args` has any; ConfigError if the optimizer `was_given`."""
    ratio, head_rate = getattr(args, "loraplus_lr_ratio", None), getattr(args, "head_learning_rate", None)
    if ratio is None and head_rate is None:
        return False
    if was_given:
        raise ConfigError(
            "loraplus_lr_ratio and head_learning_rate set the optimizer's parameter groups, but an optimizer was "
            "passed to the Trainer. Use one or the other."
        )
    split_by_rate(optimizer, learning_rates(model, args.learning_rate, ratio, head_rate))
    return True


def learning_rates(
    model: nn.Module, learning_rate: float, loraplus_lr_ratio: float | None, head_learning_rate: float | None
) -> dict[int, float]:
    """id of a parameter -> its learning rate, for those that differ from the common one."""
    rates: dict[int, float] = {}
    for part in parts(model):
        for spec, tensor in part.tensors():
            if loraplus_lr_ratio is not None and spec.axes == "OR":
                rates[id(tensor)] = learning_rate * loraplus_lr_ratio
            if head_learning_rate is not None and part.whole_module and spec.trainable:
                rates[id(tensor)] = head_learning_rate
    return rates


def split_by_rate(optimizer: Optimizer, rates: dict[int, float]) -> None:
    """Split the groups of a new optimizer so that each parameter has its rate; other options are kept.

    A scheduler multiplies every group's rate by the same factor, so the ratios stay constant.
    """
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float | None, list[nn.Parameter]] = {None: []}  # the common rate first: it is logged
        for parameter in group["params"]:
            parts.setdefault(rates.get(id(parameter)), []).append(parameter)
        if len(parts) > 1 and not parts[None]:
            del parts[None]
        for rate, parameters in parts.items():
            split.append({**group, "params": parameters, "lr": group["lr"] if rate is None else rate})
    optimizer.param_groups[:] = split
    placed = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    if not any(id_ in placed for id_ in rates) or any(placed[i] != rate for i, rate in rates.items() if i in placed):
        raise ConfigError(
            f"loraplus_lr_ratio and head_learning_rate need an optimizer with parameter groups; "
            f"{type(optimizer).__name__} has none of its own. Choose another optim, such as adamw_torch."
        )
