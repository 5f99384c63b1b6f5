"""docs/measuring.md names a test for each claim; the names must be real."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "measuring.md"


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the documentation is not beside the tests")
def test_every_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)", DOCUMENT.read_text(encoding="utf-8")))
    defined = {
        name for file in Path(__file__).parent.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 30
    assert named <= defined, named - defined
