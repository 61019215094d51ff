"""Search against a recursive reference, on random games, with scrambled answers, and on games with known values.

Oracles: `Reference`, thirty lines of recursion with a dictionary a node; exhaustive values of toy games; the sum of
returns recomputed from the ends that were reached. Returns are multiples of 1/8, so float64 sums are exact and
"equal" means equal. Seeds are fixed: no chance but rounding of logits where a network is asked."""
import hashlib
import json
import math
import random
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mcts  # noqa: E402
from mcts import Direct, Forest, Steps, backup, best_child, count_prior, draw, fixed_width, grow  # noqa: E402
from mcts import length_prior  # noqa: E402
from mcts import page, plant, puct, search, select, uct  # noqa: E402
from model import BadInput, Continuation, Sampler, Tokenizer, mix, write_text  # noqa: E402
from test_mcts import LETTERS, PROMPTS, Plain, assert_sound  # noqa: E402
from test_model import language_model  # noqa: E402


def dice(*parts):
    """A random generator that depends on `parts` alone."""
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


class Game:
    """A random game: a position is its path of moves (tuples of ids); how many moves there are, which repeat, where
    it ends and what an end is worth follow from the path and the seed."""

    def __init__(self, seed, depth=5):
        self.seed, self.depth = seed, depth

    def moves(self, path, count):
        """`count` sampled moves with log-probs, exact duplicates among them: [(ids, log-probs, end)]."""
        rng, kinds = dice(self.seed, path), []
        for _ in range(rng.randint(1, 4)):
            ids = tuple(rng.randrange(9) for _ in range(rng.randint(1, 3)))
            end = len(path) + 1 >= self.depth or rng.random() < 0.2
            kinds.append((ids, tuple(-rng.randrange(1, 9) / 8 for _ in ids), "answer" if end else "step"))
        return [rng.choice(kinds) for _ in range(count)]

    def value(self, path):
        """In -1, -7/8 ... 1."""
        return dice(self.seed, "value", path).randint(-8, 8) / 8


def path_in(forest, b, n):
    return tuple(tuple(forest.ids[b][m].tolist()) for m in forest.path(b, n)[1:])


class Scrambled(Direct):
    """Answers some of what was asked, in any order, later: like rows that finish when they finish."""

    def __init__(self, forest, propose, rng):
        super().__init__(forest, propose)
        self.rng = rng

    def poll(self):
        self.rng.shuffle(self.asked)
        now = self.rng.randint(1, len(self.asked))
        asked, self.asked = self.asked[:now], self.asked[now:]
        return [(b, n, self.propose(self.forest, b, n, count)) for b, n, count in asked]


def test_enough_ends_one_tree_alone():
    """`enough` is asked after each simulation of each tree and ends that tree; the other one goes on as if alone."""
    asked = []
    forest, _ = play([Game(1), Game(2)], 20, enough=lambda b: asked.append(b) or (b == 0 and asked.count(0) == 3))
    alone, _ = play([Game(1), Game(2)], 20)
    assert forest.visits[:, 0].tolist() == [3, 20] and asked.count(1) == 20
    n = int(alone.size[1])
    assert n == forest.size[1] and (forest.visits[1, :n] == alone.visits[1, :n]).all()


def play(games, simulations, proposer=Direct, **how):
    """Search games with the arrays; (forest, committed paths)."""
    forest = Forest(len(games), 2)
    for b in range(len(games)):
        forest.add(b, -1, [0])

    def propose(forest, b, n, count):
        return [Continuation(np.array(ids), np.array(logps), np.array([]), end)
                for ids, logps, end in games[b].moves(path_in(forest, b, n), count)]
    asked = set()

    def evaluate(forest, ends):
        assert len({*ends}) == len(ends) and not asked & {*ends}        # no node is evaluated twice
        asked.update(ends)
        return [games[b].value(path_in(forest, b, n)) for b, n in ends]
    return forest, search(forest, proposer(forest, propose), evaluate, simulations, **how)


class Reference:
    """The search written again, one game, recursively."""

    def __init__(self, game, simulations, c, to_terminal, score, width, commit):
        self.game, self.c, self.to_terminal, self.score, self.width = game, c, to_terminal, score, width
        node = self.node((), (), 1.0, False)
        self.root, above, self.path = node, [], [()]
        while True:
            for _ in range(simulations):
                value = self.simulate(node)
                for x in above:
                    x["N"], x["W"] = x["N"] + 1, x["W"] + value
            while any(k["N"] for k in node["kids"]):
                above.append(node)
                node = max(node["kids"], key=lambda k: (k["N"], k["W"] / max(k["N"], 1)))      # max: the first
                self.path.append(node["path"])
                if commit and not node["end"]:
                    break
            if node["end"] or not commit:
                return

    def node(self, path, logps, prior, end):
        return dict(path=path, P=prior, end=end, N=0, W=0.0, kids=[], count=0)

    def simulate(self, s):
        if s["end"]:
            value = self.game.value(s["path"])
        elif not s["kids"] and not self.to_terminal and s["N"] == 0 and s["path"]:
            value = self.game.value(s["path"])
        else:
            if not s["kids"]:
                for ids, logps, end in self.game.moves(s["path"], self.width[len(s["path"]) > 0]):
                    kid = next((k for k in s["kids"] if k["path"][-1] == ids and k["end"] == (end != "step")), None)
                    if kid is None:
                        prior = math.exp(sum(logps) / len(ids) ** 1.25)
                        kid = self.node(s["path"] + (ids,), logps, prior, end != "step")
                        s["kids"].append(kid)
                    kid["count"] += 1
            mean = s["W"] / s["N"] if s["N"] else 0.0
            value = self.simulate(max(s["kids"], key=lambda k: self.score(
                k["W"] / k["N"] if k["N"] else mean, k["P"], s["N"], k["N"], self.c)))
        s["N"], s["W"] = s["N"] + 1, s["W"] + value
        return value

    def nodes(self, s=None):
        s = s or self.root
        return [s] + [x for k in s["kids"] for x in self.nodes(k)]


def ref_puct(q, p, above, n, c):
    return q + c * p * math.sqrt(max(above, 1)) / (1 + n)


def ref_uct(q, p, above, n, c):
    return q + c * math.sqrt(2 * math.log(max(above, 1)) / n) if n else math.inf


WAYS = [dict(c=c, to_terminal=end, select=score, commit=commit)
        for c in (0.0, 0.5, 2.0) for end in (False, True) for score in ("puct", "uct") for commit in (False, True)]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.values())))
def test_equals_the_recursive_reference(way):
    """24 ways of searching x 84 random games (2,016 in all): every N, W, P, count and the committed path are those of
    the recursion, exactly; answers come in any order and games share the batch."""
    games = [Game(seed, depth=2 + seed % 5) for seed in range(84)]
    for simulations in (1, 4, 13):
        group = games[simulations % 3::3]
        rng = random.Random(simulations)
        forest, paths = play(group, simulations, lambda f, p: Scrambled(f, p, rng), width=fixed_width(5, 3),
                             **way | dict(select=getattr(mcts, way["select"])))
        for b, game in enumerate(group):
            ref = Reference(game, simulations, way["c"], way["to_terminal"], globals()["ref_" + way["select"]], (5, 3),
                            way["commit"])
            assert_sound(forest, b)
            nodes = {(str(x["path"]), bool(x["end"])): x for x in ref.nodes()}
            assert int(forest.size[b]) == len(nodes) == len(ref.nodes())
            for n in range(int(forest.size[b])):
                same = nodes[str(path_in(forest, b, n)), bool(forest.terminal[b, n])]
                assert forest.visits[b, n] == same["N"] and forest.value_sum[b, n] == same["W"]
                assert n == 0 or (forest.count[b, n] == same["count"] and abs(forest.prior[b, n] - same["P"]) < 1e-6)
            assert [path_in(forest, b, n) for n in paths[b]] == ref.path


@pytest.mark.parametrize("to_terminal", (False, True))
def test_invariants(to_terminal):
    """Visits are conserved (N(s) = sum N(children), + 1 where a node was evaluated at birth), W is the sum of the
    returns of the simulations through a node, min <= Q <= max of what lies below, terminals have no children."""
    forest, _ = play([Game(s) for s in range(40)], 25, c=1.0, to_terminal=to_terminal)
    for b in range(40):
        N = int(forest.size[b])
        W = np.zeros(N)
        for n in range(N - 1, -1, -1):
            kids = forest.children[b][n]
            own = forest.visits[b, n] - forest.visits[b, kids].sum()
            assert not (forest.terminal[b, n] and kids)
            if not forest.terminal[b, n]:
                assert own == (0 if to_terminal or n == 0 or forest.visits[b, n] == 0 else 1)
            W[n] = W[kids].sum() + (own * forest.score[b, n] if own else 0)
        assert (W == forest.value_sum[b, :N]).all() and forest.visits[b, 0] == 25
        seen = forest.visits[b, :N] > 0
        q = forest.value_sum[b, :N][seen] / forest.visits[b, :N][seen]
        assert (q >= np.nanmin(forest.score[b, :N])).all() and (q <= np.nanmax(forest.score[b, :N])).all()


def test_batch_equals_alone():
    """A game searched among 30 others with answers in any order is, array by array, the game searched alone."""
    games = [Game(s) for s in range(30)]
    for way in (dict(to_terminal=True, commit=True), dict(), dict(budget=12)):
        rng = random.Random(4)
        forest, paths = play(games, 9, lambda f, p: Scrambled(f, p, rng), **way)
        for b in (0, 7, 29):
            alone, path = play([games[b]], 9, **way)
            assert alone.to_json(0) == forest.to_json(b) and path[0] == paths[b]


def test_budget():
    """A simulation begins only while what was sampled plus twice the mean cost so far fits the budget; then the rest
    of the path is committed as it is. More budget never means fewer simulations."""
    tokens = lambda f: sum(len(f.ids[0][n]) * int(f.count[0, n]) for n in range(1, int(f.size[0])))
    done = []
    for budget in (1, 8, 14, 20, 10 ** 6):
        forest, paths = play([Game(3)], 50, budget=budget, width=fixed_width(2, 2))
        n = int(forest.visits[0, 0])
        fits = lambda k: tokens(play([Game(3)], k, width=fixed_width(2, 2))[0]) * (1 + 2 / k) <= budget
        assert n == next((k for k in range(1, 50) if not fits(k)), 50)
        assert len(paths[0]) >= 2 and best_child(forest, 0, paths[0][-1]) is None
        done.append(n)
    assert done == sorted(done) and done[0] == 1 and done[-1] == 50 and len({*done}) >= 4


def test_choice_by_hand():
    """The example of `select`'s docstring; c = 0 is argmax Q with ties to the lowest index; the bonus of a child falls
    in its own N and rises in its parent's; uct visits everyone once first."""
    forest = Forest(1)
    forest.add(0, -1, [0])
    for i in range(3):
        forest.add(0, 0, [i + 1])
    forest.prior[0, 1:4] = 0.4, 0.4, 0.2
    for n, value in ((1, 1.0), (1, 0.5), (2, 0.0)):
        backup(forest, np.array([0]), np.array([n]), np.array([value]))
    assert forest.visits[0, :4].tolist() == [3, 2, 1, 0] and forest.value_sum[0, :4].tolist() == [1.5, 1.5, 0, 0]
    at = lambda score, c: select(forest, np.array([0]), np.array([0]), score, c).tolist()
    assert at(puct, 1.0) == [1] and at(puct, 0.0) == [1] and at(uct, 1.0) == [3]
    s = puct(np.array([.75, 0, .5]), forest.prior[0, 1:4], np.array([3]), np.array([2, 1, 0]), 1.0)
    assert np.round(s, 2).tolist() == [.98, .35, .85]
    assert puct(0, .5, np.array(9), 2, 1) < puct(0, .5, np.array(9), 1, 1) < puct(0, .5, np.array(16), 1, 1)
    forest.value_sum[0, :4] = 0.0
    assert at(puct, 0.0) == [1]
    assert best_child(forest, 0, 0) == 1 and best_child(forest, 0, 3) is None
    forest.count[0, 1:4] = 2, 1, 1
    assert count_prior(forest, 0, [1, 2, 3]) == [.5, .25, .25]
    forest.logps[0][1] = np.array([-1.0, -1.0], np.float32)
    forest.ids[0][1] = np.array([1, 2])
    assert abs(length_prior(forest, 0, [1])[0] - math.exp(-2 / 2 ** 1.25)) < 1e-6


def test_docstring_trace():
    """The four simulations worked by hand in `search`'s docstring."""
    kinds = {(): [((0,), math.log(.6)), ((1,), math.log(.4))], ((0,),): [((2,), -1.0)], ((0,), (2,)): [((3,), -1.0)]}
    values, forest = {((0,),): 1.0, ((1,),): 0.0, ((0,), (2,)): 0.0, ((0,), (2,), (3,)): 1.0}, Forest(1)
    forest.add(0, -1, [9])
    propose = lambda f, b, n, count: [Continuation(np.array(i), np.array([p]), np.array([]), "step")
                                      for i, p in kinds[path_in(f, b, n)]]
    evaluate = lambda f, ends: [values[path_in(f, b, n)] for b, n in ends]
    trace = []
    for _ in range(4):
        search(forest, Direct(forest, propose), evaluate, 1)
        trace.append((forest.visits[0, :5].tolist(), forest.value_sum[0, :5].tolist()))
    assert [t[0] for t in trace] == [[1, 1, 0, 0, 0], [2, 1, 1, 0, 0], [3, 2, 1, 1, 0], [4, 3, 1, 2, 1]]
    assert [t[1] for t in trace] == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [2, 2, 0, 1, 1]]


def test_known_values():
    """Games of three moves out of three where few of the 27 ends win (1, else -1): 400 simulations commit to a winning
    end in all of 20 games, the root's mean comes near the exhaustive best, and a first move from which nobody can
    win (a known pit) is the least visited."""
    for seed in range(20):
        game, lost = Game(seed, depth=3), seed % 3
        rng, start = dice(seed), ((lost + 1 + seed % 2) % 3,)
        wins = {(start, (rng.randrange(3),), (rng.randrange(3),)) for _ in range(2)}
        game.value = lambda path, wins=wins: 1.0 if path in wins else -1.0
        game.moves = lambda path, count: [((i,), (math.log(1 / 3),), "answer" if len(path) == 2 else "step")
                                          for i in range(3)]
        forest, paths = play([game], 400, c=1.0, to_terminal=True)
        assert path_in(forest, 0, paths[0][-1]) in wins and forest.value_sum[0, 0] / forest.visits[0, 0] > 0.5
        visits = forest.visits[0, forest.children[0][0]]
        assert visits[lost] < 40 and visits.argmax() != lost


def test_widening():
    """With `every`, a node has drawn b1 or b2 steps for each begun `every` visits; without, once for all. Numbers of
    samples go on where they stopped, so repeats merge into the children that are there."""
    forest, _ = play([Game(s, depth=3) for s in range(10)], 60, to_terminal=True, width=fixed_width(4, 2, every=8))
    narrow, _ = play([Game(s, depth=3) for s in range(10)], 60, to_terminal=True, width=fixed_width(4, 2))
    for b in range(10):
        for f, every in ((forest, 8), (narrow, 10 ** 9)):
            for n in range(int(f.size[b])):
                kids, N = f.children[b][n], int(f.visits[b, n])
                if kids:
                    # a visit that is under way when the last one was counted may have widened the node already
                    assert f.drawn[b, n] == f.count[b, kids].sum() == (4 if n == 0 else 2) * (1 + (N - 1) // every)
    assert forest.drawn.sum() > 2 * narrow.drawn.sum()


def test_no_candidate_is_an_error():
    """A proposer that gives nothing for an open node would hang the search: it raises instead."""
    forest = Forest(1)
    forest.add(0, -1, [0])
    with pytest.raises(ValueError, match="no candidate"):
        search(forest, Direct(forest, lambda *a: []), lambda f, e: [0.0] * len(e), 3)


# ----------------------------------------------------------------------------------------------------------
# With a model
# ----------------------------------------------------------------------------------------------------------
def searched(chosen, rows=8, greedy=False, kind="llama", simulations=6, **how):
    """Trees of PROMPTS searched with a small random model; an end is worth its parity."""
    model = language_model(kind, 1).bind(LETTERS)
    sampler, forest = Sampler(model, LETTERS, 16, rows), Forest(len(chosen), 2)
    for b, i in enumerate(chosen):
        plant(forest, b, sampler, PROMPTS[i])
    seeds = [mix(5, i) for i in chosen]
    evaluate = lambda f, ends: [(-1.0) ** len(f.path_of(b, n, "ids")) for b, n in ends]
    paths = search(forest, Steps(forest, sampler, seeds, 16, greedy=greedy), evaluate, simulations,
                   **dict(width=fixed_width(4, 2), to_terminal=True, commit=True) | how)
    return forest, sampler, paths


@pytest.mark.parametrize("kind", ("llama", "window", "gpt2"))
def test_searched_alone_as_in_a_batch(kind):
    """With a network too, a tree does not depend on who shares the batch or how many rows there are (about 400 draws,
    each within 1e-6 of a border with chance 1e-5); no token is encoded twice; nothing is left in the queue."""
    forest, sampler, paths = searched(range(4), kind=kind)
    c = sampler.counts
    assert c["processed"] <= c["prompt"] + c["sampled"] and not sampler.live and not sampler.waiting
    assert c["sampled"] == sum(int(forest.count[b, n]) * len(forest.ids[b][n])
                               for b in range(4) for n in range(1, int(forest.size[b])))
    skeleton = lambda f, b: {k: v for k, v in f.to_json(b).items() if k not in ("logps", "prior")}
    for i in range(4):
        for rows in (3, 64):
            alone, _, path = searched([i], rows=rows, kind=kind)
            assert skeleton(alone, 0) == skeleton(forest, i) and path == [paths[i]]
    assert all(forest.terminal[b, path[-1]] for b, path in enumerate(paths))


def test_greedy_first_child():
    """With greedy=True the first candidate of every expansion is the argmax step; the others stay samples."""
    forest, sampler, _ = searched([0, 1], greedy=True)
    other, plain = Forest(2, 2), Sampler(sampler.model, LETTERS, 16)
    for b in range(2):
        plant(other, b, plain, PROMPTS[b])
        path, = grow(other, plain, [(b, 0, 1)], [0, 0], 16, temperature=0)
        first = other.children[b][0][0]
        assert forest.ids[b][forest.children[b][0][0]].tolist() == other.ids[b][first].tolist()
    assert any(len(forest.children[b][0]) > 1 for b in range(2))


def test_saved_trees_can_be_shown(tmp_path, capsys):
    """`python mcts.py --show FILE` draws a searched tree as it was in memory, with N, Q, P and the chosen path;
    --html writes a page; a line that is not there and a damaged file are refused in one sentence."""
    forest, _ = play([Game(s) for s in range(3)], 20)
    tokenizer = Tokenizer.bytes_only()
    tokenizer.save(tmp_path / "round_0")
    config = dict(model_type="llama", vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                  num_attention_heads=1, eos_token_id=256)
    write_text(tmp_path / "round_0" / "config.json", json.dumps(config))
    rows = [dict(question="q", answer="1", tree=forest.to_json(b), pits=[], path=[0, 1]) for b in range(3)]
    write_text(tmp_path / "trees_01.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    again = Forest.from_json([r["tree"] for r in rows])
    assert all(again.to_json(b) == forest.to_json(b) for b in range(3))

    def run(*flags):
        """-> (exit code, stdout, stderr)."""
        return mcts.main(["--show", str(tmp_path / "trees_01.jsonl"), *flags]), *capsys.readouterr()
    code, shown, _ = run("--question", "1")
    assert code == 0 and shown == draw(again, 1, tokenizer, chosen=[0, 1]) + "\n"
    assert " N 20 Q " in shown and " P " in shown and "<- chosen" in shown
    pairs = [json.dumps(dict(tree=t, chosen_nodes=[1], rejected_nodes=[2])) for t in (2, 2, 0)]
    write_text(tmp_path / "pairs_01.jsonl", "".join(line + "\n" for line in pairs))
    assert run("--question", "2", "--html", str(tmp_path / "tree.html"))[0] == 0
    assert "<html" in (tmp_path / "tree.html").read_text(encoding="utf-8")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8").count(">+2</span>") == 1        # two pairs of this tree
    code, _, sentence = run("--question", "9")
    assert code == 2 and "0 to 2" in sentence
    write_text(tmp_path / "trees_01.jsonl", "{\n")
    assert run()[0] == 2


class Outline(HTMLParser):
    """What a browser would make of a page: texts of the steps, titles, nesting, scripts."""

    def __init__(self, text):
        super().__init__()
        self.steps, self.titles, self.stack, self.scripts, self.deepest = [], [], [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        assert not {"src", "href"} & attributes.keys()
        if tag not in ("meta",):
            self.stack.append((tag, attributes.get("class", "")))
        self.deepest = max(self.deepest, sum(t == "details" for t, _ in self.stack))
        if attributes.get("class") == "step" and "title" in attributes:
            self.titles.append(attributes["title"])
            self.steps.append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.stack and self.stack[-1] == ("span", "step") and self.steps:
            self.steps[-1] += data


def test_page_is_safe_and_whole():
    """Every node is on the page, nested as in the tree, with its path's text; texts that try to be HTML stay text;
    nothing is loaded from anywhere."""
    forest, evil = Forest(1), ["</script><script>alert(1)</script>", "<img src=x onerror=y>", "&lt;\"'", "a\tb\n"]
    write = lambda text: [ord(c) for c in text]
    n = forest.add(0, -1, write("<b>?"))
    for text in evil:
        n = forest.add(0, n, write(text), end="eos" if text == evil[-1] else "")
        forest.add(0, 0, write(text + "2"))
    forest.visits[0, 0] = 3
    text = page(forest, 0, Plain(), "<title> & co", pits={1}, pairs=[([1], [2])], chosen=[0, 1])
    seen = Outline(text)
    assert sorted(seen.steps) == sorted(mcts.step_text(forest, 0, k, Plain()) for k in range(int(forest.size[0])))
    assert "".join(evil) in seen.titles and seen.scripts == 1 and seen.deepest == 4 and "http" not in text
    assert "&lt;title&gt; &amp; co" in text and text.count(">+1</span>") == text.count(">-1</span>") == 1
    long = Forest(1)
    for _ in range(1500):
        n = long.add(0, int(long.size[0]) - 1, [65])
    assert len(Outline(page(long, 0, Plain(), "long")).steps) == 1500 and draw(long, 0, Plain())


def test_damaged_search_arrays():
    """Arrays of a search that differ in length, or hold what is no number, are BadInput."""
    forest, _ = play([Game(1)], 5)
    good = forest.to_json(0)
    for name, bad in (("visits", good["visits"][1:]), ("prior", ["x"] * len(good["prior"])), ("value_sum", None),
                      ("score", 3)):
        with pytest.raises(BadInput):
            Forest.from_json([good | {name: bad}])
    assert draw(forest, 0, Plain()) == draw(Forest.from_json([good]), 0, Plain())
