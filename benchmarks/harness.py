"""How everything here is measured: compilation apart from runs, interleaved, and recorded."""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from importlib import metadata
from typing import Any, TypeVar

import jax

_Key = TypeVar("_Key", bound=Hashable)
_T = TypeVar("_T")

TURN = 0.02

PACKAGES = ("difflbfgs", "jax", "jaxlib", "optax", "lineax", "optimistix", "jaxopt", "scipy")


def options(
    description: str | None, picture: bool = True, names: Iterable[str] = ()
) -> argparse.Namespace:
    """Return the command line: `quick`, `full`, `results`, `output`, and `name` if it has names."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if names:
        parser.add_argument("name", choices=names)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small part, for tests")
    size.add_argument("--full", action="store_true", help="what was recorded, however long")
    parser.add_argument("--results", type=pathlib.Path, help="where to save the numbers (JSON)")
    if picture:
        parser.add_argument("--output", type=pathlib.Path, help="where to save the picture (PNG)")
    return parser.parse_args()


def sized(options: argparse.Namespace, quick: _T, usual: _T, full: _T) -> _T:
    """Return what the command line asks for."""
    return quick if options.quick else full if options.full else usual


@dataclasses.dataclass
class Compiled:
    """A compiled program, and what it took to make it.

    Attributes:
        run: the program.
        trace_seconds: for tracing and lowering.
        compile_seconds: for XLA.
        temporary_bytes: what it allocates for itself while it runs.
        text: the compiled program.
    """

    run: Callable
    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int
    text: str


def compiled(fun: Callable, *args: Any) -> Compiled:
    """Compile `fun` for these arguments."""
    begin = time.perf_counter()
    lowered = jax.jit(fun).lower(*args)
    traced = time.perf_counter()
    program: Any = lowered.compile()
    done = time.perf_counter()
    size = program.memory_analysis().temp_size_in_bytes
    return Compiled(program, traced - begin, done - traced, size, program.as_text())


def evaluations(fun: Callable, count: int) -> Callable:
    """Return a program `(x, *args)` of so many evaluations of `fun` with its gradient.

    They are at points that move a little, so that none can be saved.
    """

    def run(x, *args):
        def evaluate(_, carry):
            x, total = carry
            f, g = jax.value_and_grad(fun)(x, *args)
            return x - 1e-9 * g, total + f

        return jax.lax.fori_loop(0, count, evaluate, (x, 0.0))

    return run


def seconds(
    runs: Mapping[_Key, Callable[[], Any]], repeats: int, budget: float = float("inf")
) -> dict[_Key, float]:
    """Return the median seconds of each run.

    The runs take turns, so that a busy moment of the machine is shared. In a turn a short run is
    called many times in a row, as an outer loop calls it, for about `TURN` seconds. Each is warmed
    up once, and left out of further turns when it has taken `budget` seconds.
    """
    taken: dict[_Key, list[float]] = {}
    calls = {}
    for key, run in runs.items():
        first = _seconds_of(run, 1)
        calls[key] = max(1, round(TURN / first))
        # Of a run that takes all its time, the warming up is the only one.
        taken[key] = [first] if first > budget else []
    for _ in range(repeats):
        for key, run in runs.items():
            if calls[key] * sum(taken[key]) < budget:
                taken[key].append(_seconds_of(run, calls[key]))
    return {key: statistics.median(each) for key, each in taken.items()}


def _seconds_of(run: Callable[[], Any], calls: int) -> float:
    """Return the mean seconds of so many calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - begin) / calls


def keep(
    options: argparse.Namespace,
    rows: Iterable[Mapping[str, Any]],
    draw: Callable[[Any, pathlib.Path], None] | None = None,
) -> None:
    """Save rows and picture if the command line says so.

    A row takes a line, with five digits of every number. With the rows goes what they were measured
    on.
    """
    if options.results:
        device = jax.devices()[0]
        run = {
            "quick": options.quick,
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "device": f"{device.platform} {device.device_kind}, {platform.processor()}".strip(", "),
            "versions": {name: metadata.version(name) for name in PACKAGES},
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(written(run, rows))
    if draw and options.output:
        draw(rows, options.output)


def written(run: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a run as JSON, with a line for each row."""
    head = json.dumps(run, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(_rounded(row))}" for row in rows)
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    """Return JSON with five digits of every number that is none of its integers."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def recorded(path: pathlib.Path) -> dict[str, Any]:
    """Return a run that was saved."""
    return json.loads(path.read_text())
