"""Data for training: packs from datasets."""

from nopad.data.dropping import drop_patches
from nopad.data.loader import PackBatch, PackLoader
from nopad.data.sizes import measure_sizes

__all__ = ["PackBatch", "PackLoader", "drop_patches", "measure_sizes"]
