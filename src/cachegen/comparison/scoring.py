"""Whether what a model wrote is right, as the data sets' authors score it, without asking another model.

A metric takes a prediction and the right answers and returns 0 to 1. `METRICS` has them by the names that
`datasets.Question.metric` uses.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")


def normalize(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation and articles, its words with single spaces between.

    Source: LongBench `metrics.normalize_answer`, which is SQuAD's.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score_exact(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalized prediction is one of the normalized answers."""
    return float(normalize(prediction) in map(normalize, answers))


def score_contained(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains one of the answers, case ignored.

    Source: lost in the middle, and RULER `string_match_part`.
    """
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def score_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction contains, case ignored.

    Source: RULER `string_match_all`.
    """
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def score_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the bags of normalized words, the best over the answers.

    Source: LongBench `metrics.qa_f1_score`.
    """
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    num_common = (Counter(predicted) & Counter(wanted)).total()
    if not num_common:
        return 0.0
    precision, recall = num_common / len(predicted), num_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score_topic(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains a topic, case, punctuation and a leading "the" ignored: a stand-in.

    Source: LongChat's authors ask gpt-3.5-turbo whether the topic was named, which forgives synonyms. This is stricter,
    and its figures are not to be compared with theirs.
    """
    text = _without_punctuation(prediction)
    return float(any(_without_punctuation(answer).removeprefix("the ") in text for answer in answers))


def score_number(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the last number of the prediction is an answer.

    Source: LongChat `longeval/utils.py`, lines.
    """
    numbers = _NUMBER.findall(prediction)
    return float(bool(numbers) and numbers[-1].lstrip("0") in [answer.lstrip("0") for answer in answers])


def _without_punctuation(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


METRICS: Mapping[str, Metric] = {
    "exact": score_exact,
    "contained": score_contained,
    "all": score_all,
    "f1": score_f1,
    "topic": score_topic,
    "number": score_number,
}


MAX_NEW_TOKENS: Mapping[str, int] = {"exact": 32, "contained": 128, "all": 128, "f1": 32, "topic": 50, "number": 100}
"""How many tokens the authors of the data sets let a model write, by metric; LongBench more for some of its tasks."""


def is_right(metric: str, score: float) -> bool:
    """Tell whether an answer counts as right: a full score, or of F1 at least a half."""
    return score >= (0.5 if metric == "f1" else 1.0)


def wilson_interval(num_hits: int, num_trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, 0 to 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Raises:
        ValueError: there are no trials.
    """
    if num_trials < 1:
        raise ValueError(f"`num_trials` must be at least 1, got {num_trials}")
    z = 1.959964
    share = num_hits / num_trials
    center = share + z * z / (2 * num_trials)
    width = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    low, high = ((center + sign * width) / (1 + z * z / num_trials) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def perplexity(nll_sum: float, num_tokens: int) -> float:
    """Return the perplexity of a text; it does not compare between tokenizers.

    Args:
        nll_sum: negative log-likelihood of all its tokens, in nats.
        num_tokens: how many were predicted, at least one.

    Raises:
        ValueError: there is none.
    """
    if num_tokens < 1:
        raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}")
    return math.exp(nll_sum / num_tokens)


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """Return the bits that a model would take for each byte of a text, which compares between tokenizers.

    Args:
        nll_sum: negative log-likelihood of all its tokens, in nats.
        num_bytes: of the same text in UTF-8, at least one.

    Raises:
        ValueError: there is none.
    """
    if num_bytes < 1:
        raise ValueError(f"`num_bytes` must be at least 1, got {num_bytes}")
    return nll_sum / math.log(2) / num_bytes
