"""Plain values, with tensors as leaves, to tagged msgpack bytes; no code is ever stored or run.

Values: None, bool, int, float, str, bytes, list, tuple, dict with str keys, torch.Tensor. Anything else is
a `TypeError` that says where in the value it sits. Tensors come back on the CPU, bit for bit, contiguous.

Decoding trusts nothing: bytes that `encode` didn't make end in `BadCache`, whatever they hold.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from distcache.errors import BadCache

_TUPLE, _TENSOR, _BIG_INT = 1, 2, 3
MAX_DEPTH = 128  # of nesting; far below where Python's own stack would end

_DTYPE_NAMES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "complex128",
    "complex64",
    "complex32",
    "bool",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `"float32"`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """`"float32"` -> `torch.float32`; `BadCache` for a name that torch hasn't."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise BadCache(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}.") from None


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a flat uint8 tensor on the same device; a view where it's contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # a single element counts as contiguous, whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def from_bytes(flat_u8: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose elements `flat_u8` holds: a view where its address allows, a copy where it doesn't."""
    if flat_u8.numel() == 0:
        return torch.empty(shape, dtype=dtype, device=flat_u8.device)
    if flat_u8.data_ptr() % dtype.itemsize or flat_u8.storage_offset() % dtype.itemsize:
        flat_u8 = flat_u8.clone()
    return flat_u8.view(dtype).reshape(shape)


def check_plain(value: Any, where: str = "value", depth: int = 0) -> None:
    """TypeError naming the place in `value` that can't travel; None when all of it can."""
    kind = type(value)
    if value is None or kind in (bool, int, float, bytes):
        return
    if kind is str:
        _check_text(value, where)
    elif isinstance(value, Tensor):
        _check_tensor(value, where)
    elif kind not in (list, tuple, dict):
        raise TypeError(
            f"{where}: cannot send a {kind.__module__}.{kind.__qualname__}. Expected None, bool, int, float, str, "
            "bytes, list, tuple, dict with str keys, or a torch.Tensor: convert it first."
        )
    elif depth == MAX_DEPTH:
        raise TypeError(f"{where[:80]}…: cannot send a value nested deeper than {MAX_DEPTH}.")
    elif kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"{where}: expected str keys in a dict, got {name!r} ({type(name).__name__}).")
            _check_text(name, where)
            check_plain(item, f"{where}[{name!r}]", depth + 1)
    else:
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]", depth + 1)


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TypeError(f"{where}: cannot send a str that is no valid text: {error}.") from None


def _check_tensor(tensor: Tensor, where: str) -> None:
    dense = tensor.layout is torch.strided and not tensor.is_quantized and tensor.dtype in DTYPES.values()
    # A subclass that dispatches by itself (DTensor, a quantized weight) has no elements of its own to read.
    if not dense or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{where}: expected a dense tensor of a plain dtype, got {type(tensor).__name__} of {tensor.layout} "
            f"{tensor.dtype}. Make it dense first: tensor.to_dense(), dequantize() or full_tensor()."
        )
    if tensor.is_meta:
        raise TypeError(f"{where}: cannot send a tensor on the meta device: it has no elements.")


def encode(value: Any) -> bytes:
    """Bytes of a plain value. TypeError for what can't travel, naming its place."""
    check_plain(value)
    return msgspec.msgpack.encode(_tag(value))


def _tag(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        head = msgspec.msgpack.encode([dtype_name(value.dtype), list(value.shape)])
        body = as_bytes(value).cpu().numpy().tobytes()
        return msgspec.msgpack.Ext(_TENSOR, len(head).to_bytes(4, "little") + head + body)
    if kind is list:
        return [_tag(item) for item in value]
    if kind is dict:
        return {name: _tag(item) for name, item in value.items()}
    if kind is tuple:
        return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode([_tag(item) for item in value]))
    if kind is int and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    return value


def decode(data: bytes) -> Any:
    """The value that `encode` made these bytes of. `BadCache` for bytes it didn't make."""
    try:
        value = msgspec.msgpack.decode(data, ext_hook=_untag)
        check_plain(value)  # msgpack knows more than we send: timestamps, keys that are no str
        return value
    except BadCache:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        # RuntimeError: too deep a nesting (RecursionError), a shape beyond what torch can address.
        raise BadCache(f"cannot decode {len(data)} bytes: {error}.") from error


def _untag(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, type=list, ext_hook=_untag))
    if code == _BIG_INT:
        return int.from_bytes(data, "little", signed=True)
    if code == _TENSOR:
        split = 4 + int.from_bytes(data[:4], "little")
        name, shape = msgspec.msgpack.decode(data[4:split], type=tuple[str, list[int]])
        dtype, body = dtype_named(name), bytearray(data[split:])
        if len(shape) > MAX_DEPTH or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(body):
            raise BadCache(f"a tensor of {name} {shape} cannot have {len(body)} bytes.")
        if not body:
            return torch.empty(shape, dtype=dtype)
        flat_u8 = torch.frombuffer(body, dtype=torch.uint8)
        if dtype == torch.bool and bool((flat_u8 > 1).any()):
            raise BadCache("a tensor of bool has bytes that are neither 0 nor 1.")
        return flat_u8.view(dtype).reshape(shape)
    raise BadCache(f"unknown tag {code} in encoded bytes.")
