"""lm-evaluation-harness on our models: the same answers as our own tasks give, and the same scores as it has from an export."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from statex.errors import EvaluationError  # noqa: E402
from statex.evals import EvalResult, compare, evaluate, harness  # noqa: E402
from statex.evals.lm_eval_model import SubjectLM  # noqa: E402
from statex.evals.passage import PASSAGE  # noqa: E402
from statex.evals.subject import Subject  # noqa: E402
from statex.evals.tasks.reading import squad_question  # noqa: E402
from statex.models import load  # noqa: E402
from statex.models.remote_code import export_hf  # noqa: E402

from ..fixtures import write_gla  # noqa: E402
from .models import BYTES, Rule, bpe_tokenizer, knows_nothing, random_model, random_recurrent_model, tells  # noqa: E402

SQUAD = [
    {"title": "Homes", "context": f"Guest {i} is at home in {a}.", "question": f"Where does guest {i} live?", "answers": [a]}
    for i, a in enumerate(("Arden", "Belmont", "Camelot", "Dover", "Elsinore", "Forres"))
]
CHOICES = [
    {"context": f"{name} opened the door and", "choices": choices, "label": i % 3}
    for i, name in enumerate(("Ann", "Bob", "Cy", "Di", "Ed", "Flo"))
    for choices in [["saw the garden.", "left.", "fell asleep at once, as always."]]
]
CHOICE_TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
SQUAD_TASK = """
task: local_squad
class: !function local_task.LocalSquad
"""
SQUAD_CODE = """
import json
from pathlib import Path

from datasets import Dataset
from lm_eval.tasks.squad_completion.task import SQUADCompletion


class LocalSquad(SQUADCompletion):
    def download(self, *args, **kwargs):
        lines = (Path(__file__).parent / "completions.jsonl").read_text().splitlines()
        self.dataset = {"validation": Dataset.from_list([json.loads(line) for line in lines])}
"""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with task files of lm-eval that read local data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "choices.yaml").write_text(CHOICE_TASK.format(file=write(tmp_path / "choices.jsonl", CHOICES)))
    texts = [{"text": PASSAGE[:400]}, {"text": PASSAGE[400:1000]}]
    (tmp_path / "text.yaml").write_text(TEXT_TASK.format(file=write(tmp_path / "texts.jsonl", texts)))
    (tmp_path / "squad.yaml").write_text(SQUAD_TASK)
    (tmp_path / "local_task.py").write_text(SQUAD_CODE)
    return tmp_path


def run(model: torch.nn.Module, task: Path | str, **options: Any) -> EvalResult:
    return evaluate(model, lm_eval=[str(task)], progress=False, **{"tokenizer": BYTES} | options)


def half_right(text: str) -> str:
    """Every second guest's home, in a sentence."""
    guest = int(text.rpartition("Where does guest ")[2][0])
    told = text.rpartition("\nAnswer:")[2]
    return f" it is {SQUAD[guest]['answers'][0].upper() if guest % 2 else 'Rome'}\n"[len(told) :]


def test_reading_scores_are_those_of_lm_eval(tasks: Path) -> None:
    write(tasks / "squad_dev.jsonl", SQUAD)
    ours = evaluate(Rule(tells(half_right)), ["squad"], data_dir=tasks, shots=[0], tokenizer=BYTES, progress=False).tasks["squad"]
    order = np.random.default_rng(0).permutation(len(SQUAD))
    prompts = [{"text": squad_question(SQUAD[i]).prompt, "value": SQUAD[i]["answers"][0]} for i in order]
    write(tasks / "completions.jsonl", prompts)
    theirs = run(Rule(tells(half_right)), tasks / "squad.yaml").tasks["lm_eval_local_squad"]
    assert ours.cells[0].value == theirs.cells[0].value == 0.5
    assert ours.cells[0].n == theirs.cells[0].n == 6
    assert theirs.cells[0].low is not None


def test_choices_are_those_of_lm_eval(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        {"doc_id": i, "label": row["label"], "request": {"context": row["context"], "continuation": f" {choice}"}}
        for i, row in enumerate(CHOICES)
        for choice in row["choices"]
    ]
    path = write(tasks / "requests.jsonl", requests)
    monkeypatch.setattr("statex.evals.sources.Source._in_package", lambda source: path)
    model = random_recurrent_model(3)
    ours = evaluate(model, ["arc_easy"], tokenizer=BYTES, progress=False).tasks["arc_easy"].cells[0]
    theirs = run(model, tasks / "choices.yaml").tasks["lm_eval_local_choices"].cells[0]
    assert (ours.value, ours.extra["accuracy_per_character"]) == (theirs.value, theirs.extra["acc_norm"])
    assert 0 < ours.value < 1


def test_rolling_scores_are_bits_per_byte(tasks: Path) -> None:
    task = run(Rule(knows_nothing), tasks / "text.yaml").tasks["lm_eval_local_text"]
    assert task.metric == "bits per byte"
    assert task.cells[0].value == pytest.approx(math.log2(259), abs=1e-4)
    assert task.cells[0].n == 1000
    assert task.cells[0].rows == 2


def test_samples_limit_and_results_are_paired(tasks: Path) -> None:
    first, second = (run(model, tasks / "choices.yaml", samples=4) for model in (random_model(1), random_model(2)))
    assert first.tasks["lm_eval_local_choices"].cells[0].rows == 4
    assert compare([first, second]).rows[0].differences[1] is not None


@pytest.mark.parametrize("tokenizer", [BYTES, bpe_tokenizer()], ids=["bytes", "bpe"])
def test_lm_eval_on_an_export_gives_the_scores_that_we_give(tokenizer: Any, tasks: Path) -> None:
    checkpoint = write_gla(tasks / "gla", vocab_size=400)
    tokenizer.save_pretrained(checkpoint)
    export_hf(checkpoint, tasks / "exported")
    # A byte tokenizer puts an end of text behind every text, which add_bos_token=False switches off.
    options = {"trust_remote_code": True, "dtype": "float32", "add_bos_token": False if tokenizer is BYTES else None}
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tasks / "exported"), **options}, device="cpu", batch_size=3, bootstrap_iters=0,
        tasks=[str(tasks / "choices.yaml")], task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert theirs is not None
    (samples,) = theirs["samples"].values()
    subject = Subject(load(checkpoint), tokenizer)
    for sample in samples:
        pairs = [SimpleNamespace(args=tuple(each)) for each in sample["arguments"]]
        with torch.inference_mode():
            ours = SubjectLM(subject).loglikelihood(pairs, disable_tqdm=True)
        assert [score for score, _ in ours] == pytest.approx([float(answer[0][0]) for answer in sample["resps"]], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squad_completoin", "lm-eval has no task 'squad_completoin'.*Did you mean 'squad_completion'"),
        ("none.yaml", "lm-eval has no task 'none.yaml'"),
        ("squad_completion", "the data of lm-eval's task squad_completion cannot be loaded"),
    ],
)
def test_what_lm_eval_cannot_run_is_refused_before_anything_runs(name: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        run(Rule(knows_nothing), name)
    assert caught.value.fix


def test_without_lm_eval_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    harness._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=r"pip install 'statex\[eval\]'"):
        run(Rule(knows_nothing), "swde")
