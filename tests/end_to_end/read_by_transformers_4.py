"""Run by an interpreter with transformers 4: what it makes of folders, as JSON on standard output.

    python read_by_transformers_4.py TEXT FOLDER...

Of each folder {"ids": tokens of the text, "text": decoded again, "template": the text as a question, "logits": of the
last token, "dtype": of the configuration}; adapters are put on their bases by peft.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__


@torch.no_grad()
def reading(folder: Path, text: str) -> dict[str, Any]:
    """What the installed version makes of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else folder
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    if adapter.is_file():
        model = PeftModel.from_pretrained(model, str(folder))
    ids = tokenizer(text)["input_ids"]
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    template = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    return {
        "ids": ids,
        "text": shown,
        "template": template,
        "logits": logits.tolist(),
        "dtype": str(model.config.dtype),
    }


if __name__ == "__main__":
    names = sys.argv[2:]
    found = {name: reading(Path(name), sys.argv[1]) for name in names}
    print(json.dumps({"version": __version__, "folders": found}))
