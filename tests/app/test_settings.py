"""Settings: three sources in order, and no name that is not a setting passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import SettingsError, StartError
from app.service import Service, tenant_salt
from app.settings import load_settings

from .conftest import OpenKit


def test_the_environment_wins_over_the_file_and_a_flag_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ragblend.yaml"
    file.write_text("port: 1\nchunk_tokens: 2\nmodel_name: file\ncompile: {context: prefix, budget: 10}\n")
    monkeypatch.setenv("RAGBLEND_CHUNK_TOKENS", "3")
    monkeypatch.setenv("RAGBLEND_MODEL_NAME", "environment")
    monkeypatch.setenv("RAGBLEND_COMPILE__BUDGET", "20")
    settings = load_settings(file, model_name="flag", port=None)
    assert (settings.port, settings.chunk_tokens, settings.model_name) == (1, 3, "flag")
    assert (settings.compile.context, settings.compile.budget) == ("prefix", 20)


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ragblend.yaml"
    file.write_text("port: 17\n")
    monkeypatch.setenv("RAGBLEND_CONFIG", str(file))
    assert load_settings().port == 17


@pytest.mark.parametrize(
    ("file", "environment", "flags", "said"),
    [
        ("prot: 1", {}, {}, "did you mean port"),
        ("compile: {budgte: 1}", {}, {}, "did you mean compile.budget"),
        ("", {"RAGBLEND_PROT": "1"}, {}, "did you mean RAGBLEND_PORT"),
        ("", {"RAGBLEND_LIMITS__MESAGES": "1"}, {}, "did you mean RAGBLEND_LIMITS__MESSAGES"),
        ("", {}, {"prot": 1}, "did you mean port"),
        ("", {}, {"limits": {"stopp": 1}}, "did you mean limits.stop"),
        ("port: abc", {}, {}, "port: .*not 'abc'"),
        ("engine: tensorrt", {}, {}, "engine: .*'vllm'.*not 'tensorrt'"),
        ("blend: {recompute_ratio: 1.5}", {}, {}, "blend.recompute_ratio: .*less than or equal to 1"),
        ("[1, 2]", {}, {}, "names and values"),
        ("port: [", {}, {}, "is not YAML"),
        ("!!python/object/apply:os.getcwd []", {}, {}, "is not YAML"),
        ("api_key: ''", {}, {}, "api_key is empty"),
    ],
)
def test_a_wrong_name_or_value_is_an_error_that_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, environment: dict[str, str], flags: dict, said: str
) -> None:
    path = tmp_path / "ragblend.yaml"
    path.write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said):
        load_settings(path, **flags)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_only_loopback_is_served_without_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match="no api_key is set"):
        load_settings(host=host)
    assert load_settings(host=host, api_key="secret").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load_settings(host=host).api_key is None


def test_the_key_is_never_shown() -> None:
    settings = load_settings(api_key="top-secret")
    assert "top-secret" not in repr(settings) + str(settings) + settings.model_dump_json()
    with pytest.raises(SettingsError) as caught:
        load_settings(api_key=["top-secret"])
    assert "top-secret" not in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.limits.n = 100  # type: ignore[misc]


async def test_an_unknown_model_folder_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"'nowhere/model' is not a folder"):
        await Service.open(load_settings(model="nowhere/model", data_dir=tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartError, match=r"no config\.json"):
        await Service.open(load_settings(model=str(tmp_path / "empty"), data_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


async def test_a_selector_that_cannot_be_used_is_told_at_the_start(open_kit: OpenKit) -> None:
    with pytest.raises(StartError, match=r"blend\.selector cannot be used: .*'heads' has no option 'row'"):
        await open_kit(blend={"selector": "heads(row=1)"})
    with pytest.raises(StartError, match=r"names layer 3; the model has layers 0 to 0"):
        await open_kit(blend={"selector": "question(layers=3)"})


def test_the_tenant_salt_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    salt = tenant_salt(tmp_path)
    file = tmp_path / "tenants" / "default.salt"
    assert len(salt) == 32
    assert tenant_salt(tmp_path) == salt
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in file.parent.iterdir()] == ["default.salt"]
    file.write_bytes(b"short")
    with pytest.raises(StartError, match="holds 5 bytes"):
        tenant_salt(tmp_path)


def test_the_engines_own_arguments_pass_through_and_nothing_else_does(tmp_path: Path) -> None:
    file = tmp_path / "ragblend.yaml"
    file.write_text("engine_options: {gpu_memory_utilization: 0.8, compilation_config: {level: 3}}\n")
    assert load_settings(file).engine_options == {"gpu_memory_utilization": 0.8, "compilation_config": {"level": 3}}
    file.write_text("engine_option: {gpu_memory_utilization: 0.8}\n")
    with pytest.raises(SettingsError, match="did you mean engine_options"):
        load_settings(file)
