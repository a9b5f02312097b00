"""Where the grids of a table lie in its images."""

import dataclasses

import numpy as np
import pytest
from image_samples import CROP, NAFLEX, NATIVE, SQUARE

import nopad
from nopad.search.boxes import rule_of

SMART = dataclasses.replace(SQUARE, rule="smart_resize", size=(65536, 16777216), multiple_of=2)
RULES = [
    *(SQUARE, CROP, dataclasses.replace(CROP, short_side=256), NAFLEX, NATIVE, SMART),
    NATIVE.with_size(min_patches=4, max_patches=100, multiple_of=2),
    NATIVE.with_size(768, max_patches=1024),
    NATIVE.with_size((512, 1024)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.describe().split(";")[0])
def test_sizes_are_read_from_what_a_rule_says(rule):
    result = rule_of(rule.describe("pil"))
    assert result.describe().split(";")[0] == rule.describe().split(";")[0]
    for size in [(300, 451), (28, 900), (31, 33)]:
        assert result.place(*size, 14) == rule.place(*size, 14)


def test_lines_of_no_rule_are_refused():
    with pytest.raises(ValueError, match="preprocessing: expected the sizes of a rule, got 'round 3; x'"):
        rule_of("round 3; x")


@pytest.mark.parametrize("size", ["model", 24, (16, 32)])
def test_boxes_are_those_of_packs(photos, model, tmp_path, size):
    nopad.embed(photos, tmp_path / "features", model=model, workers=1, size=size)
    features = nopad.read_features(tmp_path / "features")
    encoder = nopad.load(model, size=size)
    pack = encoder.pack([features.path(row) for row in range(len(features))], max_patches=None)
    np.testing.assert_array_equal(features.boxes, pack.boxes.numpy())


def test_boxes_of_other_grids_are_refused(features):
    features.grids[0, 1] += 1
    with pytest.raises(ValueError, match=r"boxes: 'native at most 4096 patches; .* makes .* patches of"):
        _ = features.boxes
