"""LoraTrainer against the unmodified Trainer, and every way of getting an adapter into its model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize
from tiny import Rows, adapter_values, sentences, texts, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Seq2SeqTrainer, Trainer, TrainingArguments

from hf_lora import (
    LoraConfig,
    LoraModel,
    LoraSeq2SeqTrainer,
    LoraSeq2SeqTrainingArguments,
    LoraTrainer,
    LoraTrainerMixin,
    LoraTrainingArguments,
    apply_lora,
    build_compute_metrics,
    compat,
    share_inputs,
)
from hf_lora.adapt.walk import adapter_layers, replacements
from hf_lora.errors import StateError, TargetError, TrainingError

Make = Callable[..., Any]
MASTERS = {torch.float32}


def dtypes(model: nn.Module, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad is trained}


# The same numbers as the unmodified Trainer.


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.2}, {"bf16": True}]
)
def test_the_same_losses_and_weights_as_trainer(make: Any, settings: dict[str, Any], arguments: Make) -> None:
    data = sentences() if make is tiny_bert else texts()
    if make is tiny_t5:  # with label smoothing, the collator makes the decoder's inputs
        for row in data.rows:
            row["decoder_input_ids"] = row["input_ids"].roll(1)
    common = {"max_steps": 6, "logging_strategy": "steps", "logging_steps": 1, "weight_decay": 0.1, **settings}
    whole_logits = {**common, "frozen_head_loss": False}
    runs = []
    for cls, kind, values in (
        (Trainer, TrainingArguments, common),
        (LoraTrainer, LoraTrainingArguments, whole_logits),
        (LoraTrainer, TrainingArguments, common),
    ):
        torch.manual_seed(3)
        model = apply_lora(make(), LoraConfig(lora_dropout=0.1))
        if cls is Trainer:  # LoraTrainer does so by itself
            share_inputs(model, **{name: value[None] for name, value in data.rows[0].items()})
        trainer = cls(model, arguments(kind, **values), train_dataset=data)
        if cls is Trainer:  # it assumes that all models divide their loss: see test_first_batch.py
            trainer.model_accepts_loss_kwargs = make in (tiny_llama, tiny_gpt2)
        trainer.train()
        losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, adapter_values(model), trainer.evaluate(data)["eval_loss"]))
    assert runs[0][0] == runs[1][0]
    assert len(runs[0][0]) == 6
    assert_same_tensors(runs[1][1], runs[0][1])
    assert runs[0][2] == runs[1][2]
    # Over the frozen head the same sums are made in another order.
    eps = torch.finfo(torch.bfloat16 if "bf16" in settings else torch.float32).eps
    assert torch.allclose(torch.tensor(runs[2][0]), torch.tensor(runs[0][0]), rtol=32 * eps)
    assert runs[2][2] == pytest.approx(runs[0][2], rel=32 * eps)


def test_the_head_is_looked_at_anew_in_every_run(arguments: Make) -> None:
    trainer = LoraTrainer(tiny_llama(), arguments(max_steps=1), train_dataset=texts())
    trainer.train()
    assert trainer.head_loss.head.off is None
    trainer.model.add_adapter("whole", LoraConfig(r=4, modules_to_save=["lm_head"]))
    trainer.optimizer = trainer.lr_scheduler = None
    before = adapter_values(trainer.model)
    trainer.train()
    assert trainer.head_loss.head.off is not None
    after = adapter_values(trainer.model)
    assert any("lm_head" in name and not torch.equal(value, before[name]) for name, value in after.items())


def test_a_causal_models_loss_counts_shifted_labels(arguments: Make) -> None:
    """Under accumulation the loss of a step is the mean over all its tokens, as in one batch."""
    results = []
    for batch, steps in ((12, 1), (4, 3)):
        torch.manual_seed(3)
        args = arguments(
            max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        trainer = LoraTrainer(tiny_llama(), args, train_dataset=texts())
        assert compat.shifts_labels(trainer)
        trainer.train()
        results.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    # float32: a sum over 100 terms of about 4, in another order
    assert results[0] == pytest.approx(results[1], abs=100 * 2**-24 * 4)


# Where the adapter comes from.


def test_defaults_arguments_and_config(arguments: Make) -> None:
    plain = LoraTrainer(tiny_bert(), arguments(TrainingArguments))
    assert isinstance(plain.model, LoraModel)
    assert plain.model.lora_configs["default"].r == 8
    flags = LoraTrainer(tiny_bert(), arguments(lora_r=3, lora_target_modules=["query"]))
    assert {len(layer.lora_A["default"].weight) for layer in adapter_layers(flags.model).values()} == {3}
    given = LoraTrainer(tiny_bert(), arguments(lora_r=3), lora_config={"r": 5, "target_modules": ["value"]})
    assert {name.rpartition(".")[2] for name in adapter_layers(given.model)} == {"value"}
    assert given.model.lora_configs["default"].r == 5


def test_a_peft_config_is_taken(arguments: Make) -> None:
    peft = pytest.importorskip("peft")
    trainer = LoraTrainer(tiny_bert(), arguments(), lora_config=peft.LoraConfig(r=2, target_modules=["query"]))
    assert trainer.model.lora_configs["default"].r == 2


def test_a_model_with_adapters(arguments: Make, messages: list[str]) -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=2))
    assert LoraTrainer(model, arguments()).model is model
    assert not messages
    LoraTrainer(model, arguments(lora_r=2))
    assert not messages
    LoraTrainer(model, arguments(lora_r=5))
    assert "lora_r" in messages[0]
    with pytest.raises(StateError, match="already has the adapters 'default'"):
        LoraTrainer(model, arguments(), lora_config=LoraConfig())


def test_the_seed_of_the_arguments_decides_the_adapter(arguments: Make) -> None:
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(torch.seed() % 1000)
        values.append(adapter_values(LoraTrainer(tiny_bert(), arguments(seed=seed)).model))
    assert_same_tensors(values[0], values[1])
    assert any(not torch.equal(values[0][n], values[2][n]) for n in values[0])


def test_trainers_arguments_by_position(arguments: Make) -> None:
    args, data, collator = arguments(), sentences(), Trainer.__init__.__defaults__
    assert collator is not None
    trainer = LoraTrainer(tiny_bert(), args, None, data, data, None, None, None, None, None, (None, None), None, None)
    assert trainer.train_dataset is data
    assert trainer.args is args
    assert inspect.signature(LoraTrainer).parameters["lora_config"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(TypeError):
        LoraTrainer(tiny_bert(), args, no_such_argument=1)


def test_model_init_and_a_search(arguments: Make) -> None:
    trainer = LoraTrainer(
        model_init=lambda: tiny_bert(), args=arguments(max_steps=5, lora_r=2), train_dataset=sentences()
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert len(adapter_layers(trainer.model)) == len(adapter_layers(first)) > 0
    trained = adapter_values(trainer.model)
    trainer.train()
    assert_same_tensors(adapter_values(trainer.model), trained)

    # A trial's values reach the adapter, though Trainer writes them into the arguments only later.
    trainer.hp_space = lambda trial: {"lora_r": trial.r, "learning_rate": 1e-3}
    model = trainer.call_model_init(type("Trial", (), {"r": 7})())
    assert {len(layer.lora_A["default"].weight) for layer in adapter_layers(model).values()} == {7}


def test_model_init_of_a_function_with_adapters(arguments: Make) -> None:
    made = lambda: apply_lora(tiny_bert(), LoraConfig(r=3))  # noqa: E731
    LoraTrainer(model_init=made, args=arguments(max_steps=4), train_dataset=sentences()).train()
    with pytest.raises(StateError):
        LoraTrainer(model_init=made, args=arguments(), lora_config=LoraConfig())


def test_the_mixin_over_a_trainer_of_ones_own(arguments: Make) -> None:
    class Own(Trainer):
        def __init__(self, model: Any, weight: float, *args: Any, **kwargs: Any) -> None:
            super().__init__(model, *args, **kwargs)
            self.weight = weight

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.used = True
            return super().compute_loss(*args, **kwargs)

    class OwnLora(LoraTrainerMixin, Own):
        pass

    trainer = OwnLora(tiny_bert(), 2.0, arguments(max_steps=4), train_dataset=sentences(), lora_config=LoraConfig(r=2))
    trainer.train()
    assert trainer.weight == 2.0
    assert trainer.used


# Starting.


def test_start_is_announced(arguments: Make, capsys: pytest.CaptureFixture[str], told: list[str]) -> None:
    LoraTrainer(tiny_bert(), arguments(max_steps=4, learning_rate=5e-5), train_dataset=sentences()).train()
    out = "\n".join(told)
    assert "trainable params" in out
    assert "'default': r=8, alpha=16" in out
    assert "query" in out
    assert "classifier" in out
    assert "trainable" not in capsys.readouterr().out  # the library logs, and the command prints
    assert sum("learning_rate" in m for m in told) == 1
    assert sum("random" in m for m in told) == 1
    LoraTrainer(tiny_bert(), arguments(max_steps=4, learning_rate=5e-5), train_dataset=sentences()).train()
    assert sum("learning_rate" in m for m in told) == 1


def test_no_hint_where_a_rate_was_chosen(arguments: Make, messages: list[str]) -> None:
    LoraTrainer(tiny_bert(), arguments(max_steps=4, learning_rate=1e-4), train_dataset=sentences()).train()
    assert not any("learning_rate" in m for m in messages)


def test_training_in_vain_is_refused(arguments: Make, tmp_path: Path) -> None:
    apply_lora(tiny_bert()).save_pretrained(tmp_path / "adapter")
    frozen = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tiny_bert())
    trainer = LoraTrainer(frozen, arguments(max_steps=2), train_dataset=sentences(), eval_dataset=sentences())
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(TrainingError, match="is_trainable=True"):
        trainer.train()
    merged = apply_lora(tiny_bert())
    merged.merge_adapter()
    with pytest.raises(StateError, match="merged"):
        LoraTrainer(merged, arguments(max_steps=2), train_dataset=sentences()).train()


@pytest.mark.parametrize("first", ["resize", "apply"])
def test_a_grown_vocabulary_is_refused(first: str, arguments: Make, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = type(tiny_bert()).from_pretrained(tmp_path / "base")
    if first == "apply":
        apply_lora(model)
    model.resize_token_embeddings(70)
    with pytest.raises((TargetError, TrainingError), match="70 rows, 64 in the base checkpoint"):
        LoraTrainer(model, arguments(max_steps=2), train_dataset=sentences()).train()
    model = type(tiny_bert()).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    kept = LoraConfig(modules_to_save=["word_embeddings", "classifier"])
    LoraTrainer(model, arguments(max_steps=4), train_dataset=sentences(), lora_config=kept).train()


def test_a_frozen_batchnorm_keeps_its_statistics(arguments: Make) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.out(self.norm(self.inside(x)))
            return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}

    rows = Rows([{"x": torch.randn(4) + 3, "labels": torch.tensor(i % 2)} for i in range(16)])
    model = Net()
    before = {n: b.clone() for n, b in model.norm.named_buffers()}
    LoraTrainer(model, arguments(max_steps=4), train_dataset=rows).train()
    assert all(torch.equal(b, before[n]) for n, b in model.norm.named_buffers())


# Precision, evaluation, generation.


@pytest.mark.parametrize("full_eval", ["bf16_full_eval", "fp16_full_eval"])
def test_masters_stay_float32(full_eval: str, arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=4, **{full_eval: True})
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), eval_dataset=sentences())
    trainer.evaluate()
    half = torch.bfloat16 if full_eval.startswith("bf16") else torch.float16
    assert dtypes(trainer.model, trained=True) == MASTERS
    assert half in dtypes(trainer.model, trained=False)
    if half is torch.float16:
        return
    trainer.train()
    assert any("rounded weights" in m for m in messages)
    assert dtypes(trainer.model, trained=True) == MASTERS
    trainer.predict(sentences())
    assert dtypes(trainer.model, trained=True) == MASTERS


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_it_learns(settings: dict[str, Any], arguments: Make) -> None:
    args = arguments(num_train_epochs=15, learning_rate=2e-2, **settings)
    metric = build_compute_metrics(["accuracy", "f1"])
    trainer = LoraTrainer(
        tiny_bert(), args, train_dataset=sentences(), eval_dataset=sentences(seed=9), compute_metrics=metric
    )
    assert trainer.preprocess_logits_for_metrics is not None
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > max(0.8, before)
    assert after["eval_f1"] > 0.8
    predictions = trainer.predict(sentences(seed=9))
    assert predictions.metrics["test_accuracy"] == after["eval_accuracy"]
    assert predictions.predictions.shape == (24,)


def test_perplexity_shifts_as_the_model_does(arguments: Make) -> None:
    metric = build_compute_metrics(["perplexity", "accuracy"])
    trainer = LoraTrainer(
        tiny_llama(), arguments(per_device_eval_batch_size=24), eval_dataset=texts(), compute_metrics=metric
    )
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(float(torch.tensor(found["eval_loss"]).exp()), rel=1e-4)
    assert trainer.compute_metrics.shift_labels is True
    assert metric.shift_labels is None
    args = arguments(per_device_eval_batch_size=24, batch_eval_metrics=True)
    again = LoraTrainer(
        tiny_llama(), args, eval_dataset=texts(), compute_metrics=build_compute_metrics("perplexity")
    ).evaluate()
    assert again["eval_perplexity"] == pytest.approx(found["eval_perplexity"], rel=1e-6)


def test_seq2seq_generates_in_evaluation(arguments: Make) -> None:
    model = tiny_t5()

    class Tokenizer:
        padding_side = "right"
        pad_token_id = 0

        def pad(self, features: Any, **kwargs: Any) -> Any:
            return {"input_ids": torch.stack([torch.as_tensor(f["input_ids"]) for f in features])}

        def save_pretrained(self, folder: str) -> None: ...

    collator = DataCollatorForSeq2Seq(Tokenizer(), model=model)  # type: ignore[arg-type]
    rows = [{k: v.tolist() for k, v in row.items()} for row in texts().rows]
    args = arguments(
        LoraSeq2SeqTrainingArguments, max_steps=4, predict_with_generate=True, generation_max_length=6, lora_r=4,
        remove_unused_columns=False,
    )  # fmt: skip
    trained = LoraSeq2SeqTrainer(model, args, collator, rows, rows)
    assert isinstance(trained, Seq2SeqTrainer)
    trained.train()
    ids = trained.predict(rows, max_length=7).predictions
    assert ids.shape[0] == len(rows)
    assert ids.max() < 64

    # An unmodified trainer generates the same from the same model, and something else without the adapter.
    theirs = Seq2SeqTrainer(
        model, args, collator, rows, rows, compute_metrics=lambda p: {"sum": int(p.predictions.sum())}
    )
    assert (theirs.predict(rows, max_length=7).predictions == ids).all()
    ours = LoraSeq2SeqTrainer(
        model, args, collator, rows, rows, compute_metrics=lambda p: {"sum": int(p.predictions.sum())}
    )
    assert ours.evaluate()["eval_sum"] == theirs.evaluate()["eval_sum"]
    tuned = ours.evaluate()["eval_loss"]
    with model.disable_adapter():
        assert ours.evaluate()["eval_loss"] > tuned


def test_a_second_adapter_is_trained_beside_a_frozen_one(arguments: Make, tmp_path: Path) -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=2), "first")
    first = {n: p.detach().clone() for n, p in model.named_parameters() if ".first." in n}
    apply_lora(model, LoraConfig(r=3), "second")
    trainer = LoraTrainer(
        model, arguments(max_steps=4, save_strategy="steps", save_steps=4), train_dataset=sentences()
    )
    trainer.train()
    assert_same_tensors({n: p.detach() for n, p in model.named_parameters() if ".first." in n}, first)
    assert all(".second." in n for n in adapter_values(model))
    again = apply_lora(apply_lora(tiny_bert(), LoraConfig(r=2), "first"), LoraConfig(r=3), "second")
    resumed = LoraTrainer(again, arguments(max_steps=4), train_dataset=sentences())
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-4"))
    assert_same_tensors(adapter_values(again), adapter_values(model))


def test_heads_are_trained_and_saved(arguments: Make, tmp_path: Path) -> None:
    trainer = LoraTrainer(tiny_bert(), arguments(max_steps=4), train_dataset=sentences())
    trainer.train()
    assert "classifier" in replacements(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    again = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tiny_bert())
    batch = {k: torch.stack([row[k] for row in sentences(4).rows]) for k in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, trainer.model(**batch).logits)


def test_a_plain_trainer_that_could_not_load_its_best_model_is_refused_before_its_first_step(
    arguments: Make, tmp_path: Path
) -> None:
    """It looks for a full model after the last step; what the message advises works."""
    settings = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    data = {"train_dataset": sentences(), "eval_dataset": sentences()}
    model = apply_lora(tiny_bert())
    best = {**settings, "load_best_model_at_end": True}
    with pytest.raises(TrainingError, match="load_best_model_at_end") as error:
        Trainer(model, arguments(TrainingArguments, **best), **data).train()
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert "hf_lora.LoraTrainer" in str(error.value)
    trainer = Trainer(model, arguments(TrainingArguments, **settings), **data)
    trainer.train()
    trained = adapter_values(model)
    first = str(tmp_path.joinpath(trainer.args.output_dir, "checkpoint-1"))
    model.load_adapter_weights(first)
    assert any(not torch.equal(value, trained[name]) for name, value in adapter_values(model).items())
    LoraTrainer(model, arguments(**best), **data).train()
    model.train()


def test_an_adapter_named_as_the_model_of_a_script(arguments: Make, tmp_path: Path) -> None:
    """transformers loads it with PEFT's layers; both ways that the message names work."""
    pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    randomize(apply_lora(base, LoraConfig(r=2))).save_pretrained(adapter)
    expected = adapter_values(base)
    named = AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(
        StateError, match=r"PEFT layer[\s\S]*LoraModel\.from_pretrained\(adapter\)[\s\S]*--lora_adapter"
    ):
        LoraTrainer(named, arguments(max_steps=1), train_dataset=texts())
    assert_same_tensors(adapter_values(LoraModel.from_pretrained(adapter, is_trainable=True)), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    LoraTrainer(plain, arguments(max_steps=1, lora_adapter=str(adapter)), train_dataset=texts())
    assert_same_tensors(adapter_values(plain), expected)


def test_disabled_adapters_are_not_trained(arguments: Make) -> None:
    trainer = LoraTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=sentences())
    with trainer.model.disable_adapter(), pytest.raises(TrainingError, match=r"disabled. Call enable_adapters\(\)"):
        trainer.train()
    trainer.train()
