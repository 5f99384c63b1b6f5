"""What a recipe may say: one pydantic model per section, each field with its help text. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..evals.tracking_rows import PROBLEMS

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked on construction and never changed after."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextEntry(Section):
    """Documents from files or from the Hugging Face hub."""

    kind: Literal["text"] = Field(default="text", description="Documents of plain text.")
    path: str | None = Field(
        default=None,
        description="A .txt, .jsonl, .json or .parquet file (also .gz), a folder of them, or a hub id. Left out: filled by --data.",
    )
    name: str | None = Field(default=None, description="Configuration of a hub data set.")
    split: str = Field(default="train", description="Split of a hub data set.")
    field: str = Field(default="text", description="Column that holds the document.")
    weight: Positive = Field(default=1.0, description="Share of the tokens, relative to the other entries.")
    piece_bytes: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="Cut documents into pieces of about this many UTF-8 bytes and shuffle those, so that a short run sees "
        "many books. Left out: documents are read whole.",
    )
    streaming: bool = Field(default=False, description="Read a data set too large for this machine's disk as it arrives.")
    shuffle_block: Count = Field(default=1000, description="With streaming: documents are shuffled within blocks of this many.")


class MqarEntry(Section):
    """Synthetic rows of multi-query associative recall, drawn as they are needed; only the answers count in the loss."""

    kind: Literal["mqar"] = Field(description="Multi-query associative recall (arXiv 2312.04927).")
    num_pairs: Annotated[list[Count], Field(min_length=1)] = Field(
        description="Key-value pairs of a row; each row draws one of these."
    )
    weight: Positive = Field(default=1.0, description="Share of the tokens, relative to the other entries.")


class TrackingEntry(Section):
    """Synthetic words whose answer after each symbol is a state that every symbol changes; only the answers count in the loss."""

    kind: Literal["tracking"] = Field(
        description="State tracking: parity, modular arithmetic, words over groups (arXiv 2411.12537)."
    )
    problems: Annotated[list[Literal[tuple(PROBLEMS)]], Field(min_length=1)] = Field(  # type: ignore[valid-type]
        description="What the symbols do; each row draws one of these."
    )
    shortest: Count = Field(default=3, description="Symbols of a row, at least.")
    longest: Count = Field(default=40, description="Symbols of a row, at most.")
    growth: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Rows over which the longest grow, by equal factors, from `shortest` to `longest`: what counts to five soon "
        "counts to ten. 0: rows of all lengths from the start.",
    )
    weight: Positive = Field(default=1.0, description="Share of the tokens, relative to the other entries.")

    @model_validator(mode="after")
    def _some_length(self) -> TrackingEntry:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is more than longest ({self.longest})")
        for name in self.problems:
            if self.longest < PROBLEMS[name].shortest:
                raise ValueError(f"a row of {name} has at least {PROBLEMS[name].shortest} symbols, and longest is {self.longest}")
        return self


Entry = Annotated[TextEntry | MqarEntry | TrackingEntry, Field(discriminator="kind")]
Mixture = Annotated[list[Entry], Field(min_length=1)]


class Data(Section):
    """What is read, and how it is cut into rows."""

    sequence_length: Annotated[int, Field(ge=2)] = Field(description="Tokens of a row; no state lives longer.")
    mixture: Mixture = Field(description="Sources of documents with their weights.")
    tokenizer: str | None = Field(default=None, description="Folder or hub id of a tokenizer, for a checkpoint that carries none.")


class Multipliers(Section):
    """Factors on the learning rate by a parameter's role, of which 0 freezes it, and of rows inside parameters."""

    new: NonNegative = Field(
        default=1.0, description="Parameters that surgery added. They start at zero or one and have far to go."
    )
    expanded: NonNegative = Field(default=1.0, description="Parameters that surgery enlarged or drew afresh.")
    rows: Positive = Field(
        default=1.0,
        description="Rows that surgery appended to keys and queries (Mamba: B and C), on top of `expanded`, which moves the old "
        "rows of these parameters, too. Above 0, since frozen rows stay where they do nothing.",
    )
    rest: NonNegative = Field(default=1.0, description="All other parameters.")


class Optimizer(Section):
    """AdamW. Decays, mixing, lift, norms and biases are never weight-decayed."""

    learning_rate: Positive = Field(description="Highest learning rate of the schedule, before multipliers.")
    multipliers: Multipliers = Field(default=Multipliers(), description="Factors on the learning rate by role.")
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    eps: Positive = Field(default=1e-8, description="AdamW's term in the denominator.")
    weight_decay: NonNegative = Field(
        default=0.1, description="Decoupled weight decay of projections, convolutions and embeddings."
    )
    clip_norm: Positive = Field(default=1.0, description="Largest norm of the gradient of all parameters together.")


class Schedule(Section):
    """Length of the run, linear warm-up, then a cosine."""

    max_steps: Count | None = Field(default=None, description="Optimizer steps. Either this or max_tokens.")
    max_tokens: Count | None = Field(
        default=None, description="Tokens of the whole run, rounded up to a step. Either this or max_steps."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear warm-up from zero.")
    min_ratio: Fraction = Field(
        default=0.0, description="Where the cosine ends, as a fraction of learning_rate; 1 keeps the rate constant."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of max_steps and max_tokens, and set the other to null")
        return self


class SpikeGuard(Section):
    """Stops a run that diverges. A loss or gradient that is not finite stops it at once."""

    factor: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="A loss above this many times the running median is a spike."
    )
    patience: Count = Field(default=20, description="Spikes in a row that stop the run.")
    window: Count = Field(default=100, description="Losses in the running median.")


class Training(Section):
    """Size of a step, precision, and how the run is kept safe."""

    batch_size: Count = Field(default=1, description="Rows that one device holds at a time.")
    gradient_accumulation: Count | None = Field(
        default=None, description="Forward passes of a step on each device. Either this or tokens_per_step."
    )
    tokens_per_step: Count | None = Field(
        default=None,
        description="Tokens of a step over all devices; accumulation follows. Either this or gradient_accumulation.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Of the computation; weights are always trained in fp32. auto: bf16 on CUDA with sm80 or later, else fp32.",
    )
    gradient_checkpointing: Literal[True, False, "auto"] = Field(
        default="auto",
        description="Recompute activations in the backward pass. true: those of all layers, less memory, a third more time."
        " auto: of as many as the GPU's memory asks for, which the first steps find out; of none on a CPU.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Of the order of the data and of all draws.")
    save_every: Count = Field(default=500, description="Steps between resumable checkpoints, of which the last two are kept.")
    spike_guard: SpikeGuard = Field(default=SpikeGuard(), description="When to stop a diverging run.")

    @model_validator(mode="after")
    def _one_step_size(self) -> Training:
        if self.gradient_accumulation is not None and self.tokens_per_step is not None:
            raise ValueError("give one of gradient_accumulation and tokens_per_step, and set the other to null")
        return self


class Logging(Section):
    """How often the loss is told: to the console, log.csv and TensorBoard."""

    every: Count = Field(default=10, description="Steps between lines; the loss is the mean since the last.")


class Evaluation(Section):
    """Loss on held-out data during the run."""

    every: Count | None = Field(
        default=None, description="Steps between evaluations. Left out: before the first step and after the last."
    )
    tokens: Count = Field(default=65536, description="Tokens of an evaluation on each device, rounded up to a batch.")
    mixture: list[Entry] = Field(default=[], description="Held-out sources. Empty: no evaluation.")


class Recipe(Section):
    """A fine-tuning run, but for the checkpoint and the output folder."""

    description: str = Field(default="", description="What the recipe is for, in a sentence.")
    data: Data = Field(description="What is read.")
    optimizer: Optimizer = Field(description="AdamW and its learning rates.")
    schedule: Schedule = Field(description="Length and learning-rate curve.")
    training: Training = Field(default=Training(), description="Size of a step, precision, safety.")
    logging: Logging = Field(default=Logging(), description="How often the loss is told.")
    evaluation: Evaluation = Field(default=Evaluation(), description="Held-out loss.")
