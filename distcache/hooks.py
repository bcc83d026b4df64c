"""record(): attach hooks at sites, stage what a forward pass shows, fold it when the pass returns, always detach.

A pass that raises half-way leaves nothing behind: what it has shown so far is staged, and dropped when the next
pass begins. Reductions are made inside the hook, because some models overwrite what a hook was shown; only rows
that are kept are copied.

Legend of names: b samples, s tokens, n rows, k keys of one slab (the heads of a layer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distcache.attention import AttentionCall, pattern, pattern_sum, tap_attention
from distcache.cache import ActivationCache
from distcache.entries import Shown, Slab, registered
from distcache.errors import SchemaMismatch, SiteError, TooLarge
from distcache.families import module_paths, named_modules, wrapped
from distcache.generation import Generation, begun, holds_tokens, token_ids_of
from distcache.memory import available_bytes, human
from distcache.midst import FUSED, Offload, apart, check_stop, device_of, eager, modules_called, recomputing, replaced
from distcache.segments import capacity, fits
from distcache.sites import AttentionTarget, Site, Sites, Target, resolve_sites
from distcache.strategies import Columns, Extend, Fieldwise, Strategy, Value
from distcache.tokens import (
    Batch,
    Given,
    Mask,
    Stream,
    as_selector,
    bound_arguments,
    find_streams,
    open_batch,
)

if TYPE_CHECKING:
    from distcache.distributed import DistributedCache

Phase = Literal["prompt", "new", "all"]


class Recording(ActivationCache):
    """What `record` gives: the cache of what was recorded, and `next` for what belongs to the next forward pass.

    With `into=` it stays empty, and a `cat` of it changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorder: _Recorder | None = None

    def next(self, index: Iterable[int] | Tensor | None = None, mask: Mask | None = None, **columns: Tensor) -> None:
        """Set index, mask and columns of the next forward pass or generation: one entry per sample, or per token. See
        `record`.

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
    mask: Mask | None = None,
    index: Iterable[int] | Tensor | None = None,
    phase: Phase = "all",
    stop: bool = False,
    **columns: Tensor,
) -> Iterator[Recording]:
    """Record sites of a model during forward passes, `model(…)`, in the block. Not a collective.

    Gives an `ActivationCache`: kept sites hold their rows [n, …], reduced ones a state. Hooks are off at the end,
    whatever happened, and the model computes what it would have computed. A compiled model runs eagerly meanwhile,
    because compiled graphs leave hooks out without a word.

    `model.generate(…)` is one contribution: it counts once it has returned, and rows come by sample, then position.
    Rows know the `step` (0 the prompt, n the pass that was fed the n-th new token) and the `token_id`. What is fed
    for a sequence from its end on counts nowhere. Beams, several sequences a sample and drafts of another model are
    refused. In a decoding loop of one's own each pass that is given a cache with tokens in it goes on with the texts
    of the pass before.

    Args:
        model: the module that is called. Its parts alone must not be: `SiteError`.
        sites: names of a known family, paths, `Site`s, or a dict of key template to one of these.
        into: accumulate straight into this cache, by the strategies that it has when the block opens; for a
            `DistributedCache`, into its delta, in deferred mode. The sites' own strategies win.
        mask: padding [B, S], non-zero for valid tokens; a function that makes it of the call's arguments by name; of
            an encoder-decoder a dict, {"encoder": …, "decoder": …}; None: the model's own, by its keyword
            (`attention_mask`, `src_key_padding_mask`, …), wherever it stands in the call, else all are valid. A vision
            tower has none.
        index: the samples' places in the data set, one entry per sample [B].
        phase: of a generation: "prompt", "new" for the tokens that were generated and fed again, or "all".
        stop: end each forward pass after the last site; the model's call gives None.
        columns: what to keep beside each row: tensors [B], or [B, S] per token.

    mask, index and columns belong to one forward pass or generation: set those of a further one with `next`.

    Raises `SiteError` before the first pass for sites that can't be, in a pass for values and masks that don't fit, and
    at a pass's end for a site that reported nothing; `TooLarge` before the pass whose accumulators wouldn't fit;
    TypeError if `into` is no cache.
    """
    # Always, and not only where a module looks compiled: a function around the model may be, or the model in the block.
    # And first, so that no compiler follows into what comes next. 5 µs; 0.8 s once, to import the compiler.
    with eager():
        core = module_paths(model)[""][1]  # in what was put around the whole of it
        targets, attention = resolve_sites(model, sites)
        local = Recording()
        recorder = _Recorder(core, targets, attention, local, into, phase, stop)
        recorder.expect(index, mask, columns)
        local._recorder = recorder
        try:
            with recorder.attached():
                yield local
            recorder.check_phase()
        finally:
            local._recorder = None


class _Stop(BaseException):
    """Ends a forward pass after its last site."""


class _Recorder:
    """The passes of one `record` block. A *contribution*, which counts as a whole, is one pass, or a generation."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        attention: Sequence[AttentionTarget],
        local: Recording,
        into: ActivationCache | DistributedCache | None,
        phase: Phase,
        stop: bool,
    ) -> None:
        if phase not in ("prompt", "new", "all"):
            raise SiteError(f"phase is 'prompt', 'new' or 'all', got {phase!r}.")
        self.model = model
        self.roots = [model]  # a wrapper's own methods may call what it wraps
        while (inner := wrapped(self.roots[-1])) is not None:
            self.roots.append(inner)
        self.streams = find_streams(model, named_modules(model))
        self.targets = targets
        self.attention: dict[int, list[AttentionTarget]] = {}  # by the id of their module
        for target in attention:
            self.attention.setdefault(id(target.module), []).append(target)
        self.local = local
        self.into = into
        if into is not None and not isinstance(into, ActivationCache) and not hasattr(into, "_need_deferred"):
            raise TypeError(f"into is an ActivationCache or a DistributedCache, got {type(into).__name__}.")
        self.phase, self.stop = phase, stop
        self.selectors = {id(target): as_selector(target.site.tokens, target.where) for target in targets}
        self.strategies = {id(target): self._strategies(target) for target in targets}
        everything: list[Target | AttentionTarget] = [*targets, *attention]
        self.order = [key for target in everything for key in target.all_keys()]
        self.expected = {id(target): target for target in everything if not target.site.optional}
        if stop:
            check_stop(model, [target.where for target in everything if target.site.optional])
        self.by_token_id = any(
            getattr(strategy, "by", None) == "token_id"
            for found in self.strategies.values()
            for strategy in found.values()
        )
        self.given = Given(token_id=self.by_token_id)
        self.used = False  # whether a contribution has used up what was given
        self.indexed: bool | None = None  # whether contributions have come with an index
        # Of the contribution that is under way, or was the last:
        self.samples: Tensor | None = None
        self.counted = False  # whether its samples are in the ledger, or numbered
        self.past: dict[str, Generation] = {}  # by stream
        self.step = 0
        self.generating = False
        self.went_on = False  # whether any text was
        self.slabs: list[Slab] = []
        self.shown: list[Shown] = []
        self.seen_ever: set[int] = set()
        # Of the pass that is under way:
        self.inside: nn.Module | None = None  # the root that was called
        self.running: list[tuple[str, Batch]] = []
        self.latest: tuple[str, Batch] | None = None
        self.seen: set[int] = set()
        self.offload = Offload()
        self._check_room(None)

    def expect(self, index: Iterable[int] | Tensor | None, mask: Mask | None, columns: Mapping[str, Tensor]) -> None:
        taken = sorted(columns.keys() & {"sample", "position", "step"})
        if taken:
            raise SiteError(f"columns {taken} are every row's own already: give yours other names.")
        if isinstance(mask, Mapping) and (unknown := sorted(mask.keys() - {stream.name for stream in self.streams})):
            names = [stream.name or "''" for stream in self.streams]
            raise SiteError(
                f"mask has entries for {unknown}, where the model has {names}: give a mask for each of these."
            )
        index = index if index is None or isinstance(index, (Tensor, int)) else list(index)
        self.given, self.used = Given(mask, index, columns, token_id=self.by_token_id), False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if any(isinstance(module, FUSED) for module in self.model.modules()):
                stack.enter_context(modules_called())
            # Hooks of one module run in the order they came: a pass must be opened before and closed after its sites.
            for root in self.roots:
                stack.callback(root.register_forward_pre_hook(self._open, with_kwargs=True).remove)
            parts = [stream for stream in self.streams if stream.module is not self.model]
            for stream in parts:
                before = self._before_stream(stream)
                stack.callback(stream.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            for target in self.targets:
                if target.io == "input":
                    handle = target.module.register_forward_pre_hook(self._before(target), with_kwargs=True)
                else:
                    handle = target.module.register_forward_hook(self._after(target))
                stack.callback(handle.remove)
            if self.attention:
                modules = [target.module for targets in self.attention.values() for target in targets[:1]]
                stack.enter_context(tap_attention(modules, self._attend, lambda: self.step <= 0))
            for stream in parts:
                stack.callback(stream.module.register_forward_hook(self._after_stream(stream)).remove)
            for root in self.roots:
                stack.callback(root.register_forward_hook(self._close).remove)
            if self.stop:
                stack.enter_context(replaced(self.model, "forward", self._stopping))
            if hasattr(self.model, "generate"):
                stack.enter_context(replaced(self.model, "generate", self._generate))
            yield

    def _stopping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _Stop:
                return None

        return stopping

    # -- contributions -----------------------------------------------------------------------------------------

    def _begin(self, past: Generation) -> None:
        """Another contribution, whose texts begin so; what one that raised has left is dropped."""
        given = self.given
        mask = None if callable(given.mask) else given.mask
        if self.used and (given.index is not None or mask is not None or given.columns):
            raise SiteError(
                "index, mask and columns given to record() belong to one forward pass, and this is a further one: call "
                "rec.next(index=…) before it."
            )
        if self.indexed not in (None, given.index is not None):
            raise SiteError(
                "passes of one record() all have an index or none has: give each its own, rec.next(index=…)."
            )
        self.given = dataclasses.replace(given, first=self._sink()._num_samples)
        self.samples, self.counted, self.step = None, False, 0
        self.slabs, self.shown, self.seen_ever = [], [], set()
        self.past = {stream.name: dataclasses.replace(past) for stream in self.streams if not stream.patches}

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate` as one contribution."""

        @functools.wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            if self.generating:  # one that calls itself, to try again
                return generate(*args, **kwargs)
            past = begun(self.model, args, kwargs)
            if self.stop:
                raise SiteError("stop=True ends forward passes, and generating needs what they give: leave it out.")
            self._check_goes_on()
            self._begin(past)
            self.generating, self.step, self.inside = True, -1, None
            self.running, self.latest, self.seen = [], None, set()
            try:
                result = generate(*args, **kwargs)
                self.shown = in_order(self.shown)
                self._fold()
            finally:
                self.generating = False
                self.slabs, self.shown = [], []
            return result

        return generating

    def _check_goes_on(self) -> None:
        """`SiteError` for sites that mean nothing of tokens that come one by one."""
        self.went_on = True
        if self.phase == "prompt":
            return
        for target in self.targets:
            if self.selectors[id(target)] != "all":
                raise SiteError(
                    f"site {target.where}: tokens={target.site.tokens!r} of texts that are being generated isn't known "
                    "before their end: take tokens='all', or the prompt's alone, record(…, phase='prompt')."
                )
        if self.attention:
            (averaged, *_), *_ = self.attention.values()
            raise SiteError(
                f"site {averaged.where}: patterns of tokens that are generated one by one can't be averaged: take the "
                "prompt's, record(…, phase='prompt'), or a forward pass over whole texts."
            )

    def check_phase(self) -> None:
        """At the block's end: `SiteError` if what was asked for can't have come."""
        if self.phase == "new" and not self.went_on:
            raise SiteError("phase='new' is of generated tokens, and nothing was generated in the block.")

    def _fold(self) -> None:
        """Count what the contribution has shown since the last time."""
        if self.samples is None or not (self.slabs or self.shown or self.step == 0):
            return
        self.offload.wait()
        indexed = self.samples if self.given.index is not None and not self.counted else None
        num_samples = 0 if self.counted else len(self.samples)
        with torch.inference_mode(False), torch.no_grad():
            self._sink()._take_pass(self.slabs, self.shown, self.order, num_samples, indexed, raw=self.into is None)
        self.slabs, self.shown, self.used, self.counted = [], [], True, True
        self.indexed = self.given.index is not None

    # -- one pass ----------------------------------------------------------------------------------------------

    def _open(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() or self.inside not in (None, root):
            return
        self.inside = None
        goes_on = not self.generating and holds_tokens(bound_arguments(root, args, kwargs))
        if goes_on:
            if self.samples is None:
                raise SiteError(
                    "this pass goes on with texts whose beginning wasn't recorded, so that positions and padding "
                    "aren't known: record the prompt's pass too, with phase='new' if it isn't wanted."
                )
            self._check_goes_on()
            self.slabs, self.shown = [], []
        elif not self.generating:
            self._begin(Generation(token_ids_of(getattr(self.model, "generation_config", None), "eos_token_id")))
        if goes_on or self.generating:
            self.step += 1
        if not (self.generating and self.step == 0):  # an encoder runs before the first pass of a generation
            self.running, self.latest, self.seen = [], None, set()
        if self.streams[0].module is self.model:
            self._enter(self.streams[0], root, args, kwargs)
        self.inside = root

    def _enter(self, stream: Stream, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stream begins: `module`, which is its own or a wrapper of it, was called so."""
        past = None if stream.name == "encoder" else self.past.get(stream.name)  # an encoder sees whole texts
        with torch.inference_mode(False):  # or columns could not be written to later
            batch = open_batch(dataclasses.replace(stream, module=module), args, kwargs, self.given, past, self.samples)
        self.samples = batch.samples
        self.running.append((stream.name, batch))
        self.latest = self.running[-1]
        if self.attention and stream.name in ("", "encoder", "decoder") and not batch.patches:
            if batch.num_tokens is None:
                raise SiteError("attention sites need token ids [B, S] or embeddings [B, S, D] as the model's input.")
            if self.step <= 0:
                self._check_room(max((stop - start for start, stop in batch.spans), default=0))

    def _before_stream(self, stream: Stream) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not recomputing() and (self.inside is not None or self.generating):
                self._enter(stream, module, args, kwargs)

        return before

    def _after_stream(self, stream: Stream) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not recomputing() and self.running and self.running[-1][0] == stream.name:
                self.running.pop()

        return after

    def _before(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not recomputing():
                self._see(target, args or bound_arguments(module, args, kwargs))

        return hook

    def _after(self, target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not recomputing():
                self._see(target, output)

        return hook

    def _see(self, target: Target, shown: Any) -> None:
        batch = self._current(target)
        if batch is None:
            return
        x = _first_tensor(shown, target.where).detach()
        with apart(x.device):
            x_n, columns = self._rows(target, batch, x if target.part is None else target.part.of(x))
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
                    self._add(_reduced(target, keys, strategy, Value(x_n, rows=True, columns=columns)))
                    continue
                kept = self._own(x_n, x, target.site) if kept is None else kept
                for k, key in enumerate(keys):
                    part = kept[:, k] if target.per_head else kept
                    self.shown.append(Shown(key, Value(part, rows=True, columns=columns), strategy))
        self._stop_here()

    def _add(self, slab: Slab) -> None:
        """Stage a state; of a generation, whose passes are many, those of one key together."""
        if self.generating and self.step > 0:
            place = next((i for i in reversed(range(len(self.slabs))) if self.slabs[i].keys == slab.keys), None)
            if place is not None and (joined := _joined(self.slabs[place], slab)) is not None:
                self.slabs[place] = joined
                return
        self.slabs.append(slab)

    def _rows(self, target: Target, batch: Batch, x: Tensor) -> tuple[Tensor, Columns]:
        """The rows of a site's value that count, [n, …], and what is known of them."""
        layout = target.layout or target.site.layout
        if layout == "SBD" and x.dim() > 1:
            x = x.transpose(0, 1)
        elif layout == "ND" and batch.num_tokens is not None:
            x = batch.unpacked(x, target.where)
        if batch.num_tokens is None and (batch.patches or layout) and x.dim() > 2 and len(x) == batch.num_samples:
            batch = batch.with_tokens(x.shape[1])
        leading = (batch.num_samples, batch.num_tokens)
        if batch.num_tokens is not None and x.dim() > 2 and tuple(x.shape[:2]) == leading:
            selection = batch.select(self.selectors[id(target)])
            return selection.rows(x), selection.columns
        if x.dim() > 0 and len(x) == batch.num_samples and (batch.num_tokens is None or x.dim() == 2):
            return x, batch.per_sample
        raise SiteError(
            f"site {target.where}: expected a value [B, S, …] = {leading}, or one row a sample, "
            f"[{batch.num_samples}, …], got {tuple(x.shape)}. Hook a module that keeps samples (and tokens) apart, or "
            "name its order: Site(…, layout='SBD'), or 'ND' for rows of tokens."
        )

    def _own(self, x_n: Tensor, shown: Tensor, site: Site) -> Tensor:
        """A tensor that the model won't write to: converted, moved or copied, at most once."""
        device = x_n.device if site.device is None else torch.device(site.device)
        kept = x_n.to(site.dtype or x_n.dtype)
        if x_n.is_cuda and device.type == "cpu":
            if _shares(kept, shown):
                kept = kept.clone()  # on the GPU, in the stream that will write to it
            return self.offload.copy(kept)
        kept = kept.to(device)
        return kept.clone(memory_format=torch.contiguous_format) if _shares(kept, shown) else kept

    def _attend(self, call: AttentionCall) -> None:
        for target in self.attention[id(call.module)]:
            batch = self._current(target)
            if batch is None:
                continue
            if batch.patches:
                batch = batch.with_tokens(call.query_bhqd.shape[2])
            with apart(call.query_bhqd.device):
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
        self._stop_here()

    def _current(self, target: Target | AttentionTarget) -> Batch | None:
        """The batch of the stream that a site reports in, noting that it has; None where it isn't asked."""
        if self.latest is None or (self.inside is None and not self.generating):
            raise SiteError(
                f"site {target.where} ran outside of a forward pass of the model given to record() "
                f"({type(self.model).__name__}): call that model, not a part of it."
            )
        stream, batch = self.running[-1] if self.running else self.latest
        if isinstance(target, Target) and target.stream not in (None, stream):
            return None
        if id(target) in self.seen:
            raise SiteError(
                f"site {target.where} ran twice in one forward pass, so its samples would count twice. Hook a module "
                "that runs once, such as the one around it."
            )
        self.seen.add(id(target))
        if self.phase != "all" and (self.phase == "prompt") != (self.step <= 0):
            return None
        self.seen_ever.add(id(target))
        return batch

    def _stop_here(self) -> None:
        if self.stop and self.seen >= self.expected.keys():
            raise _Stop

    def _close(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if recomputing() or self.inside is not root:
            return
        self.inside = None
        self._check_silent()
        if not self.generating:
            self._fold()

    def _check_silent(self) -> None:
        """`SiteError` for a site that reported nothing; what a later pass of a text leaves out, an encoder, may be."""
        seen = self.seen_ever if self.step > 0 and self.phase != "new" else self.seen
        silent = [target.where for key, target in self.expected.items() if key not in seen]
        if not silent:
            return
        shown = ", ".join(silent[:6]) + (f" and {len(silent) - 6} more" if len(silent) > 6 else "")
        raise SiteError(
            f"{len(silent)} of {len(self.expected)} sites reported nothing in this forward pass: {shown}. "
            "The model did not run these modules (or their attention isn't one that transformers hands out); give "
            "Site(…, optional=True) to those that may be left out."
        )

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
            device = device_of(target.module)
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


def _shares(x: Tensor, shown: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr()


# -- generation ------------------------------------------------------------------------------------------------


def in_order(shown: Sequence[Shown]) -> list[Shown]:
    """What the passes of a generation have shown, by key: rows by sample, then by position, as one value."""
    by_key: dict[str, list[Shown]] = {}
    for one in shown:
        by_key.setdefault(one.key, []).append(one)
    orders: dict[tuple[int, ...], tuple[Tensor, Columns]] = {}
    found = []
    for key, parts in by_key.items():
        columns = [part.value.columns for part in parts if part.value.columns is not None]
        if len(parts) == 1 or not parts[0].value.rows or len(columns) < len(parts):
            found.extend(parts)
            continue
        identity = tuple(map(id, columns))
        if identity not in orders:
            names = [name for name in columns[0].by_name if all(name in one.by_name for one in columns)]
            by_name = {name: torch.cat([one.by_name[name] for one in columns]) for name in names}
            order = by_name["sample"].argsort(stable=True)
            ordered = Columns({name: column[order] for name, column in by_name.items()}, columns[0].indexed)
            orders[identity] = (order, ordered)
        order, ordered = orders[identity]
        data = torch.cat([part.value.data for part in parts])[order.to(parts[0].value.data.device)]
        found.append(Shown(key, Value(data, rows=True, columns=ordered), parts[0].strategy))
    return found


def _joined(before: Slab, slab: Slab) -> Slab | None:
    """Two states of the same keys as one; None where their shapes differ, or the cells of groups that they bring."""
    shapes = [{name: tensor.shape for name, tensor in one.state.items()} for one in (before, slab)]
    if shapes[0] != shapes[1] or before.result != slab.result:
        return None
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in before.state.items()}
    more = dict(slab.state)
    cells = {"cells": state.pop("cells")} if "cells" in state else {}
    if cells and not torch.equal(cells["cells"], more.pop("cells")):
        return None
    slab.strategy.fold_(state, more)
    return dataclasses.replace(before, state={**state, **cells})
