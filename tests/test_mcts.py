"""Forest, growing, packing, drawing: arrays against brute force, a batch against alone, one row against
many.

Oracles: definitions written down as loops over paths, on seeded random trees; plain forwards of every path
of a packed tree on its own; the exact text of one drawn tree. Seeds are fixed: no chance but rounding, see
there."""
import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpo import Pair, collate, tree_log_probs, tree_row  # noqa: E402
from mcts import ENDS, Forest, Steps, draw, grow, pack, plant, split_steps  # noqa: E402
from model import BadInput, Request, Sampler, Tokenizer, mix, step_rule  # noqa: E402
from test_model import V, Letters, distinct, language_model, log_probs  # noqa: E402

ARRAYS = ("parent", "depth", "count", "terminal", "end", "right", "drawn")


def random_forest(seed, trees=3, adds=60, nodes=4, ids=V):
    """Trees of short random steps, many of them equal; leaves that ended are graded right, wrong or not at
    all."""
    rng, forest = np.random.default_rng(seed), Forest(trees, nodes)
    for b in range(trees):
        forest.add(b, -1, rng.integers(0, ids, rng.integers(1, 6)))
        for _ in range(rng.integers(1, adds)):
            open_nodes = np.flatnonzero(~forest.terminal[b, :forest.size[b]])
            step = rng.integers(0, rng.choice((2, ids)), rng.integers(1, 4))
            n = forest.add(b, int(rng.choice(open_nodes)), step, -rng.random(len(step)),
                           end=ENDS[rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))])
            if forest.terminal[b, n]:
                forest.right[b, n] = rng.integers(-1, 2)
            forest.drawn[b, n] = rng.integers(0, 5)
    return forest


def ancestors(forest, b, n):
    """Root to n, by the definition."""
    return ([] if forest.parent[b, n] < 0 else ancestors(forest, b, int(forest.parent[b, n]))) + [int(n)]


def assert_sound(forest, b):
    """What every tree must be: one root, parents born before, depths, children and ends that agree."""
    N = int(forest.size[b])
    assert N == len(forest.ids[b]) == len(forest.logps[b]) == len(forest.slots[b]) == len(forest.children[b])
    assert N == 0 or forest.parent[b, 0] == -1 and forest.depth[b, 0] == 0
    for n in range(1, N):
        up = forest.parent[b, n]
        assert 0 <= up < n and forest.depth[b, n] == forest.depth[b, up] + 1 and not forest.terminal[b, up]
    for n in range(N):
        assert forest.children[b][n] == np.flatnonzero(forest.parent[b, :N] == n).tolist()
        assert forest.terminal[b, n] == (forest.end[b, n] != 0) and 0 <= forest.end[b, n] < len(ENDS)
        steps = [(tuple(forest.ids[b][c]), int(forest.end[b, c])) for c in forest.children[b][n]]
        assert len(steps) == len({*steps})                              # exact duplicates are never siblings


# ----------------------------------------------------------------------------------------------------------
# Forest
# ----------------------------------------------------------------------------------------------------------
def test_equal_steps_merge():
    """Equal ids below one node with one end are one node, and its count says so; another end, another
    parent or other ids are another node. What was stored first stays."""
    forest = Forest(2, 2)
    root = forest.add(1, -1, [7, 8])
    a = forest.add(1, root, [1, 2], [-0.5, -0.25], [10, 11])
    assert forest.add(1, root, np.array([1, 2]), [-9, -9], [12, 13]) == a == 1
    others = [forest.add(1, root, [1, 2], end="length"), forest.add(1, root, [1]), forest.add(1, a, [1, 2])]
    assert others == [2, 3, 4] and forest.add(1, root, (1, 2)) == a
    assert forest.count[1, :5].tolist() == [1, 3, 1, 1, 1] and forest.size.tolist() == [0, 5]
    assert forest.children[1] == [[1, 2, 3], [4], [], [], []] and forest.leaves(1) == [2]
    assert forest.logps[1][a].tolist() == [-0.5, -0.25] and forest.slots[1][a].tolist() == [10, 11]
    assert forest.path(1, 4) == [0, 1, 4] and len(forest) == 2
    assert forest.path_of(1, 4, "ids").tolist() == [7, 8, 1, 2, 1, 2]
    assert forest.path_of(1, 4, "ids", root=False).tolist() == [1, 2, 1, 2]
    assert forest.path_of(1, 0, "ids", root=False).tolist() == []
    assert forest.text(1, 4, Letters(), stop_ids={2}) == "BB" and forest.text(1, 0, Letters()) == ""


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_equal_brute_force(seed):
    """Paths, what lies along them, leaves and the counts of right and wrong ends below a node are what
    their definitions say; a tree outgrows its arrays without a trace of it (nodes=1 and nodes=500 give the
    same)."""
    forest, wide = random_forest(seed, nodes=1), random_forest(seed, nodes=500)
    for b in range(len(forest)):
        assert_sound(forest, b)
        assert forest.to_json(b) == wide.to_json(b)
        for name in ARRAYS:                     # unused places stay empty, however often the arrays grew
            kind, empty = forest.arrays[name]
            assert getattr(forest, name).dtype == kind
            assert (getattr(forest, name)[b, forest.size[b]:] == empty).all()
        N = int(forest.size[b])
        for n in range(N):
            nodes = ancestors(forest, b, n)
            assert forest.path(b, n) == nodes
            for what in ("ids", "logps"):
                parts = [x for m in nodes for x in getattr(forest, what)[b][m].tolist()]
                assert forest.path_of(b, n, what).tolist() == parts
        assert forest.leaves(b) == [n for n in range(N) if forest.terminal[b, n]]
        for right in (0, 1):
            ended = [leaf for leaf in forest.leaves(b) if forest.right[b, leaf] == right]
            want = [sum(int(forest.count[b, leaf]) for leaf in ended if n in ancestors(forest, b, leaf))
                    for n in range(N)]
            assert forest.below(b, right).tolist() == want
        assert forest.below(b).tolist() == forest.below(b, 1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_json_round_trip(seed):
    """A tree written as JSON and read back is the same tree but for slots (log-probs to 6 places), and goes
    on merging as the first would have."""
    forest = random_forest(seed)
    text = json.dumps([forest.to_json(b) for b in range(len(forest))])
    again = Forest.from_json(json.loads(text))
    assert len(again) == len(forest) and again.size.tolist() == forest.size.tolist()
    for b in range(len(forest)):
        assert_sound(again, b)
        N = int(forest.size[b])
        for name in ARRAYS:
            one, two = (getattr(f, name)[b, :N] for f in (forest, again))
            assert (one == two).all() and one.dtype == two.dtype, name
        for n in range(N):
            assert forest.ids[b][n].tolist() == again.ids[b][n].tolist()
            assert np.allclose(forest.logps[b][n], again.logps[b][n], atol=1e-6)
            assert again.ids[b][n].dtype == np.int64 and again.logps[b][n].dtype == np.float32
        assert again.known[b] == forest.known[b] and again.to_json(b) == forest.to_json(b)
    assert len(Forest.from_json([])) == 0


JUNK = (None, True, -1, -2, 0, 1, 3, 99, 2 ** 40, 2 ** 70, 0.5, "", "x", "1", [], [1], [[]], {}, [None])


def damage(trees, rng):
    """One change anywhere in the lists of a file of trees: replaced by junk, dropped, cut, doubled or
    swapped."""
    trees = copy.deepcopy(trees)
    place, key = trees, rng.randrange(len(trees))
    while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    how = rng.randrange(5)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place[key], list):
        place[key] = place[key][:rng.randrange(len(place[key]) + 1)]
    elif how == 2 and isinstance(place, list):
        place.insert(key, place[key])
    elif how == 3 and isinstance(place, list):
        other = rng.randrange(len(place))
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = copy.deepcopy(rng.choice(JUNK))
    return trees


def test_damaged_json():
    """Of 3,000 damaged files of trees each is BadInput or gives sound trees (an id or a count may well be
    another one), never another exception."""
    trees = [random_forest(5, adds=8).to_json(b) for b in range(2)]
    rng, refused = random.Random(0), 0
    for i in range(3000):
        broken = damage(trees, rng)
        try:
            forest = Forest.from_json(broken)
        except BadInput as error:
            assert len(str(error)) < 400
            refused += 1
            continue
        except Exception as error:
            pytest.fail(f"damage {i}: {type(error).__name__}: {error}\n{broken}")
        for b in range(len(forest)):
            try:
                assert_sound(forest, b)
            except AssertionError:
                pytest.fail(f"damage {i}: an unsound tree was read from {broken[b]}")
            forest.below(b)
    assert 1000 < refused < 2900


@pytest.mark.parametrize("broken", (None, 3, {}, "trees", [None], [[]], [{}], [{"parent": 3}],
                                    [{"parent": [0]}]))
def test_json_that_is_no_forest(broken):
    """Files of another kind are BadInput, too."""
    with pytest.raises(BadInput):
        Forest.from_json(broken)


def test_split_steps():
    """A step ends after each newline token; the rest, if there is one, is a step; the steps are the whole."""
    one = lambda step: step[-1] == 1
    assert split_steps([5, 1, 5, 5, 1, 1, 7], one) == [(0, 2), (2, 5), (5, 6), (6, 7)]
    assert split_steps([5, 1], one) == [(0, 2)] and split_steps([], one) == []
    assert split_steps([4], lambda step: False) == [(0, 1)]


def test_step_rules():
    """Lines, paragraphs with a formula, so many tokens: by hand on text; what is no rule is refused by name."""
    tokenizer = Tokenizer.bytes_only()
    text = "Take two.\n\n2+2 = 4\nso 4\n\nThat = it\n\nend"
    cut = lambda kind: [text[a:b] for a, b in split_steps(tokenizer.encode(text), step_rule(kind, tokenizer))]
    assert cut("line") == ["Take two.\n", "\n", "2+2 = 4\n", "so 4\n", "\n", "That = it\n", "\n", "end"]
    assert cut("paragraph") == ["Take two.\n\n2+2 = 4\nso 4\n\n", "That = it\n\nend"]
    assert [len(step) for step in cut("16")] == [16, 16, len(text) - 32] and "".join(cut("16")) == text
    for kind in ("sentence", "0", "-1", "", "1.5"):
        with pytest.raises(BadInput, match="a step is a line"):
            step_rule(kind, tokenizer)


@pytest.mark.parametrize("step", ("3", "paragraph"))
def test_steps_that_are_no_lines(step):
    """Whatever a step is, the solution is the same text: sampled step by step by greedy requests, the path is that of
    one whole greedy continuation; it ends where its answer *line* ends, although that line is spread over steps."""
    model = language_model("llama", 0).bind(LETTERS)
    plain = Sampler(model, LETTERS, 16)
    whole, = plain.extend([Request(plain.prompt(PROMPTS[0]), 0, 24)], 0)
    want = LETTERS.decode(whole.ids)
    answer = want.split("\n")[1]                                        # six letters: no step of 3 holds it
    sampler, forest = Sampler(model, LETTERS, 16, 4, lambda line: line.strip() == answer, step), Forest(1)
    plant(forest, 0, sampler, PROMPTS[0])
    steps, n = Steps(forest, sampler, [1], 24, greedy=True), 0
    while not forest.terminal[0, n]:
        steps.submit([(0, n, 1)])
        (_, _, (found,)), = steps.poll()
        n = forest.add(0, n, found.ids, found.logps, found.slots, "" if found.why == "step" else found.why)
    text = forest.text(0, n, LETTERS)
    assert len(answer) == 6 and text == want[:want.index("\n", want.index(answer)) + 1]
    assert forest.end[0, n] == ENDS.index("answer")
    sizes = [len(forest.ids[0][m]) for m in forest.path(0, n)[1:]]
    assert {*sizes[:-1]} == {3} if step == "3" else len(sizes) == 1     # letters hold no formula: one paragraph
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids, newline = rng.integers(0, 6, rng.integers(0, 12)), {0, 3}
        spans = split_steps(ids, lambda step: step[-1] in newline)
        assert [i for a, b in spans for i in range(a, b)] == list(range(len(ids)))
        for a, b in spans:
            assert not newline & {*ids[a:b - 1].tolist()} and (ids[b - 1] in newline or b == len(ids))


# ----------------------------------------------------------------------------------------------------------
# Growing
# ----------------------------------------------------------------------------------------------------------
LETTERS = Letters(newline=range(0, V, 4), eos=(1, 2))
PROMPTS = ([3, 5, 7], [3, 5, 7, 9, 11], [3, 6], [30] * 8)


def grown(kind, chosen, seeds, rounds=((4, 0), (2, 1), (2, 2)), rows=16, most=16, together=True):
    """Trees of PROMPTS, grown at the root and then at open inner nodes; (forest, sampler, leaves by call)."""
    model = language_model(kind, 1).bind(LETTERS)
    sampler, forest, calls = Sampler(model, LETTERS, 16, rows), Forest(len(chosen), 2), []
    for b, i in enumerate(chosen):
        plant(forest, b, sampler, PROMPTS[i])
    for count, depth in rounds:
        wants = []
        for b in range(len(chosen)):
            inner = (forest.depth[b] == depth) & ~forest.terminal[b] & (forest.count[b] > 0)
            wants += [(b, n, count) for n in np.flatnonzero(inner)[:2].tolist()]
        groups = [wants] if together else [[w] for w in wants]
        calls.append((wants, [leaves for g in groups for leaves in grow(forest, sampler, g, seeds, most)]))
    return forest, sampler, calls


@pytest.mark.parametrize("kind", ("llama", "window", "gpt2"))
def test_grown_alone_as_in_a_batch(kind):
    """A tree grown among others, in any number of rows, has the ids, order, counts and ends of the tree
    grown alone. About 300 draws, each within 1e-6 of a likely border with chance 1e-5: a false alarm on
    0.3% of other machines, none here."""
    seeds = [mix(5, i) for i in range(len(PROMPTS))]
    forest = grown(kind, range(4), seeds)[0]
    few = grown(kind, range(4), seeds, rows=3)[0]
    apart = grown(kind, range(4), seeds, together=False)[0]
    skeleton = lambda f, b: {k: v for k, v in f.to_json(b).items() if k != "logps"}
    for i in range(len(PROMPTS)):
        alone = grown(kind, [i], seeds[i:i + 1])[0]
        for other, b in ((alone, 0), (few, i), (apart, i)):
            assert skeleton(other, b) == skeleton(forest, i)
            for one, two in zip(other.logps[b], forest.logps[i]):
                assert np.allclose(one, two, atol=1e-5)
    another = grown(kind, [0], [mix(6, 0)])[0]
    assert skeleton(another, 0) != skeleton(forest, 0)


@pytest.mark.parametrize("kind", ("llama", "window", "gpt2"))
def test_grown_trees(kind):
    """Leaves come in sample order, each the continuation of its own seed (mix of tree's seed, node, number
    of the sample); `drawn` numbers them on; counts are conserved; steps end at newlines; no solution
    exceeds max_tokens; ids, log-probs and slots belong together; no token is encoded twice."""
    most, seeds = 16, [mix(7, i) for i in range(4)]
    forest, sampler, calls = grown(kind, range(4), seeds, most=most)
    asked = np.zeros_like(forest.drawn)
    plain = Sampler(sampler.model, LETTERS, 16)
    ends = set()
    for wants, leaves in calls:
        assert [len(found) for found in leaves] == [count for _, _, count in wants]
        for (b, n, count), found in zip(wants, leaves):
            above, spent = forest.path_of(b, n, "ids").tolist(), len(forest.path_of(b, n, "ids", root=False))
            path = plain.prompt(above)
            requests = [Request(path, mix(seeds[b], n, asked[b, n] + i), most - spent) for i in range(count)]
            for leaf, f in zip(found, plain.extend(requests)):
                assert forest.path_of(b, leaf, "ids").tolist() == above + f.ids.tolist()
                assert forest.terminal[b, leaf] and ENDS[forest.end[b, leaf]] == f.why
                ends.add(f.why)
            asked[b, n] += count
    assert (asked == forest.drawn).all() and ends == {"eos", "length"}
    for b in range(4):
        assert_sound(forest, b)
        for n in range(forest.size[b]):
            through = forest.count[b, n] if n else 0
            below = sum(int(forest.count[b, c]) for c in forest.children[b][n])
            assert below == (0 if forest.terminal[b, n] else through + forest.drawn[b, n])
            ids = forest.ids[b][n].tolist()
            assert sampler.ids[forest.slots[b][n]].tolist() == ids
            if n:
                assert not sampler.newline & {*ids[:-1]}
                assert forest.terminal[b, n] or ids[-1] in sampler.newline
                above = forest.path_of(b, forest.parent[b, n], "ids").tolist()
                assert abs(forest.logps[b][n] - log_probs(sampler.model, above, ids)).max() < 1e-4
        for leaf in forest.leaves(b):
            length = len(forest.path_of(b, leaf, "ids", root=False))
            assert length <= most and (ENDS[forest.end[b, leaf]] != "length" or length == most)
            assert (ENDS[forest.end[b, leaf]] == "eos") == (forest.ids[b][leaf][-1] in (1, 2))
    c = sampler.counts
    assert c["prompt"] == distinct(PROMPTS) and c["processed"] <= c["prompt"] + c["sampled"]


def test_growing_again_goes_on():
    """Six samples in one call, or in calls of two and four, are the same tree; so is one put together from
    wants that name a node twice. Another temperature is another tree, 0 a single path."""
    model = language_model(seed=2).bind(LETTERS)
    def tree(parts, temperature=1.0):
        sampler, forest, seen = Sampler(model, LETTERS, 16), Forest(1), []
        plant(forest, 0, sampler, [3, 4])
        for wants in parts:
            grow(forest, sampler, wants, [mix(1)], 25, temperature, seen.append)
        assert sum(seen) == sampler.counts["sampled"]
        return {k: v for k, v in forest.to_json(0).items() if k != "logps"}
    six = tree([[(0, 0, 6)]])
    assert six["drawn"][0] == 6
    assert six == tree([[(0, 0, 2)], [(0, 0, 4)]]) == tree([[(0, 0, 5), (0, 0, 1)]])
    assert six != tree([[(0, 0, 6)]], 0.7)
    greedy = tree([[(0, 0, 6)]], 0)
    steps = len(greedy["parent"]) - 1
    assert greedy["count"][1:] == [6] * steps and greedy["parent"] == [*range(-1, steps)]


# ----------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_pack_equals_brute_force(seed):
    """A packed row holds the chosen nodes and their ancestors, each once, in order of birth; position,
    before and sees are what the tokens of each path, written out one by one, say."""
    forest, rng = random_forest(seed), np.random.default_rng(seed)
    for b in range(len(forest)):
        N = int(forest.size[b])
        for chosen in ([0], [N - 1], list(range(N)), rng.choice(N, min(N, 4)).tolist()):
            p = pack(forest, b, chosen)
            keep = sorted({m for n in chosen for m in ancestors(forest, b, n)})
            assert p.place == {n: i for i, n in enumerate(keep)}
            tokens = [(n, k) for n in keep for k in range(len(forest.ids[b][n]))]       # k-th token of n
            column = {token: t for t, token in enumerate(tokens)}
            assert all(len(x) == len(tokens) for x in (p.ids, p.position, p.before, p.node))
            for t, (n, k) in enumerate(tokens):
                path = [(m, j) for m in ancestors(forest, b, n) for j in range(len(forest.ids[b][m]))]
                depth = path.index((n, k))
                assert p.ids[t] == forest.ids[b][n][k] and p.node[t] == p.place[n]
                assert p.position[t] == depth
                assert p.before[t] == (column[path[depth - 1]] if depth else -1)
            want = [[m in ancestors(forest, b, n) for m in keep] for n in keep]
            assert p.sees.dtype == bool and p.sees.tolist() == want


@pytest.mark.parametrize("kind", ("llama", "window", "gpt2"))
def test_packed_equals_separate_rows(kind):
    """Hidden states of all tokens, and log-probs of all wanted ones, of three trees in one padded batch
    equal those of every path in a row of its own, to 1e-5 in fp32 (relative for hidden states); a loss sees
    nothing else."""
    model = language_model(kind, 3).bind(Letters(V - 3, holes=(9,)))
    forest = random_forest(2, trees=3, adds=25, ids=V - 3)
    lengths = [len(forest.path_of(b, n, "ids")) for b in range(3) for n in range(forest.size[b])]
    assert max(lengths) > 12                                            # well beyond the window of 5
    rows = []
    for b in range(3):
        N = int(forest.size[b])
        forks = [k for k in forest.children[b] if len(k) > 1]
        rows.append(tree_row(forest, b, [Pair([k[0]], [k[1]]) for k in forks], range(N) if b != 1 else ()))
    batch = collate(rows, "cpu")
    with torch.no_grad():
        hidden = model(batch.ids, batch.position, batch.mask)
        logps = tree_log_probs(model, batch)
    assert torch.isfinite(hidden).all()
    for b, row in enumerate(rows):
        wanted = set(row.imitate) | {n for p in row.pairs for n in p.chosen + p.rejected}
        assert wanted and (b == 1 or wanted == {*range(1, int(forest.size[b]))})
        for n, i in row.packed.place.items():
            ids, size = forest.path_of(b, n, "ids").tolist(), len(forest.ids[b][n])
            columns = np.flatnonzero(row.packed.node == i)
            with torch.no_grad():
                alone = model(torch.tensor([ids]))[0, -size:]
            assert (hidden[b, columns] - alone).abs().max() < 1e-5 * (1 + alone.abs().max())
            found = logps[b, columns].numpy()
            if n not in wanted:
                assert (found == 0).all()
                continue
            there = np.array([token != 9 for token in ids[-size:]])             # 9 is a hole: never sampled
            want = log_probs(model, ids[:-size], ids[-size:])
            assert np.isneginf(found[~there]).all() and np.isneginf(want[~there]).all()
            assert np.allclose(found[there], want[there], rtol=0, atol=1e-5)
        assert (logps[b, len(row.packed.ids):] == 0).all()                      # padding


# ----------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------
class Plain:
    """Ids are code points; `~` ends a text."""

    def decode_more(self, ids):
        return "".join(map(chr, ids))


def small_tree():
    forest, write = Forest(1), lambda text: [ord(c) for c in text]
    forest.add(0, -1, write("2*3+1?"))
    right, lost = ("2*3=6 : 6+1\n", "6+1=7 : 7\n", "#### 7~"), ("3+1=4 : 2*4\n", "2*4=8 : 8\n", "#### 8~")
    cut = ("2*3=6 : 6+1\n", "6+6+6+6")
    for steps, good, end in ((right, 1, "eos"), (lost, 0, "eos"), (right, 1, "eos"), (cut, 0, "length"),
                             (lost, 0, "eos"), (right, 1, "eos")):
        n = 0
        for i, step in enumerate(steps):
            n = forest.add(0, n, write(step), end=end if i == len(steps) - 1 else "")
        forest.right[0, n] = good
    return forest


def test_draw_is_printable():
    """A model may write anything: nothing that moves the cursor or clears the screen reaches the terminal."""
    tokenizer, forest = Tokenizer.bytes_only(), Forest(1)
    forest.add(0, -1, tokenizer.encode("1+1?"))
    forest.add(0, 0, tokenizer.encode("\x1b[2J 2\r3 \u6c34\n"), end="eos")
    text = draw(forest, 0, tokenizer)
    assert "\ufffd[2J 2\ufffd3 \u6c34" in text and all(c.isprintable() or c == "\n" for c in text)


def test_draw():
    """The exact text of one small tree: ends are marked right and wrong, the cut one and the pit are named,
    the more visited branch comes first. What does not fit the limit is counted, long lines are cut."""
    forest = small_tree()
    pit = forest.children[0][0][1]
    assert draw(forest, 0, Plain(), pits=[pit], stop_ids={ord("~")}, width=60).split("\n") == [
        "2*3+1?                          6 samples  3 right below",
        "+- 2*3=6 : 6+1                  x4  3 right below",
        "|  +- 6+1=7 : 7                 x3  3 right below",
        "|  |  `- #### 7                 x3  RIGHT",
        "|  `- 6+6+6+6                   x1  wrong  (cut at the length limit)",
        "`- 3+1=4 : 2*4                  x2   <== FIRST PIT: no branch from here was right",
        "   `- 2*4=8 : 8                 x2",
        "      `- #### 8                 x2  wrong"]
    short = draw(forest, 0, Plain(), stop_ids={ord("~")}, width=12, limit=2).split("\n")
    assert short[1].startswith("+- 2*3=6 : ~") or short[1].startswith("`- 2*3=6 : ~")
    assert short[-1] == "... and 4 more nodes" and len(short) == 5
    assert draw(forest, 0, Plain(), pits=[pit], limit=1).count("FIRST PIT") == 1    # a pit is always shown
    lone = Forest(1)
    lone.add(0, -1, [10])
    assert draw(lone, 0, Plain(), width=20) == "(empty)     0 samples"
    lone.add(0, 0, [65])
    assert "`- A" in draw(lone, 0, Plain(), width=20)                   # a search that was cut before any end
