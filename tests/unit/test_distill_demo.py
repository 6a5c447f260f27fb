"""tools/distill_demo_mtp.py：只动 MTP 层、可复现、可续；目标与续写都是主干自己的，提示只来自给它的篇目。"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.unit

DEMO = Path(__file__).parents[2] / "deepseek_export" / "demo_checkpoint"
PEAK = 1e-4  # float32 下的最大绝对误差；实测约 1e-6


def distance(left, right) -> float:
    return (left - right).abs().max().item()


def assert_same(left, right):
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def exported(tool, tiny_config, tmp_path_factory):
    """随机权重的小模型写成的检查点。"""
    from tokenizers import Tokenizer, models

    out = tmp_path_factory.mktemp("tiny")
    tool["export"].write_checkpoint(
        out, tool["model"].DemoModel(tiny_config, seed=3), Tokenizer(models.BPE())
    )
    return out


@pytest.fixture(scope="module")
def distill(tool):
    return tool["distill"]


def make_distiller(tool, distill, config, **changes):
    model = tool["model"].DemoModel(config, seed=1)
    ids = torch.randint(4, 96, (6, 20), generator=torch.Generator().manual_seed(2))
    recipe = distill.DistillRecipe(**({"steps": 4, "warmup": 1, "rows": 2, "length": 20} | changes))
    hidden = torch.cat(list(distill.hidden_states(model.eval(), ids)))
    return distill.Distiller(model, ids, hidden, recipe)


@pytest.mark.heavy
def test_distillation_moves_only_the_mtp_layer_and_resumes_bit_for_bit(tool, distill, tiny_config, tmp_path):
    first, second, resumed = (make_distiller(tool, distill, tiny_config) for _ in range(3))
    origin = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    curve = [first.train_step() for _ in range(4)]
    assert curve == [second.train_step() for _ in range(2)] + curve[2:]
    second.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    resumed.run(4, lambda values: None)
    assert_same(first.model, resumed.model)
    prefix = tool["export"].mtp_prefix(tiny_config)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, origin[name]) != name.startswith(prefix), name


@torch.no_grad()
def test_distillation_targets_are_the_main_models_own_choices(tool, distill, tiny_config):
    """逐个位置直接写：第 s 次应用在 i 处的目标是主干读完 ids[: i + s + 1] 之后的分布；replay 数的也是它。"""
    model = tool["model"].DemoModel(tiny_config, seed=1).eval()
    ids = torch.randint(4, 96, (1, 12), generator=torch.Generator().manual_seed(2))
    hidden, depth = model.trunk(ids), 3
    hard = distill.distill_losses(model, ids, hidden, soft=0.0)
    soft = distill.distill_losses(model, ids, hidden, soft=1.0)
    alive, T = torch.ones(12 - depth, dtype=torch.bool), 12 - depth
    shares = distill.replay(model, distill.Sequences(ids, [4]), hidden)
    for step, draft in enumerate(model.drafts(ids, hidden[:, :T], depth), start=1):
        log = model.lm_head(draft)[0].log_softmax(-1)
        teacher = torch.stack(
            [model.lm_head(model.trunk(ids[:, : i + step + 1]))[0, -1].log_softmax(-1) for i in range(T)]
        )
        choice = teacher.argmax(-1)
        assert distance(hard[step - 1], -log[torch.arange(T), choice].mean()) < PEAK
        kl = (teacher.exp() * (teacher - log)).sum(-1).mean()
        assert distance(soft[step - 1], kl) < PEAK
        alive &= log.argmax(-1) == choice
        assert shares[step - 1] == pytest.approx(alive[3:].float().mean().item())


@pytest.mark.heavy
def test_continuations_are_the_greedy_output_of_the_exported_checkpoint(tool, distill, tmp_path):
    prompts = [[0, 300, 301, 302], [0, 5, 300]]
    got = distill.Sequences.gather(prompts, distill.continuations(DEMO, tmp_path / "bundle", prompts, 16))
    assert got.starts == [4, 3]
    for row, wanted in zip(
        got.ids.tolist(), tool["evaluate"].greedy(tool["export"].load_model(DEMO), prompts, 12), strict=True
    ):
        assert row[: len(wanted)] == wanted[:16]


def test_prompts_come_from_the_given_documents_half_from_each_language(distill):
    documents = {
        "zh": [([10, 11, 12], list(range(13, 40)))],
        "en": [([50, 51, 52], list(range(53, 90)))],
    }
    recipe = distill.DistillRecipe(sequences=80, shortest=4, longest=12)
    prompts = distill.sample_prompts(documents, recipe)
    assert prompts == distill.sample_prompts(documents, recipe)
    chats = [prompt for prompt in prompts if prompt[1] == 2]
    assert [len(part) for part in (prompts[:40], prompts[40:])] == [40, 40]
    assert {tuple(prompt) for prompt in chats} == {(0, 2, 10, 11, 3), (0, 2, 50, 51, 3)}
    for index, prompt in enumerate(prompts):
        if prompt in chats:
            continue
        text = [10, 11, 12, *range(13, 40)] if index < 40 else [50, 51, 52, *range(53, 90)]
        start = text.index(prompt[1])
        assert prompt == [0, *text[start : start + len(prompt) - 1]]
        assert 4 <= len(prompt) - 1 <= 12


def test_replacing_the_mtp_layer_refuses_a_moved_main_model(tool, exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    changed = tool["export"].load_model(exported)
    with torch.no_grad():
        changed.model.layers[-1].eh_proj.weight.add_(1.0)
    tool["export"].replace_mtp(copy, changed)
    got = tool["export"].load_model(copy)
    assert_same(got, tool["export"].as_exported(changed))
    before = (copy / "model.safetensors").read_bytes()
    with torch.no_grad():
        changed.model.norm.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        tool["export"].replace_mtp(copy, changed)
    assert (copy / "model.safetensors").read_bytes() == before


def test_only_an_undistilled_demo_checkpoint_is_distilled(tool, distill, exported, tmp_path):
    card = tool["distill_card"]
    (tmp_path / "README.md").write_text("## 留出集上的结果\n\n## 样例\n", encoding="utf-8")
    card.check_undistilled(tmp_path)
    (tmp_path / "README.md").write_text("## 样例\n", encoding="utf-8")
    with pytest.raises(ValueError, match="留出集上的结果"):
        card.check_undistilled(tmp_path)
    distilled = "## MTP 自蒸馏\n\n## 留出集上的结果\n\n## 样例\n"
    (tmp_path / "README.md").write_text(distilled, encoding="utf-8")
    with pytest.raises(ValueError, match="已经蒸馏过"):
        card.check_undistilled(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        distill.load_demo(exported)


def test_saved_sequences_of_other_settings_are_refused(tool, distill, tiny_config, tmp_path):
    model, recipe = tool["model"].DemoModel(tiny_config), distill.DistillRecipe()
    parts = {"train": distill.Sequences(torch.tensor([[1, 2]]), [1])}
    distill.save_sequences(tmp_path / "s.pt", model, recipe, parts)
    got = distill.load_sequences(tmp_path / "s.pt", model, replace(recipe, steps=7))
    assert got["train"].ids.tolist() == [[1, 2]]
    for other, changed in (
        (tool["model"].DemoModel(tiny_config, 1), recipe),
        (model, replace(recipe, seed=1)),
    ):
        with pytest.raises(ValueError, match=r"s\.pt"):
            distill.load_sequences(tmp_path / "s.pt", other, changed)


def test_the_card_keeps_its_other_sections(tool, distill, tiny_config, exported):
    """蒸馏一节加在结果之前，结果重测，首尾原样；蒸馏前的 MTP 损失来自还没有改写的检查点。"""
    (exported / "README.md").write_text(
        "# 首\n\n## 留出集上的结果\n\n旧表\n\n## 样例\n\n尾\n", encoding="utf-8"
    )
    trainer = make_distiller(tool, distill, tiny_config)
    trainer.history.append({"step": 0, "train": [], "zh": [0.5, 0.25, 0.125], "en": [0.75, 0.5, 0.25]})
    held = {name: [([9, 8, 7], list(range(first, first + 60)))] for name, first in (("zh", 10), ("en", 30))}
    text = tool["distill_card"].rewritten(exported, trainer, held, "python 命令")
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["# 首", "## MTP 自蒸馏", "## 留出集上的结果", "## 样例"]
    assert text.endswith("## 样例\n\n尾\n")
    assert "旧表" not in text
    assert "| 0 | — | 50.0% | 25.0% | 12.5% | 75.0% | 50.0% | 25.0% |" in text
    assert "python 命令" in text
    original = tool["export"].load_model(exported)
    windows = tool["evaluate"].held_windows(held["zh"], 256)
    before = tool["evaluate"].held_losses(original, windows)[1:]
    assert "中文 " + " / ".join(f"{value:.3f}" for value in before) in text
