"""Ranks that read the same rows: FILE MODEL OUT. Each writes what it has read, or why it has not; each row
that one encodes is noted."""

import os
import sys
from pathlib import Path

import torch.distributed

from dataset import encoded_rows
from dataset.conversations import read_conversations
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.settings.errors import UserError
from tests.memory_rows import as_list


def main() -> None:
    file, model, out = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    rank, encode = os.environ["RANK"], encoded_rows.encode_row

    def noted(*arguments: object) -> object:
        with Path(out, f"calls-{rank}").open("ab") as calls:
            calls.write(b".")
        return encode(*arguments)

    encoded_rows.encode_row = noted
    data = ConversationArguments(train_files=[file], packing=False)
    try:
        train, valid = read_conversations(data, load_tokenizer(ModelArguments(model)))
        read = repr([as_list(train), as_list(valid)])
    except UserError as error:
        read = error.cause
    Path(out, f"rows-{rank}").write_text(read, encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
