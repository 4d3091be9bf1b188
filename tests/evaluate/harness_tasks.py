"""The harness's own tasks, from the files it ships, over the documents of conftest.py in its data sets' form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from tests.evaluate.conftest import DOCUMENTS

FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "mmlu_virology": "mmlu/default/mmlu_virology.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


def _restore_arc(document: dict[str, Any]) -> dict[str, Any]:
    labels = list("ABCDEFG")[: len(document["choices"])]
    choices = {"text": document["choices"], "label": labels}
    return {"question": document["question"], "choices": choices, "answerKey": labels[document["gold"]]}


def _restore_boolq(document: dict[str, Any]) -> dict[str, Any]:
    passage, _, rest = document["query"].partition("\nQuestion: ")
    return {"passage": passage, "question": rest.partition("?\n")[0], "label": int(document["answer"] == "yes")}


def _restore_lambada(document: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{document['context']} {document['word']}"}


RESTORE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "arc_easy_test": _restore_arc,
    "arc_easy_validation": _restore_arc,
    "boolq": _restore_boolq,
    "lambada": _restore_lambada,
}


def make_task(name: str, documents: str, examples: str, few_shot: int) -> ConfigurableTask:
    """The harness's task over local documents; its training set, which our package lacks, is left out."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / FILES[name])
    sets = {
        split: datasets.Dataset.from_list([RESTORE.get(source, dict)(document) for document in DOCUMENTS[source]])
        for split, source in (("test", documents), ("validation", examples), ("dev", examples))
    }
    config |= {
        "task": f"local_{name}",
        "training_split": None,
        "num_fewshot": few_shot,
        "custom_dataset": lambda **settings: sets,
    }
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return task
