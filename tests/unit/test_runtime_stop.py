"""停止串：怎么切段都一样，流式从不露出半个；逐个 token 与投机解码停在同一处；放不下的说一声。"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_export.errors import DsxError
from deepseek_export.runtime import BundleTokenizer, SpeculativeGenerator, StopStrings
from deepseek_export.runtime.stop import stop_list
from tests.unit.test_runtime_speculative_toy import LIMIT, build, make_drafts, one_by_one
from tests.unit.test_runtime_tokenizer import byte_tokenizer
from tests.unit.test_runtime_toy import make_toy

pytestmark = pytest.mark.unit

TOY = make_toy(LIMIT)
_LETTERS = st.text("ab月", max_size=12)


def _whole(text: str, stops: list[str]) -> str:
    """停止串之前的文本，从定义算：最短的、末尾凑齐了某个停止串的前缀，去掉其中最长的那个。"""
    for end in range(1, len(text) + 1):
        ready = [stop for stop in stops if text[:end].endswith(stop)]
        if ready:
            return text[: end - max(map(len, ready))]
    return text


@given(_LETTERS, st.lists(st.text("ab月", min_size=1, max_size=4), max_size=3), st.data())
def test_the_cut_into_pieces_changes_nothing(text: str, stops: list[str], data: st.DataObject):
    """RUNTIME-12：每一刻给出的都是结果的前缀，攥着的只可能是停止串的开头。"""
    want, found, shown, rest = _whole(text, stops), StopStrings(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        shown += found.feed(piece)
        assert want.startswith(shown)
        held = text[len(shown) : len(text) - len(rest)]
        assert found.stopped or any(stop.startswith(held) for stop in stops) or not held
    assert found.stopped == (want != text or any(text.endswith(stop) for stop in stops))
    assert shown + found.flush() == want
    assert not found.stopped or found.feed("再来") == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_stop_strings_that_are_none(stops):
    with pytest.raises(DsxError) as error:
        StopStrings(stops)
    assert error.value.code == "DSX-E512"
    assert repr(stops[-1]) in error.value.what


def test_one_several_or_no_stop_strings():
    assert (stop_list(None), stop_list("。"), stop_list(("a", "b"))) == ([], ["。"], ["a", "b"])
    with pytest.raises(DsxError) as error:
        stop_list(5)  # type: ignore[arg-type]
    assert error.value.code == "DSX-E512"


@pytest.fixture
def generator(tmp_path: Path) -> SpeculativeGenerator:
    """每个 token 一个字，草稿有对有错。"""
    made = build(tmp_path, TOY, make_drafts(TOY, 2), 3)
    made.tokenizer = BundleTokenizer(byte_tokenizer(), {}, None)
    return made


def test_both_ways_of_decoding_stop_at_the_same_token(generator: SpeculativeGenerator):
    """RUNTIME-12：一批里停的停、不停的接着写；凑齐停止串的那个 token 在 token_ids 里，文本里没有停止串。"""
    prompts = [[1, 2, 3], [4], [7, 7]]
    plain = generator.generate(prompts, 24)
    assert plain.text is not None
    stop = plain.text[0][5:8]
    stopped = generator.generate(prompts, 24, stop=[stop])
    assert stopped.text == [_whole(text, [stop]) for text in plain.text]
    assert stopped.finish_reasons[0] == "stop"
    end = plain.text[0].index(stop) + len(stop)
    assert stopped.token_ids[0] == plain.token_ids[0][:end]
    plain_decoding = one_by_one(generator).generate
    speculated = plain_decoding(prompts, 24, stop=[stop])
    assert (speculated.token_ids, speculated.text) == (stopped.token_ids, stopped.text)
    assert speculated.finish_reasons == stopped.finish_reasons


def test_a_stop_string_needs_text(generator: SpeculativeGenerator):
    generator.tokenizer = None
    with pytest.raises(DsxError) as error:
        generator.generate([[1]], 4, stop=["a"])
    assert error.value.code == "DSX-E514"


def test_a_length_that_was_cut_is_said(generator: SpeculativeGenerator):
    """要的放不下：说要多少、给了多少；自己停下的、放得下的不说。"""
    plain = one_by_one(generator).generate
    for generate in (generator.generate, plain):
        assert generate([[1]], LIMIT - 1).notes == ()
        (note,) = generate([[1, 2, 3]], 10**30).notes
        assert f"只放得下 {LIMIT - 3} 个" in note
        assert f"max_position_embeddings 是 {LIMIT}" in note
        (note,) = generate([[1], [1, 2, 3]], LIMIT - 1).notes
        assert "第 1 行" in note
