"""A model folder before it is trained: settings, files, tokenizer against embedding, end of answers, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from novelgpt.checks.findings import Finding
from novelgpt.checks.launch import check_before_launch
from novelgpt.model.loading import read_config
from novelgpt.model.pickles import check_no_pickles
from novelgpt.model.weight_files import stored_tensors, weight_files
from novelgpt.settings.runs import LoraRun, PretrainRun, TrainingRun
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.templates import template_record
from novelgpt.training.run_choice import preview_run_folder

QUESTION, ANSWER = "灯塔下有什么？", "一封信。"


def check_settings(run: TrainingRun) -> Iterator[Finding]:
    """What every run is checked for before anything is loaded; its folder is chosen. Data files are there."""
    check_before_launch(run)
    run = preview_run_folder(run)
    yield Finding(
        "settings", "ok", f"{run.pipeline}, rows of {run.data.max_length} tokens, into {run.training.output_dir}"
    )
    names = [*run.data.train_files, *run.data.valid_files]
    empty = [name for name in names if Path(name).is_file() and Path(name).stat().st_size == 0]
    if empty:
        yield Finding("data", "problem", f"empty: {', '.join(empty)}", "name files that hold rows: --train_files FILE")
    else:
        size = sum(Path(name).stat().st_size for name in names if Path(name).is_file())
        yield Finding("data", "ok", f"{counted(len(names), 'path')}, {size / 1e6:.1f} MB in files")


def check_files(run: TrainingRun) -> Iterator[Finding]:
    """The architecture is known without code of the checkpoint's own, and every weight file can be read."""
    config = read_config(run.model)
    check_no_pickles(Path(run.model.model), run.model.allow_pickles)
    files = weight_files(Path(run.model.model))
    tensors = [tensor for file in files for tensor in stored_tensors(file)]
    size = sum(tensor.size for tensor in tensors)
    kinds = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    count = f"{counted(len(tensors), 'tensor')} in {counted(len(files), 'file')}"
    text = f"{config.model_type}: {count}, {gigabytes(size)} of {kinds}"
    yield Finding("model files", "ok", text)


def check_vocabulary(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Each token has a row in the embedding."""
    rows = read_config(run.model).get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        beyond = sum(index >= rows for index in tokenizer.get_vocab().values())
        lacks = f"{'has' if beyond == 1 else 'have'} no row in the embedding of {rows}"
        text = f"{counted(beyond, 'token')} of {len(tokenizer)} {lacks}, as token {highest}"
        yield Finding("vocabulary", "problem", text, "put the tokenizer that belongs to the model beside its weights")
    else:
        yield Finding(
            "vocabulary", "ok", f"{counted(len(tokenizer), 'token')}, {counted(rows, 'row')} in the embedding"
        )


def check_ends(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """The tokens that end texts and fill rows, and whether the model knows how answers end."""
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    known = {int(tokenizer.eos_token_id)}
    folder = Path(run.model.model)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
        known |= set(named) if isinstance(named, (list, tuple)) else set() if named is None else {named}
    same = ", the same; padding is told by position" if end == pad else ""
    yield Finding("end and padding", "ok", f"end {end} ({tokenizer.eos_token_id}), padding {pad}{same}")
    if isinstance(run, PretrainRun):
        return
    last = [label for label in _row(tokenizer) if label != IGNORE_INDEX][-1]
    mark = tokenizer.convert_ids_to_tokens(last)
    if last in known:
        yield Finding("end of answers", "ok", f"{mark}, known to the base")
    elif isinstance(run, LoraRun):
        text = f"answers end with {mark}, with which the base has never ended one"
        remedy = "--train_mark_tokens auto, the default, trains its row; or take a chat model as base"
        yield Finding("end of answers", "note", text, remedy)
    else:
        yield Finding("end of answers", "ok", f"{mark}, which the base learns in training")


def check_template(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Which chat template puts questions and answers into words, and that an answer is trained whole."""
    if isinstance(run, PretrainRun):
        yield Finding("chat template", "ok", "not needed: raw text")
        return
    record = template_record(tokenizer)
    trained = tokenizer.decode([label for label in _row(tokenizer) if label != IGNORE_INDEX])
    text = f"{record['name']}, sha256 {record['sha256'][:12]}; it trains {trained!r} of a sample"
    if ANSWER not in trained:
        remedy = "put the model's own chat_template.jinja beside its weights"
        yield Finding("chat template", "problem", f"{text}, which is not the answer", remedy)
    elif record["name"] == "plain":
        remedy = "right for base models; for a chat model, put its chat_template.jinja beside its weights"
        yield Finding("chat template", "note", f"the tokenizer has none, so: {text}", remedy)
    else:
        yield Finding("chat template", "ok", text)


def _row(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Labels of a question and its answer."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return list(encode_conversation(messages, tokenizer)[0].labels)
