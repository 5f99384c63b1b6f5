"""Branched states, pieces of long rows and batches of unequal rows give the scores of rows that are read one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from statex.evals import subject as subject_module
from statex.evals.passage import PASSAGE
from statex.evals.stems import Row, Stem, stem_of
from statex.evals.subject import Subject
from statex.evals.text import encode
from statex.models import StatexForCausalLM

from ..models.build import CONFIGS, describe
from .models import BYTES, VOCABULARY, Induction, Rule, knows_the_future, random_model, random_recurrent_model

IDS = encode(BYTES, PASSAGE)


def recurrent(family: str = "gla") -> StatexForCausalLM:
    return StatexForCausalLM.from_description(replace(describe(family), vocab_size=VOCABULARY), seed=1).eval()


def alone(model: torch.nn.Module, ids: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one row by one plain forward pass."""
    row = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(input_ids=row[None], attention_mask=None, use_cache=False).logits[0, :-1].double()
    nats = -logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    return (logits.argmax(-1) == row[1:])[-keep:].numpy(), nats[-keep:].numpy()


def stems() -> list[Stem]:
    """Stems of unequal length, number of nodes and answers, some left at 0, some not worth branching."""
    rng, found = np.random.default_rng(0), []
    for size, nodes in ((700, (0, 300, 700)), (640, (0, 311, 640)), (650, (650, 650, 400)), (40, (40, 20)), (900, (880,) * 5)):
        rows = [Row(at, rng.integers(3, VOCABULARY, int(rng.integers(4, 60))), int(rng.integers(1, 4))) for at in nodes]
        found.append(Stem(rng.integers(3, VOCABULARY, size), tuple(rows)))
    return found


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_module, "CPU_BATCH_TOKENS", 256)


@pytest.mark.parametrize("family", CONFIGS)
def test_branched_rows_score_as_rows_that_are_read_alone(family: str, small_pieces: None) -> None:
    model, told = recurrent(family), []
    scores = Subject(model, BYTES).score_stems(stems(), told.append)
    assert sum(told) == sum(len(stem.rows) for stem in stems())
    for stem, found in zip(stems(), scores, strict=True):
        for row, score in zip(stem.rows, found, strict=True):
            correct, nats = alone(model, stem.whole(row), row.keep)
            assert score.correct.tolist() == correct.tolist()
            assert score.nats == pytest.approx(nats, rel=2e-4)


@pytest.mark.parametrize("model", [random_model(), Rule(knows_the_future), Induction()], ids=["llama", "rule", "induction"])
def test_models_without_states_to_branch_read_whole_rows(model: torch.nn.Module) -> None:
    subject = Subject(model, BYTES)
    assert not subject.branches
    for stem, found in zip(stems(), subject.score_stems(stems()), strict=True):
        for row, score in zip(stem.rows, found, strict=True):
            assert score.nats == pytest.approx(alone(model, stem.whole(row), row.keep)[1], rel=2e-4, abs=1e-5)


def test_a_shared_beginning_is_read_once(small_pieces: None) -> None:
    subject, read = Subject(recurrent(), BYTES), 0
    forward = subject.forward

    def count(rows: torch.Tensor, keep: int, cache: Any = None) -> torch.Tensor:
        nonlocal read
        read += rows.numel()
        return forward(rows, keep, cache)

    subject.forward = count  # type: ignore[method-assign]
    questions = tuple(Row(1000, IDS[k : k + 20], 5) for k in range(16))
    subject.score_stems([Stem(IDS[:1000], questions)])
    # The last token of a row predicts nothing.
    assert read <= 1000 + 16 * 20


def test_long_rows_are_read_in_pieces_of_constant_size(small_pieces: None) -> None:
    subject, sizes = Subject(recurrent(), BYTES), []
    forward = subject.forward

    def watch(rows: torch.Tensor, keep: int, cache: Any = None) -> torch.Tensor:
        logits = forward(rows, keep, cache)
        sizes.append((rows.numel(), logits.shape[1]))
        return logits

    subject.forward = watch  # type: ignore[method-assign]
    scores = subject.score(IDS[None, :2000], keep=8)
    assert max(tokens for tokens, _ in sizes) <= 256
    assert max(kept for _, kept in sizes) <= 9
    assert scores.nats[0] == pytest.approx(alone(subject.model, IDS[:2000], 8)[1], rel=2e-4)


def test_all_tokens_of_a_window_are_scored_in_pieces(small_pieces: None) -> None:
    subject = Subject(recurrent("mamba2"), BYTES)
    scores = subject.score(IDS[None, :900], keep=899)
    assert scores.nats[0] == pytest.approx(alone(subject.model, IDS[:900], 899)[1], rel=2e-4)


@pytest.mark.parametrize("header", [0, 130])
@pytest.mark.parametrize("family", ["gla", "mamba2", "llama"])
def test_generation_of_unequal_prompts_is_transformers_greedy_generation(family: str, header: int) -> None:
    model = random_model() if family == "llama" else recurrent(family)
    prompts, start = [IDS[k : k + size] for k, size in ((0, 40), (90, 7), (200, 41), (400, 1))], IDS[5 : 5 + header]
    texts = Subject(model, BYTES).generate(prompts, max_new_tokens=9, stops=("\n",), header=start if header else None)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.from_numpy(np.concatenate([start, prompt]))[None]
        whole = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=1, pad_token_id=0)[0, ids.shape[1] :]
        expected = BYTES.decode([token for token in whole.tolist() if token > 2])
        assert text == expected.partition("\n")[0]


def test_ids_that_no_token_has_say_nothing() -> None:
    ids = torch.tensor([len(BYTES), BYTES.encode("a", add_special_tokens=False)[0]])

    def alternates(row: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids[torch.arange(len(row)) % 2], len(BYTES) + 1).float()

    model = Rule(alternates)
    model.config = SimpleNamespace(vocab_size=len(BYTES) + 1)  # type: ignore[assignment]
    assert Subject(model, BYTES).generate([IDS[:4]], max_new_tokens=4) == ["aa"]


def test_generation_ends_before_any_of_the_stops() -> None:
    prompt = IDS[: len(PASSAGE.encode()) // 2]
    (text,) = Subject(Rule(lambda row: knows_next(row)), BYTES).generate([prompt], max_new_tokens=60, stops=("zzz", " "))
    follows = PASSAGE.encode()[len(prompt) :].decode()
    assert text == follows[: follows.index(" ")]


def knows_next(row: torch.Tensor) -> torch.Tensor:
    """The passage's next byte at every position."""
    return 9 * torch.nn.functional.one_hot(torch.from_numpy(IDS[1 : len(row) + 1]), VOCABULARY).float()


def test_a_branch_does_not_change_what_it_left() -> None:
    model = random_recurrent_model()
    with torch.no_grad():
        cache = model(torch.from_numpy(IDS[None, :50]), use_cache=True).past_key_values
        before = [layer.recurrent.clone() for layer in cache.layers]
        other = cache.branch(torch.tensor([0, 0]))
        for size in (7, 1):
            model(torch.from_numpy(IDS[None, :size]).repeat(2, 1), past_key_values=other, use_cache=True)
    assert all(torch.equal(layer.recurrent, state) for layer, state in zip(cache.layers, before, strict=True))
    assert cache.tokens_seen == 50
    assert other.tokens_seen == 58
    cache.put_back(other.branch(torch.tensor([1])), torch.tensor([0]))
    assert all(torch.equal(a.recurrent[0], b.recurrent[1]) for a, b in zip(cache.layers, other.layers, strict=True))


def test_a_stem_is_what_its_rows_begin_with_up_to_the_token_before_an_answer() -> None:
    rows = [(np.array([1, 2, 3, 4]), 1), (np.array([1, 2, 3, 5, 6]), 2), (np.array([1, 2, 3, 4]), 2)]
    stem = stem_of(rows)
    assert stem.ids.tolist() == [1]
    assert [stem.whole(row).tolist() for row in stem.rows] == [ids.tolist() for ids, _ in rows]
    assert all(row.keep < len(row.tail) for row in stem.rows)
    assert stem_of(rows[:2]).ids.tolist() == [1, 2]
