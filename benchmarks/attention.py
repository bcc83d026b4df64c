"""What averaged attention patterns cost: a bare pass with fast attention, the streamed average beside it, and what is
done without it, eager attention with a hook that averages, and `output_attentions`. On a GPU also the kernel by itself,
beside the two numbers that limit it.

Models have random weights, which cost the same as trained ones; texts are all of one length, where a bare pass is at
its fastest. Accumulators exist before anything is timed or measured. All candidates take turns in one process.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

import distcache as dc
from benchmarks.harness import Candidate, time_on_rank

PASSES = tuple(f"attention {size}" for size in (256, 512, 1024, 2048, 4096, 8192, 16384))
KERNEL = tuple(f"attention kernel {size}" for size in (2048, 4096, 8192))
WORKLOADS = (*PASSES, *KERNEL)
BY_DEVICE = {"cpu": PASSES[:3], "cuda": (*PASSES[2:], *KERNEL)}

MOST_EAGER_ON_GPU = 2048  # beyond, eager attention alone would fill a GPU of 80 GB
HEAD_DIM, KEY_HEADS = 128, 8  # of Llama-3-8B


def shape_of(device: torch.device, size: int) -> tuple[dict[str, Any], int, int]:
    """Options of a LlamaConfig, how many texts a batch has, how many layers are recorded.

    SmolLM2-135M's on a CPU; on a GPU four layers of Llama-3-8B's, with a quarter of its heads where all would fill the
    memory.
    """
    if device.type == "cpu":
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        return dict(**shape, num_key_value_heads=3), 2, 30
    heads = 32 if size <= 8192 else 8
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=heads)
    batch_size = max(1, min(8, 2**15 // size))
    return dict(**shape, num_key_value_heads=heads // 4, head_dim=HEAD_DIM), batch_size, 4 if size <= 4096 else 1


def models_on(device: torch.device, options: dict[str, Any], size: int) -> tuple[nn.Module, nn.Module]:
    """One model twice, with the same weights: as it comes, and with eager attention."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=size, **options)
    model = LlamaModel(config).to(device, dtype).eval()
    with torch.device("meta"):
        # With a configuration of its own, or both models would be eager.
        eager = LlamaModel._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=dtype).eval()
    eager.load_state_dict(model.state_dict(), assign=True)
    eager.rotary_emb = model.rotary_emb  # whose buffers are no part of a state
    assert (model.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    return model, eager


def forward_passes(size: int, rounds: int, device: torch.device) -> list[Candidate]:
    options, batch_size, num_layers = shape_of(device, size)
    model, eager = models_on(device, options, size)
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 8192, (batch_size, size), generator=generator).to(device)}
    site = dc.Site("avg_attn_pattern", layers=range(num_layers), reduce=dc.AveragePattern(size=size))
    cache = dc.ActivationCache()
    by_hand = device.type == "cpu" or size <= MOST_EAGER_ON_GPU
    heads = options["num_attention_heads"] if by_hand else 0
    totals = torch.zeros(num_layers, heads, size if by_hand else 0, size if by_hand else 0, device=device)
    texts_counted = 0

    def bare() -> None:
        with torch.no_grad():
            model(**batch)

    def streamed() -> dc.ActivationCache:
        with dc.record(model, [site], into=cache):
            bare()
        return cache

    def add(layer: int, pattern_bhqk: Tensor) -> None:
        totals[layer] += pattern_bhqk.sum(0, dtype=torch.float32)

    def hooked() -> None:
        nonlocal texts_counted
        layers: Any = eager.layers
        handles = [
            layers[layer].self_attn.register_forward_hook(lambda _, args, out, layer=layer: add(layer, out[1]))
            for layer in range(num_layers)
        ]
        with torch.no_grad():
            eager(**batch)
        for handle in handles:
            handle.remove()
        texts_counted += batch_size

    def all_attentions() -> None:
        nonlocal texts_counted
        with torch.no_grad():
            found = eager(**batch, output_attentions=True).attentions
        for layer in range(num_layers):
            add(layer, found[layer])
        texts_counted += batch_size

    def check(found: Any) -> None:
        # Eager attention rounds weights of up to 1 to bfloat16, whose steps below 1 are 2^-8.
        atol = 2e-6 if device.type == "cpu" else 2**-9
        for layer in range(num_layers):
            mean_hss = found["avg_attn_pattern", layer]
            torch.testing.assert_close(mean_hss.sum(-1), torch.ones_like(mean_hss[..., 0]), atol=1e-4, rtol=0.0)
            if by_hand:
                torch.testing.assert_close(mean_hss.float(), totals[layer] / texts_counted, atol=atol, rtol=0.0)

    slow = min(rounds, 3)
    ways = [
        Candidate("eager, with a hook that averages", hooked, rounds=slow),
        Candidate("output_attentions", all_attentions, rounds=slow),
    ]
    streamed()  # for its accumulators
    return [
        Candidate("bare forward pass", bare),
        *(ways if by_hand else []),
        Candidate("distcache", streamed, check=check),
    ]


def the_kernel(size: int, device: torch.device) -> list[Candidate]:
    """The kernel, and a copy and a matrix product of as many bytes and operations as it can't do without."""
    from distcache.attention import AttentionCall, blockwise, kernels

    batch_size = max(1, 2**15 // size)
    generator = torch.Generator(device).manual_seed(1)
    options = dict(generator=generator, device=device, dtype=torch.bfloat16)
    q_bhqd = torch.randn(batch_size, size, 32, HEAD_DIM, **options).transpose(1, 2)
    k_bhkd = torch.randn(batch_size, size, KEY_HEADS, HEAD_DIM, **options).transpose(1, 2)
    call = AttentionCall(nn.Identity(), q_bhqd, k_bhkd, None, HEAD_DIM**-0.5, True)
    spans, sum_bytes = [(0, size)] * batch_size, 32 * size * size * 4
    _, lse_bhq, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q_bhqd, k_bhkd.repeat_interleave(32 // KEY_HEADS, 1), q_bhqd, 0.0, True, scale=call.scaling
    )
    expected: dict[str, Tensor] = {}

    def plain() -> Tensor:
        expected["sum"] = blockwise.pattern_sum(call, spans, size)
        return expected["sum"]

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected["sum"], atol=1e-5 * batch_size, rtol=0.0)

    # What a copy moves is read and written.
    num_bytes = q_bhqd.nbytes + k_bhkd.nbytes + lse_bhq.nbytes + sum_bytes
    source = torch.randint(255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Half of Q · Kᵀ: the other half is barred.
    edge, operations = 8192, batch_size * 32 * size * size * HEAD_DIM
    left = torch.randn(edge, math.ceil(operations / (2 * edge * edge) / 64) * 64, **options)
    product = torch.empty(edge, edge, dtype=torch.bfloat16, device=device)
    repeats = 20
    return [
        Candidate("plain torch", plain, rounds=2),
        Candidate("a copy of as many bytes", lambda: target.copy_(source), repeats=repeats),
        Candidate("a product of as many operations", lambda: torch.mm(left, left.mT, out=product), repeats=repeats),
        Candidate("the kernel, log-sum-exp computed", lambda: kernels.pattern_sum(call, spans, size),
                  check=check, repeats=repeats),
        Candidate("distcache", lambda: kernels.pattern_sum(call, spans, size, lse_bhq=lse_bhq),
                  check=check, repeats=repeats),
    ]  # fmt: skip


def on_rank(
    rank: int, world_size: int, name: str, rounds: int, device: str
) -> tuple[list[str], list[list[float]], list[float | None]]:
    """Names of the candidates, milliseconds by candidate and time, and peaks."""
    where, size = torch.device(device), int(name.split()[-1])
    if name in KERNEL:
        if where.type != "cuda":
            raise ValueError(f"{name!r} is of a GPU: python -m benchmarks {name!r} --device cuda")
        candidates = the_kernel(size, where)
    else:
        candidates = forward_passes(size, rounds, where)
    return [c.name for c in candidates], *time_on_rank(candidates, rounds, where)
