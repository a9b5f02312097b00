"""Where text towers of CLIP's kind pool: at the token that ends a text, the highest of the vocabulary."""

from __future__ import annotations

from typing import Any

HIGHEST_TOKEN = 2
"""An `eos_token_id` by which transformers' `CLIPTextModel` pools at the highest token of a text, as OpenAI's code."""


def check_tokenizer(text_config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that ends texts by another token than the tower pools at."""
    pooled = text_config.eos_token_id
    if text_config.model_type == "clip_text_model" and pooled == HIGHEST_TOKEN:
        pooled = len(tokenizer) - 1
    if tokenizer.eos_token_id != pooled:
        raise ValueError(
            f"its tokenizer ends texts by token {tokenizer.eos_token_id}, its text tower pools at token {pooled}"
        )
