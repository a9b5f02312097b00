"""Maps of tokens as arrays and images, and the page that shows them."""

import json
import re

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from tiny_encoders import tiny

import nopad
from nopad import maps
from nopad.cli import main
from nopad.view.page import MAX_BYTES
from nopad.view.projection import Projection, in_8_bits

TOKENS = [torch.randn(2, h, w, 6, generator=torch.Generator().manual_seed(h)) for h, w in [(3, 5), (4, 2), (1, 1)]]


def test_components_are_those_of_all_images_together():
    result = maps.pca(TOKENS, components=2)
    assert [part.shape for part in result] == [(2, 3, 5, 2), (2, 4, 2, 2), (2, 1, 1, 2)]
    rows = torch.cat([part.reshape(-1, 6) for part in TOKENS]).double().numpy()
    _, _, directions = np.linalg.svd(rows - rows.mean(0))
    for component in range(2):
        basis = directions[component] * np.sign(directions[component][np.abs(directions[component]).argmax()])
        projected = (rows - rows.mean(0)) @ basis
        low, high = np.quantile(projected, [0.01, 0.99])
        expected = np.clip((projected - low) / (high - low), 0, 1)
        values = torch.cat([part[..., component].flatten() for part in result]).numpy()
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_components_of_equal_tokens_are_finite():
    (result,) = maps.pca([torch.ones(1, 2, 2, 4)])
    assert result.isfinite().all()


def test_similarity_is_the_cosine():
    query = TOKENS[1][1, 2, 0]
    result = maps.similarity(TOKENS, query)
    assert result[1][1, 2, 0] == pytest.approx(1)
    expected = TOKENS[0][0, 1, 3] @ query / TOKENS[0][0, 1, 3].norm() / query.norm()
    assert result[0][0, 1, 3] == pytest.approx(float(expected), abs=1e-6)


def test_norms_are_lengths():
    assert torch.allclose(maps.norms(TOKENS)[0], TOKENS[0].square().sum(-1).sqrt())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maps.pca([]), r"tokens: expected tensors \(…, D\) of one width, got \[\]"),
        (lambda: maps.pca([torch.zeros(0, 4)]), r"tokens: expected tensors .*, got \[\(0, 4\)\]"),
        (lambda: maps.pca(None), "tokens: expected a tensor .* of each image, in a list, got None"),
        (lambda: maps.norms([[1.0]]), r"tokens: expected a tensor .* of each image, in a list, got \[\[1.0\]\]"),
        (lambda: maps.overlay("a.jpg", torch.zeros(2, 2)), "picture: expected a PIL image, got str"),
        (lambda: maps.norms([torch.zeros(2, 4), torch.zeros(2, 5)]), r"of one width, got \[\(2, 4\), \(2, 5\)\]"),
        (lambda: maps.pca(TOKENS, components=7), "components: expected 1 to 6, the values of a token, got 7"),
        (lambda: maps.similarity(TOKENS, torch.zeros(5)), r"query: expected \(6,\) values like a token, got \(5,\)"),
        (lambda: maps.colours([]), "values: expected finite numbers"),
        (lambda: maps.colours([float("nan")]), "values: expected finite numbers"),
        (lambda: maps.overlay(Image.new("RGB", (4, 4)), torch.zeros(2)), r"expected \(h, w\), or \(h, w, 3\) colours"),
        (lambda: maps.overlay(Image.new("RGB", (4, 4)), torch.zeros(2, 2), [2, 0, 2, 4]), "box: expected"),
    ],
)
def test_maps_that_there_are_not(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_colours_go_from_dark_to_bright():
    result = maps.colours([-5.0, 0.0, 0.5, 1.0, 9.0], 0, 1)
    assert result.dtype == np.uint8
    assert result[0].tolist() == result[1].tolist() == [68, 1, 84]
    assert result[3].tolist() == result[4].tolist() == [253, 231, 37]
    assert result[2].tolist() == [33, 144, 141]
    assert maps.colours(torch.zeros(2, 3)).shape == (2, 3, 3)


def test_a_map_lies_where_its_box_is():
    image = Image.new("RGB", (10, 8), "black")
    result = np.asarray(maps.overlay(image, torch.ones(2, 2, 3), [2, 1, 8, 5], opacity=1.0))
    assert (result[1:5, 2:8] == 255).all()
    assert result.sum() == 4 * 6 * 3 * 255
    half = np.asarray(maps.overlay(image, np.full((1, 1, 3), 200, np.uint8), opacity=0.5))
    assert (half == 100).all()


def test_cosines_from_the_strongest_directions():
    tokens = TOKENS[0][0]
    directions = in_8_bits(Projection.of(tokens.flatten(0, 1).numpy()).strongest(6)).astype(np.float32)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    expected = torch.nn.functional.normalize(tokens.flatten(0, 1), dim=1)
    np.testing.assert_allclose(unit @ unit.T, expected @ expected.T, atol=0.03)


# nopad view


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "wide.png", folder / "<img src=x> & co.png"]
    for path, size in zip(paths, [(20, 43), (33, 18)], strict=True):
        Image.fromarray(noise(1, *size)).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny(family, folder / family)) for family in ("dinov3", "siglip", "aimv2")]


def page_of(out):
    text = out.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])


def test_a_page_has_all_maps_and_needs_no_network(pictures, models, tmp_path, capsys):
    out = tmp_path / "pages" / "view.html"
    assert main(["view", *pictures, "--model", ",".join(models[:2]), "--layers", "-2,-1", "--out", str(out)]) == 0
    assert "view.html: 2 images, pca, similarity, norms, attention" in capsys.readouterr().out
    text, data = page_of(out)
    assert data["kinds"] == ["pca", "similarity", "norms", "attention"]
    assert data["layers"] == [1, 2]
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:)|url\(|https?://|<img src=x>""", text.split('<script id="data"')[0]
    )
    assert "&lt;img src=x&gt; &amp; co.png" in text
    encoder = nopad.load(models[0])
    pack = encoder.pack(pictures, size="native")
    for image, grid, box in zip(data["pictures"], pack.grid_thw.tolist(), pack.boxes.tolist(), strict=True):
        assert image["source"].startswith("data:image/jpeg;base64,")
        assert len(json.dumps(image)) < MAX_BYTES
        dinov3, siglip = image["models"]
        assert [dinov3["rows"], dinov3["columns"]] == grid[1:]
        size = (43, 20) if grid[2] > grid[1] else (18, 33)
        assert dinov3["box"] == pytest.approx([side / size[place % 2] for place, side in enumerate(box)])
        assert [layer["attention"] is None for layer in dinov3["layers"]] == [False, False]
        assert [layer["attention"] is None for layer in siglip["layers"]] == [True, False]  # the head reads the last


def test_a_sheet_is_one_image(pictures, models, tmp_path):
    out = tmp_path / "sheet.png"
    assert main(["view", *pictures, "--model", models[0], "--kind", "pca,similarity", "--out", str(out)]) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (3 * 328 + 8, 8 + 26 + 20 + 26 + 33)
        assert len(sheet.getcolors(maxcolors=1 << 20)) > 100


def test_a_model_without_attention_to_show(pictures, models, tmp_path, capsys):
    out = tmp_path / "view.html"
    assert main(["view", pictures[0], "--model", models[2], "--out", str(out)]) == 0
    assert page_of(out)[1]["kinds"] == ["pca", "similarity", "norms"]
    capsys.readouterr()
    assert main(["view", pictures[0], "--model", models[2], "--kind", "attention", "--out", str(out)]) == 2
    assert "has no attention to show, neither of a CLS token nor of a pooling head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "heat"], "kind: expected one or more of pca, similarity, norms, attention, got 'heat'"),
        (["--layers", "7"], "layers: expected -3 to 2, got 7"),
        (["--layers", "last"], "--layers: expected numbers as -4,-1, got 'last'"),
        (["--size", "huge"], "size: expected model, native, pixels of the short side, or HEIGHTxWIDTH, got 'huge'"),
        (["--size", "2"], "size: expected a short side of at least a patch of 4 × 4 pixels, got 2"),
        (["--size", "8x8", "--max-patches", "4"], "max_patches: expected None for 'height_width'"),
        (["--out", "view.gif"], "--out: expected a file .html or .png, got 'view.gif'"),
    ],
)
def test_views_that_there_are_not(pictures, models, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view", pictures[0], "--model", models[0], *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_none(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    assert main(["view", "text.png", "--model", models[0]]) == 2
    assert "text.png: " in capsys.readouterr().err
    assert main(["view", "film.MP4", "--model", models[0]]) == 2
    assert "film.MP4: a video, expected an image; take frames out of it first" in capsys.readouterr().err
    Image.fromarray(noise(1, 3, 30)).save("small.png")
    assert main(["view", "small.png", "--model", models[0]]) == 2
    assert "small.png: 3×30 pixels (height×width), smaller than a patch of 4 × 4 pixels" in capsys.readouterr().err
