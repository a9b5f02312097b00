"""Results of an alignment, and the limits that a case has to meet; nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RELATIVE_LIMIT = 1e-4
"""Float32: the largest difference of a token or a pooled vector from the reference's, relative to its norm."""
DISTANCE_LIMIT = 1.1
"""Half precision: the packed model's distance to the float32 reference over the half-precision reference's own."""
POOLED_LIMIT = 2
"""Half precision: the same for pooled vectors, over the larger of the reference's own distance and its tokens'.

An image has one pooled vector, so a case measures few of them, and how far a few land from float32 is chance: on tiny
models up to 1.6 times as far as the reference's where both do the same. The tokens' distance is a mean over many; it
keeps a reference vector that happens to land close from setting the limit.
"""


@dataclass(frozen=True)
class CaseResult:
    """One pack compared with the reference.

    Attributes:
        name: of the case.
        images: images and clips in the pack.
        tokens: tokens compared.
        min_cosine, mean_cosine: over the tokens.
        max_abs, mean_abs: absolute difference of single values.
        max_relative, mean_relative: per token, norm of the difference over the norm of the reference's token.
        min_pooled_cosine, max_pooled_relative: the same of pooled vectors over the images, `None` where the reference
            does not pool.
        distance, reference_distance: mean relative distance per token to the float32 reference, of the packed model and
            of the reference, both in the report's dtype; `None` in float32.
        pooled_distance, reference_pooled_distance: the same per pooled vector; `None` where the reference does not
            pool.
        drift: largest relative difference of a token before the first layer and after each.
        layer_cosines: lowest cosine of a token before the first layer and after each.
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
    reference_distance: float | None
    pooled_distance: float | None
    reference_pooled_distance: float | None
    drift: tuple[float, ...]
    layer_cosines: tuple[float, ...]
    histogram: tuple[tuple[float, float, int], ...]
    passed: bool
    failures: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class WorstImage:
    """The image that has the token with the largest relative difference.

    Attributes:
        case: it is of.
        difference: `(rows, columns)` relative difference of each token; of a clip the frame with the largest.
        pixels: uint8 `(H, W, 3)` as the models saw them, the values of noise shifted to grey.
    """

    case: str
    difference: Tensor
    pixels: np.ndarray


@dataclass(frozen=True)
class AlignReport:
    """The result for a checkpoint and the conditions under which it was measured.

    Attributes:
        precision: `"fp8"` or `"int8"` where the packed model's layers are in that format; then the threshold alone
            decides.
        execution, capacity: how the packed model's layers ran, and the tokens that each pack was filled up to.
        worst: where tokens differ most, of the photos where there are any; not part of `to_dict`.
    """

    checkpoint: str
    family: str
    reference: str
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
    worst: WorstImage | None = None

    @property
    def passed(self) -> bool:
        """Whether there are cases and every one passed."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        fields = dataclasses.asdict(dataclasses.replace(self, worst=None))
        del fields["worst"]
        return {"passed": self.passed, **fields}
