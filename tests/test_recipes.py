"""What each recipe asks for: which trees, pairs, search, seeds, tokens and updates. Every part that
loop.py calls is tested elsewhere; here it is a stand-in that notes how it was called. These tests
were written for wrong wirings that changed results and no other test noticed."""
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch

import critic
import dpo
import loop
import mcts
from loop import Question, Settings
from mcts import NOTHING, Tree


def small_tree():
    """(tree, [a right end 1, a wrong end 2, an open step 3])"""
    tree = Tree(Question("1+1", "1"), 0, [9])
    nodes = [tree.add(tree.root, [i], [-1.0], NOTHING, "eos" * (i < 3)) for i in (1, 2, 3)]
    return tree, nodes


def searched(monkeypatch, method, **settings):
    """A tree, its nodes, and what a method of loop.py asks mcts.search for. Critics say .25."""
    task = SimpleNamespace(reward=lambda question, text, cut: text == question.answer,
                           answer=lambda text: None)
    lab = SimpleNamespace(
        settings=Settings(**settings), sampler=None, task=task, decode=lambda ids: "So 2+3 = $5",
        text=lambda end: str(end.ids[0]), step_sampler=lambda key=None: key,
        leaf_values=lambda nodes, *_, **__: [0.25] * len(nodes))
    monkeypatch.setattr(loop, "search", call := Mock())
    tree, nodes = small_tree()
    method(lab, [tree], 100)
    names = "trees key values go_on rule width".split()
    asked = dict(to_end=True) | dict(zip(names, call.call_args.args)) | call.call_args.kwargs
    return tree, nodes, SimpleNamespace(**asked)


# -- searches --------------------------------------------------------------------------------------
@pytest.mark.parametrize("judged, returns, shown", [
    ("off", [1, -1], None), ("plain", [1.125, -0.875], ""), ("gold", [1.125, -0.875], "1")])
def test_mcts_dpo_searches_with_answers(judged, returns, shown, monkeypatch):
    """+1 or -1, plus the self-evaluation; only gold is shown the answer. PUCT, 5 and 3 steps."""
    seen = []
    says = lambda ends, sampler, shown: seen.append(shown) or [0.125] * len(ends)
    monkeypatch.setattr(critic, "self_evaluation", says)
    for rule in ("", "uct"):
        given = dict(self_evaluation=judged, rule=rule)
        tree, nodes, asked = searched(monkeypatch, loop.search_with_answers, **given)
        assert asked.values(nodes[:2]) == returns
        assert [end.right for end in nodes[:2]] == [True, False]
        assert asked.rule is mcts.RULES[rule or "puct"] and asked.to_end
        assert (asked.width(tree.root), asked.width(nodes[2])) == (5, 3)
    assert {one(nodes[0]) if callable(one) else one for one in seen} == {shown} - {None}


def test_alphallm_searches_with_critics(monkeypatch):
    """UCT, one child more a simulation, up to leaves; lines merge by calculation; patience 16."""
    tree, nodes, asked = searched(monkeypatch, loop.search_with_critic)
    assert asked.values(nodes) == [0.25] * 3 and nodes[0].right is None
    assert asked.rule is mcts.uct and not asked.to_end and asked.key([1]) == "2+3=5"
    for child in nodes:
        child.visits = 1
    assert asked.width(tree.root) == 1 and asked.go_on(tree)
    tree.root.visits = 15
    assert asked.go_on(tree)
    tree.root.visits += 1
    assert not asked.go_on(tree)


def test_combined_searches_for_one_right_end(monkeypatch):
    """A grade, or what critics say of an open step; one child, deep before wide; until solved."""
    tree, nodes, asked = searched(monkeypatch, loop.search_for_solution)
    assert asked.go_on(tree)
    assert (asked.width(tree.root), asked.width(nodes[2])) == (1, 1)
    assert asked.values(nodes[::-1]) == [0.25, 0, 1]
    assert asked.rule is mcts.uct and not asked.to_end
    assert tree.root.rights == 1 and not asked.go_on(tree)


# -- samples ---------------------------------------------------------------------------------------
def test_waves_of_samples(monkeypatch):
    """1, 7, 8, 8 samples, then what is paid for; pits after all waves but the first. Temperature
    and length are those of the settings, in a search, too."""
    waves, tree = [], Tree(None, 0, [9])

    def grow(sampler, wants, max_tokens, temperature, progress):
        assert (max_tokens, temperature) == (50, 0.7)
        waves.extend(k for _, k in wants)
        tree.tokens += 10 * waves[-1]
        return []
    monkeypatch.setattr(loop, "grow", grow)
    monkeypatch.setattr(critic, "label_pits", lambda ends, grow, k, left: waves.append("label"))
    settings = Settings(temperature=0.7, max_tokens=50)
    lab = SimpleNamespace(settings=settings, sampler=None, progress=None)
    loop.sample(lab, [tree], 255, label=True)
    assert waves == [1, 7, "label", 8, "label", 8, "label", 1, "label"]
    steps = loop.Lab.step_sampler(lab)
    assert (steps.temperature, steps.max_tokens) == (0.7, 50)


def test_seeds_of_trees():
    """Seed, stage, chunk and place: each has random numbers of its own."""
    lab = lambda seed: SimpleNamespace(sampler=MagicMock(), task=MagicMock(),
                                       settings=Settings(seed=seed))
    seeds = [tree.seed for seed in (0, 1) for stage in (5, 6) for first in (0, 3)
             for tree in loop.planted(lab(seed), "abc", stage, first)]
    assert len({*seeds}) == len(seeds) == 24


def test_cut_solutions_are_graded_as_cut():
    """The task is told which ends ran into the length limit."""
    tree, (one, other, _) = small_tree()
    one.ended = "length"
    task = SimpleNamespace(reward=lambda question, text, cut: not cut)
    loop.grade_ends(SimpleNamespace(task=task, text=str), [one, other])
    assert (one.right, other.right, tree.root.rights, tree.root.wrongs) == (False, True, 1, 1)


@pytest.mark.parametrize("solved, name", [(2, "more_1"), (1, "searched_1")])
def test_combined_searches_if_most_are_unsolved(solved, name, monkeypatch):
    """More than two of three: these alone share what is left. Otherwise all get more samples."""
    forest, calls = [Tree(i, 0, [9]) for i in range(6)], []
    for tree in forest[:solved]:
        tree.root.rights = 1
    grow = lambda lab, *call: calls.append(call) or (forest if len(calls) == 1 else [])
    monkeypatch.setattr(loop, "grow_forest", grow)
    monkeypatch.setattr(loop, "train_critics", lambda *_: {})
    lab = SimpleNamespace(settings=Settings(budget=100, share=0.4), sampled_tokens=240)
    loop.grow_unsolved(lab, 1, [*range(6)])
    some = [*range(6)] if solved == 2 else [1, 2, 3, 4, 5]
    first, then = [call[:3] for call in calls]
    assert first == ("trees_1", [*range(6)], 40.0) and then == (name, some, 360 / len(some))


@pytest.mark.parametrize("new, each", [(1, 100), (10, 30)])
def test_alphallm_shares_what_is_left(new, each, monkeypatch):
    """What the samples left is for the new questions; none gets more than --budget."""
    monkeypatch.setattr(loop, "grow_forest", grow := Mock(return_value=[]))
    monkeypatch.setattr(loop, "imagined_questions", lambda *_: [*range(new)])
    monkeypatch.setattr(loop, "train_critics", lambda *_: {})
    lab = SimpleNamespace(settings=Settings(budget=100, share=0.4), sampled_tokens=700)
    assert loop.grow_imagined(lab, 1, [*range(10)])[1] == dict(imagined=new, kept=0)
    assert [call.args[3] for call in grow.call_args_list] == [40, each]
    monkeypatch.undo()
    assert loop.grow_forest(lab, "more_1", ["q"], 0, None) == []        # no tokens, no trees


# -- learning --------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, pairs, method", [
    ("outcome_dpo", dpo.outcome_pairs, loop.sample), ("self_explore", dpo.pit_pairs, loop.sample),
    ("mcts_dpo", dpo.sibling_pairs, loop.search_with_answers)])
def test_what_a_recipe_grows_and_prefers(recipe, pairs, method, monkeypatch):
    """Each method's own trees and pairs; pits are looked for by Self-Explore alone."""
    monkeypatch.setattr(loop, "imitate_first", lambda *_: (7, {}))
    monkeypatch.setattr(loop, "grow_forest", lambda lab, *call: call)
    monkeypatch.setattr(loop, "prefer", lambda *call: call)
    lab, learn = SimpleNamespace(settings=Settings()), loop.RECIPES[recipe].learn
    assert learn(lab, 2, ["tree"]) == (lab, 2, ["tree"], pairs)
    *call, grown_by = loop.RECIPES[recipe].grow(lab, 1, ["q"])[0]
    assert call == ["trees_1", ["q"], 7] and getattr(grown_by, "func", grown_by) is method
    assert getattr(grown_by, "keywords", {}) == (dict(label=True) if "self" in recipe else {})


def test_imitating_first(monkeypatch):
    """Round 1: three quarters of the updates, and what its samples left is the method's."""
    monkeypatch.setattr(loop, "grow_forest", grow := Mock())
    monkeypatch.setattr(loop, "imitate", lambda lab, trees, solutions, updates: dict(steps=updates))
    made = []
    lab = SimpleNamespace(settings=Settings(budget=100), sampled_tokens=420,
                          train_or_load=lambda name, make: made.append(name) or make())
    done = dict(rft_steps=48, rft_tokens=0)
    assert loop.imitate_first(lab, 1, [*range(10)]) == (58, done) and made == ["rft"]
    assert loop.imitate_first(lab, 2, [*range(10)]) == (100, {})
    assert grow.call_args.args[1:] == ("first_1", [*range(10)], 40, loop.sample)


def test_imitation_learns_from_all_rounds_so_far(monkeypatch, tmp_path):
    """From samples and searches of rounds 1 to r."""
    for name in ("first_1", "trees_1", "more_1", "trees_2", "searched_2", "trees_3"):
        loop.write_lines(tmp_path / name / "000000.jsonl", [name])
    monkeypatch.setattr(loop, "read_trees", lambda file: [(loop.read_lines(file)[0], {})])
    monkeypatch.setattr(loop, "imitate", lambda lab, found, solutions, updates: found)
    lab = SimpleNamespace(folder=tmp_path, settings=Settings())
    assert loop.learn_right_solutions(lab, 2, []) == ["trees_1", "more_1", "trees_2", "searched_2"]


@pytest.mark.parametrize("r, want", [(1, dict(imitated=1, pairs=["rate"])),
                                     (2, dict(pairs=["rate", "whole"]))])
def test_what_combined_prefers(r, want, monkeypatch):
    """Round 1 imitates first, then siblings; later ones have siblings and whole solutions."""
    monkeypatch.setattr(loop, "forests_so_far", lambda *_: [])
    monkeypatch.setattr(loop, "evenness", lambda trees: 1.0)
    monkeypatch.setattr(loop, "rate_pairs", lambda tree: ["rate"])
    monkeypatch.setattr(loop, "outcome_pairs", lambda tree: ["whole"])
    monkeypatch.setattr(loop, "imitate_right_ones", lambda lab, r, trees: dict(imitated=r))
    monkeypatch.setattr(loop, "prefer", lambda lab, r, trees, pairs: dict(pairs=pairs(None)))
    lab = SimpleNamespace(settings=Settings())
    assert loop.learn_what_helps(lab, r, []) == want | dict(evenness=1.0)


@pytest.mark.parametrize("r, share, updates", [(1, 0.4, 16), (2, 0.4, 64), (1, 0, 64)])
def test_prefer_passes_the_settings_on(r, share, updates, tmp_path, monkeypatch):
    """--beta, --nll, --dpo-lr and --epochs reach the training. A quarter of the updates of round 1,
    where imitation comes first, is left for it; else all."""
    monkeypatch.setattr(loop, "fit", fit := Mock(return_value={}))
    settings = Settings(beta=0.3, nll=0.7, dpo_lr=0.01, epochs=2, share=share)
    lab = SimpleNamespace(settings=settings, folder=tmp_path, model=None, part_tokens=8,
                          decode=None)
    loop.prefer(lab, r, [], None)
    _, _, loss, *rest = fit.call_args.args
    assert loss.keywords == dict(beta=0.3, nll=0.7) and rest == [0.01, updates, 2]


def test_sft_draws_other_examples_each_round(monkeypatch):
    """Rounds differ; the batches of all updates are full."""
    monkeypatch.setattr(loop, "fit", lambda lab, rows, *_, **__: rows)
    lab = SimpleNamespace(settings=Settings(), sft_lr=1.0,
                          example_rows=lambda count, rng: (count, rng.random()))
    (count, one), (_, two) = (loop.learn_examples(lab, r, []) for r in (1, 2))
    assert count == 64 * 32 and one != two


def test_batches_of_like_length():
    """Of every 64 rows the 4 shortest are one batch, and so on; the batches are shuffled."""
    assert loop.parts([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    rows = [SimpleNamespace(packed=SimpleNamespace(ids=range(37 * i % 101))) for i in range(100)]
    size = lambda row: len(row.packed.ids)
    want = [part for block in (rows[:64], rows[64:])
            for part in loop.parts(sorted(map(size, block)), 4)]
    sizes, other = ([[*map(size, batch)] for batch in loop.by_like_length(rows[:], 4, seed)]
                    for seed in (1, 2))
    assert sorted(sizes) == sorted(want) and sizes != want and sizes != other


def test_questions_kept_from_the_critics(tmp_path, monkeypatch):
    """One question in five is held out, with all steps of its tree."""
    forest, kept = [], []
    for i in range(400):
        forest.append(Tree(Question(f"{i}", ""), i, [9]))
        for step, right in ((1, True), (2, False)):
            end = forest[-1].add(forest[-1].root, [step], [-1.0], [0], "eos")
            mcts.record_grade(end, right)

    def fit_critic(features, labels, weights, held_out, *_):
        kept.append(held_out.view(400, 2))
        return critic.Critic(8), {}
    monkeypatch.setattr(loop, "encode_again", lambda *_: None)
    monkeypatch.setattr(critic, "features", lambda nodes, _: torch.zeros(len(nodes), 12))
    monkeypatch.setattr(critic, "fit_critic", fit_critic)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=8), device=torch.device("cpu"))
    lab = SimpleNamespace(settings=Settings(), model=model, folder=tmp_path, sampler=None)
    loop.train_critic(lab, "critic_1", forest)
    assert torch.equal(*kept[0].T) and 55 < kept[0][:, 0].sum() < 105
