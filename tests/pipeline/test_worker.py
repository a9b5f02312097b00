import dataclasses
import io
import itertools
import random
import sys
import threading
import time
from pathlib import Path

import aimv2_checkpoints
import numpy as np
import onevision_checkpoints
import pytest
import torch
from pictures import noise
from PIL import Image, ImageSequence

import nopad
from nopad.encoder import PackedEncoder
from nopad.environment import SWITCH_SECONDS
from nopad.pipeline import worker as worker_module
from nopad.pipeline.image_processor import ImageProcessor
from nopad.pipeline.memory import MemoryReservation
from nopad.pipeline.pack_runner import EmbeddingResult, PackRunner
from nopad.pipeline.packer import ENOUGH_CHOICE, BestFitPacker
from nopad.pipeline.processor import rule_for
from nopad.pipeline.read_ahead import ReadAhead
from nopad.pipeline.selection import Selection
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.load import load


def make_image(seed: int, rows: int = 3, columns: int = 4) -> torch.Tensor:
    return torch.from_numpy(noise(seed, 4 * rows, 4 * columns)).permute(2, 0, 1)


def mixed(number: int) -> list[torch.Tensor]:
    sizes = np.random.default_rng(0).integers(1, 9, (number, 2))
    return [make_image(seed, rows, columns) for seed, (rows, columns) in enumerate(sizes)]


def by_itself(encoder: PackedEncoder, image: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return encoder.encode(encoder.pack([image])).pooled[0].numpy()


def run(worker: Worker, groups, read=load, **options) -> list[list[EmbeddingResult]]:
    return list(worker.run(groups, read, **options))


def bits(results: list[EmbeddingResult]) -> list[bytes]:
    return [b"" if result.embedding is None else result.embedding.tobytes() for result in results]


def test_results_are_in_the_order_of_the_images(encoder):
    images = mixed(30)
    (results,) = run(Worker(encoder, capacity=40, threads=3, selection=Selection(tokens=True)), [images])
    for image, result in zip(images, results, strict=True):
        rows, columns = image.shape[1] // 4, image.shape[2] // 4
        assert (result.error, result.grid) == (None, (1, rows, columns))
        assert (result.width, result.height) == (4 * columns, 4 * rows)
        np.testing.assert_allclose(result.embedding, by_itself(encoder, image), atol=1e-5)
        assert (result.tokens.shape, result.tokens.dtype) == ((rows * columns, 32), np.float16)
        np.testing.assert_allclose(result.tokens.mean(0, dtype=np.float32), result.embedding, atol=2e-3)


def test_neither_threads_nor_their_luck_change_a_bit(encoder):
    images = mixed(40)
    once = [bits(results) for results in run(Worker(encoder, capacity=64, threads=1), [images[:25], images[25:]])]

    def slowly(image: torch.Tensor) -> torch.Tensor:
        time.sleep(random.uniform(0, 0.004))
        return load(image)

    again = run(Worker(encoder, capacity=64, threads=8), [images[:25], images[25:]], slowly)
    assert [bits(results) for results in again] == once


def test_a_group_owes_nothing_to_the_others(encoder):
    images = mixed(30)
    worker = Worker(encoder, capacity=64)
    in_three = run(worker, [images[:10], [], images[10:17], images[17:]])
    assert [len(results) for results in in_three] == [10, 0, 7, 13]
    (alone,) = run(worker, [images[10:17]])
    assert bits(alone) == bits(in_three[2])


def test_groups_are_taken_as_they_are_needed(encoder):
    results = Worker(encoder, capacity=64, threads=2).run(([make_image(n)] for n in itertools.count()), load)
    assert len(next(results)) == 1
    assert len(next(results)) == 1
    results.close()


def test_a_bad_image_fails_alone(encoder, caplog):
    def read(number: int) -> torch.Tensor:
        if number == 1:
            raise ImageError("one", "truncated")
        if number == 3:
            raise KeyError("a bug")
        return make_image(number)

    worker = Worker(encoder)
    (results,) = run(worker, [range(5)], read)
    assert [None if result.error is None else result.error.reason for result in results] == [
        None,
        "truncated",
        None,
        "unexpected KeyError: 'a bug'",
        None,
    ]
    assert "unexpected error with 3" in caplog.text
    assert (results[1].embedding, results[1].grid, results[1].width) == (None, None, None)
    np.testing.assert_allclose(results[4].embedding, by_itself(encoder, make_image(4)), atol=1e-5)
    assert (worker.stats.images, worker.stats.failed) == (5, 2)


def test_strict_raises_the_first_and_ends_its_threads(encoder):
    def read(number: int) -> torch.Tensor:
        raise ImageError(str(number), "truncated")

    before = {*threading.enumerate()}
    with pytest.raises(ImageError, match="0: truncated"):
        run(Worker(encoder, threads=4), [range(100)], read, strict=True)
    assert {*threading.enumerate()} <= before


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Packs whose results are fetched later."""
    begin = PackRunner.__init__

    def begin_overlapped(self, *arguments):
        begin(self, *arguments)
        self.max_running = 2

    monkeypatch.setattr(PackRunner, "__init__", begin_overlapped)


def test_groups_follow_each_other_without_a_pause(encoder, as_on_a_gpu, monkeypatch):
    images = mixed(30)
    bounds = [(0, 10), (10, 10), (10, 17), (17, 18), (18, 30)]
    groups = [images[start:stop] for start, stop in bounds]
    expected = [bits(run(Worker(encoder, capacity=64), [group])[0]) for group in groups]
    waits = []
    finish = PackRunner.finish
    monkeypatch.setattr(PackRunner, "finish", lambda self: waits.append(len(self.running)) or finish(self))
    monkeypatch.setattr(ReadAhead, "is_ready", True)
    assert [bits(results) for results in run(Worker(encoder, capacity=64), groups)] == expected
    assert len(waits) == 1


def test_a_group_is_not_held_back_while_the_next_is_read(encoder, as_on_a_gpu):
    may_read, waited = threading.Event(), []

    def read(number: int) -> torch.Tensor:
        if number:
            waited.append(may_read.wait(60))
        return make_image(number)

    results = Worker(encoder, threads=1).run([[0], [1]], read)
    assert len(next(results)) == 1
    assert not waited  # the other group cannot be begun yet
    may_read.set()
    assert len(next(results)) == 1
    assert waited == [True]


def test_stop_finishes_what_was_begun(encoder, as_on_a_gpu):
    stop = threading.Event()
    sizes = []
    for results in Worker(encoder).run(([make_image(n)] * (n + 1) for n in range(50)), load, stop=stop):
        sizes.append(len(results))
        stop.set()
    assert sizes in ([1], [1, 2])


def test_a_pack_for_which_memory_comes_free_is_run_whole(encoder, monkeypatch):
    whole, sizes = encoder.encode, []

    def encode(patches, grid):
        sizes.append(len(grid))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(patches, grid)

    monkeypatch.setattr(encoder, "encode", encode)
    (results,) = run(Worker(encoder), [[make_image(0), make_image(1)]])
    assert all(result.error is None for result in results)
    assert sizes == [2, 2]


def test_stop_finishes_the_group_in_hand(encoder):
    stop = threading.Event()
    done = []
    for results in Worker(encoder).run([[make_image(0)], [make_image(1)], [make_image(2)]], load, stop=stop):
        done.append(len(results))
        if len(done) == 2:
            stop.set()
    assert done == [1, 1]


# Memory


def limited(encoder, monkeypatch, max_patches: int, error: RuntimeError) -> None:
    whole = encoder.encode

    def encode(patches, grid):
        if len(patches) > max_patches:
            raise error
        return whole(patches, grid)

    monkeypatch.setattr(encoder, "encode", encode)


CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ERROR)])
def test_a_pack_that_does_not_fit_goes_one_by_one_and_an_image_that_does_not_fails(encoder, monkeypatch, error):
    images = [make_image(0), make_image(1, 10, 10), make_image(2)]
    limited(encoder, monkeypatch, 20, error)
    worker = Worker(encoder)
    (results,) = run(worker, [images])
    monkeypatch.undo()
    for index in (0, 2):
        np.testing.assert_allclose(results[index].embedding, by_itself(encoder, images[index]), atol=1e-5)
    reason = f"its 100 patches do not fit into memory ({error}); set a limit: max_patches"
    assert results[1].error.reason == reason
    assert (worker.stats.images, worker.stats.failed) == (3, 1)


def test_other_errors_of_the_encoder_are_raised(encoder, monkeypatch):
    limited(encoder, monkeypatch, 0, RuntimeError("CUDA error: device-side assert"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(Worker(encoder), [[make_image(0)]])


# Numbers that are none


def output_of(encoder, monkeypatch, **changes: float) -> None:
    whole = encoder.encode

    def encode(patches, grid):
        output = whole(patches, grid)
        for name, value in changes.items():
            getattr(output, name)[-1] = value
        return output

    monkeypatch.setattr(encoder, "encode", encode)


def test_features_that_overflow_are_failures(encoder, monkeypatch):
    output_of(encoder, monkeypatch, pooled=float("inf"))
    (results,) = run(Worker(encoder), [[make_image(0), make_image(1)]])
    assert results[0].error is None
    assert results[1].error.reason == "its features are not finite in torch.float32"


def test_float16_gets_a_hint(tmp_path):
    original = aimv2_checkpoints.tiny_original()
    original.rms_norm.weight.data.fill_(6e4)
    folder = aimv2_checkpoints.write(tmp_path, original.state_dict(), original.config.to_dict())
    (results,) = run(Worker(nopad.load(folder, dtype=torch.float16)), [[make_image(0)]])
    hint = "; float16 may overflow, bfloat16 and float32 do not"
    assert results[0].error.reason == f"its features are not finite in torch.float16{hint}"


def test_tokens_that_float16_cannot_hold_are_failures(encoder, monkeypatch):
    output_of(encoder, monkeypatch, tokens=1e5)
    (results,) = run(Worker(encoder, selection=Selection(tokens=True)), [[make_image(0), make_image(1)]])
    assert results[0].error is None
    assert results[1].error.reason == "its tokens are not finite in float16, in which they are stored"
    (results,) = run(Worker(encoder), [[make_image(0), make_image(1)]])
    assert results[1].error is None


# What is told


def test_the_tally_counts_patches_packs_and_room(encoder):
    worker = Worker(encoder, capacity=24)
    run(worker, [[make_image(n) for n in range(5)], [make_image(0, 6, 6)]])  # 12 patches each: 2 + 2 + 1; then 36 alone
    stats = worker.stats
    assert (stats.images, stats.failed, stats.packs, stats.patches) == (6, 0, 4, 96)
    assert stats.capacity == 24 + 24 + 12 + 36
    assert stats.fill == 1.0
    assert min(stats.decode_seconds, stats.encode_seconds) > 0


def test_packs_of_mixed_sizes_are_97_percent_full(encoder):
    worker = Worker(encoder, capacity=1024)
    run(worker, [mixed(400)])
    assert worker.stats.packs > 5
    assert 0.97 <= worker.stats.fill <= 1


@pytest.mark.parametrize("options", [{"capacity": 0}, {"threads": 0}])
def test_wrong_numbers(encoder, options):
    with pytest.raises(ValueError, match="expected capacity ≥ 1 and threads ≥ 1"):
        Worker(encoder, **options)


# encoder.embed


def test_embed_takes_any_iterable_and_gives_its_order(encoder):
    images = mixed(20)
    vectors = encoder.embed(iter(images), capacity=64)
    assert (vectors.shape, vectors.dtype) == ((20, 32), torch.float32)
    for image, vector in zip(images, vectors, strict=True):
        np.testing.assert_allclose(vector, by_itself(encoder, image), atol=1e-5)
    assert encoder.embed([]).shape == (0, 32)


def test_embed_takes_an_object_when_it_is_yielded(encoder):
    frames = [Image.fromarray(noise(seed, 12, 16)) for seed in range(6)]
    expected = encoder.embed(frames)
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    torch.testing.assert_close(encoder.embed(ImageSequence.Iterator(Image.open(file)), threads=3), expected)

    array, tensor, clip = np.zeros((12, 16, 3), np.uint8), torch.zeros(3, 12, 16, dtype=torch.uint8), [None]

    def refilled(buffer, fill):
        for frame in frames:
            fill(np.asarray(frame))
            yield buffer

    fills = [
        (array, lambda pixels: np.copyto(array, pixels)),
        (tensor, lambda pixels: tensor.copy_(torch.from_numpy(pixels.copy()).permute(2, 0, 1))),
        (clip, lambda pixels: clip.__setitem__(0, pixels)),
    ]
    for buffer, fill in fills:
        torch.testing.assert_close(encoder.embed(refilled(buffer, fill), threads=3), expected)


def test_one_pil_image_stands_in_the_list_many_times(encoder):
    file = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(file, "PNG")
    once = encoder.embed([Image.open(file)])
    torch.testing.assert_close(encoder.embed([Image.open(file)] * 8, threads=4), once.expand(8, -1))


def test_embed_raises_for_the_first_that_cannot_be_used(encoder, tmp_path):
    with pytest.raises(ImageError, match=r"missing\.png: cannot be opened"):
        encoder.embed([make_image(0), tmp_path / "missing.png", tmp_path / "other.png"])
    with pytest.raises(ImageError, match=r"missing\.png: cannot be opened"):
        encoder.embed([tmp_path / "missing.png", np.zeros((4, 4), np.float32)])
    with pytest.raises(ImageError, match="float32 array"):
        encoder.embed([np.zeros((4, 4), np.float32), tmp_path / "missing.png"])


def test_a_clip_is_one_result(encoder, tmp_path):
    original = onevision_checkpoints.tiny_original()
    joint = nopad.load(onevision_checkpoints.write(tmp_path, original.state_dict(), original.config.to_dict()))
    clip = [noise(n, 28, 28) for n in range(3)]
    for family in (joint, encoder):
        assert family.embed([clip, clip[0]]).shape == (2, family.hidden_size)
    frame_by_frame = encoder.embed([clip])[0]
    torch.testing.assert_close(frame_by_frame, encoder.embed(clip).mean(0))
    with torch.inference_mode():
        torch.testing.assert_close(joint.embed([clip])[0], joint.encode(joint.pack([clip])).pooled[0])
    assert not torch.allclose(joint.embed([clip])[0], joint.embed(clip).mean(0), atol=1e-3)


def test_embed_raises_what_the_encoder_finds(encoder):
    images = mixed(3)
    overflowing = nopad.load(encoder.source, dtype=torch.float16)
    with torch.no_grad():
        overflowing.layers[0].mlp.down.weight.mul_(60000)
    with pytest.raises(ImageError, match=r"image 0: its features are not finite in torch\.float16"):
        overflowing.embed(images)


@pytest.mark.parametrize(
    "one",
    [
        "cat.jpg",
        b"\xff\xd8",
        Path("cat.jpg"),
        Image.new("RGB", (8, 8)),
        np.zeros((30, 45, 3), np.uint8),
        torch.zeros(3, 28, 28, dtype=torch.uint8),
    ],
)
def test_one_image_where_several_are_expected(encoder, one):
    for take in (encoder.embed, encoder.pack):
        with pytest.raises(ValueError, match="images: expected several, got one; give it in a list"):
            take(one)


def test_a_pack_by_another_rule_is_taken_by_the_encoder_that_made_it(encoder):
    rule = dataclasses.replace(encoder.preprocessing, mean=(0.1, 0.2, 0.3))
    images = mixed(2)
    pack = encoder.pack(images, preprocessing=rule)
    with torch.inference_mode():
        pooled = encoder.encode(pack).pooled
    torch.testing.assert_close(encoder.embed(images, preprocessing=rule), pooled.float())
    assert not torch.allclose(encoder.embed(images), pooled.float(), atol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_clips_beside_an_image_change_none_of_its_bits_once_compiled(encoder, tmp_path, caplog, joint):
    if joint:
        original = onevision_checkpoints.tiny_original()
        encoder = nopad.load(onevision_checkpoints.write(tmp_path, original.state_dict(), original.config.to_dict()))
    encoder.compile(640, 8, compiled=False)
    image, short, long = noise(0, 28, 28), [noise(n, 8, 8) for n in range(6)], [noise(n, 8, 8) for n in range(12)]
    (alone,), (short_alone,), (long_alone,) = (encoder.embed([each]) for each in (image, short, long))
    before = caplog.text
    assert ("8 segments" in before) is not joint  # the long clip, whose frames are more, goes alone
    together = encoder.embed([image, short, image, long, short, image])
    assert torch.equal(together, torch.stack([alone, short_alone, alone, long_alone, short_alone, alone]))


def test_embed_reserves_the_memory_of_every_image_before_it_is_decoded(encoder, monkeypatch, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    reserved = []
    reserve = MemoryReservation.reserve
    monkeypatch.setattr(MemoryReservation, "reserve", lambda self, size: (reserved.append(size), reserve(self, size)))
    data = (tmp_path / "photo.png").read_bytes()
    array = np.zeros((48, 64, 3), np.uint8)
    encoder.embed([tmp_path / "photo.png", data, array, [tmp_path / "photo.png", data]], size="native", threads=1)
    decoding, pixels = 24 * 64 * 48, 64 * 48
    processor = ImageProcessor.of(encoder, preprocessing=rule_for(encoder, "native", max_patches="auto"))
    expected = [(1, pixels, decoding), (1, pixels, decoding), (1, pixels, 0), (2, 2 * pixels, 2 * decoding)]
    assert reserved == [processor.peak_bytes(*sizes) for sizes in expected]


def test_embed_decodes_no_image_that_exceeds_the_memory(encoder, monkeypatch):
    monkeypatch.setattr("nopad.pipeline.memory.available_memory", lambda: 1000)
    with pytest.raises(ImageError, match="memory"):
        encoder.embed([np.zeros((480, 640, 3), np.uint8)], size="native")


def test_packs_wait_for_no_more_images_than_give_a_choice(encoder, monkeypatch):
    made = []

    class Seen(BestFitPacker):
        def __init__(self, capacity, **options):
            made.append(options)
            super().__init__(capacity, **options)

    monkeypatch.setattr(worker_module, "BestFitPacker", Seen)
    list(Worker(encoder, threads=1).run([[torch.zeros(3, 8, 8, dtype=torch.uint8)]], lambda pixels: pixels))
    assert [options["enough_choice"] for options in made] == [ENOUGH_CHOICE]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_threads_switch_quickly_beside_a_gpu_alone(encoder, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    before = sys.getswitchinterval()
    seen = []

    def read(pixels):
        seen.append(sys.getswitchinterval())
        return pixels

    list(Worker(encoder.to(device), threads=1).run([[torch.zeros(3, 8, 8, dtype=torch.uint8)]], read))
    assert seen == [pytest.approx(SWITCH_SECONDS if device == "cuda" else before)]
    assert sys.getswitchinterval() == before
