"""apply 过的模型照样编译、导出、深拷贝、pickle（HF-16、HF-17）。"""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import deepseek_export as dsx
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.integration.compat import cache_name
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tests.models import build_model

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

IDS = torch.randint(1, 200, (2, 7), generator=torch.Generator().manual_seed(3))
ABSORB = dsx.OptimizationProfile.model_validate(
    {"mla": {"enabled": True, "form": "absorb"}, "moe": {"enabled": True}}
)


@pytest.fixture(scope="module", params=["v3", "v2-lite"])
def pair(request):
    """没有 apply 的与 apply 过 mla（absorb）、moe 的。"""
    plain, model = (build_model(request.param, num_hidden_layers=2) for _ in range(2))
    for each in (plain, model):
        each.set_attn_implementation("sdpa")
    return plain, dsx.apply(model, ABSORB)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return TOLERANCES["logits", "float32"].accepts(measure(got.detach().numpy(), want.detach().numpy()))


@pytest.fixture
def demo():
    """演示检查点，装着 full；每次新的一个。"""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    batch = tokenizer(["And God said", "床前明月光"], return_tensors="pt", padding=True)
    options = {**batch, "max_new_tokens": 12}
    want = model.generate(**options)
    return dsx.apply(model, "full"), options, want


def test_compiles_without_a_break(pair):
    """HF-16：``torch.compile(fullgraph=True)``：prompt，以及在静态缓存上解码。"""
    plain, model = pair
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert close(compiled(IDS, use_cache=False).logits, plain(IDS).logits)
        caches = [StaticCache(config=plain.config, max_cache_len=16) for _ in range(2)]
        for each, cache in zip(pair, caches, strict=True):
            each(IDS, **{cache_name(): cache})
        for column in range(2):
            new = IDS[:, column : column + 1]
            got, want = (
                each(new, **{cache_name(): cache}).logits
                for each, cache in zip((compiled, plain), reversed(caches), strict=True)
            )
            assert close(got, want)


def test_gradients_through_the_compiled_experts():
    """HF-6、HF-16：编译时换了专家的实现，梯度不变。"""
    plain, model = (build_model("v3", num_hidden_layers=2) for _ in range(2))
    dsx.apply(model, "moe")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each, owner in ((compiled, model), (plain, plain)):
        owner.zero_grad()
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        if got.grad is not None:
            assert TOLERANCES["op", "float32"].accepts(measure(got.grad.numpy(), want.grad.numpy())), name


@pytest.mark.parametrize("strict", [False, True])
def test_exports(pair, strict):
    """HF-16：``torch.export`` 的两种模式；路由与追踪时不同的输入也对。"""
    plain, model = pair
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=strict)
        other = IDS.flip(1)
        assert close(program.module()(input_ids=other, use_cache=False).logits, plain(other).logits)


def test_a_deep_copy_stands_on_its_own(demo):
    """HF-17：深拷贝用自己的模块生成：原来的被改掉、被还原，它都不变。"""
    model, options, want = demo
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert twin.dsx_mtp is not model.dsx_mtp
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.dsx_mtp.module.parameters()]:
            parameter.zero_()
    dsx.restore(model)
    assert torch.equal(twin.generate(**options, use_mtp=True), want)
    assert twin.dsx_mtp.stats.accepted > 0
    assert torch.equal(dsx.restore(twin).generate(**options), want)


def test_a_pickled_model_comes_back_whole(demo):
    """HF-17：``torch.save`` 整个模型再读回来，优化还在。"""
    model, options, want = demo
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin.generate(**options, use_mtp=True), want)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_a_copy_saves_and_exports_like_the_original(demo, tmp_path):
    """HF-2、HF-17：拷贝的 ``save_pretrained`` 与原来的逐字节相同。"""
    model, _, _ = demo
    files = []
    for name, source in (("model", model), ("twin", copy.deepcopy(model))):
        source.save_pretrained(tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
