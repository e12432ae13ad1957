"""Loading a checkpoint, or a base with its adapter, to generate with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.inference.packed_weights import pack_weights
from novelgpt.model.fingerprint import base_folder, check_base
from novelgpt.model.hub import locate, looks_like_path
from novelgpt.model.loading import NOT_OF_FILES, adapter_base, find_base, frozen_dtype, load_model
from novelgpt.model.lora import merge_adapter
from novelgpt.model.weight_files import check_adapter_files, check_no_pickles
from novelgpt.settings.arguments import InferenceModelArguments, ModelArguments
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.run_record import newest_finetuning
from novelgpt.settings.small_bases import TINY


def with_default_model(model: InferenceModelArguments) -> InferenceModelArguments:
    """Fill in the model where none is named: the newest finished fine-tuning, or the small base."""
    return model if model.model else replace(model, model=str(newest_finetuning() or TINY))


def load_for_inference(
    model: ModelArguments, tokenizer: PreTrainedTokenizerBase, base: str | None = None
) -> PreTrainedModel:
    """Load a full checkpoint, or a base with an adapter merged into it in memory, ready to generate.

    Merged, since an unmerged adapter adds two matrix products to each layer for each token. On a CPU the linear layers
    are packed, so the model can be neither trained nor saved.

    Args:
        model: a full checkpoint or an adapter.
        tokenizer: its tokenizer.
        base: folder or hub name of the adapter's base, if the user names it.

    Raises:
        UserError: as load_model; or the adapter's base is not on this host, or is another model; or the model computes
            NaN, as after a training that diverged.
    """
    recorded = adapter_base(model.model)
    if recorded is None:
        if base is not None:
            raise UserError(f"--base {base} goes with an adapter, and {model.model} is not one", "leave --base out")
        loaded = load_model(model, tokenizer, frozen_dtype())
    else:
        found = find_base(model.model, recorded, None if base is None else replace(model, model=base))
        loaded = _load_merged(model, tokenizer, found)
    loaded.config.use_cache = True
    loaded.eval()
    if torch.cuda.is_available():
        loaded = loaded.to(torch.device("cuda"))  # type: ignore[arg-type]
    else:
        pack_weights(loaded)
    # Two tokens are enough: a weight that is NaN makes every output that depends on it NaN.
    with torch.inference_mode():
        logits = loaded(input_ids=torch.tensor([[0, 1]], device=loaded.device)).logits
    if logits.isnan().any():
        raise UserError(
            f"{model.model} computes no numbers (NaN): its weights are damaged, or its training has diverged",
            "name an earlier checkpoint-N of the run, or fetch the weights again",
        )
    return loaded


def _load_merged(model: ModelArguments, tokenizer: PreTrainedTokenizerBase, base: str) -> PreTrainedModel:
    if looks_like_path(base) and not Path(base).is_dir():
        raise UserError(
            f"the base of adapter {model.model} is not there any more: {base}",
            "put it back, or name where it is now: --base FOLDER",
        )
    adapter = Path(locate(model))
    check_adapter_files(adapter, model.allow_pickles)
    check_no_pickles(base_folder(base), model.allow_pickles)
    check_base(adapter, base, "name the base that the adapter was trained on: --base FOLDER")
    loaded = load_model(replace(model, model=base), tokenizer, frozen_dtype(), adapter=adapter)
    try:
        return merge_adapter(PeftModel.from_pretrained(loaded, adapter))
    except NOT_OF_FILES:
        raise
    except Exception as error:
        raise UserError(
            f"adapter {model.model} does not fit its base {base}: {reason_of(error)}",
            "use the base that the adapter was trained on",
        ) from error
