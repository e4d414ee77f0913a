"""DoRA, lora_bias and LoRA-FA beyond the law: what is cached, kept, trained, refused and written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_near, backward, batch_for, randomize, relative_error, snapshot, tiny_gpt2, tiny_llama
from quantized_bases import load, save_base
from shapes_under_test import BY_NAME, DORA, Holder, adapted, exact_weight, plain_layer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_lora import ConfigError, LoraConfig, LoraModel, StateError, TargetError, apply_lora, check_adapter
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge
from hf_lora.adapt.state import require_state
from hf_lora.layers.ops import scale_outputs

EPS = torch.finfo(torch.float32).eps


class Results(TorchDispatchMode):
    """The sizes of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.sizes.append((func.overloadpacket.__name__, result.numel()))
        return result


CHANGES = {
    "a factor": lambda model: model.layer.lora_B["one"].weight.mul_(2),
    "the magnitude": lambda model: model.layer.lora_magnitude_vector["one"].weight.mul_(2),
    "the weight": lambda model: model.layer.weight.mul_(2),
    "a new weight": lambda model: setattr(model.layer, "weight", nn.Parameter(model.layer.weight * 3)),
    "a state dict": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "the dtype": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "training without counting": lambda model: model.train().layer.lora_A["one"].weight.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["linear", "transposed", "embedding", "conv2d"])
def test_what_is_cached_is_computed_again_after_a_change(name: str, change: str) -> None:
    case = BY_NAME[name]
    model: Any = adapted(case, DORA, torch.float32, 1)
    x = case.input()
    with torch.no_grad():
        before = model(x)
        CHANGES[change](model)
        model.eval()
        after = model(x)
        assert relative_error(after, before) > 1e-4
        expected = plain_layer(case, model.layer, exact_weight(case, model))
        assert_near(after, expected(x if name == "embedding" else x.double()), torch.float32, 8)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_what_inference_cached_serves_training(name: str) -> None:
    case = BY_NAME[name]
    model: Any = adapted(case, DORA, torch.float32, 1)
    x = case.input()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(x)
    with torch.inference_mode():
        expected = model(x).clone()
    y = model(x)
    y.sum().backward()
    assert_near(y, expected, torch.float32, 4)
    model.train()(x).sum().backward()


def test_a_forward_forms_no_matrix_of_the_size_of_the_weight() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Linear(64, 96))
    inject(model, LoraConfig(r=2, target_modules=["layer"], use_dora=True, lora_dropout=0.5))
    randomize(model)
    model(torch.randn(3, 64)).sum().backward()  # reads the weight
    x = torch.randn(3, 64, requires_grad=True)
    with Results() as seen:
        model(x).sum().backward()
    assert max(size for _, size in seen.sizes) < 64 * 96


def test_with_dropout_the_weight_multiplies_the_whole_input() -> None:
    """PEFT drops the input of the weight too, at the cost of a second product."""
    model: Any = adapted(BY_NAME["linear"], DORA, torch.float32, 1, lora_dropout=0.5)
    x = BY_NAME["linear"].input()
    with torch.no_grad():
        model.layer.lora_A["one"].weight.zero_()
        assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_outputs_have_the_gradients_of_the_formula(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    change, b = (torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (y, change, b) if bias else (y, change)
    expected = y + change * (y - b) if bias else y + change * y
    assert torch.allclose(scale_outputs(*inputs), expected)
    assert torch.autograd.gradcheck(scale_outputs, inputs)
    assert torch.autograd.gradgradcheck(scale_outputs, inputs)


def test_an_output_whose_weights_are_zero_stays_finite_and_is_trained() -> None:
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    model: Any = Holder(layer)
    inject(model, LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    x = torch.randn(3, 6)
    assert torch.equal(model(x), layer.bias.expand(3, 4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert relative_error(model(x), layer.bias.expand(3, 4)) > 1e-4
    y = model(x)
    merge(model)
    assert_near(model(x), y, torch.float32, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_without(reentrant: bool) -> None:
    model: Any = adapted(BY_NAME["linear"], DORA, torch.float32, 1, lora_dropout=0.3).train()
    x = BY_NAME["linear"].input().requires_grad_()
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(4)
        run(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 3
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


def test_dora_acts_beside_no_other_adapter() -> None:
    model = Holder(nn.Linear(6, 4))
    for name, method in (("dora", "dora"), ("plain", "lora"), ("more", "dora"), ("biased", "lora_bias")):
        inject(model, LoraConfig(r=2, target_modules=["layer"], method=method), name)
    state = require_state(model, "test")
    for names in (("dora", "plain"), ("dora", "more"), ("plain", "biased")):
        with pytest.raises(StateError, match=r"layer: adapters of the methods .* cannot act on one layer together"):
            set_active(model, state, names)


def test_a_vocabulary_does_not_grow_under_the_norms_of_its_columns() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    model = randomize(apply_lora(tiny_llama(), config))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"embed_tokens: the norms of DoRA run over the vocabulary"):
        model.resize_token_embeddings(80)
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model).items())


def test_an_output_layer_grows_with_magnitudes_for_its_new_rows() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, modules_to_save=["embed_tokens"])
    model = randomize(apply_lora(tiny_llama(), config)).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(80)
        after = model(ids).logits
    assert after.shape[-1] == 80
    assert torch.equal(after[..., :64], before)
    assert torch.isfinite(after).all()


def test_grouped_convolutions_and_embeddings_are_refused_by_name() -> None:
    for layer, field, match in (
        (nn.Conv2d(4, 4, 3, groups=2), "use_dora", "crosses its groups"),
        (nn.Embedding(5, 4), "lora_bias", "an embedding has no bias"),
    ):
        model = Holder(layer)
        with pytest.raises(TargetError, match=match):
            inject(model, LoraConfig(r=2, target_modules=["layer"], **{field: True}))  # type: ignore[arg-type]
        assert type(model.layer) is type(layer)


def test_a_check_leaves_out_what_cannot_be_merged() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3, bias=False))
    inject(model, LoraConfig(r=2, target_modules=["0"]), "grouped")
    x = {"input": torch.randn(2, 4, 3, 3)}
    randomize(model)
    assert check_adapter(model, x).ok
    inject(model, LoraConfig(r=2, target_modules=["2"], lora_bias=True), "biased")
    randomize(model)
    assert check_adapter(model, x).ok


def test_a_bias_of_the_base_is_trained_under_dora_too() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    model: Any = Holder(copy.deepcopy(base))
    inject(model, LoraConfig(r=2, target_modules=["layer"], use_dora=True, bias="all"))
    randomize(model)
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    bias = model.layer.lora_bias["default"].weight
    grad = bias.grad.clone()
    weight = torch.zeros(4, 6, dtype=torch.float64)
    with torch.no_grad():
        b = bias.double()
        y = model(x).double()
    assert_near(grad, 2 * y.sum(0), torch.float32, 8)
    merge(model)
    assert weight.shape == base.weight.shape
    assert_near(model(x), y, torch.float32, 8)
    assert_near(model.layer.bias, b, torch.float32, 1)


def kept_by(model: Any, x: Tensor) -> tuple[Tensor, int]:
    """(output, elements that are kept for the backward)."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return y, sum(sizes)


def test_lora_fa_trains_b_alone_and_keeps_no_input() -> None:
    """B gets the gradient that it gets in plain LoRA; of the input, only its dropout and A x are kept."""
    found = {}
    for method in ("lora", "lora_fa"):
        torch.manual_seed(0)
        model: Any = Holder(nn.Linear(64, 32))
        inject(model, LoraConfig(r=2, target_modules=["layer"], method=method, lora_dropout=0.25))
        randomize(model)
        x = torch.randn(10, 64)
        x.requires_grad_()
        torch.manual_seed(1)
        y, kept = kept_by(model, x)
        y.square().sum().backward()
        found[method] = y.detach(), model.layer.lora_B["default"].weight.grad, x.grad, kept
        assert (model.layer.lora_A["default"].weight.grad is None) == (method == "lora_fa")
    for plain, own in zip(found["lora"][:3], found["lora_fa"][:3], strict=True):
        assert torch.equal(plain, own)
    assert found["lora"][3] - found["lora_fa"][3] == 10 * 64


def test_a_file_of_lora_fa_is_plain_lora_and_goes_on_as_lora_fa(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], method="lora_fa")
    model = randomize(apply_lora(tiny_llama(), config)).eval()
    model.save_pretrained(tmp_path)
    batch = batch_for(model)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama(), is_trainable=True)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert_near(theirs(**batch).logits, model(**batch).logits, torch.float32, 16)
    assert again.lora_configs["default"].method == "lora_fa"
    assert set(backward(again, batch)) == set(backward(model, batch))
    assert all("lora_B" in name for name in backward(model, batch))


@pytest.mark.parametrize("method", ["dora", "lora_bias", "lora_fa"])
def test_layers_computed_together_give_the_same(method: str) -> None:
    from hf_lora import share_inputs

    model = randomize(apply_lora(tiny_llama(attention_bias=True), LoraConfig(r=2, method=method))).train()
    batch = batch_for(model)
    expected = backward(model, batch)
    share_inputs(model, **batch)
    found = backward(model, batch)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[n], g) < 64 * EPS for n, g in expected.items())


@pytest.mark.parametrize("field", ["use_dora", "use_rslora"])
def test_merging_with_weight_one_changes_nothing(field: str, tmp_path: Path) -> None:
    base = tiny_llama(attention_bias=True)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **{field: True})  # type: ignore[arg-type]
    model = randomize(apply_lora(copy.deepcopy(base), config)).eval()
    model.save_pretrained(tmp_path)
    batch = batch_for(model)

    def merged(weight: float) -> Any:
        return LoraModel.from_pretrained([tmp_path], base_model=copy.deepcopy(base), merge=True, weights=[weight])

    with torch.no_grad():
        assert_near(merged(1.0)(**batch).logits, model(**batch).logits, torch.float32, 16)
    if field == "use_dora":
        with pytest.raises(ConfigError, match=r"norms \(.*q_proj.*\), so its weight must be 1"):
            merged(0.5)


def test_the_bias_of_a_factor_is_merged_with_its_scaling_into_a_quantized_base(tmp_path: Path) -> None:
    folder = save_base(tmp_path, attention_bias=True)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], lora_bias=True)
    model = randomize(apply_lora(load(folder, "nf4", torch.float32), config)).eval()
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        biases = [layer.bias.clone() for layer in (model.model.layers[0].self_attn.q_proj,)]
        added = 3 * model.model.layers[0].self_attn.q_proj.lora_B_bias["default"].weight
        merged = model.merge_and_unload()
        assert_near(merged(**batch).logits, expected, torch.float32, 32)
        assert_near(merged.model.layers[0].self_attn.q_proj.bias, biases[0] + added, torch.float32, 1)


def test_dora_of_a_transposed_layer_is_merged_by_files(tmp_path: Path) -> None:
    from hf_lora import merge_files

    tiny_gpt2().save_pretrained(tmp_path / "base")
    base: Any = type(tiny_gpt2())
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True)
    model = randomize(apply_lora(base.from_pretrained(tmp_path / "base"), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = base.from_pretrained(tmp_path / "merged").eval()
    batch = batch_for(model)
    with torch.no_grad():
        assert_near(merged(**batch).logits, model(**batch).logits, torch.float32, 32)
    by_memory = model.merge_and_unload().state_dict()
    assert all(torch.equal(t, by_memory[n]) for n, t in merged.state_dict().items())
