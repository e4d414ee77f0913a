"""`ema`: the averages that a slow computation gives are evaluated, saved and resumed; the training is that without."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from safetensors.torch import load_file
from tiny import adapter_values, sentences, tiny_bert
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

from hf_lora import LoraConfig, LoraModel, LoraTrainer, LoraTrainingArguments
from hf_lora.errors import AdapterFileError, ConfigError
from hf_lora.train.average import FIELD, FILE, Average
from hf_lora.train.checkpoint.manifest import finish_checkpoint, read_manifest

Make = Callable[..., Any]
Values = dict[str, torch.Tensor]
CONFIG = LoraConfig(r=4, lora_dropout=0.3, bias="all")
STEPS = 8
COMMON: dict[str, Any] = {"max_steps": STEPS, "lr_scheduler_type": "cosine", "weight_decay": 0.1}


class Weights(TrainerCallback):
    """Keeps the weights after each step, and what an average of PyTorch makes of them."""

    def __init__(self, decay: float | None = None) -> None:
        self.kept: list[Values] = []
        self.decay, self.averaged = decay, AveragedModel(nn.Identity())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept.append(adapter_values(model))
        if self.decay is None:
            return
        own = nn.ParameterList([p.detach() for p in model.parameters() if p.requires_grad])
        if len(self.kept) == 1:
            self.averaged = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.averaged.update_parameters(own)


def run(args: Any, resume: Any = None, **more: Any) -> Any:
    values = {"train_dataset": sentences(), "eval_dataset": sentences(seed=5), "lora_config": CONFIG} | more
    trainer = LoraTrainer(tiny_bert(), args, **values)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def exact(kept: list[Values], decay: float) -> Values:
    """The averages in float64, from their definition."""
    averages = {name: value.double() for name, value in kept[0].items()}
    for earlier, values in enumerate(kept[1:], 1):
        now = min(decay, (1 + earlier) / (10 + earlier))
        averages = {name: now * averages[name] + (1 - now) * value.double() for name, value in values.items()}
    return averages


def assert_close(found: Values, expected: Values, kept: list[Values]) -> None:
    """Each update rounds by at most two units in the last place of the largest weights."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(float(values[name].abs().max()) for values in kept)
        bound = 2 * len(kept) * torch.finfo(torch.float32).eps * largest
        assert float((found[name].double() - value.double()).abs().max()) <= bound, name


@pytest.mark.parametrize("decay", [0.1, 0.99])
def test_the_averages_are_those_of_the_weights_without_them(arguments: Make, decay: float) -> None:
    settings = {**COMMON, "gradient_accumulation_steps": 2, "loraplus_lr_ratio": 4.0}
    plain, seen = Weights(decay if decay == 0.1 else None), Weights()
    run(arguments(name="plain", **settings), callbacks=[plain])
    averaged = run(arguments(name="averaged", ema=decay, **settings), callbacks=[seen])
    for ours, theirs in zip(seen.kept, plain.kept, strict=True):
        assert_same_tensors(ours, theirs)  # the training is the same
    found = adapter_values(averaged.model)
    assert_close(found, exact(plain.kept, decay), plain.kept)
    if plain.decay is not None:  # the decay never warms up
        theirs = dict(zip(found, plain.averaged.module.parameters(), strict=True))
        assert_close(found, {name: value.detach() for name, value in theirs.items()}, plain.kept)
    assert any(not torch.equal(found[name], value) for name, value in plain.kept[-1].items())


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 3},
        {"save_steps": 4, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        pytest.param({"save_steps": 5, "bf16": True, "head_learning_rate": 3e-3}, marks=pytest.mark.slow),
    ],
)
def test_resuming_changes_no_bit(arguments: Make, settings: dict[str, Any]) -> None:
    common = {**COMMON, "save_strategy": "steps", "ema": 0.9, **settings}
    whole = run(arguments(name="whole", **common))
    cut = Path(whole.args.output_dir) / f"checkpoint-{settings['save_steps']}"
    torch.manual_seed(999)
    resumed = run(arguments(name="resumed", **common), resume=str(cut))
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))
    losses = [[(e["step"], e["eval_loss"]) for e in t.state.log_history if "eval_loss" in e] for t in (resumed, whole)]
    assert losses[0] == losses[1]
    last = Path(whole.args.output_dir) / f"checkpoint-{STEPS - STEPS % settings['save_steps']}"
    again = Path(resumed.args.output_dir) / last.name
    if last != cut:
        assert_same_tensors(load_file(again / FILE), load_file(last / FILE))


def test_a_batch_that_is_too_large_at_first_changes_no_average(arguments: Make) -> None:
    """With `auto_find_batch_size`, Trainer prepares the training again, and does not load the checkpoint again."""
    common = {**COMMON, "save_strategy": "steps", "save_steps": 6, "ema": 0.9}
    cut = Path(run(arguments(name="whole", **common)).args.output_dir) / "checkpoint-6"
    saved = LoraModel.from_pretrained(cut, base_model=tiny_bert(), is_trainable=True)
    averages, failures = list[Values](), ["CUDA out of memory."]

    class Failing(LoraTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if failures:
                raise RuntimeError(failures.pop())
            return super().training_step(*args, **kwargs)

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with trainer.average.applied():
                averages.append(adapter_values(trainer.model))

    args = arguments(name="resumed", **common, auto_find_batch_size=True)
    trainer = Failing(tiny_bert(), args, train_dataset=sentences(), lora_config=CONFIG, callbacks=[Look()])
    trainer.train(resume_from_checkpoint=str(cut))
    assert len(averages) == 2
    for found in averages:
        assert_same_tensors(found, adapter_values(saved))


def test_a_trial_of_a_search_has_its_own_decay(arguments: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer writes the values of a trial into the arguments when `train` has begun."""
    seen = list[float]()
    decays = [0.5, 0.7]
    monkeypatch.setattr(
        Trainer, "_hp_search_setup", lambda trainer, _: setattr(trainer.args, "ema", decays[len(seen)])
    )

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trainer.average.decay)

    args = arguments(**{**COMMON, "max_steps": 1})
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), lora_config=CONFIG, callbacks=[Look()])
    for _ in decays:
        trainer.train()
    assert seen == decays


@pytest.mark.parametrize("use_dora", [False, True])
def test_evaluations_and_files_have_the_averages(arguments: Make, use_dora: bool, tmp_path: Path) -> None:
    """Those of the checkpoint, of the best one, and what a callback saves; the training goes on with the weights."""

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                trainers[0].save_model(str(tmp_path / "mine"))

    class Keeping(LoraTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    trainers: list[Any] = []
    weights, config = Weights(), LoraConfig(r=4, use_dora=use_dora)
    args = arguments(
        **{**COMMON, "max_steps": 8}, ema=0.8, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, greater_is_better=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer = Keeping(
        tiny_bert(), args, train_dataset=sentences(), eval_dataset=sentences(seed=5), lora_config=config,
        callbacks=[weights, Saves()],
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    for step in (2, 4):
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        loaded = LoraModel.from_pretrained(folder, base_model=tiny_bert(), is_trainable=True)
        assert_close(adapter_values(loaded), exact(weights.kept[:step], 0.8), weights.kept)
        fresh = LoraTrainer(loaded, arguments(name="fresh"), eval_dataset=sentences(seed=5))
        assert fresh.evaluate()["eval_loss"] == pytest.approx(losses[step], rel=1e-6)
        raw = {name.removeprefix("weight."): value for name, value in load_file(folder / FILE).items()}
        assert_same_tensors(raw, weights.kept[step - 1])
    saved = load_file(Path(args.output_dir) / "checkpoint-4" / "adapter_model.safetensors")
    assert_same_tensors(load_file(tmp_path / "mine" / "adapter_model.safetensors"), saved)
    best = Path(trainer.state.best_model_checkpoint)
    loaded = LoraModel.from_pretrained(best, base_model=tiny_bert(), is_trainable=True)
    assert_same_tensors(adapter_values(trainer.model), adapter_values(loaded))
    assert trainer.evaluate()["eval_loss"] == losses[int(best.name.rpartition("-")[2])]


def test_an_interrupted_run_leaves_the_averages_in_the_model(arguments: Make) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    weights, model = Weights(), tiny_bert()
    trainer = LoraTrainer(
        model, arguments(**COMMON, ema=0.9), train_dataset=sentences(), callbacks=[weights, Stops()],
        lora_config=CONFIG,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_close(adapter_values(model), exact(weights.kept, 0.9), weights.kept)


def test_without_it_there_is_no_file(arguments: Make) -> None:
    trainer = run(arguments(max_steps=2, save_strategy="steps", save_steps=2))
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    assert not (folder / FILE).exists()
    assert (read_manifest(folder) or {}).get(FIELD) is None


def test_a_checkpoint_with_another_decay_is_refused(arguments: Make, messages: list[str]) -> None:
    settings = {**COMMON, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = run(arguments(name="whole", ema=0.9, **settings))
    cut = str(Path(whole.args.output_dir) / "checkpoint-2")
    for decay, said in ((0.8, "this run has ema=0.8"), (0.0, "this run has no ema")):
        model = tiny_bert()
        trainer = LoraTrainer(
            model, arguments(name="other", ema=decay, **settings), train_dataset=sentences(), lora_config=CONFIG
        )
        before = adapter_values(model)
        with pytest.raises(AdapterFileError, match=f"(?s)trained with ema=0.9, and {said}.*Resume with the ema"):
            trainer.train(resume_from_checkpoint=cut)
        assert_same_tensors(adapter_values(model), before)
    # The next steps that the message names.
    run(arguments(name="first", ema=0.9, **settings), resume=cut)
    run(arguments(name="anew", max_steps=1, lora_adapter=cut), lora_config=None)
    assert not any("averages" in message for message in messages)
    plain = run(arguments(name="plain", **settings))
    run(arguments(name="later", ema=0.9, **settings), resume=str(Path(plain.args.output_dir) / "checkpoint-2"))
    assert any("has no averages" in message for message in messages)


@pytest.mark.parametrize("decay", [math.nan, -0.1, 1.0, math.inf])
def test_values_and_engines_that_cannot_be_are_refused_together(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError) as caught:
        LoraTrainingArguments("out", use_cpu=True, ema=decay, lora_dropout=2.0)
    said = str(caught.value)
    assert "must be >= 0 and < 1" in said
    assert "averages whole weights, but FSDP" in said
    assert "dropout" in said
    LoraTrainingArguments("out", use_cpu=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    LoraTrainingArguments("out", use_cpu=True, ema=0.99)


def test_weights_in_half_precision_have_averages_in_float32(tmp_path: Path) -> None:
    """Such as a dense layer of sentence-transformers, which is trained whole in its dtype."""
    given: Any = None
    model, other = (nn.Linear(3, 2).bfloat16() for _ in range(2))
    average, again = Average(), Average()
    average.model, again.model = model, other
    average.begin(0.9)
    for _ in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.on_optimizer_step(given, given, given)
    with average.applied():
        fields = average.save(tmp_path)
        other.load_state_dict(model.state_dict())
    (tmp_path / "adapter_config.json").write_text("{}")
    finish_checkpoint(tmp_path, 6, {FIELD: fields})
    again.begin(0.9)
    again.check(tmp_path, fields or {})
    again.resume(tmp_path)
    for one in (average, again):
        torch.manual_seed(3)
        part = model if one is average else other
        with torch.no_grad():
            part.weight.add_(torch.randn_like(part.weight))
        one.on_optimizer_step(given, given, given)
        assert all(tensor.dtype == torch.float32 for tensor in one._averages)
    assert_same_tensors(dict(enumerate(again._averages)), dict(enumerate(average._averages)))  # type: ignore[arg-type]
    assert_same_tensors(other.state_dict(), model.state_dict())
