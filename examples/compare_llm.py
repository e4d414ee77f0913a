"""Fine-tune SmolLM2 on GSM8K for one epoch with hf_lora, with PEFT and Trainer or TRL, or in full; time and memory.

    python examples/compare_llm.py --method train --data GSM8K_FOLDER
    python examples/compare_llm.py --method hf_lora --data GSM8K_FOLDER --rank 64 --ratio 4
    python examples/compare_llm.py --method full --data GSM8K_FOLDER --rate 1e-4
    python examples/compare_llm.py --method peft --data GSM8K_FOLDER --dropout 0.05
    python examples/compare_llm.py --method trl --data GSM8K_FOLDER --dropout 0.05

600 training examples are drawn with seed 0 (shuffled, the first ones); the loss is in nats a token over the answers of
200 test examples, drawn with seed 1. `train` is `hf-lora train` with the settings that it chooses. `peft` pads batches
of 8; `trl` and `hf_lora` pack rows of --length tokens and take one a step; `full` takes the documents of the same
packed rows, padded, so its steps are the same. A run is appended to --json, if it is given.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import studies
import torch
from datasets import Dataset
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", choices=("train", "hf_lora", "full", "peft", "trl", "none"), default="hf_lora")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--base", type=Path, help="folder of the base model; default: created from the package")
parser.add_argument("--train", type=int, default=600)
parser.add_argument("--test", type=int, default=200)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--alpha", type=int, help="default: the rank")
parser.add_argument("--rate", type=float, default=1e-3)
parser.add_argument("--ratio", type=float, help="LoRA+: learning rate of B relative to A (hf_lora)")
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--muon", type=float, help="rate of LoRA-Muon (hf_lora)")
parser.add_argument("--ema", type=float, default=0.0, help="average of the weights (hf_lora)")
parser.add_argument("--json", type=Path, help="file of runs, such as examples/benchmarks/records.json")
parser.add_argument("--out", default="out/compare_llm")
options = parser.parse_args()
torch.set_num_threads(options.threads)


base = options.base or base_folder()
tokenizer = AutoTokenizer.from_pretrained(base)
model: Any = None
if options.method != "train":
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
chats = studies.problems(options.data, "train")[: options.train]
train = [studies.answered(tokenizer, chat) for chat in chats]
test = [studies.answered(tokenizer, chat) for chat in studies.problems(options.data, "test")[: options.test]]
alpha = options.alpha or options.rank
common = dict(
    output_dir=options.out, learning_rate=options.rate, num_train_epochs=1, lr_scheduler_type="cosine",
    warmup_steps=10, logging_steps=10, save_strategy="no", report_to="none", seed=options.seed,
    dataloader_pin_memory=False, gradient_checkpointing=False,
)  # fmt: skip
packed = dict(packing=True, max_length=options.length, per_device_train_batch_size=1, bf16=False)
if options.method == "hf_lora":
    from hf_lora import LoraSFTConfig, LoraSFTTrainer

    arguments = LoraSFTConfig(
        **common, **packed, lora_r=options.rank, lora_alpha=alpha, lora_dropout=options.dropout,
        loraplus_lr_ratio=options.ratio, muon_learning_rate=options.muon, ema=options.ema,
    )  # fmt: skip
    trainer = LoraSFTTrainer(model, arguments, train_dataset=Dataset.from_list(train), processing_class=tokenizer)
elif options.method == "full":
    arguments = TrainingArguments(**common, per_device_train_batch_size=1, remove_unused_columns=False)
    trainer = Trainer(model, arguments, studies.Documents(), train_dataset=studies.packed(train, options.length))
elif options.method in ("peft", "trl"):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    config = LoraConfig(
        r=options.rank, lora_alpha=alpha, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    if options.method == "peft":
        model = get_peft_model(model, config)
        arguments = TrainingArguments(**common, per_device_train_batch_size=8)
        trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=train)
    else:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model, SFTConfig(**common, **packed), train_dataset=Dataset.from_list(train), processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip


def trained() -> tuple[Any, float]:
    """(the trained model, seconds)"""
    if options.method == "none":
        return model, 0.0
    if options.method == "train":
        from hf_lora import finetune

        out, file = f"{options.out}/run", Path(options.out) / "train.jsonl"
        Dataset.from_list([{"messages": chat} for chat in chats]).to_json(file)
        result = finetune({
            "model": str(base), "train_file": str(file), "dtype": "float32", "num_train_epochs": 1,
            "seed": options.seed, "save_strategy": "no", "output_dir": out, "overwrite": True,
        })  # fmt: skip
        return result.model, result.seconds
    start = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - start


def train_and_evaluate() -> tuple[float, float | None]:
    found, seconds = trained()
    return seconds, studies.loss_a_token(found, test) if test else None


(seconds, loss), peak = studies.with_peak(train_and_evaluate)
settings = {k: v for k, v in vars(options).items() if k not in ("data", "base", "out", "json")}
steps = trainer.state.global_step if options.method not in ("train", "none") else None
print(json.dumps({**settings, "steps": steps, "seconds": round(seconds, 1), "peak_mb": round(peak), "loss": loss}))
if options.json is not None:
    told = {k: v for k, v in settings.items() if k not in ("method", "train", "test", "seed", "threads")}
    told = {k: v for k, v in told.items() if v != parser.get_default(k) or k == "rate"}
    key = {
        "study": "compare_llm", "data": f"gsm8k, {options.train} examples", "split": studies.TEST,
        "model": "SmolLM2-135M-Instruct", "method": options.method, "seed": options.seed,
        "settings": "" if options.method in ("train", "none") else " ".join(f"{k}={v}" for k, v in told.items()),
    }  # fmt: skip
    studies.Runs(options.json).add(key, "nats a token", loss, seconds, peak)
