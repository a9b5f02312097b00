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


def test_functions_of_packages_are_found_without_importing_them():
    code = """
import sys, nopad
for package, name in (("data", "PackLoader"), ("align", "align"), ("bench", "bench")):
    assert f"nopad.{package}" not in sys.modules
    getattr(getattr(nopad, package), name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_nopad_is_light():
    code = "import sys, nopad; assert not {'torch', 'transformers'} & set(sys.modules); nopad.patchify"
    subprocess.run([sys.executable, "-c", code], check=True)
