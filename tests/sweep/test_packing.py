"""Packed documents: for every causal architecture, a batch has the loss of its documents one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import VOCABULARY
from models import BASIC, CASES, CAUSAL, DECODER
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lora import LoraConfig, LoraTrainer, apply_lora
from hf_lora.data.spans import IGNORED
from hf_lora.train.packing import PaddedDocuments

Make = Callable[..., Any]
FAST = {"llama": True, "bloom": False, "mamba": False, "mixtral": True, "gpt2": True, "qwen3": True}
"""Architecture -> whether it keeps packed documents apart."""
SMALL = {**BASIC, **DECODER, "d_model": 32, "n_layer": 2, "n_layers": 2, "num_layers": 2, "n_head": 2, "n_heads": 2,
         "num_heads": 2, "n_embd": 32, "n_positions": 64, "ffn_dim": 48, "attention_heads": 2, "head_dim": 16,
         "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "max_seq_len": 64}  # fmt: skip


def documents(vocabulary: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(4)
    lengths = (5, 11, 3, 8)
    ids = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def loss_one_by_one(model: PreTrainedModel, rows: list[dict[str, list[int]]], padding: int = 0) -> float:
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        padded, mask = (torch.nn.functional.pad(t, (0, padding)) for t in (ids, torch.ones_like(ids)))
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[0, : ids.shape[1] - 1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


@torch.no_grad()
def check(model: Any, arguments: Make, messages: list[str]) -> bool:
    """Whether the trainer packs; asserts that its batch has the right loss either way."""
    messages.clear()
    rows = documents(model.config.get_text_config().vocab_size)
    expected = loss_one_by_one(model.eval(), rows)
    args = arguments(per_device_train_batch_size=len(rows))
    trainer = LoraTrainer(model, args, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    batch = next(iter(trainer.get_train_dataloader()))
    packs = not isinstance(trainer.data_collator, PaddedDocuments)
    assert any("does not keep packed documents apart" in text for text in messages) is not packs
    assert ("attention_mask" in batch) is not packs
    if not packs and loss_one_by_one(model, rows, padding=6) != pytest.approx(expected, rel=2e-4):
        pytest.skip("the model reads padding in spite of its mask")
    labels = batch.pop("labels")
    logits = model.eval()(**batch, use_cache=False).logits[:, :-1].double()
    targets = labels[:, 1:]
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert float(found) == pytest.approx(expected, rel=2e-4)
    return packs


@pytest.mark.parametrize("name", FAST)
def test_documents_are_apart_or_padded(name: str, arguments: Make, messages: list[str]) -> None:
    model = next(case for case in CASES if case.name == name).build()
    assert check(apply_lora(model, LoraConfig(r=2)), arguments, messages) is FAST[name]


def test_the_collator_of_rows_of_several_documents() -> None:
    rows = documents(VOCABULARY)
    pairs = [rows[:2], rows[2:]]
    packed = [
        {key: [token for row in pair for token in row[key]] for key in ("input_ids", "labels")}
        | {"seq_lengths": [len(row["input_ids"]) for row in pair]}
        for pair in pairs
    ]
    found, expected = PaddedDocuments()(packed), PaddedDocuments()(rows)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for row, ids, mask, labels in zip(rows, *expected.values(), strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert labels.tolist() == row["labels"] + [IGNORED] * (len(ids) - length)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES if case.auto == CAUSAL and case.name not in FAST])
def test_documents_of_the_swept_architectures(name: str, arguments: Make, messages: list[str]) -> None:
    model = next(case for case in CASES if case.name == name).build()
    check(apply_lora(model, LoraConfig(r=2)), arguments, messages)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
def test_documents_of_every_architecture_that_can_be_small(
    model_type: str, arguments: Make, messages: list[str]
) -> None:
    try:
        config = CONFIG_MAPPING[model_type]()
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for name, value in SMALL.items():
                if hasattr(part, name):
                    setattr(part, name, value)
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert size < 20_000_000
        model = AutoModelForCausalLM.from_config(config).eval()
        row = torch.tensor([documents(VOCABULARY)[1]["input_ids"]])
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        assert logits.shape[:2] == row.shape
    except Exception as error:  # of any kind: the fields of a configuration do not fit together
        pytest.skip(f"no small model ({type(error).__name__})")
    check(apply_lora(model, LoraConfig(r=2)), arguments, messages)
