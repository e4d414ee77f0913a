"""Our files in PEFT and PEFT's in ours: the same keys, the same outputs, the same gradients.

The two differ by the order of float32 roundings alone: PEFT scales the update where it is O wide, we where it is R
wide, and biases are added at another place. What rounding does to a model is measured with PEFT itself in float64:
ours may be four times as far from it as PEFT's own float32 is, and 16 roundings besides.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from families import FAMILIES, batch_of
from helpers import assert_near, randomize, relative_error
from packaging.version import Version
from round_trip import check_round_trip
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_lora import (
    AdapterFileError,
    BaseMismatchError,
    LoraConfig,
    LoraModel,
    MergeError,
    apply_lora,
    convert_adapter,
    inspect_adapter,
    merge_files,
)
from hf_lora.adapt.inject import eject
from hf_lora.files.foreign import split_base_copies
from hf_lora.files.format import CONFIG_NAME, WEIGHTS_NAME
from hf_lora.files.load import load_adapter
from hf_lora.files.save import adapter_state_dict

EPS = torch.finfo(torch.float32).eps
OUTPUT_ROUNDINGS = 16
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Case:
    family: str
    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Any:
        return FAMILIES[self.family](**self.model)


LLAMA_PATTERNS = dict(
    target_modules=["q_proj", "v_proj", "down_proj"],
    use_rslora=True,
    lora_alpha=5,
    rank_pattern={"layers.0.self_attn.q_proj": 3, "down_proj": 5},
    alpha_pattern={"v_proj": 7},
)
LLAMA_EXCLUDE = dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
LLAMA_BIASES = dict(target_modules=["q_proj", "o_proj"], bias="lora_only")
VIT_SAVED = dict(  # its names depend on transformers' version
    target_modules=r".*\.(q_proj|v_proj|query|value|projection)",
    lora_alpha=3,
    modules_to_save=["classifier", "layernorm"],
)
RESNET_BIASES = dict(target_modules=["convolution"], bias="all", rank_pattern={"embedder.convolution": 2})
CASES = {
    "llama": Case("llama", {}),
    "llama-patterns": Case("llama", LLAMA_PATTERNS),
    "llama-embedding": Case("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"], lora_alpha=3)),
    "llama-layers": Case("llama", dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
    "llama-regex": Case("llama", dict(target_modules=r".*\.1\..*(q|o)_proj", r=3)),
    "llama-exclude": Case("llama", LLAMA_EXCLUDE),
    "llama-saved": Case("llama", dict(target_modules=["o_proj"], modules_to_save=["lm_head", "model.norm"])),
    "llama-biases": Case("llama", LLAMA_BIASES, dict(attention_bias=True)),
    "gpt2": Case("gpt2", {}),
    "gpt2-embedding": Case("gpt2", dict(target_modules=["wte", "c_attn"], lora_alpha=3, bias="lora_only")),
    "gpt2-biases": Case("gpt2", dict(target_modules=["c_attn", "c_proj"], bias="all")),
    "bert": Case("bert", {}),
    "bert-embedding": Case("bert", dict(target_modules=["word_embeddings", "query", "value"], use_rslora=True)),
    "bert-biases": Case("bert", dict(bias="all")),
    "t5": Case("t5", {}),
    "t5-embedding": Case("t5", dict(target_modules=["q", "v", "encoder.embed_tokens"], lora_alpha=3)),
    "t5-head": Case("t5", dict(target_modules=["q", "wo", "lm_head"])),
    "vit": Case("vit", VIT_SAVED),
    "vit-biases": Case("vit", dict(bias="all")),
    "resnet": Case("resnet", dict(target_modules=["convolution"], modules_to_save=["classifier"])),
    "resnet-biases": Case("resnet", RESNET_BIASES),
    "llama-dora": Case("llama", dict(target_modules=["q_proj", "lm_head"], use_dora=True), dict(attention_bias=True)),
    "llama-dora-rs": Case("llama", dict(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 3}, lora_alpha=5)),
    "gpt2-dora": Case("gpt2", dict(target_modules=["wte", "c_attn"], use_dora=True)),
    "resnet-dora": Case("resnet", dict(target_modules=["convolution"], use_dora=True)),
    "llama-lora-bias": Case(
        "llama", dict(target_modules=["q_proj", "v_proj"], lora_alpha=3, lora_bias=True), dict(attention_bias=True)
    ),
    "vit-lora-bias": Case("vit", dict(target_modules=r".*\.(q_proj|query|projection)", lora_bias=True)),
}


@pytest.fixture(scope="module", params=CASES)
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An adapter of ours, its file, and PEFT's model loaded from it."""
    case = CASES[request.param]
    base = case.base()
    model = randomize(apply_lora(copy.deepcopy(base), LoraConfig(**case.config))).eval()
    folder = tmp_path_factory.mktemp("ours")
    model.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    return SimpleNamespace(case=case, base=base, model=model, folder=folder, theirs=theirs, batch=batch_of(base))


def skip_what_peft_does_not_write(case: Case) -> None:
    """PEFT before 0.20 trains the biases of adapted layers and leaves them out of its file."""
    if case.config.get("bias") == "lora_only" and Version(peft.__version__) < Version("0.20"):
        pytest.skip("this PEFT does not save the biases that it trains")


@pytest.fixture(scope="module", params=CASES)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An adapter that PEFT made, its file, and our model loaded from it."""
    case = CASES[request.param]
    skip_what_peft_does_not_write(case)
    base = case.base()
    values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **case.config}
    if case.family in ("vit", "resnet") and "modules_to_save" not in values:
        values["modules_to_save"] = ["classifier"]  # PEFT has no task for images that would find it
    config = peft.LoraConfig(task_type=TASKS.get(case.family), **values)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    model = LoraModel.from_pretrained(folder, base_model=copy.deepcopy(base), is_trainable=True).eval()
    return SimpleNamespace(case=case, base=base, model=model, folder=folder, theirs=theirs, batch=batch_of(base))


def in_double(pair: SimpleNamespace) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model and the batch in float64."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in pair.batch.items()}
    return copy.deepcopy(pair.theirs).double(), batch


def bound(theirs: Tensor, exact: Tensor) -> float:
    return 4 * float((theirs - exact).norm()) + 16 * EPS * float(exact.norm())


def check_outputs(pair: SimpleNamespace, found: Tensor | None = None) -> None:
    exact_model, exact_batch = in_double(pair)
    with torch.no_grad():
        exact = exact_model(**exact_batch).logits
        found = pair.model(**pair.batch).logits if found is None else found
        theirs, base = pair.theirs(**pair.batch).logits, pair.base(**pair.batch).logits
    assert relative_error(exact, base) > 0.05, "an adapter that does nothing proves nothing"
    assert float((found - exact).norm()) <= bound(theirs, exact)


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a PEFT model, by the keys of its file."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        peft_key(n): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None and "original_module" not in n
    }  # fmt: skip


def check_gradients(pair: SimpleNamespace) -> None:
    exact, theirs = gradients(*in_double(pair)), gradients(pair.theirs, pair.batch)
    pair.model.zero_grad()
    pair.model(**pair.batch).loss.backward()
    own = adapter_state_dict(pair.model, "default")
    found = {k: t.grad for k, t in own.items() if t.grad is not None}
    assert found.keys() == theirs.keys()
    # A key's bias has no gradient (softmax takes constants away): what is computed for it is rounding.
    noise = 16 * EPS * max(float(g.norm()) for g in exact.values())
    wrong = {k for k, g in exact.items() if float((found[k] - g).norm()) > bound(theirs[k], g) + noise}
    assert not wrong


def peft_key(name: str) -> str:
    """The key in a file of a parameter's name in PEFT's memory."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def own_keys(folder: Path) -> set[str]:
    own, _ = split_base_copies(load_file(folder / WEIGHTS_NAME))
    return set(own)


def test_peft_computes_the_same_from_our_file(ours: SimpleNamespace) -> None:
    check_outputs(ours)


def test_we_compute_the_same_from_pefts_file(foreign: SimpleNamespace) -> None:
    check_outputs(foreign)


def test_gradients_are_pefts(ours: SimpleNamespace) -> None:
    check_gradients(ours)


def test_gradients_are_pefts_from_its_file(foreign: SimpleNamespace) -> None:
    check_gradients(foreign)


def test_peft_writes_the_keys_and_values_that_we_do(ours: SimpleNamespace, tmp_path: Path) -> None:
    skip_what_peft_does_not_write(ours.case)
    ours.theirs.save_pretrained(tmp_path)
    found, written = load_file(ours.folder / WEIGHTS_NAME), load_file(tmp_path / WEIGHTS_NAME)
    own, copies = split_base_copies(written)
    assert set(own) == set(found)
    assert all(torch.equal(own[key], found[key]) for key in found)
    assert {key.rpartition(".")[2] for key in set(written) - set(own)} <= {"weight", "bias"}
    for path, copied in copies.items():
        assert torch.equal(copied, ours.base.get_submodule(path).weight)


def test_we_write_the_keys_and_values_that_peft_does(foreign: SimpleNamespace, tmp_path: Path) -> None:
    foreign.model.save_pretrained(tmp_path)
    found, written = load_file(tmp_path / WEIGHTS_NAME), load_file(foreign.folder / WEIGHTS_NAME)
    assert set(found) == own_keys(foreign.folder)
    assert all(torch.equal(found[key], written[key]) for key in found)


def test_a_merged_model_is_pefts_unmerged_one(foreign: SimpleNamespace) -> None:
    with torch.no_grad():
        found = copy.deepcopy(foreign.model).merge_and_unload(untie=True)(**foreign.batch).logits
    check_outputs(foreign, found)


def test_several_adapters_in_both_directions(tmp_path: Path) -> None:
    base = FAMILIES["llama"]()
    batch = batch_of(base)
    model = apply_lora(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "down_proj"], use_rslora=True))
    randomize(model)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    theirs.load_adapter(tmp_path / "ours" / "other", "other")
    outputs: dict[Any, Tensor] = {}
    with torch.no_grad():
        for names in (["default"], ["other"], ["default", "other"]):
            model.set_adapter(names)
            theirs.base_model.set_adapter(names)
            outputs[tuple(names)] = model(**batch).logits
            assert_near(outputs[tuple(names)], theirs(**batch).logits, torch.float32, OUTPUT_ROUNDINGS)
        assert len({float(y.sum()) for y in outputs.values()}) == 3

        theirs.save_pretrained(tmp_path / "theirs")
        again = LoraModel.from_pretrained(tmp_path / "theirs", base_model=copy.deepcopy(base))
        again.load_adapter(tmp_path / "theirs" / "other", "other")
        for names, expected in outputs.items():
            again.set_adapter(names)
            assert torch.equal(again(**batch).logits, expected)


def test_automodel_takes_our_folder_as_a_model(tmp_path: Path) -> None:
    """transformers, with PEFT installed, finds the base from our folder and loads the adapter onto it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("this transformers loads no classifier's adapter, PEFT's own files included")
    for family, auto in (("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)):
        FAMILIES[family]().save_pretrained(tmp_path / family)
        base = auto.from_pretrained(tmp_path / family)
        model = randomize(apply_lora(base, LoraConfig())).eval()
        batch = batch_of(model)
        model.save_pretrained(tmp_path / f"{family}-adapter")
        with torch.no_grad():
            expected = model(**batch).logits
            found = auto.from_pretrained(tmp_path / f"{family}-adapter").eval()(**batch).logits
        assert_near(found, expected, torch.float32, OUTPUT_ROUNDINGS)


def test_a_peft_config_object_is_a_config() -> None:
    """The same layers, ranks and scalings as PEFT gives."""
    base = FAMILIES["llama"]()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules={"q_proj", "down_proj"}, rank_pattern={"down_proj": 2})
    model = apply_lora(copy.deepcopy(base), config)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    expected = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    from hf_lora.adapt.walk import adapter_layers

    found = {n: (a.r, a.scaling) for n, m in adapter_layers(model).items() for a in [m._lora.adapters["default"]]}
    assert found == expected


def test_trained_biases_leave_the_running_statistics_of_a_frozen_norm_alone() -> None:
    """They are in no file of ours nor of PEFT's, so an adapter must not move them."""
    model = apply_lora(
        FAMILIES["resnet"](), LoraConfig(target_modules=["convolution"], bias="all", modules_to_save=[])
    )
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(**batch_of(model)).loss.backward()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    biases = [p for n, p in model.named_parameters() if "normalization.lora_bias" in n]
    assert biases
    assert all(p.grad is not None for p in biases)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"q_proj": 100, r"layers\.0\..*": 50}},
        {
            "rank_pattern": {"v_proj": 2, r".*\.0\.self_attn\..*": 3},
            "alpha_pattern": {"self_attn.v_proj": 7, "0.*": 2},
        },
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5}},
    ],
    ids=["name before layer", "both tables", "specific before general"],
)
def test_patterns_that_overlap_keep_their_order_in_a_file(patterns: dict[str, Any], tmp_path: Path) -> None:
    base = FAMILIES["llama"]()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **patterns)
    model = randomize(apply_lora(copy.deepcopy(base), config)).eval()
    model.save_pretrained(tmp_path)
    batch = batch_of(base)
    with torch.no_grad():
        expected = model(**batch).logits
        again = LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))
        assert torch.equal(again(**batch).logits, expected)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base).eval(), tmp_path)
        assert_near(theirs(**batch).logits, expected, torch.float32, OUTPUT_ROUNDINGS)


def test_converting_keeps_the_order_of_patterns_that_overlap(tmp_path: Path) -> None:
    """PEFT applies the first that matches, in the order of the file."""
    base = FAMILIES["llama"]()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "adapter_config.json"
    patterns = {"q_proj": 100, r"layers\.0\..*": 50}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": patterns}))
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base).eval(), tmp_path / "old")
    batch = batch_of(base)
    for name in ("old", "new"):
        if name == "new":
            weights = tmp_path / "old" / "adapter_model.safetensors"
            torch.save(load_file(weights), tmp_path / "old" / "adapter_model.bin")
            convert_adapter(tmp_path / "old", tmp_path / "new")
        found = LoraModel.from_pretrained(tmp_path / name, base_model=copy.deepcopy(base))
        with torch.no_grad():
            assert_near(found(**batch).logits, expected(**batch).logits, torch.float32, OUTPUT_ROUNDINGS)
        alphas = {layer.path: layer.alpha for layer in inspect_adapter(tmp_path / name).layers}
        assert {alphas[n] for n in alphas if "q_proj" in n} == {100}
        assert {alphas[n] for n in alphas if "0.self_attn.v_proj" in n} == {50}


MASKED = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=40,
)  # fmt: skip


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
@pytest.mark.parametrize("part", ["", ".predictions"], ids=["head", "part of the head"])
def test_a_head_that_holds_the_output_embedding(name: str, part: str, tmp_path: Path) -> None:
    """PEFT writes the decoder inside the head, where it is tied to the input embedding outside."""
    if name == "Roberta" and part:
        pytest.skip("its head has no such part")
    config = getattr(transformers, f"{name}Config")(**MASKED)
    base = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    head = "lm_head" if name == "Roberta" else f"cls{part}"
    ids = torch.randint(5, 40, (2, 6))
    settings = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=[head.rpartition(".")[2]])
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(ids).logits
    model = LoraModel.from_pretrained(tmp_path / "theirs", base_model=copy.deepcopy(base))
    assert_near(model(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_near(again(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)
    merged = LoraModel.from_pretrained(tmp_path / "theirs", base_model=copy.deepcopy(base), merge=True)
    assert_near(merged(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)
    assert (expected - base(ids).logits).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("init", "more"), [("orthogonal", {}), ("eva", {"eva_config": peft.EvaConfig(rho=1.0)}), ("mica", {})]
)
def test_an_initialization_of_peft_that_leaves_the_base_alone_does_not_matter_in_a_file(
    init: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    base = FAMILIES["llama"]()
    try:
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, **more)
        theirs = randomize(peft.get_peft_model(copy.deepcopy(base), settings)).eval()
    except ValueError:
        pytest.skip("this PEFT does not have it")
    theirs.save_pretrained(tmp_path)
    model = LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))
    batch = batch_of(base)
    with torch.no_grad():
        assert_near(model(**batch).logits, theirs(**batch).logits, torch.float32, OUTPUT_ROUNDINGS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=["", "rs", "ranks"])
def test_what_peft_converted_from_an_initialization_that_changes_the_base(
    init: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    base = FAMILIES["llama"]()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **more)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter *= 1.2
    theirs.save_pretrained(tmp_path / "unconverted")
    theirs.save_pretrained(tmp_path / "last", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    batch = batch_of(base)
    for folder in ("unconverted", "last"):
        model = LoraModel.from_pretrained(tmp_path / folder, base_model=copy.deepcopy(base))
        with torch.no_grad():
            assert_near(model(**batch).logits, theirs(**batch).logits, torch.float32, 8 * OUTPUT_ROUNDINGS)


def test_what_a_random_decomposition_subtracted_is_in_no_file_of_peft(tmp_path: Path) -> None:
    base = FAMILIES["llama"]()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_2")
    peft.get_peft_model(copy.deepcopy(base), settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"save_pretrained\(folder, path_initial_model_for_weight_conversion="):
        LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_were_added_to_an_adapted_embedding_are_in_the_file(tied: bool, tmp_path: Path) -> None:
    """PEFT writes the base's embedding beside its factors: without it nobody has the new rows."""
    FAMILIES["llama"](tied=tied).save_pretrained(tmp_path / "base")
    resized = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    resized.resize_token_embeddings(70)
    targets = ["q_proj", "embed_tokens"] if tied else ["q_proj", "embed_tokens", "lm_head"]
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(resized), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[1, 66, 5, 69, 33]])
    with torch.no_grad():
        expected = theirs(ids).logits
        model = LoraModel.from_pretrained(tmp_path / "theirs")
        assert_near(model(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)
        model.save_pretrained(tmp_path / "ours")
        again = LoraModel.from_pretrained(tmp_path / "ours")
        assert torch.equal(again(ids).logits, model(ids).logits)
        with pytest.raises(MergeError, match="hf-lora merge ADAPTER --base BASE --out OUT"):
            merge_files(tmp_path / "base", tmp_path / "ours", tmp_path / "merged", untie=True)
        merged = LoraModel.from_pretrained(tmp_path / "ours", merge=True, untie=True)
        assert_near(merged(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)
        found = peft.PeftModel.from_pretrained(copy.deepcopy(resized), tmp_path / "ours").eval()
        assert_near(found(ids).logits, expected, torch.float32, OUTPUT_ROUNDINGS)


def test_new_rows_of_an_output_embedding_that_no_file_holds_are_not_made_up(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "base")
    resized = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(70)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(resized, settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(BaseMismatchError, match="no file contains the new rows"):
        LoraModel.from_pretrained(tmp_path / "theirs")


class Scaled(nn.Module):
    """A module that multiplies by its parameter called `bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) * self.bias
        return found


class FrozenNorm(nn.Module):
    """A normalization of which `weight` and `bias` are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4))
        self.register_buffer("bias", torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return x * self.weight + self.bias


def test_biases_that_are_not_those_of_layers(tmp_path: Path) -> None:
    """With bias="all" PEFT trains every parameter called bias, and also saves every buffer called bias."""
    torch.manual_seed(0)
    base = nn.Sequential(Scaled(), FrozenNorm(), nn.Linear(4, 4))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["2"], bias="all"))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(5, 4)
    expected = theirs(x)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs", is_trainable=True)
    assert_near(model(x), expected, torch.float32, OUTPUT_ROUNDINGS)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    check_round_trip(model, base, x, tmp_path)
    unloaded = copy.deepcopy(model)
    eject(unloaded)
    assert torch.equal(unloaded(x), base(x))
    with torch.no_grad():
        base[1].bias += 1
    with pytest.raises(BaseMismatchError, match=r"1\.bias"):
        load_adapter(copy.deepcopy(base), tmp_path / "theirs")


class Reads(nn.Module):
    """A module that adds the bias of its child itself."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) + self.child.bias


def test_a_trained_bias_that_its_parent_reads_acts_there(tmp_path: Path) -> None:
    base, x = Reads().eval(), torch.randn(3, 4)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["other"], bias="all"))
    theirs.base_model.model.child.bias.data += 1
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    plan = load_adapter(model, tmp_path)
    assert set(plan.biases) == {"child", "other"}
    assert torch.equal(model(x), theirs(x))
    assert not torch.equal(model(x), base(x))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_layers_that_a_file_of_peft_leaves_to_a_table_are_those_with_factors(targets: Any, tmp_path: Path) -> None:
    base = FAMILIES["llama"]()
    theirs = randomize(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets))).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    model = LoraModel.from_pretrained(tmp_path, base_model=copy.deepcopy(base))
    batch = batch_of(base)
    with torch.no_grad():
        assert_near(model(**batch).logits, theirs(**batch).logits, torch.float32, OUTPUT_ROUNDINGS)
