"""The performance goals, measured in one run on the same data and the same durable PostgreSQL, as ratios of three ways.

(a) `seed_like`, the seed's design as a good engineer would write it; (b) ours; (c) the limit: ready rows inserted, the
bare statement, bare aiohttp. The machine may be shared and slow, which moves absolute times but hardly the ratios and
the CPU time of a request. `docs/performance.md` says what each figure means.
"""
