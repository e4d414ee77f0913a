"""Every field of `SFTConfig`, every argument of `SFTTrainer` and every column of its datasets, against TRL's trainer.

A field or argument of a later TRL fails a test until it has a case here and a row in docs/language-models.md.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_templates import byte_tokenizer
from helpers import assert_same_tensors, snapshot, tiny_llama
from packaging.version import Version
from test_sft import QUIET, adapted, llama, one_step
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from hf_lora import LoraModel
from hf_lora.errors import ConfigError, DataError, TargetError

trl = pytest.importorskip("trl", reason="the extra chat is not installed")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, of fields that will be removed
DOCS = Path(__file__).parents[2] / "docs" / "language-models.md"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ (tone | default('')) + m['content'] + (end | default('<|im_end|>')) }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["Hello, world.", "a", "the user said hello", "so it goes on and on", "why?", "no"]
DATA: dict[str, dict[str, list[Any]]] = {
    "chats": {
        "messages": [
            [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word[::-1]} {i}"}] * (1 + i % 2)
            for i, word in enumerate(WORDS)
        ]
    },
    "pairs of chats": {
        "prompt": [
            [{"role": role, "content": word} for role in ("user", "assistant", "user")] for word in WORDS
        ],
        "completion": [[{"role": "assistant", "content": word[::-1]}] for word in WORDS],
    },
    "texts": {"text": WORDS},
    "bodies": {"body": WORDS, "text": ["not this"] * len(WORDS)},
    "pairs": {"prompt": WORDS, "completion": [word[::-1] for word in WORDS]},
    "tokens": {"input_ids": [[30 + i, 40, 50, 60] for i in range(6)], "labels": [[-100, 40, 50, 60]] * 6},
}  # fmt: skip
VARIABLES = {**DATA["chats"], "chat_template_kwargs": [{"tone": word} for word in WORDS]}
NOT_PACKED = {"packing": False, "assistant_only_loss": True, "max_length": 200}

CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "assistant_only_loss": [("chats", {}), ("chats", {"assistant_only_loss": False}), ("pairs of chats", {})],
    "completion_only_loss": [
        ("pairs of chats", {"completion_only_loss": False}), ("pairs of chats", {"completion_only_loss": True}),
        ("pairs", {"completion_only_loss": False, "assistant_only_loss": False}),
        ("chats", {"completion_only_loss": True}),
    ],
    "dataset_text_field": [("bodies", {"dataset_text_field": "body", "assistant_only_loss": False})],
    "dataset_num_proc": [("texts", {"dataset_num_proc": 1, "assistant_only_loss": False})],
    "dataset_kwargs": [("tokens", {"dataset_kwargs": {"skip_prepare_dataset": True}, "assistant_only_loss": False})],
    "eos_token": [
        ("texts", {"eos_token": "<|end|>", "assistant_only_loss": False}), ("chats", {"eos_token": "<|end|>"}),
    ],
    "max_length": [("chats", {"max_length": 40}), ("chats", {"max_length": None})],
    "truncation_mode": [("chats", {"max_length": 40, "truncation_mode": "keep_end"})],
    "shuffle_dataset": [("chats", {"shuffle_dataset": True})],
    "packing": [("chats", {"packing": True}), ("chats", {"packing": True, "max_length": 40})],
    "packing_strategy": [
        ("chats", {"packing": True, "packing_strategy": "bfd_split", "max_length": 40}),
        ("chats", {"packing": True, "packing_strategy": "wrapped", "max_length": 40}),
    ],
    "padding_free": [("chats", {"padding_free": True, "max_length": None})],
    "pad_to_multiple_of": [("chats", {"pad_to_multiple_of": 32})],
    "eval_packing": [("chats", {"eval_packing": True}), ("chats", {"packing": True, "eval_packing": False})],
    "pad_token": [("chats", {"pad_token": "<|end|>"})],
    "loss_type": [("chats", {"loss_type": "dft"})],
}  # fmt: skip
"""Field -> datasets and settings for which our rows, loss and gradients must be TRL's."""

DEFAULTS = (
    "learning_rate", "logging_steps", "gradient_checkpointing", "lr_scheduler_kwargs", "use_liger_kernel",
    "torch_empty_cache_steps",
)  # fmt: skip
"""Fields of `TrainingArguments` of which TRL changes the default or the help."""
ELSEWHERE = {
    "activation_offloading": "test_activations_are_offloaded_from_an_accelerator_alone",
    "bf16": "test_bfloat16_is_off_without_an_accelerator",
    "model_init_kwargs": "test_a_model_is_loaded_with_the_options",
    "trust_remote_code": "test_code_of_a_model_is_run_only_if_trusted",
    "router_aux_loss_coef": "test_the_loss_of_a_router_is_trls",
    "chat_template_path": "test_a_template_from_a_file_or_a_tokenizer",
}
"""Field -> its own test."""
ARGUMENTS = {
    "model": "test_a_model_is_loaded_with_the_options",
    "args": "CASES",
    "train_dataset": "CASES",
    "eval_dataset": "CASES",
    "processing_class": "CASES",
    "data_collator": "test_a_collator_is_used_or_refused",
    "compute_loss_func": "test_functions_of_the_caller_get_what_trl_passes",
    "compute_metrics": "test_functions_of_the_caller_get_what_trl_passes",
    "preprocess_logits_for_metrics": "test_functions_of_the_caller_get_what_trl_passes",
    "callbacks": "test_functions_of_the_caller_get_what_trl_passes",
    "optimizers": "test_optimizers_of_the_caller_train_the_adapter",
    "optimizer_cls_and_kwargs": "test_optimizers_of_the_caller_train_the_adapter",
    "quantization_config": "test_a_quantization_reaches_the_base_of_an_adapter",
    "peft_config": "test_sft.py",
    "formatting_func": "test_a_formatting_func_makes_the_texts",
}
"""Argument of `SFTTrainer` -> its test."""


def own_fields() -> set[str]:
    """The fields that TRL adds to `TrainingArguments`, or declares again."""
    classes = trl.SFTConfig.__mro__
    declared = {name for cls in classes[: classes.index(TrainingArguments)] for name in inspect.get_annotations(cls)}
    return declared & {field.name for field in dataclasses.fields(trl.SFTConfig)}


def documented() -> dict[str, str]:
    """First column -> the rest, of the table of fields and arguments."""
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_field_and_argument_has_a_case_and_is_documented() -> None:
    fields = {*CASES, *DEFAULTS, *ELSEWHERE}
    assert own_fields() == fields
    assert {*inspect.signature(trl.SFTTrainer.__init__).parameters} - {"self"} == set(ARGUMENTS)
    named = {*ELSEWHERE.values(), *ARGUMENTS.values()} - {"CASES", "test_sft.py"}
    assert named <= globals().keys()
    assert {*CASES, *ELSEWHERE, *ARGUMENTS, "chat_template_kwargs"} - documented().keys() == set()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted(llama())


def rows_of(data: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in data]


def made(ours: bool, model: Any, tokenizer: Any, data: Any, folder: Path, given: Any = None, **settings: Any) -> Any:
    """Our trainer or TRL's. Both change the tokenizer and the model's forward, so each has its own."""
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    config, trainer = (LoraSFTConfig, LoraSFTTrainer) if ours else (trl.SFTConfig, trl.SFTTrainer)
    model.__dict__.pop("forward", None)
    values = {**QUIET, **NOT_PACKED, **settings}
    return trainer(
        model, config(str(folder), **values), train_dataset=data, processing_class=copy.deepcopy(tokenizer),
        **{"eval_dataset": data, **(given or {})},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"), [
        pytest.param(*case, marks=[pytest.mark.slow] if field == "dataset_num_proc" else [])  # starts processes
        for field, cases in CASES.items() for case in cases
    ],
    ids=[f"{field} {i}" for field, cases in CASES.items() for i in range(len(cases))],
)  # fmt: skip
def test_rows_loss_and_gradients_are_trls(
    name: str, settings: dict[str, Any], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    data = datasets.Dataset.from_dict(DATA[name])
    found = []
    for ours in (True, False):
        if not ours and name == "bodies":
            data = data.remove_columns("text")
        given = {"eval_dataset": data if "eval_packing" in settings else None}
        trainer = made(ours, model, tokenizer, data, tmp_path, given, **settings)
        assert trainer.args.assistant_only_loss is {**NOT_PACKED, **settings}["assistant_only_loss"]
        found.append((rows_of(trainer.train_dataset), rows_of(trainer.eval_dataset or ()), *one_step(trainer)))
        found[-1] += (trainer.processing_class.pad_token_id, trainer.processing_class.eos_token_id)
    (train, evaluated, loss, gradients, metrics, *ends), theirs = found[0], found[1]
    assert train == theirs[0]
    assert evaluated == theirs[1]
    eps = torch.finfo(torch.float32).eps
    assert torch.isclose(loss, theirs[2], rtol=16 * eps)
    for key, gradient in theirs[3].items():
        assert (gradients[key] - gradient).norm() <= 256 * eps * gradient.norm(), key
    for key, values in theirs[4].items():
        assert metrics[key] == pytest.approx(values, rel=1e-5), key
    assert ends == list(theirs[5:])


STREAMED: list[tuple[dict[str, list[Any]], dict[str, Any]]] = [
    (DATA["chats"], {}),
    (DATA["chats"], {"packing": True}),
    (DATA["chats"], {"max_length": 40, "truncation_mode": "keep_end"}),
    (VARIABLES, {}),
    (DATA["pairs of chats"], {"completion_only_loss": False}),
    (DATA["texts"], {"assistant_only_loss": False}),
]


@pytest.mark.parametrize(("rows", "settings"), STREAMED)
def test_streamed_rows_are_those_of_trl_and_of_a_whole_dataset(
    rows: dict[str, list[Any]], settings: dict[str, Any], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    whole = datasets.Dataset.from_dict(rows)
    streamed = whole.to_iterable_dataset()
    given = {**settings, "max_steps": 1}
    ours = made(True, model, tokenizer, streamed, tmp_path, **given)
    theirs = made(False, model, tokenizer, streamed, tmp_path, **given)
    found = [(rows_of(t.train_dataset), rows_of(t.eval_dataset)) for t in (ours, theirs)]
    assert found[0] == found[1]
    assert found[0][0] == rows_of(made(True, model, tokenizer, whole, tmp_path, **given).train_dataset)
    if settings.get("packing"):
        ours.train()
        assert ours.state.global_step == 1


def test_datasets_of_a_later_evaluation_are_prepared_as_in_training(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    data = datasets.Dataset.from_dict(VARIABLES)
    found = []
    for ours in (True, False):
        trainer = made(ours, model, tokenizer, data, tmp_path, {"eval_dataset": None})
        trainer.model.eval()
        found.append([trainer.evaluate(data)["eval_loss"], trainer.evaluate({"a": data})["eval_a_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_chat_without_an_answer_in_a_stream_names_its_row(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*DATA["chats"]["messages"], [{"role": "user", "content": "a"}]]
    data = datasets.Dataset.from_dict({"messages": rows}).to_iterable_dataset()
    trainer = made(True, model, tokenizer, data, tmp_path, {"eval_dataset": None}, max_steps=1)
    with pytest.raises(DataError, match=r"train, row 7, column 'messages': there is no assistant message"):
        list(trainer.train_dataset)


def test_variables_of_the_template_are_those_of_the_row(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    for data in (VARIABLES, {**DATA["pairs of chats"], "chat_template_kwargs": VARIABLES["chat_template_kwargs"]}):
        data = datasets.Dataset.from_dict(data)
        ours, theirs = (made(ours, model, tokenizer, data, tmp_path) for ours in (True, False))
        assert rows_of(ours.train_dataset) == rows_of(theirs.train_dataset)
        text = tokenizer.decode([token for token in ours.train_dataset[0]["labels"] if token != -100])
        assert text.startswith(WORDS[0])
    wrong = datasets.Dataset.from_dict({**DATA["chats"], "chat_template_kwargs": [{"tools": "a"}] * 6})
    with pytest.raises(DataError, match="chat_template_kwargs may not set tools"):
        made(True, model, tokenizer, wrong, tmp_path)


def text_of(row: dict[str, Any]) -> str:
    return " / ".join(message["content"] for message in row["messages"])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_formatting_func_makes_the_texts(streamed: bool, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    chats, texts = (
        datasets.Dataset.from_dict(rows)
        for rows in (DATA["chats"], {"body": [text_of({"messages": row}) for row in DATA["chats"]["messages"]]})
    )
    settings = {"max_steps": 1, "dataset_text_field": "body", "assistant_only_loss": False}
    theirs = made(False, model, tokenizer, texts, tmp_path, **settings)
    if streamed:
        chats = chats.to_iterable_dataset()
    for only in (False, True):
        values = settings | {"assistant_only_loss": only}
        ours = made(True, model, tokenizer, chats, tmp_path, {"formatting_func": text_of}, **values)
        assert rows_of(ours.train_dataset) == rows_of(theirs.train_dataset)
        assert rows_of(ours.eval_dataset) == rows_of(theirs.eval_dataset)
    given = {"formatting_func": lambda row: ["a"]}
    with pytest.raises(ConfigError, match="must return the text of one row as a str, not a list"):
        list(made(True, model, tokenizer, chats, tmp_path, given, **settings).train_dataset)


def test_packing_keeps_the_ends_of_rows_if_asked(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's packing keeps their beginnings whatever the mode."""
    for name, only in (("chats", True), ("texts", False)):
        data = datasets.Dataset.from_dict(DATA[name])
        settings = {"max_length": 12, "truncation_mode": "keep_end", "assistant_only_loss": only}
        padded = made(False, model, tokenizer, data, tmp_path, **settings)
        packed = made(True, model, tokenizer, data, tmp_path, packing=True, **settings)
        documents = []
        for row in packed.train_dataset:
            at = 0
            for length in row["seq_lengths"]:
                documents.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
                at += length
        assert sorted(documents) == sorted(rows_of(padded.train_dataset))


def test_bfloat16_is_off_without_an_accelerator(tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig

    given: dict[str, Any] = {"report_to": "none", "use_cpu": True}
    ours, theirs = (config(str(tmp_path), **given) for config in (LoraSFTConfig, trl.SFTConfig))
    assert ours.bf16 is torch.accelerator.is_available()
    assert LoraSFTConfig(str(tmp_path), bf16=True, **given).bf16
    differ = {"packing", "assistant_only_loss", "bf16"}
    for field in dataclasses.fields(trl.SFTConfig):
        same = getattr(ours, field.name) == getattr(theirs, field.name)
        assert same or field.name in {*differ, "logging_dir", "local_rank"}, field.name


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter, with the tokenizer beside the base alone."""
    top = tmp_path_factory.mktemp("folders")
    llama().save_pretrained(top / "base")
    tokenizer.save_pretrained(top / "base")
    adapted(AutoModelForCausalLM.from_pretrained(top / "base")).save_pretrained(top / "adapter")
    return top / "base", top / "adapter"


def test_a_model_is_loaded_with_the_options(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    data = datasets.Dataset.from_dict(DATA["chats"])
    config = LoraSFTConfig(str(tmp_path), model_init_kwargs={"dtype": "bfloat16"}, **QUIET)
    for folder in folders:
        trainer = LoraSFTTrainer(str(folder), config, train_dataset=data)
        assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert trainer.processing_class.chat_template == TEMPLATE
        assert config.model_init_kwargs == {"dtype": "bfloat16"}
        assert config.assistant_only_loss


CODE = """
from transformers import LlamaForCausalLM

class OwnModel(LlamaForCausalLM):
    pass
"""


def test_code_of_a_model_is_run_only_if_trusted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import json
    import shutil

    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    base = shutil.copytree(folders[0], tmp_path / "base")
    (base / "own.py").write_text(CODE)
    values = json.loads((base / "config.json").read_text())
    values |= {"auto_map": {"AutoModelForCausalLM": "own.OwnModel"}, "architectures": ["OwnModel"]}
    (base / "config.json").write_text(json.dumps(values))
    data = datasets.Dataset.from_dict(DATA["chats"])
    for trusted in (True, False):
        given = {"trust_remote_code": trusted, "lora_task_type": "CAUSAL_LM"}
        config = LoraSFTConfig(str(tmp_path / "run"), **given, **QUIET)
        trainer = LoraSFTTrainer(str(base), config, train_dataset=data)
        assert (type(trainer.model).__name__ == "OwnModel") is trusted
        if trusted:
            trainer.model.save_pretrained(tmp_path / "adapter")
            again = LoraSFTTrainer(str(tmp_path / "adapter"), config, train_dataset=data)
            assert type(again.model).__name__ == "OwnModel"


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5])
def test_the_loss_of_a_router_is_trls(coefficient: float | None, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, router_aux_loss_coef=0.02,
    )  # fmt: skip
    model = adapted(MixtralForCausalLM(config), target_modules=["q_proj", "v_proj"])
    data = datasets.Dataset.from_dict(DATA["chats"])
    found = []
    for ours in (True, False):
        trainer = made(ours, model, tokenizer, data, tmp_path, router_aux_loss_coef=coefficient)
        trainer.current_gradient_accumulation_steps = 1  # set by Trainer's loop
        found.append(one_step(trainer))
    assert torch.isclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][2].keys() == found[1][2].keys()
    assert ("aux_loss" in found[0][2]) is (coefficient != 0.0)


def test_activations_are_offloaded_from_an_accelerator_alone(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(DATA["chats"])
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match="activation_offloading moves activations from an accelerator"):
            made(True, model, tokenizer, data, tmp_path, activation_offloading=True)
        return
    found = []
    for offloads in (True, False):
        mine = copy.deepcopy(model)
        given = {"activation_offloading": offloads, "use_cpu": False, "max_steps": 2, "learning_rate": 1e-2}
        made(True, mine, tokenizer, data, tmp_path, **given).train()
        found.append(snapshot(mine.cpu()))
    assert_same_tensors(*found)


def test_a_template_from_a_file_or_a_tokenizer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(DATA["chats"])
    bare = byte_tokenizer()
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE.replace("<|im_start|>", "<|user|>"))
    ours, theirs = (made(o, model, bare, data, tmp_path / "a", chat_template_path=str(own)) for o in (True, False))
    assert rows_of(ours.train_dataset) == rows_of(theirs.train_dataset)
    assert ours.train_dataset[0]["input_ids"][0] == bare.convert_tokens_to_ids("<|user|>")

    base = tiny_llama(vocab_size=len(bare) + -len(bare) % 64, max_position_embeddings=256).float()
    base.save_pretrained(tmp_path / "base")
    wanted: list[str] | None = None
    more = copy.deepcopy(tokenizer)
    more.add_tokens([f"<|new {i}|>" for i in range(70)])
    for name, source in (("same", tokenizer), ("more", more)):
        source.save_pretrained(tmp_path / name)
        given = {"chat_template_path": str(tmp_path / name), "max_steps": 1}
        mine, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
        if name == "more":  # no file would have the rows of the new tokens
            with pytest.raises(TargetError, match="modules_to_save=") as caught:
                made(True, mine, bare, data, tmp_path / "b", **given)
            wanted = ast.literal_eval(re.findall(r"modules_to_save=(\[.*?\])", str(caught.value))[0])
            mine = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        ours = made(True, mine, bare, data, tmp_path / "b", lora_modules_to_save=wanted, **given)
        theirs = made(False, reference, bare, data, tmp_path / "b", **given)
        assert rows_of(ours.train_dataset) == rows_of(theirs.train_dataset)
        assert ours.processing_class.get_vocab() == theirs.processing_class.get_vocab()
        assert mine.config.vocab_size == reference.config.vocab_size
        ours.train()
        ours.save_model(str(tmp_path / "adapter"))
        again = LoraModel.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "base"))
        ids = {"input_ids": torch.tensor([[3, 40, mine.config.vocab_size - 1]])}
        assert torch.equal(again(**ids).logits, mine.eval()(**ids).logits)


SEES = (
    "{% macro text(m) %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{% endmacro %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ text(m) + '<|im_end|>' }}{% endgeneration %}{% else %}{{ text(m) + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("images", [True, False])
def test_a_processor_of_images_renders_the_chats_as_in_trl(images: bool, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    if images and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL refuses assistant_only_loss for images with this transformers")
    words = byte_tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    words.image_token = "<image>"
    size = {"height": 28, "width": 28}
    pixels = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = transformers.LlavaProcessor(
        pixels(size={"shortest_edge": 28}, crop_size=size), words, patch_size=14,
        vision_feature_select_strategy="default", chat_template=SEES, num_additional_image_tokens=1,
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**small, vocab_size=448, max_position_embeddings=256),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = adapted(transformers.LlavaForConditionalGeneration(config), target_modules=["gate_proj"])
    rows: dict[str, list[Any]] = {"messages": [row[:2] for row in DATA["chats"]["messages"]]}
    if images:
        rows["images"] = [[pil.new("RGB", (28, 28), (40 * i, 9, 9))] for i in range(len(WORDS))]
    data = datasets.Dataset.from_dict(rows)
    found = []
    for ours in (True, False):
        trainer = made(ours, model, processor, data, tmp_path, {"eval_dataset": None})
        assert trainer.args.assistant_only_loss
        torch.manual_seed(0)
        batch = next(iter(trainer.get_train_dataloader()))
        found.append((batch["input_ids"].tolist(), batch["labels"].tolist(), float(one_step(trainer)[0])))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    learned = [token for token in found[0][1][0] if token != -100]
    assert 0 < len(learned) < len(found[0][1][0])


class Collator:
    """A collator of the caller: labels nothing but the last token."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"][:4] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.where(ids == ids[:, -1:], -100),
        }


def test_a_collator_is_used_or_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(DATA["chats"])
    given = {"data_collator": Collator()}
    ours, theirs = (one_step(made(o, model, tokenizer, data, tmp_path, given)) for o in (True, False))
    assert torch.isclose(ours[0], theirs[0], rtol=1e-5)
    with pytest.raises(ConfigError, match="a data_collator is for rows that are not packed"):
        made(True, model, tokenizer, data, tmp_path, given, packing=True)


def test_functions_of_the_caller_get_what_trl_passes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    data = datasets.Dataset.from_dict(DATA["chats"])
    found = []
    for ours in (True, False):
        seen: list[Any] = []

        class Seen(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, seen: Any = seen, **kwargs: Any) -> None:
                seen.append("evaluated")

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return outputs.logits[..., :5].square().mean() + (labels != -100).sum()

        given = {
            "compute_loss_func": loss, "callbacks": [Seen()],
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            "compute_metrics": lambda p: {"hits": (p.predictions == p.label_ids).sum(), "rows": len(p.label_ids)},
        }  # fmt: skip
        trainer = made(ours, model, tokenizer, data, tmp_path, given)
        step = one_step(trainer)
        trainer.model.eval()
        metrics = trainer.evaluate()
        found.append((float(step[0]), seen, {k: metrics[k] for k in ("eval_loss", "eval_hits", "eval_rows")}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1] == ["evaluated"]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)


def test_optimizers_of_the_caller_train_the_adapter(tokenizer: Any, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(DATA["chats"])
    plain = llama()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    for model, given in (
        (plain, {"optimizers": (sgd, None)}),
        (llama(), {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}),
    ):
        trainer = made(True, model, tokenizer, data, tmp_path, given, max_steps=1, lr_scheduler_type="constant")
        before = snapshot(trainer.model)
        trainer.train()
        moved = {name for name, value in snapshot(trainer.model).items() if not torch.equal(value, before[name])}
        assert moved == {name for name, _ in trainer.model.named_parameters() if "lora_B" in name}
        assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) is torch.optim.SGD


def test_a_quantization_reaches_the_base_of_an_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    data = datasets.Dataset.from_dict(DATA["chats"])
    for folder in folders:
        trainer = LoraSFTTrainer(
            str(folder), LoraSFTConfig(str(tmp_path), **QUIET), train_dataset=data,
            quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        )  # fmt: skip
        assert isinstance(trainer.model, LoraModel)
        assert trainer.model.is_quantized


def test_arguments_of_the_mixin_and_former_names_are_accepted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    data = datasets.Dataset.from_dict(DATA["chats"])
    model.__dict__.pop("forward", None)
    trainer = LoraSFTTrainer(
        model, LoraSFTConfig(str(tmp_path), **QUIET), train_dataset=data, tokenizer=tokenizer, accept_ddp_fallback=True
    )
    assert trainer.processing_class is tokenizer
    with pytest.raises(TypeError, match="no_such_argument"):
        LoraSFTTrainer(model, train_dataset=data, no_such_argument=1)
