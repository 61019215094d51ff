"""Speeds, each beside what it is compared with, measured in one run on one thread; the last line is one JSON object.

    python tests/bench.py            about a minute

sampling: continuing pit prefixes from the sampler's store, against encoding every prefix again for every branch.
training: whole trees packed in one row, against a chosen row and a rejected row per pair.
limit: what one thread does in plain fp32 matrix products of the model's shape."""
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dpo import Pair, collate, preference_loss, sft_loss, store_reference, tree_row  # noqa: E402
from loop import Config, Homework, parse  # noqa: E402
from mcts import Forest, plant  # noqa: E402
from model import GPT, GPTConfig, Request, Sampler, mix  # noqa: E402


def seconds(work, repeats=3):
    """Median wall time of `work`, after one run not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def student_forest(task, sampler, questions, branches=4):
    """Trees of several students' solutions per question, in the sampler's store."""

    forest, rng = Forest(len(questions)), random.Random(0)
    end = sorted(task.tokenizer.eos_ids)[0]
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.tokenizer.encode(task.prompt(q)))
        for _ in range(branches):
            n, lines = 0, task.solve_carelessly(parse(q.text), rng).split("\n")
            for i, text in enumerate(lines):
                last = i == len(lines) - 1
                ids = task.tokenizer.encode(text + "\n" * (not last)) + [end] * last
                n = forest.add(b, n, ids, end="eos" if last else "")
    return forest


def main():
    torch.set_num_threads(1)
    task = Homework(Config(questions=64))
    tok, questions = task.tokenizer, task.train_questions(1)
    model = GPT(GPTConfig.tiny(tok.n_ids)).initialise(0).bind(tok)
    x, w = torch.randn(4096, 128), torch.randn(128, 320)
    limit = 2 * 4096 * 128 * 320 / seconds(lambda: x @ w, 20)
    flops = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)   # per token, forward

    sampler = Sampler(model, tok, 200_000, 256)
    prompts = [tok.encode(task.prompt(q)) + list(range(48, 58)) * 4 for q in questions]    # prefixes of about 50 tokens

    def shared():
        sampler.reset()
        paths = [sampler.prompt(p) for p in prompts]
        return sampler.extend([Request(p, mix(i, j), 24) for i, p in enumerate(paths) for j in range(8)])

    def again():                  # a store that knows nothing of the other branches
        out = []
        for j in range(8):
            sampler.reset()
            paths = [sampler.prompt(p) for p in prompts]
            out += sampler.extend([Request(p, mix(i, j), 24) for i, p in enumerate(paths)])
        return out
    tokens = sum(len(c.ids) for c in shared())
    fast, slow = seconds(shared), seconds(again)

    sampler.reset()
    forest = student_forest(task, sampler, questions)
    packed, apart = [], []
    for b in range(len(questions)):
        kids = {}
        for n in range(1, int(forest.size[b])):
            kids.setdefault(int(forest.parent[b, n]), []).append(n)
        pairs = [Pair([k[0]], [other]) for k in kids.values() for other in k[1:]]
        if pairs:
            packed.append(tree_row(forest, b, pairs))
            for p in pairs:       # the usual way: two rows a pair, each with the whole prefix
                apart += [tree_row(forest, b, paths=[p.chosen[0]]), tree_row(forest, b, paths=[p.rejected[0]])]
    store_reference(model, packed)
    loss = preference_loss()

    def step(rows, f):
        for i in range(0, len(rows), 64):
            f(model, collate(rows[i:i + 64], model.device))[0].backward()
    one, two = seconds(lambda: step(packed, loss)), seconds(lambda: step(apart, sft_loss))
    pairs = sum(len(r.pairs) for r in packed)
    trained = sum(len(r.packed.ids) for r in packed)

    print(json.dumps({
        "threads": 1, "matmul_gflops": round(limit / 1e9, 1),
        "sampling_tokens_per_second": round(tokens / fast), "sampling_prefixes_encoded_again": round(tokens / slow),
        "sampling_ratio": round(slow / fast, 2), "sampling_share_of_matmul": round(tokens / fast * flops / limit, 3),
        "training_pairs_per_second_packed": round(pairs / one, 1), "training_pairs_per_second_two_rows": round(pairs / two, 1),
        "training_ratio": round(two / one, 2), "training_share_of_matmul": round(3 * trained / one * flops / limit, 3),
        "pairs_per_tree": round(pairs / len(packed), 2), "peer": None}))


if __name__ == "__main__":
    main()
