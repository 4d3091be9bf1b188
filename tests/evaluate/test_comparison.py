"""Which metrics of a model are compared with the reference's, and over which documents and tokens."""

from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.evaluate import EvaluationConfig, Scorer, evaluate_tasks
from hsai.evaluate.divergence import Reference
from hsai.evaluate.metrics import Metric, average, perplexity
from hsai.evaluate.report import describe_result, write_change
from hsai.models import Transformer
from tests.export.tiny_models import make_chatty_tokenizer, make_model

TEXT = "def main(): return 'hello world, hello bundle'\n" * 6


def test_tasks_and_texts(model: Transformer, tokenizer: Tokenizer, documents_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    text = f"perplexity:{tmp_path / 'text'}"
    config = EvaluationConfig(tasks=("lambada", text), limit=3, window=16)
    reference = Reference(Scorer(model), tokenizer)

    def measure(scorer: Scorer, config: EvaluationConfig) -> list[dict]:
        results = evaluate_tasks(scorer, tokenizer, config, cache=documents_cache, reference=reference)
        return [describe_result(result, config)["metrics"] for result in results]

    scorer = Scorer(make_model("int4"))
    firsts, others = measure(reference.scorer, config), measure(scorer, config)
    assert all(write_change(metric) == "" for metrics in firsts for metric in metrics.values())
    for before, after in zip(firsts, others, strict=True):
        ratio = after["perplexity"]["ratio"]
        assert ratio == pytest.approx(after["perplexity"]["value"] / before["perplexity"]["value"], rel=1e-9) != 1
        assert after["perplexity"]["ratio_standard_error"] > 0
    (words, tokens), (first_words, first_tokens) = others, firsts
    assert words["acc"]["difference"] == pytest.approx(words["acc"]["value"] - first_words["acc"]["value"])
    bits = tokens["bits_per_byte"]
    assert bits["difference"] == pytest.approx(bits["value"] - first_tokens["bits_per_byte"]["value"])
    assert bits["difference_standard_error"] is None
    assert write_change(tokens["kl"]) == write_change(tokens["same_choice"]) == ""
    (elsewhere,) = measure(scorer, EvaluationConfig(tasks=(text,), limit=3, window=12))
    assert set(elsewhere) == {"perplexity", "bits_per_byte"}  # in other windows there is nothing to compare with
    assert write_change(elsewhere["perplexity"]) == write_change(elsewhere["bits_per_byte"]) == ""


def test_other_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    """Of another tokenizer, documents are the same, and bytes if the texts are; tokens never, however many they are."""
    reference, other = Reference(Scorer(model), tokenizer), make_chatty_tokenizer()
    assert not reference.can_judge(other)

    def bits(value: float, size: int) -> Metric:
        return Metric(name="bits_per_byte", value=value, standard_error=None, n=size)

    text, words, settings = "perplexity:text", "lambada", {"window": 16}
    for task, its in ((text, settings), (words, {})):
        metrics = [perplexity([-1.0, -2.0]), bits(1.0, 9), average("acc", [0.0, 1.0])]
        assert reference.compare(task, its, metrics, reference.scorer, tokenizer) == {}
    scorer, found = Scorer(model), perplexity([-1.5, -2.0])
    changes = reference.compare(text, settings, [found, bits(1.5, 9)], scorer, tokenizer)
    assert set(changes) == {"perplexity", "bits_per_byte"}
    changes = reference.compare(text, settings, [found, bits(1.5, 9)], scorer, other)
    assert {name: change.value for name, change in changes.items()} == {"bits_per_byte": 0.5}
    assert reference.compare(text, settings, [found, bits(1.5, 8)], scorer, other) == {}
    assert set(reference.compare(words, {}, [found, average("acc", [1.0, 1.0])], scorer, other)) == {
        "perplexity",
        "acc",
    }
