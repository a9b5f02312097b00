"""Vectors and tokens of chosen layers in bulk."""

import numpy as np
import pytest
import torch
from pictures import noise
from tiny_encoders import tiny

import nopad
from nopad.pipeline.selection import Selection
from nopad.pipeline.worker import Worker

PICTURES = [noise(seed, 8 + 4 * seed, 24 - 4 * seed) for seed in range(4)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return nopad.load(tiny("dinov3", tmp_path_factory.mktemp("dinov3")), size="native")


def results(encoder, capacity=40, **options):
    worker = Worker(encoder, capacity=capacity, selection=Selection(**options))
    (group,) = worker.run([[torch.from_numpy(image).permute(2, 0, 1) for image in PICTURES]], lambda item: item)
    return group


@torch.no_grad()
def test_tokens_and_vectors_are_those_of_the_layers(encoder):
    features = encoder.features(encoder.pack(PICTURES), [0, -1])
    for result, expected in zip(results(encoder, tokens=True, layers=(0, -1), pool="cls+mean"), features, strict=True):
        np.testing.assert_array_equal(result.tokens, expected.tokens.flatten(0, 3).half().numpy())
        cls, mean = expected.prefix_tokens[:, 0, 0], expected.tokens.mean((1, 2, 3))
        vector = torch.stack((cls, mean), dim=1).flatten()
        torch.testing.assert_close(torch.from_numpy(result.embedding), vector)


@torch.no_grad()
@pytest.mark.parametrize(("pool", "number"), [("cls", 1), ("mean", 1), ("cls+mean", 2), ("model", 1)])
def test_a_pool_of_the_last_layer(encoder, pool, number):
    output = encoder.encode(encoder.pack(PICTURES))
    lengths = encoder.pack(PICTURES).grid_thw.prod(1).tolist()
    parts = {"cls": output.prefix_tokens[:, 0], "model": output.pooled}
    parts["mean"] = torch.stack([part.mean(0) for part in output.tokens.split(lengths)])
    expected = torch.cat([parts[name] for name in pool.split("+")], dim=1)
    vectors = torch.stack([torch.from_numpy(result.embedding) for result in results(encoder, pool=pool)])
    torch.testing.assert_close(vectors, expected)
    torch.testing.assert_close(encoder.embed(PICTURES, pool=pool), expected)
    assert encoder.embed([], pool=pool).shape == (0, number * encoder.hidden_size)
    last = encoder.embed(PICTURES, pool=pool, layers=[-1]) if pool != "model" else vectors
    torch.testing.assert_close(last, expected)


@torch.no_grad()
def test_the_models_own_vector_beside_tokens_of_other_layers(encoder):
    expected = encoder.encode(encoder.pack(PICTURES)).pooled
    vectors = results(encoder, tokens=True, layers=(0,))
    torch.testing.assert_close(torch.stack([torch.from_numpy(result.embedding) for result in vectors]), expected)


def test_means_of_squares_of_tokens(encoder):
    plain = results(encoder, tokens=True, layers=(0, 1))
    for result, pooled in zip(plain, results(encoder, tokens=True, layers=(0, 1), tokens_pool=2), strict=True):
        _, h, w = result.grid
        tokens = torch.from_numpy(result.tokens).float().reshape(2, h, w, -1)
        rows, columns = -(-h // 2), -(-w // 2)
        squares = torch.from_numpy(pooled.tokens).float().reshape(2, rows, columns, -1)
        assert pooled.grid == result.grid
        for row in range(rows):
            for column in range(columns):
                square = tokens[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
                torch.testing.assert_close(squares[:, row, column], square, rtol=1e-2, atol=1e-2)


def test_features_do_not_depend_on_the_pack(encoder):
    options = {"tokens": True, "layers": (0, -1), "pool": "cls+mean", "tokens_pool": 2}
    for alone, together in zip(results(encoder, 1, **options), results(encoder, 10**6, **options), strict=True):
        np.testing.assert_allclose(alone.embedding, together.embedding, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone.tokens, together.tokens, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, r"pool: expected one of model, cls, mean, cls\+mean, got 'max'"),
        ({"tokens_pool": 0, "tokens": True}, "tokens_pool: expected ≥ 1, got 0"),
        ({"tokens_pool": 2}, "tokens_pool: goes with tokens, which are not kept, got 2"),
        ({"layers": (-1,)}, r"layers: the model's own vector is of the last one, got \(-1,\); give a pool"),
        ({"layers": (3,), "pool": "mean"}, "layers: expected -3 to 2, got 3; there are 3 layers"),
        ({"layers": (), "pool": "mean"}, "layers: expected a list of integers"),
    ],
)
def test_selections_that_there_are_not(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        results(encoder, **options)


def test_a_model_without_a_cls_token_cannot_pool_by_it(tmp_path):
    encoder = nopad.load(tiny("siglip2", tmp_path))
    with pytest.raises(ValueError, match="pool: expected model or mean, since this model has no CLS token, got cls"):
        encoder.embed(PICTURES, pool="cls")
