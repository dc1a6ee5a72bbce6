"""What requests may say; every number and length has a bound."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from rag2.answering.settings import Reading
from rag2.retriever.encoder import Side
from rag2.serve import limits


def whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(min_length=1, max_length=limits.TEXT)]
Name = Annotated[str, Field(max_length=limits.NAME)]
Namespaces = Annotated[list[Name], Field(max_length=limits.NAMESPACES)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]
Whole = Annotated[int, BeforeValidator(whole)]
K = Annotated[Whole, Field(ge=0, le=limits.K)]
# What OpenAI's API has and this one has not: it is refused, not passed over in silence.
ABSENT = {
    "audio", "function_call", "functions", "logit_bias", "modalities", "prediction",
    "response_format", "suffix", "tools", "web_search_options", "echo", "top_logprobs",
    "frequency_penalty", "presence_penalty",
}  # fmt: skip
HARMLESS: tuple[Any, ...] = (None, 0, [], {}, "", "none", {"type": "text"}, ["text"])


class Body(BaseModel):
    """Base of all: no coercion; unknown keys, of which clients send many, are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Ours(Body):
    """What OpenAI's API does not have: here an unknown key is a mistake, not a newer client."""

    model_config = ConfigDict(extra="forbid")


class Options(Ours):
    """How to retrieve and read; what is left out is as the system was exported."""

    k: K | None = None
    """chunks to read; 0 is the closed book"""
    reading: Reading | None = None
    namespaces: Namespaces | None = None
    """whose documents may be found"""


class Streaming(Body):
    """OpenAI's stream_options."""

    include_usage: bool | None = None


class Sampled(Body):
    """What chat and completions have in common."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: Streaming | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    """0, the default: the likeliest token"""
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: Whole | None = Field(default=None, ge=1, le=limits.TOKENS)
    stop: Stop | list[Stop] | None = Field(default=None)
    seed: Whole | None = Field(default=None, ge=-(10**19), le=10**19)
    n: Whole | None = Field(default=None, ge=1, le=limits.N)
    rag2: Options = Options()

    @field_validator("stop")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > limits.STOPS:
            raise ValueError(f"at most {limits.STOPS} stops")
        return value

    @model_validator(mode="before")
    @classmethod
    def _has(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in sorted(ABSENT & data.keys()):
                if data[key] not in HARMLESS:
                    raise ValueError(f"{key} is not supported")
        return data

    @property
    def stops(self) -> tuple[str, ...]:
        """All of them."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=limits.TEXT)]


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=limits.TEXT)]
        | Annotated[list[Part], Field(max_length=limits.TURNS)]
    )

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.TURNS)]
    max_completion_tokens: Whole | None = Field(default=None, ge=1, le=limits.TOKENS)
    logprobs: bool | None = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "Chat":
        if self.messages[-1].role != "user" or not self.messages[-1].text.strip():
            raise ValueError("the last message must be the user's, and not empty")
        if sum(len(message.text) for message in self.messages) > limits.TEXT:
            raise ValueError(f"the messages have more than {limits.TEXT} characters together")
        return self


class Completion(Sampled):
    """POST /v1/completions: the prompt is a question."""

    prompt: Text
    logprobs: Whole | None = Field(default=None, ge=0, le=1)
    best_of: Whole | None = Field(default=None, ge=1, le=1)


class Retrieve(Ours):
    """POST /v1/retrieve."""

    query: Text
    k: Annotated[Whole, Field(ge=1, le=limits.K)] | None = None
    namespaces: Namespaces | None = None


class Passage(Body):
    """A text to rank."""

    text: Text


class Rerank(Body):
    """POST /rerank, in Cohere's shape."""

    model: Name | None = None
    query: Text
    documents: Annotated[list[Text | Passage], Field(min_length=1, max_length=limits.INPUTS)]
    top_n: Whole | None = Field(default=None, ge=1, le=limits.INPUTS)
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """What is ranked."""
        return [given if isinstance(given, str) else given.text for given in self.documents]


class Score(Options):
    """POST /v1/score."""

    question: Text
    choices: Annotated[list[Text], Field(min_length=1, max_length=limits.CHOICES)]

    @model_validator(mode="after")
    def _short(self) -> "Score":
        if sum(map(len, self.choices)) > limits.CHOSEN:
            raise ValueError(f"the choices have more than {limits.CHOSEN} characters together")
        return self


class Embeddings(Body):
    """POST /v1/embeddings."""

    model: Name | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=limits.INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["query", "document"] | None = None
    """a question, or a passage: the two are embedded differently; default: document"""
    dimensions: Whole | None = Field(default=None, ge=1, le=1 << 20)
    """only the encoder's own"""

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def side(self) -> Side:
        """What embeds them."""
        return "question" if self.input_type == "query" else "chunk"


class NewDocument(Ours):
    """A document to add or replace."""

    id: Annotated[str, Field(min_length=1, max_length=limits.NAME)]
    text: Annotated[str, Field(min_length=1)]
    title: Name = ""
    metadata: dict[str, Any] = {}

    @field_validator("id")
    @classmethod
    def _addressable(cls, id: str) -> str:
        if not id.isprintable() or id in (".", ".."):
            raise ValueError("an id is printable, and neither . nor ..: it stands in addresses")
        return id

    @field_validator("text")
    @classmethod
    def _visible(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("nothing but white space")
        return text


class Documents(Ours):
    """POST /v1/documents."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=limits.DOCUMENTS)]
    namespace: Name = ""
