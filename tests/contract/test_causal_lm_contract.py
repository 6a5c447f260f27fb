"""DsxForCausalLM（HF-9）与从模型对象导出（HF-10）的承诺，都与源模型对照。"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import deepseek_export as dsx
from deepseek_export.backend.tensorrt import cuda
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.integration.bundle_cache import BundleCache
from deepseek_export.integration.compat import cache_name
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

IDS = torch.randint(1, 200, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
MASK[1, :2] = 0
REAL = MASK.bool()


@pytest.fixture(scope="module")
def model(v3_bundle):
    return dsx.DsxForCausalLM.from_pretrained(v3_bundle.path, threads=1)


@pytest.fixture(scope="module")
def source(saved):
    return saved("v3-yarn")[0]


def generate(model, seed: int = 0, **options):
    torch.manual_seed(seed)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "pad_token_id": 0, **options}
    return model.generate(**options)


def refused(call, *words: str) -> None:
    with pytest.raises(dsx.DsxError, match="DSX-E808") as caught:
        call()
    assert all(word in caught.value.what for word in words)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, id="beam"),
        pytest.param({"do_sample": True, "top_p": 0.9, "num_return_sequences": 2}, id="sampling"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, id="processors"),
        pytest.param({"eos_token_id": [7, 20, 33], "max_new_tokens": 20}, id="eos"),
        pytest.param({"prefill_chunk_size": 4}, id="chunked-prefill"),
    ],
)
def test_the_same_tokens(model, source, options):
    """HF-9：左填充的 batch，transformers 的各种 generate 选项。"""
    assert torch.equal(generate(model, **options), generate(source, **options))


def test_assisted_decoding(model, source):
    """HF-9：草稿模型与 prompt lookup；拒绝的草稿要从缓存里退掉。"""
    one = {"input_ids": IDS[2:], "attention_mask": MASK[2:], "max_new_tokens": 12}
    want = generate(source, **one)
    assert torch.equal(generate(model, **one, prompt_lookup_num_tokens=3), want)
    assert torch.equal(generate(model, **one, assistant_model=source), want)


def test_streamers_and_stopping_criteria(model, source):
    """HF-9"""

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 3)

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    one = {"input_ids": IDS[2:], "attention_mask": MASK[2:], "stopping_criteria": [Stop()]}
    got = generate(model, **one, streamer=streamer)
    assert torch.equal(got, generate(source, **one))
    assert got.shape[1] == IDS.shape[1] + 3
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended


def test_stop_strings(tmp_path):
    """HF-9：``stop_strings`` 与 ``tokenizer``，同源模型停在同一处。"""
    source = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    dsx.export(CHECKPOINT, tmp_path / "out", "mla+moe")
    model = dsx.DsxForCausalLM.from_pretrained(tmp_path / "out", threads=1)
    one = tokenizer(["And God said"], return_tensors="pt") | {"max_new_tokens": 24}
    free = source.generate(**one)
    stop = tokenizer.decode(free[0, -12:-10])
    options = {**one, "stop_strings": [stop], "tokenizer": tokenizer}
    want = source.generate(**options)
    assert want.shape[1] < free.shape[1]
    assert torch.equal(model.generate(**options), want)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_loss_from_labels(model, source, padding):
    """HF-9：``labels`` 给出 transformers 自己的 loss。"""
    mask = {"none": torch.ones_like(MASK), "right": MASK.flip(1), "left": MASK}[padding]
    labels = IDS.masked_fill(mask == 0, -100)
    if padding == "left":
        # 每行第一个真正的 token 由填充列预测，两边都没有意义。
        labels = labels.masked_fill(mask.cumsum(1) == 1, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = source(IDS, attention_mask=mask, position_ids=positions, labels=labels).loss
    got = model(IDS, attention_mask=mask, labels=labels).loss
    assert TOLERANCES["logits", "float32"].accepts(measure(got.numpy()[None], want.numpy()[None]))
    assert model(IDS, attention_mask=mask).loss is None


def test_logits_at_every_position(model, source, monkeypatch):
    """HF-9：真正的 token 处的 logits 相同，与怎么分块、填充在哪边、续用缓存无关。"""
    with torch.no_grad():
        want = source(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits

    def check(got: torch.Tensor, rows=REAL) -> None:
        assert TOLERANCES["logits", "float32"].accepts(measure(got[rows].numpy(), want[REAL].numpy()))

    check(model(IDS, attention_mask=MASK).logits)
    monkeypatch.setattr(model.session.runner, "limits", replace(model.session.limits, prefill_chunk=2))
    check(model(IDS, attention_mask=MASK).logits)
    assert torch.equal(
        model(IDS, MASK, logits_to_keep=2).logits,
        model(IDS, MASK, logits_to_keep=torch.tensor([7, 8])).logits,
    )
    first = model(IDS[:, :5], attention_mask=MASK[:, :5])
    held = first[cache_name()]
    second = model(IDS[:, 5:], attention_mask=MASK, **{cache_name(): held})
    check(torch.cat([first.logits, second.logits], 1))
    assert held.lens.tolist() == MASK.sum(1).tolist()
    flipped = model(IDS.flip(1), attention_mask=MASK.flip(1)).logits
    assert flipped.shape == want.shape


def test_cache_rows(model):
    """HF-9：换行、重复、挑选、回退、清空。"""
    held = model(IDS, attention_mask=MASK)[cache_name()]
    name = held.buffers.spec.tensors[0].name
    rows = held.buffers.array(name)[:, :, :9].copy()
    held.reorder_cache(torch.tensor([2, 2, 0]))
    assert (held.buffers.array(name)[1, :, :9] == rows[2]).all()
    assert held.lens.tolist() == [9, 9, 5]
    held.batch_repeat_interleave(2)
    held.batch_select_indices(torch.tensor([4, 0]))
    assert (held.buffers.array(name)[0, :, :5] == rows[0, :, :5]).all()
    assert held.lens.tolist() == [5, 9]
    held.crop(-3)
    assert (held.get_seq_length(), held.lens.tolist()) == (6, [2, 6])
    assert held.get_max_length() == model.config.max_position_embeddings
    held.reset()
    assert held.get_seq_length() == 0
    held.reorder_cache(torch.tensor([0]))
    assert BundleCache(model.session).buffers is None


def test_what_it_refuses(model, source):
    """HF-9：不支持的输入有码，不猜。"""
    refused(lambda: model(inputs_embeds=torch.zeros(1, 2, 3)), "inputs_embeds")
    refused(lambda: model(IDS, attention_mask=MASK[:, :4]), "[3, 4]")
    refused(lambda: model(IDS, position_ids=torch.arange(9)[None] + 1), "position_ids")
    refused(lambda: generate(model, cache_implementation="static"), "static")
    refused(lambda: model(IDS, output_hidden_states=True), "output_hidden_states")
    refused(lambda: generate(model, output_hidden_states=True), "output_hidden_states")
    refused(lambda: model(IDS, output_attentions=True), "output_attentions")
    refused(lambda: model(IDS, token_type_ids=IDS), "token_type_ids")
    refused(lambda: model(IDS, labels=IDS[:, 1:]), "labels", "[3, 8]")
    refused(lambda: model(IDS, labels=IDS, logits_to_keep=2), "logits_to_keep")
    refused(lambda: model(IDS, attention_mask=MASK, labels=IDS), "第 0 行第 1 列")
    assert model(IDS, output_hidden_states=False, output_attentions=None).logits.shape[:2] == IDS.shape
    model.config.output_hidden_states = True
    refused(lambda: model(IDS), "output_hidden_states")
    model.config.output_hidden_states = False
    with torch.no_grad():
        foreign = source(IDS, use_cache=True)[cache_name()]
    refused(lambda: model(IDS, **{cache_name(): foreign}), "DynamicCache")
    held = model(IDS, attention_mask=MASK)[cache_name()]
    more = torch.cat([torch.ones_like(MASK), MASK[:, :1]], 1)
    refused(lambda: model(IDS[:, :1], attention_mask=more, **{cache_name(): held}), "attention_mask")
    with pytest.raises(dsx.DsxError, match="DSX-E809"):
        model.save_pretrained("anywhere")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert cache_name() not in model(IDS, use_cache=False)


def test_export_from_a_model_object(model, source, v3_bundle, tmp_path):
    """HF-10：apply 过的模型对象，导出的图与权重同从目录导出的逐字节相同；不留临时目录。"""
    applied = dsx.apply(source, "mla+moe")
    try:
        bundle = dsx.export(applied, tmp_path / "out", "mla+moe", check=True)
    finally:
        dsx.restore(source)
    for name in ("model.onnx", "weights/model.safetensors"):
        assert (bundle.path / name).read_bytes() == (v3_bundle.path / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    source.save_pretrained(tmp_path / "ckpt")
    assert dsx.verify(bundle.path, tmp_path / "ckpt", levels=["op"]).passed


def test_export_from_a_model_object_refuses(source, v3_bundle, v3_checkpoint, tmp_path):
    """HF-10：便宜的检查在写权重之前。"""

    def code(*arguments, **options) -> str:
        with pytest.raises(dsx.DsxError) as caught:
            dsx.export(*arguments, **options)
        return caught.value.code

    out = tmp_path / "out"
    assert code(source, v3_bundle.path) == "DSX-E401"
    assert code(source, out, "mla", weights="reference") == "DSX-E810"
    assert code(source, out, "mla", target="nowhere") == "DSX-E301"
    assert code(torch.nn.Linear(1, 1), out) == "DSX-E803"
    assert code(v3_checkpoint, out, tokenizer=object()) == "DSX-E810"
    assert code(copy.deepcopy(source).to("meta"), out) == "DSX-E810"
    assert list(tmp_path.iterdir()) == []


def test_a_tensorrt_session_needs_a_gpu(v3_bundle, monkeypatch):
    """HF-9：backend="trt" 与 dsx.load 走同一处；没有 GPU 就按码拒绝，不悄悄换成 CPU。"""
    monkeypatch.setattr(cuda, "device_sm", lambda: None)
    with pytest.raises(dsx.DsxError, match="DSX-E918"):
        dsx.DsxForCausalLM.from_pretrained(v3_bundle.path, backend="trt")


def test_int8_weights_and_cache(saved, tmp_path):
    """HF-9、MLA-7：int8 权重、int8 缓存的 bundle 也是同一个接口；token 与 dsx 自己的循环相同，补齐与否都一样。"""
    bundle = dsx.export(
        saved("v3-yarn")[1].path,
        tmp_path / "out",
        "mla+moe",
        target="ort-cpu",
        overrides=("mla.cache_dtype=int8",),
        quantization=dsx.Quantization(kind="int8"),
    )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(IDS, MASK, strict=True)]
    want = dsx.load(bundle.path, threads=1).generate(rows, 6, ignore_eos=True).token_ids
    model = dsx.DsxForCausalLM.from_pretrained(bundle.path, threads=1)
    got = generate(model, eos_token_id=None)[:, IDS.shape[1] :]
    assert got.tolist() == [list(row) for row in want]
