"""What a rank holds, key by key, as plain data that ranks compare: its schema, its digest, the union of many."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from distcache.errors import SchemaMismatch
from distcache.strategies import Strategy, describe

DIGEST_MODULUS = 2**62  # sums of digests stay in an int64, and come out the same in any order of keys

Kind = Literal["fields", "rows", "list"]


def digest_of(*parts: Any) -> int:
    """A 62-bit hash of the parts' reprs, the same in every process."""
    text = "\x1f".join(map(repr, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % DIGEST_MODULUS


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """One field of a state; a ragged dim is None, because ranks may have seen different sizes."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    reduction: str
    round: int


@dataclass(frozen=True, slots=True)
class KeySchema:
    """What ranks must agree on before any byte of a key moves.

    `strategy`: name and parameters as JSON. `row_shape`, `dtype`: of the rows of a concatenation. `result`: the
    dtype of what is read. `placement`: how the key lies over the axes of a mesh.
    """

    key: str
    kind: Kind
    strategy: str
    fields: tuple[FieldSchema, ...] = ()
    row_shape: tuple[int, ...] | None = None
    dtype: str | None = None
    result: str | None = None
    device: str = "cpu"
    placement: str = "replicated"
    digest: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(*self.facts()))

    def facts(self) -> tuple[Any, ...]:
        """Everything that is compared, as plain values, in a fixed order."""
        fields = tuple((f.name, f.shape, f.dtype, f.reduction, f.round) for f in self.fields)
        return (
            self.key,
            self.kind,
            self.strategy,
            fields,
            self.row_shape,
            self.dtype,
            self.result,
            self.device,
            self.placement,
        )

    def plain(self) -> list[Any]:
        """The same for a journey as msgpack."""
        return _listed(self.facts())

    @classmethod
    def from_facts(cls, facts: Sequence[Any]) -> KeySchema:
        """The inverse of `facts`, after a journey as msgpack."""
        key, kind, strategy, fields, row_shape, dtype, result, device, placement = facts
        return cls(
            key,
            kind,
            strategy,
            tuple(FieldSchema(name, tuple(shape), *rest) for name, shape, *rest in fields),
            None if row_shape is None else tuple(row_shape),
            dtype,
            result,
            device,
            placement,
        )

    def explain_difference(self, other: KeySchema) -> list[str]:
        """The facts in which two schemas of one key differ, in words: `strategy: mean, sum`."""
        found = []
        for name in ("strategy", "kind", "fields", "row_shape", "dtype", "result", "device", "placement"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                if name == "fields":
                    mine, theirs = _field_words(self.fields), _field_words(other.fields)
                elif name == "strategy":
                    mine, theirs = strategy_words(mine), strategy_words(theirs)
                found.append(f"{name.replace('_', ' ')} {mine} against {theirs}")
        return found


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _field_words(fields: Iterable[FieldSchema]) -> str:
    return ", ".join(f"{f.name} {f.dtype}[{', '.join('*' if n is None else str(n) for n in f.shape)}]" for f in fields)


def strategy_facts(strategy: Strategy) -> str:
    """A strategy's name and parameters as canonical JSON: its identity across ranks."""
    return json.dumps(describe(strategy), sort_keys=True, default=list)


def strategy_words(facts: str) -> str:
    """`mean(accumulate=float32)`: the parameters that say something, for messages."""
    return _words(json.loads(facts))


def _words(description: Mapping[str, Any]) -> str:
    shown = []
    for name, value in description["parameters"].items():
        if value is not None and value is not False and value != "auto":
            if isinstance(value, dict):
                value = _words(value["strategy"]) if "strategy" in value else value["dtype"]
            shown.append(f"{name}={value}")
    return f"{description['name']}({', '.join(shown)})"


def natural_order(key: str) -> tuple[list[str | int], str]:
    """A sort key that counts numbers as numbers, `resid_out_2` before `resid_out_10`, and tells all keys apart."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", key))], key


def union(variants: Sequence[KeySchema], held: np.ndarray, content: Mapping[str, KeySchema]) -> dict[str, KeySchema]:
    """Every key that any rank holds, in key order; keys that only some ranks have are legal.

    `variants`: every schema that a rank has, each once [N]; `held`: which ranks do, bool [W, N].
    Pure: every rank that has the same arguments gets the same result or the same `SchemaMismatch`.
    """
    first_ranks = held.argmax(0).tolist()  # of each variant
    by_key: dict[str, list[tuple[int, KeySchema]]] = {}
    for rank, schema in zip(first_ranks, variants, strict=True):
        by_key.setdefault(schema.key, []).append((rank, schema))
    conflicts = []
    for key, found in by_key.items():
        (rank, schema), *others = sorted(found, key=lambda one: one[0])
        for other_rank, other in others:
            words = "; ".join(schema.explain_difference(other))
            conflicts.append((key, f"rank {rank} against rank {other_rank}: {words}"))
        if content.get(key, schema) != schema:
            words = "; ".join(content[key].explain_difference(schema))
            conflicts.append((key, f"the content against rank {rank}: {words}"))
    if conflicts:
        conflicts.sort()
        shown = "\n  ".join(f"{key!r}: {what}" for key, what in conflicts[:8])
        more = f"\n  and {len(conflicts) - 8} more" if len(conflicts) > 8 else ""
        raise SchemaMismatch(
            f"cannot merge {len({key for key, _ in conflicts})} key(s): expected one schema on every rank, got\n"
            f"  {shown}{more}\nGive every rank the same register_aggregation calls and values of one shape, dtype "
            "and device type; nothing has moved and every delta is as it was."
        )
    return {key: by_key[key][0][1] for key in sorted(by_key, key=natural_order)}
