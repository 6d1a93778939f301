"""Errors of the blend and its engines."""

from __future__ import annotations


class BlendError(Exception):
    """Base of everything this room raises."""


class UnsupportedModelError(BlendError):
    """The model cannot be blended; the message names the config field and its value."""


class PromptTooLongError(BlendError):
    """The prompt and the asked-for answer do not fit the model's context."""


class NonFiniteError(BlendError):
    """A chunk compiled to NaN or infinity (float16 overflows, say); it is not stored: it would poison other rows."""


class CertificateError(BlendError):
    """A certificate cannot be read or is for something else; the message names the file and both values."""


class EngineError(BlendError):
    """The engine failed or is not running."""


class ChunksLostError(BlendError):
    """Chunks were lost while they were loaded and count as missing now; what has seen them is to be done again."""


class UnknownSelectorError(BlendError, ValueError):
    """No selector of that name; the message lists the choices."""
