"""Names in many languages: what is saved is loaded, and what a terminal would misread is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import assert_same_tensors, randomize, tiny_bert

from hf_lora import AdapterFileError, LoraModel, apply_lora
from hf_lora.adapt.state import set_trained_format
from hf_lora.data.trained import TrainedFormat
from hf_lora.safe_io.reading import is_one_line

NAMES = ["plain", "my\u00a0model", "模型\u3000v1", "مدل\u200cها", "क्\u200dष", "naïve 🙂"]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_other_spaces_and_joiners_come_back(name: str, tmp_path: Path) -> None:
    base = tmp_path / name
    tiny_bert().save_pretrained(base)
    model = randomize(apply_lora(type(tiny_bert()).from_pretrained(base)))
    set_trained_format(model, TrainedFormat("classes", name, label_column="label", source_prefix=name))
    model.save_pretrained(tmp_path / "adapter")
    again = LoraModel.from_pretrained(tmp_path / "adapter")
    assert_same_tensors(again.get_adapter_state_dict(), model.get_adapter_state_dict())


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31m", "\u202ebackwards", "\u2066apart", "a\u2028b", "\x85"])
def test_a_text_of_several_lines_or_of_another_direction_is_refused(text: str, tmp_path: Path) -> None:
    assert not is_one_line(text)
    model = apply_lora(tiny_bert())
    set_trained_format(model, TrainedFormat("classes", text, label_column="label"))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="text_column"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_bert())
