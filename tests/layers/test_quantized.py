"""The law over quantized layers: own forward plus update equals a plain layer with the folded weight."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    VOCABULARY,
    assert_near,
    assert_same_tensors,
    folded,
    randomize,
    relative_error,
    tiny_llama,
    token_ids,
)
from quantized_bases import QUANTIZED, bits, load, method, save_base
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lora import LoraConfig, MergeError, TargetError, apply_lora
from hf_lora.adapt.dequantize import quantized_layers
from hf_lora.adapt.walk import adapter_layers
from hf_lora.layers.storages import quantization_of, storage_of, unshardable

KINDS = ["dense", *QUANTIZED]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def adapted(base: Path, kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return randomize(apply_lora(load(base, kind, dtype), LoraConfig(r=4, **config)), scale=0.1)


def folded_weight(layer: Any, names: tuple[str, ...] = ("default",)) -> Tensor:
    return torch.cat([block for _, block in folded(layer, names)])


def read_whole(layer: nn.Module) -> Tensor:
    storage: Any = storage_of(layer)
    return storage.read(layer, slice(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "method"), [*((kind, "lora") for kind in KINDS), ("nf4", "dora"), ("int8", "dora")])
def test_the_output_is_that_of_a_plain_layer_with_the_folded_weight(
    base: Path, kind: str, method: str, dtype: torch.dtype
) -> None:
    """LLM.int8 multiplies by the dequantized weight in training; outside it rounds the activations too."""
    model = adapted(base, kind, dtype, method=method).train()
    layers = adapter_layers(model)
    assert len(layers) == 14
    assert all(layer._lora.storage.quantized == (kind != "dense") for layer in layers.values())
    for layer in layers.values():
        any_layer: Any = layer
        x = torch.randn(2, 5, any_layer.in_features).to(dtype)
        with torch.no_grad():
            base_part, update = layer.product(x).double(), layer(x).double()
        wanted = F.linear(x.double(), folded_weight(layer))
        # Base product, update and their sum are each rounded; the backend may round the scaled weight as well.
        error = (update - wanted).norm() / torch.maximum(base_part.norm(), wanted.norm())
        assert error <= 8 * torch.finfo(dtype).eps


def test_int8_differs_outside_training_by_the_rounding_of_its_activations_alone(base: Path) -> None:
    model = adapted(base, "int8").eval()
    for layer in adapter_layers(model).values():
        any_layer: Any = layer
        x = torch.randn(8, any_layer.in_features)
        with torch.no_grad():
            found = layer(x)
        half = x.half().float()
        step = half.abs().amax(1, keepdim=True) / 127
        rounded = (half / step).round() * step
        weight, whole = read_whole(layer).double(), folded_weight(layer)
        wanted = F.linear(rounded.double(), weight) + F.linear(x.double(), whole - weight)
        # At most one value of a row lies so near the middle of two steps that it goes the other way.
        one_step = step[:, 0].double() * weight.norm(dim=0).max()
        assert ((found - wanted).norm(dim=1) <= one_step).all()
        assert (found - F.linear(x.double(), whole)).norm() > 1.5 * (found - wanted).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_and_unloading_restores_all(base: Path, kind: str) -> None:
    model = load(base, kind).train()
    ids, before = token_ids(), bits(model)
    classes = [type(m) for m in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        apply_lora(model, LoraConfig(r=4))
        assert torch.equal(model(input_ids=ids).logits, plain)
        randomize(model)
        assert relative_error(model(input_ids=ids).logits, plain) > 0.01
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)
        model.unload()
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert_same_tensors(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == required


@pytest.mark.parametrize("kind", KINDS)
def test_merging_for_a_while_restores_every_bit_or_is_refused_and_changes_none(base: Path, kind: str) -> None:
    model = adapted(base, kind)
    before, layer = bits(model), model.model.layers[0].mlp.up_proj
    if kind == "dense":
        model.merge_adapter()
        assert relative_error(layer.weight, before["model.layers.0.mlp.up_proj.weight"]) > 0.01
        model.unmerge_adapter()
    else:
        with pytest.raises(MergeError, match="merge_and_unload") as error:
            model.merge_adapter()
        assert str(error.value).count("its weight is quantized") == 14
        with pytest.raises(MergeError, match="quantized"):
            layer._lora.storage.write(layer, slice(0, 2), torch.zeros(2, layer.in_features))
    assert_same_tensors(bits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_layer_in_float64(base: Path, kind: str) -> None:
    layer: Any = adapted(base, kind).train().model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 7, layer.in_features, requires_grad=True)
    g = torch.randn(3, 7, layer.out_features)
    layer(x).backward(g)
    a64, b64, x64 = (t.detach().double().requires_grad_() for t in (a, b, x))
    weight = read_whole(layer).double()
    scaling = layer._lora.adapters["default"].scaling
    F.linear(x64, weight + scaling * (b64 @ a64)).backward(g.double())
    for found, wanted in ((a, a64), (b, b64), (x, x64)):
        assert_near(found.grad, wanted.grad, torch.float32, factor=16)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_are_those_of_the_whole_and_nothing_large_is_made(kind: str) -> None:
    layer = make_layer(kind, 256, 512)
    storage: Any = storage_of(layer)
    whole = reference(layer, kind)
    assert torch.equal(storage.read(layer, slice(None)), whole)
    for rows in (slice(0, 1), slice(1, 5), slice(37, 64), slice(250, 256)):
        assert torch.equal(storage.read(layer, rows), whole[rows])
        into = torch.empty(rows.stop - rows.start, 512, dtype=torch.float64)
        assert storage.read(layer, rows, into) is into
        assert torch.equal(into, whole[rows].double())
    with Largest() as largest:
        storage.read(layer, slice(100, 104))
    assert 0 < largest.elements <= 4 * 512 + 2 * 64 * 2, "a block at a time, and the ends of its first and last scale"


@pytest.mark.parametrize("shape", [(33, 50), (7, 10), (16, 96)])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_scales_that_cross_rows_are_followed(kind: str, shape: tuple[int, int]) -> None:
    """The reference is the definition: a table of 16 values, times the scale of 64 values in a row."""
    layer = make_layer(kind, *shape)
    import bitsandbytes.functional as B

    state, packed = layer.weight.quant_state, layer.weight.data.reshape(-1)
    scales = state.absmax
    if state.nested:
        scales = B.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: shape[0] * shape[1]]
    wanted = (state.code[codes.long()] * scales.repeat_interleave(64)[: len(codes)]).view(shape)
    storage: Any = storage_of(layer)
    assert torch.equal(storage.read(layer, slice(None)), wanted)
    assert torch.equal(storage.read(layer, slice(3, 5)), wanted[3:5])


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_training_goes_on_after_an_evaluation(base: Path, kind: str) -> None:
    """On CPUs with AVX512-BF16 an evaluation puts 4-bit weights into a form that passes no gradient."""
    evaluated = load(base, kind).eval()
    ids = token_ids()
    with torch.no_grad():
        evaluated(input_ids=ids)
    repacked = getattr(evaluated.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False)
    packed = {n: read_whole(m) for n, (m, _) in quantized_layers(evaluated).items()}
    fresh = load(base, kind)
    for name, (layer, _) in quantized_layers(fresh).items():
        # the scales are rounded to bfloat16 by it
        assert relative_error(packed[name], read_whole(layer)) < torch.finfo(torch.bfloat16).eps
    for model in (evaluated, fresh):
        randomize(apply_lora(model, LoraConfig(r=4)))
        for _ in range(2):
            model.train()
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(g is not None and float(g.abs().sum()) > 0 for g in gradients)
            with torch.no_grad():
                model.eval()(input_ids=ids)
        plain = model.unload()
        assert plain.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu == repacked


def test_autocast_leaves_the_base_product_what_it_was(base: Path) -> None:
    model = load(base, "nf4").train()
    ids = token_ids()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(input_ids=ids).logits
        apply_lora(model, LoraConfig(r=4))
        found = model(input_ids=ids).logits
    assert torch.equal(found, plain)
    assert found.dtype == plain.dtype


class PackedLinear(nn.Module):
    """What GPTQ's and AWQ's layers look like from outside: sizes, packed integers, scales and a forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1) / 7
        codes = (layer.weight.detach() / scales[:, None]).round().to(torch.int32) + 8
        self.register_buffer("qweight", codes[:, ::2] * 16 + codes[:, 1::2])
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def dense(self) -> Tensor:
        packed: Any = self.qweight
        codes = torch.stack([packed // 16, packed % 16], 2).flatten(1) - 8
        return codes * self.scales[:, None]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


def with_packed_layers() -> Any:
    model = tiny_llama()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child))
    return model


def test_a_quantized_layer_of_another_kind_trains_and_is_refused_at_merge_by_name(tmp_path: Path) -> None:
    model, ids = with_packed_layers(), token_ids()
    plain = model(input_ids=ids).logits
    apply_lora(model, LoraConfig(r=4))
    assert len(adapter_layers(model)) == 14
    assert torch.equal(model(input_ids=ids).logits, plain)
    randomize(model)
    dense = randomize(apply_lora(tiny_llama(), LoraConfig(r=4)))
    with torch.no_grad():
        for name, layer in adapter_layers(dense).items():
            packed: Any = model.get_submodule(name)
            layer.weight.copy_(packed.dense())  # type: ignore[union-attr,operator]
    found, wanted = model(input_ids=ids, labels=ids), dense(input_ids=ids, labels=ids)
    assert_near(found.logits, wanted.logits, torch.float32, factor=64)
    found.loss.backward()
    wanted.loss.backward()
    gradients = {n: p.grad for n, p in dense.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, gradients[name]) < 1e-4, name
    before = bits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj: .*PackedLinear.*unknown format") as error:
            call()
        assert str(error.value).count("PackedLinear is a quantized layer") == 14
    assert_same_tensors(bits(model), before)
    model.save_pretrained(tmp_path)
    dense.load_adapter(tmp_path, "packed", allow_other_base=True)
    assert_near(dense(input_ids=ids).logits, found.logits, torch.float32, factor=64)
    model.unload()
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert all(type(m).__name__ == "PackedLinear" for n, m in model.named_modules() if n.endswith("proj"))


def test_masks_and_integers_beside_a_dense_weight_are_no_quantization() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask, self.bias)  # type: ignore[operator]

    assert quantization_of(Masked()) is None
    assert quantization_of(nn.Linear(4, 4)) is None
    assert quantization_of(nn.Embedding(4, 4)) is None
    with pytest.raises(TargetError, match="Masked is not a supported kind of layer"):
        apply_lora(nn.Sequential(Masked()), LoraConfig(r=1, target_modules=["0"]))


def test_torchao_weights_with_quantized_activations_are_refused_with_the_reason() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TargetError, match="activations are quantized as well, and no gradient passes"):
        apply_lora(model, LoraConfig(r=1, target_modules=["0"]))


def test_a_quantized_module_is_not_trained_whole(base: Path) -> None:
    model = load(base, "nf4")
    before = bits(model)
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.up_proj would be trained whole.*is quantized"):
        apply_lora(model, LoraConfig(r=2, modules_to_save=["up_proj"]))
    assert_same_tensors(bits(model), before)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (64, 320)], ids=str)
def test_values_of_a_weight_that_an_evaluation_repacked(shape: tuple[int, int], quant_type: str, nested: bool) -> None:
    """Repacking rounds the scales to bfloat16 and quantizes nested ones again; nothing else may change."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=quant_type, compress_statistics=nested)
    layer = layer.to("cpu").eval()
    layer.weight = layer.weight.to("cpu")
    before = read_whole(layer)
    with torch.no_grad():
        layer(torch.randn(3, shape[1]))
    assert layer.weight.quant_state.packing_format_for_cpu
    model: Any = apply_lora(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    assert not model[0].weight.quant_state.packing_format_for_cpu
    assert relative_error(read_whole(model[0]), before) < torch.finfo(torch.bfloat16).eps
    x = torch.randn(5, shape[1])
    assert relative_error(model[0](x), F.linear(x, before)) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_new_head_that_was_never_quantized_is_refused_with_the_way_out(tmp_path: Path, kind: str) -> None:
    """transformers puts quantized layers in the place of a head, and no quantized weights in them: none can run."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    ).save_pretrained(tmp_path)
    model = load(tmp_path, kind, cls=BertForSequenceClassification)
    with pytest.raises((AssertionError, AttributeError)):  # what there would be without the refusal
        model(input_ids=token_ids())
    for saved, pooler in ((None, "bert.pooler"), (["classifier"], "bert.pooler.dense"), ([], "bert.pooler.dense")):
        with pytest.raises(TargetError) as caught:
            apply_lora(model, LoraConfig(r=2, modules_to_save=saved))
        named = re.search(r"llm_int8_skip_modules.*: (\[.*\])\)", str(caught.value))
        assert named
        assert sorted(ast.literal_eval(named[1])) == [pooler, "classifier"]
        skip = {"llm_int8_skip_modules": ast.literal_eval(named[1])}
        fine = apply_lora(load(tmp_path, kind, cls=BertForSequenceClassification, **skip), LoraConfig(r=2)).train()
        fine(input_ids=token_ids(), labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad is not None for n, p in fine.named_parameters() if "classifier" in n and p.requires_grad)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_an_adapted_model_can_be_copied(base: Path, kind: str) -> None:
    model = adapted(base, kind).train()
    twin, ids = copy.deepcopy(model), token_ids()
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_cannot_be_sharded_is_named(base: Path) -> None:
    integers = unshardable(adapted(base, "nf4"))
    assert len(integers) == 14
    assert "model.layers.0.mlp.up_proj.weight" in integers
    floats = load(base, "nf4", torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
    assert unshardable(apply_lora(floats, LoraConfig(r=2))) == []
    assert unshardable(adapted(base, "dense")) == []
    assert len(unshardable(load(base, "int8"))) == 14


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_codes_stored_as_bfloat16_are_read_alike(base: Path, kind: str) -> None:
    bytes_, floats = load(base, kind), load(base, kind, bnb_4bit_quant_storage=torch.bfloat16)
    for (_, (a, _)), (_, (b, storage)) in zip(
        quantized_layers(bytes_).items(), quantized_layers(floats).items(), strict=True
    ):
        assert b.weight.dtype == torch.bfloat16
        assert torch.equal(read_whole(a), read_whole(b))
        assert torch.equal(storage.read(b, slice(3, 9)), read_whole(a)[3:9])


def make_layer(kind: str, outputs: int, inputs: int) -> Any:
    config, weight = method(kind), torch.randn(outputs, inputs)
    if kind.startswith("torchao"):
        from torchao.quantization import quantize_

        model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
        model[0].weight.data = weight
        quantize_(model, config.quant_type)
        return model[0]
    import bitsandbytes.nn as N

    if kind == "int8":
        layer = N.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    else:
        layer = N.Linear4bit(
            inputs, outputs, bias=False, quant_type=config.bnb_4bit_quant_type,
            compress_statistics=config.bnb_4bit_use_double_quant,
        )  # fmt: skip
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def reference(layer: Any, kind: str) -> Tensor:
    """The whole weight by the backend's own function."""
    if kind.startswith("torchao"):
        return layer.weight.dequantize()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if kind == "int8":  # the backend's function multiplies by a rounded 1/127, its forward by the exact one
        return layer.weight.data.float() * (layer.weight.SCB * (1 / 127)).unsqueeze(1)
    return dequantize_bnb_weight(layer.weight)


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and result.is_floating_point():
            given = {a.untyped_storage().data_ptr() for a in args if type(a) is Tensor}
            if type(result) is Tensor and result.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, result.numel())
        return result
