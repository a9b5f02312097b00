"""Proof that an image's features do not depend, to the bit, on what it is packed with or where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nopad.encoder import PackedEncoder
from nopad.environment import device_name, dtype_name

PACKS = 20
CAPACITY = 4096
TOKENS_PER_IMAGE = 64
"""A pack has room for so many images that each has so many tokens, as `PackedEncoder.compile` makes it."""


@dataclass(frozen=True)
class BatchInvarianceCase:
    """One image in many packs.

    Attributes:
        name: how the layers ran.
        grid: `(frames, rows, columns)` of the image.
        packs: packs that it was in.
        same: packs in which its tokens and its pooled vector had the same bits as alone.
        same_beside_nan, same_beside_infinity: of the same packs, with every other value of the pack NaN or infinity.
    """

    name: str
    grid: tuple[int, int, int]
    packs: int
    same: int
    same_beside_nan: int
    same_beside_infinity: int

    @property
    def passed(self) -> bool:
        """Whether nothing ever changed a bit."""
        return self.packs > 0 and self.same == self.same_beside_nan == self.same_beside_infinity == self.packs


@dataclass(frozen=True)
class BatchInvarianceReport:
    """The verdict on an encoder, and what it rests on."""

    checkpoint: str
    device: str
    dtype: str
    precision: str | None
    attention: str
    capacity: int
    cases: tuple[BatchInvarianceCase, ...]

    @property
    def passed(self) -> bool:
        """Whether every case did."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
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
    """Put an image into random packs and compare its features, bit by bit, with those that it has alone.

    The packs are static ones of `capacity` rows (`PackedEncoder.compile`); the layers run compiled, and as they are.

    Args:
        encoder: on the device and in the dtype that are asked about; left as it was, uncompiled.
        capacity: tokens of a pack.
        packs: how many; the image stands first, last and in between, among 1 to many others.
        seed: of everything random.
        progress: told what is being done.

    Raises:
        ValueError: a capacity that does not hold an image and another beside it, or `packs` below 1.
    """
    if packs < 1:
        raise ValueError(f"packs: expected ≥ 1, got {packs}")
    generator = torch.Generator().manual_seed(seed)
    grids = _grids(encoder, capacity)
    cases = []
    for compiled in (True, False):
        encoder.compile(capacity, capacity // TOKENS_PER_IMAGE, compiled=compiled)
        name = encoder.execution
        try:
            for grid in grids:
                progress(f"{name}: {' × '.join(map(str, grid))} patches in {packs} packs")
                cases.append(_case(encoder, name, grid, capacity, packs, generator))
        finally:
            encoder.uncompile()
    return BatchInvarianceReport(
        checkpoint=str(encoder.source),
        device=device_name(encoder.device),
        dtype=dtype_name(encoder.dtype),
        precision=encoder.precision,
        attention=encoder.attention,
        capacity=capacity,
        cases=tuple(cases),
    )


def _grids(encoder: PackedEncoder, capacity: int) -> list[tuple[int, int, int]]:
    """A single patch, an oblong image, a clip; as far as half a pack holds them and leaves others a segment."""
    wanted = [(1, 1, 1), (1, 9, 23), (3, 7, 5)]
    fitting = [
        grid for grid in wanted if 2 * _rows(encoder, grid) <= capacity and grid[0] < capacity // TOKENS_PER_IMAGE
    ]
    if not fitting:
        least = max(2 * _rows(encoder, wanted[0]), 2 * TOKENS_PER_IMAGE)
        raise ValueError(f"capacity: expected at least {least} tokens, got {capacity}")
    return fitting


def _rows(encoder: PackedEncoder, grid: tuple[int, int, int]) -> int:
    return grid[0] * (grid[1] * grid[2] + encoder.num_prefix_tokens)


@torch.no_grad()
def _case(
    encoder: PackedEncoder,
    name: str,
    grid: tuple[int, int, int],
    capacity: int,
    packs: int,
    generator: torch.Generator,
) -> BatchInvarianceCase:
    mine = _patches(encoder, [grid], generator)
    alone = _features(encoder, [mine], [grid], 0)
    same = {0.0: 0, float("nan"): 0, float("inf"): 0}
    for _ in range(packs):
        others = _other_images(encoder, grid, capacity, generator)
        place = int(torch.randint(0, len(others) + 1, (), generator=generator))
        before, after = others[:place], others[place:]
        patches = [_patches(encoder, part, generator) for part in (before, after)]
        for junk in same:
            parts = [patches[0] + junk, mine, patches[1] + junk]
            found = _features(encoder, parts, [*before, grid, *after], len(before))
            same[junk] += all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    return BatchInvarianceCase(name, grid, packs, *same.values())


def _other_images(
    encoder: PackedEncoder, grid: tuple[int, int, int], capacity: int, generator: torch.Generator
) -> list[tuple[int, int, int]]:
    """Random images beside one of `grid`: few or many, at least one, so that the pack holds them all."""

    def draw(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=generator))

    prefix = encoder.num_prefix_tokens
    room = prefix + draw(capacity - _rows(encoder, grid) - prefix)
    number, found = draw(capacity // TOKENS_PER_IMAGE - grid[0]), []
    while len(found) < number and room > prefix:
        rows = draw(min(24, room - prefix))
        columns = draw(min(24, (room - prefix) // rows))
        found.append((1, rows, columns))
        room -= rows * columns + prefix
    return found


def _patches(encoder: PackedEncoder, grids: Sequence[tuple[int, int, int]], generator: torch.Generator) -> Tensor:
    number = sum(t * h * w for t, h, w in grids)
    return torch.randn(number, encoder.patch_dim, generator=generator).to(encoder.device, encoder.dtype)


def _features(
    encoder: PackedEncoder, parts: list[Tensor], grids: list[tuple[int, int, int]], place: int
) -> tuple[Tensor, Tensor]:
    """Tokens and pooled vector of one image of a pack."""
    output = encoder.encode(torch.cat(parts), torch.tensor(grids))
    start = sum(t * h * w for t, h, w in grids[:place])
    t, h, w = grids[place]
    return output.tokens[start : start + t * h * w], output.pooled[place]
