"""Run every benchmark, one after the other, each in a process of its own.

    pip install -e ".[benchmarks]"
    python -m benchmarks [--quick | --full] [--record] [names ...]

All take about an hour on two cores, with `--full` several, with `--quick` less. With
`--record`, which goes with `--full`, numbers go to `benchmarks/results`, pictures to `docs`, and
the tables of docs/benchmarks.md are written anew. Exits with 1 if a claim does not hold. The
name `ablations` stands for all rows of `ablations.py`.
"""

import argparse
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ABLATIONS = (
    "limit",
    "compiling",
    "overhead",
    "theory",
    "error_estimate",
    "polish",
    "warm_starts",
    "adjoints",
    "crossover",
)
SCRIPTS = (
    "hypergradient",
    "growth",
    "tasks",
    "outer_loop",
    "precision",
    "bounds",
    "forward",
    "rescaled",
)
EVERY = (*SCRIPTS[:4], *ABLATIONS, *SCRIPTS[4:])
DRAWN = (*SCRIPTS[:4], "limit", "compiling", "theory", "bounds", "forward")


def main() -> int:
    """Run them and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join((*EVERY, 'ablations'))}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small part of each, for tests")
    size.add_argument("--full", action="store_true", help="all of each, however long")
    parser.add_argument("--record", action="store_true", help="keep numbers and pictures")
    options = parser.parse_args()
    names = [n for name in options.names for n in (ABLATIONS if name == "ablations" else [name])]
    if unknown := set(names) - set(EVERY):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    if options.record and not options.full:
        parser.error("--record keeps full runs: add --full")
    failed = []
    for name in names or EVERY:
        script = ["ablations.py", name] if name in ABLATIONS else [f"{name}.py"]
        command = [sys.executable, str(HERE / script[0]), *script[1:]]
        command += ["--quick"] if options.quick else ["--full"] if options.full else []
        if options.record:
            command += ["--results", str(HERE / "results" / f"{name}.json")]
            if name in DRAWN:
                command += ["--output", str(HERE.parent / "docs" / f"{name}.png")]
        print(f"\n== {name}", flush=True)
        begin = time.perf_counter()
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"-- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if options.record and not failed:
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nevery claim holds")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
