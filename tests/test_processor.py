"""Packs without a model, and where their grids lie in the images."""

import dataclasses
import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from tiny_encoders import FAMILIES, tiny
from torch.utils.data import DataLoader

import nopad
from nopad.pipeline.pack_processor import PackProcessor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.rules import Preprocessing

STATISTICS = {"resample": "bilinear", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rescale_factor": 1.0}
SQUARE = Preprocessing(rule="square", size=64, **STATISTICS)
CROP = Preprocessing(rule="crop", size=48, short_side=64, **STATISTICS)
NATIVE = Preprocessing(rule="native", **STATISTICS)
PICTURES = [noise(0, 41, 23), noise(1, 17, 30), noise(2, 5, 5)]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    return tiny("siglip", tmp_path_factory.mktemp("siglip"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_makes_the_packs_of_its_encoder(family, tmp_path, monkeypatch):
    folder = tiny(family, tmp_path)
    encoder = nopad.load(folder, size=20, dtype=torch.bfloat16)
    monkeypatch.setattr(nopad.PackedEncoder, "__init__", None)  # no encoder is built
    alone = nopad.processor(folder, size=20, dtype=torch.bfloat16)
    assert alone == encoder.processor == pickle.loads(pickle.dumps(alone))
    assert alone(PICTURES) == encoder.processor(PICTURES) == encoder.pack(PICTURES)
    assert len(pickle.dumps(alone)) < 2000
    assert nopad.processor(folder).dtype == torch.float32
    assert nopad.processor(folder).rule == encoder.model_preprocessing


def test_a_processor_of_a_published_name():
    processor = nopad.processor("untrained:google/siglip2-base-patch16-naflex", max_patches=9, multiple_of=3)
    pack = processor(PICTURES)
    assert pack.grid_thw.tolist() == [[1, 3, 3]] * 3
    assert (pack.hidden_states.dtype, pack.mean, pack.patch_size) == (torch.float32, (0.5,) * 3, 16)
    with pytest.raises(ValueError, match=r"revision: .* has random weights and no revisions"):
        nopad.processor("untrained:google/siglip2-base-patch16-naflex", revision="main")
    with pytest.raises(ValueError, match="expected the name of a published model"):
        nopad.processor("untrained:siglip")


@pytest.mark.parametrize(("family", "name"), [("clip", "image_size"), ("pe", "num_channels"), ("pe", "image_size")])
def test_a_config_by_which_no_pixels_are_made_is_refused_by_its_checkpoint(family, name, tmp_path):
    folder = tiny(family, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: None}))
    with pytest.raises(ValueError, match=rf"^checkpoint '{folder}': .*None"):
        nopad.processor(folder)


def test_a_processor_refuses_what_pack_refuses(siglip):
    processor = nopad.processor(siglip)
    with pytest.raises(ValueError, match="images: expected several, got one; give it in a list"):
        processor(PICTURES[0])
    with pytest.raises(ValueError, match="max_patches: expected None for 'square'"):
        nopad.processor(siglip, max_patches=4)
    with pytest.raises(ValueError, match="size: expected 'model'"):
        nopad.processor(siglip, size="small")
    with pytest.raises(ValueError, match="resize: expected one of"):
        nopad.processor(siglip, resize="lanczos")
    with pytest.raises(ValueError, match="size: expected a short side of at least a patch of 4 × 4 pixels, got 3"):
        nopad.processor(siglip, size=3)
    assert processor([]) == nopad.load(siglip).pack([])


def test_an_image_smaller_than_a_patch_is_named(siglip, tmp_path):
    path = tmp_path / "small.png"
    Image.new("RGB", (30, 3)).save(path)
    encoder, small = nopad.load(siglip), np.zeros((3, 30, 3), np.uint8)
    for call in (encoder.pack, encoder.embed, nopad.processor(siglip, size="native")):
        options = {} if isinstance(call, PackProcessor) else {"size": "native"}
        with pytest.raises(
            ImageError, match=r"^image 1: 3×30 pixels .*, smaller than a patch of 4 × 4 pixels; min_pat"
        ):
            call([PICTURES[0], small], **options)
    with pytest.raises(ImageError, match=r"small.png: 3×30 pixels .*, smaller than a patch"):
        encoder.pack([path], size="native")
    assert encoder.pack([small], size="native", min_patches=1).grid_thw.tolist() == [[1, 1, 10]]
    assert encoder.pack([small]).grid_thw.tolist() == encoder.pack([PICTURES[0]]).grid_thw.tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_processor_collates_in_the_workers_of_a_data_loader(method, siglip, tmp_path):
    if method == "fork" and threading.active_count() > 1:
        method = "forkserver"  # a fork of threads may hang
    paths = []
    for number, image in enumerate(PICTURES):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    encoder = nopad.load(siglip, size="native")
    loader = DataLoader(
        paths, batch_size=2, collate_fn=encoder.processor, num_workers=1, multiprocessing_context=method
    )
    assert list(loader) == [encoder.pack(paths[:2]), encoder.pack(paths[2:])]


# Boxes


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image whose first colour is the column, and whose second is the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows, rows * 0)).byte()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SQUARE, [0, 0, 150, 200]),
        (SQUARE.with_size(multiple_of=3), [0, 0, 150 * 48 / 64, 200 * 48 / 64]),
        (CROP, [150 * 8 / 64, 200 * 18 / 85, 150 * 56 / 64, 200 * 66 / 85]),
        (NATIVE, [0, 0, 144, 192]),
        (NATIVE.with_size(100), [0, 0, 150 * 96 / 100, 200 * 128 / 133]),
        (NATIVE.with_size((50, 90)), [0, 0, 150 * 80 / 90, 200 * 48 / 50]),
        (NATIVE.with_size(max_patches=12), [0, 0, 150, 200]),
    ],
    ids=lambda value: value.describe().split(";")[0] if isinstance(value, Preprocessing) else "",
)
def test_a_box_is_the_part_of_the_image_that_the_grid_covers(rule, expected, siglip):
    processor = dataclasses.replace(nopad.processor(siglip), rule=rule, patch_size=16)
    image = coordinates(200, 150)
    pack = processor([image])
    assert pack.sizes.tolist() == [[200, 150]]
    if rule.max_patches is None:
        assert pack.boxes.tolist() == [pytest.approx(expected)]
    x0, y0, x1, y1 = pack.boxes[0].tolist()
    seen = nopad.unpatchify(pack.hidden_states, tuple(pack.grid_thw[0].tolist()), 16)
    assert seen[0].mean().item() == pytest.approx((x0 + x1 - 1) / 2, abs=0.6)
    assert seen[1].mean().item() == pytest.approx((y0 + y1 - 1) / 2, abs=0.6)
    width, height = x1 - x0, y1 - y0  # from the first pixel's centre to the last one's is a pixel less
    rows, columns = seen.shape[1:]
    assert (seen[0, :, -1] - seen[0, :, 0]).mean().item() == pytest.approx(width * (1 - 1 / columns), abs=1)
    assert (seen[1, -1] - seen[1, 0]).mean().item() == pytest.approx(height * (1 - 1 / rows), abs=1)


def test_boxes_and_sizes_are_of_the_upright_image(siglip):
    image = Image.fromarray(noise(0, 40, 24))
    image.getexif()[0x0112] = 6
    pack = nopad.load(siglip, size="native").pack([image, noise(0, 9, 9)])
    assert pack.sizes.tolist() == [[24, 40], [9, 9]]
    assert pack.boxes.tolist() == [[0, 0, 40, 24], [0, 0, 8, 8]]


def test_blocks_larger_than_any_image_are_refused():
    processor = nopad.processor("untrained:google/siglip2-base-patch16-naflex", size="native", multiple_of=2)
    rule = dataclasses.replace(processor.rule, multiple_of=10**9)
    with pytest.raises(ValueError, match=r"multiple_of: expected images of at most 178,956,970 pixels, got 1000000000"):
        dataclasses.replace(processor, rule=rule)
