"""Pits, judge, heads, leaf values, rollouts, statistics: tables, brute force, a plain forward."""
import math
import random
from itertools import product

import numpy as np
import pytest
import torch

import critic
from critic import (HEADS, JUDGE, JUDGE_STEP, REFERENCE, Judge, Rollouts, auc, critic_labels,
                    features, first_pit, fit_critic, known_successes, label_pits,
                    leaf_values, mcnemar, measure, pit, self_evaluation, t_interval, wilson)
from mcts import NOTHING, Tree, from_json, grow, record_grade, to_json, tokens_left
from model import GPT, BadInput, GPTConfig, Sampler, Tokenizer

NAN = math.nan


def write(node, letters, right=None):
    """A letter a step below a node; the last one ends the solution, graded."""
    for i, letter in enumerate(letters):
        end = "eos" if i == len(letters) - 1 else ""
        node = node.tree.add(node, [letter], [-1.0], NOTHING, end)
    if right is not None:
        record_grade(node, right)
    return node


@pytest.mark.parametrize("successes, step", [
    ([4, 2, 0, 0], 2), ([0, 3, 1], 0), ([0], 0), ([4, 4, 4], None), ([4, 0, 3], 1), ([], None),
    ([4, None, 0], None), ([None, 0], None), ([2, 0, None], 1)])
def test_first_pit(successes, step):
    """The first step with no success; none while an earlier step is open."""
    assert first_pit(successes) == step


class Game:
    """Texts of `depth` letters out of three; a random set is right. `complete` finds a right end
    wherever there is one."""

    def __init__(self, seed, trees=3, depth=5, share=0.06):
        self.rng, self.depth, self.calls = random.Random(seed), depth, []
        self.trees = [Tree(b, b, [9, 9]) for b in range(trees)]
        ends = list(product(range(3), repeat=depth))
        self.right = {tree: {e for e in ends if self.rng.random() < share} for tree in self.trees}

    def finish(self, node, letters):
        """A graded solution below a node."""
        whole = (*node.solution().tolist(), *letters)
        return write(node, letters, whole in self.right[node.tree])

    def complete(self, wants):
        """k completions of each node, one of them right if any can be."""
        self.calls.append([node for node, _ in wants])
        for node, k in wants:
            prefix = tuple(node.solution().tolist())
            rights = sorted(self.right[node.tree])
            rest = [e[len(prefix):] for e in rights if e[:len(prefix)] == prefix]
            assert not node.ended and node.parent is not None
            for i in range(k):
                letters = [self.rng.randrange(3) for _ in range(self.depth - len(prefix))]
                self.finish(node, self.rng.choice(rest) if rest and i == 0 else letters)
                node.tree.tokens += len(letters)

    def wrong(self, count):
        """Wrong ends among some random solutions of each tree."""
        ends = [self.finish(tree.root, [self.rng.randrange(3) for _ in range(self.depth)])
                for tree in self.trees for _ in range(count)]
        return [end for end in dict.fromkeys(ends) if not end.right]

    def truth(self, end):
        """The first step of the path below which no right end exists."""
        for node in end.path()[1:]:
            prefix = tuple(node.solution().tolist())
            if not any(e[:len(prefix)] == prefix for e in self.right[end.tree]):
                return node


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_brute_force(seed):
    """With completions that cannot miss, a label is the first hopeless step; no probe is wasted."""
    game = Game(seed, depth=4 + seed % 3)
    wrong = game.wrong(8)
    known = {node for tree in game.trees for node in tree.nodes if node.rights}
    label_pits(wrong, game.complete, 4)
    asked = [node for call in game.calls for node in call]
    assert [pit(end) for end in wrong] == [game.truth(end) for end in wrong]
    assert len(asked) == len(set(asked)) and not known & set(asked)
    assert all(node.tried == 4 and (node.tried_right > 0) == (node.rights > 0) for node in asked)


def test_what_needs_no_sampling():
    """Right and ungraded ends, the last step, k = 0, a right end found later, a saved tree."""
    tree = Tree("", 0, [9])
    right, wrong = write(tree.root, [0, 0, 1], True), write(tree.root, [0, 0, 2], False)
    ungraded, single = write(tree.root, [1, 2]), write(tree.root, [2], False)
    assert [pit(end) for end in (right, wrong, ungraded, single)] == [None, wrong, None, single]
    other = write(tree.root, [1, 1, 1], False)
    assert known_successes(other.path()[1:]) == [None, None, 0] and pit(other) is None
    label_pits(tree.ends(), None, 0)
    assert pit(other) is None
    asked = []
    label_pits(tree.ends(), asked.extend, 4)
    assert asked == [(other.path()[1], 4)] and pit(other) is other.path()[1]
    copy = from_json(to_json(tree), "")
    assert pit(copy.nodes[other.index]) is copy.nodes[other.path()[1].index]
    write(other.path()[2], [2], True)
    assert pit(other) is other


def test_budget_of_labels():
    """The budget is kept; labels under it are those without it, and more tokens give more."""
    def labelled(tokens):
        """(pits by index, tokens spent)."""
        game = Game(5, trees=4)
        wrong = game.wrong(6)
        label_pits(wrong, game.complete, 4, tokens_left(game.trees, tokens))
        pits = [(pit(end) or end.tree.root).index for end in wrong]
        return pits, sum(tree.tokens for tree in game.trees)
    whole, cost = labelled(math.inf)
    settled_by = []
    for tokens in (0.5, 10, 40, 100, cost):
        pits, spent = labelled(tokens)
        assert spent <= tokens and all(p in (0, q) for p, q in zip(pits, whole))
        settled_by.append(sum(p > 0 for p in pits))
    assert settled_by == sorted(settled_by) and pits == whole and settled_by[0] < settled_by[-1]


@pytest.mark.parametrize("k", (2, 4, 8))
def test_rate_of_false_pits(k):
    """(1 - p)^k of 1,500 good first steps are called a pit, within four standard deviations."""
    for p in (0.15, 0.4):
        rng, trees = random.Random(k), [Tree(b, b, [9]) for b in range(1500)]
        wrong = [write(tree.root, [0, 1], False) for tree in trees]

        def complete(wants):
            """A completion is the step 7, right, with chance p, else the step 8, wrong."""
            for node in [node for node, k in wants for _ in range(k)]:
                right = rng.random() < p
                write(node, [7 if right else 8], right)
        label_pits(wrong, complete, k)
        false, rate = sum(pit(end) is not end for end in wrong), (1 - p) ** k
        assert abs(false - 1500 * rate) <= 4 * math.sqrt(1500 * rate * (1 - rate)) + 0.5


def test_another_pit_rule(monkeypatch):
    """Another pit rule, "the success rate drops by half", changes two functions alone."""
    monkeypatch.setattr(critic, "known_successes", lambda path: [
        node.tried_right / node.tried if node.tried else 0 if node.ended else None
        for node in path])

    def halved(rates):
        """The first rate below half of the one before; 1 before the first."""
        for i, (before, rate) in enumerate(zip([1, *rates], rates)):
            if rate is None or rate < before / 2:
                return None if rate is None else i
    monkeypatch.setattr(critic, "first_pit", halved)
    wrong = write(Tree("", 0, [9]).root, [0, 1, 2, 3], False)
    rights = dict(zip(wrong.path()[1:], (4, 3, 1)))

    def complete(wants):
        """So many of four are right."""
        for node, k in wants:
            for i in range(k):
                write(node, [7 if i < rights[node] else 8], i < rights[node])
    label_pits([wrong], complete, 4)
    assert pit(wrong) is wrong.path()[3]


def language_model(seed=3, size=32, tokenizer=None):
    """A small random model of bytes with strong opinions, and its sampler."""
    tokenizer = tokenizer or Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, size, 2)).initialise(seed).bind(tokenizer)
    for p in model.parameters():
        p.data *= 1.5
    return Sampler(model, tokenizer, 64, rows=8)


def grown(sampler, k=6):
    """Two trees of a sampler, graded in turn."""
    trees = []
    for i, text in enumerate(("7+1?", "9*2?")):
        ids = sampler.tokenizer.encode(text)
        trees.append(Tree(text, i, ids, sampler.prompt(ids)))
    for i, end in enumerate(grow(sampler, [(tree.root, k) for tree in trees], 12)):
        record_grade(end, i % 2 == 0)
    return trees


def plain_forward(sampler, ids):
    """(T, C) hidden states without a cache."""
    with torch.no_grad():
        return sampler.model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("shown", ("", lambda node: node.tree.question))
def test_self_evaluation_is_a_plain_forward(shown):
    """P equals a plain forward, with and without the gold leak; nothing is encoded twice."""
    sampler = language_model()
    nodes = [node for tree in grown(sampler, 3) for node in tree.nodes]
    nodes[-1].ended = "eos"                             # judged before its end-of-text
    for node, p in zip(nodes, self_evaluation(nodes, sampler, shown=shown)):
        ids = np.concatenate([step.ids for step in node.path()]).tolist()
        ids, both = ids[:-1] if node.ended == "eos" else ids, []
        for options in (("incorrect", "correct"), ("correct", "incorrect")):
            asked = (REFERENCE.format(shown(node)) if shown else "") + JUDGE.format(*options)
            hidden = plain_forward(sampler, ids + sampler.tokenizer.encode(asked))
            share = torch.softmax(sampler.model.all_logps(hidden)[-1, [65, 66]], 0)
            both.append(share[options.index("correct")].item())
        assert p == pytest.approx(sum(both) / 2, abs=1e-5)
    counts = sampler.counts
    assert counts["encoded"] <= counts["prompt"] + counts["sampled"]
    assert self_evaluation(nodes[:1], sampler, shown=lambda node: "x" * 600) == [.5]
    sampler.tokenizer.encode_more = lambda text: [1, 2]
    with pytest.raises(BadInput):
        self_evaluation(nodes, sampler)


def test_judge():
    """Value and outcome are P(correct) of the solution so far, process that of the last step."""
    sampler = language_model()
    nodes = [node for tree in grown(sampler, 2) for node in tree.nodes]
    said = Judge().read(nodes, sampler)
    assert said[:, 0].tolist() == said[:, 2].tolist() == self_evaluation(nodes, sampler)
    assert said[:, 1].tolist() == self_evaluation(nodes, sampler, JUDGE_STEP)


def test_features_are_those_of_a_plain_forward():
    """Hidden state of the last token, and log-probs by hand; nothing is encoded for it."""
    sampler = language_model()
    nodes = [node for tree in grown(sampler) for node in tree.nodes]
    root = nodes[0]
    short = sampler.follow(root.slots, [10])            # a step of one token
    sampler.encode([short])
    nodes.append(root.tree.add(root, [10], [-.5], short[-1:]))
    encoded = sampler.counts["encoded"]
    for node, row in zip(nodes, features(nodes, sampler)):
        ids = np.concatenate([step.ids for step in node.path()]).tolist()
        hidden = plain_forward(sampler, ids)[-1]
        assert torch.allclose(row[:-4], hidden, atol=1e-4)
        whole = node.solution("logps")
        want = [0] * 4
        if len(whole):
            want = [node.logps.min(), node.logps.mean(), whole.min(), whole.mean()]
        assert row[-4:].tolist() == pytest.approx(want, abs=1e-6)
    assert sampler.counts["encoded"] == encoded


def test_labels_by_hand():
    """The tree in the docstring of critic_labels; with k = 1 the lone failure f counts as well."""
    root = Tree("", 0, [9]).root
    for letters, count, right in (([0, 5], 3, 1), ([0, 6], 1, 0), ([1, 7], 4, 0), ([2, 8], 1, 0)):
        for _ in range(count):
            write(root, letters, right)
    rows = critic_labels(root.tree, 4)
    want = [(.75, 1, NAN), (NAN, 1, 1), (NAN, 0, 0), (0, 0, NAN), (NAN, NAN, 0),
            (0, NAN, NAN), (NAN, NAN, 0)]
    assert [node for node, _, _ in rows] == root.tree.nodes[1:]
    assert np.array_equal([labels for _, labels, _ in rows], want, equal_nan=True)
    assert [weight for _, _, weight in rows] == [4, 3, 1, 4, 4, 1, 1]
    root.children[1].wrongs = 20                        # d weighs 8 at most
    assert critic_labels(root.tree, 1)[5][1][1] == 0 and critic_labels(root.tree, 4)[3][2] == 8


def test_heads_learn_and_are_calibrated():
    """A label shown by a feature is learnt; soft labels come out as they are; same bytes twice."""
    x = torch.tensor(list(product((-1., 1.), repeat=4)) * 10)           # (160, 4): no hidden state
    sure, soft = (x[:, :1] > 0).float(), torch.where(x[:, 1:2] > 0, .5, .02)
    labels, kept = torch.cat((sure, soft, sure), 1), torch.arange(160) >= 128
    first, report = fit_critic(x, labels, torch.ones(160), kept, 100, 1)
    torch.rand(1)                                       # others may draw random numbers
    second, _ = fit_critic(x, labels, torch.ones(160), kept, 100, 1)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert report["value"]["auc"] == 1 and first.trusted.tolist() == [1, 1, 1]
    assert report["value"]["brier"] < .05 < report["value"]["constant"]
    said = torch.sigmoid(first(x[kept]))[:, 1]
    assert said[soft[kept, 0] == .5].mean().item() == pytest.approx(.5, abs=.05)
    labels[:, 1] = NAN                                  # nothing to learn: only weight decay acts
    blank, _ = fit_critic(x, labels, torch.ones(160), kept, 100, 1)
    begun = critic.Critic(0, 1).heads.weight
    assert blank.heads.weight[1].tolist() == pytest.approx(begun[1].tolist(), rel=.01)
    assert blank.heads.weight[0].tolist() != pytest.approx(begun[0].tolist(), rel=.01)


@pytest.mark.parametrize("rows, kept, note", [
    (0, 0, "no "), (1, 0, "no held-out label"), (1, 1, "no label to learn"),
    (8, 0, "no held-out label"), (8, 8, "no label to learn"), (8, 1, "one kind")])
def test_heads_that_cannot_be_measured(rows, kept, note):
    """No row, one row, nothing kept, all kept: no traceback, no NaN, a sentence, and no trust."""
    x, labels = torch.randn(rows, 6), torch.ones(rows, 3)
    made, report = fit_critic(x, labels, torch.ones(rows), torch.arange(rows) < kept, 5, 0)
    assert made.trusted.tolist() == [0, 0, 0]
    assert not any(p.isnan().any() for p in made.state_dict().values())
    assert all(note in report[head]["note"] and not report[head]["trusted"] for head in HEADS)


def test_report_by_hand():
    """AUC, Brier, the best constant and tenths of four nodes by hand."""
    report = measure(np.array([.9, .85, .35, .1]), np.array([1, 0, 1, 0.]))
    assert report["auc"] == .75 and report["trusted"] and report["nodes"] == 4
    assert report["brier"] == pytest.approx((.01 + .7225 + .4225 + .01) / 4)
    assert report["constant"] == .25
    tenths = [(.1, 0, 1), (.35, 1, 1), (.85, 0, 1), (.9, 1, 1)]
    assert [pytest.approx(row) for row in tenths] == report["calibration"]
    report = measure(np.array([.31, .39, .95, 1]), np.array([0, 1, 1, 0.]))     # AUC .5
    assert [count for *_, count in report["calibration"]] == [2, 2] and not report["trusted"]


class Told:
    """A critic that says what it is told, and remembers who was asked about."""

    def __init__(self, said, trusted=(1, 1, 1)):
        self.said, self.trusted, self.asked = said, torch.tensor(trusted), []

    def read(self, nodes, sampler):
        """What was told of each node."""
        self.asked += nodes
        return np.array([self.said[node] for node in nodes])


def test_leaf_values_by_hand():
    """The docstring's numbers, heads without trust, a root, rollouts, and what is known already."""
    b = write(Tree("", 0, [9]).root, [0, 1])
    a, root = b.parent, b.tree.root
    said = {root: (.4, .1, .1), a: (.7, .9, .2), b: (.0, .8, .95)}

    def values(nodes, trusted=(1, 1, 1), **more):
        """leaf_values of a critic that says what it is told."""
        return leaf_values(nodes, Told(said, trusted), None, **more)
    assert values([a, b, root]) == [.7, .7, .4]
    assert values([a, b], combine="mean") == pytest.approx([.8, .875])
    assert values([a, b], (0, 1, 0)) == [.9, .8] and values([a, b, root], (0, 0, 0)) == [.5] * 3
    assert values([a, b], (0, 0, 1), combine="mean") == [.5, .95]
    fast = type("Fast", (), {"score": lambda self, nodes: {node: .3 for node in nodes}})()
    assert values([a, b], rollouts=fast) == [.3, .7]
    assert values([a, b], (0, 0, 0), rollouts=fast, combine="mean") == [.3, .5]
    told, known = Told(said), {a: said[a]}
    assert leaf_values([b], told, None, known=known) == [.7]
    assert told.asked == [b] and set(known) == {a, b}


class Length(Told):
    """A critic whose outcome is a number of the path alone."""

    def read(self, nodes, sampler):
        """Length of the solution modulo 7."""
        self.asked = nodes
        return np.array([[0, 0, len(node.solution()) % 7 / 7] for node in nodes]).reshape(-1, 3)


def test_rollouts():
    """Ends, log-probs, scores, counts, an untrusted head, a full store, no room."""
    big = language_model()
    nodes = [node for tree in grown(big) for node in tree.nodes[1:] if not node.ended]
    decode = big.tokenizer.decode_more
    small = language_model(5, 16, Tokenizer.bytes_only(("<a>", "<b>")))
    retell = lambda node: small.tokenizer.encode_more(decode(node.ids.tolist()))
    unused = Rollouts(small, Length({}), 3, 1, retell)      # no prefix is short enough
    assert unused.score(nodes) == {}
    fast = Rollouts(small, Length({}), 3, 40, retell)
    found = fast.score(nodes)
    ends = [end.solution().tolist() for end in fast.critic.asked]
    assert list(found) == nodes and len(ends) == 3 * len(nodes)
    for i, node in enumerate(nodes):
        prefix = [t for n in node.path()[1:] for t in retell(n)]
        mine = ends[3 * i:3 * i + 3]
        assert all(ids[:len(prefix)] == prefix for ids in mine)
        assert found[node] == pytest.approx(np.mean([len(ids) % 7 / 7 for ids in mine]))
    for node in fast.critic.asked[0], fast.twin[nodes[-1]]:
        ids = np.concatenate([step.ids for step in node.path()]).tolist()
        logps = small.model.all_logps(plain_forward(small, ids))
        want = [logps[i - 1, ids[i]].item() for i in range(len(node.tree.root.ids), len(ids))]
        assert node.solution("logps").tolist() == pytest.approx(want, abs=1e-4)
    counts = small.counts
    assert counts["encoded"] <= counts["prompt"] + counts["sampled"]
    assert fast.tokens == counts["sampled"] > 0
    fast.room = 0
    assert fast.score(nodes) == pytest.approx(found) and len(fast.twin) < 2 * len(nodes) + 3
    fast.max_tokens = 1
    assert fast.score(nodes) == {} and fast.score([]) == {}
    assert Rollouts(small, Told({}, (1, 1, 0)), 3, 40, retell).score(nodes) == {}


@pytest.mark.parametrize("order", (1, -1))
def test_the_cheaper_solution_pays_for_a_shared_prefix(order):
    """Two wrong solutions share a step, and the budget affords completions as long as the shorter
    one: the step is completed, whichever comes first."""
    tree, done = Tree(None, 0, [0]), []
    shared = tree.add(tree.root, [1], NOTHING, NOTHING)
    for length in (1, 9):
        record_grade(tree.add(shared, [2] * length, NOTHING, NOTHING, "eos"), False)

    def complete(wants):
        """Two wrong completions."""
        done.extend(wants)
        for _ in range(2):
            record_grade(tree.add(shared, [3], NOTHING, NOTHING, "eos"), False)
    label_pits(tree.ends()[::order], complete, 2, tokens_left([tree], 2))
    assert done == [(shared, 2)] and pit(tree.ends()[0]) is shared


def test_statistics():
    """AUC is the share of won pairs; Wilson, McNemar and Student's t by hand and from tables."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores, labels = rng.integers(0, 5, 12) / 4, rng.integers(0, 2, 12)
        pairs = [(s > t) + (s == t) / 2 for s, a in zip(scores, labels)
                 for t, b in zip(scores, labels) if a > b]
        assert auc(scores, labels) == (pytest.approx(np.mean(pairs)) if pairs else None)
    assert auc([.9, .4, .4, .1], [1, 1, 0, 0]) == .875 and auc([], []) is None
    assert wilson(8, 10) == pytest.approx((.4902, .9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, .1611), abs=1e-4)
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 2001))
    ours, theirs = [True] * 9 + [False] + [True] * 5, [False] * 9 + [True] + [True] * 5
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours) == pytest.approx(22 / 1024)
    assert mcnemar(ours, ours) == 1
    assert t_interval([1, 2, 3]) == pytest.approx((2, -.48417, 4.48417), abs=1e-3)
    assert t_interval([0, 1]) == pytest.approx((.5, .5 - 12.706 / 2, .5 + 12.706 / 2), abs=1e-3)
    mean, low, high = t_interval([0, 1] * 15)
    assert high - mean == pytest.approx(2.0452 * .50855 / 30 ** .5, abs=1e-4)
    assert t_interval([5]) == (5, -math.inf, math.inf)
    with pytest.raises(ValueError):
        t_interval([])
