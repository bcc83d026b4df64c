"""Selected tokens are what plain indexing of each text, without its padding, gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcache.errors import SiteError
from distcache.streams import Given, Stream, bound_arguments, open_batch
from distcache.tokens import as_selector

B, S = 4, 5
# Which tokens are text: right padding, left padding, none, holes and a sample without any.
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]],
    "none": [[1] * S] * B,
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]],
}
TOKENS = ["all", "last", "mean", slice(1, None), slice(-2, None), slice(None, None, 2), slice(None, None, -1)]
TOKENS += [0, 2, -1, -3, [0, -1], [3, 1], [1, 1], [-9, 9], range(2)]


class Model(nn.Module):
    """Any model that takes token ids and a mask."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        return input_ids


def batch(own_mask, *, ids=None, **given):
    ids = torch.zeros(B, S, dtype=torch.long) if ids is None else ids
    return open_batch(Stream("", Model()), (ids,), {"attention_mask": own_mask}, Given(**given))


def wanted(tokens, n):
    """The positions that `tokens` names in a text of n tokens, by plain indexing."""
    if isinstance(tokens, str):
        return {"all": list(range(n)), "last": list(range(n))[-1:]}[tokens]
    if isinstance(tokens, slice):
        return sorted(list(range(n))[tokens])
    numbers = [tokens] if isinstance(tokens, int) else tokens
    return sorted({range(n)[i] for i in numbers if -n <= i < n})


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_rows_are_those_of_plain_indexing_and_know_where_they_come_from(tokens, padding):
    x_bsd = torch.randn(B, S, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(MASKS[padding])
    x_bsd[mask == 0] = torch.nan  # what a model leaves in padding must not matter
    labels, ids = torch.tensor([7, 8, 9, 6]), torch.arange(B * S).view(B, S)
    selection = batch(mask, columns={"label": labels, "id": ids}).select(as_selector(tokens, "x"))

    rows, sample, position, label, token_id = [], [], [], [], []
    for b in range(B):
        text, text_ids = x_bsd[b][mask[b] == 1], ids[b][mask[b] == 1]
        if tokens == "mean":
            at = [0] if len(text) else []
            rows += [text.mean(0)] if len(text) else []
        else:
            at = wanted(tokens, len(text))
            rows += [text[i] for i in at]
            token_id += text_ids[at].tolist()
        sample += [b] * len(at)
        position += at
        label += [int(labels[b])] * len(at)
    expected = torch.stack(rows) if rows else torch.empty(0, 3)
    found, columns = selection.rows(x_bsd), selection.columns.by_name
    if tokens == "mean":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert "id" not in columns  # of no single token
    else:
        assert torch.equal(found, expected)
        assert columns["id"].tolist() == token_id
    assert columns["sample"].tolist() == sample and columns["position"].tolist() == position
    assert columns["label"].tolist() == label


def test_a_mean_over_tokens_of_bf16_is_a_float32_sum():
    x_bsd = torch.full((B, S, 1), 256.0, dtype=torch.bfloat16)
    x_bsd[:, 1:] = 1  # 256 + 1 is 256 in bf16
    for padding in ("none", "right"):
        mask = torch.tensor(MASKS[padding])
        means = batch(mask).select("mean").rows(x_bsd)
        expected = [x_bsd[b][mask[b] == 1].double().mean() for b in range(B)]
        assert means.dtype == torch.float32
        torch.testing.assert_close(means[:, 0].double(), torch.stack(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize("tokens", ["all", "last", "mean", 0, slice(None)], ids=str)
def test_texts_of_no_tokens_at_all_have_no_rows(tokens):
    selection = batch(None, ids=torch.zeros(2, 0, dtype=torch.long)).select(as_selector(tokens, "x"))
    assert selection.rows(torch.randn(2, 0, 3)).shape == (0, 3)
    assert len(selection.columns) == 0


def test_sites_that_select_alike_share_their_columns():
    one = batch(torch.tensor(MASKS["left"]))
    assert one.select(as_selector([0, -1], "x")) is one.select(as_selector((0, -1), "y"))
    assert one.select("all") is not one.select("last")


def test_all_tokens_as_they_lie_are_a_view():
    x_bsd = torch.randn(B, S, 3)
    assert batch(None).select("all").rows(x_bsd).data_ptr() == x_bsd.data_ptr()


@pytest.mark.parametrize(
    "tokens", ["first", "", [], True, [True], 1.0, [0.5], None, {0}, slice("a"), slice(None, None, 0)], ids=str
)
def test_tokens_that_mean_nothing_are_refused(tokens):
    with pytest.raises(SiteError, match=r"site 'here': tokens"):
        as_selector(tokens, "here")


# -- masks -----------------------------------------------------------------------------------------------------


def test_spans_of_valid_tokens_are_found_on_both_sides():
    assert batch(torch.tensor(MASKS["right"])).spans == [(0, 3), (0, 5), (0, 1), (0, 2)]
    assert batch(torch.tensor(MASKS["left"])).spans == [(2, 5), (0, 5), (4, 5), (3, 5)]
    assert batch(None).spans == [(0, 5)] * 4
    empty = torch.tensor(MASKS["right"])
    empty[2] = 0
    assert batch(empty).spans[2] == (0, 0)


def test_a_mask_with_holes_has_no_spans():
    with pytest.raises(SiteError, match=r"valid tokens in one run, got a mask with holes"):
        batch(torch.tensor(MASKS["holes"])).spans  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_is_one_where_it_is_not_zero(dtype):
    mask = torch.tensor(MASKS["right"]).to(dtype)
    assert batch(mask).select("all").columns.by_name["sample"].tolist() == [0] * 3 + [1] * 5 + [2] + [3] * 2


@pytest.mark.parametrize("hidden", [-1.0, -1e9, float("-inf")])
def test_a_mask_that_is_added_to_scores_is_refused_where_it_would_be_read_the_other_way_round(hidden):
    added = torch.zeros(B, S).masked_fill(torch.tensor(MASKS["right"]) == 0, hidden)
    for given in ({"mask": added}, {}):
        with pytest.raises(SiteError, match="negative numbers, as one that is added to scores"):
            batch(None if given else added, **given)
    assert batch(torch.zeros(B, S), mask=added == 0).spans == batch(torch.tensor(MASKS["right"])).spans


def test_a_mask_that_was_given_wins_over_the_models_own():
    given = torch.tensor(MASKS["left"])
    assert batch(torch.tensor(MASKS["right"]), mask=given).spans == batch(given).spans


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(B, 1, S, S), r"expected a padding mask \[B, S\], got \(4, 1, 5, 5\)"),
        (torch.ones(B, S, S), r"expected a padding mask \[B, S\], got \(4, 5, 5\)"),
        (torch.ones(S), r"expected a padding mask \[B, S\], got \(5,\)"),
        ([[1] * S] * B, r"expected a padding mask \[B, S\], got list"),
        ({"full_attention": torch.ones(B, 1, S, S)}, r"expected a padding mask \[B, S\], got dict"),
        (torch.ones(B, S + 1), r"mask \(4, 6\) doesn't fit the input's \(samples, tokens\), \(4, 5\)"),
        (torch.ones(B + 1, S), r"mask \(5, 5\) doesn't fit the input's \(samples, tokens\), \(4, 5\)"),
    ],
    ids=["4-D", "3-D", "1-D", "a list", "a dict", "longer", "more samples"],
)
def test_a_mask_that_does_not_fit_is_never_left_out_without_a_word(mask, message):
    for given in ({"mask": mask}, {}):
        with pytest.raises(SiteError, match=message):
            batch(None if given else mask, **given)


# -- inputs, index, columns ------------------------------------------------------------------------------------


def sizes(model, *args, **kwargs):
    found = open_batch(Stream("", model), args, kwargs, Given())
    return found.num_samples, found.num_tokens


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return args


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((torch.zeros(2, 3).long(),), {}, (2, 3)),
        ((), {"input_ids": torch.zeros(2, 3).long()}, (2, 3)),
        ((), {"pixels": torch.zeros(9, 1), "input_ids": torch.zeros(2, 3).long()}, (2, 3)),
        ((), {"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 4)}, (2, 3)),
        ((torch.zeros(2, 3),), {}, (2, None)),  # floats [B, D] have no tokens
        ((torch.zeros(2, 3, 4),), {}, (2, 3)),
        ((torch.zeros(2, 3, 8, 8),), {}, (2, None)),  # nor have pictures
        ((None, 1, torch.zeros(2),), {}, (2, None)),
    ],
)  # fmt: skip
def test_the_batch_is_as_large_as_the_models_main_input(args, kwargs, expected):
    assert sizes(Anything(), *args, **kwargs) == expected


def test_a_mask_is_no_input_and_has_no_ids():
    ids, mask = torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.long)
    for x, token_ids in ((ids, ids), (torch.zeros(1, 2, 3), None), (torch.ones(1, 2).bool(), None)):
        found = open_batch(Stream("", Anything()), (), {"attention_mask": mask, "x": x}, Given(token_id=True))
        assert (found.num_samples, found.num_tokens) == (1, 2)
        assert found.columns.get("token_id") is token_ids or torch.equal(found.columns["token_id"], token_ids)


@pytest.mark.parametrize("args", [(), (3,), (torch.tensor(1.0),)])
def test_a_call_without_a_tensor_of_samples_is_refused(args):
    with pytest.raises(SiteError, match="without a tensor that has samples along dim 0"):
        sizes(Anything(), *args)


def test_a_mask_of_tokens_needs_an_input_that_has_tokens():
    with pytest.raises(SiteError, match=r"a mask \(2, 3\) was given, but the model's input has no tokens"):
        sizes(Anything(), torch.zeros(2, 3), attention_mask=torch.ones(2, 3))


def test_arguments_by_position_get_their_names_also_through_wrappers():
    ids, mask = torch.zeros(2, 3), torch.ones(2, 3)

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    for model in (Model(), Wrapper(Wrapper(Model())), torch.compile(Model(), backend="eager")):
        found = bound_arguments(model, (ids, mask), {})
        assert found["input_ids"] is ids and found["attention_mask"] is mask
    found = bound_arguments(Anything(), (ids,), {"attention_mask": mask})
    assert list(found) == ["args0", "attention_mask"]
    # Whatever the order of the call, names come in the order of the signature.
    assert list(bound_arguments(Model(), (), {"attention_mask": mask, "input_ids": ids})) == [
        "input_ids",
        "attention_mask",
    ]


def test_samples_are_numbered_from_first_or_carry_their_index():
    assert batch(None, first=10).samples.tolist() == [10, 11, 12, 13]
    found = batch(None, index=[9, 3, 5, 1])
    assert found.samples.tolist() == [9, 3, 5, 1] and found.indexed
    assert found.select("last").columns.by_name["sample"].tolist() == [9, 3, 5, 1]
    assert found.per_sample.by_name["sample"].tolist() == [9, 3, 5, 1]


@pytest.mark.parametrize("index", [[0, 1, 2], range(5), torch.arange(3), 7], ids=str)
def test_an_index_of_another_length_is_refused(index):
    with pytest.raises(SiteError, match=r"index has \d entries for a batch of 4 samples"):
        batch(None, index=index)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            torch.zeros(3),
            r"column 'label' has shape \(3,\): expected one entry per sample, \(4,\), or per token, \(4, 5\)",
        ),
        (torch.zeros(4, 5, 1), r"column 'label' has shape \(4, 5, 1\)"),
        (["a", "b", "c", "d"], r"column 'label': expected a tensor of numbers"),
    ],
)
def test_columns_that_do_not_fit_are_refused(column, message):
    with pytest.raises(SiteError, match=message):
        batch(None, columns={"label": column})
