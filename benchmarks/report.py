"""Tables and pictures of recorded runs, and the claims they are to support.

    python benchmarks/report.py

writes the tables between the markers in README.md and docs/benchmarks.md anew from
`benchmarks/results`, and the picture of the hypergradients.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import harness

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LEVELS = (1e-4, 1e-6)
OURS = "difflbfgs"
PACKAGES = (OURS, "JAXopt", "Optimistix", "SciPy", "unrolled SGD", "unrolled Adam")
UNROLLED = ("unrolled SGD", "unrolled Adam")


def fastest(rows: list[dict], level: float, accept: Callable[[dict], bool]) -> dict | None:
    """Return the fastest accepted row whose error is no larger than the level."""
    reached = [row for row in rows if accept(row) and row["error"] <= level]
    return min(reached, key=lambda row: row["seconds"], default=None)


def by_problem(rows: list[dict], dtype: str) -> dict[str, list[dict]]:
    """Return the rows of each problem."""
    chosen = [row for row in rows if row["dtype"] == dtype]
    return {name: list(own) for name, own in itertools.groupby(chosen, lambda row: row["problem"])}


def is_peer(row: dict) -> bool:
    """Return whether the row is a peer's that differentiates implicitly, or SciPy's."""
    return row["package"] not in (OURS, *UNROLLED)


def compare(own: list[dict], level: float) -> dict[str, dict | None]:
    """Return a problem's fastest runs for an error: ours, the best peer's and unrolled SGD's."""
    return {
        "ours": fastest(own, level, lambda row: row["package"] == OURS),
        "peer": fastest(own, level, is_peer),
        "SGD": fastest(own, level, lambda row: row["package"] == "unrolled SGD"),
    }


def milliseconds(row: dict | None) -> str:
    """Return the time of a row for a table."""
    return "not reached" if row is None else f"{1e3 * row['seconds']:.3g} ms"


def hypergradient_table(rows: list[dict]) -> str:
    """Return a table of times at equal error, and one of the least errors in float32."""
    head = "| problem (variables, hyperparameters) | error | difflbfgs | best peer | unrolled SGD |"
    lines = [head, "|---|---|---|---|---|"]
    for name, own in by_problem(rows, "float64").items():
        size = f"{name} ({own[0]['variables']}, {own[0]['hyperparameters']})"
        for level in LEVELS:
            found = compare(own, level)
            best = found["peer"]
            peer = milliseconds(best) + (f" ({best['contestant']})" if best else "")
            cells = (milliseconds(found["ours"]), peer, milliseconds(found["SGD"]))
            lines.append(f"| {size} | {level:.0e} | {' | '.join(cells)} |")
            size = ""
    single = by_problem(rows, "float32")
    if single:
        packages = [OURS, "JAXopt", "Optimistix", "SciPy", "unrolled SGD"]
        lines += ["", f"| least error in float32 | {' | '.join(packages)} |"]
        lines.append("|---" * (1 + len(packages)) + "|")
        for name, own in single.items():
            least = [
                min(
                    (r["error"] for r in own if r["package"] == p and r["error"] >= 0),
                    default=math.nan,
                )
                for p in packages
            ]
            lines.append(f"| {name} | {' | '.join(f'{error:.0e}' for error in least)} |")
    return "\n".join(lines)


def limit_table(rows: list[dict]) -> str:
    """Return a table of the work in a hypergradient, and how much longer than that it takes."""
    head = "| problem (variables) | evaluations | products | time | over that of the work |"
    lines = [head, "|---|---|---|---|---|"]
    for row in rows:
        work = [
            f"{row[f'{kind}s']} x {1e6 * row[f'{kind}_seconds']:.3g} µs"
            for kind in ("evaluation", "product")
        ]
        ratio = f"{row['seconds'] / row['limit_seconds']:.2f}"
        cells = (f"{row['problem']} ({row['variables']})", *work, milliseconds(row), ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def overhead_table(rows: list[dict]) -> str:
    """Return a table of what a step costs, in evaluations."""
    solvers = [OURS, "Optax loop", "JAXopt", "Optimistix"]
    lines = [f"| variables | one evaluation | {' | '.join(solvers)} |", "|---" * 6 + "|"]
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in solvers]
        alone = f"{1e6 * row['seconds alone']:.3g} µs"
        lines.append(f"| {row['n']} | {alone} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tasks_table(rows: list[dict]) -> str:
    """Return a table of hypergradients per second."""
    sizes = list(dict.fromkeys(row["tasks"] for row in rows))
    lines = [f"| | error | {' | '.join(f'{size} tasks' for size in sizes)} |"]
    lines.append("|---" * (2 + len(sizes)) + "|")
    for key in dict.fromkeys((row["solver"], row["how"]) for row in rows):
        own = {row["tasks"]: row for row in rows if (row["solver"], row["how"]) == key}
        speeds = [f"{n / own[n]['seconds']:.3g}" if n in own else "" for n in sizes]
        error = np.max([row["error"] for row in own.values()])  # NaN if one is
        lines.append(f"| {key[0]}, `{key[1]}` | {error:.0e} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def exponent(rows: list[dict], quantity: str) -> float:
    """Return the power of the size that a quantity grows like, over the upper half of the rows."""
    upper = rows[(len(rows) - 1) // 2 :]
    sizes, values = ([row[key] for row in upper] for key in ("size", quantity))
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


def growth_table(rows: list[dict]) -> str:
    """Return a table of what the largest size of each sweep costs, and of the exponents."""
    names = ("time", "grows like", "temporary memory", "grows like", "evaluations", "products")
    lines = [f"| | | error | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for sweep, name in dict.fromkeys((row["sweep"], row["contestant"]) for row in rows):
        own = [row for row in rows if (row["sweep"], row["contestant"]) == (sweep, name)]
        last = own[-1]
        timed = "seconds" in last
        cells = [
            f"{last['size']} {sweep}",
            name,
            f"{last['error']:.0e}" if timed else "",
            milliseconds(last) if timed else "",
            f"{exponent(own, 'seconds'):.2f}" if timed else "",
            f"{last['bytes'] / 2**20:.3g} MiB",
            f"{exponent(own, 'bytes'):.2f}",
            str(last.get("evaluations", "")),
            str(last.get("products", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compiling_table(rows: list[dict]) -> str:
    """Return a table of what precedes the first run."""
    lines = ["| | | tracing and lowering | XLA | instructions | copies |", "|---" * 6 + "|"]
    for row in rows:
        seconds = f"{row['trace_seconds']:.1f} s | {row['compile_seconds']:.1f} s"
        size = f"{row['instructions']} | {row['copies']:.0f}"
        lines.append(f"| {row['problem']} | {row['contestant']} | {seconds} | {size} |")
    return "\n".join(lines)


def forward_table(rows: list[dict]) -> str:
    """Return a table of how dependable the forward solvers are.

    What is solved is counted without the family of those that have no smooth minimum; evaluations
    are the median ratio to SciPy's, over what both solved.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    kinds = ("solved", "evaluations", "false successes", "rises")
    heads = [f"{kind}, {dtype}" for dtype in dtypes for kind in kinds]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in [key for key, value in rows[0].items() if isinstance(value, dict)]:
        cells = []
        for dtype in dtypes:
            own = [row for row in rows if row["dtype"] == dtype]
            smooth = [row for row in own if row["family"] != "rough"]
            both = [row for row in smooth if row[name]["solved"] and row["SciPy"]["solved"]]
            ratios = [row[name]["evaluations"] / row["SciPy"]["evaluations"] for row in both]
            cells += [
                f"{sum(row[name]['solved'] for row in smooth)} of {len(smooth)}",
                f"{np.median(ratios):.2f}",
                str(sum(row[name]["false"] for row in own)),
                str(sum(row[name]["rises"] > 0 for row in own)),
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assert_hypergradients(rows: list[dict]) -> None:
    """Check what a run must show, whatever the machine."""
    for name, own in by_problem(rows, "float64").items():
        exact = fastest(own, 1e-8, lambda row: row["contestant"] == OURS)
        assert exact, f"{name}: the default does not reach an error of 1e-8"
        found = compare(own, 1e-4)
        ours, unrolled = found["ours"], found["SGD"]
        assert ours, f"{name}: no run of ours reaches an error of 1e-4"
        assert unrolled is None or unrolled["seconds"] > ours["seconds"], name


def draw_hypergradients(rows: list[dict], path: pathlib.Path) -> None:
    """Save, for each float64 problem, the least error of each package in a given time."""
    problems = by_problem(rows, "float64")
    columns = min(3, len(problems))
    figure, axes = plt.subplots(
        math.ceil(len(problems) / columns), columns, figsize=(4.2 * columns, 7), squeeze=False
    )
    for axis, (name, own) in zip(axes.flat, problems.items(), strict=True):
        for k, package in enumerate(PACKAGES):
            color = "black" if package == OURS else f"C{k}"
            points = sorted(
                (1e3 * row["seconds"], max(row["error"], 1e-12))
                for row in own
                if row["package"] == package and math.isfinite(row["error"])
            )
            if not points:
                continue
            axis.loglog(*zip(*points, strict=True), ".", color=color, alpha=0.3, ms=5)
            errors = itertools.accumulate((error for _, error in points), min)
            times = [time for time, _ in points]
            width = 2.2 if package == OURS else 1.2
            axis.step(times, list(errors), where="post", color=color, lw=width, label=package)
        axis.set_title(f"{name}: {own[0]['variables']} variables", fontsize=10)
        axis.set_ylim(5e-13, 20)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("milliseconds")
    for row in axes:
        row[0].set_ylabel("relative error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Hypergradients: the least error in a given time (float64)")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def between(name: str, text: str, table: str) -> str:
    """Return the text with the table between the markers of this name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.S)


# By the name of the benchmark, which is also that of the markers and of the file of results.
TABLES = {
    "hypergradient": hypergradient_table,
    "limit": limit_table,
    "overhead": overhead_table,
    "tasks": tasks_table,
    "growth": growth_table,
    "compiling": compiling_table,
    "forward": forward_table,
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def written(text: str) -> str:
    """Return a page with its tables as they were recorded last."""
    for name, table in TABLES.items():
        if f"<!-- {name} -->" in text:
            rows = harness.recorded(RESULTS / f"{name}.json")["rows"]
            text = between(name, text, table(rows))
    return text


def main() -> None:
    """Write the tables and the picture anew."""
    for page in PAGES:
        page.write_text(written(page.read_text()))
    rows = harness.recorded(RESULTS / "hypergradient.json")["rows"]
    draw_hypergradients(rows, ROOT / "docs" / "hypergradient.png")


if __name__ == "__main__":
    main()
