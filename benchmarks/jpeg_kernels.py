"""JPEGs' Huffman codes checked on a GPU, by lanes that find out where codes begin; importable only where Triton is.

Huffman codes synchronise: a decoder that begins in a wrong state soon gets into the right one. Each lane guesses the
state at its end by decoding the last of its bits. In each sweep every lane whose left neighbour has ended otherwise
than it had begun decodes all of its bits from there. When all begin where their neighbours ended, and the first where
the file does, they have decoded what one decoder would have from beginning to end (Weißenberger and Schmidt, "Massively
Parallel Huffman Decoding on GPUs", ICPP 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jpeg_scan import FIELDS, SHORT_BITS, Batch
from torch import Tensor

CLEAN, UNSETTLED, FAULTY = 0, 1, 2
"""Verdicts: all codes are right; more sweeps are needed; a code is none, or there are too many or too few."""

LANES_PER_PROGRAM = 64
"""Lanes of a program, which is one warp."""
GUESS_BITS = 1024
"""Bits of a lane by which its state at the end is guessed."""
STEPS = 8
"""Codes between two looks whether a lane of the program is still decoding."""
_SUM_BLOCK, _FILES_PER_PROGRAM = 256, 32
_SHIFT, _NUM_SHORT = tl.constexpr(16 - SHORT_BITS), tl.constexpr(1 << SHORT_BITS)


@dataclass(frozen=True, slots=True)
class Lanes:
    """What the lanes of a batch have decoded; the last of each file has decoded nothing.

    Attributes:
        words: `Batch.data` as int32, the first byte in the highest bits.
        starts, states: the state in which each lane began and ended, see `_state`.
        results: see `_sweep`.
    """

    words: Tensor
    starts: Tensor
    states: Tensor
    results: Tensor


def check(batch: Batch, lane_bits: int, *, sweeps: int, lanes_per_program: int = LANES_PER_PROGRAM) -> Tensor:
    """Check the codes of files.

    Args:
        batch: by `pack` with the same `lane_bits`.
        sweeps: of all lanes; files that have not settled by then stay `UNSETTLED`.

    Returns:
        `(N,)` int32 verdicts on the device.
    """
    return verdicts(batch, decode(batch, lane_bits, sweeps=sweeps, lanes_per_program=lanes_per_program), lane_bits)


def decode(batch: Batch, lane_bits: int, *, sweeps: int, lanes_per_program: int = LANES_PER_PROGRAM) -> Lanes:
    """Decode all lanes but the last of each file, see `check`."""
    device, lanes = batch.data.device, batch.num_lanes
    words = batch.data.view(-1, 4).flip(1).contiguous().view(torch.int32).view(-1)
    files = torch.arange(len(batch.files), dtype=torch.int32, device=device)
    owners = torch.repeat_interleave(files, batch.files[:, 3], output_size=lanes)
    states, next_states, results = torch.empty(3, lanes, dtype=torch.int32, device=device)
    starts = torch.full_like(states, -1)
    grid = (triton.cdiv(lanes, lanes_per_program),)
    inputs, sizes = (words, batch.tables, batch.files, owners), (FIELDS, lane_bits)
    guess_bits = min(GUESS_BITS, lane_bits)
    _guess[grid](*inputs, states, lanes, *sizes, guess_bits, lanes_per_program, STEPS, num_warps=1)  # pyright: ignore
    for _ in range(sweeps):
        buffers = (states, next_states, starts, results)
        _sweep[grid](*inputs, *buffers, lanes, *sizes, lanes_per_program, STEPS, num_warps=1)  # pyright: ignore
        states, next_states = next_states, states
    return Lanes(words, starts, states, results)


def verdicts(batch: Batch, lanes: Lanes, lane_bits: int) -> Tensor:
    """Decode the last lane of each file, see `check`."""
    num_files = len(batch.files)
    totals = torch.empty(num_files, 3, dtype=torch.int32, device=batch.files.device)
    buffers = (lanes.states, lanes.starts, lanes.results, totals)
    _sum[(num_files,)](batch.files, *buffers, FIELDS, _SUM_BLOCK)  # pyright: ignore
    found = torch.empty(num_files, dtype=torch.int32, device=batch.files.device)
    inputs = (lanes.words, batch.tables, batch.files, lanes.states, totals)
    sizes = (num_files, FIELDS, lane_bits, _FILES_PER_PROGRAM, STEPS)
    _finish[(triton.cdiv(num_files, _FILES_PER_PROGRAM),)](*inputs, found, *sizes, num_warps=1)  # pyright: ignore
    return found


@triton.jit
def _decode(words, tables, row, inside, position, block, coefficient, end, max_blocks, STEPS: tl.constexpr):
    """Decode codes that begin before the bit `end`, at most `max_blocks` blocks.

    Returns position, block of the period, coefficient, blocks that have ended, and how many codes were refused.
    """
    words += tl.load(row, mask=inside, other=0)
    period = tl.load(row + 5, mask=inside, other=1)
    num_luma = tl.load(row + 6, mask=inside, other=1)
    luma_dc = tl.load(row + 7, mask=inside, other=0)
    luma_dc_long = tl.load(row + 8, mask=inside, other=0)
    luma_ac = tl.load(row + 9, mask=inside, other=0)
    luma_ac_long = tl.load(row + 10, mask=inside, other=0)
    chroma_dc = tl.load(row + 11, mask=inside, other=0)
    chroma_dc_long = tl.load(row + 12, mask=inside, other=0)
    chroma_ac = tl.load(row + 13, mask=inside, other=0)
    chroma_ac_long = tl.load(row + 14, mask=inside, other=0)
    num_blocks = tl.zeros_like(position)
    refused = tl.zeros_like(position)
    active = inside & (position < end) & (num_blocks < max_blocks)
    while tl.max(active.to(tl.int32), axis=0) > 0:
        for _ in tl.static_range(STEPS):
            word = words + (position >> 5)
            high = tl.load(word, mask=active, other=0).to(tl.uint32, bitcast=True)
            low = tl.load(word + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
            shift = (position & 31).to(tl.uint32)
            bits = (((high << shift) | ((low >> 1) >> (31 - shift))) >> 16).to(tl.int32)  # the next 16
            is_dc = coefficient == 0
            is_luma = block < num_luma
            table = tl.where(is_luma, tl.where(is_dc, luma_dc, luma_ac), tl.where(is_dc, chroma_dc, chroma_ac))
            long_dc = tl.where(is_luma, luma_dc_long, chroma_dc_long)
            long = tl.where(is_dc, long_dc, tl.where(is_luma, luma_ac_long, chroma_ac_long))
            at = tl.where(bits < long, bits >> _SHIFT, bits - long + _NUM_SHORT)
            entry = tl.load(tables + table + at, mask=active, other=0)  # zero leaves all as it is
            position += entry & 31
            refused += (coefficient + (entry >> 16) > 64).to(tl.int32)
            coefficient += (entry >> 8) & 127
            has_ended = coefficient >= 64
            coefficient = tl.where(has_ended, 0, coefficient)
            num_blocks += has_ended.to(tl.int32)
            block += has_ended.to(tl.int32)
            block = tl.where(block == period, 0, block)
            active = inside & (position < end) & (num_blocks < max_blocks)
    return position, block, coefficient, num_blocks, refused


@triton.jit
def _state(bits, block, coefficient):
    """The bits beyond a lane's end (bits 0 to 4), the coefficient (5 to 10), the block of the period."""
    return bits | (coefficient << 5) | (block << 11)


@triton.jit
def _guess(
    words,
    tables,
    files,
    owners,
    states,
    num_lanes,
    FIELDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    GUESS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Decode the last bits of each lane but the last of a file, as if a period began with them."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = lane < num_lanes
    row = files + tl.load(owners + lane, mask=exists, other=0) * FIELDS
    index = lane - tl.load(row + 2, mask=exists, other=0)
    inside = exists & (index < tl.load(row + 3, mask=exists, other=0) - 1)
    end = (index + 1) * LANE_BITS
    zero = tl.zeros_like(index)
    position, block, coefficient, _, _ = _decode(
        words, tables, row, inside, end - GUESS_BITS, zero, zero, end, LANE_BITS, STEPS
    )
    tl.store(states + lane, _state(position - end, block, coefficient), mask=inside)


@triton.jit
def _sweep(
    words,
    tables,
    files,
    owners,
    states,
    next_states,
    starts,
    results,
    num_lanes,
    FIELDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Decode lanes whose left neighbour's state is not what they began with; the last of a file is not decoded.

    A result has the blocks that ended and, from bit 16, whether a code was refused.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = lane < num_lanes
    row = files + tl.load(owners + lane, mask=exists, other=0) * FIELDS
    index = lane - tl.load(row + 2, mask=exists, other=0)
    start = tl.load(states + lane - 1, mask=exists & (index > 0), other=0)
    inside = exists & (index < tl.load(row + 3, mask=exists, other=0) - 1)
    inside = inside & (start != tl.load(starts + lane, mask=inside, other=0))
    position, block, coefficient, num_blocks, refused = _decode(
        words,
        tables,
        row,
        inside,
        index * LANE_BITS + (start & 31),
        start >> 11,
        (start >> 5) & 63,
        (index + 1) * LANE_BITS,
        LANE_BITS,
        STEPS,
    )
    state = _state(position - (index + 1) * LANE_BITS, block, coefficient)
    tl.store(next_states + lane, tl.where(inside, state, tl.load(states + lane, mask=exists, other=0)), mask=exists)
    tl.store(starts + lane, start, mask=inside)
    tl.store(results + lane, num_blocks | ((refused > 0).to(tl.int32) << 16), mask=inside)


@triton.jit
def _sum(files, states, starts, results, totals, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the lanes of a file before its last: blocks, lanes with codes that were refused, lanes that have to go on."""
    row = files + tl.program_id(0) * FIELDS
    first = tl.load(row + 2)
    lanes = tl.load(row + 3) - 1
    num_blocks = tl.zeros((BLOCK,), tl.int32)
    refused = tl.zeros((BLOCK,), tl.int32)
    unsettled = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, lanes, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        exists = index < lanes
        result = tl.load(results + first + index, mask=exists, other=0)
        num_blocks += result & 0xFFFF
        refused += result >> 16
        before = tl.load(states + first + index - 1, mask=exists & (index > 0), other=0)
        unsettled += (exists & (tl.load(starts + first + index, mask=exists, other=0) != before)).to(tl.int32)
    out = totals + tl.program_id(0) * 3
    tl.store(out, tl.sum(num_blocks, axis=0))
    tl.store(out + 1, tl.sum(refused, axis=0))
    tl.store(out + 2, tl.sum(unsettled, axis=0))


@triton.jit
def _finish(
    words,
    tables,
    files,
    states,
    totals,
    verdicts,
    num_files,
    FIELDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Decode the last lane of each file, as many blocks as it has to have, and write the verdict."""
    file = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = file < num_files
    row = files + file * FIELDS
    num_bits = tl.load(row + 1, mask=exists, other=0)
    before = tl.load(row + 3, mask=exists, other=1) - 1
    last = tl.load(row + 2, mask=exists, other=0) + before
    remaining = tl.load(row + 4, mask=exists, other=0) - tl.load(totals + file * 3, mask=exists, other=0)
    refused_before = tl.load(totals + file * 3 + 1, mask=exists, other=0)
    unsettled = tl.load(totals + file * 3 + 2, mask=exists, other=0)
    start = tl.load(states + last - 1, mask=exists & (before > 0), other=0)
    inside = exists & (unsettled == 0) & (refused_before == 0)
    position, _, coefficient, num_blocks, refused = _decode(
        words,
        tables,
        row,
        inside,
        before * LANE_BITS + (start & 31),
        start >> 11,
        (start >> 5) & 63,
        num_bits,
        remaining,
        STEPS,
    )
    left = num_bits - position
    is_whole = (num_blocks == remaining) & (coefficient == 0) & (left >= 0) & (left <= 7)
    is_clean = inside & is_whole & (refused == 0)
    tl.store(verdicts + file, tl.where(unsettled > 0, 1, tl.where(is_clean, 0, 2)), mask=exists)
