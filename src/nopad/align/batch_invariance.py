"""Batch invariance: an image's features are bit-equal whatever it is packed with, and wherever in the pack it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nopad.counts import check_count, counted
from nopad.encoder import PackedEncoder
from nopad.environment import device_name, dtype_name

PACKS = 20
CAPACITY = 4096
TOKENS_PER_IMAGE = 64
"""Mean tokens per image for which a pack has segments, as in `PackedEncoder.compile`."""


@dataclass(frozen=True)
class BatchInvarianceCase:
    """One image in many packs.

    Attributes:
        name: how the layers ran, see `PackedEncoder.execution`.
        grid: `(frames, rows, columns)` of the image.
        packs: number of packs.
        same: packs in which its tokens and its pooled vector were bit-equal to those of the image alone.
        same_beside_nan, same_beside_infinity: the same with all other images of the pack NaN or infinity.
    """

    name: str
    grid: tuple[int, int, int]
    packs: int
    same: int
    same_beside_nan: int
    same_beside_infinity: int

    @property
    def passed(self) -> bool:
        """Whether every comparison was bit-equal."""
        return self.packs > 0 and self.same == self.same_beside_nan == self.same_beside_infinity == self.packs


@dataclass(frozen=True)
class BatchInvarianceReport:
    """The result for an encoder and the conditions under which it was measured."""

    checkpoint: str
    device: str
    dtype: str
    precision: str | None
    attention: str
    capacity: int
    cases: tuple[BatchInvarianceCase, ...]

    @property
    def passed(self) -> bool:
        """Whether there are cases and every one passed."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        cases = [{"passed": case.passed, **dataclasses.asdict(case)} for case in self.cases]
        return {"passed": self.passed, **dataclasses.asdict(self), "cases": cases}


def check_batch_invariance(
    encoder: PackedEncoder,
    *,
    capacity: int = CAPACITY,
    packs: int = PACKS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> BatchInvarianceReport:
    """Compare an image's features in random packs, bit by bit, with those of the image alone.

    The packs are static ones of `capacity` rows (`PackedEncoder.compile`), with compiled layers and with eager ones;
    where the layers do not compile, with eager ones alone.

    Args:
        encoder: the encoder, on the device and in the dtype to check; it is uncompiled afterwards.
        capacity: tokens of a pack.
        packs: number of packs; the image lies first, last and in between, among 1 to many others.
        seed: seed of everything random.
        progress: called with a line for each step.

    Raises:
        ValueError: a capacity that does not hold an image and another beside it, or `packs` below 1.
    """
    check_count("packs", packs)
    check_count("capacity", capacity)
    generator = torch.Generator().manual_seed(seed)
    grids = _grids(encoder, capacity)
    cases = []
    for compiled in (True, False):
        encoder.compile(capacity, capacity // TOKENS_PER_IMAGE, compiled=compiled)
        try:
            for grid in grids:
                progress(f"{encoder.execution}: {' × '.join(map(str, grid))} patches in {counted(packs, 'pack')}")
                cases.append(_case(encoder, grid, capacity, packs, generator))
            if encoder.execution == "eager":
                break  # where nothing compiles, the same layers would run again
        finally:
            encoder.uncompile()
    return BatchInvarianceReport(
        checkpoint=str(encoder.source),
        device=device_name(encoder.device),
        dtype=dtype_name(encoder.dtype),
        precision=encoder.precision,
        attention=encoder.attention_backend,
        capacity=capacity,
        cases=tuple(cases),
    )


def _grids(encoder: PackedEncoder, capacity: int) -> list[tuple[int, int, int]]:
    """A single patch, an oblong image, a clip; those that fit into half a pack and leave others a segment."""
    size = encoder.merge_size
    grids = [(t, h + -h % size, w + -w % size) for t, h, w in ((1, 1, 1), (1, 9, 23), (3, 7, 5))]
    fitting = [
        grid for grid in grids if 2 * _rows(encoder, grid) <= capacity and grid[0] < capacity // TOKENS_PER_IMAGE
    ]
    if not fitting:
        min_capacity = max(2 * _rows(encoder, grids[0]), 2 * TOKENS_PER_IMAGE)
        raise ValueError(f"capacity: expected at least {min_capacity} tokens, got {capacity}")
    return fitting


def _rows(encoder: PackedEncoder, grid: tuple[int, int, int]) -> int:
    return grid[0] * (grid[1] * grid[2] + encoder.num_prefix_tokens)


@torch.no_grad()
def _case(
    encoder: PackedEncoder,
    grid: tuple[int, int, int],
    capacity: int,
    packs: int,
    generator: torch.Generator,
) -> BatchInvarianceCase:
    image = _patches(encoder, [grid], generator)
    alone = _features(encoder, [image], [grid], 0)
    same = {0.0: 0, float("nan"): 0, float("inf"): 0}
    for _ in range(packs):
        others = _other_images(encoder, grid, capacity, generator)
        index = int(torch.randint(0, len(others) + 1, (), generator=generator))
        before, after = others[:index], others[index:]
        patches = [_patches(encoder, part, generator) for part in (before, after)]
        for added in same:
            parts = [patches[0] + added, image, patches[1] + added]
            features = _features(encoder, parts, [*before, grid, *after], index)
            same[added] += all(torch.equal(a, b) for a, b in zip(features, alone, strict=True))
    return BatchInvarianceCase(encoder.execution, grid, packs, *same.values())


def _other_images(
    encoder: PackedEncoder, grid: tuple[int, int, int], capacity: int, generator: torch.Generator
) -> list[tuple[int, int, int]]:
    """Random images that fit into a pack beside one of `grid`: few or many, at least one."""

    def draw(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=generator))

    prefix, size = encoder.num_prefix_tokens, encoder.merge_size
    rows_left = prefix + draw(capacity - _rows(encoder, grid) - prefix)
    rows_left = max(rows_left, prefix + size**2)  # of one image at least
    num_images, images = draw(capacity // TOKENS_PER_IMAGE - grid[0]), []
    while len(images) < num_images and (blocks := (rows_left - prefix) // size**2) > 0:
        rows = draw(min(24, blocks))
        columns = draw(min(24, blocks // rows))
        images.append((1, rows * size, columns * size))
        rows_left -= rows * columns * size**2 + prefix
    return images


def _patches(encoder: PackedEncoder, grids: Sequence[tuple[int, int, int]], generator: torch.Generator) -> Tensor:
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(num_patches, encoder.patch_dim, dtype=torch.float32, generator=generator).to(
        encoder.device, encoder.dtype
    )


def _features(
    encoder: PackedEncoder, parts: list[Tensor], grids: list[tuple[int, int, int]], index: int
) -> tuple[Tensor, Tensor]:
    """Tokens and pooled vector of one image of a pack."""
    output = encoder.encode(torch.cat(parts), torch.tensor(grids))
    start = sum(t * h * w for t, h, w in grids[:index])
    t, h, w = grids[index]
    return output.tokens[start : start + t * h * w], output.pooled[index]
