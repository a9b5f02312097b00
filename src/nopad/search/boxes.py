"""Where the grid of patches lies in each image of a table, from what the job recorded of its preprocessing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from nopad.preprocessing.rules import Preprocessing, Rule

_LINE = re.compile(
    rf"(?P<rule>{'|'.join(get_args(Rule))})(?: (?P<size>\d+(?:(?:×| to )\d+)?))?(?: of short side (?P<short_side>\d+))?"
    r"(?: at least (?P<min_patches>\d+) patches)?(?: at most (?P<max_patches>\d+) patches)?"
    r"(?: in multiples of (?P<multiple_of>\d+))?"
)


def rule_of(line: str) -> Preprocessing:
    """The sizes that `Preprocessing.describe` has put into words, with other statistics.

    Raises:
        ValueError: a line that it does not write.
    """
    match = _LINE.fullmatch(line.split(";", 1)[0])
    if match is None:
        raise ValueError(f"preprocessing: expected the sizes of a rule, got {line!r:.80}")
    words = {name: value for name, value in match.groupdict().items() if value is not None}
    fields: dict[str, Any] = {name: int(words[name]) for name in words.keys() - {"rule", "size"}}
    if "size" in words:
        sides = [int(side) for side in re.split("×| to ", words["size"])]
        fields["size"] = tuple(sides) if len(sides) > 1 else sides[0]
    rule: Any = words["rule"]
    return Preprocessing(rule=rule, resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1), **fields)


def grid_boxes(metadata: Mapping[str, str], sizes: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """See `Features.boxes`.

    Args:
        metadata: of the table.
        sizes: `(N, 2)`.
        grids: `(N, 3)`.

    Raises:
        ValueError: tables of several rules, or grids that the recorded rule does not make.
    """
    if not {"preprocessing", "architecture"} <= metadata.keys():
        raise ValueError("boxes: the tables were not made by one rule; read them one by one")
    rule, patch_size = rule_of(metadata["preprocessing"]), json.loads(metadata["architecture"])["patch_size"]
    unique, first, numbers = np.unique(sizes, axis=0, return_index=True, return_inverse=True)
    boxes = np.empty((len(unique), 4), np.float32)
    for number, (height, width) in enumerate(unique.tolist()):
        place = rule.place(height, width, patch_size)
        if (place.rows, place.columns) != tuple(grids[first[number], 1:].tolist()):
            raise ValueError(
                f"boxes: {metadata['preprocessing']!r:.80} makes {place.rows} × {place.columns} patches of {width} × "
                f"{height} pixels, the table has {' × '.join(map(str, grids[first[number], 1:]))}"
            )
        boxes[number] = place.box(height, width, patch_size)
    return boxes[numbers.reshape(-1)]
