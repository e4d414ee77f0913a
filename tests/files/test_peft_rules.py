"""Names in files mean what they mean to PEFT: random trees of modules, and PEFT's own matching as the reference."""

from __future__ import annotations

import copy
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import relative_error
from round_trip import COMPONENTS, ROUNDINGS, Tree, check_round_trip, in_peft, output, random_tree
from torch import nn

from hf_lora import LoraConfig, TargetError
from hf_lora.adapt.inject import inject
from hf_lora.adapt.targets import resolve
from hf_lora.adapt.walk import adapted_modules
from hf_lora.files.load import load_adapter
from hf_lora.files.names import outermost
from hf_lora.files.save import save_adapter

FAST, SLOW = range(25), range(1000, 2500)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))


def names_of(tree: nn.Module) -> list[str]:
    return [name for name, _ in tree.named_modules() if name]


def layers_of(tree: nn.Module) -> list[str]:
    return [name for name, module in tree.named_modules() if isinstance(module, nn.Linear)]


def suffix(drawn: random.Random, name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[drawn.randrange(len(parts)) :])


def drawn_config(drawn: random.Random, tree: nn.Module) -> dict[str, Any]:
    """Fields of a configuration, most of which select something."""
    layers = layers_of(tree)
    values: dict[str, Any] = {"target_modules": [suffix(drawn, n) for n in drawn.sample(layers, min(3, len(layers)))]}
    if drawn.random() < 0.3:
        values["exclude_modules"] = [suffix(drawn, drawn.choice(layers))]
    if drawn.random() < 0.2:
        values["target_modules"] = "|".join(map(re.escape, layers[::2]))
    elif drawn.random() < 0.4:
        values["layers_to_transform"] = drawn.choice([[], 0, [0], [0, 1]])
        if values["layers_to_transform"] and drawn.random() < 0.5:
            values["layers_pattern"] = drawn.choice(["layers", ["block", "layers"]])
    if drawn.random() < 0.3:
        values["modules_to_save"] = [drawn.choice(COMPONENTS)]
    if drawn.random() < 0.3:
        values["rank_pattern"] = {drawn.choice(layers): 3, drawn.choice(COMPONENTS): 1}
    values["bias"] = drawn.choice(["none", "none", "all", "lora_only"])
    return values


def randomized(model: Any) -> Any:
    """The model with random values for all that is trained: modules of a tree may be called like factors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def theirs_of(tree: nn.Module, values: dict[str, Any]) -> Any:
    """PEFT's model with random values; None if PEFT refuses the configuration or cannot load its own file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(tree), peft.LoraConfig(r=2, lora_alpha=3, **values)).eval()
    except (ValueError, TypeError, AttributeError):  # nothing matches, or a container, or whole and adapted at once
        return None
    return randomized(model)


def check_reading(seed: int, folder: Path) -> bool:
    """Whether the configuration that is drawn from `seed` is one that PEFT takes; if so, read what it wrote."""
    drawn = random.Random(seed)
    tree = random_tree(drawn)
    theirs = theirs_of(tree, drawn_config(drawn, tree))
    if theirs is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder / str(seed))
        try:
            again = output(in_peft(tree, folder / str(seed)), X)
        except (KeyError, TypeError, RuntimeError, UserWarning):
            return False
    if not torch.equal(again, output(theirs, X)):  # such as a module trained whole inside another one
        return False
    ours = copy.deepcopy(tree)
    load_adapter(ours, folder / str(seed))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted_modules(ours, "default") == expected
    bound = ROUNDINGS * torch.finfo(torch.float32).eps
    assert relative_error(output(ours.eval(), X), output(theirs, X)) < bound
    return True


def check_writing(seed: int, folder: Path) -> str:
    """Adapt some layers of a random tree, some modules whole, and do the round trip."""
    drawn = random.Random(seed)
    tree = random_tree(drawn)
    layers = layers_of(tree)
    chosen = drawn.sample(layers, drawn.randint(1, len(layers)))
    names = names_of(tree)
    some = drawn.sample(names, min(3, len(names)))
    heads = outermost([name for name in names if name in some and drawn.random() < 0.25])
    pattern = "|".join(map(re.escape, chosen))
    config = LoraConfig(
        r=2, target_modules=pattern, modules_to_save=[], task_type=drawn.choice([None, "SEQ_CLS"]),
        bias=drawn.choice(["none", "all"]),
    )  # fmt: skip
    model = copy.deepcopy(tree)
    plan = dict.fromkeys(heads, "named")
    try:
        inject(model, config, plan=resolve(model, config, "test", saved=plan))
    except TargetError:
        return "all layers are inside a head"
    randomized(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, folder / f"{seed}")
    if any("PEFT cannot load" in str(w.message) for w in caught):
        again = copy.deepcopy(tree)
        load_adapter(again, folder / f"{seed}")
        assert torch.equal(output(again.eval(), X), output(model.eval(), X))
        return "not for PEFT"
    check_round_trip(model, tree, X, folder / f"{seed}r")
    return "all"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of the time of a save, and is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize("seeds", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["some", "many"])
def test_what_peft_wrote_for_a_random_tree_is_the_same_adapter_here(seeds: range, tmp_path: Path) -> None:
    taken = sum(check_reading(seed, tmp_path) for seed in seeds)
    assert taken > len(seeds) / 3


@pytest.mark.parametrize("seeds", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["some", "many"])
def test_what_was_saved_of_a_random_tree_loads_again_here_and_in_peft(seeds: range, tmp_path: Path) -> None:
    found = [check_writing(seed, tmp_path) for seed in seeds]
    assert found.count("all") > len(seeds) / 2


def test_a_head_inside_a_module_whose_name_ends_like_another_head(tmp_path: Path) -> None:
    """PEFT would take the module for one that is trained whole; its tensors are not those of the base."""
    tree, inner = Tree(), Tree()
    for parent, names in ((inner, ("classifier", "head")), (tree, ("classifier", "head"))):
        for name in names:
            parent.add_module(name, nn.Linear(4, 4))
    tree.add_module("pre_classifier", inner)
    model = copy.deepcopy(tree)
    inject(model, LoraConfig(r=2, target_modules=["head"], modules_to_save=["classifier"]))
    randomized(model)
    with pytest.warns(UserWarning, match="PEFT cannot load this adapter"):
        save_adapter(model, tmp_path)
    again = copy.deepcopy(tree)
    load_adapter(again, tmp_path)
    assert torch.equal(output(again, X), output(model, X))
