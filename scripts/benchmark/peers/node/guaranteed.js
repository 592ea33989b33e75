// A peer that promises what imrelay promises by default, on `ws` and amqplib.
//
// The same exchanges, queues and arguments: `direct_message` leads to `user.<id>` (topic), and that to the durable
// `inbox.<id>` with a single active consumer and to a live queue for each further socket of the user. Messages are
// persistent, mandatory, and published on a confirm channel: who gave a message an `id` is answered when the broker
// has confirmed it, or told why not. A delivery is acknowledged when the write to its browser is done. One channel
// for each socket; the upgrade is answered when the socket's consumer is there. When the broker is lost this process
// ends: nobody has been told of what was not confirmed then, and what was not acknowledged comes again.
'use strict';

const amqp = require('amqplib/callback_api');
const crypto = require('crypto');
const http = require('http');
const { WebSocketServer } = require('ws');
const { Consumer, EXCHANGE, declareUser } = require('./consumer');

const URL = process.env.AMQP_URL;
const CHANNELS_PER_CONNECTION = 1000;
const PING_EVERY = 25000;
const MOST_UNSENT = 1048576;

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

function withChannel(use) {
  let place = pool.find((one) => one.channels < CHANNELS_PER_CONNECTION);
  if (!place) {
    place = { channels: 0, connection: null, waiting: [] };
    pool.push(place);
    const grown = place;
    open((connection) => {
      grown.connection = connection;
      for (const one of grown.waiting.splice(0)) one();
    });
  }
  place.channels += 1;
  const create = () => place.connection.createChannel((error, channel) => {
    must(error);
    channel.once('close', () => { place.channels -= 1; });
    use(channel);
  });
  if (place.connection) create();
  else place.waiting.push(create);
}

function isId(id) {
  return (typeof id === 'string' && id.length > 0 && Buffer.byteLength(id) <= 128) || Number.isInteger(id);
}

function userOf(request) {
  try {
    const user = decodeURIComponent(request.url.slice(1));
    return isId(user) ? user : null;
  } catch (error) {
    return null;
  }
}

const RUN = crypto.randomBytes(8).toString('hex');
let lastMid = 0;

function newMid() {
  lastMid += 1;
  return `${RUN}${lastMid.toString(36).padStart(10, '0')}`;
}

class Publisher {
  constructor(channel) {
    this.channel = channel;
    // Mids that came back: no queue was there.
    this.returned = new Set();
    // By recipient: those whose inbox is being opened since a message to them came back.
    this.openings = new Map();
    this.waiting = new Set();
    channel.on('error', must);
    channel.on('return', (message) => this.cameBack(message.properties.messageId, message.fields.routingKey));
    channel.on('drain', () => {
      for (const socket of this.waiting) socket.resume();
      this.waiting.clear();
    });
  }

  publish(message) {
    const opening = this.openings.size ? this.openings.get(message.to) : undefined;
    if (opening) {
      message.socket.pause();
      opening.held.push(message);
      return;
    }
    const hasRoom = this.channel.publish(EXCHANGE, message.to, message.body, message.options, (error) => {
      if (error) return message.answer('inbox_full');
      if (!this.returned.delete(message.options.messageId)) return message.answer(null);
      const opening = this.openings.get(message.to);
      opening.again.push(message);
      return this.finish(message.to, opening);
    });
    if (!hasRoom) {
      message.socket.pause();
      this.waiting.add(message.socket);
    }
  }

  // Nobody of that id was ever here: open the inbox. The broker returns all that was published before it opens it.
  cameBack(mid, to) {
    this.returned.add(mid);
    const known = this.openings.get(to);
    if (known) {
      known.count += 1;
      return;
    }
    const opening = { count: 1, again: [], held: [], isOpen: false };
    this.openings.set(to, opening);
    declareUser(this.channel, to, (error) => {
      must(error);
      opening.isOpen = true;
      this.finish(to, opening);
    });
  }

  // Publishes in order, once the inbox is open and each message that came back is confirmed as such.
  finish(to, opening) {
    if (!opening.isOpen || opening.again.length < opening.count) return;
    this.openings.delete(to);
    for (const message of opening.again) this.publish(message);
    for (const message of opening.held) {
      if (!this.waiting.has(message.socket)) message.socket.resume();
      this.publish(message);
    }
  }
}

// Sends an answer; who takes none of them is not read until it does.
function say(socket, what) {
  const text = JSON.stringify(what);
  if (socket.bufferedAmount < MOST_UNSENT) return socket.send(text);
  socket.pause();
  return socket.send(text, () => socket.resume());
}

function refuse(socket, code, message, id) {
  say(socket, { error: { code, message, id } });
}

function receive(socket, user, publisher, data, isBinary) {
  let message;
  try {
    message = JSON.parse(data.toString());
  } catch (error) {
    return refuse(socket, 'bad_json', error.message);
  }
  const id = message && message.id;
  if (!message || !message.to || !isId(message.to.id)) return refuse(socket, 'bad_message', 'to.id is missing', id);
  let body = data;
  if (message.from === undefined) {
    message.from = { id: user };
    body = Buffer.from(JSON.stringify(message));
  } else if (!message.from || `${message.from.id}` !== user) {
    return refuse(socket, 'from_mismatch', 'from.id is not yours', id);
  }
  const mid = newMid();
  const time = Date.now();
  const options = {
    persistent: true,
    mandatory: true,
    messageId: mid,
    contentType: 'application/json',
    type: isBinary ? 'binary' : 'text',
    appId: 'imrelay',
  };
  const answer = (code) => {
    if (code) return refuse(socket, code, 'the inbox takes no more', id);
    return id === undefined ? undefined : say(socket, { ack: { id, mid, time } });
  };
  return publisher.publish({ socket, to: `${message.to.id}`, body, options, answer });
}

function greet(socket, user, publisher) {
  socket.isAlive = true;
  socket.on('pong', () => { socket.isAlive = true; });
  socket.on('error', () => socket.terminate());
  socket.on('message', (data, isBinary) => receive(socket, user, publisher, data, isBinary));
  socket.on('close', () => publisher.waiting.delete(socket));
}

function serve(publisher) {
  const server = http.createServer((request, response) => response.end('hello'));
  const sockets = new WebSocketServer({
    noServer: true,
    maxPayload: 65536,
    perMessageDeflate: false,
    handleProtocols: (offered) => (offered.has('echo-protocol') ? 'echo-protocol' : false),
  });

  server.on('upgrade', (request, tcp, head) => {
    const user = userOf(request);
    if (user === null) return tcp.end('HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n');
    tcp.setNoDelay(true);
    tcp.on('error', () => tcp.destroy());
    // What comes before the upgrade is answered is written as soon as it is.
    let early = [];
    let socket = null;
    let consumer = null;
    let isOver = false;
    tcp.once('close', () => {
      isOver = true;
      if (consumer) consumer.detach();
    });
    const write = (body, isBinary, written) => {
      if (!socket) return early.push([body, isBinary, written]);
      return socket.send(body, { binary: isBinary }, (error) => { if (!error) written(); });
    };
    return withChannel((channel) => {
      if (isOver) return channel.close();
      consumer = new Consumer(channel, user, write, () => tcp.destroy());
      channel.on('error', () => {
        consumer.isOver = true; // the broker has closed it
        tcp.destroy();
      });
      return consumer.attach((error) => {
        if (error || isOver) return tcp.destroy();
        return sockets.handleUpgrade(request, tcp, head, (upgraded) => {
          socket = upgraded;
          greet(socket, user, publisher);
          for (const one of early) write(...one);
          early = null;
        });
      });
    });
  });

  setInterval(() => {
    for (const socket of sockets.clients) {
      if (!socket.isAlive) {
        socket.terminate();
      } else {
        socket.isAlive = false;
        socket.ping();
      }
    }
  }, PING_EVERY);

  server.listen({ port: 0, host: '127.0.0.1', backlog: 1024 }, () => {
    console.log(`listening on http://127.0.0.1:${server.address().port}`);
  });
}

open((connection) => {
  connection.createConfirmChannel((error, channel) => {
    must(error);
    channel.assertExchange(EXCHANGE, 'direct', { durable: true }, (error) => {
      must(error);
      serve(new Publisher(channel));
    });
  });
});
