"""An adapter's own head and labels, inner models, reports, and what the user froze."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_llama
from torch import Tensor, nn

from hf_lora import LoraConfig, LoraModel, StateError, apply_lora
from hf_lora.adapt.inject import eject
from hf_lora.adapt.report import trainable_line, trainable_parameters
from hf_lora.adapt.walk import replacements
from hf_lora.layers.parts import Bias


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model, labels=False)).logits


# An adapter's own task -----------------------------------------------------------------------------------------------


def test_adapters_with_other_label_counts_swap() -> None:
    names = {i: f"intent {i}" for i in range(5)}
    model = apply_lora(tiny_bert(labels=3), LoraConfig(r=4), "three")
    model.add_adapter("five", LoraConfig(r=2), num_labels=5)
    model.add_adapter("named", LoraConfig(r=2), id2label=names)
    randomize(model)
    batch = batch_for(model, labels=False)
    seen = {}
    for name, labels in (("three", 3), ("five", 5), ("named", 5), ("three", 3)):
        model.set_adapter(name)
        output = model(**batch, labels=torch.tensor([labels - 1, 0]))
        assert output.logits.shape == (2, labels)
        assert model.num_labels == model.config.num_labels == len(model.config.id2label) == labels
        output.loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if ".copies." in n and f".{name}." in n)
        seen.setdefault(name, output.logits)
        assert torch.equal(seen[name], output.logits)
    model.set_adapter("named")
    assert model.config.id2label == names
    assert model.config.label2id == {v: k for k, v in names.items()}
    model.set_adapter("three")
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    plain = model.unload()
    assert plain.num_labels == plain.config.num_labels == 3
    assert type(plain.classifier) is torch.nn.Linear
    assert_same_tensors(snapshot(plain), snapshot(tiny_bert(labels=3)))


def test_two_active_adapters_with_their_own_heads_are_refused() -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=4), "first")
    model.add_adapter("second", LoraConfig(r=4))
    with pytest.raises(StateError, match="classifier: 'first' and 'second' each have their own"):
        model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["second"]
    model.add_adapter("headless", LoraConfig(r=4, modules_to_save=[]))
    model.set_adapter(["first", "headless"])
    randomize(model)
    logits(model)


def test_merge_and_unload_keeps_the_active_adapters_head_and_labels() -> None:
    model = apply_lora(tiny_bert(labels=3), LoraConfig(r=4), "three")
    model.add_adapter("five", LoraConfig(r=2), num_labels=5)
    randomize(model)
    y = logits(model)
    plain = model.merge_and_unload()
    assert plain.num_labels == plain.config.num_labels == 5
    assert plain.classifier.out_features == 5
    assert not replacements(plain)
    assert_near(logits(plain), y, torch.float32, 64)


def test_labels_of_its_own_need_a_head() -> None:
    with pytest.raises(StateError, match="has no task head that depends on num_labels=5"):
        apply_lora(tiny_llama()).add_adapter("five", LoraConfig(), num_labels=5)


def test_only_what_depends_on_the_labels_is_new() -> None:
    """`modules_to_save` may name more than the head, and by suffixes; the rest starts as a copy of the base's."""
    model = apply_lora(tiny_bert(labels=3), LoraConfig(r=4), "three")
    config = LoraConfig(r=4, modules_to_save=["pooler", "classifier", "word_embeddings"])
    model.add_adapter("five", config, num_labels=5)
    assert sorted(replacements(model)) == ["bert.embeddings.word_embeddings", "bert.pooler", "classifier"]
    for path in ("bert.embeddings.word_embeddings", "bert.pooler"):
        replacement = replacements(model)[path]
        kept = {k: t for k, t in replacement.base_layer.state_dict().items() if "lora_" not in k}
        assert_same_tensors(replacement.copies["five"].state_dict(), kept)
    assert logits(model).shape == (2, 5)


def test_other_labels_from_the_start() -> None:
    model = apply_lora(tiny_bert(labels=3), LoraConfig(r=4), num_labels=4)
    assert logits(model).shape == (2, 4)
    assert model.unload().num_labels == 3
    assert logits(model).shape == (2, 3)


# Inner models and reports --------------------------------------------------------------------------------------------


def test_verbs_of_an_inner_model_name_the_outer_one(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama())
    inner = model.model
    assert isinstance(inner, LoraModel)
    calls: list[Callable[[], Any]] = [
        lambda: inner.save_pretrained(tmp_path), lambda: inner.merge_adapter(), lambda: inner.unmerge_adapter(),
        lambda: inner.merge_and_unload(), lambda: inner.unload(), lambda: inner.set_adapter("default"),
        lambda: inner.enable_adapters(), lambda: inner.disable_adapters(), lambda: inner.delete_adapter("default"),
        lambda: inner.active_adapters(), lambda: inner.get_adapter_state_dict(), lambda: apply_lora(inner),
        lambda: inner.add_adapter("x", LoraConfig()), lambda: inner.resize_token_embeddings(70),
        lambda: inner.disable_adapter().__enter__(), lambda: inner.adapter_table(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="part of a LlamaForCausalLM"):
            call()
    assert not list(tmp_path.iterdir())
    model.unload()
    assert type(inner) is type(tiny_llama().model)


def test_a_part_that_has_adapters_is_refused() -> None:
    model = tiny_llama()
    apply_lora(model.model, LoraConfig(r=2))
    with pytest.raises(StateError, match=r"model already has adapters[\s\S]*unload"):
        apply_lora(model)


def test_the_trainable_line_counts_right(capsys: pytest.CaptureFixture[str]) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    own = 2 * 4 * (32 + 32)
    total = sum(p.numel() for p in tiny_llama().parameters()) + own
    assert trainable_parameters(model) == (own, total)
    line = f"trainable params: {own:,} || all params: {total:,} || trainable%: {100 * own / total:.4f}"
    assert trainable_line(model) == line
    model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == line


def test_the_adapters_table_tells_all() -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=4, rank_pattern={"query": 2}))
    table = model.adapter_table()
    assert "adapter 'default'" in table
    rows = {line.split()[0]: line.split() for line in table.splitlines() if "->" in line}
    assert rows["bert.encoder.layer.0.attention.self.query"][1:] == ["32", "->", "32", "2", "8", "128"]
    assert rows["bert.encoder.layer.1.intermediate.dense"][1:] == ["32", "->", "48", "4", "8", "320"]
    assert "classifier: the task head, outside the backbone, 99 parameters" in table
    with pytest.raises(StateError, match="no adapter 'x'"):
        model.adapter_table("x")


@pytest.mark.parametrize("config", [{"target_modules": "all-linear"}, {"target_modules": ["0"], "bias": "all"}, {
    "target_modules": ["0"], "modules_to_save": ["2"]}], ids=["factors", "biases", "whole"])  # fmt: skip
def test_layers_that_two_models_share_have_the_adapters_of_one(config: dict[str, Any]) -> None:
    """As an actor and a critic around one body."""
    body = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    actor, critic = nn.Sequential(*body, nn.Linear(4, 2)), nn.Sequential(*body, nn.Linear(4, 1))
    randomize(apply_lora(actor, LoraConfig(r=2, **config)))
    x = torch.randn(3, 4)
    before, values, classes = actor(x), snapshot(actor), [type(m) for m in critic.modules()]
    with pytest.raises(StateError, match="of another model"):
        apply_lora(critic, LoraConfig(r=2, target_modules=["0", "3"]))
    assert_same_tensors(snapshot(actor), values)
    assert [type(m) for m in critic.modules()] == classes
    assert torch.equal(actor(x), before)
    eject(actor)
    apply_lora(critic, LoraConfig(r=2, target_modules=["0", "3"]))


def test_a_compiled_model_is_refused_before_it_is_changed() -> None:
    model = tiny_llama()
    compiled: Any = torch.compile(model, backend="eager")
    before, kind = snapshot(model), type(model)
    with pytest.raises(StateError, match=r"before torch\.compile"):
        apply_lora(compiled, LoraConfig(r=2))
    assert type(model) is kind
    assert_same_tensors(snapshot(model), before)
    apply_lora(compiled._orig_mod, LoraConfig(r=2))


# Modes and frozen tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_an_adapter_adds_is_in_the_mode_of_the_model(training: bool) -> None:
    model = tiny_bert().train(training)
    apply_lora(model, LoraConfig(r=2, lora_dropout=0.5, bias="all"))
    model.add_adapter("five", LoraConfig(r=2), num_labels=5)
    assert {name for name, module in model.named_modules() if module.training != training} == set()


def frozen_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def switch(model: Any) -> None:
    model.set_adapter("other")
    model.set_adapter("default")


def fail_to_add(model: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bias, "attach", None)  # the factors are there by then
        with pytest.raises(TypeError):
            model.add_adapter("third", LoraConfig(r=2, bias="all"))


@pytest.mark.parametrize(
    "action",
    [
        switch,
        fail_to_add,
        lambda m: m.add_adapter("third", LoraConfig(r=2)) or m.delete_adapter("third") or m.set_adapter("default"),
        lambda m: m.resize_token_embeddings(70, mean_resizing=False),
        lambda m: switch(m) or switch(m),
    ],
    ids=["switch", "failed addition", "added and deleted", "resized", "switched twice"],
)
def test_what_the_user_froze_stays_frozen(action: Any) -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=2, bias="all"), "other")
    model.add_adapter("default", LoraConfig(r=2, bias="all"), num_labels=5)
    everything = frozen_names(model)
    for name, parameter in model.named_parameters():
        if "layer.0" in name and ".default." in name:
            parameter.requires_grad = False
        if name == "bert.embeddings.LayerNorm.weight":
            parameter.requires_grad = True  # of the base
    wanted = frozen_names(model)
    assert wanted != everything
    action(model)
    assert {name for name in frozen_names(model) if ".third." not in name} == wanted
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad = True  # and what is trained again is trained after a switch too
    switch(model)
    assert not any(".default." in name for name in frozen_names(model))


def test_a_model_may_be_unloaded_while_its_adapters_are_disabled() -> None:
    plain = tiny_bert()
    model = randomize(apply_lora(copy.deepcopy(plain), LoraConfig(r=2)))
    with model.disable_adapter():
        model.unload()
    assert type(model) is type(plain)
    assert_same_tensors(snapshot(model), snapshot(plain))
