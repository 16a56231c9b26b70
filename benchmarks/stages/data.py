"""Training tokens from real text, made once per run and shared by every row."""

import hashlib
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np

LIMIT = 8 << 20  # characters of text read: windows are drawn from all of them


def standard_library():
    """The sources of the Python that runs this, in a fixed order: real text with no download."""
    text = []
    length = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(text[-1])
        if length > LIMIT:
            break
    return "".join(text)


def as_tokens(text, kind, vocab):
    """bytes: one token a byte. words: one token a word, run of spaces or symbol, hashed over the
    whole vocabulary, so that no row of the embedding or of the head stays unused by design."""
    if kind == "bytes":
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if vocab < 256:
            raise ValueError(f"text as bytes needs a vocabulary of 256 or more, got {vocab}")
        return tokens
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    number = {word: zlib.crc32(word.encode()) % vocab for word in set(words)}
    return np.fromiter((number[word] for word in words), np.int64, len(words))


def batches(source, kind, vocab, steps, batch, seq, seed):
    """(steps, batch, seq) int64 tokens: windows at random places of the text, or random tokens.

    source: None (the standard library), "random", or the path of a text file.
    """
    rng = np.random.default_rng(seed)
    if source == "random":
        return rng.integers(0, vocab, (steps, batch, seq), dtype=np.int64)
    if source is None:
        text = standard_library()
    else:
        text = Path(source).read_text(encoding="utf-8", errors="replace")[:LIMIT]
    tokens = as_tokens(text, kind, vocab)
    if len(tokens) < seq:
        raise ValueError(f"--data {source}: {len(tokens)} tokens, fewer than one row of {seq}")
    starts = rng.integers(0, len(tokens) - seq + 1, (steps, batch))
    return tokens[starts[..., None] + np.arange(seq)]


def digest(tokens):
    """A short name for exactly these tokens: two runs with the same one saw the same data."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
