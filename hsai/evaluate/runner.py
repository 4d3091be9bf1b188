"""Tasks by name, for one model: documents to questions, questions to scores, scores to metrics."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hsai.configuration import suggest
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.evaluate.divergence import Reference, measure_divergence
from hsai.evaluate.documents import load_documents
from hsai.evaluate.fewshot import SEED, ExampleSampler
from hsai.evaluate.metrics import Metric, average, is_right, is_right_by_length, perplexity, pool
from hsai.evaluate.pairs import begin_text, encode_pairs
from hsai.evaluate.perplexity import cut_chunks, cut_windows, read_text
from hsai.evaluate.scorer import Score, Scorer
from hsai.evaluate.subjects import SUBJECTS
from hsai.evaluate.tasks import TASKS, Question, Task
from hsai.fetch.cache import Progress

MMLU = "mmlu"
WINDOWS, CHUNKS = "perplexity:", "perplexity_llamacpp:"
NAMES = (*(name for name in TASKS if not name.startswith(MMLU)), MMLU)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured."""

    tasks: tuple[str, ...]
    """Names of `TASKS`; mmlu, for all of its subjects; perplexity:FILE and perplexity_llamacpp:FILE, for a text."""

    few_shot: int | None = None
    """Solved examples before each question; by default the task's own number (5 of mmlu, 0 of the others)."""

    limit: int | None = None
    """Only the first documents of each task, or windows of a text."""

    seed: int = SEED
    """Of the draws of examples."""

    window: int | None = None
    """Tokens of a text that are read together; by default 512 (llama.cpp's own), or the model's context if shorter."""

    stride: int | None = None
    """How far perplexity:FILE's windows are apart; by default a whole window."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError(f"no tasks; valid: {_list_names()}")
        for name in self.tasks:
            _check_name(name)
        if self.few_shot is not None and self.few_shot < 0:
            raise InputError(f"--few-shot {self.few_shot} must be at least 0")
        for name in ("limit", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model got."""

    task: str
    """Its name."""

    metrics: tuple[Metric, ...]
    """One or two."""

    few_shot: int
    """Examples before each question."""

    scored_tokens: int
    """Tokens whose log-likelihood was asked for."""

    seconds: float
    """That the model took, compilation included; for the subjects of MMLU, of all of them."""

    settings: dict[str, int]
    """Of a text: window, and stride where there is one."""

    part_of: str | None = None
    """The task that this one is a part of."""

    changes: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    """By the names of metrics, `compare` of the reference's with these; empty of the reference itself."""


def evaluate_tasks(
    scorer: Scorer,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    *,
    cache: Path | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Iterator[TaskResult]:
    """The results of each task in turn, as soon as it is done; those of MMLU's subjects before that of all.

    Args:
      scorer: of the model.
      tokenizer: of the model.
      config: what to measure.
      cache: where documents are kept, and fetched to, by default `hsai.fetch.default_cache()`.
      reference: what it makes of tasks is kept if it is of this scorer; another is compared with it.
      progress: called with (what is done, how much of it, of how much).
    Raises:
      InputError: documents cannot be had, a text cannot be read or is too short.
    """
    for result in _measure_each(scorer, tokenizer, config, cache, reference, progress):
        if reference is not None:
            changes = reference.compare(result.task, result.settings, result.metrics, scorer, tokenizer)
            result = dataclasses.replace(result, changes=changes)
        yield result


def _measure_each(
    scorer: Scorer,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    cache: Path | None,
    reference: Reference | None,
    progress: Progress | None,
) -> Iterator[TaskResult]:
    for name in config.tasks:
        if name.startswith((WINDOWS, CHUNKS)):
            yield _measure_text(scorer, tokenizer, config, name, reference, progress)
        else:
            tasks = [TASKS[f"{MMLU}_{subject}"] for subject in SUBJECTS] if name == MMLU else [TASKS[name]]
            results = _measure(scorer, tokenizer, config, name, tasks, cache, progress)
            if name != MMLU:
                yield from results
            else:
                yield from (dataclasses.replace(result, part_of=MMLU) for result in results)
                yield dataclasses.replace(
                    results[0],
                    task=MMLU,
                    metrics=(pool("acc", [result.metrics[0] for result in results]),),
                    scored_tokens=sum(result.scored_tokens for result in results),
                )


def make_questions(
    task: Task, *, few_shot: int, limit: int | None, seed: int, cache: Path | None, progress: Progress | None = None
) -> list[tuple[str, Question]]:
    """(What stands before the prompt, question) of each document."""
    documents = load_documents(task.documents, cache=cache, progress=progress)
    same = task.examples == task.documents
    examples = documents if same else load_documents(task.examples, cache=cache, progress=progress)
    own = same and not task.may_repeat
    sampler = ExampleSampler(examples, count=few_shot, seed=seed, own=own, first=task.first_examples)
    questions = []
    for document in documents[:limit]:
        shots = "".join(task.ask(example).solved for example in sampler.draw(document))
        questions.append((task.description + shots, task.ask(document)))
    return questions


def _measure(
    scorer: Scorer,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    name: str,
    tasks: Sequence[Task],
    cache: Path | None,
    progress: Progress | None,
) -> list[TaskResult]:
    """Several tasks as one: their questions are scored together."""
    shots = [task.shots if config.few_shot is None else config.few_shot for task in tasks]
    questions = [
        make_questions(task, few_shot=count, limit=config.limit, seed=config.seed, cache=cache, progress=progress)
        for task, count in zip(tasks, shots, strict=True)
    ]
    start = time.perf_counter()
    texts = [
        (lead + prompt, task.separator + answer)
        for task, asked in zip(tasks, questions, strict=True)
        for lead, question in asked
        for prompt, answer in zip(question.prompts, question.answers, strict=True)
    ]
    pairs = iter(encode_pairs(tokenizer, texts))
    groups = [[next(pairs) for _ in question.answers] for asked in questions for _, question in asked]
    scores = iter(scorer.score(groups, _bind(progress, name)))
    seconds = time.perf_counter() - start
    results = []
    for task, count, asked in zip(tasks, shots, questions, strict=True):
        found = [next(scores) for _ in asked]
        results.append(
            TaskResult(
                task=task.name,
                metrics=_judge(task, [question for _, question in asked], found),
                few_shot=count,
                scored_tokens=_count(found),
                seconds=seconds,
                settings={},
            )
        )
    return results


def _judge(task: Task, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> tuple[Metric, ...]:
    """The task's metrics."""
    if "perplexity" in task.metrics:  # one answer to each question
        return (
            perplexity([score.log_likelihood for (score,) in scores]),
            average("acc", [float(score.is_greedy) for (score,) in scores]),
        )
    both = list(zip(questions, scores, strict=True))
    right = [float(is_right(found, question.gold)) for question, found in both]
    by_length = [float(is_right_by_length(found, question.answers, question.gold)) for question, found in both]
    values = {"acc": right, "acc_norm": by_length}
    return tuple(average(name, values[name]) for name in task.metrics)


def _measure_text(
    scorer: Scorer,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    name: str,
    reference: Reference | None,
    progress: Progress | None,
) -> TaskResult:
    """The perplexity of a text, by one of the two definitions in perplexity.py; and how far it is from `reference`."""
    path = Path(name.partition(":")[2])
    text = read_text(path)
    tokens = tokenizer.encode(text)
    window = min(512, scorer.max_length) if config.window is None else config.window
    if window > scorer.max_length:
        raise InputError(f"--window {window} exceeds the model's context of {scorer.max_length} tokens")
    settings = {"window": window}
    if name.startswith(CHUNKS):
        pairs = cut_chunks(tokens, prefix=tokenizer.prefix, context=window)
    else:
        settings["stride"] = window if config.stride is None else config.stride
        pairs = cut_windows(tokens, prefix=begin_text(tokenizer), context=window, stride=settings["stride"])
    pairs = pairs[: config.limit]
    if not pairs:
        raise InputError(f"{path} holds no text")
    start = time.perf_counter()
    groups, report, hidden = [[pair] for pair in pairs], _bind(progress, name), None
    key = (name, *settings.items())
    if reference is not None and reference.can_judge(tokenizer):
        scores, hidden = scorer.score_and_read(groups, report)
    else:
        scores = scorer.score(groups, report)
    seconds = time.perf_counter() - start
    values = [value for (score,) in scores for value in score.token_log_likelihoods]
    metrics = [perplexity(values)]
    if name.startswith(WINDOWS):
        size = sum(int(tokenizer.token_bytes[token]) for pair in pairs for token in pair.continuation)
        bits = -sum(values) / math.log(2) / size
        metrics.append(Metric(name="bits_per_byte", value=bits, standard_error=None, n=size))
    if reference is not None and hidden is not None:
        if scorer is reference.scorer:
            reference.hidden[key] = hidden
        elif key in reference.hidden:
            metrics += measure_divergence(reference.scorer.model, reference.hidden[key], scorer.model, hidden)
    return TaskResult(
        task=name,
        metrics=tuple(metrics),
        few_shot=0,
        scored_tokens=len(values),
        seconds=seconds,
        settings=settings,
    )


def _bind(progress: Progress | None, name: str) -> "_Bound | None":
    return None if progress is None else _Bound(progress, name)


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A report of tokens as one of a task."""

    progress: Progress
    name: str

    def __call__(self, done: int, total: int) -> None:
        self.progress(self.name, done, total)


def _count(scores: Sequence[Sequence[Score]]) -> int:
    return sum(len(score.token_log_likelihoods) for group in scores for score in group)


def _check_name(name: str) -> None:
    for kind in (WINDOWS, CHUNKS):
        if name.startswith(kind):
            if not Path(name.removeprefix(kind)).is_file():
                raise InputError(f"--tasks {name}: there is no such file")
            return
    if name != MMLU and name not in TASKS:
        nearest = suggest(name, [*NAMES, *TASKS])
        raise InputError(f"--tasks: no task {name!r}; {nearest if 'mean' in nearest else f'valid: {_list_names()}'}")


def _list_names() -> str:
    return ", ".join((*NAMES, f"{MMLU}_SUBJECT", f"{WINDOWS}FILE", f"{CHUNKS}FILE"))
