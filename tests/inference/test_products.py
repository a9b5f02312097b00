"""On a GPU (`-m gpu`): the products of quack and of torch beside the plain ones, fused encoders beside the layers."""

import dataclasses
from importlib import util

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import FAMILIES, GRIDS, WIDE, patches_of, relative, tiny

import nopad
from nopad.inference.compile import GRAPH_CAPACITY
from nopad.inference.float8 import FLOAT8, quantize_rows
from nopad.inference.fusion.folding import FoldedBlock, Matrix
from nopad.inference.fusion.gemm_reference import PlainProducts, Turn
from nopad.segments import Segments

BF16 = torch.bfloat16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HAS_QUACK = (
    util.find_spec("quack") is not None
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability()[0] == 9  # a condition is evaluated without a GPU, too
)
NEEDS_QUACK = pytest.mark.skipif(not HAS_QUACK, reason="needs quack on a Hopper GPU: pip install 'nopad[hopper]'")


def products_named(name):
    if name == "quack":
        from nopad.inference.fusion.gemm_quack import QuackProducts

        return QuackProducts()
    from nopad.inference.fusion.gemm_torch import TorchProducts

    return TorchProducts()


def draw(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def wide_block(*, gated, biased, activation, size=256, inner=384, heads=4):
    def matrix(rows, columns):
        bias = torch.randn(rows, device="cuda") if biased else None
        return Matrix(draw(rows, columns) * columns**-0.5, bias)

    up = matrix(2 * inner if gated else inner, size)
    matrices = matrix(3 * size, size), matrix(size, size), up, matrix(size, inner)
    return FoldedBlock(*matrices, activation=activation, gated=gated, eps=1e-5, num_heads=heads, centred=biased)


def steps(products, block, tokens, turn):
    """Every result of a block whose attention is left out."""
    block = products.prepared(block)
    stream = products.begin(tokens.clone(), block)
    query, key, value = products.qkv(stream, block, None if turn is None else products.table(turn))
    stream = products.added(query.flatten(1), block.proj, stream, block)
    fed = products.up(stream, block)
    stream = products.added(fed, block.down, stream, block)
    return {"query": query, "key": key, "value": value, "fed": fed, "end": products.end(stream)}


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("quack", marks=NEEDS_QUACK), "torch"])
@pytest.mark.parametrize("rows", [256, 1000])
@pytest.mark.parametrize(
    ("kind", "angles"),
    [
        ({"gated": True, "biased": False, "activation": "silu"}, None),
        ({"gated": True, "biased": True, "activation": "silu"}, None),
        ({"gated": False, "biased": True, "activation": "gelu_tanh"}, None),
        ({"gated": False, "biased": True, "activation": "gelu"}, "shared"),
        ({"gated": False, "biased": False, "activation": "gelu"}, "their own"),
    ],
)
def test_fast_products_are_the_plain_ones(name, rows, kind, angles):
    block, tokens, turn = wide_block(**kind), draw(rows, 256), None
    if angles is not None:
        cos, sin = (torch.randn(rows, 64, device="cuda") for _ in range(2))
        if angles == "shared":
            cos, sin = (part[:, ::2].repeat_interleave(2, dim=1) for part in (cos, sin))
        turn = Turn(cos, sin, shared=angles == "shared")
    expected = steps(PlainProducts(), block, tokens, turn)
    for part, found in steps(products_named(name), block, tokens, turn).items():
        assert relative(found, expected[part]) < 1e-2, part


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 80])  # by a pass of their own: 80, and two angles of 96, 128
def test_heads_of_all_sizes_are_turned(head_dim, shared):
    block = wide_block(gated=False, biased=True, activation="gelu", size=8 * head_dim, heads=8)
    tokens, angles = draw(1000, 8 * head_dim), torch.randn(2, 1000, head_dim, device="cuda")
    if shared:
        angles = angles[:, :, ::2].repeat_interleave(2, dim=2)
    turn, found = Turn(*angles, shared=shared), {}
    for products in (PlainProducts(), products_named("quack")):
        found[products.name] = products.qkv(products.begin(tokens.clone(), block), block, products.table(turn))
    for part in zip(found["quack"], found["plain torch"], strict=True):
        assert relative(*part) < 4e-3


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "size", "inner"),
    [(256, 256, 384), (1000, 256, 384), (4224, 1024, 2816), (16896, 1024, 2816), (4224, 2048, 5632)],
)
@pytest.mark.parametrize("apart", [False, True])
def test_fast_products_in_float8_are_the_plain_ones(rows, size, inner, apart):
    block = wide_block(gated=True, biased=False, activation="silu", size=size, inner=inner)
    if apart:
        query_key, value = (Matrix(part) for part in block.qkv.weight.split(2 * size))
        block = dataclasses.replace(block, qkv=query_key, value=value)
    small = {}
    for part in ("qkv", "up", "down"):
        weight, scale = quantize_rows(getattr(block, part).weight)
        small[part] = Matrix(weight, scale=scale[:, 0])
    block, tokens = dataclasses.replace(block, **small), draw(rows, size)
    expected = steps(PlainProducts(), block, tokens, None)
    found = steps(products_named("quack"), block, tokens, None)
    assert found["fed"].dtype == FLOAT8
    for part in found:
        # A value in the middle of two float8 neighbours becomes the one or the other.
        assert relative(found[part].float(), expected[part].float()) < 3e-2, part


@pytest.mark.gpu
@NEEDS_QUACK
def test_gelu_is_that_of_the_error_function():
    from nopad.inference.fusion import gemm_quack as quack_products

    values = torch.linspace(-12, 12, 4096, device="cuda").view(16, 256).to(BF16)
    block = dataclasses.replace(
        wide_block(gated=False, biased=False, activation="gelu", inner=256),
        eps=0.0,
        up=Matrix(torch.eye(256, device="cuda", dtype=BF16)),
    )
    squares = torch.full((16, 1), 256.0, device="cuda")  # a root mean square of one
    stream = quack_products.QuackStream(values, values, squares, both=squares)
    found = quack_products.QuackProducts().up(stream, block)
    torch.testing.assert_close(found.double(), F.gelu(values.double()), rtol=2**-8, atol=1e-3)
    # Over a row it is nearer than the rounding of bfloat16.
    exact = F.gelu(values.double())
    assert relative(found, exact) < 1.1 * relative(exact.to(BF16), exact)


@pytest.mark.gpu
@NEEDS_QUACK
def test_activations_have_kernels_of_their_own_where_the_package_is_installed(monkeypatch):
    from quack.gemm_runtime import identity

    from nopad.inference.fusion.quack_epilogues import Epilogues

    monkeypatch.setattr(identity, "_is_extern_function", lambda function: True)  # which are told by their names alone
    found = Epilogues(256, 1e-5, (1, 1)).activated
    assert len({epilogue.semantic_digest for epilogue in found.values()}) == len(found) == 3


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
def test_triton_kernels_are_the_plain_forms():
    from nopad.inference import rows as plain
    from nopad.inference import triton_kernels

    tokens, segments = draw(1500, 200), Segments.of([3, 1, 1, 1200, 295], "cuda")
    tokens[3, 7], tokens[4, 1], tokens[1204, 0] = float("nan"), float("inf"), -float("inf")
    room = tokens.new_empty(1520, 200)
    filled, finite = triton_kernels.fill_up(tokens, room)
    kept, expected = plain.finite_rows(tokens)
    assert filled is room
    assert torch.equal(finite, kept)
    assert torch.equal(filled, F.pad(expected, (0, 0, 0, 20)))
    found = plain.spoil(filled[:1500], finite, segments)
    assert found.data_ptr() != room.data_ptr()
    spoilt = torch.tensor([False, True, True, True, False], device="cuda")[segments.index()]
    assert torch.equal(found.isnan().all(dim=1), spoilt)
    assert torch.equal(found[~spoilt], tokens[~spoilt])


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("quack", [pytest.param(True, marks=NEEDS_QUACK), False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_encoders_are_as_close_to_float32_as_the_layers(tmp_path, monkeypatch, family, quack):
    if not quack:
        find_spec = util.find_spec
        monkeypatch.setattr(util, "find_spec", lambda name: None if name == "quack" else find_spec(name))
    encoder = nopad.load(tiny(family, tmp_path / "wide", **WIDE), device="cuda")
    grids = GRIDS.repeat(8, 1)
    patches = patches_of(encoder, grids)
    exact = encoder(patches, grids)
    encoder = encoder.to(BF16)
    encoder.set_attention("auto")
    own = relative(encoder(patches.to(BF16), grids), exact)
    for capacity in (2048, GRAPH_CAPACITY + 128):  # with a graph and without
        encoder.compile(capacity)
        assert encoder.execution == ("fused by quack" if quack else "fused by torch")
        assert relative(encoder(patches.to(BF16), grids), exact) <= 1.1 * own
    encoder.compile(2048)
    encoder(patches.to(BF16), grids)
    encoder.layers[1].norm1.weight.mul_(3.0)  # the recorded graph sees it
    found = encoder(patches.to(BF16), grids)
    encoder.uncompile()
    assert relative(found, encoder(patches.to(BF16), grids)) < 2e-2


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_each_pack_of_compiled_layers_in_float32_has_its_own_segments(tmp_path, attention):
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **WIDE), device="cuda", attention=attention)
    packs = [GRIDS, GRIDS.flip(0), GRIDS[:1]]
    expected = [encoder(patches_of(encoder, grids), grids) for grids in packs]
    encoder.compile(512)
    for grids, tokens in zip(packs, expected, strict=True):
        assert relative(encoder(patches_of(encoder, grids), grids), tokens) < 1e-3


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "inner"),
    [(16896, 1024, 2816), (4224, 1024, 2816), (4224, 1152, 4304), (1000, 384, 1536), (4224, 2048, 5632)],
)
def test_tiles_of_all_widths_are_the_plain_products(rows, size, inner, gated):
    kind = {"gated": gated, "biased": True, "activation": "silu" if gated else "gelu_tanh"}
    block, tokens = wide_block(**kind, size=size, inner=inner, heads=size // 64), draw(rows, size)
    angles = torch.randn(2, rows, 32, device="cuda").repeat_interleave(2, dim=2)
    turn = Turn(*angles, shared=True) if gated else None
    expected = steps(PlainProducts(), block, tokens, turn)
    products = products_named("quack")
    for part, found in steps(products, block, tokens, turn).items():
        assert relative(found, expected[part]) < 1e-2, part


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_gpu_gives_what_the_first_does(tmp_path, family):
    folder, found = tiny(family, tmp_path / "wide", **WIDE), []
    for device in ("cuda:0", "cuda:1"):  # the current one is the first
        encoder = nopad.load(folder, device=device, dtype=BF16)
        eager = encoder(patches_of(encoder), GRIDS)
        encoder.compile(1024)
        found.append((eager.cpu(), encoder(patches_of(encoder), GRIDS).cpu()))
    for first, second in zip(*found, strict=True):
        assert relative(second.float(), first.float()) < 1e-2
