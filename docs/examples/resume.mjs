// Goes on where its last run ended: prints every tick since, then live ones, and says when some are missing.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const state = existsSync("resume.json") ? JSON.parse(readFileSync("resume.json")) : { position: 0, sequences: {} };
const { host, username, password } = new URL(process.env.NATS_URL);
const nats = await connect({ servers: host, user: username, pass: password, maxReconnectAttempts: -1 });
const stream = await (await jetstreamManager(nats)).streams.info("PRICES");
const goesOn = 0 < state.position && state.position <= stream.state.last_seq; // else it is another stream
const prices = await jetstream(nats).consumers.get("PRICES", goesOn
  ? { deliver_policy: "by_start_sequence", opt_start_seq: state.position + 1 } : { deliver_policy: "last_per_subject" });
for await (const message of await prices.consume()) {
  const { symbol, price, sequence } = message.json();
  const missing = sequence - (state.sequences[symbol] ?? sequence - 1) - 1;
  if (missing >= 0) { // below: we have it already
    console.log(symbol, price, missing ? `after ${missing} missed` : "");
    state.sequences[symbol] = sequence;
  }
  state.position = message.seq;
  writeFileSync("resume.json", JSON.stringify(state));
}
