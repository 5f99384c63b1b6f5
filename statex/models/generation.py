"""Continue a text on a terminal, token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from ..errors import StatexError
from .loading import load
from .named import load_tokenizer, parse_dtype, pick_device, tokenless_ids


def stream_text(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> str:
    """Print the prompt and its continuation as it comes (a beam search: when it is complete), and return both.

    Args:
        temperature: 0 takes the most likely token; above, tokens are drawn.
    Raises:
        StatexError: the prompt is empty or no text, a number is out of range, or a device, dtype, tokenizer or checkpoint cannot
            be used.
    """
    _check(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams, seed=seed)
    place, encoder = pick_device(device), load_tokenizer(tokenizer or checkpoint)
    # The prompt goes on, so no end-of-text token is put behind it.
    inputs = encoder(prompt, add_special_tokens=False, return_tensors="pt")
    if inputs.input_ids.numel() == 0:
        raise StatexError("the prompt is empty", where="--prompt", fix="Give some text to continue")
    model = load(checkpoint, dtype=parse_dtype(dtype) or (torch.float32 if place.type == "cpu" else None), device=place)
    vocabulary = model.config.vocab_size or len(encoder)
    if int(inputs.input_ids.max()) >= vocabulary:
        what = f"the tokenizer gives token id {int(inputs.input_ids.max())}, the model knows {vocabulary}"
        raise StatexError(what, where=str(tokenizer or checkpoint), fix="Give the model's own --tokenizer")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    try:
        ids = model.generate(
            inputs.input_ids.to(place),
            attention_mask=torch.ones_like(inputs.input_ids, device=place),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            suppress_tokens=tokenless_ids(encoder, vocabulary) or None,
            logits_processor=LogitsProcessorList([_RefuseNaN(str(checkpoint))]),
            streamer=TextStreamer(encoder, skip_special_tokens=True) if num_beams == 1 else None,
            **sampling,
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise _no_number(str(checkpoint)) from error
    text = str(encoder.decode(ids[0], skip_special_tokens=True))
    if num_beams > 1:
        print(text)
    return text


class _RefuseNaN(LogitsProcessor):
    """Ends a generation where greedy search would go on with token 0 for ever."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[B, vocabulary]` as they are. Raises `StatexError` where the largest is no number."""
        if not bool(scores.amax(-1).isfinite().all()):
            raise _no_number(self.checkpoint)
        return scores


def _no_number(checkpoint: str) -> StatexError:
    fix = "Try --dtype float32 and a higher --temperature, or check the weights"
    return StatexError("the model gives NaN logits", where=checkpoint, fix=fix)


def _check(prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, num_beams: int, seed: int) -> None:
    """Raise `StatexError` for options that mean nothing, before anything is loaded."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise StatexError("the prompt is not UTF-8 text", where="--prompt", fix="Convert it to UTF-8") from error
    for option, good, wanted in (
        ("--max-new-tokens", max_new_tokens >= 1, "a whole number from 1"),
        ("--temperature", 0 <= temperature < math.inf, "0 for greedy, or a number above 0"),
        ("--top-p", 0 < top_p <= 1, "a number above 0 and up to 1"),
        ("--num-beams", num_beams >= 1, "a whole number from 1"),
        ("--seed", 0 <= seed < 2**63, "a whole number from 0"),
    ):
        if not good:
            raise StatexError("the value is out of range", where=option, fix=f"Give {wanted}")
