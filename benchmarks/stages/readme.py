"""The tables of the stage matrix, from the result files alone: a short one into the project's
README, every figure into STAGES.md beside the files."""

import json
import math
import re
from collections import Counter

from readme_text import README, between, markdown, shown, wrapped

from stages import parity, report
from stages.report import number, ordered
from stages.results import EXPANDABLE, PARITY, PROFILE, RAN, STAGES
from stages.rows import BY_NAME, PUBLISHED, REFERENCES, ROWS

BEGIN, END = "<!-- run_stages: begin -->", "<!-- run_stages: end -->"
SLOWER = 0.02  # than a peer: what is told

TEXT = """{what}: {machine}{cards} Step ms: the median of {timed} steps, IQR the distance of their
quartiles; MFU: of the best 10 in a row, so a row with a large IQR can lead in MFU and trail in the
median. GiB: reserved at the peak, parameters, gradients and optimizer included. Published: the
public matrix (one H100 80GB, Qwen3-8B, 1 x 2048 tokens, 2025-08; MFU by its own formula, GB). First
step: seconds from the process's start, without the model's creation and the import of its class;
part cached: the rows share Inductor's cache, and the first that is compiled pays for others."""
SHORT_TEXT = """ All figures, what the names mean and why a row did not run stand in
[{folder}/STAGES.md]({folder}/STAGES.md)."""
NAMES_TEXT = """Names: stage, kernels, loss, attention. Stages: 00 Hugging Face's model; 01
compiled; 02 all core ops swapped; 03: 02 compiled; 04: 02 with linear cross entropy, which keeps no
logits; 05: 04 compiled, or 01 with its loss; 06: all hot paths in C. kernelize: transformers' or,
in flatout's row, `flatout.hf.kernelize`; fused: `flatout.hf.fuse` with flatout's AdamW. liger_old:
Liger 0.8.2, because 0.8.5 has its rope under `torch.compiler.disable`, which fullgraph refuses: the
Compile Issue of Liger's rows. ce: Liger's cross entropy on logits, where liger alone has its linear
one; cce: cut-cross-entropy; lce: flatout's linear cross entropy. fa2, fa3: flash-attn 2 and 3;
sdpa: torch's attention."""
COLUMNS_TEXT = """MFU: (6 N + 12 L H S) FLOPs a token, of N parameters, L layers, hidden size H and
sequences of S tokens (causal attention counted in full), over the dense bf16 peak{peak}. "from the
reference": the largest distance of a step's loss from `{reference}`'s; over {tolerance:.0%} of it
the status is "Loss off". "first step s" holds the seconds of "of it imports" (until torch and
transformers are imported), "CUDA context" and "patching"; "compile s": what the warm-up steps took
beyond a median one. "graphs": those that torch.compile made, one for all layers; "CUDA graphs":
those recorded, a forward and a backward one a layer. "card": the first digits of the GPU's uuid.
stages.csv calls reserved GiB Mem(GB), as the public matrix does."""
LOG_TEXT = " [stages.log](stages.log): the console of several runs, of some rows more than one."
REASONS_TEXT = "Reasons, to the end of the first sentence (stages.json has them in full):"
SHORT_HEAD = [
    "row", "MFU %", "published", "GiB", "published GB", "step ms", "IQR", "first step s", "status",
]  # fmt: skip
FULL_HEAD = [
    "row", "attention", "packages", "status", "MFU %", "TFLOPS", "published", "step ms", "IQR ms",
    "tokens/s", "reserved GiB", "allocated GiB", "first loss", "last loss", "from the reference",
    "first step s", "of it imports", "CUDA context",
    "patching", "model creation s", "compile s", "graphs", "CUDA graphs", "card", "git", "ran",
]  # fmt: skip
EXPANDABLE_TEXT = "Reserved GiB with the allocator's expandable segments: {}."
PARITY_SHORT = """Losses over {steps} steps ({preset}, {data}): {outcome} as close to three runs of
`{reference}`, whose first weights differ by one unit in the last place, as those are to each other.
![losses]({folder}/parity.png)"""
PARITY_TEXT = """Losses over {steps} steps ({preset}, {data}): three runs of `{reference}` whose
first weights differ by one unit in the last place span what rounding alone does (their largest
distance, {window} steps around). A row must lie within that of the nearest of them in {inside:.0%}
of the steps, and within {farthest:g} times that everywhere; "worst" is its largest distance, in
such spans. "bias", its mean distance from the references' mean, and the largest of their own
decide nothing. ![losses](parity.png)"""
PARITY_HEAD = ["row", "within", "of the steps", "worst", "at step", "bias", "references' own"]
PROFILE_TEXT = """Milliseconds of a step by kernel group, under torch's profiler ({machine}); what
is left of the step are gaps between kernels:"""
MACHINE = (("driver", "driver {}"), ("power_limit", "power cap {}"), ("torch", "torch {}"),
           ("cuda", "CUDA {}"), ("cudnn", "cuDNN {}"),
           ("transformers", "transformers {}"))  # fmt: skip


def machine(record):
    where = record.get("where", {})
    name = where.get("gpu") or where.get("cpu") or "unknown machine"
    return ", ".join([name, *(text.format(where[k]) for k, text in MACHINE if k in where)])


def sustained(records):
    """What a GEMM reached whenever run_stages.py began to run some of these rows."""
    found = sorted({r["where"]["gemm_tflops"] for r in records if "gemm_tflops" in r["where"]})
    text = " to ".join(map(str, dict.fromkeys([found[0], found[-1]]))) if found else ""
    return f", a bf16 GEMM, sustained (at the power limit): {text} TFLOPS" if text else ""


def card(record):
    return record.get("where", {}).get("uuid", "-").removeprefix("GPU-")[:8]


def cards(results, where):
    """How many cards of a kind and commits the rows are of, where it is more than one of either."""
    rows = results["rows"].values()
    counts = {
        "on {} such cards": len({card(r) for r in rows} - {"-"}),
        "at {} commits": len({r["git"] for r in rows if r.get("git")}),
    }
    found = [text.format(count) for text, count in counts.items() if count > 1]
    return f" The rows ran {', '.join(found)}: {where}." if found else ""


def machines(results):
    """The machine of the rows, and which rows ran on which where they are several."""
    seen = {}
    for record in ordered(results["rows"]):
        seen.setdefault(machine(record), []).append({"where": {}} | record)
    text = {name + sustained(records): records for name, records in seen.items()}
    if len(text) == 1:
        return f"{next(iter(text))}."
    names = {name: ", ".join(f"`{r['row']}`" for r in records) for name, records in text.items()}
    return " ".join(f"{rows}: {name}." for name, rows in names.items())


def published(name):
    """MFU and memory of the public matrix, as text."""
    value = PUBLISHED.get(name)
    if value is None:
        return "-", "-"
    return (value, "-") if isinstance(value, str) else tuple(map(str, value))


def setting(results):
    s = results["settings"]
    return f"{s['preset']}, {s['batch']} x {s['seq']} tokens, {s['dtype']}"


def short_lines(results):
    for name in (row.name for row in ROWS):
        record = results["rows"].get(name)
        mfu, memory = published(name)
        if record is None:
            yield [f"`{name}`", "-", mfu, "-", memory, "-", "-", "-", "not run"]
            continue
        figures, ran = record["figures"], record["status"] in RAN
        yield [f"`{name}`", number(figures["mfu"]), mfu,
               number(record.get("peak_gib"), 2) if ran else "-", memory,
               number(figures["step_ms"]), number(figures["iqr_ms"]),
               number(figures["first_step_s"]) + report.cached(record) if ran else "-",
               record["status"]]  # fmt: skip


def full_lines(results):
    for r in ordered(results["rows"]):
        f, compiler = r["figures"], r.get("compiler", {})
        compiled = BY_NAME[r["row"]].compile
        graphs = [str(compiler.get(k, "-")) if compiled else "-" for k in ("graphs", "cuda_graphs")]
        apart = r.get("loss_difference")
        yield [f"`{r['row']}`", r.get("attention", "-"), report.peers(r) or "-", r["status"],
               number(f["mfu"]), number(f["tflops"]), report.published(r["row"]),
               number(f["step_ms"]), number(f["iqr_ms"], 2), number(f["tokens_per_s"], 0),
               number(r.get("peak_gib"), 2), number(r.get("allocated_gib"), 2),
               number(f["first_loss"], 3), number(f["last_loss"], 3),
               "-" if apart is None else f"{100 * apart:.2f} %", number(f["first_step_s"]),
               *(number(r.get(k)) for k in ("import_s", "context_s", "patch_s", "model_s")),
               number(f["compile_s"]) + report.cached(r), *graphs,
               card(r), (r.get("git") or "-")[:9], (r.get("ran") or "-")[:10]]  # fmt: skip


def columns(results, folder):
    """What the columns of STAGES.md hold."""
    found = results["rows"].values()
    peak = report.peak_tflops(results["environment"])
    text = COLUMNS_TEXT.format(
        peak=f" of {peak:g} TFLOPS" if peak else "", tolerance=report.TOLERANCE,
        reference=next((r["reference"] for r in found if r.get("reference")), REFERENCES[0]),
    )  # fmt: skip
    return text + (LOG_TEXT if (folder / "stages.log").exists() else "")


def reasons(results):
    """A list of the rows with a reason, each to the end of its first sentence."""
    lines = [
        f"- `{r['row']}`: {r['status']}: " + re.split(r"(?<=\.)\s", r["reason"])[0].rstrip(".")
        for r in ordered(results["rows"]) if r["reason"]
    ]  # fmt: skip
    return [wrapped(REASONS_TEXT), "\n".join(lines)] if lines else []


def timed(results, choose):
    """The records with step times of the rows that choose(row) is true for, the fastest first."""
    rows = [results["rows"][r.name] for r in ROWS if r.name in results["rows"] and choose(r)]
    rows = [r for r in rows if r["figures"]["step_ms"] is not None]
    return sorted(rows, key=lambda r: r["figures"]["step_ms"])


def named(record):
    return f"`{record['row']}`, {number(record['figures']['step_ms'])} ms"


def ran_of_peers(results):
    """How many of the peers' rows have figures, and what became of the others."""
    peers = [row.name for row in ROWS if not row.ours]
    ran = {record["row"] for record in timed(results, lambda r: not r.ours)}
    missed = [results["rows"].get(name, {}).get("status", "not run") for name in peers
              if name not in ran]  # fmt: skip
    states = ", ".join(f"{count} {status}" for status, count in Counter(missed).most_common())
    return f"the {len(ran)} that ran" + (f" ({len(missed)} did not: {states})" if missed else "")


def beside(results):
    """flatout's best rows beside the best of the peers, and those slower than their peers."""
    found = [
        (f"fastest peer of {ran_of_peers(results)}", lambda r: not r.ours),
        ("fastest of flatout with torch's optimizer", lambda r: r.ours and not r.optimizer),
        ("of these, with nothing compiled", lambda r: r.ours and not (r.optimizer or r.compile)),
        ("with flatout's optimizer", lambda r: r.optimizer),
    ]
    found = [(what, timed(results, choose)) for what, choose in found]
    text = "; ".join(f"{what}: {named(records[0])}" for what, records in found if records)
    return f"{text[0].upper()}{text[1:]}.{slower(results)}" if text else ""


def slower(results):
    """flatout's rows that take longer than a peer's of their stage, by SLOWER."""
    found = []
    for record in timed(results, lambda r: r.ours):
        stage = record["row"][:2]
        peers = timed(results, lambda r, s=stage: not r.ours and r.name.startswith(s))
        least = min((p["figures"]["step_ms"] for p in peers), default=math.inf)
        if record["figures"]["step_ms"] > (1 + SLOWER) * least:
            found.append(f"{named(record)} (IQR {number(record['figures']['iqr_ms'])}), beside "
                         f"{named(peers[0])}")  # fmt: skip
    return f" Slower than a peer of its stage: {'; '.join(found)}." if found else ""


def compiling(results):
    """What torch.compile did in the rows that it ran in."""
    ran = [r for r in ordered(results["rows"]) if BY_NAME[r["row"]].compile and r["status"] in RAN]
    clean = [r for r in ran if not report.compiler_note(r)]
    if not ran:
        return ""
    names = {True: "none", False: ", ".join(f"`{r['row']}`" for r in clean)}
    text = "Compiled (every layer, fullgraph, max-autotune) with no graph break, no recompilation "
    text += f"after warm-up and no CUDA graph skipped: {names[not clean]}"
    odd = [f"`{r['row']}`: {report.compiler_note(r)}" for r in ran if r not in clean]
    return text + "".join(f"; {line}" for line in odd) + "."


# ---- Other files ----------------------------------------------------------------------------


def load(folder, kind):
    path = folder / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def expandable(results):
    found = [
        f"`{r['row']}` {number(r.get('peak_gib'))}" for r in ordered(results["rows"])
        if r["status"] in RAN
    ]  # fmt: skip
    return wrapped(EXPANDABLE_TEXT.format(", ".join(found) or "no row ran"))


def parity_values(results, folder):
    found = parity.judged(results)
    outside = [f"`{r['row']}`" for r in found if not r["parity"]["within"]]
    outcome = f"all {len(found)} rows lie"
    if outside:
        outcome = f"{', '.join(outside)} do not lie, the other {len(found) - len(outside)} rows do,"
    return dict(
        steps=results["settings"]["steps"], preset=setting(results), folder=folder,
        data=results["settings"]["data"].split(",")[0], reference=parity.NAMES[0],
        window=parity.WINDOW, inside=parity.INSIDE, farthest=parity.FARTHEST, outcome=outcome,
    )  # fmt: skip


def parity_part(results, folder):
    lines = [[f"`{c[0]}`", *c[1:]] for c in map(parity.cells, parity.judged(results))]
    text = PARITY_TEXT.format(**parity_values(results, folder))
    return [wrapped(text), "\n".join(markdown(PARITY_HEAD, lines))]


def profile_part(results):
    from stages.profiling import GROUPS

    found = [r for r in ordered(results["rows"]) if "profile" in r]
    lines = [
        [f"`{r['row']}`", *map(number, (r["figures"]["step_ms"], *r["profile"]["groups"].values()))]
        for r in found
    ]  # fmt: skip
    text = PROFILE_TEXT.format(machine=machines({"rows": {r["row"]: r for r in found}})[:-1])
    return [wrapped(text), "\n".join(markdown(["row", "step", *GROUPS], lines))]


def introduction(results, where):
    steps = results["settings"]["steps"] - results["settings"]["warmup"]
    return TEXT.format(
        what=setting(results), machine=machines(results), cards=cards(results, where), timed=steps
    )


def short_matrix(results, folder):
    text = introduction(results, "STAGES.md says which ran where")
    lines = markdown(SHORT_HEAD, short_lines(results))
    return [wrapped(text + SHORT_TEXT.format(folder=shown(folder))), "\n".join(lines)]


def full_matrix(results, folder):
    text = introduction(results, 'columns "card" and "git"')
    texts = map(wrapped, (text, NAMES_TEXT, columns(results, folder)))
    lines = markdown(FULL_HEAD, full_lines(results))
    return [*texts, "\n".join(lines), *reasons(results)]


def parts(folder, matrix):
    """The matrix of either page, and the paragraphs below it."""
    out = []
    if results := load(folder, STAGES):
        out += matrix(results, folder)
        out += [wrapped(text) for text in (beside(results), compiling(results)) if text]
    if results := load(folder, EXPANDABLE):
        out.append(expandable(results))
    return out


def short_page(folder):
    out = parts(folder, short_matrix)
    if results := load(folder, PARITY):
        out.append(wrapped(PARITY_SHORT.format(**parity_values(results, shown(folder)))))
    return out


def full_page(folder):
    made = f"Generated by `python benchmarks/run_stages.py --readme {shown(folder)}`: do not edit."
    out = ["# The stage matrix", made, *parts(folder, full_matrix)]
    if results := load(folder, PARITY):
        out += parity_part(results, shown(folder))
    if results := load(folder, PROFILE):
        out += profile_part(results)
    return out


def pages(folder):
    """file -> its text, of the two files that are made from the results in the folder."""
    short = "".join(f"{part}\n\n" for part in short_page(folder))
    found = {README: between(README.read_text(), BEGIN, END, short)}
    if short:
        found[folder / "STAGES.md"] = "\n\n".join(full_page(folder)) + "\n"
    return found


def update(folder):
    for path, text in pages(folder).items():
        path.write_text(text)
