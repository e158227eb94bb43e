import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cifar_files as files
from swalp.training.datasets import pickled

ROWS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def test_a_batch_as_python_2_wrote_it():
    found = pickled.read(
        files.dictionary(
            {
                "data": files.array(ROWS),
                "labels": files.numbers([7, 0, 300]),
                "name": files.text("é"),
            }
        )
    )
    assert found["data"].tolist() == ROWS.tolist()
    assert found["labels"] == [7, 0, 300]
    assert found["name"] == "é"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_values_read_as_pickle_reads_them(value):
    assert pickled.read(pickle.dumps(value, protocol=2)) == value


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def many_arrays(count):
    """One array, of 1 kB, under many names, each a few bytes of the file."""
    first = files.array(np.zeros((1, 1000), np.uint8)) + b"q\x20"
    others = b"".join(files.text(f"{index}") + b"h\x20" for index in range(count))
    return b"\x80\x02}(" + files.text("first") + first + others + b"u."


HOSTILE = {
    "runs a command": pickle.dumps(Hostile(print, "run"), protocol=2),
    "runs code": pickle.dumps({"data": Hostile(exec, "run = 1")}, protocol=0),
    "opens a file": pickle.dumps([Hostile(open, "/etc/passwd")], protocol=4),
    "names a class by text": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an instance": b"(i__main__\nHostile\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Pfile\n.",
    "builds numpy's array without its bytes": b"\x80\x02" + files.ARRAY + b"}b.",
    "calls dtype with another text": b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.",
    "calls ndarray": b"\x80\x02cnumpy\nndarray\nK\x00\x85R.",
    "an array of a huge shape": b"\x80\x02"
    + files.ARRAY
    + b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"
    + files.DTYPE
    + b"\x89U\x01xtb.",
    "an array of negative sides": b"\x80\x02"
    + files.ARRAY
    + b"(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"
    + files.DTYPE
    + b"\x89U\x01xtb.",
    "an array of nothing": b"\x80\x02}" + files.text("data") + files.ARRAY + b"s.",
    "arrays without end": many_arrays(5000),
    "a huge place in the memo": b"\x80\x02]r\xff\xff\xff\xff0.",
    "text longer than the file": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
    "text of negative length": b"\x80\x02T" + struct.pack("<i", -1) + b"x.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a list as a key": b"\x80\x02}]K\x01s.",
    "no mark": b"\x80\x02]e.",
    "nothing to take": b"\x80\x02\x86.",
    "the memo's empty place": b"\x80\x02h\x07.",
    "two results": b"\x80\x02K\x01K\x02.",
    "no end": b"\x80\x02K\x01",
    "nothing": b"",
    "no pickle": b"\x89PNG\r\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_get_one_line(content):
    with pytest.raises(pickled.PickleError) as caught:
        pickled.read(content)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_says_what_was_refused():
    with pytest.raises(pickled.PickleError, match=r"it refers to builtins\.print, which no CIFAR"):
        pickled.read(b"\x80\x02cbuiltins\nprint\n.")
    with pytest.raises(pickled.PickleError, match="it has the opcode STACK_GLOBAL, which no CIFAR"):
        pickled.read(HOSTILE["names a class by text"].replace(b"\x8c\x02os\x8c\x06system", b""))


whole = files.dictionary({"data": files.array(ROWS), "labels": files.numbers([1, 2, 3])})


@given(st.integers(0, len(whole) - 1))
def test_truncated_files(length):
    with pytest.raises(pickled.PickleError):
        pickled.read(whole[:length])


@given(st.integers(0, len(whole) - 1), st.integers(1, 255))
@example(place=93, change=40)  # text with an escape that there is none of
def test_a_garbled_byte_is_read_or_refused(place, change):
    content = bytearray(whole)
    content[place] ^= change
    with suppress(pickled.PickleError):  # nothing else, and in no time
        pickled.read(bytes(content))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content):
    with suppress(pickled.PickleError):
        pickled.read(content)
