"""An adapter's folder is a stranger's: whatever is in it, it is refused with its fault named, or loads as it says.

Of a refused folder nothing is left: no byte of the base, of the folder and of its neighbors has changed, and no
module that it names was imported. What loads is compared with the file as safetensors' own reader has it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, snapshot, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, SEEDS
from safetensors.torch import load_file
from spoiled_weights import EITHER, LOADS, MARK, REFUSED, sparse

from hf_lora import AdapterFileError, LoraModel, inspect_adapter
from hf_lora.files import validate as claims
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME, read_adapter
from hf_lora.safe_io import headers
from hf_lora.safe_io import reading as safety
from hf_lora.safe_io.reading import own_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECONDS = 10
"""More than any of these folders may take; most take some hundredths."""
EACH_N = 28
"""Of the table of mutations, the default run takes one in so many for each seed."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders, one for each kind of adapter."""
    folders = {}
    for name, (write, _) in SEEDS.items():
        folders[name] = tmp_path_factory.mktemp(name) / "adapter"
        write(folders[name])
    return folders


def listing(root: Path) -> dict[str, Any]:
    """Everything below a folder: what each thing is, and what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = path.readlink()
        elif not path.is_file() or path.stat().st_size > 2**24:
            found[str(path)] = path.stat().st_mode
        else:
            found[str(path)] = path.read_bytes()
    return found


def outcome(folder: Path, base: Any) -> AdapterFileError | None:
    """Load a folder onto a base: the error with which it is refused, or None where it loads as its file says."""
    root = folder.parent
    files, before, kind, config = listing(root), snapshot(base), type(base), base.config.to_dict()
    required = {name: p.requires_grad for name, p in base.named_parameters()}
    identities = {name: id(p) for name, p in base.named_parameters()}
    start = time.monotonic()
    refused = None
    try:
        model = LoraModel.from_pretrained(folder, base_model=base)
    except AdapterFileError as error:
        refused = error
    assert time.monotonic() - start < SECONDS
    assert listing(root) == files
    assert MARK not in sys.modules
    if refused is None:
        file = load_file(folder / WEIGHTS_NAME)
        held = model.get_adapter_state_dict()
        assert held.keys() == file.keys()
        assert all(torch.equal(held[key], tensor.to(held[key].dtype)) for key, tensor in file.items())
        return None
    assert type(base) is kind
    assert_same_tensors(snapshot(base), before)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == required
    assert {name: id(p) for name, p in base.named_parameters()} == identities
    assert base.config.to_dict() == config
    message = str(refused)
    assert str(folder) in message
    assert len(message) < 60_000
    return refused


def check_mutation(seed: str, name: str, seeds: dict[str, Path], place: Path) -> str | None:
    """What came of one folder; None where the mutation is not one for this seed."""
    mutation = MUTATIONS[name]
    folder = Path(shutil.copytree(seeds[seed], place / "adapter"))
    if mutation.change(folder) is False:
        return None
    refused = outcome(folder, SEEDS[seed][1]())
    if mutation.ends == REFUSED:
        assert refused is not None, f"{name} was loaded"
    elif mutation.ends == LOADS:
        assert refused is None, f"{name} was refused: {refused}"
    else:
        assert mutation.ends == EITHER
    return LOADS if refused is None else REFUSED


CASES = [(seed, name) for seed in SEEDS for name in MUTATIONS]
SOME = [
    case for number, seed in enumerate(SEEDS) for case in [(s, n) for s, n in CASES if s == seed][number * 7 :: EACH_N]
]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_good_folder_loads(seeds: dict[str, Path], seed: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(seeds[seed], tmp_path / "adapter"))
    assert outcome(folder, SEEDS[seed][1]()) is None


@pytest.mark.parametrize(("seed", "name"), SOME)
def test_some_hostile_folders(seeds: dict[str, Path], seed: str, name: str, tmp_path: Path) -> None:
    check_mutation(seed, name, seeds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_hostile_folder(seeds: dict[str, Path], seed: str, tmp_path: Path) -> None:
    """One test a seed: it says which mutations went wrong, all of them."""
    wrong, ends = {}, {LOADS: 0, REFUSED: 0, None: 0}
    for number, name in enumerate(MUTATIONS):
        try:
            ends[check_mutation(seed, name, seeds, tmp_path / str(number))] += 1
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:300]}"
        shutil.rmtree(tmp_path / str(number))
    print(f"{seed}: {ends}")
    assert not wrong, json.dumps(wrong, indent=1)
    assert ends[REFUSED] > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_hostile_folder_is_inspected_or_refused(seeds: dict[str, Path], seed: str, tmp_path: Path) -> None:
    wrong = {}
    for number, (name, mutation) in enumerate(MUTATIONS.items()):
        folder = Path(shutil.copytree(seeds[seed], tmp_path / str(number)))
        if mutation.change(folder) is False:
            continue
        try:
            str(inspect_adapter(folder))
        except AdapterFileError:
            pass
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:300]}"
        shutil.rmtree(folder)
    assert not wrong, json.dumps(wrong, indent=1)


# Any change of any bytes ---------------------------------------------------------------------------------------------

TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"null", b"NaN", b"-1", b"1e9", b"0", b"true", b"\0",
          b"\xff", b"[" * 64, b'"r": 9, ', b"../", b"\\u0000", b"\n"]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "replace", "cut", "double"]),
        st.floats(0, 1),  # where, of the file's length; or, for half of them, of its first bytes
        st.booleans(),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(TOKENS)),
    ),
    min_size=1,
    max_size=4,
)
FILES = st.sampled_from([CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME])


def edited(raw: bytes, edits: list[tuple[str, float, bool, bytes]]) -> bytes:
    for kind, where, near, content in edits:
        at = int(where * (min(len(raw), 400) if near else len(raw)))
        if kind == "flip":
            raw = raw[:at] + bytes(b ^ (1 << content[0] % 8) for b in raw[at : at + 1]) + raw[at + 1 :]
        elif kind == "insert":
            raw = raw[:at] + content + raw[at:]
        elif kind == "delete":
            raw = raw[:at] + raw[at + len(content) :]
        elif kind == "replace":
            raw = raw[:at] + content + raw[at + len(content) :]
        elif kind == "cut":
            raw = raw[:at]
        else:
            raw = raw[:at] + raw[at : at + 64] + raw[at:]
    return raw


def fuzz(seeds: dict[str, Path], root: Path, examples: int) -> dict[str, int]:
    """Load folders with changed bytes; how many loaded and how many were refused."""
    ends = {LOADS: 0, REFUSED: 0}
    bases: dict[str, Any] = {}

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(sorted(SEEDS)), FILES, EDITS)
    def one(seed: str, name: str, edits: list[tuple[str, float, bool, bytes]]) -> None:
        shutil.rmtree(root / "run", ignore_errors=True)
        folder = Path(shutil.copytree(seeds[seed], root / "run" / "adapter"))
        if not (folder / name).is_file():
            name = CONFIG_NAME
        (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
        base = bases.pop(seed, None) or SEEDS[seed][1]()
        if outcome(folder, base) is None:
            ends[LOADS] += 1
        else:
            ends[REFUSED] += 1
            bases[seed] = base  # as it was
        with contextlib.suppress(AdapterFileError):
            str(inspect_adapter(folder))

    one()
    return ends


def test_a_few_changes_of_bytes(seeds: dict[str, Path], tmp_path: Path) -> None:
    ends = fuzz(seeds, tmp_path, 60)
    assert min(ends.values()) > 0


@pytest.mark.slow
def test_many_changes_of_bytes(seeds: dict[str, Path], tmp_path: Path) -> None:
    ends = fuzz(seeds, tmp_path, 4000)
    print(ends)
    assert min(ends.values()) > 100


# Links of the Hub's cache --------------------------------------------------------------------------------------------


def cached(source: Path, root: Path) -> tuple[Path, Path]:
    """(snapshot, blobs) of a repository in the layout of the Hub's cache."""
    repository = root / "models--user--adapter"
    snapshot_folder, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot_folder / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot_folder, blobs


def test_links_of_the_hubs_cache(seeds: dict[str, Path], tmp_path: Path) -> None:
    folder, blobs = cached(seeds["ours"], tmp_path)
    expected = read_adapter(seeds["ours"]).tensors
    assert_same_tensors(read_adapter(folder).tensors, expected)
    (folder / "sub").mkdir()
    for link in [link for link in folder.iterdir() if link.is_symlink()]:
        (folder / "sub" / link.name).symlink_to(Path("../../../blobs") / link.readlink().name)
    assert_same_tensors(read_adapter(folder / "sub").tensors, expected)
    (tmp_path / "linked").symlink_to(folder)  # a user's own link to the folder
    assert_same_tensors(read_adapter(tmp_path / "linked").tensors, expected)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFileError, match="link that points outside"):
        read_adapter(folder)


def test_a_blob_that_is_a_link(seeds: dict[str, Path], tmp_path: Path) -> None:
    folder, blobs = cached(seeds["ours"], tmp_path)
    for blob in blobs.iterdir():
        blob.unlink()
        blob.symlink_to("/etc/passwd")
    with pytest.raises(AdapterFileError, match="link that points outside"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"])
def test_a_name_is_no_way(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFileError, match="is not the name of a file"):
        own_file(tmp_path, name)


# The base that an adapter names --------------------------------------------------------------------------------------


def with_code(folder: Path, ran: Path) -> Path:
    """A base with code of its own."""
    tiny_llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'strange'\nclass Model(LlamaForCausalLM):\n"
        "    config_class = Config\n"
    )
    return folder


def test_code_of_a_base_runs_where_the_caller_says_so_alone(
    seeds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    base = with_code(tmp_path / "base", ran)
    folder = Path(shutil.copytree(seeds["ours"], tmp_path / "adapter"))
    (folder / EXTRAS_NAME).unlink()
    config = json.loads((folder / CONFIG_NAME).read_text())
    config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        LoraModel.from_pretrained(folder)
    assert not ran.exists()
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"trust_remote_code": True}))
    with pytest.raises(AdapterFileError, match="trust_remote_code=True is not supported"):
        LoraModel.from_pretrained(folder)
    assert not ran.exists()
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    model = LoraModel.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()
    assert type(model).__name__ == "Model"


@pytest.mark.parametrize("name", ["../../../etc", "/etc/passwd", "nobody/nothing", "~", "x" * 300, "a b c", "{}"])
def test_a_strange_base_is_refused_before_anything_is_opened(
    seeds: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(seeds["ours"], tmp_path / "adapter"))
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"base_model_name_or_path": name}))
    with pytest.raises(AdapterFileError, match="base_model="):
        LoraModel.from_pretrained(folder)


def test_the_documented_bounds_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    counts = (claims.MAX_RANK, claims.MAX_PATTERNS, claims.MAX_EXPRESSIONS, claims.MAX_LABELS, safety.MAX_JSON_VALUES)
    assert all(f"{count:,}" in page for count in counts)
    assert (
        f"{safety.MAX_JSON_BYTES >> 20} MiB, {safety.MAX_JSON_VALUES:,} values, {safety.MAX_JSON_DEPTH} levels" in page
    )
    assert f"{headers.MAX_HEADER_BYTES >> 20} MiB |" in page
    assert f"{headers.MAX_NAME} characters" in page


# Memory --------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from helpers import tiny_llama
from hf_lora import AdapterFileError, LoraModel

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
LoraModel.from_pretrained(sys.argv[2], base_model=tiny_llama())  # what is imported on the way is there
for folder in sys.argv[2:]:
    child = os.fork()  # so that none finds the memory that an earlier one has given back
    if child:
        os.waitpid(child, 0)
        continue
    base, said = tiny_llama(), "loaded"
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    try:
        LoraModel.from_pretrained(folder, base_model=base)
    except AdapterFileError as error:
        said = str(error)
    print(json.dumps([folder, peak() - before, said[:200]]), flush=True)
    os._exit(0)
"""


def measured(folders: list[Path]) -> dict[str, tuple[int, str]]:
    """Folder name -> (bytes that loading it took at most, what it said), in a process of their own."""
    paths = json.dumps([str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", MEASURE, paths, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {Path(folder).name: (peak, said) for folder, peak, said in rows}


def _wide(folder: Path, dtype: torch.dtype) -> None:
    """64 MB of factors that do not fit the base."""
    from safetensors.torch import save_file

    held = load_file(folder / WEIGHTS_NAME)
    each = 2**26 // len(held) // dtype.itemsize // 64
    save_file({key: torch.ones(each, 64, dtype=dtype) for key in held}, folder / WEIGHTS_NAME)


def _json(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | values, separators=(",", ":")))

    return change


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_memory_is_bounded_by_twice_the_files(seeds: dict[str, Path], tmp_path: Path) -> None:
    """And 64 MB, which are for JSON: its values take more than its bytes, and both have bounds of their own."""
    changes: dict[str, Callable[[Path], Any]] = {
        "good": lambda folder: None,
        "wide": lambda folder: _wide(folder, torch.float32),
        "wide in 16 bits": lambda folder: _wide(folder, torch.bfloat16),
        "sparse": lambda folder: sparse(folder, 2**32, 2**20),
        "rank": _json(r=2**20),
        "ranks": _json(rank_pattern={"q_proj": 2**20}),
        "texts": _json(target_modules=[f"{i:012d}" for i in range(200_000)]),
        "characters": _json(x="a" * (2**22 - 5000) + "\U0001f600"),
        "objects": _json(x=[{"a": 1}] * 100_000),
        "rows": _json(rank_pattern={f"m{i}": 1 for i in range(19_000)}),
        "tensors": MUTATIONS["weights: 20000 tensors more"].change,
        "header": MUTATIONS["weights: header too large"].change,
        "labels": MUTATIONS["extras: labels that the head has not"].change,
    }
    folders = []
    for name, change in changes.items():
        folder = Path(shutil.copytree(seeds["ours"], tmp_path / name))
        change(folder)
        folders.append(folder)
    found = measured(folders)
    assert found.keys() == changes.keys()
    assert found["good"][1] == "loaded"
    sizes = {f.name: SimpleNamespace(size=sum(p.stat().st_blocks * 512 for p in f.iterdir())) for f in folders}
    table = {name: (peak >> 10, sizes[name].size >> 10, said[:60]) for name, (peak, said) in found.items()}
    print(json.dumps(table, indent=1))
    allowed = 64 * 2**20
    assert all(peak <= 2 * sizes[name].size + allowed for name, (peak, _) in found.items()), table
