"""SigLIP2 over packs under the name of its specification; the work is done in `nopad.families.siglip2`."""

from __future__ import annotations

from nopad.families.siglip2 import Siglip2NaflexPacking

__all__ = ["Siglip2NaflexPacking"]
