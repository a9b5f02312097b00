"""How SigLIP2 and SigLIP take texts, and the sizes of their published text towers."""

from __future__ import annotations

from typing import Any

from nopad.text.rules import TextRules

_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 16, 24, 4096),
    "so400m": (1152, 16, 27, 4304),
    "giant-opt": (1152, 16, 27, 4304),
}


def _published(name: str) -> dict[str, Any]:
    size = name.split("-", 1)[1].split("-patch")[0]
    hidden_size, num_heads, num_layers, intermediate_size = _SIZES[size]
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 64,
        "projection_size": 1536 if size == "giant-opt" else hidden_size,
    }


def _lower_case(tokenizer: Any, text: str) -> str:
    """SigLIP2 was trained with text in lower case, which the tokenizers of many of its checkpoints (Gemma's) leave to
    the caller (arXiv:2502.14786, section 2.1; big_vision, `lower=True`). SigLIP's own tokenizer follows its files.
    """
    return text if type(tokenizer).__name__.startswith("SiglipTokenizer") else text.lower()


TEXT_RULES = TextRules(padding="max_length", published=_published, has_bos=False, normalize=_lower_case)
