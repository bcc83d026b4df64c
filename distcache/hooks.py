"""record(): attach hooks at sites, stage what a forward pass shows, fold it when the pass returns, always detach.

A pass that raises half-way leaves nothing behind: what it has shown so far is staged, and dropped when the next
pass begins. Reductions are made inside the hook, because some models overwrite what a hook was shown; only rows
that are kept are copied.

Legend of names: b samples, s tokens, n rows, k keys of one slab (the heads of a layer).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distcache.attention import AttentionCall, pattern, pattern_sum, tap_attention
from distcache.cache import ActivationCache
from distcache.entries import Shown, Slab, registered
from distcache.errors import SchemaMismatch, SiteError, TooLarge
from distcache.memory import available_bytes, human
from distcache.segments import capacity, fits
from distcache.sites import AttentionTarget, Sites, Target, resolve_sites
from distcache.strategies import Columns, Extend, Fieldwise, Strategy, Value
from distcache.tokens import Batch, as_selector, bound_arguments, open_batch

if TYPE_CHECKING:
    from distcache.distributed import DistributedCache


class Recording(ActivationCache):
    """What `record` gives: the cache of what was recorded, and `next` for what belongs to the next forward pass.

    With `into=` it stays empty, and a `cat` of it changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorder: _Recorder | None = None

    def next(self, index: Iterable[int] | Tensor | None = None, mask: Tensor | None = None, **columns: Tensor) -> None:
        """Set index, mask and columns of the next forward pass: one entry per sample, or per token. See `record`.

        RuntimeError after the block has ended.
        """
        if self._recorder is None:
            raise RuntimeError("next() belongs inside the block: with dc.record(…) as rec: rec.next(index=…).")
        self._recorder.expect(index, mask, columns)


@contextlib.contextmanager
def record(
    model: nn.Module,
    sites: Sites,
    into: ActivationCache | DistributedCache | None = None,
    *,
    mask: Tensor | None = None,
    index: Iterable[int] | Tensor | None = None,
    **columns: Tensor,
) -> Iterator[Recording]:
    """Record sites of a model during forward passes, `model(…)`, in the block. Not a collective.

    Gives an `ActivationCache`: kept sites hold their rows [n, …], reduced ones a state. Hooks are off at the end,
    whatever happened, and the model computes what it would have computed. A compiled model runs eagerly meanwhile,
    because compiled graphs leave hooks out without a word.

    Args:
        model: the module that is called. Its parts alone must not be: `SiteError`.
        sites: names of a known family, paths, `Site`s, or a dict of key template to one of these.
        into: accumulate straight into this cache, by the strategies that it has when the block opens; for a
            `DistributedCache`, into its delta, in deferred mode. The sites' own strategies win.
        mask: padding [B, S], non-zero for valid tokens; None: the model's own `attention_mask`, else all are valid.
        index: the samples' places in the data set, one entry per sample [B].
        columns: what to keep beside each row: tensors [B], or [B, S] per token.

    mask, index and columns belong to one forward pass: set those of a further one with `next`.

    Raises `SiteError` before the first pass for sites that can't be, in a pass for values and masks that don't fit, and
    at a pass's end for a site that reported nothing; `TooLarge` before the pass whose accumulators wouldn't fit;
    TypeError if `into` is no cache.
    """
    targets, attention = resolve_sites(model, sites)
    local = Recording()
    recorder = _Recorder(model, targets, attention, local, into)
    recorder.expect(index, mask, columns)
    local._recorder = recorder
    try:
        with recorder.attached():
            yield local
    finally:
        local._recorder = None


class _Recorder:
    """The passes of one `record` block."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        attention: Sequence[AttentionTarget],
        local: Recording,
        into: ActivationCache | DistributedCache | None,
    ) -> None:
        self.model = model
        self.targets = targets
        self.attention: dict[int, list[AttentionTarget]] = {}  # by the id of their module
        for target in attention:
            self.attention.setdefault(id(target.module), []).append(target)
        self.local = local
        self.into = into
        if into is not None and not isinstance(into, ActivationCache) and not hasattr(into, "_need_deferred"):
            raise TypeError(f"into is an ActivationCache or a DistributedCache, got {type(into).__name__}.")
        self.selectors = {id(target): as_selector(target.site.tokens, target.where) for target in targets}
        self.strategies = {id(target): self._strategies(target) for target in targets}
        everything: list[Target | AttentionTarget] = [*targets, *attention]
        self.order = [key for target in everything for key in target.all_keys()]
        self.expected = [target for target in everything if not target.site.optional]
        self.batch: Batch | None = None
        self.slabs: list[Slab] = []
        self.shown: list[Shown] = []
        self.seen: set[int] = set()
        self.index: Iterable[int] | Tensor | None = None
        self.mask: Tensor | None = None
        self.columns: Mapping[str, Tensor] = {}
        self.used = False  # whether a pass has used up index, mask and columns
        self.indexed: bool | None = None  # whether passes have come with an index
        self._check_room(None)

    def expect(self, index: Iterable[int] | Tensor | None, mask: Tensor | None, columns: Mapping[str, Tensor]) -> None:
        taken = sorted(columns.keys() & {"sample", "position"})
        if taken:
            raise SiteError(f"columns {taken} are every row's own already: give yours other names.")
        self.index = index if index is None or isinstance(index, (Tensor, int)) else list(index)
        self.mask, self.columns, self.used = mask, columns, False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # Compiled graphs leave hooks out without a word. Always, and not only where a module looks compiled: a
            # function around the model may be, or the model in the block. 5 µs; 0.8 s once, to import the compiler.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Hooks of one module run in the order they came: a pass must be opened before and closed after its sites.
            stack.callback(self.model.register_forward_pre_hook(self._open, with_kwargs=True).remove)
            for target in self.targets:
                if target.io == "input":
                    handle = target.module.register_forward_pre_hook(self._before(target), with_kwargs=True)
                else:
                    handle = target.module.register_forward_hook(self._after(target))
                stack.callback(handle.remove)
            if self.attention:
                modules = [target.module for targets in self.attention.values() for target in targets[:1]]
                stack.enter_context(tap_attention(modules, self._attend))
            stack.callback(self.model.register_forward_hook(self._close).remove)
            yield

    # -- one pass ----------------------------------------------------------------------------------------------

    def _open(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _recomputing():
            return
        self.batch, self.slabs, self.shown, self.seen = None, [], [], set()  # what a pass that raised has left
        if self.used and (self.index is not None or self.mask is not None or self.columns):
            raise SiteError(
                "index, mask and columns given to record() belong to one forward pass, and this is a further one: call "
                "rec.next(index=…) before it."
            )
        if self.indexed not in (None, self.index is not None):
            raise SiteError(
                "passes of one record() all have an index or none has: give each its own, rec.next(index=…)."
            )
        first = self._sink()._num_samples
        given = {"mask": self.mask, "index": self.index, "columns": self.columns, "first": first}
        with torch.inference_mode(False):  # or columns could not be written to later
            batch = open_batch(self.model, args, kwargs, **given)  # type: ignore[arg-type]
        if self.attention:
            if batch.num_tokens is None:
                raise SiteError("attention sites need token ids [B, S] or embeddings [B, S, D] as the model's input.")
            self._check_room(max((stop - start for start, stop in batch.spans), default=0))
        self.batch = batch

    def _before(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _recomputing():
                self._see(target, args or bound_arguments(module, args, kwargs))

        return hook

    def _after(self, target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not _recomputing():
                self._see(target, output)

        return hook

    def _see(self, target: Target, shown: Any) -> None:
        batch = self._current(target)
        x = _first_tensor(shown, target.where).detach()
        with _apart(x.device):
            if target.part is not None:
                i, n = target.part
                x = x.unflatten(-1, (n, -1))[..., i, :]
            x_n, columns = self._rows(target, batch, x)
            if target.site.transform is not None:
                x_n = _transformed(target, x_n, columns)
            if target.per_head:
                if x_n.dim() < 2 or x_n.shape[-1] % len(target.keys):
                    raise SiteError(
                        f"site {target.where}: expected {len(target.keys)} heads side by side in the last dim, got "
                        f"rows of {tuple(x_n.shape[1:])}."
                    )
                x_n = x_n.unflatten(-1, (len(target.keys), -1))
            kept: Tensor | None = None
            for suffix, strategy in self.strategies[id(target)].items():
                keys = target.suffixed(suffix)
                if isinstance(strategy, Fieldwise):
                    self.slabs.append(_reduced(target, keys, strategy, Value(x_n, rows=True, columns=columns)))
                    continue
                kept = _own(x_n, x, target.site.dtype, target.site.device) if kept is None else kept
                for k, key in enumerate(keys):
                    part = kept[:, k] if target.per_head else kept
                    self.shown.append(Shown(key, Value(part, rows=True, columns=columns), strategy))

    def _rows(self, target: Target, batch: Batch, x: Tensor) -> tuple[Tensor, Columns]:
        """The rows of a site's value that count, [n, …], and what is known of them."""
        leading = (batch.num_samples, batch.num_tokens)
        if batch.num_tokens is not None and x.dim() > 2 and tuple(x.shape[:2]) == leading:
            selection = batch.select(self.selectors[id(target)])
            return selection.rows(x), selection.columns
        if x.dim() > 0 and len(x) == batch.num_samples and (batch.num_tokens is None or x.dim() == 2):
            return x, batch.per_sample
        raise SiteError(
            f"site {target.where}: expected a value [B, S, …] = {leading}, or one row a sample, "
            f"[{batch.num_samples}, …], got {tuple(x.shape)}. Hook a module that keeps samples (and tokens) apart."
        )

    def _attend(self, call: AttentionCall) -> None:
        for target in self.attention[id(call.module)]:
            batch = self._current(target)
            with _apart(call.query_bhqd.device):
                if target.strategy is None:
                    patterns = [pattern(call, batch.spans, b) for b in range(batch.num_samples)]
                    for k, key in enumerate(target.keys):
                        one_each = [pattern_hll[k] for pattern_hll in patterns]
                        self.shown.append(Shown(key, Value(one_each, columns=batch.per_sample), Extend()))
                    continue
                lengths = torch.tensor([stop - start for start, stop in batch.spans])
                size = max(lengths.tolist(), default=0)
                total_hss = pattern_sum(call, batch.spans, size)
                count_s1 = (lengths[:, None] > torch.arange(size)).sum(0)[:, None].to(total_hss.device)
                state = {"total": total_hss, "count": count_s1.expand(len(target.keys), size, 1)}
                result = target.strategy.result_dtype(call.query_bhqd.dtype)
                self.slabs.append(Slab(target.keys, target.strategy, state, result))

    def _current(self, target: Target | AttentionTarget) -> Batch:
        """The batch of the pass that a site reports in, noting that it has."""
        if self.batch is None:
            raise SiteError(
                f"site {target.where} ran outside of a forward pass of the model given to record() "
                f"({type(self.model).__name__}): call that model, not a part of it."
            )
        if id(target) in self.seen:
            raise SiteError(
                f"site {target.where} ran twice in one forward pass, so its samples would count twice. Hook a module "
                "that runs once, such as the one around it."
            )
        self.seen.add(id(target))
        return self.batch

    def _close(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recomputing() or self.batch is None:
            return
        batch, self.batch = self.batch, None
        silent = [target.where for target in self.expected if id(target) not in self.seen]
        if silent:
            shown = ", ".join(silent[:6]) + (f" and {len(silent) - 6} more" if len(silent) > 6 else "")
            raise SiteError(
                f"{len(silent)} of {len(self.expected)} sites reported nothing in this forward pass: {shown}. "
                "The model did not run these modules (or their attention isn't one that transformers hands out); give "
                "Site(…, optional=True) to those that may be left out."
            )
        indexed = batch.samples if batch.indexed else None
        with torch.inference_mode(False), torch.no_grad():
            self._sink()._take_pass(
                self.slabs, self.shown, self.order, batch.num_samples, indexed, raw=self.into is None
            )
        self.slabs, self.shown, self.used, self.indexed = [], [], True, batch.indexed

    def _sink(self) -> ActivationCache:
        if self.into is None:
            return self.local
        if isinstance(self.into, ActivationCache):
            return self.into._receiving
        return self.into._need_deferred("record")

    def _strategies(self, target: Target) -> Mapping[str, Strategy | None]:
        """The site's own; where it leaves rows as they are to a cache that reduces them, that cache's, in the hook."""
        site = target.site
        if self.into is not None and site.reduce is None and site.dtype is None and site.device is None:
            sink = self._sink()
            chosen = [sink._state_strategy(key) or registered(sink._registry, key) for key in target.keys]
            if (
                isinstance(chosen[0], Fieldwise)
                and chosen[0].dim in ("auto", 0)
                and all(strategy == chosen[0] for strategy in chosen)
            ):
                return {"": chosen[0]}
        return target.strategies

    # -- memory ------------------------------------------------------------------------------------------------

    def _check_room(self, longest: int | None) -> None:
        """`TooLarge` if the sums of patterns that a pass of texts this long still has to make would not fit.

        None: before any pass, when only the sums of a fixed size are known. `SiteError` for texts beyond that size.
        """
        held = self._sink()._arena
        averaged = [
            (target, target.strategy)
            for target in itertools.chain.from_iterable(self.attention.values())
            if target.strategy is not None and (longest is not None or target.strategy.size is not None)
        ]
        size = longest or 0
        need: dict[torch.device, int] = {}
        for target, strategy in averaged:
            try:
                total, count = capacity(strategy, "total", (size, size)), capacity(strategy, "count", (size, 1))
            except SchemaMismatch as error:
                raise SiteError(f"site {target.where}: {error} Cut the texts, or give a larger size.") from error
            grown = math.prod(total) * (strategy.accumulate or torch.float64).itemsize + math.prod(count) * 8
            if target.keys[0] in held and fits(total, held.capacities(target.keys[0])["total"]):
                grown = 0
            staged = size * size * 4  # the pass's own sums in float32, until it returns
            device = next((p.device for p in target.module.parameters()), torch.device("cpu"))
            need[device] = need.get(device, 0) + len(target.keys) * (grown + staged)
        for device, nbytes in need.items():
            free = available_bytes(device)
            if nbytes > free:
                layers, heads = len(averaged), len(averaged[0][0].keys)
                raise TooLarge(
                    f"averaged attention of {layers} layers × {heads} heads needs {human(nbytes)} more on {device}, "
                    f"{human(free)} are free. Take fewer layers (Site('avg_attn_pattern', layers=[…])), shorter texts, "
                    "or AveragePattern(accumulate=torch.float32)."
                )


def _recomputing() -> bool:
    """Whether activation checkpointing runs forward again inside backward: the same samples, a second time."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Arithmetic of ours in the midst of a model's: what is made here can be written to later, no graph holds it, and
    autocast doesn't round it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _first_tensor(shown: Any, where: str) -> Tensor:
    """The first tensor with dims of what a module was given or returned (a loss comes first, and has none)."""
    items: Iterable[Any] = (shown,)
    if isinstance(shown, Mapping):
        items = shown.values()
    elif isinstance(shown, (tuple, list)):
        items = shown
    for item in items:
        if isinstance(item, Tensor) and item.dim():
            return item
    raise SiteError(
        f"site {where}: expected a tensor with dims, or a tuple or dict of them, got {type(shown).__name__}."
    )


def _transformed(target: Target, x_n: Tensor, columns: Columns) -> Tensor:
    """What the site's transform makes of its rows."""
    assert target.site.transform is not None
    num_rows, version = len(x_n), None if x_n.is_inference() else x_n._version
    y_n = target.site.transform(x_n, columns)
    if version is not None and x_n._version != version:
        raise SiteError(
            f"site {target.where}: transform wrote to its rows, which may be the model's own: make new ones."
        )
    if not isinstance(y_n, Tensor) or y_n.dim() == 0 or len(y_n) != num_rows:
        got = tuple(y_n.shape) if isinstance(y_n, Tensor) else type(y_n).__name__
        raise SiteError(f"site {target.where}: transform must keep its {num_rows} rows, got {got}.")
    return y_n


def _reduced(target: Target, keys: tuple[str, ...], strategy: Fieldwise, value: Value) -> Slab:
    """The states of a site's rows, value.data [n, …] or, with heads, [n, K, …]."""
    try:
        if target.per_head:
            state = strategy.take_slab(value)
        else:
            state = {name: tensor.unsqueeze(0) for name, tensor in strategy.take(value).items()}
    except (TypeError, ValueError) as error:
        raise SiteError(f"site {target.where}: {error}") from error
    return Slab(keys, strategy, state, strategy.result_dtype(value.data.dtype))


def _own(x_n: Tensor, shown: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """A tensor that the model won't write to: converted, moved or copied, at most once."""
    kept = x_n.to(device=device or x_n.device, dtype=dtype or x_n.dtype)
    if kept.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr():
        kept = kept.clone(memory_format=torch.contiguous_format)
    return kept
