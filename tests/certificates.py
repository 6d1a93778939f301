"""Certificates for tests: models too small to earn one get it as a gift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blend.certificate import Calibration, Certificate, Check, Trial
from blend.engines import EngineInfo


def passing(info: EngineInfo, **changes: Any) -> Certificate:
    """A certificate that the engine of ``info`` could have passed, with ``changes``."""
    trial = Trial("all", "auto", 0.1, n=40, agreement=1.0, score=0.975, full_score=0.975, kl=0.001)
    made = Certificate(
        model=info.layout.model,
        tokenizer=info.tokenizer,
        layout=info.layout.digest.hex(),
        dtype=info.layout.dtype,
        rope=info.layout.rope,
        engine=info.name,
        engine_version=info.version,
        compile="document",
        codec="raw",
        checks=(Check("causality", True, 0.0, 0.0, "largest difference of K and V"),),
        profile=(trial,),
        ratios=(replace(trial, ratio=0.0, agreement=0.5), trial),
        calibration=Calibration(0, None, ("same-chunk",), 40, "accuracy"),
        floor=0.97,
        selector="auto",
        ratio=0.1,
        passed=True,
        reasons=(),
        created="2026-11-21T12:00:00+00:00",
        ragblend="0.1.0",
    )
    return replace(made, **changes)
