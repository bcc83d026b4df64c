"""The rows that a site's `tokens` selects of a batch, and what is known of each.

Legend of names: b samples of a batch, s tokens, n rows that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.errors import SiteError
from distcache.strategies import Columns

Tokens = Literal["all", "last", "mean"] | slice | Sequence[int] | int
Selector = str | tuple[Any, ...]


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
        if batch.before_b is not None:
            position = position + batch.before_b[b]
        if batch.step is not None:
            beside["step"] = torch.full_like(position, batch.step)
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
    """The samples of one stream of a forward pass, and which of their tokens are valid.

    `num_tokens`: S, or None where the input has no tokens. `valid_bs`: bool on the CPU, or None where all are valid; of
    an input without tokens, of those that values are said to have.
    `samples`: int64 [B], each sample's index in the data set if `indexed`, else its number among those recorded.
    `columns`: tensors [B] or [B, S] by name. `before_b`: int64 [B], the valid tokens of earlier passes of a generation.
    `step`: of a generation: 0 the prompt, n the pass that was given the n-th new token.
    `patches`: values [B, T, D] have T tokens, whatever the input was (a vision tower's).
    """

    num_samples: int
    num_tokens: int | None
    valid_bs: Tensor | None
    samples: Tensor
    indexed: bool
    columns: Mapping[str, Tensor]
    before_b: Tensor | None = None
    step: int | None = None
    patches: bool = False
    _selections: dict[Selector, Selection] = field(default_factory=dict)
    _by_length: dict[int, Batch] = field(default_factory=dict)

    @functools.cached_property
    def per_sample(self) -> Columns:
        """What is known of values that have one row a sample."""
        beside = {name: column for name, column in self.columns.items() if column.dim() == 1}
        return Columns({"sample": self.samples, "position": torch.zeros_like(self.samples), **beside}, self.indexed)

    def with_tokens(self, num_tokens: int, where: str) -> Batch:
        """This batch, whose input has no tokens, where values have that many. `SiteError` for a mask of others."""
        if self.valid_bs is not None and self.valid_bs.shape[1] != num_tokens:
            raise SiteError(
                f"site {where}: its values have {num_tokens} tokens a sample, and the mask "
                f"{tuple(self.valid_bs.shape)} is of something else, such as the input's frames or pixels: padding "
                "would count. Give one that fits, record(…, mask=mask_bs)."
            )
        if num_tokens not in self._by_length:
            self._by_length[num_tokens] = dataclasses.replace(
                self, num_tokens=num_tokens, patches=False, _selections={}, _by_length={}
            )
        return self._by_length[num_tokens]

    def unpacked(self, x_n: Tensor, where: str) -> Tensor:
        """Rows [B·S, …], or those of valid tokens alone, as [B, S, …]. `SiteError` for any other number of rows."""
        assert self.num_tokens is not None
        if x_n.dim() and len(x_n) == self.num_samples * self.num_tokens:
            return x_n.unflatten(0, (self.num_samples, self.num_tokens))
        num_valid = self.num_samples * self.num_tokens if self.valid_bs is None else int(self.valid_bs.sum())
        if self.valid_bs is None or x_n.dim() == 0 or len(x_n) != num_valid:
            raise SiteError(
                f'site {where}: layout="ND" expects one row for each of the {self.num_samples * self.num_tokens} '
                f"tokens, or for each of the {num_valid} valid ones, got {tuple(x_n.shape)}."
            )
        x_bs = x_n.new_zeros((self.num_samples, self.num_tokens, *x_n.shape[1:]))
        x_bs[self.valid_bs.to(x_n.device)] = x_n
        return x_bs

    @property
    def longest(self) -> int:
        """The most valid tokens that a sample has. Needs tokens."""
        assert self.num_tokens is not None
        return self.num_tokens if self.valid_bs is None else max(self.valid_bs.sum(1).tolist(), default=0)

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


def joined(passes: Sequence[Batch]) -> Batch:
    """The whole texts of a generation, of its passes: of the prompt's what is known of samples, of all the tokens.

    A pass that was fed whole texts again brings what is new in them. Needs tokens.
    """
    first, total = passes[0], 0
    valid, columns = [], {name: [column] for name, column in first.columns.items() if column.dim() > 1}
    for batch in passes:
        assert batch.num_tokens is not None
        again = total if batch.num_tokens > total > 0 else 0
        valid_bs = batch.valid_bs
        if valid_bs is None:
            valid_bs = torch.ones(batch.num_samples, batch.num_tokens, dtype=torch.bool)
        valid.append(valid_bs[:, again:])
        if batch is not first:
            for name, parts in columns.items():
                parts.append(batch.columns[name][:, again:])
        total += batch.num_tokens - again
    whole_bs = torch.cat(valid, 1)
    return dataclasses.replace(
        first,
        num_tokens=total,
        valid_bs=None if bool(whole_bs.all()) else whole_bs,
        columns={**first.columns, **{name: torch.cat(parts, 1) for name, parts in columns.items()}},
        _selections={},
        _by_length={},
    )
