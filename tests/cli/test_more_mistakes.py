"""Wrong names, values and files that each command meets: one message with the next step, and nothing is changed."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, tiny_bert, tiny_gpt2, write_lines

from hf_lora.testing import LocalHub


@pytest.fixture(scope="module")
def places(
    bert_folder: str, llama_folder: str, adapter_folder: str, chat_adapter: str, texts_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:  # fmt: skip
    """What the words of the table stand for, all below one folder."""
    folder = tmp_path_factory.mktemp("more")
    sources = {"bert": bert_folder, "llama": llama_folder, "clf": adapter_folder, "chat": chat_adapter}
    for name, source in sources.items():
        shutil.copytree(source, folder / name)
    for name, base in (("clf", "bert"), ("chat", "llama"), ("lost", "gone")):
        if name == "lost":
            shutil.copytree(adapter_folder, folder / name)
        config = json.loads((folder / name / "adapter_config.json").read_text())
        values = config | {"base_model_name_or_path": str(folder / base)}
        (folder / name / "adapter_config.json").write_text(json.dumps(values))
    for name, model in (("bare", tiny_bert().bert), ("words", tiny_gpt2())):  # without a tokenizer
        model.save_pretrained(folder / name)
    shutil.copy(texts_folder / "rows.csv", folder / "rows.csv")
    (folder / "folder.csv").mkdir()
    (folder / "plain").mkdir()
    (folder / "plain" / "kept").write_text("x")
    for name in ("rows.xlsx", "file"):
        (folder / name).write_text("x")
    (folder / "bad.parquet").write_bytes(b"PAR1xxxx")
    (folder / "odd.csv").write_text("a,b\nx,y\n")
    (folder / "one.csv").write_text("text,label\na,x\nb,x\n")
    (folder / "twice.yaml").write_text("lora_r: 4\nmodel: a\nlora-r: 8\n")
    (folder / "maybe.yaml").write_text("bf16: maybe\n")
    (folder / "number.yaml").write_text("1: 2\n")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "adapter_model.bin").write_bytes(b"notapickle")
    shutil.copy(folder / "clf" / "adapter_config.json", folder / "pickle")
    write_lines(folder / "prompts.jsonl", [{"prompt": "open"}])
    write_lines(folder / "pairs.jsonl", [{"prompt": "open", "completion": "door"}])
    return {name: str(folder / name) for name in ("bert", "llama", "clf", "chat")} | {"d": str(folder)}


RUN = "train --use-cpu --output-dir {d}/out --model {bert} "
ROWS = RUN + "--train-file {d}/rows.csv "
EARLY = [
    # Files.
    (RUN + "--config {d}/twice.yaml", "twice.yaml sets --lora-r more than once. Keep one line of each."),
    (RUN + "--config {d}/maybe.yaml", "argument --bf16: Truthy value expected: got maybe but expected one of"),
    (RUN + "--config {d}/number.yaml", "1 is not an argument"),
    (RUN + "--config {d}", "could not be read (Is a directory)"),
    (
        RUN + "--train-file https://x.org/rows.csv",
        "is an address: download it, or name a dataset of the Hub with",
    ),
    (RUN + "--train-file {d}/folder.csv", "--train-file {d}/folder.csv is a folder"),
    (RUN + "--train-file {d}/rows.xlsx", "rows.xlsx: unknown file type. The known ones are .csv"),
    (RUN + "--train-file {d}/bad.parquet", "bad.parquet is not a complete Parquet file"),
    (RUN + "--train-file {d}/plain", "plain' is not a file of a known type"),
    (ROWS + "--test-file {d}/one.csv", "one.csv, line 2, column 'label': 'x' is not a label of the training data"),
    (ROWS + "--model {d}/bare", "--model {d}/bare: it has no tokenizer, or one without a vocabulary. Save the one"),
    # Values.
    (
        ROWS + "--lora-r eight",
        "hf-lora train: argument --lora-r: invalid int value: 'eight'. `hf-lora train",
    ),
    (
        ROWS + "--test-file {d}/rows.csv --save-steps 0 --eval-steps 0",
        "--save-steps 0 must be greater than 0|--eval-steps 0 must be",
    ),
    (ROWS + "--save-steps 00 --logging-steps=0e0", "--save-steps 0 must be greater than 0|--logging-steps 0 must be"),
    (ROWS + "--save-total-limit 0", "--save-total-limit 0 must be at least 1"),
    (ROWS + "--label-smoothing-factor 5", "--label-smoothing-factor 5 must be less than 1"),
    # Options without an effect.
    (ROWS + "--model-revision x", "--model-revision x has no effect, since {bert} is a folder"),
    (ROWS + "--label-names foo", "--label-names has no effect: the task has its own"),
    (ROWS + "--do-train false", "--do-train has no effect: the command trains"),
    (ROWS + "--hub-model-id user/x", "--hub-model-id needs --push-to-hub"),
    (ROWS + "--head-init class-means --problem-type regression", "--head-init class-means needs classes, and"),
    (ROWS + "--head-init random --lora-adapter {clf}", "--head-init has no effect with --lora-adapter, which has its"),
    (ROWS + "--dry-run --show-batch", "pass only one of --dry-run, --show-batch."),
    # Names.
    (
        ROWS + "--text-column label --label-column label",
        "--text-column and --label-column are the same column, 'label'",
    ),
    (ROWS + "--accelerator-config {d}/none.json", "hf-lora train: --accelerator-config {d}/none.json does not exist."),
    (ROWS + "--push-to-hub --hub-model-id 'a b/c'", "--hub-model-id a b/c is not a valid repository name"),
    (ROWS + "--lora-adapter {d}/chatt", "--lora-adapter {d}/chatt: there is no such folder (did you mean 'chat'"),
    (ROWS + "--lora-adapter ''", "--lora-adapter: the name is empty"),
    (ROWS + "--lora-use-dora --lora-method lora_fa", "  - the fields ask for lora_fa, dora, but a layer has one"),
    (ROWS + "--lora-adapter {bert}", "--lora-adapter {bert} is not the folder of an adapter"),
]
LATE = [
    (ROWS + "--lora-adapter {chat}", "the adapter was trained on a llama model, this is a bert model. Load the base"),
    (ROWS + "--lora-layers-to-transform 99", "--lora-layers-to-transform: layer 99 contains no target"),
    (ROWS + "--lora-modules-to-save nope", "--lora-modules-to-save: 'nope' matches no module|Train them whole: "
     "--lora-modules-to-save classifier"),
    (ROWS + "--dataloader-drop-last true --per-device-train-batch-size 999", "are fewer than a batch of 999."),
    (ROWS + "--use-liger-kernel true", "hf-lora train: a package is missing (|liger-kernel|). Install it, or omit"),
]  # fmt: skip
OTHERS = [
    ("merge {clf} --out {bert} --overwrite", "{bert} is the folder of the base model. Name another one."),
    ("merge {clf} --out ''", "Invalid value for '--out': the name is empty."),
    ("merge {clf} --out {d}/new --base ''", "hf-lora merge: --base is empty. Pass a folder or a name on the Hub"),
    ("merge {clf} --out {d}/new --revision x", "is a folder, which has no revisions. Omit --revision x."),
    ("merge {clf} --out {d}/new --base-revision x", "--base-revision x has no effect, since {bert} is a folder"),
    ("merge {d}/lost --out {d}/new", "{d}/gone', which could not be loaded|Pass --base …: a model"),
    ("merge {llama} {clf} {d}/new", "the adapter was trained on a bert model, this is a llama model"),
    (
        "merge {d}/none --out {d}/new",
        "{d}/none' is not a local folder and not a valid repository name: there is no",
    ),
    ("generate '' --prompt a", "'' is not a local folder and not a valid repository name: the name is empty"),
    ("generate {d}/chatt --prompt a", "there is no such folder (did you mean 'chat'"),
    ("generate ~/x --prompt a", "the shell did not expand ~"),
    ("generate {d}/file --prompt a", "this is a file. Name the folder that it is in"),
    ("generate {chat} --prompt a --base-model ''", "--base-model is empty"),
    ("generate {chat} --prompt a --base-model {bert}", "this is a bert model. Load the base that the adapter was"),
    ("generate {chat} --prompt a --revision x", "{chat}' is a folder, which has no revisions. Omit --revision x."),
    ("generate {chat} --prompt a --top-p 0.5", "--top-p 0.5 has no effect without a temperature above 0"),
    ("generate {chat} --prompt a --temperature inf", "--temperature inf must be a number that is not negative"),
    ("generate {d}/words --prompt a", "there is no tokenizer in {d}/words"),
    ("generate {llama} --prompt a --merge", "so --base-model and --merge do not apply"),
    ("generate {chat} --file {d}/prompts.jsonl --out ''", "Invalid value for '--out': the name is empty"),
    ("eval {clf} --file {d}/rows.csv --system x --last-turn-only", "--last-turn-only, --system x has no effect on te"),
    (
        "eval {chat} --file {d}/prompts.jsonl --text-column prompt --completion-column prompt",
        "--text-column and --completion-column are the same column, 'prompt'",
    ),
    ("eval {clf} --file {d}/rows.csv --max-new-tokens 5", "--max-new-tokens 5 has no effect on text-classification"),
    ("eval {chat} --file {d}/pairs.jsonl --max-new-tokens 5", "has no effect on causal-lm without --generate. Omit"),
    ("eval {chat} --file {d}/prompts.jsonl --generate --max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
    (
        "eval {clf} --file {d}/odd.csv",
        "which column holds the labels. It has 'a', 'b'. Name it with --completion-column",
    ),
    ("eval {chat} --file {d}/plain", "plain' is not a file of a known type"),
    ("chat {d}/none", "is not a local folder and not a valid repository name: there is no such folder"),
    ("push {clf} https://huggingface.co/user/x", "this is an address. Pass the name of the repository: user/x"),
    ("pull https://huggingface.co/user/x/tree/main {d}/new", "Pass the name of the repository: user/x"),
    ("pull {clf} {d}/new", "is not a valid repository name (it is a folder on this machine)"),
    ("pull user/x ''", "the name is empty"),
    ("inspect {clf} --plot {d}/picture", "picture does not end with a format of images. Name it picture.png"),
    ("inspect {clf} --plot {d}/plain", "plain does not end with a format of images"),
    ("inspect {clf}/adapter_model.safetensors", "this is a file. Name the folder that it is in"),
    ("inspect {clf} --revision x", "is a folder, which has no revisions"),
    ("convert {d}/pickle --out {d}/new", "(UnpicklingError: Unsupported operand 110). Copy it again."),
    ("convert {d}/pickle --out ''", "Invalid value for '--out': the name is empty"),
    ("targets {bert} --task image-classification", "is a bert, for which transformers has no AutoModelForImageClass"),
    (
        "targets {bert} --learning-rate 1 --train-file x",
        "--learning-rate has no effect|--train-file has",
    ),
    ("targets {bert} --lora-target-modules nope", "--lora-target-modules: 'nope' matches nothing"),
    ("init causal-lm ''", "the name is empty"),
]


def files_in(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def check(words: str, message: str, places: dict[str, str]) -> None:
    before = files_in(places["d"])
    error = run_command(*shlex.split(words.format(**places)), code=2).stderr
    for part in message.format(**places).split("|"):
        assert part in error
    for python in ("Traceback", "(…)", "allow_other_base", "base_model", "report it"):
        assert python not in error
    assert files_in(places["d"]) == before


@pytest.mark.parametrize(("words", "message"), EARLY, ids=lambda value: value[-40:])
def test_a_run_that_is_refused_before_the_model_is_loaded(
    words: str, message: str, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lora.train.build.load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    check(words, message, places)


@pytest.mark.parametrize(("words", "message"), LATE, ids=lambda value: value[-40:])
def test_a_run_that_does_not_fit_the_model(words: str, message: str, places: dict[str, str]) -> None:
    check(words, message, places)


@pytest.mark.parametrize(("words", "message"), OTHERS, ids=lambda value: value[-40:])
def test_a_call_of_another_command(words: str, message: str, places: dict[str, str]) -> None:
    check(words, message, places)


def test_a_template_that_cannot_be_written_whole_is_not_left_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    def full(self: Path, *args: Any, **more: Any) -> Any:
        opened(self, *args, **more).close()
        return Full()

    monkeypatch.setattr(Path, "open", full)
    error = run_command("init", "causal-lm", tmp_path / "run.yaml", code=2).stderr
    assert "cannot be written (No space left on device). Name another file." in error
    assert list(tmp_path.iterdir()) == []


def test_scripts_may_pass_the_main_revision_of_a_folder(places: dict[str, str]) -> None:
    """As transformers' example scripts do by default."""
    assert run_command("inspect", places["clf"], "--revision", "main").exit_code == 0


def test_a_missing_token_is_said_at_once(places: dict[str, str], tmp_path: Path, messages: list[str]) -> None:
    """And not retried, as an answer of the Hub would be."""
    with LocalHub() as hub, hub.active(tmp_path, token=None):
        error = run_command("push", places["clf"], "adapter", code=2).stderr
        assert hub.requests == []
    assert "there is no token. Log in with `hf auth login`, set HF_TOKEN" in error
    assert not any("Trying again" in message for message in messages)
