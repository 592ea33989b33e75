"""A peer: Flask-SocketIO on gevent, kombu for RabbitMQ. Run by `python -m gevent.monkey`.

An exclusive, auto-delete queue for each socket, bound by the id of the request to the direct exchange; automatic
acknowledgements, no confirms. One connection publishes, another one consumes for all: a greenlet reads it, and the
sockets only write to it (declare, consume and cancel go out without waiting for an answer), since a kombu
connection can't be read by two greenlets.
"""

from __future__ import annotations

import json
import os
import socket

import gevent
from flask import Flask, request
from flask_socketio import SocketIO
from gevent.lock import Semaphore
from gevent.pywsgi import WSGIServer
from geventwebsocket.handler import WebSocketHandler
from kombu import Connection, Exchange, Queue

url = os.environ["AMQP_URL"]
exchange = Exchange("direct_message", "direct", durable=True)
app = Flask(__name__)
# Handlers that run in the reader's greenlet keep the order of a socket's messages, and cost less.
socketio = SocketIO(app, async_mode="gevent", async_handlers=False)

publishing = Connection(url)
producer = publishing.Producer(exchange=exchange, auto_declare=True)
publish_lock = Semaphore()

consuming = Connection(url)
channel = consuming.channel()
consume_lock = Semaphore()


@socketio.on("connect")
def on_connect() -> None:
    """Open the socket's queue."""
    sid = request.sid

    def deliver(message) -> None:
        socketio.emit("message", json.loads(message.body), to=sid)

    queue = Queue(f"socketio.{sid}", exchange, request.args["id"], exclusive=True, auto_delete=True)
    with consume_lock:
        queue = queue.bind(channel)
        queue.queue_declare(nowait=True)
        queue.queue_bind(nowait=True)
        channel.basic_consume(queue.name, consumer_tag=sid, no_ack=True, nowait=True, callback=deliver)


@socketio.on("disconnect")
def on_disconnect(*_: object) -> None:
    """Give the socket's queue up."""
    with consume_lock:
        channel.basic_cancel(request.sid, nowait=True)


@socketio.on("message")
def on_message(data) -> None:
    """Publish a message to whom it is for."""
    body = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    with publish_lock:
        producer.publish(
            body,
            routing_key=str(data["to"]["id"]),
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=1,
        )


def consume() -> None:
    """Hand deliveries to their sockets until killed."""
    while True:
        consuming.drain_events()


exchange(publishing.default_channel).declare()
listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
# On Linux the accepted sockets inherit it.
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
gevent.spawn(consume).link_exception(lambda _: os._exit(1))
print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
WSGIServer(listener, app, handler_class=WebSocketHandler, log=None).serve_forever()
