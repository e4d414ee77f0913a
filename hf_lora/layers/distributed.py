"""Tensors of which each process holds a part: DTensors (FSDP2, tensor parallelism) and ZeRO-3 parameters.

Both are recognized by their attributes (`placements`, `ds_id`), without importing a library. Functions that
communicate say so: every process must call them, with the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def is_partitioned(tensor: object) -> bool:
    """Whether ZeRO-3 manages the parameter, which is then empty outside of forwards."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: object) -> bool:
    return is_dtensor(tensor) or is_partitioned(tensor)


def has_master(tensor: Tensor) -> bool:
    """Whether DeepSpeed trains a float32 copy of the parameter, which is then authoritative."""
    return tensor.requires_grad and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the tensor over all processes."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    return torch.Size(whole_shape(tensor)).numel()


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds; a plain tensor is returned unchanged."""
    if is_dtensor(tensor):
        return tensor.to_local()
    shard: Tensor | None = getattr(tensor, "ds_tensor", None)
    return shard if is_partitioned(tensor) and not tensor.numel() and shard is not None else tensor


def has_peers() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(item: Any) -> list[Any]:
    """The `item` of every process, by rank. All processes call it; objects work with every backend and device."""
    found: list[Any] = [item]
    if has_peers():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, item)
    return found


def all_ranks_true(flags: Tensor) -> Tensor:
    """True where every process has True. All processes call it, with the same number of flags."""
    return torch.tensor(of_all_ranks(flags.tolist()), dtype=torch.bool).all(0).to(flags.device)


def how_sharded(modules: Iterable[nn.Module]) -> str | None:
    """Which engine manages a model's parameters: FSDP1, FSDP2, ZeRO-3, or DTensor (tensor parallelism).

    None if each process holds them whole, and if ZeRO-3 has partitioned only the base while loading it: the engine
    takes over parameters that are added before it starts.
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
    """Whole copies on the CPU, in the trained precision. All processes call it, with the same names."""
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
def scatter(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value, which every process has, to a tensor that may be sharded. All processes call it."""
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


def shard_like(value: Tensor, like: DTensor) -> DTensor:
    """A whole value as a DTensor with the placement of `like`; every process takes its part from its own copy."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gather_state(parameter: Tensor, key: str) -> Tensor:
    """One float32 optimizer-state tensor of DeepSpeed for a parameter, whole. All processes call it."""
    found = _deepspeed().utils.safe_get_full_optimizer_state(parameter, key)
    return cast(Tensor, found).to("cpu", copy=True).contiguous()


def scatter_state(parameter: Tensor, key: str, value: Tensor) -> None:
    """Restore the result of `gather_state`. All processes call it."""
    _write_master(parameter, value, key)


def _write_master(parameter: Any, value: Tensor, key: str | None) -> None:
    utils = _deepspeed().utils
    value = value.to(local_part(parameter).device, torch.float32)
    if not is_partitioned(parameter):
        arguments = (parameter, value) if key is None else (parameter, value, key)
        (utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state)(*arguments)
        return
    # DeepSpeed's function for whole tensors fails if the size is not divisible by the number of processes: all parts
    # have the same size, and the last one extends past the end.
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
