"""Random weights by configuration: numbers, first losses, the same bits everywhere, folders that anyone loads."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

import novelgpt.settings.random_weights as settings
from novelgpt.checks.arguments import make_random_base
from novelgpt.checks.scale import OPTIMAL_TOKENS_PER_WEIGHT
from novelgpt.model.loading import load_model
from novelgpt.model.random_base import _write, _write_elsewhere, build_random_model, count_weights
from novelgpt.model.random_config import random_config
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.random_weights import ready_sizes
from novelgpt.settings.runs import PretrainRun
from tests.launched import PATIENCE
from tests.model.reloaded import NEW_TOKENS, PROMPT, weights_hash

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["gpt2-10m", "qwen3-5m", "baichuan-10m-rope", "baichuan-10m-alibi"]
MIDDLE = ["llama-43m", "glm-30m", "qwen3-26m"]
UP_TO_50M = [*SMALL, *(pytest.param(name, marks=pytest.mark.long) for name in MIDDLE)]
# What the names say, and the published model, which is smaller than its name.
STATED = {"qwen3-0.6b": 596_049_920, "gpt2-124m": 124_439_808}
ROWS, TOKENS = 8, 256


def config_of(size: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a ready size with the vocabulary in its file."""
    _, content = settings.read_size(size)
    content |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None} | overrides
    return CONFIG_MAPPING[content["model_type"]].from_dict(content)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model: PreTrainedModel = architecture(config)
    return model


def gpt2(c: Any) -> tuple[int, int]:
    """(weights of embeddings and head, of all the rest); tied, biases everywhere, two norms a layer and one."""
    d = c.n_embd
    layer = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    return (c.vocab_size + c.n_positions) * d, c.n_layer * layer + 2 * d


def llama(c: Any) -> tuple[int, int]:
    d, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    layer = 2 * d * d + 2 * d * kv + 3 * d * c.intermediate_size + 2 * d
    return 2 * c.vocab_size * d, c.num_hidden_layers * layer + d


def glm(c: Any) -> tuple[int, int]:
    """As Llama, with biases of queries, keys and values."""
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * d * q + 2 * d * kv + q + 2 * kv + 3 * d * c.intermediate_size + 2 * d
    return 2 * c.vocab_size * d, c.num_hidden_layers * layer + d


def qwen3(c: Any) -> tuple[int, int]:
    """Tied, with a norm of the queries' heads and one of the keys'."""
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * d * q + 2 * d * kv + 2 * c.head_dim + 3 * d * c.intermediate_size + 2 * d
    return c.vocab_size * d, c.num_hidden_layers * layer + d


def baichuan(c: Any) -> tuple[int, int]:
    d = c.hidden_size
    return 2 * c.vocab_size * d, c.num_hidden_layers * (4 * d * d + 3 * d * c.intermediate_size + 2 * d) + d


FORMULAS: dict[str, Callable[[Any], tuple[int, int]]] = {
    "gpt2": gpt2, "llama": llama, "glm": glm, "qwen3": qwen3, "baichuan": baichuan,
}  # fmt: skip


@pytest.mark.parametrize("size", ready_sizes())
def test_the_number_of_weights_is_that_of_the_formula_and_of_the_name(size: str) -> None:
    config = config_of(size)
    counts = count_weights(on_meta(config))
    embeddings, inner = FORMULAS[config.model_type](config)
    assert (counts.embeddings, counts.inner) == (embeddings, inner)
    number = size.split("-")[1]
    named = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
    assert counts.total == STATED[size] if size in STATED else abs(counts.total / named - 1) < 0.04


def test_two_sizes_have_the_layers_and_heads_that_others_name_them_by() -> None:
    llama_43m, gpt2_124m = config_of("llama-43m"), config_of("gpt2-124m")
    heads = (llama_43m.hidden_size, llama_43m.num_hidden_layers, llama_43m.num_attention_heads)
    assert heads == (256, 12, 8)
    total = count_weights(on_meta(gpt2_124m)).total
    assert round((total - gpt2_124m.n_positions * gpt2_124m.n_embd) / 1e6, 2) == 123.65


@pytest.mark.parametrize("page", ["docs/from_scratch.md", "docs/zh/from_scratch.md"])
def test_the_page_has_the_numbers_of_each_size(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line.split(" | ")[1:] for line in lines if line.startswith("| `") and " x " in line}
    assert rows.keys() == set(ready_sizes())
    for size, row in rows.items():
        config: Any = config_of(size)
        counts = count_weights(on_meta(config))
        described = config.to_dict()
        groups = described.get("num_key_value_heads", config.num_attention_heads)
        assert row[:2] == [
            f"{config.num_hidden_layers} x {config.hidden_size}",
            f"{config.num_attention_heads} / {groups}",
        ]
        numbers = (config.vocab_size, config.max_position_embeddings, counts.total, counts.inner)
        assert row[2:6] == [f"{number:,}" for number in numbers]
        assert row[6] == f"{OPTIMAL_TOKENS_PER_WEIGHT * counts.total / 1e6:,.0f} M |"


@pytest.mark.parametrize("size", UP_TO_50M)
def test_the_loss_at_step_0_is_that_of_a_guess(size: str) -> None:
    config = config_of(size)
    model = build_random_model(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=generator)
    with torch.no_grad():
        result = model(input_ids=ids, labels=ids)
    variance = float(result.logits.float().var(-1).mean())
    assert abs(float(result.loss) - (math.log(config.vocab_size) + variance / 2)) < 0.05
    # Of a normalised state times a row of the head; Baichuan's rows of the second kind have length 1.
    width = config.hidden_size
    expected = 1.0 if size == "baichuan-10m-alibi" else width * config.initializer_range**2
    assert variance == pytest.approx(expected, rel=0.2)


def test_weights_depend_on_the_seed_alone() -> None:
    config = config_of("qwen3-5m", num_hidden_layers=2, vocab_size=512)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    hashes = []
    try:
        for seed, used in ((1, 1), (1, 2), (2, 1)):
            torch.set_num_threads(used)
            hashes.append(weights_hash(build_random_model(config, seed)))
            torch.rand(3)
    finally:
        torch.set_num_threads(threads)
    assert hashes[0] == hashes[1] != hashes[2]
    torch.set_rng_state(before)
    first = torch.rand(1)
    torch.set_rng_state(before)
    build_random_model(config, 3)
    assert torch.equal(torch.rand(1), first)  # what others draw next is the same


# What is added to the residual stream, in families that draw it smaller the deeper the model.
RESIDUAL = {"gpt2": ("c_proj",), "glm": ("o_proj", "down_proj")}
ONE_OF_EACH_FAMILY = ["gpt2-10m", "glm-30m", "llama-43m", "qwen3-5m", "baichuan-10m-rope", "baichuan-10m-alibi"]


@pytest.mark.parametrize("size", ONE_OF_EACH_FAMILY)
def test_each_family_is_initialised_as_its_paper_or_code_says(size: str) -> None:
    family = size.split("-")[0]
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 8}
    model = build_random_model(config_of(size, vocab_size=512, pad_token_id=7, **layers), 1)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        part, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not weight.any(), name
        elif "norm" in part or part.startswith("ln_"):
            assert (weight == 1).all(), name
        elif size == "baichuan-10m-alibi" and part == "lm_head":
            bound = 1 / math.sqrt(weight.shape[1])  # Kaiming-uniform, a = sqrt(5)
            assert weight.abs().max() <= bound and float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        else:
            share = math.sqrt(2 * 8) if part in RESIDUAL.get(family, ()) else 2 if part == "wpe" else 1
            assert float(weight.std()) == pytest.approx(0.02 / share, rel=0.02), name
            assert abs(float(weight.mean())) < 0.02 / share * 0.05, name
    assert any(name.endswith("bias") for name in weights) == (family in ("gpt2", "glm"))
    # The row of the padding token; GPT-2's code has none.
    assert bool(model.get_input_embeddings().weight[7].any()) == (family == "gpt2")


def tiny_words(base: Path, size: str, *words: str) -> list[str]:
    """Options of a model of this family, small enough to be made in no time."""
    width, inner = ("n_embd", "n_inner") if size.startswith("gpt2") else ("hidden_size", "intermediate_size")
    head = ",head_dim=16" if size.startswith(("qwen3", "glm")) else ""
    overrides = f"{width}=64,num_hidden_layers=2,{inner}=96{head}"
    return ["--config_name", size, "--tokenizer_name", str(base), "--config_overrides", overrides, *words]


def made(words: list[str]) -> PretrainRun:
    """A run with these words, whose random weights are there."""
    run = parse_arguments(PretrainRun, words)
    make_random_base(run)
    return run


def reloaded(folders: list[str]) -> dict[str, tuple[str, list[int]]]:
    """What a process with transformers alone makes of folders."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("reloaded.py")), *folders], cwd="/",
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[str, list[int]]] = json.loads(done.stdout)
    return found


def check_reloading(runs: list[PretrainRun]) -> None:
    """Transformers alone has the same weights as this toolkit, and writes the same."""
    found = reloaded([run.model.model for run in runs])
    for run in runs:
        tokenizer = load_tokenizer(run.model)
        model = load_model(run.model, tokenizer)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        model.set_attn_implementation("sdpa")
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        written: Any = model.eval().generate(ids, **options)  # type: ignore[operator]
        assert found[run.model.model] == [weights_hash(model), written[0].tolist()]


def test_transformers_alone_loads_and_writes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    check_reloading([made(tiny_words(base_folder, size)) for size in ("gpt2-10m", "llama-43m", "glm-30m", "qwen3-5m")])


@pytest.mark.long
def test_transformers_alone_loads_each_size_up_to_50m(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    sizes = [size for size in (*SMALL, *MIDDLE) if not size.startswith("baichuan")]
    check_reloading([made(["--config_name", size, "--tokenizer_name", str(base_folder)]) for size in sizes])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["rope", "alibi"])
def test_baichuan_loads_and_writes_here(
    kind: str, whole: bool, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    words = tiny_words(base_folder, f"baichuan-10m-{kind}")
    run = made(words[:4] if whole else words)
    tokenizer = load_tokenizer(run.model)
    model = load_model(run.model, tokenizer).eval()
    assert (model.config.position_embedding, model.config.norm_head) == (kind, kind == "alibi")
    weights = run.model.random_weights
    assert weights is not None
    assert weights_hash(model) == weights_hash(build_random_model(model.config, weights.seed))
    written: Any = model.generate(tokenizer(PROMPT, return_tensors="pt").input_ids, max_new_tokens=4)  # type: ignore[operator]
    assert written.shape[1] > len(tokenizer(PROMPT).input_ids)


def test_the_folder_is_decided_by_all_that_decides_the_weights(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    words = tiny_words(base_folder, "qwen3-5m")
    (tmp_path / "mine.yaml").write_text(
        f"config_name: qwen3-5m\ntokenizer_name: {base_folder}\nconfig_overrides:\n  head_dim: 16\n  hidden_size: 64\n"
        "  num_hidden_layers: 2\n  intermediate_size: 96\n",
        encoding="utf-8",
    )
    (tmp_path / "config.json").write_text(json.dumps(settings.read_size("qwen3-5m")[1]), encoding="utf-8")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tokenizer" / name).write_bytes((base_folder / name).read_bytes())
    (tmp_path / "tokenizer" / "tokenizer_report.json").write_text("{}", encoding="utf-8")
    same = [words, ["--config", str(tmp_path / "mine.yaml")], [*words, "--learning_rate", "1e-4"]]
    others = [
        [*words, "--seed", "7"],
        [*words, "--make_vocab_size_divisible_by", "64"],
        [*words, "--config_overrides", "hidden_size=64"],
        ["--config_name", "qwen3-26m", *words[2:]],
    ]
    tokenizers = [parse_arguments(PretrainRun, tiny_words(tmp_path / "tokenizer", "qwen3-5m"))]
    (tmp_path / "tokenizer" / "tokenizer_report.json").write_text("another", encoding="utf-8")
    tokenizers.append(parse_arguments(PretrainRun, tiny_words(tmp_path / "tokenizer", "qwen3-5m")))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("another", encoding="utf-8")
    tokenizers.append(parse_arguments(PretrainRun, tiny_words(tmp_path / "tokenizer", "qwen3-5m")))
    first, after_report, after_change = (run.model.model for run in tokenizers)
    assert first == after_report != after_change
    folders = [parse_arguments(PretrainRun, each).model.model for each in (*same, *others)]
    assert len(set(folders[:3])) == 1 and len(set(folders)) == 1 + len(others)
    assert Path(folders[0]).name.startswith("qwen3-5m-")
    in_file = parse_arguments(PretrainRun, [*words, "--config_name", str(tmp_path / "config.json")]).model.model
    assert in_file.rpartition("-")[2] == folders[0].rpartition("-")[2]


def test_the_tokenizer_decides_vocabulary_and_special_ids(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    words = tiny_words(base_folder, "gpt2-10m")
    run = made([*words, "--make_vocab_size_divisible_by", "64"])
    tokenizer = load_tokenizer(run.model)
    model = load_model(run.model, tokenizer)
    assert len(tokenizer) == 1000 and model.config.vocab_size == 1024 == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.bos_token_id is None
    assert model.generation_config is not None
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    wide = made([*words[:-1], f"{words[-1]},vocab_size=1200"])
    assert load_model(wide.model, tokenizer).config.vocab_size == 1200


@pytest.mark.parametrize("kept", [("rope_theta", "rope_parameters"), ("rope_parameters",), ("rope_theta",)])
def test_an_override_of_rotary_positions_wins_over_both_names_of_a_file(
    kept: tuple[str, ...], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    words = tiny_words(base_folder, "qwen3-5m")
    folder = Path(made(words).model.model)  # of which config.json has the names of versions 4 and 5
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 1_000_000
    (tmp_path / "mine.json").write_text(
        json.dumps({name: value for name, value in content.items() if not name.startswith("rope_") or name in kept}),
        encoding="utf-8",
    )
    words = ["--config_name", str(tmp_path / "mine.json"), *words[2:4], "--config", str(tmp_path / "overrides.yaml")]
    for override, theta in (
        ({"rope_theta": 5000}, 5000),
        ({"rope_parameters": {"rope_type": "default"}}, 1_000_000 if "rope_theta" in kept else 10_000),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7000}}, 7000),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1_000_000),
    ):
        (tmp_path / "overrides.yaml").write_text(json.dumps({"config_overrides": override}), encoding="utf-8")
        weights = parse_arguments(PretrainRun, words).model.random_weights
        assert weights is not None
        config: Any = random_config(weights, load_tokenizer(ModelArguments(str(base_folder))))
        assert config.rope_parameters["rope_theta"] == theta
        assert config.rope_parameters["rope_type"] == ("linear" if "rope_scaling" in override else "default")


def test_few_positions_suffice_for_the_checks(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    words = tiny_words(base_folder, "gpt2-10m")
    run = made([*words[:-1], f"{words[-1]},n_positions=4"])
    assert load_model(run.model, load_tokenizer(run.model)).config.n_positions == 4


def test_a_base_that_another_run_has_made_in_the_meantime_stays(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    run = made(tiny_words(base_folder, "qwen3-5m"))
    weights, tokenizer = run.model.random_weights, load_tokenizer(run.model)
    assert weights is not None
    before = {path.name: path.stat().st_ino for path in weights.folder.iterdir()}
    _write(weights, random_config(weights, tokenizer), tokenizer)
    assert {path.name: path.stat().st_ino for path in weights.folder.iterdir()} == before
    assert [path.name for path in weights.folder.parent.iterdir()] == [weights.folder.name]


def test_a_size_is_named_for_its_folder_wherever_it_is_named_from(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "v1.5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.read_size("qwen3-5m")[1]), encoding="utf-8")
    (folder / "small.json").write_bytes((folder / "config.json").read_bytes())
    monkeypatch.chdir(folder)
    names = {".": "v1.5", "config.json": "v1.5", "../v1.5": "v1.5", "small.json": "small", "qwen3-0.6b": "qwen3-0.6b"}
    for given, name in names.items():
        assert settings.size_name(given) == name
        run = parse_arguments(PretrainRun, ["--config_name", given, "--tokenizer_name", str(base_folder)])
        assert Path(run.model.model).name.rpartition("-")[0] == name
    (tmp_path / "小说").mkdir()
    (tmp_path / "小说" / "config.json").write_bytes((folder / "config.json").read_bytes())
    run = parse_arguments(PretrainRun, ["--config_name", "../小说", "--tokenizer_name", str(base_folder)])
    assert Path(run.model.model).name.startswith("model-")


@pytest.mark.long
def test_a_process_of_its_own_writes_the_same_base(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "OUTPUT", tmp_path)
    run = made(tiny_words(base_folder, "glm-30m", "--make_vocab_size_divisible_by", "64"))
    weights = run.model.random_weights
    assert weights is not None
    _write_elsewhere(replace(weights, folder=tmp_path / "elsewhere"), run.model)
    here, elsewhere = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in
                       (weights.folder, tmp_path / "elsewhere"))  # fmt: skip
    assert here == elsewhere


def test_settings_of_random_weights_apply_unless_the_user_sets_others(base_folder: Path) -> None:
    words = ["--config_name", "qwen3-5m", "--tokenizer_name", str(base_folder)]
    training = parse_arguments(PretrainRun, words).training
    assert (training.learning_rate, training.adam_beta2, training.weight_decay) == (1e-3, 0.95, 0.1)
    training = parse_arguments(PretrainRun, [*words, "--learning_rate", "3e-4"]).training
    assert (training.learning_rate, training.adam_beta2) == (3e-4, 0.95)
