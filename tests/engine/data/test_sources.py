"""Reading preference rows from files, folders and the hub, and detecting the format of each."""

import gzip
import json
import pickle
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fused_dpo_engine.data.formats import Row, parse_row
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.errors import DataError, bad_row
from tests.engine.support.toys import PREFERENCES, assistant, user

REAL_FILES = {
    "dpo_en.conversational.jsonl": 300,
    "dpo_zh.conversational.jsonl": 300,
    "hh_helpful.conversational.jsonl": 1800,
    "hh_helpful.strings.jsonl": 300,
    "qa_long_prompts.strings.jsonl": 200,
}
STRINGS = {"prompt": "天空是什么颜色", "chosen": "蓝色。", "rejected": "绿色。"}


def parse(values):
    return parse_row(Row(values, "pairs.jsonl:17"))


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class TestSources:
    def test_jsonl_skips_blank_lines_and_counts_them(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        line = json.dumps(STRINGS, ensure_ascii=False)
        path.write_bytes(f"\ufeff{line}\r\n\n   \n{line}".encode())
        rows = read_rows(path)
        assert [row.values for row in rows] == [STRINGS, STRINGS]
        assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]

    def test_jsonl_lines_end_at_newlines_only(self, tmp_path):
        values = {**STRINGS, "chosen": "one\u2028two\x85three"}
        assert read_rows(write_lines(tmp_path / "pairs.jsonl", values, STRINGS))[0].values == values

    def test_where_names_the_source_as_given(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_lines(tmp_path / "pairs.jsonl", STRINGS)
        assert read_rows("pairs.jsonl")[0].where == "pairs.jsonl:1"

    def test_jsonl_zst(self, tmp_path):
        path = tmp_path / "pairs.jsonl.zst"
        packed = pyarrow.compress(json.dumps(STRINGS).encode() + b"\n", codec="zstd", asbytes=True)
        path.write_bytes(packed)
        assert read_rows(path)[0].values == STRINGS
        path.write_bytes(packed[:-12])
        with pytest.raises(DataError, match=r"pairs\.jsonl\.zst: could not be read: OSError"):
            read_rows(path)

    def test_csv(self, tmp_path):
        path = tmp_path / "pairs.csv"
        long = "x" * 200_000  # beyond the csv module's usual limit
        path.write_text(f'\ufeffprompt,chosen,rejected,id\n"a ""b"", c",{long},"two\nlines",\nd,e\n', encoding="utf-8")
        first, second = read_rows(path)
        assert first.values == {"prompt": 'a "b", c', "chosen": long, "rejected": "two\nlines", "id": None}
        assert (first.where, second.where) == (f"{path}:3", f"{path}:4")  # the lines where they end
        with pytest.raises(DataError, match=r"pairs\.csv:4: .*missing \['rejected'\]"):
            parse_row(second)

    def test_a_line_of_a_table_with_too_many_cells(self, tmp_path):
        path = tmp_path / "pairs.tsv"
        path.write_text("prompt\tchosen\trejected\na\tb\tc\td\na\tb\tc\n")
        first, second = read_rows(path)
        assert second.values == {"prompt": "a", "chosen": "b", "rejected": "c"}
        with pytest.raises(DataError, match=r"pairs\.tsv:2: the line has more cells than the first one has names"):
            parse_row(first)

    def test_a_table_that_is_no_utf8(self, tmp_path):
        path = tmp_path / "pairs.csv"
        path.write_bytes("prompt,chosen,rejected\n\xe4,b,c\n".encode("latin-1"))
        with pytest.raises(DataError, match="not a readable table in UTF-8"):
            read_rows(path)

    @pytest.mark.parametrize("name", ["PAIRS.JSONL", "pairs.Jsonl.GZ"])
    def test_letters_of_a_suffix_may_be_large(self, tmp_path, name):
        line = json.dumps(STRINGS).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("GZ") else line)
        assert read_rows(tmp_path / name)[0].values == STRINGS

    def test_jsonl_gz(self, tmp_path):
        path = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(STRINGS).encode()))
        assert read_rows(path)[0].values == STRINGS
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(DataError, match=r"pairs\.jsonl\.gz: could not be read: EOFError"):
            read_rows(path)

    @pytest.mark.parametrize(
        ("line", "reason", "message"),
        [
            (b'{"prompt": "a", ', "malformed line", r"pairs\.jsonl:2: each line must be one JSON object.*got '\{\"pro"),
            (b'{"prompt": "\xff"}', "malformed line", r"pairs\.jsonl:2: .*UTF-8.*can't decode byte 0xff"),
            (b"[" * 100_000, "malformed line", r"pairs\.jsonl:2: each line must be"),
            (b'["a", "b"]', "not an object", r"pairs\.jsonl:2: a row must be a JSON object, got \['a', 'b'\]"),
            (b"null", "not an object", r"pairs\.jsonl:2: a row must be a JSON object, got None"),
        ],
    )
    def test_a_bad_line_spoils_only_its_own_row(self, tmp_path, line, reason, message):
        path = tmp_path / "pairs.jsonl"
        good = json.dumps(STRINGS).encode()
        path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
        rows = read_rows(path)
        assert [row.error is None for row in rows] == [True, False, True]
        with pytest.raises(DataError, match=message) as caught:
            parse_row(rows[1])
        assert caught.value.reason == reason
        assert "--skip-bad-rows" in str(caught.value)
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
    def test_json(self, tmp_path, wrap):
        path = tmp_path / "pairs.json"
        path.write_text("\ufeff" + json.dumps(wrap([STRINGS, 3])), encoding="utf-8")
        rows = read_rows(path)
        assert rows[0] == Row(STRINGS, f"{path} row 1")
        with pytest.raises(DataError, match=r"pairs\.json row 2: a row must be a JSON object, got 3"):
            parse_row(rows[1])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": 1}\n{"a": 2}', r"pairs\.json: not valid JSON: Extra data.*named \.jsonl"),
            ('{"rows": []}', r"pairs\.json: must hold a list of objects.*got \{'rows': \[\]\}; .*named \.jsonl"),
            ('{"data": "x"}', r"pairs\.json: must hold a list of objects"),
            ("7", r"pairs\.json: must hold a list of objects.*got 7"),
            ("[]", r"pairs\.json: holds no rows"),
            ("", r"pairs\.json: holds no rows"),
        ],
    )
    def test_json_of_another_shape(self, tmp_path, text, message):
        (tmp_path / "pairs.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / "pairs.json")

    def test_parquet(self, tmp_path):
        path = tmp_path / "pairs.parquet"
        rows = [
            {"prompt": [user("你好")], "chosen": [assistant("您好")], "rejected": [assistant("?")], "score": 1.5},
            {"prompt": [{**user("x"), "name": "Ann"}], "chosen": [assistant("y")], "rejected": [assistant("z")]},
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        read = read_rows(path)
        assert [row.where for row in read] == [f"{path} row 1", f"{path} row 2"]
        assert [parse_row(row).prompt for row in read] == [rows[0]["prompt"], rows[1]["prompt"]]
        path.write_bytes(b"PAR1 not really PAR1")
        with pytest.raises(DataError, match=r"pairs\.parquet: not a readable Parquet file"):
            read_rows(path)

    @pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
    def test_empty_file(self, tmp_path, content):
        (tmp_path / "pairs.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"pairs\.jsonl: holds no rows"):
            read_rows(tmp_path / "pairs.jsonl")

    def test_missing_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for source in ("pairs.jsonl", "./pairs", Path("pairs"), "a b", "x/y/z"):
            with pytest.raises(DataError, match=rf"no such file or folder \(looked for {re.escape(str(tmp_path))}"):
                read_rows(source)

    def test_unknown_suffix(self, tmp_path):
        (tmp_path / "pairs.xlsx").write_text("prompt,chosen,rejected\n")
        with pytest.raises(DataError, match=r"pairs\.xlsx: the file's name must end in one of \.jsonl, .*\.parquet"):
            read_rows(tmp_path / "pairs.xlsx")


class TestDataSets:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def test_folder_of_data_files(self, tmp_path):
        folder = tmp_path / "pairs"
        folder.mkdir()
        write_lines(folder / "train.jsonl", STRINGS, STRINGS)
        write_lines(folder / "test.jsonl", {**STRINGS, "chosen": "test"})
        assert [row.where for row in read_rows(folder)] == [f"{folder} (train) row 1", f"{folder} (train) row 2"]
        assert [row.values["chosen"] for row in read_rows(str(folder), split="test")] == ["test"]
        with pytest.raises(DataError, match="could not be read as a data set: ValueError: Unknown split"):
            read_rows(folder, split="valid")

    def test_empty_folder(self, tmp_path):
        (tmp_path / "pairs").mkdir()
        with pytest.raises(
            DataError, match=r"pairs: the folder could not be read as a data set: .*must come from Data"
        ):
            read_rows(tmp_path / "pairs")

    def test_saved_data_sets(self, tmp_path):
        import datasets

        values = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
        dataset = datasets.Dataset.from_list([values])
        dataset.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
        for rows in (read_rows(tmp_path / "one"), read_rows(tmp_path / "two", split="test")):
            assert [row.values for row in rows] == [values]
        with pytest.raises(DataError, match=r"two: has no split 'valid'; choose one of \['test', 'train'\]"):
            read_rows(tmp_path / "two", split="valid")

    def test_hub_name(self, monkeypatch):
        import datasets

        asked = []

        def load_dataset(name, split):
            asked.append((name, split))
            return [STRINGS]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read_rows("someone/pairs", split="test_prefs") == [Row(STRINGS, "someone/pairs (test_prefs) row 1")]
        assert asked == [("someone/pairs", "test_prefs")]

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ConnectionError("Couldn't reach it"), "the Hugging Face Hub cannot be reached: ConnectionError: Couldn't"),
            (FileNotFoundError("doesn't exist"), "the Hugging Face Hub did not deliver it: FileNotFoundError: doesn't"),
            (ValueError("Config name is missing"), "did not deliver it: ValueError: Config name is missing"),
        ],
    )
    def test_hub_that_does_not_deliver(self, monkeypatch, error, message):
        import datasets

        def load_dataset(name, split):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            DataError, match=rf"^someone/pairs: there is no such file.*{message}.*pass the local folder"
        ):
            read_rows("someone/pairs")


class TestFormats:
    def test_strings(self):
        preference = parse({**STRINGS, "score": 3, "messages": None})
        assert (preference.prompt, preference.chosen, preference.rejected) == tuple(STRINGS.values())
        assert preference.where == "pairs.jsonl:17"

    @pytest.mark.parametrize(
        ("chosen", "rejected", "prompt"),
        [
            ("The sky is blue.", "The sky is black.", "The sky is"),
            ("Q: Why?\n\nA: So.", "Q: Why?\n\nA: Soon.", "Q: Why?\n\nA:"),
            ("Q: Why? A", "Q: Why? A B", "Q: Why? A"),
            ("你好吗\uff1f我很好", "你好吗\uff1f我不好", "你好吗\uff1f我"),
        ],
    )
    def test_strings_without_prompt_part_after_whole_words(self, chosen, rejected, prompt):
        preference = parse({"chosen": chosen, "rejected": rejected})
        assert preference.prompt == prompt
        assert preference.implied
        assert (prompt + preference.chosen, prompt + preference.rejected) == (chosen, rejected)

    @pytest.mark.parametrize(
        ("chosen", "rejected"), [("ab", "ac"), ("The cat", "There"), ("The cat", "The dog"), ("我很好", "我不好")]
    )
    def test_letters_or_a_word_that_answers_happen_to_share_are_no_prompt(self, chosen, rejected):
        with pytest.raises(DataError, match="at least two words or a message") as caught:
            parse({"chosen": chosen, "rejected": rejected})
        assert caught.value.reason == "no common beginning"

    @pytest.mark.parametrize("name", ["problem", "context", "history", "article"])
    def test_a_question_in_another_column_is_named(self, name):
        values = {name: "Why?", "chosen": "The sky is blue.", "rejected": "The sky is black."}
        with pytest.raises(DataError, match=f"columns that look like one: {name}; .*--columns prompt={name}") as caught:
            parse(values)
        assert caught.value.reason == "prompt in another column"
        assert parse({**values, name: None}).prompt == "The sky is"

    @pytest.mark.parametrize("prompt", ["What is that?", "abcdefgh"])
    def test_a_prompt_that_both_texts_repeat_is_split_off(self, prompt):
        preference = parse({"prompt": prompt, "chosen": f"{prompt} A.", "rejected": f"{prompt} B."})
        assert (preference.prompt, preference.chosen, preference.rejected) == (prompt, " A.", " B.")
        preference = parse({"prompt": prompt, "chosen": f"{prompt} A.", "rejected": "B."})
        assert preference.chosen == f"{prompt} A."

    def test_a_short_word_that_both_answers_begin_with_is_no_repeated_prompt(self):
        assert parse({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi."}).chosen == "Hi there"

    def test_a_conversation_that_both_answers_repeat_is_split_off(self):
        asked = [user("a")]
        preference = parse({"prompt": asked, "chosen": [*asked, assistant("b")], "rejected": [*asked, assistant("c")]})
        assert (preference.prompt, preference.chosen, preference.rejected) == (
            asked,
            [assistant("b")],
            [assistant("c")],
        )

    @pytest.mark.parametrize("missing", [{}, {"prompt": None}])
    def test_no_prompt_and_a_null_prompt_are_the_same(self, missing):
        preference = parse({**missing, "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]})
        assert preference.prompt == [user("a")]

    @pytest.mark.parametrize("name", ["images", "audio"])
    def test_what_a_model_of_text_cannot_see_is_refused(self, name):
        with pytest.raises(DataError, match=f"the row has {name}; text alone can be trained on"):
            parse({**STRINGS, name: ["x.png"]})
        assert parse({**STRINGS, name: []}).prompt == STRINGS["prompt"]

    @pytest.mark.parametrize("response", [[assistant("b")], assistant("b"), "b"])
    def test_conversations(self, response):
        prompt = [{"role": "system", "content": ""}, user("a")]
        preference = parse({"prompt": prompt, "chosen": response, "rejected": [assistant("c")]})
        assert preference.prompt == prompt
        assert preference.chosen == [assistant("b")]
        assert preference.rejected == [assistant("c")]

    def test_conversations_without_prompt(self):
        a, b, c, d = user("a"), assistant("b"), user("c"), assistant("d")
        preference = parse({"chosen": [a, b, c, d], "rejected": [a, b, c, assistant("e")]})
        assert (preference.prompt, preference.chosen, preference.rejected) == ([a, b, c], [d], [assistant("e")])
        preference = parse({"chosen": [a, b], "rejected": [a, b, c, d]})
        assert (preference.prompt, preference.chosen, preference.rejected) == ([a], [b], [b, c, d])

    def test_keys_that_are_none_in_a_message_are_left_out(self):
        message = {**assistant("b"), "tool_calls": None, "name": "Ann"}
        preference = parse({"prompt": [user("a")], "chosen": [message], "rejected": "c"})
        assert preference.chosen == [{**assistant("b"), "name": "Ann"}]

    @pytest.mark.parametrize(
        ("values", "reason", "message"),
        [
            ({"prompt": "a", "chosen": "b"}, "missing key", r"missing \['rejected'\], got the keys 'prompt', 'chosen'"),
            (
                {},
                "missing key",
                r"missing \['chosen', 'rejected'\], got the keys none; name the columns with --columns",
            ),
            ({**STRINGS, "prompt": 3}, "wrong type", '"prompt" must be text or a list of messages, got 3'),
            ({**STRINGS, "chosen": None}, "missing key", r"missing \['chosen'\]"),
            ({**STRINGS, "rejected": 1.5}, "wrong type", r'"rejected" must be text, got 1\.5'),
            ({"chosen": None, "rejected": None}, "missing key", r"missing \['chosen', 'rejected'\]"),
            (
                {"prompt": ["a"], "chosen": "b", "rejected": "c"},
                "wrong type",
                r'"prompt" must be a list of messages \{"role": text, "content": text\}, got the item \'a\'',
            ),
            (
                {"prompt": [user("a")], "chosen": 3, "rejected": "c"},
                "wrong type",
                '"chosen" must be a list of messages, a message or text, got 3',
            ),
            (
                {"prompt": [user("a")], "chosen": {"content": "b"}, "rejected": "c"},
                "wrong type",
                r'"chosen" must be a list of messages .*, got the item \{\'content\': \'b\'\}',
            ),
            (
                {"prompt": [user("a")], "chosen": [assistant(None)], "rejected": "c"},
                "wrong type",
                '"content of the assistant message in chosen" must be text, got None',
            ),
            (
                {"prompt": [], "chosen": "b", "rejected": "c"},
                "empty messages",
                '"prompt" must hold at least one message, got an empty list',
            ),
            (
                {"prompt": [user("a")], "chosen": "b", "rejected": []},
                "fewer than two answers",
                '"rejected" must hold at least one answer, got an empty list',
            ),
            (
                {**STRINGS, "rejected": STRINGS["chosen"]},
                "chosen equals rejected",
                '"chosen" and "rejected" must differ, got \'蓝色。\' for both',
            ),
            (
                {"prompt": [user("a")], "chosen": "b", "rejected": [assistant("b")]},
                "chosen equals rejected",
                '"chosen" and "rejected" must differ',
            ),
            ({"chosen": [assistant("a")], "rejected": [assistant("a")]}, "chosen equals rejected", "must differ"),
            (
                {"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]},
                "response of another role",
                "must begin with a message of the role assistant .*gpt.*, got the role 'user'",
            ),
            (
                {"prompt": "a", "chosen": '[{"role": "assistant", "content": "b', "rejected": "c"},
                "malformed messages",
                '"chosen" looks like messages written as JSON, but they cannot be read',
            ),
            (
                {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
                "mixed formats",
                'must not mix text and messages, got: "prompt" is text but "chosen" is .*remove prompt',
            ),
            ({**STRINGS, "rejected": assistant("b")}, "mixed formats", '"prompt" is text but "rejected" is'),
            ({"chosen": "a", "rejected": [user("a")]}, "mixed formats", 'one answer is text but "rejected" is'),
            (
                {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
                "no common beginning",
                'without "prompt", "chosen" and "rejected" must share a beginning, .*put the question into',
            ),
            ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "no common beginning", "must share a beginn"),
            ({"chosen": "yes", "rejected": "no"}, "no common beginning", "got 'yes' and 'no'; put the question"),
            (
                {**STRINGS, "chosen": "ab\ud800"},
                "invalid Unicode",
                '"chosen" must be valid Unicode, got a lone surrogate at character 2',
            ),
        ],
    )
    def test_bad_rows(self, values, reason, message):
        with pytest.raises(DataError, match=r"^pairs\.jsonl:17: .*" + message) as caught:
            parse(values)
        assert caught.value.reason == reason
        assert str(caught.value).endswith(". --skip-bad-rows drops and counts such rows")

    def test_messages_stay_short(self):
        with pytest.raises(DataError) as caught:
            parse({"prompt": "a", "chosen": [assistant("x" * 100_000)] * 1000, "rejected": "c"})
        assert len(str(caught.value)) < 1000

    def test_errors_survive_pickling(self):
        error = bad_row("pairs.jsonl:17", "no", "unusable")
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.reason) == (str(error), error.reason)


@pytest.mark.parametrize(("name", "count"), REAL_FILES.items())
def test_real_files(name, count):
    path = PREFERENCES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = read_rows(path)
    assert len(rows) == count
    preferences = [parse_row(row) for row in rows]
    assert {type(preference.prompt) for preference in preferences} == {list if "conversational" in name else str}
