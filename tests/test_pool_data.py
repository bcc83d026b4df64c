"""Ray Data: batches of a data set become states, and states one cache, in which each sample counts once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rayhosts import STORE_BYTES
from torch import nn

import distcache as dc
from distcache.packed import pack
from distcache.pool.actors import fold_all
from distcache.pool.data import ALIGNMENT, _Counted, collect_batches, fold, from_row, to_row

SAMPLES = [{"input_ids": [(5 * i + j) % 16 for j in range(1 + i % 4)], "label": i % 3} for i in range(23)]
SITES = [
    dc.Site("layer", key="rows", tokens="last"),
    dc.Site("layer", key="h", reduce={"moments": dc.Moments(), "by_label": dc.Grouped(dc.Mean(), 3, by="label")}),
]
LIMIT_S = 60  # for what must not hang


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(16, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        return self.layer(self.embed(input_ids))


def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


def by_hand(numbers):
    """What plain torch says of these samples, one by one, in their order."""
    model = tiny()
    with torch.no_grad():
        h = [model.layer(model.embed(torch.tensor(SAMPLES[i]["input_ids"]))) for i in sorted(numbers)]
    tokens = torch.cat(h)
    labels = torch.cat([torch.full((len(x),), SAMPLES[i]["label"]) for i, x in zip(sorted(numbers), h, strict=True)])
    means = [tokens[labels == label].mean(0) for label in range(3)]
    return {
        "rows": torch.stack([x[-1] for x in h]),
        "mean": tokens.mean(0),
        "variance": tokens.var(0),
        "by_label": torch.stack(means),
        "count": torch.tensor(len(tokens)),
    }


def check(cache, numbers):
    moments = cache["h_moments"]
    found = {"rows": cache["rows"], "by_label": cache["h_by_label"], "count": cache.count("h_moments").squeeze()}
    found |= {"mean": moments["mean"], "variance": moments["variance"]}
    for name, value in by_hand(numbers).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda words, name=name: name + words)


def collector(**options):
    return collect_batches(tiny, SITES, columns=["label"], **options)()


def batch(numbers, index="index"):
    """As Ray Data gives it: a dict of numpy arrays, lists of unlike lengths as objects."""
    ids = np.empty(len(numbers), dtype=object)
    ids[:] = [np.array(SAMPLES[i]["input_ids"]) for i in numbers]
    labels = np.array([SAMPLES[i]["label"] for i in numbers])
    return {index: np.array(numbers), "input_ids": ids, "label": labels}


def folded(rows):
    return fold_all(from_row(row["state"][0]) for row in rows)


# -- from rows to states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2, 100])
def test_states_of_batches_in_any_order_say_what_plain_torch_says(batch_size):
    collect = collector(batch_size=batch_size)
    rows = [collect(batch(numbers)) for numbers in ([9, 10, 11, 12], [22], [*range(13, 22)], [*range(8, -1, -1)])]
    assert all(len(column) == 1 for row in rows for column in row.values())
    check(folded(rows), range(23))
    with pytest.raises(AssertionError):
        check(folded(rows[1:]), range(23))
    with pytest.raises(AssertionError):
        check(folded(rows), [*range(23), 4])


def test_a_sample_is_a_row_without_its_number():
    seen = []

    def keep(model, samples):
        seen.extend(samples)

    collect = collect_batches(tiny, SITES, collate=list, forward=keep, index="id")()
    fields = {"name": np.array(["a", "b"]), "weight": np.array([0.5, 1.5]), "image": np.ones((2, 2, 3), np.float32)}
    collect({"id": np.array([7, 3]), **fields})
    for sample, name, weight in zip(seen, "ab", (0.5, 1.5), strict=True):
        assert list(sample) == ["name", "weight", "image"]
        assert (sample["name"], sample["weight"]) == (name, weight)
        assert torch.equal(sample["image"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (batch([0, 1], index="row"), ValueError, r"no column 'index'.*'row'.*from_items"),
        ({**batch([0, 1]), "index": np.array([0.0, 1.0])}, TypeError, "an integer per row, got float64"),
        (batch([3, 4, 3]), dc.DuplicateSamples, "3 rows have 2 numbers"),
        ([1, 2], TypeError, "dict of numpy arrays, got list"),
    ],
    ids=["no numbers", "floats", "a number twice", "no dict"],
)
def test_batches_whose_samples_are_not_numbered_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        collector()(given)


def test_a_factory_that_gives_no_model_is_refused():
    with pytest.raises(TypeError, match="model factory"):
        collect_batches(list, SITES)()


def test_a_state_comes_back_from_a_row_bit_for_bit_wherever_the_row_lies():
    cache = dc.ActivationCache()
    cache.add("kept", torch.arange(3.0))
    cache.register_aggregation("mean", dc.Mean())
    cache.add("mean", torch.tensor([1.5, 2.5]))
    row = to_row(pack(cache))
    assert len(row) % ALIGNMENT == 0
    for shift in (0, 1, 7):
        room = np.zeros(len(row) + shift, np.uint8)
        room[shift:] = row
        room.flags.writeable = False
        again = fold_all([from_row(room[shift:])])
        assert torch.equal(again["kept"], cache["kept"]) and torch.equal(again["mean"], cache["mean"])


@pytest.mark.parametrize("cut", [0, 8, ALIGNMENT, -ALIGNMENT])
def test_a_row_that_is_cut_short_is_a_bad_cache(cut):
    cache = dc.ActivationCache()
    cache.add("kept", torch.arange(30.0))
    with pytest.raises(dc.BadCache):
        from_row(to_row(pack(cache))[:cut])


# -- which states count ------------------------------------------------------------------------------------------------


def test_the_same_batch_counts_once_and_one_that_shares_some_samples_is_an_error():
    collect, counted = collector(), _Counted()

    def key(of):
        return collect(of)["key"][0]

    assert [counted.add(key(batch(numbers))) for numbers in ([0, 1], [2, 3], [0, 1], [6, 5])] == [1, 1, 0, 1]
    with pytest.raises(dc.DuplicateSamples, match=r"1 sample\(s\) come in two batches .* 3\. "):
        counted.add(key(batch([3, 4])))
    assert counted.add(key(batch([4])))


def test_other_samples_of_the_same_numbers_are_not_taken_for_those_that_are_known():
    collect, counted = collector(), _Counted()
    counted.add(collect(batch([0, 1]))["key"][0])
    of_another_file = {**batch([4, 5]), "index": np.array([0, 1])}
    with pytest.raises(dc.DuplicateSamples, match=r"0\.\.1"):
        counted.add(collect(of_another_file)["key"][0])


def test_two_models_may_see_the_same_samples():
    counted = _Counted()
    assert all(counted.add(collector()(batch([0, 1]))["key"][0]) for _ in range(2))


# -- on Ray Data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(request):
    """The package, and a host that has cores, which Ray Data's own tasks ask for."""
    from ray import data as ray_data

    hosts = request.getfixturevalue("hosts")
    # It stays: actors of other tests, which ask for nothing, may run there by now.
    hosts.cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    return ray_data


def states(data, collect=None, numbers=range(23), batch_size=4, **options):
    rows = data.from_items([{"index": i, **SAMPLES[i]} for i in numbers], override_num_blocks=3)
    collect = collect or collect_batches(tiny, SITES, batch_size=2, columns=["label"], **options)
    return rows.map_batches(collect, batch_size=batch_size, concurrency=1, num_cpus=0)


def test_a_data_set_says_what_plain_torch_says(data):
    check(fold(states(data), timeout_s=LIMIT_S), range(23))


def test_a_block_that_comes_twice_counts_once_and_samples_that_do_are_an_error(data):
    collect = collect_batches(tiny, SITES, columns=["label"])
    once = states(data, collect).materialize()
    check(fold(once.union(once), timeout_s=LIMIT_S), range(23))
    other = states(data, collect, numbers=range(19, 22), batch_size=3)  # no batch of before, but samples of two
    with pytest.raises(dc.DuplicateSamples):
        fold(once.union(other), timeout_s=LIMIT_S)


def _dies_once(folder):
    def forward(model, given):
        if (given["input_ids"][:, 0] == SAMPLES[13]["input_ids"][0]).any() and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        model(**given)

    return forward


def test_an_actor_that_dies_is_replaced_and_every_sample_counts_once(data, tmp_path):
    found = fold(states(data, forward=_dies_once(Path(tmp_path))), timeout_s=LIMIT_S)
    assert (tmp_path / "died").exists()
    check(found, range(23))


def test_rows_of_another_kind_and_data_sets_that_give_nothing_are_told(data):
    with pytest.raises(ValueError, match=r"collect_batches gives, got the columns \['id'\]"):
        fold(data.range(3), timeout_s=LIMIT_S)
    assert len(fold(states(data, numbers=[]), timeout_s=LIMIT_S)) == 0
