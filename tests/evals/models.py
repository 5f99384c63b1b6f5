"""Models whose scores are known beforehand, and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from statex.evals.passage import PASSAGE

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
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **sizes)).eval()


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens that puts `<s>` before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([PASSAGE], trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
