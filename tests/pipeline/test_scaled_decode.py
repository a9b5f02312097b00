"""`decode="scaled"`: JPEGs decoded at a fraction of their size by the decode processes."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import nopad
from nopad.embedding.inputs.media import MediaDecoder
from nopad.pipeline.processor import rule_for
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import load_image


def photo(width: int, height: int, orientation: int = 1, format: str = "JPEG") -> bytes:
    y, x = np.mgrid[0:height, 0:width] / 60
    levels = np.stack([np.sin(x) + np.cos(y), np.sin(x + y), np.cos(x - y)], 2)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(((levels + 2) * 60).astype(np.uint8)).save(file, format, exif=exif)
    return file.getvalue()


FILES = [photo(640, 480), photo(500, 300, 6), photo(60, 40), photo(640, 480, format="PNG")]


def run(encoder, decode, files=FILES, **options):
    rule = rule_for(encoder, "model", max_patches=100)
    worker = Worker(encoder, decode=decode, preprocessing=rule, threads=1, **options)
    (results,) = worker.run([files], lambda data: data, decoder=MediaDecoder(thumbnails=64))
    return results


def test_features_of_large_jpegs_are_nearly_the_same_and_those_of_others_are(encoder):
    scaled, whole = run(encoder, "scaled"), run(encoder, "cpu")
    for a, b in zip(scaled, whole, strict=True):
        assert (a.error, a.grid, a.width, a.height) == (None, b.grid, b.width, b.height)
        assert a.extras.keys() == {"thumbnail"}
        assert torch.cosine_similarity(*map(torch.from_numpy, (a.embedding, b.embedding)), dim=0) > 0.99
    assert [np.array_equal(a.embedding, b.embedding) for a, b in zip(scaled, whole, strict=True)] == [
        False,
        False,
        True,
        True,
    ]


def test_fewer_pixels_are_decoded(encoder):
    decoder, processor = (
        MediaDecoder(),
        Worker(encoder, preprocessing=rule_for(encoder, "model", max_patches=100)).image_processor,
    )
    pixels, size = decoder.scaled(FILES[0], processor.resized_size)
    assert (tuple(pixels.shape), size) == ((3, 60, 80), (480, 640))
    pixels, size = MediaDecoder(thumbnails=64).scaled(FILES[0], processor.resized_size)
    assert (tuple(pixels.shape), size) == ((3, 120, 160), (480, 640))  # the thumbnail needs them
    assert torch.equal(decoder.scaled(FILES[3], processor.resized_size)[0], load_image(FILES[3]))


def test_damage_is_worded_as_without_it(encoder):
    files = [FILES[0][:5000], b"\xff\xd8nothing", FILES[1]]
    reasons = [[str(result.error) for result in run(encoder, decode, files)] for decode in ("scaled", "cpu")]
    assert reasons[0] == reasons[1]
    assert [reason == "None" for reason in reasons[0]] == [False, False, True]


def test_a_job_records_it_and_goes_on_with_it(encoder, tmp_path):
    (tmp_path / "photos").mkdir()
    for index, data in enumerate(FILES[:2]):
        (tmp_path / f"photos/{index}.jpg").write_bytes(data)
    job = {"sources": [tmp_path / "photos"], "out": tmp_path / "table", "model": encoder.source}
    nopad.embed(**job, decode="scaled", max_patches=100)
    assert json.loads((tmp_path / "table/.nopad/job.json").read_text())["decode"] == "scaled"
    with pytest.raises(ValueError, match="decode"):
        nopad.embed(**job, decode="cpu", max_patches=100)
