"""Which samples and tokens a forward pass has, in each part of the model that has texts of its own.

Such a part is a *stream*: most models have one, an encoder-decoder has two, a vision tower is another. Each has its own
length and its own mask, and no other's, fitting or not.

Legend of names: b samples of a batch, s tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcache.errors import SiteError
from distcache.families import wrapped
from distcache.generation import Generation, token_ids_of
from distcache.ledger import samples_of
from distcache.tokens import Batch

Mask = Tensor | Callable[[dict[str, Any]], Tensor] | Mapping[str, Tensor]
PADDING = {  # keywords of padding masks [B, S], and whether they say which tokens are valid, or which are not
    "attention_mask": True,
    "src_key_padding_mask": False,
    "tgt_key_padding_mask": False,
    "key_padding_mask": False,
}
_OF_PICTURES = dict.fromkeys(("attention_mask", "pixel_attention_mask", "patch_attention_mask", "pixel_mask"), True)
_INPUTS = {  # what a model of transformers calls its main input, if that isn't a text
    **dict.fromkeys(("pixel_values", "pixel_values_videos"), "pictures"),
    **dict.fromkeys(("input_features", "input_values"), "sounds"),
}
_TEXTS = ("input_ids", "inputs_embeds")
_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A part of a model that has texts of its own: its tokens are as many as its input's, its padding is its mask's.

    `name`: "" of the model itself, "encoder" and "decoder" of its parts, else the part's path.
    `of`: what its input is. Of "pictures" values [B, T, D] have T tokens, of "sounds" those for which a site says so.
    An encoder-decoder is "two": it has no texts but those of its parts.
    `seq_first`: values of the input are [S, B, D].
    """

    name: str
    module: nn.Module = field(repr=False)
    of: Literal["texts", "pictures", "sounds", "two"] = "texts"
    seq_first: bool = False

    @property
    def side(self) -> str:
        """The end of its name: "encoder" and "decoder" are the sides of a model that has both."""
        return self.name.rpartition(".")[2]

    @property
    def goes_on(self) -> bool:
        """Whether later passes of a text are fed what is new of it; an encoder is fed whole texts."""
        return self.name == "" or (self.of == "texts" and self.side != "encoder")


def find_streams(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[Stream]:
    """The streams of a model, its own first. `modules`: its parts by their paths."""
    found: dict[int, Stream] = {}  # by the id of its module

    def add(name: str, module: nn.Module, of: Any) -> None:
        found.setdefault(id(module), Stream(name, module, of, _seq_first(module)))

    for path, module in {**modules, "": model}.items():
        sides = _sides(module)
        if sides is not None and not any(id(side) in found for side in sides):
            add(path, module, "two")
            for name, side in zip(("encoder", "decoder"), sides, strict=True):
                add(f"{path}.{name}" if path else name, side, _kind(side))
        elif not path or _kind(module) != "texts":
            add(path, module, _kind(module))
    return list(found.values())


def _sides(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The encoder and the decoder of a module that has both, beside each other."""
    if isinstance(module, nn.Transformer):
        return module.encoder, module.decoder
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    encoder, decoder = (getattr(module, f"get_{side}", lambda: None)() for side in ("encoder", "decoder"))
    if encoder is None or decoder is None or encoder in decoder.modules() or decoder in encoder.modules():
        return None
    return encoder, decoder


def _kind(module: nn.Module) -> str:
    name = getattr(module, "main_input_name", None)
    return _INPUTS.get(name, "texts") if isinstance(name, str) else "texts"


def _seq_first(module: nn.Module) -> bool:
    if not isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return False
    return not module.layers[0].self_attn.batch_first  # type: ignore[union-attr]


# -- what a forward pass was called with -----------------------------------------------------------------------


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

    def mask_of(self, stream: Stream, arguments: dict[str, Any]) -> tuple[Any, bool]:
        """The mask for a stream that was called so, and whether it says which tokens are valid; (None, True): none."""
        mask = self.mask
        if isinstance(mask, Mapping):
            mask = mask.get(stream.name, None if stream.name else mask)
        elif mask is not None and stream.name in ("encoder", "decoder"):
            raise SiteError(
                "an encoder-decoder has two masks, and this one would fit either by chance: give "
                "mask={'encoder': mask_bs, 'decoder': mask_bs}, or leave it to the model's own."
            )
        elif stream.name:
            mask = None
        if mask is not None:
            return (mask(arguments) if callable(mask) else mask), True
        for name, valid in (_OF_PICTURES if stream.of == "pictures" else PADDING).items():
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
    held: int | None = None,
) -> Batch:
    """The batch of a call `stream.module(*args, **kwargs)`. `SiteError` where mask, index or columns don't fit it.

    `generation`: what this stream has seen before; it is brought up to date. `samples`: of the pass, where another
    stream has told them. `held`: see `tokens_held`.
    """
    arguments = bound_arguments(stream.module, args, kwargs)
    main = _main_input(arguments)
    if any(main is arguments.get(name) for name in _TEXTS):
        stream = replace(stream, of="texts")  # of a model that may be shown pictures too
    num_samples, num_tokens = _sizes(main, stream)
    if samples is None:
        samples = given.samples(num_samples)
    elif len(samples) != num_samples:
        raise SiteError(
            f"the model's part {stream.name or 'itself'!r} runs on {num_samples} samples, where the batch has "
            f"{len(samples)}: which are whose isn't known. Record that part alone, or hook a module outside of it."
        )
    are_ids = num_tokens is not None and not main.is_floating_point() and main.dtype != torch.bool
    ids = main.detach().cpu() if are_ids else None
    columns, before_b, step = given.columns, None, None
    if generation is not None and generation.num_seen:
        assert num_tokens is not None
        valid = _later_mask(stream, arguments, given, generation, num_samples, num_tokens)
        valid, before_b = generation.go_on(ids, valid, num_samples, num_tokens, held)
        step = generation.step
        columns = {name: column for name, column in columns.items() if torch.as_tensor(column).dim() == 1}
    else:
        valid = _first_mask(stream, arguments, given, generation, ids, num_samples, num_tokens)
        if generation is not None and num_tokens is not None:
            generation.begin(valid, num_samples, num_tokens, held)
            step = 0 if generation.steps else None
    beside = _columns(columns, stream, num_samples, num_tokens)
    if ids is not None and (given.token_id or step is not None):
        beside.setdefault("token_id", ids)
    return Batch(
        num_samples,
        num_tokens,
        valid,
        samples,
        given.index is not None,
        beside,
        before_b,
        step,
        patches=stream.of == "pictures",
    )


def _first_mask(
    stream: Stream,
    arguments: dict[str, Any],
    given: Given,
    generation: Generation | None,
    ids: Tensor | None,
    num_samples: int,
    num_tokens: int | None,
) -> Tensor | None:
    """Which tokens of a pass that begins texts are valid, bool [B, S] on the CPU; None where all are."""
    if given.mask is None and generation is not None and generation.mask_bs is not None:
        mask, says_valid = generation.mask_bs, True
    else:
        mask, says_valid = given.mask_of(stream, arguments)
    if mask is None:
        _check_padding(stream, ids)
        return None
    if stream.of != "texts" and isinstance(mask, Tensor) and mask.dim() > 1:
        mask = mask.flatten(1)  # its tokens are those that values will be said to have
        num_tokens = mask.shape[1]
    return _valid(mask, says_valid, num_samples, num_tokens)


def _later_mask(
    stream: Stream,
    arguments: dict[str, Any],
    given: Given,
    generation: Generation,
    num_samples: int,
    num_tokens: int,
) -> Tensor | None:
    """The same of a pass that goes on, by the model's own mask of all tokens so far, if it's shown one."""
    mask, says_valid = (None, True) if given.mask is not None else given.mask_of(stream, arguments)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    total = generation.num_seen + num_tokens
    if mask.shape[1] in (total, generation.virtual + total):
        return _valid(mask[:, -num_tokens:], says_valid, num_samples, num_tokens)
    if generation.steps:  # `generate` makes masks of its own, and pads nothing from now on
        return None
    raise SiteError(
        f"the mask {tuple(mask.shape)} doesn't fit the {total} tokens that each text has so far: every one of them "
        "needs an entry, or give record(…, mask=mask_bs) for the prompts'."
    )


def _main_input(arguments: Mapping[str, Any]) -> Tensor:
    """A call's main input: the token ids, the embeddings, else the first tensor that is no mask. `SiteError`."""
    named = [arguments.get(name) for name in _TEXTS]
    others = [value for name, value in arguments.items() if name not in PADDING]
    main = next((x for x in (*named, *others) if isinstance(x, Tensor)), None)
    if main is None or main.dim() == 0:
        raise SiteError(
            "the model was called without a tensor that has samples along dim 0, so the batch's size isn't known: pass "
            "the input as a tensor."
        )
    return main


def _sizes(main: Tensor, stream: Stream) -> tuple[int, int | None]:
    """(B, S or None) of a main input: integers [B, S] are token ids, floats [B, S, D] embeddings; anything else, and
    what isn't texts, has samples along dim 0 and no tokens.
    """
    if stream.of != "texts" or main.dim() != (3 if main.is_floating_point() else 2):
        return main.shape[0], None
    return (main.shape[1], main.shape[0]) if stream.seq_first else (main.shape[0], main.shape[1])


def _check_padding(stream: Stream, ids: Tensor | None) -> None:
    """`SiteError` where texts begin or end with padding that no mask tells of: it would count."""
    config = getattr(stream.module, "config", None)
    pad, eos, bos = (token_ids_of(getattr(config, f"{name}_token_id", None)) for name in ("pad", "eos", "bos"))
    if ids is None or not pad or ids.shape[1] < 2:
        return
    is_pad = torch.isin(ids, torch.tensor(sorted(pad)))
    may_be_one = pad & (eos | bos) or stream.side == "decoder"  # an end, or a decoder's start
    least = 2 if may_be_one else 1
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
    mask = mask.detach().cpu()
    adds_to_scores = mask.is_floating_point() and bool((mask < 0).any())
    if adds_to_scores and says_valid:
        raise SiteError(
            "the mask has negative numbers, as one that is added to scores, where 0 is a valid token. Give one that is "
            "non-zero for valid tokens: record(…, mask=mask_bs == 0)."
        )
    valid_bs = mask == 0 if not says_valid else mask != 0
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
