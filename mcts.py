"""Trees of solutions: everything this project does is growing them, labelling them, or training on them.

The textbook idea. A language model writes a solution step by step (a step = one line). Sampling n solutions of
a question gives a tree: the question is the root, equal first lines are one child, and so on down to the answer.
Looking for the first wrong step is growing more branches beside a wrong path; a preference pair is two branches
of one node. So there is one tree type, one call that grows it and one that lays it in a row for training.

    question --root--+- 1*4=4 : 17+4-2 - 17+4=21 : 21-2 - 21-2=19 : 19 - #### 19    right, sampled 5 times
                     `- 17+1=18 : 18*4-2 - ...                         - #### 70    wrong

What is different here from the published systems
  1. A node holds token ids, never text that is encoded again: joint and piecewise encoding differ.
  2. Equal steps below one node are one node with a count, not siblings.
  3. Growing never encodes a token twice: the sampler keeps the keys and values of every node (model.py).
  4. Search runs on all trees at once; none waits for another, and one mean backup serves all methods.
  5. A whole pruned tree is trained on as one row (`pack`), not as a chosen and a rejected row per pair.

Chapters: 1 Forest   2 Growing   3 Search   4 Packing   5 Drawing   6 Program
Try:  python mcts.py                                          (searches a toy game and draws the tree; 2 seconds)
      python mcts.py --show RUN/trees_01.jsonl --question 3 --html tree.html      (any saved tree)
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from model import BadInput, Continuation, GPTConfig, Request, Sampler, Tokenizer
from model import about, mix, need, read_json, write_text

# ----------------------------------------------------------------------------------------------------------
# 1 · Forest: B trees x N nodes, a struct of arrays
# ----------------------------------------------------------------------------------------------------------
ENDS = ("", "eos", "answer", "length")        # why a node is a leaf; "" = it may go on
SEARCHED = dict(prior=(np.float64, 0.0), visits=(np.int32, 0), value_sum=(np.float64, 0.0),
                score=(np.float64, np.nan))


class Forest:
    """B trees with room for N nodes each; node 0 of a tree is its root, the question's prompt.

    Arrays, all (B, N); a node's number is the order of its birth:
      parent   index of the parent, -1 for roots and unused places
      depth    steps below the root
      count    sampled continuations that went through the node (equal steps are one node: this is their count)
      terminal the solution ended here
      end      index into ENDS: why it ended
      right    of a terminal: 1 right, 0 wrong; -1 not graded (or no terminal)
      drawn    continuations asked for at this node so far: numbers the samples, hence their seeds
    and, when the tree was searched:
      prior    P of the step, not normalised over siblings
      visits   N: simulations that went through the node
      value_sum  sum of their returns, float64; Q = value_sum / visits
      score    the evaluator's value of this node alone; NaN: never asked
    Ragged things are lists: ids[b][n], logps[b][n], slots[b][n], each (tokens of the step,); slots are the
    sampler's addresses (model.Sampler) and die with its store; logps of a root are empty."""

    def __init__(self, trees: int, nodes: int = 64):
        self.arrays = dict(parent=(np.int32, -1), depth=(np.int32, 0), count=(np.int32, 0), terminal=(bool, False),
                           end=(np.int8, 0), right=(np.int8, -1), drawn=(np.int32, 0)) | SEARCHED
        for name, (kind, empty) in self.arrays.items():
            setattr(self, name, np.full((trees, max(1, nodes)), empty, kind))
        self.size = np.zeros(trees, np.int64)                           # nodes in use, per tree
        self.ids, self.logps, self.slots = ([[] for _ in range(trees)] for _ in range(3))
        self.children = [[] for _ in range(trees)]                      # children[b][n]: list, in order of birth
        self.known = [{} for _ in range(trees)]                         # (parent, ids of the step, end) -> node

    def __len__(self) -> int:
        return len(self.size)

    def add(self, b: int, parent: int, ids, logps=(), slots=(), end: str = "") -> int:
        """The child of `parent` with these ids: a new node, or the one that is there already. A line cut by the
        length limit stays apart from the same ids going on."""
        key = (parent, tuple(map(int, ids)), end)
        n = self.known[b].get(key)
        if n is None:
            n = self.known[b][key] = int(self.size[b])
            if n == self.parent.shape[1]:                               # full: twice the room
                for name, (_, empty) in self.arrays.items():
                    old = getattr(self, name)
                    setattr(self, name, np.concatenate((old, np.full_like(old, empty)), 1))
            self.size[b] += 1
            self.parent[b, n], self.depth[b, n] = parent, 0 if parent < 0 else self.depth[b, parent] + 1
            self.terminal[b, n], self.end[b, n] = end != "", ENDS.index(end)
            self.ids[b].append(np.asarray(ids, np.int64))
            self.logps[b].append(np.asarray(logps, np.float32))
            self.slots[b].append(np.asarray(slots, np.int64))
            self.children[b].append([])
            if parent >= 0:
                self.children[b][parent].append(n)
        self.count[b, n] += 1
        return n

    def path(self, b: int, n: int) -> list:
        """Nodes from the root to n, both included."""
        nodes = []
        while n >= 0:
            nodes.append(int(n))
            n = self.parent[b, n]
        return nodes[::-1]

    def path_of(self, b: int, n: int, what: str, root: bool = True) -> np.ndarray:
        """ids, logps or slots along the path to n, in one array; root=False leaves the question out."""
        nodes = self.path(b, n)[0 if root else 1:]
        return np.concatenate([getattr(self, what)[b][m] for m in nodes] or [np.zeros(0)])

    def text(self, b: int, n: int, tokenizer: Tokenizer, stop_ids=()) -> str:
        """Text of the solution down to n, without question and end-of-text."""
        return tokenizer.decode_more([int(i) for i in self.path_of(b, n, "ids", root=False) if i not in stop_ids])

    def leaves(self, b: int) -> list:
        """Terminal nodes, in order of birth."""
        return np.flatnonzero(self.terminal[b, :self.size[b]]).tolist()

    def below(self, b: int, right: int = 1) -> np.ndarray:
        """(nodes,) sampled continuations below each node (itself included) that ended right (or wrong, 0).
        Children are born after their parents, so one sweep backwards sums up."""
        N = self.size[b]
        count = np.where(self.right[b, :N] == right, self.count[b, :N], 0)
        for n in range(N - 1, 0, -1):
            count[self.parent[b, n]] += count[n]
        return count

    def to_json(self, b: int) -> dict:
        """One tree as plain lists; `from_json` reads it back (without slots: the sampler's store is gone). What only
        a search fills in is left out when there was none; a score that was never asked for is null."""
        N = self.size[b]
        out = {name: getattr(self, name)[b, :N].astype(int).tolist() for name in self.arrays if name not in SEARCHED}
        if self.visits[b, :N].any():
            out |= {name: [x if x == x else None for x in getattr(self, name)[b, :N].tolist()] for name in SEARCHED}
        return out | {"ids": [i.tolist() for i in self.ids[b]],
                      "logps": [[round(float(x), 6) for x in l] for l in self.logps[b]]}

    @classmethod
    def from_json(cls, trees: list) -> "Forest":
        """Trees written by `to_json`. Raises BadInput when a tree is not of that form."""
        b = 0
        try:
            if not isinstance(trees, list):
                raise TypeError("no list of trees")
            forest = cls(len(trees))
            for b, t in enumerate(trees):
                N, names = len(t["parent"]), [n for n in forest.arrays if "visits" in t or n not in SEARCHED]
                if any(len(t[name]) != N for name in (*names, "ids", "logps")):
                    raise ValueError("its lists differ in length")
                for n, (parent, end) in enumerate(zip(t["parent"], t["end"])):
                    if (parent not in range(n) or forest.terminal[b, parent] if n else parent != -1) or end < 0 \
                            or forest.add(b, parent, t["ids"][n], t["logps"][n], end=ENDS[end]) != n:
                        raise ValueError("nodes are out of order")
                for name in {*names} & {"count", "right", "drawn", *SEARCHED}:
                    getattr(forest, name)[b, :N] = [np.nan if x is None and name == "score" else x for x in t[name]]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"Tree {b} of the file is damaged ({error!s:.80}); delete the file, it is made again.") \
                from error
        return forest


# ----------------------------------------------------------------------------------------------------------
# 2 · Growing: the sampler on chosen nodes
# ----------------------------------------------------------------------------------------------------------
def plant(forest: Forest, b: int, sampler: Sampler, prompt_ids) -> None:
    """Give tree b its root."""
    forest.add(b, -1, prompt_ids, slots=sampler.prompt(prompt_ids))


def grow(forest: Forest, sampler: Sampler, wants: list, seeds: list, max_tokens: int, temperature: float = 1.0,
         progress=None) -> list:
    """Sample whole continuations at many nodes of many trees at once and hang them into the trees.

    wants: [(tree, node, how many)]; seeds: one number per tree (run and question), mixed with node and sample.
    max_tokens bounds the whole solution, question not counted. Returns the leaves, a list per want, in sample
    order (not in order of finishing, so that a tree does not depend on who else is in the batch)."""
    requests = [r for b, n, count in wants for r in _requests(forest, b, n, count, seeds[b], max_tokens,
                                                                          sampler.newline)]
    done = iter(sampler.extend(requests, temperature, progress=progress))
    return [[_hang(forest, b, n, next(done), sampler.step_over) for _ in range(count)] for b, n, count in wants]


def _requests(forest, b, n, count, seed, max_tokens, newline, greedy=False):
    """`count` requests to go on from a node, numbered on from what was drawn there before."""
    path, first = forest.path_of(b, n, "slots"), int(forest.drawn[b, n])
    solution = forest.path_of(b, n, "ids", root=False).tolist()
    begun = max((i + 1 for i, token in enumerate(solution) if token in newline), default=0)
    line = tuple(solution[begun:])                                      # a step need not end with its line
    left = max(1, max_tokens - (len(path) - len(forest.slots[b][0])))
    forest.drawn[b, n] += count
    return [Request(path, mix(seed, n, i), left, greedy and i == 0, line) for i in range(first, first + count)]


def split_steps(ids, over) -> list:
    """[(first, past the last)] of each step; over(ids of a step so far) says that it ends there (model.step_rule)."""
    ids, first, spans = [int(i) for i in ids], 0, []
    for i in range(1, len(ids) + 1):
        if i == len(ids) or over(ids[first:i]):
            spans.append((first, i))
            first = i
    return spans


def _hang(forest, b, n, new, over):
    spans = split_steps(new.ids, over)
    for i, (first, last) in enumerate(spans):
        end = new.why if i == len(spans) - 1 and new.why != "step" else ""
        n = forest.add(b, n, new.ids[first:last], new.logps[first:last], new.slots[first:last], end)
    return n


# ----------------------------------------------------------------------------------------------------------
# 3 · Search: Monte-Carlo tree search over many trees at once
#     R trees at work (at most one simulation each), W candidates of the widest of their nodes
# ----------------------------------------------------------------------------------------------------------
# A simulation goes down from the root by `select`, expands or evaluates one node, and adds the return to the visits
# and value sums on its way back. MCTS-DPO writes rewards as differences of state scores, r = R(s') - R(s), and
# Q = r + V(s'): along a path they telescope, so Q(s, a) + R(s) is the plain mean of the scores at the ends of the
# simulations that went through a. Siblings share R(s). Hence one mean backup serves every method here.
# Left out: virtual loss (we batch across trees, one simulation a tree at a time), discounting (gamma = 1).
# HACK HERE: where to search next
def puct(q, prior, above, visits, c):
    """Q + c P sqrt(N(s)) / (1 + N(s, a))  (AlphaZero; MCTS-DPO 2405.00451 eq. 1): (R, W) scores; above (R, 1) is
    N(s). note: a parent nobody visited yet counts as one, so that the very first choice goes by P."""
    return q + c * prior * np.sqrt(np.maximum(above, 1)) / (1 + visits)


def uct(q, prior, above, visits, c):
    """Q + c sqrt(2 ln N(s) / N(s, a))  (AlphaLLM 2404.12253 eq. 2), without P; an unvisited child comes first."""
    bonus = c * np.sqrt(2 * np.log(np.maximum(above, 1)) / np.maximum(visits, 1))
    return np.where(visits > 0, q + bonus, np.inf)


def length_prior(forest: Forest, b: int, kids: list) -> list:
    """P of each child by its tokens: exp(sum log p / len^1.25). The paper's p / len^lambda vanishes for any step of
    some length. Not normalised over siblings."""
    return [math.exp(float(forest.logps[b][n].sum()) / len(forest.ids[b][n]) ** 1.25) for n in kids]


def count_prior(forest: Forest, b: int, kids: list) -> list:
    """P of each child as its share of the samples drawn below the parent."""
    counts = forest.count[b, kids]
    return (counts / counts.sum()).tolist()


def fixed_width(root: int, below: int, every: int = 0):
    """How many steps a node should have drawn by now: MCTS-DPO's b1 = 5 at the root, b2 = 3 below. every > 0: as many
    again after each so many visits (progressive widening). Without it a sure-footed policy's tree is soon exhausted:
    simulations go round and round in ends that are known already, and the token budget is not spent."""
    return lambda forest, b, n: (below if n else root) * (1 + (int(forest.visits[b, n]) // every if every else 0))


def importance_width(root: tuple, below: tuple, alpha: float, every: int = 0):
    """AlphaLLM's adaptive width (2404.12253 eq. 3), one new step a simulation: n(s) = max(c_min, min(floor(alpha I) +
    1, c_max)), I = max |v(child) - v(s)| over the evaluated children; (c_min, c_max) at the root and below it. With
    alpha 1 and values in [0, 1] nothing ever widens: alpha about c_max - 1 uses the whole range. An equal step drawn
    again counts as drawn, so a sure-footed policy is asked c_max times at most, and as often again after each
    `every` visits (0: never)."""
    def width(forest, b, n):
        """Steps node n should have drawn by now."""
        kids, drawn, (least, most) = forest.children[b][n], int(forest.drawn[b, n]), below if n else root
        if any(not forest.visits[b, k] for k in kids):                  # the last new one was not tried yet
            return drawn
        known, here = forest.score[b, n], forest.value_sum[b, n] / max(1, forest.visits[b, n])
        here = known if known == known else here                        # a root is never evaluated: its mean return
        scores = [abs(forest.score[b, k] - here) for k in kids]
        importance = max((x for x in scores if x == x), default=0.0)    # x == x: not NaN
        again = 1 + (int(forest.visits[b, n]) // every if every else 0)
        return min(drawn + 1, again * max(least, min(int(alpha * importance) + 1, most)))
    return width


def select(forest: Forest, trees, nodes, score, c: float):
    """The child to go to from each node: (R,) trees, (R,) nodes with children -> (R,). An unvisited child shows its
    parent's mean (0 while the parent has none); ties go to the lowest index.

        N(s) = 3, V(s) = .5; children: Q .75 N 2 P .4 | Q 0 N 1 P .4 | unvisited P .2; puct, c = 1
        .75 + .4 sqrt(3) / 3 = .98    0 + .4 sqrt(3) / 2 = .35    .5 + .2 sqrt(3) = .85     -> the first"""
    width = max(len(forest.children[b][n]) for b, n in zip(trees, nodes))
    kids = np.array([forest.children[b][n] + [-1] * (width - len(forest.children[b][n]))
                     for b, n in zip(trees, nodes)])                    # (R, W), -1: no candidate
    t = trees[:, None]
    visits, above = forest.visits[t, kids], forest.visits[trees, nodes][:, None]
    mean = forest.value_sum[trees, nodes][:, None] / np.maximum(above, 1)
    q = np.where(visits > 0, forest.value_sum[t, kids] / np.maximum(visits, 1), mean)
    scores = np.where(kids >= 0, score(q, forest.prior[t, kids], above, visits, c), -np.inf)     # (R, W)
    return kids[np.arange(len(kids)), scores.argmax(1)]


def descend(forest: Forest, trees, nodes, score, c: float, width):
    """Follow `select` to an end, or to a node that has drawn fewer steps than its width. (R,) -> (R,)."""
    nodes = nodes.copy()
    inner = lambda: np.array([bool(forest.children[b][n]) and forest.drawn[b, n] >= width(forest, b, n)
                              for b, n in zip(trees, nodes)])
    while (go := inner()).any():
        nodes[go] = select(forest, trees[go], nodes[go], score, c)
    return nodes


def expand(forest: Forest, b: int, n: int, candidates: list, prior, same=None) -> None:
    """Hang sampled steps (model.Continuation) below a node, in sample order; equal ones become one child with a
    count, and so do those to which same(ids) gives the same key, if they end alike (AlphaLLM's state merge). Raises
    ValueError when there are none: the tree could never go on."""
    if not candidates:
        raise ValueError(f"tree {b}, node {n}: the proposer gave no candidate for a node that is no end")
    for found in candidates:
        end, key = "" if found.why == "step" else found.why, same(found.ids) if same else None
        twins = [k for k in forest.children[b][n] if key and ENDS[forest.end[b, k]] == end and
                 same(forest.ids[b][k]) == key]
        if twins:
            forest.count[b, twins[0]] += 1
        else:
            forest.add(b, n, found.ids, found.logps, found.slots, end)
    forest.prior[b, forest.children[b][n]] = prior(forest, b, forest.children[b][n])


def backup(forest: Forest, trees, nodes, values) -> None:
    """Add one return to every node from `nodes` up to the root: N += 1, sum += value (float64). (R,) each, no
    tree twice. Paths go to the first root also after a commitment, so visits are conserved everywhere."""
    while len(trees):
        forest.visits[trees, nodes] += 1
        forest.value_sum[trees, nodes] += values
        nodes = forest.parent[trees, nodes]
        up = nodes >= 0
        trees, nodes, values = trees[up], nodes[up], values[up]


def best_child(forest: Forest, b: int, n: int) -> int | None:
    """The child to commit to: most visits, then highest Q, then lowest index; None when none was visited."""
    kids = [k for k in forest.children[b][n] if forest.visits[b, k]]
    return min(kids, key=lambda k: (-forest.visits[b, k], -forest.value_sum[b, k] / forest.visits[b, k], k),
               default=None)


def search(forest: Forest, proposer, evaluate, simulations: int, select=puct, c: float = 1.0,
           width=fixed_width(5, 3), to_terminal: bool = False, prior=length_prior, commit: bool = False,
           budget: float = math.inf, same=None, patience: int = 0, enough=None) -> list:
    """Search all trees of the forest together; returns the path each commits to, a list of nodes from the root.

    proposer: `submit([(tree, node, how many)])` asks for steps below nodes, `poll()` waits for some and returns the
    finished [(tree, node, [Continuation])] (`Steps` asks a model, `Direct` a plain function). evaluate(forest,
    [(tree, node)]) -> returns, asked once per node. A simulation ends at a terminal, or (to_terminal False) at a node
    it visits for the first time; to_terminal True expands on and on: growing the tree is the simulation (MCTS-DPO).
    commit: after `simulations` at the root its best child becomes the root and keeps its subtree, until a terminal
    (AlphaZero style); else all are done from the first root. width(forest, tree, node): steps a node should have drawn
    by now; a simulation that comes by asks for what is missing. budget: sampled tokens of a tree; no simulation begins
    that would, at twice the mean cost so far, exceed it. same: see `expand`.
    patience: with so many simulations in a row that sampled nothing the tree is exhausted, and done; 0: never.
    enough(tree), asked after each simulation: True when the tree is done for any other reason. A tree never waits for
    another, and without `enough` its result does not depend on the others.

    Four simulations by hand, evaluated at birth, c = 1; root r, children a (P .6) and b (P .4):
        1  r expanded; a (P): returns 1           N r1 a1      Q r 1    a 1
        2  a 1 + .6/2 = 1.3, b 1 + .4 = 1.4: b returns 0            N r2 a1 b1   Q r .5   a 1    b 0
        3  a 1 + .6 * 1.41/2 = 1.42, b 0 + .28: a expanded, its child d returns 0    N r3 a2 d1   Q r .33 a .5
        4  a .5 + .6 * 1.73/3 = .85, b 0 + .35: a, then d (its only child), visited before: expanded, ..."""
    roots, paths = np.zeros(len(forest), np.int64), [[0] for _ in range(len(forest))]
    done, spent, idle, ready, asked = *([0] * len(forest) for _ in range(3)), {b: 0 for b in range(len(forest))}, 0

    def finished(b):
        """Count a simulation of tree b; commit when it is time. True: the tree is done."""
        done[b] += 1
        idle[b] += 1
        rich = spent[b] * (1 + 2 / forest.visits[b, 0]) <= budget       # costs vary: reserve twice the mean
        rich = rich and (not patience or idle[b] <= patience) and not (enough and enough(b))
        if done[b] < simulations and rich:
            return False
        while (kid := best_child(forest, b, roots[b])) is not None:
            paths[b].append(kid)
            roots[b], done[b] = kid, 0
            if commit and rich and not forest.terminal[b, kid]:
                return False
        return True

    while ready or asked:
        if not ready:                                   # 1) all wait for steps: let the proposer work
            for b, n, candidates in proposer.poll():
                expand(forest, b, n, candidates, prior, same)
                spent[b] += sum(len(found.ids) for found in candidates)
                ready[b], asked, idle[b] = n, asked - 1, 0
        trees, nodes = np.array([*ready]), np.array([*ready.values()])
        nodes = descend(forest, trees, nodes, select, c, width)         # 2) go down
        fresh = (nodes > 0) & (forest.visits[trees, nodes] == 0)
        ends = forest.terminal[trees, nodes] | (fresh & (not to_terminal))
        wants = [(b, n, width(forest, b, n) - int(forest.drawn[b, n]))
                 for b, n in zip(trees[~ends].tolist(), nodes[~ends].tolist())]
        proposer.submit(wants)                                          # 3) ask for steps, or
        asked, trees, nodes = asked + len(wants), trees[ends], nodes[ends]
        new = [(b, n) for b, n in zip(trees.tolist(), nodes.tolist()) if np.isnan(forest.score[b, n])]
        for (b, n), value in zip(new, evaluate(forest, new) if new else []):
            forest.score[b, n] = value
        backup(forest, trees, nodes, forest.score[trees, nodes])        # 4) evaluate and back up
        ready = {b: int(roots[b]) for b in trees.tolist() if not finished(b)}
    return paths


class Direct:
    """A proposer made of a plain function propose(forest, tree, node, how many) -> [Continuation]."""

    def __init__(self, forest: Forest, propose):
        self.forest, self.propose, self.asked = forest, propose, []

    def submit(self, wants: list) -> None:
        """Take note of [(tree, node, how many)]."""
        self.asked += wants
        for b, n, count in wants:
            self.forest.drawn[b, n] += count

    def poll(self) -> list:
        """Answer all that was asked."""
        asked, self.asked = self.asked, []
        return [(b, n, self.propose(self.forest, b, n, count)) for b, n, count in asked]


class Steps:
    """A proposer that samples single steps with the model: expansions of all trees share the sampler's rows, and each
    is handed back as soon as its own rows are done. greedy: the first candidate of an expansion by argmax (a good
    habit of AlphaLLM's code). seeds, max_tokens, temperature: as for `grow`."""

    def __init__(self, forest: Forest, sampler: Sampler, seeds: list, max_tokens: int, temperature: float = 1.0,
                 greedy: bool = False, progress=None):
        self.forest, self.sampler, self.seeds, self.max_tokens = forest, sampler, seeds, max_tokens
        self.temperature, self.greedy, self.progress = temperature, greedy, progress
        self.owner, self.open = {}, {}                  # ticket -> (tree, node, place); (tree, node) -> candidates

    def submit(self, wants: list) -> None:
        """Queue the samples of [(tree, node, how many)]; nothing is computed yet."""
        for b, n, count in wants:
            requests = _requests(self.forest, b, n, count, self.seeds[b], self.max_tokens, self.sampler.newline,
                                 self.greedy)
            self.open[b, n] = [None] * count
            for i, ticket in enumerate(self.sampler.submit(requests, self.temperature, to_end=False)):
                self.owner[ticket] = (b, n, i)

    def poll(self) -> list:
        """Decode until at least one expansion has all its candidates; [] when nothing is queued."""
        ready = []
        while self.open and not ready:
            for ticket, found in self.sampler.step(self.progress).items():
                b, n, i = self.owner.pop(ticket)
                self.open[b, n][i] = found
                if all(self.open[b, n]):
                    ready.append((b, n, self.open.pop((b, n))))
        return ready


# ----------------------------------------------------------------------------------------------------------
# 4 · Packing: a pruned tree in one row
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Packed:
    """A tree (or a part of it) as one row of T tokens, parents before children:

        tree        q1 q2 +- a1 a2        row     q1 q2 a1 a2 b1
                          `- b1           position 0  1  2  3  2      depth in tokens, not the column
                                          before  -1  0  1  2  1      the token it is predicted from: b1's is q2

    A token sees its ancestors and itself (`sees`), so log-probs equal those of separate rows, while what
    branches share is computed once."""
    ids: np.ndarray               # (T,)
    position: np.ndarray          # (T,)
    before: np.ndarray            # (T,) column of the token that predicts this one; -1 for the very first
    node: np.ndarray              # (T,) which packed node a token belongs to
    sees: np.ndarray              # (n, n) bool: node i sees node j (ancestor or itself)
    place: dict                   # node of the forest -> packed node


def pack(forest: Forest, b: int, nodes) -> Packed:
    """Lay the subtree made of `nodes` and their ancestors in one row. Order of birth puts parents first."""
    keep = sorted({m for n in nodes for m in forest.path(b, n)})
    place = {n: i for i, n in enumerate(keep)}
    sees = np.eye(len(keep), dtype=bool)
    ids, position, before, last = [], [], [], []                        # last: column of each node's last token
    for i, n in enumerate(keep):
        up = place.get(int(forest.parent[b, n]), -1)
        if up >= 0:
            sees[i] |= sees[up]
        start, size = sum(map(len, ids)), len(forest.ids[b][n])
        depth = 0 if up < 0 else position[up][-1] + 1
        ids.append(forest.ids[b][n])
        position.append(np.arange(depth, depth + size))
        before.append(np.concatenate(([-1 if up < 0 else last[up]], np.arange(start, start + size - 1))))
        last.append(start + size - 1)
    sizes = [len(i) for i in ids]
    return Packed(np.concatenate(ids), np.concatenate(position), np.concatenate(before),
                  np.repeat(np.arange(len(keep)), sizes), sees, place)


# ----------------------------------------------------------------------------------------------------------
# 5 · Drawing: one tree in the terminal, or as a page for the browser
# ----------------------------------------------------------------------------------------------------------
def step_text(forest: Forest, b: int, n: int, tokenizer: Tokenizer, stop_ids=()) -> str:
    """The text of one node's step on one line."""
    step = tokenizer.decode_more([int(i) for i in forest.ids[b][n] if i not in stop_ids])
    return step.strip().replace("\n", " / ") or "(empty)"


def note(forest: Forest, b: int, n: int, right_below: int, pits=(), chosen=()) -> str:
    """What is said beside a step: samples, N, Q, P of the search, how it ended, pit, committed path."""
    said = [f"x{forest.count[b, n]}" if n else f"{forest.count[b, forest.children[b][0]].sum()} samples"]
    if forest.visits[b, n]:
        said[0] += f" N {forest.visits[b, n]} Q {forest.value_sum[b, n] / forest.visits[b, n]:+.2f}"
        said[0] += f" P {forest.prior[b, n]:.2f}" if n else ""
    if forest.terminal[b, n]:
        said += [s for s in [{1: "RIGHT", 0: "wrong", -1: ""}[int(forest.right[b, n])]] if s]
        said += ["(cut at the length limit)"] * (ENDS[forest.end[b, n]] == "length")
    elif right_below:
        said.append(f"{right_below} right below")
    said += ["<- chosen"] * (n in chosen)
    return "  ".join(said) + "   <== FIRST PIT: no branch from here was right" * (n in pits)


def printable(text: str) -> str:
    """A line for the terminal: a model may write anything, escape sequences that move the cursor included."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def draw(forest: Forest, b: int, tokenizer: Tokenizer, pits=(), stop_ids=(), width: int = 76, limit: int = 40,
         chosen=()) -> str:
    """The tree as text: one step a line with its `note`. Branches are ordered by simulations, then samples; at most
    about `limit` lines: whole paths to the chosen end, the pits, the most sampled leaves, then to other nodes."""
    right, lines, shown = forest.below(b), [], {0, *chosen}
    order = lambda n: (-forest.visits[b, n], -forest.count[b, n], n)
    ends = set(forest.leaves(b))
    for n in sorted(range(int(forest.size[b])), key=lambda n: (n not in pits, n not in ends, *order(n))):
        if len(shown) < limit:
            shown.update(forest.path(b, n))
    for p in pits:
        shown.update(forest.path(b, p))
    todo = [(0, "", "")]                                                # not recursive: a path may have 1,000 steps
    while todo:
        n, stem, joint = todo.pop()
        text = printable(stem + joint + step_text(forest, b, n, tokenizer, stop_ids))
        text = text[:width - 1] + "~" if len(text) > width else text
        lines.append(f"{text:<{width // 2}}  {note(forest, b, n, right[n], pits, chosen)}")
        kids = sorted((c for c in forest.children[b][n] if c in shown), key=order)
        stem += {"": "", "+- ": "|  ", "`- ": "   "}[joint]
        todo += [(c, stem, "`- " if c == kids[-1] else "+- ") for c in kids][::-1]
    hidden = int(forest.size[b]) - len(shown)
    return "\n".join(lines + [f"... and {hidden} more nodes"] * (hidden > 0))


PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
  :root { color-scheme: light dark } body { font: 14px/1.5 system-ui, sans-serif; margin: 2em }
  .step { font-family: ui-monospace, monospace; white-space: pre; padding: 0 .4em; border-radius: 4px }
  details, .end { margin-left: 1.6em; border-left: 1px solid #8884; padding-left: .3em }
  details.root { margin-left: 0; border: 0 } .end { padding-left: 1.4em } summary { cursor: pointer }
  small { color: #888; margin-left: .6em } .chosen > summary .step, .chosen > .step { font-weight: 700 }
  .mark { border: 1px solid #8888; border-radius: 4px; padding: 0 .3em; margin-left: .4em; font-size: 12px }
  .RIGHT { color: #06c } .wrong, .pit { color: #c50 } button { margin-right: .5em }
</style>
<h1>$title</h1>
<p><button onclick="fold(() => true)">unfold all</button>
<button onclick="fold(d => d.matches('.root'))">fold all</button>
<button onclick="fold(d => d.matches('.chosen'))">chosen path</button>
<span class="step" style="background: rgba(230, 110, 0, .6)">Q -1</span>
<span class="step" style="background: rgba(0, 110, 230, .6)">Q +1</span>
N simulations, Q mean return, P prior, x samples; bold: the path the search chose; +1 / -1: sides of preference pair 1.
Hover over a step for the whole path.</p>
$tree
<script>
  const fold = open => document.querySelectorAll('details').forEach(d => d.open = open(d));
</script>
</html>
""")


def page(forest: Forest, b: int, tokenizer: Tokenizer, title: str, pits=(), pairs=(), stop_ids=(), chosen=()) -> str:
    """The tree as one HTML file that needs nothing else: a branch folds at a click, the colour is Q (blue good, orange
    bad; and written out), hovering shows the whole path. pairs: [(chosen nodes, rejected nodes)]. Folded at first:
    what lies off the chosen path, when the tree is large. All text is escaped: a model may write anything."""
    right, out, todo = forest.below(b), [], [0]
    sides = [(n, f"{sign}{i}") for i, pair in enumerate(pairs, 1) for sign, side in zip("+-", pair) for n in side]
    while todo:                                         # not recursive: a path may have 1,000 steps
        n = todo.pop()
        if n < 0:
            out.append("</details>")
            continue
        said = note(forest, b, n, right[n]).split("  ")
        marks = said[1:] + [mark for m, mark in sides if m == n] + ["first pit"] * (n in pits)
        q = forest.value_sum[b, n] / max(1, forest.visits[b, n])
        colour = f"rgba({'0, 110, 230' if q > 0 else '230, 110, 0'}, {min(1, abs(q)) * .6:.2f})"
        whole = forest.text(b, n, tokenizer, stop_ids) if n else ""
        text = escape(step_text(forest, b, n, tokenizer, stop_ids))
        line = (f'<span class="step" style="background: {colour}" title="{escape(whole)}">{text}</span>'
                f"<small>{escape(said[0])}</small>" + "".join(
                    f'<span class="mark {escape(m.split()[-1])}">{escape(m)}</span>' for m in marks))
        kind = "root" * (n == 0) + " chosen" * (n in chosen)
        kids = sorted(forest.children[b][n], key=lambda k: (-forest.visits[b, k], -forest.count[b, k], k))
        if kids:
            shown = " open" if n == 0 or n in chosen or forest.size[b] <= 200 else ""
            out.append(f'<details class="{kind}"{shown}><summary>{line}</summary>')
            todo += [-1] + kids[::-1]
        else:
            out.append(f'<div class="end {kind}">{line}</div>')
    return PAGE.substitute(title=escape(title), tree="\n".join(out))


# ----------------------------------------------------------------------------------------------------------
# 6 · Program: show a saved tree, or search a toy game
# ----------------------------------------------------------------------------------------------------------
def toy() -> None:
    """From 1, four moves out of +1, +3, *2: who ends on 10 wins (1), else loses (-1). A random player wins 5 games
    of 81; the search sees only the ends of its own simulations."""
    tokenizer, forest, moves = Tokenizer.bytes_only(), Forest(1), ("+1", "+3", "*2")
    forest.add(0, -1, tokenizer.encode("1\n"))

    def number(b, n):
        """The number a node stands for: what its line ends in."""
        return int(tokenizer.decode(forest.ids[b][n]).split("=")[-1])

    def propose(forest, b, n, count):
        """All three moves, equally likely; the fourth ends the game."""
        x, why = number(b, n), "answer" if forest.depth[b, n] == 3 else "step"
        lines = [f"{x}{m}={x * 2 if m == '*2' else x + int(m)}\n" for m in moves]
        return [Continuation(np.array(ids), np.full(len(ids), math.log(1 / 3) / len(ids)), np.array([]), why)
                for ids in map(tokenizer.encode, lines)]

    def evaluate(forest, ends):
        """1 for 10, -1 for any other number."""
        return [1.0 if number(b, n) == 10 else -1.0 for b, n in ends]
    for simulations in (4, 12, 48):
        path, = search(forest, Direct(forest, propose), evaluate, simulations, c=1.5, to_terminal=True,
                       prior=count_prior)
        print(f"after {forest.visits[0, 0]} simulations (a random player: {5 / 81 * 2 - 1:+.2f}, the best one: +1)")
        print(draw(forest, 0, tokenizer, chosen=path, width=48, limit=12), "\n")


def main(arguments: list) -> int:
    """Draw a tree that a run has saved, in the terminal or as an HTML page; without --show search the toy game."""
    parser = argparse.ArgumentParser(prog="mcts.py", description="Show a saved tree.", allow_abbrev=False)
    for name, default, text in (("show", "", "trees_KK.jsonl of a run"), ("question", 0, "line of the file, from 0"),
                                ("html", "", "write a page to this file"), ("limit", 40, "lines to draw")):
        parser.add_argument("--" + name, type=type(default), default=default, help=f"{text} (default {default!r})")
    a = parser.parse_args(arguments)
    if not a.show:
        toy()
        return 0
    try:
        show(Path(a.show), a.question, a.html, a.limit)
        return 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(file: Path, question: int, html: str, limit: int) -> None:
    """Tree number `question` of a run's trees file; its tokenizer is that of the run's base, round_0."""
    with about(file):
        lines = file.read_text(encoding="utf-8").splitlines()
        need(0 <= question < len(lines), f"has questions 0 to {len(lines) - 1}, no {question}: change --question")
        row = json.loads(lines[question])
        need(isinstance(row, dict) and {"tree", "question"} <= row.keys(), f"line {question + 1} is no saved tree")
    folder = file.parent / "round_0"
    tokenizer, forest = Tokenizer.from_pretrained(folder), Forest.from_json([row["tree"]])
    stop_ids = GPTConfig.from_json(read_json(folder / "config.json")).raw.get("eos_token_id")
    stop_ids = {*tokenizer.eos_ids, *(stop_ids if isinstance(stop_ids, list) else [stop_ids])}
    pits, path = {p["node"] for p in row.get("pits", []) if p["node"]}, row.get("path", [])
    if html:
        made = file.with_name(file.name.replace("trees", "pairs"))
        lines = made.read_text(encoding="utf-8").splitlines() if made.exists() else []
        pairs = [(p["chosen_nodes"], p["rejected_nodes"]) for p in map(json.loads, lines) if p["tree"] == question]
        title = f"{row['question']}  (answer {row.get('answer')})"
        write_text(html, page(forest, 0, tokenizer, title, pits, pairs, stop_ids, path))
        print(f"written: {html}")
    else:
        print(draw(forest, 0, tokenizer, pits, stop_ids, limit=limit, chosen=path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
