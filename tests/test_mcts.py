"""Trees, files, growing, packing, drawing. Oracles: definitions written as loops over paths, plain
forwards of every path on its own, a tree grown alone, the exact text of one drawn tree."""
import json

import numpy as np
import pytest
import torch

import mcts
from dpo import log_probs, tree_row
from mcts import (NOTHING, StepSampler, Tree, draw, from_json, grow, pack, page, record_grade,
                  to_json)
from model import BadInput, Request, Sampler, mix
from test_model import Letters, V, language_model, plain_log_probs

KINDS = ("llama", "window", "gpt2")
PROMPTS = ([3, 5, 7], [3, 5, 7, 9, 11], [3, 6], [30] * 8)

def letters():
    """One letter an id; every fourth is a newline."""
    return Letters(eos=(1, 2), texts=dict.fromkeys(range(0, V, 4), "\n"))

def random_tree(seed, adds=60):
    """A tree of short random steps, many of them equal; some ends are graded."""
    rng = np.random.default_rng(seed)
    tree = Tree(f"question {seed}", seed, rng.integers(0, V, rng.integers(1, 6)))
    for _ in range(rng.integers(2, adds)):
        parent = rng.choice([node for node in tree.nodes if not node.ended])
        step = rng.integers(0, rng.choice((2, V)), rng.integers(1, 4))
        end = str(rng.choice(["", "eos", "answer", "length"], p=(0.7, 0.1, 0.1, 0.1)))
        node = tree.add(parent, step, -rng.random(len(step)), NOTHING, end)
        node.asked, node.visits = int(rng.integers(0, 5)), int(rng.integers(0, 5))
        node.value_sum = float(rng.random() * node.visits)
        if end and rng.random() < 0.7:
            record_grade(node, rng.random() < 0.5)
    return tree

def ancestors(node):
    """Root to node, by the definition."""
    return (ancestors(node.parent) if node.parent else []) + [node]

def assert_sound(tree):
    """What every tree must be: one root, parents born before, no two equal siblings."""
    for index, node in enumerate(tree.nodes):
        assert node.index == index and node.tree is tree and (node.parent is None) == (index == 0)
        assert index == 0 or node.parent.index < index
        assert node.children == [other for other in tree.nodes if other.parent is node]
        assert node.ended in ("", "eos", "answer", "length")
        steps = [(tuple(child.ids), child.ended) for child in node.children]
        assert len(steps) == len(set(steps))

def skeleton(tree):
    """A tree without its log-probs, which are equal up to rounding only."""
    saved = to_json(tree)
    for row in saved["nodes"]:
        del row["logps"]
    return saved

def test_equal_steps_merge():
    """Equal ids with one parent and end are one node; equal keys too; what came first stays."""
    tree = Tree(None, 0, [7, 8])
    a = tree.add(tree.root, [1, 2], [-0.5, -0.25], [10, 11])
    assert tree.add(tree.root, np.array([1, 2]), [-9, -9], [12, 13]) is a and a.count == 2
    others = [tree.add(tree.root, [1, 2], NOTHING, NOTHING, "length"),
              tree.add(tree.root, [1], NOTHING, NOTHING), tree.add(a, [1, 2], NOTHING, NOTHING)]
    assert [node.index for node in others] == [2, 3, 4] and tree.ends() == others[:1]
    assert a.slots.tolist() == [10, 11] and others[2].solution().tolist() == [1, 2, 1, 2]
    b = tree.add(tree.root, [5], [-1.0], NOTHING, key="5")
    assert tree.add(tree.root, [6, 5], [-1, -1], NOTHING, key="5") is b and b.ids.tolist() == [5]
    assert tree.add(tree.root, [6, 5], [-1, -1], NOTHING) is b and b.count == 3

def test_long_chains():
    """1,500 unvisited steps: Q is the root's, printing a node prints no tree, all can be drawn."""
    tree = Tree(None, 0, [1])
    for i in range(1500):
        last = tree.add(tree.nodes[-1], [i % V], [-1.0], NOTHING)
    mcts.backup(tree.root, 0.5)
    assert last.q == 0.5 and len(repr(last)) < 500 and len(last.path()) == 1501
    assert draw(tree, str).count("\n") < 43
    assert draw(tree, lambda node: "x" * 99, limit=2000, width=9999).count("x" * 99) == 1501

@pytest.mark.parametrize("seed", range(4))
def test_json_round_trip(seed):
    """A tree read back is the same but for slots; fields that an older file lacks get defaults."""
    tree = random_tree(seed)
    saved = json.loads(json.dumps(to_json(tree)))
    again = from_json(saved, "q")
    assert_sound(again)
    assert to_json(again) == saved and again.question == "q"
    for node in tree.nodes:                                 # counts, by their definitions
        ends = [end for end in tree.ends() if node in ancestors(end)]
        assert node.rights == sum(end.rights for end in ends)
    for node in tree.nodes[1:]:                             # equal steps are found again
        parent = again.nodes[node.parent.index]
        again.add(parent, node.ids, node.logps, NOTHING, node.ended, key="k")
    assert len(again.nodes) == len(tree.nodes)
    for row in saved["nodes"]:
        del row["tried"], row["value_squares"], row["score"]
    assert all(node.tried == 0 and node.score is None for node in from_json(saved, "q").nodes)

def test_damaged_json():
    """Whatever is dropped from a saved tree or put into it: BadInput or a sound tree."""
    text, refused = json.dumps(to_json(random_tree(5, adds=8))), 0
    junk = (None, True, -1, 99, 2 ** 70, 0.5, "", "x", [], [1], [[]], [None], {})
    places = [(None, key) for key in ("seed", "tokens", "nodes")] + [
        (2, key) for key in ("ids", "logps", "parent", "end", "visits", "score", "right")]
    for number, key in places:
        for value in junk:
            saved = json.loads(text)
            (saved if number is None else saved["nodes"][number])[key] = value
            try:
                assert_sound(from_json(saved, None))
            except BadInput as error:
                refused += 1
                assert key in str(error) or "the same step" in str(error) or key == "nodes"
    assert 60 < refused < len(places) * len(junk)
    saved = json.loads(text)
    for damaged in (None, 3, [], {}, saved | dict(nodes=saved["nodes"] + saved["nodes"][-1:])):
        with pytest.raises(BadInput):
            from_json(damaged, None)

def grown(kind, chosen, rows=16, searched=False):
    """Trees of PROMPTS, sampled at the root and at two children, or searched (an end is worth the
    parity of its length): (trees, sampler, the first ends)."""
    sampler = Sampler(language_model(kind), letters(), 16, rows)
    trees = [Tree(i, mix(5, i), PROMPTS[i], sampler.prompt(PROMPTS[i])) for i in chosen]
    if searched:
        parity = lambda ends: [(-1.0) ** len(end.solution()) for end in ends]
        go_on, width = mcts.commit_every(4), mcts.fixed_width(4, 2)
        mcts.search(trees, StepSampler(sampler, 16), parity, go_on, width=width)
        return trees, sampler, []
    ends = grow(sampler, [(tree.root, 4) for tree in trees], 16)
    inner = [[node for node in tree.root.children if not node.ended][:2] for tree in trees]
    grow(sampler, [(node, 2) for nodes in inner for node in nodes], 16)
    return trees, sampler, ends

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("searched", (False, True))
def test_grown_alone_as_in_a_batch(kind, searched):
    """A tree in a batch is the tree grown alone; each sample continues with its own seed. What
    sampling wrote down for each token is its log-prob in the whole text."""
    trees, sampler, ends = grown(kind, range(4), 5, searched)
    counts = sampler.counts.copy()
    for i in (1, 3):
        assert skeleton(grown(kind, [i], 3 + i, searched)[0][0]) == skeleton(trees[i])
    plain = Sampler(sampler.model, letters(), 16)
    for number, end in enumerate(ends):                  # four samples of each root, in order
        root = end.tree.root
        request = Request(plain.prompt(root.ids), mix(root.tree.seed, 0, number % 4), 16)
        sample, = plain.extend([request])
        assert end.solution().tolist() == sample.ids.tolist() and end.ended == sample.why
    for tree in trees:
        assert_sound(tree)
        assert tree.search_from.ended if searched else tree.search_from is tree.root
        for node in tree.nodes[1:]:
            below = sum(child.count for child in node.children)
            passed = 0 if node.ended or searched else node.count          # samples that went on
            assert below == passed + node.asked                         # counts add up
            assert node.ended or node.ids[-1] in sampler.newline
            assert not sampler.newline & {*node.ids[:-1].tolist()}
            ids = [*tree.root.ids, *node.solution()]
            assert abs(node.logps - plain_log_probs(sampler.model, ids, len(node.ids))).max() < 1e-4
    assert counts["encoded"] <= counts["prompt"] + counts["sampled"]
    assert counts["sampled"] == sum(tree.tokens for tree in trees)

def test_growing_goes_on_also_from_a_file():
    """Six samples in one call, in two calls, and across a file are the same tree."""
    sampler = Sampler(language_model(seed=2), letters(), 16)
    six, parts = (Tree("q", 1, [3, 4], sampler.prompt([3, 4])) for _ in range(2))
    grow(sampler, [(six.root, 6)], 25)
    grow(sampler, [(parts.root, 2), (parts.root, 1)], 25)
    loaded = from_json(to_json(parts), "q")
    with pytest.raises(ValueError, match="slots"):
        grow(sampler, [(loaded.root, 3)], 25)
    for node in loaded.nodes:
        above = np.concatenate([NOTHING, *(step.slots for step in node.path()[:-1])])
        node.slots = sampler.follow(above, node.ids)[len(above):]
    for tree in (parts, loaded):
        grow(sampler, [(tree.root, 3)], 25)
        assert skeleton(tree) == skeleton(six)

def test_growing_refuses_what_would_hang_or_overwrite():
    """No steps, a node that waits, a sampler in use and a full solution are a clear ValueError."""
    refused = lambda why: pytest.raises(ValueError, match=why)
    sampler = Sampler(language_model(), letters(), 16)
    tree = Tree("q", 1, [3, 4], sampler.prompt([3, 4]))
    steps = StepSampler(sampler, 12)
    with refused("0 steps"):
        steps.ask(tree.root, 0)
    steps.ask(tree.root, 2)
    with refused("waits"):
        steps.ask(tree.root, 2)
    with refused("search"):
        grow(sampler, [(tree.root, 1)], 12)
    assert steps.answers() == [tree.root] and sum(n.count for n in tree.root.children) == 2
    end, = grow(sampler, [(tree.root, 1)], 12)
    for node, most in ((end, 99), (end.path()[1], len(end.path()[1].ids))):
        with refused("tokens"):
            grow(sampler, [(node, 1)], most)

def test_a_search_obeys_max_tokens():
    """A step that uses up the tokens is an end, "length", even if it ends with a newline."""
    sampler = Sampler(language_model(), letters(), 16)
    trees = [Tree("q", seed, [3, 4], sampler.prompt([3, 4])) for seed in range(20)]
    mcts.search(trees, StepSampler(sampler, 5), lambda nodes: [0.0] * len(nodes), mcts.until(6))
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    full = [node for node in nodes if len(node.solution()) >= 5]
    assert all(len(node.solution()) == 5 and node.ended for node in full)
    assert any(node.ended == "length" and node.ids[-1] in sampler.newline for node in full)

@pytest.mark.parametrize("seed", range(4))
def test_pack_equals_brute_force(seed):
    """Position, before and unseen are what each path, written out token by token, says."""
    tree, rng = random_tree(seed), np.random.default_rng(seed)
    below = lambda node: [node, *(step for child in node.children for step in below(child))]
    for chosen in ([tree.root], tree.nodes[-1:], tree.nodes, rng.choice(tree.nodes, 3)):
        packed = pack(chosen)
        keep = {a for node in chosen for a in ancestors(node)}
        tokens = [(a, k) for a in below(tree.root) if a in keep for k in range(len(a.ids))]
        column = {token: t for t, token in enumerate(tokens)}
        s, sees = np.arange(len(tokens)), np.zeros((len(tokens), len(tokens)), bool)
        for t, (node, k) in enumerate(tokens):
            path = [(a, j) for a in ancestors(node) for j in range(len(a.ids))]
            depth = path.index((node, k))
            assert packed.ids[t] == node.ids[k] and packed.position[t] == depth
            assert packed.before[t] == (column[path[depth - 1]] if depth else -1)
            assert packed.span[node].start + k == t
            sees[t, [column[token] for token in path[:depth + 1]]] = True
        assert (sees == ((s <= s[:, None]) & (s[:, None] < packed.unseen))).all()

@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate_rows(kind):
    """Log-probs of packed trees are those of every path in a row of its own, to 1e-5."""
    model, trees = language_model(kind, 3), [random_tree(seed, adds=40) for seed in range(3)]
    rows = [tree_row(also=tree.nodes) for tree in trees]
    assert max(rows[2].packed.position) > 8                     # beyond the window of 5
    for tree, row, logps in zip(trees, rows, log_probs(model, rows)):
        for node in tree.nodes[1:]:
            want = plain_log_probs(model, [*tree.root.ids, *node.solution()], len(node.ids))
            assert np.allclose(logps[row.packed.span[node]], want, rtol=0, atol=1e-5)

def small_tree():
    """Two solutions, one right; ids are code points. (tree, text, pit)"""
    tree = Tree("q", 0, list(b"2*3+1?"))
    for steps, right in ((("2*3=6", "#### 7"), True), (("3+1=4", "#### 8"), False)):
        node = tree.root
        for step in steps:
            end = "eos" if step.startswith("#") else ""
            node = tree.add(node, list(step.encode()), [-1.0] * len(step), NOTHING, end)
        record_grade(node, right)
    mcts.backup(tree.ends()[0], 1.0)
    return tree, lambda node: "".join(map(chr, node.ids)), tree.nodes[3]

def test_steps_go_on_where_they_stopped():
    """A step knows the unfinished line before it, and is sampled at the search's temperature."""
    sampler = Sampler(language_model(), letters(), 16)
    tree = Tree("q", 1, [3, 4], sampler.prompt([3, 4]))
    slots = sampler.follow(tree.root.slots, [5, 8, 9])[2:]
    node = tree.add(tree.root, [5, 8, 9], [-1.0] * 3, slots)            # "F\nJ"
    assert mcts.requests(node, 1, 9, sampler)[0].line == "J"
    steps = StepSampler(sampler, 12, temperature=0)
    steps.ask(node, 4)
    assert steps.answers() == [node] and len(node.children) == 1

def test_draw_and_page():
    """The exact text of a small tree; long trees say what they hide. Nothing that a model wrote
    acts on terminal or browser, and a page loads nothing."""
    tree, text, pit = small_tree()
    tree.chosen = tree.nodes[:3]
    lines = draw(tree, text, [pit]).split("\n")
    assert lines[:-1] == [
        "2*3+1?          N 1 Q +1.00  <- chosen", "+- 2*3=6      x1  N 1 Q +1.00  <- chosen",
        "|  `- #### 7  x1  N 1 Q +1.00  RIGHT  <- chosen", "`- 3+1=4      x1  <== FIRST PIT",
        "   `- #### 8  x1  wrong"]
    assert all(letter in lines[-1] for letter in ("x =", "N =", "Q =")) and "P =" not in lines[-1]
    assert " P 0." in draw(tree, text, prior=True)
    narrow = draw(tree, text, width=6).split("\n")      # the question is not cut
    assert narrow[0].startswith("2*3+1?  ") and narrow[1].startswith("+- ...  x1")
    assert "... and 2 more steps" in draw(tree, text, limit=3)
    evil = draw(tree, lambda node: "\x1b[2J\r3 \u202e\u6c34\n")
    assert all(c.isprintable() or c == "\n" for c in evil) and "\u6c34" in evil
    html = page("<script>\x1b", ["<p>part"])
    assert html.endswith("&lt;script&gt; </h1>\n<p>part") and "<script" not in html
    assert not any(x in html for x in ("http", "src=", "href=", "url("))

def test_show(tmp_path, capsys):
    """--show draws a saved tree; what is wrong with file or flags is one sentence, exit code 2."""
    def refused(*flags):
        """The sentence."""
        assert mcts.main([*flags]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
        return error
    tree, text, pit = small_tree()
    tree.chosen = tree.nodes[:2]
    row = to_json(tree) | dict(text="q", pits=[pit.index], step_texts=[*map(text, tree.nodes)])
    file, html = tmp_path / "trees.jsonl", tmp_path / "tree.html"
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(3)), encoding="utf-8")
    assert mcts.main(["--show", str(file), "--question", "2", "--html", str(html)]) == 0
    assert capsys.readouterr().out == draw(tree, text, [pit]) + "\n"
    assert "&lt;== FIRST PIT" in html.read_text(encoding="utf-8")
    assert "0 to 2" in refused("--show", str(file), "--question", "3")
    for flags in (["--question", "x"], ["--rule", "x"], ["--wrong"], ["--show"], ["--html", "x"]):
        assert flags[0] in refused(*flags)
    for damaged in ("", "{\n", json.dumps(row | dict(step_texts=["x"])), "3",
                    json.dumps(row | dict(pits=[9])), json.dumps(row | dict(nodes=[3]))):
        file.write_text(damaged, encoding="utf-8")
        refused("--show", str(file))
    refused("--show", str(tmp_path / "nowhere"))
    assert mcts.main([]) == 0 and "add up" in capsys.readouterr().out
