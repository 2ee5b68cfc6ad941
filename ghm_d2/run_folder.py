"""The names of the files in a run's folder, each written once."""

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"  # the run's RunRecord
METRICS_FILE = "metrics.jsonl"
DENSITY_FILE = "density.jsonl"
DIVERGENCE_FILE = "divergence.jsonl"  # the steps with a NaN or infinite loss or gradient
EVENTS = "events.out.tfevents.*"  # a pattern: TensorBoard names its files
LOG_FILE = "log.txt"
TRACKER_FILE = "trackers.json"  # the run's ids in SOLVER.TRACKERS
PROFILE_FILE, TRACE_FILE = "profile.json", "trace.json"  # written by ghm train --profile
LAUNCH_FILE = "launch_id"  # id of the torchrun launch that started or resumed the run
LOCK_FILE = "lock"  # locked while the run is trained
LAST_CHECKPOINT = "last_checkpoint"  # holds the name of the checkpoint to resume from
CHECKPOINTS = "model_[0-9]*.pth"  # a pattern: the number is the last iteration done
FINAL_WEIGHTS, BEST_WEIGHTS = "model_final.pth", "model_best.pth"
PICTURE_FILE = "detections.png"
RESULTS_FILES = "detections_*_results.json"  # a pattern: results to submit to an evaluation server
ANALYSIS_FILE, WORST_FILE = "analysis.json", "worst.jpg"
DETECTIONS_FILE = "detections.json"  # detections on the first test set, in COCO's result format

# `ghm eval --output` writes this into a folder of its own, beside DETECTIONS_FILE and PICTURE_FILE
EVALUATION_FILE = "eval.json"

# A folder with one of these holds a run
RUN_MARKS = (RUN_FILE, METRICS_FILE, LAST_CHECKPOINT, EVENTS)
# All files that `ghm train` writes; --overwrite removes them
WRITTEN_BY_TRAINING = (
    *RUN_MARKS,
    CONFIG_FILE,
    DENSITY_FILE,
    DIVERGENCE_FILE,
    LAUNCH_FILE,
    TRACKER_FILE,
    PROFILE_FILE,
    TRACE_FILE,
    LOG_FILE,
    CHECKPOINTS,
    FINAL_WEIGHTS,
    BEST_WEIGHTS,
    PICTURE_FILE,
    RESULTS_FILES,
    DETECTIONS_FILE,
    ANALYSIS_FILE,
    WORST_FILE,
)
