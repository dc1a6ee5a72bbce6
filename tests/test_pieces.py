"""A corpus encoded in pieces by several machines is the one that a single process encodes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rag2 import artifact, config
from rag2.artifact import ArtifactError
from rag2.index.flat import Flat
from rag2.index.generation import Generation, table_of
from rag2.registry import UserError
from rag2.reindex import build
from rag2.reindex.pieces import FILE, Pieces
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from small_world import roughen


@pytest.fixture
def pieces(chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path) -> Pieces:
    """The first chunks of the small world, seven to a piece, of which the last is shorter."""
    return Pieces(encoder, table_of(chunks[:40]), 1, "h", tmp_path / "pieces", size=7)


def test_however_it_is_divided_the_generation_is_that_of_one_process_to_the_bit(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, tmp_path: Path
):
    monkeypatch.setattr("rag2.retriever.embed.WINDOW", pieces.size)
    whole = build.generation(pieces.encoder, pieces.chunks, Flat(device="cpu"), 0, 1, "h")
    shards = int(rng.integers(1, 9))
    for shard in rng.permutation(shards).tolist():
        for number in pieces.share(shard, shards):
            pieces.encode(number)
    made = pieces.generation(Flat(device="cpu"))
    made.save(tmp_path / "made")
    whole.save(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes(), path.name


def test_every_piece_belongs_to_one_shard_and_shards_differ_by_one(pieces: Pieces):
    for shards in (1, 2, 3, len(pieces), len(pieces) + 5):
        shares = [pieces.share(shard, shards) for shard in range(shards)]
        assert [n for share in shares for n in share] == list(range(len(pieces)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_a_killed_process_had_committed_is_not_encoded_again(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch
):
    everything = range(len(pieces))
    assert pieces.missing(everything) == list(everything)
    for number in (0, 2):
        pieces.encode(number)
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pieces.encode(1)
    assert pieces.missing(everything) == [1, *everything[3:]]
    with pytest.raises(UserError, match="000001 is missing: piece 1 is not encoded"):
        pieces.generation(Flat())


def test_pieces_of_something_else_are_refused_in_one_line(pieces: Pieces, chunks: list[Chunk]):
    chunks = chunks[:40]
    for number in range(len(pieces)):
        pieces.encode(number)
    other = DualEncoder.load(save_of(pieces.encoder, pieces.directory.parent / "other"))
    roughen(other.towers, 0.1)
    changed = table_of([*chunks[:-1], Chunk(chunks[-1].id, "d", "another text")])
    renumbered = table_of([*chunks[:-1], Chunk(chunks[-1].id + 1, **texts(chunks[-1]))])
    for field, value, what in [
        ("encoder", other, "another encoder"),
        ("chunks", changed, "other chunks"),
        ("chunks", renumbered, "other chunks"),
        ("size", 8, "other chunks"),
    ]:
        given = {name: getattr(pieces, name) for name in Pieces.__dataclass_fields__}
        wrong = Pieces(**{**given, field: value})
        for use in (lambda p=wrong: p.missing(range(len(p))), lambda p=wrong: p.generation(Flat())):
            with pytest.raises(UserError, match=f"was made from {what}") as caught:
                use()
            assert "\n" not in str(caught.value)


def texts(chunk: Chunk) -> dict[str, Any]:
    return {"document": chunk.document, "text": chunk.text, "title": chunk.title}


def save_of(encoder: DualEncoder, directory: Path) -> Path:
    encoder.save(directory)
    return directory


def test_a_changed_byte_of_a_piece_is_refused(pieces: Pieces, rng: np.random.Generator):
    for number in range(len(pieces)):
        pieces.encode(number)
    path = pieces.directory / f"{rng.integers(len(pieces)):06d}" / FILE
    whole = path.read_bytes()
    place = int(rng.integers(len(whole)))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ArtifactError, match="have changed"):
        pieces.generation(Flat())


# --- rag2 train index -----------------------------------------------------------------------------


@pytest.fixture
def run(recipe: Callable[[str], ModuleType], home: Path, tmp_path: Path) -> Callable[..., Any]:
    """The recipe with the small world's inputs, in `tmp_path`/NAME."""
    module = recipe("train/index.py")
    given = [f"kb={home / 'data' / 'kb.sqlite'}", f"retriever={home / 'retriever'}", "piece=60"]

    def run(name: str, *words: str) -> Any:
        words = (*given, f"out={tmp_path / name}", *words)
        return module.main(config.load(module.IndexConfig, None, [*words]))

    return run


def test_the_recipe_makes_one_generation_of_shards_from_anywhere(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = run("whole", "index=hnsw")
    for shard in (2, 0):
        assert run("shared", f"shard={shard}/3") is None
    assert run("elsewhere", "shard=1/3") is None
    assert not (tmp_path / "shared" / "generations").exists()
    for piece in (tmp_path / "elsewhere" / "pieces").iterdir():
        shutil.copytree(piece, tmp_path / "shared" / "pieces" / piece.name)
    capsys.readouterr()
    made = run("shared", "index=hnsw")
    assert "0 pieces encoded" in capsys.readouterr().out
    for path in whole.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name
    current = artifact.follow(tmp_path / "shared" / "generations" / "current")
    assert current == made and len(Generation.load(made)) > 20
    with pytest.raises(UserError, match="holds a generation already"):
        run("shared", "index=hnsw")


def test_without_a_shard_what_is_missing_is_encoded_here(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    run("out", "shard=0/2")
    encoded = int(capsys.readouterr().out.split()[0])
    assert run("out") is not None
    assert f"{encoded} were there" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["4/4", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_share_that_does_not_exist_is_refused(run: Callable[..., Any], shard: str):
    with pytest.raises(UserError, match=f"'{shard}' is not i/n"):
        run("out", f"shard='{shard}'")


def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(
    run: Callable[..., Any], tmp_path: Path
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"out='.*docs' holds 'letter.txt', no index"):
        run("docs")
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["letter.txt"]


def test_a_key_of_another_kind_of_index_is_named_with_its_kind(run: Callable[..., Any]):
    with pytest.raises(UserError, match=r"'index.nlst' .*'index.nlist', a key of index.name=ivf\?"):
        run("out", "index.nlst=4")
