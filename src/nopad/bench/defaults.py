"""Defaults of a benchmark by device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """Dtype, images of a workload, tokens per pack, timed runs, and whether compiled candidates run."""

    dtype: str
    images: int
    capacities: tuple[int, ...]
    runs: int
    compile: bool

    def describe(self, name: str) -> str:
        """A default as the command line takes it."""
        value = getattr(self, name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


ON_GPU = Defaults(
    dtype="bfloat16", images=256, capacities=(2048, 4096, 8192, 16384, 32768, 65536), runs=5, compile=True
)
ON_CPU = Defaults(dtype="float32", images=2, capacities=(2048,), runs=3, compile=False)
"""Few images and runs, so that a large model on two cores does not take long. Few CPUs have fast GEMMs in bfloat16."""


def defaults_on(device_type: str) -> Defaults:
    """The defaults for `"cuda"`, and for all else."""
    return ON_GPU if device_type == "cuda" else ON_CPU
