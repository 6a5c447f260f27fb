"""4 位检查点（compressed-tensors、AWQ、GPTQ）：逐元素精确地还原，照原来的码写，说不清的一律拒绝。"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_export import Quantization
from deepseek_export.checkpoint import Checkpoint, dtype_conflict
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.checkpoint.int4_codes import with_zeros
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.int4_published import int4_notes, published_quantization
from deepseek_export.checkpoint.recipe import (
    Recipe,
    load_array,
    load_quantized,
    materialize,
    packed_rows,
    quantized_recipes,
    weight_recipes,
    zero_points,
)
from deepseek_export.checkpoint.restored import quantization_error
from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.errors import DsxError
from tests.int4_checkpoints import (
    KIMI,
    SMALL,
    VARIANTS,
    Variant,
    everything,
    int4_twins,
    quantization_config,
)
from tests.quant_node import nibbles

pytestmark = pytest.mark.unit

EXACT = [name for name in VARIANTS if "actorder" not in name]
DOWN = "model.layers.1.mlp.experts.2.down_proj"
STACKED = "model.layers.1.mlp.experts.*.down_proj.weight"


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    """每种变体的（打包的，孪生）；只读。"""
    made = {}
    for name, variant in VARIANTS.items():
        paths = int4_twins(tmp_path_factory.mktemp(name), variant)
        made[name] = (Checkpoint.open(paths[0]), Checkpoint.open(paths[1]))
    return made


def bound(checkpoint: Checkpoint, dtype: Any = "float32") -> dict[str, Recipe]:
    return bind_recipes(weight_recipes(checkpoint.config, dtype), checkpoint)


def refused(code: str, call, *arguments) -> DsxError:
    with pytest.raises(DsxError) as err:
        call(*arguments)
    assert err.value.code == code, err.value
    return err.value


def changed(source: Path, out: Path, drop: tuple[str, ...] = (), **tensors: torch.Tensor) -> Path:
    """改几个张量的副本；名字里的点写成 ``__``。"""
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    arrays = load_file(source / "model.safetensors") | renamed
    save_file({name: value for name, value in arrays.items() if name not in drop}, out / "model.safetensors")
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def declared(source: Path, out: Path, **changes: Any) -> Path:
    """改了声明的副本。"""
    changed(source, out)
    values = json.loads((out / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return out


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk_bytes", [4 * 64 * 5, 64 << 20])
def test_widened_exactly(twins, name: str, chunk_bytes: int):
    """每个权重（叠放的也是）与按定义还原的孪生逐位相同，不论分几块读。"""
    packed, twin = twins[name]
    recipes = weight_recipes(packed.config, "float32")
    widened = {key for key, recipe in bound(packed).items() if recipe.int4 is not None}
    assert STACKED in widened
    assert ("lm_head.weight" in widened) is False
    assert ("model.layers.0.self_attn.kv_b_proj.weight" in widened) is (VARIANTS[name].packed is everything)
    for key, recipe in bound(packed).items():
        pieces = [part.reshape(-1) for part in materialize(key, recipe, packed.store, chunk_bytes)]
        assert np.array_equal(np.concatenate(pieces), load_array(key, recipes[key], twin.store).reshape(-1))


def test_rows_interleaved_and_reordered(twins):
    """gate、up 交错与 RoPE 的行序照样做，码与浮点的做法相同。"""
    packed, twin = twins["gptq"]
    prefix, count = "model.layers.1.mlp.experts", SMALL["n_routed_experts"]
    sources = tuple(f"{prefix}.{e}.{p}_proj.weight" for e in range(count) for p in ("gate", "up"))
    swiglu = Recipe(op="stack_swiglu", sources=sources, shape=(count, 128, 64), dtype="float32")
    q_b = ("model.layers.0.self_attn.q_b_proj.weight",)
    rope = Recipe(op="deinterleave", sources=q_b, shape=(64, 32), dtype="float32", groups=(32, 16))
    form = BlockFormat(kind="int4", block=32, scale="float16")
    for recipe in (swiglu, rope):
        own = bind_recipes({"w": recipe}, packed)["w"]
        want = load_array("w", recipe, twin.store)
        assert np.array_equal(load_array("w", own, packed.store), want)
        assert np.array_equal(load_quantized("w", own, form, packed.store), want)
        for part in quantized_recipes(own, form):
            whole = load_array("w", part, packed.store)
            pieces = [piece.reshape(-1) for piece in materialize("w", part, packed.store, 4 * 64 * 32)]
            assert np.array_equal(np.concatenate(pieces), whole.reshape(-1))


def from_unsigned(
    codes: np.ndarray, scales: np.ndarray, bits: int, zeros: np.ndarray | None = None
) -> np.ndarray:
    """算子的定义：``(码 - 零点) * scale``，没有给出的零点是 ``2^(bits-1)``。"""
    if bits == 4:
        codes = nibbles(codes)
    middle = np.float32(1 << (bits - 1))
    own = middle if zeros is None else nibbles(zeros)[..., : scales.shape[-1], None].astype(np.float32)
    steps = codes.astype(np.float32) - own
    return (steps * scales.astype(np.float32)[..., None]).reshape(*codes.shape[:-2], -1)


@pytest.mark.parametrize("name", EXACT)
def test_codes_are_kept(twins, name: str):
    """对称的照原来的 4 位，有零点的照原来的 4 位与零点，或精确地写成 8 位：算子的定义还原出来与孪生逐位相同，三种写法都是，量化误差是零。"""
    packed, twin = twins[name]
    variant = VARIANTS[name]
    kind, bits = ("int4", 4) if variant.symmetric else ("int8", 8)
    form = BlockFormat.model_validate({"kind": kind, "block": 32, "scale": "float16"})
    recipe = bound(packed)[STACKED]
    want = load_array(STACKED, weight_recipes(twin.config, "float32")[STACKED], twin.store)
    codes, scales = quantized_recipes(recipe, form)
    read = [load_array(STACKED, part, packed.store) for part in (codes, scales)]
    assert np.array_equal(from_unsigned(read[0], read[1], bits), want)
    assert np.array_equal(load_quantized(STACKED, recipe, form, packed.store), want)
    signed = load_array(STACKED, quantized_recipes(recipe, form, signed=True)[0], packed.store)
    steps = signed.astype(np.float32).reshape(*read[1].shape, 32) * read[1].astype(np.float32)[..., None]
    assert np.array_equal(steps.reshape(want.shape), want)
    error = quantization_error(STACKED, codes, packed.store)
    assert (error.relative, error.max_abs) == (0.0, 0.0)
    assert int4_notes({"codes": codes, "scales": scales}) == []


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("block", [32, 64])
def test_zero_points_are_kept(tmp_path: Path, name: str, block: int):
    """EXPORT-41：有零点的在放得下零点的算子里也是原来的 4 位，零点逐块给出，几块一组的相同；对称的没有零点。"""
    variant = replace(VARIANTS[name], group=64)
    paths = int4_twins(
        tmp_path,
        variant,
        SMALL | {"intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32},
    )
    packed, twin = (Checkpoint.open(path) for path in paths)
    recipe = bound(packed)[STACKED]
    plain = BlockFormat.model_validate({"kind": "int4", "block": block, "scale": "float16"})
    form = with_zeros(recipe.int4, plain)
    assert form.zeros is not variant.symmetric
    want = load_array(STACKED, weight_recipes(twin.config, "float32")[STACKED], twin.store)
    parts = [*quantized_recipes(recipe, form), *([zero_points(recipe, form)] if form.zeros else [])]
    codes, scales, *zeros = (load_array(STACKED, part, packed.store) for part in parts)
    assert np.array_equal(from_unsigned(codes, scales, 4, *zeros), want)
    assert np.array_equal(load_quantized(STACKED, recipe, form, packed.store), want)
    error = quantization_error(STACKED, parts[0], packed.store)
    assert (error.relative, error.max_abs) == (0.0, 0.0)
    assert int4_notes(dict(enumerate(parts))) == []
    if form.zeros:
        assert parts[2].nbytes == recipe.shape[0] * recipe.shape[1]  # 64 列至多两块，一个字节
        chunked = [piece.reshape(-1) for piece in materialize(STACKED, parts[2], packed.store, 4 * 64 * 5)]
        assert np.array_equal(np.concatenate(chunked), zeros[0].reshape(-1))


def test_stored_nibbles_are_the_written_nibbles(twins):
    """kimi 的 4 位原封不动：文件里的字节就是 ``dsx::Int4Experts`` 的码的字节。"""
    packed, _ = twins["kimi"]
    form = BlockFormat(kind="int4", block=32, scale="float16")
    codes = load_array(STACKED, quantized_recipes(bound(packed)[STACKED], form)[0], packed.store)
    stored = [
        packed.store.read(f"model.layers.1.mlp.experts.{e}.down_proj.weight_packed").view(np.uint8)
        for e in range(SMALL["n_routed_experts"])
    ]
    assert codes.tobytes() == b"".join(one.tobytes() for one in stored)


def test_int8_rows_of_the_absorbed_weight(twins):
    """kv_b 的「码与 scale 在一起的行」也照原来的码。"""
    packed, twin = twins["awq"]
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    form = BlockFormat(kind="int8", block=32, scale="float16")
    rows = load_array(name, packed_rows(bound(packed)[name], form), packed.store)
    steps, scales = rows[:, :32].astype(np.float32), rows[:, 32:].copy().view(np.float16).astype(np.float32)
    assert np.array_equal(steps * scales, twin.store.read(name))


def test_a_group_wider_than_the_block_repeats_its_scale(tmp_path: Path):
    """组是块的几倍时，几块的 scale 相同，仍是原来的码；除不尽就重新量化，而且说出来。"""
    variant = Variant("gptq", group=64, packed=lambda name: name.endswith("experts.1.gate_proj.weight"))
    path, twin = int4_twins(tmp_path, variant, SMALL)
    checkpoint = Checkpoint.open(path)
    name = "model.layers.1.mlp.experts.1.gate_proj.weight"
    recipe = Recipe(op="copy", sources=(name,), shape=(64, 64), dtype="float32")
    own = bind_recipes({name: recipe}, checkpoint)[name]
    for block, kept in ((32, True), (64, True), (128, False)):
        form = BlockFormat.model_validate({"kind": "int4", "block": block, "scale": "float16"})
        codes, scales = quantized_recipes(own, form)
        got = from_unsigned(*(load_array(name, part, checkpoint.store) for part in (codes, scales)), 4)
        assert np.array_equal(got[:, :64], Checkpoint.open(twin).store.read(name)) is kept
        assert bool(int4_notes({name: codes})) is not kept


@pytest.mark.parametrize("name", [name for name in VARIANTS if "actorder" in name])
def test_groups_in_any_order(twins, name: str):
    """act-order：还原成浮点是精确的；照原来的码写不出来，按名字拒绝；重新量化的说出来。"""
    packed, _ = twins[name]
    assert "experts" in refused("DSX-E653", published_quantization, packed, 0, True).what
    form = BlockFormat(kind="int4", block=32, scale="float16")
    codes, _ = quantized_recipes(bound(packed)[STACKED], form)
    assert "重新量化" in int4_notes({"codes": codes})[0]
    assert quantization_error(STACKED, codes, packed.store).relative > 0


def test_declared_act_order_but_in_order(twins, tmp_path: Path):
    """写着 desc_act 而 g_idx 依次排列（static_groups），就照原来的码。"""
    packed, _ = twins["gptq"]
    checkpoint = Checkpoint.open(declared(packed.path, tmp_path, desc_act=True))
    assert published_quantization(checkpoint, 0, affine=False).kind == "int4"


def test_as_published(twins):
    """不是 4 位的都保留浮点，写得短；对称的 int4，有零点的看目标放不放得下：int4 或 int8；不是 4 位的检查点没有可以照搬的。"""
    kimi = published_quantization(twins["kimi"][0], 0, affine=False)
    keep = ("embed_tokens", "self_attn", "layers.0", "shared_experts", "lm_head")
    assert kimi == Quantization(kind="int4", block=32, keep=keep)
    for affine, kind in ((True, "int4"), (False, "int8")):
        awq = published_quantization(twins["awq"][0], 0, affine)
        assert awq == Quantization(kind=kind, block=32, keep=("embed_tokens", "lm_head"))
    refused("DSX-E653", published_quantization, twins["kimi"][1], 0, False)
    assert dtype_conflict(twins["kimi"][0]) is None


def test_widening_is_said(twins):
    notes = int4_notes(bound(twins["kimi"][0]))
    assert len(notes) == 1
    assert "--quant checkpoint" in notes[0]


class TestScales:
    """scale 换 dtype：放不下的舍入，误差算得出；超出范围的拒绝。"""

    def test_too_small_for_float16(self, tmp_path: Path):
        path, _ = int4_twins(tmp_path, Variant("compressed-tensors", scales=torch.bfloat16, small=True))
        checkpoint = Checkpoint.open(path)
        for scale, exact in (("float16", False), ("bfloat16", True), ("float32", True)):
            form = BlockFormat.model_validate({"kind": "int4", "block": 32, "scale": scale})
            codes, _ = quantized_recipes(bound(checkpoint)[STACKED], form)
            assert (quantization_error(STACKED, codes, checkpoint.store).max_abs == 0) is exact

    def test_too_large_for_float16(self, twins, tmp_path: Path):
        key = f"{DOWN}.weight_scale".replace(".", "__")
        scales = load_file(twins["kimi"][0].path / "model.safetensors")[f"{DOWN}.weight_scale"] * 1e7
        checkpoint = Checkpoint.open(changed(twins["kimi"][0].path, tmp_path, **{key: scales}))
        form = BlockFormat(kind="int4", block=32, scale="float16")
        part = quantized_recipes(bound(checkpoint)[STACKED], form)[1]
        assert DOWN in refused("DSX-E116", load_array, STACKED, part, checkpoint.store).what

    def test_not_finite(self, twins, tmp_path: Path):
        scales = load_file(twins["kimi"][0].path / "model.safetensors")[f"{DOWN}.weight_scale"].clone()
        scales[3, 0] = float("nan")
        key = f"{DOWN}.weight_scale".replace(".", "__")
        checkpoint = Checkpoint.open(changed(twins["kimi"][0].path, tmp_path, **{key: scales}))
        recipe = bound(checkpoint)[STACKED]
        assert DOWN in refused("DSX-E115", load_array, STACKED, recipe, checkpoint.store).what


class TestContradictions:
    """声明与文件、文件与它自己矛盾：按名字拒绝。"""

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            # 说了不量化，却是 4 位。
            ("kimi", {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.*"]}),
            # 说了量化，却不是。
            ("kimi", {"ignore": ["lm_head"]}),
            ("awq", {"modules_to_not_convert": ["lm_head", "experts"]}),
        ],
    )
    def test_ignore(self, twins, tmp_path: Path, name: str, changes: dict[str, Any]):
        refused("DSX-E651", Checkpoint.open, declared(twins[name][0].path, tmp_path, **changes))

    def test_nothing_packed(self, twins, tmp_path: Path):
        path = changed(twins["gptq"][1].path, tmp_path)
        (path / "config.json").write_bytes((twins["gptq"][0].path / "config.json").read_bytes())
        refused("DSX-E651", Checkpoint.open, path)

    def test_mixed_experts(self, twins, tmp_path: Path):
        weight = load_file(twins["gptq"][1].path / "model.safetensors")[f"{DOWN}.weight"]
        parts = tuple(f"{DOWN}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        path = changed(
            twins["gptq"][0].path, tmp_path, parts, **{f"{DOWN}.weight".replace(".", "__"): weight}
        )
        checkpoint = Checkpoint.open(path)
        assert DOWN in refused("DSX-E651", bound, checkpoint).what

    @pytest.mark.parametrize(
        ("name", "part", "edit"),
        [
            ("kimi", "weight_shape", lambda t: t + 1),
            ("gptq", "qzeros", lambda t: t ^ 1),
            ("gptq-asym", "qzeros", lambda t: t | 15),
            ("gptq", "g_idx", lambda t: t + 7),
            ("gptq-actorder", "g_idx", lambda t: t - 1),
            ("gptq", "g_idx", lambda t: t.flip(0)),
        ],
    )
    def test_contents(self, twins, tmp_path: Path, name: str, part: str, edit):
        """sym 而零点不是 8、v1 的 15、越界与没有声明的次序、写错的形状。"""
        source = twins[name][0].path
        key = f"{DOWN}.{part}"
        value = edit(load_file(source / "model.safetensors")[key])
        checkpoint = Checkpoint.open(changed(source, tmp_path, **{key.replace(".", "__"): value}))
        recipe = bound(checkpoint)[STACKED]
        assert DOWN in refused("DSX-E652", load_array, STACKED, recipe, checkpoint.store).what

    def test_missing_and_misshapen_parts(self, twins, tmp_path: Path):
        source = twins["kimi"][0].path
        name = f"{DOWN}.weight_scale"
        (tmp_path / "a").mkdir()
        assert name in refused("DSX-E111", Checkpoint.open, changed(source, tmp_path / "a", (name,))).what
        (tmp_path / "b").mkdir()
        path = changed(source, tmp_path / "b", **{name.replace(".", "__"): torch.ones(64, 3)})
        assert name in refused("DSX-E113", Checkpoint.open, path).what
        (tmp_path / "c").mkdir()
        path = changed(
            source, tmp_path / "c", **{name.replace(".", "__"): torch.ones(64, 2, dtype=torch.int32)}
        )
        assert name in refused("DSX-E114", Checkpoint.open, path).what

    def test_a_width_that_groups_do_not_divide(self, tmp_path: Path):
        path, _ = int4_twins(tmp_path, Variant("gptq"))
        assert "128" in refused("DSX-E650", Checkpoint.open, declared(path, tmp_path, group_size=128)).what


GROUP = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def grouped(group: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": GROUP | (group or {}) | {"weights": WEIGHTS | weights}}}


class TestConfig:
    """只收认得的变体。"""

    def layout(self, variant: Variant, **changes: Any) -> Int4Layout:
        config = SMALL | {"quantization_config": quantization_config(variant, []) | changes}
        parsed = parse_model_config(config | {"torch_dtype": "bfloat16"}, "x").int4
        assert parsed is not None
        return parsed.layout

    def test_published(self):
        """Kimi-K2-Thinking 的写法；AWQ、GPTQ 各家的写法。"""
        ignore = [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ]
        assert self.layout(KIMI, ignore=ignore) == Int4Layout("compressed-tensors", 32, symmetric=True)
        longer = [r"re:.*(?:^|\.)(?:attn|self_attn)(?:\.|$).*", r"re:model\.layers\.\d+\.mlp\.up_proj$"]
        assert self.layout(KIMI, ignore=longer) == Int4Layout("compressed-tensors", 32, symmetric=True)
        static = grouped(actorder="static", group_size=128, scale_dtype=None, zp_dtype=None)
        assert not self.layout(KIMI, **static).act_order
        awq = Variant("awq")
        assert self.layout(awq, version="GEMM", modules_to_not_convert=["mlp.gate"]).group == 32
        assert self.layout(awq, version=None, format="gemm", backend="auto").method == "awq"
        gptq = Variant("gptq")
        assert self.layout(gptq, meta={"quantizer": ["gptqmodel:2.0"]}, pack_dtype="int32").minus_one
        assert not self.layout(gptq, checkpoint_format=None, format="gptq_v2").minus_one

    @pytest.mark.parametrize(
        ("variant", "changes", "named"),
        [
            (KIMI, grouped(num_bits=8), "num_bits"),
            (KIMI, grouped(num_bits=3), "num_bits"),
            (KIMI, grouped(type="float"), "type"),
            (KIMI, grouped(strategy="channel", group_size=None), "strategy"),
            (KIMI, grouped(group_size=16), "group_size"),
            (KIMI, grouped(group_size=True), "group_size"),
            (KIMI, grouped(actorder="weird"), "actorder"),
            (KIMI, grouped(dynamic=True), "dynamic"),
            (KIMI, grouped(block_structure="2x4"), "block_structure"),
            (KIMI, grouped(unheard_of=1), "unheard_of"),
            (KIMI, grouped({"input_activations": {"num_bits": 8}}), "input_activations"),
            (KIMI, grouped({"output_activations": {"num_bits": 8}}), "output_activations"),
            (KIMI, grouped({"format": "marlin-24"}), "format"),
            (KIMI, grouped({"targets": []}), "targets"),
            (KIMI, {"config_groups": {}}, "config_groups"),
            (KIMI, {"config_groups": {"a": 1}}, "config_groups"),
            (KIMI, {"format": "nvfp4-pack-quantized"}, "format"),
            (KIMI, {"quantization_status": "frozen"}, "quantization_status"),
            (KIMI, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
            (KIMI, {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
            (KIMI, {"transform_config": {"config_groups": {}}}, "transform_config"),
            (KIMI, {"ignore": ["re:(a+)+b"]}, "ignore"),
            (KIMI, {"ignore": ["re:.*.*.*.*x"]}, "ignore"),
            (KIMI, {"ignore": ["re:("]}, "ignore"),
            (KIMI, {"ignore": ["re:(.|.)(.|.)x"]}, "ignore"),
            (KIMI, {"ignore": ["re:(|)(|)x"]}, "ignore"),
            (KIMI, {"ignore": ["re:((a))"]}, "ignore"),
            (KIMI, {"ignore": ["re:a{9}"]}, "ignore"),
            (KIMI, {"ignore": ["re:x"] * 65}, "ignore"),
            (KIMI, {"ignore": [1]}, "ignore"),
            (Variant("awq"), {"bits": 8}, "bits"),
            (Variant("awq"), {"version": "gemv"}, "version"),
            (Variant("awq"), {"version": "marlin"}, "version"),
            (Variant("awq"), {"backend": "llm-awq"}, "backend"),
            (Variant("awq"), {"zero_point": False}, "zero_point"),
            (Variant("awq"), {"zero_point": None}, "zero_point"),
            (Variant("awq"), {"do_fuse": True}, "do_fuse"),
            (Variant("awq"), {"group_size": -1}, "group_size"),
            (Variant("gptq"), {"bits": 3}, "bits"),
            (Variant("gptq"), {"checkpoint_format": "marlin"}, "checkpoint_format"),
            (Variant("gptq"), {"is_marlin_format": True}, "is_marlin_format"),
            (Variant("gptq"), {"dynamic": {"-:lm_head": {}}}, "dynamic"),
            (Variant("gptq"), {"pack_dtype": "int64"}, "pack_dtype"),
            (Variant("gptq"), {"sym": "yes"}, "sym"),
            (Variant("gptq"), {"unheard_of": 1}, "unheard_of"),
        ],
    )
    def test_refused_by_name(self, variant: Variant, changes: dict[str, Any], named: str):
        with pytest.raises(DsxError) as err:
            self.layout(variant, **changes)
        assert err.value.code == "DSX-E650"
        assert named in str(err.value)
