"""`lora_grouped`: the update of a grouped convolution stays in its groups, folds, and is PEFT's in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import assert_near, assert_same_tensors, randomize, snapshot
from safetensors.torch import load_file, save_file
from shapes_under_test import Holder
from torch import Tensor, nn

from hf_lora import AdapterFileError, LoraConfig, LoraModel, TargetError, apply_lora, inspect_adapter, merge_files
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge, unmerge
from hf_lora.files.format import WEIGHTS_NAME
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter

LAYERS: dict[str, Any] = {
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1, groups=2), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 2), stride=2, groups=4, bias=False), (2, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, groups=2), (2, 8, 9, 9)),
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", groups=2), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 5, padding="same", groups=4), (2, 4, 9)),
    "plain": (lambda: nn.Conv2d(8, 12, 3), (2, 8, 6, 6)),
    "linear": (lambda: nn.Linear(8, 12), (2, 8)),
}
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], method="lora_grouped")


def base(name: str) -> Holder:
    torch.manual_seed(4)
    return Holder(LAYERS[name][0]()).eval()


def adapted(name: str) -> Any:
    model = base(name)
    inject(model, CONFIG)
    return randomize(model)


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Tensor]:
    return request.param, adapted(request.param), torch.randn(LAYERS[request.param][1])


def test_the_output_is_that_of_the_folded_weight(case: tuple[str, Any, Tensor]) -> None:
    """Against the plain layer in float64, whose weight is folded group by group by hand."""
    name, model, x = case
    layer, plain = model.layer, base(name).double()
    a, b = (getattr(layer, kind)["default"].weight.detach().double() for kind in ("lora_A", "lora_B"))
    groups = getattr(layer, "groups", 1)
    parts = zip(a.flatten(1).chunk(groups), b.flatten(1).chunk(groups), strict=True)
    delta = torch.cat([up @ down for down, up in parts]).view(layer.weight.shape)
    plain.layer.weight.data += 1.5 * delta
    x.requires_grad_()
    y = model(x)
    assert_near(y, plain(x.double()), torch.float32, 8)
    before = snapshot(model)
    merge(model)
    assert_near(layer.weight, plain.layer.weight, torch.float32, 1)
    assert_near(model(x), y, torch.float32, 8)
    unmerge(model)
    assert_same_tensors(snapshot(model), before)


def test_peft_computes_the_same_from_the_file_and_back(case: tuple[str, Any, Tensor], tmp_path: Path) -> None:
    name, model, x = case
    if name in ("dilated", "reflect"):
        pytest.skip("PEFT's A has neither the dilation nor the padding mode of the layer")
    save_adapter(model, tmp_path, "default")
    read: Any = peft.PeftModel.from_pretrained(base(name), tmp_path, is_trainable=True)  # type: ignore[arg-type]
    y = model(x)
    assert_near(read(x), y, torch.float32, 8)
    for each in (model, read):
        each(x).square().sum().backward()
    spec = model.layer._lora.adapters["default"].specs["lora_A"]
    ours, theirs = model.layer.lora_A["default"].weight.grad, read.base_model.model.layer.lora_A["default"].weight.grad
    if ours.shape == theirs.shape:
        assert_near(ours, theirs, torch.float32, 16)
    else:  # the others are zero here, and not in PEFT, which would train them
        blocks = [part.chunk(model.layer.groups, 1)[i] for i, part in enumerate(theirs.chunk(model.layer.groups))]
        assert_near(ours, torch.cat(blocks), torch.float32, 16)
        assert spec.to_disk(ours).shape == theirs.shape
    again = base(name)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), y)
    assert inspect_adapter(tmp_path).config.method == "lora_grouped"
    merged = base(name)
    load_adapter(merged, tmp_path)
    merge(merged)
    assert_near(merged(x), y, torch.float32, 8)


def test_a_file_that_crosses_the_groups_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = adapted("conv1d")
    save_adapter(model, tmp_path, "default")
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] += 1.0
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    other = base("conv1d")
    before = snapshot(other)
    with pytest.raises(AdapterFileError, match=r"Remove hf_lora\.json to load the adapter as plain LoRA"):
        load_adapter(other, tmp_path)
    assert_same_tensors(snapshot(other), before)
    (tmp_path / "hf_lora.json").unlink()
    load_adapter(other, tmp_path)
    assert torch.equal(other.layer.lora_A["default"].weight, tensors[key])  # type: ignore[index]


def test_ranks_are_divided_by_the_groups() -> None:
    with pytest.raises(TargetError, match="its rank 6 must be divisible by the convolution's 4 groups"):
        inject(base("conv2d"), LoraConfig(r=6, target_modules=["layer"], method="lora_grouped"))


def test_depthwise_layers_of_a_model_are_merged_in_memory_and_by_files(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, num_labels=3
    )
    torch.manual_seed(0)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "base")
    load = transformers.ConvNextForImageClassification.from_pretrained
    model: Any = apply_lora(
        load(tmp_path / "base"),
        LoraConfig(r=16, target_modules=["dwconv"], method="lora_grouped", modules_to_save=[]),
    )
    randomize(model).eval().save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels).logits
        again = LoraModel.from_pretrained(tmp_path / "adapter", base_model=load(tmp_path / "base"))
        assert torch.equal(again(pixels).logits, expected)
        by_files = load(tmp_path / "merged")
        merged = model.merge_and_unload()
        assert_same_tensors(dict(by_files.state_dict()), dict(merged.state_dict()))
        assert_near(merged(pixels).logits, expected, torch.float32, 32)
