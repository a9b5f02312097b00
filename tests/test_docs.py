"""The examples of docs/api.md run and print what they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import nopad

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_examples_of_the_api_print_what_they_say(tmp_path, monkeypatch, quick_compile):
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
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted(set(nopad.__all__)))
def test_api_page_names_every_public_name(name):
    assert re.search(rf"\b{name}\b", PAGE.read_text(encoding="utf-8"))
