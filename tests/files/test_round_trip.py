"""Whatever is saved loads again, here and in PEFT, with equal outputs: tasks, heads, biases, embeddings, patterns."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, batch_of
from helpers import randomize, tiny_bert, token_ids
from round_trip import check_round_trip, skip_unless_peft_converts
from torch import Tensor, nn

from hf_lora import LoraConfig, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter


def tiny_distilbert(cls: str = "DistilBertForSequenceClassification", labels: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=32, num_labels=labels,
        initializer_range=0.2,
    )  # fmt: skip
    return getattr(transformers, cls)(config).eval()


def tiny_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=2,
        num_experts_per_tok=1, initializer_range=0.2,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config).eval()


def tiny_bloom() -> Any:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2)
    return transformers.BloomForCausalLM(config).eval()


def bert(cls: str, **config: Any) -> Callable[[], Any]:
    return lambda: tiny_bert(cls=cls, **config)


TEXT = {
    "classes": bert("BertForSequenceClassification"),
    "tokens": bert("BertForTokenClassification"),
    "answers": bert("BertForQuestionAnswering", labels=2),
    "masked": bert("BertForMaskedLM"),
    "backbone": bert("BertModel"),
    "choice": bert("BertForMultipleChoice"),
    "two linear layers as a head": tiny_distilbert,
    "distil answers": lambda: tiny_distilbert("DistilBertForQuestionAnswering", labels=2),
    "llama": FAMILIES["llama"],
    "llama classes": lambda: transformers.LlamaForSequenceClassification(
        copy.deepcopy(FAMILIES["llama"](pad_token_id=0, num_labels=3).config)
    ).eval(),
    "gpt2": FAMILIES["gpt2"],
    "t5": FAMILIES["t5"],
    "experts": tiny_moe,
    "parents that read a layer's bias": tiny_bloom,
}
IMAGES = {name: FAMILIES[name] for name in ("vit", "resnet")} | {"image backbone": lambda: FAMILIES["vit"]().vit}

WITH_HEADS = (
    "classes", "tokens", "answers", "choice", "two linear layers as a head", "distil answers", "llama classes",
)  # fmt: skip
GRID: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in (*TEXT, "vit")),
    *((name, {"modules_to_save": []}) for name in WITH_HEADS),
    ("vit", {"modules_to_save": []}),
    ("vit", {"task_type": "SEQ_CLS"}),
    ("image backbone", {}),
    *((name, {"bias": "all"}) for name in ("tokens", "masked", "two linear layers as a head", "gpt2")),
    ("parents that read a layer's bias", {"bias": "all"}),
    ("answers", {"bias": "lora_only", "modules_to_save": []}),
    ("two linear layers as a head", {"modules_to_save": ["classifier"]}),
    ("two linear layers as a head", {"modules_to_save": ["classifier"], "bias": "all"}),
    ("two linear layers as a head", {"modules_to_save": ["pre_classifier"], "task_type": "SEQ_CLS"}),
    ("classes", {"modules_to_save": ["pooler"]}),
    ("backbone", {"task_type": "CAUSAL_LM"}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "init_lora_weights": "gaussian"}),
    ("llama", {"exclude_modules": ["0.self_attn.q_proj"], "layers_to_transform": [0], "use_rslora": True}),
    ("llama", {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 2}, "alpha_pattern": {"^model.*": 3}}),
    ("resnet", {"target_modules": ["convolution"], "bias": "all"}),
    ("resnet", {"target_modules": ["convolution"], "modules_to_save": []}),
]


def batch_for(name: str, base: Any) -> dict[str, torch.Tensor]:
    if name in IMAGES:
        return {"pixel_values": batch_of(base)["pixel_values"]}
    ids = token_ids()
    if name == "choice":
        ids = ids[None]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of the time of a save, and is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize(("name", "config"), GRID, ids=[f"{name}-{i}" for i, (name, _) in enumerate(GRID)])
def test_what_was_saved_loads_again_here_and_in_peft(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    if name == "experts":
        skip_unless_peft_converts()
    base = (TEXT | IMAGES)[name]()
    model = randomize(apply_lora(copy.deepcopy(base), LoraConfig(**{"r": 4, **config})))
    check_round_trip(model, base, batch_for(name, base), tmp_path)


def test_ranks_of_layers_whose_names_end_alike_come_back(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.proj = nn.Linear(*sizes)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.proj(x))

    class Net(Block):
        def __init__(self) -> None:
            super().__init__(8, 16)
            self.encoder = Block(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(super().forward(x))

    def ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
        found = {name: layer._lora.adapters["default"] for name, layer in adapter_layers(model).items()}
        return {name: (adapter.r, adapter.scaling) for name, adapter in found.items()}

    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    config = LoraConfig(r=4, target_modules=["proj"], init_lora_weights="eva", eva_config={"rho": 2.0})
    narrow = torch.tensor([5.0, 1.0, *[0.1] * 6])
    apply_lora(model, config, batches=[torch.randn(40, 8) * narrow for _ in range(4)])
    assert len(set(ranks(model).values())) == 2
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert ranks(plain) == ranks(model)
