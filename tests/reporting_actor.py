"""An actor of a test that reports what its process has imported."""

import sys
from collections.abc import Mapping


class Imported:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def load(self, begun: Mapping[str, str]) -> tuple[bool, list[str]]:
        """Whether it has imported what actors run, and which of the names."""
        return "nopad.embedding.actors.actor" in sys.modules, sorted({*self.names} & {*sys.modules})

    def progress(self) -> tuple[()]:
        return ()
