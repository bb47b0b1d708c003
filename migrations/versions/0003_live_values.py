"""Market days, leases, refreshes on request, and notifications of what changes in a portfolio."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NOTIFYING = (
    ("users", "UPDATE"),
    ("users", "DELETE"),
    ("users", "TRUNCATE"),
    ("positions", "INSERT"),
    ("positions", "UPDATE"),
    ("positions", "DELETE"),
    ("positions", "TRUNCATE"),
)
_TRANSITIONS = {
    "INSERT": "REFERENCING NEW TABLE AS new_rows",
    "UPDATE": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "DELETE": "REFERENCING OLD TABLE AS old_rows",
    "TRUNCATE": "",
}

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
    # transaction are one. A notification is delivered after the commit: who hears it finds the change. It takes a lock
    # of the whole server at the commit, so a statement that changes nothing of a portfolio notifies nothing.
    """
    CREATE FUNCTION notify_portfolios(changed INTEGER[]) RETURNS VOID LANGUAGE sql AS $$
        SELECT pg_notify('portfolios', CASE WHEN cardinality(changed) > 100 THEN '' ELSE user_id::text END)
        FROM unnest(changed) AS user_id
    $$
    """,
    """
    CREATE FUNCTION notify_of_users() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            PERFORM notify_portfolios(ARRAY(SELECT id FROM old_rows LIMIT 101));
        ELSIF TG_OP = 'UPDATE' THEN
            PERFORM notify_portfolios(ARRAY(
                SELECT id
                FROM old_rows
                JOIN new_rows USING (id)
                WHERE (old_rows.subject, old_rows.is_active, old_rows.cash_balance)
                    IS DISTINCT FROM (new_rows.subject, new_rows.is_active, new_rows.cash_balance)
                LIMIT 101
            ));
        ELSE
            PERFORM pg_notify('portfolios', '');
        END IF;
        RETURN NULL;
    END
    $$
    """,
    # A position may be given to another user: the rows as they were and as they are name all who are concerned.
    """
    CREATE FUNCTION notify_of_positions() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            PERFORM notify_portfolios(ARRAY(SELECT DISTINCT user_id FROM new_rows LIMIT 101));
        ELSIF TG_OP = 'DELETE' THEN
            PERFORM notify_portfolios(ARRAY(SELECT DISTINCT user_id FROM old_rows LIMIT 101));
        ELSIF TG_OP = 'UPDATE' THEN
            PERFORM notify_portfolios(ARRAY(
                SELECT DISTINCT user_id
                FROM (
                    (TABLE old_rows EXCEPT TABLE new_rows) UNION ALL (TABLE new_rows EXCEPT TABLE old_rows)
                ) AS different
                LIMIT 101
            ));
        ELSE
            PERFORM pg_notify('portfolios', '');
        END IF;
        RETURN NULL;
    END
    $$
    """,
    *(
        f"""
    CREATE TRIGGER {table}_notify_{event.lower()}
    AFTER {event} ON {table}
    {_TRANSITIONS[event]}
    FOR EACH STATEMENT EXECUTE FUNCTION notify_of_{table}()
    """
        for table, event in NOTIFYING
    ),
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    for table, event in NOTIFYING:
        op.execute(f"DROP TRIGGER {table}_notify_{event.lower()} ON {table}")
    op.execute("DROP FUNCTION notify_of_users, notify_of_positions")
    op.execute("DROP FUNCTION notify_portfolios")
    op.execute("DROP TABLE refreshes, leases, market_days")
