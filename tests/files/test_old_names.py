"""Adapters with the names of modules of an older transformers load as transformers' own rules rename them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import randomize, token_ids
from round_trip import output, skip_unless_peft_converts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from hf_lora import AdapterFileError, LoraModel, merge_files
from hf_lora.files.format import CONFIG_NAME, WEIGHTS_NAME
from hf_lora.files.keys import PREFIX

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
EYES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
CONFIGS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config={"model_type": "llama", **SIZES}, vision_config={"model_type": "clip_vision_model", **EYES},
            image_token_id=60,
        ),
    ),
    "qwen2_vl": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig(
            text_config={**SIZES, "rope_parameters": ROPE, "bos_token_id": 1, "eos_token_id": 2},
            vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=8),
            image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        ),
    ),
    "paligemma": (
        PaliGemmaForConditionalGeneration,
        PaliGemmaConfig(
            text_config={"model_type": "gemma", "head_dim": 8, **SIZES},
            vision_config={"model_type": "siglip_vision_model", **EYES}, projection_dim=32, image_token_id=60,
        ),
    ),
    "clip": (
        CLIPTextModel,
        CLIPTextConfig(max_position_embeddings=16, bos_token_id=1, eos_token_id=2, **SIZES),
    ),
}  # fmt: skip
OLD = {
    "llava": [
        (r"^model\.language_model", "language_model.model"), (r"^model\.vision_tower", "vision_tower.vision_model"),
        (r"^model\.(multi_modal_projector)", r"\1"), (r"^lm_head", "language_model.lm_head"),
    ],
    "qwen2_vl": [(r"^model\.language_model", "model"), (r"^model\.visual", "visual")],
    "paligemma": [
        (r"^model\.language_model", "language_model.model"), (r"^model\.vision_tower", "vision_tower.vision_model")
    ],
    "clip": [(r"^(encoder|embeddings|final_layer_norm)", r"text_model.\1")],
}  # fmt: skip
"""Present names -> those of transformers 4."""

SAVED = {"llava": ["multi_modal_projector"], "clip": ["final_layer_norm"], "qwen2_vl": ["lm_head"]}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    cls, config = CONFIGS[name]
    return cls(copy.deepcopy(config)).eval()


def old_name(name: str, module: str) -> str:
    for pattern, former in OLD[name]:
        if re.search(pattern, module):
            return re.sub(pattern, former, module)
    return module


def saved_with_old_names(name: str, base: Any, folder: Path, **config: Any) -> Tensor:
    """An adapter of PEFT whose file is as transformers 4 would have named it; what its model computes."""
    settings = {"target_modules": ["q_proj", "v_proj", "qkv"], "modules_to_save": SAVED.get(name), **config}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    theirs.eval().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    renamed = {f"{PREFIX}{old_name(name, key.removeprefix(PREFIX))}": tensor for key, tensor in tensors.items()}
    assert len(renamed.keys() & tensors.keys()) < len(tensors)
    save_file(renamed, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return output(theirs, {"input_ids": token_ids()})


@pytest.mark.parametrize("name", CONFIGS)
def test_old_names_are_renamed_as_transformers_does(name: str, tmp_path: Path) -> None:
    base = model_of(name)
    expected = saved_with_old_names(name, base, tmp_path)
    model = LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))
    assert torch.equal(output(model, {"input_ids": token_ids()}), expected)
    randomize(model)
    model.load_adapter_weights(tmp_path)
    assert torch.equal(output(model, {"input_ids": token_ids()}), expected)
    model.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(tmp_path / "again", base_model=copy.deepcopy(base))
    assert torch.equal(output(again, {"input_ids": token_ids()}), expected)


def test_whole_names_in_a_configuration_are_renamed(tmp_path: Path) -> None:
    base = model_of("llava")
    expected = saved_with_old_names("llava", base, tmp_path, modules_to_save=["lm_head"])
    layers = [path for path, _ in base.named_modules() if path.endswith(("q_proj", "v_proj"))]
    old = [old_name("llava", path) for path in layers]
    file = tmp_path / CONFIG_NAME
    values = json.loads(file.read_text()) | {"target_modules": old, "modules_to_save": ["language_model.lm_head"]}
    values |= {"r": 16, "lora_alpha": 1, "rank_pattern": dict.fromkeys(old, 4), "alpha_pattern": dict.fromkeys(old, 8)}
    file.write_text(json.dumps(values))
    model = LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))
    assert torch.equal(output(model, {"input_ids": token_ids()}), expected)


def test_a_merge_from_file_to_file_renames_too(tmp_path: Path) -> None:
    base = model_of("llava")
    base.save_pretrained(tmp_path / "base")
    expected = saved_with_old_names("llava", base, tmp_path / "adapter", task_type="CAUSAL_LM")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = output(type(base).from_pretrained(tmp_path / "out"), {"input_ids": token_ids()})
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_experts_that_were_layers_are_refused_by_that_name(tmp_path: Path) -> None:
    """The next step in the error is PEFT, which converts them."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(num_local_experts=2, initializer_range=0.2, **SIZES)).eval()
    sizes = {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}
    layers = {f"block_sparse_moe.experts.{expert}.{name}": size for expert in (0, 1) for name, size in sizes.items()}
    tensors = {}
    for layer in range(2):
        for name, (inner, outer) in (layers | {"self_attn.q_proj": (32, 32)}).items():
            key = f"{PREFIX}model.layers.{layer}.{name}"
            tensors |= {f"{key}.lora_A.weight": torch.randn(4, inner), f"{key}.lora_B.weight": torch.randn(outer, 4)}
    save_file(tensors, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    peft.LoraConfig(r=4, target_modules=["q_proj", *sizes], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"all experts into one tensor.*mlp\.experts\.gate_up_proj"):
        LoraModel.from_pretrained(tmp_path, base_model=base)
    assert not isinstance(base, LoraModel)
    batch = {"input_ids": token_ids()}
    before = output(base, batch)
    skip_unless_peft_converts()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not torch.allclose(output(theirs.eval(), batch), before, atol=1e-2)
