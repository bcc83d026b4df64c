"""What recording does in the midst of a model's forward pass, so that the model goes on as if it weren't there."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distcache.errors import SiteError

FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # may compute what is theirs in one go
_SPREAD = {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel", "PipelineStage"}


_eager_lock = threading.Lock()
_eager_blocks = 0
_stance: Any = None  # of the first block, which knows what was before


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiled code runs eagerly meanwhile: compiled graphs leave hooks out without a word.

    The stance is the whole process's. Blocks may overlap, in one thread or in several: the last that ends puts back
    what the first has found. `SiteError` inside of compiled code, which goes on as it has begun.
    """
    global _eager_blocks, _stance
    with _eager_lock:
        try:
            stance = torch.compiler.set_stance("force_eager")
        except RuntimeError as error:
            raise SiteError(
                "record() was opened inside of a function that torch.compile compiles, where hooks are left out: open "
                "it around the call of that function, or in one that has @torch.compiler.disable."
            ) from error
        _stance, _eager_blocks = _stance or stance, _eager_blocks + 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_blocks -= 1
            if not _eager_blocks:
                _stance.__exit__(None, None, None)
                _stance = None


def compiled_as_before(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that runs compiled also while `eager` is open: one in which no hook can be."""

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        with _eager_lock:  # the stance is everybody's
            if not _eager_blocks:
                return function(*args, **kwargs)
            with torch.compiler.set_stance("default"):
                return function(*args, **kwargs)

    return compiled


def recomputing() -> bool:
    """Whether activation checkpointing runs forward again inside backward: the same samples, a second time."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Arithmetic of ours in the midst of a model's: what is made here can be written to later, no graph holds it, and
    autocast doesn't round it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, or where accelerate brings them from the CPU or the disk."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    given = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((found for found in given if found is not None), "cpu"))


def check_stop(model: nn.Module, optional: Sequence[str]) -> None:
    """`SiteError` where a pass can't be ended after its last site; `optional`: sites that may report nothing."""
    if optional:
        raise SiteError(
            f"stop=True needs to know which site is the last: {optional[0]} is optional. Leave out one of them."
        )
    spread = {kind.__name__ for module in model.modules() for kind in type(module).__mro__} & _SPREAD
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    if spread or sharded or (getattr(model, "tp_size", None) or 1) > 1:
        raise SiteError(
            "stop=True would leave ranks out of step: the model is spread over them ("
            f"{min(spread, default='DTensor')}), and others may wait for what comes after the last site. Leave it out."
        )


@contextlib.contextmanager
def replaced(model: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """A method of this one object wrapped; what the object had of its own comes back. Blocks may end in any order."""
    own, plain = vars(model), getattr(model, name)
    wrapper = wrap(plain)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (plain if known["ended"] else wrapper)(*args, **kwargs)

    known = {"ended": False, "before": own.get(name)}
    vars(method)["_replaced"] = known
    own[name] = method
    try:
        yield
    finally:
        known["ended"] = True
        while (outermost := getattr(own.get(name), "_replaced", {})).get("ended"):  # and what ended before, beneath it
            if outermost["before"] is None:
                del own[name]
            else:
                own[name] = outermost["before"]


@contextlib.contextmanager
def modules_called() -> Iterator[None]:
    """torch's transformer layers call their parts, where they would compute all in one go and leave hooks out."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Offload:
    """Copies from GPUs to pinned memory, on a stream beside the model's. They are complete after `wait`."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def copy(self, x: Tensor) -> Tensor:
        """`x` on the CPU, soon. Nobody writes to it meanwhile."""
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        stream = self._streams[x.device]
        x = x.contiguous()
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)  # a copy to other memory isn't asynchronous
        stream.wait_stream(torch.cuda.current_stream(x.device))  # until x has been computed
        with torch.cuda.stream(stream):
            kept.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory isn't given to others before it was read
        return kept

    def wait(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
