"""What must hold of a model's forward pass before it is trained, checked on a few tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator

# Tokens of the documents used.
FIRST, SECOND = 11, 13
# Relative to the largest logit: another document must change nothing, packing may change the rounding.
LEAK = 1e-5
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def head_is_last(model: PreTrainedModel) -> bool:
    """Whether logits are the head's output on the decoder's output, with nothing after it.

    Under ZeRO-3 the weights are sharded before training, so it is derived from the settings that change logits.

    Raises:
        UserError: the model does not run with the attention it was loaded with.
    """
    if is_deepspeed_zero3_enabled():
        return not any(
            vars(model.config).get(name) not in (None, 1, 1.0)
            for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        )
    ids = _documents(model)[0][None]
    with torch.no_grad():
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        except ValueError as error:
            raise UserError(
                f"{type(model).__name__} does not run with --attention {model.config._attn_implementation}: {error}",
                "--attention eager",
            ) from error
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        again = model.get_output_embeddings()(hidden)  # type: ignore[misc]
    return torch.allclose(logits.float(), again.float(), rtol=1e-4, atol=1e-5)


def check_packing(model: PreTrainedModel) -> None:
    """Check that no document in a packed row sees another one, and that its logits are those it has alone.

    Raises:
        UserError: otherwise, or the model does not accept packed rows.
    """
    if is_deepspeed_zero3_enabled():
        if not model.is_backend_compatible():
            raise _refusal(model, "its attention does not accept document boundaries")
        return
    first, second, other = _documents(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, replaced = (_last_logits(model, [document, second]) for document in (first, other))
            alone = model(input_ids=second[None], use_cache=False).logits[0].float()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise _refusal(model, (str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    finally:
        model.train(training)
    size = float(alone.abs().max())
    rounding = ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16])
    if float((packed - replaced).abs().max()) > LEAK * size or float((packed - alone).abs().max()) > rounding * size:
        raise _refusal(model, "documents in a row see each other")


def _documents(model: PreTrainedModel) -> list[torch.Tensor]:
    """Three documents of fixed random tokens: two of one length, one of another between them."""
    draw = torch.Generator().manual_seed(0)
    sizes = (FIRST, SECOND, FIRST)
    vocabulary = int(model.config.vocab_size)
    return [torch.randint(vocabulary, (size,), generator=draw).to(model.device) for size in sizes]


def _last_logits(model: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    """[tokens of the last document, vocabulary] logits of a row that packs all documents."""
    ids = torch.cat(documents).cpu()
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    batch = Collator(pad_token_id=0)([{"input_ids": ids, "labels": ids, "position_ids": positions}])
    del batch["labels"]
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return model(**batch, use_cache=False).logits[0, -len(documents[-1]) :].float()


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} with --attention {model.config._attn_implementation} cannot train on packed rows: "
        f"{reason}",
        "--packing False pads rows instead; --attention eager may support packing for this model",
    )
