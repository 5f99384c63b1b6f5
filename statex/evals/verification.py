"""`verify`: do two checkpoints compute the same function? Both run over real text in fp32, and their logits are compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EvaluationError, StatexError
from ..models.named import parse_dtype, pick_device
from .passage import PASSAGE
from .subject import convert_model, describe_model, evaluation_mode, find_tokenizer, load_model, provenance
from .text import Encoder, encode, read_documents, source_name, start_ids

if TYPE_CHECKING:
    from rich.console import Group

WINDOW = 512
"""Tokens of a window: several chunks of the chunked kernels, so that states are carried."""
MAX_CHARACTERS_A_TOKEN = 16
"""More text than this is not tokenized."""
ROUNDINGS = 64
"""Tolerance in units of eps * sqrt(layers) * max |logit|; see `tolerance`."""


def tolerance(largest_logit: float, layers: int, dtype: torch.dtype) -> float:
    """The largest |difference of logits| that rounding explains: 64 * eps * sqrt(layers) * max |logit|.

    Surgery that preserves the function changes only the order and grouping of sums (longer dot products, blocks that are added,
    zeros among them). Each layer then differs by some units of eps relative to its activations; errors of different layers are
    independent, so they add up like the square root of depth. On random checkpoints of both families, 3 to 24 layers deep,
    `preserve` stays below 16 of these units in fp32 and in fp64; `inherit` differs by a million of them.
    """
    return ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(max(layers, 1)) * largest_logit


@dataclass(frozen=True)
class VerifyReport:
    """How far two checkpoints differ over `tokens` positions.

    Attributes:
        max_difference: largest |difference| of any logit; `tolerance` bounds it, `reason` says why.
        relative_difference: the same relative to the root mean square of the base's logits.
        kl: mean KL(base || expanded) over positions, in nats.
        agreement: share of positions whose most likely token is the same.
        state_elements, parameters: (base, expanded).
        intended_changes: what has been done to the expanded checkpoint since the base that changes the function.
        must_match: whether the two were meant to compute the same function.
    """

    base: str
    expanded: str
    tokens: int
    text: str
    dtype: str
    max_difference: float
    relative_difference: float
    kl: float
    agreement: float
    tolerance: float
    reason: str
    parameters: tuple[int, int]
    state_elements: tuple[int, int] | None
    intended_changes: list[str]
    must_match: bool
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """The logits agree to rounding."""
        return self.max_difference <= self.tolerance

    @property
    def passed(self) -> bool:
        """The logits agree, or were not meant to."""
        return self.same or not self.must_match

    @property
    def state_growth(self) -> float | None:
        """How many times larger the state became."""
        return None if self.state_elements is None else self.state_elements[1] / self.state_elements[0]

    @property
    def parameter_growth(self) -> float:
        """New parameters as a share of the base's."""
        return self.parameters[1] / self.parameters[0] - 1

    @property
    def verdict(self) -> str:
        """One sentence on the outcome."""
        if self.same:
            return "passed: the same function up to rounding"
        if not self.must_match:
            return f"not the same function, and it was meant to change ({', '.join(self.intended_changes)})"
        return "FAILED: the logits differ by more than rounding"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, verdict included; numbers that are not finite (from NaN logits) are None."""
        data = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(self).items()
        }
        derived = ("same", "passed", "verdict", "state_growth", "parameter_growth")
        return data | {name: getattr(self, name) for name in derived}

    def table(self) -> Group:
        """A rich table; print it with a rich console."""
        from .report import verify_table

        return verify_table(self)


def verify(
    base: str | Path | nn.Module,
    expanded: str | Path | nn.Module,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    max_tokens: int = 2048,
    tokenizer: Encoder | str | Path | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | None = None,
    must_match: bool | None = None,
) -> VerifyReport:
    """Run two checkpoints over the same text, one after the other (so memory holds one of them), and compare their logits.

    Args:
        base, expanded: checkpoint folders, hub ids, or loaded models. Those stay as they are: where dtype or device differ, a copy
            is run.
        data: text file or files; by default a built-in passage of a novel.
        max_tokens: tokens to run, in windows of 512.
        tokenizer: a tokenizer, its folder or hub id; by default the base's. Without one the bytes of the text serve as token ids,
            which is as good a test of equality.
        dtype: what to compute in. fp64 tells rounding from a small change of function by nine more digits.
        must_match: whether a difference is a failure; by default it is, unless the plan's init is not `preserve` or the expanded
            checkpoint was fine-tuned.
        device: where to compute; by default loaded models stay where they are, and others go to the GPU if there is one.

    Raises:
        EvaluationError: no text, fewer than two tokens, models of different vocabularies.
        StatexError: an unknown dtype, or a device that is not there.
        CheckpointError: a checkpoint cannot be read.
    """
    precision, place = parse_dtype(dtype) or torch.float32, None if device is None else pick_device(device)
    if max_tokens < 2:
        raise EvaluationError(f"{max_tokens} tokens compare nothing", where="max_tokens", fix="Give 2 or more")
    names = _name(base), _name(expanded)
    # One model at a time: the base's logits wait on the CPU while the expanded model runs.
    model = _load(base, precision, place)
    before, made = describe_model(model), provenance(model)
    windows, notes = _windows(base, model, tokenizer, data, max_tokens)
    with evaluation_mode(model):
        reference = list(_logits(model, windows))
    del model
    model = _load(expanded, precision, place)
    after = describe_model(model)
    differences = _Differences()
    with evaluation_mode(model):
        for first, second in zip(reference, _logits(model, windows), strict=True):
            if first.shape != second.shape:
                raise EvaluationError(
                    f"the vocabularies have {first.shape[-1]} and {second.shape[-1]} tokens",
                    where=" and ".join(names),
                    fix="Compare a checkpoint with its own expansion",
                )
            differences.add(first, second)
    changes = _intended_changes(made, provenance(model))
    layers = _layers(model)
    states = before.get("state_elements"), after.get("state_elements")
    return VerifyReport(
        base=names[0],
        expanded=names[1],
        tokens=differences.positions,
        text="built-in passage" if data is None else source_name(data),
        dtype=str(precision).removeprefix("torch."),
        max_difference=differences.largest,
        relative_difference=differences.largest / max(math.sqrt(differences.squares / differences.logits), sys.float_info.min),
        kl=differences.kl / differences.positions,
        agreement=differences.agreeing / differences.positions,
        tolerance=tolerance(differences.largest_logit, layers, precision),
        reason=f"{ROUNDINGS} eps x sqrt({layers} layers) x max |logit| {differences.largest_logit:.3g}; so rounding grows",
        parameters=(before["parameters"], after["parameters"]),
        state_elements=(states[0], states[1]) if states[0] and states[1] else None,
        intended_changes=changes,
        must_match=not changes if must_match is None else must_match,
        notes=notes,
    )


@dataclass
class _Differences:
    """Sums over windows."""

    positions: int = 0
    logits: int = 0
    largest: float = 0.0
    largest_logit: float = 0.0
    squares: float = 0.0
    kl: float = 0.0
    agreeing: int = 0

    def add(self, base: Tensor, expanded: Tensor) -> None:
        """Take in the logits `[T, vocabulary]` of a window."""
        base, expanded = base.double(), expanded.double()
        difference = (base - expanded).abs().max().item()
        # NaN compares as smaller than anything; it must fail.
        self.largest = max(self.largest, math.inf if math.isnan(difference) else difference)
        self.largest_logit = max(self.largest_logit, base.abs().max().item())
        self.squares += base.square().sum().item()
        self.logits += base.numel()
        log_p, log_q = base.log_softmax(-1), expanded.log_softmax(-1)
        self.kl += (log_p.exp() * (log_p - log_q)).sum().item()
        self.agreeing += int((base.argmax(-1) == expanded.argmax(-1)).sum())
        self.positions += len(base)


@torch.inference_mode()
def _logits(model: nn.Module, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits `[T, vocabulary]` of each window, on the CPU."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for window in windows:
        with _full_precision():
            logits = model(input_ids=window[None].to(device), attention_mask=None, logits_to_keep=0, use_cache=False).logits[0]
        yield logits.cpu()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: a GPU's convolutions round fp32 to ten bits by default."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def _windows(
    base: str | Path | nn.Module,
    model: nn.Module,
    tokenizer: Encoder | str | Path | None,
    data: str | Path | Sequence[str | Path] | None,
    max_tokens: int,
) -> tuple[list[Tensor], list[str]]:
    """Windows of token ids `[T]`, and what to note about them."""
    text = PASSAGE if data is None else "\n\n".join(read_documents(data))
    text = text[: MAX_CHARACTERS_A_TOKEN * max_tokens]
    vocabulary, notes = int(model.config.vocab_size), []  # type: ignore[union-attr, arg-type]
    try:
        found = find_tokenizer(_tokenizer_source(base) if tokenizer is None else tokenizer)
        ids = np.concatenate([start_ids(found), encode(found, text)])
    except StatexError:
        if tokenizer is not None:
            raise
        notes.append("no tokenizer: the bytes of the text were the token ids, which tests equality as well")
        ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) % vocabulary
    if ids.max() >= vocabulary:
        raise EvaluationError(
            f"the tokenizer gives token id {ids.max()}, the model knows {vocabulary}",
            where=_name(base),
            fix="Give the model's own --tokenizer",
        )
    ids = ids[:max_tokens]
    return [torch.from_numpy(ids[at : at + WINDOW]) for at in range(0, len(ids), WINDOW)], notes


def _intended_changes(base: dict[str, Any], expanded: dict[str, Any]) -> list[str]:
    """Inits other than `preserve`, and fine-tuning, in the expanded checkpoint's provenance beyond the base's."""
    earlier, later = _history(base), _history(expanded)
    inits = {operation["init"] for step in later[len(earlier) :] for operation in (step.get("plan") or {}).get("operations", ())}
    changes = [f"init {init}" for init in sorted(inits - {"preserve"})]
    runs = [sum(len(step.get("finetune", ())) for step in history) for history in (earlier, later)]
    return [*changes, "fine-tuned"] if runs[1] > runs[0] else changes


def _history(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """A provenance and those before it, the oldest first."""
    return [*_history(provenance.get("previous") or {}), provenance] if provenance else []


def _tokenizer_source(base: str | Path | nn.Module) -> str | Path:
    if isinstance(base, nn.Module):
        raise EvaluationError("a loaded model comes without a tokenizer", where="tokenizer", fix="Pass tokenizer= as well")
    return base


def _load(checkpoint: str | Path | nn.Module, dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    if isinstance(checkpoint, nn.Module):
        return convert_model(checkpoint, dtype=dtype, device=device)
    return load_model(checkpoint, dtype=dtype, device=device or pick_device(None))


def _layers(model: nn.Module) -> int:
    return int(getattr(model.config, "num_hidden_layers", 1))


def _name(checkpoint: str | Path | nn.Module) -> str:
    return str(describe_model(checkpoint)["name"]) if isinstance(checkpoint, nn.Module) else str(checkpoint)
