"""What a process that embeds imports."""

import json
import subprocess
import sys
from functools import partial
from importlib import util

import pytest
from image_samples import PHOTO
from reporting_actor import Imported
from tiny_encoders import FAMILIES, tiny

from nopad.embedding.actors.engine import Loaded
from nopad.embedding.actors.processes import ProcessEngine

COSTLY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy", "sklearn", "pandas")

WITHOUT_COMPILER = """
import sys
from nopad.inference_imports import import_for_inference
import_for_inference()
"""


def run(code: str, *arguments: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_encoder_of_any_family_needs_no_compiler(tmp_path):
    code = f"""{WITHOUT_COMPILER}
import json, nopad
imported = {{}}
for family, folder in zip({FAMILIES!r}, sys.argv[2:], strict=True):
    encoder = nopad.load(folder)
    encoder.embed([sys.argv[1]])
    encoder.compile(256)
    encoder.embed([sys.argv[1]])
    imported[family] = sorted({{*{COSTLY!r}}} & {{*sys.modules}})
print(json.dumps({{family: names for family, names in imported.items() if names}}))
"""
    PHOTO.resize((64, 48)).save(tmp_path / "photo.png")
    folders = [tiny(family, tmp_path / family) for family in FAMILIES]
    assert json.loads(run(code, tmp_path / "photo.png", *folders)) == {}


@pytest.mark.parametrize("actors", [[], ["--actors", "1"]], ids=["in one process", "by an actor"])
def test_the_command_needs_no_compiler(tmp_path, model, actors):
    report = f"print(sorted({{*{COSTLY!r}}} & {{*sys.modules}}))"
    code = f"import sys; from nopad.cli import main; main(sys.argv[1:]); {report}"
    PHOTO.resize((64, 48)).save(tmp_path / "photo.png")
    command = ["embed", tmp_path / "photo.png", "--model", model, "--out", tmp_path / "out", "--compile", *actors]
    assert run(code, *command).splitlines()[-1] == "[]"


def test_packages_that_are_installed_are_left_alone(tmp_path):
    """transformers imports each of them where it finds it, torchvision with torch's compiler."""
    for package in ("scipy", "sklearn", "torchvision", "pandas"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("import sys; sys.exit(f'{__name__} is imported')")
    code = f"import sys; sys.path.insert(0, sys.argv[1])\n{WITHOUT_COMPILER}\nimport nopad.embedding.actors.actor"
    run(f"{code}\nimport pyarrow\npyarrow.array([1])", tmp_path)


def test_an_actor_needs_no_compiler():
    engine = ProcessEngine([{}])
    try:
        engine.load(engine.start(), partial(Imported, COSTLY), {})
        loaded: list[Loaded] = []
        while not loaded:
            loaded = [event for event in engine.wait(1.0) if isinstance(event, Loaded)]
    finally:
        engine.close()
    assert loaded[0].value == (True, True, [])


def test_the_compiler_can_be_used_afterwards():
    code = f"""{WITHOUT_COMPILER}
import torch
from transformers import masking_utils

double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(1)) == 2
import torch._dynamo.config
from torch.distributed.tensor import DTensor
assert torch._dynamo.disable.__module__ == "torch._dynamo.decorators"
assert torch.distributed.is_available()
assert type(masking_utils.TransformGetItemToIndex()).__module__.startswith("torch._dynamo.")
"""
    run(code)


def test_the_compiler_is_imported_when_it_is_used_meanwhile():
    code = """
import sys
from nopad import inference_imports
with inference_imports._late_compiler():
    from torch._dynamo import config, disable
    import torch._dynamo.trace_rules
assert config is sys.modules["torch._dynamo"].config
assert "trace_rules" in vars(sys.modules["torch._dynamo"])
"""
    run(code)


@pytest.mark.skipif(util.find_spec("scipy") is None, reason="needs scipy")
def test_a_library_finds_transformers_as_it_is():
    code = """
import nopad.loading, transformers.utils
from nopad.inference_imports import import_for_inference
import_for_inference()
assert transformers.utils.is_scipy_available() and transformers.utils.is_torch_distributed_available()
import scipy.optimize
"""
    run(code)
