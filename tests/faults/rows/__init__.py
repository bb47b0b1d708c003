"""The faults one by one: each is injected for real, what must be seen is looked for, and the checker has the last word.

A module for each kind of fault; `ROWS` in `tests.faults.rows.table` lists them all.
"""
