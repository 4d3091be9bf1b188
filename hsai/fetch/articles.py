"""Plain text for calibration and for held-out measurement, out of a package of Wikipedia's introductions.

Articles are split by a hash of their titles, so that the same ones are held out wherever and whenever it is done.
"""

import hashlib
import json
from pathlib import Path

from hsai.errors import InputError
from hsai.fetch.cache import partial_directory, publish
from hsai.files import flush

ARTICLES = "summaries_"
"""How the names of such packages' files begin."""

TRAIN, HELDOUT = "train.txt", "heldout.txt"
HELD_OUT_SHARE = 10
"""Every tenth article, on average."""


def write_articles(summaries: Path, directory: Path) -> None:
    """Writes train.txt and heldout.txt, titles above texts, articles in the order of the hash; all of it or nothing.

    Args:
      summaries: JSON {title: {"extract": text, ...}}.
      directory: to be made, in place of what stands there.
    Raises:
      InputError: the JSON is not of that form.
    """
    try:
        articles = {str(title): str(entry["extract"]) for title, entry in json.loads(summaries.read_bytes()).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{summaries} is no JSON of articles, title: {{extract: text}}") from error
    texts: dict[str, list[str]] = {TRAIN: [], HELDOUT: []}
    for digest, title in sorted((hashlib.sha256(title.encode()).digest(), title) for title in articles):
        name = TRAIN if int.from_bytes(digest[:8], "little") % HELD_OUT_SHARE else HELDOUT
        texts[name].append(f"{title}\n\n{articles[title].strip()}\n")
    partial = partial_directory(directory)
    partial.mkdir(parents=True, exist_ok=True)
    for name, parts in texts.items():
        (partial / name).write_text("\n\n".join(parts), encoding="utf-8")
        flush(partial / name)
    publish(partial, directory)
