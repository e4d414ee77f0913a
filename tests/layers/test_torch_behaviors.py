"""What PyTorch does to models goes on working: copies, pickles, compilation, checkpointing, loading of state dicts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    adapter_gradients,
    assert_same_tensors,
    backward,
    batch_for,
    randomize,
    relative_error,
    snapshot,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from torch import nn

from hf_lora import AdapterFileError, LoraConfig, LoraModel, StateError, apply_lora
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import disabled, merge
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import adapter_layers

MODELS: dict[str, Callable[..., Any]] = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}


def make(name: str, **config: Any) -> Any:
    return randomize(apply_lora(MODELS[name](), LoraConfig(**{"r": 4, **config})))


def through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_copy_is_whole_and_its_own(name: str, how: str) -> None:
    model = make(name, bias="all")
    model.add_adapter("second", LoraConfig(r=2))
    randomize(model, 3)
    model.set_adapter("default")
    batch = batch_for(model)
    y = model(**batch).logits
    twin = COPIES[how](model)
    assert type(twin) is type(model)
    assert isinstance(twin, LoraModel)
    assert_same_tensors(snapshot(twin), snapshot(model))
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert torch.equal(twin(**batch).logits, y)
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared
    gradients = backward(model, batch)
    twin_gradients = backward(twin, batch)
    assert_same_tensors(twin_gradients, gradients)
    twin.set_adapter("second")  # one activity for all layers of the copy, and none of the original's
    assert len({id(layer._lora.activity) for layer in adapter_layers(twin).values()}) == 1
    assert model.active_adapters() == ["default"]
    assert not torch.equal(twin(**batch).logits, y)
    assert torch.equal(model(**batch).logits, y)
    merged = twin.merge_and_unload()
    assert type(merged) is type(MODELS[name]())
    assert type(model) is not type(merged)


@pytest.mark.parametrize("how", COPIES)
def test_a_merged_model_can_be_copied(how: str) -> None:
    model = make("llama")
    before = snapshot(model)
    model.merge_adapter()
    twin = COPIES[how](model)
    batch = batch_for(model)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    twin.unmerge_adapter()
    assert_same_tensors(snapshot(twin), before)


@pytest.mark.parametrize(
    ("name", "backend", "method"),
    [("bert", "eager", "dora"), ("llama", "aot_eager", "lora")],
)
def test_it_compiles_as_one_graph(name: str, backend: str, method: str) -> None:
    torch._dynamo.reset()
    model = randomize(apply_lora(MODELS[name](num_hidden_layers=1), LoraConfig(r=4, method=method)))
    batch = batch_for(model)
    expected, logits = backward(model, batch), model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    output = compiled(**batch)
    output.loss.backward()
    assert relative_error(output.logits, logits) < 1e-5
    found = adapter_gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) < 1e-4, key


def test_a_compiled_model_sees_switches() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    inject(model, LoraConfig(r=4, target_modules=["0", "2"]), "default")
    inject(model, LoraConfig(r=2, target_modules=["0", "2"]), "second")
    randomize(model)
    state, x = require_state(model, "test"), torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []
    for names in (("default",), ("second",), ("default", "second")):
        set_active(model, state, names)
        expected = model(x)
        assert relative_error(compiled(x), expected) < 1e-5
        seen.append(expected)
    assert relative_error(seen[0], seen[1]) > 1e-3
    with disabled(model):
        assert relative_error(compiled(x), model(x)) < 1e-5
        assert relative_error(compiled(x), seen[2]) > 1e-3
    merge(model)
    assert relative_error(compiled(x), seen[2]) < 1e-5


def test_it_compiles_under_autocast_and_with_dropout() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    inject(model, LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.1), "default")
    randomize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(torch.randn(3, 8))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert len(adapter_gradients(model)) == 4
    assert all(torch.isfinite(g).all() for g in adapter_gradients(model).values())


# Activation checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["after-apply", "before-apply"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool, before: bool) -> None:
    no_dropout = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "llama": {},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "t5": {"dropout_rate": 0.0},
    }[name]
    model = MODELS[name](**no_dropout).train()
    enable = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if before:
        model.gradient_checkpointing_enable(**enable)
    randomize(apply_lora(model, LoraConfig(r=4)))
    batch = batch_for(model)
    if not before:
        model.gradient_checkpointing_enable(**enable)
    assert model.is_gradient_checkpointing
    found = backward(model, batch)
    model.gradient_checkpointing_disable()
    expected = backward(model, batch)
    assert len(expected) == sum(p.requires_grad for p in model.parameters())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():  # T5 shares tensors between layers, so sums come in another order
        assert torch.equal(found[key], gradient) if name != "t5" else relative_error(found[key], gradient) < 1e-5, key


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    model = make("llama", lora_dropout=0.3).train()
    batch = batch_for(model)
    torch.manual_seed(1)
    expected = backward(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(1)
    assert_same_tensors(backward(model, batch), expected)


def test_disable_adapter_around_a_checkpointed_training_forward_is_refused() -> None:
    model = make("llama").train()
    model.gradient_checkpointing_enable()
    batch = batch_for(model)
    with model.disable_adapter():
        with pytest.raises(StateError, match="activation checkpointing"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
        model.eval()
        model(**batch)
        model.train()
        model.gradient_checkpointing_disable()
        model(**batch)
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()


# State dicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_base_state_dict_loads_into_an_adapted_model(name: str, assign: bool) -> None:
    """No base key is missing but those of a head that is kept for each adapter, and none is unexpected."""
    model = make(name, modules_to_save=[])
    other = MODELS[name](seed=7).requires_grad_(False)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    result = model.load_state_dict(state, strict=False, assign=assign)
    assert not result.unexpected_keys
    assert all(".lora_" in key for key in result.missing_keys)
    batch = batch_for(model)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    gradients = backward(model, batch)
    trainable = {n for n, p in model.named_parameters() if "lora_" in n}
    assert gradients.keys() >= trainable
    assert all(gradients[n].abs().sum() > 0 for n in trainable)


def test_after_assign_gradients_reach_the_real_parameters() -> None:
    model = make("llama")
    donor = randomize(make("llama"), seed=8)
    batch = batch_for(model)
    result = model.load_state_dict({k: v.clone() for k, v in donor.state_dict().items()}, assign=True)
    assert not result.missing_keys
    assert torch.equal(model(**batch).logits, donor(**batch).logits)
    trainable = [n for n, p in model.named_parameters() if "lora_" in n]
    for parameter in model.parameters():
        parameter.grad = None
    model(**batch).loss.backward()
    donor(**batch).loss.backward()
    expected = {n: p.grad for n, p in donor.named_parameters() if n in trainable}
    assert_same_tensors({n: p.grad for n, p in model.named_parameters() if n in trainable}, expected)  # type: ignore[misc]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainable)


def test_load_state_dict_takes_an_adapters_keys_and_no_foreign_ones() -> None:
    model, donor = make("bert"), randomize(make("bert"), seed=8)
    model.load_state_dict(donor.get_adapter_state_dict())
    batch = batch_for(model)
    assert torch.equal(model(**batch).logits, donor(**batch).logits)
    with pytest.raises(AdapterFileError, match="none of the 1 keys belongs to this model"):
        model.load_state_dict({"transformer.wte.weight": torch.zeros(2)}, strict=False)
    broken = dict(donor.get_adapter_state_dict())
    del broken[next(iter(broken))]
    before = snapshot(model)
    with pytest.raises(AdapterFileError):
        model.load_state_dict(broken)
    assert_same_tensors(snapshot(model), before)


def test_replaced_parameters_are_found(tmp_path: Path) -> None:
    """No layer keeps a Parameter of its own: one that is replaced is the one that trains (as sharding does it)."""
    model = make("llama")
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and "lora" not in key:
                module._parameters[key] = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    gradients = backward(model, batch_for(model))
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    assert all(g.abs().sum() > 0 for g in gradients.values())


def test_data_parallel_replicas_train_the_real_parameters() -> None:
    """As `torch.nn.parallel.replicate` makes them: modules copied by `__dict__`, parameters replaced by tensors."""
    model = make("llama")
    batch = batch_for(model)
    expected = backward(model, batch)
    model.zero_grad()
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for key, child in module._modules.items():
            setattr(replica, key, copies[child])
        for key, parameter in module._parameters.items():
            # What Broadcast returns is a tensor with a gradient function.
            setattr(replica, key, None if parameter is None else parameter * 1)
    assert type(copies[model]) is type(model)
    copies[model](**batch).loss.backward()
    assert_same_tensors(adapter_gradients(model), expected)


def test_constructing_the_class_gives_the_plain_base() -> None:
    model = make("llama")
    cls = type(model)
    plain = type(tiny_llama())
    assert type(cls(model.config)) is plain
    assert type(cls._from_config(model.config)) is plain
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (plain.__name__, plain.__qualname__, plain.__module__)
    assert cls.config_class is plain.config_class
    assert isinstance(model, plain)
    assert isinstance(model, LoraModel)
    with pytest.raises(StateError, match="has no constructor"):
        LoraModel()


def test_generation_is_that_of_the_merged_model() -> None:
    model = make("llama")
    batch = batch_for(model, labels=False)
    found = model.generate(**batch, max_new_tokens=6, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(found, merged.generate(**batch, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_whole_model_can_be_traced(training: bool) -> None:
    """Tracing reads every attribute of every module, also of the models inside."""
    model = randomize(apply_lora(tiny_bert(return_dict=False, hidden_dropout_prob=0.0), LoraConfig(r=4)))
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = batch_for(model)["input_ids"]
    traced = torch.jit.trace(model, (ids,), strict=False, check_trace=False)
    assert torch.equal(traced(ids)[0], model(ids)[0])
    for module in model.modules():
        for name in dir(type(module)):
            hasattr(module, name)
