"""apply(model, "mtp") 的承诺（HF-11）：读回 transformers 丢掉的 MTP 权重，batch 任意，greedy 的输出不变。"""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import deepseek_export as dsx
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.integration.compat import cache_name
from deepseek_export.integration.model_export import saved_checkpoint
from deepseek_export.integration.mtp import new_draft_cache
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.profile import resolve_profile
from deepseek_export.reference import Forms, load_draft, load_reference

pytestmark = pytest.mark.contract

PROMPTS = ["And God said unto the", "床前明月光", "A", "举头望"]


@pytest.fixture(scope="module")
def model():
    """演示检查点：训练过，草稿真的会被接受；MTP 在第 4 层，不是写死的 61。"""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@pytest.fixture
def plain(model, batch):
    """没有 apply 时的 generate；用完还原。"""
    dsx.restore(model)

    def generate(**options):
        return model.generate(**{**batch, "max_new_tokens": 24, **options})

    yield generate
    dsx.restore(model)
    model.set_attn_implementation("sdpa")


def profile(name: str, drafts: int):
    return resolve_profile(name, [f"mtp.num_draft_tokens={drafts}"])


@pytest.mark.parametrize(("name", "drafts"), [("mtp", 1), ("mtp", 3), ("full", 2)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, id="processors"),
        pytest.param({"max_new_tokens": 2}, id="short"),
    ],
)
def test_the_same_tokens(model, batch, plain, name, drafts, options):
    """HF-11：左填充的 batch 4。"""
    want = plain(**options)
    dsx.apply(model, profile(name, drafts))
    got = model.generate(**{**batch, "max_new_tokens": 24, **options})
    assert torch.equal(got, want)
    stats = model.dsx_mtp.stats
    if "max_new_tokens" not in options:
        assert 0 < stats.accepted < stats.drafted
        assert stats.main_calls < 24


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_end_on_their_own(model, batch, plain, implementation):
    """HF-11：各行在不同的地方遇到 EOS，短的补 pad；两种 attention 实现。"""
    model.set_attn_implementation(implementation)
    free = plain()
    width = batch["input_ids"].shape[1]
    stops = [int(free[row, width + 3 + 4 * row]) for row in range(3)]
    want = plain(eos_token_id=stops)
    dsx.apply(model, profile("mtp", 2))
    assert torch.equal(model.generate(**batch, max_new_tokens=24, eos_token_id=stops), want)
    tails = [int((row[width:] != pad).sum()) for row, pad in zip(want, want[:, -1], strict=True)]
    assert len(set(tails)) > 1


def test_one_row_with_everything(model, batch, plain):
    """HF-11：batch 1 时 streamer、自定义的 processor 与停止条件照常。"""

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, input_ids[:, -1]] = float("-inf")
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 21)

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.ended = True

    one = {name: value[:1] for name, value in batch.items()}
    options = {**one, "logits_processor": [Ban()], "stopping_criteria": [Stop()]}
    want = plain(**options)
    dsx.apply(model, profile("mtp", 3))
    streamer = Collect()
    got = model.generate(**options, max_new_tokens=24, streamer=streamer, use_mtp=True)
    assert torch.equal(got, want)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended


def test_the_draft_equals_the_reference(model, batch):
    """HF-11：同一个检查点，草稿的 logits 与 dsx 的参考 MTP 模块相同。"""
    dsx.apply(model, "mtp")
    source = Checkpoint.open(CHECKPOINT)
    reference = load_draft(source, 0, load_reference(source, Forms("absorb", "sparse")))
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        valid = torch.ones_like(ids[:, 1:])
        out = model.dsx_mtp.hidden(model, ids[:, 1:], hidden, valid, new_draft_cache())
        rows = torch.arange(ids.shape[1] - 1)[None]
        cache = (torch.zeros(1, 1, ids.shape[1], source.config.latent_cache_values),)
        want, _, _ = reference(ids[:, 1:], hidden, torch.zeros(1, dtype=torch.long), rows, cache)
        got = model.lm_head(out)
    assert TOLERANCES["logits", "float32"].accepts(measure(got.numpy(), want.numpy()))
    dsx.restore(model)


def test_other_ways_to_generate_are_untouched(model, batch, plain):
    """HF-11：采样、beam search 等照旧；明说要 MTP 就拒绝，不悄悄退回。"""
    ways = [
        {"do_sample": True},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"stop_strings": ["the", "月"], "tokenizer": AutoTokenizer.from_pretrained(CHECKPOINT)},
        {"return_dict_in_generate": True},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(200))},
        {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]},
    ]
    plain_greedy, want = plain(), []
    for options in ways:
        torch.manual_seed(0)
        want.append(plain(**options))
    dsx.apply(model, "mtp")
    stats = model.dsx_mtp.stats
    for options, expected in zip(ways, want, strict=True):
        torch.manual_seed(0)
        got = model.generate(**batch, max_new_tokens=24, **options)
        got, expected = (out if isinstance(out, torch.Tensor) else out.sequences for out in (got, expected))
        assert torch.equal(got, expected)
        with pytest.raises(dsx.DsxError, match="DSX-E807"):
            model.generate(**batch, max_new_tokens=24, use_mtp=True, **options)
    with torch.no_grad():
        held = model(batch["input_ids"], use_cache=True)[cache_name()]
    with pytest.raises(dsx.DsxError, match="DSX-E807"):
        model.generate(**batch, max_new_tokens=1, use_mtp=True, **{cache_name(): held})
    assert torch.equal(model.generate(**batch, max_new_tokens=24, use_mtp=False), plain_greedy)
    assert model.dsx_mtp.stats is stats
    names = list(model.state_dict())
    dsx.restore(model)
    assert not {"generate", "dsx_mtp"} & set(vars(model))
    assert list(model.state_dict()) == names


def test_where_the_weights_come_from(model, saved, tmp_path):
    """HF-11：来源说不清、没有 MTP 权重、方案做不到的，都拒绝，模型原样不动。"""
    built, checkpoint = saved("v3-yarn")

    def refused(code: str, *arguments, **options) -> None:
        with pytest.raises(dsx.DsxError, match=code):
            dsx.apply(*arguments, **options)
        assert not {"generate", "dsx_mtp"} & set(vars(arguments[0]))

    refused("DSX-E806", built, "mtp")
    refused("DSX-E119", built, "full", checkpoint=checkpoint.path)
    refused("DSX-E806", built, "mtp", checkpoint=CHECKPOINT)
    refused("DSX-E806", model, "mtp", checkpoint=tmp_path)
    refused("DSX-E805", model, resolve_profile("mtp", ["mtp.verify=rejection"]))
    model.config._attn_implementation = "flex_attention"
    refused("DSX-E804", model, "mtp")
    model.set_attn_implementation("sdpa")


def test_the_model_moved_after_apply(batch):
    """HF-11：apply 之后又换了 dtype：MTP 模块不在 state_dict 里，不会跟着变。"""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    dsx.apply(model, "mtp")
    model.to(torch.bfloat16)
    with pytest.raises(dsx.DsxError, match="DSX-E804"):
        model.generate(**batch, max_new_tokens=2)
    dsx.apply(model, "mtp")
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_the_model_changed_after_apply(model, batch, plain):
    """HF-11、HF-15：MTP 会绕过的 hook、认不得的 attention 实现、裁不了的缓存：拒绝，或走普通解码。"""
    want = plain()
    dsx.apply(model, "mtp")
    hook = model.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(dsx.DsxError, match="DSX-E804"):
        model.generate(**batch, max_new_tokens=24)
    assert torch.equal(model.generate(**batch, max_new_tokens=24, use_mtp=False), want)
    hook.remove()
    model.forward = model.forward
    with pytest.raises(dsx.DsxError, match="DSX-E804"):
        model.generate(**batch, max_new_tokens=24)
    del model.forward
    width = batch["input_ids"].shape[1]
    static = {cache_name(): StaticCache(config=model.config, max_cache_len=width + 24)}
    with pytest.raises(dsx.DsxError, match="StaticCache"):
        model.generate(**batch, max_new_tokens=24, use_mtp=True, **static)
    assert torch.equal(model.generate(**batch, max_new_tokens=24, disable_compile=True, **static), want)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(dsx.DsxError, match="DSX-E804"):
        model.generate(**batch, max_new_tokens=24)


@pytest.mark.parametrize("shard", ["1GB", "4MB"], ids=["one-file", "sharded"])
def test_the_saved_checkpoint_keeps_mtp(model, tmp_path, monkeypatch, shard):
    """HF-10、HF-11：装着 MTP 的模型对象，导出用的临时检查点补上了 MTP 张量，逐字节相同；没装的没有。"""
    save = functools.partial(model.save_pretrained, max_shard_size=shard)
    monkeypatch.setattr(model, "save_pretrained", save)
    source = Checkpoint.open(CHECKPOINT)
    with saved_checkpoint(dsx.restore(model), tmp_path / "out", None) as directory:
        assert Checkpoint.open(directory).mtp_tensors == ()
    dsx.apply(model, "mtp")
    with saved_checkpoint(model, tmp_path / "out", None) as directory:
        saved = Checkpoint.open(directory)
        assert saved.mtp_tensors == source.mtp_tensors
        for name in source.mtp_tensors:
            assert saved.store.read(name).tobytes() == source.store.read(name).tobytes()
    dsx.restore(model)


@pytest.mark.heavy
@pytest.mark.slow
def test_export_keeps_mtp(model, tmp_path):
    """HF-10、HF-11：装着 MTP 的模型对象按 full 方案导出，图与权重同从目录导出的逐字节相同。"""
    dsx.apply(model, "mtp")
    bundle = dsx.export(model, tmp_path / "out", "full")
    dsx.restore(model)
    want = dsx.export(CHECKPOINT, tmp_path / "want", "full")
    for name in ("mtp.onnx", "weights/model.safetensors"):
        assert (bundle.path / name).read_bytes() == (want.path / name).read_bytes()
