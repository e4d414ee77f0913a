"""`accelerator.save_state` for adapters: hooks for training scripts that use Accelerate without Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...adapt.gather import gathered_state
from ...adapt.state import require_state, state_of
from ...errors import StateError
from ...files.load import load_adapter_weights
from ...files.save import adapter_folder, save_adapter
from ..engines import running_engine


def register_adapter_hooks(accelerator: Accelerator) -> tuple[RemovableHandle, RemovableHandle]:
    """Make `accelerator.save_state(folder)` write adapters instead of whole models, and `load_state` read them.

    Call it once, after `Accelerator()`. Optimizers, schedulers, samplers, random states and prepared models without
    adapters are saved as before. The first model's adapter is in the folder itself, so that
    `LoraModel.from_pretrained(folder)` loads it; those of further models are in its subfolders `model_1`, `model_2`, …

    Returns:
        The two handles; `handle.remove()` removes a hook.

    Raises:
        StateError: under FSDP or DeepSpeed, where Accelerate writes the model before it calls a hook.
    """
    engine = running_engine(accelerator)
    if engine in ("FSDP", "DEEPSPEED"):
        raise StateError(
            f"register_adapter_hooks: under {engine} save_state writes the whole base before it calls a hook. Save "
            "the adapter with gathered_state(model) and save_pretrained(folder, state_dict=…), or train with "
            "LoraTrainer, whose checkpoints hold the adapter and the optimizer under every engine."
        )

    def adapted(models: list[nn.Module]) -> list[tuple[int, nn.Module, list[str]]]:
        """(index, unwrapped model, its adapters) of the models with adapters, the last one first."""
        bare = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]
        found = [
            (i, m, list(require_state(m, "save_state").adapters))
            for i, m in enumerate(bare)
            if state_of(m) is not None
        ]
        return found[::-1]

    def save(models: list[nn.Module], weights: list[Mapping[str, Tensor]], output_dir: str) -> None:
        each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if each_node else accelerator.is_main_process
        for index, model, names in adapted(models):
            state = gathered_state(model)
            for name in names if writes else ():
                save_adapter(model, _folder(output_dir, index, model, name), name, state)
            if index < len(weights):
                del weights[index]

    def load(models: list[nn.Module], input_dir: str) -> None:
        for index, model, names in adapted(models):
            for name in names:
                load_adapter_weights(model, _folder(input_dir, index, model, name), name)
            del models[index]

    return accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)


def _folder(folder: str, index: int, model: nn.Module, name: str) -> Path:
    return adapter_folder(model, Path(folder, f"model_{index}") if index else folder, name)
