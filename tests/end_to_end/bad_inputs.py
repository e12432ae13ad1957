"""Bad inputs of every command, and what is said about each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

GOOD_ROW = json.dumps({"prompt": "问", "completion": "答"}, ensure_ascii=False) + "\n"
PREDICTION = json.dumps({"id": "a", "prediction": "雨下了一夜。", "reference": "雨停了。"}, ensure_ascii=False) + "\n"

FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\n\t\n",
    "short.txt": "短。\n".encode(),
    "blank.jsonl": b"\n \n",
    "no_text.jsonl": '{"text": "好"}\n{"body": "坏"}\n'.encode(),
    "no_shape.jsonl": (GOOD_ROW + '{"foo": 1}\n').encode(),
    "role.jsonl": b'{"messages": [{"role": "robot", "content": "hi"}]}\n',
    "no_messages.jsonl": b'{"messages": []}\n',
    "parts.jsonl": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}\n',
    "history.jsonl": b'{"instruction": "a", "output": "b", "history": [["only one side"]]}\n',
    "task.jsonl": b'{"task": "title_to_abstrakt", "title": "a", "abstract": "b"}\n',
    "scalar.jsonl": b'"a text"\n',
    "scalar.json": b"[1, 2]",
    "deep.jsonl": b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    "digits.jsonl": b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}\n",
    "half.jsonl": b'{"prompt": "\\ud83d", "completion": "a"}\n',
    "unanswered.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 4,
    "broken.jsonl": (GOOD_ROW + GOOD_ROW + '{"prompt": "x", \n').encode(),
    "broken.json": b'[{"prompt": "x",\n',
    "broken.parquet": b"PAR1 and no more",
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "bytes.txt": "一二三四".encode() + b"\xff\xfe\xff and more",
    "rows.docx": b"rows",
    "rows.jsonl": (GOOD_ROW * 4).encode(),
    "typo.yaml": b"learning_rats: 1\n",
    "broken.yaml": b"a: [1\n",
    "list.yaml": b"- learning_rate\n- 1\n",
    "type.yaml": b"max_length: long\n",
    "nested.yaml": b"max_length: {a: 1}\n",
    "choice.yaml": b"overlong: eat\n",
    "bytes.yaml": b"a: \xff\xfe\n",
    "no_tasks.yaml": b"[]\n",
    "no_questions.yaml": b"next_chapter: {questions: []}\n",
    "placeholder.yaml": b"next_chapter: {questions: ['{'], answers: ['{text}']}\n",
    "zero.json": b"{broken",
    "list.json": b"[1]",
    "predictions.jsonl": PREDICTION.encode(),
    "others.jsonl": PREDICTION.replace('"a"', '"b"').encode(),
    "number.jsonl": b'{"prediction": 3, "reference": "a"}\n',
    "metric.jsonl": b'{"prediction": "a", "reference": "a", "metrics": ["f2"]}\n',
    "cut.jsonl": b'{"prediction": "a", "reference": "a", "scored_characters": "ten"}\n',
    "plain.jsonl": b'{"text_prompt": "", "text_completion": "a"}\n',
}


def without(pattern: str) -> Callable[[Path, Path], None]:
    """A model whose files of this pattern are gone."""

    def build(base: Path, folder: Path) -> None:
        shutil.copytree(base, folder)
        for file in folder.glob(pattern):
            file.unlink()

    return build


def with_file(name: str, content: str) -> Callable[[Path, Path], None]:
    """A model in which one file reads otherwise."""

    def build(base: Path, folder: Path) -> None:
        shutil.copytree(base, folder)
        (folder / name).write_text(content, encoding="utf-8")

    return build


def cut_weights(base: Path, folder: Path) -> None:
    """A model whose copy broke off."""
    shutil.copytree(base, folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:10_000])


def with_setting(**settings: object) -> Callable[[Path, Path], None]:
    """A model whose config.json says otherwise."""

    def build(base: Path, folder: Path) -> None:
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")

    return build


def pickled(base: Path, folder: Path) -> None:
    """A model whose weights are a pickle."""
    shutil.copytree(base, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_adapter(base: Path, folder: Path) -> None:
    """An adapter whose weights are a pickle."""
    adapter_of('{"base_model_name_or_path": "BASE", "peft_type": "LORA"}')(base, folder)
    torch.save({"lora_A": torch.zeros(1)}, folder / "adapter_model.bin")


def adapter_of(settings: str) -> Callable[[Path, Path], None]:
    """An adapter without weights, whose adapter_config.json reads so."""

    def build(base: Path, folder: Path) -> None:
        shutil.copytree(
            base, folder, ignore=shutil.ignore_patterns("config.json", "generation_config.json", "*.safetensors")
        )
        (folder / "adapter_config.json").write_text(settings.replace("BASE", str(base)), encoding="utf-8")

    return build


def only(**files: str) -> Callable[[Path, Path], None]:
    """A folder of these files, whose names have `__` for a full stop."""

    def build(base: Path, folder: Path) -> None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")

    return build


# What stands in words as {name}: made beside the files when a case needs it.
FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "bare": without("*token*"),
    "no_weights": without("*.safetensors"),
    "no_config": without("config.json"),
    "cut_weights": cut_weights,
    "broken_config": with_file("config.json", "{"),
    "other_architecture": with_file("config.json", '{"model_type": "nobody_knows"}'),
    "broken_tokenizer": with_file("tokenizer.json", "{"),
    "other_template": with_file("chat_template.jinja", "{{ messages }}"),
    "taken": only(run__json='{"pipeline": "pretrain", "status": "finished", "started": "2026"}'),
    "broken_run": only(run__json="{"),
    "empty_tokenizer": with_file("tokenizer.json", ""),
    "weights_of_text": with_file("model.safetensors", "no weights at all"),
    "list_config": with_file("config.json", "[]"),
    "other_sizes": with_setting(intermediate_size=1272),
    "pickled": pickled,
    "named_pickle": with_setting(transformers_weights="adapter_model.bin"),
    "pickled_adapter": pickled_adapter,
    "adapter": adapter_of('{"base_model_name_or_path": "BASE", "peft_type": "LORA"}'),
    "broken_adapter": adapter_of("{"),
    "homeless_adapter": adapter_of('{"base_model_name_or_path": "./gone", "peft_type": "LORA"}'),
    "empty_folder": only(),
    "letters": only(letter__txt="甲"),
    "unscored": only(predictions__jsonl=PREDICTION),
    "misscored": only(predictions__jsonl=PREDICTION, row_scores__jsonl="", scores__json="{"),
    "unprepared": only(manifest__json="{}"),
    "odd_tokens": only(manifest__json='{"kind": "novelgpt tokens", "version": 99}'),
}

# name: (module, words, words of the cause). {base}, {tmp} and {a name of FOLDERS} are filled in.
CASES = {
    # Files and rows.
    "missing file": ("pretrain", ["--train_files", "nowhere.txt"], "nowhere.txt"),
    "empty file": ("pretrain", ["--train_files", "empty.txt"], "empty.txt is empty"),
    "blank text": ("pretrain", ["--train_files", "blank.txt"], "blank.txt is empty"),
    "text too short to split": (
        "pretrain",
        ["--train_files", "short.txt"],
        "1 block of 2048 tokens cannot be split into training and evaluation",
    ),
    "blank file": ("finetune", ["--train_files", "blank.jsonl"], "blank.jsonl is empty"),
    "row without the text field": (
        "pretrain",
        ["--train_files", "no_text.jsonl"],
        "no_text.jsonl:2: no text in field 'text'",
    ),
    "row of no shape": (
        "finetune",
        ["--train_files", "no_shape.jsonl"],
        "no_shape.jsonl:2: the row has the fields foo",
    ),
    "role nobody knows": (
        "finetune_lora",
        ["--train_files", "role.jsonl"],
        "role.jsonl:1: field messages[0].role is 'robot'",
    ),
    "no messages": (
        "finetune",
        ["--train_files", "no_messages.jsonl"],
        "no_messages.jsonl:1: field messages is not a list of messages",
    ),
    "content in parts": (
        "finetune",
        ["--train_files", "parts.jsonl"],
        "parts.jsonl:1: field messages[0].content is not a text",
    ),
    "history of one side": (
        "finetune",
        ["--train_files", "history.jsonl"],
        "history.jsonl:1: field history[0] is not a pair of texts",
    ),
    "task nobody knows": (
        "finetune",
        ["--train_files", "task.jsonl"],
        "task.jsonl:1: no task 'title_to_abstrakt' (did you mean",
    ),
    "row that is a text": (
        "finetune",
        ["--train_files", "scalar.jsonl"],
        "scalar.jsonl:1: the row is a str, not a mapping of fields",
    ),
    "rows that are numbers": (
        "pretrain",
        ["--train_files", "scalar.json"],
        "scalar.json row 0: the row is a int, not a mapping of fields",
    ),
    "row nested too deep": (
        "finetune",
        ["--train_files", "deep.jsonl"],
        "deep.jsonl:1: JSON that cannot be read",
    ),
    "number too long": (
        "finetune",
        ["--train_files", "digits.jsonl"],
        "digits.jsonl:1: JSON that cannot be read",
    ),
    "half a character": (
        "finetune",
        ["--train_files", "half.jsonl"],
        "half.jsonl:1: a \\ud… escape spells half of a character (a lone",
    ),
    "rows without answers": (
        "finetune",
        ["--train_files", "unanswered.jsonl", "--valid_files", "rows.jsonl"],
        "no trainable token is left in the 4 train rows within --max_length 2048",
    ),
    "evaluation rows without answers": (
        "finetune_lora",
        ["--train_files", "rows.jsonl", "--valid_files", "unanswered.jsonl"],
        "no trainable token is left in the 4 valid rows within --max_length 2048",
    ),
    "invalid JSON": ("finetune", ["--train_files", "broken.jsonl"], "broken.jsonl:3: invalid JSON"),
    "invalid JSON list": (
        "finetune",
        ["--train_files", "broken.json"],
        "broken.json:2: invalid JSON",
    ),
    "broken parquet": (
        "finetune",
        ["--train_files", "broken.parquet"],
        "broken.parquet is not a readable parquet file",
    ),
    "empty csv": ("finetune", ["--train_files", "empty.csv"], "empty.csv is empty"),
    "csv of a header alone": (
        "finetune",
        ["--train_files", "header.csv"],
        "0 rows cannot be split into training and validation with",
    ),
    "undecodable bytes": ("pretrain", ["--train_files", "bytes.txt"], "bytes.txt: byte 0xff at offset 12"),
    "unknown suffix": ("finetune", ["--train_files", "rows.docx"], "rows.docx: no reader for .docx"),
    "text for conversations": ("finetune", ["--train_files", "short.txt"], "short.txt: no reader for .txt"),
    "folder for conversations": ("finetune", ["--train_files", "{letters}"], "no reader for files without a suffix"),
    "folder that was not prepared": (
        "pretrain",
        ["--train_files", "{letters}"],
        "has no manifest.json: nothing was prepared there, or not to its end",
    ),
    "tokens of another version": (
        "pretrain",
        ["--train_files", "{odd_tokens}"],
        "holds tokens in the form of another version",
    ),
    "too few rows to split": (
        "finetune",
        ["--train_files", "rows.jsonl", "--valid_fraction", "0.99"],
        "4 rows cannot be split into training and validation with",
    ),
    "no trainable token": (
        "finetune",
        ["--train_files", "rows.jsonl", "--valid_files", "rows.jsonl", "--max_length", "3"],
        "no trainable token is left",
    ),
    "row above the length": (
        "finetune",
        ["--train_files", "rows.jsonl", "--max_length", "5", "--overlong", "refuse", "--valid_fraction", "0.5"],
        "tokens, above --max_length 5",
    ),
    # Models.
    "folder that does not exist": ("pretrain", ["--model", "./nowhere"], "model folder ./nowhere does not exist"),
    "model without tokenizer": ("finetune_lora", ["--model", "{bare}"], "holds no tokenizer"),
    "model without weights": ("finetune", ["--model", "{no_weights}"], "holds no weights"),
    "model without configuration": (
        "finetune",
        ["--model", "{no_config}"],
        "Should have a `model_type` key in its config.json.",
    ),
    "weights cut off": (
        "finetune_lora",
        ["--model", "{cut_weights}"],
        "cannot be read: Error while deserializing",
    ),
    "broken configuration": (
        "pretrain",
        ["--model", "{broken_config}"],
        "config.json is not JSON: Expecting property name",
    ),
    "architecture nobody knows": (
        "pretrain",
        ["--model", "{other_architecture}"],
        "The checkpoint you are trying to load has model type `nobody_knows` but",
    ),
    "broken tokenizer": (
        "finetune",
        ["--model", "{broken_tokenizer}"],
        "Expecting property name enclosed in double quotes: line 1 column 2",
    ),
    "template that was changed": (
        "finetune",
        ["--model", "{other_template}"],
        "the chat template changes the answer '针对目标检测模型参数量大、难以在边缘设备'…, so what",
    ),
    "empty tokenizer": ("finetune", ["--model", "{empty_tokenizer}"], "no tokenizer can be loaded from"),
    "text for weights": (
        "finetune",
        ["--model", "{weights_of_text}"],
        "model.safetensors cannot be read: Error while deserializing header: header too large",
    ),
    "configuration that is a list": ("finetune", ["--model", "{list_config}"], "config.json is not a mapping"),
    "configuration of other sizes": ("finetune", ["--model", "{other_sizes}"], "other shapes than config.json says"),
    "weights in a pickle": (
        "finetune",
        ["--model", "{pickled}"],
        "are pickles (pytorch_model.bin), and reading a pickle can run code",
    ),
    "pickle that config.json names": (
        "finetune_lora",
        ["--model", "{named_pickle}"],
        "are pickles (adapter_model.bin)",
    ),
    "adapter as a base": ("finetune", ["--model", "{adapter}"], "is an adapter, not a base"),
    # Flags.
    "unknown flag": ("finetune_lora", ["--learnin_rate", "1"], "unknown option '--learnin_rate'"),
    "word without a flag": (
        "finetune",
        ["rows.jsonl"],
        "the command line holds 'rows.jsonl', which belongs to no",
    ),
    "flag without a value": (
        "finetune",
        ["--learning_rate"],
        "argument --learning_rate/--learning-rate: expected one argument",
    ),
    "wrong type": ("pretrain", ["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "wrong choice": ("finetune", ["--overlong", "eat"], "invalid choice: 'eat'"),
    "schedule nobody knows": (
        "finetune",
        ["--lr_scheduler_type", "sinus"],
        "sinus is not a valid SchedulerType, please select one of ['linear',",
    ),
    "optimizer nobody knows": (
        "finetune",
        ["--optim", "magic"],
        "argument --optim: invalid choice: 'magic' (choose from 'adamw_torch',",
    ),
    "negative learning rate": ("finetune", ["--learning_rate", "-1"], "--learning_rate -1.0 is too small"),
    "no rows in a batch": (
        "finetune",
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size 0 is too small",
    ),
    "no accumulation": (
        "pretrain",
        ["--gradient_accumulation_steps", "0"],
        "--gradient_accumulation_steps 0 is too small",
    ),
    "no room to predict": ("finetune", ["--max_length", "1"], "--max_length 1 leaves no token to predict"),
    "more positions than the model has": (
        "pretrain",
        ["--max_length", "10000000"],
        "--max_length 10000000 exceeds the 4096 positions of",
    ),
    "share above one": ("finetune", ["--valid_fraction", "1.5"], "--valid_fraction 1.5 is not a share"),
    "negative evaluation": ("pretrain", ["--max_valid_tokens", "-1"], "--max_valid_tokens -1 is negative"),
    "a negative number of sample predictions": (
        "finetune",
        ["--predict_during_eval", "-1"],
        "--predict_during_eval -1 is too small",
    ),
    "missing DeepSpeed settings": (
        "finetune",
        ["--deepspeed", "nowhere.json"],
        "--deepspeed nowhere.json: No such file or directory",
    ),
    "broken DeepSpeed settings": (
        "finetune",
        ["--deepspeed", "zero.json"],
        "--deepspeed zero.json is not JSON: Expecting property name enclosed in double quotes",
    ),
    "DeepSpeed settings that are a list": (
        "finetune",
        ["--deepspeed", "list.json"],
        "--deepspeed list.json is not a mapping",
    ),
    "folder as DeepSpeed settings": ("finetune", ["--deepspeed", "{empty_folder}"], "Is a directory"),
    "learning rate that is no number": ("finetune", ["--learning_rate", "nan"], "--learning_rate nan is not a number"),
    "learning rate without end": ("finetune_lora", ["--learning_rate", "inf"], "--learning_rate inf is too large"),
    "huge learning rate": ("pretrain", ["--learning_rate", "1e30"], "--learning_rate 1e+30 is too large"),
    "no epoch": ("finetune", ["--num_train_epochs", "0"], "--num_train_epochs 0.0 is too small"),
    "epochs without end": ("finetune", ["--num_train_epochs", "inf"], "--num_train_epochs inf is too large"),
    "no step": ("finetune", ["--max_steps", "0"], "--max_steps 0 is too small"),
    "negative steps": ("pretrain", ["--max_steps", "-5"], "--max_steps -5 is too small"),
    "steps between saves that are none": (
        "finetune",
        ["--save_strategy", "steps", "--save_steps", "0"],
        "--save_steps 0.0 is not an interval",
    ),
    "negative steps between points": ("finetune", ["--logging_steps", "-1"], "--logging_steps -1.0 is not an interval"),
    "negative checkpoints": ("finetune", ["--save_total_limit", "-1"], "--save_total_limit -1 is too small"),
    "seed out of range": ("finetune_lora", ["--seed", str(2**70)], f"--seed {2**70} is too large"),
    "weight decay that is no number": ("finetune", ["--weight_decay", "nan"], "--weight_decay nan is not a number"),
    "negative clipping": ("finetune", ["--max_grad_norm", "-1"], "--max_grad_norm -1.0 is too small"),
    "negative workers": (
        "finetune",
        ["--dataloader_num_workers", "-1"],
        "--dataloader_num_workers -1 is too small",
    ),
    "two number formats": ("finetune", ["--bf16", "True", "--fp16", "True"], "At most one of fp16 and bf16"),
    "best model without evaluation": (
        "finetune",
        ["--load_best_model_at_end", "True", "--eval_strategy", "no"],
        "requires the save and eval strategy to match",
    ),
    "adapter of no rank": ("finetune_lora", ["--lora_rank", "0"], "--lora_rank 0 is too small"),
    "all dropped out": ("finetune_lora", ["--lora_dropout", "1.5"], "--lora_dropout 1.5 is too large"),
    "adapter that counts for nothing": ("finetune_lora", ["--lora_alpha", "0"], "--lora_alpha 0 is too small"),
    "model of no name": ("finetune", ["--model", ""], "--model names nothing"),
    "file as a model": ("finetune", ["--model", "rows.jsonl"], "rows.jsonl"),
    "file of no name": ("finetune", ["--train_files", ""], "'' does not exist"),
    "name that no file can have": ("finetune", ["--train_files", "x" * 300], "does not exist"),
    "folder as settings": ("finetune", ["--config", "{empty_folder}"], "Is a directory"),
    "no LoRA target": ("finetune_lora", ["--lora_targets", "w_pack"], "--lora_targets w_pack"),
    "QLoRA without a GPU": ("finetune_lora", ["--qlora", "True"], "--qlora needs a CUDA device"),
    # Settings in files.
    "missing YAML": ("finetune", ["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    "unknown key in YAML": ("pretrain", ["--config", "typo.yaml"], "unknown option 'learning_rats' in typo.yaml"),
    "broken YAML": ("pretrain", ["--config", "broken.yaml"], "broken.yaml is not YAML"),
    "bytes for YAML": ("pretrain", ["--config", "bytes.yaml"], "bytes.yaml is not YAML"),
    "YAML list": ("finetune", ["--config", "list.yaml"], "list.yaml does not hold `key: value` lines"),
    "wrong type in YAML": (
        "finetune",
        ["--config", "type.yaml"],
        "type.yaml: max_length: 'long' does not fit: invalid literal for int()",
    ),
    "nested YAML": ("finetune", ["--config", "nested.yaml"], "nested.yaml: max_length takes one value, not a dict"),
    "wrong choice in YAML": (
        "finetune",
        ["--config", "choice.yaml"],
        "choice.yaml: overlong: 'eat' is not one of truncate, split, drop, refuse",
    ),
    "missing wordings": (
        "finetune",
        ["--instruction_templates", "nowhere.yaml"],
        "nowhere.yaml: No such file or directory",
    ),
    "wordings without tasks": (
        "finetune",
        ["--instruction_templates", "no_tasks.yaml"],
        "no_tasks.yaml holds no tasks",
    ),
    "wordings without questions": (
        "finetune_lora",
        ["--instruction_templates", "no_questions.yaml"],
        "no_questions.yaml: task next_chapter has no list of questions",
    ),
    "wording with half a placeholder": (
        "predict",
        ["--instruction_templates", "placeholder.yaml"],
        "placeholder.yaml: task next_chapter, question 1, user: Single '{'",
    ),
    # Run folders.
    "folder of another run": ("finetune", ["--output_dir", "{taken}"], "holds another run (pretrain, finished"),
    "run.json cut off": (
        "finetune",
        ["--output_dir", "{broken_run}"],
        "cannot be read: Expecting property name enclosed in double quotes: line",
    ),
    "overwrite and resume at once": (
        "finetune",
        ["--output_dir", "{taken}", "--overwrite_output_dir", "--resume"],
        "--overwrite_output_dir would delete",
    ),
    "resume from nothing": ("finetune", ["--resume"], "holds no checkpoint to resume from"),
    "resume from a missing checkpoint": (
        "finetune",
        ["--resume_from_checkpoint", "checkpoint-9"],
        "--resume_from_checkpoint checkpoint-9 is not a folder",
    ),
    "folder with other files": ("finetune", ["--output_dir", "."], "holds files that belong to no run"),
    "file as run folder": ("finetune", ["--output_dir", "rows.jsonl"], "--output_dir rows.jsonl cannot be made:"),
    "run folder below a file": (
        "pretrain",
        ["--output_dir", "rows.jsonl/run"],
        "--output_dir rows.jsonl/run cannot be made:",
    ),
    # Prediction.
    "predict: adapter in a pickle": ("predict", ["--model", "{pickled_adapter}"], "are pickles (adapter_model.bin)"),
    "predict: model in a pickle": ("predict", ["--model", "{pickled}"], "are pickles (pytorch_model.bin)"),
    "predict: adapter without weights": ("predict", ["--model", "{adapter}"], "holds no adapter_model.safetensors"),
    "predict: an answer without end": (
        "predict",
        ["--max_new_tokens", str(10**12)],
        f"--max_new_tokens {10**12} is too large",
    ),
    "predict: missing file": ("predict", ["--data_files", "nowhere.jsonl"], "nowhere.jsonl"),
    "predict: empty file": ("predict", ["--data_files", "empty.csv"], "empty.csv is empty"),
    "predict: nothing to go on with": (
        "predict",
        ["--data_files", "plain.jsonl"],
        "plain.jsonl:1: text_prompt or text_completion is not text",
    ),
    "predict: unknown flag": ("predict", ["--max_tokens", "3"], "unknown option '--max_tokens'"),
    "predict: missing model": ("predict", ["--model", "./nowhere"], "model folder ./nowhere does not exist"),
    "predict: adapter without its base": (
        "predict",
        ["--model", "{homeless_adapter}"],
        "is not there any more: ./gone",
    ),
    "predict: broken adapter": (
        "predict",
        ["--model", "{broken_adapter}"],
        "adapter_config.json is not JSON: Expecting property name",
    ),
    "predict: no prompts in a batch": ("predict", ["--batch_size", "0"], "--batch_size 0 is too small"),
    "predict: no row": ("predict", ["--max_rows", "0"], "--max_rows 0 is too small"),
    "predict: no token": ("predict", ["--max_new_tokens", "0"], "--max_new_tokens 0 is too small"),
    "predict: no temperature": (
        "predict",
        ["--do_sample", "True", "--temperature", "0"],
        "--temperature 0.0 is too small",
    ),
    "predict: share above one": ("predict", ["--do_sample", "True", "--top_p", "2"], "--top_p 2.0 is not a share"),
    "predict: no beam": ("predict", ["--num_beams", "0"], "--num_beams 0 is too small"),
    "predict: no penalty": ("predict", ["--repetition_penalty", "0"], "--repetition_penalty 0.0 is too small"),
    "predict: file as output": (
        "predict",
        ["--output_dir", "rows.jsonl"],
        "--output_dir rows.jsonl cannot be made: rows.jsonl is not a folder",
    ),
    "predict: server without a folder": (
        "predict",
        ["--endpoint", "http://127.0.0.1:9/v1", "--output_dir", ""],
        "--endpoint has no model folder to write predictions beside",
    ),
    "predict: no server": (
        "predict",
        ["--endpoint", "http://127.0.0.1:9/v1"],
        "no list of models from http://127.0.0.1:9/v1: it does not answer: ",
    ),
    "predict: no URL": ("predict", ["--endpoint", "localhost"], "--endpoint is not a URL of http or https"),
    "predict: no request": (
        "predict",
        ["--endpoint", "http://127.0.0.1:9/v1", "--endpoint_concurrency", "0"],
        "--endpoint_concurrency 0 is too small",
    ),
    "chat: missing model": ("predict.chat", ["--model", "./nowhere"], "model folder ./nowhere does not exist"),
    "chat: beams": ("predict.chat", ["--num_beams", "2"], "beam search gives no token before the whole answer is done"),
    "chat: no token": ("predict.chat", ["--max_new_tokens", "0"], "--max_new_tokens 0 is too small"),
    "chat: no temperature": ("predict.chat", ["--temperature", "0"], "--temperature 0.0 is too small"),
    # Scores and reports.
    "score: missing file": ("predict.score", ["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    "score: no file": ("predict.score", [], "the following arguments are required: file"),
    "score: row without the field": ("predict.score", ["rows.jsonl"], "rows.jsonl:1: field prediction is missing"),
    "score: text that is a number": (
        "predict.score",
        ["number.jsonl"],
        "number.jsonl:1: field prediction is missing or not text",
    ),
    "score: metric nobody knows": ("predict.score", ["metric.jsonl"], "metric.jsonl:1: no metric 'f2'"),
    "score: length that is a text": ("predict.score", ["cut.jsonl"], "cut.jsonl:1: field scored_characters is 'ten'"),
    "score: other rows": (
        "predict.score",
        ["predictions.jsonl", "--compare", "others.jsonl"],
        "predictions.jsonl and others.jsonl do not answer the same rows: a is in",
    ),
    "score: comparison by a convention": (
        "predict.score",
        ["predictions.jsonl", "--compare", "others.jsonl", "--convention", "swift"],
        "--compare and --convention at once",
    ),
    "score: convention nobody knows": (
        "predict.score",
        ["predictions.jsonl", "--convention", "mine"],
        "argument --convention: invalid choice: 'mine' (choose from",
    ),
    "score: no worker": ("predict.score", ["predictions.jsonl", "--workers", "0"], "--workers 0 is too few"),
    "score: folder as output": ("predict.score", ["predictions.jsonl", "--output", "{empty_folder}"], "is a folder"),
    "score: output below a file": (
        "predict.score",
        ["predictions.jsonl", "--output", "rows.jsonl/scores.json"],
        "--output rows.jsonl/scores.json cannot be made: rows.jsonl is not a folder",
    ),
    "report: missing run": ("predict.report", ["nowhere", "--output", "{tmp}/out"], "nowhere is not a folder"),
    "report: no predictions": (
        "predict.report",
        ["{empty_folder}", "--output", "{tmp}/out"],
        "no predictions.jsonl in",
    ),
    "report: no scores": ("predict.report", ["{unscored}", "--output", "{tmp}/out"], "scores.json is missing"),
    "report: broken scores": ("predict.report", ["{misscored}", "--output", "{tmp}/out"], "scores.json is not JSON"),
    "continuations: missing text": (
        "predict.continuations",
        ["nowhere.txt", "{tmp}/out.jsonl"],
        "nowhere.txt: No such file or directory",
    ),
    "continuations: text too short": (
        "predict.continuations",
        ["short.txt", "{tmp}/out.jsonl"],
        "no passage in short.txt with 6400 characters: 1 chapter is too short",
    ),
    "continuations: no length": (
        "predict.continuations",
        ["short.txt", "{tmp}/out.jsonl", "--lengths", "0"],
        "--lengths 0",
    ),
    "continuations: no rows file": ("predict.continuations", ["short.txt", "{tmp}/out"], "is not a .jsonl file"),
    "continuations: nothing held out": (
        "predict.continuations",
        ["{unprepared}", "{tmp}/out.jsonl"],
        "holds no book out",
    ),
    # Merging.
    "merge: no adapter": ("finetune_lora.merge", ["{base}", "{tmp}/out"], "holds no adapter_config.json"),
    "merge: broken adapter": (
        "finetune_lora.merge",
        ["{broken_adapter}", "{tmp}/out"],
        "adapter_config.json is not JSON: Expecting property name",
    ),
    "merge: base that is gone": (
        "finetune_lora.merge",
        ["{homeless_adapter}", "{tmp}/out"],
        "the base ./gone is not there",
    ),
    "merge: adapter without weights": (
        "finetune_lora.merge",
        ["{adapter}", "{tmp}/out"],
        "holds no adapter_model.safetensors",
    ),
    "merge: adapter in a pickle": (
        "finetune_lora.merge",
        ["{pickled_adapter}", "{tmp}/out"],
        "are pickles (adapter_model.bin)",
    ),
    "merge: output that is taken": ("finetune_lora.merge", ["{adapter}", "{letters}"], "is not empty"),
    "merge: output below a file": (
        "finetune_lora.merge",
        ["{adapter}", "rows.jsonl/merged"],
        "rows.jsonl/merged cannot be made: File exists",
    ),
    # Data.
    "dataset: unknown command": ("dataset", ["books"], "no command 'books'"),
    "novels: missing folder": ("dataset", ["novels", "nowhere", "{tmp}/out"], "does not exist"),
    "novels: empty folder": ("dataset", ["novels", "{empty_folder}", "{tmp}/out"], "holds no file that can be read"),
    "novels: file for a folder": ("dataset", ["novels", "short.txt", "{tmp}/out"], "is not a folder"),
    "novels: output in the input": (
        "dataset",
        ["novels", "{letters}", "{letters}/out"],
        "lies in the folder of novels",
    ),
    "novels: output that is taken": ("dataset", ["novels", "{letters}", "{unscored}"], "holds something else"),
    "novels: no worker": (
        "dataset",
        ["novels", "{letters}", "{tmp}/out", "--workers", "0"],
        "--workers 0 is out of range",
    ),
    "novels: missing rules": (
        "dataset",
        ["novels", "{letters}", "{tmp}/out", "--rules", "nowhere.yaml"],
        "nowhere.yaml: No such file or directory",
    ),
    "novels: folder as rules": (
        "dataset",
        ["novels", "{letters}", "{tmp}/out", "--rules", "{empty_folder}"],
        "Is a directory",
    ),
    "novels: broken rules": (
        "dataset",
        ["novels", "{letters}", "{tmp}/out", "--rules", "broken.yaml"],
        "broken.yaml is not YAML: while parsing a flow sequence",
    ),
    "tokens: missing file": (
        "dataset",
        ["tokens", "nowhere.txt", "{tmp}/out", "--model", "{base}"],
        "nowhere.txt does not exist",
    ),
    "tokens: empty file": ("dataset", ["tokens", "empty.txt", "{tmp}/out", "--model", "{base}"], "empty.txt is empty"),
    "tokens: undecodable bytes": (
        "dataset",
        ["tokens", "bytes.txt", "{tmp}/out", "--model", "{base}"],
        "bytes.txt: byte 0xff at offset 12 fits no encoding (tried utf-8,",
    ),
    "tokens: missing model": (
        "dataset",
        ["tokens", "short.txt", "{tmp}/out", "--model", "./nowhere"],
        "model folder ./nowhere does not exist",
    ),
    "tokens: no model": (
        "dataset",
        ["tokens", "short.txt", "{tmp}/out"],
        "the following arguments are required: --model",
    ),
    "tokens: output that is taken": (
        "dataset",
        ["tokens", "short.txt", "{letters}", "--model", "{base}"],
        "holds something else",
    ),
    "conversations: missing file": (
        "dataset",
        ["conversations", "nowhere.jsonl", "{tmp}/out.jsonl", "--task", "title_to_abstract"],
        "nowhere.jsonl: No such file or directory",
    ),
    "conversations: unknown task": (
        "dataset",
        ["conversations", "rows.jsonl", "{tmp}/out.jsonl", "--task", "sing"],
        "--task: no task 'sing' (did you mean 'continue_text'?)",
    ),
    "conversations: no rows file": (
        "dataset",
        ["conversations", "rows.jsonl", "{tmp}/out", "--task", "title_to_abstract"],
        "does not end in .jsonl",
    ),
    "conversations: its own input": (
        "dataset",
        ["conversations", "rows.jsonl", "rows.jsonl", "--task", "title_to_abstract"],
        "rows.jsonl is read and written",
    ),
    "conversations: rows of other fields": (
        "dataset",
        ["conversations", "no_shape.jsonl", "{tmp}/out.jsonl", "--task", "title_to_abstract"],
        "no row is left: 2 a field is empty or missing",
    ),
    "conversations: share above one": (
        "dataset",
        ["conversations", "rows.jsonl", "{tmp}/out.jsonl", "--task", "title_to_abstract", "--chinese_share", "2"],
        "--chinese_share 2.0 is not a share",
    ),
    "preview: missing file": (
        "dataset",
        ["preview", "nowhere.jsonl", "--model", "{base}", "--html", "{tmp}/out.html"],
        "nowhere.jsonl does not exist",
    ),
    "preview: no such row": (
        "dataset",
        ["preview", "rows.jsonl", "--model", "{base}", "--row", "p9", "--html", "{tmp}/out.html"],
        "rows.jsonl has no row p9",
    ),
    "preview: nothing to show": (
        "dataset",
        ["preview", "rows.jsonl", "--model", "{base}", "--rows", "0"],
        "nothing to show",
    ),
    "preview: row of no shape": (
        "dataset",
        ["preview", "no_shape.jsonl", "--model", "{base}", "--html", "{tmp}/out.html"],
        "no_shape.jsonl:2: the row has the fields foo, which make no known shape",
    ),
    "preview: broken parquet": (
        "dataset",
        ["preview", "broken.parquet", "--model", "{base}"],
        "broken.parquet is not a readable parquet file",
    ),
}
