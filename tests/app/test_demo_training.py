"""The training of the demo model: what a row may see, and that its model is a plain Llama."""

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from app.demo.world import make_documents, questions_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.demo_training.data import Batch, Vocabulary, lay_out
from scripts.demo_training.model import DemoModel, ModelShape

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def batch() -> Batch:
    vocabulary = Vocabulary(Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    sequences = []
    for seed in (1, 2):
        rng = random.Random(seed)
        documents = make_documents(rng, documents=2 + seed)
        facts = [f for d in documents for f in d.facts]
        asked = list(zip(questions_of(documents, rng), (f.attribute for f in facts), strict=True))
        sequences.append(lay_out(vocabulary, documents, asked, rng, gap=50))
    return Batch(sequences)


def test_a_question_sees_the_context_and_itself_only(batch: Batch) -> None:
    seen, block = batch.mask()[:, 0], batch.block
    for index in range(len(batch.sequences)):
        rows = (block[index] == 2).nonzero()[:, 0]
        assert set(block[index][seen[index, rows[-1]]].tolist()) == {0, 2}


def test_compile_contexts_hide_what_they_should(batch: Batch) -> None:
    last = (batch.block[0] == 0).nonzero()[-1, 0]
    for context, part in (("prefix", batch.chunk), ("document", batch.document)):
        seen = batch.mask(context)[0, 0, last]
        assert set(part[0][seen].tolist()) == {-1, int(part[0, last])}


def test_attention_is_taught_on_rows_that_may_be_seen(batch: Batch) -> None:
    for target in batch.targets:
        seen = batch.mask()[:, 0].gather(1, target.rows[..., None].expand(-1, -1, batch.ids.shape[1]))
        assert not (target.wanted & ~seen)[target.used].any()
        assert target.wanted[target.used].any(-1).all()


def test_the_model_is_a_plain_llama(batch: Batch) -> None:
    ours = DemoModel(ModelShape())
    ours.load_state_dict(load_file(MODEL / "model.safetensors"))
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        final, _, _ = ours(batch.ids, batch.positions, batch.mask(), batch.context, [], 0)
        rows = batch.sequences[1].block.count(0)
        ids, positions = batch.ids[1:, :rows], batch.positions[1:, :rows]
        seen = batch.mask()[1:, :, :rows, :rows]
        logits = theirs(ids, position_ids=positions, attention_mask=seen).logits
    torch.testing.assert_close(ours.logits(final[1:, :rows]), logits, atol=1e-3, rtol=1e-3)
