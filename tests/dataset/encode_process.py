"""A process that encodes the rows of a file in small blocks, as training does: FILE MODEL CACHE PAUSE."""

import os
import sys
import time
from pathlib import Path

from dataset import encoded_rows, token_cache
from dataset.conversations import read_conversations
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.settings.errors import exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    file, model, pause = sys.argv[1:4]
    encoded_rows.BLOCK_CHARACTERS = 2_000
    token_cache.usable_cores = lambda: 3  # however many this machine has
    encode = encoded_rows.encode_row

    def slowly(*arguments: object) -> object:
        """So that there is time to kill; each call leaves a byte behind."""
        time.sleep(float(pause))
        with Path(os.environ["HF_DATASETS_CACHE"], "calls").open("ab") as calls:
            calls.write(b".")
        return encode(*arguments)

    encoded_rows.encode_row = slowly
    read_conversations(ConversationArguments(train_files=[file]), load_tokenizer(ModelArguments(model)))


if __name__ == "__main__":
    main()
