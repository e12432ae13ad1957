"""Our ROUGE == the rouge_chinese package, on every pair that the package can score."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jieba
import pytest
import rouge_chinese

from novelgpt.scoring.rouge import (
    METRICS,
    longest_common_subsequence,
    mean_f,
    rouge_tokens,
    score_segmented,
    score_texts,
)
from novelgpt.scoring.segmentation import segment

ROOT = Path(__file__).resolve().parents[2]

ZERO = {metric: {"r": 0.0, "p": 0.0, "f": 0.0} for metric in METRICS}

PASSAGE = """　　雨下了一夜。天亮时，老周推开客栈的门，看见石阶上坐着一个少年。

　　“你等谁？”老周问。“等我师父……他说今天到。”少年抬起头，笑了笑！“你听，有马蹄声。”
老周侧耳听了半晌，只听见檐水滴在缸里，一声，又一声。他说：“进来喝碗粥吧。”少年摇头，不肯动。

　　本文提出一种基于BERT-base模型的摘要方法，在LCSTS数据集上ROUGE-L达到36.5%，比基线高2.3个点(p<0.01)。
你说什么??我没听清......再说一遍！！好。好。好。他走了，他又回来了，他走了，他又回来了。
"""

WORDS = ["我们", "北京", "天安门", "爱", "的", "了", "他", "说", "雨", "師父", "好", "春天", "𠮷"]
WORDS += ["GPT-4", "BERT", "3.14", "x?y=1", "ひらがな", "한글", "🙂"]
MARKS = ["。", "！", "？", "?", "，", "”", "’", "“", "……", "…", "......", ".......", ".", "。”", "？’"]
GAPS = ["", "", "\n", "\n\n", " \n ", "\u3000", "\t", "\r\n", "\x85", "\x1c", "\u2028", "\0"]


def random_text(generator: random.Random) -> str:
    """1 to 150 words, marks and gaps; a few words only, so that they repeat, and sometimes a sentence in a loop."""
    words = generator.sample(WORDS, generator.randint(2, len(WORDS)))
    length = generator.randint(1, generator.choice([3, 10, 40, 150]))
    kinds = generator.choices([words, MARKS, GAPS], weights=[8, 3, 2], k=length)
    pieces = [generator.choice(kind) for kind in kinds]
    if generator.random() < 0.2:
        pieces = pieces[:12] * generator.randint(2, 12)
    return generator.choice([" ", " ", " ", "  ", "", "\n"]).join(pieces)


def read_real_texts() -> list[str]:
    """The embedded passage and the start of whatever real files this checkout has."""
    texts = [PASSAGE]
    for folder in (ROOT / "dataset" / "samples", ROOT.parent / "shared" / "data"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".txt", ".json", ".jsonl", ".tsv"}:
                start = path.read_bytes()[:60_000].decode("utf-8", errors="replace")
                texts.append(start.replace("\\n", "\n"))
    return texts


def noised(text: str, generator: random.Random) -> str:
    """A text like `text`: characters lost, moved or repeated."""
    characters = list(text)
    for _ in range(generator.randint(0, len(characters) // 3)):
        start = generator.randrange(len(characters))
        length = generator.randint(1, 12)
        piece = characters[start : start + length]
        if generator.random() < 0.6 and len(characters) > len(piece):
            del characters[start : start + length]
        target = generator.randrange(len(characters))
        characters[target:target] = piece if generator.random() < 0.4 else []
    return "".join(characters)[:250]


def random_pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(20240601)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        prediction, reference = random_text(generator), random_text(generator)
        if generator.random() < 0.2:
            prediction = noised(reference, generator) if reference else prediction
        if prediction.strip() and reference.strip():
            pairs.append((prediction, reference))
    return pairs


def real_pairs(count: int) -> list[tuple[str, str]]:
    """Raw (unsegmented) snippets of 1 to 200 characters: a third unrelated, the others noised copies."""
    generator = random.Random(20240602)
    texts = read_real_texts()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        first, second = generator.choice(texts), generator.choice(texts)
        length = generator.choice([3, 20, 60, 200])
        start = generator.randrange(len(first))
        reference = first[start : start + length]
        other = generator.randrange(len(second))
        prediction = second[other : other + length] if generator.random() < 0.33 else noised(reference, generator)
        if prediction.strip() and reference.strip():
            pairs.append((prediction, reference))
    return pairs


def test_score_segmented_equals_rouge_chinese_on_random_pairs() -> None:
    oracle = rouge_chinese.Rouge()
    pairs = random_pairs(3000)
    assert sum("" in rouge_tokens(text) for pair in pairs for text in pair) > 200  # the '' words are really there
    for prediction, reference in pairs:
        expected = oracle.get_scores(prediction, reference)[0]
        assert score_segmented(prediction, reference) == expected, (prediction, reference)


def test_score_texts_and_mean_f_equal_rouge_chinese_on_realistic_pairs(few_or_all: Callable[[int, int], int]) -> None:
    predictions, references = (list(side) for side in zip(*real_pairs(few_or_all(500, 2000)), strict=True))
    cut_predictions, cut_references = ([segment(text) for text in side] for side in (predictions, references))
    oracle = rouge_chinese.Rouge()
    scores = score_texts(predictions, references)
    assert scores == oracle.get_scores(cut_predictions, cut_references)
    average = oracle.get_scores(cut_predictions, cut_references, avg=True)
    assert mean_f(scores) == {metric: average[metric]["f"] for metric in METRICS}


def test_scores_have_the_order_of_keys_of_rouge_chinese() -> None:
    expected = rouge_chinese.Rouge().get_scores("一 二", "二 三")[0]
    assert json.dumps(score_segmented("一 二", "二 三")) == json.dumps(expected)


@pytest.mark.parametrize(
    ("segmented", "tokens"),
    [
        ("第一 段 。 \n \n 第二 段", ["第一", "段", "。", "", "", "第二", "段"]),
        ("一段 \n 二段", ["一段", "二段"]),
        ("一段 。 \n \u3000 \u3000 二段", ["一段", "。", "", "二段"]),
        ("\n\n我们", ["我们"]),
        ("\n \n 我们", ["", "我们"]),
        ("我 \n \n", ["我"]),
        ("http://x?y=1", ["http://x?", "y=1"]),
        (".......", ["......", "."]),
        ("“ 好 。 ” 他 说", ["“", "好", "。", "”", "他", "说"]),
        ("好 。” 他", ["好", "。”", "他"]),
        ("3.14 . 2", ["3.14", ".", "2"]),
        ("", []),
        (" \n\u3000\n ", []),
    ],
)
def test_rouge_tokens(segmented: str, tokens: list[str]) -> None:
    assert rouge_tokens(segmented) == tokens


@pytest.mark.parametrize("blank", ["", " ", "\n", " \n \u3000\r\n"])
@pytest.mark.parametrize("other", ["", "\n\n", "我 爱 北京"])
def test_empty_and_blank_texts_score_zero(blank: str, other: str) -> None:
    assert score_segmented(blank, other) == score_segmented(other, blank) == ZERO
    assert score_texts([blank, other], [other, blank]) == [ZERO, ZERO]


def test_one_bad_pair_leaves_the_others_and_counts_in_the_mean() -> None:
    scores = score_texts(["", "我爱北京天安门。"], ["好的", "我爱北京天安门。"])
    perfect = 2.0 * (1.0 / (2.0 + 1e-8))
    assert scores[0] == ZERO
    assert mean_f(scores) == dict.fromkeys(METRICS, perfect / 2)


def test_repeats_count_once_for_sets_and_each_time_for_the_subsequence() -> None:
    once = segment("我爱北京天安门。")
    words = len(rouge_tokens(once))
    score = score_segmented(segment("我爱北京天安门。" * 30), once)
    assert score == rouge_chinese.Rouge().get_scores(segment("我爱北京天安门。" * 30), once)[0]
    assert score["rouge-1"]["p"] == 1.0
    assert score["rouge-2"]["p"] == (words - 1) / words
    assert score["rouge-l"] == {"r": 1.0, "p": 1 / 30, "f": 2.0 * (1 / 30 / (1 / 30 + 1.0 + 1e-8))}


def test_a_single_word_has_no_word_pairs() -> None:
    assert score_segmented("好", "好")["rouge-2"] == ZERO["rouge-2"]


def test_longest_common_subsequence() -> None:
    assert longest_common_subsequence([], []) == longest_common_subsequence(["一"], []) == 0
    assert longest_common_subsequence(list("abcbdab"), list("bdcaba")) == 4
    assert longest_common_subsequence(["", "\0", "一"], ["\0", "", "一"]) == 2
    assert longest_common_subsequence(list("ab") * 500, list("ba") * 500) == 999
    assert longest_common_subsequence(list("abcd"), list("efgh")) == 0


def test_wrong_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        score_texts(["一", "二"], ["一"])
    with pytest.raises(ValueError, match="no scores"):
        mean_f([])
    assert score_texts([], []) == []


def test_segment_equals_jieba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jieba.dt, "tmp_dir", str(tmp_path))  # else the oracle writes into the shared one
    generator = random.Random(20240603)
    texts = ["", " ", "\r\n"] + [text[:3000] for text in read_real_texts()]
    texts += [random_text(generator) for _ in range(2000)]
    texts += [
        "apt-get install x-1.2-3",
        "a.b%c 3.14%",
        "㐀𠮷豈 龥龦",
        "经常在这里",
        "R&D C++ #1_2",
        "a\x1cb\x85c\u2028d",
    ]
    for text in texts:
        assert segment(text) == " ".join(jieba.cut(text))
        assert segment(text).replace(" ", "") == text.replace(" ", "")


LONE_PROCESS = """
import jieba, sys
from novelgpt.scoring.rouge import score_texts
from novelgpt.scoring.segmentation import segment
jieba.dt.tmp_dir = sys.argv[1]
segment("一个㐀字")  # which jieba itself cuts
before = segment("我爱北京天安门广场")
jieba.add_word("我爱北京", 10**9)
assert "我爱北京" in jieba.lcut("我爱北京天安门广场")
assert segment("我爱北京天安门广场") == before
score_texts(["我爱你"], ["我爱她"])
assert not {"rouge", "rouge_chinese"} & set(sys.modules)
"""


@pytest.mark.parametrize("home_is_usable", [True, False])
def test_segment_in_a_fresh_process(home_is_usable: bool, tmp_path: Path) -> None:
    """Silent, deaf to jieba.add_word, no cache outside the home directory, no rouge_chinese."""
    home, shared = tmp_path / "home", tmp_path / "shared"
    shared.mkdir()
    if home_is_usable:
        home.mkdir()
    else:
        home.touch()
    environment = os.environ | {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(shared)}
    environment["PYTHONPATH"] = str(ROOT)
    oracle_directory = tmp_path / "oracle"
    oracle_directory.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", LONE_PROCESS, str(oracle_directory)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(shared.iterdir()) == []
    if home_is_usable:
        cached = list((home / ".cache" / "novelgpt").iterdir())
        assert [path.name for path in cached] == [f"jieba-{jieba.__version__}.cache"]


def test_texts_of_20000_characters() -> None:
    generator = random.Random(20240604)
    long = "\n".join(noised(PASSAGE, generator) for _ in range(200))[:20_000]
    assert len(long) == 20_000
    one_line = long.replace("\n", "")
    score = score_texts([long, long[10_000:], one_line], [long, long, long])
    assert score[0]["rouge-l"]["p"] == score[0]["rouge-l"]["r"] == 1.0
    assert score[1]["rouge-1"]["p"] > 0.9 and score[1]["rouge-l"]["r"] > 0.4
    assert score[2]["rouge-l"]["r"] < 1.0
