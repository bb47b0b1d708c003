"""Faults injected for real into a whole running system, and a checker that counts what became of it.

`system` starts everything with two replicas of every service, `population` knows what must be there, `readers` judge
every answer, `mix` kills and freezes by a seeded schedule, `rows` injects faults one by one, and `checker` compares at
the end. `python -m tests.faults` (`make faults`, `make soak`) runs them for longer than the suite.
"""
