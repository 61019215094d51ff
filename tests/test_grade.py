"""The grader against tables written by hand, 300 real references and hostile text. A row of a table
is what a careful person reads as the answer, or a documented decision where people differ."""
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from critic import canonical, extract_answer, find_answer, grade, number, same_answer
from critic import read_formula, read_letter

DATA = Path(__file__).parent / "data" / "gsm8k_300.jsonl"

ANSWERS = [
    ("9 * 2 = 18\n#### 18", "18", "####"),
    ("#### 18\n\nQuestion: how many are 3 and 4?\n#### 7", "18", "####"),
    ("#### 18 #### 20", "20", "####"),
    ("#### 18\nThe answer is 20, or \\boxed{21}, or 22", "18", "####"),
    ("#### $18.00", "18.00", "####"), ("#### - 5", "-5", "####"), ("#### \u221218", "-18", "####"),
    ("#### 5 apples", "5", "####"), ("#### 5 apples and 3 pears", "5", "####"),
    ("#### 1,000", "1000", "####"), ("#### **72**.", "72", "####"), ("#### 1 / 2", "1/2", "####"),
    ("#### 10-3=7", "7", "####"), ("#### x = -3", "-3", "####"),
    ("#### $9 + $9 = $18", "18", "####"),
    ("#### 15 gallons * 8 pints / gallon = 120 pints", "120", "####"),
    ("#### 5 since 2 + 4 = 6 is too many", "5", "####"), ("#### \u20ac12", "12", "####"),
    ("#### none\nThe answer is 7", "7", "phrase"),
    ("#### Step 1: count\nThere are 7", "7", "bare"), ("7\n####", "7", "bare"),
    (r"\boxed{18} and then \boxed{20}.", "20", "boxed"),
    (r"\boxed{20} and an open \boxed{21", "20", "boxed"),
    (r"\boxed{\text{5 apples}}", "5", "boxed"), (r"\boxed{x_1 = 5}", "5", "boxed"),
    (r"\boxed{5\text{ m}^2}", "5", "boxed"), (r"\boxed{\$1{,}000}", "1000", "boxed"),
    (r"\boxed{-\frac{1}{2}}", "-1/2", "boxed"), (r"the answer is 7, \boxed{}", "7", "phrase"),
    ("The answer is: $5", "5", "phrase"), ("ANSWER: 7 of 9", "7", "phrase"),
    ("**Answer:** 72, not 71", "72", "phrase"),
    ("The answer is 5. Wait, the answer is 6. Right, not 7.", "6", "phrase"),
    ("The answer is 5 because 2+2=4", "5", "phrase"),
    ("The answer is 2+3=5, not 6", "5", "phrase"),
    ("Answer: Tom has 3 and eats 1, so 2", "2", "bare"), ("She makes $18 a day", "18", "bare"),
    ("pages 3\u22124", "4", "bare"), ("10-3=7", "7", "bare"), ("10 - 3", "3", "bare"),
    ("x=-3", "-3", "bare"), ("it fell to -$5.50.", "-5.50", "bare"), ("- 5 apples", "5", "bare"),
    ("1,000.50 in all", "1000.50", "bare"), ("it cost 1,000, or so", "1000", "bare"),
    ("1,00,000", "00000", "bare"), ("on 2024-01-05", "05", "bare"),
    ("on 10/12/2024", "2024", "bare"), ("2 1/2", "1/2", "bare"), ("1e3", "1e3", "bare"),
    ("5/hour", "5", "bare"), ("", None, None), ("####", None, None), (r"\boxed{}", None, None),
    ("\nQuestion: 5? #### 5", None, None), ("\u0661\u0662", None, None),
    ("The answer is unclear: 3 or 4", "unclear: 3 or 4", "phrase"),
    ("#### 18 or 20", "18 or 20", "####"), ("#### 18, 20", "18, 20", "####"),
    ("#### 18-20", "18-20", "####"), ("#### 18 + 0", "18 + 0", "####"),
    ("#### between 10 and 18", "between 10 and 18", "####"), ("#### 1 000", "1 000", "####"),
    ("#### 1\u202f000", "1000", "####"), ("#### 2 1/2", "2 1/2", "####"),
    ("#### 2^3", "2^3", "####"), ("#### 18\u03c0", "18\u03c0", "####"),
    (r"\boxed{\frac12}", "1/2", "boxed"), (r"\boxed{2\frac{1}{2}}", "5/2", "boxed"),
    (r"\boxed{\frac{-1}{2}}", "-1/2", "boxed"), (r"\boxed{18\pi}", r"18\pi", "boxed"),
    ("#### 18 is the answer, because 3 > 2", "18", "####"), ("#### \u20135", "-5", "####"),
    ("The answer is \uff0d5.", "-5", "phrase"), ("pages 3\u20134", "4", "bare"),
    ("#### 18 dollars or 20", "18 dollars or 20", "####"), ("<answer>18</answer>", "18", "phrase"),
    ("The answer is 72, in total", "72", "phrase"), ("18 dollars</s>", "18", "bare")]

NUMBERS = [
    ("18", "18"), ("\u221218", "-18"), ("$18.00", "18"), ("18...", "18"), ("3.0", "3"),
    ("50%", "50"), ("50 %", "50"), ("1/2", "1/2"), ("**72**", "72"), ("1,000", "1000"),
    (".5", "1/2"), ("$-5", "-5"), ("1e3", "1000"), ("007", "7"), ("-0", "0"),
    ("12345678901234567", "12345678901234567"), ("1/0", None), ("", None), ("five", None),
    ("5 apples", None), ("3-4", None), ("2 1/2", None), ("1,00,000", None), ("1/2/3", None),
    ("1.2.3", None), ("1e9999", None), ("\ud800", None)]

VERDICTS = [
    ("#### 18.0", "9 * 2 = <<9*2=18>>18\n#### 18", True), ("#### 19", "18", False),
    ("$5.50", "5.5", True), ("0.5", "1/2", True), ("50%", "50", True), ("0.5", "50%", False),
    ("\u221218", "-18", True), ("#### 18\n\nQuestion: 5?\n#### 7", "18", True),
    ("#### 18\n\nQuestion: 5?\n#### 7", "7", False), ("18", "#### 18\nQuestion: 5? #### 7", True),
    ("0.3333333333333333", "1/3", False), ("12345678901234567", "12345678901234568", False),
    ("I do not know", "18", False), ("", "18", False), (None, "18", False), ("18", "   ", False),
    (" ", " ", False), ("1/0", "1/0", True), ("The answer is Blue .", "blue", True),
    ("#### light   BLUE", "Light blue", True),
    ("3 cars, 4 of them\n#### B", "2 + 2\n#### (B)", True), (r"\boxed{B}", "B", True),
    ("#### ", "####", False)]

FORMULAS = r"""
12 | -4.5 | .5 | 0.35 | 1,000,000 | 1,\!000 | 10{,}080 | \$18.90 | \$32,\!348 | 75\%
14\frac{2}{7}\% | 120^\circ | 90^{\circ} | \frac{3}{4} | -\frac{11}{7} | \dfrac{1}{12} | \frac12
\frac1{72} | \frac{1}2 | 2\frac{3}{5} | 3 \frac{1}{2} | 2516_8 | 1010_{2} | 52_{10} | 3\sqrt{13}
\sqrt2 | \sqrt[3]{4} | \frac{\sqrt{3}}{2} | 2 + 2\sqrt{2} | 1 \pm \sqrt{19}
\frac{3 \pm \sqrt{5}}{2} | \pi | \frac{\pi}{4} | 25\pi \text{ cm}^2 | e^{i\pi/3} | -3 + 4i | i
2^{10} | 10^{-3} | 0.\overline{72} | x^2 + 2x + 1 | (x-2)(x+2) | 6r^2-4r-24 | y = 2x + 3
f^{-1}(x) = \frac{x}{2} | P(x) = x^3 - 3x | \frac{x-1}{x+1} | |x-3| | \sqrt{x^2+1} | \cos 20^\circ
\log_2 3 | \binom{10}{3} | n! | x \ge 3 | 3 < x \leq 5 | \theta = \frac{\pi}{6} | 4:3 | 6:30
5 \text{ inches} | 13 \text{ cm}^2 | 6 \text{ square units} | 5 square units | 20^\circ\text{C}
\text{6:30 p.m.} | \text{June 20} | \text{even} | \text{Evelyn} | \text{(A)} | \textbf{(C)}
\text{no solution} | \text{all real numbers} | \text{A, C} | A,B,D | (3,4)
\left( 3, \frac{\pi}{2} \right) | \left(-\frac12, 1, \frac{3}{4}\right) | (1,000) | (100,200)
(1,(2,3)) | (-\infty, 2) | [0, 1) | \left[\frac12,\infty\right) | (-\infty,-3]\cup[3,\infty)
x \in [-2,7] | -\infty | \emptyset | \{1,2,3\} | \left\{-1, \frac{1}{2}\right\} | \{5\} | 1, -2
3, 5, 7 | 1 \text{ and } 2 | x=1, x=-2 | \text{II} \text{ and } \text{III}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}
\begin{bmatrix} 1 \\ x^2 \end{bmatrix} | \frac{1}{0} | \boxed{5} | \mathbf{v} | \mathbb{R}
\clubsuit | * | \% | > | . | $ | \, | \{ | ]1,2[ | ((( | ,,, | \frac | \sqrt | \text{
""".replace("\n", " | ").strip(" |").split(" | ")

EQUAL = [
   
    [r"\frac{1}{2}", r"\dfrac12", r"\tfrac{2}{4}", "1/2", "0.5", ".50", r"\frac{-1}{-2}",
     r"x = \frac{1}{2}", "$.5$", r"0.5\,"],
    [r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-1/2", "\u22120.5", r"-\frac12."],
    [r"2\frac{1}{2}", "5/2", "2 1/2", "2.5", r"\frac{5}{2}", r"\frac{2.5}{1}"],
    ["21/2", r"\frac{21}2"],
    ["1000", "1,000", r"1,\!000", "1{,}000", r"\$1000.00", r"1000\text{ dollars}"],
    ["12", r"12\%", r"12^\circ", r"12 \text{ cm}", r"12\mathrm{cm}^2", "12 cm^2",
     "12 inches", r"\text{12}", "+12", "(12)", r"\boxed{12}"],
    [r"3\sqrt{13}", r"3 \sqrt {13}", r"3\,\sqrt{13}"],
    [r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "\u221a2"],
    [r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\sqrt3/2", r"\dfrac{\sqrt{3}}2"],
    [r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt{3}}{2}"],
    [r"\frac{\pi}{4}", r"\pi/4", "\u03c0/4", r"\theta = \frac{\pi}{4}"],
    [r"12\pi", r"12 \pi\text{ cm}^2"],
    ["x^2+2x+1", "x^{2} + 2x + 1", "y = x^2 + 2x + 1", "f(x)=x^2+2x+1", r"x^2+2\,x+1"],
    ["x^2+2x-1"], ["X^2+2x+1"],
    ["(1,2)", "(1, 2)", r"\left( 1,\ 2\right)", r"(\frac{2}{2}, 2.0)", "(x, y) = (1, 2)"],
    ["(2,1)"], ["(1,2]", r"\left(1, 2 \right]"], ["[1,2]", r"x \in [1, 2]"], ["[1,2)"],
    ["(1,2,3)"], [r"\{1,2\}", r"\left\{ 2, 1 \right\}", r"\lbrace 1,2\rbrace"],
    ["1,2", "2, 1", r"1\text{ and }2", "1 or 2"], ["1,3"], ["1,2,2"], ["x=1, y=2"], ["x=2, y=1"],
    [r"(-\infty,0)\cup(1,\infty)", r"x\in (1, \infty) \cup (-\infty, 0)",
     "(-\u221e,0)\u222a(1,+\u221e)"],
    [r"(-\infty,0]\cup(1,\infty)"], [r"\infty", r"+\infty"], [r"-\infty"],
    [r"\emptyset", r"\varnothing"],
    [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
     r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}"],
    [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"], [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    [r"\text{even}", "even", "Even.", r"\textbf{even}", r"\mathrm{ even}"], [r"\text{odd}"],
    ["A", "(A)", r"\text{(A)}"], ["a"], ["2516_8", "2516_{8}"], ["2516"], ["2516_9"], ["12x"],
    ["1 2"], ["5!"], ["|5|"], ["5"], [r"5\sqrt{2}"], ["5^2"], [r"5\cdot2", r"5\times 2"],
    [r"3 < x \leq 5", r"3<x\le 5"], ["3 < x < 5"], ["2:3"], ["2/3"], ["1234567890123456789"],
    ["1234567890123456788"], ["(100, 2000)"], [r"9\text{ am}"], [r"9\text{ pm}", r"9 \text{pm}"],
    ["3 plus x"], ["-2,1", "1, -2", "x=1, x=-2", "x = -2 or x = 1"], [r"\frac{1}{x}", "1/x"],
    ["1/2x"], [r"\$5,\!000,\!000", "5,000,000"], ["0"], ["1/0", r"\frac{1}{0}"]]

STATED = [
    (r"so \boxed{3} or rather \boxed{\frac{1}{2}}.", r"\boxed{0.5}", True),
    (r"\boxed{11111111100}", r"\boxed{11,\! 111,\! 111,\! 100}", True),
    (r"\boxed{11,\! 11}", r"\boxed{1111}", False), (r"\boxed{18\pi}", r"\boxed{18}", False),
    (r"\boxed{18} or \boxed{(18, 3)}", r"\boxed{18}", False),
    (r"\boxed{18} but \boxed{19", r"\boxed{18}", True),
    ("9 + 9 = 18\n#### 18", r"\boxed{18}", True),
    ("The answer is $18$, as 9 + 9 = 18.", r"\boxed{18}", True),
    (r"The answer is $5\sqrt{2}$.", r"\boxed{5}", False),
    (r"The answer is \(x^2\). Done", r"\boxed{x^{2}}", True),
    ("#### Step 1: add\nThere are 18", r"\boxed{18}", True),
    ("#### Step 1: add\nThere are \\boxed{18}", r"\boxed{18}", True),
    ("We add 9 and 9\nto get 18", r"\boxed{18}", True),
    ("We add 9 and 9 and get 18", r"\boxed{18}", True), (r"\frac{1}{2}", r"\boxed{\frac12}", True),
    (r"\boxed{\frac{1}{2}}", r"\frac12", True), ("I do not know", r"\boxed{x}", False),
    ("\\boxed{x}\n\nQuestion: next?\n\\boxed{y}", r"\boxed{x}", True),
    (r"\boxed{(100, 200)}", r"\boxed{(100,200)}", True),
    (r"\\boxed{\\frac{1}{2}}", r"\boxed{\frac{1}{2}}", True), ("", r"\boxed{x}", False),
    (r"\boxed{B}", r"\boxed{\text{(B)}}", True), (r"\boxed{120, 135}", r"\boxed{120,135}", True),
    (r"\boxed{120,135}", r"\boxed{120,136}", False)]

IS_B = [
    "B", "(B)", "B.", "b", "**B**", r"\boxed{B}", r"\boxed{\text{B}}", "The answer is (B)",
    "the answer is (b) since 3 > 2", "#### B", "The answer is B, because A is slow.",
    "The answer is B because of C", "####B\nQuestion: next?", "Answer: B",
    "The answer is option B.", "the correct answer is: **B. light**", "(B) light", "B) light",
    "A or B?\nNot A.\n#### (B)", r"The answer is $\boxed{\textbf{(B)}}$", "The answer is B, iron.",
    "The answer is B - iron", "<answer>B</answer>", "Answer\uff1aB", "The correct option is B",
    "The answer is: B</s>", "Answer: $B$"]
NOT_B = [
    "C", "light", "The answer is light", "Because", "A\n#### C", "#### C\nB", "the answer is blue",
    "The answer is A, not B", "", "4", "\\boxed{B}\n#### A", "(A) is wrong\n(B) may be right",
    "The answer is A and B", "The answer is a car.", "The answer is A, B"]


@pytest.mark.parametrize("text, answer, rule", ANSWERS)
def test_answer_and_rule(text, answer, rule):
    """Each text gives the written answer by the written rule."""
    assert find_answer(text) == (answer, rule)
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, value", NUMBERS)
def test_number(text, value):
    """One spelling, one exact fraction; all else is None and nothing raises."""
    assert number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("text, reference, verdict", VERDICTS + STATED)
def test_verdict(text, reference, verdict):
    """Numbers by value, formulas by canonical spelling, words as words."""
    assert grade(text, reference) is verdict


@pytest.mark.parametrize("right, texts", [(True, IS_B), (False, NOT_B)])
def test_letters(right, texts):
    """A letter is read where it is stated as an option, never from a word or an article."""
    for text in texts:
        assert grade(text, "Light is fast.\n#### B") is right, text
    assert find_answer("Answer: A\nNo, wait.\nAnswer: C", read_letter)[0] == "C"


def test_cut_solutions_need_a_mark():
    """A text that ran into the length limit is right by a mark, not by its last number."""
    for text in ("#### 18", "so \\boxed{18}", "The answer is 18"):
        assert grade(text, "#### 18") and grade(text, "#### 18", cut=True)
    assert grade("9 + 9 = 18", "#### 18") and not grade("9 + 9 = 18", "#### 18", cut=True)
    assert not grade("B", "#### B", cut=True) and not grade("x^2", "\\boxed{x^2}", cut=True)


def test_same_answer_is_by_value():
    """Spellings of one value are one answer; no answer equals nothing, itself included."""
    for other in ("18.0", "$18.00", "36/2", "18"):
        assert same_answer("18", other) and same_answer(other, "18")
    assert same_answer("x+1", "x+1") and not same_answer("x+1", "1+x")
    assert same_answer("1/0", "1/0") and not same_answer("1/0", "0")
    assert not same_answer(None, None) and not same_answer(None, "18")


@pytest.mark.parametrize("sign", "\u2212\u2013\uff0d\ufe63\u2010\u2011")
def test_other_minus_signs(sign):
    """Every dash that stands where a sign may stand is a minus."""
    for form in ("#### {}5", "The answer is {}5.", "\\boxed{{{}5}}"):
        assert grade(form.format(sign), "#### -5") and not grade(form.format(sign), "#### 5")
        assert grade(form.format(sign), "\\boxed{-5}")
        assert not grade(form.format(sign), "\\boxed{5}")


@pytest.mark.parametrize("going_on", [" or 20", ", 20", "-20", " + 0", " 000", "^2", "\\pi", " x 2",
                                      "\u00bd", ":30", " to 20", "_9", "\u221a2", " * 2"])
def test_a_prefix_of_a_number_is_no_number(going_on):
    """A number that goes on as something else equals neither its beginning nor its end."""
    for form in ("#### 18{}", "The answer is 18{}.", "\\boxed{{18{}}}"):
        assert not grade(form.format(going_on), "#### 18"), form
        assert not grade(form.format(going_on), "#### 20"), form


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
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
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
    "{,}", "answer: -", "\\frac{1", "1 a,", "1" + " " * 50, "\\text{", "(1,", "ab ", "</", "1 or "])
def test_work_is_linear(piece):
    """50 kB of babble are read; a pattern that is quadratic would take minutes here."""
    body = piece * (50_000 // len(piece))
    marked = "\\boxed{the answer is #### " + body + "x"
    assert find_answer(marked, read_letter) and find_answer(marked) and not number("1" + body + "!")
    for text in (body, marked, "\\boxed{" + body + "}"):
        assert grade(text, "\\boxed{\\frac{1}{x}}") is grade(text, "blue") is False
