"""Triton's sums of patterns are what `attention/reference.py` specifies, on a CPU under Triton's interpreter.

The interpreter is a mode of the whole package that is set before it is imported, so kernels run in a process of their
own. It knows nothing of registers, shared memory or tensor cores: for these, kernels are compiled here for GPUs that
needn't be there. Where one is, all is run on it too.

The oracle is plain torch in float64. Numbers of Q and K, rounded to their dtype, are the same for both sides.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distcache.attention import AttentionCall, blockwise, dispatch, reference
from distcache.errors import SiteError
from distcache.testing import RankPool

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install 'distcache[kernels]'", allow_module_level=True)

# Sums of at most 3 samples' probabilities, which are at most 1, from scores of a few units in float32, whose last place
# is 6e-8 of a probability and 2e-7 of a score from 2 to 4. Seen: 6e-7. The same for numbers of 16 bits: products of two
# of them fit into float32, so nothing is rounded but sums.
TOLERANCE = dict(atol=1e-6, rtol=0.0)
# Tensor cores cut digits off where they add, and a GPU's exp2 has an error of two units.
ON_GPU = dict(atol=1e-5, rtol=0.0)

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; the same is run under Triton's interpreter on the CPU"
)

S = 15  # of no tile's size
SPANS = {
    "left and right padding, and none": [(5, S), (0, S), (0, 12)],
    "short ones and an empty one": [(5, 5), (0, 1), (3, 12)],
}


def kinds(size):
    """What an AttentionCall of `size` tokens may say besides Q and K, by name."""
    rng = torch.Generator().manual_seed(1)
    causal = torch.ones(size, size).tril().bool()
    padded = torch.ones(3, size).bool()
    padded[0, : size // 4], padded[2, size - 2 :] = False, False
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(size, size).masked_fill(~causal, lowest)
    blind = torch.arange(size) < size // 3  # keys that nobody sees, so that the first queries see none
    bias = torch.randn(1, 2, size, size, generator=rng)
    sinks = torch.randn(2, generator=rng)
    return {
        "causal": dict(mask=None, is_causal=True),
        "full": dict(mask=None, is_causal=False),
        "causal window": dict(mask=None, is_causal=True, sliding_window=5),
        "full window": dict(mask=None, is_causal=False, sliding_window=3),
        "padding": dict(mask=padded, is_causal=False),
        "causal padding window": dict(mask=padded.long(), is_causal=True, sliding_window=4),
        "bool mask": dict(mask=causal & padded[:, None, None], is_causal=True),
        "bool mask of heads": dict(mask=torch.rand(3, 2, size, size, generator=rng) < 0.7, is_causal=True),
        "prefix mask": dict(mask=(causal | (torch.arange(size) < size // 2))[None, None], is_causal=True),
        "mask of keys": dict(mask=padded[:, None, None], is_causal=False),
        "additive mask": dict(mask=added[None, None], is_causal=True),
        "additive bias": dict(mask=torch.randn(3, 1, 1, size, generator=rng), is_causal=False),
        "position bias": dict(mask=None, is_causal=True, position_bias=bias.half()),
        "softcap": dict(mask=added[None, None], is_causal=True, softcap=0.7),
        "softcap that hardly bends": dict(mask=None, is_causal=True, softcap=50.0),
        "sinks": dict(mask=causal[None, None], is_causal=True, sinks=sinks),
        "sinks without a mask": dict(mask=None, is_causal=True, sinks=sinks.bfloat16()),
        "rows that see nothing": dict(mask=causal[None, None] & ~blind, is_causal=True),
        "additive rows that see nothing": dict(
            mask=added.masked_fill(blind, lowest)[None, None], is_causal=True, sinks=sinks
        ),
        "all at once": dict(
            mask=padded, is_causal=True, sliding_window=9, softcap=2.0, position_bias=bias, sinks=sinks
        ),
    }  # fmt: skip


TWO_HEADS = {name for name, given in kinds(S).items() if {"sinks", "position_bias"} & given.keys()}
TWO_HEADS.add("bool mask of heads")


def some_call(
    kind="causal", dtype=torch.float32, *, size=S, samples=3, heads=None, key_heads=1, dim=8, device="cpu"
):  # fmt: skip
    """Q and K as models have them: heads beside each other in each token."""
    rng = torch.Generator().manual_seed(2)
    heads = heads or (2 if kind in TWO_HEADS else 1)
    q = torch.randn(samples, size, heads, dim, generator=rng).to(device, dtype).transpose(1, 2)
    k = torch.randn(samples, size, key_heads, dim, generator=rng).to(device, dtype).transpose(1, 2)
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in kinds(size)[kind].items()}
    return AttentionCall(nn.Identity(), q, k, scaling=1.7 * dim**-0.5, **given)


def to_numpy(x):
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else x


# -- what runs elsewhere -----------------------------------------------------------------------------------


def in_interpreter(rank, world_size, task, *args):
    """task(kernels, *args) in this process, where nobody has imported Triton yet or it is interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    from distcache.attention import kernels

    with np.errstate(all="ignore"):  # of barred cells, which are dropped
        found = task(kernels, *args)
    return tuple(map(to_numpy, found)) if isinstance(found, tuple) else to_numpy(found)


@pytest.fixture(scope="module")
def interpreted():
    with RankPool() as pool:
        yield lambda task, *args: pool.run(1, in_interpreter, task, *args, timeout_s=120)[0]


def small_tile(kernels, queries=8, keys=8):
    return kernels.Tile(queries, keys, num_warps=4, num_stages=1)


def sum_of(kernels, spans, size, options, call, tile=(8, 8)):
    return kernels.pattern_sum(some_call(**call), spans, size, tile=small_tile(kernels, *tile), **options)


def specified(spans, size, call, heads=None):
    total = reference.pattern_sum(some_call(**call), spans, size)
    return (total if heads is None else total[heads]).float()


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(found), expected, **(tolerance or TOLERANCE))


# -- the sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("kind", kinds(S))
def test_sums_are_what_the_specification_says(interpreted, kind, spans):
    found = interpreted(sum_of, spans, 17, {}, dict(kind=kind))
    assert found.dtype == np.float32
    assert_same(found, specified(spans, 17, dict(kind=kind)))


@pytest.mark.parametrize("tile", [(4, 4), (16, 4), (4, 16)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "full window", "prefix mask"])
def test_tiles_may_be_small_or_oblong(interpreted, kind, tile):
    spans = [(0, 3), (2, S), (0, 0)]
    assert_same(interpreted(sum_of, spans, S, {}, dict(kind=kind), tile), specified(spans, S, dict(kind=kind)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["causal window", "additive mask", "softcap"])
def test_half_precision_is_not_rounded_again(interpreted, kind, dtype):
    spans, call = SPANS["left and right padding, and none"], dict(kind=kind, dtype=dtype)
    assert_same(interpreted(sum_of, spans, S, {}, call), specified(spans, S, call))


@pytest.mark.parametrize(
    ("mistake", "options"),
    [
        ([(4, S), (0, S), (0, 12)], {}),  # a token of padding counts, as a key and as a query
        ([(5, S), (0, S), (0, 11)], {}),  # a token is left out
        ([(5, S), (0, S), (0, 12)], dict(heads=[0, 0])),  # one head is taken for the other
    ],
)
def test_the_oracle_fails_on_a_planted_mistake(interpreted, mistake, options):
    call = dict(kind="full", heads=2)
    found = interpreted(sum_of, mistake, S, options, call)
    with pytest.raises(AssertionError):
        assert_same(found, specified([(5, S), (0, S), (0, 12)], S, call))


@pytest.mark.parametrize(
    ("dim", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (40, torch.float16), (80, torch.float32)], ids=str
)
def test_head_dims_need_not_be_powers_of_two(interpreted, dim, dtype):
    spans, call = [(0, 11), (7, S), (0, 3)], dict(dim=dim, dtype=dtype)
    assert_same(interpreted(sum_of, spans, S, {}, call), specified(spans, S, call))


@pytest.mark.parametrize("heads", [None, [3, 0], []], ids=str)
def test_query_heads_of_one_key_head_lie_side_by_side(interpreted, heads):
    spans, call = [(0, 9), (4, 12)], dict(samples=2, heads=4, key_heads=2, size=12)
    assert_same(interpreted(sum_of, spans, 12, dict(heads=heads), call), specified(spans, 12, call, heads))


@pytest.mark.parametrize("spans", [[], [(4, 4)] * 3], ids=["no samples", "empty ones"])
@pytest.mark.parametrize("size", [0, 5])
def test_nothing_sums_to_zeros(interpreted, spans, size):
    found = interpreted(sum_of, spans, size, {}, dict(samples=len(spans)))
    assert found.shape == (1, size, size) and not found.any()


def test_many_samples_of_many_lengths_are_all_counted(interpreted):
    spans, call = [(b % 3, 3 + b % 2) for b in range(40)], dict(samples=40, size=4)
    # Sums of 40, so 13 times the error of 3.
    assert_same(interpreted(sum_of, spans, 4, {}, call), specified(spans, 4, call), atol=1.3e-5, rtol=0.0)


def sum_of_strided(kernels, spans):
    rng = torch.Generator().manual_seed(3)
    fused = torch.randn(3, S, 1, 3, 8, generator=rng)  # one projection gives Q, K and values, head by head
    q, k = fused[:, :, :, 0].transpose(1, 2), fused.mT.contiguous().mT[:, :, :, 1].transpose(1, 2)
    call = AttentionCall(nn.Identity(), q, k, None, 0.6, True)
    return kernels.pattern_sum(call, spans, S, tile=small_tile(kernels)), reference.pattern_sum(call, spans, S)


def test_q_and_k_of_any_strides_are_read_rightly(interpreted):
    found, expected = interpreted(sum_of_strided, SPANS["left and right padding, and none"])
    assert_same(found, torch.as_tensor(expected).float())


def sum_into(kernels, spans, dtype):
    kept = torch.arange(1.0 * S * S, dtype=dtype).view(S, 1, S)
    into = kept.clone().permute(1, 0, 2)
    found = kernels.pattern_sum(some_call(), spans, S, into_hss=into, tile=small_tile(kernels))
    assert found is into
    return found - kept.permute(1, 0, 2)


# What is there is up to 225, where float32 has steps of 1.5e-5.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float64, 1e-6)], ids=str)
def test_a_sum_can_be_added_to_what_is_there(interpreted, dtype, atol):
    spans = [(0, 3), (4, 11), (2, 2)]
    found = interpreted(sum_into, spans, dtype)
    assert_same(found, specified(spans, S, {}).to(dtype), atol=atol, rtol=0.0)


def sum_with_nan(kernels):
    call = some_call("bool mask", heads=2)
    call.query_bhqd[1, 1, 6] = torch.nan
    return kernels.pattern_sum(call, [(0, S)] * 3, S, tile=small_tile(kernels))


def test_nan_in_q_is_not_hidden(interpreted):
    is_nan = np.isnan(interpreted(sum_with_nan))
    assert is_nan[1, 6].any() and not is_nan[0].any() and not is_nan[1, :6].any() and not is_nan[1, 7:].any()


def sum_beside_nan(kernels, spans):
    call = some_call("full")
    for b, (start, stop) in enumerate(spans):
        for x in (call.query_bhqd, call.key_bhkd):
            x[b, :, :start], x[b, :, stop:] = torch.nan, torch.nan
    return kernels.pattern_sum(call, spans, S, tile=small_tile(kernels))


def test_what_padding_holds_does_not_matter(interpreted):
    spans = SPANS["short ones and an empty one"]
    assert_same(interpreted(sum_beside_nan, spans), specified(spans, S, dict(kind="full")))


def two_sums(kernels):
    call = some_call("bool mask", torch.bfloat16)
    call.query_bhqd.requires_grad_()
    with torch.inference_mode():
        first, second = (kernels.pattern_sum(call, [(0, S)] * 3, S, tile=small_tile(kernels)) for _ in range(2))
    assert not first.requires_grad
    first += 0  # not allowed for a tensor made in inference mode
    return first, second


def test_the_same_call_gives_the_same_bits_and_normal_tensors(interpreted):
    first, second = interpreted(two_sums)
    assert np.array_equal(first, second)


# -- log-sum-exp that is known already ---------------------------------------------------------------------


def lse_of(kind, spans):
    """[B, H, Q] float32, the natural logarithm of float64 scores; in another order in memory, as torch's own may be."""
    call = some_call(kind, heads=2)
    scores_bhqk = reference._scores(call)
    for b, (start, stop) in enumerate(spans):
        scores_bhqk[b, :, :, :start], scores_bhqk[b, :, :, stop:] = -torch.inf, -torch.inf
    if call.sinks is not None:
        sinks = call.sinks.double().view(1, -1, 1, 1).expand(*scores_bhqk.shape[:3], 1)
        scores_bhqk = torch.cat([scores_bhqk, sinks], -1)
    return scores_bhqk.logsumexp(-1).float().transpose(1, 2).contiguous().transpose(1, 2)


def sum_with_lse(kernels, kind, spans, heads, mistake):
    lse_bhq = lse_of(kind, spans)
    assert not lse_bhq.is_contiguous()
    if mistake == "base 2":
        lse_bhq = lse_bhq / np.log(2)
    elif mistake == "read as if contiguous":
        lse_bhq = lse_bhq.transpose(1, 2).reshape(lse_bhq.shape)
    call = some_call(kind, heads=2)
    return kernels.pattern_sum(call, spans, S, lse_bhq=lse_bhq, heads=heads, tile=small_tile(kernels))


@pytest.mark.parametrize(
    ("kind", "heads"), [("causal", None), ("sinks", None), ("sinks", [1]), ("rows that see nothing", None)], ids=str
)
def test_a_log_sum_exp_that_is_known_is_used(interpreted, kind, heads):
    spans = SPANS["left and right padding, and none"]
    found = interpreted(sum_with_lse, kind, spans, heads, None)
    assert_same(found, specified(spans, S, dict(kind=kind, heads=2), heads))


@pytest.mark.parametrize("mistake", ["base 2", "read as if contiguous"])
def test_a_log_sum_exp_that_is_wrong_is_noticed(interpreted, mistake):
    spans = SPANS["left and right padding, and none"]
    found = interpreted(sum_with_lse, "causal", spans, None, mistake)
    with pytest.raises(AssertionError):
        assert_same(found, specified(spans, S, dict(heads=2)))


# -- tiles that need no work -------------------------------------------------------------------------------


def ahead_of(kernels, kind, spans):
    call, tile = some_call(kind), small_tile(kernels)
    samples = kernels._samples(spans, S, [0], tile, torch.device("cpu"))
    return kernels._scoring(call, samples, 2, tile)["ahead"]


@pytest.mark.parametrize(
    ("kind", "spans", "looks"),
    [
        ("additive mask", [(0, S)] * 3, 0),
        ("bool mask", [(0, S)] * 3, 0),
        ("prefix mask", [(0, S)] * 3, 1),
        ("prefix mask", [(6, S), (0, 0), (9, S)], 0),  # all of the prefix but its last token is padding
        ("bool mask of heads", [(0, 0), (0, 0), (0, 9)], 1),
    ],
)
def test_masks_that_are_causal_within_texts_are_known_as_such(interpreted, kind, spans, looks):
    assert interpreted(ahead_of, kind, spans).tolist() == [looks]


# -- what can be served, and by whom -----------------------------------------------------------------------


def served(kernels):
    plain, double = some_call(), torch.zeros(1, 1, S, S, dtype=torch.float64)
    wide = torch.zeros(3, 1, S, S + 1, dtype=torch.bool)
    calls = {
        "plain": plain,
        "float64": some_call(dtype=torch.float64),
        "head dim 256": some_call(dim=256),
        "head dim 257": some_call(dim=257),
        "two dtypes": dataclasses.replace(plain, key_bhkd=plain.key_bhkd.half()),
        "mask of float64": dataclasses.replace(plain, mask=double),
        "bias of float64": dataclasses.replace(plain, position_bias=double),
        "mask of more keys": dataclasses.replace(plain, mask=wide),
        "two devices": dataclasses.replace(plain, mask=torch.zeros(1, 1, S, S, device="meta")),
    }
    return [name for name, call in calls.items() if kernels.can_serve(call)]


def test_calls_that_the_kernel_cannot_compute_are_left_to_others(interpreted):
    assert interpreted(served) == ["plain", "head dim 256"]


def test_the_kernel_knows_all_that_a_call_may_say():
    # What is added to an AttentionCall must reach the kernel, or be refused by its can_serve.
    assert [field.name for field in dataclasses.fields(AttentionCall)] == [
        *("module", "query_bhqd", "key_bhkd", "mask", "scaling", "is_causal"),
        *("softcap", "sliding_window", "position_bias", "sinks"),
    ]


def raised_by(kernels, spans, size, heads):
    with pytest.raises(SiteError) as raised:
        kernels.pattern_sum(some_call(size=6, samples=2), spans, size, heads=heads)
    return str(raised.value)


@pytest.mark.parametrize(
    ("spans", "size", "heads"),
    [([(0, 6)], 6, None), ([(0, 6), (2, 7)], 8, None), ([(0, 6), (2, 4)], 5, None), ([(0, 6), (2, 4)], 6, [4])],
)
def test_spans_and_heads_that_do_not_fit_raise_as_they_do_elsewhere(interpreted, spans, size, heads):
    with pytest.raises(SiteError) as raised:
        blockwise.pattern_sum(some_call(size=6, samples=2), spans, size, heads=heads)
    assert interpreted(raised_by, spans, size, heads) == str(raised.value)


class Elsewhere:
    """Q as of a GPU, for what only asks where it is."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("given", "usable", "can_serve", "expected"),
    [
        ({}, True, True, "kernels"),
        (dict(heads=[1], queries=slice(None), keys=range(S)), True, True, "kernels"),
        ({}, False, True, "blockwise"),
        ({}, True, False, "blockwise"),
        (dict(queries=range(3)), True, True, "blockwise"),
        (dict(keys=slice(0, None, 2)), True, True, "blockwise"),
        (dict(align="end"), True, True, "blockwise"),
        (None, True, True, "blockwise"),
    ],
)
def test_the_kernel_is_taken_on_a_gpu_where_it_can_serve(monkeypatch, given, usable, can_serve, expected):
    asked = []

    def told(name):
        return lambda call, spans, size, **options: asked.append((name, options))

    stand_in = SimpleNamespace(
        usable=lambda device: usable, can_serve=lambda call: can_serve, pattern_sum=told("kernels")
    )
    monkeypatch.setattr(dispatch, "_kernels", lambda: None if given is None else stand_in)
    monkeypatch.setattr(blockwise, "pattern_sum", told("blockwise"))
    dispatch.pattern_sum(SimpleNamespace(query_bhqd=Elsewhere), [(0, S)], S, **(given or {}))
    ((name, options),) = asked
    assert name == expected and options.get("heads") == (given or {}).get("heads")


def test_on_a_cpu_plain_torch_sums_and_triton_is_not_even_imported():
    code = (
        "import sys, torch; from distcache.attention import AttentionCall, pattern_sum\n"
        "x = torch.zeros(1, 1, 4, 8)\n"
        "total = pattern_sum(AttentionCall(torch.nn.Identity(), x, x, None, 1.0, True), [(0, 4)], 4)\n"
        "assert total.sum().item() == 4.0 and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_triton_plain_torch_sums(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "distcache.attention.kernels", raising=False)
    assert dispatch._kernels.__wrapped__() is None


def is_usable_with(kernels, error):
    class Raising:
        def __getitem__(self, grid):
            raise error

    kernels._nothing = Raising()
    # What `usable` asks before it tries.
    torch.cuda.get_device_capability = lambda device: (9, 0)
    torch.cuda.device = lambda device: nullcontext()
    torch.zeros = lambda *args, device, zeros=torch.zeros: zeros(*args)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [kernels.usable(torch.device("cuda:0")) for _ in range(2)]
    return found, [str(w.message) for w in seen]


def test_where_triton_cannot_launch_a_warning_says_why_once():
    with RankPool() as pool:  # a process that is spoilt afterwards
        error = RuntimeError("Failed to find C compiler.")
        ((found, (message,)),) = pool.run(1, in_interpreter, is_usable_with, error, timeout_s=120)
    assert found == [False, False]
    assert "can't launch a kernel on cuda:0 (RuntimeError: Failed to find C compiler.)" in message


# -- compiled for GPUs that needn't be here ----------------------------------------------------------------

# By compute capability, what a multiprocessor lets one program have of its shared memory.
SHARED_BYTES = {80: 166_912, 86: 101_376, 90: 232_448}


def compiled(rank, world_size, capability, kind, call, cache):
    """By kernel: bytes of stack per thread, of shared memory per program, and how often tensor cores are called."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from distcache.attention import kernels

    class Absent:  # a driver's part that compiling asks for
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    driver.set_active(Absent())
    kernels._shared_bytes = lambda device: SHARED_BYTES[capability]
    found = {}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def compiling(name, run):
        def compile_only(*args, warmup, **kwargs):
            made = run(*args, warmup=True, **kwargs)
            binary = Path(cache) / f"{name}.cubin"
            binary.write_bytes(made.asm["cubin"])
            usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
            stack = int(usage.split("STACK:")[1].split()[0])
            products = sum(made.asm["ptx"].count(word) for word in ("wgmma.mma_async", "mma.sync"))
            found[name] = (stack, made.metadata.shared, products)

        return compile_only

    for name in ("_looks_ahead", "_row_lse", "_sum"):
        kernel = getattr(kernels, name)
        kernel.run = compiling(name, kernel.run)
    size = 256
    kernels.pattern_sum(some_call(kind, size=size, **call), [(0, size)] * 3, size)
    return found


@pytest.mark.parametrize(
    ("capability", "kind", "call"),
    [
        (90, "causal", dict(dtype=torch.bfloat16, dim=128)),
        (90, "bool mask", dict(dtype=torch.float16, dim=80)),
        (80, "all at once", dict(dtype=torch.float32, dim=80)),
        (86, "additive mask", dict(dtype=torch.bfloat16, dim=128)),
    ],
)
def test_kernels_compile_for_gpus_and_fit_them(tmp_path, capability, kind, call):
    with RankPool() as pool:  # a process of its own, for Triton remembers what it compiles for
        (found,) = pool.run(1, compiled, capability, kind, call, str(tmp_path), timeout_s=120)
    assert found.keys() - {"_looks_ahead"} == {"_row_lse", "_sum"}
    for name, (stack_bytes, shared_bytes, products) in found.items():
        # Registers that overflow go to the stack; some may. A tile that doesn't fit takes thousands.
        assert stack_bytes <= 256, name
        assert shared_bytes <= SHARED_BYTES[capability], name
        if name != "_looks_ahead":
            assert (products > 0) == (call["dtype"] != torch.float32), name  # float32 is never rounded to TF32


# -- on a GPU ----------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", kinds(S))
def test_sums_on_a_gpu_are_what_the_specification_says(kind, dtype):
    from distcache.attention import kernels

    call = dict(kind=kind, dtype=dtype, size=300, dim=64)
    for spans in ([(0, 300)] * 3, [(75, 300), (0, 300), (0, 298)], [(5, 5), (0, 1), (3, 200)]):
        assert kernels.can_serve(some_call(**call))
        found = kernels.pattern_sum(some_call(**call, device="cuda"), spans, 301)
        assert_same(found.cpu(), specified(spans, 301, call), **ON_GPU)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [8, 80, 128, 192, 256])
def test_head_dims_on_a_gpu(dim, dtype):
    from distcache.attention import kernels

    call, spans = dict(dtype=dtype, size=300, dim=dim, heads=4, key_heads=2), [(75, 300), (0, 300), (0, 131)]
    found = kernels.pattern_sum(some_call(**call, device="cuda"), spans, 300, heads=[3, 0])
    assert_same(found.cpu(), specified(spans, 300, call, [3, 0]), **ON_GPU)


@needs_gpu
def test_a_long_batch_on_a_gpu_gives_the_same_bits_twice_and_what_plain_torch_gives():
    call = some_call(dtype=torch.bfloat16, size=2048, heads=8, key_heads=2, dim=128, device="cuda")
    spans = [(0, 2048), (100, 2048), (0, 77)]
    found = dispatch.pattern_sum(call, spans, 2048)
    assert dispatch._kernels().usable(call.query_bhqd.device)
    assert torch.equal(found, dispatch.pattern_sum(call, spans, 2048))
    assert_same(found, blockwise.pattern_sum(call, spans, 2048), **ON_GPU)


@needs_gpu
def test_nobody_waits_for_the_gpu():
    from distcache.attention import kernels

    call = some_call("bool mask", torch.bfloat16, size=300, dim=64, device="cuda")
    expected = kernels.pattern_sum(call, [(0, 300)] * 3, 300)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernels.pattern_sum(call, [(0, 300)] * 3, 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@needs_gpu
def test_a_log_sum_exp_of_torchs_own_attention_is_one_that_is_known():
    from distcache.attention import kernels

    call = some_call(dtype=torch.bfloat16, size=300, dim=64, key_heads=2, device="cuda")
    q, k = call.query_bhqd, call.key_bhkd
    _, lse_bhq, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, 0.0, True, scale=call.scaling)
    found = kernels.pattern_sum(call, [(0, 300)] * 3, 300, lse_bhq=lse_bhq)
    assert_same(found, kernels.pattern_sum(call, [(0, 300)] * 3, 300), **ON_GPU)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the second isn't the current one")
def test_kernels_run_on_the_device_of_their_tensors():
    call, spans = dict(dtype=torch.bfloat16, size=300, dim=64), [(0, 300)] * 3
    found = dispatch.pattern_sum(some_call(**call, device="cuda:1"), spans, 300)
    assert found.device == torch.device("cuda:1")
    assert_same(found.cpu(), specified(spans, 300, call), **ON_GPU)
