"""How close two models' features are: the numbers of an alignment, and its limits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RELATIVE_LIMIT = 1e-4
"""Float32: the most that a token or a pooled vector may differ from the original's, relative to its norm."""
DISTANCE_LIMIT = 1.1
"""Half precision: the packed model's distance to the float32 original over the original's own."""
POOLED_LIMIT = 2
"""Half precision: the same for pooled vectors, over the larger of the original's own distance and its tokens'.

An image has one of them, so that a case measures few, and how far a few land from float32 is chance: on tiny models
up to 1.6 times as far as the original's where both do the same. The tokens' distance, a mean over many, is not chance
and keeps a vector of the original's that happens to land close from being the measure.
"""
HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class CaseResult:
    """One pack compared with the original.

    Attributes:
        name: what was compared.
        images: images and clips in the pack.
        tokens: tokens compared.
        min_cosine, mean_cosine: over the tokens.
        max_abs, mean_abs: absolute difference of single values.
        max_relative, mean_relative: per token, norm of the difference over the norm of the original's token.
        min_pooled_cosine, max_pooled_relative: the same of pooled vectors over the images, `None` where the original
            does not pool.
        distance, original_distance: mean relative distance per token to the float32 original of the packed model and
            of the original itself, both in the dtype asked for; `None` in float32.
        pooled_distance, original_pooled_distance: the same per pooled vector; `None` where the original does not pool.
        drift: largest relative difference of a token before the first layer and after each.
        layer_cosines: least cosine of a token before the first layer and after each.
        histogram: `(low, high, count)` of the tokens' distance `1 - cosine`, in powers of ten.
        passed: whether the case meets the limits.
        failures: each limit that it does not meet, with the numbers.
    """

    name: str
    images: int
    tokens: int
    min_cosine: float
    mean_cosine: float
    max_abs: float
    mean_abs: float
    max_relative: float
    mean_relative: float
    min_pooled_cosine: float | None
    max_pooled_relative: float | None
    distance: float | None
    original_distance: float | None
    pooled_distance: float | None
    original_pooled_distance: float | None
    drift: tuple[float, ...]
    layer_cosines: tuple[float, ...]
    histogram: tuple[tuple[float, float, int], ...]
    passed: bool
    failures: tuple[str, ...]


@dataclass(frozen=True)
class AlignReport:
    """The verdict on a checkpoint, and what it rests on.

    Attributes:
        precision: `"fp8"` where the packed model's layers are in that format; then the threshold alone decides.
        execution, capacity: how the packed model's layers ran, and the tokens that each pack was filled up to.
    """

    checkpoint: str
    family: str
    original: str
    weights: str
    device: str
    dtype: str
    precision: str | None
    attention: str
    execution: str
    capacity: int | None
    threshold: float
    versions: dict[str, str]
    cases: tuple[CaseResult, ...]
    skipped: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there are cases and every one passed."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"passed": self.passed, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Run:
    """What a model gives for one image or clip, on the CPU: tokens, layer by layer too, and its pooling."""

    tokens: Tensor
    states: tuple[Tensor, ...]
    pooled: Tensor | None


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.cosine_similarity(ours.double(), theirs.double(), dim=-1)


def _pooled(runs: list[Run]) -> Tensor | None:
    """`(N, D)`, `None` where the model does not pool."""
    vectors = [run.pooled for run in runs if run.pooled is not None]
    return torch.stack(vectors) if vectors else None


def compare(
    name: str,
    ours: list[Run],
    theirs: list[Run],
    truth: list[Run] | None,
    threshold: float,
    *,
    same_arithmetic: bool = True,
) -> CaseResult:
    """All numbers of a case; NaN fails every limit.

    Args:
        name: of the case.
        ours, theirs: packed model and original, image by image.
        truth: the original in float32, where that is another run.
        threshold: least cosine.
        same_arithmetic: both ran in one number format, so that the limits on differences hold, too.
    """
    a, b = torch.cat([run.tokens for run in ours]), torch.cat([run.tokens for run in theirs])
    cosine = _cosine(a, b)
    relative, absolute = _relative(a, b), (a - b).abs()
    # Reduced by torch: Python's min and max pass over a NaN that does not stand first.
    p, q = _pooled(ours), _pooled(theirs)
    min_pooled_cosine = max_pooled_relative = None
    if p is not None and q is not None:
        min_pooled_cosine, max_pooled_relative = float(_cosine(p, q).min()), float(_relative(p, q).max())
    layers = [
        [(x.states[i], y.states[i]) for x, y in zip(ours, theirs, strict=True)] for i in range(len(ours[0].states))
    ]
    drift = tuple(float(torch.stack([_relative(x, y).max() for x, y in pairs]).max()) for pairs in layers)
    layer_cosines = tuple(float(torch.stack([_cosine(x, y).min() for x, y in pairs]).min()) for pairs in layers)
    distance = original_distance = pooled_distance = original_pooled_distance = None
    failures = []
    for kind, least in (("", float(cosine.min())), ("pooled ", min_pooled_cosine)):
        if least is not None and not least > threshold:
            failures.append(f"minimum {kind}cosine {least:.6f}, expected more than {threshold}")
    if truth is None:
        for kind, most in (("", float(relative.max())), ("pooled ", max_pooled_relative)):
            if same_arithmetic and most is not None and not most <= RELATIVE_LIMIT:
                failures.append(f"{kind}relative error {most:.2e}, expected at most {RELATIVE_LIMIT:.0e}")
    else:
        exact, exact_pooled = torch.cat([run.tokens for run in truth]), _pooled(truth)
        distance, original_distance = float(_relative(a, exact).mean()), float(_relative(b, exact).mean())
        if same_arithmetic and not distance <= DISTANCE_LIMIT * original_distance:
            failures.append(
                f"distance to float32 {distance:.3e}, expected at most {DISTANCE_LIMIT} × the original's own "
                f"{original_distance:.3e}"
            )
        if p is not None and q is not None and exact_pooled is not None:
            pooled_distance = float(_relative(p, exact_pooled).mean())
            original_pooled_distance = float(_relative(q, exact_pooled).mean())
            usual = max(original_pooled_distance, original_distance)
            if same_arithmetic and not pooled_distance <= POOLED_LIMIT * usual:
                failures.append(
                    f"pooled distance to float32 {pooled_distance:.3e}, expected at most {POOLED_LIMIT} × "
                    f"{usual:.3e}, the larger of the original's own and its tokens'"
                )
    return CaseResult(
        name=name,
        images=len(ours),
        tokens=len(a),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        max_abs=float(absolute.max()),
        mean_abs=float(absolute.mean()),
        max_relative=float(relative.max()),
        mean_relative=float(relative.mean()),
        min_pooled_cosine=min_pooled_cosine,
        max_pooled_relative=max_pooled_relative,
        distance=distance,
        original_distance=original_distance,
        pooled_distance=pooled_distance,
        original_pooled_distance=original_pooled_distance,
        drift=drift,
        layer_cosines=layer_cosines,
        histogram=_histogram(cosine),
        passed=not failures,
        failures=tuple(failures),
    )


def _histogram(cosine: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Tokens by `log10(1 - cosine)`, half a power of ten a bin; closer than 1e-12 counts as 1e-12."""
    edges = torch.linspace(-12, 0, HISTOGRAM_BINS + 1, dtype=torch.float64)
    distance = (1 - cosine).clamp(1e-12, 1).log10()
    counts = torch.histogram(distance.nan_to_num(0.0), edges).hist
    return tuple(
        (float(10**low), float(10**high), int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)
    )
