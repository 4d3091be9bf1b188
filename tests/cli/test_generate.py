"""`hsai generate`: the same text by both ways, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.export import write_bundle
from hsai.export.source import open_model
from hsai.files import sha256
from hsai.infer import Engine
from tests.cli.conftest import RECIPES, Workshop
from tests.export.manifests import edit
from tests.export.tiny_models import make_model, make_tokenizer

Refuse = Callable[..., str]
PROMPT = "def main():"


def generate(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What is printed."""
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["int4", "nm24_int4"])
def test_graphs_give_the_same_text(recipe: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = (workshop.bundles / recipe, PROMPT, "--max-tokens", 12)
    text = generate(capsys, *words)
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 1 and text.endswith("\n")
    assert generate(capsys, *words, "--graphs") == text


def test_a_cache_of_integers_gives_a_text_that_begins_alike(
    workshop: Workshop, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (workshop.bundles / "int4", PROMPT, "--max-tokens", 12)
    texts = [generate(capsys, *words, *more) for more in ((), ("--cache", "int8"), ("--cache", "int4"))]
    assert texts[0][: len(PROMPT) + 3] == texts[1][: len(PROMPT) + 3]
    assert texts[0][: len(PROMPT) + 1] == texts[2][: len(PROMPT) + 1] and len(texts[2]) > len(PROMPT) + 1
    names = ("cache=int8", "cannot be chosen with graphs")
    refuse("generate", *words, "--cache", "int8", "--graphs", names=names, beside=(words[0],))
    refuse("generate", *words, "--cache", "8", names=("--cache", "'8'", "'int8'"), beside=(words[0],))


def test_rounded_activations_give_a_text_that_begins_alike(
    workshop: Workshop, refuse: Refuse, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (workshop.bundles / "int4", PROMPT, "--max-tokens", 12)
    text = generate(capsys, *words, "--activations", "int8")
    assert text[: len(PROMPT) + 1] == generate(capsys, *words)[: len(PROMPT) + 1] and len(text) > len(PROMPT) + 1
    names = ("--activations int8", "--graphs")
    refuse("generate", *words, "--activations", "int8", "--graphs", names=names, beside=(words[0],))
    refuse("generate", *words, "--activations", "int4", names=("--activations", "'int4'"), beside=(words[0],))
    dense = (workshop.bundles / "bf16", PROMPT)
    refuse("generate", *dense, "--activations", "int8", names=("activations=int8", "none"), beside=(dense[0],))
    # An exported bundle has them without being asked, in its graphs, too.
    assert main(["export", str(words[0]), "--out", "rounded", "--activations", "int8"]) == 0
    assert generate(capsys, "rounded", *words[1:]) == generate(capsys, "rounded", *words[1:], "--graphs") == text


def test_draws_follow_the_seed(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = (workshop.bundles / RECIPES[0], PROMPT, "--max-tokens", 16, "--temperature", 2, "--top-p", 0.99)
    texts = [generate(capsys, *words, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("who", ["lookup", "nm24_int4"])
def test_drafts_change_no_text(who: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by lookup nor by the same model, sparser; and how many were accepted is told."""
    words = (workshop.bundles / "int4", "x = 1\nx = 1\nx =", "--max-tokens", 24, "--temperature", 0.7)
    wanted = generate(capsys, *words)
    drafting = who if who == "lookup" else workshop.bundles / who
    assert main(["generate", *map(str, words), "--speculate", str(drafting), "--draft-tokens", "3"]) == 0
    output, error = capsys.readouterr()
    assert output == wanted
    found = re.search(r", (\d+) of (\d+) drafts accepted, stopped by", error)
    assert found is not None and 0 <= int(found[1]) <= int(found[2]) > 0


def test_who_cannot_draft(workshop: Workshop, tmp_path: Path, refuse: Refuse) -> None:
    """What asks for drafts in vain is refused as well."""
    bundle = workshop.bundles / "int4"
    stranger = tmp_path / "stranger"
    write_bundle(stranger, make_model("int8"), make_tokenizer())
    for words, names in (
        (["--draft-tokens", 3], ("--draft-tokens 3 needs --speculate",)),
        (["--speculate", "lookup", "--draft-tokens", 0], ("--draft-tokens 0", "between 1 and 16")),
        (["--speculate", "nowhere"], ("nowhere does not exist",)),
        (["--speculate", stranger], (str(stranger), "another tokenizer", str(bundle))),
        (["--speculate", "lookup", "--graphs"], ("speculate=lookup", "graphs")),
        (["--speculate", "lookup", "--regex", "a"], ("--speculate has no effect", "--regex")),
        (["--speculate", "lookup", "--repetition-penalty", 1.5], ("repetition_penalty=1.5", "--repetition-penalty 1")),
    ):
        refuse("generate", bundle, "x", *map(str, words), names=names, beside=(bundle,))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["x" * 200], ("200", "128")),
        (["a\udcff"], ("\\udcff", "at 1")),
        (["x", "--max-tokens", "0"], ("--max-tokens 0", "at least 1")),
        (["x", "--temperature", "-1"], ("temperature=-1.0",)),
        (["x", "--temperature", "nan"], ("temperature=nan",)),
        (["x", "--temperature", "1", "--top-p", "2"], ("top_p=2.0", "at most 1")),
        (["x", "--temperature", "1", "--top-k", "0"], ("top_k=0", "at least 1")),
        (["x", "--top-k", "3"], ("top_k=3", "temperature")),
        (["x", "--temperature", "1", "--min-p", "2"], ("min_p=2.0", "between 0 and 1")),
        (["x", "--repetition-penalty", "0"], ("repetition_penalty=0.0", "positive")),
        (["x", "--stop", ""], ("stop", "0 characters")),
        (["x", "--regex", "("], ("regular expression", "unclosed group")),
        (["x", "--regex", "caf\udce9"], ("regular expression", "not valid UTF-8 at character 3")),
        (["x", "--regex", "a", "--json-schema", "s"], ("--json-schema", "--regex")),
        (["x", "--json-schema", "missing.json"], ("missing.json",)),
        (["x", "--seed", "-1"], ("--seed -1", "4294967295")),
        (["x", "--seed", "99999999999999999999"], ("--seed 99999999999999999999", "4294967295")),
    ],
)
def test_requests_that_cannot_be(
    words: list[str], names: tuple[str, ...], workshop: Workshop, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = workshop.bundles / "int8"
    if words[0].startswith("xx"):  # as many tokens as characters, whatever was learned
        words = ["\x01" * 200]
        names = ("201", "128")
    refuse("generate", bundle, *words, names=names, beside=(bundle,))
    assert capsys.readouterr().out == ""  # no prompt, no half a line


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Changes entries of a manifest."""
    edit(bundle / "manifest.json", lambda content: content.update(changes))


def resign(bundle: Path, name: str) -> None:
    """Makes the manifest agree with a file that was changed."""
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    path = bundle / name
    edit_manifest(bundle, files=files | {name: {"bytes": path.stat().st_size, "sha256": sha256(path)}})


def cut_weights(bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def alter_weights(bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_and_resign_weights(bundle: Path) -> None:
    cut_weights(bundle)
    resign(bundle, "weights.safetensors")


def put_other_tokenizer(bundle: Path) -> None:
    make_tokenizer().save(bundle / "tokenizer.json")


def put_larger_vocabulary(bundle: Path) -> None:
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    edit_manifest(bundle, model=model | {"vocab": 300})


def alter_graph(bundle: Path) -> None:
    path = bundle / "graphs" / "decode.jax"
    path.write_bytes(path.read_bytes()[::-1])


def alter_context(bundle: Path) -> None:
    """A value that could be: read as it stands, the model would answer otherwise, or not at all."""
    text = (bundle / "manifest.json").read_text()
    assert '"norm_eps": 1e-05' in text
    (bundle / "manifest.json").write_text(text.replace('"norm_eps": 1e-05', '"norm_eps": 3.0', 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "cut weights": (cut_weights, ("weights.safetensors", "truncated")),
    "altered weights": (alter_weights, ("weights.safetensors", "altered")),
    "cut and signed again": (cut_and_resign_weights, ("weights.safetensors", "not a safetensors file")),
    "no weights": (lambda b: (b / "weights.safetensors").unlink(), ("weights.safetensors", "missing")),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), ("manifest.json",)),
    "manifest is no JSON": (lambda b: (b / "manifest.json").write_text("{'"), ("manifest.json", "line 1")),
    "manifest is a list": (lambda b: (b / "manifest.json").write_text("[]"), ("manifest.json", "format_version")),
    "newer manifest": (lambda b: edit_manifest(b, format_version=99), ("format_version 99", "version 1")),
    "altered manifest": (alter_context, ("manifest.json is altered",)),
    "unknown entry": (lambda b: edit_manifest(b, surprise=1), ("surprise",)),
    "no graph": (lambda b: (b / "graphs" / "decode.jax").unlink(), ("graphs/decode.jax", "missing")),
    "altered graph": (alter_graph, ("graphs/decode.jax", "altered")),
    "altered tokenizer": (put_other_tokenizer, ("tokenizer.json",)),
    "vocabulary too large": (put_larger_vocabulary, ("512 tokens", "model.vocab=300")),
    "empty": (lambda b: (shutil.rmtree(b), b.mkdir()), ("manifest.json",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles(damage: str, workshop: Workshop, place: Path, refuse: Refuse) -> None:
    inflict, names = DAMAGES[damage]
    inflict(Path(shutil.copytree(workshop.bundles / "int4", place / "bundle")))
    refuse("generate", "bundle", PROMPT, "--graphs", names=names)


def test_what_has_no_graphs_or_is_no_model(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "file").write_text("x")
    (place / "empty").mkdir()
    refuse("generate", "nowhere", PROMPT, names=("nowhere does not exist", "a training run, a bundle"))
    refuse("generate", "file", PROMPT, names=("file",))
    refuse("generate", "empty", PROMPT, names=("empty holds neither checkpoints nor a manifest.json",))
    run, plain = workshop.run, workshop.compressed / "int4"
    refuse("generate", run, PROMPT, "--graphs", names=(str(run), "manifest.json"), beside=(run,))
    refuse("generate", plain, PROMPT, "--graphs", names=(str(plain), "no graphs"), beside=(plain,))


def test_a_run_is_a_model_too(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_model(workshop.run)
    wanted = Engine.trace(source.model, source.tokenizer).generate(PROMPT, max_tokens=8).text
    assert generate(capsys, workshop.run, PROMPT, "--max-tokens", 8) == f"{PROMPT}{wanted}\n"


def test_chat_goes_through_the_template(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which came with the bundle through compression and export; only the answer is printed."""
    settings = ("--temperature", 0, "--max-tokens", 9)
    whole = "[system]Be brief.\n[user]x = 1\n[assistant]"
    wanted = generate(capsys, talking, whole, *settings).removeprefix(whole)
    engine = Engine.load(talking)
    ids = engine.tokenizer.encode(whole)  # no prefix: the template has none
    assert generate(capsys, talking, "x = 1", "--chat", "--system", "Be brief.", *settings) == (
        engine.generate_tokens(ids, max_tokens=9).text + "\n"
    )
    assert wanted.endswith("\n")
    assert generate(capsys, talking, "x = 1", "--chat", *settings) == (
        engine.chat([{"role": "user", "content": "x = 1"}], max_tokens=9).text + "\n"
    )


def test_a_prefill_begins_the_answer(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands where the template lets the answer begin, and is printed before the rest."""
    settings = ("--temperature", 0, "--max-tokens", 9)
    engine = Engine.load(talking)
    ids = engine.tokenizer.encode("[user]x = 1\n[assistant]import os")
    wanted = engine.generate_tokens(ids, max_tokens=9)
    assert generate(capsys, talking, "x = 1", "--chat", "--prefill", "import os", *settings) == (
        f"import os{wanted.text}\n"
    )
    done = engine.chat([{"role": "user", "content": "x = 1"}], prefill="import os", max_tokens=9)
    assert (done.tokens, done.prompt_tokens) == (wanted.tokens, len(ids))
    assert done.tokens != engine.chat([{"role": "user", "content": "x = 1"}], max_tokens=9).tokens


def test_the_generation_config_holds_where_nothing_is_said(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["generate", str(talking), PROMPT, *map(str, words)]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    text, said = run()
    assert "note: generation_config.json's no_repeat_ngram_size=3 is not applied\n" in said
    assert "[7 tokens" in said
    asked, _ = run("--temperature", 1.5, "--top-k", 40, "--max-tokens", 7, "--repetition-penalty", 1.1)
    assert text == asked != run("--temperature", 0)[0]
    assert run("--seed", 5)[0] != text
    assert "[3 tokens" in run("--max-tokens", 3)[1]


def test_chats_that_cannot_be(workshop: Workshop, talking: Path, place: Path, refuse: Refuse) -> None:
    bundle = workshop.bundles / "int8"
    refuse("generate", bundle, "x", "--chat", names=("no chat template", "chat_template.jinja"))
    refuse("generate", bundle, "x", "--system", "y", names=("--system", "--chat"))
    refuse("generate", bundle, "x", "--prefill", "y", names=("--prefill", "--chat"))
    shutil.copytree(talking, place / "b")
    (place / "b" / "chat_template.jinja").write_text("{% for %}")
    resign(place / "b", "chat_template.jinja")
    refuse("generate", "b", "x", "--chat", names=("chat template", "no Jinja", "line 1"))


def test_a_text_can_be_told_what_to_be(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = workshop.bundles / "int8"
    assert re.fullmatch(
        "[0-9]{3}-[a-c]\n", generate(capsys, bundle, PROMPT, "--regex", "[0-9]{3}-[a-c]")[len(PROMPT) :]
    )
    (place / "schema.json").write_text('{"enum": ["yes", "no"]}')
    text = generate(capsys, bundle, PROMPT, "--json-schema", place / "schema.json")
    assert text[len(PROMPT) :] in ('"yes"\n', '"no"\n')
    assert generate(capsys, bundle, PROMPT, "--json-schema", place / "schema.json", "--stop", "o", "--stop", "e")[
        len(PROMPT) :
    ] in ('"y\n', '"n\n')
