"""One prediction, three ways: in batches of any size, continuously, and by a real server, all with the same text."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from novelgpt.inference.loading import load_for_inference
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.small_bases import SHIPPED_TINY
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.templates import CHATML_TEMPLATE, record_thinking, use_template
from predict.__main__ import main
from predict.generate import continuously, in_batches
from predict.rows import PromptRow
from tests.inference.endpoint_servers import write_rows
from tests.launched import PATIENCE
from tests.text.test_templates import THINKING

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--max_rows", "9", "--max_new_tokens", "10"]


def predictions(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


def stripped(folder: Path) -> list[dict[str, object]]:
    """Without the white space around answers, which `transformers serve` strips."""
    return [line | {"prediction": str(line["prediction"]).strip()} for line in predictions(folder)]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes whole characters by itself, in conversations as well: only batches hold others to that."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    shutil.copytree(SHIPPED_TINY, folder, ignore=shutil.ignore_patterns("generation_config.json"))  # which samples
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    use_template(tokenizer, "chatml", CHATML_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_by_one(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    main(["--model", str(writer), *QUICK, "--batch_size", "1", "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize(
    "words", [["--batch_size", "8"], ["--backend", "continuous"], ["--backend", "continuous", "--batch_size", "3"]]
)
def test_answers_do_not_depend_on_how_they_are_batched(
    words: list[str], writer: Path, one_by_one: Path, tmp_path: Path
) -> None:
    main(["--model", str(writer), *QUICK, *words, "--output_dir", str(tmp_path)])
    assert predictions(tmp_path) == predictions(one_by_one)
    assert len(predictions(tmp_path)) == 9
    assert not (tmp_path / "predictions.partial").exists()
    scores = [json.loads((folder / "scores.json").read_text(encoding="utf-8")) for folder in (tmp_path, one_by_one)]
    assert scores[0]["perplexity"] == pytest.approx(scores[1]["perplexity"], rel=1e-6)
    assert scores[0]["rouge-1"] == scores[1]["rouge-1"]


def test_drawn_answers_come_again_with_the_seed(base_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(base_folder), *QUICK, "--batch_size", "4", "--do_sample", "--temperature", "1.5"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([*words, "--seed", seed, "--output_dir", str(tmp_path / name)])
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b") != predictions(tmp_path / "c")


@pytest.fixture(scope="module")
def asking(base_folder: Path) -> Callable[..., list[str]]:
    """(backend, settings) -> answers of the base to a few questions."""
    chosen = ModelArguments(str(base_folder), "sdpa")
    tokenizer = load_tokenizer(chosen)
    model = load_for_inference(chosen, tokenizer)
    questions = [[{"role": "user", "content": text}] for text in ("雨夜", "灯塔在哪里？", "写一个开头。")]
    rows = [
        PromptRow(str(number), encode_prompt(asked, tokenizer), asked, "") for number, asked in enumerate(questions)
    ]

    def answers(backend: str, **settings: Any) -> list[str]:
        generation = GenerationArguments(max_new_tokens=8, **settings)
        if backend == "continuous":
            way = partial(continuously, model, tokenizer, generation, 3)
        else:
            way = partial(in_batches, model, tokenizer, generation)
        found = {number: one for some in way(rows, [[0, 1, 2]]) for number, one in some.items()}
        return [found[number].text for number in range(3)]

    return answers


@pytest.mark.parametrize("backend", ["batches", "continuous"])
def test_each_setting_is_obeyed_or_refused(backend: str, asking: Callable[..., list[str]]) -> None:
    """Draws from the likeliest token alone are greedy, however that is said; others are not."""
    greedy = asking(backend)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4}):
        assert asking(backend, do_sample=True, **{"temperature": 2.0, **narrow}) == greedy
    wide = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "top_k": 0}
    drawn = asking(backend, **wide)
    assert drawn != greedy and asking(backend, **wide) == drawn != asking(backend, **wide, seed=7)
    for settings in ({"repetition_penalty": 8.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 4}):
        if backend == "continuous":
            with pytest.raises(UserError, match=f"--{next(iter(settings))}"):
                asking(backend, **settings)
        else:
            assert asking(backend, **settings) != greedy


def test_rows_may_ask_for_scores_of_short_answers(base_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "青螺岛在哪里？", "completion": "海上", "metrics": ["exact_match"], "answers": ["海里"]},
        {"id": "2", "prompt": "谁来了？", "completion": "程小满"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    words = ["--model", str(base_folder), "--data_files", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "4"]
    main([*words, "--output_dir", str(tmp_path)])
    assert predictions(tmp_path)[0]["answers"] == ["海里"]
    lines = (tmp_path / "row_scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert ["exact_match" in json.loads(line) for line in lines] == [True, False]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` in a process of its own, for whatever folder a request names; its URL."""
    missing = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        command = [str(Path(sys.executable).with_name("transformers")), *words]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_a_server_gives_the_same_text(server: str, writer: Path, one_by_one: Path, tmp_path: Path) -> None:
    words = ["--endpoint", server, "--endpoint_model", str(writer), "--endpoint_concurrency", "4"]
    main([*words, *QUICK, "--output_dir", str(tmp_path)])
    assert stripped(tmp_path) == stripped(one_by_one)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert "perplexity" not in scores and "rouge-1" in scores


@pytest.fixture(scope="module")
def asked_to_think(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a template that leaves room for a thought unless told otherwise, trained without thoughts."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(writer, folder)
    tokenizer = load_tokenizer(ModelArguments(str(writer)))
    use_template(tokenizer, "own", THINKING)
    record_thinking(tokenizer, False)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reference", ["雨停了。", ""])
def test_a_server_asks_in_the_prompts_of_training(
    reference: str, server: str, asked_to_think: Path, tmp_path: Path
) -> None:
    """Also where nothing is said of thinking, as there is no reference."""
    rows = write_rows(tmp_path, *([reference] * 3))
    words = ["--data_files", str(rows), "--max_new_tokens", "10"]
    main(["--model", str(asked_to_think), *words, "--batch_size", "1", "--output_dir", str(tmp_path / "here")])
    served = ["--endpoint", server, "--endpoint_model", str(asked_to_think), *words]
    main([*served, "--output_dir", str(tmp_path / "there")])
    assert stripped(tmp_path / "there") == stripped(tmp_path / "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "http://127.0.0.1:9/v1", "--output_dir", "x"], "no list of models from http://127.0.0.1:9/v1"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "no model folder to write predictions beside"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--output_dir", "x", "--num_beams", "2"], "--num_beams"),
        (["--backend", "continuous", "--num_beams", "2", "--output_dir", "x"], "continuous batching has neither beams"),
        (["--backend", "continuous", "--repetition_penalty", "1.2", "--output_dir", "x"], "--repetition_penalty 1.2"),
        (["--backend", "continuous", "--no_repeat_ngram_size", "3", "--output_dir", "x"], "--no_repeat_ngram_size 3"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--no_repeat_ngram_size", "3", "--output_dir", "x"], "does not take"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--backend", "continuous", "--output_dir", "x"], "does nothing with"),
        (["--temperature", "0.2", "--output_dir", "x"], "--temperature 0.2 has no effect without --do_sample"),
        (["--top_k", "0", "--output_dir", "x"], "--top_k 0 has no effect without --do_sample"),
        (["--top_p", "0.2", "--output_dir", "x"], "--top_p 0.2 has no effect without --do_sample"),
    ],
)
def test_what_cannot_be_asked_is_said(
    words: list[str],
    message: str,
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([*words, "--model", str(base_folder), "--max_rows", "1"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_row_that_the_server_refuses_is_named_and_the_others_are_kept(
    server: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--endpoint", server, "--endpoint_model", str(base_folder), "--endpoint_concurrency", "1", *QUICK]
    with pytest.raises(SystemExit):
        main([*words, "--do_sample", "--top_k", "5", "--output_dir", str(tmp_path)])  # this server knows no top_k
    printed = capsys.readouterr().err
    assert "refuses row" in printed and "status 422" in printed and "--top_k" in printed


@pytest.mark.long
def test_hosts_that_share_no_disk_send_their_answers(base_folder: Path, tmp_path: Path) -> None:
    """Two processes whose --output_dir is another folder on each; the first one writes what one process writes."""
    words = ["--model", str(base_folder), *QUICK, "--batch_size", "2"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    processes = []
    main([*words, "--output_dir", str(tmp_path / "alone")])
    words += ["--output_dir", "out"]
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        environment = os.environ | shared | {"RANK": rank}
        processes.append(
            subprocess.Popen([sys.executable, "-m", "predict", *words], cwd=tmp_path / rank, env=environment)
        )
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    assert predictions(tmp_path / "0" / "out") == predictions(tmp_path / "alone")
    assert not (tmp_path / "1" / "out" / "predictions.jsonl").exists()
    assert not (tmp_path / "0" / "out" / "predictions.partial").exists()
