// Prints every symbol's last price at once, then each change as it happens.
import { jetstream } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const { host, username, password } = new URL(process.env.NATS_URL);
const nats = await connect({ servers: host, user: username, pass: password, maxReconnectAttempts: -1 });
const prices = await jetstream(nats).consumers.get("PRICES", { deliver_policy: "last_per_subject" });
for await (const message of await prices.consume()) {
  const tick = message.json();
  console.log(tick.symbol, tick.price, tick.traded_at, tick.feed);
}
