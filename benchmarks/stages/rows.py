"""The rows of the stage matrix, the presets, and the published figures they are set beside."""

from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Row:
    """One row: which attention, whose kernels in the layers, which loss, compiled or not.

    attention: eager, sdpa, fa2, fa3 or flatout
    kernels:   "" (transformers' own), hub (its kernelize), liger, flatout (hf.patch),
               flatout-hub (hf.kernelize) or flatout-fused (hf.fuse)
    loss:      logits (transformers'), liger (its default: linear), liger-logits, cce,
               flatout (on logits) or flatout-linear
    older:     with an older Liger (--older-liger): under fullgraph 0.8.5 raises at its rope, which
               is marked torch.compiler.disable, where 0.8.2 can be traced
    nudge:     0, or the seed by which every initial weight moves one unit in the last place
    """

    name: str
    attention: str
    kernels: str = ""
    loss: str = "logits"
    compile: bool = False
    older: bool = False
    nudge: int = 0

    @property
    def ours(self):
        return "flatout" in (self.attention, *self.kernels.split("-"))

    @property
    def optimizer(self):
        """Whether the optimizer is flatout's too; every other row has torch's."""
        return self.kernels == "flatout-fused"


ROWS = [
    Row("00_baseline", "eager"),
    Row("00_fa2", "fa2"),
    Row("00_fa3", "fa3"),
    Row("00_sdpa", "sdpa"),
    Row("00_flatout", "flatout"),
    Row("01_sdpa_compile", "sdpa", compile=True),
    Row("01_kernelize_fa2_compile", "fa2", "hub", compile=True),
    Row("01_kernelize_sdpa_compile", "sdpa", "hub", compile=True),
    Row("01_flatout_kernelize_compile", "flatout", "flatout-hub", compile=True),
    Row("02_liger_fa3", "fa3", "liger", "liger"),
    Row("02_liger_sdpa", "sdpa", "liger", "liger"),
    Row("02_liger_ce_sdpa", "sdpa", "liger", "liger-logits"),
    Row("02_flatout", "flatout", "flatout", "flatout"),
    Row("03_liger_fa2_compile", "fa2", "liger", "liger", compile=True),
    Row("03_liger_sdpa_compile", "sdpa", "liger", "liger", compile=True),
    Row("03_liger_old_sdpa_compile", "sdpa", "liger", "liger", compile=True, older=True),
    Row("03_flatout_compile", "flatout", "flatout", "flatout", compile=True),
    Row("04_liger_cce_fa3", "fa3", "liger", "cce"),
    Row("04_liger_cce_sdpa", "sdpa", "liger", "cce"),
    Row("04_flatout_lce", "flatout", "flatout", "flatout-linear"),
    Row("05_liger_cce_fa2_compile", "fa2", "liger", "cce", compile=True),
    Row("05_liger_cce_sdpa_compile", "sdpa", "liger", "cce", compile=True),
    Row("05_liger_old_cce_sdpa_compile", "sdpa", "liger", "cce", compile=True, older=True),
    Row("05_kernelize_cce_sdpa_compile", "sdpa", "hub", "cce", compile=True),
    Row("05_cce_sdpa_compile", "sdpa", "", "cce", compile=True),
    Row("05_flatout_lce_compile", "flatout", "flatout", "flatout-linear", compile=True),
    Row("06_flatout_fused", "flatout", "flatout-fused", "flatout-linear"),
]

# --parity: how far do losses part by rounding alone? The reference from three starting points.
PARITY_REFERENCES = [
    Row("00_sdpa", "sdpa"),
    Row("ulp1_sdpa", "sdpa", nudge=1),
    Row("ulp2_sdpa", "sdpa", nudge=2),
]
ALL = ROWS + PARITY_REFERENCES[1:]
BY_NAME = {row.name: row for row in ALL}

# The curve that every row must follow: the first of these that trained.
REFERENCES = ["00_baseline", "00_sdpa"]

# The public matrix this one reproduces: one H100 80GB, Qwen3-8B, 1 x 2048 tokens, 2025-08.
# (MFU %, GB), or the status where the row did not run.
PUBLISHED = {
    "00_baseline": "CUDA OOM",
    "00_fa2": (33.8, 70.6),
    "00_fa3": (34.8, 70.6),
    "00_sdpa": (34.7, 71.2),
    "01_kernelize_fa2_compile": "Compile Issue",
    "01_kernelize_sdpa_compile": (44.5, 72.5),
    "02_liger_fa3": (25.1, 69.4),
    "02_liger_sdpa": (25.1, 70.0),
    "03_liger_fa2_compile": "Compile Issue",
    "03_liger_sdpa_compile": (26.3, 73.6),
    "04_liger_cce_fa3": (40.5, 67.4),
    "04_liger_cce_sdpa": (39.9, 67.6),
    "05_liger_cce_fa2_compile": "Compile Issue",
    "05_liger_cce_sdpa_compile": (43.2, 71.3),
}
for _name in ("03_liger_sdpa_compile", "05_liger_cce_sdpa_compile"):  # made with a Liger of 2025
    PUBLISHED[_name.replace("liger", "liger_old")] = PUBLISHED[_name]

# Dense bf16 peaks in TFLOPS, by a part of the device's name.
PEAKS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0}


@dataclass(frozen=True)
class Preset:
    """A Qwen3 architecture (keyword arguments of Qwen3Config) and its training setting."""

    config: dict
    batch: int
    seq: int
    steps: int
    warmup: int  # leading steps that no timing counts
    # Steps over which the learning rate rises. A large new model that gets all of it at once is
    # chaotic: two runs whose weights differ by a rounding part within ten steps.
    lr_warmup: int
    timeout: int  # seconds a row may take
    text: str  # how text becomes tokens: bytes or words


def _qwen3(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied):
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=40960,
        rope_theta=1e6, rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip


PRESETS = {
    "tiny": Preset(
        _qwen3(256, 768, 4, 8, 4, 32, 512, tied=False),
        batch=4, seq=256, steps=60, warmup=5, lr_warmup=6, timeout=600, text="bytes",
    ),
    "qwen3-0.6b": Preset(
        _qwen3(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
        batch=1, seq=2048, steps=40, warmup=10, lr_warmup=200, timeout=900, text="words",
    ),
    "qwen3-8b": Preset(
        _qwen3(4096, 12288, 36, 32, 8, 128, 151936, tied=False),
        batch=1, seq=2048, steps=40, warmup=10, lr_warmup=200, timeout=1800, text="words",
    ),
}  # fmt: skip


def matching(globs, parity=False):
    """The rows whose name matches a glob, in the globs' order; without any, the whole table, or
    what --parity compares."""
    for glob in globs:
        if not any(fnmatch(row.name, glob) for row in ALL):
            raise ValueError(f"--rows: no row is called {glob!r}; --list shows them all")
    if not globs:
        return PARITY_REFERENCES + [row for row in ROWS if row.ours] if parity else list(ROWS)
    return list(dict.fromkeys(row for g in globs for row in ALL if fnmatch(row.name, g)))


def running_order(rows):
    """The reference rows first: the others are judged by them as they end."""
    return sorted(rows, key=lambda row: row.name not in REFERENCES)
