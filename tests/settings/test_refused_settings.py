"""Arguments of transformers' Trainer are obeyed, or refused with the reason before a run has a folder."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import finetune.__main__
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.refused_settings import TRACKERS
from novelgpt.settings.runs import FinetuneRun

# Words of the command line, and of the reason.
REFUSED = {
    "upload": (["--push_to_hub"], "--push_to_hub True would have no effect: a training uploads nothing"),
    "name of an upload": (["--hub_model_id", "someone/novel"], "a training uploads nothing"),
    "strategy of uploads": (["--hub_strategy", "end"], "a training uploads nothing"),
    "private upload": (["--hub_private_repo", "True"], "a training uploads nothing"),
    "metrics in batches": (["--batch_eval_metrics"], "three numbers per row"),
    "losses for metrics": (["--include_for_metrics", "loss"], "computed from losses only"),
    "names of labels": (["--label_names", "answers"], "--label_names ['answers'] would have no effect"),
    "columns left out": (["--remove_unused_columns"], "rows hold tokens only"),
    "only losses": (["--prediction_loss_only"], "computed from losses only"),
    "evaluation in batches": (["--eval_do_concat_batches", "False"], "computed over all rows"),
    "objects gathered": (["--eval_use_gather_object"], "three numbers per row"),
    "evaluation in fp16": (["--fp16_full_eval"], "would be rounded"),
    "evaluation in bf16": (["--bf16_full_eval"], "would be rounded"),
    "other batches": (["--auto_find_batch_size"], "during a run"),
    "rows from the start": (["--ignore_data_skip"], "continues with the next rows"),
    "another saver": (["--enable_jit_checkpoint"], "saves the step by itself"),
    "a folder a host": (["--save_on_each_node"], "all hosts write into one run folder"),
    "column of lengths": (["--length_column_name", "size"], "number of its tokens"),
    "prediction": (["--do_predict"], "training generates no answers"),
    "cache": (["--use_cache"], "training keeps no keys and values"),
    "name for no tracker": (["--run_name", "mine"], "--report_to names none"),
    "project for no tracker": (["--project", "mine"], "--report_to names none"),
    "options of AdamW": (["--optim_args", "foo=1"], "adamw_torch_fused takes none"),
    "options that are no pairs": (["--optim", "sgd", "--optim_args", "momentum"], "'momentum', which is not a pair"),
    "targets of AdamW": (["--optim_target_modules", "q_proj"], "optimizes everything that is trained"),
    "batches from one process": (["--accelerator_config", '{"dispatch_batches": true}'], "dispatch_batches"),
    "a second accumulation": (
        ["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 2}}'],
        "--accelerator_config sets gradient_accumulation_kwargs.num_steps",
    ),
    "sharing that is off": (["--fsdp_config", '{"min_num_params": 1}'], "--fsdp is off"),
    "compiler nobody knows": (["--torch_compile_backend", "mine"], "--torch_compile_backend mine is unknown"),
    "compilation nobody knows": (["--torch_compile_mode", "fast"], "--torch_compile_mode fast is unknown"),
    "settings of no mapping": (["--deepspeed", "[]"], "--deepspeed []: No such file"),
    "tracker nobody knows": (["--report_to", "wanbd"], "--report_to wanbd is not a tracker"),
}
# These take the model, so that they are tried a little later; before a run has a folder, too.
TRIED = {
    "schedule without its floor": (["--lr_scheduler_type", "cosine_with_min_lr"], "One of min_lr or min_lr_rate"),
    "option of no schedule": (["--lr_scheduler_kwargs", '{"foo": 1}'], "unexpected keyword argument 'foo'"),
    "option of no checkpointing": (["--activation_checkpointing_kwargs", '{"foo": 1}'], "--activation_checkpointing_"),
    "number of no optimizer": (["--adam_beta1", "2"], "Invalid beta parameter"),
    "smoothing above all": (["--label_smoothing_factor", "5"], "--label_smoothing_factor 5.0 is too large"),
    "noise of no size": (["--neftune_noise_alpha", "nan"], "--neftune_noise_alpha nan is not a number"),
    "DeepSpeed without a launcher": (["--deepspeed", '{"zero_optimization": {"stage": 2}}'], "needs a launcher"),
    "sharing with nobody": (["--fsdp", "full_shard"], "--fsdp shards a model across processes, and there is one"),
    "momentum of no optimizer": (["--optim", "sgd", "--optim_args", "momentum=-1"], "Invalid momentum value"),
}
PACKAGES = {
    "adamw_bnb_8bit": "bitsandbytes", "galore_adamw": "galore_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free_adamw": "schedulefree", "stable_adamw": "optimi", "adamw_torch_4bit": "torchao",
    "adamw_anyprecision": "torchdistx", "apollo_adamw": "apollo_torch",
}  # fmt: skip


def refusal(words: list[str], folder: Path) -> UserError:
    """The error that a run with these words ends in; nothing is left of the run."""
    folder = folder / "run"
    with pytest.raises(UserError) as caught:
        finetune.__main__.main.__wrapped__(["--model", "tiny", "--output_dir", str(folder), *words])  # type: ignore
    assert not folder.exists()
    return caught.value


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_no_effect_is_refused(name: str, tmp_path: Path) -> None:
    words, reason = REFUSED[name]
    assert reason in refusal(words, tmp_path).cause


@pytest.mark.parametrize("name", TRIED)
def test_what_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    words, reason = TRIED[name]
    assert reason in refusal(words, tmp_path).cause


def test_a_key_for_uploads_is_not_shown(tmp_path: Path) -> None:
    told = refusal(["--hub_token", "hf_secret"], tmp_path)
    assert told.cause.startswith("--hub_token would have no effect") and "hf_secret" not in told.cause + told.remedy


def test_a_yaml_file_is_refused_alike(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("push_to_hub: true\n", encoding="utf-8")
    assert "--push_to_hub" in refusal(["--config", str(tmp_path / "mine.yaml")], tmp_path).cause


def test_each_tracker_of_transformers_is_known() -> None:
    # Kubeflow's sets itself where its variables are.
    assert INTEGRATION_TO_CALLBACK.keys() - TRACKERS.keys() == {"tensorboard", "kubeflow"}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_without_its_package_names_the_line_for_pip(tracker: str, tmp_path: Path) -> None:
    modules, packages = TRACKERS[tracker]
    if all(importlib.util.find_spec(module.split(".")[0]) for module in modules):
        pytest.skip(f"{tracker} is installed")
    told = refusal(["--report_to", tracker], tmp_path)
    assert f"--report_to {tracker} needs the package" in told.cause
    assert "-m pip install " in told.remedy and packages[0] in told.remedy


@pytest.mark.parametrize("optimizer", PACKAGES)
def test_an_optimizer_without_its_package_is_told_before_a_run_has_a_folder(optimizer: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[optimizer]) is not None:
        pytest.skip(f"{PACKAGES[optimizer]} is installed")
    told = refusal(["--optim", optimizer], tmp_path)
    assert f"--optim {optimizer}: " in told.cause
    assert "-m pip install " in told.remedy or optimizer == "adamw_anyprecision"


def test_a_number_of_steps_says_that_steps_are_meant(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("save_steps: 7\n", encoding="utf-8")
    for words in (["--save_steps", "7"], ["--config", str(tmp_path / "mine.yaml")]):
        for model in ("tiny", "someone/novel"):
            training = parse_arguments(FinetuneRun, ["--model", model, *words]).training
            assert (training.save_strategy.value, training.save_steps) == ("steps", 7)
    training = parse_arguments(FinetuneRun, ["--model", "someone/novel", "--eval_steps", "3"]).training
    assert (training.eval_strategy.value, training.save_strategy.value) == ("steps", "epoch")
    training = parse_arguments(FinetuneRun, ["--eval_steps", "3", "--eval_strategy", "no"]).training
    assert training.eval_strategy.value == "no"


def test_what_is_obeyed_is_taken() -> None:
    words = ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true", "--report_to", "tensorboard"]
    words += ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", json.dumps({"min_lr_rate": 0.1})]
    words += ["--neftune_noise_alpha", "5", "--label_smoothing_factor", "0.1", "--do_train", "--do_eval"]
    words += ["--train_sampling_strategy", "group_by_length", "--eval_accumulation_steps", "2"]
    training = parse_arguments(FinetuneRun, words).training
    assert training.report_to == [] and training.optim_args == "momentum=0.9,nesterov=true"
