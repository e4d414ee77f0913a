"""Tiny random models of many architectures, each with a batch, built when they are asked for.

Sizes are small: two layers, a width of 16 to 32, a vocabulary of 64, images of 16 to 64 pixels. Everything random
is switched off (dropout, stochastic depth, masking), so that two runs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from batches import (
    END,
    IMAGE,
    LABELS,
    PAD,
    START,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Batch,
    captions,
    classes,
    decoded_image,
    language,
    pairs,
    patches,
    pixels,
    plain_captions,
    recurrent,
    sequences,
    several_images,
    spans,
    spectrogram,
    speech,
    tokens,
    typed_captions,
    waves,
)
from torch import nn


@dataclass(frozen=True)
class Case:
    """One architecture.

    group: what kind of model, for the table.
    auto: the auto class that builds it.
    config: makes the configuration.
    batch: makes keyword arguments of forward from the model, labels among them where the class computes a loss.
    prompt: the keys of the batch that `generate` takes; empty where it is not tried.
    sample: whether the fast test run holds it.
    """

    name: str
    group: str
    auto: str
    config: Callable[[], Any]
    batch: Callable[[Any], Batch]
    prompt: tuple[str, ...] = ()
    sample: bool = False

    def build(self) -> Any:
        """The model, in eval mode: the same bits at every call."""
        import transformers

        torch.manual_seed(0)
        config = self.config()
        _quiet(config)
        config.architectures = config.architectures or []  # an auto class with several choices for a type wants a list
        model = getattr(transformers, self.auto).from_config(config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in model.parameters():  # biases and some weights start at zero, which would hide what they do
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        return model.eval()

    def inputs(self, model: Any) -> Batch:
        """The batch, the same at every call."""
        torch.manual_seed(1)
        return self.batch(model)


def _quiet(config: Any) -> None:
    """Switch off what a configuration makes random in training, and let its weights be large enough to matter."""
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.1
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _quiet(value)
        elif isinstance(value, float) and ("drop" in name or name in ("mask_time_prob", "mask_feature_prob")):
            setattr(config, name, 0.0)


# Configurations ------------------------------------------------------------------------------------------------------

SPECIAL = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
BASIC: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
DECODER: dict[str, Any] = {**BASIC, "num_key_value_heads": 1, "head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": START, **SPECIAL, "forced_eos_token_id": None,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "classifier_proj_size": 16, "pad_token_id": 0, "ctc_zero_infinity": True,
}  # fmt: skip


def config(model_type: str, *parts: dict[str, Any], **fields: Any) -> Callable[[], Any]:
    """A configuration of `model_type` by transformers' own table, made when called."""

    def make() -> Any:
        from transformers import AutoConfig

        values: dict[str, Any] = {}
        for part in parts:
            values |= part
        values |= fields
        return AutoConfig.for_model(model_type, **{k: v() if callable(v) else v for k, v in values.items()})

    return make


def labeled(model_type: str, *parts: dict[str, Any], **fields: Any) -> Callable[[], Any]:
    return config(model_type, *parts, num_labels=LABELS, **fields)


def joined(model_type: str, encoder: Callable[[], Any], decoder: Callable[[], Any]) -> Callable[[], Any]:
    """A configuration made of an encoder's and a decoder's."""

    def make() -> Any:
        from transformers import AutoConfig

        parts = {"encoder": encoder().to_dict(), "decoder": decoder().to_dict()}
        whole = AutoConfig.for_model(model_type, **parts, decoder_start_token_id=START, pad_token_id=PAD)
        return whole

    return make


def _swin(**fields: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
        **fields,
    }  # fmt: skip


def _mask2former() -> Any:
    from transformers import Mask2FormerConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = _swin(depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], out_features=stages, image_size=64)
    return Mask2FormerConfig(
        backbone_config=config("swin", swin)(), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=24, encoder_layers=1, decoder_layers=3, num_attention_heads=2, dim_feedforward=24,
        num_queries=5, train_num_points=16, num_labels=LABELS,
    )  # fmt: skip


def _resnet(**fields: Any) -> dict[str, Any]:
    return {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", **fields}


CLIP_TEXT = {**BASIC, "projection_dim": 16}
CLIP_VISION = {**VISION, "projection_dim": 16}


CAUSAL, GENERATES = "AutoModelForCausalLM", ("input_ids", "attention_mask")


def decoder(name: str, *parts: dict[str, Any], model_type: str = "", group: str = "decoder", sample: bool = False,
            batch: Callable[[Any], Batch] = language, **fields: Any) -> Case:  # fmt: skip
    prompt = GENERATES if batch is language else ("input_ids",)
    return Case(name, group, CAUSAL, config(model_type or name, *parts, **fields), batch, prompt, sample)


def translator(name: str, *parts: dict[str, Any], sample: bool = False, **fields: Any) -> Case:
    make = config(name, *parts, **fields)
    return Case(name, "encoder-decoder", "AutoModelForSeq2SeqLM", make, sequences, GENERATES, sample)


def encoder(name: str, auto: str, batch: Callable[[Any], Batch], *parts: dict[str, Any], sample: bool = False,
            model_type: str = "", **fields: Any) -> Case:  # fmt: skip
    return Case(name, "text", f"AutoModelFor{auto}", labeled(model_type or name, *parts, **fields), batch, (), sample)


def vision(name: str, auto: str, batch: Callable[[Any], Batch], *parts: dict[str, Any], sample: bool = False,
           **fields: Any) -> Case:  # fmt: skip
    return Case(name, "vision", f"AutoModelFor{auto}", labeled(name, *parts, **fields), batch, (), sample)


CLASSIFY, IMAGES = "SequenceClassification", "ImageClassification"
MAMBA = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 4}

CASES: tuple[Case, ...] = (
    # text
    encoder("bert", CLASSIFY, classes, BASIC, sample=True),
    encoder("roberta", CLASSIFY, classes, BASIC),
    encoder("deberta-v2", CLASSIFY, classes, BASIC, relative_attention=True, position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type="p2c|c2p", conv_kernel_size=3, pooler_hidden_size=32),
    encoder("deberta", CLASSIFY, classes, BASIC, relative_attention=True, pos_att_type="c2p|p2c",
            pooler_hidden_size=32),
    encoder("electra", "TokenClassification", tokens, BASIC, embedding_size=16),
    encoder("modernbert", CLASSIFY, classes, BASIC, cls_token_id=3, sep_token_id=4, local_attention=4),
    Case("distilbert", "text", "AutoModelForQuestionAnswering",
         config("distilbert", vocab_size=VOCABULARY, dim=32, n_heads=2, n_layers=2, hidden_dim=48), spans),
    encoder("albert", CLASSIFY, classes, BASIC, embedding_size=16),
    encoder("xlnet", CLASSIFY, classes, vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=48,
            pad_token_id=PAD),
    encoder("mpnet", "MaskedLM", language, BASIC),
    encoder("xlm-roberta", "TokenClassification", tokens, BASIC),
    encoder("funnel", CLASSIFY, classes, vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16,
            d_inner=48, num_decoder_layers=1),
    # decoders
    decoder("llama", DECODER, sample=True),
    decoder("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, **SPECIAL),
    decoder("gpt_neox", BASIC),
    decoder("gptj", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, rotary_dim=8, **SPECIAL),
    decoder("opt", BASIC, ffn_dim=48, word_embed_proj_dim=16),
    decoder("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2, **SPECIAL),
    decoder("falcon", BASIC, new_decoder_architecture=True, num_kv_heads=1),
    decoder("gemma2", DECODER, query_pre_attn_scalar=16, sliding_window=4),
    decoder("gemma3_text", DECODER, query_pre_attn_scalar=16, sliding_window=4),
    decoder("phi", BASIC),
    decoder("qwen2", DECODER, tie_word_embeddings=True),
    decoder("qwen3", DECODER),
    decoder("mistral", DECODER, sliding_window=4),
    decoder("cohere", DECODER),
    decoder("starcoder2", DECODER),
    # encoder-decoders
    translator("t5", vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
               decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END, sample=True),
    translator("umt5", vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
               decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END),
    translator("bart", SEQ2SEQ),
    translator("mbart", SEQ2SEQ, scale_embedding=True),
    translator("m2m_100", SEQ2SEQ, scale_embedding=True),
    translator("pegasus", SEQ2SEQ, scale_embedding=True),
    translator("marian", SEQ2SEQ, decoder_vocab_size=VOCABULARY),
    # mixtures of experts
    decoder("mixtral", DECODER, group="mixture of experts", num_local_experts=4, num_experts_per_tok=2, sample=True),
    decoder("qwen2_moe", DECODER, group="mixture of experts", num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16),
    decoder("olmoe", DECODER, group="mixture of experts", num_experts=4, num_experts_per_tok=2),
    decoder("gpt_oss", DECODER, group="mixture of experts", num_local_experts=4, num_experts_per_tok=2,
            sliding_window=4),
    # state spaces and hybrids
    decoder("mamba", BASIC, group="state space", batch=recurrent, state_size=8, sample=True),
    decoder("mamba2", BASIC, MAMBA, group="state space", batch=recurrent),
    decoder("jamba", DECODER, group="hybrid", num_experts=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    decoder("bamba", DECODER, group="hybrid", mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8,
            mamba_chunk_size=4, attn_layer_indices=[1]),
    decoder("recurrent_gemma", BASIC, group="hybrid", lru_width=32, attention_window_size=8, num_key_value_heads=1,
            head_dim=16,
            block_types=["recurrent", "attention"]),
    decoder("rwkv", group="state space", batch=recurrent, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
            attention_hidden_size=32, intermediate_size=48, context_length=32),
    # vision
    vision("vit", IMAGES, pixels(16), VISION, sample=True),
    vision("deit", IMAGES, pixels(16), VISION),
    vision("swin", IMAGES, pixels(), _swin()),
    vision("convnext", IMAGES, pixels(), hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    vision("resnet", IMAGES, pixels(), _resnet()),
    vision("segformer", "SemanticSegmentation", pixels(32, "map"), num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2,
           1],
           hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
           decoder_hidden_size=16),
    vision("detr", "ObjectDetection", pixels(32, "boxes"), use_timm_backbone=False, backbone=None,
           backbone_config=config("resnet", _resnet(out_features=["stage2"])), d_model=32, encoder_layers=1,
           decoder_layers=2,
           encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
           num_queries=5),
    Case("mask2former", "vision", "AutoModelForUniversalSegmentation", _mask2former, pixels(64, "masks")),
    vision("dinov2", IMAGES, pixels(16), VISION, mlp_ratio=2),
    vision("beit", IMAGES, pixels(16), VISION, use_relative_position_bias=True),
    vision("mobilenet_v2", IMAGES, pixels(), depth_multiplier=0.25, min_depth=4),
    # audio
    Case("wav2vec2", "audio", "AutoModelForCTC", config("wav2vec2", SPEECH), waves(), (), True),
    Case("hubert", "audio", "AutoModelForCTC", config("hubert", SPEECH), waves()),
    Case("wavlm", "audio", "AutoModelForAudioClassification", labeled("wavlm", SPEECH, num_buckets=8,
         max_bucket_distance=16),
         waves("class")),
    Case("whisper", "audio", "AutoModelForSpeechSeq2Seq",
         config("whisper", SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
                suppress_tokens=None, begin_suppress_tokens=None), speech, ("input_features",)),
    Case("ast", "audio", "AutoModelForAudioClassification",
         labeled("audio-spectrogram-transformer", VISION, patch_size=4, frequency_stride=4, time_stride=4,
         max_length=32,
                  num_mel_bins=16), spectrogram),
    # multimodal
    Case("clip", "multimodal", "AutoModel", config("clip", text_config=CLIP_TEXT, vision_config=CLIP_VISION,
         projection_dim=16),
         pairs, (), True),
    Case("siglip", "multimodal", "AutoModel", config("siglip", text_config=BASIC, vision_config=VISION), pairs),
    Case("llava", "multimodal", "AutoModelForImageTextToText",
         config("llava", text_config=config("llama", DECODER), vision_config=config("clip_vision_model", CLIP_VISION),
                image_token_index=IMAGE, image_seq_length=4), captions(4), (*GENERATES, "pixel_values")),
    Case("blip", "multimodal", "AutoModelForImageTextToText",
         config("blip", text_config={**BASIC, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": END},
                vision_config=VISION, projection_dim=16), plain_captions, (*GENERATES, "pixel_values")),
    Case("blip-2", "multimodal", "AutoModelForImageTextToText",
         config("blip-2", vision_config=VISION, num_query_tokens=4, image_token_index=IMAGE,
                qformer_config={**BASIC, "encoder_hidden_size": 32},
                text_config=config("opt", BASIC, ffn_dim=48, word_embed_proj_dim=32)),
         captions(4), (*GENERATES, "pixel_values")),
    Case("paligemma", "multimodal", "AutoModelForImageTextToText",
         config("paligemma", text_config=config("gemma", DECODER),
                vision_config=config("siglip_vision_model", VISION), image_token_index=IMAGE, projection_dim=32),
         typed_captions, (*GENERATES, "pixel_values")),
    Case("idefics3", "multimodal", "AutoModelForImageTextToText",
         config("idefics3", text_config=config("llama", DECODER), vision_config=VISION, image_token_id=IMAGE,
         scale_factor=1,
                pad_token_id=PAD), several_images, (*GENERATES, "pixel_values")),
    Case("qwen2_vl", "multimodal", "AutoModelForImageTextToText",
         config("qwen2_vl", text_config={**DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                "mrope_section": [2, 3, 3]}},
                vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                "patch_size": 4,
                               "spatial_merge_size": 2, "temporal_patch_size": 2},
                image_token_id=IMAGE, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END),
         patches, (*GENERATES, "mm_token_type_ids", "pixel_values", "image_grid_thw")),
    Case("vision-encoder-decoder", "multimodal", "AutoModelForImageTextToText",
         joined("vision-encoder-decoder", config("vit", VISION),
                config("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, is_decoder=True,
                       add_cross_attention=True, **SPECIAL)),
         decoded_image, ("pixel_values",)),
)  # fmt: skip
