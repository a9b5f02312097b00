"""From images and models to the maps that a page or a sheet shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad import maps
from nopad.encoder import PackedEncoder
from nopad.loading import load
from nopad.packing import Pack
from nopad.preprocessing.decode import ImageError, load_image
from nopad.preprocessing.formats import VIDEO_SUFFIXES
from nopad.preprocessing.size import Size

KINDS = ("pca", "similarity", "norms", "attention")


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one layer over one image.

    Attributes:
        layer: index, from 0.
        tokens: `(h, w, D)` float32, normed.
        pca: `(h, w, 3)` from 0 to 1; one basis for all images.
        norms: `(h, w)`.
        attention: `(h, w)`, the mean of all heads; `None` where it was not requested.
    """

    layer: int
    tokens: Tensor
    pca: Tensor
    norms: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class ModelMaps:
    """Maps of one model over one image.

    Attributes:
        model: the model as it was named.
        query: the query whose attention is shown: `"cls"` or `"pooled"`, `None` where none is.
        box: `[x0, y0, x1, y1]` in pixels of the image that the patches cover.
        layers: see `LayerMaps`.
    """

    model: str
    query: str | None
    box: tuple[float, float, float, float]
    layers: tuple[LayerMaps, ...]


@dataclass(frozen=True)
class ViewedImage:
    """An image and the maps of each model over it."""

    name: str
    image: Image.Image
    models: tuple[ModelMaps, ...]


def view_images(
    images: Sequence[str | Path],
    models: Sequence[str | PackedEncoder],
    *,
    kinds: Sequence[str] | None = None,
    layers: Sequence[int] = (-1,),
    size: Size = "native",
    max_patches: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> list[ViewedImage]:
    """Run the models on the images, one model after another.

    Args:
        images: files.
        models: encoders, or names as `nopad.load` takes them.
        kinds: some of `KINDS`; all that the models have by default.
        layers: indices of layers, from 0 or from the end.
        size, max_patches: as `PackedEncoder.pack` takes them.
        progress: called with what is being done.
        options: further arguments of `nopad.load`.

    Raises:
        ImageError: an image that cannot be used, or a video.
        ValueError: an unknown kind, a layer that there is not, attention of a model that has no query for it.
        OSError: a model that is not there.
    """
    check_kinds(kinds)
    if not images or not models:
        raise ValueError(f"expected an image and a model or more, got {len(images)} and {len(models)}")
    if videos := [image for image in images if Path(image).suffix.lower() in VIDEO_SUFFIXES]:
        raise ImageError(
            str(videos[0]), "a video, expected an image; take frames out of it first, with ffmpeg for example"
        )
    pixels = [load_image(image) for image in images]
    seen: list[list[ModelMaps]] = [[] for _ in images]
    for model in models:
        if not isinstance(model, PackedEncoder):
            progress(f"loading {model}")
        encoder = model if isinstance(model, PackedEncoder) else load(model, **options)
        name = (encoder.source or type(encoder).__name__) if isinstance(model, PackedEncoder) else model
        progress(f"running {name}")
        pack = _pack(encoder, images, pixels, size=size, max_patches=max_patches)
        for of_image, model_maps in zip(seen, _maps(name, encoder, pack, kinds, layers), strict=True):
            of_image.append(model_maps)
    decoded = [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in pixels]
    parts = zip(images, decoded, seen, strict=True)
    return [ViewedImage(Path(path).name, image, tuple(of_image)) for path, image, of_image in parts]


def _pack(encoder: PackedEncoder, names: Sequence[str | Path], pixels: Sequence[Tensor], **options: Any) -> Pack:
    """One pack of all images; an error has the image's file."""
    packs = []
    for name, image in zip(names, pixels, strict=True):
        try:
            packs.append(encoder.pack([image], **options))
        except ImageError as error:
            raise ImageError(str(name), error.reason) from error
    return Pack.cat(packs)


def check_kinds(kinds: Sequence[str] | None) -> None:
    """Raise `ValueError` unless all are known."""
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"kind: expected one or more of {', '.join(KINDS)}, got {kind!r:.80}")


@torch.inference_mode()
def _maps(
    name: str, encoder: PackedEncoder, pack: Pack, kinds: Sequence[str] | None, layers: Sequence[int]
) -> list[ModelMaps]:
    query = _query(name, encoder, kinds)
    features = encoder.features(pack, layers, prefix=False)
    chosen = encoder.layer_indices(layers)
    attention: list[Tensor | None] = [None] * len(pack)
    if query == "cls":
        attention = [each.mean(1).cpu() for each in encoder.attention(pack, layers)]
    elif query == "pooled":
        attention = [each.mean(0)[None].cpu() for each in encoder.attention(pack, queries="pooled")]
    tokens = [each.tokens[:, 0].float().cpu() for each in features]
    per_layer = [maps.pca([of_image[place] for of_image in tokens]) for place in range(len(chosen))]
    assert pack.boxes is not None
    model_maps = []
    for index, (of_image, box) in enumerate(zip(tokens, pack.boxes.tolist(), strict=True)):
        of_layers = []
        for place, layer in enumerate(chosen):
            weights = attention[index]
            if weights is not None:
                # The head reads the last layer alone.
                of_layer = place if query == "cls" else 0 if layer == len(encoder.layers) - 1 else None
                weights = None if of_layer is None else weights[of_layer, 0]
            one = of_image[place]
            of_layers.append(LayerMaps(layer, one, per_layer[place][index], maps.norms([one])[0], weights))
        model_maps.append(ModelMaps(name, query, tuple(box), tuple(of_layers)))
    return model_maps


def _query(name: str, encoder: PackedEncoder, kinds: Sequence[str] | None) -> str | None:
    """The query whose attention is shown."""
    if kinds is not None and "attention" not in kinds:
        return None
    query = "cls" if encoder.num_prefix_tokens else "pooled" if encoder.head is not None else None
    if query is None and kinds is not None:
        raise ValueError(f"kind: {name} has no attention to show, neither of a CLS token nor of a pooling head")
    return query


def shown_kinds(images: Sequence[ViewedImage], kinds: Sequence[str] | None) -> list[str]:
    """The kinds to show: those requested, else all that there are."""
    if kinds is not None:
        return list(dict.fromkeys(kinds))
    has = any(layer.attention is not None for image in images for model in image.models for layer in model.layers)
    return [kind for kind in KINDS if kind != "attention" or has]


def sheet(images: Sequence[ViewedImage], kinds: Sequence[str], side: int = 320) -> Image.Image:
    """One image: a row for each image, a column for it and for each kind of each model, of the last layer shown.

    Similarity is to the patch in the middle, which is marked.
    """
    from PIL import ImageDraw

    rows = [[(each.name, each.image.copy()), *_columns(each, kinds)] for each in images]
    for cells in rows:
        for _, image in cells:
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
    gap, label = 8, 18
    heights = [max(image.height for _, image in cells) + label + gap for cells in rows]
    result = Image.new("RGB", (max(map(len, rows)) * (side + gap) + gap, sum(heights) + gap), "white")
    draw, top = ImageDraw.Draw(result), gap
    for cells, height in zip(rows, heights, strict=True):
        for column, (text, image) in enumerate(cells):
            left = gap + column * (side + gap)
            draw.text((left, top), text, fill="black")
            result.paste(image, (left, top + label))
        top += height
    return result


def _columns(viewed: ViewedImage, kinds: Sequence[str]) -> list[tuple[str, Image.Image]]:
    cells = []
    for model in viewed.models:
        layer, short = model.layers[-1], model.model.rsplit("/", 1)[-1]
        for kind in kinds:
            values: Any = None
            if kind == "similarity":
                h, w = layer.tokens.shape[:2]
                values = np.array(maps.colours(maps.similarity([layer.tokens], layer.tokens[h // 2, w // 2])[0]))
                values[h // 2, w // 2] = 255
            elif kind == "attention":
                values = layer.attention
            else:
                values = getattr(layer, kind)
            if values is not None:
                cells.append((f"{short}: {kind}", maps.overlay(viewed.image, values, model.box)))
    return cells
