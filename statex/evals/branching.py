"""Read what rows have in common once: the common tokens go through the model, and each row goes on from a copy of the state.

A recurrent state is small and can be copied, so a haystack with many questions costs one pass and the questions. Long rows are read
in pieces, so that memory does not grow with their length. Models without such states read every row as a whole; the scores are the
same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .stems import NODE_TOKENS, Advance, RowScore, Stem

if TYPE_CHECKING:
    from ..models.cache import StatexCache
    from .subject import Subject


def score_stems(subject: Subject, stems: Sequence[Stem], advance: Advance) -> list[list[RowScore]]:
    """Scores of all rows, in the order of stems and of rows within each; `advance` hears of finished rows.

    Raises:
        EvaluationError: see `Subject.score`.
    """
    found: dict[tuple[int, int], RowScore] = {}
    shared = [i for i, stem in enumerate(stems) if subject.branches and stem.is_worth_branching]
    loose = [(i, j) for i in sorted(set(range(len(stems))) - set(shared)) for j in range(len(stems[i].rows))]
    loose.sort(key=lambda place: stems[place[0]].rows[place[1]].at + len(stems[place[0]].rows[place[1]].tail))
    wholes = [(stems[i].whole(stems[i].rows[j]), stems[i].rows[j].keep) for i, j in loose]
    for batch in _batches(subject, wholes):
        scores = score_tails(subject, None, [wholes[k] for k in batch])
        found |= {loose[k]: score for k, score in zip(batch, scores, strict=True)}
        advance(len(batch))
    for group in _groups(subject, stems, shared):
        found |= _score_group(subject, stems, group, advance)
    return [[found[i, j] for j in range(len(stem.rows))] for i, stem in enumerate(stems)]


def _groups(subject: Subject, stems: Sequence[Stem], chosen: Sequence[int]) -> Iterator[list[int]]:
    """Stems of similar length and equally many nodes, as many as a forward pass takes."""
    group: list[int] = []

    def shape(i: int) -> tuple[int, bool]:
        # An empty cache can only be filled by all its rows at once, so stems with a node at 0 go by themselves.
        return len(stems[i].nodes), stems[i].nodes[0] == 0

    for i in sorted(chosen, key=lambda i: (shape(i), stems[i].nodes[-1])):
        if group and (shape(i) != shape(group[0]) or len(group) >= subject.rows_at_once(stems[i].nodes[-1], 1)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _score_group(subject: Subject, stems: Sequence[Stem], group: list[int], advance: Advance) -> dict[tuple[int, int], RowScore]:
    found: dict[tuple[int, int], RowScore] = {}
    members, cache, reached = [stems[i] for i in group], subject.new_cache(), [0] * len(group)
    for nodes in zip(*(stem.nodes for stem in members), strict=True):
        reached = _approach(subject, cache, members, reached, nodes)
        leaves = [
            (k, j, np.concatenate([stem.ids[at:node], row.tail]))
            for k, (stem, at, node) in enumerate(zip(members, reached, nodes, strict=True))
            for j, row in enumerate(stem.rows)
            if row.at == node
        ]
        leaves.sort(key=lambda leaf: len(leaf[2]))
        tails = [(tail, members[k].rows[j].keep) for k, j, tail in leaves]
        for batch in _batches(subject, tails):
            branch = cache.branch(torch.tensor([leaves[b][0] for b in batch]))
            scores = score_tails(subject, branch, [tails[b] for b in batch])
            found |= {(group[leaves[b][0]], leaves[b][1]): score for b, score in zip(batch, scores, strict=True)}
            advance(len(batch))
    return found


def _approach(
    subject: Subject, cache: StatexCache, members: Sequence[Stem], reached: Sequence[int], nodes: Sequence[int]
) -> list[int]:
    """Let all stems read on towards their next nodes, and say how far they came.

    Nodes of similar stems lie close together, so all read what the nearest node takes, in one pass. The few tokens that some lack
    are left to the rows that leave there, unless that is much.
    """
    common = min(node - at for at, node in zip(reached, nodes, strict=True))
    read_ragged(subject, cache, [stem.ids[at : at + common] for stem, at in zip(members, reached, strict=True)])
    came = [at + common for at in reached]
    left = [sum(row.at == node for row in stem.rows) * (node - at) for stem, at, node in zip(members, came, nodes, strict=True)]
    if sum(left) <= NODE_TOKENS * len(members):
        return came
    read_ragged(subject, cache, [stem.ids[at:node] for stem, at, node in zip(members, came, nodes, strict=True)])
    return list(nodes)


def _batches(subject: Subject, tails: Sequence[tuple[np.ndarray, int]]) -> Iterator[list[int]]:
    """Indices of neighbours (rows come sorted by length) that fit into a forward pass, padded to their longest."""
    batch: list[int] = []
    longest = kept = 0
    for index, (tail, keep) in enumerate(tails):
        longest, kept = max(longest, len(tail)), max(kept, keep)
        if batch and len(batch) >= subject.rows_at_once(longest, kept + longest - len(tails[batch[0]][0])):
            yield batch
            batch, longest, kept = [], len(tail), keep
        batch.append(index)
    if batch:
        yield batch


def read_ragged(subject: Subject, cache: StatexCache, tokens: Sequence[np.ndarray]) -> None:
    """Let sequence i of the cache read tokens `[T_i]`. No padding: all read what the shortest has, then the others go on.

    In an empty cache all rows must have tokens, or none.
    """
    sizes, done = np.array([len(row) for row in tokens]), 0
    while (sizes > done).any():
        active = np.flatnonzero(sizes > done)
        stop = int(sizes[active].min())
        rows = subject.tensor(np.stack([tokens[i][done:stop] for i in active]))
        indices = torch.from_numpy(active)
        part = cache if len(active) == len(tokens) else cache.branch(indices)
        step = subject.tokens_at_once(len(active))
        for start in range(0, stop - done, step):
            subject.forward(rows[:, start : start + step], 1, part)
        if part is not cache:
            cache.put_back(part, indices)
        done = stop


def score_tails(subject: Subject, cache: StatexCache | None, tails: Sequence[tuple[np.ndarray, int]]) -> list[RowScore]:
    """Score rows `([T], keep)` that go on from a cache (which is used up) or from nothing.

    Rows are padded on their right, which changes nothing before it in a causal model.

    Raises:
        EvaluationError: see `Subject.score`.
    """
    sizes, keeps = np.array([len(tail) for tail, _ in tails]), np.array([keep for _, keep in tails])
    longest = int(sizes.max())
    padded = np.zeros((len(tails), longest), dtype=np.int64)
    for row, (tail, _) in zip(padded, tails, strict=True):
        row[: len(tail)] = tail
    ids = subject.tensor(padded)
    correct = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    nats = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    # The last token predicts nothing. Position p predicts token p + 1; row i is asked for its positions from firsts[i] to lasts[i].
    firsts, lasts = sizes - keeps - 1, sizes - 1
    step = subject.tokens_at_once(len(tails), int(keeps.max())) if subject.branches else longest
    if cache is None and longest - 1 > step:
        cache = subject.new_cache()
    for start in range(0, longest - 1, step):
        stop = min(start + step, longest) if subject.branches else longest
        begins, ends = np.maximum(firsts, start), np.minimum(lasts, stop)
        asked = np.flatnonzero(begins < ends)
        first = int(begins[asked].min()) if len(asked) else stop - 1
        logits = subject.forward(ids[:, start:stop], stop - first, cache)
        for i in asked:
            begin, end = int(begins[i]), int(ends[i])
            predictions, targets = logits[i, begin - first : end - first].float(), ids[i, begin + 1 : end + 1]
            correct[i, begin + 1 : end + 1] = predictions.argmax(-1) == targets
            surprise = predictions.logsumexp(-1) - predictions.gather(-1, targets[:, None])[:, 0]
            nats[i, begin + 1 : end + 1] = surprise.double()
    subject.check_finite(nats)
    hits, losses = correct.cpu().numpy(), nats.cpu().numpy()
    return [
        RowScore(hits[i, size - keep : size], losses[i, size - keep : size])
        for i, (size, keep) in enumerate(zip(sizes.tolist(), keeps.tolist(), strict=True))
    ]
