"""The benchmarks at toy sizes: counters against counts by hand, gradients, and what is printed and written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOY = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
           num_key_value_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def load() -> Any:
    """Import of a benchmark by name; the silence that they ask of transformers ends with these tests."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "benchmarks")
        yield importlib.import_module
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def toy(load: Any) -> Any:
    return load("variants").llama(torch.float32, CPU, rows=2, tokens=6, **TOY)


def test_saved_bytes_of_a_linear_layer_are_its_input(load: Any) -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    saved_bytes = load("common").saved_bytes
    assert saved_bytes(lambda: layer(x).sum(), layer.parameters()) == 3 * 8 * 4
    both = nn.Sequential(layer, nn.GELU(), nn.Linear(4, 2))
    # x, what GELU is given, and what it makes; the weights never
    assert saved_bytes(lambda: both(x).sum(), both.parameters()) == (3 * 8 + 3 * 4 + 3 * 4) * 4


def test_one_memory_is_counted_once(load: Any) -> None:
    x = torch.randn(3, 8)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]
    assert load("common").saved_bytes(lambda: (x @ weights[0] + x.view(3, 8) @ weights[1]).sum(), weights) == 3 * 8 * 4


def test_operations_are_counted_without_views(load: Any) -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(2, 3, 8, requires_grad=True)
    there, back = load("common").count_operations(lambda: layer(x).sum())
    assert there == ["mm", "sum"]
    assert sorted(back) == ["mm", "mm", "ones_like"]  # dX, dW, and the 1 that the backward starts from


def test_an_operation_written_in_python_counts_for_what_it_calls(load: Any) -> None:
    @torch.library.custom_op("hf_lora_test::double_and_add", mutates_args=())
    def double_and_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.mul(2).add(y)

    x = torch.ones(2)
    with load("common").Operations() as counted:
        double_and_add(x, x)
    assert counted.names == ["mul", "add"]


@pytest.mark.parametrize(("variant", "expected"), [("frozen", (1, 1)), ("peft_same", (5, 7)), ("peft", (7, 10))])
def test_operations_of_a_linear_layer(load: Any, variant: str, expected: tuple[int, int]) -> None:
    memory, lora = load("memory"), load("variants").Lora(rank=2, alpha=4)
    there, back = memory.linear_operations(variant, lora, 8, torch.bfloat16, CPU)
    # PEFT, forward: W x, A x, B h, times scaling, plus. In float32 the casts of x and of the sum come to it.
    assert (len(there), len(back)) == expected


def test_what_a_layer_keeps(load: Any) -> None:
    memory, lora = load("memory"), load("variants").Lora(rank=2, alpha=4)
    kept = {v: memory.layer_figures(v, lora, 64, 8, torch.float32, CPU)[0] for v in ("frozen", "peft")}
    # Both norms' outputs, the input of down (3.5), and h of seven layers.
    assert kept["peft"] - kept["frozen"] == pytest.approx(1 + 1 + 3.5 + 7 * 2 / 64)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1.32), (torch.float32, 1.37)], ids=str)
def test_ours_keeps_what_the_mathematics_needs(load: Any, dtype: torch.dtype, most: float, dropout: float) -> None:
    """The inputs that no other layer keeps, h, and a byte for a dropped element: no masked, cast or scaled copy."""
    memory, lora = load("memory"), load("variants").Lora(rank=16, alpha=32, dropout=dropout)
    frozen, ours = (memory.layer_figures(v, lora, 512, 32, dtype, CPU)[0] for v in ("frozen", "ours"))
    drawn = dropout * (1 + 1 + 1 + 3.5) / dtype.itemsize  # for the inputs of q/k/v, o, gate/up and down
    assert ours - frozen == pytest.approx(1 + 1 + 3.5 + 7 * 16 / 512 + drawn, abs=drawn / 10)
    assert ours / frozen < most + (0.01 if dropout else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_that_ours_adds(load: Any, dtype: torch.dtype) -> None:
    memory, lora = load("memory"), load("variants").Lora(rank=2, alpha=4)
    there, back = memory.linear_operations("ours", lora, 8, dtype, CPU)
    casts = [name for name in there + back if name == "_to_copy"]
    assert len(there) + len(back) - len(casts) == 2 + 2 + 5  # the layer's own two, and what the adapter adds
    assert len(casts) == (0 if dtype == torch.float32 else 6)  # of A and B twice and of their gradients: all R wide
    layers = [memory.layer_figures(v, lora, 64, 8, torch.float32, CPU)[2:] for v in ("frozen", "ours")]
    (base_there, base_back), (our_there, our_back) = layers
    assert our_there - base_there < 7 * 2  # a layer of seven: those that share an input have one product with A
    assert our_back - base_back < 7 * 5


def test_the_flop_limit(load: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "head": nn.Linear(4, 2)})
    assert load("variants").flop_limit(model, ["a"], 2) == 1 + 1.5 * 2 * (8 + 4) / (8 * 4 + 4 * 2)


@pytest.mark.parametrize("variant", ["ours", "peft"])
def test_gradients_agree_with_the_plain_model(load: Any, toy: Any, variant: str) -> None:
    variants = load("variants")
    lora = variants.Lora(rank=2, alpha=8)
    reference = variants.reference_gradients(toy, lora, toy.batch)
    assert len(reference) == 7
    total, worst = variants.gradient_errors(variants.build(variant, toy, lora), toy.batch, reference)
    assert total < worst < 1e-5


def test_wrong_gradients_are_not_timed(load: Any, toy: Any) -> None:
    variants, train_step = load("variants"), load("train_step")
    built = {"ours": variants.build("ours", toy, variants.Lora(rank=2, alpha=4))}
    with pytest.raises(SystemExit, match="gradients of hf_lora are wrong"):
        train_step.prove(built, toy, variants.Lora(rank=2, alpha=6), False, "float32")  # another scaling


@pytest.mark.parametrize(
    "words", [["--dropout", "0.1"], ["--dtype", "bfloat16"], ["--autocast"], ["--loss", "head"]], ids=" ".join
)
def test_train_step(
    load: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common, train_step, report = load("common"), load("train_step"), load("report")
    options = train_step.parse([*words, "--rounds", "2", "--rank", "2", "--threads", "1"])
    dtype = common.DTYPES[options.dtype or "float32"]
    case = load("variants").llama(dtype, CPU, rows=2, tokens=6, **TOY)
    table = train_step.measure(options, case)
    assert [row["name"] for row in table.rows] == ["frozen", "peft", "peft_same", "ours", "full"]
    table.show(tmp_path / "run.json")
    assert "hf_lora" in capsys.readouterr().out
    again = common.read_table(tmp_path / "run.json")
    assert again == table
    assert report.summary([again]).count("\n") == 2
    report.draw([again], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_memory_decode_and_optimizer(load: Any, toy: Any) -> None:
    memory, decode, optimizer = load("memory"), load("decode"), load("optimizer")
    table = memory.measure(memory.parse(["--hidden", "64", "--tokens", "4", "--rank", "2", "--threads", "1"]))
    assert [row["name"] for row in table.rows] == ["frozen", "peft", "peft_same", "ours"]
    assert load("report").stacked([table, table]).count("\n| bfloat16, 0 |") == 8
    words = ["--tokens", "3", "--prompt", "3", "--rounds", "1", "--batch", "2", "--rank", "2", "--threads", "1"]
    table = decode.measure(decode.parse(words), toy)
    assert {row["name"]: row["agree"] for row in table.rows} == {
        "base": None, "merged": "100%", "ours": "100%", "peft": "100%",
    }  # fmt: skip
    table = optimizer.measure(optimizer.parse(["--hidden", "16", "--layers", "2", "--rounds", "1", "--threads", "1"]))
    assert len(table.rows) == 5
    assert table.rows[0]["ratio"].value == 1
    assert len(optimizer.shapes(4096, 32, 16)) == 448
    assert sum(a * b for a, b in optimizer.shapes(4096, 32, 16)) == 41_943_040


def test_turns_alternate_and_warm_up(load: Any) -> None:
    order: list[str] = []
    times = load("common").take_turns({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2, warmup=1)
    assert "".join(order) == "abbaab"
    assert [len(t.seconds) for t in times.values()] == [2, 2]


def test_the_report_replaces_what_stands_below_a_command(load: Any) -> None:
    common, report = load("common"), load("report")
    page = "# P\n\n## decode.py\n\nWhat it is.\n\n```bash\nrun\n```\n\nold\n\n## Next\n\nkept\n"
    table = common.Table("decode", "Title", {"a": "A", "b": "B"}, [{"a": "x", "b": common.Ratio(1.5, 1.4, 1.6)}])
    made = report.put_into(page, report.sections([table]))
    assert "| x | 1.50 [1.40, 1.60] |" in made
    assert "old" not in made
    assert made.endswith("## Next\n\nkept\n")
    assert report.put_into(made, report.sections([table])) == made
    with pytest.raises(SystemExit, match="no heading"):
        report.put_into("# P\n", report.sections([table]))


@pytest.mark.slow
def test_load_merge(load: Any) -> None:
    load_merge = load("load_merge")
    table = load_merge.measure(
        load_merge.parse(["--targets", "7", "--rank", "2", "--merge-layers", "0", "--repeats", "2"])
    )
    assert [row["what"].partition(",")[0] for row in table.rows] == [
        "inject 7 targets", "load a 2nd adapter", "load a 3rd adapter", "switch", "disable and enable",
    ]  # fmt: skip
    assert all(float(row["ratio"]) > 0 for row in table.rows)
    assert "| inject 7 targets |" in load("report").sections([table])["load_merge"]
