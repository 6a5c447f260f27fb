"""specs/runtime 的 RUNTIME-15：加载好的模型从 Python 里怎么用。"""

from __future__ import annotations

import gc
import pydoc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import deepseek_export as dsx
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.errors import DsxError

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPT = "《论语》\n"


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """带草稿模型。"""
    return dsx.export(CHECKPOINT, tmp_path_factory.mktemp("model") / "drafted", "full").path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """没有草稿模型。"""
    return dsx.export(CHECKPOINT, tmp_path_factory.mktemp("model") / "plain", "mla+moe").path


@pytest.fixture
def model(plain: Path) -> Iterator[dsx.CompiledModel]:
    with dsx.load(plain, threads=1) as one:
        yield one


def refused(code: str, call, *args, **options) -> DsxError:
    with pytest.raises(DsxError) as caught:
        call(*args, **options)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("name", ["plain", "drafted"])
def test_a_stream_adds_up_to_generate(name: str, request: pytest.FixtureRequest):
    """RUNTIME-15：各段接起来就是 generate 的文本，停止串不露出来；投机的也是。"""
    with dsx.load(request.getfixturevalue(name), threads=1, speculative_floor=False) as model:
        whole = model.generate(PROMPT, 40)
        assert whole.text is not None
        for stop in (None, whole.text[0][5:8], ["没有的", "。"]):
            want = model.generate(PROMPT, 40, stop=stop, logprobs=1)
            stream = model.stream(PROMPT, 40, stop=stop, logprobs=1)
            assert stream.result is None
            pieces = list(stream)
            assert len(pieces) > 1
            assert ["".join(pieces)] == want.text
            assert stream.result is not None
            assert stream.result.token_ids == want.token_ids
            assert stream.result.finish_reasons == want.finish_reasons
            assert stream.result.logprobs is not None
            assert next(stream, None) is None
        assert "".join(model.stream(model.encode(PROMPT), 40)) == whole.text[0]


def test_a_stream_can_be_left(model: dsx.CompiledModel, monkeypatch: pytest.MonkeyPatch):
    """RUNTIME-15：不再取就不再算，关了就放掉缓存；参数当场核对，一步也没有算。"""
    calls: list[int] = []
    run = model.session.run
    caches: list[weakref.ref] = []

    def counted(*args):
        calls.append(1)
        caches.append(weakref.ref(args[-1]))
        return run(*args)

    monkeypatch.setattr(model.session, "run", counted)
    refused("DSX-E512", model.stream, PROMPT, 0)
    refused("DSX-E504", model.stream, PROMPT, top_p=2)
    refused("DSX-E702", model.stream, [PROMPT])
    refused("DSX-E512", model.stream, PROMPT, stop=[""])
    refused("DSX-E517", model.stream, PROMPT, speculative=True)
    stream = model.stream(PROMPT, 1000, ignore_eos=True)
    assert not calls
    with stream:
        next(stream)
        taken = len(calls)
        assert 1 <= taken < 8
    assert list(stream) == []
    assert len(calls) == taken
    gc.collect()
    assert all(one() is None for one in caches)
    for piece in model.stream(PROMPT, 1000, ignore_eos=True):
        assert piece
        break
    assert model.generate(PROMPT, 4).new_tokens == 4


def test_n_answers_are_rows_with_seeds_of_their_own(model: dsx.CompiledModel):
    """RUNTIME-15：第 i 条的回答挨在一起；``seed + 行号``。"""
    prompts = [PROMPT, "春眠"]
    got = model.generate(prompts, 6, n=3, temperature=1.0, seed=5)
    assert len(got.token_ids) == 6
    assert got.prompt_lens[:3] == [got.prompt_lens[0]] * 3
    for row in range(6):
        alone = model.generate(prompts[row // 3], 6, temperature=1.0, seed=5 + row)
        assert alone.token_ids[0] == got.token_ids[row]
    for wrong in (0, 1.5, True):
        refused("DSX-E512", model.generate, PROMPT, n=wrong)


def test_chat_keeps_its_cache(model: dsx.CompiledModel):
    """RUNTIME-15：答案与生成器单独续写同一段对话的相同；第二问只重算新的；对话开着时照样能 generate。"""
    with model.chat(system="你是先生", max_new_tokens=12, temperature=0.8, seed=3) as chat:
        first = chat.say("《论语》")
        other = model.generate(PROMPT, 8).text
        second = "".join(parts.content for parts in chat.ask("何也"))
        assert [message["role"] for message in chat.messages] == [
            "system",
            *("user", "assistant"),
            *("user", "assistant"),
        ]
        assert "5 句" in repr(chat)
        assert chat.stats[1].cached_tokens >= chat.stats[0].prompt_tokens
        said = chat.messages
    assert model.generate(PROMPT, 8).text == other
    assert model.tokenizer is not None
    for length, answer in ((2, first), (4, second)):
        text = model.tokenizer.apply_chat_template(said[:length])
        want = model.generate([model.encode(text)], 12, temperature=0.8, seed=3).text
        assert want == [answer]
    refused("DSX-E531", chat.say, "还在吗")
    refused("DSX-E512", model.chat, max_new_tokens=0)
    refused("DSX-E504", model.chat, min_p=2)
    refused("DSX-E512", model.chat, stop=[""])


def test_logits_and_hidden(plain: Path, drafted: Path):
    """RUNTIME-15：hidden 乘上输出层就是 logits；没有 hidden 的图按码拒绝，说怎么得到。"""
    from deepseek_export.checkpoint import Checkpoint

    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with dsx.load(drafted, threads=1) as model:
        hidden, logits = model.hidden(ids), model.logits(ids)
        assert (hidden.dtype, logits.dtype) == (np.float32, np.float32)
        assert hidden.shape == (8, model.manifest.model.hidden_size)
        assert logits.shape == (8, model.manifest.model.vocab_size)
        store = Checkpoint.open(CHECKPOINT).store
        names = ("lm_head.weight", "model.embed_tokens.weight")
        head = np.asarray(store.read(next(name for name in names if name in store)), np.float32)
        assert hidden @ head.T == pytest.approx(logits, abs=1e-3)
        text = model.logits(PROMPT)
        assert text == pytest.approx(model.logits(model.encode(PROMPT)), abs=1e-5)
        assert int(text[-1].argmax()) == model.generate(PROMPT, 1).token_ids[0][0]
    with dsx.load(plain, threads=1) as model:
        error = refused("DSX-E519", model.hidden, ids)
        assert "mtp.enabled=true" in error.todo
        refused("DSX-E510", model.logits, [])
        refused("DSX-E702", model.logits, [[1, 2]])
        refused("DSX-E509", model.logits, [1, 10**6])


def test_closing_lets_everything_go(plain: Path, drafted: Path):
    """RUNTIME-15：关了放掉权重，停下引擎，之后再用按码拒绝；关几次都行，分词照旧。"""
    for path in (plain, drafted):
        model = dsx.load(path, threads=1)
        runner = weakref.ref(model.session.runner)
        assert str(path) in repr(model)
        chat, stream = model.chat(), model.stream(PROMPT, 8)
        request = model.engine().submit(model.encode(PROMPT), max_new_tokens=1000, ignore_eos=True)
        model.close()
        model.close()
        assert request.outcome == "cancelled"
        assert not [thread for thread in threading.enumerate() if thread.name == "dsx-engine"]
        refused("DSX-E522", next, stream)
        refused("DSX-E531", chat.say, "x")
        for call in (model.generate, model.logits, model.stream(PROMPT).__next__, model.chat):
            refused("DSX-E522", call, *([PROMPT] if call in (model.generate, model.logits) else []))
        assert model.encode(PROMPT)
        del chat, stream, request
        gc.collect()
        assert runner() is None


def test_threads_take_turns(model: dsx.CompiledModel):
    """RUNTIME-15：几个线程一起用，各得各的。"""
    prompts = [PROMPT, "春眠", "And it came", "明月"]
    want = [model.generate(prompt, 12).text for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: model.generate(prompt, 12).text, prompts)) == want


def test_everything_is_visible():
    """RUNTIME-15：``dir`` 列出全部名字，``help`` 看得到它们；类型信息随包。"""
    assert set(dsx.__all__) <= set(dir(dsx))
    assert all(getattr(dsx, name).__doc__ for name in dsx.__all__)
    text = pydoc.render_doc(dsx, renderer=pydoc.plaintext)
    for name in ("class CompiledModel", "stream(self", "bench(bundle", "inspect(bundle", "load(bundle"):
        assert name in text
    assert (Path(dsx.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nothing"):
        _ = dsx.nothing


def test_inspect_and_bench_are_functions(plain: Path, capsys: pytest.CaptureFixture[str]):
    """RUNTIME-15：命令只是它们的薄壳；取值不对按码拒绝。"""
    import json

    from deepseek_export.cli.main import main

    with pytest.raises(SystemExit):
        main(["inspect", str(plain), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dsx.inspect(plain)))
    report = dsx.bench(plain, prompt_len=4, new_tokens=3, depths=[16], runs=1, threads=1)
    assert report.scenario.depths == (16,)
    for options in ({"batch": 0}, {"runs": 1.5}, {"new_tokens": 1}, {"depths": [0]}):
        assert next(iter(options)) in refused("DSX-E512", dsx.bench, plain, **options).what
