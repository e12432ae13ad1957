"""Folders as `python -m predict` writes them, on the papers of the samples, scored by the real scores."""

import json
import random
from pathlib import Path

from novelgpt.scoring.summary import reference_scores
from predict.predictions import Prediction, ScoringFields
from predict.score import score_predictions, write_scores

ROOT = Path(__file__).resolve().parents[2]


def papers() -> list[tuple[str, str, str]]:
    lines = (ROOT / "dataset" / "samples" / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:24]]
    return [(row["id"], row["title"], row["abstract"]) for row in rows]


def noised(text: str, share: float, chance: random.Random) -> str:
    return "".join(chance.choice(text) if chance.random() < share else character for character in text)


def predict_folder(
    folder: Path,
    rows: list[tuple[str, str, str]],
    share: float = 0.3,
    *,
    losses: bool = True,
    scoring: dict[int, ScoringFields] | None = None,
    predictions: dict[int, str] | None = None,
) -> Path:
    """A prediction folder as `python -m predict` writes it: every fourth answer ends in a loop."""
    chance = random.Random(str((folder.name, share)))
    entries, scored = [], []
    for number, (name, prompt, reference) in enumerate(rows):
        text = noised(reference or prompt, share, chance)[: 60 + 5 * number]
        looped = number % 4 == 1
        text = (predictions or {}).get(number, text + text[-9:] * 12 * looped)
        reason = "length" if looped else "stop"
        how = (scoring or {}).get(number, ScoringFields())
        entry = {"id": name, "prompt": prompt, "reference": reference, "prediction": text, "finish_reason": reason}
        entries.append(entry | {"prompt_tokens": len(prompt), "completion_tokens": len(text)} | how.fields())
        of_the_model = {}
        if losses and reference:
            tokens = max(1, len(reference) // 2)
            of_the_model = reference_scores([tokens * chance.uniform(1.5, 4.0), tokens, tokens // 3])
        scored.append(Prediction(name, text, reference, how, reason, of_the_model))
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / "predictions.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    write_scores(
        score_predictions(scored, workers=1),
        folder / "scores.json",
        {"seconds": 1.5, "model": folder.parent.name, "generation": {"max_new_tokens": 64, "do_sample": False}},
    )
    return folder


def write_losses(run: Path, steps: int) -> None:
    entries: list[dict[str, float]] = [{"step": 0, "eval_loss": 5.0}]
    for step in range(1, steps + 1):
        entries.append({"step": step, "loss": 5.0 / step})
        entries += [{"step": step, "eval_loss": 5.5 / step}] * (step % 4 == 0)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run / "metrics.jsonl").write_text(lines + '{"step": 9, "lo', encoding="utf-8")


def three_runs(root: Path) -> list[Path]:
    """Three run folders: two models, and a server that knows no loss; all answer the same rows."""
    groups = {number: ScoringFields(score_group=str(500 * (1 + number % 2))) for number in range(24)}
    predict_folder(root / "full" / "predict", papers(), 0.2, scoring=groups)
    predict_folder(root / "小说_lora" / "predict", papers(), 0.4, scoring=groups)
    predict_folder(root / "server" / "predict", papers(), 0.6, losses=False, scoring=groups)
    write_losses(root / "full", 12)
    write_losses(root / "小说_lora", 9)
    return [root / name for name in ("full", "小说_lora", "server")]
