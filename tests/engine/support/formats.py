"""A row of each format, and what it asks; docs/data.md shows the same rows."""

import json
from typing import Any, NamedTuple

from tests.engine.support.toys import assistant, user

SYSTEM = {"role": "system", "content": "Be brief."}
COLOUR, BLUE, RED = user("A colour?"), assistant("Blue"), assistant("Red")
TOOL = {"type": "function", "function": {"name": "get_weather"}}


class Example(NamedTuple):
    """A row, and its parts as they are trained."""

    row: dict[str, Any]
    prompt: Any
    chosen: Any
    rejected: Any


SAID = {"from": "human", "value": "A colour?"}
EXAMPLES = {
    "TRL, texts": Example({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "2 + 2 =", " 4", " 5"),
    "TRL, conversation": Example({"prompt": [COLOUR], "chosen": [BLUE], "rejected": [RED]}, [COLOUR], [BLUE], [RED]),
    "TRL, implicit prompt": Example({"chosen": [COLOUR, BLUE], "rejected": [COLOUR, RED]}, [COLOUR], [BLUE], [RED]),
    "TRL, implicit prompt of text": Example(
        {"chosen": "Q: Why? A: So.", "rejected": "Q: Why? A: No."}, "Q: Why? A:", " So.", " No."
    ),
    "TRL, tools": Example(
        {"prompt": [COLOUR], "chosen": [BLUE], "rejected": [RED], "tools": [TOOL]}, [COLOUR], [BLUE], [RED]
    ),
    "UltraFeedback": Example(
        {"prompt": "A colour?", "chosen": [COLOUR, BLUE], "rejected": [COLOUR, RED]}, [COLOUR], [BLUE], [RED]
    ),
    "Orca": Example(
        {"system": "Be brief.", "question": "A colour?", "chosen": "Blue", "rejected": "Red"},
        [SYSTEM, COLOUR],
        [BLUE],
        [RED],
    ),
    "alpaca": Example(
        {"instruction": "Translate.", "input": "Blau", "chosen": "Blue", "rejected": "Red"},
        [user("Translate.\n\nBlau")],
        [BLUE],
        [RED],
    ),
    "alpaca, older": Example({"instruction": "A colour?", "output": ["Blue", "Red"]}, [COLOUR], [BLUE], [RED]),
    "LLaMA-Factory sharegpt": Example(
        {
            "conversations": [SAID],
            "chosen": {"from": "gpt", "value": "Blue"},
            "rejected": {"from": "gpt", "value": "Red"},
        },
        [COLOUR],
        [BLUE],
        [RED],
    ),
    "ms-swift, rejected_response": Example(
        {"system": "Be brief.", "messages": [COLOUR, BLUE], "rejected_response": "Red"}, [SYSTEM, COLOUR], [BLUE], [RED]
    ),
    "ms-swift, rejected_messages": Example(
        {"messages": [COLOUR, BLUE], "rejected_messages": [COLOUR, RED]}, [COLOUR], [BLUE], [RED]
    ),
    "OpenAI": Example(
        {"input": {"messages": [COLOUR]}, "preferred_output": [BLUE], "non_preferred_output": [RED]},
        [COLOUR],
        [BLUE],
        [RED],
    ),
    "NeMo": Example(
        {
            "context": [COLOUR],
            "completions": [{"rank": 1, "completion": [RED]}, {"rank": 0, "completion": [BLUE]}],
        },
        [COLOUR],
        [BLUE],
        [RED],
    ),
    "several rejected": Example(
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": [" 5", " 22"]}, "2 + 2 =", " 4", " 22"
    ),
    "answers with scores": Example(
        {"prompt": "2 + 2 =", "responses": [" 22", " 4"], "scores": [1.5, 9]}, "2 + 2 =", " 4", " 22"
    ),
}


def table() -> str:
    """Write the examples as a table in Markdown."""
    lines = ["| format | a row |", "|---|---|"]
    lines += [f"| {name} | `{json.dumps(example.row)}` |" for name, example in EXAMPLES.items()]
    return "\n".join(lines)
