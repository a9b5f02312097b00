"""Counts and seconds of the pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Stats:
    """Counts of a worker's work so far. Seconds are wall time; `decode_seconds` is summed over the decode threads.

    Attributes:
        images, failed: images done, and those of them without features.
        patches: patches encoded.
        tokens, capacity: patches and their prefix tokens, and how many their packs could have held. The last pack of a
            group counts as what it holds, unless the encoder fills it up.
        packs: number of packs.
        decode_seconds, encode_seconds, wait_seconds: time of reading and preprocessing, of the encoder, and of
            waiting for images.
        device_seconds: time in which the encoder's device was at work; on a CPU nearly `encode_seconds`.
    """

    images: int = 0
    failed: int = 0
    patches: int = 0
    tokens: int = 0
    capacity: int = 0
    packs: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    device_seconds: float = 0.0

    @property
    def fill(self) -> float:
        """Share of the packs' capacity that was used, 0 … 1."""
        return self.tokens / self.capacity if self.capacity else 0.0

    def since(self, before: Stats) -> Stats:
        """What was added to an earlier state."""
        return Stats(**{name: value - getattr(before, name) for name, value in asdict(self).items()})
