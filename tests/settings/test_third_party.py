"""Variables of training processes, and what they are settled by."""

import os
from pathlib import Path

import pytest

from novelgpt.settings.hardware import usable_cores, visible_gpus
from novelgpt.settings.third_party import process_defaults


def test_processes_of_a_host_share_its_cores() -> None:
    assert process_defaults({}, 1, 0)["OMP_NUM_THREADS"] == str(usable_cores())
    assert process_defaults({}, 100_000, 0)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in process_defaults({}, None, 0)


def test_what_the_user_has_set_stays() -> None:
    everything = process_defaults({}, 1, 0)
    assert everything["DS_ACCELERATOR"] == "cpu" and "DS_ACCELERATOR" not in process_defaults({}, 1, 1)
    for name in everything:
        assert process_defaults({name: "7"}, 1, 0) == {
            other: everything[other] for other in everything if other != name
        }
        assert process_defaults({name: ""}, 1, 0) == everything


@pytest.mark.parametrize(
    ("chosen", "count"),
    [(None, 3), ("0", 1), ("2,0", 2), ("GPU-1f,GPU-2e", 2), ("", 0), (",", 0), ("-1", 0), ("1,-1,0", 1)]
    + [("MIG-1a,MIG-2b", 1), ("NoDevFiles", 0)],
)
def test_gpus_in_sight_are_counted(chosen: str | None, count: int, tmp_path: Path) -> None:
    lines = "".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})\\n" for number in range(3))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n", encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}"}
    environment |= {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert visible_gpus(environment) == count
    assert visible_gpus({"PATH": str(tmp_path / "none")}) == 0
