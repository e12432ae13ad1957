"""What loads, what is refused and why: code of checkpoints, damaged or missing files, vocabularies, lengths, hubs."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3ForCausalLM,
    dynamic_module_utils,
)

from finetune.__main__ import main as finetune
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.hub import _download_from_modelscope, locate, runs_own_code
from novelgpt.model.loading import adapter_base, load_model, longest_row
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from tests.launched import PATIENCE
from tests.model.original_qwen1 import write_original_qwen1
from tests.model.original_weights import CODE, write_weights
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
# A model that nobody knows, of one layer type that everybody knows.
OWN_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class WeaverConfig(Qwen3Config):
    model_type = "weaver"

class WeaverForCausalLM(Qwen3ForCausalLM):
    config_class = WeaverConfig
"""


@pytest.fixture
def copy(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny-random base."""
    shutil.copytree(base_folder, tmp_path / "copy")
    return tmp_path / "copy"


def change(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), encoding="utf-8")


def with_own_code(folder: Path) -> Path:
    """Make of a Qwen3 a model that only its own code can load."""
    names = {"AutoConfig": "weaver.WeaverConfig", "AutoModelForCausalLM": "weaver.WeaverForCausalLM"}
    change(folder / "config.json", model_type="weaver", architectures=["WeaverForCausalLM"], auto_map=names)
    (folder / "weaver.py").write_text(OWN_CODE, encoding="utf-8")
    return folder


# ---- code that lies with a checkpoint


def test_code_that_is_needed_is_refused_with_reason_and_flag(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = ModelArguments(str(with_own_code(copy)))
    (copy / "weaver.py").write_text(CODE, encoding="utf-8")
    calls: list[Callable[[], object]] = [
        lambda: load_tokenizer(model),
        lambda: load_model(model, tokenizer),
        lambda: load_for_inference(model, tokenizer),
    ]
    for call in calls:
        with pytest.raises(UserError) as refusal:
            call()
        assert "WeaverForCausalLM in weaver.py, as model_type 'weaver' is not known here" in refusal.value.cause
        assert "--trust_remote_code" in refusal.value.remedy


@pytest.mark.parametrize("answer", ["y\n" * 9, None])
def test_nobody_is_asked_on_standard_input(answer: str | None, copy: Path, tmp_path: Path) -> None:
    with_own_code(copy)
    (copy / "weaver.py").write_text(CODE, encoding="utf-8")
    command = [warm_python(), "-m", "finetune", "--model", str(copy), "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    streams: dict[str, Any] = {"input": answer} if answer else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False, **streams
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "  fix:"))]
    assert done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr
    assert "WeaverForCausalLM in weaver.py" in lines[0] and "--trust_remote_code" in lines[1]
    assert not (tmp_path / "run").exists()


def test_code_that_is_needed_runs_where_it_is_allowed(
    copy: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = ModelArguments(str(with_own_code(copy)), trust_remote_code=True)
    assert runs_own_code(model)
    assert load_tokenizer(model).get_vocab() == tokenizer.get_vocab()
    assert type(load_model(model, tokenizer)).__name__ == "WeaverForCausalLM"


@pytest.mark.parametrize("allowed", [False, True])
def test_code_that_is_not_needed_never_runs(allowed: bool, copy: Path, tmp_path: Path) -> None:
    named = {name: f"stale.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    change(copy / "config.json", auto_map=named)
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["stale.Slow", "stale.Fast"]})
    (copy / "stale.py").write_text(CODE, encoding="utf-8")
    model = ModelArguments(str(copy), trust_remote_code=allowed)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, tokenizer)
    assert type(loaded) is Qwen3ForCausalLM
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert all("auto_map" not in path.read_text(encoding="utf-8") for path in (tmp_path / "saved").glob("*config.json"))


@pytest.mark.parametrize("allowed", [False, True])
def test_the_code_of_qwen_is_not_needed(allowed: bool, tmp_path: Path) -> None:
    write_original_qwen1(tmp_path)
    model = ModelArguments(str(tmp_path), trust_remote_code=allowed)
    assert type(load_model(model, load_tokenizer(model))).__name__ == "QWenLMHeadModel"


def test_a_tokenizer_that_needs_code_is_refused(copy: Path) -> None:
    shutil.rmtree(copy)
    copy.mkdir()
    named = {"AutoTokenizer": ["weaver.Tokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Weaver", "auto_map": named}))
    with pytest.raises(UserError) as refusal:
        load_tokenizer(ModelArguments(str(copy)))
    assert "Tokenizer in weaver.py, as the tokenizer 'Weaver' is not known here" in refusal.value.cause


# ---- files


def cut_off(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_pickles(folder: Path) -> None:
    write_weights(folder, load_file(folder / "model.safetensors"), "bin")
    (folder / "model.safetensors").unlink()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def with_pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(folder / "ran")}, folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    write_weights(folder, load_file(folder / "model.safetensors"), "safetensors_sharded")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def with_a_cut_pickle(folder: Path) -> None:
    as_pickles(folder)
    cut_off(folder, "pytorch_model.bin")


def without_some_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# What is done to a copy of the tiny-random base, and the words of the cause.
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "is not JSON")),
    "no model_type": (lambda folder: change(folder / "config.json", model_type=None), ("model_type",)),
    "a type that nobody knows": (lambda folder: change(folder / "config.json", model_type="weaver"), ("`weaver`",)),
    "a model of another kind": (lambda folder: change(folder / "config.json", model_type="t5"), ("T5Config",)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("holds no weights",)),
    "a shard is missing": (without_a_shard, ("model-00002-of-00003.safetensors",)),
    "cut off": (lambda folder: cut_off(folder, "model.safetensors"), ("model.safetensors cannot be read",)),
    "a pickle cut off": (with_a_cut_pickle, ("pytorch_model.bin cannot be read",)),
    "a pickle with code": (with_pickled_code, ("pytorch_model.bin is damaged or holds more than tensors",)),
    "weights are missing": (
        without_some_weights,
        ("2 weights", "in none of its files: model.layers.1.mlp.up_proj.weight, model.norm.weight"),
    ),
    "weights of another size": (
        lambda folder: change(folder / "config.json", intermediate_size=760),
        ("6 weights", "model.layers.0.mlp.down_proj.weight (256x768 instead of 256x760)"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    with pytest.raises(UserError) as refusal:
        load_model(ModelArguments(str(copy), allow_pickles=True), tokenizer)
    assert all(word in refusal.value.cause for word in words), refusal.value.cause
    assert not (copy / "ran").exists()


def test_pickles_load_and_tied_heads_need_no_tensor(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = load_file(copy / "model.safetensors")
    assert "lm_head.weight" not in expected
    as_pickles(copy)
    loaded = load_model(ModelArguments(str(copy), allow_pickles=True), tokenizer).state_dict()
    assert loaded.keys() - expected.keys() == {"lm_head.weight"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        load_tokenizer(ModelArguments(str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(ModelArguments(str(tmp_path / "nowhere")))


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy: Path) -> None:
    larger = load_tokenizer(ModelArguments(str(copy)))
    larger.add_tokens(["<|one_more|>"])
    with pytest.raises(UserError, match="has 1001 tokens, the model's embedding 1000"):
        load_model(ModelArguments(str(copy)), larger)


def test_a_tokenizer_with_an_id_past_the_embedding_is_refused(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["!"] = 1005
    (copy / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    gapped = load_tokenizer(ModelArguments(str(copy)))
    assert len(gapped) == 1000
    with pytest.raises(UserError, match=r"beyond the 1000 rows of the model's embedding: ! \(1005\)"):
        load_model(ModelArguments(str(copy)), gapped)


# ---- adapters


@pytest.fixture
def adapter(copy: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    base = load_model(ModelArguments(str(copy)), tokenizer)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_no_base(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        finetune(["--model", str(adapter), "--output_dir", str(tmp_path / "run")])
    assert status.value.code == 2 and "is an adapter, not a base" in capsys.readouterr().err


def test_an_adapter_needs_its_base(adapter: Path, copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert adapter_base(str(adapter)) == str(copy)
    load_for_inference(ModelArguments(str(adapter)), tokenizer)
    shutil.rmtree(copy)
    with pytest.raises(UserError, match="not there any more"):
        load_for_inference(ModelArguments(str(adapter)), tokenizer)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base"):
        adapter_base(str(adapter))


# ---- lengths


def test_rows_may_not_be_longer_than_the_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base_folder: Path
) -> None:
    write_original_qwen1(tmp_path / "qwen", seq_length=256)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for folder, positions in ((tmp_path / "qwen", 256), (base_folder, 4096)):
        words = ["--model", str(folder), "--train_files", str(rows), "--output_dir", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as status:
            finetune([*words, "--max_length", str(positions + 1)])
        error = capsys.readouterr().err
        assert status.value.code == 2 and f"exceeds the {positions} positions" in error
        assert f"--max_length {positions}" in error and not (tmp_path / "run").exists()


def test_stretched_positions_count(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000, "rope_theta": 1e6}
    llama = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1000, "rope_theta": 1e4}
    llama |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert longest_row(Qwen2Config(max_position_embeddings=1000)) == 1000
    assert longest_row(Qwen2Config(max_position_embeddings=1000, rope_parameters=yarn)) == 4000
    assert longest_row(LlamaConfig(max_position_embeddings=16000, rope_parameters=llama)) == 16000
    assert longest_row(AutoConfig.for_model("bloom")) is None
    write_original_qwen1(tmp_path)
    assert longest_row(AutoConfig.from_pretrained(tmp_path)) == 256


# ---- ModelScope


def stand_in(folder: Path, calls: list[list[str]]) -> types.ModuleType:
    """A package `modelscope` that downloads from a folder, with the real function's parameters."""

    def snapshot_download(
        model_id: str | None = None, revision: str | None = None, *, allow_file_pattern: list[str]
    ) -> str:
        assert model_id == "someone/weaver"
        calls.append(allow_file_pattern)
        target = folder / "downloaded"
        target.mkdir(exist_ok=True)
        for pattern in allow_file_pattern:
            for file in (folder / "remote").glob(pattern):
                shutil.copy(file, target)
        return str(target)

    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("pickles", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_modelscope_gives_a_folder_without_code_or_weights_twice(
    pickles: bool, allowed: bool, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(base_folder, remote)
    if pickles:
        as_pickles(remote)
    else:
        (remote / "pytorch_model.bin").write_bytes(b"the same once more")
    for name in ("modeling.py", "training_args.bin"):
        (remote / name).write_bytes(b"")
    calls: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "modelscope", stand_in(tmp_path, calls))
    _download_from_modelscope.cache_clear()
    model = ModelArguments("someone/weaver", hub="modelscope", trust_remote_code=allowed, allow_pickles=pickles)
    tokenizer = load_tokenizer(model)
    load_model(model, tokenizer)
    assert locate(model) == str(tmp_path / "downloaded")
    assert len(calls) == 1 + pickles  # once for each kind of weights, however often it is asked for
    expected = {path.name for path in base_folder.iterdir()} | ({"modeling.py"} if allowed else set())
    if pickles:
        expected = expected - {"model.safetensors"} | {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "downloaded").iterdir()} == expected
    _download_from_modelscope.cache_clear()


def test_modelscope_is_not_asked_about_folders(base_folder: Path) -> None:
    assert locate(ModelArguments(str(base_folder), hub="modelscope")) == str(base_folder)


def test_without_its_package_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError) as refusal:
        locate(ModelArguments("someone/novel", hub="modelscope"))
    assert refusal.value.remedy.endswith("python -m pip install modelscope")


def test_a_failed_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model_id: str, *, allow_file_pattern: list[str]) -> str:
        raise RuntimeError("Repository not found\nand more")

    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    with pytest.raises(UserError, match="cannot be downloaded from ModelScope: Repository not found$"):
        locate(ModelArguments("someone/missing", hub="modelscope"))


def test_the_real_modelscope_takes_our_call() -> None:
    modelscope = pytest.importorskip("modelscope")
    inspect.signature(modelscope.snapshot_download).bind("someone/weaver", allow_file_pattern=["*.json"])
