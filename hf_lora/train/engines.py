"""Which engine runs the training, whether it is the one that was asked for, and its optimizer's state as a whole.

A checkpoint has one form whatever the engine: the optimizer's state is written as an unsharded torch optimizer writes
it, by position, so a run that was begun on one engine or number of processes goes on with another.
(`torch.distributed.checkpoint.state_dict` names the parameters instead, takes a step to make their state, and knows
nothing of DeepSpeed, which most of this file is about.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..adapt.state import require_state
from ..compat import link_states, zero_partitions
from ..errors import ConfigError, StateError, TrainingError
from ..layers import distributed as ranks
from ..layers.storages import unshardable

logger = logging.get_logger(__name__)

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups as an optimizer has them: options, and `params`."""
_NAMES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}


def asked_engine(args: Any) -> tuple[str, str] | None:
    """(engine, where it was asked for): by the training arguments, or by `accelerate launch` in the environment."""
    for name, variable in _NAMES.items():
        if getattr(args, name.lower(), None):
            return name, f"the training argument {name.lower()}"
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return name, f"the launch configuration ({variable})"
    return None


def running_engine(accelerator: Any) -> str:
    """What Accelerate runs, such as NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED."""
    kind = accelerator.distributed_type
    return str(getattr(kind, "value", kind)).upper()


def check_engine(args: Any, accelerator: Any, model: Any, accept_ddp_fallback: bool, call: str) -> None:
    """Refuse an engine that is not the one that was asked for, or that adapters cannot be trained with.

    Raises:
        ConfigError: Accelerate fell back to another engine, or the engine is not supported.
        StateError: the model was sharded before it came here.
    """
    asked, runs = asked_engine(args), running_engine(accelerator)
    if asked is not None and runs not in (asked[0], "XLA") and not accept_ddp_fallback:
        raise ConfigError(
            f"{call}: {asked[0]} was asked for by {asked[1]}, but Accelerate runs {runs}. It does so silently on a "
            "CPU, and where the script was not started by a launcher: every process then holds the whole model. Start "
            "it with accelerate launch on a machine with accelerators, leave the request out, or pass "
            "accept_ddp_fallback=True."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if runs == "FSDP" and getattr(plugin, "fsdp_version", 2) != 2:
        raise ConfigError(
            f"{call}: FSDP version 1 joins frozen and trained parameters into one, and PyTorch has deprecated it. Ask "
            "for version 2: fsdp_version: 2 in accelerate's configuration, version: 2 in fsdp_config."
        )
    stage = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", None)
    if runs == "DEEPSPEED" and stage not in (1, 2, 3):
        raise ConfigError(
            f"{call}: DeepSpeed runs with ZeRO stage {stage}, which shards nothing. Ask for stage 1, 2 or 3, or train "
            "with DDP, which is the same without DeepSpeed."
        )
    if model is not None:
        present = ranks.how_sharded(model.modules())
        if present is not None:
            raise StateError(
                f"{call}: the model is sharded already ({present}). Hand it over whole, loaded without tp_plan and "
                "distributed_config: Accelerate shards it when training starts. Tensor parallelism "
                "is not supported yet."
            )
        if runs == "FSDP":
            _check_quantized(model, accelerator, call)


def _check_quantized(model: nn.Module, accelerator: Any, call: str) -> None:
    """Say which quantized weights FSDP2 leaves whole on every process, and refuse those that it cannot leave."""
    whole = unshardable(model)
    parameters = dict(model.named_parameters())
    broken = [name for name in whole if parameters[name].dtype != torch.uint8]
    if broken:
        raise ConfigError(
            f"{call}: FSDP cannot split {len(broken)} quantized weights, such as {broken[0]}. Train this base with "
            "DDP, or load it in 4 bits with bnb_4bit_quant_storage=torch.bfloat16."
        )
    if whole and accelerator.is_main_process:
        logger.warning(
            f"FSDP does not split {len(whole)} quantized weights, such as {whole[0]}: every process holds them whole. "
            "Load the base with bnb_4bit_quant_storage=torch.bfloat16 (the dtype of its other weights) and they are."
        )


def check_same_adapters(model: nn.Module, call: str) -> None:
    """Refuse to train where processes hold different adapters. All processes call it, and all raise.

    Raises:
        TrainingError: lists what differs from the first process.
    """
    mine = {n: f"{list(ranks.whole_shape(p))}" for n, p in model.named_parameters() if p.requires_grad}
    for name, record in require_state(model, call).adapters.items():
        config = record.config
        mine[f"adapter {name!r}"] = f"r={config.r}, alpha={config.alpha:g}, dropout={config.lora_dropout:g}"
    tables: list[dict[str, str]] = ranks.of_all_ranks(mine)
    if all(table == tables[0] for table in tables):
        return
    lines = [f"{call}: the processes do not hold the same adapters:"]
    for rank, table in enumerate(tables[1:], 1):
        differ = [n for n in sorted(tables[0] | table) if tables[0].get(n) != table.get(n)]
        shown = [f"{n} is {table.get(n, 'absent')}, on process 0 {tables[0].get(n, 'absent')}" for n in differ]
        lines += [f"  - process {rank}: {text}" for text in shown[:5]]
        lines += [f"  - process {rank}: {len(shown) - 5} more tensors"] if len(shown) > 5 else []
    lines.append("Give every process the same configuration and the same model; nothing was trained.")
    raise TrainingError("\n".join(lines))


@torch.no_grad()
def broadcast_trainable(model: nn.Module, device: torch.device) -> None:
    """Give every process the first one's values of what is trained, as DDP and ZeRO do by themselves and FSDP2 not.

    All processes call it, before the model is sharded. Tensors travel from and to `device`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = not any(p.is_meta or ranks.is_dtensor(p) for p in trained)
    if not ranks.has_peers() or not all(ranks.of_all_ranks(plain)):
        return  # where a process holds no values (memory-efficient loading), Accelerate sends them
    for parameter in trained:
        value = parameter.detach().to(device)
        dist.broadcast(value, src=0)
        parameter.copy_(value)


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups that an optimizer was made with, before an engine takes it over."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:  # Accelerate's stand-in where DeepSpeed's configuration names the optimizer
        groups = list(getattr(optimizer, "params", ()))
        groups = groups if groups and isinstance(groups[0], Mapping) else [{"params": groups}]
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def optimizer_state(optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The state as an unsharded optimizer's `state_dict()`, on the CPU. All processes call it.

    Args:
        groups: see `groups_of`; used where DeepSpeed has joined the parameters into flat ones.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parts = zero_partitions(inner)
    if parts is None:
        state = optimizer.state_dict()  # whose inner dicts are the optimizer's own
        tensors = {
            i: {k: v for k, v in values.items() if isinstance(v, Tensor)} for i, values in state["state"].items()
        }
        whole = {i: {**values, **ranks.gather(tensors[i])} for i, values in state["state"].items()}
        return {"state": whole, "param_groups": state["param_groups"]}
    keys, single = _kinds(inner.optimizer, parts)
    whole, numbered, count = {}, [], 0
    found = _live_groups(inner, groups)
    live = iter(found)
    for group in groups:
        options = next(live) if group["params"] else {**found[0], **group}
        numbered.append({**options, "params": list(range(count, count + len(group["params"])))})
        for parameter in group["params"]:
            own = {key: _copied(value) for key, value in single.items()}  # each counts its steps by itself
            whole[count] = {**own, **{key: ranks.gather_state(parameter, key) for key in keys}}
            count += 1
    return {"state": whole if keys or single else {}, "param_groups": numbered}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, groups: Groups, state: Mapping[str, Any]) -> None:
    """Put in what `optimizer_state`, or an ordinary optimizer's `state_dict`, gave. All processes call it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    parts = zero_partitions(inner)
    own = groups if parts is not None else optimizer.param_groups
    sizes, saved = ([len(group["params"]) for group in some] for some in (own, state["param_groups"]))
    if sizes != saved:
        raise StateError(
            f"The saved optimizer has groups of {saved} parameters, this one of {sizes}. Resume with the arguments of "
            "the first run."
        )
    members = [p for group in own for p in group["params"]]
    if parts is None:
        placed = {i: {k: _placed(v, members[i]) for k, v in values.items()} for i, values in state["state"].items()}
        optimizer.load_state_dict({"state": placed, "param_groups": state["param_groups"]})
        return
    filled = [group for group in state["param_groups"] if group["params"]]
    for live, group in zip(_live_groups(inner, groups), filled, strict=True):
        live.update({k: v for k, v in group.items() if k != "params"})
    for part in parts:  # DeepSpeed's optimizers make their state at the first step, which lies in the past here
        for key, value in next(iter(state["state"].values()), {}).items():
            many = isinstance(value, Tensor) and value.dim() > 0
            inner.optimizer.state[part][key] = torch.zeros_like(part) if many else _copied(value)
    if state["state"]:
        link_states(inner)
    for index, parameter in enumerate(members):
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                ranks.scatter_state(parameter, key, value)


def _kinds(inner: Any, parts: Sequence[Tensor]) -> tuple[list[str], dict[str, Any]]:
    """What a torch optimizer keeps for flat parts: keys of tensors as large as they, and single values."""
    keys: list[str] = []
    single: dict[str, Any] = {}
    for key, value in (inner.state.get(parts[0]) or {}).items():
        if isinstance(value, Tensor) and value.shape == parts[0].shape and value.dim() > 0:
            keys.append(key)
        elif not isinstance(value, Tensor) or value.numel() == 1:
            single[key] = _copied(value)
        else:
            raise TrainingError(
                f"Saving the optimizer: {type(inner).__name__} under DeepSpeed keeps {key!r} in a shape of its own, "
                "which cannot be written for each weight. Train with AdamW, or save with save_only_model=True."
            )
    return keys, single


def schedule_state(scheduler: Any, optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The schedule's `state_dict`, with a rate for each group that the optimizer was made with."""
    state: dict[str, Any] = scheduler.state_dict()
    count = sum(bool(group["params"]) for group in groups)
    if zero_partitions(getattr(optimizer, "optimizer", optimizer)) is None or count == len(groups):
        return state
    places, last = [], 0
    for group in groups:
        places.append(min(last, count - 1))
        last += bool(group["params"])
    return _at(places, state, count)


def load_schedule_state(scheduler: Any, optimizer: Any, groups: Groups, state: Mapping[str, Any]) -> None:
    """Put in what `schedule_state` gave, or an ordinary schedule's `state_dict`."""
    if zero_partitions(getattr(optimizer, "optimizer", optimizer)) is not None:
        state = _at([i for i, group in enumerate(groups) if group["params"]], state, len(groups))
    scheduler.load_state_dict(state)


def _at(places: list[int], state: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A schedule's state in which every list of `length` values, one a group, has those at `places`."""
    return {
        key: [value[i] for i in places] if isinstance(value, list) and len(value) == length else value
        for key, value in state.items()
    }


def _live_groups(zero: Any, groups: Groups) -> list[dict[str, Any]]:
    """DeepSpeed's groups: those that were not empty, in the order in which they were given."""
    found: list[dict[str, Any]] = zero.optimizer.param_groups
    filled = [group for group in groups if group["params"]]
    if len(found) != len(filled):
        raise StateError(f"DeepSpeed's optimizer has {len(found)} groups where {len(filled)} were given to it.")
    return found


def _placed(value: Any, parameter: Any) -> Any:
    """A saved value as the optimizer keeps it for `parameter`: cut into parts where that is."""
    many = ranks.is_dtensor(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape
    return ranks.shard_like(value, parameter) if many else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
