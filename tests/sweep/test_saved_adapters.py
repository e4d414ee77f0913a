"""What an adapter's file holds, on each architecture: everything that was trained comes back, from PEFT's file too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import randomize
from models import CASES, Case
from plain import EPS, attempt, distance, outputs, same
from torch import nn

from hf_lora import LoraConfig, LoraModel, TargetError, apply_lora, explain_targets
from hf_lora.adapt.bypass import uncalled_embeddings

GRID = [pytest.param(case, id=case.name, marks=() if case.sample else pytest.mark.slow) for case in CASES]
SAMPLE_OF_WHOLE = ("bert", "t5", "mamba")


def whole_modules(model: Any) -> list[str]:
    """The head outside the backbone and the embeddings, by their names."""
    ends = [attempt(model.get_input_embeddings), attempt(model.get_output_embeddings)]
    backbone = getattr(model, model.base_model_prefix, None)
    heads = [m for m in model.children() if backbone is not None and m is not backbone and list(m.parameters())]
    wanted = [m for m in (*ends, *heads) if m is not None]
    weights = {id(getattr(m, "weight", None)) for m in ends} - {id(None)}
    uncalled = uncalled_embeddings(model)  # those that share their weight are trained in their place
    if any(m is each for n, m in model.named_modules() for each in wanted if n in uncalled):
        wanted += [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in weights]
    return [n for n, m in model.named_modules() if n and n not in uncalled and any(m is each for each in wanted)]


@pytest.mark.parametrize("case", GRID)
def test_trained_biases_come_back(case: Case, tmp_path: Path) -> None:
    model = case.build()
    batch = case.inputs(model)
    try:
        plan = explain_targets(model, LoraConfig())
    except TargetError:
        pytest.skip("it has no linear layer")
    plain = outputs(model.requires_grad_(False), batch)
    apply_lora(model, LoraConfig(r=4, bias="all"))
    assert same(outputs(model, batch), plain), "untrained biases changed the output"
    acting = outputs(randomize(model, 1, 0.1), batch)
    model.save_pretrained(tmp_path / "own")
    loaded = LoraModel.from_pretrained(tmp_path / "own", base_model=case.build(), is_trainable=True).eval()
    assert same(outputs(loaded, batch), acting)
    assert distance(outputs(loaded.merge_and_unload(untie=True), batch), acting) < 1e4 * EPS

    names = [target.name for target in plan.layers]
    theirs = peft.LoraConfig(r=4, target_modules=names, bias="all", init_lora_weights=False)
    model = peft.get_peft_model(case.build(), theirs).eval()
    biases = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    with torch.no_grad():
        for bias in biases:
            bias.add_(torch.randn_like(bias) * 0.1)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "peft")
    loaded = LoraModel.from_pretrained(tmp_path / "peft", base_model=case.build(), is_trainable=True).eval()
    if not _has_plain_lists(model):  # PEFT's layers never run there, ours do
        assert distance(outputs(loaded, batch), expected) < 1e3 * EPS


def _has_plain_lists(model: nn.Module) -> bool:
    """Whether a module keeps layers in a list besides its children, as some of Mask2Former do."""
    lists = (v for m in model.modules() for v in vars(m).values() if isinstance(v, list))
    return any(isinstance(each, nn.Module) for held in lists for each in held)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in SAMPLE_OF_WHOLE else pytest.mark.slow) for c in CASES]
)
def test_heads_and_embeddings_come_back(case: Case, tmp_path: Path) -> None:
    model = case.build()
    batch, whole = case.inputs(model), whole_modules(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    inside = tuple(f"{name}." for name in whole)
    names = [n for n in linear if not f"{n}.".startswith(inside)]
    if not whole or not names:
        pytest.skip("nothing to train whole, or no linear layer beside it")
    config = LoraConfig(r=4, target_modules="|".join(map(re.escape, names)), modules_to_save=whole, bias="all")
    acting = outputs(randomize(apply_lora(model, config, allow_bypassed=True), 1, 0.1), batch)
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(tmp_path, base_model=case.build(), is_trainable=True).eval()
    assert same(outputs(loaded, batch), acting)
