from __future__ import annotations

import pytest

from statex.evals.answers import contains, f1, normalise


@pytest.mark.parametrize(
    ("told", "accepted", "found"),
    [
        (" In the year 1066.", [["1066"]], True),
        (" PARIS", [["Lyon"], ["paris"]], True),
        (" red", [["red", "blue"]], False),
        (" blue and red", [["red", "blue"]], True),
        (" 3.5 (a)", [["3.5 (A)"]], True),
        (" 3x5", [["3.5"]], False),
        ("", [["x"]], False),
    ],
)
def test_an_answer_is_contained_with_all_its_spans_in_any_case(told: str, accepted: list[list[str]], found: bool) -> None:
    assert contains(told, accepted) is found


@pytest.mark.parametrize(("told", "found"), [(" 2", True), (" 2.", True), ("(2)", True), (" 12", False), (" 2nd", False)])
def test_whole_words_do_not_count_within_others(told: str, found: bool) -> None:
    assert contains(told, [["2"]], whole_words=True) is found


@pytest.mark.parametrize(
    ("told", "accepted", "value"),
    [
        ("The Eiffel Tower!", [["eiffel tower"]], 1.0),
        ("tower of Paris", [["Eiffel Tower"]], 0.4),
        ("Eiffel", [["Paris"], ["Eiffel Tower"]], 2 / 3),
        ("", [["Paris"]], 0.0),
        ("the", [["a"]], 1.0),
    ],
)
def test_f1_is_that_of_squad(told: str, accepted: list[list[str]], value: float) -> None:
    assert f1(told, accepted) == pytest.approx(value)


def test_normalisation_drops_case_punctuation_articles_and_spaces() -> None:
    assert normalise(" The  U.S. (an answer) ") == "us answer"
