"""Prepare rows with this toolkit: python novelgpt_rows.py TASK.json, run by rows_at_scale.py.

The version that PYTHONPATH names reads them as a run does; with "plain", one row after the other in this process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dataset.conversations import read_conversations
from dataset.readers import read_conversation, read_source_rows
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.text.conversation import encode_conversation

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
tokenizer = load_tokenizer(ModelArguments(task["model"]))
start = time.perf_counter()
if task.get("plain"):
    rows = read_source_rows(Path(task["rows_file"]))
    encoded = [encode_conversation(read_conversation(row)["messages"], tokenizer) for row in rows]
    packs = 0
else:
    data = ConversationArguments([task["rows_file"]], max_length=task["max_length"])
    packs = len(read_conversations(data, tokenizer)[0])
seconds = time.perf_counter() - start
result = {"seconds": seconds, "packs": packs, "tool": "this toolkit"}
Path(task["result_file"]).write_text(json.dumps(result), encoding="utf-8")
