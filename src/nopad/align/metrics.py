"""Differences between the features of two models, and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nopad.align.report import DISTANCE_LIMIT, POOLED_LIMIT, RELATIVE_LIMIT, CaseResult, WorstImage

HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class ModelOutput:
    """Output of a model for one image or clip, on the CPU, in float32.

    Attributes:
        tokens: `(T, D)`.
        hidden_states: `(T, D)` before the first layer and after each.
        pooled: `(D,)`, `None` where the model does not pool.
    """

    tokens: Tensor
    hidden_states: tuple[Tensor, ...]
    pooled: Tensor | None


def _relative(features: Tensor, reference: Tensor) -> Tensor:
    return (features - reference).norm(dim=-1) / reference.norm(dim=-1)


def worst_image(
    case: str,
    pixels: Sequence[Tensor],
    packed: Sequence[ModelOutput],
    reference: Sequence[ModelOutput],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> WorstImage:
    """The image of a case with the token that differs most; NaN is more than any number.

    Args:
        case: its name.
        pixels: normalised `(C, H, W)` or `(frames, C, H, W)`, image by image.
        packed, reference: outputs, image by image.
        patch_size: side of a patch in pixels.
        mean, std: the statistics of each colour.
    """
    differences = [_relative(*pair).nan_to_num(math.inf) for pair in _tokens(packed, reference)]
    index = max(range(len(pixels)), key=lambda image: float(differences[image].max()))
    clip = pixels[index] if pixels[index].ndim == 4 else pixels[index][None]
    rows, columns = (side // patch_size for side in clip.shape[-2:])
    frames = differences[index].reshape(-1, rows, columns)
    frame = int(frames.flatten(1).amax(1).argmax())
    shown = clip[frame * -(-len(clip) // len(frames))]  # of the frames of a patch, the first
    colours = shown[:3] if clip.shape[1] >= 3 else shown[:1].expand(3, -1, -1)
    scale, shift = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (std, mean))
    levels = (colours.float() * scale + shift).clamp(0, 1).mul(255).round().byte()
    return WorstImage(case, frames[frame], levels.permute(1, 2, 0).contiguous().numpy())


def _tokens(packed: Sequence[ModelOutput], reference: Sequence[ModelOutput]) -> list[tuple[Tensor, Tensor]]:
    return [(output.tokens, expected.tokens) for output, expected in zip(packed, reference, strict=True)]


def _cosine(features: Tensor, reference: Tensor) -> Tensor:
    return torch.cosine_similarity(features.double(), reference.double(), dim=-1)


def _pooled(outputs: list[ModelOutput]) -> Tensor | None:
    """`(N, D)`, `None` where the model does not pool."""
    vectors = [output.pooled for output in outputs if output.pooled is not None]
    return torch.stack(vectors) if vectors else None


def compare(
    name: str,
    packed: list[ModelOutput],
    reference: list[ModelOutput],
    reference_fp32: list[ModelOutput] | None,
    threshold: float,
    *,
    same_arithmetic: bool = True,
) -> CaseResult:
    """All numbers of a case; NaN fails every limit.

    Args:
        name: of the case.
        packed, reference: outputs of the packed model and of the reference, image by image.
        reference_fp32: outputs of the reference in float32, unless `reference` is that.
        threshold: every cosine has to be above it.
        same_arithmetic: both ran in one number format, so the limits on differences apply, too.
    """
    tokens, expected = (torch.cat([output.tokens for output in side]) for side in (packed, reference))
    cosine = _cosine(tokens, expected)
    relative, absolute = _relative(tokens, expected), (tokens - expected).abs()
    # Reduced by torch: Python's min and max pass over a NaN that does not stand first.
    pooled, expected_pooled = _pooled(packed), _pooled(reference)
    min_pooled_cosine = max_pooled_relative = None
    if pooled is not None and expected_pooled is not None:
        min_pooled_cosine = float(_cosine(pooled, expected_pooled).min())
        max_pooled_relative = float(_relative(pooled, expected_pooled).max())
    pairs = list(zip(packed, reference, strict=True))
    layers = [
        [(output.hidden_states[i], expected.hidden_states[i]) for output, expected in pairs]
        for i in range(len(packed[0].hidden_states))
    ]
    failures = _cosine_failures(float(cosine.min()), min_pooled_cosine, threshold)
    distance = reference_distance = pooled_distance = reference_pooled_distance = None
    if reference_fp32 is None:
        if same_arithmetic:
            failures += _relative_failures(float(relative.max()), max_pooled_relative)
    else:
        exact, exact_pooled = torch.cat([output.tokens for output in reference_fp32]), _pooled(reference_fp32)
        distance, reference_distance = (float(_relative(each, exact).mean()) for each in (tokens, expected))
        if pooled is not None and expected_pooled is not None and exact_pooled is not None:
            pooled_distance = float(_relative(pooled, exact_pooled).mean())
            reference_pooled_distance = float(_relative(expected_pooled, exact_pooled).mean())
        if same_arithmetic:
            failures += _distance_failures(distance, reference_distance, pooled_distance, reference_pooled_distance)
    return CaseResult(
        name=name,
        images=len(packed),
        tokens=len(tokens),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        max_abs=float(absolute.max()),
        mean_abs=float(absolute.mean()),
        max_relative=float(relative.max()),
        mean_relative=float(relative.mean()),
        min_pooled_cosine=min_pooled_cosine,
        max_pooled_relative=max_pooled_relative,
        distance=distance,
        reference_distance=reference_distance,
        pooled_distance=pooled_distance,
        reference_pooled_distance=reference_pooled_distance,
        drift=tuple(float(torch.stack([_relative(*pair).max() for pair in layer]).max()) for layer in layers),
        layer_cosines=tuple(float(torch.stack([_cosine(*pair).min() for pair in layer]).min()) for layer in layers),
        histogram=_histogram(cosine),
        passed=not failures,
        failures=tuple(failures),
    )


def _cosine_failures(min_cosine: float, min_pooled_cosine: float | None, threshold: float) -> list[str]:
    return [
        f"minimum {kind}cosine {cosine:.6f}, expected more than {threshold}"
        for kind, cosine in (("", min_cosine), ("pooled ", min_pooled_cosine))
        if cosine is not None and not cosine > threshold
    ]


def _relative_failures(max_relative: float, max_pooled_relative: float | None) -> list[str]:
    return [
        f"{kind}relative error {error:.2e}, expected at most {RELATIVE_LIMIT:.0e}"
        for kind, error in (("", max_relative), ("pooled ", max_pooled_relative))
        if error is not None and not error <= RELATIVE_LIMIT
    ]


def _distance_failures(
    distance: float, reference_distance: float, pooled: float | None, reference_pooled: float | None
) -> list[str]:
    failures = []
    if not distance <= DISTANCE_LIMIT * reference_distance:
        failures.append(
            f"distance to float32 {distance:.3e}, expected at most {DISTANCE_LIMIT} × the reference's own "
            f"{reference_distance:.3e}"
        )
    if pooled is not None and reference_pooled is not None:
        limit = max(reference_pooled, reference_distance)
        if not pooled <= POOLED_LIMIT * limit:
            failures.append(
                f"pooled distance to float32 {pooled:.3e}, expected at most {POOLED_LIMIT} × {limit:.3e}, the larger "
                f"of the reference's own and its tokens'"
            )
    return failures


def _histogram(cosine: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Tokens by `log10(1 - cosine)`, half a power of ten a bin; closer than 1e-12 counts as 1e-12."""
    edges = torch.linspace(-12, 0, HISTOGRAM_BINS + 1, dtype=torch.float64)
    distance = (1 - cosine).clamp(1e-12, 1).log10()
    counts = torch.histogram(distance.nan_to_num(0.0), edges).hist
    return tuple(
        (float(10**low), float(10**high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)
    )
