"""MkDocs hooks: the gallery is made of the examples' docstrings and pictures."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
MARKER = "<!-- examples -->"
# What a class without an `__init__` of its own inherits.
INHERITED = "<p>Initialize self.  See help(type(self)) for accurate signature.</p>"


def on_page_markdown(markdown, page=None, config=None, files=None):
    """Put a section for every example in the place of the marker."""
    del page, config, files
    if MARKER not in markdown:
        return markdown
    examples = sorted((ROOT / "examples").glob("*.py"))
    return markdown.replace(MARKER, "\n\n".join(map(section, examples)))


def on_page_content(html, page=None, config=None, files=None):
    """Drop the docstring that Python gives every class."""
    del page, config, files
    return html.replace(INHERITED, "")


def section(path):
    """Return heading, summary, picture if there is one, and the rest of the docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    summary, _, rest = docstring.partition("\n\n")
    picture = f"![{summary}]({path.stem}.png)\n\n" if has_picture(path) else ""
    return f"## {path.name}\n\n**{summary}**\n\n{picture}{rest}"


def has_picture(path):
    """Return whether `docs/` holds what the example draws."""
    return (ROOT / "docs" / f"{path.stem}.png").exists()
