"""DPO with SmolLM2 on 60 pairs: an answer in JSON is preferred to what the model says by itself.

    python examples/preference_smollm2.py [OUTPUT_DIR]

Writes pairs.jsonl to OUTPUT_DIR (default out/dpo), does what `hf-lora train --task dpo` does, and prints the share of
test messages that are answered with valid JSON, before and after. It takes about three minutes on two cores.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from finetune_smollm2 import read
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lora import LoraModel, finetune, generate_texts

PAIRS, TESTED = 60, 48


def answers(model: Any, tokenizer: Any, chats: list[Any]) -> list[str]:
    return generate_texts(model, tokenizer, [chat[:-1] for chat in chats], max_new_tokens=40, batch_size=24)


def valid(texts: list[str]) -> float:
    """The share of texts that are a JSON object."""

    def is_object(text: str) -> bool:
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False

    return sum(map(is_object, texts)) / len(texts)


def main() -> None:
    out = Path(sys.argv[1] if sys.argv[1:] else "out/dpo")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)  # faster than bfloat16 on a CPU
    train, test = read("train")[:PAIRS], read("test")[:TESTED]
    before = valid(answers(model, tokenizer, test))
    said = answers(model, tokenizer, train)
    pairs = [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": text}]}
        for chat, text in zip(train, said, strict=True)
        if text.strip() and text != chat[-1]["content"]
    ]
    file = out / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    start = time.perf_counter()
    options = {
        "task": "dpo", "model": str(base_folder()), "train_file": str(file), "output_dir": str(out / "adapter"),
        "overwrite": True, "dtype": "float32", "lora_r": 16, "learning_rate": 5e-4, "loraplus_lr_ratio": 4,
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 5, "logging_strategy": "steps",
    }  # fmt: skip
    finetune(options, print)
    seconds = time.perf_counter() - start
    texts = answers(LoraModel.from_pretrained(out / "adapter", dtype=torch.float32, merge=True), tokenizer, test)
    print(f"\n{test[0][1]['content']}\n  {texts[0]}")
    print(f"{len(pairs)} pairs, {len(test)} test messages: valid JSON {before:.0%} before, {valid(texts):.0%} after")
    print(f"training took {seconds:.0f} s")


if __name__ == "__main__":
    main()
