"""Plain values, with tensors as leaves, to tagged msgpack bytes; no code is ever stored or run.

Values: None, bool, int, float, str, bytes, list, tuple, dict with str keys, torch.Tensor. Anything else is
a `TypeError` that says where in the value it sits. Tensors come back on the CPU, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from distcache.errors import BadCache

_TUPLE, _TENSOR, _BIG_INT = 1, 2, 3

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
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(flat_u8: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose elements `flat_u8` holds: a view where its address allows, a copy where it doesn't."""
    if flat_u8.numel() == 0:
        return torch.empty(shape, dtype=dtype, device=flat_u8.device)
    if flat_u8.data_ptr() % dtype.itemsize or flat_u8.storage_offset() % dtype.itemsize:
        flat_u8 = flat_u8.clone()
    return flat_u8.view(dtype).reshape(shape)


def check_plain(value: Any, where: str = "value") -> None:
    """TypeError naming the place in `value` that can't travel; None when all of it can."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype not in DTYPES.values():
            raise TypeError(
                f"{where}: expected a dense tensor of a plain dtype, got {value.layout} {value.dtype}. "
                "Make it dense first: tensor.to_dense() or tensor.dequantize()."
            )
        return
    if kind in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
        return
    if kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"{where}: expected str keys in a dict, got {name!r} ({type(name).__name__}).")
            check_plain(item, f"{where}[{name!r}]")
        return
    raise TypeError(
        f"{where}: cannot send a {kind.__module__}.{kind.__qualname__}. Expected None, bool, int, float, str, "
        "bytes, list, tuple, dict with str keys, or a torch.Tensor: convert it first."
    )


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
        return msgspec.msgpack.Ext(_BIG_INT, str(value).encode())
    return value


def decode(data: bytes) -> Any:
    """The value that `encode` made these bytes of. `BadCache` for bytes it didn't make."""
    try:
        return msgspec.msgpack.decode(data, ext_hook=_untag)
    except BadCache:
        raise
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise BadCache(f"cannot decode {len(data)} bytes: {error}.") from error


def _untag(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, ext_hook=_untag))
    if code == _BIG_INT:
        return int(bytes(data).decode())
    if code == _TENSOR:
        split = 4 + int.from_bytes(data[:4], "little")
        name, shape = msgspec.msgpack.decode(data[4:split], type=tuple[str, list[int]])
        dtype, body = dtype_named(name), data[split:]
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(body):
            raise BadCache(f"a tensor of {name} {shape} cannot have {len(body)} bytes.")
        if not len(body):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(dtype).reshape(shape)
    raise BadCache(f"unknown tag {code} in encoded bytes.")
