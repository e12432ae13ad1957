"""weights_fingerprint(a) == weights_fingerprint(b) iff both hold the same weights; a base is checked by it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from novelgpt.model.fingerprint import BASE_RECORD, check_base, weights_fingerprint, write_base_record
from novelgpt.model.weight_files import stored_dtype
from novelgpt.settings.errors import UserError

CONFIG = {"model_type": "qwen3", "num_attention_heads": 4, "rope_theta": 10000.0, "vocab_size": 7}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 8).to(torch.bfloat16),
        "layer.weight": torch.randn(8, 8),
        "norm.weight": torch.ones(8),
        "empty": torch.zeros(0, 3),
    }


def model_folder(
    folder: Path, content: dict[str, torch.Tensor], kind: str = "safetensors", **config: object
) -> Path:  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    if kind == "safetensors":
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        names = sorted(content)
        places = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: content[name] for name in names if places[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_the_same_weights_have_the_same_fingerprint_wherever_and_however_they_lie(kind: str, tmp_path: Path) -> None:
    first = weights_fingerprint(model_folder(tmp_path / "a", tensors()))
    other = model_folder(tmp_path / "deep" / "b", dict(reversed(tensors().items())), kind, rope_theta=1e6, dtype="x")
    for file in other.iterdir():
        os.utime(file, (1, 1))
    assert weights_fingerprint(other) == first
    assert len(first) == 64


CHANGES = {
    "one value": lambda content: content["embed.weight"][3, 5].add_(1),
    "the sign of a zero": lambda content: content["norm.weight"].mul_(0).mul_(-1),
    "a type": lambda content: content.update({"norm.weight": torch.ones(8, dtype=torch.float16)}),
    "a shape": lambda content: content.update({"layer.weight": content["layer.weight"].reshape(4, 16)}),
    "a name": lambda content: content.update({"other.weight": content.pop("layer.weight")}),
    "a tensor more": lambda content: content.update({"head.weight": torch.ones(1)}),
    "two tensors swapped": lambda content: content.update({"layer.weight": content["layer.weight"].T.contiguous()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_weights_have_another_fingerprint(change: str, tmp_path: Path) -> None:
    first = weights_fingerprint(model_folder(tmp_path / "a", tensors()))
    content = tensors()
    CHANGES[change](content)
    assert weights_fingerprint(model_folder(tmp_path / "b", content)) != first


def test_the_number_of_heads_counts_as_shapes_do_not_tell_it(tmp_path: Path) -> None:
    first = weights_fingerprint(model_folder(tmp_path / "a", tensors()))
    assert weights_fingerprint(model_folder(tmp_path / "b", tensors(), num_attention_heads=2)) != first


def test_large_tensors_are_read_to_the_last_byte_by_any_number_of_threads(tmp_path: Path) -> None:
    content = {"large": torch.zeros(65 << 20, dtype=torch.uint8), "small": torch.ones(3)}
    folder = model_folder(tmp_path / "a", content)
    first = weights_fingerprint(folder, threads=1)
    assert weights_fingerprint(folder, threads=4) == first
    assert weights_fingerprint(model_folder(tmp_path / "bin", content, "bin"), threads=2) == first
    content["large"][-1] = 1
    assert weights_fingerprint(model_folder(tmp_path / "b", content), threads=4) != first


def test_a_kept_result_holds_as_long_as_the_files_stay_as_they_are(tmp_path: Path) -> None:
    folder, cache = model_folder(tmp_path / "a", tensors()), tmp_path / "kept" / "fingerprints.json"
    first = weights_fingerprint(folder, cache)
    (key,) = json.loads(cache.read_text(encoding="utf-8"))
    cache.write_text(json.dumps({key: "kept"}), encoding="utf-8")
    assert weights_fingerprint(folder, cache) == "kept"

    stat = (folder / "model.safetensors").stat()
    changed = bytearray((folder / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (folder / "model.safetensors").write_bytes(changed)
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_fingerprint(folder, cache) not in ("kept", first)

    for damaged in (b"damaged", b"[1]", b"7", b'{"key": 7}', b"\xff", b"[" * 100_000, b'{"key": ["kept"]}'):
        cache.write_bytes(damaged)
        assert weights_fingerprint(folder, cache) == weights_fingerprint(folder)


def test_the_stored_type_is_that_of_most_weights(tmp_path: Path) -> None:
    assert stored_dtype(model_folder(tmp_path / "a", tensors())) == torch.float32
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()} | {"norm.weight": torch.ones(8)}
    assert stored_dtype(model_folder(tmp_path / "b", half, "bin")) == torch.bfloat16


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    short = model_folder(tmp_path / "short", tensors()) / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-8])
    shard = model_folder(tmp_path / "shard", tensors(), "sharded")
    (shard / "model-00002-of-00002.safetensors").unlink()
    wrong = model_folder(tmp_path / "wrong", tensors(), "bin") / "pytorch_model.bin"
    wrong.write_bytes(b"no weights")
    for name, message in {
        "none": "holds no weights",
        "short": "model.safetensors cannot be read",
        "shard": "lacks model-00002-of-00002.safetensors",
        "wrong": "pytorch_model.bin cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            weights_fingerprint(tmp_path / name)


def test_a_base_is_accepted_by_its_weights_and_refused_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_folder(tmp_path / "base", tensors())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    check_base(adapter, str(base))
    assert f"has no {BASE_RECORD}" in capsys.readouterr().err

    write_base_record(adapter, str(base))
    fingerprint = weights_fingerprint(base)
    assert json.loads((adapter / BASE_RECORD).read_text("utf-8")) == {"base": str(base), "fingerprint": fingerprint}
    check_base(adapter, str(base))
    moved = shutil.move(base, tmp_path / "moved")
    check_base(adapter, str(moved))
    assert capsys.readouterr().err == ""

    content = tensors()
    content["embed.weight"][6, 7] += 1
    other = model_folder(tmp_path / "other", content)
    with pytest.raises(UserError, match="is not the base") as refused:
        check_base(adapter, str(other))
    assert fingerprint[:12] in refused.value.cause
    assert weights_fingerprint(other)[:12] in refused.value.cause
    assert "--base" in refused.value.remedy
    with pytest.raises(UserError, match="is not there"):
        check_base(adapter, str(base))
    (adapter / BASE_RECORD).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        check_base(adapter, str(moved))
