"""plan/：全部数字由配置与文件头推出，逐项对照手算；只读文件头，不加载 torch。"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cli.main import cli
from deepseek_export.errors import DsxError
from deepseek_export.plan import GPUS, make_plan
from deepseek_export.plan.roofline import RESERVE
from deepseek_export.plan.shape import ModelShape
from deepseek_export.profile import resolve_profile

pytestmark = [pytest.mark.unit, pytest.mark.heavy]

PUBLISHED = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())
ON, OFF = resolve_profile("mla+moe"), resolve_profile("baseline")


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Path:
    """DeepSeek-V3 发布的样子：61 层、256 个专家、FP8、一个 MTP 模块、163 个分片；不占磁盘。"""
    out = tmp_path_factory.mktemp("v3") / "ckpt"
    return write_checkpoint(out, PUBLISHED["V3"], mtp=True, shards=163, sparse=True)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> Path:
    """同上，9 层，其中 MoE 6 层：手算用。"""
    out = tmp_path_factory.mktemp("shallow") / "ckpt"
    return write_checkpoint(out, PUBLISHED["V3"] | {"num_hidden_layers": 9}, sparse=True)


#: ``shallow`` 的参数，逐项手算。
HEAD = 129280 * 7168
EXPERTS = 6 * 256 * 3 * 7168 * 2048
ROUTER = 6 * (256 * 7168 + 256)  # 权重与 bias；导出时始终 float32，占两份 float16
SMALL = ROUTER + 9 * (2 * 7168 + 1536 + 512) + 7168  # 另有 norm


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "ckpt"
    return write_checkpoint(out, PUBLISHED["MINICPM3"], shards=2, sparse=True)


def test_deepseek_v3(v3: Path):
    """EXPORT-31：671B 参数、每 token 37B、每 token 缓存 70,272 字节（展开 4,997,120），与公开的数一致。"""
    plan = make_plan(v3, ON, batch=2, context=8192)
    assert (plan.parameters // 10**9, plan.active_parameters // 10**8) == (671, 366)
    stored = {entry.dtype: entry.bytes for entry in plan.stored}
    assert plan.weight_bytes["stored"] == sum(stored.values())
    assert stored["F8_E4M3"] + stored["BF16"] // 2 == pytest.approx(plan.parameters, rel=1e-6)
    assert stored["F32"] == pytest.approx(stored["F8_E4M3"] * 4 / 128**2, rel=0.03)  # 每 128×128 块一个 scale
    assert (plan.cache.latent_bytes_per_token, plan.cache.expanded_bytes_per_token) == (70_272, 4_997_120)
    assert (plan.cache.used, plan.cache.latent_bytes) == ("latent", 70_272 * 2 * 8192)
    assert plan.weight_bytes["float32"] == 4 * plan.parameters
    packed, half, *quantized, reference = plan.export
    assert (packed.mode, half.dtype, reference.mode) == ("packed", "float16", "reference")
    assert packed.disk_bytes > plan.weight_bytes["float32"] > half.disk_bytes > reference.disk_bytes
    assert reference.peak_ram_bytes < packed.peak_ram_bytes == half.peak_ram_bytes < 1.5e9
    assert [entry.dtype for entry in quantized] == ["int8", "int4"]
    for entry in quantized:
        assert 0 < entry.disk_bytes - plan.weight_bytes[entry.dtype] < 1e8
    # 引擎里 FP8 的字节原样，只有吸收进注意力的 kv_b 还原成两倍大的。
    assert plan.weight_bytes["stored"] < plan.build.disk_bytes < 1.01 * plan.weight_bytes["stored"]
    assert plan.build.peak_ram_bytes > 4 * plan.weight_bytes["stored"]
    assert plan.gpus == []


@pytest.mark.parametrize(
    ("changes", "index_layers", "bytes_per_token"),
    [
        (PUBLISHED["V3_2"], 61, 85_888),
        (PUBLISHED["GLM_5"], 78, 109_824),
        (PUBLISHED["GLM_5"] | {"index_topk_freq": 4, "index_skip_topk_offset": 3}, 21, 95_232),
    ],
)
def test_sparse_attention(tmp_path: Path, changes: dict, index_layers: int, bytes_per_token: int):
    """EXPORT-31：V3.2、GLM-5 的缓存另算索引 key，只算自己挑 key 的层；长上下文的注意力只看选中的，加上给每个 key 打分。"""
    path = write_checkpoint(tmp_path / "ckpt", changes, sparse=True)
    plan = make_plan(path, ON, context=8192)
    assert plan.cache.latent_bytes_per_token == bytes_per_token
    shape = ModelShape.build(Checkpoint.open(path).config, ON, 0)
    assert shape.index_layers == index_layers
    dense, ranking = (shape.attention_flops(2048), shape.attention_flops(8192) - shape.attention_flops(2048))
    heads = changes["index_n_heads"]
    assert ranking == 2 * index_layers * heads * 8192 * 129
    assert dense == 2 * changes["num_hidden_layers"] * changes["num_attention_heads"] * 2048 * (576 + 512)


def test_mtp_counts_only_when_it_is_on(v3: Path):
    """EXPORT-31：full 另算 MTP 模块的权重与缓存，词嵌入与 lm_head 的副本不算。"""
    off, on = make_plan(v3, ON), make_plan(v3, resolve_profile("full"))
    assert (off.mtp_modules, on.mtp_modules) == (0, 1)
    assert on.cache.latent_bytes_per_token == off.cache.latent_bytes_per_token * 62 // 61
    assert 11.0e9 < on.parameters - off.parameters < 12.0e9  # 公开的说明写的是 11.5B


def test_profile_decides_what_is_read(v3: Path):
    """EXPORT-31：关掉 MoE 每个专家都读、都算；关掉 MLA 缓存是展开的。"""
    plan = make_plan(v3, OFF)
    assert plan.cache.used == "expanded"
    assert plan.active_parameters == plan.parameters - PUBLISHED["V3"]["vocab_size"] * 7168


def test_splits_on_gpus(v3: Path):
    """EXPORT-31：潜缓存在张量并行下每卡一份，在专家与流水并行下分开；至少几块卡由最小的可行切法给出。"""
    plan = make_plan(v3, ON, gpus=["h200", "rtx4090"], count=16, batch=32, context=8192)
    h200, rtx = plan.gpus
    splits = {split.split: split for split in h200.requested}
    assert splits.keys() == {"tensor", "expert", "pipeline"}
    cache = plan.cache.latent_bytes
    assert splits["tensor"].cache_bytes == cache
    assert splits["expert"].cache_bytes == cache // 16
    assert splits["pipeline"].cache_bytes == -(-cache * 4 // 61)
    assert splits["tensor"].weight_bytes < splits["expert"].weight_bytes
    assert h200.usable_bytes == int(GPUS["h200"].memory * (1 - RESERVE))
    for split in (*h200.requested, *rtx.requested):
        usable = h200.usable_bytes if split in h200.requested else rtx.usable_bytes
        assert split.fits == (split.weight_bytes + split.cache_bytes <= usable)
    assert h200.smallest is not None
    assert h200.smallest.fits
    assert h200.smallest.gpus == 8
    assert h200.decode_tokens_per_second is not None
    assert rtx.decode_tokens_per_second is None
    expanded = make_plan(v3, resolve_profile("moe"), gpus=["h200"], count=16, batch=32, context=8192).gpus[0]
    tensor = next(split for split in expanded.requested if split.split == "tensor")
    assert tensor.cache_bytes == -(-plan.cache.expanded_bytes // 16)


def test_roofline_is_bandwidth_at_batch_one(minicpm: Path):
    """EXPORT-31：batch 1 受带宽限制，上界就是带宽除以每步要读的字节：权重（共享的词嵌入也要读）加缓存。"""
    plan = make_plan(minicpm, resolve_profile("mla"), gpus=["rtx4090"], context=1024)
    gpu = plan.gpus[0]
    assert [split.split for split in gpu.requested] == ["single"]
    read = plan.weight_bytes["stored"] + plan.cache.latent_bytes
    assert gpu.decode_bound == "memory"
    assert gpu.decode_tokens_per_second == pytest.approx(GPUS["rtx4090"].bandwidth / read)
    big = make_plan(minicpm, resolve_profile("mla"), gpus=["rtx4090"], batch=4096, context=1).gpus[0]
    assert big.decode_bound == "compute"


def test_decode_bound_is_the_busiest_card(shallow: Path):
    """EXPORT-31：每种切法的上界逐项手算：每卡一份的权重每卡都读，专家读命中的，缓存按卡分到的条数。"""
    n, batch, context = 4, 9, 8192
    plan = make_plan(shallow, ON, gpus=["b200"], count=n, batch=batch, context=context, weights="float16")
    rest = plan.parameters - 2 * HEAD - EXPERTS - SMALL  # 词嵌入只查几行，不读
    cache, small = batch * context * 9 * 576 * 2, SMALL + ROUTER

    def hit(tokens: float) -> float:
        return EXPERTS * (1 - (31 / 32) ** tokens)

    def pipeline(m: int) -> float:
        inner, share = 2 * (rest + small + hit(batch / m)), 3 / 9  # 9 层分 4 段，最多的一段 3 层
        return max(share * (m * inner + cache), inner + 2 * HEAD + cache / m)

    read = {
        "tensor": 2 * (small + (rest + HEAD + hit(batch)) / n) + cache,
        "expert": 2 * (small + rest + HEAD + hit(batch) / n) + cache * 3 / 9,  # 9 条分给 4 块，最多的 3 条
        "pipeline": min(pipeline(m) for m in range(1, n + 1)),
    }
    gpu = plan.gpus[0]
    assert [split.split for split in gpu.requested] == list(read)
    for split in gpu.requested:
        assert split.decode_bound == "memory"
        assert split.decode_tokens_per_second == pytest.approx(batch * 8.0e12 / read[split.split])
    best = max(gpu.requested, key=lambda split: split.decode_tokens_per_second or 0)
    assert (gpu.decode_split, gpu.decode_tokens_per_second) == (best.split, best.decode_tokens_per_second)


def test_decode_bound_by_compute(shallow: Path):
    """EXPORT-31：受算力限制时同样看最忙的那块卡：专家之外按它经手的条数，专家按整个 batch 均分。"""
    n, batch = 4, 4 * 300 + 1
    settings = {"count": n, "batch": batch, "context": 1, "weights": "float16"}
    h20, rtx = make_plan(shallow, ON, gpus=["h20-141", "rtx4090"], **settings).gpus
    active_experts = EXPERTS * 8 // 256
    others = make_plan(shallow, ON).active_parameters - active_experts
    attention = 9 * 128 * (576 + 512)  # 一个缓存的 token
    expert = next(split for split in h20.requested if split.split == "expert")
    flops = 301 * 2 * (others + attention) + batch * 2 * active_experts / n
    assert expert.decode_bound == "compute"
    assert expert.decode_tokens_per_second == pytest.approx(batch * 148e12 / flops)
    assert {split.decode_tokens_per_second for split in rtx.requested} == {None}  # 放不下就不给
    assert rtx.decode_split is None


def test_prefill_bound(shallow: Path):
    """EXPORT-31：FP8 的权重按 FP8 峰值，没有 FP8 的 GPU 按 FP16；lm_head 只过最后一个位置，注意力按 mla.form 的形式。"""
    plan = make_plan(shallow, ON, gpus=["h200", "a100"], count=4, context=4096)
    fp8 = plan.active_parameters - HEAD - SMALL
    naive = 9 * 128 * 2048 * (192 + 128)
    h200, a100 = plan.gpus
    seconds = 2 * fp8 / 1979e12 + 2 * (SMALL + naive) / 989e12
    assert h200.prefill_tokens_per_second == pytest.approx(4 / seconds)
    assert a100.prefill_tokens_per_second == pytest.approx(4 * 312e12 / (2 * (fp8 + SMALL + naive)))
    absorb = resolve_profile("mla+moe", ["mla.form=absorb"])
    slower = make_plan(shallow, absorb, gpus=["a100"], count=4, context=4096).gpus[0]
    wide = 9 * 128 * 2048 * (576 + 512)
    assert slower.prefill_tokens_per_second == pytest.approx(4 * 312e12 / (2 * (fp8 + SMALL + wide)))


def test_every_gpu_names_its_source():
    """规格都有出处；FP8 的峰值约是 FP16 的两倍。"""
    for name, gpu in GPUS.items():
        assert name == name.lower()
        assert gpu.source
        if gpu.fp8_flops is not None:
            assert gpu.fp8_flops == pytest.approx(2 * gpu.flops, rel=0.02)


def test_gpu_names_ignore_case(minicpm: Path):
    """EXPORT-31：--gpu 不分大小写。"""
    plan = make_plan(minicpm, resolve_profile("mla"), gpus=["H100", "Rtx4090"])
    assert [gpu.gpu for gpu in plan.gpus] == ["h100", "rtx4090"]


def test_no_split(shallow: Path, minicpm: Path):
    """EXPORT-31：请求的卡数没有一种切法时用一行说明，不打空表。"""
    gpu = make_plan(shallow, ON, gpus=["h200"], count=12).gpus[0]
    assert (gpu.requested, gpu.decode_tokens_per_second, gpu.prefill_tokens_per_second) == ([], None, None)
    assert gpu.no_split == (
        "12 块没有一种切法：128 个注意力头、256 个专家都不能被 12 整除，9 层也不够分给 12 块"
    )
    assert make_plan(shallow, ON, gpus=["h200"], count=4).gpus[0].no_split is None
    result = CliRunner().invoke(cli, ["plan", str(minicpm), "-p", "mla", "--gpu", "h200", "--gpus", "100"])
    assert result.exit_code == 0, result.output
    assert "100 块没有一种切法：40 个注意力头不能被 100 整除" in result.output
    assert "每卡权重" not in result.output


def test_quantised_weights_keep_what_dsx_keeps(minicpm: Path):
    """EXPORT-31：absorb 用的 kv_b 总是 int8，词嵌入是 bfloat16 或 int8，共享的 lm_head 另存一份量化的。"""
    c, plan = PUBLISHED["MINICPM3"], make_plan(minicpm, resolve_profile("mla"))
    embed = c["vocab_size"] * c["hidden_size"]
    kv_b = c["num_hidden_layers"] * c["num_attention_heads"] * (64 + 64) * c["kv_lora_rank"]
    for kind, each, row in (("int8", 1.0625, 2), ("int4", 0.5625, 1.0625)):
        rest = plan.parameters - embed - kv_b
        extra = plan.weight_bytes[kind] - row * embed - 1.0625 * kv_b - each * (rest + embed)
        assert 0 < extra < 0.001 * plan.weight_bytes[kind]  # 只剩 norm


def test_plan_matches_an_export(tmp_path: Path):
    """EXPORT-31：float32 的权重字节数与真实导出的配方逐字节相同。"""
    from deepseek_export.checkpoint import Checkpoint
    from deepseek_export.checkpoint.recipe import weight_recipes

    path = write_checkpoint(tmp_path / "ckpt", DEMO_CONFIG)
    recipes = weight_recipes(Checkpoint.open(path).config, "float32").values()
    assert make_plan(path, ON).weight_bytes["float32"] == sum(recipe.nbytes for recipe in recipes)


def test_refusals(minicpm: Path):
    with pytest.raises(DsxError) as error:
        make_plan(minicpm, ON, gpus=["gtx1080"])
    assert error.value.code == "DSX-E703"
    assert "gtx1080" in error.value.what
    with pytest.raises(DsxError, match="是不是想写 rtx4090？"):
        make_plan(minicpm, ON, gpus=["RTX-4090"])
    with pytest.raises(DsxError) as error:
        make_plan(minicpm, ON, context=32769)
    assert error.value.code == "DSX-E704"
    with pytest.raises(DsxError) as error:
        make_plan(minicpm, resolve_profile("full"))
    assert error.value.code == "DSX-E119"


def test_command_prints_a_table(v3: Path):
    arguments = ["plan", str(v3), "-p", "full", "--gpu", "h200, rtx4090", "--gpus", "16"]
    arguments += ["--batch", "32", "--context", "8192"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    for text in ("682,636,487,424", "至少 8 块", "128 块也不够", "受带宽限制", "假设："):
        assert text in result.output


def test_command_needs_no_torch():
    """EXPORT-31：只读文件头，不加载 torch；--json 是一个对象。"""
    code = (
        "import sys\nfrom deepseek_export.cli.main import cli\n"
        f"cli.main(['plan', {str(CHECKPOINT)!r}, '--gpu', 'h100', '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["gpus"][0]["gpu"] == "h100"
    assert data["context"] == 2048
