"""aLoRA acts from its invocation tokens on: as PEFT's, in training, generation and batches, with any cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import adapter_gradients, randomize, relative_error, snapshot, tiny_bert, tiny_llama
from tiny import tiny_t5
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lora import ConfigError, LoraConfig, LoraError, LoraModel, StateError, TargetError, apply_lora, merge_files
from hf_lora.layers.calls import carried

EPS = torch.finfo(torch.float32).eps
INVOCATION = [7, 8]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]
IDS = torch.tensor(
    [
        [11, 12, 7, 8, 13, 14, 15, 16],
        [11, 7, 8, 12, 13, 7, 8, 16],  # the last occurrence counts
        [11, 12, 13, 14, 15, 16, 17, 18],  # the base alone
        [7, 8, 12, 13, 7, 15, 8, 7],
    ]
)
START = [2, 5, 8, 0]


def settings(**more: Any) -> LoraConfig:
    values = dict(r=4, lora_alpha=6, target_modules=TARGETS, alora_invocation_tokens=INVOCATION)
    return LoraConfig(**values | more)  # type: ignore[arg-type]


def adapted(**more: Any) -> Any:
    model = apply_lora(tiny_llama(), settings(**more))
    return randomize(model).eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alora")
    adapted().save_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()


def with_mask(model: Any, ids: Tensor, start: list[int]) -> Tensor:
    """The logits of a model of plain modules whose adapted layers add their update from `start` on."""
    plain, mask = tiny_llama(), torch.arange(ids.shape[1]) >= torch.tensor(start)[:, None]
    for path, layer in model.named_modules():
        if hasattr(layer, "_lora"):
            a, b = (layer.factor(kind, "default").detach() for kind in ("lora_A", "lora_B"))

            def add(_: nn.Module, given: Any, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return y + 1.5 * mask[..., None] * (given[0] @ a.t() @ b.t())

            plain.get_submodule(path).register_forward_hook(add)
    with torch.no_grad():
        found: Tensor = plain(ids).logits
    return found


def test_outputs_and_gradients_are_pefts(theirs: Any, tmp_path: Path) -> None:
    model = adapted()
    expected = with_mask(model, IDS, START)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, expected) < 32 * EPS
        assert torch.equal(model(input_ids=IDS.int()).logits, model(IDS).logits)
        assert torch.equal(model(IDS).logits[2], tiny_llama()(IDS).logits[2])
        assert relative_error(theirs(input_ids=IDS).logits, expected) < 32 * EPS
    theirs.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    model.train()(IDS, labels=IDS).loss.backward()
    read.train()(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {n.removeprefix("base_model.model."): p.grad for n, p in read.named_parameters() if p.grad is not None}
    found = adapter_gradients(model)
    assert found.keys() == wanted.keys()
    assert all(relative_error(found[n], grad) < 64 * EPS for n, grad in wanted.items())


def test_files_go_both_ways(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    model = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert model.lora_configs["default"].method == "alora"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, adapted()(IDS).logits)
    config: Any = peft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=INVOCATION)
    read = LoraConfig.from_any(config)
    assert (read.method, read.alora_invocation_tokens) == ("alora", INVOCATION)
    assert LoraConfig.from_dict(settings().to_dict()) == settings()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without_and_pefts(beams: int, theirs: Any) -> None:
    model = adapted()
    ids = torch.tensor([[0, 0, 11, 12, 7, 8], [11, 7, 8, 12, 13, 14], [0, 11, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    options: Any = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    if beams == 1:
        assert torch.equal(found, theirs.generate(input_ids=ids, **options))
        assert not torch.equal(found, tiny_llama().generate(ids, **options))
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **options), tiny_llama().generate(ids, **options))


@pytest.mark.parametrize("pieces", [[8], [4, 1, 3], [6, 2], [4, 1, 1, 1, 1]])
def test_a_row_in_pieces_is_the_row(pieces: list[int]) -> None:
    model, ids = adapted(), IDS[[0, 2, 3]]
    with torch.no_grad():
        cache, found = None, []
        for piece in ids.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = copy.deepcopy(output.past_key_values)  # the progress is the cache's
            found.append(output.logits)
        assert relative_error(torch.cat(found, 1), model(ids).logits) < 64 * EPS


def test_an_invocation_across_two_pieces_is_found() -> None:
    """Its first token was the base's by then."""
    model = adapted()
    with torch.no_grad():
        cache = model(IDS[:1, :3], use_cache=True).past_key_values
        found = model(IDS[:1, 3:], past_key_values=cache).logits
        base = tiny_llama()
        expected = base(IDS[:1]).logits[:, 3:]
        assert relative_error(found, expected) > 0.01
        cache = base(IDS[:1, :3], use_cache=True).past_key_values
        always = apply_lora(tiny_llama(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)).eval()
        always.load_state_dict(model.state_dict())
        assert relative_error(found, always(IDS[:1, 3:], past_key_values=cache).logits) < 64 * EPS


def test_a_cache_of_the_base_serves_the_adapter() -> None:
    """What comes before the invocation is the base's."""
    model = adapted()
    with torch.no_grad():
        expected = model(IDS[:1]).logits[:, 2:]
        for base in (tiny_llama(), model):
            with model.disable_adapter():
                cache = base(IDS[:1, :2], use_cache=True).past_key_values
            found = model(IDS[:1, 2:], past_key_values=cache).logits
            assert relative_error(found, expected) < 64 * EPS


def test_a_cache_for_other_rows_is_refused_and_repeated_rows_are_known() -> None:
    model = adapted()
    with torch.no_grad():
        cache = model(IDS[:2, :6], use_cache=True).past_key_values
        several = copy.deepcopy(cache)
        several.batch_repeat_interleave(2)
        rows = IDS[:2].repeat_interleave(2, 0)
        found = model(rows[:, 6:], past_key_values=several).logits
        assert relative_error(found[:2], model(rows[:2]).logits[:, 6:]) < 64 * EPS
        cache.batch_repeat_interleave(2)
        with pytest.raises(StateError, match="The cache is that of 2 rows, and this call has 3"):
            model(IDS[:3, 6:], past_key_values=cache)
        cut = model(torch.tensor([[11, 12, 7, 15]]), use_cache=True).past_key_values
        cut.crop(-1)  # as assisted generation does, within an invocation
        acts = where_it_acts(adapted(target_modules=["down_proj"]), torch.tensor([[8, 13]]), past_key_values=cut)
        assert acts == [True, True]
        cropped = model(IDS[:1, :6], use_cache=True).past_key_values
        cropped.crop(-5)  # before the invocation
        again = model(IDS[:1, 1:], past_key_values=cropped).logits
        assert relative_error(again, model(IDS[:1]).logits[:, 1:]) < 64 * EPS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_checkpointed_gradients_are_those_without(reentrant: bool, first: str) -> None:
    """With two calls before the backward, so that the last call's tokens are not those of the first."""
    found = []
    for checkpointing in (False, True):
        base = tiny_llama()
        if checkpointing and first == "checkpointing":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model: Any = randomize(apply_lora(base, settings(lora_dropout=0.2, target_modules=TARGETS[:4]))).train()
        if checkpointing and first == "adapter":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        loss = model(IDS, labels=IDS).loss + 2 * model(IDS.flip(0), labels=IDS).loss
        loss.backward()
        found.append(adapter_gradients(model))
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(found[1][n], grad) for n, grad in found[0].items())


def test_a_layer_outside_of_a_call_is_refused() -> None:
    model = adapted().train()
    x = torch.randn(2, 3, 32, requires_grad=True)
    with pytest.raises(StateError, match="called outside of its model's forward"):
        model.model.layers[0].self_attn.q_proj(x)
    outer = checkpoint(model, IDS, use_reentrant=False).logits  # the model itself may be called again
    outer.sum().backward()
    assert carried(len) is len


def test_inner_models_find_the_tokens_themselves() -> None:
    model = adapted()
    with torch.no_grad():
        hidden = model.model(input_ids=IDS).last_hidden_state
        assert torch.equal(hidden, model(IDS, output_hidden_states=True).hidden_states[-1])
    with pytest.raises(StateError, match="looks for in input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    with torch.no_grad():
        last = model(IDS, logits_to_keep=2).logits  # the output layer gets the last tokens
        assert relative_error(last, model(IDS).logits[:, -2:]) < 32 * EPS


def where_it_acts(model: Any, *args: Any, **kwargs: Any) -> list[bool]:
    """On which tokens of the first row of a call."""
    layer, seen = model.model.layers[0].mlp.down_proj, {}
    hook = layer.register_forward_hook(lambda m, given, y: seen.update(x=given[0], y=y))
    with torch.no_grad():
        model(*args, **kwargs)
        acts: Tensor = (seen["y"] - layer.product(seen["x"])).abs().amax(-1)[0] > 0
    hook.remove()
    return acts.tolist()


def test_documents_of_a_row_have_invocations_of_their_own() -> None:
    """Of rows that hold several documents, as packing makes them; what lies across two of them is none."""
    model = adapted(target_modules=["down_proj"])
    ids = torch.tensor([[11, 7, 8, 12, 7, 8, 13, 14, 7, 8]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    acts = where_it_acts(model, ids, position_ids=positions)
    assert acts == [False, True, True, True, True, False, False, False, True, True]
    assert where_it_acts(model, ids) == [False] * 8 + [True] * 2


def test_a_further_turn_has_its_own_invocation() -> None:
    """As in the prompt that ends with it: the last one counts."""
    model = adapted(target_modules=["down_proj"])
    turns = torch.tensor([[11, 7, 8, 12]]), torch.tensor([[13, 14]]), torch.tensor([[15, 7, 8, 16]])
    cache, found = None, []
    for turn in turns:
        found.append(where_it_acts(model, turn, past_key_values=copy.deepcopy(cache), use_cache=True))
        with torch.no_grad():
            cache = model(turn, past_key_values=cache, use_cache=True).past_key_values
    assert found == [[False, True, True, True], [True, True], [False, True, True, True]]


def test_merging_is_refused_by_name_and_other_methods_beside_it(tmp_path: Path) -> None:
    model = adapted()
    before = snapshot(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: LoraModel.from_pretrained(tmp_path / "adapter", base_model=tiny_llama(), merge=True),
        lambda: merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False),
    ):
        with pytest.raises(LoraError, match="aLoRA acts only from its invocation tokens on"):
            merge()
    assert not (tmp_path / "merged").exists()
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model).items())
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(StateError, match="methods alora, lora cannot act on one layer together"):
        model.set_adapter(["default", "plain"])
    model.add_adapter("more", settings(alora_invocation_tokens=[12]))
    randomize(model)
    model.set_adapter(["default", "more"])
    with torch.no_grad():
        both = model(IDS).logits
        model.set_adapter("more")
        assert relative_error(model(IDS).logits[2], both[2]) < 32 * EPS  # where only one of them is invoked
    assert relative_error(both[0], tiny_llama()(IDS).logits[0]) > 0.01


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("make", "config", "match"),
    [
        (tiny_llama, dict(alora_invocation_tokens=["x"]), "must be a list of tokens"),
        (tiny_llama, dict(method="alora", alora_invocation_tokens=None), "must be a list of tokens"),
        (tiny_llama, dict(use_dora=True), "ask for dora, alora, but a layer has one method"),
        (tiny_llama, dict(target_modules=["embed_tokens"]), r"aLoRA \(alora_invocation_tokens\) is for linear layers"),
        (tiny_llama, dict(init_lora_weights="pissa"), "it subtracts a product from the base, on all tokens"),
        (tiny_mamba, dict(target_modules=["in_proj"]), "this model has a state of another kind"),
        (tiny_t5, dict(target_modules=["q"]), "a transformers model of text with one sequence per row"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), dict(target_modules=["0"]), "of a transformers model of text"),
    ],
)
def test_what_it_cannot_do_is_refused(make: Any, config: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, TargetError), match=match):
        apply_lora(make(), settings(**config))


def test_a_layer_that_gets_tokens_in_another_arrangement_is_refused() -> None:
    model = apply_lora(tiny_bert(), settings(target_modules=["query", "dense"], modules_to_save=[]))
    with pytest.raises(StateError, match=r"inputs of the shape \(4, 32\) in a call with \(4, 8\) tokens"):
        model(IDS)  # its pooler gets the first token of each row


@pytest.mark.parametrize("kind", ["nf4", "bf16", "autocast"])
def test_other_dtypes_and_quantized_bases(kind: str, tmp_path: Path) -> None:
    """Tokens before the invocation are the base's to the bit, and those after it differ."""
    from quantized_bases import load, save_base

    folder = save_base(tmp_path)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    base = load(folder, "nf4" if kind == "nf4" else "dense", dtype)
    model: Any = randomize(apply_lora(base, settings(target_modules=TARGETS[:4]))).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = model(IDS).logits
        with model.disable_adapter():
            expected = model(IDS).logits
        assert found.dtype == expected.dtype
        for row, start in enumerate(START):
            assert torch.equal(found[row, :start], expected[row, :start])
            assert start == 8 or relative_error(found[row, start:], expected[row, start:]) > 0.01
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model.train()(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(g).all() and g.any() for g in adapter_gradients(model).values())
