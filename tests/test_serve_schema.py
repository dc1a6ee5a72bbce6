"""What /openapi.json promises is what the endpoints do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, create_model

from rag2.answering.rag import Rag
from rag2.serve import documented
from rag2.serve.server import Server
from small_systems import TOKEN, served, small_system
from wire import asked, edited

TURN = {"messages": [{"role": "user", "content": "Who?"}]}
CASES: list[tuple[str, str, Any, type[BaseModel]]] = [
    ("POST", "/v1/chat/completions", {**TURN, "logprobs": True, "n": 2}, documented.ChatAnswer),
    ("POST", "/v1/chat/completions", {**TURN, "rag2": {"k": 0}}, documented.ChatAnswer),
    ("POST", "/v1/completions", {"prompt": "Who?", "logprobs": 1}, documented.TextAnswer),
    ("POST", "/v1/retrieve", {"query": "Who?"}, documented.Found),
    ("POST", "/v1/rerank", {"query": "a", "documents": ["b", "c"]}, documented.Ranking),
    ("POST", "/v1/score", {"question": "Who?", "choices": ["a", "b"]}, documented.Scores),
    ("POST", "/v1/embeddings", {"input": ["a"]}, documented.Embedded),
    ("POST", "/v1/documents", {"documents": [{"id": "a/b", "text": "c"}]}, documented.Changed),
    ("GET", "/v1/documents/a%2Fb", None, documented.Shown),
    ("GET", "/v1/documents?limit=2", None, documented.Listing),
    ("DELETE", "/v1/documents/a/b", None, documented.Removed),
    ("POST", "/v1/refresh", None, documented.Refreshed),
    ("GET", "/v1/models", None, documented.Models),
    ("GET", "/v1/models/small", None, documented.Model),
    ("GET", "/health", None, documented.State),
    ("GET", "/ready", None, documented.State),
]


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of random models."""
    with small_system(home, tmp_path_factory.mktemp("schema"), max_new_tokens=3) as rag:
        assert isinstance(rag, Rag)
        with served(rag) as server:
            yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_reply_has_the_fields_that_are_documented(server: Server, case: Any):
    method, target, body, model = case
    if target == "/v1/documents/a%2Fb":
        document = {"id": "a/b", "text": "c", "metadata": {"d": [1, None]}}
        edited(server.address, "POST", "/v1/documents", {"documents": [document]})
    got = edited(server.address, method, target, body)
    assert got.status == 200, got
    told = model.model_validate(got.json)
    strict = create_model("Strict", __base__=model)
    strict.model_config = ConfigDict(extra="forbid")
    strict.model_rebuild(force=True)
    strict.model_validate(got.json)  # no field at the top that is not documented
    documents = asked(server.address, "GET", "/openapi.json").json["paths"]
    assert told is not None and documents


def test_every_endpoint_documents_its_reply_and_its_errors(server: Server):
    described = asked(server.address, "GET", "/openapi.json").json["paths"]
    for path, methods in described.items():
        for method, operation in methods.items():
            responses = operation["responses"]
            assert responses["200"]["content"], f"{method} {path}"
            assert {"401", "404", "405", "413", "422", "429", "503"} <= set(responses)
            for content in responses["200"]["content"].values():
                assert content["schema"] != {}, f"{method} {path}"


def test_methods_of_a_path_are_named_where_another_is_used(server: Server):
    got = asked(server.address, "PATCH", "/v1/documents/a")
    assert got.status == 405 and got.headers["allow"] == "DELETE, GET"


def test_whole_numbers_may_be_written_with_a_point(server: Server):
    for k, status in ((2.0, 200), (2.5, 422), (True, 422), ("2", 422), (1e308, 422)):
        got = asked(server.address, "POST", "/v1/retrieve", {"query": "a", "k": k})
        assert got.status == status


@pytest.mark.slow
def test_requests_made_from_the_schema_find_no_failure(server: Server, seed: int):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json",
        "-H", f"Authorization: Bearer {TOKEN}", "--max-examples", "25", "--seed", str(seed),
        "--phases", "examples,coverage,fuzzing", "--no-color",
        # A schema cannot say that the last message is the user's, nor that ids are given once.
        "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
