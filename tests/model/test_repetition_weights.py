"""The loss of pseudo-repetitions: weights of a cross-entropy with the gradient of the published loss."""

from typing import Any

import numpy
import pytest
import torch
from torch.nn.functional import cosine_similarity, log_softmax
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.text.collator import Collator
from novelgpt.text.packing import PackedBlocks, TokenizedText
from tests.rounding import LOSS_TOLERANCE, assert_close

PENALTY = 0.5
VOCABULARY = 11
Batch = dict[str, Any]
Gradients = dict[str, torch.Tensor]


def tiny(**changes: Any) -> PreTrainedModel:
    """Weights large enough for repetitions that are likelier than their copies, and others that are less likely."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.9, pad_token_id=0, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation="packed").train()


def packed(share: float = 0.4) -> Batch:
    """Blocks in which documents start: pseudo-repetitions, plain text, and a shorter block of pseudo-repetitions."""
    tokens = numpy.random.default_rng(2).integers(1, VOCABULARY, 210).astype(numpy.uint16)
    blocks = PackedBlocks([TokenizedText(tokens, numpy.array([0, 33, 120, 172]))], 81).with_repetitions(share)
    return Collator(0)([blocks[index] for index in range(len(blocks))])


def excesses(logs: torch.Tensor, labels: torch.Tensor, periods: torch.Tensor) -> torch.Tensor:
    """[repeated tokens] p - PENALTY * q, with the gradient of p."""
    found = []
    for row, place in (periods > 0).nonzero().tolist():
        before = place - int(periods[row, place])
        likely, copy = (logs[row, at - 1, labels[row, at]].exp() for at in (place, before))
        found.append(likely - PENALTY * copy.detach())
    return torch.stack(found)


def published_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The sum, token by token, as the paper writes it."""
    labels, periods = batch["labels"], batch["repeat_periods"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "repeat_periods")}
    logs = log_softmax(model(**inputs).logits.float(), -1)
    plain = (labels[:, 1:] >= 0) & (periods[:, 1:] == 0)
    told = logs[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -told[plain].sum() - torch.log(1 - excesses(logs, labels, periods).abs()).sum()


def gradients(model: PreTrainedModel) -> Gradients:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def cosine(left: Gradients, right: Gradients) -> float:
    ours, theirs = (torch.cat([one[name].double().flatten() for name in sorted(one)]) for one in (left, right))
    return float(cosine_similarity(ours, theirs, dim=0))


def test_the_blocks_hold_repetitions_of_both_signs_and_text_and_padding() -> None:
    batch = packed()
    labels, periods = batch["labels"], batch["repeat_periods"]
    assert [int((row > 0).sum()) > 10 for row in periods] == [True, False, True]
    assert [int((row != 0).sum()) for row in batch["input_ids"]] == [81, 81, 50]
    assert all(int((row[1:81] < 0).sum()) >= 1 for row in labels)  # a document starts in each
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "repeat_periods")}
    found = excesses(log_softmax(tiny()(**inputs).logits, -1), labels, periods)
    assert int((found > 0.1).sum()) > 5 and int((found < -0.01).sum()) > 3


@pytest.mark.parametrize("head_is_last", [True, False])
def test_weights_have_the_gradient_and_the_value_of_the_published_loss(head_is_last: bool) -> None:
    model, batch = tiny(), packed()
    items = int((batch["labels"][:, 1:] >= 0).sum())
    expected = published_loss(model, batch) / items
    expected.backward()
    wanted = gradients(model)
    attach_chunked_loss(model, head_is_last)
    for divisor, share in ((None, 1.0), (3 * items, 1 / 3)):
        loss = model(**batch, num_items_in_batch=divisor).loss
        loss.backward()
        assert loss.item() == pytest.approx(share * expected.item(), rel=LOSS_TOLERANCE)
        for name, gradient in gradients(model).items():
            assert_close(gradient, share * wanted[name], name, roundings=2048)
    with torch.no_grad():  # in evaluation, nothing is weighted
        plain = model(**{name: value for name, value in batch.items() if name != "repeat_periods"}).loss
        assert torch.equal(model(**batch).loss, plain)


def test_bf16_is_as_near_as_bf16_can_be() -> None:
    model, batch = tiny(), packed()
    items = int((batch["labels"][:, 1:] >= 0).sum())
    expected = published_loss(model, batch) / items
    expected.backward()
    wanted = gradients(model)
    attach_chunked_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert cosine(gradients(model), wanted) > 0.99


def test_both_passes_draw_the_same_and_leave_the_generator_where_one_does() -> None:
    model, batch = tiny(attention_dropout=0.5), packed()

    def drawn(seed: int, compute: Any) -> tuple[float, Gradients, torch.Tensor]:
        torch.manual_seed(seed)
        loss = compute()
        state = torch.get_rng_state()
        loss.backward()
        return loss.item(), gradients(model), state

    expected = {seed: drawn(seed, lambda: published_loss(model, batch)) for seed in (1, 2)}
    assert abs(expected[1][0] - expected[2][0]) > 1.0  # dropout is there
    attach_chunked_loss(model)
    for seed, (value, wanted, state) in expected.items():
        loss, ours, after = drawn(seed, lambda: model(**batch, num_items_in_batch=1).loss)
        assert loss == pytest.approx(value, rel=LOSS_TOLERANCE)
        assert torch.equal(after, state)
        for name, gradient in ours.items():
            assert_close(gradient, wanted[name], name, roundings=2048)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_repetitions_have_the_usual_loss_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    """Whether or not they come with periods, as they do where all processes must do both passes."""
    model, plain = tiny(attention_dropout=0.5), packed(share=0.0)
    if bias:
        model.set_output_embeddings(torch.nn.Linear(16, VOCABULARY))
    attach_chunked_loss(model)
    assert "repeat_periods" not in plain
    outcomes = []
    for batch in (plain, plain | {"repeat_periods": torch.zeros_like(plain["labels"])}):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, num_items_in_batch=torch.tensor(300)).loss
        loss.backward()
        outcomes.append((loss, gradients(model)))
    (usual, wanted), (ours, found) = outcomes
    assert torch.equal(ours, usual)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_weights_of_ones_own_are_refused() -> None:
    model, batch = tiny(), packed()
    attach_chunked_loss(model)
    with pytest.raises(ValueError, match="loss_weights and repeat_periods"):
        model(**batch, loss_weights=torch.ones(batch["labels"].shape))
