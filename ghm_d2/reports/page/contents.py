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
    return Document(title, comparison.question, report.answer, sections)


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
        "Each cell is the mean over the seeds, ± half its 95% t interval. AP is in percent, at the "
        "end of the training; a run that diverged counts as 0. The best mean of a column is bold, "
        "whether or not the difference is significant."
    )
    if any(row.published for row in report.rows):
        text += " Rows called published are results of others with the same method, network and "
        text += "schedule."
    notes = [progress_of(report.study), *report.study.notes]
    records = [record for side in report.study.sides for record in side.records]
    text += next((f" {note}" for record in records if (note := tables.objects_note(record))), "")
    blocks: list[Block] = [tables.results_table(report.rows), Text(text, "note")]
    for name, table in tables.other_sets_tables(report.rows).items():
        blocks += [Text(f"On {name}:"), table]
    classes = classes_table(report.study.sides)
    if classes.rows:
        blocks += [
            Text("AP by class, the rarest first, with the number of training annotations:"),
            classes,
        ]
    return [*_conditions(report), *blocks, *(Text(note) for note in notes)]


def _conditions(report: Report) -> list[Block]:
    table, picture = conditions_table(report.rows), conditions_figure(report.rows)
    return [table, picture] if table.rows and picture else []


def _differences(report: Report) -> list[Block]:
    if not report.differences:
        return []
    margin = report.study.comparison.margin
    text = (
        "Differences are side minus reference, paired by seed. The verdict is on AP: higher or "
        f"lower if p is at most 0.05, practically the same if the whole interval lies within "
        f"± {margin:g} AP, else undecided, which does not mean that there is no difference. p and "
        "the interval of AP are corrected for the number of pairs and looks. AP50 and AP75 have "
        "95% intervals over the seeds alone."
    )
    if len({d.pair.primary for d in report.differences}) > 1:
        text += (
            " The primary pair and the other pairs may each claim something false in 5 % of "
            "comparisons, so up to 10 % of comparisons may have some false claim."
        )
    of_errors = (
        "The interval of AP has two sources. SE seeds is the standard error due to chance in "
        "training. SE images is the standard error due to the choice of test images, from a "
        "bootstrap; more seeds do not reduce it (- if the runs kept no resamples). The unpaired "
        "interval does not pair the seeds and pools the variance of both sides."
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
        "Means over the finished runs. s/iteration is the median of a training, with data loading "
        "and without evaluations (± half its 95% t interval). ms/image is the time of the network "
        "at inference, without loading. Peak memory, in units of 2^20 bytes, is that of the whole "
        "process, with evaluations. GFLOPs are multiply-adds per image. Loss is the time of the "
        "forward and backward pass of the detector's losses for one batch, without the RPN's."
    )
    devices = {record.device for side in report.study.sides for record in side.records}
    blocks: list[Block] = [tables.costs_table(report.rows), Text(text, "note")]
    if len(devices) > 1:
        blocks.append(Text("The runs used different devices, so their times are not comparable."))
    return blocks


def _training(sides: list[SideRuns]) -> list[Block]:
    densities = checked(lambda: training_figures.density_figures(sides), DENSITY_FILE)
    table, ratios = steadiness_table(sides), training_figures.gradient_ratios(sides)
    text = (
        "Means over the second half of the training, ± half the 95% t interval over the seeds. "
        "Gradient is the median ratio of the classification gradient to the box gradient, as L2 "
        "norms at the features that both heads read. Variation is standard deviation / mean: of "
        "loss_cls, and of the weight of a sample in a unit region, averaged over the regions by "
        "their share of the gradient."
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
        "Iterations until AP first reaches a share of the side's own final AP, or of the highest "
        "mean final AP of all sides; linear between evaluations, ± half the 95% t interval."
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
        text = f"Not drawn, because no run's {ANALYSIS_FILE} has it: {', '.join(missing)}."
        blocks.append(Text(text, "note"))
    return blocks


def _noise(report: Report) -> list[Block]:
    if not report.noise:
        return []
    picture = checked(lambda: model_figures.noise_weights(report.noise))
    text = (
        "The weight compares two shares of the anchors matched to such boxes: their share of the "
        "loss's gradient, divided by their share of the plain gradient. The plain gradient is that "
        "of cross entropy for the score of the annotated class (the wrong one if it is spoilt), "
        "and that of smooth L1 for the box, so cross entropy and smooth L1 have weight 1. The "
        "plain gradient of a spoilt annotation is larger than that of a clean one; the weight says "
        "what the loss does with it. The ratio is the mean over the seeds, ± half its 95% t "
        "interval, on the same boxes. Below 1, spoilt annotations weigh less than clean ones. "
        "Missing boxes have no weight."
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
        text += "".join(f" {s.name} uses the settings found for {s.settings_of}." for s in shared)
        if {s.settings_of for s in shared} & {s.name for s in comparison.sides}:
            text += " That favours the side that was searched."
        blocks += [Text(text), tables.search_table(comparison.search)]
    elif comparison.command:
        blocks.append(Text("No setting was searched: each side ran as configured."))
    blocks.append(tables.setting_table(study.sides, facts))
    blocks += _versions(study.sides)
    blocks.append(Text("ghm report FOLDER, with this folder, writes this report again.", "note"))
    not_done = sum(run.status == NOT_DONE for side in study.sides for run in side.runs)
    if not_done and comparison.command:
        blocks.append(Text("The same command again trains the missing runs.", "note"))
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
