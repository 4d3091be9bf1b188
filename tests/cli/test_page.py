"""The page of `hsai eval --html`: well-formed, whole, and with nothing on it that was not measured."""

import copy
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from flax import nnx

from hsai.cli.figures import draw_layers, draw_sensitivities
from hsai.cli.page import make_page
from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.calibration import CalibrationConfig, digest_windows, draw_windows
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.configuration import to_dict
from hsai.formats import Int4Config
from hsai.models import Transformer, TransformerConfig

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


def make_results(origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of two models, the second of which comes from `origin`."""

    def task(value: float) -> dict[str, Any]:
        found: dict[str, Any] = {"perplexity": {"value": value, "standard_error": 0.5, "n": 100}}
        return {"task": "perplexity:book.txt", "part_of": None, "metrics": found}

    second = task(22.0)
    second["metrics"]["perplexity"] |= {"ratio": 1.1, "ratio_standard_error": 0.004}
    second["metrics"]["kl"] = {"value": 0.1, "standard_error": 0.01, "n": 100}
    return {
        "machine": MACHINE,
        "rows": [
            {"model": "dense", "bytes": 65536, "bits_per_weight": 32.0},
            {"model": "<int4>", "bytes": 8704, "bits_per_weight": 4.25},
        ],
        "evaluations": [{"commit": "abc", "tasks": [task(20.0)]}, {"commit": "abc", "tasks": [second]}],
        "origins": [{}, origin or {}],
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
    origin = {"ledger": LEDGER, "recipe_name": "int4", "calibration_sha256": "ff00", "commit": "abc"}
    results = make_results(origin | {"measured_sha256": "ee11"})
    page = make_page(results)
    read = Reader(page)
    assert read.open == [] and "script" not in read.seen
    assert (read.seen["table"], read.seen["svg"]) == (3, 4)
    text = " ".join(read.words)
    for part in (
        "A <fast> one",
        "x&y.html",
        "<int4>",
        "20.0000 ± 0.5000",
        "22.0000 ± 0.5000 (1.1000x ± 0.0040)",
        "0.1000",
        "int4 g64",
        "ff00",
        "measured sha256 ee11",
        "8.00%",
        "Reconstruction of each layer",
        "Sensitivity of each layer",
        "damping of each product",
        "layers.mlp.up 1 6.00% -",
    ):
        assert part in text, part
    assert make_page(json.loads(json.dumps(results))) == page


def test_a_run_has_no_bytes_and_no_place_in_the_plot() -> None:
    results = make_results()
    del results["rows"][0]["bytes"]
    text = " ".join(Reader(make_page(results)).words)
    assert "dense - 32.000 20.0000" in text and "<int4> 0.01 4.250" in text
    assert "Size and quality" in make_page(make_results()) and "Size and quality" not in text  # of one point


def test_what_a_calibrated_recipe_leaves() -> None:
    """The ledger of a model that was scaled and solved, as it stands in a manifest."""
    config = TransformerConfig(vocab=96, embed=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=32)
    calibration = CalibrationConfig(tokens=256, sequence_length=32, batch=4, seed=77)
    windows = draw_windows(np.random.default_rng(0).integers(0, config.vocab, 600), calibration)
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.down", format=Int4Config(group=32), solver=FeedbackConfig()),),
        transforms=(ScalingConfig(steps=1),),
        calibration=calibration,
    )
    _, ledger = compress(Transformer(config, rngs=nnx.Rngs(0)), recipe, calibration=windows)
    extra = {"ledger": ledger.to_dict(), "recipe": to_dict(recipe), "recipe_name": "mine"}
    origin = json.loads(json.dumps(extra | {"calibration_sha256": digest_windows(windows)}))
    read = Reader(make_page(make_results(origin)))
    assert read.open == [] and (read.seen["table"], read.seen["svg"]) == (4, 2)  # a frontier, and errors of products
    text = " ".join(read.words)
    for part in ("calibration seed 77", "calibration tokens 256", digest_windows(windows), "recipe name mine"):
        assert part in text, part
    assert to_dict(recipe) in [json.loads(words) for words in read.words if words.startswith("{")]
    for solved in ledger.layers:
        assert solved.damping is not None
        cells = ("layers.mlp.down", solved.layer, f"{solved.output_error:.2%}", f"{solved.damping:.3g}")
        assert " ".join(map(str, cells)) in text
    assert len(ledger.layers) == 2 and len(ledger.scales) > 0
    for scaled in ledger.scales:
        errors = f"{scaled.error_before:.2%} {scaled.error_after:.2%}"
        assert f"{scaled.source} {scaled.layer} {scaled.exponent:.3g} {errors}" in text


def test_weights_that_were_packed_before_say_so() -> None:
    """No error and no calibration is told of what a repacking left as it was; but what was before it, and its peak only
    where it is this bundle's."""
    ledger = {key: LEDGER[key] for key in ("parameters", "bytes", "bits_per_weight")}
    ledger["weights"] = [LEDGER["weights"][0] | {"relative_error": None}]
    first = {
        "directory": "/models/<first>",
        "sha256": "aa",
        "origin": {"recipe_name": "a", "calibration_sha256": "ff00"},
    }
    origin = {
        "ledger": ledger,
        "recipe": {"calibration": {"tokens": 512, "seed": 3}},
        "step": 400,
        "sources": {"initialize_from": first},
        "cost": {"seconds": 3, "resumed": "trials of 3 layers", "machine": MACHINE, "peak_device_memory_mib": 2000},
    }
    read = Reader(make_page(make_results(origin)))
    text = " ".join(read.words)
    assert read.open == [] and "4.250 as it was" in text and "calibration tokens" not in text
    assert "training steps 400" in text and "3 s, without trials of 3 layers of an earlier run, this step alone" in text
    assert "began from <first> (SHA-256 aa, recipe a, calibration SHA-256 ff00)" in text
    assert "peak device memory 2,000 MiB" in text and "peak memory" not in text


def test_what_failed_is_marked_and_says_why() -> None:
    """What stays dense on purpose takes no damping either, and is no failure; an error that is no number is null."""
    ledger = copy.deepcopy(LEDGER)
    ledger["layers"][1] |= {"output_error": None, "note": "rounded plainly: <no> factor"}
    ledger["scales"] = [{"source": "norm", "layer": 0, "exponent": 0.0, "error_before": None, "error_after": 0.25}]
    ledger["blocks"][1] |= {"error_tuned": None, "note": "tuning diverged to nan"}
    read = Reader(make_page(make_results({"ledger": ledger})))
    text = " ".join(read.words)
    assert read.open == [] and read.seen["table"] == 6 and "norm 0 0 - 25.00%" in text
    assert "rounded plainly: <no> factor" in text and "tuning diverged to nan" in text
    layers = LEDGER["layers"]
    assert draw_layers([layers[0], layers[1] | {"note": "rounded plainly: why"}]) != draw_layers(layers)
    assert draw_layers(layers) == draw_layers([layers[0], layers[1] | {"damping": 0.01}])
    assert draw_layers(layers) == draw_layers([layers[0], layers[1] | {"note": "no token went to expert 2"}])


def test_sensitivities_that_are_no_numbers() -> None:
    """A candidate's leaves a gap in its line; that of a choice is marked besides."""
    choices = copy.deepcopy(LEDGER["allocation"]["choices"])
    pictures = [draw_sensitivities(choices)]
    choices[1]["candidates"][0]["loss"] = None
    pictures.append(draw_sensitivities(choices))
    choices[1]["loss"] = choices[1]["candidates"][1]["loss"] = None
    pictures.append(draw_sensitivities(choices))
    assert len(set(pictures)) == 3
    assert ["M -4.5 4.5" in picture for picture in pictures] == [False, False, True], "a cross"
    ledger = LEDGER | {"allocation": {"budget": 9000, "choices": choices}}
    assert pictures[2] in make_page(make_results({"ledger": ledger}))


def test_memory_of_devices_stands_beside_that_of_the_host() -> None:
    results = make_results()
    speed = {"decode_tokens_per_second": 9.0, "decode_spread": [8.0, 10.0], "prefill_tokens_per_second": 90.0}
    speed |= {"prefill_spread": [80.0, 99.0], "peak_memory": 7_000_000, "peak_device_memory": 5_000_000}
    results["rows"] = [row | speed for row in results["rows"]]
    text = " ".join(Reader(make_page(results)).words)
    assert "peak memory, MB peak device memory, MB" in text and text.count("90 (80 to 99) 7 5") == 2


def test_nothing_that_was_not_measured() -> None:
    results = copy.deepcopy(make_results())
    del results["evaluations"]
    read = Reader(make_page(results))
    assert read.seen["table"] == 1 and "svg" not in read.seen
    words = " ".join(read.words)
    assert "tokens/s" not in words and "perplexity" not in words and "memory" not in words
