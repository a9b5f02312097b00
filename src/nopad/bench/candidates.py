"""Candidates of a benchmark: the packed encoder, eager and compiled, and the reference model as it is commonly run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nopad.align.reference_model import ReferenceModel
from nopad.align.references import reference_of
from nopad.bench.timing import Skipped
from nopad.bench.workloads import Workload
from nopad.encoder import PackedEncoder
from nopad.inference.compile import needs_compiler
from nopad.packing import Pack
from nopad.pipeline.packer import best_fit

BATCH_SIZE = 64
"""Images of one size that the reference takes at a time."""
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


@dataclass(frozen=True)
class Baseline:
    """The reference model with the packed encoder's weights, run without packing.

    It pools too, where it has a head that pools; that is less than two hundredths of its work.

    Attributes:
        description: its name in reports; where there is no `model`, the reason.
    """

    description: str
    reference: ReferenceModel | None = None
    model: Any = None

    @classmethod
    def of(cls, encoder: PackedEncoder, checkpoint: str, *, revision: str | None, trust_remote_code: bool) -> Baseline:
        """The reference of `checkpoint` on the device and in the dtype of `encoder`."""
        try:
            reference = reference_of(encoder).of(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
            names = reference.names(encoder)
            state = {name: tensor.cpu() for name, tensor in encoder.state_dict().items() if name in names}
            model = reference.load(encoder, state, encoder.dtype)
        except (ValueError, ImportError) as reason:
            return cls(str(reason))
        description = f"{reference.describe(model)}, {model.config._attn_implementation} attention"
        return cls(description, reference, model.to(device=encoder.device))

    def check(self, encoder: PackedEncoder, workload: Workload) -> tuple[ReferenceModel, Any]:
        """The reference and its model.

        Raises:
            Skipped: there is none, or none that takes every size of `workload`.
        """
        if self.reference is None:
            raise Skipped(self.description)
        only = self.reference.only_grid(encoder)
        if only is not None and set(workload.grids) != {only}:
            raise Skipped(f"the reference takes {only[0]} × {only[1]} patches and nothing else")
        return self.reference, self.model


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
                    features |= _selected(indices, parts, keep)
            if keep:  # not in timed runs
                _check_compiled(model, compiled)
            return features

        return run, model.execution if compiled else None

    name = f"nopad, {NAMES[precision]}" if precision else "nopad, compiled" if compiled else "nopad, eager"
    no_compiler = compiled and (precision == "int8" or (precision is None and not needs_compiler(encoder)))
    return Candidate(name, images, len(groups), _bytes(encoder), prepare, capacity, compiled, no_compiler)


def one_by_one(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference, one image at a time."""

    def prepare() -> tuple[Run, None]:
        reference, model = baseline.check(encoder, images.workload)

        def run(keep: Collection[int]) -> Features:
            features = {}
            for index, pixels in enumerate(images.pixels):
                tokens, _ = reference.run(model, pixels)
                features |= _selected([index], [tokens], keep)
            return features

        return run, None

    return Candidate("reference, one by one", images, len(images.pixels), _bytes(baseline.model), prepare)


def by_shape(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference over batches of images of one size, at most `BATCH_SIZE` at a time."""
    by_grid: dict[tuple[int, int], list[int]] = {}
    for index, grid in enumerate(images.workload.grids):
        by_grid.setdefault(grid, []).append(index)
    groups = [same[i : i + BATCH_SIZE] for same in by_grid.values() for i in range(0, len(same), BATCH_SIZE)]
    return _batched("reference, grouped by shape", encoder, baseline, images, groups, compiled=False)


def padded(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference over batches of `BATCH_SIZE` images in their order, padded to the longest and masked."""
    number = len(images.pixels)
    groups = [range(start, min(start + BATCH_SIZE, number)) for start in range(0, number, BATCH_SIZE)]

    def prepare() -> tuple[Run, None]:
        reference, model = baseline.check(encoder, images.workload)

        def run(keep: Collection[int]) -> Features:
            features = {}
            for indices in groups:
                tokens = reference.run_padded(model, [images.pixels[index] for index in indices])
                features |= _selected(indices, tokens, keep)
            return features

        return run, None

    return Candidate("reference, padded batches", images, len(groups), _bytes(baseline.model), prepare)


def fixed_size(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference, compiled, over all images of a fixed-size workload in one batch."""
    name = f"reference, {images.workload.name}, compiled"
    return _batched(name, encoder, baseline, images, [list(range(len(images.pixels)))], compiled=True)


def _batched(
    name: str,
    encoder: PackedEncoder,
    baseline: Baseline,
    images: Images,
    groups: Sequence[list[int]],
    *,
    compiled: bool,
) -> Candidate:
    def prepare() -> tuple[Run, None]:
        reference, model = baseline.check(encoder, images.workload)
        batches = [(indices, torch.stack([images.pixels[index] for index in indices])) for indices in groups]

        def forward(pixels: Tensor) -> Tensor:
            if compiled and not torch.compiler.is_compiling():
                raise Skipped(NOT_COMPILED)
            return reference.run_batch(model, pixels)

        call = torch.compile(forward) if compiled else forward

        def run(keep: Collection[int]) -> Features:
            features = {}
            for indices, pixels in batches:
                features |= _selected(indices, call(pixels), keep)
            return features

        return run, None

    return Candidate(name, images, len(groups), _bytes(baseline.model), prepare, compiled=compiled)


def candidates(
    encoder: PackedEncoder,
    baseline: Baseline | None,
    images: Images,
    squares: Images,
    capacities: Sequence[int],
    precisions: Sequence[str],
) -> list[Candidate]:
    """All candidates for `images`, and the compiled reference for `squares`; without `baseline` no reference."""
    all_candidates = [
        packed(encoder, images, size, compiled=compiled) for compiled in (False, True) for size in capacities
    ]
    for precision in precisions:
        all_candidates += [packed(encoder, images, size, compiled=True, precision=precision) for size in capacities]
    if baseline is not None:
        all_candidates += [one_by_one(encoder, baseline, images), by_shape(encoder, baseline, images)]
        if baseline.reference is not None and baseline.reference.takes_padding(encoder):
            all_candidates.append(padded(encoder, baseline, images))
        all_candidates.append(fixed_size(encoder, baseline, squares))
    return all_candidates


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


def _selected(indices: Sequence[int], tokens: Iterable[Tensor], keep: Collection[int]) -> Features:
    # Cloned: a CUDA graph writes its next output to the same memory.
    return {i: part.clone() for i, part in zip(indices, tokens, strict=True) if i in keep} if keep else {}


def _bytes(model: nn.Module | None) -> int:
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
