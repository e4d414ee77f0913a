"""Forms of a file that PEFT reads, compared with what PEFT computes from it: values, keys, tied weights, tokens."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_near, batch_for, randomize, relative_error, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoraConfig,
    LoraModel,
    MergeError,
    StateError,
    TargetError,
    apply_lora,
    merge_files,
)
from hf_lora.files.format import CONFIG_NAME, WEIGHTS_NAME

ENDS = ["model.embed_tokens", "lm_head"]
Edit = Callable[[str, Tensor], tuple[str, Tensor]]
ROWS = "token_adapter.trainable_tokens_delta"


def tied(seed: int = 0) -> Any:
    return tiny_llama(seed, tied=True)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch_for(model, labels=False)).logits


def write(folder: Path, base: Any, **config: Any) -> Path:
    """An adapter that PEFT trained, with random values."""
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(dict(edit(k, t) for k, t in tensors.items()), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_read_alike(folder: Path, make: Callable[[], Any], again: Path, expected: Tensor | None = None) -> Any:
    """We compute what PEFT does from the file, and both do from the one that we write for it."""
    if expected is None:
        expected = logits(peft.PeftModel.from_pretrained(make(), folder))
    assert relative_error(logits(make()), expected) > 0.01
    model = LoraModel.from_pretrained(folder, base_model=make())
    assert_near(logits(model), expected, torch.float32, 64)
    model.save_pretrained(again)
    assert torch.equal(logits(LoraModel.from_pretrained(again, base_model=make())), logits(model))
    assert_near(logits(peft.PeftModel.from_pretrained(make(), again)), expected, torch.float32, 64)
    return model


VALUES: dict[str, dict[str, Any]] = {
    "negative alpha": {"lora_alpha": -4},
    "an alpha of zero": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 0}},
    "a negative alpha of a layer": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": -3}},
    "olora of an embedding": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "olora"},
    "pissa of an embedding": {"target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": "pissa"},
    "olora with a negative alpha": {"lora_alpha": -4, "init_lora_weights": "olora"},
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_the_configuration(case: str, tmp_path: Path) -> None:
    assert_read_alike(write(tmp_path / "theirs", tiny_llama(), **VALUES[case]), tiny_llama, tmp_path / "ours")


def test_no_initialization_in_a_file(tmp_path: Path) -> None:
    edit_config(write(tmp_path / "theirs", tiny_llama()), init_lora_weights=None)
    assert_read_alike(tmp_path / "theirs", tiny_llama, tmp_path / "ours")


@pytest.mark.parametrize("alpha", [0, -8])
def test_alpha_is_positive_in_training(alpha: float) -> None:
    for config in (LoraConfig(lora_alpha=alpha), LoraConfig(alpha_pattern={"q_proj": alpha})):
        with pytest.raises(ConfigError, match=rf"{alpha} must be positive"):
            apply_lora(tiny_llama(), config)


def test_a_scaling_without_a_square_root(tmp_path: Path) -> None:
    write(tmp_path, tiny_llama(), init_lora_weights="pissa")
    edit_config(tmp_path, lora_alpha=-8)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not theirs.model.model.layers[0].self_attn.q_proj.base_layer.weight.isfinite().any()
    with pytest.raises(AdapterFileError, match="has no square root"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())


def named(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """As in a state dict."""
    stem, _, leaf = key.rpartition(".")
    return (f"{stem}.default.{leaf}" if leaf in ("weight", "bias") else f"{key}.default"), tensor


KEYS: dict[str, tuple[dict[str, Any], Edit]] = {
    "of a state dict": ({"target_modules": ["q_proj", "embed_tokens"]}, named),
    "with a bias": ({"lora_bias": True}, named),
    "of a magnitude": ({"use_dora": True}, lambda k, t: (f"{k}.weight" if k.endswith("_vector") else k, t)),
    "of a state dict with a magnitude": (
        {"use_dora": True},
        lambda k, t: (f"{k}.default.weight", t) if k.endswith("_vector") else named(k, t),
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_with_the_name_of_an_adapter(case: str, tmp_path: Path) -> None:
    config, edit = KEYS[case]
    folder = write(tmp_path / "theirs", tiny_llama(), **config)
    before = load_file(folder / WEIGHTS_NAME)
    own = {k: t for k, t in before.items() if "base_layer" not in k}
    save_file(own, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    expected = logits(peft.PeftModel.from_pretrained(tiny_llama(), folder))
    edit_tensors(folder, edit)
    assert load_file(folder / WEIGHTS_NAME).keys() != own.keys()
    model = assert_read_alike(folder, tiny_llama, tmp_path / "ours", expected)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder)
    if relative_error(logits(theirs), logits(tiny_llama())) > 0:  # PEFT before 0.20 ignores some of these keys
        assert_near(logits(model), logits(theirs), torch.float32, 64)


def test_keys_with_the_names_of_two_adapters_are_not_taken_for_one(tmp_path: Path) -> None:
    write(tmp_path, tiny_llama())
    edit_tensors(tmp_path, lambda k, t: (k.replace(".weight", ".one.weight" if "layers.0" in k else ".two.weight"), t))
    with pytest.raises(AdapterFileError, match=r"unexpected: \S*lora_A\.one\.weight"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())


TOKENS: dict[str, Any] = {
    "of the embedding": {"embed_tokens": [3, 7]},
    "of the head alone": {"lm_head": [4, 5]},
    "of each its own": {"embed_tokens": [3], "lm_head": [4, 5]},
    "the same of both": {"lm_head": [3, 5], "embed_tokens": [3, 5]},
}


@pytest.mark.parametrize("case", TOKENS)
def test_rows_of_tied_modules(case: str, tmp_path: Path) -> None:
    """PEFT gives tied modules the same rows if both are named with the same tokens, or the embedding alone is."""
    write(tmp_path / "theirs", tied(), trainable_token_indices=TOKENS[case])
    model = assert_read_alike(tmp_path / "theirs", tied, tmp_path / "ours")
    before, apart = logits(model), case in ("of the head alone", "of each its own")
    if apart:
        with pytest.raises(MergeError, match="untie"):
            model.merge_adapter()
    model.merge_adapter(untie=apart)
    assert_near(logits(model), before, torch.float32, 64)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert_near(logits(model.merge_and_unload(untie=apart)), before, torch.float32, 64)


def test_rows_of_a_tied_head_in_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    """It had the rows of all tied modules under the name in the configuration."""
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [4, 5]})
    model = randomize(apply_lora(tied(), config))
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda k, t: (k.replace("model.embed_tokens.token", "lm_head.token"), t))
    edit_config(tmp_path, trainable_token_indices={"lm_head": [4, 5]})
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    del values["ensure_weight_tying"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    assert any(f"lm_head.{ROWS}" in key for key in load_file(tmp_path / WEIGHTS_NAME))
    again = LoraModel.from_pretrained(tmp_path, base_model=tied())
    assert torch.equal(logits(again), logits(model))


def test_adapters_with_shared_rows_and_with_rows_of_one_module() -> None:
    """Each acts as alone, in any order of adding and deleting; together they cannot be merged."""
    rows = {"all": [3, 7], "one": {"lm_head": [4], "embed_tokens": [5]}}
    for order in (["all", "one"], ["one", "all"]):
        model: Any = tied()
        alone = {}
        for name in order:
            config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows[name])
            model = (
                apply_lora(model, config, name) if name == order[0] else (model.add_adapter(name, config), model)[1]
            )
        randomize(model)
        for name in order:
            model.set_adapter(name)
            alone[name] = logits(model)
        model.set_adapter(order)
        with pytest.raises(MergeError, match="rows of all modules with this weight, and rows of one of them"):
            model.merge_adapter(untie=True)
        model.delete_adapter(order[0])
        model.set_adapter(order[1])
        assert torch.equal(logits(model), alone[order[1]])
        plain = model.unload()
        assert torch.equal(logits(plain), logits(tied()))
        assert not any("lora" in name for name, _ in plain.named_modules())


def test_repeated_tokens(tmp_path: Path) -> None:
    """In training, PEFT's rows of one token stay equal; if they are not, which of them acts is undefined."""
    write(tmp_path / "theirs", tied(), trainable_token_indices=[3, 7, 3])
    with pytest.raises(AdapterFileError, match=r"different rows for the tokens \[3\]"):
        LoraModel.from_pretrained(tmp_path / "theirs", base_model=tied())
    edit_tensors(tmp_path / "theirs", lambda k, t: (k, t[[0, 1, 0]].contiguous() if ROWS in k else t))
    assert_read_alike(tmp_path / "theirs", tied, tmp_path / "ours")
    own = apply_lora(tied(), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 7, 3]))
    assert own.get_input_embeddings().lora_token_rows["default"].weight.shape == (2, 32)


def growing(is_tied: bool, folder: Path) -> Callable[[], Any]:
    """Saves a base, and returns what makes the base with three more tokens."""
    base = tiny_llama(tied=is_tied)
    base.save_pretrained(folder)

    def grown() -> Any:
        model = type(base).from_pretrained(folder)
        model.resize_token_embeddings(67, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[64:] = model.get_output_embeddings().weight[64:] = 0.1
        return model

    return grown


@pytest.mark.parametrize(
    ("is_tied", "whole"),
    [
        (True, True),
        (False, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, False), (False, True))),
    ],
)
def test_rows_of_a_vocabulary_that_grew(is_tied: bool, whole: bool, tmp_path: Path) -> None:
    """PEFT writes the rows of a tied head once more. In a file without the embeddings, the tokens are the new rows."""
    grown = growing(is_tied, tmp_path / "base")
    new = [64, 65, 66]
    rows = new if is_tied else {"embed_tokens": new, "lm_head": new}
    write(tmp_path / "theirs", grown(), trainable_token_indices=rows)
    second = f"base_model.model.lm_head.{ROWS}"
    tensors = load_file(tmp_path / "theirs" / WEIGHTS_NAME)
    assert second in tensors
    if not whole:
        kept = {key: tensor for key, tensor in tensors.items() if "base_layer" not in key}
        save_file(kept, tmp_path / "theirs" / WEIGHTS_NAME, metadata={"format": "pt"})
    model = assert_read_alike(tmp_path / "theirs", grown, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        again = LoraModel.from_pretrained(tmp_path / folder, base_model=tmp_path / "base")
        assert_near(logits(again), logits(model), torch.float32, 64)
    if is_tied:
        edit_tensors(tmp_path / "theirs", lambda k, t: (k, t + 1 if k == second else t))
        with pytest.raises(AdapterFileError, match=r"embed_tokens\S* and \S*lm_head\S* are the same rows") as refused:
            LoraModel.from_pretrained(tmp_path / "theirs", base_model=grown())
        assert len(refused.value.faults) == 1


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("rows", [None, [64, 65, 66]])
def test_embeddings_that_are_saved_with_a_new_vocabulary_stay_frozen(
    is_tied: bool, rows: list[int] | None, tmp_path: Path
) -> None:
    """PEFT saves them whole, since the base's files lack the new rows, and trains only what its config names."""
    grown = growing(is_tied, tmp_path / "base")
    write(tmp_path / "theirs", grown(), trainable_token_indices=rows)
    theirs = peft.PeftModel.from_pretrained(grown(), tmp_path / "theirs", is_trainable=True)
    ours = LoraModel.from_pretrained(tmp_path / "theirs", base_model=tmp_path / "base", is_trainable=True)
    found, expected = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs))
    assert found == expected
    ours.disable_adapters()
    ours.enable_adapters()
    ours.set_adapter("default")
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == expected
    assert_near(logits(ours), logits(theirs), torch.float32, 64)


def test_tokens_that_do_not_name_all_new_rows_are_not_enough(tmp_path: Path) -> None:
    base = tied()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(67, mean_resizing=False)
    write(tmp_path / "theirs", base, trainable_token_indices=[64, 66])
    kept = {k: t for k, t in load_file(tmp_path / "theirs" / WEIGHTS_NAME).items() if "base_layer" not in k}
    save_file(kept, tmp_path / "theirs" / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="no file contains the new rows"):
        LoraModel.from_pretrained(tmp_path / "theirs", base_model=tmp_path / "base")


TYING: dict[str, dict[str, Any]] = {
    "nothing tied": {},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "rows of the embedding": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("is_tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
@pytest.mark.parametrize("case", TYING)
def test_tying_that_is_ensured(case: str, is_tied: bool, tmp_path: Path) -> None:
    """Factors of tied modules are in the file for each of them, and are read so. Training them as one is refused."""
    make = tied if is_tied else tiny_llama
    settings = {"target_modules": ["q_proj"], **TYING[case]}
    write(tmp_path / "theirs", make(), ensure_weight_tying=True, **settings)
    model = assert_read_alike(tmp_path / "theirs", make, tmp_path / "ours")
    config = LoraConfig(r=4, ensure_weight_tying=True, **settings)
    if is_tied and case.startswith("factors"):
        assert not model.lora_configs["default"].ensure_weight_tying, "they are apart here"
        with pytest.raises(AdapterFileError, match="trained as one, which is not supported"):
            LoraModel.from_pretrained(tmp_path / "theirs", base_model=make(), is_trainable=True)
        with pytest.raises(TargetError, match="would be trained apart"):
            apply_lora(make(), config)
        config.ensure_weight_tying = False
    else:
        LoraModel.from_pretrained(tmp_path / "theirs", base_model=make(), is_trainable=True)
    apply_lora(make(), config)


@pytest.mark.parametrize(
    ("whole", "dtype"),
    [
        (["lm_head"], torch.float32),
        (["embed_tokens"], torch.bfloat16),
        pytest.param(["embed_tokens", "lm_head"], torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_copies_of_tied_modules_are_trained_as_one(whole: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    """The gradient is that of the tied weight of a plain model, and every verb keeps one weight."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole, ensure_weight_tying=True)
    tied().to(dtype).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return type(tied()).from_pretrained(tmp_path / "base", dtype=dtype)

    model: Any = apply_lora(base(), config)
    assert list(model._hf_lora.adapters["default"].heads) in (ENDS, ENDS[::-1])

    def weights(one: Any) -> list[nn.Parameter]:
        return [one.get_submodule(end).copies["default"].weight for end in ENDS]

    moved = copy.deepcopy(model).to(torch.float16).to(dtype)
    for one in (model, moved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert weights(one)[0] is weights(one)[1]
        assert weights(one)[0].dtype == torch.float32
    batch = batch_for(model)
    if dtype == torch.float32:
        plain = tied()
        plain(**batch).loss.backward()
        model(**batch).loss.backward()
        assert_near(weights(model)[0].grad, plain.lm_head.weight.grad, torch.float32, 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = LoraModel.from_pretrained(tmp_path / "adapter", is_trainable=True, dtype=dtype)
    assert weights(again)[0] is weights(again)[1]
    assert torch.equal(logits(again), before)
    assert_near(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")), before, dtype, 64)
    with pytest.raises(StateError, match="its copy and that of another module have one weight"):
        model.resize_token_embeddings(70)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    files = type(tied()).from_pretrained(tmp_path / "merged", dtype=dtype)
    merged = again.merge_and_unload()
    for found in (files, merged):
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert found.config.tie_word_embeddings
        assert_near(logits(found), before, dtype, 64)
    model.delete_adapter("default")
    assert torch.equal(logits(model.unload()), logits(base()))


def test_copies_are_not_tied_to_an_embedding_that_nothing_calls() -> None:
    """Neither does PEFT, whose model cannot run then."""
    config = LoraConfig(r=4, target_modules=["q"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(TargetError, match="lm_head would be trained apart from the modules with the same weight"):
        apply_lora(tiny_t5(tie_word_embeddings=True), config)


def test_tying_that_peft_did_not_do(tmp_path: Path) -> None:
    """It knows embeddings by two names, and leaves others apart."""
    config = {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True}
    write(tmp_path / "theirs", tiny_gpt2(), **config)
    assert not any("lm_head" in key for key in load_file(tmp_path / "theirs" / WEIGHTS_NAME))
    model = assert_read_alike(tmp_path / "theirs", tiny_gpt2, tmp_path / "ours")
    assert not model.lora_configs["default"].ensure_weight_tying
    LoraModel.from_pretrained(tmp_path / "theirs", base_model=tiny_gpt2(), is_trainable=True)


def masked(is_tied: bool) -> Any:
    """A model with biases in its output layer; PEFT does not know its embedding by name."""
    model = tiny_bert(cls="BertForMaskedLM", tie_word_embeddings=is_tied)
    torch.manual_seed(7)
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_()
    return model


WITH_BIASES: dict[str, dict[str, Any]] = {
    "a copy of the head": {"modules_to_save": ["decoder"]},
    "copies of both": {"modules_to_save": ["decoder", "word_embeddings"]},
    "copies of both that are not tied": {
        "modules_to_save": ["decoder", "word_embeddings"],
        "ensure_weight_tying": True,
    },
    "rows of the embedding": {"trainable_token_indices": [3, 5]},
    "rows of the head": {"trainable_token_indices": {"decoder": [3, 5]}},
    "rows of each": {"trainable_token_indices": {"word_embeddings": [3, 5], "decoder": [4, 5]}},
    "rows of each for the same tokens": {"trainable_token_indices": {"word_embeddings": [3, 5], "decoder": [3, 5]}},
}


@pytest.mark.parametrize("is_tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
@pytest.mark.parametrize("case", WITH_BIASES)
def test_the_bias_of_an_output_layer(case: str, is_tied: bool, tmp_path: Path) -> None:
    """PEFT names it in several ways. With rows of tokens its forward drops the bias, which is added here."""
    values = {"target_modules": ["query"], "bias": "all", **WITH_BIASES[case]}
    write(tmp_path / "theirs", masked(is_tied), **values)

    def of_peft(folder: Path) -> Tensor:
        model = peft.PeftModel.from_pretrained(masked(is_tied), folder)
        head = model.base_model.model.cls.predictions.decoder
        if hasattr(head, "token_adapter"):
            head.register_forward_hook(lambda layer, args, y: y + layer.token_adapter.base_layer.bias)
        return logits(model)

    expected = of_peft(tmp_path / "theirs")
    model = LoraModel.from_pretrained(tmp_path / "theirs", base_model=masked(is_tied), is_trainable=True)
    assert_near(logits(model), expected, torch.float32, 64)
    model.save_pretrained(tmp_path / "ours")
    again = LoraModel.from_pretrained(tmp_path / "ours", base_model=masked(is_tied))
    assert torch.equal(logits(again), logits(model))
    assert_near(of_peft(tmp_path / "ours"), expected, torch.float32, 64)
    assert_near(logits(again.merge_and_unload(untie=is_tied)), expected, torch.float32, 256)


def test_copies_of_tied_modules_that_differ_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, tied(), modules_to_save=["lm_head"], ensure_weight_tying=True)
    edit_tensors(tmp_path, lambda k, t: (k, t + 1 if "lm_head" in k else t))
    with pytest.raises(AdapterFileError, match="are one weight in the model, but differ in the file"):
        LoraModel.from_pretrained(tmp_path, base_model=tied())


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_product_that_peft_subtracted_from_a_tied_weight(init: str, tmp_path: Path) -> None:
    """The embedding has lost it too, and gets no update for it."""
    write(tmp_path, tied(), target_modules=["q_proj", "lm_head"], init_lora_weights=init)
    with pytest.raises(AdapterFileError, match=r"lm_head: its initialization changed model.embed_tokens, which"):
        LoraModel.from_pretrained(tmp_path, base_model=tied())


@pytest.mark.parametrize("is_trained", [True, False])
def test_what_an_older_peft_wrote_for_its_name_alone(is_trained: bool, tmp_path: Path) -> None:
    """With `bias="all"`, versions before 0.20 trained and saved every tensor with "bias" in its name."""
    write(tmp_path / "theirs", tiny_t5(), target_modules=["q"], bias="all")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS_NAME)
    called = {n: p.detach() for n, p in tiny_t5().named_parameters() if "bias" in n}
    assert called
    assert not any(name.endswith("bias") for name in called)
    tensors |= {f"base_model.model.{n}": t * 3 + 1 if is_trained else t.clone() for n, t in called.items()}
    save_file(tensors, tmp_path / "theirs" / WEIGHTS_NAME, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(tiny_t5(), tmp_path / "theirs").eval()
    ours = LoraModel.from_pretrained(tmp_path / "theirs", base_model=tiny_t5()).eval()
    ours.save_pretrained(tmp_path / "ours")
    again = LoraModel.from_pretrained(tmp_path / "ours", base_model=tiny_t5()).eval()
    batch = batch_for(ours)
    with torch.no_grad():
        for model in (ours, again):
            assert_near(model(**batch).logits, theirs(**batch).logits, torch.float32, 64)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
    ],
    ids=["factors", "a copy"],
)
def test_rows_that_peft_cannot_load_are_named(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = randomize(apply_lora(tied(), LoraConfig(r=4, trainable_token_indices=[3, 5], **config)))
    with pytest.warns(UserWarning, match=f"PEFT cannot load this adapter: {named} would have rows of tokens"):
        model.save_pretrained(tmp_path)
    with pytest.raises((TypeError, KeyError)):
        peft.PeftModel.from_pretrained(tied(), tmp_path)
    assert torch.equal(logits(LoraModel.from_pretrained(tmp_path, base_model=tied())), logits(model))
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    randomize(apply_lora(tied(), LoraConfig(r=4, **config))).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tied(), tmp_path)
