"""The options that a task declares are those that it reads; all others are refused where they are given."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoProcessor
from transformers.utils.import_utils import TORCHVISION_IMPORT_ERROR, VISION_IMPORT_ERROR

from hf_lora import ConfigError, apply_lora
from hf_lora.data.tables import Table, read_table
from hf_lora.tasks.base import Given, Options, Task, check_packages
from hf_lora.tasks.registry import TASKS
from hf_lora.train.check import check_options
from hf_lora.train.parsing import RunArguments

ROWS: dict[str, dict[str, list[Any]]] = {
    "text-classification": {"text": ["the door", "a light"], "label": ["x", "y"]},
    "multi-label-classification": {"text": ["the door", "a light"], "label": [["x"], ["y"]]},
    "token-classification": {"tokens": [["the", "door"], ["a"]], "ner_tags": [["O", "B"], ["O"]]},
    "question-answering": {
        "question": ["what"], "context": ["the door"], "answers": [{"text": ["door"], "answer_start": [4]}],
    },
    "masked-lm": {"text": ["the door"]},
    "seq2seq-lm": {"document": ["the door"], "summary": ["door"]},
    "causal-lm": {"prompt": ["the door"], "completion": ["is open"]},
    "dpo": {"prompt": ["the"], "chosen": ["door"], "rejected": ["light"]},
    "kto": {"prompt": ["the", "a"], "completion": ["door", "light"], "label": [True, False]},
    "reward": {"chosen": ["the door"], "rejected": ["the light"]},
    "embedding": {"anchor": ["the door"], "positive": ["a door"]},
}  # fmt: skip
OF_BUILDERS = {"packing", "beta", "pooling", "head_init"}
"""Options that the trainer of a task reads, and not its rows."""
touched: set[str] = set()


class Recorded(Options):
    """Options that record which of them were read."""

    def __getattribute__(self, name: str) -> Any:
        if name in (f.name for f in dataclasses.fields(Options)):
            touched.add(name)
        return super().__getattribute__(name)


@pytest.fixture
def reads(request: pytest.FixtureRequest) -> Iterator[tuple[Task, dict[str, Table], Given]]:
    task = TASKS[request.param]
    own = {"image-classification": "vision", "seq2seq-lm": "encoder_decoder"}
    words = "encoder_decoder" if task.auto_class.endswith(("CausalLM", "SequenceClassification")) else "encoder"
    base = request.getfixturevalue(own.get(task.name, words))
    if task.name == "image-classification":
        table = read_table(request.getfixturevalue("pictures"))
    else:
        columns = ROWS[task.name]
        length = len(next(iter(columns.values())))
        table = Table("rows.jsonl", columns, [*range(1, length + 1)], "line")
    touched.clear()
    yield (
        task,
        {"train": table},
        Given(AutoConfig.from_pretrained(base), AutoProcessor.from_pretrained(base), Recorded()),
    )
    touched.clear()


@pytest.mark.parametrize("reads", TASKS, indirect=True)
def test_a_task_reads_the_options_that_it_declares(reads: tuple[Task, dict[str, Table], Given]) -> None:
    task, tables, given = reads
    check_packages(task)
    task.read(tables, given)
    read = touched | (set(task.options) & OF_BUILDERS) | {"problem_type"} & set(task.options)  # also by `choose_task`
    assert read == set(task.options)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_options_of_other_tasks_are_refused_with_the_tasks_that_they_are_for(task: Task) -> None:
    known = {f.name for f in dataclasses.fields(RunArguments)}
    every = {
        name: [other for other in TASKS.values() if name in other.options]
        for each in TASKS.values()
        for name in each.options
    }
    assert every.keys() <= known
    check_options({"model", "output_dir", *task.options}, task)
    others = {name for name in every if name not in task.options}
    with pytest.raises(ConfigError) as caught:
        check_options(others, task)
    assert len(caught.value.faults) == len(others)
    for name in others:
        flag = f"--{name.replace('_', '-')}"
        tasks = ", ".join(other.name for other in every[name])
        assert f"{flag} has no effect on the task {task.name}; it is for {tasks}" in caught.value.faults


def test_a_missing_package_is_one_message_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in TASKS.values():
        for module, source in task.packages.items():
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                with pytest.raises(
                    ConfigError, match=f"{task.name} requires .* Run: pip install {source}".replace("[", r"\[")
                ):
                    check_packages(task)


@pytest.mark.parametrize(
    ("error", "package"), [(TORCHVISION_IMPORT_ERROR, "torchvision"), (VISION_IMPORT_ERROR, "pillow")]
)
def test_an_image_processor_that_needs_a_package_is_one_message(
    error: str, package: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers says it: some versions load no image processor without torchvision."""
    vision, pictures = (request.getfixturevalue(name) for name in ("vision", "pictures"))
    words = ("--model", vision, "--train-file", pictures, "--output-dir", tmp_path / "out", "--use-cpu")
    model = apply_lora(AutoModelForImageClassification.from_pretrained(vision, num_labels=2))
    model.save_pretrained(tmp_path / "adapter")

    def refuses(*_: object, **__: object) -> None:
        raise ImportError(error.format("AutoImageProcessor"))

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", refuses)
    step = f"it needs {package}, which is not installed. Run: pip install {package}.\n"
    said = run_command("train", *words, code=2).stderr
    assert said == f"Error: --model {vision}: its image processor could not be loaded: {step}"
    said = run_command("eval", tmp_path / "adapter", "--file", pictures, code=2).stderr
    assert said.endswith(f"Error: {vision}: AutoImageProcessor could not be loaded: {step}")
    assert not (tmp_path / "out").exists()


def test_a_missing_pillow_is_found_before_the_image_processor_is_read(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, pictures = (request.getfixturevalue(name) for name in ("vision", "pictures"))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    words = ("--model", vision, "--train-file", pictures, "--output-dir", tmp_path / "out", "--use-cpu")
    said = run_command("train", *words, code=2).stderr
    assert re.fullmatch(
        r"Error: image-classification requires PIL, which could not be imported \(.*\)\. Run: pip install pillow\n",
        said,
    )
