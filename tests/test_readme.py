"""What the README says is so: its names are those of the code, and its scripts run as they stand there."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import distcache as dc
from distcache.families import LAYOUTS

FOLDER = Path(__file__).parent.parent
README = (FOLDER / "README.md").read_text()
TITLES = [
    "steering vectors", "sparse autoencoders", "means by position", "whitening", "calibration", "top examples",
    "contrastive pairs", "two models", "during generation", "logit lens",
]  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------


def words(text):
    """A text without all but letters and digits: Gemma 2 is gemma2."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def section(title):
    return README.split(f"# {title}\n")[1].split("\n#")[0]


def first_column(text):
    """The names between backticks that the rows of a text's tables begin with."""
    return {name for row in re.findall(r"^\|(.*?)\|", text, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}


def test_every_named_site_and_every_family_stands_in_the_readme():
    sites = section("Sites")
    assert {name for layout in LAYOUTS for name in layout.points} <= first_column(sites)
    known = words(sites)
    for layout in LAYOUTS:
        name = layout.name.split(",")[0].removesuffix(" encoder").removesuffix(" decoder")
        assert words(name) in known, name


def test_every_argument_stands_in_the_readme():
    of_record = set(inspect.signature(dc.record).parameters) - {"model", "sites", "columns"}
    assert of_record <= first_column(section("Recording"))
    of_site = set(inspect.signature(dc.Site).parameters) - {"name_or_path"}
    assert of_site <= first_column(section("Sites"))


def test_every_strategy_stands_in_the_readme():
    kinds = {name for name in dc.__all__ if hasattr(getattr(dc, name), "combine")}
    assert len(kinds) > 10
    assert kinds <= first_column(section("Strategies"))


# -- scripts, on a real model --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_ten_scripts_run_as_they_stand_there_and_say_what_plain_torch_says():
    """One test, because two processes of tests would both load the model."""
    made = run_scripts()
    assert list(made) == TITLES
    names = made["logit lens"]
    assert len({len(ids) for ids in names["data"]}) > 1
    alone = [of_text(names["model"], ids) for ids in names["data"]]
    check_steering(made["steering vectors"], alone)
    check_calibration(made["calibration"], alone)
    check_logit_lens(made["logit lens"], alone)
    check_token_ids(made["sparse autoencoders"])
    check_generation(made["during generation"])


def run_scripts():
    """By title, the names that each script leaves."""
    sys.path.insert(0, str(FOLDER / "launch"))
    try:
        import scripts
    finally:
        sys.path.pop(0)
    return scripts.main([])


def of_text(model, ids):
    """Of one text, without padding: states [layers, tokens, hidden], logits [tokens, vocabulary], and what the last
    projection of layer 12's MLP is given [tokens, features]."""
    shown = {}
    handles = [
        block.register_forward_hook(lambda *given, layer=layer: shown.update({layer: given[2]}))
        for layer, block in enumerate(model.model.layers)
    ]
    down = model.model.layers[12].mlp.down_proj
    handles.append(down.register_forward_pre_hook(lambda *given: shown.update(act=given[1][0])))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    act = shown.pop("act")[0]
    return torch.cat([x[0] if isinstance(x, tuple) else x for x in shown.values()]), logits, act


def close(found, expected):
    """Padded and unpadded passes differ in last bits, of residual streams that reach thousands."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().mean()))


def check_steering(names, alone):
    last = torch.stack([states[:, -1] for states, _, _ in alone], 1)  # [layers, texts, hidden]
    labels = torch.tensor(names["labels"])
    assert 0 < int(labels.sum()) < len(labels)
    assert close(names["steering"], last[:, labels == 1].mean(1) - last[:, labels == 0].mean(1))
    moved = labels.roll(1)  # each text under its neighbour's label
    assert not close(names["steering"], last[:, moved == 1].mean(1) - last[:, moved == 0].mean(1))


def check_calibration(names, alone):
    acts = torch.cat([act for _, _, act in alone])
    assert close(names["low"], acts.amin(0)) and close(names["high"], acts.amax(0))
    without_a_batch = torch.cat([act for _, _, act in alone[4:]])
    assert not close(names["low"], without_a_batch.amin(0)) and not close(names["high"], without_a_batch.amax(0))


def check_logit_lens(names, alone):
    logits = torch.stack([logits[-1] for _, logits, _ in alone])
    assert close(names["logits"][-1], logits)  # of the last layer the model's own
    assert not close(names["logits"][-2], logits)


def check_token_ids(names):
    """Every token of the texts comes once, with its id."""
    assert names["rows"]["token_id"].tolist() == [token for ids in names["data"] for token in ids]
    assert len(names["x"]) == len(names["rows"]["token_id"])


def check_generation(names):
    """Rows are those of the new tokens that were fed again, from step 1 on, without a gap."""
    step, sample = names["rows"]["step"], names["rows"]["sample"]
    assert step.max() == 15
    for i in range(len(names["texts"])):
        assert step[sample == i].tolist() == list(range(1, int((sample == i).sum()) + 1))
    assert close(names["by_step"][1:], torch.stack([names["x"][step == n].mean(0) for n in range(1, 16)]))
    assert names["by_step"][0].isnan().all()  # nothing new was fed with the prompt
