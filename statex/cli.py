"""The commands of `statex`: parse, call, print. No logic, and nothing heavy imported before a command runs."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import statex
from statex.errors import StatexError
from statex.terminal import Interrupted, fail, interrupt, key_values, message, numbers, say, show

app = typer.Typer(
    name="statex",
    help="Give a pretrained recurrent language model a bigger memory: expand its state, recover it, measure recall, export.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="List, show, copy and validate fine-tuning recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Source = Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint folder or a hub id.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: cuda where there is one.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer folder or hub id, for a checkpoint that carries none.")]
Data = Annotated[str | None, typer.Option("--data", help="Real text: .txt, .jsonl (field `text`), .gz of both, or .parquet.")]


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"statex {statex.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere in a command.")] = False,
) -> None:
    pass


@app.command()
def inspect(checkpoint: Source, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Say what a checkpoint is, how large its state is, and which operators it can take. Reads headers only."""
    inspection = statex.inspect(checkpoint)
    show(inspection.to_dict() if as_json else inspection.table())


@app.command()
def expand(
    checkpoint: Source,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; not needed with --dry-run.")] = None,
    operator: Annotated[str | None, typer.Option(help="One that `statex inspect` lists; default: the paper's.")] = None,
    factor: Annotated[int | None, typer.Option(help="How many times larger the state of a layer becomes.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="all, every:6, a list such as 0,6,12, or auto (measured as by `statex diagnose`); default: the paper's."),
    ] = None,
    init: Annotated[str | None, typer.Option(help="preserve (same function), inherit or reinit.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw; default: 0, or the plan's.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Operator option, such as mixing=scalar.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A YAML plan with per-layer entries, instead of the options above.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table and write nothing.")] = False,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Rewrite the heads of a checkpoint so that its state grows."""
    if out is None and not dry_run:
        raise StatexError("an output folder is missing", fix="Give one with -o OUT, or use --dry-run")

    def auto(able: list[int]) -> list[int]:
        return statex.auto_layers(checkpoint, among=able, operator=operator, factor=factor)

    summary = statex.expand(
        checkpoint,
        out,
        operator=operator,
        factor=factor,
        layers=auto if layers == "auto" and plan is None else layers,
        init=init,
        seed=seed,
        options=key_values(option),
        plan_file=plan,
        dry_run=dry_run,
        force=force,
    )
    show(summary.to_dict() if as_json else summary.table())
    if not dry_run and not as_json:
        say(f"Wrote {out}. Next: statex verify {checkpoint} {out}")


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="The checkpoint before surgery.")],
    expanded: Annotated[str, typer.Argument(help="The checkpoint after it.")],
    data: Data = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of text to run.")] = 2048,
    tokenizer: Tokenizer = None,
    dtype: Annotated[str, typer.Option(help="Precision to compare in.")] = "float32",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Run two checkpoints over real text and compare their logits. Exit code 1 when a `preserve` expansion changed the function."""
    report = statex.verify(base, expanded, data=data, max_tokens=max_tokens, tokenizer=tokenizer, dtype=dtype, device=device)
    show(report.to_dict() if as_json else report.table())
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def finetune(
    checkpoint: Source,
    out: Out,
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe (statex recipes ls) or a YAML file; default: recovery.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Text to train on: file or hub id; may be repeated.")] = None,
    held_out: Annotated[str | None, typer.Option("--held-out", help="Text to measure the loss on, before and after.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out, exactly.")] = False,
    force: Force = False,
) -> None:
    """Recover and improve a checkpoint with a short run."""
    result = statex.finetune(
        checkpoint, recipe, data, out, held_out=held_out, overrides=overrides, resume=resume, force=force, device=device
    )
    say(f"Wrote {result.out}: {result.steps} steps, final loss {result.final_loss:.4f}. Next: statex eval {result.out}")


@app.command("eval")
def evaluate(
    checkpoint: Source,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated; default: mqar, passkey, niah, perplexity.")] = None,
    suite: Annotated[str | None, typer.Option(help="Comma-separated: recall, reading, icl, quality, tracking.")] = None,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, or task files (.yaml).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON and plots.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths in tokens, such as 512,1024.")] = None,
    depths: Annotated[str | None, typer.Option(help="Needle depths between 0 and 1, such as 0,0.5,1.")] = None,
    num_pairs: Annotated[str | None, typer.Option(help="Key-value pairs of MQAR, items of a list, such as 4,16,64.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples a cell; default: 50, and all for --lm-eval.")] = None,
    shots: Annotated[str | None, typer.Option(help="Examples in a prompt, such as 0,2,8.")] = None,
    needles: Annotated[int | None, typer.Option(help="Needles in a text with several; default: 4.")] = None,
    data: Data = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Folder of question sets: SQuAD, NQ, Factbook ...")] = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Seed of every sample.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Rows a batch; default: by length.")] = None,
    device: Device = None,
    dtype: DType = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run into --out stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Measure recall and language modelling; print a table, write JSON and pictures."""
    result = statex.evaluate(
        checkpoint,
        None if tasks is None else tasks.split(","),
        suites=None if suite is None else suite.split(","),
        lm_eval=None if lm_eval is None else lm_eval.split(","),
        out=out,
        lengths=numbers(lengths, int, "--lengths"),
        depths=numbers(depths, float, "--depths"),
        num_pairs=numbers(num_pairs, int, "--num-pairs"),
        samples=samples,
        shots=numbers(shots, int, "--shots"),
        needles=needles,
        data=data,
        data_dir=data_dir,
        tokenizer=tokenizer,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        resume=resume,
    )
    show(result.to_dict() if as_json else result.table())
    for name, reason in result.settings["left_out"].items() if not as_json else ():
        say(f"left out: {name}: {reason}")
    if out is not None and not as_json:
        say(f"Wrote {out}")


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Folders or JSON files that `statex eval -o` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for table and plot.")] = None,
) -> None:
    """Put several results side by side, as table and plot."""
    comparison = statex.compare(results, out=out)
    show(comparison.table())
    if out is not None:
        say(f"Wrote {out}")


@app.command()
def diagnose(
    checkpoint: Source,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON, plan, plots and report.")] = None,
    probe: Annotated[str | None, typer.Option(help="mqar or copy; default: MQAR where the model can do it, else copy.")] = None,
    window: Annotated[int, typer.Option(help="A cut layer sees this many to twice as many tokens back.")] = 16,
    samples: Annotated[int, typer.Option(help="Rows of the probe.")] = 32,
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Cut each head, too, of layers that lose recall when cut.")
    ] = True,
    states: Annotated[bool, typer.Option("--states/--no-states", help="Look at the states on real text.")] = True,
    data: Data = None,
    operator: Annotated[str | None, typer.Option(help="Of the plan for the layers that would gain; default: the paper's.")] = None,
    factor: Annotated[int | None, typer.Option(help="Of that plan.")] = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Seed of every sample.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Rows a batch; default: by length.")] = None,
    device: Device = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Find where a checkpoint keeps what it recalls, and which layers would gain from a larger state."""
    found = statex.diagnose(
        checkpoint,
        out=out,
        probe=probe,
        window=window,
        samples=samples,
        heads=heads,
        states=states,
        data=data,
        operator=operator,
        factor=factor,
        tokenizer=tokenizer,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    show(found.to_dict() if as_json else found.table())
    if out is not None and not as_json:
        plan = f". Next: statex expand {checkpoint} --plan {out / 'plan.yaml'} -o EXPANDED" if found.plan else ""
        say(f"Wrote {out}{plan}")


@app.command()
def report(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders or JSON files that `statex eval -o` or `statex diagnose -o` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.html, report.md, report.json and plots.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Checkpoint folder: write the evaluation's tables into its model card.")] = None,
) -> None:
    """Write one self-contained report of evaluations and diagnoses, or put an evaluation into a model card."""
    from statex.evals.reports import add_to_card

    if out is None and card is None:
        raise StatexError("there is nowhere to write", where="report", fix="Give -o FOLDER, --card CHECKPOINT, or both")
    if card is not None and len(sources) != 1:
        raise StatexError("a model card takes one evaluation", where="--card", fix="Give the folder of the checkpoint's evaluation")
    if out is not None:
        say(f"Wrote {statex.report(sources, out)[0]}")
    if card is not None:
        say(f"Wrote {add_to_card(sources[0], card)}")


@app.command()
def generate(
    checkpoint: Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    num_beams: Annotated[int, typer.Option(help="Beams of a beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of drawn tokens.")] = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Continue a text."""
    from statex.models.generation import stream_text

    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt
    stream_text(
        checkpoint,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_beams=num_beams,
        seed=seed,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )


@app.command()
def export(
    checkpoint: Source,
    out: Out,
    to: Annotated[str, typer.Option("--to", help="hf (remote code, any plan) or native (stock checkpoint, uniform plans).")] = "hf",
    dialect: Annotated[str | None, typer.Option(help="native: fla, transformers or mamba_ssm; default: as the source.")] = None,
    force: Force = False,
) -> None:
    """Write a checkpoint that other software loads without statex."""
    if dialect is not None and to != "native":
        raise StatexError("only a native checkpoint has a dialect", where="--dialect", fix="Add --to native, or leave it out")
    if to == "hf":
        statex.export_hf(checkpoint, out, force=force)
    elif to == "native":
        for warning in statex.export_native(checkpoint, out, dialect=dialect, force=force):
            say(f"note: {warning}")
    else:
        raise StatexError(f"there is no export format {to!r}", fix="Use --to hf or --to native")
    say(f"Wrote {out}")


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    force: Force = False,
) -> None:
    """The whole path on an embedded checkpoint, on a CPU, in minutes: inspect, expand, verify, finetune, eval, export."""
    from statex.quickstart import run

    run(out, force=force)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes that ship with statex."""
    from statex.recipes import list_recipes

    for recipe in list_recipes():
        say(f"{recipe.name:<16} {recipe.description}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe."""
    from statex.recipes import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument()], destination: Annotated[Path, typer.Argument()], force: Force = False
) -> None:
    """Copy a recipe to edit it."""
    from statex.recipes import copy_recipe

    say(f"Wrote {copy_recipe(name, destination, force=force)}")


@recipes_app.command("validate")
def recipes_validate(recipe: Annotated[str, typer.Argument(help="A recipe file or name.")]) -> None:
    """Check a recipe without running it."""
    from statex.recipes import load_recipe

    load_recipe(recipe)
    say(f"{recipe} is valid")


def main() -> None:
    """Entry point: no traceback reaches a user unless --debug (or STATEX_DEBUG) asks for it."""
    debug = "--debug" in sys.argv or bool(os.environ.get("STATEX_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    # Threads that spin while they wait make a step many times slower on a CPU that is shared with anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Not every console knows × and →.
            stream.reconfigure(errors="replace")
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except (Exception, Interrupted) as error:
        if debug:
            raise
        fail(*message(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
