"""Rows of more than two answers: their forms, and the pairs that they become."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest

from fused_dpo_engine.data.answers import read_answers
from fused_dpo_engine.data.ranking import ranked_pairs, token_pairs
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.tokenization import bpe_tokenizer, chat_tokenizer, make_rows, scored
from tests.engine.support.toys import assistant, user

WHERE = "ranked.jsonl:7"


def read_ranking(values: dict[str, Any], where: str) -> Any:
    """Answers and scores as lists."""
    answers = read_answers(values, where)
    return answers and (list(answers.texts), answers.scores and list(answers.scores))


def read(**values: Any) -> Any:
    return read_ranking(values, WHERE)


class TestChosenAndRejected:
    def test_two_answers(self):
        assert read(prompt="p", chosen="a", rejected="b") == (["a", "b"], None)

    @pytest.mark.parametrize(
        ("rejected", "answers"),
        [
            (["b", "c"], ["b", "c"]),
            ([[assistant("b")], [assistant("c")]], [[assistant("b")], [assistant("c")]]),
            # Negative controls: a list of messages is one conversation, also one of two messages of the assistant.
            ([assistant("b")], [[assistant("b")]]),
            ([user("q"), assistant("b")], [[user("q"), assistant("b")]]),
            ([assistant("b"), assistant("c")], [[assistant("b"), assistant("c")]]),
        ],
        ids=["texts", "conversations", "a response", "a conversation", "two messages"],
    )
    def test_a_list_of_rejected_answers(self, rejected, answers):
        chosen = "a" if isinstance(rejected[0], str) else [assistant("a")]
        assert read(prompt="p", chosen=chosen, rejected=rejected) == ([chosen, *answers], None)

    @pytest.mark.parametrize(
        ("better", "worse"),
        [
            ("chosen_score", "rejected_score"),
            ("score_chosen", "score_rejected"),  # UltraFeedback, binarized
            ("chosen-rating", "rejected-rating"),  # argilla's mixes
            ("chosen_rating", "rejected_rating"),
            ("Chosen_Reward", "Rejected_Reward"),
        ],
    )
    def test_scores(self, better, worse):
        row = {"chosen": "a", "rejected": "b", better: 8.5, worse: 7}
        assert read_ranking(row, WHERE) == (["a", "b"], [8.5, 7.0])

    def test_ranks_are_negated(self):
        assert read(chosen="a", rejected="b", chosen_rank=1, rejected_rank=3) == (["a", "b"], [-1.0, -3.0])

    def test_rejected_answers_are_put_in_order(self):
        got = read(chosen="a", rejected=["b", "c", "d"], chosen_score=5, rejected_scores=[1, 3, 2])
        assert got == (["a", "c", "d", "b"], [5.0, 3.0, 2.0, 1.0])

    def test_a_tie_of_scores_leaves_the_columns_word(self):
        assert read(chosen="a", rejected="b", chosen_score=4, rejected_score=4) == (["a", "b"], None)

    def test_half_of_the_scores_are_none(self):
        assert read(chosen="a", rejected="b", chosen_score=4, rejected_score=None) == (["a", "b"], None)

    def test_other_columns_are_not_scores(self):
        assert read(chosen="a", rejected="b", score=3, chosen_model="m", rejected_model="n") == (["a", "b"], None)


class TestLists:
    @pytest.mark.parametrize("name", ["responses", "completions", "answers", "generations"])
    @pytest.mark.parametrize("scores", ["scores", "ratings", "rewards"])
    def test_parallel_scores(self, name, scores):
        row = {"prompt": "p", name: ["x", "y", "z"], scores: [1, 3.5, 2]}
        assert read_ranking(row, WHERE) == (["y", "z", "x"], [3.5, 2.0, 1.0])

    def test_parallel_ranks(self):
        assert read(responses=["x", "y", "z"], ranks=[2, 1, 3]) == (["y", "x", "z"], [-1.0, -2.0, -3.0])

    def test_ties_stay_in_order(self):
        assert read(responses=["x", "y", "z"], scores=[1, 2, 1]) == (["y", "x", "z"], [2.0, 1.0, 1.0])

    def test_objects(self):
        answers = [
            {"model": "m", "response": "x", "overall_score": 6.0},  # UltraFeedback
            {"text": "y", "score": 7},
            {"messages": [assistant("z")], "rating": 1},
            {**assistant("w"), "score": 8},
        ]
        expected = ([assistant("w"), "y", "x", [assistant("z")]], [8.0, 7.0, 6.0, 1.0])
        assert read(completions=answers) == expected

    def test_objects_with_ranks(self):
        assert read(responses=[{"text": "x", "rank": 2}, {"text": "y", "rank": 1}]) == (["y", "x"], [-1.0, -2.0])

    def test_messages_and_conversations(self):
        assert read(responses=[assistant("x"), [assistant("y")]], scores=[1, 2]) == (
            [[assistant("y")], assistant("x")],
            [2.0, 1.0],
        )

    def test_chosen_and_rejected_come_first(self):
        assert read(chosen="a", rejected="b", completions=["x", "y"], scores=[1, 2]) == (["a", "b"], None)

    def test_rows_of_another_kind(self):
        assert read(prompt="p", text="x") is None
        assert read(chosen="a", rejected=None) is None


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "reason", "message"),
        [
            (
                {"responses": ["x"], "scores": [1]},
                "fewer than two answers",
                r"at least two answers, got \['x'",
            ),
            ({"responses": "x", "scores": [1]}, "fewer than two answers", '"responses" must be a list'),
            ({"chosen": "a", "rejected": []}, "fewer than two answers", '"rejected" must hold at least one answer'),
            ({"responses": ["x", "y"], "scores": [1]}, "unequal lengths", "holds 2 answers, but there are 1 scores"),
            (
                {"chosen": "a", "rejected": ["b", "c"], "chosen_score": 2, "rejected_score": 1},
                "unequal lengths",
                "1 chosen and 2 rejected answers need a score or rank each, got 1 and 1",
            ),
            (
                {"chosen": "a", "rejected": "b", "chosen_score": [], "rejected_score": 1},
                "unequal lengths",
                "got 0 and 1",
            ),
            ({"responses": ["x", "y"], "scores": [1, 1]}, "no two different scores", "got 1 for all 2"),
            ({"responses": ["x", "y"], "scores": [1, math.nan]}, "scores that are no numbers", "got nan"),
            ({"responses": ["x", "y"], "scores": [1, math.inf]}, "scores that are no numbers", "got inf"),
            (
                {"responses": ["x", "y"], "ratings": [1, "N/A"]},
                "scores that are no numbers",
                "\"ratings\" .* got 'N/A'",
            ),
            ({"responses": ["x", "y"], "scores": [True, 0]}, "scores that are no numbers", "got True"),
            ({"responses": ["x", "y"], "ranks": [1, None]}, "scores that are no numbers", "got None"),
            (
                {"chosen": "a", "rejected": "b", "score_chosen": math.nan, "score_rejected": 1},
                "scores that are no",
                "nan",
            ),
            ({"responses": ["x", "y"]}, "no scores", "needs one of the columns"),
            ({"responses": [{"text": "x", "score": 1}, {"text": "y"}]}, "no scores", "got the answer {'text': 'y'}"),
            (
                {"chosen": "a", "rejected": ["b", "c"], "chosen_score": 2, "rejected_score": [1, 3]},
                "chosen scores lower",
                'scores lower than "rejected": 2 and 3; exchange them, or remove the scores',
            ),
        ],
        ids=str,
    )
    def test_by_name(self, values, reason, message):
        with pytest.raises(DataError, match=rf"ranked\.jsonl:7: .*{message}.*--skip-bad-rows") as caught:
            read_ranking(values, WHERE)
        assert caught.value.reason.startswith(reason)


class TestPairs:
    SCORES = (9.0, 9.0, 7.0, 7.0, 4.0)

    def test_best_against_each_of_lower_score(self):
        assert ranked_pairs(self.SCORES, 5, "best") == [(0, 2, 2.0), (0, 3, 2.0), (0, 4, 5.0)]

    def test_all_of_different_scores(self):
        expected = [
            (0, 2, 2.0),
            (0, 3, 2.0),
            (0, 4, 5.0),
            (1, 2, 2.0),
            (1, 3, 2.0),
            (1, 4, 5.0),
            (2, 4, 3.0),
            (3, 4, 3.0),
        ]
        assert ranked_pairs(self.SCORES, 5, "all") == expected

    @pytest.mark.parametrize("pairing", ["best", "all"])
    def test_without_scores_only_the_best_is_known(self, pairing):
        assert ranked_pairs(None, 3, pairing) == [(0, 1, 0.0), (0, 2, 0.0)]

    @staticmethod
    def sequences(*answers: int) -> list[np.ndarray]:
        return [np.array([5, 6, answer], np.int32) for answer in answers]

    def test_of_tokens(self):
        sequences = self.sequences(1, 2, 3)
        pairs = token_pairs(2, sequences, [3.0, 2.5, 1.0], WHERE, ranking=4)
        assert [(pair.chosen_ids[2], pair.rejected_ids[2], pair.margin) for pair in pairs] == [(1, 2, 0.5), (1, 3, 2.0)]
        assert {(pair.prompt_length, pair.where, pair.ranking, pair.prompt_key) for pair in pairs} == {
            (2, WHERE, 4, sequences[0][:2].tobytes())
        }
        assert [pair.ranking for pair in token_pairs(2, sequences, None, WHERE)] == [None, None]

    def test_two_answers_are_no_ranking(self):
        (pair,) = token_pairs(2, self.sequences(1, 2), [2.0, 1.0], WHERE, ranking=4)
        assert (pair.margin, pair.ranking) == (1.0, None)

    def test_answers_of_the_same_tokens_are_no_pair(self):
        pairs = token_pairs(2, self.sequences(1, 1, 2), [3.0, 2.0, 1.0], WHERE, pairing="all")
        assert [(pair.chosen_ids[2], pair.rejected_ids[2]) for pair in pairs] == [(1, 2), (1, 2)]
        with pytest.raises(DataError, match=r"ranked\.jsonl:7: the answers that should be compared become the same"):
            token_pairs(2, self.sequences(1, 1), None, WHERE)


class TestRows:
    ROW: ClassVar = {"prompt": "the", "responses": [" ab", " abba", " bab"], "scores": ["1", 4.5, 3]}

    def pairs(self, **settings):
        return tokenize_pairs(make_rows(self.ROW, self.ROW), bpe_tokenizer(), max_length=50, **settings).pairs

    def test_best_against_each(self):
        pairs = self.pairs()
        texts = [scored(bpe_tokenizer(), pair) for pair in pairs]
        assert texts == [(" abba</s>", " bab</s>"), (" abba</s>", " ab</s>")] * 2
        assert [(pair.margin, pair.ranking) for pair in pairs] == [(1.5, None), (3.5, None)] * 2

    def test_every_two(self):
        pairs = self.pairs(pairing="all")[:3]
        assert [scored(bpe_tokenizer(), pair)[0] for pair in pairs] == [" abba</s>", " abba</s>", " bab</s>"]
        assert [pair.margin for pair in pairs] == [1.5, 3.5, 2.0]

    def test_rankings_are_numbered(self):
        rankings = [pair.ranking for pair in self.pairs(rankings=True)]
        assert rankings[0] == rankings[1] != rankings[2] == rankings[3]

    def test_all_answers_have_one_prompt(self):
        # "ab" merges where the prompt ends with "a": the prompt is what all three have in common.
        row = {"prompt": "ef a", "responses": ["b", "c", "d"], "scores": [3, 2, 1]}
        pairs = tokenize_pairs(make_rows(row), bpe_tokenizer(), max_length=50).pairs
        assert len({pair.prompt_key for pair in pairs}) == 1

    def test_conversations(self):
        row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [[assistant("c")], [assistant("d")]]}
        pairs = tokenize_pairs(make_rows(row), chat_tokenizer(), max_length=100).pairs
        assert [scored(chat_tokenizer(), pair)[1][0] for pair in pairs] == ["c", "d"]

    def test_turns_of_the_assistant_in_every_answer(self):
        several = [assistant("b"), user("d"), assistant("e")]
        row = {"prompt": [user("a")], "chosen": "b", "rejected": [several, [assistant("c")]]}
        first, second = tokenize_pairs(make_rows(row), chat_tokenizer(), max_length=100).pairs
        assert first.rejected_scored is not None
        assert second.rejected_scored is None
        assert first.rejected_length < len(first.rejected_ids) - first.prompt_length

    def test_a_long_answer_is_cut_alone(self):
        row = {"prompt": "the ", "responses": ["ab", "abba bab " * 9], "scores": [2, 1]}
        report = tokenize_pairs(make_rows(row), bpe_tokenizer(), max_length=12).report
        assert (report.responses_cut, report.pairs_kept) == (1, 1)
