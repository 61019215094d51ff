"""The three critics, the search with them, synthesis of questions, votes: hand-made trees, known values, and the same
numbers while sampling as while training.

Oracles: labels and scores worked out by hand, features from a plain packed forward against those found in the sampler's
store, games without a network. Seeds are fixed."""
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import loop  # noqa: E402
from critic import HEADS, JUDGE_STEP, LOG_PROB_FEATURES, Countdown, Critic, Exercises, Homework, Judge  # noqa: E402
from critic import Question, Rollouts, self_evaluation  # noqa: E402
from critic import critic_features, critic_labels, critic_loss, critic_report, critic_values  # noqa: E402
from critic import log_prob_features, parse  # noqa: E402
from dpo import Row, node_features, train  # noqa: E402
from loop import Batches, Config, vote  # noqa: E402
from mcts import Direct, Forest, grow, importance_width, pack, plant, puct, uct  # noqa: E402
from model import GPT, Continuation, GPTConfig, Sampler, Tokenizer  # noqa: E402
import ablation  # noqa: E402
from countdown_search import reaches  # noqa: E402
from test_mcts import LETTERS, PROMPTS  # noqa: E402
from test_model import language_model  # noqa: E402
from test_search import Game, play  # noqa: E402

NAN = float("nan")


def hand_tree():
    """q -> a (good) -> right x3, wrong x1; q -> d (pit) -> wrong x4; q -> e -> wrong x1."""
    f = Forest(1)
    f.add(0, -1, [1, 2])
    a, d, e = (f.add(0, 0, [i, 9], [-0.5, -0.25]) for i in (3, 4, 5))
    ends = [(a, [6], 3, 1), (a, [7], 1, 0), (d, [6], 4, 0), (e, [6], 1, 0)]
    leaves = []
    for up, ids, count, right in ends:
        for _ in range(count):
            n = f.add(0, up, ids, [-2.0], end="eos")
        f.right[0, n] = right
        leaves.append(n)
    return f, (a, d, e), leaves


def test_labels_by_hand():
    """Value = share of right ends below; a step is good if a right end is below it, bad if none of k = 4 is, unknown
    with fewer; ends have outcome and process but no value; below a pit nothing is said of later steps."""
    f, (a, d, e), (good, bad, pit_end, _) = hand_tree()
    nodes, labels, weights, depths = critic_labels(f, 0, k=4)
    at = dict(zip(nodes, labels.tolist()))
    same = lambda x, y: np.array_equal(x, y, equal_nan=True)
    assert nodes == list(range(8)) and depths.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    assert same(at[0], [np.float32(1 / 3), NAN, NAN]) and same(at[a], [0.75, 1, NAN])
    assert same(at[d], [0, 0, NAN]) and same(at[e], [0, NAN, NAN])
    assert same(at[good], [NAN, 1, 1]) and same(at[bad], [NAN, 0, 0]) and same(at[pit_end], [NAN, NAN, 0])
    assert weights.tolist() == [8, 4, 4, 1, 3, 1, 4, 1]
    assert critic_labels(f, 0, k=1)[1][e, 1] == 0


def test_log_prob_features():
    """Lowest and mean of the last step, lowest and mean of the path, by hand; zeros for a question."""
    assert log_prob_features([]) == [0.0] * LOG_PROB_FEATURES
    assert log_prob_features([np.array([-1.0, -4.0]), np.array([-2.0])]) == [-2.0, -2.0, -4.0, pytest.approx(-7 / 3)]


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_features_while_sampling_are_those_trained_on(kind):
    """For every node of grown trees - questions and one-token steps too - the store's hidden state and the recorded
    log-probs equal those of a packed forward to 1e-4; scores read off them too; nothing was encoded for it."""
    model = language_model(kind, 1).bind(LETTERS)
    sampler, forest = Sampler(model, LETTERS, 16, 8), Forest(3, 2)
    for b in range(3):
        plant(forest, b, sampler, PROMPTS[b])
    grow(forest, sampler, [(b, 0, 9) for b in range(3)], [1, 2, 3], 16)
    grow(forest, sampler, [(b, forest.parent[b, n], 2) for b in range(3) for n in forest.leaves(b)], [1, 2, 3], 16)
    processed = sampler.counts["processed"]
    rows = [Row(pack(forest, b, range(int(forest.size[b])))) for b in range(3)]
    sizes = Counter()
    for b, (row, want) in enumerate(zip(rows, node_features(model, rows))):
        nodes = list(range(int(forest.size[b])))
        got = critic_features(sampler, forest, [(b, n) for n in nodes])
        assert got.shape == (len(nodes), model.config.hidden_size + LOG_PROB_FEATURES)
        assert (got - want[[row.packed.place[n] for n in nodes]]).abs().max() < 1e-4
        sizes.update(len(i) for i in forest.ids[b])
    assert sizes[1] and sampler.counts["processed"] == processed


def test_heads_overfit_32_prefixes():
    """Random labels of 32 random prefixes are learnt by heart through dpo.train, after which AUC is 1 and Brier near 0;
    training twice gives the same bytes; balancing does not bend the probabilities (mean score = rate of right)."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 12, generator=rng), (torch.rand(32, 3, generator=rng) < 0.3).float()
    row = (x, y, torch.ones(32), torch.zeros(32, dtype=torch.int64))
    split = lambda rows, _, device: [(rows[0], 32)]
    scores = []
    for _ in range(2):
        critic = Critic(12)
        critic.prepare([row])
        train(critic, Batches([row], 1, 200, 0), critic_loss, 2e-2, split=split)
        scores.append(critic.score(x))
    report = critic_report(scores[0], y.numpy(), np.ones(32), np.zeros(32))
    assert np.array_equal(*scores) and all(report[h]["auc"] == 1 and report[h]["brier"] < 0.01 for h in HEADS)
    fresh = Critic(12)
    noise = [(torch.randn(4000, 12, generator=rng), (torch.rand(4000, 3, generator=rng) < 0.1).float(),
              torch.ones(4000), torch.zeros(4000, dtype=torch.int64))]
    fresh.prepare(noise)
    train(fresh, Batches(noise, 1, 60, 0), critic_loss, 1e-3, split=lambda rows, _, device: [(rows[0], 4000)])
    assert np.allclose(fresh.score(noise[0][0]).mean(0), noise[0][1].mean(0).numpy(), atol=0.02)


class Told(Critic):
    """A critic that says what it is told of each node."""

    def __init__(self, said):
        super().__init__(1)
        self.said = said

    def score(self, wants):
        return np.array([self.said[n] for _, n in wants])


def test_leaf_scores_by_hand(monkeypatch):
    """The weakest link of a path, the paper's weighted sum, heads that are left out or not trusted, none left."""
    monkeypatch.setattr("critic.critic_features", lambda sampler, forest, wants: wants)
    f, (a, d, _), (good, bad, *_) = hand_tree()
    told = Told({0: (0.4, 0.1, 0), a: (0.7, 0.9, 0), d: (0.2, 0.6, 0), good: (0, 0.8, 0.95), bad: (1, 0.9, 0.3)})
    value = lambda wants, **k: critic_values(told, None, f, [(0, n) for n in wants], **k).tolist()
    assert value([a, d, good, bad]) == [0.7, 0.2, 0.7, 0.3] and value([0]) == [0.4]     # a question is no step
    assert value([a, good], weights=(0, 1, 1)) == [0.9, 0.8]
    assert value([a, d, good], rule="sum") == pytest.approx([0.8, 0.4, 0.95])
    assert value([a], weights=(3, 1, 1), rule="sum") == pytest.approx([0.75])
    known = {(0, a): np.array((0.1, 0.1, 0.1))}                         # what is known already is not asked again
    assert value([d, good], known=known) == [0.2, 0.1] and set(known) == {(0, a), (0, d), (0, good)}
    told.trusted[:] = torch.tensor([0.0, 1, 0])
    assert value([a, good], rule="sum") == pytest.approx([0.9, 0.8]) and value([d, good]) == [0.6, 0.8]
    told.trusted[:] = 0
    assert value([a, good], rule="sum") == value([a, good]) == [0.5, 0.5]


def test_leaf_scores_with_rollouts_by_hand(monkeypatch):
    """The mean outcome of rollouts is one more link, or one more summand with its weight; ends are not rolled out, and
    weight 0 asks for none."""
    monkeypatch.setattr("critic.critic_features", lambda sampler, forest, wants: wants)
    f, (a, d, _), (good, *_) = hand_tree()
    told, asked = Told({a: (0.7, 0.9, 0), d: (0.2, 0.6, 0), good: (0, 0.8, 0.95)}), []

    class Fast:
        """Rollouts that know what they find."""
        def score(self, forest, wants):
            asked.append(wants)
            return [{a: 0.5, d: 0.8}[n] for _, n in wants]
    value = lambda wants, **k: critic_values(told, None, f, [(0, n) for n in wants], rollouts=Fast(), **k).tolist()
    assert value([a, good, d]) == [0.5, 0.7, 0.2] and asked == [[(0, a), (0, d)]]
    assert value([a, good, d], rule="sum") == pytest.approx([2.1 / 3, 0.95, 1.6 / 3])
    assert value([a], rule="sum", weights=(1, 1, 2)) == pytest.approx([2.6 / 4])
    told.trusted[:] = 0                                                 # the policy's heads; rollouts have their own
    assert value([a, good], rule="sum") == [0.5, 0.5] and value([d]) == [0.8]
    asked.clear()
    assert value([good]) == [0.5] and value([a], weights=(1, 1, 0)) == [0.5] and asked == []


def grown(kind="llama", seed=1):
    """A model, its sampler and a forest of three questions with nine samples each."""
    model = language_model(kind, seed).bind(LETTERS)
    sampler, forest = Sampler(model, LETTERS, 16, 8), Forest(3, 2)
    for b in range(3):
        plant(forest, b, sampler, PROMPTS[b])
    grow(forest, sampler, [(b, 0, 9) for b in range(3)], [1, 2, 3], 16)
    return model, sampler, forest


def test_rollouts():
    """A small model goes on from the policy's steps: the ends hang below copies of the same ids; their log-probs,
    the policy's tokens included, are those of a plain forward of the small model; the score is the mean of the critic
    over n ends; nothing is encoded twice, the policy encodes nothing, and asking in two calls encodes no more than in
    one. A leaf that a rollout has been through is found, not made again."""
    _, sampler, forest = grown()
    small = language_model("gpt2", 5).bind(LETTERS)
    wants = [(b, n) for b in range(3) for n in range(1, int(forest.size[b])) if not forest.terminal[b, n]]
    policy, counts = dict(sampler.counts), []

    class Length(Critic):
        """Outcome: a number of the path alone."""
        def read(self, sampler, forest, ends):
            self.ends = ends
            return np.array([[0, 0, len(forest.path_of(b, n, "ids")) % 7 / 7] for b, n in ends])
    for parts in ([wants], [wants[::2], wants[1::2]]):
        fast = Rollouts(Length(1), Sampler(small, LETTERS, 16, 8), 3, 16)
        fast.begin(forest, [7, 8, 9])
        for part in parts:
            found = fast.score(forest, part)
            f, each = fast.mine, [part[i // 3] for i in range(3 * len(part))]
            for (b, end), (_, n) in zip(fast.critic.ends, each):
                ids = forest.path_of(b, n, "ids")
                assert f.terminal[b, end] and f.path_of(b, end, "ids")[:len(ids)].tolist() == ids.tolist()
            lengths = [len(f.path_of(b, n, "ids")) % 7 / 7 for b, n in fast.critic.ends]
            assert found == pytest.approx(np.reshape(lengths, (-1, 3)).mean(1))
            for b, end in fast.critic.ends[::5]:
                ids = torch.tensor(f.path_of(b, end, "ids"))[None]
                want = small.token_logits(small(ids)).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
                got = f.path_of(b, end, "logps")
                assert np.allclose(got, want[-len(got):].detach().numpy(), atol=1e-4)
        c = fast.sampler.counts
        assert 0 < c["processed"] <= c["prompt"] + c["sampled"] and fast.seconds > 0
        counts.append(c["prompt"])
    assert sampler.counts == policy and abs(counts[1] - counts[0]) <= 0.1 * counts[0]
    for b in range(3):
        f, keys = fast.mine, set()
        for n in range(int(f.size[b])):
            keys.add((int(f.parent[b, n]), tuple(f.ids[b][n].tolist()), int(f.end[b, n])))
        assert len(keys) == int(f.size[b])


def test_judge(tmp_path):
    """Value and outcome are C(s) of the solution so far, process C of its last step: another question. The judge's
    report is made of the trees of a file, whose tokens have to be encoded anew: it is that of trees still in the
    sampler's store; read again it gives the same trust."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, 32, 2)).initialise(3).bind(tokenizer)
    for p in model.parameters():
        p.data *= 1.5                                                   # else every judgement is .5
    sampler, forest = Sampler(model, tokenizer, 64, rows=4), Forest(2)
    for b, text in enumerate(("7+1?", "9*2?")):
        plant(forest, b, sampler, tokenizer.encode(text))
    for b, found in enumerate(grow(forest, sampler, [(0, 0, 6), (1, 0, 6)], [1, 2], 12)):
        for i, n in enumerate(found):
            forest.right[b, n] = i % 2
    per_tree = [critic_labels(forest, b, 2) for b in range(2)]
    wants = [(b, n) for b in range(2) for n in per_tree[b][0]]
    rows = Judge().read(sampler, forest, wants)
    whole = self_evaluation(forest, wants, sampler)
    assert rows[:, 0].tolist() == rows[:, 2].tolist() == whole
    assert rows[:, 1].tolist() == self_evaluation(forest, wants, sampler, question=JUDGE_STEP)
    assert np.abs(rows[:, 1] - whole).max() > 1e-3
    want = critic_report(rows, *(np.concatenate([t[i] for t in per_tree]) for i in (1, 2, 3)))
    read = Forest.from_json([forest.to_json(b) for b in range(2)])
    trees = [loop.Worked(Question(f"q{b}", "", 0), read, b, [], []) for b in range(2)]
    run = SimpleNamespace(sampler=Sampler(model, tokenizer, 64, rows=4), model=model, dir=tmp_path,
                          c=Config(completions=2, critic="judge"))
    judge, report = loop.fit_critic(run, 1, trees)
    assert {h: report[h]["auc"] for h in HEADS} == {h: pytest.approx(want[h]["auc"], abs=1e-3) for h in HEADS}
    assert loop.fit_critic(run, 1, trees)[0].trusted.tolist() == judge.trusted.tolist() == \
        [float((want[h]["auc"] or 0) >= 0.55) for h in HEADS]


def test_labels_against_the_truth_of_countdown():
    """Brute force knows whether a position of countdown can still win. On forests of random legal play: a node with a
    right end below it, a good process label, a value above 0: the position can win; one that cannot has value 0 and
    no good label; with every move tried often the converse holds, too, and values of winning positions are above 0."""
    task, rng = Countdown(Config(task="countdown")), random.Random(4)
    encode = task.tokenizer.encode
    for q in task.train_questions(1)[:12]:
        forest, state = Forest(1), {0: task.numbers(q.text)}
        forest.add(0, -1, encode(task.prompt(q)))
        for _ in range(600):
            n, numbers = 0, state[0]
            while len(numbers) > 1:
                line, numbers = rng.choice(task.moves(numbers))
                n = forest.add(0, n, encode(line))
                state[n] = numbers
            n = forest.add(0, n, encode(f"#### {numbers[0]}"), end="answer")
            forest.right[0, n] = task.reward(q.text, forest.text(0, n, task.tokenizer), q.answer)
        nodes, labels, _, _ = critic_labels(forest, 0, k=4)
        for n, (value, process, outcome) in zip(nodes, labels):
            if n in state:
                wins = reaches(task, state[n], int(q.answer))
                assert (value > 0) == wins and (np.isnan(process) or (process == 1) == wins)
            else:
                assert outcome == process == (state[int(forest.parent[0, n])] == (int(q.answer),)) or np.isnan(process)



def test_report_by_hand():
    """AUC, Brier, lift and bins of six nodes by hand; a head with one class has AUC None, one without labels too."""
    scores = np.array([[.9, .5, 0], [.8, .5, 0], [.35, .5, 0], [.1, .5, 0]])
    labels = np.array([[1, 1, NAN], [0, 1, NAN], [1, 1, NAN], [0, 1, NAN]])
    report = critic_report(scores, labels, np.array([1, 1, 1, 3.0]), np.array([1, 1, 2, 2]))
    value = report["value"]
    brier = (0.01 + 0.64 + 0.4225 + 3 * 0.01) / 6
    assert value["auc"] == 0.75 and value["brier"] == pytest.approx(brier, abs=1e-4)
    assert value["lift"] == pytest.approx(1 - brier / (2 / 9), abs=1e-4)
    assert value["auc_by_depth"] == {"1": 1.0, "2": 1.0}
    assert [b[2] for b in value["calibration"]] == [1, 1, 1, 1] and value["calibration"][0][:2] == [0.1, 0]
    assert report["process"]["auc"] is None and report["process"]["lift"] is None and report["outcome"]["auc"] is None


# -- search with critics ----------------------------------------------------------------------------------
def test_importance_width():
    """n(s) grows with the spread of the children's values, stays within (c_min, c_max), and asks for one step at a
    time, none while the last new child is untried; with `every` it opens again."""
    f, (a, d, e), _ = hand_tree()
    f.drawn[0, 0], f.visits[0, [0, a, d, e]], f.value_sum[0, 0] = 3, [3, 1, 1, 1], 1.5
    widths = []
    for spread in (0.0, 0.1, 0.3, 0.49):
        f.score[0, [a, d, e]] = 0.5, 0.5 - spread, 0.5 + spread
        f.drawn[0, 0] = 3
        while (w := importance_width((2, 9), (1, 1), 19.0)(f, 0, 0)) > f.drawn[0, 0]:
            assert w == f.drawn[0, 0] + 1
            f.drawn[0, 0] = w
        widths.append(int(f.drawn[0, 0]))
    assert widths == [3, 3, 6, 9]                                       # what was drawn, then floor(19 I) + 1, then 9
    assert importance_width((2, 9), (1, 1), 19.0, every=3)(f, 0, 0) == 10
    f.visits[0, e] = 0
    assert importance_width((2, 99), (1, 1), 1e3)(f, 0, 0) == f.drawn[0, 0]


def test_adaptive_search():
    """Over 40 random games: counts of children = steps drawn, and no node draws more than its c_max."""
    forest, _ = play([Game(s) for s in range(40)], 60, select=uct, width=importance_width((3, 12), (1, 4), 11.0))
    drawn = forest.drawn[:, 1:].max(), forest.drawn[:, 0].max()
    assert drawn[0] <= 4 and 3 <= drawn[1] <= 12 and len({*forest.drawn[:, 0].tolist()}) > 2
    for b in range(40):
        for n in range(int(forest.size[b])):
            assert forest.count[b, forest.children[b][n]].sum() == forest.drawn[b, n]


def test_merge_conserves_counts():
    """Steps with one key and one end become one child: counts still add up to what was drawn, no two siblings share
    both, and an end never joins a step that goes on."""
    same = lambda ids: int(ids[0]) % 3 + 1
    forest, _ = play([Game(s) for s in range(30)], 30, same=same)
    plain, _ = play([Game(s) for s in range(30)], 30)
    for b in range(30):
        for n in range(int(forest.size[b])):
            kids = forest.children[b][n]
            keys = [(same(forest.ids[b][k]), int(forest.end[b, k])) for k in kids]
            assert len({*keys}) == len(keys) and forest.count[b, kids].sum() == forest.drawn[b, n]
    assert forest.size.sum() < plain.size.sum()


def test_constant_critic_leaves_the_prior():
    """When every node is worth the same, PUCT's visits go by P: a higher prior never has fewer visits (but for the
    one of rounding), and Q is that constant."""
    class Flat(Game):
        def value(self, path):
            return 0.5
    games = [Flat(s, depth=3) for s in range(20)]
    forest, _ = play(games, 200, c=1.0, select=puct)
    for b in range(20):
        kids = sorted(forest.children[b][0], key=lambda k: forest.prior[b, k])
        visits = forest.visits[b, kids].tolist()
        assert all(low <= high + 1 for low, high in zip(visits, visits[1:])) and sum(visits) == 200
        assert forest.value_sum[b, 0] == 100


def test_patience():
    """An exhausted tree ends `patience` simulations after its last new step; a tree that still grows goes on."""
    games = [Game(s, depth=2) for s in range(10)]
    forest, _ = play(games, 2000, patience=7, c=4.0)
    full, _ = play(games, 2000, c=4.0)
    late, _ = play(games, 2000, patience=1000, c=4.0)
    assert (full.visits[:, 0] == 2000).all() and (late.visits[:, 0] < 2000).all() and (forest.visits[:, 0] < 80).all()
    assert (forest.visits[:, 0] > 7).all() and (late.size == full.size).all() and (forest.size <= full.size).all()


# -- synthesis --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", (Homework, Countdown))
def test_imagined_questions(task):
    """New, distinct, well-formed, never on the held-out side, and nobody worked out an answer (a solver that is asked
    raises)."""
    c = Config(task=task.name, questions=150, eval_questions=200)
    t = task(c)
    old, held = t.train_questions(1), {t.key(q) for q in t.eval_questions()}
    t.solve = t.reward = t.draw = None                                  # would raise
    new = t.imagine(old, 150, random.Random(0))
    keys = {t.key(q) for q in new}
    assert len(keys) == len(new) == 150 and not keys & held and not keys & {t.key(q) for q in old}
    assert all(q.answer == "" for q in new)
    for q in new:
        if task is Homework:
            x = parse(q.text)
            assert 3 <= len(x) // 2 <= 4 and all(1 <= v <= 9 for v in x[::2]) and x[1] in "+-"
            assert all(v > 1 for op, v in zip(x[1::2], x[2::2]) if op == "*")
        else:
            assert len(t.numbers(q.text)) == 3 and 0 <= int(q.text.split()[-1]) <= 99


def test_imagined_real_questions(tmp_path):
    """Of what the model writes only new questions with a number and a question mark are kept; near copies of training
    and held-out questions are not."""
    train_text = "Tom has 3 red apples and 4 green pears in a bag. How many?"
    eval_text = "Ann buys 7 books on each of 2 days. How many?"
    for name, text in (("a", train_text), ("b", eval_text)):
        (tmp_path / name).write_text(json.dumps({"question": text, "answer": "7"}) + "\n")
    task = Exercises(Config(data=str(tmp_path / "a"), eval_data=str(tmp_path / "b")), Tokenizer.bytes_only(), 512)
    lines = [" A train goes 60 miles an hour for 2 hours. How far?\n", eval_text.replace("7", "9"), "no number at all?",
             "12 is a number.", train_text, "A train goes 60 miles an hour for 3 hours. How far?"]
    asked = []

    def write(prompts):
        asked.append(prompts)
        return [lines.pop(0) if lines else "" for _ in prompts]
    new = task.imagine(task.train, 3, random.Random(0), write)
    assert new == [Question("A train goes 60 miles an hour for 2 hours. How far?", "", 0)]
    assert len(asked) == 4 and asked[0][0] == f"Question: {train_text}\n\nQuestion:"
    task.context = 100                                          # no example fits in half of it: nothing is asked
    assert task.imagine(task.train, 3, random.Random(0), write) == [] and asked[-1] == []


# -- a search for right solutions -----------------------------------------------------------------------
def solving(monkeypatch, pool, says):
    """solving_search on twelve questions whose solutions are six lines, each good with a chance of one half; right
    are six good ones. says(good lines, lines) is what the critics think. -> (forest, sampled tokens)."""
    counts, stop, rng = {"sampled": 0}, 10, random.Random(0)
    tokenizer = SimpleNamespace(decode_more=lambda ids: " ".join(map(str, ids)))
    run = SimpleNamespace(c=Config(), fast=None, tokenizer=tokenizer,
                          model=SimpleNamespace(stop_ids={stop}), sampler=SimpleNamespace(counts=counts),
                          task=SimpleNamespace(reward=lambda q, text, answer: text == answer))

    def propose(forest, b, n, count):
        """`count` lines: 1 is a good one, 2 a bad one; the sixth is the last."""
        end = int(forest.depth[b, n]) == 5
        ids = [[rng.randint(1, 2)] + [stop] * end for _ in range(count)]
        counts["sampled"] += sum(map(len, ids))
        return [Continuation(np.array(i), np.zeros(len(i)), np.zeros(len(i)), "eos" if end else "step") for i in ids]

    def values(critic, sampler, forest, ends, weights, rule, *more):
        assert rule == "sum" and not any(forest.terminal[e] for e in ends)
        lines = [forest.path_of(b, n, "ids", root=False) for b, n in ends]
        return np.array([says((x == 1).sum(), len(x)) for x in lines])
    monkeypatch.setattr(loop, "Steps", lambda forest, *a, **k: Direct(forest, propose))
    monkeypatch.setattr(loop, "critic_values", values)
    forest = Forest(12)
    for b in range(12):
        forest.add(b, -1, [0])
    questions = [Question("?", "1 1 1 1 1 1", 6) for _ in range(12)]
    assert loop.solving_search(run, None, questions, forest, [0] * 12, None, pool) == ([], [[]] * 12)
    assert sum(len(i) for b in range(12) for i in forest.ids[b][1:]) <= counts["sampled"]
    return forest, counts["sampled"]


def test_solving_search(monkeypatch):
    """With critics that know good lines every tree is solved for a fraction of the tokens, and ends with its first
    right end; critics that say nothing solve hardly any; the pool is overdrawn by the steps at work at most."""
    known, spent = solving(monkeypatch, 12 * 200, lambda good, lines: float(good == lines))
    assert ((known.right == 1).sum(1) == 1).all() and spent < 12 * 80
    for b in range(12):           # the last simulation found it
        assert (known.right[b] == 1).nonzero()[0] == max(n for n in known.leaves(b) if known.visits[b, n])
    blind, cost = solving(monkeypatch, 12 * 200, lambda good, lines: 0.5)
    assert (blind.right == 1).any(1).sum() <= 6 and cost <= 12 * 202
    poor, cost = solving(monkeypatch, 200, lambda good, lines: float(good == lines))
    assert 150 < cost <= 212 and (poor.right == 1).any(1).sum() < 6


def test_combined_imitates_what_is_found(tmp_path, monkeypatch):
    """Right solutions of samples and of searches, of this round and of the one before, are rows to imitate; searched
    are the questions without one, with what is left, but at most the budget of a question each, and only when more is
    left than another sample of all would take."""
    def tree(question, right):
        """One tree with one end."""
        forest = Forest(1)
        forest.add(0, -1, [7])
        n, forest.drawn[0, 0] = forest.add(0, 0, [8] * 20, [-1.0] * 20, end="eos"), 8
        forest.right[0, n] = right
        return {"question": question, "answer": "1", "tree": forest.to_json(0), "pits": [], "path": []}
    write = lambda name, *rows: loop.write_lines(tmp_path / f"{name}.jsonl", rows) or loop.read_trees(
        tmp_path / f"{name}.jsonl")
    tokenizer, pools, learnt = SimpleNamespace(decode_more=lambda ids: "1+1=2"), [], []
    run = SimpleNamespace(dir=tmp_path, work=tmp_path, fast=None, tokenizer=tokenizer,
                          model=SimpleNamespace(stop_ids=set()),
                          c=Config(recipe="combined", questions=10, budget=300, steps=5))

    def sample_round(run, round_, questions, how, name):
        how(run, questions, None, [1] * len(questions), None)
        return write(f"{name}_{round_:02d}", *(tree(q.text, i == 0) for i, q in enumerate(questions)))
    monkeypatch.setattr(loop, "sample_round", sample_round)
    monkeypatch.setattr(loop, "solving_search", lambda *a: pools.append((len(a[2]), a[-1])))
    monkeypatch.setattr(loop, "learn", lambda run, round_, stage, rows, *a:
                        (learnt.append((stage, len(rows), a[2])) or {}, None))
    monkeypatch.setattr(loop, "round_critics", lambda *a: (None, {"critic_auc": {}}))
    for round_, left in ((1, 500), (2, 2000), (3, 300)):        # of 3,000; a sample of all takes 2,700 / 8 = 337
        loop.write_lines(tmp_path / f"trees_{round_:02d}.counts", [{"sampled": 3000 - left}])
        report, _ = loop.combined(run, round_, write(f"trees_{round_:02d}", tree("a", 1), tree("b", 0), tree("c", 0)))
        assert ("searched" in report) == (round_ < 3) and report.get("searched_solved", 1) == 1
    assert pools == [(2, 500), (2, 600)]                        # at most 300 a question
    assert learnt == [("combined", 2, 5), ("combined", 4, 5), ("combined", 5, 5)]


def test_counts_of_the_round_alone(tmp_path):
    """Counts that a run killed at the end of a round left behind are not those of the next."""
    for name, sampled in (("trees_01", 1), ("searched_01", 2), ("trees_02", 4), ("imagined_02", 8),
                          ("trees_02_000000", 16), ("questions_02", 32)):
        loop.write_lines(tmp_path / f"{name}.counts", [{"sampled": sampled}])
    run = SimpleNamespace(work=tmp_path, c=Config(budget=10, questions=7))
    assert loop.round_counts(run, 2) == {"sampled": 44}
    assert loop.budget_left(run, 2, "trees", "questions") == 70 - 4 - 32


# -- votes and runs ---------------------------------------------------------------------------------------
def test_votes_by_hand():
    """Majority, best score, largest sum of scores; ties go to the first; samples without an answer count nothing."""
    said = [("4", .3), ("5", .8), ("4", .4), (None, .99), ("4", .2), ("5", .2)]
    samples = [dict(answer=a, score=s, place=i) for i, (a, s) in enumerate(said)]
    assert [vote(samples, m)["place"] for m in loop.VOTES] == [2, 1, 1]
    assert vote(samples[:1] + samples[1:2], "majority")["place"] == 0 and vote(samples[3:4], "majority") is None


def test_alphallm_leaves_what_it_says(imagined_run):
    """Synthesised questions without answers, searched trees with scores in [0, 1] and no grade, critics with a report,
    log keys; tokens of both kinds of forest are counted, none is encoded twice, the budget holds."""
    rows = [json.loads(line) for line in (imagined_run / "log.jsonl").read_text().splitlines()]
    trees = [json.loads(line) for line in (imagined_run / "imagined_02.jsonl").read_text().splitlines()]
    for t in trees:
        score = [s for s in t["tree"]["score"] if s is not None]
        assert t["answer"] == "" and set(t["tree"]["right"]) == {-1} and all(0 <= s <= 1 for s in score) and score
        assert t["tree"]["visits"][0] > 0
    for row in rows[1:]:
        assert row["imagined"] == 16 and row["imagined_kept"] <= 16 and set(row["critic_auc"]) == set(HEADS)
        assert row["processed_tokens"] <= row["prompt_tokens"] + row["sampled_tokens"]
        # waves and simulations are whole, so a chunk may end a little below or above its share
        assert 0.5 * 16 * 300 < row["sampled_tokens"] < 1.3 * 16 * 300
    sampled = sum(len(i) * c for t in trees for i, c in list(zip(t["tree"]["ids"], t["tree"]["count"]))[1:])
    assert sampled < rows[2]["sampled_tokens"]
    report = json.loads((imagined_run / "critic_02.json").read_text())
    assert all(report[h]["trusted"] for h in HEADS)
    assert all(r["rollout_tokens"] > 0 and r["rollout_seconds"] > 0 for r in rows[1:])
    assert all(0 <= r["rollout_agreement"] <= 1 for r in rows[1:])
    assert (imagined_run / "rollout_critic_02.json").exists() and len([*imagined_run.parent.glob("base_*")]) == 1


def test_decode_table(imagined_run, capsys, monkeypatch):
    """--decode prints a row per model, method and budget; sampling spends the budget it says; called again it samples
    nothing and prints the same."""
    monkeypatch.setattr(loop, "SOLUTIONS", (2, 4))
    flags = ["--decode", str(imagined_run), "--decode-questions", "2"]
    assert loop.main(flags) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| round ")]
    assert len(table) == 2 * (1 + 2 * 5) and {row[1] for row in table} == {"greedy", *loop.VOTES, "beam", "mcts"}
    each = float(table[1][3].replace(",", "")) / 2
    for row in table[1:11]:
        if row[1] in loop.VOTES:
            assert float(row[3].replace(",", "")) == pytest.approx(each * int(row[2]), rel=0.1)
    before = {p: p.stat().st_mtime_ns for p in imagined_run.glob("decode_*/*sonl")}
    assert loop.main(flags) == 0
    again = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| round ")]
    assert again == table and before == {p: p.stat().st_mtime_ns for p in imagined_run.glob("decode_*/*sonl")}
    whole = Sampler._forward

    def small(self, slots, *rest):
        """A device with room for two rows."""
        if len(slots) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, slots, *rest)
    monkeypatch.setattr(Sampler, "_forward", small)
    for file in imagined_run.glob("decode_*/00_*_4.jsonl"):
        file.unlink()
    assert loop.main(flags) == 0
    out = capsys.readouterr().out
    assert "going on with 2 rows" in out and [x.split(" | ") for x in out.splitlines() if x[:8] == "| round "] == table


def test_ablation_table(imagined_run, capsys, monkeypatch):
    """tests/ablation.py searches with every variant and prints a row of each, with rollouts where asked for."""
    monkeypatch.setattr(ablation, "WORTH", 2), monkeypatch.setattr(ablation, "QUESTIONS", 2)
    monkeypatch.setattr(loop, "LEAST_AUC", 0.0)
    ablation.main([str(imagined_run)])
    out, err = capsys.readouterr()
    table = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in table] == [*ablation.VARIANTS]
    assert [row[4] == "-" for row in table] == [True] + [False] * 6
    rolled = {name: f"for {0:,.0f} tokens" not in line for name in ablation.VARIANTS
              for line in err.splitlines() if f" {name} " in line}
    assert rolled == {name: i in (3, 4, 5) for i, name in enumerate(ablation.VARIANTS)}
