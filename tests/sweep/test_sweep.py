"""A sweep of architectures: everything that an adapter does in its life, on tiny random models of each.

`docs/make_architectures.py` runs the same steps and writes the table in the documentation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import CASES, Case
from steps import TARGETS, sweep
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora import TargetError, explain_targets
from hf_lora.adapt.embeddings import output_embeddings
from hf_lora.adapt.heads import outside_backbone

GRID = [
    pytest.param(case, targets, id=f"{case.name}-{targets}", marks=() if case.sample else pytest.mark.slow)
    for case in CASES
    for targets in TARGETS
]


@pytest.mark.parametrize(("case", "targets"), GRID)
def test_every_step(case: Case, targets: str, tmp_path: Path) -> None:
    record = sweep(case, targets, tmp_path)
    assert record.adapted or record.refused


def test_the_sample_holds_eight_kinds_of_models() -> None:
    sample = [case for case in CASES if case.sample]
    assert len(sample) == 8
    assert len({case.group for case in sample}) == 8
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


FAST = ("bloom", "mamba", "t5")
AT_SOME_TIME = {"mamba": {"out_proj", "x_proj"}, "mamba2": {"out_proj"}, "bamba": {"out_proj"}}
"""Called on a CPU; the fused kernels of a GPU, in training, multiply by their weights."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in FAST else pytest.mark.slow) for c in CASES]
)
def test_what_every_forward_calls_is_adapted(case: Case) -> None:
    called: list[set[str]] = []
    for training in (False, True):
        model, names = case.build().train(training), set[str]()
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.register_forward_hook(lambda *_, name=name, names=names: names.add(name))
        with torch.no_grad():
            model(**case.inputs(model))
        called.append(names)
    model = case.build()
    try:
        plan = explain_targets(model)
    except TargetError:
        return  # convolutions alone
    outputs = {id(module) for module in output_embeddings(model)}
    heads = tuple(f"{name}." for name in outside_backbone(model))
    wanted = {n for n in called[0] & called[1] if id(model.get_submodule(n)) not in outputs}
    wanted -= {n for n in wanted if f"{n}.".startswith(heads) or n in plan.saved}
    missing = wanted - {target.path for target in plan.layers}
    assert {name.rpartition(".")[2] for name in missing} == AT_SOME_TIME.get(case.name, set())
