"""The public names are imported when they are first used."""

import subprocess
import sys

import pytest

import nopad


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "embed"), ("filelock", "embed"), ("pyarrow", "read_features")]
)
def test_without_the_extra_the_error_names_it(package, name):
    code = (
        f"import sys, nopad\n"
        f"sys.modules[{package!r}] = None\n"
        f"try:\n    nopad.{name}\n"
        f"except ImportError as error:\n    print(error.name, error)\n"
    )
    message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert message == f"{package} nopad.{name} needs {package}: pip install '.[embed]' in a clone of nopad\n"


def test_read_is_an_alias_of_read_features():
    assert nopad.read is nopad.read_features


@pytest.mark.parametrize("name", ["align.align", "bench.bench", "data.PackLoader"])
def test_a_function_of_a_package_is_found_without_importing_it(name):
    subprocess.run([sys.executable, "-c", f"import nopad; nopad.{name}"], check=True)


def test_importing_nopad_is_light():
    code = "import sys, nopad; assert not {'torch', 'transformers'} & set(sys.modules); nopad.patchify"
    subprocess.run([sys.executable, "-c", code], check=True)
