"""What sites mean is settled, or refused with a reason, before the model runs."""

from __future__ import annotations

import pytest
import torch
from tiny import build, num_hooks
from torch import nn

import distcache as dc
from distcache.sites import resolve_sites

pytest.importorskip("transformers")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Three blocks and a head; it counts how often it ran."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head, self.runs = nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 2), 0

    def forward(self, x):
        self.runs += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def keys(model, sites):
    targets, attention = resolve_sites(model, sites)
    return [key for target in (*targets, *attention) for key in target.all_keys()]


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("head", ["head"]),
        (["head", "blocks.1"], ["head", "blocks.1"]),
        ({"out": "head"}, ["out"]),
        ({"out": ""}, ["out"]),
        ({"resid_{layer}": "blocks.{layer}"}, ["resid_0", "resid_1", "resid_2"]),
        ({"resid_{layer:02d}": "blocks.{layer}"}, ["resid_00", "resid_01", "resid_02"]),
        ("blocks.{layer}.mlp", ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        ({"in_{path}": "blocks.{layer}.mlp"}, ["in_blocks.0.mlp", "in_blocks.1.mlp", "in_blocks.2.mlp"]),
        ({"resid_{layer}": dc.Site("blocks.{layer}", layers=[2, 0])}, ["resid_0", "resid_2"]),
        (dc.Site("head", reduce={"mean": "mean", "": dc.Max()}), ["head_mean", "head"]),
        (dc.Site("head", reduce="mean", key="logits"), ["logits"]),
    ],
)  # fmt: skip
def test_paths_and_templates_name_keys(sites, expected):
    assert keys(Stack(), sites) == expected


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["embed", "final_norm_out"], ["embed", "final_norm_out"]),
        (dc.Site("resid_mid", layers=[1]), ["resid_mid_1"]),
        ({"r{layer}": "resid_out"}, ["r0", "r1"]),
        (dc.Site("head_keys", layers=[0]), ["head_keys_L0H0", "head_keys_L0H1"]),
        (
            dc.Site("head_keys", layers=[1], reduce={"mean": "mean", "max": "max"}),
            [f"head_keys_L1H{head}_{suffix}" for suffix in ("mean", "max") for head in range(2)],
        ),
        (dc.Site("avg_attn_pattern", layers=[0]), [f"avg_attn_pattern_L0H{head}" for head in range(4)]),
        (dc.Site("pattern", layers=[0], key="p.{layer}.{head}"), [f"p.0.{head}" for head in range(4)]),
        ({"out_{layer}": "model.layers.{layer}"}, ["out_0", "out_1"]),
        ("lm_head", ["lm_head"]),  # a module's own name, not a named site
    ],
)
def test_named_sites_name_keys(sites, expected):
    assert keys(build("llama"), sites) == expected


def test_wrappers_leave_no_trace_in_paths_and_keys():
    model = Stack()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert keys(torch.compile(model, backend="eager"), {"r_{layer}": "blocks.{layer}"}) == ["r_0", "r_1", "r_2"]


STACK_ERRORS = {
    "no module": ("heads.1", r"site 'heads.1': no module of the model matches 'heads.1'. It has .*blocks.{layer}.mlp"),
    "no layers": ({"r_{layer}": "layers.{layer}"}, r"no module of the model matches 'layers.{layer}'"),
    "unknown name": ("heads", r"site 'heads' is no module of Stack, whose structure is none of the families"),
    "key lacks it": ({"r": "blocks.{layer}"}, r"site 'r': 'blocks.{layer}': the key template lacks {layer}"),
    "path lacks it": ({"r_{layer}": "blocks.1"}, r"site 'r_{layer}': 'blocks.1': the path lacks {layer}"),
    "another placeholder": ({"r_{n}": "blocks.{n}"}, r"site 'blocks.{n}': unknown placeholder \['n'\]"),
    "no placeholder": ({"r_{}": "blocks.{}"}, r"unknown placeholder \[''\]"),
    "half a placeholder": ({"r_{layer": "blocks.{layer}"}, r"'blocks.{layer}': cannot read the template 'r_{layer'"),
    "one key twice": (["head", dc.Site("blocks.0", key="head")], r"two sites give the key 'head': 'head' and"),
    "one site twice": (["head", "head"], r"two sites give the key 'head'"),
    "suffixes that meet": (
        [dc.Site("head", reduce={"a_b": "mean"}), dc.Site("head", key="head_a", reduce={"b": "max"})],
        r"two sites give the key 'head_a_b'",
    ),
    "nothing": ([], r"no sites were given: name at least one"),
    "an empty dict": ({}, r"no sites were given"),
    "no site": ([3], r"a site is a name, a path or a Site, got int"),
    "no such layer": (dc.Site("blocks.{layer}", layers=[2, 3]), r"no layers \[3\]; the model has 0..2"),
    "no layer at all": (dc.Site("blocks.{layer}", layers=[]), r"no layers \[\]; the model has 0..2"),
    "layers where there are none": (dc.Site("head", layers=[0]), r"site 'head' has no layers: leave out layers=\[0\]"),
}  # fmt: skip
LLAMA_ERRORS = {
    "template without layer": ({"r": "resid_out"}, r"site 'resid_out': the key template 'r' must have {layer}\."),
    "template without head": ({"h_{layer}": "head_values"}, r"template 'h_{layer}' must have {layer} and {head}\."),
    "template with too much": (
        {"e_{layer}": "embed"},
        r"site 'embed': the key template 'e_{layer}' must have no place",
    ),
    "pattern without head": ({"p_{layer}": "pattern"}, r"template 'p_{layer}' must have {layer} and {head}\."),
    "layers where there are none": (dc.Site("embed", layers=[0]), r"site 'embed' has no layers"),
    "no such layer": (dc.Site("avg_attn_pattern", layers=[7]), r"no layers \[7\]; the model has 0..1"),
    "another average": (dc.Site("avg_attn_pattern", reduce="mean"), r"site 'avg_attn_pattern' brings its own state"),
    "averages by suffix": (dc.Site("avg_attn_pattern", reduce={"a": dc.AveragePattern()}), r"brings its own state"),
    "reduced patterns": (dc.Site("pattern", reduce="mean"), r"site 'pattern' keeps each sample's pattern"),
    "tokens of a pattern": (
        dc.Site("pattern", tokens="last"),
        r"site 'pattern' is of whole patterns: only reduce, lay",
    ),
}


@pytest.mark.parametrize(
    ("make", "sites", "message"),
    [pytest.param(Stack, *case, id=name) for name, case in STACK_ERRORS.items()]
    + [pytest.param(lambda: build("llama"), *case, id=f"llama, {name}") for name, case in LLAMA_ERRORS.items()],
)
def test_what_cannot_be_is_refused_before_the_model_runs(make, sites, message):
    model = make()
    with pytest.raises(dc.SiteError, match=message), dc.record(model, sites):
        pytest.fail("the block began")
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"io": "inputs"}, r"site 'head': io is 'input' or 'output', got 'inputs'"),
        (
            {"tokens": "first"},
            r"site 'head': tokens is 'all', 'last', 'mean', a slice, a number or a list, got 'first'",
        ),
        ({"layers": 2}, r"site 'head': layers is a list of numbers or None, got 2"),
        ({"layers": "01"}, r"site 'head': layers is a list of numbers or None, got '01'"),
        ({"dtype": "float16"}, r"site 'head': dtype is one of torch's, got 'float16'"),
        ({"device": "gpu"}, r"site 'head': device is 'cpu', 'cuda', …, got 'gpu'"),
        ({"type": "Linear"}, r"a site's type is a class of modules, or a tuple of them, got 'Linear'"),
        ({"type": [nn.Linear]}, r"a site's type is a class of modules, or a tuple of them, got \["),
        ({"type": ()}, r"a site's type is a class of modules, or a tuple of them, got \(\)"),
        ({"reduce": "men"}, r"site 'head': unknown strategy 'men': expected one of .*mean"),
        ({"reduce": 3}, r"site 'head': expected a strategy"),
        ({"reduce": {"m": "mean", "x": "max_"}}, r"site 'head': unknown strategy 'max_'"),
        ({"reduce": {}}, r"site 'head': reduce is an empty dict"),
        (
            {"reduce": dc.Mean(dim=1)},
            r"site 'head': rows lie along dim 0, Mean\(dim=1.* would reduce another: leave out",
        ),
    ],
)
def test_a_site_that_means_nothing_is_refused_when_it_is_made(given, message):
    with pytest.raises(dc.SiteError, match=message):
        dc.Site("head", **given)
