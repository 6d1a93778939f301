"""Fixtures: models by kind, the truth about them, and the engines that serve them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from blend.engines import EngineConfig
from blend.engines.transformers.model import Weights, load_weights
from tests.blend.scene import Scene
from tests.blend.served import Loop, Served, open_served
from tests.blend.tiny import KINDS, NO_SYSTEM_TEMPLATE, TEMPLATE, Truth, write_model

# How long an example takes says nothing on a busy machine.
settings.register_profile("ragblend", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ragblend")


QUICK = ("llama", "yarn", "phi3")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model(kind) -> folder`` for a kind of ``KINDS``, or ``llama/no-system`` (a template without system)."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            name, _, variant = kind.partition("/")
            template = NO_SYSTEM_TEMPLATE if variant == "no-system" else TEMPLATE
            made[kind] = write_model(root / kind.replace("/", "-"), name, template)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def truth(tiny_model: Callable[[str], Path]) -> Callable[[str], Truth]:
    made: dict[str, Truth] = {}

    def get(kind: str) -> Truth:
        if kind not in made:
            made[kind] = Truth(tiny_model(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def engines(loop: Loop, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``engines(name, kind) -> Served``, each started once a session (vLLM takes half a minute)."""
    made: dict[tuple[str, str], Served] = {}

    def get(name: str, kind: str) -> Served:
        if (name, kind) not in made:
            made[name, kind] = open_served(loop, name, kind, tiny_model(kind), tmp_path_factory.mktemp("store"))
        return made[name, kind]

    yield get
    for served in made.values():
        loop.run(served.engine.stop())


def _pairs(*pairs: tuple[str, str]) -> list[Any]:
    """vLLM takes half a minute to start: all but the first few kinds of model are slow."""
    found = []
    for name, kind in pairs:
        marks = [pytest.mark.vllm] if name == "vllm" else []
        if name == "vllm" and kind not in QUICK:
            marks.append(pytest.mark.slow)
        found.append(pytest.param((name, kind), id=f"{name}-{kind}", marks=marks))
    return found


@pytest.fixture(params=_pairs(("transformers", "llama"), ("vllm", "llama")))
def engine(request: pytest.FixtureRequest, engines: Callable[[str, str], Served]) -> Served:
    """Each engine, serving one kind of model."""
    return engines(*request.param)


@pytest.fixture(params=_pairs(*itertools.product(("transformers", "vllm"), KINDS)))
def any_engine(request: pytest.FixtureRequest, engines: Callable[[str, str], Served]) -> Served:
    """Each engine, serving every kind of model."""
    return engines(*request.param)


@pytest.fixture
def reference(loop: Loop, tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Served]]:
    """``reference(kind="llama", **EngineConfig fields)``: a fresh transformers engine with a store in memory, or in
    the folder ``path``."""
    made: list[Served] = []

    def start(kind: str = "llama", **config: Any) -> Served:
        made.append(open_served(loop, "transformers", kind, tiny_model(kind), **{"path": None, **config}))
        return made[-1]

    yield start
    for served in made:
        loop.run(served.engine.stop())


@pytest.fixture(scope="session")
def weights(tiny_model: Callable[[str], Path]) -> Callable[[str], Weights]:
    """``weights(kind)``: the model as the transformers engine holds it, for tests of single rows."""
    made: dict[str, Weights] = {}

    def get(kind: str = "llama") -> Weights:
        if kind not in made:
            made[kind] = load_weights(EngineConfig(str(tiny_model(kind)), dtype="float32", device="cpu"))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def scene(weights: Callable[[str], Weights]) -> Scene:
    """A small request on the reference model, for tests of selectors."""
    return Scene(weights("llama"))
