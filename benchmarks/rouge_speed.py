"""Time to score one pair of segmented 4,000-character texts: novelgpt.scoring.rouge against the rouge_chinese package.

    python benchmarks/rouge_speed.py [--json FILE]

Both read the same two unrelated texts in the same process, in turn; each time is the median of its runs. The dicts must
be equal. rouge_chinese needs some seconds a run and about 1 GB.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rouge_chinese
from results import make_parser, write_results

from novelgpt.scoring.rouge import PairScores, score_segmented

CHARACTERS = 4_000
ROUNDS = 3
LOOPS_A_ROUND = 100
TARGET = 1 / 1_000

# As any two Chinese texts, ours share function words and marks, and differ in the words that say what they are about.
FUNCTION_WORDS = list("的了在是他我你她不也就都和有这那着说上到去来又还把被从对为与而但却只很要会便才再之以于等中")
FUNCTION_WORDS += ["一个", "没有", "什么", "自己", "我们", "他们", "已经", "这样", "时候", "起来", "之后", "因为"]
NOVEL_CHARACTERS = "剑雨灯影江湖夜风雪马刀客楼门酒血月山林桥船渡寒衣袖眉眼泪笑声步掌拳师徒恩仇城墙巷井"
PAPER_CHARACTERS = "模型数据算法网络训练参数优化特征矩阵向量误差估计样本实验结果系统控制信号频率电压温度"
MARKS = list("，。、？！：")


def content_words(characters: str, generator: random.Random) -> list[str]:
    """700 words of two characters."""
    return ["".join(generator.sample(characters, 2)) for _ in range(700)]


def frequencies(words: Sequence[str]) -> list[float]:
    """Weights that fall as 1/rank, as word counts of real text do (Zipf)."""
    return [1 / rank for rank in range(1, len(words) + 1)]


def make_text(characters: str, seed: int) -> str:
    """CHARACTERS characters (blanks not counted) as words joined by blanks: half of them content words."""
    generator = random.Random(seed)
    vocabularies = [content_words(characters, generator), FUNCTION_WORDS, MARKS]
    words: list[str] = []
    length = 0
    while length < CHARACTERS:
        vocabulary = generator.choices(vocabularies, weights=[50, 35, 15])[0]
        word = generator.choices(vocabulary, weights=frequencies(vocabulary))[0][: CHARACTERS - length]
        words.append(word)
        length += len(word)
    return " ".join(words)


def seconds(function: Callable[[], object], loops: int) -> float:
    """Mean wall time of one call, in seconds."""
    start = time.perf_counter()
    for _ in range(loops):
        function()
    return (time.perf_counter() - start) / loops


def main() -> None:
    """Check that the scores are equal, time both, print the table; exit with an error where they differ."""
    arguments = make_parser("ROUGE time of one pair, ours against rouge_chinese").parse_args()

    prediction, reference = make_text(NOVEL_CHARACTERS, seed=1), make_text(PAPER_CHARACTERS, seed=2)
    oracle = rouge_chinese.Rouge()

    def score_with_package() -> PairScores:
        return oracle.get_scores(prediction, reference)[0]

    def score_with_ours() -> PairScores:
        return score_segmented(prediction, reference)

    if score_with_ours() != score_with_package():
        sys.exit("rouge_speed: the scores differ from rouge_chinese's, so the times mean nothing")
    package_times, our_times = [], []
    for _ in range(ROUNDS):
        our_times.append(seconds(score_with_ours, LOOPS_A_ROUND))
        package_times.append(seconds(score_with_package, 1))
    package_time, our_time = statistics.median(package_times), statistics.median(our_times)
    ratio = our_time / package_time
    holds = ratio < TARGET

    words = f"{len(prediction.split())} and {len(reference.split())} words"
    print(f"One pair of {CHARACTERS}-character texts ({words}), scores equal, median of {ROUNDS} rounds")
    print(f"  {'rouge_chinese':<22}{package_time * 1e3:>12.3f} ms")
    print(f"  {'novelgpt.scoring.rouge':<22}{our_time * 1e3:>12.3f} ms")
    verdict = "holds" if holds else "MISSED"
    print(f"  {'ratio':<22}{'1/' + format(1 / ratio, ',.0f'):>12}     target: under 1/1,000 of its time: {verdict}")
    result = {
        "name": "rouge_time_over_rouge_chinese_4000_characters",
        "value": ratio,
        "unit": "ratio of times",
        "target": "< 0.001",
        "holds": holds,
    }
    write_results([result], arguments.json)


if __name__ == "__main__":
    main()
