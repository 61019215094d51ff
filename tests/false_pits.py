"""How often is a good step called a pit? On homework the truth is known, so the label of k completions can be checked.

    python tests/false_pits.py RUN/round_0          (a homework model; about a minute on two cores)

For wrong solutions of held-out questions, every prefix before the true pit is completed 16 times; labels for k = 2,
4, 8, 16 use the first k. Printed per k: the share of first pits that lie before the true pit, and beside it what the
estimated chances p_i predict: the mean over solutions of 1 - prod_i (1 - (1 - p_i)^k), p_i from 200 other
completions."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from critic import Homework, grade, solution_over  # noqa: E402
from loop import Config  # noqa: E402
from mcts import Forest, grow, plant  # noqa: E402
from model import GPT, Sampler, mix  # noqa: E402

KS, MANY = (2, 4, 8, 16), 200


def successes(forest, sampler, task, questions, wants, salt, stop):
    """Grades of fresh completions, a list per want."""
    seeds = [mix(salt, b) for b in range(len(questions))]
    return [[grade(forest.text(b, leaf, task.tokenizer, stop), questions[b].answer) for leaf in leaves]
            for (b, _, _), leaves in zip(wants, grow(forest, sampler, wants, seeds, 128))]


def study(model, task, count=100):
    """-> {k: (measured share of false pits, predicted share)}, wrong solutions looked at."""
    sampler, questions = Sampler(model, task.tokenizer, 4096, 256, solution_over), task.distinct(5, True, count)
    forest, stop = Forest(len(questions)), model.stop_ids
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.prompt_ids(q))
    every = range(len(questions))
    leaves = grow(forest, sampler, [(b, 0, 2) for b in every], [mix(1, b) for b in every], 128)
    wants, owner = [], []
    wrong = 0
    for b, q in enumerate(questions):
        for leaf in set(leaves[b]):
            text = forest.text(b, leaf, task.tokenizer, stop)
            true = task.first_false_step(q, text)
            if true is not None and not grade(text, q.answer):
                wants += [(b, n, 16) for n in forest.path(b, leaf)[1:1 + true]]
                owner += [wrong] * true
                wrong += 1
    first = successes(forest, sampler, task, questions, wants, 2, stop)
    p = [np.mean(s) for s in successes(forest, sampler, task, questions, [(b, n, MANY) for b, n, _ in wants], 3, stop)]
    out = {}
    for k in KS:
        measured, good = np.zeros(wrong, bool), np.ones(wrong)
        for i, s in enumerate(first):
            measured[owner[i]] |= not any(s[:k])
            good[owner[i]] *= 1 - (1 - p[i]) ** k
        out[k] = float(measured.mean()), float(np.mean(1 - good))
    return out, wrong


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    task = Homework(Config())
    found, wrong = study(GPT.from_pretrained(sys.argv[1]).bind(task.tokenizer), task)
    print(f"{wrong} wrong solutions\n k   false pits   predicted by (1-p)^k")
    for k, (measured, predicted) in found.items():
        print(f"{k:2d}   {100 * measured:9.2f}%   {100 * predicted:9.2f}%")
