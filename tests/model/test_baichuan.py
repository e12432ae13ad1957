"""The four Baichuan models are the original code's in every number, on every path, from files as they are published."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.model import loss as loss_module
from novelgpt.model.attention import packed_attention
from novelgpt.model.baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanModel, NormHead
from novelgpt.model.baichuan.modeling import eager_attention_forward
from novelgpt.model.baichuan.positions import alibi_mask, alibi_slopes, rotary_factors, rotate
from novelgpt.model.forward_checks import check_packing, head_is_last
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from tests.launched import PATIENCE
from tests.model.original_checkpoints import Position, write_original_baichuan
from tests.model.original_weights import Shards
from tests.rounding import LOSS_TOLERANCE, assert_close

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, tuple[Position, bool]] = {
    "Baichuan-7B": ("rope", False),
    "Baichuan2-7B": ("rope", True),
    "Baichuan-13B": ("alibi", False),
    "Baichuan2-13B": ("alibi", True),
}
KERNELS = ["eager", "sdpa", "packed"]
GOLDEN_IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33]])
# Of the original code in fp32: loss, the first logits of the last token, the likeliest token at each.
GOLDEN = {
    "Baichuan-7B": (
        4.398808, [-0.42390, -0.40833, -0.18663, 0.12929, 0.37994, 0.43879], [57, 25, 1, 48, 9, 51, 61, 48],
    ),
    "Baichuan2-7B": (
        4.335999, [-0.34871, -0.34868, -0.15852, 0.10571, 0.30949, 0.37085], [57, 25, 1, 5, 9, 51, 18, 48],
    ),
    "Baichuan-13B": (
        4.225228, [1.03965, -1.38451, 0.66427, 0.56699, -1.36207, 1.10932], [23, 37, 20, 56, 18, 44, 44, 25],
    ),
    "Baichuan2-13B": (
        4.170629, [0.76889, -1.06124, 0.49250, 0.41257, -1.03325, 0.84059], [23, 23, 20, 56, 63, 44, 44, 25],
    ),
}  # fmt: skip
VOCABULARY = 97


def tiny(name: str, attention: str = "packed", **changes: Any) -> BaichuanForCausalLM:
    """The same weights for each attention, large enough for every part to matter."""
    position, norm_head = MODELS[name]
    heads = 4 if position == "rope" else 5
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": 2}
    more = {"intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 512}
    config = BaichuanConfig(**(sizes | more | {"position_embedding": position, "norm_head": norm_head} | changes))
    torch.manual_seed(11)
    model = BaichuanForCausalLM._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0 if norm_head else 1.0)  # logits of a NormHead are small
    return model.eval()


def random_ids(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("attention", KERNELS)
def test_outputs_are_those_of_the_original_code(name: str, attention: str, tmp_path: Path) -> None:
    position, norm_head = MODELS[name]
    write_original_baichuan(tmp_path, position, norm_head, golden=True, vocab_size=64, positions=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float32)
    loss, logits, likeliest = GOLDEN[name]
    with torch.no_grad():
        outputs = model.eval()(input_ids=GOLDEN_IDS, attention_mask=torch.ones_like(GOLDEN_IDS), labels=GOLDEN_IDS)
    assert outputs.loss.item() == pytest.approx(loss, abs=1e-4)
    assert outputs.logits[0, -1, :6].tolist() == pytest.approx(logits, abs=1e-4)
    assert outputs.logits.argmax(-1).tolist() == [likeliest]


# --- positions


def test_rotary_factors_are_exact_far_from_the_start() -> None:
    config = tiny("Baichuan2-7B", hidden_size=512).config
    places = torch.tensor([[0, 1, 777, 4095], [5, 4, 3, 2]])
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angles = places[:, None, :, None].double() * frequencies
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines, sines = rotary_factors(config, places)
    assert cosines.dtype == sines.dtype == torch.float32
    assert largest(cosines - angles.cos()) < 1e-3 and largest(sines - angles.sin()) < 1e-3


def test_rotation_is_made_in_fp32_and_keeps_lengths() -> None:
    states = torch.randn(2, 3, 4, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    angles = torch.linspace(-3, 3, 64).expand(1, 1, 4, 64)
    turned = rotate(states, angles.cos(), angles.sin())
    first, second = states.double().chunk(2, -1)
    pairs = torch.complex(first, second) * torch.polar(torch.ones(64).double(), angles.double())
    exact = torch.cat([pairs.real, pairs.imag], -1)
    assert turned.dtype == torch.bfloat16
    assert bool(((turned - exact).abs() <= exact.abs() * 2**-8).all())  # one rounding, at the end


def test_slopes() -> None:
    """Powers of two of heads, and heads beyond."""
    assert alibi_slopes(32).tolist() == pytest.approx([2 ** (-(index + 1) / 4) for index in range(32)])
    assert alibi_slopes(64).tolist() == pytest.approx([2 ** (-(index + 1) / 8) for index in range(64)])
    forty = alibi_slopes(40)
    expected = {0: 0.840896, 1: 0.707107, 31: 0.00390625, 32: 0.917004, 33: 0.771105, 39: 0.272627}
    assert [round(float(forty[index]), 6) for index in expected] == [round(slope, 6) for slope in expected.values()]
    assert alibi_slopes(5).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1])


def test_biases_depend_on_distance_only() -> None:
    slopes = alibi_slopes(40)
    seen = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    mask = alibi_mask(slopes, torch.arange(70), seen)
    assert mask.dtype == torch.float32
    assert mask.masked_select(~seen).max() < -1e37
    for distance in (0, 1, 63):
        diagonal = mask[0].diagonal(-distance, 1, 2)
        assert torch.equal(diagonal, (-slopes * distance)[:, None].expand_as(diagonal))
    # The last queries alone, as with a cache, have the same rows.
    assert torch.equal(alibi_mask(slopes, torch.arange(66, 70), seen[:, :, 66:]), mask[:, :, 66:])


def bf16_error(model: BaichuanForCausalLM, ids: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean squared difference of logits, as a share of theirs."""
    with torch.no_grad():
        rounded = model.to(torch.bfloat16)(input_ids=ids).logits.float()
    return float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("attention", KERNELS)
def test_bf16_is_within_its_rounding_at_1024_tokens(attention: str) -> None:
    """What bf16 costs with ALiBi is what it costs with all slopes at zero, where no bias can be rounded."""
    ids = random_ids(1, 1024)
    errors = []
    for slopes in (alibi_slopes, lambda heads: torch.zeros(heads)):
        model = tiny("Baichuan2-13B", attention, hidden_size=80, num_attention_heads=10)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("novelgpt.model.baichuan.modeling.alibi_slopes", slopes)
            exact = model(input_ids=ids).logits
            errors.append(bf16_error(model, ids, exact))
    assert errors[0] < 1.3 * errors[1] < 0.1


def test_the_definition_rounds_no_score() -> None:
    """Scores in the fifties, which bf16 tells a quarter apart."""
    draw = torch.Generator().manual_seed(6)
    query, key, value = (20 * torch.randn(1, 2, 30, 8, generator=draw).bfloat16() for _ in range(3))
    mask = torch.zeros(1, 2, 30, 30).masked_fill(~torch.ones(30, 30, dtype=torch.bool).tril(), -1e30)
    scores = query.double() @ key.double().transpose(2, 3) * 0.05 + mask
    assert float(scores.max()) > 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, weights = eager_attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.05)
    assert weights.dtype == torch.bfloat16
    assert largest(weights - scores.softmax(-1)) < 2**-8


def test_bf16_attention_puts_its_weight_where_fp32_does() -> None:
    """Keys alike: only the biases tell where attention goes, among 4,096 tokens."""
    heads, tokens = 40, 4096
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    slopes = alibi_slopes(heads)
    values = torch.randn(1, heads, tokens, 16, generator=torch.Generator().manual_seed(2))
    places = torch.tensor([tokens - 1])
    weights = (slopes[:, None, None] * (torch.arange(tokens) - places)[None, None]).softmax(-1)
    exact = (weights @ values[0])[:, 0]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        query, key = (torch.zeros(1, heads, size, 16, dtype=dtype) for size in (1, tokens))
        output, _ = packed_attention(module, query, key, values.to(dtype), None, alibi_slopes=slopes)
        assert largest(output[0, 0].float() - exact) < tolerance * largest(exact)


def test_flash_attention_is_offered_for_rotary_positions_only() -> None:
    assert tiny("Baichuan-7B")._supports_flash_attn
    assert not tiny("Baichuan-13B")._supports_flash_attn
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        tiny("Baichuan-13B", "flash_attention_2")


# --- one forward for training and evaluation


def test_training_and_evaluation_are_one(name: str) -> None:
    model = tiny(name)
    ids = random_ids(2, 20)
    state = copy.deepcopy(model.state_dict())
    losses = []
    with torch.no_grad():
        for training in (False, True, False, False, True, False):
            losses.append(model.train(training)(input_ids=ids, labels=ids).loss.item())
    assert len(set(losses)) == 1
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_evaluation_after_training_is_that_of_a_fresh_reload(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    ids = random_ids(2, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packed").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_losses_of_the_original_with_z_loss() -> None:
    """All positions that predict count, trained or not; evaluation reports the cross-entropy alone."""
    model = tiny("Baichuan2-7B", z_loss_weight=0.1)
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
        plain = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        largest_logits = logits.max(-1).values
        assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(plain.item(), rel=LOSS_TOLERANCE)
        expected = plain + 0.1 * largest_logits.square().mean()
        assert model.train()(input_ids=ids, labels=labels).loss.item() == pytest.approx(
            expected.item(), rel=LOSS_TOLERANCE
        )
        trained = largest_logits.square()[labels[:, 1:] >= 0].sum()
        count = int((labels[:, 1:] >= 0).sum())
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=3 * count).loss
        assert loss.item() == pytest.approx((plain.item() + 0.1 * float(trained) / count) / 3, rel=LOSS_TOLERANCE)


# --- NormHead


def test_only_directions_of_rows_count() -> None:
    model = tiny("Baichuan2-7B")
    ids = random_ids(2, 20)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    weight = model.lm_head.weight
    assert weight.grad is not None and largest(weight.grad) > 1e-3
    assert_close((weight.grad * weight).sum(-1), torch.zeros(VOCABULARY), size=largest(weight.grad * weight))
    hidden = model.model(input_ids=ids).last_hidden_state
    assert bool((outputs.logits.abs().amax(-1) <= hidden.norm(dim=-1) * (1 + 1e-6)).all())
    with torch.no_grad():
        weight *= torch.rand(VOCABULARY, 1, generator=torch.Generator().manual_seed(3)) * 5 + 0.1
        assert_close(model(input_ids=ids).logits, outputs.logits)


def test_rows_of_zeros_have_zeros_for_logits() -> None:
    head = NormHead(4, 3)
    with torch.no_grad():
        head.weight[1] = 0
        logits = head(torch.randn(5, 4))
    assert logits[:, 1].abs().max() == 0 and logits.isfinite().all()


def test_norm_head_begins_uniform() -> None:
    weight = tiny("Baichuan2-7B", vocab_size=5000).lm_head.weight
    assert largest(weight) < 32**-0.5
    assert float(weight.norm(dim=-1).mean()) == pytest.approx(3**-0.5, rel=0.02)


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("rows", [VOCABULARY + 7, VOCABULARY - 9])
def test_resizing_keeps_the_head(name: str, rows: int, mean_resizing: bool, tmp_path: Path) -> None:
    model = tiny(name)
    ids = random_ids(2, 20) % (VOCABULARY - 9)
    kept = min(rows, VOCABULARY)
    with torch.no_grad():
        before = model(input_ids=ids).logits[..., :kept]
        model.resize_token_embeddings(rows, mean_resizing=mean_resizing)
        logits = model(input_ids=ids).logits
    assert isinstance(model.lm_head, NormHead) == MODELS[name][1]
    assert logits.shape[-1] == rows == model.config.vocab_size and logits.isfinite().all()
    assert torch.allclose(logits[..., :kept], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packed").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, logits)


# --- files


def test_what_a_file_leaves_open_is_inferred() -> None:
    published = {
        "Baichuan-7B": {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000, "hidden_size": 4096},
        "Baichuan-13B": {"architectures": ["BaichuanForCausalLM"], "vocab_size": 64000, "hidden_size": 5120},
        "Baichuan2-7B": {"architectures": ["BaichuanForCausalLM"], "vocab_size": 125696, "hidden_size": 4096},
        "Baichuan2-13B": {"architectures": ["BaichuanForCausalLM"], "vocab_size": 125696, "hidden_size": 5120},
    }
    for key, fields in published.items():
        config = BaichuanConfig(**fields, model_max_length=2048)
        assert (config.position_embedding, config.norm_head) == MODELS[key]
        assert config.max_position_embeddings == 2048
        assert not config.tie_word_embeddings
    resized = BaichuanConfig(vocab_size=125699, hidden_size=5120, norm_head=True)
    assert resized.norm_head and resized.position_embedding == "alibi" and resized.max_position_embeddings == 4096
    with pytest.raises(StrictDataclassFieldValidationError, match="position_embedding"):
        BaichuanConfig(position_embedding="learned")


FOLDERS: list[Shards] = ["bin", "bin_sharded", "safetensors"]


@pytest.mark.parametrize("shards", FOLDERS)
def test_published_files_load_as_they_are(
    name: str, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No remote code, no question, nothing missing, nothing unexpected; saved folders ask for no code either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    original, saved = tmp_path / "original", tmp_path / "saved"
    tensors = write_original_baichuan(original, *MODELS[name], shards)
    for trusted in (None, False, True):
        config = AutoConfig.from_pretrained(original, trust_remote_code=trusted)
        assert type(config) is BaichuanConfig
        model, report = AutoModelForCausalLM.from_pretrained(
            original, trust_remote_code=trusted, output_loading_info=True
        )
        assert type(model) is BaichuanForCausalLM and not model.is_activation_checkpointing
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())
    decoder = AutoModel.from_pretrained(original)
    assert type(decoder) is BaichuanModel and torch.equal(decoder.norm.weight, tensors["model.norm.weight"])

    model.save_pretrained(saved)
    written = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert (written["position_embedding"], written["norm_head"]) == MODELS[name]
    assert "auto_map" not in written and "gradient_checkpointing" not in written
    assert not list(saved.glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.long
def test_a_fresh_process_loads_what_was_saved(tmp_path: Path) -> None:
    model = tiny("Baichuan2-13B", "sdpa")
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, novelgpt.model.baichuan\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 6, 7]])
    assert float(done.stdout.split()[-1]) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


# --- kernels, caches, padding


def test_every_attention_is_the_definition(name: str) -> None:
    """Logits and gradients, of rows padded on the right; with weights and states of the layers where they are told."""
    ids = random_ids(3, 33)
    mask = torch.ones_like(ids)
    mask[1, 20:] = mask[2, 3:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    results = []
    for attention in KERNELS:
        model = tiny(name, attention)
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"inputs_embeds": model.model.embed_tokens(ids)}):
            outputs = model(**inputs, labels=labels)
            gradients = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
            results.append((outputs.logits[mask.bool()], [part for part in gradients if part is not None]))
    for logits, gradients in results[1:]:
        assert_close(logits, results[0][0])
        assert max(map(largest, results[0][1])) > 0.05
        for ours, expected in zip(gradients, results[0][1], strict=True):
            assert_close(ours, expected)
    outputs = tiny(name, "eager")(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == [(3, 4 if "7B" in name else 5, 33, 33)] * 2
    assert_close(outputs.attentions[0].sum(-1), torch.ones(outputs.attentions[0].shape[:-1]))
    assert len(outputs.hidden_states) == 3


@pytest.mark.parametrize("attention", KERNELS)
def test_a_cache_changes_nothing(name: str, attention: str) -> None:
    """Tokens at once, one by one, and several at a time, with a cache that grows and one of fixed size."""
    model = tiny(name, attention)
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for steps in ([8, 1, 1, 5, 9], [24]):
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
                seen, parts = 0, []
                for step in steps:
                    inputs = ids[:, seen : seen + step]
                    parts.append(model(input_ids=inputs, past_key_values=cache, use_cache=True).logits)
                    seen += step
                assert_close(torch.cat(parts, 1), expected)
        assert_close(model(input_ids=ids, logits_to_keep=2).logits, expected[:, -2:])


@pytest.mark.parametrize("attention", KERNELS)
def test_padding_on_the_left_changes_nothing(name: str, attention: str) -> None:
    model = tiny(name, attention)
    rows = [random_ids(1, size, seed=size)[0] for size in (19, 7, 12)]
    padded = torch.stack([functional.pad(row, (19 - len(row), 0)) for row in rows])
    mask = (padded != 0).long()
    with torch.no_grad():
        outputs = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        assert outputs.isfinite().all()
        for row, output in zip(rows, outputs, strict=True):
            assert_close(output[-len(row) :], model(input_ids=row[None]).logits[0])


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_batches_generate_what_their_rows_do(name: str, attention: str, beams: int) -> None:
    """With a cache that grows, one of fixed size, and none; each attention gives the definition's tokens."""
    model, definition = tiny(name, attention), tiny(name, "eager")
    rows = [random_ids(1, size, seed=size)[0] for size in (14, 5, 9)]
    padded = torch.stack([functional.pad(row, (14 - len(row), 0)) for row in rows])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    singles = [definition.generate(input_ids=row[None], **options)[0, len(row) :].tolist() for row in rows]
    caches: list[dict[str, Any]] = [{}, {"use_cache": False}]
    caches += [{"cache_implementation": "static"}] if beams == 1 else []
    for cache in caches:
        answers = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **options, **cache)
        assert answers[:, 14:].tolist() == singles
    assert len({token for row in singles for token in row}) > 4  # else agreement says little


# --- training


def packed_batch(seed: int = 1) -> dict[str, Any]:
    rows = []
    for sizes in ([5, 9, 3], [11, 4]):
        ids = random_ids(1, sum(sizes), seed)[0]
        labels = torch.cat([part.clone().index_fill_(0, torch.tensor([0]), IGNORE_INDEX) for part in ids.split(sizes)])
        positions = torch.cat([torch.arange(size) for size in sizes])
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return Collator(pad_token_id=0)(rows)


@pytest.mark.parametrize("attention", KERNELS)
def test_packed_documents_are_alone(name: str, attention: str) -> None:
    model = tiny(name, attention)
    assert model.is_backend_compatible()
    check_packing(model)
    assert head_is_last(model)
    batch = packed_batch()
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        replaced = batch | {"input_ids": torch.where(torch.arange(17) < 5, 7, batch["input_ids"])}
        after = model(**replaced, use_cache=False).logits
        assert torch.equal(before[:, 11:], after[:, 11:])  # the second and third documents, bit for bit
        assert torch.equal(before[0, 5:], after[0, 5:]) and not torch.equal(before[0, :5], after[0, :5])
        alone = model(input_ids=batch["input_ids"][:1, 5:14], use_cache=False).logits
        assert_close(before[:1, 5:14], alone)


def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    for attention in KERNELS:
        gradients = []
        for checkpointing in (False, True):
            model = tiny(name, attention).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(**packed_batch(), use_cache=False).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def adapted(model: BaichuanForCausalLM, **options: Any) -> Any:
    names = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(12)
    return get_peft_model(
        model, LoraConfig(r=3, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    )


def test_a_merged_adapter_is_the_adapted_model(name: str) -> None:
    ids = random_ids(2, 20)
    with torch.no_grad():
        plain = tiny(name)(input_ids=ids).logits
        model = adapted(tiny(name)).eval()
        logits = model(input_ids=ids).logits
        assert largest(logits - plain) > 1e-2
        assert_close(model.merge_and_unload()(input_ids=ids).logits, logits)


# --- the toolkit's loss


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and blocks of rows in the cases below, the last of each shorter."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 5 * VOCABULARY)


def assert_chunked_loss_is_the_models_own(model: Any, batch: dict[str, Any]) -> None:
    reference = copy.deepcopy(model)
    items = int((batch["labels"][:, 1:] >= 0).sum()) * 2
    expected = reference(**batch, num_items_in_batch=items, use_cache=False).loss
    expected.backward()
    attach_chunked_loss(model.get_base_model() if hasattr(model, "get_base_model") else model)
    loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    compared = 0.0
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if parameter.grad is not None and other.grad is not None:
            assert parameter.grad.dtype == other.grad.dtype
            assert_close(parameter.grad, other.grad, key)
            compared = max(compared, largest(other.grad))
    assert compared > 0.01


@pytest.mark.usefixtures("small_blocks")
def test_chunked_loss_and_gradients(name: str) -> None:
    ids = random_ids(3, 30)
    padded = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["labels"][:, :6] = IGNORE_INDEX
    for batch in (packed_batch(), padded):
        assert_chunked_loss_is_the_models_own(tiny(name).train(), batch)
        assert_chunked_loss_is_the_models_own(adapted(tiny(name)).train(), batch)
        kept = adapted(tiny(name), modules_to_save=["lm_head"]).train()
        assert_chunked_loss_is_the_models_own(kept, batch)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_chunked_loss_in_bf16(name: str, weights: torch.dtype) -> None:
    """Under autocast and with weights in bf16: as far from fp32 as the model's own loss is, no further."""
    batch = packed_batch()

    def gradients(model: BaichuanForCausalLM, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])

    exact = gradients(tiny(name).train(), torch.float32)
    plain = gradients(tiny(name).train().to(weights), torch.bfloat16)
    chunked = tiny(name).train().to(weights)
    attach_chunked_loss(chunked)
    ours = gradients(chunked, torch.bfloat16)
    distances = [float((other[1] - exact[1]).norm() / exact[1].norm()) for other in (plain, ours)]
    assert abs(ours[0] - exact[0]) < 0.02 + 2 * abs(plain[0] - exact[0])
    assert distances[1] < 1.3 * distances[0] + 0.01 < 0.3


@pytest.mark.usefixtures("small_blocks")
def test_chunked_loss_needs_no_generic_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_module_gradients", lambda *_: pytest.fail("a slow path was taken"))
    model = tiny("Baichuan2-13B").train()
    attach_chunked_loss(model)
    model(**packed_batch(), use_cache=False).loss.backward()
    batch = packed_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())  # there, and nothing in them


# --- other machinery


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_memory_is_foreseen(name: str, attention: str, tmp_path: Path) -> None:
    """The estimate runs the model on tensors without numbers, of which none may be read."""
    tiny(name, num_hidden_layers=5, vocab_size=2000).config.save_pretrained(tmp_path)
    model = SimulatedModel(ModelArguments(str(tmp_path), attention), torch.device("cpu"))
    real = tiny(name, num_hidden_layers=5, vocab_size=2000)
    assert sum(numbers for numbers, _ in model.trained) == real.num_parameters()
    for borders in (True, False):
        parts = model.step(2, 64, borders, autocast=torch.bfloat16).peak()
        assert parts["activations"] > 0 and parts["loss"] > 0
        assert parts["weights"] == 4 * real.num_parameters()


def test_offloaded_weights_are_right_each_time(name: str) -> None:
    model = tiny(name)
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
        cpu_offload(model, execution_device=torch.device("cpu"))
        losses = [model(input_ids=ids, labels=ids).loss.item() for _ in range(3)]
    assert losses == [expected] * 3
    assert math.isfinite(expected)
