"""Alignment: the packed encoder compared with the reference model, token by token and layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nopad.align.cases import Case, check_image_size, noise_cases, photo_case, photos_in
from nopad.align.metrics import ModelOutput, compare, worst_image
from nopad.align.outputs import packed_outputs, reference_output
from nopad.align.reference_model import ReferenceModel
from nopad.align.references import reference_of
from nopad.align.report import AlignReport, CaseResult, WorstImage
from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.checkpoints.towers import open_tower
from nopad.counts import check_count, counted
from nopad.encoder import PackedEncoder
from nopad.environment import check_device, device_name, dtype_name, versions
from nopad.loading import load

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
    and the cosines alone decide. In float32 on a CPU both share the memory of the weights.

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
    cases, skipped = noise_cases(packed, only_grid, batch_size, image_size) if noise else ([], [])
    if photos is not None:
        cases.append(photo_case(packed, photos, image_size))
    originals = _Originals.run(packed, reference, state, dtype, cases, progress)
    del state
    if packed.projection_dim is not None:
        skipped.append(f"image_embeds: {originals.name} ends at pooled and has no projection")
    if compile:
        progress("compiling")
        _compile(packed, [pixels for _, pixels in cases])
    results, worst_images = _compare_all(packed, originals, cases, threshold, progress)
    if photos is not None:  # more instructive than noise
        worst_images = worst_images[-1:]
    return AlignReport(
        checkpoint=str(checkpoint),
        weights=weights,
        threshold=threshold,
        cases=tuple(results),
        skipped=tuple(skipped),
        worst=max(worst_images, key=lambda image: float(image.difference.max()), default=None),
        family=packed.family,
        reference=originals.name,
        device=device_name(packed.device),
        dtype=dtype_name(dtype),
        precision=packed.precision,
        attention=packed.attention_backend,
        execution=packed.execution,
        capacity=packed.compiled_capacity,
        versions=versions(packed.device),
    )


def _check(batch_size: int, image_size: int | None, threshold: float) -> None:
    check_count("batch_size", batch_size)
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int)):
        check_count("image_size", image_size)  # integers are checked further by `check_image_size`
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [-1, 1], got {threshold!r}")


@dataclass(frozen=True)
class _Originals:
    """What the reference returns for the images of all cases.

    Attributes:
        name: the reference's, in reports.
        outputs: of each image by its `id`, in the dtype of the comparison.
        outputs_fp32: the same in float32, `None` where that is the dtype of the comparison.
    """

    name: str
    outputs: dict[int, ModelOutput]
    outputs_fp32: dict[int, ModelOutput] | None

    @classmethod
    def run(
        cls,
        packed: PackedEncoder,
        reference: ReferenceModel,
        state: Mapping[str, Tensor | StoredTensor],
        dtype: torch.dtype,
        cases: Sequence[Case],
        progress: Callable[[str], None],
    ) -> _Originals:
        """The reference with the tensors of `state` on each image once, in float32 and then in `dtype`.

        One model is in memory at a time, and it shares the weights that `packed` has to the bit.
        """
        images = list({id(image): image for _, pixels in cases for image in pixels}.values())
        together = packed.frames_attend_jointly or packed.temporal_patch_size > 1

        def outputs_in(dtype: torch.dtype) -> tuple[str, dict[int, ModelOutput]]:
            progress(f"the reference in {dtype_name(dtype)}: {counted(len(images), 'image')}")
            model = reference.load(packed, _shared(state, packed, dtype), dtype).to(device=packed.device)
            with _same_arithmetic():
                outputs = {id(image): reference_output(reference, model, image, together) for image in images}
            return reference.describe(model), outputs

        fp32 = None if dtype == torch.float32 else outputs_in(torch.float32)[1]
        name, outputs = outputs_in(dtype)
        return cls(name, outputs, fp32)


def _shared(state: Mapping[str, Tensor | StoredTensor], packed: PackedEncoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of `state` in `dtype`, read one by one; on a CPU the encoder's own where they have its bits."""
    own = dict(packed.named_parameters()) if packed.device.type == "cpu" else {}

    def pick(name: str, stored: Tensor | StoredTensor) -> Tensor:
        mine, tensor = own.get(name), stored[...].to(dtype)
        return tensor if mine is None or mine.dtype != dtype or not torch.equal(mine, tensor) else mine.detach()

    return {name: pick(name, tensor) for name, tensor in state.items()}


@contextmanager
def _same_arithmetic() -> Iterator[None]:
    """Convolutions in float32 would run in TF32 by default, and only the reference has one."""
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        yield


def _compare_all(
    packed: PackedEncoder,
    originals: _Originals,
    cases: Sequence[Case],
    threshold: float,
    progress: Callable[[str], None],
) -> tuple[list[CaseResult], list[WorstImage]]:
    """Run the packed encoder on each case, and compare it with the reference.

    Returns:
        For each case its result, and where tokens differ most.
    """
    rule, size = packed.preprocessing, packed.patch_size
    same_arithmetic = packed.precision is None
    results, worst_images = [], []
    for name, pixels in cases:
        progress(f"{name}: {counted(len(pixels), 'image')}")
        with _same_arithmetic():
            actual = packed_outputs(packed, pixels)
        expected = [originals.outputs[id(image)] for image in pixels]
        of_fp32 = originals.outputs_fp32
        fp32 = None if of_fp32 is None else [of_fp32[id(image)] for image in pixels]
        results.append(compare(name, actual, expected, fp32, threshold, same_arithmetic=same_arithmetic))
        worst_images.append(worst_image(name, pixels, actual, expected, size, rule.mean, rule.std))
    return results, worst_images


def _reference_weights(
    packed: PackedEncoder, reference: ReferenceModel, checkpoint: str | Path, revision: str | None
) -> tuple[Mapping[str, Tensor | StoredTensor], str]:
    """The reference's tensors, of a file as they are stored, and their origin."""
    names = reference.names(packed)
    dialect = next((other for other in packed.dialects if other.name == packed.dialect), None)
    if dialect is not None and dialect.is_original:
        # The tensors of the file, without nopad's conversion.
        families = {packed.family: packed.dialects}
        part = dialect.select(open_tower(checkpoint, families, packed.tower_prefix, revision=revision))
        state = _named_as(names, dialect.convert(part).tensors, packed)
        return state, f"read from the checkpoint as it is ({dialect.name} names)"
    origin = "seeded random"
    if packed.dialect is not None:
        origin = f"{packed.dialect} names, converted by nopad to {packed.original_dialect().name} names"
    return _named_as(names, packed.state_dict(), packed), origin


def _named_as(
    names: Set[str], state: Mapping[str, Tensor | StoredTensor], packed: PackedEncoder
) -> Mapping[str, Tensor | StoredTensor]:
    """Those tensors of an encoder that have a reference's names: in memory classes of older transformers have the names
    of files, C-RADIO's for its layers those of DINOv2's."""
    dialects = *packed.dialects, *DIALECTS["dinov2"]
    of_files = next((dialect.table for dialect in dialects if dialect.matches(names)), None)
    if of_files is not None and of_files.renames and not names <= state.keys():
        renamed = of_files.to_file({name: tensor[...] for name, tensor in state.items()})
        state = max(state, renamed, key=lambda each: len(names & each.keys()))
    return {name: tensor for name, tensor in state.items() if name in names}


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
