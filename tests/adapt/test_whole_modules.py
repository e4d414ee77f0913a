"""Modules that are trained whole: containers, and embeddings that only lend their weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, batch_for, randomize, tiny_t5
from torch import Tensor, nn

from hf_lora import LoraConfig, TargetError, apply_lora
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge_for_good
from hf_lora.files.load import load_adapter
from hf_lora.files.save import adapter_state_dict, save_adapter


class Contains(nn.Module):
    """Holds layers in a container, and uses them in one of the ways that models do."""

    WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
        "list, iterated": (lambda: nn.ModuleList(layers()), lambda held, x: functools.reduce(called, held, x)),
        "list, indexed": (lambda: nn.ModuleList(layers()), lambda held, x: held[2](held[1](held[0](x)))),
        "dict": (
            lambda: nn.ModuleDict(dict(zip("abc", layers(), strict=True))),
            lambda held, x: held["c"](held["b"](held["a"](x))),
        ),
        "sequence, called": (lambda: nn.Sequential(*layers()), lambda held, x: held(x)),
        "sequence, iterated": (lambda: nn.Sequential(*layers()), lambda held, x: functools.reduce(called, held, x)),
        "sequence, indexed": (lambda: nn.Sequential(*layers()), lambda held, x: held[-1](held[1](held[0](x)))),
        "nested": (
            lambda: nn.ModuleList([nn.Sequential(*layers()[:2]), nn.ModuleDict({"c": layers()[2]})]),
            lambda held, x: held[1]["c"](held[0](x)),
        ),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        make, self.use = self.WAYS[way]
        self.body, self.held = nn.Linear(8, 8), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.held, self.body(x))


def layers() -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]


def called(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", Contains.WAYS)
def test_a_container_that_is_trained_whole_is_used_as_before(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Contains(way).to(dtype), torch.randn(4, 8).to(dtype)
    keys = {f"held.{key}" for key in model.held.state_dict()}
    y = model(x)
    plan = inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["held"]))
    assert torch.equal(model(x), y)
    assert set(plan.saved) == {key.rpartition(".")[0] for key in keys}
    randomize(model)
    stored = adapter_state_dict(model, "default")
    assert {key.removeprefix("base_model.model.") for key in stored} >= keys
    plain = Contains(way).double()
    plain.load_state_dict({n: p.double() for n, p in model.state_dict().items() if n.startswith("body")}, strict=False)
    merge_for_good(model)
    plain.load_state_dict({n: p.double() for n, p in model.state_dict().items()})
    assert_near(model(x), plain(x.double()), dtype, 8)
    assert type(model.held) is type(plain.held)


def test_the_file_of_a_container_loads_into_another_model(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["held"])
    model, x = Contains("nested"), torch.randn(4, 8)
    inject(model, config)
    randomize(model)
    save_adapter(model, tmp_path)
    torch.manual_seed(9)
    other = Contains("nested")
    other.body.load_state_dict({n: p for n, p in model.body.state_dict().items() if "lora" not in n})
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_what_nothing_calls_is_refused_with_what_to_name_instead() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ParameterList([nn.Parameter(torch.ones(2))])})
    with pytest.raises(TargetError, match="b: ParameterList has no forward, so a copy of it would never run"):
        inject(model, LoraConfig(target_modules=["a"], modules_to_save=["b"]))


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
def test_an_embedding_that_only_lends_its_weight_is_refused_with_those_that_are_called(kind: str) -> None:
    model = tiny_t5()
    called: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(**batch_for(model))
    assert "shared" not in called
    with pytest.raises(TargetError, match=r"shared.* nothing calls it") as error:
        apply_lora(
            model, LoraConfig(**{"target_modules": ["q"], kind: ["shared", "q"][: 2 - (kind != "target_modules")]})
        )
    named = str(error.value).partition("its weight with ")[2].partition(";")[0].split(", ")
    assert set(named) == {name for name in called if name.endswith("embed_tokens")}
    assert apply_lora(model, LoraConfig(target_modules=["q", *named])).adapter_table()
