"""The kernels' bench of a whole model's products: what they are, whom they take turns with, and llama.cpp's file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench import llama

    monkeypatch.setattr(llama, "LAYERS", 2)
    return llama


def test_a_model_is_the_products_of_all_its_layers(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "find_absent", lambda packages: "llama_cpp: not here")
    monkeypatch.setattr(llama, "PRODUCTS", {"attn_q": (256, 128), "attn_k": (256, 64), "ffn_down": (512, 256)})
    monkeypatch.setattr(llama, "find_cache_size", lambda: 1)
    cases = list(llama.make_model((1, 128), quick=False))
    decode, prefill = cases[0], cases[3]
    weights = 2 * (256 * 128 + 256 * 64 + 512 * 256)
    assert (decode.flops, prefill.flops) == (2 * weights, 128 * 2 * weights)
    assert decode.nbytes == prefill.nbytes == weights * 4.25 / 8  # a bfloat16 scale for 64
    assert [case.metric for case in (decode, prefill)] == ["GB/s", "GFLOP/s"]
    names = ["int4", "2:4 int4", "64:2:8 int4"]
    rounded = [f"int8 x {name}" for name in names]
    assert [case.name.split(",")[0] for case in cases] == [f"model {name}" for name in 2 * names + 2 * rounded]
    assert decode.ours.run() is not None
    assert decode.peers == [] and "absent" in decode.explain([{"ours": 1.0, "peer_name": None}])


def test_a_sparse_model_takes_turns_with_our_int4(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "find_absent", lambda packages: "llama_cpp: not here")
    monkeypatch.setattr(llama, "PRODUCTS", {"attn_q": (256, 128)})
    monkeypatch.setattr(llama, "find_cache_size", lambda: 1)
    cases = list(llama.make_model((1, 128), quick=False))
    int4 = [peer for case in cases for peer in case.peers]
    assert [peer.name for peer in int4] == ["our int4"] * 8
    assert all(int4[i] is int4[i + 1] for i in range(0, 8, 2)) and len(set(map(id, int4))) == 4
    assert int4[0].run() is not None

    def explain(case: Any, ratio: float) -> str:
        return case.explain([{"peer_name": None}, {"peer_name": "our int4", "ratio": ratio}])

    assert "1.31 times as fast as our int4: 1.3 is asked for, and met" in explain(cases[1], 1.31)
    assert "1.90 times as fast as our int4: 2.0 is asked for, and not met" in explain(cases[2], 1.9)
    assert "asked" not in explain(cases[4], 1.0)  # a prompt waits for arithmetic
    monkeypatch.setattr(llama, "find_cache_size", lambda: 2**30)
    assert "asked" not in explain(list(llama.make_model((1,), quick=True))[1], 1.0)  # nor does what a cache holds count


def test_llamas_own_rates_count_all_that_it_does(llama: Any) -> None:
    """A token that takes llama.cpp 0.1 s, and our products half of that."""
    weights = 2 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    rows = [
        {"ours": 0.05e6, "peer_name": None},
        {"ours": 2.0, "peer": 1.0, "ratio": 2.0, "peer_name": "llama.cpp q4_0 (whole model)"},
    ]
    words = llama._explain(2, 1, None, rows)
    assert "10.0 tokens/s" in words and "ours take 50.0% of its time" in words
    assert f"{(weights + 2048 * 512) * 18 / 32 / 0.1 / 1e9:.2f} GB/s" in words
    assert f"{2 * (weights + 2048 * 512) / 0.1 / 1e9:.1f} GFLOP/s" in words


@pytest.mark.slow
def test_llama_runs_the_file_that_is_written_for_it(llama: Any, tmp_path: Path) -> None:
    absent = llama.find_absent(llama.PACKAGES)
    if absent is not None:
        pytest.skip(f"{absent}: pip install '.[peers]'")
    from bench.llama_context import LlamaContext

    path = tmp_path / "model.gguf"
    llama.write_model(path, 2)
    with LlamaContext(path, slots=64) as context:
        seen = []
        for _ in range(2):
            context.read([5, 17, 300])
            context.write([7], 3)
            logits = np.ctypeslib.as_array(context.logits(), (512,))
            assert np.isfinite(logits).all() and 0.1 < logits.std() < 100
            seen.append(logits.copy())
            context.forget(0)
    np.testing.assert_array_equal(*seen)
    runner = llama._make_llama(path, 1)
    assert runner.times == llama.DECODED and runner.run() is None
    runner.run()
