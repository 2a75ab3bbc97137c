"""Files that no tool writes on purpose: each is an error that names it, or is read as it should be; none hangs."""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fused_dpo_engine.data import sources
from fused_dpo_engine.data.formats import parse_row
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.fuzz import watched
from tests.engine.support.toys import byte_tokenizer

MAP = pyarrow.map_(pyarrow.string(), pyarrow.string())
NOT_UTF8 = [None, pyarrow.py_buffer(bytes(4) + b"\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
"""Buffers of a column of one text."""
ROW = {"prompt": "a b", "chosen": "c", "rejected": "d"}
LINE = json.dumps(ROW).encode()
CHAT = b'{"prompt": [{"role": "user", "content": "q"}], "chosen": "c", "rejected": "d", '

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("x.jsonl", json.dumps(ROW).encode("utf-16"), r"x\.jsonl:1: .* in UTF-8"),
    "UTF-16 table": ("x.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "not a readable table in UTF-8"),
    "latin-1": ("x.jsonl", b'{"prompt": "a b", "chosen": "\xe4", "rejected": "d"}', r"x\.jsonl:1: .* in UTF-8"),
    "NULs": ("x.jsonl", bytes(1000), r"x\.jsonl:1: each line must be"),
    "a control character": ("x.jsonl", LINE.replace(b'"c"', b'"c\x00"'), r"x\.jsonl:1: .*control character"),
    "brackets": ("x.jsonl", b"[" * 100_000, "nested too deep"),
    "brackets in a file of JSON": ("x.json", b"[" * 100_000, r"x\.json: not valid JSON: it is nested too deep"),
    "objects as text": ("x.jsonl", CHAT + b'"tools": "' + b"[" * 100_000 + b'"}', r"x\.jsonl:1: .*nested too deep"),
    "arguments as text": ("x.jsonl", CHAT + b'"chat_template_kwargs": "' + b"[" * 100_000 + b'"}', "nested too deep"),
    "schemas in schemas": (
        "x.jsonl",
        CHAT + b'"tools": ' + b'[{"a":' * 400 + b"1" + b"}]" * 400 + b"}",
        r"x\.jsonl:1: a column holds lists or objects that are nested too deep",
    ),
    "a key twice": ("x.jsonl", LINE[:-1] + b', "chosen": "e"}', r"x\.jsonl:1: .*the key 'chosen' stands twice"),
    "a key twice, inside": ("x.jsonl", b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' stands twice"),
    "a key twice in a file of JSON": ("x.json", b'[{"chosen": "a", "chosen": "b"}]', "the key 'chosen' stands twice"),
    "a column twice": ("x.csv", b"prompt,chosen,chosen,rejected\na,b,c,d\n", "two columns named 'chosen'"),
    "a lone surrogate": ("x.jsonl", LINE.replace(b'"c"', b'"\\ud800"'), r"x\.jsonl:1: .*lone surrogate"),
    "a role that is one": (
        "x.jsonl",
        b'{"prompt": [{"role": "\\ud800", "content": "q"}], "chosen": "c", "rejected": "d"}',
        r"x\.jsonl:1: .*what the chat template writes.*lone surrogate",
    ),
    "NaN": ("x.jsonl", LINE.replace(b'"c"', b"NaN"), r'x\.jsonl:1: "chosen" must be text, got nan'),
    "infinite scores": ("x.jsonl", LINE[:-1] + b', "chosen_score": Infinity, "rejected_score": 1}', "finite numbers"),
    "scores beyond floats": (
        "x.jsonl",
        LINE[:-1] + b', "chosen_score": 1' + b"0" * 4000 + b', "rejected_score": 1}',
        r"x\.jsonl:1: \"chosen_score\" must be finite numbers",
    ),
    "numbers beyond Python": ("x.jsonl", LINE[:-1] + b', "n": 1' + b"0" * 5000 + b"}", r"x\.jsonl:1: each line"),
    "an empty role": (
        "x.jsonl",
        b'{"prompt": [{"role": " ", "content": "q"}], "chosen": "c", "rejected": "d"}',
        r"x\.jsonl:1: .*role is empty",
    ),
    "numbers": ("x.jsonl", LINE + b"\n" + LINE.replace(b'"c"', b"3"), r'x\.jsonl:2: "chosen" must be text, got 3'),
    "an open quote": ("x.csv", b'prompt,chosen,rejected\na,b,"c\nd,e,f\ng,h,i\n', "not a readable table"),
    "no gzip": ("x.jsonl.gz", LINE, r"x\.jsonl\.gz: could not be read"),
    "cut gzip": ("x.jsonl.gz", gzip.compress(LINE * 100)[:-12], r"x\.jsonl\.gz: could not be read"),
    "gzip that is not what it says": ("x.jsonl.gz", gzip.compress(LINE)[:-8] + bytes(8), "CRC check failed"),
    "no zstd": ("x.jsonl.zst", LINE, r"x\.jsonl\.zst: could not be read"),
    "an empty gzip": ("x.jsonl.gz", b"", "holds no rows"),
    "an empty Parquet": ("x.parquet", b"", "not a readable Parquet file"),
    "blank lines": ("x.jsonl", b"\n \n\r\n", "holds no rows"),
}  # fmt: skip
"""A file's name and content, and what is said of it."""


@pytest.fixture(autouse=True)
def _in_time():
    """No file here takes long; what waits for somebody else, without computing, is ended by the test's own timeout."""
    with watched(20):
        yield


def pairs_of(path: Path):
    return tokenize_pairs(read_rows(path), byte_tokenizer(), max_length=64)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class TestContents:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_refused(self, tmp_path, kind):
        name, content, message = REFUSED[kind]
        with pytest.raises(DataError, match=message) as caught:
            pairs_of(write(tmp_path / name, content))
        assert len(str(caught.value)) < 1000
        assert type(caught.value.__cause__) is not RecursionError

    def test_a_huge_line(self, tmp_path):
        values = {**ROW, "notes": "x" * 50_000_000}
        assert pairs_of(write(tmp_path / "x.jsonl", json.dumps(values).encode())).report.pairs_kept == 1

    @pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
    def test_a_line_without_end(self, tmp_path, name, monkeypatch):
        """As a small archive unpacks to; no more than the limit is read of it."""
        monkeypatch.setattr(sources, "LONGEST_LINE", 2**20)
        content = LINE + b"\n" + bytes(2**26)
        path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(DataError, match=rf"{name}:2: the line has more than 1048576 bytes"):
            read_rows(path)
        assert len(read_rows(write(tmp_path / "y.jsonl", LINE + b" " * 2**19))) == 1

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "\n\t",
            "\0",
            "\x1b[31m",
            "\u200b\u200d",
            "\u202etxet",
            "<|im_end|>",
            "</s></s>",
            "{{ x }}",
            "[" * 5000,
        ],
    )
    def test_odd_texts_are_texts(self, tmp_path, text):
        """All of it is scored, and nothing else; special tokens that a text spells are counted."""
        values = {**ROW, "chosen": text, "rejected": "other"}
        result = tokenize_pairs(
            read_rows(write(tmp_path / "x.jsonl", json.dumps(values).encode())), byte_tokenizer(), max_length=10_000
        )
        (pair,) = result.pairs
        assert result.report.spelled_rows == (text in ("<|im_end|>", "</s></s>"))
        assert ("spell special tokens" in result.report.summary()) == bool(result.report.spelled_rows)
        said = byte_tokenizer().decode(pair.chosen_ids[pair.prompt_length :].tolist())
        assert said == text.removesuffix("</s>") + "</s>"

    def test_columns_of_one_name(self, tmp_path):
        columns = [pyarrow.array([text]) for text in ("a b", "c", "e", "d")]
        table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "chosen", "rejected"])
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(DataError, match="two columns named 'chosen'"):
            read_rows(tmp_path / "x.parquet")

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (pyarrow.array([b"c"]), '"chosen" must be text'),
            (pyarrow.array([1.5]), '"chosen" must be text'),
            (pyarrow.array([[[["c"]]]]), "mix text and messages"),
            (pyarrow.array([[("role", "x")]], MAP), "mix text and messages"),
            (pyarrow.nulls(1), "missing"),
            (
                pyarrow.Array.from_buffers(pyarrow.string(), 1, NOT_UTF8),
                "not a readable Parquet file: 'utf-8' codec",
            ),
        ],
        ids=["bytes", "numbers", "lists", "a map", "nulls", "no UTF-8"],
    )  # fmt: skip
    def test_odd_types(self, tmp_path, column, message):
        table = pyarrow.table({"prompt": ["a b"], "chosen": column, "rejected": ["d"]})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(DataError, match=message):
            pairs_of(tmp_path / "x.parquet")

    def test_damaged_parquet(self, tmp_path):
        """Every byte of a small file, one after the other, another one."""
        pyarrow.parquet.write_table(pyarrow.table({name: [text] for name, text in ROW.items()}), tmp_path / "x.parquet")
        content, read = (tmp_path / "x.parquet").read_bytes(), 0
        for at in range(0, len(content), 5):
            damaged = content[:at] + bytes([content[at] ^ 0x5A]) + content[at + 1 :]
            with suppress(DataError):
                read += pairs_of(write(tmp_path / "y.parquet", damaged)).report.pairs_kept
        assert read < len(content) / 10


class TestPaths:
    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "x.jsonl")
        with pytest.raises(DataError, match=r"x\.jsonl: is a pipe, socket or device; copy what it gives"):
            read_rows(tmp_path / "x.jsonl")

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
    def test_a_device(self, tmp_path, device):
        (tmp_path / "x.jsonl").symlink_to(device)
        with pytest.raises(DataError, match=r"x\.jsonl: is a pipe, socket or device"):
            read_rows(tmp_path / "x.jsonl")

    def test_a_socket(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("x.jsonl")
            with pytest.raises(DataError, match=r"x\.jsonl: is a pipe, socket or device"):
                read_rows("x.jsonl")

    def test_links_in_a_circle(self, tmp_path):
        (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
        (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
        with pytest.raises(DataError, match="no such file or folder"):
            read_rows(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("name", ["a\0b.jsonl", "a\udcffb.jsonl", "x" * 5000 + ".jsonl", "x" * 5000])
    def test_names_that_no_file_can_have(self, name, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(DataError):
            read_rows(name)

    def test_an_unreadable_file(self, tmp_path):
        path = write(tmp_path / "x.jsonl", LINE)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read every file")
        with pytest.raises(DataError, match="could not be read: PermissionError"):
            read_rows(path)

    def test_a_file_that_goes_away(self, tmp_path, monkeypatch):
        path = write(tmp_path / "x.jsonl", LINE)
        opened = sources._opened

        def unlinked(path, name):
            path.unlink()
            return opened(path, name)

        monkeypatch.setattr(sources, "_opened", unlinked)
        with pytest.raises(DataError, match="could not be read: FileNotFoundError"):
            read_rows(path)


class TestFolders:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def folder(self, tmp_path, name="data") -> Path:
        (tmp_path / "inner" / name).mkdir(parents=True)
        return tmp_path / "inner" / name

    def test_one_named_like_a_file(self, tmp_path):
        folder = self.folder(tmp_path, "x.jsonl")
        write(folder / "train.jsonl", LINE)
        assert [parse_row(row).chosen for row in read_rows(folder)] == ["c"]

    @pytest.mark.parametrize("odd", ["a pipe", "a circle", "a folder"])
    def test_beside_a_data_file(self, tmp_path, odd):
        folder = self.folder(tmp_path)
        write(folder / "train.jsonl", LINE)
        if odd == "a pipe":
            os.mkfifo(folder / "a.jsonl")
        elif odd == "a circle":
            (folder / "a").symlink_to(folder)
        else:
            (folder / "a.jsonl").mkdir()
        assert len(read_rows(folder)) == 1

    def test_the_cause_is_said(self, tmp_path):
        folder = self.folder(tmp_path)
        write(folder / "train.jsonl", LINE + b"\n{bad\n")
        with pytest.raises(DataError, match=r"could not be read as a data set: .*\(JSON parse error"):
            read_rows(folder)

    @pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
    def test_an_archive_writes_nothing_outside(self, tmp_path, kind):
        folder = self.folder(tmp_path)
        names = ("../escaped.jsonl", "../../escaped.jsonl", str(tmp_path / "escaped.jsonl"), "in.jsonl")
        if kind == "zip":
            with zipfile.ZipFile(folder / "a.zip", "w") as archive:
                for name in names:
                    archive.writestr(name, LINE)
        else:
            with tarfile.open(folder / f"a.{kind}", "w:gz" if kind == "tar.gz" else "w") as archive:
                for name in names:
                    member = tarfile.TarInfo(name)
                    member.size = len(LINE)
                    archive.addfile(member, io.BytesIO(LINE))
        with pytest.raises(DataError):
            pairs_of(folder)
        assert list(tmp_path.rglob("*escaped*")) == []

    def test_code_is_not_run(self, tmp_path):
        folder, witness = self.folder(tmp_path, "script"), tmp_path / "witness"
        write(folder / "train.jsonl", LINE)
        (folder / "script.py").write_text(f"open({str(witness)!r}, 'w')")
        with pytest.raises(DataError, match="could not be read as a data set"):
            read_rows(folder)
        assert not witness.exists()

    def test_objects_in_its_card_are_not_built(self, tmp_path):
        folder, witness = self.folder(tmp_path), tmp_path / "witness"
        write(folder / "train.jsonl", LINE)
        (folder / "README.md").write_text(f"---\nx: !!python/object/apply:os.system ['touch {witness}']\n---\n")
        with pytest.raises(DataError, match="could not be read as a data set"):
            read_rows(folder)
        assert not witness.exists()
