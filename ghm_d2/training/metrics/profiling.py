"""`ghm train --profile`: measures with torch.profiler where a step's time goes."""

import functools
from pathlib import Path

from detectron2.engine import HookBase
from torch.profiler import ProfilerActivity, profile, record_function

from ghm_d2.files import write_json
from ghm_d2.progress import Progress
from ghm_d2.run_folder import PROFILE_FILE, TRACE_FILE

WARM_UP, STEPS = 5, 10
# the trainer marks them with `part`; the losses are within the forward pass
PARTS = ("data", "forward", "losses", "backward", "optimizer")
_PREFIX = "ghm_d2 "


def part(name: str):
    """Return a context that a profile shows as one of `PARTS`; without a profile it is cheap."""
    return record_function(_PREFIX + name)


class ProfileHook(HookBase):
    """Profiles a few steps of a training, and reports where their time went.

    It writes profile.json, with the milliseconds per step of each part, and trace.json, which
    https://ui.perfetto.dev and chrome://tracing display.
    """

    def __init__(self, folder: Path, device: str, progress: Progress):
        self._folder, self._progress = folder, progress
        self._activities = [ProfilerActivity.CPU]
        if device.startswith("cuda"):
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._steps = 0
        self._restore: list = []

    def before_step(self):
        if self.trainer.iter == self.trainer.start_iter + WARM_UP:
            self._mark_losses()
            self._profile = profile(activities=self._activities)
            self._profile.__enter__()

    def after_step(self):
        self._steps += self._profile is not None
        if self._profile and self._steps == STEPS:
            self._end()

    def after_train(self):
        if self._profile:
            self._end()

    def _mark_losses(self) -> None:
        """Mark the `losses` of the detector, or of its RPN and ROI heads."""
        for module in self.trainer.detector.modules():
            if callable(getattr(type(module), "losses", None)):
                module.losses = _marked(module.losses)
                self._restore.append(module)

    def _end(self) -> None:
        done = max(self._steps, 1)  # `_steps` is 0 if the first one was cut off
        found, self._profile = self._profile, None
        for module in self._restore:
            del module.losses
        found.__exit__(None, None, None)
        milliseconds = parts_of(found, done)
        write_json(self._folder / PROFILE_FILE, {"steps": done, "ms": milliseconds})
        found.export_chrome_trace(str(self._folder / TRACE_FILE))
        total = sum(milliseconds.values())
        listed = ", ".join(f"{k} {v:.1f} ms ({v / total:.0%})" for k, v in milliseconds.items())
        self._progress.message(
            f"a step takes {total:.1f} ms: {listed} (mean of {done} steps; details in "
            f"{self._folder / TRACE_FILE})"
        )


def parts_of(found: profile, steps: int) -> dict[str, float]:
    """Return the milliseconds per step of each of `PARTS`; "forward" excludes the losses.

    On a GPU the time of a part is its time on the GPU or on the CPU, whichever is longer.
    """
    events = {event.key.removeprefix(_PREFIX): event for event in found.key_averages()}
    times = {}
    for name in PARTS:
        event = events.get(name)
        longer = max(event.cpu_time_total, event.device_time_total) if event else 0.0
        times[name] = longer / 1000 / steps
    times["forward"] = max(times["forward"] - times["losses"], 0.0)
    return times


def _marked(losses):
    @functools.wraps(losses)
    def marked(*args, **kwargs):
        with part("losses"):
            return losses(*args, **kwargs)

    return marked
