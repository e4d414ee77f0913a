"""The labels in model and config are at every moment those of the head that runs."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers import batch_for, randomize, tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from hf_lora import ConfigError, LoraConfig, LoraModel, StateError, apply_lora
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import eject, inject
from hf_lora.adapt.state import Task, require_state, task_of
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter
from hf_lora.layers.copies import Replacement


class Labels(NamedTuple):
    names: tuple[str, ...]
    problem_type: str | None = None

    @property
    def table(self) -> dict[int, str]:
        return dict(enumerate(self.names))


BASE = Labels(("NEG", "POS"))
HEADS = {
    "base": BASE,
    "plain": BASE,  # no head
    "rows": BASE,  # a whole embedding, and no head
    "copied": BASE,  # a copy of the base's head
    "three": Labels(("news", "sport", "art")),
    "named": Labels(("no", "yes")),
}
"""Adapter -> the labels of its head; "base" for the base's head."""


def base() -> Any:
    model = tiny_bert(labels=2)
    model.config.id2label, model.config.label2id = BASE.table, {name: i for i, name in BASE.table.items()}
    return model


def with_all() -> Any:
    model = apply_lora(base(), LoraConfig(r=2, modules_to_save=[]), "plain")
    model.add_adapter("rows", LoraConfig(r=2, modules_to_save=["word_embeddings"]))
    model.add_adapter("copied", LoraConfig(r=2))
    model.add_adapter("three", LoraConfig(r=2), id2label=HEADS["three"].table)
    model.add_adapter("named", LoraConfig(r=2), id2label=HEADS["named"].table)
    return randomize(model)


def running_head(model: Any) -> str:
    """Whose head computes the logits, seen by hooks on every one of them."""
    head, called = model.classifier, []
    heads: dict[str, nn.Module] = {"base": head}
    if isinstance(head, Replacement):
        heads = {"base": head.base_layer, **dict(head.copies.items())}
    hooks = [m.register_forward_hook(lambda *_, name=name: called.append(name)) for name, m in heads.items()]
    with torch.no_grad():
        model(**batch_for(model, labels=False))
    for hook in hooks:
        hook.remove()
    (name,) = called
    return name


def assert_labels(model: Any, expected: Labels) -> None:
    config = model.config
    assert config.id2label == expected.table
    assert config.label2id == {name: i for i, name in expected.table.items()}
    assert model.num_labels == config.num_labels == len(expected.names)
    assert config.problem_type == expected.problem_type


def check(model: Any) -> None:
    assert_labels(model, HEADS[running_head(model)])


TOGETHER = [
    (), ("plain",), ("three",), ("named",), ("copied",), ("rows",), ("plain", "three"), ("three", "plain"),
    ("rows", "named"), ("rows", "three"), ("plain", "copied"), ("plain", "rows", "named"),
]  # fmt: skip


@pytest.mark.parametrize("active", TOGETHER, ids="+".join)
def test_labels_follow_the_head_that_runs(active: tuple[str, ...], tmp_path: Path) -> None:
    model = with_all()
    model.set_adapter(active)
    check(model)
    with model.disable_adapter():
        check(model)
        with model.disable_adapter():
            check(model)
        model.set_adapter("three")
        check(model)
        model.set_adapter(active)
        check(model)
    check(model)
    for verb in (model.disable_adapters, model.enable_adapters):
        verb()
        check(model)
    if active:
        model.merge_adapter()
        check(model)
        with model.disable_adapter():
            check(model)
        model.unmerge_adapter()
        check(model)
        merged = copy.deepcopy(model)
        expected, y = HEADS[running_head(merged)], model(**batch_for(model, labels=False)).logits
        merged = merged.merge_and_unload()
        assert_labels(merged, expected)
        merged.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert_labels(loaded, expected)
        torch.testing.assert_close(loaded(**batch_for(model, labels=False)).logits, y, atol=1e-3, rtol=1e-3)
    for name in [*active, *(name for name in model.lora_configs if name not in active)]:
        model.delete_adapter(name)
        check(model)
    model.set_adapter([])
    check(model)
    assert_labels(model.unload(), BASE)


def test_labels_over_random_verbs() -> None:
    choose = random.Random(0)
    model = with_all()
    for _ in range(60):
        verb: Callable[[], object] = choose.choice(
            [
                lambda: model.set_adapter([n for n in choose.choice(TOGETHER) if n in model.lora_configs]),
                lambda: model.set_adapter([n for n in choose.choice(TOGETHER) if n in model.lora_configs]),
                model.disable_adapters, model.enable_adapters, model.merge_adapter, model.unmerge_adapter,
                lambda: model.delete_adapter(choose.choice(list(HEADS))),
                lambda: model.add_adapter("three", LoraConfig(r=2), id2label=HEADS["three"].table),
                lambda: model.add_adapter("plain", LoraConfig(r=2, modules_to_save=[])),
            ]
        )  # fmt: skip
        with contextlib.suppress(StateError):
            verb()
        check(model)
    assert_labels(model.unload(), BASE)


def test_a_loaded_adapter_has_the_labels_of_its_head(tmp_path: Path) -> None:
    model = with_all()
    model.save_pretrained(tmp_path)
    loaded: Any = apply_lora(base(), LoraConfig(r=2, modules_to_save=[]), "plain")
    for name in ("three", "rows", "named"):
        loaded.load_adapter(tmp_path / name, name)
        check(loaded)
    loaded.set_adapter(["plain", "three"])
    check(loaded)
    loaded.set_adapter("plain")
    assert_labels(LoraModel.from_pretrained(tmp_path / "three", base_model=base()), HEADS["three"])
    assert_labels(LoraModel.from_pretrained(tmp_path / "three", base_model=base(), merge=True), HEADS["three"])


def test_labels_that_are_changed_belong_to_the_head_that_runs(tmp_path: Path) -> None:
    """A user may name the labels after the adapter was added; the first loss sets the type of the problem."""
    model = with_all()
    model.set_adapter("three")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model(**batch_for(model)).loss.backward()
    changed = dict(vars(model.config))
    model.set_adapter("named")
    check(model)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        check(model)
    model.set_adapter("three")
    assert vars(model.config) == changed
    model.set_adapter("named")
    loaded = LoraModel.from_pretrained(tmp_path / "three", base_model=base())
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.config.problem_type == "single_label_classification"
    assert_labels(model.unload(), BASE)


def test_labels_of_a_model_without_a_config_stay_with_the_adapter(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    inject(model, config, "named", task=Task.from_labels(None, HEADS["named"].table))
    state = require_state(model, "test")
    for names in ((), ("named",), ()):
        set_active(model, state, names)
        assert task_of(model, "named").id2label == HEADS["named"].table
    save_adapter(model, tmp_path, "named")
    eject(model)
    load_adapter(model, tmp_path, "again")
    assert task_of(model, "again").id2label == HEADS["named"].table


def test_pipelines_name_the_outputs_of_the_head_that_runs() -> None:
    words = {"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    model = with_all()
    classify: Any = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for active in TOGETHER:
        model.set_adapter(active)
        assert {each["label"] for each in classify(["a b"])[0]} == set(HEADS[running_head(model)].names)
        with model.disable_adapter():
            assert {each["label"] for each in classify(["a b"])[0]} == set(BASE.names)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"num_labels": -1}, "an integer >= 1"),
        ({"num_labels": 0}, "an integer >= 1"),
        ({"num_labels": True}, "an integer >= 1"),
        ({"num_labels": 2.5}, "an integer >= 1"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b", 2: "c"}}, "id2label has 3 names"),
        ({"id2label": {}}, "without gaps"),
        ({"id2label": {1: "a", 2: "b"}}, "without gaps"),
        ({"id2label": {"0": "a", "1": "b"}}, "must be the integers"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels: dict[str, Any], said: str) -> None:
    model = apply_lora(tiny_bert(), LoraConfig(r=2))
    before = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=said):
        apply_lora(tiny_bert(), LoraConfig(r=2), **labels)
    with pytest.raises(ConfigError, match=said):
        model.add_adapter("other", LoraConfig(r=2), **labels)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert list(model.lora_configs) == ["default"]


def test_labels_need_a_head_among_the_modules_that_are_trained() -> None:
    model = base()
    for labels in ({"num_labels": 2}, {"num_labels": 5}, {"id2label": {0: "no", 1: "yes"}}):
        with pytest.raises(StateError, match="no task head that depends on num_labels"):
            apply_lora(model, LoraConfig(r=2, modules_to_save=["pooler"]), **labels)
    assert not isinstance(model, LoraModel)
    assert_labels(model, BASE)


# The task type -------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
MADE: dict[str, Callable[[], Any]] = {
    "SEQ_CLS": base,
    "TOKEN_CLS": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, vocab_size=64)),
    "QUESTION_ANS": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL, vocab_size=64)),
    "CAUSAL_LM": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=64)),
    "SEQ_2_SEQ_LM": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=64)
    ),
}
"""Task type -> a model of a class for it."""


AUTO_PEFT = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
HEADS_OF = {"SEQ_CLS": ["classifier"], "TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}


@pytest.mark.parametrize("right", MADE)
def test_the_task_type_is_that_of_the_class(right: str, tmp_path: Path, messages: list[str]) -> None:
    """PEFT's auto class for the task type in the file is then one that loads the adapter."""
    peft = pytest.importorskip("peft")
    model = MADE[right]()
    model.save_pretrained(tmp_path / "base")
    for given in (*MADE, "FEATURE_EXTRACTION", None):
        messages.clear()
        adapted = randomize(
            apply_lora(
                type(model).from_pretrained(tmp_path / "base"),
                LoraConfig(r=2, task_type=given, modules_to_save=HEADS_OF.get(right)),
            )
        )
        said = [m for m in messages if "task_type" in m]
        assert len(said) == (given not in (right, None)), said
        assert adapted.lora_configs["default"].task_type == (right if given is not None else None)
        adapted.save_pretrained(tmp_path / "adapter")
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == right
    ids = {"input_ids": torch.arange(3, 11)[None]} | (
        {"decoder_input_ids": torch.arange(3, 7)[None]} if right == "SEQ_2_SEQ_LM" else {}
    )
    theirs = getattr(peft, AUTO_PEFT[right]).from_pretrained(str(tmp_path / "adapter"))
    found, expected = theirs.eval()(**ids)[0], adapted.eval()(**ids)[0]
    assert (found - expected).norm() <= 64 * torch.finfo(torch.float32).eps * expected.norm()


def test_a_file_with_the_task_type_of_another_class_is_corrected(tmp_path: Path, messages: list[str]) -> None:
    model = randomize(apply_lora(base(), LoraConfig(r=2)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "CAUSAL_LM"}))
    loaded = LoraModel.from_pretrained(tmp_path, base_model=base(), allow_other_base=True)
    assert [m for m in messages if "task_type='CAUSAL_LM' does not fit" in m]
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("given", ["CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_a_backbone_keeps_its_task_type(given: str, messages: list[str]) -> None:
    model = apply_lora(transformers.LlamaModel(transformers.LlamaConfig(**SMALL, vocab_size=64)), {"task_type": given})
    assert model.lora_configs["default"].task_type == given
    assert not [m for m in messages if "task_type" in m]
