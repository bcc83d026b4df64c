"""What is known of texts that a model generates, from one pass over them to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcache.errors import SiteError

SOME = -1  # tokens in a cache that doesn't tell how many

_OTHER_PASSES = {  # options that make other passes than one for each token, and the value that makes none
    **dict.fromkeys(("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")),
    "prefill_chunk_size": None,
    "guidance_scale": 1,
}


@dataclass(slots=True, eq=False)
class Generation:
    """The tokens that one stream has seen in earlier passes over the same samples: of the prompt, and generated.

    `ends`: the ids that end a text. What a model is fed for it from its end on counts nowhere, because it's there only
    for as long as other texts of the batch go on. `steps`: whether the prompt's rows know their step. `mask_bs`: of
    the prompt's tokens, where the model may be shown another. `num_seen`: tokens of each text so far, valid or not.
    `virtual`: tokens that were in the cache before the prompt, a prefix that was learned. `step`: passes since the
    prompt's. `length_b`: valid tokens so far, int64 [B]. `ended_b`: bool [B].
    """

    ends: frozenset[int] = frozenset()
    steps: bool = False
    mask_bs: Tensor | None = None
    num_seen: int = 0
    virtual: int = 0
    step: int = 0
    length_b: Tensor | None = None
    ended_b: Tensor | None = None

    def begin(self, valid_bs: Tensor | None, num_samples: int, num_tokens: int, held: int | None = None) -> None:
        """The pass over the prompts; `valid_bs`: None where all their tokens are valid; `held`: see `tokens_held`."""
        self.length_b = torch.full((num_samples,), num_tokens) if valid_bs is None else valid_bs.sum(1)
        self.ended_b = torch.zeros(num_samples, dtype=torch.bool)
        self.num_seen, self.virtual = num_tokens, held or 0

    def go_on(
        self, ids: Tensor | None, valid_bs: Tensor | None, num_samples: int, num_tokens: int, held: int | None
    ) -> tuple[Tensor | None, Tensor]:
        """(valid, before): which of a further pass's tokens count, bool [B, S] or None for all; how many came before.

        A pass without a cache is fed whole texts again, of which only what is new counts. `ids`: int64 [B, S].
        `valid_bs`: which are valid by the pass's own mask. `held`: see `tokens_held`. `SiteError` for another batch,
        and where what was fed doesn't go on with what was seen.
        """
        assert self.length_b is not None and self.ended_b is not None
        if len(self.length_b) != num_samples:
            raise SiteError(
                f"a pass goes on with {num_samples} texts, where the one before had {len(self.length_b)}: beams, "
                "several sequences a sample and other batches' caches can't be told apart. Generate one sequence a "
                "sample."
            )
        again = self.num_seen if held is None and num_tokens > self.num_seen else 0
        remembers = held is None and num_tokens == 1  # in a way of its own
        if not again and not remembers and held not in (self.virtual + self.num_seen, SOME):
            raise SiteError(
                f"a pass feeds {num_tokens} more of each text's tokens and has {held or 0} in its cache, where "
                f"{self.num_seen} were recorded: these aren't the texts of the pass before, or not all of them. Record "
                "every pass over a text, from its beginning, and one batch after the other."
            )
        before_b = self.length_b
        valid = torch.ones(num_samples, num_tokens, dtype=torch.bool) if valid_bs is None else valid_bs
        if again:
            valid = valid & (torch.arange(num_tokens) >= again)
        if self.ends:
            if ids is None:
                raise SiteError("new tokens were fed as embeddings, so that the end of a text isn't known: feed ids.")
            ends = torch.isin(ids, torch.tensor(sorted(self.ends)))
            ends[:, :again] = False
            over = ends.cumsum(1) > 0
            valid = valid & ~(over | self.ended_b[:, None])
            self.ended_b = self.ended_b | over.any(1)
        self.step += 1
        self.length_b = before_b + valid.sum(1)
        self.num_seen += num_tokens - again
        return (None if bool(valid.all()) else valid), before_b


def begun(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, attention: bool = False) -> Generation:
    """What a call `model.generate(*args, **kwargs)` says of its texts: which ids end them, and the prompts' mask.

    `SiteError` where rows couldn't be told apart: beams, several sequences a sample, tokens that are tried and dropped,
    texts that were begun elsewhere; and of `attention` where keys change once they are written.
    """
    names = ("inputs", "generation_config")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    own = getattr(model, "generation_config", None)

    def option(name: str) -> Any:
        if name in given:  # None, too: no end, whatever the configurations say
            return given[name]
        found = (getattr(given.get("generation_config"), name, None), getattr(own, name, None))
        return next((value for value in found if value is not None), None)

    for name in ("num_beams", "num_return_sequences"):
        if (option(name) or 1) > 1:
            raise SiteError(
                f"recording generate with {name}={option(name)} isn't supported: a sample's rows would come several "
                "times, and beams swap places. Generate one sequence a sample."
            )
    for name, harmless in _OTHER_PASSES.items():
        if option(name) not in (None, False, harmless):
            raise SiteError(
                f"recording generate with {name} isn't supported: its passes aren't one for each token, of the samples "
                "as they were given. Leave it out."
            )
    if option("cache_implementation") == "paged":
        raise SiteError("recording generate with paged caches isn't supported: they pack samples. Take another.")
    quantized = "quantized" in f"{option('cache_implementation')} {type(given.get('past_key_values')).__name__}".lower()
    if attention and quantized:
        raise SiteError(
            "patterns of generate with a quantized cache aren't supported: it changes keys after they were read. Take "
            "another cache, or the prompts' patterns alone, record(…, phase='prompt')."
        )
    if tokens_held(given):
        raise SiteError(
            "generate was given a cache with tokens in it, of texts whose beginning wasn't recorded, so that positions "
            "and padding aren't known: generate from whole prompts, without past_key_values."
        )
    ends, pad = token_ids_of(option("eos_token_id")), token_ids_of(option("pad_token_id"))
    by_other_means = given.get("stopping_criteria") or option("stop_strings")
    fed_after = pad if ends and by_other_means else frozenset()  # padding, from a text's end on
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Generation(ends | fed_after, True)  # the mask is the encoder's, which is shown it
    mask = given.get("attention_mask")
    if mask is None:
        ids = given.get("input_ids", given.get("inputs"))
        # As transformers takes it: padding is what looks like it, unless it may be the end of a text.
        if isinstance(ids, Tensor) and not ids.is_floating_point() and pad and not pad & ends:
            mask = ~torch.isin(ids.cpu(), torch.tensor(sorted(pad)))
    return Generation(ends | fed_after, True, None if mask is None or mask.dim() != 2 else mask.detach().cpu() != 0)


def token_ids_of(found: Any) -> frozenset[int]:
    """The ids that `pad_token_id`, `eos_token_id`, … of a configuration gives: none, one or several."""
    return frozenset() if found is None else frozenset(map(int, torch.as_tensor(found).flatten().tolist()))


def tokens_held(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens of earlier passes are in the cache of transformers that a call is given; `SOME` where it doesn't
    tell how many, None where there is no cache.
    """
    held: int | None = None
    for value in arguments.values():
        length = getattr(value, "get_seq_length", None)
        if length is None:
            continue
        try:
            held = int(length())
        except ValueError:  # its layers keep no tokens, but a state of them
            held = SOME if getattr(value, "has_previous_state", bool)() else 0
        if held:
            return held
    return held
