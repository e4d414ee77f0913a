"""A verb that is cut off at any moment leaves the model as it was, or finished."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import VOCABULARY, Cut, Moments, assert_near, batch_for, randomize, tiny_bert, tiny_llama
from quantized_bases import bits, load, save_base

from hf_lora import LoraConfig, LoraModel, StateError, apply_lora, check_adapter, share_inputs
from hf_lora.adapt.merge import merge
from hf_lora.adapt.state import running_task, state_of
from hf_lora.adapt.walk import configs_of
from hf_lora.layers.base import LoraLayer
from hf_lora.layers.hosts import Activity
from hf_lora.layers.storages import DenseStorage, put_rows


def outputs(model: Any) -> list[torch.Tensor]:
    was = [m for m in model.modules() if m.training]
    for module in was:
        module.training = False
    with torch.no_grad():
        y = model(input_ids=torch.arange(8).view(2, 4))
    for module in was:
        module.training = True
    return [t for t in y.values() if isinstance(t, torch.Tensor)]


def plain(value: Any) -> Any:
    """Plain data as something that can be compared."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) or isinstance(value, Activity):
        return {k: plain(v) for k, v in vars(value).items() if k != "acting"}
    return value if isinstance(value, (str, int, float, bool, torch.dtype, type(None))) else type(value).__name__


def difference(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where plain data differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key, value in one.items():
            yield from difference(value, other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from difference(a, b, f"{place}.{i}")
    elif one != other:
        yield f"{place}: {str(one)[:200]} != {str(other)[:200]}"


class Description(NamedTuple):
    modules: dict[str, Any]
    parameters: dict[str, Any]
    configs: list[Any]
    state: Any
    objects: list[int]
    """The identity of modules and parameters, which tells a restored model from one that was built again."""
    values: dict[str, torch.Tensor]

    def differs(self, other: Description, objects: bool = True) -> list[object]:
        """What is not the same."""
        found: list[object] = list(difference(self[:4], other[:4]))
        if objects and self.objects != other.objects:
            found.append("objects")
        values = {name: other.values.get(name) for name in self.values}
        return found + [n for n, t in self.values.items() if values[n] is None or not torch.equal(t, values[n])]


def described(model: Any) -> Description:
    state = state_of(model)
    if state is not None:  # while a head runs, its labels are those in the config
        running_task(state).take_from(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    modules = dict(model.named_modules())
    kinds = {
        name: (type(m), type(m).__mro__[1:3], list(vars(m)), m.training, [*m._forward_hooks, *m._forward_pre_hooks])
        for name, m in modules.items()
    }
    layers = {n: plain(vars(m._lora) | {"activity": None}) for n, m in modules.items() if isinstance(m, LoraLayer)}
    values = {n: p.detach().clone() for n, p in (parameters | dict(model.named_buffers())).items()}
    values |= {f"output {i}": t for i, t in enumerate(outputs(model))}
    return Description(
        kinds,
        {n: (ties[n], p.requires_grad, p.dtype, p.grad is None) for n, p in parameters.items()},
        [plain(vars(config)) for config in configs_of(model)],
        [plain(state), layers],
        [*map(id, modules.values()), *map(id, parameters.values())],
        values,
    )


# Situations ----------------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
CONFIG = LoraConfig(r=2, target_modules=["query", "dense", "word_embeddings"], bias="lora_only")
OTHER = LoraConfig(r=1, target_modules=["query", "key"])
TIED = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])


def classifier() -> Any:
    model = tiny_bert(labels=2, **SMALL)
    model.bert.pooler.requires_grad_(False)
    return model


def adapted() -> Any:
    model = apply_lora(classifier(), CONFIG, "first")
    model.add_adapter("second", OTHER, num_labels=3)
    model.set_adapter("first")
    randomize(model)
    model(**batch_for(model)).loss.backward()
    return model


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def switched_off() -> Any:
    model = merged()
    model.disable_adapters()
    return model


def tied(whole: bool = False) -> Any:
    model = tiny_llama(tied=True, layers=1, hidden_size=8, intermediate_size=8)
    config = dataclasses.replace(TIED, target_modules=["q_proj"], modules_to_save=["lm_head"]) if whole else TIED
    return randomize(apply_lora(model, config))


def untied() -> Any:
    model = tied()
    model.merge_adapter(untie=True)
    return model


def within(model: Any) -> None:
    with model.disable_adapter():
        pass


def backbone() -> Any:
    return tiny_bert(cls="BertModel", **SMALL)


FOLDER = Path("set by a fixture")
WITH_HEAD = LoraConfig(r=1, target_modules=["query"], task_type="SEQ_CLS")
Make = Callable[[], Any]
VERBS: dict[str, tuple[Make, Callable[[Any], object]]] = {
    "apply": (classifier, lambda m: apply_lora(m, CONFIG)),
    "apply with labels": (classifier, lambda m: apply_lora(m, CONFIG, num_labels=5)),
    "apply with a new head": (backbone, lambda m: apply_lora(m, WITH_HEAD, num_labels=5)),
    "add": (adapted, lambda m: m.add_adapter("third", CONFIG, num_labels=4)),
    "load": (adapted, lambda m: m.load_adapter(FOLDER / "second", "third")),
    "load weights": (adapted, lambda m: m.load_adapter_weights(FOLDER)),
    "set": (adapted, lambda m: m.set_adapter("second")),
    "set none": (adapted, lambda m: m.set_adapter([])),
    "disable": (adapted, lambda m: m.disable_adapters()),
    "disable within": (adapted, within),
    "delete": (adapted, lambda m: m.delete_adapter("first")),
    "delete all": (adapted, lambda m: m.delete_adapter(["first", "second"])),
    "merge": (adapted, lambda m: m.merge_adapter()),
    "merge another": (adapted, lambda m: m.merge_adapter("second")),
    "merge and untie": (tied, lambda m: m.merge_adapter(untie=True)),
    "merge and unload": (adapted, lambda m: m.merge_and_unload("second")),
    "merge, untie and unload": (tied, lambda m: m.merge_and_unload(untie=True)),
    "merge a tied head and unload": (lambda: tied(whole=True), lambda m: m.merge_and_unload()),
    "unmerge": (merged, lambda m: m.unmerge_adapter()),
    "unmerge what is disabled": (switched_off, lambda m: m.unmerge_adapter()),
    "unmerge and tie": (untied, lambda m: m.unmerge_adapter()),
    "unload": (adapted, lambda m: m.unload()),
    "unload what is merged": (merged, lambda m: m.unload()),
    "unload what is untied": (untied, lambda m: m.unload()),
    "unload and keep merged": (merged, lambda m: m.merge_and_unload()),
    "disable what is merged": (merged, lambda m: m.disable_adapters()),
    "disable within what is merged": (merged, within),
    "enable what is merged": (switched_off, lambda m: m.enable_adapters()),
    "resize": (tied, lambda m: m.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)),
    "resize a whole head": (
        lambda: tied(whole=True), lambda m: m.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)),
    "load onto a model": (classifier, lambda m: LoraModel.from_pretrained(FOLDER, base_model=m)),
    "load and merge": (classifier, lambda m: LoraModel.from_pretrained(FOLDER, base_model=m, merge=True)),
    "load several and merge": (
        classifier,
        lambda m: LoraModel.from_pretrained([FOLDER / "scaled"] * 2, base_model=m, merge=True, weights=[0.5, 2.0]),
    ),
    "check": (adapted, lambda m: check_adapter(m, batch_for(m))),
    "share inputs": (adapted, lambda m: share_inputs(m, **batch_for(m))),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("adapters")
    model = randomize(adapted(), seed=9)
    model.save_pretrained(FOLDER, adapter_name="first")
    model.save_pretrained(FOLDER / "second", adapter_name="second")
    scaled = LoraConfig(r=1, target_modules=["query"], modules_to_save=[])
    randomize(apply_lora(classifier(), scaled)).save_pretrained(FOLDER / "scaled")


def law(verb: str, moments: int, error: type[BaseException] = Cut) -> None:
    make, call = VERBS[verb]
    start = make()
    finished = copy.deepcopy(start)
    torch.manual_seed(1)
    call(copy.deepcopy(finished))  # what is done once per process
    torch.manual_seed(1)
    with Moments() as all_of_them:
        call(finished)
    after, count = described(finished), all_of_them.count
    choose = random.Random(verb)
    for at in sorted(choose.sample(range(count), min(count, moments))):
        model = copy.deepcopy(start)
        before = described(model)
        torch.manual_seed(1)
        with pytest.raises(error) as cut, Moments(at, error):
            call(model)
        now = described(model)
        if now.differs(before) and now.differs(after, objects=False):
            was, is_now = now.differs(before)[:5], now.differs(after, objects=False)[:5]
            pytest.fail(f"moment {at} of {count} {cut.value}: not as before {was}, and not finished {is_now}")


@pytest.mark.parametrize("verb", VERBS)
def test_all_or_nothing(verb: str) -> None:
    law(verb, 3)


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_permanent_merge_that_cannot_be_completed_ends_the_model(
    written: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory that stays short after some weights were merged: nothing may go on with half a merge."""
    model, left = adapted(), [written]
    before = described(model)

    def write(storage: Any, layer: Any, rows: slice, block: torch.Tensor) -> None:
        if not left[0]:
            raise MemoryError("not enough")
        left[0] -= 1
        put_rows(layer.weight.detach(), rows, block)

    monkeypatch.setattr(DenseStorage, "write", write)
    with pytest.raises(MemoryError):
        model.merge_and_unload()
    verbs: list[Callable[[], object]] = [
        lambda: outputs(model), model.unload, model.merge_and_unload, lambda: model.save_pretrained(tmp_path),
        lambda: model.set_adapter("second"), lambda: model.add_adapter("third", OTHER), model.disable_adapters,
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(StateError, match=r"neither completed nor undone \(not enough\)\. Load the base again"):
            verb()
    assert not list(tmp_path.iterdir())
    assert before.state != plain(state_of(model))


def test_what_was_merged_without_keeping_the_originals_is_not_unmerged() -> None:
    model = adapted()
    y = outputs(model)
    merge(model, keep=False)
    for verb in (model.unmerge_adapter, model.unload, model.disable_adapters):
        with pytest.raises(StateError, match="without keeping the original weights"):
            verb()
    plain_model = model.merge_and_unload()
    assert not isinstance(plain_model, LoraModel)
    for found, expected in zip(outputs(plain_model), y, strict=True):
        assert_near(found, expected, torch.float32, 64)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Cut, MemoryError])
@pytest.mark.parametrize("verb", VERBS)
def test_all_or_nothing_at_many_moments(verb: str, error: type[BaseException]) -> None:
    law(verb, 100, error)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_quantized_model_is_merged_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    start = load(save_base(tmp_path, layers=1), kind)
    randomize(apply_lora(start, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "down_proj"])))
    finished = copy.deepcopy(start)
    with Moments() as moments:
        finished.merge_and_unload()
    ids = torch.arange(8).view(2, 4)
    outcomes = set()
    for at in (moments.count * i // 7 for i in range(1, 7)):
        model = copy.deepcopy(start)
        before, y = bits(model), model(ids).logits
        with pytest.raises(Cut), Moments(at):
            model.merge_and_unload()
        done = not isinstance(model, LoraModel)
        outcomes.add(done)
        now, wanted = bits(model), bits(finished) if done else before
        assert now.keys() == wanted.keys(), at
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in now.items()), at
        assert torch.equal(model(ids).logits, finished(ids).logits if done else y), at
        assert hasattr(model.config, "quantization_config") != done
        assert {n: type(m) for n, m in model.named_modules()} == {
            n: type(m) for n, m in (finished if done else start).named_modules()
        }
    assert outcomes == {True, False}
