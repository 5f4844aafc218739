"""Benchmarks: one module a question. `python -m benchmarks` runs them all, `python -m benchmarks NAME --json` one.

Everything that is compared is measured in one run, in alternation, and given as a ratio or a difference: a median with
its quartiles. A goal is said to hold or not; nothing here asserts a time.
"""
