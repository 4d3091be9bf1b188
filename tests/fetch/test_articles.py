"""Texts out of a package of articles: split by title, all or nothing."""

import json
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.fetch.articles import HELDOUT, TRAIN, write_articles


def _write(path: Path, titles: list[str]) -> Path:
    path.write_text(json.dumps({title: {"title": title, "extract": f"About {title}. "} for title in titles}))
    return path


def test_each_article_is_in_one_of_two_texts(tmp_path: Path) -> None:
    titles = [f"article {index}" for index in range(500)]
    write_articles(_write(tmp_path / "summaries.json", titles), tmp_path / "text")
    texts = {name: (tmp_path / "text" / name).read_text().split("\n\n\n") for name in (TRAIN, HELDOUT)}
    found = [article.strip().split("\n\n") for text in texts.values() for article in text]
    assert sorted(found) == sorted([title, f"About {title}."] for title in titles)
    assert 25 <= len(texts[HELDOUT]) <= 80


def test_the_split_of_an_article_depends_on_its_title_alone(tmp_path: Path) -> None:
    titles = [f"article {index}" for index in range(100)]
    for name, chosen in (("all", titles), ("half", titles[::-2])):
        write_articles(_write(tmp_path / f"{name}.json", chosen), tmp_path / name)
    held = {name: set((tmp_path / name / HELDOUT).read_text().split("\n\n\n")) for name in ("all", "half")}
    bodies = {name: {article.strip() for article in texts} for name, texts in held.items()}
    assert bodies["half"] and bodies["half"] < bodies["all"]


def test_what_stands_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for titles in (["one", "two"], ["three"]):
        write_articles(_write(tmp_path / "summaries.json", titles), tmp_path / "text")
    assert "".join((tmp_path / "text" / name).read_text() for name in (TRAIN, HELDOUT)) == "three\n\nAbout three.\n"


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"text": "x"}}', "{"])
def test_other_json_is_refused_and_nothing_written(content: str, tmp_path: Path) -> None:
    (tmp_path / "summaries.json").write_text(content)
    with pytest.raises(InputError, match="is no JSON of articles"):
        write_articles(tmp_path / "summaries.json", tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["summaries.json"]
