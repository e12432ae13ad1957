"""Benchmarks: the harness computes with the model as prediction loads it; before and after in one table."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from novelgpt.inference.loading import load_for_inference
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.encoding import encode
from predict.lm_eval_run import main
from tests.launched import PATIENCE
from tests.model.original_checkpoints import write_original_baichuan

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "灯塔里住着谁？", "choices": ["守灯人", "鲸鱼"], "gold": 0},
    {"question": "九月的雨下到第三天，山路变成了什么？", "choices": ["一条黄泥河", "一座石桥"], "gold": 0},
    {"question": "黄狗的名字叫什么？", "choices": ["司令", "当归", "阿福"], "gold": 1},
    {"question": "月钱有多少？", "choices": ["十二块", "三十块", "一百块"], "gold": 0},
    {"question": "老秦守了多少年的灯？", "choices": ["两年", "二十六年"], "gold": 1},
]
TASK = """
task: five_questions
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\n答案："
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def accuracy_by_hand(folder: Path) -> float:
    """Share of the questions whose true choice has the greatest likelihood."""
    chosen = ModelArguments(str(folder), "sdpa")
    tokenizer = load_tokenizer(chosen)
    model = load_for_inference(chosen, tokenizer)
    right = 0
    for entry in QUESTIONS:
        likelihoods = []
        for choice in entry["choices"]:
            prompt = f"{entry['question']}\n答案："
            ids = encode(prompt + choice, tokenizer)
            border = len(encode(prompt, tokenizer))
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            likelihoods.append(sum(float(logits[place - 1, ids[place]]) for place in range(border, len(ids))))
        right += likelihoods.index(max(likelihoods)) == entry["gold"]
    return right / len(QUESTIONS)


@pytest.mark.parametrize("family", ["tiny-random base", "Baichuan2-13B"])
def test_the_harness_scores_what_the_model_says(family: str, base_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = base_folder
    if family != "tiny-random base":  # its config.json names code that lies with it, which must not run
        folder = tmp_path / "baichuan"
        write_original_baichuan(folder, "alibi", norm_head=True)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in QUESTIONS), encoding="utf-8")
    (tmp_path / "five_questions.yaml").write_text(TASK % questions, encoding="utf-8")
    words = ["--tasks", "five_questions", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"MODEL": str(folder), "VENV": sys.prefix, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "run_lm_eval.sh"), *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["results"]["five_questions"]["acc,none"] == accuracy_by_hand(folder)
    assert results["n-samples"]["five_questions"]["effective"] == len(QUESTIONS)


def write_results(folder: Path, accuracy: float, **further: Any) -> Path:
    """Results as the harness writes them, of one group with a member and one task alone."""
    scores = {"alias": "x", "acc,none": accuracy, "acc_stderr,none": 0.03, "f1,strict": 0.5, "f1_stderr,strict": "N/A"}
    results = {
        "results": {"group": scores, "group_law": scores, "alone": scores},
        "group_subtasks": {"group": ["group_law"]},
        "n-shot": {"group_law": 0, "alone": 0},
        "model_name": folder.name,
    }
    path = folder / "lm_eval" / "model" / f"results_{accuracy}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results | further), encoding="utf-8")
    return path


def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    write_results(tmp_path / "base", 0.25)
    write_results(tmp_path / "tuned", 0.30)
    newest = write_results(tmp_path / "tuned", 0.40)
    error = f"{math.hypot(0.03, 0.03):.4f}"
    outputs = []
    for after in (tmp_path / "tuned" / "lm_eval", newest):
        main(["--compare", str(tmp_path / "base" / "lm_eval"), str(after)])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    lines = [line.replace("│", " ").split() for line in outputs[0].splitlines()]
    assert ["group", "acc", "0.2500", "0.4000", "+0.1500", error] in lines
    assert ["alone", "f1", "(strict)", "0.5000", "0.5000", "+0.0000"] in lines
    assert "group_law" not in outputs[0]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--tasks", "cmmlu"], "no model is named"),
        (["--model", "Qwen/Qwen3-0.6B"], "is not a folder that results could be written into"),
        (["--compare", "{base}", "{few}"], "was asked in two ways"),
        (["--compare", "{base}", "{chat}"], "only one of the two was asked in a chat template"),
        (["--compare", "{base}", "{empty}"], "holds no results"),
        (["--compare", "{base}", "{base}", "--seed", "1"], "does not take --seed"),
    ],
)
def test_what_cannot_be_is_said(
    words: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    paths = {
        "base": write_results(tmp_path / "base", 0.25),
        "few": write_results(tmp_path / "few", 0.25, **{"n-shot": {"alone": 5}}),
        "chat": write_results(tmp_path / "chat", 0.25, chat_template="{{ messages }}"),
        "empty": tmp_path / "empty",
    }
    with pytest.raises(SystemExit) as caught:
        main([word.format(**paths) for word in words])
    assert caught.value.code == 2
    assert cause in " ".join(capsys.readouterr().err.split())
