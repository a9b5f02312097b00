"""`PackedEncoder.embed_text`, `similarity` and `classify`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder
    from nopad.text.tower import TextTower

BATCH = 256
"""Texts that go through the tower at a time."""
TEMPLATE = "This is a photo of {}."


def embed_text(encoder: PackedEncoder, texts: Iterable[str]) -> Tensor:
    """One vector per text in the space of `embed`, as the original's `get_text_features`.

    The text tower is transformers' own class with the weights of the same checkpoint. It is loaded, strictly, when it
    is first used. Texts are cut to the number of tokens that the model was trained with.

    Returns:
        `(N, E)` float32, on the CPU.

    Raises:
        ValueError: a text that is none, one text where several are expected, or a checkpoint without a text tower.
        ImportError: the checkpoint's tokenizer needs a package that is not installed.
    """
    if isinstance(texts, str | bytes):
        raise ValueError("texts: expected several, got one; give it in a list")
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected a list of str, got {type(texts).__name__}")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: expected str, got {type(text).__name__}: {text!r:.80}")
    tower = _tower(encoder)
    with torch.inference_mode():
        vectors = [tower(texts[start : start + BATCH]).float().cpu() for start in range(0, len(texts), BATCH)]
    return torch.cat(vectors) if vectors else torch.empty(0, encoder.embedding_size, dtype=torch.float32)


def similarity(encoder: PackedEncoder, images: Any, texts: Any) -> Tensor:
    """How well texts fit images: the original's `logits_per_image`, by the checkpoint's own scale and bias.

    Args:
        images: as `embed` takes them, or `(N, E)` vectors that it has given, a float tensor or array.
        texts: as `embed_text` takes them, or `(L, E)` vectors that it has given.

    Returns:
        `(N, L)` float32, on the CPU.

    Raises:
        ImageError, ValueError, ImportError: see `embed` and `embed_text`; vectors of another width.
    """
    text_embeds = _vectors(encoder, "texts", texts)
    image_embeds = _vectors(encoder, "images", images)
    tower = _tower(encoder)
    with torch.inference_mode():
        return tower.logits(
            encoder.embed(images) if image_embeds is None else image_embeds,
            embed_text(encoder, texts) if text_embeds is None else text_embeds,
        ).cpu()


def _tower(encoder: PackedEncoder) -> TextTower:
    """See `text_tower`, whose module imports tokenizers and all that transformers needs for texts."""
    from nopad.text.tower import text_tower

    return text_tower(encoder)


def _vectors(encoder: PackedEncoder, name: str, value: Any) -> Tensor | None:
    """Vectors as float32 on the CPU, `None` for what is still to be embedded."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.ndim != 2 or value.shape[1] != encoder.embedding_size:
        raise ValueError(f"{name}: expected vectors (N, {encoder.embedding_size}), got {tuple(value.shape)}")
    return value.detach().float().cpu()


def classify(encoder: PackedEncoder, images: Any, labels: Sequence[str], *, template: str = TEMPLATE) -> Tensor:
    """How probable each label is for each image.

    Where the checkpoint has a `logit_bias` (SigLIP), each pair of image and label has a probability of its own: the
    sigmoid of their similarity. Elsewhere those of an image's labels sum to one: the softmax over them.

    Args:
        images: as `similarity` takes them.
        labels: words for what may be there.
        template: the text of a label, with `{}` where the label goes.

    Returns:
        `(N, L)` float32, on the CPU.

    Raises:
        ImageError, ValueError, ImportError: see `similarity`; also no label, or a template without `{}`.
    """
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f"labels: expected a list of words, got {labels!r:.80}")
    if "{}" not in template:
        raise ValueError(f"template: expected a text with {{}} where the label goes, got {template!r:.80}")
    logits = similarity(encoder, images, [template.replace("{}", label) for label in labels])
    return logits.softmax(dim=1) if _tower(encoder).logit_bias is None else logits.sigmoid()
