"""Runners: static packs equal eager ones and are bit-equal in any pack; packs that are not static run as before."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from siglip2_checkpoints import folder_of, naflex
from tiny_encoders import GRIDS, JUNK, WIDE, is_batch_invariant, patches_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import nopad
from nopad.inference import compile
from nopad.inference.layer_stack import EagerLayers
from nopad.segments import Segments

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CAPACITY, MAX_SEGMENTS = 160, 9
NINE = Segments.of([4, 5], "cpu")


@pytest.fixture(params=["aimv2-apple-lit", "siglip2", "dinov3-meta", "onevision-encoder"])
def encoder(request, goldens, tmp_path, quick_compile):
    folder = folder_of(tmp_path, naflex()) if request.param == "siglip2" else goldens / request.param
    return nopad.load(folder)


@torch.no_grad()
def test_static_features_equal_eager_ones(encoder):
    patches = patches_of(encoder)
    before = encoder.encode(patches, GRIDS)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.compiled_capacity == CAPACITY
    after = encoder.encode(patches, GRIDS)
    assert torch.equal(encoder(patches, GRIDS), after.tokens)
    for name in ("tokens", "pooled", "image_embeds", "prefix_tokens"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-4, atol=1e-5)
    encoder.uncompile()
    assert encoder.compiled_capacity is None
    assert torch.equal(encoder(patches, GRIDS), before.tokens)


@torch.no_grad()
def test_every_gemm_has_the_same_number_of_rows_in_all_packs(encoder, monkeypatch):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    shapes = []
    for grids in (GRIDS, GRIDS[1:2], GRIDS[3:]):
        seen.clear()
        encoder.encode(patches_of(encoder, grids), grids)
        shapes.append(tuple(seen))
    assert len(set(shapes)) == 1
    assert set(seen) <= {CAPACITY, CAPACITY + MAX_SEGMENTS + 1, MAX_SEGMENTS + 1, MAX_SEGMENTS, 1}


@torch.no_grad()
def test_output_of_a_pack_is_not_overwritten_by_the_next(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    memory = torch.empty(CAPACITY, encoder.hidden_size)

    class StaticOutput(EagerLayers):  # as of a CUDA graph
        def __call__(self, tokens, segments, rope):
            return memory.copy_(tokens)

    encoder._runner.stack = StaticOutput(encoder.layers)
    tokens = (torch.full((9, encoder.hidden_size), x) for x in (1.0, 2.0))
    first, second = [encoder._runner.run(encoder.layers, each, NINE, None) for each in tokens]
    assert (first == 1).all()
    assert (second == 2).all()


@torch.no_grad()
def test_batch_invariance(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert all(is_batch_invariant(encoder, added) for added in JUNK)


@torch.no_grad()
def test_packs_over_capacity_are_unchanged(encoder, caplog):
    grids = torch.tensor([[1, 10, 17], [1, 2, 2]])
    many = torch.ones(MAX_SEGMENTS + 1, 3, dtype=torch.int64)
    before = [encoder.encode(patches_of(encoder, grid), grid) for grid in (grids, many)]
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    for grid, expected in zip((grids, many), before, strict=True):
        assert torch.equal(encoder.encode(patches_of(encoder, grid), grid).pooled, expected.pooled)


class Gemms(TorchDispatchMode):
    """The rows of the first matrix of each GEMM."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows.append(args[0 if func is torch.ops.aten.mm.default else 1].shape[0])
        return func(*args, **(kwargs or {}))


TOO_MANY_SEGMENTS = torch.ones(MAX_SEGMENTS + 1, 3, dtype=torch.int64)
TOO_LARGE = torch.tensor([[1, 10, 17], [1, 2, 2]])


@pytest.mark.parametrize("why", ["too many tokens", "too many segments", "hidden states", "gradients"])
def test_gemms_of_packs_that_are_not_static_have_as_many_rows_as_before(encoder, why):
    grids = {"too many tokens": TOO_LARGE, "too many segments": TOO_MANY_SEGMENTS}.get(why, GRIDS)
    patches = patches_of(encoder, grids)

    def run():
        with torch.set_grad_enabled(why == "gradients"), Gemms() as gemms:
            output = encoder.encode(patches, grids, output_hidden_states=why == "hidden states")
        return gemms.rows, output.tokens.detach(), output.pooled.detach()

    before = run()
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    after = run()
    assert before[0] == after[0]
    assert CAPACITY not in after[0]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    with torch.no_grad(), Gemms() as gemms:
        encoder.encode(patches_of(encoder), GRIDS)
    assert gemms.rows.count(CAPACITY) >= 4 * len(encoder.layers)  # static packs are padded


@torch.no_grad()
def test_execution_follows_hooks_and_replaced_layers(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "compiled"
    hook = encoder.layers[0].register_forward_hook(lambda *arguments: None)
    assert encoder.execution == "eager"
    hook.remove()
    assert encoder.execution == "compiled"
    encoder.layers = encoder.layers[:1]
    assert encoder.execution == "eager"
    encoder.uncompile()
    assert encoder.execution == "eager"


def test_training_and_hidden_states_run_eagerly(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    patches = patches_of(encoder)
    encoder(patches, GRIDS).sum().backward()
    assert encoder.embeddings.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        hidden_states = encoder.encode(patches, GRIDS, output_hidden_states=True).hidden_states
    assert len(hidden_states) == encoder.config.num_hidden_layers + 1


@torch.no_grad()
def test_replaced_layers_run(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    whole = encoder(patches_of(encoder), GRIDS)
    encoder.layers = encoder.layers[:1]
    output = encoder(patches_of(encoder), GRIDS)
    assert not torch.equal(output, whole)
    encoder.uncompile()
    torch.testing.assert_close(output, encoder(patches_of(encoder), GRIDS))


@torch.no_grad()
def test_moved_weights_are_not_read_at_their_old_address(encoder):
    class OldWeights(EagerLayers):  # like a recorded graph after the weights have moved
        fixed_memory = True

        def __call__(self, tokens, *rest):
            return torch.zeros_like(tokens)

    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    expected = encoder(patches_of(encoder), GRIDS)
    encoder._runner.stack = OldWeights(encoder.layers)
    assert not torch.equal(encoder(patches_of(encoder), GRIDS), expected)
    weight = encoder.layers[0].mlp.down.weight
    weight.data = weight.data.clone()
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)


@torch.no_grad()
def test_changed_weights_are_used(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    encoder.layers[0].mlp.down.weight.zero_()
    changed = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    torch.testing.assert_close(changed, encoder(patches_of(encoder), GRIDS), rtol=1e-4, atol=1e-5)


def pickled(encoder):
    return pickle.loads(pickle.dumps(encoder))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda encoder: pickled(copy.deepcopy(encoder))])
def test_copies_are_compiled_for_the_same_packs(encoder, copied, compiled):
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=compiled)
    expected = encoder(patches_of(encoder), GRIDS)
    twin = copied(encoder)
    assert (twin.compiled_capacity, twin.compiled_max_segments) == (CAPACITY, MAX_SEGMENTS)
    assert torch.equal(twin(patches_of(encoder), GRIDS), expected)
    assert twin.execution == encoder.execution == ("compiled" if compiled else "eager")
    twin.layers[0].mlp.down.weight.zero_()
    assert not torch.equal(twin(patches_of(encoder), GRIDS), expected)
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)
    twin.uncompile()
    assert (twin.compiled_capacity, twin.execution) == (None, "eager")


@torch.no_grad()
def test_a_copy_is_compiled_once_and_not_for_packs_that_run_eagerly(encoder, monkeypatch):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    calls, make = [], compile.compile_layers
    monkeypatch.setattr(compile, "compile_layers", lambda *arguments: calls.append(arguments) or make(*arguments))
    twin = copy.deepcopy(encoder)
    with torch.enable_grad():
        twin(patches_of(encoder), GRIDS)
    twin(patches_of(encoder, GRIDS.repeat(3, 1)), GRIDS.repeat(3, 1))  # more segments than it is compiled for
    assert not calls

    @torch.no_grad()
    def tokens(_):
        return twin(patches_of(encoder), GRIDS)

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(tokens, range(4)))
    assert len(calls) == 1
    assert all(torch.equal(each, encoder(patches_of(encoder), GRIDS)) for each in outputs)


@torch.no_grad()
def test_saved_encoders_are_not_compiled(encoder, tmp_path):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    encoder.save_pretrained(tmp_path / "saved")
    loaded = nopad.load(tmp_path / "saved")
    assert loaded.compiled_capacity is None
    encoder.uncompile()
    assert torch.equal(loaded(patches_of(encoder), GRIDS), encoder(patches_of(encoder), GRIDS))


@torch.no_grad()
def test_moving_and_casting_undo_compile(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert (encoder.compiled_capacity, encoder.compiled_max_segments) == (CAPACITY, MAX_SEGMENTS)
    encoder.to(torch.float64)
    assert (encoder.compiled_capacity, encoder.compiled_max_segments) == (None, None)


@torch.no_grad()
def test_embed_makes_packs_that_fit(encoder, caplog):
    encoder.compile(2000, 3)
    images = [torch.randint(0, 255, (3, 60, 60), dtype=torch.uint8) for _ in range(8)]
    ran = []
    run = encoder._runner.run
    encoder._runner.run = lambda *arguments: ran.append(len(arguments[2])) or run(*arguments)
    assert len(encoder.embed(images)) == 8
    assert sum(ran) == 8
    assert max(ran) <= 3
    assert "exceeds the compiled capacity" not in caplog.text


@torch.no_grad()
def test_layers_never_get_nonfinite_rows(encoder):
    # Kernels that read whole tiles of keys would spread NaN. No CPU kernel does, so the layers' input is checked.
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    seen = []

    class Checking(EagerLayers):
        def __call__(self, tokens, *rest):
            seen.append(tokens.isfinite().all().item())
            return super().__call__(tokens, *rest)

    encoder._runner.stack = Checking(encoder.layers)
    patches = patches_of(encoder)
    patches[3] = float("inf")
    encoder(patches, GRIDS)
    assert seen == [True]


@torch.no_grad()
def test_embed_counts_prefix_tokens(encoder, caplog):
    images = [torch.randint(0, 255, (3, 60, 60), dtype=torch.uint8) for _ in range(4)]
    patches = len(encoder.pack(images[:1]).hidden_states)
    # The patches of two images, but not always their prefix tokens.
    encoder.compile(2 * patches + encoder.num_prefix_tokens, 8)
    ran = []
    run = encoder._runner.run
    encoder._runner.run = lambda *arguments: ran.append(len(arguments[2])) or run(*arguments)
    encoder.embed(images)
    assert ran == ([1] * 4 if encoder.num_prefix_tokens else [2] * 2)


@torch.no_grad()
def test_nonfinite_patches_poison_their_own_image_only(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    patches = patches_of(encoder)
    before = encoder.encode(patches, GRIDS)
    patches[3] = float("nan")
    after = encoder.encode(patches, GRIDS)
    assert after.tokens[:20].isnan().all()
    assert after.pooled[0].isnan().all()
    assert torch.equal(after.tokens[20:], before.tokens[20:])
    assert torch.equal(after.pooled[1:], before.pooled[1:])


def test_threads_share_a_compiled_encoder(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    packs = [(patches_of(encoder, grids), grids) for grids in (GRIDS, GRIDS[1:2], GRIDS[3:], GRIDS[:2])]
    with torch.inference_mode():
        expected = [encoder.encode(*pack) for pack in packs]

        def run(number):
            with torch.inference_mode():
                return [encoder.encode(*packs[(number + step) % len(packs)]) for step in range(30)]

        with ThreadPoolExecutor(len(packs)) as pool:
            results = list(pool.map(run, range(len(packs))))
    for number, outputs in enumerate(results):
        for step, output in enumerate(outputs):
            alone = expected[(number + step) % len(packs)]
            assert torch.equal(output.tokens, alone.tokens)
            assert torch.equal(output.pooled, alone.pooled)


def test_hook_may_call_the_encoder_again(encoder):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    patches = patches_of(encoder)
    inner = []

    def again(module, arguments, output):
        handle.remove()
        inner.append(encoder(patches, GRIDS))

    with torch.inference_mode():
        expected = encoder(patches, GRIDS)
        handle = encoder.layers[0].register_forward_hook(again)
        assert torch.equal(encoder(patches, GRIDS), expected)
    assert torch.equal(inner[0], expected)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_threads_with_their_own_streams_share_recorded_layers(tmp_path, precision):
    encoder = nopad.load(tiny("dinov3", tmp_path, **WIDE), device="cuda", dtype=torch.bfloat16, precision=precision)
    encoder.compile(CAPACITY + 100, MAX_SEGMENTS)
    packs = [(patches_of(encoder, grids), grids) for grids in (GRIDS, GRIDS[1:2], GRIDS[3:], GRIDS[:2])]
    with torch.inference_mode():
        expected = [encoder(*pack) for pack in packs]
    torch.cuda.synchronize()

    def run(number):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            outputs = [encoder(*packs[(number + step) % len(packs)]) for step in range(30)]
            torch.cuda.current_stream().synchronize()
        return outputs

    with ThreadPoolExecutor(len(packs)) as pool:
        results = list(pool.map(run, range(len(packs))))
    for number, outputs in enumerate(results):
        for step, output in enumerate(outputs):
            assert torch.equal(output, expected[(number + step) % len(packs)])


def test_every_encoder_warns_of_gradients_and_of_large_packs_once(tmp_path, caplog, quick_compile):
    for number in (1, 2):
        encoder = nopad.load(tiny("dinov3", tmp_path / str(number), num_hidden_layers=1))
        encoder.compile(8, 1)
        for _ in range(2):
            encoder(patches_of(encoder), GRIDS)
            with torch.no_grad():
                encoder(patches_of(encoder), GRIDS)
        assert caplog.text.count("compiled layers run without gradients alone") == number
        assert caplog.text.count("exceeds the compiled capacity of 8 tokens") == number
