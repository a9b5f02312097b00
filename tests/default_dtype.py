"""Features of every family and rule, written by one process per default dtype; `test_default_dtype.py` compares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from pictures import noise
from tiny_encoders import DISTINCT, GRIDS, patches_of

import nopad
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import preprocess

STATISTICS = {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.26, 0.27)}
RULES = (
    Preprocessing(rule="square", size=24, resample="bilinear", rescale_before_resize=True, **STATISTICS),
    Preprocessing(rule="crop", size=24, resample="bicubic", **STATISTICS),
    Preprocessing(rule="native", resample="bicubic", **STATISTICS),
    Preprocessing(rule="naflex", resample="bilinear", **STATISTICS),
)


@torch.no_grad()
def features(folder: Path) -> dict[str, torch.Tensor]:
    """What encoders and their preprocessing give."""
    result = {}
    image = torch.from_numpy(noise(0, 37, 50)).permute(2, 0, 1)
    for number, rule in enumerate(RULES):
        for resize in ("pil", "torch"):
            result[f"{number}, {resize}"] = preprocess(image, rule, 4, resize=resize)
    for family in DISTINCT:
        encoder = nopad.load(folder / family)
        patches = patches_of(encoder)
        output = encoder.encode(patches, GRIDS)
        encoder.compile(128, 16, compiled=False)
        static = encoder.encode(patches, GRIDS)
        for name in output:
            result[f"{family}, {name}"], result[f"{family}, static {name}"] = output[name], static[name]
        result[f"{family}, embed"] = encoder.embed([image])
        result[f"{family}, no images"] = encoder.embed([])
        result[f"{family}, empty pack"] = encoder.pack([]).hidden_states
    encoder = nopad.load(folder / "aimv2", precision="fp8")
    result["fp8"] = encoder.encode(patches_of(encoder), GRIDS).tokens
    result["untrained"] = nopad.load("untrained:facebook/dinov3-vits16-pretrain-lvd1689m").layers[0].norm1.weight
    return result


def main(folder: Path, dtypes: list[str]) -> None:
    """Fork a process for each dtype, since some tensors are cached; the imports are shared."""
    torch.set_num_threads(1)
    for dtype in dtypes:
        child = os.fork()
        if not child:
            torch.set_default_dtype(getattr(torch, dtype))
            torch.save(features(folder), folder / dtype)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise ChildProcessError(dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
