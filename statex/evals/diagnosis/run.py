"""`diagnose`: ask, cut, ask again; look at the states on real text; say which layers would gain, and write a plan for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ...checkpoints import open_checkpoint
from ...errors import EvaluationError
from ...families.description import LayerDescription
from ...models.openness import measure_openness
from ...surgery.apply import try_layers
from ...surgery.plan import resolve_plan
from ..passage import PASSAGE
from ..result import check_folder
from ..runner import machine, versions
from ..subject import Subject, load_subject
from ..task import Context, Options
from ..text import Haystack
from .advice import advise
from .attribution import Advance, attribute_heads, attribute_layers, mixers_of
from .findings import Diagnosis, LayerFinding
from .memory import LayerMemory, measure_memory
from .probes import choose_probe

WINDOW = 16
SAMPLES = 32
TEXTS, TEXT_TOKENS = 8, 512
"""Stretches of real text that states are looked at on, and their length."""


def diagnose(
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    probe: str | None = None,
    window: int = WINDOW,
    samples: int = SAMPLES,
    heads: bool = True,
    states: bool = True,
    data: str | Path | Sequence[str | Path] | None = None,
    operator: str | None = None,
    factor: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> Diagnosis:
    """Find where a checkpoint keeps what it recalls.

    Args:
        checkpoint: a folder or a hub id, of any family, expanded or not.
        out: folder for `diagnosis.json`, `plan.yaml`, figures and reports; nothing is written without it.
        probe: `mqar` or `copy`; by default MQAR with the most pairs of which half are recalled, or copying where there are none.
        window: a cut layer sees this many to twice as many tokens back.
        samples: rows of the probe.
        heads: also cut the heads, one by one, of layers that lose recall when cut.
        states: also measure ranks, occupation and half-lives on real text.
        data: real text; by default a passage of a novel that comes with statex.
        operator, factor: of the plan for the layers that would gain; by default the family's.
        seed, batch_size, device, dtype, tokenizer, progress: as in `evaluate`.

    Raises:
        EvaluationError: options out of range, text too short, no tokenizer.
        CheckpointError: the checkpoint cannot be read.
        PlanError: an operator that the family cannot take, or that, as asked for, goes on no layer.
    """
    if out is not None:
        check_folder(out)
    _require_positive(window=window, samples=samples)
    with open_checkpoint(checkpoint) as files:
        # What is wrong with the plan that was asked for shows before anything is measured.
        resolve_plan(files, operator=operator, factor=factor)
        if operator is not None or factor is not None:
            able, unable = try_layers(files, range(len(files.description.layers)), operator=operator, factor=factor)
            if not able:
                raise next(iter(unable.values()))
    subject = load_subject(checkpoint, tokenizer=tokenizer, batch_size=batch_size, device=device, dtype=dtype)
    context = Context(subject.tokenizer, Options((), (), (), samples, seed, _paths(data)))
    haystack = context.haystack if data is not None else Haystack(subject.tokenizer, [PASSAGE], "a passage that comes with statex")
    description = cast(Any, subject.model.config).description
    mixers = mixers_of(subject)
    with subject.evaluation_mode(), _progress_bar(progress) as advance:
        advance("asking the whole model")
        recalled = choose_probe(probe, subject, context, haystack)
        if window >= (length := recalled.probe.ids.shape[1]):
            what = f"a window of {window} tokens cuts nothing from the probe's rows of {length}"
            raise EvaluationError(what, where="window", fix=f"Give a --window of {WINDOW}, or another well below {length}")
        lost_by_all, lost = attribute_layers(recalled, subject, mixers, window, advance)
        lost_by_head = attribute_heads(recalled, subject, description, window, lost, advance) if heads else {}
        memories: Sequence[LayerMemory | None] = [None] * len(mixers)
        if states:
            advance("reading text")
            memories = measure_memory(subject.model, mixers, _texts(subject, haystack, context))
    findings = [
        LayerFinding(
            layer=index,
            state=_state(layer),
            state_elements=layer.state_elements,
            lost=lost[index],
            heads=lost_by_head.get(index, []),
            memory=memories[index],
            opened=measure_openness(description, layer, mixers[index]),
        )
        for index, layer in enumerate(description.layers)
    ]
    plan, advice = advise(checkpoint, lost, lost_by_all, operator, factor)
    diagnosis = Diagnosis(
        checkpoint=subject.identity,
        probe=recalled.probe.label,
        rows=len(recalled.right),
        recall=recalled.share,
        recall_without=recalled.share - lost_by_all.value,
        lost_by_all=lost_by_all,
        layers=findings,
        plan=plan,
        advice=advice,
        settings={
            "probe": recalled.probe.name,
            "window": window,
            "samples": samples,
            "text": haystack.source if states or recalled.probe.name == "copy" else None,
            "texts": TEXTS if states else 0,
            "seed": seed,
            "device": str(subject.device),
            "dtype": str(subject.dtype).removeprefix("torch."),
        },
        versions=versions(),
        machine=machine(subject.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out is not None:
        diagnosis.paths.extend(diagnosis.save(out))
    return diagnosis


def auto_layers(checkpoint: str | Path, *, among: Iterable[int] | None = None, **options: Any) -> list[int]:
    """Layers that would gain from expansion, for `statex expand --layers auto`: recall attribution alone.

    Args:
        among: name no other layers than these, such as those that can take an operator.
        options: as `diagnose` takes them.
    Raises:
        EvaluationError: cutting no layer, or none of those, loses recall, so the measurement names none; and as `diagnose` does.
    """
    allowed = None if among is None else set(among)
    diagnosis = diagnose(checkpoint, heads=False, states=False, **options)
    gaining = diagnosis.gaining_layers
    named = [layer for layer in gaining if allowed is None or layer in allowed]
    if not named:
        why = (
            f"recall rests on layers {', '.join(map(str, gaining))}, which cannot be expanded so"
            if gaining
            else diagnosis.advice[0]
        )
        raise EvaluationError(
            f"no layer can be chosen: {why}",
            where=str(checkpoint),
            fix="Name the layers yourself with --layers, or look at `statex diagnose` with another --probe",
        )
    return named


def _texts(subject: Subject, haystack: Haystack, context: Context) -> torch.Tensor:
    """Stretches of text `[N, T]`; shorter ones than `TEXT_TOKENS` where the passage that comes with statex has no more."""
    tokens = min(TEXT_TOKENS, len(subject.tokenizer.encode(haystack.text[: 8 * TEXT_TOKENS], add_special_tokens=False)) // 2)
    if tokens < 8:
        raise EvaluationError("the text is too short to look at states", where=haystack.source, fix="Give more text")
    rows = [haystack.draw(tokens, context.rng("states", row)) for row in range(TEXTS)]
    return torch.from_numpy(np.stack(rows)).to(subject.device)


def _state(layer: LayerDescription) -> str:
    heads, key_dim, value_dim = layer.state_shape
    return f"{heads} × [{key_dim}, {value_dim}]"


def _paths(data: str | Path | Sequence[str | Path] | None) -> str | Path | tuple[str | Path, ...] | None:
    return tuple(data) if data is not None and not isinstance(data, str | Path) else data


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise EvaluationError(f"{name} is {value}", where=name, fix="Give a whole number from 1")


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Advance]:
    from rich.console import Console

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda what: None
        return
    with console.status("diagnosing") as status:
        yield status.update
