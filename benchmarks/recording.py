"""What recording costs: a bare forward pass, hooks written by hand that do the same work, and `dc.record`.

The model has SmolLM2-135M's shape and random weights, which cost the same as its own. Texts differ in length, so that
everybody leaves padding out. All candidates take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distcache as dc
from benchmarks.harness import Candidate, time_on_rank

LAYERS, WIDTH = 30, 576
WORKLOADS = ("all layers, last token", "all layers, mean", "one layer, all tokens")
SITES = {
    "all layers, last token": dc.Site("resid_out", tokens="last"),
    "all layers, mean": dc.Site("resid_out", reduce=dc.Mean()),
    "one layer, all tokens": dc.Site("resid_out", layers=[15]),
}


def model_on(device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=49152, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlamaModel(config).to(device, dtype).eval()


def batch_on(device: torch.device, num_samples: int, num_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(num_tokens // 2, num_tokens + 1, (num_samples,), generator=generator)
    lengths[0] = num_tokens
    mask = (torch.arange(num_tokens) < lengths[:, None]).long()
    ids = torch.randint(3, 49152, (num_samples, num_tokens), generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def by_hand(model: nn.Module, name: str, mask_bs: Tensor) -> tuple[list[Any], Callable[[], dict[str, Tensor]]]:
    """Hooks that somebody would write who knows what is wanted, and what they have found."""
    valid = mask_bs.bool()
    last = mask_bs.sum(1) - 1
    places = torch.arange(len(mask_bs), device=mask_bs.device)
    rows: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    totals = torch.zeros(LAYERS, WIDTH, dtype=torch.float64, device=mask_bs.device)
    counts = [0] * LAYERS

    def hook(layer: int) -> Callable[..., None]:
        def last_token(_: Any, args: Any, out: Any) -> None:
            rows[layer].append(_tensor(out)[places, last])

        def mean(_: Any, args: Any, out: Any) -> None:
            x_nd = _tensor(out)[valid]
            totals[layer] += x_nd.sum(0, dtype=torch.float32)
            counts[layer] += len(x_nd)

        def all_tokens(_: Any, args: Any, out: Any) -> None:
            rows[layer].append(_tensor(out)[valid])

        return dict(zip(WORKLOADS, (last_token, mean, all_tokens), strict=True))[name]

    layers: Any = model.layers
    wanted = [15] if name == "one layer, all tokens" else range(LAYERS)
    handles = [layers[layer].register_forward_hook(hook(layer)) for layer in wanted]

    def found() -> dict[str, Tensor]:
        if name == "all layers, mean":
            return {f"resid_out_{n}": (totals[n] / counts[n]).float() for n in wanted}
        return {f"resid_out_{n}": torch.cat(rows[n]) for n in wanted}

    return handles, found


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def on_rank(
    rank: int, world_size: int, name: str, rounds: int, device: str
) -> tuple[list[str], list[list[float]], list[float | None]]:
    """Names of the candidates, milliseconds by candidate and time, and peaks."""
    where = torch.device(device)
    model = model_on(where)
    batch = batch_on(where, *((32, 512) if device == "cuda" else (2, 128)))
    passes = 4
    expected: dict[str, Tensor] = {}

    def bare() -> None:
        with torch.no_grad():
            for _ in range(passes):
                model(**batch)

    def hooks() -> dict[str, Tensor]:
        handles, found = by_hand(model, name, batch["attention_mask"])
        bare()
        for handle in handles:
            handle.remove()
        expected.update(found())
        return expected

    def recorded() -> dc.ActivationCache:
        with dc.record(model, [SITES[name]]) as local:
            bare()
        return local

    def each() -> dc.ActivationCache:
        cache = dc.ActivationCache()
        with torch.no_grad():
            for _ in range(passes):
                with dc.record(model, [SITES[name]], into=cache):
                    model(**batch)
        return cache

    def check(found: Any) -> None:
        assert set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)

    candidates = [
        Candidate("bare forward pass", bare),
        Candidate("hooks by hand", hooks),
        Candidate("distcache", recorded, check=check),
        Candidate("distcache, a block for each pass", each, check=check),
    ]
    return [c.name for c in candidates], *time_on_rank(candidates, rounds, where)
