"""Engines (DDP, FSDP, DeepSpeed): whether the requested one runs, and the unsharded state of its optimizer.

The format of a checkpoint does not depend on the engine: the optimizer's state is written like that of an unsharded
torch optimizer, by position, so a run can resume with another engine or number of processes.
(`torch.distributed.checkpoint.state_dict` uses parameter names instead, makes an optimizer step to create the state,
and does not support DeepSpeed, which is most of this file.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainingArguments
from transformers.utils import logging

from ..adapt.state import require_state
from ..compat import link_states, zero_partitions
from ..errors import ConfigError, StateError, TrainingError
from ..layers import distributed as ranks
from ..layers.storages import unshardable

logger = logging.get_logger(__name__)

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of an optimizer: options and `params`."""
_NAMES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}


def requested_engine(args: object) -> tuple[str, str] | None:
    """(engine, source of the request): the training arguments, or the environment set by `accelerate launch`."""
    for name, variable in _NAMES.items():
        if getattr(args, name.lower(), None):
            return name, f"the training argument {name.lower()}"
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return name, f"the launch configuration ({variable})"
    return None


def why_not_sharded(args: object, engine: str) -> Iterator[str]:
    """Why an engine that shards cannot train with these arguments."""
    for name, needs in (("ema", "averages whole weights"), ("muon_learning_rate", "needs whole factors")):
        if value := getattr(args, name, None):
            yield f"{name}={value:g} {needs}, but {engine} shards them: omit it, or train with DDP"


def launched_for_several() -> bool:
    """Whether `accelerate launch` was asked for several processes without a launcher that numbers them."""
    started = any(name in os.environ for name in ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not started


def running_engine(accelerator: Accelerator) -> str:
    """The engine that Accelerate runs, such as NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED."""
    kind = accelerator.distributed_type
    return str(getattr(kind, "value", kind)).upper()


def check_engine(
    args: TrainingArguments, accelerator: Accelerator, model: nn.Module | None, accept_ddp_fallback: bool, call: str
) -> None:
    """Refuse an engine other than the requested one, or one that does not support adapters.

    Raises:
        ConfigError: Accelerate fell back to another engine, or the engine is not supported.
        StateError: the model is already sharded.
    """
    requested, runs = requested_engine(args), running_engine(accelerator)
    if requested is not None and runs not in (requested[0], "XLA") and not accept_ddp_fallback:
        raise ConfigError(
            f"{call}: {requested[0]} was requested by {requested[1]}, but Accelerate runs {runs}. It falls back "
            "silently on a CPU, and if the script was not started by a launcher: every process then holds the whole "
            "model. Start the script with accelerate launch on a machine with accelerators, remove the request, or "
            "pass accept_ddp_fallback=True."
        )
    if launched_for_several() and accelerator.num_processes == 1:
        logger.warning(
            "accelerate launch was asked for several processes and started one: on CPUs it needs MPI for them. Start "
            "the script with torchrun --nproc_per_node 2, or with distributed_type: MULTI_GPU and use_cpu: true as in "
            "examples/accelerate/cpu.yaml."
        )
    if runs in _NAMES and (faults := list(why_not_sharded(args, runs))):
        raise ConfigError(f"{call}: {'; '.join(faults)}.")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if runs == "FSDP" and getattr(plugin, "fsdp_version", 2) != 2:
        raise ConfigError(
            f"{call}: FSDP version 1 flattens frozen and trained parameters into one, and PyTorch has deprecated it. "
            "Use version 2: fsdp_version: 2 in accelerate's configuration, version: 2 in fsdp_config."
        )
    stage = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", None)
    if runs == "DEEPSPEED" and stage not in (1, 2, 3):
        raise ConfigError(
            f"{call}: DeepSpeed runs with ZeRO stage {stage}, which does not shard. Use stage 1, 2 or 3, or train "
            "with DDP, which does the same without DeepSpeed."
        )
    if model is not None:
        present = ranks.how_sharded(model.modules())
        if present is not None:
            raise StateError(
                f"{call}: the model is already sharded ({present}). Pass an unsharded model, loaded without tp_plan "
                "and distributed_config: Accelerate shards it when training starts. Tensor parallelism is not "
                "supported yet."
            )
        if runs == "FSDP":
            _check_quantized(model, accelerator, call)


def _check_quantized(model: nn.Module, accelerator: Accelerator, call: str) -> None:
    """Warn about quantized weights that FSDP2 does not shard, and refuse those that it cannot handle."""
    whole = unshardable(model)
    parameters = dict(model.named_parameters())
    broken = [name for name in whole if parameters[name].dtype != torch.uint8]
    if broken:
        raise ConfigError(
            f"{call}: FSDP cannot shard {len(broken)} quantized weights, such as {broken[0]}. Train this base with "
            "DDP, or load it in 4 bits with bnb_4bit_quant_storage=torch.bfloat16."
        )
    if whole and accelerator.is_main_process:
        logger.warning(
            f"FSDP does not shard {len(whole)} quantized weights, such as {whole[0]}: every process holds all of "
            "them. To shard them, load the base with bnb_4bit_quant_storage=torch.bfloat16 (the dtype of its other "
            "weights)."
        )


def check_same_adapters(model: nn.Module, call: str) -> None:
    """Refuse to train if processes have different adapters. All processes must call it, and all raise.

    Raises:
        TrainingError: lists the differences from process 0.
    """
    mine = {n: f"{list(ranks.whole_shape(p))}" for n, p in model.named_parameters() if p.requires_grad}
    for name, record in require_state(model, call).adapters.items():
        config = record.config
        mine[f"adapter {name!r}"] = f"r={config.r}, alpha={config.alpha:g}, dropout={config.lora_dropout:g}"
    tables: list[dict[str, str]] = ranks.of_all_ranks(mine)
    if all(table == tables[0] for table in tables):
        return
    lines = [f"{call}: the processes do not have the same adapters:"]
    for rank, table in enumerate(tables[1:], 1):
        differ = [n for n in sorted(tables[0] | table) if tables[0].get(n) != table.get(n)]
        shown = [f"{n} is {table.get(n, 'absent')}, on process 0 {tables[0].get(n, 'absent')}" for n in differ]
        lines += [f"  - process {rank}: {text}" for text in shown[:5]]
        lines += [f"  - process {rank}: {len(shown) - 5} more tensors"] if len(shown) > 5 else []
    lines.append("Use the same configuration and the same model on every process; training did not start.")
    raise TrainingError("\n".join(lines))


@torch.no_grad()
def broadcast_trainable(model: nn.Module, device: torch.device) -> None:
    """Copy the trained parameters of process 0 to all processes, which DDP and ZeRO do themselves but FSDP2 does not.

    All processes must call it, before the model is sharded. Tensors are sent and received on `device`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = not any(p.is_meta or ranks.is_dtensor(p) for p in trained)
    if not ranks.has_peers() or not all(ranks.of_all_ranks(plain)):
        return  # a process without values (memory-efficient loading) gets them from Accelerate
    for parameter in trained:
        value = parameter.detach().to(device)
        dist.broadcast(value, src=0)
        parameter.copy_(value)


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups that an optimizer was created with, before an engine wraps it."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:  # Accelerate's DummyOptim, if DeepSpeed's configuration has the optimizer
        groups = list(getattr(optimizer, "params", ()))
        groups = groups if groups and isinstance(groups[0], Mapping) else [{"params": groups}]
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def optimizer_state(optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The state in the format of an unsharded optimizer's `state_dict()`, on the CPU. All processes must call it.

    Args:
        groups: see `groups_of`; used under DeepSpeed, which flattens the parameters.
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
    if keys:
        link_states(inner)  # DeepSpeed links those of further groups too early, before their first step
    whole, numbered, count = {}, [], 0
    found = _live_groups(inner, groups)
    live = iter(found)
    for group in groups:
        options = next(live) if group["params"] else {**found[0], **group}
        numbered.append({**options, "params": list(range(count, count + len(group["params"])))})
        for parameter in group["params"]:
            own = {key: _copied(value) for key, value in single.items()}  # each parameter has its own step count
            whole[count] = {**own, **{key: ranks.gather_state(parameter, key) for key in keys}}
            count += 1
    return {"state": whole if keys or single else {}, "param_groups": numbered}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, groups: Groups, state: Mapping[str, Any]) -> None:
    """Load the result of `optimizer_state` or of an unsharded optimizer's `state_dict`. All processes must call it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    parts = zero_partitions(inner)
    own = groups if parts is not None else optimizer.param_groups
    sizes, saved = ([len(group["params"]) for group in some] for some in (own, state["param_groups"]))
    if sizes != saved:
        raise StateError(
            f"The saved optimizer has groups of {saved} parameters, but this one has groups of {sizes}. Resume with "
            "the arguments of the first run."
        )
    members = [p for group in own for p in group["params"]]
    if parts is None:
        placed = {i: {k: _placed(v, members[i]) for k, v in values.items()} for i, values in state["state"].items()}
        optimizer.load_state_dict({"state": placed, "param_groups": state["param_groups"]})
        return
    filled = [group for group in state["param_groups"] if group["params"]]
    for live, group in zip(_live_groups(inner, groups), filled, strict=True):
        live.update({k: v for k, v in group.items() if k != "params"})
    for part in parts:  # DeepSpeed's optimizers create their state at the first step, which a resumed run skips
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
    """The state of a torch optimizer for flat partitions: keys of tensors of the same shape, and single values."""
    keys: list[str] = []
    single: dict[str, Any] = {}
    for key, value in (inner.state.get(parts[0]) or {}).items():
        if isinstance(value, Tensor) and value.shape == parts[0].shape and value.dim() > 0:
            keys.append(key)
        elif not isinstance(value, Tensor) or value.numel() == 1:
            single[key] = _copied(value)
        else:
            raise TrainingError(
                f"Saving the optimizer: {type(inner).__name__} under DeepSpeed has a state {key!r} of a different "
                "shape, which cannot be saved per weight. Train with AdamW, or save with save_only_model=True."
            )
    return keys, single


def schedule_state(scheduler: LRScheduler, optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The schedule's `state_dict`, with a learning rate for each group that the optimizer was created with."""
    state: dict[str, Any] = scheduler.state_dict()
    count = sum(bool(group["params"]) for group in groups)
    if zero_partitions(getattr(optimizer, "optimizer", optimizer)) is None or count == len(groups):
        return state
    places, last = [], 0
    for group in groups:
        places.append(min(last, count - 1))
        last += bool(group["params"])
    return _at(places, state, count)


def load_schedule_state(scheduler: LRScheduler, optimizer: Any, groups: Groups, state: dict[str, Any]) -> None:
    """Load the result of `schedule_state` or of an ordinary schedule's `state_dict`."""
    if zero_partitions(getattr(optimizer, "optimizer", optimizer)) is not None:
        state = _at([i for i, group in enumerate(groups) if group["params"]], state, len(groups))
    scheduler.load_state_dict(state)


def _at(places: list[int], state: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A schedule's state in which every list of `length` values (one per group) is reduced to those at `places`."""
    return {
        key: [value[i] for i in places] if isinstance(value, list) and len(value) == length else value
        for key, value in state.items()
    }


def _live_groups(zero: Any, groups: Groups) -> list[dict[str, Any]]:
    """DeepSpeed's groups: the original groups that are not empty, in the same order."""
    found: list[dict[str, Any]] = zero.optimizer.param_groups
    filled = [group for group in groups if group["params"]]
    if len(found) != len(filled):
        raise StateError(f"DeepSpeed's optimizer has {len(found)} groups, but {len(filled)} were passed to it.")
    return found


def _placed(value: Any, parameter: Any) -> Any:
    """A saved value as the optimizer needs it for `parameter`: sharded if the parameter is."""
    many = ranks.is_dtensor(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape
    return ranks.shard_like(value, parameter) if many else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
