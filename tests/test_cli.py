"""The command line as a hostile newcomer meets it: every mistake ends in one message that says what to do, and leaves nothing."""

from __future__ import annotations

import ast
import errno
import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import statex
from statex import cli, errors
from tests.fixtures import write_gla, write_mamba2
from tests.mistakes import BAD_CALLS, BAD_CHECKPOINTS, QUICKSTART, SHORT, TINY, change_tensors

MAIN = "import sys; from statex.cli import main; main()"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`statex` with these arguments, in this process."""
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and tables would wrap

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["statex", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            code = 0
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint of each family, an expanded one, and files of all sorts."""
    monkeypatch.chdir(tmp_path)
    write_gla("gla")
    write_mamba2("mamba2")
    statex.expand("gla", "expanded", progress=False)
    statex.expand("gla", "flipping", operator="extend_spectrum", progress=False)
    texts = {
        "good.txt": b"The cat sat on the mat. " * 40, "empty.txt": b"", "latin.txt": b"\xff\xfe caf\xe9", "table.csv": b"a,b",
        "empty.jsonl": b"", "numbers.jsonl": b'{"text": 3}\n', "other.jsonl": b'{"body": "x"}\n',
        "broken.jsonl": b'{"text": "x"}\n{oops\n',
        "broken.parquet": b"PAR1 no", "broken.txt.gz": b"no", "cut.txt.gz": gzip.compress(os.urandom(400))[:100],
        "list.yaml": b"[1]", "broken.yaml": b": : :", "key.yaml": b"operations: [{operatr: merge_heads}]",
        "recipe.yaml": b"extends: recovery\noptimizer: {learnin_rate: 1}", "loop.yaml": b"extends: loop.yaml",
        "twice.yaml": b"operations: [{operator: extend_spectrum}, {operator: extend_spectrum}]", "old.json": b"{}",
    }  # fmt: skip
    for name, data in texts.items():
        Path(name).write_bytes(data)
    Path("home").mkdir()
    Path("home/letter").write_text("dear")
    return tmp_path


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 1 and one line on stderr: `error: what (where). What to do`."""
    assert outcome.code == 1, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "unexpected" not in outcome.err, outcome.err
    assert ". " in outcome.err, f"nothing says what to do: {outcome.err}"
    for word in words:
        assert word in outcome.err, f"{word!r} is not in: {outcome.err}"


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_inspect_and_by_expand(name: str, run: Run, place: Path) -> None:
    spoil, word = BAD_CHECKPOINTS[name]
    spoil(place / "gla")
    before = everything(place)
    for arguments in (["inspect", "gla"], ["expand", "gla", "-o", "out", "--operator", "lift_keys"]):
        assert_refused(run(*arguments), word)
    assert everything(place) == before


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_mistake_ends_with_one_message_and_leaves_nothing(name: str, run: Run, place: Path) -> None:
    arguments, word = BAD_CALLS[name]
    before = everything(place)
    assert_refused(run(*arguments), word)
    assert everything(place) == before


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["expand"], ["expand", "gla", "--foo"], ["expand", "gla", "--factor", "2.5"], ["generate", "gla"]]
)
def test_what_cannot_be_parsed_exits_with_2(arguments: list[str], run: Run, place: Path) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "--help" in outcome.err


def test_statex_alone_shows_its_commands(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "quickstart" in outcome.out


def test_version_and_short_help_are_answered(run: Run) -> None:
    assert run("--version") == (0, f"statex {statex.__version__}\n", "")
    assert run("expand", "-h").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "gla"],
        ["expand", "gla", "--dry-run"],
        ["expand", "gla", "-o", "out"],
        ["verify", "gla", "expanded", "--max-tokens=8"],
        ["eval", str(QUICKSTART), *TINY],
        ["eval", str(QUICKSTART), "--suite=icl", "--shots=0,1", "--samples=1"],
        ["diagnose", str(QUICKSTART), "--probe=mqar", "--samples=2", "--no-heads", "--no-states"],
    ],
)
def test_json_output_can_be_parsed(arguments: list[str], run: Run, place: Path) -> None:
    outcome = run(*arguments, "--json")
    assert outcome.code == 0
    assert isinstance(json.loads(outcome.out), dict)


def test_a_dry_run_writes_nothing(run: Run, place: Path) -> None:
    before = everything(place)
    assert "merge_heads" in run("expand", "gla", "-o", "out", "--dry-run").out
    assert everything(place) == before


def test_verify_exits_with_1_when_the_function_changed(run: Run, place: Path) -> None:
    change_tensors(place / "expanded", lambda tensors: tensors["model.norm.weight"].mul_(1.1))
    outcome = run("verify", "gla", "expanded", "--max-tokens", "8")
    assert outcome.code == 1
    assert "FAILED" in outcome.out


def test_auto_expands_the_layers_that_a_diagnosis_names(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statex, "auto_layers", lambda checkpoint, **options: [1] if checkpoint == "gla" else [], raising=False)
    outcome = run("expand", "gla", "--operator", "lift_keys", "--factor", "2", "--layers", "auto", "--dry-run", "--json")
    assert [row["layer"] for row in json.loads(outcome.out)["layers"]] == [1]


AUTO = ("expand", QUICKSTART, "--layers", "auto")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([*AUTO, "-o", "out", "--operator", "outer_product"], "merge_heads"),
        ([*AUTO, "-o", "out", "--operator", "lift_kyes"], "did you mean 'lift_keys'"),
        ([*AUTO, "-o", "out", "--operator", "merge_heads", "--factor", "3"], "does not divide"),
        ([*AUTO, "-o", "out", "--operator", "merge_heads", "--factor", "0"], "2 or more"),
        ([*AUTO, "-o", "out", "--init", "zero"], "preserve"),
        ([*AUTO, "-o", "out", "--operator", "merge_heads", "--init", "inherit", "--set", "mixing=scalar"], "no meaning with init"),
        ([*AUTO, "-o", "out", "--set", "mix=1"], "Known keys"),
        ([*AUTO, "-o", "out", "--seed=-1"], "seed"),
        ([*AUTO, "-o", "out", "--plan", "key.yaml"], "both given"),
        ([*AUTO, "-o", "out", "--plan", "none.yaml"], "Check the path"),
        ([*AUTO, "-o", "expanded"], "--force"),
        ([*AUTO, "-o", "home", "--force"], "not a checkpoint"),
        ([*AUTO, "-o", "good.txt/out"], "cannot write"),
        ([*AUTO, "-o", QUICKSTART, "--force"], "own source"),
        (["expand", "lifted", "-o", "out", "--layers", "auto", "--operator", "lift_keys"], "expanded already"),
        (["diagnose", QUICKSTART, "--operator", "merge_heads", "--factor", "3"], "does not divide"),
        (["diagnose", "lifted", "--operator", "lift_keys"], "It allows ×4 in all"),
    ],
)
def test_what_can_be_refused_is_refused_before_layers_are_measured(
    arguments: list[object], word: str, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statex.evals.diagnosis.run.load_subject", lambda *args, **options: pytest.fail("the measuring began"))
    if "lifted" in arguments:
        statex.expand(QUICKSTART, place / "lifted", operator="lift_keys", factor=2, layers="all", progress=False)
    before = everything(place)
    assert_refused(run(*arguments), word)
    assert everything(place) == before


def test_auto_chooses_among_layers_that_can_take_the_operation(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statex.expand(QUICKSTART, place / "lifted", operator="lift_keys", factor=2, layers="2", progress=False)
    monkeypatch.setattr(statex, "auto_layers", lambda checkpoint, among, **options: among, raising=False)
    outcome = run("expand", "lifted", "--layers", "auto", "--operator", "lift_keys", "--dry-run", "--json")
    assert [row["layer"] for row in json.loads(outcome.out)["layers"]] == [0, 1, 3]


def test_an_evaluation_becomes_a_report_and_a_section_of_the_card(run: Run, place: Path) -> None:
    shutil.copytree(QUICKSTART, "ckpt")
    assert run("eval", "ckpt", *TINY, "-o", "result").code == 0
    outcome = run("report", "result", "-o", "report", "--card", "ckpt")
    assert (outcome.code, outcome.out) == (0, "Wrote report/report.html\nWrote ckpt/README.md\n")
    assert "## Results" in Path("ckpt/README.md").read_text(encoding="utf-8")


def test_names_with_brackets_are_printed_as_they_are(run: Run, place: Path) -> None:
    shutil.move("gla", "[b]gla[/i]")
    assert "[b]gla[/i]" in run("inspect", "[b]gla[/i]").out
    outcome = run("expand", "[b]gla[/i]", "-o", "[x]")
    assert outcome.code == 0
    assert "Wrote [x]" in outcome.out


def test_a_prompt_comes_from_standard_input_and_must_be_utf8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hé".encode())))
    assert run("generate", QUICKSTART, "-p", "-", "--max-new-tokens", "2").out.startswith("Hé")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert_refused(run("generate", QUICKSTART, "-p", "-"), "UTF-8")


@pytest.mark.parametrize("more", [[], ["--num-beams", "2"], ["--temperature", "1"]])
def test_ids_that_no_token_has_are_not_generated(more: list[str], run: Run, place: Path) -> None:
    write_gla("wide", vocab_size=264)  # the tokenizer has 259 tokens
    shutil.copy(QUICKSTART / "tokenizer_config.json", "wide")
    row = 100 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    # One of two opposite rows is always far the likeliest.
    change_tensors(place / "wide", lambda tensors: tensors["lm_head.weight"][261:263].copy_(torch.stack([row, -row])))
    outcome = run("generate", "wide", "-p", "Hello", "--max-new-tokens", "4", *more)
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("Hello")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "broken", "-p", "a"],
        ["eval", "broken", *TINY],
        ["diagnose", "broken", "--samples", "2"],
        ["expand", "broken", "-o", "out", "--layers", "auto"],
    ],
)
def test_a_model_of_nans_is_told_as_such(arguments: list[str], run: Run, place: Path) -> None:
    shutil.copytree(QUICKSTART, "broken")
    change_tensors(place / "broken", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    before = everything(place)
    assert_refused(run(*arguments), "NaN logits", "(broken)")
    assert everything(place) == before


def test_only_debug_shows_a_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["statex", "expand", "gla", "-o", "out", "--factor", "3", "--debug"])
    with pytest.raises(errors.PlanError):
        cli.main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("statex.checkpoints.writer.CheckpointWriter.add", ["expand", "gla", "-o", "out"]),
        ("statex.checkpoints.writer.CheckpointWriter.add", ["export", "gla", "-o", "out"]),
        ("statex.evals.subject.Subject.score", ["eval", str(QUICKSTART), *TINY, "-o", "out"]),
        ("statex.recipes.run.load", ["finetune", str(QUICKSTART), "-o", "out", *SHORT]),
    ],
)
def test_a_signal_ends_a_command_and_leaves_nothing(
    where: str, arguments: list[str], number: int, code: int, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, lambda *args, **options: os.kill(os.getpid(), number))
    before = everything(place)
    outcome = run(*arguments)
    assert outcome.code == code
    assert outcome.err.startswith("error: interrupted")
    assert everything(place) == before


def test_ctrl_c_during_finetune_keeps_a_checkpoint_and_says_how_to_go_on(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statex.recipes.trainer import Trainer

    step = Trainer._step

    def interrupted(trainer: Trainer) -> tuple[float, bool]:
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    outcome = run("finetune", QUICKSTART, "-o", "out", *SHORT)
    assert outcome.code == 130
    assert f"statex finetune {QUICKSTART} -o out --resume" in outcome.err
    monkeypatch.setattr(Trainer, "_step", step)
    assert run("finetune", QUICKSTART, "-o", "out", "--resume", "--device", "cpu").code == 0
    assert (place / "out" / "config.json").is_file()


def test_a_second_ctrl_c_during_finetune_ends_it_at_once(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(trainer: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr("statex.recipes.trainer.Trainer._step", twice)
    outcome = run("finetune", QUICKSTART, "-o", "out", *SHORT)
    assert outcome.code == 130
    assert "No checkpoint was saved" in outcome.err


def test_ctrl_c_during_quickstart_keeps_the_steps_that_were_complete(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statex.quickstart.verify", lambda *args, **options: os.kill(os.getpid(), signal.SIGINT))
    outcome = run("quickstart", "-o", "out")
    assert outcome.code == 130
    assert outcome.err.startswith("error: interrupted")
    assert [path.name for path in (place / "out").iterdir()] == ["expanded"]


@pytest.mark.parametrize("arguments", [["recipes", "copy", "recovery", "mine.yaml"], ["finetune", QUICKSTART, "-o", "out", *SHORT]])
def test_a_full_disk_leaves_no_half_written_file(
    arguments: list[str], run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: Any, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    before = everything(place)
    assert_refused(run(*arguments), "No space left", "Make room")
    assert everything(place) == before


def test_results_that_do_not_fit_leave_no_folder(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("statex.evals.result.write_text", full)
    assert_refused(run("eval", QUICKSTART, *TINY, "-o", "out"), "No space left")
    assert not (place / "out").exists()


def test_a_gpu_without_memory_is_told_as_such(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("statex.evals.diagnosis.run.measure_memory", full)
    assert_refused(run("diagnose", QUICKSTART, "--samples", "1", "--no-heads"), "the memory does not suffice")


def test_of_several_tasks_the_one_that_cannot_run_is_named(run: Run) -> None:
    assert_refused(run("eval", QUICKSTART, "--tasks", "passkey,niah", "--lengths", "128"), "error: niah: ", "Give lengths from")


def test_the_handlers_of_signals_are_given_back(run: Run) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("recipes", "ls")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_of_a_real_process_exits_with_130_and_no_traceback() -> None:
    command = [sys.executable, "-c", MAIN, "generate", str(QUICKSTART), "-p", "The", "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted" in told
    assert "Traceback" not in told


def test_a_pipe_that_closes_early_is_no_traceback() -> None:
    command = f"{sys.executable} -c '{MAIN}' recipes show recovery | head -n 1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("# Recover")
    assert ended.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", str(QUICKSTART)], ["recipes", "ls"]])
def test_help_inspect_and_recipes_need_no_torch(arguments: list[str]) -> None:
    script = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from statex.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "False"


def test_help_takes_less_than_half_a_second() -> None:
    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = processor_seconds()
        subprocess.run([sys.executable, "-c", MAIN, "--help"], check=True, capture_output=True, timeout=60)
        times.append(processor_seconds() - before)
    assert min(times) < 0.5


@pytest.mark.parametrize("name", statex._HOMES)
def test_every_name_of_the_package_resolves(name: str) -> None:
    assert callable(getattr(statex, name))


def test_every_error_says_what_to_do() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.StatexError)}
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                assert any(word.arg == "fix" for word in node.keywords), f"{path}:{node.lineno} says not what to do"
