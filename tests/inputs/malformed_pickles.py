"""PyTorch checkpoints that are wrong, odd, or only look wrong, each with the verdict it must get.

One row a file, as in `malformed.py`: how its bytes are made, and words of the error line, or none where it is
to be accepted. `lax` marks what torch.load(weights_only=True) takes although noisytune refuses it; the tests
hold both verdicts against torch itself (None: not asked, it would exhaust the machine).
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile

from costly_pickles import COSTLY
from malformed import Case, crowd
from pickles import Writer, archive, legacy, one


def row(name: str, content: bytes, *words: str, tensor: str | None = None, lax: bool | None = False) -> Case:
    """A case whose bytes are small enough to be made at once."""
    return Case(name, lambda: content, words, tensor, lax, ".pt")


def of_value(writer: Writer) -> bytes:
    """An archive whose pickle is what `writer` has begun, with a tensor beside it."""
    return archive(Writer().state_dict(w=Writer().tensor(), x=writer).end())


def _patched(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return out.getvalue()


def _protocol_4() -> bytes:
    return archive(pickle.dumps({"w": 1.0}, protocol=4), {})


def _memos() -> bytes:
    """A pickle that remembers one value under ever larger numbers."""
    return archive(b"\x80\x02N" + b"".join(b"r" + struct.pack("<L", 977 * i) for i in range(1_000_001)), {})


def _many(opcodes: bytes) -> bytes:
    return archive(b"\x80\x02" + opcodes * ((16 << 20) // len(opcodes)) + b".", {})


def _directory(content: bytes) -> int:
    return content.index(b"PK\x01\x02")


def _last(content: bytes) -> int:
    """Return where the last record's header in the central directory lies."""
    return content.rindex(b"PK\x01\x02")


def _zip(*names: str) -> bytes:
    """A ZIP archive of empty members, as another program than torch makes it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return made.getvalue()


_GOOD = archive(one())
_TWICE = archive(one(), {"0": bytes(16), "1": bytes(16)}).replace(b"m/data/1", b"m/data/0")
_OLD = legacy(one(legacy=True))

CONTAINER = (
    row("empty file", b"", "it is empty"),
    row("two bytes of a ZIP", b"PK", "no file of torch.save's"),
    row("ZIP truncated by a byte", _GOOD[:-1], "truncated"),
    row("ZIP truncated in the middle", _GOOD[: len(_GOOD) // 2], "truncated"),
    row("trailing junk", _GOOD + b"junk", "bytes follow the end of the archive", lax=True),
    row("a ZIP comment", _patched(_GOOD, len(_GOOD) - 2, b"\4\0") + b"note", "bytes follow", lax=True),
    row("junk before", b"\x80\x02" + _GOOD, "opcode"),
    row("deflated", archive(one(), method=zipfile.ZIP_DEFLATED), "m/data.pkl", "compressed", lax=True),
    row("a member named ../x", archive(one(), more={"../x": b""}), "unsafe name"),
    row("a member named /x", archive(one(), more={"/x": b""}), "unsafe name"),
    row("a member in another folder", archive(one(), more={"n/x": b""}), "not one that torch.save wrote"),
    row(
        "CRC wrong in the directory",
        _patched(_GOOD, _directory(_GOOD) + 16, b"\1\2\3\4"),
        "two headers",
        lax=True,
    ),
    row(
        "a record that is a folder",
        _patched(_GOOD, _last(_GOOD) + 38, b"\x10"),
        "m/data/0",
        "folder",
        lax=True,
    ),
    row("pickle's bytes changed", _GOOD.replace(b"cpu", b"cpv", 1), "CRC-32", "set_crc32_options", lax=None),
    row("two records of one name", _TWICE, "two records of the name", lax=True),
    row("weights inside", _zip("data", "policy.pth"), "with policy.pth in it", "Unpack it with unzip"),
    row("no data.pkl", archive(one()).replace(b"data.pkl", b"data.pkk"), "not one that torch.save wrote"),
    row(
        "TorchScript",
        archive(one(), more={"m/constants.pkl": b"", "m/code/x.py": b""}),
        "TorchScript",
        "program",
    ),
    row(
        "TorchScript, its code compressed",
        archive(
            one(),
            more={"m/code/x.py": b"pass", "m/constants.pkl": b""},
            more_method=zipfile.ZIP_DEFLATED,
        ),
        "TorchScript",
        "torch.jit.load",
    ),
    row("big-endian", archive(one()).replace(b"little", b"bigbig"), "CRC-32", lax=None),
    row("no storage", archive(one(), {}), "has no record"),
    row("storage too short", archive(one(), {"0": bytes(12)}), "12 bytes", "says 16"),
    row("storage too long", archive(one(), {"0": bytes(20)}), "20 bytes", "says 16"),
    row("legacy tar", _tar(), "tar archive"),
    row("gzip", gzip.compress(_GOOD, mtime=0), "gzip", "gunzip"),
    row("HTML page", b"<!DOCTYPE html><html></html>", "HTML page"),
    row("git-LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    row("safetensors", crowd(1), "no file of torch.save's", lax=None),
)

LEGACY = (
    row("a plain pickle", pickle.dumps({"w": [1.0]}, protocol=2), "not one that torch.save wrote"),
    row("arrays in a plain pickle", b"\x80\x02cnumpy\nndarray\n.", "save a state dict of tensors"),
    row("legacy, another version", _OLD.replace(b"M\xe9\x03.", b"M\xea\x03."), "not known"),
    row("legacy, big-endian", _OLD.replace(b"\x88", b"\x89", 1), "big-endian", lax=True),
    row("legacy, a byte short", _OLD[:-1], "1 bytes are missing"),
    row("legacy, a byte long", _OLD + b"\0", "1 bytes follow its last storage", lax=True),
    row("legacy without its storages", legacy(one(legacy=True), {})[:-1], "damaged or cut off"),
    row("legacy, no list of them", legacy(one(legacy=True), {}), "list of storages", lax=None),
    row("legacy, too many elements", legacy(one(legacy=True), {"0": bytes(20)}), "has 5 elements"),
    row("legacy, os.system", legacy(Writer().call("os", "system", "true").end()), "os.system"),
)

GLOBALS = (
    row("os.system", of_value(Writer().call("os", "system", "true")), "os.system", "weights_only"),
    row("builtins.eval", of_value(Writer().call("builtins", "eval", "1")), "builtins.eval"),
    row(
        "builtins.exec as Python 2 spelt it",
        of_value(Writer().call("__builtin__", "exec", "1")),
        "builtins.exec",
    ),
    row("builtins.getattr", of_value(Writer().call("builtins", "getattr", 1, "real")), "builtins.getattr"),
    row(
        "a whole module",
        of_value(Writer().name("torch.nn.modules.linear", "Linear").raw(b")R")),
        "a whole model",
    ),
    row("a class of the user's", of_value(Writer().name("__main__", "Net").raw(b")R")), "__main__.Net"),
    row(
        "argparse.Namespace",
        of_value(Writer().name("argparse", "Namespace").raw(b")R")),
        "argparse.Namespace",
    ),
    row(
        "a NumPy scalar",
        of_value(Writer().name("numpy._core.multiarray", "scalar")),
        "numpy._core.multiarray",
    ),
    row(
        "a sparse tensor",
        of_value(Writer().name("torch._utils", "_rebuild_sparse_tensor")),
        "sparse",
        lax=True,
    ),
    row(
        "a quantised tensor",
        of_value(Writer().name("torch._utils", "_rebuild_qtensor")),
        "quantised",
        lax=True,
    ),
    row("a call of a value", of_value(Writer().value(1).raw(b")R")), "no function"),
    row("a call with a list", of_value(Writer().name("torch", "Size").raw(b"]R")), "no function", lax=None),
    row("bytearray(2**33)", of_value(Writer().call("builtins", "bytearray", 2**33)), "bytearray", lax=None),
    row("bytearray(100)", of_value(Writer().call("builtins", "bytearray", 100)), "bytearray", lax=True),
    row(
        "another codec", of_value(Writer().call("_codecs", "encode", "a", "utf-16")), "encodes text", lax=True
    ),
    row(
        "wrong arguments", of_value(Writer().call("torch._utils", "_rebuild_tensor_v2", 1)), "wrong arguments"
    ),
)

PICKLES = (
    row("protocol 4", _protocol_4(), "opcode 0x95"),
    row("no end", archive(one()[:-1]), "cut off"),
    row("nothing", archive(b""), "cut off"),
    row("an end alone", archive(b"."), "damaged"),
    row("junk after the end", archive(one() + b"junk"), "4 bytes follow", lax=True),
    row("an unknown memo", archive(b"\x80\x02h\x07."), "damaged"),
    row("a pop of nothing", archive(b"\x80\x02s."), "damaged"),
    row("a mark that is not there", archive(b"\x80\x02t."), "damaged"),
    row("an odd number of items", archive(b"\x80\x02}(X\x01\0\0\0wu."), "damaged"),
    row("a text longer than the file", archive(b"\x80\x02X\xff\xff\xff\xff."), "cut off"),
    row("a name that is not UTF-8", archive(b"\x80\x02X\x01\0\0\0\xff."), "damaged"),
    row("a list as a key", archive(b"\x80\x02}]Ns."), "key"),
    row("a tuple in a tuple as a key", archive(b"\x80\x02})\x85Ns."), "key", lax=None),
    row(
        "a tuple 100,000 deep as a key", archive(b"\x80\x02})" + b"\x85" * 100_000 + b"Ns."), "key", lax=None
    ),
    row("items of a list", archive(b"\x80\x02]NNs."), "other than a dictionary"),
    row("an appendix to a dictionary", archive(b"\x80\x02}Na."), "other than a list"),
    row("a state for a list", archive(b"\x80\x02]}b."), "sets the state"),
    row("a top-level list", archive(Writer().raw(b"](").tensor().raw(b"e").end()), "a list", lax=True),
    row("a top-level tensor", archive(Writer().tensor().end()), "one tensor without a name", lax=True),
    row("a top-level number", archive(Writer().value(1).end(), {}), "no dictionary", lax=True),
    row(
        "an optimizer",
        archive(Writer().value({"state": {}, "param_groups": []}).end(), {}),
        "optimizer",
        lax=True,
    ),
    row(
        "dictionaries 100 deep",
        archive(b"\x80\x02" + b"}X\1\0\0\0a" * 100 + b"}" + b"s" * 100 + b".", {}),
        "nested too deep",
        lax=True,
    ),
    row("a dictionary in itself", archive(b"\x80\x02}q\0X\1\0\0\0ah\0s.", {}), "nested too deep", lax=True),
    row(
        "a surrogate in a name",
        archive(b"\x80\x02}X\x03\0\0\0\xed\xa0\x80" + bytes(Writer().tensor().data[2:]) + b"s."),
        "surrogate",
        lax=True,
    ),
    Case("16 million marks", lambda: _many(b"("), ("opcodes",), None, None, ".pt"),
    Case("16 million dictionaries", lambda: _many(b"}"), ("opcodes",), None, None, ".pt"),
    Case("a million memos", _memos, ("opcodes",), None, None, ".pt"),
    Case("16 million sets", lambda: _many(b"\x8f"), ("opcodes",), None, None, ".pt"),
    Case("8 million texts", lambda: _many(b"X\0\0\0\0"), ("opcodes",), None, None, ".pt"),
    Case(
        "a pickle of 40 MB",
        lambda: archive(Writer().value("x" * 40_000_000).end(), {}),
        ("limit",),
        None,
        None,
        ".pt",
    ),
)

TENSORS = (
    row("expanded", archive(one(shape=(4, 4), stride=(0, 1))), "overlap", tensor="w", lax=True),
    row("a window over itself", archive(one(shape=(2, 3), stride=(1, 1))), "overlap", tensor="w", lax=True),
    row("past the end", archive(one(shape=(5,))), "past the end"),
    row("past the end by its offset", archive(one(offset=1)), "past the end"),
    row("past the end by its stride", archive(one(shape=(2,), stride=(4,))), "past the end"),
    row("a negative offset", archive(one(offset=-1)), "no number from 0"),
    row("a negative stride", archive(one(stride=(-1,))), "no number from 0"),
    row("a negative size", archive(one(shape=(-4,))), "no number from 0"),
    row("a size that is text", archive(one(shape=("4",))), "no number from 0"),
    row("a shape that is a number", archive(one(shape=4)), "shape or strides that are none"),
    row("more sizes than strides", archive(one(shape=(2, 2))), "differ in length"),
    row("shape [2^40, 2^40, 0]", archive(one(shape=(2**40, 2**40, 0), stride=(0, 0, 1))), "2^63", lax=None),
    row("a storage of 2^61 elements", archive(one(elements=2**61)), "has 16 bytes"),
    row("a storage of -1 elements", archive(one(elements=-1)), "no number from 0"),
    row("a storage's key with a path", archive(one(key="../0")), "has no record"),
    row(
        "a storage as two dtypes",
        archive(
            Writer()
            .state_dict(a=Writer().tensor(), b=Writer().tensor(shape=(2,), elements=2, kind="DoubleStorage"))
            .end()
        ),
        "in two ways",
        lax=None,
    ),
    row(
        "overlapping tensors",
        archive(
            Writer().state_dict(a=Writer().tensor(shape=(3,)), b=Writer().tensor(shape=(3,), offset=1)).end()
        ),
        "share a part",
        lax=True,
    ),
    row(
        "one slot in two shapes",
        archive(
            Writer().state_dict(a=Writer().tensor(), b=Writer().tensor(shape=(2, 2), stride=(2, 1))).end()
        ),
        "share a part",
        lax=True,
    ),
)

ODD = (
    row("plain", _GOOD),
    row("legacy", _OLD),
    row("an empty state dict", archive(Writer().value({}).end(), {})),
    row("a record nobody names", archive(one(), {"0": bytes(16), "1": bytes(9)})),
    row("a transposed tensor", archive(one(shape=(2, 2), stride=(1, 2)))),
    row("every other element", archive(one(shape=(2,), stride=(2,)))),
    row(
        "disjoint views",
        archive(
            Writer()
            .state_dict(
                a=Writer().tensor(shape=(2,), stride=(2,)),
                b=Writer().tensor(shape=(2,), stride=(2,), offset=1),
            )
            .end()
        ),
    ),
    row("a tie", archive(Writer().state_dict(a=Writer().tensor(), b=Writer().tensor()).end())),
    row("an axis of one element, any stride", archive(one(shape=(1, 4), stride=(0, 1)))),
    row("a scalar", archive(one(shape=(), stride=(), offset=3))),
    row("an empty tensor", archive(one(shape=(0, 3), stride=(3, 1)))),
    row(
        "a name that clears the screen",
        archive(Writer().raw(b"}").value("\x1b[2J").raw(bytes(Writer().tensor().data[2:]) + b"s").end()),
    ),
    row("NaN and Inf", archive(one(), {"0": struct.pack("<4f", float("nan"), float("inf"), 0, 1)})),
    row("bytes beside it", of_value(Writer().call("_codecs", "encode", "a\xff", "latin1"))),
    row("a bytearray of bytes", of_value(Writer().call("builtins", "bytearray", "a", "latin1"))),
    row("numbers beside it", of_value(Writer().value([1, -1, 2**70, 0.5, True, None, (1, (2,)), {3: "x"}]))),
    row(
        "a device and a dtype",
        of_value(Writer().raw(b"(").call("torch", "device", "cuda", 0).name("torch", "float16").raw(b"t")),
    ),
)

CASES = CONTAINER + LEGACY + GLOBALS + PICKLES + TENSORS + COSTLY + ODD
