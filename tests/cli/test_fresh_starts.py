"""Small jobs of the commands, each started as a user does: by an interpreter that has imported nothing yet.

Prepared novels and the doctor have such tests of their own, and so has pretraining.
"""

import json
from pathlib import Path

import pytest

from novelgpt.settings.commands import COMMANDS
from novelgpt.settings.paths import SAMPLES
from tests.model.original_checkpoints import write_original_baichuan
from tests.model.original_qwen1 import write_original_qwen1
from tests.predict.test_lm_eval_run import write_results
from tests.typed import typed

PAPERS = str(SAMPLES / "papers" / "valid.jsonl")
NOVEL = str(SAMPLES / "novels" / "shan_zhong_yao_pu.txt")
QUICK = ["--max_steps", "2", "--max_length", "256", "--eval_strategy", "no", "--eval_on_start", "False"]
QUICK += ["--save_strategy", "no", "--stop_check", "0"]
ELSEWHERE = {"pretrain", "data novels", "doctor"}
HERE = {
    "score", "report", "continuations", "data conversations", "finetune", "lora", "merge", "predict", "chat",
    "data tokens", "data preview", "export llama", "export qwen2", "export safetensors", "lm-eval", "convert-config",
    "demo", "data preferences", "data tokenizer", "data held-out",
}  # fmt: skip


def ends_well(folder: Path, *words: str, read: str | None = None, **variables: str) -> str:
    done = typed(*words, folder=folder, read=read, **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_command_is_started_so_somewhere() -> None:
    assert set(COMMANDS) == HERE | ELSEWHERE and not HERE & ELSEWHERE


def test_scores_and_their_report(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "雨", "prediction": "雨下了一夜。", "reference": "雨停了。"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    ends_well(tmp_path, "score", "predictions.jsonl", "--output", "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["rouge-1"] > 0
    ends_well(tmp_path, "report", ".", "--output", "page")
    assert "雨停了" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_rows_of_papers_and_of_a_novel(tmp_path: Path) -> None:
    ends_well(tmp_path, "data", "conversations", PAPERS, "rows.jsonl", "--task", "title_to_abstract")
    assert rows_of(tmp_path / "rows.jsonl")[0].keys() >= {"id", "source"}
    pair = {"instruction": "写雨", "chosen": "雨下了一夜。", "rejected": "下雨了。"}
    (tmp_path / "rated.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    ends_well(tmp_path, "data", "preferences", "rated.jsonl", "pairs.jsonl")
    assert rows_of(tmp_path / "pairs.jsonl")[0]["prompt"] == [{"role": "user", "content": "写雨"}]
    ends_well(tmp_path, "continuations", NOVEL, "asked.jsonl", "--lengths", "100", "--prompt_characters", "200")
    assert rows_of(tmp_path / "asked.jsonl")[0]["text_completion"]


def test_settings_of_another_tool(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "雨", "output": "停了"}\n', encoding="utf-8")
    given = {"finetuning_type": "lora", "model_name_or_path": "m", "dataset": "rows", "dataset_dir": "."}
    (tmp_path / "theirs.yaml").write_text(json.dumps(given), encoding="utf-8")
    said = ends_well(tmp_path, "convert-config", "theirs.yaml", "-o", "ours.yaml")
    assert said.splitlines()[-1].endswith("python -m cli lora --config ours.yaml")
    assert (tmp_path / "ours.yaml").is_file()


@pytest.mark.long
def test_a_list_of_works_that_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "佚名_灯塔.txt").write_bytes(Path(NOVEL).read_bytes())
    ends_well(tmp_path, "data", "novels", "raw", "prepared", "--held_out_share", "0")
    (tmp_path / "choice.yaml").write_text("name: mine\nworks:\n  - {author: 佚名, title: 灯塔, era: modern}\n", "utf-8")
    ends_well(tmp_path, "data", "held-out", "choice.yaml", "prepared", "list.json")
    assert "佚名" in (tmp_path / "list.json").read_text(encoding="utf-8")


@pytest.mark.long
def test_from_data_to_a_merged_adapter_that_talks(tmp_path: Path) -> None:
    ends_well(tmp_path, "data", "tokens", NOVEL, "tokens", "--model", "tiny")
    ends_well(tmp_path, "data", "tokenizer", NOVEL, "tokenizer", "--kind", "byte_bpe", "--vocab_size", "400")
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert " trained, " in ends_well(tmp_path, "data", "preview", PAPERS, "--model", "tiny")
    ends_well(tmp_path, "finetune", *QUICK, "--output_dir", "full")
    ends_well(tmp_path, "lora", *QUICK, "--output_dir", "lora", MODEL="tiny")
    ends_well(tmp_path, "merge", "lora", "merged")
    ends_well(tmp_path, "predict", "--max_rows", "2", "--max_new_tokens", "4", MODEL="merged")
    assert len(rows_of(tmp_path / "merged" / "predict" / "predictions.jsonl")) == 2
    said = ends_well(tmp_path, "chat", "--model", "merged", "--max_new_tokens", "4", read="你好\n/exit\n")
    assert "/exit" in said


@pytest.mark.long
def test_exports(tmp_path: Path) -> None:
    write_original_baichuan(tmp_path / "baichuan")
    write_original_qwen1(tmp_path / "qwen1")
    ends_well(tmp_path, "export", "safetensors", "baichuan", "safe")
    ends_well(tmp_path, "export", "llama", "safe", "llama")
    ends_well(tmp_path, "export", "qwen2", "qwen1", "qwen2")
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("llama", "qwen2")]
    assert kinds == ["llama", "qwen2"]


@pytest.mark.long
def test_benchmarks_before_and_after(tmp_path: Path) -> None:
    write_results(tmp_path / "base", 0.25)
    write_results(tmp_path / "tuned", 0.50)
    assert "+0.2500" in ends_well(tmp_path, "lm-eval", "--compare", "base/lm_eval", "tuned/lm_eval", COLUMNS="140")


@pytest.mark.long
def test_the_demo(tmp_path: Path) -> None:
    said = ends_well(
        tmp_path, "demo", "all of it", MODEL="none", NPROC="none", RANK="7", WORLD_SIZE="8", LOCAL_RANK="7"
    )
    assert list(json.loads((tmp_path / "all of it" / "summary.json").read_text())) == [
        "base", "pretrain", "finetune", "finetune_lora", "comparisons",
    ]  # fmt: skip
    assert "bits per character by pretraining" in said
