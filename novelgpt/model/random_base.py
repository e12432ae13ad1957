"""A base with random weights, drawn once from a seed into a folder that all ranks of a run load."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from novelgpt.model.folder_checks import CONFIG
from novelgpt.model.portable import save_portable
from novelgpt.model.random_config import place_of, random_config
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_folder
from novelgpt.settings.errors import UserError, exit_on_user_error, reason_of
from novelgpt.settings.process import (
    in_process_group,
    is_first_on_host,
    is_first_process,
    raise_on_all_ranks,
    run_outside_group,
)
from novelgpt.settings.random_weights import RandomWeights
from novelgpt.settings.terminal import say

# Parts whose output is added to the residual stream: their weights are divided by the square root of the number of such
# parts, two in a layer. GPT-2 (section 2.3 of its paper; transformers does it) and GLM (scaled_init_method in
# model/modeling.py of THUDM/GLM). The reports on Llama, Qwen3 and Baichuan say nothing, and their published
# initializer_range is that of all matrices.
RESIDUAL_PROJECTIONS = {"glm": ("o_proj", "down_proj")}
# GPT-2's positions have half the deviation of its tokens (src/model.py of openai/gpt-2).
POSITIONS = {"gpt2": ("wpe", 0.5)}
PROBED_TOKENS = 8
POSITION_COUNT = "max_position_embeddings"
# What models raise of sizes that do not fit together, when they are built or first used.
UNFIT = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights; those that are tied count once.

    Attributes:
        total: of the model.
        embeddings: of tokens and positions, and of a head that is not tied to them.
    """

    total: int
    embeddings: int

    @property
    def inner(self) -> int:
        """Without embeddings: what the size of the vocabulary does not change."""
        return self.total - self.embeddings


def count_weights(model: PreTrainedModel) -> WeightCounts:
    """Count the weights of a model, which may be on the meta device."""
    outer = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    head = model.get_output_embeddings()
    parameters = {id(weight): weight.numel() for weight in model.parameters()}
    embedding = {
        id(weight): weight.numel()
        for part in (*outer, *([head] if isinstance(head, nn.Module) else []))
        for weight in part.parameters()
    }
    return WeightCounts(sum(parameters.values()), sum(embedding.values()))


def build_random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Build a model with random weights, drawn as its family's paper or code says.

    The same configuration and seed give the same weights, whatever was drawn before, and by any number of threads. The
    states of other random numbers stay as they are.

    Args:
        config: of a causal language model.
        seed: of the generator.
    """
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = architecture(config)
    residual = RESIDUAL_PROJECTIONS.get(config.model_type, ())
    name_of_positions, share = POSITIONS.get(config.model_type, ("", 1.0))
    with torch.no_grad():
        for name, part in model.named_modules():
            last = name.rpartition(".")[2]
            if last in residual and isinstance(part, nn.Linear):
                part.weight /= math.sqrt(2 * config.num_hidden_layers)
            elif last == name_of_positions and isinstance(part, nn.Embedding):
                part.weight *= share
    return model


@raise_on_all_ranks()
def ensure_random_base(weights: RandomWeights, arguments: ModelArguments) -> None:
    """Make the base with random weights, unless it is there; on each host, the first process does, and all return then.

    Args:
        weights: what decides it.
        arguments: of the run, which say how hubs, code and pickles are treated.

    Raises:
        UserError: the size or the tokenizer cannot be used, or they do not fit; nothing is left then.
    """
    if not is_first_on_host() or (weights.folder / CONFIG).is_file():
        return
    tokenizer = load_tokenizer(replace(_plain(arguments), model=weights.tokenizer))
    config = random_config(weights, tokenizer)
    if is_first_process() or not in_process_group():
        _write(weights, config, tokenizer)
    else:
        _write_elsewhere(weights, arguments)


def _write_elsewhere(weights: RandomWeights, arguments: ModelArguments) -> None:
    """Write the base in a process of its own: transformers only writes weights in the first rank.

    Raises:
        UserError: it has failed; it has printed why.
    """
    task = {"weights": asdict(weights) | {"folder": str(weights.folder)}, "arguments": asdict(_plain(arguments))}
    if run_outside_group("novelgpt.model.random_base", json.dumps(task)) != 0:
        raise UserError(f"{weights.folder} could not be made on this host", "see above what it printed")


def _plain(arguments: ModelArguments) -> ModelArguments:
    """The arguments that any model has."""
    return ModelArguments(**{field.name: vars(arguments)[field.name] for field in fields(ModelArguments)})


def _write(weights: RandomWeights, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the base into its folder atomically; of several runs that do so at once, the first one's stays.

    Raises:
        UserError: the model cannot be built, or its tokens attend to later ones.
    """
    where = f"--config_name {weights.source}"
    try:
        model = build_random_model(config, weights.seed).eval()
        causal = _is_causal(model)
    except UNFIT as error:
        reason = f"{error} is unknown" if isinstance(error, KeyError) else reason_of(error)
        too_large = "allocate memory" in reason  # torch's allocator of CPUs has no exception of its own
        remedy = "take a smaller size, or a host with more memory" if too_large else f"correct {place_of(weights)}"
        raise UserError(f"{where}: {reason}", remedy) from error
    if not causal:
        raise UserError(
            f"{where}: its tokens attend to those that follow, and there would be nothing to predict",
            "set is_decoder to true, or name a model that writes",
        )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with atomic_folder(weights.folder, keep_existing=True) as unfinished:
        save_portable(unfinished, model, tokenizer)
    counts = count_weights(model)
    say(
        f"random weights of {weights.source}, seed {weights.seed}: {counts.total / 1e6:.1f} M, vocabulary "
        f"{config.get_text_config().vocab_size:,} for {len(tokenizer):,} tokens, in {weights.folder}"
    )


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether logits do not depend on what follows."""
    text = model.config.get_text_config()
    positions = text.to_dict().get(text.attribute_map.get(POSITION_COUNT, POSITION_COUNT)) or PROBED_TOKENS
    ids = torch.arange(min(PROBED_TOKENS, positions))[None] % text.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    with torch.no_grad():
        before, after = (model(input_ids=row).logits[0, :-1] for row in (ids, other))
    return torch.allclose(before, after, atol=1e-4)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make a base for `ensure_random_base` of another process."""
    task = json.loads((sys.argv[1:] if argv is None else argv)[0])
    weights = task["weights"] | {"folder": Path(task["weights"]["folder"])}
    arguments = ModelArguments(**task["arguments"])
    tokenizer = load_tokenizer(replace(arguments, model=weights["tokenizer"]))
    _write(RandomWeights(**weights), random_config(RandomWeights(**weights), tokenizer), tokenizer)


if __name__ == "__main__":
    main()
