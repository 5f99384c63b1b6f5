from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from statex.errors import EvaluationError
from statex.evals.passage import PASSAGE
from statex.evals.text import Haystack, byte_offsets, encode, read_documents, sentence_borders, start_ids

from .models import BYTES, bpe_tokenizer

DOCUMENTS = ["One döcument.", "Another one."]
LINES = "".join(json.dumps({"title": "t", "text": text}) + "\n" for text in DOCUMENTS)


def test_every_format_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(LINES + "\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(DOCUMENTS[0].encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    for name in ("a.txt", "b.txt.gz"):
        assert read_documents(tmp_path / name) == DOCUMENTS[:1]
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read_documents(str(tmp_path / name)) == DOCUMENTS
    assert read_documents([tmp_path / "a.txt", tmp_path / "a.jsonl"]) == DOCUMENTS[:1] + DOCUMENTS


def test_parquet_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_dict({"body": DOCUMENTS}).to_parquet(str(tmp_path / "b.parquet"))
    assert read_documents(tmp_path / "a.parquet") == DOCUMENTS
    with pytest.raises(EvaluationError, match=r"no column `text`.*found: body"):
        read_documents(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such data file"),
        ("a.csv", b"text", "ending that is not known"),
        ("a.txt", b"  \n", "no text in the data"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "not valid JSON.*line 2"),
        ("a.jsonl", b'{"body": "x"}', "no field `text`.*found: body.*line 1"),
        ("a.jsonl", b"[1]", "no field `text`.*found: list"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off here" * 99, mtime=0)[:-20], "cannot be read"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_data_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("tokenizer", [BYTES, bpe_tokenizer()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("text", [PASSAGE[:500], "naïve 日本語 🙂🙂 end", "🙂"])
def test_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer, text: str) -> None:
    ids, sizes = byte_offsets(tokenizer, text)
    assert ids.tolist() == encode(tokenizer, text).tolist()
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()


def test_bytes_of_a_token_are_those_of_its_text() -> None:
    tokenizer = bpe_tokenizer()
    ids, sizes = byte_offsets(tokenizer, PASSAGE[:300])
    assert sizes.tolist() == [len(tokenizer.decode([token]).encode()) for token in ids]


def test_what_a_tokenizer_puts_before_a_text_is_found() -> None:
    assert start_ids(BYTES).tolist() == []
    assert start_ids(bpe_tokenizer()).tolist() == [0]


def test_stretches_have_their_length_and_come_from_the_text() -> None:
    haystack = Haystack(BYTES, [PASSAGE], "passage")
    whole = encode(BYTES, PASSAGE)
    for seed in range(20):
        stretch = haystack.draw(300, np.random.default_rng(seed))
        text = BYTES.decode(stretch)
        assert len(stretch) == 300
        assert text in PASSAGE
        start = PASSAGE.index(text)
        assert start == 0 or PASSAGE[:start].rstrip()[-1] in ".!?"
    assert haystack.draw(len(whole), np.random.default_rng(0)).tolist() == whole.tolist()
    with pytest.raises(
        EvaluationError, match=f"a stretch of {len(whole) + 1} tokens is asked for, the text has {len(whole)} \\(passage\\)"
    ):
        haystack.draw(len(whole) + 1, np.random.default_rng(0))


@pytest.mark.parametrize("tokenizer", [BYTES, bpe_tokenizer()], ids=["bytes", "bpe"])
def test_sentence_borders_follow_full_stops(tokenizer) -> None:
    ids = encode(tokenizer, PASSAGE[:1500])
    borders = sentence_borders(tokenizer, ids)
    assert len(borders) > 8
    for border in borders:
        assert tokenizer.decode(ids[:border])[-1] in ".!?"
        assert tokenizer.decode(ids[border:])[0].isspace()
