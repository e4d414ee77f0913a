"""PiSSA, OLoRA and the orthogonal initialization: PEFT's values, an unchanged base, and files that everybody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    assert_near,
    assert_same_tensors,
    backward,
    batch_for,
    relative_error,
    snapshot,
    tiny_gpt2,
    tiny_llama,
)
from quantized_bases import load, save_base
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_lora import ConfigError, LoraConfig, LoraModel, TargetError, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.format import WEIGHTS_NAME

EPS = torch.finfo(torch.float32).eps
INITS = ("pissa", "olora", "pissa_niter_3")
MODELS: dict[str, Any] = {"llama": (tiny_llama, ["q_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "c_proj"])}


def train(model: nn.Module) -> None:
    """Some steps' worth of change in the factors that are trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def products(model: Any, kinds: tuple[str, str]) -> dict[str, Tensor]:
    a, b = kinds
    return {
        path: getattr(layer, b)["default"].weight.double() @ getattr(layer, a)["default"].weight.double()
        for path, layer in adapter_layers(model).items()
    }


@pytest.fixture(scope="module", params=[(name, init) for name in MODELS for init in INITS], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Any, LoraConfig, Any]:
    """(a function that makes the base, the configuration, a model that was trained a little)."""
    name, init = request.param
    make, targets = MODELS[name]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init)
    torch.manual_seed(0)
    model = apply_lora(make(), config).eval()
    train(model)
    return make, config, model


def test_the_base_stays_as_it_is_and_a_new_adapter_changes_rounding_alone(case: tuple[Any, LoraConfig, Any]) -> None:
    make, config, _ = case
    base, model = make(), apply_lora(make(), config).eval()
    batch = batch_for(base)
    with torch.no_grad():
        expected = base(**batch).logits
        assert relative_error(model(**batch).logits, expected) < 128 * EPS
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
    assert set(backward(model, batch)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("lora_A0" in n or "lora_B0" in n for n in backward(model, batch))
    own = products(model, ("lora_A", "lora_B"))
    for path, taken in products(model, ("lora_A0", "lora_B0")).items():
        assert torch.equal(own[path], taken)
        assert taken.norm() > 0.1
    assert_same_tensors(snapshot(model.unload()), snapshot(base))


def test_the_values_are_pefts(case: tuple[Any, LoraConfig, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make, config, _ = case
    randomized = torch.svd_lowrank

    def with_seed(*args: Any, **more: Any) -> Any:
        torch.manual_seed(1)
        return randomized(*args, **more)

    monkeypatch.setattr(torch, "svd_lowrank", with_seed)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", with_seed)
    model = apply_lora(make(), config)
    init: Any = config.init_lora_weights
    if init == "olora" and make is tiny_gpt2:
        pytest.skip("PEFT decomposes the transposed weight, whose factors have no place in the layer")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=config.target_modules, init_lora_weights=init)
    base: Any = peft.get_peft_model(make(), settings)
    for path, product in products(model, ("lora_A0", "lora_B0")).items():
        layer = base.base_model.model.get_submodule(path)
        theirs = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert relative_error(product, theirs) < 64 * EPS


def test_what_is_saved_is_plain_lora_of_twice_the_rank(case: tuple[Any, LoraConfig, Any], tmp_path: Path) -> None:
    make, _, model = case
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {8}
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    again = LoraModel.from_pretrained(tmp_path, base_model=make())
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        for loaded in (theirs, again, LoraModel.from_pretrained(tmp_path, base_model=make(), merge=True)):
            assert relative_error(loaded(**batch).logits, expected) < 128 * EPS
    assert relative_error(expected, make()(**batch).logits) > 0.01


def test_a_checkpoint_is_restored_with_what_was_subtracted(case: tuple[Any, LoraConfig, Any], tmp_path: Path) -> None:
    make, config, model = case
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    other = apply_lora(make(), config).eval()
    other.load_adapter_weights(tmp_path)
    assert_same_tensors(snapshot(other), snapshot(model))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_dora_over_a_subtracted_product(init: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init, use_dora=True)
    model = apply_lora(tiny_llama(), config).eval()
    batch = batch_for(model)
    with torch.no_grad():
        assert relative_error(model(**batch).logits, tiny_llama()(**batch).logits) < 128 * EPS
        train(model)
        expected = model(**batch).logits
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
        for loaded in (theirs, again, model.merge_and_unload()):
            assert relative_error(loaded(**batch).logits, expected) < 256 * EPS


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_keeps_its_codes(kind: str, tmp_path: Path) -> None:
    """The decomposition is of the weight that the codes stand for."""
    folder = save_base(tmp_path)
    base = load(folder, kind, torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = apply_lora(load(folder, kind, torch.float32), config)
    codes = {n: p for n, p in base.named_parameters() if "q_proj.weight" in n}
    found = dict(model.named_parameters())
    assert codes
    assert all(torch.equal(found[n], p) for n, p in codes.items())
    for layer in adapter_layers(model).values():
        weight = layer.read()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        top: Tensor = (u[:, :4] * s[:4]) @ v[:4]
        own: Any = layer
        product = 2 * own.lora_B0["default"].weight @ own.lora_A0["default"].weight
        assert_near(product, top, torch.float32, 64)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_is_the_best_approximation_of_what_was_lost(kind: str, tmp_path: Path) -> None:
    """Of the given rank (Eckart and Young 1936); the weights come from the checkpoint's files."""
    folder = save_base(tmp_path / "base")
    dense, base = load(folder, "dense"), load(folder, kind)
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["q_proj", "up_proj"], init_lora_weights="loftq")
    model = apply_lora(load(folder, kind), config).eval()
    batch = batch_for(model)
    for path, layer in adapter_layers(model).items():
        own: Any = layer
        lost = dense.get_submodule(path).weight.detach().double() - layer.read().double()
        s = torch.linalg.svdvals(lost)
        assert own._lora.adapters["default"].scaling == 3
        left = lost - 3 * (own.lora_B["default"].weight @ own.lora_A["default"].weight).detach().double()
        assert float(left.norm()) == pytest.approx(float(s[8:].norm()), rel=1e-4)
    with torch.no_grad():
        wanted, without = dense(**batch).logits, base.eval()(**batch).logits
        assert relative_error(model(**batch).logits, wanted) < relative_error(without, wanted)
        model.save_pretrained(tmp_path / "adapter")
    again = LoraModel.from_pretrained(tmp_path / "adapter", base_model=load(folder, kind))
    own, read = (
        {n: t for n, t in snapshot(each).items() if "lora_" in n} for each in (model, again)
    )  # what the backends compute in evaluation differs from training
    assert_same_tensors(read, own)


def test_loftq_needs_codes_and_the_weights_before(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq")
    with pytest.raises(TargetError, match=r"q_proj: LoftQ starts from what a weight lost .* is not quantized"):
        apply_lora(tiny_llama(), config)
    folder = save_base(tmp_path / "base")
    weights = load(folder, "dense").state_dict()
    model = load(folder, "nf4")
    model.config._name_or_path = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"are not here\. Pass original=…"):
        apply_lora(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())
    apply_lora(model, config, original=lambda name: weights[f"{name}.weight"])
    assert all(layer.factor("lora_B", "default").norm() > 0 for layer in adapter_layers(model).values())


def test_the_orthogonal_values_are_pefts() -> None:
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(12, 10)}), peft.LoraConfig(r=4, target_modules=["layer"])
    ).base_model.model["layer"]
    torch.manual_seed(5)
    theirs.orthogonal_init("default")
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights="orthogonal")
    from hf_lora.adapt.inject import inject

    model: Any = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    torch.manual_seed(5)
    inject(model, config)
    a, b = model["layer"].lora_A["default"].weight, model["layer"].lora_B["default"].weight
    assert torch.equal(a, theirs.lora_A["default"].weight)
    assert torch.equal(b, theirs.lora_B["default"].weight)
    assert (b @ a).norm() < 4 * EPS * b.norm() * a.norm()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(init_lora_weights="orthogonal", r=3), "orthogonal initialization needs an even rank, and its rank is 3"),
        (dict(init_lora_weights="pissa", r=40), "its weight has 32 directions, fewer than the rank 40"),
        (dict(init_lora_weights="olora", target_modules=["embed_tokens"]), "this initialization is for linear layers"),
        (dict(init_lora_weights="pissa_fast"), "write 'pissa', or 'pissa_niter_4'"),
    ],
)
def test_what_has_no_such_values_is_refused_by_name(config: dict[str, Any], match: str) -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises((TargetError, ConfigError), match=match):
        apply_lora(model, LoraConfig(**{"target_modules": ["q_proj"], **config}))
    assert_same_tensors(snapshot(model), before)
