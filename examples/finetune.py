"""Fine-tune a causal language model with transformers' Trainer, and with flatout in three lines.

    python examples/finetune.py                  # a tiny model of random weights: seconds on a CPU
    python examples/finetune.py --model Qwen/Qwen3-0.6B --text notes.txt --length 2048 --lr 1e-5

The text is the source of Python's standard library, or a file's. Those three lines end in
"# flatout": without them (grep -v '# flatout$' finetune.py) this is an ordinary training script,
with the same losses.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

import flatout.hf  # flatout

TINY = dict(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", help="a folder or a name on the hub; default: tiny, random weights")
    p.add_argument("--text", type=Path, help="a text file; default: the standard library")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=128, help="tokens of one training example")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--out", default="runs/finetune", help="where --save and checkpoints go")
    p.add_argument("--save", action="store_true", help="the model, at the end")
    p.add_argument("--cpu", action="store_true")
    return p.parse_args(argv)


def load(args):
    """(model, a function from text to its tokens): without --model a token is a byte."""
    if args.model is None:
        model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY))
        return model, lambda text: list(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return AutoModelForCausalLM.from_pretrained(args.model), lambda text: tokenizer(text).input_ids


def examples(args, encode):
    """Text cut into examples of --length tokens: (for training, for evaluation)."""
    if args.text:
        text = args.text.read_text(encoding="utf-8")
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py"))[:40]
        text = "".join(path.read_text(encoding="utf-8") for path in files)
    tokens = torch.tensor(encode(text))
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    rows = [{"input_ids": row, "labels": row} for row in rows]
    held_out = max(1, min(16, len(rows) // 10))
    return rows[held_out:], rows[:held_out]


def main(argv=None):
    """Trains and evaluates; returns the Trainer."""
    args = parse(argv)
    set_seed(0)
    model, encode = load(args)
    on_gpu = torch.cuda.is_available() and not args.cpu
    model.to("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
    flatout.hf.patch(model)  # flatout
    train, held_out = examples(args, encode)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=args.batch,
            learning_rate=args.lr, warmup_steps=args.steps // 10, lr_scheduler_type="cosine",
            logging_steps=max(1, args.steps // 10), save_strategy="no", report_to=[],
            use_cpu=args.cpu, dataloader_pin_memory=on_gpu, seed=0,
        ),
        optimizer_cls_and_kwargs=(flatout.torch.AdamW, {"lr": args.lr}),  # flatout
        train_dataset=train,
        eval_dataset=held_out,
    )  # fmt: skip
    seconds = trainer.train().metrics["train_runtime"]
    tokens = args.steps * args.batch * args.length
    print(f"{tokens / seconds:.0f} tokens/s; evaluation: {trainer.evaluate()['eval_loss']:.3f}")
    if args.save:
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
