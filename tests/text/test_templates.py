"""Each tokenizer gets the template of its family, and a checkpoint keeps the one it was trained with."""

import copy
import json
from pathlib import Path
from typing import Any

import jinja2.meta
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.templates import (
    ASSISTANT_ID,
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    RECORD,
    USER_ID,
    record_thinking,
    settle_template,
    template_record,
    use_template,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"

# As Qwen1.5 to Qwen2.5 have it: a system message of their own where the conversation has none.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + CHATML_TEMPLATE
)
# By Qwen3's rules: thoughts only after the last question, an empty one before a last answer without any; with thinking
# off, the prompt ends in the empty thought.
THINKING = r"""
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set part = namespace(thought='', answer=message.content) %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set part.thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set part.answer = message.content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question and (loop.last or part.thought) %}
        {{- '<think>\n' + part.thought + '\n</think>\n\n' + part.answer.lstrip('\n') }}
    {%- else %}
        {{- part.answer }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# As DeepSeek V3.1 asks: another variable, with a default of its own.
OTHER_VARIABLE = (
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}"
    + CHATML_TEMPLATE
    + "{% if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# What other templates ask of whoever uses them; nobody here says it.
ADD_DEFAULT_SYSTEM = (
    "{% if add_default_system is not defined or add_default_system %}{{ '<|im_start|>system\nA<|im_end|>\n' }}"
    "{% endif %}" + CHATML_TEMPLATE
)
LEADING_LINE_FEED = "\n \n" + THINKING.lstrip().replace("{%- set last", "{% set last", 1)
TAGGED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}" + (
    "{{ '<think></think>' if not enable_thinking }}"
)

SYSTEM = {"role": "system", "content": "你是一位小说家。"}
USER = {"role": "user", "content": "写一个开头。"}
ANSWER = {"role": "assistant", "content": "雨下了一夜。"}
USER_2 = {"role": "user", "content": "再写一句。"}


def build_baichuan_folder(folder: Path, generation: int) -> Path:
    """A small sentencepiece model with the pieces of Baichuan (1) or Baichuan2 (2) at ids 195 and 196.

    Those of Baichuan2 are cut out of texts by sentencepiece itself, those of Baichuan are not.
    """
    first = USER_ID - {1: 102, 2: 106}[generation]  # the id of <reserved_0>, were the row of them unbroken
    symbols = ["\n", "\t", *(f"<filler_{number}>" for number in range(5, first))]
    symbols += [f"<reserved_{number}>" for number in range(ASSISTANT_ID - first + 1)]
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(SAMPLES / "novels" / "deng_ta_xia_de_xin.txt"), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=1800, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=symbols, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    if generation == 1:
        protocol: Any = sentencepiece_model_pb2
        model = protocol.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        for piece in model.pieces[USER_ID], model.pieces[ASSISTANT_ID]:
            piece.type = protocol.ModelProto.SentencePiece.NORMAL
        (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"model_type": "baichuan", "norm_head": generation == 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load_baichuan(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = BaichuanTokenizer.from_pretrained(str(folder))
    settle_template(tokenizer, str(folder))
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerBase, name: str, template: str) -> PreTrainedTokenizerBase:
    own = copy.deepcopy(tokenizer)
    use_template(own, name, template)
    return own


def reload(folder: Path) -> PreTrainedTokenizerBase:
    slow = (folder / "tokenizer.model").exists()
    tokenizer = (BaichuanTokenizer if slow else AutoTokenizer).from_pretrained(str(folder))
    settle_template(tokenizer, str(folder))
    return tokenizer


@pytest.fixture(scope="module")
def bare(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tiny-random base's tokenizer as a base model would bring it: no template, no record."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    own.init_kwargs.pop(RECORD, None)
    return own


@pytest.fixture(scope="module", params=[1, 2])
def baichuan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Generation and folder."""
    folder = tmp_path_factory.mktemp("baichuan") / str(request.param)
    return request.param, build_baichuan_folder(folder, request.param)


def test_baichuan_formats(baichuan: tuple[int, Path]) -> None:
    generation, folder = baichuan
    tokenizer = load_baichuan(folder)
    assert template_record(tokenizer)["name"] == {1: "baichuan", 2: "baichuan2"}[generation]
    assert len(tokenizer) == tokenizer.vocab_size
    pieces = {1: ["<reserved_102>", "<reserved_103>"], 2: ["<reserved_106>", "<reserved_107>"]}[generation]
    assert tokenizer.convert_ids_to_tokens([195, 196]) == pieces
    system, user, answer, user_2 = (
        tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        for message in (SYSTEM, USER, ANSWER, USER_2)
    )
    end = {1: [2], 2: []}[generation]
    assert encode_prompt([USER], tokenizer) == [195, *user, 196]
    assert encode_prompt([SYSTEM, USER, ANSWER, USER_2], tokenizer) == [
        *system, 195, *user, 196, *answer, *end, 195, *user_2, 196,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "generation"), [("baichuan1", 1), ("baichuan2", 2)])
def test_real_baichuan_tokenizers_are_told_by_their_vocabulary(name: str, generation: int) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the real tokenizers are not here")
    tokenizer = load_baichuan(SHARED / name)
    assert template_record(tokenizer)["name"] == {1: "baichuan", 2: "baichuan2"}[generation]
    assert encode_prompt([{"role": "user", "content": "你好"}], tokenizer) == [
        195, *tokenizer("你好", add_special_tokens=False)["input_ids"], 196,
    ]  # fmt: skip


def test_a_baichuan_vocabulary_without_the_reserved_pieces_gets_the_plain_template(tmp_path: Path) -> None:
    folder = build_baichuan_folder(tmp_path / "base", 2)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(SAMPLES / "novels" / "deng_ta_xia_de_xin.txt"), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=1800, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    assert template_record(load_baichuan(folder))["name"] == "plain"


def test_templates_of_bases_without_one(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    chatml = copy.deepcopy(bare)
    settle_template(chatml, str(tmp_path))
    assert (template_record(chatml)["name"], chatml.chat_template) == ("chatml", CHATML_TEMPLATE)
    if (SHARED / "baichuan2-fast").is_dir():
        plain = AutoTokenizer.from_pretrained(SHARED / "baichuan2-fast")
        settle_template(plain, str(tmp_path))
        assert (template_record(plain)["name"], plain.chat_template) == ("plain", PLAIN_TEMPLATE)


def test_an_own_template_is_kept(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own = copy.deepcopy(bare)
    own.chat_template = DEFAULT_SYSTEM
    settle_template(own, str(tmp_path))
    assert (template_record(own)["name"], own.chat_template) == ("own", DEFAULT_SYSTEM)


def test_a_template_file_beside_the_weights_is_the_tokenizers_own(
    bare: PreTrainedTokenizerBase, baichuan: tuple[int, Path], tmp_path: Path
) -> None:
    bare.save_pretrained(tmp_path / "fast")
    load_baichuan(baichuan[1]).save_pretrained(tmp_path / "slow")
    config = tmp_path / "slow" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    del settings[RECORD]
    config.write_text(json.dumps(settings), encoding="utf-8")
    for folder in (tmp_path / "fast", tmp_path / "slow"):
        (folder / "chat_template.jinja").write_text(DEFAULT_SYSTEM, encoding="utf-8")
        tokenizer = reload(folder)
        assert (template_record(tokenizer)["name"], tokenizer.chat_template) == ("own", DEFAULT_SYSTEM)


def saved(kind: str, bare: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that was settled and saved, as training saves it beside every checkpoint."""
    if kind.startswith("baichuan"):
        tokenizer = load_baichuan(build_baichuan_folder(folder.parent / "base", 2 if kind.endswith("2") else 1))
    elif kind == "own, carriage returns":
        tokenizer = copy.deepcopy(bare)
        tokenizer.chat_template = DEFAULT_SYSTEM + "\r\n{# end #}\r\n"
        settle_template(tokenizer, str(folder.parent))
    else:
        tokenizer = with_template(bare, kind, {"chatml": CHATML_TEMPLATE, "plain": PLAIN_TEMPLATE}[kind])
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["chatml", "plain", "own, carriage returns", "baichuan", "baichuan2"])
def test_the_record_goes_with_the_checkpoint(kind: str, bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Through two generations of folders, without the config.json that told the family."""
    first = saved(kind, bare, tmp_path / "one")
    record_thinking(first, True)
    first.save_pretrained(tmp_path / "one")
    again = reload(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    for tokenizer in (again, reload(tmp_path / "two")):
        assert template_record(tokenizer) == template_record(first)
        assert template_record(tokenizer)["name"] == kind.split(",")[0]
        assert template_record(tokenizer)["thinking"] is True
        for messages in ([USER], [SYSTEM, USER, ANSWER, USER_2]):
            assert encode_prompt(messages, tokenizer) == encode_prompt(messages, first)


@pytest.mark.parametrize("kind", ["chatml", "baichuan2"])
def test_another_template_than_that_of_training_is_refused(
    kind: str, bare: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    saved(kind, bare, tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    for change in ("other", "gone"):
        if change == "other":
            file.write_text(text + " ", encoding="utf-8")
        else:
            file.unlink()
        with pytest.raises(UserError) as caught:
            reload(tmp_path / "model")
        assert kind in caught.value.cause and str(tmp_path / "model") in caught.value.cause
        assert "chat_template.jinja" in caught.value.remedy and RECORD in caught.value.remedy
    file.write_text(text, encoding="utf-8")
    assert template_record(reload(tmp_path / "model"))["name"] == kind


def test_the_remedy_for_a_new_template_works(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    saved("chatml", bare, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(DEFAULT_SYSTEM, encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    del settings[RECORD]
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert template_record(reload(tmp_path))["name"] == "own"


def test_of_several_templates_the_default_counts(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    several = copy.deepcopy(bare)
    several.chat_template = {"default": CHATML_TEMPLATE, "tool_use": PLAIN_TEMPLATE}
    settle_template(several, str(tmp_path))
    assert template_record(several)["sha256"] == template_record(with_template(bare, "own", CHATML_TEMPLATE))["sha256"]
    several = copy.deepcopy(bare)
    several.chat_template = {"rag": CHATML_TEMPLATE, "tool_use": PLAIN_TEMPLATE}
    with pytest.raises(UserError, match="none of them named 'default'"):
        settle_template(several, str(tmp_path))


ASKING = {
    "Qwen3": THINKING,
    "default system": DEFAULT_SYSTEM,
    "another variable": OTHER_VARIABLE,
    "add_default_system": ADD_DEFAULT_SYSTEM,
    "leading line feed": LEADING_LINE_FEED,
    "tags of transformers": TAGGED,
    "chatml": CHATML_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
}


def served_ids(folder: Path, messages: list[dict[str, str]], **variables: bool) -> list[int]:
    """What a server makes of messages that it puts into the template of a folder, telling it nothing."""
    slow = (folder / "tokenizer.model").exists()
    tokenizer = (BaichuanTokenizer if slow else AutoTokenizer).from_pretrained(str(folder))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **variables)
    return list(ids["input_ids"])


@pytest.mark.parametrize("thinking", [False, True, None])
@pytest.mark.parametrize("name", ASKING)
def test_who_serves_a_saved_folder_asks_as_prediction_does(
    name: str, thinking: bool | None, bare: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """By default, and where it says what it wants; after a second training that was otherwise, too."""
    own = copy.deepcopy(bare)
    own.chat_template = ASKING[name]
    settle_template(own, str(tmp_path))
    original = template_record(own)
    asked = encode_prompt([SYSTEM, USER, ANSWER, USER_2], own, thinking)
    for trained in [thinking] if thinking is None else [not thinking, thinking]:
        if trained is not None:
            record_thinking(own, trained)
        own.save_pretrained(tmp_path)
        own = reload(tmp_path)
    assert served_ids(tmp_path, [SYSTEM, USER, ANSWER, USER_2]) == asked
    assert served_ids(tmp_path, [SYSTEM, USER, ANSWER, USER_2]) == encode_prompt([SYSTEM, USER, ANSWER, USER_2], own)
    assert template_record(own)["sha256"] == original["sha256"]
    for said in (True, False):
        assert served_ids(tmp_path, [USER], enable_thinking=said) == encode_prompt([USER], own, said)
        reference = copy.deepcopy(bare)
        reference.chat_template = ASKING[name]
        if name != "another variable":
            expected = reference.apply_chat_template([USER], add_generation_prompt=True, enable_thinking=said)
            assert served_ids(tmp_path, [USER], enable_thinking=said) == list(expected["input_ids"])
    text = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert text.endswith(ASKING[name]) and text.count("default(") <= 2


def test_a_folder_of_an_earlier_version_is_served_as_it_was_trained(
    bare: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Its template has no default yet; merging and exporting load it and save it again."""
    own = with_template(bare, "own", THINKING)
    own.init_kwargs[RECORD]["thinking"] = False
    own.save_pretrained(tmp_path / "old")
    assert (tmp_path / "old" / "chat_template.jinja").read_text(encoding="utf-8") == THINKING
    again = reload(tmp_path / "old")
    again.save_pretrained(tmp_path / "new")
    assert served_ids(tmp_path / "new", [USER]) == encode_prompt([USER], again)
    assert served_ids(tmp_path / "new", [USER]) != served_ids(tmp_path / "old", [USER])


def test_baichuan_folders_are_served_as_they_were_trained(baichuan: tuple[int, Path], tmp_path: Path) -> None:
    tokenizer = load_baichuan(baichuan[1])
    tokenizer.save_pretrained(tmp_path)
    for messages in ([USER], [SYSTEM, USER, ANSWER, USER_2]):
        assert served_ids(tmp_path, messages) == encode_prompt(messages, tokenizer)


def test_servers_still_see_the_variable(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """vLLM hands a template only such variables as it finds undeclared in it."""
    own = with_template(bare, "own", THINKING)
    record_thinking(own, False)
    found = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(own.chat_template))
    assert {"enable_thinking", "messages", "add_generation_prompt"} <= found
