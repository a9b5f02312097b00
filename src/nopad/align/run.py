"""Alignment: the packed encoder against the original model, token by token and layer by layer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from nopad.align.metrics import AlignReport, Run, compare
from nopad.align.references import ReferenceModel, reference_of
from nopad.checkpoints.files import open_checkpoint
from nopad.encoder import PackedEncoder
from nopad.environment import device_name, dtype_name, versions
from nopad.loading import load
from nopad.packing import Pack, unpatchify

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def align(
    checkpoint: str | Path,
    *,
    images: str | Path | Sequence[Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    precision: Literal["fp8"] | None = None,
    compile: bool = False,
    threshold: float = 0.99,
    batch_size: int = 2,
    image_size: int | None = None,
    noise: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> AlignReport:
    """Prove that the packed encoder gives the original's features.

    Both sides load the same weights and run in the same dtype on the same device: the original one image (or frame)
    at a time, the packed encoder all images of a case in one pack. With a `precision` the packed encoder alone has it,
    and the cosines alone decide.

    Args:
        checkpoint: as `nopad.load` takes it.
        images: a folder of photos, or photos as `PackedEncoder.pack` takes them.
        device, dtype, attention, precision: as `nopad.load` takes them.
        compile: compare tokens and pooling of the layers that `PackedEncoder.compile` makes, for packs that hold the
            largest case; what is told of single layers is then of layers that run one by one.
        threshold: least cosine between a token and the original's.
        batch_size: images of the case of one size.
        image_size: side in pixels of that case, and of the photos: a multiple of the patch size, and where the original
            takes one size, that one; else the model's own rule.
        noise: run the cases made of seeded noise.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the checkpoint's own code where its original is not part of transformers.
        progress: told what is being done.

    Raises:
        ValueError: an argument out of its range, no photo in the folder, a checkpoint that does not load, or no
            original at hand.
    """
    if not -1 <= threshold <= 1 or batch_size < 1:
        raise ValueError(f"expected a threshold in [-1, 1] and a batch_size ≥ 1, got {threshold} and {batch_size}")
    if torch.device(device).type == "meta":
        raise ValueError(f"device: expected one with values, such as cpu or cuda, got {str(device)!r}")
    photos = None if images is None else _photos(images)
    progress(f"loading {checkpoint}")
    packed: Any = load(checkpoint, revision=revision, dtype=torch.float32)
    reference = reference_of(packed).of(str(checkpoint), revision=revision, trust_remote_code=trust_remote_code)
    if image_size is not None:
        _check_size(image_size, packed.patch_size, reference.only_grid(packed))
    state, weights = _original_weights(packed, reference, checkpoint, revision)
    packed = packed.to(device=device, dtype=dtype)
    if precision is not None:
        packed.to_precision(precision)
    packed.set_attention(attention)
    exact = reference.load(packed, state, torch.float32).to(device=device)
    original = exact if dtype == torch.float32 else reference.load(packed, state, dtype).to(device=device)
    cases, skipped = _cases(packed, reference, photos, batch_size, image_size, noise)
    if packed.projection_dim is not None:
        skipped.append(f"image_embeds: {reference.describe(original)} ends at pooled and has no projection")
    memory: dict[tuple[int, torch.dtype], Run] = {}

    def remembered(model: PreTrainedModel, pixels: Tensor) -> Run:
        key = (id(pixels), model.dtype)
        if key not in memory:
            memory[key] = _run_original(reference, model, pixels, packed.frames_attend_jointly)
        return memory[key]

    results = []
    # Convolutions in float32 would run in TF32 by default, and only the original has one.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        if compile:
            progress("compiling")
            _compile(packed, [pixels for _, pixels in cases])
        for name, pixels in cases:
            progress(f"{name}: {len(pixels)} image{'s' if len(pixels) > 1 else ''}")
            ours = _run_packed(packed, pixels)
            theirs = [remembered(original, image) for image in pixels]
            truth = None if original is exact else [remembered(exact, image) for image in pixels]
            results.append(compare(name, ours, theirs, truth, threshold, same_arithmetic=precision is None))
    return AlignReport(
        checkpoint=str(checkpoint),
        family=packed.family,
        original=reference.describe(original),
        weights=weights,
        device=device_name(device),
        dtype=dtype_name(dtype),
        precision=packed.precision,
        attention=packed.attention,
        execution=packed.execution,
        capacity=packed.compiled_capacity,
        threshold=threshold,
        versions=versions(device),
        cases=tuple(results),
        skipped=tuple(skipped),
    )


def _original_weights(
    packed: PackedEncoder, reference: ReferenceModel, checkpoint: str | Path, revision: str | None
) -> tuple[dict[str, Tensor], str]:
    """The original's tensors, and where they came from."""
    names = reference.names(packed)
    spoken = next((other for other in packed.dialects if other.name == packed.dialect), None)
    if spoken is not None and spoken.is_original:
        # The file's own tensors: nothing that nopad converts stands between them and the original.
        part = spoken.select(open_checkpoint(checkpoint, revision=revision))
        state = {name: tensor[...] for name, tensor in spoken.convert(part).tensors.items() if name in names}
        return state, f"read from the checkpoint as it is ({spoken.name} names)"
    made = "seeded random"
    if packed.dialect is not None:
        made = f"{packed.dialect} names, converted by nopad to {packed.original_dialect().name} names"
    return {name: tensor for name, tensor in packed.state_dict().items() if name in names}, made


def _cases(
    packed: PackedEncoder,
    reference: ReferenceModel,
    photos: Sequence[Any] | None,
    batch_size: int,
    image_size: int | None,
    noise: bool,
) -> tuple[list[tuple[str, list[Tensor]]], list[str]]:
    """Named lists of normalised pixels `(C, H, W)` or `(frames, C, H, W)`, and what cannot be asked of the original."""
    size = packed.patch_size
    only = reference.only_grid(packed)
    side = 16 if image_size is None else image_size // size
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        *frames, rows, columns = shape
        return torch.randn(*frames, packed.config.num_channels, rows * size, columns * size, generator=generator)

    one_size = [make(*(only or (side, side))) for _ in range(batch_size)]
    cases, skipped = [], []
    if noise and only is None:
        several = [make(*grid) for grid in ((8, 8), (5, 17), (14, 6), (1, 60))]
        # Many of them: in half precision one token's distance is chance.
        single = [make(1, 1) for _ in range(64)]
        clip = make(3, 9, 12)
        cases += [(f"{side} × {side} patches, batched", one_size)]
        cases += [(" × ".join(str(s // size) for s in image.shape[1:]) + " patches", [image]) for image in several]
        mixed = [*several[:3], clip, single[0], several[3]]
        cases += [("64 images of one patch", single), ("a clip of 3 frames", [clip]), ("all sizes in one pack", mixed)]
        cases += [("the same pack in another order", [mixed[i] for i in (4, 2, 0, 5, 3, 1)])]
    elif noise and only is not None:
        clip = make(3, *only)
        cases += [(f"{only[0]} × {only[1]} patches, batched", one_size), ("a clip of 3 frames", [clip])]
        cases += [("images and a clip in one pack", [*one_size, clip])]
        cases += [("the same pack in another order", [clip, *reversed(one_size)])]
        skipped.append(f"several sizes: the original takes {only[0]} × {only[1]} patches and nothing else")
    if photos is not None:
        rule = packed.preprocessing
        if image_size is not None:
            rule = dataclasses.replace(rule, rule="crop", size=image_size, max_patches=None)
        pack = packed.pack(photos, resize="pil", preprocessing=rule).to("cpu", torch.float32)
        parts = pack.hidden_states.split(pack.grid_thw.prod(dim=1).tolist())
        grids = [(t, h, w) for t, h, w in pack.grid_thw.tolist()]
        pixels = [unpatchify(part, grid, size, pack.patch_order) for part, grid in zip(parts, grids, strict=True)]
        cases += [(f"{len(photos)} photo{'s' if len(photos) > 1 else ''} in one pack", pixels)]
    return cases, skipped


def _check_size(image_size: int, patch_size: int, only: tuple[int, int] | None) -> None:
    if image_size < patch_size or image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(
            f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}; give one, such as {nearest}"
        )
    if only is not None and {image_size // patch_size} != set(only):
        height, width = (patches * patch_size for patches in only)
        raise ValueError(
            f"image_size: the original takes {height} × {width} pixels and nothing else, got {image_size}; leave it out"
        )


def _photos(images: str | Path | Sequence[Any]) -> Sequence[Any]:
    if not isinstance(images, str | Path):
        if not len(images):
            raise ValueError("images: expected at least one, got an empty list; give photos, or a folder of them")
        return images
    found = sorted(path for path in Path(images).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"images: expected photos ({', '.join(IMAGE_SUFFIXES)}) in {str(images)!r}, got none")
    return found


def _compile(packed: PackedEncoder, cases: list[list[Tensor]]) -> None:
    """Compile for packs that hold every case."""
    rows, segments = 1, 1
    for pixels in cases:
        frames = [len(image) if image.ndim == 4 else 1 for image in pixels]
        number = len(pixels) if packed.frames_attend_jointly else sum(frames)
        area = packed.patch_size**2
        patches = sum(f * image.shape[-2] * image.shape[-1] for f, image in zip(frames, pixels, strict=True)) // area
        rows, segments = max(rows, patches + number * packed.num_prefix_tokens), max(segments, number)
    packed.compile(1 << (rows - 1).bit_length(), segments)


def _run_packed(packed: PackedEncoder, pixels: list[Tensor]) -> list[Run]:
    """Each image's share of one pack."""
    pack = Pack.of(pixels, packed.patch_size, packed.patch_order).to(packed.device, packed.dtype)
    output = packed.encode(pack, output_hidden_states=True)
    hidden_states = output.hidden_states or ()
    if packed.compiled_capacity is not None:
        output = packed.encode(pack)  # asked for every layer's tokens, it runs as if it were not compiled
    lengths = pack.grid_thw.prod(dim=1).tolist()
    tokens = output.tokens.float().cpu().split(lengths)
    states = [state.float().cpu().split(lengths) for state in hidden_states]
    pooled = output.pooled.float().cpu()
    return [Run(tokens[i], tuple(state[i] for state in states), pooled[i]) for i in range(len(pixels))]


def _run_original(reference: ReferenceModel, original: PreTrainedModel, pixels: Tensor, jointly: bool) -> Run:
    """The original on one image, or on a clip: as a whole where its frames attend `jointly`, else frame by frame."""
    tokens, layers_of_frames, pooled = [], [], []
    for frame in pixels if pixels.ndim == 4 and not jointly else pixels[None]:
        states: list[Tensor] = []
        layers = reference.layers(original)

        def before(layer: Any, arguments: Any, into: list[Tensor] = states) -> None:
            into.append(arguments[0])

        def after(layer: Any, arguments: Any, output: Any, into: list[Tensor] = states) -> None:
            into.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_pre_hook(before) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(after))
        try:
            of_frame, vector = reference.run(original, frame.to(original.device, original.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        tokens.append(of_frame)
        layers_of_frames.append([reference.patch_tokens(state[0]) for state in states])
        pooled += [] if vector is None else [vector]
    return Run(
        torch.cat(tokens).float().cpu(),
        tuple(torch.cat(frames).float().cpu() for frames in zip(*layers_of_frames, strict=True)),
        torch.stack(pooled).float().mean(dim=0).cpu() if pooled else None,
    )
