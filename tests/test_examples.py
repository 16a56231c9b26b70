"""The examples run, and do what they say."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from tiny_models import make

import flatout.hf

FINETUNE = Path(__file__).resolve().parents[1] / "examples" / "finetune.py"
ADDED = "# flatout"
PATH = re.compile(r"(?<![\w.<>])(/\w[\w.+-]*){2,}|[A-Z]:\\|site-packages")


def outputs_of(book):
    return [o for cell in book.cells for o in cell.get("outputs", [])]


def text_of(output):
    return output.get("text") or output["data"]["text/plain"]


def test_quickstart(monkeypatch):
    pytest.importorskip("nbclient")
    import notebook

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = notebook.nbformat.read(notebook.QUICKSTART, as_version=4)
    found = notebook.executed()
    assert [o.output_type for o in outputs_of(found)] == [
        o.output_type for o in outputs_of(stored)
    ], "the stored outputs are not those of these cells: make notebook"
    printed = "\n".join(map(text_of, outputs_of(found)))
    assert "linear_cross_entropy  (model)" in printed and "loss of every tenth step" in printed


def test_quickstart_is_stored_with_outputs_and_without_its_machine():
    nbformat = pytest.importorskip("nbformat")
    path = FINETUNE.with_name("quickstart.ipynb")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert cell.cell_type == "markdown" or cell.execution_count and not cell.metadata
    assert all(o.get("name") != "stderr" for o in outputs_of(book))
    found = PATH.search("\n".join(map(text_of, outputs_of(book))))
    assert not found, found
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert PATH.search("in /usr/lib/python3") and not PATH.search("bf16/fp16, 1/2, a / b")


def script(lines):
    """finetune.py's main(), of these lines."""
    scope = {"__name__": "finetune", "__doc__": ""}
    exec(compile("\n".join(lines), str(FINETUNE), "exec"), scope)
    return scope["main"]


def losses(trainer):
    history = trainer.state.log_history
    return [
        row.get("loss", row.get("eval_loss")) for row in history if {"loss", "eval_loss"} & {*row}
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_finetune_is_three_lines_from_the_script_without(device, tmp_path):
    pytest.importorskip("accelerate")
    options = ["--steps", "20", "--length", "64", "--out", str(tmp_path)]
    options += ["--cpu"] if device == "cpu" else []
    lines = FINETUNE.read_text().splitlines()
    without = [line for line in lines if not line.endswith(ADDED)]
    assert len(lines) - len(without) == 3
    names = {node.id for node in ast.walk(ast.parse("\n".join(without))) if hasattr(node, "id")}
    assert "flatout" not in names
    ours, plain = script(lines)(options), script(without)(options)
    assert type(ours.optimizer.optimizer).__module__ == "flatout.torch.adamw"
    assert type(plain.optimizer.optimizer).__module__.startswith("torch.optim")
    assert flatout.hf.report(ours.model).active("linear_cross_entropy")
    assert not flatout.hf.report(plain.model).active("linear_cross_entropy")
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-3 if device == "cpu" else 5e-2)
    assert losses(ours)[-1] < 0.8 * losses(ours)[0]


def test_finetune_a_saved_model_on_a_text(tmp_path):
    pytest.importorskip("accelerate")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    make("Qwen3", vocab_size=8).save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({"one": 3, "two": 4, "three": 5, "?": 6}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("one two three " * 200)
    trainer = script(FINETUNE.read_text().splitlines())([
        "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--length", "16",
        "--steps", "10", "--lr", "1e-2", "--out", str(tmp_path / "out"), "--save", "--cpu",
    ])  # fmt: skip
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3]])
    assert saved(ids).logits[0, -1].argmax() == 4
