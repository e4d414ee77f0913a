"""Two models that share layers, as an actor and a critic around one body: the layers have the adapters of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert
from torch import Tensor, nn

from hf_lora import LoraConfig, LoraModel, StateError, apply_lora, share_inputs
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import delete, eject, inject
from hf_lora.adapt.merge import merge, merge_for_good, set_enabled, unload, unmerge
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import parts
from hf_lora.files.save import save_adapter

CONFIG = LoraConfig(r=2, bias="all", modules_to_save=["0.2"])
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def both(tail: int = 1) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(body, nn.Linear(4, 2)), nn.Sequential(body, nn.Linear(4, tail))


def required(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_the_other_model_can_be_adapted_after_unloading() -> None:
    actor, critic = both()
    before = snapshot(actor), snapshot(critic), required(actor), required(critic)
    for one in (actor, critic, actor):
        randomize(inject_into(one))
        unload(one)
        assert (required(actor), required(critic)) == before[2:]
    assert_same_tensors(snapshot(actor), before[0])
    assert_same_tensors(snapshot(critic), before[1])


def inject_into(model: nn.Module, name: str = "default") -> nn.Module:
    inject(model, CONFIG, name)
    return model


def test_what_would_change_the_layers_of_the_other_model_is_refused() -> None:
    """The one deletes its adapters, and the other adds its own: the first must not touch them."""
    actor, critic = both()
    start = required(actor)
    inject_into(actor)
    delete(actor, "default")
    randomize(inject_into(critic))
    expected: Tensor = critic(X)
    values, needs = snapshot(critic), required(critic)
    for verb in (inject_into, eject, unload, merge_for_good):
        with pytest.raises(StateError, match="of another model"):
            verb(actor)  # type: ignore[operator]
    assert list(parts(actor)) == []
    set_active(actor, require_state(actor, "test"), ())
    set_enabled(actor, False)
    set_enabled(actor, True)
    assert_same_tensors(snapshot(critic), values)
    assert required(critic) == needs
    assert torch.equal(critic(X), expected)
    unload(critic)  # as the message says
    unload(actor)
    assert required(actor) == start
    randomize(inject_into(actor, "again"))


def test_each_verb_acts_on_the_adapters_of_its_model(tmp_path: Path) -> None:
    """Both have an adapter of one name, and then one of them gets the body of the other."""
    actor, critic = both()
    critic = copy.deepcopy(critic)
    for model in (actor, critic):
        randomize(inject_into(model))
    inject(actor, LoraConfig(r=1), "second")
    body, head = snapshot(actor[0]), critic[1]  # type: ignore[index]
    critic[0] = actor[0]  # type: ignore[index, operator]
    expected, needs = critic(X), required(actor)
    assert {part.path for part in parts(critic)} == {"1"}
    save_adapter(critic, tmp_path)
    share_inputs(critic, X)
    merge(critic)
    assert_near(critic(X), expected, torch.float32, 16)
    unmerge(critic)
    set_active(critic, require_state(critic, "test"), ())
    assert not any(parameter.requires_grad for parameter in head.parameters())
    delete(critic, "default")
    assert type(head) is nn.Linear
    assert_same_tensors(snapshot(actor[0]), body)  # type: ignore[index]
    assert required(actor) == needs


def test_a_copy_is_made_before_lora_is_applied() -> None:
    """As the message says: a copy of layers with adapters has them too."""
    actor, critic = both()
    spare = copy.deepcopy(critic)
    randomize(inject_into(actor))
    expected = critic(X)
    twin = copy.deepcopy(critic)
    assert torch.equal(twin(X), expected)
    for model in (critic, twin):
        with pytest.raises(StateError, match=r"unload\(\)[\s\S]*one model that contains both[\s\S]*before LoRA"):
            inject_into(model)
    inject_into(spare)
    unload(actor)
    inject_into(critic)
    unload(critic)
    inject_into(nn.ModuleList([actor, critic.append(nn.Tanh())]))  # type: ignore[operator]


def test_a_head_that_two_models_share() -> None:
    actor, _ = both()
    other: Any = nn.Sequential(nn.Linear(4, 4), actor[1])  # type: ignore[index]
    plain = other(X)
    inject(actor, LoraConfig(r=2, target_modules=["0.0"], modules_to_save=["1"]))
    randomize(actor)
    y = actor(X)
    assert torch.equal(other(X), plain)  # its own reference is the original head
    inject(other, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    randomize(other, 3)
    assert torch.equal(actor(X), y)
    assert not torch.equal(other(X), plain)
    merge_for_good(other)
    assert torch.equal(actor(X), y)
    unload(actor)


def test_models_of_transformers_around_one_backbone(tmp_path: Path) -> None:
    first, second = tiny_bert(), tiny_bert(cls="BertForTokenClassification")
    second.bert = first.bert
    randomize(apply_lora(first, LoraConfig(r=2)))
    first.save_pretrained(tmp_path)
    batch = batch_for(first, labels=False)
    y, before = first(**batch).logits, snapshot(first)
    for call in (
        lambda: apply_lora(second, LoraConfig(r=2)),
        lambda: LoraModel.from_pretrained(tmp_path, base_model=second, allow_other_base=True),
        lambda: LoraModel.from_pretrained(tmp_path, base_model=second, allow_other_base=True, merge=True),
        lambda: second.bert.unload(),
        lambda: second.bert.merge_and_unload(),
    ):
        with pytest.raises(StateError, match=r"another model|part of a BertForSequenceClassification"):
            call()
    assert_same_tensors(snapshot(first), before)
    assert torch.equal(first(**batch).logits, y)
    first.unload()
    apply_lora(second, LoraConfig(r=2))
    assert isinstance(second.bert, LoraModel)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("part", ["bert", "bert.encoder"], ids=["body", "layers"])
def test_a_plain_model_around_adapted_layers_is_not_saved_with_them(part: str, whole: bool, tmp_path: Path) -> None:
    """Its folder would be that of a full model, which cannot hold adapters; its state dict does."""
    first, second = tiny_bert(), tiny_bert(cls="BertForTokenClassification")
    second.set_submodule(part, first.get_submodule(part))
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["layer.1.output.dense"] if whole else [])
    randomize(apply_lora(first, config))
    again = copy.deepcopy(second.state_dict())
    assert any("lora_A" in key for key in again)
    second.load_state_dict(again)
    batch = batch_for(second, labels=False)
    merged = second(**batch).logits.detach()
    with pytest.raises(StateError, match=r"query has adapters of another model") as refused:
        second.save_pretrained(tmp_path / "second")
    assert not list((tmp_path / "second").glob("*.safetensors"))
    first.save_pretrained(tmp_path / "first")
    assert "merge_and_unload() on that model first" in str(refused.value)
    first.merge_and_unload()
    second.save_pretrained(tmp_path / "second")
    assert_near(type(second).from_pretrained(tmp_path / "second")(**batch).logits, merged, torch.float32, 64)
