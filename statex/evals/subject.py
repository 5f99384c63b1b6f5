"""The model under evaluation: loading, one batched scoring call for all tasks, and what identifies it in a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ..checkpoints import open_checkpoint
from ..errors import EvaluationError
from ..models.named import load_tokenizer, parse_dtype, pick_device
from .branching import score_stems, score_tails
from .generation import generate
from .stems import Advance, RowScore, Stem
from .text import Encoder

if TYPE_CHECKING:
    from ..models.cache import StatexCache

CPU_BATCH_TOKENS, BATCH_TOKENS = 4_096, 65_536
"""Tokens of a forward pass when no batch size is given. A CPU is fastest when activations stay in its caches."""
LOGIT_ELEMENTS = 2**28
"""Logits of a forward pass at most (1 GiB in fp32); the batch shrinks to fit, down to one row."""
STATE_BYTES = 2**32
"""Recurrent states of a forward pass at most."""
PIECE = 64
"""Long sequences are read in multiples of so many tokens, the chunk of the kernels."""


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores of the last `keep` tokens of each row, `[N, keep]`.

    Attributes:
        correct: the most likely token was the right one. Where all tokens of an answer are, greedy generation gives that answer.
        nats: minus the log-probability of the right token.
    """

    correct: np.ndarray
    nats: np.ndarray


class Subject:
    """A causal language model with its tokenizer.

    The model is called as `model(input_ids=[B, T], attention_mask=None, logits_to_keep=n, use_cache=False)` and returns `.logits`
    `[B, n, vocabulary]`. The project's own models are also called with a cache, which lets rows share what they begin with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Encoder,
        *,
        identity: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise EvaluationError(f"the batch size is {batch_size}", where="batch_size", fix="Give a number from 1")
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity or describe_model(model)
        self.batch_size = batch_size
        first = next(model.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        # Of the project's models the first parameter may be one that stays fp32; they say themselves what they compute in.
        self.dtype = getattr(model, "dtype", None) or (first.dtype if first is not None else torch.float32)
        config = getattr(model, "config", None)
        self._vocabulary = int(getattr(config, "vocab_size", None) or len(tokenizer))
        description = getattr(config, "description", None)
        self._layers = 0 if description is None else len(description.layers)
        self._state_bytes = 1 if description is None else 4 * max(1, sum(layer.state_elements for layer in description.layers))
        # Recurrent models know no last position, though some configs of theirs name one.
        self._positions = None if self.branches else getattr(config, "max_position_embeddings", None)

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """No dropout while this is open; see the function of this name."""
        return evaluation_mode(self.model)

    @torch.inference_mode()
    def score(self, ids: np.ndarray, keep: int, advance: Advance = lambda rows: None) -> Scores:
        """Score the last `keep` (< T) tokens of equally long rows `[N, T]`, batch by batch; `advance` hears of finished rows.

        Raises:
            EvaluationError: a token id beyond the model's vocabulary, more tokens than its positions, NaN logits, or no memory.
        """
        correct, nats = np.empty((len(ids), keep), dtype=bool), np.empty((len(ids), keep))
        at_once = self.rows_at_once(ids.shape[1], keep)
        for start in range(0, len(ids), at_once):
            scored = score_tails(self, None, [(row, keep) for row in ids[start : start + at_once]])
            correct[start : start + at_once] = [row.correct for row in scored]
            nats[start : start + at_once] = [row.nats for row in scored]
            advance(len(scored))
        return Scores(correct, nats)

    @torch.inference_mode()
    def score_stems(self, stems: Sequence[Stem], advance: Advance = lambda rows: None) -> list[list[RowScore]]:
        """Score the rows of stems; what they begin with is read once where the model has states to branch. Raises as `score`."""
        return score_stems(self, stems, advance)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        stops: Sequence[str] = ("\n",),
        header: np.ndarray | None = None,
        advance: Advance = lambda rows: None,
    ) -> list[str]:
        """Greedy continuations of prompts `[T]` as text, each cut before the first of `stops`.

        Args:
            header: token ids that stand before every prompt; read once where the model has states to branch.
        Raises:
            EvaluationError: as `score`.
        """
        return generate(self, prompts, max_new_tokens=max_new_tokens, stops=stops, header=header, advance=advance)

    def tensor(self, ids: np.ndarray) -> torch.Tensor:
        """Token ids on the model's device. Raises `EvaluationError` for ids or lengths that the model does not know."""
        if ids.size and ids.max() >= self._vocabulary:
            raise EvaluationError(
                f"the tokenizer gives token id {ids.max()}, the model knows {self._vocabulary}",
                where=str(self.identity["name"]),
                fix="Use the tokenizer that the model was trained with",
            )
        if self._positions is not None and ids.shape[1] > self._positions:
            raise EvaluationError(
                f"a row has {ids.shape[1]} tokens, the model knows {self._positions} positions",
                where=str(self.identity["name"]),
                fix=f"Give --lengths up to {self._positions}, or fewer items",
            )
        return torch.from_numpy(ids).to(self.device)

    def forward(self, rows: torch.Tensor, keep: int, cache: StatexCache | None = None) -> torch.Tensor:
        """Logits `[B, keep, vocabulary]` of the last positions of rows `[B, T]` that go on from a cache, which moves on."""
        memory: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        try:
            logits = self.model(input_ids=rows, attention_mask=None, logits_to_keep=keep, **memory).logits
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"{rows.shape[0]} rows of {rows.shape[1]} tokens do not fit into memory",
                where=str(self.device),
                fix="Give a smaller --batch-size or shorter --lengths",
            ) from error
        # A model that does not know `logits_to_keep` gives all of them.
        return cast(torch.Tensor, logits[:, -keep:])

    def new_cache(self) -> StatexCache:
        """An empty cache of a model that branches."""
        from ..models.cache import StatexCache

        return StatexCache(self._layers)

    def check_finite(self, nats: torch.Tensor) -> None:
        """Raise `EvaluationError` if any score is NaN."""
        if bool(nats.isnan().any()):
            raise EvaluationError(
                "the model gives NaN logits", where=str(self.identity["name"]), fix="Try --dtype float32, or check the weights"
            )

    @property
    def branches(self) -> bool:
        """Whether the model has states of fixed size that can be copied."""
        return self._layers > 0

    def rows_at_once(self, length: int, keep: int) -> int:
        """Rows of a forward pass with `length` tokens each, of which `keep` are scored."""
        if self.branches:
            wanted = self.batch_size or max(1, self._budget // max(1, length))
            return max(1, min(wanted, STATE_BYTES // self._state_bytes))
        return self.whole_rows_at_once(length, keep)

    def whole_rows_at_once(self, length: int, keep: int) -> int:
        """The same for rows that are not read in pieces, so that all their logits are held at once."""
        wanted = self.batch_size or max(1, self._budget // max(1, length))
        return max(1, min(wanted, LOGIT_ELEMENTS // ((keep + 1) * self._vocabulary)))

    def tokens_at_once(self, rows: int, keep: int = 1) -> int:
        """Tokens a row of one piece of a long sequence, for a model that branches."""
        step = max(PIECE, self._budget // rows // PIECE * PIECE)
        fits = max(PIECE, LOGIT_ELEMENTS // (rows * self._vocabulary) // PIECE * PIECE)
        return min(step, fits) if keep >= fits else step

    @property
    def _budget(self) -> int:
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else BATCH_TOKENS


def load_subject(
    checkpoint: str | Path | nn.Module,
    *,
    tokenizer: Encoder | str | Path | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> Subject:
    """A subject from a checkpoint folder, a hub id or a loaded model (which then needs its tokenizer).

    The weights are computed in fp32 on a CPU and in the checkpoint's own dtype elsewhere, unless `dtype` says otherwise. A loaded
    model is taken as it is and where it is; with another `dtype` or `device` the subject is a copy of it.

    Raises:
        EvaluationError: a loaded model without a tokenizer.
        StatexError: an unknown dtype, or a device that is not there.
        CheckpointError: the checkpoint cannot be read.
    """
    wanted = parse_dtype(dtype)
    if isinstance(checkpoint, nn.Module):
        if tokenizer is None:
            raise EvaluationError("a loaded model comes without a tokenizer", where="tokenizer", fix="Pass tokenizer= as well")
        model = convert_model(checkpoint, dtype=wanted, device=None if device is None else pick_device(device))
        return Subject(model, find_tokenizer(tokenizer), batch_size=batch_size)
    place = pick_device(device)
    if wanted is None and place.type == "cpu":
        wanted = torch.float32
    # Headers and tokenizer first: what is wrong with them shows before the weights are read.
    with open_checkpoint(checkpoint) as files:
        found = find_tokenizer(files.path if tokenizer is None else tokenizer)
        model = load_model(checkpoint, dtype=wanted, device=place)
        folder = files.path.resolve() if Path(checkpoint).is_dir() else None
        identity = describe_model(model) | {
            "name": folder.name if folder else str(checkpoint),
            "path": str(folder or checkpoint),
            "sha256": files.sha256(),
        }
    return Subject(model, found, identity=identity, batch_size=batch_size)


def load_model(checkpoint: str | Path, *, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Open a checkpoint with the project's own models."""
    from ..models import load

    return load(checkpoint, dtype=dtype, device=device)


def convert_model(model: nn.Module, *, dtype: torch.dtype | None, device: torch.device | None) -> nn.Module:
    """A loaded model in this dtype and on this device; a copy unless it is so already."""
    from ..models.loading import converted

    return converted(model, dtype=dtype, device=device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout while this is open; a model that was being trained goes on training after, but for parts that were not."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


def find_tokenizer(source: Encoder | str | Path) -> Encoder:
    """The tokenizer itself, of a folder, or of a hub id."""
    return cast(Encoder, load_tokenizer(source)) if isinstance(source, str | Path) else source


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Name, parameters and, for the project's models, family, state elements per sequence, and how it was expanded and trained."""
    config = getattr(model, "config", None)
    identity: dict[str, Any] = {
        "name": Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name,
        "model_type": getattr(config, "model_type", type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    description = getattr(config, "description", None)
    if description is not None:
        identity |= {"family": description.family, "state_elements": sum(layer.state_elements for layer in description.layers)}
        made = provenance(model)
        identity["plan"] = made.get("plan")
        if made:
            runs = [{key: run.get(key) for key in ("steps", "tokens", "final_loss")} for run in made.get("finetune", [])]
            identity |= {"source": made.get("source"), "finetune": runs}
    return identity


def provenance(model: nn.Module) -> dict[str, Any]:
    """How the model's checkpoint was made; empty for a native one."""
    block = getattr(getattr(model, "config", None), "statex", None) or {}
    return block.get("provenance") or {}
