"""An actor of a test that reports what its process has imported."""

import sys
from collections.abc import Mapping

from nopad.pipeline import process_server


class Imported:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def load(self, begun: Mapping[str, str]) -> tuple[bool, bool, list[str]]:
        """Whether it has what actors run, whether it has a server of decode processes, and which of the names."""
        has_server = process_server._server is not None
        return "nopad.embedding.actors.actor" in sys.modules, has_server, sorted({*self.names} & {*sys.modules})

    def progress(self) -> tuple[()]:
        return ()
