"""Fused layers: the plain ones' features, their weights left alone, folded anew when they change."""

import contextlib
import dataclasses
from importlib import util

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, GRIDS, WIDE, is_batch_invariant, patches_of, relative, tiny
from torch import nn
from transformers.activations import ACT2FN

import nopad
from nopad.inference import compile
from nopad.inference.cuda_graphs import Graphs
from nopad.inference.float8 import FLOAT8, quantize_rows
from nopad.inference.fusion import layers as fused
from nopad.inference.fusion.folding import FoldedBlock, Matrix
from nopad.inference.fusion.gemm_reference import SMALL, PlainProducts, centre, factor, to_dtype
from nopad.inference.fusion.layers import FusedLayers, channel_order, obstacle, products_for, turn_of
from nopad.inference.ready import PlainLayers
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.layers.rope_3d import apply_rotary_interleaved
from nopad.segments import Segments

CAPACITY, SLOTS = 160, 9
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return tiny(request.param, tmp_path / "checkpoint")


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"))


@pytest.fixture
def plain_products(monkeypatch):
    """Fuses on a CPU, in any dtype."""
    monkeypatch.setattr(fused, "obstacle", lambda *arguments: None)
    monkeypatch.setattr(fused, "products_for", lambda *arguments: ([PlainProducts], None))


def tokens_of(encoder, *lengths):
    return torch.randn(sum(lengths), encoder.hidden_size).to(encoder.dtype), Segments.of(lengths, "cpu")


def expected_of(encoder, tokens, segments, rotation=None):
    """What the layers give, less the means that LayerNorms make fused ones drop."""
    output = PlainLayers(encoder.layers)(tokens, segments, rotation).float()
    return centre(output) if isinstance(encoder.layers[0].norm1, nn.LayerNorm) else output


@torch.no_grad()
def test_features_are_those_of_the_layers(folder):
    encoder = nopad.load(folder)
    tokens, segments = tokens_of(encoder, 20, 9, 37)
    rotation = encoder.example_rope(len(tokens))
    found = FusedLayers(encoder.layers, PlainProducts(), rotation)(tokens, segments, rotation)
    assert relative(found, expected_of(encoder, tokens, segments, rotation)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["aimv2", "dinov3"])
def test_in_half_precision_they_are_as_close_to_float32_as_the_layers(tmp_path, family):
    encoder = nopad.load(tiny(family, tmp_path / "wide", **WIDE))
    tokens, segments = tokens_of(encoder, *[64] * 16)
    rotation = encoder.example_rope(len(tokens))
    exact = expected_of(encoder, tokens, segments, rotation)
    layers, tokens = encoder.to(BF16).layers, tokens.to(BF16)
    own = relative(expected_of(encoder, tokens, segments, rotation), exact)
    assert own > 1e-3
    assert relative(FusedLayers(layers, PlainProducts(), rotation)(tokens, segments, rotation), exact) <= 1.1 * own


@torch.no_grad()
def test_tokens_that_autocast_left_in_float32_are_taken_in_the_layers_dtype(encoder, plain_products):
    encoder.to(BF16).compile(CAPACITY, SLOTS)
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.embeddings.register_forward_hook(lambda module, arguments, output: output.float())
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)


@torch.no_grad()
def test_in_float8_they_are_as_close_as_the_layers(tmp_path):
    folder = tiny("aimv2", tmp_path / "wide", **WIDE)
    plain, encoder = nopad.load(folder), nopad.load(folder, precision="fp8")
    tokens, segments = tokens_of(encoder, *[64] * 16)
    exact = expected_of(plain, tokens, segments)
    own = relative(expected_of(encoder, tokens, segments), exact)
    assert own > 1e-2
    assert relative(FusedLayers(encoder.layers, PlainProducts())(tokens, segments, None), exact) <= 1.1 * own


@torch.no_grad()
def test_four_products_make_a_layer(encoder):
    seen = []

    class Noted(PlainProducts):
        def qkv(self, stream, block, table):
            seen.append(("qkv", stream.operand.shape, block.qkv.weight.shape))
            return super().qkv(stream, block, table)

        def up(self, stream, block):
            seen.append(("up", stream.operand.shape, block.up.weight.shape))
            return super().up(stream, block)

        def added(self, states, matrix, stream, block):
            seen.append(("added", states.shape, matrix.weight.shape))
            return super().added(states, matrix, stream, block)

    FusedLayers(encoder.layers, Noted())(*tokens_of(encoder, 5, 4), None)
    layer = [
        ("qkv", (9, 32), (96, 32)),
        ("added", (9, 32), (32, 32)),
        ("up", (9, 32), (96, 32)),
        ("added", (9, 48), (32, 48)),
    ]
    assert seen == 3 * layer


def block_of(**matrices):
    """A block of one head with given matrices."""
    empty = Matrix(torch.empty(0, 0))
    parts = {"qkv": empty, "proj": empty, "up": empty, "down": empty, **matrices}
    return FoldedBlock(**parts, activation="silu", gated=True, eps=0.0, num_heads=1, centred=False)


@torch.no_grad()
def test_plain_products_are_what_they_are_said_to_be():
    products, tokens = PlainProducts(), torch.tensor([[1.0, 7.0]])  # a root mean square of 5
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
    block = block_of(qkv=Matrix(weight, torch.tensor([0.0, 1.0, 0.0])), up=Matrix(weight[:2]))
    stream = products.begin(tokens, block)
    torch.testing.assert_close(factor(stream, block), torch.tensor([[0.2]]))
    qkv = torch.cat(products.qkv(stream, block, None))
    torch.testing.assert_close(qkv, torch.tensor([0.4, 5.2, 1.0]).view(3, 1, 1))
    torch.testing.assert_close(products.up(stream, block), F.silu(torch.tensor([[0.4]])) * 4.2)
    stream = products.added(tokens, Matrix(weight[:2], torch.tensor([1.0, 0.0])), stream, block)
    assert products.end(stream).tolist() == [[4.0, 28.0]]
    torch.testing.assert_close(factor(stream, block), torch.tensor([[400.0]]).rsqrt())


def test_pairs_of_gates_and_ups_change_places_together():
    rows = torch.arange(12.0)  # gate 0, up 0, gate 1, …
    block = block_of(up=Matrix(rows[:, None], bias=10 * rows, scale=100 * rows)).with_pairs([2, 0, 1])
    expected = torch.tensor([4.0, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9])
    assert torch.equal(block.up.weight[:, 0], expected)
    assert torch.equal(block.up.bias, 10 * expected)
    assert torch.equal(block.up.scale, 100 * expected)


class Mistaken(PlainProducts):
    """Takes ups for gates."""

    name = "somebody who takes ups for gates"

    def prepared(self, block):
        return dataclasses.replace(block, up=block.up[torch.arange(len(block.up.weight)).view(-1, 2).flip(1).flatten()])


class Undefined(PlainProducts):
    """Gives NaN."""

    name = "somebody who gives NaN"

    def end(self, stream):
        return stream.tokens * float("nan")


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("wrong", [Mistaken, Undefined])
def test_fused_layers_that_give_something_else_are_not_taken(tmp_path, monkeypatch, caplog, precision, wrong):
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **WIDE), precision=precision)

    def makers(encoder):
        yield from (lambda who=who: FusedLayers(encoder.layers, who()) for who in (wrong, PlainProducts))

    monkeypatch.setattr(compile, "_makers", makers)
    encoder.compile(512)
    assert encoder.execution == "fused by plain torch"
    (told,) = caplog.messages
    assert f"layers fused by {wrong.name} give something else than the layers as they are" in told


@torch.no_grad()
def test_the_check_sees_no_difference_where_there_is_none(folder, monkeypatch):
    monkeypatch.setattr(fused, "FAR", 1e-3)
    encoder = nopad.load(folder)
    rotation = encoder.example_rope(30)
    tokens, segments = tokens_of(encoder, 17, 13)
    FusedLayers(encoder.layers, PlainProducts(), rotation).check(tokens, segments, rotation)


@torch.no_grad()
def test_layers_that_are_not_finite_themselves_say_nothing_of_fused_ones(encoder, plain_products):
    encoder.layers[0].attention.proj.weight[0, 0] = float("inf")
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution == "fused by plain torch"


@torch.no_grad()
def test_rows_may_grow_eighty_times_in_one_step(tmp_path):
    weight, scale = quantize_rows(torch.randn(4, 16))
    products, block = PlainProducts(), block_of(down=Matrix(weight, scale=scale[:, 0]))
    tokens = torch.randn(3, 16)
    tokens[0] = 0.0
    tokens[0, 3] = 1.0  # all of a row's length in one number
    stream = products.added(80 * tokens, Matrix(torch.eye(16)), products.begin(tokens, block), block)
    torch.testing.assert_close(
        stream.operand.float() * factor(stream, block), F.rms_norm(stream.tokens, (16,)), rtol=0.07, atol=0.02
    )
    far = products.added(1e5 * tokens, Matrix(torch.eye(16)), products.begin(tokens, block), block)
    assert far.operand.float().abs().max() == 448


def test_what_is_too_large_for_float8_becomes_its_largest():
    values = torch.tensor([1e6, -500.0, 3.0])
    assert to_dtype(values, FLOAT8).float().tolist() == [448, -448, 3]
    assert to_dtype(values, BF16).float()[1] == -500


@torch.no_grad()
def test_rows_in_float8_are_scaled_by_what_the_row_before_was():
    weight, scale = quantize_rows(torch.randn(4, 16))
    block = block_of(down=Matrix(weight, scale=scale[:, 0]))
    products, tokens = PlainProducts(), torch.randn(3, 16)
    first = products.begin(tokens, block)
    states = 5 * torch.randn(3, 16)
    second = products.added(states, Matrix(torch.eye(16)), first, block)
    torch.testing.assert_close(second.tokens, tokens + states)
    third = products.added(7 * torch.randn(3, 16), Matrix(torch.eye(16)), second, block)
    # The first rows are scaled by themselves, all others by those before them.
    for stream, scaled_by in ((first, first), (second, first), (third, second)):
        rms = scaled_by.tokens.square().mean(dim=1, keepdim=True).sqrt()
        assert stream.operand.dtype == FLOAT8
        torch.testing.assert_close(stream.operand.float(), stream.tokens * (SMALL / rms), rtol=0.07, atol=0.002)
        # Whatever they were scaled with, the factor makes them rows of a root mean square of one.
        normed = F.rms_norm(stream.tokens, (16,))
        torch.testing.assert_close(stream.operand.float() * factor(stream, block), normed, rtol=0.07, atol=0.02)
        # A matrix that is not float8 reads the tokens, one that is the small rows.
        read = stream.read_by(Matrix(torch.eye(16)))
        assert read.operand is stream.tokens
        torch.testing.assert_close(read.operand * factor(read, block), normed)
        assert stream.read_by(block.down) is stream


@torch.no_grad()
def test_in_float8_a_matrix_that_is_not_reads_the_tokens():
    weight, scale = quantize_rows(torch.eye(16).repeat(3, 1))
    small = Matrix(weight, scale=scale[:, 0])
    query_key, down = (Matrix(weight[:rows], scale=scale[:rows, 0]) for rows in (32, 16))
    block = block_of(qkv=query_key, value=Matrix(torch.eye(16)), up=small, down=down)
    products, tokens = PlainProducts(), torch.randn(3, 16)
    stream, normed = products.begin(tokens, block), F.rms_norm(tokens, (16,))
    query, key, value = (part.flatten(1) for part in products.qkv(stream, block, None))
    torch.testing.assert_close(value, normed, rtol=1e-4, atol=1e-5)
    assert torch.equal(query, key)
    assert 1e-3 < relative(query, normed) < 5e-2
    assert products.up(stream, block).dtype == block.up.weight.dtype == FLOAT8


@torch.no_grad()
def test_in_float8_weights_that_change_in_place_are_folded_anew(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp8")
    layers, (tokens, segments) = FusedLayers(encoder.layers, PlainProducts()), tokens_of(encoder, 9, 4)
    before = layers(tokens, segments, None)
    encoder.layers[0].mlp.gate_up.scale.mul_(3)
    assert layers.refresh()
    after = layers(tokens, segments, None)
    assert relative(after, before) > 0.1
    assert relative(after, FusedLayers(encoder.layers, PlainProducts())(tokens, segments, None)) == 0


@torch.no_grad()
@pytest.mark.parametrize("turn", [apply_rotary, apply_rotary_interleaved])
def test_channels_turned_side_by_side_are_the_same_turned(turn):
    states, size = torch.randn(5, 2, 8), 8 if turn is apply_rotary_interleaved else 4
    rotation = Rope(turn, torch.randn(5, 1, size), torch.randn(5, 1, size))
    order = channel_order(rotation, 8)
    order = torch.arange(8) if order is None else order
    expected = rotation(states)[..., order]
    side_by_side = turn_of(rotation)
    found = apply_rotary_interleaved(states[:, :, order], side_by_side.cos[:, None], side_by_side.sin[:, None])
    torch.testing.assert_close(found, expected)
    assert side_by_side.shared == (turn is apply_rotary)


def test_positions_that_keep_to_their_grid_are_made_on_it_beforehand(tmp_path, plain_products, monkeypatch):
    encoder = nopad.load(tiny("siglip", tmp_path / "siglip"), positions="strict")
    asked, table = [], encoder.embeddings.position_embedding
    table.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[0]))
    encoder.compile(CAPACITY, SLOTS)  # on another grid they are refused
    assert encoder.execution == "fused by plain torch"
    assert {layout.grid for layout in asked} == {((1, *table.grid),)}


def test_obstacles(folder, monkeypatch):
    encoder = nopad.load(folder)
    assert obstacle(encoder, CUDA, BF16) is None
    reason = obstacle(encoder, torch.device("cpu"), BF16)
    assert reason == "fused layers are for bfloat16 or float16 on a GPU, not for torch.bfloat16 on cpu"
    assert "not for torch.float32 on cuda" in obstacle(encoder, CUDA, torch.float32)
    encoder.layers[1].norm1.eps = encoder.layers[1].norm2.eps = 0.5
    assert "whose norms are alike" in obstacle(encoder, CUDA, BF16)
    encoder.layers[1].norm1.eps = 0.25
    assert "only blocks" in obstacle(encoder, CUDA, BF16)


def test_inference_mode_leaves_nothing_behind_that_cannot_be_written(encoder, plain_products):
    with torch.inference_mode():
        encoder.compile(CAPACITY, SLOTS)
    with torch.no_grad():
        encoder.layers[0].norm1.weight.mul_(2.0)
        found = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_without_a_last_norm_the_mean_of_a_row_is_not_dropped(tmp_path):
    encoder = nopad.load(tiny("onevision", tmp_path / "headless", use_head=False))
    assert encoder.norm is None
    assert "without a LayerNorm behind the layers" in obstacle(encoder, CUDA, BF16)


@pytest.mark.parametrize(
    ("capability", "triton", "quack", "precision", "makers", "reason"),
    [
        ((9, 0), True, True, None, ["_quack_products", "_torch_products"], None),
        ((9, 0), True, True, "fp8", ["_quack_products"], None),
        ((9, 0), True, False, None, ["_torch_products"], "quack is not installed: pip install 'nopad[hopper]'"),
        ((9, 0), True, False, "fp8", [], "quack is not installed: pip install 'nopad[hopper]'"),
        ((9, 0), False, True, None, [], "Triton is not installed or does not work"),
        (
            (8, 0),
            True,
            True,
            None,
            ["_torch_products"],
            "the products of quack are for bfloat16 on a Hopper GPU, not for torch.bfloat16 on cuda",
        ),
    ],
)
def test_who_multiplies(encoder, monkeypatch, capability, triton, quack, precision, makers, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused, "triton_works", lambda: triton)
    monkeypatch.setattr(util, "find_spec", lambda name: name if quack else None)
    if precision is not None:
        encoder.to_precision(precision)
    found, why_not_faster = products_for(encoder, CUDA, BF16)
    assert [make.__name__ for make in found] == makers
    assert why_not_faster == reason


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, TypeError, ImportError, KeyError])
def test_where_the_fastest_products_do_not_work_the_next_are_taken(encoder, plain_products, monkeypatch, caplog, error):
    def broken():
        raise error("of another version")

    monkeypatch.setattr(fused, "products_for", lambda *arguments: ([broken, PlainProducts], None))
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution == "fused by plain torch"
    assert "in another way than the fastest" in caplog.text
    assert "of another version" in caplog.text


@torch.no_grad()
def test_changed_weights_are_folded_once_into_the_same_tensors(encoder, monkeypatch):
    layers = FusedLayers(encoder.layers, PlainProducts())
    places = [matrix.weight.data_ptr() for block in layers.blocks for matrix in block.matrices]
    of, again = FoldedBlock.of, []
    monkeypatch.setattr(FoldedBlock, "of", lambda layer, channels: again.append(layer) or of(layer, channels))
    layers.refresh()
    assert again == []
    encoder.layers[1].norm1.weight.mul_(3.0)
    encoder.layers[2].mlp.down.weight.mul_(-1.0)
    for _ in range(3):
        layers.refresh()
    assert again == list(encoder.layers)
    assert [matrix.weight.data_ptr() for block in layers.blocks for matrix in block.matrices] == places
    tokens, segments = tokens_of(encoder, 20, 1)
    assert relative(layers(tokens, segments, None), expected_of(encoder, tokens, segments)) < 1e-5


@torch.no_grad()
def test_static_packs_run_fused_layers(folder, plain_products):
    encoder = nopad.load(folder)
    expected = encoder.encode(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution == "fused by plain torch"
    found = encoder.encode(patches_of(encoder), GRIDS)
    assert relative(found.tokens, expected.tokens) < 1e-5
    assert not torch.equal(found.tokens, expected.tokens)
    assert relative(found.pooled, expected.pooled) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("junk", [0.0, float("nan"), float("inf")])
def test_batch_invariance(tmp_path, plain_products, precision, junk):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision=precision)
    encoder.compile(CAPACITY, SLOTS)
    assert is_batch_invariant(encoder, junk)


@torch.no_grad()
def test_weights_may_change_where_graphs_have_been_recorded(encoder, plain_products, monkeypatch):
    monkeypatch.setattr(Graphs, "__call__", lambda self, *arguments: self.layers(*arguments))
    monkeypatch.setattr(Graphs, "exclusive", lambda self: contextlib.nullcontext())
    encoder.compile(CAPACITY, SLOTS)
    encoder._runner.layers = Graphs(encoder._runner.layers)
    assert not encoder._runner.layers.fixed_memory  # what was folded is folded anew into the same memory
    assert Graphs(PlainLayers(encoder.layers)).fixed_memory
    assert encoder.execution == "fused by plain torch"
    encoder.layers[0].norm2.weight.mul_(2.0)
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_training_that_counts_no_version_up_is_seen(encoder, plain_products):
    encoder.compile(CAPACITY, SLOTS)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    encoder(patches_of(encoder), GRIDS).sum().backward()
    optimizer.step()
    with torch.no_grad():
        found = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp, "down", nn.Linear(48, 32)),
        lambda layer: setattr(layer.mlp.down, "bias", nn.Parameter(torch.ones(32))),
        lambda layer: setattr(layer.mlp, "activation", ACT2FN["gelu"]),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm(32)),
    ],
)
def test_other_parts_are_seen(encoder, plain_products, change):
    encoder.compile(CAPACITY, SLOTS)
    change(encoder.layers[1])
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: setattr(encoder, "layers", encoder.layers[:1]),
        lambda encoder: setattr(encoder.layers[1].mlp, "forward", torch.zeros_like),
    ],
)
def test_other_layers_and_forwards_are_seen(encoder, plain_products, change):
    encoder.compile(CAPACITY, SLOTS)
    change(encoder)
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
def test_what_drops_out_in_training_runs_as_it_is(tmp_path, plain_products):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2", attention_dropout=0.5))
    encoder.compile(CAPACITY, SLOTS)
    patches = patches_of(encoder)
    assert torch.equal(encoder(patches, GRIDS), encoder(patches, GRIDS))
    encoder.train()
    assert not torch.equal(encoder(patches, GRIDS), encoder(patches, GRIDS))


@torch.no_grad()
def test_hooks_of_all_modules_are_called(encoder, plain_products):
    encoder.compile(CAPACITY, SLOTS)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        encoder(patches_of(encoder), GRIDS)
    finally:
        hook.remove()
    assert encoder.layers[1].mlp in seen


@torch.no_grad()
def test_weights_that_nobody_counts_the_versions_of(tmp_path, plain_products):
    with torch.inference_mode():
        encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
        encoder.to(torch.bfloat16)
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution == "fused by plain torch"
    assert encoder(patches_of(encoder), GRIDS).isfinite().all()


@torch.no_grad()
def test_another_layer_is_seen(encoder, plain_products):
    encoder.compile(CAPACITY, SLOTS)
    encoder.layers[0] = encoder.layers[2]
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
def test_compiling_shows_hooks_nothing(encoder, plain_products):
    seen = []
    encoder.layers[0].mlp.register_forward_hook(lambda *arguments: seen.append(arguments))
    encoder.compile(CAPACITY, SLOTS)
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_in_layers_are_called(encoder, plain_products, register):
    encoder.compile(CAPACITY, SLOTS)
    seen = []
    hook = getattr(encoder.layers[1].mlp, register)(lambda module, arguments, *output: seen.append(arguments[0]))
    encoder(patches_of(encoder), GRIDS)
    assert [len(tokens) for tokens in seen] == [CAPACITY]
    hook.remove()
    encoder(patches_of(encoder), GRIDS)
    assert len(seen) == 1


@torch.no_grad()
def test_parts_that_cannot_be_folded_any_more_run_as_they_are(encoder, plain_products):
    encoder.compile(CAPACITY, SLOTS)

    class Doubled(nn.Module):
        """As LoRA's layers: not a linear map, with the weight of one."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, None
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, input):
            return self.factor * self.linear(input)

    encoder.layers[1].mlp.down = Doubled(encoder.layers[1].mlp.down)
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_folding_leaves_what_is_saved_and_trained_alone(encoder, plain_products, tmp_path):
    encoder.save_pretrained(tmp_path / "before")
    encoder.compile(CAPACITY, SLOTS)
    with torch.no_grad():
        encoder(patches_of(encoder), GRIDS)
    encoder.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    encoder(patches_of(encoder), GRIDS).sum().backward()
    assert encoder.layers[0].norm1.weight.grad.abs().sum() > 0
