"""The data pipeline: nothing is lost, nothing leaks, everything can be resumed."""

import gzip
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from statex.errors import RecipeError
from statex.evals.mqar_rows import IGNORE
from statex.models import load
from statex.recipes.data import sources as sources_module
from statex.recipes.data.packing import Packer
from statex.recipes.data.readers import Shard, cut_before, open_reader
from statex.recipes.data.sources import Encoder, MqarSource, TextSource, open_sources
from statex.recipes.schema import Entry, MqarEntry, TextEntry

from .helpers import EOS, byte_tokenizer, write_byte_gla, write_byte_mamba2, write_documents

SEED = (0, 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij\u00e9\u20ac", k=draw.randint(1, 9))) for _ in range(count))


def packer(mixture: list[Entry], length: int, shard: Shard | None = None, seed: tuple[int, ...] = SEED) -> Packer:
    return Packer(open_sources(mixture, byte_tokenizer(), longest=length, seed=seed, shard=shard or Shard()), length, 0)


def text_source(entry: TextEntry, shard: Shard | None = None) -> TextSource:
    return TextSource(entry, Encoder(byte_tokenizer()), SEED, shard or Shard())


def decoded(ids: np.ndarray) -> bytes:
    return bytes((ids - 3).astype(np.uint8))


def read_documents(source: TextSource, count: int, room: int = 50) -> list[str]:
    """The next documents, put together from fragments."""
    found, ids = [], []
    while len(found) < count:
        fragment = source.take(room)
        assert fragment is not None
        ids.append(fragment.ids)
        if fragment.ids[-1] == EOS:
            found.append(decoded(np.concatenate(ids)[:-1]).decode())
            ids = []
    return found


# --- reading -------------------------------------------------------------------------------------------------------------


def write_format(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    elif ".txt" in path.suffixes:
        path.write_bytes(gzip.compress(texts[0].encode()) if path.suffix == ".gz" else texts[0].encode())
    else:
        write_documents(path, texts)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "d.txt", "d.txt.gz"])
def test_an_epoch_gives_each_document_once_whatever_the_format(tmp_path: Path, name: str, streaming: bool) -> None:
    texts = [words(30, 1)] if ".txt" in name else [words(30, i) for i in range(7)]
    entry = TextEntry(path=str(write_format(tmp_path / name, texts)), streaming=streaming)
    assert sorted(read_documents(text_source(entry), len(texts))) == sorted(texts)


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    for i in range(3):
        write_documents(tmp_path / f"{i}.jsonl", [words(5, i)])
    assert sorted(read_documents(text_source(TextEntry(path=str(tmp_path))), 3)) == sorted(words(5, i) for i in range(3))


@pytest.mark.parametrize("streaming", [False, True])
def test_epochs_are_shuffled_differently_and_by_seed(tmp_path: Path, streaming: bool) -> None:
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", [f"document {i}" for i in range(20)])), streaming=streaming)
    both = read_documents(text_source(entry), 40)
    assert sorted(both[:20]) == sorted(both[20:])
    assert both[:20] != both[20:]
    assert both == read_documents(text_source(entry), 40)
    assert both != read_documents(TextSource(entry, Encoder(byte_tokenizer()), (1, 0), Shard()), 40)


@pytest.mark.parametrize("streaming", [False, True])
def test_pieces_of_a_document_make_it_up_again(tmp_path: Path, streaming: bool) -> None:
    texts = [words(100, i) for i in range(3)]
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", texts)), piece_bytes=64, streaming=streaming)
    reader = open_reader(entry, SEED, Shard())
    pieces = {reader.next() for _ in range(sum(-(-len(text.encode()) // 64) for text in texts))}
    assert sum(piece.ends_document for piece in pieces) == 3
    joined = sum(len(piece.text) for piece in pieces)
    assert joined == sum(len(text.encode()) for text in texts)
    assert all(piece.text.decode() in "".join(texts) for piece in pieces)


def test_text_is_cut_before_white_space_and_never_inside_a_character() -> None:
    assert cut_before(b"hello world", 3) == 5
    assert "\u20ac".encode() * 100 == b"".join(
        ("\u20ac" * 100).encode()[cut_before(("\u20ac" * 100).encode(), a) : cut_before(("\u20ac" * 100).encode(), a + 16)]
        for a in range(0, 300, 16)
    )
    for offset in range(300):
        ("\u20ac" * 100).encode()[: cut_before(("\u20ac" * 100).encode(), offset)].decode()


@pytest.mark.parametrize("streaming", [False, True])
def test_devices_share_an_epoch_without_overlap(tmp_path: Path, streaming: bool) -> None:
    texts = [f"document {i}" for i in range(20)]
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", texts)), streaming=streaming)
    parts = [read_documents(text_source(entry, Shard(i, 2)), 10) for i in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", ["", "one", "", "two"])))
    assert sorted(read_documents(text_source(entry), 2)) == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_text_is_refused(tmp_path: Path, streaming: bool) -> None:
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", ["", ""])), streaming=streaming)
    with pytest.raises(RecipeError, match="has no text"):
        text_source(entry).take(5)


def bad_entries(tmp_path: Path) -> dict[str, TextEntry]:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "table.csv").write_text("text\na\n")
    (tmp_path / "folder").mkdir()
    write_documents(tmp_path / "other.jsonl", ["a"], field="body")
    return {
        "does not exist": TextEntry(path=str(tmp_path / "absent.jsonl")),
        "no column 'text'": TextEntry(path=str(tmp_path / "other.jsonl")),
        "unknown data format": TextEntry(path=str(tmp_path / "table.csv")),
        "holds no data files": TextEntry(path=str(tmp_path / "folder")),
        "empty": TextEntry(path=str(tmp_path / "empty.jsonl")),
        "cannot read the data": TextEntry(path=str(tmp_path / "broken.jsonl")),
        "leaves its text open": TextEntry(),
    }


BAD = [
    "does not exist",
    "no column 'text'",
    "unknown data format",
    "holds no data files",
    "empty",
    "cannot read",
    "leaves its text open",
]


@pytest.mark.parametrize("told", BAD)
def test_unusable_data_is_refused_with_its_place(tmp_path: Path, told: str) -> None:
    entry = next(entry for key, entry in bad_entries(tmp_path).items() if key.startswith(told))
    with pytest.raises(RecipeError, match=told) as caught:
        text_source(entry)
    assert caught.value.fix
    assert entry.path is None or caught.value.where == entry.path


def test_a_wrong_column_is_answered_with_those_there_are(tmp_path: Path) -> None:
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", ["a"], field="body")))
    with pytest.raises(RecipeError, match="body"):
        text_source(entry)


# --- tokens --------------------------------------------------------------------------------------------------------------


def test_the_byte_shortcut_gives_what_the_tokenizer_gives() -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer)
    for text in (words(50), "a </s> in the text", "\x00\x7f \U0001f600"):
        assert encoder(text.encode()).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_first_row_of_a_long_document_tokenises_only_its_start(tmp_path: Path) -> None:
    text = words(200_000)
    source = text_source(TextEntry(path=str(write_documents(tmp_path / "d.jsonl", [text]))))
    fragment = source.take(512)
    assert fragment is not None
    assert decoded(fragment.ids) == text.encode()[:512]
    assert len(source.tokens) < 20_000 < len(text)


def test_segments_of_a_long_document_join_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SEGMENT_BYTES", 40)
    texts = [words(60, i) for i in range(2)]
    entry = TextEntry(path=str(write_documents(tmp_path / "d.jsonl", texts)))
    assert sorted(read_documents(text_source(entry), 2, room=17)) == sorted(texts)


def test_recall_rows_are_whole_and_labelled_at_their_answers_only() -> None:
    source = MqarSource(MqarEntry(kind="mqar", num_pairs=[3]), byte_tokenizer(), SEED, Shard(), 64)
    assert source.take(11) is None
    fragment = source.take(12)
    assert fragment is not None
    places = np.flatnonzero(fragment.labels != IGNORE)
    assert places.tolist() == [7, 9, 11]
    assert (fragment.labels[places] == fragment.ids[places]).all()
    pairs = dict(fragment.ids[:6].reshape(3, 2).tolist())
    assert dict(fragment.ids[6:].reshape(3, 2).tolist()) == pairs


@pytest.mark.parametrize(("pairs", "length", "told"), [(16, 32, "rows have 32"), (200, 4096, "distinct keys")])
def test_recall_rows_that_cannot_be_drawn_are_refused(pairs: int, length: int, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        MqarSource(MqarEntry(kind="mqar", num_pairs=[pairs]), byte_tokenizer(), SEED, Shard(), length)


# --- packing -------------------------------------------------------------------------------------------------------------


def mixed(tmp_path: Path, **text: Any) -> list[Entry]:
    path = write_documents(tmp_path / "d.jsonl", [words(12, i) for i in range(9)])
    return [TextEntry(path=str(path), **text), MqarEntry(kind="mqar", num_pairs=[2, 5], weight=0.5)]


def test_rows_are_full_and_borders_are_where_documents_and_rows_start(tmp_path: Path) -> None:
    rows = packer(mixed(tmp_path), 48)
    for _ in range(20):
        batch = rows.batch(3)
        assert batch.input_ids.shape == batch.labels.shape == (3, 48)
        assert batch.cu_seqlens is not None
        borders = batch.cu_seqlens.tolist()
        assert (borders[0], borders[-1]) == (0, 144)
        assert borders == sorted(set(borders))
        assert {0, 48, 96} <= set(borders)
        after_eos = (torch.nonzero(batch.input_ids.flatten()[:-1] == EOS).flatten() + 1).tolist()
        assert set(after_eos) <= set(borders)


def test_no_document_is_asked_to_predict_the_first_token_of_the_next(tmp_path: Path) -> None:
    rows = packer(mixed(tmp_path), 48)
    for _ in range(20):
        batch = rows.batch(2)
        assert batch.cu_seqlens is not None
        labels = batch.labels.flatten()
        assert (labels[batch.cu_seqlens[:-1].long()] == IGNORE).all()
        assert batch.labelled == int((labels != IGNORE).sum()) > 0
        assert ((labels == IGNORE) | (labels == batch.input_ids.flatten())).all()


def test_all_other_tokens_of_text_are_labelled_the_separator_too(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "d.jsonl", ["abcd", "ef"])
    batch = packer([TextEntry(path=str(path))], 8).batch(1)
    assert batch.cu_seqlens is not None
    starts = batch.cu_seqlens[:-1].tolist()
    assert sorted(starts) in ([0, 3], [0, 5])
    expected = batch.input_ids.clone()
    expected[0, starts] = IGNORE
    assert torch.equal(batch.labels, expected)


def test_text_goes_on_where_its_last_row_ended(tmp_path: Path) -> None:
    text = words(60)
    rows = packer([TextEntry(path=str(write_documents(tmp_path / "d.jsonl", [text])))], 32)
    ids = np.concatenate([rows.batch(1).input_ids.numpy().ravel() for _ in range(5)])
    assert decoded(ids) == text.encode()[:160]


def test_rows_of_one_document_each_need_no_borders(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "d.jsonl", [words(100)])
    assert packer([TextEntry(path=str(path))], 16).batch(4).cu_seqlens is None


def test_tokens_are_shared_out_by_weight(tmp_path: Path) -> None:
    rows = packer(mixed(tmp_path, weight=1.5), 48)
    rows.batch(200)
    assert rows.used[0] / sum(rows.used) == pytest.approx(0.75, abs=0.03)


def test_what_no_document_fits_is_padded_and_unlabelled() -> None:
    rows = packer([MqarEntry(kind="mqar", num_pairs=[3])], 32)
    batch = rows.batch(1)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 12, 24, 32]
    assert (batch.input_ids[0, 24:] == 0).all()
    assert (batch.labels[0, 24:] == IGNORE).all()


def test_data_without_a_token_to_predict_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    path = write_documents(tmp_path / "d.jsonl", ["a", "b"])
    sources = open_sources([TextEntry(path=str(path))], tokenizer, longest=8, seed=SEED, shard=Shard())
    with pytest.raises(RecipeError, match="token to predict"):
        Packer(sources, 8, 0).batch(1)


@pytest.mark.parametrize("write", [write_byte_gla, write_byte_mamba2])
def test_packed_documents_have_the_logits_that_they_have_alone(tmp_path: Path, write: Any) -> None:
    model = load(write(tmp_path / "model"), dtype=torch.float32)
    batch = packer(mixed(tmp_path), 48).batch(2)
    assert batch.cu_seqlens is not None
    flat_ids = batch.input_ids.flatten()
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, cu_seqlens=batch.cu_seqlens, use_cache=False).logits.flatten(0, 1)
        for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            alone = model(input_ids=flat_ids[None, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:stop], alone, atol=1e-4, rtol=1e-4)


# --- resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"piece_bytes": 32}, {"streaming": True}, {"streaming": True, "piece_bytes": 32}])
def test_a_packer_goes_on_exactly_from_any_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(sources_module, "SEGMENT_BYTES", 24)
    if options.get("streaming"):
        options = {**options, "shuffle_block": 4}
    mixture = mixed(tmp_path, **options)
    rows = packer(mixture, 40)
    states, batches = [], []
    for _ in range(30):  # more than an epoch of the nine documents
        states.append(rows.state())
        batches.append(rows.batch(2))
    for start in range(0, 30, 3):
        again = packer(mixture, 40)
        again.load_state(states[start])
        for expected in batches[start : start + 4]:
            found = again.batch(2)
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.labels, expected.labels)
        # and on the packer that has run ahead, as evaluation does
        rows.load_state(states[start])
        assert torch.equal(rows.batch(2).input_ids, batches[start].input_ids)


def test_a_state_is_plain_data_that_a_checkpoint_can_hold(tmp_path: Path) -> None:
    rows = packer(mixed(tmp_path, streaming=True), 40)
    rows.batch(5)
    torch.save(rows.state(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == rows.state()
