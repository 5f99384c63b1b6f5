"""A folder, or a model on the Hugging Face Hub fetched into its usual cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError

CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.tiktoken",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
"""Files beside the weights that belong to the model whatever its layers look like."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The folder of a checkpoint, downloaded if need be, and its name: the folder's path, or the hub id with its revision.

    Raises:
        CheckpointError: no such folder, or the hub does not give the files.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path, str(path)
    text = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError("a checkpoint is a folder, not a file", where=text, fix="Give the folder that holds config.json")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError("no such folder", where=text, fix="Give a checkpoint's folder, or a hub id such as owner/model")
    return _download(text, revision), text if revision is None else f"{text}@{revision}"


def locate_tokenizer(path_or_hub_id: str | Path) -> Path:
    """The folder of a tokenizer; of a hub id no weights are fetched.

    Raises:
        CheckpointError: no such folder, or the hub does not give the files.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_hub_id)
    if path.exists() or not (_HUB_ID.fullmatch(text) or _HUB_ID.fullmatch(f"owner/{text}")):
        raise CheckpointError("no such folder", where=text, fix="Give a tokenizer's folder, or a hub id such as owner/model")
    return _fetch(text, None, list(CARRIED))


def _download(repo_id: str, revision: str | None) -> Path:
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *CARRIED]
    folder = _fetch(repo_id, revision, patterns)
    if any(folder.glob("model*.safetensors")):
        return folder
    return _fetch(repo_id, revision, [*patterns, "pytorch_model*.bin*"])


def _fetch(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"no such folder, and the hub does not give it: {reason[0] if reason else type(error).__name__}",
            where=repo_id,
            fix="Check the name, the connection, and for gated models `hf auth login`",
        ) from error


def carried_files(folder: Path) -> list[Path]:
    """Tokenizer, generation config and licence of a checkpoint, sorted by name."""
    return sorted({path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()})
