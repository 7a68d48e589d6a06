"""Writes the demo's preference pairs: PYTHONPATH=tools python -m demo_pairs.generate [--out PATH].

A pair is good or bad only in the light of its prompt. Two opposed rules A and B share a topic; one
text follows A and breaks B, the other follows B and breaks A. Both texts are chosen once and
rejected once, in two neighbouring rows, so whatever judges an answer without reading its prompt
(its length, any word in it) is right exactly half the time.
"""

import argparse
import itertools
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from demo_pairs.prompts import ASKS, PROMPTS, QUESTIONS
from demo_pairs.topics import TOPICS, Topic

from alignjax.rules import follows

PAIRS_PATH = pathlib.Path(__file__).parents[2] / "alignjax" / "demo" / "pairs.jsonl"
SEED = 1
TEST_EVERY = 4  # every fourth topic is for testing
ANSWER_WORDS = range(15, 41)
PROMPT_WORDS = range(1, 23)

SPELLED = {"2": "two", "3": "three", "4": "four"}

JOINERS = (", and ", "; ")
JOINERS_WITHOUT_COMMA = (" and ", "; ")
# fmt: off
OPENINGS = (
    "In short", "In brief", "In essence", "In a nutshell", "In simple terms", "In a few words",
    "Simply put", "Put briefly", "To put it plainly", "To begin with", "To start with",
    "First of all", "Broadly speaking", "Generally speaking", "As it happens", "As you may know",
    "As many people know", "Of course", "At a glance",
)
CLOSINGS = (
    "Would you like to know more?", "What else would you like to know?",
    "Did you know all of that?", "Shall I go on?", "Does that help?",
    "Have I left anything out?", "Is that enough for now?", "Which part interests you most?",
    "That is all for now.", "I hope that helps.", "There is much more to learn.",
    "Thanks for asking.", "Those are the basics.", "The topic deserves a closer look.",
    "That is the short version.", "Feel free to ask for more.",
)
# fmt: on
ADJECTIVES = (
    "curious notable striking useful basic memorable interesting familiar remarkable important "
    "simple handy key"
).split()


class Side(NamedTuple):
    """One rule with its value, and a text that follows it and breaks the other side's rule."""

    rule: str
    value: str
    text: str


def capitalize(text: str) -> str:
    """Raises the first letter and leaves the others, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]


def draw_clauses(rng: random.Random, topic: Topic, count: int) -> list[str]:
    """A clause that names the topic, then `count - 1` others."""
    return [rng.choice(topic.openers), *rng.sample(topic.followers, count - 1)]


def compose(
    rng: random.Random, clauses: Sequence[str], count: int, joiners: Sequence[str] = JOINERS
) -> str:
    """Makes the clauses, in their order, into `count` sentences of one or two clauses each."""
    doubled = len(clauses) - count
    sizes = [2] * doubled + [1] * (count - doubled)
    rng.shuffle(sizes)
    rest = iter(clauses)
    sentences = [rng.choice(joiners).join(itertools.islice(rest, size)) for size in sizes]
    return " ".join(capitalize(s) + "." for s in sentences)


def sentence_counts(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """Two, three or four sentences out of the same four clauses."""
    clauses = draw_clauses(rng, topic, 4)
    counts = rng.sample([2, 3, 4], 2)
    a, b = (Side("sentences", str(n), compose(rng, clauses, n)) for n in counts)
    return a, b


def lists(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same three items with numbers or with bullets."""
    stop = rng.choice(["", "."])
    items = [capitalize(clause) + stop for clause in draw_clauses(rng, topic, 3)]
    numbered = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    bulleted = "\n".join(f"- {item}" for item in items)
    return Side("numbered_list", "3", numbered), Side("bulleted_list", "3", bulleted)


def word_counts(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """One number of words that the short text stays under and the long one, with a clause more,
    goes over."""
    clauses = draw_clauses(rng, topic, 4)
    left_out = rng.randrange(1, 4)
    fewer = clauses[:left_out] + clauses[left_out + 1 :]
    short = compose(rng, fewer, rng.choice([2, 3]))
    long = compose(rng, clauses, rng.choice([2, 3, 4]))
    value = str(rng.randint(len(short.split()) + 1, len(long.split()) - 1))
    return Side("max_words", value, short), Side("min_words", value, long)


def openings(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same text after two different opening phrases."""
    clauses = draw_clauses(rng, topic, 3)
    body = f"{clauses[0]}. {compose(rng, clauses[1:], rng.choice([1, 2]))}"
    a, b = (Side("starts_with", p, f"{p}, {body}") for p in rng.sample(OPENINGS, 2))
    return a, b


def closings(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same text before two different closing sentences."""
    body = compose(rng, draw_clauses(rng, topic, 3), rng.choice([2, 3]))
    a, b = (Side("ends_with", p, f"{body} {p}") for p in rng.sample(CLOSINGS, 2))
    return a, b


def adjectives(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same text but for one adjective."""
    first, second, third = draw_clauses(rng, topic, 3)
    frame = rng.choice(
        [
            f"One {{word}} fact is that {first}. {compose(rng, [second, third], 2)}",
            f"{capitalize(first)}. Another {{word}} fact is that {second}. {capitalize(third)}.",
            f"{compose(rng, [first, second], 2)} One more {{word}} detail is that {third}.",
        ]
    )
    a, b = (Side("contains", w, frame.format(word=w)) for w in rng.sample(ADJECTIVES, 2))
    return a, b


def topic_words(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """One clause differs, and the longest word of each such clause is asked for."""
    first, shared, one, other = draw_clauses(rng, topic, 4)
    texts = [compose(rng, [first, c, shared], rng.choice([2, 3])) for c in (one, other)]
    words = [max(c.split(), key=len) for c in (one, other)]
    return Side("contains", words[0], texts[0]), Side("contains", words[1], texts[1])


def contained_words(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """A word that one text has and the other has not."""
    return rng.choice([adjectives, topic_words])(rng, topic)


def commas(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same four clauses, joined without commas or with two."""
    clauses = draw_clauses(rng, topic, 4)
    without = compose(rng, clauses, rng.choice([2, 3]), JOINERS_WITHOUT_COMMA)
    first, second, third, last = clauses
    series = f"{capitalize(first)}, {second}, and {third}. {capitalize(last)}."
    pairs = compose(rng, clauses, 2, (", and ",))
    return Side("no_commas", "", without), Side("min_commas", "2", rng.choice([series, pairs]))


def letter_case(rng: random.Random, topic: Topic) -> tuple[Side, Side]:
    """The same text in lower case or written as usual."""
    text = compose(rng, draw_clauses(rng, topic, 4), rng.choice([2, 3, 4]))
    return Side("lowercase", "", text.lower()), Side("sentence_case", "", text)


Kind = Callable[[random.Random, Topic], tuple[Side, Side]]
KINDS: tuple[Kind, ...] = (
    sentence_counts,
    lists,
    word_counts,
    openings,
    closings,
    contained_words,
    commas,
    letter_case,
)


def write_prompt(rng: random.Random, topic: Topic, rule: str, value: str) -> str:
    """Asks about the topic and states the rule, in one of several ways."""
    ask = rng.choice(ASKS).format(topic=topic.name)
    question = rng.choice(QUESTIONS).format(topic=topic.name)
    return rng.choice(PROMPTS[rule]).format(
        ask=ask, Ask=capitalize(ask), question=question, value=SPELLED.get(value, value)
    )


def is_clean(a: Side, b: Side, prompts: Sequence[str]) -> bool:
    """Whether each text follows its own rule only and all lengths are within bounds."""
    return (
        follows(a.rule, a.value, a.text)
        and follows(b.rule, b.value, b.text)
        and not follows(a.rule, a.value, b.text)
        and not follows(b.rule, b.value, a.text)
        and all(len(side.text.split()) in ANSWER_WORDS for side in (a, b))
        and all(len(prompt.split()) in PROMPT_WORDS for prompt in prompts)
    )


def draw_couple(kind: Kind, topic: Topic, split: str) -> list[dict[str, str]]:
    """Draws until a couple is clean; its generator depends on nothing but the topic and the kind,
    so that mending one topic leaves the rows of the others as they were."""
    rng = random.Random(f"{SEED} {topic.name} {kind.__name__}")
    for _ in range(100):
        a, b = kind(rng, topic)
        prompts = [write_prompt(rng, topic, side.rule, side.value) for side in (a, b)]
        if is_clean(a, b, prompts):
            return [
                {
                    "prompt": prompt,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "rule": chosen.rule,
                    "rule_value": chosen.value,
                    "topic": topic.name,
                    "split": split,
                }
                for prompt, chosen, rejected in zip(prompts, (a, b), (b, a), strict=True)
            ]
    raise ValueError(f"topic {topic.name!r} gives no clean couple of {kind.__name__}: mend it")


def draw_split(split: str, topics: Sequence[Topic]) -> list[dict[str, str]]:
    """All rows of a split. Every two topics share out the eight kinds, so each is as frequent."""
    rng = random.Random(f"{SEED} {split}")
    couples = []
    for one, other in zip(topics[::2], topics[1::2], strict=True):
        kinds = rng.sample(KINDS, len(KINDS))
        couples += [draw_couple(kind, one, split) for kind in kinds[:4]]
        couples += [draw_couple(kind, other, split) for kind in kinds[4:]]
    rng.shuffle(couples)
    return [row for couple in couples for row in couple]


def draw_rows() -> list[dict[str, str]]:
    """The whole data set: the training rows, then the test rows, couples side by side."""
    test = TOPICS[TEST_EVERY - 1 :: TEST_EVERY]
    train = [topic for topic in TOPICS if topic not in test]
    return draw_split("train", train) + draw_split("test", test)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes one JSON object a line."""
    parser = argparse.ArgumentParser(description="Write the demo's preference pairs.")
    parser.add_argument("--out", type=pathlib.Path, default=PAIRS_PATH, help="file to write")
    out = parser.parse_args(argv).out
    rows = draw_rows()
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"wrote {len(rows)} rows to {out}")


if __name__ == "__main__":
    main()
