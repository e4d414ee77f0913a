"""`accelerator.save_state` and `load_state` with adapters, in one process; two are in test_engines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import assert_same_tensors, randomize
from tiny import tiny_bert, tiny_gpt2

from hf_lora import LoraConfig, LoraModel, StateError, apply_lora, register_adapter_hooks


@pytest.fixture
def accelerator() -> Any:
    return Accelerator(cpu=True)


def adapted(model: Any, seed: int, **config: Any) -> Any:
    return randomize(apply_lora(model, LoraConfig(r=2, **config)), seed)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or ".copies." in n}


def test_a_state_holds_adapters_and_plain_models_as_ever(accelerator: Any, tmp_path: Path) -> None:
    register_adapter_hooks(accelerator)
    first, plain, second = adapted(tiny_bert(), 1), torch.nn.Linear(3, 2), adapted(tiny_gpt2(), 2)
    first.add_adapter("other", LoraConfig(r=3))
    randomize(first, 3)
    models = accelerator.prepare(first, plain, second)
    kept = [trained(first), {n: p.detach().clone() for n, p in plain.named_parameters()}, trained(second)]
    accelerator.save_state(str(tmp_path))
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")}
    assert files == {
        "adapter_model.safetensors", "other/adapter_model.safetensors", "model.safetensors",
        "model_2/adapter_model.safetensors",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in tmp_path.glob("model.safetensors")) < 1000
    for model in models:
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    accelerator.load_state(str(tmp_path))
    assert_same_tensors(trained(first), kept[0])
    assert_same_tensors(dict(plain.named_parameters()), kept[1])
    assert_same_tensors(trained(second), kept[2])


def test_the_first_adapter_loads_from_the_folder(accelerator: Any, tmp_path: Path) -> None:
    save, load = register_adapter_hooks(accelerator)
    model = accelerator.prepare(adapted(tiny_gpt2(), 4))
    accelerator.save_state(str(tmp_path / "with"))
    again = LoraModel.from_pretrained(tmp_path / "with", base_model=tiny_gpt2())
    assert_same_tensors(trained(again), trained(model))
    save.remove()
    load.remove()
    accelerator.save_state(str(tmp_path / "without"))
    assert (tmp_path / "without" / "model.safetensors").is_file()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_write_the_base_first_are_refused(engine: str) -> None:
    fake = type("Accelerator", (), {"distributed_type": engine})()
    with pytest.raises(StateError, match=rf"under {engine}[\s\S]*gathered_state"):
        register_adapter_hooks(fake)
