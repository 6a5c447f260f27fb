"""把一个合法的文件弄坏：按字节改，或者（是 JSON 的）换掉其中任何一个值。"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**30, -(10**18), 1e308, "x" * 10_000, "\ud800", "/dev/zero", "../../etc/passwd"])
)
JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)
#: 常惹麻烦的片段。
JSON_PIECES = (
    *(b"null", b"-1", b"1e999", b"NaN", b'""', b"[]", b"{}", b"0", b"9" * 30, b"9" * 5000, b"[" * 3000),
    *(b'{"a":' * 3000, b"\xff", b"\xef\xbb\xbf", b"\0", b'"\\ud800"', b",", b"}", b'"', b"-0", b"1.0"),
)
TEMPLATE_PIECES = (
    *(
        b"{{ 'x' * 9999999999 }}",
        b"{% for a in range(99999) %}",
        b"{% endfor %}",
        b"{% endif %}",
        b"{{",
        b"}}",
    ),
    *(
        b"{% set s = s ~ s %}",
        b"{{ messages * 9999999 }}",
        b" | tojson(indent=99999999)",
        b" | join",
        b" ** 9999999",
    ),
    *(
        b".__class__.__mro__",
        b"{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        b"{{ lipsum(99999999) }}",
    ),
    *(
        b"{{ raise_exception(messages) }}",
        b"{{ strftime_now('%' * 99) }}",
        b"{% include 'x' %}",
        b"{% break %}",
    ),
    *(b"{{ '%999999999d' % 1 }}", b"{{ 'x'.center(9**11) }}", b"(" * 3000, b"\xff", b"\0", b"{#", b"#}"),
)


@st.composite
def edited(draw: st.DrawFn, base: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """删一段、插一段、翻一个字节，一到四次。"""
    out = base
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(out)))
        stop = min(start + draw(st.sampled_from([0, 1, 4, 40, len(out)])), len(out))
        out = out[:start] + draw(st.sampled_from(pieces) | st.binary(max_size=6)) + out[stop:]
    return out


@st.composite
def altered(draw: st.DrawFn, base: bytes) -> bytes:
    """换掉、删掉或改名 JSON 里的一到三处。"""
    tree = json.loads(base)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        path = draw(st.sampled_from(places))
        tree = _changed(
            tree,
            path,
            draw(st.sampled_from(["value", "drop", "rename"])),
            draw(JSON),
            draw(st.text(max_size=4)),
        )
    return json.dumps(tree).encode()


def mutants(base: bytes, pieces: tuple[bytes, ...] = JSON_PIECES) -> st.SearchStrategy[bytes]:
    """``base`` 的各种坏法。"""
    raw = edited(base, pieces)
    return raw | altered(base) if pieces is JSON_PIECES else raw


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(tree[key], (*path, key))


def _changed(tree: Any, path: tuple[Any, ...], how: str, value: Any, name: str) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if how == "value":
        parent[path[-1]] = value
    else:
        old = parent.pop(path[-1])
        if how == "rename" and isinstance(parent, dict):
            parent[name] = old
    return tree
