"""What is known of texts that a model generates, from one pass over them to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcache.errors import SiteError


@dataclass(slots=True, eq=False)
class Generation:
    """The tokens that one stream has seen in earlier passes over the same samples: of the prompt, and generated.

    `ends`: the ids that end a text. What a model is fed for it from its end on counts nowhere, because it's there only
    for as long as other texts of the batch go on. `steps`: whether the prompt's rows know their step. `mask_bs`: of
    the prompt's tokens, where the model may be shown another. `num_seen`: tokens of each text so far, valid or not.
    `step`: passes since the prompt's. `length_b`: valid tokens so far, int64 [B]. `ended_b`: bool [B].
    """

    ends: frozenset[int] = frozenset()
    steps: bool = False
    mask_bs: Tensor | None = None
    num_seen: int = 0
    step: int = 0
    length_b: Tensor | None = None
    ended_b: Tensor | None = None

    def begin(self, valid_bs: Tensor | None, num_samples: int, num_tokens: int) -> None:
        """The pass over the prompts; `valid_bs`: None where all of their tokens are valid."""
        self.length_b = torch.full((num_samples,), num_tokens) if valid_bs is None else valid_bs.sum(1)
        self.ended_b = torch.zeros(num_samples, dtype=torch.bool)
        self.num_seen = num_tokens

    def go_on(
        self, ids: Tensor | None, valid_bs: Tensor | None, num_samples: int, num_tokens: int
    ) -> tuple[Tensor | None, Tensor]:
        """(valid, before): which of a further pass's tokens count, bool [B, S] or None for all; how many came before.

        `ids`: int64 [B, S]. `valid_bs`: which are valid by the pass's own mask. `SiteError` for another batch.
        """
        assert self.length_b is not None and self.ended_b is not None
        if len(self.length_b) != num_samples:
            raise SiteError(
                f"a pass goes on with {num_samples} texts, where the one before had {len(self.length_b)}: beams, "
                "several sequences a sample and other batches' caches can't be told apart. Generate one sequence a "
                "sample."
            )
        before_b = self.length_b
        valid = torch.ones(num_samples, num_tokens, dtype=torch.bool) if valid_bs is None else valid_bs
        if self.ends:
            if ids is None:
                raise SiteError("new tokens were fed as embeddings, so that the end of a text isn't known: feed ids.")
            over = torch.isin(ids, torch.tensor(sorted(self.ends))).cumsum(1) > 0
            valid = valid & ~(over | self.ended_b[:, None])
            self.ended_b = self.ended_b | over.any(1)
        self.step += 1
        self.length_b = before_b + valid.sum(1)
        self.num_seen += num_tokens
        return (None if bool(valid.all()) else valid), before_b


def begun(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generation:
    """What a call `model.generate(*args, **kwargs)` says of its texts: which ids end them, and the prompts' mask.

    `SiteError` where rows couldn't be told apart: beams, several sequences a sample, tokens that are tried and dropped.
    """
    names = ("inputs", "generation_config")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    config = given.get("generation_config") or getattr(model, "generation_config", None)

    def option(name: str) -> Any:
        return given[name] if given.get(name) is not None else getattr(config, name, None)

    for name in ("num_beams", "num_return_sequences"):
        if (option(name) or 1) > 1:
            raise SiteError(
                f"recording generate with {name}={option(name)} isn't supported: a sample's rows would come several "
                "times, and beams swap places. Generate one sequence a sample."
            )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if option(name) is not None:
            raise SiteError(f"recording generate with {name} isn't supported: its passes aren't one for each token.")
    ends = token_ids_of(given if given.get("eos_token_id") is not None else config, "eos_token_id")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Generation(ends, True)  # the mask is the encoder's, which is shown it
    mask = given.get("attention_mask")
    if mask is None:
        ids, pad = given.get("input_ids", given.get("inputs")), token_ids_of(config, "pad_token_id")
        # As transformers takes it: padding is what looks like it, unless it may be the end of a text.
        if isinstance(ids, Tensor) and not ids.is_floating_point() and pad and not pad & ends:
            mask = ~torch.isin(ids.cpu(), torch.tensor(sorted(pad)))
    return Generation(ends, True, None if mask is None or mask.dim() != 2 else mask.detach().cpu() != 0)


def token_ids_of(config: Any, name: str) -> frozenset[int]:
    """The ids that a configuration gives for `pad_token_id`, `eos_token_id`, …: none, one or several."""
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if found is None:
        return frozenset()
    return frozenset(map(int, torch.as_tensor(found).flatten().tolist()))


def holds_tokens(arguments: Mapping[str, Any]) -> bool:
    """Whether a call is given a cache of transformers with tokens of earlier passes in it."""
    return any(map(_holds_tokens, arguments.values()))


def _holds_tokens(value: Any) -> bool:
    length = getattr(value, "get_seq_length", None)
    try:
        return length is not None and int(length()) > 0
    except ValueError:  # a first layer that keeps no tokens
        return False
