"""Where values are seen and which of their tokens count: sites, templates, masks and token selection.

Legend of names: b samples of a batch, s tokens, n rows that are kept.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcache.errors import SiteError
from distcache.families import Family, find_family
from distcache.strategies import Columns, Strategy, as_strategy

Tokens = Literal["all", "last", "mean"] | slice | Sequence[int] | int
Reduce = Strategy | str | Callable[..., Any]

ATTENTION_SITES = ("avg_attn_pattern", "pattern")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model, and what of it to keep.

    Args:
        name_or_path: a named site of a known family ("resid_out"), or a module path, with `{layer}` for a number.
        io: which side of the module, for paths; named sites know theirs.
        tokens: "all": every valid token is a row; "last": the last valid one; "mean": one row a sample; a slice,
            a number or a list of numbers counts valid tokens, and samples too short for one have no such row.
        reduce: a strategy for the rows, or a dict of suffix to strategy that gives several keys from one hook;
            None keeps the rows.
        layers: only these; None for all.
        dtype, device: what kept rows are converted and moved to.
        transform: `transform(x_n…, columns)` on selected rows; keeps their number.
        optional: whether the site may report nothing in a pass, as routed experts do.
        key: a template for the key's name, with `{layer}` where the path has it and `{path}` for the path.
    """

    name_or_path: str
    io: Literal["input", "output"] = "output"
    tokens: Tokens = "all"
    reduce: Reduce | Mapping[str, Reduce] | None = None
    layers: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    transform: Callable[[Tensor, Columns], Tensor] | None = None
    optional: bool = False
    key: str | None = None

    def __post_init__(self) -> None:
        if self.io not in ("input", "output"):
            raise SiteError(f"site {self.name_or_path!r}: io is 'input' or 'output', got {self.io!r}.")
        token_selector(self.tokens, self.name_or_path)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A site at one module: what a hook needs to know.

    `keys`: one, or one per head. `part`: (start, stop) of the last dim of a fused projection.
    `strategies`: suffix -> strategy; empty where rows are kept.
    """

    site: Site
    module: nn.Module
    io: Literal["input", "output"]
    keys: tuple[str, ...]
    where: str
    heads: int | None = None
    part: Callable[[Tensor], Tensor] | None = None
    strategies: Mapping[str, Strategy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTarget:
    """An attention site at one module: its averages, or each sample's patterns."""

    site: Site
    module: nn.Module
    keys: tuple[str, ...]
    where: str
    averaged: bool
    strategy: Strategy | None


def bare_name(name: str) -> str:
    """A module's path without the parts that wrappers put in."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts)


def resolve_sites(
    model: nn.Module, sites: Sequence[str | Site] | Mapping[str, str | Site] | str | Site
) -> tuple[list[Target], list[AttentionTarget]]:
    """The modules that sites mean. SiteError, before any forward pass, for a site that means none, a template
    without its placeholder, or two sites with one key.
    """
    wanted = _as_sites(sites)
    modules = {bare_name(name): module for name, module in model.named_modules()}
    family: Family | None = None
    targets: list[Target] = []
    attention: list[AttentionTarget] = []
    for site in wanted:
        if site.name_or_path.isidentifier() and site.name_or_path not in modules:
            family = family or find_family(model)
            if site.name_or_path in ATTENTION_SITES:
                attention.extend(_attention_targets(model, family, site))
            else:
                targets.extend(_named_targets(modules, family, site))
        else:
            targets.extend(_path_targets(modules, site))
    _check_keys(targets, attention)
    return targets, attention


def _as_sites(sites: Sequence[str | Site] | Mapping[str, str | Site] | str | Site) -> list[Site]:
    if isinstance(sites, (str, Site)):
        sites = [sites]
    if isinstance(sites, Mapping):
        found = []
        for key, site in sites.items():
            site = Site(site) if isinstance(site, str) else site
            found.append(replace(site, key=key))
    else:
        found = [Site(site) if isinstance(site, str) else site for site in sites]
    for site in found:
        if not isinstance(site, Site):
            raise SiteError(f"a site is a name, a path or a Site, got {type(site).__name__}.")
    if not found:
        raise SiteError("no sites were given: name at least one, such as 'resid_out'.")
    return found


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _wanted(site: Site, layer: int) -> bool:
    return site.layers is None or layer in site.layers


def _check_layers(site: Site, found: Sequence[int]) -> None:
    missing = sorted(set(site.layers or ()) - set(found))
    if missing:
        raise SiteError(f"site {site.name_or_path!r}: no layers {missing}; the model has {min(found)}..{max(found)}.")


def _strategies(site: Site) -> dict[str, Strategy]:
    if site.reduce is None:
        return {}
    if isinstance(site.reduce, Mapping):
        if not site.reduce:
            raise SiteError(f"site {site.name_or_path!r}: reduce is an empty dict; give suffixes and strategies.")
        return {suffix: as_strategy(strategy) for suffix, strategy in site.reduce.items()}
    return {"": as_strategy(site.reduce)}


def _named_targets(modules: Mapping[str, nn.Module], family: Family, site: Site) -> list[Target]:
    name = site.name_or_path
    point = family.point(name)
    template = site.key or family.key(name)
    per_head = name.startswith("head_")
    per_layer = "{layer}" in point.path
    if per_layer != ("layer" in _fields(template)) or ("head" in _fields(template) and not per_head):
        raise SiteError(f"site {name!r}: the key template {template!r} must have {{layer}}" if per_layer
                        else f"site {name!r}: the key template {template!r} can have no placeholder.")  # fmt: skip
    if per_head and "head" not in _fields(template):
        raise SiteError(f"site {name!r}: the key template {template!r} must have {{head}}.")
    layers = range(family.num_layers) if per_layer else [None]
    if per_layer:
        _check_layers(site, range(family.num_layers))
    found = []
    for layer in layers:
        if layer is not None and not _wanted(site, layer):
            continue
        path = point.path.format(layer=layer) if per_layer else point.path
        if path not in modules:
            raise SiteError(
                f"site {name!r}: the family {family.name} has it at {path!r}, but the model has no such module."
            )
        heads = point.heads if per_head else None
        keys = (
            tuple(template.format(layer=layer, head=h) for h in range(heads))
            if heads
            else (template.format(layer=layer),)
        )
        found.append(
            Target(
                site,
                modules[path],
                point.io,
                keys,
                f"{name!r} at {path}",
                heads,
                point.cut,
                _strategies(site),
            )
        )
    return found


def _attention_targets(model: nn.Module, family: Family, site: Site) -> list[AttentionTarget]:
    name = site.name_or_path
    template = site.key or family.key(name)
    if _fields(template) != {"layer", "head"}:
        raise SiteError(f"site {name!r}: the key template {template!r} must have {{layer}} and {{head}}.")
    modules = family.attention_modules(model)
    _check_layers(site, list(modules))
    strategies = _strategies(site)
    if set(strategies) - {""}:
        raise SiteError(f"site {name!r} gives one key a head: reduce is one strategy, not a dict.")
    found = []
    for layer, module in modules.items():
        if _wanted(site, layer):
            keys = tuple(template.format(layer=layer, head=head) for head in range(family.num_heads))
            averaged = name == "avg_attn_pattern"
            found.append(
                AttentionTarget(site, module, keys, f"{name!r} at layer {layer}", averaged, strategies.get(""))
            )
    return found


def _path_targets(modules: Mapping[str, nn.Module], site: Site) -> list[Target]:
    path = bare_name(site.name_or_path)
    template = site.key or path
    in_path, in_key = _fields(path), _fields(template) - {"path"}
    if in_path - {"layer"} or in_key - {"layer"}:
        unknown = sorted((in_path | in_key) - {"layer"})
        raise SiteError(
            f"site {path!r}: unknown placeholder {unknown} in {template!r}; known are {{layer}} and {{path}}."
        )
    if in_path != in_key and "path" not in _fields(template):
        lacking = "key template" if in_path else "path"
        raise SiteError(
            f"site {template!r}: {path!r} -> the {lacking} lacks {{layer}}. A template and its path have the same "
            "placeholder, as in {'resid_out_{layer}': 'model.layers.{layer}'}."
        )
    pattern = re.compile(re.escape(path).replace(r"\{layer\}", r"(\d+)") + "$")
    matches = [(name, pattern.match(name), module) for name, module in modules.items()]
    found = [(name, int(m[1]) if in_path else None, module) for name, m, module in matches if m]
    if not found:
        near = sorted({re.sub(r"\d+", "{layer}", name) for name in modules if name})[:12]
        raise SiteError(f"site {template!r}: no module of the model matches {path!r}. It has {', '.join(near)}, …")
    if in_path:
        _check_layers(site, [layer for _, layer, _ in found if layer is not None])
    return [
        Target(site, module, site.io, (template.format(layer=layer, path=name),), f"{path!r} ({name})",
               strategies=_strategies(site))
        for name, layer, module in found
        if layer is None or _wanted(site, layer)
    ]  # fmt: skip


def target_keys(target: Target) -> list[str]:
    """Every key that a target fills."""
    if not target.strategies:
        return list(target.keys)
    return [suffixed(key, suffix) for suffix in target.strategies for key in target.keys]


def suffixed(key: str, suffix: str) -> str:
    return f"{key}_{suffix}" if suffix else key


def _check_keys(targets: Sequence[Target], attention: Sequence[AttentionTarget]) -> None:
    seen: dict[str, str] = {}
    pairs = [(key, t.where) for t in targets for key in target_keys(t)]
    for key, where in [*pairs, *((key, t.where) for t in attention for key in t.keys)]:
        if key in seen:
            raise SiteError(
                f"two sites give the key {key!r}: {seen[key]} and {where}. Name one of them with a key template: "
                f"{{'other_{{layer}}': Site(…)}}."
            )
        seen[key] = where


# -- masks and tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The valid tokens of one forward pass: `valid_bs`, or None where all are; sizes; the samples' numbers.

    `samples` [B]: index of each sample, or its number among those recorded. `columns`: tensors [B] or [B, S].
    """

    num_samples: int
    num_tokens: int | None
    valid_bs: Tensor | None
    samples: Tensor
    indexed: bool
    columns: Mapping[str, Tensor]

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each sample's valid tokens. SiteError where they aren't contiguous."""
        assert self.num_tokens is not None
        if self.valid_bs is None:
            return [(0, self.num_tokens)] * self.num_samples
        valid = self.valid_bs.cpu()
        lengths = valid.sum(1)
        first = valid.int().argmax(1)
        reach = valid.int().cumsum(1).amax(1)
        last = self.num_tokens - valid.flip(1).int().argmax(1)
        if not torch.equal(last - first, torch.where(lengths > 0, reach, last - first)):
            raise SiteError(
                "averaged attention needs each sample's valid tokens in one run, got a mask with holes in it."
            )
        return [(int(a), int(b)) if n else (0, 0) for a, b, n in zip(first, last, lengths, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The rows that one `tokens` selects from one batch; shared by all sites that select alike.

    `at`: (sample, token) of each row; None for all tokens of an unpadded batch. `average`: weights [B, S] of
    tokens="mean".
    """

    columns: Columns
    at: tuple[Tensor, Tensor] | None = None
    average: Tensor | None = None
    per_sample: bool = False

    def rows(self, x_bs: Tensor) -> Tensor:
        """The selected rows [n, …]: a view or a new tensor."""
        if self.average is not None:
            weights = self.average.to(x_bs.device).reshape(*self.average.shape, *[1] * (x_bs.dim() - 2))
            exact = x_bs if x_bs.dtype == torch.float64 else x_bs.float()
            return (exact * weights).sum(1)[self.at[0].to(x_bs.device)]  # type: ignore[index]
        if self.per_sample:
            return x_bs
        if self.at is None:
            return x_bs.flatten(0, 1)
        b, s = self.at
        return x_bs[b.to(x_bs.device), s.to(x_bs.device)]


def token_selector(tokens: Tokens, where: str) -> Any:
    """A hashable form of `tokens`. SiteError for what selects nothing known."""
    if tokens in ("all", "last", "mean"):
        return tokens
    if isinstance(tokens, bool) or isinstance(tokens, str):
        raise SiteError(
            f"site {where!r}: tokens is 'all', 'last', 'mean', a slice, a number or a list, got {tokens!r}."
        )
    if isinstance(tokens, int):
        return (tokens,)
    if isinstance(tokens, slice):
        return ("slice", tokens.start, tokens.stop, tokens.step)
    if isinstance(tokens, Sequence) and all(isinstance(token, int) for token in tokens):
        return tuple(tokens)
    raise SiteError(f"site {where!r}: tokens is 'all', 'last', 'mean', a slice, a number or a list, got {tokens!r}.")


def select(batch: Batch, selector: Any) -> Selection:
    """Work out a selection once for a batch."""
    if batch.num_tokens is None:  # rows are samples: there are no tokens to choose among
        zeros = torch.zeros(batch.num_samples, dtype=torch.int64)
        return Selection(_columns(batch, torch.arange(batch.num_samples), None, zeros), per_sample=True)
    valid = batch.valid_bs
    if valid is None:
        valid = torch.ones(batch.num_samples, batch.num_tokens, dtype=torch.bool)
    valid = valid.cpu()
    lengths = valid.sum(1)
    position_bs = valid.int().cumsum(1) - 1
    if selector == "mean":
        b = lengths.nonzero()[:, 0]
        weights = valid.float() / lengths.clamp_min(1)[:, None]
        return Selection(_columns(batch, b, None, torch.zeros_like(b)), at=(b, b), average=weights)
    if selector == "all":
        chosen = valid
        if batch.valid_bs is None or bool(valid.all()):
            b, s = chosen.nonzero(as_tuple=True)
            return Selection(_columns(batch, b, s, position_bs[b, s]))
    elif selector == "last":
        chosen = valid & (position_bs == (lengths - 1)[:, None])
    else:
        chosen = torch.zeros_like(valid)
        for b_, length in enumerate(lengths.tolist()):
            if selector and selector[0] == "slice":
                wanted = set(range(*slice(*selector[1:]).indices(length)))
            else:
                wanted = {token + length if token < 0 else token for token in selector} & set(range(length))
            if wanted:
                chosen[b_] = valid[b_] & torch.isin(position_bs[b_], torch.tensor(sorted(wanted)))
    b, s = chosen.nonzero(as_tuple=True)
    return Selection(_columns(batch, b, s, position_bs[b, s]), at=(b, s))


def _columns(batch: Batch, b: Tensor, s: Tensor | None, position: Tensor) -> Columns:
    beside = {}
    for name, column in batch.columns.items():
        if column.dim() == 1:
            beside[name] = column[b]
        elif s is not None:
            beside[name] = column[b, s]
    return Columns({"sample": batch.samples[b], "position": position.to(torch.int64), **beside}, batch.indexed)


def find_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """(the model's attention mask, the shape of its first tensor argument), also where passed by position."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
    bound = {**bound, **bound.pop("kwargs", {})} if isinstance(bound.get("kwargs"), Mapping) else dict(bound)
    mask = bound.get("attention_mask")
    shape = None
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(bound.get(name), Tensor):
            shape = tuple(bound[name].shape)
            break
    if shape is None:
        first = next((value for value in bound.values() if isinstance(value, Tensor)), None)
        shape = None if first is None else tuple(first.shape)
    return mask if isinstance(mask, Tensor) else None, shape


def valid_tokens(mask: Tensor | None, shape: tuple[int, ...] | None) -> tuple[int, int | None, Tensor | None]:
    """(B, S or None, valid_bs or None where all tokens are). SiteError for a mask that isn't [B, S]."""
    if mask is not None:
        if mask.dim() != 2:
            raise SiteError(
                f"expected a padding mask [B, S], got {tuple(mask.shape)}. Pass the 2-D one: record(…, mask=mask_bs)."
            )
        if shape is not None and len(shape) >= 2 and tuple(mask.shape) != tuple(shape[:2]):
            raise SiteError(
                f"the mask {tuple(mask.shape)} doesn't fit the input {tuple(shape)}: recording during cached decoding "
                "(generate) is not supported yet; run plain forward passes."
            )
        return mask.shape[0], mask.shape[1], mask != 0
    if shape is None or not shape:
        raise SiteError("the model was called without a tensor: the batch's size is not known. Pass record(…, mask=…).")
    if len(shape) == 1:
        return shape[0], None, None
    return shape[0], shape[1], None
