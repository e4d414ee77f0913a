"""Rows that are longer than a table of positions: an error that names the limit, which is what the model reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from tiny import Rows

from hf_lora import DataError, LoraTrainer, LoraTrainingArguments, apply_lora
from hf_lora.adapt.positions import Positions, check_positions, learned_positions
from hf_lora.evaluation.language import score_rows


def tiny_roberta() -> Any:
    """Its positions start behind the padding index."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


def tiny_opt() -> Any:
    """Its table has two rows more than positions."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


LEARNED = {
    "gpt2": (tiny_gpt2, Positions(32, 32)), "bert": (tiny_bert, Positions(32, 32)),
    "roberta": (tiny_roberta, Positions(30, 32)), "opt": (tiny_opt, Positions(32, 34)),
}  # fmt: skip


def reads(model: Any, tokens: int, **more: Any) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=token_ids(1, tokens), **more)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", LEARNED)
def test_the_limit_is_what_the_model_reads(name: str) -> None:
    build, expected = LEARNED[name]
    model = apply_lora(build())
    assert learned_positions(model) == expected
    assert reads(model, expected.tokens)
    assert not reads(model, expected.tokens + 1)


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5])
def test_computed_positions_have_no_limit(build: Any) -> None:
    model = build()
    assert learned_positions(model) is None
    check_positions(None, {"input_ids": token_ids(1, 1000)})


def test_relative_positions_have_no_limit() -> None:
    """Although their table has as many rows as the config has positions."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, position_buckets=16, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], pad_token_id=0,
    )  # fmt: skip
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    assert learned_positions(model) is None
    assert reads(model, 80)


def test_packed_rows_may_be_longer_than_their_documents() -> None:
    model, ids = tiny_gpt2(), token_ids(1, 40)
    positions = torch.arange(40)[None] % 20
    check_positions(learned_positions(model), {"input_ids": ids, "position_ids": positions})
    assert reads(model, 40, position_ids=positions)
    with pytest.raises(DataError, match="A row has 40 tokens"):
        check_positions(learned_positions(model), {"input_ids": ids, "position_ids": torch.arange(40)[None]})


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_trainer_names_the_limit(verb: str, tmp_path: Any) -> None:
    rows = Rows([{"input_ids": ids, "labels": torch.tensor(0)} for ids in token_ids(2, 33)])
    args = LoraTrainingArguments(tmp_path, use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True)
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(DataError, match=r"33 tokens, and the model has learned positions for 32.*--max-length 32"):
        getattr(trainer, verb)()


def test_score_rows_names_the_limit() -> None:
    row = [int(i) for i in token_ids(1, 33)[0]]
    with pytest.raises(DataError, match="learned positions for 32"):
        score_rows(tiny_gpt2(), [{"input_ids": row, "labels": row}])
