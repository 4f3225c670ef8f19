"""Where keys stand: found again in texts of every form that TOML has."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.worker.tomllines import KeyPath, find_line, line_of, lines_of

TEXT = '''\
# a comment with a [table] and key = value
seed = 1  # here

"quoted key" = "# no comment" # one
a.b.c = 'x = [1]'
many = [
    1, # first
    { x = 1, "y z" = [2, 3] },
]
long = """
[not.a.table]
seed = 2
"""
raw = \'\'\'
[[nor]]\'\'\'

[delays]
hop = 1979-05-27T07:32:00Z

[[workers]]
count = 1
outages = [{ dies = "1s" },
    { dies = "3s", returns = "4s" }]

[[workers]]
count = 2
[workers.deep]
er = {}

[[workers.parts]]
a = 1
[[workers.parts]]
a = [[1,
2], []]
'''


def test_every_key_and_element_has_its_line() -> None:
    lines = lines_of(TEXT)
    assert lines["seed",] == 2
    assert lines["quoted key",] == 4
    assert lines["a",] == lines["a", "b", "c"] == 5
    assert (lines["many",], lines["many", 0], lines["many", 1], lines["many", 1, "y z", 1]) == (6, 7, 8, 8)
    assert (lines["long",], lines["raw",]) == (10, 14)
    assert (lines["delays",], lines["delays", "hop"]) == (17, 18)
    assert (lines["workers",], lines["workers", 0, "outages", 1, "dies"]) == (20, 23)
    assert (lines["workers", 1], lines["workers", 1, "count"], lines["workers", 1, "deep", "er"]) == (25, 26, 28)
    assert (lines["workers", 1, "parts", 1], lines["workers", 1, "parts", 1, "a", 0, 1]) == (32, 34)
    assert ("not",) not in lines
    assert ("nor",) not in lines


def test_every_path_that_tomllib_reads_is_known() -> None:
    lines = lines_of(TEXT)
    for path in paths(tomllib.loads(TEXT)):
        assert path in lines, path


def test_what_is_not_there_is_missing_in_its_table() -> None:
    lines = lines_of(TEXT)
    assert line_of(lines, ("workers", 1, "nothing", "deep")) == 25
    assert line_of(lines, ("nothing",)) == 1


def paths(value: Any, at: KeyPath = ()) -> list[KeyPath]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for step, each in steps for path in ((*at, step), *paths(each, (*at, step)))]


_keys = st.text("abc-_1", min_size=1, max_size=4)
_scalars = st.sampled_from(["1", "-2.5e3", "true", '"a]b}c#\\"d"', "'l[1'", '"""x\ny"""', "1979-05-27"])
_spaces = st.sampled_from(["", " ", "\n", " # c [x]\n "])


def _arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda each, space: "[" + space + f",{space}".join(each) + space + "]", st.lists(values), _spaces)


def _tables(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.dictionaries(_keys, values, max_size=3)
    return pairs.map(lambda each: "{" + ", ".join(f"{key} = {value}" for key, value in each.items()) + "}")


_values = st.recursive(_scalars, lambda values: _arrays(values) | _tables(values), max_leaves=8)
_bodies = st.dictionaries(_keys, _values, max_size=4)


def _body(pairs: dict[str, str]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in pairs.items())


@given(_bodies, st.lists(st.tuples(st.sampled_from(["t", "u"]), _bodies), max_size=4))
def test_any_text_has_lines_for_all_that_is_in_it(
    top: dict[str, str], tables: list[tuple[str, dict[str, str]]]
) -> None:
    text = _body(top) + "".join(f"[[{name}]]\n{_body(pairs)}" for name, pairs in tables)
    lines = lines_of(text)
    values = tomllib.loads(text)
    assert set(paths(values)) <= lines.keys()
    rows = text.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert path[-1] in rows[line - 1]


# --- every way to write a key ---

_RAW = 3 * "'"
_names = st.text("ab1-_ .#=\"'[]\\\n\té\u2028", max_size=4)
_trees = st.recursive(
    st.just(0),
    lambda each: st.dictionaries(_names, each, max_size=3) | st.lists(each, max_size=2),
    max_leaves=8,
)


class _Writer:
    """Writes a tree as TOML in a way that is drawn; each number is another one, so that it is found again."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._count = 1000

    def document(self, tree: dict[str, Any]) -> str:
        return self._table((), tree)

    def _table(self, at: tuple[str, ...], tree: dict[str, Any]) -> str:
        inline = {key: each for key, each in tree.items() if not isinstance(each, dict) or self._draw(st.booleans())}
        body = "".join(self._pair(key, each) for key, each in inline.items())
        for key, each in tree.items():
            if key not in inline:
                head = self._draw(st.sampled_from(["[", "\t[ "])) + self._dotted((*at, key)) + "] # [x]\n"
                body += head + self._table((*at, key), each)
        return body

    def _pair(self, key: str, each: Any) -> str:
        gap = self._draw(st.sampled_from(["", "\n", "# a = 1\n", "\r\n", "  "]))
        if isinstance(each, dict) and each and self._draw(st.booleans()):
            return "".join(
                f"{gap}{self._dotted((key, inner))} = {self._value(value)} # '\n" for inner, value in each.items()
            )
        return f"{gap}{self._key(key)} = {self._value(each)}\n"

    def _dotted(self, path: tuple[str, ...]) -> str:
        return self._draw(st.sampled_from([".", " . ", "."])).join(map(self._key, path))

    def _key(self, key: str) -> str:
        ways = [json.dumps(key, ensure_ascii=self._draw(st.booleans()))]
        if "'" not in key and "\n" not in key:
            ways.append(f"'{key}'")
        if re.fullmatch("[A-Za-z0-9_-]+", key):
            ways.append(key)
        return self._draw(st.sampled_from(ways))

    def _value(self, each: Any) -> str:
        if isinstance(each, dict):
            return "{" + ", ".join(f"{self._key(key)} = {self._value(value)}" for key, value in each.items()) + "}"
        if isinstance(each, list):
            gap = self._draw(st.sampled_from(["", "\n", " # ]\n"]))
            return "[" + gap + f",{gap}".join(map(self._value, each)) + gap + "]"
        self._count += 1
        form = ["{}", '"a#{}"', "'=\"{}'", '"""\\"{}"""', _RAW + "''{}" + _RAW, '"""{}\n]\n"""']
        return self._draw(st.sampled_from(form)).format(self._count)


@st.composite
def _documents(draw: st.DrawFn) -> str:
    return _Writer(draw).document(draw(st.dictionaries(_names, _trees, max_size=4)))


@given(_documents())
def test_every_key_has_the_line_on_which_its_value_begins(text: str) -> None:
    values = tomllib.loads(text)
    rows = text.split("\n")
    for path in paths(values):
        value: Any = values
        for step in path:
            value = value[step]
        line = find_line(text, path)
        assert line is not None
        if not isinstance(value, dict | list):
            [number] = re.findall(r"\d{4}", str(value))
            assert number in rows[line - 1], (path, line)


@given(st.text("ab=.[]{}\"',\n# 1", max_size=30))
def test_a_text_that_is_no_toml_has_some_line_or_none(text: str) -> None:
    """Whatever a newer TOML may allow."""
    assert (find_line(text, ("a", "b")) or 1) >= 1


def test_no_line_is_better_than_a_wrong_one() -> None:
    assert find_line("a = 1\nb = ", ("b",)) is None
    assert find_line("a = [}\n", ("a",)) is None
    assert find_line('"\\" = 1\n', ("a",)) is None
    assert find_line("a = 1\n", ("b",)) is None
    assert find_line("a = 1\n", ()) is None
    assert find_line("[t]\na = 1\n", ("t", "b")) == 1
    assert find_line(f"a = {'[' * 100_000}{']' * 100_000}", ("a",)) is None
