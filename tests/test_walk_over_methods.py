"""Random sequences of verbs on a model with adapters of every method and initialization, and of rows of tokens.

After each verb the output is the one that the verb promises; a verb that raises leaves every tensor and the output as
they were; in the end the base is what it was.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, relative_error, snapshot, tiny_llama
from torch import Tensor, nn

from hf_lora import LoraConfig, LoraModel, TargetError, apply_lora, share_inputs
from hf_lora.errors import LoraError
from hf_lora.files.save import save_adapter

IDS = torch.tensor([[1, 5, 9, 3, 60, 7, 4]])
ENDS = ["embed_tokens", "q_proj", "lm_head"]
CONFIGS: list[dict[str, Any]] = [
    {},
    dict(use_dora=True),
    dict(use_dora=True, target_modules=ENDS),
    dict(use_dora=True, init_lora_weights="pissa_niter_2"),
    dict(init_lora_weights="pissa"),
    dict(init_lora_weights="olora", target_modules=["q_proj", "lm_head"]),
    dict(method="lora_fa", bias="all"),
    dict(lora_bias=True, target_modules=["q_proj"]),
    dict(trainable_token_indices=[3, 9]),
    dict(trainable_token_indices=[4, 5, 60], target_modules=["embed_tokens", "q_proj"]),
    dict(trainable_token_indices={"lm_head": [7]}, target_modules=["lm_head"]),
    dict(init_lora_weights="mica", target_modules=["embed_tokens", "down_proj"]),
    dict(init_lora_weights="eva", eva_config={"use_label_mask": False}, exclude_modules=["o_proj"]),
    dict(init_lora_weights="corda", target_modules=["q_proj", "v_proj"]),
    dict(init_lora_weights="lora_ga", use_dora=True, target_modules=["q_proj", "lm_head"]),
    dict(alora_invocation_tokens=[9, 3]),
]
BATCHES = [dict(input_ids=ids[None], labels=ids[None]) for ids in torch.arange(1, 49).view(3, 16)]
"""For initializations that look at some."""


class Walk:
    """A model, and what the base gave before anything was done to it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder, self.count = random.Random(seed), folder, 0
        self.tied = self.random.random() < 0.5
        torch.manual_seed(seed)
        self.base = tiny_llama(tied=self.tied, attention_bias=True)
        self.model = copy.deepcopy(self.base)
        try:
            apply_lora(self.model, self.config(), "first", batches=BATCHES).eval()
        except TargetError:  # rows and factors of one tied weight
            apply_lora(self.model, LoraConfig(r=4), "first").eval()
        self.train()

    def config(self) -> LoraConfig:
        return LoraConfig(r=4, **self.random.choice(CONFIGS))

    def output(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            logits: Tensor = (self.model if model is None else model)(IDS).logits
        return logits

    def train(self) -> None:
        """Change what is trained, as steps would."""
        self.model.train()
        self.model(IDS, labels=IDS).loss.backward()
        self.model.zero_grad()
        self.model.eval()
        generator = torch.Generator().manual_seed(self.random.randrange(10**6))
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    # Verbs that change what acts -------------------------------------------------------------------------------------

    def add(self) -> None:
        self.count += 1
        apply_lora(self.model, self.config(), f"more{self.count}", batches=BATCHES)
        self.model.eval()

    def switch(self) -> None:
        names = list(self.model.lora_configs)
        self.model.set_adapter(self.random.sample(names, self.random.randint(1, min(2, len(names)))))

    def delete(self) -> None:
        if len(self.model.lora_configs) > 1:
            self.model.delete_adapter(self.random.choice(list(self.model.lora_configs)))

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    # Verbs after which the output is the same ------------------------------------------------------------------------

    def merge(self) -> None:
        self.model.merge_adapter(untie=True)

    def disable(self) -> None:
        with self.model.disable_adapter():
            assert torch.equal(self.output(), self.output(self.base))

    def copied(self) -> None:
        self.model = self.random.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])(self.model)

    def written(self) -> None:
        if len(active := self.model.active_adapters()) == 1:
            save_adapter(self.model, self.folder, active[0])
            again = LoraModel.from_pretrained(self.folder, base_model=copy.deepcopy(self.base))
            assert relative_error(self.output(again), self.output()) < 3e-5

    def inferred(self) -> None:
        with torch.inference_mode():
            self.model(IDS)

    def shared(self) -> None:
        share_inputs(self.model, input_ids=IDS)


FREE: list[Callable[[Walk], None]] = [Walk.add, Walk.switch, Walk.delete, Walk.unmerge, Walk.train]
SAME: list[Callable[[Walk], None]] = [
    Walk.merge, Walk.disable, Walk.copied, Walk.written, Walk.inferred, Walk.shared,
]  # fmt: skip


def check(seed: int, folder: Path, steps: int = 12) -> None:
    walk = Walk(seed, folder)
    log = [f"seed {seed}, tied {walk.tied}"]
    for _ in range(steps):
        verb = walk.random.choice([*FREE, *SAME])
        log.append(verb.__name__)
        before, tensors = walk.output(), snapshot(walk.model)
        try:
            verb(walk)
        except LoraError as error:
            log.append(type(error).__name__)
            assert_same_tensors(snapshot(walk.model), tensors)
            assert torch.equal(walk.output(), before), log
            continue
        if verb in SAME:
            assert relative_error(walk.output(), before) < 3e-5, log
    plain: nn.Module = walk.model.unload()
    assert_same_tensors(snapshot(plain), snapshot(walk.base))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == walk.tied, log  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_a_few_walks(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(4, 204, 20))
def test_many_walks(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 20):
        check(seed, tmp_path)
