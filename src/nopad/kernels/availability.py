"""Whether Triton works here: it may be installed where no C compiler is, which it needs for its launchers."""

from __future__ import annotations

import logging
import subprocess
from functools import lru_cache
from importlib import util

import torch

logger = logging.getLogger(__name__)


def has_triton(device: torch.device) -> bool:
    """Whether kernels of Triton run on this device, and the code that would call them is not being compiled."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and triton_works()


@lru_cache
def triton_works() -> bool:
    """Whether a kernel of Triton runs on the GPU; what keeps it from that is told once."""
    if util.find_spec("triton") is None:
        return False
    try:
        from nopad.kernels.triton_attention import probe

        probe()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("Triton is installed and does not work here: %s", (str(error) or repr(error)).splitlines()[0])
        return False
    return True
