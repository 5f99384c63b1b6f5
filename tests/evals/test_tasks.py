"""Each task can be passed and failed: by a model that recalls everything, and by one that knows nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from statex.errors import EvaluationError
from statex.evals import TASKS, EvalResult, evaluate
from statex.evals.passage import PASSAGE
from statex.evals.subject import Subject
from statex.evals.task import Context, Options
from statex.evals.tasks.needle import draw_stem
from statex.evals.tasks.niah import draw_needle
from statex.evals.text import Haystack, encode, start_ids

from .models import BYTES, Rule, bpe_tokenizer, knows_nothing, knows_the_future, random_model, recalls


def run(model: torch.nn.Module, task: str, **options: object) -> EvalResult:
    settings = {"lengths": [256], "depths": [0, 0.5, 1], "num_pairs": [2, 8], "samples": 3, "progress": False} | options
    return evaluate(model, [task], tokenizer=BYTES, **settings)  # type: ignore[arg-type]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PASSAGE, encoding="utf-8")
    return path


@pytest.mark.parametrize("task", ["mqar", "passkey", "niah"])
def test_a_model_that_recalls_scores_everything(task: str, book: Path) -> None:
    assert [cell.value for cell in run(Rule(recalls), task, data=book).tasks[task].cells] == [1.0] * (2 if task == "mqar" else 3)


@pytest.mark.parametrize("task", ["mqar", "passkey", "niah"])
def test_a_random_model_scores_by_chance(task: str, book: Path) -> None:
    result = run(random_model(), task, data=book, samples=20).tasks[task]
    pooled = result.pooled()
    assert pooled.low is not None
    assert pooled.low <= (result.chance or 0) <= pooled.value + 0.02
    assert pooled.value < 0.05


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(book: Path) -> None:
    (cell,) = run(Rule(knows_nothing), "perplexity", data=book, samples=99).tasks["perplexity"].cells
    assert cell.value == pytest.approx(math.log2(259), abs=1e-4)
    assert cell.extra["perplexity"] == pytest.approx(259, rel=1e-4)
    # Every byte but the first, which has no context, is predicted once.
    assert cell.n == cell.extra["tokens"] == len(PASSAGE.encode()) - 1


def test_perplexity_of_a_model_that_knows_the_future_is_nothing(book: Path) -> None:
    (cell,) = run(Rule(knows_the_future), "perplexity", data=book).tasks["perplexity"].cells
    assert cell.value == pytest.approx(0, abs=1e-6)
    assert cell.extra["perplexity"] == pytest.approx(1)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens(tmp_path: Path) -> None:
    text = "Ünïcödé ünd 日本語 🙂. " * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = evaluate(
        random_model(vocabulary=400),
        ["perplexity"],
        tokenizer=bpe_tokenizer(),
        lengths=[64],
        data=tmp_path / "text.txt",
        progress=False,
    )
    (cell,) = result.tasks["perplexity"].cells
    assert cell.n == len(text.strip().encode()) + 1
    assert cell.extra["tokens"] < cell.n
    assert cell.value * cell.n * math.log(2) == pytest.approx(cell.extra["loss"] * cell.extra["tokens"], rel=1e-4)


def test_windows_of_every_length_predict_the_same_bytes(book: Path) -> None:
    cells = run(Rule(knows_nothing), "perplexity", data=book, lengths=[64, 128, 512]).tasks["perplexity"].cells
    assert len({cell.n for cell in cells}) == 1
    assert [cell.rows for cell in cells] == sorted((cell.rows for cell in cells), reverse=True)


def test_teacher_forcing_marks_right_just_what_greedy_generation_gives() -> None:
    model = random_model()
    prompt = torch.from_numpy(encode(BYTES, PASSAGE[:40]))[None]
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0).numpy()
    altered = generated.copy()
    altered[0, -3] = (altered[0, -3] + 1) % 259
    scores = Subject(model, BYTES).score(np.concatenate([generated, altered]), keep=6)
    assert scores.correct.all(axis=1).tolist() == [True, False]


def test_scores_do_not_depend_on_the_batch_size(book: Path) -> None:
    one, many = (run(random_model(), "niah", data=book, batch_size=size).tasks["niah"] for size in (1, 64))
    assert [cell.extra["answer_nats"] for cell in one.cells] == pytest.approx(
        [cell.extra["answer_nats"] for cell in many.cells], rel=1e-5
    )


@pytest.mark.parametrize("tokenizer", [BYTES, bpe_tokenizer()], ids=["bytes", "bpe"])
def test_prompts_have_the_length_asked_for_and_the_needle_at_its_depth(tokenizer) -> None:
    context = Context(tokenizer, Options((400,), (0.0, 0.5, 1.0), (4,), samples=2, seed=0))
    haystack = Haystack(tokenizer, [PASSAGE], "passage")
    rng = np.random.default_rng(5)
    needle = draw_needle(np.random.default_rng(5))
    stem = draw_stem(context, draw_needle, haystack.draw, 400, [0.0, 0.5, 1.0], rng)
    prompts, size = np.stack([stem.whole(row) for row in stem.rows]), stem.rows[0].keep
    assert prompts.shape == (3, 400)
    hidden = needle.before + needle.value + needle.after
    texts = [tokenizer.decode(row[len(start_ids(tokenizer)) :]) for row in prompts]
    assert all(text.count(needle.value) == 2 and text.endswith(needle.question + needle.value) for text in texts)
    room = len(texts[0]) - len(needle.question + needle.value) - len(hidden)
    assert texts[0].index(hidden) == 0
    assert texts[2].index(hidden) == room
    assert abs(texts[1].index(hidden) - room / 2) < 150
    before = texts[1][: texts[1].index(hidden)]
    assert before.rstrip()[-1] in ".!?"
    assert encode(tokenizer, needle.value).tolist() == prompts[0, -size:].tolist()


def test_equal_seeds_give_equal_inputs_and_other_seeds_others(book: Path) -> None:
    for task in ("mqar", "mqar_grid", "passkey", "niah", "niah_multikey", "phone_book", "copying", "icl_classification"):
        first, again, other = (
            run(random_model(), task, data=book, seed=seed, samples=1, lengths=[600], shots=[2]).tasks[task].cells
            for seed in (1, 1, 2)
        )
        assert [cell.inputs for cell in first] == [cell.inputs for cell in again]
        assert not {cell.inputs for cell in first} & {cell.inputs for cell in other}


def test_more_samples_keep_the_first_ones(book: Path) -> None:
    few, many = (run(random_model(), "niah", data=book, samples=samples, depths=[0.5]).tasks["niah"].cells[0] for samples in (2, 5))
    assert many.outcomes[:2] == few.outcomes
    assert many.n == 5


def test_without_data_the_haystack_is_generated_and_the_report_says_so() -> None:
    result = run(Rule(recalls), "niah").tasks["niah"]
    assert any("generated" in note for note in result.notes)
    assert result.pooled().value == 1


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("mqar", {"num_pairs": [4, 500]}, "500 pairs are asked for, the vocabulary gives 1 to 128"),
        ("passkey", {"lengths": [20]}, "no room for the needle"),
        ("niah", {"depths": [50]}, "depth 50.0 is outside 0 to 1"),
        ("niah", {"lengths": [99_999], "data": True}, "a stretch of .* tokens is asked for, the text has"),
        ("perplexity", {"lengths": [99_999], "data": True}, "no document has 99999 tokens"),
        ("perplexity", {"lengths": [1], "data": True}, "predicts nothing"),
        ("perplexity", {}, "perplexity needs text"),
        ("niahh", {}, "there is no task 'niahh'.*Did you mean 'niah'"),
        ("mqar", {"num_pairs": [0]}, "0 is not a whole number from 1"),
        ("mqar", {"samples": 0}, "0 is not a whole number from 1"),
        ("mqar", {"seed": -1}, "the seed is -1"),
        ("mqar", {"batch_size": 0}, "the batch size is 0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(task: str, options: dict[str, object], message: str, book: Path) -> None:
    if options.get("data"):
        options = options | {"data": book}
    with pytest.raises(EvaluationError, match=message) as caught:
        run(Rule(knows_nothing), task, **options)
    assert caught.value.fix


def test_nan_logits_and_foreign_tokenizers_are_named() -> None:
    with pytest.raises(EvaluationError, match="NaN"):
        run(Rule(lambda row: torch.full((len(row), 259), math.nan)), "mqar")
    with pytest.raises(EvaluationError, match="the model knows 40"):
        run(random_model(vocabulary=40), "mqar")


def test_a_model_in_training_is_measured_without_dropout_and_goes_on_training() -> None:
    class Watch(Rule):
        def forward(self, *args, **options):
            assert not self.training
            return super().forward(*args, **options)

    model = Watch(recalls).train()
    run(model, "mqar")
    assert model.training


def test_a_model_without_logits_to_keep_is_scored_alike() -> None:
    class Whole(Rule):
        def forward(self, input_ids, attention_mask=None, logits_to_keep=0, use_cache=False):
            return super().forward(input_ids)

    assert [cell.value for cell in run(Whole(recalls), "mqar").tasks["mqar"].cells] == [1.0, 1.0]


def test_lengths_that_some_sample_exceeds_are_refused_before_anything_runs() -> None:
    # Words of five to eight letters: needles of different samples differ by up to nine bytes.
    refused, settings = 0, [(length, seed) for length in (178, 181, 184) for seed in range(6)]
    for length, seed in settings:
        context = Context(BYTES, Options((length,), (0.5,), (4,), samples=4, seed=seed))
        try:
            schedule = TASKS["niah"].schedule(context)
        except EvaluationError:
            refused += 1
            continue
        (cell,) = schedule.jobs[0].run(Subject(Rule(knows_nothing), BYTES), lambda rows: None)
        assert cell.rows == 4
    assert 0 < refused < len(settings)
