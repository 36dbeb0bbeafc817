"""`make bench`: a trivial job every two seconds, and many jobs, under several runners, one after another.

Each runner is started as its user would start it, against the same server, through a proxy that
counts its requests. What it does is read from outside: from a ledger to which the job's body writes
and from the operating system.
"""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefect.settings import PREFECT_CLIENT_RETRY_EXTRA_CODES, temporary_settings

from deployments.local import postgres, prefect_server
from tests.benchmarks.bench import Bench, Figures
from tests.benchmarks.crowd import AGENT as CROWD_AGENT
from tests.benchmarks.crowd import LEASE, PROCESS, Crowd, Way
from tests.benchmarks.groups import renewals
from tests.benchmarks.runners import AGENT, BASELINE, IMPORTING, RUNNERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deployments.local import Postgres


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
AT_ONCE = (
    Row("due", "jobs due in one second", 0),
    Row("begun", "begun within a minute", 0, "all"),
    Row("first", "the first begins, s", 2, "0.5"),
    Row("p50", "lateness p50, s", 2),
    Row("last", "the last begins, s", 2),
    Row("rate", "runs begun per second", 2, "8, 80 %"),
    Row("requests", "API requests per run", 1, "6.5"),
)
CEILING = (Row("rate", "the server alone, runs per second", 2),)
SPREAD = (
    Row("due", "jobs, each once a minute", 0),
    Row("begun", "ticks run in a minute", 0, "all"),
    Row("p50", "lateness p50, s", 2),
    Row("p99", "lateness p99, s", 2, "1"),
    Row("max", "lateness max, s", 2),
    Row("cpu", "CPU of the agent alone", 3, "0.1"),
)
IDLE = (
    Row("active", "requests a minute, active", 1, "20"),
    Row("standby", "requests a minute, standing by", 1, "10"),
)
REACTIONS = (
    Row("by hand", "a run by hand begins after, s", 2, "2"),
    Row("new", "a new job's first tick, late, s", 2, "2"),
    Row("resumed", "a resumed job begins after, s", 2, "2"),
    Row("cancelled", "a run is cancelled after, s", 2, "2"),
)
TAKEOVER = (
    Row("due", "ticks due within a minute of the kill", 0),
    Row("begun", "ticks run", 0, "all"),
    Row("p50", "lateness p50, s", 2),
    Row("p99", "lateness p99, s", 2),
    Row("max", "lateness max, s", 2, f"{LEASE + 2:.0f}"),
)
RENEWALS = (
    Row("p50", "a heartbeat takes, p50, ms", 1),
    Row("p99", "a heartbeat takes, p99, ms", 1, "50"),
    Row("cpu", "CPU with the database, % of a core", 1, "10"),
)
PARTS = ("at-once", "server", "spread", "idle", "reactions", "takeover")
"""What is measured of many jobs, in this order."""

Results = dict[str, list[Figures]]


def main() -> None:
    """Run what the command line asks for and print its tables."""
    options = _options()
    # So that an end by signal cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory() as directory,
        postgres() as database,
        prefect_server(Path(directory) / "prefect", database.url(driver="asyncpg")) as server,
        # A server that is busy with a thousand jobs answers a deletion with 500 now and then.
        temporary_settings({PREFECT_CLIENT_RETRY_EXTRA_CODES: {500}}),
        server.client() as client,
    ):
        if options.seconds:
            _one_job(Bench(server, client, Path(directory)), options)
        if options.jobs:
            _many_jobs(Crowd(server, client, database, Path(directory)), options)
        if options.groups:
            _many_groups(database, options)


def _one_job(bench: Bench, options: argparse.Namespace) -> None:
    """One job, often, under each runner."""
    runners = [r for r in RUNNERS if r.name in options.runner]
    steady: Results = {runner.name: [] for runner in runners}
    backlog: Results = {runner.name: [] for runner in runners if runner.drains}
    importing: Results = {runner.name: [] for runner in IMPORTING if options.pandas}
    for n in range(1, options.repeat + 1):
        for runner in runners:
            _say(f"{runner.name}: every 2 s for {options.seconds} s ({n}/{options.repeat})")
            steady[runner.name].append(bench.steady(runner, options.seconds))
            if options.requests:
                _say(_requests(bench, steady[runner.name][-1]["bodies"]))
        for runner in runners:
            if runner.drains:
                _say(f"{runner.name}: {options.backlog} late ticks ({n}/{options.repeat})")
                backlog[runner.name].append(bench.backlog(runner, options.backlog))
        for runner in IMPORTING if options.pandas else ():
            _say(f"a job that imports pandas, {runner.name} ({n}/{options.repeat})")
            importing[runner.name].append(bench.steady(runner, options.seconds))
    held = bench.endurance(AGENT, options.endurance) if options.endurance else []
    _say(_table("A job every 2 s", STEADY, steady))
    _say(_table("After an outage", BACKLOG, backlog))
    if importing:
        _say(_table("A job that imports pandas", STEADY, importing))
    if held:
        _say(_held(held))


def _many_jobs(crowd: Crowd, options: argparse.Namespace) -> None:
    """From one job to many, all at once, spread, and idle; then what an agent does that has many."""

    def grow(title: str, rows: Sequence[Row], measure: Callable[[Way, int], Figures], most: int) -> None:
        results: Results = {}
        for way in (PROCESS, CROWD_AGENT):
            for jobs in options.jobs:
                # A process worker begins no more in a minute than this.
                if way is CROWD_AGENT or jobs <= most:
                    results[f"{way.name} {jobs}"] = _rounds(
                        options,
                        f"{title}, {way.name} {jobs}",
                        lambda: measure(way, jobs),  # noqa: B023
                    )
        _say(_table(title, rows, results))

    def once(title: str, rows: Sequence[Row], measure: Callable[[], Figures], name: str) -> None:
        _say(_table(title, rows, {name: _rounds(options, title, measure)}))

    most = min(max(options.jobs), 200)
    parts: dict[str, Callable[[], None]] = {
        "at-once": lambda: grow("Due at once", AT_ONCE, crowd.at_once, 10),
        "server": lambda: once(
            "The server alone", CEILING, lambda: {"rate": crowd.ceiling(most)}, f"{most}"
        ),
        "spread": lambda: grow("Spread over a minute", SPREAD, crowd.spread, 10),
        "idle": lambda: grow("Nothing to do", IDLE, crowd.idle, max(options.jobs)),
        "reactions": lambda: once(
            f"An idle agent with {most} jobs", REACTIONS, lambda: crowd.reactions(most), AGENT.name
        ),
        "takeover": lambda: once(
            f"A node with {most} groups is killed", TAKEOVER, lambda: crowd.takeover(most), AGENT.name
        ),
    }
    for part in options.part or PARTS:
        parts[part]()


def _many_groups(database: Postgres, options: argparse.Namespace) -> None:
    """What a heartbeat takes for many groups, and beside many standbys."""
    growth = {
        f"{groups}": _rounds(options, "Heartbeats", lambda: renewals(database, groups))  # noqa: B023
        for groups in options.groups
    }
    _say(_table("Groups of a node", RENEWALS, growth))
    beside = {
        f"{standbys}": _rounds(options, "Standbys", lambda: renewals(database, 1, standbys))  # noqa: B023
        for standbys in (0, 50)
    }
    _say(_table("Standbys of a group", RENEWALS, beside))


def _rounds(options: argparse.Namespace, title: str, measure: Callable[[], Figures]) -> list[Figures]:
    results = []
    for n in range(1, options.repeat + 1):
        _say(f"{title} ({n}/{options.repeat})")
        results.append(measure())
        _say("  " + ", ".join(f"{name} {value:.4g}" for name, value in results[-1].items()))
    return results


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    names = [runner.name for runner in RUNNERS]
    parser.add_argument("--seconds", type=int, default=60, help="length of a window; 0 leaves one job out")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the tables show medians")
    parser.add_argument("--backlog", type=int, default=100, help="late ticks")
    parser.add_argument(
        "--endurance", type=int, default=2000, help="runs in a row, watched for what they leave"
    )
    parser.add_argument(
        "--pandas", action=argparse.BooleanOptionalAction, default=True, help="a job that imports it, too"
    )
    parser.add_argument("--runner", action="append", choices=names, help="only this; repeatable")
    growth = [1, 10, 50, 200, 1000]
    parser.add_argument(
        "--jobs", type=int, nargs="*", default=growth, help="how many jobs; none leaves them out"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="of many jobs, only this; repeatable"
    )
    parser.add_argument("--groups", type=int, nargs="*", default=growth, help="how many groups; the same")
    parser.add_argument("--requests", action="store_true", help="list requests by kind")
    options = parser.parse_args()
    options.runner = options.runner or names
    return options


def _table(title: str, rows: Sequence[Row], results: Mapping[str, Sequence[Figures]]) -> str:
    """Return a table with a column a runner: median, spread if repeated, times the baseline."""
    header = [title, *results, "reach"]
    body = [[r.label, *(_cell(r, name, results) for name in results), r.reach] for r in rows]
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


def _cell(row: Row, name: str, results: Mapping[str, Sequence[Figures]]) -> str:
    values = [figures[row.key] for figures in results[name]]
    median = statistics.median(values)
    text = "-" if math.isnan(median) else f"{median:.{row.decimals}f}"
    if len(values) > 1:
        text += f" [{min(values):.{row.decimals}f}..{max(values):.{row.decimals}f}]"
    if name != BASELINE.name and BASELINE.name in results:
        base = statistics.median(figures[row.key] for figures in results[BASELINE.name])
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
