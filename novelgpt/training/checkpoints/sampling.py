"""Order and randomness of training as functions of seed, epoch and step, so that a run can resume anywhere."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy
import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

# Indices converted to Python numbers at once.
AT_ONCE = 1 << 16


class EpochRows(Sampler[int]):
    """Numbers of an endless training's rows, `rows` in each epoch, one after the other: the rows have their own order.

    The first `skipped` numbers are 0, which costs nothing, except the very first ones of the epoch, with which
    accelerate fills up its last batch: a run that resumes within an epoch skips them.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.epoch = 0
        self.skipped = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        part = self.order()
        skipped = min(self.skipped, self.rows)
        yield from part(0, min(skipped, AT_ONCE))
        yield from itertools.repeat(0, max(0, skipped - AT_ONCE))
        for start in range(skipped, self.rows, AT_ONCE):
            yield from part(start, start + AT_ONCE)

    def order(self) -> Callable[[int, int], Iterable[int]]:
        """The numbers of the epoch: a function that gives those from one place to another."""
        numbers = range(self.epoch * self.rows, (self.epoch + 1) * self.rows)
        return lambda start, stop: numbers[start:stop]


class ShuffledRows(EpochRows):
    """Indices of rows in the order of an epoch: the order of the stock Trainer for the same seed."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__(rows)
        self.seed = seed

    def order(self) -> Callable[[int, int], Iterable[int]]:
        """A permutation that follows from the seed and the epoch."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        numbers = torch.randperm(self.rows, generator=generator)
        return lambda start, stop: numbers[start:stop].tolist()


def order_seed(training: TrainingArguments) -> int:
    """The seed of the order of rows."""
    return training.seed if training.data_seed is None else training.data_seed


def seed_step(seed: int, rank: int, step: int) -> None:
    """Set the random states of torch (all devices), numpy and Python to those of a step on a process."""
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=16).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    numpy.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(digest)
