"""The reference model as it is commonly run: one image at a time, in batches of one size, and in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nopad.align.reference_model import ReferenceModel
from nopad.align.references import reference_of
from nopad.bench import timm_naflex
from nopad.bench.candidates import NOT_COMPILED, Candidate, Features, Images, Run, num_bytes, packed, selected
from nopad.bench.timing import Skipped
from nopad.bench.workloads import Workload
from nopad.encoder import PackedEncoder

BATCH_SIZE = 64
"""Images of one size that the reference takes at a time."""
RunBatch = Callable[[Sequence[Tensor]], list[Tensor]]
"""From the images of a batch to the tokens of each."""


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


def one_by_one(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference, one image at a time."""

    def prepare() -> tuple[Run, None]:
        reference, model = baseline.check(encoder, images.workload)

        def run(keep: Collection[int]) -> Features:
            features = {}
            for index, pixels in enumerate(images.pixels):
                tokens, _ = reference.run(model, pixels)
                features |= selected([index], [tokens], keep)
            return features

        return run, None

    return Candidate("reference, one by one", images, len(images.pixels), num_bytes(baseline.model), prepare)


def by_shape(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference over batches of images of one size, at most `BATCH_SIZE` at a time."""
    by_grid: dict[tuple[int, int], list[int]] = {}
    for index, grid in enumerate(images.workload.grids):
        by_grid.setdefault(grid, []).append(index)
    groups = [same[i : i + BATCH_SIZE] for same in by_grid.values() for i in range(0, len(same), BATCH_SIZE)]
    return _batched("reference, grouped by shape", encoder, baseline, images, groups, compiled=False)


def padded(encoder: PackedEncoder, baseline: Baseline, images: Images) -> Candidate:
    """The reference over batches of `BATCH_SIZE` images in their order, padded to the longest and masked."""

    def load() -> RunBatch:
        reference, model = baseline.check(encoder, images.workload)
        return partial(reference.run_padded, model)

    return _padded("reference, padded batches", images, num_bytes(baseline.model), load)


def padded_by_timm(encoder: PackedEncoder, images: Images) -> Candidate:
    """timm's NaFlexViT with the same weights, over the batches of `padded`."""

    def load() -> RunBatch:
        try:
            return partial(timm_naflex.run_padded, timm_naflex.naflex_vit(encoder))
        except (ImportError, RuntimeError) as reason:
            raise Skipped(f"timm does not work here: {reason}") from None

    return _padded("timm NaFlexViT, padded batches", images, num_bytes(encoder), load)


def _padded(name: str, images: Images, weight_bytes: int, load: Callable[[], RunBatch]) -> Candidate:
    number = len(images.pixels)
    groups = [range(start, min(start + BATCH_SIZE, number)) for start in range(0, number, BATCH_SIZE)]

    def prepare() -> tuple[Run, None]:
        run_batch = load()

        def run(keep: Collection[int]) -> Features:
            features = {}
            for indices in groups:
                tokens = run_batch([images.pixels[index] for index in indices])
                features |= selected(indices, tokens, keep)
            return features

        return run, None

    return Candidate(name, images, len(groups), weight_bytes, prepare)


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
                features |= selected(indices, call(pixels), keep)
            return features

        return run, None

    return Candidate(name, images, len(groups), num_bytes(baseline.model), prepare, compiled=compiled)


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
            if timm_naflex.is_there():
                all_candidates.append(padded_by_timm(encoder, images))
        all_candidates.append(fixed_size(encoder, baseline, squares))
    return all_candidates
