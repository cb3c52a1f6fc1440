"""Tiny random models of every family, built from configs: hidden size 64, vocabulary 128, float32, one fixed seed.

One entry is one family as a user would name it.  ``outcome`` says what RankKV promises: its cache is compressed, the
model runs unchanged because no layer has a full-attention cache, or it is refused by name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version

from rankkv.models.compat import OLDEST_TRANSFORMERS

VOCABULARY = 128
#: Prompts of twice this length pass the window in the prefill, and shorter ones while generating.
WINDOW = 32

#: What is promised for the newest transformers is not all promised for this one.
IS_OLD = Version(transformers.__version__) < Version("5.24")

COMPRESSED, UNCHANGED, REFUSED = "compressed", "unchanged", "refused"

# Ten times the usual spread: otherwise a random model attends so evenly that any token will do.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    # Tied embeddings make a random model repeat its last token.
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
USUAL: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_EXPERTS: dict[str, Any] = {
    **USUAL,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_MLA: dict[str, Any] = {
    **USUAL,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family, and what is promised for it.

    Parameters
    ----------
    model : str
        Class in transformers; the config's class has the same name but ``config`` where that differs.
    options : mapping
        Options of the config.
    outcome : {"compressed", "unchanged", "refused"}
        What RankKV promises.
    says : str
        Pattern of the message, where it is unchanged or refused.
    compressible : tuple of int, optional
        Layers that are compressed; None means all.
    since : str
        The oldest transformers for which this is promised and tested.
    chunks : bool
        Whether the model itself, with transformers' own cache, can take a prompt in chunks.
    softcap : bool
        Whether its logits are capped, which sdpa leaves out.
    sinks : bool
        Whether its attention has learned sinks, which flex_attention computes on a GPU only.
    latent_since : str, optional
        The transformers from which on its cache holds what keys and values are computed from.
    borrows : bool
        Whether some layers have no keys of their own and attend to another layer's.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=lambda: USUAL)
    config: str | None = None
    outcome: str = COMPRESSED
    says: str = ""
    compressible: tuple[int, ...] | None = None
    since: str = OLDEST_TRANSFORMERS
    chunks: bool = True
    softcap: bool = False
    sinks: bool = False
    latent_since: str | None = None
    borrows: bool = False

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has the family."""
        return hasattr(transformers, self.model)

    @property
    def latent(self) -> bool:
        """Whether the cache holds what keys and values are computed from."""
        return self.latent_since is not None and Version(transformers.__version__) >= Version(
            self.latent_since
        )

    @property
    def is_promised(self) -> bool:
        """Whether the installed transformers is one that keeps the promise."""
        return Version(transformers.__version__) >= Version(self.since)

    @property
    def backends(self) -> tuple[str, ...]:
        """Attention backends that the model has and a CPU runs, the usual one first."""
        model_class = getattr(transformers, self.model)
        return (
            *(["sdpa"] if model_class._supports_sdpa and not self.softcap else []),
            "eager",
            *(["flex_attention"] if model_class._supports_flex_attn and not self.sinks else []),
        )

    def build(self, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """Build the model; the same weights every time."""
        model_class = getattr(transformers, self.model)
        config = model_class.config_class if self.config is None else getattr(transformers, self.config)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            settings = config(**self.options)
            settings._attn_implementation = backend
            model = model_class(settings).eval().to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Parameters that no initialiser knows hold what was in memory.
                    if not torch.isfinite(parameter).all():
                        parameter.nan_to_num_(0.0, 0.0, 0.0)
        model.generation_config.eos_token_id = None
        return model


@functools.cache
def build(name: str, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of a family, built once in a process: tests restore what they change."""
    return FAMILIES[name].build(backend, dtype)


_BYPASSES = "does not go through transformers' attention interface"

FAMILIES: dict[str, Family] = {
    "Llama": Family("LlamaForCausalLM"),
    "Llama 4": Family(
        "Llama4ForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "moe_layers": [1],
        },
        compressible=(1, 3),
    ),
    "Mistral": Family("MistralForCausalLM", {**USUAL, "sliding_window": None}),
    "Mistral, sliding window": Family(
        "MistralForCausalLM",
        {**USUAL, "sliding_window": WINDOW},
        outcome=UNCHANGED,
        says="no layer of MistralForCausalLM has a full-attention KV cache",
        compressible=(),
    ),
    "Ministral": Family(
        "MinistralForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
        compressible=(1, 3),
    ),
    "Mixtral": Family("MixtralForCausalLM", {**_EXPERTS, "sliding_window": None}),
    "Qwen2": Family("Qwen2ForCausalLM"),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3": Family("Qwen3ForCausalLM", {**USUAL, "head_dim": 16}),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 16}),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "layer_types": _HYBRID,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 32,
        },
        compressible=(1, 3),
        since="5.24",
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "layer_types": _HYBRID,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        compressible=(1, 3),
        since="5.24",
    ),
    "Phi": Family("PhiForCausalLM"),
    "Phi-3": Family("Phi3ForCausalLM", {**USUAL, "sliding_window": None}),
    "Gemma": Family("GemmaForCausalLM", {**USUAL, "head_dim": 16}),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            # Low enough to bend the logits of a random model.
            "attn_logit_softcapping": 2.0,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
        compressible=(1, 3),
        softcap=True,
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
        config="Gemma3TextConfig",
        compressible=(1, 3),
    ),
    "Gemma 3n": Family(
        "Gemma3nForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            # Layers 2 and 3 attend to the keys of layers 0 and 1.
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        config="Gemma3nTextConfig",
        compressible=(1,),
        borrows=True,
    ),
    "Gemma 4": Family(
        "Gemma4ForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}},
        },
        config="Gemma4TextConfig",
        compressible=(1,),
        borrows=True,
    ),
    "GPT-NeoX": Family("GPTNeoXForCausalLM"),
    "GPT-2": Family("GPT2LMHeadModel", {**_COMMON, "n_layer": 2, "n_positions": 2048}),
    "GPT-2, scaled by layer": Family(
        "GPT2LMHeadModel",
        {**_COMMON, "n_layer": 2, "n_positions": 2048, "scale_attn_by_inverse_layer_idx": True},
    ),
    "GPT-J": Family(
        "GPTJForCausalLM", {**_COMMON, "n_layer": 2, "n_positions": 2048, "rotary_dim": 8}, since="5.24"
    ),
    "GPT-BigCode": Family("GPTBigCodeForCausalLM", {**_COMMON, "n_layer": 2, "n_positions": 2048}),
    "GPT-Neo": Family(
        "GPTNeoForCausalLM",
        {**_COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        outcome=REFUSED,
        says=_BYPASSES,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
        compressible=(1, 3),
        sinks=True,
    ),
    "OPT": Family(
        "OPTForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 2,
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "init_std": 0.2,
            "max_position_embeddings": 2048,
        },
    ),
    "Falcon": Family(
        "FalconForCausalLM",
        {**_COMMON, "num_hidden_layers": 2, "ffn_hidden_size": 96},
        outcome=REFUSED,
        says=_BYPASSES,
    ),
    "BLOOM": Family(
        "BloomForCausalLM",
        {**_COMMON, "n_layer": 2},
        outcome=REFUSED,
        says=_BYPASSES,
    ),
    "MPT": Family(
        "MptForCausalLM",
        {**_COMMON, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048},
        outcome=REFUSED,
        says=_BYPASSES,
    ),
    "Mamba": Family(
        "MambaForCausalLM",
        {**_COMMON, "num_hidden_layers": 2, "state_size": 8},
        outcome=REFUSED,
        says=_BYPASSES,
    ),
    "OLMo": Family("OlmoForCausalLM"),
    "OLMo 2": Family("Olmo2ForCausalLM"),
    "OLMo 3": Family(
        "Olmo3ForCausalLM",
        {**USUAL, "num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL},
        compressible=(1, 3),
    ),
    "OLMoE": Family("OlmoeForCausalLM", _EXPERTS),
    "StarCoder2": Family("Starcoder2ForCausalLM", {**USUAL, "sliding_window": None}),
    "Granite": Family(
        "GraniteForCausalLM", {**USUAL, "attention_multiplier": 0.1, "residual_multiplier": 0.5}
    ),
    "Granite-MoE": Family("GraniteMoeForCausalLM", {**_EXPERTS, "attention_multiplier": 0.1}),
    "SmolLM3": Family(
        "SmolLM3ForCausalLM", {**USUAL, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
    ),
    "Cohere": Family("CohereForCausalLM"),
    "Cohere2": Family(
        "Cohere2ForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
        compressible=(1, 3),
    ),
    "DeepSeek-V2": Family("DeepseekV2ForCausalLM", _MLA, latent_since="5.15"),
    "DeepSeek-V3": Family("DeepseekV3ForCausalLM", _MLA, latent_since="5.15"),
    "GLM": Family("GlmForCausalLM", {**USUAL, "head_dim": 16}),
    "GLM-4": Family("Glm4ForCausalLM", {**USUAL, "head_dim": 16}),
    "GLM-4-MoE": Family("Glm4MoeForCausalLM", {**_MLA, "head_dim": 16, "num_key_value_heads": 2}),
    "StableLM": Family("StableLmForCausalLM"),
    "Nemotron": Family("NemotronForCausalLM", since="5.24"),
    "EXAONE 4": Family(
        "Exaone4ForCausalLM",
        {**USUAL, "num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL},
        compressible=(1, 3),
    ),
    "ERNIE 4.5": Family("Ernie4_5ForCausalLM", {**USUAL, "head_dim": 16}),
    "Hunyuan": Family("HunYuanDenseV1ForCausalLM", {**USUAL, "head_dim": 16}),
    "Seed-OSS": Family("SeedOssForCausalLM", {**USUAL, "head_dim": 16}),
    "Helium": Family("HeliumForCausalLM", {**USUAL, "head_dim": 16}),
    "MiniMax": Family(
        "MiniMaxForCausalLM",
        {**_EXPERTS, "head_dim": 16, "layer_types": ["full_attention", "linear_attention"], "block_size": 32},
        outcome=REFUSED,
        says="a cache of its own",
    ),
    "MiniMax-M2": Family("MiniMaxM2ForCausalLM", {**_EXPERTS, "head_dim": 16}),
    "Persimmon": Family("PersimmonForCausalLM"),
    "CodeGen": Family(
        "CodeGenForCausalLM", {**_COMMON, "n_layer": 2, "n_positions": 2048, "rotary_dim": 8}, since="5.24"
    ),
    "BioGPT": Family("BioGptForCausalLM", {**USUAL, "scale_embedding": False}),
    "Jamba": Family(
        "JambaForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        compressible=(1, 3),
        chunks=False,
        since="5.24",
    ),
    "LFM2": Family(
        "Lfm2ForCausalLM",
        {**USUAL, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        compressible=(1, 3),
        since="5.24",
    ),
    "Bamba": Family(
        "BambaForCausalLM",
        {
            **USUAL,
            "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
        compressible=(1, 3),
        since="5.24",
    ),
    "Falcon-H1": Family(
        "FalconH1ForCausalLM",
        {
            **USUAL,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_ssm": 128,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
        outcome=UNCHANGED,
        says="no layer of FalconH1ForCausalLM has a full-attention KV cache",
        compressible=(),
        since="5.24",
    ),
    "Gemma 3, multimodal": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **USUAL,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": WINDOW,
                "layer_types": _SLIDING_THEN_FULL,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 120,
            "boi_token_index": 121,
            "eoi_token_index": 122,
        },
        compressible=(1, 3),
        since="5.24",
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **USUAL,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
        since="5.24",
    ),
}

#: Their positions are learned, of another kind than one rotation a token, or not in the keys.
NOT_PACKED = (
    "GPT-2",
    "GPT-2, scaled by layer",
    "GPT-J",
    "GPT-BigCode",
    "OPT",
    "CodeGen",
    "BioGPT",
    "Qwen2-VL",
)
