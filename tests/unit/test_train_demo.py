"""tools/train_demo.py：训练模型对照 transformers 与逐步写出的 MTP，训练可复现、可续，仓库里的演示检查点可用。"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.reference import Forms, load_reference

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deepseek_export" / "demo_checkpoint"
MEGABYTES = 12_000_000
PEAK = 1e-4  # float32 下 logits 的最大绝对误差；实测约 5e-6


@pytest.fixture(scope="module")
def exported(tool, tiny_config, tmp_path_factory):
    """随机权重的小模型，偏置非零，写成检查点再读回。"""
    from tokenizers import Tokenizer, models

    model = tool["model"].DemoModel(tiny_config, seed=3)
    with torch.no_grad():
        for gate in model.gates:
            gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    out = tmp_path_factory.mktemp("tiny")
    tool["export"].write_checkpoint(out, model, Tokenizer(models.BPE()))
    return out, tool["export"].load_model(out)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(4, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


@torch.no_grad()
def test_trunk_equals_transformers_and_the_reference(exported, ids):
    path, model = exported
    hidden = model.trunk(ids)
    logits = model.lm_head(hidden)
    hf = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert distance(hf(ids).logits, logits) < PEAK
    checkpoint = Checkpoint.open(path)
    reference = load_reference(checkpoint, Forms("absorb", "sparse"))
    positions = torch.arange(40).expand(2, -1)
    got, after_norm, _ = reference(
        ids, torch.zeros(2, dtype=torch.long), positions, reference.empty_caches(2, 40)
    )
    assert distance(got, logits) < PEAK
    assert distance(after_norm, hidden) < PEAK
    assert logits.std() > 0.1


@torch.no_grad()
def test_first_draft_equals_transformers_mtp(exported, ids, monkeypatch):
    path, model = exported
    monkeypatch.setattr(
        DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"]
    )
    hf = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    mtp, one = MtpModel.from_pretrained(hf), ids[:1]
    hidden = hf(one, output_hidden_states=True).hidden_states[-1][:, :-1]
    cache = MtpCache(config=hf.config.get_mtp_config())
    wanted = mtp.forward_layer(0, hidden, torch.arange(1, 40)[None], cache, input_ids=one[:, 1:])
    got = next(model.drafts(one, model.trunk(one[:, :-1]), 1))
    assert distance(got, wanted) < PEAK


@torch.no_grad()
def test_recursive_drafts_equal_a_sequential_mtp_with_one_cache(exported, ids):
    """直接写法：一份 K/V 缓存，主干隐状态的各行在前，之后每个草稿把自己的一行接在后面。"""
    _, model = exported
    one, depth, at = ids[:1], 3, 20
    hidden = model.trunk(one[:, :30])
    fast = [draft[:, at] for draft in model.drafts(one, hidden, depth)]
    layer, embed = model.model.layers[-1], model.model.embed_tokens
    x = layer.eh_proj(
        torch.cat([layer.enorm(embed(one[:, 1 : at + 2])), layer.hnorm(hidden[:, : at + 1])], dim=-1)
    )
    rows = layer.input_layernorm(x)
    positions = list(range(1, at + 2))
    for step in range(depth):
        out = _attend_last(model, layer.self_attn, rows, positions)
        y = x[:, -1:] + out
        y = y + layer.mlp(layer.post_attention_layernorm(y))
        draft = layer.shared_head.norm(y)
        assert distance(draft[:, 0], fast[step]) < PEAK
        token = embed(one[:, at + 2 + step, None])
        x = layer.eh_proj(torch.cat([layer.enorm(token), layer.hnorm(draft)], dim=-1))
        rows = torch.cat([rows, layer.input_layernorm(x)], dim=1)
        positions.append(positions[-1] + 1)


def _attend_last(model, attention, rows, positions):
    """最后一行对全部行的注意力，逐头循环；缓存里的行就是 ``rows``。"""
    angles = torch.tensor(positions).float()[:, None] * model.frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(value: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * phase).flatten(-2)

    c, nope, rank = model.config, attention.nope, attention.rank
    q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(rows[:, -1])))
    latent, k_rope = attention.kv_a_proj_with_mqa(rows).split([rank, attention.rope], dim=-1)
    kv = attention.kv_b_proj(attention.kv_a_layernorm(latent))
    k_rope, outputs = rotated(k_rope, turn), []
    for q_head, kv_head in zip(
        q.chunk(c["num_attention_heads"], -1), kv.chunk(c["num_attention_heads"], -1), strict=True
    ):
        scores = (kv_head[..., :nope] * q_head[:, None, :nope]).sum(-1)
        scores = scores + (k_rope * rotated(q_head[:, nope:], turn[-1])[:, None]).sum(-1)
        weights = (scores / (nope + attention.rope) ** 0.5).softmax(-1)
        outputs.append((weights[..., None] * kv_head[..., nope:]).sum(1))
    return attention.o_proj(torch.cat(outputs, dim=-1))[:, None]


@pytest.mark.heavy
@torch.no_grad()
def test_acceptance_equals_a_step_by_step_speculative_decode(tool):
    """接受率的一次前向算法与真的逐次草拟、验证结果相同，解码结果就是贪心序列；用演示检查点，随机模型没有草稿会中。"""
    model, depth = tool["export"].load_model(DEMO), 3
    documents = [([5, 300, 301], list(range(310, 330)))]
    prompt = tool["evaluate"].prompts_of(documents, 1, 8)[0]
    sequence = tool["evaluate"].greedy(model, [prompt], 24)[0]
    got = tool["evaluate"].acceptance(model, sequence, len(prompt))
    ids, calls, accepted = list(prompt), 0, [0] * depth
    while len(ids) < len(sequence):
        hidden = model.trunk(torch.tensor([ids]))
        ids.append(int(model.lm_head(hidden[:, -1]).argmax()))
        calls, drafted = calls + 1, []
        for step in range(depth):
            padded = torch.tensor([ids + drafted + [1] * depth])
            last = list(model.drafts(padded, hidden, step + 1))[-1]
            drafted.append(int(model.lm_head(last[:, -1]).argmax()))
        for step, token in enumerate(drafted):
            if len(ids) >= len(sequence) or token != sequence[len(ids)]:
                break
            ids.append(token)
            accepted[step] += 1
    assert ids == sequence
    assert sum(accepted) > 0
    assert (got.calls, list(got.accepted), got.tokens) == (calls, accepted, len(sequence) - len(prompt))


def make_trainer(tool, config, **changes):
    documents = [([4 + i, 9, 5 + i % 7], [(7 * i + j) % 90 + 4 for j in range(30)]) for i in range(12)]
    streams = {name: tool["data"].Stream(documents, seed) for seed, name in enumerate(("zh", "en"))}
    recipe = tool["loop"].Recipe(
        **({"steps": 4, "warmup": 1, "batch_zh": 1, "batch_en": 2, "length": 24} | changes)
    )
    return tool["loop"].Trainer(tool["model"].DemoModel(config, seed=1), streams, recipe)


def assert_same(left, right):
    for (name, a), b in zip(left.model.state_dict().items(), right.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_is_deterministic_and_resumes_bit_for_bit(tool, tiny_config, tmp_path):
    first, second, resumed = (make_trainer(tool, tiny_config) for _ in range(3))
    curve = [first.train_step() for _ in range(4)]
    assert curve == [second.train_step() for _ in range(2)] + curve[2:]
    second.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    resumed.run(4, lambda values: None)
    assert_same(first, resumed)
    assert all(gate.e_score_correction_bias.abs().sum() > 0 for gate in first.model.gates)


def test_resume_refuses_another_recipe_but_records_another_schedule(tool, tiny_config, tmp_path):
    trainer = make_trainer(tool, tiny_config)
    trainer.train_step()
    trainer.save(tmp_path / "state.pt")
    longer = make_trainer(tool, tiny_config, steps=9)
    longer.load(tmp_path / "state.pt")
    assert longer.schedule == [(0, 4), (1, 9)]
    with pytest.raises(ValueError, match="peak_lr"):
        make_trainer(tool, tiny_config, peak_lr=1e-4).load(tmp_path / "state.pt")


@pytest.mark.heavy
def test_comparison_flags(tool, tiny_config):
    """--no-bias-update 的偏置恒为零；--dense 没有 router，激活参数与 MoE 只差 router。"""
    still = make_trainer(tool, tiny_config, bias_update=False)
    still.train_step()
    assert all(gate.e_score_correction_bias.abs().sum() == 0 for gate in still.model.gates)
    assert all(load.sum() > 0 for load in still.loads)
    export, card = tool["export"], importlib.import_module("tools.demo_training.card")
    sparse, dense = (tool["model"].DemoModel(export.demo_config(dense=flag)) for flag in (False, True))
    active = [card.parameter_counts(model)["active"] for model in (sparse, dense)]
    routers = 3 * 8 * 256
    assert active[0] - active[1] == routers
    assert not dense.gates


def test_trunk_alone_is_the_trunk_of_the_same_model(tool, tiny_config):
    """没有 MTP 的配置：主干、损失与带 MTP 的同一个模型逐位相同，照样训练。"""
    full = tool["model"].DemoModel(tiny_config, seed=1)
    trainer = make_trainer(tool, {**tiny_config, "num_nextn_predict_layers": 0}, mtp_weights=())
    alone = trainer.model
    alone.load_state_dict({name: full.state_dict()[name] for name in alone.state_dict()})
    windows = torch.randint(4, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    assert tool["evaluate"].held_losses(alone, windows) == tool["evaluate"].held_losses(full, windows)[:1]
    assert len(trainer.train_step()) == 1
    assert len(alone.gates) == len(full.gates) - 1


def test_quality_comparison_has_equal_active_parameters_and_enough_tokens(tool):
    """MOE-6：两种模型每 token 激活的参数一个不差，router 也算；每个激活参数至少训练 20 个 token。"""
    from perf.suites import moe_quality

    card = importlib.import_module("tools.demo_training.card")
    sparse, dense = (tool["model"].DemoModel(moe_quality.model_config(flag)) for flag in (False, True))
    active = card.parameter_counts(sparse)["active"]
    assert active == card.parameter_counts(dense)["active"]
    full = moe_quality.FULL
    assert full.steps * (full.batch_zh + full.batch_en) * full.length >= 20 * active


def test_committed_demo_checkpoint():
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.config.num_mtp_layers == 1
    assert checkpoint.mtp_tensors
    names = {file.name for file in DEMO.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "heldout_prompts.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= MEGABYTES
