"""The same laws on a CPU and, with `-m gpu`, on a CUDA device; the reference is always computed on the CPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_near,
    assert_same_tensors,
    backward,
    batch_for,
    randomize,
    relative_error,
    snapshot,
    tiny_bert,
    tiny_llama,
    token_ids,
)
from torch import nn
from torch.utils import backend_registration

from hf_lora import LoraConfig, LoraModel, apply_lora, share_inputs

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
DTYPES = [torch.float32, torch.bfloat16]


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny language model with random factors, on the CPU; its weights are numbers of bfloat16."""
    model = tiny_llama().to(torch.bfloat16).to(dtype)
    return randomize(apply_lora(model, LoraConfig(r=4, **config)))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_outputs_and_gradients_are_those_of_a_merged_float64_model(
    device: str, dtype: torch.dtype, method: str
) -> None:
    batch = batch_for(tiny_llama())
    exact, model = adapted(method=method).double(), adapted(dtype, method=method).to(device)
    merged = copy.deepcopy(exact).merge_and_unload()
    with torch.no_grad():
        expected = merged(**batch).logits
        found = model(**on(device, batch)).logits
    assert found.device.type == device
    assert_near(found.cpu(), expected, dtype, 32)
    expected_gradients, gradients = backward(exact, batch), backward(model, on(device, batch))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient.device.type, gradient.dtype) == (device, torch.float32)
        assert_near(gradient.cpu(), expected_gradients[name], dtype, 64)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_gives_the_same_bits_and_unmerging_restores_them(device: str, dtype: torch.dtype) -> None:
    model, reference = adapted(dtype).to(device), adapted(dtype)
    before = snapshot(model)
    model.merge_adapter()
    reference.merge_adapter()
    cpu = {name: tensor.cpu() for name, tensor in snapshot(model).items()}
    for name, tensor in snapshot(reference).items():
        # The sums of float64 may differ in their last bit, and then, rarely, in their rounding.
        assert (cpu[name] != tensor).double().mean() < 1e-2, name
        assert relative_error(cpu[name], tensor) < torch.finfo(dtype).eps / 8, name
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), before)


@on_each_device
@pytest.mark.parametrize("p", [0.25, 0.75])
def test_dropout_drops_its_share_and_gradients_have_the_same_mask(device: str, p: float) -> None:
    """With A, B the identity and W zero, the output is the input after dropout, and so is the gradient of a sum.

    On a CPU too, masks for more than a half are drawn as they are on other devices, from a seed.
    """
    size = 64
    layer = nn.Sequential(nn.Linear(size, size, bias=False))
    apply_lora(layer, LoraConfig(r=size, lora_alpha=size, lora_dropout=p, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.eye(size) if "lora_" in name else torch.zeros(size, size))
    layer.to(device).train()
    x = torch.ones(256, size, device=device, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    share, deviation = float((y == 0).double().mean()), (p * (1 - p) / y.numel()) ** 0.5
    assert abs(share - p) < 6 * deviation
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


@on_each_device
def test_shared_inputs_and_checkpointing_change_no_gradient(device: str) -> None:
    batch = on(device, batch_for(tiny_llama()))
    plain, shared = (adapted(lora_dropout=0.1).to(device).train() for _ in range(2))
    assert share_inputs(shared, **batch)
    torch.manual_seed(0)
    expected = backward(shared, batch)
    shared.gradient_checkpointing_enable()
    torch.manual_seed(0)
    again = backward(shared, batch)
    for name, gradient in again.items():
        assert_near(gradient, expected[name], torch.float32, 512)
    expected, found = backward(plain.eval(), batch), backward(shared.eval(), batch)
    for name, gradient in found.items():
        assert_near(gradient, expected[name], torch.float32, 512)


@on_each_device
def test_autocast_computes_in_bfloat16_and_leaves_float32_gradients(device: str) -> None:
    batch, model = batch_for(tiny_llama()), adapted()
    expected = backward(model, batch)
    model.to(device)
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        output = model(**on(device, batch))
        assert model.model.layers[0].mlp.up_proj(torch.ones(1, 32, device=device)).dtype == torch.bfloat16
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert_near(parameter.grad.cpu(), expected[name], torch.bfloat16, 64)


@on_each_device
def test_files_are_the_same_from_every_device_and_load_onto_every_device(device: str, tmp_path: Path) -> None:
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = randomize(apply_lora(type(base).from_pretrained(tmp_path / "base"), LoraConfig(r=2, task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "cpu")
    model.to(device).save_pretrained(tmp_path / "device")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "device" / name).read_bytes()
    loaded = LoraModel.from_pretrained(tmp_path / "cpu", device_map=device)
    assert {parameter.device.type for parameter in loaded.parameters()} == {device}
    moved = LoraModel.from_pretrained(tmp_path / "device").to(device)
    batch = on(device, batch_for(model, labels=False))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        assert torch.equal(moved(**batch).logits, expected)
        merged = LoraModel.from_pretrained(tmp_path / "cpu", device_map=device, merge=True)
        assert relative_error(merged(**batch).logits, expected) < 1e-5


@on_each_device
def test_an_adapter_is_added_to_and_switched_on_a_model_that_is_there(device: str) -> None:
    model = apply_lora(tiny_llama().to(device), LoraConfig(r=2))
    model.add_adapter("second", LoraConfig(r=4, lora_dropout=0.1, use_dora=True))
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    ids = token_ids().to(device)
    with torch.no_grad():
        plain = model.eval()(input_ids=ids).logits
        randomize(model)
        assert not torch.equal(model(input_ids=ids).logits, plain)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written.device.type == device


@on_each_device
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base(device: str, kind: str, tmp_path: Path) -> None:
    from quantized_bases import available, method, save_base
    from transformers import LlamaForCausalLM

    available(kind)
    base = save_base(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(
        base, quantization_config=method(kind), dtype=torch.float32, device_map=device
    )
    apply_lora(model, LoraConfig(r=4))
    batch = on(device, batch_for(model))
    gradients = backward(randomize(model), batch)
    assert all(g.device.type == device and g.isfinite().all() and g.any() for g in gradients.values())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        dense = model.merge_and_unload()
        found = dense(**batch).logits
    assert {p.device.type for p in dense.parameters()} == {device}
    # int8 also rounds what it is given, to one place of 127 of each row's largest value.
    assert relative_error(found, expected) < (0.1 if kind == "int8" else 1e-3)


@pytest.mark.slow
def test_a_step_on_an_accelerator_that_holds_no_data_mixes_no_devices() -> None:
    """Fake tensors of a device that is not the CPU: an operation on tensors of two devices is an error."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot register a device in Python")
    worker = Path(__file__).with_name("fake_device_worker.py")
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("on gpux") == 6
