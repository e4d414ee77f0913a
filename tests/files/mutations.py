"""Adapter folders to spoil, and named ways to spoil them: what a hostile or broken repository may hold."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import randomize, tiny_bert, tiny_llama
from spoiled_weights import EITHER, LOADS, MARK, REFUSED, Mutation, of_weights, text

from hf_lora import LoraConfig, apply_lora
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from hf_lora.safe_io.atomic import JOURNAL_NAME
from hf_lora.safe_io.reading import MAX_JSON_BYTES

JSON_FILES = (CONFIG_NAME, EXTRAS_NAME)


# Seeds: an adapter's folder and the base that it fits ----------------------------------------------------------------


def _ours(folder: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    randomize(model).save_pretrained(folder)


def _peft(folder: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=5, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 7},
    )  # fmt: skip
    model = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def _head(folder: Path) -> None:
    model = apply_lora(tiny_bert(labels=5), LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    randomize(model).save_pretrained(folder)


def _rows(folder: Path) -> None:
    base = tiny_llama(tied=True)
    base.resize_token_embeddings(70, mean_resizing=False)
    model = apply_lora(base, LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    randomize(model).save_pretrained(folder)


SEEDS: dict[str, tuple[Callable[[Path], None], Callable[[], Any]]] = {
    "ours": (_ours, tiny_llama),
    "peft": (_peft, tiny_llama),
    "head": (_head, tiny_bert),
    "rows": (_rows, lambda: tiny_llama(tied=True)),
}
"""Name -> (what writes the folder, what makes its base)."""


# JSON ----------------------------------------------------------------------------------------------------------------


def fields(name: str, **values: Any) -> Callable[[Path], Any]:
    """Set fields of a JSON file."""

    def change(folder: Path) -> Any:
        file = folder / name
        if not file.is_file():
            return False
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def base_field(**values: Any) -> Callable[[Path], Any]:
    """Set fields of the base's identity."""

    def change(folder: Path) -> Any:
        file = folder / EXTRAS_NAME
        if not file.is_file():
            return False
        extras = json.loads(file.read_text())
        file.write_text(json.dumps(extras | {"base": extras["base"] | values}))

    return change


def _first_field(raw: bytes, field: bytes) -> bytes:
    """JSON with another field, as it stands, in front."""
    return raw.replace(b"{", b"{" + field + b", ", 1)


def _of_json() -> dict[str, Mutation]:
    found: dict[str, Mutation] = {}
    whole = {
        "empty": b"", "null": b"null", "list": b"[]", "number": b"3", "string": b'"x"', "open": b"{",
        "latin-1": '{"r": "é"}'.encode("latin-1"), "utf-16": '{"r": 8}'.encode("utf-16"), "nul": b"\0" * 64,
        "deep lists": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep objects": b'{"x": ' * 100_000 + b"1" + b"}" * 100_000,
        "many values": b'{"x": [' + b"0," * 400_000 + b"0]}",
        "many objects": b'{"x": [' + b"{}," * 400_000 + b"{}]}",
        "one open string": b'{"' + b'\\"' * 1_000_000,
        "a pickle": pickle.dumps({"r": 8}),
        "a script": b"import os\nos.mkdir('pwned')\n",
    }  # fmt: skip
    front = {
        "twice": b'"x": 1, "x": 2', "NaN": b'"x": NaN', "infinity": b'"x": Infinity', "-infinity": b'"x": -Infinity',
        "overflow": b'"x": 1e999', "5000 digits": b'"x": ' + b"9" * 5000, "half a character": b'"x": "\\ud800"',
        "comment": b"/* x */", "single quotes": b"'x': 1",
    }  # fmt: skip
    for name in JSON_FILES:
        short = name.split("_")[0].removesuffix(".json")
        for what, raw in whole.items():
            found[f"{short}: {what}"] = Mutation(text(name, lambda _, raw=raw: raw))
        for what, raw in front.items():
            found[f"{short}: {what}"] = Mutation(text(name, lambda old, raw=raw: _first_field(old, raw)))
        found[f"{short}: too large"] = Mutation(text(name, lambda old: old + b" " * MAX_JSON_BYTES))
        found[f"{short}: a mark before it"] = Mutation(text(name, lambda old: b"\xef\xbb\xbf" + old))
        found[f"{short}: more after it"] = Mutation(text(name, lambda old: old + b"{}"))
        found[f"{short}: spaces after it"] = Mutation(text(name, lambda old: old + b" " * 1000), LOADS)
        found[f"{short}: escaped names"] = Mutation(
            text(name, lambda old: old.replace(b'"bias"', b'"\\u0062ias"').replace(b'"base"', b'"\\u0062ase"')), LOADS
        )
    return found


BOMB = r"(((.*)*)*)*x"
BAD_VALUES: dict[str, list[Any]] = {
    "r": ["8", 0, -1, 1.5, True, None, [], {}, 2**21, 2**62, 10**400, 7],
    "lora_alpha": ["16", [], True, 1e300, 10**400, -(10**400)],
    "lora_dropout": [1, -0.1, "0", [], None, 10**400],
    "target_modules": [[], 5, {}, [1], [None], "(", "(" * 5000, BOMB, r"(a+)+(b|c)\1", "a{99999999999}",
                       ".*" * 300, "x" * 100_000, "no_such_module", ["../q_proj"], ["no_such_module"]],
    "exclude_modules": [5, [1], "(", r"(.*)*(b|c)*\1", "q" * 100_000],
    "rank_pattern": [[1], "x", 5, {"q": 0}, {"q": "3"}, {"q": 2**40}, {"q": None}, {"q": 10**400}, {"(": 2},
                     {"(?i)q_proj": 2}, {"a{99999999999}": 1}, {"(?:^){4294967294}": 1}, {"a)|(b": 1},
                     {f"m{i}": 1 for i in range(30_000)}, {f"m{i}.*": 1 for i in range(1000)}, {".*": 2**20}],
    "alpha_pattern": [[1], {"q": "3"}, {"q": 10**400}, {"(": 2}, {"(?x)q": 2}],
    "bias": ["some", 3, None, ["none"]],
    "modules_to_save": [3, [3], "x", {"x": 1}],
    "layers_to_transform": ["1", [1.5], 10**400, {}, [None], [999_999]],
    "init_lora_weights": ["pissa_niter_4", "pissa_fast", {}, 3, "os.system"],
    "task_type": [3, "NOPE", ["CAUSAL_LM"], {}],
    "base_model_name_or_path": [5, [], "a\0b", "https://example.org/x", "\\\\host\\share", "//host/share",
                                "x" * 10_000],
    "revision": [5, "../../x", "-x", "a\nb", "/etc"],
    "peft_type": ["IA3", 5, ["LORA"], None],
    "use_rslora": ["yes", 1, []],
    "fan_in_fan_out": ["yes", 3],
    "use_dora": ["yes", 1],
    "use_qalora": [True],
    "trust_remote_code": [True],
    "layer_replication": [[[0, 1]]],
    "megatron_config": [{"import": MARK}],
    "custom_module": [MARK],
    "trainable_token_indices": [[1, 2], [-1], [10**400], "x", {"x": 3}],
}  # fmt: skip
GOOD_VALUES: dict[str, list[Any]] = {
    "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}, 5, [MARK],
                     {"base_model_class": MARK, "parent_library": MARK}],
    "runtime_config": [{"ephemeral_gpu_offload": True}, 5],
    "inference_mode": [False, "x"],
    "target_modules": [None],
    "eva_config": [{"module": MARK}],
    "loftq_config": [{"loftq_bits": 4}],
    "peft_version": ["9.9.9", 5],
    "trust_remote_code": [False],
    "lora_dropout": [0.5],
    "lora_alpha": [1, 0.5, None, 0, -2],
    "alpha_pattern": [{"q": 0}, {"q": -1}],
    "revision": [None, "main", "refs/pr/1"],
    "base_model_name_or_path": ["../../../etc", "/etc/passwd", "nobody/nothing", None],
    "exclude_modules": [BOMB, r"(a+)+$"],
    "rank_pattern": [{"no_such_module": 3}, {BOMB: 3}, {r"(.*)*(a|b)\1": 3}, {"(a|a|.)*(.|b)*$": 4}],
}  # fmt: skip
BAD_EXTRAS: dict[str, list[Any]] = {
    "base": [5, [], "x"],
    "architecture": [5, [], {}, "", "a\nb"],
    "num_labels": ["3", -1, True, [], 10**30],
    "id2label": [["a"], "a", {"x": "y"}, {"0": []}, {"0": "a", "00": "b"}, {"0": {}}, {"9" * 5000: "a"},
                 {str(i): "a" for i in range(120_000)}],
    "problem_type": [5, "os.system", []],
    "vocabulary": [-1, "x", 10**30, True, []],
    "joined": [5, ["a"], {"a": "b"}, {"a": []}, {"a": [5]}, {"a": ["b"] * 101}, {str(i): ["b"] for i in range(101)}],
    "training_format": [5, [], "pair", {"kind": "os.system"}, {"kind": []}, {"text_column": "a"},
                        *({"kind": "pair", name: value} for name, value in (
                            ("text_column", 5), ("completion_column", "a\nb"), ("pair_column", ""),
                            ("label_column", "x" * 5000), ("use_chat_template", "yes"), ("last_turn_only", 1),
                            ("separator", "\x1b[2J"), ("separator", 3), ("system", "x" * 20_000), ("system", []),
                            ("max_length", 0), ("max_length", -1), ("max_length", True), ("max_length", "64"),
                            ("variables", {"tokenize": False}), ("variables", {"chat_template": "x"}),
                            ("variables", {"a b": 1}), ("variables", {"a": []}), ("variables", ["a"]),
                            ("variables", {"a": "\x1b[2J"})))],
}  # fmt: skip
BAD_BASES: dict[str, list[Any]] = {
    "weights": [5, [], {"x": "!!"}, {"x": 5}, {"x": "AA=="}, {"x": ""}, {"x": "A" * 100_000}],
    "vectors": [5, {"x": "!!"}, {"x": "A" * 100_000}],
    "commit": [5, "../../x", "a b"],
    "files": [5, []],
    "name": [5, "a\x1b[2Jb"],
    "model_type": [5, [], "\x1b[2J", "t5"],
}


def _of_fields() -> dict[str, Mutation]:
    found: dict[str, Mutation] = {}
    for values, make, where, ends in (
        (BAD_VALUES, lambda k, v: fields(CONFIG_NAME, **{k: v}), "config", REFUSED),
        (GOOD_VALUES, lambda k, v: fields(CONFIG_NAME, **{k: v}), "config", EITHER),
        (BAD_EXTRAS, lambda k, v: fields(EXTRAS_NAME, **{k: v}), "extras", REFUSED),
        (BAD_BASES, lambda k, v: base_field(**{k: v}), "base", REFUSED),
    ):
        for field, options in values.items():
            for i, value in enumerate(options):
                found[f"{where}: {field} {'!' if ends == REFUSED else '?'}{i}"] = Mutation(make(field, value), ends)
    found["config: layers_pattern"] = Mutation(fields(CONFIG_NAME, layers_to_transform=[0], layers_pattern="("))
    found["config: layers_pattern of numbers"] = Mutation(
        fields(CONFIG_NAME, layers_to_transform=[0], layers_pattern=[5])
    )
    found["config: base_model_name_or_path empty"] = Mutation(fields(CONFIG_NAME, base_model_name_or_path=""), LOADS)
    found["config: peft_type ?0"] = Mutation(fields(CONFIG_NAME, peft_type="lora"), LOADS)
    found["config: auto_mapping ?0"] = Mutation(
        fields(CONFIG_NAME, auto_mapping={"base_model_class": "system", "parent_library": "os"}), LOADS
    )
    for name in ("os.system", "Trainer", "AutoModel", "pipeline", MARK):
        found[f"extras: architecture {name}"] = Mutation(fields(EXTRAS_NAME, architecture=name), LOADS)
    found["extras: a vocabulary of 2^39 rows"] = Mutation(fields(EXTRAS_NAME, vocabulary=2**39), EITHER)
    found["extras: labels that the head has not"] = Mutation(
        fields(EXTRAS_NAME, id2label={str(i): f"label {i}" for i in range(90_000)}), EITHER
    )
    return found


# Links and files beside ----------------------------------------------------------------------------------------------


def outside(folder: Path) -> Path:
    """A folder beside the adapter's, which none of its names may lead to."""
    place = folder.parent / "outside"
    place.mkdir(exist_ok=True)
    return place


def _out(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> Any:
        if not (folder / name).is_file():
            return False
        target = (folder / name).rename(outside(folder) / name)
        (folder / name).symlink_to(target)

    return change


def _to(name: str, target: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _inside(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / WEIGHTS_NAME).rename(folder / "parts" / "x")
    (folder / WEIGHTS_NAME).symlink_to("parts/x")


def _made(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def _journal(raw: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / JOURNAL_NAME).write_bytes(raw)


def _beside(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


class Attack:
    """Runs a command where a pickle of it is loaded without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def _of_folders() -> dict[str, Mutation]:
    found = {}
    for name in (CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME):
        short = name.split("_")[-1].split(".")[0]
        found[f"link: {short} out of the folder"] = Mutation(_out(name))
        for what, target in {
            "to a device": "/dev/zero", "to passwords": "/etc/passwd", "to nothing": "no/such/file", "to itself": name,
            "to the parent": "..", "to the folder": ".", "upwards": f"../outside/../../{name}",
        }.items():  # fmt: skip
            found[f"link: {short} {what}"] = Mutation(_to(name, target))
        found[f"place: {short} a pipe"] = Mutation(_made(name, os.mkfifo))
        found[f"place: {short} a folder"] = Mutation(_made(name, Path.mkdir))
    found["link: within the folder"] = Mutation(_inside, LOADS)
    journals = {
        "list": b"[]", "deep": b"[" * 100_000, "binary": b"\xff\xfe", "upwards": b'{"../x": ".x.1.tmp"}',
        "from outside": b'{"adapter_config.json": "../outside/x.tmp"}', "the folder": b'{"..": ".x.1.tmp"}',
        "a number": b'{"x": 5}', "a NUL": b'{"x\\u0000": ".x.1.tmp"}', "another file": b'{"x": "adapter_config.json"}',
    }  # fmt: skip
    found |= {f"journal: {what}": Mutation(_journal(raw)) for what, raw in journals.items()}
    found["journal: to a device"] = Mutation(_to(JOURNAL_NAME, "/dev/zero"))
    ignored = {
        LEGACY_WEIGHTS_NAME: pickle.dumps(Attack()), "pytorch_model.bin": pickle.dumps(Attack()),
        "adapter_model.safetensors.index.json": b'{"weight_map": {"x": "../outside/x.safetensors"}}',
        "modeling_x.py": b"raise SystemExit", "setup.py": b"raise SystemExit", f"{MARK}.py": b"raise SystemExit",
        "adapter_model.safetensors.tmp": b"x", ".adapter_model.safetensors.x.tmp": b"x",
    }  # fmt: skip
    found |= {f"beside: {name}": Mutation(_beside(name, raw), LOADS) for name, raw in ignored.items()}
    return found


MUTATIONS: dict[str, Mutation] = {**_of_json(), **_of_fields(), **of_weights(), **_of_folders()}
