"""Alignment passes what is equal, fails what is not, and never takes an error for a low score."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from aimv2_checkpoints import apple, flat_config, tiny_composite, tiny_original, write
from pictures import noise
from PIL import Image
from tiny_encoders import tiny

import nopad
from nopad.align import metrics
from nopad.align.cases import photo_case, photos_in
from nopad.align.command import align_table
from nopad.align.references import reference_of
from nopad.align.references.aimv2 import AIMv2Reference
from nopad.align.run import align
from nopad.cli import main
from nopad.embedding.inputs.sources import list_inputs
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.published import describe_published
from nopad.inference import compile
from nopad.inference.layer_stack import EagerLayers
from nopad.inference.runner import StaticRunner
from nopad.layers.mlp import GatedMLP
from nopad.published import published_models

SCRIPT = Path(__file__).parent.parent / "model_factory" / "align_aim_v2_packing.py"


@pytest.fixture
def native(tmp_path) -> Path:
    original = tiny_original(patch_size=14)
    return write(tmp_path / "native", original.state_dict(), original.config.to_dict())


@pytest.fixture
def learned(tmp_path) -> Path:
    original = tiny_original(patch_size=14, image_size=56, is_native=False, use_head=True)
    return write(tmp_path / "learned", original.state_dict(), original.config.to_dict())


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(70, 50), (40, 90), (56, 56)]):
        noise = torch.randint(0, 255, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return folder


def test_native_checkpoint_passes_every_case(native, photos):
    report = align(native, images=photos)
    assert report.passed, [case.failures for case in report.cases]
    names = [case.name for case in report.cases]
    assert "16 × 16 patches, batched" in names
    assert "1 × 60 patches" in names
    assert "a clip of 3 frames" in names
    assert "all sizes in one pack" in names
    assert "the same pack in another order" in names
    assert names[-1] == "3 photos in one pack"
    assert not report.skipped
    assert report.weights == "read from the checkpoint as it is (transformers names)"
    mixed = next(case for case in report.cases if case.name == "all sizes in one pack")
    assert mixed.images == 6
    assert mixed.tokens == 64 + 85 + 84 + 1 + 60 + 3 * 108
    assert len(mixed.drift) == len(mixed.layer_cosines) == 4
    assert all(cosine > 0.999999 for cosine in mixed.layer_cosines)
    assert sum(count for _, _, count in mixed.histogram) == mixed.tokens
    assert 0 < mixed.max_relative < 1e-4


def test_learned_positions_report_what_is_skipped(learned, photos):
    report = align(learned, images=photos)
    assert report.passed, [case.failures for case in report.cases]
    assert [case.name for case in report.cases][:2] == ["4 × 4 patches, batched", "a clip of 3 frames"]
    assert len(report.skipped) == 1
    assert "4 × 4 patches and nothing else" in report.skipped[0]
    assert all(case.min_pooled_cosine > 0.999 for case in report.cases)
    assert all(0 < case.max_pooled_relative < 1e-4 for case in report.cases)


def test_projection_that_the_reference_lacks_is_reported(goldens, capsys):
    reason = "image_embeds: transformers Aimv2VisionModel ends at pooled and has no projection"
    assert align(goldens / "aimv2-apple-lit").skipped[-1] == reason
    assert main(["align", str(goldens / "aimv2-apple-lit"), "--device", "cpu"]) == 0
    assert f"skipped: {reason}\n" in capsys.readouterr().out


def test_other_dialects_and_composites(tmp_path, goldens):
    original = tiny_original()
    folder = write(tmp_path / "apple", apple(original.state_dict()), flat_config(original))
    report = align(folder)
    assert report.passed
    assert report.weights == "Apple names, converted by nopad to transformers names"
    tiny_composite().save_pretrained(tmp_path / "composite")
    assert align(tmp_path / "composite").passed
    assert align(goldens / "aimv2-apple-lit").passed


def test_half_precision_is_measured_from_float32(native):
    report = align(native, dtype=torch.bfloat16)
    assert report.passed, [case.failures for case in report.cases]
    for case in report.cases:
        assert 0 < case.distance <= 1.1 * case.reference_distance
        assert case.max_relative > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("converted", [False, True])
def test_one_reference_at_a_time_has_the_encoders_own_memory(native, goldens, monkeypatch, converted, dtype):
    """So a float32 model that fits into memory once can be compared."""
    load, loaded, shared = AIMv2Reference.load, [], []

    def noted(self, packed, state, dtype):
        assert not any(model() for model in loaded)
        model = load(self, packed, state, dtype)
        own = {parameter.data_ptr() for parameter in packed.parameters()}
        shared.append(all(parameter.data_ptr() in own for parameter in model.parameters()))
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AIMv2Reference, "load", noted)
    assert align(goldens / "aimv2-apple-lit" if converted else native, dtype=dtype).passed
    assert shared == ([True] if dtype == torch.float32 else [False, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_alone_decides_in_fp8(native, dtype):
    report = align(native, dtype=dtype, precision="fp8", threshold=0.97)
    assert report.precision == "fp8"
    assert report.passed, [case.failures for case in report.cases]
    for case in report.cases:
        assert case.max_relative > 1e-2  # 100 times what float32 may differ
        assert case.layer_cosines[0] > 0.9999 > case.layer_cosines[-1]
        if dtype == torch.bfloat16:
            assert case.distance > 1.1 * case.reference_distance
    strict = align(native, dtype=dtype, precision="fp8", threshold=0.99999)
    assert not any(case.passed for case in strict.cases)
    assert all("minimum cosine" in failure for failure in strict.cases[0].failures)


def test_compiled_path_is_compared(native, learned, quick_compile):
    for folder in (native, learned):
        report = align(folder, compile=True)
        assert report.passed, [case.failures for case in report.cases]
        assert report.execution == "compiled"
        assert report.capacity == 1 << (max(case.tokens for case in report.cases) - 1).bit_length()
        assert all(len(case.layer_cosines) == 4 for case in report.cases)


def test_compiled_path_has_room_for_prefix_tokens_and_frames(goldens, monkeypatch, quick_compile):
    accepts, requested = StaticRunner.accepts, []

    def noted(self, rows, segments):
        requested.append(accepts(self, rows, segments))
        return requested[-1]

    monkeypatch.setattr(StaticRunner, "accepts", noted)
    report = align(goldens / "dinov3-meta", compile=True)
    assert report.passed, [case.failures for case in report.cases]
    assert requested
    assert all(requested)


def test_fault_of_the_compiled_path_alone_is_found(native, monkeypatch):
    class Faulty(EagerLayers):
        execution = "compiled"

        def __call__(self, *arguments):
            return super().__call__(*arguments) + 0.1

    candidates = lambda encoder: iter([(lambda: Faulty(encoder.layers), ())])  # noqa: E731
    monkeypatch.setattr(compile, "_candidates", candidates)
    report = align(native, compile=True)
    assert not any(case.passed for case in report.cases)
    # Per-layer numbers are of the uncompiled layers.
    assert all(max(case.drift) < 1e-4 for case in report.cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alignment_passes_on_a_gpu(native, learned, dtype):
    for folder in (native, learned):
        report = align(folder, device="cuda", dtype=dtype)
        assert report.passed, [case.failures for case in report.cases]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("precision", "threshold"), [(None, 0.99), ("fp8", 0.97)])
def test_compiled_alignment_passes_on_a_gpu(tmp_path, precision, threshold):
    original = tiny_original(patch_size=14, hidden_size=256, intermediate_size=512)  # the kernels' head size: 64
    folder = write(tmp_path / "wide", original.state_dict(), original.config.to_dict())
    settings = {"device": "cuda", "dtype": torch.bfloat16, "compile": True}
    report = align(folder, **settings, precision=precision, threshold=threshold)
    assert report.passed, [case.failures for case in report.cases]
    assert report.execution.startswith(("compiled", "fused by"))


def test_wrong_encoder_fails(native, monkeypatch):
    def swapped(self, hidden_states):
        return self.down(self.activation(self.up(hidden_states)) * self.gate(hidden_states))

    monkeypatch.setattr(GatedMLP, "forward", swapped)
    report = align(native, threshold=0.999)
    assert not report.passed
    assert all(not case.passed for case in report.cases)
    assert any("minimum cosine" in failure for failure in report.cases[0].failures)
    assert any("relative error" in failure for failure in report.cases[0].failures)
    # The drift shows where: nothing before the first layer, much after it.
    assert report.cases[0].drift[0] < 1e-4 < report.cases[0].drift[1]


def spoil_pooling(monkeypatch, share):
    """Noise of that length, relative to the vector, on what images are pooled to."""
    project = AIMv2Packing.pool_segments

    def noisy(self, trunk, segments):
        pooled = project(self, trunk, segments)
        noise = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled)
        return pooled + share * noise * pooled.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)

    monkeypatch.setattr(AIMv2Packing, "pool_segments", noisy)


def test_wrong_pooling_fails_though_its_cosine_passes(learned, monkeypatch, capsys):
    spoil_pooling(monkeypatch, 0.02)
    report = align(learned)
    assert not any(case.passed for case in report.cases)
    for case in report.cases:
        assert case.max_relative < 1e-4
        assert case.min_pooled_cosine > 0.999
    result = f"{report.cases[0].max_pooled_relative:.2e}"
    assert report.cases[0].failures == (f"pooled relative error {result}, expected at most 1e-04",)
    printed = align_table(report)
    assert "pooled relative" in printed
    assert printed.count(f"{report.cases[0].max_pooled_relative:.1e}") >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_is_measured_from_float32_too(learned, monkeypatch, dtype):
    report = align(learned, dtype=dtype)
    assert report.passed, [case.failures for case in report.cases]
    for case in report.cases:
        assert 0 < case.pooled_distance <= 2 * max(case.reference_pooled_distance, case.reference_distance)
    spoil_pooling(monkeypatch, 6 * max(case.reference_distance for case in report.cases))
    report = align(learned, dtype=dtype, threshold=0.5)
    assert not any(case.passed for case in report.cases)
    (failure,) = report.cases[0].failures
    assert re.fullmatch(
        r"pooled distance to float32 \S+, expected at most 2 × \S+, the larger of the reference's own and its tokens'",
        failure,
    )
    assert align(learned, dtype=dtype, precision="fp8", threshold=0.5).passed


def test_slightly_wrong_encoder_fails_in_half_precision(native, monkeypatch):
    forward = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x: forward(self, x) * 1.05)
    report = align(native, dtype=torch.bfloat16, threshold=0.5)
    assert not report.passed
    assert "distance to float32" in report.cases[0].failures[0]


def test_nan_fails(native, monkeypatch):
    forward = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x: forward(self, x) * float("nan"))
    report = align(native)
    assert not any(case.passed for case in report.cases)


def test_exception_is_raised(native, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("kernel")

    monkeypatch.setattr(GatedMLP, "forward", broken)
    with pytest.raises(RuntimeError, match="kernel"):
        align(native)


def test_wrong_arguments(native, tmp_path):
    with pytest.raises(ValueError, match="threshold"):
        align(native, threshold=2)
    with pytest.raises(ValueError, match="device: expected cpu, cuda, cuda:1, …, got 'meta'"):
        align(native, device="meta")
    with pytest.raises(ValueError, match="got none"):
        align(native, images=tmp_path / "native")
    with pytest.raises(ValueError, match="images: expected at least one, got an empty list"):
        align(native, images=[])


@pytest.mark.parametrize(("size", "nearest"), [(0, 14), (-28, 14), (13, 14), (100, 98)])
@pytest.mark.parametrize("noise", [True, False])
def test_image_size_of_no_whole_number_of_patches_raises(native, photos, size, nearest, noise):
    message = f"image_size: expected a multiple of patch_size 14, got {size}; give one, such as {nearest}"
    with pytest.raises(ValueError, match=message):
        align(native, images=photos, image_size=size, noise=noise)


@pytest.mark.parametrize("noise", [True, False])
def test_image_size_that_the_reference_does_not_take_raises(learned, photos, noise):
    message = "image_size: the reference takes 56 × 56 pixels and nothing else, got 70; leave it out"
    with pytest.raises(ValueError, match=message):
        align(learned, images=photos, image_size=70, noise=noise)
    assert align(learned, images=photos, image_size=56, noise=noise).passed


def test_photos_of_a_folder_are_the_images_that_nopad_embed_takes(photos):
    (photos / "0.png").rename(photos / "0.JFIF")
    (photos / "1.png").rename(photos / "1.ppm")
    odd = ("2.HEIC", ".3.png", "a b.jpg", "no.png.txt", "4.png~", "png", "5.", "notes.txt", "6.svg", "._0.JFIF")
    for name in (*odd, "below.png/7.webp", "below.png/._7.webp", ".thumbnails/0.png", "@eaDir/8.jpg", ".nopad/9.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    (photos / "gone.gif").symlink_to("nowhere")
    (photos / "below.png" / "loop").symlink_to(photos)
    listed = [os.fsdecode(item.path) for item in list_inputs([photos]).inputs]
    assert [str(path) for path in photos_in(photos)] == listed
    names = [os.path.relpath(path, photos) for path in listed]
    assert names == [".3.png", "0.JFIF", "1.ppm", "2.HEIC", "2.png", "a b.jpg", "below.png/7.webp", "gone.gif"]


def test_case_of_one_photo_is_singular(native, photos):
    report = align(native, images=[photos / "0.png"], image_size=28, noise=False)
    assert [(case.name, case.tokens) for case in report.cases] == [("1 photo in one pack", 4)]


def test_noise_is_seeded(native):
    first, second = align(native), align(native)
    assert [case.max_abs for case in first.cases] == [case.max_abs for case in second.cases]


def test_command_line(native, photos, tmp_path, capsys):
    page = tmp_path / "deep" / "align.html"
    assert main(["align", str(native), "--images", str(photos), "--device", "cpu", "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "PASSED: " in printed
    assert "all sizes in one pack" in printed
    assert "<html" in page.read_text(encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert main(["align", str(native), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert {case["name"] for case in report["cases"]} >= {"64 images of one patch"}
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line_failure_and_wrong_use(native, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "RELATIVE_LIMIT", 1e-12)
    assert main(["align", str(native), "--device", "cpu"]) == 1
    assert "FAILED: 0 of" in capsys.readouterr().out
    assert main(["align", str(tmp_path / "nothing")]) == 2
    assert "neither a file nor a folder" in capsys.readouterr().err
    assert main(["align", str(native), "--device", "cpu", "--attention", "flash_attention_2"]) == 2
    assert "flash" in capsys.readouterr().err
    assert main(["align", str(native), "--device", "meta"]) == 2
    assert "--device: expected cpu, cuda, cuda:1, …, got 'meta'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["align", str(native), "--device", "cuda"]) == 2
        assert "--device cpu" in capsys.readouterr().err
    assert main(["align", str(native), "--report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    message = f"nopad align: --report: expected a file that can be written, got '{tmp_path}': Is a directory\n"
    assert (printed.out, printed.err) == ("", message)
    with pytest.raises(SystemExit) as exit_status:
        main(["align"])
    assert exit_status.value.code == 2


def test_command_line_in_fp8(native, capsys):
    arguments = ["align", str(native), "--device", "cpu", "--precision", "fp8", "--threshold", "0.97"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "float32, layers in fp8, on cpu, 1 thread" in printed
    assert re.search(r"min cosine after layer +0 +1 +2 +3\n", printed)
    assert re.search(r"64 images of one patch +1\.0000 +0\.9\d{3} +0\.9\d{3} +0\.9\d{3}\n", printed)
    assert "above 0.97; in fp8 the threshold alone decides" in printed
    assert main([*arguments[:-1], "0.9999", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "fp8"
    assert len(report["cases"][0]["layer_cosines"]) == 4


def test_command_line_in_int8(native, capsys):
    arguments = ["align", str(native), "--device", "cpu", "--precision", "int8", "--compile"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "float32, layers in int8, on cpu, 1 thread" in printed
    assert "packed layers int8 by " in printed
    assert "above 0.99; in int8 the threshold alone decides" in printed
    assert main([*arguments, "--threshold", "0.99999"]) == 1


def test_many_layers_are_shown_in_part(native):
    report = align(native)
    cases = tuple(dataclasses.replace(case, layer_cosines=tuple(range(25))) for case in report.cases)
    table = align_table(dataclasses.replace(report, precision="fp8", cases=cases))
    header = next(line for line in table.splitlines() if line.startswith("min cosine after"))
    assert header.split()[4:] == [str(layer) for layer in range(0, 25, 2)]


def test_command_line_compiled(native, capsys, quick_compile):
    assert main(["align", str(native), "--device", "cpu", "--compile"]) == 0
    assert "packed layers compiled, in packs of 1,024 tokens" in capsys.readouterr().out


def test_models_are_listed(capsys):
    assert main(["models", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert models["apple/aimv2-3B-patch14-448"]["hidden_size"] == 3072
    assert models["apple/aimv2-large-patch14-224"]["parameters"] == 309_197_824
    assert main(["models"]) == 0
    assert "309 M" in capsys.readouterr().out


def test_the_list_of_models_is_what_the_families_define():
    described = list(describe_published())
    assert published_models() == described, "run `python -m nopad.families.published`"


def test_models_are_listed_without_torch():
    heavy = ("torch", "transformers", "numpy", "nopad.families")
    code = f"import sys; from nopad.cli import main; main(['models']); print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def run_script(*arguments: str) -> int:
    """The exit status of the script, run in this process, which has torch already."""
    with mock.patch.object(sys, "argv", [str(SCRIPT), *arguments]), pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_script_of_the_specification(native, photos, capsys):
    arguments = ["--ckpt", str(native), "--device", "cpu", "--batch_size", "3", "--image_size", "70"]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"5 × 5 patches, batched +75 ", done.stdout)
    assert "photos" not in done.stdout
    arguments = ["--ckpt", str(native), "--device", "cpu", "--use_real_images", "--image_dir", str(photos)]
    assert run_script(*arguments) == 0
    out = capsys.readouterr().out
    assert "3 photos in one pack" in out
    assert "batched" not in out
    assert run_script(*arguments, "--threshold", "1.0") == 1
    capsys.readouterr()
    run_script(*arguments, "--image_size", "28")
    assert capsys.readouterr().out.count(" 12 ") == 1
    assert run_script("--ckpt", str(native), "--image_dir", str(photos)) == 2
    capsys.readouterr()
    assert run_script(*arguments, "--image_size", "64") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(
        "align_aim_v2_packing.py: image_size: expected a multiple of patch_size 14, got 64; give one, such as 70\n"
    )


@pytest.mark.parametrize("place", [0, 1])
def test_nan_anywhere_fails(place):
    def outputs():
        return [metrics.ModelOutput(torch.ones(2, 4), (torch.ones(2, 4),), torch.ones(4)) for _ in range(2)]

    packed, reference = outputs(), outputs()
    assert metrics.compare("", packed, reference, None, 0.99).passed
    packed[place].pooled[0] = float("nan")
    packed[place].hidden_states[0][0, 0] = float("nan")
    result = metrics.compare("", packed, reference, None, 0.99)
    assert not result.passed
    assert result.max_pooled_relative != result.max_pooled_relative
    assert result.drift[0] != result.drift[0]


def test_models_are_found_by_text_and_family(capsys):
    assert main(["models", "naflex", "--family", "siglip2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "google/siglip2-base-patch16-naflex",
        "google/siglip2-so400m-patch16-naflex",
    ]
    assert main(["models"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert main(["models", "no such model"]) == 2
    assert "no published name contains 'no such model'" in capsys.readouterr().err
    assert main(["models", "--family", "resnet"]) == 2
    assert "--family: expected one of aimv2, dinov2, dinov3" in capsys.readouterr().err


def test_subclass_is_compared_with_its_familys_reference(native):
    class Mine(nopad.AIMv2Packing):
        pass

    assert isinstance(reference_of(Mine.from_pretrained(native)), AIMv2Reference)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nopad {nopad.__version__}\n"


def test_the_worst_image_is_of_the_photos(tmp_path):
    checkpoint = tiny("dinov2", tmp_path)
    photo = Image.fromarray(noise(0, 60, 90))
    report = align(checkpoint, images=[photo, photo.resize((40, 40))])
    assert report.worst is not None
    assert report.worst.case == "2 photos in one pack"
    assert float(report.worst.difference.max()) == pytest.approx(report.cases[-1].max_relative)
    rows, columns = report.worst.difference.shape
    assert report.worst.pixels.shape == (rows * 4, columns * 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1.5}, r"batch_size: expected an integer ≥ 1, got 1\.5"),
        ({"image_size": True}, "image_size: expected an integer ≥ 1, got True"),
        ({"threshold": "0.9"}, r"threshold: expected a number in \[-1, 1\], got '0.9'"),
        ({"threshold": float("nan")}, r"threshold: expected a number in \[-1, 1\], got nan"),
    ],
)
def test_numbers_of_other_types_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        align("nothing", **options)


def test_images_of_more_pixels_than_the_rules_short_side(native, photos):
    encoder = nopad.load(native)
    encoder.preprocessing = dataclasses.replace(encoder.preprocessing, rule="crop", size=28, short_side=42)
    assert photo_case(encoder, [photos / "0.png"], 56)[1][0].shape[1:] == (56, 56)
    assert photo_case(encoder, [photos / "0.png"], 14)[1][0].shape[1:] == (14, 14)
