"""The main job on a real language model: two ranks save what one rank saves, and both what plain torch computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distcache as dc

LAUNCHER = Path(__file__).parent.parent / "launch" / "collect.py"
NUM_SAMPLES, MAX_TOKENS = 10, 200  # some texts are shorter

pytestmark = pytest.mark.slow


def launch(world_size: int, out: Path) -> str:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"),
        *(str(LAUNCHER), f"--out={out}", f"--samples={NUM_SAMPLES}", f"--max-tokens={MAX_TOKENS}", "--batch-size=3"),
    ]
    # Matrix products give other bits with other numbers of threads.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "120"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    return {n: (launch(n, folder / f"on{n}"), folder / f"on{n}") for n in (1, 2)}


def test_two_ranks_save_what_one_rank_saves(saved):
    one, two = (dc.load(saved[n][1]) for n in (1, 2))
    assert list(one) == list(two)
    assert len(one) == 30 + 30 + 30 * 9
    for key in one:
        if key.startswith("resid_out"):
            assert torch.equal(one[key], two[key]), key
        else:
            bound = 1e-6 * float(one[key].double().abs().mean())
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=bound, msg=key)
            assert torch.equal(one.count(key), two.count(key))


def test_a_table_and_a_picture_are_shown(saved):
    printed, folder = saved[2]
    for words in ("SmolLM2-135M-Instruct: 10 texts", "resid_out_*", "mean_resid_out_*", "avg_attn_pattern_L*H*"):
        assert words in printed
    assert folder.with_name("on2.png").read_bytes().startswith(b"\x89PNG")


def test_averages_are_eager_attention_of_unpadded_texts_averaged_by_hand(saved):
    sys.path.insert(0, str(LAUNCHER.parent))
    try:
        import collect as launcher
    finally:
        sys.path.pop(0)
    _, model, tokenizer = launcher.load_model(None, torch.device("cpu"))
    model.set_attn_implementation("eager")
    texts = launcher.load_texts(None)[:NUM_SAMPLES]
    data = [tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text in texts]
    assert len({len(text) for text in data}) > 1
    cache = dc.load(saved[2][1])
    total = torch.zeros(30, 9, MAX_TOKENS, MAX_TOKENS, dtype=torch.float64)
    count, last, states = torch.zeros(MAX_TOKENS), [], []
    for text in data:
        n = len(text)
        with torch.no_grad():
            out = model(torch.tensor([text]), output_attentions=True, output_hidden_states=True)
        total[:, :, :n, :n] += torch.cat(out.attentions).double()
        count[:n] += 1
        states.append(out.hidden_states[20][0].double())  # what block 19 gives
        last.append(states[-1][-1])
    found = torch.stack([cache["avg_attn_pattern", layer] for layer in range(30)])
    torch.testing.assert_close(
        found, (total / count[:, None]).float()[..., : found.shape[-1], : found.shape[-1]], rtol=0, atol=2e-6
    )
    # Residual streams reach thousands; padded and unpadded passes differ in the last bits of the products.
    scale = float(torch.stack(last).abs().mean())
    torch.testing.assert_close(cache["resid_out_19"].double(), torch.stack(last), rtol=1e-4, atol=1e-4 * scale)
    mean = torch.cat(states).mean(0)
    torch.testing.assert_close(cache["mean_resid_out_19"].double(), mean, rtol=1e-4, atol=1e-4 * scale)
    # The oracle fails where the patterns of texts are averaged without regard to their lengths.
    assert (total / len(data) - found).abs().max() > 1e-3
