"""Grey levels travel to the device; what the encoder gets there is what `preprocess` gives, bit for bit."""

from typing import Any

import pytest
import torch
from pictures import noise

from nopad.patches import patchify
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.pipeline.normalize import Normalizer
from nopad.pipeline.upload import Uploader
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import preprocess

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STATISTICS: dict[str, Any] = {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.26, 0.27)}
RULES = {
    "native": Preprocessing(rule="native", resample="bicubic", **STATISTICS),
    "crop": Preprocessing(rule="crop", size=24, resample="bicubic", rescale_factor=1 / 127.5, **STATISTICS),
    "naflex": Preprocessing(
        rule="naflex", resample="bilinear", max_patches=20, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
    "square": Preprocessing(rule="square", size=24, resample="bilinear", rescale_before_resize=True, **STATISTICS),
}


def image(seed: int, height: int = 37, width: int = 50) -> torch.Tensor:
    return torch.from_numpy(noise(seed, height, width)).permute(2, 0, 1)


def processor_of(rule: Preprocessing, order, dtype: torch.dtype, resize: Any = "torch") -> ImageProcessor:
    sent = dtype if rule.is_resized_in_float(resize) else torch.uint8
    return ImageProcessor(rule=rule, resize=resize, patch_size=4, patch_order=order, dtype=sent)


def check(rule: Preprocessing, order, dtype: torch.dtype, resize, device: str = "cpu") -> None:
    """A pack of two images, one of them with every grey level, is that of `preprocess`."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    images = [image(0), levels]
    prepared = [processor_of(rule, order, dtype, resize)(each) for each in images]
    upload, normalize = Uploader(torch.device(device)), Normalizer(rule, order, torch.device(device), dtype)
    values = normalize(upload(prepared)())
    expected = [patchify(preprocess(each, rule, 4, resize=resize), 4, order)[0] for each in images]
    assert (values.device.type, values.dtype) == (device, dtype)
    assert torch.equal(values.cpu(), torch.cat(expected).to(dtype))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_patches_of_a_pack_are_those_of_preprocess(name, order, dtype, resize):
    check(RULES[name], order, dtype, resize)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_on_a_gpu_are_those_of_preprocess(name, order, dtype):
    for resize in ("torch", "pil"):
        check(RULES[name], order, dtype, resize, "cuda")


@pytest.mark.gpu
@NEEDS_GPU
def test_upload_waits_for_no_kernel_and_no_kernel_reads_too_early():
    """Buffers are those of earlier packs, which kernels may still read."""
    upload = Uploader(torch.device("cuda"))
    sums = []
    for value in range(50):
        levels = torch.full((4096, 588), value % 200, dtype=torch.uint8)
        patches = upload([PreparedImage(levels, (1, 64, 64), 896, 896)] * 4)()
        sums.append(patches.long().sum())
    assert [int(total) for total in sums] == [4 * 4096 * 588 * (value % 200) for value in range(50)]


def test_grey_levels_travel_unless_the_rule_is_resized_in_float(encoder):
    assert ImageProcessor.of(encoder).dtype == torch.uint8
    dinov3 = RULES["square"]
    assert ImageProcessor.of(encoder, preprocessing=dinov3).dtype == torch.uint8
    assert ImageProcessor.of(encoder, preprocessing=dinov3, resize="pil").dtype == encoder.dtype
