"""The job of collect.py in actors on a Ray cluster, pooled into one cache.

    python launch/ray_pool.py                    # in the cluster that runs here; if there is none, Ray is started here
    python launch/ray_pool.py --address auto     # only in a cluster: this machine is one of its nodes

Without arguments it takes the model and the texts that collect.py takes. Every actor loads the model once and takes
batches as it gets done with them; what the actors have is folded into one cache, each text once, and saved.
"""

from __future__ import annotations

import time
from functools import partial

import ray
import torch
from collect import find_model, load_data, load_model, parser, refuse, report, sites
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import distcache as dc


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--address", help="of a Ray cluster, host:port or auto; one that runs here, or a new one")
    options.add_argument("--actors", type=int, help="how many; one a GPU, or two a node where there are none")
    args = options.parse_args()
    refuse(args.out)

    started = time.monotonic()
    ray.init(address=args.address)
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = sum(int(has.get("GPU", 0)) for has in there)
    num_actors = args.actors or num_gpus or sum(min(2, int(has.get("CPU", 0))) for has in there)
    name, source, how = find_model(args.model)
    data = load_data(AutoTokenizer.from_pretrained(source, **how), args)
    needs = {"CPU": 1, "GPU": 1} if num_gpus else {"CPU": 1}
    with dc.CachePool(partial(make_model, args.model), sites(), num_actors=num_actors, resources=needs) as pool:
        loaded = time.monotonic()
        cache = pool.collect(data, batch_size=args.batch_size)
        collected = time.monotonic()
    cache.save(args.out, model=name)
    report(cache, name, data, args.out)
    print(f"{num_actors} actor(s): {loaded - started:.0f} s to begin, {collected - loaded:.0f} s to collect.")


def make_model(name: str | None) -> torch.nn.Module:
    """What every actor calls once, on the device that Ray has given it."""
    disable_progress_bar()
    return load_model(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))[1]


if __name__ == "__main__":
    main()
