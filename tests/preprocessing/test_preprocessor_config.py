"""Rules of a checkpoint's `preprocessor_config.json`."""

import dataclasses
import json

import pytest
from image_samples import CROP, HALF, NAFLEX, NATIVE, SQUARE

from nopad.preprocessing.config import read_preprocessor_config
from nopad.preprocessing.rules import Preprocessing

# preprocessor_config.json

CLIP_STATISTICS = {"image_mean": list(CROP.mean), "image_std": list(CROP.std)}
IMAGENET = {"image_mean": list(SQUARE.mean), "image_std": list(SQUARE.std)}
SHORT = dataclasses.replace(CROP, short_side=256)
RESIZED = {"do_resize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True}


@pytest.mark.parametrize(
    ("config", "default", "expected"),
    [
        ({}, NATIVE, NATIVE),
        ({}, CROP, CROP),
        ({}, NAFLEX, NAFLEX),
        ({}, SQUARE, SQUARE),
        (
            RESIZED
            | CLIP_STATISTICS
            | {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 224},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "resample": 3,
            },
            NATIVE,
            CROP,
        ),
        ({"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3} | CLIP_STATISTICS, NAFLEX, CROP),
        ({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16, "size": None}
         | RESIZED | {"image_mean": list(HALF), "image_std": 0.5, "resample": 2}, NAFLEX,
         Preprocessing(rule="naflex", max_patches=256, resample="bilinear", mean=HALF, std=HALF)),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3},
         NAFLEX, Preprocessing(rule="square", size=384, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224},
          "crop_size": None, "do_center_crop": None, "default_to_square": True, "resample": 2} | RESIZED | IMAGENET,
         SQUARE, SQUARE),
        ({"image_processor_type": "ViTImageProcessor", "size": 518}, SQUARE,
         Preprocessing(rule="square", size=518, resample="bilinear", mean=HALF, std=HALF)),
        ({"image_processor_type": "CLIPImageProcessorFast"}, NATIVE,
         Preprocessing(rule="crop", size=224, resample="bicubic", mean=CROP.mean, std=CROP.std)),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 112, "width": 112}}, CROP,
         Preprocessing(rule="square", size=112, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "SiglipImageProcessor"}, NAFLEX,
         Preprocessing(rule="square", size=224, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "Siglip2ImageProcessorFast"}, SQUARE,
         Preprocessing(rule="naflex", max_patches=256, resample="bilinear", mean=HALF, std=HALF)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, CROP, SHORT),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256}}, CROP, SHORT),
        ({}, SHORT, SHORT),
        ({"size": {"shortest_edge": 224}}, SHORT, CROP),
        ({"do_resize": False, "do_center_crop": False, "size": {"shortest_edge": 224}}, CROP,
         Preprocessing(rule="native", resample="bicubic", mean=CROP.mean, std=CROP.std)),
        ({"do_normalize": False, "do_rescale": False}, NATIVE,
         Preprocessing(rule="native", resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)),
        ({"rescale_factor": 1 / 127.5}, NATIVE,
         Preprocessing(rule="native", resample="bicubic", mean=HALF, std=HALF, rescale_factor=1 / 127.5)),
    ],
)  # fmt: skip
def test_config_of_a_checkpoint_wins_over_the_default(config, default, expected):
    assert read_preprocessor_config(json.loads(json.dumps(config)), default) == expected


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 256, "width": 256}}, "'shortest_edge': 224"),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True}, "'height': 256"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "preprocessor config: expected"),
        ({"do_center_crop": False}, "preprocessor config: expected"),
        ({"do_resize": False}, "preprocessor config: expected"),
        ({"max_num_patches": 256, "do_center_crop": True}, "preprocessor config: expected"),
        ({"size": {"height": 224, "width": 384}}, "size: expected"),
        ({"size": {"longest_edge": 224}}, "size: expected"),
        ({"size": "big"}, "size: expected"),
        ({"resample": 1}, r"resample: expected 2 \(bilinear\) or 3 \(bicubic\), got 1"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": 336}, "'crop_size': 336"),
        ({"image_processor_type": "SiglipImageProcessor", "size": 112}, "preprocessor config: expected"),
    ],
)
def test_config_that_no_rule_reproduces_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        read_preprocessor_config(config, CROP)


def test_describe_says_which_resize_was_used():
    assert CROP.describe("pil") == (
        "crop 224; bicubic antialiased (pil); rescale 1/255 after resize; mean 0.481455, 0.457827, 0.408211; "
        "std 0.26863, 0.261303, 0.275777; EXIF upright, RGB, alpha on white"
    )
    assert "(torch uint8)" in CROP.describe()
    assert dataclasses.replace(CROP, short_side=256).describe().startswith("crop 224 of short side 256; bicubic")
    assert NAFLEX.describe().startswith("naflex at most 256 patches; ")
    assert NATIVE.with_size(max_patches=100).describe().startswith("native at most 100 patches; ")
    assert "(torch float); rescale 1/255 before resize" in SQUARE.describe("pil")
    assert "(torch uint8); rescale 1/255 after resize" in SQUARE.describe("torch")
