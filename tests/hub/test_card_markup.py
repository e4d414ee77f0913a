"""Names of others in a card are no markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest
from helpers import tiny_bert
from huggingface_hub import ModelCard

from hf_lora import apply_lora, write_card

HOSTILE = [
    "a|b", "`code` ``x``", "<script>alert(1)</script>", "[link](javascript:alert(1))", "![x](http://evil/x.png)",
    "--> <!-- hf_lora:end {} -->", "**bold** _it_ ~~no~~ $x^2$", "'quote' \"double\" \\ back", "{{ 7*7 }} {% raw %}",
    "# heading", "---", "!!python/object:os.system", "&amp; &lt;", "naïve 模型 🙂", "- item", "1. item",
]  # fmt: skip
BROKEN_UP = [
    "two\nlines\n---\nthree",
    "tab\there\x00\x1b[31m",
    "\ud800 lone",
    "\u202e turned",
    "<!-- hf_lora:end {} -->\n",
]


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


def render(text: str) -> Page:
    return Page(markdown.markdown(text, extensions=["tables", "fenced_code"]))


@pytest.mark.parametrize("name", [*HOSTILE, *BROKEN_UP])
def test_a_hostile_name_shows_as_it_is_and_is_no_markup(tmp_path: Path, name: str) -> None:
    from hf_lora.hub.card.escape import clean

    model = apply_lora(tiny_bert(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}))
    plain, folder = tmp_path / "plain", tmp_path / "hostile"
    for place in (plain, folder):
        model.save_pretrained(place)
    if name in HOSTILE:  # with others in them the files themselves are refused
        extras = json.loads((folder / "hf_lora.json").read_text())
        extras["id2label"]["0"] = extras["architecture"] = extras["base"]["name"] = name
        (folder / "hf_lora.json").write_text(json.dumps(extras))
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name.replace("://", "")  # an address is refused, too
        (folder / "adapter_config.json").write_text(json.dumps(config))
    words = {"results": {name: 0.5}, "data": name, "model_name": name, "tags": [name], "license": name}
    write_card(plain, results={"x": 0.5}, data="y", model_name="z")
    write_card(folder, **words)  # type: ignore[arg-type]
    first = (folder / "README.md").read_bytes()
    write_card(folder, **words)  # type: ignore[arg-type]
    assert (folder / "README.md").read_bytes() == first

    card = ModelCard.load(folder / "README.md")
    shown = clean(name)
    assert "\n" not in shown
    assert shown in card.data.tags
    assert card.data.license == shown
    assert card.data.eval_results[0].metric_type == shown
    harmless, page = render(ModelCard.load(plain / "README.md").text), render(card.text)
    assert page.tags <= harmless.tags
    assert page.links == harmless.links
    squeezed = " ".join(page.text.split())
    assert squeezed.count(" ".join(shown.split())) >= (4 if name in HOSTILE else 2), squeezed[:1500]
    assert len(re.findall(r"^<!-- hf_lora:", card.text, re.MULTILINE)) == 2
