"""Models whose scores are known beforehand, and tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from statex.evals.passage import PASSAGE
from statex.families import get_family
from statex.models import StatexForCausalLM

from ..fixtures import GLA_CONFIG

VOCABULARY = 259
BYTES = ByT5Tokenizer(extra_ids=0)


class Rule(nn.Module):
    """A model that follows a rule: token ids of a row `[T]` -> logits `[T, vocabulary]`."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self, input_ids: Tensor, attention_mask: None = None, logits_to_keep: int = 0, use_cache: bool = False
    ) -> SimpleNamespace:
        logits = torch.stack([self.rule(row) for row in input_ids])
        return SimpleNamespace(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)


def recalls(row: Tensor) -> Tensor:
    """Perfect recall: after a context that was seen before comes what came then; the longest context, of up to six tokens, wins."""
    ids, logits = row.tolist(), torch.zeros(len(row), VOCABULARY)
    seen: dict[tuple[int, ...], int] = {}
    for t, token in enumerate(ids):
        for size in range(1, min(6, t) + 1):
            seen[tuple(ids[t - size : t])] = token
        for size in range(1, min(6, t + 1) + 1):
            context = tuple(ids[t + 1 - size : t + 1])
            if context in seen:
                logits[t] = 0
                logits[t, seen[context]] = 10
    return logits


class Induction(nn.Module):
    """Softmax attention with fixed weights that recalls: after a context comes what came after its longest earlier copy, the latest
    of several. Perfect on what is looked up, and knows nothing else."""

    longest = 64

    def forward(
        self, input_ids: Tensor, attention_mask: None = None, logits_to_keep: int = 0, use_cache: bool = False
    ) -> SimpleNamespace:
        rows, length = input_ids.shape
        queries = torch.arange(length - (logits_to_keep or length), length)
        padded = nn.functional.pad(input_ids, (self.longest, 0), value=-1)
        keys = torch.arange(length)
        # same[t, s]: tokens t and s - 1 and those before them agree, as far back as `back`.
        same = torch.ones(rows, len(queries), length, dtype=torch.bool)
        score = torch.zeros(rows, len(queries), length)
        for back in range(self.longest):
            asked = padded[:, queries + self.longest - back]
            stored = padded[:, (keys - 1 - back + self.longest).clamp_min(0)]
            same = same & (asked[:, :, None] == stored[:, None, :]) & (stored[:, None, :] >= 0)
            if not same.any():
                break
            score += same
        score = 1e6 * (score.double() + 1e-5 * keys).masked_fill(keys > queries[:, None], -torch.inf)
        logits = 40 * score.softmax(-1).float() @ nn.functional.one_hot(input_ids, VOCABULARY).float()
        return SimpleNamespace(logits=logits)


def tells(answer: Callable[[str], str]) -> Callable[[Tensor], Tensor]:
    """A rule for byte models: after a text comes what `answer(text)` says, which is told what has been generated so far as well."""

    def rule(row: Tensor) -> Tensor:
        logits = torch.zeros(len(row), VOCABULARY)
        # Rows are padded on their right with id 0; only their last position is asked for.
        last = int((row != 0).nonzero().max())
        new = answer(BYTES.decode(row[: last + 1]))
        logits[last, BYTES.encode(new, add_special_tokens=False)[0] if new else 1] = 10
        return logits

    return rule


def nearest_neighbour(row: Tensor) -> Tensor:
    """After `37 ->` comes the digit of the nearest number before, as in lines like `35 -> 4`."""
    text, logits = BYTES.decode(row), torch.zeros(len(row), VOCABULARY)
    shown = [(int(x), y) for x, y in re.findall(r"(\d\d) -> (\d)\n", text)]
    asked = int(text.rpartition(" ->")[0][-2:])
    place = text.rindex(" ->") + 3
    logits[place - 1, BYTES.encode(" ", add_special_tokens=False)[0]] = 10
    if shown:
        digit = min(shown, key=lambda pair: abs(pair[0] - asked))[1]
        logits[place, BYTES.encode(digit, add_special_tokens=False)[0]] = 10
    return logits


def knows(texts: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """A rule for byte models that has learnt texts by heart."""
    learnt = [torch.tensor(BYTES.encode(text, add_special_tokens=False)) for text in texts]

    def rule(row: Tensor) -> Tensor:
        logits = torch.zeros(len(row), VOCABULARY)
        for ids in learnt:
            both = min(len(ids), len(row))
            agree = int((ids[:both] == row[:both]).long().cumprod(0).sum())
            reached = min(agree, len(ids) - 1)
            logits[torch.arange(reached), ids[1 : reached + 1]] = 20
        return logits

    return rule


def knows_nothing(row: Tensor) -> Tensor:
    """Every token is as likely as any other."""
    return torch.zeros(len(row), VOCABULARY)


def knows_the_future(row: Tensor) -> Tensor:
    """The next token has all the probability."""
    return 1e4 * nn.functional.one_hot(row.roll(-1), VOCABULARY).float()


def random_model(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A small transformer with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, **sizes)).eval()


def random_recurrent_model(seed: int = 0) -> StatexForCausalLM:
    """A small GLA with random weights, whose states branch."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32, "vocab_size": VOCABULARY}
    return StatexForCausalLM.from_description(get_family("gla").describe(GLA_CONFIG | sizes, {}), seed).eval()


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens that puts `<s>` before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([PASSAGE], trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
