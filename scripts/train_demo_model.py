"""Train the demo model on the synthetic world and write it as a Hugging Face checkpoint.

Three things make it learn in an hour on two cores: single heads are taught where to look (`HEADS` in
`demo_training/layout.py`) by a loss on attention that fades out, these heads start as copies, so that what they look at
is what they write, and filler and more documents come once short contexts are learned.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from app.demo.words import ATTRIBUTES, BRIDGES
from app.demo.world import EVAL_SEEDS, TASKS, make_example, subject_names
from scripts.demo_training.data import Batch, training_batch
from scripts.demo_training.layout import HEADS, Vocabulary, lay_out
from scripts.demo_training.model import DemoModel, ModelShape
from scripts.demo_training.stages import FILLED, NO_FILLER, STAGES, Stage
from scripts.demo_training.tokenizer import save_tokenizer, train_tokenizer

TAP_LAYER = 2
WARM_UP = 100


class Teacher(nn.Module):
    """Throwaway linear heads: the subject and the attribute must be readable at value rows and answer rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.subject = nn.Linear(hidden, len(subject_names()))
        self.attribute = nn.Linear(hidden, sum(len(a) for a in ATTRIBUTES.values()) + len(BRIDGES))


def training_loss(model: DemoModel, teacher: Teacher, batch: Batch, weight: float) -> tuple[Tensor, list[float]]:
    """Answer loss plus weight x (attention targets + throwaway heads); also the single losses for the log."""
    with torch.autocast("cpu", torch.bfloat16):
        final, tapped, attention = model(
            batch.ids, batch.positions, batch.mask(), batch.context, batch.targets, TAP_LAYER
        )
    answer = F.cross_entropy(model.logits(final.flatten(0, 1)[batch.label_at].float()), batch.labels)
    heads = torch.zeros(())
    if len(batch.named):
        normed = F.rms_norm(tapped.float(), (tapped.shape[-1],)).flatten(0, 1)
        heads = F.cross_entropy(teacher.subject(normed[batch.named]), batch.name)
        heads = heads + F.cross_entropy(teacher.attribute(normed[batch.kinds]), batch.kind)
    return answer + weight * (attention + heads), [float(x.detach()) for x in (answer, attention, heads)]


@torch.no_grad()
def accuracy(model: DemoModel, vocabulary: Vocabulary, task: str, n: int, **shape: Any) -> float:
    """Share of held-out examples whose whole answer is right, one question per sequence."""
    right = 0
    for start in range(0, n, 8):
        sequences = []
        for seed in EVAL_SEEDS[start : min(n, start + 8)]:
            example = make_example(seed, task=task, **shape)
            parts = (vocabulary, example.documents, example.context, [example.question])
            sequences.append(lay_out(*parts, random.Random(0), 0))
        batch = Batch(sequences)
        with torch.autocast("cpu", torch.bfloat16):
            final, _, _ = model(batch.ids, batch.positions, batch.mask(), batch.context, [], 0)
        said = model.logits(final.flatten(0, 1)[batch.label_at].float()).argmax(-1)
        wrong = {int(r) // batch.ids.shape[1] for r in batch.label_at[said != batch.labels]}
        right += len(sequences) - len(wrong)
    return right / n


def export(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint as transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(model.shape.hf_config(), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


class Run:
    """The state of a training run: everything a checkpoint holds."""

    def __init__(self, seed: int, scratch: Path) -> None:
        torch.manual_seed(seed)
        self.seed, self.file = seed, scratch / "state.pt"
        self.tokenizer = train_tokenizer()
        self.vocabulary = Vocabulary(self.tokenizer)
        self.model = DemoModel(ModelShape())
        for name in ("gather", "hop", "match"):
            self.model.start_as_copy(*HEADS[name])
        self.model.read_alike(*HEADS["compare"], HEADS["gather"])
        self.share_words()
        self.teacher = Teacher(self.model.shape.hidden_size)
        self.parameters = [*self.model.parameters(), *self.teacher.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.stage, self.step, self.total = 0, 0, 0
        self.losses: list[list[float]] = []

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "teacher", "optimizer")}
        torch.save({**parts, "stage": self.stage, "step": self.step, "total": self.total}, self.file)

    def resume(self) -> None:
        state = torch.load(self.file)
        for name in ("model", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.stage, self.step, self.total = state["stage"], state["step"], state["total"]

    @torch.no_grad()
    def share_words(self) -> None:
        """Give each word the same embedding before punctuation as before a space: they are two tokens, one word."""
        weight = self.model.model.embed_tokens.weight
        for word in self.vocabulary.words:
            weight[self.vocabulary.one(word)] = weight[self.vocabulary.one(word + " ")]

    def one_step(self, stage: Stage) -> None:
        """Draw a batch from the step's own seed and follow the gradient; rates change linearly within a stage."""
        part = self.step / stage.steps
        rate = _between(stage.rate, part) * min(1.0, (self.total + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = training_batch(self.vocabulary, stage, self.seed * 1_000_003 + self.total)
        loss, parts = training_loss(self.model, self.teacher, batch, _between(stage.teacher, part))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(parts)
        self.step, self.total = self.step + 1, self.total + 1

    def report(self, stage: Stage, seconds: float) -> str:
        """A progress line; every 100 steps with held-out accuracy per task, on short and on filled chunks."""
        answer, attention, heads = (sum(x) / len(self.losses) for x in zip(*self.losses, strict=True))
        self.losses = []
        line = f"{stage.name} {self.step}/{stage.steps} {seconds:.0f}s answer {answer:.3f}"
        line += f" attention {attention:.3f} heads {heads:.3f}"
        if self.total % 100 == 0:
            for task in TASKS[:5]:
                parts = [
                    f"{accuracy(self.model, self.vocabulary, task, 48, documents=d, chunk_tokens=t):.2f}"
                    for d, t in ((4, NO_FILLER), (8, FILLED))
                ]
                line += f" | {task} {' '.join(parts)}"
        return line


def _between(pair: tuple[float, float], part: float) -> float:
    return pair[0] + (pair[1] - pair[0]) * part


def train(args: argparse.Namespace) -> None:
    """All stages, from the last checkpoint in the scratch folder when there is one."""
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    run = Run(args.seed, args.scratch)
    if run.file.exists():
        run.resume()
        print(f"resumed at step {run.total}", flush=True)
    started = time.monotonic()
    while run.stage < len(STAGES):
        stage = STAGES[run.stage]
        while run.step < stage.steps:
            run.one_step(stage)
            if run.total % 50 == 0:
                print(run.report(stage, time.monotonic() - started), flush=True)
            if run.total % 100 == 0:
                run.save()
                if args.export_early:
                    export(run.model, run.tokenizer, args.out)
        run.stage, run.step = run.stage + 1, 0
        run.save()
    export(run.model, run.tokenizer, args.out)
    print(f"wrote {args.out}; measure it with scripts/eval_demo_model.py", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder of the checkpoint")
    parser.add_argument("--scratch", type=Path, default=Path("build/demo-training"), help="state to resume from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-early", action="store_true", help="also write the checkpoint every 100 steps")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
