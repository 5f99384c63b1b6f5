"""A small checkpoint and a text, and a data cache of its own for every test."""

from pathlib import Path

import datasets
import pytest

from .helpers import write_byte_gla, write_documents


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_byte_gla(tmp_path / "base")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "text.jsonl", ["the cat sat on the mat. " * 4, "a dog ate the log. " * 3])
