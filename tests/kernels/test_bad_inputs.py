"""Every mistake ends in a message that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statex.kernels import gla, ssd
from tests.kernels.inputs import gla_inputs, ssd_inputs

GLA_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"k": torch.zeros(2, 8, 6)}, r"k must be \[B, T, H, D\], got \[2, 8, 6\]"),
    "no tokens": ({name: torch.zeros(2, 0, 2, 6) for name in ("q", "k", "log_decay")}, "T = 0"),
    "shorter values": ({"v": torch.zeros(2, 7, 2, 10)}, r"v must be \[2, 8, 2, 10\], got \[2, 7, 2, 10\]"),
    "scalar decays": ({"log_decay": torch.zeros(2, 8, 2, 1)}, r"log_decay must be \[2, 8, 2, 6\]"),
    "query heads": ({"q": torch.zeros(2, 8, 3, 6)}, "3 query heads cannot share 2 key heads"),
    "growing": ({"log_decay": torch.full((2, 8, 2, 6), 0.1)}, "log_decay must be at most 0"),
    "mixing rows": ({"mixing": torch.zeros(2, 3, 2)}, r"mixing must be \[2, 2, 2\] or \[2, 6, 2\]"),
    "mixing blocks": ({"mixing": torch.zeros(2, 6, 4)}, "4 blocks, which do not divide K = 6 and V = 10"),
    "gamma heads": ({"lift_gamma": torch.zeros(1, 6)}, r"lift_gamma must be \[2 query heads, a multiple of 6\]"),
    "gamma length": ({"lift_gamma": torch.zeros(2, 7)}, r"a multiple of 6\], got \[2, 7\]"),
    "state of the unlifted key": ({"lift_gamma": torch.zeros(2, 6)}, r"initial_state must be \[2, 2, 12, 10\]"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 8])}, "the batch is 2"),
    "another device": ({"v": torch.zeros(2, 8, 2, 10, device="meta")}, "v is on meta and q on cpu: move them to one device"),
    "backend": ({"backend": "cuda"}, "unknown backend 'cuda'; choose one of auto, reference, chunked"),
}
SSD_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({name: torch.zeros(2, 8, 3, 6) for name in ("B", "C")}, "4 heads cannot share 3 groups"),
    "C differs": ({"C": torch.zeros(2, 8, 2, 5)}, r"C must be \[2, 8, 2, 6\]"),
    "dt": ({"dt": torch.zeros(2, 8, 4, 1)}, r"dt must be \[2, 8, 4\]"),
    "growing": ({"A": torch.ones(4)}, "A must be at most 0"),
    "dt before softplus": ({"dt": torch.full((2, 8, 4), -1.0)}, "dt must be at least 0"),
    "D": ({"D": torch.zeros(4, 10)}, r"D must be \[4\]"),
    "state": ({"initial_state": torch.zeros(2, 4, 10, 6)}, r"initial_state must be \[2, 4, 6, 10\]"),
}


@pytest.mark.parametrize("mistake", GLA_MISTAKES)
def test_gla_names_the_mistake(mistake: str) -> None:
    changes, message = GLA_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        gla(**(gla_inputs(8) | {"scale": 1.0} | changes))


@pytest.mark.parametrize("mistake", SSD_MISTAKES)
def test_ssd_names_the_mistake(mistake: str) -> None:
    changes, message = SSD_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        ssd(**(ssd_inputs(8) | changes))


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        (torch.tensor([0, 7]), "cu_seqlens must run from 0 to T = 8, got 0 to 7"),
        (torch.tensor([1, 8]), "got 1 to 8"),
        (torch.tensor([0, 5, 3, 8]), "cu_seqlens must not fall"),
        (torch.tensor([0.0, 8.0]), "at least two integers"),
        (torch.tensor([8]), "at least two integers"),
    ],
)
def test_borders_must_rise_from_zero_to_the_end(borders: torch.Tensor, message: str) -> None:
    inputs = gla_inputs(8, batch=1)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match=message):
        gla(**inputs, scale=1.0, cu_seqlens=borders)
