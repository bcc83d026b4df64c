"""python -m benchmarks: every workload on 2 and 4 gloo ranks; `--device cuda` on one GPU with NCCL."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import attention, merging, pooling, recording
from benchmarks.harness import WARM_UPS, Timings, slowest
from distcache.testing import RankPool

# Workloads of one process.
ALONE = {name: module.on_rank for module in (recording, attention, pooling) for name in module.WORKLOADS}


def run(name: str, world_size: int, rounds: int, device: str) -> list[Timings]:
    with RankPool() as pool:
        answers: Any = pool.run(world_size, ALONE.get(name, merging.on_rank), name, rounds, device, timeout_s=1800)
    names, times = answers[0][0], slowest([times for _, times, _ in answers])
    peaks = [
        max((p for p in by_rank if p is not None), default=None)
        for by_rank in zip(*(a[2] for a in answers), strict=True)
    ]
    return [Timings(name, found[WARM_UPS:], found[0], peak)
            for name, found, peak in zip(names, times, peaks, strict=True)]  # fmt: skip


def show(name: str, world_size: int, timings: list[Timings]) -> None:
    ours = next((t for t in timings if t.name == "distcache"), timings[0])
    table = Table(title=f"{name}, {world_size} rank{'s' if world_size > 1 else ''}", show_header=True)
    for column in ("candidate", "median ms", "ours ÷ it", "it ÷ ours", "best ms", "ours ÷ it", "first ms", "peak MiB"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for t in timings:
        medians = (f"{t.median:.1f}", f"{ours.median / t.median:.2f}", f"{t.median / ours.median:.2f}")
        table.add_row(t.name, *medians, f"{t.best:.1f}", f"{ours.best / t.best:.2f}", f"{t.first:.1f}",
                      "–" if t.peak_mib is None else f"{t.peak_mib:.0f}")  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "workloads", nargs="*", help=f"of: {', '.join((*merging.WORKLOADS, *ALONE))}; by default all for the device"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    of_device = attention.BY_DEVICE[args.device] + (pooling.WORKLOADS if args.device == "cpu" else ())
    wanted = args.workloads or (*merging.WORKLOADS, *recording.WORKLOADS, *of_device)
    for world_size in args.ranks if args.device == "cpu" else [1]:
        for name in wanted:
            if name not in ALONE:
                show(name, world_size, run(name, world_size, args.rounds, args.device))
    for name in wanted:
        if name in ALONE:
            show(name, 1, run(name, 1, args.rounds, args.device))


if __name__ == "__main__":
    main()
