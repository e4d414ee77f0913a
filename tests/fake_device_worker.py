"""Run by test_devices.py in a process of its own, which a registered device cannot leave: steps on fake tensors.

They have shapes, dtypes and a device, but no data. Dropout and rows of tokens are left out, because a generator and
`torch.tensor` need a real device.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from helpers import batch_for, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hf_lora import LoraConfig, apply_lora, share_inputs

DEVICE = "gpux"
CASES: list[tuple[str, Any, dict[str, Any], bool]] = [
    ("plain", tiny_llama, {}, False),
    ("shared inputs", tiny_llama, {}, True),
    ("DoRA", tiny_llama, {"use_dora": True}, False),
    ("embeddings", tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    ("biases and a head", tiny_bert, {"bias": "all", "task_type": "SEQ_CLS"}, False),
    ("transposed layers", tiny_gpt2, {"method": "lora_fa"}, False),
]


def moved(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with _disable_current_modes():
        shape = torch.empty_like(tensor.detach(), device="meta")
    return FakeTensor(mode, shape, torch.device(DEVICE, 0))


def step(make: Any, config: dict[str, Any], share: bool) -> None:
    model = apply_lora(make(), LoraConfig(r=4, **config))
    model.config.use_cache = False
    batch = batch_for(model)
    if share:
        assert share_inputs(model, **batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(moved(value, mode), value.requires_grad)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = moved(value, mode)
        loss = model(**{name: moved(value, mode) for name, value in batch.items()}).loss
        loss.backward()
    assert loss.device.type == DEVICE
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad.device.type, parameter.grad.dtype) == (DEVICE, torch.float32), name


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]
    for case, make, config, share in CASES:
        step(make, config, share)
        print(f"{case}: on {DEVICE}", flush=True)
    os._exit(0)  # PyTorch's thread for the registered device may abort an ordinary end
