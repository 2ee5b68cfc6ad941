"""The command `ghm`. Each subcommand imports heavy modules inside its body."""

import typer

from .common.options import PASS_UNKNOWN
from .compare import CompareCommand, compare
from .configs import configs
from .data.commands import app as data_app
from .doctor import doctor
from .eval import evaluate
from .export import export
from .predict import predict
from .report import report
from .train import train

app = typer.Typer(
    name="ghm",
    help="Train, evaluate and compare detectors with the Gradient Harmonizing Mechanism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(
    "train",
    context_settings=PASS_UNKNOWN,
    epilog="Example: ghm train --config configs/quick/retinanet_ghm.yaml --dataset my_folder "
    "--seed 1 SOLVER.MAX_ITER 600",
)(train)
app.command(
    "eval",
    context_settings=PASS_UNKNOWN,
    epilog="Example: ghm eval --weights runs/retinanet_ghm/model_best.pth",
)(evaluate)
app.command(
    "compare",
    cls=CompareCommand,
    epilog="Example: ghm compare two-stage vs one-stage --dataset my_folder",
)(compare)
app.command(
    "predict",
    epilog="Example: ghm predict --weights runs/retinanet_ghm/model_best.pth photo.jpg",
)(predict)
app.command(
    "export",
    context_settings=PASS_UNKNOWN,
    epilog="Example: ghm export --weights runs/retinanet_ghm/model_best.pth --format onnx",
)(export)
app.command("report", epilog="Example: ghm report runs")(report)
app.command("configs", epilog="Example: ghm configs")(configs)
app.command("doctor", epilog="Example: ghm doctor")(doctor)
app.add_typer(data_app, name="data")


def main() -> None:
    """The console script's entry point."""
    app()
