"""The grader against tables written by hand, 300 real references and hostile text.

The table rows are the oracle: each is what a careful person reads as the answer, or the documented decision
where people differ (a range, a date, `1,00,000`). Nothing here is random but for a fixed seed, so there are
no false alarms except the time limits, which leave a factor of ten."""
import json
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from critic import canonical, extract_answer, find_answer, find_formula, find_letter, grade  # noqa: E402
from critic import strip_calculator_marks, to_number  # noqa: E402

GOLD = [json.loads(line) for line in
        (Path(__file__).parent / "data" / "gsm8k_300.jsonl").read_text(encoding="utf-8").splitlines()]

ANSWERS = [  # text, answer, rule
    # the #### rule: the last one with a number on its line
    ("9 * 2 = 18\n#### 18", "18", "####"),
    ("####18", "18", "####"),
    ("#### 18\n\nQuestion: how many are 3 and 4?\n#### 7", "18", "####"),
    ("#### 18\nQuestion: and 19?", "18", "####"),
    ("Question: 1 + 1?\nAnswer: 2\n#### 2", "2", "####"),              # only a later line is cut
    ("#### 18 #### 20", "20", "####"),
    ("#### 18\n####", "18", "####"),
    ("##### 18", "18", "####"),
    ("#### 18\nThe answer is 20, or \\boxed{21}, or 22", "18", "####"),
    ("#### $18.00", "18.00", "####"),
    ("#### -$5", "-5", "####"),
    ("#### $-5", "-5", "####"),
    ("#### - 5", "-5", "####"),
    ("#### -5", "-5", "####"),
    ("#### \u221218", "-18", "####"),
    ("#### +18", "18", "####"),
    ("#### 5 apples", "5", "####"),
    ("#### 5 apples and 3 pears", "5", "####"),
    ("#### 1,000", "1000", "####"),
    ("#### 18...", "18", "####"),
    ("#### **72**.", "72", "####"),
    ("#### (72)", "72", "####"),
    ("####: `72`", "72", "####"),
    ("#### .5", ".5", "####"),
    ("#### 50%", "50", "####"),
    ("#### 1/2", "1/2", "####"),
    ("#### 1 / 2", "1/2", "####"),
    ("#### 10-3=7", "7", "####"),
    ("#### x = -3", "-3", "####"),
    ("#### $9 + $9 = $18", "18", "####"),
    ("#### 15 gallons * 8 pints / gallon = 120 pints", "120", "####"),
    ("#### 5 since 2 + 4 = 6 is too many", "5", "####"),
    ("#### 12\u20ac", "12", "####"),
    ("#### \u20ac12", "12", "####"),
    ("#### 18\n" + "and so on, " * 100, "18", "####"),                  # not only the last 300 characters
    # #### without a number falls on
    ("#### none\nThe answer is 7", "7", "phrase"),
    ("#### Step 1: count\nThere are 7", "7", "number"),                # a markdown heading is no answer
    ("7\n####", "7", "number"),
    ("####\n18", "18", "number"),                                      # strict means: on the same line
    # boxes
    (r"so \boxed{18}", "18", "boxed"),
    (r"\boxed{18} and then \boxed{20}.", "20", "boxed"),
    (r"\boxed{20} and an open \boxed{21", "20", "boxed"),
    (r"\boxed{\boxed{5}}", "5", "boxed"),
    (r"\boxed{\boxed{5}", "5", "boxed"),
    (r"}} {\boxed{5}", "5", "boxed"),
    (r"\boxed{\text{5 apples}}", "5", "boxed"),
    (r"\boxed{x_1 = 5}", "5", "boxed"),
    (r"\boxed{5 = x}", "5", "boxed"),
    (r"\boxed{5\text{ m}^2}", "5", "boxed"),
    (r"\boxed{\{5\}}", "5", "boxed"),
    (r"\boxed{\$1{,}000}", "1000", "boxed"),
    (r"\boxed{50\%}", "50", "boxed"),
    (r"\boxed{-\frac{1}{2}}", "-1/2", "boxed"),
    (r"the answer is 7, \boxed{}", "7", "phrase"),
    (r"\boxed{8} The answer is 7", "8", "boxed"),
    # phrases
    ("The answer is: $5", "5", "phrase"),
    ("answer: 7", "7", "phrase"),
    ("ANSWER: 7 of 9", "7", "phrase"),
    ("the final answer is **72**.", "72", "phrase"),
    ("**Answer:** 72, not 71", "72", "phrase"),
    ("The answer is 5. Wait, the answer is 6. Right, not 7.", "6", "phrase"),
    ("The answer is 5 because 2+2=4", "5", "phrase"),
    ("The answer is 2+3=5, not 6", "5", "phrase"),
    ("Answer: Tom has 3 and eats 1, so 2", "2", "number"),             # a whole solution behind "Answer:"
    ("The answer is unclear: 3 or 4", "4", "number"),
    ("no answers is 3", "3", "number"),
    # the last number
    ("She makes $18 a day", "18", "number"),
    ("pages 3-4", "4", "number"),
    ("pages 3\u22124", "4", "number"),
    ("10-3=7", "7", "number"),
    ("10 - 3", "3", "number"),
    ("10-$5", "5", "number"),
    ("x=-3", "-3", "number"),
    ("it is (-3)", "-3", "number"),
    ("it fell to -$5.50.", "-5.50", "number"),
    ("it is $.50", ".50", "number"),
    ("step-3", "3", "number"),
    ("- 5 apples", "5", "number"),                                     # a bullet, not a sign
    ("--5", "5", "number"),
    ("18...", "18", "number"),
    ("1,000.50 in all", "1000.50", "number"),
    ("it cost 1,000, or so", "1000", "number"),
    ("one of 1,2,3", "3", "number"),                                   # a comma groups exactly three digits
    ("1,00,000", "00000", "number"),
    ("1,0000", "0000", "number"),
    ("1234,567", "567", "number"),
    ("on 2024-01-05", "05", "number"),
    ("on 10/12/2024", "2024", "number"),
    ("at 12:30", "30", "number"),
    ("2 1/2", "1/2", "number"),
    ("1e3", "1e3", "number"),
    ("1.5e-2", "1.5e-2", "number"),
    ("3 eggs", "3", "number"),
    ("5/hour", "5", "number"),
    ("1/0", "1/0", "number"),
    # nothing
    ("", None, None),
    ("I do not know", None, None),
    ("####", None, None),
    ("\\boxed{}", None, None),
    ("the answer is:", None, None),
    ("\nQuestion: 5? #### 5", None, None),
    ("\u0661\u0662", None, None),                                      # digits of another script
]

NUMBERS = [
    ("18", 18), ("-18", -18), ("+18", 18), ("\u221218", -18), ("$18.00", 18), ("18...", 18), ("3.0", 3),
    ("50%", 50), ("50 %", 50), ("1/2", Fraction(1, 2)), ("-1/2", Fraction(-1, 2)), ("1.5/2", Fraction(3, 4)),
    ("$5.50", Fraction(11, 2)), ("72.", 72), ("**72**", 72), ("(72)", 72), ("[72]", 72), (" 72\n", 72),
    ("1,000", 1000), ("1000.0", 1000), ("1,000,000", 10 ** 6), (".5", Fraction(1, 2)),
    ("-$5", -5), ("$-5", -5),
    ("1e3", 1000), ("1e-2", Fraction(1, 100)), ("007", 7), ("0.1", Fraction(1, 10)), ("-0", 0), ("0/5", 0),
    ("12345678901234567", 12345678901234567), (r"\frac{1}{3}", Fraction(1, 3)), (r"\$5", 5),
    ("1/0", None), ("1/0.0", None), ("0/0", None), ("", None), (".", None), ("-", None),
    ("$", None), ("%", None),
    ("five", None), ("5 apples", None), ("x5", None), ("3-4", None), ("1 2", None),
    ("2 1/2", None), ("12:30", None),
    ("1,00,000", None), ("1,2", None), ("1/2/3", None), ("1.2.3", None), ("--5", None), ("1e9999", None),
    ("\u0661", None), ("\ud800", None), ("\0", None), ("9" * 1001, None), ("9" * 100_000, None),
]

VERDICTS = [  # text, reference, verdict
    ("#### 18", "18", True), ("#### 18.0", "9 * 2 = <<9*2=18>>18\n#### 18", True), ("#### 19", "18", False),
    ("1,000", "1000.0", True), ("$5.50", "5.5", True), ("72.", "72", True), ("0.5", "1/2", True),
    ("2/4", "1/2", True), ("50%", "50", True), ("50", "50%", True), ("0.5", "50%", False),
    ("\u221218", "-18", True), ("18", "-18", False), ("#### 18\n\nQuestion: 5?\n#### 7", "18", True),
    ("#### 18\n\nQuestion: 5?\n#### 7", "7", False), ("18", "#### 18\nQuestion: 5? #### 7", True),
    ("0.3333333333333333", "1/3", False), ("12345678901234567", "12345678901234568", False),
    ("I do not know", "18", False), ("", "18", False), ("18", "", False),
    ("18", None, False), (None, "18", False),
    ("18", "   ", False), (" ", " ", False), ("1/0", "1/0", True), ("1/0", "0", False), ("0", "1/0", False),
    ("9" * 5000, "9" * 5000, True), ("9" * 5000, "9" * 4999, False), ("9" * 5000, "9", False),
    # references without a digit: words
    ("The answer is Blue .", "blue", True), ("#### light   BLUE", "Light blue", True),
    ("#### red", "blue", False),
    ("3 cars, 4 of them\n#### B", "2 + 2\n#### (B)", True), ("3 cars #### A", "2 + 2 #### B", False),
    (r"\boxed{B}", "B", True), ("18", "blue", False), ("", "blue", False), ("#### ", "####", False),
]


FORMULAS = r"""
12 | -4.5 | .5 | 0.35 | 1,000,000 | 1,\!000 | 10{,}080 | \$18.90 | \$32,\!348 | 75\% | 14\frac{2}{7}\% | 120^\circ
90^{\circ} | \frac{3}{4} | -\frac{11}{7} | \dfrac{1}{12} | \frac12 | \frac1{72} | \frac{1}2 | 2\frac{3}{5}
3 \frac{1}{2} | 2516_8 | 1010_{2} | 52_{10} | 3\sqrt{13} | \sqrt2 | \sqrt[3]{4} | \frac{\sqrt{3}}{2} | 2 + 2\sqrt{2}
1 \pm \sqrt{19} | \frac{3 \pm \sqrt{5}}{2} | \pi | \frac{\pi}{4} | 25\pi \text{ cm}^2 | e^{i\pi/3} | -3 + 4i | i
2^{10} | 10^{-3} | 0.\overline{72} | x^2 + 2x + 1 | (x-2)(x+2) | 6r^2-4r-24 | y = 2x + 3 | f^{-1}(x) = \frac{x}{2}
P(x) = x^3 - 3x | \frac{x-1}{x+1} | |x-3| | \sqrt{x^2+1} | \cos 20^\circ | \log_2 3 | \binom{10}{3} | n! | x \ge 3
3 < x \leq 5 | \theta = \frac{\pi}{6} | 4:3 | 6:30 | 5 \text{ inches} | 13 \text{ cm}^2 | 6 \text{ square units}
5 square units | 20^\circ\text{C} | \text{6:30 p.m.} | \text{June 20} | \text{even} | \text{Evelyn} | \text{(A)}
\textbf{(C)} | \text{no solution} | \text{all real numbers} | \text{A, C} | A,B,D | (3,4)
\left( 3, \frac{\pi}{2} \right) | \left(-\frac12, 1, \frac{3}{4}\right) | (1,000) | (100,200) | (1,(2,3))
(-\infty, 2) | [0, 1) | \left[\frac12,\infty\right) | (-\infty,-3]\cup[3,\infty) | x \in [-2,7] | -\infty
\emptyset | \{1,2,3\} | \left\{-1, \frac{1}{2}\right\} | \{5\} | 1, -2 | 3, 5, 7 | 1 \text{ and } 2 | x=1, x=-2
\text{II} \text{ and } \text{III} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{bmatrix} 1 \\ x^2 \end{bmatrix} | \frac{1}{0} | \boxed{5}
\mathbf{v} | \mathbb{R} | \clubsuit | * | \% | > | . | $ | \, | \{ | ]1,2[ | ((( | ,,, | \frac | \sqrt | \text{
""".replace("\n", " | ").strip(" |").split(" | ")

EQUAL = [  # spellings of a class are one answer, different classes different answers
    [r"\frac{1}{2}", r"\dfrac12", r"\tfrac{2}{4}", "1/2", "0.5", ".50", r"\frac{-1}{-2}", r"x = \frac{1}{2}",
     "$.5$", r"0.5\,"],
    [r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-1/2", "\u22120.5", r"-\frac12."],
    [r"2\frac{1}{2}", "5/2", "2 1/2", "2.5", r"\frac{5}{2}", r"\frac{2.5}{1}"], ["21/2", r"\frac{21}2"],
    ["1000", "1,000", r"1,\!000", "1{,}000", r"\$1000.00", r"1000\text{ dollars}"],
    ["12", r"12\%", r"12^\circ", r"12 \text{ cm}", r"12\mathrm{cm}^2", "12 cm^2", "12 inches", r"\text{12}", "+12",
     "(12)", r"\boxed{12}"],
    [r"3\sqrt{13}", r"3 \sqrt {13}", r"3\,\sqrt{13}"], [r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "\u221a2"],
    [r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\sqrt3/2", r"\dfrac{\sqrt{3}}2"],
    [r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt{3}}{2}"],
    [r"\frac{\pi}{4}", r"\pi/4", "\u03c0/4", r"\theta = \frac{\pi}{4}"], [r"12\pi", r"12 \pi\text{ cm}^2"],
    ["x^2+2x+1", "x^{2} + 2x + 1", "y = x^2 + 2x + 1", "f(x)=x^2+2x+1", r"x^2+2\,x+1"], ["x^2+2x-1"], ["X^2+2x+1"],
    ["(1,2)", "(1, 2)", r"\left( 1,\ 2\right)", r"(\frac{2}{2}, 2.0)", "(x, y) = (1, 2)"], ["(2,1)"],
    ["(1,2]", r"\left(1, 2 \right]"], ["[1,2]", r"x \in [1, 2]"], ["[1,2)"], ["(1,2,3)"],
    [r"\{1,2\}", r"\left\{ 2, 1 \right\}", r"\lbrace 1,2\rbrace"], ["1,2", "2, 1", r"1\text{ and }2", "1 or 2"],
    ["1,3"], ["1,2,2"], ["x=1, y=2"], ["x=2, y=1"],
    [r"(-\infty,0)\cup(1,\infty)", r"x\in (1, \infty) \cup (-\infty, 0)", "(-\u221e,0)\u222a(1,+\u221e)"],
    [r"(-\infty,0]\cup(1,\infty)"], [r"\infty", r"+\infty"], [r"-\infty"], [r"\emptyset", r"\varnothing"],
    [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}"],
    [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"], [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    [r"\text{even}", "even", "Even.", r"\textbf{even}", r"\mathrm{ even}"], [r"\text{odd}"],
    ["A", "(A)", r"\text{(A)}"], ["a"], ["2516_8", "2516_{8}"], ["2516"], ["2516_9"], ["12x"], ["1 2"], ["5!"],
    ["|5|"], ["5"], [r"5\sqrt{2}"], ["5^2"], [r"5\cdot2", r"5\times 2"], [r"3 < x \leq 5", r"3<x\le 5"],
    ["3 < x < 5"], ["2:3"], ["2/3"], ["1234567890123456789"], ["1234567890123456788"], ["(100, 2000)"],
    [r"9\text{ am}"], [r"9\text{ pm}", r"9 \text{pm}"], ["3 plus x"], ["-2,1", "1, -2", "x=1, x=-2", "x = -2 or x = 1"],
    [r"\frac{1}{x}", "1/x"], ["1/2x"], [r"\$5,\!000,\!000", "5,000,000"], ["0"], ["1/0", r"\frac{1}{0}"],
]

STATED = [  # text, reference, verdict: where the answer of a MATH solution, or a letter, is found
    (r"so \boxed{3} or rather \boxed{\frac{1}{2}}.", r"\boxed{0.5}", True),
    (r"\boxed{11111111100}", r"\boxed{11,\! 111,\! 111,\! 100}", True), (r"\boxed{11,\! 11}", r"\boxed{1111}", False),
    (r"\boxed{18\pi}", r"\boxed{18}", False), (r"\boxed{18} or \boxed{(18, 3)}", r"\boxed{18}", False),
    (r"\boxed{18} but \boxed{19", r"\boxed{18}", True), ("9 + 9 = 18\n#### 18", r"\boxed{18}", True),
    ("The answer is $18$, as 9 + 9 = 18.", r"\boxed{18}", True),
    (r"The answer is $5\sqrt{2}$.", r"\boxed{5}", False), (r"The answer is \(x^2\). Done", r"\boxed{x^{2}}", True),
    ("#### Step 1: add\nThere are 18", r"\boxed{18}", True),
    ("#### Step 1: add\nThere are \\boxed{18}", r"\boxed{18}", True),
    ("We add 9 and 9\nto get 18", r"\boxed{18}", True), ("We add 9 and 9 and get 18", r"\boxed{18}", True),
    (r"\frac{1}{2}", r"\boxed{\frac12}", True), (r"\boxed{\frac{1}{2}}", r"\frac12", True),
    ("I do not know", r"\boxed{x}", False), ("\\boxed{x}\n\nQuestion: next?\n\\boxed{y}", r"\boxed{x}", True),
    (r"\boxed{(100, 200)}", r"\boxed{(100,200)}", True), (r"\boxed{(1,000)}", r"\boxed{1000}", True),
    (r"\\boxed{\\frac{1}{2}}", r"\boxed{\frac{1}{2}}", True), ("x" * 2000, r"\boxed{x}", False),
    (r"\boxed{" + "x" * 2000 + "}", r"\boxed{" + "x" * 2000 + "}", True), ("", r"\boxed{x}", False),
    (r"\boxed{B}", r"\boxed{\text{(B)}}", True), (r"\boxed{120, 135}", r"\boxed{120,135}", True),
    (r"\boxed{120,135}", r"\boxed{135,120}", True), (r"\boxed{120,135}", r"\boxed{120,136}", False),
] + [(text, "Light is fast.\n#### B", True) for text in (
    "B", "(B)", "B.", "b", "**B**", r"\boxed{B}", r"\boxed{\text{B}}", "The answer is (B)",
    "the answer is (b) since 3 > 2", "#### B", "The answer is B, because A is slow.", "The answer is B because of C",
    "####B\nQuestion: next?", "Answer: B", "The answer is option B.",
    "the correct answer is: **B. light**", "(B) light", "B) light", "A or B?\nNot A.\n#### (B)",
    r"The answer is $\boxed{\textbf{(B)}}$")] + [
    (text, "Light is fast.\n#### B", False) for text in (
    "C", "light", "The answer is light", "Because", "A\n#### C", "#### C\nB", "the answer is blue",
    "The answer is A, not B", "", "4", "\\boxed{B}\n#### A", "(A) is wrong\n(B) may be right")]


@pytest.mark.parametrize("text, reference, verdict", STATED)
def test_where_formulas_and_letters_are_found(text, reference, verdict):
    """Boxes before all else for formulas and #### for letters; one text never has two answers."""
    assert grade(text, reference) is verdict


def test_formulas_equal_themselves():
    """Every reference, however odd, is graded right against itself: as its box, as a solution, with other spacing;
    against the next one it is wrong; its canonical spelling, read again, stays what it is."""
    assert len(FORMULAS) > 110
    for gold, other in zip(FORMULAS, FORMULAS[1:] + FORMULAS[:1]):
        if gold.count("{") != gold.count("}") or not gold.strip():
            continue
        reference = f"As $x_1 = 7$, we find $\\boxed{{{gold}}}$.\n\nDone."
        dot = "." * bool(re.search("[0-9A-Za-z]", gold))               # "*" and "." have nothing but decoration
        for text in (reference, f"\\boxed{{{gold}}}", f"\\boxed{{ {gold} }}", f"Thus:\n\\[\\boxed{{{gold}{dot}}}\\]"):
            assert grade(text, reference), (gold, text)
        assert find_formula(reference) == (canonical(gold), "boxed") and canonical(gold)
        assert canonical(canonical(gold)) == canonical(gold), gold
        assert canonical(other) == canonical(gold) or not grade(f"\\boxed{{{other}}}", reference), (gold, other)


def test_equal_and_different_formulas():
    """Spellings of a class have one canonical spelling, different classes two; grade says so in both directions."""
    found = [{canonical(a) for a in spellings} for spellings in EQUAL]
    assert all(len(one) == 1 for one in found), [e for e, one in zip(EQUAL, found) if len(one) > 1]
    assert len(set.union(*found)) == len(EQUAL)
    for mine, others in zip(EQUAL, EQUAL[1:] + EQUAL[:1]):
        for a in mine:
            for b in (mine[0], others[-1]):
                texts = f"\\boxed{{{a}}}", f"so\n$\\boxed{{{b}}}$"
                assert grade(*texts) is grade(*texts[::-1]) is (b in mine), (a, b)


@pytest.mark.parametrize("text, answer, rule", ANSWERS)
def test_answer_and_rule(text, answer, rule):
    """Each trap gives the written answer by the written rule, and extract_answer agrees."""
    assert find_answer(text) == (answer, rule)
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, value", NUMBERS)
def test_number(text, value):
    """One spelling, one exact fraction; all else is None and nothing raises."""
    number = to_number(text)
    assert number == value
    assert number is None or type(number) is Fraction                  # a float would compare equal by luck


@pytest.mark.parametrize("text, reference, verdict", VERDICTS)
def test_verdict(text, reference, verdict):
    """grade says what a person would; the strings are compared only where there is no number."""
    assert grade(text, reference) is verdict


def test_calculator_marks():
    """Marks vanish with their brackets; text and unbalanced brackets stay byte for byte."""
    assert strip_calculator_marks("48/2 = <<48/2=24>>24, 1+1=<<1+1=2>>2") == "48/2 = 24, 1+1=2"
    for text in ("", "2 < 3 > 1", "<<48/2=24", "48>>24", "<48>", "a << b\n> c"):
        assert strip_calculator_marks(text) == text
    assert strip_calculator_marks("<< <<1=1>>1") == "<< 1"


def test_gold_against_gold():
    """On real references: each equals itself, its bare answer (both ways) and itself without marks, by the
    strict rule, whatever question follows; without `####` the last number finds it; plus one is wrong."""
    assert len(GOLD) == 300
    for row in GOLD:
        gold = row["answer"]
        bare = gold.rpartition("####")[2].strip()
        value = Fraction(bare.replace(",", ""))
        clean = strip_calculator_marks(gold)
        assert find_answer(gold)[1] == "####" and to_number(extract_answer(gold)) == value == to_number(bare)
        for text in (gold, clean, bare, clean.replace("####", ""), clean + "\n\nQuestion: 5?\n#### 7"):
            assert grade(text, gold) and grade(text, bare), text
        assert grade(gold, clean) and "<<" not in clean and ">>" not in clean
        assert not grade(gold, str(value + 1)) and not grade(clean + "\n#### " + str(value + 1), gold)


def spell(value, rng):
    """A random exact spelling of a fraction: a/b not in lowest terms, decimals, commas, decoration."""
    factor = rng.randint(1, 9)
    whole = f"{abs(value.numerator):,}" if rng.random() < .5 else str(abs(value.numerator))
    ratio = f"{abs(value.numerator) * factor}/{value.denominator * factor}"
    text = whole if value.denominator == 1 else ratio
    if 100 % value.denominator == 0 and rng.random() < .5:
        hundredths = abs(value.numerator) * (100 // value.denominator)
        text = f"{hundredths // 100:,}.{hundredths % 100:02d}" + "0" * rng.randint(0, 2)
    minus = rng.choice("-\u2212") if value < 0 else ""
    text = rng.choice((minus + text, minus + "$" + text, "$" + minus + text))
    return rng.choice(("{}", "{}.", "**{}**", "({})", "{}%", "{}...", " {} ")).format(text)


def test_pairs_of_numbers():
    """Any spelling of equal fractions is equal, of different ones different, either way round, and inside any
    of the four forms of an answer; a spelling read back is the fraction it was made from."""
    rng = random.Random(0)
    values = [Fraction(rng.randint(-3000, 3000), rng.choice((1, 1, 2, 3, 4, 5, 7, 100))) for _ in range(60)]
    forms = ("{}", "2 + 2\n#### {}", "so \\boxed{{{}}}", "The answer is {}")
    for _ in range(1500):
        a, b = rng.choice(values), rng.choice(values)
        b = a if rng.random() < .5 else b
        left, right = spell(a, rng), spell(b, rng)
        assert to_number(left) == a and to_number(right) == b, (left, right)
        left, right = rng.choice(forms).format(left), rng.choice(forms).format(right)
        assert grade(left, right) is grade(right, left) is (a == b), (left, right)


PIECES = ["#### ", "####", "\\boxed{", "{", "}", "\\{", "\\frac{1}{2}", "{,}", "answer is ", "Answer:", "\n",
          "=", "-", "+", "\u2212", "$", "%", ",", ".", "/", "0", "1", "18", "000", "e", "e9", "x", "because",
          " ", "*", "(", ")", "\\", "\\$", "<<", ">>", "\nQuestion:", "\ud800", "\udfff", "\0", "\u0661",
          "\u00b2", "\u00bd", "\u0130", "\U0001f600", "\r", "\t"]


def test_random_text_never_raises():
    """On 3,000 strings of nasty pieces nothing raises; an answer is plain and has a rule; reading it again
    changes nothing; a text that has an answer or words is graded right against itself."""
    rng = random.Random(1)
    previous = "18"
    for _ in range(3_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 24)))
        answer, rule = find_answer(text)
        assert (answer is None) == (rule is None) and rule in ("####", "boxed", "phrase", "number", None)
        assert grade(text, previous) in (True, False) and grade(previous, text) in (True, False)
        to_number(text), strip_calculator_marks(text), find_letter(text)
        formula, box = find_formula(text)[0], f"\\boxed{{x{text}}}"
        assert (formula is None or formula) and {grade(text, box), grade(box, text)} <= {True, False}
        if answer is None:
            assert not re.search("[0-9]", text.split("\nQuestion:")[0])
        else:
            assert re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?(/[0-9.]+(e-?[0-9]+)?)?", answer), (text, answer)
            assert extract_answer(answer) == answer and grade(text, text), text
        previous = text


HOSTILE = ["(", "1,", "1,111,", "#", "#### ", "#### 1=", "=", "\\boxed{", "{", "}", "\\boxed", "9", "1/",
           "1.", "111,", "1e", "-", "$-", ".", " ", "answer", "answer is ", "answer: -", "answer is\n", "<<",
           "<<1", "\\frac{1", "{,}", "1 a", "1 a,", "x=", "\nQuestion", "1" + " " * 50, "\ud800", "$",
           "\\(", "\\frac", "\\sqrt{", "\\text{", "\\left(", "\\cup", "(1,", "ab ", "\\\\", "^{",
           "#### x\n", "answer is x\n", "(A", "option "]


def test_time_is_linear():
    """50 kB of any repeated piece, alone and behind all the markers, costs each function under half a second
    of processor time (measured: under .05). A quadratic scan takes 1e9 character steps, over a second."""
    for piece in HOSTILE:
        body = piece * (50_000 // len(piece))
        marked = "\\boxed{the answer is #### " + body + "x"
        calls = [(find_answer, marked), (lambda text: grade(text, "blue"), body),
                 (strip_calculator_marks, body), (to_number, "1" + body + "!x"), (find_letter, marked),
                 (lambda text: grade(text, text), "\\boxed{" + body + "}"), (canonical, body[:1000]),
                 (lambda text: grade(text, "\\boxed{\\frac{1}{x}}"), body), (find_formula, "answer is " + body)]
        for function, text in calls:
            start = time.process_time()
            function(text)
            assert time.process_time() - start < .5, (function, piece)


def test_nested_boxes_are_linear():
    """16,000 balanced boxes inside each other cost one pass, not one for each of them."""
    start = time.process_time()
    assert find_answer("\\boxed{" * 16_000 + "5" + "}" * 16_000) == ("5", "boxed")
    assert time.process_time() - start < .5
