"""Decode: from logits to text, one token at a time. Meanings follow the OpenAI API, details vLLM."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from blend.types import Delta, Sampling, TokenLogprob

_GREEDY = 1e-5  # temperatures below are greedy
_BROKEN = "\ufffd"


class Answer:
    """The growing answer of one request.

    ``push`` takes the logits [vocabulary] of the next token and returns what a client may see. Text that could be the
    beginning of a stop string or half a character is held back.
    """

    def __init__(self, sampling: Sampling, tokenizer: Any, eos: frozenset[int], seed: int) -> None:
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.eos = frozenset() if sampling.ignore_eos else eos
        self.generator = torch.Generator().manual_seed(sampling.seed if sampling.seed is not None else seed)
        self.counts: Counter[int] = Counter()
        self.detokenizer = Detokenizer(tokenizer)
        self.held = ""
        self.tokens = 0
        self.last: int | None = None
        self.finished = False

    def push(self, logits: Tensor) -> Delta:
        token = sample(logits, self.sampling, self.counts, self.generator)
        logprobs = (self._logprob(logits, token),) if self.sampling.logprobs is not None else ()
        self.counts[token] += 1
        self.tokens += 1
        self.last = token
        reason = "stop" if token in self.eos else None
        self.held += "" if reason else self.detokenizer.push(token)
        if reason is None and self.tokens >= self.sampling.max_tokens:
            reason = "length"
        if reason:
            self.held += self.detokenizer.rest()
        text, stopped = self._release(everything=reason is not None)
        reason = "stop" if stopped else reason
        self.finished = reason is not None
        return Delta(text, (token,), logprobs, reason)

    def _release(self, *, everything: bool) -> tuple[str, bool]:
        """Text that can go out, and whether a stop string ended the answer."""
        found = [at for at in (self.held.find(s) for s in self.sampling.stop if s) if at >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return text, True
        keep = 0 if everything else max((_overlap(self.held, s) for s in self.sampling.stop), default=0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text, False

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob:
        """Of the raw logits, before penalties and temperature."""
        logs = logits.float().log_softmax(dim=-1)
        top = logs.topk(min(self.sampling.logprobs or 0, logs.numel()))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprob(
            token, self._text(token), float(logs[token]), tuple((i, self._text(i), value) for i, value in pairs)
        )

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


def sample(logits: Tensor, sampling: Sampling, counts: Counter[int], generator: torch.Generator) -> int:
    """One token from ``logits`` [vocabulary]; ``counts`` are the answer's tokens so far, for the penalties."""
    scores = logits.to(torch.float64, copy=True)
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        seen = torch.tensor(list(counts))
        times = torch.tensor([counts[int(i)] for i in seen], dtype=scores.dtype)
        scores[seen] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.temperature < _GREEDY:
        return int(scores.argmax())
    probs = (scores / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # mass of the better tokens; the best one always stays
        probs[order[(before >= sampling.top_p) & (torch.arange(len(order)) > 0)]] = 0.0
    return int(torch.multinomial(probs, 1, generator=generator))


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; never half a character.

    A piece is the difference of two decodings that begin a little earlier, because decoders treat a first token (and
    bytes without their neighbours) differently.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.done = 0

    def push(self, token: int) -> str:
        self.ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return piece

    def rest(self) -> str:
        """What is held back, without a broken last character."""
        piece = self._piece().rstrip(_BROKEN)
        self.start = self.done = len(self.ids)
        return piece

    def _piece(self) -> str:
        before = self._decode(self.ids[self.start : self.done])
        return self._decode(self.ids[self.start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
