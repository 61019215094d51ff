"""Judging: where a wrong solution went wrong, what half a solution is worth, if an answer is right.
The idea (Self-Explore, 2404.10346). Only the end of a solution can be checked. To find the step
that ruined it, complete each of its prefixes k times: the first step from which no completion comes
out right is the first pit. It becomes the rejected side of a preference pair (dpo.py).
What is different from the published codes:
1. Completions are branches of the tree, so a right end found for one solution serves all others.
2. AlphaLLM's critics are small heads on states that the sampler has anyway, not language models.
3. One function grades everywhere, by value: two comparisons in two scripts make false pits.
Chapters: 1 Pits  2 Policy as judge  3 Critics  4 Rollouts  5 Grading  6 Formulas  7 Statistics
Try:  python critic.py      labels the first pit of one wrong solution; two seconds
"""
import signal

if __name__ == "__main__":              # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import re
import statistics
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from mcts import NOTHING, Tree, draw, grow, record_grade
from model import BadInput

# --------------------------------------------------------------------------------------------------
# 1. The first pit
# --------------------------------------------------------------------------------------------------
# HACK HERE: what a pit is. `known_successes` says what is known of each step, `first_pit` which one
# is the pit. For "the success rate drops by half", the former gives tried_right / tried (None if
# not tried, 0 at the end), and the latter compares neighbours. Also change: tests/test_critic.py.
def known_successes(path: list) -> list:
    """For each step of a wrong solution the number of right ends below it, in any branch. None
    means unknown. A 0 needs evidence: either the step ends the solution, or fresh completions of it
    were tried and failed. (The wrong solution is no evidence: it was picked because it failed.)

    Right ends below A, nothing known of B and C, D the wrong end: [1, None, None, 0]."""
    return [node.rights if node.rights or node.tried or node.end else None for node in path]


def first_pit(successes: list) -> int | None:
    """The first step with no success (Self-Explore, 3.2): [4, 2, 0, 0] -> 2; [4, 0, 3] -> 1;
    [4, 4, 4] -> None; [4, None, 0] -> None, because step 1 is unknown.

    When it is wrong: a good step from which the policy recovers with chance p is called a pit with
    probability (1 - p)^k. At p = .3 that is 24% for k = 4 and .3% for k = 16."""
    for step, count in enumerate(successes):
        if count is None:
            return None
        if count == 0:
            return step
    return None


def pit(end):
    """The node of the first pit of a wrong solution. None while an earlier step is unknown, and for
    a right or ungraded end. A right branch that is found later makes a pit disappear."""
    path = end.path()[1:]
    step = first_pit(known_successes(path)) if end.right is False else None
    return None if step is None else path[step]


def label_pits(ends: list, complete, k: int, budget=None) -> None:
    """Complete prefixes of wrong solutions until each has its pit or the budget is spent.

    complete([(node, k)]) samples k completions below each node and grades them (record_grade).
    budget: a mcts.Budget or None. A completion is expected to be as long as the rest of the
    solution; a prefix that the budget does not afford stays unknown. k = 0 labels nothing.

    In every wave each solution asks for one prefix. Here are two that share A; k = 4:

        root - A - B - C - D  wrong     wave 1   A, for both: 2 of 4 are right
                `- E - F  wrong         wave 2   B: 0 of 4, the pit of D;  E: 1 of 4, so F is a pit
    """
    while k > 0:
        wave = {}                                       # node -> tokens its completions may take
        for end in ends:
            path = end.path()[1:]
            successes = known_successes(path)
            if end.right is False and pit(end) is None and None in successes:
                step = successes.index(None)
                wave[path[step]] = k * sum(len(node.ids) for node in path[step + 1:])
        before, cost = {}, 0                            # node -> right ends below it so far
        for node, tokens in wave.items():
            if budget is None or budget.affords(cost + tokens):
                before[node] = node.rights
                cost += tokens
        if not before:
            return
        complete([(node, k) for node in before])
        for node, rights in before.items():
            # other completions of this wave may lie below, too: at most k right ends are its own
            node.tried_right += min(k, node.rights - rights)
            node.tried += k


# --------------------------------------------------------------------------------------------------
# 2. The policy as its own judge (MCTS-DPO, 2405.00451)
# --------------------------------------------------------------------------------------------------
JUDGE = "\n\nIs the solution so far correct?\n(A) {}\n(B) {}\nThe solution so far is ("
JUDGE_STEP = "\n\nIs the last step correct?\n(A) {}\n(B) {}\nThe last step is ("
REFERENCE = "\n\nReference solution:\n{}"
slots_of = lambda node: np.concatenate([step.slots for step in node.path()])    # with the question


@torch.no_grad()
def self_evaluation(nodes: list, sampler, question: str = JUDGE, shown="") -> list:
    """The policy's own P(correct) of each solution so far, a number in (0, 1) each.

    The question stands behind the solution, whose keys and values are used again. Models favour a
    letter, so the mean over both orders of the options is taken: P(correct) .3 with correct as (B)
    and .4 with correct as (A) give .35. It is .5 if the question exceeds the context.

    shown: a reference solution, as text or function node -> text. This shows the judge the answer.
    Report it: in MCTS-DPO the AUC is 74.7 with it and 62.0 without. BadInput: split letters."""
    model, tokenizer = sampler.model, sampler.tokenizer
    letters = tokenizer.encode_more("A") + tokenizer.encode_more("B")
    if len(letters) != 2:
        raise BadInput("This tokenizer splits single letters: switch self-evaluation off.")
    p = np.full((len(nodes), 2), 0.5)                   # (nodes, orders)
    paths, places = [], []
    for i, node in enumerate(nodes):
        above = slots_of(node)[:-1 if node.end == "eos" else None]      # judge before end-of-text
        text = shown(node) if callable(shown) else shown
        text = text and REFERENCE.format(text)
        for order, options in enumerate((("incorrect", "correct"), ("correct", "incorrect"))):
            ids = tokenizer.encode_more(text + question.format(*options))
            if len(above) + len(ids) < model.config.max_positions:
                paths.append(sampler.follow(above, ids))
                places.append((i, order))
    sampler.encode(paths)
    last = torch.tensor([path[-1] for path in paths], dtype=torch.long, device=model.device)
    logits = model.token_logits(sampler.hidden[last])[:, letters]       # (paths, A or B)
    for (i, order), share in zip(places, torch.softmax(logits, -1).tolist()):
        p[i, order] = share[1 - order]                  # "correct" is (B), then (A)
    return p.mean(1).tolist()


# --------------------------------------------------------------------------------------------------
# 3. Learned critics                      M nodes, C hidden size of the policy
# --------------------------------------------------------------------------------------------------
HEADS = ("value", "process", "outcome")
LEAST_AUC = 0.55                        # a head that ranks worse on kept questions is not trusted


class Critic(torch.nn.Module):
    """Three heads on one hidden layer; each gives a probability.

        head      question                                label (critic_labels)
        value     how likely is a right end from here?    share of right ends below the node
        process   is this step good?                      can the solution still end right?
        outcome   is this finished solution right?        its grade

    Inputs: `features`, which the sampler has already. fit_critic trains the heads anew in every
    round, on four questions of five. The fifth question gives the report, and trusted (3,): 1 for a
    head whose AUC there is at least LEAST_AUC. loop.train_critic collects the rows."""

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = torch.nn.Linear(hidden_size + 4, 128)
            self.heads = torch.nn.Linear(128, 3)
        for name, width in dict(mean=hidden_size + 4, std=hidden_size + 4, trusted=3).items():
            self.register_buffer(name, torch.full((width,), float(name == "std")))

    def forward(self, x):
        """(M, C + 4) features -> (M, 3) logits."""
        return self.heads(F.gelu(self.inner((x - self.mean) / self.std)))

    @torch.no_grad()
    def read(self, nodes: list, sampler) -> np.ndarray:
        """(M, 3): what the heads say of nodes that lie in the sampler's store."""
        return torch.sigmoid(self(features(nodes, sampler))).cpu().numpy()


class Judge:
    """The three opinions by asking the policy, as AlphaLLM asks language models."""
    trusted = torch.ones(3)

    def read(self, nodes: list, sampler) -> np.ndarray:
        """(M, 3), as Critic.read."""
        whole = self_evaluation(nodes, sampler)
        return np.array([whole, self_evaluation(nodes, sampler, JUDGE_STEP), whole]).T


def features(nodes: list, sampler) -> torch.Tensor:
    """(M, C + 4): the hidden state from which the step's last token was drawn, and four log-probs:
    lowest and mean of the step, lowest and mean of the whole path.

    Log-probs (-1, -4) of the first step and (-2) of the second give the second -2, -2, -4, -7/3.
    Without these numbers a rare slip looks like any line: the AUC of the outcome head is .63 on
    homework without them and .90 with them."""
    slots, numbers = [], np.zeros((len(nodes), 4), np.float32)
    for node, row in zip(nodes, numbers):
        # a step of one token was drawn from the last state of its parent
        drawn_from = node.slots[:-1] if len(node.slots) > 1 else (node.parent or node).slots
        slots.append(int(drawn_from[-1]))
        step, whole = node.logps, node.solution("logps")
        if len(whole):
            row[:] = step.min(), step.mean(), whole.min(), whole.mean()
    hidden = sampler.hidden[torch.tensor(slots, dtype=torch.long, device=sampler.hidden.device)]
    return torch.cat((hidden.float(), torch.from_numpy(numbers).to(hidden.device)), 1)


def critic_labels(tree: Tree, k: int) -> list:
    """[(node, (value, process, outcome), weight)]: one row for each step with graded samples below
    it; nan where a head has no label. In the picture a 3:1 has 3 right and 1 wrong below it; k = 4:

        q 3:6 -+- a 3:1 -+- b 3:0 end      a  (.75, 1, nan)       b  (nan, 1, 1)
               |         `- c 0:1 end      d  (0, 0, nan)         c  (nan, 0, 0)
               |- d 0:4 --- e 0:4 end      f  (0, nan, nan)       e  (nan, nan, 0)
               `- f 0:1 --- g 0:1 end

    A step is bad (process 0) if its parent can be saved and k samples below it are all wrong; f has
    too few. Steps after the pit d get no process label: they may be good. The weight of a row is
    its number of samples, but at most 8."""
    rows = []
    for node in tree.nodes[1:]:
        samples, good = node.rights + node.wrongs, float(node.rights > 0)
        judged = node.parent.rights > 0 and (good or samples >= k or node.end)
        value = math.nan if node.end else node.rights / max(1, samples)
        labels = (value, good if judged else math.nan, good if node.end else math.nan)
        if samples:
            rows.append((node, labels, min(samples, 8)))
    return rows


def critic_loss(critic: Critic, x, labels, weights):
    """Weighted cross-entropy over the labels (M, 3) that exist. Classes are not re-weighted, so a
    label of .75 is learnt as .75."""
    exists = weights[:, None] * ~labels.isnan()                             # (M, 3)
    return F.binary_cross_entropy_with_logits(critic(x), labels.nan_to_num(), exists,
                                              reduction="sum") / weights.sum()


def fit_critic(features, labels, weights, held_out, updates: int, seed: int) -> tuple:
    """(Critic trained on the nodes that are not held out, report on those that are).

    features (M, C + 4), labels (M, 3), weights (M,), held_out (M,) bool. Hold out whole questions,
    never single nodes: the nodes of one tree share their ends. M may be 0."""
    critic = Critic(features.shape[1] - 4, seed).to(features.device)
    x, y, w = features[~held_out], labels[~held_out], weights[~held_out]
    if len(x):
        critic.mean.copy_(x.mean(0))
        critic.std.copy_(x.std(0, unbiased=False) + 1e-6)
    optimizer = torch.optim.AdamW(critic.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(seed)
    for update in range(updates if len(x) else 0):
        batch = torch.randint(len(x), (256,), generator=rng).to(x.device)
        loss = critic_loss(critic, x[batch], y[batch], w[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        optimizer.step()
    with torch.no_grad():
        said = torch.sigmoid(critic(features[held_out])).cpu().numpy()      # (held out, 3)
    report = {}
    for i, head in enumerate(HEADS):
        report[head] = measure(said[:, i], labels[held_out, i].cpu().numpy())
        if y[:, i].isnan().all():
            report[head].update(trusted=False, note="no label to learn from")
        critic.trusted[i] = report[head]["trusted"]
    return critic, report


def measure(said, truth) -> dict:
    """What a head says (M,) against the labels (M,), nan where there is none.

    auc          chance that a right node (label >= .5) scores above a wrong one
    brier        mean (said - truth)^2;  constant: that of the best constant, for comparison
    calibration  for each tenth of [0, 1]: (mean said, mean truth, number of nodes)
    trusted      is auc at least LEAST_AUC?  note: if not, why, in words"""
    said, truth = said[~np.isnan(truth)], truth[~np.isnan(truth)]
    rank, n = auc(said, truth >= 0.5), len(truth)
    note = "" if (rank or 0) >= LEAST_AUC else f"AUC below {LEAST_AUC}"
    if rank is None:
        note = "all held-out labels are of one kind" if n else "no held-out label"
    tenth = np.minimum(said * 10, 9).astype(int)
    calibration = []
    for here in (tenth == i for i in np.unique(tenth)):
        calibration.append((float(said[here].mean()), float(truth[here].mean()), int(here.sum())))
    return dict(auc=rank, brier=float(np.mean((said - truth) ** 2)) if n else None,
                constant=float(np.var(truth)) if n else None, calibration=calibration,
                nodes=n, trusted=not note, note=note)


# HACK HERE: what a leaf of the search is worth. Also change: the numbers in tests/test_critic.py.
def leaf_values(nodes, critic, sampler, rule="weakest", rollouts=None, known=None) -> list:
    """One number in [0, 1] for each node. Heads that are not trusted are left out.

    weakest (ours): the lowest of what the heads say along the path: value of every prefix, process
        of every step, outcome of the end. One wrong line ruins a solution, and among many samples
        one will fool a single head. (Best of 64 on homework: 72% by the outcome head, 89% by the
        weakest link.) Rank by it, but set no threshold on it: the value of a prefix is low wherever
        the policy seldom succeeds.
    else: the mean of what the heads (AlphaLLM's sum), or a judge, say of the node alone.

        heads say (value, process, outcome): a (.7, .9, -), its end b (-, .8, .95)
        weakest   a: min(.7, .9) = .7        b: min(.7, .9, .8, .95) = .7
        sum       a: (.7 + .9) / 2 = .8      b: (.8 + .95) / 2 = .875

    rollouts say one number more of a node that is no end. If nothing is said, a node is worth .5.
    known: {node: (3,)}, what the heads said; the caller keeps it through a search."""
    known = {} if known is None else known
    weakest = rule == "weakest"
    paths = {node: weakest and node.path()[1:] or [node] for node in nodes}
    new = {step: None for path in paths.values() for step in path if step not in known}
    if new:
        known.update(zip(new, critic.read(list(new), sampler)))
    rolled = rollouts.score([node for node in nodes if not node.end]) if rollouts else {}
    value, process, outcome = critic.trusted.bool().tolist()
    worth = []
    for node in nodes:
        said = [rolled[node]] if node in rolled else []
        said += [known[step][0] for step in paths[node] if value and not step.end]
        said += [known[step][1] for step in paths[node] if process and step.parent]
        said += [known[node][2]] if outcome and node.end else []
        combine = min if weakest else np.mean
        worth.append(float(combine(said)) if said else 0.5)
    return worth


# --------------------------------------------------------------------------------------------------
# 4. Fast rollouts (AlphaLLM)
# --------------------------------------------------------------------------------------------------
class Rollouts:
    """A small model finishes a leaf n times. The mean of what its own outcome head says of these
    ends is one more opinion about the leaf.

    sampler, critic  of the small model
    text             node -> str, if its tokenizer is another one; None: ids are shared
    room             its store is emptied when it has taken in so many tokens
    tokens           sampled by it so far

    twin[node] is the node's copy in a tree of the small model, so no prefix is encoded twice."""

    def __init__(self, sampler, critic, n: int, max_tokens: int, text=None, room: int = 65536):
        self.sampler, self.critic, self.text = sampler, critic, text
        self.n, self.max_tokens, self.room = n, max_tokens, room
        self.twin, self.fresh = {}, []                  # fresh: twins without log-probs
        self.tokens = self.emptied = 0                  # emptied: taken in before the last reset
        # the critic may have learnt from samples of this sampler: its caller has counted those
        sampler.reset()
        sampler.counts = dict.fromkeys(sampler.counts, 0)

    def copy(self, node):
        """The twin of a node, made with those above it if they are missing. None: no room."""
        if node in self.twin:
            return self.twin[node]
        above = self.copy(node.parent) if node.parent else None
        tokenizer, limit = self.sampler.tokenizer, self.sampler.model.config.max_positions
        encode = tokenizer.encode_more if node.parent else tokenizer.encode_prompt
        ids = encode(self.text(node)) if self.text else node.ids.tolist()
        prefix = slots_of(above) if above else NOTHING
        if (node.parent and above is None) or not 0 < len(prefix) + len(ids) < limit:
            return None
        if above is None:
            twin = Tree(None, node.tree.seed + 1, ids, self.sampler.prompt(ids)).root
        else:
            slots = self.sampler.follow(prefix, ids)[len(prefix):]
            twin = above.tree.add(above, ids, np.zeros(len(ids)), slots)
            self.fresh.append(twin)
        self.twin[node] = twin
        return twin

    def score(self, nodes: list) -> dict:
        """{node: mean outcome of n rollouts}. {} if the outcome head is not trusted. Nodes that
        leave no room for a rollout are missing."""
        if not self.critic.trusted[2]:
            return {}
        sampler = self.sampler
        taken = sampler.counts["prompt"] + self.tokens
        if taken - self.emptied > self.room:
            sampler.reset()
            self.twin, self.emptied = {}, taken
        twins = {node: twin for node, twin in zip(nodes, map(self.copy, nodes))
                 if twin is not None and len(twin.solution()) < self.max_tokens}
        sampler.encode([slots_of(twin) for twin in twins.values()])
        for twin in self.fresh:                         # what does the small model say of them?
            twin.logps = sampler.log_probs(slots_of(twin.parent), twin.slots)
        self.fresh = []
        ends = grow(sampler, [(twin, self.n) for twin in twins.values()], self.max_tokens)
        self.tokens = sampler.counts["sampled"]
        said = self.critic.read(ends, sampler)[:, 2].reshape(-1, self.n)    # (leaves, n)
        return dict(zip(twins, said.mean(1).tolist()))


# --------------------------------------------------------------------------------------------------
# 5. Grading numbers and letters:  text -> the piece that states the answer -> its value
# --------------------------------------------------------------------------------------------------
# A false right is worse than a false wrong, for a self-improving loop finds it and imitates it. A
# prefix of a number is no number: what follows it must be known here (a unit, prose, a reason). If
# a second number, a glyph or a macro follows, the answer is kept whole and equals only itself. All
# patterns take linear time. Left out: algebra, 2 1/2 in plain text, 5k, 1,00,000, values of units.
PHRASE = re.compile(r"(?i)(?:answer|correct (?:option|choice))[*_]*\s*(?:is\b|[:：])[*_:]*"
                    r"|<answer>\s*")
PROSE = re.compile(r"[^0-9A-Za-z]*(?:[A-Za-z]{2}|[AaI] )")
MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\uff0d\ufe63\u2010\u2011", "-"))
SPACED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[\u00a0\u2009\u202f][0-9]{3})+(?![0-9])")  # 12 500


def last_box(text: str) -> str:
    r"""What the last balanced \boxed{...} holds: `\frac12` of `\boxed{\frac12} \boxed{3`; or ""."""
    starts, found = [], ""                              # start None: a brace that opens no box
    for brace in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if brace[0] == "}":
            start = starts.pop() if starts else None
            found = found if start is None else text[start:brace.start()]
        elif brace[0] not in ("\\{", "\\}"):
            starts.append(brace.end() if len(brace[0]) > 1 else None)
    return found


def stated(text: str):
    """(rule, piece): where a text may state its answer, the surest and of a kind the last first.
    If its last line has a mark, or there is a box, nothing outside of that counts as unmarked."""
    text = text.split("\nQuestion:")[0].translate(MINUS)                # a base model invents more
    text = SPACED.sub(lambda digits: re.sub(r"\s", "", digits[0]), text)
    text = re.sub(r"</\w{1,20}>|<\|\w{1,20}\|>", "\n", text).strip()            # a tag ends a line
    yield from (("####", piece.split("\n")[0]) for piece in reversed(text.split("####")[1:]))
    yield "boxed", last_box(text)
    for piece in reversed(PHRASE.split(text)[1:]):
        line, _, below = piece.partition("\n")
        if not (below and "=" in line and PROSE.match(line)):   # Answer: Tom has 3 + 2 = 5. So ...
            yield "phrase", line
    marked = PHRASE.split(text.split("\n")[-1].replace("####", "<answer>"))[1:]
    yield "bare", last_box(text) or (marked and marked[-1].strip()) or text


# what a number is, at the start of a piece, alone, and anywhere (a minus is no sign in 10-3)
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"  # 1,000.5  .5
VALUE = rf"{DIGITS}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z]))?(?: ?/ ?\$?{DIGITS})?"  # 1e3  1 / 2
LEADING = re.compile(r"[\s*_`\"'“‘.:,~#=($€£¥\[{]*?"
                     rf"((?:[-+] ?(?:\$ ?)?|\$ ?[-+]? ?)?{VALUE})")                 # **(-$18
ALONE = re.compile(LEADING.pattern + r"[\s*_`\"'.)\]}%€]*")
ANYWHERE = re.compile(rf"(?:(?<![0-9A-Za-z)\]}}%.+-])[-+](?:\$ ?)?|\$ ?[-+]?)?{VALUE}")
# what must not stand before the last number of a text: a glyph, a macro, a word that changes it
CHANGED = re.compile(r"(?:[^\s$€£¥(\"'“‘*`\[=:;,>/+<.~-]|[0-9](?:[,./':]|[^\S\n])|\\[A-Za-z]+ ?|"
                     r"(?i:n't|\b(?:not|minus|negative|than|twice|double|half of)|"
                     r"[0-9] (?:or|and|to))\s)\Z")
# what may follow a number, and what may not: 18 dozen  18 - x  18 or more  18 and a half  18 x
OTHER = (r"(?:(?:sin|cos|tan|log|exp|mod|plus|minus|over|base|point|choose|squared|cubed|"
         r"factorial|half|halves|thirds|fifths|tenths|k|bn|dozen|hundred\w*|thousand\w*|twice|"
         r"doubled|halved|[mbtr]+illions?)\b)")         # words that are no unit
UNIT = (rf"(?!{OTHER})(?:[A-Za-z]{{3,}}(?:[. ]+[A-Za-z]{{2,}})*\.?|[ckm]m|[km]g|ft|m[il]|lb|oz)"
        r"(?![A-Za-z])")
FOLLOWS = re.compile(rf"(?={UNIT}|[^A-Za-z!]|$)"
                     r"(?:[A-Za-z\s.,;:?!'\"“”‘’…—()\[\]{}*_`%$€£¥°/-]|(?<=m)[²³])*")
GOES_ON = re.compile(rf"(?i:^\W*{OTHER}|^\W*[-*/] ?[a-z]\b|\b(?:or(?! so\b)|if|unless|maybe)\b|"
                     r"\b(?:and|point) (?:a|an|one|two|three)\b)|"
                     r"(?<![A-Za-z'’./])[b-fi-ln-rt-zB-HJKM-Z](?!['’A-Za-z]|\.[a-z])")
# a reason, or the next sentence: what stands behind is no part of the answer
REASON = re.compile(r"\b(?:because|since|as(?! well)|not|which|given)\b(?!.{0,99}\bor\b)|"
                    r"[.!?][\"')*_]* +(?=[A-Z] ?[a-z])(?!Or|And|Also|Maybe|Perhaps)")


def ends(rest: str) -> bool:
    """Does an answer end before this rest of its line? Before " cars, as 3 > 2"; not " or 20"."""
    said = REASON.split(rest, maxsplit=1)[0]
    return bool(FOLLOWS.fullmatch(said)) and not GOES_ON.search(said)


# a working is a chain of sides, Total = 3 cars * $6 = ...; lists of numbers and equations are none
LABEL = re.compile(r"[\s$*(]*[A-Za-z][A-Za-z\s$()'.:*_+/-]*")
SUM = re.compile(r"(?!.*\b(?:or|and|is|as|because|since|not)\b)(?:[0-9\s.$€£¥%+*/×÷·()-]|"
                 r",(?=[0-9]{3})|(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z]))*")
JOINED = re.compile(r"[0-9][%)]*(?: [a-z]+)?\s?(?:[-,;&]|or|and|to)\s?[-$]*[0-9]")  # 3 or 4
SEVERAL = re.compile(r"[0-9][^0-9=.]{0,20}(?:[,;]|\bor\b|\band\b)[^0-9=.]{0,20}=")  # x=1, y=2
PLAIN = {                                               # LaTeX of a stated number, in this order
    r"[-=]>|[→⇒≈≅]": "=", r"\\(?:text|mathrm|mbox) *\{([^{}]*)\}": r" \1",
    r"\\([$%])|\\[,!;: {}()\[\]]": r" \1", r"(?<=[A-Za-z])_\{?\w\}?": "",           # x_1
    r"(?<=[0-9)]) ?[xX] ?(?=\$?[(0-9])": "*"}                                       # 3 x 6


def read_number(piece: str, rule: str):
    """The number that a piece begins with, or its working ends in: `10-3=7`, `7 apples` give 7; of
    a text without any marker the last one. `18 or 20` is returned whole and equals no number."""
    plain = lambda found: re.sub(r"[$,+ ]", "", found)
    if rule == "bare":
        *_, last = [None, *ANYWHERE.finditer(piece)]
        if last is None or CHANGED.search(piece[max(0, last.start() - 20):last.start()]):
            return None
        return plain(last[0]) if ends(piece[last.end():].split("\n")[0].lstrip("!")) else None
    formula = canonical(piece) if re.search(r"[\\{]", piece) else ""
    if re.fullmatch("-?[0-9]+(/[0-9]+)?", formula):     # \frac12, 2\frac{1}{2}
        return formula
    for pattern, new in PLAIN.items():
        piece = re.sub(pattern, new, piece)
    left, _, right = piece.rpartition("=")
    working = all(LABEL.fullmatch(side) or SUM.fullmatch(side) for side in left.split("="))
    part = right if working else piece
    match = LEADING.match(part)
    if match and ends(part[match.end():].rstrip("!" if rule == "phrase" else "")):
        return plain(match[1])
    prose = PROSE.match(piece) and not (JOINED.search(right) or SEVERAL.search(piece))
    return None if prose or not re.search("[0-9]", piece) else piece.strip()


def number(spelling: str) -> Fraction | None:
    """The exact value of a number that stands alone ($18.00, 1,000, 50%, 1/2, 1e3), or None."""
    found = ALONE.fullmatch(spelling.translate(MINUS)) if len(spelling) <= 1000 else None
    top, _, bottom = re.sub(r"[$,+ ]", "", found[1] if found else "0/0").partition("/")
    return Fraction(top) / Fraction(bottom or 1) if Fraction(bottom or 1) else None


OPTION = re.compile(r"(?i)[^0-9a-z\\]*(?:\\[a-z]+ ?\{[^0-9a-z]*)?(?:(?:option|choice)\W+)?"
                    r"([a-z])(?![0-9a-z'’])")
MARKED = re.compile(r"[*_`\"'\]}$]*(?:[).:](?!\w)|[\s.,;:!?)\]}$'\"*_`>\\-]*$)")     # (B) iron  B.
APART = re.compile(MARKED.pattern + r"|[*_]*(?:[,;](?!\w)| [-—(])")         # B, iron  B - iron
NAMED = re.compile(r"[B-HJ-Z] (?!and|nor|but|was|are|has|plus|minus|then|with|cannot)"
                   r"[a-z]{3,}(?: [a-z]+)?[.!]?")                           # B iron
SECOND = re.compile(r"(?<![A-Za-z'’])[A-Z](?![A-Za-z'’])|"                  # B or (c)
                    r"(?:(?i:\b(?:or|and|nor)\b)|[-,/&])\W*[A-Za-z](?![A-Za-z'’])")


def read_letter(piece: str, rule: str, options=None):
    """The letter of an option: B, (B), "B. iron", "(b) since"; a text of several lines has none.

    options: {letter: its text} as shown, if known. Then what stands behind the letter must be its
    text in `B iron`, `B, iron` and `B - iron`, and may nowhere be the text of another option. If
    they are not known, `B iron` is B, but "A car" and "I think" are no letters."""
    found = OPTION.match(piece) if rule != "bare" or "\n" not in piece else None
    if not found:
        return None
    letter, behind = found[1].upper(), piece[found.end():]
    rest = REASON.split(behind, maxsplit=1)[0]
    words = lambda text: re.findall(r"\w+", text.casefold())
    meant = [name for name, text in (options or {}).items()
             if words(text) in (words(behind), words(rest))]
    if meant:
        return letter if letter in meant else None
    clear = MARKED.match(rest)
    if not options:
        clear = APART.match(rest) or NAMED.fullmatch(found[1] + rest)
    return letter if clear and not SECOND.search(rest) else None


def read_words(piece: str, rule: str):
    """What is neither letter, formula nor number: `Light  BLUE.` gives `light blue`."""
    return " ".join(piece.split("\n")[0].strip(" #*_.()[]$\"'").casefold().split()) or None


# --------------------------------------------------------------------------------------------------
# 6. Grading formulas; the verdict
# --------------------------------------------------------------------------------------------------
# LaTeX (MATH): equal are formulas with one canonical spelling. No algebra: 1 + x is not x + 1.
GLYPHS = MINUS | str.maketrans({
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "°": "", "×": r"\times ", "·": r"\cdot ",
    "≤": r"\le ", "≥": r"\ge ", "²": "^2 ", "³": "^3 ", "½": r"\frac12 "})
TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|rm|boxed) *\{"
UNIT_TEXT = (rf"{TEXT}(?! *(?:[ap]\.? ?m\b|{OTHER}|(?:and|or|if)\b|[A-Za-z](?<![mghsLCF])\}}))"
             r"(?:(?! of )[^{}0-9])*\}")                # 5\text{ cm}, not 5\text{ pm}, 5\mathrm{i}
WHOLE = {                                               # for a whole answer, in this order
    r"\\\\(?=[dt]?frac|sqrt|text|pi)": r"\\", r"\\\\": ",;,",       # matrix: (1,2,;,3,4)
    r"(?<=[0-9])(?:\{,\}|, *\\! *|\\[,!])(?=[0-9]{3}(?![0-9]))": ",",   # 1{,}000  1,\!000
    r"\^ *\{? *\\circ *\}?|\\?[$%]|\\[()\[\]]": "", r"\\[,!;: ]|~|\s+": " ",  # 90^\circ  \$5
    r"\\[dtc](frac|binom)": r"\\\1", r"\\(le|ge|ne)q(?:slant)?(?![a-z])": r"\\\1",
    r"\\(?:times|ast)(?![a-z])": r"\\cdot", r"\\[lc]?dots|\.\.\.": "…",
    r"\\cup(?![a-z])|∪": "∪",
    r"\\lbrace": r"\{", r"\\rbrace": r"\}", r"\\varnothing": r"\\emptyset",
    r"\\(?:left|right|[Bb]ig|displaystyle|limits|q?quad|degree)(?![a-z])": "", "&": ",",
    r"[(\[]? *\\begin\{(?:[pb]?matrix|array)\}(?:\{[clr|]*\})?": "(",
    r"\\end\{(?:[pb]?matrix|array)\} *[)\]]?": ")",
    r",? *\\(?:text|mbox) *\{ *(?:and|or) *\}|(?<=[0-9A-Za-z}]) +(?:and|or) +": ", ",
    r"^ *(?:\\?[A-Za-z]+(?:_\{?[0-9A-Za-z]\}?|\([a-z]\))?|\([a-z](?:, *[a-z])+\)) *"
    r"(?:=|\\in(?![a-z]))(?=[^=]*$)": "", r"^\s+|[\s.]+$": ""}                # f(x) =  x \in
PART = {                                                # for a part that is no list, in this order
    rf"(?:(?<=[0-9}})])|(?<=\\pi)) *(?:{UNIT_TEXT}|(?<=[0-9}}]) {UNIT})"
    r"(?: *\^ *\{?[0-9]\}?)?[. ]*$": "",               # 5\text{ cm}^2, 5 cm^2; not 5\text{ pm}
    rf"{TEXT}([^{{}}]*)\}}": r"\1", r"([_^]) *([0-9A-Za-z])": r"\1{\2}",    # x^10 is x^{1}0
    r"^(-?)([0-9]+) +([0-9]+) */ *([0-9]+)$": r"\1\2\\frac{\3}{\4}",         # 2 1/2
    r"(?<=[0-9]) +(?=[0-9])": "~", r" +": "", r"(?<![0-9])\.(?=[0-9])": "0.",    # 1 2 is not 12
    r"^\{([^{}]*)\}$": r"\1",
    r"\\(sqrt(?:\[\w*\])?|frac|binom)([0-9A-Za-z])": r"\\\1{\2}",                 # \sqrt2  \frac12
    r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\})([0-9A-Za-z])": r"\1{\2}",
    r"^[+*_:.,`\"]+|[*_:;.,`\"]+$": "", r"^\((-?[0-9./]+|[A-Za-z]+)\)$": r"\1",     # (72)  (A)
    r"^(-?)\(([^()]*)\)/([0-9.]+|[A-Za-z])$": r"\1\\frac{\2}{\3}",          # (x+1)/2  \pi/4
    r"^(-?)((?:[^-+,()\[\]/={}]|\{[^{}]*\})+)/([0-9.]+|[A-Za-z]|\\[a-z]+|\\sqrt\{[^{}]*\})$":
    r"\1\\frac{\2}{\3}", r"^\\frac\{-((?:[^-+{}]|\{[^{}]*\})*)\}(?=\{)": r"-\\frac{\1}"}
THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
MIXED = re.compile(r"(-?)([0-9]*)\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]*[1-9][0-9.]*)\}")  # 2\frac{1}{2}


def canonical(tex: str) -> str:
    r"""One spelling for all formulas that count as equal; never empty unless `tex` is blank.
    `2\frac12`, `2.5`, `x = 5/2 cm` are 5/2; (1, 2] keeps order and brackets; lists, sets and unions
    are sorted. A comma before three digits groups them, but not inside brackets."""
    if len(tex) > 1000:
        return "".join(tex.split())
    short = tex.translate(GLYPHS)
    for pattern, new in WHOLE.items():
        short = re.sub(pattern, new, short)
    if len({*re.findall("([A-Za-z]) *=", short)}) == 1:
        short = re.sub("(^|,) *[A-Za-z] *=", r"\1", short)      # x=1, x=2; but x=1, y=2 stays
    if not re.search(r"[()\[\]]|\\\{", short):
        short = THOUSANDS.sub(lambda digits: digits[0].replace(",", ""), short)
    return spell(short) or "".join(tex.split())


def spell(tex: str) -> str:
    """`canonical` of a tidied formula: a list, union or bracket part by part, else one value."""
    tex = tex.strip()
    for mark in (",", "∪"):
        parts = split(tex, mark)
        if len(parts) > 1:
            return mark.join(sorted(map(spell, parts)))
    bracket = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", tex)
    parts = split(bracket[2], ",") if bracket else []
    if len(parts) > 1 or (bracket and bracket[1] == "\\{"):
        order = sorted if bracket[1] == "\\{" else list
        return bracket[1] + ",".join(order(map(spell, parts))) + bracket[3]
    for pattern, new in PART.items():
        tex = re.sub(pattern, new, tex)
    mixed = MIXED.fullmatch(tex)
    share = Fraction(mixed[3]) / Fraction(mixed[4]) if mixed else 1
    if mixed and (not mixed[2] or 0 < share < 1):
        value = Fraction(mixed[2] or 0) + share
        return str(-value if mixed[1] else value)
    if re.fullmatch("-?" + VALUE, tex) and number(tex) is not None:
        return str(number(tex))
    return tex.casefold() if re.match("[A-Za-z]{3}", tex) else tex      # Even is even, X is not x


def split(tex: str, mark: str) -> list:
    """The parts between marks outside of all brackets: `(1,2],3` at "," gives `(1,2]` and `3`."""
    depth = np.cumsum([(char in "([{") - (char in ")]}") for char in tex])
    cuts = [i for i, char in enumerate(tex) if char == mark and depth[i] == depth[-1] == 0]
    return [tex[start + 1:stop] for start, stop in zip([-1, *cuts], [*cuts, len(tex)])]


def read_formula(piece: str, rule: str):
    """The canonical spelling of what a piece states; a sentence states its $...$ or its number."""
    if rule == "boxed":
        return canonical(piece)
    maths = re.match(r"[^0-9A-Za-z$\\]*(?:\$+([^$]+)\$|\\\((.*?)\\\))", piece[:1000])
    if maths:                                           # $5$, as 3 > 2; but not $5$ or $6$
        piece = (maths[1] or maths[2]) if ends(piece[maths.end():]) else piece
    elif "\n" in piece or ("\\" not in piece and re.search("[A-Za-z]{2,} ", piece[:1000])):
        piece = read_number(piece, rule) or ""
    return canonical(piece) if re.search("[0-9A-Za-z]", piece) else None


def find_answer(text: str, read=read_number) -> tuple:
    """(answer, rule) that a text states; rule: "####", "boxed", "phrase", or unmarked "bare"."""
    found = ((read(piece, rule), rule) for rule, piece in stated(text) if piece.strip())
    return next((pair for pair in found if pair[0] is not None), (None, None))


def extract_answer(text: str) -> str | None:
    """The number that a text states, for programs that use this file; None if it states none."""
    return find_answer(text)[0]


def same_answer(a: str | None, b: str | None) -> bool:
    """Are two answers one? By value: 18 = 18.0 = $18.00; else as spelled. None equals nothing."""
    return None not in (a, b) and (a == b or number(a) == number(b) is not None)


# HACK HERE: what a right answer is. Also change: tests/test_grade.py. The reference decides how to
# compare: `#### B` a letter, `\boxed{x}` or LaTeX a formula, `#### 18` a number, else words.
def grade(text: str, reference: str, cut: bool = False, question: str = "") -> bool:
    """Does the text state the reference's answer? cut: it ran into the length limit, so its last
    number is any number on the way, and only a marked answer counts (####, box, phrase).
    question: if it shows options as lines "(B) iron", `B iron` is read with them (read_letter)."""
    if not text or not reference:
        return False
    latex = last_box(reference) or ("\\" in reference and "####" not in reference)
    options = dict(re.findall(r"\n\(([A-Z])\) (.+)", question))
    letter = partial(read_letter, options=options)
    for read in [read_formula] if latex else [letter, read_number, read_words]:
        wanted = find_answer(reference, read)[0]
        if wanted is not None:
            found, rule = find_answer(text, read)
            same = found == wanted if latex else same_answer(found, wanted)
            return same and not (cut and rule == "bare")
    return False


# --------------------------------------------------------------------------------------------------
# 7. Statistics, demo
# --------------------------------------------------------------------------------------------------
def auc(scores, labels) -> float | None:
    """Chance that a right one scores above a wrong one, ties half: .9 .4 .4 .1, 1 1 0 0 -> .875."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    right, wrong = scores[labels], np.sort(scores[~labels])
    if len(right) == 0 or len(wrong) == 0:
        return None
    below, up_to = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(wrong)))


def wilson(right: int, n: int) -> tuple:
    """Wilson's 95% interval of a rate: 8 of 10 give .490 to .943."""
    z2 = 1.959964 ** 2
    half = math.sqrt(z2 * (right * (n - right) / n + z2 / 4))
    return (right + z2 / 2 - half) / (n + z2), (right + z2 / 2 + half) / (n + z2)


def mcnemar(ours: list, theirs: list) -> float:
    """Exact two-sided p on the same questions of one seed; 1 against 9 that only one got: .021."""
    won = [bool(a) for a, b in zip(ours, theirs) if bool(a) != bool(b)]
    n, fewer = len(won), min(sum(won), len(won) - sum(won))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)


def t_interval(differences) -> tuple:
    """(mean, low, high): Student's 95% interval of a mean difference, one number a seed. 1, 2, 3:
    2 +- 4.303 / sqrt(3), so (2, -.48, 4.48). One seed: -inf to inf; none: ValueError."""
    t_95 = ("12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 "
            "2.131 2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 "
            "2.045 2.042").split()                      # Student's t, 1 to 30 degrees of freedom
    mean, half, n = statistics.fmean(differences), math.inf, len(differences)
    if n > 1:
        half = float(t_95[min(n, 31) - 2]) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def demo() -> None:
    """8-2*3+1: line 1 is good, line 2 is the mistake; completions of line 1 show the right way."""
    after = {"2*3=6 : 8-6+1": "8-6=2 : 2+1", "8-6=2 : 2+1": "2+1=3 : 3", "2+1=3 : 3": "#### 3",
             "6+1=7 : 8-7": "8-7=1 : 1", "8-7=1 : 1": "#### 1"}
    tree = Tree("", 0, list(b"8-2*3+1"))
    text = lambda node: bytes(node.ids.tolist()).decode()
    write = lambda node, line: tree.add(node, list(line.encode()), NOTHING, NOTHING,
                                        "eos" if line[0] == "#" else "")

    def complete(wants) -> None:
        """k completions below each node, graded."""
        for node in [node for node, k in wants for _ in range(k)]:
            while not node.end:
                node = write(node, after[text(node)])
            record_grade(node, grade(text(node), "3"))
    complete([(write(write(tree.root, "2*3=6 : 8-6+1"), "6+1=7 : 8-7"), 1)])
    label_pits(tree.ends(), complete, k=4)
    print(draw(tree, text, pits=[pit(tree.ends()[0])]))


if __name__ == "__main__":
    demo()
