"""The seed's design as a good engineer would write it, to measure against: FastAPI, SQLAlchemy's async ORM, pydantic.

The literal schema of the seed (surrogate ids, a foreign key with cascade), services with the seed's names, a loop over
users with a commit each, chart buckets in Python. Nothing of it is used by the project itself.
"""
