"""How the text towers of a family take texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nopad.checkpoints.formats import Checkpoint


def _unchanged(tokenizer: Any, text: str) -> str:
    return text


def _config_json(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.config


def _any_tokenizer(text_config: Any, tokenizer: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """How the text half of a family's checkpoints takes its input.

    Its architecture is transformers' own: of the `text_model`, `text_projection`, `logit_scale` and `logit_bias` of the
    class that holds both towers.

    Attributes:
        padding: the argument of transformers' tokenizers; `"max_length"` pads to the positions that were learned.
        published: returns the fields of the text config of a published name, but for the vocabulary, for `untrained:`.
        has_bos: whether texts begin with a token of their own.
        normalize: of tokenizer and text, what is done to a text before it.
        config_fields: returns the fields of the config of both towers of a checkpoint, whose tensors have transformers'
            names.
        check_tokenizer: takes a text config and a tokenizer, and raises `ValueError` where they do not belong together.
        model_type: of transformers' model of both towers, where the encoder is of none.
        tokenizer: the checkpoint whose tokenizer is taken where a checkpoint has none beside its weights.
        attn_implementation: the attention of transformers' text model, where its default is not right.
    """

    padding: Literal["max_length", "longest"]
    published: Callable[[str], Mapping[str, Any]]
    has_bos: bool
    normalize: Callable[[Any, str], str] = _unchanged
    config_fields: Callable[[Checkpoint], Mapping[str, Any]] = _config_json
    check_tokenizer: Callable[[Any, Any], None] = _any_tokenizer
    model_type: str | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None
