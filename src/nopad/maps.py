"""Maps of tokens as arrays and images: principal components, similarity, norms, and any map over its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Box = Sequence[float] | Tensor
"""`[x0, y0, x1, y1]` in pixels of an image, as in `Pack.boxes`."""

SHARE = 0.01
"""Share of the values at each end that are cut off where a range of colours is chosen."""

# Nine colours of matplotlib's viridis, evenly spaced, by Smith and van der Walt, CC0.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float32,
)


def pca(tokens: Sequence[Tensor], components: int = 3) -> list[Tensor]:
    """The first principal components of all images' tokens together, each from 0 to 1: three are colours.

    One basis and one range for all, so that the same colour is the same feature in every image. Of each component, 1 %
    of the values at each end are cut off. Its largest coefficient is positive, so that signs do not change by chance.

    Args:
        tokens: of each image `(…, D)`, such as `(t, h, w, D)`.
        components: number of components, at most D.

    Returns:
        Of each image `(…, components)` float32 from 0 to 1, on the CPU.

    Raises:
        ValueError: no tokens, tokens of different widths, or more components than values.
    """
    rows = _rows(tokens)
    width = rows.shape[1]
    if not 1 <= components <= width:
        raise ValueError(f"components: expected 1 to {width}, the values of a token, got {components}")
    centred = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # in rising order
    basis = vectors[:, -components:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    projected = centred @ basis
    low, high = (torch.from_numpy(np.quantile(projected.numpy(), share, axis=0)) for share in (SHARE, 1 - SHARE))
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    parts = scaled.split([part[..., 0].numel() for part in tokens])
    return [part.view(*image.shape[:-1], components) for part, image in zip(parts, tokens, strict=True)]


def similarity(tokens: Sequence[Tensor], query: Tensor) -> list[Tensor]:
    """The cosine of every token to a query.

    Args:
        tokens: tokens `(…, D)` of each image.
        query: `(D,)`, such as `tokens[0][0, row, column]`.

    Returns:
        Of each image `(…,)` float32 from -1 to 1, on the CPU.

    Raises:
        ValueError: no tokens, or a query of another width.
    """
    width = _rows(tokens).shape[1]
    if query.shape != (width,):
        raise ValueError(f"query: expected ({width},) values like a token, got {tuple(query.shape)}")
    query = query.detach().float().cpu()
    return [F.cosine_similarity(part.detach().float().cpu(), query, dim=-1) for part in tokens]


def norms(tokens: Sequence[Tensor]) -> list[Tensor]:
    """The length of every token: of each image `(…,)` float32, on the CPU.

    Raises:
        ValueError: no tokens, or tokens of different widths.
    """
    _rows(tokens)
    return [part.detach().float().cpu().norm(dim=-1) for part in tokens]


def colours(values: Any, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A map as colours, dark violet to yellow.

    Args:
        values: `(…)` finite numbers.
        low, high: the values of the darkest and the brightest colour; the 1st and the 99th percentile unless given.

    Returns:
        `(…, 3)` uint8.

    Raises:
        ValueError: no values, or values that are not finite.
    """
    array = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values, np.float32)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"values: expected finite numbers, got {array.dtype} {array.shape}")
    low = float(np.quantile(array, SHARE)) if low is None else low
    high = float(np.quantile(array, 1 - SHARE)) if high is None else high
    place = np.clip((array - low) / max(high - low, 1e-12), 0, 1) * (len(_VIRIDIS) - 1)
    below = np.minimum(place.astype(int), len(_VIRIDIS) - 2)
    share = (place - below)[..., None]
    return np.rint(_VIRIDIS[below] * (1 - share) + _VIRIDIS[below + 1] * share).astype(np.uint8)


def overlay(picture: Image.Image, values: Any, box: Box | None = None, opacity: float = 0.6) -> Image.Image:
    """A map over its image, each patch a rectangle.

    Args:
        picture: upright.
        values: `(h, w)` numbers, or `(h, w, 3)` colours: uint8, or from 0 to 1.
        box: the rectangle that the map covers, as in `Pack.boxes`; the whole image unless given.
        opacity: opacity of the map, 0 to 1.

    Raises:
        ValueError: another shape, or a box without area.
    """
    if not isinstance(picture, Image.Image):
        raise ValueError(f"picture: expected a PIL image, got {type(picture).__name__}")
    array = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values)
    if array.ndim == 2:
        array = colours(array)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"values: expected (h, w), or (h, w, 3) colours, got {array.shape}")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    whole = (0.0, 0.0, *map(float, picture.size))
    x0, y0, x1, y1 = (round(float(side)) for side in (whole if box is None else box))
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box: expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {[x0, y0, x1, y1]}")
    result = picture.convert("RGB")
    over = Image.fromarray(array).resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST)
    under = result.crop((x0, y0, x1, y1))
    result.paste(Image.blend(under, over, opacity), (x0, y0))
    return result


def _rows(tokens: Sequence[Tensor]) -> Tensor:
    """All tokens as `(T, D)` float64 on the CPU."""
    if not isinstance(tokens, Sequence | Tensor) or not all(isinstance(part, Tensor) for part in tokens):
        raise ValueError(f"tokens: expected a tensor (…, D) of each image, in a list, got {tokens!r:.80}")
    widths = sorted({part.shape[-1] for part in tokens if part.ndim})
    if len(widths) != 1 or not sum(part.numel() for part in tokens):
        raise ValueError(f"tokens: expected tensors (…, D) of one width, got {[tuple(part.shape) for part in tokens]}")
    return torch.cat([part.detach().cpu().double().reshape(-1, widths[0]) for part in tokens])
