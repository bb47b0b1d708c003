"""Wrong data at every door: HTTP, the bus, Alpaca's answers, imported files, settings.

Whatever comes in, nobody crashes, nothing wrong is stored or shown, nothing of the inside leaks, and right data that
comes next is taken as ever. `make test` tries a few examples, the same each time; `make fuzz` twenty times as many, and
new ones. What it finds becomes an example that is always tried, or a test beside those of the module that was wrong.
"""
