"""Wrote tests/files/written_by_0, once, at commit a2ec75f (version 0.1.0).

The files stand for those that users of that version have. They are not made again with later code, which would only
show that it reads what it writes itself: see test_written_before.py. As it was run, from the repository's root:

    PYTHONPATH=tests:tests/files python tests/files/write_old_adapters.py
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch
from helpers import offline, randomize
from test_written_before import DATA, STEPS, build, output_of, trainer_of

from hf_lora import LoraConfig, apply_lora

TOKENS = [[3, 17, 5, 39, 8, 21, 30], [11, 4, 26, 9, 35, 12, 6]]
LLAMA = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BERT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, num_labels=3,
)  # fmt: skip
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
RESNET = dict(
    num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
)  # fmt: skip

ENTRIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "LlamaForCausalLM", "config": LLAMA, "seed": 1, "input_ids": TOKENS},
    "bert": {
        "class": "BertForSequenceClassification", "config": BERT, "seed": 2, "input_ids": TOKENS,
        "id2label": {"0": "calm", "1": "glad", "2": "sad"},
    },
    "gpt2": {"class": "GPT2LMHeadModel", "config": GPT2, "seed": 3, "input_ids": TOKENS},
    "resnet": {"class": "ResNetForImageClassification", "config": RESNET, "seed": 4, "pixels": [2, 3, 32, 32]},
    "embedding": {
        "class": "LlamaForCausalLM", "config": LLAMA | {"num_hidden_layers": 1}, "seed": 5, "input_ids": TOKENS,
    },
    "run": {"class": "BertForSequenceClassification", "config": BERT, "seed": 6, "input_ids": TOKENS},
}  # fmt: skip

CONFIGS: dict[str, LoraConfig] = {
    "llama": LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2, r".*layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"v_proj": 3, "layers.0.mlp.down_proj": 10}, use_rslora=True, init_lora_weights=False,
        lora_dropout=0.1, task_type="CAUSAL_LM",
    ),
    "bert": LoraConfig(
        r=3, target_modules=["query", "value"], bias="all", modules_to_save=["classifier"], init_lora_weights=False,
        task_type="SEQ_CLS",
    ),
    "gpt2": LoraConfig(
        r=2, lora_alpha=4, target_modules=["wte", "c_attn", "c_proj", "c_fc"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
    "resnet": LoraConfig(r=2, target_modules=["convolution"], modules_to_save=[], init_lora_weights=False),
    "embedding": LoraConfig(
        r=2, target_modules="attention", modules_to_save=["embed_tokens"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip

YAML = """\
# hf-lora train --config train.yaml
model: base
task: text-classification
train_file: train.csv
max-length: 64
output_dir: adapter
max_steps: 20
learning_rate: 3e-3
use_cpu: true
lora_r: 4
lora-alpha: 12
lora_dropout: 0.1
lora_target_modules: [query, value]
lora_exclude_modules: [pooler]
lora_layers_to_transform: [0, 1]
lora_layers_pattern: [layer]
lora_rank_pattern: {query: 2}
lora_alpha_pattern: {value: 3.0}
lora_use_rslora: true
lora_bias: lora_only
lora_modules_to_save: [classifier]
lora_init: gaussian
lora_task_type: SEQ_CLS
loraplus_lr_ratio: 4.0
head_learning_rate: 1e-3
frozen_head_loss: false
share_inputs: false
keep_freed_memory: true
lora_guard_steps: 2
nonfinite: skip
"""


def write() -> None:
    """Every file of the folder, which must not be there."""
    DATA.mkdir(parents=True)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        entry = ENTRIES[name]
        model = build(entry)
        entry["base"] = output_of(model, entry).tolist()
        torch.manual_seed(seed)
        if "id2label" in entry:
            model.config.id2label = {int(k): v for k, v in entry["id2label"].items()}
        model = apply_lora(model, config)
        randomize(model, seed)
        entry["output"] = output_of(model, entry).tolist()
        model.save_pretrained(DATA / name)

    entry = ENTRIES["run"]
    os.chdir(DATA)  # so that no absolute path gets into a file
    torch.manual_seed(len(CONFIGS))
    trainer = trainer_of(build(entry), "run")
    trainer.train()
    entry["output"] = output_of(trainer.model, entry).tolist()
    kept = f"checkpoint-{STEPS}"
    shutil.move(f"run/{kept}", kept)
    shutil.rmtree("run")
    trainer.model.load_adapter_weights(kept)
    entry["at_checkpoint"] = output_of(trainer.model, entry).tolist()

    (DATA / "train.yaml").write_text(YAML, encoding="utf-8")
    (DATA / "expected.json").write_text(json.dumps(ENTRIES, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    offline()
    torch.set_num_threads(1)
    write()
