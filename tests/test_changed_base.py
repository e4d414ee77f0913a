"""A base in memory that is no longer the one of its files: adapters of the files' base are refused on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_llama
from torch import Tensor

from hf_lora import BaseMismatchError, LoraConfig, LoraModel, apply_lora

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch_for(model)).logits
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of a base and of two adapters, one of them written by PEFT, and their outputs."""
    root = tmp_path_factory.mktemp("files")
    tiny_llama().save_pretrained(root / "base")
    base = lambda: type(tiny_llama()).from_pretrained(root / "base")  # noqa: E731
    wanted = {}
    for seed, name in enumerate(("ours", "small")):
        model = randomize(apply_lora(base(), CONFIG), seed, 0.3 if name == "ours" else 1e-3)
        wanted[name] = logits(model)
        model.save_pretrained(root / name)
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted["theirs"] = logits(theirs)
    theirs.save_pretrained(str(root / "theirs"))
    return root, base, wanted


@pytest.mark.parametrize("second", ["ours", "small", "theirs"])
@pytest.mark.parametrize("first", ["ours", "small", "theirs"])
def test_a_second_adapter_is_not_merged_into_what_contains_the_first(files: Any, first: str, second: str) -> None:
    """Even one whose update is smaller than what sampled weights show."""
    root, base, wanted = files
    model = base()
    merged = LoraModel.from_pretrained(root / first, base_model=model, merge=True)
    assert_near(logits(merged), wanted[first], torch.float32, 64)
    before = snapshot(merged)
    with pytest.raises(BaseMismatchError, match="this model contains the merged 'default'") as error:
        LoraModel.from_pretrained(root / second, base_model=merged, merge=True)
    assert_same_tensors(snapshot(merged), before)
    assert "allow_other_base=True" in str(error.value)
    both = LoraModel.from_pretrained(root / second, base_model=merged, merge=True, allow_other_base=True)
    together = LoraModel.from_pretrained([root / first, root / second], base_model=base(), merge=True)
    assert_near(logits(both), logits(together), torch.float32, 64)
    assert_near(logits(LoraModel.from_pretrained(root / second, base_model=base(), merge=True)), wanted[second],
                torch.float32, 64)  # fmt: skip


def test_an_adapter_trained_on_a_merged_model_loads_on_its_own_base_alone(files: Any, tmp_path: Path) -> None:
    root, base, _ = files
    merged = LoraModel.from_pretrained(root / "ours", base_model=base(), merge=True)
    merged.save_pretrained(tmp_path / "merged")
    model = randomize(apply_lora(merged, CONFIG), 7)
    y = logits(model)
    model.save_pretrained(tmp_path / "second")
    for base_model in (None, base()):
        with pytest.raises(BaseMismatchError, match="its weights in training were not those of its files"):
            LoraModel.from_pretrained(tmp_path / "second", base_model=base_model)
    assert torch.equal(logits(LoraModel.from_pretrained(tmp_path / "second", base_model=str(tmp_path / "merged"))), y)
    again = LoraModel.from_pretrained(tmp_path / "second", base_model=model.unload())
    assert torch.equal(logits(again), y)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "trained": lambda m: [p.data.add_(0.1) for n, p in m.named_parameters() if "proj" in n],
    "initialized again": lambda m: m.load_state_dict(tiny_llama(seed=9).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_weights_decide_about_a_base_that_was_changed_in_memory(files: Any, change: str) -> None:
    root, base, _ = files
    model = base()
    CHANGES[change](model)
    with pytest.raises(BaseMismatchError, match="its weights in memory were not those of its files"):
        LoraModel.from_pretrained(root / "ours", base_model=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_another_dtype_is_the_same(files: Any, dtype: torch.dtype) -> None:
    root, base, _ = files
    LoraModel.from_pretrained(root / "ours", base_model=base().to(dtype))


def test_a_module_that_is_not_in_the_checkpoint_does_not_count(tmp_path: Path) -> None:
    tiny_bert(cls="BertForMaskedLM").save_pretrained(tmp_path / "base")  # without a pooler
    cls: Any = type(tiny_bert(cls="BertModel"))
    model = randomize(apply_lora(cls.from_pretrained(tmp_path / "base"), LoraConfig(r=4, target_modules=["query"])))
    model.save_pretrained(tmp_path / "adapter")
    for _ in range(2):  # each with a random pooler of its own
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=cls.from_pretrained(tmp_path / "base"))
