"""Q and K as a model hands them to torch's own attention function, for code outside of transformers.

While a tap is open, `torch.nn.functional.scaled_dot_product_attention` first shows its arguments to `on_call`,
as the call of the module in which it runs, by whichever name it's called: a mode sees all calls but those from
within torch's own functions, which look the name up. `nn.MultiheadAttention` is such a one, unless it's asked for
weights or computes all in one go (`midst.modules_called` has it call its parts).

Legend of names: b batch, h query heads, q queries, k keys, d head dim.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from distcache.attention.taps import AttentionCall, check_square
from distcache.errors import SiteError

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@contextmanager
def tap_functions(
    modules: Collection[nn.Module],
    on_call: Callable[[AttentionCall], None],
    wanted: Callable[[], bool] = lambda: True,
    steps: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Call `on_call` before every attention that one of `modules` (by identity) hands to torch's function, if `wanted`.

    An attention is the innermost module's that runs. Recomputation during backward (activation checkpointing) does
    not count as a call; what `on_call` raises passes through the model. Not a collective. `SiteError` from inside the
    model's forward for tensors that aren't [B, H, S, D]. Every function of torch's takes a microsecond more meanwhile.
    `steps`: as of `tap_attention`.
    """
    running = threading.local()  # a model's forward runs in one thread, another model's in another

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not hasattr(running, "modules"):
            running.modules = []
        # A pass that raised has left its modules behind: none of them runs inside of itself.
        if module in running.modules:
            del running.modules[running.modules.index(module) :]
        running.modules.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in running.modules:
            del running.modules[running.modules.index(module) :]

    def show(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if getattr(running, "modules", None) and wanted() and torch._C._current_graph_task_id() == -1:
            on_call(_describe(running.modules[-1], {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}, steps()))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_looked_up(show))
        stack.enter_context(_Mode(show))
        yield


Show = Callable[[tuple[Any, ...], Mapping[str, Any]], None]

_attend = functional.scaled_dot_product_attention
_lock = threading.Lock()
_shows: tuple[Show, ...] = ()  # replaced as a whole, so that a forward reads it without the lock
_thread = threading.local()  # whether a call that was looked up is under way, which the mode sees too


class _Mode(TorchFunctionMode):
    """Shows the arguments of torch's attention function before it runs."""

    def __init__(self, show: Show) -> None:
        super().__init__()
        self._show = show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _attend and not getattr(_thread, "shown", False):
            self._show(args, kwargs)
        return func(*args, **kwargs)


@functools.wraps(_attend)
def _attend_and_show(*args: Any, **kwargs: Any) -> Any:
    for show in _shows:
        show(args, kwargs)
    _thread.shown = True
    try:
        return _attend(*args, **kwargs)
    finally:
        _thread.shown = False


@contextmanager
def _looked_up(show: Show) -> Iterator[None]:
    """Whoever looks torch's function up by its name gets one that shows its arguments."""
    global _shows
    with _lock:
        _shows = (*_shows, show)
        functional.scaled_dot_product_attention = _attend_and_show
    try:
        yield
    finally:
        with _lock:
            _shows = tuple(other for other in _shows if other is not show)
            if not _shows:
                functional.scaled_dot_product_attention = _attend


def _describe(module: nn.Module, given: Mapping[str, Any], steps: bool) -> AttentionCall:
    query_bhqd, key_bhkd, mask = given["query"], given["key"], given.get("attn_mask")
    where = f"attention of {type(module).__name__}"
    if query_bhqd.dim() != 4 or key_bhkd.dim() != 4:
        raise SiteError(
            f"{where}: expected queries and keys [B, H, S, D], got {tuple(query_bhqd.shape)} and "
            f"{tuple(key_bhkd.shape)}: heads that are folded into the batch can't be told from samples."
        )
    num_queries, num_keys = query_bhqd.shape[2], key_bhkd.shape[2]
    if not steps:
        check_square(where, num_queries, num_keys)
    is_causal, scale = bool(given.get("is_causal", False)), given.get("scale")
    if mask is not None:
        mask = mask if mask.dim() == 4 else _four_dims(mask)  # the same object, by which layers' masks are told alike
    elif is_causal and num_queries != num_keys:
        # Torch counts queries from the first key, whatever came before them; nobody else reads causality so.
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query_bhqd.device).tril()
    return AttentionCall(
        module=module,
        query_bhqd=query_bhqd,
        key_bhkd=key_bhkd,
        mask=mask,
        scaling=float(query_bhqd.shape[-1] ** -0.5 if scale is None else scale),
        is_causal=is_causal,
    )


def _four_dims(mask: Tensor) -> Tensor:
    """A mask that broadcasts to [B, H, Q, K], as four dims."""
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
