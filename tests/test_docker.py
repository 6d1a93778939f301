"""docker/ is not built in CI (no engine there); these checks and hadolint keep it honest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_compose_has_one_service_and_one_volume() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text("utf-8"))
    assert list(compose["services"]) == ["ragblend"]
    service = compose["services"]["ragblend"]
    assert list(compose["volumes"]) == ["data"]
    assert service["volumes"] == ["data:/data"]
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert "RAGBLEND_API_KEY" in service["environment"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_are_thin_unprivileged_and_healthy_only_when_ready(name: str) -> None:
    text = (ROOT / "docker" / name).read_text("utf-8")
    assert re.search(r"^RUN .*scripts/setup\.sh$", text, re.M)
    assert "pip install" not in text
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "10001"
    assert re.search(r"HEALTHCHECK(.|\n)+/readyz", text)


def test_environment_of_the_images_is_made_of_settings() -> None:
    from app.settings import PREFIX, setting_names

    known = {PREFIX + name.replace(".", "__").upper() for name in setting_names()}
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "docker").iterdir())]
    used = set(re.findall(r"RAGBLEND_[A-Z_]+", "\n".join(texts)))
    assert used <= known
