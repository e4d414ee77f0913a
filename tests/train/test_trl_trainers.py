"""TRL's other trainers with the mixin, against the same trainer over PEFT's model: losses, evaluation, resuming."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import PLAIN, byte_tokenizer
from helpers import randomize
from safetensors.torch import load_file
from test_sft import HearsAutocast, llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainerCallback, set_seed

import hf_lora
from hf_lora import LoraConfig, LoraModel, LoraTrainerMixin, LoraTrainingArguments, TargetError, apply_lora
from hf_lora.train.start import warn_at_start

trl = pytest.importorskip("trl", reason="the extra chat is not installed")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

WORDS = ["Hello, world.", "a", "the user said hello", "so it goes on and on", "why?", "no", "left", "x y z"]


def turn(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


ASKED = [turn(word, "user") for word in WORDS]
GOOD, BAD = ([turn(word[::-1] + end) for word in WORDS] for end in ("", "!"))
DATA: dict[str, dict[str, Any]] = {
    "SFT": {"messages": [asked + good for asked, good in zip(ASKED, GOOD, strict=True)]},
    "DPO": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "KTO": {"prompt": ASKED, "completion": GOOD, "label": [True, False] * 4},
    "Reward": {
        "chosen": [asked + good for asked, good in zip(ASKED, GOOD, strict=True)],
        "rejected": [asked + bad for asked, bad in zip(ASKED, BAD, strict=True)],
    },
    "GRPO": {"prompt": ASKED},
    "RLOO": {"prompt": ASKED},
}
REINFORCED = ("GRPO", "RLOO")
HEAD = ["q_proj", "lm_head"]
OF_REINFORCED = {"num_generations": 2, "max_completion_length": 6, "per_device_eval_batch_size": 4}


class SameStart(TrainerCallback):
    """Gives A the same values in both libraries, and the run the same random numbers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            return
        for name, parameter in model.named_parameters():
            if "lora_A" in name and parameter.requires_grad:
                key = name.removeprefix("base_model.model.").replace(".default", "")
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        torch.manual_seed(0)


def length_of(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("trl") / "base")
    model = llama()
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    byte_tokenizer(PLAIN["chatml"]).save_pretrained(folder)
    return folder


def made(name: str, ours: bool, model: Any, folder: Path, **settings: Any) -> Any:
    """A trainer of TRL, or the mixin over it."""
    library, prefix = (hf_lora, "Lora") if ours else (trl, "")
    config, trainer = getattr(library, f"{prefix}{name}Config"), getattr(library, f"{prefix}{name}Trainer")
    if name == "SFT" and ours:  # LoraSFTTrainer trains other tokens
        config, trainer = trl.SFTConfig, type("OurTrainer", (LoraTrainerMixin, trl.SFTTrainer), {})
    fields = {"target_modules": "all-linear", "modules_to_save": None}
    fields |= {name: settings.pop(name) for name in fields.keys() & settings.keys()}
    common = {"bf16": False, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    args = config(
        str(folder), per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        **common | settings,
        **(OF_REINFORCED if name in REINFORCED else {}),
    )  # fmt: skip
    whole = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if name == "Reward" else {"task_type": "CAUSAL_LM"}
    adapter = peft.LoraConfig(r=4, lora_alpha=8, **fields | whole)
    data = datasets.Dataset.from_dict(DATA[name])
    return trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data,
        **({} if is_adapted(model) else {"peft_config": adapter, "callbacks": [SameStart()]}),
        **({"reward_funcs": length_of} if name in REINFORCED else {}),
    )  # fmt: skip


def is_adapted(model: Any) -> bool:
    if isinstance(model, str):
        return Path(model, "adapter_config.json").is_file()
    return isinstance(model, (LoraModel, peft.PeftModel))


def records(trainer: Any) -> list[dict[str, float]]:
    """What a run logs at each step and evaluation, but the time it takes."""
    times = ("time", "per_second", "memory")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in times)}
        for entry in trainer.state.log_history
    ]


def compare(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Losses, rewards, divergences, entropies, gradient norms, …: within the rounding of their largest value."""
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for name in {name for entry in expected for name in entry}:
        ours, theirs = (torch.tensor([e[name] for e in entries if name in e]) for entries in (found, expected))
        # The values of REINFORCED are differences of log-probabilities of about 100.
        assert (ours - theirs).abs().max() <= 2e-6 + 2e-5 * theirs.abs().max(), (name, ours, theirs)


def storages(*models: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for model in models for tensor in model.parameters()}


def runs_of_both(name: str, base: str, folder: Path, **settings: Any) -> list[Any]:
    """The same run of the mixin and of the trainer over PEFT's model, finished; there is one base in each of ours."""
    runs = [made(name, ours, base, folder / str(ours), **settings) for ours in (True, False)]
    held = [value for value in vars(runs[0]).values() if isinstance(value, nn.Module)]
    assert storages(*held) == storages(runs[0].model)
    for run in runs:
        set_seed(0)  # the order of the rows
        run.train()
        run.evaluate()
    found, expected = map(records, runs)
    assert sum("loss" in entry for entry in found) == settings["max_steps"]
    compare(found, expected)
    return runs


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_the_first_steps_are_pefts(name: str, base: str, tmp_path: Path) -> None:
    runs_of_both(name, base, tmp_path, max_steps=3, save_strategy="no", **({"beta": 0.3} if name == "GRPO" else {}))


@pytest.mark.parametrize("name", ["DPO", "plain"])
def test_only_the_rate_that_nobody_chose_is_warned_of(name: str, base: str, messages: list[str]) -> None:
    """5e-5 is Trainer's default, and not that of TRL."""
    model = apply_lora(AutoModelForCausalLM.from_pretrained(base))
    cls = hf_lora.LoraDPOConfig if name == "DPO" else LoraTrainingArguments
    args = cls("out", learning_rate=5e-5, use_cpu=True)
    warn_at_start(model, args, model.dtype)
    assert len(messages) == (name == "plain")


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_the_losses_are_pefts_and_a_run_goes_on(name: str, base: str, tmp_path: Path) -> None:
    settings = {"max_steps": 20, "save_steps": 10}
    runs = runs_of_both(name, base, tmp_path, **settings)

    runs[0].save_model()
    resumed = made(name, True, base, tmp_path / "resumed", **settings)
    set_seed(0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-10"))
    resumed.save_model()
    last, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("True", "resumed"))
    assert last.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in last.items())

    if name in ("SFT", "Reward"):  # the reference of the others would be the adapter
        evaluated = made(name, True, LoraModel.from_pretrained(tmp_path / "True"), tmp_path / "evaluated")
        assert evaluated.evaluate()["eval_loss"] == pytest.approx(records(runs[0])[-1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_autocast_ends_with_each_forward(name: str, base: str, tmp_path: Path) -> None:
    trainer = made(name, True, base, tmp_path, bf16=True, max_steps=2, save_strategy="no")
    trainer.add_callback(hears := HearsAutocast())
    assert math.isfinite(trainer.train().training_loss)
    trainer.evaluate()
    assert [*hears.heard, torch.is_autocast_enabled("cpu")] == [False] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_an_adapter_is_continued_as_by_peft(name: str, base: str, tmp_path: Path) -> None:
    """The reference is the adapter as it was: in PEFT a second adapter, here the first values of the same one."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    randomize(apply_lora(AutoModelForCausalLM.from_pretrained(base), config)).save_pretrained(tmp_path / "sft")
    byte_tokenizer(PLAIN["chatml"]).save_pretrained(tmp_path / "sft")
    settings = {"beta": 0.3} if name in REINFORCED else {}
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "sft"), is_trainable=True
    )
    found = []
    for ours, model in ((True, str(tmp_path / "sft")), (False, theirs)):
        run = made(name, ours, model, tmp_path / str(ours), **settings)
        set_seed(0)
        run.train()
        entries = [entry for entry in run.state.log_history if "loss" in entry]
        found.append(torch.tensor([[entry["loss"], entry.get("kl", 0.0)] for entry in entries]))
    (loss, divergence), (wanted, of_peft) = (each.unbind(1) for each in found)
    assert torch.allclose(loss, wanted, rtol=2e-5, atol=1e-6), found
    # A difference of sums of about 100, each right to 24 bits, after steps that multiply its error.
    assert torch.allclose(divergence, of_peft, rtol=1e-3, atol=1e-5), found
    if name == "DPO":
        assert float(found[0][0, 0]) == pytest.approx(math.log(2), abs=1e-6)
    elif name in REINFORCED:
        assert float(found[0][0, 1]) == pytest.approx(0, abs=1e-6)
        assert float(found[0][-1, 1]) > 1e-4


@pytest.mark.slow
def test_a_reward_model_with_the_task_type_of_trls_flags_keeps_its_head(base: str, tmp_path: Path) -> None:
    """`ModelConfig` has CAUSAL_LM by default, with which PEFT does not save the head."""
    run = made(
        "Reward", True, AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "run"
    )
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    again = type(run)(
        model=model, args=run.args, train_dataset=datasets.Dataset.from_dict(DATA["Reward"]), peft_config=adapter,
        processing_class=run.processing_class,
    )  # fmt: skip
    again.train()
    again.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    ids = torch.arange(3, 11)[None]
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    fresh.score.weight.data.zero_()
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    assert torch.allclose(theirs(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_an_adapted_head_is_refused_and_one_trained_whole_is_merged(name: str, base: str, tmp_path: Path) -> None:
    """TRL's losses multiply by the weight of the head, so its adapter would stay untrained, as TRL says of PEFT's."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for call in (model, apply_lora(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=HEAD))):
        with pytest.raises(TargetError, match="the output head is adapted"):
            made(name, True, call, tmp_path, target_modules=HEAD)
    assert not isinstance(model, LoraModel)
    whole = made(name, True, model, tmp_path, max_steps=1, modules_to_save=["lm_head"])
    assert [n for n, p in whole.model.named_parameters() if p.requires_grad][-1] == "lm_head.copies.default.weight"
    assert "forward" in vars(whole.model)
    assert "forward" not in vars(whole.model.merge_and_unload())


class Prepares(Trainer):
    """Makes the inputs of the model itself, as trainers that generate completions do; not twice."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        assert "start" in inputs, "prepared already"
        ids = inputs["start"][:, None] + torch.arange(6)
        return super()._prepare_inputs({"input_ids": ids, "labels": ids})


class LoraPrepares(LoraTrainerMixin, Prepares):
    pass


@pytest.mark.parametrize("only_the_loss", [True, False])
def test_inputs_are_prepared_once(only_the_loss: bool, base: str, arguments: Any) -> None:
    from hf_lora import build_compute_metrics

    rows = [{"start": torch.tensor(i + 5), "labels": torch.tensor(i)} for i in range(4)]
    args = arguments(max_steps=2, remove_unused_columns=False, per_device_train_batch_size=2)
    metrics = None if only_the_loss else build_compute_metrics(["accuracy"])
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = Prepares(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    run = LoraPrepares(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    run.train()
    assert run.state.global_step == 2
