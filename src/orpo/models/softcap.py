"""Soft caps on attention scores (Gemma 2), which scaled-dot-product attention cannot make."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def honour_soft_cap(model: Any) -> None:
    """Leave scaled-dot-product attention where the model caps its scores. Idempotent.

    transformers 5.17 picks it for Gemma 2 all the same and drops the cap without a word, so that every log-probability is another
    model's; later versions refuse.

    Args:
        model: a transformers model; anything else stays as it is.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation") or not hasattr(config, "get_text_config"):
        return
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if is_capped and getattr(config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation("eager")
        logger.debug("%s: plain attention, since scaled-dot-product attention has no soft cap", type(model).__name__)
