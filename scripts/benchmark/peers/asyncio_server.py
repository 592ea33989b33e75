"""A peer: asyncio on uvloop, `websockets` for the browsers, aio-pika for RabbitMQ.

A channel and an exclusive, auto-delete queue for each socket, bound by the id in the path to the direct exchange;
automatic acknowledgements, no confirms, one channel for all publishing.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from urllib.parse import unquote

import aio_pika
import uvloop
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

EXCHANGE = "direct_message"
CHANNELS_PER_CONNECTION = 1000


class Pool:
    """Connections for consuming, each with room for so many channels."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._channels = 0
        self._connections: list[aio_pika.abc.AbstractConnection] = []
        self._opening = asyncio.Lock()

    async def channel(self) -> AbstractChannel:
        """Open a channel."""
        number, self._channels = self._channels, self._channels + 1
        async with self._opening:
            while number // CHANNELS_PER_CONNECTION >= len(self._connections):
                self._connections.append(await aio_pika.connect(self._url))
        connection = self._connections[number // CHANNELS_PER_CONNECTION]
        return await connection.channel(publisher_confirms=False)


async def main() -> None:
    """Serve until killed."""
    url = os.environ["AMQP_URL"]
    pool = Pool(url)
    publishing = await (await aio_pika.connect(url)).channel(publisher_confirms=False)
    exchange = await publishing.declare_exchange(EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)

    async def session(browser: ServerConnection) -> None:
        async def deliver(delivery: AbstractIncomingMessage) -> None:
            await browser.send(delivery.body, text=True)

        assert browser.request is not None
        user = unquote(browser.request.path.removeprefix("/"))
        channel = await pool.channel()
        try:
            queue = await channel.declare_queue(exclusive=True, auto_delete=True)
            await queue.bind(EXCHANGE, user)
            await queue.consume(deliver, no_ack=True)
            async for text in browser:
                try:
                    to = str(json.loads(text)["to"]["id"])
                except (ValueError, KeyError, TypeError):
                    continue
                body = text.encode() if isinstance(text, str) else text
                await exchange.publish(aio_pika.Message(body), to)
        except ConnectionClosed:
            pass
        finally:
            await channel.close()

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {"compression": None, "subprotocols": ["echo-protocol"], "backlog": 1024}
    async with serve(session, sock=listener, **options) as server:
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await server.serve_forever()


uvloop.run(main())
