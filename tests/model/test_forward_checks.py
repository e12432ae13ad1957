"""Models that cannot keep packed documents apart are refused, and those that change the head's logits are told."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.forward_checks import check_packing, head_is_last
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.errors import UserError
from tests.rounding import LOSS_TOLERANCE, assert_close

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FEED_FORWARD = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**FEED_FORWARD),
    "mistral, sliding window": MistralConfig(**FEED_FORWARD, sliding_window=5),
    "gemma2, soft caps": Gemma2Config(**FEED_FORWARD, head_dim=8, sliding_window=5),
    "bloom, ALiBi of its own": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1),
}


def build(name: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    for parameter in model.parameters():  # the initial weights are too small for soft caps to show
        parameter.data *= 8.0 if parameter.dim() > 1 else 1.0
    return model


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", PACKED_ATTENTION), ("llama", "sdpa"), ("llama", "eager"),
        ("mistral, sliding window", PACKED_ATTENTION), ("gemma2, soft caps", "eager"),
    ],
)  # fmt: skip
def test_models_that_keep_documents_apart_pass(name: str, attention: str) -> None:
    check_packing(build(name, attention))


@pytest.mark.parametrize(
    ("name", "attention", "cause"),
    [
        ("bloom, ALiBi of its own", "eager", "documents in a row see each other"),
        ("gemma2, soft caps", PACKED_ATTENTION, "softcap"),
    ],
)
def test_models_that_do_not_are_refused(name: str, attention: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        check_packing(build(name, attention))
    assert "--packing False" in caught.value.remedy


def test_an_attention_that_forgets_the_borders_is_refused() -> None:
    model = build("llama", "sdpa")
    forward = model.forward
    model.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != "position_ids"})
    with pytest.raises(UserError, match="see each other"):
        check_packing(model)


@pytest.mark.parametrize(
    ("name", "last"), [("llama", True), ("mistral, sliding window", True), ("gemma2, soft caps", False)]
)
def test_the_loss_is_exact_whether_or_not_the_head_is_last(name: str, last: bool) -> None:
    model = build(name, "eager")
    assert head_is_last(model) is last
    ids = torch.arange(3, 27).view(2, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    logits = model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100]
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != -100])
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    attach_chunked_loss(model, head_is_last(model))
    loss = model(input_ids=ids, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted)
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=labels)
    assert torch.equal(outputs.token_hits, logits.argmax(-1) == labels[:, 5:].flatten())
    assert outputs.token_losses.mean().item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
