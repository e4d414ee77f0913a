"""GRPO and RLOO with completions from a merged adapter: the same run, and every bit of the weights is restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, snapshot
from test_trl_trainers import DATA, OF_REINFORCED, PLAIN, byte_tokenizer, compare, length_of, llama, records
from transformers import set_seed

import hf_lora
from hf_lora import ConfigError, LoraConfig, MergeError, apply_lora
from hf_lora.adapt.state import state_of

datasets = pytest.importorskip("datasets")


def made(name: str, folder: Path, model: Any = None, **settings: Any) -> Any:
    if model is None:
        model = llama()
        model.config.pad_token_id = 0
        randomize(apply_lora(model, LoraConfig(r=4)))
    config, trainer = (getattr(hf_lora, f"Lora{name}{kind}") for kind in ("Config", "Trainer"))
    args = config(
        str(folder), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-2, beta=0.3, **OF_REINFORCED, **settings,
    )  # fmt: skip
    return trainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_dict(DATA["GRPO"]), reward_funcs=length_of,
        processing_class=byte_tokenizer(PLAIN["chatml"]),
    )  # fmt: skip


def watched(model: Any, stop: bool = False) -> list[tuple[str, ...]]:
    """Which adapters are merged at each call of `generate`; `stop` interrupts the first after its completions."""
    seen: list[tuple[str, ...]] = []
    own = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        seen.append(state_of(model).activity.merged)
        if stop:
            raise KeyboardInterrupt
        return found

    model.generate = generate
    return seen


@pytest.mark.parametrize("name", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_the_run_is_the_same_and_no_bit_of_the_weights_changes(name: str, tmp_path: Path) -> None:
    found = []
    for merged in (True, False):
        run = made(name, tmp_path, lora_generate_merged=merged)
        before, seen = snapshot(run.model), watched(run.model)
        set_seed(0)
        run.train()
        assert seen == [("default",) if merged else ()] * 2
        after = snapshot(run.model)
        assert_same_tensors(*({n: t for n, t in values.items() if "lora_" not in n} for values in (after, before)))
        found.append(records(run))
    compare(*found)


def test_an_interrupted_generation_leaves_the_bits_of_the_model(tmp_path: Path) -> None:
    run = made("GRPO", tmp_path, lora_generate_merged=True)
    model, ids = run.model, torch.arange(3, 9)[None]
    before, logits = snapshot(model), model.eval()(ids).logits
    seen = watched(model, stop=True)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert seen == [("default",)]
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(model.eval()(ids).logits, logits)


def test_it_is_refused_where_nothing_can_be_merged(tmp_path: Path) -> None:
    from quantized_bases import load, save_base

    with pytest.raises(ConfigError, match="use_transformers_continuous_batching=True generates in another way"):
        made("GRPO", tmp_path, lora_generate_merged=True, use_transformers_continuous_batching=True)
    base = load(save_base(tmp_path / "base", vocab_size=400), "nf4")
    base.config.pad_token_id = 0
    with pytest.raises(MergeError, match=r"(?s)lora_generate_merged=True\).*its weight is quantized"):
        made("GRPO", tmp_path, apply_lora(base, LoraConfig(r=4)), lora_generate_merged=True)
