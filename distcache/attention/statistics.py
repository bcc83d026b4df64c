"""Statistics of attention per head, in one pass over blocks of queries: what is asked of a pattern, without S × S.

Every statistic is a mean over queries (or over pairs of a query and a key), so it has a total and a count: of each text
the mean, and how many queries that is of, as its weight. Averages over texts weigh each by that, so that every query
counts once, however texts are dealt to batches and ranks; a mean of the texts' means would be another number.

Where no count is named below, all of a text's queries count that are asked for, and those that see no key count as
zeros. Weight that attention sinks take is nobody's, so that rows sum to less than one.

Legend of names: B samples, H heads, b samples taken together, h heads, q queries, k keys, c cells of a statistic,
l the text's tokens, n of something.
"""

from __future__ import annotations

import abc
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcache.attention import blockwise
from distcache.attention.taps import AttentionCall
from distcache.errors import SiteError
from distcache.strategies import Value
from distcache.strategies.positions import Align, Positions, places


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of the patterns of b texts of one length: of queries `rows`, and of keys from `first` on; others have 0.

    `columns`: what is known of the texts' tokens, [b, l] by name. All positions count from texts' first tokens.
    """

    probs_bhqk: Tensor
    rows: range
    first: int
    length: int
    columns: Mapping[str, Tensor]

    @property
    def row_q(self) -> Tensor:
        """The rows' positions."""
        return torch.arange(self.rows.start, self.rows.stop, self.rows.step, device=self.probs_bhqk.device)

    def picked(self, key_q: Tensor) -> Tensor:
        """The weight of one key of each query, [b, h, q]; 0 for one that isn't there."""
        b, h, q, k = self.probs_bhqk.shape
        at_q = key_q - self.first
        picked_bhq = self.probs_bhqk.gather(-1, at_q.clamp(0, k - 1).view(1, 1, q, 1).expand(b, h, q, 1))[..., 0]
        return picked_bhq.masked_fill_((at_q < 0) | (at_q >= k), 0.0)


class Statistic(abc.ABC):
    """What is asked of a pattern. Subclasses are frozen dataclasses.

    `name` stands in the key. `shape`: of one head's. `column`: of integers, one a token, that it needs; −1 for none.
    """

    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def column(self) -> str | None:
        return None

    @property
    def num_classes(self) -> int | None:
        """How many values its column has; None for any."""
        return None

    @abc.abstractmethod
    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        """(sums over a block's queries [b, h, *shape], how many of them count, broadcastable to [b, *shape])."""


def _check_number(what: str, name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SiteError(f"{what} has {name}=1 or more, got {number!r}.")


@dataclass(frozen=True, slots=True)
class Entropy(Statistic):
    """−Σ_k p·ln p of each row, in nats (Clark et al. 2019): the mean of the rows' entropies.

    That of an averaged pattern is another, larger number.
    """

    name = "entropy"

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        # torch.special.entr takes twice as long on a CPU. 0 · ln tiny is 0, and NaN stays NaN.
        least = torch.finfo(block.probs_bhqk.dtype).tiny
        return -_summed(block.probs_bhqk.clamp_min(least).log_().mul_(block.probs_bhqk).sum(-1)), len(block.rows)


@dataclass(frozen=True, slots=True)
class First(Statistic):
    """Attention to the text's first token: the mean over all queries, the first too (in Gu et al. 2025 the importance
    of the first token as a sink).
    """

    name = "first"

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        return _summed(block.picked(torch.zeros_like(block.row_q))), len(block.rows)


@dataclass(frozen=True, slots=True)
class Previous(Statistic):
    """Attention to the token before: the mean over all queries but a text's first (Olsson et al. 2022)."""

    name = "previous"

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        return _summed(block.picked(block.row_q - 1)), len(block.rows) - (block.rows[0] == 0)


@dataclass(frozen=True, slots=True)
class Self(Statistic):
    """Attention of a token to itself: the mean over all queries."""

    name = "self"

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        return _summed(block.picked(block.row_q)), len(block.rows)


@dataclass(frozen=True, slots=True)
class _Earlier(Statistic):
    """Attention to earlier tokens of the query's own id, or to those that came so many behind them."""

    behind = 0

    @property
    def column(self) -> str | None:
        return "token_id"

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        rows, bottom = block.rows, block.rows[-1] + 1
        id_bl = block.columns["token_id"][:, :bottom]
        earlier_ql = torch.arange(bottom, device=id_bl.device) < block.row_q[:, None]
        same_bql = (id_bl[:, rows.start : bottom : rows.step, None] == id_bl[:, None]) & earlier_ql
        low = max(block.first, self.behind)  # an occurrence before the query, so these keys end with it
        there_bqk = same_bql[..., low - self.behind : bottom - self.behind]
        probs_bhqk = block.probs_bhqk[..., low - block.first : bottom - block.first]
        return _summed((probs_bhqk * there_bqk[:, None]).sum(-1)), same_bql.any(-1).sum(-1)


@dataclass(frozen=True, slots=True)
class Duplicate(_Earlier):
    """Attention to all earlier tokens of the query's own id, summed (Wang et al. 2023): the mean over the queries that
    have such a token before them.
    """

    name = "duplicate"


@dataclass(frozen=True, slots=True)
class Induction(_Earlier):
    """Attention to all tokens that came right after an earlier token of the query's own id, summed: the mean over the
    queries that have such a token before them.

    The prefix matching of Olsson et al. 2022, in any text. Their score is a mean over entries, of a sequence repeated
    four times, so that a head that looks at all three repeats before has a third; ours sums what a query gives to all
    of them. (The appendix there says "preceded"; what an induction head looks at is what followed, as in the paper's
    figures and in TransformerLens.) In a run of one token the token after an earlier one may be the query itself.
    """

    name = "induction"
    behind = 1


@dataclass(frozen=True, slots=True)
class Distance(Statistic):
    """Attention by distance, query − key: bin i is the mean over all pairs of a text with
    edges[i] ≤ query − key < edges[i + 1].

    Pairs that a mask bars count with 0; those that a text is too short for don't count. `edges`: ascending integers, of
    which negative ones are of keys after the query; or a number n, for each of the distances 0 to n − 1 alone.
    """

    edges: Sequence[int] | int = (0, *(2**n for n in range(13)))

    name = "distance"

    def __post_init__(self) -> None:
        edges = tuple(range(self.edges + 1)) if isinstance(self.edges, int) else tuple(self.edges)
        object.__setattr__(self, "edges", edges)
        whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
        if not whole or len(edges) < 2 or any(b <= a for a, b in itertools.pairwise(edges)):
            raise SiteError(f"Distance takes a number of distances, or two or more ascending edges, got {self.edges}.")

    @property
    def _edges(self) -> tuple[int, ...]:
        assert not isinstance(self.edges, int)
        return tuple(self.edges)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._edges) - 1,)

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        edges = self._edges
        edge_c = blockwise.on_device(edges, block.probs_bhqk.device)
        # Of a bin's keys query − edges[c + 1] + 1 to query − edges[c], as many as the text has.
        last_qc = (block.row_q[:, None] - edge_c[:-1]).clamp_max(block.length - 1)
        beyond_qc = (block.row_q[:, None] - edge_c[1:]).clamp_min(-1)
        count_c = (last_qc - beyond_qc).clamp_min(0).sum(0)
        total_bhc = block.probs_bhqk.new_zeros((*block.probs_bhqk.shape[:2], *self.shape), dtype=torch.float64)
        summed_bhn, largest = self._by_distance(block)
        # Bins of neighbouring distances lie side by side, so these matrices are small; and sums have one order, always.
        step = max(512, 2**18 // len(edge_c))
        for start in range(0, summed_bhn.shape[-1], step):
            part_bhn = summed_bhn[..., start : start + step]
            high = largest - start
            low = high - part_bhn.shape[-1] + 1
            bins = range(max(0, bisect_right(edges, low) - 1), min(bisect_right(edges, high), len(edges) - 1))
            distance_n = torch.arange(high, low - 1, -1, device=edge_c.device)
            bin_n = torch.bucketize(distance_n, edge_c, right=True) - 1 - bins.start
            total_bhc[..., bins.start : bins.stop] += part_bhn.double() @ _one_hot(bin_n, len(bins), torch.float64)
        return total_bhc, count_c

    def _by_distance(self, block: Block) -> tuple[Tensor, int]:
        """(the block's weights summed by distance, [b, h, n], from a distance down, by one each; that distance)."""
        rows, probs_bhqk = block.rows, block.probs_bhqk
        first = max(block.first, rows[0] - self._edges[-1] + 1)
        last = min(block.first + probs_bhqk.shape[-1], rows[-1] - self._edges[0] + 1)
        b, h, q, _ = probs_bhqk.shape
        if last <= first:
            return probs_bhqk.new_zeros((b, h, 0)), 0
        # Each row is written so much further to the left than the one before that distances lie below each other.
        width = last - first + q * rows.step
        cut_nqk = probs_bhqk[..., first - block.first : last - block.first].flatten(0, 1)
        found = []
        for part_nqk in cut_nqk.tensor_split(min(b * h, 3)):  # as rows may become twice as long
            sheared_nqw = probs_bhqk.new_zeros((len(part_nqk), q, width))
            strides = (q * width, width - rows.step, 1)
            sheared_nqw.as_strided(part_nqk.shape, strides, q * rows.step).copy_(part_nqk)
            found.append(sheared_nqw.sum(1))
        return torch.cat(found).unflatten(0, (b, h)), rows[0] - first + q * rows.step


@dataclass(frozen=True, slots=True)
class Pooled(Statistic):
    """A map of `parts` × `parts`: a text cut into so many equal parts, the mean over a part's queries of what they give
    to each part's keys; rows sum to one.

    Cuts may go through tokens: such a query counts for both parts by how much of it lies in each, and what a key is
    given is split so. Hence texts shorter than `parts` have all cells too.
    """

    parts: int = 16

    name = "pooled"

    def __post_init__(self) -> None:
        _check_number("Pooled", "parts", self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts, self.parts)

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        first, rows = block.first, block.rows
        share_nk = self._share(block, range(first, first + block.probs_bhqk.shape[-1]))
        share_nq = self._share(block, rows)
        return _two_sided(block, share_nq, share_nk.mT), share_nq.sum(-1)[:, None]

    def _share(self, block: Block, tokens: range) -> Tensor:
        """How much of each token lies in each part, float64 [parts, n]; 1 in all parts together."""
        device = block.probs_bhqk.device
        token_n = torch.arange(tokens.start, tokens.stop, tokens.step, device=device).double()
        cut_n1 = torch.arange(self.parts + 1, device=device).double()[:, None] * (block.length / self.parts)
        return (torch.minimum(token_n + 1, cut_n1[1:]) - torch.maximum(token_n, cut_n1[:-1])).clamp_min(0)


@dataclass(frozen=True, slots=True)
class ByClass(Statistic):
    """A map of `size` × `size`: the mean over the queries of one class of what they give to all keys of another.

    ByClass are integers from 0 to size − 1 in the column `by`, one a token; −1 leaves a token out: as a query it
    doesn't count, and what it's given as a key is nobody's. (Clark et al. 2019 give the attention to one class of
    tokens, such as separators.)
    """

    by: str
    size: int

    name = "class"

    def __post_init__(self) -> None:
        _check_number("ByClass", "size", self.size)
        if not isinstance(self.by, str) or not self.by:
            raise SiteError(f"ByClass goes by a column's name, such as by='pos', got by={self.by!r}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    @property
    def column(self) -> str | None:
        return self.by

    @property
    def num_classes(self) -> int | None:
        return self.size

    def of(self, block: Block) -> tuple[Tensor, Tensor | int]:
        class_bl, dtype = block.columns[self.by], block.probs_bhqk.dtype
        rows, first = block.rows, block.first
        is_bqc = _one_hot(class_bl[:, rows.start : rows[-1] + 1 : rows.step], self.size, dtype)
        is_bkc = _one_hot(class_bl[:, first : first + block.probs_bhqk.shape[-1]], self.size, dtype)
        return _two_sided(block, is_bqc.mT[:, None], is_bkc), is_bqc.sum(1, dtype=torch.float64)[..., None]


_BY_NAME = {
    "entropy": Entropy(),
    "first": First(),
    "previous": Previous(),
    "self": Self(),
    "duplicate": Duplicate(),
    "induction": Induction(),
    "distance": Distance(),
    "pooled": Pooled(),
}


def as_statistics(stats: Iterable[str | Statistic]) -> tuple[Statistic, ...]:
    """Names and statistics as statistics. `SiteError` for an unknown name, for none at all, or for two of one name."""
    stats = (stats,) if isinstance(stats, (str, Statistic)) else tuple(stats)
    found = []
    for stat in stats:
        if isinstance(stat, str) and stat not in _BY_NAME:
            raise SiteError(
                f"no statistic of attention is called {stat!r}: there are {', '.join(_BY_NAME)}, and ByClass(by=…, "
                "size=…) for the attention of token classes to each other."
            )
        if not isinstance(stat, (str, Statistic)):
            raise SiteError(f"a statistic of attention is a name or a Statistic, got {type(stat).__name__}.")
        found.append(_BY_NAME[stat] if isinstance(stat, str) else stat)
    names = [stat.name for stat in found]
    if not found or len(set(names)) < len(names):
        raise SiteError(f"statistics of attention are one or more, each name once, got {names}.")
    return tuple(found)


def pattern_statistics(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    stats: Iterable[str | Statistic],
    *,
    columns: Mapping[str, Tensor] | None = None,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    align: Align = "start",
    block: int | None = None,
) -> dict[str, Value]:
    """Statistics of each sample's pattern, padding removed, by name: values [B, heads, *shape] and their weights.

    A value is the mean over the sample's queries that count, 0 where none does; its weight, float64, how many they are:
    [B], or of the value's shape where cells differ. So the mean over samples that a `Mean` makes of it is over queries.
    Samples along dim 0 (`rows=True`): `dataclasses.replace(value, columns=…)` says whose they are.

    Args:
        call, spans, heads, block: as of `pattern_sum`; at most as many scores exist at once.
        stats: names (entropy, first, previous, self, duplicate, induction, distance, pooled) or `Statistic`s.
        columns: integers [B, S] by name, of what statistics need: `token_id`, or that of `ByClass`. Those on the CPU
            are checked, and moved where the call's tensors are: move them beforehand if many layers ask.
        queries, align: only these queries of each text, as of `positions.positions`; all if None. What a query sees
            stays the same.

    Values are float32, float64 for float64 inputs, on the call's device. `SiteError` as `pattern_sum`, and for columns
    that lack, don't fit or hold other numbers. Not a collective.
    """
    found = as_statistics(stats)
    num_samples, num_heads, num_tokens, _ = call.query_bhqd.shape
    blockwise.check(call, spans, num_tokens, heads)
    device = call.query_bhqd.device
    num_heads = num_heads if heads is None else len(heads)
    with blockwise._plain_arithmetic(device):
        by_name = _columns(found, columns or {}, call, spans)
        none = torch.zeros((), dtype=torch.float64, device=device)
        totals = [none.new_zeros((num_samples, num_heads, *stat.shape)) for stat in found]
        counts = [none.new_zeros((num_samples, *stat.shape)) for stat in found]
        scratch = blockwise.Scratch(call, block, heads)
        for samples, (start, stop) in blockwise._runs(spans):
            rows = places(queries, stop - start, align)
            for b in scratch.parts(samples, len(rows), stop - start):
                here = {name: column[b, start:stop] for name, column in by_name.items()}
                for part in blockwise.blocks(call, b, start, stop, scratch, heads, rows):
                    seen = Block(part.probs_bhqk, rows[part.rows], part.keys.start, stop - start, here)
                    for stat, total, count in zip(found, totals, counts, strict=True):
                        more, counting = stat.of(seen)
                        total[b, part.heads] += more
                        if part.heads.start == 0:  # all heads have the same queries
                            count[b] += counting
        dtype = torch.float64 if call.query_bhqd.dtype == torch.float64 else torch.float32
        return {
            stat.name: _value(total, count, dtype) for stat, total, count in zip(found, totals, counts, strict=True)
        }


def _value(total: Tensor, count: Tensor, dtype: torch.dtype) -> Value:
    weight = count if count.dim() == 1 else count.unsqueeze(1).expand_as(total)
    count = count.reshape(len(count), 1, *count.shape[1:])
    return Value((total / count.where(count > 0, 1.0)).to(dtype), rows=True, weight=weight)


def _columns(
    stats: Sequence[Statistic], columns: Mapping[str, Tensor], call: AttentionCall, spans: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """The columns that statistics need, checked, on the call's device."""
    found = {}
    shape = (call.query_bhqd.shape[0], call.query_bhqd.shape[2])
    for stat in stats:
        name = stat.column
        if name is None:
            continue
        if name not in columns:
            raise SiteError(
                f"the statistic {stat.name!r} needs the column {name!r}, and there are: "
                f"{', '.join(columns) or 'none'}. Token ids come with a model that is called with them; give other "
                f"columns one entry per token, dc.record(model, sites, {name}={name}_bs)."
            )
        column = columns[name]
        integers = not (column.is_floating_point() or column.is_complex() or column.dtype == torch.bool)
        if not integers or tuple(column.shape) != shape:
            raise SiteError(
                f"the statistic {stat.name!r} goes by integers, one per token, {list(shape)}: the column {name!r} is "
                f"{column.dtype} {list(column.shape)}."
            )
        if stat.num_classes is not None and column.device.type == "cpu":
            token_s = torch.arange(shape[1])
            first_b1, stop_b1 = torch.tensor(list(spans), dtype=torch.int64).view(len(spans), 2, 1).unbind(1)
            wrong = column[((column < -1) | (column >= stat.num_classes)) & (token_s >= first_b1) & (token_s < stop_b1)]
            if len(wrong):
                raise SiteError(
                    f"the column {name!r} holds {int(wrong[0])}, and {len(wrong)} token(s) are outside of the classes "
                    f"0 to {stat.num_classes - 1}: give a larger size, or −1 to tokens that are to be left out."
                )
        found[name] = column.to(call.query_bhqd.device)
    return found


def state_bytes(stats: Iterable[str | Statistic], num_heads: int) -> int:
    """A layer's means of these statistics as a `Mean` holds them, in bytes: total, weight, count, 8 each."""
    cells = [math.prod(stat.shape) for stat in as_statistics(stats)]
    return sum(num_heads * c * 24 for c in cells)


def scratch_bytes(
    stats: Iterable[str | Statistic],
    num_samples: int,
    num_heads: int,
    num_tokens: int,
    head_dim: int,
    device: torch.device,
    *,
    block: int | None = None,
    num_queries: int | None = None,
    itemsize: int = 4,
) -> int:
    """The most that is held while a layer's statistics are made, results included, in bytes; arguments as of
    `blockwise.scratch_bytes`.
    """
    scores = blockwise.scratch_bytes(
        num_samples,
        max(num_heads, 2),  # the rows of one head alone lie there once more, sheared
        num_tokens,
        head_dim,
        device,
        block=block,
        num_queries=num_queries,
        itemsize=itemsize,
    )
    # Of each sample's cells totals and counts, and the values that are made of them.
    cells = sum(math.prod(stat.shape) for stat in as_statistics(stats))
    return scores + num_samples * cells * (num_heads * (8 + 8 + itemsize) + 8)


def _summed(x_bhq: Tensor) -> Tensor:
    return x_bhq.sum(-1, dtype=torch.float64)


def _one_hot(class_n: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[…, size]; nothing for −1."""
    return (class_n.unsqueeze(-1) == torch.arange(size, device=class_n.device)).to(dtype)


def _two_sided(block: Block, query_cq: Tensor, key_kc: Tensor) -> Tensor:
    """Σ over queries and keys of query_cq · p · key_kc, [b, h, c, c]."""
    probs_bhqk = block.probs_bhqk
    given_bnc = probs_bhqk.flatten(1, 2) @ key_kc.to(probs_bhqk.dtype)  # all heads in one matrix
    return (query_cq.to(probs_bhqk.dtype) @ given_bnc.unflatten(1, probs_bhqk.shape[1:3])).double()
