"""Under `torch.autocast`, as trainers run a float32 model in half precision: as near to float32 as the original."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from originals import read_by_original, run_original
from tiny_encoders import DISTINCT, FAMILIES, GRIDS, is_batch_invariant, pack_of, patches_of, relative, tiny
from torch import Tensor

import nopad
from nopad import Pack, PackedEncoder

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 12}
BRANCHES = ("out_proj.weight", "attn.proj.weight", "o_proj.weight", "down_proj.weight", "fc2.weight")
MARGIN = 1.1
PATCH = 4


def images_of(family: str) -> list[Tensor]:
    """Images of many sizes; learned positions of AIMv2's original have one."""
    sides = [(5, 5)] * 9 if family == "aimv2 with a head" else [(h, w) for h in (1, 5, 8) for w in (2, 5, 9)]
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


class Pair(NamedTuple):
    """An encoder and its original with the same weights, images as both take them, and the original's `results`."""

    family: str
    encoder: PackedEncoder
    original: Any
    images: list[Tensor]
    pack: Pack
    exact: dict[str, Tensor]


def theirs(family: str, original, images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    tokens, pooled, _ = zip(*(run_original(family, original, image) for image in images), strict=True)
    return torch.cat(tokens), None if pooled[0] is None else torch.stack(pooled)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    family = request.param
    encoder, original = with_trained_branches(family, tmp_path_factory.mktemp("pair"))
    images = images_of(family)
    exact = results(original, lambda: theirs(family, original, images))
    return Pair(family, encoder, original, images, pack_of(encoder, images), exact)


def ours(pair: Pair) -> tuple[Tensor, Tensor | None]:
    output = pair.encoder.encode(pair.pack)
    return output.tokens, output.pooled if "pooled" in pair.exact else None


def test_gradients_are_the_originals(pair):
    assert relative(results(pair.encoder, lambda: ours(pair))["gradients"], pair.exact["gradients"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_near_to_float32_as_the_originals(pair, dtype):
    with torch.autocast("cpu", dtype):
        result = results(pair.encoder, lambda: ours(pair))
        expected = results(pair.original, lambda: theirs(pair.family, pair.original, pair.images))
    exact = pair.exact
    for name in exact:
        distance, allowed = relative(result[name], exact[name]), MARGIN * relative(expected[name], exact[name])
        assert distance <= allowed, f"{name}: {distance:.2e} from float32, the original {allowed / MARGIN:.2e}"


@torch.no_grad()
@pytest.mark.parametrize("family", DISTINCT)
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
