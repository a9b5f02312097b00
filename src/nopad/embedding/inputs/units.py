"""The units of a listing: tars, and row groups of Parquet files, which are best read as a whole."""

from __future__ import annotations

from array import array
from enum import Enum

import numpy as np


class UnitEdge(Enum):
    """An edge of a unit among the inputs of a listing."""

    BEGIN = "begin"
    END = "end"
    """The unit ends, and the next one of the same file begins."""


class Units:
    """Collects where units begin and end among the inputs that are listed."""

    def __init__(self) -> None:
        self._begin = 0
        self._places = array("q")

    def add(self, edge: UnitEdge, place: int) -> None:
        """Note an edge before the input at a place; a unit without inputs is none."""
        if edge is UnitEdge.END and place > self._begin:
            self._places.extend((self._begin, place))
        self._begin = place

    def places(self) -> np.ndarray:
        """`(N, 2)`: the first input of each unit, and the one behind the last."""
        return np.array(self._places, np.int64).reshape(-1, 2)
