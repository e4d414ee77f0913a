"""Pushing with the real client: what goes up, and what each refusal says; round trips."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, run_command
from hub.conftest import ADAPTER, EXPECTED, contents, logits

from hf_lora import AdapterFileError, HubError, LoraModel, StateError, pull, push, write_card
from hf_lora.hub.download import local_adapter
from hf_lora.hub.upload import pushed_files
from hf_lora.testing import LocalHub

FRESH = """
import sys, torch
from helpers import token_ids
from hf_lora import LoraModel
model = LoraModel.from_pretrained("user/ad")
ours = model(token_ids()).logits
if "peft" in sys.argv:
    from peft import PeftModel
    from transformers import LlamaForCausalLM
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("user/base"), "user/ad")
    assert torch.allclose(theirs(token_ids()).logits, ours, atol=1e-5), "PEFT differs"
if "push" in sys.argv:
    model.push_to_hub("user/second")
torch.save(ours.detach(), sys.argv[1])
"""


def in_fresh_process(hub: LocalHub, folder: Path, *words: str, path: str = "") -> torch.Tensor:
    environment = hub.environment(folder / "fresh") | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (path, str(Path(__file__).parents[1])) if p)
    command = [sys.executable, "-c", FRESH, str(folder / "logits.pt"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "logits.pt")


@pytest.mark.slow
def test_round_trip_in_a_fresh_process_and_cache(model: Any, hub: LocalHub, tmp_path: Path) -> None:
    """Also by the `hf` command, and with PEFT."""
    done = model.push_to_hub("user/ad")
    assert hub.files("user/ad").keys() == ADAPTER | {"README.md"}
    assert [c.title for c in hub.commits("user/ad")] == ["Upload adapter", "initial commit"]
    assert done.oid == hub.commits("user/ad")[0].oid
    hub.clear()
    assert torch.equal(in_fresh_process(hub, tmp_path, "peft"), logits(model))
    assert not hub.asked("GET *training_args*")
    hf = Path(sys.executable).with_name("hf")
    command = [str(hf), "download", "user/ad", "--local-dir", str(tmp_path / "down")]
    subprocess.run(command, env=hub.environment(tmp_path / "other"), check=True, capture_output=True, timeout=120)
    down = {name: data for name, data in contents(tmp_path / "down").items() if name in hub.files("user/ad")}
    assert down == hub.files("user/ad")


@pytest.mark.slow
def test_round_trip_with_huggingface_hub_1(model: Any, hub: LocalHub, tmp_path: Path) -> None:
    """The oldest major version that is supported, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--target",
        str(tmp_path / "old"),
        "huggingface_hub==1.33.*",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"huggingface_hub 1.33 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    its_own = ("huggingface_hub", "hf_xet", "httpx", "httpcore", "h11", "anyio", "sniffio")
    for other in (tmp_path / "old").iterdir():  # those alone are others
        if not other.name.startswith(its_own):
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    path = str(tmp_path / "old")
    check = [sys.executable, "-c", "import huggingface_hub as h; print(h.__version__)"]
    version = subprocess.run(check, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert version.stdout.startswith("1.33"), version.stderr
    model.push_to_hub("user/ad")
    found = in_fresh_process(hub, tmp_path, "push", "peft", path=path)
    assert torch.equal(found, logits(model))
    assert hub.files("user/second").keys() == ADAPTER | {"README.md"}
    assert len(hub.commits("user/second")) == 2
    assert hub.files("user/second")["adapter_model.safetensors"] == hub.files("user/ad")["adapter_model.safetensors"]


# Pushing -------------------------------------------------------------------------------------------------------------


def test_only_the_adapter_s_files_go_up(hub: LocalHub, adapter_folder: Path) -> None:
    output = run_command("push", adapter_folder, "user/ad", "--private", "-m", "First").output
    assert hub.commits("user/ad")[0].oid in output
    assert hub.files("user/ad").keys() == EXPECTED
    assert hub.repo("user/ad").private
    assert hub.commits("user/ad")[0].title == "First"
    run_command("push", adapter_folder, "plain", "--no-tokenizer")
    assert hub.files("user/plain").keys() == EXPECTED - {"tokenizer_config.json"}


def test_large_uploads_go_in_parts(adapter_folder: Path, tmp_path: Path) -> None:
    with LocalHub(chunk_size=10_000) as hub, hub.active(tmp_path):
        push(adapter_folder, "user/ad")
        weights = (adapter_folder / "adapter_model.safetensors").read_bytes()
        assert hub.files("user/ad")["adapter_model.safetensors"] == weights
        assert len(hub.asked("PUT */part/*")) == -(-len(weights) // 10_000) > 1


def test_branches_and_pull_requests(hub: LocalHub, adapter_folder: Path, tmp_path: Path) -> None:
    push(adapter_folder, "user/ad", revision="v2")  # neither repository nor branch is there
    assert hub.files("user/ad") == {}
    assert hub.files("user/ad", "v2").keys() == EXPECTED
    done = push(adapter_folder, "user/ad", create_pr=True)
    assert done.pr_url == f"{hub.url}/user/ad/discussions/1"
    assert hub.files("user/ad") == {}
    pulled = pull("user/ad", tmp_path / "pr", revision="refs/pr/1")
    assert contents(pulled).keys() == EXPECTED
    hub.repo("user/ad").merge_pull(1)
    assert hub.files("user/ad").keys() == EXPECTED
    with pytest.raises(HubError, match="no branch, tag or commit 'refs/pr/7'"):
        push(adapter_folder, "user/ad", revision="refs/pr/7")
    guest = hub.add_user("guest")
    with pytest.raises(HubError, match="create_pr=True"):
        push(adapter_folder, "user/ad", token=guest, revision="v3")
    assert push(adapter_folder, "user/ad", token=guest, create_pr=True).oid


def test_several_adapters_go_to_folders_of_their_names(model: Any, hub: LocalHub) -> None:
    model.add_adapter("second", {"r": 2})
    model.push_to_hub("user/two")
    assert hub.files("user/two").keys() == {*ADAPTER, "README.md", *(f"second/{name}" for name in ADAPTER)}
    loaded = LoraModel.from_pretrained("user/two", subfolder="second", adapter_name="other")
    assert loaded.lora_configs["other"].r == 2
    model.push_to_hub("user/one", adapter_name="second")
    assert hub.files("user/one").keys() == ADAPTER | {"README.md"}
    model.push_to_hub("user/in", adapter_name="second", subfolder="a/b", card=False)
    assert hub.files("user/in").keys() == {f"a/b/{name}" for name in ADAPTER}
    with pytest.raises(AdapterFileError, match="Its subfolders a/b hold adapters: choose one with subfolder="):
        LoraModel.from_pretrained("user/in")
    for out in ("../x", "/x", "a/../b", "a\0b"):
        with pytest.raises(HubError, match="not a folder inside a repository"):
            pull("user/in", subfolder=out)


def test_what_somebody_wrote_on_the_hub_is_kept(model: Any, hub: LocalHub) -> None:
    model.push_to_hub("user/ad")
    written = hub.files("user/ad")["README.md"].decode()
    hub.add_files(
        "user/ad", {"README.md": written.replace("<!-- hf_lora:begin", "Mine.\n\n<!-- hf_lora:begin").encode()}
    )
    randomize(model, seed=4)
    model.push_to_hub("user/ad")
    readme = hub.files("user/ad")["README.md"].decode()
    assert readme.count("Mine.") == 1
    assert readme.count("hf_lora:begin") == 1
    assert len(hub.commits("user/ad")) == 4
    model.push_to_hub("user/ad")
    assert len(hub.commits("user/ad")) == 4, "nothing has changed"


def test_text_around_our_part_counts_where_it_was_changed_last(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path, caplog: Any
) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "mine")
    (folder / "README.md").unlink()
    card = write_card(folder)

    def there() -> str:
        return hub.files("user/ad")["README.md"].decode()

    card.write_text(card.read_text() + "\n## Limits\n")
    push(folder, "user/ad")
    assert there().endswith("\n## Limits\n"), "also in the first push"
    card.write_text(card.read_text().replace("## Limits", "## Known limits"))
    push(folder, "user/ad")
    assert there().endswith("\n## Known limits\n")
    hub.add_files("user/ad", {"README.md": there().replace("## Known limits", "## On the Hub").encode()})
    push(folder, "user/ad")
    assert there().endswith("\n## On the Hub\n")
    assert "differs from the local one" not in caplog.text
    card.write_text(card.read_text().replace("## Known limits", "## Here"))
    push(folder, "user/ad")
    assert there().endswith("\n## On the Hub\n")
    assert "differs from the local one" in caplog.text


def test_what_is_checked_before_the_network_is_asked(
    model: Any, hub: LocalHub, adapter_folder: Path, tmp_path: Path
) -> None:
    hub.clear()
    shutil.copytree(adapter_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "none").mkdir()
    model.merge_adapter()
    refusals: list[tuple[Any, type[Exception], str]] = [
        (lambda: push(tmp_path / "cut", "user/x"), AdapterFileError, "not a complete safetensors file"),
        (lambda: push(tmp_path / "none", "user/x"), AdapterFileError, "has no adapter"),
        (lambda: push(tmp_path / "absent", "user/x"), AdapterFileError, "is not a folder"),
        (lambda: push(adapter_folder, "a b/c"), HubError, "not a valid repository name"),
        (lambda: push(adapter_folder, "user/x/y"), HubError, "not a valid repository name"),
        (lambda: model.push_to_hub("user/x"), StateError, "merged"),
    ]
    for call, error, words in refusals:
        with pytest.raises(error, match=words):
            call()
    assert not hub.requests


def test_links_that_lead_out_of_the_folder_are_not_followed(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path
) -> None:
    """Neither up to the Hub nor into a model."""
    hub.clear()
    folder, secret = shutil.copytree(adapter_folder, tmp_path / "mine"), tmp_path / "id_rsa"
    secret.write_text("a secret")
    (folder / "vocab.json").symlink_to(secret)
    with pytest.raises(AdapterFileError, match=r"vocab.json is a link that points outside .*id_rsa"):
        push(folder, "user/ad")
    (folder / "vocab.json").unlink()
    (folder / "other").symlink_to(adapter_folder)
    with pytest.raises(AdapterFileError, match="other is a link that points outside") as caught:
        push(folder, "user/ad")
    assert str(caught.value).count("points outside") == 1
    assert not hub.requests
    with pytest.raises(AdapterFileError, match="other is a link that points outside"):
        local_adapter(folder, subfolder="other")
    (folder / "other").unlink()
    (folder / "vocab.json").symlink_to(folder / "hf_lora.json")  # this one stays within
    assert "vocab.json" in pushed_files(folder, "here")
    assert local_adapter(folder, subfolder="none") == folder / "none"
    cached = pull("user/ad") if push(folder, "user/ad") else folder
    assert pushed_files(cached, "of the cache, which consists of links").keys() >= ADAPTER


def test_a_full_model_on_the_hub_is_left_alone(with_base: LocalHub, adapter_folder: Path) -> None:
    before = with_base.files("user/base")
    with pytest.raises(HubError, match=r"already holds a full model there \(config.json, model.safetensors\)"):
        push(adapter_folder, "user/base")
    assert with_base.files("user/base") == before
    with pytest.raises(AdapterFileError, match=r"is not an adapter .* full model \(config.json, model.safetensors\)"):
        pull("user/base")


def test_no_token_is_ever_told(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path, capfd: Any, waits: list[float]
) -> None:
    secret = hub.add_user("reader", write=False)
    echoed = {"X-Error-Message": f"the token {secret} is of no use"}
    hub.fail("POST /api/repos/create", "status", status=403, headers=echoed)
    with pytest.raises(HubError) as caught:
        push(adapter_folder, "reader/ad", token=secret)
    import traceback

    told = "".join(traceback.format_exception(caught.value))
    assert "the token *** is of no use" in told
    assert secret not in told
    with pytest.raises(HubError) as caught:
        push(adapter_folder, "user/ad", token="no\ntoken")
    assert "Bearer ***" in str(caught.value)
    assert not waits, "it cannot stand in a header, now or later"
    push(adapter_folder, "user/ad")
    out = capfd.readouterr()
    assert "no\\ntoken" not in out.err
    for text in (out.out, out.err, *(str(c) for c in hub.files("user/ad").values())):
        assert secret not in text
        assert hub.token not in text
