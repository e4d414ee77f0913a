"""Merging at load: several adapters with weights, quantizing the sum, and a result that is a plain model."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from quantized_bases import bits, method

from hf_lora import ConfigError, LoraConfig, LoraModel, MergeError, apply_lora


def tiny_mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


WIDE = {"hidden_size": 64, "intermediate_size": 128}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(**WIDE),
    "tied": lambda: tiny_llama(tied=True, **WIDE),
    "bert": lambda: tiny_bert(**WIDE),
    "gpt2": lambda: tiny_gpt2(n_embd=64),
    "mixtral": tiny_mixtral,
}


def save(model: Any, folder: Path, seeds: tuple[int, ...] = (1,), **config: Any) -> list[Path]:
    """The model as a base, and an adapter of it for each seed."""
    model.save_pretrained(folder / "base")
    made = []
    for seed in seeds:
        base = type(model).from_pretrained(folder / "base")
        adapted = randomize(apply_lora(base, LoraConfig(r=2 + seed, lora_alpha=4, **config)), seed, 0.1)
        adapted.save_pretrained(folder / f"adapter-{seed}")
        made.append(folder / f"adapter-{seed}")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_updates_add_up(tmp_path: Path, dtype: torch.dtype) -> None:
    folders, weights = save(tiny_llama(), tmp_path, (1, 2, 3)), [0.7, -0.4, 1.0]
    found = LoraModel.from_pretrained(folders, base_model=tmp_path / "base", merge=True, weights=weights, dtype=dtype)
    plain = dict(type(found).from_pretrained(tmp_path / "base", dtype=dtype).named_parameters())
    singles = [dict(LoraModel.from_pretrained(f, base_model=tmp_path / "base").named_parameters()) for f in folders]
    changed = 0
    for name, weight in found.named_parameters():
        path, sum_ = name.removesuffix(".weight"), plain[name].double()
        if f"{path}.lora_A.default.weight" in singles[0]:
            changed += 1
            for factor, single, r in zip(weights, singles, (3, 4, 5), strict=True):
                a, b = (single[f"{path}.lora_{k}.default.weight"].double() for k in "AB")
                sum_ = sum_ + factor * (4 / r) * (b @ a)
        # Added in float64 in another order, then rounded once: at most one place of the dtype.
        assert (weight.double() - sum_).abs().le(torch.finfo(dtype).eps * sum_.abs().clamp_min(1e-30)).all()
    assert changed == 14


def test_pefts_exact_sum_is_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    folders = save(tiny_llama(), tmp_path, (1, 2))
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, folders[0], "a")
    theirs.load_adapter(folders[1], "b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = LoraModel.from_pretrained(folders, base_model=tmp_path / "base", merge=True, weights=[0.5, 2.0])
    batch = batch_for(ours)
    with torch.no_grad():
        assert_near(ours(**batch).logits, theirs.eval()(**batch).logits, torch.float32, 64)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("name", MODELS)
def test_quantizing_after_the_merge_is_quantizing_the_merged_model(tmp_path: Path, name: str, kind: str) -> None:
    if name == "gpt2" and kind == "torchao-int8":
        pytest.skip("transformers leaves GPT-2's layers, which are no linears, to bitsandbytes")
    (folder,) = save(MODELS[name](), tmp_path)
    merged = LoraModel.from_pretrained(folder, base_model=tmp_path / "base", merge=True)
    merged.save_pretrained(tmp_path / "merged")
    # The CPU kernel of bitsandbytes takes no layer of three outputs.
    skipped: dict[str, Any] = {"llm_int8_skip_modules": ["classifier"]} if (name, kind) == ("bert", "nf4") else {}
    last: dict[str, Any] = {"quantization_config": method(kind, **skipped), "device_map": "cpu"}
    expected = type(merged).from_pretrained(tmp_path / "merged", **last)
    found = LoraModel.from_pretrained(folder, base_model=tmp_path / "base", merge=True, **last)
    assert type(found) is type(expected)
    assert found.is_quantized
    assert not found.training
    assert_same_tensors(bits(found), bits(expected))
    assert found.config.to_dict().keys() == expected.config.to_dict().keys()
    models = [found, expected]
    if kind != "torchao-int8":  # transformers cannot load those again
        found.save_pretrained(tmp_path / "again")
        models.append(type(found).from_pretrained(tmp_path / "again", device_map="cpu"))
    batch = batch_for(found)
    with torch.no_grad():
        first, *others = [model(**batch).logits for model in models]
    assert all(torch.equal(first, other) for other in others)


def test_the_result_is_a_plain_model(tmp_path: Path) -> None:
    (folder,) = save(tiny_llama(), tmp_path)
    unmerged = LoraModel.from_pretrained(folder, base_model=tmp_path / "base")
    found = LoraModel.from_pretrained(folder, base_model=tmp_path / "base", merge=True)
    fresh = type(tiny_llama()).from_pretrained(tmp_path / "base")
    assert type(found) is type(fresh)
    assert not any("lora" in key for key in (*vars(found), *found.state_dict()))
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }
    assert [type(m) for m in found.modules()] == [type(m) for m in fresh.modules()]
    found.save_pretrained(tmp_path / "saved")
    batch = batch_for(found)
    with torch.no_grad():
        expected = found(**batch).logits
        assert_near(expected, unmerged(**batch).logits, torch.float32, 64)
        assert torch.equal(pickle.loads(pickle.dumps(found))(**batch).logits, expected)
        assert torch.equal(type(fresh).from_pretrained(tmp_path / "saved")(**batch).logits, expected)


def test_what_does_not_go_together_is_one_error(tmp_path: Path) -> None:
    folders = save(tiny_llama(), tmp_path, (1, 2))
    with pytest.raises(ConfigError) as caught:
        LoraModel.from_pretrained(folders, base_model=tmp_path / "base", weights=[1.0, float("nan"), True], untie=True)
    for fault in (
        "needs merge=True; load further ones",
        "weights= needs merge=True",
        "3 weights are given for 2",
        "nan is not a finite number",
        "True is",
    ):
        assert fault in str(caught.value)
    assert "untie= needs merge=True" in str(caught.value)
    with pytest.raises(ConfigError, match="no adapter is named"):
        LoraModel.from_pretrained([], base_model=tmp_path / "base", merge=True)
    with pytest.raises(ConfigError, match="cannot apply to a base_model in memory"):
        LoraModel.from_pretrained(folders[0], base_model=tiny_llama(), merge=True, quantization_config=method("nf4"))


def test_what_cannot_be_merged_leaves_a_given_model_as_it_was(tmp_path: Path) -> None:
    (folder,) = save(tiny_llama(tied=True), tmp_path, target_modules=["lm_head", "q_proj"])
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    before, cls = snapshot(base), type(base)
    with pytest.raises(MergeError, match="untie=True"):
        LoraModel.from_pretrained(folder, base_model=base, merge=True)
    assert type(base) is cls
    assert_same_tensors(snapshot(base), before)
    found = LoraModel.from_pretrained(folder, base_model=base, merge=True, untie=True)
    assert found.lm_head.weight is not found.get_input_embeddings().weight


def test_heads_are_replaced_and_take_no_weight(tmp_path: Path) -> None:
    folders = save(tiny_bert(), tmp_path, (1, 2), modules_to_save=["classifier"])
    with pytest.raises(ConfigError, match=r"(?s)classifier.*its weight must be 1"):
        LoraModel.from_pretrained(folders[:1], base_model=tmp_path / "base", merge=True, weights=[0.5])
    with pytest.raises(ConfigError, match=re.escape(f"the adapter {str(folders[0])!r} replaces tensors")):
        LoraModel.from_pretrained(folders[0], base_model=tmp_path / "base", merge=True, weights=[0.5])
    with pytest.raises(ConfigError, match=r"weights=0.5 must be a list"):
        LoraModel.from_pretrained(folders[0], base_model=tmp_path / "base", merge=True, weights=0.5)


@pytest.mark.slow
def test_the_memory_of_a_merge_at_load(tmp_path: Path) -> None:
    command = [sys.executable, "examples/benchmarks/merge_on_load.py", "--layers", "4", "--repeats", "1",
               "--folder", str(tmp_path), "--json", str(tmp_path / "table.json")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert set(rows) == {"base alone", "hf_lora", "peft"}
    assert rows["hf_lora"]["memory"] <= 64  # MiB above loading the base alone
