"""LoRA in a training loop without a Trainer: from a file of chats to a saved adapter, to be read from top to bottom.

    python examples/plain_loop.py                                    # SmolLM2 on household messages, out/plain-loop
    python examples/plain_loop.py --resume                           # goes on from the newest checkpoint
    python examples/plain_loop.py --model FOLDER_OR_NAME --bf16 --batch-size 2 --accumulate 4

A resumed run ends with the same bits as one that was not interrupted: the rows and the dropout of a step depend on its
number alone, so a checkpoint needs only the adapter, the optimizer and the schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from finetune_smollm2 import read
from smollm2 import base_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

from hf_lora import LoraConfig, LoraModel, apply_lora, share_inputs
from hf_lora.train.optimizer import learning_rates, split_by_rate

Row = dict[str, list[int]]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model with a chat template; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("out/plain-loop"))
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a forward")
    parser.add_argument("--accumulate", type=int, default=1, help="forwards of an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast); the weights stay float32")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def encode(tokenizer: Any, chat: list[dict[str, str]]) -> Row:
    """Token ids and labels; the prompt has the label -100, so that only the answer is trained."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat)["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def rows_of_step(rows: list[Row], step: int, size: int, seed: int) -> list[Row]:
    """The rows of an optimizer step. Each epoch has its own order; the rest that fills no step is left out."""
    epoch, place = divmod(step, len(rows) // size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return [rows[i] for i in order[place * size : (place + 1) * size]]


def answer_tokens(rows: list[Row]) -> int:
    """How many tokens the loss of the rows is over."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def summed_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss summed over the answers' tokens: the logits at a token belong to the label of the next one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: Any, rows: list[Row], collate: Callable[[list[Row]], Any], options: argparse.Namespace) -> float:
    """The mean loss of a token."""
    model.eval()
    total = 0.0
    for i in range(0, len(rows), options.batch_size):
        batch = collate(rows[i : i + options.batch_size]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
            total += float(summed_loss(model, batch))
    model.train()
    return total / answer_tokens(rows)


def save(model: Any, state: dict[str, Any], output: Path) -> None:
    """Write a checkpoint under another name, and rename it when it is complete."""
    model.save_pretrained(output / "partial")
    torch.save(state, output / "partial" / "loop.pt")
    (output / "partial").rename(output / f"step-{state['step']}")


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    found = sorted(options.output.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    if options.resume is not bool(found):
        sys.exit(f"{options.output} has {len(found)} checkpoints: --resume needs one, and a new run a folder without")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = options.model or str(base_folder())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads to the longest row, labels with -100
    train, test = ([encode(tokenizer, chat) for chat in read(name)] for name in ("train", "test"))

    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if found:
        model = LoraModel.from_pretrained(found[-1], base_model=model, is_trainable=True)
    else:
        model = apply_lora(model, LoraConfig(r=options.rank, lora_dropout=options.dropout))
    model.to(device).train()
    share_inputs(model, **collate(train[:1]).to(device))  # query, key and value read the same tensor: read it once

    # Only the adapter is trained; its B at four times the rate of A (LoRA+).
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    split_by_rate(optimizer, learning_rates(model, options.learning_rate, 4.0, None))
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    first = 0
    if found:
        state = torch.load(found[-1] / "loop.pt", map_location=device, weights_only=True)
        if state["settings"] != settings:
            sys.exit(f"{found[-1]} was trained with other settings: {state['settings']}")
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]

    for step in range(first, options.steps):
        torch.manual_seed(options.seed + step)  # of the dropout
        rows = rows_of_step(train, step, options.batch_size * options.accumulate, options.seed)
        loss = torch.zeros((), device=device)
        for i in range(0, len(rows), options.batch_size):
            batch = collate(rows[i : i + options.batch_size]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                part = summed_loss(model, batch) / answer_tokens(rows)  # together the mean over all rows of the step
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, options.clip, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            measured = evaluate(model, test, collate, options)
            print(f"step {step + 1}: loss {loss:.4f}, gradient {norm:.2f}, test loss {measured:.4f}", flush=True)
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "settings": settings}
            save(model, state | {"step": step + 1}, options.output)

    model.save_pretrained(options.output / "adapter")
    tokenizer.save_pretrained(options.output / "adapter")
    print(f"Try it: hf-lora chat {options.output / 'adapter'}")


if __name__ == "__main__":
    main()
