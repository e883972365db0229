"""Settings of one process: environment over TOML file over default, and where each came from.

One class per service, a subclass of `Settings`; the environment is read in `load_settings` and
nowhere else. The norm of section credit is `[credit] norm` in the file and TURNWISE_CREDIT__NORM
in the environment, where an empty variable counts as not set. One file and one environment serve
every process: each service has a section, `[reward_server]` or TURNWISE_REWARD_SERVER__PORT, and
leaves the sections of the others alone.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short_repr
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from turnwise.credit import Norm
from turnwise.errors import InvalidInput, nearest
from turnwise.scores import GainKind

PREFIX = "TURNWISE_"
CONFIG_VARIABLE = "TURNWISE_CONFIG"  # path of the TOML file, when --config does not give it
DEFAULT_FILE = Path("turnwise.toml")  # read where it exists
MAX_FILE_BYTES = 2**20
# Each is known to the settings class of its own service, and to no other class.
SERVICE_SECTIONS = ("reward_server", "search_server", "rollout_worker", "trainer")

Values = dict[str, Any]  # key -> value; a key is dotted, as in credit.norm


class CreditSettings(BaseModel):
    """Defaults of `turnwise credit`; what is not set comes from the preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["paper", "paper_v1", "grpo"] = "paper"
    gain: GainKind | None = None
    norm: Norm | None = None
    gamma: float | None = Field(default=None, ge=0, le=1)


class Settings(BaseSettings):
    """What every process shares."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    api_token: SecretStr | None = Field(default=None, min_length=1)
    run: str | None = None  # the training run whose weights and groups a service follows
    redis_url: SecretStr | None = None  # may hold a password
    weights_root: Path = Path("weights")  # holds <run>/v00000042
    credit: CreditSettings = CreditSettings()

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls,
        _settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_others: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Constructing a class reads nothing: load_settings does."""
        return (init_settings,)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    cls: type[AnySettings],
    config_path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> tuple[AnySettings, dict[str, str]]:
    """Return the settings and the source of every key: default, file, variable or flag.

    `flags` are command-line options, which win: key -> (option, value).
    """
    kinds = dict(_keys(cls))
    path = config_path or _default_path(environ)
    others = {name for name in SERVICE_SECTIONS if name not in cls.model_fields}
    table = _read_table(path) if path else {}
    table = {name: value for name, value in table.items() if name not in others}
    sections = {key.rpartition(".")[0] for key in kinds}
    in_file = {key: value for key, value in _flatten(table) if value != {} or key not in sections}
    _refuse_unknown("key", in_file, kinds, str(path))

    foreign = tuple(f"{PREFIX}{name.upper()}__" for name in others)
    variables = {
        name: value
        for name, value in environ.items()
        if name.startswith(PREFIX) and not name.startswith(foreign)
    }
    key_of = {PREFIX + key.replace(".", "__").upper(): key for key in kinds}
    _refuse_unknown("variable", variables, [*key_of, CONFIG_VARIABLE], "the environment")
    given = {name: value for name, value in variables.items() if value and name in key_of}

    sources = dict.fromkeys(kinds, "default")
    sources |= dict.fromkeys(in_file, str(path)) | {key_of[name]: name for name in given}
    sources |= {key: option for key, (option, _) in flags.items()}
    try:
        env_source = EnvSettingsSource(cls)
        env_source.env_vars = {name.lower(): value for name, value in given.items()}
        values = in_file | dict(_flatten(env_source()))
        values |= {key: value for key, (_, value) in flags.items()}
        return cls.model_validate(_nest(values)), sources
    except SettingsError as error:  # a variable that should hold a JSON list
        raise InvalidInput("the environment", str(error)) from error
    except ValidationError as error:
        raise _bad_value(error.errors(include_url=False)[0], kinds, sources) from None


def effective_values(settings: Settings) -> Values:
    """Return every key with its value, secrets masked, in the order of the class."""
    return dict(_flatten(settings.model_dump(mode="json")))


def secret_values(settings: Settings) -> list[str]:
    """Return the secrets, and the passwords in them, in plain text: for the log filter alone."""
    values = dict(_flatten(settings.model_dump())).values()
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    passwords = [urlsplit(secret).password for secret in secrets if "://" in secret]
    return secrets + [password for password in passwords if password]


def _default_path(environ: Mapping[str, str]) -> Path | None:
    if environ.get(CONFIG_VARIABLE):
        return Path(environ[CONFIG_VARIABLE])
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _read_table(path: Path) -> Values:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidInput(str(path), f"is larger than the limit of {MAX_FILE_BYTES} bytes")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidInput(str(path), error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, nesting
        raise InvalidInput(str(path), f"is no TOML file: {error}") from error


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Yield every key with its type."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((f"{name}.{key}", inner) for key, inner in _keys(kind))
        else:
            yield name, kind


def _flatten(table: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nest(values: Values) -> Values:
    tree: Values = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tree


def _refuse_unknown(kind: str, names: Collection[str], known: Collection[str], source: str) -> None:
    for name in names:
        if name not in known:
            hint = f"the nearest is {nearest(name, known)}"
            raise InvalidInput(name, f"unknown {kind} in {source}; {hint}")


def _bad_value(
    detail: ErrorDetails, kinds: Mapping[str, Any], sources: Mapping[str, str]
) -> InvalidInput:
    """Name key, limit and source in one line; the value too, unless it is a secret."""
    key = ".".join(str(part) for part in detail["loc"])
    kind, source = kinds.get(key), sources.get(key, "the settings")
    problem = (detail["msg"][:1].lower() + detail["msg"][1:]).removeprefix("value error, ")
    if source != "default" and kind is not None and SecretStr not in (kind, *get_args(kind)):
        problem += f", got {short_repr(detail['input'])}"
    return InvalidInput(key, f"{problem} (from {source})" if key else problem)
