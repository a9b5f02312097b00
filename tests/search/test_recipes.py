"""The examples of docs/tables.md run, where their packages are installed, and print what they say."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import nopad

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tables.md"
_, *SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
NAMES = [section.splitlines()[0] for section in SECTIONS]
EXAMPLES = {
    name: re.search(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    for name, section in zip(NAMES, SECTIONS, strict=True)
}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Where `features` is the table of `examples/images`."""
    folder = tmp_path_factory.mktemp("recipes")
    nopad.embed(ROOT / "examples" / "images", folder / "features", model=model, thumbnails=128, workers=1)
    return folder


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example])
def test_example_prints_what_it_says(name, folder, monkeypatch):
    example = EXAMPLES[name][1]
    for module in re.findall(r"^import (\w+)", example, flags=re.MULTILINE):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(folder)
    if name == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", example, flags=re.MULTILINE)
    assert example.count("print(") == len(expected)
    printed, names = io.StringIO(), {"nopad": nopad, "features": nopad.read_features("features")}
    names["ds"] = pytest.importorskip("pyarrow.dataset")
    with contextlib.redirect_stdout(printed):
        exec(compile(example, f"{PAGE}: {name}", "exec"), names)
    assert printed.getvalue().splitlines() == expected


def test_embedding_atlas_opens_the_shards(folder, monkeypatch):
    command = pytest.importorskip("embedding_atlas.cli", reason="embedding-atlas is not installed").main
    monkeypatch.chdir(folder)
    [line] = re.findall(r"^embedding-atlas (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shards, *arguments = shlex.split(line)
    command([*map(str, folder.glob(shards)), *arguments, "--export-application", "atlas"], standalone_mode=False)
    exported = pq.read_table(folder / "atlas" / "data" / "dataset.parquet")
    assert exported.num_rows == 9
    assert {"id", "thumbnail", "projection_x", "projection_y"} <= {*exported.column_names}


def test_every_section_has_an_example():
    assert [name for name, example in EXAMPLES.items() if not example] == ["Embedding Atlas", "FiftyOne"]
