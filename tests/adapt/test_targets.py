"""Which layers a configuration finds; what it refuses, all faults at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_near, batch_for, randomize, snapshot, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from hf_lora import LoraConfig, LoraModel, StateError, TargetError, apply_lora, explain_targets
from hf_lora.adapt.merge import merge
from hf_lora.adapt.walk import adapter_layers, replacements


def names_of(model: Any, **config: Any) -> list[str]:
    return [t.name for t in explain_targets(model, LoraConfig(**config)).layers]


def refused(model: nn.Module, config: LoraConfig | None = None, **kwargs: Any) -> str:
    """The message of the refusal; the model must be as it was."""
    before, classes = snapshot(model), {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(TargetError) as error:
        apply_lora(model, config or LoraConfig(**kwargs))
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(p.requires_grad for p in model.parameters())
    return str(error.value)


BLOCK = [
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
]  # fmt: skip
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    bert = [f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in BLOCK]
    assert names_of(tiny_bert()) == [*bert, "bert.pooler.dense"]
    llama = [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in [*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    ]
    assert names_of(tiny_llama()) == llama
    gpt2 = [f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert names_of(tiny_gpt2()) == gpt2
    assert "lm_head" not in names_of(tiny_t5())


def test_attention_is_the_linear_layers_of_attention_blocks() -> None:
    bert = [f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in BLOCK[:4]]
    assert names_of(tiny_bert(), target_modules="attention") == bert
    llama = [f"model.layers.{i}.{n}" for i in (0, 1) for n in LLAMA]
    assert names_of(tiny_llama(), target_modules="attention") == llama
    t5 = names_of(tiny_t5(), target_modules="attention")
    assert len(t5) == 12
    assert all("Attention" in name for name in t5)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query"]),
        (["self.query"], ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query"]),
        (["bert.encoder.layer.1.attention.self.query"], ["bert.encoder.layer.1.attention.self.query"]),
        (["1.attention.self.query"], ["bert.encoder.layer.1.attention.self.query"]),
        (r".*\.0\..*(query|value)", [f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "value")]),
        (["word_embeddings"], ["bert.embeddings.word_embeddings"]),
        ({"key"}, ["bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.1.attention.self.key"]),
        (("key",), ["bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.1.attention.self.key"]),
    ],
)  # fmt: skip
def test_names_suffixes_and_regexes(targets: Any, expected: list[str]) -> None:
    assert names_of(tiny_bert(), target_modules=targets) == expected
    model = apply_lora(tiny_bert(), LoraConfig(target_modules=targets, modules_to_save=[]))
    assert list(adapter_layers(model)) == expected


@pytest.mark.parametrize("targets", [["query"], "all-linear", r".*query"])
def test_our_matching_is_pefts(targets: Any) -> None:
    import peft

    config = dict(
        target_modules=targets, exclude_modules=["1.attention.self.query"], r=4,
        rank_pattern={"query": 2, r"layer\.0\.output\.dense": 3}, alpha_pattern={"self.query": 5},
    )  # fmt: skip
    if targets != "all-linear":
        del config["rank_pattern"]["layer\\.0\\.output\\.dense"]  # type: ignore[attr-defined]
    ours = {t.name: (t.r, t.scaling) for t in explain_targets(tiny_bert(), LoraConfig(**config, lora_alpha=6)).layers}
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(**config, lora_alpha=6, task_type="SEQ_CLS"))
    theirs = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }
    assert ours == theirs


@pytest.mark.parametrize(
    ("indices", "pattern"), [(1, None), ([1], None), ([1], "layer"), ([0, 1], ["layers", "layer"])]
)
def test_layers_to_transform(indices: Any, pattern: Any) -> None:
    found = names_of(tiny_bert(), target_modules=["query"], layers_to_transform=indices, layers_pattern=pattern)
    wanted = [indices] if isinstance(indices, int) else indices
    assert found == [f"bert.encoder.layer.{i}.attention.self.query" for i in wanted]
    preset = explain_targets(tiny_bert(), LoraConfig(layers_to_transform=indices, layers_pattern=pattern))
    assert len(preset.layers) == 6 * len(wanted)
    assert preset.skipped["bert.pooler.dense"] == "its layer is not in layers_to_transform"


def test_exclude_modules() -> None:
    plan = explain_targets(tiny_llama(), LoraConfig(exclude_modules=["k_proj", "layers.1.mlp.up_proj"]))
    assert len(plan.layers) == 14 - 3
    assert plan.skipped["model.layers.1.mlp.up_proj"] == "excluded by exclude_modules"
    assert len(names_of(tiny_llama(), exclude_modules=r".*layers\.0\..*")) == 7


def test_patterns_of_rank_and_alpha() -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "key", "value"], use_rslora=True,
        rank_pattern={"query": 2, r"layer\.1\..*key": 3}, alpha_pattern={r"^bert\.encoder\.layer\.0\..*value": 5},
    )  # fmt: skip
    model = apply_lora(tiny_bert(), config)
    found = {
        n.removeprefix("bert.encoder.layer."): m._lora.adapters["default"] for n, m in adapter_layers(model).items()
    }
    assert {n: (s.r, s.alpha) for n, s in found.items()} == {
        "0.attention.self.query": (2, 16), "0.attention.self.key": (8, 16), "0.attention.self.value": (8, 5),
        "1.attention.self.query": (2, 16), "1.attention.self.key": (3, 16), "1.attention.self.value": (8, 16),
    }  # fmt: skip
    assert all(s.scaling == s.alpha / s.r**0.5 for s in found.values())


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"target_modules": ["query", "valeu"]}, r"target_modules: 'valeu' matches nothing (did you mean 'value'"),
        ({"target_modules": ["uery"]}, r"target_modules: 'uery' matches nothing (did you mean 'query'"),
        ({"target_modules": r"query"}, r"target_modules: 'query' matches nothing"),
        ({"exclude_modules": ["kye"]}, r"exclude_modules: 'kye' excludes none of the targets (did you mean 'key'"),
        (
            {"target_modules": ["query"], "exclude_modules": ["key"]},
            "exclude_modules: 'key' excludes none of the targets",
        ),
        ({"rank_pattern": {"qurey": 4}}, "rank_pattern['qurey'] matches no adapted layer (did you mean 'query'"),
        (
            {"target_modules": ["key"], "alpha_pattern": {"query": 4}},
            "alpha_pattern['query'] matches no adapted layer",
        ),
        (
            {"modules_to_save": ["clasifier"]},
            "modules_to_save: 'clasifier' matches no module (did you mean 'classifier'",
        ),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: layer 7 contains no target"),
        (
            {"target_modules": ["classifier"]},
            "target_modules: 'classifier' matches only modules that are trained whole",
        ),
        ({"target_modules": ["LayerNorm"]}, "LayerNorm is not a supported kind of layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(config: dict[str, Any], text: str) -> None:
    assert text in refused(tiny_bert(), **config)


def test_a_layer_that_is_not_there_does_not_blame_the_target() -> None:
    message = refused(tiny_bert(), target_modules=["query"], layers_to_transform=[7])
    assert "layer 7 contains no target" in message
    assert "'query'" not in message
    message = refused(tiny_bert(), target_modules=["query", "pooler.dense"], layers_to_transform=[1])
    assert "'pooler.dense' matches only modules outside layers_to_transform" in message


def test_all_faults_come_in_one_error() -> None:
    message = refused(
        tiny_bert(), target_modules=["query", "valeu", "LayerNorm"], exclude_modules=["kye"],
        rank_pattern={"qurey": 4}, alpha_pattern={"keyy": 1},
        modules_to_save=["clasifier"], layers_to_transform=[0, 9],
    )  # fmt: skip
    for text in ("valeu", "LayerNorm is not a supported kind", "kye", "qurey", "keyy", "clasifier", "layer 9"):
        assert text in message, text
    assert message.startswith("apply_lora(model, config):\n  - ")
    assert message.splitlines()[-1].startswith("print(explain_targets(model, config))")


def test_a_suffix_that_also_matches_a_container_takes_the_layers() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "q": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    assert names_of(model, target_modules=["q"]) == ["a.q"]


def test_a_pattern_that_matches_containers_only_is_an_error() -> None:
    assert "target_modules: 'encoder' matches only containers of layers" in refused(
        tiny_bert(), target_modules=["query", "encoder"]
    )


def test_a_parametrized_weight_is_refused_by_name_and_skipped_by_the_preset() -> None:
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), weight_norm(nn.Conv1d(4, 4, 1)))
    message = refused(model, target_modules=["1", "2"])
    assert "1: its weight is computed from other tensors (a parametrization)" in message
    assert "2: its weight is computed" in message
    assert names_of(model) == ["0"]
    assert "parametrization" in explain_targets(model).skipped["1"]


def test_a_subclass_with_its_own_forward_is_refused_by_name() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    class Same(nn.Linear):
        """Its forward is that of nn.Linear."""

    model = nn.Sequential(Odd(4, 4), Same(4, 4), nn.Linear(4, 4))
    assert "0: Odd is not a supported kind of layer" in refused(model, target_modules=["0", "1"])
    assert names_of(model) == ["1", "2"]


def test_an_integer_weight_and_a_rewriting_embedding_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    del model[2].weight
    model[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError) as error:
        apply_lora(model, LoraConfig(target_modules=["0", "1", "2"]))
    assert "1: an embedding with max_norm rewrites its own weight in forward" in str(error.value)
    assert "2: its weight is a Parameter of torch.int8" in str(error.value)


def test_nothing_to_adapt_is_an_error() -> None:
    assert "target_modules='all-linear' finds no layer" in refused(nn.Sequential(nn.LayerNorm(4)))
    model = nn.Sequential(nn.Linear(4, 4))
    assert "selects no layer to adapt" in refused(model, target_modules=["0"], exclude_modules=["0"])


def test_a_model_that_holds_peft_layers_is_refused() -> None:
    import peft

    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(
            StateError, match=r"PEFT layer[\s\S]*LoraModel\.from_pretrained\(folder, base_model=base\)"
        ):
            apply_lora(model)
    model = apply_lora(wrapped.unload())
    assert isinstance(model, LoraModel)


def test_a_peft_config_is_a_config() -> None:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["query"], modules_to_save=["classifier"], use_rslora=True
    )
    model = apply_lora(tiny_bert(), config)
    assert model.lora_configs["default"].r == 4
    assert {m._lora.adapters["default"].scaling for m in adapter_layers(model).values()} == {3.0}


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "head"),
    [
        ("BertForSequenceClassification", "classifier"),
        ("BertForTokenClassification", "classifier"),
        ("BertForQuestionAnswering", "qa_outputs"),
        ("BertForMultipleChoice", "classifier"),
    ],
)
def test_a_task_head_is_found(cls: str, head: str) -> None:
    model = apply_lora(tiny_bert(cls=cls))
    assert list(replacements(model)) == [head]
    assert all(p.requires_grad for n, p in model.named_parameters() if f"{head}.copies.default" in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if f"{head}.base_layer" in n)
    assert any(f"{head}." in key for key in model.get_adapter_state_dict())


def test_a_language_models_output_is_no_head() -> None:
    for make in (tiny_llama, tiny_gpt2, tiny_t5):
        assert not replacements(apply_lora(make()))
    assert not replacements(apply_lora(tiny_bert(cls="BertForMaskedLM")))


def test_an_empty_list_means_no_head() -> None:
    model = apply_lora(tiny_bert(), LoraConfig(modules_to_save=[]))
    assert not replacements(model)
    assert not any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    targets = LoraConfig(target_modules=["query", "classifier"], modules_to_save=[])
    assert "classifier" in adapter_layers(apply_lora(tiny_bert(), targets))


def test_a_head_that_the_checkpoint_held_is_frozen_and_one_that_it_lacked_is_trained(tmp_path: Any) -> None:
    from transformers import BertForSequenceClassification

    tiny_bert().save_pretrained(tmp_path / "classifier")
    held = BertForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert not replacements(apply_lora(held))
    tiny_bert(cls="BertModel").save_pretrained(tmp_path / "backbone")
    lacked = BertForSequenceClassification.from_pretrained(tmp_path / "backbone", num_labels=4)
    assert explain_targets(lacked).saved == {"classifier": "not in the base checkpoint"}
    assert list(replacements(apply_lora(lacked))) == ["classifier"]


@pytest.mark.parametrize(
    ("task", "cls"),
    [("SEQ_CLS", "BertForSequenceClassification"), ("TOKEN_CLS", "BertForTokenClassification"),
     ("QUESTION_ANS", "BertForQuestionAnswering")],
)  # fmt: skip
def test_a_backbone_gets_the_tasks_own_class(task: str, cls: str) -> None:
    backbone = tiny_bert(cls="BertModel", labels=2)
    pointers = {n: p.data_ptr() for n, p in backbone.named_parameters()}
    model = apply_lora(backbone, LoraConfig(task_type=task), num_labels=None if task == "QUESTION_ANS" else 5)
    assert type(model).__name__ == cls
    assert model.bert is backbone
    assert {n: p.data_ptr() for n, p in backbone.named_parameters() if "lora" not in n} == pointers
    assert not any(p.is_meta for p in model.parameters())
    batch = batch_for(model, labels=False)
    output = model(**batch)
    if task == "SEQ_CLS":
        assert output.logits.shape == (2, 5)
        model(**batch, labels=torch.tensor([4, 0])).loss.backward()
    elif task == "TOKEN_CLS":
        assert output.logits.shape == (2, 9, 5)
    assert len(replacements(model)) == 1


def test_a_backbone_of_which_transformers_has_no_such_task_is_refused() -> None:
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    with pytest.raises(TargetError, match=r"no AutoModelForTokenClassification for ResNetModel"):
        apply_lora(model, LoraConfig(task_type="TOKEN_CLS", target_modules=["convolution"]))


def test_what_is_kept_whole_acts_and_is_the_adapters_own() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "layers.1.mlp"])
    model = apply_lora(tiny_llama(), config)
    assert sorted(replacements(model)) == ["model.layers.1.mlp", "model.norm"]
    batch = batch_for(model)
    base = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    randomize(model)
    y = model(**batch).logits
    assert not torch.allclose(y, base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "copies" in n)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(**batch).logits, y, atol=1e-4)
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()


# The table -----------------------------------------------------------------------------------------------------------


def test_the_table_lists_every_layer_and_what_is_left_out() -> None:
    model = tiny_bert()
    config = LoraConfig(r=4, exclude_modules=["key"], rank_pattern={"query": 2})
    plan = explain_targets(model, config)
    table = str(plan)
    lines = table.splitlines()
    assert lines[0].split() == ["layer", "shape", "r", "alpha", "parameters"]
    assert len({len(line) for line in lines[: len(plan.layers) + 2]}) == 1  # aligned
    row = next(line for line in lines if line.startswith("bert.encoder.layer.0.attention.self.query"))
    assert row.split() == ["bert.encoder.layer.0.attention.self.query", "32", "->", "32", "2", "8", "128"]
    total = sum(t.parameters for t in plan.layers)
    assert f"{len(plan.layers)} layers" in table
    assert f"{total:,}" in table
    assert "  classifier: the task head, outside the backbone" in table
    assert "  bert.encoder.layer.0.attention.self.key: excluded by exclude_modules" in table
    assert not isinstance(model, LoraModel)
    apply_lora(model, config)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trained == total


def test_explaining_an_adapted_model_gives_the_original_names() -> None:
    model = tiny_bert()
    before = str(explain_targets(model))
    apply_lora(model, LoraConfig(bias="all"))
    model.add_adapter("other", LoraConfig(modules_to_save=["pooler"]))
    assert str(explain_targets(model)) == before


def test_shared_layers_are_adapted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    apply_lora(model, LoraConfig(r=2))
    assert list(adapter_layers(model)) == ["a.0"]
    assert len(list(itertools.chain(shared.lora_A, shared.lora_B))) == 2


class Scaled(nn.Embedding):
    """An embedding as language models scale it."""

    def __init__(self, scale: Any = 3.0) -> None:
        super().__init__(20, 6)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class OneIsSpecial(Scaled):
    """One token has a vector of its own, as a marker of images has."""

    def __init__(self) -> None:
        super().__init__()
        self.special = nn.Parameter(torch.ones(6))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where((ids == 7)[..., None], self.special, super().forward(ids))


class Unscaled(Scaled):
    """It has the attribute and does not use it."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.Embedding.forward(self, ids)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["number", "tensor"])
def test_a_scaled_embedding_is_adapted_as_it_computes(scale: Any) -> None:
    model = nn.Sequential(Scaled(scale))
    apply_lora(model, LoraConfig(r=2, target_modules=["0"]))
    randomize(model)
    ids = torch.arange(20)[None]
    unmerged = model(ids)
    merge(model)
    assert_near(model(ids), unmerged, torch.float32, 8)


@pytest.mark.parametrize("kind", [OneIsSpecial, Unscaled])
def test_an_embedding_that_computes_something_else_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(TargetError, match="is not a supported kind of layer"):
        apply_lora(nn.Sequential(kind()), LoraConfig(r=2, target_modules=["0"]))
