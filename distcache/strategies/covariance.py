"""Covariance: the centred second moments of vectors, and the plain ones, by one matrix product a batch.

Shapes: n samples, d the elements of one sample's vector, k keys whose samples lie side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.strategies.base import SUM, Field, Fieldwise, State, Value

TINY = torch.finfo(torch.float64).tiny
# A product's float32 sums are this long at most. With 1024 rows variances of 1e4 + N(0, 1) were off by up to 1.7e-6 (of
# few columns, on a CPU), with 256 by 8e-7, with 64 by 5e-7, which took 20% longer at D = 576 and twice as long at 2048.
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Covariance(Fieldwise):
    """Count, mean and covariance matrix over samples, each a vector [D]; reads as a dict of these.

    State: `total` [D], `count`, `m2` [D, D] = Σ (x − mean)(x − mean)ᵀ, centred on this state's own mean, and `weight`
    where samples have one each. Two states combine as in Chan, Golub, LeVeque 1979, in matrix form; across ranks
    totals are reduced first, then each `m2`, re-centred on the mean of all. Sums of squares, which cancel, are never
    made. ValueError for samples that aren't vectors: which dims belong together is for the caller to say (`flatten`,
    or a key for each head).

    Args:
        center: False: second moments about 0, Σ x xᵀ / n, under `second_moment`, in one reduction; no mean.
        correction: the covariance is m2 / (count − correction), as in torch.cov; 0 divides by the count.
        dim: `"auto"`: the rows of a recorded value, while a value set by hand is one sample; or the dim of the samples.
        accumulate: dtype of what is kept between batches, float64 unless said otherwise; 8 bytes × D² a key.
    """

    center: bool = True
    correction: int = 1
    dim: int | Literal["auto"] = "auto"
    accumulate: torch.dtype | None = None

    groupable = True
    fields = (
        Field("total", SUM),
        Field("count", SUM),
        Field("weight", SUM),
        Field("second", SUM),
        Field("m2", SUM, round=1),
    )
    ragged = False
    size = None

    def split_dim(self, field: str, ndim: int, dim: int) -> int | None:
        raise ValueError(
            "covariances between dims on different ranks can't be known from each rank's own: record where the value "
            "is whole, or leave the pieces' own covariances apart, a key for each rank."
        )

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        """value_n [n, D]."""
        if value_n.dim() != 2:
            raise ValueError(
                f"Covariance expects samples that are vectors, [D] each, got {list(value_n.shape[1:])}: flatten them "
                "first, or give dim= if one of these dims is the samples'."
            )
        if weight_n is not None and weight_n.dim() > 1:
            raise TypeError("Covariance takes one weight per sample: a weight per element has no covariance matrix.")
        return {name: tensor[0] for name, tensor in self._lift(value_n.unsqueeze(0), weight_n).items()}

    def take_slab(self, value: Value) -> State:
        x_nkd, _ = self.samples(value)
        if x_nkd.dim() != 3:
            return Fieldwise.take_slab(self, value)  # which says what is expected of one key's samples
        return self._lift(x_nkd.movedim(1, 0), None)

    def _lift(self, x_knd: Tensor, weight_n: Tensor | None) -> State:
        k, n, d = x_knd.shape
        exact = torch.float32 if x_knd.is_floating_point() and x_knd.dtype != torch.float64 else torch.float64
        mass = x_knd.new_tensor(n, dtype=torch.float64) if weight_n is None else weight_n.sum()
        divisor = mass.clamp_min(TINY)
        second_kdd = x_knd.new_zeros(k, d, d, dtype=torch.float64)
        first_kd = x_knd.new_zeros(k, d, dtype=torch.float64)
        centre_kd = x_knd.new_zeros(k, d, dtype=exact)
        with full_float32(x_knd.device):
            # A provisional centre in the input's precision, then the exact correction of it, as in `Moments`.
            if self.center and weight_n is None:
                centre_kd = x_knd.sum(1, dtype=exact) / max(n, 1)
            elif self.center and weight_n is not None:
                centre_kd = (weight_n / divisor).to(exact) @ x_knd.to(exact)
            for start in range(0, n, BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                off_kcd = x_knd[:, block].to(exact) - centre_kd.unsqueeze(1)
                weighed_kcd = off_kcd if weight_n is None else off_kcd * weight_n[block, None].to(exact)
                second_kdd += weighed_kcd.mT @ off_kcd
                first_kd += weighed_kcd.sum(1)
        acc = self.accumulate or torch.float64
        counted = torch.tensor(n, device=x_knd.device) if weight_n is None else (weight_n != 0).sum()
        state = {"count": counted.expand(k).clone()}
        if weight_n is not None:
            state["weight"] = mass.expand(k).clone()
        if not self.center:
            return {**state, "second": second_kdd.to(acc)}
        _add_outer_(second_kdd, first_kd, first_kd / -divisor)
        total_kd = centre_kd.double() * mass + first_kd
        return {**state, "total": total_kd.to(acc), "m2": second_kdd.to(acc)}

    def fold_(self, into: State, other: State) -> None:
        if self.center:
            n_a, n_b = _mass(into), _mass(other)
            apart = _mean(other["total"], n_b) - _mean(into["total"], n_a)
            into["m2"].add_(other["m2"])
            # n_a·n_b/(n_a + n_b) is 0 where either saw nothing.
            _add_outer_(into["m2"], apart, apart * (n_a * n_b / (n_a + n_b).clamp_min(TINY)))
        for name, held in into.items():
            if name != "m2":
                held.add_(other[name])

    def recentre_(self, local: State, merged: State) -> None:
        n = _mass(local)
        off = _mean(local["total"], n) - _mean(merged["total"], _mass(merged))
        _add_outer_(local["m2"], off, off * n)

    def finalize(self, state: State) -> dict[str, Tensor]:
        n = _mass(state)
        if not self.center:
            return {"count": state["count"], "second_moment": state["second"] / n.unsqueeze(-1)}
        covariance = state["m2"] / (n - self.correction).clamp_min(0).unsqueeze(-1)
        return {"count": state["count"], "mean": state["total"] / n, "covariance": covariance}


def _mass(state: State) -> Tensor:
    """Σ w, or the count, as float64 [..., 1]."""
    return state.get("weight", state["count"]).double().unsqueeze(-1)


def _mean(total: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, total.double() / mass, 0.0)


def _add_outer_(into: Tensor, a: Tensor, b: Tensor) -> None:
    """`into` [..., D, D] += a bᵀ, in place and without a matrix beside it."""
    into.addcmul_(a.unsqueeze(-1).to(into.dtype), b.unsqueeze(-2).to(into.dtype))


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32, whatever autocast, TF32 or bfloat16 the model has been allowed."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # Newer versions have a setting for each backend, and raise where the older one for all is read between.
    lowered = [(b, b.fp32_precision) for b in backends if getattr(b, "fp32_precision", "ieee") not in ("ieee", "none")]
    older = None if hasattr(backends[0], "fp32_precision") else torch.get_float32_matmul_precision()
    casts = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext():
        try:
            for backend, _ in lowered:
                backend.fp32_precision = "ieee"
            if older is not None:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for backend, before in lowered:
                backend.fp32_precision = before
            if older is not None:
                torch.set_float32_matmul_precision(older)
