"""Pairs, packed rows, losses and training against oracles: hand numbers, plain causal rows, finite
differences, formulas written a second time, and the same training done in another way. Models are
fp32 unless a test is about bf16, so that no tolerance depends on the machine."""
import math
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import dpo
from dpo import (Muon, Pair, batches, dpo_loss, log_probs, evenness, outcome_pairs, pit_pairs,
                 preference_loss, rate_pairs, scaled_lr, schedule, sft_loss, sibling_pairs,
                 store_reference, text_row, target_logps, train, tree_row)
from mcts import NOTHING, Tree, record_grade
from model import GPT, BadInput, GPTConfig
from test_mcts import V, grown

LOSS = partial(preference_loss, beta=0.3, nll=0.7)
near = partial(torch.allclose, rtol=0, atol=1e-5)

def tiny(seed=0, hidden=32, vocab=V, dtype=torch.float32):
    """A small random model."""
    config = GPTConfig.tiny(vocab, hidden, layers=2, max_positions=128)
    return GPT(config).initialise(seed).to(dtype)

def add(tree, parent, ids, end="", **facts):
    """A node of a tree drawn by hand; facts are fields of Node."""
    node = tree.add(parent, ids, np.zeros(len(ids)), NOTHING, end)
    for name, value in facts.items():
        setattr(node, name, value)
    return node

def random_nodes(seed):
    """0 +- 1 +- 2 - 3 (end)      nodes of a tree of random steps of one to four tokens, most of
         |    `- 4 - 5 (end)      them 0 (the padding) or V - 1 (an end-of-text): masks must go
         `- 6 - 7 (end)           by length, never by id"""
    rng = np.random.default_rng(seed)
    ids = lambda first, more: [first, *rng.choice((0, V - 1), more)]
    tree = Tree(None, seed, ids(0, 3 + 5 * seed % 11))
    for parent, end in ((0, ""), (1, ""), (2, "eos"), (1, ""), (4, "eos"), (0, ""), (6, "eos")):
        add(tree, tree.nodes[parent], ids(rng.integers(V), rng.integers(4)), end)
    return tree.nodes

def row_of(seed):
    """A row of four pairs: step against step, long against short, two at the root; references."""
    nodes, rng, pairs = random_nodes(seed), np.random.default_rng(seed), []
    for chosen, rejected, smoothing in (((2,), (4,), .1), ((4, 5), (2, 3), 0.), ((6, 7), (1,), .3),
                                        ((1, 2, 3), (6,), 0.)):
        sides = [[nodes[i] for i in side] for side in (chosen, rejected)]
        pairs.append(Pair(*sides, smoothing, *(-20 * rng.random(2))))
    return tree_row(pairs)

def side(model, nodes):
    """(log-prob of these nodes' tokens after their prefix, their number), by one causal row."""
    before = nodes[0].parent.path()
    ids = torch.from_numpy(np.concatenate([node.ids for node in before + nodes]))
    logps = model.all_logps(model(ids[None]))[0]
    size = sum(len(node.ids) for node in nodes)
    columns = torch.arange(len(ids) - size, len(ids))
    return logps[columns - 1, ids[columns]].sum(), size

def gradients(model, loss):
    """{name: gradient} of a loss."""
    return dict(zip(weights(model), torch.autograd.grad(loss, [*model.parameters()])))

def weights(model):
    """A copy of {name: parameter}."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}

def assert_near(one, two, tolerance):
    """Equal to `tolerance` of each tensor's largest entry (of 1, if that is smaller)."""
    for name in one:
        scale = max(1.0, two[name].abs().max().item())
        assert (one[name] - two[name]).abs().max().item() <= tolerance * scale, name

# ---- Pairs, drawn by hand ------------------------------------------------------------------------
def test_pit_pairs_by_hand():
    """The picture of pit_pairs: the pit against the shortest right completion of its prefix."""
    tree = Tree(None, 0, [9])
    a = add(tree, tree.root, [1], tried=4, tried_right=2)
    b = add(tree, a, [2, 2], tried=4)
    d = add(tree, a, [4])
    ends = [add(tree, parent, ids, "eos") for parent, ids in
            ((b, [3]), (a, [6] * 4), (d, [5, 5]), (tree.root, [7]))]
    add(tree, tree.root, [8], "length")                 # never graded: in no pair
    cut = add(tree, a, [6], "length")                   # right, shorter, but without an end
    for end in (*ends, cut):
        record_grade(end, end.parent is not b)
    pair, = pit_pairs(tree)
    assert pair.chosen == [d, ends[2]] and pair.rejected == [b]

def test_outcome_pairs_use_wrong_ones_evenly():
    """Each wrong one is taken once before any is taken twice, the most different first."""
    tree = Tree(None, 0, [9])
    shared, other = add(tree, tree.root, [1]), add(tree, tree.root, [21])
    right = [add(tree, shared, [10 + i], "eos") for i in range(3)]
    close, far = add(tree, shared, [20], "eos"), add(tree, other, [22], "eos")
    for end in (*right, close, far):
        record_grade(end, end in right)
    assert [(pair.chosen, pair.rejected) for pair in outcome_pairs(tree)] == [
        ([shared, right[0]], [other, far]), ([right[1]], [close]),
        ([shared, right[2]], [other, far])]

def test_equal_sides_make_no_pair():
    """The same ids, cut at the length limit here and ended there, show no preference."""
    tree = Tree(None, 0, [9])
    for end, q in (("eos", 1.0), ("length", -1.0)):
        record_grade(add(tree, tree.root, [5], end, visits=int(5 + q), value_sum=4 * q), q > 0)
    assert len(tree.nodes) == 3
    assert outcome_pairs(tree) == pit_pairs(tree) == sibling_pairs(tree, gap=0.1) == []

def test_sibling_pairs_by_hand():
    """The picture of sibling_pairs; one visit is no evidence; gap; no direction from .5 on."""
    for c, settings, want in (((3, -0.6), {}, [(0, 2, 3 / 15)]), ((1, -0.6), {}, []),
                              ((3, -0.6), dict(least_visits=1), [(0, 3, 1 / 13)]),
                              ((3, -0.6), dict(gap=1.0), []), ((12, -0.6), {}, [])):
        tree = Tree(None, 0, [9])
        for i, (visits, q) in enumerate(((12, 0.4), (5, 0.2), c, (1, -1.0))):
            add(tree, tree.root, [i], visits=visits, value_sum=visits * q)
        assert [(pair.chosen[0].ids[0], pair.rejected[0].ids[0], pair.smoothing)
                for pair in sibling_pairs(tree, **settings)] == want

def test_cut_winners_make_no_pair():
    """NLL would make the model imitate a text without an end; as a loser it may serve."""
    for end in ("length", "eos"):
        tree = Tree(None, 0, [9])
        add(tree, tree.root, [1], end, visits=6, value_sum=6, rights=6)
        add(tree, tree.root, [2], "length", visits=3, value_sum=-3, wrongs=3)
        assert len(sibling_pairs(tree)) == len(rate_pairs(tree)) == (end == "eos")

def test_rate_pairs_by_hand():
    """The picture of rate_pairs; evenness is the mean over nodes of worst rate / best rate."""
    tree = Tree(None, 0, [9])
    children = [add(tree, tree.root, [i], rights=rights, wrongs=wrongs)
                for i, (rights, wrongs) in enumerate(((1, 1), (4, 1), (2, 2), (0, 1)))]
    b, a, c, _ = children
    pairs = [(pair.chosen, pair.rejected, pair.smoothing) for pair in rate_pairs(tree)]
    assert pairs == [([a], [b], 0), ([a], [c], 0)] and rate_pairs(tree, gap=0.4) == []
    assert evenness([tree]) == 0.5 / 0.8 and evenness([]) == 0
    add(tree, a, [0], rights=4), add(tree, a, [1], wrongs=2)
    others = [Tree(None, 0, [9])] * 39
    assert evenness([tree, *others]) == (0.5 / 0.8 + 0) / 2
    assert evenness([tree, *others, others[0]]) == 0
    assert [(pair.chosen[0].parent, pair.rejected[0].ids[0]) for pair in rate_pairs(tree)[2:]] \
        == [(a, 1)]
    tree = Tree(None, 0, [9])
    for i, rights in enumerate((4, 7)):                 # .7 - .4 is .29999999999999993
        add(tree, tree.root, [i], rights=rights, wrongs=10 - rights)
    assert len(rate_pairs(tree)) == 1

# ---- Rows ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("sides", [((), (4,)), ((2,), ()), ((), ()), ((2,), (2,)), ((0,), (0,)),
                                   ((2, 3), (2,)), ((3,), (4,)), ((1,), (2,)), ((2,), (6,))])
def test_sides_that_are_no_branches(sides):
    """Empty or equal sides, a step against its own parent, steps of two parents: ValueError."""
    nodes = random_nodes(0)
    with pytest.raises(ValueError, match="different branches"):
        tree_row([Pair(*([nodes[i] for i in side] for side in sides))])

# ---- dpo_loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 5.0))
def test_laws_of_the_loss(beta):
    """ln 2, 1/(4 beta^2) and slopes at the reference; swap; constants; finite differences, also
    where exp(beta h) overflows."""
    ref = torch.tensor([[-3.0, -70.0, -0.01], [-4.0, -1.0, -90.0]], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    c, r, rc, rr = -300 * torch.rand(4, 50, generator=rng, dtype=torch.float64)
    h = (c - rc) - (r - rr)
    for kind, a, value, slope in [("ipo", 0.0, 1 / (4 * beta ** 2), -1 / beta)] + [
            ("sigmoid", a, math.log(2), -beta * (1 - 2 * a) / 2) for a in (0.0, 0.1, 0.3, 0.5)]:
        chosen, rejected = (side.clone().requires_grad_() for side in ref)
        loss, good, bad = dpo_loss(chosen, rejected, *ref, beta, a, kind)
        loss.sum().backward()
        assert loss.tolist() == pytest.approx([value] * 3, rel=1e-12)
        assert chosen.grad.tolist() == pytest.approx([slope] * 3, rel=1e-12)
        assert rejected.grad.tolist() == pytest.approx([-slope] * 3, rel=1e-12)
        loss, good, bad = dpo_loss(c, r, rc, rr, beta, a, kind)
        other, good2, bad2 = dpo_loss(r, c, rr, rc, beta, a, kind)
        assert near(good, bad2) and near(bad, good2)
        assert near(other - loss, (1 - 2 * a) * beta * h if kind == "sigmoid" else 2 * h / beta)
        assert near(loss, dpo_loss(c, r, rc + 7.5, rr + 7.5, beta, a, kind)[0])
        few = torch.stack([c, r])[:, :3].requires_grad_()
        loss_of = lambda sides: dpo_loss(*sides, rc[:3], rr[:3], beta, a, kind)[0]
        assert torch.autograd.gradcheck(loss_of, few)

def test_loss_by_hand():
    """h 1.5, -2: -ln sigmoid(.75) = .386871, ln(1 + e) = 1.313262; IPO (h - 1)^2."""
    args = torch.tensor([[-10., -5.], [-12., -7.], [-11., -4.], [-11.5, -8.]], requires_grad=True)
    loss, good, bad = dpo_loss(*args, beta=0.5)
    assert loss.tolist() == pytest.approx([0.386871, 1.313262], abs=1e-6)
    assert good.tolist() == [0.5, -0.5] and bad.tolist() == [-0.25, 0.5]
    assert loss.requires_grad and not good.requires_grad and not bad.requires_grad
    smooth = dpo_loss(*args, 0.5, torch.tensor([0.25, 0.1]))[0]
    assert smooth.tolist() == pytest.approx([0.386871 + 0.25 * 0.75, 1.313262 - 0.1], abs=1e-6)
    assert dpo_loss(*args, beta=0.5, kind="ipo")[0].tolist() == [0.25, 9.0]
    with pytest.raises(ValueError, match="hinge"):
        dpo_loss(*args, kind="hinge")

# ---- Losses of packed rows = those of plain rows -------------------------------------------------
@pytest.mark.parametrize("kind", ("sigmoid", "ipo"))
def test_preference_loss_is_that_of_plain_rows(kind):
    """Loss, statistics and gradients, with the formulas of DPO, IPO and NLL written again. The
    reference is stored in parts or at once; with the policy itself the loss is ln 2."""
    model, reference, beta, want, seen = tiny(), tiny(seed=5), 0.3, 0, []
    rows = [row_of(seed) for seed in range(3)]
    store_reference(model, rows, tokens=2048)
    assert preference_loss(model, rows, nll=0)[2]["dpo"] == pytest.approx(12 * math.log(2))
    store_reference(reference, rows, tokens=60)
    total, weight, stats = preference_loss(model, rows, beta, 0.7, kind)
    packed = gradients(model, total)
    for pair in [pair for row in rows for pair in row.pairs]:
        (chosen, n), (rejected, m) = side(model, pair.chosen), side(model, pair.rejected)
        good = chosen - side(reference, pair.chosen)[0]
        bad = rejected - side(reference, pair.rejected)[0]
        h = good / n - bad / m if kind == "ipo" else good - bad
        loss = (h - 1 / (2 * beta)) ** 2 if kind == "ipo" else (
            torch.log1p(torch.exp(-beta * h)) + pair.smoothing * beta * h)
        want = want + loss - 0.7 * chosen / n
        seen.append([*torch.stack([loss, beta * h, h > 0, good / n, bad / m]).tolist(), n, m])
    assert weight == 12
    assert total.item() == pytest.approx(want.item(), rel=1e-5)
    assert_near(packed, gradients(model, want), 1e-5)
    assert [*stats] == ["dpo", "margin", "agree", "chosen_shift", "rejected_shift",
                        "chosen_tokens", "rejected_tokens"]
    assert [*stats.values()] == pytest.approx(np.sum(seen, 0).tolist(), rel=1e-4, abs=1e-4)

def test_sft_loss_is_that_of_plain_rows():
    """Solutions of packed trees, one of them twice, weigh as in rows of their own (text_row)."""
    model, trees = tiny(), [random_nodes(seed) for seed in range(3)]
    ends = [[nodes[i] for i in (3, 5, 7, 7)] for nodes in trees]
    plain = [side(model, end.path()[1:]) for end in sum(ends, [])]
    want = gradients(model, -sum(logp for logp, _ in plain))
    for rows in ([tree_row(solutions=some) for some in ends],
                 [text_row(end.tree.root.ids, end.solution()) for end in sum(ends, [])]):
        total, weight, stats = sft_loss(model, rows)
        assert stats == {} and weight == sum(size for _, size in plain)
        assert_near(gradients(model, total), want, 1e-5)

@pytest.mark.parametrize("count", (9, 1, 0))
def test_sliced_log_probs(count):
    """Slices of four tokens give the log-softmax over ids that are tokens, and its gradient."""
    model, rng = tiny(), torch.Generator().manual_seed(0)
    fake = torch.arange(V) % 5 == 0
    model.id_bias = torch.zeros(V).masked_fill(fake, -math.inf)
    targets = torch.randint(0, V // 5, (count,), generator=rng) * 5 + 1
    hidden = torch.randn(count, 32, generator=rng).requires_grad_()
    logits = (hidden @ model.lm_head.weight.T).masked_fill(fake, -math.inf)
    want = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    logps = target_logps(model, hidden, targets, at_once=4 * V)
    slope = [torch.autograd.grad((x * torch.arange(count)).sum(), [hidden, model.lm_head.weight])
             for x in (want, logps)]
    assert near(logps, want) and all(near(one, two) for one, two in zip(*slope))

# ---- On sampled trees ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sampled():
    """A model and two graded trees that it sampled; in the second all is right."""
    trees, sampler, _ = grown("llama", range(2))
    for tree in trees:
        for i, end in enumerate(tree.ends()):
            record_grade(end, tree is trees[1] or i % 3 == 0)
    return sampler.model.requires_grad_(True), trees

def grpo_loss(model, rows, clip=0.2):
    """An exercise's solution: GRPO (2402.03300), the samples of a question being its group.

    -sum of min(ratio A, clipped ratio A) over all tokens of all samples, A = (reward - mean) / std.
    A node stands for `rights` samples of reward 1 and `wrongs` of reward 0."""
    total, weight = 0.0, 0
    for row, logps in zip(rows, log_probs(model, rows)):
        root, *nodes = row.packed.span
        mean = root.rights / (root.rights + root.wrongs)
        std = math.sqrt(mean * (1 - mean)) + 1e-6
        for node in nodes:
            ratio = (logps[row.packed.span[node]] - torch.from_numpy(node.logps)).exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            for samples, reward in ((node.rights, 1), (node.wrongs, 0)):
                advantage = (reward - mean) / std
                gain = torch.minimum(ratio * advantage, clipped * advantage)
                total = total - samples * gain.sum()
            weight += (node.rights + node.wrongs) * len(node.ids)
    return total, weight, {}

def test_grpo_in_thirty_lines(sampled):
    """The gradient is 0 without advantage, that of -sum A log p over plain rows, and it works."""
    model, trees = sampled
    rows = [tree_row(also=tree.nodes) for tree in trees]
    same = gradients(model, grpo_loss(model, rows[1:])[0])          # all ends are right
    assert all(g.abs().max() < 1e-6 for g in same.values())
    ends, root = trees[0].ends(), trees[0].root
    mean = root.rights / len(ends)
    plain = [side(model, end.path()[1:])[0] for end in ends]
    want = -sum((end.right - mean) * logp for end, logp in zip(ends, plain))
    want = want / (mean * (1 - mean)) ** 0.5
    assert_near(gradients(model, grpo_loss(model, rows[:1])[0]), gradients(model, want), 1e-4)
    start = weights(model)
    train(model, [rows] * 6, grpo_loss, 3e-4)
    moved = [(side(model, end.path()[1:])[0] - logp).item() for end, logp in zip(ends, plain)]
    model.load_state_dict(start)
    assert np.mean([m for m, end in zip(moved, ends) if end.right]) > 0
    assert np.mean([m for m, end in zip(moved, ends) if not end.right]) < 0

# ---- Batches and optimisers ----------------------------------------------------------------------
def test_batches_are_shuffled_epochs():
    """No row comes again before all have come; at most `epochs` passes; seeds decide the order."""
    rows = list(range(10))
    for size, updates, epochs, sizes in ((8, 7, 3, [4, 4, 4, 5, 4, 4, 5]), (8, 2, 3, [8, 8]),
                                         (16, 2, math.inf, [16, 16]), (4, 4, 1, [2, 3, 2, 3]),
                                         (8, 64, 3, [1] * 30)):
        found = batches(rows, size, updates, 1, epochs)
        order = sum(found, [])
        passes = [order[i:i + 10] for i in range(0, len(order), 10)]
        assert [*map(len, found)] == sizes and all(len({*some}) == len(some) for some in passes)
    assert batches(rows, 4, 9, 1) == batches(rows, 4, 9, 1) != batches(rows, 4, 9, 2)
    assert batches([], 8, 16, 0) == batches([], 8, 16, 0, epochs=3) == []

def test_rates():
    """A line up, a line down that would meet 0 after the last update; rates by model size."""
    for updates, warmup in ((1, 0), (10, 0), (10, 3), (10, 9)):
        line = [(i + 1) / warmup for i in range(warmup)]
        line += [(updates - i) / (updates - warmup) for i in range(warmup, updates)]
        assert [schedule(i, updates, warmup) for i in range(updates)] == pytest.approx(line)
    assert 0 < schedule(0, 10, 20) <= schedule(9, 10, 20) <= 1
    assert scaled_lr(torch.nn.Linear(7_000, 1_000, bias=False), dpo.DPO_LR) == pytest.approx(1e-5)

def test_muon():
    """Three updates equal a textbook in float64; the first has all singular values near 1."""
    rng = torch.Generator().manual_seed(0)
    for shape in ((16, 48), (48, 16), (32, 32), (1, 8)):
        p, size, momentum, want = torch.zeros(shape), 0.02 * max(shape) ** 0.5, 0, 0
        optimizer = Muon([p], dict(lr=0.1))
        for update in range(3):
            p.grad = torch.randn(shape, generator=rng)
            optimizer.step()
            momentum = 0.95 * momentum + 0.05 * p.grad.double()
            x = 0.05 * p.grad.double() + 0.95 * momentum
            x = x / x.norm()
            for _ in range(5):
                s = x @ x.T
                x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
            want = want - size * x
            assert (p - want).norm() < 1e-4 * want.norm()
            assert update or all(0.5 < value < 1.3 for value in torch.linalg.svdvals(p / size))

# ---- train ---------------------------------------------------------------------------------------
def some_batches(updates, size=2):
    """A batch of different trees for every update."""
    return [[row_of(size * i + j) for j in range(size)] for i in range(updates)]

def test_adamw():
    """Three updates equal a textbook without weight decay; the third gradient is cut to norm 1."""
    model, m, v, moved = tiny(hidden=8), 0, 0, 0
    start, n = weights(model), sum(p.numel() for p in model.parameters())
    slopes = iter((0.001, 0.005, 1e3))
    pull = lambda model, rows: (next(slopes) * sum(p.sum() for p in model.parameters()), 1, {})
    train(model, [[text_row([1], [2])]] * 3, pull, 1e-3, warmup=0)
    for i, g in enumerate((0.001, 0.005, n ** -0.5)):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        fraction = m / (1 - 0.9 ** (i + 1)) / (v / (1 - 0.95 ** (i + 1))) ** 0.5
        moved += 1e-3 * schedule(i, 3, 0) * fraction
    assert all((p - start[name] + moved).abs().max() < 1e-6 for name, p in weights(model).items())

@pytest.mark.parametrize("muon", (False, True))
def test_one_part_of_eight_is_eight_parts_of_one(muon, capfd):
    """Parts change neither weights nor report; no progress is written where no terminal is."""
    data, reports, trained = some_batches(3, size=8), [], []
    for tokens in (10 ** 6, 1, 70):
        trained.append(tiny())
        reports.append(train(trained[-1], data, LOSS, 1e-3, muon, warmup=1, tokens=tokens))
        assert_near(weights(trained[-1]), weights(trained[0]), 1e-5)
        fall = -reports[-1]["chosen_shift"]             # 1e-3 is too much, and the report says so
        assert fall > 0.05 and f"{fall:.3f} nats a token" in reports[-1].pop("alarm")
        assert reports[-1] == pytest.approx(reports[0], abs=1e-4)
    assert reports[0]["trained_tokens"] == sum(len(row.learn) for rows in data for row in rows)
    assert capfd.readouterr().err == ""

def test_equal_shares():
    """All rows, at most so many shares; the largest is hardly above the best cut of sorted rows."""
    rng = random.Random(0)
    for count in (1, 2, 3, 5, 32):
        rows = [text_row([1], [2] * rng.randrange(1, 80)) for _ in range(count)]
        lengths = sorted(len(row.learn) for row in rows)
        for most in (1, 2, 3):
            shares = [[len(row.learn) for row in share] for share in dpo.equal_shares(rows, most)]
            assert sum(shares, []) == lengths and len(shares) <= most
            best = min(max(len(part) * max(part, default=0) for part in parts)
                       for parts in cuts(lengths, most))
            assert max(len(share) * max(share) for share in shares) <= 1.02 * best

def cuts(items, most):
    """All ways to cut a list into so many pieces, empty ones included."""
    if most == 1:
        return [[items]]
    return [[items[:i]] + rest for i in range(len(items) + 1) for rest in cuts(items[i:], most - 1)]

@pytest.mark.parametrize("muon", (False, True))
def test_shares_at_once_are_shares_one_after_the_other(muon):
    """Threads change no byte of weights and report; shares change rounding only."""
    data, results = some_batches(6, size=5), []
    with ThreadPoolExecutor(3) as pool:
        for shares, run in ((1, map), (3, map), (3, pool.map), (3, pool.map)):
            model = tiny()
            report = train(model, data, LOSS, 1e-4, muon, shares=shares, map_fn=run)
            results.append((weights(model), report))
    (whole, report), (one, one_report), *others = results
    assert_near(one, whole, 1e-5)
    assert one_report == pytest.approx(report, abs=1e-4)
    for other, other_report in others:
        assert other_report == one_report
        assert all(torch.equal(other[name], one[name]) for name in one)

def test_report_is_of_the_last_quarter():
    """Without learning (lr 0) the means are those of the last quarter's pairs."""
    data, model = some_batches(8), tiny()
    report, (total, weight, stats) = train(model, data, LOSS, 0.0), LOSS(model, data[6] + data[7])
    want = total.item() / weight, stats["margin"] / weight
    assert (report["loss"], report["margin"]) == pytest.approx(want, rel=1e-4)
    assert train(model, [], LOSS, 1e-3) == dict(steps=0, skipped=0, trained_tokens=0)

@pytest.mark.parametrize("how", (math.nan, math.inf, "gradient"))
def test_updates_that_are_not_finite(how):
    """They change no weight and are counted, in the last quarter, too; BadInput if half are."""
    def run(spoilt):
        """Eight updates, some with a loss (or only a gradient) that is not finite."""
        def loss_fn(model, rows):
            total, weight, stats = sft_loss(model, rows)
            if len(seen) in spoilt:
                total = total + (0 * total).sqrt() if how == "gradient" else total * how
            seen.append(weights(model))
            return total, weight, stats
        return train(model, [[text_row([1, 2], [3, 4, 5])]] * 8, loss_fn, 1e-3, muon=True)
    model, seen = tiny(hidden=8), []
    report = run({1, 6, 7})
    for i, (one, two) in enumerate(zip(seen, [*seen[1:], weights(model)])):
        assert all(torch.equal(one[name], two[name]) for name in one) == (i in (1, 6, 7))
    assert report["steps"] == 5 and report["skipped"] == 3 and math.isfinite(report["loss"])
    seen.clear()
    with pytest.raises(BadInput, match="learning rate"):
        run({1, 3, 5, 7})

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_interrupted_training_ends_in_the_same_bytes(dtype, tmp_path, monkeypatch):
    """Stopped and gone on with by a model of other weights (seed 7): the same. A state of another
    rate or of other rows is not used: the training begins anew, with the weights of seed 0."""
    monkeypatch.setattr(dpo, "SAVE_EVERY", 0)
    data, state, stop = some_batches(5), tmp_path / "state", None

    def loss_fn(model, rows):
        if stop is not None and any(rows[0] is row for row in data[stop]):
            raise KeyboardInterrupt
        return LOSS(model, rows)
    run = partial(train, batches=data, loss_fn=loss_fn, lr=1e-3, muon=True, warmup=2)
    whole = tiny(dtype=dtype)
    report = run(whole)
    for stops, other_plan, seed in (([1], {}, 7), ([2, 3], {}, 7), ([4], dict(lr=2e-3), 0),
                                    ([2], dict(batches=data[::-1]), 0)):
        for other, stop in enumerate(stops):
            with pytest.raises(KeyboardInterrupt):
                run(tiny(other, dtype=dtype), state=state, **other_plan)
        assert state.exists()
        stop, model = None, tiny(seed, dtype=dtype)
        assert run(model, state=state) == report and not state.exists()
        for name, p in whole.named_parameters():
            assert torch.equal(p, model.get_parameter(name))
            assert torch.equal(whole.masters()[name], model.masters()[name])


@pytest.mark.parametrize("trainings", ([50], [1] * 50))
def test_masters_keep_small_updates(trainings):
    """Fifty updates of 1e-5 add up in a bf16 model, in one training or in fifty."""
    pull = lambda model, rows: (sum(p.float().sum() for p in model.parameters()), 1, {})
    model, row = tiny(hidden=8, dtype=torch.bfloat16), text_row([1], [2])
    start = weights(model)
    for updates in trainings:               # AdamW moves each weight by the learning rate
        factors = sum(schedule(i, updates, 5) for i in range(updates))
        train(model, [[row]] * updates, pull, 1e-5 * updates / factors)
    for name, p in model.named_parameters():
        master = model.masters()[name].detach()
        assert (master - (start[name].float() - 50e-5)).abs().max() < 1e-5
        assert torch.equal(p.detach(), master.bfloat16())


def test_at_most_eight_pairs_a_tree():
    """So that a tree of many ends does not outweigh the others."""
    tree = Tree(None, 0, [9])
    for i in range(20):
        record_grade(add(tree, tree.root, [i], "eos"), i % 2 == 0)
    pairs = outcome_pairs(tree)
    assert len(pit_pairs(tree)) == len(pairs) == len({pair.rejected[0] for pair in pairs}) == 8
