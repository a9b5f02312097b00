"""Candidates of a benchmark, and the packed encoder as one, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nopad.bench.timing import Skipped
from nopad.bench.workloads import Workload
from nopad.encoder import PackedEncoder
from nopad.inference.compile import needs_compiler
from nopad.packing import Pack
from nopad.pipeline.packer import best_fit

NAMES = {"fp8": "float8", "int8": "int8"}
"""Names of formats in tables."""
NOT_COMPILED = "torch.compile is disabled or does not work here"

Features = dict[int, Tensor]
"""`(h · w, D)` tokens of some images, by the image's index."""
Run = Callable[[Collection[int]], Features]
"""One pass over a workload. Returns the features of the images with the given indices; others are dropped at once."""


@dataclass(frozen=True)
class Images:
    """A workload's images on the device: `(C, H, W)` standard normal pixels each."""

    workload: Workload
    pixels: tuple[Tensor, ...]

    @classmethod
    def of(cls, workload: Workload, encoder: PackedEncoder, seed: int) -> Images:
        """Random images in the dtype and on the device of `encoder`."""
        generator = torch.Generator(encoder.device).manual_seed(seed)
        size, channels = encoder.patch_size, encoder.config.num_channels
        options: dict[str, Any] = {"generator": generator, "device": encoder.device, "dtype": torch.float32}
        shapes = ((channels, rows * size, columns * size) for rows, columns in workload.grids)
        return cls(workload, tuple(torch.randn(*shape, **options).to(encoder.dtype) for shape in shapes))

    def pack(self, encoder: PackedEncoder, indices: Iterable[int]) -> Pack:
        """A pack of the images with these indices for `encoder`, the grid on the CPU."""
        pixels, frames = [self.pixels[index] for index in indices], encoder.temporal_patch_size
        return Pack.of(pixels, encoder.patch_size, encoder.patch_order, temporal_patch_size=frames)


@dataclass(frozen=True)
class Candidate:
    """One candidate.

    Attributes:
        name: name in tables.
        images: its inputs.
        calls: forwards in one run.
        weight_bytes: bytes of its model's weights.
        prepare: does all that is not timed. Returns what is timed, and the `execution` of a compiled encoder, `None`
            of others. Raises `Skipped`.
        capacity: tokens per pack, `None` where there are no packs.
        compiled: whether it is compiled.
        no_compiler: whether it is, and without a compiler, which not every machine has.
    """

    name: str
    images: Images
    calls: int
    weight_bytes: int
    prepare: Callable[[], tuple[Run, str | None]]
    capacity: int | None = None
    compiled: bool = False
    no_compiler: bool = False


def expected_features(encoder: PackedEncoder, images: Images, indices: Iterable[int]) -> Features:
    """The packed encoder's features of each image alone."""
    return {index: encoder(images.pack(encoder, [index])) for index in indices}


def packed(
    encoder: PackedEncoder, images: Images, capacity: int, *, compiled: bool, precision: str | None = None
) -> Candidate:
    """The packed encoder over packs of `capacity` tokens, prefix tokens among them; compiled where in a `precision`."""
    lengths = images.workload.lengths
    groups = best_fit([length + encoder.num_prefix_tokens for length in lengths], capacity)

    def prepare() -> tuple[Run, str | None]:
        model = _compiled(encoder, capacity, max(map(len, groups)), precision) if compiled else encoder
        _check_compiled(model, compiled)
        packs = [(indices, images.pack(encoder, indices)) for indices in groups]

        def run(keep: Collection[int]) -> Features:
            features = {}
            for indices, pack in packs:
                tokens = model(pack)
                if keep:
                    parts = tokens.split([lengths[index] for index in indices])
                    features |= selected(indices, parts, keep)
            if keep:  # not in timed runs
                _check_compiled(model, compiled)
            return features

        return run, model.execution if compiled else None

    name = f"nopad, {NAMES[precision]}" if precision else "nopad, compiled" if compiled else "nopad, eager"
    no_compiler = compiled and (precision == "int8" or (precision is None and not needs_compiler(encoder)))
    return Candidate(name, images, len(groups), num_bytes(encoder), prepare, capacity, compiled, no_compiler)


def _compiled(encoder: PackedEncoder, capacity: int, max_segments: int, precision: str | None) -> PackedEncoder:
    """A compiled copy of `encoder` that shares its weights; it is compiled for one capacity alone."""
    compiled = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    if precision is not None:
        try:
            compiled.to_precision(precision)
        except ValueError as reason:  # a device or sizes that it is not for
            raise Skipped(str(reason)) from None
    compiled.compile(capacity=capacity, max_segments=max_segments)
    return compiled


def _check_compiled(model: PackedEncoder, compiled: bool) -> None:
    if compiled and model.execution == "eager":
        raise Skipped(NOT_COMPILED)


def selected(indices: Sequence[int], tokens: Iterable[Tensor], keep: Collection[int]) -> Features:
    # Cloned: a CUDA graph writes its next output to the same memory.
    return {i: part.clone() for i, part in zip(indices, tokens, strict=True) if i in keep} if keep else {}


def num_bytes(model: nn.Module | None) -> int:
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
