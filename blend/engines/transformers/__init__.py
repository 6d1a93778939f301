"""The reference engine: stock transformers on any device, float32 on the CPU; the model's own layers, as they are."""

from blend.engines.transformers.engine import TransformersEngine, open_transformers

__all__ = ["TransformersEngine", "open_transformers"]
