"""What an encoder does with pictures: pixels by the model's own rule, packs, vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad.checkpoints.pretrained import PretrainedEncoder
from nopad.packing import Pack, PatchOrder
from nopad.pipeline.worker import Worker
from nopad.preprocessing.config import read_preprocessor_config
from nopad.preprocessing.decode import ImageError, load, load_taken, take
from nopad.preprocessing.transforms import Preprocessing, Resize, preprocess

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


class PictureEncoder(PretrainedEncoder):
    """The sizes of an encoder, and the ways from pictures into it."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.config.patch_size**2 * self.config.num_channels

    @property
    def patch_order(self) -> PatchOrder:
        """Layout inside a patch."""
        return self.config.patch_order

    @property
    def hidden_size(self) -> int:
        """Values of a token."""
        return self.config.hidden_size

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels are made: by the checkpoint's own preprocessor config, else by the family's rule."""
        if self.preprocessor_config is None:
            return self.default_preprocessing
        return read_preprocessor_config(self.preprocessor_config, self.default_preprocessing)

    @property
    def default_preprocessing(self) -> Preprocessing:
        """The family's published rule, where a checkpoint does not bring its own."""
        raise NotImplementedError

    def pack(
        self,
        images: Sequence[Any],
        *,
        resize: Resize = "torch",
        max_patches: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Pack:
        """Decode, resize by the model's own rule, normalise and patchify.

        Args:
            images: paths, encoded bytes, PIL images, uint8 arrays `(H, W, 3)`, or clips `(frames, H, W, 3)`.
            resize: `"pil"` is bit-exact with the original's processor, `"torch"` is faster and 1–2 grey levels off.
            max_patches: a cap on the patches of an image, its aspect ratio kept.
            preprocessing: another rule than the model's own.

        Returns:
            A pack on the device and in the dtype of this encoder.

        Raises:
            ImageError: an image that cannot be used, by name and with the reason.
            ValueError: one image where several are expected.
        """
        _check_several(images)
        rule = preprocessing or self.preprocessing
        options: dict[str, Any] = {"resize": resize, "max_patches": max_patches}
        pixels = [preprocess(load(image), rule, self.patch_size, **options) for image in images]
        pack = Pack.of(
            pixels,
            self.patch_size,
            self.patch_order,
            # Of another rule the caller has said that this encoder is to take it.
            mean=rule.mean if preprocessing is None else None,
            std=rule.std if preprocessing is None else None,
            channels=self.config.num_channels,
            preprocessing=rule.describe(resize, max_patches),
        )
        return pack.to(self.device, self.dtype)

    def embed(
        self,
        images: Iterable[Any],
        *,
        capacity: int | None = None,
        resize: Resize = "torch",
        max_patches: int | None = None,
        preprocessing: Preprocessing | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """One vector per image: `image_embeds` where the checkpoint has a projection, else `pooled`.

        Files are decoded in threads and packed as they come, so any number of them goes in. Objects (PIL images,
        arrays) are taken when `images` yields them, and may change afterwards; files named by a path must stay as they
        are.

        Args:
            images: as `pack` takes them.
            capacity: tokens per pack; a larger image gets a pack of its own. 16384 unless given, on a CPU 2048.
            resize, max_patches, preprocessing: as `pack` takes them.
            threads: that decode; one per core unless given.

        Returns:
            `(N, E)` or `(N, D)` float32, on the CPU.

        Raises:
            ImageError: the first image that cannot be used.
            ValueError: one image where several are expected.
        """
        options: dict[str, Any] = {"resize": resize, "max_patches": max_patches, "preprocessing": preprocessing}
        _check_several(images)
        worker = Worker(cast("PackedEncoder", self), capacity=capacity, threads=threads, **options)
        (results,) = worker.run([map(take, images)], load_taken, strict=True)
        for number, result in enumerate(results):
            if result.error is not None:  # found by the encoder: features that are not finite, or too little memory
                raise ImageError(f"image {number}", result.error.reason)
        vectors = [torch.from_numpy(result.embedding) for result in results]
        return torch.stack(vectors) if vectors else torch.empty(0, self.embedding_size)

    @property
    def projection_dim(self) -> int | None:
        """Values of `image_embeds`, `None` where the checkpoint has no projection."""
        return None

    @property
    def embedding_size(self) -> int:
        """Values of the vector that `embed` gives for an image: E or D."""
        return self.projection_dim or self.hidden_size


def _check_several(images: Any) -> None:
    one = isinstance(images, np.ndarray | Tensor) and images.ndim < 4  # its rows would be taken for images
    if one or isinstance(images, str | bytes | Path | Image.Image):
        raise ValueError("images: expected several, got one; give it in a list")
