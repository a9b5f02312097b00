"""The native rule, limits, and wrong arguments."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_samples import CROP, HALF, NAFLEX, NATIVE, SQUARE, noise

from nopad.preprocessing.decode import MAX_PIXELS, ImageError
from nopad.preprocessing.placing import resized_size
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import preprocess

# Native


def test_native_drops_the_remainder_at_the_right_and_the_bottom():
    image = noise(29, 45)
    expected = image[:, :28, :42].float() / 255 * 2 - 1
    assert torch.allclose(preprocess(image, NATIVE, 14), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 1), (14, 14)), ((1, 2000), (14, 28000)), ((2000, 1), (28000, 14)), ((5, 31), (14, 84)), ((13, 14), (14, 14))],
)
@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_min_patches_enlarges_what_is_smaller_than_a_patch(shape, expected, resize):
    image = torch.full((3, *shape), 255, dtype=torch.uint8)
    rule = NATIVE.with_size(min_patches=1)
    assert torch.equal(preprocess(image, rule, 14, resize=resize), torch.ones(3, *expected))


def test_native_image_smaller_than_a_patch_is_an_error_of_the_image():
    with pytest.raises(ImageError, match=r"3×30 pixels \(height×width\), smaller than a patch of 14 × 14 pixels"):
        preprocess(noise(3, 30), NATIVE, 14)
    with pytest.raises(ImageError, match=r"smaller than 2 × 2 patches of 14 × 14 pixels; min_patches=4"):
        preprocess(noise(30, 20), NATIVE.with_size(multiple_of=2), 14)


@pytest.mark.parametrize(
    ("shape", "max_patches", "expected"),
    [
        ((1400, 1400), 256, (16, 16)),
        ((140, 140), 100, (10, 10)),
        ((140, 140), 99, (9, 9)),
        ((300, 300), 256, (16, 16)),  # 300 · √(256 · 14² / 300²) is 223.99999999999997 in float64
        ((280, 1120), 64, (4, 16)),
        ((14, 1400), 1, (1, 1)),
    ],
)
def test_native_is_scaled_down_to_max_patches(shape, max_patches, expected):
    pixels = preprocess(noise(*shape), NATIVE.with_size(max_patches=max_patches), 14)
    assert (pixels.shape[1] // 14, pixels.shape[2] // 14) == expected


@pytest.mark.parametrize("rule", [NATIVE, CROP, NAFLEX, SQUARE], ids=lambda rule: rule.rule)
@pytest.mark.parametrize("shape", [(300, 200), (19, 1200), (280, 280)])
def test_grid_is_that_of_preprocessed_pixels(rule, shape):
    pixels = preprocess(noise(*shape), rule, 14)
    place = rule.place(*shape, 14)
    assert (place.rows, place.columns) == (pixels.shape[1] // 14, pixels.shape[2] // 14)


def test_automatic_cap_is_for_rules_without_a_limit():
    limited = dataclasses.replace(NATIVE, max_patches=9000)
    assert [rule.capped("auto") for rule in (NATIVE, limited, CROP, NAFLEX, SQUARE)] == [4096, None, None, None, None]
    assert [NATIVE.with_size(size).capped("auto") for size in (500, (500, 500))] == [4096, None]
    assert NATIVE.with_size(min_patches=5000).capped("auto") == 5000
    assert [NATIVE.capped(limit) for limit in (None, 5, 9000)] == [None, 5, 9000]


@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(1, 2000), st.sampled_from([14, 16]))
def test_native_never_exceeds_max_patches_nor_loses_the_image(height, width, max_patches, patch_size):
    resized = resized_size(NATIVE.with_size(max_patches=max_patches), height, width, patch_size)
    rows, columns = (side // patch_size for side in resized)
    assert 1 <= rows * columns <= max_patches
    if min(height, width) >= patch_size and (height // patch_size) * (width // patch_size) <= max_patches:
        assert resized == (height, width)
    if rows > 1 and columns > 1:  # else squeezed
        assert abs(resized[0] * width - resized[1] * height) <= max(height, width) + 1


# Arguments


def test_extreme_aspect_ratio_is_refused_before_it_takes_memory():
    with pytest.raises(ImageError, match=rf"1×4000 pixels .*224×896000, expected at most {MAX_PIXELS}"):
        preprocess(noise(1, 4000), CROP, 14)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": torch.zeros(3, 28, 28)}, "image: expected uint8"),
        ({"image": torch.zeros(28, 28, 3, dtype=torch.uint8)}, "image: expected uint8"),
        ({"image": torch.zeros(3, 0, 28, dtype=torch.uint8)}, "image: expected uint8"),
        ({"resize": "opencv"}, "resize: expected one of"),
        (
            {"preprocessing": SQUARE, "patch_size": 225},
            "size: expected at least a patch of 225 × 225 pixels, got 224 × 224",
        ),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {"image": noise(28, 28), "preprocessing": NATIVE, "patch_size": 14} | change
    with pytest.raises(ValueError, match=match):
        preprocess(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rule": "pad"}, "rule: expected one of"),
        ({"resample": "lanczos"}, "resample: expected one of"),
        ({"size": 224}, "size: expected None for 'native', got 224"),
        ({"rule": "crop"}, "size: expected pixels ≥ 1 for 'crop', got None"),
        ({"rule": "square", "size": 224, "max_patches": 4}, "max_patches: expected None for 'square'"),
        ({"max_patches": 0}, "max_patches: expected an integer ≥ 1"),
        ({"max_patches": 3, "multiple_of": 2}, "max_patches: expected an integer ≥ 4 for 'native', got 3"),
        ({"min_patches": 5, "max_patches": 4}, "min_patches: expected at most max_patches 4, got 5"),
        ({"rule": "naflex", "min_patches": 5}, "min_patches: expected None for 'naflex', which fills up"),
        ({"multiple_of": 0}, "multiple_of: expected an integer ≥ 1, got 0"),
        (
            {"rule": "height_width", "size": 5},
            "pixels ≥ 1 for 'height_width', got 5",
        ),
        ({"rule": "shortest_edge", "size": (5, 5)}, r"size: expected pixels ≥ 1 for 'shortest_edge', got \(5, 5\)"),
        ({"short_side": 256}, "short_side: expected None for 'native', got 256"),
        ({"rule": "crop", "size": 224, "short_side": 223}, "short_side: expected pixels ≥ 224 for 'crop', got 223"),
        ({"std": (1.0, 0.0, 1.0)}, "mean, std"),
        ({"mean": (0.5,)}, "mean, std"),
    ],
)
def test_preprocessing_checks_itself(change, match):
    fields = {"rule": "native", "resample": "bicubic", "mean": HALF, "std": HALF} | change
    with pytest.raises(ValueError, match=match):
        Preprocessing(**fields)
