"""What a forward says of arguments that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_encoders
import torch
from aimv2_checkpoints import tiny_config
from originals import pixels_of
from PIL import Image

import nopad
from nopad.families import aimv2

BAD_CALLS = {
    "hidden_states: expected shape": lambda p, g: (p[:, :-1], g),
    r"expected torch\.float32 like the weights": lambda p, g: (p.half(), g),
    r"expected 39 patches in all, one per row of hidden_states, got 40 in 2 rows": lambda p, g: (p[:-1], g),
    r"expected \(N, 3\) integers, got shape \(2, 2\)": lambda p, g: (p, g[:, :2]),
    r"got shape \(2, 3\) of torch\.float32": lambda p, g: (p, g.float()),
    r"integers ≥ 1, got \[0, 3, 8\] in row 0": lambda p, g: (p, g * torch.tensor([[0, 1, 1], [1, 1, 1]])),
    r"hidden_states: expected on cpu": lambda p, g: (p.to("meta"), g),
    r"grid_thw: expected on the CPU": lambda p, g: (p, g.to("meta")),
    r"patch_positions: expected shape \(40, 3\)": lambda p, g: (p, g, torch.zeros(40, 2, dtype=torch.int64)),
    r"patch_positions: expected integers": lambda p, g: (p, g, torch.zeros(40, 3)),
    r"grid_thw: .*got None": lambda p, g: (p,),
    r"got list of Image; images go through encoder\.pack\(images\).*encoder\.embed\(images\)": lambda p, g: (
        [Image.new("RGB", (8, 8))],
    ),
    r"got list of str; images go through": lambda p, g: (["cat.jpg", "dog.jpg"],),
    r"got str; images go through": lambda p, g: ("cat.jpg",),
    r"got ndarray; images go through": lambda p, g: (np.zeros((1, 8, 8, 3), np.uint8), g),
    r"got shape \(2, 3, 8, 8\); images go through .* normalised pixels through nopad\.Pack\.of": lambda p, g: (
        torch.zeros(2, 3, 8, 8),
    ),
    r"got shape \(3, 8, 8\); images go through": lambda p, g: (torch.zeros(3, 8, 8, dtype=torch.uint8), g),
    r"expected patches \(T, 48\) or a Pack, got None": lambda p, g: (None, g),
    r"got dict; images go through": lambda p, g: ({"pixel_values": p},),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_say_which_what_and_how(tmp_path, message):
    encoder = nopad.AIMv2Packing(aimv2.AIMv2PackingConfig(**tiny_config().to_dict()))
    patches, grid = torch.randn(40, 48), torch.tensor([[1, 3, 8], [1, 4, 4]])
    assert encoder(patches, grid).shape == (40, 32)
    with pytest.raises(ValueError, match=message):
        encoder(*BAD_CALLS[message](patches, grid))


def test_pack_of_another_family_is_refused():
    encoder = nopad.AIMv2Packing(aimv2.AIMv2PackingConfig(**tiny_config().to_dict()))
    pixels = pixels_of([(1, 3, 5)])
    for wrong, message in [
        (nopad.Pack.of(pixels, 2), "patch_size 2"),
        (nopad.Pack.of(pixels, 4, "chw"), "patch_order 'chw'"),
        (nopad.Pack.of(pixels, 4, mean=(0.5,) * 3, std=(0.5,) * 3), r"mean \(0\.5, 0\.5, 0\.5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder(wrong)


def test_a_pack_of_one_family_is_refused_by_another(goldens):
    dinov3, aimv2 = nopad.load(goldens / "dinov3-meta"), nopad.load(goldens / "aimv2-apple-native")
    onevision = nopad.load(goldens / "onevision-encoder")
    image = torch.randint(0, 255, (3, 70, 80), dtype=torch.uint8)
    with pytest.raises(ValueError, match="patch_size 14"):
        dinov3(aimv2.pack([image]))
    with pytest.raises(ValueError, match="patch_order 'hwc'"):
        onevision(aimv2.pack([image]))


def test_forward_refuses_other_outputs(goldens):
    encoder = nopad.load(goldens / "dinov3-meta")
    arguments = tiny_encoders.patches_of(encoder), tiny_encoders.GRIDS
    with pytest.raises(ValueError, match=r"output: expected 'tokens', or 'all'.* got 'pooled'"):
        encoder(*arguments, output="pooled")
    with pytest.raises(ValueError, match="which output_hidden_states and output_deepstack need; got 'tokens' with"):
        encoder(*arguments, output_hidden_states=True)
