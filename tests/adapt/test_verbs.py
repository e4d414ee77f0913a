"""The verbs of an adapted model: what each changes, what it restores, and when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor

from hf_lora import ConfigError, LoraConfig, LoraModel, MergeError, StateError, apply_lora, get_peft_model
from hf_lora.adapt.walk import adapter_layers


def two(seed: int = 0) -> Any:
    """A Llama with adapters "first" (acting on all layers) and "second" (on some), "first" being active."""
    model = apply_lora(tiny_llama(), LoraConfig(r=4), "first")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("first")
    return randomize(model, seed)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model, labels=False)).logits


def grads(model: Any) -> set[str]:
    """Names of the adapters whose tensors require gradients."""
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {name for name in model.lora_configs if any(f".{name}." in n for n in names)}


@pytest.fixture(scope="module")
def base() -> Tensor:
    return logits(tiny_llama().requires_grad_(False))


# Activity ------------------------------------------------------------------------------------------------------------


def test_adapters_act_alone_and_together(base: Tensor) -> None:
    model = two()
    assert model.active_adapters() == ["first"]
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter(["first", "second"])
    both = logits(model)
    assert model.active_adapters() == ["first", "second"]
    outputs = [base, first, second, both]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(outputs) for b in outputs[:i])
    for names in ("second", ["second"]):
        model.merge_adapter(names)
        assert_near(logits(model), second, torch.float32, 64)
        model.unmerge_adapter()
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter([])
    assert torch.equal(logits(model), base)


def test_only_active_adapters_require_gradients() -> None:
    model = two()
    assert grads(model) == {"first"}
    model.set_adapter("second")
    assert grads(model) == {"second"}
    model.set_adapter(["second", "first"])
    assert grads(model) == {"first", "second"}
    model(**batch_for(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.set_adapter("second")
    assert all(p.grad is None for n, p in model.named_parameters() if ".first." in n)
    model.add_adapter("third", LoraConfig(r=1))
    assert grads(model) == {"third"}
    model.disable_adapters()
    model.enable_adapters()
    assert grads(model) == {"third"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_a_switch_keeps_frozen_what_was_loaded_for_inference(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path, adapter_name="second")
    model = apply_lora(tiny_llama(), LoraConfig(r=4), "first")
    model.load_adapter(tmp_path, "loaded")
    assert grads(model) == set()
    model.set_adapter(["loaded", "first"])
    assert grads(model) == {"first"}
    model.delete_adapter("loaded")
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    assert grads(model) == {"loaded"}


@pytest.mark.parametrize("names", ["frist", ["first", "second", "first"], ["first", "thrid"]])
def test_a_wrong_name_changes_nothing(names: Any) -> None:
    model = two()
    with pytest.raises(StateError, match="first"):
        model.set_adapter(names)
    assert model.active_adapters() == ["first"]
    assert grads(model) == {"first"}


# Disabling -----------------------------------------------------------------------------------------------------------


def test_disabling_restores_what_it_found(base: Tensor) -> None:
    model = two()
    y, before = logits(model), snapshot(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), y)
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        raise RuntimeError("mine")
    assert torch.equal(logits(model), y)
    model.disable_adapters()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), y)
    assert_same_tensors(snapshot(model), before)
    assert model.active_adapters() == ["first"]


def test_disabling_a_merged_model_swaps_the_originals(base: Tensor) -> None:
    model = two()
    before = snapshot(model)
    model.merge_adapter()
    merged, weights = logits(model), snapshot(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    assert_same_tensors(snapshot(model), weights)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), base)  # it was disabled, and unmerging does not enable
    model.enable_adapters()
    assert_near(logits(model), merged, torch.float32, 64)


def test_merging_inside_a_disabled_block_is_refused(base: Tensor) -> None:
    model = two()
    with model.disable_adapter():
        with pytest.raises(StateError, match="enable_adapters"):
            model.merge_adapter()
        with pytest.raises(StateError, match="enable_adapters"):
            model.merge_and_unload()
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(StateError, match="enable_adapters"):
        model.merge_and_unload()


def test_gradients_flow_through_a_disabled_forward_to_nothing_of_ours() -> None:
    model = two()
    with model.disable_adapter():
        assert not model(**batch_for(model)).loss.requires_grad


# Merged --------------------------------------------------------------------------------------------------------------

WHILE_MERGED: dict[str, Callable[[Any, Path], Any]] = {
    "set_adapter": lambda m, _: m.set_adapter("second"),
    "add_adapter": lambda m, _: m.add_adapter("third", LoraConfig()),
    "apply_lora": lambda m, _: apply_lora(m, LoraConfig(), "third"),
    "delete_adapter": lambda m, _: m.delete_adapter("second"),
    "load_adapter": lambda m, d: m.load_adapter(d, "third"),
    "load_adapter_weights": lambda m, d: m.load_adapter_weights(d, "second"),
    "load_state_dict of a base": lambda m, _: m.load_state_dict(tiny_llama(seed=3).state_dict(), strict=False),
    "load_state_dict of an adapter": lambda m, _: m.load_state_dict(m.get_adapter_state_dict()),
    "merge_and_unload another": lambda m, _: m.merge_and_unload(["second"]),
    "merge_adapter": lambda m, _: m.merge_adapter(),
    "merge_adapter another": lambda m, _: m.merge_adapter(["second"]),
    "train": lambda m, _: m.train(),
    "train a block": lambda m, _: m.model.layers[0].train(),
    "save_pretrained": lambda m, d: m.save_pretrained(d / "x"),
    "resize_token_embeddings": lambda m, _: m.resize_token_embeddings(70),
}


@pytest.mark.parametrize("verb", WHILE_MERGED)
def test_while_merged_what_would_be_wrong_raises(verb: str, tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path, adapter_name="second")
    model.merge_adapter()
    before, y = snapshot(model), logits(model)
    with pytest.raises(StateError, match="merged"):
        WHILE_MERGED[verb](model, tmp_path)
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), y)
    assert model.active_adapters() == ["first"]
    assert not model.training
    model.unmerge_adapter()
    WHILE_MERGED["train"](model, tmp_path)


@pytest.mark.parametrize("before", ["second", ["second", "first"], []])
def test_unmerging_what_was_merged_by_name_activates_what_was_active(before: Any) -> None:
    model = two()
    model.set_adapter(before)
    y, requires_grad = logits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    for _ in range(2):
        model.merge_adapter("first")
        assert model.active_adapters() == ["first"]
        model.unmerge_adapter()
        assert model.active_adapters() == list([before] if isinstance(before, str) else before)
        assert torch.equal(logits(model), y)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == requires_grad
    with pytest.raises(StateError, match="no adapter"):
        model.merge_adapter("third")
    model.set_adapter("second")
    if before:
        model.merge_adapter()
        model.unmerge_adapter()
        assert model.active_adapters() == ["second"]


def test_unmerging_what_is_not_merged_raises() -> None:
    with pytest.raises(StateError, match="no adapter is merged"):
        two().unmerge_adapter()


def test_a_refused_merge_leaves_the_active_adapters() -> None:
    model = two()
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).lora_A["second"].weight.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(MergeError, match="adapter 'second'"):
        model.merge_adapter(["second"])
    assert model.active_adapters() == ["first"]
    assert_same_tensors(snapshot(model), before)
    with pytest.raises(StateError, match="no adapter 'secnod'"):
        model.merge_adapter(["secnod"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_merge_and_unload_gives_the_plain_base_class(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    required = {n: i % 2 == 0 for i, (n, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    randomize(apply_lora(model, LoraConfig(r=4)), scale=0.05)
    y = logits(model)
    plain = model.merge_and_unload()
    assert plain is model
    assert type(plain) is type(make())
    assert not isinstance(plain, LoraModel)
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == required
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in make().named_modules()}
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert_near(logits(plain), y, dtype, 64)
    assert not any("lora" in key for module in plain.modules() for key in module.__dict__)


def test_merging_first_and_unloading_then_is_the_same() -> None:
    one, other = two(), two()
    one.set_adapter(["first", "second"])
    other.set_adapter(["first", "second"])
    one.merge_adapter()
    assert_same_tensors(snapshot(one.merge_and_unload()), snapshot(other.merge_and_unload()))


def test_unload_restores_every_bit_also_of_a_merged_model() -> None:
    before = snapshot(tiny_llama())
    model = two()
    model.merge_adapter()
    plain = model.unload()
    assert type(plain) is type(tiny_llama())
    assert_same_tensors(snapshot(plain), before)
    assert all(p.requires_grad for p in plain.parameters())
    again = apply_lora(plain, LoraConfig(r=2))  # and it can be adapted again
    assert again.active_adapters() == ["default"]


# Adding and deleting -------------------------------------------------------------------------------------------------


def test_deleting_the_active_adapter_falls_back(base: Tensor) -> None:
    model = two()
    model.add_adapter("third", LoraConfig(r=1))
    model.set_adapter("first")
    first = logits(model)
    model.delete_adapter("second")
    assert model.active_adapters() == ["first"]
    assert torch.equal(logits(model), first)
    model.delete_adapter("first")
    assert model.active_adapters() == ["third"]
    assert grads(model) == {"third"}
    model.delete_adapter("third")
    assert model.active_adapters() == []
    assert not adapter_layers(model)
    assert torch.equal(logits(model), base)
    with pytest.raises(StateError, match="no adapter is active"):
        model.merge_adapter()
    model.add_adapter("again", LoraConfig(r=1))
    assert model.active_adapters() == ["again"]


def test_deleting_an_unknown_adapter_raises() -> None:
    with pytest.raises(StateError, match=r"no adapter 'frist'.*did you mean 'first'"):
        two().delete_adapter("frist")


def test_applying_the_same_name_twice_names_unload() -> None:
    model = apply_lora(tiny_llama())
    before = snapshot(model)
    with pytest.raises(StateError, match=r"already has an adapter 'default'[\s\S]*unload\(\)"):
        apply_lora(model)
    with pytest.raises(StateError, match="'default'"):
        model.add_adapter("default", LoraConfig())
    assert_same_tensors(snapshot(model), before)
    apply_lora(model, LoraConfig(r=2), "other")
    assert model.active_adapters() == ["other"]
    assert list(model.lora_configs) == ["default", "other"]
    assert model.lora_configs["other"].r == 2


@pytest.mark.parametrize(
    "name",
    ["a.b", "", "a b", "a/b", "keys", "pop", "items", "forward", "a\\b", "training", "a\0b", "\ud800", "x" * 201],
)
def test_names_that_cannot_be(name: str) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="is not a valid adapter name"):
        apply_lora(model, adapter_name=name)
    assert not isinstance(model, LoraModel)


@pytest.mark.parametrize("name", ["default", "weight", "bias", "lora_A", "my-adapter_2", "größe", "base_layer"])
def test_names_that_can_be(name: str) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=2), name))
    model(**batch_for(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.get_adapter_state_dict(name)


def test_transformers_order_of_arguments_works() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=2))
    model.add_adapter(LoraConfig(r=3), "other")
    assert model.lora_configs["other"].r == 3
    assert get_peft_model is apply_lora


def test_the_callers_config_is_not_changed() -> None:
    config = LoraConfig(r=2)
    before = config.to_dict()
    apply_lora(tiny_bert(), config).add_adapter("other", config, num_labels=7)
    assert config.to_dict() == before


def test_a_model_that_is_not_of_transformers_takes_adapters_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    assert apply_lora(model, LoraConfig(r=2)) is model
    assert list(adapter_layers(model)) == ["0", "2"]
