"""A real, trained model: SmolLM2-135M-Instruct as PyPI has it, in Q4_1, against llama.cpp; in, and out again."""

import random
from pathlib import Path

import numpy as np
import pytest

from hsai.cli import main
from hsai.compress.plain import pack_weight
from hsai.data.assets import Assets
from hsai.data.chat import ChatTemplate
from hsai.export.source import ModelSource, open_model
from hsai.fetch import fetch
from hsai.formats import Int4OffsetConfig
from hsai.formats.storage import named_weights
from hsai.interop.gguf import open_gguf_checkpoint
from tests.interop.gguf_files import llama_logits, open_llama, our_logits
from tests.needs import bring

pytestmark = pytest.mark.slow
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "What is the capital of France?"
BEGUN = "The capital of France is"
CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{BEGUN}"
"""What the model's chat template makes of the question, and the beginning of an answer. (As a message of the user's,
those words alone get nonsense from this model, in llama.cpp too.)"""


@pytest.fixture(scope="module")
def file() -> Path:
    return fetch("smollm2-135m")


@pytest.fixture(scope="module")
def source(file: Path) -> ModelSource:
    return open_model(file)


@pytest.fixture(scope="module")
def made(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported bundle, and what is exported of it: GGUF files, and a checkpoint of transformers."""
    directory = tmp_path_factory.mktemp("smollm2")
    assert main(["import", str(file), str(directory / "bundle")]) == 0
    export = ["export", str(directory / "bundle"), "--to"]
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        assert main([*export, "gguf", "--gguf-type", kind, "--out", str(directory / f"{kind}.gguf")]) == 0
    assert main([*export, "huggingface", "--out", str(directory / "checkpoint")]) == 0
    return directory


def test_chat_is_what_the_template_makes(source: ModelSource) -> None:
    template = ChatTemplate.of_model(Assets.parse(source.assets), source.tokenizer)
    assert CHAT == template.render([{"role": "user", "content": QUESTION}]) + BEGUN


def test_ids_are_those_of_llama_cpp(file: Path, source: ModelSource) -> None:
    llama = open_llama(file, vocab_only=True)
    rng = random.Random(0)
    alphabet = [*"abcdefgh'sStT 12 \n\t.,!<|>_-é日🙂\u0301\u00a0½", "<|im_end|>", "the ", "'ll"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(2000)]
    for text in (CHAT, "1234567890 ٣٤٥ Ⅷ", "I'm you're they'LL\r\n", *texts):
        data = text.encode()
        assert source.tokenizer.encode(text) == llama.tokenize(data, add_bos=False, special=False), text
        assert source.tokenizer.encode(text, special=True) == llama.tokenize(data, add_bos=False, special=True), text
    assert llama.tokenize(b"a") == [*source.tokenizer.prefix, *source.tokenizer.encode("a")]


@pytest.mark.parametrize("name", ["file", "bundle", "checkpoint", "f32.gguf", "q8_0.gguf"])
def test_continued_with_paris(name: str, file: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the chat template: from what was fetched, from the bundle, and from all that is exported."""
    model = file if name == "file" else made / name
    capsys.readouterr()
    words = ["generate", str(model), QUESTION, "--chat", "--prefill", BEGUN, "--max-tokens", "8"]
    assert main([*words, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{BEGUN} Paris.\n"


@pytest.mark.parametrize("name", ["f32", "f16", "q8_0", "q4_0"])
def test_continued_with_paris_by_llama_cpp(name: str, made: Path) -> None:
    answer = open_llama(made / f"{name}.gguf").create_completion(CHAT, max_tokens=4, temperature=0.0)
    # Rounded to Q4_0 from what Q4_1 has left, it goes on with a comma.
    assert answer["choices"][0]["text"].startswith(" Paris" if name == "q4_0" else " Paris.")


def test_continued_with_paris_by_transformers(made: Path) -> None:
    """From the checkpoint, by its own means."""
    transformers = bring("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "checkpoint")
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "checkpoint")
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": BEGUN}]
    inputs = tokenizer.apply_chat_template(said, continue_final_message=True, return_tensors="pt", return_dict=True)
    done = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    assert tokenizer.decode(done).endswith(f"{BEGUN} Paris.<|im_end|>")


def test_logits_are_those_of_llama_cpp(file: Path, source: ModelSource, made: Path) -> None:
    """In float32 to a part in 10^5 of the largest; llama.cpp rounds activations to 8 bits for Q4_1 and Q8_0."""
    ids = source.tokenizer.encode(CHAT, special=True)
    ours = our_logits(source.model, ids)
    largest = np.abs(ours).max()
    assert largest > 30
    theirs = llama_logits(open_llama(made / "f32.gguf"), ids)
    assert np.abs(ours - theirs).max() < 5e-4
    assert np.array_equal(ours.argmax(axis=-1), theirs.argmax(axis=-1))
    for path in (file, made / "q8_0.gguf"):
        theirs = llama_logits(open_llama(path), ids)
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.02 * largest
        assert np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)) > 0.9


def test_what_was_q4_1_is_packed_without_error(source: ModelSource) -> None:
    """By the recipe's format and solver, a layer of each weight; the embedding, which is Q8_0, is rounded."""
    for name, param in named_weights(source.model).items():
        if name.startswith("layers.") and param.get_value().ndim == 3:
            w = param.get_value()[7]
            np.testing.assert_array_equal(pack_weight(w, Int4OffsetConfig(group=32)).dense(), w, err_msg=name)


@pytest.mark.parametrize(("name", "error", "agreement"), [("f16", 1e-3, 1.0), ("q4_0", 0.02, 0.85)])
def test_logits_of_rounded_files_are_those_of_llama_cpp(
    name: str, error: float, agreement: float, source: ModelSource, made: Path
) -> None:
    """Both read the same file; llama.cpp rounds activations to float16, or to 8 bits."""
    ids = source.tokenizer.encode(CHAT, special=True)
    ours, theirs = (
        our_logits(open_model(made / f"{name}.gguf").model, ids),
        llama_logits(open_llama(made / f"{name}.gguf"), ids),
    )
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < error * np.abs(ours).max()
    assert np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)) >= agreement
    for logits in (ours, theirs):
        assert source.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


def test_exported_numbers_are_those_of_the_file(file: Path, made: Path) -> None:
    before, after = open_gguf_checkpoint(file), open_gguf_checkpoint(made / "f32.gguf")
    assert before.config == after.config
    for name in before.file.tensors:
        assert np.array_equal(before.file.read(name), after.file.read(name)), name
    assert after.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
