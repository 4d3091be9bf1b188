"""The corpus that a model was trained on: what commands measure on, and calibrate with."""

from pathlib import Path

from hsai.data.corpus import Corpus
from hsai.data.corpus_files import open_corpus
from hsai.errors import InputError
from hsai.export.source import ModelSource


def open_own_corpus(source: ModelSource, corpus: Path | None, option: str) -> Corpus:
    """The corpus in the directory `corpus`, or, without one, that of the model; its tokens are those of the model.

    Raises:
      InputError: the model does not say what it was trained on, and `option` would; the corpus cannot be read, or was
        cut by another tokenizer.
    """
    directory = corpus or Path(source.origin.get("corpus", ""))
    if not directory.name:
        raise InputError(f"{source.directory} does not say what it was trained on; give {option}")
    found = open_corpus(directory, verify=True)  # a number is only as good as what it was measured on
    if not found.tokenizer.cuts_like(source.tokenizer):
        raise InputError(f"corpus {directory} was cut by another tokenizer than that of {source.directory}")
    return found
