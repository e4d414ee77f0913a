"""Attention over packed documents: as each document alone, as transformers' own, and with less work."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import VOCABULARY, randomize, token_ids
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_lora import LoraConfig, apply_lora
from hf_lora.loss.packed_attention import attention_by_document, packed_attention

LENGTHS = [5, 9, 1, 12]
WINDOW = 4
"""Of the models with a sliding window: shorter than three of the documents."""


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=WINDOW, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=WINDOW, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "grouped heads": helpers.tiny_llama,
    "a sliding window": mistral,
    "one layer with a window, one without": gemma3,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: Any) -> Any:
    made = MODELS[request.param]().double()
    return randomize(apply_lora(made, LoraConfig(r=4)))


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    """One row of documents, as a padding-free collator makes it."""
    ids = token_ids(1, sum(lengths))
    edges = borders(lengths)
    starts = edges[:-1].long()
    labels = ids.clone()
    labels[0, starts] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,  # with a cache transformers looks for no documents in the positions
    }


def states_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states (tokens, H) of batches one after another, and all gradients of a function of them."""
    model.zero_grad()
    states = [model.base_model(**{k: v for k, v in b.items() if k != "labels"}).last_hidden_state[0] for b in batches]
    found = torch.cat(states)
    (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
    return found.detach(), helpers.adapter_gradients(model)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.count_nonzero()
        helpers.assert_near(found[1][name], gradient, torch.float32)  # the factors' own dtype


def test_a_packed_document_is_as_it_is_alone_and_as_transformers_packs_it(model: Any) -> None:
    row = packed()
    alone = [{"input_ids": part} for part in row["input_ids"].split(LENGTHS, dim=1)]
    with attention_by_document(model):
        found = states_and_gradients(model, [row])
    assert_same(found, states_and_gradients(model, alone))
    assert_same(found, states_and_gradients(model, [row]))
    position_ids_alone = {k: row[k] for k in ("input_ids", "position_ids", "use_cache")}
    assert_same(found, states_and_gradients(model, [position_ids_alone]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(model: Any, reentrant: bool) -> None:
    row = packed()
    with attention_by_document(model):
        expected = states_and_gradients(model, [row])
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        try:
            found = states_and_gradients(model, [row])
        finally:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
            model.eval()
    assert_same(found, expected)


class Count:
    """Pairs of a query and a key that scaled_dot_product_attention multiplies, a head; and how often with a mask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs = self.masked = self.calls = 0
        plain = torch.nn.functional.scaled_dot_product_attention

        def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            self.pairs += query.shape[2] * key.shape[2]
            self.masked += kwargs.get("attn_mask") is not None
            return plain(query, key, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)


def test_the_work_grows_with_the_sum_of_squares(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model.config.num_hidden_layers
    kinds = (
        getattr(model.config, "layer_types", None)
        or ["sliding_attention" if getattr(model.config, "sliding_window", None) else "full_attention"] * layers
    )
    windows = kinds.count("sliding_attention")
    own = Count(monkeypatch)
    model(**packed())
    assert own.pairs == layers * sum(LENGTHS) ** 2
    monkeypatch.undo()
    ours = Count(monkeypatch)
    with attention_by_document(model):
        model(**packed())
    assert ours.pairs == layers * sum(n * n for n in LENGTHS)
    # A mask only where a window is shorter than the document: the kernel for causal attention is the faster one.
    assert ours.masked == windows * sum(n > WINDOW for n in LENGTHS)
    monkeypatch.undo()
    twice = Count(monkeypatch)
    with attention_by_document(model):
        model(**packed(LENGTHS * 2))
    assert twice.pairs == 2 * ours.pairs


def test_generation_and_padded_batches_are_as_outside(model: Any) -> None:
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model(**inputs).logits, model.generate(**inputs, **options), model.generate(ids[:1], **options)
    with attention_by_document(model):
        found = model(**inputs).logits, model.generate(**inputs, **options), model.generate(ids[:1], **options)
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


def test_two_rows_and_borders_of_other_tokens_go_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = helpers.tiny_llama(layers=1).model.layers[0].self_attn
    count = Count(monkeypatch)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    for rows, edges in ((2, [0, 2, 6]), (1, [0, 2, 5])):
        options = {"cu_seq_lens_q": torch.tensor(edges), "scaling": 0.3}
        found, _ = packed_attention(module, query[:rows], key[:rows], value[:rows], None, **options)
        expected, _ = sdpa_attention_forward(module, query[:rows], key[:rows], value[:rows], None, scaling=0.3)
        assert torch.equal(found, expected)
    assert count.calls == 4
    bias = torch.randn(1, 4, 6, 6)
    options = {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "position_bias": bias}
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril()[None, None]
    found, _ = packed_attention(module, query[:1], key[:1], value[:1], mask, **options)
    expected, _ = sdpa_attention_forward(module, query[:1], key[:1], value[:1], mask, position_bias=bias)
    assert torch.equal(found, expected)


def test_another_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.tiny_llama(layers=1).double()
    row = packed()
    expected = model(**row).logits
    model.set_attn_implementation("eager")
    count = Count(monkeypatch)
    with attention_by_document(model):
        assert model.config._attn_implementation == "eager"
        found = model(**row).logits
    assert not count.calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # its softmax is in float32
    mine = lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine)
    with attention_by_document(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine


def test_parts_with_an_attention_of_their_own_keep_it() -> None:
    model = helpers.tiny_llama(layers=2).double()
    part = copy.deepcopy(model.config)
    part._attn_implementation = "eager"
    model.model.layers[1].self_attn.config = part
    expected = model(**packed()).logits
    before = copy.deepcopy(model.config.to_dict())
    with attention_by_document(model):
        # What a model does for `sdpa` alone, such as a sparse mask, it goes on doing.
        assert [layer.self_attn.config._attn_implementation for layer in model.model.layers] == ["sdpa", "eager"]
        with attention_by_document(model):
            found = model(**packed()).logits
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is packed_attention
        pickle.loads(pickle.dumps(model.config))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert [layer.self_attn.config._attn_implementation for layer in model.model.layers] == ["sdpa", "eager"]
    assert model.config.to_dict() == before


def test_all_is_as_it_was_afterwards_and_after_an_error() -> None:
    model = helpers.tiny_llama(layers=1)
    with attention_by_document(model):
        model(**packed())
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is packed_attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with pytest.raises(IndexError), attention_by_document(model):
        model(packed()["input_ids"] + VOCABULARY)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping.get("sdpa")
    config = pickle.loads(pickle.dumps(copy.deepcopy(model.config)))
    assert config._attn_implementation == "sdpa" == model.config._attn_implementation
    assert model.config.to_dict() == helpers.tiny_llama(layers=1).config.to_dict()
