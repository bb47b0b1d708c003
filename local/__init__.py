"""The whole system on one machine, for a person at a terminal and for the tests: nothing here goes into an image.

Reads `.env` and the environment, keeps everything under one folder (`.foliotick`), starts embedded PostgreSQL
and NATS, migrates, fills demo portfolios, starts the market simulator and the services, and stops all in order.
"""
