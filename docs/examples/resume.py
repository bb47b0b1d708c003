# Goes on where its last run ended: prints every tick since, then live ones, and says when some are missing.
import asyncio, json, os, pathlib, nats
from nats.js.api import ConsumerConfig, DeliverPolicy

STATE = pathlib.Path("resume.json")

async def main():
    state = json.loads(STATE.read_text()) if STATE.exists() else {"position": 0, "sequences": {}}
    position, sequences = state["position"], state["sequences"]  # in the stream, and the last of each symbol
    client = await nats.connect(os.environ["NATS_URL"], max_reconnect_attempts=-1)
    js = client.jetstream()
    start = ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT)
    if 0 < position <= (await js.stream_info("PRICES")).state.last_seq:  # else it is another stream
        start = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=position + 1)
    prices = await js.subscribe("prices.v1.>", ordered_consumer=True, idle_heartbeat=1, config=start)
    async for message in prices.messages:
        tick, position = json.loads(message.data), message.metadata.sequence.stream
        symbol, sequence = tick["symbol"], tick["sequence"]
        missing = sequence - sequences.get(symbol, sequence - 1) - 1
        if missing >= 0:  # below: we have it already
            print(symbol, tick["price"], f"after {missing} missed" if missing else "", flush=True)
            sequences[symbol] = sequence
        STATE.write_text(json.dumps({"position": position, "sequences": sequences}))

asyncio.run(main())
