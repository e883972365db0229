"""Settings: which source wins, and what a wrong key or value is told."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from turnwise.credit import PRESETS
from turnwise.errors import InvalidInput
from turnwise.settings import (
    CreditSettings,
    Settings,
    effective_values,
    load_settings,
    secret_values,
)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "my.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def refusal(text: str = "", **environ: str) -> str:
    """The one line that a file or an environment earns."""
    with pytest.raises(InvalidInput) as error:
        load_settings(Settings, write(text), environ)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_environment_wins_over_file_and_file_over_default() -> None:
    path = write('log_format = "json"\n[credit]\nnorm = "joint"\ngamma = 0.9\n')
    environ = {"TURNWISE_CREDIT__GAMMA": "0.5", "TURNWISE_API_TOKEN": "s3cret", "HOME": "/x"}

    settings, sources = load_settings(Settings, path, environ)

    assert settings.log_level == "info"
    assert settings.log_format == "json"
    assert settings.credit == CreditSettings(norm="joint", gamma=0.5)
    assert sources == {
        "log_level": "default",
        "log_format": "my.toml",
        "api_token": "TURNWISE_API_TOKEN",
        "run": "default",
        "redis_url": "default",
        "weights_root": "default",
        "credit.preset": "default",
        "credit.gain": "default",
        "credit.norm": "my.toml",
        "credit.gamma": "TURNWISE_CREDIT__GAMMA",
    }


def test_the_file_is_the_argument_then_the_variable_then_turnwise_toml() -> None:
    assert load_settings(Settings, None, {})[0].log_level == "info"

    write('log_level = "error"', "turnwise.toml")
    other, third = write('log_level = "debug"', "b.toml"), write('log_level = "warning"', "c.toml")
    environ = {"TURNWISE_CONFIG": str(other)}

    assert load_settings(Settings, None, {})[0].log_level == "error"
    assert load_settings(Settings, None, environ)[0].log_level == "debug"
    assert load_settings(Settings, third, environ)[0].log_level == "warning"


def test_an_empty_variable_and_an_empty_section_count_as_not_set() -> None:
    environ = {"TURNWISE_API_TOKEN": "", "TURNWISE_CONFIG": ""}

    assert load_settings(Settings, write("[credit]\n"), environ)[0] == Settings()


def test_constructing_a_class_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_LOG_LEVEL", "error")

    assert Settings().log_level == "info"


def test_settings_are_frozen_and_hide_their_secrets() -> None:
    settings, _ = load_settings(Settings, None, {"TURNWISE_API_TOKEN": "s3cret"})

    assert "s3cret" not in repr(settings)
    assert effective_values(settings)["api_token"] == "*" * 10
    assert secret_values(settings) == ["s3cret"]
    with pytest.raises(ValidationError):
        settings.log_level = "error"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("log_levl = 1", "log_levl: unknown key in my.toml; the nearest is log_level"),
        ("[credit]\nnrom = 1", "credit.nrom: unknown key in my.toml; the nearest is credit.norm"),
        ("[kredit]", "kredit: unknown key in my.toml; the nearest is credit.norm"),
        ("credit = 3", "credit: unknown key in my.toml; the nearest is credit.norm"),
        (
            "[credit]\ngamma = 1.5",
            "credit.gamma: input should be less than or equal to 1, got 1.5 (from my.toml)",
        ),
        (
            "[credit]\ngamma = nan",
            "credit.gamma: input should be less than or equal to 1, got nan (from my.toml)",
        ),
        (
            'log_format = "xml"',
            "log_format: input should be 'text' or 'json', got 'xml' (from my.toml)",
        ),
        ("log_level = ", "my.toml: is no TOML file: Invalid value (at end of document)"),
        ("a = " + "[" * 10_000, "my.toml: is no TOML file: maximum recursion depth exceeded"),
        ("#" * (2**20 + 1), "my.toml: is larger than the limit of 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(text: str, line: str) -> None:
    assert refusal(text).startswith(line)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "TURNWISE_LOG_LEVL",
            "info",
            "TURNWISE_LOG_LEVL: unknown variable in the environment; "
            "the nearest is TURNWISE_LOG_LEVEL",
        ),
        (
            "TURNWISE_CREDIT_NORM",
            "joint",
            "TURNWISE_CREDIT_NORM: unknown variable in the environment; "
            "the nearest is TURNWISE_CREDIT__NORM",
        ),
        (
            "TURNWISE_CREDIT__GAMMA",
            "-1",
            "credit.gamma: input should be greater than or equal to 0, got '-1' "
            "(from TURNWISE_CREDIT__GAMMA)",
        ),
    ],
)
def test_a_wrong_variable_is_told_in_one_line(name: str, value: str, line: str) -> None:
    assert refusal(**{name: value}) == line


@pytest.mark.parametrize("text", ["api_token = 424242", 'api_token = ["424242"]'])
def test_a_refused_secret_is_not_shown(text: str) -> None:
    assert refusal(text) == "api_token: input should be a valid string (from my.toml)"


def test_a_file_that_cannot_be_read_names_its_path(tmp_path: Path) -> None:
    Path("latin1.toml").write_bytes(b'log_level = "\xe9"')
    for path, problem in {
        "nowhere.toml": "No such file or directory",
        str(tmp_path): "Is a directory",
        "latin1.toml": "is no TOML file: 'utf-8' codec can't decode byte 0xe9",
    }.items():
        with pytest.raises(InvalidInput) as error:
            load_settings(Settings, Path(path), {})
        assert str(error.value).startswith(f"{path}: {problem}")


def test_a_service_adds_its_own_keys_with_lists_and_required_ones() -> None:
    class ServiceSettings(Settings):
        model_path: str
        queries: tuple[int, ...] = ()

    environ = {"TURNWISE_MODEL_PATH": "m", "TURNWISE_QUERIES": "[1, 2]"}
    settings, sources = load_settings(ServiceSettings, None, environ)

    assert (settings.model_path, settings.queries) == ("m", (1, 2))
    assert sources["queries"] == "TURNWISE_QUERIES"
    with pytest.raises(InvalidInput, match=r"^model_path: field required"):
        load_settings(ServiceSettings, None, {})
    with pytest.raises(InvalidInput, match='field "queries"'):
        load_settings(ServiceSettings, None, {"TURNWISE_QUERIES": "[1"})


def test_every_preset_of_credit_can_be_set() -> None:
    assert list(get_args(CreditSettings.model_fields["preset"].annotation)) == list(PRESETS)


def test_the_password_of_a_url_is_a_secret_of_its_own() -> None:
    environ = {"TURNWISE_REDIS_URL": "redis://user:p4ss@host:6379/0"}

    settings, _ = load_settings(Settings, None, environ)

    assert secret_values(settings) == ["redis://user:p4ss@host:6379/0", "p4ss"]
    assert effective_values(settings)["redis_url"] == "**********"


def test_each_service_leaves_the_sections_of_the_others_alone() -> None:
    path = write("log_level = 'error'\n[reward_server]\nport = 1\n[trainer]\nrate = 2\n")

    settings, _ = load_settings(Settings, path, {"TURNWISE_SEARCH_SERVER__PORT": "3"})

    assert settings.log_level == "error"


def test_a_flag_wins_over_everything() -> None:
    environ = {"TURNWISE_LOG_LEVEL": "error"}

    settings, sources = load_settings(Settings, None, environ, {"log_level": ("--log", "debug")})

    assert (settings.log_level, sources["log_level"]) == ("debug", "--log")
