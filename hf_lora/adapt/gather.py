"""The tensors of adapters, whole, from a model of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..layers.distributed import gather
from .state import require_state
from .walk import parts


def gathered_state(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole copies of the adapters' tensors on the CPU, whatever engine shards the model: FSDP2, ZeRO or none.

    Every process has to call it, since each adds its part; each then holds the result. The base is not gathered. Hand
    it to `save_pretrained`:

        state = gathered_state(model)
        model.save_pretrained(folder, state_dict=state, is_main_process=accelerator.is_main_process)

    Args:
        model: with the adapters, without what Accelerate put around it (`accelerator.unwrap_model(model)`).
        adapter_names: which; all where not given.

    Returns:
        The tensors by their names in `model.state_dict()`. Trained ones are the float32 masters.

    Raises:
        StateError: the model has no adapters, or not these.
    """
    state = require_state(model, "gathered_state")
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or state.adapters)
    for name in names:
        state.require(name)
    wanted = {id(t) for name in names for part in parts(model, name) for _, t in part.tensors()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return gather({name: tensor for name, tensor in tensors.items() if id(tensor) in wanted})
