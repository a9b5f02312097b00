"""Pixels are those of the original processors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from image_samples import CROP, NAFLEX, PHOTOS, SQUARE, noise
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nopad.families import family_of_published
from nopad.patches import patchify
from nopad.preprocessing.decode import load_image
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import preprocess

# Equal to the original processors

SHAPES = [(300, 451), (451, 300), (224, 224), (64, 64), (97, 1000), (1, 1), (2, 150), (223, 225)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_equals_clip_bit_for_bit(shape):
    image = noise(*shape)
    expected = CLIPImageProcessorPil()(image.permute(1, 2, 0).numpy(), input_data_format="channels_last")
    assert torch.equal(preprocess(image, CROP, 14, resize="pil"), torch.from_numpy(expected["pixel_values"][0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_of_a_longer_short_side_equals_the_processor_bit_for_bit(shape):
    image = noise(*shape)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=squared(224), image_mean=CROP.mean, image_std=CROP.std
    )
    expected = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last")["pixel_values"][0]
    rule = dataclasses.replace(CROP, short_side=256)
    assert torch.equal(preprocess(image, rule, 14, resize="pil"), torch.from_numpy(expected))


@pytest.mark.parametrize("max_patches", [None, 1, 64, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naflex_equals_siglip2_bit_for_bit(shape, max_patches):
    image = noise(*shape)
    processor = Siglip2ImageProcessorPil(max_num_patches=max_patches or 256)
    rule = dataclasses.replace(NAFLEX, max_patches=max_patches)
    expected = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last", return_tensors="pt")
    patches, (_, rows, columns) = patchify(preprocess(image, rule, 16, resize="pil"), 16)
    assert [rows, columns] == expected["spatial_shapes"][0].tolist()
    assert torch.equal(patches, expected["pixel_values"][0, : rows * columns])


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photo_equals_clip_from_the_file_on(path):
    expected = CLIPImageProcessorPil()(Image.open(path))["pixel_values"][0]
    assert torch.equal(preprocess(load_image(path), CROP, 14, resize="pil"), torch.from_numpy(expected))


def published(name: str) -> tuple[Preprocessing, int]:
    """The rule that a family gives a published model, and its patch size."""
    family = family_of_published(name)
    with torch.device("meta"):
        encoder = family(family.published_config(name))
    return encoder.default_preprocessing, encoder.patch_size


def squared(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


PIXEL_PROCESSORS = {
    "apple/aimv2-large-patch14-224": CLIPImageProcessorPil(),
    "apple/aimv2-large-patch14-336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=squared(336)),
    "apple/aimv2-large-patch14-native": CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
    "lmms-lab-encoder/onevision-encoder-large": CLIPImageProcessorPil(
        size={"shortest_edge": 448}, crop_size=squared(448)
    ),
    "openai/clip-vit-base-patch32": CLIPImageProcessorPil(),
    "apple/DFN5B-CLIP-ViT-H-14-378": CLIPImageProcessorPil(size={"shortest_edge": 378}, crop_size=squared(378)),
    "facebook/dinov2-base": BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=squared(224), image_mean=list(SQUARE.mean), image_std=list(SQUARE.std)
    ),
    # Its processor of transformers needs torchvision; Google's own code makes the same by Pillow.
    "google/tipsv2-b14": ViTImageProcessorPil(size=squared(448), do_normalize=False),
    "google/vit-base-patch16-224": ViTImageProcessorPil(),
    "nvidia/C-RADIOv4-H": CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False),
    # Meta's own code makes the same by torchvision, which resizes by Pillow.
    "facebook/PE-Core-L14-336": ViTImageProcessorPil(size=squared(336)),
    "google/vit-large-patch32-384": ViTImageProcessorPil(size=squared(384)),
    "facebook/vit-mae-base": ViTImageProcessorPil(image_mean=list(SQUARE.mean), image_std=list(SQUARE.std)),
    "facebook/ijepa_vith16_1k": ViTImageProcessorPil(
        size=squared(448), image_mean=list(SQUARE.mean), image_std=list(SQUARE.std)
    ),
    "facebook/pixio-vitb16": ViTImageProcessorPil(
        size=squared(256), resample=3, image_mean=list(SQUARE.mean), image_std=list(SQUARE.std)
    ),
    "google/siglip2-base-patch16-256": SiglipImageProcessorPil(size=squared(256)),
    "google/siglip-so400m-patch14-384": SiglipImageProcessorPil(size=squared(384)),
}
ODD_SHAPES = [shape for shape in SHAPES if min(shape) >= 14]  # smaller ones are no image for a native model
SUBJECTS = [*PHOTOS, *ODD_SHAPES]


def subject(which: Path | tuple[int, int]) -> tuple[Tensor, Image.Image]:
    """A photo or noise of a shape, as nopad loads it and as a processor takes it."""
    if isinstance(which, Path):
        return load_image(which), Image.open(which).convert("RGB")
    image = noise(*which)
    return image, Image.fromarray(image.permute(1, 2, 0).numpy())


def name_of(which: object) -> str:
    return which.stem if isinstance(which, Path) else str(which).rsplit("/", 1)[-1]


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
@pytest.mark.parametrize("name", PIXEL_PROCESSORS, ids=name_of)
def test_rule_of_a_family_equals_its_processor_bit_for_bit(name, which):
    rule, patch_size = published(name)
    image, pil_image = subject(which)
    expected = PIXEL_PROCESSORS[name](pil_image, return_tensors="pt")["pixel_values"][0]
    rows, columns = (side // patch_size for side in expected.shape[1:])  # the stride of the original drops the rest
    pixels = preprocess(image, rule, patch_size, resize="pil")
    assert torch.equal(pixels, expected[:, : rows * patch_size, : columns * patch_size])


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
def test_rule_of_naflex_equals_siglip2_bit_for_bit(which):
    rule, patch_size = published("google/siglip2-so400m-patch16-naflex")
    image, pil_image = subject(which)
    expected = Siglip2ImageProcessorPil()(pil_image, return_tensors="pt")
    patches, (_, rows, columns) = patchify(preprocess(image, rule, patch_size, resize="pil"), patch_size)
    assert [rows, columns] == expected["spatial_shapes"][0].tolist()
    assert torch.equal(patches, expected["pixel_values"][0, : rows * columns])


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("facebook/dinov3-vits16-pretrain-lvd1689m", SQUARE.mean, SQUARE.std),
        ("facebook/dinov3-vitl16-pretrain-sat493m", (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    ],
    ids=name_of,
)
def test_rule_of_dinov3_equals_the_steps_of_its_processor(name, mean, std, which):
    """DINOv3ViTImageProcessor cannot be imported without torchvision, so its documented arithmetic stands in for it.

    Its `_preprocess` rescales, resizes in float and normalises; torchvision does these by the operations below.
    """
    rule, patch_size = published(name)
    image, _ = subject(which)
    pixels = image.contiguous() * (1 / 255)
    if pixels.shape[1:] != (224, 224):
        pixels = torch.nn.functional.interpolate(pixels[None], (224, 224), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    assert torch.equal(preprocess(image, rule, patch_size, resize="pil"), (pixels - mean) / std)


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
def test_torch_resize_is_within_a_grey_level_of_the_float_resize(which):
    grey = dataclasses.replace(SQUARE, mean=(0, 0, 0), std=(1, 1, 1))
    image, _ = subject(which)
    fast, exact = (preprocess(image, grey, 16, resize=resize) * 255 for resize in ("torch", "pil"))
    assert torch.equal(fast.round(), fast)
    assert (fast - exact).abs().max() < 1.01


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, 1.0])
def test_rescale_equals_transformers_for_every_grey_level(factor):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, rescale_factor=factor)
    expected = processor(levels.numpy(), input_data_format="channels_first")["pixel_values"][0]
    rule = Preprocessing(rule="native", resample="bicubic", mean=CROP.mean, std=CROP.std, rescale_factor=factor)
    assert torch.equal(preprocess(levels, rule, 16), torch.from_numpy(expected))


def page(height: int, width: int) -> Tensor:
    """Black text on white."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for top in range(4, height, 14):
        draw.text(
            (6, top), "The quick brown fox jumps over the lazy dog 0123456789 " * (1 + width // 200), fill="black"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def black_and_white(height: int, width: int) -> Tensor:
    return noise(height, width) // 128 * 255


TALL, WIDE, ENLARGED = (1600, 600), (700, 1000), (150, 100)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [TALL, WIDE, ENLARGED, (500, 333), (320, 90), (1000, 224)])
@pytest.mark.parametrize("draw", [page, black_and_white])
def test_torch_resize_of_hard_edges_is_within_two_grey_levels_of_pillow(draw, shape, resample):
    """Passes in another order than Pillow's are up to 30 levels away: each clips what the filter overshoots."""
    grey = Preprocessing(rule="square", size=224, resample=resample, mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)
    fast, exact = (preprocess(draw(*shape), grey, 14, resize=resize) for resize in ("torch", "pil"))
    difference = (fast - exact).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() <= 5e-4
    assert (difference > 0).float().mean() <= 0.05


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_torch_resize_of_photos_is_within_a_grey_level_of_pillow(path, resample):
    grey = Preprocessing(rule="crop", size=112, resample=resample, mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)
    image = load_image(path)
    difference = preprocess(image, grey, 14, resize="torch") - preprocess(image, grey, 14, resize="pil")
    assert difference.abs().max() <= 1
