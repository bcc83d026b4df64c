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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distcache.attention import AttentionCall, Steps, compiled_flex_attention, tap_attention, tap_functions
from distcache.cache import ActivationCache
from distcache.entries import Shown, Slab, registered
from distcache.errors import SiteError, TooLarge
from distcache.families import module_paths, named_modules, wrapped
from distcache.generation import Generation, begun, token_ids_of, tokens_held
from distcache.interrupts import held_interrupts
from distcache.memory import available_bytes, human
from distcache.midst import (
    FUSED,
    Offload,
    apart,
    check_stop,
    compiled_as_before,
    device_of,
    eager,
    modules_called,
    recomputing,
    replaced,
)
from distcache.patterns import Waiting, room_nbytes, shown_patterns
from distcache.sites import AttentionTarget, Sites, Target, resolve_sites
from distcache.staged import Staged
from distcache.strategies import Fieldwise, Strategy, Value
from distcache.streams import Given, Mask, Stream, bound_arguments, find_streams, open_batch
from distcache.tokens import Batch, as_selector, joined
from distcache.values import first_tensor, own, reduced, rows_of

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
    for a sequence from its end on counts nowhere, and of texts that are fed again, for want of a cache, what is new.
    Beams, several sequences a sample and drafts of another model are refused. In a decoding loop of one's own each pass
    that is given a cache with tokens in it goes on with the texts of the pass before.

    Args:
        model: the module that is called. Its parts alone must not be: `SiteError`.
        sites: names of a known family, paths, `Site`s, or a dict of key template to one of these.
        into: accumulate straight into this cache, by the strategies that it has when the block opens; for a
            `DistributedCache`, into its delta, in deferred mode. The sites' own strategies win.
        mask: padding [B, S], non-zero for valid tokens; a function that makes it of the call's arguments by name; of
            an encoder-decoder a dict, {"encoder": …, "decoder": …}; None: the model's own, by its keyword
            (`attention_mask`, `src_key_padding_mask`, …), wherever it stands in the call, else all are valid. A vision
            tower has its own, of patches, or none.
        index: the samples' places in the data set, one entry per sample [B].
        phase: of a generation: "prompt", "new" for the tokens that were generated and fed again, or "all".
        stop: end each forward pass after the last site; the model's call gives None, if that left anything out.
        columns: what to keep beside each row: tensors [B], or [B, S] per token.

    mask, index and columns belong to one forward pass or generation: set those of a further one with `next`.

    Raises `SiteError` before the first pass for sites that can't be, in a pass for values and masks that don't fit, and
    at a pass's end for a site that reported nothing; `TooLarge` before the pass whose accumulators wouldn't fit;
    TypeError if `into` is no cache.
    """
    # Always, and not only where a module looks compiled: a function around the model may be, or the model in the block.
    # And first, so that no compiler follows into what comes next. 5 µs; 0.8 s once, to import the compiler.
    with eager(), compiled_flex_attention(compiled_as_before):
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
        if not isinstance(phase, str) or phase not in ("prompt", "new", "all"):
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
        if not isinstance(stop, bool):
            raise SiteError(f"stop is True or False, got {stop!r}.")
        self.phase, self.stop = phase, stop
        self.selectors = {id(target): as_selector(target.site.tokens, target.where) for target in targets}
        self.strategies = {id(target): self._strategies(target) for target in targets}
        everything: list[Target | AttentionTarget] = [*targets, *attention]
        self.order = [key for target in everything for key in target.all_keys()]
        self.expected = {id(target): target for target in everything if not target.site.optional}
        if stop:
            check_stop(model, [target.where for target in everything if target.site.optional])
        asked = [getattr(strategy, "by", None) for found in self.strategies.values() for strategy in found.values()]
        asked += [stat.column for target in attention for stat in target.stats]
        self.by_token_id = "token_id" in asked
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
        self.staged = Staged()
        self.waiting = Waiting()
        self.steps: dict[tuple[int, bool], Steps] = {}  # of a generation, by the module's id and how it's reached
        self.passes: dict[int, list[Batch]] = {}  # and by the id of a target
        self.seen_in: dict[int, Stream] = {}  # by the id of a target: where it has reported
        # Of the pass that is under way:
        self.inside: nn.Module | None = None  # the root that was called
        self.held: int | None = None  # tokens in the cache that it was given
        self.running: list[tuple[Stream, Batch | SiteError]] = []
        self.latest: tuple[Stream, Batch | SiteError] | None = None
        self.ran: list[Stream] = []
        self.seen: set[int] = set()
        self.stopped = False  # before it began
        self.offload = Offload()
        self._check_room(None)

    def expect(self, index: Iterable[int] | Tensor | None, mask: Mask | None, columns: Mapping[str, Tensor]) -> None:
        taken = sorted(columns.keys() & {"sample", "position", "step"})
        if taken:
            raise SiteError(f"columns {taken} are every row's own already: give yours other names.")
        options = sorted(columns.keys() & {"into", "phase", "stop"})
        if options:
            raise SiteError(f"{options} are options of record(), which hold for the whole block, and no columns.")
        names = [stream.name for stream in self.streams if stream.of != "two"]
        if isinstance(mask, Mapping) and (unknown := sorted(mask.keys() - set(names))):
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
                everyone = list(itertools.chain.from_iterable(self.attention.values()))
                for tap, by_function in ((tap_attention, False), (tap_functions, True)):
                    modules = {id(t.module): t.module for t in everyone if t.by_function == by_function}
                    attend = functools.partial(self._attend, by_function=by_function)
                    if modules:
                        stack.enter_context(
                            tap(
                                modules.values(),
                                attend,
                                lambda: self.step <= 0 or self.phase == "all",
                                lambda: self.generating and self.step > 0,
                            )
                        )
            for stream in parts:
                stack.callback(stream.module.register_forward_hook(self._after_stream(stream)).remove)
            for root in self.roots:
                stack.callback(root.register_forward_hook(self._close).remove)
                stack.callback(root.register_forward_hook(self._leave, always_call=True).remove)
                if self.stop:
                    stack.enter_context(replaced(root, "forward", functools.partial(self._stopping, root)))
            if hasattr(self.model, "generate"):
                stack.enter_context(replaced(self.model, "generate", self._generate))
            yield

    def _stopping(self, root: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            if self.stopped:
                self.stopped = False
                return None
            try:
                return forward(*args, **kwargs)
            except _Stop:
                if self.inside is not root:  # what wraps it was called, and ends
                    raise
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
        self.staged, self.seen_in = Staged(), {}
        self.steps, self.passes = {}, {}
        self.waiting.begin()
        self.past = {stream.name: dataclasses.replace(past) for stream in self.streams if stream.goes_on}

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate` as one contribution."""

        @functools.wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            if self.generating:  # one that calls itself, to try again
                return generate(*args, **kwargs)
            past = begun(self.model, args, kwargs, attention=bool(self.attention) and self.phase != "prompt")
            if self.stop:
                raise SiteError("stop=True ends forward passes, and generating needs what they give: leave it out.")
            self._check_goes_on(self.phase != "new")
            self._begin(past)
            self.generating, self.step, self.inside = True, -1, None
            self._begin_pass()
            try:
                result = generate(*args, **kwargs)
                self._attend_whole()
                self._fold()
            finally:
                self.generating, self.staged = False, Staged()
                self.steps, self.passes = {}, {}
            return result

        return generating

    def _check_goes_on(self, whole: bool = False) -> None:
        """`SiteError` for sites and columns that mean nothing of tokens that come one by one. `whole`: texts are seen
        from their beginning to their end, as in a generation.
        """
        self.went_on = True
        if self.phase == "prompt":
            return
        for target in self.targets:
            if self.selectors[id(target)] != "all":
                raise SiteError(
                    f"site {target.where}: tokens={target.site.tokens!r} of texts that are being generated isn't known "
                    "before their end: take tokens='all', or the prompt's alone, record(…, phase='prompt')."
                )
        for name, column in self.given.columns.items():
            if getattr(column, "ndim", 1) > 1:
                raise SiteError(
                    f"column {name!r} is per token, {tuple(column.shape)}, and has no entries for tokens that are "
                    "generated: give it per sample, or take the prompt's alone, record(…, phase='prompt')."
                )
        if self.attention and not whole:
            (averaged, *_), *_ = self.attention.values()
            raise SiteError(
                f"site {averaged.where}: patterns are of whole texts, prompt and all, which one knows at their end: of "
                "model.generate take phase='all' or phase='prompt', in a loop of your own phase='prompt', or record a "
                "forward pass over the whole texts."
            )

    def check_phase(self) -> None:
        """At the block's end: `SiteError` if what was asked for can't have come. A rank may have had nothing to run."""
        if self.phase == "new" and self.samples is not None and not self.went_on:
            raise SiteError("phase='new' is of generated tokens, and nothing was generated in the block.")

    def _fold(self) -> None:
        """Count what the contribution has shown since the last time."""
        if self.samples is None or not (self.staged or self.step == 0):
            return
        self.offload.wait()
        indexed = self.samples if self.given.index is not None and not self.counted else None
        num_samples = 0 if self.counted else len(self.samples)
        with torch.inference_mode(False), torch.no_grad(), held_interrupts():
            slabs, shown = self.staged.slabs, self.staged.in_order()
            self._sink()._take_pass(slabs, shown, self.order, num_samples, indexed, raw=self.into is None)
            self.staged, self.used, self.counted = Staged(), True, True
            self.indexed = self.given.index is not None

    # -- one pass ----------------------------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        self.running, self.latest, self.ran, self.seen, self.stopped = [], None, [], set(), False

    def _open(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() or self.inside not in (None, root):
            return
        self.inside = None
        self.held = tokens_held(bound_arguments(root, args, kwargs))
        goes_on = not self.generating and bool(self.held)
        if goes_on:
            if self.samples is None:
                raise SiteError(
                    "this pass goes on with texts whose beginning wasn't recorded, so that positions and padding "
                    "aren't known: record the prompt's pass too, with phase='new' if it isn't wanted."
                )
            self._check_goes_on()
            self.staged = Staged()
        elif not self.generating:
            ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
            self._begin(Generation(token_ids_of(ends)))
        if goes_on or self.generating:
            self.step += 1
        if not (self.generating and self.step == 0):  # an encoder runs before the first pass of a generation
            self._begin_pass()
        self._enter(self.streams[0], root, args, kwargs)
        self.inside = root

    def _enter(self, stream: Stream, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stream begins: `module`, which is its own or a wrapper of it, was called so."""
        self.ran.append(stream)
        if stream.of == "two":  # its texts are those of the part that runs, or ran
            self.running.append((stream, SiteError("an encoder-decoder has no texts before one of its parts runs.")))
            return
        past, asked = self.past.get(stream.name), dataclasses.replace(stream, module=module)
        batch: Batch | SiteError
        try:
            with torch.inference_mode(False):  # or columns could not be written to later
                batch = open_batch(asked, args, kwargs, self.given, past, self.samples, self.held)
            self.samples = batch.samples
        except SiteError as error:
            if stream is self.streams[0]:
                raise
            batch = error  # which nobody needs to hear who has no site there
        self.running.append((stream, batch))
        self.latest = self.running[-1]
        if self.attention and isinstance(batch, Batch) and batch.num_tokens is not None and self.step <= 0:
            self._check_room(batch)

    def _before_stream(self, stream: Stream) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not recomputing() and (self.inside is not None or self.generating):
                self._enter(stream, module, args, kwargs)

        return before

    def _after_stream(self, stream: Stream) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not recomputing() and self.running and self.running[-1][0] is stream:
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
        x = first_tensor(shown, target.where).detach()
        with apart(x.device):
            x_n, columns = rows_of(target, self.selectors[id(target)], batch, x)
            kept: Tensor | None = None
            for suffix, strategy in self.strategies[id(target)].items():
                keys = target.suffixed(suffix)
                if isinstance(strategy, Fieldwise):
                    self.staged.fold(reduced(target, keys, strategy, Value(x_n, rows=True, columns=columns)))
                    continue
                kept = own(x_n, x, target.site, self.offload) if kept is None else kept
                for k, key in enumerate(keys):
                    part = kept[:, k] if target.per_head else kept
                    self.staged.keep(Shown(key, Value(part, rows=True, columns=columns), strategy))
        self._stop_here(target)

    def _attend(self, call: AttentionCall, by_function: bool) -> None:
        shown = False
        for target in self.attention[id(call.module)]:
            batch = self._current(target) if target.by_function == by_function else None
            if batch is None:
                continue
            if batch.num_tokens is None:
                batch = batch.with_tokens(call.query_bhqd.shape[2], target.where)
            if self.generating and self.phase == "all":
                self.passes.setdefault(id(target), []).append(batch)
                shown = True
                continue
            of_call = (call.query_bhqd.shape[0], call.query_bhqd.shape[2])
            if of_call != (batch.num_samples, batch.num_tokens):
                raise SiteError(
                    f"site {target.where}: its attention is over {of_call} samples and tokens, where the batch has "
                    f"{(batch.num_samples, batch.num_tokens)}: which are whose isn't known."
                )
            self._take_patterns(target, call, batch)
            self._stop_here(target)
        if shown:
            with apart(call.query_bhqd.device):
                self.steps.setdefault((id(call.module), by_function), Steps()).add(call)

    def _attend_whole(self) -> None:
        """What the passes of a generation have shown of attention, as one pass over the whole texts."""
        for target in itertools.chain.from_iterable(self.attention.values()):
            if id(target) in self.passes:
                batch = joined(self.passes[id(target)])
                self._check_room(batch)
                whole = self.steps[id(target.module), target.by_function].whole()
                self._take_patterns(target, whole, batch)

    def _take_patterns(self, target: AttentionTarget, call: AttentionCall, batch: Batch) -> None:
        with apart(call.query_bhqd.device):
            for found in shown_patterns(target, call, batch, self.waiting):
                if isinstance(found, Slab):
                    self.staged.fold(found)
                else:
                    self.staged.keep(found)

    def _current(self, target: Target | AttentionTarget) -> Batch | None:
        """The batch of the stream that a site reports in, noting that it has; None where it isn't asked."""
        if (self.inside is None and not self.generating) or not (self.running or self.latest):
            raise SiteError(
                f"site {target.where} ran outside of a forward pass of the model given to record() "
                f"({type(self.model).__name__}): call that model, not a part of it."
            )
        stream, batch = self.running[-1] if self.running else self.latest  # type: ignore[misc]
        if stream.of == "two" and self.latest is not None:
            stream, batch = self.latest
        if isinstance(target, Target) and target.stream not in (None, stream.name):
            return None
        if isinstance(batch, SiteError):
            raise SiteError(f"site {target.where}: {batch}") from batch
        if id(target) in self.seen:
            raise SiteError(
                f"site {target.where} ran twice in one forward pass, so its samples would count twice. Hook a module "
                "that runs once, such as the one around it."
            )
        self.seen.add(id(target))
        is_new = batch.before_b is not None
        again = self.step > 0 and not is_new and id(target) in self.seen_in  # an encoder, in a later pass of a text
        if again or self.phase == ("prompt" if is_new else "new"):
            return None
        self.seen_in[id(target)] = stream
        return batch

    def _stop_here(self, target: Target | AttentionTarget) -> None:
        if not self.stop or not self.seen >= self.expected.keys():
            return
        if target.module is not self.inside:
            raise _Stop
        self.stopped = True  # at its begin, which isn't in its forward yet; at its end nothing is left to leave out

    def _close(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if recomputing() or self.inside is not root:
            return
        self.inside = None
        self._check_silent()
        if not self.generating:
            self._fold()

    def _leave(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The root has returned, or raised: what runs now is no part of a pass."""
        if self.inside is root:
            self.inside = None

    def _check_silent(self) -> None:
        """`SiteError` for a site that reported nothing, in streams that have run."""
        silent = [t.where for key, t in self.expected.items() if key not in self.seen and self._must_report(t)]
        if not silent:
            return
        shown = ", ".join(silent[:6]) + (f" and {len(silent) - 6} more" if len(silent) > 6 else "")
        raise SiteError(
            f"{len(silent)} of {len(self.expected)} sites reported nothing in this forward pass: {shown}. "
            "The model did not run these modules (or their attention is computed elsewhere: a named site sees what "
            "transformers hands out, a path torch's scaled_dot_product_attention, as of attn_implementation='sdpa'; or "
            "another block's stop=True ended the pass); give Site(…, optional=True) to those that may be left out."
        )

    def _must_report(self, target: Target | AttentionTarget) -> bool:
        """Whether a site runs in this pass: later ones of a text may leave out an encoder, or a vision tower."""
        stream = self.seen_in.get(id(target))
        if self.step <= 0 or stream is None:
            return True
        return isinstance(target, Target) and (stream.goes_on or stream in self.ran)

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

    def _check_room(self, batch: Batch | None) -> None:
        """`TooLarge` if what a pass of such texts still has to make of attention would not fit.

        None: before any pass, when only what has a fixed size is known. `SiteError` for texts beyond that size.
        """
        held, need, once = self._sink()._arena, Counter[torch.device](), Counter[torch.device]()
        asked = list(itertools.chain.from_iterable(self.attention.values()))
        for target in asked:
            device = device_of(target.module)
            nbytes, computing = room_nbytes(target, held, device, batch)
            need[device] += nbytes
            once[device] = max(once[device], computing)
        for device, nbytes in need.items():
            free, nbytes = available_bytes(device), nbytes + once[device]
            if nbytes > free:
                raise TooLarge(
                    f"attention of {len(asked)} layers × {asked[0].num_heads} heads needs {human(nbytes)} more on "
                    f"{device}, {human(free)} are free. Take fewer layers or heads, Site('avg_attn_pattern', "
                    "layers=[…], heads=[…]), fewer queries or keys, such as queries=slice(-8, None), align='end', "
                    "shorter texts, AveragePattern(accumulate=torch.float32), or statistics instead of maps, "
                    "Site('attn_stats', stats=[…])."
                )
