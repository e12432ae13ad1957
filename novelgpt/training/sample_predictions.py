"""Answers to a few fixed rows at each evaluation: what the model writes during training, as scores and as text."""

from __future__ import annotations

import itertools
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
from novelgpt.text.statistics import trained_runs
from novelgpt.text.token_bytes import BROKEN

PREDICTIONS_FILE = "predictions_during_eval.jsonl"
# Where a row has no prompt of its own, its first half is one, up to this length.
MAX_PROMPT_TOKENS = 256
# A character has at most four bytes, so at most four tokens.
MAX_TOKENS_PER_CHARACTER = 4


@dataclass
class Sample:
    """A prompt and its reference.

    Attributes:
        prompt_ids: tokens of the prompt.
        reference_ids: tokens that follow it in the row.
        continues_text: whether the row is raw text, not a conversation.
    """

    prompt_ids: list[int]
    reference_ids: list[int]
    continues_text: bool


def choose_samples(
    dataset: Dataset[Any], tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int
) -> list[Sample]:
    """Choose `count` samples spread evenly over the rows, the same ones each time; no other row is read.

    Of a conversation, the reference is the last answer, the prompt everything before it. Raw text is to be continued
    after its first half (at most MAX_PROMPT_TOKENS); the reference is as much of the rest as the model may write. Of a
    row that packs several documents, the one with the most trained tokens is taken; others only where there are fewer
    rows than samples. Where there are fewer documents than samples, all are taken. In place of a row without a trained
    token, the next one that has some is taken.
    """
    rows = _trained_rows(dataset, count)
    samples: list[Sample] = []
    for rank in range(max(map(len, rows), default=0)):
        pool = [documents[rank] for documents in rows if rank < len(documents)]
        wanted = min(count - len(samples), len(pool))
        chosen = (pool[number * len(pool) // wanted] for number in range(wanted))
        samples += [_sample(document, tokenizer, max_new_tokens) for document in chosen]
    return samples


def _trained_rows(dataset: Dataset[Any], count: int) -> list[list[Document]]:
    """The documents of `count` rows, of as many as there are at most, each with a trained token, in order."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(count, total)
    read: dict[int, list[Document]] = {}
    for number in range(count):
        start = number * total // count
        for index in itertools.chain(range(start, total), range(start)):
            if index in read:
                continue
            read[index] = documents_of(dataset[index])
            if read[index]:
                break
    return [read[index] for index in sorted(read) if read[index]]


@dataclass
class Document:
    """Tokens of one document of a row, its labels, and its [start, end) spans of trained tokens, at least one."""

    tokens: numpy.ndarray
    labels: numpy.ndarray
    runs: list[tuple[int, int]]


def documents_of(row: dict[str, Any]) -> list[Document]:
    """The documents of a row that have a trained token, the one with the most first."""
    ids, labels = numpy.asarray(row["input_ids"]), numpy.asarray(row["labels"])
    starts: Any = numpy.flatnonzero(numpy.asarray(row["position_ids"]) == 0)[1:] if "position_ids" in row else []
    parts = zip(numpy.split(ids, starts), numpy.split(labels, starts), strict=True)
    documents = [Document(tokens, targets, trained_runs(targets)) for tokens, targets in parts]
    trained = [document for document in documents if document.runs]
    return sorted(trained, key=lambda document: -sum(end - start for start, end in document.runs))


def _sample(document: Document, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Sample:
    tokens = document.tokens.tolist()
    start, end = document.runs[-1]
    # The first token of a text is predicted from nothing; no chat template makes prompts of one token.
    if start > 1:
        # Labels, as a template's end token may be a label only (see EncodedRow).
        return Sample(tokens[:start], document.labels[start:end].tolist(), continues_text=False)
    half = max(1, min(len(tokens) // 2, MAX_PROMPT_TOKENS))
    # Moved back to where the tokens before it end in a complete character.
    nearby = range(half, max(0, half - MAX_TOKENS_PER_CHARACTER), -1)
    half = next((place for place in nearby if not _text(tokens[:place], tokenizer).endswith(BROKEN)), half)
    return Sample(tokens[:half], tokens[half : half + max_new_tokens], continues_text=True)


def _text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False))


class SamplePredictions:
    """Answers the samples greedily with the current model; scores, shows and saves the answers.

    Args:
        dataset: rows of the evaluation, of which `choose_samples` takes some.
        tokenizer: what made them.
        training: number of samples, longest answer, and batch size of generation.
        folder: of the run; answers are appended to its PREDICTIONS_FILE.
        writer: of TensorBoard, for the texts; None on all processes except the first.
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
        self.references = [answer for _, answer in self._split_thoughts(references)]

    def scores(self, model: PreTrainedModel, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Answer all samples. Every process calls this, and gets the scores of the first.

        Only the first process answers, except where weights are sharded (ZeRO-3, FSDP): there each layer needs all
        processes, which then all give the same answers. Modes and random states do not change.

        Args:
            model: the bare one, without the wrappers of data parallelism; adapters belong to it.
            accelerator: of the training, whose autocast is used.
            step: of training, noted with the texts.

        Returns:
            Means over the samples: {"eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_rep4_char", each in [0, 1],
            "eval_predicted_characters"}; nothing where there are no samples.
        """
        scores: dict[str, float] = {}
        if self.samples and (accelerator.is_main_process or weights_are_sharded(accelerator)):
            with preserve_mode_and_rng(model), accelerator.autocast():
                answers = self._answers(model)
            if accelerator.is_main_process:
                split = self._split_thoughts([answer.text for answer in answers])
                self._save(answers, split, step)
                texts = [text for _, text in split]
                scores = {f"eval_{name}": mean for name, mean in mean_f(score_texts(texts, self.references)).items()}
                scores["eval_rep4_char"] = rep4_char(texts)
                scores["eval_predicted_characters"] = sum(map(len, texts)) / len(texts)
        return broadcast_object_list([scores])[0]

    @torch.no_grad()  # not inference mode: under ZeRO-3, training continues with the weights that are gathered here
    def _answers(self, model: PreTrainedModel) -> list[Answer]:
        ends = answer_end_ids(model, self.tokenizer)
        if any(sample.continues_text for sample in self.samples):
            ends.append(document_end_id(self.tokenizer))
        prompts = [sample.prompt_ids for sample in self.samples]
        # `generate` itself finds out whether processes have to wait for each other (its synced_gpus).
        return answer_prompts(model, self.tokenizer, prompts, self.generation, self.batch_size, ends)

    def _split_thoughts(self, texts: list[str]) -> list[tuple[str, str]]:
        """(thought, answer proper) of a text for each sample; continuations of text have no thought."""
        return [
            ("", text)
            if sample.continues_text
            else split_thought(text, opens_thought(_text(sample.prompt_ids[-PROMPT_END:], self.tokenizer)))
            for sample, text in zip(self.samples, texts, strict=True)
        ]

    def _save(self, answers: list[Answer], split: list[tuple[str, str]], step: int) -> None:
        rows = list(zip(self.prompts, self.references, answers, split, strict=True))
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
            # Markdown quotations that keep the lines of the texts.
            quoted = {name: "\n".join(f"> {line}  " for line in part.split("\n")) for name, part in parts.items()}
            shown = "\n\n".join(f"**{name}**\n\n{part}" for name, part in quoted.items())
            self.writer.add_text(f"predictions/{index}", shown, step)
        self.writer.flush()


def weights_are_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only, so that each layer needs all of them (ZeRO-3, FSDP)."""
    return is_deepspeed_zero3_enabled() or accelerator.distributed_type == DistributedType.FSDP


@contextmanager
def preserve_mode_and_rng(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode within; afterwards restore the modes of all modules and all random states."""
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
