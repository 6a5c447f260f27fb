"""checkpoint/checkpoint.py 与 synthetic.py：核对、MTP、与 transformers 互通。"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from deepseek_export.checkpoint import Checkpoint, dtype_conflict, expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint, write_demo_checkpoint
from deepseek_export.errors import DsxError
from tools.make_checkpoint import main as maker

pytestmark = pytest.mark.unit

TINY: dict[str, Any] = dict(DEMO_CONFIG) | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_V2 = {
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}
TINY_V2: dict[str, Any] = {
    key: value for key, value in (TINY | _V2).items() if key != "num_nextn_predict_layers"
} | {"q_lora_rank": None, "architectures": ["DeepseekV2ForCausalLM"]}
NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


def rewrite(path: Path, drop: tuple[str, ...] = (), **changes: np.ndarray) -> Path:
    file = path / "model.safetensors"
    arrays = load_file(file) | {name.replace("__", "."): array for name, array in changes.items()}
    save_file({name: array for name, array in arrays.items() if name not in drop}, file)
    return path


def refused(code: str, path: Path) -> DsxError:
    with pytest.raises(DsxError) as err:
        Checkpoint.open(path)
    assert err.value.code == code, err.value
    return err.value


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_synthetic_opens(tmp_path: Path, dtype):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY, dtype=dtype))
    assert set(checkpoint.store.names) == set(expected_tensors(checkpoint.config))
    assert (checkpoint.mtp_tensors, checkpoint.ignored, checkpoint.config.dtype) == ((), (), dtype)
    bias = checkpoint.store.read("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == np.float32


def test_bias_can_make_scores_negative(tmp_path: Path):
    store = Checkpoint.open(write_checkpoint(tmp_path, DEMO_CONFIG)).store
    assert (
        min(float(store.read(f"model.layers.{i}.mlp.gate.e_score_correction_bias").min()) for i in (1, 2, 3))
        < -0.5
    )


def test_same_bytes_whatever_the_shards(tmp_path: Path):
    one = Checkpoint.open(write_checkpoint(tmp_path / "1", TINY, seed=3, mtp=True)).store
    many = Checkpoint.open(write_checkpoint(tmp_path / "3", TINY, seed=3, mtp=True, shards=3)).store
    other = Checkpoint.open(write_checkpoint(tmp_path / "x", TINY, seed=4, mtp=True)).store
    assert len(list((tmp_path / "3").glob("*.safetensors"))) == 3
    assert all(np.array_equal(one.read(name), many.read(name)) for name in one.names)
    assert not np.array_equal(one.read(EMBED), other.read(EMBED))
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path / "1", TINY)
    with pytest.raises(ValueError, match="shards"):
        write_checkpoint(tmp_path / "y", TINY, shards=0)


def test_mtp_tensors_are_kept(tmp_path: Path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY, mtp=True))
    assert checkpoint.config.num_mtp_layers == 1
    assert set(checkpoint.mtp_tensors) == set(expected_mtp_tensors(checkpoint.config, 0))
    copy = checkpoint.store.read("model.layers.2.embed_tokens.weight")
    assert np.array_equal(copy, checkpoint.store.read(EMBED))


def test_mtp_layer_is_checked_like_the_rest(tmp_path: Path):
    path = write_checkpoint(tmp_path, TINY, mtp=True)
    copies = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    assert len(Checkpoint.open(rewrite(path, copies)).mtp_tensors) > 0
    assert "enorm" in refused("DSX-E111", rewrite(path, ("model.layers.2.enorm.weight",))).what


def test_attention_bias_and_no_shared_experts(tmp_path: Path):
    config = TINY | {"attention_bias": True, "n_shared_experts": None}
    names = Checkpoint.open(write_checkpoint(tmp_path, config)).store.names
    assert sum(name.endswith(".bias") for name in names) == 2 * 3
    assert not any("shared_experts" in name for name in names)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_not_a_directory(tmp_path: Path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    refused("DSX-E101", path)


def test_config_that_is_a_directory(tmp_path: Path):
    (tmp_path / "config.json").mkdir()
    what = refused("DSX-E102", tmp_path).what
    assert what.count("config.json") == 1, what


def test_a_dtype_the_config_does_not_state_is_reported(tmp_path: Path):
    """BF16 标成 F16 也打得开（transformers 同样以文件头为准），但要说一句；少数张量的 dtype 不同、FP8 都不说。"""
    path = write_checkpoint(tmp_path / "ckpt", TINY)
    assert dtype_conflict(Checkpoint.open(path)) is None
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" '))
    said = dtype_conflict(Checkpoint.open(path))
    assert said is not None
    assert "F16" in said
    assert "bfloat16" in said
    quantization: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    fp8 = write_checkpoint(tmp_path / "fp8", {**TINY, "quantization_config": quantization})
    assert dtype_conflict(Checkpoint.open(fp8)) is None


def test_missing_tensors_are_listed_up_to_five(tmp_path: Path):
    path = write_checkpoint(tmp_path, TINY)
    drop = tuple(
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("up", "down", "gate")
    )
    error = refused("DSX-E111", rewrite(path, drop))
    assert "6 个" in error.what
    assert error.what.count("experts") == 5


def test_extra_tensors(tmp_path: Path):
    path = write_checkpoint(tmp_path, TINY)
    one = np.zeros(1, np.float32)
    rewrite(path, model__layers__0__self_attn__rotary_emb__inv_freq=one)
    assert Checkpoint.open(path).ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    for name in ("surprise", "model__layers__9__x", "model__layers__2__x"):
        error = refused("DSX-E112", rewrite(path, **{name: one}))
        assert name.replace("__", ".") in error.what
        rewrite(path, (name.replace("__", "."),))


def test_wrong_shape(tmp_path: Path):
    path = write_checkpoint(tmp_path, TINY)
    error = refused("DSX-E113", rewrite(path, model__norm__weight=np.zeros(31, np.float32)))
    assert "[31]" in error.what
    assert "[32]" in error.what


@pytest.mark.parametrize("dtype", [np.int32, ml_dtypes.float8_e4m3fn, np.float64])
def test_wrong_dtype(tmp_path: Path, dtype):
    path = write_checkpoint(tmp_path, TINY)
    raw = np.zeros(32, dtype)
    if dtype is ml_dtypes.float8_e4m3fn:
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file as load
        from safetensors.torch import save_file as save

        file = path / "model.safetensors"
        save(load(file) | {NORM: torch.zeros(32, dtype=torch.float8_e4m3fn)}, file)
    else:
        rewrite(path, model__norm__weight=raw)
    assert NORM in refused("DSX-E114", path).what


def test_tied_head(tmp_path: Path):
    path = write_checkpoint(tmp_path, TINY | {"tie_word_embeddings": True})
    assert HEAD not in Checkpoint.open(path).store
    embed = load_file(path / "model.safetensors")[EMBED]
    assert Checkpoint.open(rewrite(path, lm_head__weight=embed)).ignored == (HEAD,)
    changed = embed.copy()
    changed[-1, -1] += 1
    refused("DSX-E117", rewrite(path, lm_head__weight=changed))
    refused("DSX-E117", rewrite(path, lm_head__weight=embed.astype(np.float32)))


def test_axk1_tensors(tmp_path: Path):
    """A.X-K1：MoE 层要有 post_mlp_layernorm；dense 层多带的、零偏置不用，偏置不是零的拒绝；V3 不认这个 norm。"""
    config = TINY | {"model_type": "axk1", "n_group": 1, "topk_group": 1}
    path = write_checkpoint(tmp_path / "x", config, dtype="float32")
    norm, bias = (
        "model.layers.{}.post_mlp_layernorm.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    )
    opened = Checkpoint.open(path)
    assert norm.format(1) in opened.store
    assert (norm.format(0) in opened.store, bias in opened.store, opened.ignored) == (False, False, ())
    hidden, experts = (np.ones(TINY[key], np.float32) for key in ("hidden_size", "n_routed_experts"))
    more = {norm.format(0).replace(".", "__"): hidden, bias.replace(".", "__"): 0 * experts}
    assert Checkpoint.open(rewrite(path, **more)).ignored == (norm.format(0), bias)
    assert bias in str(refused("DSX-E112", rewrite(path, **{bias.replace(".", "__"): experts})))
    refused("DSX-E113", rewrite(path, **{bias.replace(".", "__"): experts[1:]}))
    refused("DSX-E111", rewrite(path, drop=(norm.format(1), bias)))
    v3 = write_checkpoint(tmp_path / "v3", TINY, dtype="float32")
    refused("DSX-E112", rewrite(v3, **{norm.format(1).replace(".", "__"): hidden}))


@pytest.mark.parametrize(
    "config", [TINY, TINY_V2, TINY | {"tie_word_embeddings": True, "attention_bias": True}]
)
def test_opens_what_transformers_saved(tmp_path: Path, config):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.store.names) == set(expected_tensors(checkpoint.config))
    scale = model.model.layers[0].self_attn.scaling
    assert checkpoint.config.softmax_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("config", [TINY, TINY_V2, TINY | {"attention_bias": True}])
def test_transformers_loads_the_synthetic_one(tmp_path: Path, config):
    transformers = pytest.importorskip("transformers")
    import torch

    write_checkpoint(tmp_path, config, dtype="float32", shards=2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits
    top = logits.topk(2).values
    assert 1.0 < float(logits.std()) < 6.0
    assert float((top[..., 0] - top[..., 1]).median()) > 0.2


def test_demo_is_deterministic_and_its_tokenizer_round_trips(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    first, second = write_demo_checkpoint(tmp_path / "a"), write_demo_checkpoint(tmp_path / "b")
    names = sorted(file.name for file in first.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])
    tokenizer = transformers.AutoTokenizer.from_pretrained(first)
    assert len(tokenizer) <= Checkpoint.open(first).config.vocab_size
    for text in ("床前明月光", "All men are 平等\n\t😀 \u0000é"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0
        assert tokenizer.decode(ids[1:]) == text
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (
        text == "<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜>好<｜end▁of▁sentence｜><｜Assistant｜>"
    )
    assert tokenizer(text, add_special_tokens=False)["input_ids"][:2] == [0, 2]


@pytest.mark.parametrize(
    ("like", "shards", "mtp"),
    [
        ("deepseek-v3", 11, True),
        ("v2-lite", 1, False),
        ("kimi-k2", 4, False),
        ("kimi-k2-thinking", 4, False),
        ("glm-4.7-flash", 4, True),
        ("deepseek-v3.2", 11, True),
        ("glm-5", 14, True),
        ("sarvam-105b", 5, False),
        ("a.x-k1", 14, False),
    ],
)
def test_published_shapes_without_the_disk(tmp_path: Path, like: str, shards: int, mtp: bool):
    """--like：宽度、dtype、分片、MTP 层都是发布时的；--sparse-files 不占磁盘，读出来全零。"""
    arguments = ["--like", like, "--layers", "4", "--sparse-files", str(tmp_path)]
    result = CliRunner().invoke(maker, arguments)
    assert result.exit_code == 0
    assert "写权重（" in result.stderr
    checkpoint = Checkpoint.open(tmp_path)
    config, store = checkpoint.config, checkpoint.store
    assert config.num_hidden_layers == 4
    assert (len(store.files), bool(checkpoint.mtp_tensors)) == (shards, mtp)
    assert sum(file.stat().st_size for file in store.files) > 4e9
    assert sum(file.stat().st_blocks * 512 for file in store.files) < 10e6
    expert = f"model.layers.3.mlp.experts.{config.n_routed_experts - 1}.down_proj.weight"
    shape, dtype = (config.hidden_size, config.moe_intermediate_size), "BF16"
    if config.weight_block_size is not None:
        dtype = "F8_E4M3"
    if config.int4 is not None:
        expert, shape, dtype = f"{expert}_packed", (shape[0], shape[1] // 8), "I32"
    assert (store[expert].shape, store[expert].dtype) == (shape, dtype)
    assert not store.read_rows(expert, 0, 2).any()


def test_maker_refuses_contradicting_options(tmp_path: Path):
    for arguments in (
        ["--demo", "--like", "v2-lite"],
        ["--demo", "--layers", "2"],
        ["--demo", "--sparse-files"],
    ):
        assert CliRunner().invoke(maker, [*arguments, str(tmp_path / "x")]).exit_code == 2


def test_shards_are_about_equal_in_bytes(tmp_path: Path):
    files = Checkpoint.open(write_checkpoint(tmp_path, DEMO_CONFIG, shards=5)).store.files
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 5
    assert max(sizes) < 2 * min(sizes)


def test_command_line(tmp_path: Path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps(TINY))
    main, run = maker, CliRunner().invoke
    assert run(main, ["--config", str(config), "--shards", "2", "--mtp", str(tmp_path / "m")]).exit_code == 0
    assert Checkpoint.open(tmp_path / "m").mtp_tensors
    assert run(main, [str(tmp_path / "n")]).exit_code == 2
    config.write_text("{}")
    result = run(main, ["--config", str(config), str(tmp_path / "n")])
    assert (result.exit_code, "DSX-E103" in result.output) == (1, True)
