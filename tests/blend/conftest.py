"""Tiny random models of every supported kind, and engines that serve them.

A model is a real Hugging Face folder (config, safetensors, byte-level tokenizer with a chat template like the demo
model's), with weights large enough that attention is not flat: a wrong K changes the answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from blend.engines import Engine, EngineConfig, open_engine
from blend.engines.transformers.model import Weights, load_weights
from blend.keys import KeyMaker
from blend.prompt import ChunkRef, PromptLayout
from blend.types import BlendOptions, BlendStats, CompileResult, Prompt, Request, Sampling

T = TypeVar("T")
TENANT, OTHER_TENANT = b"t" * 32, b"u" * 32
SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('system role is not supported') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = (
    "river museum tower garden winter painter bridge market letter village old quiet built born wrote painted lived "
    "moved opened she he it the a of in near with and was is by from seven nineteen harbour"
).split()

ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}
KINDS = (*ROPES, "phi3", "qwen2", "qwen3", "mistral")


# -- models -----------------------------------------------------------------------------------------------------------


def sentence(seed: int, words: int = 12) -> str:
    """Reproducible text; a word is one or two tokens."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def _write_tokenizer(folder: Path, template: str) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(i, 40) for i in range(40)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": list(SPECIAL[3:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _config(kind: str, vocab: int) -> transformers.PretrainedConfig:
    shape = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, **ROPES.get(kind, ROPES["llama"])},
    }
    if kind in ROPES:
        return transformers.LlamaConfig(**shape)
    if kind == "phi3":
        shape["rope_parameters"] |= {"partial_rotary_factor": 0.5}
        return transformers.Phi3Config(**shape)
    if kind == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None)
    return {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind](**shape)


def write_model(folder: Path, kind: str, template: str = TEMPLATE) -> Path:
    """A model folder of ``kind`` with random weights, biases included."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(kind, _write_tokenizer(folder, template))
    torch.manual_seed(KINDS.index(kind))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model(kind) -> folder`` for a kind of ``KINDS``, or ``llama/no-system`` (a template without system)."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            name, _, variant = kind.partition("/")
            template = NO_SYSTEM_TEMPLATE if variant == "no-system" else TEMPLATE
            made[kind] = write_model(root / kind.replace("/", "-"), name, template)
        return made[kind]

    return make


class Truth:
    """The independent truth: plain transformers, none of our code."""

    def __init__(self, folder: Path) -> None:
        self.net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        found = self.net.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return [int(t) for t in found[0, len(ids) :]]

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, vocabulary]."""
        return self.net(torch.tensor([ids])).logits[0].log_softmax(-1)

    @torch.no_grad()
    def kv(self, ids: Sequence[int], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [L, T, H, D] of ``ids`` standing at ``first ..``."""
        cache = transformers.DynamicCache()
        places = torch.arange(first, first + len(ids))[None]
        self.net(torch.tensor([ids]), past_key_values=cache, position_ids=places)
        return _planes(cache)

    @torch.no_grad()
    def over(self, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [T, vocabulary] of ``ids`` prefilled over a cache ``k``, ``v`` [L, N, H, D]; and the K after."""
        cache = transformers.DynamicCache()
        for layer in range(k.shape[0]):
            cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
        logits = self.net(torch.tensor([ids]), past_key_values=cache).logits[0]
        return logits.log_softmax(-1), _planes(cache)[0]


def _planes(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
    return k, v


@pytest.fixture(scope="session")
def truth(tiny_model: Callable[[str], Path]) -> Callable[[str], Truth]:
    made: dict[str, Truth] = {}

    def get(kind: str) -> Truth:
        if kind not in made:
            made[kind] = Truth(tiny_model(kind))
        return made[kind]

    return get


# -- engines ----------------------------------------------------------------------------------------------------------


class Loop:
    """An event loop in a thread of its own, so that one engine serves many (synchronous) tests."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(240)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@dataclass(frozen=True)
class Answer:
    """What came back; ``top`` is one ``{token: log-probability}`` per generated token."""

    tokens: list[int]
    text: str
    top: list[dict[int, float]]
    stats: BlendStats
    cached: int
    finish: str | None

    def distance(self, other: Answer) -> float:
        """Largest difference of the log-probabilities of tokens both list; infinite if the answers differ."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(a[t] - b[t]) for a, b in zip(self.top, other.top, strict=True) for t in a.keys() & b.keys())


class Served:
    """An engine on a tiny model, with what an application has around it."""

    def __init__(self, loop: Loop, engine: Engine, kind: str, folder: Path) -> None:
        self.loop, self.engine, self.kind, self.folder = loop, engine, kind, folder
        self.count = 0

    @cached_property
    def layout(self) -> PromptLayout:
        return PromptLayout(transformers.AutoTokenizer.from_pretrained(self.folder))

    @property
    def tolerance(self) -> float:
        """Noise of float32 in log-probabilities: other kernels, other order of summation."""
        return 2e-4 if self.engine.info.name == "transformers" else 2e-3

    def keys(self, tenant: bytes = TENANT, context: str = "prefix", budget: int = 512) -> KeyMaker:
        info = self.engine.info
        return KeyMaker(info.layout, info.tokenizer, tenant, self.layout.prefix, context, budget)

    def document(self, *texts: str, tenant: bytes = TENANT, context: str = "prefix", name: str = "doc",
                 compiled: bool = True) -> list[ChunkRef]:  # fmt: skip
        """References of a document's chunks; their KV (and the prefix's) is in the store if ``compiled``."""
        keys = self.keys(tenant, context)
        refs = keys.document([f"{name}-{i}" for i in range(len(texts))], [self.layout.chunk_ids(t) for t in texts])
        if compiled:
            for job in (keys.prefix_job(), *keys.jobs(refs)):
                self.compile(job)
        return refs

    def compile(self, job: Any) -> CompileResult:
        return self.loop.run(self.engine.compile(job))

    def prompt(self, refs: Sequence[ChunkRef], question: str = "Who built it?", tenant: bytes = TENANT) -> Prompt:
        return self.layout.build(refs, [{"role": "user", "content": question}], self.keys(tenant).prefix_ref())

    def request(self, prompt: Prompt, mode: str = "full", *, ratio: float = 0.0, selector: str = "auto",
                tokens: int = 6, tenant: bytes = TENANT, **sampling: Any) -> Request:  # fmt: skip
        self.count += 1
        chosen = Sampling(**{"max_tokens": tokens, "logprobs": 5, "ignore_eos": True, **sampling})
        return Request(f"test-{self.count}", prompt, chosen, BlendOptions(mode, selector, ratio), tenant)

    async def collect(self, request: Request) -> Answer:
        deltas = [d async for d in self.engine.generate(request)]
        first, last = deltas[0], deltas[-1]
        assert first.stats is not None
        assert first.cached_tokens is not None
        assert all(d.stats is None and d.finish_reason is None for d in deltas[1:-1])
        logprobs = [x for d in deltas for x in d.logprobs]
        return Answer(
            [t for d in deltas for t in d.token_ids],
            "".join(d.text for d in deltas),
            [{x.token_id: x.logprob} | {t: value for t, _, value in x.top} for x in logprobs],
            first.stats,
            first.cached_tokens,
            last.finish_reason,
        )

    def ask(self, prompt: Prompt, mode: str = "full", **how: Any) -> Answer:
        return self.loop.run(self.collect(self.request(prompt, mode, **how)))

    def together(self, *requests: Request) -> list[Answer]:
        async def gather() -> list[Answer]:
            return list(await asyncio.gather(*(self.collect(r) for r in requests)))

        return self.loop.run(gather())


def _open(loop: Loop, name: str, kind: str, folder: Path, store: Path | None, **config: Any) -> Served:
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    options = {"min_context_tokens": 64}
    settings = {"model": str(folder), "store": store, "dtype": "float32", "max_context": 2048, "kv_cache_gib": 0.25}
    engine = loop.run(open_engine(name, EngineConfig(**{**settings, "options": options, **config})))
    return Served(loop, engine, kind, folder)


@pytest.fixture(scope="session")
def engines(loop: Loop, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``engines(name, kind) -> Served``, each started once a session (vLLM takes half a minute)."""
    made: dict[tuple[str, str], Served] = {}

    def get(name: str, kind: str) -> Served:
        if (name, kind) not in made:
            made[name, kind] = _open(loop, name, kind, tiny_model(kind), tmp_path_factory.mktemp("store"))
        return made[name, kind]

    yield get
    for served in made.values():
        loop.run(served.engine.stop())


def _pairs(*pairs: tuple[str, str]) -> list[Any]:
    return [pytest.param(p, id="-".join(p), marks=[pytest.mark.vllm] if p[0] == "vllm" else []) for p in pairs]


@pytest.fixture(params=_pairs(("transformers", "llama"), ("vllm", "llama")))
def engine(request: pytest.FixtureRequest, engines: Callable[[str, str], Served]) -> Served:
    """Each engine, serving one kind of model."""
    return engines(*request.param)


@pytest.fixture(
    params=_pairs(*(("transformers", k) for k in KINDS), ("vllm", "llama"), ("vllm", "yarn"), ("vllm", "phi3"))
)
def any_engine(request: pytest.FixtureRequest, engines: Callable[[str, str], Served]) -> Served:
    """Each engine, serving every kind of model (vLLM: a few)."""
    return engines(*request.param)


@pytest.fixture
def reference(loop: Loop, tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Served]]:
    """``reference(kind="llama", **EngineConfig fields)``: a fresh transformers engine with a store in memory."""
    made: list[Served] = []

    def start(kind: str = "llama", **config: Any) -> Served:
        made.append(_open(loop, "transformers", kind, tiny_model(kind), **{"store": None, **config}))
        return made[-1]

    yield start
    for served in made:
        loop.run(served.engine.stop())


@pytest.fixture(scope="session")
def weights(tiny_model: Callable[[str], Path]) -> Callable[[str], Weights]:
    """``weights(kind)``: the model as the transformers engine holds it, for tests of single rows."""
    made: dict[str, Weights] = {}

    def get(kind: str = "llama") -> Weights:
        if kind not in made:
            made[kind] = load_weights(EngineConfig(str(tiny_model(kind)), None, dtype="float32", device="cpu"))
        return made[kind]

    return get
