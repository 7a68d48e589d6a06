"""Checkable instructions: does an answer follow a rule such as "exactly two sentences"?

The checks read answers that a model has sampled as well as clean data, so they look past what a
reader would look past: Markdown stars, stray quotation marks, a missing last full stop.
An empty answer follows no rule.
"""

import re
import textwrap
from collections.abc import Callable

# Abbreviations that never close a sentence.
_NEVER_LAST = {"e.g", "i.e", "dr", "mr", "mrs", "ms", "prof", "st", "vs", "cf", "approx", "fig"}
# Abbreviations that close a sentence only if a capital letter comes next.
_MAYBE_LAST = {"etc", "a.m", "p.m", "u.s", "u.k", "d.c", "b.c", "a.d", "b.c.e", "c.e", "inc", "jr"}

_CLOSERS = "\"'”’)]*_"
_OPENERS = "\"'“‘([*_#>"
_SENTENCE_END = re.compile(rf"[.!?…]+[{re.escape(_CLOSERS)}]*(?=\s|$)")
_LIST_MARKER = re.compile(r"(?m)^[ \t]*(?:\d{1,2}[.)]|[-*•])[ \t]+")
_NUMBERED_ITEM = re.compile(r" ?\**(\d+)[.)]\**\s+\S")
_BULLETED_ITEM = re.compile(r" ?[-*•]\s+\S")


def follows(rule: str, value: str, answer: str) -> bool:
    """Says whether `answer` follows `rule`.

    Args:
      rule: a name in `RULES`.
      value: the rule's argument as text: a count, a phrase, or "" where the rule takes none.
      answer: the text to check; white space around it is ignored.

    Raises:
      ValueError: no such rule, or a rule that counts was given something other than a number.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are: {', '.join(sorted(RULES))}")
    return bool(answer.strip()) and RULES[rule](value, answer.strip())


def is_rule(rule: object, value: object) -> bool:
    """Whether `follows` can check a row's columns `rule` and `rule_value`, which may hold anything.

    A count may have nine digits.
    """
    if not (isinstance(rule, str) and rule in RULES and isinstance(value, str)):
        return False
    return rule not in _COUNTED or (value.isdecimal() and len(value) < 10)


def split_sentences(text: str) -> list[str]:
    """Splits text into sentences; a list item or a paragraph always ends one."""
    text = _LIST_MARKER.sub("\n\n", text)
    text = re.sub(r"([a-z]{2}[.!?])(?=[A-Z][a-z])", r"\1 ", text)  # "bees.They" lacks its space
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for mark in _SENTENCE_END.finditer(paragraph):
            if _closes_sentence(paragraph[start : mark.start()], mark[0], paragraph[mark.end() :]):
                sentences.append(paragraph[start : mark.end()].strip())
                start = mark.end()
        sentences.append(paragraph[start:].strip())
    return [s for s in sentences if any(c.isalnum() for c in s)]


def _closes_sentence(before: str, mark: str, after: str) -> bool:
    """Tells a sentence's end from the dot of an abbreviation and from a quotation's end."""
    following = next((c for c in after if c.isalnum()), "")
    if not following:
        return True
    if following.islower() and (mark[-1] in _CLOSERS or mark[0] == "…" or mark[:3] == "..."):
        return False  # '"Why?" she asked', 'well... maybe'
    if mark[0] != "." or not before.strip():
        return True
    *previous, word = before.split()
    word = word.lstrip(_OPENERS)
    lowered = word.lower()
    if lowered in _NEVER_LAST or (lowered == "no" and following.isdigit()):
        return False
    if lowered in _MAYBE_LAST:
        return following.isupper()
    if re.fullmatch(r"(?:[A-Z]\.)+[A-Z]", word):  # "J.R.R. Tolkien"
        return False
    if re.fullmatch(r"[A-HJ-Z]", word):  # "Harry S. Truman", but not "take vitamin C. It helps"
        another_initial = re.match(r"\s*[A-Z]\.", after) is not None
        return not (another_initial or not previous or previous[-1][0].isupper())
    return True


def split_words(text: str) -> list[str]:
    """Splits text into words at white space and dashes; a lone mark such as "-" is no word."""
    return [w for w in re.split(r"\s+|—|--", text) if any(c.isalnum() for c in w)]


def _sentences(value: str, answer: str) -> bool:
    return len(split_sentences(answer)) == _count(value)


def _numbered_list(value: str, answer: str) -> bool:
    numbers, bullets = _list_items(answer)
    right = numbers == list(range(1, len(numbers) + 1)) and len(numbers) == _count(value)
    return bullets == 0 and right


def _bulleted_list(value: str, answer: str) -> bool:
    numbers, bullets = _list_items(answer)
    return not numbers and bullets == _count(value)


def _max_words(value: str, answer: str) -> bool:
    return len(split_words(answer)) <= _count(value)


def _min_words(value: str, answer: str) -> bool:
    return len(split_words(answer)) >= _count(value)


def _starts_with(value: str, answer: str) -> bool:
    start = _plain(value).rstrip(".,!:")
    answer = _plain(answer).lstrip(_OPENERS + " ")
    return answer.startswith(start) and not answer[len(start) :][:1].isalnum()


def _ends_with(value: str, answer: str) -> bool:
    loose = ".!…" + _CLOSERS + " "  # a question mark is part of the phrase
    end = _plain(value).rstrip(loose)
    answer = _plain(answer).rstrip(loose)
    return answer.endswith(end) and not answer[: len(answer) - len(end)][-1:].isalnum()


def _contains(value: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_plain(value))}(?!\w)", _plain(answer)) is not None


def _no_commas(value: str, answer: str) -> bool:
    return "," not in answer


def _min_commas(value: str, answer: str) -> bool:
    return answer.count(",") >= _count(value)


def _lowercase(value: str, answer: str) -> bool:
    return any(c.isalpha() for c in answer) and not any(c.isupper() for c in answer)


def _sentence_case(value: str, answer: str) -> bool:
    firsts = [next(c for c in s if c.isalnum()) for s in split_sentences(answer)]
    return bool(firsts) and not any(c.islower() for c in firsts)


def _count(value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"rule value {value!r} is not a count; write it in digits, such as '2'")
    return int(value)


def _plain(text: str) -> str:
    """Text in lower case with straight quotes and single spaces, for comparing phrases."""
    straight = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(straight.lower().split())


def _list_items(answer: str) -> tuple[list[int], int]:
    """The numbers of the numbered items and how many bulleted items; sub-items do not count."""
    lines = textwrap.dedent(answer).splitlines()
    numbered = [m for line in lines if (m := _NUMBERED_ITEM.match(line))]
    bulleted = [line for line in lines if _BULLETED_ITEM.match(line)]
    return [int(m[1]) for m in numbered], len(bulleted)


RULES: dict[str, Callable[[str, str], bool]] = {
    "sentences": _sentences,  # exactly `value` sentences
    "numbered_list": _numbered_list,  # items 1. to `value`. on lines of their own, no bullets
    "bulleted_list": _bulleted_list,  # `value` lines with a bullet, no numbers
    "max_words": _max_words,  # at most `value` words
    "min_words": _min_words,  # at least `value` words
    "starts_with": _starts_with,  # the first words are `value`, in any case
    "ends_with": _ends_with,  # the last words are `value`, in any case
    "contains": _contains,  # `value` occurs as a whole word, in any case
    "no_commas": _no_commas,
    "min_commas": _min_commas,  # at least `value` commas
    "lowercase": _lowercase,  # no capital letter anywhere
    "sentence_case": _sentence_case,  # every sentence begins with a capital letter (or a digit)
}
_COUNTED = {"sentences", "numbered_list", "bulleted_list", "max_words", "min_words", "min_commas"}
