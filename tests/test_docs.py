"""The examples of docs/api.md run and print what they say."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

import nopad

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_examples_of_the_api_print_what_they_say(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(PAGE):
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert block.count("print(") == len(expected), f"a print without its output: {block}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(PAGE), "exec"), names)
        assert printed.getvalue().splitlines() == expected, block


@pytest.mark.parametrize("name", sorted(set(nopad.__all__)))
def test_api_page_names_every_public_name(name):
    assert re.search(rf"\b{name}\b", PAGE.read_text(encoding="utf-8"))


def test_the_example_of_features_runs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("features", ROOT / "examples" / "features.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main("untrained:facebook/dinov3-vits16-pretrain-lvd1689m", str(tmp_path))
    assert "cat.jpg tokens (2, 1, 18, 28, 384) of the pixels [0.0, 0.0, 448.0, 288.0]" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-components.png"))) == 4
