"""What a process tells Prometheus about its bus."""

from prometheus_client import Counter, Gauge

connected = Gauge("bus_connected", "Whether the connection to NATS is there, 1 or 0")
reconnects = Counter("bus_reconnects", "Connections to NATS that were made again after one was lost")
problems = Counter("bus_problems", "Problems of the connection or of JetStream that were logged, each once")
unacknowledged = Counter(
    "bus_publishes_unacknowledged",
    "Messages that JetStream did not acknowledge, by stream and why: lost (the connection was), silent (no answer, or "
    "no leader), refused (with an error)",
    ["stream", "why"],
)
storing = Gauge(
    "bus_storing", "Whether JetStream acknowledges what this process publishes, by stream, 1 or 0", ["stream"]
)
consumers_lost = Counter("bus_consumers_lost", "How often a consumer had to be made again", ["consumer"])
redeliveries = Counter(
    "bus_redeliveries", "Messages that came again: whoever had them died or handed them back", ["consumer"]
)
dead_letters = Counter("bus_dead_letters", "Messages that were put aside as dead letters", ["consumer"])
dead_letters_kept = Gauge("bus_dead_letters_kept", "Dead letters that wait for an operator")
