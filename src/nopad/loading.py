"""`nopad.load` and `nopad.processor`: from a checkpoint's name to an encoder, or to the processor of its packs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.files import checkpoint_name
from nopad.checkpoints.pretrained import config_errors, read_architecture, select_part
from nopad.checkpoints.strict import check_dtype, with_options
from nopad.checkpoints.towers import open_tower
from nopad.encoder import PackedEncoder
from nopad.families import family_of, family_of_published
from nopad.inference.attention import check_backend
from nopad.inference.precision import check_precision
from nopad.patches import PatchOrder
from nopad.pipeline.pack_processor import PackProcessor
from nopad.pipeline.processor import check_channels
from nopad.preprocessing.rules import Resize
from nopad.preprocessing.size import Size, check_size
from nopad.published import UNTRAINED


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    patch_order: PatchOrder | None = None,
    positions: Literal["resample", "strict"] | None = None,
    precision: Literal["fp8", "int8"] | None = None,
    size: Size = "model",
    min_patches: int | None = None,
    max_patches: int | None = None,
    multiple_of: int | None = None,
    prefix: str | None = None,
    head: bool = True,
) -> PackedEncoder:
    """Load a pretrained vision encoder for packs.

    Args:
        checkpoint: a name on the Hugging Face Hub, a folder, a single `.safetensors` or `.pth` file, or
            `"untrained:<published name>"`: the published architecture with seeded random weights.
        revision: branch, tag or commit on the Hub.
        token: of the Hub, for gated and private models; unless given, `HF_TOKEN` or that of `hf auth login`, and with
            `False` none.
        device: where the encoder goes; the CPU by default.
        dtype: dtype of the weights; the checkpoint's by default.
        attention: the kernel, `"auto"` for the best that is there.
        patch_order: layout inside a patch; the family's by default.
        positions: on another grid than the trained one, `"resample"` learned positions or `"strict"`ly refuse.
        precision: `"fp8"` makes the layers' linear maps float8 products, weights scaled by row once and their input by
            row as it comes, but for those behind the attention and values of the first half of the layers; for
            inference alone. `"int8"` makes all of them integer products, scaled in the same way, on a CPU. `nopad
            align --precision` measures the effect on the features.
        size, min_patches, max_patches, multiple_of: of images, as `PackedEncoder.pack` takes them; the defaults of
            its `pack` and `embed`.
        prefix: of the vision tower's tensors in the checkpoint of a larger model, such as `"vision_tower"`; searched
            unless given.
        head: `False` leaves out head and projection, for towers whose tokens alone are used: every parameter then takes
            part in the forward. `pooled` is the CLS token or the mean, and a saved folder has no head either.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        ValueError: an unknown family, several vision towers, a tensor missing, unexpected or misshapen, a `precision`
            that does not take this device's dtype or the layers' sizes, a limit on patches that the size does not
            leave room for, or `head=False` for OneVision-Encoder, whose tokens need the norm that comes with the head.
        OSError: no such file or folder, and the Hub does not have it or cannot be reached.
    """
    check_backend(attention)
    if precision is not None:
        check_precision(precision)
    check_size(size)
    name = checkpoint_name(checkpoint)
    options: dict[str, Any] = {"dtype": dtype, "patch_order": patch_order, "positions": positions, "head": head}
    if name.startswith(UNTRAINED):
        published = _published_name(name, revision, prefix)
        encoder = family_of_published(published).untrained(published, **options)
    else:
        opened = open_tower(name, DIALECTS, prefix, revision=revision, token=token)
        encoder = family_of(opened).from_checkpoint(opened, **options)
    limits = {"min_patches": min_patches, "max_patches": max_patches, "multiple_of": multiple_of}
    if size != "model" or any(limit is not None for limit in limits.values()):
        encoder.preprocessing = encoder.preprocessing.with_size(size, **limits)
    if device is not None:
        try:
            encoder = encoder.to(device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:  # a torch without support, no such device
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"device: got {str(device)!r}: {error}") from error
    if precision is not None:
        encoder.to_precision(precision)
    encoder.set_attention(attention)  # once it is where it runs: a GPU's kernels cannot be had on the CPU
    return encoder


def processor(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    size: Size = "model",
    min_patches: int | None = None,
    max_patches: int | None = None,
    multiple_of: int | None = None,
    resize: Resize = "torch",
    dtype: torch.dtype | None = None,
    patch_order: PatchOrder | None = None,
    prefix: str | None = None,
) -> PackProcessor:
    """The processor that makes the packs of a checkpoint's encoder, without the encoder: small, picklable, on the CPU.

    `processor(images)` is bit for bit what `pack(images)` of the encoder is, loaded with the same arguments. It can be
    the `collate_fn` of a DataLoader. Of the weights only names, shapes and dtypes are read, and where the architecture
    is not in `config.json` the few values that determine it.

    Args:
        checkpoint, revision, token, dtype, patch_order, prefix: as `load` takes them.
        size, min_patches, max_patches, multiple_of, resize: as `PackedEncoder.pack` takes them.

    Raises:
        ValueError: an unknown family, a config that describes no encoder, or a limit on patches that the size does not
            leave room for.
        OSError: no such file or folder, and the Hub does not have it or cannot be reached.
    """
    check_size(size)
    name = checkpoint_name(checkpoint)
    config: Any
    if name.startswith(UNTRAINED):
        published = _published_name(name, revision, prefix)
        family = family_of_published(published)
        config = with_options(family.published_config(published), patch_order=patch_order)
        preprocessor, stored, described = None, torch.float32, nullcontext()
    else:
        opened = open_tower(name, DIALECTS, prefix, revision=revision, token=token)
        family = family_of(opened)
        dialect, part = select_part(family, opened)
        config = read_architecture(family, dialect.convert(part), None, {}, {"patch_order": patch_order})
        preprocessor, stored, described = opened.preprocessor, part.dtype, config_errors(opened)
    with described:
        check_channels(config)
        rule = family.read_preprocessing(config, preprocessor, name)
    dtype = dtype or (getattr(torch, stored, None) if isinstance(stored, str) else stored)
    check_dtype(dtype, f"checkpoint {name!r}: dtype")
    return PackProcessor(
        rule=rule.with_size(size, min_patches=min_patches, max_patches=max_patches, multiple_of=multiple_of),
        resize=resize,
        patch_size=config.patch_size,
        patch_order=config.patch_order,
        temporal_patch_size=getattr(config, "temporal_patch_size", 1),
        dtype=dtype,  # pyright: ignore[reportArgumentType] - checked
        num_prefix_tokens=family.count_prefix_tokens(config),
        frames_attend_jointly=family.frames_attend_jointly,
    )


def _published_name(name: str, revision: str | None, prefix: str | None) -> str:
    """The published name behind `untrained:`.

    Raises:
        ValueError: a revision or a prefix, which random weights do not have.
    """
    if revision is not None:
        raise ValueError(f"revision: {name!r} has random weights and no revisions, got {revision!r}")
    if prefix is not None:
        raise ValueError(f"prefix: {name!r} is an encoder and no part of a larger model, got {prefix!r}")
    return name.removeprefix(UNTRAINED)
