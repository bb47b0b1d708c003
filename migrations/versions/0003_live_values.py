"""Market days, leases, refreshes on request, and notifications of what changes in a portfolio."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE market_days (
        day DATE NOT NULL,
        opens_at TIMESTAMPTZ,
        closes_at TIMESTAMPTZ,
        CONSTRAINT market_days_pkey PRIMARY KEY (day),
        CONSTRAINT market_days_session_check CHECK (
            (opens_at IS NULL) = (closes_at IS NULL) AND (opens_at IS NULL OR opens_at < closes_at)
        )
    )
    """,
    """
    COMMENT ON TABLE market_days IS
        'sessions of equities as the venue publishes them, overriding the rules; without times the day is closed'
    """,
    # A lease is judged by the clock of the one server that holds it, so that clocks of replicas do not matter.
    """
    CREATE TABLE leases (
        name TEXT NOT NULL,
        holder TEXT NOT NULL,
        term BIGINT NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT leases_pkey PRIMARY KEY (name)
    )
    """,
    "COMMENT ON COLUMN leases.term IS 'grows with every holder: a write that carries an older one does nothing'",
    """
    CREATE TABLE refreshes (
        user_id INTEGER NOT NULL,
        kind TEXT NOT NULL,
        requested_at TIMESTAMPTZ NOT NULL,
        CONSTRAINT refreshes_pkey PRIMARY KEY (user_id, kind),
        CONSTRAINT refreshes_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
        CONSTRAINT refreshes_kind_check CHECK (kind IN ('prices', 'snapshot'))
    )
    """,
    "COMMENT ON TABLE refreshes IS 'the last request of each user that was granted'",
    # ---- what changed, for who watches -------------------------------------------------------------
    # The payload is a user's id; an empty one says that too many have changed to name each. Identical ones of a
    # transaction are one. A notification is delivered after the commit: who hears it finds the change.
    """
    CREATE FUNCTION notify_portfolios() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        changed INTEGER[];
    BEGIN
        IF TG_TABLE_NAME = 'users' THEN
            changed := ARRAY(SELECT DISTINCT id FROM changed_rows LIMIT 101);
        ELSE
            changed := ARRAY(SELECT DISTINCT user_id FROM changed_rows LIMIT 101);
        END IF;
        IF cardinality(changed) > 100 THEN
            PERFORM pg_notify('portfolios', '');
        ELSE
            PERFORM pg_notify('portfolios', user_id::text) FROM unnest(changed) AS user_id;
        END IF;
        RETURN NULL;
    END
    $$
    """,
    # A position may be given to another user: the rows as they were and as they are name all who are concerned.
    *(
        f"""
    CREATE TRIGGER {table}_notify_{name}
    AFTER {event} ON {table}
    REFERENCING {rows} TABLE AS changed_rows
    FOR EACH STATEMENT EXECUTE FUNCTION notify_portfolios()
    """
        for table, event, name, rows in (
            ("users", "UPDATE", "update", "NEW"),
            ("users", "DELETE", "delete", "OLD"),
            ("positions", "INSERT", "insert", "NEW"),
            ("positions", "UPDATE", "update", "NEW"),
            ("positions", "UPDATE", "update_from", "OLD"),
            ("positions", "DELETE", "delete", "OLD"),
        )
    ),
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    for table, names in (
        ("users", ("update", "delete")),
        ("positions", ("insert", "update", "update_from", "delete")),
    ):
        for name in names:
            op.execute(f"DROP TRIGGER {table}_notify_{name} ON {table}")
    op.execute("DROP FUNCTION notify_portfolios")
    op.execute("DROP TABLE refreshes, leases, market_days")
