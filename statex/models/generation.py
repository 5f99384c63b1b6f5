"""Continue a text on a terminal, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ..errors import StatexError
from .loading import load
from .named import load_tokenizer, parse_dtype, pick_device


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
        StatexError: the prompt is empty, or a device, dtype or checkpoint cannot be used.
    """
    place, encoder = pick_device(device), load_tokenizer(tokenizer or checkpoint)
    # The prompt goes on, so no end-of-text token is put behind it.
    inputs = encoder(prompt, add_special_tokens=False, return_tensors="pt")
    if inputs.input_ids.numel() == 0:
        raise StatexError("the prompt is empty", where="--prompt", fix="Give some text to continue")
    model = load(checkpoint, dtype=parse_dtype(dtype) or (torch.float32 if place.type == "cpu" else None), device=place)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    ids = model.generate(  # type: ignore[misc]
        inputs.input_ids.to(place),
        attention_mask=torch.ones_like(inputs.input_ids, device=place),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        streamer=TextStreamer(encoder, skip_special_tokens=True) if num_beams == 1 else None,
        **sampling,
    )
    text = str(encoder.decode(ids[0], skip_special_tokens=True))
    if num_beams > 1:
        print(text)
    return text
