"""An export with code runs where statex is not installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files

from statex.checkpoints import canonical_config, open_checkpoint
from statex.errors import CheckpointError
from statex.models import load
from statex.models.remote_code import AUTO_MAP, export_hf, flat_modules
from tests.models.build import DESCRIPTIONS, build, tokens

WITHOUT_STATEX = """
import json, sys
sys.modules["statex"] = None  # importing statex now fails
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor(json.load(open(sys.argv[2])))
with torch.no_grad():
    logits = model(ids).logits
    generated = {
        "greedy": model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
        "beam": model.generate(ids, max_new_tokens=5, num_beams=2, pad_token_id=0),
    }
torch.save({"logits": logits, **generated}, sys.argv[3])
model.save_pretrained(sys.argv[4])
print(config.description.family, type(model).__module__)
"""


@pytest.mark.parametrize("name", [name for name in DESCRIPTIONS if name.endswith("-expanded")])
@torch.no_grad()
def test_an_export_gives_the_same_logits_and_generation_where_statex_cannot_be_imported(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(2, 6)
    model.save_pretrained(tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "export")
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    paths = [str(tmp_path / part) for part in ("export", "ids.json", "outputs.pt", "saved")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_STATEX, *paths], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == model.config.description.family
    assert "transformers_modules" in done.stdout
    outputs = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(outputs["logits"], model(ids).logits, rtol=1e-5, atol=1e-5)
    assert outputs["greedy"].equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert outputs["beam"].equal(model.generate(ids, max_new_tokens=5, num_beams=2, pad_token_id=0))
    torch.testing.assert_close(load(tmp_path / "export")(ids).logits, model(ids).logits)
    torch.testing.assert_close(load(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_flat_modules_import_nothing_of_statex_and_transformers_finds_them_all(tmp_path: Path) -> None:
    texts = flat_modules()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        compile(text, name, "exec")
        assert not re.search(r"^\s*(import|from)\s+(statex|\.\.)", text, re.MULTILINE), name
    assert {reference.split(".")[0] + ".py" for reference in AUTO_MAP.values()} <= set(texts)
    found = {Path(path).name for path in get_relative_import_files(tmp_path / "modeling_statex.py")}
    assert found | {"modeling_statex.py"} == set(texts)


def test_an_export_carries_tokenizer_plan_and_card_and_refuses_to_replace_a_folder(tmp_path: Path) -> None:
    build("gla").save_pretrained(tmp_path / "model")
    for name, text in {"tokenizer_config.json": "{}", "plan.yaml": "layers: all", "README.md": "# A model"}.items():
        (tmp_path / "model" / name).write_text(text)
    export_hf(tmp_path / "model", tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer_config.json").is_file()
    assert (tmp_path / "export" / "plan.yaml").read_text() == "layers: all"
    card = (tmp_path / "export" / "README.md").read_text()
    assert card.startswith("# A model")
    assert "trust_remote_code=True" in card
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(tmp_path / "model", tmp_path / "export")
    export_hf(tmp_path / "model", tmp_path / "export", force=True)


def test_what_is_made_of_an_export_names_no_code_that_it_lacks(tmp_path: Path) -> None:
    build("gla").save_pretrained(tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "export")
    with open_checkpoint(tmp_path / "export") as export:
        assert "auto_map" in export.config
        assert "auto_map" not in canonical_config(export)
