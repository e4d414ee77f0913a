"""Whatever goes wrong on the way: success after another attempt, or one clear error; never half of something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import token_ids
from hub.conftest import EXPECTED, contents
from huggingface_hub import constants, get_session

from hf_lora import AdapterFileError, HubError, LoraModel, pull, push, write_card
from hf_lora.hub import network
from hf_lora.testing import LocalHub

FAULTS: dict[str, dict[str, Any]] = {
    "drop": {"kind": "drop"},
    "lose": {"kind": "lose"},
    "stall": {"kind": "stall"},
    "truncate": {"kind": "truncate"},
    "corrupt": {"kind": "corrupt"},
    "409": {"kind": "status", "status": 409},
    "412": {"kind": "status", "status": 412},
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "7"}},
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
}
PUSH = {
    "info": "GET /api/models/user/ad*",
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST /api/models/*/preupload/*",
    "batch": "POST /*/info/lfs/objects/batch",
    "upload": "PUT /large-files/*",
    "verify": "POST /large-files/*/verify",
    "commit": "POST /api/models/*/commit/*",
}
PULL = {
    "info": "GET /api/models/user/ad",
    "head config": "HEAD /user/ad/resolve/*/adapter_config.json",
    "config": "GET /user/ad/resolve/*/adapter_config.json",
    "head weights": "HEAD /user/ad/resolve/*/adapter_model.safetensors",
    "weights": "GET /user/ad/resolve/*/adapter_model.safetensors",
    "extras": "GET /user/ad/resolve/*/hf_lora.json",
}
TEMPORARY = ("drop", "lose", "truncate", "429", "500", "503", "409", "412", "stall")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", PUSH)
def test_pushing(hub: LocalHub, adapter_folder: Path, waits: list[float], step: str, fault: str) -> None:
    before = contents(adapter_folder)
    set_up = hub.fail(PUSH[step], **FAULTS[fault])
    refused = ""
    try:
        push(adapter_folder, "user/ad")
    except HubError as error:
        refused = str(error)
    if refused:
        assert fault == "corrupt" or step == "create", refused
        assert "Repeat the same call" in refused
    else:
        assert hub.files("user/ad").keys() == EXPECTED
        assert len(hub.commits("user/ad")) == 2
    assert set_up.fired == 1
    assert contents(adapter_folder) == before
    if "user/ad" in hub.api.repos and (remote := hub.files("user/ad")):  # all of it, or nothing
        assert all(remote[name] == before[name] for name in EXPECTED)
    if fault == "429" and step in ("info", "commit", "upload"):
        assert max(waits) >= 7
    push(adapter_folder, "user/ad")  # the same call goes on from there
    assert all(hub.files("user/ad")[name] == before[name] for name in EXPECTED)
    assert len(hub.commits("user/ad")) == 2


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", PULL)
def test_pulling(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path, waits: list[float], step: str, fault: str
) -> None:
    hub.add_repo("user/ad", {name: (adapter_folder / name).read_bytes() for name in EXPECTED})
    set_up = hub.fail(PULL[step], **FAULTS[fault])
    try:
        pull("user/ad", tmp_path / "out")
    except AdapterFileError:
        assert fault in ("corrupt", "409", "412"), "this passes, and was not tried again"
        assert not list((tmp_path / "out").glob("*"))
        with pytest.raises(HubError):  # nor is it in the cache
            pull("user/ad", local_files_only=True)
    else:
        assert contents(tmp_path / "out") == {name: (adapter_folder / name).read_bytes() for name in EXPECTED}
    assert set_up.fired == 1
    again = pull("user/ad", tmp_path / "again")
    assert contents(again) == {name: (adapter_folder / name).read_bytes() for name in EXPECTED}
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.parametrize("fault", ["drop", "corrupt", "truncate", "429", "500"])
@pytest.mark.parametrize("step", ["info", "upload", "verify", "commit"])
def test_a_push_that_never_succeeds(
    hub: LocalHub, adapter_folder: Path, waits: list[float], step: str, fault: str
) -> None:
    hub.add_repo("user/ad", {"notes.md": b"mine"})
    before, commits = hub.files("user/ad"), hub.commits("user/ad")
    hub.fail(PUSH[step], times=10_000, **FAULTS[fault])
    whole = step == "commit" and fault in ("corrupt", "truncate")  # it is done each time, and the answer is lost
    whole |= step in ("upload", "verify") and fault in ("corrupt", "truncate")  # nobody needs that answer
    if whole:
        push(adapter_folder, "user/ad")
        assert hub.files("user/ad").keys() == EXPECTED | {"notes.md"}
        assert len(hub.commits("user/ad")) == len(commits) + 1
        return
    with pytest.raises(HubError, match="Repeat the same call"):
        push(adapter_folder, "user/ad")
    assert len(waits) <= 6 * network.ATTEMPTS
    assert hub.files("user/ad") == before
    assert hub.commits("user/ad") == commits
    hub.clear()
    push(adapter_folder, "user/ad")
    assert hub.files("user/ad").keys() == EXPECTED | {"notes.md"}


@pytest.mark.parametrize("fault", ["drop", "corrupt", "truncate", "429", "500"])
@pytest.mark.parametrize("step", ["info", "weights"])
def test_a_pull_that_never_succeeds(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path, waits: list[float], step: str, fault: str
) -> None:
    hub.add_repo("user/ad", {name: (adapter_folder / name).read_bytes() for name in EXPECTED})
    hub.fail(PULL[step], times=10_000, **FAULTS[fault])
    if (step, fault) == ("info", "corrupt"):  # the byte that changes is of the pointer's hash, which nobody needs
        assert contents(pull("user/ad", tmp_path / "out")).keys() == EXPECTED
        return
    with pytest.raises(AdapterFileError, match="user/ad"):
        pull("user/ad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(HubError, match="does not have user/ad"):
        pull("user/ad", local_files_only=True)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_bytes_that_change_on_their_way_up_are_refused(
    hub: LocalHub, adapter_folder: Path, waits: list[float]
) -> None:
    hub.fail(PUSH["upload"], "garble")
    with pytest.raises(HubError, match=r"not .* bytes"):
        push(adapter_folder, "user/ad")
    assert hub.files("user/ad") == {}
    push(adapter_folder, "user/ad")
    assert hub.files("user/ad").keys() == EXPECTED


@pytest.mark.parametrize("fault", FAULTS)
def test_the_card_on_the_hub_is_read_whole(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path, waits: list[float], fault: str
) -> None:
    """Of it, what somebody wrote there is sent back."""
    folder = shutil.copytree(adapter_folder, tmp_path / "mine")
    write_card(folder)
    push(folder, "user/ad")
    mine = "\nWhat I wrote.\n" * 1000
    hub.add_files("user/ad", {"README.md": hub.files("user/ad")["README.md"] + mine.encode()})
    write_card(folder, license="mit")
    set_up = hub.fail("GET */resolve/*/README.md", **FAULTS[fault])
    try:
        push(folder, "user/ad")
    except HubError:
        assert fault in ("409", "412"), "this passes, and was not tried again"
        assert len(hub.commits("user/ad")) == 3
    else:
        assert hub.files("user/ad")["README.md"].decode().endswith(mine)
        assert b"license: mit" in hub.files("user/ad")["README.md"]
    assert set_up.fired == 1


def test_a_commit_of_somebody_else_in_between(hub: LocalHub, adapter_folder: Path, waits: list[float]) -> None:
    """It comes after we looked: the real answer 412, and both commits stay."""
    hub.add_repo("user/ad")
    done = []

    def between(method: str, path: str) -> bool:
        if "/commit/" in path and not done:
            done.append(hub.add_files("user/ad", {"notes.md": b"theirs"}))
        return False

    hub.fail(between, "drop")
    push(adapter_folder, "user/ad")
    assert [line.status for line in hub.asked("POST */commit/*")] == [412, 200]
    assert hub.files("user/ad").keys() == EXPECTED | {"notes.md"}
    assert len(hub.commits("user/ad")) == 3


def test_a_lost_answer_makes_no_second_pull_request(hub: LocalHub, adapter_folder: Path, waits: list[float]) -> None:
    hub.add_repo("user/ad")
    hub.fail(PUSH["commit"], "lose")
    with pytest.raises(HubError, match=r"may have been opened. Check .*/user/ad/discussions"):
        push(adapter_folder, "user/ad", create_pr=True)
    assert len(hub.repo("user/ad").pulls) == 1
    hub.fail(PUSH["commit"], "status", status=200)  # an answer that cannot be read
    with pytest.raises(HubError, match="may have been opened"):
        push(adapter_folder, "user/ad", create_pr=True)
    hub.fail(PUSH["commit"], "status", status=503)
    assert push(adapter_folder, "user/ad", create_pr=True).pr_url.endswith("/discussions/2")


def test_a_server_that_asks_for_too_long(hub: LocalHub, adapter_folder: Path, waits: list[float]) -> None:
    hub.fail(PUSH["commit"], "status", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match=r"429 .*asks to wait 3600 s"):
        push(adapter_folder, "user/ad")
    assert not waits


def test_a_hub_that_gives_no_hashes(hub: LocalHub, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some mirrors do."""
    monkeypatch.setattr("hf_lora.testing.api._blob", lambda blob: {})
    push(adapter_folder, "user/ad")
    assert contents(pull("user/ad")).keys() == EXPECTED - {"README.md"}


def test_the_client_is_left_without_a_limit_of_time(hub: LocalHub, adapter_folder: Path) -> None:
    """Other code of the process uses it too."""
    push(adapter_folder, "user/ad")
    pull("user/ad")
    assert get_session().timeout.read is None


def test_a_broken_file_in_the_cache_is_fetched_again(with_base: LocalHub, adapter_folder: Path) -> None:
    with_base.add_repo("user/ad", {name: (adapter_folder / name).read_bytes() for name in EXPECTED})
    expected = LoraModel.from_pretrained("user/ad")(token_ids()).logits
    weights = (pull("user/ad") / "adapter_model.safetensors").resolve()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes(4))
    found = LoraModel.from_pretrained("user/ad")(token_ids()).logits
    assert json.dumps(found.tolist()) == json.dumps(expected.tolist())
    assert weights.read_bytes() == whole
