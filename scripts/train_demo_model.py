"""Train the demo model on the synthetic world and write it as a Hugging Face checkpoint."""

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from app.demo.world import EVAL_SEEDS, TASKS, make_example, subject_names
from app.demo.words import ATTRIBUTES
from scripts.demo_training.data import GATHER_LAYER, MATCH_LAYER, Batch, Stage, Vocabulary, lay_out, training_batch
from scripts.demo_training.model import DemoModel, ModelShape
from scripts.demo_training.tokenizer import save_tokenizer, train_tokenizer

TAP_LAYER = 2
NO_FILLER = (0, 0)
STAGES = (
    Stage("short", 400, (2, 4), (2, 2), NO_FILLER, 8000, 0, (2e-3, 2e-3), (1.0, 0.75)),
    Stage("longer", 900, (2, 6), (2, 3), (66, 124), 10000, 300, (2e-3, 1e-3), (0.5, 0.1)),
    Stage("long", 500, (3, 12), (2, 3), (66, 124), 12000, 500, (1e-3, 2e-5), (0.1, 0.0), chat=0.4),
)


class Teacher(nn.Module):
    """Throwaway linear heads: the subject and the attribute must be readable at value rows and answer rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.subject = nn.Linear(hidden, len(subject_names()))
        self.attribute = nn.Linear(hidden, sum(len(a) for a in ATTRIBUTES.values()))


def training_loss(model: DemoModel, teacher: Teacher, batch: Batch, weight: float) -> tuple[torch.Tensor, list[float]]:
    """Answer loss plus weight x (attention targets + throwaway heads); also the single losses for the log."""
    with torch.autocast("cpu", torch.bfloat16):
        final, tapped, attention = model(batch.ids, batch.positions, batch.mask(), batch.context, batch.targets, TAP_LAYER)
    answer = F.cross_entropy(model.logits(final.flatten(0, 1)[batch.label_at].float()), batch.labels)
    flat = tapped.flatten(0, 1)
    heads = torch.zeros(())
    if len(batch.named):
        normed = F.rms_norm(flat[batch.named].float(), (flat.shape[-1],))
        heads = F.cross_entropy(teacher.subject(normed), batch.name)
        heads = heads + F.cross_entropy(teacher.attribute(normed), batch.kind)
    return answer + weight * (attention + heads), [float(x.detach()) for x in (answer, attention, heads)]


@torch.no_grad()
def accuracy(model: DemoModel, vocabulary: Vocabulary, task: str, context: str, **world) -> float:
    """Share of right first tokens over n held-out examples, one question per sequence."""
    n, at_once, right = world.pop("n"), world.pop("at_once", 10), 0
    for start in range(0, n, at_once):
        sequences = []
        for seed in range(start, min(n, start + at_once)):
            example = make_example(EVAL_SEEDS[seed], task=task, **world)
            question = example.question
            facts = example.documents[question.document].facts
            attribute = next(f.attribute for f in facts if f.value == question.answer)
            sequences.append(lay_out(vocabulary, example.documents, [(question, attribute)], random.Random(0), 0))
        batch = Batch(sequences)
        with torch.autocast("cpu", torch.bfloat16):
            final, _, _ = model(batch.ids, batch.positions, batch.mask(context), 0, [], 0)
        rows = batch.label_at[::2]
        right += int((model.logits(final.flatten(0, 1)[rows].float()).argmax(-1) == batch.labels[::2]).sum())
    return right / n


def export(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint as transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.shape.hf_config(), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def blend(pair: tuple[float, float], part: float) -> float:
    return pair[0] + (pair[1] - pair[0]) * part


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    model = DemoModel(ModelShape())
    model.start_as_copy(GATHER_LAYER, 0)
    model.start_as_copy(MATCH_LAYER, 0)
    teacher = Teacher(model.shape.hidden_size)
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    state_file = args.scratch / "state.pt"
    args.scratch.mkdir(parents=True, exist_ok=True)
    stage_index, step, total = 0, 0, 0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        stage_index, step, total = state["stage"], state["step"], state["total"]
        print(f"resumed at stage {stage_index} step {step}", flush=True)
    started, logged = time.time(), []
    while stage_index < len(STAGES):
        stage = STAGES[stage_index]
        while step < stage.steps:
            part = step / stage.steps
            rate = blend(stage.rate, part) * min(1.0, (total + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = training_batch(vocabulary, stage, args.seed * 1_000_003 + total)
            loss, parts = training_loss(model, teacher, batch, blend(stage.teacher, part))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            logged.append(parts)
            step, total = step + 1, total + 1
            if total % 50 == 0:
                mean = [sum(x) / len(logged) for x in zip(*logged)]
                logged = []
                line = f"{stage.name} {step} ({total}) {time.time() - started:.0f}s answer {mean[0]:.3f} attention {mean[1]:.3f} heads {mean[2]:.3f}"
                if total % 100 == 0:
                    for task in TASKS:
                        short = accuracy(model, vocabulary, task, "full", n=60, chunk_tokens=NO_FILLER)
                        line += f" | {task} short {short:.2f}"
                        if total % 200 == 0:
                            line += f" long {accuracy(model, vocabulary, task, 'full', n=60):.2f}"
                    torch.save({"model": model.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(), "stage": stage_index, "step": step, "total": total}, state_file)
                    if args.export_early:
                        export(model, tokenizer, args.out)
                print(line, flush=True)
        stage_index, step = stage_index + 1, 0
    export(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--scratch", type=Path, default=Path("build/demo-training"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-early", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
