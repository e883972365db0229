"""The reward server's settings: its section, its flags, and combinations that cannot be."""

from pathlib import Path

import pytest

from services.reward_server.requests import Limits
from services.reward_server.settings import LimitSettings, RewardServerSettings
from turnwise.errors import InvalidInput
from turnwise.settings import Settings, load_settings

FAKE = {"TURNWISE_REWARD_SERVER__ENGINE": "fake"}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str = "", **environ: str) -> RewardServerSettings:
    path = Path("my.toml")
    path.write_text(text)
    return load_settings(RewardServerSettings, path, FAKE | environ)[0]


def refusal(text: str = "", **environ: str) -> str:
    with pytest.raises(InvalidInput) as error:
        load(text, **environ)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_file_serves_several_services() -> None:
    text = """
    run = "demo"
    [reward_server]
    port = 6000
    [reward_server.limits]
    max_rollouts = 5
    [search_server]
    whatever = 1
    """

    settings = load(text, TURNWISE_TRAINER__RATE="3", TURNWISE_REWARD_SERVER__HTTP_PORT="7000")

    assert settings.run == "demo"
    assert (settings.reward_server.port, settings.reward_server.http_port) == (6000, 7000)
    assert settings.reward_server.limits.limits() == Limits(max_rollouts=5)
    assert load_settings(Settings, Path("my.toml"), {})[0].run == "demo"


def test_a_typo_in_the_own_section_is_told() -> None:
    line = "reward_server.prot: unknown key in my.toml; the nearest is reward_server.port"
    assert refusal("[reward_server]\nprot = 1") == line
    assert "TURNWISE_REWARD_SERVER__PROT" in refusal(TURNWISE_REWARD_SERVER__PROT="1")


def test_a_flag_wins_and_says_so_when_it_is_wrong() -> None:
    environ = FAKE | {"TURNWISE_REWARD_SERVER__PORT": "1"}
    flags = {"reward_server.port": ("--port", "2")}

    settings, sources = load_settings(RewardServerSettings, None, environ, flags)

    assert settings.reward_server.port == 2
    assert sources["reward_server.port"] == "--port"
    flags = {"reward_server.port": ("--port", "70000")}
    with pytest.raises(InvalidInput, match=r"65535, got '70000' \(from --port\)"):
        load_settings(RewardServerSettings, None, environ, flags)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[reward_server]\nhost = '0.0.0.0'", "host 0.0.0.0 is not loopback: set TURNWISE_API_"),
        ("[reward_server]\ntls_cert = 'a'", "reward_server.tls_cert and tls_key go together"),
        ("[reward_server]\ntls_client_ca = 'a'", "reward_server.tls_client_ca needs tls_cert"),
        ("redis_url = 'redis://x'", "redis_url is set and run is not"),
    ],
)
def test_what_cannot_go_together_is_refused(text: str, problem: str) -> None:
    assert refusal(text).startswith(problem)


def test_a_model_is_needed_but_for_the_fake_engine() -> None:
    environ = {"TURNWISE_REWARD_SERVER__ENGINE": "torch"}

    assert refusal(**environ).startswith("reward_server.model_path is not set; pass --model DIR")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_loopback_needs_no_token(host: str) -> None:
    assert load(TURNWISE_REWARD_SERVER__HOST=host).api_token is None


def test_a_token_lets_it_listen_anywhere() -> None:
    settings = load(TURNWISE_REWARD_SERVER__HOST="0.0.0.0", TURNWISE_API_TOKEN="t")

    assert settings.reward_server.host == "0.0.0.0"


def test_limits_have_the_same_names_and_defaults_as_the_requests() -> None:
    assert LimitSettings().limits() == Limits()
