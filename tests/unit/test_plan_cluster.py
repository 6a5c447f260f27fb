"""dsx plan --cluster：写法、切法、速度与受什么限制，对照手算；命令行、JSON、网页说的是同一件事。"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deepseek_export.bundle.stages import parse_cuts
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.main import cli
from deepseek_export.errors import DsxError
from deepseek_export.plan import GPUS, make_plan
from deepseek_export.plan.cluster import PREFILL_CHUNK
from deepseek_export.plan.machines import DEFAULT_LATENCY, GRAMMAR, parse_cluster
from deepseek_export.plan.result import ClusterPlan, ModelError, Validation
from deepseek_export.plan.roofline import RESERVE
from deepseek_export.profile import resolve_profile
from deepseek_export.report.cluster_plan import trust
from deepseek_export.report.page import render
from deepseek_export.report.plan import plan_page
from deepseek_export.serving import EngineSettings
from deepseek_export.units import size
from tests.report_pages import SVG, check_picture, holds, parsed, rows

pytestmark = pytest.mark.unit

PUBLISHED = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())
ON = resolve_profile("mla+moe")
#: V3 的宽度与深度，专家少一些：文件头小，读得快。
THIN = PUBLISHED["V3"] | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
HIDDEN, VOCAB, LAYERS = 7168, 129280, 61


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("thin") / "ckpt", THIN, mtp=True, sparse=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """词嵌入与输出头共用，稠密。"""
    changes = PUBLISHED["MINICPM3"] | {"num_hidden_layers": 4}
    return write_checkpoint(tmp_path_factory.mktemp("tied") / "ckpt", changes, sparse=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5 的宽度，八层，第 0、1、2、6 层自己排名，专家少一些。"""
    changes = {
        "num_hidden_layers": 8,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "n_routed_experts": 8,
    }
    thin = {key: value for key, value in (PUBLISHED["GLM_5"] | changes).items() if key != "mlp_layer_types"}
    return write_checkpoint(tmp_path_factory.mktemp("shared") / "ckpt", thin, sparse=True)


def test_shared_layers_stay_with_their_indexer(shared: Path):
    """CLUSTER-60：切法是 dsx split 收的：沿用选择的层不做一段的开头。"""
    plan = clustered(shared, "4x cpu 2GB 100GB/s 1TFLOP/s, 10Gb/s", batch=1)
    for layout in plan.layouts:
        spans = parse_cuts(layout.cuts, 8)
        assert {begin for begin, _ in spans} <= {0, 1, 2, 6}, layout.cuts


def clustered(path: Path, text: str, profile: Any = ON, **settings: Any) -> ClusterPlan:
    found = make_plan(path, profile, cluster=text, **settings).cluster
    assert found is not None
    return found


def refused(code: str, path: Path, **settings: Any) -> DsxError:
    with pytest.raises(DsxError) as caught:
        make_plan(path, ON, **settings)
    assert caught.value.code == code
    return caught.value


def test_the_words_for_machines():
    """CLUSTER-60：GPU 的规格取自表，写了的以写的为准；CPU 要写内存与带宽；次序、大小写随意。"""
    gpu = parse_cluster("8x H100 70GB, 400Gb/s")
    assert (gpu.count, gpu.machine.title) == (8, GPUS["h100"].title)
    assert (gpu.machine.memory, gpu.machine.bandwidth) == (70e9, GPUS["h100"].bandwidth)
    assert gpu.link is not None
    assert (gpu.link.bandwidth, gpu.link.latency, gpu.link.assumed) == (50e9, DEFAULT_LATENCY, True)
    cpu = parse_cluster("4 x cpu 300GB/s 0.25TB 2TFLOP/s, 1.5GB/s 20us")
    assert (cpu.machine.memory, cpu.machine.bandwidth, cpu.machine.flops) == (250e9, 300e9, 2e12)
    assert cpu.link is not None
    assert (cpu.link.bandwidth, cpu.link.latency) == (1.5e9, pytest.approx(20e-6))
    assert not cpu.link.assumed
    assert parse_cluster("1x l4").link is None
    assert parse_cluster("2x h100 1TFLOP/s, 1Gb/s").machine.fp8_flops is None
    assert not parse_cluster("1x cpu 1GB 1GB/s").knows_flops


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "个数x"),
        ("h100, 1Gb/s", "个数x"),
        ("0x h100, 1Gb/s", "0 台"),
        ("99999999x h100, 1Gb/s", "99999999 台"),
        ("8x h100", "网络没有写"),
        ("8x h100, 5us", "网络没有写带宽"),
        ("8x h100 80, 1Gb/s", "'80'"),
        ("8x h100 80gb, 1Gb/s", "'80gb'"),
        ("8x h100 80GB 90GB, 1Gb/s", "内存写了两次"),
        ("8x h100 0GB, 1Gb/s", "不大于 0"),
        ("8x h100, 0Gb/s", "不大于 0"),
        ("8x h100, 1Gb/s, 2Gb/s", "'1Gb/s,'"),
        ("8x h100, 1e9Gb/s", "'1e9Gb/s'"),
        ("8x h100, nanGb/s", "'nanGb/s'"),
        ("4x cpu 256GB, 1Gb/s", "cpu 没有写带宽"),
        ("4x cpu, 1Gb/s", "cpu 没有写内存、带宽"),
    ],
)
def test_words_that_make_no_sense(thin: Path, text: str, says: str):
    """CLUSTER-60：写错了说是哪一处，给出写法（DSX-E766）。"""
    error = refused("DSX-E766", thin, cluster=text)
    assert says in error.what
    assert error.todo == GRAMMAR


def test_other_refusals(thin: Path):
    """CLUSTER-60：不认识的 GPU、比机器或层数还多的 stage、没有地方生成的提示词、没有配 --cluster 的选项。"""
    assert "h100" in refused("DSX-E703", thin, cluster="8x h10, 1Gb/s").todo
    machines = {"cluster": "8x h100, 1Gb/s"}
    assert "8 台机器" in refused("DSX-E767", thin, **machines, stages=9).what
    refused("DSX-E767", thin, cluster="64x h100, 1Gb/s", stages=62)
    refused("DSX-E767", thin, **machines, context=100, prompt=100)
    refused("DSX-E767", thin, **machines, context=1)
    assert "--stages" in refused("DSX-E767", thin, stages=2).what
    assert "--prompt" in refused("DSX-E767", thin, prompt=2).what
    assert "batch" in refused("DSX-E767", thin, cluster="1x cpu 999999TB 1GB/s", batch=1 << 30).what


def test_single_stream_is_one_walk_around(thin: Path):
    """CLUSTER-60：只有一条时，时间就是每台读自己的权重与缓存各一遍，加每条边的字节与延迟；手算。"""
    context, prompt = 4096, 1024
    plan = clustered(
        thin, "4x cpu 2TB 100GB/s, 10Gb/s 50us", context=context, prompt=prompt, stages=4, weights="float16"
    )
    (layout,) = plan.layouts
    whole = make_plan(thin, ON, weights="float16")
    experts = 58 * 8 * 3 * HIDDEN * 2048 * 2
    read = whole.weight_bytes["float16"] - VOCAB * HIDDEN * 2 - experts / 2  # 词嵌入不读，8 个专家里选 4 个
    read += (prompt + context) // 2 * whole.cache.latent_bytes_per_token
    edges = 3 * HIDDEN * 2 + VOCAB * 4
    seconds = read / 100e9 + edges / 1.25e9 + 4 * 50e-6
    assert layout.single_tokens_per_second == pytest.approx(1 / seconds)
    assert layout.first_token_s is None  # 没有写算力
    assert (layout.single_bound, layout.full_bound) == ("memory", "memory")


def test_stages_hold_the_whole_model(thin: Path):
    """CLUSTER-60：各 stage 连着、铺满，合起来恰好是整个模型；放得下就是每台都放得下；写出来的切法 dsx split 认得。"""
    plan = clustered(thin, "10x h100 40GB, 400Gb/s", batch=20, context=8192)
    whole = make_plan(thin, ON, batch=20, context=8192)
    assert plan.usable_bytes == int(40e9 * (1 - RESERVE))
    assert plan.layouts
    for layout in plan.layouts:
        assert layout.fits
        assert layout.stages * layout.replicas + layout.idle == 10
        assert layout.batch == -(-20 // layout.replicas)
        assert parse_cuts(layout.cuts, LAYERS) == [
            (one.first_layer, one.last_layer + 1) for one in layout.stage_plans
        ]
        weights = sum(one.weight_bytes for one in layout.stage_plans)
        assert weights == pytest.approx(whole.weight_bytes["stored"], rel=1e-9)
        cache = sum(one.cache_bytes for one in layout.stage_plans)
        assert cache == pytest.approx(whole.cache.latent_bytes * layout.batch / 20, rel=1e-6)
        assert all(one.weight_bytes + one.cache_bytes <= plan.usable_bytes for one in layout.stage_plans)
        assert layout.single_tokens_per_second is not None
        assert layout.first_token_s is not None
        assert 0 < (layout.busiest or 0) <= 1
    assert plan.smallest is not None
    assert plan.layouts[0].stages >= plan.smallest
    speeds = [layout.full_tokens_per_second or 0 for layout in plan.layouts]
    assert plan.best == speeds.index(max(speeds))
    asked = clustered(thin, "10x h100 40GB, 400Gb/s", batch=20, context=8192, stages=plan.layouts[0].stages)
    assert asked.layouts == plan.layouts[:1]


def test_drafts_and_shared_heads_need_the_embedding_twice(thin: Path, tied: Path):
    """CLUSTER-60：草稿模块在最后一个 stage，连同它要的词嵌入；与词嵌入共用的输出头也另有一份；都不改变速度的算法。"""
    text = "4x h200 141GB, 400Gb/s"
    off, on = (
        clustered(thin, text, resolve_profile(name), stages=4).layouts[0] for name in ("mla+moe", "full")
    )
    more = (
        make_plan(thin, resolve_profile("full")).weight_bytes["stored"]
        - make_plan(thin, ON).weight_bytes["stored"]
    )
    grown = sum(one.weight_bytes for one in on.stage_plans) - sum(one.weight_bytes for one in off.stage_plans)
    assert grown == pytest.approx(more + VOCAB * HIDDEN * 2, rel=1e-6)
    assert on.stage_plans[-1].last_layer == LAYERS - 1
    plan = clustered(tied, text, resolve_profile("mla"), stages=2).layouts[0]
    embed = PUBLISHED["MINICPM3"]["vocab_size"] * PUBLISHED["MINICPM3"]["hidden_size"] * 2
    whole = make_plan(tied, resolve_profile("mla")).weight_bytes["stored"]
    assert sum(one.weight_bytes for one in plan.stage_plans) == pytest.approx(whole + embed, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("4x h200, 400Gb/s 1us", "memory"),
        ("4x h200 0.001TFLOP/s, 400Gb/s 1us", "compute"),
        ("4x h200, 0.1Mb/s 1us", "network"),
        ("4x h200, 400Gb/s 900ms", "latency"),
    ],
)
def test_what_it_is_bound_by(thin: Path, text: str, bound: str):
    """CLUSTER-60：受限于加倍之后最见效的那一样。"""
    (layout,) = clustered(thin, text, batch=8, stages=4).layouts
    assert (layout.single_bound, layout.full_bound) == (bound, bound)


def test_more_is_never_slower(thin: Path):
    """CLUSTER-60：网络快了、内存快了，单条与合计都不会慢；合计不快过最慢的 stage。"""

    def speeds(text: str) -> tuple[float, float]:
        (layout,) = clustered(thin, text, batch=32, stages=8).layouts
        assert layout.single_tokens_per_second is not None
        assert layout.full_tokens_per_second is not None
        return layout.single_tokens_per_second, layout.full_tokens_per_second

    found = [
        speeds(f"8x cpu 1TB {memory}GB/s 5TFLOP/s, {net}Gb/s")
        for memory, net in ((200, 1), (200, 10), (400, 10))
    ]
    for before, after in itertools.pairwise(found):
        assert before[0] <= after[0]
        assert before[1] <= after[1] * (1 + 1e-9)
    assert found[0][0] < found[-1][0]


def test_micro_batches_only_when_they_pay(thin: Path):
    """CLUSTER-60：受限于读权重时不分小批（分了每个都要再读一遍）；受限于算力时分，几个 stage 一起算。"""
    (read,) = clustered(thin, "4x cpu 2TB 10GB/s 900TFLOP/s, 400Gb/s 1us", batch=16, stages=4).layouts
    (computed,) = clustered(thin, "4x cpu 2TB 900TB/s 0.1TFLOP/s, 400Gb/s 1us", batch=16, stages=4).layouts
    assert read.micro_batches == 1
    assert computed.micro_batches >= 4
    assert (computed.busiest or 0) > 0.5


def test_sixty_four_machines(thin: Path):
    """CLUSTER-60：64 台各种分法都在：从一堆副本到一条长的；张量、专家并行只是估计，另计通信。"""
    plan = clustered(thin, "64x h100 80GB, 400Gb/s 5us", batch=512)
    stages = [layout.stages for layout in plan.layouts]
    assert stages == sorted(set(stages))
    assert stages[-1] == LAYERS
    assert plan.layouts[0].replicas == 64 // stages[0]
    splits = {one.split: one for one in plan.estimates}
    assert splits.keys() == {"tensor"}  # 8 个专家不能被 64 整除
    tensor = splits["tensor"]
    if tensor.fits:
        assert 0 < (tensor.tokens_per_second or 0) < (tensor.bound_tokens_per_second or 0)
    both = {one.split: one for one in clustered(thin, "8x h100 80GB, 400Gb/s", batch=64).estimates}
    assert both.keys() == {"tensor", "expert"}
    for one in both.values():
        assert (one.tokens_per_second is None) == (not one.fits)


def test_when_it_does_not_fit(thin: Path):
    """CLUSTER-60：放不下就说至少几台，没有速度；写明了几个 stage 就照样列出差多少；一层都放不下说没有办法。"""
    plan = clustered(thin, "2x l4 10GB, 1Gb/s")
    assert (plan.layouts, plan.best) == ([], None)
    assert plan.smallest is not None
    assert plan.smallest > 2
    enough = clustered(thin, f"{plan.smallest}x l4 10GB, 1Gb/s")
    assert enough.layouts
    (asked,) = clustered(thin, "2x l4 10GB, 1Gb/s", stages=2).layouts
    assert (asked.fits, asked.full_tokens_per_second, asked.first_token_s) == (False, None, None)
    assert clustered(thin, "9x cpu 1GB 10GB/s, 1Gb/s").smallest is None


def test_a_chunk_is_what_serve_takes():
    """CLUSTER-60：一步算几个提示词的 token，与 dsx serve 的缺省相同。"""
    assert EngineSettings().prefill_tokens == PREFILL_CHUNK


def test_it_says_how_far_it_can_be_trusted():
    """CLUSTER-62：没有对照过测量就这样说；对照过，说是哪台机器、差多少，更多的机器没有。"""
    assert "没有对照过" in trust(Validation())
    errors = [ModelError(case="4 个 stage，满", median=0.93, low=0.9, high=1.02)]
    text = trust(Validation(measured="2026-11-28", machine="某 CPU，2 核", errors=errors))
    assert "0.93（0.90–1.02）" in text
    assert "某 CPU，2 核" in text
    assert "更多的机器" in text


def test_the_command_the_json_and_the_page(thin: Path, tmp_path: Path):
    """CLUSTER-60：命令行、--json、--html 说的是同一件事；模拟、估计、假设各自标明。"""
    arguments = ["plan", str(thin), "--cluster", "8x h100 40GB, 400Gb/s", "--batch", "16"]
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0, printed.output
    found = make_plan(thin, ON, cluster="8x h100 40GB, 400Gb/s", batch=16)
    plan = found.cluster
    assert plan is not None
    assert plan.best is not None
    best = plan.layouts[plan.best]
    for words in (
        "模拟",
        "估计：没有模拟，没有对照过",
        "网络的延迟没有写",
        best.cuts,
        size(plan.usable_bytes),
    ):
        assert words in printed.output.replace("\n", "").replace(" ", "") or words in printed.output
    page = tmp_path / "page.html"
    written = CliRunner().invoke(cli, [*arguments, "--json", "--html", str(page)])
    assert json.loads(written.output.splitlines()[-1])["cluster"] == plan.model_dump(mode="json")
    shown = rows(page.read_text(encoding="utf-8"))
    for layout in plan.layouts:
        assert holds(shown, str(layout.stages), [layout.replicas, layout.batch], (layout.cuts,))
        numbers = [layout.micro_batches, layout.single_tokens_per_second, layout.full_tokens_per_second]
        assert holds(shown, str(layout.stages), [*numbers, layout.first_token_s])
    for index, stage in enumerate(best.stage_plans):
        assert holds(shown, f"stage {index}", [stage.weight_bytes, stage.cache_bytes], ("✓ 放得下",))
    for picture in parsed(page.read_text(encoding="utf-8")).iter(f"{SVG}svg"):
        check_picture(picture)
    assert all(line in page.read_text(encoding="utf-8") for line in plan.assumptions)


def test_a_page_when_nothing_fits(thin: Path):
    """CLUSTER-60：放不下、只有一台时，命令行与网页照样写得出。"""
    for text, extra, words in (
        ("2x l4 10GB, 1Gb/s", [], "放不下：至少"),
        ("2x l4 10GB, 1Gb/s", ["--stages", "2"], "放不下"),
        ("9x cpu 1GB 10GB/s, 1Gb/s", [], "有一层自己就超过一台"),
        ("1x cpu 2TB 300GB/s", [], "CPU 没有写算力"),
    ):
        result = CliRunner().invoke(cli, ["plan", str(thin), "--cluster", text, *extra])
        assert result.exit_code == 0, result.output
        assert words in result.output
        stages = int(extra[1]) if extra else None
        assert "集群" in render(plan_page(make_plan(thin, ON, cluster=text, stages=stages)))
