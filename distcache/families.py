"""Where the named points of models lie: a table of model families, found by a model's structure.

A family is an entry in `LAYOUTS`: the path of its blocks, the children that its modules have, and for each named
point a module and a side of it. Names mean the same everywhere, so that these hold to the last bit that the
model itself keeps:

    resid_in + attn_out = resid_mid        resid_mid + mlp_out = resid_out

Blocks that run attention and MLP side by side have no `resid_mid`, and `resid_in + attn_out + mlp_out = resid_out`.
Decoders with cross-attention have `cross_resid_in` and `cross_resid_out` in its place:

    resid_in + attn_out = cross_resid_in        cross_resid_in + cross_attn_out = cross_resid_out
    cross_resid_out + mlp_out = resid_out

In an encoder-decoder all names have the side before them: `encoder_resid_out`, `decoder_cross_attn_out`.

What a family has no point for says why (`absent`), and asking for it raises. `queries` and `keys` are what the
projections give, before any norm or rotation of heads. In training, dropout that isn't a module of its own (Falcon's,
ViT's) comes between a point and the stream.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from distcache.errors import SiteError

# Modules that stand for another: class -> the child that they stand for, and whether a call of them is always a call of
# it, hooks included (PEFT's may call what lies further in, or `forward` itself). By name: nothing is imported for it.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": ("_orig_mod", True),
    "torch.nn.parallel.data_parallel.DataParallel": ("module", True),
    "torch.nn.parallel.distributed.DistributedDataParallel": ("module", True),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": ("_fsdp_wrapped_module", True),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module",
        True,
    ),
    "torch.optim.swa_utils.AveragedModel": ("module", True),
    "deepspeed.runtime.engine.DeepSpeedEngine": ("module", True),
    "peft.peft_model.PeftModel": ("base_model", False),
    "peft.mixed_model.PeftMixedModel": ("base_model", False),
    "peft.tuners.tuners_utils.BaseTuner": ("model", False),
}


@dataclass(frozen=True, slots=True)
class Part:
    """What a point is of its module's value: columns of the last dim, and how many times as much.

    The last dim is `groups` stretches side by side, each of `units` equal units: of every stretch, those in
    [start, stop).
    """

    groups: int = 1
    units: int = 1
    start: int = 0
    stop: int = 1
    scale: float = 1.0

    def of(self, x: Tensor) -> Tensor:
        """[…, D] -> […, D · (stop − start) / units]; `x` itself, a view of it or a new tensor."""
        if self.units > 1:
            x = x.unflatten(-1, (self.groups, self.units, -1))[..., self.start : self.stop, :].flatten(-3)
        return x if self.scale == 1.0 else x * self.scale


def _stacked(which: int) -> Callable[[int, int], Part]:
    """Of queries, keys and values the which-th, in a projection to all queries' heads, all keys', all values'."""

    def part(num_heads: int, num_kv_heads: int) -> Part:
        starts = (0, num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads)
        return Part(1, starts[-1], starts[which], starts[which + 1])

    return part


def _grouped(which: int) -> Callable[[int, int], Part]:
    """The same in a projection that has, key head by key head, its queries' heads, itself and its value's."""

    def part(num_heads: int, num_kv_heads: int) -> Part:
        return replace(_stacked(which)(num_heads // num_kv_heads, 1), groups=num_kv_heads)

    return part


@dataclass(frozen=True, slots=True)
class Point:
    """A named point: one side of a module.

    `path`: with `{root}` for what stands before the blocks' path, `{block}` for a block, `{layer}` for its number.
    `heads`: whether the last dim holds query heads or key-value heads side by side. `part`: of what (query heads,
    key-value heads) lie in a fused last dim. `scale`: the path of a number, attribute of a module, by which the model
    multiplies what is seen here before it adds it; 1 where there is none. `layout`: of the value, where it isn't the
    stream's. `optional`: whether some models of the family, or some blocks, have no such module.
    """

    path: str
    io: Literal["input", "output"] = "output"
    heads: Literal["query", "key"] | None = None
    part: Callable[[int, int], Part] | None = None
    scale: str | None = None
    layout: Literal["ND"] | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A family's entry in the table.

    `children`: by path, exactly those that a module has, `?` after one that may be missing; more, or fewer, is another
    family, whose equations may not hold. `attention`: the modules that transformers hands to its attention functions.
    `head_counts`: an attention module's (query heads, key-value heads). `holds`: what else must be true of a block.
    `layout`: how samples and tokens lie in the stream of an attention module. What has not the attributes that these
    read is another family. `mixed`: whether some blocks have something else in place of attention.
    """

    name: str
    block: str
    children: Mapping[str, str]
    attention: str
    head_counts: Callable[[Any], tuple[int, int]]
    points: Mapping[str, Point]
    absent: Mapping[str, str] = field(default_factory=dict)
    holds: Callable[[Any], bool] = lambda block: True
    layout: Callable[[Any], Literal["SBD"] | None] = lambda attention: None
    mixed: bool = False


def _without(points: Mapping[str, Point], *names: str) -> dict[str, Point]:
    return {name: point for name, point in points.items() if name not in names}


_PARALLEL = {"resid_mid": "its blocks add attn_out and mlp_out to resid_in at once"}
_NORM_AFTER = {
    "resid_mid": "its blocks normalise after adding, so that nowhere is resid_in + attn_out",
    "final_norm_out": "its blocks end with their own norm: take resid_out of the last layer",
}
_UNSEEN = "its attention isn't one that transformers hands out"
_NO_PATTERNS = {
    "avg_attn_pattern": f"{_UNSEEN}. Where it is torch's own function (a model of transformers has it by "
    "attn_implementation='sdpa'), averages go by the module's path: "
    "Site('{attention}', reduce=AveragePattern(), key='attn_{layer}')",
    **dict.fromkeys(("pattern", "attn_stats"), f"{_UNSEEN}, so that no more than averages can be had, by its path"),
}
_EXPERTS = {
    "mlp_act": "all of its experts are one module, which shows nothing of what each makes of the tokens that are "
    "routed to it"
}

_LLAMA = {
    "embed": Point("{root}embed_tokens", scale="{root}embedding_multiplier"),
    "resid_in": Point("{block}", "input"),
    "attn_in": Point("{block}.input_layernorm"),
    "queries": Point("{block}.self_attn.q_proj", heads="query"),
    "keys": Point("{block}.self_attn.k_proj", heads="key"),
    "values": Point("{block}.self_attn.v_proj", heads="key"),
    "attn_z": Point("{block}.self_attn.o_proj", "input", heads="query"),
    "attn_out": Point("{block}.self_attn", scale="{block}.residual_multiplier"),
    "resid_mid": Point("{block}.post_attention_layernorm", "input"),
    "mlp_act": Point("{block}.mlp.down_proj", "input"),
    "mlp_out": Point("{block}.mlp", scale="{block}.residual_multiplier"),
    "resid_out": Point("{block}"),
    "final_norm_out": Point("{root}norm"),
}
_LLAMA_ROOT = {"{root}": "embed_tokens layers norm rotary_emb?"}
_LLAMA_BLOCK = "input_layernorm self_attn post_attention_layernorm mlp"


def _llama_heads(attention: Any) -> tuple[int, int]:
    head_dim = attention.head_dim
    return attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim


# The children of attention that makes its keys and values, and maybe its queries, of latent vectors.
_LATENT = "q_proj? q_a_proj? q_a_layernorm? q_b_proj? kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"


def _is_gated(attention: Any) -> bool:
    """Whether the projection to queries makes as many numbers again."""
    return bool(attention.q_proj.out_features == 2 * attention.o_proj.in_features)


_NEOX = {
    "embed": Point("{root}emb_dropout"),
    "resid_in": Point("{block}", "input"),
    "attn_in": Point("{block}.input_layernorm"),
    "queries": Point("{block}.attention.query_key_value", heads="query", part=_grouped(0)),
    "keys": Point("{block}.attention.query_key_value", heads="key", part=_grouped(1)),
    "values": Point("{block}.attention.query_key_value", heads="key", part=_grouped(2)),
    "attn_z": Point("{block}.attention.dense", "input", heads="query"),
    "attn_out": Point("{block}.post_attention_dropout"),
    "resid_mid": Point("{block}.post_attention_layernorm", "input"),
    "mlp_act": Point("{block}.mlp.dense_4h_to_h", "input"),
    "mlp_out": Point("{block}.post_mlp_dropout"),
    "resid_out": Point("{block}"),
    "final_norm_out": Point("{root}final_layer_norm"),
}
_NEOX_CHILDREN = {
    "{root}": "embed_in emb_dropout layers final_layer_norm rotary_emb",
    "{block}": "input_layernorm post_attention_layernorm post_attention_dropout post_mlp_dropout attention mlp",
}


def _neox_heads(attention: Any) -> tuple[int, int]:
    num_heads = attention.query_key_value.out_features // 3 // attention.head_size
    return num_heads, num_heads


_FALCON = {
    "embed": Point("{root}word_embeddings"),
    "resid_in": Point("{block}", "input"),
    "attn_in": Point("{block}.self_attention", "input"),
    "queries": Point("{block}.self_attention.query_key_value", heads="query", part=_grouped(0)),
    "keys": Point("{block}.self_attention.query_key_value", heads="key", part=_grouped(1)),
    "values": Point("{block}.self_attention.query_key_value", heads="key", part=_grouped(2)),
    "attn_z": Point("{block}.self_attention.dense", "input", heads="query"),
    "attn_out": Point("{block}.self_attention"),
    "resid_mid": Point("{block}.post_attention_layernorm", "input"),
    "mlp_act": Point("{block}.mlp.dense_4h_to_h", "input"),
    "mlp_out": Point("{block}.mlp"),
    "resid_out": Point("{block}"),
    "final_norm_out": Point("{root}ln_f"),
}
_FALCON_ROOT = {"{root}": "word_embeddings h ln_f rotary_emb"}


def _is_parallel_falcon(block: Any) -> bool:
    return bool(block.config.new_decoder_architecture or block.config.parallel_attn)


_T5 = {
    "embed": Point("{root}embed_tokens"),
    "resid_in": Point("{block}", "input"),
    "attn_in": Point("{block}.layer.0.layer_norm"),
    "queries": Point("{block}.layer.0.SelfAttention.q", heads="query"),
    "keys": Point("{block}.layer.0.SelfAttention.k", heads="key"),
    "values": Point("{block}.layer.0.SelfAttention.v", heads="key"),
    "attn_z": Point("{block}.layer.0.SelfAttention.o", "input", heads="query"),
    "attn_out": Point("{block}.layer.0.dropout"),
    "resid_mid": Point("{block}.layer.1.layer_norm", "input"),
    "mlp_act": Point("{block}.layer.1.DenseReluDense.wo", "input"),
    "mlp_out": Point("{block}.layer.1.dropout"),
    "resid_out": Point("{block}"),
    "final_norm_out": Point("{root}final_layer_norm"),
}
_T5_CHILDREN = {
    "{root}": "embed_tokens block final_layer_norm dropout",
    "{block}": "layer",
    "{block}.layer.0": "SelfAttention layer_norm dropout",
}
_T5_MLP = "DenseReluDense layer_norm dropout"


def _own_heads(attention: Any) -> tuple[int, int]:
    return attention.n_heads, attention.n_heads


_ENCODER = {
    "resid_in": Point("{block}", "input"),
    "attn_in": Point("{block}.self_attn", "input"),
    "attn_out": Point("{block}.dropout1"),
    "resid_mid": Point("{block}.norm2", "input"),
    "mlp_act": Point("{block}.linear2", "input"),
    "mlp_out": Point("{block}.dropout2"),
    "resid_out": Point("{block}"),
    "final_norm_out": Point("{root}norm", optional=True),
}
_ENCODER_CHILDREN = {
    "{root}": "layers norm?",
    "{block}": "self_attn linear1 dropout linear2 norm1 norm2 dropout1 dropout2 activation?",
}
_ENCODER_ABSENT = {
    "embed": "embeddings are its input: take resid_in of layer 0",
    **dict.fromkeys(
        ("queries", "keys", "values", "attn_z"),
        "nn.MultiheadAttention computes them in one function, from parameters that belong to no module within it",
    ),
    **_NO_PATTERNS,
}


def _batch_first(attention: Any) -> Literal["SBD"] | None:
    return None if attention.batch_first else "SBD"


LAYOUTS = (
    Layout(  # SmolLM, Mistral, Qwen 2 and 3, Gemma 1 and Granite too
        name="llama",
        block="{root}layers.{layer}",
        children={**_LLAMA_ROOT, "{block}": _LLAMA_BLOCK},
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points=_LLAMA,
    ),
    Layout(
        name="phi3",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": f"{_LLAMA_BLOCK} resid_attn_dropout resid_mlp_dropout",
        },
        attention="{block}.self_attn",
        head_counts=lambda a: (a.o_proj.in_features // a.head_dim, a.num_key_value_heads),
        points={
            **_LLAMA,
            "queries": Point("{block}.self_attn.qkv_proj", heads="query", part=_stacked(0)),
            "keys": Point("{block}.self_attn.qkv_proj", heads="key", part=_stacked(1)),
            "values": Point("{block}.self_attn.qkv_proj", heads="key", part=_stacked(2)),
            "attn_out": Point("{block}.resid_attn_dropout"),
            "mlp_out": Point("{block}.resid_mlp_dropout"),
        },
    ),
    Layout(  # Gemma 3 too
        name="gemma2",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": f"{_LLAMA_BLOCK} pre_feedforward_layernorm post_feedforward_layernorm",
        },
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points={
            **_LLAMA,
            "attn_out": Point("{block}.post_attention_layernorm"),
            "resid_mid": Point("{block}.pre_feedforward_layernorm", "input"),
            "mlp_out": Point("{block}.post_feedforward_layernorm"),
        },
    ),
    Layout(
        name="olmo2",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": "self_attn post_attention_layernorm mlp post_feedforward_layernorm",
        },
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points={
            **_LLAMA,
            "attn_in": Point("{block}.self_attn", "input"),
            "attn_out": Point("{block}.post_attention_layernorm"),
            "resid_mid": Point("{block}.mlp", "input"),
            "mlp_out": Point("{block}.post_feedforward_layernorm"),
        },
    ),
    Layout(
        name="cohere",
        block="{root}layers.{layer}",
        children={**_LLAMA_ROOT, "{block}": "input_layernorm self_attn mlp"},
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points=_without(_LLAMA, "resid_mid"),
        absent=_PARALLEL,
    ),
    Layout(
        name="mixtral",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": _LLAMA_BLOCK,
            "{block}.mlp": "gate experts",
        },
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points={**_without(_LLAMA, "mlp_act"), "router_logits": Point("{block}.mlp.gate", layout="ND")},
        absent=_EXPERTS,
    ),
    Layout(  # Phi-3.5-MoE too
        name="gpt_oss",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": _LLAMA_BLOCK,
            "{block}.mlp": "router experts",
        },
        attention="{block}.self_attn",
        head_counts=_llama_heads,
        points={**_without(_LLAMA, "mlp_act"), "router_logits": Point("{block}.mlp.router", layout="ND")},
        absent=_EXPERTS,
    ),
    Layout(  # DeepSeek-V2, GLM-4-MoE-Lite and Mistral 4 too
        name="deepseek_v3",
        block="{root}layers.{layer}",
        children={**_LLAMA_ROOT, "{block}": _LLAMA_BLOCK},
        attention="{block}.self_attn",
        head_counts=lambda a: (a.num_heads, a.num_heads),
        points={
            **_without(_LLAMA, "keys", "values", "mlp_act"),
            "queries": Point("{block}.self_attn.q_b_proj", heads="query", optional=True),
        },
        absent={
            **dict.fromkeys(
                ("keys", "values"),
                "one projection makes both of a latent vector, and a part of the keys is made elsewhere",
            ),
            **_EXPERTS,
        },
        holds=lambda block: _has(block.self_attn, _LATENT.split()),
    ),
    Layout(  # Qwen 3.5 too
        name="qwen3_next",
        block="{root}layers.{layer}",
        children={
            **_LLAMA_ROOT,
            "{block}": "input_layernorm self_attn? linear_attn? post_attention_layernorm mlp",
        },
        attention="{block}.self_attn",
        head_counts=lambda a: (a.o_proj.in_features // a.head_dim, a.k_proj.out_features // a.head_dim),
        points={
            **{
                name: replace(point, optional=".self_attn" in point.path)
                for name, point in _without(_LLAMA, "mlp_act").items()
            },
            # Each head's query, and what its attention is multiplied by.
            "queries": Point(
                "{block}.self_attn.q_proj", heads="query", part=lambda h, _: Part(h, 2, 0, 1), optional=True
            ),
        },
        absent=_EXPERTS,
        holds=lambda block: hasattr(block, "linear_attn") or _is_gated(block.self_attn),
        mixed=True,
    ),
    Layout(
        name="gpt2",
        block="{root}h.{layer}",
        children={"{root}": "wte wpe drop h ln_f", "{block}": "ln_1 attn ln_2 mlp"},
        attention="{block}.attn",
        head_counts=lambda a: (a.num_heads, a.num_heads),
        points={
            "embed": Point("{root}drop"),
            "resid_in": Point("{block}", "input"),
            "attn_in": Point("{block}.ln_1"),
            "queries": Point("{block}.attn.c_attn", heads="query", part=_stacked(0)),
            "keys": Point("{block}.attn.c_attn", heads="key", part=_stacked(1)),
            "values": Point("{block}.attn.c_attn", heads="key", part=_stacked(2)),
            "attn_z": Point("{block}.attn.c_proj", "input", heads="query"),
            "attn_out": Point("{block}.attn"),
            "resid_mid": Point("{block}.ln_2", "input"),
            "mlp_act": Point("{block}.mlp.c_proj", "input"),
            "mlp_out": Point("{block}.mlp"),
            "resid_out": Point("{block}"),
            "final_norm_out": Point("{root}ln_f"),
        },
        # GPT-BigCode has the same parts, and other ones in them.
        holds=lambda block: not hasattr(block.attn, "multi_query"),
    ),
    Layout(
        name="gpt_neox",
        block="{root}layers.{layer}",
        children=_NEOX_CHILDREN,
        attention="{block}.attention",
        head_counts=_neox_heads,
        points=_without(_NEOX, "resid_mid"),
        absent=_PARALLEL,
        holds=lambda block: block.use_parallel_residual,
    ),
    Layout(
        name="gpt_neox, one after the other",
        block="{root}layers.{layer}",
        children=_NEOX_CHILDREN,
        attention="{block}.attention",
        head_counts=_neox_heads,
        points=_NEOX,
        holds=lambda block: not block.use_parallel_residual,
    ),
    Layout(
        name="falcon",
        block="{root}h.{layer}",
        children={**_FALCON_ROOT, "{block}": "self_attention mlp input_layernorm? ln_attn? ln_mlp?"},
        attention="{block}.self_attention",
        head_counts=lambda a: (a.num_heads, a.num_kv_heads),
        points=_without(_FALCON, "resid_mid"),
        absent={**_PARALLEL, **_NO_PATTERNS},
        holds=_is_parallel_falcon,
    ),
    Layout(
        name="falcon, one after the other",
        block="{root}h.{layer}",
        children={**_FALCON_ROOT, "{block}": "self_attention mlp input_layernorm post_attention_layernorm"},
        attention="{block}.self_attention",
        head_counts=lambda a: (a.num_heads, a.num_kv_heads),
        points=_FALCON,
        absent=_NO_PATTERNS,
        holds=lambda block: not _is_parallel_falcon(block),
    ),
    Layout(  # RoBERTa and MiniLM too
        name="bert",
        block="{root}encoder.layer.{layer}",
        children={
            "{root}": "embeddings encoder pooler?",
            "{root}encoder": "layer",
            "{block}": "attention intermediate output",
            "{block}.attention": "self output",
            "{block}.attention.output": "dense LayerNorm dropout",
            "{block}.output": "dense LayerNorm dropout",
        },
        attention="{block}.attention.self",
        head_counts=lambda a: (a.num_attention_heads, a.num_attention_heads),
        points={
            "embed": Point("{root}embeddings"),
            "resid_in": Point("{block}", "input"),
            "attn_in": Point("{block}.attention.self", "input"),
            "queries": Point("{block}.attention.self.query", heads="query"),
            "keys": Point("{block}.attention.self.key", heads="key"),
            "values": Point("{block}.attention.self.value", heads="key"),
            "attn_z": Point("{block}.attention.output.dense", "input", heads="query"),
            "attn_out": Point("{block}.attention.output.dropout"),
            "mlp_act": Point("{block}.output.dense", "input"),
            "mlp_out": Point("{block}.output.dropout"),
            "resid_out": Point("{block}"),
        },
        absent=_NORM_AFTER,
    ),
    Layout(
        name="vit",
        block="{root}layers.{layer}",
        children={
            "{root}": "embeddings layers layernorm pooler?",
            "{block}": "attention layernorm_before layernorm_after mlp dropout",
        },
        attention="{block}.attention",
        head_counts=_llama_heads,
        points={
            "embed": Point("{root}embeddings"),
            "resid_in": Point("{block}", "input"),
            "attn_in": Point("{block}.layernorm_before"),
            "queries": Point("{block}.attention.q_proj", heads="query"),
            "keys": Point("{block}.attention.k_proj", heads="key"),
            "values": Point("{block}.attention.v_proj", heads="key"),
            "attn_z": Point("{block}.attention.o_proj", "input", heads="query"),
            # One dropout serves both, so that it can't be asked which it was; in evaluation it does nothing.
            "attn_out": Point("{block}.attention"),
            "resid_mid": Point("{block}.layernorm_after", "input"),
            "mlp_act": Point("{block}.mlp.fc2", "input"),
            "mlp_out": Point("{block}.mlp"),
            "resid_out": Point("{block}"),
            "final_norm_out": Point("{root}layernorm"),
        },
    ),
    Layout(
        name="t5 encoder",
        block="{root}block.{layer}",
        children={**_T5_CHILDREN, "{block}.layer": "0 1", "{block}.layer.1": _T5_MLP},
        attention="{block}.layer.0.SelfAttention",
        head_counts=_own_heads,
        points=_T5,
    ),
    Layout(
        name="t5 decoder",
        block="{root}block.{layer}",
        children={
            **_T5_CHILDREN,
            "{block}.layer": "0 1 2",
            "{block}.layer.1": "EncDecAttention layer_norm dropout",
            "{block}.layer.2": _T5_MLP,
        },
        attention="{block}.layer.0.SelfAttention",
        head_counts=_own_heads,
        points={
            **_without(_T5, "resid_mid"),
            "cross_resid_in": Point("{block}.layer.1.layer_norm", "input"),
            "cross_attn_in": Point("{block}.layer.1.layer_norm"),
            "cross_queries": Point("{block}.layer.1.EncDecAttention.q", heads="query"),
            "cross_attn_z": Point("{block}.layer.1.EncDecAttention.o", "input", heads="query"),
            "cross_attn_out": Point("{block}.layer.1.dropout"),
            "cross_resid_out": Point("{block}.layer.2.layer_norm", "input"),
            "mlp_act": Point("{block}.layer.2.DenseReluDense.wo", "input"),
            "mlp_out": Point("{block}.layer.2.dropout"),
        },
        absent={
            "resid_mid": "between attn_out and mlp_out its blocks add cross_attn_out: take cross_resid_in, which is "
            "resid_in + attn_out, or cross_resid_out, to which mlp_out is added",
            **dict.fromkeys(
                ("cross_keys", "cross_values"),
                "they are of the encoder's tokens, and computed while the decoder runs",
            ),
        },
    ),
    Layout(
        name="nn.TransformerEncoder",
        block="{root}layers.{layer}",
        children=_ENCODER_CHILDREN,
        attention="{block}.self_attn",
        head_counts=lambda a: (a.num_heads, a.num_heads),
        points={**_ENCODER, "attn_in": Point("{block}.norm1")},
        absent=_ENCODER_ABSENT,
        holds=lambda block: type(block) is nn.TransformerEncoderLayer and block.norm_first,
        layout=_batch_first,
    ),
    Layout(
        name="nn.TransformerEncoder, norm last",
        block="{root}layers.{layer}",
        children=_ENCODER_CHILDREN,
        attention="{block}.self_attn",
        head_counts=lambda a: (a.num_heads, a.num_heads),
        points=_without(_ENCODER, "resid_mid"),
        absent={**_ENCODER_ABSENT, "resid_mid": _NORM_AFTER["resid_mid"]},
        holds=lambda block: type(block) is nn.TransformerEncoderLayer and not block.norm_first,
        layout=_batch_first,
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A layout as one model has it: `root` stands before the paths of its parts.

    `stream`: which side of an encoder-decoder it is; the names of its sites have that before them.
    """

    layout: Layout
    root: str
    modules: Mapping[str, nn.Module]
    num_layers: int
    num_heads: int = 0
    num_kv_heads: int = 0
    stream: Literal["encoder", "decoder"] | None = None

    @property
    def name(self) -> str:
        return self.layout.name

    def plain(self, name: str) -> str:
        """A site's name without the stream's."""
        return name.removeprefix(f"{self.stream}_") if self.stream else name

    def point(self, name: str) -> Point:
        """The point of a named site; `head_…` sites lie where the whole does. `SiteError` for a name it hasn't."""
        known = self.layout.points
        self.check(name)
        whole = self.plain(name).removeprefix("head_")
        if whole not in known or (whole != self.plain(name) and known[whole].heads is None):
            heads = [f"head_{site}" for site, point in known.items() if point.heads]
            patterns = [site for site in ("avg_attn_pattern", "pattern") if site not in self.layout.absent]
            prefix = f"{self.stream}_" if self.stream else ""
            raise SiteError(
                f"site {name!r} is no module of the model and no named site of the family {self.name}: expected one of "
                f"{', '.join(prefix + site for site in [*known, *heads, *patterns])}, or a module's path."
            )
        return known[whole]

    def check(self, name: str) -> None:
        """`SiteError` with the reason, for a site that this family, or this model of it, has no place for."""
        whole = self.plain(name).removeprefix("head_")
        why = self.layout.absent.get(whole)
        point = self.layout.points.get(whole)
        if point is not None and not self.present(point.path):
            why = f"this model has no {self.paths(point.path)[0]}"
        if why is not None:
            why = why.replace("{attention}", self.path(self.layout.attention))
            raise SiteError(f"site {name!r}: the family {self.name} has no such point: {why}.")

    def path(self, template: str, layer: int | None = None) -> str:
        """A module's path, for a layer where the template has one."""
        path = template.replace("{block}", self.layout.block).replace("{root}", self.root).removesuffix(".")
        return path if layer is None else path.replace("{layer}", str(layer))

    def paths(self, template: str) -> list[str]:
        """The paths that a template means: one, or one per layer."""
        layers: Sequence[int | None] = range(self.num_layers) if "{layer}" in self.path(template) else [None]
        return [self.path(template, layer) for layer in layers]

    def present(self, template: str) -> list[str]:
        """Those of its paths that the model has a module at: not all where blocks are mixed."""
        return [path for path in self.paths(template) if path in self.modules]

    def module(self, name: str, template: str, layer: int | None) -> nn.Module:
        """The module of a named site, of a layer if it has layers. `SiteError` for a layer that has something else."""
        path = self.path(template, layer)
        if path not in self.modules:
            there = [n for n in range(self.num_layers) if self.path(template, n) in self.modules]
            raise SiteError(
                f"site {name!r}: in the family {self.name} some layers have other parts than others, and there is no "
                f"{path}: of {self.num_layers} layers those in layers={there} have it."
            )
        return self.modules[path]

    def heads(self, point: Point) -> int:
        """How many heads lie side by side at a point."""
        return self.num_heads if point.heads == "query" else self.num_kv_heads

    def part(self, point: Point, layer: int | None) -> Part | None:
        """What a point is of its module's value; None for the whole of it as it is."""
        part = Part() if point.part is None else point.part(self.num_heads, self.num_kv_heads)
        if point.scale is not None:
            owner, _, attribute = self.path(point.scale, layer).rpartition(".")
            part = replace(part, scale=getattr(self.modules[owner], attribute, 1.0))
        return None if part == Part() else part

    def value_layout(self, point: Point) -> Literal["SBD", "ND"] | None:
        """How samples and tokens lie in a point's value; None for what is usual."""
        return point.layout or self.layout.layout(self.modules[self.present(self.layout.attention)[0]])


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, by its bare path: without the parts that wrappers put in, and not the wrappers themselves.

    A module that goes by several names has the first, as in torch.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for (bare, *_), module, _ in _walk(model):
        if id(module) not in seen:
            seen.add(id(module))
            found[bare] = module  # of a wrapper and what it wraps the latter, which comes later
    return found


def module_paths(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Every path that means a module -> its bare path, and the module to hook.

    That is every name that it goes by, bare, or with any of the parts that wrappers put in (as `model.named_modules()`
    says it). A bare path comes first: `module.x` is the model's own part `module`, if it has one.
    """
    walked = _walk(model)
    found = {bare: (bare, hooked) for (bare, *_), _, hooked in walked}
    for (bare, *spelled), _, _ in walked:
        for path in spelled:
            found.setdefault(path, found[bare])
    return found


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper stands for; None for a module that stands for itself."""
    inside, _ = _wraps(type(module))
    return getattr(module, inside, None) if inside else None


def _walk(model: nn.Module) -> list[tuple[list[str], nn.Module, nn.Module]]:
    """(paths, module, the module to hook) of a model and all that it holds, once for each name; bare paths first.

    To hook is, of wrappers and what they wrap, the innermost that surely is called.
    """
    found: list[tuple[list[str], nn.Module, nn.Module]] = []
    known: dict[type, tuple[str, bool]] = {}

    def visit(module: nn.Module, paths: list[str], hooked: nn.Module, above: tuple[int, ...]) -> None:
        found.append((paths, module, hooked))
        kind = type(module)
        if kind not in known:
            known[kind] = _wraps(kind)
        inside, calls = known[kind]
        above = (*above, id(module))
        for name, child in module._modules.items():
            if child is None or id(child) in above:  # a part that holds the whole
                continue
            longer = [f"{path}.{name}" if path else name for path in paths]
            if name == inside:
                visit(child, paths + longer, child if calls and hooked is module else hooked, above)
            else:
                visit(child, longer, child, above)

    visit(model, [""], model, ())
    return found


def _wraps(cls: type) -> tuple[str, bool]:
    """The entry of `_WRAPPERS` for a class or its bases; a name that no child has for what is no wrapper."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), ("", True))


def find_families(model: nn.Module) -> list[Family]:
    """Every stack of blocks in a model, by its structure. One that fits a layout in part is another family."""
    # By every name that a module goes by: T5's stacks may share one embedding.
    modules = {bare: module for (bare, *_), module, _ in _walk(model)}
    numbered = [name for name in modules if name.endswith(".0")]
    found: dict[tuple[str, int], Family] = {}  # by the first block, which may go by several names
    for layout in LAYOUTS:
        first = layout.block.removeprefix("{root}").replace("{layer}", "0")
        roots = [name.removesuffix(first) for name in numbered if name.endswith(first)]
        stacks = (_fitted(layout, root, modules) for root in roots if not root or root.endswith("."))
        for family in filter(None, stacks):
            found.setdefault((layout.name, id(modules[family.path("{block}", 0)])), family)
    return list(found.values())


def family_of(model: nn.Module, families: Sequence[Family], site: str) -> Family:
    """The one of a model's families that a named site is of. `SiteError` where none is, or several are."""
    named = [family for family in families if family.stream is None or site.startswith(f"{family.stream}_")]
    if len(named) == 1:
        return named[0]
    several = named or families
    if not several:
        advice = "Name modules by their paths: {'resid_out_{layer}': 'model.layers.{layer}'}."
        if site.endswith(("pattern", "attn_stats")):
            advice = (
                "If it has attention, by torch's own function, attn_implementation='sdpa', averages of patterns go by "
                "the modules' path: Site('model.layers.{layer}.attn', reduce=AveragePattern(), key='attn_{layer}')."
            )
        raise SiteError(
            f"site {site!r} is no module of {type(model).__name__}, whose structure is none of the families that named "
            f"sites are known for ({', '.join(layout.name for layout in LAYOUTS)}). {advice}"
        )
    where = ", ".join(f"{family.name} at {family.path('{block}', 0)!r}" for family in several)
    if named:
        raise SiteError(
            f"site {site!r}: {type(model).__name__} has several stacks of blocks ({where}): record the one you mean, "
            "as in record(model.encoder, …), or name modules by their paths."
        )
    names = " or ".join(repr(f"{family.stream}_{site}") for family in several)
    raise SiteError(f"site {site!r}: {type(model).__name__} is an encoder-decoder ({where}): say which, as in {names}.")


def _fitted(layout: Layout, root: str, modules: Mapping[str, nn.Module]) -> Family | None:
    """A layout at one place in a model, if it fits in full."""
    family = Family(layout, root, modules, num_layers=1, stream=_stream(root, modules))
    if not _fits(family):  # most layouts don't, by their first block
        return None
    num_layers = next(n for n in itertools.count() if family.path("{block}", n) not in modules)
    family = replace(family, num_layers=num_layers)
    if not _fits(family):
        return None
    try:
        holds = all(layout.holds(modules[path]) for path in family.paths("{block}"))
        counts = {layout.head_counts(modules[path]) for path in family.present(layout.attention)}
    except AttributeError:
        return None
    if not holds or len(counts) != 1:
        return None
    num_heads, num_kv_heads = counts.pop()
    return replace(family, num_heads=num_heads, num_kv_heads=num_kv_heads)


def _fits(family: Family) -> bool:
    """Whether a model has what its family's layout says, and nothing that could change the stream."""
    layout, modules = family.layout, family.modules
    multipliers = {re.split(r"[.}]", point.scale)[-1] for point in layout.points.values() if point.scale}
    for template, names in layout.children.items():
        for path in family.paths(template):
            module = modules.get(path)
            if module is None or not _has(module, names.split()) or _scales(module, multipliers):
                return False
    needed = [point.path for point in layout.points.values() if not point.optional]
    needed += [] if layout.mixed else [layout.attention]
    return all(path in modules for template in needed for path in family.paths(template))


def _stream(root: str, modules: Mapping[str, nn.Module]) -> Literal["encoder", "decoder"] | None:
    """Which side of an encoder-decoder a stack is."""
    whole = modules[""]
    if not isinstance(whole, nn.Transformer) and not getattr(
        getattr(whole, "config", None), "is_encoder_decoder", False
    ):
        return None
    side = root.removesuffix(".").rpartition(".")[2]
    return side if side in ("encoder", "decoder") else None  # type: ignore[return-value]


def _has(module: nn.Module, children: Sequence[str]) -> bool:
    """Whether a module has exactly these children, with or without those that end in `?`."""
    names = {name for name, _ in module.named_children()}
    needed = {name for name in children if not name.endswith("?")}
    return needed <= names <= {name.removesuffix("?") for name in children}


def _scales(module: Any, multipliers: Collection[str]) -> bool:
    """Whether a module may scale the residual stream, by parameters or a number of its own that isn't one of
    `multipliers`: ESM C's `scaling_factor`, Doge's `input_residual`, the `attn_residual_add_idx` of Beam.
    """
    numbers = {name: value for name, value in vars(module).items() if name not in multipliers and "dropout" not in name}
    return any(True for _ in module.parameters(recurse=False)) or any(
        value not in (0.0, 1.0) and (isinstance(value, float) or (isinstance(value, int) and "residual" in name))
        for name, value in numbers.items()
    )
