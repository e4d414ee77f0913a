"""The optimizer and its parameters: all that are trainable, with different learning rates for A, B and the heads.

LoRA+ (Hayou, Ghosh, Yu 2024, arXiv:2402.12354): with one learning rate for both factors, wide layers are trained
inefficiently; B needs a higher rate than A.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.utils import logging

from ..adapt.inner import adapted_part, outside
from ..adapt.walk import parts
from ..errors import ConfigError, TrainingError
from .muon import LoraMuon, factor_pairs

logger = logging.get_logger(__name__)

FIELDS = ("loraplus_lr_ratio", "head_learning_rate", "muon_learning_rate")
"""Fields of the arguments that set parameter groups of the optimizer."""
_NAMED = "loraplus_lr_ratio, head_learning_rate and muon_learning_rate"


def adopt_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Give an optimizer that was created before the adapter the adapter's tensors, in place of the frozen ones.

    Without this it would train nothing: scripts create it from `model.parameters()`, before the trainer adds the
    adapter. It must have one parameter group and no state.

    Raises:
        TrainingError: the optimizer lacks trainable tensors and has several groups, or holds a part of them.
    """
    missing = _missing(optimizer, model)
    if not missing:
        return
    group, *more = optimizer.param_groups
    if more or optimizer.state or any(p.requires_grad for p in group["params"]):
        _refuse(missing, model)
    group["params"] = [p for p in model.parameters() if p.requires_grad]
    logger.info(
        f"The optimizer was created before the adapter was added: it now holds the {len(missing)} trainable tensors."
    )


def check_optimizer(optimizer: Any, model: nn.Module, args: TrainingArguments, has_rates: bool) -> None:
    """Refuse an optimizer that lacks trainable tensors, or rates of `args` that it does not have.

    Args:
        has_rates: whether it is a result of `with_rates`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LayerWiseDummyOptimizer):
        return
    missing = _missing(optimizer, model)
    if missing:
        _refuse(missing, model)
    if not has_rates and _wants_rates(args):
        raise ConfigError(
            f"{_NAMED} have no effect because create_optimizer is overridden. Call super().create_optimizer() in it, "
            "or omit them."
        )


def refuse_projections(args: TrainingArguments, trainer: str) -> None:
    """Refuse optimizers that project the gradients of chosen linear layers (GaLore, APOLLO).

    These layers are frozen here, and the gradients of the factors, which are trained, have a low rank already.
    """
    if args.optim_target_modules is not None:
        raise ConfigError(
            f"{trainer}(…): optim_target_modules={args.optim_target_modules!r} chooses linear layers whose gradients "
            "GaLore or APOLLO projects, but adapted layers are frozen and only their factors, of low rank, are "
            "trained. Omit it, and choose another optim, such as adamw_torch."
        )


def _missing(optimizer: Optimizer, model: nn.Module) -> list[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def _refuse(missing: list[str], model: nn.Module) -> NoReturn:
    count = sum(p.requires_grad for p in model.parameters())
    raise TrainingError(
        f"The optimizer lacks {len(missing)} of {count} trainable tensors, such as {missing[0]}, and would not train "
        "them. Add the adapter first, model = apply_lora(model, config), and create the optimizer from [p for p in "
        "model.parameters() if p.requires_grad]; or pass optimizer_cls_and_kwargs instead of an optimizer."
    )


def with_rates(optimizer: Optimizer, model: nn.Module, args: TrainingArguments, was_given: bool) -> Optimizer | None:
    """The optimizer with the learning rates of B, the heads and LoRA-Muon; None if `args` has none of these.

    Raises:
        ConfigError: the optimizer `was_given`, it cannot have these rates, or a rate has no effect.
    """
    if not _wants_rates(args):
        return None
    ratio, head_rate, muon_rate = (getattr(args, name, None) for name in FIELDS)
    if was_given:
        raise ConfigError(
            f"{_NAMED} set the optimizer's parameter groups, but an optimizer was passed to the Trainer. Use one or "
            "the other."
        )
    rates = learning_rates(model, args.learning_rate, ratio, head_rate)
    if not rates and (ratio is not None or head_rate is not None):
        raise ConfigError(
            "loraplus_lr_ratio and head_learning_rate have no effect: they are for factors B and modules trained "
            "whole, and none of these is trained here. Omit them."
        )
    if rates:
        split_by_rate(optimizer, rates)
    return optimizer if muon_rate is None else _with_muon(optimizer, model, muon_rate)


def _with_muon(optimizer: Optimizer, model: nn.Module, rate: float) -> LoraMuon:
    if type(optimizer) is not AdamW:
        raise ConfigError(
            f"muon_learning_rate is for the factors, and everything else is trained with PyTorch's AdamW, but optim "
            f"chooses {type(optimizer).__name__}. Omit one of the two."
        )
    pairs = factor_pairs(model)
    if not pairs:
        raise ConfigError(
            "muon_learning_rate has no effect: it is for linear layers whose factors are both trained and are not "
            "those of other layers too, and the model has none. Omit it."
        )
    return LoraMuon(optimizer, pairs, rate)


def _wants_rates(args: TrainingArguments) -> bool:
    return any(getattr(args, name, None) is not None for name in FIELDS)


def learning_rates(
    model: nn.Module, learning_rate: float, loraplus_lr_ratio: float | None, head_learning_rate: float | None
) -> dict[int, float]:
    """id of a parameter -> its learning rate, for those that differ from the common one."""
    rates: dict[int, float] = {}
    for part in parts(adapted_part(model)):
        for spec, tensor in part.tensors():
            if loraplus_lr_ratio is not None and spec.axes == "OR" and spec.trainable:
                rates[id(tensor)] = learning_rate * loraplus_lr_ratio
            if head_learning_rate is not None and part.whole_module and spec.trainable:
                rates[id(tensor)] = head_learning_rate
    if head_learning_rate is not None:
        rates |= {id(tensor): head_learning_rate for tensor in outside(model).values() if tensor.requires_grad}
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
