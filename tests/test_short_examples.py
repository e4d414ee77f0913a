"""The notebook, the plain loop and the short examples, with tiny models and few steps."""

from __future__ import annotations

import importlib
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import PLAIN, byte_tokenizer
from helpers import tiny_bert, tiny_llama, tiny_t5
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = [
    "train_classifier", "chat", "seq2seq", "token_classification", "qlora", "fsdp2", "tracking", "lm_eval_harness",
    "several_adapters",
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a chat model and an encoder-decoder; their tokenizers know every letter."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bases")
    letters = [chr(i) for i in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    tiny_bert(cls="BertModel", vocab_size=len(words), max_position_embeddings=64).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "bert")
    tokenizer = byte_tokenizer(PLAIN["chatml"], eos="<|im_end|>")
    llama = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    llama.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    tiny_t5(vocab_size=len(tokenizer)).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    return folder


@pytest.fixture
def run(bases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run the `main` of an example with the base of a kind and 64 rows of each file, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)  # where the examples find one another
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(name: str, base: str, *words: str, rows: int = 64) -> None:
        module = importlib.import_module(name)
        own = module.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "read", lambda file: own(file)[:rows])
            module.main(["--model", str(bases / base), *words])

    return call


def test_the_examples_are_short_and_listed() -> None:
    lengths = {name: len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in SHORT}
    assert {name: length for name, length in lengths.items() if length >= 80} == {}
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")}


# The plain loop ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop(run: Callable[..., Any]) -> Callable[..., dict[str, torch.Tensor]]:
    """Run the plain loop on sixteen chats; the values of the adapter."""

    def call(folder: str, *words: str) -> dict[str, torch.Tensor]:
        run("plain_loop", "chat", "--output", folder, "--rank", "2", *words, rows=16)
        return load_file(Path(folder, "adapter", "adapter_model.safetensors"))

    return call


def test_a_resumed_plain_loop_ends_with_the_same_bits(loop: Callable[..., Any]) -> None:
    words = ("--steps", "4", "--every", "2", "--batch-size", "4")
    whole = loop("whole", *words)
    Path("cut").mkdir()
    Path("whole", "step-2").rename("cut/step-2")
    resumed = loop("cut", *words, "--resume")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)
    with pytest.raises(SystemExit, match="trained with other settings"):
        loop("cut", *words, "--resume", "--learning-rate", "1e-4")
    with pytest.raises(SystemExit, match="a new run a folder without"):
        loop("cut", *words)


def test_accumulated_steps_of_the_plain_loop_are_those_of_larger_batches(loop: Callable[..., Any]) -> None:
    """Rows have answers of different lengths, so the mean of the parts' means would be another number."""
    words = ("--steps", "2", "--dropout", "0", "--learning-rate", "1e-2")
    large, small = loop("a", *words, "--batch-size", "4"), loop("b", *words, "--batch-size", "1", "--accumulate", "4")
    for name, value in large.items():
        # Adam divides by the size of the gradient, so roundings of a small one are seen in its step.
        assert torch.allclose(small[name], value, atol=1e-2 * 1e-2), name


def test_the_plain_loop_measures_the_models_own_loss(bases: Path, loop: Callable[..., Any], capsys: Any) -> None:
    from transformers import AutoTokenizer

    from hf_lora import LoraModel

    loop("out", "--steps", "1", "--batch-size", "8")
    [printed] = re.findall(r"test loss ([\d.]+)", capsys.readouterr().out)
    module = importlib.import_module("plain_loop")
    tokenizer = AutoTokenizer.from_pretrained(bases / "chat")
    rows = [module.encode(tokenizer, chat) for chat in module.read("test")[:16]]
    model = LoraModel.from_pretrained("out/adapter").eval()
    losses, counts = [], []
    for row in rows:
        labels = torch.tensor([row["labels"]])
        counts.append(int((labels[:, 1:] != -100).sum()))
        losses.append(float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.detach()))
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert float(printed) == pytest.approx(expected, abs=1e-4)


# The notebook --------------------------------------------------------------------------------------------------------


def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return found


def test_the_notebook_has_the_format_of_notebooks() -> None:
    found = notebook()
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | more
        assert cell.get("outputs", []) == []


def run_notebook(**parameters: object) -> dict[str, Any]:
    """The names that its cells define; parameters are set behind the cell with that tag, as papermill does."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
    return names


def test_the_notebook_runs(bases: Path, run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines = (EXAMPLES / "data" / "household" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[:48]), encoding="utf-8")
    names = run_notebook(base=str(bases / "bert"), data=tmp_path, epochs=1)
    output = capsys.readouterr().out
    assert "adapter_model.safetensors" in output
    assert re.search(r"BertForSequenceClassification differs from the unmerged model by \de-0[5-9]", output)
    assert (tmp_path / "out" / "quickstart-merged" / "model.safetensors").is_file()
    assert names["trainer"].state.global_step == 3


@pytest.mark.slow
def test_the_notebook_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(EXAMPLES / "data")
    monkeypatch.chdir(tmp_path)
    assert run_notebook()["accuracy"] > 0.8


# The others ----------------------------------------------------------------------------------------------------------


def test_chat(bases: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "open"}, {"role": "assistant", "content": "shut"}]}
    Path("chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    run("chat", "chat", "--train-file", "chats.jsonl", "--max-steps", "1", "--output", "out", "--ask", "open", "why")
    assert re.search(r"> open\n.*\n> why\n", capsys.readouterr().out, re.S)
    assert json.loads(Path("out", "adapter_config.json").read_text())["base_model_name_or_path"] == str(bases / "chat")


def test_token_classification(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("token_classification", "bert", "--output", "out", "--epochs", "0.5")
    assert "'eval_f1':" in capsys.readouterr().out
    assert "classifier" in json.loads(Path("out", "adapter_config.json").read_text())["modules_to_save"]


def test_seq2seq(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("seq2seq", "t5", "--output", "out", "--epochs", "0.5", "--test-rows", "4")
    assert "'eval_rouge_l':" in capsys.readouterr().out
    assert Path("out", "adapter_model.safetensors").is_file()


def test_several_adapters(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("several_adapters", "bert", "--output", "out", "--epochs", "0.5")
    assert re.search(r"\nintent: \w+\nwhen: (no|a) time\n", capsys.readouterr().out)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_tracking(tracker: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # the example sets it; this restores it
    run("tracking", "bert", "--output", "out", "--steps", "2", "--report-to", tracker)
    folder = tmp_path / ("trackio" if tracker == "trackio" else "out/tensorboard")
    assert any(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_lm_eval(bases: Path, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from transformers import AutoTokenizer, LlamaForCausalLM

    from hf_lora import LoraConfig, apply_lora

    config = LoraConfig(init_lora_weights=False)
    apply_lora(LlamaForCausalLM.from_pretrained(bases / "chat"), config).save_pretrained("adapter")
    AutoTokenizer.from_pretrained(bases / "chat").save_pretrained("adapter")
    importlib.import_module("lm_eval_harness").main(["adapter", "--limit", "4"])
    assert re.search(r"household acc,none: [\d.]+ base, [\d.]+ with the adapter", capsys.readouterr().out)


def test_fsdp2_with_one_process(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    run("fsdp2", "chat", "--output", "out", "--steps", "5")
    assert "step 5: loss" in capsys.readouterr().out
    saved = load_file(Path("out", "adapter_model.safetensors"))
    assert all(value.any() and value.isfinite().all() for value in saved.values())
