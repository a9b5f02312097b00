"""Who runs in a benchmark: the packed encoder eager and compiled, and the original in the ways that it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nopad.align.references import ReferenceModel, reference_of
from nopad.bench.timing import NotRun
from nopad.bench.workloads import Workload
from nopad.encoder import PackedEncoder
from nopad.packing import Pack
from nopad.pipeline.packer import plan

GROUP = 64
"""Images of one size that the original takes at a time."""

Features = dict[int, Tensor]
"""`(h · w, D)` tokens of some images, by their number."""
Run = Callable[[Collection[int]], Features]
"""One pass over a workload; the features of the images asked for are kept, all others dropped as they come."""


@dataclass(frozen=True)
class Images:
    """A workload's images on the device: `(C, H, W)` standard normal pixels each."""

    workload: Workload
    pixels: tuple[Tensor, ...]

    @classmethod
    def of(cls, workload: Workload, encoder: PackedEncoder, seed: int) -> Images:
        """In the dtype and on the device of `encoder`."""
        generator = torch.Generator(encoder.device).manual_seed(seed)
        size, channels = encoder.patch_size, encoder.config.num_channels
        options: dict[str, Any] = {"generator": generator, "device": encoder.device}
        shapes = ((channels, rows * size, columns * size) for rows, columns in workload.grids)
        return cls(workload, tuple(torch.randn(*shape, **options).to(encoder.dtype) for shape in shapes))

    def pack(self, encoder: PackedEncoder, numbers: Iterable[int]) -> Pack:
        """These images for `encoder`, the grid on the CPU."""
        return Pack.of([self.pixels[number] for number in numbers], encoder.patch_size, encoder.patch_order)


@dataclass(frozen=True)
class Prepared:
    """A contestant that can run.

    Attributes:
        run: what is timed.
        layers: how those of a compiled encoder were made ready, its `execution`; `None` of others.
    """

    run: Run
    layers: str | None = None


@dataclass(frozen=True)
class Contestant:
    """Somebody who can run a workload.

    Attributes:
        name: for tables.
        images: what it runs on.
        calls: forwards in one run.
        weight_bytes: of its model.
        prepare: makes all that is not timed; raises `NotRun`.
        capacity: tokens per pack, `None` where there are no packs.
        compiled: whether it needs a compiler, which not every machine has.
    """

    name: str
    images: Images
    calls: int
    weight_bytes: int
    prepare: Callable[[], Prepared]
    capacity: int | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Peer:
    """The original with the packed encoder's weights; `model` is `None` where there is none, and `about` says why.

    It pools too, where it has a head that pools: below two hundredths of its work.
    """

    about: str
    reference: ReferenceModel | None = None
    model: Any = None

    @classmethod
    def of(cls, encoder: PackedEncoder, checkpoint: str, *, revision: str | None, trust_remote_code: bool) -> Peer:
        """The original of `checkpoint` on the device and in the dtype of `encoder`."""
        try:
            reference = reference_of(encoder).of(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
            names = reference.names(encoder)
            state = encoder.state_dict()
            kept = {name: tensor.cpu() for name, tensor in state.items() if name in names}
            model = reference.load(encoder, kept, encoder.dtype)
        except (ValueError, ImportError) as reason:
            return cls(str(reason))
        attention = model.config._attn_implementation
        return cls(f"{reference.describe(model)}, {attention} attention", reference, model.to(device=encoder.device))

    def check(self, encoder: PackedEncoder, workload: Workload) -> tuple[ReferenceModel, Any]:
        """The original and its model, where there is one that takes every size of `workload`; else `NotRun`."""
        if self.reference is None:
            raise NotRun(self.about)
        only = self.reference.only_grid(encoder)
        if only is not None and set(workload.grids) != {only}:
            raise NotRun(f"the original takes {only[0]} × {only[1]} patches and nothing else")
        return self.reference, self.model


def reference_features(encoder: PackedEncoder, images: Images, numbers: Iterable[int]) -> Features:
    """What the packed encoder gives for each image alone."""
    return {number: encoder(images.pack(encoder, [number])) for number in numbers}


def packed(
    encoder: PackedEncoder, images: Images, capacity: int, *, compiled: bool, float8: bool = False
) -> Contestant:
    """The packed encoder over packs of `capacity` tokens, prefix tokens among them."""
    lengths = images.workload.lengths
    packs = plan([length + encoder.num_prefix_tokens for length in lengths], capacity)

    def prepare() -> Prepared:
        model = _compiled(encoder, capacity, max(map(len, packs)), float8) if compiled else encoder
        ready = [(numbers, images.pack(encoder, numbers)) for numbers in packs]

        def run(keep: Collection[int]) -> Features:
            kept = {}
            for numbers, pack in ready:
                tokens = model(pack)
                if keep:
                    parts = tokens.split([lengths[number] for number in numbers])
                    kept |= _kept(numbers, parts, keep)
            return kept

        return Prepared(run, model.execution if compiled else None)

    name = "nopad, float8" if float8 else "nopad, compiled" if compiled else "nopad, eager"
    return Contestant(name, images, len(packs), _bytes(encoder), prepare, capacity, compiled)


def one_by_one(encoder: PackedEncoder, peer: Peer, images: Images) -> Contestant:
    """The original, one image at a time."""

    def prepare() -> Prepared:
        reference, model = peer.check(encoder, images.workload)

        def run(keep: Collection[int]) -> Features:
            kept = {}
            for number, pixels in enumerate(images.pixels):
                tokens, _ = reference.run(model, pixels)
                kept |= _kept([number], [tokens], keep)
            return kept

        return Prepared(run)

    return Contestant("original, one by one", images, len(images.pixels), _bytes(peer.model), prepare)


def by_shape(encoder: PackedEncoder, peer: Peer, images: Images) -> Contestant:
    """The original over batches of images of one size, at most `GROUP` at a time."""
    of_size: dict[tuple[int, int], list[int]] = {}
    for number, grid in enumerate(images.workload.grids):
        of_size.setdefault(grid, []).append(number)
    groups = [same[i : i + GROUP] for same in of_size.values() for i in range(0, len(same), GROUP)]
    return _batched("original, grouped by shape", encoder, peer, images, groups, compiled=False)


def fixed_size(encoder: PackedEncoder, peer: Peer, images: Images) -> Contestant:
    """The original, compiled, over all images of a fixed-size workload in one batch."""
    name = f"original, {images.workload.name}, compiled"
    return _batched(name, encoder, peer, images, [list(range(len(images.pixels)))], compiled=True)


def _batched(
    name: str, encoder: PackedEncoder, peer: Peer, images: Images, groups: Sequence[list[int]], *, compiled: bool
) -> Contestant:
    def prepare() -> Prepared:
        reference, model = peer.check(encoder, images.workload)
        batches = [(numbers, torch.stack([images.pixels[number] for number in numbers])) for numbers in groups]

        def forward(pixels: Tensor) -> Tensor:
            return reference.run_batch(model, pixels)

        call = torch.compile(forward) if compiled else forward

        def run(keep: Collection[int]) -> Features:
            kept = {}
            for numbers, pixels in batches:
                kept |= _kept(numbers, call(pixels), keep)
            return kept

        return Prepared(run)

    return Contestant(name, images, len(groups), _bytes(peer.model), prepare, compiled=compiled)


def contestants(
    encoder: PackedEncoder,
    peer: Peer | None,
    images: Images,
    squares: Images,
    capacities: Sequence[int],
    float8: bool,
) -> list[Contestant]:
    """Everybody who runs over `images`, and the original compiled over `squares`; `None` is no peer asked for."""
    ours = [packed(encoder, images, size, compiled=compiled) for compiled in (False, True) for size in capacities]
    if float8:
        ours += [packed(encoder, images, size, compiled=True, float8=True) for size in capacities]
    if peer is None:
        return ours
    return [
        *ours,
        one_by_one(encoder, peer, images),
        by_shape(encoder, peer, images),
        fixed_size(encoder, peer, squares),
    ]


def _compiled(encoder: PackedEncoder, capacity: int, max_segments: int, float8: bool) -> PackedEncoder:
    """A twin of `encoder` over the same weights: compiling it for one capacity leaves the others as they are."""
    twin = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    if float8:
        try:
            twin.to_precision("fp8")
        except ValueError as reason:  # sizes that float8's products do not take
            raise NotRun(str(reason)) from None
    twin.compile(capacity=capacity, max_segments=max_segments)
    return twin


def _kept(numbers: Sequence[int], tokens: Iterable[Tensor], keep: Collection[int]) -> Features:
    # Cloned: a graph writes its next output to the same memory.
    return {n: part.clone() for n, part in zip(numbers, tokens, strict=True) if n in keep} if keep else {}


def _bytes(model: nn.Module | None) -> int:
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
