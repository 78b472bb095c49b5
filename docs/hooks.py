"""MkDocs hooks: the gallery is made of the examples, and formulas become MathML."""

import ast
import html
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# A group of the gallery: a comment with a line `stem: title` for each example.
GROUP = re.compile(r"<!-- examples\n(.*?)-->", re.S)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
# What a class without an `__init__` of its own inherits.
INHERITED = "<p>Initialize self.  See help(type(self)) for accurate signature.</p>"
# Annotations that say nothing to a user.
ANYTHING = re.compile(r"\(<code>(<[^>]*>)?Any(</\w+>)?</code>(, (default)|\n?\))")
ADJOINT = re.compile(r"<code><[^>]*>AbstractAdjoint</\w+></code>")


def on_config(config):
    """Put the pages of the examples into the navigation, below the gallery."""
    for section in config["nav"]:
        for entries in section.values():
            if {"Gallery": "gallery.md"} in entries:
                entries += [{title: f"examples/{stem}.md"} for stem, title in titles().items()]
    return config


def on_files(files, config):
    """Make a page for every example."""
    from mkdocs.structure.files import File

    for stem in titles():
        page = File.generated(config, f"examples/{stem}.md", content=example_page(stem))
        files.append(page)
    return files


def on_page_markdown(markdown, page=None, config=None, files=None):
    """Put a grid of pictures in the place of each group of examples."""
    del page, config, files
    return GROUP.sub(lambda match: grid(members(match[1])), markdown)


def on_page_content(html, page=None, config=None, files=None):
    """Write formulas in MathML, and drop what says nothing."""
    del page, config, files
    html = FORMULA.sub(lambda match: mathml(match[2], match[1] == "div"), html)
    html = ANYTHING.sub(lambda match: "(default" if match[4] else "", html)
    html = ADJOINT.sub('<a href="../api_adjoints/">adjoint</a>', html)
    return html.replace(INHERITED, "")


def mathml(formula, is_display):
    """Return a formula in LaTeX as MathML, which browsers show without fonts or scripts of ours."""
    import latex2mathml.converter

    display = "block" if is_display else "inline"
    return latex2mathml.converter.convert(html.unescape(formula).strip(), display=display)


def members(lines):
    """Return the titles of a group by the names of its examples."""
    pairs = (line.partition(": ") for line in lines.strip().splitlines())
    return {stem: title for stem, _, title in pairs}


def titles():
    """Return the titles of all examples by their names, in the order of the gallery."""
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    groups = (members(lines) for lines in GROUP.findall(gallery))
    return {stem: title for group in groups for stem, title in group.items()}


def grid(group):
    """Return pictures with titles and summaries, each a link to its page."""
    cards = []
    for stem, title in group.items():
        summary = docstring(stem).partition("\n\n")[0]
        picture = f"![{title}]({stem}.png)"
        cards.append(f"- [{picture}](examples/{stem}.md)\n\n    **{title}.** {summary}")
    return '<div class="gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


def example_page(stem):
    """Return a page with an example's docstring, picture, output and program."""
    source = (ROOT / "examples" / f"{stem}.py").read_text(encoding="utf-8")
    summary, _, rest = docstring(stem).partition("\n\n")
    output = (DOCS / "output" / f"{stem}.txt").read_text(encoding="utf-8").strip()
    program = source.split('"""', 2)[2].strip()
    return f"""# {titles()[stem]}

**{summary}**

![{summary}](../{stem}.png)

{rest}

## What it prints

One run on two CPU cores that were shared with other work: times vary, the other numbers hardly.

```text
{output}
```

## The program

```python
{program}
```
"""


def docstring(stem):
    """Return the docstring of an example."""
    source = (ROOT / "examples" / f"{stem}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
