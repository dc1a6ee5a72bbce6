"""How a trained system answers: what an export's prompt.json says."""

from typing import Literal, get_args

from pydantic import Field

from rag2.config import Config
from rag2.generator.prompt import Prompt

Reading = Literal["marginal", "token", "concat"]
READINGS: tuple[Reading, ...] = get_args(Reading)
FORMAT = "rag2.prompt/1"


class Settings(Config):
    """What decides an answer beside weights and documents; validation chose k and temperature."""

    format: Literal["rag2.prompt/1"] = FORMAT
    prompt: Prompt = Prompt()
    reading: Reading = "marginal"
    """marginal: each chunk in a prompt of its own, weighed by p(z|x,y_<t), RAG-Sequence; token: the
    same weighed by p(z|x), RAG-Token (both Lewis et al. 2020); concat: all chunks in one prompt"""
    k: int = Field(default=5, ge=1, le=64)
    """chunks that are read"""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """of p(z|x) = softmax(score / temperature)"""
    dense_weight: float = Field(default=1.0, ge=0, le=1)
    """below 1, chunks are found by words, too (see `rag2.retrieval.Fused`)"""
    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    """longest answer, in tokens, where a request names none"""
    stop: list[str] = ["\n"]
    """where an answer ends, beside the end-of-text token"""
