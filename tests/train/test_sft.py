"""`LoraSFTTrainer` against TRL's own trainer, and packed rows against rows one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import PLAIN, byte_tokenizer
from helpers import adapter_gradients, assert_same_tensors, randomize, snapshot, tiny_llama
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_lora import Conversation, LoraConfig, LoraModel, apply_lora, build_compute_metrics, generate_texts
from hf_lora.adapt.state import trained_format
from hf_lora.data.chat import chat_rows
from hf_lora.data.encode import as_in_training, encode_prompts
from hf_lora.data.formats import recognize_format
from hf_lora.data.prompts import read_answered
from hf_lora.data.tables import table_of
from hf_lora.errors import ConfigError, DataError, TargetError

trl = pytest.importorskip("trl", reason="the extra chat is not installed")
datasets = pytest.importorskip("datasets")

QUIET = dict(
    report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", bf16=False,
    dataloader_pin_memory=False, max_length=96, gradient_checkpointing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(PLAIN["chatml"])


@pytest.fixture(scope="module")
def chats() -> Any:
    turns = ["Hello, world.", "a", "the user said hello", "so it goes on and on", "why?", "no"] * 2
    rows = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] + str(i)}]
        for i, text in enumerate(turns)
    ]
    return datasets.Dataset.from_dict({"messages": rows})


def llama(**config: Any) -> Any:
    """Each with the same weights, wide enough for the tokenizer and the packed rows."""
    return tiny_llama(vocab_size=400, max_position_embeddings=256, **config).float()


def adapted(model: Any, **config: Any) -> Any:
    return randomize(apply_lora(model, LoraConfig(r=4, **config)))


def sft(model: Any, tokenizer: Any, data: Any, tmp_path: Path, **values: Any) -> Any:
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    given = {
        k: values.pop(k) for k in ("eval_dataset", "compute_metrics", "lora_config", "peft_config") if k in values
    }
    arguments = LoraSFTConfig(str(tmp_path / "run"), **{**QUIET, **values})
    return LoraSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, **given)


def labeled(tokenizer: Any, chats: Any) -> Any:
    rows, _ = chat_rows(table_of(chats, "chats"), recognize_format(table_of(chats, "chats")), tokenizer, 96)
    return datasets.Dataset.from_list(rows)


def one_step(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    tokens = (batch["labels"] != -100).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
    loss.backward()
    return loss.detach(), adapter_gradients(trainer.model), dict(trainer._metrics["train"])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_gradients_and_metrics_are_trls(
    packing: bool, loss_type: str, tokenizer: Any, chats: Any, tmp_path: Path
) -> None:
    data = labeled(tokenizer, chats)
    arguments = trl.SFTConfig(str(tmp_path), packing=packing, loss_type=loss_type, **QUIET)
    theirs = one_step(trl.SFTTrainer(adapted(llama()), arguments, train_dataset=data, processing_class=tokenizer))
    ours = one_step(sft(adapted(llama()), tokenizer, chats, tmp_path, packing=packing, loss_type=loss_type))
    eps = torch.finfo(torch.float32).eps
    assert torch.isclose(ours[0], theirs[0], rtol=16 * eps)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 256 * eps * gradient.norm(), name
    for name, values in theirs[2].items():
        assert ours[2][name] == pytest.approx(values, rel=1e-5), name


def mamba() -> Any:
    """It keeps a state over the whole row, so packed documents are padded."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=2))


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")  # TRL's, where the head's loss does not fit
@pytest.mark.parametrize("make", [llama, mamba])
def test_packed_rows_cost_the_same_loss_a_token_as_rows_one_by_one(
    make: Any, tokenizer: Any, chats: Any, tmp_path: Path, messages: list[str]
) -> None:
    model = adapted(make()).double()
    results = []
    for values in ({"packing": True, "max_length": 256}, {"packing": False, "per_device_eval_batch_size": 3}):
        trainer = sft(
            model, tokenizer, chats, tmp_path, eval_dataset=chats, **values,
            compute_metrics=build_compute_metrics(["accuracy", "perplexity"]),
        )  # fmt: skip
        assert (len(trainer.train_dataset) < len(chats)) is values["packing"]
        metrics = trainer.evaluate()
        results.append((metrics["eval_perplexity"], metrics["eval_accuracy"]))
        model.__dict__.pop("forward")
    rows = labeled(tokenizer, chats)
    total, right, count = 0.0, 0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1][labels != -100]
        labels = labels[labels != -100]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    expected = (torch.tensor(total / count).exp().item(), right / count)
    assert results[0] == pytest.approx(expected, rel=1e-5)
    assert results[1] == pytest.approx(expected, rel=1e-5)
    assert any("padded instead of packed" in text for text in messages) is (make is mamba)


def test_it_trains_saves_the_adapter_alone_and_resumes(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    values = dict(
        max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2, lora_r=4, max_length=64,
        per_device_train_batch_size=1, lora_dropout=0.1,
    )  # fmt: skip
    whole = sft(llama(), tokenizer, chats, tmp_path / "a", **values)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = sft(llama(), tokenizer, chats, tmp_path / "b", **values)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_tensors(snapshot(resumed.model), snapshot(whole.model))
    assert whole.model.config._attn_implementation == "sdpa"


class HearsAutocast(TrainerCallback):
    def __init__(self) -> None:
        self.heard: list[bool] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append(torch.is_autocast_enabled("cpu"))


def test_autocast_ends_with_the_forward(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    """Also where the loss over the head is compared with the model's own within it."""
    trainer = sft(adapted(llama()), tokenizer, chats, tmp_path, bf16=True, max_steps=2, muon_learning_rate=0.01)
    trainer.add_callback(hears := HearsAutocast())
    result = trainer.train()
    assert hears.heard == [False, False]
    assert not torch.is_autocast_enabled("cpu")
    assert math.isfinite(result.training_loss)
    assert trainer.head_loss.line().startswith("loss: over the frozen lm_head")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    plain = one_step(sft(adapted(llama()), tokenizer, chats, tmp_path))
    trainer = sft(
        adapted(llama()), tokenizer, chats, tmp_path, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    enable = getattr(trainer.model, "activation_checkpointing_enable", trainer.model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    trainer.model.enable_input_require_grads()
    found = one_step(trainer)
    assert torch.equal(found[0], plain[0])
    assert_same_tensors(found[1], plain[1])


def test_after_merging_nothing_of_the_trainer_is_left(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    for end in ("merge_and_unload", "unload"):
        trainer = sft(adapted(llama()), tokenizer, chats, tmp_path)
        assert "forward" in trainer.model.__dict__
        model = getattr(trainer.model, end)()
        assert "forward" not in model.__dict__
        assert not any(name.startswith("_loss") for name in model.__dict__)
        pickle.loads(pickle.dumps(model))


def test_an_adapted_head_is_refused_and_the_model_left_as_it_was(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(TargetError, match="the output head is adapted"):
        sft(model, tokenizer, chats, tmp_path, lora_target_modules=["q_proj", "lm_head"])
    assert not isinstance(model, LoraModel)
    assert_same_tensors(snapshot(model), before)


def test_a_head_trained_whole_learns(tokenizer: Any, chats: Any, tmp_path: Path, told: list[str]) -> None:
    trainer = sft(
        llama(), tokenizer, chats, tmp_path, lora_modules_to_save=["lm_head"], max_steps=2, learning_rate=1e-2
    )
    before = {k: v.clone() for k, v in trainer.model.named_parameters() if "copies" in k}
    trainer.train()
    assert before
    assert all(not torch.equal(v, before[k]) for k, v in trainer.model.named_parameters() if k in before)
    assert any("loss: the model's, over all logits" in text for text in told)


def test_the_folder_of_an_adapter_is_trained_on(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    llama().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    arguments = LoraSFTConfig(str(tmp_path / "run"), **QUIET, max_steps=1)
    trainer = LoraSFTTrainer(str(tmp_path / "adapter"), arguments, train_dataset=chats)
    assert_same_tensors(adapter_values(trainer.model), adapter_values(model))
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    trainer.train()
    assert trainer.state.global_step == 1


def adapter_values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_a_peft_config_counts_as_ours(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = sft(llama(), tokenizer, chats, tmp_path, peft_config=config)
    assert trainer.model.lora_configs["default"].r == 3
    with pytest.raises(ConfigError, match="both lora_config and peft_config"):
        sft(llama(), tokenizer, chats, tmp_path, peft_config=config, lora_config={"r": 2})


def test_the_assistant_alone_is_learned_by_default(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    trainer = sft(llama(), tokenizer, chats, tmp_path, packing=False)
    for row, text in zip(trainer.train_dataset, chats["messages"], strict=True):
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learned == text[1]["content"] + "<|im_end|>"
    everything = sft(llama(), tokenizer, chats, tmp_path, packing=False, assistant_only_loss=False)
    assert all(row["labels"] == row["input_ids"] for row in everything.train_dataset)
    silent = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    with pytest.raises(DataError, match="there is no assistant message"):
        sft(llama(), tokenizer, silent, tmp_path)


@pytest.mark.parametrize("packing", [True, False])
def test_the_end_of_an_answer_is_learned_where_rows_are_filled_up_with_it(
    packing: bool, chats: Any, tmp_path: Path
) -> None:
    """`pad_token = eos_token`: what is filled up must not be found by its token."""
    tokenizer = byte_tokenizer(PLAIN["chatml"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    trainer = sft(llama(), tokenizer, chats, tmp_path, packing=packing, per_device_train_batch_size=3)
    labels = [batch["labels"] for batch in trainer.get_train_dataloader()]
    assert sum(int((each == end).sum()) for each in labels) == len(chats)


def test_texts_are_prepared_by_trl(tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["abc", "d"], "completion": ["ef", "g"]})
    trainer = sft(llama(), tokenizer, data, tmp_path, packing=False)
    learned = [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]
    assert [tokenizer.decode(row) for row in learned] == ["ef</s>", "g</s>"]


def test_a_tokenizer_without_an_end_token_is_refused(chats: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no end token"):
        sft(llama(), byte_tokenizer(PLAIN["chatml"], eos=None), chats, tmp_path)


def test_arguments_of_another_trainer_become_ours(tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig, LoraTrainingArguments

    given = dict(
        output_dir=str(tmp_path), lora_r=3, lora_rank_pattern='{"q_proj": 2}', learning_rate=3e-3, warmup_steps=0.1,
        eval_strategy="epoch", report_to=["none"], use_cpu=True, label_names=["labels"], weight_decay=0.1,
    )  # fmt: skip
    one = LoraTrainingArguments(**given)
    other = LoraSFTConfig.of(one, packing=False, max_length=7)
    assert (other.packing, other.max_length) == (False, 7)
    for field in dataclasses.fields(LoraTrainingArguments):
        assert getattr(other, field.name) == getattr(one, field.name), field.name
    assert other.lora_config() == one.lora_config()


def test_unmodified_training_arguments_are_enough(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    from hf_lora import LoraSFTTrainer

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = LoraSFTTrainer(llama(), arguments, train_dataset=chats, processing_class=tokenizer)
    assert trainer.args.packing
    trainer.train()


def test_masters_stay_float32_over_a_4_bit_base(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plain, given = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config) for _ in range(2)
    )
    given = adapted(given)
    kept = snapshot(given)
    trainer = sft(given, tokenizer, chats, tmp_path, max_steps=2, per_device_train_batch_size=2)
    assert_same_tensors(snapshot(trainer.model), kept)  # TRL rounds them to bfloat16
    assert all(p.dtype == torch.float32 for p in given.parameters() if p.requires_grad)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in given.parameters() if p.requires_grad)
    norms = {n: p.dtype for n, p in plain.named_parameters() if p.dim() == 1}
    after = {n: p.dtype for n, p in sft(plain, tokenizer, chats, tmp_path).model.named_parameters()}
    assert norms == {n: after[n] for n in norms}


# The record of the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chats", "pairs", "texts", "function"])
def test_prompts_have_the_tokens_of_training(kind: str, tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    texts = ["Hello, world.", "why?"]
    data = {
        "chats": chats.select(range(2)),
        "pairs": datasets.Dataset.from_dict({"prompt": texts, "completion": [" a", " no"]}),
        "texts": datasets.Dataset.from_dict({"text": texts}),
        "function": datasets.Dataset.from_dict({"text": texts}),
    }[kind]
    values = {**QUIET, "packing": False, "assistant_only_loss": kind == "chats"}
    arguments = LoraSFTConfig(str(tmp_path / "run"), **values)
    function = {"formatting_func": lambda row: f"# {row['text']}"} if kind == "function" else {}
    trainer = LoraSFTTrainer(llama(), arguments, train_dataset=data, processing_class=tokenizer, **function)
    trainer.save_model(str(tmp_path / "adapter"))
    trained = trained_format(LoraModel.from_pretrained(tmp_path / "adapter", base_model=llama()))
    if kind == "function":
        assert trained is None
        return
    prompts = [texts[0] if kind != "chats" else chats[0]["messages"][0]["content"]]
    ids = encode_prompts(tokenizer, *as_in_training(trained, prompts))[0]
    assert trainer.train_dataset[0]["input_ids"][: len(ids)] == ids
    assert trained.max_length == 96


MOODS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (mood | default('')) + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant' + (mood | default('')) + '\n' }}{% endif %}"
)


@pytest.mark.parametrize("moods", [["!", "!"], ["!", "?"], [None, None]])
def test_prompts_have_the_variables_that_all_chats_had(moods: list[Any], chats: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(MOODS)
    variables = [{"mood": mood} for mood in moods]
    data = chats.select(range(2)).add_column("chat_template_kwargs", variables)
    trainer = sft(llama(), tokenizer, data, tmp_path, packing=False)
    trainer.save_model(str(tmp_path / "adapter"))
    model = LoraModel.from_pretrained(tmp_path / "adapter", base_model=llama())
    trained = trained_format(model)
    assert trained is not None
    assert trained.variables == (variables[0] if moods == ["!", "!"] else None)
    prompt = chats[0]["messages"][:1]
    row = trainer.train_dataset[0]["input_ids"]
    ids = encode_prompts(tokenizer, [prompt], variables=trained.variables)[0]
    assert (row[: len(ids)] == ids) is (moods != ["!", "?"])
    with recorded_prompts() as seen:
        Conversation(model, tokenizer, max_new_tokens=1).say(prompt[0]["content"])
        generate_texts(model, tokenizer, [prompt], max_new_tokens=1)
    assert seen == [ids, ids]
    table = table_of(data, "rows")
    data_format = recognize_format(table, trained=trained)
    if moods == ["!", "?"]:
        with pytest.raises(DataError, match=r"row 1: chat_template_kwargs other than those of the training"):
            read_answered(table, data_format, tokenizer)
    else:
        assert len(read_answered(table, data_format, tokenizer)[0]) == 2
    table = table_of(chats.select(range(2)), "rows without the column")
    rows, _ = chat_rows(table, recognize_format(table, trained=trained), tokenizer, 96)
    assert (rows[0]["input_ids"] == row) is (moods != ["!", "?"])


@contextlib.contextmanager
def recorded_prompts() -> Any:
    """The tokens of each prompt that a model continues."""
    from transformers import GenerationMixin

    seen: list[list[int]] = []
    own = GenerationMixin.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"][0].tolist())
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate)
        yield seen
