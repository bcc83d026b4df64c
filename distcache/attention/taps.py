"""Q and K as the model's own attention gets them, without changing what it computes.

transformers hands every attention function out through one class, `AttentionInterface`. While a tap is
open, what that class hands out first shows its arguments to `on_call`, then calls the real function with
them untouched. Config, weights and the choice of sdpa, flash or eager stay as they are.

Legend of names: b batch, h query heads, q queries, k keys, d head dim.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from distcache.errors import SiteError


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What one attention module computed with: enough to compute its pattern again, exactly.

    The tensors are the model's own, not copies: read them before the model goes on, and never write.
    A field is set only if the function that ran takes it into account; `sdpa`, for instance, ignores
    `sliding_window` (its mask carries the window) and so it is None there.
    """

    module: nn.Module
    query_bhqd: Tensor  # rotary applied
    key_bhkd: Tensor  # rotary applied, heads not repeated: [B, KV, K, D], and KV divides H
    # As the model passed it: bool (True = may attend) or additive float, broadcastable to [B, H, Q, K];
    # [B, K] with True for what is no padding (flash attention); or None.
    mask: Tensor | None
    scaling: float  # scores are (Q · K) * scaling
    is_causal: bool  # queries see keys up to themselves; read only where mask is None or [B, K], and Q > 1
    softcap: float | None = None  # scores become tanh(scores / softcap) * softcap, before any mask
    sliding_window: int | None = None  # |q − k| < sliding_window; read only where mask is None or [B, K]
    position_bias: Tensor | None = None  # added to the scores; broadcastable to [B, H, Q, K]
    sinks: Tensor | None = None  # [H] logits of a key that takes weight but is not part of the pattern


@contextmanager
def tap_attention(
    modules: Collection[nn.Module],
    on_call: Callable[[AttentionCall], None],
    wanted: Callable[[], bool] = lambda: True,
    steps: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Call `on_call` before every attention that transformers runs for one of `modules` (by identity), if `wanted`.

    `modules` are those that transformers passes to the attention function: `LlamaAttention`,
    `GPT2Attention`, `BertSelfAttention`. Taps may nest and overlap, on one model or several, in several
    threads; each sees its own modules, whichever thread runs them. Recomputation during backward
    (activation checkpointing) does not count as a call. What `on_call` raises passes through the model.

    Calls are square, whole texts: every token is a query and a key. While `steps` says so, what runs goes on with
    texts of earlier passes: a call has the new queries and all keys that the pass is given, for `steps.Steps`.

    Not a collective. ImportError without transformers; SiteError from inside the model's forward when an
    attention computes something that an AttentionCall cannot say.
    """
    interface = _interface_class()
    tap = _Tap({id(module): module for module in modules}, on_call, wanted, steps)
    _open(interface, tap)
    try:
        yield
    finally:
        _close(interface, tap)


@contextmanager
def compiled_flex_attention(as_before: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """transformers' flex attention, which is one compiled function for all models, becomes `as_before` of itself.

    While all else runs eagerly it should be what it was: uncompiled it makes all scores, and other last bits.
    Nothing, where no model has it.
    """
    module = sys.modules.get("transformers.integrations.flex_attention")
    wrapped = getattr(module, "WrappedFlexAttention", None)
    if wrapped is None:
        yield
        return
    with _lock:
        _flex.append(vars(wrapped)["__call__"])
        compiled = _flex[0]
        wrapped.__call__ = lambda self: as_before(compiled(self))
    try:
        yield
    finally:
        with _lock:
            before = _flex.pop()
            if not _flex:
                wrapped.__call__ = before


@dataclass(frozen=True, slots=True, eq=False)
class _Tap:
    modules: Mapping[int, nn.Module]  # by id; the values keep the ids from being reused
    on_call: Callable[[AttentionCall], None]
    wanted: Callable[[], bool]
    steps: Callable[[], bool]


_ABSENT = object()
_lock = threading.Lock()
_taps: tuple[_Tap, ...] = ()  # replaced as a whole, so that a forward reads it without the lock
_flex: list[Any] = []  # what gave flex attention before each open block; the first is its own
_before: dict[str, Any] = {}  # what the class's own namespace held while nothing was tapped


def _interface_class() -> type:
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise ImportError(
            "attention patterns need transformers; install it with: pip install 'distcache[hf]'"
        ) from error
    return AttentionInterface


def _open(interface: type, tap: _Tap) -> None:
    global _taps
    with _lock:
        if not _taps:
            # `get_interface` reaches `__getitem__` for registered functions and returns the model file's
            # own eager function otherwise; some model files index directly. Hence both.
            for name in ("get_interface", "__getitem__"):
                _before[name] = vars(interface).get(name, _ABSENT)
                setattr(interface, name, _tapping(getattr(interface, name), is_default=name == "get_interface"))
        _taps = (*_taps, tap)


def _close(interface: type, tap: _Tap) -> None:
    global _taps
    with _lock:
        _taps = tuple(other for other in _taps if other is not tap)
        if not _taps:
            for name, value in _before.items():
                if value is _ABSENT:
                    delattr(interface, name)
                else:
                    setattr(interface, name, value)
            _before.clear()


def _tapping(lookup: Callable[..., Any], *, is_default: bool) -> Callable[..., Any]:
    @functools.wraps(lookup)
    def tapped_lookup(*args: Any, **kwargs: Any) -> Any:
        function = lookup(*args, **kwargs)
        if isinstance(function, _Tapped) or not callable(function):
            return function
        # What is registered comes wrapped from `__getitem__`; `get_interface` itself adds only its default.
        return _Tapped(function, is_default=is_default)

    return tapped_lookup


class _Tapped:
    """An attention function that shows its arguments to the open taps first.

    Equal to the function it wraps, for code that compares. Kept after its tap has closed, it passes through.
    """

    def __init__(self, function: Callable[..., Any], *, is_default: bool) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.is_default = is_default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = args[0] if args else kwargs.get("module")
        taps = [tap for tap in _taps if id(module) in tap.modules and tap.wanted()]
        # Activation checkpointing runs forward again inside backward: the same samples, a second time.
        if taps and torch._C._current_graph_task_id() == -1:
            calls: dict[bool, AttentionCall] = {}
            for tap in taps:
                steps = tap.steps()
                if steps not in calls:
                    calls[steps] = _describe(self.function, self.is_default, args, kwargs, steps)
                tap.on_call(calls[steps])
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self.function == (other.function if isinstance(other, _Tapped) else other)

    def __hash__(self) -> int:
        return hash(self.function)


# The order in which transformers passes them; no model file passes more than these by position.
_POSITIONAL = ("module", "query", "key", "value", "attention_mask")
# What an AttentionCall can say.
_HANDLED = frozenset({"scaling", "is_causal", "softcap", "sliding_window", "position_bias", "s_aux", "sinks"})
# What passes through an attention function's keywords without a say in its scores.
_HARMLESS = frozenset(
    {
        *("dropout", "deterministic", "training", "kernel_options", "layer_idx", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"),
        *("use_cache", "cache_position", "past_key_value", "past_key_values"),
        *("position_ids", "position_embeddings", "num_items_in_batch"),
    }
)


def _describe(
    function: Callable[..., Any], is_default: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any], steps: bool
) -> AttentionCall:
    """The call that `function(*args, **kwargs)` is, or SiteError. `steps`: see `tap_attention`."""
    given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    module, query_bhqd, key_bhkd = given["module"], given["query"], given["key"]
    where = f"attention of {type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}"
    if len(args) > len(_POSITIONAL):
        raise SiteError(
            f"{where}: expected at most {_POSITIONAL} by position, got {len(args)} positional arguments. "
            f"Load the model with attn_implementation='sdpa', or leave this layer out."
        )

    kind = _kind(function, is_default)
    options = _options(function, kind, {name: v for name, v in given.items() if name not in _POSITIONAL}, where)
    is_causal = options.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if kind in ("eager", "flex"):
        is_causal = False  # they know causality from their mask alone
    num_queries, num_keys = query_bhqd.shape[2], key_bhkd.shape[2]
    mask = _mask(given.get("attention_mask"), kind, query_bhqd, num_keys, where)
    position_bias = options.get("position_bias")
    if kind == "flash" and mask is None and _is_packed(options.get("position_ids")):
        raise SiteError(
            f"{where}: position_ids that start again pack several texts into one row, and flash attention keeps them "
            f"apart without a mask that says so. Pad the texts into a batch instead, or load the model with "
            f"attn_implementation='sdpa'."
        )

    if kind == "sdpa" and is_causal and mask is None and 1 < num_queries < num_keys:
        # A prefill into an empty static cache: transformers, too, leaves its unwritten keys out here.
        key_bhkd, num_keys = key_bhkd[:, :, :num_queries], num_queries
        position_bias = None if position_bias is None else position_bias[..., :num_queries]
    partly = num_queries < num_keys and mask is not None and mask.shape[-1] == num_keys
    if not steps and partly and mask is not None and not bool(lets_through(mask[..., num_queries:])):
        # The same with padding: keys that the mask hides from every query aren't part of the texts. Later tokens
        # of texts see themselves, so this never is of them; to look costs a wait on a GPU.
        key_bhkd, mask, num_keys = key_bhkd[:, :, :num_queries], mask[..., :num_queries], num_queries
        position_bias = None if position_bias is None else position_bias[..., :num_queries]
    if not steps:
        check_square(where, num_queries, num_keys)

    sinks = options.get("s_aux") if options.get("s_aux") is not None else options.get("sinks")
    if sinks is not None and sinks.numel() != query_bhqd.shape[1]:
        raise SiteError(
            f"{where}: expected one attention sink per head ({query_bhqd.shape[1]}), got sinks of shape "
            f"{tuple(sinks.shape)}. Sinks that depend on the query are not supported: leave this layer out."
        )
    scaling = options.get("scaling")
    return AttentionCall(
        module=module,
        query_bhqd=query_bhqd,
        key_bhkd=key_bhkd,
        mask=mask,
        scaling=float(query_bhqd.shape[-1] ** -0.5 if scaling is None else scaling),
        is_causal=is_causal,
        softcap=options.get("softcap"),
        sliding_window=options.get("sliding_window"),
        position_bias=position_bias,
        sinks=None if sinks is None else sinks.reshape(-1),
    )


def check_square(where: str, num_queries: int, num_keys: int) -> None:
    """`SiteError` unless every token is a query and a key."""
    if num_queries != num_keys:
        raise SiteError(
            f"{where}: expected as many queries as keys, got {num_queries} queries and {num_keys} keys. "
            f"Patterns are of whole texts, not of cross-attention, nor of passes that go on with a cache, but for "
            f"model.generate's: record a forward pass over whole texts, with use_cache=False."
        )


@functools.lru_cache(maxsize=256)
def _kind(function: Callable[..., Any], is_default: bool) -> str:
    """Whose arithmetic this is: `sdpa`, `flash`, `flex`, `eager` (of a transformers model file), `other`."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    while isinstance(function, functools.partial):
        function = function.func
    named = {sdpa_attention_forward: "sdpa", flash_attention_forward: "flash", flex_attention_forward: "flex"}
    if function in named:
        return named[function]
    if is_default and getattr(function, "__module__", "").startswith("transformers.models."):
        return "eager"
    return "other"


def _options(function: Callable[..., Any], kind: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keywords that this function takes into account; SiteError for one that we cannot."""
    given = {name: value for name, value in given.items() if value is not None}
    if "cache" in given:
        raise SiteError(
            f"{where}: paged attention (continuous batching) packs the samples of a batch, so its patterns "
            f"cannot be told apart. Record a plain forward pass."
        )
    if kind in ("sdpa", "eager", "flex"):
        # transformers' own functions read only what they name and ignore the rest; so must we. The one
        # exception: eager functions read the module's sinks, which are passed as `s_aux` too. No such kind
        # reads a window, which stands in their masks.
        named = _parameters(function) | ({"s_aux"} if kind == "eager" else set())
        given = {name: value for name, value in given.items() if name in named}
    unknown = sorted(given.keys() - _HANDLED - _HARMLESS)
    if unknown:
        raise SiteError(
            f"{where}: expected no keywords beyond {sorted(_HANDLED)} that may change the scores, got "
            f"{unknown} for {getattr(function, '__name__', function)!s}. Load the model with "
            f"attn_implementation='sdpa', or leave this layer out."
        )
    return given


@functools.lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _is_packed(position_ids: Tensor | None) -> bool:
    # Only a batch of one row is read this way by flash attention (`_is_packed_sequence`), and only without a mask.
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[0] != 1:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def lets_through(mask: Tensor) -> Tensor:
    """Whether a mask, bool or added to scores, lets any key through: a bool tensor on its device."""
    return (mask > torch.finfo(mask.dtype).min / 2).any() if mask.is_floating_point() else mask.any()


def _mask(mask: Any, kind: str, query_bhqd: Tensor, num_keys: int, where: str) -> Tensor | None:
    """The mask as AttentionCall defines it: None, [B, K] (padding) or four dims."""
    if mask is None:
        return None
    if hasattr(mask, "mask_mod"):
        return _written_out(mask, query_bhqd.shape[2], num_keys, where)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SiteError(
            f"{where}: expected a mask that broadcasts to [B, H, Q, K], or [B, K], got {got}. "
            f"Load the model with attn_implementation='sdpa'."
        )
    if kind in ("eager", "flex") and mask.dtype == torch.bool:
        mask = mask.to(query_bhqd.dtype)  # they add what they get: True is +1 there
    if kind == "flex" and mask.dim() == 4:
        mask = mask[:, :1, :, :num_keys]  # as it reads such a mask: of the first head, for all
    if mask.dim() == 4 or (mask.dim() == 2 and kind not in ("sdpa", "eager")):
        return mask
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)  # broadcast from the right, as torch does


# By BlockMask, for as long as it lives: all layers of a pass are given the same one.
_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _written_out(block_mask: Any, num_queries: int, num_keys: int, where: str) -> Tensor:
    """flex attention's mask, which is a function and the tiles that are looked at, as bool [B or 1, H or 1, Q, K]."""
    from torch.nn.attention.flex_attention import create_mask

    found: Tensor | None = _masks.get(block_mask)
    if found is not None and found.shape[2:] == (num_queries, num_keys):
        return found
    b, h, q, k = block_mask.shape
    if num_queries > q or num_keys > k:
        raise SiteError(
            f"{where}: expected a BlockMask of at least {num_queries} queries and {num_keys} keys, got one of {q} and "
            f"{k}. Make it for the tokens of this pass: create_block_mask(…, Q_LEN={num_queries}, KV_LEN={num_keys})."
        )
    tiles = block_mask.to_dense() != 0
    with torch.inference_mode(False), torch.no_grad():
        found = create_mask(block_mask.mask_mod, b, h, num_queries, num_keys, tiles.device)
        for dim, size in zip((2, 3), block_mask.BLOCK_SIZE, strict=True):
            tiles = tiles.repeat_interleave(size, dim).narrow(dim, 0, found.shape[dim])
        found = found & tiles
    _masks[block_mask] = found
    return found
