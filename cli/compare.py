"""ghm compare."""

import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from ghm_d2.errors import UsageError

from .common.console import emit, err, out, user_errors
from .common.options import OF_DATA, Dataset, Json, check_overrides, make_folder


class CompareCommand(TyperCommand):
    """Joins the two words of `--set KEY VALUE` into the one value that a list option takes.

    `--set KEY=VALUE` needs no joining.
    """

    def parse_args(self, ctx, args):
        words, joined = list(args), []
        while words:
            word = words.pop(0)
            if word == "--set" and len(words) > 1 and "=" not in words[0]:
                word = f"--set={words.pop(0)}={words.pop(0)}"
            joined.append(word)
        return super().parse_args(ctx, joined)


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="WHAT...",
        help="claim, density, losses, imbalance, regression, two-stage vs one-stage, backbones, "
        "systems, noise, noise-kinds, batch-size, additions; or configurations, A.yaml vs B.yaml "
        "(vs C.yaml ...); or folders of data sets, FOLDER vs FOLDER.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="quick: mostly 300 iterations, for two CPU cores; half, full: half or all of the "
        "published schedule, or of your configuration's. Default: quick, or full for your own "
        "configurations."
    ),
]
Search = Annotated[
    bool,
    typer.Option(
        "--search",
        help="First search each side's learning rate and box loss weight, using only the training "
        "split. This takes up to eight full trainings per side.",
    ),
]
SearchOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        help="Search on this data set's train and val splits instead. Repeatable: one setting is "
        "chosen by the mean AP.",
    ),
]
Settings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Use the settings of an earlier search: its comparison.json or folder."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY VALUE", help="An override for all sides. Repeatable."),
]


def compare(
    what: What = None,
    dataset: Dataset = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration for FOLDER vs FOLDER; default quick/retinanet_ghm.yaml."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of runs per side, with seeds 1 to N.")
    ] = 6,
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="Differences of AP up to this are practically none. Default: 1."),
    ] = None,
    looks: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Plan an early verdict after this number of seeds. If it decides the primary "
            "pair, the comparison ends. Repeatable.",
        ),
    ] = None,
    all_seeds: Annotated[
        bool, typer.Option("--all-seeds", help="Train all seeds even if a look has decided.")
    ] = False,
    budget: Budget = None,
    search: Search = False,
    search_on: SearchOn = None,
    settings: Settings = None,
    set_: Set = None,
    side: Annotated[
        list[str] | None, typer.Option(help="Train only this side. Repeatable. Default: all.")
    ] = None,
    optional: Annotated[
        bool, typer.Option("--optional", help="Add the optional sides, such as GHM-C on the RPN.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder shared by all comparisons, to reuse finished runs.")
    ] = Path("comparisons"),
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, mps, cuda for all GPUs, or a list of some, such as cuda:0,cuda:2."
        ),
    ] = "auto",
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time on each device; each needs its own memory.")
    ] = 1,
    launcher: Annotated[str, typer.Option(help="local, or submitit for Slurm jobs.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train several configurations, the sides, with the same seeds; report whether AP differs.

    Finished runs are never repeated. After an interruption the same command continues.
    """
    with user_errors():
        _check_options(launcher, jobs, bool(settings), search or bool(search_on), looks, seeds)
        own = config or any(word.endswith((".yaml", ".yml")) for word in what or [])
        budget = budget or ("full" if own else "quick")
        suite = _choose_suite(what or [], budget, config, side or [], optional)
        overrides = tuple(part for pair in set_ or [] for part in _key_value(pair))
        check_overrides(overrides, SEED="--seeds", **OF_DATA)
        make_folder(output)

        from .common.logs import quiet

        quiet()
        from ghm_d2.experiments.compare import Request
        from ghm_d2.experiments.launch import LocalLauncher, find_devices

        elsewhere = launcher == "submitit"  # jobs run on other machines; the plan is made here
        devices = find_devices("auto" if elsewhere else device)
        start = None if elsewhere else LocalLauncher(devices, jobs)
        request = Request(
            suite=suite,
            dataset=dataset,
            budget=budget,
            seeds=tuple(range(1, seeds + 1)),
            root=output.resolve(),
            device=devices[0],
            overrides=overrides,
            search=search or bool(search_on),
            search_on=tuple(search_on or []),
            settings=settings and settings.resolve(),
            command=shlex.join(["ghm", *sys.argv[1:]]),
            margin=margin,
            looks=tuple(sorted({*looks})) if looks else None,
            at_once=len(start.free) if start else 1,
        )
        _compare(request, start, device, all_seeds, dry_run, as_json)


def _check_options(launcher: str, jobs: int, settings: bool, search: bool, looks, seeds) -> None:
    """Refuse options that contradict each other."""
    if launcher not in ("local", "submitit"):
        raise UsageError(f"--launcher must be local or submitit, not {launcher!r}")
    if launcher == "submitit" and jobs > 1:
        raise UsageError("--jobs works only with --launcher local; with submitit each run is a job")
    if settings and search:
        raise UsageError("--settings replaces a search; leave out --search and --search-on")
    if looks and max(looks) >= seeds:
        raise UsageError(f"--looks must be below --seeds, which is {seeds}")


def _choose_suite(words: list[str], budget: str, config, sides: list[str], optional: bool):
    """Return the suite that the words name with the chosen sides; print which are left out."""
    from ghm_d2.experiments.suites import choose_sides, find_suite

    whole = find_suite(words, budget, config)
    suite = choose_sides(whole, sides, optional)
    if not sides:
        _tell_left_out(whole, suite)
    return suite


def _compare(
    request, start, job_device: str, all_seeds: bool, dry_run: bool, as_json: bool
) -> None:
    """Plan, train and report a comparison.

    start: the launcher; None takes submitit, whose jobs run on `job_device`.
    """
    from ghm_d2.experiments.compare import compare, make_plan
    from ghm_d2.experiments.launch import SubmititLauncher
    from ghm_d2.reports.report import is_decided
    from ghm_d2.reports.statistics.power import PlannedPower, read_spread

    from .common.progress import progress

    with progress() as shown:
        plan = make_plan(request, shown)
    labels, iterations = zip(*((run.label, run.iterations) for run in plan.runs), strict=True)
    spread = read_spread(request.root, labels, iterations)
    power = PlannedPower(spread, len(request.seeds), plan.margin, plan.looks)
    if dry_run:
        value = plan.as_dict() | {"power": power.as_dict()}
        emit(value, as_json=as_json, human=lambda: _print_plan(plan, power, out))
        return
    _print_plan(plan, power, err if as_json else out)
    if start is None:
        every = (*plan.trials, *plan.later, *plan.runs)
        longest = max(plan.seconds.get(run.key, 0) for run in every)
        minutes = 60 + round(longest / 60 * 3)  # a job's limit, far above the expected time
        start = SubmititLauncher(request.root / "submitit", minutes, job_device)
    with progress() as shown:
        folder = compare(request, start, shown, None if all_seeds else is_decided)
    from ghm_d2.reports.page.write import write_report

    from .report import show_report

    show_report(write_report(folder), as_json)


def _tell_left_out(whole, suite) -> None:
    names = [s.name for s in whole.sides if s.optional and s not in suite.sides]
    if names:
        note = f"optional sides left out (--optional adds them): {', '.join(names)}"
        err.print(note, markup=False, highlight=False)


def _key_value(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise UsageError(f"--set takes KEY VALUE; {pair!r} has no value")
    return key, value


def _print_plan(plan, power, console) -> None:
    from rich.table import Table

    def say(text):
        console.print(text, markup=False, highlight=False)

    say(f"{plan.suite.name} on {plan.dataset}: {plan.suite.question}")
    table = Table("Side", "Runs", "Done", "Iterations", "Expected")
    search = (("search", plan.trials), ("search, at most", plan.later))
    for name, runs in (*search, *_by_side(plan.runs)):
        if runs:
            left = sum(plan.seconds.get(run.key, 0) for run in runs)
            done = sum(run.key in plan.done for run in runs)
            lengths = ", ".join(map(str, sorted({run.iterations for run in runs})))
            cells = (len(runs), done, lengths, timedelta(seconds=round(left)))
            table.add_row(name, *map(str, cells))
    console.print(table)
    if plan.later:
        say("The last trials depend on the first ones; the expected time includes them.")
    total = timedelta(seconds=round(plan.expected_seconds))
    how = "one run after another" if plan.at_once == 1 else f"{plan.at_once} runs at a time"
    say(f"Expected time: {total} in all, {how}, estimated from a few timed steps")
    primary = next(pair for pair in plan.suite.pairs if pair.primary)
    say(f"Primary pair: {primary.side} against {primary.reference}")
    say(str(power))


def _by_side(runs) -> list[tuple[str, list]]:
    names = dict.fromkeys(run.side for run in runs)
    return [(name, [run for run in runs if run.side == name]) for name in names]
