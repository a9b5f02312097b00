"""Alignment: the packed encoder compared with the reference model, token by token and layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from nopad.align.cases import check_image_size, noise_cases, photo_case, photos_in
from nopad.align.metrics import ModelOutput, compare, worst_image
from nopad.align.reference_model import ReferenceModel
from nopad.align.references import reference_of
from nopad.align.report import AlignReport, CaseResult, WorstImage
from nopad.checkpoints.towers import open_tower
from nopad.counts import check_count, counted
from nopad.encoder import PackedEncoder
from nopad.environment import check_device, device_name, dtype_name, versions
from nopad.loading import load
from nopad.packing import Pack

logger = logging.getLogger(__name__)


def align(
    checkpoint: str | Path,
    *,
    images: str | Path | Sequence[Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    precision: Literal["fp8", "int8"] | None = None,
    compile: bool = False,
    threshold: float = 0.99,
    batch_size: int = 2,
    image_size: int | None = None,
    noise: bool = True,
    revision: str | None = None,
    prefix: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> AlignReport:
    """Compare the packed encoder's features with the reference model's.

    Both sides load the same weights and run in the same dtype on the same device: the reference one image (or frame)
    at a time, the packed encoder all images of a case in one pack. With a `precision` the packed encoder alone has it,
    and the cosines alone decide.

    Args:
        checkpoint: as `nopad.load` takes it.
        images: a folder of photos, or photos as `PackedEncoder.pack` takes them.
        device, dtype, attention, precision, revision, prefix: as `nopad.load` takes them.
        compile: compare tokens and pooling of compiled layers, see `PackedEncoder.compile`, for packs that hold the
            largest case; per-layer numbers then come from the uncompiled layers.
        threshold: every cosine between a token and the reference's has to be above it.
        batch_size: images of the case of one size.
        image_size: side in pixels of that case, and of the photos: a multiple of the patch size and, where the
            reference takes one size, that one; else the model's own rule.
        noise: run the cases made of seeded noise.
        trust_remote_code: run the checkpoint's own code where its reference is not part of transformers.
        progress: called with a line for each step.

    Raises:
        ValueError: an argument out of its range, no photo in the folder, a checkpoint that does not load, or no
            reference.
    """
    _check(batch_size, image_size, threshold)
    check_device("device", device)
    photos = None if images is None else photos_in(images)
    progress(f"loading {checkpoint}")
    packed: Any = load(checkpoint, revision=revision, prefix=prefix, dtype=torch.float32)
    reference = reference_of(packed).of(str(checkpoint), revision=revision, trust_remote_code=trust_remote_code)
    only_grid = reference.only_grid(packed)
    if image_size is not None:
        check_image_size(image_size, packed.patch_size, only_grid, packed.merge_size)
    state, weights = _reference_weights(packed, reference, checkpoint, revision)
    packed = packed.to(device=device, dtype=dtype)
    if precision is not None:
        packed.to_precision(precision)
    packed.set_attention(attention)
    sides = _Sides.of(packed, reference, state)
    cases, skipped = noise_cases(packed, only_grid, batch_size, image_size) if noise else ([], [])
    if photos is not None:
        cases.append(photo_case(packed, photos, image_size))
    if packed.projection_dim is not None:
        skipped.append(f"image_embeds: {reference.describe(sides.model)} ends at pooled and has no projection")
    if compile:
        progress("compiling")
        _compile(packed, [pixels for _, pixels in cases])
    results, worst_images = _compare_all(sides, cases, threshold, progress)
    if photos is not None:  # more instructive than noise
        worst_images = worst_images[-1:]
    return AlignReport(
        checkpoint=str(checkpoint),
        weights=weights,
        threshold=threshold,
        cases=tuple(results),
        skipped=tuple(skipped),
        worst=max(worst_images, key=lambda image: float(image.difference.max()), default=None),
        **sides.describe(),
    )


def _check(batch_size: int, image_size: int | None, threshold: float) -> None:
    check_count("batch_size", batch_size)
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int)):
        check_count("image_size", image_size)  # integers are checked further by `check_image_size`
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [-1, 1], got {threshold!r}")


@dataclass(frozen=True)
class _Sides:
    """Both sides of a comparison, with the same weights on one device.

    Attributes:
        packed: the encoder.
        reference: how its reference is run.
        model: the reference in the encoder's dtype.
        model_fp32: the reference in float32; `model` itself where that is the encoder's dtype.
    """

    packed: Any
    reference: ReferenceModel
    model: PreTrainedModel
    model_fp32: PreTrainedModel

    @classmethod
    def of(cls, packed: PackedEncoder, reference: ReferenceModel, state: dict[str, Tensor]) -> _Sides:
        """An encoder beside its reference with the tensors of `state`, on the encoder's device."""
        model_fp32 = reference.load(packed, state, torch.float32).to(device=packed.device)
        if packed.dtype == torch.float32:
            return cls(packed, reference, model_fp32, model_fp32)
        return cls(packed, reference, reference.load(packed, state, packed.dtype).to(device=packed.device), model_fp32)

    def describe(self) -> dict[str, Any]:
        """The fields of an `AlignReport` that say what was compared, and on what."""
        packed = self.packed
        return {
            "family": packed.family,
            "reference": self.reference.describe(self.model),
            "device": device_name(packed.device),
            "dtype": dtype_name(self.model.dtype),
            "precision": packed.precision,
            "attention": packed.attention_backend,
            "execution": packed.execution,
            "capacity": packed.compiled_capacity,
            "versions": versions(packed.device),
        }


def _compare_all(
    sides: _Sides, cases: Sequence[tuple[str, list[Tensor]]], threshold: float, progress: Callable[[str], None]
) -> tuple[list[CaseResult], list[WorstImage]]:
    """Compare both sides on each case; an image that several cases share goes through the reference once.

    Returns:
        For each case its result, and where tokens differ most.
    """
    packed, rule = sides.packed, sides.packed.preprocessing
    together = packed.frames_attend_jointly or packed.temporal_patch_size > 1
    outputs: dict[tuple[int, torch.dtype], ModelOutput] = {}

    def reference_outputs(model: PreTrainedModel, pixels: list[Tensor]) -> list[ModelOutput]:
        for image in pixels:
            if (id(image), model.dtype) not in outputs:
                outputs[id(image), model.dtype] = _run_reference(sides.reference, model, image, together)
        return [outputs[id(image), model.dtype] for image in pixels]

    results, worst_images = [], []
    # Convolutions in float32 would run in TF32 by default, and only the reference has one.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for name, pixels in cases:
            progress(f"{name}: {counted(len(pixels), 'image')}")
            actual, expected = _run_packed(packed, pixels), reference_outputs(sides.model, pixels)
            is_fp32 = sides.model is sides.model_fp32
            expected_fp32 = None if is_fp32 else reference_outputs(sides.model_fp32, pixels)
            same_arithmetic = packed.precision is None
            results.append(compare(name, actual, expected, expected_fp32, threshold, same_arithmetic=same_arithmetic))
            worst_images.append(worst_image(name, pixels, actual, expected, packed.patch_size, rule.mean, rule.std))
    return results, worst_images


def _reference_weights(
    packed: PackedEncoder, reference: ReferenceModel, checkpoint: str | Path, revision: str | None
) -> tuple[dict[str, Tensor], str]:
    """The reference's tensors, and their origin."""
    names = reference.names(packed)
    dialect = next((other for other in packed.dialects if other.name == packed.dialect), None)
    if dialect is not None and dialect.is_original:
        # The tensors of the file, without nopad's conversion.
        families = {packed.family: packed.dialects}
        part = dialect.select(open_tower(checkpoint, families, packed.tower_prefix, revision=revision))
        state = {name: tensor[...] for name, tensor in dialect.convert(part).tensors.items() if name in names}
        return state, f"read from the checkpoint as it is ({dialect.name} names)"
    origin = "seeded random"
    if packed.dialect is not None:
        origin = f"{packed.dialect} names, converted by nopad to {packed.original_dialect().name} names"
    return {name: tensor for name, tensor in packed.state_dict().items() if name in names}, origin


def _compile(packed: PackedEncoder, cases: list[list[Tensor]]) -> None:
    """Compile for packs that hold every case."""
    rows, segments = 1, 1
    for pixels in cases:
        frames = [-(-len(image) // packed.temporal_patch_size) if image.ndim == 4 else 1 for image in pixels]
        num_segments = len(pixels) if packed.frames_attend_jointly else sum(frames)
        area = packed.patch_size**2
        patches = sum(f * image.shape[-2] * image.shape[-1] for f, image in zip(frames, pixels, strict=True)) // area
        rows, segments = max(rows, patches + num_segments * packed.num_prefix_tokens), max(segments, num_segments)
    packed.compile(1 << (rows - 1).bit_length(), segments)


def _run_packed(packed: PackedEncoder, pixels: list[Tensor]) -> list[ModelOutput]:
    """The packed encoder on all images in one pack, image by image."""
    frames = packed.temporal_patch_size
    pack = Pack.of(pixels, packed.patch_size, packed.patch_order, temporal_patch_size=frames)
    pack = pack.to(packed.device, packed.dtype)
    output = packed.encode(pack, output_hidden_states=True)
    hidden_states = output.hidden_states or ()
    if packed.compiled_capacity is not None:
        output = packed.encode(pack)  # with hidden states it runs as if it were not compiled
    lengths = pack.grid_thw.prod(dim=1).tolist()
    tokens = output.tokens.float().cpu().split(lengths)
    layers = [states.float().cpu().split(lengths) for states in hidden_states]
    pooled = output.pooled.float().cpu()
    return [ModelOutput(tokens[i], tuple(states[i] for states in layers), pooled[i]) for i in range(len(pixels))]


def _run_reference(reference: ReferenceModel, model: PreTrainedModel, pixels: Tensor, together: bool) -> ModelOutput:
    """The reference on an image or a clip: as a whole where the encoder takes frames `together`, else each frame."""
    tokens, layers_of_frames, pooled = [], [], []
    for frame in pixels if pixels.ndim == 4 and not together else pixels[None]:
        hidden_states: list[Tensor] = []
        layers = reference.layers(model)

        def before(layer: Any, arguments: Any, into: list[Tensor] = hidden_states) -> None:
            into.append(arguments[0])

        def after(layer: Any, arguments: Any, output: Any, into: list[Tensor] = hidden_states) -> None:
            into.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_pre_hook(before) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(after))
        try:
            of_frame, vector = reference.run(model, frame.to(model.device, model.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        tokens.append(of_frame)
        layers_of_frames.append([reference.layer_tokens(model, states, frame) for states in hidden_states])
        pooled += [] if vector is None else [vector]
    return ModelOutput(
        torch.cat(tokens).float().cpu(),
        tuple(torch.cat(frames).float().cpu() for frames in zip(*layers_of_frames, strict=True)),
        torch.stack(pooled).float().mean(dim=0).cpu() if pooled else None,
    )
