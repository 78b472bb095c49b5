"""Tables and pictures of recorded runs, and the claims they are to support.

    python benchmarks/report.py

writes the tables between the markers in docs/benchmarks.md anew from `benchmarks/results`, and the
picture of the hypergradients.
"""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import harness

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LEVELS = (1e-4, 1e-6)
# A derivative through bounds is wrong beyond this relative error.
WRONG = 1e-3
OURS = "difflbfgs"
PACKAGES = (OURS, "JAXopt", "Optimistix", "SciPy", "unrolled SGD", "unrolled Adam")
UNROLLED = ("unrolled SGD", "unrolled Adam")


@dataclasses.dataclass(frozen=True, order=True)
class Reached:
    """An error level reached: in how many seconds (inf if it was not), and by which contestant."""

    seconds: float
    contestant: str


def seconds_at(level: float, curve: list[tuple[float, float]]) -> float:
    """Return in how many seconds a contestant gets to an error, along its curve; inf if never.

    The curve joins its settings, from loose to tight, by straight lines in the logarithms of error
    and time, so that nobody gains by a setting that happens to fall just below the level.
    """
    found, unknown = math.inf, (math.nan, math.nan)
    for (error, before), (smaller, seconds) in itertools.pairwise([unknown, *curve]):
        if not smaller <= level:
            continue
        if error > level:
            way = [math.log(max(each, 1e-16) / level) for each in (error, smaller)]
            share = way[0] / (way[0] - way[1])
            seconds = before ** (1 - share) * seconds**share
        found = min(found, seconds)
    return found


def points(row: dict) -> list[tuple[float, float]]:
    """Return error and seconds at each setting of a contestant."""
    return list(zip(row["error"], row["seconds"], strict=True))


def fastest(rows: list[dict], level: float, accept: Callable[[dict], bool]) -> Reached:
    """Return which of the accepted contestants gets to an error first."""
    reached = (
        Reached(seconds_at(level, points(row)), row["contestant"]) for row in filter(accept, rows)
    )
    return min(reached, default=Reached(math.inf, "nobody"))


def by_problem(rows: list[dict], dtype: str) -> dict[str, list[dict]]:
    """Return the rows of each problem."""
    chosen = [row for row in rows if row["dtype"] == dtype]
    return {name: list(own) for name, own in itertools.groupby(chosen, lambda row: row["problem"])}


def is_peer(row: dict) -> bool:
    """Return whether the row is a peer's that differentiates implicitly, or SciPy's."""
    return row["package"] not in (OURS, *UNROLLED)


def compare(own: list[dict], level: float) -> dict[str, Reached]:
    """Return who gets to an error first: of ours, of the peers, and unrolled SGD."""
    return {
        "ours": fastest(own, level, lambda row: row["package"] == OURS),
        "peer": fastest(own, level, is_peer),
        "SGD": fastest(own, level, lambda row: row["package"] == "unrolled SGD"),
    }


def milliseconds(seconds: float) -> str:
    """Return a time for a table."""
    return f"{1e3 * seconds:.3g} ms" if math.isfinite(seconds) else "not reached"


def hypergradient_table(rows: list[dict]) -> str:
    """Return a table of times at equal error, and one of the least errors in float32."""
    names = ("error", OURS, "best peer", "over ours", "unrolled SGD", "over ours")
    lines = [f"| problem (variables, hyperparameters) | {' | '.join(names)} |", "|---" * 7 + "|"]
    for name, own in by_problem(rows, "float64").items():
        size = f"{name} ({own[0]['variables']}, {own[0]['hyperparameters']})"
        for level in LEVELS:
            found = compare(own, level)
            ours, peer, unrolled = found["ours"], found["peer"], found["SGD"]
            cells = (
                milliseconds(ours.seconds),
                f"{milliseconds(peer.seconds)} ({peer.contestant})",
                f"{peer.seconds / ours.seconds:.2f}",
                milliseconds(unrolled.seconds),
                f"{unrolled.seconds / ours.seconds:.1f}",
            )
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
                    (e for r in own if r["package"] == p for e in r["error"] if e >= 0),
                    default=math.nan,
                )
                for p in packages
            ]
            lines.append(f"| {name} | {' | '.join(f'{error:.0e}' for error in least)} |")
    return "\n".join(lines)


def performance_profile(panel, rows: list[dict], names, ours) -> None:
    """Draw the share of problems that each solver solved with r times the best's evaluations.

    What was not solved costs infinity. (Dolan & Moré, 2002)
    """
    costs = np.array(
        [[r["evaluations"][n] if n in r["solved"] else np.inf for n in names] for r in rows]
    )
    best = costs.min(axis=1, keepdims=True)
    ratios = np.where(np.isfinite(costs), costs / np.where(np.isfinite(best), best, 1), np.inf)
    grid = np.logspace(0, 1, 200)
    for name, column in zip(names, ratios.T, strict=True):
        share = [(column <= r).mean() for r in grid]
        panel.step(grid, share, label=name, where="post", lw=2.5 if name in ours else 1)
    panel.set(xscale="log", xlabel="evaluations / the best solver's", ylim=(0, 1))
    panel.grid(alpha=0.3)


def limit_table(rows: list[dict]) -> str:
    """Return a table of the work in a hypergradient, and how much longer than that it takes."""
    head = "| problem (variables) | evaluations | products | time | over that of the work |"
    lines = [head, "|---|---|---|---|---|"]
    for row in rows:
        work = [
            f"{row[f'{kind}s']} x {1e6 * row[f'{kind}_seconds']:.3g} µs"
            for kind in ("evaluation", "product")
        ]
        work += [milliseconds(row["seconds"]), f"{row['seconds'] / row['limit_seconds']:.2f}"]
        lines.append(f"| {row['problem']} ({row['variables']}) | {' | '.join(work)} |")
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
    lines = [f"| | median error | worst | NaN | {' | '.join(f'{size} tasks' for size in sizes)} |"]
    lines.append("|---" * (4 + len(sizes)) + "|")
    for key in dict.fromkeys((row["solver"], row["how"]) for row in rows):
        own = {row["tasks"]: row for row in rows if (row["solver"], row["how"]) == key}
        speeds = [f"{n / own[n]['seconds']:.3g}" if n in own else "" for n in sizes]
        speeds.insert(0, str(max(row["flagged"] for row in own.values())))
        for error in ("error", "median_error"):
            speeds.insert(0, f"{max(row[error] for row in own.values()):.0e}")
        lines.append(f"| {key[0]}, `{key[1]}` | {' | '.join(speeds)} |")
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
            milliseconds(last["seconds"]) if timed else "",
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


def outcome(row: dict, names: Iterable[str], *faults: str) -> dict:
    """Return evaluations of the named solvers, which of them solved a problem, and their faults."""
    ran = {name: row[name] for name in names if row[name] is not None}
    kinds = ("solved", "false", *faults)
    return {
        "evaluations": {name: each["evaluations"] for name, each in ran.items()},
        **{kind: [name for name, each in ran.items() if each[kind]] for kind in kinds},
    }


def over_scipy(rows: list[dict], name: str) -> float:
    """Return the median ratio of evaluations to SciPy's, over what both solved."""
    both = [r["evaluations"] for r in rows if {name, "SciPy"} <= set(r["solved"])]
    return float(np.median([counts[name] / counts["SciPy"] for counts in both]))


def forward_table(rows: list[dict]) -> str:
    """Return a table of how dependable the forward solvers are, from rows of `outcome`.

    What is solved is counted without the family of those that have no smooth minimum; evaluations
    are the median ratio to SciPy's, over what both solved.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    kinds = ("solved", "evaluations", "false successes", "rises")
    heads = [f"{kind}, {dtype}" for dtype in dtypes for kind in kinds]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in rows[0]["evaluations"]:
        cells = []
        for dtype in dtypes:
            own = [row for row in rows if row["dtype"] == dtype]
            smooth = [row for row in own if row["family"] != "rough"]
            cells += [
                f"{sum(name in row['solved'] for row in smooth)} of {len(smooth)}",
                f"{over_scipy(smooth, name):.2f}",
                str(sum(name in row["false"] for row in own)),
                str(sum(name in row["rises"] for row in own)),
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bounds_table(rows: list[dict]) -> str:
    """Return two tables: solves of problems with bounds, and derivatives through them."""
    lines = [
        "| | solved | evaluations over SciPy's | false successes | outside |",
        "|---" * 5 + "|",
    ]
    for name in rows[0]["evaluations"]:
        own = [r for r in rows if name in r["evaluations"]]
        solved, false, outside = (
            sum(name in r[kind] for r in own) for kind in ("solved", "false", "outside")
        )
        ratio = over_scipy(own, name)
        lines.append(f"| {name} | {solved} of {len(own)} | {ratio:.2f} | {false} | {outside} |")
    known = [r["derivative"] for r in rows if r["derivative"] is not None]
    lines += ["", "| derivatives | right | refused | silently wrong |", "|---" * 4 + "|"]
    for name in ("difflbfgs", "JAXopt"):
        errors = np.array([errors[name] for errors in known if name in errors])
        refused, wrong = np.isnan(errors).sum(), (errors > WRONG).sum()
        right = len(errors) - refused - wrong
        lines.append(f"| {name} | {right} of {len(errors)} | {refused} | {wrong} |")
    return "\n".join(lines)


def rescaled_table(rows: list[dict]) -> str:
    """Return a table of the problems solved in other units, and of what was claimed falsely."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    heads = [f"{kind}, {dtype}" for dtype in dtypes for kind in ("solved", "false successes")]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in (key for key, found in rows[0].items() if isinstance(found, dict)):
        claims = any(row[name]["claim"] for row in rows)  # of the others nothing was asked
        cells = []
        for dtype in dtypes:
            own = [row[name] for row in rows if row["dtype"] == dtype]
            cells.append(f"{sum(each['solved'] for each in own)} of {len(own)}")
            cells.append(str(sum(each["false"] for each in own)) if claims else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def outer_loop_table(rows: list[dict]) -> str:
    """Return a table of the costs of outer loops, over those of exact solves."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = [f"| | {' | '.join(problems)} | geometric mean |", "|---" * (2 + len(problems)) + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        shares = [row["share"] for row in rows if row["way"] == way]
        cells = [f"{share:.3f}" if math.isfinite(share) else "not reached" for share in shares]
        mean = math.exp(sum(map(math.log, shares)) / len(shares))
        cells.append(f"{mean:.3f}" if math.isfinite(mean) else "")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assert_hypergradients(rows: list[dict]) -> None:
    """Check what a run must show, whatever the machine."""
    for name, own in by_problem(rows, "float64").items():
        exact = fastest(own, 1e-8, lambda row: row["contestant"] == OURS)
        assert math.isfinite(exact.seconds), f"{name}: the default does not reach an error of 1e-8"
        found = compare(own, 1e-4)
        assert found["ours"].seconds < found["SGD"].seconds, name


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
            found = sorted(
                (1e3 * seconds, max(error, 1e-12))
                for row in own
                if row["package"] == package
                for error, seconds in points(row)
                if math.isfinite(error)
            )
            if not found:
                continue
            axis.loglog(*zip(*found, strict=True), ".", color=color, alpha=0.3, ms=5)
            errors = itertools.accumulate((error for _, error in found), min)
            times = [time for time, _ in found]
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
    "bounds": bounds_table,
    "rescaled": rescaled_table,
    "outer_loop": outer_loop_table,
}
PAGES = (ROOT / "docs" / "benchmarks.md",)


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
