"""Runs as people make them: a longer second run, question answering, noise on embeddings, a loss of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, assert_same_tensors, tiny_bert, tiny_llama
from tiny import adapter_values, texts
from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments, WhisperConfig, WhisperForConditionalGeneration

from hf_lora import (
    LoraConfig,
    LoraModel,
    LoraSeq2SeqTrainer,
    LoraSeq2SeqTrainingArguments,
    LoraTrainer,
    apply_lora,
)

Make = Callable[..., Any]
IDS = torch.tensor([[1, 5, 9, 33]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_run_that_has_ended_goes_on_for_more_epochs(arguments: Make) -> None:
    def run(name: str, epochs: int, resume: bool = False) -> Any:
        args = arguments(name=name, num_train_epochs=epochs, save_strategy="epoch", lr_scheduler_type="constant")
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
        trainer = LoraTrainer(tiny_llama(layers=1), args, train_dataset=texts(8), lora_config=config)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    run("parts", 1)
    resumed, whole = run("parts", 3, resume=True), run("whole", 3)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))


def test_a_model_without_labels_is_evaluated_and_its_best_is_kept(arguments: Make) -> None:
    """Question answering has positions instead."""
    rows = [{"input_ids": [1, 5, 6, 7, 8], "start_positions": 1, "end_positions": 2}] * 4
    more = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.1}
    model = tiny_bert(labels=2, cls="BertForQuestionAnswering")
    args = arguments(**more, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    trainer = LoraTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    out = model.eval()(torch.tensor([[1, 5, 6, 7, 8]]))
    ends = ((out.start_logits, 1), (out.end_logits, 2))
    loss = sum(F.cross_entropy(each.double(), torch.tensor([place])) for each, place in ends) / 2
    assert len(losses) == 4
    assert float(loss) == pytest.approx(min(losses), rel=1e-5)
    theirs = Trainer(
        apply_lora(tiny_bert(labels=2, cls="BertForQuestionAnswering")),
        arguments(TrainingArguments, name="theirs", **more), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    theirs.train()
    assert sum("eval_loss" in entry for entry in theirs.state.log_history) == 4


def test_noise_on_an_adapted_embedding_ends_with_the_run(arguments: Make, tmp_path: Path) -> None:
    values = []
    for alpha in (None, 5.0):
        args = arguments(max_steps=2, neftune_noise_alpha=alpha)
        config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
        trainer = LoraTrainer(tiny_llama(layers=1), args, train_dataset=texts(8), lora_config=config)
        trainer.train()
        values.append(logits(trainer.model))
        trainer.model.train()
        assert torch.equal(trainer.model(IDS).logits, trainer.model(IDS).logits), "the noise is gone"
    assert not torch.equal(*values), "it acted in training"
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tiny_llama(layers=1))
    assert torch.equal(logits(loaded), values[1])


def smoothed(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


class OwnLoss(LoraTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = smoothed(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (OwnLoss, {}),
        (LoraTrainer, {"compute_loss_func": smoothed}),
        pytest.param(LoraTrainer, {"smoothing": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_a_loss_of_ones_own_gets_the_logits(cls: Any, more: dict[str, Any], arguments: Make) -> None:
    """The loss over the frozen head, which makes no logits, is not computed then."""
    rows = [{"input_ids": [1, 5, 6, 4 + i], "labels": [1, 5, 6, 4 + i]} for i in range(4)]
    more = dict(more)
    args = arguments(
        max_steps=1, logging_strategy="steps", logging_steps=1, label_smoothing_factor=more.pop("smoothing", 0.0)
    )
    trainer = cls(
        tiny_llama(layers=1), args, train_dataset=rows, lora_config=LoraConfig(r=2, target_modules=["q_proj"]), **more
    )
    trainer.train()
    ids = torch.tensor([row["input_ids"] for row in rows])
    wanted = float(smoothed(tiny_llama(layers=1).double()(ids), ids))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, abs=1e-4)
    assert trainer.predict(rows).predictions.shape == (4, 4, 64)


def test_norms_and_an_embedding_over_bfloat16_learn_at_a_small_rate(arguments: Make, tmp_path: Path) -> None:
    tiny_llama(layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    names = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    model = type(tiny_llama()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    before = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=names)
    LoraTrainer(model, arguments(max_steps=6, learning_rate=5e-5), train_dataset=texts(8), lora_config=config).train()
    copies = {n.split(".copies")[0]: p for n, p in model.named_parameters() if ".copies." in n}
    moved = {name: float((copy.detach() - before[f"{name}.weight"]).abs().max()) for name, copy in copies.items()}
    assert len(moved) == 4
    assert min(moved.values()) > 5e-5, "less than half the distance of two numbers of bfloat16 at 1"
    model.save_pretrained(tmp_path / "adapter")
    again = LoraModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))
    exact = logits(LoraModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32))
    base = type(tiny_llama()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert_near(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), exact, torch.float32, 64)
    merged = LoraModel.from_pretrained(tmp_path / "adapter", merge=True, dtype=torch.float32)
    assert_near(logits(merged), exact, torch.float32, 64)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_model_of_sounds_with_activation_checkpointing(reentrant: bool | None, arguments: Make) -> None:
    """Its encoder begins with convolutions, so what enters the first layer needs no gradient."""

    def build() -> Any:
        torch.manual_seed(0)
        small = {f"{part}_{kind}": n for part in ("encoder", "decoder") for kind, n in (
            ("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
        return WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
                suppress_tokens=None, **small,
            )
        )  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_features": torch.randn(8, 40, generator=generator), "labels": torch.tensor([3, 4, 5, 2])}
        for _ in range(4)
    ]
    settings = {
        "max_steps": 2, "logging_strategy": "steps", "logging_steps": 1, "remove_unused_columns": False,
        "predict_with_generate": True, "generation_max_length": 8,
    }  # fmt: skip
    checkpointed = settings | {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        checkpointed["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    model = build()
    ours = LoraSeq2SeqTrainer(
        model, arguments(LoraSeq2SeqTrainingArguments, **checkpointed), train_dataset=rows, eval_dataset=rows,
        lora_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    ours.train()
    trained = [p for n, p in model.named_parameters() if n.startswith("model.encoder") and "lora_B" in n]
    assert trained
    assert all(p.abs().sum() > 0 for p in trained)
    from transformers import Seq2SeqTrainingArguments

    theirs = Seq2SeqTrainer(
        peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
        arguments(Seq2SeqTrainingArguments, name="theirs", **settings), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    theirs.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert "eval_loss" in ours.evaluate()
