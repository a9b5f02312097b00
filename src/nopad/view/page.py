"""The page of `nopad view`: images with maps over them, in one file without a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad import html, maps
from nopad.view.images import LayerMaps, ModelMaps, ViewedImage
from nopad.view.projection import Projection, in_8_bits

MAX_BYTES = 1_000_000
"""Bytes of an image on the page."""
SIDE = 800
"""Longest side of an image on the page, in pixels."""
MAX_DIRECTIONS, MIN_DIRECTIONS = 64, 8
_ABOUT = {
    "pca": "Principal components: the three directions in which the tokens of all images differ most, as red, green "
    "and blue. The same colour is the same feature in every image.",
    "similarity": "Similarity: the cosine of every patch to the one pointed at; the least similar patch is darkest.",
    "norms": "Norms: the length of each token, from the shortest to the longest of its image.",
    "attention": "Attention: how much each patch counts for the CLS token, or for the head that pools; mean of all "
    "heads.",
}
_STYLE = """<style>
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; padding: .75rem 0;
  background: var(--paper); border-bottom: 1px solid var(--rule); font-size: .875rem; align-items: center }
.controls fieldset { border: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem } .controls label { cursor: pointer }
.controls input[type=range] { width: 8rem; vertical-align: middle } .models { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.models canvas { max-width: 100%; max-height: 85vh; display: block; touch-action: none;
  cursor: crosshair; border-radius: 3px }
.models canvas:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px }
.models output { display: block; font-size: .875rem; color: var(--muted); min-height: 3.2em }
[data-about] { margin-top: .75rem }
</style>"""


def view_page(images: Sequence[ViewedImage], kinds: Sequence[str]) -> str:
    """The whole page.

    Raises:
        ValueError: more patches and layers than `MAX_BYTES` of an image have room for.
    """
    layers = max((model.layers for viewed in images for model in viewed.models), key=len)
    data = {
        "kinds": list(kinds),
        "layers": [layer.layer for layer in layers],
        "colours": maps.colours(np.linspace(0, 1, 9), 0, 1).tolist(),
        "pictures": [_viewed(viewed) for viewed in images],
    }
    directions = min(_num_directions(viewed) for viewed in images)
    parts = [_STYLE, html.element("h1", _title(images)), _controls(kinds, len(layers)), *_about(kinds, directions)]
    parts += [_section(number, viewed) for number, viewed in enumerate(images)]
    parts.append("<noscript><p>This page draws its maps with JavaScript.</p></noscript>")
    parts += [html.data(data), html.script("nopad.view", "page.js")]
    return html.page(_title(images), parts)


def _title(images: Sequence[ViewedImage]) -> str:
    names = " and ".join(model.model for model in images[0].models)
    return f"{len(images)} image{'' if len(images) == 1 else 's'} by {names}"


def _controls(kinds: Sequence[str], num_layers: int) -> str:
    choices = "".join(
        f'<label><input type="radio" name="kind" value="{kind}"{" checked" if not place else ""}> {kind}</label>'
        for place, kind in enumerate(kinds)
    )
    hidden = " hidden" if num_layers == 1 else ""
    layer = (
        f'<input type="range" id="layer" min="0" max="{num_layers - 1}" value="{num_layers - 1}" aria-label="layer">'
    )
    opacity = '<input type="range" id="opacity" min="0" max="1" step="0.05" value="0.6">'
    return (
        f'<form class="controls"><fieldset><legend hidden>what is shown</legend>{choices}</fieldset>'
        f'<label{hidden}><span id="layer-name" aria-live="polite">layer</span> {layer}</label>'
        f"<label>opacity {opacity}</label></form>"
    )


def _about(kinds: Sequence[str], directions: int) -> list[str]:
    about = dict(_ABOUT)
    about["similarity"] += f" Computed from the {directions} strongest directions of the tokens."
    return [f'<p data-about="{kind}">{html.escape(about[kind])}</p>' for kind in kinds]


def _section(number: int, viewed: ViewedImage) -> str:
    figures = []
    scale = min(1.0, SIDE / max(viewed.image.size))
    width, height = (max(round(side * scale), 1) for side in viewed.image.size)
    for place, model in enumerate(viewed.models):
        h, w = model.layers[0].pca.shape[:2]
        label = f"{viewed.name} by {model.model}: {h} by {w} patches. Arrow keys choose a patch."
        canvas = f'<canvas tabindex="0" role="application" width="{width}" height="{height}"'
        figures.append(
            f'<figure data-picture="{number}" data-model="{place}">{canvas} aria-label="{html.escape(label)}"></canvas>'
            f"<figcaption>{html.escape(model.model)}<span>{h} × {w} patches</span></figcaption>"
            f'<output aria-live="polite"></output></figure>'
        )
    return html.section(viewed.name, f'<div class="models">{"".join(figures)}</div>')


def _viewed(viewed: ViewedImage) -> dict[str, Any]:
    directions = _num_directions(viewed)
    data = {
        "source": f"data:image/jpeg;base64,{_text(html.jpeg(viewed.image, SIDE, 80))}",
        "models": [_model(model, viewed.image, directions) for model in viewed.models],
    }
    assert len(json.dumps(data)) <= MAX_BYTES
    return data


def _num_directions(viewed: ViewedImage) -> int:
    """Directions of the tokens that there is room for.

    Raises:
        ValueError: for too few.
    """
    patches = sum(layer.norms.numel() for model in viewed.models for layer in model.layers)
    room = (MAX_BYTES - 50_000 - len(html.jpeg(viewed.image, SIDE, 80)) * 4 // 3) * 3 // 4
    directions = min(MAX_DIRECTIONS, room // patches - 5)
    if directions < MIN_DIRECTIONS:
        raise ValueError(
            f"{viewed.name}: {patches} patches in all its layers and models are more than a page has room for; show "
            f"fewer layers, or less with max_patches"
        )
    return min(directions, viewed.models[0].layers[0].tokens.shape[-1])


def _model(model: ModelMaps, image: Image.Image, directions: int) -> dict[str, Any]:
    h, w = model.layers[0].pca.shape[:2]
    width, height = image.size
    x0, y0, x1, y1 = model.box
    return {
        "rows": h,
        "columns": w,
        "box": [x0 / width, y0 / height, x1 / width, y1 / height],
        "layers": [_layer(layer, directions) for layer in model.layers],
    }


def _layer(layer: LayerMaps, directions: int) -> dict[str, Any]:
    low, high = float(layer.norms.min()), float(layer.norms.max())
    vectors = Projection.of(layer.tokens.flatten(0, 1).numpy()).strongest(directions)
    share = 0.0 if layer.attention is None else float(layer.attention.max())
    return {
        "pca": _levels(layer.pca),
        "norms": _levels((layer.norms - low) / max(high - low, 1e-12)),
        "range": [low, high],
        "attention": None if layer.attention is None else _levels(layer.attention / max(share, 1e-12)),
        "share": share,
        "directions": _text(in_8_bits(vectors).tobytes()),
    }


def _levels(values: Tensor) -> str:
    return _text((values.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy().tobytes())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
