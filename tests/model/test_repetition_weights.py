"""The loss of pseudo-repetitions: weights of a cross-entropy with the gradient of the published loss."""

import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from novelgpt.model.loss import attach_chunked_loss
from novelgpt.text.pseudo_repetitions import repeat_pieces

PENALTY = 0.5


def published_loss(logits: torch.Tensor, labels: torch.Tensor, periods: torch.Tensor) -> torch.Tensor:
    """The sum, token by token, as the paper writes it."""
    logs = log_softmax(logits.float(), -1)
    total = torch.zeros(())
    for row in range(len(labels)):
        for place in range(1, labels.shape[1]):
            if labels[row, place] < 0:
                continue
            log = logs[row, place - 1, labels[row, place]]
            if periods[row, place] == 0:
                total = total - log
                continue
            before = place - int(periods[row, place])
            copy = logs[row, before - 1, labels[row, before]].exp().detach()
            total = total - torch.log(1 - (log.exp() - PENALTY * copy).abs())
    return total


def test_weights_have_the_gradient_and_the_value_of_the_published_loss(base_folder) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    none = torch.tensor([], dtype=torch.int64)
    rows = [repeat_pieces(torch.randint(5, 900, (60,)), none, number, False) for number in (3, 8)]
    batch = {"input_ids": torch.stack([ids for ids, _, _ in rows])}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    batch["repeat_periods"] = torch.stack([periods for _, periods, _ in rows])
    assert (batch["repeat_periods"] > 0).sum() > 20
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():  # so that repeated tokens are likely, and some more so than their copies
        for parameter in model.parameters():
            parameter.mul_(1.5)
    periods, labels = batch["repeat_periods"], batch["labels"]
    items = int((labels >= 0).sum())
    expected = published_loss(model(input_ids=batch["input_ids"]).logits, labels, periods) / items
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    attach_chunked_loss(model)
    for divisor in (None, items):
        loss = model(**batch, num_items_in_batch=divisor).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-6)
        model.zero_grad()
    with torch.no_grad():  # in evaluation, nothing is weighted
        plain = model(**{name: batch[name] for name in ("input_ids", "labels")}).loss
        assert torch.equal(model(**batch).loss, plain)
