"""Fine-tune SmolLM2 on GSM8K for one epoch with hf_lora, or with PEFT and Trainer or TRL, and print time and memory.

    python examples/compare_llm.py --method hf_lora --data GSM8K_FOLDER --rank 64 --ratio 4
    python examples/compare_llm.py --method peft --data GSM8K_FOLDER --dropout 0.05
    python examples/compare_llm.py --method trl --data GSM8K_FOLDER --dropout 0.05

600 training examples are drawn with seed 0; the loss is in nats a token over the answers of 200 test examples, drawn
with seed 1. `peft` pads batches of 8; `trl` and `hf_lora` pack rows of --length tokens and take one a step.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", choices=("hf_lora", "peft", "trl", "none"), default="hf_lora")
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
parser.add_argument("--out", default="out/compare_llm")
options = parser.parse_args()
torch.set_num_threads(options.threads)


def chats(name: str, count: int, seed: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (options.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in random.Random(seed).sample(rows, 600 if name == "train" else 200)[:count]
    ]


def labeled(messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Independent of the compared methods: the answer and its end token are trained."""
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(messages[1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


@torch.no_grad()
def loss_a_token(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        trained = labels != -100
        keep = int(trained.sum()) + 1  # the answer is the end of its row
        logits = model(torch.tensor([row["input_ids"]]), logits_to_keep=keep, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels[trained], reduction="sum"))
        tokens += int(trained.sum())
    return total / tokens


base = options.base or base_folder()
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
train = [labeled(chat) for chat in chats("train", options.train, 0)]
test = [labeled(chat) for chat in chats("test", options.test, 1)]
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
        loraplus_lr_ratio=options.ratio,
    )  # fmt: skip
    trainer = LoraSFTTrainer(model, arguments, train_dataset=Dataset.from_list(train), processing_class=tokenizer)
elif options.method != "none":
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
start = time.perf_counter()
if options.method != "none":
    trainer.train()
    model = trainer.model
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
steps = trainer.state.global_step if options.method != "none" else 0
loss = loss_a_token(model, test) if test else None
settings = {k: v for k, v in vars(options).items() if k not in ("data", "base", "out")}
print(json.dumps({**settings, "steps": steps, "seconds": round(seconds, 1), "peak_mb": round(peak), "loss": loss}))
