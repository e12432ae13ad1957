"""What docs/multi_gpu.md shows of other launchers and platforms: their own parsers take it, and ours what follows."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from novelgpt.launch.start import plan_start
from novelgpt.settings.commands import COMMANDS
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun
from tests.test_page_commands import without_deepspeed
from tests.test_readme import ROOT, commands, text_of

PAGES = ["docs/multi_gpu.md", "docs/zh/multi_gpu.md"]
# What SkyPilot tells each host, and what a host may have made of it.
OF_SKYPILOT = {"NUM_NODES": "2", "NODE_RANK": "0", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}


def filled_in(line: str) -> str:
    """A shell's line with values in place of what the shell would ask for."""
    line = re.sub(r"\$\([^)]*\)", "10.0.0.1", line.replace("\\\n", " "))
    line = line.replace("$SLURM_NODEID", "1")
    return re.sub(r"\$SKYPILOT_(\w+)", lambda found: OF_SKYPILOT[found[1]], line)


def check_pipeline(module: str, words: list[str]) -> None:
    assert module == "finetune"
    parse_arguments(FinetuneRun, without_deepspeed(words))


def check_engine(words: list[str]) -> str:
    """Let an engine's parser take a command line, and a pipeline's what the engine hands on; the engine's name."""
    program = Path(words[0]).name
    if program == "torchrun":
        taken: Any = get_args_parser().parse_args(words[1:])
        modular = taken.module
    elif program == "accelerate":
        taken = launch_command_parser().parse_args(words[2:])
        modular = taken.module
    else:
        taken = runner.parse_args(words[1:])
        taken.training_script, taken.training_script_args = taken.user_script, taken.user_args
        modular = taken.module
    assert modular
    check_pipeline(taken.training_script, taken.training_script_args)
    return program


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_of_other_launchers_are_taken(page: str) -> None:
    found = []
    for words in commands(page):
        if words[0] == "srun" and words[-2] == "-c":
            words = shlex.split(filled_in(words[-1]))
        if Path(words[0]).name in ("torchrun", "accelerate", "deepspeed"):
            found.append(check_engine(words))
    assert sorted(found) == ["accelerate"] * 2 + ["deepspeed"] * 2 + ["torchrun"] * 3


@pytest.mark.parametrize("page", PAGES)
def test_examples_for_platforms_are_yaml_that_starts_a_pipeline(page: str) -> None:
    job, task = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        program, command, *words = [*container["command"], *container["args"]]
        assert f'ENTRYPOINT ["{program}"]' in text_of("Dockerfile").splitlines()  # what the image has
        pipeline = COMMANDS[command].module
        given = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        operator = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "novelgpt-master-0", "MASTER_PORT": "23456"}
        started = plan_start(pipeline, words, operator | given, gpus=8).args
        assert started[:4] == ["-m", "novelgpt.launch", "--processes", "8"]
        assert " --hosts 2 --host 1 finetune --deepspeed_by_default " in " ".join(started)
        assert "zero2.json" in " ".join(started)
        check_pipeline(pipeline, words)
    assert {"num_nodes", "resources", "workdir", "volumes", "setup", "run"} <= set(task)
    assert (ROOT / task["setup"].split()[1]).is_file()
    assert check_engine(shlex.split(filled_in(task["run"]))) == "torchrun"
