# Asks for the current prices of the symbols it is given: python ask.py AAPL BRK.B
import asyncio, json, os, sys, nats

async def main():
    client = await nats.connect(os.environ["NATS_URL"])
    question = json.dumps({"symbols": sys.argv[1:]}).encode()
    answer = await client.request("feed.v1.prices_requested", question, timeout=2)
    headers = answer.headers or {}
    if "Nats-Service-Error-Code" in headers:
        sys.exit(f"refused: {headers['Nats-Service-Error-Code']} {headers['Nats-Service-Error']}")
    reply = json.loads(answer.data)
    for price in reply["prices"]:
        print(price["symbol"], price["price"], "known to be the last at", price["confirmed_at"])
    print("without a price:", *reply["unknown"])
    await client.close()

asyncio.run(main())
