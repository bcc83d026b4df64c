"""Which tokens of a forward pass count, and the rows that a site's `tokens` selects of them.

A pass has a *stream* of tokens for each part of the model that has texts of its own: one in most models, two in an
encoder-decoder, another in a vision tower. Each has its own length and its own mask, and no other's, fitting or not.

Legend of names: b samples of a batch, s tokens, n rows that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcache.errors import SiteError
from distcache.families import wrapped
from distcache.generation import Generation, token_ids_of
from distcache.ledger import samples_of
from distcache.strategies import Columns

Tokens = Literal["all", "last", "mean"] | slice | Sequence[int] | int
Selector = str | tuple[Any, ...]

Mask = Tensor | Callable[[dict[str, Any]], Tensor] | Mapping[str, Tensor]
PADDING = {  # keywords of padding masks [B, S], and whether they say which tokens are valid, or which are not
    "attention_mask": True,
    "src_key_padding_mask": False,
    "tgt_key_padding_mask": False,
    "key_padding_mask": False,
}

_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def as_selector(tokens: Tokens, where: str) -> Selector:
    """A hashable form of `tokens`, by which sites that select alike share their work. `SiteError`."""
    if isinstance(tokens, str) and tokens in ("all", "last", "mean"):
        return tokens
    if isinstance(tokens, slice):
        try:
            tokens.indices(0)
            return ("slice", tokens.start, tokens.stop, tokens.step)
        except (TypeError, ValueError) as error:
            raise SiteError(f"site {where!r}: tokens={tokens!r}: {error}.") from error
    numbers = (tokens,) if isinstance(tokens, int) else tokens
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    if is_list and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        return tuple(numbers)
    raise SiteError(f"site {where!r}: tokens is 'all', 'last', 'mean', a slice, a number or a list, got {tokens!r}.")


class Selection:
    """The rows that one selector takes from one batch, in (sample, token) order.

    `columns`: what is known of each row. `at`: its sample and token, int64 [n] each. `whole`: no token is left out.
    `means`: where a row is the mean over a sample's valid tokens, those, bool [B, S]; `at` names samples that have any.
    """

    def __init__(
        self, batch: Batch, at: tuple[Tensor, Tensor], position: Tensor, whole: bool, means: Tensor | None = None
    ) -> None:
        b, s = at
        beside = {
            name: column[b] if column.dim() == 1 else column[b, s]
            for name, column in batch.columns.items()
            if column.dim() == 1 or means is None
        }
        if batch.before_b is not None:
            position = position + batch.before_b[b]
        if batch.step is not None:
            beside["step"] = torch.full_like(position, batch.step)
        self.columns = Columns({"sample": batch.samples[b], "position": position, **beside}, batch.indexed)
        self.at, self.whole, self.means = at, whole, means
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rows(self, x_bs: Tensor) -> Tensor:
        """The selected rows [n, …] of a tensor [B, S, …]; a view where they are all tokens as they lie."""
        if self.means is not None:
            # Padding may hold NaN, so it is left out, not multiplied by 0. Sums are float32 at least, pairwise.
            dtype = torch.promote_types(x_bs.dtype, torch.float32)
            if self.whole:
                return x_bs.mean(1, dtype=dtype)
            means = [x_bs[b][self.means[b].to(x_bs.device)].mean(0, dtype=dtype) for b in self.at[0].tolist()]
            return torch.stack(means) if means else x_bs.new_empty((0, *x_bs.shape[2:]), dtype=dtype)
        if self.whole:
            return x_bs.flatten(0, 1)
        if x_bs.device not in self._moved:
            self._moved[x_bs.device] = (self.at[0].to(x_bs.device), self.at[1].to(x_bs.device))
        return x_bs[self._moved[x_bs.device]]


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one stream of a forward pass, and which of their tokens are valid.

    `num_tokens`: S, or None where the input has no tokens. `valid_bs`: bool on the CPU, or None where all are valid.
    `samples`: int64 [B], each sample's index in the data set if `indexed`, else its number among those recorded.
    `columns`: tensors [B] or [B, S] by name. `before_b`: int64 [B], the valid tokens of earlier passes of a generation.
    `step`: of a generation: 0 the prompt, n the pass that was given the n-th new token.
    `patches`: values [B, T, D] have T tokens, all valid, whatever the input was (a vision tower's).
    """

    num_samples: int
    num_tokens: int | None
    valid_bs: Tensor | None
    samples: Tensor
    indexed: bool
    columns: Mapping[str, Tensor]
    before_b: Tensor | None = None
    step: int | None = None
    patches: bool = False
    _selections: dict[Selector, Selection] = field(default_factory=dict)
    _by_length: dict[int, Batch] = field(default_factory=dict)

    @functools.cached_property
    def per_sample(self) -> Columns:
        """What is known of values that have one row a sample."""
        beside = {name: column for name, column in self.columns.items() if column.dim() == 1}
        return Columns({"sample": self.samples, "position": torch.zeros_like(self.samples), **beside}, self.indexed)

    def with_tokens(self, num_tokens: int) -> Batch:
        """This batch where values have that many tokens, of which nothing is known but that all are valid."""
        if num_tokens not in self._by_length:
            self._by_length[num_tokens] = dataclasses.replace(
                self, num_tokens=num_tokens, patches=False, _selections={}, _by_length={}
            )
        return self._by_length[num_tokens]

    def unpacked(self, x_n: Tensor, where: str) -> Tensor:
        """Rows [B·S, …], or those of valid tokens alone, as [B, S, …]. `SiteError` for any other number of rows."""
        assert self.num_tokens is not None
        if x_n.dim() and len(x_n) == self.num_samples * self.num_tokens:
            return x_n.unflatten(0, (self.num_samples, self.num_tokens))
        num_valid = self.num_samples * self.num_tokens if self.valid_bs is None else int(self.valid_bs.sum())
        if self.valid_bs is None or x_n.dim() == 0 or len(x_n) != num_valid:
            raise SiteError(
                f'site {where}: layout="ND" expects one row for each of the {self.num_samples * self.num_tokens} '
                f"tokens, or for each of the {num_valid} valid ones, got {tuple(x_n.shape)}."
            )
        x_bs = x_n.new_zeros((self.num_samples, self.num_tokens, *x_n.shape[1:]))
        x_bs[self.valid_bs.to(x_n.device)] = x_n
        return x_bs

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each sample's valid tokens, (0, 0) where it has none. `SiteError` for a mask with holes."""
        assert self.num_tokens is not None
        if self.valid_bs is None:
            return [(0, self.num_tokens)] * self.num_samples
        length = self.valid_bs.sum(1)
        first = self.valid_bs.int().argmax(1)  # the first of equal values
        reach = torch.arange(self.num_tokens)
        run_bs = (reach >= first[:, None]) & (reach < (first + length)[:, None])
        if not torch.equal(run_bs & self.valid_bs, self.valid_bs):
            raise SiteError(
                "averaged attention needs each sample's valid tokens in one run, got a mask with holes in it: record "
                "these samples without attention sites, or pad at one end."
            )
        return [(a, a + n) if n else (0, 0) for a, n in zip(first.tolist(), length.tolist(), strict=True)]

    def select(self, selector: Selector) -> Selection:
        """What a selector takes of this batch; worked out once, however many sites ask. Needs tokens."""
        if selector not in self._selections:
            self._selections[selector] = self._select(selector)
        return self._selections[selector]

    def _select(self, selector: Selector) -> Selection:
        assert self.num_tokens is not None
        valid, whole = self.valid_bs, self.valid_bs is None
        if valid is None:
            valid = torch.ones(self.num_samples, self.num_tokens, dtype=torch.bool)
        length = valid.sum(1)
        position_bs = valid.cumsum(1) - 1  # counts valid tokens; of no meaning elsewhere
        if selector == "mean":
            b = length.nonzero()[:, 0]
            return Selection(self, (b, b), torch.zeros_like(b), whole and self.num_tokens > 0, means=valid)
        chosen = valid
        if selector == "last":
            chosen = valid & (position_bs == (length - 1)[:, None])
        elif selector != "all":
            chosen = torch.zeros_like(valid)
            for b_, n in enumerate(length.tolist()):
                if selector[0] == "slice":
                    wanted: Iterable[int] = range(*slice(*selector[1:]).indices(n))
                else:
                    wanted = [int(token) + n if int(token) < 0 else int(token) for token in selector]
                chosen[b_] = valid[b_] & torch.isin(position_bs[b_], torch.tensor(list(wanted), dtype=torch.int64))
        b, s = chosen.nonzero(as_tuple=True)
        return Selection(self, (b, s), position_bs[b, s], whole and selector == "all")


# -- what a forward pass was called with -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A part of a model that has texts of its own: its tokens are as many as its input's, its padding is its mask's.

    `name`: "" of a model that has but one, "encoder", "decoder", else the part's path. `seq_first`: values of the
    input are [S, B, D]. `patches`: the input is pictures, of which values [B, T, D] have T tokens.
    """

    name: str
    module: nn.Module
    seq_first: bool = False
    patches: bool = False


def find_streams(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[Stream]:
    """The streams of a model, its own first; of an encoder-decoder those of its two parts alone."""
    found = []
    encoder, decoder = _stacks(model)
    if encoder is not None and decoder is not None:
        found = [Stream("encoder", encoder, _seq_first(encoder)), Stream("decoder", decoder, _seq_first(decoder))]
    else:
        found = [Stream("", model, _seq_first(model), _of_pictures(model))]
    taken = {id(stream.module) for stream in found} | {id(model)}
    for path, module in modules.items():
        inside = any(path.startswith(f"{stream.name}.") for stream in found[1:])
        if id(module) not in taken and not inside and _of_pictures(module):
            found.append(Stream(path, module, patches=True))
    return found


def _stacks(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The encoder and the decoder of a model that has both."""
    if isinstance(model, nn.Transformer):
        return model.encoder, model.decoder
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None, None
    return tuple(getattr(model, f"get_{side}", lambda: None)() for side in ("encoder", "decoder"))  # type: ignore


def _seq_first(module: nn.Module) -> bool:
    if not isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return False
    return not module.layers[0].self_attn.batch_first  # type: ignore[union-attr]


def _of_pictures(module: nn.Module) -> bool:
    return getattr(module, "main_input_name", None) == "pixel_values"


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What the user says of the samples of a pass, or of a generation.

    `mask`: padding [B, S], non-zero for valid tokens; a function that makes it of the call's arguments by name; one by
    stream; None for the model's own. `first`: the number of the first sample where there is no index.
    `token_id`: whether the ids of tokens are a column, if no other is called so.
    """

    mask: Mask | None = None
    index: Iterable[int] | Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    first: int = 0
    token_id: bool = False

    def samples(self, num_samples: int) -> Tensor:
        """int64 [B]. `SiteError` for an index of another length."""
        if self.index is None:
            return torch.arange(self.first, self.first + num_samples)
        samples = samples_of(self.index)
        if len(samples) != num_samples:
            raise SiteError(f"index has {len(samples)} entries for a batch of {num_samples} samples: one for each.")
        return samples

    def of_stream(self, stream: Stream, arguments: dict[str, Any]) -> tuple[Any, bool]:
        """The mask for a stream that was called so, and whether it says which tokens are valid; (None, True): none."""
        mask = self.mask
        if isinstance(mask, Mapping) and (stream.name in mask or stream.name == ""):
            return mask.get(stream.name, mask), True
        if isinstance(mask, Mapping):
            mask = None
        if mask is not None and stream.name == "":
            return (mask(arguments) if callable(mask) else mask), True
        if mask is not None and stream.name in ("encoder", "decoder"):
            raise SiteError(
                "an encoder-decoder has two masks, and this one would fit either by chance: give "
                "mask={'encoder': mask_bs, 'decoder': mask_bs}, or leave it to the model's own."
            )
        for name, valid in PADDING.items():
            if arguments.get(name) is not None:
                return arguments[name], valid
        return None, True


def open_batch(
    stream: Stream,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Given,
    generation: Generation | None = None,
    samples: Tensor | None = None,
) -> Batch:
    """The batch of a call `stream.module(*args, **kwargs)`. `SiteError` where mask, index or columns don't fit it.

    `generation`: what this stream has seen before; it is brought up to date. `samples`: of the pass, where another
    stream has told them.
    """
    arguments = bound_arguments(stream.module, args, kwargs)
    num_samples, num_tokens = _sizes(arguments, stream)
    if samples is None:
        samples = given.samples(num_samples)
    elif len(samples) != num_samples:
        raise SiteError(
            f"the model's part {stream.name or 'itself'!r} runs on {num_samples} samples, where the batch has "
            f"{len(samples)}: which are whose isn't known. Record that part alone, or hook a module outside of it."
        )
    ids = _token_ids(arguments, stream)
    before_b, step = None, None
    if generation is not None and generation.num_seen:
        assert num_tokens is not None
        mask, says_valid = given.of_stream(stream, arguments) if given.mask is None else (None, True)
        shown = None
        if isinstance(mask, Tensor) and tuple(mask.shape) == (num_samples, generation.num_seen + num_tokens):
            shown = _valid(mask[:, -num_tokens:], says_valid, num_samples, num_tokens)
        valid, before_b = generation.go_on(ids, shown, num_samples, num_tokens)
        step = generation.step
        columns = {name: column for name, column in given.columns.items() if torch.as_tensor(column).dim() == 1}
    else:
        valid = _prompt_mask(stream, arguments, given, generation, ids, num_samples, num_tokens)
        if generation is not None and num_tokens is not None:
            generation.begin(valid, num_samples, num_tokens)
            step = 0 if generation.steps else None
        columns = dict(given.columns)
    beside = _columns(columns, stream, num_samples, num_tokens)
    if (given.token_id or step is not None) and "token_id" not in beside and ids is not None:
        beside["token_id"] = ids
    return Batch(
        num_samples,
        num_tokens,
        valid,
        samples,
        given.index is not None,
        beside,
        before_b,
        step,
        stream.patches,
    )


def _prompt_mask(
    stream: Stream,
    arguments: dict[str, Any],
    given: Given,
    generation: Generation | None,
    ids: Tensor | None,
    num_samples: int,
    num_tokens: int | None,
) -> Tensor | None:
    """Which tokens of a pass that begins texts are valid, bool [B, S] on the CPU; None where all are."""
    if stream.patches:
        return None
    if given.mask is None and generation is not None and generation.mask_bs is not None:
        mask, says_valid = generation.mask_bs, True
    else:
        mask, says_valid = given.of_stream(stream, arguments)
    if mask is None:
        _check_padding(stream, arguments, ids)
        return None
    return _valid(mask, says_valid, num_samples, num_tokens)


def _token_ids(arguments: Mapping[str, Any], stream: Stream) -> Tensor | None:
    """The token ids [B, S] of a call, on the CPU."""
    found = arguments.get("input_ids")
    if found is None and not stream.seq_first and not stream.patches:
        main = next((x for x in arguments.values() if isinstance(x, Tensor)), None)
        found = main if main is not None and main.dim() == 2 and not main.is_floating_point() else None
    return found.detach().cpu() if isinstance(found, Tensor) and found.dim() == 2 else None


def _check_padding(stream: Stream, arguments: Mapping[str, Any], ids: Tensor | None) -> None:
    """`SiteError` where texts begin or end with padding that no mask tells of: it would count."""
    config = getattr(stream.module, "config", None)
    pad = token_ids_of(config, "pad_token_id")
    if ids is None or not pad or ids.shape[1] < 2:
        return
    is_pad = torch.isin(ids, torch.tensor(sorted(pad)))
    other = token_ids_of(config, "eos_token_id") | token_ids_of(config, "bos_token_id")
    least = 2 if pad & other or stream.name == "decoder" else 1  # one of them may be an end, or a decoder's start
    if is_pad[:, -least:].all(1).any() or is_pad[:, :least].all(1).any():
        raise SiteError(
            f"texts are padded with token {min(pad)}, and no mask says so: padding would count. Call the model with "
            "its attention_mask, or give record(…, mask=mask_bs), all ones if these tokens are to count."
        )


def _columns(columns: Mapping[str, Any], stream: Stream, num_samples: int, num_tokens: int | None) -> dict[str, Tensor]:
    beside = {}
    for name, column in columns.items():
        try:
            beside[name] = torch.as_tensor(column).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SiteError(f"column {name!r}: expected a tensor of numbers: {error}. Number words first.") from error
        shape = tuple(beside[name].shape)
        if shape == (num_samples,):
            continue
        if stream.name in ("encoder", "decoder"):
            raise SiteError(
                f"column {name!r} has shape {shape}: in an encoder-decoder, where tokens are the encoder's or the "
                f"decoder's, expected one entry per sample, {(num_samples,)}."
            )
        if stream.name:  # a column per token is of the model's own tokens
            del beside[name]
        elif shape != (num_samples, num_tokens):
            per_token = "" if num_tokens is None else f", or per token, {(num_samples, num_tokens)}"
            raise SiteError(
                f"column {name!r} has shape {shape}: expected one entry per sample, {(num_samples,)}{per_token}."
            )
    return beside


def _valid(mask: Any, says_valid: bool, num_samples: int, num_tokens: int | None) -> Tensor | None:
    """Which tokens are valid, bool [B, S] on the CPU; None where all are. `SiteError` for what is no padding mask."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SiteError(f"expected a padding mask [B, S], got {got}. Give the 2-D one: record(…, mask=mask_bs).")
    if num_tokens is None:
        raise SiteError(
            f"a mask {tuple(mask.shape)} was given, but the model's input has no tokens that it could hide."
        )
    if tuple(mask.shape) != (num_samples, num_tokens):
        raise SiteError(
            f"the mask {tuple(mask.shape)} doesn't fit the input's (samples, tokens), {(num_samples, num_tokens)}: "
            "every token of the batch needs an entry."
        )
    if not says_valid and mask.is_floating_point():  # added to scores: 0 is a valid token, −∞ is padding
        valid_bs = mask.detach().cpu() == 0
    else:
        valid_bs = (mask.detach().cpu() != 0) == says_valid
    return None if bool(valid_bs.all()) else valid_bs


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, in the signature's order: hooks see no names of those passed by position."""
    try:
        bound = _signature(module).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}{i}": item for i, item in enumerate(value)})
        else:
            found[name] = value
    return found


def _signature(module: nn.Module) -> inspect.Signature:
    """A module's own; of a wrapper that takes anything, such as DistributedDataParallel, that of what it wraps."""
    signature = inspect.signature(module.forward)
    inner = wrapped(module)
    inner = getattr(module, "module", None) if inner is None else inner  # a user's own wrapper mostly calls it so
    takes_anything = all(parameter.kind in _VARIADIC for parameter in signature.parameters.values())
    return _signature(inner) if takes_anything and isinstance(inner, nn.Module) else signature


def _sizes(arguments: Mapping[str, Any], stream: Stream) -> tuple[int, int | None]:
    """(B, S or None) of a call's main input: the token ids, the embeddings, else the first tensor.

    Integers [B, S] are token ids, floats [B, S, D] embeddings; anything else has samples along dim 0 and no tokens.
    """
    named = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    main = next((x for x in (*named, *arguments.values()) if isinstance(x, Tensor)), None)
    if main is None or main.dim() == 0:
        raise SiteError(
            "the model was called without a tensor that has samples along dim 0, so the batch's size isn't known: pass "
            "the input as a tensor."
        )
    if stream.patches:
        return main.shape[0], None
    has_tokens = main.dim() == (3 if main.is_floating_point() else 2)
    if not has_tokens:
        return main.shape[0], None
    return (main.shape[1], main.shape[0]) if stream.seq_first else (main.shape[0], main.shape[1])
