"""Loading a tokenizer, and the tokens that end things."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from novelgpt.model.hub import locate, runs_own_code
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import RUST_PANICS, UserError, reason_of
from novelgpt.text.encoding import encode
from novelgpt.text.template_bounds import check_template_ends
from novelgpt.text.templates import settle_template


def load_tokenizer(model: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template and a padding token for certain.

    Raises:
        UserError: the folder is missing or holds no tokenizer, it needs code that may not run, it has no end token, or
            its chat template does not end.
    """
    source, own_code = locate(model), runs_own_code(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=own_code)
    except BaseException as error:  # of any kind: what is read are files of any origin
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
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is told by position, never by id
    if not own_code:
        tokenizer.init_kwargs.pop("auto_map", None)  # saved, it would name files that are not there
    settle_template(tokenizer, source)
    check_template_ends(tokenizer)
    return tokenizer
