"""Where keys stand: found again in texts of every form that TOML has."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.lines import KeyPath, line_of, lines_of

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
