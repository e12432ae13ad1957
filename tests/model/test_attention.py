"""No token of a packed row attends to another document, and packing changes nothing else, on any path."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
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

from novelgpt.model.attention import packed_attention
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from tests.rounding import assert_close

VOCABULARY = 83
WINDOW = 5
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama, a key for each head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama, one key for all heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2, window in some layers": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": LAYERS},
    ),
    "mistral, window": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
}
# Longer and shorter than the window, and of one token.
DOCUMENTS = [[17, 9, 4], [1, 12, 1, 6], [23]]


def tiny(kind: str, attention: str, **more_changes: Any) -> PreTrainedModel:
    """The same weights for each attention, large enough for attention to matter."""
    config, architecture, changes = KINDS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = config(**({"vocab_size": VOCABULARY, "head_dim": 8} | sizes | more | changes | more_changes))
    torch.manual_seed(7)
    model = architecture._from_config(settings, attn_implementation=attention)
    model.requires_grad_(True)
    return model.eval()


def random_documents(seed: int, sizes: list[list[int]] | None = None) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(3, VOCABULARY, (size,), generator=draw) for size in row]
        for row in (DOCUMENTS if sizes is None else sizes)
    ]


def pack(rows: list[list[torch.Tensor]]) -> dict[str, Any]:
    packs = []
    for row in rows:
        labels = [torch.cat([torch.tensor([IGNORE_INDEX]), document[1:]]) for document in row]
        positions = [torch.arange(len(document)) for document in row]
        packs.append({"input_ids": torch.cat(row), "labels": torch.cat(labels), "position_ids": torch.cat(positions)})
    return Collator(pad_token_id=0)(packs)


def logits(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_another_document_changes_no_bit(kind: str, precision: torch.dtype) -> None:
    model = tiny(kind, "packed")
    rows, others = random_documents(1), random_documents(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        before = logits(model, pack(rows))
        for index, row in enumerate(rows):
            for place in range(len(row)):
                # All others are replaced, the ones before, the ones after and those of other rows.
                replaced = [list(other) for other in others]
                replaced[index][place] = row[place]
                after = logits(model, pack(replaced))
                begin = sum(map(len, row[:place]))
                span = slice(begin, begin + len(row[place]))
                assert torch.equal(before[index, span], after[index, span])
                if len(row) > 1:
                    assert not torch.equal(before[index], after[index])
    assert before.isfinite().all()


@pytest.mark.parametrize("oracle", ["sdpa", "eager"])
def test_a_document_in_a_pack_is_as_alone(kind: str, oracle: str) -> None:
    model, alone = tiny(kind, "packed"), tiny(kind, oracle)
    rows = random_documents(3)
    batch = pack(rows)
    longest = batch["input_ids"].shape[1]
    assert any(sum(map(len, row)) < longest for row in rows)  # some end in padding
    with torch.no_grad():
        outputs = logits(model, batch)
        for row, output in zip(rows, outputs, strict=True):
            begin = 0
            for document in row:
                expected = alone(input_ids=document[None], use_cache=False).logits[0]
                assert_close(output[begin : begin + len(document)], expected)
                begin += len(document)


def test_the_window_and_the_borders_matter(kind: str) -> None:
    """Else the tests above would hold for any attention."""
    model = tiny(kind, "packed")
    row = random_documents(3)[0]
    with torch.no_grad():
        together = logits(model, pack([row]))[0, len(row[0]) :]
        leaking = logits(model, pack([[torch.cat(row)]]))[0, len(row[0]) :]
        assert float((together - leaking).abs().max()) > 1e-2
        if "window" in kind:
            wider = tiny(kind, "packed", sliding_window=100)
            assert float((together - logits(wider, pack([row]))[0, len(row[0]) :]).abs().max()) > 1e-2


def test_gradients_are_those_of_separate_documents(kind: str) -> None:
    packed, alone = tiny(kind, "packed"), tiny(kind, "eager")
    rows = random_documents(4)
    batch = pack(rows)
    outputs = logits(packed, batch)[:, :-1]
    functional.cross_entropy(
        outputs.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    ).backward()
    for document in (document for row in rows for document in row):
        output = alone(input_ids=document[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(output, document[1:], reduction="sum").backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in alone.parameters())
    assert largest > 0.1
    for (name, parameter), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, name)


def test_padded_batches_are_as_with_sdpa(kind: str) -> None:
    packed, sdpa = tiny(kind, "packed"), tiny(kind, "sdpa")
    rows = [{"input_ids": row[0], "labels": row[0]} for row in random_documents(5, [[30], [17], [3]])]
    batch = Collator(pad_token_id=0)(rows)
    assert "cu_seq_lens_q" not in batch
    for inputs in (batch, {"input_ids": batch["input_ids"]}):  # with padding, and whole rows without a mask
        with torch.no_grad():
            ours, expected = logits(packed, inputs), logits(sdpa, inputs)
        seen = inputs.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert_close(ours[seen], expected[seen])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_as_with_sdpa(kind: str, beams: int) -> None:
    """Prompts above the window and below it, padded on the left and of one length, with a cache."""
    packed, sdpa = tiny(kind, "packed"), tiny(kind, "sdpa")
    prompts = torch.stack([row[0] for row in random_documents(6, [[14], [14], [14]])])
    mask = torch.ones_like(prompts)
    mask[1, :6] = 0
    mask[2, :11] = 0
    for inputs in ({"input_ids": prompts, "attention_mask": mask}, {"input_ids": prompts}):
        options = {"max_new_tokens": 16, "do_sample": False, "use_cache": True, "num_beams": beams}
        answers = [model.generate(**inputs, **options).tolist() for model in (packed, sdpa)]
        assert answers[0] == answers[1]
        assert len(answers[0][0]) > 20


def test_options_that_packing_does_not_know_are_refused() -> None:
    states = torch.randn(1, 2, 6, 4)
    borders = torch.tensor([0, 4, 6], dtype=torch.int32)
    module = torch.nn.Module()
    for known in ({}, {"cu_seq_lens_q": borders}):
        packed_attention(module, states, states, states, None, softcap=None, s_aux=None, **known)
        for options in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}):
            with pytest.raises(ValueError, match=next(iter(options))):
                packed_attention(module, states, states, states, None, **options, **known)
    with pytest.raises(ValueError, match="position_bias"):
        packed_attention(
            module, states, states, states, None, position_bias=torch.zeros(1, 2, 6, 6), cu_seq_lens_q=borders
        )


SLOPES = torch.tensor([0.5, 0.25, 0.0625, 0.0])


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, slopes: torch.Tensor
) -> torch.Tensor:
    """[tokens, heads, head_dim] of one document: softmax(QK^T * scale + slope * (j - i)), j <= i, written out."""
    heads, queries, _ = query.shape
    keys = key.shape[1]
    repeat = heads // len(key)
    output = torch.zeros(queries, heads, query.shape[-1], dtype=torch.float64)
    for head in range(heads):
        for index in range(queries):
            place = keys - queries + index
            first = 0 if window is None else max(0, place - window + 1)
            past = slice(first, place + 1)
            scores = (key[head // repeat, past].double() @ query[head, index].double()) * scale
            scores += slopes[head].double() * (torch.arange(first, place + 1) - place)
            output[index, head] = scores.softmax(0) @ value[head // repeat, past].double()
    return output


def random_states(queries: int, keys: int, key_heads: int, rows: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(8)
    return [torch.randn(rows, heads, size, 8) for heads, size in ((4, queries), (key_heads, keys), (key_heads, keys))]


def attention_module(key_heads: int) -> torch.nn.Module:
    """What transformers' SDPA reads from an attention layer."""
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    module.is_causal = True
    return module


@pytest.mark.parametrize("slopes", [SLOPES, None])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_packed_attention_is_the_formula(
    key_heads: int, scaling: float | None, window: int | None, slopes: torch.Tensor | None
) -> None:
    states = random_states(15, 15, key_heads)
    borders = [0, 6, 7, 15, 26, 30]
    output, weights = packed_attention(
        attention_module(key_heads), *states, None, scaling=scaling, sliding_window=window, alibi_slopes=slopes,
        cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32), max_length_q=11,
    )  # fmt: skip
    assert weights is None and output.shape == (2, 15, 4, 8)
    scale = 1 / math.sqrt(8) if scaling is None else scaling
    zeros = torch.zeros(4)
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        row, first, last = begin // 15, begin % 15, begin % 15 + end - begin
        parts = [part[row, :, first:last] for part in states]
        expected = dense(*parts, scale, window, zeros if slopes is None else slopes)
        assert_close(output[row, first:last], expected)


@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (1, 12), (3, 12)])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_biases_without_borders(masked: bool, key_heads: int, queries: int, keys: int) -> None:
    """Padded batches and generation with a cache: the newest queries stand at the last keys."""
    if not masked and 1 < queries < keys:
        pytest.skip("transformers gives a mask wherever some but not all keys came before")
    states = random_states(queries, keys, key_heads)
    padding = torch.tensor([0, 5]) if masked else torch.tensor([0, 0])  # untouched, and padded on the left
    mask = None
    if masked:
        place = torch.arange(keys)
        causal = place[None, :] <= place[keys - queries :, None]
        mask = causal[None, None] & (place >= padding[:, None])[:, None, None, :]
    output, _ = packed_attention(attention_module(key_heads), *states, mask, alibi_slopes=SLOPES)
    assert output.shape == (2, queries, 4, 8)
    for row in range(2):
        hidden = int(padding[row])
        first = max(0, hidden - (keys - queries))  # queries that are padding themselves
        query, key, value = (part[row] for part in states)
        expected = dense(query[:, first:], key[:, hidden:], value[:, hidden:], 1 / math.sqrt(8), None, SLOPES)
        assert_close(output[row, first:], expected)


def test_types_are_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        states = [part.to(dtype) for part in random_states(9, 9, 2)]
        borders = torch.tensor([0, 4, 9, 18], dtype=torch.int32)
        output, _ = packed_attention(attention_module(2), *states, None, cu_seq_lens_q=borders)
        assert output.dtype == dtype
        in_fp32 = [part.float() for part in states]
        exact, _ = packed_attention(attention_module(2), *in_fp32, None, cu_seq_lens_q=borders)
        assert float((output - exact).abs().max()) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on CUDA only")
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_the_path_of_each_document(dtype: torch.dtype, key_heads: int, window: int | None) -> None:
    torch.manual_seed(9)
    shapes = [(2, heads, 300, 64) for heads in (4, key_heads, key_heads)]
    states = [torch.randn(shape, device="cuda") for shape in shapes]
    options = {
        "cu_seq_lens_q": torch.tensor([0, 1, 120, 300, 507, 600], dtype=torch.int32, device="cuda"),
        "max_length_q": 207,
        "sliding_window": window,
    }
    outputs, all_gradients = [], []
    for precision in (torch.float32, dtype):
        inputs = [part.to(precision).requires_grad_() for part in states]
        output, _ = packed_attention(attention_module(key_heads), *inputs, None, **options)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        assert output.dtype == precision
        outputs.append(output.float())
        all_gradients.append([gradient.float() for gradient in gradients])
    assert float((outputs[0] - outputs[1]).abs().max()) < 0.03
    for exact, rounded in zip(*all_gradients, strict=True):
        assert float(functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) > 0.999
    # Another document changes no bit here, either.
    replaced = [part.to(dtype).clone() for part in states]
    for part in replaced:
        part[0, :, :120] = torch.randn_like(part[0, :, :120])
    again, _ = packed_attention(attention_module(key_heads), *replaced, None, **options)
    assert torch.equal(again.float()[0, 120:], outputs[1][0, 120:])
    assert torch.equal(again.float()[1], outputs[1][1])
