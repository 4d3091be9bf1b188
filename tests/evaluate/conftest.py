"""A tiny model, and a cache with a few invented documents of every task: nothing is fetched."""

import json
from pathlib import Path
from typing import Any

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.evaluate.documents import PACKAGE
from hsai.fetch import CATALOG
from hsai.models import Transformer
from tests.export.tiny_models import make_model, make_tokenizer

QUESTIONS = ("Why is the sky blue?", "What do héron eat", "Which number is even", "Where is hello world", "Say 数据")
CHOICES = (
    ["scattered light", "paint", "the sea", "no reason at all"],
    ["fish", "main()", "return 😀"],
    ["one", "two", "3", "5", "seven"],
    ["in the bundle", "elsewhere ", "def main", "x"],
    ["data", "数据", "dàta", "datum"],
)
GOLD = (0, 0, 1, 2, 1)
ARC = [{"question": q, "choices": c, "gold": g} for q, c, g in zip(QUESTIONS, CHOICES, GOLD, strict=True)]
MMLU = [
    {"question": f" {q}\n", "choices": (c + ["all", "none"])[:4], "answer": g}
    for q, c, g in zip(QUESTIONS, CHOICES, GOLD, strict=True)
]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy_test": ARC,
    "arc_easy_validation": ARC[::-1],
    "lambada": [
        {"context": f"hello world, {q} return", "word": word}
        for q, word in zip(QUESTIONS, ("blue", "fish", "'two'", "main():", "数据"), strict=True)
    ],
    "hellaswag": [
        {
            "activity_label": "Hello [x] world",
            "ctx_a": q,
            "ctx_b": "he",
            "endings": [f"{c} [title] Then [step] 2  ends" for c in (cs + ["more"])[:4]],
            "label": str(g),
        }
        for q, cs, g in zip(QUESTIONS, CHOICES, GOLD, strict=True)
    ],
    "piqa": [
        {"goal": q, "sol1": c[0], "sol2": c[1], "label": g % 2}
        for q, c, g in zip(QUESTIONS, CHOICES, GOLD, strict=True)
    ],
    "winogrande": [
        {
            "sentence": f"{q} Then _ returned the hello bundle.",
            "option1": c[0],
            "option2": c[1],
            "answer": str(g % 2 + 1),
        }
        for q, c, g in zip(QUESTIONS, CHOICES, GOLD, strict=True)
    ],
    "boolq": [
        {"query": f"Title -- {q}\nQuestion: is it so?\nAnswer:", "answer": ("no", "yes")[g % 2]}
        for q, g in zip(QUESTIONS, GOLD, strict=True)
    ],
    "mmlu_virology_test": MMLU,
    "mmlu_virology_dev": MMLU[::-1],
}


@pytest.fixture(scope="session")
def documents_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `load_documents` keeps them."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "documents" / CATALOG[PACKAGE].wheel.sha256[:12]
    folder.mkdir(parents=True)
    for name, documents in DOCUMENTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return cache


@pytest.fixture(scope="session")
def model() -> Transformer:
    """Float32, with a context of 48 tokens."""
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()
