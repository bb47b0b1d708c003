"""What the database itself notes while a system runs: every price that was stored, and what it replaced."""

import asyncpg

# The trigger sees each write whoever made it, also one that is overwritten before anybody could read it.
INSTALL = """
CREATE TABLE audited_prices (
    symbol TEXT NOT NULL,
    price NUMERIC NOT NULL,
    traded_at TIMESTAMPTZ NOT NULL,
    sequence BIGINT NOT NULL,
    traded_at_before TIMESTAMPTZ,
    sequence_before BIGINT,
    written_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);
CREATE FUNCTION audit_price() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audited_prices (symbol, price, traded_at, sequence, traded_at_before, sequence_before)
    VALUES (NEW.symbol, NEW.price, NEW.traded_at, NEW.sequence, OLD.traded_at, OLD.sequence);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_new_price AFTER INSERT ON asset_prices
FOR EACH ROW EXECUTE FUNCTION audit_price();
CREATE TRIGGER audit_other_price AFTER UPDATE ON asset_prices
FOR EACH ROW WHEN (
    (NEW.price, NEW.traded_at, NEW.sequence) IS DISTINCT FROM (OLD.price, OLD.traded_at, OLD.sequence)
)
EXECUTE FUNCTION audit_price();
"""

WENT_BACK = """
SELECT symbol, traded_at_before, traded_at, sequence_before, sequence
FROM audited_prices
WHERE traded_at < traded_at_before OR sequence <= sequence_before
ORDER BY written_at
"""

PRICES = "SELECT symbol, price, traded_at, written_at FROM audited_prices"


async def install(database_url: str) -> None:
    """Let the database note prices from now on."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(INSTALL)
    finally:
        await connection.close()
