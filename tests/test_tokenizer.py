"""The tokenizer against Hugging Face `tokenizers` 0.23.3: what that library gave is stored and must
come out here.

data/tokenizers holds four byte-level tokenizers and a SentencePiece one with 403 texts each,
made_up.json 50 small random ones with 18 texts each, sentencepiece.json 8 forms of that one."""
import gzip
import json
from functools import lru_cache
from pathlib import Path

import pytest

from model import BadInput, Tokenizer

DATA = Path(__file__).parent / "data" / "tokenizers"
NAMES = ("gpt2", "llama3", "qwen2", "smollm2", "llama2_legacy")
MADE_UP = json.loads((DATA / "made_up.json").read_bytes())["files"]
FORMS = json.loads((DATA / "sentencepiece.json").read_bytes())["files"]
STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def from_spec(spec) -> Tokenizer:
    return Tokenizer({"tokenizer.json": json.dumps(spec).encode()})


@lru_cache
def opened(name) -> tuple:
    """(tokenizer, expected) of a folder of data/tokenizers; a large file is packed."""
    expected = json.loads((DATA / name / "expected.json").read_bytes())
    path = DATA / name / "tokenizer.json"
    raw = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    return Tokenizer({"tokenizer.json": raw}), expected


def small(merges=(), extra=(), model=None, **top) -> Tokenizer:
    """A byte-level tokenizer of the bytes, what the merges make, and extra entries."""
    spec = json.loads(Tokenizer.bytes_only(()).files["tokenizer.json"])
    vocab = spec["model"]["vocab"]
    for token in [*("".join(pair) for pair in merges), *extra]:
        vocab.setdefault(token, len(vocab))
    spec["model"] |= {"merges": [list(pair) for pair in merges]} | (model or {})
    return from_spec(spec | top)


def sentencepiece(model=None, **top) -> Tokenizer:
    """data/tokenizers/llama2_legacy with some of its fields changed."""
    spec = json.loads(opened("llama2_legacy")[0].files["tokenizer.json"])
    return from_spec(spec | top | {"model": spec["model"] | (model or {})})


@pytest.mark.parametrize("name", NAMES)
def test_fixtures(name):
    """Stored cases: ids with added tokens seen, ids with the begin token, and every decoding."""
    tokenizer, expected = opened(name)
    for text, ids, ids_special, decoded in expected["cases"]:
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.begin + ids == ids_special and tokenizer.decode(ids) == decoded
    for ids, decoded in expected["decode"]:
        assert tokenizer.decode(ids) == decoded


def test_made_up():
    """Sequences of splits, digits, NFC and NFKC, merges without use, tokens that no merge makes."""
    for made in MADE_UP:
        vocab = {name: id for id, name in enumerate(made["tokenizer"]["model"]["vocab"])}
        model = made["tokenizer"]["model"] | {"vocab": vocab}
        tokenizer = from_spec(made["tokenizer"] | {"model": model})
        for text, ids, some_ids, decoded in made["cases"]:
            assert tokenizer.encode(text, allow_special=True) == ids, text
            assert tokenizer.decode(some_ids) == decoded


@pytest.mark.parametrize("form", FORMS, ids=[form["name"] for form in FORMS])
def test_sentencepiece_forms(form):
    """Ids with added tokens seen and not seen, ids of a text that goes on, decoding."""
    tokenizer = sentencepiece(**form["change"])
    for text, ids, plain, more, decoded in form["cases"]:
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.encode(text) == plain and tokenizer.encode_more(text) == more, text
        if "<0x" not in decoded:            # a decoder without ByteFallback shows names of bytes
            assert tokenizer.decode(ids) == decoded, text


def test_merges_count_in_the_order_of_the_file():
    """Ids in another order than the merges; a merge before those of its halves (Llama 3); a token
    that no merge makes comes out only as a whole piece, and only with ignore_merges."""
    turned = small([("b", "c"), ("a", "b")])
    vocab = turned.vocab | {"bc": 257, "ab": 256}
    turned = small([("b", "c"), ("a", "b")], model={"vocab": vocab})
    assert turned.encode("abc") == [97, 257] and turned.encode("ab") == [256]
    early = small([("xy", "z"), ("x", "y")])
    assert early.encode("xyz wxyz") == [early.ids["xyz"], 32, 119, early.ids["xyz"]]
    # the first join makes a pair of lower rank, which comes before the second join
    assert small([("aa", "a"), ("a", "a")]).encode("aaaa") == [256, 97]
    for ignore, want in ((False, ["ab", "c"]), (True, ["abc"])):
        dead = small([("a", "b")], ["abc"], model={"ignore_merges": ignore})
        assert dead.encode("abc") == [dead.ids[token] for token in want]
        assert dead.encode("abcd") == [dead.ids["ab"], 99, 100]


def test_repeat_of_a_repeat():
    """tiktoken's new pattern of GPT-4 has \\p{N}{1,3}+: `tokenizers` cuts no digits off by it."""
    cuts = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}+"}, "behavior": "Isolated"}
    parts = {"type": "Sequence", "pretokenizers": [cuts, STEP | {"use_regex": False}]}
    tokenizer = small([("1", "1"), ("11", "11")], pre_tokenizer=parts)
    assert tokenizer.encode("1111") == [tokenizer.ids["1111"]]


@pytest.mark.parametrize("alone, want", [
    (True, [97, 49, 49, 98, 49, 32, 49, 49]), (False, [97, 256, 98, 49, 32, 256])])
def test_digits(alone, want):
    """Digits are cut from letters, and with individual_digits from each other."""
    parts = [{"type": "Digits", "individual_digits": alone}, STEP]
    cuts = {"type": "Sequence", "pretokenizers": parts}
    assert small([("1", "1"), ("a", "1")], pre_tokenizer=cuts).encode("a11b1 11") == want


def test_special_tokens_count_only_where_asked_for():
    """Data cannot open a chat turn; asked for, a special token is one id; the longest one wins."""
    for name in NAMES:
        tokenizer, _ = opened(name)
        for token in json.loads(tokenizer.files["tokenizer.json"])["added_tokens"]:
            text, id = token["content"], token["id"]
            assert id not in tokenizer.encode(f"a{text}b")
            assert tokenizer.encode(f"a{text}b", True).count(id) == 1
    several = Tokenizer.bytes_only(("<s>", "<s><s>", "a b"))
    assert several.encode("<s><s><s>a b", True) == [257, 256, 258]
    assert several.decode([258, 256]) == "a b<s>"
    # lstrip and rstrip take the white space beside a token, each on its side
    spec = json.loads(Tokenizer.bytes_only(("<l>", "<r>")).files["tokenizer.json"])
    spec["added_tokens"][0]["lstrip"] = spec["added_tokens"][1]["rstrip"] = True
    tokenizer = from_spec(spec)
    assert tokenizer.encode("a \n<l> b <r>\t c", True) == [97, 256, 32, 98, 32, 257, 99]
    assert tokenizer.encode(" <l><r> ", True) == [256, 257]
    assert tokenizer.encode("<r> <l><r>\n\t<l>", True) == [257, 256] * 2     # white space of both
    assert tokenizer.encode("<l> ") == [*b"<l> "]
    # data: no token begins, ends or takes white space in it; those beside it count as before
    assert tokenizer.encode("<r> 1<l> <l>", True, data=(3, 9)) == [257, *b" 1<l> ", 256]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_bytes(name):
    """n_ids, base_ids, bytes, newline_ids are as in the file; ids beyond decode to nothing."""
    tokenizer, expected = opened(name)
    spec = json.loads(tokenizer.files["tokenizer.json"])
    base = set(spec["model"]["vocab"].values())
    ids = base | {token["id"] for token in spec["added_tokens"]}
    assert tokenizer.n_ids == max(ids) + 1 and tokenizer.base_ids == max(base) + 1
    assert tokenizer.bytes.keys() == ids
    newline = [id for id in sorted(ids) if "\n" in tokenizer.decode_more([id])]
    assert tokenizer.newline_ids == newline and newline
    assert tokenizer.decode([tokenizer.n_ids + 5]) == ""
    for text, clean in (("a\udfff b", "a\ufffd b"), ("\ud83d\ude42", "🙂"), ("\ud83d", "\ufffd")):
        assert tokenizer.encode(text, True) == tokenizer.encode(clean, True)    # lone surrogates
    tokenizer.encode_prompt("hi").append(0)                 # a prompt is a new list, not `begin`
    assert tokenizer.encode_prompt("hi") == tokenizer.begin + tokenizer.encode("hi")


def test_bytes_only_and_saving(tmp_path):
    """Ids are the bytes; a folder is saved byte for byte; without a file: BadInput names it."""
    with pytest.raises(BadInput, match="has no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.bytes_only(("<|end|>", "<|pad|>"))
    assert tokenizer.encode("1 \t\r\n é水🙂\0") == list("1 \t\r\n é水🙂\0".encode())
    assert (tokenizer.n_ids, tokenizer.newline_ids, tokenizer.eos_ids) == (258, [10], {256})
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ x }}")      # as transformers 5 writes it
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.files == tokenizer.files | {"chat_template.jinja": b"{{ x }}"}


@pytest.mark.parametrize("config, older, want", [
    (None, None, set()), ([1], None, set()), ("no token", None, set()), (0, None, set()),
    ("<a>", None, {256}), ({"content": "<b>"}, None, {257}), ("<a>", "<b>", {256}),
    (None, "<b>", {257}), (None, {"content": "<a>"}, {256})])
def test_eos_is_where_the_folder_says(config, older, want, tmp_path):
    """A string or an object in tokenizer_config.json, or else in special_tokens_map.json."""
    Tokenizer.bytes_only(("<a>", "<b>")).save(tmp_path)
    for name, eos in zip(Tokenizer.FILES[1:], (config, older)):
        (tmp_path / name).write_text(json.dumps({"eos_token": eos}))
    assert Tokenizer.from_pretrained(tmp_path).eos_ids == want


def test_link_to_nothing(tmp_path):
    """A cache that lost a file still has its link: an error, for an absent file is a default."""
    Tokenizer.bytes_only().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).eos_ids == set()
    (tmp_path / "tokenizer_config.json").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(BadInput, match="tokenizer_config.json.*lead to no file"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, want", [
    ({}, [257]), ({"bos_token": {"content": "<b>"}}, [257]), ({"add_bos_token": False}, []),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, []), ({"bos_token": None}, [])])
def test_begin_token_of_deepseek(change, want, tmp_path):
    """DeepSeek's tokenizer.json has no template: its class and a flag tell of the begin token."""
    Tokenizer.bytes_only(("<a>", "<b>")).save(tmp_path)
    config = dict(add_bos_token=True, bos_token="<b>", tokenizer_class="LlamaTokenizerFast")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    assert Tokenizer.from_pretrained(tmp_path).encode_prompt("a") == [*want, 97]


def test_texts_that_go_on():
    """Steps are encoded and read one by one: no space is lost or won at their borders."""
    steps = [" 2+2 is 4\n", " so\t水 is\n", "\n", "it  is 4\n", " #### 4"]
    for change in ({}, {"normalizer": None, "pre_tokenizer": METASPACE}):
        tokenizer = sentencepiece(**change)
        ids = [tokenizer.encode_more(step) for step in steps]
        assert [tokenizer.decode_more(step) for step in ids] == steps
        assert [step[-1] in tokenizer.newline_ids for step in ids] == [True] * 4 + [False]
        whole = tokenizer.encode_prompt("What?") + sum(ids, [])
        assert tokenizer.decode_more(whole) == "<s> What?" + "".join(steps)
        assert tokenizer.encode_more(" the cat") == tokenizer.encode("the cat")
        assert tokenizer.encode_more("the") != tokenizer.encode("the")


@pytest.mark.parametrize("unit", [" ", "a", "\n", "1", "水", " a", "the cat sat ", "\t\n"])
@pytest.mark.parametrize("name", ["qwen2", "llama2_legacy"])
def test_very_long_runs(name, unit):
    """20,000 characters of one kind: no crash, nothing quadratic, nothing is lost."""
    text = (unit * 20_000)[:20_000] + "x"
    assert opened(name)[0].decode(opened(name)[0].encode(text)) == text


SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "MergedWithNext"}


REFUSED = [
    ("merges", {"model": {"merges": None}}), ("dropout", {"model": {"dropout": 0.1}}),
    ("azz", {"model": {"merges": ["a zz"]}}), ("unpack", {"model": {"merges": ["a b c"]}}),
    ("byte_fallback", {"pre_tokenizer": METASPACE}),
    ("Lowercase", {"normalizer": {"type": "Lowercase"}}), ("MergedWith", {"pre_tokenizer": SPLIT}),
    ("last", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [STEP, {"type": "Digits"}]}}),
    ("last", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE, STEP]}}),
    ("replacement", {"pre_tokenizer": METASPACE | {"replacement": "_"}}),
    ("split = false", {"pre_tokenizer": METASPACE | {"split": True}}),
    ("add_prefix_space", {"pre_tokenizer": STEP | {"add_prefix_space": True}}),
    ("single_word", {"added_tokens": [{"id": 300, "content": "<x>", "single_word": True}]}),
    ("two ids", {"added_tokens": [{"id": 300, "content": "a"}]}),
    ("one id", {"added_tokens": [{"id": 97, "content": "<x>"}]}),
    ("unk_token", {"model": {"type": "BPE", "unk_token": "?", "vocab": {"a": 0}, "merges": []}})]


def test_what_would_be_read_wrongly_is_refused_by_name():
    """Every field whose meaning we do not have is named; so are damaged ones."""
    for word, top in REFUSED:
        with pytest.raises(BadInput, match=word):
            small(**top)
