"""Differences between the features of two models, and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


def _all_tokens(outputs: list[ModelOutput]) -> Tensor:
    """`(T, D)` of all images."""
    return torch.cat([output.tokens for output in outputs])


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
        name: name of the case.
        packed, reference: outputs of the packed model and of the reference, image by image.
        reference_fp32: outputs of the reference in float32, unless `reference` is that.
        threshold: every cosine has to be above it.
        same_arithmetic: both ran in one number format, so the limits on differences apply, too.
    """
    tokens, expected = _all_tokens(packed), _all_tokens(reference)
    cosine = _cosine(tokens, expected)
    relative, absolute = _relative(tokens, expected), (tokens - expected).abs()
    # Reduced by torch: Python's min and max pass over a NaN that does not stand first.
    pooled, expected_pooled = _pooled(packed), _pooled(reference)
    min_pooled_cosine = max_pooled_relative = None
    if pooled is not None and expected_pooled is not None:
        min_pooled_cosine = float(_cosine(pooled, expected_pooled).min())
        max_pooled_relative = float(_relative(pooled, expected_pooled).max())
    failures = _cosine_failures(float(cosine.min()), min_pooled_cosine, threshold)
    distances = _Distances()
    if reference_fp32 is not None:
        distances = _Distances.of(packed, reference, reference_fp32)
        failures += distances.failures() if same_arithmetic else []
    elif same_arithmetic:
        failures += _relative_failures(float(relative.max()), max_pooled_relative)
    layers = _layer_pairs(packed, reference)
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
        **asdict(distances),
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


@dataclass(frozen=True)
class _Distances:
    """Mean distances to the reference in float32, relative to its norms; `None` where that is not compared.

    Attributes:
        distance, reference_distance: those of the packed model's tokens, and of the reference's.
        pooled_distance, reference_pooled_distance: the same of pooled vectors.
    """

    distance: float | None = None
    reference_distance: float | None = None
    pooled_distance: float | None = None
    reference_pooled_distance: float | None = None

    @classmethod
    def of(
        cls, packed: list[ModelOutput], reference: list[ModelOutput], reference_fp32: list[ModelOutput]
    ) -> _Distances:
        """Distances of both sides to the same images' outputs in float32."""
        exact = _all_tokens(reference_fp32)
        tokens = [float(_relative(_all_tokens(side), exact).mean()) for side in (packed, reference)]
        vectors = [_pooled(side) for side in (packed, reference, reference_fp32)]
        if any(vector is None for vector in vectors):
            return cls(*tokens)
        pooled, expected, exact = (vector for vector in vectors if vector is not None)
        return cls(*tokens, *(float(_relative(each, exact).mean()) for each in (pooled, expected)))

    def failures(self) -> list[str]:
        """The limits that the packed model exceeds; NaN exceeds all."""
        assert self.distance is not None
        assert self.reference_distance is not None
        failures = []
        if not self.distance <= DISTANCE_LIMIT * self.reference_distance:
            failures.append(
                f"distance to float32 {self.distance:.3e}, expected at most {DISTANCE_LIMIT} × the reference's own "
                f"{self.reference_distance:.3e}"
            )
        if self.pooled_distance is not None and self.reference_pooled_distance is not None:
            limit = max(self.reference_pooled_distance, self.reference_distance)
            if not self.pooled_distance <= POOLED_LIMIT * limit:
                failures.append(
                    f"pooled distance to float32 {self.pooled_distance:.3e}, expected at most {POOLED_LIMIT} × "
                    f"{limit:.3e}, the larger of the reference's own and its tokens'"
                )
        return failures


def _layer_pairs(packed: list[ModelOutput], reference: list[ModelOutput]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each layer the tokens of both sides, image by image."""
    pairs = list(zip(packed, reference, strict=True))
    return [
        [(output.hidden_states[i], expected.hidden_states[i]) for output, expected in pairs]
        for i in range(len(packed[0].hidden_states))
    ]


def _histogram(cosine: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Tokens by `log10(1 - cosine)`, half a power of ten a bin; closer than 1e-12 counts as 1e-12."""
    edges = torch.linspace(-12, 0, HISTOGRAM_BINS + 1, dtype=torch.float64)
    distance = (1 - cosine).clamp(1e-12, 1).log10()
    counts = torch.histogram(distance.nan_to_num(0.0), edges).hist
    return tuple(
        (float(10**low), float(10**high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)
    )
