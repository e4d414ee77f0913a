"""Transformers models inside other modules: nothing writes a file without the adapters, and every advice works."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_same_tensors, batch_for, randomize, relative_error, snapshot, tiny_bert, tiny_llama
from torch import Tensor, nn
from transformers import BertModel
from transformers.integrations.peft import PeftAdapterMixin

from hf_lora import LoraConfig, LoraError, LoraModel, StateError, apply_lora
from hf_lora.adapt.merge import merge_for_good
from hf_lora.adapt.state import Task
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter


class Encoder(nn.Module):
    """A module around a transformers model, with a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.ModuleDict({"bert": tiny_bert(cls="BertModel")})
        self.projection = nn.Linear(32, 4)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.projection(self.inner["bert"](**batch).last_hidden_state[:, 0])


class Scorer(nn.Sequential):
    """As the cross-encoder of sentence-transformers: config and num_labels are properties without a setter."""

    def __init__(self) -> None:
        super().__init__(tiny_bert(labels=2))

    @property
    def config(self) -> Any:
        return self[0].config

    @property
    def num_labels(self) -> int:
        return int(self.config.num_labels)

    def forward(self, **batch: Tensor) -> Any:
        return self[0](**batch).logits


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def encoder() -> Any:
    return randomize(apply_lora(Encoder(), LoraConfig(r=4))).eval()


@pytest.mark.parametrize(
    "call",
    [
        lambda m, folder: m.save_pretrained(folder),
        lambda m, folder: m.push_to_hub("a/b"),
        lambda m, folder: m.add_adapter("second"),
        lambda m, folder: m.load_adapter(folder),
        lambda m, folder: m.merge_adapter(),
        lambda m, folder: m.unload(),
    ],
)
def test_an_inner_model_refuses_and_writes_nothing(encoder: Any, call: Any, tmp_path: Path) -> None:
    before = snapshot(encoder)
    with pytest.raises(StateError, match=r"this BertModel is part of a Encoder with adapters"):
        call(encoder.inner["bert"], tmp_path)
    assert not list(tmp_path.iterdir())
    assert_same_tensors(snapshot(encoder), before)


def test_every_step_in_the_message_works(encoder: Any, tmp_path: Path) -> None:
    with pytest.raises(StateError) as error:
        encoder.inner["bert"].save_pretrained(tmp_path)
    steps = {"merge_for_good": merge_for_good, "save_adapter": save_adapter, "load_adapter": load_adapter}
    for name, function in steps.items():
        assert f"{function.__module__}" in str(error.value)
        assert name in str(error.value)
    y = encoder(**ids())
    save_adapter(encoder, tmp_path / "adapter")
    loaded = Encoder().eval()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(**ids()), y)
    merge_for_good(encoder)
    assert type(encoder.inner["bert"]) is BertModel
    encoder.inner["bert"].save_pretrained(tmp_path / "full")
    fresh = Encoder().eval()
    fresh.projection = encoder.projection
    fresh.inner["bert"], report = BertModel.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(report.values())
    assert relative_error(fresh.eval()(**ids()), y) < 1e-5
    model = Encoder()
    assert "model.get_submodule('inner.bert')" in str(error.value)
    apply_lora(model.get_submodule("inner.bert"), LoraConfig(r=4)).save_pretrained(tmp_path / "inner")
    assert (tmp_path / "inner" / "adapter_model.safetensors").is_file()


def test_labels_reach_the_model_in_a_model_that_shares_its_config() -> None:
    model = apply_lora(Scorer(), LoraConfig(r=4))
    assert isinstance(model[0], LoraModel)
    for count in (5, 2):
        Task.from_labels(count, None).apply(model)
        assert model.num_labels == model[0].num_labels == model.config.num_labels == count


@pytest.mark.parametrize("at", ["extend", "enable_input_require_grads"])
def test_nothing_is_left_if_the_inner_model_cannot_be_extended(at: str, monkeypatch: Any) -> None:
    model = Encoder()
    before, required = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop")

    model.inner["bert"].gradient_checkpointing_enable()
    monkeypatch.setattr(LoraModel, at, fail)
    with pytest.raises(RuntimeError, match="stop"):
        apply_lora(model, LoraConfig(r=4))
    assert_same_tensors(snapshot(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert type(model.inner["bert"]) is BertModel


# The interface of PEFT -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Any:
    return randomize(apply_lora(tiny_llama(), LoraConfig(r=2)))


@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_an_argument_of_pefts_forward_is_refused_until_it_is_supported(llama: Any, argument: str) -> None:
    batch = batch_for(llama)
    llama(**batch, **{argument: None})
    with pytest.raises(StateError, match=rf"LlamaForCausalLM\(…, {argument}=…\) is not supported"):
        llama(**batch, **{argument: ["default", "__base__"]})
    with pytest.raises((LoraError, ValueError, TypeError), match=argument):
        llama.generate(batch["input_ids"], max_new_tokens=1, **{argument: ["default"]})


def test_an_unloaded_model_has_no_attribute_left() -> None:
    model = tiny_llama()
    before = set(vars(model))
    apply_lora(model, LoraConfig(r=2)).unload()
    assert set(vars(model)) == before


THEIRS = (PeftAdapterMixin, peft.PeftModel, peft.tuners.lora.LoraModel)
SHARED = sorted(
    {
        (cls.__name__, name, parameter)
        for cls in THEIRS
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if name in LoraModel.__dict__
        and not name.startswith("_")
        and name not in ("forward", "load_state_dict", "push_to_hub")
        for parameter in list(inspect.signature(method).parameters)[1:]
    }
)


def test_every_adapter_method_of_transformers_is_replaced() -> None:
    theirs = {name for name, _ in inspect.getmembers(PeftAdapterMixin, inspect.isfunction) if name[0] != "_"}
    assert theirs <= LoraModel.__dict__.keys()


@pytest.mark.parametrize("method", dict.fromkeys(row[1] for row in SHARED))
def test_no_argument_of_pefts_methods_is_ignored(llama: Any, method: str, tmp_path: Path) -> None:
    """It is one of ours, or an error that names it."""
    ours = inspect.signature(getattr(LoraModel, method)).parameters
    names = {row[2] for row in SHARED if row[1] == method} - ours.keys() - {"args", "kwargs", "model_config"}
    first: dict[str, Any] = {"save_pretrained": tmp_path, "load_adapter": tmp_path}
    for name in names:
        with pytest.raises((TypeError, LoraError)) as error:
            getattr(llama, method)(*([first[method]] if method in first else []), **{name: False})
        assert name in str(error.value) or method in str(error.value)
    assert not list(tmp_path.iterdir())


def test_pefts_way_to_call_from_pretrained_and_its_arguments(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    base = tiny_llama()
    with pytest.raises(LoraError) as error:
        LoraModel.from_pretrained(
            tmp_path, base_model=base, autocast_adapter_dtype=False, ephemeral_gpu_offload=True, dtype="bfloat16"
        )
    for name in ("autocast_adapter_dtype=False", "ephemeral_gpu_offload=True", "dtype='bfloat16'"):
        assert f"{name} is for loading the base, but base_model is a model in memory" in str(error.value)
    assert not isinstance(base, LoraModel)
    loaded = LoraModel.from_pretrained(base, tmp_path)
    batch = batch_for(loaded)
    assert torch.equal(loaded(**batch).logits, llama.eval()(**batch).logits)
    gathered = {name: tensor + 1 for name, tensor in llama.state_dict().items()}
    given = llama.get_adapter_state_dict("default", state_dict=gathered)
    assert all(torch.equal(given[key], own + 1) for key, own in llama.get_adapter_state_dict("default").items())
