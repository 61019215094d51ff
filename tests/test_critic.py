"""The first pit and self-evaluation: tables, every short list, and label_pits on games whose truth is known by brute
force.

Oracles: successes written by hand, all monotone (and all) lists up to length 9, and games so small that
"does any right end lie below this prefix" is answered by visiting every end. The grader has its own tests
(test_grade.py). Seeds are fixed; only the two tests of rates use chance, their docstrings say how much."""
import math
import random
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from critic import JUDGE, REFERENCE, Pit, auc, confidence, first_pit, label_pits, next_probe  # noqa: E402
from critic import Exercises, Question, self_evaluation  # noqa: E402
from mcts import Forest, grow, plant  # noqa: E402
from model import GPT, GPTConfig, Request, Sampler, Tokenizer  # noqa: E402

SEARCHES = ("linear", "bisect")


# ----------------------------------------------------------------------------------------------------------
# first_pit and next_probe
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("successes, pit", [
    ([4, 2, 0, 0], 2), ([0, 3, 1], 0), ([0], 0), ([4, 4, 4], None), ([4, 0, 3], 1), ([], None), ([1, 0], 1)])
def test_first_pit_table(successes, pit):
    """The first step with no success, written by hand; none when every step has one (or there is no step)."""
    assert first_pit(successes) == pit


def probed(truth, search, known=()):
    """Ask next_probe until it is settled, answering from `truth` (the last step is known from the start).
    -> (pit read off what is known by then, the prefixes asked for)."""
    known = [*known, *[None] * (len(truth) - 1 - len(known)), truth[-1]]
    asked = []
    while (i := next_probe(known, search)) is not None:
        assert known[i] is None                                         # nothing is asked for twice
        known[i] = truth[i]
        asked.append(i)
        assert len(asked) < len(truth)                                  # the last step is never completed
    good = [i for i, s in enumerate(known) if s]
    if search == "bisect":
        return max(good, default=-1) + 1, asked
    return first_pit([1 if s is None else s for s in known]), asked


MONOTONE = [[3] * good + [0] * (n - good) for n in range(1, 10) for good in range(n)]


@pytest.mark.parametrize("truth", MONOTONE, ids=lambda t: "".join(map(str, t)))
def test_bisection_is_linear_on_monotone_lists(truth):
    """On every monotone list up to length 9 both searches find first_pit(truth): linear by asking for steps
    0, 1, ... up to the pit, bisection with at most ceil(log2(n + 1)) probes. So too when the first successes
    are known beforehand (right ends in other branches), and those are not asked for."""
    pit, n = first_pit(truth), len(truth)
    for free in range(pit + 1):
        known = truth[:free]
        found, asked = probed(truth, "linear", known)
        assert found == pit and asked == list(range(free, min(pit + 1, n - 1)))
        found, asked = probed(truth, "bisect", known)
        assert found == pit and len(asked) <= math.ceil(math.log2(n - free + 1))
        assert min(asked, default=n) >= free


def test_searches_on_all_lists():
    """On every list of successes and failures up to length 9 that ends in failure, monotone or not: linear
    finds the first failure; bisection finds a failure whose predecessor succeeds (or step 0), within the same
    number of probes; both were measured, not assumed."""
    for n in range(1, 10):
        for truth in product((0, 2), repeat=n - 1):
            truth = [*truth, 0]
            assert probed(truth, "linear")[0] == first_pit(truth)
            pit, asked = probed(truth, "bisect")
            assert truth[pit] == 0 and (pit == 0 or truth[pit - 1] > 0)
            assert len(asked) <= math.ceil(math.log2(n + 1)) and {pit - 1, pit} <= {*asked, -1, n - 1}


# ----------------------------------------------------------------------------------------------------------
# label_pits on games
# ----------------------------------------------------------------------------------------------------------
class Game:
    """Texts of `depth` letters out of `width`, a letter a step; a random set of them is right. What
    `complete` is asked for is kept, a list per call; the prompt is two tokens."""

    def __init__(self, seed, trees=3, depth=5, width=3, share=0.06):
        self.rng, self.depth, self.width = random.Random(seed), depth, width
        self.forest, self.calls = Forest(trees, 2), []
        ends = list(product(range(width), repeat=depth))
        self.right = [{end for end in ends if self.rng.random() < share} for _ in range(trees)]
        for b in range(trees):
            self.forest.add(b, -1, [90, 91])

    def letters(self, b, n):
        return tuple(map(int, self.forest.path_of(b, n, "ids", root=False)))

    def write(self, b, node, letters):
        """Hang the rest of a solution below a node, graded; the last letter ends it."""
        for i, letter in enumerate(letters):
            node = self.forest.add(b, node, [letter], end="eos" if i == len(letters) - 1 else "")
        self.forest.right[b, node] = self.letters(b, node) in self.right[b]
        return node

    def complete(self, wants):
        """k random completions of every wanted node, one of them right if any can be: a student who misses
        nothing and gives away little."""
        self.calls.append([(b, n) for b, n, _ in wants])
        sampled = 0
        for b, n, k in wants:
            prefix = self.letters(b, n)
            assert not self.forest.terminal[b, n] and n != 0
            ends = [end[len(prefix):] for end in sorted(self.right[b]) if end[:len(prefix)] == prefix]
            ends = [self.rng.choice(ends)] if ends else []
            for rest in ends + [self.letters_after(prefix) for _ in range(k - len(ends))]:
                self.write(b, n, rest)
                sampled += len(rest)
        return sampled

    def letters_after(self, prefix):
        return [self.rng.randrange(self.width) for _ in range(self.depth - len(prefix))]

    def can_be_right(self, b, prefix):
        """The truth: does any right end lie below?"""
        return any(end[:len(prefix)] == prefix for end in self.right[b])

    def pit(self, b, leaf):
        letters = self.letters(b, leaf)
        return next(i for i in range(self.depth) if not self.can_be_right(b, letters[:i + 1]))

    def samples(self, count):
        """Random solutions of every tree: [(tree, wrong leaf)] without repeats, in order."""
        wrong = {}
        for b in range(len(self.forest)):
            for _ in range(count):
                leaf = self.write(b, 0, self.letters_after(()))
                if not self.forest.right[b, leaf]:
                    wrong[b, leaf] = None
        return list(wrong)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(12))
def test_labels_are_brute_force(seed, search):
    """Completions that cannot miss: each label is the first step below which no right end exists, found by
    looking at all ends. No prefix is completed twice though many solutions
    share it, no last step and no root ever, every open solution asks once a wave, and a wave is one call for
    all trees; a label asks for no more probes than its search may."""
    game = Game(seed, depth=4 + seed % 3)
    wrong = game.samples(8)
    free = [game.forest.below(b) for b in range(3)]                     # right ends found beforehand
    pits = label_pits(game.forest, wrong, game.complete, 4, search)
    assert [(p.tree, p.leaf) for p in pits] == wrong and {b for b, _ in wrong} == {0, 1, 2}
    asked = [want for call in game.calls for want in call]
    assert len(asked) == len({*asked}) and len(game.calls) == max(p.probes for p in pits)
    for p in pits:
        path = game.forest.path(p.tree, p.leaf)[1:]
        assert p.step == game.pit(p.tree, p.leaf) and p.node == path[p.step]
        most = p.step + 1 if search == "linear" else math.ceil(math.log2(game.depth + 1))
        assert p.probes <= min(most, game.depth - 1)
    for b, n in asked:
        assert n >= len(free[b]) or free[b][n] == 0                     # known to be recoverable: not sampled


def test_right_ends_of_other_branches_count():
    """A right solution that shares two steps with a wrong one makes those two successes without sampling:
    the linear search begins at the third, whose only right end is found there; the fourth is the pit. The
    tree beside it, without a right sample, begins at its first step. Exactly these wants, two waves, one
    call each."""
    game = Game(0, trees=2, share=0)
    game.right = [{(0, 0, 1, 1, 1), (0, 0, 0, 2, 2)}, {(1, 1, 1, 1, 1)}]
    right, wrong = game.write(0, 0, (0, 0, 1, 1, 1)), game.write(0, 0, (0, 0, 0, 0, 0))
    other = game.write(1, 0, (1, 0, 0, 0, 0))
    path, beside = game.forest.path(0, wrong)[1:], game.forest.path(1, other)[1:]
    assert game.forest.right[0, right] == 1
    pits = label_pits(game.forest, [(0, wrong), (1, other)], game.complete, 4)
    assert game.calls == [[(0, path[2]), (1, beside[0])], [(0, path[3]), (1, beside[1])]]
    assert pits == [Pit(0, wrong, 3, path[3], 2), Pit(1, other, 1, beside[1], 2)]


@pytest.mark.parametrize("search", SEARCHES)
def test_wrong_samples_make_no_failure(search):
    """Solutions were picked because they failed: forty wrong samples through the same steps say nothing about
    a prefix. Every step but the last still gets its k fresh completions before it is called a pit, and fresh
    ones that only repeat the labelled solution leave the pit at the first step."""
    game = Game(0, trees=1, share=0)
    for _ in range(40):
        leaf = game.write(0, 0, (0, 1, 2, 0, 1))
    path, asked = game.forest.path(0, leaf)[1:], []

    def repeat(wants):
        asked.extend(wants)
        for b, n, k in wants:
            for _ in range(k):
                assert game.write(b, n, (0, 1, 2, 0, 1)[game.forest.depth[b, n]:]) == leaf
        return 1
    pit, = label_pits(game.forest, [(0, leaf)], repeat, 4, search)
    assert (pit.step, pit.node) == (0, path[0]) and asked[-1] == (0, path[0], 4)
    assert pit.probes == {"linear": 1, "bisect": 2}[search]
    assert game.forest.count[0, leaf] == 40 + 4 * pit.probes


@pytest.mark.parametrize("search", SEARCHES)
def test_last_step_is_not_sampled(search):
    """A wrong solution of one step, and one whose every earlier step has a right end beside it, are labelled
    at their last step without a single call."""
    game = Game(0, trees=2, share=0)
    game.right = [{(0,)}, {(0, 0, 0, 0, 1)}]
    only, near = game.write(0, 0, (2,)), game.write(1, 0, (0, 0, 0, 0, 0))
    game.write(1, 0, (0, 0, 0, 0, 1))
    pits = label_pits(game.forest, [(0, only), (1, near)], game.complete, 4, search)
    assert pits == [Pit(0, only, 0, only, 0), Pit(1, near, 4, near, 0)] and game.calls == []
    assert label_pits(game.forest, [], game.complete, 4, search) == []


def test_shared_prefix_shares_probes():
    """Two wrong solutions with the first three steps in common, one of them listed twice, ask for a prefix
    once and together. The right end found below step 0 lies below step 1 as well and saves the probe there;
    step 2 is the pit of all."""
    game = Game(0, trees=1, share=0)
    game.right = [{(0, 0, 1, 1, 1)}]
    one, two = game.write(0, 0, (0, 0, 0, 0, 0)), game.write(0, 0, (0, 0, 0, 1, 1))
    path = game.forest.path(0, one)[1:]
    pits = label_pits(game.forest, [(0, one), (0, two), (0, one)], game.complete, 4)
    assert game.calls == [[(0, path[0])], [(0, path[2])]]
    assert pits == [Pit(0, one, 2, path[2], 2), Pit(0, two, 2, path[2], 2), Pit(0, one, 2, path[2], 2)]


def test_budget_of_labels():
    """With a budget of tokens a wave asks for no more completions than it pays for (a completion is taken to be as long
    as what it replaces): spent are the budget and less than one prefix's completions more, or what all labels cost.
    Labels settled by then equal those without a budget, the others have step and node None. Budget 0 samples nothing
    and still labels what needs no sampling."""
    k, steps = 4, 5

    def labelled(budget):
        game, spent = Game(steps, trees=4), []
        wrong = game.samples(6)
        complete = lambda wants: spent.append(game.complete(wants)) or spent[-1]
        pits = label_pits(game.forest, wrong, complete, k, "linear", budget)
        return pits, spent
    whole, waves = labelled(math.inf)
    assert len(waves) >= 3 and all(p.step is not None for p in whole)
    settled = []
    for budget in range(0, sum(waves) + 200, 7):
        pits, spent = labelled(budget)
        assert sum(spent) <= min(budget + k * steps, sum(waves)) and (sum(spent) >= budget or pits == whole)
        for p, q in zip(pits, whole):
            assert (p.step, p.node) == (q.step, q.node) if p.step is not None else p.node is None
            assert p.probes <= q.probes
        settled.append(sum(p.step is not None for p in pits))
    assert labelled(0)[1] == [] and pits == whole and spent == waves
    assert settled[0] < settled[len(settled) // 2] < settled[-1] == len(whole)


# ----------------------------------------------------------------------------------------------------------
# How often a good step is called a pit
# ----------------------------------------------------------------------------------------------------------
def wrong_chains(trees, steps):
    """`trees` questions with one wrong solution of `steps` steps each."""
    forest, wrong = Forest(trees, 2 * steps + 2), []
    for b in range(trees):
        n = forest.add(b, -1, [9])
        for i in range(steps):
            n = forest.add(b, n, [i], end="eos" if i == steps - 1 else "")
        forest.right[b, n] = 0
        wrong.append((b, n))
    return forest, wrong


def student(forest, p, rng):
    """A scripted `complete`: from every prefix it recovers with chance p, in a branch of its own."""
    def complete(wants):
        for b, n, k in wants:
            for _ in range(k):
                right = rng.random() < p
                leaf = forest.add(b, n, [7 if right else 8], end="eos")
                forest.right[b, leaf] = right
        return len(wants)
    return complete


@pytest.mark.parametrize("k", (2, 4, 8, 16))
def test_rate_of_false_pits(k):
    """A good first step from which a student recovers with chance p is called the pit with chance (1 - p)^k,
    neither more (completions lost, counted twice or shared between trees) nor less. 1,500 solutions, p = .15
    and .4, within four standard deviations (half an event at least): chance of a false alarm below 1e-3 for
    all eight together, and with the seed fixed none."""
    for p in (0.15, 0.4):
        forest, wrong = wrong_chains(1500, 2)
        pits = label_pits(forest, wrong, student(forest, p, random.Random(k)), k)
        false, rate = sum(pit.step == 0 for pit in pits), (1 - p) ** k
        assert all(pit.step in (0, 1) and pit.probes == 1 for pit in pits)
        assert abs(false - 1500 * rate) <= 4 * math.sqrt(1500 * rate * (1 - rate)) + 0.5


def test_rates_along_a_solution():
    """Three good steps before the last: linear search stops at step i with chance (1-q)^i q, q = (1-p)^k.
    With bisection step 1 is asked first, and a success there vouches for step 0: step 0 is blamed with
    chance q^2, step 1 with q (1-q), step 2 with (1-q) q. 1,500 solutions, four standard deviations for each
    of the eight shares: chance of a false alarm below 1e-3, with the seed fixed none."""
    p, k, N = 0.3, 3, 1500
    q = (1 - p) ** k
    for search, rates in (("linear", (q, (1 - q) * q, (1 - q) ** 2 * q, (1 - q) ** 3)),
                          ("bisect", (q * q, q * (1 - q), (1 - q) * q, (1 - q) ** 2))):
        forest, wrong = wrong_chains(N, 4)
        pits = label_pits(forest, wrong, student(forest, p, random.Random(2)), k, search)
        for step, rate in enumerate(rates):
            count = sum(pit.step == step for pit in pits)
            assert abs(count - N * rate) <= 4 * math.sqrt(N * rate * (1 - rate)), (search, step)


# ----------------------------------------------------------------------------------------------------------
# Self-evaluation
# ----------------------------------------------------------------------------------------------------------
def test_auc():
    """Equals the share of won pairs (ties half) on 300 random lists; one kind alone has none."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores, labels = rng.integers(0, 5, 12) / 4, rng.integers(0, 2, 12)
        pairs = [(s > t) + (s == t) / 2 for s, a in zip(scores, labels) for t, b in zip(scores, labels) if a > b]
        want = float(np.mean(pairs)) if pairs else None
        assert auc(scores, labels) == (want if want is None else pytest.approx(want))
    assert auc([.9, .4, .4, .1], [1, 1, 0, 0]) == .875 and auc([1, 2], [1, 1]) is None and auc([], []) is None


@pytest.mark.parametrize("shown", (None, ["7+1=8", "the answer"]))
def test_self_evaluation_is_a_plain_forward(shown):
    """C(s) equals the softmax over the two letters of a plain forward of question + solution + judging question, mean
    over both orders of the options; the prefix is not encoded again; rows that are being decoded go on unharmed; a
    question that does not fit any more gives .5."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, 32, 2)).initialise(3).bind(tokenizer)
    for p in model.parameters():
        p.data *= 1.5                                                   # else every judgement is .5
    sampler, forest = Sampler(model, tokenizer, 64, rows=4), Forest(2)
    for b, text in enumerate(("7+1?", "9*2?")):
        plant(forest, b, sampler, tokenizer.encode(text))
    leaves = grow(forest, sampler, [(0, 0, 2), (1, 0, 1)], [1, 2], 12)
    tickets = sampler.submit([Request(forest.path_of(0, 0, "slots"), 5, 20)] * 4)
    for _ in range(3):
        sampler.step()
    wants = [(0, leaves[0][0]), (0, leaves[0][1]), (1, leaves[1][0]), (1, 0)]
    found = self_evaluation(forest, wants, sampler, shown)
    for (b, n), c in zip(wants, found):
        ids = [int(i) for i in forest.path_of(b, n, "ids")]
        ids, both = ids[:-1] if ids[-1] in model.stop_ids else ids, []
        for options in (("incorrect", "correct"), ("correct", "incorrect")):
            text = (REFERENCE.format(shown[b]) if shown else "") + JUDGE.format(*options)
            with torch.no_grad():
                logits = model.token_logits(model(torch.tensor([ids + tokenizer.encode(text)]))[0, -1])
            share = torch.softmax(logits[[65, 66]], 0)
            both.append(share[options.index("correct")].item())
        assert c == pytest.approx(sum(both) / 2, abs=1e-5) and 0 < c < 1
    assert len({round(c, 4) for c in found}) > 1
    counts = sampler.counts
    assert counts["processed"] <= counts["prompt"] + counts["sampled"]
    rest = {}
    while len(rest) < 4:
        rest |= sampler.step()
    alone = Sampler(model, tokenizer, 64)
    want, = alone.extend([Request(alone.prompt(tokenizer.encode("7+1?")), 5, 20)])
    assert all(rest[t].ids.tolist() == want.ids.tolist() for t in tickets)
    object.__setattr__(model.config, "max_positions", 40)
    assert self_evaluation(forest, wants[:1], sampler) == [.5]


def test_continuations_are_encoded_as_such(monkeypatch):
    """The judging question, its letters and a reference solution go on from a text. Of the SentencePiece kind, whose
    texts begin with a ▁, they get none; before the solution there is the one space."""
    tokenizer = Tokenizer.from_pretrained(Path(__file__).parent / "data" / "tokenizers" / "llama2_legacy")
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, 32, 1)).initialise(3).bind(tokenizer)
    sampler, forest, asked = Sampler(model, tokenizer, 64, rows=4), Forest(1), []
    plant(forest, 0, sampler, tokenizer.encode_prompt("7+1?"))
    follow = sampler.follow
    monkeypatch.setattr(sampler, "follow", lambda path, ids: asked.append(ids) or follow(path, ids))
    share, = self_evaluation(forest, [(0, 0)], sampler)
    assert 0 < share < 1 and [tokenizer.decode_more(ids) for ids in asked] == [
        JUDGE.format("incorrect", "correct"), JUDGE.format("correct", "incorrect")]
    task = SimpleNamespace(tokenizer=tokenizer, after=" Answer:", context=99,
                           prompt_ids=lambda question: tokenizer.encode_prompt(f"{question.text} Answer:"))
    prompt, ids = Exercises.example(task, Question("7+1?", "it is 8", 0), None)
    assert prompt == tokenizer.encode_prompt("7+1? Answer:") and ids == tokenizer.encode("it is 8")
    assert tokenizer.decode(prompt + ids) == "<s> 7+1? Answer: it is 8"


def test_confidence():
    """exp of the mean log-prob along a solution; a root has nothing to doubt."""
    forest = Forest(1)
    forest.add(0, -1, [1])
    n = forest.add(0, forest.add(0, 0, [2, 3], [-1.0, -2.0]), [4], [-3.0])
    assert confidence(forest, [(0, n), (0, 0)]) == pytest.approx([math.exp(-2), 1.0])
