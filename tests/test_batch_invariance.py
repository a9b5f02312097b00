"""The check of batch invariance passes where it holds, and sees every way in which it does not."""

import json
import math

import pytest
import torch
from tiny_encoders import DISTINCT, FAMILIES, WIDE, tiny

import nopad
from nopad.align import batch_invariance
from nopad.align.batch_invariance import check_batch_invariance
from nopad.cli import main
from nopad.inference import compile, padding
from nopad.inference.layer_stack import EagerLayers
from nopad.layers.attention import PackedAttention


@pytest.fixture(autouse=True)
def _quick(request):
    if request.node.get_closest_marker("gpu") is None:  # keywords have the names of folders, too
        request.getfixturevalue("quick_compile")
        yield
        torch._dynamo.reset()
    else:
        yield


@pytest.fixture
def folder(tmp_path):
    return tiny("aimv2 with a head", tmp_path / "checkpoint")


def leaking(monkeypatch, leak):
    """Every attention adds what `leak` makes of all rows."""
    torch._dynamo.reset()  # what has been traced is the right forward
    forward = PackedAttention.forward
    monkeypatch.setattr(PackedAttention, "forward", lambda self, rows, *rest: forward(self, rows, *rest) + leak(rows))


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, None) for family in FAMILIES), *((family, "fp8") for family in DISTINCT)]
)
def test_check_passes(tmp_path, family, precision):
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint"), precision=precision)
    report = check_batch_invariance(encoder, capacity=512, packs=2)
    assert report.passed
    assert [(case.name, case.grid) for case in report.cases] == [
        (name, grid) for name in ("compiled", "eager") for grid in ((1, 1, 1), (1, 9, 23), (3, 7, 5))
    ]
    assert all(
        case.packs == case.same == case.same_beside_nan == case.same_beside_infinity == 2 for case in report.cases
    )
    assert (report.capacity, report.precision, report.dtype, report.device) == (
        512,
        precision,
        "float32",
        "cpu, 1 thread",
    )
    assert encoder.compiled_capacity is None


def test_image_is_never_packed_alone(folder):
    encoder = nopad.load(folder)
    generator = torch.Generator().manual_seed(0)
    for capacity, grid in ((128, (1, 1, 1)), (256, (3, 7, 5)), (4096, (1, 9, 23))):
        packs = [batch_invariance._other_images(encoder, grid, capacity, generator) for _ in range(50)]
        numbers = [len(others) for others in packs]
        assert min(numbers) >= 1
        assert max(numbers) <= capacity // 64 - grid[0]
        sizes = [sum(h * w for _, h, w in others) for others in packs]
        assert max(sizes) <= capacity - math.prod(grid)
    assert len(set(numbers)) > 10


def test_leak_between_images_fails(folder, monkeypatch):
    leaking(monkeypatch, lambda rows: 1e-3 * rows.mean(dim=0))
    report = check_batch_invariance(nopad.load(folder), capacity=256, packs=3)
    assert not report.passed
    assert not any(case.passed for case in report.cases)
    assert all(case.same == 0 for case in report.cases)


def test_leak_of_one_execution_fails_it_alone(folder, monkeypatch):
    class Leaking(EagerLayers):
        execution = "compiled"

        def __call__(self, tokens, *rest):
            return super().__call__(tokens, *rest) + 1e-3 * tokens.mean(dim=0)

    candidates = lambda encoder: iter([(lambda: Leaking(encoder.layers), ())])  # noqa: E731
    monkeypatch.setattr(compile, "_candidates", candidates)
    report = check_batch_invariance(nopad.load(folder), capacity=256, packs=3)
    assert not report.passed
    assert {case.name for case in report.cases if not case.passed} == {"compiled"}


def test_leak_of_nan_alone_fails(folder, monkeypatch):
    leaking(monkeypatch, lambda rows: 0.0 * rows.sum())
    encoder = nopad.load(folder)
    assert check_batch_invariance(encoder, capacity=256, packs=2).passed  # static packs keep it from the layers
    unmasked = lambda tokens: (tokens.new_ones(len(tokens), dtype=torch.bool), tokens)  # noqa: E731
    monkeypatch.setattr(padding, "mask_nonfinite_rows", unmasked)
    report = check_batch_invariance(encoder, capacity=256, packs=2)
    assert not report.passed
    assert all((case.same, case.same_beside_nan, case.same_beside_infinity) == (2, 0, 0) for case in report.cases)


def test_eager_layers_are_checked_once_where_nothing_compiles(folder):
    with torch._dynamo.config.patch(disable=True):
        report = check_batch_invariance(nopad.load(folder), capacity=512, packs=1)
    assert report.passed
    assert [(case.name, case.grid) for case in report.cases] == [
        ("eager", grid) for grid in ((1, 1, 1), (1, 9, 23), (3, 7, 5))
    ]


def test_encoder_is_uncompiled_after_an_error(folder, monkeypatch):
    encoder = nopad.load(folder)

    def broken(*arguments):
        raise RuntimeError("kernel")

    monkeypatch.setattr(encoder, "encode", broken)
    with pytest.raises(RuntimeError, match="kernel"):
        check_batch_invariance(encoder, capacity=256, packs=1)
    assert encoder.compiled_capacity is None


def test_wrong_numbers(folder):
    with pytest.raises(ValueError, match="packs: expected ≥ 1, got 0"):
        check_batch_invariance(nopad.load(folder), packs=0)
    with pytest.raises(ValueError, match="capacity: expected at least 128 tokens, got 1"):
        check_batch_invariance(nopad.load(folder), capacity=1)


def test_command_line(folder, capsys):
    arguments = ["align", str(folder), "--batch-invariance", "--device", "cpu", "--capacity", "128"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "packs of 128 tokens\nfloat32 on cpu, 1 thread, attention sdpa\n" in printed
    assert "PASSED: 2 of 2 images have the same features in every pack" in printed
    assert main([*arguments, "--precision", "fp8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["precision"], report["capacity"]) == (True, "fp8", 128)
    assert [case["packs"] for case in report["cases"]] == [20, 20]


def test_command_line_failure(folder, capsys, monkeypatch):
    leaking(monkeypatch, lambda rows: 1e-3 * rows.mean(dim=0))
    assert main(["align", str(folder), "--batch-invariance", "--device", "cpu", "--capacity", "128"]) == 1
    assert "FAILED: 0 of 2 images" in capsys.readouterr().out
    assert main(["align", str(folder), "--batch-invariance", "--device", "cpu", "--capacity", "128", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capacity", "128"], "--capacity: goes with --batch-invariance"),
        (["--batch-invariance", "--images", "."], "not with --batch-invariance"),
        (["--batch-invariance", "--report", "page.html"], "not with --batch-invariance"),
        (["--batch-invariance", "--compile"], "--compile: not with --batch-invariance"),
        (
            ["--batch-invariance", "--threshold", "0.99"],
            "--threshold, --trust-remote-code: not with --batch-invariance",
        ),
        (
            ["--batch-invariance", "--trust-remote-code"],
            "--threshold, --trust-remote-code: not with --batch-invariance",
        ),
        (["--batch-invariance", "--capacity", "1"], "capacity: expected at least 128 tokens, got 1"),
    ],
)
def test_command_line_wrong_use(folder, capsys, arguments, message):
    assert main(["align", str(folder), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_passes_on_a_gpu(tmp_path, family, precision):
    folder = tiny(family, tmp_path / "wide", **WIDE)
    encoder = nopad.load(folder, device="cuda", dtype=torch.bfloat16, precision=precision)
    report = check_batch_invariance(encoder, capacity=1024, packs=5)
    assert report.passed, [case for case in report.cases if not case.passed]
    ready, eager = sorted({case.name for case in report.cases}, key="eager".__eq__)
    assert ready.startswith(("compiled", "fused by"))
    assert eager == "eager"
