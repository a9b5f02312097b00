"""The examples of the API run and print what they say; the commands of all pages are ones that nopad has."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

import nopad
from nopad.cli import build_parser

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "section"), [("api", ""), ("encoders", ""), ("training", "## Names")])
def test_examples_of_a_page_print_what_they_say(page, section, tmp_path, monkeypatch):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    if section:
        text = re.search(rf"^{section}$.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(text):
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert block.count("print(") == len(expected), f"a print without its output: {block}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page, "exec"), names)
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


PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMANDS = [
    line
    for text in PAGES.values()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("nopad ")
]
MENTIONS = {
    (command, option)
    for text in PAGES.values()
    for command, words in re.findall(r"`nopad ([a-z]+)( [^`\n]*)`", text)
    for option in re.findall(r"(?<= )--[a-z0-9-]+", words)
} - {("align", "--company"), ("bench", "--peers")}  # names of nopad 0.1


@pytest.mark.parametrize("line", COMMANDS)
def test_command_in_a_block_can_be_typed(line):
    arguments = shlex.split(line, comments=True)[1:]
    assert build_parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize(("command", "option"), sorted(MENTIONS))
def test_option_that_a_page_mentions_exists(command, option, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    assert re.search(rf"{option}\b", capsys.readouterr().out)


GUIDE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/<>]+/[\w<>]+\.py)`", GUIDE))))
def test_file_that_the_guide_names_exists(path):
    if path.startswith("transformers/"):
        return
    path = path.replace("<name>", "aimv2")
    assert any((ROOT / root / path).is_file() for root in ("", "src", "src/nopad"))
