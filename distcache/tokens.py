"""Which tokens of a batch count, and the rows that a site's `tokens` selects of them.

Legend of names: b samples of a batch, s tokens, n rows that are kept.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcache.errors import SiteError
from distcache.ledger import samples_of
from distcache.strategies import Columns

Tokens = Literal["all", "last", "mean"] | slice | Sequence[int] | int
Selector = str | tuple[Any, ...]

_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def as_selector(tokens: Tokens, where: str) -> Selector:
    """A hashable form of `tokens`, by which sites that select alike share their work. `SiteError`."""
    if isinstance(tokens, str) and tokens in ("all", "last", "mean"):
        return tokens
    if isinstance(tokens, slice):
        try:
            tokens.indices(0)
            return ("slice", tokens.start, tokens.stop, tokens.step)
        except (TypeError, ValueError) as error:
            raise SiteError(f"site {where!r}: tokens={tokens!r}: {error}.") from error
    numbers = (tokens,) if isinstance(tokens, int) else tokens
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    if is_list and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        return tuple(numbers)
    raise SiteError(f"site {where!r}: tokens is 'all', 'last', 'mean', a slice, a number or a list, got {tokens!r}.")


class Selection:
    """The rows that one selector takes from one batch, in (sample, token) order.

    `columns`: what is known of each row. `at`: its sample and token, int64 [n] each. `whole`: no token is left out.
    `means`: where a row is the mean over a sample's valid tokens, those, bool [B, S]; `at` names samples that have any.
    """

    def __init__(
        self, batch: Batch, at: tuple[Tensor, Tensor], position: Tensor, whole: bool, means: Tensor | None = None
    ) -> None:
        b, s = at
        beside = {
            name: column[b] if column.dim() == 1 else column[b, s]
            for name, column in batch.columns.items()
            if column.dim() == 1 or means is None
        }
        self.columns = Columns({"sample": batch.samples[b], "position": position, **beside}, batch.indexed)
        self.at, self.whole, self.means = at, whole, means
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rows(self, x_bs: Tensor) -> Tensor:
        """The selected rows [n, …] of a tensor [B, S, …]; a view where they are all tokens as they lie."""
        if self.means is not None:
            # Padding may hold NaN, so it is left out, not multiplied by 0. Sums are float32 at least, pairwise.
            dtype = torch.promote_types(x_bs.dtype, torch.float32)
            if self.whole:
                return x_bs.mean(1, dtype=dtype)
            means = [x_bs[b][self.means[b].to(x_bs.device)].mean(0, dtype=dtype) for b in self.at[0].tolist()]
            return torch.stack(means) if means else x_bs.new_empty((0, *x_bs.shape[2:]), dtype=dtype)
        if self.whole:
            return x_bs.flatten(0, 1)
        if x_bs.device not in self._moved:
            self._moved[x_bs.device] = (self.at[0].to(x_bs.device), self.at[1].to(x_bs.device))
        return x_bs[self._moved[x_bs.device]]


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one forward pass and which of their tokens are valid.

    `num_tokens`: S, or None for a model whose input has no tokens. `valid_bs`: bool on the CPU, or None where all are
    valid. `samples`: int64 [B], each sample's index in the data set if `indexed`, else its number among those recorded.
    `columns`: tensors [B] or [B, S] by name.
    """

    num_samples: int
    num_tokens: int | None
    valid_bs: Tensor | None
    samples: Tensor
    indexed: bool
    columns: Mapping[str, Tensor]
    _selections: dict[Selector, Selection] = field(default_factory=dict)

    @functools.cached_property
    def per_sample(self) -> Columns:
        """What is known of values that have one row a sample."""
        beside = {name: column for name, column in self.columns.items() if column.dim() == 1}
        return Columns({"sample": self.samples, "position": torch.zeros_like(self.samples), **beside}, self.indexed)

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each sample's valid tokens, (0, 0) where it has none. `SiteError` for a mask with holes."""
        assert self.num_tokens is not None
        if self.valid_bs is None:
            return [(0, self.num_tokens)] * self.num_samples
        length = self.valid_bs.sum(1)
        first = self.valid_bs.int().argmax(1)  # the first of equal values
        reach = torch.arange(self.num_tokens)
        run_bs = (reach >= first[:, None]) & (reach < (first + length)[:, None])
        if not torch.equal(run_bs & self.valid_bs, self.valid_bs):
            raise SiteError(
                "averaged attention needs each sample's valid tokens in one run, got a mask with holes in it: record "
                "these samples without attention sites, or pad at one end."
            )
        return [(a, a + n) if n else (0, 0) for a, n in zip(first.tolist(), length.tolist(), strict=True)]

    def select(self, selector: Selector) -> Selection:
        """What a selector takes of this batch; worked out once, however many sites ask. Needs tokens."""
        if selector not in self._selections:
            self._selections[selector] = self._select(selector)
        return self._selections[selector]

    def _select(self, selector: Selector) -> Selection:
        assert self.num_tokens is not None
        valid, whole = self.valid_bs, self.valid_bs is None
        if valid is None:
            valid = torch.ones(self.num_samples, self.num_tokens, dtype=torch.bool)
        length = valid.sum(1)
        position_bs = valid.cumsum(1) - 1  # counts valid tokens; of no meaning elsewhere
        if selector == "mean":
            b = length.nonzero()[:, 0]
            return Selection(self, (b, b), torch.zeros_like(b), whole and self.num_tokens > 0, means=valid)
        chosen = valid
        if selector == "last":
            chosen = valid & (position_bs == (length - 1)[:, None])
        elif selector != "all":
            chosen = torch.zeros_like(valid)
            for b_, n in enumerate(length.tolist()):
                if selector[0] == "slice":
                    wanted: Iterable[int] = range(*slice(*selector[1:]).indices(n))
                else:
                    wanted = [int(token) + n if int(token) < 0 else int(token) for token in selector]
                chosen[b_] = valid[b_] & torch.isin(position_bs[b_], torch.tensor(list(wanted), dtype=torch.int64))
        b, s = chosen.nonzero(as_tuple=True)
        return Selection(self, (b, s), position_bs[b, s], whole and selector == "all")


# -- what a forward pass was called with -----------------------------------------------------------------------


def open_batch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    mask: Tensor | None,
    index: Iterable[int] | Tensor | None,
    columns: Mapping[str, Tensor],
    first: int,
) -> Batch:
    """The batch of a call `model(*args, **kwargs)`. `SiteError` where mask, index or columns don't fit it.

    `mask`: padding [B, S], non-zero for valid tokens; None for the model's own `attention_mask`. `first`: the number of
    the first sample where there is no index.
    """
    given = bound_arguments(model, args, kwargs)
    if any(map(_holds_tokens, given.values())):
        raise SiteError(
            "recording during cached decoding (generate) is not supported: run forward passes over whole texts."
        )
    num_samples, num_tokens = _sizes(given)
    mask = given.get("attention_mask") if mask is None else mask
    valid = None if mask is None else _valid(mask, num_samples, num_tokens)
    if index is None:
        samples = torch.arange(first, first + num_samples)
    else:
        samples = samples_of(index)
        if len(samples) != num_samples:
            raise SiteError(f"index has {len(samples)} entries for a batch of {num_samples} samples: one for each.")
    beside = {}
    for name, column in columns.items():
        try:
            beside[name] = torch.as_tensor(column).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SiteError(f"column {name!r}: expected a tensor of numbers: {error}. Number words first.") from error
        shape = tuple(beside[name].shape)
        if shape not in ((num_samples,), (num_samples, num_tokens)):
            per_token = "" if num_tokens is None else f", or per token, {(num_samples, num_tokens)}"
            raise SiteError(
                f"column {name!r} has shape {shape}: expected one entry per sample, {(num_samples,)}{per_token}."
            )
    return Batch(num_samples, num_tokens, valid, samples, index is not None, beside)


def _valid(mask: Any, num_samples: int, num_tokens: int | None) -> Tensor | None:
    """Which tokens are valid, bool [B, S] on the CPU; None where all are. `SiteError` for what is no padding mask."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SiteError(f"expected a padding mask [B, S], got {got}. Give the 2-D one: record(…, mask=mask_bs).")
    if num_tokens is None:
        raise SiteError(
            f"a mask {tuple(mask.shape)} was given, but the model's input has no tokens that it could hide."
        )
    if tuple(mask.shape) != (num_samples, num_tokens):
        raise SiteError(
            f"the mask {tuple(mask.shape)} doesn't fit the input's (samples, tokens), {(num_samples, num_tokens)}: "
            "every token of the batch needs an entry."
        )
    valid_bs = mask.detach().cpu() != 0
    return None if bool(valid_bs.all()) else valid_bs


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, in the signature's order: hooks see no names of those passed by position."""
    try:
        bound = _signature(module).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}{i}": item for i, item in enumerate(value)})
        else:
            found[name] = value
    return found


def _signature(module: nn.Module) -> inspect.Signature:
    """A module's own; of a wrapper that takes anything, such as DistributedDataParallel, that of what it wraps."""
    signature = inspect.signature(module.forward)
    inside = (getattr(module, name, None) for name in ("_orig_mod", "module"))
    inner = next((found for found in inside if isinstance(found, nn.Module)), None)
    takes_anything = all(parameter.kind in _VARIADIC for parameter in signature.parameters.values())
    return signature if inner is None or not takes_anything else _signature(inner)


def _holds_tokens(value: Any) -> bool:
    """Whether an argument is a cache of transformers with tokens of earlier passes in it."""
    length = getattr(value, "get_seq_length", None)
    try:
        return length is not None and int(length()) > 0
    except ValueError:  # a first layer that keeps no tokens
        return False


def _sizes(given: Mapping[str, Any]) -> tuple[int, int | None]:
    """(B, S or None) of the model's main input: the token ids, the embeddings, else the first tensor.

    Integers [B, S] are token ids, floats [B, S, D] embeddings; anything else has samples along dim 0 and no tokens.
    """
    named = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    main = next((x for x in (*named, *given.values()) if isinstance(x, Tensor)), None)
    if main is None or main.dim() == 0:
        raise SiteError(
            "the model was called without a tensor that has samples along dim 0, so the batch's size isn't known: pass "
            "the input as a tensor."
        )
    has_tokens = main.dim() == (3 if main.is_floating_point() else 2)
    return main.shape[0], main.shape[1] if has_tokens else None
