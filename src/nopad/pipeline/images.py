"""`PackedEncoder.pack` and `embed`: from images to a pack, and to one vector each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.packing import Pack
from nopad.pipeline.pack_processor import PackProcessor, check_several
from nopad.pipeline.processor import rule_for
from nopad.pipeline.selection import Pool, Selection
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import MaxPatches
from nopad.preprocessing.load import load_snapshot, measure_snapshot, snapshot
from nopad.preprocessing.rules import Preprocessing, Resize
from nopad.preprocessing.size import Size

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def pack_images(
    encoder: PackedEncoder,
    images: Sequence[Any],
    *,
    size: Size | None = None,
    min_patches: int | None = None,
    max_patches: int | None = None,
    multiple_of: int | None = None,
    resize: Resize = "torch",
    preprocessing: Preprocessing | None = None,
) -> Pack:
    """Decode, resize, normalise and patchify.

    Args:
        images: paths, encoded bytes, PIL images, uint8 arrays `(H, W, 3)`, or clips `(frames, H, W, 3)`.
        size: `"model"` by the model's own rule, `"native"` as the images are, an integer for the pixels of the short
            side, aspect ratio kept and nothing cropped, `(height, width)` for both sides; as the encoder was loaded,
            unless given.
        min_patches, max_patches: limits of an image's patches; it is scaled in its aspect ratio. For sizes that
            leave room for them.
        multiple_of: rows and columns of patches are multiples of this.
        resize: `"pil"` is bit-exact with the original's processor, `"torch"` is faster and has nearly all
            values equal, the others within 2 grey levels.
        preprocessing: another rule than the model's own.

    Returns:
        A pack on the device and in the dtype of this encoder.

    Raises:
        ImageError: an image that cannot be used, by name and with the reason.
        ValueError: one image where several are expected, or an option that the rule cannot follow.
    """
    limits: dict[str, Any] = {"min_patches": min_patches, "max_patches": max_patches, "multiple_of": multiple_of}
    rule = rule_for(encoder, size, preprocessing=preprocessing, **limits)
    pack = PackProcessor.of(encoder, resize=resize, preprocessing=rule)(images)
    if preprocessing is not None:  # with another rule, the caller vouches for its statistics
        pack = dataclasses.replace(pack, mean=None, std=None)
    return pack.to(encoder.device)


def embed_images(
    encoder: PackedEncoder,
    images: Iterable[Any],
    *,
    size: Size | None = None,
    min_patches: int | None = None,
    max_patches: MaxPatches = "auto",
    multiple_of: int | None = None,
    capacity: int | None = None,
    resize: Resize = "torch",
    preprocessing: Preprocessing | None = None,
    threads: int | None = None,
    layers: Sequence[int] | None = None,
    pool: Pool = "model",
) -> Tensor:
    """One vector per image: the model's own, `image_embeds` where the checkpoint has a projection, else `pooled`.

    Files are decoded in threads and packed as they come, so any number of them goes in. Objects (PIL images, arrays)
    are taken when `images` yields them, and may change afterwards; files named by a path must stay as they are.

    Args:
        images: as `pack` takes them.
        size, min_patches, multiple_of, resize, preprocessing: as `pack` takes them.
        max_patches: maximum of an image's patches, in its aspect ratio: `"auto"` is 4,096 where the rule has no limit,
            so that one photo does not hold up all others; `None` is no limit but the rule's own.
        capacity: tokens per pack; a larger image gets a pack of its own. What the encoder is
            compiled for unless given, else 2,048 on a CPU, 16,896 on an H100.
        threads: number of threads that decode; one per core by default.
        pool: `"model"` for the model's own vector, `"cls"` for the CLS token, `"mean"` for the mean of the patches,
            `"cls+mean"` for both.
        layers: the layers whose normed tokens `pool` takes, from 0 or from the end, one vector behind the other; the
            last one by default.

    Returns:
        `(N, E)` or `(N, D)` float32, on the CPU; with layers and `"cls+mean"` that many times D.

    Raises:
        ImageError: the first image that cannot be used.
        ValueError: one image where several are expected.
    """
    limits: dict[str, Any] = {"min_patches": min_patches, "max_patches": max_patches, "multiple_of": multiple_of}
    rule = rule_for(encoder, size, preprocessing=preprocessing, **limits)
    check_several(images)
    selection = Selection(layers=None if layers is None else tuple(layers), pool=pool)
    options: dict[str, Any] = {"threads": threads, "resize": resize, "preprocessing": rule, "selection": selection}
    worker = Worker(encoder, capacity=capacity, **options)
    (results,) = worker.run([map(snapshot, images)], load_snapshot, measure=measure_snapshot, strict=True)
    for index, result in enumerate(results):
        if result.error is not None:  # features that are not finite, or too little memory
            raise ImageError(f"image {index}", result.error.reason)
    vectors = [torch.from_numpy(result.embedding) for result in results]
    return torch.stack(vectors) if vectors else torch.empty(0, selection.embedding_size(encoder), dtype=torch.float32)
