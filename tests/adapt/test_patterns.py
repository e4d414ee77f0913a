"""Patterns with many choices are matched as Python has it, and in time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_lora.adapt import patterns
from hf_lora.adapt.patterns import matcher, table_pattern, why_unbounded

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
        tree = patterns._parsed(pattern)
        assert patterns._why_not_walked(tree) is None
        expected = re.fullmatch(pattern, name) is not None
        hits += expected
        assert patterns._Walk(name).matches(tree) == expected

    one()
    return hits


def test_walked_patterns_match_as_python_has_it() -> None:
    assert check_patterns(300) > 30


@pytest.mark.slow
def test_many_walked_patterns_match_as_python_has_it() -> None:
    assert check_patterns(5000) > 500


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+$", r"(.*)*x", "(((((.*)*)*)*)*)*x", ".*" * 8 + "x", "(?=.*(?=.*(?=.*x))).*", r"(a|a|a)*(a|b)*$"),
        *("(?:^){4294967294}a*", r"(?:(?:\b){65000}){65000}.*"),  # rounds that take nothing
    ],
)
def test_a_pattern_that_explodes_is_matched_in_time(pattern: str) -> None:
    start = time.monotonic()
    assert why_unbounded(table_pattern(pattern)) is None
    for length in range(100, 110):
        matcher(pattern)("a" * length + "y")
    assert time.monotonic() - start < SECONDS


def test_a_pattern_as_published_adapters_have_it() -> None:
    pattern = (
        r"(?:.*?(?:vision|language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|fc1).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
    )
    assert why_unbounded(pattern) is None
    names = {
        "model.layers.12.self_attn.q_proj": True,
        "text_model.0.mlp.fc1": True,
        "model.layers.x.mlp.q_proj": False,
    }
    assert {name: matcher(pattern)(name) for name in names} == names


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a+)+(b|c)\1", "groupref"),
        ("(?i)(a*)*", "flags"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        ("(ab|cd)" * 100, "more than 64 choices"),
        ("x" * 2**17, "characters"),
        ("(a|b)*" * 1000, "characters"),
    ],
)
def test_a_pattern_that_cannot_be_bounded_says_why(pattern: str, why: str) -> None:
    assert why in str(why_unbounded(pattern))
