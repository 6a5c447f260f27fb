"""profile.py：组合、覆盖、报错。"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_export.errors import DsxError
from deepseek_export.profile import BUILTIN_PROFILES, MlaSection, OptimizationProfile, resolve_profile
from tests.odd_files import KINDS, make_odd

pytestmark = pytest.mark.unit


def refused(code: str, spec: object, *overrides: str) -> DsxError:
    with pytest.raises(DsxError) as err:
        resolve_profile(spec, overrides)  # type: ignore[arg-type]
    assert err.value.code == code
    return err.value


def test_default_is_all_off():
    profile = resolve_profile("baseline")
    assert profile == OptimizationProfile()
    assert (profile.mla.enabled, profile.moe.enabled, profile.mtp.enabled) == (False, False, False)
    assert profile.name == "baseline"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("mla", "mla"),
        ("moe+mla", "mla+moe"),
        ("mla+moe", "mla+moe"),
        ("baseline+mtp", "mtp"),
        ("mla + moe + mtp", "full"),
        ("full+mla", "full"),
    ],
)
def test_composition_is_a_union(spec, name):
    assert resolve_profile(spec).name == name


def test_builtins_resolve_to_themselves():
    for name, profile in BUILTIN_PROFILES.items():
        assert resolve_profile(name) == resolve_profile(profile) == profile
        assert profile.name == name


def test_the_index_cache_is_its_own_switch():
    """不随 MLA 开关；没有索引器的模型不收（DSX-E136）。"""
    profile = resolve_profile("baseline", ["dsa.index_cache_dtype=int8"])
    assert (profile.name, profile.overrides) == ("baseline", ["dsa.index_cache_dtype=int8"])
    profile.check_model("deepseek_v32", True)
    resolve_profile("full").check_model("deepseek_v3", False)
    with pytest.raises(DsxError) as caught:
        profile.check_model("deepseek_v3", False)
    assert caught.value.code == "DSX-E136"
    refused("DSX-E003", "mla", "dsa.index_cache_dtype=float16")


def test_overrides_are_typed_and_the_last_one_wins():
    overrides = ("mla.form=naive", "mla.form=absorb", "mtp.num_draft_tokens=3", "moe.enabled=false")
    profile = resolve_profile("full", overrides)
    assert (profile.mla.form, profile.mtp.num_draft_tokens, profile.name) == ("absorb", 3, "mla+mtp")
    assert resolve_profile("mla", ['mla.form="naive"']).mla.form == "naive"
    assert resolve_profile("baseline", ["mla.enabled=true", "mla.form=naive"]).mla.form == "naive"


def test_unknown_profile_suggests_the_nearest():
    error = refused("DSX-E001", "mal")
    assert "mla" in error.todo
    assert "full" in error.todo
    refused("DSX-E001", "")
    refused("DSX-E001", "mla+")


@pytest.mark.parametrize("override", ["mla.fom=absorb", "mlaa.form=absorb", "form=absorb", "mla=1", ""])
def test_unknown_key(override):
    assert "mla.form" in refused("DSX-E002", "mla", override).todo


def test_overrides_given_as_one_string():
    """一个个字符地看，说的就是“没有 m 这个键”：说清要的是列表。"""
    with pytest.raises(DsxError, match="overrides 是字符串") as error:
        resolve_profile("mla", "mla.form=absorb")
    assert error.value.code == "DSX-E002"
    assert '["mla.form=absorb"]' in error.value.todo


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("mla.form=fast", "absorb、naive、auto"),
        ("mla.form", "absorb、naive、auto"),
        ("mla.form=1\nx=2", "absorb"),
        ("mla.enabled=1", "true、false"),
        ("mla.enabled=yes", "true、false"),
        ("mtp.num_draft_tokens=0", "1 到 8"),
        ("mtp.num_draft_tokens=9", "1 到 8"),
        ("mtp.num_draft_tokens=true", "1 到 8"),
        ("mtp.num_draft_tokens=2.0", "1 到 8"),
        ("moe.experts=dense", "sparse"),
    ],
)
def test_bad_value_names_key_value_and_allowed(override, allowed):
    error = refused("DSX-E003", "full", override)
    assert override.partition("=")[0] in error.what
    assert allowed in error.todo


@pytest.mark.parametrize(
    ("spec", "override"),
    [
        ("moe", "mla.form=absorb"),
        ("moe", "mla.form=auto"),
        ("moe", "mla.cache_dtype=float32"),
        ("moe", "mla.cache_dtype=int8"),
        ("mla", "mtp.num_draft_tokens=1"),
        ("mla", "mtp.verify=rejection"),
        ("moe", "fallback.on_drift=naive"),
    ],
)
def test_impossible_combination(spec, override):
    assert override.partition("=")[0] in refused("DSX-E004", spec, override).what


def test_naive_fallback_needs_another_form():
    assert resolve_profile("mla", ["fallback.on_drift=naive"]).fallback.on_drift == "naive"
    refused("DSX-E004", "mla", "fallback.on_drift=naive", "mla.form=naive")


def test_direct_construction_is_checked_too():
    with pytest.raises(DsxError) as err:
        OptimizationProfile(mla=MlaSection(form="naive"))
    assert err.value.code == "DSX-E004"


def test_toml_files_compose_and_conflict(tmp_path: Path):
    file = tmp_path / "mine+1.toml"
    file.write_text('[mla]\nenabled = true\nform = "absorb"\n')
    assert resolve_profile(str(file)) == resolve_profile(file) == resolve_profile("mla", ["mla.form=absorb"])
    file = file.rename(tmp_path / "mine.toml")
    assert resolve_profile(f"moe+{file}").name == "mla+moe"
    other = tmp_path / "other.toml"
    other.write_text('[mla]\nenabled = true\nform = "naive"\n')
    error = refused("DSX-E004", f"{file}+{other}")
    assert "absorb" in error.what
    assert "naive" in error.what


@pytest.mark.parametrize("text", ["mla = [", "\x00", "mla.enabled = true\nmla.enabled = true"])
def test_broken_toml(tmp_path: Path, text):
    file = tmp_path / "p.toml"
    file.write_text(text)
    refused("DSX-E005", file)


def test_toml_missing_or_not_utf8(tmp_path: Path):
    refused("DSX-E005", str(tmp_path / "none.toml"))
    refused("DSX-E005", tmp_path)
    for kind in KINDS:
        make_odd(tmp_path / "odd.toml", kind)
        refused("DSX-E005", tmp_path / "odd.toml")
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe")
    refused("DSX-E005", tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("text", "code"),
    [("[mla]\nfom = 1", "DSX-E002"), ("[gpu]\nx = 1", "DSX-E002"), ("mla = 1", "DSX-E003")],
)
def test_toml_content_is_checked(tmp_path: Path, text, code):
    (tmp_path / "p.toml").write_text(text)
    refused(code, tmp_path / "p.toml")


@given(
    spec=st.sampled_from(["mla", "mla+moe", "mla+mtp", "full"]),
    form=st.sampled_from(["absorb", "naive", "auto"]),
    cache=st.sampled_from(["model", "float32", "float16", "bfloat16", "int8"]),
)
def test_toml_round_trip(tmp_path_factory, spec, form, cache):
    profile = resolve_profile(spec, [f"mla.form={form}", f"mla.cache_dtype={cache}"])
    file = tmp_path_factory.mktemp("p") / "p.toml"
    file.write_text(profile.to_toml())
    assert resolve_profile(file) == profile


@given(st.text())
def test_any_override_is_accepted_or_refused_by_code(text):
    with contextlib.suppress(DsxError):
        resolve_profile("full", [text, f"mla.form={text}"])


def test_overrides_lead_back_to_the_same_profile():
    """名字加上 overrides，再解析得到同一个方案。"""
    profile = resolve_profile(
        "mla+mtp", ["mla.form=absorb", "mtp.num_draft_tokens=3", "fallback.on_drift=naive"]
    )
    assert profile.overrides == ["mla.form=absorb", "mtp.num_draft_tokens=3", "fallback.on_drift=naive"]
    assert resolve_profile(profile.name, profile.overrides) == profile
    assert resolve_profile("full").overrides == []
