"""What the READMEs and the pages of docs/ name exists: files, links, scripts, options, formats of rows."""

import ast
import dataclasses
import json
import re
import shlex
import typing
from pathlib import Path

import pytest

from cli import demo
from dataset.preferences import read_preference_rows
from dataset.readers import messages_of, read_text_rows
from novelgpt.settings import commands as novelgpt_commands
from novelgpt.settings import remedies
from novelgpt.settings.runs import FinetuneRun, LoraRun, PredictRun, PretrainRun
from predict.chat import ChatRun

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README_zh.md")
PAGES = [*READMES, "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
ROOMS = ("cli", "pretrain", "finetune", "finetune_lora", "predict", "dataset", "novelgpt", "benchmarks")
PIPELINES = {run.pipeline: run for run in (PretrainRun, FinetuneRun, LoraRun, PredictRun, ChatRun)}
SCRIPTS = {"pretrain": "pretrain", "finetune": "finetune", "lora": "finetune_lora", "predict": "predict"}
COMMANDS = {
    "dataset novels": "dataset/novels/command.py",
    "dataset tokenizer": "dataset/tokenizers/command.py",
    "dataset tokens": "dataset/tokens_command.py",
    "dataset conversations": "dataset/conversation_rows/command.py",
    "dataset preferences": "dataset/preferences.py",
    "dataset preview": "dataset/preview.py",
}
# Options of other programs: tensorboard, sbatch, srun, torchrun, pip; and novelgpt --version, which is no command's.
OF_OTHERS = {"logdir", "nodes", "gpus-per-node", "cpus-per-task", "ntasks-per-node", "time"}
OF_OTHERS |= {"nproc-per-node", "no-deps", "version"}
OURS = re.compile(r"^(?:[A-Z_]+=\S+ )*novelgpt ")
# Of torchrun, accelerate and deepspeed, whose own parsers take their command lines in tests/launch.
ENGINES = re.compile(r"bin/(torchrun|accelerate|deepspeed) ")
OF_OTHERS |= {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "shutdown-timeout"}
OF_OTHERS |= {"multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"}
OF_OTHERS |= {"num_gpus", "module", "cpu", "signals-to-handle", "max-restarts", "rdzv-backend"}
OF_OTHERS |= {"rm", "init", "user", "ipc", "gpus", "build-arg", "stop-timeout"}  # docker
OPTION = re.compile(r"(?<![\w-])--([A-Za-z_][\w-]*)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Words of each command line in the page's bash blocks and of each code span that calls one of ours."""
    text = text_of(page)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    lines += [span for span in spans if "scripts/" in span and " " in span or " -m " in span or OURS.search(span)]
    return [words for words in (as_module(shlex.split(line, comments=True)) for line in lines) if words]


def as_module(command: list[str]) -> list[str]:
    """A command line of `novelgpt` as one of a checkout that does the same; others as they are."""
    place = sum(re.fullmatch("[A-Z_]+=.*", word) is not None for word in command)
    if command[place : place + 1] != ["novelgpt"]:
        return command
    for count in (2, 1):
        found = novelgpt_commands.COMMANDS.get(" ".join(command[place + 1 : place + 1 + count]))
        if found is not None:
            script = remedies.SCRIPTS.get(found.module)
            same = ["bash", f"scripts/{script}"] if script else [".venv/bin/python", "-m", *found.module.split()]
            return [*command[:place], *same, *command[place + 1 + count :]]
    named = command[place + 1]
    assert named in ("COMMAND", "--help", "--version", "data", "export"), f"{' '.join(command)}: no such command"
    return command


def options_of(run: type) -> set[str]:
    """Names of all options that a pipeline takes."""
    groups = [hint for hint in typing.get_type_hints(run).values() if dataclasses.is_dataclass(hint)]
    fields = [field for group in groups for field in dataclasses.fields(group)]
    assert fields
    return {field.name for field in fields} | {"config", "help", "help_all"}


def options_in_source(path: str) -> set[str]:
    """Names of the options that a module with an argparse parser of its own adds."""
    return set(re.findall(r'add(?:_argument|option)\(\s*"--([\w-]+)"', text_of(path))) | {"help"}


def known_options(command: list[str]) -> set[str] | None:
    """Names of the options of the program that a command starts; None where it is none of ours."""
    line = " ".join(command)
    if ENGINES.search(line):
        return None
    script = re.search(r"scripts/run_(\w+)\.sh", line)
    if "scripts/prepare_novels.sh" in line:
        return options_in_source(COMMANDS["dataset novels"])
    if script and script[1] in SCRIPTS:
        return options_of(PIPELINES[SCRIPTS[script[1]]])
    module = re.search(r" -m ([\w.]+)(?: (\w+))?", line)
    if module and (command_module := COMMANDS.get(f"{module[1]} {module[2]}")):
        return options_in_source(command_module)
    if module and module[1] in PIPELINES:
        return options_of(PIPELINES[module[1]])
    if module:
        folder = module[1].replace(".", "/")
        for path in (f"{folder}.py", f"{folder}/__main__.py"):
            if (ROOT / path).is_file():
                passed_on = options_of(LoraRun) if path == "novelgpt/doctor.py" else set()
                return options_in_source(path) | passed_on
    return None


def test_each_english_page_has_its_chinese_page() -> None:
    english = {path.name for path in (ROOT / "docs").glob("*.md")}
    chinese = {path.name for path in (ROOT / "docs" / "zh").glob("*.md")}
    # Messages are in English: only the Chinese pages explain them.
    assert english == chinese - {"errors.md"} != set()


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_links_of_a_page_exist(page: str) -> None:
    text = text_of(page)
    scripts = set(re.findall(r"scripts/[\w/]+\.(?:sh|py|json)", text))
    scripts |= {f"scripts/{name}" for name in re.findall(r"(?<![\w/*])run_\w+\.sh", text)}
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES)
def test_options_in_commands_belong_to_the_program_they_start(page: str) -> None:
    for command in commands(page):
        known = known_options(command)
        if known is not None:
            wrong = {name for word in command for name in OPTION.findall(word)} - known
            assert wrong == set(), " ".join(command)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist_somewhere(page: str) -> None:
    known = OF_OTHERS.union(*map(options_of, PIPELINES.values())) | options_in_source("tests/conftest.py")
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            known |= options_in_source(str(path.relative_to(ROOT)))
    assert set(OPTION.findall(text_of(page))) - known == set()


@pytest.mark.parametrize("page", READMES)
def test_settings_of_the_yaml_example_exist(page: str) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^(\w+):", example, flags=re.MULTILINE)) <= options_of(LoraRun)


@pytest.mark.parametrize("page", ["docs/data.md", "docs/zh/data.md"])
def test_example_rows_can_be_read(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```jsonl( text| preference)?\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    shapes = set()
    for kind, block in blocks:
        for row in map(json.loads, block.splitlines()):
            if kind == " preference":
                file = tmp_path / "rows.jsonl"
                file.write_text(block, encoding="utf-8")
                pairs = [[read["messages"], read["chosen"], read["rejected"]] for read in read_preference_rows(file)]
                assert pairs == [pairs[0]] * 4
            elif kind:
                file = tmp_path / "text.jsonl"
                file.write_text(block, encoding="utf-8")
                assert [read["text"] for read in read_text_rows(file)] == [row["text"]]
            else:
                assert messages_of(row, page)[-1]["role"] == "assistant"
                shapes.add(
                    next(key for key in row if key in {"instruction", "conversations", "messages", "prompt", "title"})
                )
    assert shapes == {"instruction", "conversations", "messages", "prompt", "title"}


def strings_in_code() -> list[str]:
    """The fixed parts of all strings in the rooms' modules."""
    found = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found


def test_the_errors_on_the_chinese_page_are_those_of_the_code() -> None:
    strings = strings_in_code()
    messages = re.findall(r"^\| (`.+?`) \|", text_of("docs/zh/errors.md"), flags=re.MULTILINE)
    parts = [part.strip(" :,") for message in messages for part in re.split("…|`、`|`", message)]
    wrong = [part for part in parts if part and not any(part in string for string in strings)]
    assert len(messages) > 30
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_to_fill_in(page: str) -> None:
    assert not re.search(r"@[A-Z]+@", text_of(page))


@pytest.mark.parametrize("page", READMES)
def test_the_readmes_state_how_the_answers_of_the_demo_are_drawn(page: str) -> None:
    settings = dict(zip(demo.ANSWERS[:-1], demo.ANSWERS[1:], strict=True))
    text = text_of(page)
    assert re.search(rf"\w {settings['--temperature']}[,，] ?top-k {settings['--top_k']}\b", text)
    assert settings["--top_p"] == "1" and ("no top-p" in text or "不限 top-p" in text)
