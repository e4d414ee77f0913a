"""`LoraConfig`: PEFT's file format both ways, and every wrong field in one error."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
from helpers import tiny_llama

from hf_lora import AdapterFileError, ConfigError, LoraConfig, LoraModel, apply_lora, inspect_adapter
from hf_lora.config import OF_INITS
from hf_lora.errors import Faults
from hf_lora.foreign_fields import DESCRIPTIVE

FULL: dict[str, Any] = dict(
    r=5,
    lora_alpha=7.5,
    lora_dropout=0.25,
    target_modules=["q_proj", "v_proj"],
    exclude_modules=["layers.0.q_proj"],
    layers_to_transform=[0, 1],
    layers_pattern="layers",
    rank_pattern={"q_proj": 3},
    alpha_pattern={"v_proj": 6},
    use_rslora=True,
    bias="lora_only",
    modules_to_save=["score"],
    init_lora_weights="gaussian",
    fan_in_fan_out=True,
    task_type="SEQ_CLS",
    base_model_name_or_path="somewhere/base",
    revision="abc",
    trainable_token_indices={"embed_tokens": [3, 1]},
    ensure_weight_tying=True,
)


def test_every_field_goes_to_json_and_back() -> None:
    values = FULL | {"method": "other", "parts": {"rows": {"embed": [1]}}}  # ours alone
    assert set(values) | {"use_dora", "lora_bias", "alora_invocation_tokens", *OF_INITS} == {
        f.name for f in dataclasses.fields(LoraConfig)
    }
    assert not {"method", "parts"} & LoraConfig(**FULL).to_dict().keys()
    config = LoraConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_error_holds_every_fault_that_it_lists() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_dropout=2, bias="some")
    assert len(caught.value.faults) == 3
    assert all(f"  - {fault}" in str(caught.value) for fault in caught.value.faults)
    assert pickle.loads(pickle.dumps(caught.value)).faults == caught.value.faults
    faults = Faults("a call")
    for number in range(25):
        faults.add(f"fault {number}\n  - in two lines")
    with pytest.raises(ConfigError, match="and 5 more") as many:
        faults.check(ConfigError, "Next.")
    again = Faults("another call")
    again.include(many.value)
    again.include(ConfigError("a message"))
    assert again.found == [*faults.found, "a message"]


def test_the_error_of_a_file_holds_the_faults_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 0, "bias": "some", "target_modules": ["x"]}))
    with pytest.raises(AdapterFileError) as caught:
        inspect_adapter(tmp_path)
    assert len(caught.value.faults) == 2


def test_the_default_round_trip_resolves_alpha() -> None:
    config = LoraConfig(r=6)
    assert (config.lora_alpha, config.alpha) == (None, 12)
    again = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == dataclasses.replace(config, lora_alpha=12)


def test_peft_reads_what_we_write(tmp_path: Path) -> None:
    values = LoraConfig(**FULL).to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, peft.LoraConfig)
    for name, value in FULL.items():
        found = getattr(theirs, name)
        assert (sorted(found) if isinstance(found, set) else found) == value


@pytest.mark.parametrize("kwargs", [{}, FULL, {"target_modules": ".*q_proj"}, {"task_type": peft.TaskType.CAUSAL_LM}])
def test_we_read_what_peft_writes_and_its_objects(kwargs: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**{"target_modules": "all-linear", **kwargs})
    theirs.save_pretrained(tmp_path)
    from_file = LoraConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
    from_object = LoraConfig.from_any(theirs)
    for config in (from_file, from_object):
        for name in FULL:
            expected, found = getattr(theirs, name), getattr(config, name)
            if isinstance(expected, set):
                expected, found = sorted(expected), sorted(found)
            assert found == expected or (expected is None and found == {})


def test_pefts_alpha_where_a_file_names_none() -> None:
    """A missing field means PEFT's default there, ours here."""
    assert LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "r": 16}).alpha == 8
    assert LoraConfig.from_any({"target_modules": ["q"], "r": 16}).alpha == 32


def test_what_a_config_can_be_made_from() -> None:
    assert LoraConfig.from_any(None) == LoraConfig()
    given = LoraConfig(r=3)
    copied = LoraConfig.from_any(given)
    assert copied == given
    assert copied is not given
    for wrong in (3, "q_proj", [1]):
        with pytest.raises(ConfigError, match=type(wrong).__name__):
            LoraConfig.from_any(wrong)


def test_sets_and_tuples_become_lists() -> None:
    config = LoraConfig(target_modules={"v", "q"}, exclude_modules=("b", "a"), layers_to_transform=(1, 0))  # type: ignore[arg-type]
    assert config.target_modules == ["q", "v"]
    assert config.exclude_modules == ["b", "a"]
    assert config.layers_to_transform == [1, 0]


WRONG: dict[str, list[Any]] = {
    "r": [0, -1, 2.5, "8", True, None],
    "lora_alpha": ["8", math.nan, math.inf],
    "lora_dropout": [-0.1, 1.0, "0", None],
    "target_modules": [[], 3, [1], "(", None],
    "exclude_modules": [3, "("],
    "layers_to_transform": ["1", [1.5]],
    "rank_pattern": [{"q": 0}, {"q": 1.5}, {"(": 2}],
    "alpha_pattern": [{"q": "x"}],
    "bias": ["some", None, True],
    "modules_to_save": ["score", [3]],
    "init_lora_weights": [1.5, None, ["pissa"]],
    "method": [None, 3],
    "trainable_token_indices": ["3", [1.5], {"x": ["y"]}],
    "use_dora": ["yes", 1],
    "lora_bias": ["no", 1.0],
    "parts": [["rows"], 3, {1: 2}],
    "ensure_weight_tying": ["yes", 1],
    "task_type": ["SEQ_CLASS", "x"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_wrong_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        LoraConfig(**{name: value})


def test_all_wrong_fields_are_in_one_error() -> None:
    wrong = {n: values[0] for n, values in WRONG.items()}
    for make in (lambda: LoraConfig(**wrong), lambda: LoraConfig.from_dict({"peft_type": "LORA", **wrong})):
        with pytest.raises(ConfigError) as caught:
            make()
        assert all(f"\n  - {name}" in str(caught.value) for name in wrong)


def test_contradictions() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform cannot be used with a regular expression"):
        LoraConfig(target_modules=".*q", layers_to_transform=1)
    with pytest.raises(ConfigError, match="layers_pattern needs layers_to_transform"):
        LoraConfig(layers_pattern="h")


UNSUPPORTED: dict[str, Any] = dict(
    target_parameters=["experts.gate_up_proj"],
    layer_replication=[[0, 2]],
    use_qalora=True,
    qalora_group_size=32,
    use_bdlora={"nblocks": 2},
    megatron_config={"a": 1},
    arrow_config={"top_k": 3},
    velora_config={"num_groups": 4},
    kasa_config={"beta": 1},
    monteclora_config={"n": 4},
    from_the_future=3,
)
WITHOUT_EFFECT: dict[str, Any] = dict(
    auto_mapping={"base_model_class": "X"},
    inference_mode=False,
    peft_version="99",
    runtime_config={"ephemeral_gpu_offload": True},
    megatron_core="other.core",
    loftq_config={"loftq_bits": 4},
    eva_config={"rho": 2.0},
    corda_config={"corda_method": "kpm"},
    lora_ga_config={"scale": "stable"},
)


def test_each_field_of_peft_is_supported_or_has_no_effect_or_is_refused_with_the_reason() -> None:
    """Of the installed version: a new field must be put into one of the three groups."""
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)} - {"peft_type"}
    own = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields <= own | UNSUPPORTED.keys() | WITHOUT_EFFECT.keys()
    defaults = json.loads(json.dumps(peft.LoraConfig(target_modules="q").to_dict(), default=str))
    assert fields <= defaults.keys() | {"runtime_config"}
    values = {"peft_type": "LORA", "target_modules": ["q"]}
    assert LoraConfig.from_dict(defaults | values) == LoraConfig.from_dict(values)
    assert LoraConfig.from_dict(values | WITHOUT_EFFECT) == LoraConfig.from_dict(values)
    for name in UNSUPPORTED.keys() - {"from_the_future"}:
        with pytest.raises(ConfigError, match=rf"- {name}=.* is not supported: \w+ "):
            LoraConfig.from_dict(values | {name: UNSUPPORTED[name]})


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_changes_the_adapter_and_is_not_supported_is_named(name: str) -> None:
    values = {"peft_type": "LORA", "target_modules": ["q"], name: UNSUPPORTED[name]}
    with pytest.raises(ConfigError, match=f"- {name}=") as caught:
        LoraConfig.from_dict(values)
    assert "did you mean" not in str(caught.value)


def test_all_unsupported_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict({"peft_type": "IA3", "target_modules": ["q"], **UNSUPPORTED})
    assert all(f"- {name}=" in str(caught.value) for name in [*UNSUPPORTED, "peft_type"])


@pytest.mark.parametrize(("field", "method"), [("use_dora", "dora"), ("lora_bias", "lora_bias")])
def test_a_method_and_pefts_field_for_it_are_the_same(field: str, method: str) -> None:
    config = LoraConfig(target_modules=["q"], lora_alpha=8, **{field: True})  # type: ignore[arg-type]
    assert config == LoraConfig(target_modules=["q"], lora_alpha=8, method=method)
    assert config == LoraConfig.from_any(peft.LoraConfig(target_modules=["q"], **{field: True}))  # type: ignore[arg-type]
    assert (getattr(config, field), config.method) == (True, method)
    values = config.to_dict()
    assert (values["peft_type"], values[field], "method" in values) == ("LORA", True, False)
    assert LoraConfig.from_dict(values) == config
    assert LoraConfig.from_dict(values | {field: None}).method == "lora"


def test_a_layer_has_one_method() -> None:
    with pytest.raises(ConfigError, match="ask for dora, lora_bias, but a layer has one method"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="ask for lora_fa, dora"):
        LoraConfig(use_dora=True, method="lora_fa")


@pytest.mark.parametrize(("kind", "reason"), [("ADALORA", "AdaLoRA prunes ranks"), ("XLORA", "X-LoRA mixes")])
def test_another_type_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        LoraConfig.from_dict({"peft_type": kind, "target_modules": ["q"]})


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_an_unknown_field_at_a_default_does_nothing(value: Any) -> None:
    assert LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "from_the_future": value}).alpha == 8


def test_a_misspelled_field_is_named_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'target_modules'"):
        LoraConfig.from_dict({"peft_type": "LORA", "target_module": ["q"]})
    with pytest.raises(ConfigError, match="lora_alhpa"):
        LoraConfig.from_any({"lora_alhpa": 4})


def test_scaling() -> None:
    assert LoraConfig(r=4, lora_alpha=6).scaling(4, 6) == 1.5
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling(4, 6) == 3.0


def test_a_peft_config_without_targets_adapts_all_linear_layers_and_says_so(messages: list[str]) -> None:
    model = apply_lora(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert model.lora_configs["default"].target_modules == "all-linear"
    assert [text for text in messages if "target_modules=None" in text]


def test_no_next_step_advises_to_remove_what_changes_the_result() -> None:
    with pytest.raises(ConfigError, match="do not remove it") as raised:
        LoraConfig.from_dict({"target_modules": ["q_proj"], "use_qalora": True})
    assert "use_qalora=True is not supported" in str(raised.value)


OWN = {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(peft.LoraConfig)))
def test_every_argument_of_pefts_constructor_is_one_here(name: str) -> None:
    """At PEFT's default it changes nothing; another value of a field that is not here is a ConfigError."""
    default = getattr(peft.LoraConfig(), name)
    given = {name: default} if name not in ("target_modules", "peft_type") else {}
    assert LoraConfig(**given) == LoraConfig(**{k: v for k, v in given.items() if k in OWN})
    if name in DESCRIPTIVE:
        assert LoraConfig(**{name: "another"}) == LoraConfig()
    elif name not in (*OWN, "peft_type"):
        with pytest.raises(ConfigError, match=f"{name}='another' is not supported"):
            LoraConfig(**{name: "another"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 8}, "rank=8 is not supported (here it is called 'r')"),
        ({"alpha": 8}, "here it is called 'lora_alpha'"),
        ({"target_module": ["a"]}, "did you mean 'target_modules'"),
    ],
)
def test_other_names_say_the_right_one(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**given, r=0) if "rank" not in given else LoraConfig(**given)
    assert message in str(caught.value)
    assert LoraConfig(inference_mode=False, peft_version="0.19") == LoraConfig()


def test_pefts_order_of_arguments_loads_too(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    loaded = LoraModel.from_pretrained(base, tmp_path)
    assert loaded is base
    assert loaded.lora_configs["default"].r == 2


def test_pefts_order_goes_on_with_the_name_and_whether_it_is_trained(tmp_path: Path) -> None:
    apply_lora(tiny_llama(), LoraConfig(r=2)).save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(tiny_llama(), tmp_path, "chat", True)
    assert list(loaded.lora_configs) == ["chat"]
    assert any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(TypeError):
        LoraModel.from_pretrained(tiny_llama(), tmp_path, "chat", True, None)
