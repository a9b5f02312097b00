"""Images of other sizes than the model's own."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from originals import max_relative, read_by_original, run_original
from pictures import noise
from tiny_encoders import FAMILIES, tiny

import nopad
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.size import parse_size

STATISTICS = {"resample": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SQUARE = Preprocessing(rule="square", size=224, **STATISTICS)
CROP = Preprocessing(rule="crop", size=224, short_side=256, **STATISTICS)
NAFLEX = Preprocessing(rule="naflex", max_patches=100, **STATISTICS)
NATIVE = Preprocessing(rule="native", **STATISTICS)
SIZES = ["native", 20, (12, 24)]
PICTURES = [noise(0, 41, 23), noise(1, 17, 30)]


def grid(rule: Preprocessing, height: int, width: int, patch_size: int = 16) -> tuple[int, int]:
    place = rule.place(height, width, patch_size)
    return place.rows, place.columns


@pytest.mark.parametrize("rule", [SQUARE, CROP, NAFLEX, NATIVE], ids=lambda rule: rule.rule)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": "native"}, (30, 20)),
        ({"size": "native", "multiple_of": 7}, (28, 14)),
        ({"size": "native", "max_patches": 200}, (17, 11)),
        ({"size": "native", "min_patches": 2400}, (60, 40)),
        ({"size": "native", "min_patches": 2401}, (61, 40)),
        ({"size": 640}, (60, 40)),
        ({"size": 100}, (9, 6)),  # 150 × 100 pixels, without a remainder of 6 and 4
        ({"size": 640, "max_patches": 600, "multiple_of": 2}, (30, 20)),
        ({"size": (160, 330)}, (10, 20)),
        ({"size": (160, 330), "multiple_of": 4}, (8, 20)),
    ],
)
def test_grid_of_a_size_is_the_same_for_every_rule(rule, options, expected):
    assert grid(rule.with_size(**options), 480, 320) == expected


def test_the_rule_of_the_model_stays_without_another_size():
    for rule in (SQUARE, CROP, NAFLEX, NATIVE):
        assert rule.with_size() == rule.with_size("model") == rule
    assert grid(SQUARE.with_size(multiple_of=4), 480, 320) == (12, 12)
    assert grid(NAFLEX.with_size(max_patches=64), 480, 320) == (9, 6)
    assert grid(NAFLEX.with_size(multiple_of=2), 480, 320) == (12, 8)


def test_limits_stay_from_one_size_of_the_aspect_ratio_to_another():
    limited = NATIVE.with_size(min_patches=4, max_patches=9, multiple_of=2)
    assert limited.with_size(50) == NATIVE.with_size(50, min_patches=4, max_patches=9, multiple_of=2)
    assert limited.with_size((50, 60)) == NATIVE.with_size((50, 60), multiple_of=2)
    assert NAFLEX.with_size("native").max_patches is None


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500), st.integers(1, 2000), st.sampled_from([1, 2, 3])
)
def test_limits_hold_and_the_aspect_ratio_is_kept(height, width, min_patches, max_patches, multiple):
    max_patches = max(min_patches, max_patches, multiple**2)
    rule = NATIVE.with_size(min_patches=min_patches, max_patches=max_patches, multiple_of=multiple)
    place, unit = rule.place(height, width, 14), 14 * multiple
    number = place.rows * place.columns
    assert number <= max_patches
    assert place.rows % multiple == place.columns % multiple == 0
    free = NATIVE.with_size(min_patches=min_patches, multiple_of=multiple).place(height, width, 14)
    assert free.rows * free.columns >= min_patches
    if free.rows * free.columns <= max_patches:
        assert place == free
    if number > (height // unit * multiple) * (width // unit * multiple) and min(height, width) >= unit:
        # As small as it can be: a grid of one row or column less, in this ratio, has too few.
        scale = max((place.rows - multiple) * 14 / height, (place.columns - multiple) * 14 / width)
        assert (int(height * scale / unit) * multiple) * (int(width * scale / unit) * multiple) < min_patches
    if min(place.rows, place.columns) > multiple:
        assert abs(place.height * width - place.width * height) <= 2 * max(height, width)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (SQUARE, {"size": "big"}, r"size: expected 'model', 'native', pixels .*, got 'big'"),
        (SQUARE, {"size": 0}, "size: expected 'model', 'native', pixels .*, got 0"),
        (SQUARE, {"size": True}, "size: expected 'model', 'native', pixels .*, got True"),
        (SQUARE, {"size": (5, 5, 5)}, r"size: expected 'model', 'native', pixels .*, got \(5, 5, 5\)"),
        (SQUARE, {"max_patches": 4}, "max_patches: expected None for 'square', which makes every image 224 × 224"),
        (NATIVE, {"size": (32, 64), "max_patches": 4}, "'height_width', which makes every image 32 × 64 pixels"),
        (CROP, {"min_patches": 4}, "min_patches: expected None for 'crop'"),
        (NAFLEX, {"min_patches": 4}, "min_patches: expected None for 'naflex', which fills up to max_patches"),
        (NATIVE, {"min_patches": 9, "max_patches": 8}, "min_patches: expected at most max_patches 8, got 9"),
        (NATIVE, {"max_patches": 3, "multiple_of": 2}, "max_patches: expected an integer ≥ 4"),
        (NATIVE, {"multiple_of": 1.0}, "multiple_of: expected an integer ≥ 1, got 1.0"),
    ],
)
def test_a_size_or_limit_that_cannot_be_followed_is_an_error(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule.with_size(**options)


def test_a_size_of_less_than_a_patch_is_an_error():
    with pytest.raises(ValueError, match="size: expected a short side of at least a patch of 16 × 16 pixels, got 15"):
        NATIVE.with_size(15).place(100, 200, 16)
    with pytest.raises(ValueError, match=r"size: expected at least 2 × 2 patches of 16 × 16 pixels, got 60 × 30"):
        NATIVE.with_size((60, 30), multiple_of=2).place(100, 200, 16)


@pytest.mark.parametrize(
    ("text", "size"), [("model", "model"), ("native", "native"), ("768", 768), ("512x1024", (512, 1024))]
)
def test_size_of_the_command_line(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "-5", "5x", "x5", "5x5x5", "big", "", "5×5", "0x5", "1e3"])
def test_size_of_the_command_line_that_is_none(text):
    with pytest.raises(ValueError, match="size: expected model, native, pixels of the short side, or HEIGHTxWIDTH"):
        parse_size(text)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_of_every_size_are_the_originals(family, tmp_path):
    """On the pixels of `pack`, one image at a time, positions interpolated by the original itself."""
    folder = tiny(family, tmp_path)
    encoder, original = nopad.load(folder), read_by_original(family, folder)
    for size in SIZES:
        pack = encoder.pack(PICTURES, size=size)
        parts = zip(pack.unpack(encoder(pack)), pack.unpack(pack.hidden_states), pack.grid_thw.tolist(), strict=True)
        for tokens, patches, (t, h, w) in parts:
            if family == "aimv2 with a head" and (h, w) != (5, 5):
                continue  # whose original takes the trained grid alone
            of_patch = encoder.patch_size, encoder.patch_order, encoder.temporal_patch_size
            image = nopad.unpatchify(patches.flatten(0, 2), (t, h, w), *of_patch)
            assert max_relative(tokens.flatten(0, 2), run_original(family, original, image).tokens) < 1e-4


def test_an_encoder_is_loaded_with_a_size(tmp_path):
    folder = tiny("siglip", tmp_path)
    plain = nopad.load(folder)
    for options in ({"size": "native"}, {"size": 20}, {"size": (12, 24)}, {"size": "native", "max_patches": 9}):
        encoder = nopad.load(folder, **options)
        expected = plain.pack(PICTURES, **options)
        assert encoder.pack(PICTURES) == expected != plain.pack(PICTURES)
        assert encoder.pack(PICTURES, size="model") == plain.pack(PICTURES)
        assert torch.equal(encoder.embed(PICTURES), plain.embed(PICTURES, **options))
        assert encoder.model_preprocessing == plain.preprocessing != encoder.preprocessing
    with pytest.raises(ValueError, match="max_patches: expected None for 'square'"):
        nopad.load(folder, max_patches=9)
    with pytest.raises(ValueError, match="size: expected 'model'"):
        nopad.load(folder, size="largest")


def test_clips_are_sized_like_images(tmp_path):
    encoder = nopad.load(tiny("dinov3", tmp_path))
    clip = torch.stack([torch.from_numpy(noise(seed, 41, 23)).permute(2, 0, 1) for seed in range(3)])
    for size in SIZES:
        pack = encoder.pack([clip, *clip], size=size)
        frames = pack.grid_thw[0].prod()
        assert torch.equal(pack.hidden_states[:frames], pack.hidden_states[frames:])
