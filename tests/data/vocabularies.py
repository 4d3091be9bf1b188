"""Small tokenizers of every kind that models come with, as their tokenizer.json and its neighbours say it."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris.\n",
    "def main():\n    return 'héron 数据 😀'\n",
    "hello world, 12345  two",
] * 3
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(special: list[str], *, nfc: bool = False, bos: str | None = None) -> tokenizers.Tokenizer:
    """As Llama 3 (with `bos`) and Qwen (with `nfc`) have it."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=bos is not None))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


def sentencepiece(style: str) -> tokenizers.Tokenizer:
    """BPE with byte fallback; `style` says what puts a space before a text: a normalizer, a pre-tokenizer, nothing."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(
        ["▁" + text for text in TEXTS if "数" not in text],
        trainers.BpeTrainer(vocab_size=110, initial_alphabet=["▁"], show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    if style == "gemma":  # it makes runs of spaces, and lists them as added tokens too
        tokens.append("▁▁")
        merges.append(("▁", "▁"))
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        ends.append(decoders.Strip(" ", 1, 0))
    elif style == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        ends.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(ends)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    if style == "gemma":
        backend.add_tokens([AddedToken("▁▁", special=False, normalized=False)])
        backend.add_special_tokens(
            [AddedToken("<start_of_turn>", special=True), AddedToken("<end_of_turn>", special=True)]
        )
    return backend


LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

KINDS = {
    "llama3": lambda: byte_level(LLAMA3, bos="<|begin_of_text|>"),
    "qwen": lambda: byte_level(QWEN, nfc=True),
    "llama2": lambda: sentencepiece("llama2"),
    "mistral": lambda: sentencepiece("mistral"),
    "gemma": lambda: sentencepiece("gemma"),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama2": {"add_bos_token": True, "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"},
    "mistral": {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>"},
    "gemma": {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
}
STOPS = {"llama3": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "qwen": ["<|im_end|>", "<|endoftext|>"]}


def write_repository(kind: str, directory: Path) -> tokenizers.Tokenizer:
    """Writes what a Hugging Face repository of this kind holds beside the weights."""
    backend = KINDS[kind]()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = CONFIGS[kind] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if kind in STOPS:
        ids = [backend.token_to_id(token) for token in STOPS[kind]]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "do_sample": True}))
    return backend
