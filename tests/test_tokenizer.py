"""The tokenizer against Hugging Face `tokenizers` 0.23.3: what that library gave is stored, and must come out
here.

data/tokenizers holds four byte-level tokenizers and a SentencePiece one with 403 texts each; made_up.json: 59
small random tokenizers (twenty ways of cutting text, merges without order or use, tokens that no merge makes,
ignore_merges, missing bytes, normalizers) with 18 texts each; and sentencepiece.json: 17 other forms of the
SentencePiece one. Nothing is random here but for fixed seeds, so there are no false alarms."""
import copy
import gzip
import json
import random
import sys
from functools import lru_cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import LONG, BadInput, SentencePiece, Tokenizer  # noqa: E402

DATA = Path(__file__).parent / "data" / "tokenizers"
NAMES = ("gpt2", "llama3", "qwen2", "smollm2")
MADE_UP = json.loads((DATA / "made_up.json").read_text(encoding="utf-8"))["files"]
FORMS = json.loads((DATA / "sentencepiece.json").read_text(encoding="utf-8"))["files"]
STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@lru_cache
def opened(name) -> tuple[Tokenizer, dict]:
    expected = (DATA / name / "expected.json").read_text(encoding="utf-8")
    packed = {path.stem: gzip.decompress(path.read_bytes()) for path in (DATA / name).glob("*.gz")}     # a large one
    there = [file for file in Tokenizer.FILES if (DATA / name / file).exists()]
    files = packed | {file: (DATA / name / file).read_bytes() for file in there}
    return Tokenizer(files), json.loads(expected)


def small(merges=(), extra=(), added=("<s>", "</s>"), **top) -> Tokenizer:
    """A byte-level tokenizer: bytes, what the merges make, extra entries, added tokens; `top` changes the
    file."""
    spec = json.loads(Tokenizer.bytes_only(()).files["tokenizer.json"])
    vocab = spec["model"]["vocab"]
    for token in [*("".join(m) for m in merges), *extra]:
        vocab.setdefault(token, len(vocab))
    spec["model"] |= {"merges": [list(m) for m in merges]} | top.pop("model", {})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"] = [{"id": len(vocab) + i, "content": text} | flags for i, text in enumerate(added)]
    return Tokenizer({"tokenizer.json": json.dumps(spec | top).encode()})


def texts(tokenizer, ids):
    return [tokenizer.token_bytes(id).decode() for id in ids]


@pytest.mark.parametrize("name", (*NAMES, "llama2_legacy"))
def test_fixtures(name):
    """All stored cases: ids with special tokens allowed, ids with the begin token, and every decoding."""
    tokenizer, expected = opened(name)
    for text, ids, ids_special, decoded in expected["cases"]:
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.begin + ids == ids_special and tokenizer.decode(ids) == decoded
    for ids, decoded in expected["decode"]:
        assert tokenizer.decode(ids) == decoded


@pytest.mark.parametrize("name", NAMES)
def test_one_call_and_pieces_agree(name):
    """Cutting by Python and merging piece by piece gives the ids that tiktoken gives in one call."""
    tokenizer, expected = opened(name)
    piecewise = copy.copy(tokenizer)
    piecewise.fast = None
    for text, ids, *_ in expected["cases"]:
        assert piecewise.encode(text, allow_special=True) == ids, text


@pytest.mark.parametrize("index", range(len(MADE_UP)))
def test_made_up(index):
    """59 tokenizers x 18 texts by the real library: DeepSeek's sequences of splits, digits one by one or not,
    String patterns, NFC and NFKC, prefix spaces, gaps between matches, empty matches, dead and unreachable
    tokens ..."""
    spec = copy.deepcopy(MADE_UP[index]["tokenizer"])
    spec["model"]["vocab"] = {name: id for id, name in enumerate(spec["model"]["vocab"])}
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(spec).encode()})
    for text, ids, some_ids, decoded in MADE_UP[index]["cases"]:
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.decode(some_ids) == decoded


def test_special_tokens_only_where_asked_for():
    """A special token's text in data becomes ordinary ids (it cannot open a turn); asked for, it is one id.
    The longest of several wins, and neighbours are not disturbed."""
    for name in NAMES:
        tokenizer, _ = opened(name)
        for text, id in tokenizer.added.items():
            data = f"a{text}b"
            assert id not in tokenizer.encode(data) and tokenizer.decode(tokenizer.encode(data)) == data
            inside = tokenizer.encode(data, allow_special=True)
            assert inside == tokenizer.encode("a") + [id] + tokenizer.encode("b")
    tokenizer = small(added=("<s>", "<s><s>", "a b"))
    assert tokenizer.encode("<s><s><s>a b", True) == [257, 256, 258]
    assert tokenizer.decode([258, 256]) == "a b<s>"


def test_prompt():
    """encode_prompt puts the post-processor's tokens before the text, once, and never spoils later
    prompts."""
    tokenizer, _ = opened("llama3")
    ids = tokenizer.encode_prompt("hi")
    ids.append(0)
    assert len(tokenizer.begin) == 1
    assert tokenizer.encode_prompt("hi") == tokenizer.begin + tokenizer.encode("hi")
    assert opened("gpt2")[0].encode_prompt("hi") == opened("gpt2")[0].encode("hi")


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_bytes(name):
    """n_ids, base_ids, holes and newline_ids say what the file says; without special tokens every text that
    UTF-8 can write comes back; token_bytes of a text's ids join to the text."""
    tokenizer, expected = opened(name)
    spec = json.loads(opened(name)[0].files["tokenizer.json"])
    ids = set(spec["model"]["vocab"].values()) | {token["id"] for token in spec["added_tokens"]}
    assert tokenizer.n_ids == max(ids) + 1 and set(tokenizer.holes) == set(range(max(ids))) - ids
    assert tokenizer.base_ids == max(spec["model"]["vocab"].values()) + 1
    assert tokenizer.newline_ids == [id for id in sorted(ids) if b"\n" in tokenizer.token_bytes(id)]
    assert tokenizer.token_bytes(tokenizer.n_ids + 5) == b"" and tokenizer.decode([tokenizer.n_ids + 5]) == ""
    for text, *_ in expected["cases"]:
        ids = tokenizer.encode(text)
        if not tokenizer.forms and not tokenizer.lacking:
            assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text == tokenizer.decode(ids)


def test_bytes_only(tmp_path):
    """Ids are the bytes; special tokens follow; saved, opened and saved again it is the same to the byte."""
    tokenizer = Tokenizer.bytes_only(("<|end|>", "<|pad|>"))
    text = "17+1 \t\r\n\n  é水🙂\0"
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|end|>", True) == [97, 256] and len(tokenizer.encode("a<|end|>")) == 8
    assert (tokenizer.n_ids, tokenizer.base_ids, tokenizer.holes) == (258, 256, [])
    assert tokenizer.newline_ids == [10] and tokenizer.eos_ids == {256} and tokenizer.begin == []
    assert [tokenizer.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.from_pretrained(tmp_path / "a")
    again.save(tmp_path / "b")
    assert again.encode("x<|pad|>", True) == [120, 257] and again.eos_ids == {256}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    assert Tokenizer.bytes_only(()).eos_ids == set()


def test_eos_is_where_the_folder_says(tmp_path):
    """eos_token as a string or an object, in tokenizer_config.json before special_tokens_map.json; else
    unknown."""
    raw = (DATA / "llama3" / "tokenizer.json").read_bytes()
    cases = [({}, {}, None),
             ({"eos_token": "<|end_of_text|>"}, {"eos_token": "<|eot_id|>"}, "<|end_of_text|>"),
             ({"eos_token": {"content": "<|eot_id|>", "lstrip": False}}, {}, "<|eot_id|>"),
             ({"eos_token": None}, {"eos_token": "<|eot_id|>"}, "<|eot_id|>"),
             ({"eos_token": "no such token"}, {}, None),
             ({"eos_token": [1]}, {"eos_token": {"content": 3}}, None)]
    for config, special, want in cases:
        files = {"tokenizer.json": raw, "tokenizer_config.json": json.dumps(config).encode(),
                 "special_tokens_map.json": json.dumps(special).encode()}
        tokenizer = Tokenizer(files)
        assert tokenizer.eos_ids == ({tokenizer.ids[want]} if want else set())
    assert Tokenizer({"tokenizer.json": raw}).eos_ids == set()


def test_dead_tokens_are_not_merged_to():
    """Worked by hand: `abc` is in the vocabulary, but (a, b), (ab, c) are not both merges. Without
    ignore_merges it never comes out; with it, only a whole piece is `abc`: never a part of `abcd`, though ab
    and c lie side by side."""
    merges = [("a", "b")]
    t = small(merges, ["abc"])
    assert texts(t, t.encode("abc abcd")) == ["ab", "c", " ", "ab", "c", "d"]
    t = small(merges, ["abc"], model={"ignore_merges": True})
    assert texts(t, t.encode("abc")) == ["abc"] and texts(t, t.encode("abcd")) == ["ab", "c", "d"]
    assert texts(t, t.encode("abc!abcd!abc")) == ["abc", "!", "ab", "c", "d", "!", "abc"]
    # (a, bc) is a merge, but (a, b) comes first, so bc never forms after a; and abc is dead
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    t = small(merges)
    assert texts(t, t.encode("abc")) == ["ab", "c"]
    assert texts(t, t.encode("bcbc")) == ["bc", "bc"]
    t = small(merges, model={"ignore_merges": True})
    assert texts(t, t.encode("abc")) == ["abc"] and texts(t, t.encode("aabc")) == ["a", "ab", "c"]


def test_merges_in_either_spelling_and_ids_above_zero():
    """"a b" and ["a", "b"] are the same merge; a vocabulary may begin above 0, with holes."""
    both = [small([("a", "b")]), small([("a", "b")], model={"merges": ["a b"]})]
    assert both[0].encode("abab") == both[1].encode("abab") == [256, 256]
    vocab = json.loads(both[0].files["tokenizer.json"])["model"]["vocab"]
    vocab = {name: id + 7 + (id > 200) for name, id in vocab.items()}
    t = small([("a", "b")], added=(), model={"vocab": vocab})
    assert t.encode("aba") == [264, 104] and t.holes == [*range(7), 208] and t.n_ids == 265
    assert t.decode([3, 264, 208]) == "ab"


def test_missing_bytes_are_lost_as_in_hugging_face():
    """SmolLM2 has no \\x04: the real library drops it, so "a\\x04b" is a, b (ids stored from that
    library)."""
    tokenizer, _ = opened("smollm2")
    assert tokenizer.encode("x\U00040000y") == [104, 218, 218, 218, 105] and tokenizer.encode("\x04") == []


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "\ud83d\ude42", "\ude42\ud83d"])
def test_lone_surrogates(text):
    """Half a surrogate pair reads as U+FFFD, a whole pair as its character; nothing crashes."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for name in (*NAMES, "llama2_legacy"):
        assert opened(name)[0].encode(text) == opened(name)[0].encode(clean)
        assert opened(name)[0].encode(text, True) == opened(name)[0].encode(clean, True)
        assert opened(name)[0].encode_more(text) == opened(name)[0].encode_more(clean)


@pytest.mark.parametrize("unit", [" ", "a", "\n", "1", "!", "水", " a", "\t\n"])
def test_very_long_runs(unit):
    """300,000 characters of one kind, more than tiktoken's regular expressions are given: no crash, nothing is lost."""
    tokenizer, _ = opened("qwen2")
    text = unit * (3 * LONG // len(unit)) + "x"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text


def sentencepiece(**change) -> Tokenizer:
    """data/tokenizers/llama2_legacy with some of its fields changed, and `without` some tokens."""
    spec, change = json.loads((DATA / "llama2_legacy" / "tokenizer.json").read_text(encoding="utf-8")), dict(change)
    for name in change.pop("without", ()):
        del spec["model"]["vocab"][name]
    spec["model"] |= change.pop("model", {})
    return Tokenizer({"tokenizer.json": json.dumps(spec | change).encode()})


@pytest.mark.parametrize("index", range(len(FORMS)), ids=[form["name"] for form in FORMS])
def test_sentencepiece_forms(index):
    """The forms in which such files come (17, 18 texts each, by the real library): ids with added tokens seen and not
    seen, ids of a text that goes on (the real library's for the file without its ▁ at the beginning), decoding."""
    tokenizer = sentencepiece(**FORMS[index]["change"])
    assert type(tokenizer) is SentencePiece
    for text, ids, plain, more, decoded in FORMS[index]["cases"]:
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.encode(text) == plain and tokenizer.encode_more(text) == more, text
        assert tokenizer.decode(ids) == decoded, text


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
NEWER = {"normalizer": None, "pre_tokenizer": METASPACE}


@pytest.mark.parametrize("change", [{}, NEWER, NEWER | {"decoder": METASPACE}], ids=["legacy", "newer", "metaspace"])
def test_texts_that_go_on(change):
    """Steps of a solution are encoded and read one by one: no space is lost or won between them, nor before the
    first; encode_more(" a") is what `a` is at the beginning; and each byte token is its byte."""
    tokenizer = sentencepiece(**change)
    prompt, steps = "Question: 2+2? Answer:", [" 2+2 is 4\n", " so\t水 is\n", "\n", "it  is 4\n", " #### 4"]
    ids = [tokenizer.encode_more(step) for step in steps]
    assert [tokenizer.decode_more(step) for step in ids] == steps
    whole = tokenizer.encode_prompt(prompt) + sum(ids, [])
    assert tokenizer.decode_more(whole) == "<s> " + prompt + "".join(steps)
    assert b"".join(map(tokenizer.token_bytes, sum(ids, []))).decode() == "".join(steps)
    assert [step[-1] in tokenizer.newline_ids for step in ids] == [True] * 4 + [False]
    assert tokenizer.encode_more(" the cat") == tokenizer.encode("the cat") and tokenizer.encode_more("") == []
    assert tokenizer.encode_more("the") != tokenizer.encode("the")
    assert all(tokenizer.token_bytes(tokenizer.ids[f"<0x{b:02X}>"]) == bytes([b]) for b in range(256))
    assert tokenizer.ids["<0x0A>"] in tokenizer.newline_ids
    bytewise = Tokenizer.bytes_only()
    assert bytewise.encode_more("the") == bytewise.encode("the") and bytewise.decode_more([32, 97]) == " a"


def test_sentencepiece_gives_texts_back():
    """decode(encode(text)) is the text where nothing normalizes it but spaces; `▁` itself reads as a space. Newer
    files put no ▁ before a space, and decoding takes that space: as in the real library."""
    for text, *_ in opened("llama2_legacy")[1]["cases"]:
        tokenizer, plain = opened("llama2_legacy")[0], text.replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == plain
        assert sentencepiece_newer().decode(sentencepiece_newer().encode(text)) == plain.removeprefix(" ")


@lru_cache
def sentencepiece_newer() -> Tokenizer:
    return sentencepiece(**NEWER)


def naive(tokenizer, ids):
    """Merge by the definition: look at all neighbours, merge the leftmost of the lowest rank, again."""
    while found := min(((*tokenizer.pairs[p], i) for i, p in enumerate(zip(ids, ids[1:])) if p in tokenizer.pairs),
                       key=lambda entry: (entry[0], entry[2]), default=None):
        ids = [*ids[:found[2]], found[1], *ids[found[2] + 2:]]
    return ids


def test_heap_merges_as_the_definition_does():
    """On 300 random strings of few letters, where merges overlap most."""
    tokenizer, rng = opened("llama2_legacy")[0], random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("▁theanis\n", k=rng.randrange(60)))
        letters = [tokenizer.ids[char] for char in text]
        assert tokenizer._join(letters) == naive(tokenizer, letters), text


@pytest.mark.parametrize("unit", ["the cat sat ", "a", " ", "水", "\0"])
def test_sentencepiece_long_texts(unit):
    """100,000 characters: with anything quadratic in the text this would take an hour, and nothing is lost."""
    tokenizer = opened("llama2_legacy")[0]
    text = (unit * 100_000)[:100_000] + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("word, change", [
    ("model.type 'Unigram'", {"model": {"type": "Unigram"}}), ("WordPiece", {"model": {"type": "WordPiece"}}),
    ("Lowercase", {"normalizer": {"type": "Lowercase"}}), ("Precompiled", {"normalizer": {"type": "Precompiled"}}),
    ("String", {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}}),
    ("ByteLevel", {"pre_tokenizer": STEP}), ("Split", {"pre_tokenizer": {"type": "Split"}}),
    ("replacement", {"pre_tokenizer": METASPACE | {"replacement": "_"}}),
    ("prepend_scheme", {"pre_tokenizer": METASPACE | {"prepend_scheme": "last"}}),
    ("prepend_scheme", {"pre_tokenizer": METASPACE | {"add_prefix_space": False}}),
    ("more than one", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE, METASPACE]}}),
    ("null", {"decoder": None}), ("WordPiece", {"decoder": {"type": "WordPiece"}}),
    ("Strip", {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}}),
    ("unk_token", {"model": {"unk_token": "<none>"}}), ("dropout", {"model": {"dropout": 0.1}}),
    ("merge", {"model": {"merges": ["a zz"]}}), ("fuse_unk", {"model": {"fuse_unk": 1}}),
    ("single_word", {"added_tokens": [{"id": 1757, "content": "<x>", "single_word": True}]}),
    ("two ids for one text", {"added_tokens": [{"id": 1757 + i, "content": text, "normalized": True}
                                               for i, text in enumerate(("<a b>", "<a▁b>"))]})])
def test_what_sentencepiece_files_are_refused_for(word, change):
    """By name, as with the byte-level kind."""
    with pytest.raises(BadInput, match=word):
        sentencepiece(**change)


def split(pattern, behavior="Isolated"):
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": pattern, "behavior": behavior,
                                                   "invert": False}, STEP]}


@pytest.mark.parametrize("word, top", [
    ("Lowercase", {"normalizer": {"type": "Lowercase"}}),
    ("Whitespace", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, STEP]}}),
    ("pretokenizers", {"pre_tokenizer": None}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [STEP, {"type": "Digits"}]}}),
    ("MergedWithNext", {"pre_tokenizer": split({"Regex": "a"}, "MergedWithNext")}),
    (r"\\\\w", {"pre_tokenizer": split({"Regex": r"\w+"})}),
    (r"\(\?P<a>", {"pre_tokenizer": split({"Regex": "(?P<a>b)"})}),
    (r"2}\+", {"pre_tokenizer": split({"Regex": "a{1,2}+"})}),
    (r"\(a.*subpattern", {"pre_tokenizer": split({"Regex": "(a"})}),
    ("Nonsense", {"pre_tokenizer": split({"Regex": r"\p{Nonsense}"})}),
    ("regular expression ''", {"pre_tokenizer": split({"String": ""})}),
    ("decoder", {"decoder": None}), ("WordPiece", {"decoder": {"type": "WordPiece"}}),
    ("RobertaProcessing", {"post_processor": {"type": "RobertaProcessing"}}),
    ("dropout", {"model": {"dropout": 0.1}}),
    ("end_of_word_suffix", {"model": {"end_of_word_suffix": "</w>"}}),
    ("merge", {"model": {"merges": ["a zz"]}}), ("merge", {"model": {"merges": ["a b c"]}}),
    ("vocab", {"model": {"vocab": None}}), ("merges", {"model": {"merges": None}}),
    ("order", {"model": {"merges": ["c d", "a b"]}, "merges": [("a", "b"), ("c", "d")]}),
    ("order", {"merges": [("ab", "c"), ("a", "b")], "extra": ["ab"]})])
def test_what_we_would_read_wrongly_is_refused_by_name(word, top):
    """Every field whose meaning we do not have is named in the refusal; so are damaged ones."""
    with pytest.raises(BadInput, match=word):
        small(**top)


def test_added_tokens_that_are_refused():
    """lstrip, rstrip, single_word, normalized with a normalizer, an id that is taken, two ids: named, never
    guessed."""
    spec = json.loads(Tokenizer.bytes_only().files["tokenizer.json"])
    changes = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"id": 97}, {"id": -1},
               {"id": 2 ** 31}, {"content": "a"}, {"content": ""}, {"id": True}, {"normalized": True}]
    for change in changes:
        damaged = copy.deepcopy(spec) | ({"normalizer": {"type": "NFC"}} if "normalized" in change else {})
        damaged["added_tokens"][0] |= change
        with pytest.raises(BadInput, match="token|'id'"):
            Tokenizer({"tokenizer.json": json.dumps(damaged).encode()})


def test_folders_without_a_tokenizer(tmp_path):
    """No tokenizer.json, no folder, broken JSON, an LFS pointer: BadInput that names it and what to do."""
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadInput, match="tokenizer.json"):
            Tokenizer.from_pretrained(folder)
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for raw, word in ((b"{", "tokenizer.json"), (pointer, "git lfs pull")):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(BadInput, match=word):
            Tokenizer.from_pretrained(tmp_path)


def places(node, path=()):
    """All paths to values in a JSON tree, but only the first dozen entries of large tables."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(children)[:12]:
        yield from places(child, (*path, key))


def test_structural_mutations():
    """Every place of four tokenizer.json, deleted or replaced by null, numbers, strings, lists, objects: it is
    read (and then can encode and decode) or it is BadInput, never anything else."""
    odd = [None, 0, -1, 1.5, True, "", "x", [], [[]], {}, {"type": "Sequence"}, 10 ** 30]
    rng, read = random.Random(0), 0
    full = copy.deepcopy(MADE_UP[0]["tokenizer"])
    full["model"]["vocab"] = {name: id for id, name in enumerate(full["model"]["vocab"])}
    full["post_processor"] = json.loads((DATA / "llama3" / "tokenizer.json").read_text())["post_processor"]
    full["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]["ids"] = [5]
    full["pre_tokenizer"] = split({"Regex": r"\s+|[a-z]+"})
    full["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    full["added_tokens"] = [token | {"normalized": False} for token in full["added_tokens"]]
    bytes_only = json.loads(Tokenizer.bytes_only().files["tokenizer.json"])
    pieces = json.loads((DATA / "llama2_legacy" / "tokenizer.json").read_text(encoding="utf-8"))
    names = ["<unk>", "<s>", "</s>", *"▁12ab", "▁1", "ab"]
    pieces["model"] |= {"vocab": {name: id for id, name in enumerate(names)},
                        "merges": [["▁", "1"], ["a", "b"]]}
    newer = copy.deepcopy(pieces) | NEWER | {"decoder": METASPACE}
    Tokenizer({"tokenizer.json": json.dumps(full).encode()})
    for spec in (full, bytes_only, pieces, newer):
        for path in list(places(spec))[1:]:
            for new in ["delete", *rng.sample(odd, 4)]:
                damaged = copy.deepcopy(spec)
                node = damaged
                for key in path[:-1]:
                    node = node[key]
                if new == "delete":
                    del node[path[-1]]
                else:
                    node[path[-1]] = new
                try:
                    tokenizer = Tokenizer({"tokenizer.json": json.dumps(damaged).encode()})
                except BadInput:
                    continue
                read += 1
                ids = tokenizer.encode_prompt("ab 12\n é <s>") + tokenizer.encode("<s> <|endoftext|>", True)
                ids += tokenizer.encode_more("水 <s>")
                tokenizer.decode(ids), tokenizer.decode_more(ids)
    assert read > 50
