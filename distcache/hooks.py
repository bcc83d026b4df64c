"""record(): attach hooks at sites, stage what a forward pass shows, fold it when the pass returns, always detach.

A pass that raises half-way leaves nothing behind: what it has shown so far is staged, and dropped when the next
pass begins. Reductions are made inside the hook, because some models overwrite what a hook was shown; only rows
that are kept are copied.

Legend of names: b samples, s tokens, n rows, k keys of one slab (the heads of a layer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distcache.attention import AttentionCall, pattern, pattern_sum, tap_attention
from distcache.cache import ActivationCache, Shown, Slab
from distcache.errors import SiteError, TooLarge
from distcache.memory import available_bytes, human
from distcache.segments import capacity
from distcache.sites import AttentionTarget, Sites, Target, resolve_sites
from distcache.strategies import Columns, Extend, Fieldwise, Strategy, Value
from distcache.tokens import Batch, as_selector, open_batch

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
        into: accumulate straight into this cache, by its strategies; for a `DistributedCache`, into its delta, in
            deferred mode. The sites' own strategies win.
        mask: padding [B, S], non-zero for valid tokens; None: the model's own `attention_mask`, else all are valid.
        index: the samples' places in the data set, one entry per sample [B].
        columns: what to keep beside each row: tensors [B], or [B, S] per token.

    mask, index and columns belong to one forward pass: set those of a further one with `next`.

    Raises `SiteError` before the first pass for sites that can't be, in a pass for values and masks that don't fit, and
    at a pass's end for a site that reported nothing; `TooLarge` before the pass whose accumulators wouldn't fit.
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
        self.selectors = {id(target): as_selector(target.site.tokens, target.where) for target in targets}
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
        sized = [t for t in attention if t.strategy is not None and t.strategy.size is not None]
        self._check_room(sized, None)
        self._sink()  # raises where `into` can't be written to

    def expect(self, index: Iterable[int] | Tensor | None, mask: Tensor | None, columns: Mapping[str, Tensor]) -> None:
        self.index = index if index is None or isinstance(index, (Tensor, int)) else list(index)
        self.mask, self.columns, self.used = mask, columns, False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if any(_is_compiled(module) for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Of the hooks on one module the pass must be opened first and closed last.
            stack.callback(self.model.register_forward_pre_hook(self._open, prepend=True, with_kwargs=True).remove)
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
        first = self._sink()._num_samples
        given = {"mask": self.mask, "index": self.index, "columns": self.columns, "first": first}
        batch = open_batch(self.model, args, kwargs, **given)  # type: ignore[arg-type]
        if self.attention:
            if batch.num_tokens is None:
                raise SiteError("attention sites need token ids [B, S] or embeddings [B, S, D] as the model's input.")
            longest = max((stop - start for start, stop in batch.spans), default=0)
            self._check_room([t for targets in self.attention.values() for t in targets], longest)
        self.batch = batch

    def _before(self, target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(target, args or kwargs)

        return hook

    def _after(self, target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._see(target, output)

        return hook

    def _see(self, target: Target, shown: Any) -> None:
        if _recomputing():
            return
        batch = self._current(target)
        # Outside of inference mode, or what is accumulated could not be added to later.
        with torch.inference_mode(False), torch.no_grad():
            x = _first_tensor(shown, target.where).detach()
            if target.part is not None:
                i, n = target.part
                width = x.shape[-1] // n
                x = x[..., i * width : (i + 1) * width]
            x_n, columns = self._rows(target, batch, x)
            if target.site.transform is not None:
                num_rows = len(x_n)
                x_n = target.site.transform(x_n, columns)
                if not isinstance(x_n, Tensor) or x_n.dim() == 0 or len(x_n) != num_rows:
                    got = tuple(x_n.shape) if isinstance(x_n, Tensor) else type(x_n).__name__
                    raise SiteError(f"site {target.where}: transform must keep its {num_rows} rows, got {got}.")
            if target.per_head:
                x_n = x_n.unflatten(-1, (len(target.keys), -1))
            if not target.strategies:
                kept = _own(x_n, x, target.site.dtype, target.site.device)
                for k, key in enumerate(target.keys):
                    part = kept[:, k] if target.per_head else kept
                    self.shown.append(Shown(key, Value(part, rows=True, columns=columns)))
            for suffix, strategy in target.strategies.items():
                self._reduce(target, target.suffixed(suffix), strategy, x_n, columns)

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

    def _reduce(self, target: Target, keys: tuple[str, ...], strategy: Strategy, x_n: Tensor, columns: Columns) -> None:
        if isinstance(strategy, Fieldwise):
            value = Value(x_n, rows=True, columns=columns)
            result = strategy.result_dtype(x_n.dtype)
            if target.per_head:
                state = strategy.take_slab(value)
            else:
                state = {name: tensor.unsqueeze(0) for name, tensor in strategy.take(value).items()}
            self.slabs.append(Slab(keys, strategy, state, result))
            return
        for k, key in enumerate(keys):
            kept = _own(x_n[:, k] if target.per_head else x_n, None, target.site.dtype, target.site.device)
            self.shown.append(Shown(key, Value(kept, rows=True, columns=columns), strategy))

    def _attend(self, call: AttentionCall) -> None:
        for target in self.attention[id(call.module)]:
            batch = self._current(target)
            if target.strategy is None:
                patterns = [pattern(call, batch.spans, b) for b in range(batch.num_samples)]
                for k, key in enumerate(target.keys):
                    one_each = [pattern_hll[k] for pattern_hll in patterns]
                    self.shown.append(Shown(key, Value(one_each, columns=batch.per_sample), Extend()))
                continue
            lengths = torch.tensor([stop - start for start, stop in batch.spans])
            size = int(lengths.max()) if len(lengths) else 0
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
                f"{len(silent)} of {len(self.expected)} sites reported nothing in this forward pass: {shown}. The model "
                "didn't run these modules (or their attention isn't one that transformers' interface hands out); give "
                "Site(…, optional=True) to those that may be left out."
            )
        indexed = batch.samples if batch.indexed else None
        raw = self.into is None
        self._sink()._take_pass(self.slabs, self.shown, self.order, batch.num_samples, indexed, raw)
        self.slabs, self.shown, self.used = [], [], True

    def _sink(self) -> ActivationCache:
        if self.into is None:
            return self.local
        if isinstance(self.into, ActivationCache):
            return self.into._receiving
        return self.into._need_deferred("record")

    # -- memory ------------------------------------------------------------------------------------------------

    def _check_room(self, targets: Sequence[AttentionTarget], longest: int | None) -> None:
        """`TooLarge` if the sums of patterns that these sites still have to make would not fit."""
        held = self._sink()._arena if targets else None
        need: dict[torch.device, int] = {}
        size = longest or 0
        for target in targets:
            if target.strategy is None or held is None:
                continue
            fields = {"total": (size, size), "count": (size, 1)}
            rooms = {name: capacity(target.strategy, name, shape) for name, shape in fields.items()}
            there = held.capacities(target.keys[0]) if target.keys[0] in held else {"total": (0, 0), "count": (0, 1)}
            itemsize = (target.strategy.accumulate or torch.float64).itemsize
            grown = 0
            if rooms["total"][0] > there["total"][0]:
                grown = rooms["total"][0] * rooms["total"][1] * itemsize + rooms["count"][0] * 8
            staged = size * size * 4  # a pass's sums in float32, until it returns
            device = next((p.device for p in target.module.parameters()), torch.device("cpu"))
            need[device] = need.get(device, 0) + len(target.keys) * (grown + staged)
        for device, nbytes in need.items():
            free = available_bytes(device)
            if nbytes > free:
                layers, heads = len(targets), len(targets[0].keys)
                raise TooLarge(
                    f"averaged attention of {layers} layers × {heads} heads needs {human(nbytes)} more on {device}, "
                    f"{human(free)} are free. Take fewer layers (Site('avg_attn_pattern', layers=[…])), shorter texts, "
                    "or AveragePattern(accumulate=torch.float32)."
                )


def _recomputing() -> bool:
    """Whether activation checkpointing runs forward again inside backward: the same samples, a second time."""
    return torch._C._current_graph_task_id() != -1


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _first_tensor(shown: Any, where: str) -> Tensor:
    """The first tensor of what a module was given or returned."""
    if isinstance(shown, Tensor):
        return shown
    items: Iterable[Any] = ()
    if isinstance(shown, Mapping):
        items = shown.values()
    elif isinstance(shown, (tuple, list)):
        items = shown
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise SiteError(f"site {where}: expected a tensor, or a tuple that begins with one, got {type(shown).__name__}.")


def _own(x_n: Tensor, shown: Tensor | None, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """A tensor that the model won't write to: converted, moved or copied, at most once."""
    kept = x_n.to(device=device or x_n.device, dtype=dtype or x_n.dtype)
    if kept is x_n and (shown is None or kept.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr()):
        kept = kept.clone(memory_format=torch.contiguous_format)
    return kept
