"""The synthetic market's instruments: a plausible price, volatility, tape and trade size for each. All invented."""

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Listing:
    """`volatility` is a year's; `lot` is the smallest trade; tape A is NYSE, B Arca, C Nasdaq."""

    price: float
    volatility: float
    tape: str = "C"
    lot: Decimal = Decimal(100)


LISTINGS: dict[str, Listing] = {
    "AAPL": Listing(262.50, 0.28),
    "ABBV": Listing(214.30, 0.24, "A"),
    "ADBE": Listing(351.20, 0.35),
    "AIG": Listing(78.40, 0.24, "A"),
    "AMD": Listing(221.70, 0.48),
    "AMZN": Listing(231.40, 0.32),
    "AVGO": Listing(348.60, 0.42),
    "BA": Listing(208.90, 0.34, "A"),
    "BAC": Listing(53.20, 0.25, "A"),
    "BRK.B": Listing(502.80, 0.17, "A"),
    "BTC/USD": Listing(96_400.00, 0.48, lot=Decimal("0.001")),
    "COST": Listing(918.50, 0.22),
    "CRM": Listing(246.10, 0.33, "A"),
    "CSCO": Listing(77.60, 0.23),
    "CVX": Listing(155.70, 0.24, "A"),
    "DIS": Listing(111.30, 0.28, "A"),
    "ETH/USD": Listing(3_250.00, 0.62, lot=Decimal("0.01")),
    "GE": Listing(304.20, 0.30, "A"),
    "GOOG": Listing(279.40, 0.30),
    "GOOGL": Listing(278.60, 0.30),
    "HD": Listing(372.80, 0.23, "A"),
    "IBM": Listing(305.10, 0.26, "A"),
    "INTC": Listing(37.90, 0.46),
    "IWM": Listing(241.60, 0.22, "B"),
    "JNJ": Listing(192.40, 0.17, "A"),
    "JPM": Listing(308.70, 0.23, "A"),
    "KO": Listing(70.80, 0.16, "A"),
    "LLY": Listing(962.30, 0.34, "A"),
    "MA": Listing(548.90, 0.21, "A"),
    "META": Listing(621.50, 0.36),
    "MRK": Listing(92.60, 0.24, "A"),
    "MSFT": Listing(508.20, 0.25),
    "NFLX": Listing(1_112.40, 0.35),
    "NVDA": Listing(188.30, 0.44),
    "ORCL": Listing(223.80, 0.40, "A"),
    "PEP": Listing(146.20, 0.18),
    "PFE": Listing(24.90, 0.25, "A"),
    "PG": Listing(147.50, 0.17, "A"),
    "QQQ": Listing(611.80, 0.21),
    "SOL/USD": Listing(142.00, 0.82, lot=Decimal("0.1")),
    "SPY": Listing(672.40, 0.16, "B"),
    "TSLA": Listing(404.60, 0.55),
    "UNH": Listing(327.10, 0.33, "A"),
    "V": Listing(336.40, 0.20, "A"),
    "WMT": Listing(102.70, 0.21, "A"),
    "XOM": Listing(117.90, 0.24, "A"),
}


def tape_of(symbol: str) -> str:
    """Return the tape that reports a stock's trades; A for one that is not listed here."""
    listing = LISTINGS.get(symbol)
    return listing.tape if listing else "A"
