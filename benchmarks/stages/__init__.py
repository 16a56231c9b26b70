"""The parts of run_stages.py: rows (what runs), data, machine, process and worker (a row),
model, training, profiling, results (files), report, parity and readme (what is shown)."""
