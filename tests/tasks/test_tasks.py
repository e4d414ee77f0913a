"""Each task through the command line: rows as in transformers' example scripts, and the metrics of a merged model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import run_command, write_lines
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from tasks.conftest import table
from tasks.task_runs import FILES, OPTIONS, Run
from transformers import AutoConfig, DataCollatorForLanguageModeling

from hf_lora import LoraModel
from hf_lora.data.tables import read_table, table_of
from hf_lora.evaluation.tags import entities
from hf_lora.tasks.base import Given
from hf_lora.tasks.registry import TASKS
from hf_lora.train.parsing import TASK_DEFAULTS, parse_arguments
from hf_lora.train.run_data import read_data


def fast(*tasks: str) -> list[Any]:
    """All tasks, of which only these are tested fast."""
    return [pytest.param(task, marks=[] if task in tasks else [pytest.mark.slow]) for task in FILES]


# Token classification ------------------------------------------------------------------------------------------------


def test_words_get_their_tag_at_their_first_token(run_of: Callable[[str], Run]) -> None:
    """As `tokenize_and_align_labels` of transformers' example of token classification."""
    run = run_of("token-classification")
    names = sorted({tag for tags in run.table.columns["ner_tags"] for tag in tags})
    found = run.encoded()
    several = 0
    for row, words, tags in zip(found, run.table.columns["tokens"], run.table.columns["ner_tags"], strict=True):
        batch = run.tokenizer()(words, is_split_into_words=True, truncation=True, max_length=32)
        labels, before = [], None
        for word in batch.word_ids():
            labels.append(-100 if word is None or word == before else names.index(tags[word]))
            several += word is not None and word == before
            before = word
        assert row == {**batch, "labels": labels}
    assert several > 10
    assert LoraModel.from_pretrained(run.out).config.id2label == dict(enumerate(names))


def test_entities_are_scored_as_a_merged_model_predicts_them(run_of: Callable[[str], Run]) -> None:
    run = run_of("token-classification")
    model, chosen, wanted = run.merged(), [], []
    for row in run.encoded():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            picked = model(ids).logits[0].argmax(-1)
        kept = [i for i, label in enumerate(row["labels"]) if label != -100]
        chosen.append([model.config.id2label[int(picked[i])] for i in kept])
        wanted.append([model.config.id2label[row["labels"][i]] for i in kept])
    found, true = ({(i, *c) for i, row in enumerate(part) for c in chunks(row)} for part in (chosen, wanted))
    right = len(found & true)
    expected = {
        "rows": 24, "precision": right / len(found), "recall": right / len(true),
        "f1": 2 * right / (len(found) + len(true)),
        "accuracy": accuracy_score(np.concatenate(wanted), np.concatenate(chosen)),
    }  # fmt: skip
    assert 0 < right < len(true)
    assert run.found == pytest.approx(expected)
    run.check(*expected)


def chunks(tags: list[str]) -> list[tuple[str, int, int]]:
    """`get_entities` of seqeval, after CoNLL's script conlleval."""
    found, before, kind_before, first = [], "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag.split("-", 1)[-1]
        ends = before in "ES" or (before in "BI" and prefix in "BSO")
        ends = ends or (before not in "O." and kind_before != kind)
        starts = prefix in "BS" or (before in "ESO" and prefix in "EI")
        starts = starts or (prefix not in "O." and kind_before != kind)
        if ends and before != "O":
            found.append((kind_before, first, i - 1))
        if starts:
            first = i
        before, kind_before = prefix, kind
    return found


def test_entities_are_those_of_conlleval() -> None:
    generator = np.random.default_rng(0)
    known = ["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y"]
    for _ in range(300):
        tags = [known[i] for i in generator.integers(len(known), size=generator.integers(1, 9))]
        assert entities(tags) == chunks(tags), tags


# Sequence to sequence ------------------------------------------------------------------------------------------------


def test_targets_are_the_labels_and_generated_texts_are_compared(run_of: Callable[[str], Run]) -> None:
    run = run_of("seq2seq-lm")
    tokenizer, model, columns = run.tokenizer(), run.merged(), run.table.columns
    texts = []
    for row, document, summary in zip(run.encoded(), columns["document"], columns["summary"], strict=True):
        batch = tokenizer(document, max_length=32, truncation=True)
        assert row == {**batch, "labels": tokenizer(text_target=summary)["input_ids"][:6]}
        out = model.generate(torch.tensor([batch["input_ids"]]), max_new_tokens=6, do_sample=False)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    pairs = list(zip(texts, columns["summary"], strict=True))
    expected = {
        "rows": 24, "exact_match": np.mean([a == b for a, b in pairs]), "rouge_l": np.mean([rouge(*p) for p in pairs]),
        "chrf": chrf(pairs),
    }  # fmt: skip
    assert run.found == pytest.approx(expected)
    assert 0 < run.found["rouge_l"] < 1
    run.check(*expected)
    assert run.trained["perplexity"] > 1


def rouge(found: str, true: str) -> float:
    """ROUGE-L by trying all subsequences of the shorter text."""
    from itertools import combinations

    a, b = found.lower().split(), true.lower().split()
    short, long = sorted((a, b), key=len)

    def is_in(part: tuple[str, ...]) -> bool:
        rest = iter(long)
        return all(word in rest for word in part)

    common = max(n for n in range(len(short) + 1) if any(is_in(part) for part in combinations(short, n)))
    return 2 * common / (len(a) + len(b)) if common else 0.0


def chrf(pairs: list[tuple[str, str]]) -> float:
    scores = []
    for n in range(1, 7):
        right = found = true = 0
        for a, b in ((x.replace(" ", ""), y.replace(" ", "")) for x, y in pairs):
            first, second = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (a, b))
            right += sum(min(first.count(gram), second.count(gram)) for gram in set(first))
            found, true = found + len(first), true + len(second)
        scores.append((right / found, right / true))
    p, r = np.mean(scores, axis=0)
    return float(5 * p * r / (4 * p + r))


# Several labels, masked words, images --------------------------------------------------------------------------------


def test_several_labels_for_a_text(run_of: Callable[[str], Run]) -> None:
    run = run_of("multi-label-classification")
    model, tokenizer, names = run.merged(), run.tokenizer(), ["clos", "door", "open"]
    assert list(model.config.id2label.values()) == names
    assert model.config.problem_type == "multi_label_classification"
    chosen, wanted = [], []
    for row, text, labels in zip(run.encoded(), run.table.columns["text"], run.table.columns["labels"], strict=True):
        wanted.append([float(name in labels) for name in names])
        assert row == {**tokenizer(text), "labels": wanted[-1]}
        with torch.no_grad():
            chosen.append((model(torch.tensor([row["input_ids"]])).logits[0].sigmoid() > 0.5).int().tolist())
    true, found = np.array(wanted), np.array(chosen)
    expected = {
        "rows": 24, "accuracy": accuracy_score(true, found), "f1": f1_score(true, found, average="micro"),
        "macro_f1": f1_score(true, found, average="macro", zero_division=0),
    }  # fmt: skip
    assert run.found == pytest.approx(expected)
    assert 0 < run.found["f1"] < 1


def test_the_activations_of_images_are_forecast(vision: str, pictures: Path, tmp_path: Path) -> None:
    words = ("--model", vision, "--train-file", pictures, "--output-dir", tmp_path / "out", "--use-cpu", "--dry-run")
    said = run_command("train", *words).stdout
    assert re.search(r"activations [\d.]+ [kMG]B", said)
    assert "not forecast" not in said


def test_columns_of_zeros_and_ones_are_labels(encoder: str, rows: Path, tmp_path: Path) -> None:
    names = ["door", "open"]
    old = read_table(rows / "lists.jsonl").columns
    wide = [
        {"text": text, **{name: int(name in labels) for name in names}}
        for text, labels in zip(old["text"], old["labels"], strict=True)
    ]
    file, base = write_lines(tmp_path / "rows.jsonl", wide), ["--model", encoder, "--output-dir", str(tmp_path / "o")]
    chosen: list[tuple[list[str], list[str]]] = [([], names), (["--label-columns", *names], names)]
    for more, labels in [*chosen, (["--label-columns", "open"], ["open"])]:
        data = read_data(parse_arguments([*base, "--train-file", str(file), *more, "--use-cpu"]))
        assert (data.task.name, data.labels) == ("multi-label-classification", labels)
    wanted = [[float(row["open"])] for row in wide]
    assert [row["labels"] for row in data.rows["train"]] == wanted
    write_lines(file, [{**row, "open": 2} if i == 3 else row for i, row in enumerate(wide)])
    said = run_command("train", *base, "--train-file", file, "--label-columns", *names, "--use-cpu", code=2).stderr
    assert "line 4, column 'open': 2 is neither 0 nor 1" in said


def test_masked_words(run_of: Callable[[str], Run]) -> None:
    run = run_of("masked-lm")
    model, tokenizer, texts = run.merged(), run.tokenizer(), run.table.columns["text"]
    assert run.encoded() == [dict(tokenizer(text, truncation=True, max_length=32)) for text in texts]
    mask, total, right, count = DataCollatorForLanguageModeling(tokenizer, seed=42), 0.0, 0, 0
    for text in texts:
        batch = mask([dict(tokenizer(text))])
        kept = batch["labels"][0] != -100
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0][kept].double()
        true = batch["labels"][0][kept]
        total += float(torch.nn.functional.cross_entropy(logits, true, reduction="sum"))
        right += int((logits.argmax(-1) == true).sum())
        count += len(true)
    expected = {"perplexity": math.exp(total / count), "accuracy": right / count}
    assert {name: run.found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    run.check(*expected)


def test_images_in_folders(run_of: Callable[[str], Run], vision: str) -> None:
    from PIL import Image

    run = run_of("image-classification")
    processor, model = transformers.AutoImageProcessor.from_pretrained(vision), run.merged()
    names = ["bright", "dark", "red"]
    paths = sorted(run.file.glob("*/*.png"))
    chosen, wanted = [], [names.index(path.parent.name) for path in paths]
    for path, label, row in zip(paths, wanted, run.encoded(), strict=True):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        assert (torch.equal(row["pixel_values"], pixels[0]), row["labels"]) == (True, label)
        with torch.no_grad():
            chosen.append(int(model(pixels).logits.argmax()))
    assert list(model.config.id2label.values()) == names
    expected = {"accuracy": accuracy_score(wanted, chosen), "f1": f1_score(wanted, chosen, average="macro")}
    assert run.found == pytest.approx({"rows": 18, **expected})
    run.check(*expected)
    assert (run.out / "preprocessor_config.json").is_file()


def test_images_without_a_folder_for_each_label(pictures: Path, vision: str, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in pictures.glob("*/*.png"):
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    words = ("--model", vision, "--train-file", tmp_path / "flat", "--output-dir", tmp_path / "out", "--use-cpu")
    assert "holds images, but no folder for each label, such as" in run_command("train", *words, code=2).stderr


def test_images_of_a_dataset_stay_encoded(pictures: Path, vision: str) -> None:
    datasets = pytest.importorskip("datasets")
    paths = sorted(str(path) for path in pictures.glob("*/*.png"))[:4]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = table_of(datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 1, 0]}, features=features), "made")
    assert all(isinstance(cell, dict) for cell in made.columns["image"])
    processor = transformers.AutoImageProcessor.from_pretrained(vision)
    data = TASKS["image-classification"].read({"train": made}, Given(AutoConfig.from_pretrained(vision), processor))
    assert data.labels == ["no", "yes"]
    plain = table(image=paths, label=["no", "yes", "yes", "no"])
    other = TASKS["image-classification"].read({"train": plain}, Given(data.config, processor))
    for row, same in zip(data.rows["train"], other.rows["train"], strict=True):
        assert torch.equal(row["pixel_values"], same["pixel_values"])
        assert row["labels"] == same["labels"]
    chosen = other.rows["train"].select([2, 0])  # as the search for a learning rate holds rows out
    assert chosen["labels"] == [1, 0]
    assert torch.equal(chosen[1]["pixel_values"], other.rows["train"][0]["pixel_values"])
    assert chosen.sources() == [other.rows["train"].sources()[i] for i in (2, 0)]


# All tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", FILES)
def test_a_run_says_what_it_does(task: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(task)
    assert run.said.startswith(f"{task} from the columns ")
    assert re.search(
        r"(24|\d\d|18) rows · LoRA r=(8|32) on \d+ layers?( and .*)?, [\d,]+ trained \(\S+%\) · \d+ steps", run.said
    )
    assert "24 train, 24 test" in run.said or "18 train, 18 test" in run.said
    names = set(TASKS[task].metrics)
    assert names <= run.trained.keys()
    assert (run.out / "README.md").is_file()
    format_ = json.loads((run.out / "hf_lora.json").read_text())["training_format"]
    assert format_["kind"] in TASKS[task].kinds
    assert TASK_DEFAULTS.keys() > TASKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("task", FILES)
def test_the_options_of_a_long_run_go_together(task: str, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """The best checkpoint, workers, several batches a step, half precision; then a run that goes on."""
    run = run_of(task)
    words = (
        *run.words, "--eval-file", run.file, "--output-dir", tmp_path, "--use-cpu", "--disable-tqdm", "true",
        "--eval-strategy", "epoch", "--save-strategy", "epoch", "--load-best-model-at-end", "--metric-for-best-model",
        TASKS[task].metrics[0], "--dataloader-num-workers", 2, "--gradient-accumulation-steps", 2, "--dtype",
        "bfloat16", "--per-device-train-batch-size", 4, "--save-total-limit", 3, "--num-train-epochs",
    )  # fmt: skip
    run_command("train", *words, 2)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_metric"] is not None
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert TASKS[task].metrics[0] in {name.removeprefix("eval_") for name in results}
    run_command("train", *words, 3, "--resume-from-checkpoint", "True")
    assert json.loads((tmp_path / "trainer_state.json").read_text())["epoch"] == 3


SHOWN = {
    "token-classification": r"row 1: \[CLS\] \w+⟦(O|[BI]-\w+)⟧ (##\w+ )?.*\[SEP\]\n",
    "question-answering": r"row 1: ⟦?\[CLS\].*\?.*\[SEP\]\n",
    "seq2seq-lm": r"row 1: \w.*</s> → ⟦\w.*</s>⟧\n",
    "multi-label-classification": r"row 1: \[CLS\].*\[SEP\] → ⟦(\w|, )*⟧\n",
    "masked-lm": r"row 1: \[CLS\](.*\n)*.*\S⟦\S+⟧",
    "image-classification": r"row 1: 3 × 16 × 16 numbers → ⟦bright⟧\n",
}


@pytest.mark.parametrize("task", fast("token-classification", "seq2seq-lm"))
def test_a_merged_model_is_evaluated_as_its_adapter(task: str, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    run = run_of(task)
    run_command("merge", run.out, "--out", tmp_path / "merged")
    words = ("--completion-column", "summary", "--max-new-tokens", 6) if task == "seq2seq-lm" else ()
    found = json.loads(run_command("eval", tmp_path / "merged", "--file", run.file, "--json", *words).stdout)
    assert found == pytest.approx(run.found, rel=1e-5)


@pytest.mark.parametrize("task", FILES)
def test_three_rows_are_shown_with_what_is_trained(task: str, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    words = (*run_of(task).words, "--output-dir", tmp_path / "out", "--use-cpu")
    said = run_command("train", *words, "--show-batch").stdout
    assert re.search(SHOWN[task], said), said
    assert [line[:6] for line in said.splitlines()[-3:]] == ["row 1:", "row 2:", "row 3:"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=[pytest.mark.slow] * (t not in ("seq2seq-lm", "image-classification"))) for t in FILES],
)
def test_a_dry_run_and_a_template_are_of_the_same_task(
    task: str, run_of: Callable[[str], Run], tmp_path: Path
) -> None:
    run = run_of(task)
    words = (*run.words, "--output-dir", tmp_path / "out", "--use-cpu")
    said = run_command("train", *words, "--dry-run").stdout
    parsed = parse_arguments(["--model", run.base, "--train-file", str(run.file), *OPTIONS.get(task, []), "--use-cpu"])
    read_data(parsed, writes=False)
    count = len(run.encoded())
    size, epochs = parsed.training.per_device_train_batch_size, parsed.training.num_train_epochs
    assert size == TASK_DEFAULTS[task].per_device_train_batch_size
    steps = math.ceil(count / size) * (epochs if run.task in OPTIONS else 4)
    assert re.search(rf"parameters would be trained \(\S+%\), in {steps:.0f} steps", said)
    tensors = load_file(run.out / "adapter_model.safetensors")
    if not any("pooler" in name for name in tensors):  # which the checkpoint of the base lacks
        assert f"{sum(t.numel() for t in tensors.values()):,} of" in said
    assert not (tmp_path / "out").exists()
    listed = run_command("targets", run.base, "--task", task).stdout
    assert re.search(r"\d+ layers", listed)
