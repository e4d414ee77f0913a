"""A config that the script changed before training comes back with the adapter, and nothing else of a config does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, tiny_llama
from torch import Tensor

from hf_lora import AdapterFileError, LoraConfig, LoraModel, apply_lora, merge_files

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
IDS = {"input_ids": torch.tensor([[1, 5, 9, 33, 7]])}


def vit_mae() -> Any:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        decoder_hidden_size=32, decoder_intermediate_size=48, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, mask_ratio=0.5,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(16,), conv_kernel=(8,), conv_stride=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=tiny_llama().config))


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 4)}


def waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 200)}


def two_rows() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[3, 5, 9, 1, 1], [3, 5, 9, 33, 7]])}


Batch = Callable[[], dict[str, Tensor]]
LOADED: dict[str, tuple[Callable[[], Any], str, Batch, dict[str, Any]]] = {
    "rope": (tiny_llama, "", lambda: IDS, {"rope_parameters": YARN}),
    "activation": (tiny_llama, "", lambda: IDS, {"hidden_act": "gelu"}),
    "epsilon": (tiny_llama, "", lambda: IDS, {"rms_norm_eps": 0.5}),
    "padding": (tiny_llama, "LlamaForSequenceClassification", two_rows, {"pad_token_id": 1}),
    "pixels": (vit_mae, "", images, {"norm_pix_loss": True}),
    "letters": (wav2vec2, "", waves, {"vocab_size": 20}),
    "inside": (llava, "", lambda: IDS, {"text_config": {"rope_parameters": YARN}}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LOADED)
def test_a_changed_config_comes_back(case: str, tmp_path: Path, told: list[str]) -> None:
    import transformers

    make, cls, batch, changes = LOADED[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    auto = getattr(transformers, cls or type(make()).__name__)
    more = {"ignore_mismatched_sizes": True} if case == "letters" else {}
    model = auto.from_pretrained(tmp_path / "base", **changes, **more)
    randomize(apply_lora(model, LoraConfig(r=4)).eval(), scale=0.1)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    inputs = batch()
    expected = model(**inputs)[0]
    loaded = LoraModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**inputs)[0], expected)
    assert any("as in training, with config." in text for text in told)
    loaded.save_pretrained(tmp_path / "again")
    assert extras(tmp_path / "again") == extras(tmp_path / "adapter") != {"config": None, "generation": None}
    LoraModel.from_pretrained(tmp_path / "adapter", merge=True).save_pretrained(tmp_path / "memory")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    for folder in ("memory", "files"):
        merged = auto.from_pretrained(tmp_path / folder)
        assert torch.allclose(merged(**inputs)[0], expected, atol=1e-4)
    if case in ("rope", "activation", "epsilon", "inside"):  # on the caller's own base
        told.clear()
        other = LoraModel.from_pretrained(tmp_path / "adapter", base_model=auto.from_pretrained(tmp_path / "base"))
        assert not torch.allclose(other(**inputs)[0], expected, atol=1e-4), "the change has no effect"
        assert any("This base has other values" in each for each in told)


def extras(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "hf_lora.json").read_text())
    return {part: values.get(part) for part in ("config", "generation")}


def test_an_unchanged_config_is_not_stored(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, attn_implementation="eager", use_cache=False, attention_dropout=0.1
    )
    model.resize_token_embeddings(60)
    apply_lora(model).save_pretrained(tmp_path / "adapter")
    assert extras(tmp_path / "adapter") == {"config": None, "generation": None}


def test_the_end_token_of_the_training_ends_what_is_generated(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    free = model.generate(**IDS, max_new_tokens=8, do_sample=False)[0, 5:]
    end = int(free[2])
    randomize(apply_lora(model), scale=1e-4)
    model.config.eos_token_id = model.generation_config.eos_token_id = end  # also after apply_lora
    model.generation_config.pad_token_id = 0
    expected = model.generate(**IDS, max_new_tokens=8, do_sample=False)
    assert expected.shape[1] < 13
    model.save_pretrained(tmp_path / "adapter")
    LoraModel.from_pretrained(tmp_path / "adapter", merge=True).save_pretrained(tmp_path / "memory")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    for each in (
        LoraModel.from_pretrained(tmp_path / "adapter"),
        *(AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("memory", "files")),
    ):
        assert torch.equal(each.generate(**IDS, max_new_tokens=8, do_sample=False), expected)
        assert each.generation_config.pad_token_id == 0
    asked = LoraModel.from_pretrained(tmp_path / "adapter", eos_token_id=7)  # the caller's value is preferred
    assert asked.config.eos_token_id == 7


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("config", {"auto_map": {"AutoModel": "code.Model"}}),
        ("config", {"_name_or_path": "elsewhere"}),
        ("config", {"quantization_config": {"load_in_4bit": True}}),
        ("config", {"_attn_implementation": "someone/kernel"}),
        ("config", {"num_hidden_layers": 10**6}),
        ("config", {"hidden_act": "os.system"}),
        ("config", {"vocab_size": 2**40}),
        ("config", {"eos_token_id": "5"}),
        ("config", {"rope_parameters": {"rope_type": "../x"}}),
        ("config", {"text_config": {"inner_config": {"eos_token_id": 5}}}),
        ("generation", {"custom_generate": "someone/code"}),
        ("generation", {"hidden_act": "gelu"}),
        ("generation", ["eos_token_id"]),
    ],
)
def test_settings_that_could_do_harm_are_refused(part: str, changes: Any, tmp_path: Path) -> None:
    apply_lora(tiny_llama()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "hf_lora.json").read_text())
    (tmp_path / "hf_lora.json").write_text(json.dumps(values | {part: changes}))
    with pytest.raises(AdapterFileError, match=part):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
