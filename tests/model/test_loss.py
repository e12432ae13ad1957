"""The chunked loss is plain cross-entropy of all logits, in its value and in the gradient of every parameter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.model import loss as loss_module
from novelgpt.model.baichuan import modeling
from novelgpt.model.forward_checks import head_is_last
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from tests.rounding import LOSS_TOLERANCE, assert_close

VOCABULARY, WIDTH = 97, 16
FAMILIES: dict[str, tuple[type, type]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
}
Batch = dict[str, Any]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 tokens at a time, softmax by 5, the head's gradient by 3 rows: borders lie within every case."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(loss_module.PRODUCT_BYTES, "cpu", 3 * WIDTH * 4)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 5 * VOCABULARY)


@pytest.fixture
def whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of these small cases at once."""
    for name, size in (("CHUNK_BYTES", 2**27), ("PRODUCT_BYTES", 2**23)):
        monkeypatch.setitem(getattr(loss_module, name), "cpu", size)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 2**21)


def tiny(family: str = "qwen3", tied: bool = True, **changes: Any) -> PreTrainedModel:
    """Weights large enough for losses and gradients that tell right from wrong."""
    config, architecture = FAMILIES[family]
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0}
    torch.manual_seed(3)
    settings = config(**({"vocab_size": VOCABULARY, "tie_word_embeddings": tied} | sizes | more | changes))
    model = architecture._from_config(settings, attn_implementation="packed")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    return model.train()


def rows(sizes: list[int], seed: int = 0) -> list[Batch]:
    """Rows of which about two thirds are trained; labels may stand at the first token, which nothing tells."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        ids = torch.randint(1, VOCABULARY, (size,), generator=draw)
        labels = torch.where(torch.rand(size, generator=draw) < 0.65, ids, IGNORE_INDEX)
        made.append({"input_ids": ids, "labels": labels})
    return made


def padded(seed: int = 0) -> Batch:
    return Collator(pad_token_id=0)(rows([40, 57, 21, 48], seed))


def packed(seed: int = 0) -> Batch:
    """Two rows of three documents; the second row is shorter."""
    documents = rows([30, 11, 19, 8, 1, 40], seed)
    for document in documents:
        document["labels"][0] = IGNORE_INDEX
        document["position_ids"] = torch.arange(len(document["labels"]))
    names = ("input_ids", "labels", "position_ids")
    packs = [{name: torch.cat([d[name] for d in part]) for name in names} for part in (documents[:3], documents[3:])]
    return Collator(pad_token_id=0)(packs)


def untrained() -> Batch:
    batch = padded()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    batch["labels"][:, 0] = 5  # of no consequence: nothing stands before a first token
    return batch


def weighted(batch: Batch, seed: int = 0) -> Batch:
    """Weights from 0.1 to 2.1, and 1 for some tokens, where there are labels."""
    draw = torch.Generator().manual_seed(seed)
    shape = batch["labels"].shape
    weights = torch.where(torch.rand(shape, generator=draw) < 0.2, 1.0, 0.1 + 2 * torch.rand(shape, generator=draw))
    return batch | {"loss_weights": weights * (batch["labels"] != IGNORE_INDEX)}


def plain_loss(model: nn.Module, batch: Batch, items: torch.Tensor | int | None = None) -> torch.Tensor:
    """As transformers' own loss: all logits in fp32, shifted, weighted, summed, divided."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
    logits = model(**inputs).logits.float()[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    weights = batch.get("loss_weights", (batch["labels"] != IGNORE_INDEX).float())[:, 1:].flatten()
    return (losses * weights).sum() / (max(1e-9, float(weights.sum())) if items is None else items)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def attached(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attach_chunked_loss(base, head_is_last(base))
    return model


def assert_equal_gradients(ours: dict[str, torch.Tensor | None], plain: dict[str, torch.Tensor | None]) -> None:
    assert ours.keys() == plain.keys()
    largest = max(float(g.abs().max()) for g in plain.values() if g is not None)
    assert largest > 1e-3  # else nothing is compared
    for name, gradient in ours.items():
        expected = plain[name]
        assert (gradient is None) == (expected is None), name
        if gradient is not None and expected is not None:
            assert gradient.dtype == expected.dtype
            assert_close(gradient, expected, name)


def assert_same(model: nn.Module, batch: Batch, items: torch.Tensor | int | None = None) -> None:
    reference = copy.deepcopy(model)
    expected = plain_loss(reference, batch, items)
    expected.backward()
    model = attached(model)
    options = {} if items is None else {"num_items_in_batch": items}
    loss = model(**batch, **options).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    assert_equal_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_loss_and_gradients_are_those_of_all_logits(family: str, tied: bool, make_batch: Callable[[], Batch]) -> None:
    changes = {"sliding_window": 6} if family == "mistral" else {}
    assert_same(tiny(family, tied, **changes), make_batch())


@pytest.mark.usefixtures("whole_chunks")
@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("tied", [True, False])
def test_all_at_once(tied: bool, make_batch: Callable[[], Batch]) -> None:
    assert_same(tiny("qwen3", tied), make_batch())


@pytest.mark.parametrize("items", [None, 7, 1000, torch.tensor(345), torch.tensor(61.0)])
def test_items_of_the_whole_step(items: torch.Tensor | int | None) -> None:
    assert_same(tiny(), padded(), items)


class NormHead(nn.Module):
    """As Baichuan2's: the weight's rows are normalised before the product."""

    def __init__(self, vocab_size: int = VOCABULARY, hidden_size: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, functional.normalize(self.weight))


class ScaledHead(NormHead):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(hidden)


class ScaledLinear(nn.Linear):
    """A linear layer that is not one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 1.7 * super().forward(input)


def with_head(make_head: Callable[[], nn.Module]) -> PreTrainedModel:
    model = tiny(tied=False)
    torch.manual_seed(4)
    model.set_output_embeddings(make_head())
    return model


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "make_head",
    [
        NormHead,
        lambda: nn.Linear(WIDTH, VOCABULARY, bias=True),
        lambda: ScaledLinear(WIDTH, VOCABULARY, bias=False),
        lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)),
    ],
    ids=["normalised", "bias", "overridden", "two layers"],
)
def test_heads_of_other_kinds(make_head: Callable[[], nn.Module], trained: bool) -> None:
    model = with_head(make_head)
    model.get_output_embeddings().requires_grad_(trained)
    assert_same(model, padded())


def test_a_head_with_some_weights_frozen() -> None:
    model = with_head(lambda: nn.Linear(WIDTH, VOCABULARY, bias=True))
    model.get_output_embeddings().weight.requires_grad_(False)
    assert_same(model, padded())


HEADS_OF_KINDS: dict[str, Callable[[], nn.Module]] = {
    "tied": tiny,
    "untied": lambda: tiny("qwen2", tied=False),
    "frozen": lambda: with_head(lambda: nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)),
    "normalised": lambda: with_head(baichuan2_head),
    "bias": lambda: with_head(lambda: nn.Linear(WIDTH, VOCABULARY, bias=True)),
    "two layers": lambda: with_head(lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))),
    "adapter": lambda: adapted(False, target_modules=["q_proj", "lm_head"]),
    "logits changed later": lambda: tiny("granite", logits_scaling=3.0),
}


def baichuan2_head() -> nn.Module:
    head = modeling.NormHead(WIDTH, VOCABULARY)
    nn.init.normal_(head.weight)
    return head


@pytest.mark.parametrize("items", [None, torch.tensor(0.37), torch.tensor(61.0)])
@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("kind", HEADS_OF_KINDS)
def test_weights_of_tokens_are_those_of_plain_cross_entropy(
    kind: str, make_batch: Callable[[], Batch], items: torch.Tensor | None
) -> None:
    """Loss and gradients of each kind of head, the divisor below 1 among them."""
    assert_same(HEADS_OF_KINDS[kind](), weighted(make_batch()), items)


@pytest.mark.parametrize("kind", ["tied", "normalised", "two layers", "logits changed later"])
def test_equal_weights_are_none(kind: str) -> None:
    plain, equal = (attached(HEADS_OF_KINDS[kind]()) for _ in range(2))
    batch = packed()
    losses = [plain(**batch).loss, equal(**batch, loss_weights=0.3 * (batch["labels"] != IGNORE_INDEX)).loss]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=LOSS_TOLERANCE)
    assert_equal_gradients(gradients(equal), gradients(plain))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_that_are_changed_after_the_head(tied: bool) -> None:
    """Granite divides them; the model is told apart from those whose head comes last."""
    model = tiny("granite", tied, logits_scaling=3.0, embedding_multiplier=2.0)
    assert not head_is_last(model)
    assert_same(model, packed())
    assert head_is_last(tiny())


def adapted(tied: bool, **changes: Any) -> nn.Module:
    model = tiny(tied=tied)
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    settings = LoraConfig(**options, **changes)
    torch.manual_seed(5)
    model = get_peft_model(model, settings)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize(
    ("tied", "changes"),
    [
        (True, {"target_modules": "all-linear"}),
        (False, {"target_modules": "all-linear"}),
        (False, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (False, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    ],
    ids=["tied", "frozen head", "adapted head", "trained head", "DoRA head"],
)
def test_adapters(tied: bool, changes: dict[str, Any], make_batch: Callable[[], Batch]) -> None:
    assert_same(adapted(tied, **changes), make_batch(), items=50)


@pytest.mark.parametrize("make", [tiny, lambda: adapted(True, target_modules="all-linear")], ids=["full", "adapter"])
def test_activation_checkpointing_changes_nothing(make: Callable[[], nn.Module]) -> None:
    plain, checkpointed = make(), make()
    plain_loss(plain, packed()).backward()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    attached(checkpointed)
    checkpointed(**packed()).loss.backward()
    assert_equal_gradients(gradients(checkpointed), gradients(plain))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "tied": tiny,
    "untied": lambda: tiny(tied=False),
    "normalised": lambda: with_head(NormHead),
    "adapter": lambda: adapted(True, target_modules="all-linear"),
    "adapted head": lambda: adapted(False, target_modules=["q_proj", "lm_head"]),
    "logits changed later": lambda: tiny("granite", logits_scaling=3.0),
}


@pytest.mark.parametrize("items", [None, 9, torch.tensor(9), 0, torch.tensor(0)])
@pytest.mark.parametrize("kind", HEADS)
def test_nothing_to_train_gives_zero_gradients_for_every_parameter(kind: str, items: torch.Tensor | int | None) -> None:
    """Gradients that are there, since data parallelism waits for each of them."""
    model = attached(HEADS[kind]())
    loss = model(**untrained(), num_items_in_batch=items).loss
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() == 0.0, name


@pytest.mark.parametrize("kind", HEADS)
def test_losses_add_up_over_micro_batches(kind: str) -> None:
    """One without anything to train among them; the last scaled, as the Trainer does for several processes."""
    batches = [(padded(1), 1.0), (untrained(), 1.0), (packed(2), 1.0), (padded(3), 3.0)]
    model = HEADS[kind]()
    reference = copy.deepcopy(model)
    for batch, factor in batches:
        (factor * plain_loss(reference, batch, 300)).backward()
    attached(model)
    for batch, factor in batches:
        (factor * model(**batch, num_items_in_batch=torch.tensor(300)).loss).backward()
    assert_equal_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("kind", ["untied", "normalised", "adapted head"])
def test_a_scaled_loss_scales_every_gradient(kind: str) -> None:
    once, thrice = HEADS[kind](), HEADS[kind]()
    attached(once)(**padded()).loss.backward()
    (3.0 * attached(thrice)(**padded()).loss).backward()
    tripled = {name: None if gradient is None else 3.0 * gradient for name, gradient in gradients(once).items()}
    assert_equal_gradients(gradients(thrice), tripled)


@pytest.mark.parametrize("make_head", [None, NormHead])
def test_extreme_logits(make_head: Callable[[], nn.Module] | None) -> None:
    """Losses of hundreds of nats, where probabilities are zero in fp32."""
    model = tiny(tied=False) if make_head is None else with_head(lambda: ScaledHead(900.0))
    if make_head is None:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(300.0)
    batch = padded()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        told = model(**inputs).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    of_targets = told.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORE_INDEX]
    assert of_targets.min() < -200.0 and of_targets.exp().min() == 0.0
    assert_same(model, batch)


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(functional.cosine_similarity(left.flatten().double(), right.flatten().double(), dim=0))


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("kind", HEADS)
def test_bf16_autocast_is_as_near_as_bf16_can_be(kind: str, make_batch: Callable[[], Batch]) -> None:
    model = HEADS[kind]()
    reference = copy.deepcopy(model)
    attached(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [plain_loss(reference, make_batch(), 40), model(**make_batch(), num_items_in_batch=40).loss]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    plain = gradients(reference)
    for name, gradient in gradients(model).items():
        expected = plain[name]
        assert (gradient is None) == (expected is None), name
        if gradient is not None and expected is not None:
            assert gradient.dtype == expected.dtype == torch.float32
            assert cosine(gradient, expected) > 0.999, name
            assert float(gradient.norm()) == pytest.approx(float(expected.norm()), rel=0.01)


def test_weights_held_in_bf16() -> None:
    model = tiny(tied=False).to(torch.bfloat16)
    reference = copy.deepcopy(model).float()
    plain_loss(reference, padded()).backward()
    attached(model)(**padded()).loss.backward()
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.dtype == torch.bfloat16
        assert cosine(gradient, expected[name]) > 0.99, name


@pytest.mark.parametrize("factor", [None, 1e-6, 1e6, "of either sign"])
def test_fp16_keeps_gradients_of_steps_with_many_tokens(factor: float | str | None) -> None:
    """A loss divided by 100,000 tokens and multiplied again, as gradient scaling does; weights may be of any size, and
    sum up to next to nothing.
    """
    model = HEADS["untied"]()
    reference = copy.deepcopy(model)
    batch, items = padded(), 100_000.0
    if isinstance(factor, float):
        batch, items = weighted(batch), items * factor
        batch["loss_weights"] *= factor
    elif factor is not None:
        batch = weighted(batch)
        weights, trained = batch["loss_weights"], batch["labels"][:, 1:] != IGNORE_INDEX
        weights[:, 1::2] *= -1
        first = trained.nonzero()[0] + torch.tensor([0, 1])
        weights[tuple(first)] -= weights[:, 1:][trained].sum() - 1e-6
        assert weights[:, 1:][trained].sum().abs() < 1e-4 < weights[:, 1:][trained].abs().sum()
    (2.0**14 * plain_loss(reference, batch, torch.tensor(items))).backward()
    attached(model)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
    (2.0**14 * loss).backward()
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        assert gradient is not None and expected[name] is not None
        assert cosine(gradient, expected[name]) > 0.999, name
        assert float(gradient.norm()) == pytest.approx(float(expected[name].norm()), rel=0.01)


@pytest.mark.parametrize("kind", ["tied", "logits changed later"])
def test_evaluation_weights_the_loss_and_not_those_of_tokens(kind: str) -> None:
    model = attached(HEADS[kind]().eval())
    batch = weighted(packed())
    with torch.no_grad():
        plain, output = model(**{**batch, "loss_weights": None}), model(**batch)
    assert torch.equal(output.token_losses, plain.token_losses)
    weights = batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    expected = (plain.token_losses * weights).sum() / weights.sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    assert output.loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_tells_each_tokens_loss_and_hit(kind: str, context: Callable[[], Any]) -> None:
    model = HEADS[kind]().eval()
    batch = packed()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE_INDEX
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1][trained]
    targets = targets[trained]
    # Half of the targets are what the model would say, so that there are hits.
    targets = torch.where(torch.arange(len(targets)) % 2 == 0, logits.argmax(-1), targets)
    batch["labels"][:, 1:][trained] = targets
    attached(model)
    with context():
        output = model(**batch)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    assert output.token_losses.dtype == torch.float32 and output.token_hits.dtype == torch.bool
    assert_close(output.token_losses, expected)
    assert output.token_hits.tolist() == (logits.argmax(-1) == targets).tolist()
    assert output.token_hits.any() and not output.token_hits.all()
    assert output.loss.item() == pytest.approx(expected.mean().item(), rel=LOSS_TOLERANCE)
    with context():
        nothing = model(**untrained())
    assert (nothing.loss.item(), len(nothing.token_losses), len(nothing.token_hits)) == (0.0, 0, 0)


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("kind", HEADS)
def test_without_labels_logits_are_what_they_were(kind: str, make_batch: Callable[[], Batch]) -> None:
    model = HEADS[kind]().eval()
    inputs = {name: value for name, value in make_batch().items() if name != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        after = attached(model)(**inputs).logits
    assert after.shape == (*inputs["input_ids"].shape, VOCABULARY)
    assert torch.equal(before, after)


def small_gpt2() -> PreTrainedModel:
    """Positions are learned here, so that answers change where padding shifts them."""
    torch.manual_seed(6)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


@pytest.mark.parametrize("kind", [*HEADS, "gpt2"])
def test_generation_is_what_it_was(kind: str) -> None:
    model = (small_gpt2() if kind == "gpt2" else HEADS[kind]()).eval()
    ids = rows([12, 12, 12])
    prompts = torch.stack([row["input_ids"] for row in ids])
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": 2}

    def answers() -> list[list[int]]:
        whole = model.generate(input_ids=prompts, attention_mask=mask, **options)
        beams = model.generate(input_ids=prompts[:1], num_beams=3, **options)
        return whole.tolist() + beams.tolist()

    before = answers()
    attached(model)
    assert answers() == before


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made within; the model's own weights, and views of them, are not made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.elements = 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
                self.elements = max(self.elements, tensor.numel())
        return result


LARGE = {"vocab_size": 2048, "hidden_size": 64}


def largest_tensor(model: nn.Module, batch: Batch) -> int:
    with Largest(model) as made:
        loss = model(**batch).loss
        if torch.is_grad_enabled():
            loss.backward()
    return made.elements


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("gradients_made", [True, False])
@pytest.mark.parametrize("make_head", [None, NormHead])
def test_all_logits_are_never_made(
    make_head: type | None, gradients_made: bool, make_batch: Callable[[], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
    batch = make_batch()
    batch["labels"] = batch["input_ids"].clone()
    all_logits = batch["labels"].numel() * LARGE["vocab_size"]
    model = tiny(tied=make_head is None, **LARGE)
    if make_head is not None:
        model.set_output_embeddings(make_head(**LARGE))
    with torch.set_grad_enabled(gradients_made):
        with Largest(model) as plain:
            plain_loss(model, batch)
        assert plain.elements >= all_logits  # as this test would see it
        assert largest_tensor(attached(model), batch) < all_logits / 1.5


def test_a_frozen_head_costs_no_buffer_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
    size = LARGE["vocab_size"] * LARGE["hidden_size"]
    for frozen in (True, False):
        model = tiny(tied=False, **LARGE)
        model.get_input_embeddings().requires_grad_(False)
        head = model.get_output_embeddings().requires_grad_(not frozen)
        largest = largest_tensor(attached(model), padded())
        assert (head.weight.grad is None, largest < size) == (frozen, frozen)
        assert model.get_decoder().layers[0].mlp.down_proj.weight.grad is not None


def test_generation_makes_logits_of_the_last_tokens_only() -> None:
    model = attached(tiny(**LARGE).eval())
    prompts = padded()["input_ids"].clamp(min=1)
    with Largest(model) as made:
        model.generate(input_ids=prompts, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert made.elements < prompts.numel() * LARGE["vocab_size"] / 2
