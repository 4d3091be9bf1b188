"""The tasks: how a document becomes a question, with the prompts of EleutherAI's harness (lm_eval/tasks, 0.4.13)."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal

from hsai.evaluate.documents import Document
from hsai.evaluate.subjects import SUBJECTS

MetricName = Literal["acc", "acc_norm", "perplexity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A document as the model sees it."""

    prompts: tuple[str, ...]
    """What stands before each answer."""

    answers: tuple[str, ...]
    """What is scored, as many as prompts."""

    gold: int
    """Which of them is right."""

    @property
    def solved(self) -> str:
        """The question with its answer, as an example for others."""
        return f"{self.prompts[self.gold]} {self.answers[self.gold]}\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark."""

    name: str
    """What `--tasks` calls it."""

    documents: str
    """What is asked, a name of `hsai.evaluate.documents.SOURCES`."""

    examples: str
    """Where solved examples come from. The harness takes them from training sets, which are not in the package; so
    they are drawn as it draws them for a task that has none."""

    ask: Callable[[Document], Question]
    """Makes the question."""

    metrics: tuple[MetricName, ...]
    """What is measured."""

    separator: str = " "
    """Between prompt and answer."""

    description: str = ""
    """Before everything else."""

    shots: int = 0
    """Examples, if it is not said how many."""

    first_examples: bool = False
    """Examples are the first of their set for every document, and not drawn."""

    may_repeat: bool = False
    """A document may be drawn as its own example: so the harness does it where examples come from a test set."""


def _choose(prompt: str, answers: list[str], gold: int) -> Question:
    """One prompt for all answers."""
    return Question(prompts=(prompt,) * len(answers), answers=tuple(answers), gold=gold)


def ask_lambada(document: Document) -> Question:
    """The last word of a passage."""
    # The space before the word belongs to the answer here; the harness adds another one in examples.
    return _choose(document["context"], [f" {document['word']}"], 0)


def ask_hellaswag(document: Document) -> Question:
    """What happens next."""
    prompt = f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}"
    endings = [_clean(ending) for ending in document["endings"]]
    return _choose(_clean(prompt), endings, int(document["label"]))


def _clean(text: str) -> str:
    """Without the marks that WikiHow's pages left in the data."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def ask_piqa(document: Document) -> Question:
    """How to reach a goal."""
    return _choose(f"Question: {document['goal']}\nAnswer:", [document["sol1"], document["sol2"]], document["label"])


def ask_arc(document: Document) -> Question:
    """Science, at school; the choices are scored as texts."""
    return _choose(f"Question: {document['question']}\nAnswer:", document["choices"], document["gold"])


def ask_winogrande(document: Document) -> Question:
    """Whom a sentence means: each option is put in, and the rest of the sentence is scored."""
    before, _, after = document["sentence"].partition("_")
    prompts = tuple(before + document[option] for option in ("option1", "option2"))
    return Question(prompts=prompts, answers=(after.strip(),) * 2, gold=int(document["answer"]) - 1)


def ask_boolq(document: Document) -> Question:
    """A question that a passage answers with yes or no."""
    return _choose(document["query"], ["no", "yes"], ("no", "yes").index(document["answer"]))


def ask_mmlu(document: Document) -> Question:
    """A question with four choices, of which the letters are scored."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", document["choices"], strict=True))
    return _choose(f"{document['question'].strip()}\n{choices}\nAnswer:", list("ABCD"), document["answer"])


def _make_subject(subject: str) -> Task:
    topic = subject.replace("_", " ")
    return Task(
        name=f"mmlu_{subject}",
        documents=f"mmlu_{subject}_test",
        examples=f"mmlu_{subject}_dev",
        ask=ask_mmlu,
        metrics=("acc",),
        description=f"The following are multiple choice questions (with answers) about {topic}.\n\n",
        shots=5,
        first_examples=True,
    )


_BOTH: tuple[MetricName, ...] = ("acc", "acc_norm")
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="lambada",
            documents="lambada",
            examples="lambada",
            ask=ask_lambada,
            metrics=("perplexity", "acc"),
            separator="",
            may_repeat=True,
        ),
        Task(name="hellaswag", documents="hellaswag", examples="hellaswag", ask=ask_hellaswag, metrics=_BOTH),
        Task(name="piqa", documents="piqa", examples="piqa", ask=ask_piqa, metrics=_BOTH),
        Task(name="arc_easy", documents="arc_easy_test", examples="arc_easy_validation", ask=ask_arc, metrics=_BOTH),
        Task(
            name="arc_challenge",
            documents="arc_challenge_test",
            examples="arc_challenge_validation",
            ask=ask_arc,
            metrics=_BOTH,
        ),
        Task(name="winogrande", documents="winogrande", examples="winogrande", ask=ask_winogrande, metrics=("acc",)),
        Task(name="boolq", documents="boolq", examples="boolq", ask=ask_boolq, metrics=("acc",)),
        *map(_make_subject, SUBJECTS),
    )
}
"""By name; `mmlu` stands for all of its subjects, and is no task itself."""
