"""Prompts of the papers: what stands before the passages, how a passage and a question are written, what is scored.

Sources: CacheBlend's released scripts (``musique``, ``2wiki``, ``summarize``), LongBench's dataset2prompt.json
(``hotpotqa``; it uses the same prompt for 2WikiMQA and MuSiQue), RULER's question answering template (``ruler``).
"""

from __future__ import annotations

from dataclasses import dataclass

from app.evaluate.errors import EvaluationError
from blend.prompt import INSTRUCTION

_ONLY = "Answer the question based on the given {}. Only give me the answer and do not output any other words."
_FIVE_WORDS = "Do NOT repeat the question. The answer should be within 5 words."


@dataclass(frozen=True)
class Style:
    """``passage`` and ``question`` are format strings over {title}, {text} and {question}; ``metric`` is what counts.

    ``as_question``: CacheBlend's reading of a question, first letter in lower case and a question mark at the end.
    ``one_line``: only the first line of an answer is judged. ``max_tokens`` is the longest answer.
    """

    name: str
    instruction: str
    passage: str
    question: str
    metric: str
    max_tokens: int
    as_question: bool = False
    one_line: bool = False

    def write_passage(self, title: str, text: str) -> str:
        return self.passage.format(title=title, text=text)

    def write_question(self, question: str) -> str:
        if self.as_question:
            question = question[:1].lower() + question[1:] + ("" if question.endswith("?") else "?")
        return self.question.format(question=question)


SERVICE = Style("service", INSTRUCTION + "\n\n", "{text}\n\n", "{question}", "accuracy", 16)
STYLES = {
    style.name: style
    for style in (
        Style(
            name="musique",
            instruction="You will be asked a question after reading several passages. Please directly answer the "
            f"question based on the given passages. {_FIVE_WORDS}.\nPassages:\n",
            passage="{title}\n\n{text}\n\n",
            question="\n\nAnswer the question directly based on the given passages. "
            f"{_FIVE_WORDS} \nQuestion:{{question}}\nAnswer:",
            metric="f1_ids",
            max_tokens=32,
            as_question=True,
        ),
        Style(
            name="2wiki",
            instruction=_ONLY.format("passages") + "\n\nThe following are given passages.\n",
            passage="{title}\n\n{text}\n\n",
            question="\n\nAnswer the question based on the given passages. Answer the question within 5 words. "
            "Do NOT repeat the question or output any other words. Question: {question}\nAnswer:",
            metric="f1_ids",
            max_tokens=32,
            as_question=True,
        ),
        Style(
            name="hotpotqa",
            instruction=_ONLY.format("passages") + "\n\nThe following are given passages.\n",
            passage="{title}\n{text}\n\n",
            question=_ONLY.format("passages") + "\n\nQuestion: {question}\nAnswer:",
            metric="f1",
            max_tokens=32,
        ),
        Style(
            name="summarize",
            instruction="Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
            passage="{text}",
            question="\n\n{question}",
            metric="rouge_l",
            max_tokens=128,
            one_line=True,
        ),
        Style(
            name="ruler",
            instruction=_ONLY.format("documents") + "\n\nThe following are given documents.\n\n",
            passage="{text}\n\n",
            question=_ONLY.format("documents") + "\n\nQuestion: {question} Answer:",
            metric="recall",
            max_tokens=32,
        ),
        SERVICE,
    )
}


def find_style(name: str) -> Style:
    """Raises ``EvaluationError`` naming the choices."""
    if name not in STYLES:
        raise EvaluationError(f"style {name!r} is unknown; choose one of {', '.join(STYLES)}")
    return STYLES[name]
