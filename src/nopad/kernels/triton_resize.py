"""Antialiased resize of many images in one launch, to patches; importable only where Triton is installed.

Pillow's arithmetic, bit for bit: weights of the filter, computed in float64 and rounded to 22 bits, a horizontal and a
vertical pass in integers, each rounded to 8 bits.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

FIELDS = 18
"""Numbers that describe an image: address of the first pixel, bytes to the next row and column; height and width; both
after the resize; first row and column that are kept; how many rows and columns are kept; where the weights of its rows
and columns begin; most weights of a row and of a column; where its pixels between the passes begin; its first row of
patches; and whether rows and columns have changed places, so that the vertical pass comes first."""

WEIGHT_BLOCK, ROWS, COLUMNS = 64, 8, 64


def resize_to_patches(
    images: Tensor,
    max_sizes: tuple[int, int, int],
    weights: Tensor,
    starts: Tensor,
    between: Tensor,
    patches: Tensor,
    *,
    patch_size: int,
    temporal_patch_size: int,
    channels_last: bool,
    bicubic: bool,
) -> None:
    """Resize images on the device and write their patches.

    Args:
        images: `(N, FIELDS)` int64.
        max_sizes: rows before the resize, and rows and columns that are kept, of the largest image each.
        weights, starts: int32, room for all images.
        between: uint8, room for all images.
        patches: `(T, P)` uint8, written to.
        channels_last: whether the channel changes fastest in a patch.
        bicubic: the filter, else bilinear.
    """
    number = len(images)
    rows_before, rows, columns = max_sizes
    blocks = triton.cdiv(max(rows, columns), WEIGHT_BLOCK)
    _weights[(number, 2, blocks)](images, weights, starts, FIELDS, bicubic, WEIGHT_BLOCK)  # pyright: ignore
    grid = (triton.cdiv(rows_before, ROWS), triton.cdiv(columns, COLUMNS), number)
    _horizontal[grid](images, weights, starts, between, FIELDS, ROWS, COLUMNS)  # pyright: ignore
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS), number)
    _vertical[grid](  # pyright: ignore
        images,
        weights,
        starts,
        between,
        patches,
        patches.shape[1],
        FIELDS,
        patch_size,
        temporal_patch_size,
        channels_last,
        ROWS,
        COLUMNS,
    )


@triton.jit
def _filter(x, BICUBIC: tl.constexpr):
    x = tl.abs(x)
    if BICUBIC:  # a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(x < 1.0, 1.0 - x, 0.0)


@triton.jit
def _weights(images, weights, starts, FIELDS: tl.constexpr, BICUBIC: tl.constexpr, BLOCK: tl.constexpr):
    """For each row or column that is kept: the first pixel that it is made of, and the weights from there on."""
    image = images + tl.program_id(0).to(tl.int64) * FIELDS
    axis = tl.program_id(1)  # 0 for rows, 1 for columns
    before = tl.load(image + 3 + axis)
    after = tl.load(image + 5 + axis)
    first = tl.load(image + 7 + axis)
    length = tl.load(image + 9 + axis)
    offset = tl.load(image + 11 + axis)
    width = tl.load(image + 13 + axis).to(tl.int32)
    index = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    scale = before.to(tl.float64) / after.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = (2.0 if BICUBIC else 1.0) * stretch
    centre = ((index + first).to(tl.float64) + 0.5) * scale
    low = tl.maximum((centre - support + 0.5).to(tl.int64), 0)
    high = tl.minimum((centre + support + 0.5).to(tl.int64), before)
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(width):
        x = ((low + k).to(tl.float64) - centre + 0.5) / stretch
        total += tl.where(low + k < high, _filter(x, BICUBIC), 0.0)
    for k in range(width):
        x = ((low + k).to(tl.float64) - centre + 0.5) / stretch
        weight = tl.where(low + k < high, _filter(x, BICUBIC), 0.0) / total * 4194304.0
        rounded = (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
        tl.store(weights + offset + index * width + k, rounded, mask=mask)
    tl.store(starts + offset + index * width, low.to(tl.int32), mask=mask)


@triton.jit
def _horizontal(images, weights, starts, between, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`(rows before, columns kept, 3)` of each image."""
    image = images + tl.program_id(2).to(tl.int64) * FIELDS
    height = tl.load(image + 3)
    columns = tl.load(image + 10)
    if (tl.program_id(0) * ROWS < height) & (tl.program_id(1) * COLUMNS < columns):
        pixels = tl.load(image).to(tl.pointer_type(tl.uint8))
        row_stride = tl.load(image + 1)
        column_stride = tl.load(image + 2)
        last = tl.load(image + 4) - 1
        offset = tl.load(image + 12)
        width = tl.load(image + 14).to(tl.int32)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row_mask = row < height
        column_mask = column < columns
        mask = row_mask[:, None] & column_mask[None, :]
        first = tl.load(starts + offset + column * width, mask=column_mask, other=0)
        red = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        green = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        blue = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        line = pixels + row.to(tl.int64)[:, None] * row_stride
        for k in range(width):
            weight = tl.load(weights + offset + column * width + k, mask=column_mask, other=0)[None, :]
            x = tl.minimum((first + k).to(tl.int64), last)
            at = line + x[None, :] * column_stride
            red += weight * tl.load(at, mask=mask, other=0).to(tl.int32)
            green += weight * tl.load(at + 1, mask=mask, other=0).to(tl.int32)
            blue += weight * tl.load(at + 2, mask=mask, other=0).to(tl.int32)
        out = between + tl.load(image + 15) + (row.to(tl.int64)[:, None] * columns + column[None, :]) * 3
        tl.store(out, _level(red), mask=mask)
        tl.store(out + 1, _level(green), mask=mask)
        tl.store(out + 2, _level(blue), mask=mask)


@triton.jit
def _level(value):
    return tl.minimum(tl.maximum(value >> 22, 0), 255).to(tl.uint8)


@triton.jit
def _vertical(
    images,
    weights,
    starts,
    between,
    patches,
    PATCH_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    PATCH: tl.constexpr,
    FRAMES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of patches of each image."""
    image = images + tl.program_id(2).to(tl.int64) * FIELDS
    height = tl.load(image + 9)
    columns = tl.load(image + 10)
    if (tl.program_id(0) * ROWS < height) & (tl.program_id(1) * COLUMNS < columns):
        last = tl.load(image + 3) - 1
        offset = tl.load(image + 11)
        width = tl.load(image + 13).to(tl.int32)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row_mask = row < height
        mask = row_mask[:, None] & (column < columns)[None, :]
        first = tl.load(starts + offset + row * width, mask=row_mask, other=0)
        red = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        green = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        blue = tl.full((ROWS, COLUMNS), 2097152, tl.int32)
        source = between + tl.load(image + 15) + column[None, :] * 3
        for k in range(width):
            weight = tl.load(weights + offset + row * width + k, mask=row_mask, other=0)[:, None]
            y = tl.minimum((first + k).to(tl.int64), last)
            at = source + y[:, None] * (columns * 3)
            red += weight * tl.load(at, mask=mask, other=0).to(tl.int32)
            green += weight * tl.load(at + 1, mask=mask, other=0).to(tl.int32)
            blue += weight * tl.load(at + 2, mask=mask, other=0).to(tl.int32)
        is_turned = tl.load(image + 17) != 0
        y = tl.where(is_turned, column[None, :], row[:, None])
        x = tl.where(is_turned, row[:, None], column[None, :])
        patches_a_row = tl.where(is_turned, height, columns) // PATCH
        patch = tl.load(image + 16) + (y // PATCH) * patches_a_row + x // PATCH
        inside = (y % PATCH) * PATCH + x % PATCH
        for frame in range(FRAMES):
            if CHANNELS_LAST:
                out = patches + patch * PATCH_DIM + (frame * PATCH * PATCH + inside) * 3
                step = 1
            else:
                out = patches + patch * PATCH_DIM + frame * PATCH * PATCH + inside
                step = FRAMES * PATCH * PATCH
            tl.store(out, _level(red), mask=mask)
            tl.store(out + step, _level(green), mask=mask)
            tl.store(out + 2 * step, _level(blue), mask=mask)
