"""The loop: run the model over this rank's samples, record, merge once, and say how far the cluster is."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from distcache.cache import ActivationCache
from distcache.comm import StoreLost
from distcache.distributed import DistributedCache
from distcache.errors import TooLarge
from distcache.hooks import Recording, record
from distcache.memory import available_bytes, human
from distcache.sites import Sites
from distcache.strategies import Rows

log = logging.getLogger("distcache")

PLAIN_EVERY_S = 10.0  # between lines of progress where the output is no terminal


class Samples(Protocol):
    """A data set: samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


def collect(
    model: nn.Module,
    data: Samples,
    sites: Sites,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    columns: Sequence[str] = (),
    cache: DistributedCache | None = None,
    progress: bool = True,
) -> DistributedCache:
    """Run a model over a data set on every rank and merge once: a collective. Returns the merged cache.

    Batch i holds samples i·batch_size and on and goes to rank i mod world size, so that batches are the same at every
    world size. Concatenations come out in the samples' order.

    Args:
        model: called under `torch.no_grad()`; its mode (train, eval) and device stay as they are.
        data: samples by number, the same on every rank.
        sites: see `distcache.record`.
        batch_size: samples in a batch; the last one may be smaller.
        collate: samples -> batch; by default `pad_and_stack`.
        forward: `forward(model, batch)` runs a batch; by default `model(**batch)`, on the model's device.
        columns: fields of the samples that are kept beside rows and not given to the model: numbers, or one per token.
        cache: accumulate here; by default in a new `DistributedCache()`, which all ranks make.
        progress: whether rank 0 says how many samples the cluster has done.

    Raises what `record` and `DistributedCache.deferred_mode` raise; `TooLarge` after the first batch if the rows that
    are kept would not fit (see `foresee`); TypeError where `data` has no length.
    """
    check_samples(data, batch_size)
    warn_if_training(model)
    collate, forward = collate or pad_and_stack, forward or run_batch
    cache = DistributedCache() if cache is None else cache
    starts = range(cache.data_rank * batch_size, len(data), cache.data_world_size * batch_size)
    with (
        counting(cache, len(data), progress) as done,
        cache.deferred_mode(),
        record(model, sites, into=cache) as rec,
        torch.no_grad(),
    ):
        for number, start in enumerate(starts):
            index = range(start, min(start + batch_size, len(data)))
            run_samples(rec, model, data, index, collate, forward, columns)
            if number == 0:
                foresee(cache, len(index), len(data))
            done(len(index))
        done(0)
    return cache


def check_samples(data: Any, batch_size: int) -> None:
    """TypeError where `data` isn't samples by number, ValueError for batches of none."""
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"collect expects samples by number, with a length, got {type(data).__name__}. For a loader write the "
            "loop: for index, batch in cache.share(loader)."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}.")


def warn_if_training(model: nn.Module) -> None:
    if model.training:
        log.warning("the model is in training mode, where dropout changes what is recorded: call model.eval() first.")


def run_samples(
    rec: Recording,
    model: nn.Module,
    data: Samples,
    index: Sequence[int],
    collate: Callable[[list[Any]], Any],
    forward: Callable[[nn.Module, Any], Any],
    columns: Sequence[str],
) -> None:
    """One batch, of these samples: a contribution of `rec` that carries their numbers."""
    samples = [data[i] for i in index]
    beside = {name: _column(name, [_field(sample, name) for sample in samples]) for name in columns}
    if columns:
        samples = [{k: v for k, v in sample.items() if k not in columns} for sample in samples]
    rec.next(index=index, **beside)
    forward(model, collate(samples))


def foresee(cache: DistributedCache, num_samples: int, total: int) -> None:
    """Tell early whether the rows that are kept will fit, from those of the first samples: this rank's share of the
    data set until the merge, and after it everything, where the content is held.

    See `check_foreseen`.
    """
    kept = kept_bytes(cache._held.delta)
    held = cache._comm.world_size if cache.dst is None else 1
    copies = len(cache._comm.colocated) / cache.world_size + min(held, len(cache._comm.colocated))
    for device, nbytes in kept.items():
        need = nbytes / num_samples * total * (copies if device.type == "cpu" else 2)
        check_foreseen(need, device, total, ", or hold the result on one rank: DistributedCache(dst=0)")


def kept_bytes(cache: ActivationCache) -> Counter[torch.device]:
    """The bytes of the rows that a cache keeps, by device."""
    kept = Counter[torch.device]()
    for entry in cache._kept().values():
        if isinstance(entry.state, Rows):
            for piece in entry.state.pieces:
                kept[piece.value_n.device] += piece.value_n.nbytes
    return kept


def check_foreseen(need: float, device: torch.device, total: int, otherwise: str = "") -> None:
    """Compare what the rows of all samples will need, in bytes, with what is free on a device.

    It's an estimate, as texts differ in length: `TooLarge` where it's twice what is free, a warning where it's more.
    """
    free = available_bytes(device)
    if need > free:
        words = (
            f"the rows of {total} samples will need about {human(need)} on {device}, {human(free)} are free. Keep "
            f"fewer tokens (Site(tokens='last')) or layers, or reduce at the site (reduce=dc.Mean()){otherwise}."
        )
        if need > 2 * free:
            raise TooLarge(words)
        log.warning(words)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, with tensors moved to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    if isinstance(batch, Mapping):
        return model(**{name: moved(x) for name, x in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*map(moved, batch))
    return model(moved(batch))


def pad_and_stack(samples: Sequence[Any]) -> Any:
    """A batch of samples: token ids of different lengths are padded with 0 on the right and get an `attention_mask`.

    A sample is a mapping with `input_ids`, or the ids alone, as a list or a tensor [S]; of a mapping's other fields,
    integers [S] are padded alike and the rest stacked. Any other sample: what torch's `default_collate` makes of it.
    """
    if not all(isinstance(sample, Mapping) for sample in samples):
        if all(_is_ids(sample) for sample in samples):
            return pad_and_stack([{"input_ids": sample} for sample in samples])
        return default_collate(list(samples))
    batch = {}
    for name in samples[0]:
        fields = [sample[name] for sample in samples]
        batch[name] = _padded(fields) if all(map(_is_ids, fields)) else default_collate(fields)
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = _padded([[1] * len(sample["input_ids"]) for sample in samples])
    return batch


def _is_ids(field: Any) -> bool:
    if isinstance(field, Tensor):
        return field.dim() == 1 and not field.is_floating_point()
    return isinstance(field, (list, tuple)) and all(isinstance(item, int) for item in field)


def _padded(rows: Sequence[Any]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def _field(sample: Any, name: str) -> Any:
    if isinstance(sample, Mapping) and name in sample:
        return sample[name]
    got = f"the fields {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
    raise TypeError(f"column {name!r}: expected samples that are mappings with that field, got {got}.")


def _column(name: str, values: list[Any]) -> Tensor:
    try:
        if all(map(_is_ids, values)):
            return _padded(values)
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"column {name!r}: expected a number per sample, or a list of them per token, got {values[0]!r}: {error}. "
            "Number words and labels first."
        ) from error


# -- progress --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counting(cache: DistributedCache, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that counts samples done; rank 0 shows the cluster's count, until all have merged.

    The count goes through the store, a call every half second at most; `done(0)` tells what is left. Losing the store
    never ends a run here.
    """
    store, key = cache._comm.store, f"{cache._attempt}/done"
    waiting, told = 0, time.monotonic()

    def done(num_samples: int) -> None:
        nonlocal waiting, told
        waiting += num_samples if cache.speaks else 0  # of ranks that run the same samples one counts them
        if waiting and (num_samples == 0 or time.monotonic() - told > 0.5):
            with contextlib.suppress(StoreLost):
                store.add(key, waiting)
            waiting, told = 0, time.monotonic()

    if not shown or cache.rank != 0:
        yield done
        return
    try:
        with showing(lambda: store.add(key, 0), total):
            yield done
    finally:
        with contextlib.suppress(StoreLost):
            store.delete(key)


@contextlib.contextmanager
def showing(count: Callable[[], int], total: int) -> Iterator[None]:
    """Show how many of `total` samples are done, on stderr, as long as the block runs.

    A bar on a terminal, one line that is written anew in a notebook, a line now and then elsewhere.
    """
    stop = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_one_line if "ipykernel" in sys.modules else _show_lines
    thread = threading.Thread(target=show, args=(count, total, stop), name="distcache-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


def _show_lines(count: Callable[[], int], total: int, stop: threading.Event) -> None:
    started = time.monotonic()
    with contextlib.suppress(StoreLost):
        while not stop.wait(PLAIN_EVERY_S):
            _line(count(), total, started)
        _line(count(), total, started)


def _show_one_line(count: Callable[[], int], total: int, stop: threading.Event) -> None:
    started = time.monotonic()
    with contextlib.suppress(StoreLost):
        while not stop.wait(0.5):
            _line(count(), total, started, "\r", end="")
        _line(count(), total, started, "\r")


def _line(count: int, total: int, started: float, begin: str = "", end: str = "\n") -> None:
    seconds = time.monotonic() - started
    rate = f"{count} of {total} samples in {seconds:.0f} s, {count / seconds:.1f}/s"
    print(f"{begin}distcache: {rate}", end=end, file=sys.stderr, flush=True)


def _show_bar(count: Callable[[], int], total: int, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.suppress(StoreLost), Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=total)
        while not stop.wait(0.2):
            bar.update(task, completed=count())
        bar.update(task, completed=count())
