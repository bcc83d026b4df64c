"""Where values are seen: sites, and the modules of a model that they mean."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcache.attention import Statistic, as_statistics
from distcache.errors import SiteError
from distcache.families import Family, Part, family_of, find_families, module_paths
from distcache.strategies import AveragePattern, Columns, Fieldwise, Grouped, Mean, Strategy, as_strategy, describe
from distcache.strategies.positions import Align, Positions, as_stretch
from distcache.tokens import Tokens, as_selector

Layout = Literal["BSD", "SBD", "ND"]
OneClass = type[nn.Module]
Classes = OneClass | tuple[OneClass, ...]
Reduce = Strategy | str | Callable[[list[Tensor]], Tensor]

ATTENTION_SITES = ("avg_attn_pattern", "pattern", "attn_stats")


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model, and what of it to keep.

    Args:
        name_or_path: a named site of a known family ("resid_out"), or a module's path, with `{layer}` for a number.
        io: which side of the module, for paths; named sites know theirs.
        tokens: "all": every valid token is a row; "last": the last valid one; "mean": one row a sample, in float32 at
            least; a slice, a number or a list of numbers counts valid tokens, and a sample that is too short has no
            such row. Rows come in the order of samples and tokens, each once. Values without a token dim, [B, D],
            give one row a sample.
        reduce: a strategy for the rows, or a dict of suffix to strategy, which gives several keys from one hook
            (`{key}_{suffix}`; the suffix "" is the key itself); None leaves it to the cache.
        layers: only these; None for all.
        dtype, device: what rows that are kept are converted and moved to.
        transform: `transform(x_n, columns)` on the selected rows [n, …]; keeps their number and writes to none, because
            they may be the model's own.
        layout: the order of the value's dims, where it isn't the usual [B, S, …]: "SBD" for tokens first, "ND" for rows
            of tokens, [B·S, …] or the valid ones alone; "BSD" for tokens along dim 1 where the model's input has none,
            as sounds have.
        optional: whether the site may report nothing in a pass, as routed experts do.
        key: the key's name, with `{layer}` where the path has it (and `{head}` for heads), or `{path}` for the path.
        heads: of an attention site: only these query heads; None for all.
        queries, keys: of an attention site: only these positions of queries and of keys, a slice or a range; None for
            all. Weights are of whole rows in any case. Of statistics queries alone.
        align: where these positions count from, and what averages are aligned at: 0, 1, … from each text's first token,
            or with "end" …, −2, −1 to its last.
        stats: of "attn_stats": what is asked of patterns, by name ("entropy", "first", "previous", "self", "duplicate",
            "induction", "distance", "pooled") or a `Statistic` (`dc.Distance`, `dc.Pooled`, `dc.ByClass`).
        type: every module of this class, or of these, below the path if there is one; keys are their paths, if `key`
            says nothing else.

    `SiteError` for a side, tokens, layers or strategies that mean nothing.
    """

    name_or_path: str | None = None
    io: Literal["input", "output"] = "output"
    tokens: Tokens = "all"
    reduce: Reduce | Mapping[str, Reduce] | None = None
    layers: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    transform: Callable[[Tensor, Columns], Tensor] | None = None
    layout: Layout | None = None
    optional: bool = False
    key: str | None = None
    type: Classes | None = None
    heads: Sequence[int] | None = None
    stats: Sequence[str | Statistic] = ()
    queries: Positions = None
    keys: Positions = None
    align: Align = "start"

    def __post_init__(self) -> None:
        if self.name_or_path is None and self.type is None:
            raise SiteError("a site needs a name, a module's path, or type= for every module of a class.")
        if self.io not in ("input", "output"):
            raise SiteError(f"site {self.name_or_path!r}: io is 'input' or 'output', got {self.io!r}.")
        if self.layers is not None and (isinstance(self.layers, str) or not isinstance(self.layers, Sequence)):
            raise SiteError(f"site {self.name_or_path!r}: layers is a list of numbers or None, got {self.layers!r}.")
        if self.layout not in (None, "BSD", "SBD", "ND"):
            raise SiteError(f"site {self.name_or_path!r}: layout is 'BSD', 'SBD' or 'ND', got {self.layout!r}.")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise SiteError(f"site {self.name_or_path!r}: dtype is one of torch's, got {self.dtype!r}.")
        try:
            torch.device("cpu" if self.device is None else self.device)
        except (RuntimeError, TypeError) as error:
            raise SiteError(f"site {self.name_or_path!r}: device is 'cpu', 'cuda', …, got {self.device!r}.") from error
        if self.type is not None:
            self.classes()
        as_selector(self.tokens, self.named)
        self.strategies()

    @property
    def named(self) -> str:
        """The name or the path; "" for the model itself, or everywhere."""
        return self.name_or_path or ""

    def classes(self) -> tuple[OneClass, ...]:
        """Those of `type`. `SiteError` for what is no class of modules."""
        classes = self.type if isinstance(self.type, tuple) else (self.type,)
        if not classes or not all(isinstance(found, type) and issubclass(found, nn.Module) for found in classes):
            raise SiteError(f"a site's type is a class of modules, or a tuple of them, got {self.type!r}.")
        return classes  # type: ignore[return-value]

    def strategies(self) -> dict[str, Strategy | None]:
        """Suffix -> strategy; None where the cache that rows go into decides."""
        if self.reduce is None:
            return {"": None}
        by_suffix = self.reduce if isinstance(self.reduce, Mapping) else {"": self.reduce}
        if not by_suffix:
            raise SiteError(f"site {self.name_or_path!r}: reduce is an empty dict; give suffixes and strategies.")
        try:
            strategies = {suffix: as_strategy(strategy) for suffix, strategy in by_suffix.items()}
            for strategy in strategies.values():
                describe(strategy)  # raises for a class without a name, which no rank could tell another
                if isinstance(strategy, Fieldwise) and strategy.dim not in ("auto", 0):
                    raise ValueError(f"rows lie along dim 0, {strategy} would reduce another: leave out dim=.")
            return dict(strategies)
        except (TypeError, ValueError) as error:
            raise SiteError(f"site {self.name_or_path!r}: {error}") from error


Sites = Sequence[str | Site] | Mapping[str, str | Site] | str | Site


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A site at one module: what a hook needs to know.

    `keys`: one, or one per head that lies in the last dim. `part`: what of the module's value the site is,
    if not the whole. `strategies`: as of `Site.strategies`. `layout`: of the value, where it isn't the site's.
    `stream`: the one to be seen in, of a module that runs in several.
    """

    site: Site
    module: nn.Module
    io: Literal["input", "output"]
    keys: tuple[str, ...]
    where: str
    per_head: bool = False
    part: Part | None = None
    strategies: Mapping[str, Strategy | None] = field(default_factory=dict)
    layout: Layout | None = None
    stream: str | None = None

    def all_keys(self) -> Iterator[str]:
        """Every key that it fills."""
        for suffix in self.strategies:
            yield from self.suffixed(suffix)

    def suffixed(self, suffix: str) -> tuple[str, ...]:
        """The keys of one strategy."""
        return tuple(f"{key}_{suffix}" for key in self.keys) if suffix else self.keys


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTarget:
    """An attention site at one module: averages of patterns, statistics of them, or without a strategy each sample's.

    `keys`: of each head; or `whole`, one for all heads; or of each of `stats`. `heads`: None for all, `family_heads` in
    number. `by_function`: reached where it calls torch's own function, not through transformers.
    """

    site: Site
    module: nn.Module
    keys: tuple[str, ...]
    where: str
    strategy: Strategy | None
    heads: tuple[int, ...] | None = None
    whole: bool = False
    stats: tuple[Statistic, ...] = ()
    family_heads: int | None = None
    by_function: bool = False

    @property
    def num_heads(self) -> int:
        """How many heads it is of; of a module of torch's or a user's own what it says of itself, else 1."""
        if self.heads is not None:
            return len(self.heads)
        return int(getattr(self.module, "num_heads", 1)) if self.family_heads is None else self.family_heads

    def all_keys(self) -> Iterator[str]:
        return iter(self.keys)


def resolve_sites(model: nn.Module, sites: Sites) -> tuple[list[Target], list[AttentionTarget]]:
    """The modules that sites mean. `SiteError`, before any forward pass, for a site that means none, a template
    without its placeholder, or two sites with one key.
    """
    paths = module_paths(model)
    families: list[Family] | None = None
    targets: list[Target] = []
    attention: list[AttentionTarget] = []
    for site in _as_sites(sites):
        if site.type is not None or not site.named.isidentifier() or site.named in paths:
            found = _path_targets(paths, site) if site.type is None else _typed_targets(paths, site)
            if any(map(_is_average, site.strategies().values())):
                attention.extend(_function_targets(site, found))
            else:
                targets.extend(found)
            continue
        families = find_families(model) if families is None else families
        family = family_of(model, families, site.named)
        if family.plain(site.named) in ATTENTION_SITES:
            attention.extend(_attention_targets(family, site))
        else:
            targets.extend(_named_targets(family, site))
    _check_keys([*targets, *attention])
    return targets, attention


def _as_sites(sites: Sites) -> list[Site]:
    if isinstance(sites, (str, Site)):
        sites = [sites]
    pairs: list[tuple[str | None, str | Site]]
    pairs = list(sites.items()) if isinstance(sites, Mapping) else [(None, site) for site in sites]
    if not pairs:
        raise SiteError("no sites were given: name at least one, such as 'resid_out'.")
    found = []
    for key, site in pairs:
        if not isinstance(site, (str, Site)):
            raise SiteError(f"a site is a name, a path or a Site, got {type(site).__name__}.")
        site = Site(site) if isinstance(site, str) else site
        found.append(site if key is None else replace(site, key=key))
    return found


def _named_targets(family: Family, site: Site) -> list[Target]:
    name = site.named
    point = family.point(name)
    per_head = family.plain(name).startswith("head_")
    per_layer = "{block}" in point.path
    template = site.key or (f"{name}_L{{layer}}H{{head}}" if per_head else f"{name}_{{layer}}" if per_layer else name)
    _check_template(site, template, {name for name, there in (("layer", per_layer), ("head", per_head)) if there})
    found = []
    for layer in _wanted_layers(site, range(family.num_layers) if per_layer else None):
        path = family.path(point.path, layer)
        heads = range(family.heads(point)) if per_head else [0]
        keys = tuple(template.format(layer=layer, head=head) for head in heads)
        module, where = family.module(name, point.path, layer), f"{name!r} at {path}"
        part, layout = family.part(point, layer), family.value_layout(point)
        strategies = site.strategies()
        found.append(Target(site, module, point.io, keys, where, per_head, part, strategies, layout, family.stream))
    return found


def _attention_targets(family: Family, site: Site) -> list[AttentionTarget]:
    name, kind = site.named, family.plain(site.named)
    family.check(name)
    stats = as_statistics(site.stats) if kind == "attn_stats" else ()
    template = site.key or (f"{name}_{{stat}}_{{layer}}" if stats else f"{name}_L{{layer}}H{{head}}")
    whole = kind == "avg_attn_pattern" and "head" not in _fields(site, template)
    _check_template(site, template, {"layer", "stat"} if stats else {"layer"} if whole else {"layer", "head"})
    known = ("reduce", "layers", "optional", "key", "heads", "queries", "align", "stats" if stats else "keys")
    if site != Site(name, **{option: getattr(site, option) for option in known}):
        raise SiteError(f"site {name!r} is of whole patterns: only {', '.join(known)} mean something to it.")
    heads = _wanted_heads(site, family.num_heads)
    found = []
    for layer in _wanted_layers(site, range(family.num_layers)):
        fields: list[dict[str, Any]]
        fields = [{"stat": stat.name} for stat in stats] if stats else [{}] if whole else [{"head": h} for h in heads]
        keys = tuple(template.format(layer=layer, **field) for field in fields)
        module = family.module(name, family.layout.attention, layer)
        strategy, some = _attention_strategy(site, kind), heads if site.heads is not None else None
        where = f"{name!r} at layer {layer}"
        found.append(AttentionTarget(site, module, keys, where, strategy, some, whole, stats, family.num_heads))
    return found


def _attention_strategy(site: Site, kind: str) -> Strategy | None:
    """What an attention site does with patterns; None: each sample's is kept. `SiteError`."""
    given = site.strategies().get("") if len(site.strategies()) == 1 else None
    for name in ("queries", "keys"):
        as_stretch(getattr(site, name), site.align, name)
    if kind == "pattern":
        if site.reduce is not None:
            raise SiteError(
                f"site {site.named!r} keeps each sample's pattern: leave out reduce=, or take 'avg_attn_pattern'."
            )
        return None
    if kind == "attn_stats":
        found = Mean() if site.reduce is None else given
        inner = found.strategy if isinstance(found, Grouped) else found
        if not isinstance(inner, Mean) or inner.ragged:
            raise SiteError(
                f"site {site.named!r} averages over queries, weighing each sample by how many it has: leave out "
                "reduce=, or give Mean(accumulate=…) or Grouped(Mean(), …)."
            )
        return found
    found = AveragePattern() if site.reduce is None else given
    average = found.strategy if isinstance(found, Grouped) else found
    if not isinstance(average, AveragePattern):
        raise SiteError(
            f"site {site.named!r} brings its own state, the sum of patterns and the number of samples that have each "
            "query: leave out reduce=, or give AveragePattern(size=…) to fix the extent, or Grouped(AveragePattern("
            "size=…), …) for averages by label."
        )
    if isinstance(found, Grouped) and found.by in ("position", "token_id"):
        raise SiteError(
            f"site {site.named!r}: patterns are of whole texts, which have no {found.by}: group them by a column of "
            "one entry a sample, such as by='label'."
        )
    asked: dict[str, Any] = {name: getattr(site, name) for name in ("queries", "keys", "align")}
    if asked == dict(queries=None, keys=None, align="start"):
        return found
    if average != replace(average, queries=None, keys=None, align="start"):
        raise SiteError(
            f"site {site.named!r}: say once which positions are averaged: at the site, queries=, keys=, align=, or in "
            f"its strategy {average}."
        )
    average = replace(average, **asked)
    return replace(found, strategy=average) if isinstance(found, Grouped) else average


def _wanted_heads(site: Site, num_heads: int) -> tuple[int, ...]:
    if site.heads is None:
        return tuple(range(num_heads))
    missing = sorted(set(site.heads) - set(range(num_heads)))
    if missing or not site.heads or len(set(site.heads)) < len(site.heads):
        raise SiteError(
            f"site {site.named!r}: heads={list(site.heads)}: expected some of 0..{num_heads - 1}, each once."
        )
    return tuple(site.heads)


def _is_average(strategy: Strategy | None) -> bool:
    return isinstance(strategy.strategy if isinstance(strategy, Grouped) else strategy, AveragePattern)


def _function_targets(site: Site, found: Sequence[Target]) -> list[AttentionTarget]:
    """Modules of a path or a class, whose attention goes through torch's own function: `reduce` is an
    `AveragePattern`.
    """
    known = ("name_or_path", "type", "reduce", "layers", "optional", "key", "heads", "queries", "keys", "align")
    if site != Site(**{option: getattr(site, option) for option in known}):
        raise SiteError(f"site {site.named!r} is of whole patterns: only {', '.join(known[1:])} mean something to it.")
    strategy, heads = _attention_strategy(site, "avg_attn_pattern"), None if site.heads is None else tuple(site.heads)
    return [
        AttentionTarget(site, t.module, t.keys, t.where, strategy, heads, whole=True, by_function=True) for t in found
    ]


def _path_targets(paths: Mapping[str, tuple[str, nn.Module]], site: Site) -> list[Target]:
    """The modules of a path, or of a template of paths; `paths`: as of `module_paths`."""
    path, template = site.named, site.key or "{path}"
    where = repr(site.key or path)
    in_path, in_key = _fields(site, path), _fields(site, template)
    unknown = sorted((in_path - {"layer"}) | (in_key - {"layer", "path"}))
    if unknown:
        raise SiteError(f"site {path!r}: unknown placeholder {unknown}; known are {{layer}}, and {{path}} in the key.")
    if in_path != in_key - {"path"} and "path" not in in_key:
        lacking = "key template" if in_path else "path"
        raise SiteError(
            f"site {where}: {path!r}: the {lacking} lacks {{layer}}. A template and its path have the same "
            "placeholder, as in {'resid_out_{layer}': 'model.layers.{layer}'}."
        )
    pattern = re.compile(
        re.escape(path).replace(r"\{layer\}", r"(?P<layer>\d+)", 1).replace(r"\{layer\}", "(?P=layer)")
    )
    matches = [(match, *paths[spelled]) for spelled in paths if (match := pattern.fullmatch(spelled))]
    # Paths with parts of wrappers in them count where no bare path does. One module may be spelled in several ways.
    bare = {name: (match, module) for match, name, module in matches if match[0] == name}
    found_at = bare or {name: (match, module) for match, name, module in matches}
    if not found_at:
        near = sorted({re.sub(r"\d+", "{layer}", name) for name, _ in paths.values() if name})
        raise SiteError(
            f"site {where}: no module of the model matches {path!r}. It has {', '.join(near[:12])}"
            f"{', …' if len(near) > 12 else '.'}"
        )
    layers = [int(match["layer"]) if in_path else None for match, _ in found_at.values()]
    wanted = _wanted_layers(site, [n for n in layers if n is not None] if in_path else None)
    found = []
    for (name, (_, module)), layer in zip(found_at.items(), layers, strict=True):
        if layer in wanted:
            key = template.format(layer=layer, path=name)
            at = f"{path!r} ({name})" if in_path else f"{path!r}"
            found.append(Target(site, module, site.io, (key,), at, strategies=site.strategies()))
    return found


def _typed_targets(paths: Mapping[str, tuple[str, nn.Module]], site: Site) -> list[Target]:
    """The modules of a class, each once, by its bare path."""
    template, below, classes = site.key or "{path}", site.named, site.classes()
    of_type = f"site of type {' or '.join(found.__name__ for found in classes)}"
    _check_template(site, template, {"path"})
    if below and below not in paths:
        raise SiteError(f"{of_type}: no module of the model has the path {below!r}, below which to look for it.")
    if site.layers is not None:
        raise SiteError(f"{of_type}: layers= goes with paths that have {{layer}}: leave it out.")
    start = f"{paths[below][0]}." if below else ""
    found: dict[str, nn.Module] = {}
    for name, module in paths.values():
        if name and name.startswith(start) and isinstance(module, classes) and module not in found.values():
            found[name] = module
    if not found:
        kinds = sorted({type(module).__name__ for name, module in paths.values() if name.startswith(start)})
        where = f"below {below!r}" if below else "in the model"
        raise SiteError(
            f"{of_type}: there is none {where}, where modules are {', '.join(kinds[:12]) or 'none at all'}."
        )
    return [
        Target(site, module, site.io, (template.format(path=name),), repr(name), strategies=site.strategies())
        for name, module in found.items()
    ]


def _fields(site: Site, template: str) -> set[str]:
    """The names of a template's placeholders."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise SiteError(f"site {site.named!r}: cannot read the template {template!r}: {error}.") from error


def _check_template(site: Site, template: str, placeholders: set[str]) -> None:
    if _fields(site, template) != placeholders:
        wanted = " and ".join(f"{{{name}}}" for name in sorted(placeholders, reverse=True)) or "no placeholder"
        raise SiteError(f"site {site.named!r}: the key template {template!r} must have {wanted}.")


def _wanted_layers(site: Site, layers: Sequence[int] | None) -> Sequence[int | None]:
    """Those of `layers` that a site asks for; [None] for a site without layers."""
    if layers is None:
        if site.layers is not None:
            raise SiteError(f"site {site.named!r} has no layers: leave out layers={site.layers!r}.")
        return [None]
    if site.layers is None:
        return layers
    missing = sorted(set(site.layers) - set(layers))
    if missing or not site.layers:
        raise SiteError(f"site {site.named!r}: no layers {missing}; the model has {min(layers)}..{max(layers)}.")
    return [layer for layer in layers if layer in site.layers]


def _check_keys(targets: Sequence[Target | AttentionTarget]) -> None:
    seen: dict[str, str] = {}
    for target in targets:
        for key in target.all_keys():
            if key in seen:
                raise SiteError(
                    f"two sites give the key {key!r}: {seen[key]} and {target.where}. Give one of them a key template: "
                    "{'other_{layer}': Site(…)}."
                )
            seen[key] = target.where
