"""The parts of run_ops.py: table (the ops and their peers), timing, overhead."""
