"""Initializations that look at batches: PEFT's values, an unchanged base, ranks by explained variance, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_same_tensors, needs_peft, relative_error, snapshot, tiny_gpt2, tiny_llama
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_lora import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError, TargetError, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.format import WEIGHTS_NAME
from hf_lora.layers.inits import batches as of_batches

EPS = torch.finfo(torch.float32).eps
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "down_proj"]),
    # PEFT takes gradients in training mode, with the dropout of the base.
    "gpt2": (lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), ["c_attn", "c_proj"]),
}


def some_batches(count: int = 3, rows: int = 4, tokens: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 60, (rows, tokens), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[:, :4] = -100
        if rows > 1:
            mask[0, -3:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def peft_config(config: LoraConfig, **more: Any) -> peft.LoraConfig:
    init: Any = config.init_lora_weights
    return peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, target_modules=config.target_modules, init_lora_weights=init,  # type: ignore[arg-type]
        **more,
    )  # fmt: skip


def by_path(table: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("base_model.model."): value for name, value in table.items()}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=needs_peft("0.20", "does not see the labels of a batch, so that EVA uses all tokens")),
        {"rho": 1.5, "adjust_scaling_factors": False, "use_label_mask": False},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_eva_has_the_components_and_ranks_of_peft(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    make, targets = MODELS[name]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**settings),  # type: ignore[arg-type]
    )
    base = make()
    model = apply_lora(make(), config, batches=some_batches()).eval()
    theirs: Any = peft.get_peft_model(make(), peft_config(config, eva_config=peft.EvaConfig(**settings)))
    initialize_lora_eva_weights(theirs, some_batches(), show_progress_bar=False)
    own, of_peft = model.lora_configs["default"], theirs.peft_config["default"]
    assert own.rank_pattern == by_path(of_peft.rank_pattern) != {}
    assert own.alpha_pattern == by_path(of_peft.alpha_pattern)
    for path, layer in adapter_layers(model).items():
        other = theirs.base_model.model.get_submodule(path)
        assert layer._lora.adapters["default"].scaling == other.scaling["default"]
        assert relative_error(layer.factor("lora_A", "default"), other.lora_A["default"].weight) < 8 * EPS
    batch = some_batches()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    for each in (model, theirs.eval()):
        each(**batch).loss.backward()
    for path, layer in adapter_layers(model).items():
        grad = theirs.base_model.model.get_submodule(path).lora_B["default"].weight.grad
        assert relative_error(getattr(layer, "lora_B")["default"].weight.grad, grad) < 64 * EPS  # noqa: B009
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(tmp_path, base_model=make())
    read = peft.PeftModel.from_pretrained(make(), tmp_path)
    for path, layer in adapter_layers(again).items():
        a = model.get_submodule(path).lora_A["default"].weight
        assert torch.equal(layer.factor("lora_A", "default"), a)
        assert torch.equal(read.base_model.model.get_submodule(path).lora_A["default"].weight, a)


def test_the_components_are_those_of_all_rows_together() -> None:
    """Against one decomposition in float64, of rows whose mean moves; what three components leave out is small."""
    from hf_lora.layers.inits.eva import Components

    torch.manual_seed(0)
    spread = torch.diag(torch.tensor([1.0, 0.5, 0.25, *[1e-4] * 9])) @ torch.linalg.qr(torch.randn(12, 12)).Q
    rows = [torch.randn(40 + i, 12) @ spread + i * spread[1] for i in range(4)]
    found = Components(3)
    for each in rows:
        found.add(each[:30])  # enough for one step
        found.add(each[30:31])  # waits for more
        found.add(each[31:])
    x = torch.cat(rows).double()
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert found.directions is not None
    assert ((found.directions.double() @ vh[:3].t()).abs() - torch.eye(3)).abs().max() < 1e-3
    assert torch.allclose(found.shares().double(), s[:3].square() / s.square().sum(), rtol=1e-3)


def test_eva_leaves_out_layers_of_rank_zero_and_all_ranks_stay_in_the_budget() -> None:
    config = LoraConfig(r=2, init_lora_weights="eva", eva_config={"rho": 8.0, "tau": 0.9, "use_label_mask": False})
    model = apply_lora(tiny_llama(), config, batches=some_batches())
    every = [*apply_lora(tiny_llama(), LoraConfig(r=2)).lora_configs, *adapter_layers(apply_lora(tiny_llama()))][1:]
    ranks = {path: layer._lora.adapters["default"].r for path, layer in adapter_layers(model).items()}
    assert sum(ranks.values()) == 2 * len(every)
    assert len(ranks) < len(every)
    assert "the initialization chose rank 0" in model.adapter_table()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", MODELS)
def test_corda_is_pefts_and_leaves_the_base(name: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, targets = MODELS[name]
    samples = some_batches(rows=1)
    settings = {"corda_method": mode}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="corda", corda_config=settings)
    monkeypatch.setattr(of_batches, "GROUP_BYTES", 10_000)  # several passes over the batches
    joined = {key: torch.cat([sample[key] for sample in samples]) for key in samples[0]}
    model = apply_lora(make(), config, batches=[joined]).eval()  # a row is a sample
    base: Any = make()
    wanted = peft_config(config, corda_config=CordaConfig(corda_method=mode))
    preprocess_corda(base, wanted, run_model=lambda: [base(**sample) for sample in samples])
    theirs: Any = peft.get_peft_model(base, wanted)
    check_what_is_subtracted(model, theirs, make)


@pytest.mark.parametrize(
    ("direction", "scale"),
    [("ArB2r", "stable"), ("A2rBr", "weight_svd"), ("ArBr", "gd_scale"), ("random", "unit"), ("ArB2r", "unit")],
)
def test_lora_ga_is_pefts_and_leaves_the_base(direction: Any, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, targets = MODELS["gpt2" if scale == "unit" else "llama"]
    seeded(monkeypatch)
    settings = {"direction": direction, "scale": scale}
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights="lora_ga", lora_ga_config=settings
    )
    model = apply_lora(make(), config, batches=some_batches()).eval()
    base: Any = make()
    wanted = peft_config(config, lora_ga_config=peft.LoraGAConfig(**settings))
    preprocess_loraga(base, wanted, lambda: [base(**batch).loss.backward() for batch in some_batches()])
    theirs: Any = peft.get_peft_model(base, wanted)
    check_what_is_subtracted(model, theirs, make)


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers of the decompositions that do not depend on those before."""
    for name in ("svd_lowrank", "randperm"):
        original = getattr(torch, name)

        def with_seed(*args: Any, original: Any = original, **more: Any) -> Any:
            torch.manual_seed(1)
            return original(*args, **more)

        monkeypatch.setattr(torch, name, with_seed)


def check_what_is_subtracted(model: Any, theirs: Any, make: Callable[[], Any]) -> None:
    """The products, the outputs and the gradients are PEFT's; the base is as it was, and files are plain LoRA."""
    theirs.eval()
    batch = some_batches()[0]
    for path, layer in adapter_layers(model).items():
        other = theirs.base_model.model.get_submodule(path)
        found = layer.factor("lora_B", "default") @ layer.factor("lora_A", "default")
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        assert product.norm() > 0
        assert relative_error(found, product) < 2000 * EPS  # inverses and iterations in float32
    original = make()
    with torch.no_grad():
        expected = original.eval()(**batch).logits
        assert relative_error(model(**batch).logits, expected) < 2000 * EPS
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
    for each in (model, theirs):
        each(**batch).loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for path, layer in adapter_layers(model).items():
        for kind in ("lora_A", "lora_B"):
            own = getattr(layer, kind)["default"].weight.grad
            assert relative_error(own, grads[f"base_model.model.{path}.{kind}.default.weight"]) < 5000 * EPS
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert_same_tensors(snapshot(model.unload()), snapshot(original))


@pytest.mark.parametrize(("init", "settings"), [("corda", {"corda_method": "kpm"}), ("lora_ga", {"scale": "unit"})])
def test_files_are_plain_lora_of_twice_the_rank(init: str, settings: dict[str, Any], tmp_path: Path) -> None:
    own: Any = {f"{init}_config": settings}
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init, **own)
    model = apply_lora(tiny_llama(), config, batches=some_batches()).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    assert {len(t) for key, t in load_file(tmp_path / WEIGHTS_NAME).items() if "lora_A" in key} == {6}
    batch = some_batches()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        for loaded in (
            peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval(),
            LoraModel.from_pretrained(tmp_path, base_model=tiny_llama()),
            model.merge_and_unload(),
        ):
            assert relative_error(loaded(**batch).logits, expected) < 256 * EPS


def test_files_of_peft_that_lack_what_was_subtracted_are_refused(tmp_path: Path) -> None:
    base: Any = tiny_llama()
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="lora_ga")
    settings = peft_config(config, lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(base, settings, lambda: [base(**batch).loss.backward() for batch in some_batches()])
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"(?s)is in no file.*path_initial_model_for_weight_conversion="):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())


def test_a_second_adapter_looks_at_the_base_alone() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config={"rho": 1.0})
    alone = apply_lora(tiny_llama(), config, batches=some_batches())
    both = apply_lora(tiny_llama(), LoraConfig(init_lora_weights=False))
    apply_lora(both, config, "second", batches=some_batches())
    for path, layer in adapter_layers(alone).items():
        assert torch.equal(both.get_submodule(path).lora_A["second"].weight, layer.factor("lora_A", "default"))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(init_lora_weights="eva", eva_config={"rho": 0.5}), r"eva_config: rho=0.5 must be a number >= 1"),
        (dict(init_lora_weights="eva", eva_config={"roh": 2}), r"eva_config: unknown: roh; known: rho, tau"),
        (dict(init_lora_weights="eva", eva_config=[2]), r"eva_config=\[2\] must be a mapping"),
        (dict(init_lora_weights="corda", corda_config={"corda_method": "x"}), "must be one of ipm, kpm"),
        (dict(init_lora_weights="corda", corda_config={"cache_file": "x"}), "not supported: cache_file"),
        (dict(init_lora_weights="lora_ga", lora_ga_config={"scale": "x"}), "scale='x' must be one of stable"),
        (dict(init_lora_weights="lora_ga", r=20), "its weight has 32 directions, fewer than the rank 40"),
        (dict(init_lora_weights="eva", target_modules=["embed_tokens"]), "this initialization is for linear layers"),
        (dict(init_lora_weights="mica", use_dora=True), "it trains A alone, with plain LoRA"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(config: dict[str, Any], match: str) -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises((TargetError, ConfigError), match=match):
        apply_lora(model, LoraConfig(**{"target_modules": ["q_proj"], **config}), batches=some_batches())
    assert_same_tensors(snapshot(model), before)


def test_layers_that_the_batches_do_not_reach_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).square().sum()

    for init in ("eva", "corda", "lora_ga"):
        model = Half()
        with pytest.raises(StateError, match=r"unused took no part in the batches\. Name them in exclude_modules"):
            apply_lora(model, LoraConfig(r=2, init_lora_weights=init), batches=[torch.randn(30, 8)])
        apply_lora(
            model, LoraConfig(r=2, init_lora_weights=init, exclude_modules=["unused"]), batches=[torch.randn(30, 8)]
        )


@needs_peft("0.20", "has no mica")
@pytest.mark.parametrize("name", ["llama", "gpt2", "embedding"])
def test_mica_is_pefts_and_trains_a_alone(name: str, tmp_path: Path) -> None:
    make, targets = MODELS["llama" if name == "embedding" else name]
    targets = ["embed_tokens"] if name == "embedding" else targets
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="mica")
    model = apply_lora(make(), config)
    theirs: Any = peft.get_peft_model(make(), peft_config(config))
    a, b = ("lora_embedding_A", "lora_embedding_B") if name == "embedding" else ("lora_A", "lora_B")
    for path, layer in adapter_layers(model).items():
        other = theirs.base_model.model.get_submodule(path)
        wanted = getattr(other, b)["default"]
        wanted = wanted if name == "embedding" else wanted.weight
        assert relative_error(layer.factor("lora_B", "default"), wanted) < 64 * EPS
        assert not layer.factor("lora_A", "default").any()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_A.default.weight" for path in adapter_layers(model)}
    batch = some_batches()[0]
    for each in (model, theirs):
        each(**batch).loss.backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5).step()
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits
        assert relative_error(model.eval()(**batch).logits, expected) < 64 * EPS
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    read: Any = LoraModel.from_pretrained(tmp_path / "theirs", base_model=make(), is_trainable=True)
    again: Any = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True)
    for each, kind in ((read, "lora_A"), (again, a)):
        with torch.no_grad():
            assert relative_error(each.eval()(**batch).logits, expected) < 64 * EPS
        assert all(kind in n for n, p in each.named_parameters() if p.requires_grad)
    with torch.no_grad():
        assert relative_error(model.merge_and_unload()(**batch).logits, expected) < 64 * EPS


@pytest.mark.parametrize(
    ("init", "kind"), [("eva", "nf4"), ("corda", "nf4"), ("corda", "bf16"), ("corda", "int8"), ("mica", "int8")]
)
def test_quantized_and_rounded_bases(init: str, kind: str, tmp_path: Path) -> None:
    """The base keeps its codes; a new adapter changes nothing but rounding, and is trained."""
    from quantized_bases import bits, load, save_base

    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    folder = save_base(tmp_path)
    base, own = (load(folder, "dense" if kind == "bf16" else kind, dtype) for _ in range(2))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = apply_lora(own, config, batches=None if init == "mica" else some_batches()).train()
    batch = some_batches()[0]
    codes = bits(base)
    assert_same_tensors({n: t for n, t in bits(model).items() if "lora_" not in n}, codes)
    with torch.no_grad():
        found = model.eval()(**batch).logits
        with model.disable_adapter():  # of a base by itself, bitsandbytes repacks the codes for inference
            expected = model(**batch).logits
        # In 8 and 16 bits, outputs are rounded before the product is subtracted.
        most = {"nf4": 512 * EPS, "int8": 0.02, "bf16": 0.02}[kind] if init == "corda" else 0.0
        assert relative_error(found, expected) <= most
    model.train()(**batch).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
