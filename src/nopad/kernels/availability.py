"""Whether Triton works: it may be installed without the C compiler that it needs for its launchers."""

from __future__ import annotations

import logging
import subprocess
from functools import lru_cache
from importlib import util

import torch

logger = logging.getLogger(__name__)


def has_triton(device: torch.device) -> bool:
    """Whether to launch Triton kernels on this device; `False` while `torch.compile` traces the caller."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and triton_works()


@lru_cache
def triton_works() -> bool:
    """Whether a Triton kernel runs on the GPU; if Triton is installed and fails, the reason is logged once."""
    if util.find_spec("triton") is None:
        return False
    try:
        from nopad.kernels.triton_attention import probe

        probe()
    except torch.OutOfMemoryError:
        raise  # not an error of Triton
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("Triton is installed and does not work here: %s", (str(error) or repr(error)).splitlines()[0])
        return False
    return True
