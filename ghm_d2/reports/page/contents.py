"""The contents of a report, in the order in which they appear."""

from functools import partial

from ghm_d2.reports import tables
from ghm_d2.reports.classes import classes_table
from ghm_d2.reports.conditions import conditions_table
from ghm_d2.reports.figures import gradients as gradient_figures
from ghm_d2.reports.figures import models as model_figures
from ghm_d2.reports.figures import training as training_figures
from ghm_d2.reports.figures.conditions import conditions_figure
from ghm_d2.reports.figures.differences import differences_figure
from ghm_d2.reports.page.document import Block, Document, Picture, Section, Text, is_picture
from ghm_d2.reports.report import Report
from ghm_d2.reports.runs import NOT_DONE, SeedRun, SideRuns, checked
from ghm_d2.reports.statistics.learning_speed import speed_table
from ghm_d2.reports.statistics.steadiness import steadiness_table
from ghm_d2.reports.study import Study
from ghm_d2.run_folder import ANALYSIS_FILE, DENSITY_FILE, METRICS_FILE


def document_of(report: Report) -> Document:
    """The whole report.

    Raises:
        DataError: a file of a run does not have the known format.
    """
    study = report.study
    comparison = study.comparison
    title = f"{comparison.name} on {comparison.dataset}" if comparison.dataset else comparison.name
    sections = [
        Section("Results", _results(report)),
        Section("Differences", _differences(report)),
        Section("Cost", _costs(report)),
        Section("Training", _training(study.sides)),
        Section("The trained models", _models(study.sides)),
        Section("Annotation noise", _noise(report)),
        Section("The worst images", _worst(study.sides)),
        Section("How it was run", _how(study)),
    ]
    sections = [section for section in sections if section.blocks]
    return Document(title, comparison.question, report.verdict, sections)


def progress_of(study: Study) -> str:
    """Say how many of the planned runs finished, and which did not."""
    missing = study.unfinished
    text = f"{study.planned - len(missing)} of {study.planned} runs finished."
    if missing:
        listed = "; ".join(f"{side.name}, seed {run.seed}: {run.status}" for side, run in missing)
        text += f" Not finished: {listed}."
    return text


def _results(report: Report) -> list[Block]:
    text = (
        "Mean over the seeds, ± half the 95% t interval; AP in percent, at the end of the "
        "training, and 0 where it diverged. Bold: the best mean of a column, whether or not it "
        "differs from the others."
    )
    if any(row.published for row in report.rows):
        text += " Published rows are other people's, of the same method, network and schedule."
    notes = [progress_of(report.study), *report.study.notes]
    records = [record for side in report.study.sides for record in side.records]
    text += next((f" {note}" for record in records if (note := tables.objects_note(record))), "")
    blocks: list[Block] = [tables.results_table(report.rows), Text(text, "note")]
    for name, table in tables.other_sets_tables(report.rows).items():
        blocks += [Text(f"On {name}:"), table]
    classes = classes_table(report.study.sides)
    if classes.rows:
        blocks += [Text("AP by class, the rarest first, with its training annotations:"), classes]
    return [*_conditions(report), *blocks, *(Text(note) for note in notes)]


def _conditions(report: Report) -> list[Block]:
    table, picture = conditions_table(report.rows), conditions_figure(report.rows)
    return [table, picture] if table.rows and picture else []


def _differences(report: Report) -> list[Block]:
    if not report.differences:
        return []
    margin = report.study.comparison.margin
    text = (
        "Side minus reference, of the same seeds. The verdict is on AP: higher or lower where p is "
        f"at most 0.05, practically the same where the whole interval lies within ± {margin:g} AP, "
        "else undecided, which does not mean that there is no difference. p and the interval of AP "
        "are corrected for the number of pairs and looks; AP50 and AP75 have 95% intervals over "
        "the seeds alone."
    )
    of_errors = (
        "What the intervals of AP are made of: the standard error that the chance in training "
        "leaves (SE seeds), the one that the choice of test images leaves however many seeds there "
        "are (SE images, a bootstrap; - where runs have kept no replicates), and beside the paired "
        "interval the one that does not pair the seeds, with the variance pooled of both sides."
    )
    picture = differences_figure([report])
    return [
        *([picture] if picture else []),
        tables.differences_table(report.differences),
        Text(text, "note"),
        tables.errors_table(report.differences),
        Text(of_errors, "note"),
    ]


def _costs(report: Report) -> list[Block]:
    text = (
        "Means over the finished runs. s/iteration: median of a training, without evaluations, "
        "data loading included (± half the 95% t interval); ms/image: the network at inference, "
        "without loading; peak memory (2^20 bytes): of the whole process, evaluations included; "
        "GFLOPs: multiply-adds of one image; loss: forward and backward of the detector's losses "
        "of one batch, the RPN's left out."
    )
    devices = {record.device for side in report.study.sides for record in side.records}
    blocks: list[Block] = [tables.costs_table(report.rows), Text(text, "note")]
    if len(devices) > 1:
        blocks.append(Text("The runs were not all made on one device: times do not compare."))
    return blocks


def _training(sides: list[SideRuns]) -> list[Block]:
    densities = checked(lambda: training_figures.density_figures(sides), DENSITY_FILE)
    table, ratios = steadiness_table(sides), training_figures.gradient_ratios(sides)
    text = (
        "Of the second half of the training, ± half the 95% t interval over the seeds. Gradient: "
        "the median ratio of classification's to the boxes', L2 norms at the features that both "
        "heads read. Variation: standard deviation / mean, of loss_cls, and of the weight that a "
        "sample of a unit region has, averaged over the regions by their share of the gradient."
    )
    steadiness: list[Block] = [table, Text(text, "note")] if table.rows else []
    return [
        *steadiness,
        training_figures.learning_curves(sides)
        or Text("No learning curves: no run has left evaluations in metrics.jsonl."),
        *_speed(sides),
        training_figures.loss_curves(sides)
        or Text("No loss curves: no run has left losses in metrics.jsonl."),
        *([ratios] if ratios else []),
        *densities,
    ]


def _speed(sides: list[SideRuns]) -> list[Block]:
    table = checked(lambda: speed_table(sides), METRICS_FILE)
    text = (
        "Iterations until AP first reaches that share of its own final AP, or of the highest mean "
        "final AP of all sides, linear between evaluations; ± half the 95% t interval."
    )
    return [table, Text(text, "note")] if table.rows else []


def _models(sides: list[SideRuns]) -> list[Block]:
    """The figures made from analyses, and a line that names the missing ones."""
    drawn = {
        "gradient norms": lambda: gradient_figures.gradient_norms(sides, "cls"),
        "gradient norms of boxes": lambda: gradient_figures.gradient_norms(sides, "reg"),
        "weights of samples": lambda: gradient_figures.sample_weights(sides, "cls"),
        "shares of the gradient": lambda: gradient_figures.gradient_shares(sides, "cls"),
        "weights of coordinates": lambda: gradient_figures.sample_weights(sides, "reg"),
        "shares of the boxes' gradient": lambda: gradient_figures.gradient_shares(sides, "reg"),
        "precision and recall": lambda: model_figures.precision_recall(sides),
        "a confusion matrix": lambda: model_figures.confusion(sides),
    }
    blocks: list[Block] = []
    missing = []
    for name, make in drawn.items():
        picture = checked(make)
        if picture is None:
            missing.append(name)
        else:
            blocks.append(picture)
    if missing:
        text = f"Left out, since no run's {ANALYSIS_FILE} has it: {', '.join(missing)}."
        blocks.append(Text(text, "note"))
    return blocks


def _noise(report: Report) -> list[Block]:
    if not report.noise:
        return []
    picture = checked(lambda: model_figures.noise_weights(report.noise))
    text = (
        "Weight: the share that the anchors matched to such boxes have of the loss's gradient, "
        "over their share of the plain gradient: of the score of the annotated (spoilt: the "
        "wrong) class against cross entropy's, of the box against smooth L1's. Cross entropy and "
        "smooth L1 themselves have 1 throughout. A spoilt annotation's plain gradient is larger "
        "than a clean one's; the weight says what the loss makes of that. Ratio: mean over the "
        "seeds, ± half its 95% t interval, on the same boxes; below 1 the spoilt annotations "
        "weigh less than the clean ones. Boxes that the noise left out have no weight to measure."
    )
    return [tables.noise_table(report.noise), Text(text, "note"), picture]


def _worst(sides: list[SideRuns]) -> list[Block]:
    """One folded contact sheet per side."""
    blocks: list[Block] = []
    missing = []
    for i, side in enumerate(sides):
        run = next((run for run in side.finished if run.worst), None)
        if run and run.worst and is_picture(run.worst):
            caption = checked(partial(_worst_caption, run))
            blocks.append(Picture(f"worst_{i + 1}.jpg", run.worst, side.name, caption, folded=True))
        else:
            missing.append(side.name)
    if missing and blocks:
        blocks.append(Text(f"No pictures of: {', '.join(missing)}.", "note"))
    return blocks or [Text("No run has left pictures of its worst images.", "note")]


def _worst_caption(run: SeedRun) -> str:
    text = f"Seed {run.seed}. Truth beside detections, worst first."
    rows = run.analysis.get("worst") or []
    listed = "; ".join(f"{row['file_name']}: {row['missed']} / {row['false']}" for row in rows)
    return f"{text} Objects missed / false detections: {listed}." if listed else text


def _how(study: Study) -> list[Block]:
    comparison = study.comparison
    blocks: list[Block] = [Text(comparison.command, "code")] if comparison.command else []
    facts = [
        ("Data set", comparison.dataset),
        ("Budget", comparison.budget),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Looks", ", ".join(f"at {look} seeds" for look in comparison.looks)),
    ]
    blocks.append(tables.sides_table(study.sides))
    if comparison.search:
        text = (
            "The learning rate and the weight of the box loss were searched first, by the same "
            "rule for each side that the table names. Trials are judged on images that the "
            "comparison is not judged on; the full-length ones decide."
        )
        shared = [s for s in comparison.sides if s.settings_of]
        text += "".join(f" {s.name} takes what {s.settings_of} found." for s in shared)
        if {s.settings_of for s in shared} & {s.name for s in comparison.sides}:
            text += " That favours the side that was searched."
        blocks += [Text(text), tables.search_table(comparison.search)]
    elif comparison.command:
        blocks.append(Text("No setting was searched: each side ran as configured."))
    blocks.append(tables.setting_table(study.sides, facts))
    blocks += _versions(study.sides)
    blocks.append(Text("ghm report of this folder writes this report again.", "note"))
    not_done = sum(run.status == NOT_DONE for side in study.sides for run in side.runs)
    if not_done and comparison.command:
        blocks.append(Text("The same command again does the runs that are not done.", "note"))
    return blocks


def _versions(sides: list[SideRuns]) -> list[Block]:
    """List the code that trained each side, unless it was the same for all."""
    made_by: dict[str, dict[str, None]] = {}
    for side in sides:
        for record in side.records:
            made_by.setdefault(record.code_version, {})[side.name] = None
    if len(made_by) < 2:
        return []
    listed = "; ".join(f"{version}: {', '.join(names)}" for version, names in made_by.items())
    return [Text(f"The runs were made by several versions of ghm_d2. {listed}.")]
