"""The deployable processes. They never import each other: the schema and `shared.messages` are all they share."""
