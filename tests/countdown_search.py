"""Does search find the winning first move? On countdown brute force knows which first moves can still reach the target.

    python tests/countdown_search.py MODEL_FOLDER [QUESTIONS]         (a countdown model; some minutes on one core)

Held-out questions, MCTS to terminals; the reward checks every line, so `solved` is pass@n with a checker, not what a
model answers unaided. Per number of simulations: the share of trees whose most-visited first move is a winning one,
the share of trees with a solution, sampled tokens a question. Beside it: the share of winning first moves in the
model's own samples, Q of winning and of losing first moves."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from critic import Countdown, solution_over  # noqa: E402
from loop import Config  # noqa: E402
from mcts import Forest, Steps, best_child, fixed_width, plant, search  # noqa: E402
from model import GPT, Sampler, mix  # noqa: E402


def reaches(task, numbers, target):
    """Brute force: can the target still be made of these numbers?"""
    return numbers == (target,) or any(reaches(task, left, target) for left in {
        tuple(sorted(left)) for _, left in task.moves(numbers)})


def first_moves(task, question, forest, b):
    """{child of the root: can its position still win?}; an illegal line cannot."""
    found = {}
    for n in forest.children[b][0]:
        left = dict(task.moves(task.numbers(question.text))).get(forest.text(b, n, task.tokenizer))
        found[n] = left is not None and reaches(task, left, int(question.answer))
    return found


def study(model, task, questions, simulations):
    """One search of all questions: a row of the table."""
    sampler, forest = Sampler(model, task.tokenizer, 100_000, 256, solution_over), Forest(len(questions))
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.prompt_ids(q))

    def evaluate(forest, ends):
        """1 for a legal solution, else -1."""
        for b, n in ends:
            text = forest.text(b, n, task.tokenizer, model.stop_ids)
            forest.right[b, n] = task.reward(questions[b].text, text, questions[b].answer)
        return [2.0 * forest.right[e] - 1 for e in ends]
    search(forest, Steps(forest, sampler, [mix(3, b) for b in range(len(questions))], 96), evaluate, simulations,
           width=fixed_width(5, 3, 8), to_terminal=True)
    moves = [first_moves(task, q, forest, b) for b, q in enumerate(questions)]
    won = np.mean([m[best_child(forest, b, 0)] for b, m in enumerate(moves)])
    drawn = [(good, int(forest.count[b, n])) for b, m in enumerate(moves) for n, good in m.items()]
    q = {good: [forest.value_sum[b, n] / forest.visits[b, n] for b, m in enumerate(moves) for n, g in m.items()
                if g == good and forest.visits[b, n]] for good in (True, False)}
    return (simulations, won, np.mean([forest.below(b)[0] > 0 for b in range(len(questions))]),
            sampler.counts["sampled"] / len(questions), sum(k for g, k in drawn if g) / sum(k for _, k in drawn),
            np.mean(q[True]), np.mean(q[False]))


def main():
    """The table for the model folder given."""
    task = Countdown(Config(task="countdown", eval_questions=int(sys.argv[2]) if len(sys.argv) > 2 else 200))
    model, questions = GPT.from_pretrained(sys.argv[1]).bind(task.tokenizer), task.eval_questions()
    print("simulations  most visited wins  solved  tokens/question  sampled first moves that win  Q winning  Q losing")
    for simulations in (4, 16, 64, 256):
        row = study(model, task, questions, simulations)
        print("{:11d}  {:17.3f}  {:6.3f}  {:15.0f}  {:28.3f}  {:+9.2f}  {:+8.2f}".format(*row), flush=True)


if __name__ == "__main__":
    main()
