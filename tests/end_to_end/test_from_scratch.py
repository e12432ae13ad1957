"""Pretraining from random weights through the real command line, on one process, two, and with weights in parts."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import novelgpt.settings.random_weights as settings
import pretrain.__main__
from dataset.tokenizers.command import main as train_tokenizer
from novelgpt.checks.arguments import make_random_base
from novelgpt.checks.longest_batch import NAME
from novelgpt.checks.scale import describe_scale, run_tokens
from novelgpt.doctor import check_run
from novelgpt.model.random_base import WeightCounts, count_weights
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.settings.runs import PretrainRun
from tests.launched import PATIENCE
from tests.model import random_base_of_rank
from tests.model.reloaded import NEW_TOKENS, PROMPT, tensors_hash
from tests.model.test_random_base import MIDDLE, SMALL, tiny_words
from tests.ranks import run_pipeline, run_ranks

SHORT = [
    "--max_steps", "2", "--max_length", "64", "--per_device_train_batch_size", "1", "--eval_strategy", "no",
    "--save_strategy", "no",
]  # fmt: skip
# Sizes up to 50 M, each shrunken and as it is.
PARTS = [
    pytest.param(size, whole, marks=() if (size, whole) == ("gpt2-10m", False) else pytest.mark.long)
    for size in (*SMALL, *MIDDLE) for whole in (False, True)
]  # fmt: skip
VOCABULARIES = {"byte_bpe": 400, "bpe": 700, "unigram": 700, "char": 300, "words": 500}


def with_new_seed(tokenizer: Path, size: str) -> Iterator[list[str]]:
    """A run of a seed that no other had, whose base is removed in the end: processes have no other place for it."""
    chosen = tiny_words(tokenizer, size, "--seed", str(random.SystemRandom().randrange(2**31)))
    yield chosen
    shutil.rmtree(parse_arguments(PretrainRun, chosen).model.model, ignore_errors=True)


@pytest.fixture
def words(base_folder: Path) -> Iterator[list[str]]:
    yield from with_new_seed(base_folder, "qwen3-5m")


def tokenizer_of(kind: str, folder: Path) -> Path:
    """A tokenizer that the command has trained on the first lines of a novel."""
    novel = (SAMPLES / "novels" / "deng_ta_xia_de_xin.txt").read_text(encoding="utf-8")
    (folder / "lines.txt").write_text("\n".join(novel.splitlines()[:60]), encoding="utf-8")
    out = folder / kind
    train_tokenizer([str(folder / "lines.txt"), str(out), "--kind", kind, "--vocab_size", str(VOCABULARIES[kind])])
    return out


@pytest.fixture
def words_of_words(tmp_path: Path) -> Iterator[list[str]]:
    yield from with_new_seed(tokenizer_of("words", tmp_path), "gpt2-10m")


def weights_here(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The random weights that this process makes of the same words, in a place of their own."""
    with monkeypatch.context() as patch:
        patch.setattr(settings, "OUTPUT", place)
        run = parse_arguments(PretrainRun, words)
        make_random_base(run)
    return load_file(Path(run.model.model) / "model.safetensors")


def check_launch(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, zero: int) -> None:
    """Train from random weights, which are bit for bit those of a single process."""
    folder = Path(parse_arguments(PretrainRun, words).model.model)
    assert not folder.exists()
    printed = run_pipeline("pretrain", [*words, *SHORT, "--output_dir", str(tmp_path / "run")], processes, zero)
    assert printed.count("random weights of qwen3-5m") == 1 and printed.count("scale: ") == 1
    counts = count_weights(AutoModelForCausalLM.from_pretrained(folder))
    assert describe_scale(counts, 2 * processes * 64) in printed.splitlines()
    made, expected = load_file(folder / "model.safetensors"), weights_here(words, tmp_path, monkeypatch)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    record: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (record["model"], record["arguments"]["model"]["config_name"]) == (str(folder), "qwen3-5m")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"Random weights: `qwen3-5m`, seed {words[-1]}, tokenizer `tiny-random`" in card
    assert "Continued" not in card and str(tmp_path.parent) not in card
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert trained.keys() == expected.keys()
    assert not torch.equal(trained["model.norm.weight"], expected["model.norm.weight"])


def test_two_ranks_train_the_weights_that_one_process_draws(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_launch(words, tmp_path, monkeypatch, processes=2, zero=0)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "zero"), [(1, 0), (2, 3)])
def test_other_launches_train_the_same_weights(
    processes: int, zero: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_launch(words, tmp_path, monkeypatch, processes, zero)


@pytest.mark.parametrize(("size", "whole"), PARTS)
def test_weights_in_parts_are_those_of_one_process(
    size: str, whole: bool, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny_words(base_folder, size)
    words = words[:4] if whole else words
    run_ranks(random_base_of_rank.__file__, str(tmp_path), *words, logs=tmp_path)
    alone = weights_here(words, tmp_path / "alone", monkeypatch)
    (written,) = (tmp_path / "bases").glob("*/model.safetensors")
    assert tensors_hash(load_file(written)) == tensors_hash(alone)
    if settings.read_size(size)[1]["tie_word_embeddings"]:  # and stored once
        (embeddings,) = (name for name in alone if name.endswith(("wte.weight", "embed_tokens.weight")))
        alone["lm_head.weight"] = alone[embeddings]
    hashes = {(tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(2)}
    assert hashes == {tensors_hash(alone)}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_trained_tokenizer_decides_vocabulary_and_special_ids(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path / "output")
    run = parse_arguments(PretrainRun, tiny_words(tokenizer_of(kind, tmp_path), "gpt2-10m"))
    make_random_base(run)
    tokenizer = AutoTokenizer.from_pretrained(run.model.model)
    model = AutoModelForCausalLM.from_pretrained(run.model.model)
    assert model.config.vocab_size == len(tokenizer) == VOCABULARIES[kind] == model.lm_head.weight.shape[0]
    begin, end, pad = ("[MASK]", "[CLS]", "[PAD]") if kind == "words" else (None, "<|endoftext|>", "<|endoftext|>")
    ids = [mark and tokenizer.convert_tokens_to_ids(mark) for mark in (begin, end, pad)]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == ids
    assert None not in ids[1:] and tokenizer.unk_token_id not in ids[1:]
    for found in (model.config, model.generation_config):
        assert [found.bos_token_id, found.eos_token_id] == ids[:2]
    assert model.generation_config.pad_token_id == ids[2]
    # The row of a padding token gets no gradient, so one that ends texts is not named for it.
    assert model.config.pad_token_id == (ids[2] if kind == "words" else None)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    assert written.shape[1] == prompt.shape[1] + NEW_TOKENS and written.max() < VOCABULARIES[kind]


def test_a_vocabulary_of_words_is_trained_on(words_of_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = run_pipeline("pretrain", [*words_of_words, *SHORT, "--output_dir", str(out)])
    base = AutoModelForCausalLM.from_pretrained(parse_arguments(PretrainRun, words_of_words).model.model)
    assert describe_scale(count_weights(base), 2 * 64) in printed.splitlines()
    trained, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert trained.config.vocab_size == len(tokenizer) == VOCABULARIES["words"]
    marks = [trained.config.bos_token_id, trained.config.eos_token_id, trained.config.pad_token_id]
    assert marks == tokenizer.convert_tokens_to_ids(["[MASK]", "[CLS]", "[PAD]"])
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    assert max(entry["step"] for entry in entries) == 2
    for name, weight in trained.state_dict().items():
        assert weight.isfinite().all() and not torch.equal(weight, base.state_dict()[name]), name


@pytest.mark.long
def test_the_doctor_checks_a_run_from_random_weights(words: list[str]) -> None:
    findings = list(check_run("pretrain", [*words, "--max_length", "64"], time_limit=PATIENCE))
    assert [finding for finding in findings if finding.mark == "problem"] == []
    assert findings[-1].check == NAME and findings[-1].mark == "ok"


def test_the_scale_of_a_run() -> None:
    counts = WeightCounts(total=5_000_000, embeddings=2_000_000)
    line = describe_scale(counts, 50_000_000)
    assert "5.0 M weights, 3.0 M without embeddings" in line
    assert "50,000,000 tokens, 10 per weight" in line and "would take 100.0 M tokens, 20 per weight" in line
    training: Any = parse_arguments(PretrainRun, ["--num_train_epochs", "3"]).training
    assert run_tokens(1000, 10, training) == 3000
    training.max_steps, training.gradient_accumulation_steps = 7, 2
    assert run_tokens(1000, 10, training) == 7 * 2 * training.per_device_train_batch_size * 100


CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FILES = {
    "unknown.json": CONFIG | {"model_type": "lama"},
    "encoder.json": {"model_type": "clip"},
    "bert.json": CONFIG | {"model_type": "bert", "intermediate_size": 64},
    "no_family.json": {"hidden_size": 64},
    "gptj.json": {"model_type": "gptj", "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 15},
    "neox.json": CONFIG | {"model_type": "gpt_neox", "intermediate_size": 64},
    "good.json": CONFIG | {"num_key_value_heads": 4, "intermediate_size": 64},
    "heads.json": CONFIG | {"hidden_size": 66},
    "folder/config.json": CONFIG | {"num_key_value_heads": 3},
    "odd.json": CONFIG | {"hidden_size": 60},
    "width.json": CONFIG | {"head_dim": 15},
    "layers.json": CONFIG | {"num_hidden_layers": 0},
    "gpt2.json": {"model_type": "gpt2", "n_embd": 66, "n_layer": 1, "n_head": 4},
}
SIZE, OVER = ["--config_name", "qwen3-5m"], "--config_overrides"
GOOD = ["--config_name", "good.json", "--tokenizer_name", "{base}"]
# Whole remedies, to the end of the line.
OVERRIDES, EITHER = "fix: correct --config_overrides\n", "fix: correct --config_overrides, or good.json\n"
CASES: dict[str, tuple[list[str], str, str]] = {
    "unknown size": (["--config_name", "qwen3-5", *GOOD[2:]], "qwen3-5 is no ready size", "did you mean qwen3-5m?"),
    "no tokenizer": (SIZE, "needs a tokenizer", "--tokenizer_name FOLDER"),
    "tokenizer: no folder": ([*SIZE, "--tokenizer_name", "./none"], "./none is not a folder", "tokenizer.json"),
    "tokenizer: empty folder": ([*SIZE, "--tokenizer_name", "."], "holds no tokenizer", "tokenizer.json"),
    "beside --model": ([*SIZE, "--tokenizer_name", "{base}", "--model", "{base}"], "--config_name starts", "leave one"),
    "tokenizer alone": (["--tokenizer_name", "{base}"], "no --config_name says", "add --config_name"),
    "overrides alone": ([OVER, "hidden_size=64"], "no --config_name says", "add --config_name"),
    "unknown family": ([*GOOD[2:], "--config_name", "unknown.json"], "family 'lama', which transformers", "model_type"),
    "no family": ([*GOOD[2:], "--config_name", "no_family.json"], "says no model_type", "ready size"),
    "no language model": ([*GOOD[2:], "--config_name", "encoder.json"], "which has no causal language", "model_type"),
    "reads what follows": ([*GOOD[2:], "--config_name", "bert.json"], "attend to those that follow", "is_decoder"),
    "unknown setting": ([*GOOD, OVER, "hiden_size=32"], "'hiden_size', which llama does not have", "'hidden_size'"),
    "another family": ([*GOOD, OVER, "model_type=gpt2"], "sets model_type", "another --config_name"),
    "a word": ([*GOOD, OVER, "hidden_size=wide"], "hidden_size: input should be a valid integer", OVERRIDES),
    "a fraction": ([*GOOD, OVER, "num_hidden_layers=2.5"], "num_hidden_layers: input should be", OVERRIDES),
    "none": ([*GOOD, OVER, "num_hidden_layers=0"], "num_hidden_layers: input should be greater", OVERRIDES),
    "none in the file": (
        ["--config_name", "layers.json", *GOOD[2:], OVER, "hidden_size=32"], "num_hidden_layers: input should be",
        "fix: correct layers.json\n",
    ),
    "no pair": ([*GOOD, OVER, "hidden_size"], "is not written name=value", "--help"),
    "heads": (
        [*GOOD, OVER, "hidden_size=66"], "4 attention heads do not divide hidden_size=66",
        "set hidden_size to a multiple of 8, or another num_attention_heads, in --config_overrides\n",
    ),
    "another number of heads": (
        [*GOOD, OVER, "num_attention_heads=5"], "5 attention heads do not divide hidden_size=64",
        "set hidden_size to a multiple of 10, or another num_attention_heads, in --config_overrides\n",
    ),
    "heads in the file": (
        ["--config_name", "heads.json", *GOOD[2:], OVER, "num_hidden_layers=1"],
        "--config_name heads.json: 4 attention heads do not divide hidden_size=66",
        "set hidden_size to a multiple of 8, or another num_attention_heads, in heads.json\n",
    ),
    "heads by the family's names, without rotary positions": (
        ["--config_name", "gpt2.json", *GOOD[2:]], "4 attention heads do not divide n_embd=66",
        "set n_embd to a multiple of 4, or another n_head, in gpt2.json\n",
    ),
    "heads by the usual names": (
        ["--config_name", "gpt2-10m", *GOOD[2:], OVER, "hidden_size=66"],
        "4 attention heads do not divide hidden_size=66",
        "set hidden_size to a multiple of 4, or another n_head, in --config_overrides\n",
    ),
    "heads of a family that does not look": (
        ["--config_name", "baichuan-10m-rope", *GOOD[2:], OVER, "hidden_size=66"],
        "4 attention heads do not divide hidden_size=66", "set hidden_size to a multiple of 8,",
    ),
    "groups": (
        [*GOOD, OVER, "num_key_value_heads=3"], "3 key and value heads do not divide 4 attention heads",
        "set num_key_value_heads to a divisor of 4, or num_attention_heads to a multiple of 3, in --config_overrides\n",
    ),
    "groups in the file": (
        ["--config_name", "folder", *GOOD[2:]], "3 key and value heads do not divide 4 attention heads",
        "or num_attention_heads to a multiple of 3, in folder/config.json\n",
    ),
    "odd heads": (
        [*GOOD, OVER, "hidden_size=60"], "4 heads of hidden_size=60 hold 15 numbers each",
        "set hidden_size to a multiple of 8, or another num_attention_heads, in --config_overrides\n",
    ),
    "odd heads in the file": (
        ["--config_name", "odd.json", *GOOD[2:]], "4 heads of hidden_size=60 hold 15 numbers each", "in odd.json\n",
    ),
    "odd width of heads": (
        ["--config_name", "width.json", *GOOD[2:]], "heads of head_dim=15 hold an odd number",
        "set head_dim to an even number in width.json\n",
    ),
    "another type": ([*GOOD, OVER, "attention_bias=often"], "'attention_bias'", EITHER),
    "vocabulary": ([*GOOD, OVER, "vocab_size=900"], "1,000 tokens, more than the vocab_size of 900", "at most 900"),
    "no vocabulary": ([*GOOD, OVER, "vocab_size=None"], "sets vocab_size to nothing", "leave it out"),
    "heads of no width": ([*SIZE, *GOOD[2:], OVER, "head_dim=0"], "heads of head_dim=0", "head_dim to 2 or more"),
    "odd heads of Baichuan": (
        ["--config_name", "baichuan-10m-rope", *GOOD[2:], OVER, "hidden_size=260"],
        "4 heads of hidden_size=260 hold 65 numbers each", "set hidden_size to a multiple of 8,",
    ),
    "sizes that only the first use finds": (
        ["--config_name", "gptj.json", *GOOD[2:]], "--config_name gptj.json: The size of tensor",
        "fix: correct gptj.json\n",
    ),
    "unknown activation": ([*GOOD, OVER, "hidden_act=foo"], "'foo' is unknown", EITHER),
    "unknown activation of a ready size": (
        [*SIZE, *GOOD[2:], OVER, "hidden_act=foo"], "'foo' is unknown", OVERRIDES,
    ),
    "special id": ([*GOOD, OVER, "eos_token_id=5"], "sets eos_token_id, which can have no effect", "tokenizer decides"),
    "precision": ([*GOOD, OVER, "dtype=bfloat16"], "sets dtype, which can have no effect", "--bf16"),
    "theta by a name of another family": (
        ["--config_name", "neox.json", *GOOD[2:], OVER, "rope_theta=5"], "rope_theta=5 of --config_overrides has no",
        "leave it out",
    ),
    "more than there is memory": (
        [*GOOD, OVER, "hidden_size=65536,head_dim=1048576,num_attention_heads=65536,num_key_value_heads=65536"],
        "allocate memory", "smaller size",
    ),
    "divisor": ([*GOOD, "--make_vocab_size_divisible_by", "0"], "0 is out of range", "64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told_and_leaves_nothing(
    name: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, cause, remedy = CASES[name]
    (tmp_path / "typed" / "folder").mkdir(parents=True)
    for file, content in FILES.items():
        (tmp_path / "typed" / file).write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "typed")
    monkeypatch.setattr(settings, "OUTPUT", tmp_path / "output")
    words = [word.replace("{base}", str(base_folder)) for word in given]
    with pytest.raises(SystemExit) as refused:
        pretrain.__main__.main([*words, "--output_dir", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "  fix:"))]
    assert refused.value.code == 2 and len(lines) == 2, lines
    assert cause in lines[0] and remedy in f"{lines[1]}\n", lines
    assert {path.name for path in tmp_path.iterdir()} == {"typed"}
