"""The layers of CONTRIBUTING.md, and that only public names of other packages are used."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import difflbfgs

SOURCE = pathlib.Path(difflbfgs.__file__).parent
ROOT = SOURCE.parent.parent
MODULES = sorted(SOURCE.rglob("*.py"))


def dotted(path):
    """Return the name of a module inside the package, as the picture writes it."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def layers():
    """Read the order of the modules from the picture; a row may go on in the next line."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"^```\n([0-9]  .*?)^```", text, flags=re.MULTILINE | re.DOTALL).group(1)
    rows = re.split(r"^[0-9]  ", picture, flags=re.MULTILINE)
    return [name for row in reversed(rows) for name in re.findall(r"compat\.\w+|\b_\w+", row)]


def imports(path):
    """Yield the dotted names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_prefix(some, names):
    return names[: len(some)] == some


def test_the_picture_shows_every_module():
    names = {dotted(path) for path in MODULES if path.stem != "__init__"}
    assert set(layers()) == names


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_one_way(path):
    order = layers()
    for name in imports(path):
        package, *parts = name.split(".")
        if package != "difflbfgs" or path.stem == "__init__":
            continue
        found = max(order, key=lambda known: is_prefix(known.split("."), parts) * len(known))
        assert is_prefix(found.split("."), parts), name
        assert order.index(found) < order.index(dotted(path)), f"{dotted(path)} imports {found}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_public_names_of_other_packages(path):
    for name in imports(path):
        if not name.startswith("difflbfgs"):
            assert not re.search(r"\._|\.internal", name), name


def test_every_runtime_dependency_is_imported():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE).group(1)
    wanted = set(re.findall(r'"([a-z]+)>=', block)) - {"jaxlib"}  # jax is nothing without it
    found = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert wanted <= found
    # NumPy comes with JAX; tqdm is asked for where it is missing.
    assert found - wanted <= {"difflbfgs", "numpy", "tqdm"} | set(sys.stdlib_module_names)


def test_the_package_does_not_load_its_adapters():
    code = "import sys, difflbfgs; assert not [m for m in sys.modules if 'difflbfgs.compat' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)
