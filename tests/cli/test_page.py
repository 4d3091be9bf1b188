"""The page of `hsai eval --html`: well-formed, whole, and with nothing on it that was not measured."""

import copy
from html.parser import HTMLParser
from typing import Any

from hsai.cli.page import make_page

MACHINE = {"processor": "A <fast> one", "cores": 2, "command": "hsai eval a b --html 'x&y.html'"}
LEDGER = {
    "weights": [
        {
            "weight": "layers.mlp.up",
            "format": "int4 g64",
            "shape": [2, 64, 128],
            "bytes": 8704,
            "bits_per_weight": 4.25,
            "relative_error": 0.08,
        }
    ],
    "layers": [
        {"weight": "layers.mlp.up", "layer": layer, "output_error": 0.03 * (layer + 1), "damping": damping, "note": ""}
        for layer, damping in ((0, 0.01), (1, None))
    ],
    "blocks": [
        {"layer": 0, "error_solved": 0.05, "error_tuned": 0.03, "tuned": True},
        {"layer": 1, "error_solved": 0.07, "error_tuned": 0.08, "tuned": False},
    ],
    "allocation": {
        "budget": 9000,
        "choices": [
            {
                "weight": "layers.mlp.up",
                "layer": layer,
                "format": "int4 g64",
                "bytes": 4352,
                "loss": loss,
                "candidates": [
                    {"format": "int2 g64", "bytes": 2304, "loss": 0.1},
                    {"format": "int4 g64", "bytes": 4352, "loss": loss},
                ],
            }
            for layer, loss in ((0, 0.01), (1, 0.0))
        ],
    },
    "parameters": 16384,
    "bytes": 8704,
    "bits_per_weight": 4.25,
}


def make_results() -> dict[str, Any]:
    def task(value: float) -> dict[str, Any]:
        found = {"perplexity": {"value": value, "standard_error": 0.5, "n": 100}}
        return {"task": "perplexity:book.txt", "part_of": None, "metrics": found}

    second = task(22.0)
    second["metrics"]["kl"] = {"value": 0.1, "standard_error": 0.01, "n": 100}
    return {
        "machine": MACHINE,
        "rows": [
            {"model": "dense", "bytes": 65536, "bits_per_weight": 32.0},
            {"model": "<int4>", "bytes": 8704, "bits_per_weight": 4.25},
        ],
        "evaluations": [{"commit": "abc", "tasks": [task(20.0)]}, {"commit": "abc", "tasks": [second]}],
    }


class Reader(HTMLParser):
    """Counts elements, and checks that each one that is opened is closed in its turn."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_numbers_ledgers_and_plots() -> None:
    origins = [{}, {"ledger": LEDGER, "recipe_name": "int4", "calibration_sha256": "ff00", "commit": "abc"}]
    page = make_page(make_results(), origins)
    read = Reader(page)
    assert read.open == [] and "script" not in read.seen
    assert (read.seen["table"], read.seen["svg"]) == (2, 4)
    text = " ".join(read.words)
    for part in (
        "A <fast> one",
        "x&y.html",
        "<int4>",
        "20.0000 ± 0.5000",
        "(1.100x)",
        "0.1000",
        "int4 g64",
        "ff00",
        "8.00%",
        "Reconstruction of each layer",
        "Sensitivity of each layer",
    ):
        assert part in text, part
    assert make_page(make_results(), origins) == page


def test_nothing_that_was_not_measured() -> None:
    results = copy.deepcopy(make_results())
    del results["evaluations"]
    read = Reader(make_page(results, [{}, {}]))
    assert read.seen["table"] == 1 and "svg" not in read.seen
    words = " ".join(read.words)
    assert "tokens/s" not in words and "perplexity" not in words and "memory" not in words
