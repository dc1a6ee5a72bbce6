"""What a server takes from one client, and altogether: every number is checked before it costs."""

from pydantic import Field

from rag2.config import Config

# Of one request, part of the schema that clients see.
K = 64
N = 8
TOKENS = 4096
TEXT = 1 << 16  # characters of a question, a choice, a text to embed
CHOICES = 64
INPUTS = 256
DOCUMENTS = 256
TURNS = 256
CHOSEN = 1 << 14  # characters of all choices: each is read after each chunk
STOPS = 4
NAMESPACES = 64
NAME = 512  # characters of an id, a namespace, a model's name


class Limits(Config):
    """Of the whole server."""

    hosts: list[str] = []
    """names that requests may give the server; none: any. A server on a loopback address has its
    own, or any web page could read it by a name that it lets point there (DNS rebinding)"""
    header_bytes: int = Field(default=16 << 10, ge=1 << 10)
    """longest request line and headers together; more is 431"""
    body_bytes: int = Field(default=4 << 20, ge=1 << 10)
    """longest body; more is 413, while it is still being sent"""
    values: int = Field(default=1 << 16, ge=1 << 8)
    """how many values the JSON of a body may have"""
    bodies: int = Field(default=256 << 20, ge=1 << 20)
    """bytes of all bodies that are being received; more is 429"""
    depth: int = Field(default=64, ge=4)
    """how deep JSON may be nested"""
    read_seconds: float = Field(default=10.0, gt=0)
    """until a request that has begun must be complete, and unread output be read"""
    deadline: float = Field(default=60.0, gt=0)
    """seconds for an answer, waiting included"""
    stuck_seconds: float = Field(default=120.0, gt=0)
    """for one step or call of the engine; the server ends itself after more"""
    drain_seconds: float = Field(default=60.0, gt=0)
    """after SIGTERM, for answers that were accepted"""
    connections: int = Field(default=1024, ge=1)
    """open at once; more are closed at once"""
    together: int = Field(default=32, ge=1)
    """answers that are written at once"""
    rows: int = Field(default=256, ge=1)
    """prompts that are read at once: an answer has one for each of its chunks"""
    waiting: int = Field(default=64, ge=1)
    """requests that wait for their turn; more is 429"""
    remembered: int = Field(default=256 << 20, ge=0)
    """bytes for passages that the generator has read already"""
