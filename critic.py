"""Judging: is an answer right, and where did a wrong solution go wrong first.

The textbook idea (Self-Explore, 2404.10346). Only the final answer of a solution can be checked. To find the
*step* that ruined it, complete each of its prefixes k times: the first step from which no completion reaches the
right answer is the first pit. It becomes the rejected side of a preference pair.

What is different here
  1. One grader decides everywhere, on exact fractions (formulas: on one spelling; options: on letters); two comparisons
     in two scripts made false pits.
  2. All wrong solutions of all trees of a chunk are labelled together, and completions are branches of the tree:
     what one label finds (a right end below a shared prefix) is used by all others.
  3. The last step of a wrong solution is a failure without sampling; bisection may replace the linear scan.
  4. The three critics of AlphaLLM (value, process, outcome) are small heads on states the sampler has anyway, and a
     solution is worth what its weakest link is worth.

Chapters: 1 Grading   2 The first pit   3 Self-evaluation   4 Three critics and statistics   5 Tasks   6 Demo
Try:  python critic.py        (labels the pit of one wrong solution; 1 second)
"""
import functools
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mcts import Forest, draw, grow
from model import BadInput, Sampler, Tokenizer, about, field, mix, need

# ----------------------------------------------------------------------------------------------------------
# 1 · Grading
# ----------------------------------------------------------------------------------------------------------
# Two scripts with two ideas of "equal" make false pits: a step looks fatal because its rollouts were graded
# by other rules. So text -> answer -> exact fraction happens here only. Left out of plain numbers, because guessing
# costs more than it earns: units, "5k", mixed numbers (`2 1/2` is two numbers), Indian grouping (a comma
# groups three digits), dates and times (they are several numbers), and any evaluation of expressions.

STOP = "\nQuestion:"      # a base model goes on to invent the next question: its answer is not asked for
MAX_DIGITS = 1000         # int() raises above 4,300 digits and is quadratic below: longer runs have no value

# footgun: every pattern must be linear, since a babbling model writes 100 kB of "1,1,1,": what can fail never
# follows a repeat that could give back something matching. And [0-9], not \d, which is any script's digits.
_PART = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"       # 1,000.5  18  .5
_BODY = rf"{_PART}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z]))?(?: ?/ ?\$?{_PART})?"         # 1e3  1/2  1 / 2
# Anywhere in a text a minus is a sign only if no operand stands before it: "10-3" and "3-4" end in 3 and 4.
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)\]}}%.+-])[-+](?:\$ ?)?|\$ ?[-+]?)?{_BODY}")
# After a marker there is no left operand, so "- 5" is negative too. Decoration may come first: "**(", "€".
_LEADING = re.compile(rf"[^0-9A-Za-z+-]*?((?:[-+] ?(?:\$ ?)?|\$ ?[-+]? ?)?{_BODY})")
_ALONE = re.compile(_LEADING.pattern + r"[^0-9A-Za-z]*")                          # "18..." "**72**." "50%"
_PROSE = re.compile(r"^[^0-9A-Za-z]*[A-Za-z]{2}|[0-9] *[A-WYZa-wyz][A-Za-z ,$(]*[0-9]")  # "5 since 2+3"
_PHRASE = re.compile(r"answer[*_]*\s*(?:is\b|:)[*_:]*", re.IGNORECASE)


def strip_calculator_marks(text):
    """Training text without GSM8K's calculator marks: `48/2 = <<48/2=24>>24` gives `48/2 = 24`.

    Marks do not nest; a `<<` without its `>>` stays. (A policy that learns them waits for a calculator.)"""
    return re.sub(r"<<[^<>]*>>", "", text)


def _tidy(text):
    """The text up to STOP, with U+2212 as ASCII minus and LaTeX's spellings of `$ % ,` and a/b made plain."""
    text = text.split(STOP, 1)[0].replace("\u2212", "-")
    text = re.sub(r"\\([$%])|\{(,)\}|\\[,!]", r"\1\2", text)
    return re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)


def _last_box(text):
    """What the last balanced `\\boxed{...}` to close holds, or "". One pass with a stack of open braces:
    looking for the closing brace anew at every `\\boxed{` would be quadratic."""
    opened, span = [], (0, 0)
    for brace in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if brace.group() == "}":
            start = opened.pop() if opened else None                           # a stray "}" closes nothing
            span = span if start is None else (start, brace.start())
        elif brace.group() not in ("\\{", "\\}"):                              # escaped braces are text
            opened.append(brace.end() if len(brace.group()) > 1 else None)     # None: a brace, not a box
    return text[slice(*span)]


def _leading(piece):
    """The number that the first line of `piece` begins with, or that its working ends in: `10-3=7`, `x = 7`,
    `7 since 3+3=6` give 7. Words first (a heading `#### Step 1`, `Answer: Tom has 3 ...`) give None."""
    line = piece.split("\n", 1)[0]
    left, _, right = line.rpartition("=")
    found = _LEADING.match(line if _PROSE.search(left) else right)                # no "=": left is empty
    return found and found.group(1)


def _inside(box):
    """The first number of a box, after its last `=` if it has one: `x_1 = 5`, `5\\text{ m}^2` give 5."""
    found = _NUMBER.search(box.rpartition("=")[2]) or _NUMBER.search(box)
    return found and found.group()


def find_answer(text):
    """(answer, rule): the number that a solution gives as its answer, and the first rule that found it.

    "####": the last one with a number on its line (*strict*, the form of the training text; the rest is
    *flexible*); "boxed": the last balanced box; "phrase": the last "answer is" or "answer:" with a number;
    "number": the last one of the text. A marker without a number falls on to the next rule; no digit gives
    (None, None). The answer is plain: ASCII minus, no `$`, comma, blank, plus or `%` (50% = 50), else as
    written ("$18.00" gives "18.00"). It may have no value (1/0, 10,000 digits). Source: GSM8K, widened."""
    text = _tidy(text)
    rules = (("####", map(_leading, reversed(text.split("####")[1:]))),
             ("boxed", map(_inside, [_last_box(text)])),
             ("phrase", map(_leading, reversed(_PHRASE.split(text)[1:]))),
             ("number", reversed(_NUMBER.findall(text))))
    for rule, candidates in rules:
        answer = next(filter(None, candidates), None)
        if answer:
            return re.sub(r"[$,+ ]", "", answer), rule
    return None, None


def extract_answer(text):
    """The answer of `find_answer` without its rule: a number's plain spelling, or None."""
    return find_answer(text)[0]


def to_number(text):
    """The exact fraction that one spelling stands for: "1,000.0", "$-5", "(72)", "50%" (= 50), "1/2", "1e3".

    None for all else: words, two numbers, a zero denominator, more than MAX_DIGITS characters. Never raises.
    (Floats would confuse neighbours among 17-digit answers; strings would tell 3.0 from 3.)"""
    found = _ALONE.fullmatch(_tidy(text))
    if not found or len(found.group(1)) > MAX_DIGITS:
        return None
    top, _, bottom = re.sub(r"[$,+ ]", "", found.group(1)).partition("/")
    return Fraction(top) / Fraction(bottom or 1) if Fraction(bottom or 1) else None


def _words(text):
    """The answer of a text as normalised words: what follows its last marker, or the whole text."""
    text = _tidy(text)
    box = _last_box(text)
    pieces = text.split("####") if "####" in text else [box] if box else _PHRASE.split(text)
    words = [piece.strip() for piece in pieces if piece.strip()] or [""]
    return " ".join(words[-1].split("\n", 1)[0].strip(" *_.()[]$\"'").casefold().split())


# Formulas (MATH): equal are those with one canonical spelling. No algebra: 1 + x is not x + 1, 2^3 is not 8.
MAX_FORMULA = 1000        # characters; what is longer is compared as it stands: so all patterns may be simple

_CHARS = str.maketrans({"\u2212": "-", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u222a": r"\cup ",
                        "\u00d7": r"\cdot ", "\u00b0": "", "\u221a": r"\sqrt ", "\u2264": r"\le ", "\u2265": r"\ge "})
_MACROS = {m: as_ for as_, ms in {
    r"\frac": "dfrac tfrac cfrac", r"\le": "leq leqslant", r"\ge": "geq geqslant", r"\ne": "neq",
    r"\cdot": "times ast", r"\emptyset": "varnothing", r"\{": "lbrace", r"\}": "rbrace", "...": "ldots dots cdots",
    "": "left right big Big displaystyle limits quad qquad degree"}.items() for m in ms.split()}
_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|rm|boxed) *\{"
_POWER = r"(?: *\^ *\{?[0-9]\}?)?"
_ANYWHERE = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=[0-9])(?:\{,\}|, *\\! *)(?=[0-9]{3})", ""),                               # 1{,}000  1,\! 000
    (r"\^ *\{? *\\circ *\}?|\\?[$%]|\\[,!()\[\]]", ""),                             # 90^\circ  \$5  50\%  \(x\)
    (r"\\[;: ]|~|\s+", " "),
    (r"\\([A-Za-z]+)", lambda m: _MACROS.get(m[1], m[0])),
    (r",? *\\(?:text|mbox) *\{ *(?:and|or) *\}|(?<=[0-9A-Za-z}]) +(?:and|or) +", ", "),
    (r"\{[pb]matrix\}", "{matrix}"))]
_NAMED = re.compile(r"^(?:\\?[A-Za-z]+(?:_\{?[0-9A-Za-z]\}?|\([a-z]\))?|\([a-z](?:, *[a-z])+\)) *"
                    r"(?:=|\\in(?![a-z]))(?=[^=]*$)")                                 # x =, f(x) =, (x, y) =, x \in
_NO_UNIT = "sin|cos|tan|log|mod|plus|minus|times|over|sqrt|base"
_OF_ONE = [(re.compile(pattern), new) for pattern, new in (                           # in order
    (rf"(?:(?<=[0-9}})])|(?<=\\pi)) *{_TEXT}(?! *[ap]\.? ?m\b)[^{{}}]*\}}{_POWER}[. ]*$", ""),      # 5\text{ cm}^2
    (rf"(?<=[0-9}}]) +(?!{_NO_UNIT})(?:[A-Za-z]{{3}}[A-Za-z. ]*|[ckm]m|ft|kg|mi){_POWER}[. ]*$", ""),    # 5 cm^2
    (rf"{_TEXT}([^{{}}]*)\}}", r"\1"),
    (r"^(-?)([0-9]+) +([0-9]+) */ *([0-9]+)$", r"\1\2\\frac{\3}{\4}"),               # 2 1/2
    (r"(?<=[0-9]) +(?=[0-9])", "~"),                                                  # 1 2 is not 12
    (r" +", ""),
    (r"\\(sqrt|frac)([0-9A-Za-z])", r"\\\1{\2}"),                                     # \sqrt2  \frac12
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([0-9A-Za-z])", r"\1{\2}"),
    (r"([_^])\{([0-9A-Za-z])\}", r"\1\2"),
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"^[+*_:.,`\"]+|[*_:.,`\"]+$", ""),
    (r"^\((-?[0-9./]+|[A-Za-z]+)\)$", r"\1"),                                         # (72)  (A)
    (r"^(-?)((?:[^-+,()\[\]/={}]|\{[^{}]*\})+)/([0-9.]+|[A-Za-z]|\\[a-z]+|\\sqrt\{[^{}]*\})$",
     r"\1\\frac{\2}{\3}"),                                                            # \pi/4
    (r"^\\frac\{-((?:[^-+{}]|\{[^{}]*\})*)\}(?=\{)", r"-\\frac{\1}"))]
_THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_FRACTION = re.compile(rf"(-?)([0-9]*)\\frac\{{(-?{_PART})\}}\{{(-?{_PART})\}}")        # 2\frac{1}{2}


def canonical(tex, tuples=False):
    """One spelling for all LaTeX answers that count as equal; never empty unless `tex` is blank, never raises.

    Numbers become exact fractions (`2\\frac12`, `2.5`, `\\frac{5}{2}` -> `5/2`). Tuples and intervals keep order and
    brackets: (1, 2] is not (1, 2). Sets, unions and bare lists are sorted; of matrices the cells are read. Units,
    `x =`, degrees, `$`, `%` and spacing go. tuples: how to read `(100,200)` and `100,200`, as two numbers or as one."""
    if len(tex) > MAX_FORMULA:
        return "".join(tex.split())
    short = tex.translate(_CHARS).replace("\\\\", ";" if "matrix" in tex else "\\")   # a row, or JSON escaped twice
    for pattern, new in _ANYWHERE:
        short = pattern.sub(new, short)
    if not tuples and not re.search(r"[][()]|\\[{}]", short.strip(" .*").strip("()")):
        short = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), short)
    return _compound(_NAMED.sub("", short.strip().rstrip(" .")), 3) or "".join(tex.split())


def _compound(tex, depth):
    """`canonical` of a list, union, bracket or matrix, part by part and at most `depth` deep, or of one value."""
    tex, read = tex.strip(), lambda part: _compound(part, depth - 1)
    matrix = re.fullmatch(r"\\begin\{matrix\}((?:(?!\\begin|\\end).)*)\\end\{matrix\}", tex)
    if matrix and depth:
        return ";".join("&".join(map(read, row.split("&"))) for row in matrix[1].strip(" ;").split(";"))
    for mark in (",", r"\cup"):
        parts = _split(tex, mark)
        if len(parts) > 1 and depth:
            names = [_NAMED.match(part.strip()) for part in parts]      # x = 1, x = 2: 1, 2; but x = 1, y = 2 stays
            if all(names) and len({"".join(name[0].split()) for name in names}) == 1:
                parts = [part.strip()[name.end():] for part, name in zip(parts, names)]
            return mark.join(sorted(map(read, parts)))
    bracket = re.fullmatch(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])", tex)
    parts = _split(bracket[2], ",") if bracket else []
    if depth and (len(parts) > 1 or parts and bracket[1] == r"\{"):
        return bracket[1] + ",".join((sorted if bracket[1] == r"\{" else list)(map(read, parts))) + bracket[3]
    return _single(tex)


def _split(tex, mark):
    """The parts of `tex` between marks outside of all brackets: `(1,2],3` gives `(1,2]` and `3`. [] where brackets
    do not balance; their kinds may differ."""
    depth, start, parts = 0, 0, []
    for found in re.finditer(r"[(\[{]|[)\]}]|" + re.escape(mark), tex):
        if found.group() != mark:
            depth += 1 if found.group() in "([{" else -1
        elif not depth:
            parts.append(tex[start:found.start()])
            start = found.end()
        if depth < 0:
            return []
    return [] if depth else parts + [tex[start:]]


def _single(tex):
    """`canonical` of what is no list: an exact fraction, or the formula in plain spelling."""
    for pattern, new in _OF_ONE:
        tex = pattern.sub(new, tex)
    mixed = _FRACTION.fullmatch(tex)
    below = mixed and to_number(mixed[4])
    if below:
        value = Fraction(mixed[2] or 0) + to_number(mixed[3]) / below
        return str(-value if mixed[1] else value)
    value = to_number(tex) if re.fullmatch("-?" + _BODY, tex) else None
    if value is None:
        return tex.casefold() if re.match("[A-Za-z]{3}", tex) else tex              # \text{Even} is even
    return str(value)


def _stated(text):
    """((rule, lines), ...): where a text may state its answer, the last line first: in the last box, behind ####,
    behind "answer is", or the text itself if it is one line."""
    text = text.split(STOP, 1)[0]
    lines = lambda parts: [part.split("\n", 1)[0] for part in reversed(parts)]
    return (("boxed", [_last_box(text)]), ("####", lines(text.split("####")[1:])),
            ("phrase", lines(_PHRASE.split(text)[1:])), ("bare", [] if "\n" in text.strip() else [text]))


_SENTENCE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,} (?:[A-Za-z]{2,} [A-Za-z]{2,}|.*[0-9])")
_MATHS = re.compile(r"[^0-9A-Za-z$\\]*(?:\$+([^$]+)\$|\\\((.*?)\\\))")                    # is $x + 1$, because
_OPTION = re.compile(r"[^0-9A-Za-z\\]*(?:\\[a-z]+ ?\{[^0-9A-Za-z]*)?(?:(?:[Oo]ption|[Cc]hoice)[^0-9A-Za-z]+)?"
                     r"([A-Za-z])(?:\)|[.:](?![0-9A-Za-z])|,? (?:because|since|as)\b|[^0-9A-Za-z]*$)")


def find_formula(text, tuples=False):
    """(canonical answer, rule) of a MATH solution: the last balanced box (*strict*); else what follows #### or
    "answer is", a line that is no sentence, the last number. (None, None) where there is none of these."""
    for rule, lines in _stated(text):
        line = next((line for line in lines if re.search("[0-9A-Za-z]" if rule != "boxed" else r"\S", line)), "")
        if rule != "boxed":
            line = line[:MAX_FORMULA]
            inside, said = _MATHS.match(line), "\\" not in line and re.search("[A-Za-z]{2}", line)
            number = _leading(line) if said and rule != "bare" else None                 # 5 since 2+3=5
            line = inside[1] or inside[2] if inside else number or ("" if _SENTENCE.search(line) else line)
        if line.strip():
            return canonical(line, tuples), rule
    number = find_answer(text)[0]
    return (None, None) if number is None else (canonical(number), "number")


def find_letter(text):
    """(letter, rule) of a lettered question: "#### B", `\\boxed{B}`, "the answer is (b)", or "B", "(B) iron" and
    nothing else. Only letters are read: an option's full text is no answer."""
    box, hashes, *others = _stated(text)
    for rule, lines in (hashes, box, *others):
        found = next(filter(None, map(_OPTION.match, lines)), None)
        if found:
            return found[1].upper(), rule
    return None, None


# HACK HERE: is an answer right
def grade(text, answer):
    """True if the text's answer is the reference's. `answer` is bare ("18", "1/2") or a solution (`####`, a box).

    Numbers are compared as exact fractions. A reference whose answer is boxed, or one line of LaTeX, is compared by
    `canonical`; one without a digit ("blue", "#### B") as words or, if it is one letter, by `find_letter`; numbers
    without a value as spelled. Empty or None: False. Symmetric on numbers; never raises."""
    if not text or not answer:
        return False
    bare = re.search(r"\\[A-Za-z]", answer) and "\n" not in answer.strip() and to_number(answer) is None
    if "####" not in answer and (bare or _last_box(answer.split(STOP, 1)[0]).strip()):
        wanted = find_formula(answer)[0]
        return wanted is not None and (find_formula(text)[0] == wanted or
                                       find_formula(text, True)[0] == find_formula(answer, True)[0])
    words = _words(answer)
    if words and not re.search("[0-9]", words):       # numbers in the working above "#### B" are no answer
        letter = find_letter(text)[0] if re.fullmatch("[a-z]", words) else None
        return letter == words.upper() if letter else _words(text) == words
    found, wanted = extract_answer(text), extract_answer(answer)
    if found is None or wanted is None:
        return False
    value = to_number(wanted)
    return found == wanted if value is None else to_number(found) == value


# ----------------------------------------------------------------------------------------------------------
# 2 · The first pit (Self-Explore, 2404.10346)
# ----------------------------------------------------------------------------------------------------------
# HACK HERE: what a pit is
def first_pit(successes) -> int | None:
    """Index of the first step with no success: [4, 2, 0, 0] -> 2, [4, 0, 3] -> 1, [4, 4, 4] -> None.

    successes[i]: how many of the completions sampled from question + steps 0..i reached the right answer. A good
    prefix whose chance is p passes for a pit with probability (1 - p)^k: p = .3 gives 24% at k = 4, .3% at 16."""
    return next((i for i, s in enumerate(successes) if s == 0), None)


def next_probe(known: list, search: str) -> int | None:
    """Which prefix to complete next, given what is known of each: successes > 0, 0, or None for not known yet.
    None when the pit is settled. The last step must be known (a finished wrong solution cannot recover: 0).

    linear (the paper): the first unknown one. bisect (OmegaPRM, 2406.06592): the middle between the last known
    success and the first known failure behind it: at most ceil(log2(n + 1)) probes for n steps, and the same pit
    when success is monotone; else *a* failing step whose predecessor succeeds."""
    if search == "linear":
        i = next(i for i, s in enumerate(known) if not s)               # None or 0: the first not known to succeed
        return i if known[i] is None else None
    low = max((i for i, s in enumerate(known) if s), default=-1)        # deepest known success
    high = next(i for i in range(low + 1, len(known)) if known[i] == 0)
    return None if high == low + 1 else (low + high) // 2


@dataclass
class Pit:
    """The label of one wrong solution."""
    tree: int
    leaf: int
    step: int | None              # 0-based step of the path; None: the budget ran out, or a later branch recovered
    node: int | None              # the node of that step
    probes: int                   # prefixes that were completed by sampling for it


def label_pits(forest: Forest, wrong: list, complete, k: int, search: str = "linear",
               budget: float = math.inf) -> list:
    """First pits of many wrong solutions of many trees together: in every wave each unsettled one asks for one
    prefix, all completions of a wave are sampled in one call, and solutions that share a prefix share its k.

    wrong: [(tree, leaf)]. complete([(tree, node, k)]) -> sampled tokens: grows k completions below each node and
    grades them (forest.right). Right ends below a prefix in *any* other branch count as successes, so what a
    wave finds serves all later ones; the labelled path ended wrong and never counts, and neither do the wrong
    samples it came with (it was picked because it failed: only fresh completions make a 0). budget: about so many
    tokens are sampled; a completion is taken to be as long as what it replaces. Returns a Pit per entry of `wrong`."""
    pits = [Pit(b, leaf, None, None, 0) for b, leaf in wrong]
    paths = [forest.path(b, leaf)[1:] for b, leaf in wrong]
    failed, open_, spent = set(), list(range(len(wrong))), 0            # failed: (tree, node) with k fresh failures
    while open_:
        below, asks, still = {}, {}, []
        for j in open_:
            b, path = pits[j].tree, paths[j]
            if b not in below:
                below[b] = forest.below(b)
            known = [int(below[b][n]) or (0 if n == path[-1] or (b, n) in failed else None) for n in path]
            probe = next_probe(known, search)
            if probe is None:
                pits[j].step = first_pit([1 if s is None else s for s in known]) if search == "linear" else \
                    max((i for i, s in enumerate(known) if s), default=-1) + 1
                pits[j].node = path[pits[j].step]
            else:
                asks.setdefault((b, path[probe]), []).append(j)
                still.append(j)
        if not asks or spent >= budget:
            break
        left, take = budget - spent, []
        for (b, n), owners in asks.items():             # as many as the budget allows, by the length of what failed
            if left > 0:
                rest = paths[owners[0]][paths[owners[0]].index(n) + 1:]
                left -= k * sum(len(forest.ids[b][m]) for m in rest)
                take.append((b, n))
        spent += complete([(b, n, k) for b, n in take])
        failed.update(take)                                             # stays 0 unless a right end is below it
        for ask in take:
            for j in asks[ask]:
                pits[j].probes += 1
        open_ = still
    return pits


# ----------------------------------------------------------------------------------------------------------
# 3 · Self-evaluation (MCTS-DPO, 2405.00451): the policy judges its own solution so far
# ----------------------------------------------------------------------------------------------------------
JUDGE = "\n\nIs the solution so far correct?\n(A) {}\n(B) {}\nThe solution so far is ("
JUDGE_STEP = "\n\nIs the last step correct?\n(A) {}\n(B) {}\nThe last step is ("
REFERENCE = "\n\nReference solution:\n{}"


def confidence(forest: Forest, wants: list) -> list:
    """The sampler's own mean log-prob per token as a judgement, exp of it: [(tree, node)] -> numbers in (0, 1]. Free,
    and all there is for a model that cannot read a judging question. A root, without tokens, gives 1."""
    means = [forest.path_of(b, n, "logps", root=False) for b, n in wants]
    return [math.exp(float(m.mean())) if len(m) else 1.0 for m in means]


def self_evaluation(forest: Forest, wants: list, sampler: Sampler, references=None, question: str = JUDGE) -> list:
    """C(s), the policy's own P(correct) of solutions so far: [(tree, node)] -> numbers in (0, 1).

    The judging question is put behind the solution, so the prefix's keys and values are used again; the next token's
    probability is normalised over the two option letters, and averaged over both orders of the options (models favour
    a letter). references: a solution per tree to show to the judge. That is a gold leak: AUC 74.7 with, 62.0 without
    in MCTS-DPO; say which was used. Where the question does not fit the context any more C is .5: nothing known.
    Raises BadInput when an option letter is not one token."""
    tokenizer, model, paths = sampler.tokenizer, sampler.model, []
    letters = [tokenizer.encode_more(letter) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters):
        raise BadInput("This tokenizer splits a single letter: self-evaluation cannot read its answer; use "
                       "--self-eval logp or off.")
    for b, n in wants:
        path = forest.path_of(b, n, "slots")
        path = path[:-1] if sampler.ids[path[-1]] in model.stop_ids else path      # judge before the end-of-text
        shown = REFERENCE.format(references[b]) if references else ""
        for options in (("incorrect", "correct"), ("correct", "incorrect")):
            ids = tokenizer.encode_more(shown + question.format(*options))
            fits = len(path) + len(ids) < model.config.max_positions
            paths.append(sampler.follow(path, ids) if fits else None)
    there = [p for p in paths if p is not None]
    sampler.encode(there)
    ends = torch.tensor([int(p[-1]) for p in there], dtype=torch.long, device=model.device)
    logits = model.token_logits(sampler.hidden[ends])[:, [ids[0] for ids in letters]]           # (paths, 2)
    share = iter(torch.softmax(logits, -1).tolist())                    # (P(A), P(B)) of each path
    both = [next(share) if p is not None else (.5, .5) for p in paths]
    return [(first[1] + second[0]) / 2 for first, second in zip(both[::2], both[1::2])]


# ----------------------------------------------------------------------------------------------------------
# 4 · Three critics (AlphaLLM, 2404.12253) and statistics
#     M nodes, C hidden size of the policy
# ----------------------------------------------------------------------------------------------------------
HEADS = ("value", "process", "outcome")
LEAST_AUC = 0.55              # a head below it is not listened to


class Critic(torch.nn.Module):
    """Three heads on what the policy knows anyway, all giving probabilities:

        value    from this prefix, the chance that the policy ends right    label: share of right ends below the node
        process  is this last step good                                     label: can a right end still be reached
        outcome  is this finished solution right                            label: its grade

    They read the policy's hidden state from which the node's *last token* was drawn, and four numbers about the
    log-probs of the tokens (`log_prob_features`). The sampler has both already, so a critic costs no forward pass
    in a search; the state of the last token itself would, and was no better (AUC of value .82 against .80 on
    homework). Without the log-probs a rare slip of a good policy looks like any other line: AUC of outcome .63
    against .90. The paper has a language model for each head."""

    def __init__(self, width: int, hidden: int = 128, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.heads = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, len(HEADS))
        for name, size, start in (("mean", width, 0), ("std", width, 1), ("odds", 3, 0), ("trusted", 3, 1)):
            self.register_buffer(name, torch.full((size,), float(start)))

    device = property(lambda self: self.inner.weight.device)
    dtype = property(lambda self: self.inner.weight.dtype)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(M, C) features -> (M, 3) logits as trained, between balanced classes."""
        return self.heads(F.gelu(self.inner((features.to(self.dtype) - self.mean) / self.std)))

    @torch.no_grad()
    def score(self, features: torch.Tensor) -> np.ndarray:
        """(M, C) -> (M, 3) probabilities: the shares of right and wrong that balancing hid are put back."""
        return torch.sigmoid(self(features) + self.odds).double().cpu().numpy()

    def read(self, sampler: Sampler, forest: Forest, wants: list) -> np.ndarray:
        """What the heads say of [(tree, node)]: (M, 3) probabilities."""
        return self.score(critic_features(sampler, forest, wants))

    def prepare(self, rows: list) -> None:
        """Scale of the features and balance of the labels, from the rows [(features (M, C), labels (M, 3), weights
        (M,), depths (M,))] that it will be trained on."""
        features, labels, weights = (torch.cat([r[i] for r in rows]) for i in range(3))
        self.mean.copy_(features.float().mean(0)), self.std.copy_(features.float().std(0) + 1e-6)
        for head in range(len(HEADS)):
            known = ~labels[:, head].isnan()
            right, every = (labels[known, head] * weights[known]).sum(), weights[known].sum()
            self.odds[head] = ((right + 0.5) / (every - right + 0.5)).log()


class Judge:
    """AlphaLLM's critics as it has them, by asking a language model, here the policy itself: value and outcome are its
    P(correct) of the solution so far, process its P(correct) of the last step (`self_evaluation`). Nothing to train,
    four short questions a node to encode; for models that can judge."""

    def __init__(self):
        self.trusted = torch.ones(3)

    def read(self, sampler: Sampler, forest: Forest, wants: list) -> np.ndarray:
        """As `Critic.read`."""
        whole = self_evaluation(forest, wants, sampler)
        return np.array([whole, self_evaluation(forest, wants, sampler, question=JUDGE_STEP), whole]).T


class Rollouts:
    """AlphaLLM's fast rollouts: a smaller policy finishes a leaf n times; the mean of what the outcome critic says of
    these ends is one more opinion about the leaf. That critic is a head on the small model's own states, so the
    policy never encodes their tokens; they are in this sampler's `counts`, apart from the policy's. A forest beside
    the searched one keeps prefixes: here, too, nothing is encoded twice. Both models must have the same tokenizer."""

    def __init__(self, critic: Critic, sampler: Sampler, n: int, max_tokens: int, temperature: float = 1.0):
        self.critic, self.sampler, self.n = critic, sampler, n
        self.max_tokens, self.temperature = max_tokens, temperature
        self.seconds = 0.0        # spent on rollouts so far

    def begin(self, forest: Forest, seeds: list) -> None:
        """Roots of the trees of a chunk; forgets those before."""
        self.sampler.reset()
        self.seeds, self.mine, self.place = seeds, Forest(len(forest)), [{0: 0} for _ in seeds]     # node -> my node
        for b in range(len(forest)):
            self.mine.add(b, -1, forest.ids[b][0], slots=self.sampler.prompt(forest.ids[b][0]))

    def score(self, forest: Forest, wants: list) -> list:
        """[(tree, node that is no end)] -> the mean outcome of n rollouts of each, in [0, 1]."""
        start, nodes = time.perf_counter(), [self._copy(forest, b, n) for b, n in wants]
        self.sampler.encode([self.mine.path_of(b, m, "slots") for (b, _), m in zip(wants, nodes)])
        for (b, _), m in zip(wants, nodes):
            for k in self.mine.path(b, m)[1:]:
                if not len(self.mine.logps[b][k]):      # steps of the policy: what does the small model think of them
                    above = self.mine.path_of(b, int(self.mine.parent[b, k]), "slots")
                    self.mine.logps[b][k] = self.sampler.log_probs(above, self.mine.slots[b][k])
        leaves = grow(self.mine, self.sampler, [(b, m, self.n) for (b, _), m in zip(wants, nodes)], self.seeds,
                      self.max_tokens, self.temperature)
        ends = [(b, leaf) for (b, _), found in zip(wants, leaves) for leaf in found]
        outcome = self.critic.read(self.sampler, self.mine, ends)[:, 2].reshape(len(wants), self.n)
        self.seconds += time.perf_counter() - start
        return outcome.mean(1).tolist()

    def _copy(self, forest, b, n):
        for k in forest.path(b, n)[1:]:
            if k not in self.place[b]:
                up, ids = self.place[b][int(forest.parent[b, k])], forest.ids[b][k]
                above = self.mine.path_of(b, up, "slots")
                there = self.mine.known[b].get((up, tuple(map(int, ids)), ""))              # a rollout went there
                slots = () if there is not None else self.sampler.follow(above, ids)[len(above):]
                self.place[b][k] = self.mine.add(b, up, ids, slots=slots)
        return self.place[b][n]


def critic_loss(critic: Critic, batch: tuple):
    """Cross-entropy of the three heads against soft labels, for `dpo.train`: right and wrong weigh the same in each
    head (labels (M, 3), NaN where a head has none). -> (sum, weight, statistics). The paper's value head has a
    squared error; on labels between 0 and 1 both have their optimum at the mean."""
    features, labels, weights, _ = batch
    known, share = ~labels.isnan(), torch.sigmoid(critic.odds)          # share: of right, (3,)
    target = labels.nan_to_num()
    balance = target * 0.5 / share + (1 - target) * 0.5 / (1 - share)
    loss = F.binary_cross_entropy_with_logits(critic(features), target, balance * known, reduction="none")
    return (loss * weights[:, None]).sum(), weights.sum().item(), {}


def critic_labels(forest: Forest, b: int, k: int) -> tuple:
    """Labels of the nodes of a graded tree: (nodes, (M, 3) labels with NaN for none, (M,) weights, (M,) depths).

    Every prefix of every sample is a free label of the value. A step is bad when its parent could still be saved and
    none of at least k samples below it was right: whoever fell into the pit earlier says nothing about later steps."""
    right, wrong = forest.below(b, 1), forest.below(b, 0)
    nodes = np.flatnonzero(right + wrong)
    n, up = (right + wrong)[nodes], forest.parent[b, nodes]
    terminal, good = forest.terminal[b, nodes], right[nodes] > 0
    labels = np.full((len(nodes), 3), np.nan, np.float32)
    labels[:, 0] = np.where(terminal, np.nan, right[nodes] / n)
    labels[:, 1] = np.where((up >= 0) & (right[up] > 0) & (good | (n >= k) | terminal), good, np.nan)
    labels[:, 2] = np.where(terminal, good, np.nan)
    return nodes.tolist(), labels, np.minimum(n, 8).astype(np.float32), forest.depth[b, nodes]


def log_prob_features(steps: list) -> list:
    """Lowest and mean log-prob of the last step's tokens, lowest and mean of the whole path's; steps: (tokens,)
    arrays from the first step to the last; [] (a question) gives zeros."""
    if not steps:
        return [0.0] * LOG_PROB_FEATURES
    path, last = [x for step in steps for x in step.tolist()], steps[-1].tolist()       # so short: lists beat arrays
    return [min(last), sum(last) / len(last), min(path), sum(path) / len(path)]


LOG_PROB_FEATURES = 4


def critic_features(sampler: Sampler, forest: Forest, wants: list) -> torch.Tensor:
    """What the heads read of [(tree, node)]: (M, C + 4), from what sampler and forest have in store."""
    slots, numbers = [], []
    for b, n in wants:
        own = forest.slots[b][n]
        up = forest.slots[b][forest.parent[b, n]] if len(own) < 2 and n else own
        slots.append(int(own[-2] if len(own) > 1 else up[-1]))          # the token before the last
        numbers.append(log_prob_features([forest.logps[b][m] for m in forest.path(b, n)[1:]]))
    hidden = sampler.hidden[torch.tensor(slots, device=sampler.hidden.device)].float()
    return torch.cat((hidden, torch.tensor(numbers, device=hidden.device)), 1)


# HACK HERE: what a leaf is worth
def critic_values(critic, sampler: Sampler, forest: Forest, wants: list, weights=(1.0, 1.0, 1.0),
                  rule: str = "weakest", known=None, rollouts=None) -> np.ndarray:
    """One number in [0, 1] for each [(tree, node)], a leaf of a search or a finished solution.

    weakest (ours): the lowest of all that the heads say along the path: process of every step, value of every
    prefix, outcome of the end. One false line ruins a solution, and where many samples are tried some critic errs
    upwards for one of them. Measured on homework, 160 questions, base 46%: best of 64 samples by the outcome head
    72%, by the weakest link 89%.
    sum (AlphaLLM): b_v value + b_prm process of the node alone + b_orm mean outcome of its rollouts, divided by the
    weights (mixed scales are a known trap); outcome for an end.
    critic: Critic or Judge. weights: (b_v, b_prm, b_orm); 0 leaves a critic out, as does too low an AUC (`trusted`);
    with none left all are worth .5. known: {(tree, node): what the critics said}, kept by the caller through a search,
    so that a node is read once. rollouts: `Rollouts` to ask about leaves that are no ends, or None."""
    paths = [forest.path(b, n)[1 if n else 0:] if rule == "weakest" else [n] for b, n in wants]
    known = {} if known is None else known
    asked = [e for e in dict.fromkeys((b, m) for (b, _), path in zip(wants, paths) for m in path) if e not in known]
    known.update(zip(asked, critic.read(sampler, forest, asked) if asked else []))
    open_ = [e for e in wants if not forest.terminal[e]] if rollouts is not None and weights[2] else []
    rolled = dict(zip(open_, rollouts.score(forest, open_) if open_ else []))
    value, process, outcome = (np.array([*weights[:2], 1.0]) * critic.trusted.cpu().numpy()).tolist()
    found = []
    for (b, n), path in zip(wants, paths):
        rows, end = np.array([known[b, m] for m in path]), bool(forest.terminal[b, n])
        prefixes, ends = rows[:len(rows) - end, 0] if value else [], [rolled[b, n]] if (b, n) in rolled else []
        ends += [rows[-1, 2]] if end and outcome else []
        if rule == "weakest":
            said = [*prefixes, *(rows[:, 1] if process and n else []), *ends]
            found.append(min(said, default=0.5))
        elif end and ends:
            found.append(ends[0])
        else:
            said = [(weight, x) for weight, x in zip((value, process, weights[2]), (*rows[-1, :2], *ends)) if weight]
            found.append(sum(w * x for w, x in said) / sum(w for w, _ in said) if said else 0.5)
    return np.array(found)


def critic_report(scores: np.ndarray, labels: np.ndarray, weights, depths) -> dict:
    """How good each head is on nodes it was not trained on: AUC, Brier score, lift = 1 - Brier / Brier of the best
    constant, ten bins of calibration [mean score, mean label, nodes], AUC by depth. AUC is None with one class only."""
    out = {}
    for i, head in enumerate(HEADS):
        known = ~np.isnan(labels[:, i])
        p, y, w, d = scores[known, i], labels[known, i].astype(float), weights[known], depths[known]
        if not len(y):
            out[head] = dict(nodes=0, auc=None)
            continue
        brier, rate = np.average((p - y) ** 2, weights=w), np.average(y, weights=w)
        constant = np.average((rate - y) ** 2, weights=w)
        rounded = lambda x: None if x is None else round(float(x), 4)
        bins = [(p >= low / 10) & (p < (low + 1) / 10 + (low == 9)) for low in range(10)]
        out[head] = dict(nodes=len(y), rate=rounded(rate), auc=rounded(auc(p, y >= 0.5)), brier=rounded(brier),
                         lift=rounded(1 - brier / constant) if constant else None,
                         calibration=[[rounded(p[b].mean()), rounded(np.average(y[b], weights=w[b])), int(b.sum())]
                                      for b in bins if b.any()],
                         auc_by_depth={str(k): rounded(auc(p[d == k], y[d == k] >= 0.5))
                                       for k in sorted({*d.tolist()})})
    return out


def auc(scores, labels) -> float | None:
    """Chance that a right one (label true) scores above a wrong one, ties counted half; None if one kind is missing.

        scores .9 .4 .4 .1, labels 1 1 0 0: of four pairs 3 won, 1 tied -> 3.5 / 4 = .875"""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return None
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]                    # mean rank of equal scores, from 1
    n = labels.sum()
    return float((rank[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def wilson(right: int, n: int) -> tuple:
    """Wilson's 95% interval of a rate."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mcnemar(ours: list, theirs: list) -> float:
    """Exact two-sided McNemar test on the same questions: the chance of so lopsided a split of the questions that
    only one of the two got right, were both equally good."""
    only = [sum(a and not b for a, b in zip(ours, theirs)), sum(b and not a for a, b in zip(ours, theirs))]
    n, k = sum(only), min(only)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n) if n else 1.0


# ----------------------------------------------------------------------------------------------------------
# 5 · Tasks: where questions come from and what a right answer is
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Question:
    """One question; `answer` is read by the grader only (and, on real data, by SFT on reference solutions)."""
    text: str
    answer: str
    steps: int                    # difficulty for the report: operators, lines of the reference, level, options


def calculate(a: int, op: str, b: int) -> int:
    """One operation."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def reduce_at(x: list, i: int) -> list:
    """The expression with the operation at x[i] worked off: [17, '+', 1, '*', 4], 3 -> [17, '+', 4]."""
    return x[:i - 1] + [calculate(*x[i - 1:i + 2])] + x[i + 2:]


def due(x: list) -> int:
    """Index of the operation that precedence asks for: the first `*`, else the first."""
    return x.index("*") if "*" in x else 1


def value(x: list, bounded: bool = True, order=due) -> int | None:
    """Value by precedence, or by another order; bounded: None when some value on the way leaves 0..99."""
    while len(x) > 1:
        i = order(x)
        x = reduce_at(x, i)
        if bounded and not 0 <= x[i - 1] <= 99:
            return None
    return x[0]


def traps(x: list) -> int:
    """Lines on which the operation due is not the leftmost; 0, too, when the student who always does the leftmost
    comes out right, or leaves 0..99 and so begins anew with care."""
    wrong, found = value(x, order=lambda y: 1), 0
    if wrong in (None, value(x)):
        return 0
    while len(x) > 1:
        found += due(x) != 1
        x = reduce_at(x, due(x))
    return found


def parse(text: str) -> list | None:
    """'17+1*4' -> [17, '+', 1, '*', 4]; None when it is no expression."""
    if not re.fullmatch(r"[0-9]{1,4}([-+*][0-9]{1,4})*", text):
        return None
    return [t if t in "+-*" else int(t) for t in re.findall(r"[0-9]+|[-+*]", text)]


def solution_over(line: str) -> bool:
    """The line that ends a solution: the answer, or a base model going on to invent the next question."""
    return "####" in line or line.startswith("Question:")


# HACK HERE: a task of your own: a subclass with name, draw and solve (and vary, for alphallm), in TASKS
class Builtin:
    """What the built-in tasks share: an endless stream of questions, split by hash, and a corpus for the base."""

    find_answer, over = staticmethod(find_answer), staticmethod(solution_over)
    form = "####"                 # the rule of a strict answer

    def __init__(self, c, tokenizer: Tokenizer | None = None):
        self.c = c                    # settings, loop.Config
        self.tokenizer = tokenizer or Tokenizer.bytes_only()            # of open weights, or bytes

    def prompt(self, question: Question) -> str:
        """What the model reads."""
        return question.text + "?"

    def prompt_ids(self, question: Question) -> list:
        """Its ids."""
        return self.tokenizer.encode_prompt(self.prompt(question))

    def stream(self, seed: int, held_out: bool):
        """Endless questions of one side of the split: one question in eight, by hash, is never trained on."""
        rng = random.Random(seed)
        while True:
            question = self.draw(rng)
            if self.held_out(question) == held_out:
                yield question

    def held_out(self, question: Question) -> bool:
        """Which side of the split a question is on."""
        return hashlib.sha256(self.key(question).encode()).digest()[0] < 32

    def key(self, question: Question) -> str:
        """What makes two questions the same for the split."""
        return question.text

    def distinct(self, seed: int, held_out: bool, count: int) -> list:
        """The first `count` different questions of a stream; BadInput when there are not so many."""
        found, stale = {}, 0
        for q in self.stream(seed, held_out):
            stale = stale + 1 if q.text in found else 0
            found.setdefault(q.text, q)
            if len(found) == count:
                return list(found.values())
            if stale > 1000 + len(found):               # hardly anything new any more: do not search for ever
                raise BadInput(f"{self.name} with these settings has only about {len(found)} different questions "
                               f"of this kind, not {count}: lower --questions or --eval-questions.")

    def train_questions(self, round_: int) -> list:
        """Fresh questions of a round, the same for every recipe of a seed."""
        return self.distinct(mix(self.c.seed, round_, 1), False, self.c.questions)

    def imagine(self, old: list, count: int, rng: random.Random, write=None) -> list:
        """AlphaLLM's first step: `count` new questions from old ones. None is on the held-out side, none is an old
        one, none twice. Their `answer` is empty: nobody knows it, and nothing may read it."""
        found, known = [], {self.key(q) for q in old}
        for _ in range(50 * count):
            source = rng.choice(old)
            q = Question(self.vary(source, rng), "", source.steps)
            if self.key(q) not in known and not self.held_out(q):
                known.add(self.key(q))
                found.append(q)
            if len(found) == count:
                break
        return found

    @functools.cached_property
    def _held(self):
        return self.distinct(99, True, self.c.eval_questions)

    def eval_questions(self) -> list:
        """The same held-out questions for every run, whatever its seed; drawn once: seven of eight drafts are training
        questions, so with traps this takes seconds."""
        return self._held

    def example(self, question: Question, rng: random.Random) -> tuple:
        """What the base is trained on: ids of the question, ids of a careless solution with end-of-text."""
        ids = self.tokenizer.encode_more(self.solve(question, rng))
        return self.prompt_ids(question), ids + sorted(self.tokenizer.eos_ids)[:1]

    def reward(self, question: str, text: str, answer: str) -> bool:
        """Is the solution right? By its final answer alone."""
        return grade(text, answer)


class Homework(Builtin):
    """The built-in task: expressions like 7+1*4-2, worked off one operation a line.

        7+1*4-2?1*4=4 : 7+4-2        A student of the corpus does, with probability `careless`, the leftmost
                7+4=11 : 11-2        operation instead of the one precedence asks for. So the base *can* do every
                11-2=9 : 9           step and *chooses* wrongly: the first pit is plain to the eye, only the final
                #### 9               answer is ever graded, and more SFT on the corpus cannot help."""

    name = "homework"

    def draw(self, rng: random.Random) -> Question:
        """A random expression; every value of its right evaluation lies in 0..99. The first operator is + or -, the
        second often *: else the leftmost were too often the right one, and the base as good as its teacher. With
        --traps all have so many at least: right is only who resists each of them, about (1 - careless)^traps."""
        while True:
            x = [rng.randint(1, 9)]
            for i in range(rng.randint(self.c.min_operators, self.c.max_operators)):
                op = rng.choice(("+-", "+-**", "+-**" if self.c.traps else "+-*")[min(i, 2)])
                x += [op, rng.randint(2 if op == "*" else 1, 9)]
            # a trap takes a `*`; counting these first is cheap: with two traps 46 of 47 drafts are thrown away
            if x.count("*") >= self.c.traps and value(x) is not None and traps(x) >= self.c.traps:
                return Question("".join(map(str, x)), str(value(x)), len(x) // 2)

    def vary(self, question: Question, rng: random.Random) -> str:
        """A new question from an old one: one number or one operator is another. Nobody works out its value: it may
        leave 0..99, and then no answer is consistent and the search throws it away."""
        x = parse(question.text)
        i = rng.randrange(len(x))
        if i % 2:
            x[i] = rng.choice("+-" if i == 1 else "+-*")
            x[i + 1] = max(x[i + 1], 2 if x[i] == "*" else 1)
        else:
            x[i] = rng.randint(2 if i and x[i - 1] == "*" else 1, 9)
        return "".join(map(str, x))

    def solve(self, question: Question, rng: random.Random) -> str:
        """A student's solution. One whose values leave 0..99 starts over, after 20 times with care."""
        for attempt in range(21):
            y, lines = parse(question.text), []
            while len(y) > 1 and all(0 <= v <= 99 for v in y[::2]):
                i = 1 if attempt < 20 and rng.random() < self.c.careless else due(y)
                a, op, b = y[i - 1:i + 2]
                y = reduce_at(y, i)
                lines.append(f"{a}{op}{b}={y[i - 1]} : {''.join(map(str, y))}\n")
            if len(y) == 1 and 0 <= y[0] <= 99:
                break
        return "".join(lines) + f"#### {y[0]}"

    def first_false_step(self, question: Question, text: str) -> int | None:
        """The truth a pit label is compared with: index of the first line whose arithmetic or copying is false, or
        that leaves an expression whose value by precedence is no longer the answer; None when all are good."""
        x, lines = parse(question.text), text.split("\n")
        for i, line in enumerate(lines):
            if len(x) == 1:
                good = line == f"#### {x[0]}" and x[0] == int(question.answer)
                return None if good and i == len(lines) - 1 else i
            left, _, rest = line.partition(" : ")
            operation, _, result = left.partition("=")
            done = [reduce_at(x, j) for j in range(1, len(x), 2) if "".join(map(str, x[j - 1:j + 2])) == operation]
            match = [y for y in done if "".join(map(str, y)) == rest and result.isdigit()]
            match = [y for y in match if str(calculate(*parse(operation))) == result]
            if not match or value(match[0], bounded=False) != int(question.answer):
                return i
            x = match[0]
        return len(lines) - 1


class Countdown(Builtin):
    """The second built-in task: combine all numbers into the target.

        10 12 9 -> 7?12-9=3 : 10 3       The corpus is random legal play, whatever it ends in: the base knows the
                     10-3=7 : 7          rules and no strategy, as in AlphaZero. The legality of every line is
                     #### 7              checked, so a bare right-looking answer earns nothing."""

    name = "countdown"

    def moves(self, numbers: tuple) -> list:
        """All legal moves: (line, numbers left). + - * of two numbers, results in 0..99; the result goes last."""
        found = []
        for i, j in permutations(range(len(numbers)), 2):
            a, b, rest = numbers[i], numbers[j], tuple(x for k, x in enumerate(numbers) if k not in (i, j))
            for op in "+-*":
                c = calculate(a, op, b)
                if 0 <= c <= 99:
                    found.append((f"{a}{op}{b}={c} : {' '.join(map(str, rest + (c,)))}\n", rest + (c,)))
        return found

    def play(self, numbers: tuple, rng: random.Random) -> tuple:
        """Random legal play to the end: (lines, the number left). 2 numbers always have a sum or a difference."""
        lines = ""
        while len(numbers) > 1:
            line, numbers = rng.choice(self.moves(numbers))
            lines += line
        return lines, numbers[0]

    def draw(self, rng: random.Random) -> Question:
        """Numbers from 1 to 12 and a target that some play reaches."""
        numbers = tuple(rng.randint(1, 12) for _ in range(self.c.numbers))
        target = self.play(numbers, rng)[1]
        return Question(f"{' '.join(map(str, numbers))} -> {target}", str(target), self.c.numbers - 1)

    def key(self, question: Question) -> str:
        """The numbers in any order are the same question: else a held-out one could be trained on, turned round."""
        numbers, _, target = question.text.partition(" -> ")
        return " ".join(sorted(numbers.split())) + " -> " + target

    def vary(self, question: Question, rng: random.Random) -> str:
        """A new question from an old one: a number or the target is another. It may have no solution."""
        numbers, target = list(self.numbers(question.text)), int(question.text.partition(" -> ")[2])
        i = rng.randint(0, len(numbers))
        if i == len(numbers):
            target = min(99, max(0, target + rng.choice((-3, -2, -1, 1, 2, 3))))
        else:
            numbers[i] = rng.randint(1, 12)
        return f"{' '.join(map(str, numbers))} -> {target}"

    def solve(self, question: Question, rng: random.Random) -> str:
        """A play that does not look at the target."""
        lines, last = self.play(self.numbers(question.text), rng)
        return lines + f"#### {last}"

    @staticmethod
    def numbers(text: str) -> tuple:
        """The numbers of a question."""
        return tuple(map(int, text.partition(" -> ")[0].split()))

    def reward(self, question: str, text: str, answer: str) -> bool:
        """Every line a legal move, all numbers used, the last line the target."""
        numbers, lines = self.numbers(question), text.split("\n")
        for line in lines[:-1]:
            numbers = dict(self.moves(numbers)).get(line + "\n")
            if numbers is None:
                return False
        return len(numbers) == 1 and lines[-1] == f"#### {answer}" and str(numbers[0]) == answer


TASKS = dict(homework=Homework, countdown=Countdown)


def read_gsm8k(item: dict) -> tuple:
    """GSM8K, or any question with a reference that ends in a number: -> (question, reference, lines of it)."""
    reference = strip_calculator_marks(field(item, "answer", str)).strip()
    need(extract_answer(reference) is not None, "the answer holds no number to grade by")
    return field(item, "question", str), reference, len(reference.split("\n")) - ("####" in reference)


def read_math(item: dict) -> tuple:
    """MATH: -> (problem, solution, level; where there is none, lines of the solution). Where the solution has no box,
    a field "answer" is put into one; `\\boxed 5$` and `\\fbox{5}`, which occur, are boxes, too."""
    solution = field(item, "solution", str).replace("\\fbox{", "\\boxed{").replace("####", "")
    solution = re.sub(r"\\boxed\s+([^{$\s][^$\n]*)\$", r"\\boxed{\1}$", solution).strip()
    if not _last_box(solution).strip() and item.get("answer") is not None:
        solution += f"\n\\boxed{{{item['answer']}}}"
    need(_last_box(solution).strip(), "the solution holds no \\boxed{...} to grade by")
    level, lines = re.search("[0-9]{1,3}", str(item.get("level"))), [x for x in solution.split("\n") if x.strip()]
    return field(item, "problem", str), solution, int(level.group()) if level else len(lines)


def read_sciq(item: dict) -> tuple:
    """SciQ: -> as `lettered`. Closed book: the prompt does not show the support; as a rationale it is imitated."""
    wrong = field(item, "distractors", list, [item.get(f"distractor{i}") for i in (1, 2, 3)])
    options = [item["correct_answer"], *wrong]
    return lettered(field(item, "question", str), options, 0, field(item, "support", str, ""))


def read_choices(item: dict) -> tuple:
    """ARC, CommonsenseQA; both as they were published and as tables: -> as `lettered`."""
    inner = item["question"] if isinstance(item["question"], dict) else item | {"stem": item["question"]}
    choices = inner.get("choices")
    if isinstance(choices, dict):
        labels, texts = (field(choices, key, list) for key in ("label", "text"))
    else:
        labels, texts = ([field(c, key, str) for c in field(inner, "choices", list)] for key in ("label", "text"))
    key = field(item, "answerKey", str)
    need(labels.count(key) == 1 and len(labels) == len(texts), f'the answerKey "{key:.20}" names none of the choices')
    return lettered(field(inner, "stem", str), texts, labels.index(key))


def lettered(question: str, options: list, right: int, rationale: str = "") -> tuple:
    """-> (question with lines "(A) ...", rationale and "#### B", number of options). Their order is a function of
    the texts alone, whatever order and labels the file has: a file may have the right one always first."""
    need(all(isinstance(o, str) and o.strip() for o in options), "every option must be a text")
    options = [" ".join(o.split()) for o in options]
    order = sorted({*options})
    need(2 <= len(order) <= 26, f"{len(order)} different options; 2 to 26 can be lettered")
    seed = hashlib.sha256("\n".join([question, *order]).encode("utf-8", "replace")).digest()[:8]
    order = random.Random(int.from_bytes(seed, "big")).sample(order, len(order))
    shown = "".join(f"\n({chr(65 + i)}) {option}" for i, option in enumerate(order))
    answer = f"{' '.join(rationale.split())}\n#### {chr(65 + order.index(options[right]))}"
    return question.strip() + shown, answer.strip(), len(order)


@dataclass(frozen=True)
class Kind:
    """One form of data: how it is recognised and read, what is graded and when a solution is over."""
    name: str
    fields: tuple                 # an item with these is of this kind
    read: Callable                # item -> (question, reference solution, steps); ValueError says what is wrong
    find: Callable                # text -> (answer, rule); the one grader, `grade`, sees the kind in the reference
    graded: str
    form: str = "####"            # the rule of the training text: *strict*
    ends: tuple = ()              # rules that end a solution as soon as a line has such an answer


LETTERED = dict(find=find_letter, graded="letter", ends=("boxed", "phrase"))
# HACK HERE: a data set of your own
KINDS = (Kind("SciQ", ("question", "correct_answer"), read_sciq, **LETTERED),
         Kind("ARC or CommonsenseQA", ("question", "answerKey"), read_choices, **LETTERED),
         Kind("MATH", ("problem", "solution"), read_math, find_formula, "formula", "boxed", ("boxed",)),
         Kind("GSM8K", ("question", "answer"), read_gsm8k, find_answer, "number"))


class Exercises:
    """Questions from files of one of the KINDS, for open weights."""

    def __init__(self, c, tokenizer: Tokenizer, context: int):
        self.c, self.tokenizer, self.context, self.files = c, tokenizer, context, []
        self.name = Path(c.data or c.eval_data).stem
        template = c.template.replace("\\n", "\n") or "Question: {question}\nAnswer:"     # \n as a shell passes it
        self.before, _, self.after = template.partition("{question}")
        self.train = self.read(c.data) if c.data else []
        self.test = self.read(c.eval_data)
        self.rationales = self.read(c.sft_data) if c.sft_data else []
        self.kind = self.files[0][1]
        self.find_answer, self.form = self.kind.find, self.kind.form
        for file, other, _ in self.files:
            if self.kind.graded != other.graded:
                raise BadInput(f"{self.files[0][0]} is graded by a {self.kind.graded}, {file} by a {other.graded}: a "
                               "run reads one kind of answer; take files of one kind (--evaluate works on any).")
        if c.data and c.recipe in ("alphallm", "combined") and self.kind.graded == "letter":
            why = dict(alphallm="makes up questions of one line, without options",
                       combined="searches until an answer is right, and a letter is soon guessed")[c.recipe]
            raise BadInput(f"--recipe {c.recipe} {why}; take another recipe.")

    def prompt(self, question: Question) -> str:
        """What the model reads."""
        return self.before + question.text + self.after

    def prompt_ids(self, question: Question) -> list:
        """Its ids; all prompts of a run are made here. Special tokens that the template writes become such, those
        that a question writes stay text: it cannot open a turn. A begin token in the template is not doubled."""
        tok, whole = self.tokenizer, self.prompt(question)
        if not self.c.template:
            return tok.encode_prompt(whole)
        if all(whole.count(name) == self.before.count(name) + self.after.count(name) for name in tok.added):
            ids = tok.encode(whole, True)               # in one piece: words go across the borders of the template
        else:
            ids = tok.encode(self.before, True) + tok.encode(question.text, begins=not self.before)
            ids += tok.encode_more(self.after, True)
        return ids if ids[:len(tok.begin)] == tok.begin else tok.begin + ids

    def describe(self) -> str:
        """What a run says of its data: a line per file, the first prompt as the model reads it, its ids."""
        cut = lambda text: text if len(text) < 108 else f"{text[:64]} ... {text[-38:]}"
        first = (self.train or self.test)[0]
        return "\n".join([f"{Path(file).name}: {count:,} questions ({kind.name}; the {kind.graded} is graded)"
                          for file, kind, count in self.files] +
                         [f"prompt: {cut(repr(self.prompt(first)))}", f"its ids: {cut(str(self.prompt_ids(first)))}"])

    def entries(self, file: str):
        """(where, item) of JSON lines, or of one JSON array. BadInput: no such file, no JSON."""
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{file} cannot be read ({error}); --data, --eval-data and --sft-data take files of JSON "
                           "lines.") from error
        array = text.lstrip().startswith("[")
        for number, line in enumerate([text] if array else text.split("\n"), 1):
            where = f"{file}, line {number}"
            try:
                found = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: not JSON ({error}).") from error
            if array:
                yield from ((f"{file}, item {i}", item) for i, item in enumerate(found, 1))
            elif line.strip():
                yield where, found

    def read(self, file: str) -> list:
        """All questions of a file. Raises BadInput with the line number for anything that is not one."""
        found, kind = [], None
        for where, item in self.entries(file):
            here = next((k for k in KINDS if isinstance(item, dict) and {*k.fields} <= item.keys()), None)
            if here is None or here is not (kind or here):
                raise BadInput(f"{where}: " + (f"{here.name} in a file of {kind.name}; one kind a file" if here else
                               "expected an object with the fields " +
                               "; or ".join(f"{' and '.join(k.fields)} ({k.name})" for k in KINDS)) + ".")
            kind = here
            with about(where):
                text, answer, steps = kind.read(item)
                q = Question(text.strip(), answer, steps)
                need(q.text, "the question is empty")
                need(grade(answer, answer), f"the reference holds no {kind.graded} to grade by")
                size = len(self.prompt_ids(q))
                need(size < self.context, f"the question takes {size} tokens, the model's context is {self.context}; "
                     "shorten or remove it")
            found.append(q)
        if not found:
            raise BadInput(f"{file} holds no question.")
        self.files.append((file, kind, len(found)))
        return found

    def over(self, line: str) -> bool:
        """Does this line end a solution? A heading (`#### Step 1`) does not."""
        return line.startswith("Question:") or self.kind.find(line)[1] in ("####", *self.kind.ends)

    def train_questions(self, round_: int) -> list:
        """The next `questions` of a shuffled file; every question once before any comes again."""
        order, start = [], (round_ - 1) * self.c.questions
        for epoch in range(start // len(self.train), (start + self.c.questions - 1) // len(self.train) + 1):
            order += random.Random(mix(self.c.seed, epoch, 1)).sample(self.train, len(self.train))
        return order[start % len(self.train):][:self.c.questions]

    def imagine(self, old: list, count: int, rng: random.Random, write) -> list:
        """AlphaLLM's first step on real questions: shown three (fewer in a short context), the model writes one more
        (the paper rephrases one or turns it round; a base model cannot be asked to, but goes on with a list).
        write([prompt]) -> [the line it goes on with]. Kept: one line that ends in "?", holds a number, fits the
        context, and shares fewer than half of its word triples with any question known here, held-out ones included.
        `answer` is empty: nothing may read it."""
        triples = lambda text: {*zip(*[text.split()[i:] for i in range(3)])} or {text}
        fits = lambda text: len(self.tokenizer.encode_prompt(text)) < self.context // 2     # half is for the new one
        found, known = [], [triples(q.text) for q in self.train + self.test]
        for _ in range(4):
            picks = [rng.sample(old, min(3, len(old))) for _ in range(count - len(found))]
            prompts = [next(filter(fits, ("".join(f"Question: {q.text}\n\n" for q in pick[i:]) + "Question:"
                                          for i in range(len(pick)))), None) for pick in picks]
            for text in write([p for p in prompts if p]):
                q, words = Question(text.strip(), "", 0), triples(text.strip())
                if q.text.endswith("?") and re.search("[0-9]", q.text) and \
                        len(self.prompt_ids(q)) < self.context and \
                        all(2 * len(words & other) < len(words) for other in known):
                    known.append(words)
                    found.append(q)
            if len(found) == count:
                break
        return found

    def eval_questions(self) -> list:
        """The first eval_questions of the held-out file."""
        return self.test[:self.c.eval_questions]

    def example(self, question: Question, rng: random.Random) -> tuple:
        """Ids of the question and of the reference solution, for SFT; what the context cannot hold is cut off."""
        lead = "" if self.after[-1:].isspace() else " "                 # a turn of a chat begins on a line of its own
        ids = self.tokenizer.encode_more(lead + question.answer) + sorted(self.tokenizer.eos_ids)[:1]
        prompt = self.prompt_ids(question)
        return prompt, ids[:self.context - len(prompt)]

    def reward(self, question: str, text: str, answer: str) -> bool:
        """Is the solution right? By its final answer."""
        return grade(text, answer)


def calculations(text: str) -> str:
    """What makes two solutions distinct: their calculations, not their words (Self-Explore sec. 3.1)."""
    found = re.findall(r"[0-9.]+ *[-+*/x] *[0-9.]+ *=? *[0-9.]*", text)
    return " ".join(found).replace(" ", "") or " ".join(text.split())


# ----------------------------------------------------------------------------------------------------------
# 6 · Demo
# ----------------------------------------------------------------------------------------------------------
def main() -> None:
    """Label 8+1*4-2 solved in the wrong order. A scripted student stands in for the model: it goes on faultlessly
    from what is written, so prefixes that are still good are completed right and ruined ones never."""
    tokenizer, forest, answer = Tokenizer.bytes_only(), Forest(1), "#### 10"
    lines = {"8+1*4-2": ["1*4=4 : 8+4-2\n", "8+1=9 : 9*4-2\n"], "8+4-2": ["8+4=12 : 12-2\n"],
             "12-2": ["12-2=10 : 10\n"],
             "9*4-2": ["9*4=36 : 36-2\n"], "36-2": ["36-2=34 : 34\n"]}
    forest.add(0, -1, tokenizer.encode("8+1*4-2?"))

    def finish(node, first, rng):
        """Go on to the end from a node, `first` step given or drawn; -> the leaf, graded."""
        here = tokenizer.decode(forest.ids[0][node].tolist()).strip().rstrip("?").split(" : ")[-1]
        while here in lines:
            step = first or rng.choice(lines[here])
            node, first, here = forest.add(0, node, tokenizer.encode(step)), None, step.strip().split(" : ")[-1]
        leaf = forest.add(0, node, tokenizer.encode(f"#### {here}"), end="eos")
        forest.right[0, leaf] = grade(forest.text(0, leaf, tokenizer), answer)
        return leaf

    def complete(wants):
        """What `label_pits` asks for."""
        rng, before = random.Random(1), forest.count[0].sum()
        for _, node, k in wants:
            for _ in range(k):
                finish(node, None, rng)
        return int(forest.count[0].sum() - before)
    wrong = finish(0, lines["8+1*4-2"][1], random.Random(0))
    pit, = label_pits(forest, [(0, wrong)], complete, k=4)
    print(draw(forest, 0, tokenizer, pits=[pit.node]))
    print(f"\nwrong solution: node {wrong}; first pit: step {pit.step + 1} (node {pit.node}), "
          f"{pit.probes} probe(s) of 4 completions")


if __name__ == "__main__":
    main()
