"""The parts of run_stages.py: rows (what runs), data, worker (one row), report (what is shown)."""
