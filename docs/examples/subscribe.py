# Prints every symbol's last price at once, then each change as it happens.
import asyncio, json, os, nats
from nats.js.api import DeliverPolicy

async def main():
    client = await nats.connect(os.environ["NATS_URL"], max_reconnect_attempts=-1)
    prices = await client.jetstream().subscribe(
        "prices.v1.>", ordered_consumer=True, idle_heartbeat=1,  # heals seconds after a restart of the server
        deliver_policy=DeliverPolicy.LAST_PER_SUBJECT)
    async for message in prices.messages:
        tick = json.loads(message.data)
        print(tick["symbol"], tick["price"], tick["traded_at"], tick["feed"], flush=True)

asyncio.run(main())
