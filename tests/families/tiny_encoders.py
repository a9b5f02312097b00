"""A tiny checkpoint of each family, its sizes multiples of 16."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import aimv2_checkpoints
import clip_checkpoints
import dinov2_checkpoints
import dinov3_checkpoints
import moonvit_checkpoints
import onevision_checkpoints
import pe_checkpoints
import pixtral_checkpoints
import qwen2_vl_checkpoints
import qwen3_vl_checkpoints
import radio_checkpoints
import siglip2_checkpoints
import torch
import vit_checkpoints
from torch import Tensor, nn

from nopad import Pack, PackedEncoder, families
from nopad.families.clip import MetaCLIP2Packing
from nopad.families.dinov2 import DINOv2WithRegistersPacking, TIPSv2Packing
from nopad.families.qwen2_vl import Qwen2_5_VLPacking
from nopad.families.qwen3_vl import Qwen3_5Packing
from nopad.families.siglip2 import SiglipPacking
from nopad.families.vit import IJepaPacking, PixioPacking, ViTMAEPacking
from nopad.segments import Segments

GRIDS = torch.tensor([[1, 4, 5], [1, 7, 3], [2, 2, 2], [1, 1, 1]])
FAMILIES = (
    "aimv2",
    "aimv2 with a head",
    "siglip2",
    "siglip",
    "clip",
    "metaclip2",
    "dinov2",
    "dinov2 gated",
    "tipsv2",
    "dinov3",
    "dinov3 gated",
    "onevision",
    "moonvit",
    "pixtral",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "radio",
    "pe",
    "pe lang",
    "vit",
    "vit_mae",
    "ijepa",
    "pixio",
)
DISTINCT = (
    *("aimv2", "aimv2 with a head", "siglip2", "clip", "dinov2", "dinov3", "dinov3 gated", "onevision", "moonvit"),
    *("pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "radio", "pe", "pe lang", "vit"),
)
"""Those whose forward runs code that no other's does; the rest run the same with other values."""
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2}
"""Heads of 64 values, which every kernel of a GPU takes."""

JUNK = (0.0, float("nan"), float("inf"))
"""What `is_batch_invariant` adds to the neighbours."""


def tiny(family: str, folder: Path, **changes) -> Path:
    """A checkpoint with random weights far from their init."""
    if family == "onevision":
        original = onevision_checkpoints.tiny_original(**changes)
        return onevision_checkpoints.write(folder, original.state_dict(), original.config.to_dict())
    if family.startswith("qwen2"):
        changes = {"spatial_merge_size": 1, **({"window_size": 8} if family == "qwen2_5_vl" else {}), **changes}
        return qwen3_vl_checkpoints.save(folder, qwen2_vl_checkpoints.tiny_original(family, **changes))
    if family.startswith("qwen3"):  # merging blocks of one: of others grids are multiples, see test_qwen3_vl.py
        changes = {"spatial_merge_size": 1, **changes}
        return qwen3_vl_checkpoints.save(folder, qwen3_vl_checkpoints.tiny_original(family, **changes))
    if family == "moonvit":
        return moonvit_checkpoints.save(folder, moonvit_checkpoints.tiny_original(**changes))
    if family == "pixtral":
        return pixtral_checkpoints.save(folder, pixtral_checkpoints.tiny_original(**changes))
    if family.startswith("pe"):
        return pe_checkpoints.save(folder, pe_checkpoints.tiny_original(family, **changes))
    if family == "radio":
        changes.pop("intermediate_size", None)  # which follows the width
        return radio_checkpoints.save(folder, radio_checkpoints.tiny_original(**changes))
    if family.startswith("siglip"):
        kind = siglip2_checkpoints.naflex if family == "siglip2" else siglip2_checkpoints.fixed
        return siglip2_checkpoints.folder_of(folder, kind(**changes))
    if family in ("clip", "metaclip2"):
        return clip_checkpoints.save(folder, clip_checkpoints.tiny_original(family, **changes))
    if family in vit_checkpoints.CLASSES:
        return vit_checkpoints.save(folder, vit_checkpoints.tiny_original(family, **changes))
    if family == "tipsv2":
        changes.pop("intermediate_size", None)  # which follows the width
        original = dinov2_checkpoints.tiny_tipsv2(**changes)
        return dinov2_checkpoints.save(folder, original, dinov2_checkpoints.meta)
    if family.startswith("dinov2"):
        changes.pop("intermediate_size", None)  # which follows the width
        gated = {**dinov2_checkpoints.GATED, "num_register_tokens": 2} if family == "dinov2 gated" else {}
        return dinov2_checkpoints.save(folder, dinov2_checkpoints.tiny_original(**gated, **changes))
    if family.startswith("dinov3"):
        gated = dinov3_checkpoints.GATED if family == "dinov3 gated" else {}
        return dinov3_checkpoints.save(folder, dinov3_checkpoints.tiny_original(**gated, **changes))
    head = {"use_head": True, "is_native": False} if family == "aimv2 with a head" else {}
    original = aimv2_checkpoints.tiny_original(**head, **changes)
    return aimv2_checkpoints.write(folder, original.state_dict(), original.config.to_dict())


def encoder_class(family: str) -> type[PackedEncoder]:
    """The class that packs a family of `FAMILIES`."""
    variants = {"siglip": SiglipPacking, "dinov2 gated": DINOv2WithRegistersPacking, "metaclip2": MetaCLIP2Packing}
    variants |= {"tipsv2": TIPSv2Packing, "vit_mae": ViTMAEPacking, "ijepa": IJepaPacking, "pixio": PixioPacking}
    variants |= {"qwen2_5_vl": Qwen2_5_VLPacking, "qwen3_5": Qwen3_5Packing}
    if family in variants:
        return variants[family]
    return families.encoder_class(family.split()[0])


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Encoders are made without memory, and linear layers draw no weights there."""
    with torch.device("meta"), mock.patch.object(nn.Linear, "reset_parameters"):
        yield


def pack_of(encoder, pixels) -> Pack:
    """A pack of normalised pixels, in the layout that an encoder takes."""
    frames = encoder.temporal_patch_size
    return Pack.of(pixels, encoder.patch_size, encoder.patch_order, temporal_patch_size=frames)


def patches_of(encoder, grids: Tensor = GRIDS, seed: int = 0) -> Tensor:
    """Random patches, on the device and in the dtype of the encoder."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(int(grids.prod(dim=1).sum()), encoder.patch_dim, dtype=torch.float32, generator=generator)
    return patches.to(encoder.device, encoder.dtype)


def segments_of(encoder, *lengths: int) -> Segments:
    """Segments as the layers of an encoder take them, in windows where these attend within windows."""
    segments, each = Segments.of(lengths, encoder.device), [encoder.example_segments(length) for length in lengths]
    if each[0].windows is None:
        return segments
    windows = [length for segment in each for length in segment.windows.lengths]
    return dataclasses.replace(segments, windows=each[0].windows.with_lengths(windows))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def is_batch_invariant(encoder, junk: float) -> bool:
    """Whether an image has the same tokens and pooled vector alone and behind others, to which `junk` is added."""
    mine, others = patches_of(encoder, GRIDS[:1]), patches_of(encoder, GRIDS[1:], seed=1) + junk
    alone = encoder.encode(mine, GRIDS[:1])
    output = encoder.encode(torch.cat((others, mine)), torch.cat((GRIDS[1:], GRIDS[:1])))
    return torch.equal(output.tokens[len(others) :], alone.tokens) and torch.equal(output.pooled[-1], alone.pooled[0])
