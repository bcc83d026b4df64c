"""Plain values and tensors to bytes and back: every bit, and nothing but `BadCache` for bytes of a stranger."""

from __future__ import annotations

import enum
import math
import warnings

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from distcache.codec import DTYPES, MAX_DEPTH, as_bytes, check_plain, decode, dtype_named, encode, from_bytes
from distcache.errors import BadCache

warnings.filterwarnings("ignore", "ComplexHalf support is experimental")


def same(a, b):
    """Equal in type, value and, for tensors, in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, float) and math.isnan(a):
        return type(b) is float and math.isnan(b)
    return type(a) is type(b) and a == b


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    TEXT,
    st.binary(max_size=8),
    st.sampled_from([torch.arange(3), torch.zeros(0, 2), torch.tensor(1.5, dtype=torch.bfloat16)]),
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
@example([-(2**63), 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**5000])
@example([0.0, -0.0, math.inf, (), [], {}, "", b"", "é", {"": ()}])
def test_what_is_encoded_comes_back_as_it_was(value):
    assert same(value, decode(encode(value)))


def test_types_that_compare_equal_are_told_apart():
    assert not same([1], [True]) and not same((1,), [1]) and not same(1, 1.0)
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3)], ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(
        0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), generator=generator
    )
    x = from_bytes(bits.to(torch.uint8), dtype, shape)
    back = decode(encode({"x": x}))["x"]
    assert same(x, back) and back.is_contiguous() and (not back.numel() or back.data_ptr() % dtype.itemsize == 0)


def test_every_dtype_of_this_torch_that_holds_plain_elements_has_a_name():
    assert len(DTYPES) >= 20 and all(dtype_named(name) is dtype for name, dtype in DTYPES.items())
    with pytest.raises(BadCache, match="unknown dtype 'float31': expected one of float64, float32"):
        dtype_named("float31")


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0xFFC12345 - 2**32], ids=hex)
def test_a_nan_keeps_its_payload(bits):
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert decode(encode(x)).view(torch.int32).item() == bits


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[::2],
        torch.arange(2.0).reshape(1, 2)[:, 0],
        torch.arange(3.0).expand(2, 3),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.randn(2, dtype=torch.complex64).conj().imag,
        torch.randn(2, requires_grad=True) * 2,
        nn.Parameter(torch.ones(2)),
    ],
    ids=["transposed", "strided", "one of a column", "expanded", "conj", "neg", "with a graph", "parameter"],
)
def test_a_view_comes_back_as_the_values_it_shows(view):
    back = decode(encode(view))
    assert torch.equal(back, view) and not back.requires_grad and type(back) is torch.Tensor


def test_a_tensor_of_inference_mode_comes_back():
    with torch.inference_mode():
        x = torch.ones(2)
    assert torch.equal(decode(encode(x)), torch.ones(2))


class Colour(enum.IntEnum):
    RED = 1


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, object()]}, r"value\['a'\]\[1\]: cannot send a builtins\.object"),
        ({1: 2}, r"value: expected str keys in a dict, got 1 \(int\)"),
        (Colour.RED, "cannot send a .*Colour"),
        ({1, 2}, "cannot send a builtins.set"),
        (torch.float32, "cannot send a torch.dtype"),
        (torch.eye(2).to_sparse(), "expected a dense tensor of a plain dtype, got Tensor of torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "expected a dense tensor of a plain dtype"),
        (torch.ones(2).as_subclass(Dispatching), "got Dispatching of"),
        (torch.ones(2, device="meta"), "on the meta device"),
        ("\ud800", "no valid text"),
        ({"\ud800": 1}, "no valid text"),
    ],
)
def test_what_cannot_travel_is_named_with_its_place(value, words):
    for call in (encode, check_plain):
        with pytest.raises(TypeError, match=words):
            call(value)


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"x": v}], ids=["list", "tuple", "dict"])
def test_nesting_goes_so_deep_and_no_deeper(wrap):
    assert same(decode(encode(nested(MAX_DEPTH, wrap))), nested(MAX_DEPTH, wrap))
    for too_deep in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(TypeError, match=f"nested deeper than {MAX_DEPTH}"):
            encode(nested(too_deep, wrap))


def test_a_list_that_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(TypeError, match="nested deeper"):
        encode(loop)


# -- bytes of a stranger -------------------------------------------------------------------------------------------


def ext(code, payload):
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, payload))


def forged_tensor(dtype, shape, body):
    head = msgspec.msgpack.encode([dtype, shape])
    return ext(2, len(head).to_bytes(4, "little") + head + body)


def tuples(depth):
    data = msgspec.msgpack.encode(1)
    for _ in range(depth):
        data = ext(1, b"\x91" + data)
    return data


FORGED = {
    "nothing": b"",
    "cut short": encode([1, 2, 3])[:-1],
    "something behind": encode([1]) + b"\x00",
    "an opcode that isn't": b"\xc1",
    "lists without end": b"\x91" * 100_000,
    "tuples without end": tuples(2000),
    "a list of 2^32 items": b"\xdd\xff\xff\xff\xff",
    "a tag we don't have": ext(99, b"x"),
    "a timestamp": b"\xd6\xff\x00\x00\x00\x01",
    "keys that are no text": msgspec.msgpack.encode({1: 2}),
    "a key that is a list": b"\x81\x90\x01",
    "a key that is a tensor": b"\x81" + encode(torch.ones(1)) + b"\x01",
    "a tuple of text": ext(1, msgspec.msgpack.encode("abc")),
    "a tuple of a dict": ext(1, msgspec.msgpack.encode({"a": 1})),
    "a tuple that is cut short": ext(1, b"\x92\x01"),
    "no text": b"\xa2\xff\xfe",
    "a tensor without a head": ext(2, b""),
    "a tensor whose head is too long": ext(2, b"\xff\xff\xff\xff"),
    "a tensor of no dtype": forged_tensor("float31", [1], b"\x00" * 4),
    "a dtype that is a list": ext(2, (3).to_bytes(4, "little") + b"\x92\x90\x90"),
    "a dtype that is no dtype": forged_tensor("load", [1], b"\x00" * 4),
    "too few bytes": forged_tensor("float32", [2], b"\x00" * 4),
    "too many bytes": forged_tensor("float32", [0], b"\x00" * 4),
    "a negative dim": forged_tensor("float32", [-1, -1], b"\x00" * 4),
    "a negative dim beside 0": forged_tensor("float32", [0, -1], b""),
    "a huge shape": forged_tensor("float32", [2**62], b"\x00" * 4),
    "a huge shape of nothing": forged_tensor("float32", [2**62, 2**62, 0], b""),
    "a dim beyond int64": forged_tensor("float32", [2**63, 0], b""),
    "a hundred thousand dims": forged_tensor("float32", [2**62] * 100_000, b""),
    "a dim that is no integer": forged_tensor("float32", [1.0], b"\x00" * 4),
    "a truth value that is 2": forged_tensor("bool", [1], b"\x02"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_bytes_are_a_bad_cache(name):
    with pytest.raises(BadCache):
        decode(FORGED[name])


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_plain_value_or_a_bad_cache(data):
    try:
        value = decode(data)
    except BadCache:
        return
    check_plain(value)


VALID = encode({"a": [1, (2, torch.arange(5.0)), "x"], "b": torch.ones(2, dtype=torch.bool), "c": 2**80})


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4), st.integers(0, 4))
def test_a_damaged_encoding_is_a_plain_value_or_a_bad_cache(at, patch, removed):
    try:
        value = decode(VALID[:at] + patch + VALID[at + removed :])
    except BadCache:
        return
    check_plain(value)


def test_from_bytes_is_a_view_where_the_address_allows():
    flat = torch.arange(16, dtype=torch.uint8)
    assert from_bytes(flat[4:12], torch.int32, (2,)).data_ptr() == flat.data_ptr() + 4
    moved = from_bytes(flat[1:9], torch.int32, (2,))
    assert moved.data_ptr() % 4 == 0 and torch.equal(as_bytes(moved), flat[1:9])
