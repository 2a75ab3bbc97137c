"""The formats of other trainers, and columns under other names."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from fused_dpo_engine.data.columns import renamed, renaming
from fused_dpo_engine.data.formats import Row, parse_row
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError, UserError
from tests.engine.support.formats import BLUE, COLOUR, EXAMPLES, RED, SAID, SYSTEM, table
from tests.engine.support.tokenization import chat_tokenizer, make_rows, scored
from tests.engine.support.toys import assistant, user

ROOT = Path(__file__).parents[3]


def parse(values):
    return parse_row(Row(values, "pairs.jsonl:17"))


def parts(preference):
    return preference.prompt, preference.chosen, preference.rejected


@pytest.mark.parametrize("name", EXAMPLES)
class TestExamples:
    def test_parts(self, name):
        example = EXAMPLES[name]
        preference = parse(example.row)
        assert parts(preference) == example[1:]
        assert preference.used == frozenset(example.row)  # nothing of the row is lost
        assert preference.tools == example.row.get("tools", [])

    def test_tables_of_text_hold_the_same(self, name, tmp_path):
        if name in ("several rejected", "alpaca, older"):
            pytest.skip("a rejected answer that looks like a list of texts in JSON is a text: it may be meant so")
        # Conversations in a table are JSON text; in a columnar file other rows' columns are there too, and null.
        example = EXAMPLES[name]
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in example.row.items()}
        path = tmp_path / "Rows.TSV"
        cells = ['"' + v.replace('"', '""') + '"' for v in values.values()]
        path.write_text("\t".join([*values, "more"]) + "\n" + "\t".join([*cells, ""]) + "\n", encoding="utf-8")
        (row,) = read_rows(path)
        assert row.values == {**values, "more": None}
        assert parts(parse_row(row)) == example[1:]


def test_the_documentation_shows_them():
    assert table() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


class TestFormats:
    def test_a_system_column_stands_first_unless_there_is_a_system_message(self):
        row = {"system": "Be brief.", "prompt": [COLOUR], "chosen": "Blue", "rejected": "Red"}
        assert parse(row).prompt == [SYSTEM, COLOUR]
        assert parse({**row, "system": "Other.", "prompt": [SYSTEM, COLOUR]}).prompt == [SYSTEM, COLOUR]
        assert parse({**row, "prompt": "A colour?"}).prompt == [SYSTEM, COLOUR]
        assert parse({**row, "prompt": None, "chosen": [COLOUR, BLUE], "rejected": [COLOUR, RED]}).prompt == [
            SYSTEM,
            COLOUR,
        ]

    def test_earlier_turns_of_alpaca(self):
        row = {"instruction": "And now?", "history": [["A colour?", "Blue"]], "chosen": "Red", "rejected": "No"}
        assert parse(row).prompt == [COLOUR, BLUE, user("And now?")]
        with pytest.raises(DataError, match='"history" must be a list of pairs'):
            parse({**row, "history": ["A colour?"]})

    def test_sharegpt_with_tools_results_and_synonyms(self):
        said = [SAID, {"from": "observation", "value": "3"}]
        row = {"conversations": said, "chosen": {"from": "model", "value": "Blue"}, "rejected": "Red"}
        assert parse(row).prompt == [COLOUR, {"role": "tool", "content": "3"}]
        assert parse(row).chosen == [BLUE]

    def test_tools_beside_messages(self):
        tools = [{"type": "function", "function": {"name": "f"}}]
        row = {
            "input": {"messages": [COLOUR], "tools": tools},
            "preferred_output": [BLUE],
            "non_preferred_output": [RED],
        }
        assert parse(row).tools == tools
        assert parse({**EXAMPLES["TRL, conversation"].row, "tools": json.dumps(tools)}).tools == tools
        for bad, message in (("nonsense", "is text that is no JSON"), ({"a": 1}, "must be a list of schemas")):
            with pytest.raises(DataError, match=message):
                parse({**EXAMPLES["TRL, conversation"].row, "tools": bad})

    def test_ms_swift_without_messages(self):
        with pytest.raises(DataError, match='"messages" must be a list of at least one message'):
            parse({"messages": [], "rejected_response": "Red"})

    @pytest.mark.parametrize(
        "row", [{"chosen": "a"}, {"messages": [COLOUR, BLUE]}, {"input": [COLOUR], "preferred_output": [BLUE]}]
    )
    def test_no_format(self, row):
        with pytest.raises(DataError, match=r'needs "chosen" and "rejected".*--columns chosen=better') as caught:
            parse(row)
        assert caught.value.reason == "missing key"

    def test_capital_letters_in_names_make_no_difference(self):
        preference = parse({"Prompt": "A colour?", "CHOSEN": "Blue", "Rejected": "Red", "ID": 3})
        assert parts(preference) == ("A colour?", "Blue", "Red")
        assert preference.used == {"Prompt", "CHOSEN", "Rejected"}
        with pytest.raises(DataError, match="columns that look like one: problem"):
            parse({"Problem": "Why?", "chosen": "The sky is blue.", "rejected": "The sky is black."})

    def test_a_prompt_of_one_message(self):
        assert parse({"prompt": COLOUR, "chosen": BLUE, "rejected": RED}).prompt == [COLOUR]

    @pytest.mark.parametrize("nothing", ["", []])
    def test_an_empty_prompt_beside_whole_conversations(self, nothing):
        preference = parse({"prompt": nothing, "chosen": [COLOUR, BLUE], "rejected": [COLOUR, RED]})
        assert parts(preference) == ([COLOUR], [BLUE], [RED])


class TestNames:
    ROW: ClassVar = {"ask": "A?", "good": "B", "bad": "C", "prompt": "not this"}

    def test_columns_get_their_names(self):
        columns = renaming(("prompt=ask", "chosen=good", "rejected=bad"))
        values = renamed(self.ROW, columns, "x:1")
        assert values == {"prompt": "A?", "chosen": "B", "rejected": "C"}

    def test_they_can_swap(self):
        assert renamed({"chosen": 1, "rejected": 2}, renaming(("chosen=rejected", "rejected=chosen")), "x:1") == {
            "chosen": 2,
            "rejected": 1,
        }

    def test_a_column_that_is_not_there(self):
        with pytest.raises(DataError, match=r"^x:1: --columns names \['asked'\], but the row has 'ask', 'good'"):
            renamed(self.ROW, {"prompt": "asked"}, "x:1")

    @pytest.mark.parametrize("pairs", [("prompt",), ("=a",), ("a=",)])
    def test_malformed(self, pairs):
        with pytest.raises(UserError, match="columns takes pairs of a name and a column, such as prompt=question"):
            renaming(pairs)

    def test_a_name_twice(self):
        with pytest.raises(UserError, match="columns names a twice"):
            renaming(("a=b", "a=c"))

    def test_tokenized_under_their_names(self):
        columns = renaming(("prompt=ask", "chosen=good", "rejected=bad"))
        result = tokenize_pairs(make_rows(self.ROW), chat_tokenizer(), max_length=100, columns=columns)
        assert scored(chat_tokenizer(), result.pairs[0]) == ("B</s>", "C</s>")


class TestReport:
    def test_unused_columns_are_listed_once(self):
        row = {**EXAMPLES["Orca"].row, "id": 3, "nothing": None}
        result = tokenize_pairs(make_rows(row, {**row, "source_id": "x"}), chat_tokenizer(), max_length=200)
        assert result.report.unused_columns == ("id", "source_id")
        assert result.report.summary().count("columns not used: id, source_id") == 1

    def test_rows_of_answers_alone_are_not_chosen_by_chance(self):
        same = {"chosen": "It is a cat.", "rejected": "It is a dog."}
        other = {"chosen": "Yes, I do.", "rejected": "No."}
        settings = {"max_length": 100, "skip_bad_rows": True}
        with pytest.raises(DataError, match="3 of 4 rows without a prompt have answers with nothing in common"):
            tokenize_pairs(make_rows(same, other, other, other), chat_tokenizer(), **settings)
        # Negative control: one in twenty may be apart.
        result = tokenize_pairs(make_rows(*[same] * 20, other), chat_tokenizer(), **settings)
        assert result.report.skipped == {"no common beginning": 1}


def test_null_and_missing_are_the_same_at_every_depth(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def call(arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    rows = [
        {"prompt": [COLOUR], "chosen": [call({"city": "Rome"})], "rejected": [assistant("Red")]},
        {"prompt": [COLOUR], "chosen": [call({"query": "Rome"})], "rejected": [assistant("Red")]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columnar = read_rows(tmp_path / "rows.parquet")
    assert columnar[0].values["chosen"][0]["tool_calls"][0]["function"]["arguments"]["query"] is None
    assert [parts(parse_row(row)) for row in columnar] == [parts(parse(row)) for row in rows]
