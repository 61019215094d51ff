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
  4. A whole pruned tree is trained on as one row (`Forest.pack`), not as a chosen and a rejected row per pair.

Chapters: 1 Forest   2 Growing   3 Packing   4 Drawing   5 Demo
Try:  python mcts.py        (a tree of five solutions, drawn, and one pair of its branches packed; 1 second)
"""
from dataclasses import dataclass

import numpy as np

from model import BadInput, Request, Sampler, Tokenizer, mix

# ----------------------------------------------------------------------------------------------------------
# 1 · Forest: B trees x N nodes, a struct of arrays
# ----------------------------------------------------------------------------------------------------------
ENDS = ("", "eos", "answer", "length")        # why a node is a leaf; "" = it may go on


class Forest:
    """B trees with room for N nodes each; node 0 of a tree is its root, the question's prompt.

    Arrays, all (B, N); a node's number is the order of its birth:
      parent   index of the parent, -1 for roots and unused places
      depth    steps below the root
      visits   sampled continuations that went through the node (equal steps are one node: this is their count)
      terminal the solution ended here
      end      index into ENDS: why it ended
      right    of a terminal: 1 right, 0 wrong; -1 not graded (or no terminal)
      drawn    continuations asked for at this node so far: numbers the samples, hence their seeds
    Ragged things are lists: ids[b][n], logps[b][n], slots[b][n], each (tokens of the step,); slots are the
    sampler's addresses (model.Sampler) and die with its store; logps of a root are empty."""

    def __init__(self, trees: int, nodes: int = 64):
        self.arrays = dict(parent=(np.int32, -1), depth=(np.int32, 0), visits=(np.int32, 0), terminal=(bool, False),
                           end=(np.int8, 0), right=(np.int8, -1), drawn=(np.int32, 0))
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
        self.visits[b, n] += 1
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
        return np.concatenate([getattr(self, what)[b][m] for m in self.path(b, n)[0 if root else 1:]] or [np.zeros(0)])

    def text(self, b: int, n: int, tokenizer: Tokenizer, stop_ids=()) -> str:
        """Text of the solution down to n, without question and end-of-text."""
        return tokenizer.decode([int(i) for i in self.path_of(b, n, "ids", root=False) if i not in stop_ids])

    def leaves(self, b: int) -> list:
        """Terminal nodes, in order of birth."""
        return np.flatnonzero(self.terminal[b, :self.size[b]]).tolist()

    def below(self, b: int, right: int = 1) -> np.ndarray:
        """(nodes,) sampled continuations below each node (itself included) that ended right (or wrong, 0).
        Children are born after their parents, so one sweep backwards sums up."""
        N = self.size[b]
        count = np.where(self.right[b, :N] == right, self.visits[b, :N], 0)
        for n in range(N - 1, 0, -1):
            count[self.parent[b, n]] += count[n]
        return count

    def to_json(self, b: int) -> dict:
        """One tree as plain lists; `from_json` reads it back (without slots: the sampler's store is gone)."""
        N = self.size[b]
        out = {name: getattr(self, name)[b, :N].astype(int).tolist() for name in self.arrays}
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
                N = len(t["parent"])
                if any(len(t[name]) != N for name in (*forest.arrays, "ids", "logps")):
                    raise ValueError("its lists differ in length")
                for n, (parent, end) in enumerate(zip(t["parent"], t["end"])):
                    if (parent not in range(n) or forest.terminal[b, parent] if n else parent != -1) or end < 0 \
                            or forest.add(b, parent, t["ids"][n], t["logps"][n], end=ENDS[end]) != n:
                        raise ValueError("nodes are out of order")
                for name in ("visits", "right", "drawn"):
                    getattr(forest, name)[b, :N] = t[name]
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
    requests = []
    for b, n, count in wants:
        path = forest.path_of(b, n, "slots")
        spent = len(path) - len(forest.slots[b][0])
        for _ in range(count):
            requests.append(Request(path, mix(seeds[b], n, forest.drawn[b, n]), max(1, max_tokens - spent)))
            forest.drawn[b, n] += 1
    done = iter(sampler.extend(requests, temperature, progress=progress))
    return [[_hang(forest, b, n, next(done), sampler.newline) for _ in range(count)] for b, n, count in wants]


def split_steps(ids, newline: set) -> list:
    """[(first, past the last)] of each step: a step ends after the first token whose bytes hold a newline."""
    cuts = [i + 1 for i, token in enumerate(ids) if int(token) in newline]
    return [(a, b) for a, b in zip([0, *cuts], [*cuts, len(ids)]) if a < b]


def _hang(forest, b, n, new, newline):
    spans = split_steps(new.ids, newline)
    for i, (first, last) in enumerate(spans):
        end = new.why if i == len(spans) - 1 and new.why != "step" else ""
        n = forest.add(b, n, new.ids[first:last], new.logps[first:last], new.slots[first:last], end)
    return n


# ----------------------------------------------------------------------------------------------------------
# 3 · Packing: a pruned tree in one row
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
# 4 · Drawing: one tree in the terminal
# ----------------------------------------------------------------------------------------------------------
def draw(forest: Forest, b: int, tokenizer: Tokenizer, pits=(), stop_ids=(), width: int = 76, limit: int = 40) -> str:
    """The tree as text: one step a line with the samples that went through it; ends marked right or wrong; the
    first pits marked. Branches are ordered by visits; at most `limit` lines."""
    right, lines, shown = forest.below(b), [], {0}
    for leaf in sorted(forest.leaves(b), key=lambda n: (n not in pits, -forest.visits[b, n], n)):
        if len(shown) < limit:
            shown.update(forest.path(b, leaf))
    for p in pits:
        shown.update(forest.path(b, p))

    def visit(n, stem, joint):
        step = tokenizer.decode([int(i) for i in forest.ids[b][n] if i not in stop_ids])
        step = step.strip().replace("\n", " / ") or "(empty)"
        note = f"x{forest.visits[b, n]}" if n else f"{forest.visits[b, forest.children[b][0]].sum()} samples"
        if forest.terminal[b, n]:
            note += {1: "  RIGHT", 0: "  wrong", -1: ""}[int(forest.right[b, n])]
            note += "  (cut at the length limit)" if ENDS[forest.end[b, n]] == "length" else ""
        elif right[n]:
            note += f"  {right[n]} right below"
        note += "   <== FIRST PIT: no branch from here was right" if n in pits else ""
        text = stem + joint + step
        lines.append(f"{text[:width - 1] + '~' if len(text) > width else text:<{width // 2}}  {note}")
        kids = sorted((c for c in forest.children[b][n] if c in shown), key=lambda c: (-forest.visits[b, c], c))
        stem += {"": "", "+- ": "|  ", "`- ": "   "}[joint]
        for c in kids:
            visit(c, stem, "`- " if c == kids[-1] else "+- ")

    visit(0, "", "")
    hidden = int(forest.size[b]) - len(shown)
    return "\n".join(lines + [f"... and {hidden} more nodes"] * (hidden > 0))


# ----------------------------------------------------------------------------------------------------------
# 5 · Demo
# ----------------------------------------------------------------------------------------------------------
def main() -> None:
    """A tree of five solutions of 17+1*4-2, drawn, and its packed row for one pair of branches."""
    tokenizer, forest = Tokenizer.bytes_only(), Forest(1)
    forest.add(0, -1, tokenizer.encode("17+1*4-2?"))
    right = ["1*4=4 : 17+4-2\n", "17+4=21 : 21-2\n", "21-2=19 : 19\n", "#### 19"]
    slip = [right[0], "17+4=21 : 21-2\n", "21-2=18 : 18\n", "#### 18"]
    order = ["17+1=18 : 18*4-2\n", "18*4=72 : 72-2\n", "72-2=70 : 70\n", "#### 70"]
    for steps in (right, right, order, slip, order):
        n = 0
        for i, step in enumerate(steps):
            n = forest.add(0, n, tokenizer.encode(step), end="eos" if i == 3 else "")
        forest.right[0, n] = steps is right
    print(draw(forest, 0, tokenizer, pits=[forest.children[0][0][1]]))
    good, bad = forest.children[0][0]
    row = pack(forest, 0, [good, bad])
    print(f"\nThe pair of first steps in one row of {len(row.ids)} tokens (two rows would take "
          f"{len(row.ids) + len(forest.ids[0][0])}):")
    for name in ("ids", "position", "before", "node"):
        print(f"{name:>9} {' '.join(f'{x:3d}' for x in getattr(row, name)[5:])}")


if __name__ == "__main__":
    main()
