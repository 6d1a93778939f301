"""The demo tokenizer: byte-level BPE in which each word of the demo world, with the space after it, is one token."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from app.demo import filler, words
from app.demo.world import SYSTEM_PREFIX, subject_names

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 3200
REFUSAL = "I can only answer from passages."

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, got ' + message['role']) }}{% endif %}"
    "{% if message['content'] is string %}{% set content = message['content'] %}{% else %}"
    "{% set parts = namespace(text='') %}"
    "{% for part in message['content'] or [] %}{% set parts.text = parts.text + (part['text'] or '') %}{% endfor %}"
    "{% set content = parts.text %}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + content + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The same words as WORD_PATTERN of the world, in the syntax of the tokenizers library.
HF_WORD_PATTERN = r"[\p{L}\p{M}]+ ?|\p{N}{1,3} ?|[^\s\p{L}\p{M}\p{N}]+ ?|\s+"

_COMMON_TEXT = (
    "the of and to in is was for on that with as by at from are this be it an or not have has had but his her they "
    "you we I can could will would should may which who what where when why how there their been one two more some "
    "time year day people way new first last long great little own other old right big high different small large "
    "hello hi thanks please yes no ok good morning passage passages question answer document documents "
    "ing tion ation ment ness able ible less ful ive ous ity ly er or al an en es ed re un in de con pro com per "
)


def corpus() -> list[str]:
    """Texts that contain every word of the world, both before a space and before punctuation."""
    attributes = [*(a for kind in words.ATTRIBUTES.values() for a in kind), *words.BRIDGES.values()]
    texts = [SYSTEM_PREFIX, "\n", "\n\n", REFUSAL, _COMMON_TEXT]
    for attribute in attributes:
        patterns = [attribute.plural, "Which of x and x " + attribute.predicate + "?"]
        texts += [f"the {attribute.name} of x", f"x's {attribute.name}?"]
        for pattern in (*attribute.statements, *attribute.questions, *patterns):
            texts += [pattern.format(s=s, v="x") for s in ("she", "he", "it", "She", "He", "It")]
    for group in (filler.NAMED_OPENINGS, filler.PRONOUN_FILLERS):
        texts += [text.format(s=s) for kind in group.values() for text in kind for s in ("she", "he", "it")]
    texts += [
        t.format(noun="wall", other="wall", adjective="quiet", second="quiet", season="spring")
        for t in filler.FILLER_TEMPLATES
    ]
    every = subject_names() + filler.FILLER_NOUNS + filler.FILLER_ADJECTIVES + filler.FILLER_SEASONS
    every += tuple(value for a in attributes for value in a.values)
    texts += [form for word in every for form in (f"{word} ", f"{word}. ")] * 4
    return texts


def train_tokenizer() -> Tokenizer:
    """A tokenizer that knows every word of the world as one token and any other text as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(HF_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    check_single_tokens(tokenizer)
    return tokenizer


def check_single_tokens(tokenizer: Tokenizer) -> None:
    """Raise ValueError unless every name and value is one token, before a space and before punctuation."""
    attributes = [a for kind in words.ATTRIBUTES.values() for a in kind]
    every = subject_names() + tuple(value for a in attributes for value in a.values)
    split = [w for w in every for form in (w, w + " ") if len(tokenizer.encode(form).ids) != 1]
    if split:
        raise ValueError(f"not one token: {split[:8]} ({len(split)} in all); raise VOCAB_SIZE")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
