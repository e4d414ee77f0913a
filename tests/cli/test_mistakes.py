"""A wrong call of a command is one message with the next step, before a model is loaded, and nothing is changed."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command, write_lines
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_lora import ConfigError, LoraModel, TrainingError, finetune
from hf_lora.cli import train as train_command
from hf_lora.cli.main import app
from hf_lora.cli.words import as_command
from hf_lora.safe_io import atomic
from hf_lora.train import base_model

run = functools.partial(run_command, "train")
FAST = ("--per-device-train-batch-size", "12", "--use_cpu", "--disable-tqdm", "true", "--logging-strategy", "no")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def places(
    bert_folder: str, llama_folder: str, texts_folder: Path, adapter_folder: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:  # fmt: skip
    """What the words of the table stand for."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    shutil.copytree(llama_folder, folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"xx")
    (folder / "file").write_text("x")
    texts = [f"open the door {i}" for i in range(40)]
    for name, labels in {
        "fractions": [0.37 + i / 10 for i in range(40)],
        "ids": [f"id {i}" for i in range(40)],
        "signs": ["--5" if i % 2 else "-3" for i in range(40)],
        "half": ["a" if i % 2 else "b" for i in range(40)],
    }.items():
        write_lines(folder / f"{name}.jsonl", [{"text": t, "label": v} for t, v in zip(texts, labels, strict=True)])
    half = (folder / "half.jsonl").read_text().replace("open", "open \\ud83d", 1)
    (folder / "half.jsonl").write_text(half)
    (folder / "half-chat.jsonl").write_text('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    (folder / "deep.json").write_text("[" * 5000 + "]" * 5000)
    (folder / "deep.jsonl").write_text('{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    (folder / "digits.jsonl").write_text('{"text": "a", "label": ' + "1" * 5000 + "}\n")
    write_lines(folder / "odd.jsonl", [{"review body": t, "stars": i % 3} for i, t in enumerate(texts)])
    write_lines(folder / "chats.jsonl", [{"messages": [{"role": "user", "content": "door"}]}] * 3)
    os.symlink(folder / "nowhere", folder / "link")
    return {
        "bert": bert_folder, "llama": llama_folder, "adapter": adapter_folder, "rows": texts_folder / "rows.csv",
        "dir": folder,
    }  # fmt: skip


MODEL = "--model {bert} --train-file {rows} "
OUT = "{dir}/out"
TO = f"--output-dir {OUT} "
WRONG: list[tuple[str, str]] = [
    # The model.
    (f"--model no-such/model --train-file {{rows}} --output-dir {OUT}", "--model no-such/model: its config could not"),
    (f"--model {{bert}}x --train-file {{rows}} --output-dir {OUT}", "there is no such folder (did you mean 'bert"),
    (f"--model {{dir}}/empty --train-file {{rows}} --output-dir {OUT}", "it has no config.json. It holds nothing"),
    (f"--model {{adapter}} --train-file {{rows}} --output-dir {OUT}", "it as --lora-adapter {adapter}"),
    (f"--model {{rows}} --train-file {{rows}} --output-dir {OUT}", "is a file. Name the folder of the model"),
    (f"--model '' --train-file {{rows}} --output-dir {OUT}", "--model: the name is empty"),
    (f"--model ~/x --train-file {{rows}} --output-dir {OUT}", "the shell did not expand ~"),
    # The output folder.
    (MODEL + "--output-dir {adapter}", "holds an adapter. Name another folder with --output-dir, continue"),
    (MODEL + "--output-dir {bert}", "holds a full model (config.json)"),
    (MODEL + "--output-dir {dir}/file", "{dir}/file is a file"),
    (MODEL + "--output-dir {dir}/file/below", "{dir}/file is a file"),
    (MODEL + "--output-dir {dir}/link", "is a link to nothing"),
    (MODEL + "--output-dir /proc/x", "cannot be written"),
    (MODEL + "--output-dir {dir}/" + "x" * 300, "name is too long"),
    (MODEL + "--output-dir ''", "--output-dir is empty"),
    (MODEL + TO + "--resume-from-checkpoint True", "has no checkpoint to resume from"),
    (MODEL + TO + "--resume-from-checkpoint {dir}/none", "none is not a folder"),
    # Values.
    (
        MODEL + TO + "--dtype floaty --per-device-train-batch-size 0 --gradient-accumulation-steps 0 --max-steps 0 "
        "--learning-rate nan --num-train-epochs 0 --max-length 0 --report-to nonsense --problem-type regresion "
        "--weight-decay=-1 --eval-file {dir}/none.csv --task chat --adam-beta1 1 --lr-scheduler-kwargs x "
        "--optim-args x --torch-compile-backend inductr",
        "--dtype floaty is unknown (did you mean 'float32'|--per-device-train-batch-size 0 must be at least 1|"
        "--gradient-accumulation-steps 0 must be at least 1|--max-steps 0 must be at least 1|"
        "--learning-rate nan is not a finite number|--num-train-epochs 0 must be greater than 0|"
        "--max-length 0 must be at least 1|--report-to nonsense is not available|"
        "regresion is unknown (did you mean 'regression'?)|--weight-decay -1 must be at least 0|"
        "--eval-file {dir}/none.csv does not exist|--task chat is unknown|--adam-beta1 1 must be less than 1|"
        "--lr-scheduler-kwargs x is not a JSON object|--optim-args x must have the form|did you mean 'inductor'",
    ),
    (MODEL + TO + "--learning-rate=-1e-3 --dtype int8", "--learning-rate -0.001 must be greater than 0|--dtype int8"),
    (MODEL + TO + "--optim nonsense", "nonsense"),
    (MODEL + TO + "--torch-compile-mode fast", "--torch-compile-mode fast: Unrecognized mode=fast, should be one of"),
    (MODEL + TO + "--metric-for-best-model acuracy", "acuracy is not computed (did you mean 'accuracy'?)"),
    (MODEL + TO + "--lora-rank-pattern " + "[" * 5000, "--lora-rank-pattern '[[["),
    (
        MODEL + TO + "--beta 1 --packing false --last-turn-only true --max-target-length 3",
        "--last-turn-only has no effect on the task text-classification; it is for causal-lm|"
        "--packing has no effect on the task text-classification; it is for causal-lm|--max-target-length has no|"
        "--beta has no effect",
    ),
    (MODEL + TO + "--no-packing", "--packing has no effect on the task text-classification; it is for causal-lm"),
    (
        MODEL + TO + "--eval-split test --dataset-config en --eval-strategy epoch",
        "--eval-split needs --dataset|--dataset-config needs --dataset",
    ),
    (
        MODEL + TO + "--load-best-model-at-end true",
        "--load-best-model-at-end needs an evaluation at every save. Pass --eval-file FILE --eval-strategy epoch",
    ),
    (
        MODEL + TO + "--lr 1 --rank 4 --batch-size 2",
        "--lr is not an argument (did you mean --learning-rate?)|--rank is not an argument (did you mean --lora-r?)|"
        "(did you mean --per-device-train-batch-size?)",
    ),
    (MODEL + TO + "--eval-strategy epoch", "--eval-strategy needs data to evaluate on: pass --eval-file"),
    (MODEL + TO + "--eval-steps 5", "--eval-steps needs data to evaluate on: pass --eval-file"),
    # The data.
    (f"--model {{bert}} --train-file {{dir}}/none.csv --output-dir {OUT}", "{dir}/none.csv does not exist"),
    (f"--model {{bert}} --train-file {{dir}}/fractions.jsonl --output-dir {OUT}", "pass --problem-type regression."),
    (f"--model {{bert}} --train-file {{dir}}/ids.jsonl --output-dir {OUT}", "40 different labels in 40 rows"),
    (f"--model {{bert}} --train-file {{dir}}/ids.jsonl --problem-type regression --output-dir {OUT}", "finite number"),
    (f"--model {{bert}} --train-file {{dir}}/deep.json --output-dir {OUT}", "deep.json: it is nested too deeply"),
    (f"--model {{bert}} --train-file {{dir}}/deep.jsonl --output-dir {OUT}", "line 1: it is nested too deeply"),
    (f"--model {{bert}} --train-file {{dir}}/digits.jsonl --output-dir {OUT}", "line 1: Exceeds the limit"),
    (f"--model {{bert}} --train-file {{dir}}/half.jsonl --output-dir {OUT}", "the text holds half of a"),
    (
        f"--model {{bert}} --train-file {{dir}}/odd.jsonl --output-dir {OUT}",
        "--text-column 'review body' --label-column stars",
    ),
    (
        f"--model {{llama}} --train-file {{dir}}/odd.jsonl --output-dir {OUT}",
        "for a classification, with --text-column and --label-column",
    ),
    (
        f"--model {{bert}} --train-file {{dir}}/chats.jsonl --output-dir {OUT}",
        "(columns: 'messages'), and --model {bert} is a bert that does not generate text",
    ),
    (MODEL + f"--label-column stars --output-dir {OUT}", "has no column 'stars'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: value[-40:])
def test_a_wrong_run_is_one_message_before_the_model_is_loaded(
    words: str, message: str, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("hf_lora.train.build.load_base", loaded)
    before = {path: path.read_bytes() for path in Path(places["adapter"]).iterdir()}
    error = run(*shlex.split(words.format(**places)), "--use-cpu", code=2).stderr
    for part in message.format(**places).split("|"):
        assert part in error
    assert error.startswith("Error: ")
    assert len(error.splitlines()) < 25
    for python in ("(…)", "Traceback", "text_column", "label_column", "problem_type=", "lora_rank_pattern"):
        assert python not in error
    assert not Path(OUT.format(**places)).exists()
    assert before == {path: path.read_bytes() for path in Path(places["adapter"]).iterdir()}


OTHERS = [
    ("generate {chat} --prompt a --base-model no-such", "the base 'no-such' could not be loaded"),
    ("generate {chat} --prompt a --base-model {dir}/broken", "the base '{dir}/broken' could not be loaded"),
    ("generate {chat} --prompt a --seed 99999999999999999999 --batch-size 0", "--seed 99999999999999999999 must fit"),
    ("generate {dir}/broken --prompt a", "no language model could be loaded from it"),
    ("eval {chat} --file {dir}/deep.jsonl", "line 1: it is nested too deeply"),
    ("generate {chat} --file {dir}/half.jsonl --out {dir}/o.jsonl", "line 1, column 'text': the text holds half"),
    ("eval {chat} --file {dir}/half-chat.jsonl", "message 1: the content holds half of a character"),
    ("merge {chat} --out /proc/x", "/proc/x: it cannot be written"),
    ("merge {llama} {chat} /proc/x", "/proc/x"),
    ("merge {chat} --base no-such --out {dir}/merged", "the base 'no-such' could not be loaded"),
    ("convert {adapter} --out /proc/x", "/proc/x: it cannot be written"),
    ("inspect {dir}/empty", "is not an adapter's folder (no adapter_config.json). Name the folder"),
    ("inspect {llama}", "It holds a full model: load it with transformers"),
    ("targets {dir}/empty", "it has no config.json"),
    ("push {dir}/empty user/x", "empty"),
    ("pull user/x {dir}/file", "is a file"),
]


@pytest.mark.parametrize(("words", "message"), OTHERS, ids=lambda value: value[-30:])
def test_a_wrong_call_of_another_command_is_one_message(
    words: str, message: str, places: dict[str, Any], chat_adapter: str
) -> None:
    places = places | {"chat": chat_adapter}
    error = run_command(*shlex.split(words.format(**places)), code=2).stderr
    assert message.format(**places) in error
    assert "Traceback" not in error
    assert not Path(places["dir"], "merged").exists()


@pytest.mark.parametrize(
    "words",
    [["generate", "x", "--prompt", "\udcff"], ["train", "--model=\udcff"], ["\udcff"], ["inspect", "a", "\udcff"]],
)
def test_bytes_that_are_not_text_are_one_message(words: list[str]) -> None:
    error = run_command(*words, code=2).stderr
    assert re.fullmatch(r"Error: '\S*\\udcff' is not valid UTF-8\. .*\n", error)


def test_labels_with_signs_are_classes(places: dict[str, Any]) -> None:
    from hf_lora.data.classes import find_labels
    from hf_lora.data.tables import read_table

    assert find_labels(read_table(places["dir"] / "signs.jsonl"), "label") == ["-3", "--5"]
    assert len(find_labels(read_table(places["dir"] / "ids.jsonl"), "label", "single_label_classification")) == 40


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_written_is_found_by_writing(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuses)
    text = run("--model", "m", "--train-file", "t.csv", "--output-dir", tmp_path / "a" / "b", code=2).stderr
    assert ("no space is left" if error.errno == 28 else "Permission denied") in text
    assert list(tmp_path.iterdir()) == []


# An earlier run ------------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_replaced_only_on_request_and_at_the_end(
    bert_folder: str, texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = texts_folder / "rows.csv", tmp_path / "out"
    words = ("--model", bert_folder, "--train-file", rows, "--output-dir", out, *FAST)
    run(*words, "--test-file", rows, "--num-train-epochs", 2)
    first = (out / WEIGHTS).read_bytes()
    assert (out / "checkpoint-4").is_dir()
    assert "--overwrite" in run(*words, code=2).stderr
    elsewhere = shutil.copytree(out / "checkpoint-4", tmp_path / "other" / "checkpoint-4")
    assert "--overwrite" in run(*words, "--resume-from-checkpoint", elsewhere, code=2).stderr
    (out / "chat_template.jinja").write_text("of another tokenizer")
    assert (out / WEIGHTS).read_bytes() == first

    def ends(self: Any, *_: object, **__: object) -> None:
        raise TrainingError("the run ends here")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.training_step", ends)
        assert "the run ends here" in run(*words, "--overwrite", code=2).stderr
    assert (out / WEIGHTS).read_bytes() == first
    assert LoraModel.from_pretrained(out).lora_configs["default"].r == 32
    run(*words, "--overwrite", "--num-train-epochs", 1, "--lora-r", 3)
    assert LoraModel.from_pretrained(out).lora_configs["default"].r == 3
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "test_results.json").exists()  # it was of the earlier adapter
    assert not (out / "chat_template.jinja").exists()
    assert (out / "tokenizer.json").exists()


def test_ctrl_c_names_what_was_saved_and_the_command_that_goes_on(
    bert_folder: str, texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    rows, out, own = texts_folder / "rows.csv", tmp_path / "out", Trainer.training_step
    words = [
        "train", "--model", bert_folder, "--train-file", str(rows), "--output-dir", str(out),
        "--num-train-epochs", "3", *FAST,
    ]  # fmt: skip

    def interrupted_at(step: int) -> Any:
        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return own(self, *args, **kwargs)

        return training_step

    monkeypatch.setattr(train_command.sys, "argv", ["/usr/bin/hf-lora", *words])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted_at(1))
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, "nothing was saved" in result.stderr) == (130, True)
        patch.setattr(Trainer, "training_step", interrupted_at(3))
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 130
    assert f"{out / 'checkpoint-2'} is saved" in result.stderr
    command = shlex.split(result.stderr.splitlines()[-1])
    assert command == ["hf-lora", *words, "--resume-from-checkpoint", "True"]
    run_command(*command[1:])
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 6


# Few steps, and rates ------------------------------------------------------------------------------------------------


def test_one_step_learns_and_a_short_run_is_hinted_at(
    bert_folder: str, texts_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    rows = texts_folder / "rows.csv"
    words = ("--model", bert_folder, "--train-file", rows, "--save-strategy", "no", *FAST)
    text = run(*words, "--output-dir", tmp_path / "one", "--max-steps", 1).stdout
    assert "Only 1 step," in text
    for way in ("--max-steps 40", "--per-device-train-batch-size 3", "more rows"):
        assert way in text
    tensors = load_file(tmp_path / "one" / WEIGHTS)
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name and "pooler" not in name)
    assert not any("rose" in message for message in messages)
    run(*words, "--output-dir", tmp_path / "high", "--num-train-epochs", 8, "--learning-rate", 1000)
    assert any("The loss rose from" in message and "1000 is probably too high" in message for message in messages)


def test_numbers_are_predicted_and_evaluated(bert_folder: str, tmp_path: Path) -> None:
    rows = [{"text": f"{'open' if i % 2 else 'close'} the door", "label": 0.5 + i % 2} for i in range(24)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    text = run(
        "--model", bert_folder, "--train-file", file, "--test-file", file, "--problem-type", "regression",
        "--output-dir", out, "--num-train-epochs", 3, *FAST,
    ).stdout  # fmt: skip
    assert "24 test, one number each" in text
    model = LoraModel.from_pretrained(out)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    found = json.loads(run_command("eval", out, "--file", file, "--json").stdout)
    said = json.loads((out / "test_results.json").read_text())
    assert found["mse"] == pytest.approx(said["test_mse"], rel=1e-4) == pytest.approx(said["test_loss"], rel=1e-4)
    assert found["mae"] == pytest.approx(said["test_mae"], rel=1e-4)


# Any error -----------------------------------------------------------------------------------------------------------

KINDS: list[tuple[Exception, str, int]] = [
    (RuntimeError("a bug\nin two lines"), "failed unexpectedly (RuntimeError: a bug). `hf-lora --debug inspect", 1),
    (KeyError("x"), "failed unexpectedly (KeyError: 'x')", 1),
    (AssertionError(), "failed unexpectedly (AssertionError)", 1),
    (PermissionError(13, "Permission denied", "a.txt"), "Permission denied: 'a.txt'", 1),
    (MemoryError(), "memory is exhausted", 1),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "memory is exhausted (DefaultCPUAllocator", 1),
    (torch.OutOfMemoryError("CUDA out of memory"), "memory is exhausted (CUDA out of memory)", 1),
    (ConfigError("inspect_adapter('here'): wrong. Pass subfolder='x'."), "inspect here: wrong. Pass --subfolder x", 2),
]


@pytest.mark.parametrize(("error", "message", "code"), KINDS, ids=lambda value: type(value).__name__)
def test_no_error_is_a_traceback(error: Exception, message: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hf_lora.export.inspect_adapter", broken)
    result = CliRunner().invoke(app, ["inspect", "."])
    assert (result.exit_code, type(result.exception)) == (code, SystemExit)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert CliRunner().invoke(app, ["--debug", "inspect", "."]).exception is error


def test_ctrl_c_in_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lora.export.inspect_adapter", interrupted)
    result = CliRunner().invoke(app, ["inspect", "."])
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("name it with label_column.", "name it with --label-column."),
        ("It has 'label_column' in a/label_column.", "It has 'label_column' in a/label_column."),
        ("pass task='causal-lm' or overwrite=True", "pass --task causal-lm or --overwrite"),
        ("pass --overwrite (overwrite=True).", "pass --overwrite."),
        ("LoraTrainer(…, lora_config=…):\n  - wrong", "hf-lora train:\n  - wrong"),
        ("load_for_generation('user/x'): wrong", "hf-lora train user/x: wrong"),
        ("LoraModel.from_pretrained(PosixPath('/a (b)/c')): wrong", "hf-lora train /a (b)/c: wrong"),
        ("plain text (with: colons): kept", "plain text (with: colons): kept"),
        ("call(" + "'a', (" * 200 + "x", "call(" + "'a', (" * 200 + "x"),
        ("call(" + "'a', " * 200 + "x", "call(" + "'a', " * 200 + "x"),
    ],
)
def test_messages_are_in_the_words_of_the_command(message: str, expected: str) -> None:
    assert as_command(message, "hf-lora train", ["label_column", "task", "overwrite"]) == expected


def test_versions_are_checked_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lora import VersionError

    def old() -> None:
        raise VersionError("too old")

    monkeypatch.setattr(importlib.import_module("hf_lora.cli.main"), "check_versions", old)
    assert run_command("inspect", ".", code=2).stderr == "Error: too old\n"


def test_a_mapping_of_arguments_is_checked_as_a_command_line_is(bert_folder: str, adapter_folder: str) -> None:
    with pytest.raises(ConfigError, match="holds an adapter"):
        finetune({"model": bert_folder, "train_file": __file__, "output_dir": adapter_folder})
    assert base_model.check_name("user/model") is None
