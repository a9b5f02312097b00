"""MoonViT's dialects: how transformers and Moonshot name its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nopad.checkpoints.conversions import NameTable, Rename, Reshape, halves_of_pairs, join_rows
from nopad.checkpoints.formats import Dialect

MOONSHOT_HEADS = 16
"""Heads of all models that Moonshot has published, in whose files the rows of queries and keys depend on them."""
_ROWS = halves_of_pairs(MOONSHOT_HEADS)


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    query, key, value = tensor.chunk(3)
    return *_ROWS.parts(query), *_ROWS.parts(key), value


def _whole(values: Sequence[Tensor | None]) -> Tensor:
    query, key, value = values
    assert value is not None
    return join_rows((_ROWS.whole([query]), _ROWS.whole([key]), value))


_BLOCK, _LAYER = "encoder.blocks.*", "layers.*"
_LINES = (
    Rename("patch_embed.pos_emb.weight", "patch_embed.pos_emb.position_embeddings"),
    Rename(f"{_BLOCK}.norm0.*", f"{_LAYER}.norm1.*"),
    Rename(f"{_BLOCK}.norm1.*", f"{_LAYER}.norm2.*"),
    Rename(
        f"{_BLOCK}.wqkv.*",
        *(f"{_LAYER}.attn.{part}_proj.*" for part in "qkv"),
        reshape=Reshape(_split, _whole),
    ),
    Rename(f"{_BLOCK}.wo.*", f"{_LAYER}.attn.proj.*"),
    Rename(f"{_BLOCK}.mlp.fc0.*", f"{_LAYER}.mlp.fc1.*"),
    Rename(f"{_BLOCK}.mlp.fc1.*", f"{_LAYER}.mlp.fc2.*"),
    Rename("encoder.final_layernorm.*", "final_layernorm.*"),
)
_BY_TRANSFORMERS = r"^encoder\.patch_embed\."

_SIGNATURE = r"^encoder\.blocks\.\d+\.(wqkv|wo|norm0|mlp\.fc0)\."
DIALECTS = (
    Dialect("transformers", r"^layers\.\d+\.attn\.[qkv]_proj\.", is_original=True),
    Dialect("Moonshot", _SIGNATURE, NameTable(*_LINES), excludes=(_BY_TRANSFORMERS,)),
    Dialect(  # Kimi K2.5 saved by transformers, which puts the patch embedding elsewhere
        "Moonshot by transformers",
        _SIGNATURE,
        NameTable(*_LINES, Rename("encoder.patch_embed.proj.*", "patch_embed.proj.*")),
        requires=(_BY_TRANSFORMERS,),
    ),
)
