"""What benchmarks/stages makes of the rows: parity of losses, groups of kernels, files, README."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import run_stages  # noqa: E402
from stages import parity, profiling, readme, report, rows  # noqa: E402
from stages import results as files  # noqa: E402

RESULTS = BENCHMARKS / "results" / "h100"


def record(name, losses, **more):
    return {"row": name, "status": "Success!", "reason": "", "losses": losses, **more}


# ---- --parity ------------------------------------------------------------------------------


def curves(count, noise=0.01, steps=200):
    """Loss curves that differ by noise which grows with the steps, as rounding's does."""
    step = np.arange(steps)
    rng = np.random.default_rng(0)
    apart = noise * step / steps * rng.standard_normal((count, steps))
    return 4 + 6 * np.exp(-step / 40) + apart


def test_parity_tells_rounding_from_a_wrong_gradient():
    references, *others = curves(3), *curves(20)[3:]
    for losses in others:
        assert parity.verdict(losses, references)["within"]
    for wrong in (1.01 * others[0], others[0] + 0.03, np.roll(others[0], 3), others[0] * 0):
        assert not parity.verdict(wrong, references)["within"]
    broken = others[0].copy()
    broken[77] = np.nan
    found = parity.verdict(broken, references)
    assert not found["within"] and found["step"] == 77 and found["inside"] >= 0.99
    assert parity.verdict(references[1], references)["worst"] == 0


# ---- --profile -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("triton_tem_fused_mm_t_2", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_bwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("void attention_fwd_kernel<128, true>(AttentionFwd)", "attention"),
        ("void rms_norm_bwd_dw_kernel<__nv_bfloat16>", "norm"),
        ("_rms_norm_forward_kernel", "norm"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_0", "norm"),
        ("void qk_norm_rope_fwd_kernel<__nv_bfloat16>", "rope"),
        ("_triton_rope", "rope"),
        ("triton_poi_fused_add_cat_mul_neg_slice_4", "rope"),
        ("_swiglu_backward_kernel", "swiglu"),
        ("triton_poi_fused_mul_silu_3", "swiglu"),
        ("liger_cross_entropy_kernel", "loss"),
        ("_cce_backward_kernel", "loss"),
        ("_indexed_neg_dot_forward_kernel", "loss"),
        ("void linear_cross_entropy_kernel<__nv_bfloat16>", "loss"),
        ("void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
         "FusedAdamMathFunctor<c10::BFloat16, 4, AdamW>>", "optimizer"),
        ("void adamw_step_kernel<__nv_bfloat16>", "optimizer"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor>", "clip"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<1>, BinaryOpScalarTensorFunctor<"
         "std::multiplies<float>>>", "clip"),
        ("void global_norm_kernel<__nv_bfloat16>", "clip"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
    ],
)  # fmt: skip
def test_kernel_groups(kernel, group):
    assert profiling.group(kernel) == group


def test_profile_sums():
    found = profiling.summary([("nvjet_a", 2, 1.0), ("x", 1, 4.0), ("sgemm", 1, 2.0)])
    assert found["groups"]["gemm"] == 3 and found["groups"]["other"] == 4
    assert found["busy_ms"] == 7 and [k["ms"] for k in found["kernels"]] == [4, 2, 1]


# ---- Files and README ----------------------------------------------------------------------


def made_up(folder, kind="stages", **more):
    """A result file of three rows on an H100, in figures that no machine gave."""
    preset = rows.PRESETS["qwen3-8b"]
    where = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "1.2", "torch": "9.9"}
    setting = {"preset": "qwen3-8b", "config": preset.config, "batch": 1, "seq": 2048, "steps": 4,
               "warmup": 1, "dtype": "bf16", "data": "some text, 0123"}  # fmt: skip
    ran = {"parameters": 8190735360, "where": where, "peak_gib": 70.04, "allocated_gib": 61.0,
           "first_step_s": 9.0, "model_s": 2.5, "losses": [9.0, 8.0, 7.0, 6.0],
           "git": "abcdef0123456789", "ran": "2026-11-23T05:00:00+00:00"}  # fmt: skip
    found = {
        "00_sdpa": record("00_sdpa", step_ms=[900.0, 314.0, 314.0, 314.0], **ran),
        "00_fa3": record("00_fa3", [], step_ms=[], where=where),
        "01_sdpa_compile": record("01_sdpa_compile", step_ms=[9e3, 250.0, 250.0, 250.0], **ran),
        "04_flatout_lce": record("04_flatout_lce", step_ms=[900.0, 240.0, 240.0, 240.0], **ran),
        "06_flatout_fused": record("06_flatout_fused", step_ms=[900.0, 330.0, 330.0, 330.0], **ran),
    }
    found["00_fa3"] |= {"status": "Skipped", "reason": "flash_attn_interface not installed"}
    found["01_sdpa_compile"]["compiler"] = {
        "graphs": 1, "graph_breaks": 0, "recompiles": 0, "cuda_graphs": 72, "cache_hits": 1,
    }  # fmt: skip
    results = {"schema": files.SCHEMA, "kind": kind, "settings": setting, "environment": where,
               "rows": found, **more}  # fmt: skip
    folder.mkdir(exist_ok=True)
    report.finish(results, folder / f"{kind}.json")
    return results


def cells_of(text, start):
    line = next(x for x in text.splitlines() if x.startswith(start))
    return [x.strip() for x in line.strip("|").split("|")]


def test_readme_from_the_result_files(tmp_path, monkeypatch):
    page, folder = tmp_path / "README.md", tmp_path / "h100"
    monkeypatch.setattr(readme, "README", page)
    page.write_text(f"a\n{readme.BEGIN}\nas it was\n{readme.END}\nb\n")
    made_up(folder)
    made_up(folder, files.EXPANDABLE)
    for _ in range(2):
        assert run_stages.main(["--readme", str(folder)]) == 0
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "as it was" not in text
    assert cells_of(text, "| `00_sdpa`")[1:] == [
        "34.8", "34.7", "70.04", "71.2", "314.0", "0", "6.5", "Success!"]  # fmt: skip
    assert cells_of(text, "| `00_fa3`")[1:5] == ["-", "34.8", "-", "70.6"]
    assert cells_of(text, "| `04_flatout_lce`")[2] == "-"  # the public matrix has none
    assert cells_of(text, "| `01_sdpa_compile`")[7:] == ["6.5 (part cached)", "Success!"]
    assert cells_of(text, "| `02_flatout`")[-1] == "not run"
    joined = " ".join(text.split())  # lines are wrapped anywhere
    assert (
        "Fastest peer of the 2 that ran (18 did not: 17 not run, 1 Skipped): `01_sdpa_compile`, "
        "250.0 ms; fastest of flatout with torch's optimizer: `04_flatout_lce`, 240.0 ms; of "
        "these, with nothing compiled: `04_flatout_lce`, 240.0 ms; "
        "with flatout's optimizer: `06_flatout_fused`, 330.0 ms. Compiled" in joined
    )
    assert "no CUDA graph skipped: `01_sdpa_compile`." in joined
    assert "with the allocator's expandable segments: `00_sdpa` 70.0, " in joined
    text = (folder / "STAGES.md").read_text()
    assert cells_of(text, "| `00_fa3`")[3] == "Skipped"
    assert "- `00_fa3`: Skipped: flash_attn_interface not installed\n" in text
    end = ["1", "72", "-", "abcdef012", "2026-11-23"]  # "-": no uuid of a card
    assert cells_of(text, "| `01_sdpa_compile`")[-5:] == end
    joined = " ".join(text.split())
    assert (
        "the dense bf16 peak of 989 TFLOPS" in joined
        and "loss from `00_sdpa`'s; over 2% " in joined
    )
    assert "h100/STAGES.md](" not in text and "stages.log" not in text  # no such file here


def test_the_reader_is_told_of_several_cards_and_commits(tmp_path):
    results = made_up(tmp_path)
    assert readme.cards(results, "see") == ""
    for name, uuid in {
        "00_sdpa": "GPU-12345678-9abc",
        "04_flatout_lce": "GPU-fedcba98-7654",
    }.items():
        found = results["rows"][name]
        found["where"] = found["where"] | {"uuid": uuid}
    assert readme.cards(results, "see") == " The rows ran on 2 such cards: see."
    results["rows"]["04_flatout_lce"]["git"] = "0123456789"
    assert readme.cards(results, "see") == " The rows ran on 2 such cards, at 2 commits: see."
    lines = {line[0]: line for line in readme.full_lines(results)}
    column = readme.FULL_HEAD.index("card")
    assert lines["`00_sdpa`"][column] == "12345678" and lines["`00_fa3`"][column] == "-"


def test_a_long_reason_is_cut_to_its_first_sentence(tmp_path):
    results = made_up(tmp_path)
    oom = {"status": "CUDA OOM", "reason": "OutOfMemoryError: CUDA out of memory. Tried 2.32 GiB."}
    results["rows"]["00_sdpa"] |= oom
    report.finish(results, tmp_path / "stages.json")
    _, lines = readme.reasons(results)
    assert lines.splitlines()[1] == "- `00_sdpa`: CUDA OOM: OutOfMemoryError: CUDA out of memory"
    (line,) = (x for x in readme.full_lines(results) if x[0] == "`00_sdpa`")
    first = readme.FULL_HEAD.index("first loss")
    assert line[3] == "CUDA OOM" and line[first : first + 2] == ["9.000", "-"]


def test_machines_of_rows():
    def ran(name, gpu, tflops):
        return record(name, [], where={"gpu": gpu, "torch": "9.9", "gemm_tflops": tflops})

    found = [ran("00_sdpa", "A", 690.4), ran("00_fa2", "A", 695.8), ran("02_flatout", "A", 691.0)]
    one = {"rows": {r["row"]: r for r in found}}
    assert readme.machines(one) == (
        "A, torch 9.9, a bf16 GEMM, sustained (at the power limit): 690.4 to 695.8 TFLOPS."
    )
    one["rows"]["00_sdpa"]["where"]["gpu"] = "B"
    other = "`00_sdpa`: B, torch 9.9, a bf16 GEMM, sustained (at the power limit): 690.4 TFLOPS."
    assert other in readme.machines(one)


def test_readme_of_parity_and_profile(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", page)
    page.write_text(f"{readme.BEGIN}\n{readme.END}")
    results = made_up(tmp_path, files.PARITY)
    for name in parity.NAMES[1:]:
        results["rows"][name] = results["rows"]["00_sdpa"] | {"row": name}
    results["rows"]["00_sdpa"]["losses"][1] = 8.01  # the spread
    assert parity.judge(results) is None
    report.finish(results, tmp_path / "parity.json")
    made_up(tmp_path, files.PROFILE)
    profiled = json.loads((tmp_path / "profile.json").read_text())
    profiled["rows"]["04_flatout_lce"] |= {
        "profile": profiling.summary([("nvjet", 1, 200.0), ("x", 1, 9.5)]), "timed_steps": 3,
    }  # fmt: skip
    report.finish(profiled, tmp_path / "profile.json")
    assert cells_of(profiling.table(profiled), "04_flatout_lce")[0].split() == [
        "04_flatout_lce", "240.0", "200.0", *["0"] * 7, "9.5", "30.5"]  # fmt: skip
    readme.update(tmp_path)
    joined = " ".join(page.read_text().split())
    assert "all 3 rows lie as close to three runs of `00_sdpa`" in joined
    text = (tmp_path / "STAGES.md").read_text()
    text = text[text.index("Losses over") :]
    assert cells_of(text, "| `04_flatout_lce`")[1:3] == ["yes", "100.0 %"]
    profile = text[text.index("by kernel group") :]
    assert cells_of(profile, "| `04_flatout_lce`")[1:3] == ["240.0", "200.0"]
    assert all(len(line) <= 120 for line in page.read_text().splitlines())

    results["rows"]["04_flatout_lce"]["losses"] = [9.0, 8.0, 7.5, 6.0]  # a verdict is a status, too
    assert parity.judge(results) is None
    report.finish(results, tmp_path / "parity.json")
    assert results["rows"]["04_flatout_lce"]["status"] == "Loss off"
    assert results["rows"]["06_flatout_fused"]["status"] == "Success!"
    readme.update(tmp_path)
    assert "`04_flatout_lce` do not lie, the other 2 rows do," in page.read_text()


def test_a_row_slower_than_its_peer_is_told(tmp_path):
    results = made_up(tmp_path)
    own = results["rows"]["01_sdpa_compile"] | {"row": "01_flatout_kernelize_compile"}
    results["rows"][own["row"]] = own | {"step_ms": [9e3, 256.0, 256.0, 256.0]}
    report.finish(results, tmp_path / "stages.json")
    assert readme.beside(results).endswith(
        "Slower than a peer of its stage: `01_flatout_kernelize_compile`, 256.0 ms (IQR 0), beside "
        "`01_sdpa_compile`, 250.0 ms."
    )
    results["rows"][own["row"]]["step_ms"] = [9e3, 254.0, 254.0, 254.0]  # by less than 2 %
    report.finish(results, tmp_path / "stages.json")
    assert "Slower" not in readme.beside(results)


def test_the_readme_holds_what_the_result_files_hold():
    assert all(path.read_text() == text for path, text in readme.pages(RESULTS).items())


def test_no_result_file_no_table(tmp_path):
    (text,) = readme.pages(tmp_path).values()
    assert f"{readme.BEGIN}\n{readme.END}" in text


def test_a_compiled_row_that_recompiles_says_so(tmp_path):
    results = made_up(tmp_path)
    results["rows"]["01_sdpa_compile"]["compiler"] |= {"recompiles": 2, "cudagraph_skips": 1}
    report.finish(results, tmp_path / "stages.json")
    reason = "2 recompilations after warm-up, 1 CUDA graphs skipped"
    assert results["rows"]["01_sdpa_compile"]["reason"] == reason
    assert readme.compiling(results).endswith(f"`01_sdpa_compile`: {reason}.")


def test_merge(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    made_up(a)
    second = made_up(b)
    second["rows"]["00_sdpa"] |= {"status": "Timeout", "reason": "slow"}  # a's row ran
    second["rows"]["02_liger_sdpa"] = record("02_liger_sdpa", [], step_ms=[])
    second["rows"]["02_liger_sdpa"] |= {"status": "CUDA OOM", "reason": "72 GiB"}
    report.finish(second, b / "stages.json")
    both = ["--merge", str(a / "stages.json"), str(b / "stages.json")]
    assert run_stages.main([*both, "--out", str(tmp_path / "c")]) == 0
    found = json.loads((tmp_path / "c" / "stages.json").read_text())["rows"]
    assert found["00_sdpa"]["status"] == "Success!" and len(found) == 6
    assert found["02_liger_sdpa"]["status"] == "CUDA OOM"
    assert "34.7 %, 71.2 GB" in capsys.readouterr().out  # published figures beside the measured
    second["settings"]["steps"] = 5
    files.save(second, b / "stages.json")
    with pytest.raises(SystemExit, match="made with steps 5, not 4"):
        run_stages.main([*both, "--out", str(tmp_path / "c")])
