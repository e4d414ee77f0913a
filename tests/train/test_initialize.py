"""Initializations that look at the trainer's own batches, from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from tiny import Rows, adapter_values, sentences, texts, tiny_bert, tiny_llama
from torch.utils.data import DataLoader, RandomSampler

from hf_lora import ConfigError, LoraConfig, LoraTrainer, LoraTrainingArguments, StateError, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.train.initialize import initialize

Make = Callable[..., Any]
INITS = {
    "eva": {"rho": 2.0, "use_label_mask": False},
    "corda": {"corda_method": "kpm"},
    "lora_ga": {"scale": "unit"},
}


def flags(init: str) -> dict[str, Any]:
    return {"lora_r": 2, "lora_init": init, "lora_init_config": INITS[init], "lora_init_batches": 3}


@pytest.mark.parametrize("init", ["eva", "corda", pytest.param("lora_ga", marks=pytest.mark.slow)])
def test_the_trainer_gives_an_adapter_its_first_values(init: str, arguments: Make) -> None:
    """As `apply_lora` with the same batches; the run is otherwise the same."""
    args = arguments(max_steps=1, learning_rate=0.0, seed=5, **flags(init))
    base, data = tiny_llama(), texts()
    trainer = LoraTrainer(model=tiny_llama(), args=args, train_dataset=data)
    ids = data[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(ids).logits, base.eval()(ids).logits)
    random = torch.get_rng_state()
    trainer.train()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    batches = list(DataLoader(data, 4, sampler=sampler, collate_fn=trainer.data_collator))[:3]
    torch.set_rng_state(random)
    model = apply_lora(tiny_llama(), args.lora_config(), batches=batches)
    if init != "lora_ga":  # whose decomposition draws random numbers
        assert_same_tensors(snapshot(trainer.model), snapshot(model))
    ranks = {path: layer._lora.adapters["default"].r for path, layer in adapter_layers(trainer.model).items()}
    assert ranks == {path: layer._lora.adapters["default"].r for path, layer in adapter_layers(model).items()}
    assert (len(set(ranks.values())) > 1) == (init == "eva")
    own, wanted = trainer.model.lora_configs["default"], model.lora_configs["default"]
    assert (own.rank_pattern, own.init_lora_weights) == (wanted.rank_pattern, init)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_resuming_changes_no_bit(init: str, arguments: Make) -> None:
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **flags(init)}
    whole = LoraTrainer(model=tiny_llama(), args=arguments(name="whole", **common), train_dataset=texts())
    whole.train()
    folder = Path(whole.args.output_dir) / "checkpoint-2"
    torch.manual_seed(999)
    resumed = LoraTrainer(model=tiny_llama(), args=arguments(name="resumed", **common), train_dataset=texts())
    resumed.train(resume_from_checkpoint=str(folder))
    assert adapter_values(resumed.model).keys() == adapter_values(whole.model).keys()
    assert_same_tensors(snapshot(resumed.model), snapshot(whole.model))


def test_heads_and_labels_of_the_adapter_stay(arguments: Make) -> None:
    trainer = LoraTrainer(
        model=tiny_bert(), args=arguments(max_steps=1, learning_rate=0.0), train_dataset=sentences(),
        lora_config=LoraConfig(r=2, init_lora_weights="eva", eva_config={"rho": 1.0}, bias="all"),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "copies" in name:
                parameter.fill_(0.5)
    trainer.train()
    copies = [p for n, p in trainer.model.named_parameters() if "copies" in n]
    assert copies
    assert all((p == 0.5).all() for p in copies)
    assert trainer.model.config.num_labels == 3
    assert all(layer.factor("lora_A", "default").any() for layer in adapter_layers(trainer.model).values())


def test_an_optimizer_for_the_tensors_before_is_refused(arguments: Make) -> None:
    config = LoraConfig(r=2, init_lora_weights="eva")
    trainer = LoraTrainer(model=tiny_llama(), args=arguments(max_steps=1), train_dataset=texts(), lora_config=config)
    trainer.create_optimizer()
    with pytest.raises(ConfigError, match=r"call apply_lora\(model, config, batches=\[…\]\) before LoraTrainer"):
        trainer.train()
    batches = [{name: value[None] for name, value in row.items()} for row in texts().rows]
    model = apply_lora(tiny_llama(), config, batches=batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    args = arguments(max_steps=1)
    LoraTrainer(model=model, args=args, train_dataset=texts(), optimizers=(optimizer, None)).train()


def test_a_start_that_is_cut_off_can_be_repeated(arguments: Make) -> None:
    class Cut(Rows):
        left = 5

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    args = arguments(max_steps=1, **flags("corda"))
    trainer = LoraTrainer(model=tiny_llama(), args=args, train_dataset=Cut(texts().rows))
    before = snapshot(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_tensors(snapshot(trainer.model), before)
    trainer.train()
    assert any("lora_A0" in name for name in snapshot(trainer.model))


def test_a_process_without_the_whole_base_is_refused_with_a_way_out(arguments: Make, tmp_path: Path) -> None:
    trainer = LoraTrainer(model=tiny_llama(), args=arguments(max_steps=1, **flags("eva")), train_dataset=texts())
    weight = trainer.model.lm_head.weight
    trainer.model.lm_head.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(StateError, match=r"does not hold the whole base.*then train with lora_adapter=folder"):
        initialize(trainer, trainer.model, None)
    batches = [{name: value[None] for name, value in row.items()} for row in texts().rows]
    model = apply_lora(tiny_llama(), LoraConfig(r=2, init_lora_weights="eva"), batches=batches)
    model.save_pretrained(tmp_path / "first")
    args = arguments(max_steps=1, learning_rate=0.0, lora_adapter=str(tmp_path / "first"))
    again = LoraTrainer(model=tiny_llama(), args=args, train_dataset=texts())
    again.train()
    assert_same_tensors(snapshot(again.model), snapshot(model))


def test_batches_that_the_model_does_not_take_are_refused_with_a_way_out(arguments: Make) -> None:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {f"chosen_{name}": torch.stack([row[name] for row in rows]) for name in rows[0]}

    args = arguments(max_steps=1, **flags("eva"))
    trainer = LoraTrainer(model=tiny_bert(), args=args, train_dataset=sentences(), data_collator=collate)
    with pytest.raises(
        ConfigError, match=r"exactly one of input_ids.*call apply_lora\(model, config, batches=\[…\]\) before"
    ):
        trainer.train()


def test_another_adapter_is_left_alone(arguments: Make) -> None:
    args = arguments(max_steps=1, learning_rate=0.0, **flags("eva"))
    trainer = LoraTrainer(model=tiny_llama(), args=args, train_dataset=texts())
    trainer.model.add_adapter("more", LoraConfig(r=3))
    trainer.model.delete_adapter("default")
    before = snapshot(trainer.model)
    trainer.train()
    assert_same_tensors(snapshot(trainer.model), before)


def test_a_rate_for_a_frozen_factor_is_refused(arguments: Make) -> None:
    args = arguments(max_steps=1, lora_init="mica", loraplus_lr_ratio=4.0)
    trainer = LoraTrainer(model=tiny_llama(), args=args, train_dataset=texts())
    with pytest.raises(ConfigError, match=r"have no effect: they are for factors B .* Omit them"):
        trainer.train()
    args = arguments(max_steps=1, lora_init="mica")
    LoraTrainer(model=tiny_llama(), args=args, train_dataset=texts()).train()


def test_wrong_flags_are_named(arguments: Make) -> None:
    for values, match in (
        (dict(lora_init="pissa", lora_init_config={"rho": 2}), "the initialization 'pissa' has no settings"),
        (dict(lora_init="eva", lora_init_config='{"rho": 0}'), "lora_eva_config: rho=0 must be"),
        (dict(lora_init_batches=0), "lora_init_batches=0 must be"),
    ):
        with pytest.raises(ConfigError, match=match):
            arguments(**values)
    parsed = LoraTrainingArguments(output_dir="x", lora_init="eva", lora_init_config='{"rho": 1.5}').lora_config()
    assert parsed.eva_config == {"rho": 1.5}
