"""unembed(): from a place in the residual stream to logits, as the model itself would go from the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distcache.errors import SiteError
from distcache.families import family_of, find_families, named_modules


def unembed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The way from the residual stream to logits: the final norm, the output embedding, and what else the model does.

    `unembed(model)(x)`: x [..., D] -> logits [..., V], on the model's device and in its dtype, with gradients where
    they are enabled. Of the last layer's `resid_out` these are the model's own logits, of an earlier one's those of the
    logit lens. BERT's blocks end with their own norm, so that its head (dense, activation, norm, embedding) is all.

    Not a collective. Call it outside of a `record` block that has these modules as sites. `SiteError` for a model of no
    known family, or without an output embedding.
    """
    modules = named_modules(model)
    families = find_families(model)
    in_decoder = any(family.stream == "decoder" for family in families)
    family = family_of(model, families, "decoder_resid_out" if in_decoder else "resid_out")
    owner, embedding, head = _head(model, modules)
    point = family.layout.points.get("final_norm_out")
    norm = family.modules.get(family.path(point.path), nn.Identity()) if point else nn.Identity()
    config: Any = getattr(owner, "config", None)
    weight = embedding.weight

    def logits_of(x: Tensor) -> Tensor:
        device = x.device if weight.is_meta else weight.device  # offloaded: whoever brings it in moves x too
        x = norm(x.to(device, weight.dtype if weight.is_floating_point() else x.dtype))
        if getattr(config, "scale_decoder_outputs", False):  # T5, if its embeddings are one
            x = x * owner.model_dim**-0.5
        logits = head(x)
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None) is not None:  # Gemma 2 and 3
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    return logits_of


def _head(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Any, Any, nn.Module]:
    """A model that has an output embedding, this embedding, and the module from the last norm to logits: it, or what
    stands around it (BERT's transform).
    """
    for owner in modules.values():
        find = getattr(owner, "get_output_embeddings", None)
        embedding = find() if callable(find) else None
        for path, module in modules.items():
            if module is embedding:
                around = modules[path.rpartition(".")[0]]
                return owner, embedding, embedding if around is owner else around
    raise SiteError(
        f"{type(model).__name__} has no output embedding that leads from the residual stream to logits: load it with "
        "its head, as by AutoModelForCausalLM."
    )
