"""What rank 0 of a run shows and writes during training: progress, metrics.jsonl, loss.png, TensorBoard, trackers.

There is one tracked run per run folder, however often it resumes; trackers that fail do not end it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from novelgpt.scoring.rouge import METRICS
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.charts import INSTALL_REMEDY, figure_png, lettering
from novelgpt.settings.run_record import only_json, this_attempt
from novelgpt.settings.terminal import SECONDS_BETWEEN_LINES, say_above_bars

# The plot may take this share of the run's time.
PLOT_SHARE = 0.02
# By tracker: the variables that identify its run and let it resume. Those that the user has set stay.
RUN_VARIABLES = {
    "wandb": ("WANDB_RUN_ID", "WANDB_RESUME"),
    "swanlab": ("SWANLAB_RUN_ID", "SWANLAB_RESUME"),
}


@contextmanager
def tolerate_write_errors(what: str, reported: set[str]) -> Iterator[None]:
    """Report once that `what` cannot be written, and continue training: a full disk ends it where weights are saved.

    Args:
        what: is written within.
        reported: what has been reported already.
    """
    try:
        yield
    except OSError as error:
        if what not in reported:
            reported.add(what)
            say_above_bars(f"{what} cannot be written any more ({error.strerror or error}); training continues")


class RunRecorder(TrainerCallback):
    """Appends every log entry to metrics.jsonl and redraws loss.png, from step 1 on, so that both survive a crash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[dict[str, Any]] = []
        self.next_plot = 0.0
        self.reported: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the entries up to the checkpoint; later ones are written again."""
        this_attempt().reach(state.global_step)
        if state.is_world_process_zero and state.global_step:
            self.history = [dict(entry) for entry in state.log_history]
            with tolerate_write_errors("metrics.jsonl", self.reported):
                atomic_write(self.folder / "metrics.jsonl", "".join(map(_line, self.history)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the entry; draw unless the last drawing is too recent."""
        if not state.is_world_process_zero or logs is None:
            return
        entry = {"step": state.global_step, **logs}
        self.history.append(entry)
        self.write(entry)
        if state.global_step and time.monotonic() >= self.next_plot:
            self.draw()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note how far this attempt has come."""
        this_attempt().reach(state.global_step)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. A number that is not finite is null there, as JSON has none."""
        with (
            tolerate_write_errors("metrics.jsonl", self.reported),
            (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(_line(entry))

    def draw(self) -> None:
        """Redraw loss.png now."""
        start = time.monotonic()
        with tolerate_write_errors("loss.png", self.reported):
            complete = draw_losses(self.history, self.folder / "loss.png")
            if not complete and INSTALL_REMEDY not in self.reported:
                self.reported.add(INSTALL_REMEDY)
                say_above_bars(f"no font has all letters of loss.png's title, which shows codes; {INSTALL_REMEDY}")
        now = time.monotonic()
        # The first drawings come at step 1, whatever they cost: loading the plotting library is most of it.
        self.next_plot = 0.0 if self.history[-1]["step"] <= 1 else now + (now - start) / PLOT_SHARE

    def close(self) -> None:
        """Draw the last entries."""
        if self.history:
            self.draw()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(only_json(entry), ensure_ascii=False, allow_nan=False) + "\n"


def draw_losses(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw training and evaluation loss over steps; the file is written atomically.

    Args:
        history: log entries with "step" and "loss" or "eval_loss" (nats per token). An entry with "saved_step" names
            the step whose weights the run ends with: its loss is marked, in place of the last.
        path: of the PNG; the title is its folder's name.

    Returns:
        Whether the machine's fonts have all letters of the title.
    """
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    saved = next((entry["saved_step"] for entry in reversed(history) if "saved_step" in entry), None)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        # Entries may come from JSON, where numbers that are not finite are null; they become gaps.
        points = [(entry["step"], math.nan if entry[key] is None else entry[key]) for entry in history if key in entry]
        if points:
            last = points[-1]
            mark = f", saved (step {saved})" if key == "eval_loss" and last[0] == saved else ""
            points.sort(key=lambda point: point[0])  # those of the saved weights come last, whatever their step
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style if len(points) > 1 else "o", label=label, markersize=4, linewidth=1.5)
            axes.annotate(f"{last[1]:.3f}{mark}", last, textcoords="offset points", xytext=(6, -3))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    name = lettering(path.resolve().parent.name)
    axes.set_title(name.text, fontfamily=list(name.families), parse_math=False)
    axes.grid(alpha=0.3)
    axes.margins(x=0.08)
    if axes.lines:
        axes.legend()
    atomic_write(path, figure_png(figure))
    return name.complete


class Curves(TensorBoardCallback):
    """TensorBoard events of a writer of the first process, until `close`; nothing on the others, which have none."""

    def __init__(self, writer: SummaryWriter | None) -> None:
        super().__init__(writer)
        self.reported: set[str] = set()
        self._hook = threading.excepthook
        threading.excepthook = self._on_error_in_thread

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        """Write the settings."""
        with tolerate_write_errors("TensorBoard's events", self.reported):
            super().on_train_begin(*arguments, **keywords)

    def on_log(self, *arguments: Any, **keywords: Any) -> None:
        """Write the figures. Errors of the writer's thread surface at a later call."""
        with tolerate_write_errors("TensorBoard's events", self.reported):
            super().on_log(*arguments, **keywords)

    def close(self) -> None:
        """Write what is left."""
        if self.tb_writer is not None:
            with tolerate_write_errors("TensorBoard's events", self.reported):
                self.tb_writer.close()
        threading.excepthook = self._hook

    def _on_error_in_thread(self, arguments: Any) -> None:
        """Stay silent on errors of the writer's thread: they surface at the next call, which reports them."""
        if type(arguments.thread).__module__ != event_file_writer.__name__:
            self._hook(arguments)

    def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
        """Stay open: an evaluation may follow, whose events the stock callback would write to a folder of its own."""


class ProgressBar(ProgressCallback):
    """The stock bar with time left, and one line of figures per log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print the figures of one log entry."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            line = (
                f"step {state.global_step:>5}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.2f}  token accuracy {logs['eval_token_accuracy']:.1%}"
            )
            if "eval_bits_per_character" in logs:
                line += f"  bits/character {logs['eval_bits_per_character']:.3f}"
            if "eval_rouge-l" in logs:
                rouge = "/".join(f"{logs[f'eval_{metric}']:.3f}" for metric in METRICS)
                line += f"  rouge-1/2/l {rouge}  rep4 {logs['eval_rep4_char']:.3f}"
            line += f"  over {logs['eval_tokens']:,} tokens in {timedelta(seconds=round(logs['eval_runtime']))}"
        elif "loss" in logs:
            line = (
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  "
                + (f"balancing loss {logs['aux_loss']:.3f}  " if "aux_loss" in logs else "")
                + f"lr {logs['learning_rate']:.2e}  grad norm {logs.get('grad_norm', 0.0):.3f}  "
                f"{logs['tokens_per_second']:,.0f} tokens/s  "
                + (f"{logs['utilisation']:.0%} of peak  " if "utilisation" in logs else "")
                + f"{logs['memory_gb']:.2f} GB  {timedelta(seconds=round(logs['seconds_left']))} left"
            )
        else:
            return
        say_above_bars(line)

    def on_prediction_step(self, *arguments: Any, **keywords: Any) -> None:
        """Label the stock bar."""
        super().on_prediction_step(*arguments, **keywords)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("evaluation", refresh=False)


class ProgressLines(ProgressBar):
    """The same lines without a bar, for logs and pipes; during a long evaluation, lines on its progress."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0  # of the current evaluation
        self.started = self.next_line = 0.0

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        """No bar."""

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        """No bar."""

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Print the progress from time to time."""
        now = time.monotonic()
        if not self.batches:
            self.started, self.next_line = now, now + SECONDS_BETWEEN_LINES
        self.batches += 1
        total = len(eval_dataloader)
        if state.is_world_process_zero and now >= self.next_line and self.batches < total:
            left = (now - self.started) / self.batches * (total - self.batches)
            say_above_bars(f"evaluating: {self.batches:,} of {total:,} batches, {timedelta(seconds=round(left))} left")
            self.next_line = now + SECONDS_BETWEEN_LINES

    def on_evaluate(self, *arguments: Any, **keywords: Any) -> None:
        """Start the count of the next evaluation."""
        self.batches = 0

    def on_train_end(self, *arguments: Any, **keywords: Any) -> None:
        """No bar."""


def name_tracked_run(training: TrainArguments, folder: Path, run_id: str) -> None:
    """Name the run of trackers after its folder; where the folder's run resumes, theirs does.

    Args:
        training: `report_to` names the trackers.
        folder: of the run.
        run_id: letters and digits that stay the same when the run resumes; "" on processes other than the first, which
            alone reports to trackers.
    """
    if training.run_name is None:
        training.run_name = folder.name
    for tracker in training.report_to or []:
        if tracker in RUN_VARIABLES:
            identity, resume = RUN_VARIABLES[tracker]
            if run_id and identity not in os.environ:
                os.environ[identity] = run_id
                os.environ.setdefault(resume, "allow")


def guard_trackers(trainer: Trainer) -> None:
    """Wrap the trackers of a trainer: one that fails is reported once and left out from then on."""
    for name in trainer.args.report_to or []:
        callback = trainer.pop_callback(INTEGRATION_TO_CALLBACK[name])
        if callback is not None:
            start = _start_swanlab if name == "swanlab" and trainer.is_world_process_zero() else None
            trainer.add_callback(_GuardedTracker(callback, name, start))


class _GuardedTracker(TrainerCallback):
    """Passes each event to a tracker until it fails: without network, login or space, or by a bug."""

    def __init__(self, tracker: TrainerCallback, name: str, start: Callable[[str | None], None] | None = None) -> None:
        """`start` takes the name of the run before training starts."""
        self.tracker: TrainerCallback | None = tracker
        self.name, self.start = name, start

    def forward(self, event: str, *arguments: Any, **keywords: Any) -> None:
        """Call the tracker's method for an event."""
        if self.tracker is None:
            return
        try:
            if event == "on_train_begin" and self.start is not None:
                self.start(arguments[0].run_name)
            getattr(self.tracker, event)(*arguments, **keywords)
        except Exception as error:  # of any kind: no failure of a tracker is worth ending a training
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            say_above_bars(f"--report_to {self.name} fails and is left out; training continues: {reason}")


def _start_swanlab(name: str | None) -> None:
    """Start the run: transformers asks for the current one, and SwanLab 0.10 raises an error where there is none."""
    import swanlab

    if not swanlab.has_run():
        identity, resume = (os.environ.get(variable) for variable in RUN_VARIABLES["swanlab"])
        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=name, id=identity, resume=resume)


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(_GuardedTracker, _event, functools.partialmethod(_GuardedTracker.forward, _event))
