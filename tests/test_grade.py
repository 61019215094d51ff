"""The grader against tests/data/graded.txt, real references and hostile text. A row of a table is
what a careful person reads as the answer, or a documented decision where people differ."""
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from critic import canonical, extract_answer, find_answer, grade, number, same_answer
from critic import read_formula, read_letter

DATA = Path(__file__).parent / "data"


def graded():
    """(line, text, reference, question, sign) of each text in the table."""
    question = ""
    lines = (DATA / "graded.txt").read_text(encoding="utf-8").split("\n")
    for place, line in enumerate(lines, 1):
        line = line.replace("⏎", "\n")
        line = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), line)
        if line.startswith("-- options"):
            options = zip("ABCDEFG", line[12:].split(" | "))
            question = "Which?" + "".join(f"\n({letter}) {text}" for letter, text in options)
        elif line and not line.startswith("--"):
            row = re.fullmatch(r"(\\boxed\{.*?\}(?= [=!?] )|.*?) ([=!?]) (.*)", line, re.DOTALL)
            for text in row[3].split(" | "):
                yield place, text, row[1], question, row[2]


def test_graded_texts():
    """No text that is wrong counts as right; what is right counts, except for the known gaps."""
    table = list(graded())
    assert len(table) > 900 and {row[-1] for row in table} == {"=", "!", "?"}
    false = [row for row in table if grade(*row[1:3], question=row[3]) is not (row[-1] == "=")]
    assert false == []


ANSWERS = [
    ("9 * 2 = 18\n#### 18", "18", "####"), ("#### 18 #### 20", "20", "####"),
    ("#### 18\nThe answer is 20, or \\boxed{21}, or 22", "18", "####"),
    ("#### $18.00", "18.00", "####"), ("#### - 5", "-5", "####"), ("#### x = -3", "-3", "####"),
    ("#### 5 since 2 + 4 = 6 is too many", "5", "####"),
    ("#### none\nThe answer is 7", "7", "phrase"),
    ("#### Step 1: count\nThere are 7", "7", "bare"), ("7\n####", None, None),
    (r"\boxed{18} and then \boxed{20}.", "20", "boxed"), (r"\boxed{-\frac{1}{2}}", "-1/2", "boxed"),
    ("The answer is: $5", "5", "phrase"), ("Answer: Tom has 3\nso 3 - 1 = 2", "2", "bare"),
    ("pages 3\u22124", "4", "bare"), ("1,00,000", None, None), ("", None, None),
    ("####", None, None),
    (r"\boxed{}", None, None), ("\nQuestion: 5? #### 5", None, None), ("\u0661\u0662", None, None),
    ("The answer is unclear: 3 or 4", "unclear: 3 or 4", "phrase"),
    ("#### 18 or 20", "18 or 20", "####"), (r"\boxed{18\pi}", r"18\pi", "boxed")]

NUMBERS = [
    ("18", "18"), ("\u221218", "-18"), ("$18.00", "18"), ("18...", "18"), ("3.0", "3"),
    ("50%", "50"), ("50 %", "50"), ("1/2", "1/2"), ("**72**", "72"), ("1,000", "1000"),
    (".5", "1/2"), ("$-5", "-5"), ("1e3", None), ("1" * 200, None), ("007", "7"), ("-0", "0"),
    ("12345678901234567", "12345678901234567"), ("1/0", None), ("", None), ("five", None),
    ("5 apples", None), ("3-4", None), ("2 1/2", None), ("1,00,000", None), ("1/2/3", None),
    ("1.2.3", None), ("1e9999", None), ("\ud800", None)]

FORMULAS, EQUAL = (
    [line.split(" | ") for line in part.split("\n")[1:]]
    for part in (DATA / "formulas.txt").read_text(encoding="utf-8").strip().split("\n\n"))
FORMULAS = sum(FORMULAS, [])


@pytest.mark.parametrize("text, answer, rule", ANSWERS)
def test_answer_and_rule(text, answer, rule):
    """Each text gives the written answer by the written rule."""
    assert find_answer(text) == (answer, rule)
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, value", NUMBERS)
def test_number(text, value):
    """One spelling, one exact fraction; all else is None and nothing raises."""
    assert number(text) == (None if value is None else Fraction(value))


def test_cut_solutions_need_a_mark():
    """A text that ran into the length limit is right by a mark, not by its last number."""
    for text in ("#### 18", "so \\boxed{18}", "The answer is 18"):
        assert grade(text, "#### 18") and grade(text, "#### 18", cut=True)
    assert grade("9 + 9 = 18", "#### 18") and not grade("9 + 9 = 18", "#### 18", cut=True)
    assert not grade("B", "#### B", cut=True) and not grade("x^2", "\\boxed{x^2}", cut=True)


@pytest.mark.parametrize("reference, right, wrong", [
    ("So the answer is (b) 12.\n#### 12", "#### 12", "#### B"),
    ("Answer: A. 12\n#### 12", "The answer is 12", "The answer is (A)"),
    ("The answer is 5, an odd number\n#### odd", "#### odd", "#### 5"),
    ("The answer is 5 grams\n#### B", "#### B", "#### 5")])
def test_the_surest_mark_of_a_reference_decides(reference, right, wrong):
    """A reference is of the kind that its surest mark states, whatever its working says."""
    assert grade(right, reference) and grade(reference, reference)
    assert not grade(wrong, reference)


def test_same_answer_is_by_value():
    """Spellings of one value are one answer; no answer equals nothing, itself included."""
    for other in ("18.0", "$18.00", "36/2", "18"):
        assert same_answer("18", other) and same_answer(other, "18")
    assert same_answer("x+1", "x+1") and not same_answer("x+1", "1+x")
    assert same_answer("1/0", "1/0") and not same_answer("1/0", "0")
    assert not same_answer(None, None) and not same_answer(None, "18")


def test_formulas_equal_themselves():
    """Every formula is right against itself and wrong against the next; its spelling is stable."""
    for gold, other in zip(FORMULAS, FORMULAS[1:] + FORMULAS[:1]):
        if gold.count("{") != gold.count("}") or not gold.strip():
            continue
        reference = f"As $x_1 = 7$, we find $\\boxed{{{gold}}}$.\n\nDone."
        dot = "." * bool(re.search("[0-9A-Za-z]", gold))
        for text in (reference, f"\\boxed{{ {gold} }}", f"Thus:\n\\[\\boxed{{{gold}{dot}}}\\]"):
            assert grade(text, reference), (gold, text)
        spelled = canonical(gold)
        assert spelled and canonical(spelled) == spelled
        assert find_answer(reference, read_formula) == (spelled, "boxed")
        assert canonical(other) == spelled or not grade(f"\\boxed{{{other}}}", reference)


def test_equal_and_different_formulas():
    """Spellings of a class have one canonical spelling, different classes have two."""
    found = [{canonical(spelling) for spelling in spellings} for spellings in EQUAL]
    assert [spellings for spellings, one in zip(EQUAL, found) if len(one) > 1] == []
    assert len(set.union(*found)) == len(EQUAL)
    for mine, others in zip(EQUAL, EQUAL[1:] + EQUAL[:1]):
        for a in mine:
            for b in (mine[0], others[-1]):
                texts = f"\\boxed{{{a}}}", f"so\n$\\boxed{{{b}}}$"
                assert grade(*texts) is grade(*texts[::-1]) is (b in mine), (a, b)


def test_gold_against_gold():
    """300 references of GSM8K: right against themselves in five forms; plus one is wrong."""
    text = (DATA / "gsm8k_300.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    assert len(rows) == 300
    for gold in (row["answer"] for row in rows):
        bare = gold.rpartition("####")[2].strip()
        clean = re.sub("<<[^<>]*>>", "", gold)
        assert find_answer(gold)[1] == "####"
        asks_more = clean + "\n\nQuestion: 5?\n#### 7"
        for text in (gold, clean, bare, clean.replace("####", ""), asks_more):
            assert grade(text, gold) and grade(text, bare), text
        one_more = str(number(bare) + 1)
        assert not grade(gold, one_more) and not grade(clean + "\n#### " + one_more, gold)


PIECES = ["#### ", "\\boxed{", "{", "}", "\\frac{1}{2}", "{,}", "answer is ", "\n", "=", "-", "$",
          "%", ",", ".", "/", "0", "18", "000", "e9", "x", "because", " ", "*", "(", ")", "\\",
          "\\text{", "\nQuestion:", "\ud800", "\0", "\u0661", "\u00bd", "</s>", "\\cup", "or "]


def test_random_text_never_raises():
    """Nothing raises on 600 nasty strings; reading an answer again changes nothing."""
    rng, previous = random.Random(1), "18"
    for _ in range(600):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 24)))
        answer, rule = find_answer(text)
        assert (answer is None) == (rule is None)
        for reference in (previous, f"\\boxed{{x{text}}}", "#### B"):
            assert {grade(text, reference), grade(reference, text)} <= {True, False}
        if answer is not None and number(answer) is not None:
            assert extract_answer(answer) == answer and grade(answer, answer), text
        previous = text


@pytest.mark.parametrize("piece", [
    "1,", "1,111,", "#### 1=", "\\boxed{", "{", "9", "1/", "1e", "$-", ".", " ", "answer is ",
    "{,}", "answer: -", "because ", "1 = ", "18 or ", "- x ", "B or ", "a, = ", "not. A b",
    "\\frac{1", "1 a,", "1" + " " * 50, "\\text{", "(1,", "ab ", "</", "1 or "])
def test_work_is_linear(piece):
    """50 kB of babble are read; a pattern that is quadratic would take minutes here."""
    body = piece * (50_000 // len(piece))
    marked = "\\boxed{the answer is #### " + body + "x"
    assert find_answer(marked, read_letter) and find_answer(marked) and not number("1" + body + "!")
    for text in (body, marked, "\\boxed{" + body + "}"):
        assert grade(text, "\\boxed{\\frac{1}{x}}") is grade(text, "blue") is False
