"""Checkpoints: adapter alone, complete or not counted, and resuming that changes no bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from tiny import SPARE, adapter_values, sentences, texts_of_three, tiny_bert, tiny_tokens
from toys import registered
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import hf_lora.train.trainer as trainer_file
from hf_lora import LoraConfig, LoraTrainer, apply_lora, share_inputs
from hf_lora.errors import AdapterFileError, BaseMismatchError
from hf_lora.train.checkpoint.manifest import ASIDE, MANIFEST_NAME, last_checkpoint, why_incomplete

Make = Callable[..., Any]
FULL = {"config.json", "model.safetensors", "pytorch_model.bin"}
CONFIG = LoraConfig(r=4, lora_dropout=0.3)


def run(args: Any, resume: Any = None, trainer: Any = LoraTrainer, **more: Any) -> Any:
    """A training run of a fresh model."""
    values = {"train_dataset": sentences(), "eval_dataset": sentences(seed=5), "lora_config": CONFIG} | more
    made = trainer(tiny_bert(), args, **values)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 5},  # inside the first epoch of 6 steps
        {"save_steps": 6},  # at its end
        {"save_steps": 7, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"save_steps": 4, "loraplus_lr_ratio": 4.0, "head_learning_rate": 3e-3, "gradient_checkpointing": True},
        {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "bf16": True},
        {"save_steps": 5, "muon_learning_rate": 0.02},
    ],
)
def test_resuming_changes_no_bit(arguments: Make, settings: dict[str, Any]) -> None:
    common = {
        "max_steps": 14, "save_strategy": "steps", "weight_decay": 0.1, "lr_scheduler_type": "cosine",
        "warmup_steps": 3, **settings,
    }  # fmt: skip
    whole = run(arguments(name="whole", **common))
    cut = Path(whole.args.output_dir) / f"checkpoint-{settings['save_steps']}"
    torch.manual_seed(999)
    resumed = run(arguments(name="resumed", **common), resume=str(cut))
    assert resumed.state.global_step == 14
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))
    moved = run(arguments(name="other", **common | {"seed": 7}))
    assert any(not torch.equal(v, adapter_values(whole.model)[n]) for n, v in adapter_values(moved.model).items())


@pytest.mark.parametrize(("init", "method"), [("top", "gain"), ("pissa_niter_2", "dora")])
def test_resuming_with_subtracted_products_changes_no_bit(arguments: Make, init: str, method: str) -> None:
    rows = {"rows": {"bert.embeddings.word_embeddings": [3, 4, 5]}}
    config = LoraConfig(r=4, lora_dropout=0.3, init_lora_weights=init, method=method, parts=rows)
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "loraplus_lr_ratio": 4.0}
    with registered():
        whole = run(arguments(name="whole", **common), lora_config=config)
        cut = Path(whole.args.output_dir) / "checkpoint-4"
        torch.manual_seed(999)
        resumed = run(arguments(name="resumed", **common), resume=str(cut), lora_config=config)
        values = adapter_values(whole.model)
        assert {n.rpartition(".lora_")[2].partition(".")[0] for n in values if ".lora_" in n} >= {"rows", "A", "B"}
        assert_same_tensors(adapter_values(resumed.model), values)


def test_a_checkpoint_holds_the_adapter_alone(arguments: Make) -> None:
    trainer = run(arguments(max_steps=4, save_strategy="steps", save_steps=2))
    folder = Path(trainer.args.output_dir) / "checkpoint-4"
    names = {p.name for p in folder.iterdir()}
    assert not names & FULL
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "trainer_state.json",
        MANIFEST_NAME,
    } <= names
    trained = sum(v.numel() * 4 for v in adapter_values(trainer.model).values())
    assert (folder / "adapter_model.safetensors").stat().st_size < trained + 20_000
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["files"].keys() == names - {MANIFEST_NAME}
    assert manifest["step"] == 4


def test_resuming_by_true_takes_the_newest_complete_one(arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=8, save_strategy="steps", save_steps=2)
    whole = run(args)
    folder = Path(args.output_dir)
    (folder / "checkpoint-8" / MANIFEST_NAME).unlink()
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    weights = folder / "checkpoint-6" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert "checkpoint-8" in messages[-1]
    assert "checkpoint-6: optimizer.pt has" in messages[-1]
    with pytest.raises(AdapterFileError, match="checkpoint-4 instead"):
        run(args, resume=str(folder / "checkpoint-6"))
    resumed = run(args, resume=True)
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))
    assert why_incomplete(folder / "checkpoint-8") == []


def test_a_later_run_in_the_folder_of_a_longer_one_is_pointed_out(arguments: Make, messages: list[str]) -> None:
    common = {"save_strategy": "steps", "save_steps": 2}
    folder = Path(run(arguments(max_steps=4, **common)).args.output_dir)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert not any("was written later" in message for message in messages)
    run(arguments(max_steps=2, **common))
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert f"{folder / 'checkpoint-2'} was written later" in messages[-1]


def test_a_second_run_of_a_trainer_heeds_sigterm_as_the_first(arguments: Make) -> None:
    class Sender(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and self.armed:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # for the timer of the manager, which waits for no time here

        armed = False

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        sender = Sender()
        args = arguments(max_steps=6, enable_jit_checkpoint=True)
        trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), callbacks=[sender])
        managers = [m for c in trainer.callback_handler.callbacks if (m := getattr(c, "jit_manager", None))]
        managers[0].kill_wait = 0
        trainer.train()
        sender.armed = True
        trainer.train()
        step = trainer.state.global_step
        assert 2 <= step < 6
        assert why_incomplete(Path(args.output_dir) / f"checkpoint-{step}") == []
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_to_resume_from(arguments: Make) -> None:
    args = arguments(max_steps=2)
    with pytest.raises(AdapterFileError, match="no complete checkpoint"):
        run(args, resume=True)
    other = Path(args.output_dir) / "checkpoint-2"
    other.mkdir(parents=True)
    with pytest.raises(AdapterFileError, match="not a complete checkpoint"):
        run(args, resume=str(other))


def test_a_save_that_is_cut_off_leaves_no_complete_checkpoint(arguments: Make) -> None:
    """Also where the folder of an earlier run is written again."""
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2)
    run(args)

    class Cut(LoraTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            super()._save_optimizer_and_scheduler(output_dir)

    with pytest.raises(KeyboardInterrupt):
        run(args, trainer=Cut)
    assert why_incomplete(Path(args.output_dir) / "checkpoint-4")
    assert last_checkpoint(args.output_dir) == str(Path(args.output_dir) / "checkpoint-2")
    assert why_incomplete(Path(args.output_dir) / f"checkpoint-4{ASIDE}") == []  # the first run's is not lost


def test_older_checkpoints_go_only_when_the_new_one_is_complete(
    arguments: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    rotate = trainer_file.rotate_checkpoints

    def watched(output_dir: str, **kwargs: Any) -> None:
        seen.append(last_checkpoint(output_dir))
        rotate(output_dir=output_dir, **kwargs)

    monkeypatch.setattr(trainer_file, "rotate_checkpoints", watched)
    args = arguments(max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    run(args)
    assert [Path(s or "").name for s in seen] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [p.name for p in Path(args.output_dir).glob("checkpoint-*")] == ["checkpoint-6"]


def test_save_only_model(arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
    run(args)
    folder = Path(args.output_dir) / "checkpoint-2"
    assert why_incomplete(folder) == []
    assert not (folder / "optimizer.pt").exists()
    assert run(args, resume=str(folder)).state.global_step == 4
    assert any("start from the beginning" in m for m in messages)


def test_best_model_and_early_stopping(arguments: Make) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.0])

    class Scored(LoraTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            kept.append(adapter_values(self.model))
            metrics = {"eval_loss": next(losses)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    kept: list[dict[str, torch.Tensor]] = []
    args = arguments(
        max_steps=20, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=2,
    )  # fmt: skip
    trainer = run(args, trainer=Scored, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
    assert trainer.state.global_step == 8
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert_same_tensors(adapter_values(trainer.model), kept[1])
    assert any(not torch.equal(kept[1][n], kept[3][n]) for n in kept[1])


def test_dropped_layers_stay_dropped(arguments: Make) -> None:
    args = arguments(max_steps=8, save_strategy="steps", save_steps=5)
    data = texts_of_three()
    whole = LoraTrainer(tiny_tokens(), args, train_dataset=data, lora_config=CONFIG)
    whole.train()
    resumed = LoraTrainer(tiny_tokens(), args, train_dataset=data, lora_config=CONFIG)
    resumed.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-5"))
    assert not any(SPARE in name for name in adapter_values(resumed.model))
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))


def test_a_module_that_is_no_transformers_model(arguments: Make, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3), torch.nn.Dropout(0.3)

        def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> dict[str, Any]:
            y = self.b(self.drop(self.a(input_ids.float() / 64).relu()))
            return {"loss": torch.nn.functional.cross_entropy(y, labels), "logits": y}

    def train(name: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        args = arguments(name=name, max_steps=8, save_strategy="steps", save_steps=3, load_best_model_at_end=True,
                         eval_strategy="steps", eval_steps=3)  # fmt: skip
        trainer = LoraTrainer(Net(), args, train_dataset=sentences(), eval_dataset=sentences(), lora_config=CONFIG)
        trainer.train(resume_from_checkpoint=resume)
        return adapter_values(trainer.model)

    whole = train("whole")
    folder = tmp_path / "whole" / "checkpoint-3"
    assert not {p.name for p in folder.iterdir()} & FULL
    assert why_incomplete(folder) == []
    assert_same_tensors(train("resumed", str(folder)), whole)


def test_other_arguments_than_those_of_the_checkpoint_are_refused(arguments: Make) -> None:
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(arguments(**common))
    with pytest.raises(AdapterFileError, match="the order differs"):
        run(arguments(**common, loraplus_lr_ratio=2.0), resume=True)
    with pytest.raises(AdapterFileError, match="shape"):
        run(arguments(**common), resume=True, lora_config=LoraConfig(r=2))
    with pytest.raises(
        AdapterFileError, match=r"is from torch\.AdamW, but this run's optimizer is transformers\.Adafactor"
    ):
        run(arguments(**common, optim="adafactor"), resume=str(Path(arguments().output_dir, "checkpoint-2")))
    trainer = LoraTrainer(
        tiny_bert(), arguments(**common, head_learning_rate=3e-3), train_dataset=sentences(), lora_config=CONFIG
    )
    before = adapter_values(trainer.model)
    with pytest.raises(AdapterFileError, match=r"order differs|parameter groups of .*head_learning_rate"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_tensors(adapter_values(trainer.model), before)  # nothing was loaded
    run(arguments(name="bare", **common, save_only_model=True))
    bare = run(arguments(name="bare", **common | {"max_steps": 6}, optim="adafactor"), resume=True)
    assert bare.state.global_step == 6  # there is no state that could be another optimizer's


def test_other_groups_of_the_same_parameters_are_refused(arguments: Make) -> None:
    """torch would say so after the adapter was loaded, without naming the cause."""

    class Split(LoraTrainer):
        first = 0

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                trained = [p for p in self.model.parameters() if p.requires_grad]
                groups = [trained[: self.first], trained[self.first :]]
                self.optimizer = torch.optim.SGD([{"params": group} for group in groups if group], lr=0.1)
            return self.optimizer

    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    Split.first = 3
    run(arguments(**common), trainer=Split)
    Split.first = 0
    subject = Split(tiny_bert(), arguments(**common), train_dataset=sentences(), lora_config=CONFIG)
    before = adapter_values(subject.model)
    with pytest.raises(
        AdapterFileError, match=r"has parameter groups of \[3, \d+\] tensors, and this run's has \[\d+\]"
    ):
        subject.train(resume_from_checkpoint=True)
    assert_same_tensors(adapter_values(subject.model), before)


def test_another_base_or_scaling_is_refused(arguments: Make) -> None:
    """The values would fit, and mean something else."""
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    folder = Path(run(arguments(**common)).args.output_dir) / "checkpoint-2"
    louder = apply_lora(tiny_bert(), LoraConfig(r=4, lora_alpha=32, alpha_pattern={"query": 8}))
    other = apply_lora(tiny_bert(seed=7), CONFIG)
    for model, error, said in (
        (louder, AdapterFileError, r"alpha / rank is 2 in the file but 8 in the model, for 11 layers"),
        (other, BaseMismatchError, "its weights differ"),
    ):
        before = adapter_values(model)
        with pytest.raises(error, match=said):
            model.load_adapter_weights(folder)
        with pytest.raises(error, match=said):
            LoraTrainer(model, arguments(**common), train_dataset=sentences()).train(str(folder))
        assert_same_tensors(adapter_values(model), before)


def test_an_unmodified_trainer_writes_adapters_and_says_how_to_resume(
    arguments: Make, capfd: pytest.CaptureFixture[str], messages: list[str]
) -> None:
    args = arguments(TrainingArguments, max_steps=6, save_strategy="steps", save_steps=2)
    model = apply_lora(tiny_bert(), CONFIG)
    share_inputs(model, **{name: value[None] for name, value in sentences().rows[0].items()})  # as LoraTrainer does
    trainer = Trainer(model, args, train_dataset=sentences())
    first = trainer.evaluate(sentences(seed=5))["eval_loss"]
    trainer.train()
    assert trainer.evaluate(sentences(seed=5))["eval_loss"] != first
    for step in (2, 4, 6):
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        assert (folder / "adapter_model.safetensors").is_file()
        assert not {p.name for p in folder.iterdir()} & FULL
    out, err = capfd.readouterr()
    said = "\n".join([out, err, *dict.fromkeys(messages)])
    assert "LoraTrainer" in said
    assert sum("LoraTrainer" in line for line in "\n".join([out, *messages]).splitlines()) == 1

    # What it wrote, LoraTrainer goes on from, to the same end.
    args.learning_rate = 1e-2
    resumed = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), lora_config=CONFIG)
    resumed.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-4"))
    assert_same_tensors(adapter_values(resumed.model), adapter_values(model))


def test_a_checkpoint_of_a_whole_model_is_refused(arguments: Make, tmp_path: Path) -> None:
    args = arguments(max_steps=2)
    folder = tmp_path / "checkpoint-1"
    tiny_bert().save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="adapter"):
        run(args, resume=str(folder))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_resuming_in_the_same_folder_after_a_stop(arguments: Make) -> None:
    """Stopped and resumed twice, with an evaluation each epoch, as people do it."""
    common = {"num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = run(arguments(name="whole", **common))
    args = arguments(name="parts", **common)
    run(args, callbacks=[StopAt(8)])
    shutil.rmtree(Path(args.output_dir) / "checkpoint-8", ignore_errors=True)
    run(args, resume=True, callbacks=[StopAt(13)])
    shutil.rmtree(Path(args.output_dir) / "checkpoint-13", ignore_errors=True)
    last = run(args, resume=True)
    assert_same_tensors(adapter_values(last.model), adapter_values(whole.model))
