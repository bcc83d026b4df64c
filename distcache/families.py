"""Where the named points of transformers lie: a table of model families, found by a model's structure.

A family is an entry in `LAYOUTS`: the path of its blocks, the children that a block has, and for each named
point a module and a side of it. Names mean the same everywhere, so that these hold to the last bit that the
model itself keeps:

    resid_in + attn_out = resid_mid        resid_mid + mlp_out = resid_out

A family that has no such point says why (`absent`), and asking for it raises. `queries` and `keys` are what the
projections give, before any norm or rotation of heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from distcache.errors import SiteError

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, slots=True)
class Point:
    """A named point: one side of a module.

    `path`: with `{root}` for what stands before the blocks' path, `{block}` for a block, `{layer}` for its number.
    `heads`: whether the last dim holds query heads or key-value heads side by side. `part`: (i, n) where it is the
    i-th of n equal parts of the last dim.
    """

    path: str
    io: Literal["input", "output"] = "output"
    heads: Literal["query", "key"] | None = None
    part: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A family's entry in the table.

    `children`: exactly those that a block has; more, or fewer, is another family, whose equations may not hold.
    `around`: by path, those that may stand beside the blocks; any other could change what goes in.
    `head_counts`: an attention module's (query heads, key-value heads); what has no such attributes is another family.
    """

    name: str
    block: str
    children: frozenset[str]
    around: Mapping[str, frozenset[str]]
    attention: str
    head_counts: Callable[[Any], tuple[int, int]]
    points: Mapping[str, Point]
    absent: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = (
    Layout(  # SmolLM, Mistral, Qwen 2 and 3 too
        name="llama",
        block="{root}layers.{layer}",
        children=frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}),
        around={"{root}": frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})},
        attention="{block}.self_attn",
        head_counts=lambda a: (a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim),
        points={
            "embed": Point("{root}embed_tokens"),
            "resid_in": Point("{block}", "input"),
            "attn_in": Point("{block}.input_layernorm"),
            "queries": Point("{block}.self_attn.q_proj", heads="query"),
            "keys": Point("{block}.self_attn.k_proj", heads="key"),
            "values": Point("{block}.self_attn.v_proj", heads="key"),
            "attn_z": Point("{block}.self_attn.o_proj", "input", heads="query"),
            "attn_out": Point("{block}.self_attn"),
            "resid_mid": Point("{block}.post_attention_layernorm", "input"),
            "mlp_act": Point("{block}.mlp.down_proj", "input"),
            "mlp_out": Point("{block}.mlp"),
            "resid_out": Point("{block}"),
            "final_norm_out": Point("{root}norm"),
        },
    ),
    Layout(
        name="gpt2",
        block="{root}h.{layer}",
        children=frozenset({"ln_1", "attn", "ln_2", "mlp"}),
        around={"{root}": frozenset({"wte", "wpe", "drop", "h", "ln_f"})},
        attention="{block}.attn",
        # `nf` tells Conv1D from the Linear of GPT-BigCode, which isn't three equal parts.
        head_counts=lambda a: (a.c_attn.nf // 3 // a.head_dim, a.c_attn.nf // 3 // a.head_dim),
        points={
            "embed": Point("{root}drop"),
            "resid_in": Point("{block}", "input"),
            "attn_in": Point("{block}.ln_1"),
            "queries": Point("{block}.attn.c_attn", heads="query", part=(0, 3)),
            "keys": Point("{block}.attn.c_attn", heads="key", part=(1, 3)),
            "values": Point("{block}.attn.c_attn", heads="key", part=(2, 3)),
            "attn_z": Point("{block}.attn.c_proj", "input", heads="query"),
            "attn_out": Point("{block}.attn"),
            "resid_mid": Point("{block}.ln_2", "input"),
            "mlp_act": Point("{block}.mlp.c_proj", "input"),
            "mlp_out": Point("{block}.mlp"),
            "resid_out": Point("{block}"),
            "final_norm_out": Point("{root}ln_f"),
        },
    ),
    Layout(  # RoBERTa and MiniLM too
        name="bert",
        block="{root}encoder.layer.{layer}",
        children=frozenset({"attention", "intermediate", "output"}),
        around={"{root}": frozenset({"embeddings", "encoder", "pooler"}), "{root}encoder": frozenset({"layer"})},
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
        absent={
            "resid_mid": "its blocks normalise after adding, so that nowhere is resid_in + attn_out",
            "final_norm_out": "its blocks end with their own norm: take resid_out of the last layer",
        },
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A layout as one model has it: `root` stands before the paths of its parts."""

    layout: Layout
    root: str
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def name(self) -> str:
        return self.layout.name

    def point(self, name: str) -> Point:
        """The point of a named site; `head_…` sites lie where the whole does. `SiteError` for a name it hasn't."""
        known = self.layout.points
        whole = name.removeprefix("head_")
        if whole in self.layout.absent:
            raise SiteError(f"site {name!r}: the family {self.name} has no such point: {self.layout.absent[whole]}.")
        if whole not in known or (whole != name and known[whole].heads is None):
            heads = [f"head_{site}" for site, point in known.items() if point.heads]
            raise SiteError(
                f"site {name!r} is no module of the model and no named site of the family {self.name}: expected one of "
                f"{', '.join([*known, *heads, 'avg_attn_pattern', 'pattern'])}, or a module's path."
            )
        return known[whole]

    def path(self, template: str, layer: int | None = None) -> str:
        """A module's path, for a layer where the template has one."""
        path = template.replace("{block}", self.layout.block).replace("{root}", self.root)
        return path if layer is None else path.replace("{layer}", str(layer))

    def heads(self, point: Point) -> int:
        """How many heads lie side by side at a point."""
        return self.num_heads if point.heads == "query" else self.num_kv_heads


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path without the parts that wrappers put in."""
    return {bare_name(name): module for name, module in model.named_modules()}


def bare_name(name: str) -> str:
    """A module's path without the parts that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def find_family(model: nn.Module, modules: Mapping[str, nn.Module], site: str) -> Family:
    """The family that a model's structure shows, for a named site. `SiteError` where it shows none, or several."""
    found = [family for layout in LAYOUTS for family in _matches(layout, modules)]
    if len(found) == 1:
        return found[0]
    if found:
        where = ", ".join(f"{family.name} at {family.path('{block}', 0)!r}" for family in found)
        raise SiteError(
            f"site {site!r}: {type(model).__name__} has several stacks of blocks ({where}): record the one you mean, "
            "as in record(model.encoder, …), or name modules by their paths."
        )
    raise SiteError(
        f"site {site!r} is no module of {type(model).__name__}, whose structure is none of the families that named "
        f"sites are known for ({', '.join(layout.name for layout in LAYOUTS)}). Name modules by their paths: "
        "{'resid_out_{layer}': 'model.layers.{layer}'}."
    )


def _matches(layout: Layout, modules: Mapping[str, nn.Module]) -> Iterator[Family]:
    """Every place in a model where a layout fits in full: what fits in part is another family."""
    first = re.escape(layout.block).replace(r"\{root\}", r"((?:.+\.)?)").replace(r"\{layer\}", "0")
    for match in filter(None, map(re.compile(first).fullmatch, modules)):
        family = Family(layout, match[1], 0, 0, 0)
        num_layers = 0
        while family.path("{block}", num_layers) in modules:
            num_layers += 1
        paths = [family.path(point.path, n) for point in layout.points.values() for n in range(num_layers)]
        blocks = [modules[family.path("{block}", n)] for n in range(num_layers)]
        around = {modules.get(family.path(path).removesuffix(".")): names for path, names in layout.around.items()}
        fits = (
            all(path in modules for path in paths)
            and all(_children(block) == layout.children for block in blocks)
            and all(module is not None and _children(module) <= names for module, names in around.items())
            and not any(_scales(module) for module in (*blocks, *around))
        )
        if fits:
            try:
                attention = [modules[family.path(layout.attention, n)] for n in range(num_layers)]
                counts = {layout.head_counts(module) for module in attention}
            except AttributeError:
                continue
            if len(counts) == 1:
                yield Family(layout, match[1], num_layers, *counts.pop())


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _scales(module: Any) -> bool:
    """Whether a module may scale the residual stream, by parameters or a number of its own: Granite's
    `residual_multiplier` and `embedding_multiplier`, ESM C's `scaling_factor`, Doge's `input_residual`.
    """
    numbers = (value for value in vars(module).values() if isinstance(value, float))
    return any(value not in (0.0, 1.0) for value in numbers) or any(True for _ in module.parameters(recurse=False))
