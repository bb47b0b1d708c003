"""Market simulator: speaks Alpaca's REST protocol and its real-time streams, with prices that are not real.

Reads nothing but, for a replay, one file of recorded one-minute bars. Writes and publishes nothing. Every answer
carries the header `X-Market-Simulated: true`. The synthetic market trades around the clock, so that a demo lives at
any hour, while clock and calendar tell the real hours of the New York Stock Exchange; a replay tells recorded time.
Controls for tests live under `/simulator/` and are not part of Alpaca's protocol.
"""
