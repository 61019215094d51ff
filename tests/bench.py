"""Speeds, each beside what it is compared with, measured in one run on one thread; the last line is one JSON object.

    python tests/bench.py            five to eleven minutes

sampling: continuing pit prefixes from the sampler's store, against encoding every prefix again for every branch.
search: trees by MCTS with a briefly trained base, against the same search with prefixes encoded again at each
expansion, and against one tree at a time; how time grows with simulations and trees; share of time outside the
sampler; share that critics take in a search with them.
training: whole trees packed in one row, against a chosen row and a rejected row per pair.
peer: continuing 64 rows with the tiny model and with one of SmolLM2-135M's shape (random weights), against
`generate` of the library transformers on the same weights, when that happens to be importable; null otherwise.
limit: what one thread does in plain fp32 matrix products, of the tiny model's shape, and of 64 rows with the large
one's."""
import importlib.util
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dpo import Pair, collate, preference_loss, sft_loss, store_reference, train, tree_row  # noqa: E402
from critic import LOG_PROB_FEATURES, Critic, Homework, critic_values, solution_over  # noqa: E402
from loop import Config, Corpus  # noqa: E402
from mcts import Forest, Steps, fixed_width, importance_width, plant, search, uct  # noqa: E402
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


class Again(Steps):
    """As `Steps`, but every expansion encodes its whole prefix anew: what a program without a shared store does."""

    def submit(self, wants):
        """Lay the ids of each path down once more, then ask as usual."""
        for b, n, count in wants:
            kept = self.forest.slots[b]
            fresh = self.sampler._take(self.forest.path_of(b, n, "ids").astype(int))
            path, self.forest.slots[b] = self.forest.path(b, n), list(kept)
            for m in path:
                self.forest.slots[b][m], fresh = fresh[:len(kept[m])], fresh[len(kept[m]):]
            super().submit([(b, n, count)])
            self.forest.slots[b] = kept


def searches(task, questions, model, simulations, proposer=Steps, rows=256):
    """One search of these questions: {seconds, share outside the sampler, tokens, simulations, occupancy}."""
    sampler = Sampler(model, task.tokenizer, 100_000, rows, solution_over)
    forest, inside = Forest(len(questions)), [0.0]
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.prompt_ids(q))
    step = sampler.step

    def timed(progress=None):
        """The sampler's step, with a stopwatch."""
        start = time.perf_counter()
        found = step(progress)
        inside[0] += time.perf_counter() - start
        return found
    sampler.step = timed

    def evaluate(forest, ends):
        """Right or wrong."""
        texts = [forest.text(b, n, task.tokenizer, model.stop_ids) for b, n in ends]
        return [2.0 * task.reward(questions[b].text, t, questions[b].answer) - 1 for (b, n), t in zip(ends, texts)]
    start = time.perf_counter()
    search(forest, proposer(forest, sampler, [mix(7, b) for b in range(len(questions))], 128), evaluate, simulations,
           width=fixed_width(5, 3, 8), to_terminal=True)
    took, c = time.perf_counter() - start, sampler.counts
    return dict(seconds=took, outside=1 - inside[0] / took, tokens=c["sampled"],
                simulations=int(forest.visits[:, 0].sum()), occupancy=c["live"] / c["room"])


def critic_share(task, questions, model, budget=900.0):
    """Share of a search with critics (`loop.critic_search`'s) that the critics take; heads untrained: the same work."""
    sampler, forest, inside = Sampler(model, task.tokenizer, 100_000, 256, solution_over), Forest(len(questions)), [0.0]
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.prompt_ids(q))
    critic, known = Critic(model.config.hidden_size + LOG_PROB_FEATURES), {}

    def evaluate(forest, ends):
        """Leaf scores, with a stopwatch."""
        start = time.perf_counter()
        found = critic_values(critic, sampler, forest, ends, known=known)
        inside[0] += time.perf_counter() - start
        return found
    start = time.perf_counter()
    search(forest, Steps(forest, sampler, [mix(7, b) for b in range(len(questions))], 128), evaluate, 1000, uct, 0.1,
           importance_width((5, 40), (1, 10), 10.0, 8), budget=budget, patience=16)
    return round(inside[0] / (time.perf_counter() - start), 3)


def search_report():
    """The search part of the object."""
    task = Homework(Config(questions=256, base_steps=150))
    model = GPT(GPTConfig.tiny(task.tokenizer.n_ids)).initialise(0).bind(task.tokenizer)
    train(model, Corpus(task, task.c), sft_loss, 4e-3, muon=True, warmup=20, label="a base for the search")
    questions = task.train_questions(1)
    rate = lambda r: round(r["tokens"] / r["seconds"])
    searches(task, questions[:16], model, 4)                            # not counted
    plain, again = searches(task, questions[:64], model, 32), searches(task, questions[:64], model, 32, Again)
    alone = [searches(task, [q], model, 32) for q in questions[:6]]
    alone = dict(seconds=sum(r["seconds"] for r in alone), tokens=sum(r["tokens"] for r in alone))
    deeper, wider = searches(task, questions[:64], model, 64), searches(task, questions[:128], model, 32)
    many = searches(task, questions, model, 32)
    per = lambda r: r["seconds"] / r["tokens"]
    return {"search_tokens_per_second": rate(plain), "search_prefixes_encoded_again": rate(again),
            "search_one_tree_at_a_time": rate(alone), "search_ratio_encoded_again": round(per(again) / per(plain), 2),
            "search_ratio_one_tree": round(per(alone) / per(plain), 2),
            "simulations_per_second": round(plain["simulations"] / plain["seconds"]),
            "seconds_a_simulation_twice_the_simulations": round(deeper["seconds"] / 2 / plain["seconds"], 2),
            "seconds_a_tree_twice_the_trees": round(wider["seconds"] / 2 / plain["seconds"], 2),
            "search_share_outside_the_sampler": round(plain["outside"], 3),
            "occupancy_64_trees": round(plain["occupancy"], 3), "occupancy_256_trees": round(many["occupancy"], 3),
            "critic_share_64_trees": critic_share(task, questions[:64], model),
            "critic_share_256_trees": critic_share(task, questions, model)}


SMOLLM2 = dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, rms_norm_eps=1e-5,
               rope_theta=1e5, hidden_act="silu", tie_word_embeddings=True)


def generating(model, tok, samples, rows=64, prompt=64, new=32):
    """Tokens a second when `rows` rows, so many samples of each prompt, go on for `new` tokens at temperature 1, and
    the share of them that one thread's matrix products alone would allow: 2 FLOP a weight and token."""
    model.bind(tok).stop_ids = frozenset()              # nobody ends early, here and there
    sampler, rng = Sampler(model, tok, rows * (prompt + new) + 1, rows), random.Random(0)
    texts = [[rng.randrange(256) for _ in range(prompt)] for _ in range(rows // samples)]

    def work():
        sampler.reset()
        paths = [sampler.prompt(t) for t in texts]
        sampler.extend([Request(p, mix(1, i, j), new) for i, p in enumerate(paths) for j in range(samples)])
    took = seconds(work, 1)
    c = model.config
    x, w = torch.randn(rows, c.hidden_size), torch.randn(c.intermediate_size, c.hidden_size)
    limit = 2 * rows * w.numel() / seconds(lambda: x @ w.T, 20)
    head, every = c.vocab_size * c.hidden_size, sum(p.numel() for p in model.parameters())
    flops = 2 * (rows * new * every + len(texts) * prompt * (every - head))    # logits of the sampled tokens only
    return rows * new / took, texts, flops / took / limit


def peer(model, texts, samples, new=32):
    """The same by transformers.generate, or None."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(texts)
    take = dict(attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=0, num_return_sequences=samples)
    return len(texts) * samples * new / seconds(lambda: theirs.generate(ids, **take), 1)


def peers(tok):
    """The peer part of the object: 64 different prompts, and what this project does, eight samples of each of eight."""
    large, found = GPT(GPTConfig.from_json(SMOLLM2)).initialise(0), {}
    for name, model in (("tiny", GPT(GPTConfig.tiny(tok.n_ids)).initialise(0)), ("135m", large)):
        for samples in (1, 8):
            ours, texts, share = generating(model, tok, samples)
            theirs, key = peer(model, texts, samples), f"generate_{name}_{64 // samples}_prompts"
            found |= {key: round(ours, 1), f"{key}_transformers": theirs and round(theirs, 1),
                      f"{key}_ratio": theirs and round(ours / theirs, 2), f"{key}_share_of_matmul": round(share, 2)}
    return found


def student_forest(task, sampler, questions, branches=4):
    """Trees of several students' solutions per question, in the sampler's store."""

    forest, rng = Forest(len(questions)), random.Random(0)
    end = sorted(task.tokenizer.eos_ids)[0]
    for b, q in enumerate(questions):
        plant(forest, b, sampler, task.prompt_ids(q))
        for _ in range(branches):
            n, lines = 0, task.solve(q, rng).split("\n")
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
    block, copy = torch.zeros(1 << 26), torch.zeros(1 << 26)            # 256 MiB each
    bandwidth = 8 * copy.numel() / seconds(lambda: copy.copy_(block), 5)                        # read and written
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
        "threads": 1, "matmul_gflops": round(limit / 1e9, 1), "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "sampling_tokens_per_second": round(tokens / fast), "sampling_prefixes_encoded_again": round(tokens / slow),
        "sampling_ratio": round(slow / fast, 2), "sampling_share_of_matmul": round(tokens / fast * flops / limit, 3),
        "training_pairs_per_second_packed": round(pairs / one, 1),
        "training_pairs_per_second_two_rows": round(pairs / two, 1),
        "training_ratio": round(two / one, 2), "training_share_of_matmul": round(3 * trained / one * flops / limit, 3),
        "pairs_per_tree": round(pairs / len(packed), 2)} | peers(tok) | search_report()))


if __name__ == "__main__":
    main()
