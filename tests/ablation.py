"""What each part of the search with critics adds, on the base of finished runs: python tests/ablation.py RUN [RUN ...]

For each run (best: one recipe with several seeds) critics are trained on the trees of round 1, which the base sampled;
then held-out questions are searched, every variant with the same budget in sampled tokens: 16 solutions' worth. (Tokens
of rollouts by the smaller policy are not in it: they are printed apart, with their time.)
Prints one JSON object, then a table: accuracy with a Wilson interval over all runs, McNemar against the line above."""
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import loop  # noqa: E402
from critic import mcnemar, wilson  # noqa: E402

PLAIN = dict(leaf_score="sum", process_weight=0.0, alpha=0.0, merge=0, widen=8, rollouts=4, rollout_weight=0.0)
VARIANTS = {"value head only": {}, "+ adaptive width": dict(alpha=10.0), "+ process head": dict(process_weight=1.0),
            "+ fast rollouts": dict(rollout_weight=1.0), "+ state merge": dict(merge=1),
            "+ weakest link instead of the sum": dict(leaf_score="weakest"),
            "- fast rollouts": dict(rollout_weight=0.0)}
WORTH, QUESTIONS = 16, 200


def main(folders: list) -> None:
    """Search every variant on every run."""
    right, tokens = {name: [] for name in VARIANTS}, {name: [] for name in VARIANTS}
    for folder in map(Path, folders):
        run, now = loop.bare_run(loop.Config(), folder, 0), dict(PLAIN)
        questions = run.task.eval_questions()[:QUESTIONS]
        trees = loop.read_trees(folder / "trees_01.jsonl")
        each = np.mean([len(t.forest.path_of(t.b, n, "ids", root=False)) for t in trees for n in t.forest.leaves(t.b)])
        run.c, run.chunk = replace(run.c, **now), QUESTIONS
        with tempfile.TemporaryDirectory() as kept:
            run.dir = Path(kept)
            critic, _ = loop.fit_critic(run, 0, trees)
            run.fast = loop.fast_rollouts(run, 0, trees)
            same = run.fast and loop.agreement(run, run.fast, questions)
            print(f"{folder}: greedy answers of the smaller policy that are the policy's: {same}", file=sys.stderr)
            small = run.fast
            spent = lambda: np.array([small.sampler.counts["sampled"], small.seconds]) if small else np.zeros(2)
            for i, (name, change) in enumerate(VARIANTS.items()):
                now |= change
                run.c, run.dir, start = replace(run.c, **now), Path(kept, str(i)), time.perf_counter()
                run.dir.mkdir()
                before = spent()
                rows = loop.decode_cell(run, critic, questions, 0, "mcts", WORTH, WORTH * float(each))
                right[name] += [r["right"] for r in rows]
                tokens[name] += [r["tokens"] for r in rows]
                fast = spent() - before
                took = time.perf_counter() - start
                print(f"{folder} {name} {np.mean([r['right'] for r in rows]):.3f}, {took:.0f} s, "
                      f"of these {fast[1]:.0f} s for {fast[0]:,.0f} tokens of rollouts", file=sys.stderr)
    print(json.dumps({name: dict(accuracy=np.mean(right[name]), tokens=np.mean(tokens[name])) for name in VARIANTS}))
    print("| search | accuracy | 95% interval | tokens | McNemar against the line above |\n|---|---|---|---|---|")
    for above, name in zip([None, *VARIANTS], VARIANTS):
        low, high = wilson(sum(right[name]), len(right[name]))
        p = f"p = {mcnemar(right[name], right[above]):.2g}" if above else "-"
        print(f"| {name} | {100 * np.mean(right[name]):.1f} | {100 * low:.1f} - {100 * high:.1f} "
              f"| {np.mean(tokens[name]):,.0f} | {p} |")


if __name__ == "__main__":
    main(sys.argv[1:])
