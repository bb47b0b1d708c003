"""History in partitions of time, with rollups; keys that are the row's own meaning; deletion by triggers.

Why each key, index and option is as it is: docs/decisions/0007-history-by-time.md.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SNAPSHOT_COLUMNS = """
    user_id INTEGER NOT NULL,
    unpriced_positions SMALLINT NOT NULL DEFAULT 0,
    simulated BOOLEAN NOT NULL DEFAULT FALSE,
    total_value NUMERIC(18, 2) NOT NULL,
    cash_balance NUMERIC(18, 2) NOT NULL,
    investment_value NUMERIC(18, 2) NOT NULL
"""


def _rollup(name: str, partitioned: str) -> str:
    return f"""
    CREATE TABLE portfolio_rollups_{name} (
        bucket TIMESTAMPTZ NOT NULL,
        timestamp TIMESTAMPTZ NOT NULL,
        {_SNAPSHOT_COLUMNS},
        CONSTRAINT portfolio_rollups_{name}_pkey PRIMARY KEY (user_id, bucket)
            INCLUDE (unpriced_positions, simulated, total_value)
    ) {partitioned}
    """


STATEMENTS = (
    "DROP VIEW portfolio_valuations, priced_positions",
    "ALTER TABLE portfolio_snapshots DROP CONSTRAINT portfolio_snapshots_user_id_fkey",
    # Ids of users stand in every row of the history: four bytes instead of eight.
    "ALTER TABLE users ALTER COLUMN id TYPE INTEGER",
    "ALTER TABLE positions ALTER COLUMN user_id TYPE INTEGER",
    "ALTER TABLE portfolio_snapshots RENAME TO old_portfolio_snapshots",
    "ALTER TABLE position_snapshots RENAME TO old_position_snapshots",
    "DROP TRIGGER portfolio_snapshots_delete_details ON old_portfolio_snapshots",
    "DROP FUNCTION delete_position_snapshots",
    # Constraint names are the tables' own, but index names are the schema's.
    "ALTER INDEX portfolio_snapshots_pkey RENAME TO old_portfolio_snapshots_pkey",
    "ALTER INDEX position_snapshots_pkey RENAME TO old_position_snapshots_pkey",
    f"""
    CREATE TABLE portfolio_snapshots (
        timestamp TIMESTAMPTZ NOT NULL,
        {_SNAPSHOT_COLUMNS},
        CONSTRAINT portfolio_snapshots_pkey PRIMARY KEY (user_id, timestamp)
    ) PARTITION BY RANGE (timestamp)
    """,
    "COMMENT ON COLUMN portfolio_snapshots.timestamp IS 'the slot, never the time of writing'",
    "COMMENT ON COLUMN portfolio_snapshots.simulated IS 'a price behind it came from a market simulator'",
    """
    CREATE TABLE position_snapshots (
        timestamp TIMESTAMPTZ NOT NULL,
        user_id INTEGER NOT NULL,
        ticker TEXT NOT NULL,
        shares NUMERIC(20, 9) NOT NULL,
        cost_basis NUMERIC(18, 2) NOT NULL,
        current_value NUMERIC(18, 2) NOT NULL,
        price_per_share NUMERIC(15, 4) NOT NULL
    ) PARTITION BY RANGE (timestamp)
    """,
    "COMMENT ON TABLE position_snapshots IS 'belongs to portfolio_snapshots by (user_id, timestamp)'",
    # Rows of a slot are written in the order of their users, so that few pages hold one user's.
    """
    CREATE INDEX position_snapshots_timestamp_user_id_idx ON position_snapshots
    USING brin (timestamp, user_id) WITH (pages_per_range = 8)
    """,
    _rollup("30m", "PARTITION BY RANGE (bucket)"),
    _rollup("1h", "PARTITION BY RANGE (bucket)"),
    _rollup("3h", "PARTITION BY RANGE (bucket)"),
    _rollup("1d", "WITH (autovacuum_vacuum_insert_scale_factor = 0.02)"),
    "COMMENT ON TABLE portfolio_rollups_1d IS 'a bucket is a market date, from local midnight on'",
    # ---- what there is of the history, and its partitions ------------------------------------------
    """
    CREATE TABLE history_tiers (
        tier TEXT NOT NULL,
        table_name TEXT NOT NULL,
        partition_unit TEXT,
        storage_options TEXT,
        complete_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
        users_done INTEGER NOT NULL DEFAULT 0,
        kept_from TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
        CONSTRAINT history_tiers_pkey PRIMARY KEY (tier),
        CONSTRAINT history_tiers_partition_unit_check CHECK (partition_unit IN ('day', 'week', 'month'))
    )
    """,
    """
    COMMENT ON COLUMN history_tiers.complete_until IS
        'a rollup holds every bucket that starts before; the positions of days that ended before are indexed'
    """,
    # Of details: until when their indexes are whole.
    "COMMENT ON COLUMN history_tiers.users_done IS 'of the unit of work at complete_until, users up to this id'",
    "COMMENT ON COLUMN history_tiers.kept_from IS 'what is older has been dropped'",
    # Snapshots are written once and dropped with their partition: a vacuum that freezes them is for nothing.
    # Details are not read by any plan that needs statistics. Rollups are read from the index alone, which
    # needs pages that a vacuum has marked.
    """
    INSERT INTO history_tiers (tier, table_name, partition_unit, storage_options) VALUES
        ('raw', 'portfolio_snapshots', 'week', 'autovacuum_vacuum_insert_threshold = -1'),
        ('details', 'position_snapshots', 'day', 'autovacuum_enabled = false'),
        ('30m', 'portfolio_rollups_30m', 'month', 'autovacuum_vacuum_insert_scale_factor = 0.02'),
        ('1h', 'portfolio_rollups_1h', 'month', 'autovacuum_vacuum_insert_scale_factor = 0.02'),
        ('3h', 'portfolio_rollups_3h', 'month', 'autovacuum_vacuum_insert_scale_factor = 0.02'),
        ('1d', 'portfolio_rollups_1d', NULL, NULL)
    """,
    # Retention waits until the clock has been steady for a while: see services/snapshotter/history.py.
    """
    CREATE TABLE history_clock (
        id SMALLINT NOT NULL DEFAULT 1,
        seen_at TIMESTAMPTZ NOT NULL,
        steady_since TIMESTAMPTZ NOT NULL,
        CONSTRAINT history_clock_pkey PRIMARY KEY (id),
        CONSTRAINT history_clock_id_check CHECK (id = 1)
    )
    """,
    # A table is made by itself and then attached, which stops neither readers nor writers of its parent.
    """
    CREATE FUNCTION make_history_partitions(first TIMESTAMPTZ, last TIMESTAMPTZ, tiers TEXT[] DEFAULT NULL)
    RETURNS INTEGER LANGUAGE plpgsql AS $$
    DECLARE
        missing RECORD;
        made INTEGER := 0;
    BEGIN
        FOR missing IN
            SELECT
                table_name AS parent,
                table_name || to_char(starts_at, '_YYYYMMDD') AS name,
                storage_options,
                starts_at AT TIME ZONE 'UTC' AS starts_at,
                (starts_at + ('1 ' || partition_unit)::interval) AT TIME ZONE 'UTC' AS ends_at
            FROM history_tiers
            CROSS JOIN LATERAL generate_series(
                date_trunc(partition_unit, first AT TIME ZONE 'UTC'),
                last AT TIME ZONE 'UTC',
                ('1 ' || partition_unit)::interval
            ) AS starts_at
            WHERE (tiers IS NULL OR tier = ANY (tiers))
                AND to_regclass(table_name || to_char(starts_at, '_YYYYMMDD')) IS NULL
            ORDER BY starts_at
        LOOP
            -- Two makers at once: the second waits for the first and then finds the table there. An advisory lock
            -- would not do: only the lock of a table makes a session look at what has changed in the catalogue.
            LOCK TABLE history_tiers IN SHARE UPDATE EXCLUSIVE MODE;
            CONTINUE WHEN to_regclass(missing.name) IS NOT NULL;
            EXECUTE format(
                'CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS) WITH (%s)',
                missing.name, missing.parent, missing.storage_options
            );
            EXECUTE format(
                'ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                missing.parent, missing.name, missing.starts_at, missing.ends_at
            );
            made := made + 1;
        END LOOP;
        RETURN made;
    END
    $$
    """,
    # The name says where a partition begins. A table that somebody else attached has another name: it is left alone.
    """
    CREATE FUNCTION history_partitions(of_tier TEXT)
    RETURNS TABLE (name TEXT, starts_at TIMESTAMPTZ, ends_at TIMESTAMPTZ) LANGUAGE sql STABLE AS $$
        SELECT
            relname::text,
            day::timestamp AT TIME ZONE 'UTC',
            (day + ('1 ' || partition_unit)::interval) AT TIME ZONE 'UTC'
        FROM history_tiers
        JOIN pg_inherits ON inhparent = to_regclass(table_name)
        JOIN pg_class ON pg_class.oid = inhrelid
        CROSS JOIN LATERAL to_date(substring(relname FROM '_(\\d{8})$'), 'YYYYMMDD') AS day
        WHERE tier = of_tier AND day IS NOT NULL
    $$
    """,
    # Whoever writes snapshots of the past says so, and the rollups of that time are made again from what is kept.
    # He holds all tiers until his commit: no step of theirs is under way then that has not seen what he wrote, nor
    # one whose progress he does not see.
    """
    CREATE FUNCTION reopen_history(since TIMESTAMPTZ) RETURNS VOID LANGUAGE sql AS $$
        SELECT FROM history_tiers ORDER BY tier FOR UPDATE;
        UPDATE history_tiers
        SET complete_until = greatest(
                date_trunc('day', since, 'UTC') - interval '1 day',
                (SELECT kept_from FROM history_tiers WHERE tier = 'raw')
            ),
            users_done = 0
        WHERE complete_until > greatest(since, (SELECT kept_from FROM history_tiers WHERE tier = 'raw'))
    $$
    """,
    # ---- deletion ----------------------------------------------------------------------------------
    # The promises of foreign keys, kept when something is deleted instead of at every insert. Who writes history
    # holds its users FOR KEY SHARE, so that none is deleted meanwhile.
    """
    CREATE FUNCTION delete_position_snapshots() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off AS $$
    DECLARE
        bounds RECORD;
    BEGIN
        SELECT
            min(user_id) AS first_user, max(user_id) AS last_user, min(timestamp) AS first, max(timestamp) AS last
        INTO bounds
        FROM deleted_snapshots;
        -- The bounds let the index leave out most pages, a range being all that BRIN can look for; the planner has no
        -- statistics to know that it does. Planned each time, so that other partitions are left out as well.
        EXECUTE '
            DELETE FROM position_snapshots
            USING deleted_snapshots
            WHERE position_snapshots.user_id = deleted_snapshots.user_id
                AND position_snapshots.timestamp = deleted_snapshots.timestamp
                AND position_snapshots.timestamp BETWEEN $1 AND $2
                AND position_snapshots.user_id BETWEEN $3 AND $4
            ' USING bounds.first, bounds.last, bounds.first_user, bounds.last_user;
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE TRIGGER portfolio_snapshots_delete_details
    AFTER DELETE ON portfolio_snapshots
    REFERENCING OLD TABLE AS deleted_snapshots
    FOR EACH STATEMENT EXECUTE FUNCTION delete_position_snapshots()
    """,
    """
    CREATE FUNCTION delete_history() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        DELETE FROM portfolio_snapshots WHERE user_id IN (SELECT id FROM deleted_users);
        DELETE FROM portfolio_rollups_30m WHERE user_id IN (SELECT id FROM deleted_users);
        DELETE FROM portfolio_rollups_1h WHERE user_id IN (SELECT id FROM deleted_users);
        DELETE FROM portfolio_rollups_3h WHERE user_id IN (SELECT id FROM deleted_users);
        DELETE FROM portfolio_rollups_1d WHERE user_id IN (SELECT id FROM deleted_users);
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE TRIGGER users_delete_history
    AFTER DELETE ON users
    REFERENCING OLD TABLE AS deleted_users
    FOR EACH STATEMENT EXECUTE FUNCTION delete_history()
    """,
    # ---- what there was before ---------------------------------------------------------------------
    """
    SELECT make_history_partitions(day, day, '{raw}')
    FROM (SELECT DISTINCT date_trunc('day', timestamp, 'UTC') AS day FROM old_portfolio_snapshots) AS days
    """,
    """
    SELECT make_history_partitions(day, day, '{details}')
    FROM (SELECT DISTINCT date_trunc('day', timestamp, 'UTC') AS day FROM old_position_snapshots) AS days
    """,
    "SELECT make_history_partitions(now(), now() + interval '7 days')",
    """
    INSERT INTO portfolio_snapshots
        (timestamp, user_id, unpriced_positions, simulated, total_value, cash_balance, investment_value)
    SELECT
        timestamp, user_id, LEAST(unpriced_positions, 32767), simulated, total_value, cash_balance, investment_value
    FROM old_portfolio_snapshots
    ORDER BY timestamp, user_id
    """,
    """
    INSERT INTO position_snapshots
        (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
    SELECT detail.timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share
    FROM old_position_snapshots AS detail
    JOIN old_portfolio_snapshots AS snapshot
        ON snapshot.id = detail.portfolio_snapshot_id AND snapshot.timestamp = detail.timestamp
    ORDER BY detail.timestamp, user_id
    """,
    "DROP TABLE old_position_snapshots, old_portfolio_snapshots",
    # ---- the valuation, as before --------------------------------------------------------------------
    # A product beyond any believable position (a trillion dollars) has no value; the product is taken once.
    # LEAST passes over a price that is not there, so that such a position has none either.
    """
    CREATE VIEW priced_positions AS
    SELECT
        positions.user_id,
        positions.ticker,
        positions.shares,
        positions.cost_basis,
        asset_prices.price AS price_per_share,
        asset_prices.traded_at,
        asset_prices.updated_at,
        asset_prices.feed,
        NULLIF(round(LEAST(positions.shares * asset_prices.price, 1e12), 2), 1e12) AS current_value
    FROM positions
    LEFT JOIN asset_prices ON asset_prices.symbol = positions.ticker
    WHERE positions.shares > 0
    """,
    # Grouped by every column of users that a reader may filter on, so that the filter reaches the index.
    """
    CREATE VIEW portfolio_valuations AS
    SELECT
        users.id AS user_id,
        users.subject,
        users.is_active,
        users.cash_balance,
        COALESCE(sum(priced_positions.current_value), 0.00) AS investment_value,
        users.cash_balance + COALESCE(sum(priced_positions.current_value), 0.00) AS total_value,
        count(priced_positions.current_value)::integer AS priced_positions,
        (count(priced_positions.ticker) - count(priced_positions.current_value))::integer
            AS unpriced_positions,
        max(priced_positions.updated_at) FILTER (WHERE priced_positions.current_value IS NOT NULL)
            AS newest_price_at,
        min(priced_positions.updated_at) FILTER (WHERE priced_positions.current_value IS NOT NULL)
            AS oldest_price_at,
        COALESCE(bool_or(priced_positions.feed = 'simulated')
            FILTER (WHERE priced_positions.current_value IS NOT NULL), FALSE) AS simulated
    FROM users
    LEFT JOIN priced_positions ON priced_positions.user_id = users.id
    GROUP BY users.id, users.subject, users.is_active, users.cash_balance
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("the history that rollups replaced cannot be brought back")
