"""Patterns with many choices are matched as Python has it, and in time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_lora.adapt.match import PatternTable, matcher
from hf_lora.adapt.patterns import table_pattern, why_invalid
from hf_lora.errors import TargetError

SECONDS = 10
"""More than any of these may take; most take some hundredths. Python's own matcher takes years."""

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "^", "$", r"\b", r"\B", "[a-c_]", r"[\D.]"]
)
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{2,}"])


WAYS = ["{}", "(?:{}).*", ".*(?:{})", "(?:{})+?", "(?:{}|a).*"]


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, REPEATS).map("(?:{0[0]}){0[1]}".format),
        inner.map("({})".format),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    )


def check_patterns(examples: int) -> int:
    """Compare with Python's matcher; how many names matched."""
    hits = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.recursive(ATOMS, grown, max_leaves=8), st.sampled_from(WAYS), st.text("ab.1", min_size=1, max_size=5))
    def one(pattern: str, way: str, name: str) -> None:
        nonlocal hits
        pattern = way.format(pattern)
        assert why_invalid(pattern) is None
        expected = re.fullmatch(pattern, name) is not None
        hits += expected
        assert bool(matcher(pattern)(name)) == expected

    one()
    return hits


def test_patterns_match_as_python_has_it() -> None:
    assert check_patterns(300) > 30


@pytest.mark.slow
def test_many_patterns_match_as_python_has_it() -> None:
    assert check_patterns(5000) > 500


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+$", r"(.*)*x", "(((((.*)*)*)*)*)*x", ".*" * 8 + "x", "(?=.*(?=.*(?=.*x))).*", r"(a|a|a)*(a|b)*$"),
        *("(?:^){100}a*", r"(?:(?:\b){50}){20}.*"),  # rounds that take nothing
        *(r"(a+)+(b|c)\1", "(?i:(a*)*)x", "(a|b)*" * 300, "(ab|cd)" * 100),
    ],
)
def test_a_pattern_that_explodes_is_matched_in_time_or_refused_by_name(pattern: str) -> None:
    start = time.monotonic()
    assert why_invalid(table_pattern(pattern)) is None
    table = PatternTable({pattern: 3})
    names = ["a" * length + "y" for length in range(100, 110)]
    try:
        found = [table.get(name, 8) for name in names]
    except TargetError as error:
        found, said = [], str(error)
    assert found == [3 if pattern.endswith("}.*") else 8] * 10 or pattern[:100] in said
    assert time.monotonic() - start < SECONDS


def test_the_patterns_of_a_table_share_their_time() -> None:
    start = time.monotonic()
    table = PatternTable({f"(a|a|a)*(a|b|{i})*$": i for i in range(20)})
    names = ["a" * (100 + length) + "y" for length in range(1000)]
    with pytest.raises(TargetError, match=r"takes more than 1 s.*a list"):
        [table.get(name, 8) for name in names]
    assert time.monotonic() - start < SECONDS


def test_names_are_compared_without_expressions() -> None:
    """The first key that is a suffix of whole components counts; 10,000 of them take no time."""
    table = PatternTable({"0.key": 1, "key": 2, r"value|query": 3, "value": 4, "1.query": 5})
    names = ["layers.0.key", "layers.10.key", "0.key", "monkey", "a.value", "a.1.query", "layers.0xkey"]
    assert [table.get(name, 8) for name in names] == [1, 2, 1, 8, 3, 3, 1]  # the last one as in PEFT
    assert table.unused() == ["value", "1.query"]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(10_000)]
    start = time.monotonic()
    table = PatternTable({name: i for i, name in enumerate(names)})
    assert [table.get(name, None) for name in names] == list(range(10_000))
    assert time.monotonic() - start < 1


def test_a_pattern_as_published_adapters_have_it() -> None:
    pattern = (
        r"(?:.*?(?:vision|language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|fc1).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
    )
    assert why_invalid(pattern) is None
    names = {
        "model.layers.12.self_attn.q_proj": True,
        "text_model.0.mlp.fc1": True,
        "model.layers.x.mlp.q_proj": False,
    }
    assert {name: bool(matcher(pattern)(name)) for name in names} == names


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("x" * 2**17, "characters"),
        ("a{" + "0" * 5000 + "1}", "not a regular expression"),
        ("(?:^){4294967294}a*", "counts 4294967294 are too large"),
        (r"(?:(?:\b){65000}){65000,}.*", "counts 65000, 65000 are too large"),
    ],
)
def test_a_pattern_that_cannot_be_used_says_why(pattern: str, why: str) -> None:
    assert why in str(why_invalid(pattern))
    with pytest.raises(TargetError, match=why):
        matcher(f"{pattern}|")


def test_keys_of_a_table_match_as_pefts_do() -> None:
    """In a key that looks like a name, a dot matches any character too."""
    names = ["q_proj", "a.q_proj", "m.layers.1.q_proj", "m.layersx1.q_proj", "xq_proj", "a-b.c", "m.layers.11.q"]
    keys = [
        "q_proj",
        "q_pro.",
        "layers.1.q_proj",
        ".",
        "a.b.c",
        "l.yers.1.q_proj",
        "1.q",
        "m.layers.1.q_proj",
        "x.q_p",
    ]
    for key in keys:
        table = PatternTable({key: 1})
        found = [name for name in names if table.get(name, None) is not None]
        assert found == [name for name in names if re.match(rf"(.*\.)?({key})$", name)], key
    both = PatternTable({"q_pro.": 1, "q_proj": 2})
    assert both.get("a.q_proj", None) == 1
    assert PatternTable({"q_proj": 2, "q_pro.": 1}).get("a.q_proj", None) == 2
