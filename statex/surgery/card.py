"""The README.md of an expanded checkpoint: what it is, where it came from, what was done, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .operators import OPERATORS
from .summary import ExpansionSummary, arrow, binary, heads

INIT_MEANING = {
    "preserve": "computes the same function as its source until it is trained",
    "inherit": "keeps its source's weights, but not its function: it needs training before use",
    "reinit": "has parts that were drawn afresh: it needs training before use",
}


def model_card(summary: ExpansionSummary, provenance: Mapping[str, Any], *, hub_id: str | None = None) -> str:
    """Markdown with the hub's front matter, which names the source where it is on the hub."""
    inits = {row.init for row in summary.rows}
    strongest = next(init for init in ("reinit", "inherit", "preserve") if init in inits)
    before, after = summary.before, summary.after
    front = ["---", "library_name: statex", "tags:", "- statex", f"- {summary.family}", "pipeline_tag: text-generation"]
    front += [f"base_model: {hub_id}"] if hub_id is not None else []
    used = dict.fromkeys(row.operator for row in summary.rows)
    changed = f"enlarged ×{summary.state_growth:.2f}" if summary.state_growth != 1 else "given eigenvalues below 0"
    rows = [
        f"| {row.layer} | {row.label} | {heads(row.before)} → {heads(row.after)} "
        f"| {arrow(row.cost_before.state_elements, row.cost_after.state_elements)} | {row.new_parameters:,} |"
        for row in summary.rows
    ]
    hashes = [f"- `{name}`: sha256 `{digest}`" for name, digest in provenance["source_sha256"].items()]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {summary.source.rstrip('/').split('/')[-1]}, expanded",
            "",
            f"A `{summary.family}` language model whose recurrent state was {changed} by statex. "
            f"This checkpoint {INIT_MEANING[strongest]}.",
            "",
            *(f"- {name} {OPERATORS[name].summary}." for name in used),
            f"- State per sequence: {arrow(before.state_elements, after.state_elements)} elements, "
            f"{arrow(before.state_bytes, after.state_bytes, binary)}.",
            f"- Parameters: {arrow(before.parameters, after.parameters)}.",
            f"- Memory traffic per generated token and sequence: {arrow(before.decode_bytes, after.decode_bytes, binary)}.",
            "",
            "## Plan",
            "",
            "| layer | operator | heads × [key, value] | state elements | new parameters |",
            "| ---: | --- | --- | ---: | ---: |",
            *rows,
            "",
            "`plan.yaml` holds the plan, `config.json` (key `statex`) the description of every layer.",
            "",
            "## How to load",
            "",
            "```python",
            "import statex",
            "",
            'model = statex.load("this folder")',
            "```",
            "",
            "or `AutoModelForCausalLM.from_pretrained` after `import statex.models`. `statex export --to hf` writes a copy that "
            "loads without statex.",
            "",
            "## Source",
            "",
            f"`{summary.source}`, expanded with statex {provenance['statex_version']}, torch {provenance['torch_version']}.",
            "",
            *hashes,
            "",
        ]
    )
