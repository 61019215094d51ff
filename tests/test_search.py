"""The search against thirty lines of recursion, on random games, with answers in any order.
Returns are multiples of 1/8, so sums are exact and "equal" means equal."""
import math
import random
from functools import partial

import pytest

from mcts import (NOTHING, RULES, Tree, best_path, commit_every, fixed_width, from_json,
                  importance_width, search, to_json, tokens_left, until)
from test_mcts import assert_sound

class Game:
    """A random game. A position is its path of moves; all else follows from path and seed."""

    def __init__(self, seed, depth=5):
        self.seed, self.depth = seed, depth

    def moves(self, path, count):
        """`count` sampled moves, exact duplicates among them: [(ids, log-probs, end)]."""
        rng, kinds = random.Random(repr((self.seed, path))), []
        for _ in range(rng.randint(1, 4)):
            ids = tuple(rng.randrange(9) for _ in range(rng.randint(1, 3)))
            end = len(path) + 1 >= self.depth or rng.random() < 0.2
            logps = [-rng.randrange(1, 9) / 8 for _ in ids]
            kinds.append((ids, logps, "answer" if end else ""))
        return [rng.choice(kinds) for _ in range(count)]

    def value(self, path):
        """In -1, -7/8 ... 1."""
        return random.Random(repr((self.seed, "value", path))).randint(-8, 8) / 8

class Scrambled:
    """Answers some of the nodes that wait, in any order, later, as rows of a sampler do."""

    def __init__(self, seed):
        self.rng, self.pending = random.Random(seed), {}

    def ask(self, node, k):
        """The next k moves."""
        assert k > 0 and node not in self.pending and not node.ended
        first, node.asked = node.asked, node.asked + k
        self.pending[node] = node.tree.question.moves(moves_to(node), node.asked)[first:]

    def answers(self):
        """At least one node, if one waits."""
        waiting = list(self.pending)
        now = self.rng.sample(waiting, self.rng.randint(bool(waiting), len(waiting)))
        for node in now:
            for ids, logps, end in self.pending.pop(node):
                node.tree.tokens += len(ids)
                node.tree.add(node, ids, logps, NOTHING, end)
        return now

def moves_to(node):
    """The position of a node."""
    return tuple(tuple(step.ids.tolist()) for step in node.path()[1:])

def evaluate(nodes):
    """Values of their games. No node is asked about twice."""
    assert len({*nodes}) == len(nodes) and all(node.score is None for node in nodes)
    return [node.tree.question.value(moves_to(node)) for node in nodes]

def play(games, go_on, seed=0, **how):
    """Search one tree for each game."""
    trees = [Tree(game, i, [0]) for i, game in enumerate(games)]
    search(trees, Scrambled(seed), evaluate, go_on, **how)
    return trees

def assert_backed_up(tree, to_end):
    """Visits are conserved, Q is the mean of returns and lies between them, ends do not expand."""
    sums, scores = {}, [node.score for node in tree.nodes if node.score is not None]
    for node in reversed(tree.nodes):
        own = node.visits - sum(child.visits for child in node.children)
        assert not (node.ended and node.children)
        if not node.ended:                # evaluated at birth: one visit of its own
            assert own == (0 if to_end or node is tree.root or not node.visits else 1)
        below, score = [sums[child] for child in node.children], node.score or 0.0
        sums[node] = (own * score + sum(s for s, _ in below),
                      own * score ** 2 + sum(squares for _, squares in below))
        assert (node.value_sum, node.value_squares) == sums[node]
        assert not node.visits or min(scores) <= node.q <= max(scores)

def reference(game, simulations, to_end, score, commit):
    """The search written again: one game, recursion, a dictionary a node. (nodes, path)"""
    new = lambda path, P, end: dict(path=path, P=P, end=end, N=0, W=0.0, kids={}, count=0)
    node = new((), 1.0, "")
    nodes, above, path = [node], [], [()]

    def simulate(s):
        if s["end"] or (not to_end and s["N"] == 0 and s["path"]):
            value = game.value(s["path"])
        else:
            if not s["kids"]:
                for ids, logps, end in game.moves(s["path"], 3 if s["path"] else 5):
                    kid = new(s["path"] + (ids,), math.exp(sum(logps) / len(ids) ** 1.25), end)
                    s["kids"].setdefault((ids, end), kid)["count"] += 1
                nodes.extend(s["kids"].values())
            mean = s["W"] / max(1, s["N"])
            value = simulate(max(s["kids"].values(), key=lambda k: score(
                k["W"] / k["N"] if k["N"] else mean, k["P"], s["N"], k["N"])))
        s["N"], s["W"] = s["N"] + 1, s["W"] + value
        return value
    while True:
        for _ in range(simulations):
            value = simulate(node)
            for x in above:
                x["N"], x["W"] = x["N"] + 1, x["W"] + value
        while any(k["N"] for k in node["kids"].values()):
            above.append(node)
            node = max(node["kids"].values(), key=lambda k: (k["N"], k["W"] / max(k["N"], 1)))
            path.append(node["path"])
            if commit and not node["end"]:
                break
        if node["end"] or not commit:
            return nodes, path

SCORES = dict(
    puct=lambda c: lambda q, p, above, n: q + c * p * math.sqrt(max(above, 1)) / (1 + n),
    uct=lambda c: lambda q, p, above, n: (
        q + c * math.sqrt(2 * math.log(max(above, 1)) / n) if n else math.inf))

@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("to_end", (False, True))
@pytest.mark.parametrize("commit", (False, True))
def test_equals_the_recursive_reference(name, to_end, commit):
    """Every N, W, P, count and the path of 120 searches of random games are the recursion's."""
    for c, simulations in ((0.0, 1), (0.0, 13), (0.5, 4), (0.5, 13), (2.0, 4), (2.0, 13)):
        games = [Game(seed, depth=2 + seed % 5) for seed in range(int(c), 60, 3)]
        go_on = commit_every(simulations) if commit else until(simulations)
        trees = play(games, go_on, simulations, choose=partial(RULES[name], c=c),
                     width=fixed_width(5, 3, every=10 ** 9), to_end=to_end)
        for game, tree in zip(games, trees):
            assert_sound(tree)
            assert_backed_up(tree, to_end)
            nodes, path = reference(game, simulations, to_end, SCORES[name](c), commit)
            same = {(x["path"], x["end"]): x for x in nodes}
            assert len(tree.nodes) == len(nodes) == len(same)
            for node in tree.nodes:
                x = same[moves_to(node), node.ended]
                assert node.visits == x["N"] and node.value_sum == x["W"]
                assert node is tree.root or node.count == x["count"]
                assert node is tree.root or abs(node.prior - x["P"]) < 1e-6
            assert [moves_to(node) for node in best_path(tree)] == path
            assert not commit or moves_to(tree.search_from) == path[-1]

def test_batch_equals_alone():
    """A game among 30, answered in any order, is the game alone; so it is across a file."""
    games = [Game(seed) for seed in range(30)]
    for make in (lambda: commit_every(9), lambda: until(9), lambda: until(50, tokens=40)):
        trees = play(games, make(), seed=4, width=importance_width, to_end=False)
        for i in (0, 7, 29):
            alone, = play(games[i:i + 1], make(), width=importance_width, to_end=False)
            assert to_json(alone)["nodes"] == to_json(trees[i])["nodes"]
            assert_backed_up(alone, to_end=False)
    trees = [from_json(to_json(tree), tree.question) for tree in play(games, until(9))]
    search(trees, Scrambled(1), evaluate, until(25))
    assert [to_json(tree) for tree in trees] == [to_json(t) for t in play(games, until(25))]

def test_budget_and_patience():
    """The next simulation may cost twice the mean, the second as much as the first; patience counts
    those without a new sample."""
    for tokens, spent, visits, more in ((30, 24, 3, False), (30, 18, 3, True), (30, 19, 3, False),
                                        (30, 15, 1, True), (30, 16, 1, False), (30, 16, 2, False),
                                        (1, 0, 0, True), (0, 0, 0, False), (30, 0, 50, False)):
        tree, go_on = Tree(None, 0, [0]), until(50, tokens)
        tree.tokens = 7                         # those sampled before do not count
        assert go_on(tree) == (tokens > 0)
        tree.tokens, tree.root.visits = 7 + spent, visits
        assert go_on(tree) == more
    left = tokens_left([tree], 10)
    assert left() == 10
    tree.tokens += 10
    assert left() == 0
    patient, = play([Game(1, depth=1)], until(20, patience=4), width=fixed_width(5, 3, 10 ** 9))
    assert patient.root.visits == 5

def test_docstring_examples():
    """The four simulations of `search` as written; the telescoping Q of `backup`, on ten games."""
    moves = {(): [((0,), (math.log(.6),), ""), ((1,), (math.log(.4),), "")]}
    game = Game(0)
    game.moves = lambda path, count: moves.get(path, [((len(path) + 1,), (-1.0,), "")])
    game.value = lambda path: 0.0 if path in (((1,),), ((0,), (2,))) else 1.0
    tree, trace = Tree(game, 0, [9]), []
    for n in range(1, 5):
        search([tree], Scrambled(0), evaluate, until(n), to_end=False, width=fixed_width(1, 1))
        trace.append([(node.visits, node.value_sum) for node in tree.nodes])
    assert trace[:2] == [[(1, 1), (1, 1), (0, 0)], [(2, 1), (1, 1), (1, 0)]]
    assert trace[2:] == [[(3, 1), (2, 1), (1, 0), (1, 0)], [(4, 2), (3, 2), (1, 0), (2, 1), (1, 1)]]
    state = lambda node: node.score if node.ended else math.sin(node.index)

    def value(node):
        """MCTS-DPO's V(s): the visit-weighted mean of Q(s, a) = R(s') - R(s) + V(s')."""
        below = [kid for kid in node.children if kid.visits]
        total = sum(kid.visits * (state(kid) - state(node) + value(kid)) for kid in below)
        return total / max(1, sum(kid.visits for kid in below))
    for node in [n for tree in play([Game(s) for s in range(10)], until(30)) for n in tree.nodes]:
        assert not node.visits or abs(value(node) + state(node) - node.q) < 1e-9

def test_known_values():
    """27 ends, one or two win: 400 simulations find one, and leave a lost first move alone."""
    for seed in range(6):
        game, lost, rng = Game(seed), seed % 3, random.Random(seed)
        start = ((lost + 1 + seed % 2) % 3,)
        wins = {(start, (rng.randrange(3),), (rng.randrange(3),)) for _ in range(2)}
        game.value = lambda path, wins=wins: 1.0 if path in wins else -1.0
        game.moves = lambda path, count: [
            ((i,), (math.log(1 / 3),), "answer" if len(path) == 2 else "") for i in range(3)]
        tree, = play([game], until(400), width=fixed_width(3, 3, 10 ** 9))
        assert moves_to(best_path(tree)[-1]) in wins and tree.root.q > 0.5
        assert tree.root.children[lost].visits < 40

def test_widths():
    """With `every`, a node draws again at every so many visits."""
    for every in (8, 10 ** 9):
        games = [Game(seed, depth=3) for seed in range(10)]
        for tree in play(games, until(60), width=fixed_width(4, 2, every)):
            assert_backed_up(tree, to_end=True)
            for node in [node for node in tree.nodes if node.children]:
                waves = 1 + (node.visits - 1) // every
                drawn = (2 if node.parent else 4) * waves
                assert node.asked == sum(child.count for child in node.children) == drawn

@pytest.mark.parametrize("width", (importance_width, fixed_width(1, 1)))
def test_half_solutions_of_a_grown_tree(width):
    """A tree that samples grew has children without visits. A simulation ends there, too."""
    tree, depths = Tree(None, 0, [0]), []
    for first in (1, 2):
        node = tree.root
        for token in (first, 3, 4):
            node.asked += 1
            node = tree.add(node, [token], [-1.0], NOTHING, "answer" * (token == 4))
    tree.root.asked = 40
    look = lambda nodes: [depths.append(len(node.path()) - 1) or 0.5 for node in nodes]
    search([tree], Scrambled(0), look, until(4), RULES["uct"], width, to_end=False)
    assert depths == [1, 1, 2, 2]

def test_importance_width():
    """The docstring's example. n lies in 1..10, at the root in 5..11; times 1 + visits // 8."""
    tree, width = Tree(None, 0, [0]), importance_width
    node = tree.add(tree.root, [1], [-1.0], NOTHING)
    node.score, node.visits = 0.5, 1
    for i, score in enumerate((0.9, 0.4)):
        child = tree.add(node, [i], [-1.0], NOTHING)
        assert width(node) == node.asked                # not tried yet
        child.score, child.visits, node.asked = score, 1, i + 1
    for node.asked, n in ((2, 3), (99, 5)):             # one more; at most n = 5, as I = .4
        assert width(node) == n
    tree.root.asked = 999
    for mine, theirs, visits, n in ((0.3, 0.5, 7, 5), (0.3, 0.5, 15, 10), (0, 1, 7, 11),
                                    (-9, 0.5, 16, 33)):
        tree.root.score, node.score, tree.root.visits = mine, theirs, visits
        assert width(tree.root) == n
    for mine, visits, n in ((0.4, 7, 6), (9.0, 7, 10), (9.0, 8, 20)):
        node.score, node.visits = mine, visits
        assert width(node) == n

def test_rules_by_hand():
    """The constants: c = 1 for PUCT, .1 for UCT."""
    tree = Tree(None, 0, [9])
    child = tree.add(tree.root, [1], [-0.5], NOTHING)
    tree.root.visits, child.visits, child.value_sum = 100, 4, 2.0
    puct, uct = RULES["puct"](tree.root, child), RULES["uct"](tree.root, child)
    assert puct == pytest.approx(0.5 + math.exp(-0.5) * 10 / 5)
    assert uct == pytest.approx(0.5 + 0.1 * math.sqrt(2 * math.log(100) / 4))
