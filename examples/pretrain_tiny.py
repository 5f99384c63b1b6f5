"""Train the small byte-level checkpoints under `examples/checkpoints/` from scratch, with the project's own models, on one GPU.

    python examples/pretrain_tiny.py --preset gla --data books_train.jsonl.gz --test books_test.jsonl.gz --out runs/gla

The mixture, drawn afresh at every step:

- windows of public-domain books (field `text` of a JSONL file), every byte predicted;
- the same windows with needles: a sentence that states a number somewhere in the window, the question and the answer at its end;
- MQAR rows (`statex.evals.mqar_rows`): n key-value pairs, then all of them again in another order, where the values are predicted.
  They come in batches of their own or, with `joined`, in one batch with the text, each filled up with text to a whole window;
- with `--key-value-tokens N` besides as many tokens of key-value text (`key_value_rows`), in a batch of their own.

`--state 4` is the control that shows what limits recall: the same training with a key dimension four times as large. `--lift 4` is
the same with lifted keys, at equal parameters.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ByT5Tokenizer

from statex.checkpoints import export_native
from statex.evals.mqar_rows import IGNORE, token_pools
from statex.families import get_family
from statex.families.description import ModelDescription
from statex.models import StatexForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from key_value_rows import BYTE_OFFSET, KeyValueRows

PAIRS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DIALECT = {"gla": "fla", "mamba2": "transformers"}
GROWTH = 0.3  # share of the steps after which rows have all numbers of pairs
INTERIM_BYTES = 400_000  # of the held-out text, before the last evaluation
VOCAB = 264  # 259 ids, padded to a multiple of 8
WORDS = [
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jasper", "karst", "laurel", "maple",
    "nadir", "ochre", "poppy", "quartz", "raven", "sable", "topaz", "umber", "velvet", "willow", "yarrow", "zephyr",
]  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Shape and training length of one checkpoint."""

    family: str
    hidden_size: int
    num_layers: int
    heads: int
    key_dim: int
    steps: int
    expand_v: float = 1.0
    intermediate_size: int | None = None
    learning_rate: float = 3e-3
    window: int = 512
    text_rows: int = 64
    mqar_tokens: int = 16_384
    max_pairs: int = 128
    joined: bool = False
    key_value_tokens: int = 0
    max_entries: int = 32
    digits: int = 4


PRESETS = {
    "gla": Preset("gla", hidden_size=256, num_layers=4, heads=2, key_dim=8, steps=4000, expand_v=0.5, intermediate_size=1536),
    "mamba2": Preset("mamba2", hidden_size=384, num_layers=5, heads=12, key_dim=16, steps=4500, text_rows=48, joined=True),
    "gla-30m": Preset("gla", 512, 6, heads=4, key_dim=8, steps=2600, expand_v=0.25, intermediate_size=3072, learning_rate=2e-3),
    "gla-quickstart": Preset("gla", hidden_size=128, num_layers=4, heads=2, key_dim=8, steps=4000),
}


def describe(preset: Preset, state: int, lift: int) -> ModelDescription:
    """The model of a preset; `state` multiplies the key dimension, `lift` lifts it without parameters."""
    hidden, key_dim = preset.hidden_size, preset.key_dim * state
    config = {
        "hidden_size": hidden,
        "vocab_size": VOCAB,
        "num_hidden_layers": preset.num_layers,
        "num_heads": preset.heads,
        "tie_word_embeddings": True,
    }
    if preset.family == "gla":
        config |= {"expand_k": preset.heads * key_dim / hidden, "expand_v": preset.expand_v, "use_short_conv": True}
        config |= {"intermediate_size": preset.intermediate_size} if preset.intermediate_size else {}
    else:
        config |= {"expand": 2, "head_dim": 2 * hidden // preset.heads, "state_size": key_dim, "n_groups": 1}
    description = get_family(preset.family).describe(config, {})
    return replace(description, layers=tuple(layer.replace(lift=lift) for layer in description.layers))


class Mixture:
    """Draws training batches on the device; everything is keyed by one generator."""

    def __init__(self, preset: Preset, books: Path, device: torch.device, seed: int) -> None:
        self.preset, self.device = preset, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.books = torch.from_numpy(read_bytes(books)).to(device)
        self.needles = torch.from_numpy(needle_rows(self.books.cpu().numpy(), preset.window, 20_000, seed)).to(device)
        pools = token_pools(ByT5Tokenizer(extra_ids=0))
        self.keys, self.values = (torch.from_numpy(pool).to(device) for pool in (pools.keys, pools.values))
        self.key_value_rows = KeyValueRows(preset.max_entries, device, preset.digits)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def windows(self, rows: int, width: int) -> Tensor:
        """Pieces of the books as token ids, `[rows, width]`."""
        starts = self.randint(len(self.books) - width, rows)
        return self.books[starts[:, None] + torch.arange(width, device=self.device)].long() + BYTE_OFFSET

    def mqar(self, num_pairs: int, rows: int) -> tuple[Tensor, Tensor]:
        """Like `mqar_rows.draw_row`, drawn in one go: ids and labels, both `[rows, 4 * num_pairs]`."""
        shuffled = torch.rand(rows, len(self.keys), device=self.device, generator=self.generator).argsort(1)[:, :num_pairs]
        pairs = torch.stack([self.keys[shuffled], self.values[self.randint(len(self.values), rows, num_pairs)]], dim=-1)
        order = torch.rand(rows, num_pairs, device=self.device, generator=self.generator).argsort(1)
        queries = pairs.gather(1, order[..., None].expand(-1, -1, 2))
        ids = torch.cat([pairs, queries], dim=1).flatten(1)
        labels = torch.full_like(ids, IGNORE)
        labels[:, 2 * num_pairs + 1 :: 2] = ids[:, 2 * num_pairs + 1 :: 2]
        return ids, labels

    def key_value(self, entries: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of `key_value_tokens` tokens of key-value text."""
        source = self.key_value_rows
        return source.draw(entries, max(1, self.preset.key_value_tokens // source.width(entries)), self.generator)

    def text(self) -> Tensor:
        """`[rows, window]` token ids, one row in eight with a needle."""
        rows = self.preset.text_rows
        needles = self.needles[self.randint(len(self.needles), rows // 8)].long() + BYTE_OFFSET
        return torch.cat([self.windows(rows - len(needles), self.preset.window), needles])

    def apart(self, num_pairs: int) -> list[tuple[Tensor, Tensor]]:
        """Text, and MQAR rows in a batch of their own."""
        text = self.text()
        return [(text, text), self.mqar(num_pairs, self.preset.mqar_tokens // (4 * num_pairs))]

    def joined(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """`[2 * text_rows, window]` ids and labels: text, and as many MQAR rows, each followed by text."""
        text, (rows, answers) = self.text(), self.mqar(num_pairs, self.preset.text_rows)
        filling = self.windows(len(rows), self.preset.window - rows.shape[1])
        ids = torch.cat([text, torch.cat([rows, filling], dim=1)])
        return ids, torch.cat([text, torch.cat([answers, filling], dim=1)])


def read_bytes(path: Path) -> np.ndarray:
    """All texts of a gzipped JSONL file as bytes `[n]`, books separated by two line feeds."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return np.frombuffer(bytearray("\n\n".join(json.loads(line)["text"] for line in lines).encode()), dtype=np.uint8)


def needle_rows(books: np.ndarray, width: int, rows: int, seed: int) -> np.ndarray:
    """Windows of text `[rows, width]` that state one to three numbers and end with a question for one of them and its answer."""
    rng = np.random.default_rng([seed, 1])
    made = np.empty((rows, width), dtype=np.uint8)
    for row in made:
        names = rng.choice(WORDS, size=rng.integers(1, 4), replace=False)
        numbers = [f"{rng.integers(10_000, 100_000)}" for _ in names]
        statements = [
            f" The special magic number for {name} is {number}. ".encode() for name, number in zip(names, numbers, strict=True)
        ]
        asked = rng.integers(len(names))
        question = f"\nThe special magic number for {names[asked]} is {numbers[asked]}.\n".encode()
        space = width - len(question) - sum(map(len, statements))
        start = rng.integers(len(books) - space)
        cuts = np.sort(rng.integers(0, space + 1, len(statements)))
        parts = np.split(books[start : start + space], cuts)
        text = b"".join(part.tobytes() + statement for part, statement in zip(parts, [*statements, b""], strict=True))
        row[:] = np.frombuffer(text + question, dtype=np.uint8)
    return made


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # many shapes, each seen once
def evaluate(model: StatexForCausalLM, mixture: Mixture, test: Tensor, rows: int = 256) -> dict[str, object]:
    """Bits per byte of held-out books (non-overlapping windows), MQAR accuracy by number of pairs, and key values likewise."""
    model.eval()
    width = mixture.preset.window
    windows = test[: len(test) // width * width].view(-1, width)
    nats = [
        F.cross_entropy(logits(model, part)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum")
        for part in windows.split(128)
    ]
    bits = torch.stack(nats).sum().item() / math.log(2) / (windows.numel() - len(windows))
    recall = {}
    for pairs in PAIRS:
        if pairs <= mixture.preset.max_pairs:
            ids, labels = mixture.mqar(pairs, rows)
            hits = (logits(model, ids)[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != IGNORE]
            recall[pairs] = round(hits.float().mean().item(), 4)
    told: dict[str, object] = {"bits_per_byte": round(bits, 4), "mqar": recall}
    if mixture.preset.key_value_tokens:
        source, found = mixture.key_value_rows, dict[int, list[float]]()
        for entries in source.counts:
            hits = source.score(partial(logits, model), *source.draw(entries, rows, mixture.generator))
            shares = hits.all(2), hits[..., : source.digits]
            found[entries] = [round(share.double().mean().item(), 4) for share in shares]
        told["key_value"] = found
    model.train()
    return told


def logits(model: StatexForCausalLM, ids: Tensor) -> Tensor:
    # The autocast cache would keep copies of weights that a replayed graph must read afresh.
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        return model(ids, use_cache=False).logits


class Backward:
    """Forward and backward of one batch, `(ids, labels) -> loss` in nats; gradients add up in `.grad`.

    A model of a few million parameters is bound by kernel launches and elementwise passes. On a GPU the text batches, all of one
    shape, are compiled, and the work on every shape is captured once as a CUDA graph and then replayed. The graphs share their
    memory, so that several runs fit on one card; nothing but the gradients and a copy of the loss outlives a replay.
    """

    def __init__(self, model: StatexForCausalLM, compiled_shape: tuple[int, int]) -> None:
        self.model, self.compiled_shape = model, compiled_shape
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        if not ids.is_cuda:
            return self._run(ids, labels)
        if ids.shape not in self.graphs:
            with torch.compiler.set_stance("default" if ids.shape == self.compiled_shape else "force_eager"):
                self._capture(ids.clone(), labels.clone())
        graph, static_ids, static_labels, loss = self.graphs[ids.shape]
        static_ids.copy_(ids)
        static_labels.copy_(labels)
        graph.replay()
        return loss.clone()

    def _run(self, ids: Tensor, labels: Tensor) -> Tensor:
        predicted = logits(self.model, ids)[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        return loss.detach()

    def _capture(self, ids: Tensor, labels: Tensor) -> None:
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(ids, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self._run(ids, labels)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)
        self.graphs[ids.shape] = graph, ids, labels, loss


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to zero."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def reach(counts: list[int], step: int, steps: int) -> list[int]:
    """Numbers of pairs or entries that a row may have. Few early: the recall circuit forms on short rows and is then stretched."""
    return counts[: max(3, math.ceil(len(counts) * min(1.0, step / (GROWTH * steps))))]


def make_optimizer(model: StatexForCausalLM, rate: float) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on gates, convolutions, decays, norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 16]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def train(args: argparse.Namespace, preset: Preset) -> None:
    """Train, log a line of JSON and `curve.json`, and write the checkpoint; Ctrl-C writes what there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    description = describe(preset, args.state, args.lift)
    model = StatexForCausalLM.from_description(description, seed=args.seed).to(device).train()
    model.set_backend(args.backend)
    if device.type == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    parameters, state = sum(p.numel() for p in model.parameters()), description.layers[0].state_elements
    print(
        f"{args.preset} state ×{args.state} lift ×{args.lift}: {parameters:,} parameters, {state:,} state elements a layer",
        flush=True,
    )
    mixture = Mixture(preset, args.data, device, args.seed)
    test = torch.from_numpy(read_bytes(args.test)).to(device).long() + BYTE_OFFSET
    optimizer = make_optimizer(model, preset.learning_rate)
    compiled_rows = preset.text_rows * (2 if preset.joined else 1)
    backward, draws = Backward(model, (compiled_rows, preset.window)), np.random.default_rng([args.seed, 2])
    counts = [n for n in PAIRS if n <= preset.max_pairs]
    args.out.mkdir(parents=True, exist_ok=True)
    machine = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}"
    began, tokens, curve = time.monotonic(), 0, []
    try:
        for step in range(preset.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, preset.steps, preset.learning_rate)
            num_pairs = int(draws.choice(reach(counts, step, preset.steps)))
            batches = [mixture.joined(num_pairs)] if preset.joined else mixture.apart(num_pairs)
            if preset.key_value_tokens:
                batches.append(mixture.key_value(int(draws.choice(reach(mixture.key_value_rows.counts, step, preset.steps)))))
            losses = [backward(*batch) for batch in batches]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # graphs write into these very tensors
            tokens += sum(ids.numel() for ids, _ in batches)
            last = step == preset.steps - 1
            if step % args.log_every == 0 or last:
                record = {"step": step, "tokens": tokens, "seconds": round(time.monotonic() - began, 1), "device": machine}
                record |= {"num_pairs": num_pairs, "losses": [round(loss.item(), 4) for loss in losses]}
                if last or (step and step % args.eval_every == 0):
                    record |= evaluate(model, mixture, test if last else test[:INTERIM_BYTES])
                curve.append(record)
                print(json.dumps({"run": args.out.name, **record}), flush=True)
                (args.out / "curve.json").write_text(json.dumps(curve))
    except KeyboardInterrupt:
        print("stopped early; writing what there is", flush=True)
    save(model.cpu(), args.out / "checkpoint")


def save(model: StatexForCausalLM, out: Path) -> None:
    """A stock checkpoint of the family in bf16 (A_log, dt_bias and D stay fp32), with its byte tokenizer."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.statex["dialect"] = DIALECT[model.config.description.family]
    with TemporaryDirectory() as canonical:
        model.save_pretrained(canonical)
        tokenizer.save_pretrained(canonical)
        export_native(canonical, out, force=True)


def existing(text: str) -> Path:
    """A file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--data", type=existing, required=True, help="books to train on, JSONL.gz with a field `text`")
    parser.add_argument("--test", type=existing, required=True, help="held-out books, likewise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=int, default=1, help="multiply the key dimension")
    parser.add_argument(
        "--backend", default="chunked", help="kernels: the chunked ones compile into the few launches that small models need"
    )
    parser.add_argument("--lift", type=int, default=1, help="lift keys and queries")
    parser.add_argument("--key-value-tokens", type=int, help="of key-value text that a step reads besides; none by default")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=1000)
    for field in (
        "hidden_size", "num_layers", "heads", "key_dim", "text_rows", "mqar_tokens", "max_pairs", "window", "intermediate_size",
        "max_entries", "digits",
    ):  # fmt: skip
        parser.add_argument(f"--{field.replace('_', '-')}", type=int)
    for field in ("expand_v", "learning_rate"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=float)
    args = parser.parse_args()
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "key_value_tokens") else 1
        if isinstance(value, int) and value < least:
            parser.error(f"--{name.replace('_', '-')} is at least {least}, not {value}")
    # Asked before hours of training, not when their result is to be written.
    if (kept := args.out / "checkpoint").exists() and not (kept / "config.json").is_file():
        parser.error(f"{kept} exists and is no checkpoint, so it would not be replaced; choose another --out")
    preset = PRESETS[args.preset]
    changed = {name: value for name in Preset.__dataclass_fields__ if (value := getattr(args, name, None)) is not None}
    train(args, replace(preset, **changed))


if __name__ == "__main__":
    main()
