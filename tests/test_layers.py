"""The layers of CONTRIBUTING.md, and that only public names of other packages are used."""

import ast
import pathlib
import re

import pytest

import difflbfgs

SOURCE = pathlib.Path(difflbfgs.__file__).parent
ROOT = SOURCE.parent.parent
MODULES = sorted(SOURCE.rglob("*.py"))


def layers():
    """Read the order of the modules from the picture."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.findall(r"^[0-9]  (_.*)$", text, flags=re.MULTILINE)
    rows = [re.findall(r"(?<![\w`])_\w+", re.split(r"   (?=[a-z])", row)[0]) for row in picture]
    return [name for row in reversed(rows) for name in row]


def imports(path):
    """Yield the dotted names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_picture_shows_every_module():
    names = {path.stem for path in MODULES if path.stem != "__init__"}
    assert set(layers()) == names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    order = layers()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "difflbfgs" or path.stem == "__init__":
            continue
        assert order.index(parts[1]) < order.index(path.stem), f"{path.stem} imports {parts[1]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_public_names_of_other_packages(path):
    for name in imports(path):
        if not name.startswith("difflbfgs"):
            assert not re.search(r"\._|\.internal", name), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 300


def test_every_runtime_dependency_is_imported():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE).group(1)
    wanted = set(re.findall(r'"([a-z]+)>=', block)) - {"jaxlib"}  # jax is nothing without it
    found = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert wanted <= found
