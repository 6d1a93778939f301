"""The training of the demo model: what a row may see, what it is taught to see, and that its model is a plain Llama."""

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.demo.world import TASKS, TRAIN_SEEDS, Example, make_example

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.demo_training.data import Batch, training_batch
from scripts.demo_training.layout import HEADS, Sequence, Vocabulary, lay_out
from scripts.demo_training.model import DemoModel, ModelShape
from scripts.demo_training.stages import Stage
from scripts.demo_training.tokenizer import train_tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
STAGE = Stage("test", 1, (3, 4), (2, 2), (0, 0), rows=1200, gap=50, rate=(0, 0), teacher=(0, 0), questions=6)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer())


@pytest.fixture(scope="module")
def batch(vocabulary: Vocabulary) -> Batch:
    return training_batch(vocabulary, STAGE, 2)


def one(vocabulary: Vocabulary, task: str, seed: int = 5) -> tuple[Example, Sequence]:
    """An example without filler, and its rows."""
    example = make_example(TRAIN_SEEDS[seed], task=task, documents=4, chunk_tokens=(0, 0))
    rows = lay_out(vocabulary, example.documents, example.context, [example.question], random.Random(0), 0)
    return example, rows


def words(vocabulary: Vocabulary, sequence: Sequence, rows: list[int]) -> list[str]:
    return [vocabulary.tokenizer.decode([sequence.ids[row]]).strip() for row in rows]


def test_the_committed_tokenizer_is_the_one_the_training_makes(vocabulary: Vocabulary) -> None:
    assert (MODEL / "tokenizer.json").read_text() == vocabulary.tokenizer.to_str(pretty=True)


def test_a_batch_depends_on_its_seed_only(vocabulary: Vocabulary, batch: Batch) -> None:
    assert torch.equal(training_batch(vocabulary, STAGE, 2).ids, batch.ids)
    assert not torch.equal(training_batch(vocabulary, STAGE, 3).ids, batch.ids)


def test_a_question_sees_the_context_and_itself_only(batch: Batch) -> None:
    seen, block = batch.mask()[:, 0], batch.block
    for index in range(len(batch.sequences)):
        rows = (block[index] == 2).nonzero()[:, 0]
        assert set(block[index][seen[index, rows[-1]]].tolist()) == {0, 2}


def test_attention_is_taught_on_rows_that_may_be_seen(batch: Batch) -> None:
    assert {(t.layer, t.head) for t in batch.targets} == set(HEADS.values())
    for target in batch.targets:
        seen = batch.mask()[:, 0].gather(1, target.rows[..., None].expand(-1, -1, batch.ids.shape[1]))
        assert not (target.wanted & ~seen)[target.used].any()
        assert target.wanted[target.used].any(-1).all()


def test_the_answer_is_supervised_to_its_end(vocabulary: Vocabulary) -> None:
    for task in TASKS:
        example, rows = one(vocabulary, task)
        said = [token for _, token in sorted(rows.labels.items())]
        assert vocabulary.tokenizer.decode(said[:-1]) == example.question.answer
        assert said[-1] == vocabulary.end


def test_every_fact_of_a_question_is_looked_at_from_its_question_rows(vocabulary: Vocabulary) -> None:
    for task in ("same-chunk", "cross-chunk", "two-hop", "comparison", "aggregation", "distractors", "repeated"):
        example, rows = one(vocabulary, task)
        question = rows.block.index(1)
        answer = min(rows.labels)
        looks = {h: {r: at for r, at in rows.looks[h].items() if question <= r < answer} for h in HEADS}
        seen = {w for h in ("hop", "match", "compare") for at in looks[h].values() for w in words(vocabulary, rows, at)}
        assert {fact.value for _, fact in example.question.evidence} <= seen


def test_a_pronoun_and_a_value_look_at_the_name_of_their_own_document(vocabulary: Vocabulary) -> None:
    for task in TASKS:
        for seed in range(8):
            example, rows = one(vocabulary, task, seed)
            subjects = {f.value: d.subject for d in example.documents for f in d.facts}
            for row, at in rows.looks["gather"].items():
                (word,), names = words(vocabulary, rows, [row]), set(words(vocabulary, rows, at))
                if rows.block[row] == 0 and row in rows.attribute:
                    assert names == {subjects[word]}


def test_rows_without_an_antecedent_teach_no_subject(vocabulary: Vocabulary) -> None:
    example, rows = one(vocabulary, "antecedent-missing")
    value = vocabulary.value_ids[example.question.answer]
    (row,) = (r for r, token in enumerate(rows.ids) if token == value and rows.block[r] == 0)
    assert row not in rows.looks["gather"]
    assert row not in rows.subject


def test_heads_start_as_copies_of_what_they_read() -> None:
    model = DemoModel(ModelShape())
    model.start_as_copy(1, 0)
    model.read_alike(4, 2, (1, 0))
    first, second = model.model.layers[1].self_attn, model.model.layers[4].self_attn
    torch.testing.assert_close(first.read_by(0), second.read_by(2))
    torch.testing.assert_close(second.o_proj.weight[:, 2 * 64 : 3 * 64], first.read_by(0).T)


def test_the_model_is_a_plain_llama(batch: Batch) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ours = DemoModel(ModelShape(**{f: getattr(theirs.config, f) for f in ("num_hidden_layers", "hidden_size")}))
    ours.load_state_dict(load_file(MODEL / "model.safetensors"))
    with torch.no_grad():
        final, _, _ = ours(batch.ids, batch.positions, batch.mask(), batch.context, [], 0)
        rows = batch.sequences[1].block.count(0)
        ids, positions = batch.ids[1:2, :rows], batch.positions[1:2, :rows]
        seen = batch.mask()[1:2, :, :rows, :rows]
        logits = theirs(ids, position_ids=positions, attention_mask=seen).logits
    torch.testing.assert_close(ours.logits(final[1:2, :rows]), logits, atol=1e-3, rtol=1e-3)
