"""Files of models and adapters of any shape end in an error that names the file, never in another exception."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_lora import merge
from novelgpt import doctor
from novelgpt.export import to_safetensors
from novelgpt.inference.generation import answer_end_ids
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.fingerprint import weights_fingerprint
from novelgpt.model.folder_checks import check_model_folder
from novelgpt.model.loading import adapter_base, read_config
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pip_install

Build = Callable[[bytes], bytes]
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# name: what becomes of a file's content.
WHOLE: dict[str, Build] = {
    "empty": lambda _: b"",
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "number": lambda _: b"3",
    "cut off": lambda content: content[: len(content) // 2],
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "Latin-1": lambda _: '{"model_type": "\u00e9"}'.encode("latin-1"),
    "nested too deep": lambda _: DEEP,
    "number too long": lambda _: b'{"a": ' + b"9" * 5000 + b"}",
    "a key with two values": lambda content: content.replace(b"{", b'{"model_type": "x", "model_type": "y",', 1),
}
# (setting, value): each is refused with the name of the setting.
SIZES: list[tuple[str, Any]] = [
    ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("num_hidden_layers", 10**9), ("num_hidden_layers", "2"),
    ("num_hidden_layers", None), ("num_attention_heads", 0), ("num_attention_heads", [4]),
    ("num_key_value_heads", 3), ("hidden_size", -256), ("hidden_size", 10**9), ("hidden_size", 1.5),
    ("hidden_size", True), ("vocab_size", 0), ("vocab_size", 10**9), ("vocab_size", 10**8), ("intermediate_size", {}),
    ("max_position_embeddings", -1), ("head_dim", "64"), ("rms_norm_eps", float("nan")), ("rope_parameters", []),
    ("rope_parameters", {"rope_type": "yarn", "factor": "4"}), ("rope_scaling", {"type": "linear", "factor": -1}),
    ("rope_parameters", {"rope_type": 7}), ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": 0}),
    ("rope_parameters", {"full_attention": {"rope_theta": "big"}}), ("attention_dropout", 2.0), ("resid_pdrop", -1),
    ("output_router_logits", "yes"), ("model_type", 3), ("architectures", "Qwen3ForCausalLM"), ("eos_token_id", "x"),
    ("tie_word_embeddings", "no"),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(target_modules=["q_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    for path in [*base_folder.glob("*token*"), *base_folder.glob("*.jinja")]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(folder, max_shard_size="2MB")
    for path in [*base_folder.glob("*token*"), *base_folder.glob("*.jinja")]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder, whose weights are links to one that is not changed in place."""

    def copy_folder(folder: Path) -> Path:
        shutil.copytree(folder, tmp_path / "model")
        return tmp_path / "model"

    return copy_folder


def load(folder: Path) -> None:
    """All that a prediction reads of a folder."""
    model = ModelArguments(str(folder))
    tokenizer = load_tokenizer(model)
    adapter_base(str(folder))
    answer_end_ids(load_for_inference(model, tokenizer), tokenizer)


def set_in(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.mark.parametrize("change", WHOLE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_another_shape_is_named(
    name: str, change: str, base_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(base_folder)
    (folder / name).write_bytes(WHOLE[change]((folder / name).read_bytes()))
    if (name, change) == ("tokenizer.json", "a key with two values"):
        pytest.skip("the library's own reader takes it")
    with pytest.raises(UserError) as raised:
        load(folder)
    assert name in raised.value.cause or name == "tokenizer.json"


@pytest.mark.parametrize("change", [*WHOLE, "a folder", "a link to nothing"])
@pytest.mark.parametrize("name", ["adapter_config.json", "base.json", "model.safetensors.index.json", "config.json"])
def test_what_lies_there_is_checked_before_it_is_read(
    name: str, change: str, base_folder: Path, adapter: Path, sharded: Path, copied: Callable[[Path], Path]
) -> None:
    source = {"model.safetensors.index.json": sharded, "config.json": base_folder}.get(name, adapter)
    folder = copied(source)
    path = folder / name
    content = path.read_bytes() if path.is_file() else b'{"base": "x", "fingerprint": "y"}'
    path.unlink(missing_ok=True)
    if change == "a folder":
        path.mkdir()
    elif change == "a link to nothing":
        path.symlink_to(folder / "nowhere")
    else:
        path.write_bytes(WHOLE[change](content))
    if (name, change) == ("base.json", "a key with two values"):
        path.write_bytes(b'{"base": "x", "fingerprint": "y", "base": "z"}')
    if (name, change) == ("model.safetensors.index.json", "a key with two values"):
        twice = b'"weight_map": {"lm_head.weight": "x", "lm_head.weight": "y",'
        path.write_bytes(content.replace(b'"weight_map": {', twice))
    with pytest.raises(UserError, match=name):
        load(folder)


@pytest.mark.parametrize(("name", "value"), SIZES)
def test_settings_that_cannot_be_are_refused_by_name(
    name: str, value: Any, base_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(base_folder)
    set_in(folder / "config.json", name, value)
    with pytest.raises(UserError, match=f"config.json: .*{name.removesuffix('s')}|{name}|heads do not divide|shapes"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", 3), ("chat_template", [3]), ("chat_template", {"a": []}), ("eos_token", []),
        ("tokenizer_class", []), ("novelgpt_chat_template", []), ("novelgpt_chat_template", {"name": "own"}),
        ("added_tokens_decoder", []), ("model_max_length", "long"), ("auto_map", "x"),
    ],
)  # fmt: skip
def test_settings_of_a_tokenizer_are_refused_by_name(
    name: str, value: Any, base_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(base_folder)
    set_in(folder / "tokenizer_config.json", name, value)
    with pytest.raises(UserError, match=f"tokenizer_config.json: {name}"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model_name_or_path", []), ("base_model_name_or_path", ""), ("r", 0),
        ("r", -8), ("r", 10**9), ("r", "8"), ("target_modules", 3), ("target_modules", [None]), ("lora_alpha", "x"),
        ("rank_pattern", []), ("use_rslora", "no"), ("init_lora_weights", 1.5),
    ],
)  # fmt: skip
def test_settings_of_an_adapter_are_refused_by_name(
    name: str, value: Any, adapter: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(adapter)
    set_in(folder / "adapter_config.json", name, value)
    with pytest.raises(UserError, match=f"adapter_config.json: {name}"):
        load(folder)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


ENTRIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda entry: [],
    "null": lambda entry: None,
    "without a type": lambda entry: {name: value for name, value in entry.items() if name != "dtype"},
    "type that is a number": lambda entry: entry | {"dtype": 32},
    "another type": lambda entry: entry | {"dtype": "F64"},
    "shape that is a number": lambda entry: entry | {"shape": 3},
    "shape below zero": lambda entry: entry | {"shape": [-1, *entry["shape"][1:]]},
    "shape that is huge": lambda entry: entry | {"shape": [10**12, 10**12]},
    "one offset": lambda entry: entry | {"data_offsets": [0]},
    "offsets backwards": lambda entry: entry | {"data_offsets": entry["data_offsets"][::-1]},
    "offsets below zero": lambda entry: entry | {"data_offsets": [-4, 0]},
    "offsets beyond the end": lambda entry: entry | {"data_offsets": [0, 10**12]},
    "offsets that overlap": lambda entry: entry | {"data_offsets": [0, entry["data_offsets"][1] + 4]},
}


@pytest.mark.parametrize("change", ENTRIES)
def test_a_header_that_lies_is_told(change: str, base_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(base_folder)
    path = folder / "model.safetensors"
    header, data = header_and_data(path)
    name = next(name for name in header if name != "__metadata__")
    path.write_bytes(with_header(json.dumps(header | {name: ENTRIES[change](header[name])}).encode(), data))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder)


def test_lengths_that_lie_and_holes_are_told(
    base_folder: Path, adapter: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(base_folder)
    path = folder / "model.safetensors"
    header, data = header_and_data(path)
    whole = json.dumps(header).encode()
    for content in (
        with_header(whole, data, 0),
        with_header(whole, data, 2**64 - 1),
        with_header(whole, data, len(whole) + len(data) + 1),
        with_header(b"x" * 40, data),
        with_header(b"[]", data),
        with_header(b'{"a": {}, "a": {"dtype": "F32"}}', data),
        with_header(whole, data[:-4]),
        b"",
        b"\0\0\0",
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load(folder)
    path.write_bytes(with_header(whole, data))
    os.truncate(path, 60 << 30)  # of which no block is taken
    with pytest.raises(UserError, match="file not fully covered"):
        load(folder)
    rows = (60 << 30) // 4
    header = {"lm_head.weight": {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}}
    path.write_bytes(with_header(json.dumps(header).encode(), b""))
    os.truncate(path, path.stat().st_size + 4 * rows)
    with pytest.raises(UserError):
        load(folder)
    shutil.rmtree(folder)
    folder = copied(adapter)
    os.truncate(folder / "adapter_model.safetensors", 60 << 30)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "", 3, None, []])
def test_an_index_names_files_beside_it(target: Any, sharded: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(sharded)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {first: target}}))
    for read in (lambda: load(folder), lambda: weights_fingerprint(folder)):
        with pytest.raises(UserError, match=r"index\.json"):
            read()


def ends_in_two_lines(main: Callable[[list[str]], None], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        main(words)
    said = capsys.readouterr()
    assert raised.value.code == 2, said.err
    return said.err + said.out


def test_commands_say_so_in_two_lines(
    base_folder: Path, adapter: Path, copied: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(adapter)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "\\u001b[31mx\\nerror: y"}')
    said = ends_in_two_lines(merge.main, [str(folder), str(tmp_path / "out")], capsys)
    assert "\x1b" not in said and len(said.splitlines()) == 2
    (folder / "adapter_config.json").write_text("[]")
    said = ends_in_two_lines(merge.main, [str(folder), str(tmp_path / "out")], capsys)
    assert "adapter_config.json is not a mapping" in said
    shutil.rmtree(folder)
    folder = copied(base_folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    set_in(folder / "config.json", "num_hidden_layers", 10**9)
    said = ends_in_two_lines(to_safetensors.main, [str(folder), str(tmp_path / "out")], capsys)
    assert "num_hidden_layers" in said and not (tmp_path / "out").exists()
    shutil.rmtree(folder)
    folder = copied(base_folder)
    set_in(folder / "config.json", "num_attention_heads", 0)
    assert "num_attention_heads" in ends_in_two_lines(doctor.main, ["--model", str(folder)], capsys)


def test_published_settings_pass(tmp_path: Path) -> None:
    """Values that real models have, though few others: none of them is refused."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "pad_token_id": -1, "eos_token_id": [1, 2], "head_dim": None,
                    "intermediate_size": [1024, 2048], "rope_scaling": None, "rope_theta": 1000000, "num_experts": 0,
                    "quantization_config": {"bits": 4}, "text_config": {"hidden_size": 64, "num_hidden_layers": 2},
                    "vision_config": None, "torch_dtype": "bfloat16", "sliding_window": None, "attention_dropout": 0,
                    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
                                        "sliding_attention": {"rope_type": "default", "mrope_section": [16, 24]}}})
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(
        '{"model_max_length": 1000000000000000019884624838656, "bos_token": {"content": "<s>"}, '
        '"chat_template": [{"name": "default", "template": "{{ messages }}"}], "unk_token": null, "unk_token": null}'
    )
    check_model_folder(tmp_path)


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, ...]]:
    """Where parts of a parsed file stand, three steps deep."""
    parts = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, part in parts:
        yield (name,)
        if depth < 2:
            yield from ((name, *further) for further in places(part, depth + 1))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    holder = value
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = new
    return value


ODD = (None, [], {}, "x", "", -1, 0, 1.5, 10**9, 10**30, float("nan"), True, [None], {"a": 1}, "\x1b[31m\nerror: y")


def test_whatever_stands_in_a_setting_it_is_read_or_refused(
    base_folder: Path, adapter: Path, copied: Callable[[Path], Path]
) -> None:
    """A sample of all combinations; another kind of exception fails the test."""
    draw = random.Random(7)
    chosen = []
    for source, name in (
        (base_folder, "config.json"), (base_folder, "tokenizer_config.json"), (base_folder, "tokenizer.json"),
        (base_folder, "generation_config.json"), (adapter, "adapter_config.json"),
    ):  # fmt: skip
        content = json.loads((source / name).read_text())
        found = [place for place in places(content) if not (name == "tokenizer.json" and len(place) > 2)]
        chosen += [(source, name, changed(content, draw.choice(found), draw.choice(ODD))) for _ in range(12)]
    for source, name, content in chosen:
        folder = copied(source)
        (folder / name).write_text(json.dumps(content))
        try:
            load(folder)
        except UserError as error:
            assert "\x1b" not in error.cause + error.remedy
        shutil.rmtree(folder)
    assert read_config(ModelArguments(str(base_folder))).num_hidden_layers == 2


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_kernel_whose_package_is_missing_is_named(base_folder: Path) -> None:
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash-attn") as refusal:
        read_config(ModelArguments(str(base_folder), "flash_attention_2"))
    assert refusal.value.remedy == pip_install("flash-attn")
