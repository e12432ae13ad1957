"""Answers to a few fixed rows at each evaluation: how the model writes while it learns, as scores and to be read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.inference.generation import Answer, answer_end_ids, answer_prompts
from novelgpt.scoring.repetition import rep4_char
from novelgpt.scoring.rouge import mean_f, score_texts
from novelgpt.settings.arguments import GenerationArguments, TrainArguments
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.encoding import decode_answer, document_end_id
from novelgpt.text.messages import PROMPT_END, opens_thought, split_thought
from novelgpt.text.statistics import BROKEN, trained_runs

PREDICTIONS_FILE = "predictions_during_eval.jsonl"
# Where a row has no prompt of its own, this much of its first half is one.
MOST_PROMPT_TOKENS = 256
# A character has four bytes at most, so it lies in as many tokens at most.
MOST_TOKENS_A_CHARACTER = 4


@dataclass
class Sample:
    """What the model is asked, and what it should write.

    Attributes:
        prompt_ids: tokens of the prompt.
        reference_ids: tokens that follow it in the row.
        continues_text: the row is raw text, not a conversation.
    """

    prompt_ids: list[int]
    reference_ids: list[int]
    continues_text: bool


def choose_samples(
    dataset: Dataset[Any], tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int
) -> list[Sample]:
    """`count` samples spread evenly over the rows that train something, the same ones each time.

    Of a conversation, the reference is the last answer, the prompt all before. Raw text is asked to go on after its
    first half (at most MOST_PROMPT_TOKENS); the reference is as much of the rest as the model may write. Of a row that
    packs several documents, the one with the most trained tokens is taken; the next ones only where there are fewer
    rows than samples. Where there are fewer documents than samples, all are taken.
    """
    if count < 1:
        return []
    rows = [documents_of(dataset[index]) for index in range(len(dataset))]  # type: ignore[arg-type]
    samples: list[Sample] = []
    for rank in range(max(map(len, rows), default=0)):
        pool = [documents[rank] for documents in rows if rank < len(documents)]
        wanted = min(count - len(samples), len(pool))
        chosen = (pool[number * len(pool) // wanted] for number in range(wanted))
        samples += [_sample(document, tokenizer, max_new_tokens) for document in chosen]
    return samples


@dataclass
class Document:
    """Tokens of one document of a row, its labels, and the runs of them that are trained, at least one."""

    tokens: numpy.ndarray
    labels: numpy.ndarray
    runs: list[tuple[int, int]]


def documents_of(row: dict[str, Any]) -> list[Document]:
    """Those with a trained token, the one with the most first."""
    ids, labels = numpy.asarray(row["input_ids"]), numpy.asarray(row["labels"])
    positions = numpy.asarray(row["position_ids"]) if "position_ids" in row else numpy.arange(len(ids))
    borders = numpy.flatnonzero(positions == 0)[1:]
    parts = zip(numpy.split(ids, borders), numpy.split(labels, borders), strict=True)
    documents = [Document(tokens, wanted, trained_runs(wanted)) for tokens, wanted in parts]
    trained = [document for document in documents if document.runs]
    return sorted(trained, key=lambda document: -sum(end - begin for begin, end in document.runs))


def _sample(document: Document, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Sample:
    tokens = document.tokens.tolist()
    begin, end = document.runs[-1]
    # The first token of a text has nothing that could tell it; no chat template makes prompts of one token.
    if begin > 1:
        # Labels, as a template's end token may be a label only (see EncodedRow).
        return Sample(tokens[:begin], document.labels[begin:end].tolist(), continues_text=False)
    border = _between_characters(tokens, max(1, min(len(tokens) // 2, MOST_PROMPT_TOKENS)), tokenizer)
    return Sample(tokens[:border], tokens[border : border + max_new_tokens], continues_text=True)


def _between_characters(tokens: list[int], border: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The border, moved back to where the tokens before it end in a whole character."""
    nearby = range(border, max(0, border - MOST_TOKENS_A_CHARACTER), -1)
    return next((place for place in nearby if not _text(tokens[:place], tokenizer).endswith(BROKEN)), border)


def _text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False))


class SamplePredictions:
    """Answers the samples with the model as it is, greedily; scores, shows and keeps the answers.

    Args:
        dataset: rows of the evaluation, of which `choose_samples` takes some.
        tokenizer: what made them.
        training: how many samples, the longest answer, and how many are answered at once.
        folder: of the run; answers are added to its PREDICTIONS_FILE.
        writer: of TensorBoard, for the texts; None on all processes but the first.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        tokenizer: PreTrainedTokenizerBase,
        training: TrainArguments,
        folder: Path,
        writer: SummaryWriter | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation = GenerationArguments(max_new_tokens=training.predict_max_new_tokens)
        self.batch_size = training.per_device_eval_batch_size
        self.folder = folder
        self.writer = writer
        self.samples = choose_samples(dataset, tokenizer, training.predict_during_eval, training.predict_max_new_tokens)
        self.prompts = [_text(sample.prompt_ids, tokenizer).strip(BROKEN) for sample in self.samples]
        ends = end_token_ids(tokenizer) if self.samples else []
        references = [decode_answer(sample.reference_ids, tokenizer, ends).rstrip(BROKEN) for sample in self.samples]
        self.references = [answer for _, answer in self._told_apart(references)]

    def scores(self, model: PreTrainedModel, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Answer all samples. Every process calls this, and gets the scores of the first.

        The first process alone answers, but where weights are shared (ZeRO-3, FSDP): there each layer needs all
        processes, which then all answer the same. Nothing that training depends on changes: neither the modes of the
        model's parts nor any random state.

        Args:
            model: the bare one, without the wrappers of data parallelism; adapters belong to it.
            accelerator: of the training, whose autocast is used.
            step: under which the texts are noted.

        Returns:
            Means over the samples: {"eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_rep4_char", each in [0, 1],
            "eval_predicted_characters"}; nothing where there are no samples.
        """
        shared_weights = weights_are_shared(accelerator)
        scores: list[dict[str, float]] = [{}]
        if self.samples and (accelerator.is_main_process or shared_weights):
            with preserve_mode_and_rng(model), accelerator.autocast():
                answers = self._answers(model)
            if accelerator.is_main_process:
                told_apart = self._told_apart([answer.text for answer in answers])
                self._keep(answers, told_apart, step)
                scores = [self._scores([text for _, text in told_apart])]
        return broadcast_object_list(scores)[0]

    @torch.no_grad()  # not inference mode: under ZeRO-3, training goes on with the weights that were gathered here
    def _answers(self, model: PreTrainedModel) -> list[Answer]:
        ends = answer_end_ids(model, self.tokenizer)
        if any(sample.continues_text for sample in self.samples):
            ends.append(document_end_id(self.tokenizer))
        prompts = [sample.prompt_ids for sample in self.samples]
        # `generate` itself sees whether processes have to wait for each other (its synced_gpus).
        return answer_prompts(model, self.tokenizer, prompts, self.generation, self.batch_size, ends)

    def _told_apart(self, texts: list[str]) -> list[tuple[str, str]]:
        """(thought, answer proper) of a text for each sample; what goes on with a text has no thought."""
        return [
            ("", text)
            if sample.continues_text
            else split_thought(text, opens_thought(_text(sample.prompt_ids[-PROMPT_END:], self.tokenizer)))
            for sample, text in zip(self.samples, texts, strict=True)
        ]

    def _scores(self, texts: list[str]) -> dict[str, float]:
        return {
            **{f"eval_{name}": mean for name, mean in mean_f(score_texts(texts, self.references)).items()},
            "eval_rep4_char": rep4_char(texts),
            "eval_predicted_characters": sum(map(len, texts)) / len(texts),
        }

    def _keep(self, answers: list[Answer], told_apart: list[tuple[str, str]], step: int) -> None:
        rows = list(zip(self.prompts, self.references, answers, told_apart, strict=True))
        with (self.folder / PREDICTIONS_FILE).open("a", encoding="utf-8") as file:
            for prompt, reference, answer, (thought, text) in rows:
                line = {
                    "step": step,
                    "prompt": prompt,
                    "reference": reference,
                    "prediction": text,
                    "finish_reason": answer.finish_reason,
                }
                file.write(json.dumps(line | ({"reasoning": thought} if thought else {}), ensure_ascii=False) + "\n")
        if self.writer is None:
            return
        for index, (prompt, reference, answer, _) in enumerate(rows):
            parts = {"prompt": prompt, "reference": reference, f"prediction ({answer.finish_reason})": answer.text}
            shown = "\n\n".join(f"**{name}**\n\n{_quoted(part)}" for name, part in parts.items())
            self.writer.add_text(f"predictions/{index}", shown, step)
        self.writer.flush()


def weights_are_shared(accelerator: Accelerator) -> bool:
    """Whether each layer needs all processes, as each of them holds parts of the weights (ZeRO-3, FSDP)."""
    return is_deepspeed_zero3_enabled() or accelerator.distributed_type == DistributedType.FSDP


def _quoted(text: str) -> str:
    """A Markdown quotation that keeps the lines of the text."""
    return "\n".join(f"> {line}  " for line in text.split("\n"))


@contextmanager
def preserve_mode_and_rng(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards the modes of the model's parts and all random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
