"""`hf-lora eval` against transformers' own loss, and against answers that are compared by hand."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command, tiny_t5, write_lines

from hf_lora import ConfigError, DataError, LoraModel, StateError, evaluate, generate_texts, load_for_generation
from hf_lora.data.chat import chat_rows
from hf_lora.data.formats import recognize_format
from hf_lora.data.tables import read_table
from hf_lora.evaluation import language as evaluation
from hf_lora.evaluation.answers import ANSWER_METRICS
from hf_lora.evaluation.language import score_answers, score_rows

run = functools.partial(run_command, "eval")


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [chat("open the door", "now"), chat("light", "on off", "turn it", "red light please"), chat("a", "the")]
    return write_lines(tmp_path / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def loaded(chat_adapter: str) -> tuple[Any, Any]:
    model, tokenizer = load_for_generation(chat_adapter)
    return model.double(), tokenizer


# The loss over the answers -------------------------------------------------------------------------------------------


def own_scores(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, float, int]:
    """(loss, token accuracy, tokens) from the logits of transformers, row by row, and its loss beside them."""
    total, hits, tokens = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            out = model(ids, labels=labels)
            kept = labels[0, 1:] != -100
            logits, target = out.logits[0, :-1][kept], labels[0, 1:][kept]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            assert float(loss) == pytest.approx(float(out.loss) * len(target), rel=1e-6)  # it rounds to float32
            total += float(loss)
            hits += int((logits.argmax(-1) == target).sum())
            tokens += len(target)
    return total / tokens, hits / tokens, tokens


def tiny_softcapped() -> Any:
    """A model whose loss cannot be taken over its frozen head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        final_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).double().eval()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["adapter", "softcapped"])
def test_the_scores_are_those_of_the_models_own_loss(
    loaded: tuple[Any, Any], chats: Path, kind: str, batch_size: int
) -> None:
    model, tokenizer = loaded
    model = model if kind == "adapter" else tiny_softcapped()
    table = read_table(chats)
    rows, _ = chat_rows(table, recognize_format(table), tokenizer, 64)
    loss, accuracy, tokens = own_scores(model, rows)
    found = score_rows(model, rows, batch_size)
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert found["token_accuracy"] == pytest.approx(accuracy)
    assert found["tokens"] == tokens == sum(t != -100 for row in rows for t in row["labels"][1:])


def test_only_labeled_tokens_meet_the_head(
    loaded: tuple[Any, Any], chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens without a label never meet the head, once it is proved."""
    model, tokenizer = loaded
    table = read_table(chats)
    rows, _ = chat_rows(table, recognize_format(table), tokenizer, 64)
    seen: list[int] = []
    head = model.get_output_embeddings()
    own = evaluation.find_frozen_head(model)
    assert own is not None
    own.proved = True
    monkeypatch.setattr(evaluation, "find_frozen_head", lambda _: own)
    linear = torch.nn.functional.linear

    def watched(x: Any, weight: Any, bias: Any = None) -> Any:
        if weight.shape == head.weight.shape:
            seen.append(x.reshape(-1, x.shape[-1]).shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    found = score_rows(model, rows)
    assert sum(seen) == found["tokens"] < sum(len(row["input_ids"]) for row in rows)


def test_eval_prints_the_scores(chat_adapter: str, loaded: tuple[Any, Any], chats: Path) -> None:
    model, tokenizer = loaded
    table = read_table(chats).first(2)
    rows, _ = chat_rows(table, recognize_format(table), tokenizer, 64)
    loss, accuracy, tokens = own_scores(model, rows)
    found = json.loads(run(chat_adapter, "--file", chats, "--limit", 2, "--json").stdout)
    expected = {
        "rows": 2, "loss": loss, "perplexity": math.exp(loss), "token_accuracy": accuracy, "tokens": tokens,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4)
    merged = json.loads(run(chat_adapter, "--file", chats, "--limit", 2, "--json", "--merge").stdout)
    assert merged == pytest.approx(expected, rel=1e-4)
    assert f"perplexity: {math.exp(loss):,.4g}" in run(chat_adapter, "--file", chats, "--limit", 2).stdout
    assert "1 rows are longer" in run(chat_adapter, "--file", chats, "--max-length", 12).stderr


def test_what_has_no_loss_over_answers(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(StateError, match="eval --generate"):
        score_rows(tiny_t5(), [{"input_ids": [5, 6], "labels": [5, 6]}])
    with pytest.raises(DataError, match="no token has a label"):
        score_rows(loaded[0], [{"input_ids": [5, 6], "labels": [-100, -100]}])


# Answers -------------------------------------------------------------------------------------------------------------


def test_the_prompts_are_those_of_the_training(chat_adapter: str, tmp_path: Path) -> None:
    """A model that wrote a file's answers itself has them all right."""
    model, tokenizer = load_for_generation(chat_adapter)
    prompts: list[Any] = ["open the door", "light"]
    options: Any = {"max_new_tokens": 5}
    templated = generate_texts(model, tokenizer, prompts, **options)
    raw = generate_texts(model, tokenizer, prompts, use_chat_template=False, **options)
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = [[*before, {"role": "user", "content": p}] for p in prompts]
    talked = generate_texts(model, tokenizer, talk, **options)
    assert templated != raw
    assert templated != talked
    ends = [{"role": "assistant", "content": text} for text in talked]
    forms: dict[str, list[Any]] = {
        "messages": [{"messages": [*t, end]} for t, end in zip(talk, ends, strict=True)],
        "question": [{"question": p, "answer": a} for p, a in zip(prompts, templated, strict=True)],
        "prompt": [{"prompt": p, "completion": a} for p, a in zip(prompts, raw, strict=True)],
    }
    for name, rows in forms.items():
        file = write_lines(tmp_path / f"{name}.jsonl", rows)
        words = [chat_adapter, "--file", file, "--generate", "--max-new-tokens", 5, "--json"]
        assert json.loads(run(*words).stdout) == {"rows": 2, "exact_match": 1.0}, name


def test_fields_are_compared_where_all_answers_are_json(
    chat_adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat("a", '{"intent": "open", "what": "door"}'), chat("the", '{"intent": "close", "what": "window"}')]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    written = [' {"intent": "open", "what": "door"}\n', 'It is {"intent": "close"}']
    monkeypatch.setattr(evaluation, "iterate_texts", lambda *_, **__: iter(enumerate(written)))
    monkeypatch.setitem(
        ANSWER_METRICS, "words", lambda predictions, references: {"words": len(predictions[1].split())}
    )
    out = tmp_path / "out.jsonl"
    found = json.loads(run(chat_adapter, "--file", file, "--generate", "--json", "--predictions", out).stdout)
    assert found.pop("fields") == {
        "intent": {"f1": 1.0, "precision": 1.0, "recall": 1.0, "count": 2},
        "what": {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5, "count": 2},
    }
    assert found == {
        "rows": 2, "exact_match": 0.5, "field_f1": pytest.approx(6 / 7), "field_precision": 1.0, "field_recall": 0.75,
        "valid_json": 1.0, "words": 4,
    }  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [row | {"generated": text} for row, text in zip(rows, written, strict=True)]
    printed = run(chat_adapter, "--file", file, "--generate").stdout
    assert "what     0.667      1.000   0.500       2" in printed
    assert "exact_match: 0.5" in printed


def test_rows_without_a_question_or_an_answer(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def failing(*rows: Any) -> str:
        table = read_table(write_lines(tmp_path / "rows.jsonl", list(rows)))
        with pytest.raises(DataError) as error:
            score_answers(*loaded, table, recognize_format(table))
        return str(error.value)

    assert "not split into prompt and answer" in failing({"text": "door"})
    first = {"messages": [{"role": "assistant", "content": "now"}]}
    assert "line 2: the assistant message is the first" in failing(chat("a", "b"), first)
    assert "line 1: it has tools" in failing(chat("a", "b") | {"tools": [{"name": "x"}]})


def test_a_model_in_memory_is_evaluated_as_its_folder_is(
    chat_adapter: str, loaded: tuple[Any, Any], chats: Path, tmp_path: Path
) -> None:
    model, tokenizer = loaded
    seen: list[tuple[int, int]] = []
    options: Any = {"generate": True, "max_new_tokens": 4, "batch_size": 2, "system": "please"}
    out = tmp_path / "out.jsonl"
    written = evaluate(
        model, chats, tokenizer=tokenizer, predictions=out, progress=lambda *n: seen.append(n), **options
    )
    assert seen == [(2, 3), (3, 3)]
    assert (written.rows, len(written.answers), written.cut) == (3, 3, 0)
    assert [json.loads(line)["generated"] for line in out.read_text().splitlines()] == written.answers
    assert evaluate(chat_adapter, chats, **options).answers == written.answers
    model.train()
    scores = evaluate(model, chats, tokenizer=tokenizer, limit=2)
    assert model.training
    model.eval()
    assert scores.metrics == pytest.approx(evaluate(chat_adapter, chats, limit=2).metrics, rel=1e-4)
    with pytest.raises(ConfigError, match="batch_size=0, max_length=-5 must be at least 1"):
        evaluate("nothing", chats, batch_size=0, max_length=-5)
    with pytest.raises(ConfigError, match=r"(?s)tokenizer= is missing.*dtype= is only for a model"):
        evaluate(model, chats, dtype="float32")


# Words ---------------------------------------------------------------------------------------------------------------


def test_words_that_do_not_go_together(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [chat("a", "b")])
    assert "need --generate. Add it" in run("nowhere", "--file", file, "--predictions", "x.jsonl", code=2).stderr
    assert "--limit 0" in run("nowhere", "--file", file, "--limit", 0, code=2).stderr
    assert "--batch-size 0" in run("nowhere", "--file", file, "--batch-size", 0, code=2).stderr
    assert "this is the input itself" in run(
        "nowhere", "--file", file, "--generate", "--predictions", file, code=2
    ).stderr  # fmt: skip


# Classes -------------------------------------------------------------------------------------------------------------


def test_a_classifier_has_accuracy_and_f1(adapter_folder: str, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoTokenizer

    model = LoraModel.from_pretrained(adapter_folder)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    texts = ["open the door", "close it", "light on please now", "the red window", "turn it off"]
    labels = ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_0", "LABEL_1"]
    rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with torch.no_grad():
        picked = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    true = [int(label[-1]) for label in labels]
    expected = {"accuracy": accuracy_score(true, picked), "f1": f1_score(true, picked, average="macro")}
    for size in (1, 2, 8):
        found = json.loads(run(adapter_folder, "--file", file, "--batch-size", size, "--json").stdout)
        assert found == pytest.approx({"rows": 5, **expected})
    assert "does not generate text" in run(adapter_folder, "--file", file, "--generate", code=2).stderr
    model.train()
    assert evaluate(model, file, tokenizer=tokenizer).metrics == pytest.approx(expected)
    assert model.training
    other = [{"mine": row["text"], "text": "no", "wanted": row["label"], "label": "LABEL_0"} for row in rows]
    write_lines(file, other)
    named: Any = {"text_column": "mine", "completion_column": "wanted"}
    assert evaluate(model, file, tokenizer=tokenizer, **named).metrics == pytest.approx(expected)
    write_lines(file, [row | {"mine": row["mine"] + " on" * 99} for row in other])  # more than the model's positions
    window = evaluate(model, file, tokenizer=tokenizer, **named).metrics
    assert window == evaluate(model, file, tokenizer=tokenizer, max_length=32, **named).metrics
