"""Under `torch.autocast`, as trainers run a float32 model in half precision: as near to float32 as the original."""

from __future__ import annotations

import pytest
import torch
from originals import read_by_original, run_original
from tiny_encoders import FAMILIES, GRIDS, is_batch_invariant, pack_of, patches_of, relative, tiny
from torch import Tensor

import nopad

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 12}
BRANCHES = ("out_proj.weight", "attn.proj.weight", "o_proj.weight", "down_proj.weight", "fc2.weight")
MARGIN = 1.1
PATCH = 4


def images_of(family: str) -> list[Tensor]:
    """Images of many sizes; learned positions of AIMv2's original have one."""
    sides = [(5, 5)] * 12 if family == "aimv2 with a head" else [(h, w) for h in (1, 5, 8) for w in (2, 4, 5, 9)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h * PATCH, w * PATCH, generator=generator) for h, w in sides]


def with_trained_branches(family: str, folder):
    """A checkpoint whose layers add to the residual stream rather than double it, and its original."""
    original = read_by_original(family, tiny(family, folder / "random", **SIZES))
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith(BRANCHES):
                parameter.mul_(0.3)
    original.save_pretrained(folder / "scaled")
    return nopad.load(folder / "scaled"), original


def results(model, run) -> dict[str, Tensor]:
    """Tokens, pooled vectors, and all gradients of a weighted sum of both."""
    model.zero_grad()
    tokens, pooled = run()
    weigh = torch.Generator().manual_seed(1)
    result = {"tokens": tokens} if pooled is None else {"tokens": tokens, "pooled": pooled}
    sum((each.float() * torch.randn(each.shape, generator=weigh)).sum() for each in result.values()).backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    result["gradients"] = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
    return {name: tensor.detach().clone() for name, tensor in result.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_as_near_to_float32_as_the_originals(family, dtype, tmp_path):
    encoder, original = with_trained_branches(family, tmp_path)
    images = images_of(family)
    pack = pack_of(encoder, images)

    def ours():
        output = encoder.encode(pack)
        return output.tokens, output.pooled if has_pooled else None

    def theirs():
        tokens, pooled, _ = zip(*(run_original(family, original, image) for image in images), strict=True)
        return torch.cat(tokens), None if pooled[0] is None else torch.stack(pooled)

    with torch.no_grad():
        has_pooled = theirs()[1] is not None
    exact = results(original, theirs)
    assert relative(results(encoder, ours)["gradients"], exact["gradients"]) < 1e-4
    with torch.autocast("cpu", dtype):
        result, expected = results(encoder, ours), results(original, theirs)
    for name in exact:
        distance, allowed = relative(result[name], exact[name]), MARGIN * relative(expected[name], exact[name])
        assert distance <= allowed, f"{name}: {distance:.2e} from float32, the original {allowed / MARGIN:.2e}"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_under_autocast_is_as_near_to_float32(family, tmp_path, quick_compile):
    encoder = nopad.load(tiny(family, tmp_path))
    exact = encoder(patches_of(encoder), GRIDS)
    with torch.autocast("cpu", torch.bfloat16):
        allowed = MARGIN * relative(encoder(patches_of(encoder), GRIDS), exact)
        encoder.compile(128, 16)
        result = encoder(patches_of(encoder), GRIDS)
        assert encoder.execution == "compiled"
        assert is_batch_invariant(encoder, junk=0.0)
    assert relative(result, exact) <= allowed
