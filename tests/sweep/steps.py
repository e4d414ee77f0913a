"""The life of an adapter on one model, step by step, each held against the plain base.

A step that hf_lora cannot do must be refused with a reason: see refusals.py. A step that the plain base cannot do is
skipped, with the base's own error as the reason.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from models import Case
from plain import (
    CONVOLUTIONS,
    EPS,
    KINDS,
    Base,
    attempt,
    base_of,
    bounded,
    distance,
    generate,
    loss,
    outputs,
    same,
    why,
)
from refusals import AT_APPLY, AT_MERGE, AT_RESIZE, RANK, assert_refused, expected, indivisible, tied
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lora import (
    LoraConfig,
    LoraModel,
    MergeError,
    StateError,
    TargetError,
    apply_lora,
    check_adapter,
    explain_targets,
)
from hf_lora.adapt.walk import adapter_layers

TARGETS = ("all-linear", "embeddings", "everything")


@dataclass
class Record:
    """What happened, for the table in the documentation."""

    case: Case
    targets: str
    model: str = ""
    adapted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: dict[str, list[str]] = field(default_factory=dict)
    base_cannot: dict[str, str] = field(default_factory=dict)


def config_for(model: Any, targets: str, base: Base) -> tuple[LoraConfig, list[str]]:
    """The configuration, and the names that it means where they are given one by one."""
    if targets == "all-linear":
        return LoraConfig(r=RANK), []
    if targets == "everything":
        names = [n for n, m in model.named_modules() if isinstance(m, KINDS)]
        return LoraConfig(r=RANK, target_modules="|".join(map(re.escape, names)), modules_to_save=[]), names
    names = linear_layers(model) + input_embeddings(model, base)
    return LoraConfig(r=RANK, target_modules=names), names


def linear_layers(model: Any) -> list[str]:
    """What "all-linear" finds; empty where the model has no linear layer but those of its head."""
    prefix = f"{model.base_model_prefix}."
    inside = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    if not any(n.startswith(prefix) for n in inside) and hasattr(model, model.base_model_prefix):
        return []
    return [t.name for t in explain_targets(model, LoraConfig()).layers]


def input_embeddings(model: Any, base: Base) -> list[str]:
    """The embeddings that hold the input embedding's weight and run; of a model without any, its first convolution."""
    weight = getattr(attempt(model.get_input_embeddings), "weight", None)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    first = [n for n, m in model.named_modules() if type(m) in CONVOLUTIONS][:1]
    return [n for n in found if n in base.called] or first


def only(names: list[str], refused: dict[str, list[str]], model: Any) -> LoraConfig:
    """A configuration of what is left when the refused are taken away; grouped convolutions get a rank that fits."""
    gone = {n for key, hits in refused.items() if key != "rank not divisible by groups" for n in hits}
    kept = [n for n in names if n not in gone]
    modules = dict(model.named_modules())
    ranks = {re.escape(n): modules[n].groups for n in kept if indivisible(model, n, modules[n])}
    return LoraConfig(r=RANK, target_modules="|".join(map(re.escape, kept)), modules_to_save=[], rank_pattern=ranks)


def sweep(case: Case, targets: str, folder: Path) -> Record:
    """Everything an adapter does in its life, on one model."""
    record = Record(case, targets)
    base = base_of(case)
    model = case.build()
    batch = case.inputs(model)
    config, names = config_for(model, targets, base)
    if targets == "all-linear" and not linear_layers(model):
        with pytest.raises(TargetError, match="finds no layer outside the head"):
            apply_lora(model, config)
        record.model, record.refused = type(model).__name__, {"no linear layer": ["all-linear"]}
        return record
    refused = expected(AT_APPLY, model, names)
    if refused:
        with pytest.raises(TargetError) as raised:
            apply_lora(model, config)
        assert_refused(raised.value, AT_APPLY, refused)
        assert not any("lora" in n for n, _ in model.named_parameters()), "a refused call changed the model"
        config = only(names, refused, model)
        record.refused |= refused
    plan = explain_targets(model, config)
    at_merge = expected(AT_MERGE, model, [t.name for t in plan.layers])
    record.refused |= at_merge
    record.model, record.adapted = type(model).__name__, len(plan.layers)
    record.skipped = Counter(kind_of_skip(reason) for reason in plan.skipped.values())
    if targets == "all-linear":
        check_skips(model, plan.skipped, base)

    apply_lora(model, config)
    assert isinstance(model, LoraModel)
    assert same(outputs(model, batch), base.outputs), "a fresh adapter changed the frozen base's output"
    randomize(model, 1, 0.1)
    check_gradients(model, batch, base)
    check_checkpointing(case, config, model, batch, base, record)
    model.eval()
    acting = outputs(model, batch)
    assert distance(acting, base.outputs) > 1e3 * EPS, "random factors changed nothing"
    tokens = check_generation(case, model, batch, base, record)
    check_copies(model, batch, acting, base, record)
    model.save_pretrained(folder / "adapter")
    # Trainable as the first: for an input that is not contiguous PyTorch takes another product, rounded otherwise,
    # where a tensor requires a gradient.
    reloaded = LoraModel.from_pretrained(folder / "adapter", base_model=case.build(), is_trainable=True).eval()
    assert same(outputs(reloaded, batch), acting), "the reloaded adapter gives other outputs"
    check_merge(case, model, batch, acting, tokens, at_merge)
    check_unload(case, model, batch, base)
    if at_merge:
        check_refused_merge(case, config, batch, at_merge, folder)
    check_vocabulary(case, config, batch, folder, record)
    return record


def kind_of_skip(reason: str) -> str:
    """A reason of `explain_targets` without the names in it."""
    for kind, (_, phrase) in AT_APPLY.items():
        if phrase in reason:
            return kind
    return re.sub(r"trained whole with .*", "in a head that is trained whole", reason)


def check_skips(model: Any, skipped: dict[str, str], base: Base) -> None:
    """Every linear layer whose weight acts although its forward does not run is left out, and listed."""
    modules = dict(model.named_modules())
    hidden = [n for n, flows in base.gradient.items() if flows and n not in base.called]
    hidden = [n for n in hidden if isinstance(modules[n], nn.Linear) and not tied(model, n, modules[n])]
    missed = [n for n in hidden if n not in skipped]
    assert not missed, f"bypassed by their parents, and not left out: {missed}"


def check_gradients(model: Any, batch: dict[str, Any], base: Base) -> None:
    """Called layers whose plain weight would get a gradient: so do A and B. The base's parameters get none."""
    model.train()
    called: set[str] = set()
    layers = adapter_layers(model)
    hooks = [m.register_forward_hook(lambda *_, name=n: called.add(name)) for n, m in layers.items()]
    loss(model, batch).backward()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        for kind, factor in layer.factors("default"):
            gradient = factor.weight.grad
            if gradient is not None:
                assert torch.isfinite(gradient).all(), f"{name}.{kind}: the gradient is not finite"
            if name in called and base.gradient.get(name):
                assert gradient is not None, f"{name}.{kind}: called, and without a gradient"
                assert gradient.any(), f"{name}.{kind}: called, and its gradient is zero"
    ours = {id(p) for p in model.parameters() if p.requires_grad}
    strange = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in ours]
    assert not strange, f"frozen parameters have gradients: {strange[:3]}"
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".copies." in n for n in names), "a parameter of the base requires gradients"


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_checkpointing(
    case: Case, config: LoraConfig, model: Any, batch: dict[str, Any], base: Base, record: Record
) -> None:
    """Both kinds, and the reentrant one also where it was on before the adapter came."""
    if not model.supports_gradient_checkpointing:
        record.base_cannot["activation checkpointing"] = "not supported"
        return
    wanted = gradients(model.train(), batch)
    early = case.build()
    early.gradient_checkpointing_enable({"use_reentrant": True})
    apply_lora(early, config)
    randomize(early, 1, 0.1)
    for label, kind, tried in (("plain", False, model), ("reentrant", True, model), ("reentrant, early", True, early)):
        tried.train()
        if tried is model:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        reason = base.checkpointing[kind]
        try:
            with bounded():
                found = gradients(tried, batch)
            different = _different(found, wanted)
            assert not different, f"checkpointing ({label}) changes the gradients of {different[:3]}"
        except Exception:
            if reason is None:
                raise
            record.base_cannot["reentrant checkpointing" if kind else "activation checkpointing"] = reason
        model.gradient_checkpointing_disable()
    after = gradients(model, batch)
    assert not _different(after, wanted), "gradients after checkpointing was on and off again differ"


def _different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of gradients that differ, or are there in one alone; one of mere rounding noise has no direction."""
    largest = max(float(g.norm()) for g in wanted.values())
    odd = list(wanted.keys() ^ found.keys())
    return odd + [
        n for n in wanted.keys() & found.keys()
        if float((found[n] - wanted[n]).norm()) > 1e3 * EPS * (float(wanted[n].norm()) + 1e-3 * largest)
    ]  # fmt: skip


def check_generation(case: Case, model: Any, batch: dict[str, Any], base: Base, record: Record) -> Tensor | None:
    if isinstance(base.tokens, str):
        record.base_cannot["generate"] = base.tokens
    return generate(case, model, batch) if isinstance(base.tokens, Tensor) else None


def check_copies(model: Any, batch: dict[str, Any], acting: list[Tensor], base: Base, record: Record) -> None:
    if base.copies:
        record.base_cannot["deepcopy"] = base.copies
    else:
        assert same(outputs(copy.deepcopy(model), batch), acting), "a deep copy gives other outputs"
    if base.pickles:
        record.base_cannot["pickle"] = base.pickles
    else:
        assert same(outputs(pickle.loads(pickle.dumps(model)), batch), acting), "a pickled copy gives other outputs"


def check_merge(
    case: Case, model: Any, batch: dict[str, Any], acting: list[Tensor], tokens: Tensor | None,
    refused: dict[str, list[str]],
) -> None:  # fmt: skip
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if refused:
        with pytest.raises(MergeError) as raised:
            model.merge_adapter()
        assert_refused(raised.value, AT_MERGE, refused)
    else:
        report = check_adapter(model, batch)
        assert report.ok, str(report)
        model.merge_adapter()
        merged = outputs(model, batch)
        assert distance(merged, acting) < 1e4 * EPS, f"merged differs by {distance(merged, acting):.1e}\n{report}"
        if tokens is not None:
            assert torch.equal(generate(case, model, batch), tokens), "the merged model generates other tokens"
        model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "unmerging lost bits"
    assert same(outputs(model, batch), acting)


def check_unload(case: Case, model: Any, batch: dict[str, Any], base: Base) -> None:
    fresh = case.build()
    model.unload()
    assert type(model) is type(fresh)
    ours = [n for n, m in model.named_modules() if any(hasattr(c, "_mixin") for c in type(m).__mro__)]
    assert not ours, f"modules kept our class: {ours[:3]}"
    classes = {n: repr(type(m)) for n, m in fresh.named_modules()}  # by name: a parametrized module's is made for it
    assert {n: repr(type(m)) for n, m in model.named_modules()} == classes, "a module kept another class"
    own, wanted = model.state_dict(), fresh.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in own.items()), "a tensor of the base changed"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }
    assert same(outputs(model.requires_grad_(False), batch), base.outputs), "the unloaded model gives other outputs"


def check_refused_merge(
    case: Case, config: LoraConfig, batch: dict[str, Any], refused: dict[str, list[str]], folder: Path
) -> None:
    """The ways out of a refusal: `untie=True`, and leaving the grouped convolutions out."""
    model = case.build()
    if "grouped convolution" in refused:
        names = [t.name for t in explain_targets(model, config).layers]
        config = only(names, {"grouped convolution": refused["grouped convolution"]}, model)
    apply_lora(model, config)
    randomize(model, 1, 0.1)
    acting = outputs(model, batch)
    if "tied weight" in refused and "config.tie_word_embeddings" in inspect.getsource(type(case.build()).forward):
        with pytest.raises(MergeError, match="untying would change what the model computes"):
            model.merge_and_unload(untie=True)
        assert same(outputs(model, batch), acting)
        return
    plain = model.merge_and_unload(untie=True)
    assert not isinstance(plain, LoraModel)
    found = outputs(plain, batch)
    assert distance(found, acting) < 1e4 * EPS, f"merged with untie=True differs by {distance(found, acting):.1e}"
    plain.tie_weights()
    assert same(outputs(plain, batch), found), "tie_weights() brought the tie back"
    if "tied weight" in refused:
        plain.save_pretrained(folder / "merged")
        again = type(plain).from_pretrained(folder / "merged").eval()
        assert same(outputs(again, batch), found), "the merged model's file gives other outputs"


def check_vocabulary(case: Case, config: LoraConfig, batch: dict[str, Any], folder: Path, record: Record) -> None:
    """Resizing the vocabulary and tying, with an adapter that acts, against the base resized alike."""
    base = case.build()
    embedding = attempt(base.get_input_embeddings)
    if not isinstance(embedding, nn.Embedding) or "input_ids" not in batch:
        return
    rows = embedding.num_embeddings
    reason = why(lambda: resize(base, rows + 5))
    if reason is None:
        reason = why(lambda: outputs(base, batch))
    if reason:
        record.base_cannot["resize"] = reason
        return
    model = case.build()
    joined = expected(AT_RESIZE, model, [t.name for t in explain_targets(model, config).layers])
    apply_lora(model, config)
    randomize(model, 1, 0.1)
    acting = outputs(model, batch)
    if joined:
        with pytest.raises(StateError, match="resizing merges them into one module") as raised:
            resize(model, rows + 5)
        assert all(name in str(raised.value) for name in joined["embeddings that resizing joins"])
        assert same(outputs(model, batch), acting)
        record.refused |= joined
        return
    resize(model, rows + 5)
    resized = outputs(model, batch)
    assert [t for t, _ in ties(model)] == [t for t, _ in ties(base)]
    pairs = [(r, a) for r, a in zip(resized, acting, strict=True) if r.dim() > 1 and r.shape[:-1] == a.shape[:-1]]
    old = [r[..., : a.shape[-1]] for r, a in pairs]  # logits without the new tokens'; a loss is over all of them
    assert distance(old, [a for _, a in pairs]) < 1e3 * EPS, "resizing changed outputs"
    tokens = batch["input_ids"]
    larger = {**batch, "input_ids": tokens.masked_fill(tokens == tokens[0, -2], rows + 4)}
    assert all(torch.isfinite(t).all() for t in outputs(model, larger))
    model.tie_weights()
    assert same(outputs(model, batch), resized), "tie_weights() changed outputs"
    model.save_pretrained(folder / "resized")
    reloaded = LoraModel.from_pretrained(folder / "resized", base_model=base, is_trainable=True).eval()
    assert same(outputs(reloaded, batch), resized), "reloaded onto the resized base: other outputs"
    model.unload()
    assert same(outputs(model, batch), outputs(reloaded.unload(), batch)), "unloaded: not the resized base"


def resize(model: Any, rows: int) -> None:
    torch.manual_seed(7)  # the same new rows in every copy
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == rows


def ties(model: Any) -> list[tuple[tuple[str, ...], int]]:
    """The names of modules that hold one weight together."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS) and "weight" in module._parameters:
            users.setdefault(id(module.weight), []).append(name)
    return [(tuple(names), i) for i, names in users.items() if len(names) > 1]
