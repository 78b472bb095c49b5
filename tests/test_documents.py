"""Nothing is documented that does not run: README, docstrings, examples."""

import contextlib
import doctest
import importlib
import inspect
import io
import pathlib
import re
import runpy
import sys
from typing import Any

import pytest

import difflbfgs
import difflbfgs.compat.jaxopt

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "difflbfgs"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if path.stem != "__init__"
)
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
REFERENCE = [path.read_text() for stem, path in PAGES.items() if stem.startswith("api")]
# Made of docstrings or of recorded runs, or with nothing to run.
WITHOUT_BLOCKS = ("gallery", "benchmarks", "stability", *(s for s in PAGES if s.startswith("api")))
DOCUMENTS = {
    "README.md": 2,
    **{f"docs/{stem}.md": 2 for stem in PAGES if stem not in WITHOUT_BLOCKS},
}
PUBLIC = [f"difflbfgs.{name}" for name in difflbfgs.__all__] + [
    f"difflbfgs.compat.{module}.{name}"
    for module, names in {
        "jaxopt": difflbfgs.compat.jaxopt.__all__,
        "optimistix": ["LBFGS"],
    }.items()
    for name in names
]
# The members that are described to the user: those of our own, and two that are inherited.
ENDINGS = [
    "successful",
    "max_steps_reached",
    *re.findall(r"^    (\w+) = \(", inspect.getsource(difflbfgs.RESULTS), re.M),
]


@pytest.mark.slow
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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"difflbfgs.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", difflbfgs.__all__)
def test_public_names_have_docstrings(name):
    assert len(getattr(difflbfgs, name).__doc__) > 40


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name):
    lines = [line for page in REFERENCE for line in page.splitlines()]
    assert lines.count(f"::: {name}") == 1


def test_the_reference_has_nothing_else():
    named = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)", page, re.M)]
    assert set(named) == set(PUBLIC)


def test_the_summary_names_all():
    linked = re.findall(r"^\| \[`([\w.]+)`\]\(api_\w+\.md#([\w.]+)\) \|", REFERENCE[0], re.M)
    assert {anchor for _, anchor in linked} == set(PUBLIC)
    assert all(anchor.endswith(name) for name, anchor in linked)


@pytest.mark.parametrize("name", ENDINGS)
def test_every_ending_is_in_troubleshooting(name):
    messages: Any = difflbfgs.RESULTS
    section = PAGES["troubleshooting"].read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert messages[getattr(messages, name)] in section


def test_endings_are_all():
    assert len(ENDINGS) == 15


def test_every_page_is_in_the_navigation():
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r"^ +- .*: (\w+)\.md$", configuration, re.M)) == set(PAGES)


def test_every_example_has_its_page_in_the_gallery():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    gallery = hooks["on_page_markdown"](PAGES["gallery"].read_text())
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert sorted(hooks["titles"]()) == [path.stem for path in examples]
    for path in examples:
        assert gallery.count(f"({path.stem}.png)") == 1
        assert gallery.count(f"(examples/{path.stem}.md)") == 1
        page = hooks["example_page"](path.stem)
        assert f"    python examples/{path.name}" in page
        assert path.read_text().split('"""', 2)[2].strip() in page
        assert (ROOT / "docs" / "output" / f"{path.stem}.txt").read_text().strip() in page


def test_citation_project_and_changes_name_one_release():
    citation, changes = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"\nversion: {difflbfgs.__version__}\n" in citation
    assert f'\nversion = "{difflbfgs.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    (date,) = re.findall(r"^date-released: (.+)$", citation, re.M)
    releases = re.findall(r"^## (.+)$", changes, re.M)
    assert releases[:2] == ["[Unreleased]", f"[{difflbfgs.__version__}] - {date}"]


@pytest.fixture
def report(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_times_are_read_off_the_curve(report):
    curve = [(float("nan"), 9), (1e-2, 1), (1e-4, 4)]
    assert report.seconds_at(1e-3, curve) == pytest.approx(2)
    assert report.seconds_at(1e-4, curve) == pytest.approx(4)
    assert report.seconds_at(1e-5, curve) == float("inf")
    assert report.seconds_at(0.1, curve) == 1  # nothing is known of what precedes a NaN


def test_the_tables_are_those_last_recorded(report):
    pages = [page.read_text() for page in report.PAGES]
    assert [report.written(page) for page in pages] == pages
    for name in report.TABLES:
        is_recorded = (report.RESULTS / f"{name}.json").exists()
        assert sum(page.count(f"<!-- {name} -->\n\n| ") for page in pages) == is_recorded


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path, monkeypatch, tmp_path):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--output", str(picture)])
    runpy.run_path(str(path), run_name="__main__")
    assert picture.stat().st_size > 10_000
