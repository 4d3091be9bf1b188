"""lm_eval drives our model over its own tasks, and gets what `hsai eval --tasks` gets, and its own backend."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.evaluate import EvaluationConfig, Pair, Scorer, evaluate_tasks
from hsai.evaluate.harness import HarnessModel
from hsai.evaluate.pairs import encode_pairs
from hsai.evaluate.tasks import TASKS
from hsai.infer import Engine
from hsai.interop.assets import describe_tokenizer, name_tokens, serialize_tokenizer
from hsai.interop.huggingface import write_huggingface
from hsai.models import Transformer
from tests.evaluate.harness_tasks import make_task
from tests.export.tiny_models import make_model

NAMES = ("arc_easy", "lambada", "winogrande")
LIMIT = 3
"""Documents of each: every length is a program to compile."""


@pytest.fixture(scope="module")
def wide() -> Transformer:
    """A context that the questions fit into."""
    return make_model(max_length=512)


@pytest.fixture(scope="module")
def adapter(wide: Transformer, tokenizer: Tokenizer) -> HarnessModel:
    return HarnessModel(wide, tokenizer)


def make_instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_both_agree(
    adapter: HarnessModel,
    wide: Transformer,
    tokenizer: Tokenizer,
    documents_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # the harness would fork to draw samples, and jax has threads
    tasks = {f"local_{name}": make_task(name, TASKS[name].documents, TASKS[name].examples, 1) for name in NAMES}
    theirs = lm_eval.evaluate(adapter, tasks, limit=LIMIT, bootstrap_iters=2, log_samples=False)["results"]
    config = EvaluationConfig(tasks=NAMES, few_shot=1, limit=LIMIT)
    ours = list(evaluate_tasks(Scorer(wide), tokenizer, config, cache=documents_cache))
    assert [result.task for result in ours] == list(NAMES)
    for result in ours:
        found = theirs[f"local_{result.task}"]
        for metric in result.metrics:
            assert metric.value == pytest.approx(found[f"{metric.name},none"], rel=1e-6)
            assert metric.n == LIMIT
            if metric.name != "perplexity":  # whose error the harness draws by lot
                assert metric.standard_error == pytest.approx(found[f"{metric.name}_stderr,none"], rel=1e-9)


def test_the_harness_own_backend_agrees(
    adapter: HarnessModel, wide: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model as a checkpoint, tokenized and computed by transformers and scored by lm_eval."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    assets = {
        "tokenizer.json": serialize_tokenizer(tokenizer),
        "tokenizer_config.json": describe_tokenizer(tokenizer, 512),
    }
    write_huggingface(tmp_path / "model", wide, tokens=name_tokens(tokenizer), assets=assets)
    theirs = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=1)
    answers = []
    for model in (theirs, adapter):
        task = {"arc_easy": make_task("arc_easy", TASKS["arc_easy"].documents, TASKS["arc_easy"].examples, 1)}
        found = lm_eval.evaluate(model, task, limit=LIMIT, bootstrap_iters=2, log_samples=True)
        metrics = {name: found["results"]["arc_easy"][f"{name},none"] for name in ("acc", "acc_norm")}
        scored = [answer for sample in found["samples"]["arc_easy"] for (answer,) in sample["resps"]]
        answers.append((metrics, scored))
    (metrics, scored), (our_metrics, our_scored) = answers
    assert our_metrics == metrics and len(scored) == 12
    assert [greedy for _, greedy in our_scored] == [greedy for _, greedy in scored]
    for (value, _), (expected, _) in zip(our_scored, scored, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods(adapter: HarnessModel, wide: Transformer, tokenizer: Tokenizer) -> None:
    texts = [
        ("hello world,", " hello"),
        ("hello world,", " bundle"),
        ("", "def main()"),
        ("return  ", "'héron"),
        ("x", "y"),
    ]
    found = adapter.loglikelihood([make_instance("loglikelihood", *text) for text in texts])
    scores = Scorer(wide).score([[pair] for pair in encode_pairs(tokenizer, texts)])
    assert [greedy for _, greedy in found] == [score.is_greedy for (score,) in scores]
    for (value, _), (score,) in zip(found, scores, strict=True):
        assert value == pytest.approx(score.log_likelihood, abs=1e-4)


def test_rolling(model: Transformer, tokenizer: Tokenizer) -> None:
    """A text longer than the model's context: the sum over `hsai eval`'s windows, by lm_eval's cut of them."""
    text = "def main(): return 'héron' # hello world\n" * 9
    tokens = tokenizer.encode(text)
    assert len(tokens) > 2 * model.config.max_length
    windows = map(make_disjoint_window, get_rolling_token_windows(tokens, tokenizer.eot, model.config.max_length, 1))
    pairs = [[Pair(context=tuple(context), continuation=tuple(rest))] for context, rest in windows]
    expected = sum(score.log_likelihood for (score,) in Scorer(model).score(pairs))
    requests = [make_instance("loglikelihood_rolling", part) for part in (text, "def")]
    found, short = HarnessModel(model, tokenizer).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-5 * len(tokens)) and found < short < 0


def test_generation(adapter: HarnessModel, wide: Transformer, tokenizer: Tokenizer) -> None:
    """Greedy text up to the first stop, which is left out; contexts that are too long lose their beginning."""
    whole = Engine.trace(wide, tokenizer).generate("hello world", max_tokens=12).text
    stop = whole[len(whole) // 2]
    requests: list[dict[str, Any]] = [
        {"max_gen_toks": 12},
        {"until": [stop, "\0"], "max_gen_toks": 12},
        {"until": stop, "max_gen_toks": 12},
    ]
    plain, listed, single = adapter.generate_until(
        [make_instance("generate_until", "hello world", r) for r in requests]
    )
    assert plain == whole and listed == single == whole.partition(stop)[0] != whole
    long = "hello world " * 600
    (cut,) = adapter.generate_until([make_instance("generate_until", long, {"max_gen_toks": 4})])
    ids = [tokenizer.eot, *tokenizer.encode(long)][-508:]
    assert cut == Engine.trace(wide, tokenizer).generate_tokens(ids, max_tokens=4).text
    with pytest.raises(InputError, match="600 tokens leave no room for a prompt in a context of 512"):
        adapter.generate_until([make_instance("generate_until", "x", {"max_gen_toks": 600})])
