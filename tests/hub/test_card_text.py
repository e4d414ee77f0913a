"""What of a README is ours and what is kept; names, secrets and paths in what we write."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import randomize, tiny_bert
from huggingface_hub import EvalResult, ModelCard, constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_lora import AdapterFileError, LoraConfig, apply_lora, write_card
from hf_lora.hub.card.card_data import Run, Score, scores_of
from hf_lora.hub.card.escape import clean, command_line
from hf_lora.hub.card.readme import join_readme, split_readme


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "three"
    randomize(apply_lora(tiny_bert(), LoraConfig(r=4))).save_pretrained(folder)
    return folder


@pytest.fixture
def readme(saved: Path) -> Any:
    """The file, absent; and what of it is YAML."""
    file = saved / "README.md"
    file.unlink(missing_ok=True)
    return file


def metadata(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8").split("---\n")[1]))


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


# What is kept --------------------------------------------------------------------------------------------------------


def test_what_an_author_wrote_around_our_part_is_kept(readme: Path) -> None:
    write_card(readme.parent, results={"accuracy": 0.5})
    change(readme, "\n<!-- hf_lora:begin", "\nAbove, with ![a picture](x.png).\n\n<!-- hf_lora:begin")
    readme.write_text(readme.read_text() + "\n## Limits\n\nEnglish alone.\n\n    indented  \n", encoding="utf-8")
    change(readme, "# three", "# an author's change inside is lost")
    write_card(readme.parent, results={"accuracy": 0.75})
    text = readme.read_text()
    assert "---\n\nAbove, with ![a picture](x.png).\n\n<!-- hf_lora:begin" in text
    assert text.endswith("-->\n\n## Limits\n\nEnglish alone.\n\n    indented  \n")
    assert "0.75" in text
    assert "| 0.5 |" not in text
    assert "is lost" not in text


def test_metadata_that_an_author_added_changed_or_took_out_stay_so(readme: Path) -> None:
    write_card(readme.parent, license="mit", tags=["first"], results={"accuracy": 0.5})
    data = metadata(readme)
    data |= {"license": "cc0-1.0", "language": "en", "widget": [{"text": "hi"}], "thumbnail": None}
    data["tags"] = [tag for tag in data["tags"] if tag != "first"] + ["theirs"]
    body = readme.read_text().split("---\n", 2)[2]
    readme.write_text(f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n{body}", encoding="utf-8")
    for value in (0.625, 0.75):
        write_card(readme.parent, results={"f1": value})
        found = metadata(readme)
        assert (found["license"], found["language"], found["widget"]) == ("cc0-1.0", "en", [{"text": "hi"}])
        assert found["tags"] == ["lora", "hf_lora", "text-classification", "theirs"]
        assert found["metrics"] == ["f1"], "what we wrote ourselves goes when it is no longer so"
        assert [m["value"] for m in found["model-index"][0]["results"][0]["metrics"]] == [value]


def test_results_of_others_are_kept_beside_ours(readme: Path) -> None:
    write_card(readme.parent, results={"accuracy": 0.5})
    card = ModelCard.load(readme)
    theirs = EvalResult("text-classification", "imdb", "IMDb", "accuracy", 0.875, dataset_split="test")
    card.data.eval_results.append(theirs)
    card.save(readme)
    write_card(readme.parent, results={"accuracy": 0.625})
    found = ModelCard.load(readme).data.eval_results
    assert [(r.dataset_type, r.metric_value) for r in found] == [("custom", 0.625), ("imdb", 0.875)]
    assert found[1] == theirs


def test_untouched_metadata_keep_their_comments(readme: Path) -> None:
    write_card(readme.parent)
    change(readme, "library_name: peft\n", "library_name: peft # a comment\n")
    write_card(readme.parent, results={"eval_loss": float("inf")})
    assert "library_name: peft # a comment\n" in readme.read_text()


def test_a_readme_without_marks_is_kept_whole(readme: Path) -> None:
    foreign = "---\nlicense: mit # theirs\ntags: mine\n---\n# Their title\n\ntheir text"
    readme.write_text(foreign, encoding="utf-8")
    write_card(readme.parent, license="apache-2.0")
    text = readme.read_text()
    assert "---\n# Their title\n\ntheir text\n\n<!-- hf_lora:begin" in text
    assert metadata(readme)["license"] == "mit"
    assert metadata(readme)["tags"] == ["lora", "hf_lora", "text-classification", "mine"]
    write_card(readme.parent)
    assert readme.read_text() == text


def test_a_readme_with_the_lines_of_windows_keeps_them(readme: Path) -> None:
    readme.write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Title\r\n")
    write_card(readme.parent)
    first = readme.read_bytes()
    assert b"# Title\r\n" in first
    assert first.count(b"\n") == first.count(b"\r\n")
    write_card(readme.parent)
    assert readme.read_bytes() == first
    assert ModelCard.load(readme).data.license == "mit"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"---\na: [\n---\n", "not valid YAML"),
        (b"---\n- a\n- b\n---\n", "not a mapping"),
        (b"---\nmodel-index: [1]\n---\n", "model-index cannot be read"),
        (b"text \xff\xfe", "not UTF-8"),
        (b"<!-- hf_lora:begin -->\ntext", "must be one begin and one end"),
        (b"text\n<!-- hf_lora:end {} -->\n", "must be one begin and one end"),
        (b"<!-- hf_lora:end {} -->\n<!-- hf_lora:begin -->\n", "must be one begin and one end"),
        (b"<!-- hf_lora:begin -->\n<!-- hf_lora:end {} -->\n" * 2, "must be one begin and one end"),
    ],
)
def test_a_readme_that_cannot_be_kept_is_refused_and_left_alone(readme: Path, content: bytes, match: str) -> None:
    readme.write_bytes(content)
    with pytest.raises(AdapterFileError, match=match):
        write_card(readme.parent, results={"accuracy": 0.5})
    assert readme.read_bytes() == content
    assert not list(readme.parent.glob(".*"))


TEXTS = st.text(st.characters(blacklist_categories=["Cs"])).map(lambda t: t.replace("\r", ""))
PLAIN = st.one_of(st.text(st.characters(categories=["L", "N", "P", "S"])), st.integers(), st.booleans())
DATA = st.dictionaries(
    st.sampled_from(["license", "language", "tags", "datasets", "widget", "x y", "model_name", "extra"]),
    st.one_of(PLAIN, st.lists(PLAIN, max_size=4)),
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=TEXTS, after=TEXTS, theirs=DATA, first=DATA, second=DATA)
def test_whatever_an_author_wrote_comes_back(
    before: str, after: str, theirs: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    if "hf_lora:" in before + after:
        return
    front = f"---\n{yaml.safe_dump(theirs)}---\n"
    after = "\n" + after
    content = f"{front}{before}\n<!-- hf_lora:begin -->\nours\n<!-- hf_lora:end {{}} -->{after}"
    for data in (first, second):
        content = join_readme(split_readme(content, "x"), data, "| our | part |", {}, "x")
        parts = split_readme(content, "x")
        assert (parts.before, parts.after) == (before + "\n", after)
        for key, value in theirs.items():
            kept = parts.metadata.get(key)
            if isinstance(value, list) or isinstance(data.get(key), list) or isinstance(kept, list):
                mine = value if isinstance(value, list) else [value]
                assert all(item in (kept if isinstance(kept, list) else [kept]) for item in mine)
            else:
                assert kept == value
        assert join_readme(parts, data, "| our | part |", {}, "x") == content
    for key in first.keys() - second.keys() - theirs.keys():
        assert key not in parts.metadata, "what is no longer ours is gone"


# The record ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        "[]", "{", "1", '{"given": 3, "metadata": 4, "run": 5}', '{"given": {"tags": "x", "license": ["y"]}}',
        '{"run": {"scores": [{"metric": 1, "value": 2.0}]}}', '{"run": {"settings": {"a": 1}}}', '{"run": {"no": 1}}',
        '{"metadata": {"tags": 3, "model-index": 7, "license": {}}}', "[" * 20000,
    ],
)  # fmt: skip
def test_a_record_that_somebody_changed_does_no_harm(readme: Path, record: str) -> None:
    write_card(readme.parent)
    digest = re.search(r'"weights": "\w+"', readme.read_text())[0]  # type: ignore[index]
    record = record.replace('{"run"', f'{{{digest}, "run"')
    readme.write_text(f"<!-- hf_lora:begin -->\nx\n<!-- hf_lora:end {record} -->\n", encoding="utf-8")
    write_card(readme.parent)
    assert "| Rank r | 4 |" in readme.read_text()
    assert {"lora", "hf_lora"} <= set(ModelCard.load(readme).data.tags)


def test_a_run_comes_back_from_its_record() -> None:
    run = Run(
        scores_of({"eval_f1": 0.5, "eval_runtime": 1.0}, "eval", step=3), {"Seed": "1"}, {"torch": "2"}, "python x"
    )
    assert Run.from_json(run.to_json()) == run
    assert [score.metric for score in run.scores] == ["f1"]


# Commands and secrets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "original", "processes", "expected"),
    [
        (["train.py", "--lr", "1e-3"], [], 1, "python train.py --lr 1e-3"),
        (["HERE/examples/train.py", "--data=HERE/rows.csv"], [], 1, "python examples/train.py --data=rows.csv"),
        (["/usr/local/bin/hf-lora", "train", "--model", "/srv/models/b"], [], 1, "hf-lora train --model b"),
        (["/x/pkg/main.py", "a b"], ["python", "-X", "dev", "-m", "pkg.main", "a b"], 1, "python -m pkg.main 'a b'"),
        (["train.py"], [], 4, "torchrun --nproc-per-node 4 train.py"),
        (["train.py", "--hub_token", "abc"], [], 1, "python train.py --hub_token '***'"),
        (["train.py", "--hub-token=abc", "--api_key=k"], [], 1, "python train.py '--hub-token=***' '--api_key=***'"),
        (["train.py", "--auth", "abc", "WANDB_API_KEY=k"], [], 1, "python train.py --auth '***' 'WANDB_API_KEY=***'"),
        (["train.py", "--wandb-key", "abc", "--key=x"], [], 1, "python train.py --wandb-key '***' '--key=***'"),
        (["train.py", "https://h/x?a=1&api_key=s&b=2"], [], 1, "python train.py 'https://h/x?a=1&api_key=***&b=2'"),
        (["train.py", "data=x.csv?token=abc"], [], 1, "python train.py 'data=x.csv?token=***'"),
        (["train.py", "--monkey", "5", "--pad_token", "x"], [], 1, "python train.py --monkey 5 --pad_token x"),
        (["train.py", "--max_new_tokens", "5"], [], 1, "python train.py --max_new_tokens 5"),
        (["train.py", "hf_abcdefghijklmnopqrstuvwx"], [], 1, "python train.py '***'"),
        (["train.py", "https://me:secret@host/x"], [], 1, "python train.py 'https://***@host/x'"),
        (["train.py", "a\n```\nb"], [], 1, "python train.py 'a ``` b'"),
        ([""], [], 1, None),
        (["-c", "x"], [], 1, None),
        (["/opt/x/ipykernel_launcher.py", "-f", "kernel.json"], [], 1, None),
    ],
)
def test_the_command_can_be_typed_again_and_tells_no_secret(
    argv: list[str], original: list[str], processes: int, expected: str | None
) -> None:
    argv = [word.replace("HERE", os.getcwd()) for word in argv]
    assert command_line(argv, original, processes) == expected


@pytest.mark.parametrize("home", ["/home/ann", "/Users/ann", "C:\\Users\\ann", "/root"])
def test_no_home_directory_stands_in_a_card(home: str) -> None:
    assert clean(f"--x={home}/data --y '{home}'") in ("--x=~/data --y '~'", f"--x=~/data --y '{home}'")
    assert "ann" not in clean(f"{home}/models/b")
    assert clean("/home-made/x /rooted") == "/home-made/x /rooted"


def test_no_text_of_a_card_holds_a_secret_or_a_home_directory(saved: Path, readme: Path) -> None:
    private = "/home/erin/rows hf_" + "x" * 20
    score = Score("f1", 0.5, private, private, private, private, private)
    run = Run([score], {private: private}, {private: private}, private, [private])
    result = EvalResult("task", private, private, private, 1.0)
    texts: dict[str, Any] = dict.fromkeys(("base_model", "model_name", "license", "data", "repo_id", "task"), private)
    lists: dict[str, Any] = {name: [private] for name in ("language", "tags", "datasets")}
    sources: list[dict[str, Any]] = [{"run": run}, {"results": {private: 0.5}}, {"results": [result]}]
    for source in sources:
        card = write_card(saved, **texts, **lists, **source).read_text(encoding="utf-8")
        assert "erin" not in card
        assert "hf_xxx" not in card
        readme.unlink()


def test_the_token_in_use_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
    assert clean("a not-of-the-usual-form b") == "a *** b"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("that-of-the-login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert clean("a that-of-the-login b hf_" + "x" * 20) == "a *** b ***"
