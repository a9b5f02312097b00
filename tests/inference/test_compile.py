"""`compile`: arguments, warm-up, fallbacks, and how often torch compiles."""

import logging
import threading
from contextlib import contextmanager

import pytest
import torch
from siglip2_checkpoints import folder_of, naflex
from tiny_encoders import GRIDS, patches_of, tiny
from torch._inductor.utils import fresh_cache

import nopad
from nopad.inference import compile, layer_stack
from nopad.inference.compile import can_record
from nopad.inference.fusion import blocked
from nopad.inference.fusion import layers as fused

CAPACITY, MAX_SEGMENTS = 160, 9


@pytest.fixture(params=["aimv2-apple-lit", "siglip2", "dinov3-meta", "onevision-encoder"])
def encoder(request, goldens, tmp_path, quick_compile):
    folder = folder_of(tmp_path, naflex()) if request.param == "siglip2" else goldens / request.param
    return nopad.load(folder)


@torch.no_grad()
def test_compile_warms_up_the_kernels_around_the_layers(encoder, monkeypatch):
    seen = []
    for name in ("pad_rows", "poison_segments"):
        original = getattr(compile, name)
        monkeypatch.setattr(compile, name, lambda *args, name=name, call=original: seen.append(name) or call(*args))
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert seen == ["pad_rows", "poison_segments"]


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=2)
def test_every_encoder_and_capacity_of_a_process_is_compiled(tmp_path, quick_compile):
    torch._dynamo.reset()
    for number in range(3):
        sizes = {"hidden_size": 32 + 8 * number, "num_attention_heads": 2, "num_hidden_layers": 1}
        encoder = nopad.load(tiny("siglip2", tmp_path / str(number), **sizes))
        for capacity in (64, 96):
            encoder.compile(capacity, 4)
            with torch.profiler.profile() as profile:
                encoder(patches_of(encoder, GRIDS[:1]), GRIDS[:1])
            compiled = sum("Torch-Compiled Region" in event.name for event in profile.events())
            assert compiled >= len(encoder.layers)
            assert encoder.execution == "compiled"


@contextmanager
def without_a_compiler(monkeypatch):
    """As with CXX=/nonexistent, and nothing in the cache of compiled code."""
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent",)}), fresh_cache():
        yield


@contextmanager
def beyond_the_recompile_limit(monkeypatch):
    """As after so many graphs of the function that torch makes no more."""
    monkeypatch.setattr(layer_stack, "RECOMPILE_LIMIT", 0)
    yield


UNSUPPORTED = {
    "TORCHDYNAMO_DISABLE": lambda monkeypatch: torch._dynamo.config.patch(disable=True),  # what the variable sets
    "force_eager": lambda monkeypatch: torch.compiler.set_stance("force_eager"),
    "no C++ compiler": without_a_compiler,
    "recompile limit": beyond_the_recompile_limit,
}


@pytest.mark.parametrize("case", UNSUPPORTED)
@torch.no_grad()
def test_nothing_is_compiled_that_torch_runs_as_it_is(goldens, monkeypatch, caplog, case, torch_compiles):
    torch._dynamo.reset()
    encoder = nopad.load(goldens / "aimv2-apple-lit")
    expected = encoder.encode(patches_of(encoder), GRIDS)
    with UNSUPPORTED[case](monkeypatch):
        encoder.compile(CAPACITY, MAX_SEGMENTS)
        assert (encoder.execution, encoder.compiled_capacity) == ("eager", CAPACITY)
        with torch.profiler.profile() as profile:
            output = encoder.encode(patches_of(encoder), GRIDS)
        assert not any("Torch-Compiled Region" in event.name for event in profile.events())
        assert encoder.execution == "eager"
    torch.testing.assert_close(output.tokens, expected.tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("the layers run uncompiled") == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_execution_follows_what_torch_does_after_compile(goldens, quick_compile):
    torch._dynamo.reset()
    encoder = nopad.load(goldens / "aimv2-apple-lit")
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "compiled"
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(encoder(patches_of(encoder), GRIDS), expected, rtol=1e-5, atol=1e-6)
        assert encoder.execution == "eager"
    encoder(patches_of(encoder), GRIDS)
    assert encoder.execution == "compiled"


@pytest.mark.parametrize("error", [None, ImportError, AttributeError], ids=["installed", "missing", "other version"])
def test_imports_of_a_gpu_are_begun_and_their_errors_left_to_compile(monkeypatch, error):
    names, errors = [], []

    def import_module(name):
        names.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compile.importlib, "import_module", import_module)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    compile.start_imports(torch.device("cuda")).join()
    assert (names, errors) == (["nopad.inference.fusion.gemm_quack"], [])


@pytest.mark.parametrize(("device", "capability"), [("cpu", (9, 0)), ("cuda", (8, 0)), ("cuda", (10, 0))])
def test_nothing_is_imported_that_a_device_does_not_use(monkeypatch, device, capability):
    names = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compile.importlib, "import_module", names.append)
    compile.start_imports(torch.device(device)).join()
    assert names == []


def test_wrong_arguments_of_compile_raise(encoder):
    for number in (0, 1.5, True, "3", float("nan")):
        with pytest.raises(ValueError, match=f"max_segments: expected .*≥ 1, got {number!r}"):
            encoder.compile(100, number)
        with pytest.raises(ValueError, match=f"capacity: expected .*≥ {encoder.num_prefix_tokens + 1}, got {number!r}"):
            encoder.compile(number)
    with pytest.raises(ValueError, match="capacity: expected"):
        encoder.compile(encoder.num_prefix_tokens, 1)


@torch.no_grad()
def test_one_compilation_serves_all_layers_and_packs(goldens, torch_compiles):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder = nopad.load(goldens / "onevision-encoder")
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        torch.testing.assert_close(encoder(patches_of(encoder), GRIDS), expected, rtol=1e-4, atol=1e-5)
    encoder(patches_of(encoder, GRIDS[1:]), GRIDS[1:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 8


@torch.no_grad()
def test_layers_run_eagerly_without_a_compiler(goldens, quick_compile, monkeypatch, caplog):
    def broken(function):
        def fail(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("Cannot find a working triton installation.")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    encoder = nopad.load(goldens / "aimv2-apple-native")
    expected = encoder(patches_of(encoder), GRIDS)
    with caplog.at_level(logging.WARNING):
        encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert "the layers run uncompiled: TorchDynamoException: Cannot find a working triton" in caplog.text
    torch.testing.assert_close(encoder(patches_of(encoder), GRIDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "attention", "capacity", "expected"),
    [
        ("cuda", "flash_attention_3", 49152, True),
        ("cuda", "flash_attention_3", 49153, False),
        ("cuda", "sdpa", 512, False),
        ("cuda", "eager", 512, False),
        ("cpu", "sdpa", 512, False),
    ],
)
def test_can_record(device, attention, capacity, expected):
    assert can_record(torch.device(device), attention, capacity) == expected


@pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError, AssertionError])
def test_a_fault_in_the_layers_of_a_cpu_is_raised(monkeypatch, tmp_path, error):
    def fail(*arguments):
        raise error("a fault")

    monkeypatch.setattr(blocked.BlockedLayers, "__init__", fail)
    encoder = nopad.load(tiny("dinov3", tmp_path, num_hidden_layers=1))
    with pytest.raises(error, match="a fault"):
        encoder.compile(CAPACITY, MAX_SEGMENTS)


def test_another_version_of_a_package_is_logged_with_its_traceback(monkeypatch, tmp_path, caplog, quick_compile):
    def fail(*arguments, **options):
        raise AttributeError("no such epilogue")

    monkeypatch.setattr(fused, "unsupported_reason", lambda *arguments: None)
    monkeypatch.setattr(fused, "gemm_backends_for", lambda *arguments: ([fail], None))
    encoder = nopad.load(tiny("dinov3", tmp_path, num_hidden_layers=1))
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert "AttributeError: no such epilogue" in caplog.text
    assert "Traceback" in caplog.text
