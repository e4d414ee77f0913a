"""Fine-tune a chat model with TRL's SFTTrainer, then talk to it: two names are imported from hf_lora instead of TRL.

    python examples/chat.py                                          # SmolLM2 on household messages, six minutes
    python examples/chat.py --model FOLDER_OR_NAME --train-file chats.jsonl --ask "A first question" "And a second"

A line of the file is a chat: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.
Only the assistant's messages are trained. Several chats share a row (packing) without attention between them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from finetune_smollm2 import read
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lora import Conversation, LoraSFTConfig, LoraSFTTrainer, load_for_generation

ASKED = ["wake me at quarter to six, will you", "tell Priya I am late"]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model with a chat template; default: SmolLM2-135M-Instruct")
    parser.add_argument("--train-file", help="JSON lines; default: messages to a household assistant")
    parser.add_argument("--output", type=Path, default=Path("out/chat"))
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--ask", nargs="+", default=ASKED, help="what the trained model is asked, in one conversation")
    options = parser.parse_args(words)

    if options.train_file:
        data = load_dataset("json", data_files=options.train_file, split="train")
    else:
        data = Dataset.from_dict({"messages": read("train")})
    source = options.model or str(base_folder())
    args = LoraSFTConfig(
        str(options.output), lora_r=16, learning_rate=1e-3, lr_scheduler_type="cosine", num_train_epochs=1,
        max_steps=options.max_steps, per_device_train_batch_size=1, max_length=256, logging_steps=10,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = LoraSFTTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),  # on a GPU: torch.bfloat16
        args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    trainer.train()
    trainer.save_model()  # the adapter and the tokenizer with its template; not the base

    model, tokenizer = load_for_generation(options.output)  # as another program would
    conversation = Conversation(model, tokenizer, max_new_tokens=64)
    for question in options.ask:
        print(f"> {question}")
        conversation.say(question, stream=lambda piece: print(piece, end="", flush=True))
        print()
    print(f"Go on: hf-lora chat {options.output}")


if __name__ == "__main__":
    main()
