"""Loading a tokenizer, and the tokens with which a base ends."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from novelgpt.model.hub import locate, runs_own_code
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import RUST_PANICS, UserError, reason_of
from novelgpt.settings.run_record import has_read_documents_only, pipeline_of
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.template_bounds import check_template_ends
from novelgpt.text.templates import settle_template


def load_tokenizer(model: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it always has a chat template and a padding token.

    Raises:
        UserError: the folder is missing or holds no tokenizer, the tokenizer needs code that may not run or has no end
            token, or its chat template does not end.
    """
    source, own_code = locate(model), runs_own_code(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=own_code)
    except BaseException as error:  # of any kind: the files can come from anywhere
        ours = isinstance(error, UserError)
        if ours or not (isinstance(error, Exception) or type(error).__module__ == RUST_PANICS):
            raise
        raise UserError(
            f"no tokenizer can be loaded from {model.model}: {reason_of(error)}",
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        ) from error
    if not encode("字", tokenizer):
        # Without its files, some classes load as an empty shell instead of failing.
        raise UserError(
            f"{model.model} holds no tokenizer: it gives no token for any text",
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model.model} has no end token", "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is masked by position, never by id
    if not own_code:
        tokenizer.init_kwargs.pop("auto_map", None)  # saved, it would name files that are not there
    settle_template(tokenizer, source)
    check_template_ends(tokenizer)
    return tokenizer


def configured_ends(config: GenerationConfig | None) -> set[int]:
    """The ids of `eos_token_id`, which may be one id, a list or None."""
    ids = None if config is None else config.eos_token_id
    return set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {ids}


def known_ends(base: str, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> set[int]:
    """Tokens that a base has certainly been trained to end with.

    Args:
        base: its folder or name.
        tokenizer: of the base.
        generation: its generation settings; None: those in its folder.
    """
    folder = Path(base)
    if has_read_documents_only(folder):  # whatever the tokenizer names as the end of an answer
        return {document_end_id(tokenizer)}
    known = {int(tokenizer.eos_token_id)}
    # Continued pretraining saves all end tokens for later use, but has shown the model none of a template's.
    if pipeline_of(folder) == "pretrain":
        return known
    if generation is None and (folder / GENERATION_CONFIG_NAME).is_file():
        generation = GenerationConfig.from_pretrained(folder)
    return known | configured_ends(generation)
