"""Trees of solutions, and the search that grows them.

A language model, the policy, writes a solution step by step; a step is one line. Sample one
question many times and the samples form a tree: the question is the root, equal first lines are one
child, and every path from the root to an end is one solution. The three methods grow such trees in
different ways.
    7+1*4-2?  --+-- 1*4=4 : 7+4-2 -- 7+4=11 : 11-2 -- 11-2=9 : 9 -- #### 9    right
                `-- 7+1=8 : 8*4-2 -- 8*4=32 : 32-2 -- ...        -- #### 30   wrong
The numbers of a search, and where they are computed:
    N   node.visits   simulations that went through the node      counted in `backup`
    Q   node.q        the mean of their returns                   summed in `backup`, divided in `q`
    P   node.prior    length-normalised likelihood of the step    from the log-probs of its tokens
    x   node.count    samples that took the step                  counted in `Tree.add`
What is different from the published codes:
1. A node holds ids and slots, their places in the sampler's store: to go on from a node does not
   run the model on its tokens again. Equal steps are one node, with the slots of the first sample.
2. All trees are searched at once, in one large batch; no tree waits for another.
3. One plain mean is backed up for all methods: see `backup`. Left out: virtual loss, discount.
Chapters:  1 The tree   2 Files, budget   3 Growing   4 The search   5 Packing   6 Drawing, program
Try:  python mcts.py                                       searches a toy game and draws the tree
      python mcts.py --show FILE --question 3 --html PAGE  draws a tree that loop.py saved
"""
import signal

if __name__ == "__main__":              # Ctrl-C and `| head` end the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)    # not on Windows

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import model
from model import BadInput, Request, about, mix, need, read_json, write_text

# --------------------------------------------------------------------------------------------------
# 1. The tree
# --------------------------------------------------------------------------------------------------
NOTHING = np.zeros(0, np.int64)


@dataclass(eq=False)                    # eq=False: a node equals only itself and may be a dict key
class Node:
    """One step of a solution. The root of a tree holds the question instead."""
    tree: "Tree" = field(repr=False)    # repr=False: printing a node must not print the whole tree
    parent: "Node | None" = field(repr=False)
    ids: np.ndarray                     # (tokens,) of this step
    logps: np.ndarray                   # (tokens,) their log-probs when they were sampled
    slots: np.ndarray                   # (tokens,) where the sampler keeps their keys and values
    ended: str = ""                     # why the solution ends here: eos, answer, length; "" = open
    index: int = 0                      # order of birth in the tree; parents come before children
    children: list = field(default_factory=list, repr=False)
    count: int = 0                      # samples that came from above and took this step
    asked: int = 0                      # continuations requested below it, numbered 0 to asked - 1
    right: bool | None = None           # of an end: is the answer right? None: not graded
    rights: int = 0                     # right samples that end at or below this step (a search
                                        # grades an end once, however often it is sampled)
    wrongs: int = 0                     # wrong samples, likewise
    tried: int = 0                      # fresh completions of it by critic.label_pits
    tried_right: int = 0                # how many of these ended right
    visits: int = 0                     # N: simulations that passed through or ended here
    value_sum: float = 0.0              # sum of their returns (the scores of their last nodes)
    value_squares: float = 0.0          # the sum of their squares, for rules that need a variance
    score: float | None = None          # what `evaluate` gave this node; None: not yet asked

    @property
    def q(self) -> float:
        """Q, the mean return. A step without a visit is taken to be as good as its parent."""
        node = self                     # a loop, no recursion: 1,500 unvisited steps are possible
        while node.visits == 0 and node.parent is not None:
            node = node.parent
        return node.value_sum / node.visits if node.visits else 0.0

    @property
    def prior(self) -> float:
        """P = exp(sum of log-probs / tokens ** 1.25), as in MCTS-DPO's code; siblings need not add
        up to 1. 20 tokens of log-prob -.5 have .79; the paper's p / length^lambda is .000001."""
        return math.exp(float(self.logps.sum()) / len(self.ids) ** 1.25)

    def path(self) -> list:
        """Nodes from the root down to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def solution(self, what: str = "ids") -> np.ndarray:
        """(tokens,) "ids" or "logps" of all steps to this one, without the question."""
        return np.concatenate([getattr(node, what) for node in self.path()[1:]] or [NOTHING])

    def slots_from_root(self) -> np.ndarray:
        """(tokens,) the slots of the question and of all steps to this one."""
        return np.concatenate([node.slots for node in self.path()])


class Tree:
    """Everything tried so far for one question. nodes: in order of birth; nodes[0] is the root."""

    def __init__(self, question, seed: int, prompt_ids, prompt_slots=NOTHING):
        self.question, self.seed = question, seed
        self.tokens = 0                 # sampled for this tree: methods compare at equal tokens
        self.nodes = []
        self.known = {}                 # (parent, ended, ids or key of the step) -> node
        self.root = self.add(None, prompt_ids, NOTHING, prompt_slots)
        self.search_from = self.root    # where simulations begin (`commit_every` moves it down)
        self.chosen = []                # AlphaLLM: path of the solution to imitate, if there is one

    def add(self, parent, ids, logps=NOTHING, slots=NOTHING, ended: str = "", key=None) -> Node:
        """The child with these ids. It is made if it is missing, and its count grows by one.
        Steps of equal `key` are one node, too (AlphaLLM's state merge): "so 2+3=5" and "2+3=5"."""
        same_ids = (parent, ended, tuple(ids))
        same_key = same_ids if key is None else (parent, ended, key)
        node = self.known.get(same_ids) or self.known.get(same_key)
        if node is None:
            ids, logps = np.asarray(ids, np.int64), np.asarray(logps, np.float32)
            node = Node(self, parent, ids, logps, np.asarray(slots), ended, len(self.nodes))
            self.nodes.append(node)
            if parent is not None:
                parent.children.append(node)
        self.known[same_ids] = self.known[same_key] = node
        node.count += 1
        return node

    def ends(self) -> list:
        """The ends of all solutions, in order of birth."""
        return [node for node in self.nodes if node.ended]


def record_grade(end: Node, right: bool) -> None:
    """A sample ended at `end`, right or wrong: count it at every step of its path."""
    end.right = bool(right)
    for node in end.path():
        node.rights += end.right
        node.wrongs += not end.right


# --------------------------------------------------------------------------------------------------
# 2. Trees in files, and the token budget
# --------------------------------------------------------------------------------------------------
# What a file keeps of a node besides parent, ids, logps and end. Absent: count 1, else the default
FACTS = dict(count=int, asked=int, right=bool, rights=int, wrongs=int, tried=int,
             tried_right=int, visits=int, value_sum=float, value_squares=float, score=float)


def to_json(tree: Tree) -> dict:
    """A tree as plain lists, without slots: they are places in a sampler that will be gone."""
    rows = []
    for node in tree.nodes:
        logps = [round(float(logp), 6) for logp in node.logps]
        parent = node.parent and node.parent.index
        row = dict(parent=parent, ids=node.ids.tolist(), logps=logps, end=node.ended)
        rows.append(row | {name: getattr(node, name) for name in FACTS})
    chosen = [node.index for node in tree.chosen]
    return dict(seed=tree.seed, tokens=tree.tokens, chosen=chosen, nodes=rows)


def from_json(saved: dict, question) -> Tree:
    """The inverse of to_json; BadInput for a damaged or foreign file. The tree can be grown further
    once its nodes have slots (Sampler.follow): steps of equal ids merge; keys are not saved."""
    with about("a saved tree"):
        rows = model.field(saved, "nodes", list)
        need(rows, "key 'nodes' is empty: there is no root")
        tree = Tree(question, model.field(saved, "seed", int), _numbers(rows[0], "ids", int))
        tree.tokens = model.field(saved, "tokens", int, 0)
        for number, row in enumerate(rows):
            with about(f"node {number}"):
                node = _add_row(tree, row) if number else tree.root
                need(node.index == number, f"is the same step as node {node.index}")
                for name, kind in FACTS.items():
                    if row.get(name) is not None:
                        setattr(node, name, model.field(row, name, kind))
        chosen = _numbers(saved, "chosen", int, 0, len(rows) - 1, [])
    tree.chosen = [tree.nodes[i] for i in chosen]
    return tree


def _add_row(tree: Tree, row) -> Node:
    """The node of one row of a file, below its parent; BadInput if it cannot be one."""
    ids = _numbers(row, "ids", int)
    logps = _numbers(row, "logps", float, -1e9, 0.0, [])
    need(ids and len(logps) in (0, len(ids)), "keys 'ids', 'logps' do not fit")
    parent = model.field(row, "parent", int)
    need(0 <= parent < len(tree.nodes), f"key 'parent': no node {parent} stands before it")
    end = model.field(row, "end", str, "")
    need(end in ("", "eos", "answer", "length"), f"key 'end' is {end!r:.60}")
    return tree.add(tree.nodes[parent], ids, logps, ended=end)


def _numbers(row, key: str, kind, low=0, high=2 ** 31, default=None) -> list:
    """A list of numbers in a file, checked."""
    numbers = model.field(row, key, list, default)
    need(all(type(number) is kind and low <= number <= high for number in numbers),
         f"key {key!r} must be a list of {kind.__name__}, each from {low} to {high}")
    return numbers


def tokens_left(trees: list, tokens: float):
    """The token budget of some trees: a function without arguments that says how many they may
    still sample. What each recipe spends them on:

        rft                  | samples                                                 |
        outcome_dpo          | samples for RFT (round 1) | samples                     |
        self_explore         | samples for RFT (round 1) | samples | labels | samples  |
        mcts_dpo             | samples for RFT (round 1) | search                      |
        alphallm             | samples for the critics | writing | search              |
        combined             | samples | more samples, or a search with critics        |
        sft                  | nothing                                                 |

    Checked before sampling by loop.sample, critic.label_pits, `until` and `commit_every`. (A search
    has one budget a tree, so that no tree depends on the others.) The first simulation of a tree
    needs one token left. Not checked: the first sample of a question, questions that the policy
    writes (subtracted afterwards, imagined_questions), rollouts (counted in rollout_tokens)."""
    limit = tokens + sum(tree.tokens for tree in trees)
    return lambda: limit - sum(tree.tokens for tree in trees)


# --------------------------------------------------------------------------------------------------
# 3. Growing: asking the sampler to go on from chosen nodes
# --------------------------------------------------------------------------------------------------
def requests(node: Node, k: int, max_tokens: int, sampler) -> list:
    """k requests to go on below a node; max_tokens for the whole solution. Sample i is seeded with
    (tree, node, i), so a tree is the same in any batch. ValueError: no tokens left, or no slots."""
    written = node.solution().tolist()
    left = max_tokens - len(written)
    need(left > 0 and not node.ended,
         f"node {node.index} is an end or uses all {max_tokens} tokens")
    slots = node.slots_from_root()
    need(len(slots) == len(node.tree.root.ids) + len(written),
         "a tree from a file needs slots: Sampler.follow")
    # an answer is looked for in whole lines: this one is not finished yet
    line = sampler.tokenizer.decode_more(written).rpartition("\n")[2]
    numbers = range(node.asked, node.asked + k)
    node.asked += k
    return [Request(slots, mix(node.tree.seed, node.index, i), left, line=line) for i in numbers]


def attach(node: Node, sample, step_over, key=None) -> Node:
    """Cut a sampled continuation into steps, add them below a node, and return the last one. A step
    ends at the first token for which step_over(ids of the step so far) is true. If 0 is the
    newline, 5 0 7 8 0 9 gives the steps 5 0, 7 8 0 and 9."""
    node.tree.tokens += len(sample.ids)
    first, written = 0, sample.ids.tolist()
    for last in range(1, len(written) + 1):
        final = last == len(written)
        if final or step_over(written[first:last]):
            ids, logps, slots = (x[first:last] for x in (sample.ids, sample.logps, sample.slots))
            ended = sample.why if final and sample.why != "step" else ""
            node = node.tree.add(node, ids, logps, slots, ended, key and key(ids))
            first = last
    return node


def grow(sampler, wants: list, max_tokens: int, temperature: float = 1.0, progress=None) -> list:
    """Whole solutions below many nodes of many trees at once. wants: [(node, k)]. Returns the ends
    of the samples, k for each want, in order. ValueError while a search uses the sampler."""
    asked = [(node, one) for node, k in wants for one in requests(node, k, max_tokens, sampler)]
    samples = sampler.extend([one for _, one in asked], temperature, progress=progress)
    return [attach(node, sample, sampler.step_over) for (node, _), sample in zip(asked, samples)]


class StepSampler:
    """Samples single steps for a search. All trees share one batch of the sampler."""

    def __init__(self, sampler, max_tokens: int, temperature: float = 1.0, key=None, progress=None):
        self.sampler, self.max_tokens, self.temperature = sampler, max_tokens, temperature
        self.key, self.progress = key, progress         # key: merges steps, see Tree.add
        self.pending = {}               # node that waits -> the Requests it asked for

    def ask(self, node: Node, k: int) -> None:
        """Ask for k more steps below this node. Raises ValueError if k < 1 or the node waits."""
        need(k > 0, f"{k} steps asked for below node {node.index}: the search would wait for ever")
        need(node not in self.pending, f"node {node.index} still waits for the steps it asked for")
        self.pending[node] = requests(node, k, self.max_tokens, self.sampler)
        self.sampler.submit(self.pending[node])

    def answers(self) -> list:
        """Nodes that have all they asked for; children in order of sample number, in any batch."""
        ready = []
        while self.pending and not ready:
            self.sampler.advance(self.temperature, whole=False, progress=self.progress)
            ready = [node for node, samples in self.pending.items()
                     if all(sample.why for sample in samples)]
        for node in ready:
            for sample in self.pending.pop(node):
                attach(node, sample, self.sampler.step_over, self.key)
        return ready


# --------------------------------------------------------------------------------------------------
# 4. The search
# --------------------------------------------------------------------------------------------------
# HACK HERE: where to look next. A rule gives a child a number; the search goes to the largest.
#   variance   child.value_squares / max(1, child.visits) - child.q ** 2             (UCB1-tuned)
#   chance     random.Random(mix(parent.tree.seed, child.index, parent.visits))      (Thompson);
#              no other random numbers, or a tree would depend on the batch
# Also change: RULES (and import random for chance). Then try `python mcts.py --rule NAME`.
def puct(parent: Node, child: Node, c: float = 1.0) -> float:
    """Q + c P sqrt(N(parent)) / (1 + N(child)): AlphaZero's rule; MCTS-DPO (2405.00451) eq. 1."""
    visits = max(1, parent.visits)              # with 0, P would not count in the first choice
    return child.q + c * child.prior * math.sqrt(visits) / (1 + child.visits)


def uct(parent: Node, child: Node, c: float = 0.1) -> float:
    """Q + c sqrt(2 ln N(parent) / N(child)): AlphaLLM (2404.12253) eq. 2. New children first."""
    if child.visits == 0:
        return math.inf
    return child.q + c * math.sqrt(2 * math.log(max(1, parent.visits)) / child.visits)


RULES = dict(puct=puct, uct=uct)


def fixed_width(root: int = 5, below: int = 3, every: int = 8):
    """MCTS-DPO's width: 5 steps at the root, 3 below. A low-entropy policy repeats itself, so every
    8 visits a node gets as many again: 5, from visit 8 on 10, from 16 on 15."""
    return lambda node: (below if node.parent else root) * (1 + node.visits // every)


def importance_width(node: Node) -> int:
    """AlphaLLM's adaptive width (eq. 3, 4): a simulation draws until one child is new or n(s) are
    drawn, repeats included. n(s) = floor(10 I(s)) + 1, I(s) = max |v(child) - v(s)|: a parent of .5
    with children .9 and .4 has I .4, n 5. (With the paper's 1 in place of 10, n hardly changes.) n
    is held in 1..10, at the root in 5..11, times 1 + visits // 8: busy nodes go on widening."""
    if any(child.visits == 0 for child in node.children):
        return node.asked                       # the last new one has not been tried yet
    here = node.q if node.score is None else node.score
    gaps = [abs(child.score - here) for child in node.children if child.score is not None]
    n = int(10 * max(gaps, default=0.0)) + 1
    low, high = (1, 10) if node.parent else (5, 11)
    cap = min(max(n, low), high) * (1 + node.visits // 8)
    return min(node.asked + 1, cap)


def backup(node: Node, value: float) -> None:
    """Add the return of a simulation to every node of its path, the root included. AlphaLLM backs
    up the critics' number of a leaf, MCTS-DPO +1 or -1 of an end.

    Why a plain mean is MCTS-DPO's Q = r + V(s'): its rewards r = R(s') - R(s) are differences of
    state scores, and along a path they cancel. Say R(root) = 0, a .6, below it t1 1.7 and t2 -.7:

        to t1        Q(root, a) = (.6 - 0) + (1.7 - .6) = 1.7                    the return
        then to t2   Q(root, a) = (.6 - 0) + ((1.7 - .6) + (-.7 - .6)) / 2 = .5  the mean of both
        in general   Q(s, a) + R(s) = the mean of the returns through a. All actions of s share
                     R(s), so the mean ranks them as Q does"""
    for step in node.path():
        step.visits += 1
        step.value_sum += value
        step.value_squares += value * value


def search(trees, proposer, evaluate, go_on, choose=puct, width=fixed_width(), to_end=True) -> None:
    """Monte-Carlo tree search of many trees at once.

    proposer          ask(node, k) requests k steps; answers() -> nodes that got theirs, or [];
                      pending: true while a node waits
    evaluate(nodes)   a number for each node, higher is better; asked once a node
    go_on(tree)       asked before every simulation: shall there be one?
    choose, width     choose(parent, child): the child of the largest number is visited;
                      width(node): how many continuations it should have asked for by now
    to_end            True: a simulation goes on until a solution ends (MCTS-DPO). False: it ends at
                      the first node without a visit (AlphaLLM, whose critics judge half solutions)

    Four simulations of a tree with two children a (P .6) and b (P .4), c = 1, to_end=False:
        1  both Q are 0, so P decides: a; it returns 1     N(root) 1   a: N 1 Q 1
        2  a 1 + .6/2 = 1.3, b 1 (root's Q) + .4 = 1.4: b returns 0   N(root) 2   b: N 1 Q 0
        3  a 1.42, b .28: a has no children yet: one child, d, is sampled; it returns 0
        4  a .85, b .35: a again, then d, its only child: children of d are sampled, ..."""
    new = lambda node: node.parent is not None and not node.visits
    # does a simulation end at this node?
    over = lambda node: node.ended or (not to_end and new(node))
    # A tree that is not done has one simulation: its node is in `standing` or proposer.pending
    standing = [tree.search_from for tree in trees if go_on(tree)]
    while standing or proposer.pending:
        arrived = []
        for node in standing:
            # 1) Select: go down by `choose` to where the simulation ends ...
            while not over(node) and node.children and node.asked >= width(node):
                node = max(node.children, key=partial(choose, node))         # ties: the first-born
            if over(node):
                arrived.append(node)
            else:
                # 2) Expand: ... or to a node that needs more steps. It asks for them and waits.
                proposer.ask(node, width(node) - node.asked)
        # 3) Evaluate the nodes at which a simulation ended: one call for all trees.
        unscored = [node for node in arrived if node.score is None]
        scores = evaluate(unscored) if unscored else []
        for node, score in zip(unscored, scores, strict=True):
            node.score = float(score)
        # 4) Back up, and begin the next simulation.
        for node in arrived:
            backup(node, node.score)
        standing = [node.tree.search_from for node in arrived if go_on(node.tree)]
        if not standing:
            standing = proposer.answers()               # all trees wait or are done: sample


def until(simulations: float, tokens: float = math.inf, patience: float = math.inf):
    """A stop rule: go_on(tree) is False when a tree has so many simulations (those in its file
    included), after `patience` in a row that sampled nothing, or when twice the mean cost of a
    simulation exceeds what is left of `tokens`, counted from the first call. Example: tokens = 30,
    two simulations took 16, a mean of 8; twice that is 16, and 14 are left: stop. The first, which
    costs most, is not doubled: alone it is useless. (mcts_dpo, round 1: 93%; by the mean 103%.)"""
    started = {}                        # tree -> (left, tokens, visits) at the first call
    grown = {}                          # (tree, tokens) -> visits when it first had these tokens

    def go_on(tree):
        """Shall this tree have another simulation?"""
        visits = tree.root.visits
        start = tokens_left([tree], tokens), tree.tokens, visits
        left, tokens_before, visits_before = started.setdefault(tree, start)
        next_cost = (tree.tokens - tokens_before) / max(1, (visits - visits_before) / 2)
        patient = visits - grown.setdefault((tree, tree.tokens), visits) < patience
        return visits < simulations and patient and max(1, next_cost) <= left()
    return go_on


def commit_every(simulations: int, tokens: float = math.inf):
    """MCTS-DPO: after every K simulations the search moves to the best child, down to an end."""
    affordable = until(math.inf, tokens)
    moved = {}                          # tree -> visits when search_from last moved

    def go_on(tree):
        """Shall this tree have another simulation? Moves search_from down when it is time."""
        visits = tree.root.visits
        if visits - moved.setdefault(tree, visits) >= simulations:
            tree.search_from = best_child(tree.search_from)
            moved[tree] = visits
        return not tree.search_from.ended and affordable(tree)
    return go_on


def best_child(node: Node) -> Node | None:
    """The most visited child; among equals that of highest Q, the first-born. None: no visits."""
    visited = [child for child in node.children if child.visits]
    return max(visited, key=lambda child: (child.visits, child.q), default=None)


def best_path(tree: Tree) -> list:
    """The most visited path: from the root on, the most visited child again and again."""
    nodes = [tree.root]
    while (child := best_child(nodes[-1])) is not None:
        nodes.append(child)
    return nodes


# --------------------------------------------------------------------------------------------------
# 5. Packing: a whole tree as one row of tokens, for training
# --------------------------------------------------------------------------------------------------
@dataclass
class Packed:
    """Some nodes of a tree and all their ancestors in one row of T tokens, branch after branch:

        tree   q1 q2 --+-- a1 a2      row       q1 q2 a1 a2 b1           sees      q1 q2 a1 a2 b1
                       `-- b1         position   0  1  2  3  2                 q1   x
                                      before    -1  0  1  2  1                 q2   x  x
                                      unseen     5  5  4  4  5                 a1   x  x  x
                                                                               a2   x  x  x  x
                                                                               b1   x  x        x

    A token sees its ancestors and itself, so its log-prob is that of a row of its own, and what
    branches share is computed once: 2 to 6 times less work. The tokens below a1 end just before
    column unseen[a1] = 4. So the token in column t sees column s if s <= t < unseen[s]. `before` is
    needed because a token's predecessor in its branch need not be its left neighbour: b1 is
    predicted from q2, not a2."""
    ids: np.ndarray                     # (T,)
    position: np.ndarray                # (T,) how many tokens come before it in its own solution
    before: np.ndarray                  # (T,) the column of the token it is predicted from
    unseen: np.ndarray                  # (T,) the first column that no longer sees it
    span: dict                          # node -> slice of its columns; parents come first


def pack(nodes) -> Packed:
    """Lay nodes of one tree and their ancestors in a row, branch after branch."""
    keep = {step for node in nodes for step in node.path()}
    keep = sorted(keep, key=lambda node: [step.index for step in node.path()])  # depth first
    ids = np.concatenate([node.ids for node in keep])                       # (T,)
    position, unseen = np.zeros_like(ids), np.zeros_like(ids)
    before = np.arange(-1, len(ids) - 1)                # usually the left neighbour
    span, start = {}, 0
    for node in keep:
        here = span[node] = slice(start, start + len(node.ids))
        position[here] = np.arange(len(node.ids))
        if node.parent is not None:
            before[start] = span[node.parent].stop - 1  # of a first token: the parent's last
            position[here] += position[before[start]] + 1
        for step in node.path():
            unseen[span[step]] = here.stop                                  # the last one counts
        start = here.stop
    return Packed(ids, position, before, unseen, span)


# --------------------------------------------------------------------------------------------------
# 6. Drawing, and the program
# --------------------------------------------------------------------------------------------------
SHEET = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --light: 36% }  p { margin: .2em 0 }  .grid { stroke: #8884 }
@media (prefers-color-scheme: dark) { :root { --light: 70% } }  div, pre { overflow-x: auto }
body { font: 16px/1.5 sans-serif; max-width: 50em; margin: auto; padding: 0 1em 3em }
h1, h2 { font-size: 1.2em; margin: 1.5em 0 0; overflow-wrap: anywhere }  pre { font-size: 12px }
section { display: flex; flex-wrap: wrap; gap: 0 2em; align-items: center }
table { border-spacing: 0; font-size: 14px }  td { text-align: right; padding-left: 1em }
th { text-align: left; font-weight: normal }  path { fill: none }  text { fill: currentColor }
svg { flex: 1 1 20em; max-width: 26em; font-size: 12px; overflow: visible }
g { color: hsl(var(--hue) 60% var(--light)); stroke: currentColor }  g text { stroke: none }
.ends { stroke-width: 5; stroke-linecap: round; opacity: .6 }
</style><h1>TITLE</h1>"""


def printable(text: str) -> str:
    """Text without control characters: a sampled one must not reach a terminal or a page."""
    return "".join(c if c.isprintable() else " " for c in text)


def _notes(node: Node, pits, prior: bool) -> str:
    """What stands beside a step: "x3  N 12 Q +0.50  RIGHT  <- chosen"."""
    said = f"x{node.count}" if node.parent else ""      # a root is not sampled
    said += f"  N {node.visits} Q {node.q:+.2f}" * (node.visits > 0)
    said += f"  P {node.prior:.2f}" if prior and node.parent else ""
    said += {True: "  RIGHT", False: "  wrong", None: ""}[node.right]
    said += "  (cut at the length limit)" * (node.ended == "length")
    return said + "  <- chosen" * (node in node.tree.chosen) + "  <== FIRST PIT" * (node in pits)


def draw(tree: Tree, text, pits=(), limit=40, width=56, prior=False) -> str:
    """The tree for a terminal, with legend; text(node) -> str, of the root the question. Paths are
    added until `limit` nodes are shown: first chosen, pits, often visited, often sampled. Steps,
    but not the question, are cut at `width` columns. Both may be math.inf. prior: show P, which
    only PUCT uses."""
    weight = lambda node: (node in tree.chosen, node in pits, node.visits, node.count, -node.index)
    shown, lines = set(), []
    for node in sorted(tree.nodes, key=weight, reverse=True):
        if len(shown) < limit:
            shown.update(node.path())
    todo = [(tree.root, "", "")]                        # no recursion: a path may have 1,000 steps
    while todo:
        node, stem, joint = todo.pop()
        step = stem + joint + printable(text(node))
        if node.parent and len(step) > width:
            step = step[:width - 3] + "..."
        lines.append((step, _notes(node, pits, prior)))
        stem += {"": "", "+- ": "|  ", "`- ": "   "}[joint]
        # the most important child is last on the stack, and is drawn first
        below = sorted(shown.intersection(node.children), key=weight)
        todo += [(child, stem, "+- " if i else "`- ") for i, child in enumerate(below)]
    longest = max(min(len(step), width) for step, _ in lines)
    lines = [f"{step:<{longest}}  {notes}".rstrip() for step, notes in lines]
    if hidden := len(tree.nodes) - len(shown):
        lines.append(f"... and {hidden} more steps")
    legend = "x = samples that took the step" + ", FIRST PIT = no right end below" * bool(pits)
    legend += ", N = visits of the search, Q = their mean return" * (tree.root.visits > 0)
    legend += ", P = length-normalised likelihood of the step" * prior
    return "\n".join([*lines, legend])


def page(title: str, parts: list) -> str:
    """HTML parts as one file that loads nothing and runs no script."""
    return "\n".join([SHEET.replace("TITLE", escape(printable(title))), *parts])


def toy(rule) -> None:
    """From 1, four moves: who ends on 10 wins (5 games of 81: a random player has Q -0.88)."""
    tree = Tree("reach 10", 0, [1])
    moves, waiting = ("+1=", "+3=", "*2="), []
    text = lambda node: moves[node.ids[0]] + str(node.ids[1]) if node.parent else "1"

    def ask(node, k):
        """In place of a model: all three moves at once, equally likely."""
        x = int(node.ids[-1])
        end = "answer" if len(node.path()) == 4 else ""
        for move, result in enumerate((x + 1, x + 3, x * 2)):
            tree.add(node, [move, result], [-1.3, -1.3], ended=end)
        node.asked += k
        waiting.append(node)
    answers = lambda: [waiting.pop() for _ in waiting[:]]           # all nodes that asked
    game = SimpleNamespace(ask=ask, answers=answers, pending=waiting)
    returns = lambda ends: [1.0 if end.ids[-1] == 10 else -1.0 for end in ends]
    for simulations in (4, 12, 48):
        search([tree], game, returns, until(simulations), rule, lambda node: 3)
        tree.chosen = best = best_path(tree)
        print(f"{simulations:2} simulations: Q {tree.root.q:+.2f}  {' '.join(map(text, best))}")
    print("\n" + draw(tree, text, limit=12, prior=rule is puct))
    visits = " + ".join(str(child.visits) for child in tree.root.children)
    print(f"The visits of the children add up: {visits} = N {tree.root.visits}")


def show(flags) -> None:
    """Draw a tree of a file that loop.py wrote, or write it as a page."""
    with about(flags.show):
        lines = Path(flags.show).read_text(encoding="utf-8").rstrip("\n").split("\n")
        last = len(lines) - 1
        need(0 <= flags.question <= last, f"--question must be from 0 to {last}")
        saved = read_json(f"line {flags.question + 1}", lines[flags.question].encode())
        tree = from_json(saved, saved.get("text"))
        texts = model.field(saved, "step_texts", list)
        need(len(texts) == len(tree.nodes), "key 'step_texts' must hold one text a node")
        pits = [tree.nodes[i] for i in _numbers(saved, "pits", int, 0, len(texts) - 1, [])]
    text = lambda node: str(texts[node.index])
    prior = flags.rule == "puct"
    print(draw(tree, text, pits, prior=prior))
    if flags.html:
        whole = draw(tree, text, pits, math.inf, math.inf, prior)
        write_text(flags.html, page(text(tree.root), [f"<pre>{escape(whole)}</pre>"]))


def main(arguments: list) -> int:
    """Exit code 0; 2 for bad input, with one sentence."""
    model.start_console()
    parser = model.Flags(description="Search a toy game, or show a saved tree.")
    parser.add_argument("--show", metavar="FILE", help="a file of trees that loop.py wrote")
    parser.add_argument("--question", type=int, default=0, help="which tree of it, from 0")
    parser.add_argument("--html", metavar="FILE", help="write the tree to this page")
    parser.add_argument("--rule", choices=RULES, default="uct", help="of the toy; puct shows P too")
    try:
        flags = parser.parse_args(arguments)
        need(flags.show or not flags.html, "--html needs --show FILE")
        show(flags) if flags.show else toy(RULES[flags.rule])
        return 0
    except ValueError as error:                         # BadInput is one
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
