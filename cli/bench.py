"""`ghm bench`: the losses alone, and whole training steps."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import DataError, UsageError

from ._console import emit, out, tell, user_errors
from ._options import (
    PASS_UNKNOWN,
    Dataset,
    Device,
    Json,
    Overrides,
    make_folder,
    pick_device,
    set_device,
)

app = typer.Typer(
    help="Time the losses beside others' implementations; `ghm bench step`: whole training steps.",
    rich_markup_mode="rich",
)
Output = Annotated[Path | None, typer.Option(help="A file that the JSON is written to as well.")]


@app.callback(invoke_without_command=True)
def losses(
    context: typer.Context,
    samples: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Pairs of anchor and class; repeatable. 8000000 by default."),
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="100,000 to 100,000,000 samples too: takes minutes.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this loss, such as GHM-C; repeatable.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    classes: Annotated[int, typer.Option(min=1, help="Classes K.")] = 80,
    positives: Annotated[int, typer.Option(min=1, help="Boxes of the regression losses.")] = 4_000,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each loss.")] = 9,
    seconds: Annotated[
        float, typer.Option(min=0, help="Of a loss at one size; then it sits the rest out.")
    ] = 30,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time the losses, and what memory they take, beside others' implementations.

    Forward and backward, interleaved, smallest size first. Others are used where they are
    installed; what they want beside labels is made before the clock starts.
    """
    with user_errors():
        if context.invoked_subcommand is not None:
            _refuse_options(context)
            return
        from ._logs import quiet

        quiet()
        from ghm_d2.bench import losses as bench

        from ._progress import progress

        if dtype not in bench.DTYPES:
            raise UsageError(f"--dtype is one of {', '.join(bench.DTYPES)}, not {dtype!r}")
        _check_output(output)
        setting = bench.Setting(
            device=_device(device), dtype=dtype, samples=_sizes(samples, growth), classes=classes,
            positives=positives, rounds=rounds, seconds=seconds, only=tuple(only or ()),
        )  # fmt: skip
        with progress() as shown:
            result = bench.benchmark(setting, shown)
        _finish(result, output, as_json, _print_losses)


@app.command(
    context_settings=PASS_UNKNOWN,
    epilog="Example: ghm bench step --config configs/quick/retinanet_ghm.yaml --steps 40",
)
def step(
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(help="A RetinaNet's YAML file, or the name of a shipped one.")
    ] = "quick/retinanet_ghm.yaml",
    dataset: Dataset = None,
    device: Device = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 20,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time whole training steps with each pair of losses, and how long they wait for data.

    The detectors start alike and take the same batches in turn, a step each.
    """
    with user_errors():
        from ._logs import quiet

        quiet()
        from ghm_d2.bench import step as bench_step
        from ghm_d2.config import load_config
        from ghm_d2.data.catalog import apply_to_config, data_label

        from ._progress import progress

        for key in {bench_step.ARCH, bench_step.CLS, bench_step.REG} & set((overrides or [])[::2]):
            raise UsageError(f"{key} is what the sides differ in: leave it out")
        _check_output(output)
        cfg = load_config(config, overrides or [])
        set_device(cfg, _device(device), overrides or [])
        apply_to_config(cfg, dataset)
        with progress() as shown:
            result = bench_step.benchmark_steps(cfg, steps, shown)
        result["config"], result["dataset"] = config, data_label(cfg.DATASETS.TRAIN[0])
        _finish(result, output, as_json, _print_steps)


@app.command(epilog="Example: ghm bench show results/bench/losses.json --markdown")
def show(
    file: Annotated[Path, typer.Argument(help="What --output wrote.")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The ratios, or the steps, as a table in Markdown.")
    ] = False,
) -> None:
    """Print the tables of a benchmark that was made before."""
    from ghm_d2.reports.document import Table, markdown_table

    with user_errors():
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            steps = {"losses": False, "steps": True}[result["what"]]
            if markdown:
                table = Table(*(_step_rows if steps else _ratio_rows)(result))
                out.print(markdown_table(table), markup=False, highlight=False, end="")
            else:
                (_print_steps if steps else _print_losses)(result)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file} is not what ghm bench --output writes") from None


def _refuse_options(context: typer.Context) -> None:
    command = context.invoked_subcommand
    for name in context.params:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise UsageError(f"options go after the name: ghm bench {command} --help lists them")


def _device(name: str) -> str:
    device = pick_device(name)
    if device == "mps":
        raise UsageError("ghm bench measures on cpu and cuda, not on mps: use --device cpu")
    return device


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: name a file in it")
    make_folder(output.parent)


def _sizes(samples: list[int] | None, growth: bool) -> tuple[int, ...]:
    from ghm_d2.bench.aims import HEADLINE
    from ghm_d2.bench.losses import GROWTH

    return (*(samples or [HEADLINE]), *(GROWTH if growth else ()))


def _finish(result: dict, output: Path | None, as_json: bool, human) -> None:
    from ghm_d2.files import write_json

    if output is not None:
        write_json(output, result)
    emit(result, as_json=as_json, human=lambda: human(result))


def _print_losses(result: dict) -> None:
    results, setting = result["results"], result["setting"]
    measured = [r for r in results if r["seconds"]]
    sizes = sorted({r["samples"] for r in measured if r["kind"] != "boxes"})
    for size in _headline(sizes):
        anchors = max(1, size // setting["classes"])
        what = f"{anchors:,} anchors x {setting['classes']} classes"
        _print_size([r for r in measured if r["samples"] == size], what, setting)
    boxes = [r for r in measured if r["kind"] == "boxes"]
    if boxes:
        _print_size(boxes, f"{setting['positives']:,} boxes", setting)
    if len(sizes) > 1:
        _print_growth(measured, sizes)
    if result["ratios"]:
        _print_table(*_ratio_rows(result))
    for name, reason in result["missing"].items():
        tell(f"{name}: {reason}")
    for r in results:
        if r["note"]:
            tell(f"{r['peer']} at {r['samples']:,} samples: {r['note']}")
    _print_machine(result)


def _headline(sizes: list[int]) -> list[int]:
    """The size that the table is about, if any was measured."""
    from ghm_d2.bench.aims import HEADLINE

    return [HEADLINE] if HEADLINE in sizes else sizes[-1:]


def _print_size(results: list[dict], what: str, setting: dict) -> None:
    tell(f"{what}, {setting['dtype']}, forward + backward; x: of ours of the same kind")
    rows = [
        (
            r["peer"],
            _digits(1000 * r["seconds"]),
            _digits(r["ratio"]),
            _digits(r["gb_per_s"]),
            f"{_digits(100 * r['share_of_copy'])} %",
            _digits(r["memory"]),
        )
        for r in results
    ]
    _print_table(("loss", "ms", "x", "GB/s", "of a copy", "memory / gradient"), rows)


def _print_growth(measured: list[dict], sizes: list[int]) -> None:
    cells: dict[str, dict[int, str]] = {}
    for r in measured:
        if r["kind"] != "boxes":
            nanoseconds = 1e9 * r["seconds"] / r["elements"]
            cells.setdefault(r["peer"], {})[r["samples"]] = _digits(nanoseconds)
    rows = [(peer, *(found.get(n, "-") for n in sizes)) for peer, found in cells.items()]
    tell("ns a sample, by millions of samples")
    _print_table(("loss", *(f"{n / 1e6:g}" for n in sizes)), rows)


def _ratio_rows(result: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [(r["name"], _digits(r["value"]), *_aim(r)) for r in result["ratios"]]
    return ("ratio", "measured", "aim", "met"), rows


def _step_rows(result: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    of_ce, of_detectron2 = result["references"]
    rows = [
        (
            side["name"],
            _digits(side["seconds"]),
            _digits(side["ratios"][of_ce]),
            _digits(side["ratios"][of_detectron2]),
            _digits(side["loss_ms"]),
            _digits(side["peak_memory_mb"]),
        )
        for side in result["sides"]
    ]
    return ("losses", "s/step", "x CE", "x Detectron2", "loss ms", "peak MB"), rows


def _print_steps(result: dict) -> None:
    batch = f"{result['images_per_batch']} images a batch"
    tell(f"{result['config']} on {result['dataset']}, {batch}")
    _print_table(*_step_rows(result))
    data = result["data"]
    share = f"{100 * data['share']:.1f} % of a step of {data['side']}"
    tell(f"waiting for data: {share}, DATALOADER.NUM_WORKERS {data['num_workers']}")
    _print_machine(result)


def _print_machine(result: dict) -> None:
    machine = result["machine"]
    threads = f"{machine['cpu']}, {machine['threads']} threads"
    torch = f"torch {result['packages']['torch']}, ghm_d2 {result['code_version']}"
    tell(f"{machine['gpu'] or threads}, kernel {result['kernel']}, {torch}")


def _print_table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from ghm_d2.reports.document import Table
    from ghm_d2.reports.tables import report_table

    table = report_table(Table(headers, rows))
    if not out.is_terminal:
        table.box = None
    out.print(table)


def _aim(ratio: dict) -> tuple[str, str]:
    if ratio["aim"] is None:
        return "-", "-"
    return ratio["aim"], "yes" if ratio["met"] else "no"


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
