"""Nothing is documented that does not run: README, docstrings, examples."""

import contextlib
import doctest
import importlib
import io
import pathlib
import re
import runpy
import sys

import pytest

import difflbfgs

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "difflbfgs"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if path.stem != "__init__"
)
DOCUMENTS = {"README.md": 6, **{f"docs/{path.name}": 2 for path in (ROOT / "docs").glob("*.md")}}


@pytest.mark.parametrize(("name", "least"), DOCUMENTS.items())
def test_blocks_print_what_they_say(name, least):
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    names, printed = {}, ""
    for kind, block in blocks:
        if kind == "text":
            assert printed == block
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(block, names)
        printed = out.getvalue()
    assert len(blocks) >= least


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"difflbfgs.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", difflbfgs.__all__)
def test_public_names_have_docstrings(name):
    assert len(getattr(difflbfgs, name).__doc__) > 40


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path, monkeypatch, tmp_path):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--output", str(picture)])
    runpy.run_path(str(path), run_name="__main__")
    assert picture.stat().st_size > 10_000
