"""Exact match and F1 of free-text answers, as SQuAD v1.1 defines them (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation, then without articles, white space collapsed."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals one of the answers, both normalised."""
    return any(normalize(prediction) == normalize(answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 against any answer, 0 to 1, over the bags of normalised words.

    Without a common word it is 0, also when both sides are empty, as in the official script.
    """
    return max(_f1(normalize(prediction).split(), normalize(a).split()) for a in answers)


def _f1(predicted: list[str], right: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
