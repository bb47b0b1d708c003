// Asks for the current prices of the symbols it is given: node ask.mjs AAPL BRK.B
import { connect } from "@nats-io/transport-node";

const { host, username, password } = new URL(process.env.NATS_URL);
const nats = await connect({ servers: host, user: username, pass: password });
const question = JSON.stringify({ symbols: process.argv.slice(2) });
const answer = await nats.request("feed.v1.prices_requested", question, { timeout: 2000 });
if (answer.headers?.has("Nats-Service-Error-Code")) {
  console.error("refused:", answer.headers.get("Nats-Service-Error-Code"), answer.headers.get("Nats-Service-Error"));
  process.exit(1);
}
const { prices, unknown } = answer.json();
for (const { symbol, price, confirmed_at } of prices) {
  console.log(symbol, price, "known to be the last at", confirmed_at);
}
console.log("without a price:", ...unknown);
await nats.close();
