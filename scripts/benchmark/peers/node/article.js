// The peer that figures are given relative to: a Node.js server of the article's design, repaired.
//
// As in the article: `websocket` and `amqplib`, a channel and an exclusive queue for each socket, bound by the id in
// the path to the direct exchange, automatic acknowledgements, no confirms, and its envelope around each message.
// Repaired: one channel for all publishing; queues that go with their socket; the upgrade is answered when the
// queue is there; binary messages; one bad message ends nothing; more than 2,047 sockets.
'use strict';

const amqp = require('amqplib/callback_api');
const http = require('http');
const WebSocketServer = require('websocket').server;

const URL = process.env.AMQP_URL;
const EXCHANGE = 'direct_message';
const CHANNELS_PER_CONNECTION = 1000;

function must(error) {
  if (error) {
    console.error(error);
    process.exit(1);
  }
}

function open(ready) {
  amqp.connect(URL, { noDelay: true }, (error, connection) => {
    must(error);
    connection.on('error', must);
    connection.on('close', () => must(new Error('the broker closed a connection')));
    ready(connection);
  });
}

// Connections for consuming, each with room for so many channels; the last one may still be opening.
const pool = [];

function withRoom(use) {
  const place = pool.find((one) => one.channels < CHANNELS_PER_CONNECTION) || grow();
  place.channels += 1;
  if (place.connection) use(place);
  else place.waiting.push(use);
}

function grow() {
  const place = { channels: 0, connection: null, waiting: [] };
  pool.push(place);
  open((connection) => {
    place.connection = connection;
    for (const use of place.waiting.splice(0)) use(place);
  });
  return place;
}

function consume(id, deliver, ready) {
  withRoom((place) => {
    place.connection.createChannel((error, channel) => {
      must(error);
      channel.assertQueue('', { exclusive: true, autoDelete: true }, (error, queue) => {
        must(error);
        channel.bindQueue(queue.queue, EXCHANGE, id);
        channel.consume(queue.queue, deliver, { noAck: true }, (error) => {
          must(error);
          ready(() => channel.close(() => { place.channels -= 1; }));
        });
      });
    });
  });
}

function pack(message) {
  return Buffer.from(JSON.stringify(message));
}

function unpack(body, socket) {
  const message = JSON.parse(body.toString());
  if (message.type === 'utf8') socket.sendUTF(message.utf8Data);
  else socket.sendBytes(Buffer.from(message.binaryData));
}

function serve(publishing) {
  const server = http.createServer((request, response) => response.end('hello'));
  const sockets = new WebSocketServer({ httpServer: server, autoAcceptConnections: false });

  sockets.on('request', (request) => {
    const id = decodeURIComponent(request.resourceURL.pathname.slice(1));
    let socket = null;
    consume(
      id,
      (delivery) => {
        if (delivery && socket && socket.connected) unpack(delivery.content, socket);
      },
      (cancel) => {
        socket = request.accept('echo-protocol', request.origin);
        socket.on('close', cancel);
        socket.on('message', (message) => {
          let to;
          try {
            const data = JSON.parse(message.type === 'utf8' ? message.utf8Data : message.binaryData.toString());
            to = `${data.to.id}`;
          } catch (error) {
            return;
          }
          publishing.publish(EXCHANGE, to, pack(message), { persistent: true });
        });
      },
    );
  });

  server.listen({ port: 0, host: '127.0.0.1', backlog: 1024 }, () => {
    console.log(`listening on http://127.0.0.1:${server.address().port}`);
  });
}

open((connection) => {
  connection.createChannel((error, channel) => {
    must(error);
    channel.assertExchange(EXCHANGE, 'direct', { durable: true }, (error) => {
      must(error);
      serve(channel);
    });
  });
});
