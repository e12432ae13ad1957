"""With --load_best_model_at_end, what is saved and what is recorded are of one step, the best of the checkpoints."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainerState

from finetune.__main__ import main as finetune
from finetune_lora.__main__ import main as finetune_lora
from novelgpt.checks.arguments import check_arguments
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import FinetuneRun
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.training import throughput
from novelgpt.training.checkpoints.folders import best_checkpoint, checkpoints, damage, step_of
from novelgpt.training.run_folder import RESULT_FILES
from novelgpt.training.trainer import NovelTrainer
from tests.faults.runs import write_base, write_rows
from tests.ranks import run_pipeline

# A learning rate under which a few rows are soon learnt by heart, and what is evaluated on gets worse.
RATE = "0.03"
QUICK = """
    --precision fp32 --max_length 64 --packing False --per_device_train_batch_size 4 --logging_steps 1
    --eval_strategy steps --save_strategy steps --lr_scheduler_type constant --warmup_steps 0 --guards False
    --stop_check 0 --preflight False --disable_tqdm True --load_best_model_at_end
"""


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    throughput.CEILING_SIZE["cpu"] = 32
    folder = write_base(base_folder, tmp_path_factory.mktemp("best") / "base", dropout=0.0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)  # sure of itself, so that it can get worse
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to train on, and others of a like kind."""
    folder = tmp_path_factory.mktemp("rows")
    lines = write_rows(folder, 16)[1].read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("train.jsonl", lines[:4]), ("valid.jsonl", lines[8:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    return folder / "train.jsonl", folder / "valid.jsonl"


def run(main: Any, base: Path, files: tuple[Path, Path], folder: Path, more: str) -> dict[str, Any]:
    """run.json of a finished run."""
    words = ["--model", str(base), "--train_files", str(files[0]), "--valid_files", str(files[1])]
    main([*words, "--output_dir", str(folder), "--learning_rate", RATE, *QUICK.split(), *more.split()])
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def recorded(folder: Path) -> dict[int, float]:
    """Evaluation losses while the run went on, by step; the evaluation of what is saved comes after them."""
    found: dict[int, float] = {}
    for entry in entries(folder):
        if "eval_loss" in entry:
            found.setdefault(entry["step"], entry["eval_loss"])
    return found


def figures(base: Path, folder: Path, rows: Path) -> tuple[float, float]:
    """Loss and token accuracy of the weights in a folder, by transformers and peft alone."""
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    adapter = (folder / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if adapter else folder)
    model = (PeftModel.from_pretrained(model, folder) if adapter else model).eval()
    total, tokens, hits = 0.0, 0, 0
    for row in map(json.loads, rows.read_bytes().splitlines()):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        encoded = encode_conversation(messages, tokenizer)[0]
        labels = torch.tensor(encoded.labels[1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1]
        total += float(functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        tokens += int((labels != IGNORE_INDEX).sum())
        hits += int((logits.argmax(-1) == labels)[labels != IGNORE_INDEX].sum())
    return total / tokens, hits / tokens


ALL_KEPT = "--max_steps 8 --eval_steps 2 --save_steps 2 --save_total_limit 9"


@pytest.fixture(scope="module")
def whole(
    base: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run whose checkpoints are all there, and its run.json."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(finetune, base, files, folder, ALL_KEPT)


def check_saved(base: Path, folder: Path, rows: Path, description: dict[str, Any], figure: str = "eval_loss") -> None:
    """All that is recorded of a finished run is true of what lies in its folder."""
    results = description["results"]
    loss, accuracy = figures(base, folder, rows)
    assert results["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert results["eval_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    closing = [entry for entry in entries(folder) if "eval_loss" in entry][-1]
    assert (closing["step"], closing["eval_loss"]) == (results["saved_step"], results["eval_loss"])
    logged = [entry[figure] for entry in entries(folder) if entry["step"] == closing["step"] and figure in entry]
    assert logged == [closing[figure]] * len(logged)
    check_result_files(folder, results)


def check_result_files(folder: Path, results: dict[str, Any]) -> None:
    """What the examples of transformers leave at the root of a run, by the keys of transformers 5."""
    train, evaluation, both, state = (json.loads((folder / name).read_text(encoding="utf-8")) for name in RESULT_FILES)
    speeds = {"runtime", "samples_per_second", "steps_per_second"}
    assert train.keys() == {f"train_{name}" for name in speeds | {"loss", "samples"}} | {"epoch", "total_flos"}
    assert evaluation.keys() > {f"eval_{name}" for name in speeds | {"loss", "samples"}} | {"epoch", "perplexity"}
    assert both == evaluation | train
    assert (evaluation["eval_loss"], train["train_runtime"]) == (results["eval_loss"], results["train_runtime"])
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
    read = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert read.global_step == read.max_steps == max(entry["step"] for entry in entries(folder))
    assert read.log_history == entries(folder) == state["log_history"]
    assert train["epoch"] == read.epoch >= evaluation["epoch"]
    # It is for others as well, those of the checkpoints for the run that resumes.
    assert str(folder.parent) not in (folder / "trainer_state.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("main", [pytest.param(finetune, marks=pytest.mark.long), finetune_lora])
def test_the_best_step_is_saved_and_recorded(
    main: Any, base: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = run(main, base, files, tmp_path / "run", "--max_steps 8 --eval_steps 2 --save_steps 2")
    losses = recorded(tmp_path / "run")
    saved = min((loss, step) for step, loss in losses.items() if step)[1]
    assert description["results"]["saved_step"] == saved < 8  # the last step is another one, or nothing is tried here
    assert losses[8] > losses[saved] + 0.01
    check_saved(base, tmp_path / "run", files[1], description)
    printed = capsys.readouterr().out
    assert f"-> {losses[saved]:.4f}" in printed and f"those of step {saved} of 8" in printed
    shown = re.findall(rf"step +{saved}/8  eval loss ([\d.]+)", printed)
    assert shown == [f"{losses[saved]:.4f}"] * 2


@pytest.mark.parametrize("more", ["--save_only_model", "--metric_for_best_model perplexity"])
def test_whatever_else_is_set(more: str, base: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    words = more + " --max_steps 5 --eval_steps 2 --save_steps 2"
    description = run(finetune, base, files, tmp_path / "run", words)
    losses = recorded(tmp_path / "run")
    assert description["results"]["saved_step"] == min((loss, step) for step, loss in losses.items() if step)[1]
    check_saved(base, tmp_path / "run", files[1], description)


def test_a_figure_of_which_more_is_better(base: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    words = "--max_steps 8 --eval_steps 2 --save_steps 4 --metric_for_best_model token_accuracy"
    description = run(finetune, base, files, tmp_path / "run", words)
    accuracies = {
        entry["step"]: entry["eval_token_accuracy"] for entry in entries(tmp_path / "run") if "eval_loss" in entry
    }
    best = max(accuracies[4], accuracies[8])  # the others are not saved
    assert description["results"]["saved_step"] == (4 if accuracies[4] == best else 8)
    check_saved(base, tmp_path / "run", files[1], description, "eval_token_accuracy")


def test_a_run_gone_on_with_ends_with_the_best_of_both_parts(
    whole: tuple[Path, dict[str, Any]], base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    undisturbed, description = whole
    # The folder as a kill after step 6 leaves it, and moved since.
    shutil.copytree(undisturbed, tmp_path / "moved")
    for path in (*tmp_path.glob("moved/checkpoint-8"), *tmp_path.glob("moved/*.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path = tmp_path / "moved" / "run.json"
    left = {key: value for key, value in description.items() if key not in ("results", "finished")}
    path.write_text(json.dumps(left | {"status": "running"}), encoding="utf-8")
    for name in RESULT_FILES:
        (tmp_path / "moved" / name).write_text('{"train_loss": "of another attempt"}', encoding="utf-8")
    again = run(finetune, base, files, tmp_path / "moved", ALL_KEPT)
    assert again["resumed"][0]["checkpoint"] == "checkpoint-6"
    assert again["results"]["saved_step"] == description["results"]["saved_step"] < 6
    assert again["results"]["eval_loss"] == description["results"]["eval_loss"]
    check_saved(base, tmp_path / "moved", files[1], again)


def test_a_signal_while_the_best_is_evaluated_leaves_all_checkpoints_as_they_are(
    whole: tuple[Path, dict[str, Any]], base: Path, files: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    undisturbed, description = whole
    load = NovelTrainer._load_best_model

    def load_and_signal(trainer: NovelTrainer) -> None:
        load(trainer)
        assert trainer.reloaded
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(NovelTrainer, "_load_best_model", load_and_signal)
        with pytest.raises(SystemExit) as stopped:
            run(finetune, base, files, tmp_path / "run", ALL_KEPT)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not [name for name in RESULT_FILES if (tmp_path / "run" / name).exists()]
    steps = [step_of(folder) for folder in checkpoints(tmp_path / "run")]
    assert steps == [8, 6, 4, 2]
    for step in steps:  # above all not the best's weights beside the states of the last step
        found = [folder / f"checkpoint-{step}" for folder in (tmp_path / "run", undisturbed)]
        assert damage(found[0]) is None
        assert len({(folder / "model.safetensors").read_bytes() for folder in found}) == 1
    again = run(finetune, base, files, tmp_path / "run", ALL_KEPT)
    assert again["results"]["saved_step"] == description["results"]["saved_step"]
    assert again["results"]["eval_loss"] == description["results"]["eval_loss"]
    check_saved(base, tmp_path / "run", files[1], again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "zero"),
    [
        pytest.param(finetune, 0, marks=pytest.mark.long),
        pytest.param(finetune, 2, marks=pytest.mark.long),
        pytest.param(finetune, 3, marks=pytest.mark.long),
        (finetune_lora, 3),
    ],
)
def test_ranks_load_the_best_together(
    main: Any, zero: int, base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    words = f"--model {base} --train_files {files[0]} --valid_files {files[1]} --output_dir {tmp_path / 'run'}"
    more = "--max_steps 6 --eval_steps 2 --save_steps 2 --per_device_train_batch_size 2 --train_special_tokens never"
    more = more if main is finetune_lora else more.replace("--train_special_tokens never", "")
    pipeline = main.__module__.removesuffix(".__main__")
    run_pipeline(pipeline, f"{words} --learning_rate {RATE} {QUICK} {more}".split(), 2, zero)
    description = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    losses = recorded(tmp_path / "run")
    assert description["results"]["saved_step"] == min((loss, step) for step, loss in losses.items() if step)[1] < 6
    check_saved(base, tmp_path / "run", files[1], description)


def history(**figures: float) -> list[dict[str, Any]]:
    return [{"step": int(step.removeprefix("s")), "eval_loss": loss} for step, loss in figures.items()]


@pytest.mark.parametrize(
    ("entries", "steps", "best"),
    [
        (history(s0=1.0, s2=3.0, s4=2.0, s6=2.0), (2, 4, 6), 4),  # nothing of step 0 is saved; the first of equals
        (history(s2=3.0, s4=1.0, s6=2.0), (2, 6), 6),  # not evaluated where it is saved
        (history(s2=float("nan"), s4=2.0), (2, 4), 4),
        (history(s2=float("nan"), s4=float("inf")), (2, 4), None),
        (history(s2=1.0), (), None),
    ],
)
def test_the_best_is_one_that_is_there(
    entries: list[dict[str, Any]], steps: tuple[int, ...], best: int | None, tmp_path: Path
) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in steps]
    training = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    assert best_checkpoint(folders, entries, training) == (tmp_path / f"checkpoint-{best}" if best else None)


@pytest.mark.parametrize(
    ("figure", "better"),
    [("perplexity", False), ("eval_bits_per_character", False), ("rep4_char", False), ("rouge-l", True)],
)
def test_what_is_better_follows_from_the_figure(figure: str, better: bool, tmp_path: Path) -> None:
    assert TrainArguments(output_dir=str(tmp_path), metric_for_best_model=figure).greater_is_better == better
    opposite = TrainArguments(output_dir=str(tmp_path), metric_for_best_model=figure, greater_is_better=not better)
    assert opposite.greater_is_better != better


@pytest.mark.parametrize(("figure", "remedy"), [("accuracy", "use one of loss"), ("rouge-l", "--predict_during_eval")])
def test_a_figure_that_evaluations_do_not_give_is_refused(
    figure: str, remedy: str, base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    training = TrainArguments(output_dir=str(tmp_path / "run"), use_cpu=True, metric_for_best_model=figure)
    data = ConversationArguments(train_files=[str(files[0])])
    with pytest.raises(UserError) as error:
        check_arguments(FinetuneRun(ModelArguments(str(base)), data, training))
    assert remedy in error.value.remedy
    assert not (tmp_path / "run").exists()
