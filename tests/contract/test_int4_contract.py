"""specs/export 对已发布的 4 位检查点的承诺：EXPORT-40、EXPORT-41。"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.packed import WEIGHTS_FILE
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.int4_published import published_quantization
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.main import cli
from deepseek_export.cpu_library import find_library
from deepseek_export.errors import DsxError
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.plan.plan import make_plan
from deepseek_export.plan.written import written_bytes
from deepseek_export.profile import resolve_profile
from tests.int4_checkpoints import KIMI, SMALL, VARIANTS, int4_twins, quantization_config

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

IDS = list(range(3, 20))
EXPERTS = {f"model.layers.1.mlp.experts.*.{kind}_proj.weight" for kind in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """（4 位的检查点，float32 的孪生）；只读。"""
    return {
        name: int4_twins(tmp_path_factory.mktemp(name), VARIANTS[name])
        for name in ("kimi", "awq", "gptq", "gptq-actorder")
    }


@pytest.fixture(scope="module")
def kimi(twins, tmp_path_factory) -> Bundle:
    """照发布的码导出的 ``ort-cpu`` bundle；只读。"""
    out = tmp_path_factory.mktemp("kimi-out") / "out"
    return deepseek_export.export(
        twins["kimi"][0], out, "mla+moe", target="ort-cpu", quantization="checkpoint"
    )


def published(bundle: Bundle) -> dict:
    report = json.loads((bundle.path / "reports/export.json").read_text(encoding="utf-8"))
    return report["quantization"]["published"]


def logits(bundle: Bundle) -> np.ndarray:
    return deepseek_export.load(bundle.path, threads=1).generator.logits([IDS])[0]


@pytest.mark.parametrize("name", ["kimi", "awq", "gptq-actorder"])
def test_widened_by_default(twins, tmp_path: Path, name: str):
    """EXPORT-40：没有要量化时还原成浮点：图与权重和孪生导出的逐字节相同，说明有几个权重还原了。"""
    bundles = [deepseek_export.export(path, tmp_path / path.name, "mla+moe") for path in twins[name]]
    packed, twin = (bundle.manifest for bundle in bundles)
    for file in ("model.onnx", WEIGHTS_FILE):
        assert packed.files[file] == twin.files[file]
    assert "--quant checkpoint" in packed.fallbacks[0]
    assert packed.model.int4 is not None
    assert twin.fallbacks == []


def test_kimi_keeps_its_codes(kimi):
    """EXPORT-41：路由的专家是 ``dsx::Int4Experts``，码一位不差；其余仍是浮点，没有回退可说。"""
    manifest = kimi.manifest
    assert manifest.main.op_counts["dsx::Int4Experts"] == 1
    assert "dsx::Int4Linear" not in manifest.main.op_counts
    assert set(manifest.formats) == EXPERTS
    assert not [line for line in manifest.fallbacks if "4 位" in line]
    assert published(kimi) == {"exact": 2, "rounded": []}
    assert {recipe.form.block for recipe in manifest.weights.recipes.values() if recipe.form} == {32}


def test_kimi_equals_the_dequantised_transformers_model(kimi):
    """EXPORT-41：以 transformers 反量化的模型为基准，各层级都校验通过。"""
    report = deepseek_export.verify(kimi.path, steps=8)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")


def test_by_reference_and_in_stages(kimi, twins, tmp_path: Path):
    """EXPORT-41：按引用的、再切成 stage 的，logits 与打包的逐位相同：各个张量在哪个文件里都找得到。"""
    bundle = deepseek_export.export(
        twins["kimi"][0],
        tmp_path / "ref",
        "mla+moe",
        target="ort-cpu",
        weights="reference",
        quantization="checkpoint",
    )
    want = logits(kimi)
    assert np.array_equal(logits(bundle), want)
    stages = deepseek_export.split(bundle.path, tmp_path / "stages", 2)
    model = deepseek_export.load(stages.path, threads=1)
    try:
        assert np.array_equal(model.generator.logits([IDS])[0], want)
    finally:
        model.close()


@pytest.mark.parametrize(("name", "kind"), [("awq", "Int4Affine"), ("gptq", "Int4")])
def test_awq_and_gptq(twins, tmp_path: Path, name: str, kind: str):
    """EXPORT-41：都照原来的 4 位，有零点的零点也照搬；lm_head 仍是浮点，吸收的 kv_b 也照原来的码；与 transformers 反量化的模型对齐。"""
    bundle = deepseek_export.export(
        twins[name][0], tmp_path / "out", "mla+moe", target="ort-cpu", quantization="checkpoint"
    )
    counts, config = bundle.manifest.main.op_counts, bundle.manifest.model
    assert counts[f"dsx::{kind}Experts"] == config.num_moe_layers
    assert counts[f"dsx::{kind}Linear"] == 4 * config.num_hidden_layers + 3 * config.num_hidden_layers
    found = published(bundle)
    assert found["rounded"] == []
    assert found["exact"] == 7 * config.num_hidden_layers + 2 + config.num_hidden_layers
    resolved, planned = (
        resolve_profile("mla+moe"),
        published_quantization(Checkpoint.open(twins[name][0]), 0, True),
    )
    parts = written_bytes(Checkpoint.open(twins[name][0]).config, resolved, 0, "float32", planned)
    assert sum(parts.values()) == sum(one.nbytes for one in bundle.manifest.weights.recipes.values())
    report = deepseek_export.verify(bundle.path, levels=["model"])
    assert report.passed, report.first_failure


def test_zero_points_as_int4_and_as_int8(twins, tmp_path: Path):
    """EXPORT-41、CPU-18：同样的权重，4 位带零点的与精确地写成 int8 的，logits 只差 float32 的舍入；按引用的与打包的逐位相同；没有库时函数体也算得出。"""
    given = {"packed": "checkpoint", "reference": "checkpoint"}
    bundles = {
        weights: deepseek_export.export(
            twins["awq"][0],
            tmp_path / weights,
            "mla+moe",
            target="ort-cpu",
            weights=weights,
            quantization=quantization,
        )
        for weights, quantization in given.items()
    }
    wide = published_quantization(Checkpoint.open(twins["awq"][0]), 0, False)
    wide = deepseek_export.export(
        twins["awq"][0], tmp_path / "int8", "mla+moe", target="ort-cpu", quantization=wide
    )
    assert wide.manifest.main.op_counts["dsx::Int8Experts"] == 1
    got = logits(bundles["packed"])
    assert np.array_equal(logits(bundles["reference"]), got)
    sizes = [bundle.manifest.files[WEIGHTS_FILE].bytes for bundle in (bundles["packed"], wide)]
    assert sizes[0] < sizes[1]
    if find_library() is not None:
        assert tolerance("logits", "float32").accepts(measure(got, logits(wide)))
    with mock.patch.dict(os.environ, {"DSX_CPU_LIBRARY": "off"}):
        assert tolerance("logits", "float32", "int4").accepts(measure(logits(bundles["packed"]), got))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensorrt_gets_the_codes(twins, tmp_path: Path, dtype: str):
    """EXPORT-41：TensorRT 的目标同样照原来的码，scale 是模型的 dtype；专家由读码的插件核跑。"""
    bundle = deepseek_export.export(
        twins["kimi"][0],
        tmp_path / "out",
        "mla+moe",
        target="tensorrt-rtx",
        dtype=dtype,
        quantization="checkpoint",
    )
    recipes = bundle.manifest.weights.recipes
    codes = {name for name, recipe in recipes.items() if recipe.op == "codes"}
    assert {recipes[name].dtype for name in codes} == {"int4"}
    assert {recipes[f"{name}.scales"].dtype for name in codes} == {dtype}
    assert bundle.manifest.main.op_counts["dsx::QuantizedMoeExperts"] == 1
    assert published(bundle) == {"exact": 3, "rounded": []}
    assert set(bundle.manifest.formats) == EXPERTS


def test_requantised_on_request(twins, tmp_path: Path):
    """EXPORT-41：``--quant int4`` 照原来的码，其余的照常量化；除不尽的块、任意次序的组重新量化，都说出来。"""
    for name, block, said in (("kimi", 32, False), ("gptq-actorder", 32, True)):
        bundle = deepseek_export.export(
            twins[name][0],
            tmp_path / name,
            "mla+moe",
            target="ort-cpu",
            quantization=deepseek_export.Quantization(kind="int4", block=block),
        )
        assert any("重新量化" in line for line in bundle.manifest.fallbacks) is said
        assert bool(published(bundle)["exact"]) is not said
        assert bundle.manifest.main.op_counts["dsx::Int4Linear"] > 0


def test_plan_and_inspect_say_it(kimi, twins, tmp_path: Path):
    """EXPORT-40：``dsx plan`` 数出 4 位的张量，``dsx inspect`` 写明检查点是哪一种。"""
    plan = make_plan(twins["kimi"][0], resolve_profile("mla+moe"))
    stored = {entry.dtype: entry.tensors for entry in plan.stored}
    assert stored["I32"] == 3 * SMALL["n_routed_experts"]
    result = CliRunner().invoke(cli, ["plan", str(twins["kimi"][0]), "-p", "mla+moe"])
    assert "compressed-tensors，int4，每 32 个一组，对称" in result.output, result.output
    shown = CliRunner().invoke(cli, ["inspect", str(kimi.path)]).output
    assert "compressed-tensors，int4，每 32 个一组，对称" in shown


def test_the_maker_writes_it(tmp_path: Path):
    """EXPORT-40：造检查点的工具写得出 Kimi-K2-Thinking 的样子，别的变体不写。"""
    declared = quantization_config(KIMI, ["lm_head.weight"]) | {"ignore": ["lm_head", "re:.*self_attn.*"]}
    path = write_checkpoint(tmp_path / "kimi", SMALL | {"quantization_config": declared})
    store = Checkpoint.open(path).store
    packed = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    assert (store[packed].dtype, store[packed].shape) == ("I32", (64, 8))
    assert "model.layers.0.self_attn.o_proj.weight" in store
    gptq = SMALL | {"quantization_config": quantization_config(VARIANTS["gptq"], [])}
    with pytest.raises(ValueError, match="compressed-tensors"):
        write_checkpoint(tmp_path / "gptq", gptq)


class TestRefusals:
    """EXPORT-41：照搬不了的按码拒绝，不产生 bundle。"""

    @pytest.mark.parametrize(
        ("name", "target", "code"),
        [
            ("gptq-actorder", "ort-cpu", "DSX-E653"),
            ("kimi", "portable", "DSX-E310"),
        ],
    )
    def test_export(self, twins, tmp_path: Path, name: str, target: str, code: str):
        with pytest.raises(DsxError) as error:
            deepseek_export.export(
                twins[name][0], tmp_path / "out", "mla+moe", target=target, quantization="checkpoint"
            )
        assert error.value.code == code
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("options", [["--keep", "lm_head"], ["--quant-block", "64"]])
    def test_options_that_the_checkpoint_decides(self, twins, tmp_path: Path, options):
        arguments = ["export", str(twins["kimi"][0]), "-o", str(tmp_path / "out"), "--target", "ort-cpu"]
        result = CliRunner().invoke(cli, [*arguments, "--quant", "checkpoint", *options])
        assert result.exit_code == 1
        assert "DSX-E705" in result.output
