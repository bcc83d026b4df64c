"""Whatever wraps a model: sites keep their names, every sample is seen once, and nothing is left out without a word.

The oracle is a hook set by hand on the plain model, without any wrapper, in eager torch.
"""

from __future__ import annotations

import collections
import contextlib
import functools

import accelerate
import pytest
import torch
import transformers
from tiny import build, num_hooks, padded, texts
from torch import nn
from torch._dynamo import eval_frame
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_WRAPPED_MODULE,
    CheckpointImpl,
    CheckpointWrapper,
    OffloadWrapper,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import set_checkpoint_early_stop

import distcache as dc
from distcache import families, hooks

TEXTS = texts()
INPUTS = padded(TEXTS)
MASK = INPUTS["attention_mask"].bool()
NUM_TOKENS = sum(map(len, TEXTS))

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
X_MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


class Block(nn.Module):
    """Calls its part by keywords, in an order that isn't its signature's; the part overwrites what it is shown."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.relu, self.down = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)

        def forward(self, x, scale=None):
            return self.down(self.relu(self.up(x))) * scale

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        return x + self.part(scale=torch.full_like(x, 2.0), x=x)


class Stack(nn.Module):
    """Two blocks on floats [B, S, D] and a head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack():
    torch.manual_seed(0)
    return Stack()


def by_hand(model, call, **sites):
    """What hooks by hand see of one call: `name=path`, or `name=(path, "input")`, whole: [B, S, …] each."""
    found, handles = {}, []

    def keep(name, x):
        assert name not in found, f"{name} was seen twice"
        found[name] = (x[0] if isinstance(x, tuple) else x).detach().clone()

    for name, site in sites.items():
        path, side = (site, "output") if isinstance(site, str) else site
        module = model.get_submodule(path)
        if side == "output":
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, out)))
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: keep(name, args or kwargs["x"]), with_kwargs=True
                )
            )
    call()
    for handle in handles:
        handle.remove()
    return found


# -- every wrapper ---------------------------------------------------------------------------------------------


def compiled_blocks(model, blocks):
    for n, block in enumerate(blocks):
        blocks[n] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model, blocks):
    for block in blocks:
        block.compile(backend="eager")
    return model


def checkpointed_blocks(model, blocks):
    for n, block in enumerate(blocks):
        blocks[n] = checkpoint_wrapper(block)
    return model


def several_at_once(model, blocks):
    checkpointed_blocks(model, blocks)
    compiled_blocks(model, blocks)
    return DataParallel(torch.compile(AveragedModel(model), backend="eager"))


WRAPPERS = {
    "none": lambda model, blocks: model,
    "torch.compile": lambda model, blocks: torch.compile(model, backend="eager"),
    "compile of blocks": compiled_in_place,
    "torch.compile of blocks": compiled_blocks,
    "checkpoint_wrapper": lambda model, blocks: checkpoint_wrapper(model),
    "checkpoint_wrapper of blocks": checkpointed_blocks,
    "DataParallel": lambda model, blocks: DataParallel(model),
    "AveragedModel": lambda model, blocks: AveragedModel(model),
    "several at once": several_at_once,
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@each_wrapper
@pytest.mark.parametrize("how", ["by position", "by keyword"])
def test_a_wrapped_model_shows_what_the_plain_one_does(wrap, how):
    model = stack()
    seen = by_hand(
        model, lambda: model(X), out="", x="blocks.1", up="blocks.0.part.up", given=("blocks.1.part", "input")
    )
    sites = {
        "out": "",
        "x_{layer}": "blocks.{layer}",
        "up": "blocks.0.part.up",  # overwritten by the ReLU
        "given": dc.Site("blocks.1.part", io="input", reduce={"rows": "cat", "sum": "sum"}),
        "in_{path}": dc.Site("head", io="input"),
    }
    wrapped = wrap(model, model.blocks)
    with dc.record(wrapped, sites) as rec, torch.no_grad():
        y = wrapped(X, X_MASK) if how == "by position" else wrapped(attention_mask=X_MASK, x=X)
    assert list(rec) == ["out", "x_0", "x_1", "up", "given_rows", "given_sum", "in_head"]
    valid = X_MASK.bool()
    for key, name in (("out", "out"), ("x_1", "x"), ("up", "up"), ("given_rows", "given"), ("in_head", "x")):
        assert torch.equal(rec[key], seen[name][valid])
    torch.testing.assert_close(rec["given_sum"], seen["given"][valid].sum(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(y, seen["out"]) and num_hooks(wrapped) == 0
    assert not torch.equal(rec["x_0"], seen["x"][valid])  # another block is told apart


PREFIXES = {"module", "_orig_mod", "_checkpoint_wrapped_module"}  # Stack has no part that is called so


@each_wrapper
def test_paths_may_have_the_parts_that_wrappers_put_in_and_keys_never_do(wrap):
    wrapped = wrap(model := stack(), model.blocks)
    paths = {path: module for path, module in wrapped.named_modules() if not isinstance(module, nn.ModuleList)}
    found = set()
    for path in paths:
        bare = ".".join(part for part in path.split(".") if part not in PREFIXES)
        with dc.record(wrapped, [path]) as rec, torch.no_grad():
            seen = by_hand(wrapped, lambda: wrapped(X), it=path)
        assert list(rec) == [bare] and torch.equal(rec[bare], seen["it"].flatten(0, 1))
        found.add(bare)
    assert found == {name for name, module in stack().named_modules() if not isinstance(module, nn.ModuleList)}


@each_wrapper
def test_templates_may_have_the_parts_that_wrappers_put_in(wrap):
    wrapped = wrap(model := stack(), model.blocks)
    path = next(path for path, module in wrapped.named_modules() if type(module) is Block and "1" in path)
    for sites in ({"x_{layer}": path.replace("1", "{layer}")}, {"x_{layer}": "blocks.{layer}"}):
        with dc.record(wrapped, sites) as rec, torch.no_grad():
            wrapped(X)
        assert list(rec) == ["x_0", "x_1"]


@each_wrapper
def test_every_linear_has_its_own_name_in_whatever_it_is_wrapped(wrap):
    expected = [name for name, module in stack().named_modules() if isinstance(module, nn.Linear)]
    wrapped = wrap(model := stack(), model.blocks)
    with dc.record(wrapped, dc.Site(type=nn.Linear, io="input", reduce="max", key="in_{path}")) as rec, torch.no_grad():
        wrapped(X)
    assert list(rec) == [f"in_{name}" for name in expected]
    assert torch.equal(rec["in_blocks.0.part.up"], X.flatten(0, 1).amax(0))


@each_wrapper
def test_a_wrapped_model_ends_its_pass_after_the_last_site(wrap):
    model, runs = stack(), []
    seen = by_hand(model, lambda: model(X), x="blocks.0.part")
    model.head.register_forward_pre_hook(lambda *args: runs.append(1))
    wrapped = wrap(model, model.blocks)
    with torch.no_grad(), dc.record(wrapped, {"x": "blocks.0.part"}, stop=True) as rec:
        assert wrapped(X) is None
    assert not runs and torch.equal(rec["x"], seen["x"].flatten(0, 1))
    with torch.no_grad(), dc.record(wrapped, {"x": "blocks.0.part"}) as rec:
        assert wrapped(X) is not None
    assert len(runs) == 1 or isinstance(wrapped, AveragedModel)  # which holds a copy


class Own(nn.Module):
    """Parts whose names are those of wrappers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module, self.base_model, self._orig_mod = nn.Linear(4, 4), nn.Module(), nn.Linear(4, 4)
        self.base_model.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self._checkpoint_wrapped_module = nn.ModuleList([nn.Linear(4, 4)])
        self.model = self.base_model.model[0]

    def forward(self, x, attention_mask=None):
        x = self._orig_mod(self.module(x))
        return self._checkpoint_wrapped_module[0](self.base_model.model(x))


OWN = ["module", "base_model.model", "base_model.model.1", "_orig_mod", "_checkpoint_wrapped_module.0"]


@pytest.mark.parametrize("name", ["none", "torch.compile", "checkpoint_wrapper", "DataParallel", "AveragedModel"])
def test_a_models_own_parts_keep_their_names_whatever_they_are_called(name):
    model = Own()
    seen = by_hand(model, lambda: model(X), **{path: path for path in OWN})
    wrapped = WRAPPERS[name](model, None)
    with dc.record(wrapped, OWN) as rec, torch.no_grad():
        wrapped(X)
    assert list(rec) == OWN
    assert all(torch.equal(rec[path], seen[path].flatten(0, 1)) for path in OWN)
    if name in ("DataParallel", "AveragedModel"):  # `module` is the model's own part, `module.module` spells it out
        with dc.record(wrapped, {"a": "module", "b": "module.module", "c": "module._orig_mod"}) as rec, torch.no_grad():
            wrapped(X)
        assert torch.equal(rec["a"], rec["b"]) and torch.equal(rec["c"], seen["_orig_mod"].flatten(0, 1))


def test_names_alone_would_take_a_models_own_parts_for_wrappers(monkeypatch):
    monkeypatch.setattr(families, "_wraps", lambda cls: ("module", True))
    with dc.record(Own(), ["module"]) as rec, torch.no_grad():
        rec._recorder.model(X)
    assert list(rec) != ["module"]


def test_wrappers_are_known_by_the_names_that_torch_and_peft_give_their_classes():
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    kinds = [DataParallel, DistributedDataParallel, FullyShardedDataParallel, CheckpointWrapper, OffloadWrapper]
    kinds += [AveragedModel, type(torch.compile(nn.Tanh())), PeftMixedModel, PeftModel, BaseTuner]
    for kind in kinds:
        assert families._wraps(kind) != families._wraps(nn.Linear), kind
    assert families._wraps(FullyShardedDataParallel)[0] == FSDP_WRAPPED_MODULE
    assert families._wraps(CheckpointWrapper)[0] == _CHECKPOINT_WRAPPED_MODULE


def test_the_wrapper_itself_is_the_model():
    wrapped = DataParallel(torch.compile(stack(), backend="eager"))
    with (
        dc.record(wrapped, {"a": "module", "b": "module._orig_mod", "c": "_orig_mod", "d": ""}) as rec,
        torch.no_grad(),
    ):
        y = wrapped(X)
    assert all(torch.equal(rec[key], y.flatten(0, 1)) for key in "abcd")


@pytest.mark.parametrize("path", ["module.blocks.0", "blocks.0._orig_mod", "_orig_mod"])
def test_parts_of_wrappers_that_are_not_there_are_refused(path):
    with pytest.raises(dc.SiteError), dc.record(stack(), {"x": path}):
        pytest.fail("the block began")


# -- transformers in wrappers ----------------------------------------------------------------------------------

SITES = [
    "resid_out",
    dc.Site("head_keys", layers=[1]),
    dc.Site("model.layers.{layer}.mlp", key="mlp_{layer}"),
    dc.Site("attn_z", layers=[0]),
    dc.Site("lm_head", tokens="last", key="logits"),
    dc.Site("mlp_out", reduce="sum"),
    "avg_attn_pattern",
]


def llama_by_hand(model, inputs=INPUTS, prefix=""):
    """Rows of SITES by hooks by hand; sums in float64."""
    paths = dict(
        resid_out_0="layers.0",
        resid_out_1="layers.1",
        keys="layers.1.self_attn.k_proj",
        mlp_0="layers.0.mlp",
        mlp_1="layers.1.mlp",
        attn_z_0=("layers.0.self_attn.o_proj", "input"),
        logits="lm_head",
    )
    full = {}
    for name, site in paths.items():
        path, side = site if isinstance(site, tuple) else (site, "output")
        full[name] = (prefix + (path if path == "lm_head" else f"model.{path}"), side)
    with torch.no_grad():
        seen = by_hand(model, lambda: model(**inputs), **full)
    mask = inputs["attention_mask"].bool()
    last = torch.stack([x[m][-1] for x, m in zip(seen.pop("logits"), mask, strict=True)])
    rows = {name: x[mask] for name, x in seen.items()} | {"logits": last}
    keys = rows.pop("keys")
    rows |= {f"head_keys_L1H{head}": keys[:, 8 * head : 8 * head + 8] for head in range(2)}
    return rows, {f"mlp_out_{n}": rows[f"mlp_{n}"].double().sum(0) for n in range(2)}


@functools.cache
def average_patterns(texts_=tuple(TEXTS)):
    """[layers, heads, S, S] of eager attention, each text alone, queries divided by the texts that have them."""
    model = build("llama", attn_implementation="eager")
    total, count = torch.zeros(2, 4, 6, 6, dtype=torch.float64), torch.zeros(6, 1)
    for text in texts_:
        with torch.no_grad():
            attentions = model(input_ids=text[None], output_attentions=True).attentions
        n = len(text)
        total[:, :, :n, :n] += torch.stack(attentions)[:, 0]
        count[:n] += 1
    return (total / count).float()


def assert_recorded(rec, rows, sums, count=NUM_TOKENS):
    """That a cache holds these rows to the bit and these sums to 1e-6 of the mean of |x|, each counted once."""
    assert set(rec) == {*rows, *sums, *(f"avg_attn_pattern_L{layer}H{head}" for layer in range(2) for head in range(4))}
    for key in rows:
        assert torch.equal(rec[key], rows[key]), key
    for key in sums:
        tolerance = 1e-6 * count * float(rows[key.replace("_out", "")].abs().mean())
        torch.testing.assert_close(rec[key].double(), sums[key], rtol=0, atol=tolerance)


def cpu_offload(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


DEVICE_MAP = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
DEVICE_MAP |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


def disk_offload(model, folder):
    return accelerate.dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder)


def transformers_checkpointing(model):
    # Renamed in transformers 5.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def loaded_by_a_device_map(model, folder):
    model.save_pretrained(folder)
    given = {"device_map": DEVICE_MAP, "offload_folder": f"{folder}/offload"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **given).eval()


LLAMA_WRAPPERS = {
    "torch.compile": lambda model, folder: torch.compile(model, backend="eager"),
    "torch.compile of layers": lambda model, folder: compiled_blocks(model, model.model.layers),
    "checkpoint_wrapper of layers": lambda model, folder: checkpointed_blocks(model, model.model.layers),
    "transformers' checkpointing": lambda model, folder: transformers_checkpointing(model),
    "DataParallel": lambda model, folder: DataParallel(model),
    "cpu_offload": lambda model, folder: cpu_offload(model),
    "dispatch_model": disk_offload,
    "device_map": loaded_by_a_device_map,
    "several at once": lambda model, folder: several_at_once(model, model.model.layers),
}


@pytest.mark.parametrize("wrap", LLAMA_WRAPPERS.values(), ids=LLAMA_WRAPPERS)
def test_named_sites_and_attention_of_a_wrapped_model_are_those_of_the_plain_one(wrap, tmp_path):
    plain = build("llama")
    rows, sums = llama_by_hand(plain)
    model = wrap(build("llama"), tmp_path)
    hooks = num_hooks(model)
    with torch.no_grad(), dc.record(model, SITES) as rec:
        logits = model(**INPUTS).logits
    assert_recorded(rec, rows, sums)
    for layer in range(2):
        torch.testing.assert_close(rec["avg_attn_pattern", layer], average_patterns()[layer], rtol=0, atol=2e-6)
    assert torch.equal(logits, plain(**INPUTS).logits) and num_hooks(model) == hooks


def test_the_oracles_of_wrapped_models_find_another_layer_and_padding_that_counts():
    rows, sums = llama_by_hand(build("llama"))
    with dc.record(build("llama"), SITES, mask=torch.ones_like(MASK)) as rec, torch.no_grad():
        rec._recorder.model(**INPUTS)
    with pytest.raises(AssertionError):
        assert_recorded(rec, rows, sums)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rec["avg_attn_pattern", 1], average_patterns()[1], rtol=0, atol=2e-6)
    with dc.record(model := build("llama"), SITES) as rec, torch.no_grad():
        model(**INPUTS)
    with pytest.raises(AssertionError, match="resid_out_0"):
        assert_recorded(rec, rows | {"resid_out_0": rows["resid_out_1"]}, sums)


def inside(model):
    """The block 1 that all wrappers of it are around."""
    return next(module for module in model.blocks[1].modules() if type(module) is Block)


# -- compilers -------------------------------------------------------------------------------------------------


class Graphs:
    """A compiler's backend that runs graphs eagerly, and counts those that it made and their runs."""

    def __init__(self):
        self.made = self.runs = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def function_around(model, backend):
    return model, torch.compile(lambda x: model(x), backend=backend)


def method_around(model, backend):
    class Trainer:
        def step(self, x):
            return model(x)

    trainer = Trainer()
    trainer.step = torch.compile(trainer.step, backend=backend)
    return model, trainer.step


def in_place(model, backend):
    model.compile(backend=backend)
    return model, model


def forward_alone(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model, model


def whole(model, backend):
    model = torch.compile(model, backend=backend)
    return model, model


def whole_inside(model, backend):
    return model, torch.compile(model, backend=backend)


def block_in_place(model, backend):
    model.blocks[1].compile(backend=backend)
    return model, model


def block_as_a_child(model, backend):
    model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    return model, model


def block_and_whole(model, backend):
    block_as_a_child(model, backend)
    return whole(model, backend)


COMPILED = [
    whole,
    whole_inside,
    in_place,
    forward_alone,
    block_in_place,
    block_as_a_child,
    block_and_whole,
    function_around,
    method_around,
]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compile_", COMPILED, ids=lambda function: function.__name__)
def test_a_model_with_graphs_in_its_cache_is_recorded_and_runs_them_again_afterwards(compile_, monkeypatch):
    model, graphs = stack(), Graphs()
    with torch.no_grad():
        seen = by_hand(model, lambda: model(X), x="blocks.1.part.up")
        root, call = compile_(model, graphs)
        y = call(X)
        made, runs = graphs.made, graphs.runs
        assert runs > 0
        # The hazard itself: hooks that come later are left out.
        late = []
        handle = inside(model).part.up.register_forward_hook(lambda *args: late.append(1))
        call(X)
        handle.remove()
        assert not late and graphs.runs == 2 * runs
        with dc.record(root, {"x": "blocks.1.part.up"}) as rec:
            during = call(X)
            assert graphs.runs == 2 * runs
        assert torch.equal(rec["x"], seen["x"].flatten(0, 1)) and torch.equal(during, y)
        assert torch.equal(call(X), y)
        assert graphs.made == made and graphs.runs == 3 * runs
        # And what record does about it is what makes the difference.
        monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: contextlib.nullcontext())
        with contextlib.suppress(dc.SiteError), dc.record(root, {"x": "blocks.1.part.up"}) as rec:
            call(X)
        assert len(rec) == 0


@pytest.mark.slow  # builds C++
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_that_inductor_compiled_is_recorded_in_eager_arithmetic():
    model = stack()
    seen = by_hand(model, lambda: model(X), x="blocks.1")
    compiled = torch.compile(model)
    with torch.no_grad():
        y = compiled(X)
        with dc.record(compiled, {"x": "blocks.1"}) as rec:
            during = compiled(X)
        assert torch.equal(compiled(X), y)
    assert torch.equal(rec["x"], seen["x"].flatten(0, 1)) and torch.equal(during, model(X))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("impl", CheckpointImpl, ids=lambda impl: impl.name)
def test_a_compiled_model_with_checkpointed_blocks_counts_once(impl):
    model = stack()
    seen = by_hand(model, lambda: model(X), x="blocks.1.part")
    model.blocks[1] = checkpoint_wrapper(model.blocks[1], checkpoint_impl=impl)
    compiled = torch.compile(model, backend="eager")
    compiled(X.clone().requires_grad_()).sum().backward()
    with dc.record(compiled, {"x": dc.Site("blocks.1.part", reduce={"": "cat", "sum": "sum"})}) as rec:
        compiled(X.clone().requires_grad_()).sum().backward()
    assert torch.equal(rec["x"], seen["x"].flatten(0, 1)) and int(rec.count("x_sum")) == X[..., 0].numel()


# -- activation checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", CheckpointImpl, ids=lambda impl: impl.name)
@pytest.mark.parametrize("around", ["the model", "blocks"])
def test_what_checkpoint_wrapper_runs_again_counts_once(around, impl, monkeypatch):
    plain, model, runs = stack(), stack(), []
    seen = by_hand(plain, lambda: plain(X, X_MASK).sum().backward(), x="blocks.1.part", up="blocks.0.part.up")
    model.blocks[1].part.register_forward_pre_hook(lambda *args: runs.append(1))
    if around == "blocks":
        checkpointed_blocks(model, model.blocks)
    wrapped = checkpoint_wrapper(model, checkpoint_impl=impl) if around == "the model" else model
    sites = {
        "x": dc.Site("blocks.1.part", reduce={"rows": "cat", "sum": "sum"}),
        "up": dc.Site("blocks.0.part.up", reduce={"rows": "cat", "moments": "moments"}),
    }
    valid = X_MASK.bool()
    with dc.record(wrapped, sites) as rec:
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(X.clone().requires_grad_(), X_MASK).sum().backward()
    assert len(runs) == 4  # forward, and again in backward
    for name in ("x", "up"):
        assert torch.equal(rec[f"{name}_rows"], torch.cat([seen[name][valid]] * 2))
    assert int(rec.count("x_sum")) == int(rec["up_moments"]["count"]) == 2 * int(X_MASK.sum())
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    # Whoever doesn't tell recomputation from a forward pass sees what belongs to no pass, or a pass too many.
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    with contextlib.suppress(dc.SiteError), set_checkpoint_early_stop(False), dc.record(wrapped, sites) as rec:
        wrapped(X.clone().requires_grad_(), X_MASK).sum().backward()
        assert int(rec.count("x_sum")) > int(X_MASK.sum())


# -- PEFT ------------------------------------------------------------------------------------------------------


def with_lora(model, **options):
    """A model with LoRA adapters that do something: as they are initialised they add zeros."""
    import peft  # takes as long as torch, in each of the ranks too

    torch.manual_seed(0)
    given = {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], "init_lora_weights": False, "r": 4}
    return peft.get_peft_model(model, peft.LoraConfig(**{**given, **options})).eval()


def merged(model):
    model.merge_adapter()
    return model


LORAS = {
    "no task": lambda: with_lora(build("llama")),
    "causal LM": lambda: with_lora(build("llama"), task_type="CAUSAL_LM"),
    "merged": lambda: merged(with_lora(build("llama"), task_type="CAUSAL_LM")),
    "a saved head": lambda: with_lora(build("llama"), task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("make", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("outside", ["none", "torch.compile", "DataParallel"])
def test_lora_adapters_are_part_of_the_modules_that_they_adapt(make, outside):
    model = make()
    rows, sums = llama_by_hand(model, prefix="base_model.model.")
    wrapped = WRAPPERS[outside](model, None)
    with dc.record(wrapped, SITES) as rec, torch.no_grad():
        wrapped(**INPUTS)
    assert_recorded(rec, rows, sums)
    plain, _ = llama_by_hand(build("llama"))
    assert not torch.equal(rec["resid_out_0"], plain["resid_out_0"])  # the adapters are told apart from none
    assert not torch.equal(rec["head_keys_L1H0"], plain["head_keys_L1H0"])


def test_a_model_out_of_which_adapters_were_taken_is_the_plain_one():
    rows, sums = llama_by_hand(build("llama"))
    model = with_lora(build("llama"), task_type="CAUSAL_LM")
    with dc.record(model, SITES) as rec, torch.no_grad(), model.disable_adapter():
        model(**INPUTS)
    assert_recorded(rec, rows, sums)
    with dc.record(model := model.unload(), SITES) as rec, torch.no_grad():
        model(**INPUTS)
    assert_recorded(rec, rows, sums)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_the_root_and_the_parts_of_an_adapter_have_paths_too(task):
    model = with_lora(build("llama"), task_type=task)
    with torch.no_grad():
        seen = by_hand(
            model, lambda: model(**INPUTS), base="base_model.model.model.layers.0.self_attn.q_proj.base_layer"
        )
        logits = model(**INPUTS).logits
    sites = {
        "root": "",
        "spelled": "base_model.model",
        "norm": "base_model.model.model.norm",
        "base": "model.layers.0.self_attn.q_proj.base_layer",
        "whole": "model.layers.0.self_attn.q_proj",
    }
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**INPUTS)
    assert torch.equal(rec["root"], logits[MASK]) and torch.equal(rec["spelled"], rec["root"])
    assert torch.equal(rec["base"], seen["base"][MASK]) and not torch.equal(rec["base"], rec["whole"])


def test_adapters_inside_another_model_are_seen_from_it():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = with_lora(build("llama", head=False))

        def forward(self, input_ids, attention_mask=None):
            return self.language_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    model = Around()
    with torch.no_grad():
        expected = model(INPUTS["input_ids"], INPUTS["attention_mask"])[MASK]
    with dc.record(model, {"x": "language_model", "n": "final_norm_out"}) as rec, torch.no_grad():
        model(INPUTS["input_ids"], INPUTS["attention_mask"])
    assert torch.equal(rec["x"], expected) and torch.equal(rec["n"], expected)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_mask_by_position_reaches_through_adapters(task):
    model = with_lora(build("llama"), task_type=task)
    rows, _ = llama_by_hand(model, prefix="base_model.model.")
    with dc.record(model, ["resid_out"]) as rec, torch.no_grad():
        model(INPUTS["input_ids"], INPUTS["attention_mask"])
    torch.testing.assert_close(rec["resid_out_1"], rows["resid_out_1"], rtol=1e-5, atol=1e-5)  # other position_ids


def test_fused_projections_with_adapters_have_their_queries():
    model = with_lora(build("gpt2"), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    path = "base_model.model.transformer.h.1.attn.c_attn"
    with torch.no_grad():
        seen = by_hand(model, lambda: model(**INPUTS), fused=path, base=f"{path}.base_layer")
        with dc.record(model, ["queries", "keys"]) as rec:
            model(**INPUTS)
    assert torch.equal(rec["queries_1"], seen["fused"][MASK][:, :32])
    assert torch.equal(rec["keys_1"], seen["fused"][MASK][:, 32:64])
    assert not torch.equal(rec["queries_1"], seen["base"][MASK][:, :32])


# -- each part of a wrapped model keeps its own mask, and each new token its place -----------------------------

AROUND = {
    "torch.compile": lambda model, task, targets: torch.compile(model, backend="eager"),
    "checkpoint_wrapper": lambda model, task, targets: checkpoint_wrapper(model),
    "DataParallel": lambda model, task, targets: DataParallel(model),
    "LoRA": lambda model, task, targets: with_lora(model, task_type=task, target_modules=targets),
    "LoRA without a task": lambda model, task, targets: with_lora(model, target_modules=targets),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_the_decoder_of_a_wrapped_encoder_decoder_keeps_its_own_mask(around):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = around(transformers.T5ForConditionalGeneration(config).eval(), "SEQ_2_SEQ_LM", ["q", "o"])
    other = padded(TEXTS[::-1])  # as long as the encoder's, so that its mask would fit
    inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    inputs |= {f"decoder_{name}": other[name] for name in ("input_ids", "attention_mask")}
    names = dict(model.named_modules())
    paths = {part: next(name for name in names if name.endswith(f"{part}.block.1")) for part in ("encoder", "decoder")}
    with dc.record(model, {"encoder": "encoder.block.1", "decoder": "decoder.block.1"}) as rec, torch.no_grad():
        seen = by_hand(model, lambda: model(**inputs), **paths)
    assert torch.equal(rec["encoder"], seen["encoder"][MASK])
    assert torch.equal(rec["decoder"], seen["decoder"][other["attention_mask"].bool()])
    assert len(rec["decoder"]) == NUM_TOKENS and not torch.equal(rec["decoder"], seen["decoder"][MASK])


@pytest.mark.parametrize("name", ["torch.compile", "LoRA", "LoRA without a task"])
def test_what_a_wrapped_model_generates_is_seen_step_by_step(name):
    model = AROUND[name](build("llama"), "CAUSAL_LM", ["q_proj"])
    ids = TEXTS[0][None]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    block = next(module for path, module in model.named_modules() if path.endswith("layers.1"))
    steps = []
    with dc.record(model, ["resid_out"]) as rec, torch.no_grad():
        handle = block.register_forward_hook(
            lambda m, args, out: steps.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        generated = model.generate(input_ids=ids, eos_token_id=None, **given)
        handle.remove()
    assert [x.shape[1] for x in steps] == [6, 1, 1, 1]
    assert torch.equal(rec["resid_out_1"], torch.cat(steps, dim=1)[0])
    assert rec.rows("resid_out_1")["token_id"].tolist() == generated[0, :-1].tolist()


# -- ranks -----------------------------------------------------------------------------------------------------


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


PARALLEL = {
    "DDP": DistributedDataParallel,
    "DDP of torch.compile": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "DDP of LoRA": lambda model: DistributedDataParallel(with_lora(model, task_type="CAUSAL_LM")),
    "fully_shard": sharded,
    "fully_shard of checkpointed layers": lambda model: sharded(checkpointed_blocks(model, model.model.layers)),
}


def batches(world_size):
    """(rank, samples) of a deal in which the ranks have as many batches, of different texts."""
    return [(n % world_size, range(2 * n, 2 * n + 2)) for n in range(2)]


def record_in_parallel(rank, world_size, name):
    torch.set_num_threads(1)
    model = PARALLEL[name](build("llama"))
    cache = dc.DistributedCache(timeout_s=20)
    with cache.deferred_mode(), dc.record(model, SITES, cache) as rec:
        for owner, samples in batches(world_size):
            if owner == rank:
                rec.next(index=samples)
                inputs = padded([TEXTS[n] for n in samples])
                model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {key: cache[key] for key in cache}, [name for name, _ in model.named_modules() if name.endswith("layers.1")]


@pytest.mark.parametrize("name", PARALLEL)
def test_ranks_that_train_a_wrapped_model_record_what_the_plain_one_shows(name, ranks):
    model, prefix = build("llama"), ""
    if "LoRA" in name:
        model, prefix = with_lora(model, task_type="CAUSAL_LM"), "base_model.model."
    parts = [llama_by_hand(model, padded([TEXTS[n] for n in samples]), prefix) for _, samples in batches(2)]
    rows = {key: torch.cat([part[key] for part, _ in parts]) for key in parts[0][0]}
    sums = {key: sum(part[key] for _, part in parts) for key in parts[0][1]}
    for found, names in ranks.run(2, record_in_parallel, name):
        assert_recorded(found, rows, sums)
        assert names and (names != ["model.layers.1"]) == (not name.startswith("fully_shard"))
        for layer in range(2):
            if "LoRA" not in name:
                for head in range(4):
                    pattern = found[f"avg_attn_pattern_L{layer}H{head}"]
                    torch.testing.assert_close(pattern, average_patterns()[layer, head], rtol=0, atol=2e-6)


# -- what leaves hooks out says so -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bake",
    [
        lambda model: torch.jit.trace(model, X),
        torch.jit.script,
        lambda model: torch.export.export(model, (X,)).module(),
        torch.fx.symbolic_trace,
    ],
    ids=["jit.trace", "jit.script", "export", "fx"],
)
def test_a_model_that_was_turned_into_a_graph_says_that_its_sites_are_gone(bake):
    model = bake(stack())
    hooks = num_hooks(model)
    gone = pytest.raises(
        (dc.SiteError, RuntimeError), match=r"1 of 1 sites reported nothing|supported on ScriptModules"
    )
    with gone, dc.record(model, {"x": "blocks.1"}):
        model(X)
    assert num_hooks(model) == hooks


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_block_that_a_compiled_function_calls_uncompiled_is_recorded():
    model, found = torch.compile(stack(), backend="eager"), []

    @torch.compiler.disable
    def watch(x):
        with dc.record(model, {"x": "blocks.1.part"}) as rec:
            model(x)
        found.append(rec["x"])

    def step(x):
        watch(x)
        return x + 1

    compiled = torch.compile(step, backend="eager")
    compiled(X)
    compiled(X)
    seen = by_hand(plain := stack(), lambda: plain(X), x="blocks.1.part")
    assert len(found) == 2 and all(torch.equal(x, seen["x"].flatten(0, 1)) for x in found)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("breaks", [True, False], ids=["after a graph break", "at once"])
def test_a_block_that_opens_inside_of_a_compiled_function_is_refused(breaks):
    model = torch.compile(stack(), backend="eager")
    model(X)

    def step(x):
        x = x + 1
        if breaks:
            torch._dynamo.graph_break()
        with dc.record(model, {"x": "blocks.1.part"}) as rec:
            model(x)
        return rec

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        with pytest.raises(dc.SiteError, match=r"opened inside of a function that torch\.compile"):
            compiled(X)
        assert num_hooks(model) == 0
    assert eval_frame._stance.stance == "default"
    seen = by_hand(plain := stack(), lambda: plain(X + 1), x="blocks.1.part")
    assert torch.equal(step(X)["x"], seen["x"].flatten(0, 1))  # where nothing compiles it, it records


@pytest.mark.usefixtures("_fresh_compiler")
def test_blocks_that_overlap_leave_the_compiler_as_the_first_found_it():
    graphs = Graphs()
    first, second = torch.compile(stack(), backend=graphs), torch.compile(stack(), backend=graphs)
    for model in (first, second):
        model(X)
    runs = graphs.runs
    with contextlib.ExitStack() as later:
        with dc.record(first, {"x": "blocks.0"}):
            rec = later.enter_context(dc.record(second, {"x": "blocks.0"}))
        second(X)  # the block that set the stance has ended, this one hasn't
        assert len(rec["x"]) == 15 and graphs.runs == runs
    second(X)
    assert graphs.runs > runs  # and the compiler works again


@pytest.mark.parametrize("offload", [cpu_offload, lambda model: model], ids=["cpu_offload", "none"])
def test_averages_of_a_model_whose_weights_are_elsewhere_are_refused_before_it_runs(offload, monkeypatch):
    model, runs = offload(build("llama")), []
    model.model.embed_tokens.register_forward_pre_hook(lambda *args: runs.append(1))
    monkeypatch.setattr(hooks, "available_bytes", lambda device: 0 if torch.device(device).type == "cpu" else 1 << 60)
    with dc.record(model, ["avg_attn_pattern"]) as rec, pytest.raises(dc.TooLarge, match="more on cpu"):
        model(**INPUTS)
    assert not runs and len(rec) == 0


# -- what was seen to go wrong with hooks ----------------------------------------------------------------------


def test_a_cache_that_was_filled_under_inference_mode_can_be_added_to_outside_of_it():
    model = stack()
    sites = {"rows": "blocks.0", "mean": dc.Site("blocks.1", reduce="mean"), "sum": "blocks.1.part"}
    with torch.no_grad():
        seen = by_hand(model, lambda: model(X), rows="blocks.0", mean="blocks.1", sum="blocks.1.part")
    for make in (dc.ActivationCache, dc.DistributedCache):
        with torch.inference_mode():
            total, cache = torch.zeros(3), make()
            cache.register_aggregation("sum", dc.Sum())
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            with mode(), cache.deferred_mode(), dc.record(model, sites, cache):
                model(X)
            with mode(), dc.record(model, {key: sites[key] for key in sites}) as rec:
                model(X)
            cache.cat(rec)
        assert torch.equal(cache["rows"], torch.cat([seen["rows"].flatten(0, 1)] * 8))
        assert int(cache.count("mean")) == 8 * 15 == int(cache.count("sum"))
        torch.testing.assert_close(cache["mean"], seen["mean"].flatten(0, 1).mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cache["sum"], 8 * seen["sum"].flatten(0, 1).sum(0), rtol=1e-6, atol=1e-5)
        assert not any(cache[key].is_inference() for key in cache)
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            total += 1  # the hazard: a tensor that was made there


def test_a_falcon_that_adds_attention_to_what_its_mlp_gave_does_not_reach_what_was_recorded():
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, parallel_attn=True
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        seen = by_hand(model, lambda: model(**INPUTS), mlp="transformer.h.1.mlp")
        careless = []
        handle = model.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: careless.append(out))
        model(**INPUTS)
        handle.remove()
        assert not torch.equal(careless[0], seen["mlp"])  # the hazard: what a hook was shown is overwritten
        site = dc.Site("transformer.h.1.mlp", key="mlp", reduce={"rows": "cat", "sum": "sum", "max": "max"})
        with dc.record(model, [site, dc.Site("transformer.h.1.mlp", key="plain")]) as rec:
            model(**INPUTS)
    rows = seen["mlp"][MASK]
    assert torch.equal(rec["mlp_rows"], rows) and torch.equal(rec["plain"], rows)
    assert torch.equal(rec["mlp_max"], rows.amax(0))
    torch.testing.assert_close(rec["mlp_sum"].double(), rows.double().sum(0), rtol=1e-6, atol=1e-6)


def test_patterns_come_from_sdpa_where_output_attentions_gives_nothing():
    model = build("llama", attn_implementation="sdpa")
    with dc.record(model, ["avg_attn_pattern"]) as rec, torch.no_grad():
        attentions = model(**INPUTS, output_attentions=True).attentions
    assert not attentions or all(pattern is None for pattern in attentions)  # the hazard
    for layer in range(2):
        torch.testing.assert_close(rec["avg_attn_pattern", layer], average_patterns()[layer], rtol=0, atol=2e-6)


class Shared(nn.Module):
    """One module under three names, which runs once; and a part that holds the whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.encoder = nn.Linear(4, 4), nn.Module()
        self.encoder.embed = self.shared
        self.layers = nn.ModuleList([nn.Tanh(), self.shared])
        self.encoder.whole = self

    def forward(self, x):
        return self.layers[0](self.encoder.embed(x))


def test_a_module_of_several_names_is_understood_by_each_and_keys_are_what_was_asked_for():
    model = Shared()
    expected = model.shared(X).detach().flatten(0, 1)
    with dc.record(model, ["shared", "encoder.embed", dc.Site("layers.{layer}", reduce="sum")]) as rec:
        model(X)
    assert list(rec) == ["shared", "encoder.embed", "layers.0", "layers.1"]
    assert torch.equal(rec["shared"], expected) and torch.equal(rec["encoder.embed"], expected)
    torch.testing.assert_close(rec["layers.1"], expected.sum(0))
    with dc.record(torch.compile(model, backend="eager"), {"x": "encoder.embed"}) as rec:
        rec._recorder.model(X)
    assert torch.equal(rec["x"], expected)


def test_modules_that_share_their_weights_are_sites_of_their_own():
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        seen = by_hand(model, lambda: model(**INPUTS), wte="transformer.wte", head="lm_head")
        with dc.record(model, {"wte": "transformer.wte", "head": "lm_head"}) as rec:
            model(**INPUTS)
    assert all(torch.equal(rec[key], seen[key][MASK]) for key in seen)


Pair = collections.namedtuple("Pair", ["loss", "hidden"])


def test_values_are_found_in_named_tuples():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x):
            return Pair(x.sum(), self.part(x))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = Named()

        def forward(self, x):
            return self.named(x).hidden

    model = Twice()
    with dc.record(model, {"named": "named", "part": "named.part", "root": ""}) as rec:
        y = model(X)
    assert isinstance(model.named(X), Pair)  # and the model's own value stays one
    assert all(torch.equal(rec[key], y.detach().flatten(0, 1)) for key in rec) and len(rec) == 3


class Routed(nn.Module):
    """Two experts, of which a pass runs one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.experts[int(x.sum() > 0)](x)


def test_an_expert_that_did_not_run_is_an_error_unless_it_is_optional_whatever_it_goes_into():
    model = Routed()
    high, low = X.abs(), -X.abs()
    seen = [by_hand(model, lambda x=x, n=n: model(x), it=f"experts.{n}")["it"] for n, x in enumerate((low, high))]
    silent = pytest.raises(dc.SiteError, match=r"1 of 2 sites reported nothing .*experts.0.*optional=True")
    with torch.no_grad(), dc.record(model, {"x_{layer}": "experts.{layer}"}, cache := dc.ActivationCache()), silent:
        model(high)
    assert len(cache) == 0  # nor did the one that ran count
    site = dc.Site("experts.{layer}", optional=True, reduce={"rows": "cat", "sum": "sum"})
    for cache in (dc.ActivationCache(), dc.DistributedCache()):
        with cache.deferred_mode(), dc.record(model, {"x_{layer}": site}, cache) as rec, torch.no_grad():
            for n, x in enumerate((high, high, low)):
                rec.next(index=range(3 * n, 3 * n + 3), label=torch.full((3,), n))
                model(x)
        assert cache.rows("x_1_rows")["sample"].unique().tolist() == list(range(6))
        assert cache.rows("x_0_rows")["label"].unique().tolist() == [2]
        assert torch.equal(cache["x_0_rows"], seen[0].flatten(0, 1))
        assert torch.equal(cache["x_1_rows"], torch.cat([seen[1].flatten(0, 1)] * 2))
        assert int(cache.count("x_0_sum")) == 15 and int(cache.count("x_1_sum")) == 30
