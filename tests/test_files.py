"""JSON and safetensors: what is written comes back, and no file, however damaged, does anything but BadInput.

Oracles: the format's own rules (one hand-made file for each), equality of bytes, and thousands of seeded
mutations of which every one must give a sound result or BadInput. Fixed seeds: no false alarms."""
import errno
import json
import os
import random
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (BadInput, read_json, read_safetensors, safetensors_header, weight_files,  # noqa: E402
                   write_atomically, write_safetensors, write_text)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
TWO = ONE | {"b": {"dtype": "F16", "shape": [1], "data_offsets": [8, 10]}}


def pack(header, data=b"\0" * 8, n=None) -> bytes:
    """A safetensors file of a header (an object, or its raw bytes) and the data behind it; n: the length it
    claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if n is None else n) + raw + data


def some_tensors():
    torch.manual_seed(0)
    return {"z.f32": torch.randn(3, 4), "y.f16": torch.randn(2, 2).half(),
            "x.bf16": torch.randn(5).bfloat16(), "w.i64": torch.arange(-2, 3),
            "v.bool": torch.tensor([[True, False, True]]), "u.scalar": torch.tensor(7.),
            "t.empty": torch.zeros(0, 4), "s.slant": torch.randn(3, 2).T, "r": torch.tensor([torch.nan, -0.])}


def same(a, b) -> bool:
    """Equal dtype, shape and bits (NaN and -0 included)."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_round_trip(tmp_path):
    """Every dtype, scalars, empty and transposed tensors, names and metadata come back bit for bit."""
    tensors, path = some_tensors() | {"naïve 水 \"name\"": torch.ones(1)}, tmp_path / "new" / "m.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "b": "水"})
    back, metadata = read_safetensors(path)
    assert metadata == {"format": "pt", "b": "水"} and back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)
    assert os.listdir(path.parent) == ["m.safetensors"]                 # no temporary file is left


def test_layout(tmp_path):
    """The file is what the format says: header padded to 8, data gapless, each tensor at a multiple of its
    width; the order in which tensors are given does not show in the bytes."""
    tensors, a, b = some_tensors(), tmp_path / "a", tmp_path / "b"
    write_safetensors(a, tensors, {"y": "1", "x": "2"})
    write_safetensors(b, dict(reversed(tensors.items())), {"x": "2", "y": "1"})
    raw = a.read_bytes()
    assert raw == b.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + n])
    assert n % 8 == 0 and raw[8:9] == b"{" and header.pop("__metadata__") == {"x": "2", "y": "1"}
    at = 8 + n
    for name, (dtype, shape, begin, end) in safetensors_header(a).items():
        assert begin == at == header[name]["data_offsets"][0] + 8 + n and list(shape) == header[name]["shape"]
        assert begin % tensors[name].dtype.itemsize == 0 and dtype == header[name]["dtype"]
        assert raw[begin:end] == bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).tolist())
        at = end
    assert at == len(raw)


def test_keep_reads_only_what_it_names(tmp_path):
    """keep decides by name, and each tensor has storage of its own: changing one changes no other."""
    path = tmp_path / "m"
    write_safetensors(path, {"a": torch.zeros(4), "b": torch.ones(4)})
    assert list(read_safetensors(path, lambda name: name == "b")[0]) == ["b"]
    tensors = read_safetensors(path)[0]
    tensors["a"] += 5
    assert tensors["b"].tolist() == [1, 1, 1, 1] and read_safetensors(path)[0]["a"].tolist() == [0, 0, 0, 0]


def test_bool_bytes_are_made_sound(tmp_path):
    """A bool stored as the byte 2 reads as True that equals True (a plain view would be undefined
    behaviour)."""
    path = tmp_path / "m"
    path.write_bytes(pack({"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\2"))
    assert torch.equal(read_safetensors(path)[0]["a"], torch.tensor([False, True, True]))


def entry(**change):
    return {"a": {**ONE["a"], **change}}


DAMAGED = {  # why -> the file's bytes, a word that the message must have
    "empty file": (b"", "cut short"),
    "shorter than the length field": (b"\0" * 7, "cut short"),
    "length over 100,000,000": (struct.pack("<Q", 100_000_001) + b" " * 64, "cut short"),
    "length over the file": (pack(ONE, n=10_000), "cut short"),
    "length of 2**64 - 1": (pack(ONE, n=2 ** 64 - 1), "cut short"),
    "header not UTF-8": (pack(b'{"\xff": 1}'), "utf-8"),
    "header not JSON": (pack(b"{'a': 1}"), "header"),
    "header empty": (pack(b""), "header"),
    "header a list": (pack([1]), "list"),
    "header nested too deeply": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "recursion"),
    "integer of 5,000 digits": (pack(b'{"a":' + b"1" * 5000 + b"}"), "digits"),
    "name twice": (pack(json.dumps(ONE).encode()[:-1] + b"," + json.dumps(ONE).encode()[1:]), "twice"),
    "key twice, one level down": (pack(json.dumps(ONE).replace("{", '{"dtype": "F32", ', 2).replace(
        '"dtype": "F32", ', "", 1).encode()), "twice"),
    "entry no object": (pack({"a": 1}), "dtype"),
    "dtype missing": (pack({"a": {"shape": [2], "data_offsets": [0, 8]}}), "dtype"),
    "unknown key": (pack(entry(extra=1)), "odd"),
    "dtype unknown": (pack(entry(dtype="F64", shape=[1])), "F64"),
    "dtype a list": (pack(entry(dtype=["F32"])), "dtype"),
    "shape null": (pack(entry(shape=None)), "shape"),
    "dimension a bool": (pack(entry(shape=[True, 2])), "odd"),
    "dimension a float": (pack(entry(shape=[2.0])), "odd"),
    "dimension negative": (pack(entry(shape=[-2])), "odd"),
    "two negative dimensions": (pack(entry(shape=[-1, -2])), "odd"),
    "dimension of 2**62": (pack(entry(shape=[2 ** 62, 4])), "odd"),
    "product that wraps round to 2": (pack(entry(shape=[2 ** 33, 2 ** 31 + 1, 2])), "fit"),
    "strides overflow": (pack(entry(shape=[0, 2 ** 40, 2 ** 40], data_offsets=[0, 0]), b""), "fit"),
    "a thousand dimensions": (pack(entry(shape=[1] * 1000)), "odd"),
    "three offsets": (pack(entry(data_offsets=[0, 8, 8])), "odd"),
    "offsets backwards": (pack(entry(data_offsets=[8, 0])), "fit"),
    "offset negative": (pack(entry(data_offsets=[-8, 0])), "odd"),
    "shape too small for its bytes": (pack(entry(shape=[1])), "fit"),
    "shape too big for its bytes": (pack(entry(shape=[3])), "fit"),
    "gap at the start": (pack(entry(data_offsets=[8, 16]), b"\0" * 16), "gap"),
    "gap between": (pack(TWO | {"b": TWO["b"] | {"data_offsets": [10, 12]}}, b"\0" * 12), "gap"),
    "overlap": (pack(ONE | {"b": {"dtype": "F16", "shape": [1], "data_offsets": [6, 8]}}), "overlap"),
    "data cut short": (pack(TWO, b"\0" * 9), "cut short"),
    "data too long": (pack(TWO, b"\0" * 11), "damaged"),
    "data without tensors": (pack({}, b"\0"), "damaged"),
    "metadata not strings": (pack({"__metadata__": {"a": 1}, **ONE}), "__metadata__"),
    "metadata a list": (pack({"__metadata__": ["a"], **ONE}), "__metadata__"),
    "git-LFS pointer": (POINTER, "git lfs pull"),
    "pickle in a zip": (b"PK\3\4" + b"\0" * 10 + b"\xff" * 50, "safe_serialization"),
    "bare pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "safe_serialization"),
}


@pytest.mark.parametrize("why", DAMAGED)
def test_each_check(tmp_path, why):
    """Each rule of the format has a file that breaks it and nothing else; the message names file and
    reason."""
    raw, word = DAMAGED[why]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    for read in (read_safetensors, safetensors_header):
        with pytest.raises(BadInput, match="(?s)m.safetensors.*" + word):
            read(path)


def test_sound_neighbours_of_the_damaged(tmp_path):
    """What is odd but allowed is read: entries out of order, spaces behind the header, no tensors, empty
    tensors."""
    path = tmp_path / "m"
    for header, data, names in ((dict(reversed(TWO.items())), b"\0" * 10, ["a", "b"]), ({}, b"", []),
                                (json.dumps(ONE).encode() + b" " * 100, b"\0" * 8, ["a"]),
                                (entry(shape=[0, 3], data_offsets=[0, 0]), b"", ["a"]),
                                ({"__metadata__": {}, **ONE}, b"\0" * 8, ["a"])):
        path.write_bytes(pack(header, data))
        assert list(read_safetensors(path)[0]) == names


def test_mutations_and_truncations(tmp_path):
    """4,000 damaged copies: a result whose tensors match their own header, or BadInput; never another
    exception, and never more bytes of tensors than the file has."""
    rng, path, results = random.Random(0), tmp_path / "m", 0
    good = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(4).half()}
    write_safetensors(path, good, {"k": "v"})
    good = path.read_bytes()
    n = 8 + struct.unpack("<Q", good[:8])[0]
    spice = [*(bytes([b]) for b in b'09[]{}",-e. \0\xff'), b"null", b"true"]
    for _ in range(4000):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, kind = rng.randrange(n if rng.random() < .9 else max(len(raw), 1)), rng.random()
            if kind < .5:
                raw[at:at + 1] = rng.choice(spice)
            elif kind < .8:
                raw[at:at + 1] = bytes([rng.randrange(256)])
            elif kind < .9:
                del raw[at:at + rng.randrange(1, 9)]
            else:
                raw = raw[:at]
        path.write_bytes(raw)
        try:
            tensors = read_safetensors(path)[0]
        except BadInput:
            continue
        results += 1
        header = safetensors_header(path)
        assert [(n, tuple(t.shape)) for n, t in tensors.items()] == [(n, h[1]) for n, h in header.items()]
        assert sum(t.numel() * t.dtype.itemsize for t in tensors.values()) <= len(raw)
    assert results > 50                                                 # damaged data is still data


def test_json(tmp_path):
    """read_json gives an object or BadInput that names the file: absent, a folder, not UTF-8, broken, no
    object, too deep, a key twice, an LFS pointer. write_text and read_json are inverse."""
    path = tmp_path / "c.json"
    write_text(path, '{"a": [1, {"b": "水"}]}')
    assert read_json(path) == {"a": [1, {"b": "水"}]}
    for raw, word in ((b'{"a": "\xff"}', "utf-8"), (b'{"a": 1', "delimiter"), (b"[1]", "list"),
                      (b"", "Expecting"), (b"[" * 100_000, "recursion"),
                      (b'{"a": {"b": 1, "b": 2}}', "twice"),
                      (b"null", "None"),
                      (b'{"a": ' + b"9" * 9999 + b"}", "digits"), (POINTER, "git lfs pull")):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match="(?s)c.json.*" + word):
            read_json(path)
    for absent in (tmp_path / "none.json", tmp_path, str(tmp_path / "zero\0byte")):
        with pytest.raises(BadInput):
            read_json(absent)
        with pytest.raises(BadInput):
            read_safetensors(absent)


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_disk_full(tmp_path, monkeypatch, broken):
    """When the disk is full the old file stays as it was, no temporary file stays, and BadInput has path and
    reason."""
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def chunks():
        yield b"new"
        full()
    if broken != "write":
        monkeypatch.setattr(os, broken, full)
    with pytest.raises(BadInput, match="m.safetensors.*No space left"):
        if broken == "write":
            write_atomically(path, chunks())
        write_safetensors(path, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["m.safetensors"]


def test_write_refuses_other_types(tmp_path):
    """A dtype that the format has but we do not read is refused before anything is written."""
    with pytest.raises(BadInput, match="float64"):
        write_safetensors(tmp_path / "m", {"a": torch.zeros(1, dtype=torch.float64)})
    assert os.listdir(tmp_path) == []


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", dict.fromkeys(tensors, torch.ones(1)))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weight_files(tmp_path):
    """One file or shards: each tensor with the file that holds it; the single file wins where both are
    there."""
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}, a="xz", b="y")
    assert weight_files(tmp_path) == {"x": tmp_path / "a.safetensors", "z": tmp_path / "a.safetensors",
                                      "y": tmp_path / "b.safetensors"}
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert weight_files(str(tmp_path)) == {"w": tmp_path / "model.safetensors"}


@pytest.mark.parametrize("weight_map, files", [
    ({"x": "a.safetensors"}, {}),                                                       # shard missing
    ({"x": "a.safetensors", "y": "a.safetensors"}, {"a": "x"}),                         # tensor missing
    ({"x": "a.safetensors"}, {"a": "xy"}),                                              # tensor not listed
    ({"x": "a.safetensors", "y": "b.safetensors"}, {"a": "x", "b": "xy"}),              # tensor in two files
    ({"x": "../a.safetensors"}, {"a": "x"}), ({"x": "/a.safetensors"}, {"a": "x"}),     # out of the folder
    ({"x": "..\\a.safetensors"}, {"a": "x"}), ({"x": ".."}, {"a": "x"}), ({"x": ""}, {"a": "x"}),
    ({"x": "a\0.safetensors"}, {"a": "x"}), ({"x": 1}, {"a": "x"}), ({"x": None}, {"a": "x"}),
    ({}, {"a": "x"}), ([], {"a": "x"}), (None, {"a": "x"})])
def test_index_and_shards_must_agree(tmp_path, weight_map, files):
    """Every way in which an index can be wrong about its shards, or point elsewhere, is refused."""
    shards(tmp_path, weight_map, **files)
    with pytest.raises(BadInput):
        weight_files(tmp_path)


def test_folders_without_weights(tmp_path):
    """No folder, a file, nothing in it, only pickles: BadInput with the reason and, for pickles, the way
    out."""
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(BadInput, match=folder.name):
            weight_files(folder)
    with pytest.raises(BadInput, match="no weights"):
        weight_files(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"\x80\x02.")
        with pytest.raises(BadInput, match="CVE-2025-32434.*CVE-2026-24747.*safe_serialization=True"):
            weight_files(folder)
