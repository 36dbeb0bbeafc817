"""`make bench`: a trivial job every two seconds under several runners, one after another.

Each runner is started as its user would start it, against the same server, through a proxy that
counts its requests. What it does is read from outside: from a ledger to which the job's body writes
and from the operating system.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deployments.local import postgres, prefect_server
from tests.benchmarks.bench import Bench, Figures
from tests.benchmarks.runners import AGENT, BASELINE, IMPORTING, RUNNERS, Runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Row(NamedTuple):
    """A figure in a table: its key, what it is called, its decimals, what this project is to reach."""

    key: str
    label: str
    decimals: int
    reach: str = ""


STEADY = (
    Row("due", "ticks due", 0),
    Row("run", "ticks run", 0, "all"),
    Row("bodies", "runs begun", 0),
    Row("cpu", "CPU seconds", 2),
    Row("cpu_per_run", "CPU seconds per run", 3, "0.1, 1/25"),
    Row("requests_per_run", "API requests per run", 1, "8"),
    Row("earliest", "earliest start, s", 3, "not < 0"),
    Row("p50", "lateness p50, s", 3, "0.060"),
    Row("p99", "lateness p99, s", 3, "0.250"),
    Row("max", "lateness max, s", 3),
    Row("memory", "memory (PSS), MB", 0, "350"),
)
BACKLOG = (
    Row("started", "late ticks begun", 0, "all"),
    Row("first", "poll to first start, s", 2, "1.00"),
    Row("rate", "runs begun per second", 2, "8"),
)
Results = dict[Runner, list[Figures]]


def main() -> None:
    """Run what the command line asks for and print its tables."""
    options = _options()
    runners = [r for r in RUNNERS if r.name in options.runner]
    steady: Results = {runner: [] for runner in runners}
    backlog: Results = {runner: [] for runner in runners if runner.drains}
    importing: Results = {runner: [] for runner in IMPORTING if options.pandas}
    with (
        tempfile.TemporaryDirectory() as directory,
        postgres() as database,
        prefect_server(Path(directory) / "prefect", database.url(driver="asyncpg")) as server,
        server.client() as client,
    ):
        bench = Bench(server, client, Path(directory))
        for n in range(1, options.repeat + 1):
            for runner in steady:
                _say(f"{runner.name}: every 2 s for {options.seconds} s ({n}/{options.repeat})")
                steady[runner].append(bench.steady(runner, options.seconds))
                if options.requests:
                    _say(_requests(bench, steady[runner][-1]["bodies"]))
            for runner in backlog:
                _say(f"{runner.name}: {options.backlog} late ticks ({n}/{options.repeat})")
                backlog[runner].append(bench.backlog(runner, options.backlog))
            for runner in importing:
                _say(f"a job that imports pandas, {runner.name} ({n}/{options.repeat})")
                importing[runner].append(bench.steady(runner, options.seconds))
        held = bench.endurance(AGENT, options.endurance) if options.endurance else []
    _say(_table("A job every 2 s", STEADY, steady))
    _say(_table("After an outage", BACKLOG, backlog))
    if importing:
        _say(_table("A job that imports pandas", STEADY, importing))
    if held:
        _say(_held(held))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    names = [runner.name for runner in RUNNERS]
    parser.add_argument("--seconds", type=int, default=60, help="length of a window")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the tables show medians")
    parser.add_argument("--backlog", type=int, default=100, help="late ticks")
    parser.add_argument(
        "--endurance", type=int, default=2000, help="runs in a row, watched for what they leave"
    )
    parser.add_argument(
        "--pandas", action=argparse.BooleanOptionalAction, default=True, help="a job that imports it, too"
    )
    parser.add_argument("--runner", action="append", choices=names, help="only this; repeatable")
    parser.add_argument("--requests", action="store_true", help="list requests by kind")
    options = parser.parse_args()
    options.runner = options.runner or names
    return options


def _table(title: str, rows: Sequence[Row], results: Mapping[Runner, Sequence[Figures]]) -> str:
    """Return a table with a column a runner: median, spread if repeated, times the baseline."""
    header = [title, *(runner.name for runner in results), "reach"]
    body = [[r.label, *(_cell(r, runner, results) for runner in results), r.reach] for r in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *body]
    ]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:]])


def _held(samples: Sequence[Figures]) -> str:
    """Return what the agent and its nursery hold after each hundred runs, a line each."""
    names = list(samples[0])
    lines = ["  ".join(f"{sample[name]:{len(name)}.0f}" for name in names) for sample in samples]
    return "\n".join(["", "  ".join(names), *lines])


def _cell(row: Row, runner: Runner, results: Mapping[Runner, Sequence[Figures]]) -> str:
    values = [figures[row.key] for figures in results[runner]]
    median = statistics.median(values)
    text = "-" if math.isnan(median) else f"{median:.{row.decimals}f}"
    if len(values) > 1:
        text += f" [{min(values):.{row.decimals}f}..{max(values):.{row.decimals}f}]"
    if runner != BASELINE and BASELINE in results:
        base = statistics.median(figures[row.key] for figures in results[BASELINE])
        text += f" {_times(median, base):>8}"
    return text


def _times(value: float, base: float) -> str:
    """Return how many times the base a value is: ``x2.5``, or ``/4`` for a quarter of it."""
    if not value > 0 or not base > 0:
        return "-"
    return f"x{value / base:.3g}" if value >= base else f"/{base / value:.3g}"


def _requests(bench: Bench, runs: float) -> str:
    """Return how many requests of each kind there were, and how many that is a run."""
    return "\n".join(
        f"  {count:6d}  {count / max(runs, 1):6.2f}  {kind}" for kind, count in bench.requests.most_common()
    )


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
