"""Our prompts and examples against those that the harness builds from its own task files."""

from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.evaluate.fewshot import SEED, ExampleSampler
from hsai.evaluate.runner import EvaluationConfig, make_questions
from hsai.evaluate.tasks import TASKS
from tests.evaluate.harness_tasks import FILES, make_task


@pytest.mark.parametrize("few_shot", [0, 3])
@pytest.mark.parametrize("name", FILES)
def test_requests_are_the_harness_ones(documents_cache: Path, name: str, few_shot: int) -> None:
    task = TASKS[name]
    theirs = make_task(name, task.documents, task.examples, few_shot)
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    expected = [instance.args for instance in theirs.instances]
    asked = make_questions(task, few_shot=few_shot, limit=None, seed=SEED, cache=documents_cache)
    found = [
        (lead + prompt, task.separator + answer)
        for lead, question in asked
        for prompt, answer in zip(question.prompts, question.answers, strict=True)
    ]
    assert found == expected
    if task.metrics != ("perplexity", "acc"):
        golds = [theirs.doc_to_text(d) if name == "winogrande" else theirs.doc_to_target(d) for d in theirs.eval_docs]
        assert [question.gold for _, question in asked] == golds


def test_limit_and_seed(documents_cache: Path) -> None:
    def ask(**changes: int | None) -> list[str]:
        settings = {"few_shot": 2, "limit": None, "seed": SEED} | changes
        return [lead for lead, _ in make_questions(TASKS["piqa"], cache=documents_cache, **settings)]  # type: ignore[arg-type]

    assert ask(limit=2) == ask()[:2]
    assert ask() == ask() != ask(seed=7)


def test_samples_without_their_document() -> None:
    """Even of a set that holds the document twice."""
    pool = [{"n": n % 4} for n in range(8)]
    for seed in range(20):
        drawn = ExampleSampler(pool, count=5, seed=seed, own=True, first=False).draw({"n": 0})
        assert len(drawn) == 5 and {"n": 0} not in drawn
    with pytest.raises(InputError, match="--few-shot 8 is too many: the task has 7 examples"):
        ExampleSampler(pool, count=8, seed=0, own=True, first=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "no tasks; valid: lambada, hellaswag"),
        ({"tasks": ("helaswag",)}, "no task 'helaswag'; did you mean hellaswag?"),
        ({"tasks": ("perplexity:nowhere.txt",)}, "--tasks perplexity:nowhere.txt: there is no such file"),
        ({"tasks": ("piqa",), "few_shot": -1}, "--few-shot -1 must be at least 0"),
        ({"tasks": ("piqa",), "limit": 0}, "--limit 0 must be at least 1"),
        ({"tasks": ("piqa",), "stride": -2}, "--stride -2 must be at least 1"),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**settings)  # type: ignore[arg-type]


def test_mmlu_is_whole() -> None:
    assert sum(name.startswith("mmlu_") for name in TASKS) == 57
