"""Models with random weights and texts of different lengths, small enough to be built in every test."""

from __future__ import annotations

import torch

WIDTH = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
WORDS = dict(vocab_size=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA_LIKE = {**WIDTH, **WORDS, "num_key_value_heads": 2}
FALCON = {**WIDTH, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    moe_intermediate_size=16,
)  # fmt: skip
GATED = dict(
    layer_types=["full_attention", "full_attention"], num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "mistral": ("MistralConfig", {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 16}),
    "smollm3": ("SmolLM3Config", LLAMA_LIKE),
    "olmo": ("OlmoConfig", LLAMA_LIKE),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, "head_dim": 8}),
    "granite": (
        "GraniteConfig",
        {
            **LLAMA_LIKE,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "phi3": ("Phi3Config", LLAMA_LIKE),
    "gemma2": ("Gemma2Config", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}),
    "olmo2": ("Olmo2Config", LLAMA_LIKE),
    "cohere": ("CohereConfig", LLAMA_LIKE),
    "mixtral": ("MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 3}),
    "gpt_oss": (
        "GptOssConfig",
        {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**WIDTH, **WORDS, **LATENT}),
    "qwen3_next": ("Qwen3NextConfig", {**LLAMA_LIKE, **GATED, "head_dim": 8}),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
    "gpt_neox": ("GPTNeoXConfig", {**WIDTH, **WORDS}),
    "gpt_neox, one after the other": ("GPTNeoXConfig", {**WIDTH, **WORDS, "use_parallel_residual": False}),
    "falcon 7b": ("FalconConfig", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon 11b": (
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon 40b": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon rw": ("FalconConfig", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "bert": ("BertConfig", {**WIDTH, **WORDS}),
    "roberta": ("RobertaConfig", {**WIDTH, **WORDS, "max_position_embeddings": 40}),
    "vit": ("ViTConfig", {**WIDTH, "image_size": 6, "patch_size": 2, "num_labels": 5}),
    "t5": (
        "T5Config",
        dict(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip
ENCODERS = ("bert", "roberta")
AUTO = dict.fromkeys(ENCODERS, "AutoModelForMaskedLM") | {
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
}


def build(name: str, *, head: bool = True, dtype: torch.dtype = torch.float32, **options):
    """A family's tiny model, in evaluation mode; `head`: with its language-model head, or its classifier."""
    import transformers

    config_class, given = CONFIGS[name]
    config = getattr(transformers, config_class)(**{**given, **options})
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM") if head else "AutoModel")
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that attention is far from uniform, where any mistake would look right.
            parameter.normal_(0, 0.3, generator=generator)
    return model.to(dtype)


def texts(lengths=(6, 3, 1, 5)) -> list[torch.Tensor]:
    """Token ids of random texts of these lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def padded(texts, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of texts, padded on one side; positions count from a text's first token."""
    size = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), size, dtype=torch.long) for _ in range(2))
    for b, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(size - len(text), size)
        ids[b, at], mask[b, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def num_hooks(model: torch.nn.Module) -> int:
    """How many hooks a model and its parts have, in every dict that torch keeps of them."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
