"""What is packed comes back bit for bit and folds on as if it had never left; nobody's buffers are written to."""

from __future__ import annotations

import contextlib
import copy
import io
import mmap
import pickle
import warnings
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import CONFIGURED, NEEDING_PARAMETERS, samples_for, seeded
from torch.utils._python_dispatch import TorchDispatchMode

import distcache as dc
from distcache import codec, packed
from distcache.entries import Shown, Slab
from distcache.errors import BadCache, DuplicateSamples, TooLarge
from distcache.packed import Packed, pack, unpack
from distcache.segments import Arena
from distcache.strategies import (
    Cat,
    Columns,
    Default,
    Function,
    Grouped,
    Mean,
    Moments,
    Rows,
    Stack,
    Strategy,
    Value,
    Weighted,
    registered_strategies,
)

quick = settings(max_examples=150, deadline=None)


def x(*values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def holding(**values: Any) -> dc.ActivationCache:
    cache = dc.ActivationCache()
    cache.update(values)
    return cache


def bits(value: Any) -> Any:
    """A nested value with tensors as dtype, shape and bytes: equal where every bit is."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), codec.as_bytes(value).numpy().tobytes())
    if isinstance(value, Weighted):
        return ("weighted", bits(value.value), bits(value.weight))
    if isinstance(value, dict):
        return [(name, bits(item)) for name, item in value.items()]
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [bits(item) for item in value])
    return (type(value).__name__, repr(value))


def known(cache: dc.ActivationCache) -> dict[str, Any]:
    """All that a cache knows, in every bit, read without packing."""
    pieces = {}
    for key in cache:
        entry = cache._resolved(key)
        state = getattr(entry, "state", getattr(entry, "values", None))
        found = state.pieces if isinstance(state, Rows) else state or []
        pieces[key] = [
            (bits(getattr(one, "value_n", getattr(one, "data", None))), getattr(one, "rows", None),
             bits(getattr(one, "weight", None)),
             None if one.columns is None else (bits(dict(one.columns.by_name)), one.columns.indexed))
            for one in found
        ]  # fmt: skip
    return {
        "keys": list(cache),
        "kinds": {key: type(cache._entries[key]).__name__ for key in cache},
        "states": {key: bits(cache._arena.state(key)) for key in cache._arena.entries},
        "schemas": {key: schema.facts() for key, schema in cache._schemas().items()},
        "slabs": list(cache._arena.slabs()),
        "layout": cache._arena.layout_digest,
        "content": cache._content_digest,
        "pieces": pieces,
        "registry": list(cache._registry.items()),
        "notes": dict(cache._notes),
        "ledger": cache._ledger.to_plain(),
        "samples": cache._num_samples,
    }


def read_only(sent: Packed) -> Packed:
    """As another process would have it: bytes of its own, which can't be written."""
    return Packed(sent.header, [np.frombuffer(buffer.tobytes(), buffer.dtype) for buffer in sent.buffers])


def back(cache: dc.ActivationCache, own: bool = False) -> dc.ActivationCache:
    return unpack(read_only(pack(cache)), own=own)


@pytest.mark.parametrize("own", [True, False])
def test_the_comparison_finds_one_bit_one_note_and_one_number(own):
    def cache() -> dc.ActivationCache:
        cache = dc.ActivationCache()
        cache.register_aggregation("m", "mean")
        cache.add("m", x(1.0, 2.0), index=[4])
        cache.add("c", x([1.0]), index=[4], label=x(3))
        cache.add_with_info("n", 1, "a note")
        return cache

    def planted(change) -> dc.ActivationCache:
        twin = back(cache(), own)
        change(twin)
        return twin

    assert known(planted(lambda twin: None)) == known(cache())
    for change in (
        lambda twin: twin._arena.state("m")["total"].neg_(),
        lambda twin: twin["c"].neg_(),
        lambda twin: twin._entries["c"].state.pieces[0].columns.by_name["label"].add_(1),
        lambda twin: twin.add_with_info("n", 1, "another"),
        lambda twin: twin._ledger.forget("m"),
        lambda twin: twin._registry.clear(),
        lambda twin: setattr(twin, "_num_samples", 9),
    ):
        assert known(planted(change)) != known(cache())


# -- there and back ------------------------------------------------------------------------------------------------


def seen(strategy: Strategy, samples: list[Any], numbers: range, indexed: bool) -> dc.ActivationCache:
    """A cache that was shown these samples, one by one, by a strategy."""
    cache = dc.ActivationCache()
    cache.register_aggregation("k", strategy)
    for n in numbers:
        columns = {"label": x(n % (strategy.size + 1) - 1)} if isinstance(strategy, Grouped) else {}
        rows = strategy.dim != "auto" or isinstance(strategy, (Cat, Default))
        value = samples[n].unsqueeze(0) if rows and isinstance(samples[n], torch.Tensor) else samples[n]
        cache.add("k", value, index=[90 - n] if indexed else None, **columns)
    return cache


EVERY = [NEEDING_PARAMETERS[n] if n in NEEDING_PARAMETERS else cls() for n, cls in registered_strategies().items()]
STRATEGIES = [*EVERY, *(s for s in CONFIGURED if s.dim in (0, "auto") and not isinstance(s, Function))]
CASES = [
    (strategy, indexed) for strategy in STRATEGIES for indexed in (True, False) if indexed or not strategy.needs_index
]


@pytest.mark.parametrize("own", [True, False], ids=["own", "lent"])
@pytest.mark.parametrize(("strategy", "indexed"), CASES, ids=str)
def test_every_strategys_state_comes_back_bit_for_bit_and_folds_on_as_the_original_does(strategy, indexed, own):
    name = next((n for n, cls in registered_strategies().items() if cls is type(strategy)), "")
    samples = samples_for(name, 8, (3,), torch.float32, seed=1)
    parts = [seen(strategy, samples, numbers, indexed) for numbers in (range(3), range(3, 4), range(4, 8))]
    sent = [read_only(pack(part)) for part in parts]
    before = [[buffer.tobytes() for buffer in one.buffers] for one in sent]
    expected, found = dc.ActivationCache(), dc.ActivationCache()
    for part, one in zip(parts, sent, strict=True):
        twin = unpack(one, own=own)
        assert known(twin) == known(part) and bits(twin["k"]) == bits(part["k"])
        expected.cat(part)
        found.cat(twin)
    assert known(found) == known(expected) and bits(found["k"]) == bits(expected["k"])
    assert [[buffer.tobytes() for buffer in one.buffers] for one in sent] == before


def test_means_of_what_was_unpacked_weigh_by_their_counts():
    first, second = (seen(Mean(), [x(float(v)) for v in values], range(len(values)), False)
                     for values in ([1, 2, 3], [10]))  # fmt: skip
    assert (back(first)["k"] + back(second)["k"]) / 2 == 6  # what sending means instead of states would give
    into = back(first)
    into.cat(back(second))
    assert into["k"] == x(1.0, 2.0, 3.0, 10.0).mean() == 4 and into.count("k") == 4


@pytest.mark.parametrize("own", [True, False], ids=["own", "lent"])
@pytest.mark.parametrize("dtype", codec.DTYPES.values(), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_rows_and_values_of_every_dtype_and_shape_come_back(dtype, own):
    flat_u8 = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    whole = (flat_u8 % 2 if dtype == torch.bool else flat_u8).view(dtype).reshape(-1, 4)
    cache = holding(whole=whole, none=whole[:0], scalar=whole[0, 0], strided=whole[:, ::2].t(), deep=[1, {"a": whole}])
    for key, index in (("rows", None), ("indexed", [5, 3])):
        cache.register_aggregation(key, "cat")
        for part in (whole[:2], whole[2:4]):
            cache.add(key, part, index=index)
            index = None if index is None else [4, 2]
    twin = back(cache, own)
    assert known(twin) == known(cache)
    assert {key: bits(twin[key]) for key in cache} == {key: bits(cache[key]) for key in cache}


@pytest.mark.parametrize(
    "strategy",
    [dc.Sum(), dc.Mean(), dc.Max(), dc.TopK(2), Moments(), Stack(), Grouped(dc.Max(), 3, by="label")],
    ids=str,
)
@settings(max_examples=10, deadline=None)
@given(shape=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]), dtype=st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]),
    seed=st.integers(0, 99))  # fmt: skip
def test_states_of_values_of_every_shape_and_dtype_come_back(strategy, shape, dtype, seed):
    cache = seen(strategy, list(seeded(3, *shape, seed=seed, dtype=dtype)), range(3), True)
    for own in (True, False):
        assert known(back(cache, own)) == known(cache)


def top_level(values: list[Any]) -> Any:
    return values[-1]


def of_all_kinds() -> dc.ActivationCache:
    """A cache with every kind of entry, in an order that isn't that of kinds, columns that keys share, and more."""
    cache = dc.ActivationCache()
    registered = {"mean": "mean", "ragged": Mean(ragged=True), "moments": Moments(), "max": "max", "cat": "cat",
                  "top": dc.TopK(2), "by_label": Grouped(Mean(), 3, by="label"), "f": top_level,
                  "stack": Stack(dim=1)}  # fmt: skip
    for key, strategy in registered.items():
        cache.register_aggregation(key, strategy)
    for i in range(3):
        for key, value in {
            "cat": x([i]), "mean": x(float(i)), "ragged": torch.ones(i + 1), "moments": x(float(i), 1.0),
            "extend": [f"{i}"], "max": x(i), "stack": x(i, i), "top": x(float(i)), "by_label": x(float(i)),
        }.items():  # fmt: skip
            cache.add(key, value, index=[5 - i], label=x(i - 1))
    cache.add_with_info("raw", Weighted(x(1.0), 2.0), "a note")
    cache.update({"plain": [1, (2.5, None), {"a": b"bytes"}], "half": x(1.0, dtype=torch.bfloat16), "f": x(1)})
    columns = Columns({"sample": x(0, 1), "position": x(0, 0)}, True)
    passes = [Shown(key, Value(torch.ones(2, 3), rows=True, columns=columns)) for key in ("seen_0", "seen_1")]
    heads = {"total": torch.ones(2, 3, dtype=torch.float64), "count": torch.ones(2, dtype=torch.int64)}
    cache._take_pass([Slab(("h0", "h1"), Mean(), heads, torch.float32)], passes, ["h0", "h1", "seen_0", "seen_1"], 0,
                     x(0, 1), True)  # fmt: skip
    return cache


@pytest.mark.parametrize("own", [True, False], ids=["own", "lent"])
def test_a_cache_of_all_kinds_comes_back_with_notes_ledger_registrations_functions_and_shared_columns(own):
    cache = of_all_kinds()
    twin = back(cache, own)
    assert known(twin) == known(cache)
    assert twin["raw"].info() == "a note" and twin._registry["f"] == Function(top_level)
    assert twin._entries["seen_0"].values[0].columns is twin._entries["seen_1"].values[0].columns
    assert twin._arena.is_slab(("h0", "h1"))
    with pytest.raises(DuplicateSamples, match="has seen 5"):
        twin.add("mean", x(1.0), index=[5])
    assert known(back(twin, own)) == known(cache)


@pytest.mark.parametrize("own", [True, False], ids=["own", "lent"])
def test_sparse_layouts_come_back_in_their_places_and_go_on(own):
    def sparse() -> dc.ActivationCache:
        cache = dc.ActivationCache()
        cache.register_aggregation("m", "mean")
        cache.register_aggregation("r", Mean(ragged=True))
        cache.register_aggregation("empty", "sum")
        for i in range(6):
            cache.add(f"m{i}", torch.full((i + 1,), float(i)))
        cache.add("empty", torch.ones(0))
        cache.add("r", torch.ones(3))
        cache.add("r", torch.ones(200))  # grows, and leaves its old place
        for key in ("m1", "m4"):
            del cache[key]
        cache.add("m9", x(1.0))  # moves into a hole
        return cache

    cache = sparse()
    twin = back(cache, own)
    assert known(twin) == known(cache) and any(segment.holes for segment in cache._arena.segments.values())
    assert cache._arena.lies_like(twin._arena)
    for one in (cache, twin):
        one.cat(back(sparse()))
        one.add("m4", torch.full((2,), 3.0))
        one.add("r", torch.ones(400))
        del one["m2"]
    for key in cache:
        assert bits(twin[key]) == bits(cache[key])
    assert twin["m3"].tolist() == [3.0] * 4 and twin.count("m3") == 2 and twin["m4"].tolist() == [3, 3]
    assert twin.count("r")[[0, 2, 3, 199, 200]].tolist() == [5, 5, 3, 3, 1]


def test_keys_of_other_layouts_fold_too():
    one, other = (seen(Mean(), [x(1.0), x(5.0)], numbers, False) for numbers in (range(1), range(1, 2)))
    one.add("first", x(1.0))
    other_first = dc.ActivationCache()
    other_first.add("first", x(2.0))
    other_first.update(other)
    into = dc.ActivationCache()
    for cache in (one, other_first):
        into.cat(back(cache))
    assert into["k"].item() == 3 and into["first"].tolist() == [1, 2]


def test_how_keys_lie_over_a_mesh_comes_back():
    cache = seen(Mean(), [torch.ones(4)], range(1), False)
    cache.register_aggregation("c", "cat")
    cache.add("c", torch.ones(2, 4))
    for key in ("k", "c"):
        cache._set_placement(key, "split(dim -1 over tp)")
    twin = back(cache)
    assert known(twin) == known(cache)
    assert {schema.placement for schema in twin._schemas().values()} == {"split(dim -1 over tp)"}


def test_the_list_of_a_function_that_was_not_called_yet_comes_back():
    cache = dc.ActivationCache()
    cache.register_aggregation("f", top_level)
    with cache.deferred_mode():
        for value in (1, 2, 3):
            cache.cat(holding(f=value))
        twin = back(cache._pending)
        assert known(twin) == known(cache._pending)
    assert [value.data for value in twin._entries["f"].state] == [1, 2, 3]


def test_room_that_a_delta_keeps_for_the_next_time_stays_at_home():
    cluster = dc.DistributedCache()
    cluster.register_aggregation("m", "mean")
    with cluster.deferred_mode():
        cluster.add("m0", torch.ones(1000))
        cluster.add("m1", torch.ones(2))
    with cluster.deferred_mode():
        cluster.add("m1", torch.ones(2))
        delta = cluster._held.delta
        assert "m0" in delta._arena.dormant
        sent = pack(delta)
        assert "m0" in delta._arena.dormant
    assert sent.nbytes < 1000 and unpack(sent, own=False)["m1"].tolist() == [1, 1]


def test_what_is_saved_and_loaded_lazily_is_packed_whole(tmp_path):
    cache = of_all_kinds()
    del cache["f"]
    cache._registry.pop("f")
    cache.save(tmp_path / "saved")
    loaded = back(dc.load(tmp_path / "saved"))
    assert {key: bits(loaded[key]) for key in cache if key != "raw"} == {
        key: bits(cache[key]) for key in cache if key != "raw"
    }


def test_a_recording_can_be_packed_inside_of_inference_mode_and_goes_on_outside():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with torch.inference_mode():
        with dc.record(model, [dc.Site("0"), dc.Site("0", key="m", reduce=Mean())], index=[0, 1]) as rec:
            model(torch.ones(2, 3))
        twins = [back(rec, own) for own in (True, False)]
    for twin in twins:
        assert known(twin) == known(rec)
        twin.add("m", torch.ones(3), index=[2])
        assert twin.count("m") == 3 and not twin["0"].is_inference()


def test_states_that_lived_on_a_gpu_come_back_on_the_cpu_beside_those_that_lived_there():
    """Without one: a header whose second key lived in a segment of its own, on another type of device."""
    there, here = (seen(Mean(), [x(v)], range(1), False) for v in (5.0, 7.0))
    here.update({"k2": 0})
    sent, other = pack(there), pack(here)

    def both(layout):
        _, kinds, keys, kind_of, places, _, segments = layout
        kinds.append([*kinds[0][:2], "cuda", *kinds[0][3:]])
        keys.append("k2")
        kind_of.append(1)
        places += places
        segments += [[[*segment[:3], "cuda", *segment[4:]], sizes] for segment, sizes in segments]

    header = forged(sent.header, lambda head: head[2].append("k2"), both)
    cache = unpack(Packed(header, sent.buffers + other.buffers[: len(sent.buffers)]), own=True)
    assert (cache["k"].item(), cache["k2"].item()) == (5, 7)
    assert {schema.device for schema in cache._schemas().values()} == {"cpu"}
    cache.cat(copy.copy(cache))
    assert (cache["k2"].item(), int(cache.count("k2"))) == (7, 2)


# -- in how many buffers -------------------------------------------------------------------------------------------


def test_thousands_of_keys_make_few_buffers_and_large_values_one_each_without_a_copy():
    cache = dc.ActivationCache()
    cache.register_aggregation("m", "mean")
    cache.cat(holding(**{f"{kind}{i}": torch.full((1, 4), float(i)) for i in range(1000) for kind in ("m", "c")}))
    cache.cat(holding(**{f"{kind}{i}": torch.full((1, 4), float(i)) for i in range(1000) for kind in ("m", "c")}))
    assert len(pack(cache).buffers) == 3  # totals, counts, rows
    large = torch.ones(packed.OWN_BUFFER_BYTES // 4)
    cache["large"] = large
    sent = pack(cache)
    assert len(sent.buffers) == 4 and sent.buffers[-1].__array_interface__["data"][0] == large.data_ptr()
    assert sent.buffers[0].__array_interface__["data"][0] == cache._arena.state("m0")["total"].data_ptr()
    assert known(unpack(sent, own=True)) == known(cache)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_packing_and_folding_take_the_same_operations_for_3_keys_and_for_300():
    counts = []
    for num_keys in (3, 300):
        cache, into = dc.ActivationCache(), dc.ActivationCache()
        cache.register_aggregation("m", "mean")
        cache.register_aggregation("s", "moments")
        for _ in range(2):
            cache.cat(holding(**{f"{kind}{i}": x(1.0, 2.0) for kind in "ms" for i in range(num_keys)}))
        into.cat(back(cache))
        with Operations() as operations:
            into.cat(unpack(read_only(pack(cache)), own=False))
        counts.append(len(operations.names))
        assert into.count("m2") == 4 and int(into["s2"]["count"]) == 4
    assert counts[0] == counts[1] < 120


def test_a_layout_that_came_before_is_not_read_or_written_again():
    cache, larger = (seen(Mean(), [torch.ones(n)], range(1), False) for n in (81, 82))  # which nobody else has here
    counts = []
    with (
        mock.patch.object(packed, "KeySchema", wraps=packed.KeySchema) as schemas,
        mock.patch.object(packed, "_described", wraps=packed._described) as described,
    ):
        for one in (cache, cache, larger, larger, cache):
            assert unpack(pack(one), own=False)["k"].sum() == len(one["k"])
            counts.append((described.call_count, schemas.call_count))
        larger.add("k2", x(1.0))  # by the pattern of k
        pack(larger)
        counts.append((described.call_count, schemas.call_count))
    assert counts == [(1, 1), (1, 1), (2, 2), (2, 2), (2, 2), (3, 2)]


def test_layouts_that_were_remembered_are_never_taken_for_others():
    """Many layouts in turn, among them those of the same keys at the same places in another order."""

    def cache(*keys: str, numel: int) -> dc.ActivationCache:
        cache = dc.ActivationCache()
        cache.register_aggregation("m", "mean")
        for key in keys:
            cache.add(key, torch.full((numel,), float(ord(key[-1]))))
        return cache

    swapped = cache("ma", "mb", numel=2)
    swapped._arena.entries = dict(reversed(swapped._arena.entries.items()))
    swapped._entries = dict(reversed(swapped._entries.items()))
    caches = [cache("ma", "mb", numel=2), swapped, *(cache("mb", "ma", "mc", numel=n) for n in range(1, 7))]
    for _ in range(2):
        for one in caches:
            assert known(back(one)) == known(one)


# -- memory that isn't one's own -----------------------------------------------------------------------------------


def shared(sent: Packed, path) -> tuple[Packed, mmap.mmap]:
    """Buffers as processes share them, mapped read-only from one file: to write there would end the process."""
    places, end = [], 0
    with open(path, "wb") as file:
        for buffer in sent.buffers:
            file.write(b"\0" * (-end % 64))
            places.append(end + -end % 64)
            end = places[-1] + file.write(buffer.tobytes())
        file.write(b"\0")
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    buffers = [np.frombuffer(whole, b.dtype, len(b), place) for b, place in zip(sent.buffers, places, strict=True)]
    return Packed(sent.header, buffers), whole


WRITES = {
    "cat": lambda cache: cache.cat(copy.copy(cache)),
    "cat of other keys": lambda cache: cache._absorb(holding(mean=x(4.0), ragged=torch.ones(300), new=x(1.0))),
    "add": lambda cache: cache.add("mean", x(4.0)),
    "add a new key": lambda cache: cache.add("mean_of_more", x(4.0)),
    "deferred": lambda cache: deferred(cache),
    "set": lambda cache: cache.update({"mean": 1, "cat": x(2.0)}),
    "delete": lambda cache: [cache.__delitem__(key) for key in ("mean", "h0", "cat")],
    "take over": lambda cache: cache.update(holding(mean=1)),
    "take over states": lambda cache: cache.update(seen(Mean(), [x(2.0)], range(1), False)),
    "read and write": lambda cache: [torch.as_tensor(cache[key]).fill_(7) for key in ("mean", "cat", "half", "h0")],
    "write into rows": lambda cache: cache["seen_0"].zero_(),
    "to": lambda cache: cache.to("cpu").add("mean", x(4.0)),
    "a pass": lambda cache: one_pass(cache),
    "sleep": lambda cache: cache._arena.sleep(),
    "fold alike": lambda cache: cache._arena.fold_alike(cache._arena.copy()),
    "reserve": lambda cache: reserve(cache),
    "drop": lambda cache: cache._arena.drop("h1"),
}


def reserve(cache):
    shapes, dtypes = {"total": (2,), "count": ()}, {"total": torch.float64, "count": torch.int64}
    cache._arena.reserve(["new"], Mean(), shapes, dtypes, torch.float32, torch.device("cpu"))


def deferred(cache):
    with cache.deferred_mode():
        cache.cat(copy.copy(cache))


def one_pass(cache):
    def adds(state):
        state["total"].add_(1)
        state["count"].add_(1)

    shapes = {"total": torch.zeros(2, 3, dtype=torch.float64), "count": torch.zeros(2, dtype=torch.int64)}
    cache._take_pass([Slab(("h0", "h1"), Mean(), shapes, torch.float32, adds)], [], ["h0", "h1"], 1, None, False)


def writable() -> dc.ActivationCache:
    """A cache of all kinds that takes values without an index."""
    cache = of_all_kinds()
    for key in ("cat", "stack", "extend", "top", "by_label", "raw", "moments", "max"):
        del cache[key]
    cache.register_aggregation("cat", "cat")
    cache._ledger = type(cache._ledger)()
    for _ in range(2):
        cache.add("cat", x([1.0]))
    return cache


@pytest.mark.parametrize("how", WRITES)
def test_whatever_is_done_to_a_cache_on_lent_buffers_changes_no_byte_of_them(tmp_path, how):
    cache = writable()
    sent, whole = shared(pack(cache), tmp_path / "shared")
    before = bytes(whole)
    lent, own = unpack(sent, own=False), unpack(sent, own=True)
    for one in (lent, own):
        WRITES[how](one)
    assert bytes(whole) == before
    assert known(lent) == known(own)
    assert (known(own) == known(unpack(sent, own=False))) == (how == "read and write" and False)


def test_a_write_past_the_guard_would_be_seen():
    sent = pack(seen(Mean(), [x(1.0)], range(1), False))
    lent = Packed(sent.header, [buffer.copy() for buffer in sent.buffers])
    before = [buffer.tobytes() for buffer in lent.buffers]
    unpack(lent, own=False)._arena.state("k")["total"].add_(1)
    assert [buffer.tobytes() for buffer in lent.buffers] != before


def test_every_method_of_an_arena_is_known_to_write_or_not():
    reads = {"wake", "compact", "blank", "lies_like", "state", "slab", "is_slab", "check", "copy", "slabs", "sizes",
             "capacities", "relaid", "centred", "gathered", "set_placement", "layout_digest", "dormant_layout_digest",
             "nbytes"}  # fmt: skip
    writes = {name for name in vars(packed._Borrowed) if not name.startswith("_")} - {"borrowed"}
    assert {name for name in vars(Arena) if not name.startswith("_")} == reads | writes and not reads & writes


def test_folding_from_lent_buffers_copies_no_state_and_says_nothing_of_read_only_memory(tmp_path):
    cache = seen(Mean(), [torch.ones(1000), torch.ones(1000)], range(2), False)
    sent, _ = shared(pack(cache), tmp_path / "shared")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lent = unpack(sent, own=False)
    assert lent._arena.state("k")["total"].data_ptr() == sent.buffers[0].__array_interface__["data"][0]
    cache.cat(lent)
    assert lent._arena.borrowed and cache.count("k") == 4
    del sent
    assert lent["k"].tolist() == [1] * 1000  # the buffers live as long as what lies on them


def test_what_a_receiver_keeps_of_lent_buffers_is_its_own():
    cache = writable()
    sent = pack(cache)
    lent = Packed(sent.header, [buffer.copy() for buffer in sent.buffers])
    into = dc.ActivationCache()
    into.cat(unpack(lent, own=False))
    for buffer in lent.buffers:
        buffer.fill(0)
    cache._registry = {}  # a receiver has its own
    assert known(into) == known(cache)


def test_buffers_at_any_address_are_read():
    cache = seen(Mean(), [x(1.5, 2.5)], range(1), False)
    cache["half"] = x(1.0, 2.0, dtype=torch.bfloat16)
    sent = pack(cache)
    odd = []
    for buffer in sent.buffers:
        room = np.zeros(buffer.nbytes + 1, dtype=np.uint8)
        room[1:] = buffer.view(np.uint8)
        odd.append(room[1:].view(buffer.dtype))
    for own in (True, False):
        assert known(unpack(Packed(sent.header, odd), own=own)) == known(cache)


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_memory_that_is_not_there_is_told_before_it_is_taken(monkeypatch, what):
    cache = dc.ActivationCache()
    cache.register_aggregation("c", "cat")
    for _ in range(2):
        cache.add("c", torch.ones(300))
    sent = pack(cache)
    monkeypatch.setattr(packed, "LARGEST_CHUNK_BYTES", 1000)
    monkeypatch.setattr(packed, "available_bytes", lambda: 2000)
    with pytest.raises(TooLarge, match=r"2\.4 kB are needed .*, 2\.0 kB are free"):
        pack(cache) if what == "pack" else unpack(sent, own=True)
    monkeypatch.setattr(packed, "available_bytes", lambda: 2400)
    assert known(unpack(pack(cache), own=True)) == known(cache)


# -- pickles -------------------------------------------------------------------------------------------------------


def shipped(cache: dc.ActivationCache) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []
    return pickle.dumps(cache, protocol=5, buffer_callback=buffers.append), buffers


@pytest.mark.parametrize("protocol", range(6))
def test_a_cache_pickles_by_every_protocol_into_memory_of_its_own(protocol):
    cache = of_all_kinds()
    twin = pickle.loads(pickle.dumps(cache, protocol=protocol))
    assert type(twin) is dc.ActivationCache and type(twin._arena) is Arena and known(twin) == known(cache)
    twin.add("mean", x(4.0), index=[40])
    assert known(twin) != known(cache)


def test_protocol_5_ships_segments_out_of_band_as_they_are():
    cache = seen(Mean(), [torch.ones(10**5)], range(1), False)
    data, buffers = shipped(cache)
    assert len(data) < 1500 and [len(buffer.raw()) for buffer in buffers] == [8 * 10**5, 8]
    assert np.frombuffer(buffers[0].raw(), np.uint8).__array_interface__["data"][0] == (
        cache._arena.state("k")["total"].data_ptr()
    )
    assert known(pickle.loads(data, buffers=buffers)) == known(cache)


@pytest.mark.parametrize("kind", ["writable", "read-only"])
def test_who_unpickles_shares_buffers_with_nobody(kind):
    cache = writable()
    data, buffers = shipped(cache)
    given = [buffer.raw().toreadonly() if kind == "read-only" else buffer for buffer in buffers]
    twin, other = (pickle.loads(data, buffers=given) for _ in range(2))
    before = known(cache)
    assert known(twin) == before
    twin.add("mean", x(9.0))
    twin["cat"].zero_()
    assert known(cache) == known(other) == before != known(twin)
    cache.add("mean", x(9.0))
    assert known(other) == before


class Naming(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file)
        self.named = set()

    def find_class(self, module, name):
        self.named.add(f"{module}.{name}")
        return super().find_class(module, name)


def test_a_pickle_names_no_code_but_ours_and_numpys():
    for protocol in (2, 4, 5):
        data = pickle.dumps(of_all_kinds(), protocol=protocol)
        reading = Naming(io.BytesIO(data))
        reading.load()
        ours = {name for name in reading.named if name.startswith("distcache.")}
        assert ours == {"distcache.packed.Packed", "distcache.packed.owned"}
        assert {name.partition(".")[0] for name in reading.named - ours} <= {"numpy", "_codecs", "copyreg", "builtins"}
    assert b"torch" in pickle.dumps(torch.ones(1))  # what a tensor's own pickle would name


def test_a_view_pickles_without_its_base():
    base = torch.ones(10**6)
    cache = holding(view=base[:3], strided=base.view(1000, 1000)[:2, :2])
    cache.register_aggregation("m", "mean")
    cache.add("m", x(1.0))
    cache.add("m", x(2.0))  # in a chunk of 4 MiB
    for protocol in (2, 4, 5):
        assert len(pickle.dumps(cache, protocol=protocol)) < 3000
    data, buffers = shipped(cache)
    assert len(data) + sum(len(buffer.raw()) for buffer in buffers) < 3000
    file = io.BytesIO()
    torch.save(cache, file)
    assert len(file.getvalue()) < 8000
    assert len(pickle.dumps(back(cache)["view"])) < 1000  # nor does what was unpacked
    assert len(pickle.dumps(base[:3])) > 10**6


# -- what can't be packed ------------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_named():
    with pytest.raises(TypeError, match="pack expects an ActivationCache, got dict"):
        pack({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'a'\['b'\]: cannot send a builtins.object"):
        pack(holding(a={"b": object()}))
    with pytest.raises(TypeError, match="'a': expected a dense tensor"):
        pack(holding(a=torch.eye(2).to_sparse()))
    with pytest.raises(TypeError, match="no valid text"):
        pack(holding(**{"\ud800": 1}))
    cache = holding(a=1)
    cache.register_aggregation("a", lambda values: values[0])
    with pytest.raises(ValueError, match=r"cannot pickle the aggregation .*top level"):
        pack(cache)
    cache.register_aggregation("a", Cat(dim="sideways"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the cache to pack: cannot use cat\(dim='sideways'\)"):
        pack(cache)


# -- what pack didn't make -----------------------------------------------------------------------------------------


def forged(header: bytes, change=lambda head: None, change_layout=lambda layout: None) -> bytes:
    """A header with places of it set to something else."""
    head = msgspec.msgpack.decode(header)
    layout = msgspec.msgpack.decode(head[1])
    change_layout(layout)
    head[1] = msgspec.msgpack.encode(layout)
    change(head)
    return msgspec.msgpack.encode(head)


def a_bit_of_everything() -> dc.ActivationCache:
    cache = dc.ActivationCache()
    for key, strategy in {"rows": "cat", "mean": "mean", "text": "extend", "weighted": "sum", "f": top_level}.items():
        cache.register_aggregation(key, strategy)
    for index in ([0, 2, 1], [5, 4, 3]):
        cache.add("rows", torch.arange(6.0).view(3, 2), index=index)
        cache.add("text", ["a", "b", "c"], index=index)
    cache.add("mean", torch.arange(3.0), index=[5])
    cache.add("mean_too", torch.arange(3.0), index=[5])
    cache.update({"raw": torch.tensor(1 + 2j), "nested": {"a": [1, (None, b"2")]}, "bool": x(True, False)})
    cache["weighted"] = Weighted(torch.ones(2), 2.0)
    cache.add_with_info("noted", 3, "a note")
    return cache


GOOD = read_only(pack(a_bit_of_everything()))
VERSION_AT, LAYOUT, ORDER, STRATEGIES, BUFFERS, TENSORS, TABLES, ENTRIES, REGISTRY, NOTES, LEDGER, NUM = range(12)
OF_STATES, KINDS, KEYS, KIND_OF, PLACES, SLABS, SEGMENTS = range(7)
NAMES = [entry[1] for entry in msgspec.msgpack.decode(GOOD.header)[ENTRIES]]
ROWS, TEXT = NAMES.index("rows"), NAMES.index("text")
KIND, KEY, OF, PLACEMENT, DATA, LENGTHS, OF_TABLES = range(7)  # of rows; of values KIND, KEY, OF, VALUES
FIELDS = 4  # of kinds
VALUES = 3


def read_all(sent: Packed, own: bool = False) -> dict[str, Any]:
    cache = unpack(sent, own=own)
    found: dict[str, Any] = {}
    for key, value in cache.items():
        found[key] = bits((value.value(), value.info()) if hasattr(value, "info") else value)
        if cache._rows(key) is not None:
            found[f"rows of {key}"] = bits(cache.rows(key))
    return found


def setting(*place: Any, to: Any):
    def change(part):
        for step in place[:-1]:
            part = part[step]
        part[place[-1]] = to

    return change


def in_layout(change):
    return {"change_layout": change}


FORGERIES = {
    "newer": (dict(change=setting(VERSION_AT, to=2)), "of version 2, this distcache reads 1"),
    "a wrong type": (dict(change=setting(ENTRIES, to={})), r"Expected `array`, got `object`"),
    "a field more": (dict(change=lambda head: head.append(1)), "length 12, got 13"),
    "keys twice": (dict(change=lambda head: head[ORDER].append("mean")), "or some of them twice"),
    "a key too few": (dict(change=lambda head: head[ORDER].pop()), "holds others"),
    "another key": (dict(change=setting(ORDER, 0, to="x")), "holds others"),
    "an entry that is a state too": (dict(change=setting(ENTRIES, ROWS, KEY, to="mean")), "holds others"),
    "a layout that is none": (dict(change=setting(LAYOUT, to=b"\x93")), "cannot read the layout"),
    "a negative size": (dict(change=setting(TENSORS, 0, 1, 0, to=-3)), "Expected `int` >= 0"),
    "a forged size": (dict(change=setting(TENSORS, 0, 1, 0, to=2**62)), "don't fill its buffers"),
    "a huge size of nothing": (dict(change=setting(TENSORS, 0, 1, to=[0, 2**62, 2**62])), "don't fill its buffers"),
    "no buffer": (dict(change=setting(TENSORS, 0, 0, to=99)), "lies in no buffer"),
    "a buffer too many": (dict(change=lambda head: head[BUFFERS].append(["int64", 1])), "buffers, its header names"),
    "a larger buffer": (dict(change=setting(BUFFERS, 0, 1, to=2**60)), "expected 1152921504606846976 elements"),
    "another dtype": (dict(change=setting(BUFFERS, 0, 0, to="int16")), r"elements of int16 \(torch.int16\), got"),
    "a dtype that isn't": (dict(change=setting(BUFFERS, 0, 0, to="code")), "unknown dtype 'code'"),
    "a tensor too many": (dict(change=setting(ENTRIES, ROWS, DATA, to=99)), "there is no tensor 99"),
    "pieces of other lengths": (dict(change=setting(ENTRIES, ROWS, LENGTHS, to=[3, 4])), "don't make"),
    "no pieces": (dict(change=setting(ENTRIES, ROWS, LENGTHS, to=[])), "of length >= 1"),
    "a table too many": (dict(change=setting(ENTRIES, ROWS, OF_TABLES, 0, to=7)), "there is no table 7"),
    "a table too few": (dict(change=lambda head: head[ENTRIES][ROWS][OF_TABLES].pop()), "don't make"),
    "another table's length": (dict(change=setting(ENTRIES, ROWS, LENGTHS, to=[4, 2])), "one entry for each row"),
    "a table without samples": (dict(change=lambda head: head[TABLES][0][1].pop("sample")), "lacks columns"),
    "columns that number nothing": (
        dict(change=lambda head: head[TABLES][0][1].update(sample=head[ENTRIES][ROWS][DATA])), "column 'sample'"
    ),
    "a strategy too many": (dict(change=setting(ENTRIES, ROWS, OF, to=40)), "there is no strategy 40"),
    "rows of a list": (
        dict(change=lambda head: setting(ENTRIES, ROWS, OF, to=head[ENTRIES][TEXT][OF])(head)), "which doesn't fit Ext"
    ),
    "values of rows": (
        dict(change=lambda head: setting(ENTRIES, TEXT, OF, to=head[ENTRIES][ROWS][OF])(head)), "which doesn't fit Cat"
    ),
    "a dim that rows haven't": (
        dict(change=lambda head: head[STRATEGIES][head[ENTRIES][ROWS][OF]]["parameters"].update(dim=7)), "no such state"
    ),
    "a parameter of a wrong type": (
        dict(change=lambda head: head[STRATEGIES][head[ENTRIES][ROWS][OF]]["parameters"].update(dim="x")), "cannot use"
    ),
    "an unknown strategy": (
        dict(change=lambda head: head[STRATEGIES][head[ENTRIES][ROWS][OF]].update(name="mine")), "register it first"
    ),
    "a list of no lists": (
        dict(change=setting(ENTRIES, TEXT, VALUES, 0, 0, to=codec.encode(5))), "of 'text' is no such state"
    ),
    "bytes that are no value": (dict(change=setting(ENTRIES, TEXT, VALUES, 0, 0, to=b"\xc1")), "cannot decode"),
    "a weighted value that is none": (
        dict(change=setting(ENTRIES, TEXT, VALUES, 0, 1, to=True)), "of 'text' is no such state"
    ),
    "a function that isn't": (
        dict(change=lambda head: setting(STRATEGIES, head[REGISTRY][-1][1], to="test_packed:nothing")(head)),
        "cannot import the aggregation test_packed:nothing",
    ),
    "a function that is none": (
        dict(change=lambda head: setting(STRATEGIES, head[REGISTRY][-1][1], to="test_packed:GOOD")(head)),
        "is no function",
    ),
    "registrations twice": (dict(change=lambda head: head[REGISTRY].append(head[REGISTRY][0])), "come twice"),
    "a note of nothing": (dict(change=setting(NOTES, to=codec.encode({"x": "y"}))), "aren't of its keys"),
    "notes that are none": (dict(change=setting(NOTES, to=codec.encode([1]))), "aren't of its keys"),
    "an interval backwards": (dict(change=setting(LEDGER, 0, 1, to=[3, 0])), "which samples were seen"),
    "a key of states twice": (in_layout(setting(KEYS, 1, to="mean")), "2 keys of a packed cache"),
    "a kind too many": (in_layout(setting(KIND_OF, 1, to=5)), "keys of a packed cache"),
    "a place too few": (in_layout(lambda layout: layout[PLACES].pop()), "keys of a packed cache"),
    "a chunk too many": (in_layout(setting(PLACES, 0, to=1)), "in chunk 1, which a packed cache hasn't"),
    "an offset outside": (in_layout(setting(PLACES, 1, to=2**62)), "doesn't fit into its chunk of 6"),
    "an offset one too far": (in_layout(setting(PLACES, 5, to=4)), "3 elements at 4 doesn't fit into its chunk of 6"),
    "places that overlap": (in_layout(setting(PLACES, 5, to=2)), "3 elements at 2 doesn't fit"),
    "the same place": (in_layout(setting(PLACES, 5, to=0)), "3 elements at 0 doesn't fit"),
    "a forged shape": (in_layout(setting(KINDS, 0, FIELDS, "total", 1, to=[2**40])), "doesn't fit into its chunk"),
    "a shape that blows up": (
        in_layout(lambda layout: layout[KINDS][0][FIELDS].update(total=["float64", [1, 2**20]], count=["int64", [2**20, 1]])),  # noqa: E501
        "would take 1099511627776 elements",
    ),
    "a field too few": (in_layout(lambda layout: layout[KINDS][0][FIELDS].pop("total")), "keys of a packed cache"),
    "a field of another name": (
        in_layout(lambda layout: layout[KINDS][0][FIELDS].update(x=layout[KINDS][0][FIELDS].pop("count"))), "has fields"
    ),
    "a dtype that isn't reduced": (in_layout(setting(KINDS, 0, FIELDS, "total", 0, to="int16")), "doesn't fit Mean"),
    "a dtype of another segment": (in_layout(setting(KINDS, 0, FIELDS, "total", 0, to="float32")), "in chunk 0, which"),
    "states of rows": (in_layout(setting(OF_STATES, 0, to={"name": "cat", "parameters": {}})), "no state of fields"),
    "a result that isn't": (in_layout(setting(KINDS, 0, 1, to="code")), "unknown dtype 'code'"),
    "a slab of strangers": (in_layout(lambda layout: layout[SLABS].append([0, 7])), "none of its keys'"),
    "a slab backwards": (in_layout(lambda layout: layout[SLABS].append([1, 0])), "doesn't lie side by side"),
    "a larger chunk": (in_layout(setting(SEGMENTS, 0, 1, 0, to=10**9)), "expected 1000000000 elements"),
    "a chunk cut short": (in_layout(setting(SEGMENTS, 0, 1, 0, to=5)), "doesn't fit into its chunk of 5"),
    "a reduction that isn't": (
        in_layout(lambda layout: layout[SEGMENTS].append([["avg", "float64", 0, "cpu", "", False], []])),
        "no such state",
    ),
    "a segment twice": (in_layout(lambda layout: layout[SEGMENTS].append(layout[SEGMENTS][0])), "comes twice"),
}  # fmt: skip


def test_what_is_forged_below_was_good_before():
    found, expected = read_all(GOOD), a_bit_of_everything()
    assert found["rows"] == bits(expected["rows"]) and found["mean"] == bits(expected["mean"])
    assert read_all(Packed(forged(GOOD.header), GOOD.buffers)) == found


LATE = {"a list of no lists", "bytes that are no value", "a weighted value that is none"}  # what the header encodes


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_header_is_refused_and_said_why_before_anything_is_copied(what):
    changes, message = FORGERIES[what]
    sent = Packed(forged(GOOD.header, **changes), GOOD.buffers)
    copies = [] if what in LATE else [(packed, "_arena"), (packed._Reader, "tensor")]
    with contextlib.ExitStack() as stack:
        for owner, name in copies:
            stack.enter_context(mock.patch.object(owner, name, side_effect=MemoryError))
        if copies:
            with pytest.raises(MemoryError):
                unpack(GOOD, own=True)
        for own in (False, True):
            with pytest.raises(BadCache, match=message):
                unpack(sent, own=own)


def test_fields_that_cannot_be_read_together_are_refused():
    sent = pack(seen(Mean(), [x(1.0, 2.0, 3.0)], range(1), False))

    def change(layout):
        layout[KINDS][0][FIELDS]["count"][1] = [2]
        layout[SEGMENTS][1][1] = [2]

    buffers = [sent.buffers[0], np.array([1, 1])]
    with pytest.raises(BadCache, match=r"states of Mean.* is no such state: RuntimeError: The size of tensor a \(3\)"):
        unpack(Packed(forged(sent.header, change_layout=change), buffers), own=False)
    with mock.patch.object(packed, "_check_reads"), pytest.raises(RuntimeError, match="size of tensor"):
        unpack(Packed(forged(sent.header, change_layout=change), buffers), own=False)["k"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda buffers: buffers.pop(), "buffers, its header names"),
        (lambda buffers: buffers.append(buffers[0]), "buffers, its header names"),
        (lambda buffers: buffers.insert(0, buffers.pop()), "buffer 0 .* expected 6 elements of float64"),
        (setting(0, to=GOOD.buffers[0][:-1]), "expected 6 elements of float64 .*, got 5 of float64"),
        (setting(0, to=GOOD.buffers[0].astype(np.float32)), "got 6 of float32"),
        (setting(0, to=GOOD.buffers[0].byteswap().view(">f8")), "got 6 of >f8"),
        (setting(0, to=GOOD.buffers[0].view(np.int64)), "got 6 of int64"),
        (setting(0, to=GOOD.buffers[0].reshape(2, 3)), "no flat numpy array"),
        (setting(0, to=np.repeat(GOOD.buffers[0], 2)[::2]), "no flat numpy array"),
        (setting(0, to=GOOD.buffers[0].tobytes()), "no flat numpy array: bytes"),
        (setting(-1, to=np.array([1, 2], dtype=np.uint8)), "neither 0 nor 1"),
    ],
)
def test_buffers_that_are_not_what_the_header_says_are_refused(change, message):
    buffers = list(GOOD.buffers)
    change(buffers)
    with pytest.raises(BadCache, match=message):
        unpack(Packed(GOOD.header, buffers), own=True)


def test_a_header_that_is_cut_anywhere_is_refused():
    for end in range(len(GOOD.header)):
        with pytest.raises(BadCache):
            unpack(Packed(GOOD.header[:end], GOOD.buffers), own=False)


def refused_or_read(sent: Packed) -> None:
    with mock.patch.object(
        Function, "at", side_effect=lambda path: Function(top_level)
    ):  # nothing is imported by chance
        cache = None
        try:
            cache = unpack(sent, own=True)
        except BadCache:
            return
    for key in cache:
        assert cache[key] is not None or key
        if cache._rows(key) is not None:
            cache.rows(key)


@quick
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_header_with_flipped_bits_is_refused_or_read_and_never_anything_else(where, flip):
    data = bytearray(GOOD.header)
    data[int(where * len(data))] ^= flip
    refused_or_read(Packed(bytes(data), GOOD.buffers))


@quick
@given(st.integers(0, len(GOOD.buffers) - 1), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_buffers_with_flipped_bits_or_cut_are_refused_or_read_and_never_anything_else(number, where, flip):
    buffer = GOOD.buffers[number].copy()
    at = int(where * buffer.nbytes)
    buffer.view(np.uint8)[at : at + 1] ^= np.uint8(flip)
    buffer = buffer if flip else buffer[: at // buffer.itemsize]
    refused_or_read(Packed(GOOD.header, [*GOOD.buffers[:number], buffer, *GOOD.buffers[number + 1 :]]))


tokens = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.integers(-1, 9), st.floats(),
    st.sampled_from(["", "rows", "cat", "mean", "float32", "int64", "function", "0", "max"]), st.binary(max_size=3),
    st.just([]), st.just({}), st.lists(st.integers(-1, 9), max_size=4),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for step, item in steps for place in [(*path, step), *places(item, (*path, step))]]


IN_HEADER = places(msgspec.msgpack.decode(GOOD.header))
IN_LAYOUT = places(msgspec.msgpack.decode(msgspec.msgpack.decode(GOOD.header)[LAYOUT]))


@settings(quick, max_examples=400)
@given(st.sampled_from([*((False, p) for p in IN_HEADER), *((True, p) for p in IN_LAYOUT)]), tokens)
def test_any_value_in_any_place_of_a_header_is_refused_or_read(place, to):
    layout, where = place
    change = setting(*where, to=to)
    header = forged(GOOD.header, **{"change_layout" if layout else "change": change})
    refused_or_read(Packed(header, GOOD.buffers))


def test_a_check_that_was_left_out_would_be_found():
    """Were columns not checked, a table would be read beside rows of another number."""
    changes, _ = FORGERIES["another table's length"]
    sent = Packed(forged(GOOD.header, **changes), GOOD.buffers)
    with mock.patch.object(packed._Reader, "_check_columns"):
        cache = unpack(sent, own=True)
    assert [len(piece.value_n) for piece in cache._entries["rows"].state.pieces] == [4, 2]
    assert [len(piece.columns) for piece in cache._entries["rows"].state.pieces] == [3, 3]
