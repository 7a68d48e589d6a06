"""The demo pairs: as the generator writes them, as their rules say, and blind to answers alone."""

import collections
import json

import pytest
from demo_pairs import generate
from demo_pairs.topics import TOPICS

from alignjax.rules import RULES, follows, is_rule, split_sentences, split_words

COLUMNS = ["prompt", "chosen", "rejected", "rule", "rule_value", "topic", "split"]
ROWS = [json.loads(line) for line in generate.PAIRS_PATH.read_text(encoding="utf-8").splitlines()]
COUPLES = list(zip(ROWS[::2], ROWS[1::2], strict=True))
KIND_OF_RULE = {
    "sentences": "sentences",
    "numbered_list": "lists",
    "bulleted_list": "lists",
    "max_words": "words",
    "min_words": "words",
    "starts_with": "starts_with",
    "ends_with": "ends_with",
    "contains": "contains",
    "no_commas": "commas",
    "min_commas": "commas",
    "lowercase": "letter_case",
    "sentence_case": "letter_case",
}


def rows_by_split_and_kind() -> dict[tuple[str, str], list[dict[str, str]]]:
    groups = collections.defaultdict(list)
    for row in ROWS:
        groups[row["split"], KIND_OF_RULE[row["rule"]]].append(row)
    return groups


def accuracy(rows: list[dict[str, str]], score) -> float:
    """How often the answer with the higher score is the chosen one; a tie counts half."""
    wins = 0.0
    for row in rows:
        chosen, rejected = score(row["chosen"]), score(row["rejected"])
        wins += (chosen > rejected) + 0.5 * (chosen == rejected)
    return wins / len(rows)


def test_shipped_file_is_what_the_generator_writes(tmp_path):
    generate.main(["--out", str(tmp_path / "pairs.jsonl")])
    assert (tmp_path / "pairs.jsonl").read_bytes() == generate.PAIRS_PATH.read_bytes()


def test_size_and_columns():
    assert generate.PAIRS_PATH.stat().st_size < 390_000
    assert len(ROWS) == 512
    assert all(list(row) == COLUMNS for row in ROWS)
    assert all(isinstance(value, str) for row in ROWS for value in row.values())
    assert collections.Counter(row["split"] for row in ROWS) == {"train": 384, "test": 128}


def test_every_kind_is_as_frequent_in_both_splits():
    sizes = {key: len(rows) for key, rows in rows_by_split_and_kind().items()}
    kinds = set(KIND_OF_RULE.values())
    assert len(kinds) == 8
    assert sizes == {("train", k): 48 for k in kinds} | {("test", k): 16 for k in kinds}
    assert {row["rule"] for row in ROWS} == set(RULES)


def test_splits_share_no_topic_and_no_prompt_repeats():
    topics = {s: {row["topic"] for row in ROWS if row["split"] == s} for s in ("train", "test")}
    assert (len(topics["train"]), len(topics["test"])) == (48, 16)
    assert not topics["train"] & topics["test"]
    assert len({row["prompt"] for row in ROWS}) == 512
    assert all(row["topic"] in row["prompt"] for row in ROWS)


def test_word_limits():
    answers = [len(row[side].split()) for row in ROWS for side in ("chosen", "rejected")]
    assert min(answers) >= 15
    assert max(answers) <= 40
    assert max(len(row["prompt"].split()) for row in ROWS) <= 22


def test_chosen_follows_its_rule_and_rejected_does_not():
    for row in ROWS:
        assert follows(row["rule"], row["rule_value"], row["chosen"]), row
        assert not follows(row["rule"], row["rule_value"], row["rejected"]), row


def test_prompts_state_their_rule():
    for row in ROWS:
        value = row["rule_value"]
        assert generate.SPELLED.get(value, value) in row["prompt"], row


def test_rows_come_in_couples_that_swap_their_answers():
    for a, b in COUPLES:
        assert (a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"])
        assert (a["topic"], a["split"]) == (b["topic"], b["split"])
        assert KIND_OF_RULE[a["rule"]] == KIND_OF_RULE[b["rule"]]
        assert (a["rule"], a["rule_value"]) != (b["rule"], b["rule_value"])


def test_length_tells_nothing():
    assert accuracy(ROWS, len) == 0.5
    assert accuracy(ROWS, lambda text: len(text.split())) == 0.5
    for rows in rows_by_split_and_kind().values():
        assert accuracy(rows, len) == 0.5
        assert accuracy(rows, lambda text: len(text.split())) == 0.5


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_token_tells_anything(split):
    margins = collections.Counter()  # rows where only the chosen has the token less the reverse
    for row in ROWS:
        if row["split"] == split:
            chosen, rejected = set(row["chosen"].split()), set(row["rejected"].split())
            margins.update(chosen - rejected)
            margins.subtract(rejected - chosen)
    assert len(margins) > 200
    assert set(margins.values()) == {0}


def test_bank_of_topics():
    assert len(TOPICS) == 64
    clauses = [c for topic in TOPICS for c in topic.openers + topic.followers]
    assert len(clauses) == len(set(clauses)) == 64 * 6
    for topic in TOPICS:
        assert (len(topic.openers), len(topic.followers)) == (2, 4)
        assert all(clause.startswith(topic.name) for clause in topic.openers)
    assert not any(mark in clause for clause in clauses for mark in ",.;:!?\"'|")
    assert all(4 <= len(clause.split()) <= 12 for clause in clauses)


FOLLOWED = [
    ("sentences", "2", "Bees dance. They also fly."),
    ("sentences", "2", "  Bees dance! Do they sing?\n"),
    ("sentences", "2", "Bees dance. They also fly"),  # cut short
    ("sentences", "2", 'He said "bees dance." She said "they fly."'),
    ("sentences", "2", "“Do bees dance?” she asked. “They do!”"),
    ("sentences", "2", "Some insects, e.g. bees, weigh 0.1 g. Others weigh more."),
    ("sentences", "2", "It was named by Dr. Smith and J. R. Jones. Harry S. Truman liked it."),
    ("sentences", "2", "J.R.R. Tolkien woke at 6 a.m. every day. He wrote etc."),
    ("sentences", "2", "Take vitamin C. It helps."),
    ("sentences", "2", "It opens at 9 a.m. The doors close at five."),
    ("sentences", "2", "Bees dance.They also fly."),  # no space
    ("sentences", "2", "Bees dance... They fly?!"),
    ("sentences", "1", "Well... bees dance, see fig. 3 and no. 4 in St. Louis"),
    ("sentences", "2", "Bees dance! They fly! 🐝"),
    ("sentences", "2", "bees dance. they also fly."),
    ("sentences", "2", "**Bees dance.** They also\nfly."),
    ("sentences", "3", "1. Bees dance\n2. Bees fly.\n3. Bees hum"),
    ("sentences", "2", "About bees\n\nThey dance."),
    ("numbered_list", "3", "1. Bees\n2. Wasps\n3. Ants"),
    ("numbered_list", "3", "Here you are:\n\n1) **Bees**: small\n2) Wasps - thin\n\n3) Ants\nBye."),
    ("numbered_list", "3", " 1. Bees\n   - they dance\n 2. Wasps\n 3. Ants"),
    ("numbered_list", "2", "**1.** Bees\n**2.** Wasps"),
    ("bulleted_list", "3", "- Bees\n- Wasps\n- Ants"),
    ("bulleted_list", "3", "Sure!\n* Bees\n* **Wasps**\n* Ants have 1. Legs 2. Heads"),
    ("bulleted_list", "2", "• Bees\n  - small\n• Wasps"),
    ("max_words", "4", "Bees — they dance - well."),
    ("min_words", "4", "Bees—they dance well."),
    ("max_words", "3", "It's well-known everywhere."),
    ("starts_with", "In short", "In short, bees dance."),
    ("starts_with", "In short", '"in short: bees dance."'),
    ("starts_with", "In short", "\n**In  short**, bees dance."),
    ("starts_with", "As you're told", "As you’re told, bees dance."),
    ("ends_with", "Shall I go on?", "Bees dance. Shall I go on?"),
    ("ends_with", "Shall I go on?", 'Bees dance. "shall I go on?"\n'),
    ("ends_with", "I hope that helps.", "Bees dance. I hope that helps!"),
    ("ends_with", "I hope that helps.", "Bees dance, and **I hope that helps**"),
    ("contains", "curious", "One Curious, fact."),
    ("contains", "sixty-four", "It has sixty-four."),
    ("no_commas", "", "Bees dance. They fly; they hum."),
    ("min_commas", "2", "Bees, wasps, and ants."),
    ("lowercase", "", "bees dance in 1999. 🐝"),
    ("sentence_case", "", "Bees dance. They, e.g. workers, fly. 6 bees hum"),
    ("sentence_case", "", '"Do bees dance?" she asked. **Yes!**'),
]
BROKEN = [
    ("sentences", "2", "Bees dance."),
    ("sentences", "2", "Bees dance. They fly. They"),
    ("sentences", "2", "Bees dance; they fly: e.g. to flowers, 2.5 km away."),
    ("numbered_list", "3", "1. Bees 2. Wasps 3. Ants"),
    ("numbered_list", "3", "1. Bees\n2. Wasps\n3. Ants\n4. Flies"),
    ("numbered_list", "3", "1. Bees\n2. Wasps\n3."),
    ("numbered_list", "3", "1. Bees\n1. Wasps\n1. Ants"),
    ("numbered_list", "3", "- Bees\n- Wasps\n- Ants"),
    ("numbered_list", "3", "1. Bees\n2. Wasps\n3. Ants\n- Flies"),
    ("bulleted_list", "3", "1. Bees\n2. Wasps\n3. Ants"),
    ("bulleted_list", "3", "- Bees\n- Wasps"),
    ("bulleted_list", "3", "- Bees - Wasps - Ants"),
    ("bulleted_list", "1", "**Bees** dance."),
    ("bulleted_list", "1", "-bees"),
    ("max_words", "3", "Bees dance very well."),
    ("min_words", "5", "Bees — dance - very well."),
    ("starts_with", "In short", "In shorts, bees dance."),
    ("starts_with", "In short", "Bees dance, in short."),
    ("ends_with", "Shall I go on?", "Shall I go on? Bees dance."),
    ("ends_with", "Shall I go on?", "Bees dance. Shall I go on."),
    ("ends_with", "all for now.", "Bees overall for now, small for now."),
    ("contains", "curious", "Curiously, bees dance."),
    ("contains", "sixty-four", "It has sixty four."),
    ("no_commas", "", "Bees dance, and fly."),
    ("min_commas", "2", "Bees dance, and fly."),
    ("lowercase", "", "bees dance in June."),
    ("lowercase", "", "1, 2, 3"),
    ("sentence_case", "", "Bees dance. they fly."),
    ("sentence_case", "", "bees dance."),
    ("sentence_case", "", "- Bees\n- wasps"),
    ("sentence_case", "", "..."),
]


@pytest.mark.parametrize(("rule", "value", "answer"), FOLLOWED)
def test_followed(rule, value, answer):
    assert follows(rule, value, answer) is True


@pytest.mark.parametrize(("rule", "value", "answer"), BROKEN)
def test_broken(rule, value, answer):
    assert follows(rule, value, answer) is False


def test_hand_made_cases_cover_every_rule():
    assert {case[0] for case in FOLLOWED} == {case[0] for case in BROKEN} == set(RULES)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_empty_answer_follows_nothing(rule):
    assert follows(rule, "2", " \n") is False


def test_unknown_rule_names_the_rules_that_exist():
    with pytest.raises(ValueError, match="unknown rule 'haiku'.*bulleted_list.*sentences"):
        follows("haiku", "", "Bees dance.")


def test_a_count_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="'two' is not a count"):
        follows("sentences", "two", "Bees dance.")


def test_split_sentences_and_words_by_hand():
    assert split_sentences("Bees dance. Do they? Yes!") == ["Bees dance.", "Do they?", "Yes!"]
    assert split_words("- Bees -- and 3.5 wasps.") == ["Bees", "and", "3.5", "wasps."]


def test_columns_that_name_no_rule_are_told_from_those_that_do():
    assert all(is_rule(row["rule"], row["rule_value"]) for row in ROWS)
    bad = [(["x"], "x"), ("sentences", "many"), ("sentences", 2), ("none", "2"), (None, None)]
    bad += [("max_words", "9" * 5000), ("min_commas", "²")]
    assert not any(is_rule(rule, value) for rule, value in bad)
    assert not follows("numbered_list", "999999999", "1. one\n2. two")
    assert follows("numbered_list", "2", "1. one\n2. two")
