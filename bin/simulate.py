"""``penstock simulate``"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.bin.bench import columns, milliseconds
from penstock.bin.files import write_whole

if TYPE_CHECKING:
    from penstock.simulate.figures import Figures, Row
    from penstock.simulate.plan import Target
    from penstock.simulate.scenario import Scenario

_WORKERS_SHOWN: Final = 16  # the busiest and the idlest of more are
_ROWS_SHOWN: Final = 20
_SIZES_SHOWN: Final = 6
_PLAN_WORKERS_MAX: Final = 4096


def _target(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    from penstock.simulate.plan import parse_target

    try:
        return None if value is None else parse_target(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("scenario", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=None, help="Instead of the scenario's.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Plots: FILE.html with all of them, or FILE.png, beside which the others lie.",
)
@click.option("--validate", is_flag=True, help="Have every core check itself after each event; this takes long.")
@click.option("--plan", is_flag=True, help="Find how many workers the traffic needs.")
@click.option(
    "--target", metavar="pN=TIME", callback=_target, default=None, help="Of --plan: a percentile of the latency."
)
@click.option(
    "--goodput",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help="Of --plan: the share of requests to be answered inside their deadline.  [default: 0.99]",
)
@click.option("--group", default=None, help="Of --plan: the [[workers]] to vary, where there are several.")
@click.option(
    "--most",
    type=click.IntRange(1, 100_000),
    default=_PLAN_WORKERS_MAX,
    show_default=True,
    help="Of --plan: workers to try at most.",
)
def simulate(
    scenario: Path,
    seed: int | None,
    json_file: Path | None,
    report: Path | None,
    validate: bool,
    plan: bool,
    target: tuple[float, float] | None,
    goodput: float | None,
    group: str | None,
    most: int,
) -> None:
    """Run SCENARIO, a TOML file, in virtual time: the server's own scheduler and batcher, with workers and traffic that
    are only played. The same seed gives the same figures.

    docs/simulate.md describes scenarios; bench/scenarios has some. Traces are recorded by 'penstock up --record'.

    Exit code 1: no number of workers keeps the target. Exit code 2: the scenario cannot be followed.
    """
    from dataclasses import replace

    from penstock.simulate.plan import Target
    from penstock.simulate.read import read_scenario
    from penstock.simulate.scenario import ScenarioError

    if not plan and (target or goodput or group):
        raise click.UsageError("--target, --goodput and --group go with --plan")
    if report is not None and report.suffix not in (".html", ".png"):
        raise click.UsageError(f"--report {report} ends neither with .html nor with .png")
    try:
        read = read_scenario(scenario)
        if seed is not None:
            read = replace(read, seed=seed)
        if plan:
            quantile, limit_s = target or (0.0, 0.0)
            wanted = Target(quantile, limit_s, 0.99 if goodput is None else goodput)
            ran, found = _plan(read, wanted, group, most, validate)
        else:
            ran, found = [_run(case, label, validate) for label, case in read.cases()], None
    except ScenarioError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(2)
    lines = plan_lines(read, ran, wanted, found, most) if plan else lines_of(read, ran)
    click.echo("\n".join(lines))
    if json_file is not None:
        _write(json_file, json.dumps(as_object(read, ran, found), indent=1) + "\n")
    if report is not None:
        _report(report, lines, ran)
    if plan and found is None:
        sys.exit(1)


def _run(scenario: Scenario, label: str, validate: bool) -> Figures:
    from penstock.simulate.run import run

    with _progress(f"{scenario.name} {label}".strip(), scenario.duration_s) as progress:
        return run(scenario, label, validate, progress)


def _plan(
    scenario: Scenario, target: Target, group_name: str | None, most: int, validate: bool
) -> tuple[list[Figures], int | None]:
    """All that was tried, by the number of workers, and the answer. Raises ScenarioError and click.UsageError."""
    from penstock.simulate.plan import first_guess, search

    names = [group.name for group in scenario.groups]
    if group_name is None and len(names) > 1:
        raise click.UsageError(f"the scenario has several [[workers]]; say which to vary with --group: {names}")
    if group_name is not None and group_name not in names:
        raise click.UsageError(f"no [[workers]] are called {group_name!r}; there are {names}")
    name = group_name or names[0]
    group = scenario.groups[names.index(name)]
    others = scenario.workers - group.count
    most = min(most, scenario.options.workers_max - others)
    tried: dict[int, Figures] = {}
    steps = search(min(most, first_guess(scenario, group)), most)
    count = next(steps)
    while True:
        figures = tried[count] = _run(scenario.with_workers(count, name), _workers(count), validate)
        try:
            count = steps.send(target.met(figures))
        except StopIteration as stop:
            return [tried[each] for each in sorted(tried)], stop.value


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


@contextmanager
def _progress(text: str, seconds: float) -> Iterator[Callable[[float, int], None]]:
    """On a terminal, which standard error is; elsewhere none."""
    from penstock.bin.bench import progress_bar

    with progress_bar(text, seconds) as progress:
        yield progress


# --- what is printed ---


_HEADS: Final = (
    *("run", "requests/s", "answered/s", "good/s", "good", "refused", "expired", "p50 ms", "p99 ms", "p99.9 ms"),
    *("rows", "busy", "fairness"),
)
_ROW_HEADS: Final = (
    *("model", "tenant", "requests/s", "good/s", "good", "refused", "expired", "p50 ms", "p99 ms", "p99.9 ms"),
    "compute",
)


def lines_of(scenario: Scenario, ran: Sequence[Figures]) -> list[str]:
    """A table of the runs, and of each the details."""
    lines = _introduction(scenario)
    lines += ["  " + line for line in columns(_HEADS, [_run_row(each) for each in ran], left={0})]
    for each in ran:
        lines += ["", *_details(each)]
    return lines


def plan_lines(scenario: Scenario, ran: Sequence[Figures], target: Target, found: int | None, most: int) -> list[str]:
    """The answer, with the figures of so many and of one fewer."""
    lines = _introduction(scenario)
    lines += ["  " + line for line in columns(_HEADS, [_run_row(each) for each in ran], left={0})]
    if found is None:
        return [*lines, f"no: {_workers(most)} and fewer do not keep {target}"]
    fewer = f", and not with {found - 1}" if found > 1 else ""
    lines.append(f"{_workers(found)}: with so many{fewer}, {target}")
    shown = {_workers(found), _workers(found - 1)}
    for each in ran:
        if each.label in shown:
            lines += ["", *_details(each)]
    return lines


def _introduction(scenario: Scenario) -> list[str]:
    return [
        f"{scenario.name}: {scenario.workers:,} workers, {len(scenario.models)} models, {scenario.duration_s:g} s, "
        f"seed {scenario.seed}"
    ]


def _run_row(figures: Figures) -> list[str]:
    total = figures.total
    return [
        figures.label or "all",
        f"{total.arrived / figures.seconds:,.0f}",
        f"{figures.answered_per_s:,.0f}",
        f"{figures.good_per_s:,.0f}",
        _share(total.good_share),
        f"{total.refused:,}",
        f"{total.expired:,}",
        *_quantiles(total),
        f"{figures.mean_rows:.1f}",
        _share(figures.utilisation),
        f"{figures.fairness:.3f}",
    ]


def _quantiles(row: Row) -> list[str]:
    from penstock.simulate.figures import QUANTILES

    if not row.answered:
        return ["-"] * len(QUANTILES)
    return [milliseconds(value / 1e9) for value in row.latency.quantiles(QUANTILES)]


def _share(value: float) -> str:
    return f"{value * 100:.1f} %"


def _details(figures: Figures) -> list[str]:
    lines = [f"{figures.label}:" if figures.label else "in detail:"]
    compute = sum(figures.tenant_seconds.values()) or 1.0
    rows = []
    for (model, tenant, priority), row in figures.rows.items():
        name = f"{model} (priority {priority})" if priority else model
        rows.append(_detail(name, tenant or "-", row, figures.seconds, ""))
    shown = rows[:_ROWS_SHOWN]
    if len(figures.tenants) > 1:
        for tenant, row in figures.tenants.items():
            share = _share(figures.tenant_seconds.get(tenant, 0.0) / compute)
            shown.append(_detail("all", tenant or "-", row, figures.seconds, share))
    lines += ["  " + line for line in columns(_ROW_HEADS, shown, left={0, 1})]
    if len(rows) > _ROWS_SHOWN:
        lines.append(f"  and {len(rows) - _ROWS_SHOWN} more, which --json has")
    lines += _batch_lines(figures)
    lines += _worker_lines(figures)
    others = [f"{count:,} {code}" for code, count in figures.codes.items()]
    lines.append(f"  not answered: {', '.join(others) or 'none'}; {figures.total.late:,} answered late")
    lines.append(
        f"  {figures.retries:,} requests were given to another worker; the broker was busy for "
        f"{_share(figures.broker_busy)} of the time"
    )
    return lines


def _detail(model: str, tenant: str, row: Row, seconds: float, compute: str) -> list[str]:
    return [
        model,
        tenant,
        f"{row.arrived / seconds:,.0f}",
        f"{row.good / seconds:,.0f}",
        _share(row.good_share),
        f"{row.refused:,}",
        f"{row.expired:,}",
        *_quantiles(row),
        compute,
    ]


def _batch_lines(figures: Figures) -> list[str]:
    lines = []
    for model, batches in list(figures.batches.items())[:_ROWS_SHOWN]:
        sizes = ", ".join(
            f"{rows}: {_share(count / batches.count)}" for rows, count in batches.sizes.most_common(_SIZES_SHOWN)
        )
        reasons = ", ".join(
            f"{reason} {_share(count / batches.count)}" for reason, count in batches.reasons.most_common()
        )
        lines.append(f"  {model}: {batches.count:,} batches of {batches.mean_rows:.1f} rows ({sizes}; {reasons})")
    return lines


def _worker_lines(figures: Figures) -> list[str]:
    workers = sorted(figures.workers, key=lambda each: -each.utilisation)
    if len(workers) > _WORKERS_SHOWN:
        half = _WORKERS_SHOWN // 2
        named = [f"{each.name} {_share(each.utilisation)}" for each in (*workers[:half], *workers[-half:])]
        return [f"  busy: {_share(figures.utilisation)}; most and least: {', '.join(named)}"]
    return [f"  busy: {', '.join(f'{each.name} {_share(each.utilisation)}' for each in workers)}"]


def as_object(scenario: Scenario, ran: Sequence[Figures], found: int | None) -> dict[str, Any]:
    """For machines."""
    from penstock.simulate.figures import as_object as figures_as_object

    return {
        "scenario": scenario.name,
        "seed": scenario.seed,
        "workers": found if found is not None else scenario.workers,
        "runs": [figures_as_object(each) for each in ran],
    }


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        click.echo(f"penstock: cannot write {path}: {error.strerror}", err=True)
        sys.exit(1)


def _report(path: Path, lines: Sequence[str], ran: Sequence[Figures]) -> None:
    from penstock.bin.simulatereport import NO_PNG, write_report

    try:
        drawn = write_report(path, lines, ran)
    except OSError as error:
        click.echo(f"penstock: cannot write the report: {error}", err=True)
        sys.exit(1)
    if not drawn:
        click.echo(f"penstock: {NO_PNG}", err=True)
        sys.exit(1)
    click.echo(f"penstock: wrote {path}", err=True)
