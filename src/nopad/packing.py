"""Packs: the patches of many images and clips laid end to end, and the offsets that separate them.

Shape letters, here and everywhere: `T` patches or tokens in the pack, `N` images or clips, `S` segments,
`D` hidden size, `H` heads, `K` head size, `P` values of a patch, `C` colour channels.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nopad.merging import merged_lengths
from nopad.patches import PatchOrder, patchify


@dataclasses.dataclass(frozen=True)
class Pack:
    """Patches of several images or clips laid end to end, with what an encoder needs beside them.

    Attributes:
        hidden_states: `(T, P)` patches.
        grid_thw: `(N, 3)` int64 `[frames, rows, columns]`, on the CPU so that reading it stops no device. Where a patch
            has several frames, the first number counts patches along time.
        patch_size: side of a patch in pixels.
        patch_order: layout inside a patch.
        mean, std: the pixel statistics that the pixels were normalised with, one per channel; `None` where unknown.
        patch_positions: `(T, 3)` `[t, h, w]` of each patch where they are not the full grid, else `None`.
        preprocessing: how the pixels were made, in words that a table of features can carry; empty where unknown.
        boxes: `(N, 4)` float32 `[x0, y0, x1, y1]`, the rectangle that an image's grid covers, in pixels of the upright
            original; `None` where unknown.
        sizes: `(N, 2)` int64 `[height, width]` of the upright original; `None` where unknown.
        temporal_patch_size: frames of a patch.

    A pack is a sequence of its images: `len`, iteration, and indexing by an integer, a slice or a sequence of integers,
    each giving a pack; the patches of an integer and of a slice without a step are views. Packs are equal where all
    attributes are, values, dtypes and devices too. `torch.save` and `torch.load` take them.
    """

    hidden_states: Tensor
    grid_thw: Tensor
    patch_size: int
    patch_order: PatchOrder = "hwc"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    patch_positions: Tensor | None = None
    preprocessing: str = ""
    boxes: Tensor | None = None
    sizes: Tensor | None = None
    temporal_patch_size: int = 1

    @classmethod
    def of(
        cls,
        pixels: Sequence[Tensor],
        patch_size: int,
        patch_order: PatchOrder = "hwc",
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int = 3,
        preprocessing: str = "",
        temporal_patch_size: int = 1,
    ) -> Pack:
        """Patchify normalised images `(C, H, W)` and clips `(frames, C, H, W)` into one pack.

        Raises:
            ValueError: images of different numbers of channels; see also `patchify`.
        """
        parts = [patchify(image, patch_size, patch_order, temporal_patch_size) for image in pixels]
        if len({patches.shape[1] for patches, _ in parts}) > 1:
            raise ValueError(
                f"pixels: expected one number of channels for all, got {[image.shape[-3] for image in pixels]}"
            )
        empty = torch.empty(0, channels * temporal_patch_size * patch_size**2, dtype=torch.float32)
        return cls(
            hidden_states=torch.cat([patches for patches, _ in parts]) if parts else empty,
            grid_thw=torch.tensor([grid for _, grid in parts], dtype=torch.int64).reshape(-1, 3),
            patch_size=patch_size,
            patch_order=patch_order,
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
            preprocessing=preprocessing,
            temporal_patch_size=temporal_patch_size,
        )

    @classmethod
    def cat(cls, packs: Sequence[Pack]) -> Pack:
        """The images of several packs in one, in their order.

        Raises:
            ValueError: no pack, or packs that do not go through one encoder together: of different patch sizes, orders,
                statistics, dtypes or devices, or with `patch_positions` in some of them.
        """
        if not packs:
            raise ValueError("packs: expected at least one, got none")
        expected = _traits(packs[0])
        for index, pack in enumerate(packs):
            for name, value in _traits(pack).items():
                if value != expected[name]:
                    got = f"{expected[name]} and, in pack {index}, {value}"
                    raise ValueError(f"packs: expected one {name} for all, got {got}")
        joined = {name: _cat([getattr(pack, name) for pack in packs]) for name in _TENSORS}
        made = " | ".join(dict.fromkeys(pack.preprocessing for pack in packs if pack.preprocessing))
        return dataclasses.replace(packs[0], **joined, preprocessing=made)

    def __len__(self) -> int:
        return self.grid_thw.shape[0]

    def __iter__(self) -> Iterator[Pack]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Pack:
        numbers = list(range(*index.indices(len(self)))) if isinstance(index, slice) else _numbers(index)
        for number in numbers:
            if not -len(self) <= number < len(self):
                raise IndexError(f"pack: expected an image from {-len(self)} to {len(self) - 1}, got {number}")
        numbers = [number % len(self) for number in numbers]
        lengths = self.grid_thw.prod(1).tolist()
        starts = [0, *itertools.accumulate(lengths)]

        def take(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if numbers == list(range(numbers[0], numbers[0] + len(numbers)) if numbers else []):
                first, last = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
                return tensor[starts[first] : starts[last]]
            return torch.cat([tensor[starts[number] : starts[number + 1]] for number in numbers])

        per_image = {name: getattr(self, name) for name in ("grid_thw", "boxes", "sizes")}
        changes: dict[str, Any] = {
            name: None if tensor is None else tensor[numbers] for name, tensor in per_image.items()
        }
        changes |= {name: take(getattr(self, name)) for name in ("hidden_states", "patch_positions")}
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        clips = int((self.grid_thw[:, 0] > 1).sum())
        counts = [(len(self) - clips, "image"), (clips, "clip")] if clips else [(len(self), "image")]
        parts = [f"{number:,} {noun}{'' if number == 1 else 's'}" for number, noun in counts if number or not clips]
        number, size = self.hidden_states.shape[0], self.hidden_states.nbytes / 1e6
        frames = "" if self.temporal_patch_size == 1 else f" and {self.temporal_patch_size} frames"
        parts += [f"{number:,} patch{'' if number == 1 else 'es'} of {self.patch_size} px{frames}"]
        return f"Pack({', '.join(parts)}, {size:,.1f} MB on {self.hidden_states.device})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pack):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return all(_equal(mine, theirs) for mine, theirs in pairs)

    def __hash__(self) -> int:
        facts = (self.patch_size, self.patch_order, self.temporal_patch_size, self.mean, self.std, self.preprocessing)
        return hash((*facts, self.hidden_states.shape, self.grid_thw.shape))

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Pack:
        """The same pack with its patches on another device or in another dtype.

        Args:
            device: or a dtype alone, as `Tensor.to` takes it.

        Raises:
            ValueError: neither a device nor a floating-point dtype.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        try:
            device = None if device is None else torch.device(device)  # pyright: ignore[reportArgumentType] - a dtype raises
        except (RuntimeError, TypeError):
            raise ValueError(f"device: expected a device or a dtype, got {device!r:.80}") from None
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating-point torch.dtype, got {dtype!r:.80}")
        positions = self.patch_positions
        if positions is not None:
            positions = positions.to(device, non_blocking=non_blocking)
        hidden_states = self.hidden_states.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return dataclasses.replace(self, hidden_states=hidden_states, patch_positions=positions)

    def pin_memory(self) -> Pack:
        """The same pack with its patches in pinned memory, called by `torch.utils.data.DataLoader(pin_memory=True)`."""
        positions = None if self.patch_positions is None else self.patch_positions.pin_memory()
        return dataclasses.replace(self, hidden_states=self.hidden_states.pin_memory(), patch_positions=positions)

    def lengths(self, merge: int = 1) -> list[int]:
        """Tokens of each image or clip, after `nopad.merge` by `merge`: how often a text repeats its placeholder.

        Raises:
            ValueError: see `nopad.merge`.
        """
        return merged_lengths(self.grid_thw, merge, self.patch_positions)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Cut what an encoder gave for this pack into one `(frames, rows, columns, D)` view per image or clip.

        Raises:
            ValueError: not one row of tokens per patch.
        """
        grid = self.grid_thw.tolist()
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[0] != self.hidden_states.shape[0]:
            got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"tokens: expected ({self.hidden_states.shape[0]}, D), a row per patch of the pack, got {got}"
            )
        parts = tokens.split([t * h * w for t, h, w in grid])
        return [part.reshape(t, h, w, -1) for part, (t, h, w) in zip(parts, grid, strict=True)]


_TENSORS = ("hidden_states", "grid_thw", "patch_positions", "boxes", "sizes")


def _traits(pack: Pack) -> dict[str, Any]:
    """Properties that packs share which go through one encoder together."""
    names = ("patch_size", "patch_order", "temporal_patch_size", "mean", "std")
    traits = {name: getattr(pack, name) for name in names}
    traits |= {"dtype": pack.hidden_states.dtype, "device": pack.hidden_states.device}
    return traits | {"kind of patch_positions": "none" if pack.patch_positions is None else "some"}


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All of them in one; `None` where one is missing."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None


def _numbers(index: Any) -> list[int]:
    """The images that an index other than a slice names.

    Raises:
        TypeError: no integer and no sequence of integers.
    """
    numbers: Any = index.tolist() if isinstance(index, Tensor | np.ndarray) else index
    try:
        numbers = list(numbers) if isinstance(numbers, Sequence) and not isinstance(numbers, str) else [numbers]
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return [operator.index(number) for number in numbers]
    except TypeError:
        raise TypeError(f"pack: expected an integer, a slice or integers as index, got {index!r:.80}") from None


def _equal(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return mine is theirs or (not isinstance(mine, Tensor) and not isinstance(theirs, Tensor) and mine == theirs)
    return (mine.device, mine.dtype) == (theirs.device, theirs.dtype) and torch.equal(mine, theirs)


torch.serialization.add_safe_globals([Pack])  # else torch.load takes it with weights_only=False alone
