"""Tensors of which a process holds a part only: FSDP2's and tensor parallelism's DTensors, and ZeRO-3's parameters.

Both are noticed by what they carry (`placements`, `ds_id`); neither library is imported for it. A function here that
speaks to other processes says so: every process has to call it, with the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 manages the parameter: outside of forwards it is empty."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Any) -> bool:
    return is_dtensor(tensor) or is_partitioned(tensor)


def has_master(tensor: Any) -> bool:
    """Whether DeepSpeed trains a float32 copy of the parameter, which is then the truth."""
    return tensor.requires_grad and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the tensor over all processes."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Any) -> int:
    return torch.Size(whole_shape(tensor)).numel()


def local_part(tensor: Any) -> Any:
    """The part that this process holds; a plain tensor as it is."""
    if is_dtensor(tensor):
        return tensor.to_local()
    if is_partitioned(tensor) and not tensor.numel() and getattr(tensor, "ds_tensor", None) is not None:
        return tensor.ds_tensor
    return tensor


def has_peers() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(item: Any) -> list[Any]:
    """Every process's `item`, by rank. All processes call it; objects travel over every backend."""
    found: list[Any] = [item]
    if has_peers():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, item)
    return found


def all_ranks_true(flags: Tensor) -> Tensor:
    """True where every process says so. All processes call it, with as many flags."""
    return torch.tensor(of_all_ranks(flags.tolist()), dtype=torch.bool).all(0).to(flags.device)


def how_sharded(modules: Iterable[nn.Module]) -> str | None:
    """Which engine has a model's parameters in hand: FSDP1, FSDP2, ZeRO-3, or DTensor (tensor parallelism).

    None where each process holds them whole, and where ZeRO-3 has cut the base only, as it does when it loads one:
    what is added then is taken over when the engine starts.
    """
    modules = list(modules)
    kinds = {kind: {c.__name__ for c in kind.__mro__} for kind in {type(m) for m in modules}}
    for engine, name in (("FSDP1", "FullyShardedDataParallel"), ("FSDP2", "FSDPModule")):
        if any(name in names for names in kinds.values()):
            return engine
    if any("ds_inflight_param_registry" in module.__dict__ for module in modules):
        return "ZeRO-3"
    return "DTensor" if any(is_dtensor(p) for module in modules for p in module._parameters.values()) else None


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU, at the precision that is trained. All processes call it, with the same names."""
    found = {}
    for name, tensor in tensors.items():
        whole: Any = tensor.detach()
        if has_master(tensor):
            whole = _deepspeed().utils.safe_get_full_fp32_param(tensor)
        elif is_partitioned(tensor):
            with _deepspeed().zero.GatheredParameters([tensor]):
                whole = tensor.detach().clone()
        elif is_dtensor(tensor):
            kind = whole.device_mesh.device_type
            whole = (whole if whole.device.type == kind else whole.to(kind)).full_tensor()
        found[name] = whole.to("cpu", copy=True).contiguous()
    return found


@torch.no_grad()
def scatter(tensor: Any, value: Tensor) -> None:
    """Write a whole value, which every process has, into a tensor however it is kept. All processes call it."""
    if is_dtensor(tensor):
        tensor.to_local().copy_(shard_like(value, tensor).to_local())
        return
    if is_partitioned(tensor):
        with _deepspeed().zero.GatheredParameters([tensor], modifier_rank=0):
            if dist.get_rank() == 0:
                tensor.copy_(value)
    else:
        tensor.copy_(value)
    if has_master(tensor):
        _write_master(tensor, value, None)


def shard_like(value: Tensor, like: Any) -> Any:
    """A whole value as a DTensor placed as `like` is; every process cuts its part from its own copy."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gather_state(parameter: Any, key: str) -> Tensor:
    """One float32 tensor that DeepSpeed's optimizer keeps for a parameter, whole. All processes call it."""
    found = _deepspeed().utils.safe_get_full_optimizer_state(parameter, key)
    return cast(Tensor, found).to("cpu", copy=True).contiguous()


def scatter_state(parameter: Any, key: str, value: Tensor) -> None:
    """Put back what `gather_state` gave. All processes call it."""
    _write_master(parameter, value, key)


def _write_master(parameter: Any, value: Tensor, key: str | None) -> None:
    utils = _deepspeed().utils
    value = value.to(local_part(parameter).device, torch.float32)
    if not is_partitioned(parameter):
        arguments = (parameter, value) if key is None else (parameter, value, key)
        (utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state)(*arguments)
        return
    # DeepSpeed's own way of writing a whole tensor fails where it does not divide by the processes: the parts are
    # equal, and the last one reaches beyond the end.
    size = parameter.ds_tensor.ds_numel
    start = size * dist.get_rank(group=parameter.ds_process_group)
    part = value.new_zeros(size)
    piece = value.flatten()[start : start + size]
    part[: piece.numel()] = piece
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def _deepspeed() -> Any:
    return sys.modules["deepspeed"]
